"""Learning from volumes in which some structures were drawn as part of another one.

Francis JP, Wang H, White K, Syeda-Mahmood T, Stevens R (2020). Neural network segmentation of cell
ultrastructure using incomplete annotation. arXiv:2004.09673

Older volumes are often annotated less finely than newer ones: in some cells mitochondria and
insulin vesicles were drawn by themselves, in others they are part of "membrane". Such a partial
annotation is what full annotation becomes when labels are merged, so the network's probabilities,
merged alike, can be compared with it. Both kinds of volumes train one network that tells all
structures apart; in the paper this improves even those that the partial annotation does not show.

Equations:
    eq. 1 (sum over both kinds of volumes)      loss_terms; main: loss = loss_full + loss_partial
    eq. 2 (cross entropy, full labels)          merged_cross_entropy, where nothing is merged
    eq. 3 (cross entropy, partial labels)       merged_cross_entropy
    eq. 4 (merged probabilities)                merged_cross_entropy; T_P from emseg.parse_merge
    section 2.1 (one shape for all volumes)     --resize, emseg.resize
    section 2.3 (network)                       emseg.UNet5, 7,759,653 parameters with 5 classes
    section 3 (table 1)                         --compare, table_1

A batch is drawn from the annotated slices of all volumes, each as likely as any other. Eq. 1 sums
over all voxels, so this is its unbiased sample: a slice counts the same in whatever volume it is,
and fully labelled slices are not repeated to balance the batch.

Differences from the paper:
    1. Losses are divided by the number of annotated pixels in the batch; eqs. 1 to 3 are sums.
    2. The paper names no optimiser: Adam, its rate falling linearly to 0. No batch size: 8 crops.
    3. Crops of 512 x 512, which are whole slices after --resize 512 512 512 as in the paper.
       Without --resize (the default here) volumes keep their shapes.
    4. What rotation and scaling bring in from outside of a crop is mirrored.
    5. Weights start from the Gaussians of the original U-Net. The paper does not say.
    6. Predictions of resized volumes are brought back to the shape of the volume, by interpolated
       probabilities, and are scored there.
    7. Each volume is normalised by its own mean and spread. The paper does not say. What lies
       beyond 3.2 deviations is clipped to fit into 256 grey levels, and before that, of other than
       8-bit data, what lies beyond the 0.1 and 99.9 percentiles.
    8. The epoch that counts has the best validation Dice (mean of the structures), at the shape
       that the network sees, so after --resize; table 1's row of the validation set is that epoch
       and thus a maximum over epochs. Without validation the last epoch counts. The paper does not
       say which of its 200 it took, nor whether it scored 512 x 512 x 512 or the original shape.

Run:
    GPU    python train_partial.py --volume cell1.mrc cell2.mrc --label cell1_label.mrc \\
               cell2_label.mrc --partial hek1.mrc hek1_label.mrc 3=1,4=1 --resize 512 512 512
    CPU    python train_partial.py --demo

Expect:
    GPU    not run
    CPU    test Dice of baseline and mixed labels 0.532 and 0.638, mean of four structures, seed 0,
           71 s on two cores without bf16
    Fly neuropil, 3 full and 11 partial slices (command in the README), width 16, 600 steps each:
    test Dice of the baseline 0.518 +- 0.093, of mixed labels 0.533 +- 0.091, seeds 0 to 2 (mixed
    labels ahead in each); 26 to 33 minutes for both and 1.7 GiB, one CPU thread beside other work
"""

import argparse
import copy
import csv
import math

import numpy as np
import torch

import emseg

MODELS = {**emseg.NETWORKS}
AUGMENTATION = {"rotation": 180.0, "scale": 0.2}        # section 3
CELLS = {"full": 1, "partial": 2, "test": 2}            # of the demo
CELL_VOXEL = (25.0, 25.0, 25.0)                         # nm; section 1
METHODS = {"baseline": "Baseline", "mixed": "Mixed labels"}


