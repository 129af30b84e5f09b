"""SegET: one binary network for each structure of an electron tomogram, with dilated context.

Zhang E, Zhang F, Liu Z, Wan X, Zhu L (2018). SegET: Deep neural network with rich contextual
features for cellular structures segmentation in electron tomography image. arXiv:1811.11729

Structures of a cell differ in size by orders of magnitude: a synaptic cleft crosses the picture, a
microtubule has a few pixels. SegET gives each structure a network of its own, of one design:
strided convolutions instead of pooling, a center that looks through dilations 1, 2, 4 and 8 side by
side, and a decoder whose levels are all fused for the result. Small structures weigh as much as the
background of their patch, and rare ones are shown more often.

Equations:
    eq. 1 (loss)                                main: loss = loss_bce + loss_jaccard + loss_l2
    eq. 3 (stable binary cross entropy)         emseg.cross_entropy
    eqs. 4-5 (Jaccard distance)                 jaccard_distance
    eq. 6 (mIoU, of background and structure)   emseg.scores
    sections 2.1, 2.3, 2.4 (network)            SegET, 4,796,761 parameters
    section 3.1 (patches)                       SlidingWindows
    section 3.2 (weights, copies, settings)     foreground_weight, SlidingWindows, PRESETS
    section 3.2 (integrated score maps)         merge_structures
    section 3.3 (rival networks)                unet; emseg.FCN8s, SegNet, DeepLabV3Plus
    figure 4                                    emseg.save_maps
    table 1                                     table_1

Widths that the paper leaves open: the third convolution of an encoder block halves the channels,
and the skip is what it returns; all seven convolutions of the center have 16 times the width (256);
decoder blocks have the width of the encoder block beside them; both fusions have the width of the
last decoder block (16), so that the last level keeps its weight (section 2.4).

Differences from the paper:
    1. What the paper leaves open: lambda is 1e-5 and covers the kernels of convolutions; the
       Jaccard distance is taken over the batch, with one pixel added to both of its sums; a
       structure that is none of the five has the settings of "other structures" in PRESETS. The
       center's "dilation 0" is read as 1.
    2. n copies of a patch means that it occurs 1 + n times.
    3. Slices are predicted whole, or in overlapping tiles beyond 1024 pixels; the paper's
       validation set is made of patches. So mIoU is over all pixels of the validation slices.
    4. Epochs without improvement are counted as Keras does: the rate is halved after the given
       number of them, and again after as many more. But any improvement counts here, where the
       rate reducer of Keras wants one of 0.0001 (min_delta).
    5. Rivals have the widths of their own papers (--width 16 makes them as wide as SegET), and
       BatchNorm. The paper adapted theirs by trial.
    6. Networks begin as in Keras, which the authors used (Glorot's uniform weights).
    7. No augmentation, as in the paper; --augment adds flips and quarter turns.
    8. A pixel that several masks claim counts in the scores of each structure, and in the merged
       ones not at all (--overlap).

Run:
    GPU    python train_seget.py --volume cell.mrc --label synapse=synapse.mrc mts=mts.mrc \\
               centriole=centriole.mrc granules=granules.mrc golgi=golgi.mrc
    CPU    python train_seget.py --demo

Expect:
    GPU    not run
    CPU    test mIoU of membrane, mitochondria, vesicles 0.710, 0.841, 0.587, average 0.713, seed 0,
           89 s on two cores without bf16
    EPFL organelles, every fifth of 20 slices held out (command in the README), width 16, at most
    1000 steps each, seed 0: validation mIoU of mitochondria, vesicles, PSD 0.949, 0.795, 0.828,
    average 0.857 (unet 0.856, fcn8s 0.799, deeplabv3plus 0.740, segnet 0.733); 47 minutes for all
    three and 1.4 GiB, one CPU thread beside other work
"""

import argparse
import math
import re
from pathlib import Path

import numpy as np
import torch
from torch import nn

import emseg

