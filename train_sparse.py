"""Segmentation from a fifth of the slices: coarse U-Net, morphology, spatial-continuity network.

Segmentation of mitochondria from electron microscopy images using spatial continuity (2022). IEEE
International Symposium on Biomedical Imaging (ISBI). arXiv:2206.02392

A person labels every fifth slice of a stack. A 2D network learns from these and segments all slices
coarsely (stage 1, `coarse`). What neighbouring slices agree on corrects each slice, and labelled
slices reach into their neighbourhood (stage 2, `mpp`: morphological post-processing). A second
network learns to turn the coarse masks of 15 neighbouring slices into the corrected mask of the
middle one (stage 3, `scm`: spatial-continuity model); it then refines stacks without any label.

Equations:
    eq. 1 (union with eroded labels)    propagate
    eq. 2 (false positives)             remove_false_positives
    eq. 3 (false negatives)             fill_false_negatives
    section 2.2 (piecewise affine)      piecewise_affine_displacement; --deform
    section 2.3 (stage 2)               refine, postprocess
    section 2.4 (stage 3)               neighbour_masks; soft labels from postprocess
    Dice loss                           emseg.soft_dice_loss

Differences from the paper:
    1. Crops of 512 x 512 instead of whole slices, of which half hold foreground (--foreground).
       --patch-size 768 1024 are whole slices, which only half turns fit; the authors pad them with
       zeros to squares of 1024.
    2. Rotations are quarter turns; half of the crops are deformed. The authors deform and turn
       copies of the slices in advance: about half of them deformed, a fifth also turned by 22 to
       45 degrees.
    3. Both neighbouring labelled slices reach a slice by eq. 1, as in the authors' code, not only
       the closest. Erosions use the 3 x 3 cross, as theirs.
    4. Eqs. 2 and 3 hold for all slices at once, each from the slices as they were before; the
       authors go through the stack and use what they have just changed.
    5. For faults of n = 2 slices eqs. 2 and 3 look at n + 2 consecutive slices, as printed: a pixel
       in slices i and i + 1 stays if it is in i - 1 or i + 2. The authors' code looks at i - 2 and
       i + 2, which deletes the middle slice of an object of three. Nor are eqs. 2 and 3 applied
       with the labelled slices around a slice in place of its neighbours, as their code does: that
       deletes what begins and ends between labelled slices.
    6. Threshold 0.5; the authors' code has 0.2 (--threshold).
    7. Eight different views are averaged; those of the authors' code are four, each twice.
    8. Without validation slices the last epoch counts; the authors keep that of the lowest training
       loss.
    9. Grey levels are normalised by the mean and spread of the training slices, the authors divide
       by 255. --normalize equalize (not in paper) helps where brightness drifts along the stack.
    10. An epoch of stage 3 has 16 crops of each slice, as many as the authors turn copies of a
        stack; one of unet3d as many windows as tile the annotated volumes.
    11. Several foreground classes go through the same stages: each class by itself in stage 2, and
        a set of masks for each class as input of stage 3.

Run:
    GPU    python train_sparse.py --volume stack.tif --label drawn.tif --label-slices 0:165:5
    CPU    python train_sparse.py --demo

Expect:
    GPU    not run
    CPU    test Dice of coarse, mpp, scm 0.74, 0.71, 0.79 (mitochondria) and 0.89, 0.89, 0.93
           (nucleus), seed 0, 78 s on two cores
    EPFL mitochondria from 22 slices (command in the README), unet of width 16, 1200 + 1200 steps:
    test IoU of coarse, mpp, scm 0.871, 0.893, 0.900 (seed 0) and 0.863, 0.884, 0.890 (seed 1), 21
    minutes and 1.8 GiB on two CPU cores beside other work
"""

import argparse
import collections
import functools
import math

import numpy as np
import torch
from scipy import ndimage

import emseg

MODELS = {**emseg.NETWORKS, **emseg.NETWORKS_3D}
FAULTS = (1, 2)                     # of so many slices are mended by eqs. 2 and 3
HALO = 2 * sum(FAULTS)              # slices that a slice's result depends on, on either side


# -- stage 1: augmentation -------------------------------------------------------------------------


