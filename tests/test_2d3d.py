"""train_2d3d.py: networks, the terms of eq. 1, jittered windows and what is done to them."""

import itertools
import math
import re
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
CPU = torch.device("cpu")
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


def test_docstrings_tell_these_counts():
    def told(thing):
        return re.findall(r"\d{1,3}(?:,\d{3}){2}", thing.__doc__)
    assert told(train_2d3d) == ["10,267,022"]
    assert told(train_2d3d.Hybrid) == ["10,267,022", "9,916,238", "7,882,311"]
    for model in ("2d3d-no-3x3x3", "2d3d-no-pyramid", "unet", "deepvess"):
        assert told(train_2d3d.MODELS[model]) == [f"{COUNTS[model]:,}"]


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


@pytest.mark.parametrize("model, sides", [
    *[(model, sides) for model in OWN if model.startswith("2d3d")
      for sides in ((1, 44, 20), (2, 36, 60))],
    ("unet3d-thin", (1, 8, 12)), ("unet3d-thin", (3, 20, 16)), ("unet3d-thick", (4, 8, 12)),
    ("unet3d-thick", (5, 8, 8)), ("unet3d-thick", (7, 4, 12)), ("deepvess", (7, 38, 33)),
    ("deepvess", (9, 33, 48)), ("unet", (188, 204))])
def test_every_size_that_check_patch_size_accepts_loses_the_margin(model, sides):
    network = on_meta(model)
    emseg.check_patch_size(network, sides, model)
    margins = [getattr(network, "depth_margin", 0), network.margin, network.margin][-len(sides):]
    assert output_shape(network, *sides)[2:] == tuple(
        side - 2 * margin for side, margin in zip(sides, margins))
    for wrong in (sides[-2] + 1, network.margin * 2):
        with pytest.raises(emseg.InputError, match=f"{model} takes sides"):
            emseg.check_patch_size(network, [*sides[:-2], wrong, sides[-1]], model)


def layers(*modules):
    """Every layer with weights: C3 (3x3x3), C2 (1x3x3), T (1x2x2 transposed) or P (1x1x1), then in
    and out."""
    kinds = {(nn.Conv3d, 3): "C3", (nn.Conv2d, 3): "C2", (nn.ConvTranspose2d, 2): "T",
             (nn.Conv2d, 1): "P"}
    found = []
    for module in itertools.chain.from_iterable(m.modules() for m in modules):
        if isinstance(module, train_2d3d.CONVOLUTIONS):
            (kind,) = {name for (base, side), name in kinds.items() if isinstance(module, base)
                       and set(module.kernel_size) == {side}}
            found.append((kind, module.in_channels, module.out_channels))
    return found


# The layers and the parameters of each block, in the order of the forward pass.
TABLE = [
    ("C3 1 32, C2 32 64, C2 64 64", 56_320), ("C3 64 64, C2 64 128, C2 128 128", 332_096),
    ("C2 128 256, C2 256 256", 885_248), ("C2 256 512, C2 512 512", 3_539_968),
    ("T 512 256, C2 512 256, C2 256 256", 2_294_528),
    ("T 256 64, C3 192 64, C2 64 128, C2 128 128", 618_880),
    ("T 128 32, C3 96 32, C2 32 64, C2 64 64", 154_816), ("P 64 7", 455),
    ("C3 71 64, C3 64 64, C3 64 64", 344_064), ("C3 71 128" + ", C3 128 128" * 4, 2_015_488),
    ("P 128 64", 8_256), ("T 64 64", 16_448), ("P 64 7", 455)]


def blocks_of(network):
    """The modules of each row of TABLE."""
    blocks = [[block] for block in network.encoder]
    blocks += [[up, block] for up, block in zip(network.up, network.decoder)]
    blocks += [[network.predict_2d]]
    if network.has_pyramid:
        blocks += [[getattr(network, name)] for name in (
            "scale_0", "scale_1", "narrow", "enlarge", "predict_3d")]
    return blocks


@pytest.mark.parametrize("model", [model for model in OWN if model.startswith("2d3d")])
def test_the_layers_of_2d3d(model):
    table = TABLE[:8] if model == "2d3d-no-pyramid" else TABLE
    network = on_meta(model)
    for row, ((text, count), block) in enumerate(zip(table, blocks_of(network), strict=True)):
        if model == "2d3d-no-3x3x3" and row < 8:
            text = text.replace("C3", "C2")
        else:
            assert sum(map(emseg.count_parameters, block)) == count
        assert layers(*block) == [(kind, int(a), int(b)) for kind, a, b in map(
            str.split, text.split(", "))]
    counted = sum(emseg.count_parameters(part) for block in blocks_of(network) for part in block)
    assert counted == COUNTS[model]
    assert not any("Norm" in type(module).__name__ for module in network.modules())


