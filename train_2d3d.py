"""2D-3D networks: a 2D encoder-decoder that looks at neighbouring slices, in ensembles.

Guay MD, Emam ZAS, Anderson AB, Aronova MA, Pokrovskaya ID, Storrie B, Leapman RD (2021). Dense
cellular segmentation for EM using 2D-3D neural network ensembles. Scientific Reports 11, 2561.
doi:10.1038/s41598-021-81590-0

Every voxel of a platelet gets one of seven classes. A 2D U-Net runs over the slices of a thin
window, helped by 3x3x3 convolutions at both ends; a small 3D spatial pyramid then sees its features
and its own class predictions, and both predictions are trained. Networks of other random seeds turn
out better or worse, and make other errors: the best few, averaged, beat the best one.

Equations:
    eq. 1 (loss)                            main: loss = loss_3d + loss_2d + loss_l2
    W = w + W_cb + W_ep                     voxel_weights, edge_weights
    figure 2, top (network)                 Hybrid, 10,267,022 parameters
    Network training (windows)              Windows, 828 in an epoch
    Network training (augmentation)         augment
    Validation and performance metrics      emseg.scores: miou, miou_org
    Validation ... (rival networks)         SameUNet3D, DeepVess, emseg.UNet, DeepLabV3
    ensembles                               see_ensemble, ensemble
    figure 2, bottom; figure 4; table 1     save_instances, emseg.save_histogram, table_1

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
    6. Windows overlap by a third or more and are blended, in validation and prediction alike; the
       authors' code takes each voxel from the window in whose middle it is.
    7. What the paper leaves open for rivals (rate, windows) is marked in SETTINGS. Their L2 terms
       have lambda_P in the last layer, else lambda_2D. DeepVess's windows are its own, 7 x 33 x 33.
       "Deeplab + DRN" is read as DeepLabv3 on the dilated residual network DRN-D-54.
    8. Windows reach beyond the volume by what a network's output is smaller than its input, where
       they are mirrored: every voxel is trained on.
    9. Each volume is normalised by its own mean and spread, as in the paper, but in 256 grey
       levels: what lies beyond 3.2 deviations is clipped, and before that, of other than 8-bit
       data, what lies beyond the 0.1 and 99.9 percentiles.

Small components are not removed from predictions: the paper tried, and it did not help (Results).

Run:
    GPU    python train_2d3d.py --volume train.tif --label train_label.tif --val-volume eval.tif \\
               --val-label eval_label.tif --test-volume test.tif --test-label test_label.tif \\
               --test-ignore-label 0 --organelles 2 3 4 5 6 --instances 26 --top-k 4
    CPU    python train_2d3d.py --demo

Expect:
    GPU    not run
    CPU    two instances, test MIoU(all) 0.452 and 0.530, their ensemble 0.511; seeds 0 and 1, 177 s
           on one core without bf16
    Fly neuropil, five classes at 18 nm (command in the README), width 8, 2000 steps of 5 x 64 x 64
    voxels, seeds 0 and 1, test MIoU(all) of each and of their ensemble: 2d3d 0.380, 0.432, 0.420;
    2d3d-no-3x3x3 0.511, 0.424, 0.498; 2d3d-no-pyramid 0.365, 0.414, 0.392; unet 0.592, 0.620,
    0.638; unet3d-thin 0.326, 0.337, 0.339. 14 to 39 minutes for two and 1.1 GiB, one CPU thread
    beside other work. All but unet are far from done. (Measured with an epsilon of 1e-7 for the
    mean loss, see 4.)
"""

import argparse
import copy
import json
import math
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import emseg

# Windows, spacing, epochs and rate of a model (Network training; authors' code). Not in the paper:
# spacing and rate of the rivals, but those of unet3d-thin and deeplab-* give the number of training
# steps that it reports, those of unet are the authors'; batch and spacing of deepvess; "others".
SETTINGS = {
    "2d3d": dict(patch_size=[5, 300, 300], spacing=[2, 100, 100], epochs=40, lr=1e-3, batch_size=1),
    "unet": dict(patch_size=[572, 572], spacing=[1, 80, 80], epochs=100, lr=10**-3.3, batch_size=1,
                 l2_2d=1e-5 / (2 * 388**2)),
    "unet3d-thin": dict(patch_size=[5, 300, 300], spacing=[4, 102, 102], epochs=100, lr=1e-3,
                        batch_size=1),
    "unet3d-thick": dict(patch_size=[16, 180, 180], spacing=[4, 120, 120], epochs=100, lr=1e-3,
                         batch_size=1),
    "deeplab": dict(patch_size=[572, 572], spacing=[2, 115, 115], epochs=40, lr=1e-3, batch_size=1),
    "deepvess": dict(patch_size=[7, 33, 33], spacing=[2, 20, 20], epochs=40, lr=1e-3,
                     batch_size=64),
    "others": dict(patch_size=[320, 320], spacing=[1, 100, 100], epochs=40, lr=1e-3, batch_size=1),
}
# The printed lambdas and Adam's epsilon are for a loss summed over a window's voxels, whose squares
# are halved; these are for its mean.
VOXELS = 5 * 296 * 296                  # that a window predicts
LAMBDAS = dict(l2_2d=10**-4.7 / (2 * VOXELS), l2_3d=1e-5 / (2 * VOXELS), l2_p=1e-9 / (2 * VOXELS))
EPSILON = 1e-7 / VOXELS
CONVOLUTIONS = nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d
OVERLAP = 1 / 3                         # of the windows of a prediction, in every axis


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


