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
OWN = ["2d3d", "2d3d-no-3x3x3", "2d3d-no-multiloss", "2d3d-no-pyramid", "unet", "unet3d-thin",
       "unet3d-thick", "deepvess"]
COUNTS = dict(zip(OWN, (10_267_022, 9_916_238, 10_267_022, 7_882_311, 31_030_983, 8_130_759,
                        8_294_599, 1_930_479)))


def on_meta(model):
    """A network at full width, 1 input and 7 output channels, without memory."""
    with torch.device("meta"):
        return train_2d3d.MODELS[model](1, 7)


def output_shape(network, *sides):
    with torch.device("meta"):
        return tuple(network.eval()(torch.empty(2, 1, *sides)).shape)


def random_network(make, *arguments, **options):
    """In float64, with biases, and with weights under which no layer fades."""
    torch.manual_seed(0)
    network = make(*arguments, **options).double().eval()
    for module in network.modules():
        if isinstance(module, (*train_2d3d.CONVOLUTIONS, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return network


# -- networks


@pytest.mark.parametrize("model", OWN)
def test_parameter_counts_are_the_papers(model):
    assert emseg.count_parameters(on_meta(model)) == COUNTS[model]


@pytest.mark.parametrize("model, sides, wanted", [
    *[(model, (5, 300, 300), (5, 296, 296)) for model in OWN if model.startswith("2d3d")],
    ("unet3d-thin", (5, 300, 300), (5, 296, 296)), ("unet", (572, 572), (388, 388)),
    ("unet3d-thick", (16, 180, 180), (16, 180, 180)), ("deepvess", (7, 33, 33), (1, 5, 5))])
def test_windows_of_the_paper(model, sides, wanted):
    network = on_meta(model)
    emseg.check_patch_size(network, sides, model)
    assert output_shape(network, *sides) == (2, 7, *wanted)
    assert [(a - b) // 2 for a, b in zip(sides[-2:], wanted[-2:])] == [network.margin] * 2
    if network.dims == 3:
        assert (sides[0] - wanted[0]) // 2 == getattr(network, "depth_margin", 0)


def layer_of(state, name):
    """Kernel with five dimensions and bias of a layer, whether it is 2D or 3D."""
    inner = name if f"{name}.weight" in state else f"{name}.layer"
    kernel = state[f"{inner}.weight"]
    return kernel if kernel.dim() == 5 else kernel[:, :, None], state[f"{inner}.bias"]


def convolved(state, name, x):
    kernel, bias = layer_of(state, name)
    return F.conv3d(x, kernel, bias, padding=[side // 2 for side in kernel.shape[2:]])


def enlarged(state, name, x):
    kernel, bias = layer_of(state, name)
    return F.conv_transpose3d(x, kernel, bias, stride=kernel.shape[2:])


def rectified(state, name, x):
    """All convolutions of a block, each with a ReLU."""
    numbers = {int(key[len(name) + 1:].split(".")[0]) for key in state
               if key.startswith(f"{name}.")}
    for number in sorted(numbers):
        x = convolved(state, f"{name}.{number}", x).relu()
    return x


def center(x, sides):
    top, left = [(a - b) // 2 for a, b in zip(x.shape[-2:], sides)]
    return x[..., top : top + sides[0], left : left + sides[1]]


def hybrid_by_hand(state, x):
    skips = []
    for level in range(4):
        x = rectified(state, f"encoder.{level}", F.max_pool3d(x, (1, 2, 2)) if level else x)
        skips.append(x)
    for level in range(3):
        x = enlarged(state, f"up.{level}", x)
        x = torch.cat([center(skips[2 - level], x.shape[-2:]), x], 1)
        x = rectified(state, f"decoder.{level}", x)
    logits_2d = convolved(state, "predict_2d", x)
    if "predict_3d.layer.weight" not in state:
        return None, logits_2d
    x = torch.cat([x, logits_2d], 1)
    small = rectified(state, "scale_1", F.max_pool3d(x, (1, 2, 2)))
    small = enlarged(state, "enlarge", convolved(state, "narrow.0", small).relu())
    return convolved(state, "predict_3d", rectified(state, "scale_0", x) + small), logits_2d


@pytest.mark.parametrize("options", [{}, {"volumetric": False}, {"pyramid": False}], ids=str)
def test_hybrid_by_hand(options):
    network = random_network(train_2d3d.Hybrid, 1, 3, 2, **options)
    x = torch.randn(1, 1, 3, 44, 52, dtype=torch.float64)
    with torch.no_grad():
        wanted = hybrid_by_hand(network.state_dict(), x)
        found = network(x, both=True)
        alone = network(x)
    for ours, theirs in zip(found, wanted, strict=True):
        if theirs is None:
            assert ours is None
            continue
        assert theirs.shape == (1, 3, 3, 40, 48) and theirs.std() > 0.1
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(alone, wanted[0] if network.has_pyramid else wanted[1])


def same_unet3d_by_hand(state, x, thick):
    Z, H, W = x.shape[2:]
    if thick:
        x = F.pad(x, (0, 0, 0, 0, 0, -Z % 4), mode="replicate")
    pool, m = (2, 2, 2) if thick else (1, 2, 2), 0 if thick else 2
    one = rectified(state, "encoder.0", x)
    two = rectified(state, "encoder.1", F.max_pool3d(one, pool))
    x = rectified(state, "encoder.2", F.max_pool3d(two, pool))
    x = rectified(state, "decoder.0", torch.cat([two, enlarged(state, "up.0", x)], 1))
    x = rectified(state, "decoder.1", torch.cat([one, enlarged(state, "up.1", x)], 1))
    return convolved(state, "head", x)[:, :, :Z, m : H - m, m : W - m]


@pytest.mark.parametrize("depth", [1, 4, 6])
@pytest.mark.parametrize("thick", [False, True])
def test_3d_unets_by_hand(thick, depth):
    model = "unet3d-thick" if thick else "unet3d-thin"
    network = random_network(train_2d3d.MODELS[model], 1, 3, 4)
    x = torch.randn(2, 1, depth, 16, 20, dtype=torch.float64)
    with torch.no_grad():
        wanted = same_unet3d_by_hand(network.state_dict(), x, thick)
        assert wanted.std() > 0.02
        torch.testing.assert_close(network(x), wanted)


def deepvess_window_by_hand(state, x):
    """A window (C, 7, 33, 33) -> logits (classes, 5, 5)."""
    for number in range(5):
        x = F.conv3d(x, *[state[f"convolutions.{number}.{part}"] for part in ("weight", "bias")])
        x = x.relu()
        if number == 2:
            x = F.pad(x, (0, 1, 0, 1), value=-math.inf)             # 27 -> 28, of which 14
        if number in (2, 4):
            x = F.max_pool3d(x, (1, 2, 2))
    x = (state["hidden.weight"] @ x.flatten() + state["hidden.bias"]).relu()
    return (state["head.weight"] @ x + state["head.bias"]).view(-1, 5, 5)


def test_deepvess_sees_each_block_in_a_window_of_its_own():
    network = random_network(train_2d3d.DeepVess, 2, 3, 2)
    x = torch.randn(2, 2, 8, 38, 43, dtype=torch.float64)
    wanted = torch.zeros(2, 3, 2, 10, 15, dtype=torch.float64)
    for b, z, i, j in np.ndindex(2, 2, 2, 3):
        window = x[b, :, z : z + 7, 5 * i : 5 * i + 33, 5 * j : 5 * j + 33]
        wanted[b, :, z, 5 * i : 5 * i + 5, 5 * j : 5 * j + 5] = deepvess_window_by_hand(
            network.state_dict(), window)
    assert wanted.std() > 0.1
    with torch.no_grad():
        torch.testing.assert_close(network(x), wanted)


# -- L2 terms and Adam's epsilon

PRINTED = SimpleNamespace(l2_2d=10**-4.7, l2_3d=1e-5, l2_p=1e-9)


def test_the_l2_terms_in_closed_form():
    network = random_network(train_2d3d.Hybrid, 1, 3, 2)

    def of(*starts):
        return sum(value.square().sum().item() for name, value in network.state_dict().items()
                   if name.startswith(starts))

    parts = [of("encoder", "up", "decoder"), of("scale_0", "scale_1", "narrow", "enlarge"),
             of("predict_2d", "predict_3d")]
    assert sum(parts) == pytest.approx(of("")) and min(parts) > 1
    for factors in ((2, 3, 5), (7, 7, 7), (0, 1, 0)):
        args = SimpleNamespace(**dict(zip(("l2_2d", "l2_3d", "l2_p"), factors)))
        value = train_2d3d.l2_terms(network, args)
        assert value.item() == pytest.approx(np.dot(factors, parts))


def five_steps(loss_of, lambdas, epsilon):
    """All weights after five steps of Adam on a window; loss_of: mean cross entropy, L2 -> loss."""
    network = random_network(train_2d3d.Hybrid, 1, 3, 2)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, eps=epsilon)
    image = torch.randn(1, 1, 2, 36, 36, dtype=torch.float64)
    label = torch.randint(0, 3, (1, 2, 32, 32))
    for _ in range(5):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(image), label)
        loss_of(loss, train_2d3d.l2_terms(network, lambdas)).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def test_the_mean_loss_trains_as_the_authors_sum():
    """They sum over the N voxels of a window and halve the squares; eq. 1 as printed on a mean is
    another training: its L2 terms move the weights."""
    N = 5 * 296 * 296
    theirs = five_steps(lambda loss, l2: N * loss + l2 / 2, PRINTED, 1e-7)
    defaults = SimpleNamespace(**train_2d3d.LAMBDAS)
    ours = five_steps(lambda loss, l2: loss + l2, defaults, train_2d3d.EPSILON)
    torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=0)
    as_printed = five_steps(lambda loss, l2: loss + l2, PRINTED, 1e-7)
    assert (as_printed - theirs).abs().max() > 1e-4


# -- weights


NEIGHBOURS = np.array([[1, 2, 1], [2, 0, 2], [1, 2, 1]]) / 12


def blobs(seed, sides=(80, 90), classes=4):
    """Class ids in patches of some pixels and some larger ones."""
    rng = np.random.default_rng(seed)
    fields = [ndimage.gaussian_filter(rng.normal(size=sides), sigma)
              for sigma in rng.uniform(1.5, 6, classes)]
    return np.argmax([field / field.std() for field in fields], axis=0).astype(np.uint8)


def recipe(label, step):
    """The authors' recipe, one class after another; step: u -> its part that flows."""
    total = np.zeros(label.shape)
    for target in set(np.unique(label)) - {IGNORE}:
        source = (label != target) & (label != IGNORE)
        u = source.astype(float)
        for _ in range(50):
            u = np.maximum(0.98 * (u + 0.2 * step(u)), 0)
            u[source] = 1
        total += np.maximum(u - 0.2, 0) * (label == target)
    return total


@pytest.mark.parametrize("seed", [0, 1])
def test_edge_weights_are_the_authors_recipe_class_by_class(seed):
    """Away from the border, beyond which the authors' slices repeat themselves (FFT)."""
    label = blobs(seed)
    kernel = np.zeros(label.shape)
    kernel[:3, :3] = NEIGHBOURS - [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
    kernel = np.fft.fft2(np.roll(kernel, (-1, -1), (0, 1)))
    wanted = recipe(label, lambda u: np.fft.ifft2(np.fft.fft2(u) * kernel).real)
    found = train_2d3d.edge_weights(label[None])
    assert found.dtype == np.float32 and found.shape == (1, *label.shape)
    inner = slice(20, -20)
    assert len(np.unique(label[inner, inner])) == 4 and wanted[inner, inner].max() > 0.5
    np.testing.assert_allclose(found[0, inner, inner], wanted[inner, inner], atol=1e-5)


@pytest.mark.parametrize("seed", [2, 3])
def test_nothing_flows_over_the_border_or_from_what_nobody_annotated(seed):
    label = blobs(seed, (33, 41))
    label[blobs(seed + 10, (33, 41), 5) == 0] = IGNORE
    def neighbours(x):
        return ndimage.convolve(x, NEIGHBOURS, mode="constant")
    known = (label != IGNORE).astype(float)
    share = neighbours(known)
    wanted = recipe(label, lambda u: neighbours(u * known) - share * u)
    found = train_2d3d.edge_weights(label[None])[0]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert (found[label == IGNORE] == 0).all() and 0.05 < (label == IGNORE).mean() < 0.5


def test_edges_as_measured_with_the_authors_code():
    label = np.zeros((1, 60, 80), np.uint8)
    label[:, :, 40:] = 1
    row = train_2d3d.edge_weights(label)[0, 30, 36:44]
    np.testing.assert_allclose(row / row.max() * 25, [0, 0, 6.5, 25, 25, 6.5, 0, 0], atol=0.05)
    for gap, wanted in {1: [0.67], 2: [0.56, 0.56], 4: [0.41, 0.23, 0.23, 0.41],
                        6: [0.36, 0.12, 0.01, 0.01, 0.12, 0.36]}.items():
        label[:] = 2
        label[:, :, 40 : 40 + gap] = 1
        row = train_2d3d.edge_weights(label)[0, 30, 40 : 40 + gap]
        np.testing.assert_allclose(row, wanted, atol=0.006)
    y, x = np.indices((60, 80))
    for radius, wanted in (2, 0.45), (6, 0), (9, 0):
        label[0] = (y - 30) ** 2 + (x - 40) ** 2 <= radius**2
        assert train_2d3d.edge_weights(label)[0, 30, 40] == pytest.approx(wanted, abs=0.005)


def test_weights_are_the_sum_of_three():
    label = np.array([[[0, 2, IGNORE]]], np.uint8)
    edges = np.array([[[3, 5, 7]]], np.float32)
    found = train_2d3d.voxel_weights(label, edges, np.array([0.1, 0.5, 1.0]), 0.01)
    np.testing.assert_allclose(found, [[[3.11, 6.01, 0]]], rtol=1e-6)


# -- windows


def volume_of(shape, slices=None):
    """Image, label and weight whose voxels differ everywhere, and the annotated z."""
    ids = np.arange(np.prod(shape)).reshape(shape)
    zs = np.arange(shape[0]) if slices is None else np.array(slices)
    label = np.full(shape, IGNORE, np.uint8)
    label[zs] = (ids % 7).astype(np.uint8)[zs]
    return (InMemory(ids.astype(np.int32)), InMemory(label, zs),
            InMemory(ids.astype(np.float32) / 2), zs)


def windows_of(*volumes, size=(2, 8, 10), margin=(0, 0), spacing=(1, 4, 5), reach=0, seed=0):
    images, labels, weights, slices = map(list, zip(*volumes))
    windows = train_2d3d.Windows(images, labels, slices, list(size), margin, list(spacing), reach,
                                 seed)
    windows.weights = weights
    return windows


def windows_for(model, shape):
    """Windows as the command makes them, of a volume of this shape."""
    flat, zs = np.broadcast_to(np.uint8(0), shape), np.arange(shape[0])
    args = SimpleNamespace(model=model, elastic=20.0, seed=0, **train_2d3d.settings_of(model))
    item = SimpleNamespace(image=InMemory(flat), target=InMemory(flat, zs), slices=zs)
    return train_2d3d.make_windows(args, [item], on_meta(model))


@pytest.mark.parametrize("model, count, size, margin", [
    ("2d3d", 828, [5, 296, 296], (0, 2)),
    ("unet", 1800, [1, 388, 388], (0, 92)), ("unet3d-thin", 300, [5, 296, 296], (0, 2)),
    ("unet3d-thick", 9 * 6 * 6, [16, 180, 180], (0, 0)),
    ("deepvess", 25 * 40 * 40, [1, 5, 5], (3, 14))])
def test_windows_in_an_epoch_of_the_papers_volume(model, count, size, margin):
    windows = windows_for(model, (50, 800, 800))
    assert len(windows) == count
    assert (list(windows.size), windows.margin, windows.reach) == (size, margin, 20)


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
    windows = windows_of(volume_of((9, 20, 31)), spacing=(3, 5, 9))
    wanted = [*itertools.product(range(3), range(3), range(3))]
    orders = []
    for passes in range(4):
        found = places(windows, passes)
        bins = [(z // 3, y // 5, x // 9) for z, y, x in found]
        assert sorted(bins) == wanted and bins != wanted
        assert all(z <= 7 and y <= 12 and x <= 21 for z, y, x in found)
        orders.append(found)
    assert len({*map(tuple, orders)}) == len({tuple(sorted(order)) for order in orders}) == 4


@pytest.mark.parametrize("margin, reach", [((0, 0), 0), ((0, 2), 3), ((2, 3), 1), ((3, 14), 20)])
def test_items_are_cut_from_the_mirrored_volume(margin, reach):
    image, label, weight, zs = volume_of((6, 26, 31))
    windows = windows_of((image, label, weight, zs), margin=margin, reach=reach, size=(3, 8, 10),
                         spacing=(2, 5, 9))
    (m_z, m), (d, h, w) = margin, windows.size
    beyond = m + reach
    whole = np.pad(image.array, [(m_z, m_z), *[(beyond, beyond)] * 2], mode="symmetric")
    flat = [np.pad(array, [(0, 0), *[(beyond, beyond)] * 2], mode="symmetric")
            for array in (label.array, weight.array)]
    for (z, y, x), item in zip(places(windows), map(windows.__getitem__, range(len(windows)))):
        box = slice(y, y + h + 2 * beyond), slice(x, x + w + 2 * beyond)
        np.testing.assert_array_equal(item[0], whole[(slice(z, z + d + 2 * m_z), *box)])
        for found, array in zip(item[1:], flat):
            np.testing.assert_array_equal(found, array[(slice(z, z + d), *box)])
    assert item[1].dtype == torch.uint8 and item[2].dtype == torch.float32


@pytest.mark.parametrize("slices", [[3, 17, 30], [0], [39], [6, 7, 8]], ids=str)
def test_every_window_holds_an_annotated_slice(slices):
    windows = windows_of(volume_of((40, 10, 12), slices=slices), size=(5, 8, 10),
                         spacing=(2, 4, 5))
    seen = set()
    for passes in range(4):
        for z, y, x in places(windows, passes):
            held = set(range(z, z + 5)) & set(slices)
            assert held and 0 <= z <= 35
            seen |= held
    assert seen == set(slices)


def test_windows_that_do_not_fit_are_refused():
    with pytest.raises(emseg.InputError, match="do not fit into slices of 295 x 400"):
        windows_for("2d3d", (9, 295, 400))
    assert len(windows_for("2d3d", (5, 296, 296))) == 1
    with pytest.raises(emseg.InputError, match="has 4 slices, and a window predicts 5; give fewer"):
        windows_for("2d3d", (4, 400, 400))


# -- augmentation


PLAIN = dict(elastic=0.0, reflect=False, brightness=0.0, contrast=0.0)
NORMALIZATION = {"mode": "volume", "mean": 100.0, "std": 50.0}


def batch_of(size, margin, reach, images, corner=None):
    """Windows of this geometry, and a batch as they would give it; its labels are the image."""
    windows = SimpleNamespace(size=list(size), margin=margin, reach=reach)
    labels = images[:, margin[0] : images.shape[1] - margin[0]].clone()
    corner = torch.zeros(len(images), 2, dtype=torch.int64) if corner is None else corner
    return windows, (images, labels, labels / 2, corner)


def augmented(windows, batch, field=None, **changed):
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


def test_brightness_is_a_shift_and_then_contrast_a_factor(brightness=0.12, contrast=0.2):
    """Two grey levels in an image tell its shift and its factor."""
    image = torch.full((2000, 1, 2, 4), 90)
    image[..., 2:] = 210
    windows, batch = batch_of((1, 2, 4), (0, 0), 0, image)
    found, label, weight = augmented(windows, batch, brightness=brightness, contrast=contrast)
    assert torch.equal(label, image) and torch.equal(weight, image / 2)
    low, high = found[:, 0, 0, :, :2].double(), found[:, 0, 0, :, 2:].double()
    for part in low, high:
        assert (part.amax((1, 2)) - part.amin((1, 2))).max() < 1e-5     # one of each for an image
    low, high = low.mean((1, 2)), high.mean((1, 2))
    factor = (high - low) / (120 / 50)
    shift = (low / factor - (90 - 100) / 50) * 50 / 255
    for values, middle, most in (shift, 0, brightness), (factor, 1, contrast):
        values = (values - middle).numpy()
        assert np.abs(values).max() < most + 1e-5
        assert values.max() > 0.97 * most - 1e-5 and values.min() < -0.97 * most + 1e-5
        assert abs(values.mean()) < 0.06 * most


# -- elastic map


def elastic(epoch=0, seed=0, amplitude=20.0, reach=20, shapes=((3, 90, 130),)):
    windows = SimpleNamespace(images=[InMemory(np.zeros(shape, np.uint8)) for shape in shapes],
                              margin=(0, 2), reach=reach)
    args = SimpleNamespace(elastic=amplitude, seed=seed)
    return train_2d3d.elastic_map(args, windows, epoch, torch.device("cpu"))


def test_an_epoch_has_one_elastic_map_of_the_largest_volume():
    one = elastic(shapes=[(3, 50, 200), (9, 120, 60)])
    assert one.shape == (120 + 4, 200 + 4, 2)
    torch.rand(5)
    assert torch.equal(one, elastic(shapes=[(3, 50, 200), (9, 120, 60)]))
    for other in (elastic(epoch=1), elastic(seed=1)):
        assert (elastic() - other).abs().mean() > 2
    fields = torch.stack([elastic(epoch) for epoch in range(30)])
    assert 15 < fields.abs().max() <= 20 and fields.mean().abs() < 1     # not shifted by 20
    assert elastic(reach=4).abs().max() == 4                # what a window reads is enough


def test_the_elastic_map_is_as_rough_as_in_the_authors_code():
    """Uniform noise every 40 pixels, smoothed by 0.6 of them, cubic in between."""
    rng = np.random.default_rng(0)
    theirs = np.stack([ndimage.zoom(ndimage.gaussian_filter(
        rng.uniform(-1, 1, (20, 20)), 0.6) * 20, 40, order=3) for _ in range(6)], -1)
    ours = np.concatenate([elastic(epoch, shapes=[(1, 800, 800)]) for epoch in range(3)], -1)
    assert ours.std() == pytest.approx(theirs.std(), rel=0.1)
    for axis in (0, 1):
        slopes = [np.diff(field, axis=axis).std() for field in (ours, theirs)]
        assert slopes[0] == pytest.approx(slopes[1], rel=0.15)


# -- instances and settings


def test_the_best_instances_are_those_with_the_highest_peaks():
    peaks = {"a": 0.3, "b": 0.5, "c": 0.4, "d": 0.5}
    assert train_2d3d.choose_best(peaks, None) == ["b", "d", "c", "a"]
    assert train_2d3d.choose_best(peaks, 3) == ["b", "d", "c"]
    with pytest.raises(emseg.InputError, match="the instances were not validated"):
        train_2d3d.choose_best({"a": 0.5, "b": None}, 1)


@pytest.mark.parametrize("history, failed", [
    ([0.1] * 9, False), ([0.299] * 10, True), ([0.1] * 5 + [0.3] + [0.1] * 6, False)])
def test_an_instance_that_does_not_start_is_given_up(history, failed):
    args = SimpleNamespace(stop_epoch=10, stop_miou=0.3)
    assert train_2d3d.failed_to_start(history, args) is failed


@pytest.mark.parametrize("model", sorted(train_2d3d.MODELS))
def test_every_model_has_settings_that_it_accepts(model):
    settings = train_2d3d.settings_of(model)
    emseg.check_patch_size(on_meta(model), settings["patch_size"], model)
    args = train_2d3d.parse_args(["--volume", "a", "--label", "b", "--model", model])
    for name, value in {**train_2d3d.LAMBDAS, **settings}.items():
        assert getattr(args, name) == value


def test_the_papers_settings():
    args = train_2d3d.parse_args(["--volume", "a", "--label", "b"])
    wanted = dict(model="2d3d", patch_size=[5, 300, 300], spacing=[2, 100, 100], epochs=40, lr=1e-3,
                  batch_size=1, normalize="volume", weight_terms=[0.01, 1, 25], elastic=20,
                  reflect=True, brightness=0.12, contrast=0.2, c_2d=0.33, decay=0.75,
                  decay_steps=2512, stop_miou=0.3, stop_epoch=10, instances=1)
    assert {name: getattr(args, name) for name in wanted} == wanted
    assert f"{args.l2_2d:.1e} {args.l2_3d:.1e} {args.l2_p:.1e}" == "2.3e-11 1.1e-11 1.1e-15"
    args = train_2d3d.parse_args(["--volume", "a", "--label", "b", "--model", "unet"])
    assert math.log10(args.lr) == pytest.approx(-3.3)
