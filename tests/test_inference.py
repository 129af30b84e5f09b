"""Inference and metrics: tiles against whole slices, scores by hand."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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
          progress=lambda done, total: None, **options):
    """Predict slab by slab into a writer."""
    stream = emseg.predict_by_slabs(predict, InMemory(image), shape, **options)
    emseg.predict_volume(stream, writer, functools.partial(emseg.class_ids, threshold=threshold),
                         shape, progress, downsample, probability)


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


@pytest.mark.parametrize("factor", [2, 3])
def test_downsampled_predictions_are_enlarged_linearly(factor):
    full = (3, 13, 18)
    small = random_ids((3, -(-13 // factor), -(-18 // factor)), 256)
    ids, prob = Writer(full), Writer(full)
    write(predict_grey, small, ids, full, prob, downsample=factor, pixels=13 * 18)
    wanted = ndimage.zoom(small / 255, (1, factor, factor), order=1, mode="nearest",
                          grid_mode=True)[:, :13, :18]
    np.testing.assert_allclose(prob.array, wanted, atol=1e-6)
    np.testing.assert_array_equal(ids.array, prob.array > 0.5)


@pytest.mark.parametrize("depth", [1, 3, 7, 20])
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
        before = writer.written.sum()
        write(predict_grey, volume, writer, volume.shape, pixels=400, rank=rank, world=world)
        steps.append(writer.written.sum() - before)
    assert (writer.written == 1).all() and max(steps) < 7
    np.testing.assert_array_equal(writer.array, volume > 127)


@pytest.mark.parametrize("pixels", [1, 10**6])
def test_a_full_disk_stops_the_prediction(pixels):
    volume = random_ids((3, 12, 15), 256)

    class Full(Writer):
        def __setitem__(self, slab, values):
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        write(predict_grey, volume, Full(volume.shape), volume.shape, pixels=pixels)


CONTEXTS = [1, 4, 15]


def padded_by_numpy(volume, context):
    """The volume with its end slices repeated, one less than `context` in all."""
    return np.pad(volume, ((context // 2, context - 1 - context // 2), (0, 0), (0, 0)), "edge")


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


# -- tiles and windows


@pytest.mark.parametrize("side, tile, grid", [(2048, 1152, 16), (100, 100, 1), (61, 20, 1)])
def test_weights_of_tiles_add_up_to_one(side, tile, grid):
    total = np.zeros(max(side, tile))
    for start, weight in emseg.tiles(side, tile, grid):
        assert start % grid == 0 and weight.min() >= 0
        total[start : start + tile] += weight.numpy()
    np.testing.assert_allclose(total, 1, atol=1e-5)


@pytest.mark.parametrize("size", [(70, 61), (40, 200)])
def test_tiles_give_what_the_whole_slice_gives(size, monkeypatch):
    """A network that sees seven pixels far: its tiles overlap by more."""
    torch.manual_seed(0)
    network = emseg.UNet(1, 2, 4, levels=2).eval()
    image = torch.randn(2, 1, *size)
    with torch.no_grad():
        whole = emseg.predict_slices(network, image)
        monkeypatch.setattr(emseg, "MAX_TILE", 40)
        tiled = emseg.predict_slices(network, image)
    assert tiled.shape == whole.shape == (2, 2, *size)
    assert (tiled - whole).abs().max() < 0.05 and (tiled - whole).abs().mean() < 2e-3


@pytest.mark.parametrize("depth, world", [(1, 1), (5, 3), (40, 1)])
def test_windows_blend_to_what_each_slice_is(depth, world):
    """A network that returns its slices: blending changes nothing, ranks share the slices."""
    volume = InMemory(random_ids((13, 6, 7), 200))

    def predict(window):
        return window[:, None].float()

    found = np.zeros((13, 6, 7))
    for rank in range(world):
        for slab, prob in emseg.predict_by_windows(predict, volume, depth, rank, world):
            assert not found[slab].any()
            found[slab] = prob[:, 0].numpy()
    np.testing.assert_allclose(found, volume[:], rtol=1e-5)


# -- scores of annotated slices


def confusion_by_loops(pred, label, n):
    counts = np.zeros((len(label), n, n), int)
    for place in np.ndindex(label.shape):
        if label[place] != IGNORE:
            counts[place[0], label[place], pred[place]] += 1
    return counts


ANNOTATED = [1, 4, 5, 8, 9, 11, 14]


def score_slices(predict, image, label, classes, context=1, threshold=0.5, rank=0, world=1):
    args = SimpleNamespace(classes=classes, threshold=threshold)
    return emseg.score_slices(SimpleNamespace(args=args, rank=rank, world=world), predict,
                              SimpleNamespace(image=image, target=label), context)


def test_score_slices_counts_the_annotated_slices_alone():
    image, sizes = InMemory(random_ids((16, 9, 8), 256)), []
    label = InMemory(random_ids((16, 9, 8), 3, ignore=0.2, seed=1), slices=ANNOTATED)
    found = score_slices(lambda x: sizes.append(len(x)) or predict_three(x), image, label, CLASSES)
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
    found = score_slices(predict, image, label, CLASSES[:2], context)
    assert sizes == [context] * 4
    padded = torch.from_numpy(padded_by_numpy(image.array, context))
    pred = emseg.class_ids(predict(padded)).numpy()[zs]
    np.testing.assert_array_equal(found, confusion_by_loops(pred, label.array[zs], 2))


def test_score_slices_at_another_threshold():
    image, label = InMemory(random_ids((4, 9, 8), 256)), InMemory(random_ids((4, 9, 8), 2))
    found = score_slices(predict_grey, image, label, CLASSES[:2], threshold=0.2)
    np.testing.assert_array_equal(
        found, confusion_by_loops((image.array > 51).astype(int), label.array, 2))


def test_ranks_share_the_annotated_slices_and_add_their_counts(monkeypatch):
    zs, image = list(range(1, 20, 2)), InMemory(random_ids((20, 9, 8), 256))
    label = InMemory(random_ids((20, 9, 8), 3, ignore=0.2, seed=1), slices=zs)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(7))
    parts = [score_slices(predict_three, image, label, CLASSES, rank=rank, world=3)
             for rank in range(3)]
    assert sorted(image.read_slices) == zs and all(part.any() for part in parts)
    whole = score_slices(predict_three, image, label, CLASSES)
    np.testing.assert_array_equal(sum(parts), 7 * whole)


# -- metrics


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


@pytest.mark.parametrize("n", [2, 3, 15, 16, 255])
def test_confusion_against_loops(n):
    pred, truth = random_ids((3, 20, 21), n), random_ids((3, 20, 21), n, ignore=0.2, seed=1)
    np.testing.assert_array_equal(emseg.confusion(pred, truth, n),
                                  confusion_by_loops(pred, truth, n))