def no_3x3x3(in_channels, out_channels, width=None):
    """The ablation without 3x3x3 convolutions in the encoder-decoder: 9,916,238 parameters."""
    return Hybrid(in_channels, out_channels, width, volumetric=False)


def no_pyramid(in_channels, out_channels, width=None):
    """The ablation without the 3D spatial pyramid: 7,882,311 parameters."""
    return Hybrid(in_channels, out_channels, width, pyramid=False)


def original_unet(in_channels, out_channels, width=None):
    """The U-Net of Ronneberger 2015, 572 -> 388 pixels: 31,030,983 parameters."""
    return emseg.UNet(in_channels, out_channels, width, levels=5, norm=None, padding=0)


def thick_unet3d(in_channels, out_channels, width=None):
    """The 3D U-Net whose pooling halves z too."""
    return SameUNet3D(in_channels, out_channels, width, thick=True)


MODELS = {**emseg.NETWORKS, "2d3d": Hybrid, "2d3d-no-3x3x3": no_3x3x3, "2d3d-no-multiloss": Hybrid,
          "2d3d-no-pyramid": no_pyramid, "unet": original_unet, "unet3d-thin": SameUNet3D,
          "unet3d-thick": thick_unet3d, "deepvess": DeepVess}


def logits_of(network, image):
    """What eq. 1 compares with the truth: (3D logits or None, 2D logits or None).

    A network with one prediction counts as 3D: that its term has the factor 1 is all that says.
    """
    return network(image, both=True) if isinstance(network, Hybrid) else (network(image), None)


def l2_terms(network, args):
    """The last three terms of eq. 1, the sum of lambda ||theta||^2 over all parameters: a scalar.

    Theta_2D is the encoder-decoder (and all of a rival), Theta_3D the pyramid, the layers that
    predict have lambda_P.
    """
    total = 0.0
    for name, parameter in network.named_parameters():
        if name.startswith(("predict", "head", "score")):
            factor = args.l2_p
        elif name.startswith(("scale", "narrow", "enlarge")):
            factor = args.l2_3d
        else:
            factor = args.l2_2d
        total = total + factor * parameter.square().sum()
    return total


# -- weights ---------------------------------------------------------------------------------------

# The diffusion recipe of the authors' code: steps, share that is kept in a step, share that
# diffuses, threshold; the share of each neighbour by its place in y and x.
STEPS, KEEP, RATE, THRESHOLD = 50, 0.98, 0.2, 0.2
SHARES = {(y, x): 1 / 12 if y and x else 1 / 6
          for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x}


def neighbours(slices, outside):
    """The eight neighbours of each pixel: [(share, tensor like slices (n, H, W))]; outside: the
    value beyond the border."""
    H, W = slices.shape[1:]
    padded = F.pad(slices, (1, 1, 1, 1), value=outside)
    return [(share, padded[:, 1 + y : 1 + y + H, 1 + x : 1 + x + W])
            for (y, x), share in SHARES.items()]


def edge_weights(label, device="cpu"):
    """W_ep before it is scaled: float32 (n, H, W) of class ids (n, H, W), each slice by itself.

    Heat flows into each class from all voxels of other classes, which are held at 1; it fades by
    2 % a step, and what is above a threshold in the end is the weight: high along edges and in
    small cross-sections. Unannotated voxels (IGNORE) and the border of a slice are neither warm nor
    cold.

    Every voxel exchanges heat with neighbours of its own class only, all others are at 1. So one
    field of cold = 1 - heat does for all classes, and is 0 wherever one looks across an edge.
    """
    label = torch.as_tensor(label, device=device).to(torch.int16)
    known = label != emseg.IGNORE
    kept, flows = torch.full(label.shape, KEEP, device=label.device), []
    for share, beside in neighbours(label, emseg.IGNORE):
        share *= KEEP * RATE
        kept -= share * (beside != emseg.IGNORE)
        flows.append(share * (known & (beside == label)))
    cold = torch.ones(label.shape, device=label.device)
    for _ in range(STEPS):
        new = 1 - KEEP + kept * cold
        for flow, (_, beside) in zip(flows, neighbours(cold, 0.0)):
            new.addcmul_(flow, beside)
        cold = new.clamp_(max=1)
    return ((1 - THRESHOLD - cold).clamp_(min=0) * known).cpu().numpy()


