"""Inference, metrics, figures: tiles against whole slices, scores by hand, pixels of pictures."""

import contextlib
import csv
import functools
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from scipy import ndimage
from torch import nn

import emseg
from conftest import InMemory

IGNORE = emseg.IGNORE
CLASSES = ["background", "a", "b"]


class Writer:
    """Collects slabs as a VolumeWriter does; written counts how often each slice came."""

    def __init__(self, shape):
        self.array, self.written = np.zeros(shape), np.zeros(shape[0], int)

    def __setitem__(self, slab, values):
        assert values.shape == self.array[slab].shape
        self.array[slab], self.dtype = values, values.dtype
        self.written[slab] += 1


class Pointwise(nn.Module):
    """Returns its input without the margin; refuses sides that these numbers do not allow."""

    def __init__(self, stride=1, offset=0, margin=0):
        super().__init__()
        self.stride, self.offset, self.margin = stride, offset, margin
        self.sides = []

    def forward(self, x):
        H, W = x.shape[-2:]
        assert H % self.stride == W % self.stride == self.offset
        self.sides.append((H, W))
        m = self.margin
        return x[..., m : H - m, m : W - m]


class Filter(Pointwise):
    """A valid convolution of 5 x 5, margin 2."""

    def __init__(self, channels=1, **options):
        super().__init__(margin=2, **options)
        self.kernel = random_image(channels, 1, 5, 5) / 5

    def forward(self, x):
        super().forward(x)
        return F.conv2d(x, self.kernel)


