"""Learning from volumes in which some structures were drawn as part of another one.

Francis JP, Wang H, White K, Syeda-Mahmood T, Stevens R (2020). Neural network segmentation of cell
ultrastructure using incomplete annotation. arXiv:2004.09673

Older volumes are often annotated less finely than newer ones: in some cells mitochondria and
insulin vesicles were drawn by themselves, in others they are part of "membrane". Such a partial
annotation is what full annotation becomes when labels are merged, so the network's probabilities,
merged alike, can be compared with it. Both kinds of volumes train one network that tells all
structures apart; in the paper this improves even those that the partial annotation does not show.

Equations:
    eq. 1 (sum over both kinds of volumes)      loss_terms
    eq. 2 (cross entropy, full labels)          merged_cross_entropy, where nothing is merged
    eq. 3 (cross entropy, partial labels)       merged_cross_entropy
    eq. 4 (merged probabilities)                merged_cross_entropy; T_P from parse_merge
    section 2.1 (one shape for all volumes)     --resize, emseg.Resized
    section 2.3 (network)                       emseg.UNet5, 7,759,653 parameters with 5 classes
    section 3 (table 1)                         the baseline is the same command without --partial

A batch is drawn from the annotated slices of all volumes, each as likely as any other. Eq. 1 sums
over all voxels, so this is its unbiased sample: fully labelled slices are not repeated to balance
the batch.

Differences from the paper:
    1. Losses are divided by the number of annotated pixels in the batch; eqs. 1 to 3 are sums.
    2. The paper names no optimiser: Adam, its rate falling linearly to 0. No batch size: 8 crops.
    3. Crops of 512 x 512, which are whole slices after --resize 512 512 512 as in the paper.
       Without --resize (the default here) volumes keep their shapes.
    4. What rotation and scaling bring in from outside of a crop is mirrored.
    5. Weights start from the Gaussians of the original U-Net. The paper does not say.
    6. Predictions of resized volumes are brought back to the shape of the volume, by interpolated
       probabilities, and are scored there.
    7. Each volume is normalised by its own mean and spread. The paper does not say.

Run:
    GPU    python train_partial.py --volume cell1.mrc cell2.mrc --label cell1_label.mrc \\
               cell2_label.mrc --partial hek1.mrc hek1_label.mrc 3=1,4=1 --resize 512 512 512
    CPU    python train_partial.py --demo

Expect:
    GPU    not run at the paper's settings
    CPU    test Dice of membrane, nucleus, mitochondrion 0.72, 0.52, 0.81, seed 0, 75 s, one thread
    Fly neuropil, 3 full and 11 partial slices (tests/replicate.py partial), width 16, test Dice of
    baseline and mixed labels: 0.577 +- 0.071 and 0.612 +- 0.007 after 600 steps, 0.738 +- 0.023 and
    0.774 +- 0.013 after 2800 (3 seeds); up to 1.4 minutes and 0.4 GiB each on an H200
"""

import functools
import math
import re

import emseg                            # before torch, see there
import torch

MODELS = emseg.NETWORKS
AUGMENTATION = {"rotation": 180.0, "scale": 0.2}        # section 3


def parse_merge(text, n_classes):
    """'3=1,4=1' -> [0, 1, 2, 1, 1]: T_P, the class as which each of n classes was drawn.

    Raises InputError, also for a chain such as 4=3,3=1 (4=1,3=1 is meant).
    """
    merge = list(range(n_classes))
    for pair in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*=\s*(\d+)\s*", pair)
        if not match or max(map(int, match.groups())) >= n_classes:
            raise emseg.InputError(f"--partial: {text} is no merge of classes 0 to "
                                   f"{n_classes - 1}; wanted class=class it was drawn as, such as "
                                   f"3=1,4=1")
        merge[int(match[1])] = int(match[2])
    if any(merge[target] != target for target in merge):
        raise emseg.InputError(f"--partial: {text} merges a class into one that is merged itself; "
                               f"name the class that is left")
    return merge


def merged_cross_entropy(logits, label, merge):
    """-log of the merged probability of each pixel's label (eqs. 2-4): float32 (B, H, W).

    logits (B, L, H, W), or (B, 1, H, W) for two classes; label (B, H, W) int64, each crop in its
    own label set; merge (B, L) int64: T_P, the label as which a crop's annotator drew each class.
    The log of a sum of probabilities is a difference of two log-sum-exps of logits, which is stable
    for p near 0. An IGNORE pixel may be of any class: all are merged, so its loss is 0.
    """
    logits = logits.float()
    if logits.shape[1] == 1:                            # sigmoid(x) is softmax(0, x)
        logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
    label = label[:, None]
    members = (merge[:, :, None, None] == label) | (label == emseg.IGNORE)      # T_P(l') = l
    merged = logits.masked_fill(~members, -math.inf)
    return logits.logsumexp(dim=1) - merged.logsumexp(dim=1)


def loss_terms(logits, label, merge, partial):
    """The two sums of eq. 1 over a batch, each divided by the batch's annotated pixels: scalars.

    partial (B,) bool: which crops come from partially labelled volumes; the other arguments: see
    merged_cross_entropy.
    """
    per_crop = merged_cross_entropy(logits, label, merge).sum(dim=(1, 2))
    pixels = (label != emseg.IGNORE).sum().clamp(min=1)
    return (per_crop * ~partial).sum() / pixels, (per_crop * partial).sum() / pixels