# Section 3.2. patience: epochs without a better validation mIoU before the training ends;
# reduce_patience: before the rate is halved; weight_cap: highest weight of a foreground pixel, 0
# for no weights; copies: of patches that hold the structure.
PRESETS = {
    "synapse": dict(lr=1e-4, decay=1e-6, epochs=38, patience=8, reduce_patience=3, weight_cap=0,
                    copies=0),
    "mts": dict(lr=1e-3, decay=1e-5, epochs=300, patience=8, reduce_patience=3, weight_cap=2000,
                copies=0),
    "centriole": dict(lr=2e-3, decay=1e-6, epochs=300, patience=10, reduce_patience=3,
                      weight_cap=2000, copies=4),
    "granules": dict(lr=2e-3, decay=1e-5, epochs=60, patience=5, reduce_patience=2, weight_cap=0,
                     copies=0),
    "golgi": dict(lr=2e-3, decay=1e-5, epochs=124, patience=5, reduce_patience=2, weight_cap=1000,
                  copies=2),
    "other structures": dict(lr=1e-3, decay=1e-5, epochs=100, patience=8, reduce_patience=3,
                             weight_cap=0, copies=0),
}
RESERVED = ("background", "average", "demo", "stages", "other structures")
COLORS = {"synapse": "white", "mts": "red", "centriole": "yellow", "granules": "dodgerblue",
          "golgi": "limegreen"}                         # figure 4
DEMO_STRUCTURES = {"membrane": emseg.MEMBRANE, "mitochondrion": emseg.MITOCHONDRION,
                   "vesicle": emseg.VESICLE}


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
DILATIONS = {"seget": 8, "deeplabv3plus": 18}           # the largest, at 1/16 of the resolution


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


# -- patches ---------------------------------------------------------------------------------------


class SlidingWindows(torch.utils.data.Dataset):
    """All patches of a sliding window, in random order, again and again (section 3.1).

    images, labels: lazy uint8 arrays (Z, Y, X); patch_size, stride: (Y, X); slices: for each
    volume, the z to cut up. The last window of a row or column ends at the border, so that the
    others keep their stride. Patches that hold the structure occur 1 + copies times (section 3.2).

    Item i is `image, label`, uint8 tensors of patch_size, and depends on (seed, i) alone; each run
    of len() items shows every patch once. Raises InputError where a patch does not fit.
    """

    def __init__(self, images, labels, patch_size, stride, slices, copies=0, seed=0):
        self.images, self.labels, self.patch_size, self.seed = images, labels, patch_size, seed
        h, w = patch_size
        windows = []                                    # volume, z, y, x, holds the structure
        for v, (image, label) in enumerate(zip(images, labels)):
            if any(p > side for p, side in zip(patch_size, image.shape[1:])):
                raise emseg.InputError(
                    f"{image.path}: patches of {emseg.format_shape(patch_size)} do not fit into "
                    f"slices of {emseg.format_shape(image.shape[1:])} pixels, as the network sees "
                    f"them; give a smaller --patch-size")
            y, x = np.meshgrid(*[self.starts(*s) for s in zip(image.shape[1:], patch_size, stride)],
                               indexing="ij")
            for z in slices[v]:
                structure = (label[z] == 1).cumsum(0, dtype=np.int32).cumsum(1, dtype=np.int32)
                total = np.pad(structure, ((1, 0), (1, 0)))         # [y, x]: pixels above and left
                count = total[y + h, x + w] - total[y, x + w] - total[y + h, x] + total[y, x]
                windows.append(np.stack(np.broadcast_arrays(v, z, y, x, count > 0), -1))
        self.windows = np.concatenate([w.reshape(-1, 5) for w in windows])
        positive = self.windows[:, 4] > 0
        self.order = np.repeat(np.arange(len(positive)), np.where(positive, 1 + copies, 1))
        self.shuffled = None, None                      # pass, its order

    @staticmethod
    def starts(side, patch, stride):
        """Where the windows along one side begin."""
        return np.unique(np.minimum(np.arange(0, side - patch + stride, stride), side - patch))

    def __len__(self):
        return len(self.order)

    def __getitem__(self, index):
        passes, place = divmod(index, len(self))
        if self.shuffled[0] != passes:
            rng = np.random.default_rng((self.seed, passes))
            self.shuffled = passes, rng.permutation(self.order)
        v, z, y, x, _ = self.windows[self.shuffled[1][place]].tolist()
        window = z, slice(y, y + self.patch_size[0]), slice(x, x + self.patch_size[1])
        return torch.from_numpy(self.images[v][window]), torch.from_numpy(self.labels[v][window])


