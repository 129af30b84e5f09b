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
    section 3.1 (training)              train, with emseg.soft_dice_loss
    figure 2 (neighbours)               --coarse RUN --context N

Differences from the paper:
    1. Crops of 512 x 512, of which half hold foreground (--foreground), instead of whole slices,
       which the authors pad with zeros to squares of 1024.
    2. Rotations are quarter turns; half of the crops are deformed. The authors deform about half of
       the slices in advance, and turn a fifth by 22 to 45 degrees.
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
       by 255.
    10. An epoch of stage 3 has 16 crops of each slice, as many as the authors turn copies of a
        stack; one of unet3d as many windows as tile the annotated volumes.
    11. Several foreground classes go through the same stages: each class by itself in stage 2, and
        a set of masks for each class as input of stage 3.

The run folder holds the trainings of stages 1 and 3, coarse/ and scm/, and what passes between the
stages, stages/. --coarse RUN begins with the network of another run, also of train_cps.py.

Run:
    GPU    python train_sparse.py --volume stack.tif --label drawn.tif --label-slices 0:165:5
    CPU    python train_sparse.py --demo
    fig. 2 python train_sparse.py --coarse RUN --context 7 --volume stack.tif --label drawn.tif ...

Expect:
    GPU    not run
    CPU    test Dice of coarse, mpp, scm 0.86, 0.88, 0.87 (mitochondria) and 0.94, 0.94, 0.94
           (nucleus), seed 0, 330 s of one thread on a busy machine
    EPFL mitochondria from 22 slices (command in the README), unet of width 16, 1200 + 1200 steps:
    test IoU of coarse, mpp, scm 0.871, 0.893, 0.900 (seed 0) and 0.863, 0.884, 0.890 (seed 1), 21
    minutes and 1.8 GiB on two CPU cores beside other work