def piecewise_affine_displacement(batch, size, device, scale=(0.01, 0.05), points=4):
    """Displacement (B, H, W, 2) in pixels (x, y): affine on the triangles of a jittered grid.

    Each of points x points regular points, the corners of the image among them, moves by
    N(0, s * side) in y and x, s drawn from `scale` for each image. Each cell between four points is
    cut into two triangles, and each triangle moves as its three corners do. (imgaug's
    PiecewiseAffine, section 2.2, but what it would clip to the image may point outside of it here.)
    """
    H, W = size
    strength = torch.empty(batch, 1, 1, 1, device=device).uniform_(*scale)
    side = torch.tensor([W, H], device=device).view(1, 2, 1, 1)
    corner = torch.randn(batch, 2, points, points, device=device) * strength * side
    y = torch.linspace(0, points - 1, H, device=device)
    x = torch.linspace(0, points - 1, W, device=device)
    row, column = y.long().clamp(max=points - 2), x.long().clamp(max=points - 2)
    v, u = (y - row)[:, None], x - column                   # place inside a cell, 0 to 1
    row = row[:, None]
    top_left, top_right = corner[..., row, column], corner[..., row, column + 1]
    low_left, low_right = corner[..., row + 1, column], corner[..., row + 1, column + 1]
    upper = top_left + u * (top_right - top_left) + v * (low_left - top_left)
    lower = low_right + (1 - u) * (low_left - low_right) + (1 - v) * (top_right - low_right)
    return torch.where(u + v < 1, upper, lower).permute(0, 2, 3, 1)


def deformation(image, kind):
    """The displacement of half of the crops (B, ..., H, W), or None; kind: see --deform."""
    field_of = {"affine": piecewise_affine_displacement, "elastic": emseg.elastic_displacement}
    if kind == "none":
        return None
    field = field_of[kind](len(image), image.shape[-2:], image.device)
    return field * (torch.rand(len(image), 1, 1, 1, device=image.device) < 0.5)


# -- stage 2: morphological post-processing --------------------------------------------------------


def remove_small(mask, min_size):
    """A mask (Y, X) bool without its 4-connected objects of less than min_size pixels."""
    objects, count = ndimage.label(mask)
    large = np.bincount(objects.ravel(), minlength=count + 1) >= min_size
    large[0] = False
    return large[objects]


def propagate(label, k, zs, erosions):
    """What labelled slices say about their neighbourhood (eq. 1): yields a mask (Y, X) bool of
    class k for each z of zs.

    label: lazy annotation with its `slices`. Both neighbouring labelled slices reach a slice, each
    eroded `erosions` times for every slice of its distance. A pixel survives m erosions by the
    3 x 3 cross where its city-block distance to the background is more than m, so one distance
    transform does for all distances.
    """
    @functools.lru_cache(maxsize=2)
    def depth(z):
        mask = label[z] == k
        return ndimage.distance_transform_cdt(mask, "taxicab") if not mask.all() else np.inf

    for z in zs:
        reached = np.zeros(label.shape[1:], dtype=bool)
        below, above = label.slices[label.slices <= z][-1:], label.slices[label.slices >= z][:1]
        for labelled in {*below, *above}:
            reached |= depth(labelled) > erosions * abs(z - labelled)
        yield reached


def remove_false_positives(mask, below, above):
    """Eq. 2 for faults of n slices; below, above: the n masks on either side, nearest first."""
    for one, other in zip(below, above[::-1]):
        mask = mask & (one | other)
    return mask


def fill_false_negatives(mask, below, above):
    """Eq. 3 for faults of n slices, see remove_false_positives."""
    for one, other in zip(below, above[::-1]):
        mask = mask | (one & other)
    return mask


def with_neighbours(masks, n, rule):
    """Apply eq. 2 or 3, a rule(mask, below, above), to each slice of a stack: yields as many masks
    (Y, X) bool as there are. Beyond the ends of a stack its last slice counts."""
    masks = iter(masks)
    near = collections.deque([next(masks)] * (n + 1), 2 * n + 1)

    def applied():
        around = list(near)
        return rule(around[n], around[:n][::-1], around[n + 1:])

    for mask in masks:
        near.append(mask)
        if len(near) == 2 * n + 1:
            yield applied()
    for _ in range(min(n, len(near) - n)):
        near.append(near[-1])
        yield applied()


def refine(coarse, label, k, zs, rules):
    """Stage 2 for one class of a stack (section 2.3): yields its mask (Y, X) bool for each z of the
    range zs, beyond which nothing is seen. coarse, label, rules: see postprocess."""
    annotated = set() if label is None else {*label.slices}

    def annotate(masks):
        """Put what is annotated in: it stays as it is."""
        for z, mask in zip(zs, masks):
            if z in annotated:
                truth = label[z]
                mask = np.where(truth == emseg.IGNORE, mask, truth == k)
            yield mask

    def settle(masks):
        return annotate(remove_small(mask, rules["min_size"]) for mask in masks)

    masks = (coarse[z] == k for z in zs)
    if annotated:
        reached = propagate(label, k, zs, rules["erosions"])
        masks = map(np.logical_or, masks, reached)                                      # eq. 1
    masks = settle(masks)
    for n in FAULTS:
        masks = annotate(with_neighbours(masks, n, remove_false_positives))             # eq. 2
        masks = settle(with_neighbours(masks, n, fill_false_negatives))                 # eq. 3
    return masks