def merged_cross_entropy(logits, label, merge):
    """-log of the merged probability of each pixel's label (eqs. 2-4): float32 (B, H, W).

    logits (B, L, H, W), or (B, 1, H, W) for two classes; label (B, H, W) int64, each crop in its
    own label set; merge (B, L) int64: T_P, the label as which a crop's annotator drew each class.
    The log of a sum of probabilities is a difference of two log-sum-exps of logits, which is stable
    for p near 0. IGNORE may be any class: all are merged, their probability is 1, its log 0.
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

    partial (B,) bool: which crops come from partially labelled volumes; for all else see
    merged_cross_entropy.
    """
    per_crop = merged_cross_entropy(logits, label, merge).sum(dim=(1, 2))
    pixels = (label != emseg.IGNORE).sum().clamp(min=1)
    return (per_crop * ~partial).sum() / pixels, (per_crop * partial).sum() / pixels


def table_1(structures, sets):
    """The paper's table 1 as Markdown: Dice of both methods and their difference in percent.

    structures: names; sets: {name: {method: [Dice of each structure, their average]}}, Dice being
    None where it is undefined.
    """
    columns = [*structures, "average"]
    lines = [f"| DSC | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    for name, dice in sets.items():
        for method, title in METHODS.items():
            values = ["undefined" if d is None else f"{d:.3f}" for d in dice[method]]
            lines.append(f"| {name}: {title} | {' | '.join(values)} |")
        change = [f"{100 * (after / before - 1):+.1f}%" if before and after is not None
                  else "undefined" for before, after in zip(*(dice[m] for m in METHODS))]
        lines.append(f"| {name}: Difference in percentage | {' | '.join(change)} |")
    return "\n".join(lines)


def dice_of_sets(run, result):
    """What table_1 prints of a finished --compare: validation set (best epochs) and testing set."""
    sets, structures = {}, run.data.classes[1:]
    if run.data.val:
        with open(run.folder / "log.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        columns = [*(f"val_dice_{name}" for name in structures), "val_dice"]
        best = {method: max((row for row in rows if row["stage"] == method),
                            key=lambda row: float(row["val_dice"] or -1)) for method in METHODS}
        sets["Validation set"] = {method: [float(row[column]) if row[column] else None
                                           for column in columns] for method, row in best.items()}
    if result["mean"]:
        sets["Testing set"] = {
            method: [*(scores["per_class"][name]["dice"] for name in structures), scores["dice"]]
            for method, scores in result["stages"].items()}
    return sets


def write_cells(run):
    """--demo: synthetic cells of different shapes as files. In the partially labelled ones
    mitochondria and vesicles are part of "membrane", as in the paper."""
    args, folder = run.args, run.folder / "demo"
    rng, pairs = np.random.default_rng(args.seed), {}
    for kind, count in CELLS.items():
        ending = "tif" if kind == "full" else "mrc"
        pairs[kind] = [[str(folder / f"{kind}{number}{part}.{ending}") for part in ("", "_label")]
                       for number in range(1, count + 1)]
        for pair in pairs[kind]:
            shape, seed = rng.integers(64, 89, 3), int(rng.integers(2**31))
            if run.rank or args.resume:
                continue
            image, label = emseg.phantom_cell(shape, CELL_VOXEL, seed)
            if kind == "partial":
                label[label >= emseg.MITOCHONDRION] = emseg.MEMBRANE
            folder.mkdir(parents=True, exist_ok=True)
            emseg.write_volumes(pair, image, [label], CELL_VOXEL)
    run.barrier()
    args.volume, args.label = map(list, zip(*pairs["full"]))
    args.partial = [[*pair, "3=1,4=1"] for pair in pairs["partial"]]
    args.test_volume, args.test_label = map(list, zip(*pairs["test"]))


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
    method("--compare", action="store_true",
           help="first train the baseline, on --volume alone, and print the Dice of both "
           "(section 3, table 1)")
    method("--resize", nargs=3, type=emseg.positive(int, 1, 2**14), metavar=("Z", "Y", "X"),
           help="show the network volumes of this shape, resized linearly, labels by the nearest "
           "voxel (section 2.1: 512 512 512); predictions keep the shape of the volume; in place "
           "of --downsample")
    parser.set_defaults(model="unet5", epochs=200, batch_size=8, patch_size=[512, 512], lr=1e-3,
                        normalize="volume")
    demo = dict(model="unet", width=8, epochs=20, batch_size=4, resize=[64, 80, 80],
                patch_size=[80, 80], lr=5e-3, compare=True, classes=emseg.PHANTOM_CLASSES)
    args = emseg.parse(parser, argv, demo)
    if args.unlabeled_volume:
        parser.error("--unlabeled-volume: this method learns from labels only; a volume with some "
                     "labels goes to --partial")
    if args.resize and args.downsample > 1:
        parser.error("--resize and --downsample both set the resolution; give one of them")
    if args.checkpoint and args.partial:
        parser.error("--partial: a prediction from a checkpoint trains nothing; leave it out")
    if not args.volume and not args.demo and (args.label_slices or args.val_slices):
        parser.error("--label-slices and --val-slices choose slices of --volume, of which there is "
                     "none")
    if not (args.demo or args.checkpoint):
        if args.partial and not args.volume and not args.classes:
            parser.error("--partial without --volume: no file shows all classes; name them with "
                         "--classes, the background's first")
        if args.compare and not (args.partial and args.volume):
            parser.error("--compare needs --volume for the baseline, and --partial for what is "
                         "compared with it")
    return args


@emseg.command
def main(args):
    # run folder, seed, device
    run = emseg.Run(args, __file__)
    if args.demo:
        write_cells(run)

    # data
    data = run.open_data()
    compare = args.compare and run.training
    if compare and not (data.val or any(item.label for item in data.test)):
        raise emseg.InputError("--compare has no labels to score with; give --test-label, "
                               "--val-label or --val-slices")

    # networks
    network = MODELS[args.model](1, data.out_channels, args.width)
    networks = {"network": network}
    if compare:                                         # both start from the same weights
        networks = {"network_baseline": copy.deepcopy(network), **networks}
    networks = {name: run.prepare(network) for name, network in networks.items()}
    stages = dict(zip(METHODS if compare else [None], networks))

    def see_with(network):
        """uint8 slices (B, H, W) -> probabilities (B, C, H, W) of a network."""
        return lambda image: run.predict_slices(network, image)

    # optimiser
    optimizers = {f"optimizer_{name}": torch.optim.Adam(network.parameters(), lr=args.lr)
                  for name, network in networks.items()}
    scaler = run.gradient_scaler()

    # train
    if run.training:
        emseg.check_patch_size(network, args.patch_size, args.model)
        merges, full = torch.tensor(data.merges, device=run.device), len(args.volume)
        patches = {stage: emseg.Patches(
            data.images, data.labels, args.patch_size,
            data.slices[:full] if stage == "baseline" else data.slices, seed=(args.seed, 0),
            numbered=True) for stage in stages}
        steps_per_epoch = {stage: args.steps_per_epoch or math.ceil(
            len(drawn.slices) / args.batch_size) for stage, drawn in patches.items()}
        run.begin(steps_per_epoch, dict.fromkeys(stages, args.epochs), **networks, **optimizers,
                  scaler=scaler)
    for stage, name in stages.items():
        network, optimizer = networks[name], optimizers[f"optimizer_{name}"]
        if run.training:
            batches = run.batches(patches[stage], args.batch_size)
        for epoch in run.epochs(stage):
            network.train()
            for step in run.steps(epoch):
                lr = args.lr * run.left(step)
                image, label, volume = next(batches)
                image, label = emseg.augment(image, label, data.normalization, **AUGMENTATION)
                with run.autocast():
                    logits = network(image)
                loss_full, loss_partial = loss_terms(logits, label, merges[volume], volume >= full)
                loss = loss_full + loss_partial                                         # eq. 1
                scaler.scale(loss).backward()
                emseg.average_gradients(network)
                optimizer.param_groups[0]["lr"] = lr
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                run.log(lr=lr, loss=loss, loss_full=loss_full, loss_partial=loss_partial)
            run.end_epoch(run.validate(see_with(network)))
        if stage == "baseline" and run.training:
            run.use_best(network_baseline=network)

    # predict
    run.use_best(**networks)
    predictions = {stage: [run.predict(see_with(networks[name]), item,
                                       stage="baseline" if stage == "baseline" else None)
                           for item in data.test] for stage, name in stages.items()}

    # evaluate
    result = run.report(list(predictions.values())[-1], predictions if compare else None,
                        surfaces=True)
    if result and compare:
        run.say(table_1(data.classes[1:], dice_of_sets(run, result)))


if __name__ == "__main__":
    main(parse_args())