"""

import argparse
import dataclasses
import functools
import math

import numpy as np
import torch
from scipy import ndimage

import emseg

MODELS = {**emseg.NETWORKS, **emseg.NETWORKS_3D}
OF_STAGE_1 = ("model", "width", "average_branches", "downsample", "normalize", "classes")
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


def augment_slices(run, image, label):
    """Crops and labels (B, H, W) or (B, Z, H, W) uint8 -> network input and int64 labels, flipped,
    turned and deformed alike (section 3.1)."""
    return emseg.augment(image, label, run.normalization, flip=True, rot90=True,
                         displacement=deformation(image, run.args.deform))


# -- stage 2: morphological post-processing --------------------------------------------------------


def remove_small(mask, min_size):
    """A mask (Y, X) bool without its 4-connected objects of less than min_size pixels."""
    objects, count = ndimage.label(mask)
    large = np.bincount(objects.ravel(), minlength=count + 1) >= min_size
    large[0] = False
    return large[objects]


def propagate(label, k, zs, erosions):
    """What labelled slices say about their neighbourhood (eq. 1): masks (n, Y, X) bool of class k
    in the slices zs.

    label: lazy annotation with its `slices`. Both neighbouring labelled slices reach a slice, each
    eroded `erosions` times for every slice of its distance. A pixel survives m erosions by the
    3 x 3 cross where its city-block distance to the background is more than m, so one distance
    transform does for all distances.
    """
    @functools.lru_cache(maxsize=2)
    def depth(z):
        mask = label[z] == k
        return ndimage.distance_transform_cdt(mask, "taxicab") if not mask.all() else np.inf

    reached = np.zeros((len(zs), *label.shape[1:]), dtype=bool)
    for z, mask in zip(zs, reached):
        below, above = label.slices[label.slices <= z][-1:], label.slices[label.slices >= z][:1]
        for labelled in {*below, *above}:
            mask |= depth(labelled) > erosions * abs(z - labelled)
    return reached


def neighbours(masks, n):
    """The n pairs (below, above) of slices with n others in between, one of which is slice i: as
    stacks (Z, Y, X). Beyond the ends of a stack its last slice counts."""
    z = np.arange(len(masks))
    for step in range(1, n + 1):
        yield masks[np.maximum(z - step, 0)], masks[np.minimum(z + n + 1 - step, len(masks) - 1)]


def remove_false_positives(masks, n):
    """Eq. 2 on a stack of masks (Z, Y, X) bool, for faults of n slices."""
    kept = masks.copy()
    for below, above in neighbours(masks, n):
        kept &= below | above
    return kept


def fill_false_negatives(masks, n):
    """Eq. 3 on a stack of masks (Z, Y, X) bool, for faults of n slices."""
    filled = masks.copy()
    for below, above in neighbours(masks, n):
        filled |= below & above
    return filled


def refine(masks, truth, k, min_size):
    """Stage 2 after eq. 1 for class k of a stack (section 2.3): masks (Z, Y, X) bool.

    truth (Z, Y, X) uint8: the annotation, which stays as it is, IGNORE elsewhere.
    """
    def annotate(masks):
        return np.where(truth == emseg.IGNORE, masks, truth == k)

    def settle(masks):
        return annotate(np.stack([remove_small(mask, min_size) for mask in masks]))

    masks = settle(masks)
    for n in FAULTS:
        masks = annotate(remove_false_positives(masks, n))                              # eq. 2
        masks = settle(fill_false_negatives(masks, n))                                  # eq. 3
    return masks


def postprocess(coarse, label, slab, args):
    """Stage 2 on some slices of a stack: class ids uint8 (n, Y, X) of the slices `slab`.

    coarse: lazy class ids (Z, Y, X); label: lazy annotation with IGNORE elsewhere and `slices`, or
    None for a stack without any, where eqs. 2 and 3 work alone. With --no-mpp the annotation is put
    in and all else left. Each class is refined by itself; where two then claim a pixel, its coarse
    class wins if it is one of them, else the lower id.
    """
    first, last = max(0, slab.start - HALO), min(len(coarse), slab.stop + HALO)
    ids, inner = coarse[first:last], slice(slab.start - first, slab.stop - first)
    truth = np.full_like(ids, emseg.IGNORE) if label is None else label[first:last]
    if not args.mpp:
        return np.where(truth == emseg.IGNORE, ids, truth)[inner]
    result = np.zeros_like(ids[inner])
    for k in reversed(range(1, len(args.classes))):
        masks = ids == k
        if label is not None:
            masks |= propagate(label, k, range(first, last), args.erosions)             # eq. 1
        claimed = refine(masks, truth, k, args.min_size)[inner]
        result[claimed & ((result == 0) | (result != ids[inner]))] = k
    return result


# -- stage 3: spatial continuity -------------------------------------------------------------------


def neighbour_masks(ids, classes):
    """Class ids (B, context, H, W) of neighbouring slices -> network input (B, context * K, H, W).

    One mask of 0 and 1 for each slice and each of the K foreground classes (section 2.4).
    """
    masks = [ids == k for k in range(1, len(classes))]
    return torch.cat(masks, dim=1).float()


def augment_masks(run, coarse, soft):
    """Masks and soft labels, class ids (B, context, H, W) uint8 -> network input and the middle
    label (B, H, W) int64; flipped in z, y and x, turned and deformed, all alike (section 3.1)."""
    grid = emseg.sampling_grid(len(coarse), coarse.shape[-2:], coarse.device, flip=True, rot90=True,
                               displacement=deformation(coarse, run.args.deform))
    flip = torch.rand(len(coarse), 1, 1, 1, device=coarse.device) < 0.5
    coarse, soft = [emseg.warp(stack, grid, "nearest") for stack in (coarse, soft)]
    coarse = torch.where(flip, coarse.flip(1), coarse)
    return neighbour_masks(coarse, run.args.classes), soft[:, soft.shape[1] // 2].long()


# -- the command -----------------------------------------------------------------------------------


def settings(args):
    """Defaults that depend on other flags."""
    sides = [16, 128, 128] if args.model in emseg.NETWORKS_3D else [512, 512]
    defaults = {"scm_epochs": args.epochs, "patch_size": sides}
    if args.coarse:
        checkpoint = emseg.load_checkpoint(args.coarse)
        if checkpoint["script"] not in ("train_sparse.py", "train_cps.py"):
            raise emseg.InputError(f"--coarse {args.coarse}: a run of {checkpoint['script']}; "
                                   f"wanted one of train_sparse.py or train_cps.py")
        defaults |= {name: checkpoint["args"][name] for name in (*OF_STAGE_1, "patch_size")}
    return defaults


def parse_args(argv=None):
    flag = argparse.BooleanOptionalAction
    parser = emseg.Parser(__file__, __doc__)
    emseg.add_common_args(parser, MODELS, sources={
        "model": "in stage 1: unet is the paper's, unet3d its baseline", "epochs": "section 3.1",
        "steps_per_epoch": "default: 48 crops of each annotated slice, authors' code; unet3d: as "
        "many windows as tile the volumes; stage 3: 16 crops of each slice",
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
    method("--min-size", type=emseg.nonnegative, default=300, metavar="N",
           help="smaller objects of a slice are removed in stage 2, in pixels (authors' code)")
    method("--coarse", metavar="RUN", help="a finished stage 1 in place of training one: a run of "
           "this script or of train_cps.py, whose network, classes and grey levels are used")
    method("--context", type=emseg.positive(int), default=15, metavar="N",
           help="neighbouring masks that stage 3 sees, an odd number (section 2.4, fig. 2)")
    method("--scm-epochs", type=emseg.positive(int), metavar="N",
           help="epochs of stage 3; default: --epochs")
    method("--threshold", type=emseg.share, default=0.5, metavar="P",
           help="probability above which a pixel is foreground, in stages 1 and 3; for two classes "
           "only (authors' code: 0.2)")
    method("--foreground", type=emseg.share, default=0.5, metavar="P",
           help="share of crops that must hold foreground (not in paper)")
    parser.set_defaults(model="unet", epochs=100, batch_size=16, lr=5e-4, tta=True,
                        average_branches=False)         # True comes with --coarse
    demo = dict(width=8, epochs=16, scm_epochs=14, steps_per_epoch=20, batch_size=8,
                patch_size=[128, 128], downsample=2, label_slices="0:30:5", lr=1e-3, min_size=30,
                erosions=6, normalize="equalize", label_map="3=1,2=2,*=0",
                classes=["background", "mitochondrion", "nucleus"])
    args = emseg.parse(parser, argv, demo, settings,
                       of_prediction=("threshold", "mpp", "scm", "min_size"))
    if args.save_probability and args.mpp and not args.scm:
        parser.error("--save-probability: stage 2 gives no probabilities; leave out --no-scm, or "
                     "give --no-mpp too")
    if args.context % 2 == 0:
        parser.error(f"--context {args.context} has no middle slice; give an odd number")
    return args


def make_networks(args):
    """The networks by their names in checkpoints: `network` of stage 1, `scm` of stage 3."""
    channels = emseg.out_channels(args.classes)
    options = {"average_branches": True} if args.average_branches else {}
    networks = {"network": MODELS[args.model](1, channels, args.width, **options)}
    if args.scm:
        masks = args.context * (len(args.classes) - 1)
        networks["scm"] = emseg.UNet(masks, channels, args.width)
    return networks


def see_slices(run, image):
    """uint8 slices (B, H, W), or a window of unet3d -> probabilities (B, C, H, W) of stage 1."""
    return emseg.see(run, run.modules["network"], image)


def see_masks(run, ids):
    """Class ids (B + context - 1, H, W) uint8 -> probabilities (B, C, H, W) of stage 3."""
    return emseg.see(run, run.modules["scm"], ids, prepare=lambda ids: neighbour_masks(
        ids.unfold(0, run.args.context, 1).permute(0, 3, 1, 2), run.args.classes))


def window_depth(args):
    """The slices that stage 1 sees at once: those of the crops of a 3D network, else None."""
    return args.patch_size[0] if len(args.patch_size) == 3 else None


def stage_file(run, item, stage):
    """The name of a file between the stages, the same for all Items of a volume."""
    args = run.args
    paths = [*dict.fromkeys(args.volume + args.unlabeled_volume + args.val_volume
                            + args.test_volume)]
    return f"stages/{emseg.unique_names(paths)[paths.index(item.volume.path)]}_{stage}.tif"


def write_coarse(run, item):
    """Stage 1 of an Item into a file unless it is there: lazy class ids (Z, Y, X)."""
    name = stage_file(run, item, "coarse")
    if not run.path(name).exists():
        emseg.print0(f"stage 1 of {item.volume.path}")
        emseg.write_prediction(run, functools.partial(see_slices, run), item, name,
                               depth=window_depth(run.args))
    return emseg.open_volume(run.path(name))


def write_refined(run, item, coarse, label, name):
    """Stage 2 of an Item into a file unless it is there: lazy class ids (Z, Y, X).

    coarse, label: see postprocess. All processes share the work.
    """
    path = run.path(name)
    if not path.exists():
        emseg.print0(f"stage 2 of {item.volume.path}")
        with emseg.writers_of(run, item, [(path, coarse.shape, np.uint8)]) as (writer,):
            pixels = max(2**24, 2 * HALO * math.prod(coarse.shape[1:]))
            for slab in emseg.slabs(coarse.shape, pixels)[run.rank :: run.world]:
                writer[slab] = postprocess(coarse, label, slab, run.args)
    return emseg.open_volume(path)


@emseg.command
def main(args):
    # run folder, seed, device
    run = emseg.Run(args, __file__)
    if run.finished:
        return
    if args.demo:
        emseg.write_demo(run, shape=(30, 256, 256))
    if args.checkpoint:
        run.modules = {key: run.load(each, key) for key, each in make_networks(args).items()}
        return finish(run, emseg.open_test(args, run.used), {})

    # data
    items, val = emseg.open_training(args)
    unlabelled = emseg.open_items(args.unlabeled_volume, [], args)
    coarse = emseg.load_checkpoint(args.coarse) if args.coarse else None
    run.used = emseg.used_slices(items + val) + (coarse["used"] if coarse else [])
    test = emseg.open_test(args, run.used, items)
    emseg.describe_data(args, train=items, validate=val, unlabelled=unlabelled, test=test)
    emseg.check_annotation(items, args)
    if len(args.classes) > 2 and args.threshold != 0.5:
        raise emseg.InputError("--threshold is for two classes; of several the likeliest wins")
    for name in OF_STAGE_1 if coarse else ():
        if coarse["args"][name] != vars(args)[name]:
            raise emseg.InputError(f"--coarse {args.coarse} has {emseg.flag_name(name)} "
                                   f"{coarse['args'][name]}; leave the flag out")
    images, targets, slices = zip(*[(item.image, item.target, item.slices) for item in items])
    patches = emseg.Patches(images, targets, args.patch_size, slices, args.foreground,
                            seed=(args.seed, 0))
    if args.patch_size[-2] != args.patch_size[-1]:
        emseg.print0(f"note: crops of {emseg.format_shape(args.patch_size[-2:])} are turned by "
                     f"half turns only; square ones by quarter turns too")

    # networks
    run.modules = {key: run.prepare(each) for key, each in make_networks(args).items()}
    emseg.check_patch_size(run.modules["network"], args.patch_size, args.model)
    if args.scm:
        emseg.check_patch_size(run.modules["scm"], args.patch_size[-2:], "stage 3")

    # stage 1
    if coarse:
        emseg.load_weights(run.modules["network"], coarse, "network", args.coarse)
        run.normalization = coarse["normalization"]
    else:
        run.normalization = emseg.measure_normalization(images, slices, args.normalize)
        depth = window_depth(args)
        crops = 48 * len(patches.slices) if depth is None else sum(
            math.prod(math.ceil(s / p) for s, p in zip(image.shape, args.patch_size))
            for image in images)
        train(run.args_of("coarse", mpp=False, scm=False), run, "network", patches, crops,
              augment_slices, see_slices, val, depth=depth)

    # stages 2 and 3
    if args.scm:
        stacks = []
        for item in items + unlabelled:
            ids = write_coarse(run, item)
            soft = write_refined(run, item, ids, item.label,
                                 stage_file(run, item, "mpp" if args.mpp else "annotated"))
            stacks.append([emseg.WithContext(emseg.shrink(stack, args), args.context)
                           for stack in (ids, soft)])
        patches = emseg.Patches(*zip(*stacks), [args.context, *args.patch_size[-2:]],
                                foreground=args.foreground, seed=(args.seed, 1))
        val = [dataclasses.replace(item, image=emseg.shrink(write_coarse(run, item), args))
               for item in val]
        train(run.args_of("scm", epochs=args.scm_epochs), run, "scm", patches,
              16 * sum(len(item.volume) for item in items + unlabelled), augment_masks, see_masks,
              val, context=args.context)

    # predict and evaluate
    run.save("best.pt")
    finish(run, test, {item.volume.path: item.label for item in items})


def train(args, whole, key, patches, crops, augment, see, val, **options):
    """The training of a stage (section 3.1), a complete run: network `key` of the Run `whole`.

    crops: of an epoch; augment, see: functions of this script for what the network learns from and
    what it then sees of `val`, Items; options: of emseg.validate.
    """
    # run folder, seed, device
    run = emseg.Run(args, __file__)
    run.normalization, run.used, network = whole.normalization, whole.used, whole.modules[key]

    # optimiser
    optimizer = torch.optim.RMSprop(network.parameters(), lr=args.lr)

    # train
    run.begin(args.steps_per_epoch or math.ceil(crops / args.batch_size), network=network,
              optimizer=optimizer)
    batches = run.batches(patches, args.batch_size)
    for epoch in run.epochs():
        network.train()
        for step in run.steps(epoch):
            image, label = augment(run, *next(batches))
            with run.autocast():
                logits = network(image)
            loss = emseg.soft_dice_loss(logits, label, smooth=1.0)      # as the authors smooth it
            run.update(loss, args.lr, (network, optimizer))
            run.log(lr=args.lr, loss=loss)
        run.end_epoch(emseg.validate(run, functools.partial(see, whole), val, **options))

    # evaluate
    run.use_best(network=network)
    emseg.report(run, [], [], emseg.count_parameters(network))
    whole.best, whole.seconds = run.best, whole.seconds + run.seconds


def finish(run, test, annotation):
    """Predict the test volumes through all stages and score each of them.

    annotation: {path of a volume: its Labels}, what stage 2 may use.
    """
    args = run.args
    if args.mpp or args.scm:
        coarse = [write_coarse(run, item) for item in test]
        stages = {"coarse": [ids.path for ids in coarse]}
    else:
        stages = {"coarse": emseg.predict_all(run, functools.partial(see_slices, run), test,
                                              depth=window_depth(args))}
    if args.mpp:
        names = [stage_file(run, item, "mpp") if args.scm else
                 emseg.result_name("prediction", item, test) for item in test]
        stages["mpp"] = [
            write_refined(run, item, ids, annotation.get(item.volume.path), name).path
            for item, ids, name in zip(test, coarse, names)]
    if args.scm:
        masks = [dataclasses.replace(item, image=emseg.shrink(ids, args))
                 for item, ids in zip(test, coarse)]
        stages["scm"] = emseg.predict_all(run, functools.partial(see_masks, run), masks,
                                          context=args.context)
    emseg.report(run, test, stages, sum(map(emseg.count_parameters, run.modules.values())))


if __name__ == "__main__":
    main(parse_args())