def postprocess(coarse, label, slab, classes, rules):
    """Stage 2 on some slices of a stack: class ids uint8 (n, Y, X) of the slices `slab`.

    coarse: lazy class ids (Z, Y, X); label: lazy annotation with IGNORE elsewhere and `slices`, or
    None for a stack without any, where eqs. 2 and 3 work alone; rules: {"erosions", "min_size"}, or
    None to put the annotation in and leave all else. Each class is refined by itself; where two
    then claim a pixel, its coarse class wins if it is one of them, else the lower id. Slice by
    slice, so that a dozen masks are in memory and not the stack.
    """
    if not rules:
        ids, truth = coarse[slab], emseg.IGNORE if label is None else label[slab]
        return np.where(truth == emseg.IGNORE, ids, truth)
    zs = range(max(0, slab.start - HALO), min(len(coarse), slab.stop + HALO))
    result = np.zeros((slab.stop - slab.start, *coarse.shape[1:]), np.uint8)
    for k in reversed(range(1, len(classes))):
        for z, claimed in zip(zs, refine(coarse, label, k, zs, rules)):
            if slab.start <= z < slab.stop:
                own = result[z - slab.start]
                own[claimed & ((own == 0) | (own != coarse[z]))] = k
    return result


def write_refined(run, item, coarse, label, path):
    """Stage 2 of an Item, or with --no-mpp its annotation alone, into a file unless it is there.

    coarse, label: see postprocess. All processes share the work.
    """
    args = run.args
    rules = dict(erosions=args.erosions, min_size=args.min_size) if args.mpp else None
    if not path.exists():
        run.say(f"stage 2 of {item.volume.path}")
        with run.writers(item, (path, coarse.shape, np.uint8)) as (writer,):
            pixels = max(2**24, 2 * HALO * math.prod(coarse.shape[1:]))
            for slab in emseg.slabs(coarse.shape, pixels)[run.rank :: run.world]:
                writer[slab] = postprocess(coarse, label, slab, run.data.classes, rules)
    return path


# -- stage 3: spatial continuity -------------------------------------------------------------------


def neighbour_masks(ids, classes):
    """Class ids (B, context, H, W) of neighbouring slices -> network input (B, context * K, H, W).

    One mask of 0 and 1 for each slice and each of the K foreground classes (section 2.4).
    """
    masks = [ids == k for k in range(1, len(classes))]
    return torch.cat(masks, dim=1).float()