def test_without_multiloss_the_network_is_the_same():
    one, other = [{name: p.shape for name, p in on_meta(model).named_parameters()}
                  for model in ("2d3d", "2d3d-no-multiloss")]
    assert one == other and list(one) == list(other)
    assert train_2d3d.MODELS["2d3d-no-multiloss"] is train_2d3d.MODELS["2d3d"]


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


def test_what_eq_1_compares_with_the_truth():
    x = torch.randn(1, 1, 2, 36, 36, dtype=torch.float64)
    with torch.no_grad():
        for options in ({}, {"pyramid": False}):
            network = random_network(train_2d3d.Hybrid, 1, 3, 1, **options)
            wanted = hybrid_by_hand(network.state_dict(), x)
            found = train_2d3d.logits_of(network, x)
            assert (found[0] is None) == bool(options)
            for ours, theirs in zip(found, wanted):
                if theirs is not None:
                    torch.testing.assert_close(ours, theirs)
        network = random_network(train_2d3d.SameUNet3D, 1, 3, 1)
        found = train_2d3d.logits_of(network, x)
        assert found[1] is None
        torch.testing.assert_close(found[0], network(x))


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
    wanted = [(1, 64), *[(64, 64)] * 2, (64, 128), *[(128, 128)] * 2, (128, 256), *[(256, 256)] * 2]
    assert layers(on_meta(model).encoder) == [("C3", *step) for step in wanted]


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
    network.train()
    assert not torch.equal(network(x), network(x))                  # dropout
    drops = [module for module in network.modules() if isinstance(module, nn.Dropout)]
    assert [module.p for module in drops] == [0.5]


def slices_seen(network, result):
    """Slices of the (3D, 2D) logits that change with slice 10 of 21."""
    for parameter in network.parameters():
        nn.init.constant_(parameter, 0.1)                           # so that no ReLU hides a path
    x = torch.rand(1, 1, 21, 12, 12, dtype=torch.float64)
    other = x.clone()
    other[:, :, 10] += 1
    with torch.no_grad():
        change = network(x, both=True)[result] - network(other, both=True)[result]
    return change.abs().amax((0, 1, 3, 4)).nonzero().flatten().tolist()


@pytest.mark.parametrize("volumetric, in_2d, in_3d", [
    (True, range(6, 15), range(1, 20)), (False, [10], range(5, 16))])
def test_how_far_a_slice_is_seen(volumetric, in_2d, in_3d):
    """Four 3x3x3 convolutions in the 2D part and five in the pyramid, or these alone."""
    network = train_2d3d.Hybrid(1, 2, 1, volumetric=volumetric).double()
    assert slices_seen(network, 1) == list(in_2d)
    assert slices_seen(network, 0) == list(in_3d)


@pytest.mark.parametrize("model", OWN)
def test_the_gradient_reaches_every_parameter(model):
    network = random_network(train_2d3d.MODELS[model], 1, 3, 2)
    sides = {"unet": (204, 204), "deepvess": (7, 38, 33)}.get(model, (4, 36, 36))
    logits = network(torch.randn(1, 1, *sides, dtype=torch.float64))
    logits.square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


# -- L2 terms


def lambdas(l2_2d=2.0, l2_3d=3.0, l2_p=5.0):
    return SimpleNamespace(l2_2d=l2_2d, l2_3d=l2_3d, l2_p=l2_p)


SIZES_2D = 7_882_311 - 455
SIZES_3D = 344_064 + 2_015_488 + 8_256 + 16_448


@pytest.mark.parametrize("model, sizes", [
    ("2d3d", {2: SIZES_2D, 3: SIZES_3D, 5: 2 * 455}), ("2d3d-no-pyramid", {2: SIZES_2D, 5: 455}),
    ("2d3d-no-3x3x3", {2: 9_916_238 - SIZES_3D - 2 * 455, 3: SIZES_3D, 5: 2 * 455}),
    ("unet", {2: 31_030_983 - 455, 5: 455}), ("unet3d-thin", {3: 8_130_759 - 455, 5: 455}),
    ("unet3d-thick", {3: 8_294_599 - 455, 5: 455}),
    ("deepvess", {3: 1_930_479 - 1025 * 175, 5: 1025 * 175})])
def test_every_parameter_is_in_one_of_the_terms_of_eq_1(model, sizes):
    network = on_meta(model)
    groups = train_2d3d.l2_groups(network, lambdas())
    found = {factor: sum(p.numel() for p in parameters) for factor, parameters in groups}
    assert {factor: size for factor, size in found.items() if size} == sizes
    listed = [id(p) for _, parameters in groups for p in parameters]
    assert sorted(listed) == sorted(id(p) for p in network.parameters())


