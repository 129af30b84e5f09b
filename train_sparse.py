"""Segmentation from a fifth of the slices: coarse U-Net, morphology, spatial-continuity network.

Xiao Y et al. (2022). Semi-supervised segmentation of mitochondria from electron microscopy images
using spatial continuity. IEEE International Symposium on Biomedical Imaging. arXiv:2206.02392

A person labels every fifth slice of a stack. A 2D network learns from these and segments all slices
coarsely (stage 1, `coarse`). What neighbouring slices agree on corrects each slice, and labelled
slices reach into their neighbourhood (stage 2, `mpp`: morphological post-processing). A second
network learns to turn the coarse masks of 15 neighbouring slices into the corrected mask of the
middle one (stage 3, `scm`: spatial-continuity model); it then refines stacks without any label.

Equations:
    eq. 1 (union with eroded labels)    propagate
    eqs. 2, 3 (false pos., negatives)   refine
    section 2.2 (piecewise affine)      piecewise_affine_displacement; --deform
    section 2.3 (stage 2)               postprocess
    section 2.4 (stage 3)               neighbour_masks; its labels from postprocess
    section 3.1 (training)              train_stage, with emseg.soft_dice_loss
    figure 2 (neighbours)               --coarse RUN --context N
    table 2 (ablation)                  metrics.json scores each stage; --deform none

Differences from the paper:
    1. Crops of 512 x 512, of which half hold foreground (--foreground), instead of whole slices.
    2. Rotations are quarter turns; the authors also turn a fifth of the slices by 22 to 45 degrees.
    3. Both neighbouring labelled slices reach a slice by eq. 1, not only the closest, and erosions
       use the 3 x 3 cross: both as in the authors' code.
    4. Eqs. 2 and 3 hold for all slices at once, each from the slices as they were before; the
       authors go through the stack and use what they have just changed.
    5. For faults of n = 2 slices eqs. 2 and 3 look at n + 2 consecutive slices, as printed: a pixel
       in slices i and i + 1 stays if it is in i - 1 or i + 2. The authors' code looks at i - 2 and
       i + 2, and at the labelled slices in place of neighbours, which deletes thin objects.
    6. Threshold 0.5 and eight views; the authors' code has 0.2 and four views, each twice.
    7. Without validation slices the last epoch counts; the authors keep the lowest training loss.
    8. Several foreground classes go through the same stages: each class by itself in stage 2, and a
       set of masks for each class as input of stage 3.

A run holds the trainings of stages 1 and 3 in coarse/ and scm/, what lies between in stages/.

Run:
    GPU    python train_sparse.py --volume stack.tif --label drawn.tif --label-slices 0:165:5
    CPU    python train_sparse.py --demo

Expect:
    GPU    not run
    CPU    test Dice of coarse, mpp, scm 0.86, 0.88, 0.87 (mitochondria) and 0.94, 0.94, 0.94
           (nucleus), seed 0, 280 s of one thread
    EPFL mitochondria, every fifth of 110 slices labelled (tests/replicate.py sparse), a quarter of
    the resolution, width 16, 1000 + 600 steps, test IoU of coarse, mpp, scm: 0.827 +- 0.002, 0.844
    +- 0.003, 0.864 +- 0.013 (3 seeds); coarse from every slice 0.835 +- 0.013; half an hour
"""

import argparse
import dataclasses
import functools
import math

import emseg                            # before torch, see there
import numpy as np
import torch
from scipy import ndimage

MODELS = {**emseg.NETWORKS, **emseg.NETWORKS_3D}
FAULTS = (1, 2)                     # lengths, in slices, of what eqs. 2 and 3 mend
HALO = 2 * sum(FAULTS)              # slices to either side that count: for eq. 2, then for eq. 3


# -- stage 1: augmentation -------------------------------------------------------------------------


def piecewise_affine_displacement(batch, size, device, scale=(0.01, 0.05), points=4):
    """Displacement (B, H, W, 2) in pixels (x, y): affine on the triangles of a jittered grid.

    Each of points x points regular points, the corners of the image among them, moves by
    N(0, s * side) in y and x, s drawn from `scale` for each image. Each cell between four points is
    cut into two triangles, and each triangle moves as its three corners do (section 2.2).
    """
    H, W = size
    strength = torch.empty(batch, 1, 1, 1, device=device).uniform_(*scale)
    side = torch.linspace(W, H, 2, device=device).view(1, 2, 1, 1)      # W and H, made there
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
    """A mask (Y, X) bool without its 4-connected objects of fewer than min_size pixels."""
    objects, _ = ndimage.label(mask)
    return mask & (np.bincount(objects.ravel()) >= min_size)[objects]