def augment_masks(coarse, soft, deform):
    """Flip masks and soft labels (B, context, H, W) uint8 in z, y and x, turn and deform them, all
    alike (section 3.1). deform: see --deform.

    Returns the masks, exact class ids as float32, and the middle soft label (B, H, W) int64.
    """
    grid = emseg.sampling_grid(len(coarse), coarse.shape[-2:], coarse.device, flip=True, rot90=True,
                               displacement=deformation(coarse, deform))
    flip = torch.rand(len(coarse), 1, 1, 1, device=coarse.device) < 0.5
    coarse, soft = [emseg.warp(stack, grid, "nearest") for stack in (coarse, soft)]
    return torch.where(flip, coarse.flip(1), coarse), soft[:, soft.shape[1] // 2].long()


# -- the command -----------------------------------------------------------------------------------


def parse_args(argv=None):
    flag = argparse.BooleanOptionalAction
    parser = emseg.Parser(__file__, __doc__)
    emseg.add_common_args(parser, MODELS, sources={
        "model": "in stage 1: unet is the paper's, unet3d its baseline", "epochs": "section 3.1",
        "steps_per_epoch": "default: 48 crops of each annotated slice, authors' code; as many windows "
        "as tile the volumes for unet3d; 16 crops of each slice in stage 3",
        "batch_size": "section 3.1", "lr": "section 3.1", "tta": "section 3.1",
        "patch_size": "default: 512 512, or 16 128 128 for unet3d; paper: whole slices",
        "unlabeled_volume": "segmented too, and used in stage 3 (not in paper)"})
    method = parser.add_argument_group("method (sparse slices, ISBI 2022)").add_argument
    method("--deform", choices=("affine", "elastic", "none"), default="affine",
           help="deform half of the crops: piecewise affine, which keeps outlines smooth, or "
           "elastic (section 2.2, supplement)")
    method("--mpp", action=flag, default=True,
           help="stage 2, morphological post-processing (section 2.3)")
    method("--scm", action=flag, default=True,
           help="stage 3, the spatial-continuity network (section 2.4)")
    method("--erosions", type=emseg.positive(int), default=3, metavar="N",
           help="n of eq. 1, erosions per slice of distance: more for thicker slices (section 3.1; "
           "6 for platelets, section 3.4)")
    method("--min-size", type=int, default=300, metavar="N",
           help="smaller objects of a slice are removed in stage 2, in pixels (authors' code)")
    method("--context", type=emseg.positive(int), default=15, metavar="N",
           help="neighbouring masks that stage 3 sees, an odd number (section 2.4, fig. 2)")
    method("--scm-epochs", type=emseg.positive(int), metavar="N",
           help="epochs of stage 3; default: --epochs")
    method("--threshold", type=emseg.positive(float), default=0.5, metavar="P",
           help="probability above which a pixel is foreground, in stages 1 and 3; for two classes "
           "only (authors' code: 0.2)")
    method("--foreground", type=float, default=0.5, metavar="P",
           help="share of crops that must hold foreground (not in paper)")
    parser.set_defaults(model="unet", epochs=100, batch_size=16, lr=5e-4, tta=True)
    demo = dict(width=8, epochs=16, scm_epochs=14, steps_per_epoch=20, batch_size=8,
                patch_size=[128, 128], downsample=2, label_slices="0:30:5", lr=1e-3, min_size=30,
                erosions=6, normalize="equalize", label_map="3=1,2=2,*=0",
                classes=["background", "mitochondrion", "nucleus"])
    args = emseg.parse(parser, argv, demo)
    if args.patch_size is None:
        args.patch_size = [16, 128, 128] if args.model in emseg.NETWORKS_3D else [512, 512]
    args.scm_epochs = args.scm_epochs or args.epochs
    for name in ("foreground", "threshold"):
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name} {getattr(args, name)} is not between 0 and 1")
    if args.min_size < 0:
        parser.error(f"--min-size {args.min_size} is negative")
    if args.save_probability and args.mpp and not args.scm:
        parser.error("--save-probability: stage 2 gives no probabilities; leave out --no-scm, or "
                     "give --no-mpp too")
    for name, most in (("context", 255), ("erosions", 255), ("min_size", 10**9)):
        if getattr(args, name) > most:
            parser.error(f"{emseg.flag_name(name)} {getattr(args, name)} is above {most}")
    if args.context % 2 == 0:
        parser.error(f"--context {args.context} has no middle slice; give an odd number")
    return args


def dice_loss(run, network, image, label):
    """Soft Dice loss of a network on a batch (section 3.1; smoothing of the authors' code)."""
    with run.autocast():
        logits = network(image)
    return emseg.soft_dice_loss(logits, label, smooth=1.0)


def update(run, network, optimizer, scaler, loss):
    """One optimiser step."""
    scaler.scale(loss).backward()
    emseg.average_gradients(network)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