# -- schedule --------------------------------------------------------------------------------------


def epochs_without_improvement(history):
    """How long ago the best value of a list was: 0 if it is the last one."""
    return len(history) - 1 - int(np.argmax(history)) if history else 0


# -- several structures ----------------------------------------------------------------------------


def parse_structures(args, known=None):
    """What the command line says of each structure: {name: arguments of its own run}.

    known: the classes of a checkpoint, background first; else the names of --label count. Labels
    without a name are masks of the only structure, or hold the class ids of --classes. Raises
    InputError.
    """
    kinds = ("label", "val_label", "test_label")
    named = {kind: emseg.named_paths(getattr(args, kind)) for kind in kinds}
    bare = any(None in paths for paths in named.values())
    if bare and any(name for paths in named.values() for name in paths):
        raise emseg.InputError("some labels have a name and some have none; give all as NAME=PATH, "
                               "or all without")
    if known is None and bare:
        known = args.classes or ["background", "foreground"]
    elif known is None:
        if args.classes:
            raise emseg.InputError("--classes: the labels already have names, NAME=PATH; leave it "
                                   "out")
        known = ["background", *named["label"]]
    structures = {}
    for k, name in enumerate(known[1:], 1):
        check_name(name, known)
        own = {kind: paths.get(None if bare else name, []) for kind, paths in named.items()}
        if len(own["val_label"]) != len(args.val_volume):
            raise emseg.InputError(f"--val-label has none for {name}")
        preset = PRESETS[preset_of(name)]
        own.update({key: value for key, value in preset.items() if getattr(args, key) is None})
        own["classes"] = [known[0], name]
        if bare and len(known) > 2:
            own["label_map"] = one_class(args.label_map, k, len(known))
        structures[name] = own
    unknown = [name for paths in named.values() for name in paths
               if name is not None and name not in structures]
    if unknown:
        raise emseg.InputError(f"{unknown[0]} is none of the structures, which are "
                               f"{', '.join(structures)}")
    return structures


def check_name(name, known):
    """Raise InputError for the name of a structure that is no good as a folder's. known: all."""
    if not re.fullmatch(r"[\w-]([\w -]*[\w-])?", name) or len(name) > 100:
        raise emseg.InputError(f"'{name[:100]}' cannot be the name of a structure and its folder; "
                               f"wanted letters, digits, _ and -, spaces only between them")
    if name.lower() in RESERVED:
        raise emseg.InputError(f"a structure cannot be named {name}, which means something else in "
                               f"the run folder; choose another name")
    if [other.lower() for other in known].count(name.lower()) > 1:
        raise emseg.InputError(f"two structures are named {name}, upper and lower case apart; "
                               f"choose another name for one")


def preset_of(name):
    """The key of a structure's settings in PRESETS."""
    return name.lower() if name.lower() in PRESETS else "other structures"


def one_class(label_map, k, n_classes):
    """The text of a label map that makes class k the structure and all others background."""
    mapping = emseg.parse_label_map(label_map) if label_map else {j: j for j in range(n_classes)}
    return ",".join(f"{value}={target if target == emseg.IGNORE else int(target == k)}"
                    for value, target in mapping.items())


class MergedLabels(emseg.LazyArray):
    """The masks of several structures as class ids 1, 2, …; see merge_structures.

    A pixel is IGNORE where it is in one of them, and where several claim it (overlap "highest").
    labels: Labels of the structures; slices: those that all of them score.
    """

    def __init__(self, labels, overlap):
        first = labels[0]
        super().__init__(first.path, first.shape, first.dtype, first.voxel_size)
        self.labels, self.overlap = labels, overlap
        slices = set(first.slices.tolist()).intersection(*[label.slices for label in labels])
        self.slices = np.array(sorted(slices), dtype=int)

    def read(self, z, y, x):
        masks = [label.read(z, y, x) for label in self.labels]
        ids, unknown = np.zeros_like(masks[0]), np.zeros(masks[0].shape, dtype=bool)
        for k, mask in enumerate(masks, 1):
            if self.overlap == "highest":
                unknown |= (mask == 1) & (ids > 0)
            unknown |= mask == emseg.IGNORE
            ids[mask == 1] = k
        ids[unknown] = emseg.IGNORE
        return ids