def propagate(label, k, zs, erosions):
    """What labelled slices say about their neighbourhood (eq. 1): masks (n, Y, X) bool of class k
    in the slices zs, a range.

    label: lazy annotation with its `slices`. A labelled slice reaches up to the next labelled ones,
    eroded `erosions` times for every slice of distance. A pixel survives m erosions by the 3 x 3
    cross where its city-block distance to the background is more than m.
    """
    reached = np.zeros((len(zs), *label.shape[1:]), dtype=bool)
    edges = [-1, *label.slices, len(label)]
    for below, labelled, above in zip(edges, edges[1:], edges[2:]):
        near = range(max(below + 1, zs.start), min(above, zs.stop))
        if near:
            mask = label[labelled] == k
            depth = np.inf if mask.all() else ndimage.distance_transform_cdt(mask, "taxicab")
        for z in near:
            reached[z - zs.start] |= depth > erosions * abs(z - labelled)
    return reached


def refine(masks, truth, k, min_size):
    """Eqs. 2 and 3 for class k of a stack (section 2.3): masks (Z, Y, X) bool.

    truth (Z, Y, X) uint8: the annotation, which stays as it is, IGNORE elsewhere.
    """
    def annotate(masks):
        return np.where(truth == emseg.IGNORE, masks, truth == k)

    def settle(masks):
        return annotate(np.stack([remove_small(mask, min_size) for mask in masks]))

    masks, z = settle(masks), np.arange(len(masks))
    for n in FAULTS:    # slices with n others in between, one of which is z; the ends are repeated
        pairs = [(np.maximum(z - step, 0), np.minimum(z + n + 1 - step, z[-1]))
                 for step in range(1, n + 1)]
        masks = annotate(masks & np.all([masks[a] | masks[b] for a, b in pairs], 0))    # eq. 2
        masks = settle(masks | np.any([masks[a] & masks[b] for a, b in pairs], 0))      # eq. 3
    return masks


def postprocess(coarse, label, slab, args):
    """Stage 2 on some slices of a stack: class ids uint8 (n, Y, X) of the slices `slab`.

    coarse: lazy class ids (Z, Y, X); label: lazy annotation with IGNORE elsewhere and `slices`, or
    None for a stack without any, where eqs. 2 and 3 work alone. Each class is refined by itself;
    where two then claim a pixel, its coarse class wins if it is one of them, else the lower id.
    """
    first, last = max(0, slab.start - HALO), min(len(coarse), slab.stop + HALO)
    ids, inner = coarse[first:last], slice(slab.start - first, slab.stop - first)
    truth = np.full_like(ids, emseg.IGNORE) if label is None else label[first:last]
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
    return torch.cat([ids == k for k in range(1, len(classes))], dim=1).float()