def test_the_l2_terms_in_closed_form():
    network = random_network(train_2d3d.Hybrid, 1, 3, 2)
    state = {name: value.numpy() for name, value in network.state_dict().items()}
    def of(*starts):
        return sum((value**2).sum() for name, value in state.items() if name.startswith(starts))
    parts = [of("encoder", "up", "decoder"), of("scale_0", "scale_1", "narrow", "enlarge"),
             of("predict_2d", "predict_3d")]
    assert sum(parts) == pytest.approx(of("")) and min(parts) > 1
    for factors in ((2, 3, 5), (1e-5, 1e-5, 1e-9), (7, 7, 7), (0, 1, 0), (1, 0, 2), (4, 3, 4)):
        value = train_2d3d.squared_norms(train_2d3d.l2_groups(network, lambdas(*factors)))
        assert value.item() == pytest.approx(np.dot(factors, parts))
    zero = train_2d3d.l2_groups(network, lambdas(0, 0, 0))
    assert zero == [] and float(train_2d3d.squared_norms(zero)) == 0


def test_the_gradient_of_the_l2_terms():
    network = random_network(train_2d3d.Hybrid, 1, 3, 1)
    train_2d3d.squared_norms(train_2d3d.l2_groups(network, lambdas())).backward()
    for name, factor in (("up.0.layer.bias", 2), ("scale_1.8.weight", 3),
                         ("predict_2d.layer.weight", 5)):
        parameter = network.get_parameter(name)
        torch.testing.assert_close(parameter.grad, 2 * factor * parameter.detach())


@pytest.mark.parametrize("model, last", [("deeplabv3plus", 1), ("fcn8s", 3)])
def test_normalisation_layers_are_not_decayed(model, last):
    network = on_meta(model)
    groups = dict(train_2d3d.l2_groups(network, lambdas()))
    norms = {id(p) for module in network.modules() if isinstance(module, nn.BatchNorm2d)
             for p in module.parameters()}
    assert norms
    listed = [id(p) for parameters in groups.values() for p in parameters]
    every = {id(p) for p in network.parameters()}
    assert len(listed) == len(set(listed)) and set(listed) == every - norms
    assert len(groups[5]) == 2 * last and all(p.shape[0] == 7 for p in groups[5])
    assert not groups.get(3)


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


def test_where_there_is_no_edge():
    label = np.full((3, 30, 40), 4, np.uint8)
    label[1, 10:20, 10:20] = label[2, :, 20:] = IGNORE
    assert not train_2d3d.edge_weights(label).any()
    label[1, 10:20, 20:22] = 5                  # an edge on three sides, none towards IGNORE
    found = train_2d3d.edge_weights(label)
    assert found[1, 15, 22] > 0.3 and found[1, 15, 20] > 0 and not found[[0, 2]].any()
    assert not found[1, 10:20, 10:20].any() and not found[1, 12:18, 5:10].any()


def test_edges_of_slices_do_not_see_each_other():
    label = np.stack([blobs(seed, (40, 30)) for seed in range(4)])
    together = train_2d3d.edge_weights(label)
    for z in range(4):
        np.testing.assert_array_equal(together[z], train_2d3d.edge_weights(label[z][None])[0])
    assert len({slice_.tobytes() for slice_ in together}) == 4


def test_weights_are_the_sum_of_three():
    rng = np.random.default_rng(0)
    label = rng.choice([0, 1, 2, 3, IGNORE], (3, 7, 9)).astype(np.uint8)
    edges = rng.random((3, 7, 9), np.float32) * 25
    balance = np.array([0.1, 0.5, 1.0, 0.2])
    found = train_2d3d.voxel_weights(label, edges, balance, 0.01)
    assert found.dtype == np.float32 and found.shape == label.shape
    for place in np.ndindex(label.shape):
        ids = label[place]
        wanted = 0 if ids == IGNORE else 0.01 + balance[ids] + edges[place]
        assert found[place] == pytest.approx(wanted, rel=1e-6)


# -- windows


def volume_of(shape, first=0, slices=None, classes=7):
    """Image, label and weight whose voxels differ everywhere, and the annotated z."""
    ids = first + np.arange(np.prod(shape)).reshape(shape)
    zs = np.arange(shape[0]) if slices is None else np.array(slices)
    label = np.full(shape, IGNORE, np.uint8)
    label[zs] = (ids % classes).astype(np.uint8)[zs]
    return (InMemory(ids.astype(np.int32)), InMemory(label, zs),
            InMemory(ids.astype(np.float32) / 2), zs)


def windows_of(*volumes, size=(2, 8, 10), margin=(0, 0), spacing=(1, 4, 5), reach=0, seed=0):
    images, labels, weights, slices = map(list, zip(*volumes))
    windows = train_2d3d.Windows(images, labels, slices, list(size), margin, list(spacing), reach,
                                 seed)
    windows.weights = weights
    return windows


def windows_for(model, shape, elastic=20.0, slices=None, **changed):
    """Windows as the command makes them, of a volume of this shape."""
    flat = np.broadcast_to(np.uint8(0), shape)
    zs = np.arange(shape[0]) if slices is None else slices
    args = SimpleNamespace(model=model, elastic=elastic, seed=0,
                           **{**train_2d3d.settings_of(model), **changed})
    data = SimpleNamespace(images=[InMemory(flat)], labels=[InMemory(flat, zs)], slices=[zs])
    return train_2d3d.make_windows(SimpleNamespace(args=args, data=data), on_meta(model))