def merge_structures(prob, threshold, overlap):
    """Integrate the score maps of all structures (section 3.2): class ids int64 (n, H, W).

    prob (n, K, H, W). A pixel in which no structure reaches the threshold is background (0).
    overlap: of several, the one with the "highest" score counts, or the "last" one.
    """
    claimed = prob > threshold
    if overlap == "last":
        prob = torch.arange(1, prob.shape[1] + 1, device=prob.device).view(1, -1, 1, 1)
    score, k = torch.where(claimed, prob, 0).max(dim=1)
    return torch.where(score > 0, k + 1, 0)


def open_structure(name, part):
    """Open the data of a structure's run. Raises InputError, with its name, also where no
    validation slice shows it: background alone would choose the epoch and the rate."""
    try:
        part.open_data(score_validation=True)
    except emseg.InputError as error:
        raise emseg.InputError(f"{name}: {error}")
    if part.data.val and not any((item.label[z] == 1).any() for item in part.data.val
                                 for z in item.label.slices):
        raise emseg.InputError(f"no validation slice shows {name}; choose others with "
                               f"--val-slices or --val-volume")


def merge_data(parts, names, overlap):
    """What the whole run sees: the test volumes of its parts, with all structures as classes."""
    items = []
    for together in zip(*[part.data.test for part in parts.values()]):
        labels, item = [each.label for each in together], together[0]
        merged = None if None in labels else MergedLabels(labels, overlap)
        if merged is not None and not len(merged.slices):
            merged = None
        items.append(emseg.Item(item.name, item.volume, item.image, merged))
    background = next(iter(parts.values())).data.classes[0]
    return emseg.Data([background, *names], None, [], items)


def table_1(model, scored, results):
    """The paper's table 1 as Markdown: mIoU of each structure and their average.

    scored: what was scored; results: {structure: the mean block of its metrics.json, or None}.
    """
    def shown(value):
        return "undefined" if value is None else f"{value:.4f}"

    values = [block and block["miou"] for block in results.values()]
    return "\n".join([
        f"| mIoU, {scored} | {' | '.join(results)} | average |",
        f"| --- |{' --- |' * (len(results) + 1)}",
        f"| {model} | {' | '.join(map(shown, values))} | {shown(mean_of(values))} |"])


def mean_of(values):
    """Mean of a list; None where one of it is."""
    return None if None in values else sum(values) / len(values)


def structure_colors(names):
    """The colours of the paper's figure 4 for its structures, others for others."""
    others = iter(emseg.CLASS_COLORS * len(names))
    return [COLORS.get(name.lower()) or next(others) for name in names]


def describe(name, own, patches):
    """The settings of a structure, to print."""
    weights = f"weights up to {own.weight_cap:g}" if own.weight_cap else "no weights"
    return (f"{name}, settings of {preset_of(name)}: {len(patches)} patches with {own.copies} "
            f"copies of positive ones, {weights}, rate {own.lr:g} (decay {own.decay:g}, halved "
            f"after {own.reduce_patience} epochs without improvement), {own.epochs} epochs at "
            f"most, ended after {own.patience} of these")


# -- the command -----------------------------------------------------------------------------------


def write_masks(run):
    """--demo: a training and a test tomogram as files, and a mask of 0 and 1 for each structure;
    the training files are TIFF, the others MRC, as those of the paper."""
    args, folder = run.args, run.folder / "demo"
    names = [*DEMO_STRUCTURES]
    for seed, (kind, ending) in enumerate([("train", "tif"), ("test", "mrc")]):
        files = [str(folder / f"{kind}{part}.{ending}") for part in ("", *[f"_{n}" for n in names])]
        setattr(args, "volume" if kind == "train" else "test_volume", files[:1])
        setattr(args, "label" if kind == "train" else "test_label",
                [f"{name}={path}" for name, path in zip(names, files[1:])])
        if run.rank == 0 and not args.resume:
            folder.mkdir(parents=True, exist_ok=True)
            voxel_size = 20.0, 16.0, 16.0
            image, label = emseg.phantom((20, 160, 160), voxel_size, 1000 * args.seed + seed)
            masks = [(label == k).astype(np.uint8) for k in DEMO_STRUCTURES.values()]
            emseg.write_volumes(files, image, masks, voxel_size)
    run.barrier()