def voxel_weights(label, edges, class_weights, w):
    """W = w + W_cb + W_ep (eq. 1) of class ids: float32 (n, H, W), 0 where nobody annotated.

    edges: W_ep, scaled; class_weights: W_cb of each class.
    """
    table = np.zeros(256, np.float32)
    table[: len(class_weights)] = w + class_weights
    return (table[label] + edges) * (label != emseg.IGNORE)


class Weights(emseg.LazyArray):
    """W of a volume (eq. 1), lazy float32: see voxel_weights, whose `edges` are those of a file,
    times `scale`."""

    def __init__(self, label, edges, scale, class_weights, w):
        super().__init__(edges.path, label.shape, np.float32, label.voxel_size)
        self.label, self.edges, self.scale = label, edges, scale
        self.class_weights, self.w = class_weights, w

    def read(self, z, y, x):
        edges = self.edges.read(z, y, x) * self.scale
        return voxel_weights(self.label.read(z, y, x), edges, self.class_weights, self.w)


def training_weights(run, train):
    """W of every training volume, lazy arrays of the shapes that the network sees.

    W_ep is computed once for a run, by all processes together, into edges.tif (edges_NAME.tif of
    several volumes); weights.png shows W.
    """
    w, balance, edge = run.args.weight_terms
    counts = sum(np.bincount(item.target[z].ravel(), minlength=256)[: len(run.args.classes)]
                 for item in train for z in item.slices)
    class_weights = balance * counts[counts > 0].min() / np.maximum(counts, 1)          # W_cb
    paths = [run.folder / emseg.result_name("edges", item, train) for item in train]
    for item, path in zip(train, paths):
        if path.exists():                               # of a resumed run
            continue
        emseg.print0(f"weights of {item.volume.path}")
        output = run.path(path.name), item.target.shape, np.float32
        with emseg.writers_of(run, item, [output]) as (writer,):
            for slab in emseg.slabs(item.target.shape, 2**19)[run.rank :: run.world]:
                writer[slab] = edge_weights(item.target[slab], run.device)
    edges = [emseg.open_volume(path) for path in paths]
    highest = max(float(each[slab].max()) for each in edges
                  for slab in emseg.slabs(each.shape, 2**22))
    weights = [Weights(item.target, each, edge / highest if highest else 0.0, class_weights, w)
               for item, each in zip(train, edges)]
    if run.rank == 0:
        save_weights(run.path("weights.png"), train[0], weights[0], run.args.classes)
    return weights


def open_weights(path, item, args):
    """A file of --weights, at the resolution that the network sees. Raises InputError."""
    weights = emseg.open_volume(path)
    if weights.shape not in (item.volume.shape, item.image.shape):
        raise emseg.InputError(f"{path}: the weights have {emseg.format_shape(weights.shape)} "
                               f"voxels, {item.volume.path} "
                               f"{emseg.format_shape(item.volume.shape)}")
    if weights.shape == item.image.shape:
        return weights
    return emseg.downsample(weights, args.downsample, "mean")


# -- windows ---------------------------------------------------------------------------------------