def augment_masks(run, coarse, refined):
    """Class ids (B, context, H, W) uint8 of stages 1 and 2 -> network input and the middle label
    (B, H, W) int64; flipped in z, y and x, turned and deformed, all alike (section 3.1)."""
    grid = emseg.sampling_grid(len(coarse), coarse.shape[-2:], coarse.device, flip=True, rot90=True,
                               displacement=deformation(coarse, run.args.deform))
    flip = torch.rand(len(coarse), 1, 1, 1, device=coarse.device) < 0.5
    coarse = emseg.warp(coarse, grid, "nearest")
    coarse = torch.where(flip, coarse.flip(1), coarse)
    middle = emseg.warp(refined[:, refined.shape[1] // 2], grid, "nearest")
    return neighbour_masks(coarse, run.args.classes), middle.long()


def parse_args(argv=None):
    parser = emseg.Parser(__file__, __doc__)
    emseg.add_common_args(parser, MODELS, sources={
        **dict.fromkeys(("epochs", "batch_size", "lr", "tta"), "section 3.1"),
        "model": "of stage 1: unet is the paper's, unet3d its baseline",
        "steps_per_epoch": "default: 48 crops of each annotated slice; in stage 3, 16 of each "
        "slice: authors' code", "save_probability": "not of stage 2",
        "patch_size": "default: 512 512, or 16 128 128 for unet3d; paper: whole slices"})
    method = parser.add_argument_group("method (sparse slices, ISBI 2022)").add_argument
    method("--unlabeled-volume", nargs="+", metavar="P", default=[],
           help="volumes without labels, segmented and used in stage 3 too (not in paper)")
    method("--deform", choices=("affine", "elastic", "none"), default="affine",
           help="deform half of the crops, piecewise affine or elastic (section 2.2, supplement)")
    method("--mpp", action=argparse.BooleanOptionalAction, default=True,
           help="stage 2, morphological post-processing (section 2.3); --no-mpp: stage 1 alone")
    method("--scm", action=argparse.BooleanOptionalAction, default=True,
           help="stage 3, the spatial-continuity network (section 2.4)")
    method("--erosions", type=emseg.positive(int), default=3, metavar="N",
           help="n of eq. 1, erosions per slice of distance (section 3.1; 6 for platelets, 3.4)")
    method("--min-size", type=emseg.nonnegative, default=300, metavar="N",
           help="smaller objects of a slice are removed in stage 2, in pixels (authors' code)")
    method("--coarse", metavar="RUN", help="a run of this script or train_cps.py: its network is "
           "stage 1, with its settings, and not trained again")
    method("--context", type=emseg.positive(int), default=15, metavar="N",
           help="neighbouring masks that stage 3 sees, an odd number (section 2.4, fig. 2)")
    method("--scm-epochs", type=emseg.positive(int), metavar="N",
           help="epochs of stage 3; default: --epochs")
    method("--threshold", type=emseg.share, default=0.5, metavar="P",
           help="probability above which a pixel is foreground, of two classes")
    method("--foreground", type=emseg.share, default=0.5, metavar="P",
           help="share of crops that must hold foreground (not in paper)")
    parser.set_defaults(model="unet", epochs=100, batch_size=16, lr=5e-4, tta=True,
                        average_branches=False)
    demo = dict(width=8, epochs=16, scm_epochs=14, steps_per_epoch=20, batch_size=8,
                patch_size=[128, 128], downsample=2, label_slices="0:30:5", lr=1e-3, min_size=30,
                erosions=6, normalize="equalize", label_map="3=1,2=2,*=0",
                classes=["background", "mitochondrion", "nucleus"])
    quick = dict(width=16, epochs=10, scm_epochs=6, steps_per_epoch=25, batch_size=16, tta=False,
                 patch_size=[64, 64], downsample=4, lr=1e-3)
    args = emseg.parse(parser, argv, demo, quick, settings=lambda args: {
        "scm_epochs": args.epochs,
        "patch_size": [16, 128, 128] if args.model in emseg.NETWORKS_3D else [512, 512],
    }, of_prediction=("threshold", "mpp", "scm", "min_size"))
    if args.context % 2 == 0:
        parser.error(f"--context {args.context} has no middle slice; give an odd number")
    if args.coarse and args.init:
        parser.error("--coarse and --init both bring a network of stage 1; give one of them")
    args.scm = args.scm and args.mpp
    args.depth = args.patch_size[0] if len(args.patch_size) == 3 else None      # of 3D windows
    return args


def make_networks(args):
    """The networks by their names in checkpoints: `network` of stage 1, `scm` of stage 3."""
    channels = emseg.out_channels(args.classes)
    options = {"average_branches": True} if args.average_branches else {}   # see --coarse
    networks = {"network": MODELS[args.model](1, channels, args.width, **options)}
    if args.scm:
        networks["scm"] = emseg.UNet(args.context * (len(args.classes) - 1), channels, args.width)
    return networks


def predictor(run, key):
    """What predicts with the network `key` of a Run: uint8 slices (B, H, W), or a window of unet3d;
    in stage 3 class ids (B + context - 1, H, W) -> probabilities (B, C, H, W)."""
    def masks(ids):
        ids = ids.unfold(0, run.args.context, 1).permute(0, 3, 1, 2)
        return neighbour_masks(ids, run.args.classes)

    return functools.partial(emseg.predict, run, run.modules[key],
                             prepare=masks if key == "scm" else None)


def stage_file(args, item, stage):
    """The name of a file between the stages, the same for all Items of a volume."""
    paths = [*args.volume, *args.unlabeled_volume, *args.val_volume, *args.test_volume]
    return f"stages/{paths.index(item.volume.path)}_{stage}.tif"


def write_coarse(run, item):
    """Stage 1 of an Item into a file unless it is there: lazy class ids (Z, Y, X)."""
    name = stage_file(run.args, item, "coarse")
    if not run.path(name).exists():
        emseg.write_prediction(run, predictor(run, "network"), item, name, depth=run.args.depth)
    return emseg.open_volume(run.path(name))


def write_refined(run, item, label, name=None):
    """Stages 1 and 2 of an Item into files unless they are there: lazy class ids (Z, Y, X).

    label: see postprocess; name: of the file, where stage 2 is the last.
    """
    coarse, path = write_coarse(run, item), run.path(name or stage_file(run.args, item, "mpp"))
    if name or not path.exists():
        with emseg.writers_of(run, item, [(path, coarse.shape, np.uint8)]) as (writer,):
            pixels = max(2**24, 2 * HALO * math.prod(coarse.shape[1:]))
            for slab in emseg.slabs(coarse.shape, pixels)[run.rank :: run.world]:
                writer[slab] = postprocess(coarse, label, slab, run.args)
    return emseg.open_volume(path)


def with_masks(run, items):
    """The Items with what stage 3 sees in place of images: their coarse class ids."""
    return [dataclasses.replace(item, image=emseg.shrink(write_coarse(run, item), run.args))
            for item in items]


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
        return finish(run, emseg.open_test(args, run.used))

    # data
    train, val = emseg.open_training(args)
    unlabelled = emseg.open_items(args.unlabeled_volume, None, args)
    run.used += emseg.used_slices(train + val)
    test = emseg.open_test(args, run.used, train)
    emseg.describe_data(args, train=train, validate=val, unlabelled=unlabelled, test=test)
    emseg.check_annotation(train, args)
    images, targets, slices = zip(*[(item.image, item.target, item.slices) for item in train])
    run.normalization = emseg.measure_normalization(train, args.normalize)
    patches = emseg.Patches(images, targets, args.patch_size, slices, args.foreground,
                            seed=(args.seed, 0))

    # networks
    run.modules = {key: run.prepare(each) for key, each in make_networks(args).items()}
    emseg.check_patch_size(run.modules["network"], args.patch_size, args.model)
    if args.scm:
        emseg.check_patch_size(run.modules["scm"], args.patch_size[-2:], "stage 3")
        emseg.Patches([item.image for item in unlabelled], None, args.patch_size[-2:])  # do fit

    # stage 1
    if args.coarse:
        emseg.load_weights(run.modules["network"], run.checkpoint, "network", args.coarse)
        run.normalization = run.checkpoint["normalization"]
    else:
        train_stage(run.args_of("coarse", mpp=False, scm=False), run, "network", patches,
                    48 * len(patches.slices) // (args.depth or 1), augment_slices, val,
                    depth=args.depth)

    # stages 2 and 3
    if args.scm:
        stack = with_masks(run, train + unlabelled)
        masks = [emseg.WithContext(item.image, args.context) for item in stack]
        refined = [emseg.shrink(write_refined(run, item, item.label), args) for item in stack]
        refined = [emseg.WithContext(ids, args.context) for ids in refined]
        patches = emseg.Patches(masks, refined, [args.context, *args.patch_size[-2:]],
                                foreground=args.foreground, seed=(args.seed, 1))
        train_stage(run.args_of("scm", epochs=args.scm_epochs, init=None), run, "scm", patches,
                    16 * sum(len(item.volume) for item in stack), augment_masks,
                    with_masks(run, val), context=args.context)

    # predict and evaluate
    run.save("best.pt")
    finish(run, test, train)


def train_stage(args, parent, key, patches, crops, augment, val, **options):
    """The training of a stage (section 3.1), a complete run: network `key` of the Run `parent`.

    crops: of an epoch; augment: a function of this script; options: of emseg.validate.
    """
    # run folder, seed, device
    run = emseg.Run(args, __file__)
    run.normalization, run.used = parent.normalization, parent.used
    network, predict = parent.modules[key], predictor(parent, key)

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
        run.end_epoch(emseg.validate(run, predict, val, **options))

    # evaluate
    run.use_best(network)
    emseg.report(run, [], [], emseg.count_parameters(network))      # the parent predicts
    parent.best, parent.seconds = run.best, parent.seconds + run.seconds


def finish(run, test, train=()):
    """Predict the test volumes and score all stages. train: Items whose labels stage 2 uses."""
    args, labels = run.args, {item.volume.path: item.label for item in train}
    if not args.mpp:
        stages = emseg.predict_all(run, predictor(run, "network"), test, depth=args.depth)
    else:
        stages = {"coarse": [write_coarse(run, item).path for item in test], "mpp": [
            write_refined(run, item, labels.get(item.volume.path), None if args.scm else
                          emseg.result_name(item, test)).path for item in test]}
    if args.scm:
        stages["scm"] = emseg.predict_all(run, predictor(run, "scm"), with_masks(run, test),
                                          context=args.context)
    emseg.report(run, test, stages, sum(map(emseg.count_parameters, run.modules.values())))


if __name__ == "__main__":
    main(parse_args())
