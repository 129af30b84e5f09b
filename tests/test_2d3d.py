"""train_2d3d.py: networks, the terms of eq. 1, jittered windows and what is done to them."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import nn

import emseg
import train_2d3d
from conftest import InMemory

IGNORE = emseg.IGNORE


def on_meta(model):
    """A network at full width, 1 input and 7 output channels, without memory."""
    with torch.device("meta"):
        return train_2d3d.MODELS[model](1, 7)


# -- networks

HYBRID = (5, 300, 300), (5, 296, 296)


@pytest.mark.parametrize("model, count, sides, wanted", [
    ("2d3d", 10_267_022, *HYBRID), ("2d3d-no-3x3x3", 9_916_238, *HYBRID),
    ("2d3d-no-multiloss", 10_267_022, *HYBRID), ("2d3d-no-pyramid", 7_882_311, *HYBRID),
    ("unet", 31_030_983, (572, 572), (388, 388)), ("unet3d-thin", 8_130_759, *HYBRID),
    ("unet3d-thick", 8_294_599, (16, 180, 180), (16, 180, 180)),
    ("unet3d-thick", 8_294_599, (6, 20, 24), (6, 20, 24)),
    ("deepvess", 1_930_479, (8, 38, 33), (2, 10, 5))])
def test_networks_have_the_papers_parameters_and_windows(model, count, sides, wanted):
    network = on_meta(model).eval()
    assert emseg.count_parameters(network) == count
    emseg.check_patch_size(network, sides, model)
    assert network(torch.empty(2, 1, *sides, device="meta")).shape == (2, 7, *wanted)
    assert [(a - b) // 2 for a, b in zip(sides[-2:], wanted[-2:])] == [network.margin] * 2
    if network.dims == 3:
        assert (sides[0] - wanted[0]) // 2 == getattr(network, "depth_margin", 0)


def hybrid_by_hand(state, x):
    """Figure 2 from the weights alone: (3D logits or None, 2D logits)."""
    def layer(name, x, function, **options):
        name = name if f"{name}.weight" in state else f"{name}.layer"
        kernel = state[f"{name}.weight"]
        kernel = kernel if kernel.dim() == 5 else kernel[:, :, None]
        if function is F.conv3d:
            options = {"padding": [side // 2 for side in kernel.shape[2:]]}
        return function(x, kernel, state[f"{name}.bias"], **options)

    def block(name, x):
        for number in range(0, 10, 2):                              # ReLUs have the odd numbers
            if any(key.startswith(f"{name}.{number}.") for key in state):
                x = layer(f"{name}.{number}", x, F.conv3d).relu()
        return x

    def enlarged(name, x):
        return layer(name, x, F.conv_transpose3d, stride=(1, 2, 2))

    skips = []
    for level in range(4):
        x = block(f"encoder.{level}", F.max_pool3d(x, (1, 2, 2)) if level else x)
        skips.append(x)
    for level in range(3):
        x = enlarged(f"up.{level}", x)
        top, left = [(a - b) // 2 for a, b in zip(skips[2 - level].shape[-2:], x.shape[-2:])]
        skip = skips[2 - level][..., top : top + x.shape[-2], left : left + x.shape[-1]]
        x = block(f"decoder.{level}", torch.cat([skip, x], 1))
    logits_2d = layer("predict_2d", x, F.conv3d)
    if "predict_3d.layer.weight" not in state:
        return None, logits_2d
    x = torch.cat([x, logits_2d], 1)
    small = layer("narrow.0", block("scale_1", F.max_pool3d(x, (1, 2, 2))), F.conv3d).relu()
    return (layer("predict_3d", block("scale_0", x) + enlarged("enlarge", small), F.conv3d),
            logits_2d)


@pytest.mark.parametrize("options", [{}, {"volumetric": False}, {"pyramid": False}], ids=str)
def test_hybrid_by_hand(options):
    torch.manual_seed(0)
    network = train_2d3d.Hybrid(1, 3, 2, **options).double()
    for parameter in network.parameters():          # no layer fades
        nn.init.normal_(parameter, std=0.3 if parameter.dim() == 1 else
                        (2 / parameter[0].numel()) ** 0.5)
    x = torch.randn(1, 1, 3, 44, 52, dtype=torch.float64)
    with torch.no_grad():
        wanted, found, alone = (hybrid_by_hand(network.state_dict(), x), network(x, both=True),
                                network(x))
    assert (wanted[0] is None) is (found[0] is None) is ("pyramid" in options)
    for ours, theirs in zip(found, wanted):
        if theirs is not None:
            assert theirs.shape == (1, 3, 3, 40, 48) and theirs.std() > 0.1
            torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(alone, wanted["pyramid" in options])


# -- weights

NEIGHBOURS = np.array([[1, 2, 1], [2, 0, 2], [1, 2, 1]]) / 12


def blobs(seed, sides=(80, 90), classes=4):
    """Class ids in patches of some pixels and some larger ones."""
    rng = np.random.default_rng(seed)
    fields = [ndimage.gaussian_filter(rng.normal(size=sides), sigma)
              for sigma in rng.uniform(1.5, 6, classes)]
    return np.argmax([field / field.std() for field in fields], axis=0).astype(np.uint8)


def test_edge_weights_are_the_authors_recipe_within_what_is_annotated():
    """One class after another; nothing flows over the border or from unannotated pixels."""
    label = blobs(2, (33, 41))
    label[blobs(12, (33, 41), 5) == 0] = IGNORE
    known, wanted = label != IGNORE, np.zeros(label.shape)
    beside = np.pad(known, 1)
    for target in range(4):
        source = known & (label != target)
        u = source.astype(float)
        for _ in range(50):
            padded, flow = np.pad(u, 1), 0
            for (y, x), share in np.ndenumerate(NEIGHBOURS):
                box = slice(y, y + 33), slice(x, x + 41)
                flow = flow + share * beside[box] * (padded[box] - u)
            u = np.maximum(0.98 * (u + 0.2 * flow), 0)
            u[source] = 1
        wanted += np.maximum(u - 0.2, 0) * (label == target)
    found = train_2d3d.edge_weights(label)
    assert found.dtype == np.float32 and wanted.max() > 0.5 and 0.05 < (~known).mean() < 0.5
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_edges_as_measured_with_the_authors_code():
    label = np.zeros((60, 80), np.uint8)
    label[:, 40:] = 1
    row = train_2d3d.edge_weights(label)[30, 36:44]
    np.testing.assert_allclose(row / row.max() * 25, [0, 0, 6.5, 25, 25, 6.5, 0, 0], atol=0.05)
    for gap, wanted in {1: [0.67], 2: [0.56, 0.56], 4: [0.41, 0.23, 0.23, 0.41]}.items():
        label[:] = 2
        label[:, 40 : 40 + gap] = 1
        row = train_2d3d.edge_weights(label)[30, 40 : 40 + gap]
        np.testing.assert_allclose(row, wanted, atol=0.006)


def test_weights_are_the_sum_of_three_and_share_their_scale():
    """W of two volumes, of which one is annotated in one slice."""
    first, second = np.stack([blobs(4, (30, 40)), blobs(5, (30, 40))]), blobs(6, (2, 30, 40))
    second[0], second[1, :5] = IGNORE, IGNORE
    train = [item_of(first, first), item_of(second, second, [1])]
    args = SimpleNamespace(weight_terms=(0.5, 2.0, 10.0), classes=list("abcd"))
    found = train_2d3d.error_weights(train, args, "cpu")
    labels = np.concatenate([first, second])
    edges = np.stack([train_2d3d.edge_weights(label) for label in labels])
    counts = np.bincount(labels[labels != IGNORE])
    balance = np.append(2 * counts.min() / counts, np.zeros(252))
    wanted = (0.5 + balance[labels] + 10 * edges / edges.max()) * (labels != IGNORE)
    np.testing.assert_allclose(np.concatenate(found), wanted, rtol=1e-5)


# -- windows


def item_of(image, label, slices=None):
    """What Windows need of an Item."""
    slices = np.arange(len(image)) if slices is None else np.array(slices)
    return SimpleNamespace(image=InMemory(image), target=InMemory(label, slices), slices=slices)


def windows_of(shape, slices=None, size=(2, 8, 10), margin=(0, 0), spacing=(1, 4, 5), reach=0):
    """Windows of a volume whose voxels differ everywhere in image, label and weight."""
    ids = np.arange(np.prod(shape)).reshape(shape)
    network = SimpleNamespace(dims=3, stride=1, offset=0, min_depth=1, depth_margin=margin[0],
                              margin=margin[1])
    args = SimpleNamespace(model="", seed=0, elastic=reach, spacing=spacing, patch_size=[
        side + 2 * more for side, more in zip(size, (margin[0], margin[1], margin[1]))])
    item = item_of(ids.astype(np.int32), (ids % 7).astype(np.uint8), slices)
    windows = train_2d3d.Windows([item], network, args)
    windows.weights = [ids.astype(np.float32) / 2]
    return windows


@pytest.mark.parametrize("model, count", [
    ("2d3d", 828), ("unet", 1800), ("unet3d-thin", 300), ("unet3d-thick", 9 * 6 * 6),
    ("deepvess", 25 * 40 * 40)])
def test_windows_in_an_epoch_of_the_papers_volume(model, count):
    flat = np.broadcast_to(np.uint8(0), (50, 800, 800))
    args = SimpleNamespace(model=model, elastic=19.5, seed=0, **train_2d3d.settings_of(model))
    windows = train_2d3d.Windows([item_of(flat, flat)], on_meta(model), args)
    assert len(windows) == count and windows.reach == 20


def places(windows, passes=0):
    """(z, y, x) of the items of a pass, which are read from their voxels."""
    shape, (m_z, m), r = windows.images[0].shape, windows.margin, windows.reach
    found = []
    for i in range(len(windows)):
        image, label, weight, corner = windows[passes * len(windows) + i]
        place = np.unravel_index(int(image[m_z, m + r, m + r]), shape)
        assert corner.dtype == torch.int64 and corner.tolist() == list(place[1:])
        found.append(tuple(map(int, place)))
    return found


def test_every_bin_once_in_a_pass():
    """Corners lie on 0..7, 0..12 and 0..21: bins of 3, 5 and 9, the last of them cut off."""
    windows = windows_of((9, 20, 31), spacing=(3, 5, 9))
    wanted = [*itertools.product(range(3), range(3), range(3))]
    orders = []
    for passes in range(4):
        found = places(windows, passes)
        bins = [(z // 3, y // 5, x // 9) for z, y, x in found]
        assert sorted(bins) == wanted and bins != wanted
        assert all(z <= 7 and y <= 12 and x <= 21 for z, y, x in found)
        orders.append(found)
    assert len({*map(tuple, orders)}) == len({tuple(sorted(order)) for order in orders}) == 4


@pytest.mark.parametrize("margin, reach", [((0, 0), 0), ((0, 2), 3), ((3, 14), 20)])
def test_items_are_cut_from_the_mirrored_volume(margin, reach):
    windows = windows_of((6, 26, 31), margin=margin, reach=reach, size=(3, 8, 10),
                         spacing=(2, 5, 9))
    (m_z, m), (d, h, w) = margin, windows.size
    beyond = m + reach
    image, label, weight = [np.pad(array, [(m_z, m_z), (beyond, beyond), (beyond, beyond)],
                                   mode="symmetric")
                            for array in (windows.images[0].array, windows.labels[0].array,
                                          windows.weights[0])]
    for (z, y, x), item in zip(places(windows), map(windows.__getitem__, range(len(windows)))):
        box = slice(y, y + h + 2 * beyond), slice(x, x + w + 2 * beyond)
        np.testing.assert_array_equal(item[0], image[(slice(z, z + d + 2 * m_z), *box)])
        for found, array in zip(item[1:], (label, weight)):
            np.testing.assert_array_equal(found, array[(slice(z + m_z, z + d + m_z), *box)])
    assert item[1].dtype == torch.uint8 and item[2].dtype == torch.float32


@pytest.mark.parametrize("slices", [[3, 17, 30], [39], [6, 7, 8]], ids=str)
def test_every_window_holds_an_annotated_slice(slices):
    windows = windows_of((40, 10, 12), slices, size=(5, 8, 10), spacing=(2, 4, 5))
    seen = set()
    for passes in range(4):
        for z, y, x in places(windows, passes):
            held = set(range(z, z + 5)) & set(slices)
            assert held and 0 <= z <= 35
            seen |= held
    assert seen == set(slices)


# -- augmentation

PLAIN = dict(reflect=False, brightness=0.0, contrast=0.0)
NORMALIZATION = {"mean": 100.0, "std": 50.0}


def batch_of(size, margin, reach, images, corner=None):
    """Windows of this geometry, and a batch as they would give it; its labels are the image."""
    windows = SimpleNamespace(size=list(size), margin=margin, reach=reach)
    labels = images[:, margin[0] : images.shape[1] - margin[0]].clone()
    corner = torch.zeros(len(images), 2, dtype=torch.int64) if corner is None else corner
    return windows, (images, labels, labels / 2, corner)


def augmented(windows, batch, field=torch.zeros(60, 60, 2), **changed):
    torch.manual_seed(0)
    return train_2d3d.augment(batch, windows, field, NORMALIZATION,
                              SimpleNamespace(**{**PLAIN, **changed}))


def grey(image):
    """Network input (B, 1, Z, H, W) -> grey levels (B, Z, H, W)."""
    return image[:, 0] * NORMALIZATION["std"] + NORMALIZATION["mean"]


def test_reflections_come_in_eight_kinds_alike_in_image_label_and_weight():
    size, margin, reach = (2, 3, 5), (0, 1), 2
    (d, h, w), (m_z, m), r, B = size, margin, reach, 800
    shape = d + 2 * m_z, h + 2 * m + 2 * r, w + 2 * m + 2 * r
    ids = torch.arange(math.prod(shape)).view(shape)
    windows, batch = batch_of(size, margin, reach, ids.expand(B, -1, -1, -1))
    image, label, weight = augmented(windows, batch, reflect=True)
    ids = ids[:, r : r + h + 2 * m, r : r + w + 2 * m]
    kinds = {axes: ids.flip(axes) for n in range(4) for axes in itertools.combinations(range(3), n)}
    counts = dict.fromkeys(kinds, 0)
    for b in range(B):
        (kind,) = [axes for axes, wanted in kinds.items()
                   if torch.allclose(grey(image)[b], wanted.float(), atol=0.1)]
        inner = kinds[kind][m_z : m_z + d, m : m + h, m : m + w]
        assert torch.equal(label[b], inner) and torch.equal(weight[b], inner / 2)
        counts[kind] += 1
    assert all(65 < count < 135 for count in counts.values()), counts       # 100 +- 9.4


@pytest.mark.parametrize("dx, dy", [(3, -2), (-4, 0), (0, 4)])
def test_a_constant_displacement_shifts(dx, dy):
    size, margin, r = (2, 8, 12), (0, 2), 4
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 2, 20, 24)))
    windows, batch = batch_of(size, margin, r, image, corner=torch.tensor([[0, 0], [5, 9], [1, 2]]))
    field = torch.tensor([dx, dy]).float().expand(30, 40, 2)
    found, label, weight = augmented(windows, batch, field)
    wanted = image[:, :, r + dy : r + dy + 12, r + dx : r + dx + 16]
    torch.testing.assert_close(grey(found), wanted.float(), atol=0.05, rtol=0)
    assert torch.equal(label, wanted[:, :, 2:-2, 2:-2])
    assert torch.equal(weight, wanted[:, :, 2:-2, 2:-2] / 2)


def test_brightness_is_a_shift_and_then_contrast_a_factor():
    """Two grey levels in an image tell its shift and its factor."""
    image = torch.tensor([90, 210]).expand(2000, 1, 2, 2)
    windows, batch = batch_of((1, 2, 2), (0, 0), 0, image)
    found, label, weight = augmented(windows, batch, brightness=0.12, contrast=0.2)
    assert torch.equal(label, image) and torch.equal(weight, image / 2)
    low, high = found[:, 0, 0].double().unbind(2)                       # (2000, 2)
    factor = (high - low) / (120 / 50)
    shift = (low / factor - (90 - 100) / 50) * 50 / 255
    for values, middle, most in (shift, 0, 0.12), (factor, 1, 0.2):
        values = (values - middle).numpy()
        assert np.ptp(values, axis=1).max() < 1e-5                      # one for an image
        assert 0.97 * most < values.max() < most + 1e-5
        assert 0.97 * most < -values.min() < most + 1e-5
        assert abs(values.mean()) < 0.06 * most


def elastic(epoch=0, seed=0, reach=20):
    windows = SimpleNamespace(images=[np.zeros((3, 50, 200)), np.zeros((9, 120, 60))],
                              margin=(0, 2), reach=reach)
    args = SimpleNamespace(elastic=20.0, seed=seed)
    return train_2d3d.elastic_map(args, windows, epoch, torch.device("cpu"))


def test_an_epoch_has_one_elastic_map_of_the_largest_volume():
    one = elastic()
    assert one.shape == (120 + 4, 200 + 4, 2)
    torch.rand(5)
    assert torch.equal(one, elastic())
    for other in elastic(epoch=1), elastic(seed=1):
        assert (one - other).abs().mean() > 2
    fields = torch.stack([elastic(epoch) for epoch in range(30)])
    assert 15 < fields.abs().max() <= 20 and fields.mean().abs() < 1     # not shifted by 20
    assert elastic(reach=4).abs().max() == 4                # what a window reads is enough


# -- settings


@pytest.mark.parametrize("model", sorted(train_2d3d.MODELS))
def test_every_model_has_settings_that_it_accepts(model):
    settings = train_2d3d.settings_of(model)
    emseg.check_patch_size(on_meta(model), settings["patch_size"], model)
    args = train_2d3d.parse_args(["--volume", "a", "--label", "b", "--model", model])
    assert settings.items() <= vars(args).items()


def test_the_papers_settings():
    args = train_2d3d.parse_args(["--volume", "a", "--label", "b"])
    wanted = dict(model="2d3d", patch_size=[5, 300, 300], spacing=[2, 100, 100], epochs=40, lr=1e-3,
                  batch_size=1, normalize="volume", weight_terms=[0.01, 1, 25], elastic=20,
                  reflect=True, brightness=0.12, contrast=0.2, c_2d=0.33, decay_steps=2512,
                  stop_miou=0.3, instances=1)
    assert {name: getattr(args, name) for name in wanted} == wanted
    assert f"{args.l2_2d:.1e} {args.l2_3d:.1e} {args.l2_p:.1e}" == "2.3e-11 1.1e-11 1.1e-15"
    assert train_2d3d.STOP_EPOCH == 10
    assert math.log10(train_2d3d.settings_of("unet")["lr"]) == pytest.approx(-3.3)
    assert train_2d3d.settings_of("unet5") == train_2d3d.settings_of("senformer")