@pytest.mark.parametrize("model, count, size, margin", [
    ("2d3d", 828, [5, 296, 296], (0, 2)), ("2d3d-no-pyramid", 828, [5, 296, 296], (0, 2)),
    ("unet", 1800, [1, 388, 388], (0, 92)), ("unet3d-thin", 300, [5, 296, 296], (0, 2)),
    ("unet3d-thick", 9 * 6 * 6, [16, 180, 180], (0, 0)),
    ("deepvess", 25 * 40 * 40, [1, 5, 5], (3, 14))])
def test_windows_in_an_epoch_of_the_papers_volume(model, count, size, margin):
    windows = windows_for(model, (50, 800, 800))
    assert len(windows) == count
    assert (list(windows.size), windows.margin, windows.reach) == (size, margin, 20)
    assert windows_for(model, (50, 800, 800), elastic=5.5).reach == 6
    assert windows_for(model, (50, 800, 800), elastic=0).reach == 0


def test_windows_of_deeplab_give_the_papers_steps():
    settings = train_2d3d.SETTINGS["deeplab"]
    windows = windows_for("deeplabv3plus", (50, 800, 800), **settings)
    assert len(windows) == 100 and settings["epochs"] == 40


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


def test_an_item_depends_on_seed_and_index_alone():
    def make(seed):
        return windows_of(volume_of((9, 20, 31)), spacing=(3, 5, 9), seed=seed)
    one, two, other = make(1), make(1), make(2)
    forward = [one[i] for i in range(3 * len(one))]
    backward = [two[i] for i in reversed(range(3 * len(two)))][::-1]
    for a, b in zip(forward, backward):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y)
    assert places(one) != places(other) and sorted(places(one)) != sorted(places(other))
    assert places(one, 1) != places(other, 0)               # instances have successive seeds
    other.seed = 1                                          # as for the next instance
    assert places(other) == places(one)


def test_batches_follow_the_items():
    windows = windows_of(volume_of((9, 20, 31)), spacing=(3, 5, 9))
    for step, batch in zip(range(3, 6), emseg.batches(windows, 2, 3, 6), strict=True):
        for place, item in enumerate((windows[2 * step], windows[2 * step + 1])):
            assert len(batch) == 4
            for found, wanted in zip(batch, item):
                assert torch.equal(found[place], wanted)


def test_corners_are_uniform_in_their_bins():
    """24 positions in each of two bins; of the bin that is cut off, 2 x 3 x 1."""
    windows = windows_of(volume_of((3, 10, 18)), spacing=(2, 3, 4))
    assert len(windows) == 3
    passes = 600
    drawn = np.concatenate([windows.corners(number)[:, :4] for number in range(passes)])
    _, z, y, x = drawn.T
    counts = np.zeros((2, 3, 9), int)
    np.add.at(counts, (z, y, x), 1)
    assert counts.sum() == 3 * passes
    for positions in (counts[:, :, :4], counts[:, :, 4:8], counts[:, :, 8:]):
        expected = passes / positions.size
        assert positions.sum() == passes
        assert (abs(positions - expected) < 4.5 * math.sqrt(expected)).all()


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


def test_windows_of_several_volumes():
    shapes = [(4, 12, 15), (6, 9, 21), (3, 12, 15)]
    volumes = [volume_of(shape, first=10_000 * v) for v, shape in enumerate(shapes)]
    volumes[1] = volume_of(shapes[1], first=10_000, slices=[1, 5])
    volumes[2] = (*volumes[2][:3], np.array([], int))               # all of it is for validation
    windows = windows_of(*volumes)
    in_each = [3 * 2 * 2, 4 * 1 * 3, 0]             # corners 0..4 and 0..5; 0..1 and 0..11
    assert len(windows) == sum(in_each)
    counts = [0, 0, 0]
    for i in range(len(windows)):
        image, label, weight, corner = windows[i]
        v = int(image[0, 0, 0]) // 10_000
        counts[v] += 1
        z, *yx = np.unravel_index(int(image[0, 0, 0]) - 10_000 * v, shapes[v])
        assert list(yx) == corner.tolist()
        box = tuple(slice(a, a + side) for a, side in zip((z, *yx), windows.size))
        for found, source in zip((image, label, weight), volumes[v]):
            np.testing.assert_array_equal(found, source.array[box])
        assert (label != IGNORE).any()
    assert counts == in_each


@pytest.mark.parametrize("slices", [[3, 17, 30], [0], [39], [20], [6, 7, 8], [*range(0, 40, 9)],
                                    [37, 38, 39], [1, 38]], ids=str)
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
    for i in range(len(windows)):
        assert (windows[i][1] != IGNORE).any()


