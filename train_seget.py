"""SegET: one binary network for each structure of an electron tomogram, with dilated context.

Zhang E, Zhang F, Liu Z, Wan X, Zhu L (2018). SegET: Deep neural network with rich contextual
features for cellular structures segmentation in electron tomography image. arXiv:1811.11729

Structures of a cell differ in size by orders of magnitude: a synaptic cleft crosses the picture, a
microtubule has a few pixels. SegET gives each structure a network of its own, of one design:
strided convolutions instead of pooling, a center that looks through dilations 1, 2, 4 and 8 side by
side, and a decoder whose levels are all fused for the result. Small structures weigh as much as the
background of their patch, and rare ones are shown more often.

Each of several structures is a run of its own, in a subfolder of its name; when all are trained,
their score maps are merged into one prediction.

Equations:
    eq. 1 (loss)                                train_structure: loss
    eq. 3 (stable binary cross entropy)         emseg.cross_entropy
    eqs. 4-5 (Jaccard distance)                 jaccard_distance
    eq. 6 (mIoU, of background and structure)   emseg.scores
    sections 2.1, 2.3, 2.4 (network)            SegET, 4,796,761 parameters
    section 3.1 (patches)                       SlidingWindows
    section 3.2 (weights, copies, settings)     foreground_weight, SlidingWindows, PRESETS
    section 3.2 (integrated score maps)         merge_scores
    figure 4 (classes in colours)               maps.png, emseg.save_slices
    section 3.3 (rival networks)                unet; emseg.FCN8s, SegNet, DeepLabV3Plus

Widths that the paper leaves open: the third convolution of an encoder block halves the channels,
and the skip is what it returns; all seven convolutions of the center have 16 times the width (256);
decoder blocks have the width of the encoder block beside them; both fusions have the width of the
last decoder block (16), so that the last level keeps its weight (section 2.4).

Differences from the paper:
    1. What the paper leaves open: lambda is 1e-5 and covers the kernels of convolutions; the
       Jaccard distance is taken over the batch, with one pixel added to both of its sums; a
       structure that is none of the five has the settings of "other structures" in PRESETS. The
       center's "dilation 0" is read as 1.
    2. n copies of a patch: it occurs 1 + n times.
    3. Slices are predicted whole, or in overlapping tiles beyond 1152 pixels; the paper's
       validation set is made of patches. So mIoU is over all pixels of the validation slices.
    4. As in Keras the rate is halved after the given number of epochs without improvement, and
       again after as many more; but any improvement counts, where Keras wants one of 0.0001.
    5. Rivals have the widths of their own papers (--width 16 makes them as wide as SegET), and
       BatchNorm. The paper adapted theirs by trial.
    6. Convolutions begin as in Keras, which the authors used (Glorot's uniform weights).
    7. A pixel that several masks claim does not count in the merged scores.

Run:
    GPU    python train_seget.py --volume cell.mrc --label synapse=synapse.mrc mts=mts.mrc \\
               centriole=centriole.mrc granules=granules.mrc golgi=golgi.mrc
    CPU    python train_seget.py --demo

Expect:
    GPU    not run at the paper's settings
    CPU    test mIoU of membrane, mitochondrion, vesicle 0.752, 0.758, 0.697, average 0.736, seed 0,
           153 s of one thread
    EPFL organelles, every fifth of 20 slices held out (tests/replicate.py seget), width 8, 1080
    steps for all three structures together, validation mIoU, average of mitochondria, vesicles and
    PSD: seget 0.820 +- 0.013, unet 0.840 +- 0.017, deeplabv3plus 0.803 +- 0.009, fcn8s 0.788 +-
    0.008, segnet 0.686 +- 0.056; seget with --weight-cap 1000 --copies 2, which are for rarer
    structures, 0.750 +- 0.019 (3 seeds); a minute and 0.4 GiB on an H200
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import os

import emseg                            # before torch, see there
import numpy as np
import torch
from torch import nn

# Section 3.2. decay: the rate is divided by 1 + decay * step; patience: epochs without a better
# validation mIoU before the training ends, reduce_patience: before the rate is halved; weight_cap:
# highest weight of a foreground pixel, 0 for no weights; copies: of patches with the structure.
PRESET_KEYS = ("lr", "decay", "epochs", "patience", "reduce_patience", "weight_cap", "copies")
PRESETS = {
    "synapse":          (1e-4, 1e-6, 38, 8, 3, 0, 0),
    "mts":              (1e-3, 1e-5, 300, 8, 3, 2000, 0),
    "centriole":        (2e-3, 1e-6, 300, 10, 3, 2000, 4),
    "granules":         (2e-3, 1e-5, 60, 5, 2, 0, 0),
    "golgi":            (2e-3, 1e-5, 124, 5, 2, 1000, 2),
    "other structures": (1e-3, 1e-5, 100, 8, 3, 0, 0),              # not in paper
}
AUGMENTATION = {"flip": True, "rot90": True}            # --augment
LABELS = ("label", "val_label", "test_label")


# -- network ---------------------------------------------------------------------------------------


class SegET(nn.Module):
    """Encoder, center, decoder (sections 2.1, 2.3, 2.4; figure 2): 4,796,761 parameters.

    (B, in_channels, H, W) -> logits (B, out_channels, H, W) of any size, at 1 input and 1 output
    channel. width: filters of the first block, 16 in the paper, doubling with each of the four.
    Every convolution but the last is followed by BatchNorm and ReLU.
    """

    dims, stride, offset, margin = 2, 1, 0, 0

    def __init__(self, in_channels, out_channels, width=None):
        super().__init__()
        w = width or 16
        widths, center = [w, 2 * w, 4 * w, 8 * w], 16 * w
        skips = [max(c // 2, 1) for c in widths]        # what the third convolution narrows to
        self.encoder = nn.ModuleList(
            emseg.conv_block((c_in, c, c, skip))
            for c_in, c, skip in zip([in_channels, *widths], widths, skips))
        self.down = nn.ModuleList(emseg.conv_block((skip, c), stride=2)
                                  for c, skip in zip(widths, skips))
        self.center = emseg.conv_block((8 * w, center, center))
        self.dilated = nn.ModuleList(
            emseg.conv_block((center, center), padding=d, dilation=d) for d in (1, 2, 4, 8))
        self.stack = emseg.conv_block((5 * center, center), kernel=1, padding=0)
        self.decoder = nn.ModuleList(
            emseg.conv_block((2 * c + skip, c, c)) for c, skip in zip(widths[::-1], skips[::-1]))
        self.fuse_higher = emseg.conv_block((sum(widths[1:]), w, w))
        self.fuse = emseg.conv_block((2 * w, w, w))
        self.head = nn.Conv2d(w, out_channels, 1)

    @emseg.any_size(16)
    def forward(self, x):
        skips, levels = [], []
        for block, down in zip(self.encoder, self.down):
            skips.append(block(x))
            x = down(skips[-1])
        x = self.center(x)
        x = self.stack(torch.cat([x, *[branch(x) for branch in self.dilated]], dim=1))
        for block in self.decoder:
            skip = skips.pop()
            x = block(torch.cat([emseg.bilinear(x, skip.shape[-2:]), skip], dim=1))
            levels.append(x)
        *higher, last = levels                          # at 1/8, 1/4, 1/2 and the full resolution
        size = higher[-1].shape[-2:]
        higher = self.fuse_higher(torch.cat([emseg.bilinear(x, size) for x in higher], dim=1))
        higher = emseg.bilinear(higher, last.shape[-2:])
        return self.head(self.fuse(torch.cat([higher, last], dim=1)))


def unet(in_channels, out_channels, width=None):
    """The rival U-Net (section 3.3): the original's five levels, and BatchNorm; 31,042,369
    parameters at 1 input and 1 output channel."""
    return emseg.UNet(in_channels, out_channels, width, levels=5)


MODELS = {**emseg.NETWORKS, "unet": unet, "seget": SegET}


# -- loss ------------------------------------------------------------------------------------------


def foreground_weight(label, cap):
    """Adaptive sample-wise weights (section 3.2): float32 (B, H, W) for label (B, H, W) int64.

    The structure's pixels weigh as many times a background pixel as there are background pixels for
    one of them in the very patch, at most `cap` times; the background weighs 1. IGNORE is neither.
    """
    structure = label == 1
    n_structure = structure.sum((1, 2), keepdim=True)
    n_background = (label == 0).sum((1, 2), keepdim=True)
    ratio = (n_background / n_structure.clamp(min=1)).clamp(max=cap)
    return torch.where(structure, ratio, 1.0)


def jaccard_distance(logits, label, smooth=1.0):
    """1 - |Y n T| / (|Y| + |T| - |Y n T|) over a batch (eqs. 4-5): a scalar.

    logits (B, 1, H, W); label (B, H, W) int64, IGNORE counts nowhere; smooth: pixels added to both,
    for a batch without the structure.
    """
    prob, target = emseg.probabilities(logits)[:, 0], (label == 1).float()
    prob = prob * (label != emseg.IGNORE)
    overlap = (prob * target).sum()
    return 1 - (overlap + smooth) / (prob.sum() + target.sum() - overlap + smooth)


def squared_norm(network):
    """psi of eq. 1: the sum of squares of all kernels (biases and BatchNorm are left alone)."""
    return sum(weight.square().sum() for weight in network.parameters() if weight.dim() > 1)


# -- patches and schedule --------------------------------------------------------------------------


class SlidingWindows(emseg.Patches):
    """All patches of a sliding window, in random order, again and again (section 3.1).

    stride (Y, X); slices: z of each volume; seed: an int; for all else see emseg.Patches. The last
    window of a row or column ends at the border. Patches that hold the structure occur 1 + copies
    times (section 3.2). Every len() items in a row show every patch once.
    """

    def __init__(self, images, labels, patch_size, stride, slices, copies=0, seed=0):
        super().__init__(images, labels, patch_size, slices, seed=(seed,))
        self.windows = []                               # volume, window
        for v, z in self.slices:
            structure = labels[v][z] == 1
            for corner in itertools.product(*map(self.starts, structure.shape, patch_size, stride)):
                window = tuple(slice(a, a + side) for a, side in zip(corner, patch_size))
                positive = int(structure[window].any())
                self.windows += [(v, (z, *window))] * (1 + copies * positive)

    @staticmethod
    def starts(side, patch, stride):
        """Where the windows along one side begin."""
        return np.unique(np.minimum(np.arange(0, side - patch + stride, stride), side - patch))

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, index):
        passes, place = divmod(index, len(self))
        order = np.random.default_rng((*self.seed, passes)).permutation(len(self))
        v, window = self.windows[order[place]]
        return tuple(torch.from_numpy(arrays[v][window]) for arrays in (self.images, self.labels))


def plateau(history, reduce_patience):
    """(epochs since the best one, how often the rate was halved) at the end of a history of mIoU.

    It is halved whenever `reduce_patience` epochs in a row brought nothing better (section 3.2).
    """
    best, waited, drops = -1, 0, 0
    for value in history:
        best, waited = (value, 0) if value > best else (best, waited + 1)
        drops += waited > 0 and waited % reduce_patience == 0
    return waited, drops


# -- several structures ----------------------------------------------------------------------------


def split_name(label):
    """NAME=PATH -> (NAME, PATH); a bare path has the name None."""
    name, equals, path = label.partition("=")
    return (name, path) if equals and "/" not in name else (None, label)


def structures_of(args):
    """{name of a structure: what is different in the arguments of its own run}.

    Names come from --classes or a checkpoint, or else from --label. Labels without a name are masks
    of the only structure, or hold the class ids of --classes. Raises InputError.
    """
    labels = {kind: [split_name(text) for text in getattr(args, kind)] for kind in LABELS}
    given = {name for pairs in labels.values() for name, _ in pairs}
    background, *names = args.classes or [
        "background", *dict.fromkeys(name for name, _ in labels["label"])]
    if None in names or given != {None} and not given <= {*names}:
        known = " or ".join(filter(None, names)) or "the name of its structure"
        raise emseg.InputError(f"of which structure is each label? Write NAME=PATH for all, NAME "
                               f"being {known}; or no NAME, and --classes")
    structures = {}
    for k, name in enumerate(names, 1):
        own = {kind: [path for other, path in pairs if other in (None, name)]
               for kind, pairs in labels.items()}
        for kind in LABELS:
            count, wanted = len(own[kind]), len(getattr(args, kind.replace("label", "volume")))
            if count != wanted and (count or kind != "test_label"):
                raise emseg.InputError(f"{emseg.flag_name(kind)} has {count} paths for {name}; "
                                       f"give one for each of {wanted} volumes")
        preset = zip(PRESET_KEYS, PRESETS.get(name.lower(), PRESETS["other structures"]))
        own |= {key: value for key, value in preset if getattr(args, key) is None}
        if None in given and len(names) > 1:
            own["label_map"] = one_class(args.label_map, k, len(args.classes))
        structures[name] = {**own, "classes": [background, name]}
    return structures


def one_class(label_map, k, n_classes):
    """The text of a label map that makes class k the structure and all others background."""
    mapping = emseg.parse_label_map(label_map) if label_map else {j: j for j in range(n_classes)}
    return ",".join(f"{value}={target if target == emseg.IGNORE else int(target == k)}"
                    for value, target in mapping.items())


def open_structure(args, used):
    """(train, val, test, patches) of a structure; of a checkpoint, test alone. used: slices that do
    not score, those that an earlier run has trained on.
    Validation without the structure is refused: background alone would choose the epoch.
    """
    if args.checkpoint:
        return [], [], emseg.open_test(args, used), None
    train, val = emseg.open_training(args)
    test = emseg.open_test(args, used + emseg.used_slices(train + val), train, val)
    emseg.describe_data(args, train=train, validate=val, test=test)
    emseg.check_annotation(train, args)
    if not any((item.target[z] == 1).any() for item in val for z in item.slices):
        raise emseg.InputError(f"no validation slice shows {args.classes[1]}; choose others: "
                               f"--val-slices, --val-volume")
    images, targets, slices = zip(*[(item.image, item.target, item.slices) for item in train])
    patches = SlidingWindows(images, targets, args.patch_size, args.stride, slices, args.copies,
                             args.seed)
    return train, val, test, patches


def merge_scores(prob):
    """Integrate the score maps (n, K, H, W) of all structures (section 3.2): class ids (n, H, W)
    int64. The highest score counts; where none is above 0.5 is background."""
    score, k = prob.max(dim=1)
    return torch.where(score > 0.5, k + 1, 0)


class MergedLabels(emseg.LazyArray):
    """The masks (Labels) of several structures as class ids 1, 2, …; IGNORE where one of them is,
    and where several claim a voxel."""

    def __init__(self, labels):
        first = labels[0]
        super().__init__(first.path, first.shape, first.dtype, first.voxel_size)
        self.labels = labels
        self.slices = functools.reduce(np.union1d, [label.slices for label in labels])

    def read(self, z, y, x):
        masks = np.stack([label.read(z, y, x) for label in self.labels])
        claims = masks.sum(0, dtype=int)
        ids = np.select([claims == 0, claims == 1], [0, masks.argmax(0) + 1], emseg.IGNORE)
        return ids.astype(self.dtype)


def parse_args(argv=None):
    parser = emseg.Parser(__file__, __doc__)
    preset = "default: the structure's, section 3.2"
    emseg.add_common_args(parser, MODELS, sources={
        "label": "NAME=PATH for each structure and volume; NAME alone chooses settings: synapse, "
        "mts, centriole, granules, golgi or any other",
        "val_label": "NAME=PATH", "test_label": "NAME=PATH",
        "test_volume": "or --val-volume where there is one",
        "val_slices": "default: every=5, section 3.1", "model": "seget is the paper's",
        "epochs": preset, "lr": preset, "batch_size": "section 3.2",
        "patch_size": "section 3.1; up to 128, the outer weights of SegET's widest dilation are "
        "never trained", "steps_per_epoch": "default: each patch once"})
    method = parser.add_argument_group("method (Zhang 2018)").add_argument
    method("--stride", type=emseg.positive(int), nargs=2, metavar=("Y", "X"),
           help="of the sliding window; default: half of --patch-size, as in section 3.1")
    method("--weight-cap", type=emseg.nonnegative, metavar="W",
           help="highest weight of a foreground pixel (of the background/foreground ratio of its "
           f"patch); 0: no weights ({preset})")
    method("--copies", type=emseg.number(int, 0), metavar="N",
           help=f"how often patches with the structure are repeated ({preset})")
    method("--decay", type=emseg.nonnegative, metavar="D",
           help=f"the rate is divided by 1 + D * step ({preset})")
    method("--patience", type=emseg.positive(int), metavar="N",
           help=f"epochs without a better validation mIoU that end a training ({preset})")
    method("--reduce-patience", type=emseg.positive(int), metavar="N",
           help=f"epochs without a better validation mIoU that halve the rate ({preset})")
    method("--l2", type=emseg.nonnegative, default=1e-5, metavar="L",
           help="lambda of eq. 1 (not in paper)")
    method("--augment", action=argparse.BooleanOptionalAction, default=False,
           help="random flips and quarter turns (not in paper)")
    parser.set_defaults(model="seget", batch_size=12, patch_size=[512, 512])
    demo = dict(width=8, epochs=4, batch_size=1, patch_size=[144, 144], lr=6e-3, decay=4e-3,
                augment=True, label_map="1=1,3=2,4=3,*=0",
                classes=["background", "membrane", "mitochondrion", "vesicle"])
    quick = dict(width=8, epochs=8, steps_per_epoch=20, batch_size=8, patch_size=[64, 64],
                 downsample=4, lr=6e-3, decay=4e-3, augment=True)
    args = emseg.parse(parser, argv, demo, quick)
    args.stride = args.stride or [max(1, side // 2) for side in args.patch_size]
    if args.val_slices is None and not args.val_volume:
        args.val_slices = "every=5"
    return args


def make_network(args):
    """The network of one structure."""
    return MODELS[args.model](1, 1, args.width)


@emseg.command
def main(args):
    # run folder, seed, device
    run = emseg.Run(args, __file__)
    if run.finished:
        return
    if args.demo:
        emseg.write_demo(run, shape=(20, 160, 160), voxel_size=(20.0, 16.0, 16.0))

    # data: of all structures, so that mistakes show before one is trained
    structures = structures_of(args)
    data = {name: open_structure(argparse.Namespace(**{**vars(args), **own}), run.used)
            for name, own in structures.items()}
    with torch.device("meta"):
        emseg.check_patch_size(make_network(args), args.patch_size, args.model)

    # one complete run, or one for each structure
    runs = {}
    for name, own in structures.items():
        if len(structures) == 1:
            vars(args).update({key: own[key] for key in own if key not in LABELS})
            return train_structure(run, *data[name])
        if args.checkpoint:
            own["checkpoint"] = os.path.join(args.checkpoint.removesuffix("best.pt"), name)
        runs[name] = emseg.Run(run.args_of(name, **own), __file__)
        train_structure(runs[name], *data[name])
    merge_runs(run, runs, [test for *_, test, _ in data.values()])


def train_structure(run, train, val, test, patches):
    """The run of one structure; for its data see open_structure."""
    args = run.args
    if run.finished:
        return
    if args.checkpoint:
        network = run.load(make_network(args))
        return emseg.predict_and_score(run, network, test)

    # data
    run.used += emseg.used_slices(train + val)
    run.normalization = emseg.measure_normalization(train, args.normalize)

    # networks
    network = run.prepare(make_network(args).apply(emseg.glorot_initialization))
    predict = functools.partial(emseg.predict, run, network)        # slices -> probabilities

    # optimiser
    optimizer = torch.optim.Adam(network.parameters(), lr=args.lr)

    # train
    emseg.print0(f"{args.classes[1]}: {len(patches)} patches; {args.epochs} epochs at most, ended "
                 f"after {args.patience} without a better validation")
    run.begin(args.steps_per_epoch or math.ceil(len(patches) / args.batch_size), network=network,
              optimizer=optimizer)
    batches = run.batches(patches, args.batch_size)
    for epoch in run.epochs():
        waited, drops = plateau([row["val_miou"] for row in run.rows], args.reduce_patience)
        if waited >= args.patience:
            emseg.print0(f"the last {waited} epochs were not better than epoch "
                         f"{epoch - waited - 1}, which is kept (mIoU {run.best:.4f})")
            break
        network.train()
        for step in run.steps(epoch):
            lr = args.lr * 0.5**drops / (1 + args.decay * step)
            image, label = emseg.augment(*next(batches), run.normalization,
                                         **AUGMENTATION if args.augment else {})
            weight = foreground_weight(label, args.weight_cap) if args.weight_cap else None
            with run.autocast():
                logits = network(image)
            loss_bce = emseg.cross_entropy(logits, label, weight)                       # eq. 3
            loss_jaccard = jaccard_distance(logits, label)                              # eq. 5
            loss_l2 = args.l2 * squared_norm(network)
            loss = loss_bce + loss_jaccard + loss_l2                                    # eq. 1
            run.update(loss, lr, (network, optimizer))
            run.log(lr=lr, loss=loss, loss_bce=loss_bce, loss_jaccard=loss_jaccard,
                    loss_l2=loss_l2)
        run.end_epoch(emseg.validate(run, predict, val), metric="val_miou")

    # predict and evaluate
    run.use_best(network)
    emseg.predict_and_score(run, network, test)


def merge_runs(run, runs, tests):
    """Predict all structures together with the networks of their runs, and score that.

    runs: {name: Run} of the structures; tests: the test Items of each.
    """
    args, networks, test = run.args, {}, []
    args.classes = [next(iter(runs.values())).args.classes[0], *runs]
    for name, each in runs.items():
        if not args.checkpoint:
            each.checkpoint = emseg.load_checkpoint(each.folder)
        each.normalization = each.checkpoint["normalization"]
        networks[name] = each.load(make_network(args))
    if not args.checkpoint:                 # for --checkpoint, which finds the networks beside it
        run.modules, run.used = {}, sum([each.checkpoint["used"] for each in runs.values()], [])
        run.save("best.pt")
    for items in zip(*tests):
        labels = [item.label for item in items]
        merged = None if None in labels else MergedLabels(labels)
        test.append(dataclasses.replace(items[0], label=merged))

    def predict(image):
        """uint8 slices (B, H, W) -> probabilities (B, K, H, W) of all structures."""
        return torch.cat([emseg.predict(runs[name], networks[name], image) for name in runs], dim=1)

    predictions = emseg.predict_all(run, predict, test, channels=len(runs), decide=merge_scores)
    reports = {name: json.loads((each.folder / "metrics.json").read_text())
               for name, each in runs.items()}
    means = {name: report["mean"] for name, report in reports.items()}
    miou = {name: mean["miou"] for name, mean in means.items() if mean}                 # table 1
    average = float(np.mean([*miou.values()])) if miou else None
    run.seconds = sum(report["train_seconds"] for report in reports.values())
    run.best = float(np.mean([report["best"] for report in reports.values()]))
    if miou and not run.rank:
        table = emseg.markdown([("structure", "mIoU"), *(
            (name, f"{value:.4f}") for name, value in {**miou, "average": average}.items())])
        emseg.write_text(run.path("table.md"), table + "\n")
        emseg.print0(table)
    emseg.report(run, test, predictions, sum(map(emseg.count_parameters, networks.values())),
                 structures=means, average={"miou": average})


if __name__ == "__main__":
    main(parse_args())