class Windows(torch.utils.data.Dataset):
    """Windows whose corners are jittered in the bins of a grid, shuffled, again and again.

    images, labels: lazy uint8 arrays (Z, Y, X); slices: for each volume, the annotated z; size: of
    the network's output (Z, Y, X), on which the corners lie; margin: what its input has more on
    each side, (z, yx); reach: pixels more in y and x, for elastic deformation; spacing: sides of a
    bin, in each of which one window of an epoch begins. A window without an annotated slice moves
    so that the nearest one is at a random place in it. Beyond a volume windows are mirrored.

    Item i is `image, label, weight, corner`: uint8 (Z + 2 z, Y + 2 yx + 2 reach, X + ...), uint8
    and float32 without the margin in z, and the int64 corner (y, x) in the output. It depends on
    (seed, i) alone; each run of len() items is one pass. weights: set before items are drawn.
    Raises InputError where a window does not fit.
    """

    def __init__(self, images, labels, slices, size, margin, spacing, reach, seed):
        self.images, self.labels, self.slices = images, labels, slices
        self.size, self.margin, self.reach, self.seed = size, margin, reach, seed
        self.weights = None
        bins = []                                       # volume, then first corner and bin of z y x
        for v, (image, zs) in enumerate(zip(images, slices)):
            if not len(zs):
                continue
            check_window(image, size)
            highest = np.array(image.shape) - size
            ends = np.clip(sorted((int(zs[0]), int(zs[-1]) + 1 - size[0])), 0, highest[0])
            low, high = np.array([ends[0], 0, 0]), np.array([ends[1], *highest[1:]])
            edges = [np.arange(a, b + 1, s) for a, b, s in zip(low, high, spacing)]
            grid = np.stack(np.meshgrid(*edges, indexing="ij"), -1).reshape(-1, 3)
            widths = np.minimum(grid + spacing, high + 1) - grid
            bins.append(np.column_stack([np.full(len(grid), v), grid, widths]))
        self.bins = np.concatenate(bins)
        self.order = None, None                         # (seed, pass), its corners

    def __len__(self):
        return len(self.bins)

    def corners(self, passes):
        """(len, 5) of an epoch: volume, z, y, x, in the order in which they are drawn, and the
        place in the window of a slice to which it has to move."""
        if self.order[0] != (self.seed, passes):
            rng = np.random.default_rng((self.seed, passes))
            bins = rng.permutation(self.bins)
            corners = bins[:, 1:4] + (rng.random((len(bins), 3)) * bins[:, 4:]).astype(int)
            places = rng.integers(self.size[0], size=len(bins))
            self.order = (self.seed, passes), np.column_stack([bins[:, 0], corners, places])
        return self.order[1]

    def __getitem__(self, index):
        passes, place = divmod(index, len(self))
        v, z, y, x, place = self.corners(passes)[place].tolist()
        (depth, h, w), (m_z, m), r = self.size, self.margin, self.reach
        zs = self.slices[v]
        nearest = int(zs[np.abs(zs - (z + depth // 2)).argmin()])
        if not z <= nearest < z + depth:
            z = min(max(nearest - place, 0), len(self.images[v]) - depth)
        box = (y - m - r, y + h + m + r), (x - m - r, x + w + m + r)
        image = mirrored(self.images[v], (z - m_z, z + depth + m_z), *box)
        label, weight = [mirrored(arrays[v], (z, z + depth), *box)
                         for arrays in (self.labels, self.weights)]
        return (torch.from_numpy(image), torch.from_numpy(label),
                torch.from_numpy(np.asarray(weight, np.float32)), torch.tensor([y, x]))


def check_window(image, size):
    """Raise InputError where the output of a window does not fit into a training volume."""
    depth, *sides = image.shape
    if depth < size[0]:
        raise emseg.InputError(f"{image.path}: has {depth} slices, and a window predicts "
                               f"{size[0]}; give fewer in --patch-size, or a --model for single "
                               f"slices, such as unet")
    if any(s > side for s, side in zip(size[1:], sides)):
        raise emseg.InputError(f"{image.path}: windows that predict {emseg.format_shape(size[1:])} "
                               f"pixels do not fit into slices of {emseg.format_shape(sides)}, as "
                               f"the network sees them; give a smaller --patch-size")


def mirrored(array, *box):
    """array[z0:z1, y0:y1, x0:x1] of a lazy array, mirrored beyond its borders."""
    inside = [slice(max(a, 0), min(b, side)) for (a, b), side in zip(box, array.shape)]
    beyond = [(max(-a, 0), max(b - side, 0)) for (a, b), side in zip(box, array.shape)]
    return np.pad(array[tuple(inside)], beyond, mode="symmetric")


# -- augmentation ----------------------------------------------------------------------------------


def elastic_map(args, windows, epoch, device):
    """The displacement of an epoch (Network training): (H, W, 2) in pixels, x and y, or None.

    One map for all slices, windows and processes. H, W: of the largest volume, with the margin.
    """
    if not args.elastic:
        return None
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
    place = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1) + float(r)     # (H, W, 2)
    if field is None:
        place = place.expand(B, -1, -1, -1)
    else:
        rows, columns = corner[:, :1] + y, corner[:, 1:] + x
        place = place + field[rows[:, :, None], columns[:, None]]                   # (B, H, W, 2)
    grid = (2 * place + 1) / place.new_tensor([W + 2 * r, H + 2 * r]) - 1
    if args.reflect:
        flips = torch.rand(B, 3, 1, 1, 1, device=device) < 0.5
        for axis in (0, 1):
            grid = torch.where(flips[:, axis], grid.flip(axis + 1), grid)
    image = emseg.warp(image, grid, "bilinear")
    depth, inner = label.shape[1], grid[:, m : H - m, m : W - m]
    both = emseg.warp(torch.cat([label.float(), weight], dim=1), inner, "nearest")
    label, weight = both[:, :depth].long(), both[:, depth:]
    if args.reflect:
        image, label, weight = [torch.where(flips[:, 2], stack.flip(1), stack)
                                for stack in (image, label, weight)]
    image = emseg.normalize(image, normalization)
    shift, factor = torch.rand(2, B, 1, 1, 1, 1, device=device) * 2 - 1
    image = image + args.brightness * shift * 255 / normalization["std"]
    return image * (1 + args.contrast * factor), label, weight


# -- instances -------------------------------------------------------------------------------------


def load_members(run, paths):
    """The networks of finished runs (folders, or their best.pt), for prediction: copies of `run`,
    each with its own name, network, arguments and grey levels. Raises InputError where they differ
    in what they see or in their classes."""
    members = []
    for path in paths:
        checkpoint = emseg.load_checkpoint(path)
        own = argparse.Namespace(**{**checkpoint["args"], "tta": run.args.tta})
        for name in ("classes", "normalize", "downsample"):
            if vars(own)[name] != vars(run.args)[name]:
                raise emseg.InputError(f"{path}: its {emseg.flag_name(name)} is {vars(own)[name]}, "
                                       f"that of the other instances {vars(run.args)[name]}")
        member = copy.copy(run)
        member.args, member.normalization = own, checkpoint["normalization"]
        member.checkpoint, member.best = checkpoint, checkpoint["best"]
        folder = Path(path) if os.path.isdir(path) else Path(path).parent
        member.name, member.report = folder.resolve().name, report_of(folder)
        member.network = member.load(make_network(own))
        members.append(member)
    return members


def report_of(folder):
    """The metrics.json of a run, or {}."""
    path = Path(folder) / "metrics.json"
    return json.loads(path.read_text()) if path.exists() else {}


def see(member, image):
    """uint8 slices, or the window of a 3D network -> probabilities (B, C, H, W) of an instance."""
    network, sides = member.network, member.args.patch_size[-2:]
    tile = getattr(network, "tile", [side - 2 * network.margin for side in sides])
    return emseg.see(member, network, image, tile=tile)


@torch.inference_mode()
def see_ensemble(members, image):
    """Mean of the members' probabilities."""
    first, *others = members
    total = see(first, image)
    for member in others:
        total += see(member, image)
    return total.div_(len(members))


def slices_at_once(*members):
    """What a prediction must see together: options of emseg.validate and predict_all. Windows as
    deep as the deepest do for all members. Raises InputError for DeepVess beside others."""
    margins = {getattr(member.network, "depth_margin", 0) for member in members}
    depths = [member.args.patch_size[0] for member in members if member.network.dims == 3]
    if len(margins) > 1:
        raise emseg.InputError("--ensemble: deepvess averages with itself only")
    if margins != {0}:
        return {"context": 2 * margins.pop() + 1}
    return {"depth": max(depths)} if depths else {}


def choose_best(peaks, top_k):
    """Names of the top_k instances (all, if None) by peak validation MIoU {name: value or None}."""
    if top_k and None in peaks.values():
        raise emseg.InputError("--top-k: the instances were not validated, so none is known to be "
                               "better; give --val-volume or --val-slices when they are trained")
    return sorted(peaks, key=lambda name: -(peaks[name] or 0))[:top_k]


def ensemble(run, folders, test, val):
    """Predict with the best instances together (their mean), score, draw and print table 1.

    folders: of finished runs; val: Items on which the top 1, 2, … of them are scored.
    """
    peaks = {folder: emseg.load_checkpoint(folder)["best"] for folder in folders}
    chosen, ranked = choose_best(peaks, run.args.top_k), choose_best(peaks, None)
    organelles = run.args.organelles
    evals, members = {}, []
    for k, folder in enumerate(ranked if val else [], 1):
        members += load_members(run, [folder])
        evals[k] = emseg.validate(run, partial(see_ensemble, members), val, organelles=organelles,
                                  **slices_at_once(*members))
    members = load_members(run, chosen)
    run.used = [place for member in members for place in member.checkpoint["used"]]
    run.best = peaks[chosen[0]]
    test = [emseg.drop_used_slices(item, run.used) for item in test]
    paths = emseg.predict_all(run, partial(see_ensemble, members), test, **slices_at_once(*members))
    every = {member.name: member for member in load_members(run, ranked)}
    blocks = {name: {"model": member.args.model, "seed": member.args.seed, "val_miou": member.best,
                     "member": name in {m.name for m in members},
                     "mean": member.report.get("mean")} for name, member in every.items()}
    content = emseg.report(
        run, test, paths, sum(emseg.count_parameters(member.network) for member in members),
        organelles=organelles, instances=blocks,
        ensemble={"members": [member.name for member in members],
                  "top": {k: {key.removeprefix("val_"): value for key, value in block.items()}
                          for k, block in evals.items()}})
    if run.rank:
        return
    rows = {f"top {k}": {"eval": {"miou": block["val_miou"], "miou_org": block.get("val_miou_org")},
                         "test": content["mean"] if k == len(members) else None}
            for k, block in evals.items()} or {f"ensemble of {len(members)}":
                                               {"test": content["mean"]}}
    rows |= {f"{block['model']} {name}": {"eval": {"miou": block["val_miou"]},
                                          "test": block["mean"]} for name, block in blocks.items()}
    table = table_1(rows, bool(organelles))
    emseg.write_text(run.path("table.md"), table + "\n")
    emseg.print0(table)
    draw_instances(run, test, paths, content, every)


def table_1(rows, has_organelles):
    """The paper's table 1 as Markdown; rows: {name: {"eval": block or None, "test": ...}}."""
    def shown(block, key):
        value = (block or {}).get(key)
        return "" if value is None else f"{value:.4f}"

    columns = [(kind, key) for kind in ("eval", "test") for key in ("miou", "miou_org")
               if has_organelles or key == "miou"]
    heads = [f"{kind} MIoU({'all' if key == 'miou' else 'org'})" for kind, key in columns]
    lines = [f"| | {' | '.join(heads)} |", f"| --- |{' --- |' * len(heads)}"]
    for name, row in rows.items():
        lines.append(f"| {name} | "
                     f"{' | '.join(shown(row.get(kind), key) for kind, key in columns)} |")
    return "\n".join(lines)


def draw_instances(run, test, paths, content, every):
    """histogram.png (figure 4), and instances.png of every labelled volume (figure 2, bottom)."""
    groups = {}
    for member in every.values():
        if member.best is not None:
            groups.setdefault(member.args.model, []).append(member.best)
    if groups:
        emseg.save_histogram(run.path("histogram.png"), {"": groups}, "peak validation MIoU(all)")
    score = "miou_org" if run.args.organelles else "miou"
    for item, path, entry in zip(test, paths, content["volumes"]):
        if item.label is None:
            continue
        shown = {}
        for name, member in every.items():
            for own in member.report.get("volumes", []):
                if own["volume"] == item.volume.path and own.get(score) is not None:
                    shown[name] = own["prediction"], own[score]
        name = emseg.result_name("instances", item, test).replace(".tif", ".png")
        save_instances(run.path(name), item, (path, entry[score]), shown,
                       content["ensemble"]["members"], run.args.classes)


# -- figures ---------------------------------------------------------------------------------------


def save_weights(path, item, weights, classes):
    """weights.png: image, label, w + W_cb, W_ep and W of a volume's middle annotated slice."""
    z = int(item.slices[len(item.slices) // 2])
    grey, ids, total = item.image[z], item.target[z], weights[z]
    edges = weights.edges[z] * weights.scale * (ids != emseg.IGNORE)
    figure = emseg.new_figure(figsize=(15, 3.6), dpi=120)
    axes = figure.subplots(1, 5)
    axes[0].imshow(grey, cmap="gray", vmin=0, vmax=255)
    axes[1].imshow(emseg.class_overlay(grey, ids, classes))
    for axis, title, array in zip(axes, (f"image  z = {z}", "label", "$w + W_{cb}$", "$W_{ep}$",
                                         "$W$"), (None, None, total - edges, edges, total)):
        axis.set_title(title)
        axis.set_axis_off()
        if array is not None:
            shown = axis.imshow(array, cmap="magma", norm="asinh" if title == "$W$" else "linear")
            figure.colorbar(shown, ax=axis, shrink=0.8)
    emseg.save_figure(figure, path)


def save_instances(path, item, ensemble, instances, members, classes,
                   colors=emseg.CLASS_COLORS):
    """instances.png: image, truth and ensemble, below them the instances (figure 2, bottom).

    ensemble, instances: (path, score) and {name: (path, score)}; a score is MIoU(org) where it was
    asked for, else MIoU(all). members: names of those that were averaged. The slice is the
    annotated one with the most foreground.
    """
    def panel(prediction):
        return emseg.class_overlay(grey, emseg.open_volume(str(prediction))[z], classes, colors)

    def titled(name, score):
        return name if score is None else f"{name}  {score:.3f}"

    zs = item.label.slices[:: max(1, len(item.label.slices) // 16)]
    share = [np.isin(item.label[z], (0, emseg.IGNORE), invert=True).mean() for z in zs]
    z = zs[int(np.argmax(share))]
    grey = emseg.as_uint8(item.volume)[z]
    top = [(f"{Path(item.volume.path).name}  z = {z}", emseg.overlay(grey, [], [])),
           ("truth", emseg.class_overlay(grey, item.label[z], classes, colors)),
           (titled("ensemble", ensemble[1]), panel(ensemble[0]))]
    shown = [(titled(name, score) + ("" if name in members else "  (not averaged)"), panel(file))
             for name, (file, score) in instances.items()]
    columns = max(3, min(4, len(shown)))
    rows = 1 + math.ceil(len(shown) / columns)
    height = 3.2 * min(1.6, grey.shape[0] / grey.shape[1]) + 0.2
    figure = emseg.new_figure(figsize=(3.2 * columns, height * rows + 0.3), dpi=120)
    axes = figure.subplots(rows, columns, squeeze=False)
    places = [*zip(axes[0], top), *zip(axes[1:].flat, shown)]
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (title, picture) in places:
        axis.set_title(title, fontsize=9)
        axis.imshow(picture, interpolation="antialiased")
    emseg.legend(figure, classes, False, colors)
    emseg.save_figure(figure, path)


# -- the command -----------------------------------------------------------------------------------


def settings_of(model):
    """The entry of SETTINGS for a model."""
    for name in SETTINGS:
        if model == name or model.startswith(f"{name}-"):
            return SETTINGS[name]
    return SETTINGS["others"]


def parse_args(argv=None):
    flag = argparse.BooleanOptionalAction
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
    method("--weights", nargs="+", metavar="P", default=[],
           help="files of W, one for each training volume, in place of those computed")
    method("--weight-terms", type=emseg.nonnegative, nargs=3, default=[0.01, 1.0, 25.0],
           metavar=("w", "CB", "EP"), help="w, and the highest W_cb and W_ep (w: paper; the "
           "others: authors' code)")
    method("--organelles", type=emseg.positive(int), nargs="+", metavar="ID",
           help="class ids of MIoU(org) (paper: 2 3 4 5 6)")
    method("--test-ignore-label", type=int, metavar="V",
           help="value in the test labels of what nobody annotated, where only some cells are")
    method("--elastic", type=emseg.nonnegative, default=20.0, metavar="PX",
           help="highest elastic displacement, in pixels as the network sees them; 0: none")
    method("--reflect", action=flag, default=True, help="random reflections in z, y and x")
    method("--brightness", type=emseg.nonnegative, default=0.12, metavar="F",
           help="random shift, +- this share of the grey range (Network training)")
    method("--contrast", type=emseg.nonnegative, default=0.2, metavar="F", help="random factor 1 +- this "
           "(Network training)")
    method("--c-2d", type=emseg.nonnegative, default=0.33, metavar="C", help="c_2D of eq. 1")
    for name, of in (("l2_2d", "the encoder-decoder"), ("l2_3d", "the pyramid"),
                     ("l2_p", "the layers that predict")):
        method(emseg.flag_name(name), type=emseg.nonnegative, metavar="L",
               help=f"lambda of eq. 1 of {of}, for a mean loss; default {LAMBDAS[name]:.2g}")
    method("--decay", type=emseg.number(float, 1e-12, 1), default=0.75, metavar="D",
           help="factor of the rate every --decay-steps steps (Network training)")
    method("--decay-steps", type=emseg.positive(int), default=round(10**3.4), metavar="N",
           help="10^3.4, Network training")
    method("--stop-miou", type=emseg.share, default=0.3, metavar="M",
           help="validation MIoU that an instance must reach (Network training)")
    method("--stop-epoch", type=emseg.positive(int), default=10, metavar="N",
           help="within so many epochs, else its training ends (Network training)")
    parser.set_defaults(model="2d3d", normalize="volume")
    demo = dict(width=8, patch_size=[3, 44, 44], spacing=[2, 8, 8], epochs=5, steps_per_epoch=120,
                lr=3e-3, decay_steps=200, downsample=4, instances=2, top_k=2, elastic=2.0,
                brightness=0.03, contrast=0.1, weight_terms=[0.5, 0.5, 0.5], val_slices="24:30",
                organelles=[1, 2], label_map="2=1,3=2,*=0",
                classes=["background", "nucleus", "mitochondrion"])
    ensemble = parser.parse_args(argv).ensemble
    if ensemble:                                # the first run says how all see the volumes
        argv = [*(sys.argv[1:] if argv is None else argv), "--checkpoint", ensemble[0]]
    args = emseg.parse(
        parser, argv, demo, settings=lambda args: {**LAMBDAS, **settings_of(args.model)},
        of_prediction=("ensemble", "top_k", "organelles", "test_ignore_label", "val_volume",
                       "val_label"))
    if args.unlabeled_volume:
        parser.error("--unlabeled-volume: this method learns from labels only; leave it out")
    if args.weights and len(args.weights) != len(args.volume) and not args.checkpoint:
        parser.error(f"--weights has {len(args.weights)} and --volume {len(args.volume)} paths; "
                     f"give one for each volume")
    if not any(args.weight_terms):
        parser.error("--weight-terms must not all be 0")
    if args.top_k and args.top_k > (len(args.ensemble) or args.instances):
        parser.error(f"--top-k {args.top_k}: there are {len(args.ensemble) or args.instances} "
                     f"instances")
    return args


def make_network(args):
    """A network of the command line, or of a checkpoint's, with Glorot's weights."""
    network = MODELS[args.model](1, emseg.out_channels(args.classes), args.width)
    return network.apply(partial(emseg.glorot_initialization, kinds=CONVOLUTIONS))


def make_windows(args, train, network):
    """Windows of the training volumes for a network. Raises InputError."""
    emseg.check_patch_size(network, args.patch_size, args.model)
    depth = args.patch_size[0] if network.dims == 3 else 1
    margin = getattr(network, "depth_margin", 0), network.margin
    size = [depth - 2 * margin[0], *(side - 2 * margin[1] for side in args.patch_size[-2:])]
    images, targets, slices = zip(*[(item.image, item.target, item.slices) for item in train])
    return Windows(images, targets, slices, size, margin, args.spacing, math.ceil(args.elastic),
                   args.seed)


def failed_to_start(history, args):
    """Whether a network that has not reached --stop-miou by --stop-epoch is given up (Network
    training)."""
    return len(history) >= args.stop_epoch and max(history) < args.stop_miou


def open_data(run):
    """(train, val, test): Items of the command line, noted in the run."""
    args = run.args
    train, val = emseg.open_training(args)
    run.used = emseg.used_slices(train + val)
    test = emseg.open_test(args, run.used, train)
    emseg.check_annotation(train, args)
    if args.organelles and max(args.organelles) >= len(args.classes):
        raise emseg.InputError(f"--organelles {max(args.organelles)}: class ids run from 0 to "
                               f"{len(args.classes) - 1}")
    return train, val, test


def train(args, weights=None):
    """One instance: a complete run. weights: W of the training volumes, where they are known."""
    # run folder, seed, device
    run = emseg.Run(args, __file__)
    if run.finished:
        return
    if args.demo:
        emseg.write_demo(run, shape=(30, 256, 256))

    # data
    training, val, test = open_data(run)
    emseg.describe_data(args, train=training, validate=val, test=test)
    run.normalization = emseg.measure_normalization(
        [item.image for item in training], [item.slices for item in training], args.normalize)

    # networks
    run.network = network = run.prepare(make_network(args))
    at_once, predict = slices_at_once(run), partial(see, run)

    # optimiser
    windows = make_windows(args, training, network)
    optimizer = torch.optim.Adam(network.parameters(), lr=args.lr, eps=EPSILON,
                                 betas=(1 - 10**-1.5, 1 - 10**-2.1))
    c_2d = 0.0 if args.model == "2d3d-no-multiloss" else args.c_2d

    # train
    run.begin(args.steps_per_epoch or math.ceil(len(windows) / args.batch_size), network=network,
              optimizer=optimizer)
    windows.weights = weights or given_weights(args, training) or training_weights(run, training)
    batches = run.batches(windows, args.batch_size)
    for epoch in run.epochs():
        if failed_to_start(run.history, args):
            emseg.print0(f"no validation MIoU of {args.stop_miou:g} in {epoch} epochs; given up")
            break
        network.train()
        field = elastic_map(args, windows, epoch, run.device)
        for step in run.steps(epoch):
            lr = args.lr * args.decay ** (step // args.decay_steps)
            image, label, weight = augment(next(batches), windows, field, run.normalization, args)
            if network.dims == 2:
                image, label, weight = image[:, :, 0], label[:, 0], weight[:, 0]
            with run.autocast():
                logits_3d, logits_2d = logits_of(network, image)
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
    run.use_best(network=network)
    finish(run, test)


def given_weights(args, train):
    """The files of --weights, or []."""
    return [open_weights(path, item, args) for path, item in zip(args.weights, train)]


def finish(run, test):
    """Predict the test volumes and score the predictions."""
    paths = emseg.predict_all(run, partial(see, run), test, **slices_at_once(run))
    emseg.report(run, test, paths, emseg.count_parameters(run.network),
                 organelles=run.args.organelles)


@emseg.command
def main(args):
    if args.instances == 1 and not args.ensemble and not args.checkpoint:
        return train(args)
    run = emseg.Run(args, __file__)
    if args.ensemble:
        val = emseg.open_items(args.val_volume, args.val_label, args, require_foreground=False)
        return ensemble(run, args.ensemble, emseg.open_test(args, []), val)
    if args.checkpoint:
        run.network = run.load(make_network(args))
        return finish(run, emseg.open_test(args, run.used))
    if args.demo:
        emseg.write_demo(run, shape=(30, 256, 256))
    training, val, test = open_data(run)
    run.create()
    weights = given_weights(args, training) or training_weights(run, training)
    folders = []
    for seed in range(args.seed, args.seed + args.instances):
        child = run.args_of(f"seed{seed}", seed=seed, instances=1, top_k=None)
        train(child, weights)
        folders.append(child.out_dir)
    ensemble(run, folders, test, val)


if __name__ == "__main__":
    main(parse_args())
