"""2D-3D networks: a 2D encoder-decoder that looks at neighbouring slices, in ensembles.

Guay MD, Emam ZAS, Anderson AB, Aronova MA, Pokrovskaya ID, Storrie B, Leapman RD (2021). Dense
cellular segmentation for EM using 2D-3D neural network ensembles. Scientific Reports 11, 2561.
doi:10.1038/s41598-021-81590-0

Every voxel of a platelet gets one of seven classes. A 2D U-Net runs over the slices of a thin
window, helped by 3x3x3 convolutions at both ends; a small 3D spatial pyramid then sees its features
and its own class predictions, and both predictions are trained. Networks of other random seeds turn
out better or worse, and make other errors: the best few, averaged, beat the best one.

Equations:
    eq. 1 (loss)                            train_instance: loss = loss_3d + loss_2d + loss_l2
    W = w + W_cb + W_ep                     error_weights, edge_weights
    figure 2, top (network)                 Hybrid, 10,267,022 parameters
    Network training (windows)              Windows, 828 in an epoch
    Network training (augmentation)         augment
    Validation and performance metrics      emseg.scores: miou, miou_org
    Validation ... (rival networks)         SameUNet3D, DeepVess, emseg.UNet, DeepLabV3
    ensembles; table 1                      mean_prediction, ensemble; table_1
    figure 4 (peaks of all instances)       python evaluate.py --runs RUN/seed*

Differences from the paper:
    1. The elastic map is uniform noise of +-20 pixels every 40 pixels, smoothed (authors' code);
       the printed "mean 20" would be a shift. Images are sampled bilinearly, labels and weights at
       the nearest pixel.
    2. Logits have no ReLU, and the pyramid is given logits, not probabilities; all transposed
       convolutions are 1x2x2 and keep z. (The authors' code differs in both.)
    3. Reflections are done; the authors' code discards them.
    4. Eq. 1 is printed as a mean over the N = 438,080 voxels of a window; the authors' code sums
       over them and halves the squares. The printed lambdas and Adam's epsilon belong to that sum:
       here the loss is a mean (over annotated voxels), each lambda is divided by 2 N and epsilon
       by N, which trains alike. --l2-2d 2e-5 --l2-3d 1e-5 --l2-p 1e-9 is eq. 1 to the letter; it
       outweighs the data for most weights and empties the deep levels within 100 steps.
    5. The paper takes W from a file, and its code says how an edge is weighted, not which edges
       were. Here each class is one side of an edge and all others are the other; W_cb is 1 for the
       rarest class; borders of a slice are no edges.
    6. Windows reach beyond the volume by what a network's output is smaller than its input, where
       they are mirrored. Predicted windows are blended; the authors' code takes each voxel from the
       window in whose middle it is.
    7. What the paper leaves open for rivals (rate, windows) is marked in SETTINGS. Their L2 terms
       have lambda_P in the last layer, else lambda_2D. DeepVess's windows are its own, 7 x 33 x 33.
       "Deeplab + DRN" is read as DeepLabv3 on the dilated residual network DRN-D-54.
    8. Each volume is normalised by its own mean and spread, as in the paper, but in 256 grey
       levels: what lies beyond 3.2 deviations is clipped.

Run:
    GPU    python train_2d3d.py --volume train.tif --label train_label.tif --val-volume eval.tif \\
               --val-label eval_label.tif --test-volume test.tif --test-label test_label.tif \\
               --test-ignore-label 0 --organelles 2 3 4 5 6 --instances 26 --top-k 4
    CPU    python train_2d3d.py --demo

Expect:
    GPU    not run
    CPU    two instances, test MIoU(all) 0.452 and 0.530, their ensemble 0.511; 3 minutes, one core
    Rivals and ablations on fly neuropil: python tests/replicate.py 2d3d ensemble; there the mean of
    four small U-Nets has a test IoU of mitochondria of 0.723 +- 0.027 (3 seeds), the best one 0.685
    +- 0.033; 8 to 22 minutes on one thread
"""

import argparse
import json
import math
import sys
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace

import emseg                            # before torch, see there
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# The printed lambdas and Adam's epsilon are for a loss summed over a window's voxels, whose squares
# are halved; these are for its mean.
VOXELS = 5 * 296 * 296                  # that a window predicts
LAMBDAS = dict(l2_2d=10**-4.7 / (2 * VOXELS), l2_3d=1e-5 / (2 * VOXELS), l2_p=1e-9 / (2 * VOXELS))
EPSILON = 1e-7 / VOXELS
# Of each model (Network training; authors' code). Not in the paper: spacing and rate of the rivals
# (unet: the authors'; unet3d-thin, deeplab-*: such that they give its number of steps), epochs of
# unet3d-thick, batch and spacing of deepvess, "others".
COMMON = dict(epochs=40, lr=1e-3, batch_size=1, **LAMBDAS)
SETTINGS = {
    "2d3d": dict(patch_size=[5, 300, 300], spacing=[2, 100, 100]),
    "unet": dict(patch_size=[572, 572], spacing=[1, 80, 80], epochs=100, lr=10**-3.3,
                 l2_2d=1e-5 / (2 * 388**2)),
    "unet3d-thin": dict(patch_size=[5, 300, 300], spacing=[4, 102, 102], epochs=100),
    "unet3d-thick": dict(patch_size=[16, 180, 180], spacing=[4, 120, 120], epochs=100),
    "deeplab": dict(patch_size=[572, 572], spacing=[2, 115, 115]),
    "deepvess": dict(patch_size=[7, 33, 33], spacing=[2, 20, 20], batch_size=64),
    "others": dict(patch_size=[320, 320], spacing=[1, 100, 100]),
}
STOP_EPOCH = 10                         # by when an instance must reach --stop-miou
CONVOLUTIONS = nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d