@pytest.mark.parametrize("depth", [4, 5])
def test_a_window_moves_only_to_hold_the_nearest_annotated_slice(depth):
    """One that holds a slice stays; the others have the nearest one at every place alike, but for
    the ends of the volume."""
    slices = [2, 13, 30, 31]
    windows = windows_of(volume_of((40, 10, 12), slices=slices), size=(depth, 10, 12),
                         spacing=(1, 4, 5))
    stayed, taken = 0, []
    for passes in range(30):
        drawn = windows.corners(passes).tolist()
        for (_, before, *_), (z, *_) in zip(drawn, places(windows, passes), strict=True):
            if any(before <= a < before + depth for a in slices):
                assert z == before
                stayed += 1
                continue
            middle = before + depth // 2
            near = min(abs(a - middle) for a in slices)
            held = [a for a in slices if z <= a < z + depth]
            assert near in [abs(a - middle) for a in held]
            if held == [13]:
                taken.append(13 - z)
    assert stayed > 100 and len(taken) > 100
    assert min(np.bincount(taken, minlength=depth)) > 0.5 * len(taken) / depth


def test_windows_stay_where_slices_are_annotated():
    """10 to 29 of 40: windows of five begin at 10 to 25, in eight bins of two."""
    windows = windows_of(volume_of((40, 10, 12), slices=range(10, 30)), size=(5, 10, 12),
                         spacing=(2, 4, 5))
    assert len(windows) == 8
    found = {place for passes in range(40) for place in places(windows, passes)}
    assert found == {(z, 0, 0) for z in range(10, 26)}


def test_a_single_annotated_slice_takes_every_place_in_a_window():
    windows = windows_of(volume_of((40, 10, 12), slices=[20]), size=(5, 10, 12), spacing=(1, 4, 5))
    assert {z for passes in range(9) for z, _, _ in places(windows, passes)} == {*range(16, 21)}


@pytest.mark.parametrize("depth", [1, 3])
def test_a_patch_size_that_the_network_refuses_is_not_advised(depth):
    """Two poolings in z need four slices."""
    with pytest.raises(emseg.InputError, match=f"memory.tif: has {depth} slices") as raised:
        windows_for("unet3d-thick", (depth, 400, 400))
    assert "--patch-size" not in str(raised.value) and "such as unet" in str(raised.value)


@pytest.mark.parametrize("model, depth", [("2d3d", 3), ("2d3d", 1), ("unet3d-thin", 4),
                                          ("unet3d-thick", 9), ("unet3d-thick", 4)])
def test_a_volume_with_too_few_slices_is_told_a_patch_size_that_fits(model, depth):
    shape = depth, 400, 400
    with pytest.raises(emseg.InputError, match=f"memory.tif: has {depth} slices") as raised:
        windows_for(model, shape)
    advice = re.search(r"give --patch-size (\d+) (\d+) (\d+), or a --model", str(raised.value))
    sides = [*map(int, advice.groups())]
    wanted = train_2d3d.settings_of(model)["patch_size"]
    assert sides == [depth, *wanted[1:]]
    assert windows_for(model, shape, patch_size=sides).size[0] == depth
    assert len(windows_for("unet", shape)) > 0                  # the other advice


def test_windows_that_do_not_fit_are_refused():
    with pytest.raises(emseg.InputError, match="predict 296 x 296 pixels do not fit into slices of "
                                               "295 x 400"):
        windows_for("2d3d", (9, 295, 400))
    assert len(windows_for("2d3d", (5, 296, 296))) == 1
    with pytest.raises(emseg.InputError, match="has 2 slices, fewer than the 3 that a window of 9 "
                                               "slices predicts; give a --model for single"):
        windows_for("deepvess", (2, 400, 400), patch_size=[9, 33, 33])
    with pytest.raises(emseg.InputError, match="2d3d takes sides of 4 [+] a multiple of 8"):
        windows_for("2d3d", (9, 400, 400), patch_size=[5, 296, 300])


def test_mirrored_is_np_pad_of_the_whole_array():
    array = np.random.default_rng(0).integers(0, 255, (7, 9, 11))
    whole = np.pad(array, 6, mode="symmetric")
    rng = np.random.default_rng(1)
    reached = 0
    for _ in range(300):
        size = rng.integers(1, 8, 3)
        inside = rng.integers(0, np.array(array.shape) - size + 1)
        before, after = rng.integers(0, 7, (2, 3))
        start, stop = inside - before, inside + size + after
        stop = np.minimum(stop, np.array(array.shape) + 6)
        if (np.minimum(stop, array.shape) - np.maximum(start, 0)
                < np.maximum(-start, stop - array.shape)).any():
            continue                                            # not as windows are: see Windows
        reached += (start < 0).any() and (stop > array.shape).any()
        found = train_2d3d.mirrored(InMemory(array), *zip(start, stop))
        box = tuple(slice(a + 6, b + 6) for a, b in zip(start, stop))
        np.testing.assert_array_equal(found, whole[box])
    assert reached > 50


# -- augmentation