def parse_args(argv=None):
    parser = emseg.Parser(__file__, __doc__)
    emseg.add_common_args(parser, MODELS, sources={
        "model": "unet5 is the paper's, section 2.3", "epochs": "section 3",
        "steps_per_epoch": "default: as many crops as there are annotated slices",
        "batch_size": "not in paper", "lr": "not in paper, nor is Adam",
        "patch_size": "section 2.1: whole slices, after --resize 512 512 512"})
    method = parser.add_argument_group("method (Francis 2020)").add_argument
    method("--partial", nargs=3, action="append", default=[], metavar=("VOLUME", "LABEL", "MERGE"),
           help="a partially labelled volume; MERGE 3=1,4=1 says that classes 3 and 4 were drawn "
           "as 1, by their ids after --label-map (section 2.2); repeat it for each volume")
    method("--partial-map", nargs="+", metavar="M", default=[],
           help="label maps of the partially labelled volumes, one for each, where their values "
           "mean something else than --label-map says")
    method("--resize", nargs=3, type=emseg.positive(int), metavar=("Z", "Y", "X"),
           help="show the network volumes of this shape, resized linearly, labels by the nearest "
           "voxel (section 2.1: 512 512 512); predictions keep the shape of the volume; in place "
           "of --downsample")
    parser.set_defaults(model="unet5", epochs=200, batch_size=8, patch_size=[512, 512], lr=1e-3,
                        normalize="volume")
    demo = dict(model="unet", width=8, epochs=20, steps_per_epoch=30, batch_size=4, lr=3e-3,
                patch_size=[96, 96], label_map="1=1,2=2,3=3,*=0",
                classes=["background", "membrane", "nucleus", "mitochondrion"])
    quick = dict(model="unet", width=16, epochs=10, steps_per_epoch=30, batch_size=16, lr=5e-3,
                 patch_size=[64, 64])
    args = emseg.parse(parser, argv, demo, quick, settings=lambda args: {
        "downsample": 4 if args.quick and not args.resize else args.downsample})
    if args.resize and args.downsample > 1:
        parser.error("--resize and --downsample both set the resolution; give one of them")
    if args.partial_map and len(args.partial_map) != len(args.partial):
        parser.error(f"--partial-map has {len(args.partial_map)} maps for {len(args.partial)} "
                     f"volumes of --partial")
    if args.partial and not (args.volume or args.classes):
        parser.error("--partial without --volume: no file shows all classes; name them with "
                     "--classes, the background's first")
    return args


def make_network(args):
    """The network that the arguments describe."""
    return MODELS[args.model](1, emseg.out_channels(args.classes), args.width)


@emseg.command
def main(args):
    # run folder, seed, device
    run = emseg.Run(args, __file__)
    if run.finished:
        return
    if args.demo:
        emseg.write_demo(run, shape=(64, 96, 96), voxel_size=(12.0, 12.0, 12.0))
        (volume,), (label,) = args.volume, args.label
        args.volume, args.label = [f"{volume}@0:24"], [f"{label}@0:24"]
        args.partial = [[f"{volume}@24:", f"{label}@24:", "3=1"]]
    if args.checkpoint:
        network = run.load(make_network(args))
        return emseg.predict_and_score(run, network, emseg.open_test(args, run.used))

    # data: fully labelled volumes, then partially labelled ones
    train, val = emseg.open_training(args)
    n_full, merges = len(train), [list(range(len(args.classes)))] * len(train)
    maps = args.partial_map or [args.label_map] * len(args.partial)
    for (volume, label, text), label_map in zip(args.partial, maps):
        merges.append(parse_merge(text, len(args.classes)))
        train += emseg.open_items([volume], [label], args, merge=merges[-1], label_map=label_map)
        emseg.print0(f"{label}: " + ", ".join(
            f"{args.classes[k]} drawn as {args.classes[target]}"
            for k, target in enumerate(merges[-1]) if k != target))
    run.used += emseg.used_slices(train + val)
    test = emseg.open_test(args, run.used, train)
    emseg.describe_data(args, train=train, validate=val, test=test)
    emseg.check_annotation(train, args)
    images, targets, slices = zip(*[(item.image, item.target, item.slices) for item in train])
    run.normalization = emseg.measure_normalization(train, args.normalize)
    patches = emseg.Patches(images, targets, args.patch_size, slices, seed=(args.seed, 0),
                            numbered=True)

    # networks
    network = run.prepare(make_network(args))
    emseg.check_patch_size(network, args.patch_size, args.model)
    predict = functools.partial(emseg.predict, run, network)        # slices -> probabilities

    # optimiser
    optimizer = torch.optim.Adam(network.parameters(), lr=args.lr)

    # train
    run.begin(args.steps_per_epoch or math.ceil(len(patches.slices) / args.batch_size),
              network=network, optimizer=optimizer)
    batches = run.batches(patches, args.batch_size)
    merges = torch.tensor(merges, device=run.device)
    for epoch in run.epochs():
        network.train()
        for step in run.steps(epoch):
            lr = args.lr * (1 - step / run.total)
            image, label, source = next(batches)
            image, label = emseg.augment(image, label, run.normalization, **AUGMENTATION)
            with run.autocast():
                logits = network(image)
            loss_full, loss_partial = loss_terms(logits, label, merges[source], source >= n_full)
            loss = loss_full + loss_partial                                             # eq. 1
            run.update(loss, lr, (network, optimizer))
            run.log(lr=lr, loss=loss, loss_full=loss_full, loss_partial=loss_partial)
        run.end_epoch(emseg.validate(run, predict, val))

    # predict and evaluate
    run.use_best(network)
    emseg.predict_and_score(run, network, test)


if __name__ == "__main__":
    main(parse_args())