def random_image(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_ids(shape, n=3, ignore=0.0, seed=0):
    rng = np.random.default_rng(seed)
    return np.where(rng.random(shape) < ignore, IGNORE, rng.integers(0, n, shape)).astype(np.uint8)


# -- tiles


@pytest.mark.parametrize("tile", [4, 12, 64, 1024])
@pytest.mark.parametrize("overlap", [0.25, 0.5, 0.75])
def test_tiles_cover_all_and_overlap_as_asked(tile, overlap):
    for side in [*range(tile + 1, tile + 100), 9 * tile + 5]:
        starts = emseg.tile_starts(side, tile, overlap)
        steps = np.diff(starts)
        assert starts[0] == 0 and starts[-1] == side - tile
        assert 0 < steps.min() and steps.max() <= tile * (1 - overlap)
        assert np.ptp(steps) <= 1
        fewer = len(starts) - 2
        assert fewer == 0 or (side - tile) / fewer > tile * (1 - overlap)   # no tile too many


@pytest.mark.parametrize("side", [1, 7, 8])
def test_one_tile_suffices_for_a_short_side(side):
    assert emseg.tile_starts(side, 8) == [0]


def test_default_overlap_is_a_quarter():
    assert emseg.OVERLAP == 0.25 and emseg.tile_starts(14, 8) == [0, 6]


@pytest.mark.parametrize("size", [(8, 12), (7, 5), (1, 1024), (9,), (4, 7, 6)])
def test_blending_window_peaks_in_the_centre_and_is_never_zero(size):
    window = emseg.blending_window(*size, device=torch.device("cpu"))
    assert window.shape == size and window.dtype == torch.float32 and window.min() > 0
    sines = [np.sin(np.pi * (np.arange(n) + 0.5) / n) ** 2 for n in size]
    wanted = functools.reduce(np.multiply.outer, sines)
    np.testing.assert_allclose(window, wanted, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("pads", [(2, 3, 4, 1), (0, 7, 5, 0), (9, 9, 0, 0), (0, 0, 3, 10),
                                  (0, 8, 0, 0), (7, 0, 6, 6), (0, 0, 7, 0)])
@pytest.mark.parametrize("front", [(2, 1), (2, 3, 4), (1, 1, 1)])
def test_mirror_pad_against_numpy(pads, front):
    image = random_image(*front, 8, 7)
    top, bottom, left, right = pads
    mode = "reflect" if max(top, bottom) < 8 and max(left, right) < 7 else "edge"
    wanted = np.pad(image, (*[(0, 0)] * len(front), (top, bottom), (left, right)), mode=mode)
    np.testing.assert_array_equal(emseg.mirror_pad(image, *pads), wanted)


SIZES = [(7, 9), (1, 1), (3, 40), (40, 3), (16, 16), (17, 16), (50, 70)]


@pytest.mark.parametrize("numbers", [(1, 0, 0), (8, 0, 0), (8, 4, 10)])
@pytest.mark.parametrize("size", SIZES)
def test_pointwise_network_is_applied_to_every_pixel(size, numbers):
    network, image = Pointwise(*numbers), random_image(2, 1, *size)
    prob = emseg.predict_slices(network, image, max_tile=(16, 16))
    assert prob.dtype == torch.float32
    torch.testing.assert_close(prob, image.sigmoid(), atol=1e-6, rtol=1e-5)
    limit = emseg.network_side(network, 16) + 2 * network.margin
    assert max(max(sides) for sides in network.sides) <= limit
    assert (len(network.sides) > 1) == (max(size) > limit - 2 * network.margin)


@pytest.mark.parametrize("front", [(1, 1), (1, 1, 3)])
def test_slices_up_to_the_largest_tile_are_predicted_whole(front):
    network = Pointwise()
    emseg.predict_slices(network, random_image(*front, 20, 30), max_tile=(20, 30))
    assert network.sides == [(20, 30)]


def test_tiles_have_a_height_and_a_width_of_their_own():
    network, image = Pointwise(), random_image(1, 1, 20, 50)
    prob = emseg.predict_slices(network, image, max_tile=(24, 16))
    assert set(network.sides) == {(20, 16)} and len(network.sides) == 4
    torch.testing.assert_close(prob, image.sigmoid(), atol=1e-6, rtol=1e-5)
    network.sides.clear()
    emseg.predict_slices(network, image, max_tile=(12, 50))
    assert network.sides == [(12, 50)] * 2


def test_default_tile_is_read_when_it_is_needed(monkeypatch):
    network, image = Pointwise(), random_image(1, 1, 20, 30)
    assert emseg.MAX_TILE == 1024
    emseg.predict_slices(network, image)
    monkeypatch.setattr(emseg, "MAX_TILE", 16)
    emseg.predict_slices(network, image)
    emseg.predict_slices(network, image, None)
    assert network.sides == [(20, 30)] + [(16, 16)] * 12


def any_network(rng):
    """A Pointwise of any stride, offset and margin."""
    stride = int(rng.choice([1, 2, 3, 4, 8, 16]))
    return Pointwise(stride, int(rng.integers(stride)), int(rng.integers(0, 13)))


@pytest.mark.parametrize("front", [(1, 1), (2, 1), (1, 3), (1, 1, 2), (1, 2, 3)])
def test_any_tiling_gives_back_what_a_pointwise_network_sees(front):
    rng = np.random.default_rng(len(front) + sum(front))
    tiled = 0
    for number in range(60):
        network, (H, W) = any_network(rng), [int(side) for side in rng.integers(1, 90, 2)]
        tile = tuple(int(side) for side in rng.integers(1, 50, 2))
        overlap = float(rng.choice([0, 0.1, 0.25, 0.5, 0.9, 1.0]))
        image = random_image(*front, H, W, seed=number)
        prob = emseg.predict_slices(network, image, tile, overlap)
        wanted = image.sigmoid() if front[1] == 1 else image.softmax(1)
        assert prob.shape == image.shape
        torch.testing.assert_close(prob, wanted, atol=2e-6, rtol=1e-5, msg=lambda text: (
            f"{vars(network)} {H} x {W}, tiles {tile}, overlap {overlap}: {text}"))
        assert {*map(len, network.sides)} == {2} and len({*network.sides}) == 1
        tiled += len(network.sides) > 1
    assert tiled > 30


class Numbered(Pointwise):
    """The n-th call gives probability 1 to class n, of so many classes."""

    def __init__(self, classes, *numbers):
        super().__init__(*numbers)
        self.classes = classes

    def forward(self, x):
        inner = super().forward(x)
        logits = torch.full((len(x), self.classes, *inner.shape[2:]), -1e4)
        logits[:, len(self.sides) - 1] = 1e4
        return logits


def test_weights_of_all_tiles_sum_to_one_and_are_those_of_their_windows():
    rng = np.random.default_rng(0)
    for _ in range(60):
        numbers = vars(any_network(rng))
        numbers = numbers["stride"], numbers["offset"], numbers["margin"]
        H, W = [int(side) for side in rng.integers(20, 80, 2)]
        tile = [int(side) for side in rng.integers(8, 40, 2)]
        overlap = float(rng.choice([0, 0.25, 0.5]))
        sides = [emseg.network_side(Pointwise(*numbers), min(side, most))
                 for side, most in zip((H, W), tile)]
        starts = [(y, x) for y in emseg.tile_starts(H, sides[0], overlap)
                  for x in emseg.tile_starts(W, sides[1], overlap)]
        if len(starts) == 1:
            continue
        network = Numbered(len(starts), *numbers)
        share = emseg.predict_slices(network, random_image(1, 1, H, W), tile, overlap)[0].numpy()
        assert len(network.sides) == len(starts)
        np.testing.assert_allclose(share.sum(0), 1, atol=1e-5)
        window = np.multiply.outer(*[np.sin(np.pi * (np.arange(side) + 0.5) / side) ** 2
                                     for side in sides])
        wanted = np.zeros((len(starts), *[max(pair) for pair in zip(sides, (H, W))]))
        for weight, (y, x) in zip(wanted, starts):
            weight[y : y + sides[0], x : x + sides[1]] = window
        wanted = (wanted / wanted.sum(0))[:, :H, :W]
        np.testing.assert_allclose(share, wanted, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("max_tile", [None, (12, 16)])
@pytest.mark.parametrize("numbers", [(1, 0, 0), (8, 4, 10)])
def test_pointwise_network_is_applied_to_every_voxel(numbers, max_tile, channels):
    network, image = Pointwise(*numbers), random_image(2, channels, 3, 17, 40)
    prob = emseg.predict_slices(network, image, max_tile)
    assert prob.shape == image.shape and prob.dtype == torch.float32
    wanted = image.sigmoid() if channels == 1 else image.softmax(1)
    torch.testing.assert_close(prob, wanted, atol=1e-6, rtol=1e-5)
    assert (len(network.sides) > 1) == (max_tile is not None)


@pytest.mark.parametrize("max_tile", [None, (12, 16)])
def test_network_3d_equals_scipy_up_to_the_borders(max_tile):
    kernel, image = random_image(1, 1, 3, 5, 5) / 5, random_image(2, 1, 4, 17, 40, seed=1)

    class Filter3D(Pointwise):
        def forward(self, x):
            super().forward(x)
            return F.conv3d(x, kernel, padding=(1, 0, 0))

    prob = emseg.predict_slices(Filter3D(margin=2), image, max_tile)
    for found, volume in zip(prob, image):
        tall = F.pad(volume[0], (0, 0, 0, 0, 1, 1)).numpy()         # zeros below and above
        wanted = ndimage.correlate(tall, kernel[0, 0].numpy(), mode="mirror")[1:-1]
        np.testing.assert_allclose(found[0], 1 / (1 + np.exp(-wanted)), atol=1e-5)


@pytest.mark.parametrize("max_tile", [None, (16, 16)])
@pytest.mark.parametrize("stride, offset", [(1, 0), (4, 1)])
@pytest.mark.parametrize("size", [(20, 37), (50, 4), (3, 5)])
def test_margin_network_equals_scipy_up_to_the_borders(size, stride, offset, max_tile):
    network, image = Filter(stride=stride, offset=offset), random_image(1, 1, *size)
    prob = emseg.predict_slices(network, image, max_tile)
    mode = "nearest" if size == (3, 5) and stride == 4 else "mirror"    # too small to be mirrored
    wanted = ndimage.correlate(image[0, 0].numpy(), network.kernel[0, 0].numpy(), mode=mode)
    np.testing.assert_allclose(prob[0, 0], 1 / (1 + np.exp(-wanted)), atol=1e-5)


def test_slices_of_a_batch_and_channels_are_kept_apart():
    network, image = Filter(channels=3), random_image(3, 1, 30, 41)
    prob = emseg.predict_slices(network, image, max_tile=(16, 16))
    whole = emseg.predict_slices(network, image)
    assert prob.shape == (3, 3, 30, 41)
    torch.testing.assert_close(prob.sum(1), torch.ones(3, 30, 41))
    torch.testing.assert_close(prob, whole, atol=1e-5, rtol=1e-4)
    alone = [emseg.predict_slices(network, one[None], (16, 16)) for one in image]
    torch.testing.assert_close(prob, torch.cat(alone))


def test_blending_is_smooth_where_tiles_disagree():
    class Counter(Pointwise):
        def forward(self, x):
            super().forward(x)
            return torch.full_like(x, (-1.0) ** len(self.sides) * 20)       # 0, 1, 0, 1, ...

    prob = emseg.predict_slices(Counter(), torch.zeros(1, 1, 8, 112), (64, 64))[0, 0, 4]
    assert prob[:40].max() < 1e-3 and prob[-40:].min() > 1 - 1e-3
    assert 0 <= prob.diff().min() and prob.diff().max() < 0.15


def test_valid_unet_in_one_tile_sees_the_mirrored_slice():
    torch.manual_seed(0)
    network = emseg.UNet(1, 2, width=4, levels=3, norm=None, padding=0).eval()
    image, m = random_image(1, 1, 26, 40), network.margin
    H, W = [emseg.network_side(network, side) for side in (26, 40)]
    padded = np.pad(image, ((0, 0), (0, 0), (m, m + H - 26), (m, m + W - 40)), mode="reflect")
    with torch.no_grad():
        wanted = network(torch.from_numpy(padded)).softmax(1)[..., :26, :40]
        torch.testing.assert_close(emseg.predict_slices(network, image), wanted)


class WholeImage(Pointwise):
    """Adds the mean of all that it sees."""

    def __init__(self, dims=2, min_depth=1, **more):
        super().__init__(stride=4)
        self.dims, self.min_depth, self.tta = dims, min_depth, False
        vars(self).update(more)

    def forward(self, x):
        return super().forward(x) + x.mean((-2, -1), keepdim=True)


@pytest.mark.parametrize("sides", [(70, 100), (32, 48), (20, 48), (200, 30)])
def test_networks_that_see_the_whole_image_predict_tiles_of_the_size_of_their_crops(sides):
    image = torch.randint(0, 256, (2, *sides), dtype=torch.uint8)
    run = SimpleNamespace(args=SimpleNamespace(patch_size=[32, 48], tta=False), device="cpu",
                          data=SimpleNamespace(normalization={"mean": 128.0, "std": 50.0}),
                          autocast=contextlib.nullcontext)
    prepared = emseg.normalize(image, run.data.normalization)
    for network, tile, wanted in (
            (WholeImage(global_context=True), None, (32, 48)),
            (WholeImage(global_context=True), (16, 16), (16, 16)),
            (WholeImage(global_context=False), None, None), (WholeImage(), None, None)):
        found = emseg.Run.predict_slices(run, network, image, tile=tile)
        exact = emseg.predict_slices(WholeImage(), prepared, wanted)
        torch.testing.assert_close(found, exact)
        most = [min(-(-side // 4) * 4, t) for side, t in zip(sides, wanted or (999, 999))]
        assert set(network.sides) == {tuple(most)}


def test_half_precision_networks_are_blended_in_float32():
    class Half(Pointwise):
        def forward(self, x):
            return super().forward(x).bfloat16()

    image = random_image(1, 1, 30, 30)
    prob = emseg.predict_slices(Half(), image, max_tile=(16, 16))
    assert prob.dtype == torch.float32
    torch.testing.assert_close(prob, image.bfloat16().float().sigmoid(), atol=1e-6, rtol=1e-5)


# -- eight views


@pytest.mark.parametrize("front", [(2, 1), (1, 2, 3)])
def test_eight_views_of_an_equivariant_predictor_equal_one(front):
    image = random_image(*front, 9, 14)

    def predict(view):
        flat = F.avg_pool2d(view.flatten(1, -3), 3, 1, 1, count_include_pad=False)
        return flat.view(view.shape).sigmoid()

    torch.testing.assert_close(emseg.eight_views(predict, image), predict(image))


def test_eight_views_are_the_eight_symmetries():
    image, views = random_image(1, 1, 5, 5), []
    emseg.eight_views(lambda view: views.append(view[0, 0].numpy()) or view, image)
    wanted = [np.rot90(array, turns) for array in (image[0, 0], image[0, 0].T)
              for turns in range(4)]
    assert {v.tobytes() for v in views} == {np.ascontiguousarray(w).tobytes() for w in wanted}
    assert len(views) == 8


def test_eight_views_are_turned_back_before_the_mean():
    image = random_image(2, 1, 5, 8)

    def predict(view):                                  # not symmetric, two channels
        ramp = torch.arange(view[0, 0].numel()).view(view.shape[-2:]) ** 1.5
        return torch.cat([view * ramp, ramp.expand_as(view)], 1)

    total = 0
    for turns in range(4):
        for mirror in (False, True):
            view = np.rot90(image.numpy(), turns, (2, 3))
            view = view[..., ::-1] if mirror else view
            prob = predict(torch.from_numpy(view.copy())).numpy()
            total = total + np.rot90(prob[..., ::-1] if mirror else prob, -turns, (2, 3))
    np.testing.assert_allclose(emseg.eight_views(predict, image), total / 8, rtol=1e-4, atol=1e-4)


# -- volumes


def predict_grey(image):
    """uint8 (B, H, W) -> the grey level as probability, (B, 1, H, W)."""
    assert image.dtype == torch.uint8
    return image[:, None].float() / 255


def predict_three(image):
    grey = predict_grey(image)
    return torch.cat([0.5 - grey / 2, grey / 3, 0.5 + grey / 6], 1)


def write(predict, image, writer, shape, probability=None, downsample=1, threshold=0.5,
          progress=None, **options):
    """Predict slab by slab into a writer."""
    stream = emseg.predict_by_slabs(predict, InMemory(image), shape, **options)
    emseg.predict_volume(stream, {writer: functools.partial(emseg.class_ids, threshold=threshold)},
                         shape, downsample, probability, progress)


@pytest.mark.parametrize("pixels", [1, 200, 700, 10**6])
def test_slab_by_slab_equals_one_shot(pixels):
    volume, sizes, calls = random_ids((7, 12, 15), 256), [], []
    writer = Writer(volume.shape)

    def predict(image):
        sizes.append(len(image))
        return predict_grey(image)

    write(predict, volume, writer, volume.shape, pixels=pixels,
          progress=lambda *call: calls.append(call))
    np.testing.assert_array_equal(writer.array, volume > 127)
    assert writer.dtype == np.uint8 and (writer.written == 1).all()
    assert max(sizes) == min(7, max(1, pixels // 180))
    assert calls == [(done, 7) for done in np.cumsum(sizes)]


def test_probabilities_are_written_with_one_channel_and_with_several():
    volume = random_ids((5, 6, 7), 256)
    for predict, shape in (predict_grey, (5, 6, 7)), (predict_three, (5, 3, 6, 7)):
        ids, prob = Writer(volume.shape), Writer(shape)
        write(predict, volume, ids, volume.shape, prob, pixels=90)
        wanted = predict(torch.from_numpy(volume)).numpy()
        np.testing.assert_allclose(prob.array, wanted.squeeze(1) if len(shape) == 3 else wanted)
        many = wanted.argmax(1) if len(shape) == 4 else wanted[:, 0] > 0.5
        np.testing.assert_array_equal(ids.array, many)
        assert prob.dtype == np.float32


@pytest.mark.parametrize("threshold", [0.2, 0.7])
def test_threshold_decides_which_pixels_are_foreground(threshold):
    volume = random_ids((5, 6, 7), 256)
    writer = Writer(volume.shape)
    write(predict_grey, volume, writer, volume.shape, threshold=threshold)
    np.testing.assert_array_equal(writer.array, volume > 255 * threshold)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_downsampled_predictions_are_enlarged_linearly(factor):
    full = (3, 13, 18)
    small = random_ids((3, -(-13 // factor), -(-18 // factor)), 256)
    ids, prob = Writer(full), Writer(full)
    write(predict_grey, small, ids, full, prob, downsample=factor, pixels=13 * 18)
    wanted = ndimage.zoom(small / 255, (1, factor, factor), order=1, mode="nearest",
                          grid_mode=True)[:, :13, :18]
    np.testing.assert_allclose(prob.array, wanted, atol=1e-6)
    np.testing.assert_array_equal(ids.array, prob.array > 0.5)


@pytest.mark.parametrize("pixels", [1, 60, 170, 10**6])
@pytest.mark.parametrize("factor, size", [(1, (6, 7)), (1, (13, 18)), (1, (4, 3)), (1, (6, 5)),
                                          (3, (16, 21)), (3, (18, 19))])
def test_slabs_are_enlarged_a_few_rows_at_a_time(factor, size, pixels):
    """Whatever the rows, all together are what one interpolation gives."""
    prob = random_image(2, 3, 6, 7).sigmoid()
    wanted = F.interpolate(prob, size=(18, 21) if factor == 3 else size, mode="bilinear")
    parts = list(emseg.enlarged(prob, size, factor, pixels))
    assert [y for rows, _ in parts for y in range(rows.start, rows.stop)] == list(range(size[0]))
    assert {part.shape[2] for _, part in parts[:-1]} <= {max(1, pixels // (2 * size[1]))}
    found = torch.cat([part for _, part in parts], dim=2)
    torch.testing.assert_close(found, wanted[..., : size[0], : size[1]], rtol=0, atol=1e-6)


def test_large_slices_are_decided_in_parts():
    """No part has more than 2**18 pixels, and each comes once."""
    values, ids, sizes = torch.rand(2, 2, 128, 160), Writer((2, 1024, 1280)), []
    prob = Writer((2, 2, 1024, 1280))

    def decide(part):
        sizes.append(part[:, 0].numel())
        return emseg.class_ids(part)

    emseg.predict_volume([(slice(0, 2), values)], {ids: decide}, (2, 1024, 1280), 8, prob)
    wanted = F.interpolate(values, scale_factor=8, mode="bilinear")
    assert max(sizes) <= 2**18 and sum(sizes) == 2 * 1024 * 1280
    np.testing.assert_allclose(prob.array, wanted, atol=1e-6)
    np.testing.assert_array_equal(ids.array, prob.array.argmax(1))


@pytest.mark.parametrize("depth", [1, 3, 4, 7, 11, 20])
@pytest.mark.parametrize("pixels", [1, 600, 10**6])
def test_predictions_of_another_depth_are_interpolated_linearly(depth, pixels):
    """The network sees `depth` slices of a volume of 7: every slab gives what one gives."""
    image, writer, prob = random_ids((depth, 6, 5), 256), Writer((7, 12, 15)), Writer((7, 12, 15))
    write(predict_grey, image, writer, (7, 12, 15), prob, pixels=pixels)
    wanted = F.interpolate(torch.from_numpy(image)[None, None] / 255, size=(7, 12, 15),
                           mode="trilinear")[0, 0]
    np.testing.assert_allclose(prob.array, wanted, atol=1e-5)
    assert (writer.written == 1).all()


@pytest.mark.parametrize("world", [2, 3, 9])
def test_ranks_write_every_slice_once(world):
    volume = random_ids((7, 12, 15), 256)
    writer, steps = Writer(volume.shape), []
    for rank in range(world):
        before, calls = writer.written.sum(), []
        write(predict_grey, volume, writer, volume.shape, pixels=400, rank=rank, world=world,
              progress=lambda *call: calls.append(call))
        steps.append(writer.written.sum() - before)
        assert calls == [] if steps[-1] == 0 else calls[-1] == (steps[-1], 7)
    assert (writer.written == 1).all() and max(steps) < 7
    np.testing.assert_array_equal(writer.array, volume > 127)


def test_slices_beyond_the_volume_are_not_written():
    ids, prob, calls = Writer((5, 4, 6)), Writer((5, 4, 6)), []
    values = random_image(8, 1, 4, 6).sigmoid()
    stream = [(slice(0, 3), values[:3]), (slice(3, 8), values[3:])]
    emseg.predict_volume(stream, {ids: emseg.class_ids}, (5, 4, 6), probability=prob,
                         progress=lambda *call: calls.append(call))
    np.testing.assert_array_equal(prob.array, values[:5, 0].numpy())
    assert (ids.written == 1).all() and calls == [(3, 5), (5, 5)]


def test_one_stream_fills_several_files():
    values = random_image(5, 3, 4, 6).sigmoid()
    highest, second = Writer((5, 4, 6)), Writer((5, 4, 6))
    stream = [(slice(0, 2), values[:2]), (slice(2, 5), values[2:])]
    emseg.predict_volume(stream, {highest: emseg.class_ids,
                                  second: lambda prob: prob[:, 1] > 0.4}, (5, 4, 6))
    np.testing.assert_array_equal(highest.array, values.numpy().argmax(1))
    np.testing.assert_array_equal(second.array, values.numpy()[:, 1] > np.float32(0.4))


@pytest.mark.parametrize("pixels", [1, 100, 350, 10**6])
def test_slabs_tile_the_volume(pixels):
    found = emseg.slabs((11, 10, 10), pixels)
    assert [z for slab in found for z in range(slab.start, slab.stop)] == list(range(11))
    assert max(s.stop - s.start for s in found) == min(11, max(1, pixels // 100))


# -- neighbouring slices


CONTEXTS = [1, 2, 3, 4, 7, 15]


def padded_by_numpy(volume, context):
    """The volume with its end slices repeated, one less than `context` in all."""
    return np.pad(volume, ((context // 2, context - 1 - context // 2), (0, 0), (0, 0)), "edge")


@pytest.mark.parametrize("Z", [1, 2, 5])
@pytest.mark.parametrize("context", CONTEXTS)
def test_with_context_every_slice_is_the_middle_of_as_many(context, Z):
    volume = random_ids((Z, 6, 7), 256)
    found = emseg.with_context(InMemory(volume, voxel_size=(3.0, 2.0, 1.0)), context)
    wanted = padded_by_numpy(volume, context)
    assert found.shape == wanted.shape and found.dtype == np.uint8 and len(found) == len(wanted)
    assert found.path == "memory.tif" and found.voxel_size == (3.0, 2.0, 1.0)
    np.testing.assert_array_equal(found[:], wanted)
    for z in range(Z):
        np.testing.assert_array_equal(found[z : z + context][context // 2], volume[z])


@pytest.mark.parametrize("below, above", [(0, 0), (2, 0), (0, 3), (9, 1)])
def test_edge_padded_volumes_are_cropped_along_all_axes(below, above):
    volume = random_ids((4, 6, 7), 256)
    found = emseg.EdgePadded(InMemory(volume), below, above)
    wanted = np.pad(volume, ((below, above), (0, 0), (0, 0)), "edge")
    assert found.shape == wanted.shape
    for start in range(len(wanted) + 1):
        for stop in range(start, len(wanted) + 1):
            crop = found[start:stop, 1:4, 2:]
            np.testing.assert_array_equal(crop, wanted[start:stop, 1:4, 2:])
            assert crop.shape == (stop - start, 3, 5) and crop.dtype == np.uint8
    for z in range(-len(wanted), len(wanted)):
        np.testing.assert_array_equal(found[z, :, 3], wanted[z, :, 3])


def test_edge_padded_volumes_read_only_the_slices_that_are_asked_for():
    image = InMemory(random_ids((6, 4, 5), 256))
    padded = emseg.with_context(image, 7)
    for crop, wanted in ((slice(0, 3), [0]), (slice(2, 5), [0, 1]), (slice(10, 12), [5]),
                         (slice(6, 9), [3, 4, 5])):
        image.read_slices.clear()
        padded[crop]
        assert image.read_slices == wanted


def predict_middle(context):
    """A predictor of slices in the middle of `context` ones, and the sizes of what it was given."""
    weight, sizes = random_image(context, seed=5).softmax(0), []

    def predict(image):
        assert image.dtype == torch.uint8
        sizes.append(len(image))
        return (image.unfold(0, context, 1).double() / 255 @ weight.double())[:, None]
    return predict, sizes


@pytest.mark.parametrize("pixels", [1, 250, 10**6])
@pytest.mark.parametrize("context", CONTEXTS)
def test_slabs_with_context_equal_one_shot(context, pixels):
    volume = random_ids((7, 8, 10), 256)
    predict, sizes = predict_middle(context)
    found = list(emseg.predict_by_slabs(predict, InMemory(volume), volume.shape, context, pixels))
    wanted = predict(torch.from_numpy(padded_by_numpy(volume, context)))
    assert [slab for slab, _ in found] == emseg.slabs(volume.shape, pixels)
    assert sizes[:-1] == [slab.stop - slab.start + context - 1 for slab, _ in found]
    torch.testing.assert_close(torch.cat([prob for _, prob in found]), wanted)


def test_ranks_take_slabs_in_turn_with_their_context():
    volume = random_ids((7, 8, 10), 256)
    predict, _ = predict_middle(5)
    options = dict(image=InMemory(volume), shape=volume.shape, context=5, pixels=170)
    whole = list(emseg.predict_by_slabs(predict, **options))
    assert len(whole) == 4
    for rank in range(3):
        own = list(emseg.predict_by_slabs(predict, **options, rank=rank, world=3))
        assert [slab for slab, _ in own] == [slab for slab, _ in whole[rank::3]]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(own, whole[rank::3]))


# -- windows of a 3D network


WINDOWS = [(Z, depth, overlap) for depth, overlap in ((8, 1 / 3), (8, 0.75), (5, 0.5), (1, 0.0),
                                                      (4, 0.0), (6, 0.8))
           for Z in (1, 3, 8, 9, 20, 37)]


def predict_window(image):
    """uint8 (depth, H, W) -> (depth, 2, H, W), which depends on the place in the window."""
    assert image.dtype == torch.uint8
    place = torch.linspace(0.2, 1, len(image)).view(-1, 1, 1)
    grey = place * image.float() / 255
    return torch.stack([grey, (grey.mean(0) - grey**2)], dim=1)


def windows_at_once(volume, depth, overlap):
    """The blended prediction of a whole volume, in arrays of its size."""
    depth = min(depth, len(volume))
    total, weight = np.zeros((len(volume), 2, *volume.shape[1:])), np.zeros(len(volume))
    window = np.sin(np.pi * (np.arange(depth) + 0.5) / depth) ** 2
    for start in emseg.tile_starts(len(volume), depth, overlap):
        part = slice(start, start + depth)
        prob = predict_window(torch.from_numpy(volume[part])).numpy()
        total[part] += prob * window[:, None, None, None]
        weight[part] += window
    return total / weight[:, None, None, None]


def joined(stream):
    """The slices of a stream of slabs, which must follow one another, and its probabilities."""
    zs, parts = [], []
    for slab, prob in stream:
        assert len(prob) == slab.stop - slab.start > 0
        zs += range(slab.start, slab.stop)
        parts.append(prob.clone())
    return zs, torch.cat(parts) if parts else None


@pytest.mark.parametrize("Z, depth, overlap", WINDOWS)
def test_blended_windows_equal_one_shot(Z, depth, overlap):
    volume = random_ids((Z, 4, 5), 256)
    zs, found = joined(emseg.predict_by_windows(predict_window, InMemory(volume), depth, overlap))
    assert zs == list(range(Z)) and found.dtype == torch.float32
    np.testing.assert_allclose(found, windows_at_once(volume, depth, overlap), atol=1e-5)


def test_windows_overlap_by_a_third_unless_told():
    volume = random_ids((30, 4, 5), 256)
    zs, found = joined(emseg.predict_by_windows(predict_window, InMemory(volume), 12))
    np.testing.assert_allclose(found, windows_at_once(volume, 12, 1 / 3), atol=1e-5)


@pytest.mark.parametrize("world", [2, 3, 5, 20])
@pytest.mark.parametrize("Z, depth, overlap", WINDOWS)
def test_ranks_together_give_what_one_gives(Z, depth, overlap, world):
    image = InMemory(random_ids((Z, 4, 5), 256))
    wanted_zs, wanted = joined(emseg.predict_by_windows(predict_window, image, depth, overlap))
    zs, parts = [], []
    for rank in range(world):
        own, prob = joined(emseg.predict_by_windows(predict_window, image, depth, overlap, rank,
                                                    world))
        zs += own
        parts += [prob] if own else []
    assert zs == wanted_zs and torch.equal(torch.cat(parts), wanted)


def test_any_ranks_yield_every_slice_once_and_what_one_process_yields():
    rng = np.random.default_rng(0)
    for number in range(150):
        Z, H, W = [int(side) for side in rng.integers(1, (40, 7, 7))]
        volume, world = random_ids((Z, H, W), 256, seed=number), int(rng.integers(1, 9))
        image = InMemory(volume)
        grey = torch.from_numpy(volume / 255).float()[:, None]
        depth, overlap = int(rng.integers(1, 20)), float(rng.uniform(0, 0.95))
        context, pixels = int(rng.integers(1, 8)), int(rng.integers(1, 600))
        other = (int(rng.integers(1, 40)), H, W)
        middle = context // 2

        def see_middle(slices):
            return predict_grey(slices[middle : len(slices) - (context - 1 - middle)])

        streams = {
            "windows": (Z, lambda rank, world: emseg.predict_by_windows(
                predict_window, image, depth, overlap, rank, world)),
            "pointwise windows": (Z, lambda rank, world: emseg.predict_by_windows(
                predict_grey, image, depth, overlap, rank, world)),
            "slabs": (Z, lambda rank, world: emseg.predict_by_slabs(
                see_middle, image, volume.shape, context, pixels, rank, world)),
            "slabs of another depth": (other[0], lambda rank, world: emseg.predict_by_slabs(
                see_middle, image, other, context, pixels, rank, world))}
        for name, (slices, stream) in streams.items():
            zs, whole = joined(stream(0, 1))
            assert zs == list(range(slices)), name
            parts = {}
            for rank in range(world):
                for slab, prob in stream(rank, world):
                    for z, one in zip(range(slab.start, slab.stop), prob.clone(), strict=True):
                        assert z not in parts, (name, z)
                        parts[z] = one
            assert sorted(parts) == zs, name
            assert torch.equal(torch.stack([parts[z] for z in zs]), whole), name
            if name in ("pointwise windows", "slabs"):
                torch.testing.assert_close(whole, grey, atol=1e-5, rtol=0)


def test_ranks_share_the_windows_in_equal_parts():
    image, counts, slabs = InMemory(random_ids((100, 4, 5), 256)), [], []
    for rank in range(4):
        calls = []
        own = list(emseg.predict_by_windows(
            lambda window: calls.append(1) or predict_window(window), image, 8, 0.5, rank, 4))
        counts.append(len(calls))
        slabs.append(len(own))
    assert slabs == [6, 6, 6, 6] and counts == [6, 7, 7, 7]     # and the one below


def test_ranks_without_windows_predict_nothing():
    image = InMemory(random_ids((9, 4, 5), 256))                # two windows

    def streams(rank):
        return list(emseg.predict_by_windows(predict_window, image, 8, rank=rank, world=5))

    yields = [len(streams(rank)) for rank in range(5)]
    assert sorted(yields) == [0, 0, 0, 1, 1]
    for rank in np.flatnonzero(np.array(yields) == 0):
        image.read_slices.clear()
        streams(rank)
        assert not image.read_slices


def test_windows_are_read_one_by_one_and_predicted_whole():
    image, sizes = InMemory(random_ids((40, 4, 5), 256)), []
    stream = emseg.predict_by_windows(lambda x: sizes.append(len(x)) or predict_window(x), image, 8)
    for number, (slab, _) in enumerate(stream, 1):
        assert sizes == [8] * number
        assert len(image.read_slices) == 8 * number
        assert image.read_slices[-8] == slab.start and slab.stop - slab.start <= 8
    assert number == len(emseg.tile_starts(40, 8, 1 / 3))


@pytest.mark.parametrize("Z", [3, 8, 21])
@pytest.mark.parametrize("world", [1, 2])
def test_windows_are_written_up_to_the_last_slice(Z, world):
    volume = random_ids((Z, 4, 5), 256)
    ids, prob, calls = Writer(volume.shape), Writer((Z, 2, 4, 5)), []
    for rank in range(world):
        stream = emseg.predict_by_windows(predict_window, InMemory(volume), 8, 0.5, rank, world)
        emseg.predict_volume(stream, {ids: emseg.class_ids}, volume.shape, probability=prob,
                             progress=lambda *call: calls.append(call))
    wanted = windows_at_once(volume, 8, 0.5)
    np.testing.assert_allclose(prob.array, wanted, atol=1e-5)
    assert (ids.written == 1).all() and (prob.written == 1).all()
    np.testing.assert_array_equal(ids.array, prob.array.argmax(1))
    assert calls[-1] == (Z, Z) or world == 2


# -- scores of annotated slices


def confusion_by_loops(pred, label, n):
    counts = np.zeros((len(label), n, n), int)
    for place in np.ndindex(label.shape):
        if label[place] != IGNORE:
            counts[place[0], label[place], pred[place]] += 1
    return counts


ANNOTATED = [1, 4, 5, 8, 9, 11, 14]


def test_score_slices_counts_the_annotated_slices_alone():
    image, sizes = InMemory(random_ids((16, 9, 8), 256)), []
    label = InMemory(random_ids((16, 9, 8), 3, ignore=0.2, seed=1), slices=ANNOTATED)
    found = emseg.score_slices(lambda x: sizes.append(len(x)) or predict_three(x), image, label,
                               CLASSES)
    pred = emseg.class_ids(predict_three(torch.from_numpy(image.array))).numpy()
    assert found.dtype == np.int64
    np.testing.assert_array_equal(
        found, confusion_by_loops(pred[ANNOTATED], label.array[ANNOTATED], 3))
    assert image.read_slices == label.read_slices == ANNOTATED and set(sizes) == {1}


@pytest.mark.parametrize("context", CONTEXTS)
def test_score_slices_of_a_network_that_sees_the_neighbours(context):
    predict, sizes = predict_middle(context)
    image = InMemory(random_ids((16, 9, 8), 256))
    zs = [0, 4, 5, 15]
    label = InMemory(random_ids((16, 9, 8), 2, ignore=0.2, seed=1), slices=zs)
    found = emseg.score_slices(predict, image, label, CLASSES[:2], context)
    assert sizes == [context] * 4
    padded = torch.from_numpy(padded_by_numpy(image.array, context))
    pred = emseg.class_ids(predict(padded)).numpy()[zs]
    np.testing.assert_array_equal(found, confusion_by_loops(pred, label.array[zs], 2))


@pytest.mark.parametrize("depth", [1, 5, 8])
def test_score_slices_takes_the_middle_of_a_predicted_window(depth):
    image = InMemory(random_ids((16, 9, 8), 256))
    zs = [0, 4, 5, 15]
    label = InMemory(random_ids((16, 9, 8), 2, ignore=0.2, seed=1), slices=zs)
    found = emseg.score_slices(predict_grey, image, label, CLASSES[:2], context=depth)
    np.testing.assert_array_equal(
        found, confusion_by_loops((image.array > 127)[zs].astype(int), label.array[zs], 2))


def test_score_slices_at_another_threshold():
    image, label = InMemory(random_ids((4, 9, 8), 256)), InMemory(random_ids((4, 9, 8), 2))
    found = emseg.score_slices(predict_grey, image, label, CLASSES[:2], threshold=0.2)
    np.testing.assert_array_equal(
        found, confusion_by_loops((image.array > 51).astype(int), label.array, 2))


def test_ranks_score_every_annotated_slice_once(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    zs, image = list(range(1, 20, 2)), InMemory(random_ids((20, 9, 8), 256))
    label = InMemory(random_ids((20, 9, 8), 3, ignore=0.2, seed=1), slices=zs)
    parts = [emseg.score_slices(predict_three, image, label, CLASSES, rank=rank, world=3)
             for rank in range(3)]
    assert sorted(image.read_slices) == zs
    whole = emseg.score_slices(predict_three, image, label, CLASSES)
    np.testing.assert_array_equal(sum(parts), whole)
    assert all(part.any() for part in parts)


def test_ranks_add_their_counts(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(7))
    image, label = InMemory(random_ids((4, 5, 6), 256)), InMemory(random_ids((4, 5, 6)))
    found = emseg.score_slices(predict_three, image, label, CLASSES, rank=0, world=2)
    assert found.sum() == 7 * 60


# -- metrics


def test_confusion_on_an_overlap_built_by_hand():
    truth = np.array([[[0, 0, 1, 1], [2, 2, IGNORE, IGNORE]], [[IGNORE] * 4] * 2], np.uint8)
    pred = np.array([[[0, 1, 1, 2], [2, 0, 2, 0]], [[0, 1, 2, 0]] * 2], np.uint8)
    found = emseg.confusion(pred, truth, 3)
    assert found.dtype == np.int64
    assert found.tolist() == [[[1, 1, 0], [0, 1, 1], [1, 0, 1]], [[0] * 3] * 3]


@pytest.mark.parametrize("n", [2, 3, 17, 255])
def test_confusion_against_loops(n):
    pred, truth = random_ids((3, 20, 21), n), random_ids((3, 20, 21), n, ignore=0.2, seed=1)
    np.testing.assert_array_equal(emseg.confusion(pred, truth, n),
                                  confusion_by_loops(pred, truth, n))


TRUTH = np.array([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, IGNORE, IGNORE], [IGNORE] * 4,
                  [1, 1, 1, 1]], np.uint8)[:, None]
PRED = np.array([[1, 0, 1, 0], [1, 0, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1],
                 [1, 1, 1, 1]], np.uint8)[:, None]


def test_scores_of_two_classes_by_hand():
    found = emseg.scores(emseg.confusion(PRED, TRUTH, 2), ["background", "a"])
    # tp 1 + 4; fp 1 + 1; fn 1. Dice of the slices: 1/2, 0, 1 (both empty), not scored, 1.
    assert found == {
        "per_class": {"a": {
            "dice": pytest.approx(10 / 13), "iou": pytest.approx(5 / 8),
            "precision": pytest.approx(5 / 7), "recall": pytest.approx(5 / 6),
            "tp": 5, "fp": 2, "fn": 1,
            "dice_slices": pytest.approx((1 / 2 + 0 + 1 + 1) / 4),
            "dice_nonempty": pytest.approx(10 / 12),        # slices 0 and 4
            "dice_slices_nonempty": pytest.approx((1 / 2 + 1) / 2)}},
        "dice": pytest.approx(10 / 13), "iou": pytest.approx(5 / 8),
        "miou": pytest.approx((5 / 8 + 6 / 9) / 2), "accuracy": pytest.approx(11 / 14)}
    assert all(type(found["per_class"]["a"][key]) is int for key in ("tp", "fp", "fn"))


def test_scores_of_several_classes_by_hand():
    truth = np.array([[[0, 0, 1, 1]], [[2, 2, 2, IGNORE]]], np.uint8)
    pred = np.array([[[0, 1, 1, 1]], [[2, 1, 2, 2]]], np.uint8)
    found = emseg.scores(emseg.confusion(pred, truth, 4), [*CLASSES, "never seen"])
    a, b, none = [found["per_class"][name] for name in ("a", "b", "never seen")]
    assert (a["dice"], a["iou"], a["tp"], a["fp"], a["fn"]) == pytest.approx((4 / 6, 0.5, 2, 2, 0))
    assert (b["dice"], b["iou"], b["tp"], b["fp"], b["fn"]) == pytest.approx((0.8, 2 / 3, 2, 0, 1))
    assert (a["dice_slices"], b["dice_slices"]) == pytest.approx(((0.8 + 0) / 2, (1 + 0.8) / 2))
    assert (a["dice_nonempty"], a["dice_slices_nonempty"]) == pytest.approx((4 / 5, 4 / 5))
    assert [none[key] for key in ("dice", "iou", "precision", "recall", "dice_nonempty",
                                  "dice_slices_nonempty")] == [None] * 6
    assert (none["tp"], none["fp"], none["fn"], none["dice_slices"]) == (0, 0, 0, 1.0)
    assert found["dice"] == pytest.approx((4 / 6 + 4 / 5) / 2)
    assert found["iou"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert found["miou"] == pytest.approx((1 / 2 + 1 / 2 + 2 / 3) / 3)
    assert found["accuracy"] == pytest.approx(5 / 7)


def test_class_that_is_only_predicted_or_only_true():
    truth, pred = np.array([[[0, 0, 1]]], np.uint8), np.array([[[0, 2, 0]]], np.uint8)
    found = emseg.scores(emseg.confusion(pred, truth, 3), CLASSES)["per_class"]
    keys = "dice", "iou", "precision", "recall", "dice_nonempty", "dice_slices_nonempty"
    assert [found["a"][key] for key in keys] == [0, 0, None, 0, 0, 0]
    assert [found["b"][key] for key in keys] == [0, 0, 0, None, None, None]


def test_nothing_annotated_leaves_every_score_undefined():
    found = emseg.scores(np.zeros((2, 3, 3), np.int64), CLASSES)
    assert [found[key] for key in ("dice", "iou", "miou", "accuracy")] == [None] * 4
    assert found["per_class"]["a"]["dice_slices"] is None
    assert found["per_class"]["a"]["tp"] == 0


def test_mean_scores_leave_out_what_is_undefined():
    first = emseg.scores(emseg.confusion(PRED, TRUTH, 3), CLASSES)
    second = emseg.scores(emseg.confusion(TRUTH[[0, 1, 4]], TRUTH[[0, 1, 4]], 3), CLASSES)
    second["per_class"]["b"]["dice"], second["miou"] = 0.25, 0.5
    mean = emseg.mean_scores([first, second])
    assert mean["per_class"]["a"]["dice"] == pytest.approx((10 / 13 + 1) / 2)
    assert mean["per_class"]["a"]["dice_slices"] == pytest.approx((0.625 + 1) / 2)
    assert first["per_class"]["b"]["dice"] is None and mean["per_class"]["b"]["dice"] == 0.25
    assert mean["per_class"]["b"]["iou"] is None
    assert mean["miou"] == pytest.approx((first["miou"] + 0.5) / 2)
    assert mean["accuracy"] == pytest.approx((11 / 14 + 1) / 2)
    assert mean["dice"] == pytest.approx((10 / 13 + 1) / 2)
    assert mean["iou"] == pytest.approx((5 / 8 + 1) / 2)
    assert mean.keys() == first.keys() and mean["per_class"].keys() == first["per_class"].keys()


@pytest.mark.parametrize("pixels", [1, 100, 10**6])
def test_evaluate_slab_by_slab_equals_one_shot(pixels):
    pred, truth = random_ids((9, 7, 8)), random_ids((9, 7, 8), ignore=0.3, seed=1)
    label = InMemory(truth)
    found = emseg.evaluate(InMemory(pred), label, CLASSES, pixels)
    assert (found.pop("voxels"), found.pop("ignored")) == (504, (truth == IGNORE).sum())
    assert found == emseg.scores(confusion_by_loops(pred, truth, 3), CLASSES)
    assert label.read_slices == list(range(9))


def test_evaluate_refuses_another_shape():
    with pytest.raises(emseg.InputError, match="prediction has 2 x 3 x 4 voxels, its label 2 x 4"):
        emseg.evaluate(InMemory(np.zeros((2, 3, 4), "u1")), InMemory(np.zeros((2, 4, 3), "u1")),
                       CLASSES)


def test_evaluate_refuses_a_class_that_does_not_exist():
    pred = np.zeros((5, 4, 4), np.uint8)
    pred[3, 1, 1] = 3
    with pytest.raises(emseg.InputError, match="tif: holds 3, but class ids run from 0 to 2"):
        emseg.evaluate(InMemory(pred), InMemory(np.zeros_like(pred)), CLASSES, pixels=16)


@pytest.mark.parametrize("pixels", [1, 100, 10**6])
def test_confusion_of_volumes_slab_by_slab_equals_one_shot(pixels):
    pred, truth = random_ids((9, 7, 8)), random_ids((9, 7, 8), ignore=0.3, seed=1)
    label = InMemory(truth)
    counts = emseg.confusion_volume(InMemory(pred), label, CLASSES, pixels)
    np.testing.assert_array_equal(counts, confusion_by_loops(pred, truth, 3))
    label.slices = np.array([2, 5])
    found = emseg.volume_scores(counts, label, CLASSES, organelles=[2])
    assert (found.pop("voxels"), found.pop("ignored")) == (504, (truth == IGNORE).sum())
    assert found == emseg.scores(counts, CLASSES, [2])


def test_dice_of_slices_by_hand():
    found = emseg.dice_of_slices(emseg.confusion(PRED, TRUTH, 3))
    nan = np.nan
    background = [2 / 4, 6 / 7, 1, nan, nan]
    np.testing.assert_allclose(found, np.transpose([background, [0.5, 0, nan, nan, 1], [nan] * 5]))


# -- slices that were seen


def seen_by(cells, crop, slices):
    """What is noted of a run on these slices of a crop."""
    volume = emseg.open_volume(f"{cells}/image.tif{crop}")
    return emseg.seen_slices([volume], [InMemory(np.zeros(volume.shape), slices=slices)])


@pytest.mark.parametrize("crop, wanted", [
    ("", [2, 5]), ("@4:8", [1]), ("@0:5", [2]), ("@6:12", []), ("@5:6", [0]),
    ("@0:12,10:20,30:31", [2, 5]), ("@0:12,59:112,59:128", [2, 5]), ("@0:12,60:112,0:128", []),
    ("@0:12,0:112,60:128", [])])
def test_seen_slices_are_counted_in_the_crop_and_only_where_it_overlaps(cells, crop, wanted):
    seen = seen_by(cells, "@2:10,0:60,0:60", [3, 0])
    assert emseg.seen_in(emseg.open_volume(f"{cells}/image.tif{crop}"), seen) == wanted


def test_seen_slices_of_several_volumes_are_those_of_the_file(cells, tmp_path):
    os.symlink(cells / "image.tif", tmp_path / "link.tif")
    seen = seen_by(cells, "", [9, 4]) + seen_by(cells, "@4:6", [0, 1])
    for path, wanted in ((cells / "image.tif", [4, 5, 9]), (tmp_path / "link.tif", [4, 5, 9]),
                         (cells / "label.tif", [])):
        assert emseg.seen_in(emseg.open_volume(path), seen) == wanted
    assert emseg.seen_in(emseg.open_volume(cells / "image.tif"), []) == []


def test_what_was_seen_does_not_score(cells):
    volume = emseg.open_volume(f"{cells}/image.tif@2:8")
    label = InMemory(np.ones(volume.shape, np.uint8), slices=[0, 2, 3, 5])
    item = emseg.Item("name", volume, volume, label)
    found = emseg.without_seen_slices(item, seen_by(cells, "@1:12", [1, 2, 4]))     # z 2, 3, 5
    assert (found.name, found.volume, found.image) == ("name", volume, volume)
    assert found.label.slices.tolist() == [2, 5]
    assert found.label[:, :1, :1].ravel().tolist() == [IGNORE, IGNORE, 1, IGNORE, IGNORE, 1]
    with pytest.raises(emseg.InputError, match="every labelled slice was trained"):
        emseg.without_seen_slices(item, seen_by(cells, "", [2, 4, 5, 7]))
    unlabelled = emseg.Item("name", volume, volume, None)
    assert emseg.without_seen_slices(unlabelled, seen_by(cells, "", [2])) is unlabelled


# -- learning rates and losses of a run


def drops_of_torch(history, mode, patience, cooldown, threshold):
    """How often torch's scheduler has lowered the rate after each epoch."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode, factor=0.1, patience=patience - 1, cooldown=cooldown, threshold=threshold,
        threshold_mode="rel", min_lr=0, eps=0)
    counts = []
    for value in history:
        schedule.step(value)
        counts.append(round(-math.log10(optimizer.param_groups[0]["lr"])))
    return counts


@pytest.mark.parametrize("threshold", [0.0, 1e-4, 0.05])
@pytest.mark.parametrize("cooldown", [0, 1, 4])
@pytest.mark.parametrize("patience", [1, 2, 5])
def test_plateaus_are_those_of_torch(patience, cooldown, threshold):
    rng = np.random.default_rng(patience)
    for history in (rng.random(60), rng.random(60).cumsum(), np.ones(60), np.zeros(60),
                    np.linspace(1, 2, 60) + 0.1 * rng.random(60), rng.integers(1, 9, 60)):
        for values, mode in (history, "max"), (-history[::-1], "min"):
            wanted = drops_of_torch(values if mode == "max" else -values, mode, patience, cooldown,
                                    threshold)
            found = [emseg.plateaus(list(values[: n + 1]), patience, cooldown, threshold)
                     for n in range(60)]
            assert found == wanted
    assert emseg.plateaus([], patience, cooldown, threshold) == 0


def test_losses_of_several_processes_are_averaged(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(3))
    run = SimpleNamespace(world=2, device=torch.device("cpu"))
    sums = {"loss": 4.0, "loss_sup": -1.0}
    assert emseg.Run._mean_of_processes(run, sums) == {"loss": 6.0, "loss_sup": -1.5}
    run.world = 1
    assert emseg.Run._mean_of_processes(run, sums) == sums


# -- figures


def rgb(color):
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255


def test_error_overlay_by_hand():
    grey = np.array([[100, 100, 200, 0, 50, 60]], np.uint8)
    truth = np.array([[1, 1, 0, 0, IGNORE, 2]], np.uint8)
    pred = np.array([[1, 0, 1, 0, 1, 1]], np.uint8)
    green, red, blue = [rgb(c) for c in ("#2ca02c", "#d62728", "#1f77b4")]
    wanted = [0.55 * 100 / 255 + 0.45 * green, 0.55 * 100 / 255 + 0.45 * red,
              0.55 * 200 / 255 + 0.45 * blue, np.zeros(3), np.full(3, 50 / 255),
              0.55 * 60 / 255 + 0.45 * red]
    np.testing.assert_allclose(emseg.error_overlay(grey, truth, pred), [wanted])


def test_class_overlay_gives_every_class_its_colour():
    n = len(emseg.CLASS_COLORS)
    grey = np.zeros((1, n + 4), np.uint8)
    label = np.array([[0, *range(1, n + 3), IGNORE]], np.uint8)
    found = emseg.class_overlay(grey, label, ["background", *map(str, range(n + 2))])
    colors = [rgb(c) * 0.45 for c in [*emseg.CLASS_COLORS, *emseg.CLASS_COLORS[:2]]]
    np.testing.assert_allclose(found[0], [np.zeros(3), *colors, np.zeros(3)])
    assert not grey.any()


def has_color(picture, color, shade=1.0):
    """Share of the pixels of a PNG that show a colour on black."""
    return (np.abs(picture[..., :3] - shade * rgb(color)).max(-1) < 0.01).mean()


def items(*shapes, labelled=True, voxel_size=(20.0, 8.0, 8.0)):
    """Black volumes: left half class 1, right half class 2; half of the prediction is wrong."""
    made = []
    for i, shape in enumerate(shapes):
        truth = np.ones(shape, np.uint8)
        truth[:, :, shape[2] // 2 :] = 0
        pred = np.ones(shape, np.uint8)
        pred[:, : shape[1] // 2] = 2 * truth[:, : shape[1] // 2]
        made.append((f"volume {i}", InMemory(np.zeros(shape, "u1"), voxel_size=voxel_size),
                     InMemory(truth) if labelled else None, {"prediction": InMemory(pred)}))
    return made


@pytest.mark.parametrize("shapes", [[(5, 40, 40)], [(3, 40, 60), (2, 60, 40)], [(1, 1500, 30)],
                                    [(2, 12, 900)], [(1, 2, 2)]])
@pytest.mark.parametrize("labelled", [True, False])
def test_save_slices_shows_classes_and_errors(tmp_path, shapes, labelled):
    emseg.save_slices(tmp_path / "figure.png", items(*shapes, labelled=labelled), CLASSES)
    picture = imread(tmp_path / "figure.png")
    a, b = emseg.CLASS_COLORS[:2]
    assert has_color(picture, a, 0.45) > 1e-3 and has_color(picture, b, 0.45) > 1e-4
    for color in emseg.ERROR_COLORS.values():
        assert (has_color(picture, color, 0.45) > 1e-4) == labelled
        assert (has_color(picture, color) > 1e-5) == labelled               # the legend
    assert has_color(picture, a) > 1e-5 and has_color(picture, b) > 1e-5


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn."""
    drawn, new_figure = [], emseg.new_figure
    monkeypatch.setattr(emseg, "new_figure",
                        lambda **options: drawn.append(new_figure(**options)) or drawn[-1])
    return drawn


@pytest.mark.parametrize("labelled, titles", [
    (True, ["image", "truth", "first: errors", "second: errors"]),
    (False, ["image", "first", "second"])])
def test_save_slices_shows_stages_side_by_side(tmp_path, figures, labelled, titles):
    (name, image, label, preds), = items((1, 40, 40), labelled=labelled)
    perfect = InMemory(items((1, 40, 40))[0][2].array)
    stages = {"first": preds["prediction"], "second": perfect}
    emseg.save_slices(tmp_path / "figure.png", [(name, image, label, stages)], CLASSES)
    assert [axis.get_title() for axis in figures[0].axes] == titles
    *_, first, second = [axis.images[0].get_array()[:, :, :3] for axis in figures[0].axes]
    shown = emseg.error_overlay if labelled else emseg.class_overlay
    for panel, pred in (first, preds["prediction"]), (second, perfect):
        options = [label.array[0], pred.array[0]] if labelled else [pred.array[0], CLASSES]
        np.testing.assert_allclose(panel, shown(image.array[0], *options))


def test_save_slices_titles_a_single_stage_plainly(tmp_path, figures):
    both = items((1, 40, 40), labelled=False) + items((1, 40, 40))
    emseg.save_slices(tmp_path / "figure.png", both, CLASSES)
    titles = [axis.get_title() for axis in figures[0].axes]
    assert titles == ["image", "truth", "prediction", "errors"] + [""] * 4
    emseg.save_slices(tmp_path / "figure.png", both[:1], CLASSES)
    assert [axis.get_title() for axis in figures[1].axes] == ["image", "prediction"]


def test_save_slices_takes_items_with_and_without_truth_together(tmp_path):
    both = items((2, 40, 40)) + items((2, 40, 40), labelled=False)
    emseg.save_slices(tmp_path / "figure.png", both, CLASSES)
    picture = imread(tmp_path / "figure.png")
    upper, lower = np.array_split(picture, 2)
    green = emseg.ERROR_COLORS["true positive"]
    assert has_color(upper, green, 0.45) > 1e-3 > has_color(lower, green, 0.45)


@pytest.mark.parametrize("zs, wanted", [(range(40), [5, 15, 25, 35]), ([3, 9], [3, 9]),
                                        ([2, 4, 6, 8, 10, 30, 31, 32], [4, 8, 30, 32])])
def test_save_slices_spreads_the_rows_over_the_annotated_slices(tmp_path, zs, wanted):
    (name, image, label, preds), = items((40, 8, 8))
    label.slices = np.array(zs)
    emseg.save_slices(tmp_path / "figure.png", [(name, image, label, preds)], CLASSES, rows=4)
    assert image.read_slices == label.read_slices == preds["prediction"].read_slices == wanted


def test_save_slices_shares_the_rows_among_the_volumes(tmp_path):
    shown = items((9, 8, 8), (9, 8, 8), (9, 8, 8), (9, 8, 8), (9, 8, 8))
    for count, each in (2, 2), (5, 1):
        emseg.save_slices(tmp_path / "figure.png", shown[:count], CLASSES, rows=4)
        for _, image, _, _ in shown[:count]:
            assert len(image.read_slices) == each
            image.read_slices.clear()


def maps(*shapes, labelled=True):
    """What save_maps takes, from items."""
    return [(name, image, label, *preds.values())
            for name, image, label, preds in items(*shapes, labelled=labelled)]


@pytest.mark.parametrize("shapes", [[(5, 40, 40)], [(3, 40, 60), (2, 60, 40)], [(1, 1500, 30)],
                                    [(2, 12, 900)], [(1, 2, 2)]])
@pytest.mark.parametrize("labelled", [True, False])
def test_save_maps_shows_classes_in_their_colours(tmp_path, shapes, labelled):
    emseg.save_maps(tmp_path / "maps.png", maps(*shapes, labelled=labelled), CLASSES,
                    ["#12ab34", "#fe5601"])
    picture = imread(tmp_path / "maps.png")
    assert picture.std() > 0
    assert has_color(picture, "#fe5601") > 1e-4             # prediction, and legend
    assert has_color(picture, "#12ab34") > 1e-4
    assert has_color(picture, emseg.CLASS_COLORS[0]) == 0


def test_save_maps_has_a_panel_for_image_prediction_and_truth(tmp_path, figures):
    (both,) = maps((1, 100, 100))
    emseg.save_maps(tmp_path / "maps.png", [both, (*both[:2], None, both[3])], CLASSES, rows=2)
    axes = figures[-1].axes
    assert [axis.get_title() for axis in axes] == ["image", "prediction", "truth", "image",
                                                   "prediction", ""]
    colors = np.array([[0, 0, 0], *map(rgb, emseg.CLASS_COLORS[:2])])
    for axis, ids in zip(axes[1:3], (both[3], both[2])):
        np.testing.assert_allclose(axis.images[0].get_array(), colors[ids[0]])
    for axis in axes[:5]:                       # the inset is what the frame frames
        (inset,) = axis.child_axes
        (frame,) = [p for p in axis.patches if p.get_width() < 50]
        y, x = round(frame.get_y() + 0.5), round(frame.get_x() + 0.5)
        shown = inset.images[0].get_array()
        assert shown.shape[:2] == (16, 16) == (frame.get_height(), frame.get_width())
        np.testing.assert_allclose(
            shown, axis.images[0].get_array()[y : y + 16, x : x + 16])


def test_save_maps_thins_large_slices_but_not_their_inset(tmp_path, figures):
    (both,) = maps((1, 100, 100))
    both[3].array[0, 49, 49] = 0                # seen at full resolution alone
    emseg.save_maps(tmp_path / "maps.png", [both], CLASSES, max_side=50)
    axis = figures[-1].axes[1]
    (inset,) = axis.child_axes
    (frame,) = [p for p in axis.patches if p.get_width() < 50]
    y, x = round(2 * (frame.get_y() + 0.5)), round(2 * (frame.get_x() + 0.5))
    colors = np.array([[0, 0, 0], *map(rgb, emseg.CLASS_COLORS[:2])])
    np.testing.assert_allclose(axis.images[0].get_array(), colors[both[3].array[0, ::2, ::2]])
    np.testing.assert_allclose(inset.images[0].get_array(),
                               colors[both[3].array[0, y : y + 16, x : x + 16]])


def test_save_maps_shows_what_nobody_knows_in_grey(tmp_path, figures):
    (name, image, label, pred), = maps((1, 60, 60))
    label.array[0, :30] = IGNORE
    emseg.save_maps(tmp_path / "maps.png", [(name, image, label, pred)], CLASSES)
    np.testing.assert_allclose(figures[-1].axes[2].images[0].get_array()[:30],
                               float(emseg.UNKNOWN_COLOR))


def test_the_inset_shows_where_small_structures_are():
    ids = np.zeros((200, 300), np.uint8)
    ids[:150, :200] = 1                         # large: little of it fits
    ids[170:174, 250:254] = 2
    y, x, height, width = emseg._busiest(ids, 3)
    assert (height, width) == (32, 48)
    assert y <= 170 and y + height >= 174 and x <= 250 and x + width >= 254
    assert emseg._busiest(np.zeros((2, 2), np.uint8), 3) == (0, 0, 1, 1)
    ids[:] = 0
    ids[199, 299] = 1
    y, x, *_ = emseg._busiest(ids, 2)
    assert (y + height, x + width) == (200, 300)


@pytest.mark.parametrize("side, step, nm, text", [(400, 1, 8.0, "500 nm"), (400, 1, 40.0, "2 µm"),
                                                  (2000, 3, 0.5, "200 nm"), (64, 1, 5.0, "50 nm")])
def test_scale_bar_has_the_length_that_it_names(side, step, nm, text):
    figure = emseg.new_figure()
    axis = figure.subplots()
    axis.imshow(np.zeros((9, math.ceil(side / step))))
    emseg._scale_bar(axis, (20.0, 99.0, nm), step)
    x0, x1 = axis.lines[0].get_xdata()
    found, unit = axis.texts[0].get_text().split()
    assert f"{found} {unit}" == text
    assert (x1 - x0) * step * nm == pytest.approx(float(found) * {"nm": 1, "µm": 1000}[unit])
    assert 0.09 * side / step < x1 - x0 <= 0.26 * side / step


def test_without_voxel_size_there_is_no_scale_bar(tmp_path):
    pictures = []
    for size in (None, (20.0, 8.0, 8.0)):
        emseg.save_slices(tmp_path / "figure.png", items((1, 40, 40), voxel_size=size), CLASSES)
        pictures.append(imread(tmp_path / "figure.png"))
    assert not np.array_equal(*pictures)


# -- surfaces


def ball(shape, centre, radius, voxel_size=(1, 1, 1)):
    place = [(axis + 0.5) * side for axis, side in zip(np.ogrid[tuple(map(slice, shape))],
                                                       voxel_size)]
    return sum((axis - c) ** 2 for axis, c in zip(place, centre)) < radius**2


def test_class_shares_are_block_means():
    ids = random_ids((7, 9, 11), 3)
    shares, block = emseg.class_shares(InMemory(ids, voxel_size=(5.0, 2.0, 2.0)), 3, 4)
    assert shares.shape == (2, 4, 3, 4) and block.tolist() == [10, 6, 6]
    for k, z, y, x in np.ndindex(shares.shape):
        part = ids[2 * z : 2 * z + 2, 3 * y : 3 * y + 3, 3 * x : 3 * x + 3] == k + 1
        assert shares[k, z, y, x] == pytest.approx(part.mean())
    assert emseg.class_shares(InMemory(ids), 3, 99)[1].tolist() == [1, 1, 1]


def test_rays_meet_a_ball_where_it_is():
    """Seen from any side: a disc of its radius whose middle is nearest and faces the eye."""
    share = ball((40, 40, 40), (20, 20, 20), 12).astype(np.float32)
    for view in ((0, 0), (-60, 25), (-90, 90)):
        depth, light, facing = emseg.cast_rays(share, np.ones(3), *view, 100)
        side = np.linalg.norm((40, 40, 40)) / 100
        y, x = (np.arange(100) - 49.5)[:, None] * side, (np.arange(100) - 49.5) * side
        outside, inside = np.hypot(y, x) > 13, np.hypot(y, x) < 11
        assert np.isinf(depth[outside]).all() and np.isfinite(depth[inside]).all()
        wanted = np.linalg.norm((40, 40, 40)) / 2 - np.sqrt(np.maximum(144 - y**2 - x**2, 0))
        assert np.abs(depth - wanted)[inside].max() < 1.5
        cosine = np.sqrt(np.maximum(144 - y**2 - x**2, 0)) / 12
        assert np.abs(facing - cosine)[np.hypot(y, x) < 9].max() < 0.15
        assert light[inside][:20].mean() > light[inside][-20:].mean()       # the light is above


def test_seen_from_above_slices_look_as_on_a_screen():
    """Slice 0 hides the others; x runs to the right, y down; nothing is mirrored."""
    share = np.zeros((10, 40, 60), np.float32)
    share[:2, 5:15, 10:30] = 1
    share[5:, 25:35, 40:50] = 1
    depth, *_ = emseg.cast_rays(share, np.ones(3), -90, 90, 144)
    side = np.linalg.norm(share.shape) / 144
    rows, columns = [(np.arange(144) + 0.5 - 72) * side + half for half in (20, 30)]
    near = np.isfinite(depth) & (depth < np.nanmin(depth) + 2)
    found = [(rows[axis.min()], rows[axis.max()]) for axis in [np.nonzero(near)[0]]] + [
        (columns[axis.min()], columns[axis.max()]) for axis in [np.nonzero(near)[1]]]
    np.testing.assert_allclose(found, [(5, 15), (10, 30)], atol=1)
    assert depth[np.abs(rows - 30).argmin(), np.abs(columns - 45).argmin()] == pytest.approx(
        depth.min() + 5, abs=1)


def test_thin_sheets_do_not_vanish():
    """A membrane of one voxel that fills a third of its blocks is seen, and no thicker than it."""
    share = np.zeros((24, 24, 24), np.float32)
    share[:, :, 12] = 1 / 3
    depth, *_ = emseg.cast_rays(share, np.ones(3), 0, 0, 100)                # from its flat side
    side = np.linalg.norm(share.shape) / 100
    assert np.isfinite(depth).sum() * side**2 == pytest.approx(24 * 24, rel=0.1)
    depth, *_ = emseg.cast_rays(share, np.ones(3), -90, 0, 100)              # from its edge
    assert 0 < np.isfinite(depth).sum() * side**2 < 24 * 1.5


def test_rays_meet_a_face_between_two_samples_where_it_is():
    share = np.zeros((20, 30, 30), np.float32)
    share[10:] = 1                                  # its face goes through the middle
    (*_, up), (*_, toward) = emseg._eye_frame(-90, 60)[1:]
    depth, *_ = emseg.cast_rays(share, np.ones(3), -90, 60, 100)
    half = np.linalg.norm(share.shape) / 2
    height = half - (np.arange(100) + 0.5) * half / 50
    np.testing.assert_allclose(depth[40:60, 50], (half + height * up / toward)[40:60], atol=1e-3)


def sparse_share(density, shape, seed=0):
    return (np.random.default_rng(seed).random(shape) < density).astype(np.float32)


RAY_CASES = [(sparse_share(0.001, (24, 30, 40)), (1, 1, 1)),
             (sparse_share(0.01, (9, 40, 31)), (5, 1, 1)),
             (sparse_share(0.004, (30, 11, 13)), (1, 3, 4)),
             (sparse_share(0.3, (12, 13, 14)), (1, 1, 1)),
             (np.pad(np.full((1, 20, 20), 0.3, np.float32), ((9, 12), (0, 0), (0, 0))), (1, 1, 1)),
             (np.ones((6, 7, 8), np.float32), (2, 1, 1)),
             (np.pad(np.full((1, 1, 1), 0.01, np.float32), 7), (1, 1, 1))]
RAY_VIEWS = [(-60, 25), (120, 15), (0, 0), (-90, 90)]


@pytest.mark.parametrize("share, block", RAY_CASES)
def test_rays_leap_over_nothing(monkeypatch, share, block):
    """The same picture as from all samples of every ray."""
    def cast():
        return np.stack([emseg.cast_rays(share, np.array(block, float), *view, 70)
                         for view in RAY_VIEWS])

    leaping = cast()
    with monkeypatch.context() as patch:            # no cell allows to leave a sample out
        patch.setattr(emseg, "_leaps", lambda field, block, steps: torch.zeros(1, 1, 1, 1, 1))
        np.testing.assert_allclose(leaping, cast(), atol=1e-5)
    assert np.isfinite(leaping).any() == (share.max() > 0.01)


@pytest.mark.parametrize("share, block", RAY_CASES[:3])
@pytest.mark.parametrize("view", RAY_VIEWS)
def test_no_sample_that_rays_leap_over_is_inside(share, block, view):
    """From places all over the volume. Leaps a little longer, by 2 cells, would miss some."""
    field = torch.from_numpy(ndimage.gaussian_filter(share, 0.7))[None, None]
    field = field * (1 / field.max())
    extent = np.array(share.shape[::-1]) * block[::-1]
    toward = torch.from_numpy(emseg._eye_frame(*view)[2] * 2 / extent).float()
    steps = (toward.abs() * torch.tensor(share.shape[::-1]) / 2 * min(block) / 2).tolist()[::-1]
    leaps = emseg._leaps(field, np.array(block), steps)
    generator = torch.Generator().manual_seed(0)
    starts = torch.rand(20000, 1, 3, generator=generator) * 2.2 - 1.1   # a little outside too
    leap = F.grid_sample(leaps, starts[None, None], mode="nearest", padding_mode="border",
                         align_corners=False)[0, 0, 0]                  # (starts, 1)
    number = torch.arange(60)
    places = starts - (number * min(block) / 2)[:, None] * toward       # (starts, 60, 3)
    inside = F.grid_sample(field, places[None, None], align_corners=False)[0, 0, 0] > 0.5
    assert leap.max() > 4 and not (inside & (number < leap)).any()
    assert (inside & (number < leap + 2 * math.ceil(1 / max(steps)))).any()


def test_voxel_sizes_stretch_the_picture():
    flat = np.ones((4, 20, 20), np.float32)
    heights = []
    for z in (1.0, 5.0):
        depth, *_ = emseg.cast_rays(flat, np.array([z, 1.0, 1.0]), 0, 0, 100)
        rows = np.isfinite(depth).any(1).sum()
        heights.append(rows * np.linalg.norm((4 * z, 20, 20)) / 100)
    np.testing.assert_allclose(heights, [4, 20], atol=1)


def test_the_nearest_surface_covers_what_is_behind_it_unless_it_is_glass():
    def plane(distance):
        return np.stack([np.full((8, 8), distance), np.full((8, 8), 0.8), np.full((8, 8), 0.5)])

    empty = np.full((3, 8, 8), np.inf)
    first = emseg.compose([plane(1.0), plane(2.0)], [0, 1], [False, False])
    np.testing.assert_allclose(first, emseg.compose([plane(1.0), empty], [0, 1], [False, False]))
    assert first[4, 4].argmax() == 0                                        # orange
    through = emseg.compose([plane(1.0), plane(2.0)], [0, 1], [True, False])
    behind = emseg.compose([empty, plane(2.0)], [0, 1], [True, False])
    assert np.abs(through - behind).max() < np.abs(through - first).max()
    assert (emseg.compose([empty], [0], [False]) == 1).all()
    assert emseg._enclosing([plane(1.0), plane(2.0), plane(3.0)]) == [True, False, False]
    assert emseg._enclosing([plane(1.0)]) == [False]


@pytest.mark.parametrize("voxel_size", [None, (20.0, 8.0, 8.0)])
def test_save_surfaces_draws_every_class_in_its_colour(tmp_path, figures, voxel_size):
    ids = np.zeros((16, 40, 40), np.uint8)
    ids[ball(ids.shape, (8, 20, 20), 17, (1, 1, 1))] = 1
    ids[ball(ids.shape, (8, 14, 20), 5)] = 2
    rows = {"truth": InMemory(ids, voxel_size=voxel_size),
            "prediction": InMemory(np.zeros_like(ids), voxel_size=voxel_size)}
    emseg.save_surfaces(tmp_path / "surfaces.png", rows, CLASSES, pixels=80)
    axes = np.array(figures[0].axes).reshape(2, 4)
    assert [axis.get_title() for axis in axes[0]] == ["all", "turned", *CLASSES[1:]]
    pictures = [[axis.images[0].get_array() for axis in row] for row in axes]
    for k, picture in enumerate(pictures[0][2:]):
        inked = picture[(picture < 1).any(-1)]
        color = np.array(to_rgb(emseg.CLASS_COLORS[k]))
        shade = inked.mean(0) / inked.mean()
        assert len(inked) > 100 and np.abs(shade - color / color.mean()).max() < 0.4
    assert all((picture == 1).all() for picture in pictures[1])             # nothing predicted
    assert bool(axes[0, 0].lines) == (voxel_size is not None)               # the scale bar


def test_save_surfaces_of_nothing_is_a_white_picture(tmp_path):
    empty = InMemory(np.zeros((4, 12, 12), np.uint8))
    emseg.save_surfaces(tmp_path / "surfaces.png", {"prediction": empty}, CLASSES, pixels=40)
    assert (tmp_path / "surfaces.png").exists()


def write_log(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def test_save_curves_draws_losses_and_validation(tmp_path):
    write_log(tmp_path / "log.csv", [["epoch", "loss", "loss_sup", "loss_cps", "val_dice"],
                                     [0, 9.0, 1.0, 0.5, ""], [1, 9.0, 0.5, 0.2, 0.6],
                                     [2, 9.0, 0.2, 0.1, 0.8]])
    emseg.save_curves(tmp_path / "curves.png", tmp_path / "log.csv")
    left, right = np.array_split(imread(tmp_path / "curves.png"), 2, axis=1)
    assert has_color(left, "#1f77b4") > 1e-3 and has_color(left, "#ff7f0e") > 1e-3
    assert has_color(right, "#1f77b4") > 1e-3 and has_color(right, "#ff7f0e") == 0
    assert has_color(left, "#2ca02c") == 0         # the total of two terms is not drawn
    assert left.shape[0] < left.shape[1] * 2


def test_save_curves_leaves_gaps_where_nothing_was_measured(tmp_path, figures):
    write_log(tmp_path / "log.csv", [["epoch", "loss", "val_iou"], [3, 1.5, ""], [4, 0.5, 0.6]])
    emseg.save_curves(tmp_path / "curves.png", tmp_path / "log.csv")
    (loss,), (iou,) = [axis.lines for axis in figures[0].axes]
    assert loss.get_xdata().tolist() == [3, 4] and loss.get_ydata().tolist() == [1.5, 0.5]
    np.testing.assert_array_equal(iou.get_ydata(), [np.nan, 0.6])
    assert (loss.get_label(), iou.get_label()) == ("loss", "val_iou")


def test_save_curves_draws_a_line_for_each_stage(tmp_path, figures):
    write_log(tmp_path / "log.csv", [["stage", "epoch", "loss", "val_dice"],
                                     ["one", 0, 3.0, 0.1], ["one", 1, 2.0, 0.2],
                                     ["two", 2, 9.0, ""], ["two", 3, 8.0, 0.4]])
    emseg.save_curves(tmp_path / "curves.png", tmp_path / "log.csv")
    losses, dice = [axis.lines for axis in figures[0].axes]
    assert [line.get_label() for line in losses] == ["loss one", "loss two"]
    assert [line.get_xdata().tolist() for line in losses] == [[0, 1], [2, 3]]
    assert [line.get_ydata().tolist() for line in losses] == [[3.0, 2.0], [9.0, 8.0]]
    assert [line.get_label() for line in dice] == ["val_dice one", "val_dice two"]
    np.testing.assert_array_equal(dice[1].get_ydata(), [np.nan, 0.4])


def test_save_curves_without_validation_has_one_panel(tmp_path):
    for name, header, row in (("one", ["epoch", "loss"], [1.0]),
                              ("two", ["epoch", "loss", "val_iou"], [1.0, 0.5])):
        write_log(tmp_path / "log.csv", [header, [0, *row], [1, *row]])
        emseg.save_curves(tmp_path / f"{name}.png", tmp_path / "log.csv")
    one, two = [imread(tmp_path / f"{name}.png").shape for name in ("one", "two")]
    assert two[:2] == (one[0], 2 * one[1])


def test_save_curves_of_an_empty_log_writes_nothing(tmp_path):
    write_log(tmp_path / "log.csv", [["epoch", "loss"]])
    emseg.save_curves(tmp_path / "curves.png", tmp_path / "log.csv")
    assert not (tmp_path / "curves.png").exists()


def test_save_slice_dice_draws_every_class_against_z(tmp_path, figures):
    dice = np.array([[0.9, 0.1, np.nan], [0.9, 0.2, 0.5], [0.8, np.nan, 0.6], [0.7, 0.4, 0.7]])
    items = [("first", dice, [1]), ("second", dice[:2], [0, 1])]
    emseg.save_slice_dice(tmp_path / "slice_dice.png", items, CLASSES)
    figure = figures[0]
    assert [axis.get_title() for axis in figure.axes] == ["first", "second"]
    for axis, (_, wanted, marked) in zip(figure.axes, items):
        marks, lines = axis.lines[: len(marked)], axis.lines[len(marked) :]
        assert [mark.get_xdata() for mark in marks] == [[z, z] for z in marked]
        assert [line.get_label() for line in lines] == ["a", "b"]
        assert [line.get_color() for line in lines] == list(emseg.CLASS_COLORS[:2])
        for line, column in zip(lines, wanted.T[1:]):
            np.testing.assert_array_equal(line.get_xdata(), np.arange(len(wanted)))
            np.testing.assert_array_equal(line.get_ydata(), column)
        (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
        assert left < 0 and right > len(wanted) - 1 and low < 0 and high > 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "labelled slices", "a", "b"]
    picture = imread(tmp_path / "slice_dice.png")
    assert all(has_color(picture, color) > 1e-4 for color in emseg.CLASS_COLORS[:2])


def test_save_slice_dice_without_seen_slices_and_in_other_colours(tmp_path, figures):
    colors = ["#123456"]
    emseg.save_slice_dice(tmp_path / "one.png", [("x", np.full((3, 3), 0.5), [])], CLASSES, colors)
    lines = figures[0].axes[0].lines
    assert [line.get_color() for line in lines] == colors * 2
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["a", "b"]


def test_save_slice_dice_explains_the_marks_of_any_volume(tmp_path, figures):
    items = [("trained on", np.full((3, 2), 0.5), [1]), ("new", np.full((3, 2), 0.5), [])]
    for shown in items, items[::-1]:
        emseg.save_slice_dice(tmp_path / "slice_dice.png", shown, CLASSES[:2])
        texts = [text.get_text() for text in figures[-1].legends[0].get_texts()]
        assert sorted(texts) == ["a", "labelled slices"]