PLAIN = dict(elastic=0.0, reflect=False, brightness=0.0, contrast=0.0)
NORMALIZATION = {"mode": "volume", "mean": 100.0, "std": 50.0}


def batch_of(size, margin, reach, images, labels=None, weights=None, corner=None):
    """Windows of this geometry, and a batch as they would give it; labels default to the image."""
    windows = SimpleNamespace(size=list(size), margin=margin, reach=reach)
    B, cut = len(images), slice(margin[0], images.shape[1] - margin[0])
    assert images.shape[1:] == (size[0] + 2 * margin[0], *[
        side + 2 * margin[1] + 2 * reach for side in size[1:]])
    labels = images[:, cut].clone() if labels is None else labels
    weights = images[:, cut] / 2 if weights is None else weights
    corner = torch.zeros(B, 2, dtype=torch.int64) if corner is None else corner
    return windows, (images, labels, weights.float(), corner)


def augmented(windows, batch, field=None, seed=0, normalization=None, **changed):
    torch.manual_seed(seed)
    return train_2d3d.augment(batch, windows, field, normalization or NORMALIZATION,
                              SimpleNamespace(**{**PLAIN, **changed}))


def grey(image, normalization=NORMALIZATION):
    """Network input (B, 1, Z, H, W) -> grey levels (B, Z, H, W)."""
    return image[:, 0] * normalization["std"] + normalization["mean"]


GEOMETRY = [((3, 8, 12), (0, 2), 0), ((3, 8, 12), (0, 2), 3), ((1, 6, 9), (3, 14), 5),
            ((1, 12, 20), (0, 9), 4), ((4, 16, 8), (0, 0), 6)]


@pytest.mark.parametrize("size, margin, reach", GEOMETRY)
def test_without_augmentation_the_window_is_only_normalised(size, margin, reach):
    (d, h, w), (m_z, m), r = size, margin, reach
    rng = np.random.default_rng(0)
    sides = h + 2 * m + 2 * r, w + 2 * m + 2 * r
    image = rng.integers(0, 256, (2, d + 2 * m_z, *sides)).astype(np.uint8)
    label = rng.choice([0, 1, 2, 6, IGNORE], (2, d, *sides)).astype(np.uint8)
    weight = rng.random((2, d, *sides), np.float32) * 30
    windows, batch = batch_of(size, margin, reach, *map(torch.from_numpy, (image, label, weight)))
    found = augmented(windows, batch)
    assert [part.dtype for part in found] == [torch.float32, torch.int64, torch.float32]
    assert found[0].shape == (2, 1, d + 2 * m_z, h + 2 * m, w + 2 * m)
    wanted = (image[:, :, r : r + h + 2 * m, r : r + w + 2 * m].astype(float) - 100) / 50
    np.testing.assert_allclose(found[0][:, 0], wanted, atol=1e-3)
    inner = (slice(None), slice(None), slice(r + m, r + m + h), slice(r + m, r + m + w))
    np.testing.assert_array_equal(found[1], label[inner])
    np.testing.assert_allclose(found[2], weight[inner])


@pytest.mark.parametrize("size, margin, reach", [((2, 3, 5), (0, 1), 2), ((1, 4, 3), (2, 1), 0)])
def test_reflections_come_in_eight_kinds_alike_in_image_label_and_weight(size, margin, reach):
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


def test_images_are_interpolated_and_labels_and_weights_are_not():
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 2, 16, 20)))
    windows, batch = batch_of((2, 8, 12), (0, 2), 2, image)
    found, label, weight = augmented(windows, batch, torch.tensor([0.75, 1.0]).expand(12, 16, 2))
    left, right = image[:, :, 3:15, 2:18], image[:, :, 3:15, 3:19]
    torch.testing.assert_close(grey(found), 0.25 * left + 0.75 * right, atol=0.05, rtol=0)
    assert torch.equal(label, right[:, :, 2:-2, 2:-2])
    assert torch.equal(weight, right[:, :, 2:-2, 2:-2] / 2)


def test_one_map_serves_overlapping_windows_alike():
    volume = volume_of((2, 40, 50), classes=IGNORE)
    windows = windows_of(volume, size=(2, 16, 20), margin=(0, 2), reach=4)
    field = torch.from_numpy(ndimage.gaussian_filter(
        np.random.default_rng(0).normal(size=(44, 54, 2)), (3, 3, 0)) * 15).float().clamp(-4, 4)
    assert field.abs().mean() > 0.5
    whole = [np.full((44, 54), np.nan), np.full((40, 50), np.nan), np.full((40, 50), np.nan)]
    again = 0
    for i in range(len(windows)):
        item = windows[i]
        y, x = item[3].tolist()
        found = augmented(windows, [part[None] for part in item], field)
        for kept, part in zip(whole, (grey(found[0])[0], *[part[0] for part in found[1:]])):
            box = kept[y : y + part.shape[1], x : x + part.shape[2]]
            again += np.isfinite(box).sum()
            np.testing.assert_allclose(part[0], np.where(np.isnan(box), part[0], box), atol=0.2)
            box[...] = part[0]
    assert again > 5000
    # The map is looked up where the window lies: in y by rows, in x by columns.
    y, x = np.indices((44, 54))
    place = np.stack([np.clip(y - 2, 0, 39), np.clip(x - 2, 0, 49)]) + field.numpy().transpose(
        2, 0, 1)[::-1]
    inside = (y > 8) & (y < 36) & (x > 8) & (x < 46) & np.isfinite(whole[0])
    assert inside.sum() > 500
    np.testing.assert_allclose(whole[0][inside], (place[0] * 50 + place[1])[inside], atol=0.2)