@emseg.command
def main(args):
    # run folder, seed, device
    run = emseg.Run(args, __file__)
    if args.demo:
        emseg.write_demo(run, shape=(30, 256, 256))

    # data
    data = run.open_data()
    if len(data.classes) > 2 and args.threshold != 0.5:
        raise emseg.InputError("--threshold is for two classes; of several the likeliest wins")

    # networks
    networks = {"coarse": run.prepare(MODELS[args.model](1, data.out_channels, args.width))}
    if args.scm:
        masks = args.context * (len(data.classes) - 1)
        networks["scm"] = run.prepare(emseg.UNet(masks, data.out_channels, args.width))
    depth = args.patch_size[0] if networks["coarse"].dims == 3 else None
    if args.scm and args.checkpoint and run.checkpoint["stage"] != "scm":
        raise emseg.InputError(f"{args.checkpoint}: its run has not reached stage 3; resume it")

    def see_slices(image):
        """uint8 slices (B, H, W), or a window of unet3d -> probabilities (B, C, H, W)."""
        return run.predict_slices(networks["coarse"], image)

    def see_masks(ids):
        """Class ids (B + context - 1, H, W) -> probabilities (B, C, H, W)."""
        return run.predict_slices(networks["scm"], ids, lambda ids: neighbour_masks(
            ids.unfold(0, args.context, 1).permute(0, 3, 1, 2), data.classes))

    files = {}                                  # of coarse stacks, by the path of the volume

    def coarse_stack(item):
        """Stage 1 of an Item, from its file where there is one: lazy class ids (Z, Y, X)."""
        path = files.setdefault(item.volume.path, run.output(item, "coarse"))
        if not path.exists():
            run.say(f"stage 1 of {item.volume.path}")
            run.predict(see_slices, item, stage="coarse", depth=depth)
        return emseg.open_volume(str(path))

    # optimiser
    optimizers = {f"optimizer_{name}": torch.optim.RMSprop(network.parameters(), lr=args.lr)
                  for name, network in networks.items()}
    scaler = run.gradient_scaler()

    # train: stage 1
    if run.training:
        emseg.check_patch_size(networks["coarse"], args.patch_size, args.model)
        patches = emseg.Patches(data.images, data.labels, args.patch_size, data.slices,
                                args.foreground, seed=(args.seed, 0))
        if args.patch_size[-2] != args.patch_size[-1]:
            run.say(f"note: crops of {emseg.format_shape(args.patch_size[-2:])} are turned by half "
                    f"turns only; square ones by quarter turns too")
        crops = {"coarse": 48 * len(patches.slices) if depth is None else sum(
                     math.prod(math.ceil(s / p) for s, p in zip(image.shape, args.patch_size))
                     for image in data.images),
                 "scm": 16 * sum(len(item.volume) for item in data.train)}
        steps_per_epoch = {stage: args.steps_per_epoch or math.ceil(count / args.batch_size)
                           for stage, count in crops.items()}
        stages = {"coarse": args.epochs, "scm": args.scm_epochs * args.scm}
        run.begin(steps_per_epoch, stages, **networks, **optimizers, scaler=scaler)
        batches = run.batches(patches, args.batch_size)
    for epoch in run.epochs("coarse"):
        networks["coarse"].train()
        for step in run.steps(epoch):
            image, label = next(batches)
            image, label = emseg.augment(image, label, data.normalization, flip=True, rot90=True,
                                         displacement=deformation(image, args.deform))
            loss = dice_loss(run, networks["coarse"], image, label)
            update(run, networks["coarse"], optimizers["optimizer_coarse"], scaler, loss)
            run.log(lr=args.lr, loss=loss)
        run.end_epoch(run.validate(see_slices, context=depth or 1))

    # train: stages 2 and 3
    if run.training and args.scm:
        emseg.check_patch_size(networks["scm"], args.patch_size[-2:], "stage 3")
        run.use_best(coarse=networks["coarse"])
        stacks = []
        for item in data.train:
            coarse = coarse_stack(item)
            soft = write_refined(run, item, coarse, item.label, run.output(item, "soft"))
            stacks.append([emseg.with_context(emseg.shrink(stack, args), args.context)
                           for stack in (coarse, emseg.open_volume(str(soft)))])
        patches = emseg.Patches(*zip(*stacks), [args.context, *args.patch_size[-2:]],
                                foreground=args.foreground, seed=(args.seed, 1))
        batches = run.batches(patches, args.batch_size)
        val = [emseg.Item(item.name, item.volume, emseg.shrink(coarse_stack(item), args),
                          item.label) for item in data.val]
    for epoch in run.epochs("scm"):
        networks["scm"].train()
        for step in run.steps(epoch):
            coarse, soft = augment_masks(*next(batches), args.deform)
            loss = dice_loss(run, networks["scm"], neighbour_masks(coarse, data.classes), soft)
            update(run, networks["scm"], optimizers["optimizer_scm"], scaler, loss)
            run.log(lr=args.lr, loss=loss)
        run.end_epoch(run.validate(see_masks, val, args.context))

    # predict
    run.use_best(**networks)
    annotation = {item.volume.path: item.label for item in data.train}
    done = {"coarse": True, "mpp": args.mpp, "scm": args.scm}
    stages = {name: [] for name in done if done[name]}
    for item in data.test:
        if not (args.mpp or args.scm):
            stages["coarse"].append(run.predict(see_slices, item, depth=depth))
            continue
        coarse = coarse_stack(item)
        stages["coarse"].append(coarse.path)
        if args.mpp:
            stages["mpp"].append(write_refined(
                run, item, coarse, annotation.get(item.volume.path),
                run.output(item, "mpp" if args.scm else None)))
        if args.scm:
            run.say(f"stage 3 of {item.volume.path}")
            stages["scm"].append(run.predict(see_masks, item, emseg.shrink(coarse, args),
                                             context=args.context))

    # evaluate
    run.report(list(stages.values())[-1], stages)


if __name__ == "__main__":
    main(parse_args())