# -- networks --------------------------------------------------------------------------------------


def conv_block(channels, depths):
    """Convolution + ReLU for each step of channels (in, ..., out), on (B, C, Z, H, W); depths: of
    each kernel, 3 for 3x3x3 or 1 for 1x3x3."""
    layers = []
    for c_in, c_out, depth in zip(channels, channels[1:], depths):
        layers += [emseg.Conv3d(c_in, c_out) if depth == 3
                   else emseg.BySlice(nn.Conv2d(c_in, c_out, 3, padding=1)),
                   nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def pointwise(c_in, c_out):
    """A 1x1x1 convolution."""
    return emseg.BySlice(nn.Conv2d(c_in, c_out, 1))


def upsample(c_in, c_out):
    """A 1x2x2 transposed convolution that doubles y and x."""
    return emseg.BySlice(nn.ConvTranspose2d(c_in, c_out, 2, stride=2))


class Hybrid(nn.Module):
    """2D-3D+3x3x3 (figure 2, top): 10,267,022 parameters at 1 input and 7 output channels.

    (B, in_channels, Z, H, W) -> logits (B, out_channels, Z, H - 4, W - 4) for sides of 4 + a
    multiple of 8, of which two pixels are lost on each side: 300 -> 296. width: filters of the
    first convolution, 32 in the paper. No normalisation; a ReLU follows every convolution but the
    transposed ones and those that predict.

    volumetric=False has 1x3x3 convolutions in the encoder-decoder (9,916,238); pyramid=False ends
    with the 2D predictions (7,882,311). With both=True the result is (3D logits, 2D logits), the
    first of them None without a pyramid.
    """

    dims, stride, offset, margin, min_depth = 3, 8, 4, 2, 1

    def __init__(self, in_channels, out_channels, width=None, volumetric=True, pyramid=True):
        super().__init__()
        w, first = width or 32, 3 if volumetric else 1
        self.encoder = nn.ModuleList([
            conv_block((in_channels, w, 2 * w, 2 * w), (first, 1, 1)),
            conv_block((2 * w, 2 * w, 4 * w, 4 * w), (first, 1, 1)),
            conv_block((4 * w, 8 * w, 8 * w), (1, 1)),
            conv_block((8 * w, 16 * w, 16 * w), (1, 1))])
        self.pool = emseg.BySlice(nn.MaxPool2d(2))
        self.up = nn.ModuleList([upsample(16 * w, 8 * w), upsample(8 * w, 2 * w),
                                 upsample(4 * w, w)])
        self.decoder = nn.ModuleList([
            conv_block((16 * w, 8 * w, 8 * w), (1, 1)),
            conv_block((6 * w, 2 * w, 4 * w, 4 * w), (first, 1, 1)),
            conv_block((3 * w, w, 2 * w, 2 * w), (first, 1, 1))])
        self.predict_2d = pointwise(2 * w, out_channels)
        self.has_pyramid = pyramid
        if pyramid:
            seen = 2 * w + out_channels
            self.scale_0 = conv_block((seen, *[2 * w] * 3), (3, 3, 3))
            self.scale_1 = conv_block((seen, *[4 * w] * 5), (3,) * 5)
            self.narrow = nn.Sequential(pointwise(4 * w, 2 * w), nn.ReLU(inplace=True))
            self.enlarge = upsample(2 * w, 2 * w)
            self.predict_3d = pointwise(2 * w, out_channels)

    def forward(self, x, both=False):
        skips = []
        for block in self.encoder:
            x = block(self.pool(x) if skips else x)
            skips.append(x)
        skips.pop()
        for up, block in zip(self.up, self.decoder):
            x = up(x)
            x = block(torch.cat([emseg.crop_like(skips.pop(), x), x], dim=1))
        logits_2d = self.predict_2d(x)
        if not self.has_pyramid:
            return (None, logits_2d) if both else logits_2d
        x = torch.cat([x, logits_2d], dim=1)
        x = self.scale_0(x) + self.enlarge(self.narrow(self.scale_1(self.pool(x))))
        logits_3d = self.predict_3d(x)
        return (logits_3d, logits_2d) if both else logits_3d


class SameUNet3D(nn.Module):
    """3D U-Net (Cicek 2016) with padded convolutions, three in a block, on three scales.

    (B, in_channels, Z, H, W) -> logits (B, out_channels, Z, H - 2 margin, W - 2 margin) for sides
    that are multiples of 4. width: filters of the first block, 64 by default (not in paper). thick:
    z is pooled too, and held at the last slice up to a multiple of 4; otherwise two pixels of each
    side are cut off, as from 2D-3D networks: 300 -> 296.
    """

    dims, stride, offset = 3, 4, 0

    def __init__(self, in_channels, out_channels, width=None, thick=False):
        super().__init__()
        w = width or 64
        self.thick = thick
        self.margin, self.min_depth = (0, 4) if thick else (2, 1)
        self.encoder = nn.ModuleList(
            conv_block((c_in, c, c, c), (3, 3, 3))
            for c_in, c in ((in_channels, w), (w, 2 * w), (2 * w, 4 * w)))
        self.pool = nn.MaxPool3d(2) if thick else emseg.BySlice(nn.MaxPool2d(2))
        self.up = nn.ModuleList(
            nn.ConvTranspose3d(2 * c, c, 2, stride=2) if thick else upsample(2 * c, c)
            for c in (2 * w, w))
        self.decoder = nn.ModuleList(conv_block((2 * c, c, c, c), (3, 3, 3)) for c in (2 * w, w))
        self.head = pointwise(w, out_channels)

    def forward(self, x):
        Z, H, W = x.shape[2:]
        if self.thick and Z % 4:
            x = torch.cat([x, x[:, :, -1:].expand(-1, -1, -Z % 4, -1, -1)], dim=2)
        skips = []
        for block in self.encoder:
            x = block(self.pool(x) if skips else x)
            skips.append(x)
        skips.pop()
        for up, block in zip(self.up, self.decoder):
            x = block(torch.cat([skips.pop(), up(x)], dim=1))
        m = self.margin
        return self.head(x[:, :, :Z, m : H - m, m : W - m])


class DeepVess(nn.Module):
    """DeepVess (Haft-Javaherian 2019): 1,930,479 parameters at 1 input and 7 output channels.

    (B, in_channels, Z, H, W) -> logits (B, out_channels, Z - 6, H - 28, W - 28): each block of
    5 x 5 pixels of the result is seen by itself, in a window of 7 x 33 x 33 and through two fully
    connected layers. Sides are 3 + a multiple of 5. width: filters of the first convolutions, 32
    there; the hidden layer has 32 times as many (1024).
    """

    dims, stride, offset, margin, min_depth, depth_margin = 3, 5, 3, 14, 7, 3
    tile = 100, 100                     # sides of a prediction that fit into memory together

    def __init__(self, in_channels, out_channels, width=None):
        super().__init__()
        w = width or 32
        self.out_channels = out_channels
        steps = [(in_channels, w, 3), (w, w, 3), (w, w, 3), (w, 2 * w, 1), (2 * w, 2 * w, 1)]
        self.convolutions = nn.ModuleList(nn.Conv3d(c_in, c_out, (depth, 3, 3))
                                          for c_in, c_out, depth in steps)
        self.hidden, self.dropout = nn.Linear(2 * w * 25, 32 * w), nn.Dropout()
        self.head = nn.Linear(32 * w, 25 * out_channels)

    def forward(self, x):
        windows = x.unfold(2, 7, 1).unfold(3, 33, 5).unfold(4, 33, 5)   # (B, C, z, h, w, 7, 33, 33)
        B, C, z, h, w = windows.shape[:5]
        x = windows.permute(0, 2, 3, 4, 1, 5, 6, 7).reshape(-1, C, 7, 33, 33)
        for number, convolution in enumerate(self.convolutions):
            x = convolution(x).relu()
            if number in (2, 4):
                x = F.max_pool3d(x, (1, 2, 2), ceil_mode=True)          # 27 -> 14, 10 -> 5
        x = self.head(self.dropout(self.hidden(x.flatten(1)).relu()))
        x = x.view(B, z, h, w, self.out_channels, 5, 5)
        return x.permute(0, 4, 1, 2, 5, 3, 6).reshape(B, self.out_channels, z, 5 * h, 5 * w)


MODELS = {**emseg.NETWORKS, "2d3d": Hybrid, "2d3d-no-3x3x3": partial(Hybrid, volumetric=False),
          "2d3d-no-multiloss": Hybrid, "2d3d-no-pyramid": partial(Hybrid, pyramid=False),
          "2d3d-no-3d": partial(Hybrid, volumetric=False, pyramid=False),       # not in paper
          "unet": partial(emseg.UNet, levels=5, norm=None, padding=0),      # 572 -> 388 pixels
          "unet3d-thin": SameUNet3D, "unet3d-thick": partial(SameUNet3D, thick=True),
          "deepvess": DeepVess}


def make_network(args):
    """A network of the command line or of a checkpoint's; convolutions have Glorot's weights."""
    network = MODELS[args.model](1, emseg.out_channels(args.classes), args.width)
    return network.apply(partial(emseg.glorot_initialization, kinds=CONVOLUTIONS))


def l2_terms(network, args):
    """The last three terms of eq. 1, the sum of lambda ||theta||^2 over all parameters: a scalar.

    Theta_2D is the encoder-decoder (and all of a rival), Theta_3D the pyramid; layers called
    predict, head or score have lambda_P.
    """
    groups = {}                             # one long vector each: a GPU takes few steps
    for name, parameter in network.named_parameters():
        factor = (args.l2_p if name.startswith(("predict", "head", "score")) else
                  args.l2_3d if name.startswith(("scale", "narrow", "enlarge")) else args.l2_2d)
        groups.setdefault(factor, []).append(parameter.flatten())
    return sum(factor * torch.cat(group).square().sum() for factor, group in groups.items())


# -- weights ---------------------------------------------------------------------------------------


def edge_weights(label, device="cpu"):
    """W_ep of a slice before it is scaled: class ids (H, W) -> float32 (H, W).

    The authors' recipe: heat flows into each class from all voxels of other classes, which are held
    at 1; it fades by 2 % a step, and what is above 0.2 in the end is the weight: high along edges
    and in small cross-sections. Nothing flows over the border or from unannotated voxels (IGNORE).
    """
    label = torch.as_tensor(label, device=device)
    known = label != emseg.IGNORE
    kernel = torch.tensor([[1.0, 2.0, 1.0], [2.0, 0.0, 2.0], [1.0, 2.0, 1.0]], device=device) / 12

    def neighbours(x):
        return F.conv2d((x * known)[None, None], kernel[None, None], padding=1)[0, 0]

    share = neighbours(torch.ones_like(label, dtype=torch.float32))
    weight = torch.zeros_like(share)
    for k in label[known].unique():
        source = known & (label != k)
        heat = source.float()
        for _ in range(50):
            heat = 0.98 * (heat + 0.2 * (neighbours(heat) - share * heat))
            heat[source] = 1
        weight += (heat - 0.2).clamp(min=0) * (label == k)
    return weight.cpu().numpy()


def error_weights(train, args, device):
    """W = w + W_cb + W_ep (eq. 1) of every training volume, as the network sees it: float32 arrays
    (Z, Y, X) in memory, 0 where nobody annotated."""
    w, balance, edge = args.weight_terms
    weights = [np.zeros(item.target.shape, np.float32) for item in train]
    counts, highest = np.zeros(256, int), 0.0
    for item, weight in zip(train, weights):
        for z in item.slices:
            weight[z] = edge_weights(item.target[z], device)
            counts += np.bincount(item.target[z].ravel(), minlength=256)
            highest = max(highest, float(weight[z].max()))
    counts = counts[: len(args.classes)]
    table = np.zeros(256, np.float32)
    table[: len(counts)] = w + balance * counts[counts > 0].min() / np.maximum(counts, 1)     # W_cb
    scale = edge / highest if highest else 0.0
    for item, weight in zip(train, weights):
        for z in item.slices:
            label = item.target[z]
            weight[z] = (table[label] + scale * weight[z]) * (label != emseg.IGNORE)
    return weights


# -- windows ---------------------------------------------------------------------------------------


class Windows(torch.utils.data.Dataset):
    """Windows whose corners are jittered in the bins of a grid, shuffled, again and again.

    train: Items. size: of the network's output (Z, Y, X), on which the corners lie; margin: voxels
    by which its input is larger on each side, (z, yx); reach: pixels more in y and x, for elastic
    deformation. args.spacing: sides of a bin, in each of which one window of an epoch begins. A
    window without an annotated slice moves so that the nearest one is at a random place in it.
    Beyond a volume windows are mirrored.

    Item i is `image, label, weight, corner`: uint8 (Z + 2 z, Y + 2 yx + 2 reach, X + ...), uint8
    and float32 without the margin in z, and the int64 corner (y, x) in the output. It depends on
    (seed, i) alone; every len() items in a row are one pass. weights: W of each volume, set before
    items are drawn. Raises InputError where a window does not fit.
    """

    def __init__(self, train, network, args):
        emseg.check_patch_size(network, args.patch_size, args.model)
        self.images, self.labels, self.slices = zip(*[(item.image, item.target, item.slices)
                                                      for item in train])
        self.weights, self.seed, self.reach = None, args.seed, math.ceil(args.elastic)
        self.margin = getattr(network, "depth_margin", 0), network.margin
        depth = args.patch_size[0] if network.dims == 3 else 1
        self.size = [depth - 2 * self.margin[0],
                     *(side - 2 * self.margin[1] for side in args.patch_size[-2:])]
        bins = []                                       # volume, then first corner and sides, z y x
        for v, (image, zs) in enumerate(zip(self.images, self.slices)):
            if any(own > side for own, side in zip(self.size, image.shape)):
                raise emseg.InputError(
                    f"{image.path}: windows that predict {emseg.format_shape(self.size)} voxels do "
                    f"not fit into {emseg.format_shape(image.shape)}, as the network sees them; "
                    f"give a smaller --patch-size or --downsample")
            if not len(zs):
                continue
            highest = np.array(image.shape) - self.size
            ends = np.clip(sorted((int(zs[0]), int(zs[-1]) + 1 - self.size[0])), 0, highest[0])
            low, high = np.array([ends[0], 0, 0]), np.array([ends[1], *highest[1:]])
            edges = [np.arange(a, b + 1, s) for a, b, s in zip(low, high, args.spacing)]
            grid = np.stack(np.meshgrid(*edges, indexing="ij"), -1).reshape(-1, 3)
            sides = np.minimum(grid + args.spacing, high + 1) - grid
            bins.append(np.column_stack([np.full(len(grid), v), grid, sides]))
        self.bins = np.concatenate(bins)
        self.drawn = None, None                         # number of a pass, its corners

    def __len__(self):
        return len(self.bins)

    def corners(self, number):
        """(len, 5) of a pass: volume, z, y, x, in the order in which they are drawn, and the place
        in the window that the nearest annotated slice takes if the window has to move."""
        if self.drawn[0] != number:
            rng = np.random.default_rng((self.seed, number))
            bins = rng.permutation(self.bins)
            corners = bins[:, 1:4] + (rng.random((len(bins), 3)) * bins[:, 4:]).astype(int)
            places = rng.integers(self.size[0], size=len(bins))
            self.drawn = number, np.column_stack([bins[:, 0], corners, places])
        return self.drawn[1]

    def __getitem__(self, index):
        number, row = divmod(index, len(self))
        v, z, y, x, place = self.corners(number)[row].tolist()
        (depth, h, w), (m_z, m), r = self.size, self.margin, self.reach
        zs = self.slices[v]
        nearest = int(zs[np.abs(zs - (z + depth // 2)).argmin()])
        if not z <= nearest < z + depth:
            z = min(max(nearest - place, 0), len(self.images[v]) - depth)
        box = (y - m - r, y + h + m + r), (x - m - r, x + w + m + r)
        image = mirrored(self.images[v], (z - m_z, z + depth + m_z), *box)
        label, weight = [mirrored(arrays[v], (z, z + depth), *box)
                         for arrays in (self.labels, self.weights)]
        return *map(torch.from_numpy, (image, label, weight)), torch.tensor([y, x])


def mirrored(array, *box):
    """array[z0:z1, y0:y1, x0:x1], mirrored beyond its borders."""
    inside = tuple(slice(max(a, 0), b) for a, b in box)
    beyond = [(max(-a, 0), max(b - side, 0)) for (a, b), side in zip(box, array.shape)]
    return np.pad(array[inside], beyond, mode="symmetric")


# -- augmentation ----------------------------------------------------------------------------------


def elastic_map(args, windows, epoch, device):
    """The displacement of an epoch (Network training): (H, W, 2) in pixels, x and y.

    One map for all slices, windows and processes. H, W: of the largest volume, with the margin.
    """
    state = np.random.SeedSequence((args.seed, epoch, 20))
    torch.manual_seed(int(state.generate_state(1)[0]))          # Run.steps seeds each step anew
    size = [max(image.shape[axis] for image in windows.images) + 2 * windows.margin[1]
            for axis in (1, 2)]
    field = emseg.elastic_displacement(1, size, device, amplitude=args.elastic)[0]
    return field.clamp_(-windows.reach, windows.reach)


def augment(batch, windows, field, normalization, args):
    """Deform, reflect, brighten a batch of Windows: image (B, 1, Z, H, W), label, weight (B, ...).

    label int64 and weight float32 have the size of the network's output. field: see elastic_map.
    Reflections along each axis; brightness +-12 % of the grey range, then contrast +-20 %.
    """
    image, label, weight, corner = batch
    B, (h, w), m, r = len(image), windows.size[1:], windows.margin[1], windows.reach
    H, W = h + 2 * m, w + 2 * m
    device = image.device
    y, x = torch.arange(H, device=device), torch.arange(W, device=device)
    rows, columns = corner[:, :1] + y, corner[:, 1:] + x
    place = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1) + float(r)     # (H, W, 2)
    place = place + field[rows[:, :, None], columns[:, None]]                       # (B, H, W, 2)
    sides = torch.linspace(W + 2 * r, H + 2 * r, 2, device=device)      # both, made there
    grid = (2 * place + 1) / sides - 1
    flips = torch.rand(B, 3, 1, 1, 1, device=device) < (0.5 if args.reflect else 0)
    for axis in (0, 1):
        grid = torch.where(flips[:, axis], grid.flip(axis + 1), grid)
    image = emseg.warp(image, grid, "bilinear")
    depth, inner = label.shape[1], grid[:, m : H - m, m : W - m]
    both = emseg.warp(torch.cat([label.float(), weight], dim=1), inner, "nearest")
    image, label, weight = [torch.where(flips[:, 2], stack.flip(1), stack)
                            for stack in (image, both[:, :depth].long(), both[:, depth:])]
    image = emseg.normalize(image, normalization)
    shift, factor = torch.rand(2, B, 1, 1, 1, 1, device=device) * 2 - 1
    image = image + args.brightness * shift * 255 / normalization["std"]
    return image * (1 + args.contrast * factor), label, weight


# -- instances -------------------------------------------------------------------------------------


def predict_with(run, args, network, normalization, image):
    """uint8 slices, or the window of a 3D network -> probabilities (B, C, H, W) of a network that
    was trained with these arguments."""
    sides = [side - 2 * network.margin for side in args.patch_size[-2:]]
    return emseg.predict(run, network, image, partial(emseg.normalize, normalization=normalization),
                     tile=getattr(network, "tile", sides))


def slices_at_once(*members):
    """What a prediction must see together, options of emseg.validate and predict_all: windows as
    deep as the deepest of all members (their args and network)."""
    margins = {getattr(member.network, "depth_margin", 0) for member in members}
    if len(margins) > 1:
        raise emseg.InputError("--ensemble: deepvess averages with itself only")
    if margins != {0}:
        return {"context": 2 * margins.pop() + 1}
    return {"depth": max(member.args.patch_size[0] if member.network.dims == 3 else 0
                         for member in members)}


class Member:
    """A finished run (a folder): name, args, best validation MIoU, used slices and mean test
    scores; its network is loaded when it predicts. Raises InputError where it sees other grey
    levels, or has other classes, than `run`."""

    def __init__(self, run, path, name):
        self.run, self.path, self.name = run, path, name
        checkpoint, report = emseg.load_checkpoint(path), Path(path) / "metrics.json"
        self.args = argparse.Namespace(**checkpoint["args"])
        for key in ("classes", "normalize", "downsample"):
            own, others = getattr(self.args, key), getattr(run.args, key)
            if own != others:
                raise emseg.InputError(f"{path}: its {emseg.flag_name(key)} is {own}, that of the "
                                       f"other instances {others}")
        self.best, self.used = checkpoint["best"], checkpoint["used"]
        self.normalization = checkpoint["normalization"]
        self.mean = json.loads(report.read_text())["mean"] if report.exists() else None

    @cached_property
    def network(self):
        network = self.run.prepare(make_network(self.args))
        emseg.load_weights(network, emseg.load_checkpoint(self.path), "network", self.path)
        return network

    def predict(self, image):
        return predict_with(self.run, self.args, self.network, self.normalization, image)


def mean_prediction(members, image):
    """Mean of the members' probabilities."""
    return sum(member.predict(image) for member in members) / len(members)


def ensemble(run, folders, test, val):
    """Predict with the best instances together (their mean), score and print table 1.

    folders: of finished runs; val: Items on which the top 1, 2, … of these are scored.
    """
    args = run.args
    members = [Member(run, *each) for each in zip(folders, emseg.unique_names(folders))]
    if args.top_k and None in [member.best for member in members]:
        raise emseg.InputError("--top-k: the instances were not validated, so none is known to be "
                               "better; give --val-volume or --val-slices when they are trained")
    members.sort(key=lambda member: -(member.best or 0))
    chosen = members[: args.top_k]
    top = {k: emseg.validate(run, partial(mean_prediction, chosen[:k]), val,
                             organelles=args.organelles, **slices_at_once(*chosen[:k]))
           for k in range(1, len(chosen) + 1) if val}
    run.used, run.best = [place for member in chosen for place in member.used], chosen[0].best
    test = [emseg.drop_used_slices(item, run.used) for item in test]
    paths = emseg.predict_all(run, partial(mean_prediction, chosen), test,
                              **slices_at_once(*chosen))
    instances = {member.name: {"model": member.args.model, "seed": member.args.seed,
                               "val_miou": member.best, "mean": member.mean} for member in members}
    table = run.path("table.md")                # noted first, so that report lists it
    content = emseg.report(
        run, test, paths, sum(emseg.count_parameters(member.network) for member in chosen),
        organelles=args.organelles, instances=instances,
        ensemble={"members": [member.name for member in chosen], "top": top})
    if run.rank == 0:
        rows = {f"top {k}": (scores, None) for k, scores in top.items()}
        rows[f"top {len(chosen)}"] = top.get(len(chosen)), content["mean"]
        rows |= {f"{each['model']} {name}": (each, each["mean"])
                 for name, each in instances.items()}
        emseg.write_text(table, table_1(rows) + "\n")
        emseg.print0(table_1(rows))


def table_1(rows):
    """The paper's table 1 as Markdown; rows: {name: (validation scores, test scores)}, each a block
    or None."""
    cells = [["", "eval MIoU(all)", "eval MIoU(org)", "test MIoU(all)", "test MIoU(org)"]]
    for name, (val, test) in rows.items():
        values = [(val or {}).get("val_miou"), (val or {}).get("val_miou_org"),
                  (test or {}).get("miou"), (test or {}).get("miou_org")]
        cells.append([name, *("" if value is None else f"{value:.4f}" for value in values)])
    return emseg.markdown(cells)


# -- the command -----------------------------------------------------------------------------------


def settings_of(model):
    """COMMON and the SETTINGS of a model; those of "2d3d" also for "2d3d-no-3d"."""
    own = [name for name in SETTINGS if f"{model}-".startswith(f"{name}-")] or ["others"]
    return {**COMMON, **SETTINGS[own[0]]}


def parse_args(argv=None):
    parser = emseg.Parser(__file__, __doc__)
    own = "default: the model's, see SETTINGS in the script"
    emseg.add_common_args(parser, MODELS, sources={
        "model": "2d3d is 2D-3D+3x3x3", "epochs": own, "lr": own, "batch_size": own,
        "patch_size": f"of the network's input; {own}", "normalize": "paper: volume",
        "width": "2d3d: 32; of unet3d-* not in paper",
        "steps_per_epoch": "default: each window once"})
    method = parser.add_argument_group("method (Guay 2021)").add_argument
    method("--spacing", type=emseg.positive(int), nargs=3, metavar=("Z", "Y", "X"),
           help=f"of the corners of windows ({own})")
    method("--instances", type=emseg.positive(int), default=1, metavar="N",
           help="networks to train, with seeds --seed, --seed + 1, … (paper: 26)")
    method("--top-k", type=emseg.positive(int), metavar="K",
           help="average the K instances with the highest validation MIoU; default: all "
           "(paper: 4)")
    method("--ensemble", nargs="+", metavar="RUN", default=[],
           help="folders of finished runs: predict --test-volume with their average, no training")
    method("--weight-terms", type=emseg.nonnegative, nargs=3, default=[0.01, 1.0, 25.0],
           metavar=("w", "CB", "EP"), help="w, and the highest W_cb and W_ep (w: paper; the "
           "others: authors' code)")
    method("--organelles", type=emseg.positive(int), nargs="+", metavar="ID",
           help="class ids of MIoU(org) (paper: 2 3 4 5 6)")
    method("--test-ignore-label", type=int, metavar="V",
           help="value in the test labels of what nobody annotated, where only some cells are")
    method("--elastic", type=emseg.nonnegative, default=20.0, metavar="PX",
           help="highest elastic displacement, in pixels as the network sees them; 0: none")
    method("--reflect", action=argparse.BooleanOptionalAction, default=True,
           help="random reflections in z, y and x")
    method("--brightness", type=emseg.nonnegative, default=0.12, metavar="F",
           help="random shift, +- this share of the grey range (Network training)")
    method("--contrast", type=emseg.nonnegative, default=0.2, metavar="F",
           help="random factor 1 +- this (Network training)")
    method("--c-2d", type=emseg.nonnegative, default=0.33, metavar="C", help="c_2D of eq. 1")
    for name, of in (("l2_2d", "the encoder-decoder"), ("l2_3d", "the pyramid"),
                     ("l2_p", "the layers that predict")):
        method(emseg.flag_name(name), type=emseg.nonnegative, metavar="L",
               help=f"lambda of eq. 1 of {of}, for a mean loss; default {LAMBDAS[name]:.2g}")
    method("--decay-steps", type=emseg.positive(int), default=round(10**3.4), metavar="N",
           help="after which the rate falls to 3/4; 10^3.4, Network training")
    method("--stop-miou", type=emseg.share, default=0.3, metavar="M",
           help=f"validation MIoU that an instance must reach within {STOP_EPOCH} epochs, else its "
           "training ends (Network training)")
    parser.set_defaults(model="2d3d", normalize="volume")
    demo = dict(width=8, patch_size=[3, 44, 44], spacing=[2, 8, 8], epochs=5, steps_per_epoch=120,
                lr=3e-3, decay_steps=200, downsample=4, instances=2, top_k=2, elastic=2.0,
                brightness=0.03, contrast=0.1, weight_terms=[0.5, 0.5, 0.5], val_slices="24:30",
                organelles=[1, 2], label_map="2=1,3=2,*=0",
                classes=["background", "nucleus", "mitochondrion"])
    quick = dict(model="unet5", width=16, patch_size=[64, 64], spacing=[1, 32, 32], epochs=5,
                 steps_per_epoch=50, batch_size=16, lr=2e-3, decay_steps=200, downsample=4,
                 elastic=2.0, brightness=0.03, contrast=0.1, weight_terms=[0.5, 0.5, 0.5])
    runs = parser.parse_args(argv).ensemble
    if runs:            # as if --checkpoint were given: the first run says how all see the volumes
        argv = [*(sys.argv[1:] if argv is None else argv), "--checkpoint", runs[0]]
    args = emseg.parse(
        parser, argv, demo, quick, lambda args: settings_of(args.model), of_prediction=(
            "organelles", "test_ignore_label",
            *(("ensemble", "top_k", "val_volume", "val_label") if runs else ())))
    count = len(args.ensemble) or args.instances
    if args.top_k and args.top_k > count:
        parser.error(f"--top-k {args.top_k}: there are {count} instances")
    if args.top_k and not (args.checkpoint or args.val_volume or args.val_slices):
        parser.error("--top-k needs --val-volume or --val-slices, which tell the better instances")
    return args


def open_data(run):
    """(train, val, test): Items of the command line, noted in the run."""
    args = run.args
    if args.demo:
        emseg.write_demo(run, shape=(30, 256, 256))
    train, val = emseg.open_training(args)
    run.used += emseg.used_slices(train + val)
    test = emseg.open_test(args, run.used, train)
    emseg.describe_data(args, train=train, validate=val, test=test)
    emseg.check_annotation(train, args)
    with torch.device("meta"):
        Windows(train, make_network(args), args)    # raises what is wrong before a folder is made
    if args.organelles and max(args.organelles) >= len(args.classes):
        raise emseg.InputError(f"--organelles {max(args.organelles)}: class ids run from 0 to "
                               f"{len(args.classes) - 1}")
    return train, val, test


def train_instance(args):
    """One network: a complete run, or a prediction with --checkpoint."""
    # run folder, seed, device
    run = emseg.Run(args, __file__)
    if run.finished:
        return
    if args.checkpoint:
        network = run.load(make_network(args))
        return finish(run, network, emseg.open_test(args, run.used))

    # data
    train, val, test = open_data(run)
    run.normalization = emseg.measure_normalization(train, args.normalize)

    # networks
    network = run.prepare(make_network(args))
    windows = Windows(train, network, args)
    predict = partial(predict_with, run, args, network, run.normalization)
    at_once = slices_at_once(SimpleNamespace(network=network, args=args))

    # optimiser
    optimizer = torch.optim.Adam(network.parameters(), lr=args.lr, eps=EPSILON,
                                 betas=(1 - 10**-1.5, 1 - 10**-2.1))
    c_2d = 0.0 if args.model == "2d3d-no-multiloss" else args.c_2d

    # train
    run.begin(args.steps_per_epoch or math.ceil(len(windows) / args.batch_size), network=network,
              optimizer=optimizer)
    windows.weights = error_weights(train, args, run.device)
    batches = run.batches(windows, args.batch_size)
    for epoch in run.epochs():
        if epoch >= STOP_EPOCH and run.best is not None and run.best < args.stop_miou:
            emseg.print0(f"no validation MIoU of {args.stop_miou:g} in {epoch} epochs; given up")
            break
        network.train()
        field = elastic_map(args, windows, epoch, run.device)
        for step in run.steps(epoch):
            lr = args.lr * 0.75 ** (step // args.decay_steps)
            image, label, weight = augment(next(batches), windows, field, run.normalization, args)
            if network.dims == 2:
                image, label, weight = image[:, :, 0], label[:, 0], weight[:, 0]
            with run.autocast():                        # the prediction of a rival counts as 3D
                logits_3d, logits_2d = (network(image, both=True) if isinstance(network, Hybrid)
                                        else (network(image), None))
            loss_3d = loss_2d = image.new_zeros(())
            if logits_3d is not None:
                loss_3d = emseg.cross_entropy(logits_3d, label, weight)
            if logits_2d is not None and c_2d:
                loss_2d = c_2d * emseg.cross_entropy(logits_2d, label, weight)
            loss_l2 = l2_terms(network, args)
            loss = loss_3d + loss_2d + loss_l2                                      # eq. 1
            run.update(loss, lr, (network, optimizer))
            run.log(lr=lr, loss=loss, loss_3d=loss_3d, loss_2d=loss_2d, loss_l2=loss_l2)
        run.end_epoch(emseg.validate(run, predict, val, organelles=args.organelles, **at_once),
                      metric="val_miou")

    # predict and evaluate
    run.use_best(network)
    finish(run, network, test)


def finish(run, network, test):
    """Predict the test volumes and score the predictions."""
    member = SimpleNamespace(network=network, args=run.args)
    predict = partial(predict_with, run, run.args, network, run.normalization)
    paths = emseg.predict_all(run, predict, test, **slices_at_once(member))
    emseg.report(run, test, paths, emseg.count_parameters(network), organelles=run.args.organelles)


@emseg.command
def main(args):
    if args.instances == 1 and not args.ensemble:
        return train_instance(args)
    run = emseg.Run(args, __file__)
    if run.finished:
        return
    if args.ensemble:
        val = emseg.open_items(args.val_volume, args.val_label, args)
        return ensemble(run, args.ensemble, emseg.open_test(args, []), val)      # drops used slices
    _, val, test = open_data(run)
    folders = []
    for seed in range(args.seed, args.seed + args.instances):
        child = run.args_of(f"seed{seed}", seed=seed, instances=1, top_k=None)
        train_instance(child)
        folders.append(child.out_dir)
    ensemble(run, folders, test, val)


if __name__ == "__main__":
    main(parse_args())