def test_image_and_label_stay_a_pair_under_all_geometry_together():
    """Both tell where they were sampled, which is at the nearest pixel for labels."""
    size, margin, r = (3, 20, 24), (0, 3), 5
    z, y, x = torch.meshgrid(torch.arange(3), torch.arange(36), torch.arange(40), indexing="ij")
    field = torch.from_numpy(ndimage.gaussian_filter(
        np.random.default_rng(0).normal(size=(26, 30, 2)), (3, 3, 0)) * 20).float().clamp(-5, 5)
    for ramp, other in (y, x), (x, y):
        windows, batch = batch_of(size, margin, r, ramp.expand(16, -1, -1, -1),
                                  weights=(other + 100 * z).expand(16, -1, -1, -1))
        image, label, weight = augmented(windows, batch, field, seed=3, reflect=True)
        difference = grey(image)[:, :, 3:-3, 3:-3] - label
        assert difference.abs().max() < 0.502 and difference.std() > 0.1
        reflected = weight[:, 0, 0, 0] > 150                            # in z
        assert 0 < reflected.sum() < 16
        assert torch.equal(weight // 100, torch.where(
            reflected.view(-1, 1, 1, 1), torch.arange(3.0).flip(0).view(1, 3, 1, 1),
            torch.arange(3.0).view(1, 3, 1, 1)).expand_as(weight))


@pytest.mark.parametrize("brightness, contrast", [(0.12, 0.2), (0.12, 0), (0, 0.2), (0.3, 0.5)])
def test_brightness_is_a_shift_and_then_contrast_a_factor(brightness, contrast):
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
        assert abs(values.mean()) < 0.06 * most + 1e-5
        assert values.std() == pytest.approx(most / math.sqrt(3), rel=0.05, abs=1e-5)
    if brightness and contrast:
        assert abs(np.corrcoef(shift, factor)[0, 1]) < 0.08


# -- elastic map


def elastic(epoch=0, seed=0, amplitude=20.0, reach=20, margin=2, shapes=((3, 90, 130),)):
    windows = SimpleNamespace(images=[InMemory(np.zeros(shape, np.uint8)) for shape in shapes],
                              margin=(0, margin), reach=reach)
    args = SimpleNamespace(elastic=amplitude, seed=seed)
    return train_2d3d.elastic_map(args, windows, epoch, CPU)


def test_an_epoch_has_one_elastic_map():
    torch.manual_seed(1)
    one = elastic()
    torch.manual_seed(2)
    torch.rand(5)
    assert torch.equal(one, elastic())
    for other in (elastic(epoch=1), elastic(seed=1), elastic(epoch=1, seed=1)):
        assert (one - other).abs().mean() > 2
    assert not torch.equal(elastic(epoch=1, seed=2), elastic(epoch=2, seed=1))


def test_the_elastic_map_covers_the_largest_volume_and_its_margin():
    assert elastic(margin=14).shape == (90 + 28, 130 + 28, 2)
    assert elastic(shapes=[(3, 50, 200), (9, 120, 60)], margin=0).shape == (120, 200, 2)
    assert elastic(amplitude=0.0) is None


def test_the_elastic_map_is_bounded_by_its_amplitude():
    fields = torch.stack([elastic(epoch) for epoch in range(30)])
    assert 15 < fields.abs().max() <= 20 and fields.mean().abs() < 1     # not shifted by 20
    small = torch.stack([elastic(epoch, amplitude=2.5, reach=3) for epoch in range(30)])
    torch.testing.assert_close(small, (fields / 8).clamp(-3, 3))
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
    assert train_2d3d.choose_best(peaks, None) == ["a", "b", "c", "d"]
    assert train_2d3d.choose_best(peaks, 1) == ["b"]
    assert train_2d3d.choose_best(peaks, 3) == ["b", "d", "c"]
    assert train_2d3d.choose_best(peaks, 4) == ["b", "d", "c", "a"]
    assert train_2d3d.choose_best({"a": None, "b": None}, None) == ["a", "b"]
    with pytest.raises(emseg.InputError, match="--top-k 5: there are 4 instances"):
        train_2d3d.choose_best(peaks, 5)
    with pytest.raises(emseg.InputError, match="the instances were not validated"):
        train_2d3d.choose_best({"a": 0.5, "b": None}, 1)