def parse_args(argv=None):
    parser = emseg.Parser(__file__, __doc__)
    preset = "default: the structure's, section 3.2"
    emseg.add_common_args(parser, MODELS, sources={
        "label": "NAME=PATH for each structure and volume; NAME alone chooses settings: synapse, "
        "mts, centriole, granules, golgi or any other",
        "val_label": "NAME=PATH", "test_label": "NAME=PATH",
        "val_slices": "default: every=5, section 3.1", "model": "seget is the paper's",
        "epochs": preset, "lr": preset, "batch_size": "section 3.2", "patch_size": "section 3.1",
        "steps_per_epoch": "default: each patch once"})
    method = parser.add_argument_group("method (Zhang 2018)").add_argument
    method("--stride", type=emseg.positive(int), nargs="+", metavar="N",
           help="of the sliding window, Y X; default: half of --patch-size, as in section 3.1")
    method("--weight-cap", type=float, metavar="W",
           help="highest weight of a foreground pixel, which is the background/foreground ratio of "
           f"its patch; 0: no weights ({preset})")
    method("--copies", type=int, metavar="N",
           help=f"how often patches with the structure are repeated ({preset})")
    method("--decay", type=float, metavar="D",
           help=f"the rate is divided by 1 + D * step ({preset})")
    method("--patience", type=emseg.positive(int), metavar="N",
           help=f"epochs without a better validation mIoU that end a training ({preset})")
    method("--reduce-patience", type=emseg.positive(int), metavar="N",
           help=f"epochs without a better validation mIoU that halve the rate ({preset})")
    method("--l2", type=float, default=1e-5, metavar="L", help="lambda of eq. 1 (not in paper)")
    method("--augment", action=argparse.BooleanOptionalAction, default=False,
           help="random flips and quarter turns (not in paper)")
    method("--overlap", choices=("highest", "last"), default="highest",
           help="where several structures claim a pixel of the merged prediction: the one with the "
           "highest score counts (section 3.2), or the one named last, for structures inside of "
           "others")
    parser.set_defaults(model="seget", batch_size=12, patch_size=[512, 512])
    demo = dict(width=8, epochs=4, batch_size=1, patch_size=[144, 144], lr=6e-3, decay=4e-3,
                augment=True)
    args = emseg.parse(parser, argv, demo, named_labels=True)
    if args.unlabeled_volume:
        parser.error("--unlabeled-volume: this method learns from labels only; leave it out")
    if args.stride is None:
        args.stride = [max(1, side // 2) for side in args.patch_size]
    if len(args.stride) != len(args.patch_size):
        parser.error(f"--stride {emseg.format_shape(args.stride)}: wanted two numbers, Y X")
    for name in ("weight_cap", "copies", "decay", "l2"):
        if not 0 <= (getattr(args, name) or 0) < math.inf:
            parser.error(f"{emseg.flag_name(name)} {getattr(args, name)} is not 0 or more")
    if args.val_slices is None and not args.val_volume:
        args.val_slices = "every=5"
    return args


@emseg.command
def main(args):
    # run folder, seed, device
    run = emseg.Run(args, __file__)
    if args.demo:
        write_masks(run)

    # data
    structures = parse_structures(args, run.checkpoint and run.checkpoint["classes"])
    parts = {name: run.part(name, **own) for name, own in structures.items()}
    for name, part in parts.items():
        open_structure(name, part)
    run.data = merge_data(parts, structures, args.overlap)
    run.colors = structure_colors(parts)
    for part, color in zip(parts.values(), run.colors):
        part.colors = [color]

    # networks
    networks = {}
    for name, part in parts.items():
        torch.manual_seed(args.seed)                    # as if the structure were alone
        network = MODELS[args.model](1, 1, args.width).apply(emseg.glorot_initialization)
        networks[name] = part.prepare(network)

    if run.training:
        emseg.check_patch_size(networks[name], args.patch_size, args.model)
        reach = 16 * DILATIONS.get(args.model, 0)
        if min(args.patch_size) <= reach:
            run.say(f"note: crops of {emseg.format_shape(args.patch_size)} pixels never train the "
                    f"outer weights of the widest dilation; give --patch-size above {reach}")
        patches = {name: SlidingWindows(
            part.data.images, part.data.labels, args.patch_size, args.stride, part.data.slices,
            part.args.copies, args.seed) for name, part in parts.items()}
    run.begin_parts()
    for name, part in parts.items():
        network, own = networks[name], part.args

        def see(image):
            """uint8 slices (B, H, W) -> probabilities (B, 1, H, W) of this structure."""
            return part.predict_slices(network, image)

        # optimiser
        optimizer = torch.optim.Adam(network.parameters(), lr=own.lr)
        scaler = part.gradient_scaler()

        # train
        if part.training:
            part.say(describe(name, own, patches[name]))
            part.begin(args.steps_per_epoch or math.ceil(len(patches[name]) / args.batch_size),
                       network=network, optimizer=optimizer, scaler=scaler)
            batches = part.batches(patches[name], args.batch_size)
        for epoch in part.epochs():
            if epochs_without_improvement(part.history) >= own.patience:
                part.say(f"{name}: no better validation mIoU in {own.patience} epochs")
                break
            peak = own.lr * 0.5 ** emseg.plateaus(part.history, own.reduce_patience)
            network.train()
            for step in part.steps(epoch):
                lr = peak / (1 + own.decay * step)
                image, label = next(batches)
                image, label = emseg.augment(image, label, part.data.normalization,
                                             **dict(flip=True, rot90=True) if args.augment else {})
                weight = foreground_weight(label, own.weight_cap) if own.weight_cap else None
                with part.autocast():
                    logits = network(image)
                loss_bce = emseg.cross_entropy(logits, label, weight)                   # eq. 3
                loss_jaccard = jaccard_distance(logits, label)                          # eq. 5
                loss_l2 = args.l2 * squared_norm(network)
                loss = loss_bce + loss_jaccard + loss_l2                                # eq. 1
                scaler.scale(loss).backward()
                emseg.average_gradients(network)
                optimizer.param_groups[0]["lr"] = lr
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                part.log(lr=lr, loss=loss, loss_bce=loss_bce, loss_jaccard=loss_jaccard,
                         loss_l2=loss_l2)
            part.end_epoch(part.validate(see), metric="val_miou")
        part.use_best(network=network)

    # predict
    run.gather(parts)

    def see_all(image):
        """uint8 slices (B, H, W) -> probabilities (B, K, H, W) of all structures."""
        return torch.cat([part.predict_slices(networks[name], image)
                          for name, part in parts.items()], dim=1)

    def merge(prob):
        return merge_structures(prob, run.threshold, args.overlap)

    predictions = []
    for number, item in enumerate(run.data.test):
        masks = {part.output(part.data.test[number]): lambda prob, k=k: prob[:, k] > run.threshold
                 for k, part in enumerate(parts.values())}
        predictions.append((run.predict(see_all, item, channels=len(parts), decide=merge,
                                        also=masks), *masks))

    # evaluate
    merged, *masks = zip(*predictions)
    reports = [part.report(paths) for part, paths in zip(parts.values(), masks)]
    if run.rank == 0:
        results = {name: report["mean"] for name, report in zip(parts, reports)}
        average = {key: mean_of([block and block[key] for block in results.values()])
                   for key in ("miou", "accuracy", "dice", "iou")}
        emseg.save_maps(run.folder / "maps.png", [
            (Path(item.volume.path).name, emseg.as_uint8(item.volume), item.label,
             emseg.open_volume(str(path))) for item, path in zip(run.data.test, merged)],
            run.data.classes, run.colors)
        run.report(merged, structures=results, average=average)
        run.say(table_1(args.model, "test" if args.test_volume else "validation", results))


if __name__ == "__main__":
    main(parse_args())