@pytest.mark.parametrize("history, failed", [
    ([], False), ([0.1] * 9, False), ([0.1] * 10, True), ([0.1] * 12, True),
    ([0.1] * 5 + [0.3] + [0.1] * 6, False), ([0.299] * 10, True), ([0.1] * 9 + [0.31], False)])
def test_an_instance_that_does_not_start_is_given_up(history, failed):
    args = SimpleNamespace(stop_epoch=10, stop_miou=0.3)
    assert train_2d3d.failed_to_start(history, args) is failed


def test_table_1():
    rows = {"ensemble of 2": {"eval": {"miou": 0.68642, "miou_org": 0.59},
                              "test": {"miou": 0.5, "miou_org": 0.44567}},
            "2d3d seed1": {"eval": None, "test": None},
            "unet seed0": {"eval": {"miou": 0.0}, "test": {"miou": None, "miou_org": 0.25}}}
    assert train_2d3d.table_1(rows, True).splitlines() == [
        "| | eval MIoU(all) | eval MIoU(org) | test MIoU(all) | test MIoU(org) |",
        "| --- | --- | --- | --- | --- |",
        "| ensemble of 2 | 0.6864 | 0.5900 | 0.5000 | 0.4457 |",
        "| 2d3d seed1 |  |  |  |  |",
        "| unet seed0 | 0.0000 |  |  | 0.2500 |"]
    assert train_2d3d.table_1(rows, False).splitlines() == [
        "| | eval MIoU(all) | test MIoU(all) |", "| --- | --- | --- |",
        "| ensemble of 2 | 0.6864 | 0.5000 |", "| 2d3d seed1 |  |  |", "| unet seed0 | 0.0000 |  |"]


@pytest.mark.parametrize("model", sorted(train_2d3d.MODELS))
def test_every_model_has_settings_that_it_accepts(model):
    settings = train_2d3d.settings_of(model)
    emseg.check_patch_size(on_meta(model), settings["patch_size"], model)
    assert {*settings} >= {"patch_size", "spacing", "epochs", "lr", "batch_size"}
    args = train_2d3d.parse_args(["--volume", "a", "--label", "b", "--model", model])
    for name, value in {**train_2d3d.LAMBDAS, **settings}.items():
        assert getattr(args, name) == value
    typed = ["--lr", "0.5", "--l2-2d", "0", "--spacing", "7", "8", "9"]
    args = train_2d3d.parse_args(["--volume", "a", "--label", "b", "--model", model, *typed])
    assert (args.lr, args.l2_2d, args.spacing) == (0.5, 0, [7, 8, 9])
    assert args.epochs == settings["epochs"]


def test_settings_are_found_by_the_beginning_of_a_name():
    settings = train_2d3d.SETTINGS
    for model, entry in {**{name: "2d3d" for name in OWN[:4]}, "unet": "unet",
                         "unet3d-thin": "unet3d-thin", "unet3d-thick": "unet3d-thick",
                         "deepvess": "deepvess", "unet5": "others", "segnet": "others"}.items():
        assert train_2d3d.settings_of(model) is settings[entry], model


def test_the_papers_settings():
    args = train_2d3d.parse_args(["--volume", "a", "--label", "b"])
    wanted = dict(model="2d3d", patch_size=[5, 300, 300], spacing=[2, 100, 100], epochs=40, lr=1e-3,
                  batch_size=1, normalize="volume", weight_terms=[0.01, 1, 25], elastic=20,
                  reflect=True, brightness=0.12, contrast=0.2, c_2d=0.33, l2_3d=1e-5, l2_p=1e-9,
                  decay=0.75, decay_steps=2512, stop_miou=0.3, stop_epoch=10, instances=1)
    assert {name: getattr(args, name) for name in wanted} == wanted
    assert math.log10(args.l2_2d) == pytest.approx(-4.7)
    args = train_2d3d.parse_args(["--volume", "a", "--label", "b", "--model", "unet"])
    assert math.log10(args.lr) == pytest.approx(-3.3) and args.l2_2d == 1e-5


def test_what_a_prediction_must_see_together():
    together = {"2d3d": {"depth": 5}, "unet3d-thick": {"depth": 16}, "unet": {},
                "deepvess": {"context": 7}}
    for model, wanted in together.items():
        patch_size = train_2d3d.settings_of(model)["patch_size"]
        assert train_2d3d.slices_at_once(on_meta(model), patch_size) == wanted


def test_the_depth_of_windows_in_words():
    depths = [train_2d3d.window_depth({"model": model, "patch_size": sides}) for model, sides in (
        ("2d3d", [5, 300, 300]), ("unet3d-thin", [5, 44, 44]), ("unet3d-thick", [16, 180, 180]),
        ("unet", [572, 572]), ("segnet", [320, 320]), ("deepvess", [7, 33, 33]))]
    assert depths == ["5", "5", "16", "1", "1", "7, of which one is predicted"]
