"""Networks and losses against published counts, independent formulas and NumPy loops."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import nn
from torch._subclasses import FakeTensorMode

import emseg
import train_2d3d
import train_cps
import train_partial
import train_seget
import train_sparse

IGNORE = emseg.IGNORE
NETWORKS = {**train_2d3d.MODELS, **train_seget.MODELS, **emseg.NETWORKS, **emseg.NETWORKS_3D}


# -- what all networks share


# Published parameters: (network, in, out channels), the number, where it is written.
COUNTS = [
    (emseg.UNet, 1, 1, 7_701_825), (emseg.UNet, 15, 1, 7_709_889),
    (emseg.UNet5, 1, 5, 7_759_653), (emseg.ResUNet, 1, 1, 4_283_201),
    (train_2d3d.MODELS["unet"], 1, 7, 31_030_983), (emseg.UNet3D, 1, 1, 16_318_691),
    (emseg.FCN8s, 1, 1, 134_289_379), (emseg.SegNet, 1, 1, 29_479_489),
    (emseg.DeepLabV3Plus, 1, 1, 41_997_393), (emseg.DeepLabResNet101, 1, 7, 58_620_871),
    (emseg.DeepLabDRN, 1, 7, 40_018_327), (emseg.UNetPlusPlus, 1, 1, 26_072_337),
    (emseg.UNetPlusPlus3, 1, 1, 2_017_937), (emseg.FracTALResNet, 1, 1, 18_199_919),
    (emseg.CEECNet, 1, 1, 58_964_079), (emseg.SenFormer, 1, 1, 163_100_906)]


@pytest.mark.parametrize("network, c_in, c_out, count", COUNTS)
def test_parameters_are_the_published_ones(network, c_in, c_out, count):
    with torch.device("meta"):
        assert emseg.count_parameters(network(c_in, c_out)) == count


def small(name, c_in=1, c_out=2):
    """A narrow network, its attention switched on, and the smallest sides of about 64."""
    torch.manual_seed(0)
    network = NETWORKS[name](c_in, c_out, 8)
    for parameter_name, parameter in network.named_parameters():
        if parameter_name.endswith(("gamma", "queries")):
            nn.init.normal_(parameter)
    side = emseg.network_side(network, 64) + 2 * network.margin
    depth = [max(network.min_depth, 5)] if network.dims == 3 else []
    return network, [*depth, side, side]


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_keep_the_sides_and_teach_every_parameter(name):
    network, sides = small(name)
    network.train(name != "senformer")          # whose training leaves out some samples
    emseg.check_patch_size(network, sides, name)
    if network.stride > 1:
        with pytest.raises(emseg.InputError, match=f"multiple of {network.stride}"):
            emseg.check_patch_size(network, [*sides[:-1], sides[-1] + network.stride // 2], name)
    out = network(torch.randn(2, 1, *sides))
    wanted = [side - 2 * network.margin for side in sides[-2:]]
    assert out.shape[:2] == (2, 2) and list(out.shape[-2:]) == wanted
    (out * torch.randn_like(out)).sum().backward()
    for parameter_name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), parameter_name


# Mean and deviation of the logits of weights that never change, see below.
LOGITS = {
    "unet": (1.01891, 6.05811), "resunet": (-0.60347, 5.38641), "unet5": (-5.01705, 8.73456),
    "fcn8s": (0.0876949, 1.00393), "segnet": (1.80156, 2.31638),
    "deeplabv3plus": (1.59694, 3.19246), "deeplab-resnet101": (4.31379e+06, 5.70107e+06),
    "deeplab-drn": (-2095.16, 2945.05), "unet++": (-0.578386, 13.5006),
    "unet++3": (0.640823, 0.194075), "fractalresnet": (0.743009, 0.624797),
    "ceecnet": (3.54116, 0.92226), "senformer": (-0.699064, 0.108892),
    "2d3d": (-15.8054, 12.7535), "2d3d-no-3x3x3": (-19.9856, 19.2735),
    "2d3d-no-pyramid": (-2.89814, 9.80387), "unet3d-thin": (0.0296958, 5.69295),
    "unet3d-thick": (0.727781, 6.60642), "deepvess": (0.204431, 7.53113),
    "seget": (-5.23627, 5.44084), "unet3d": (0.916529, 2.06527)}


@pytest.mark.parametrize("name", LOGITS)
def test_networks_give_for_the_same_weights_the_same_logits(name):
    """Numbers of the code whose layers were compared with loops and with the authors' code."""
    network, sides = small(name)
    for number, values in enumerate(network.double().eval().state_dict().values()):
        random = np.random.RandomState(number)          # whose numbers NumPy promises for ever
        if values.dim() > 1:
            random = random.standard_normal(values.shape) * (2 / values[0].numel()) ** 0.5
        else:
            random = random.uniform(0.5, 1.5, values.shape)
        values.copy_(torch.from_numpy(np.array(random)))
    image = torch.from_numpy(np.random.RandomState(0).standard_normal((1, 1, *sides)))
    with torch.no_grad():
        logits = network(image)
    assert (logits.mean().item(), logits.std().item()) == pytest.approx(LOGITS[name], rel=1e-4)


WHOLE = set(NETWORKS) - {"senformer", "ceecnet", "fractalresnet", "deeplab-resnet101", "unet++"}
PARTS = {"attention": lambda: emseg.CEECUnit(8, 1)(torch.empty(1, 8, 16, 16)),
         "windows": lambda: emseg.SwinBlock(8, 2, shifted=True, drop=0.1)(torch.empty(1, 9, 8, 8)),
         "learner": lambda: emseg.Learner(8, 2, 1, 3)(torch.empty(1, 4, 4, 8))}

fake_gpu = pytest.mark.skipif(torch.__version__ < "2.13", reason="older ones look for a driver")


@fake_gpu
@pytest.mark.parametrize("name", [*sorted(WHOLE), *PARTS])
def test_nothing_is_made_on_the_wrong_device(name, monkeypatch):
    """Shapes alone, as if on a GPU. Networks left out are slow here: their parts come last."""
    for initialization in "uniform_", "kaiming_uniform_", "kaiming_normal_", "trunc_normal_":
        monkeypatch.setattr(nn.init, initialization, lambda tensor, *_, **__: tensor)
    with FakeTensorMode():
        with torch.device("cuda"):
            if name in PARTS:
                assert PARTS[name]().device.type == "cuda"
                return
            network, sides = small(name)
        assert network(torch.empty(1, 1, *sides, device="cuda")).device.type == "cuda"


STANDARD = {"mean": 128.0, "std": 40.0}
STEPS = {           # what a training step makes of logits, label, crops, all in shapes alone
    "soft_dice": lambda x, y, crop: emseg.soft_dice_loss(x, y),
    "cross_entropy": lambda x, y, crop: emseg.cross_entropy(x, y),
    "weighted": lambda x, y, crop: emseg.cross_entropy(
        x[:, :1], y, train_seget.foreground_weight(y, 10)),
    "jaccard": lambda x, y, crop: train_seget.jaccard_distance(x[:, :1], y),
    "merged": lambda x, y, crop: sum(train_partial.loss_terms(
        x, y, y.new_zeros(2, 3), y.new_zeros(2, dtype=torch.bool))),
    "learners": lambda x, y, crop: train_cps.ensemble_loss([x, x], y),
    "cutmix": lambda x, y, crop: train_cps.cps_cutmix_loss(
        lambda network, image: [network(image)], [lambda i: i.expand(-1, 3, -1, -1)] * 2,
        train_cps.dice_loss, x[:, :1], x[:, :1]),
    "augment": lambda x, y, crop: emseg.augment(
        crop, crop, STANDARD, flip=True, rot90=True, rotation=20.0, scale=0.1, shear=5.0,
        displacement=emseg.elastic_displacement(2, (64, 64), crop.device))[0],
    "affine": lambda x, y, crop: train_sparse.deformation(crop, "affine")}


@fake_gpu
@pytest.mark.parametrize("name", STEPS)
def test_a_step_stays_on_its_device(name):
    with FakeTensorMode():
        logits = torch.empty(2, 3, 64, 64, device="cuda")
        label = torch.empty(2, 64, 64, dtype=torch.int64, device="cuda")
        out = STEPS[name](logits, label, label.to(torch.uint8))
        assert out.device.type == "cuda"


@fake_gpu
def test_tiles_are_made_on_the_device_of_the_slice():
    with FakeTensorMode(), torch.device("cuda"):
        prob = emseg.predict_slices(emseg.UNet(1, 2, 1), torch.empty(1, 1, 1300, 64))
        assert prob.shape == (1, 2, 1300, 64) and prob.device.type == "cuda"


@pytest.mark.parametrize("name", ["seget", "fcn8s", "segnet", "deeplabv3plus", "deeplab-drn"])
def test_any_size_is_mirrored_up_to_one_that_the_network_takes(name):
    network, x = NETWORKS[name](1, 2, 2).eval(), torch.randn(2, 1, 50, 60)
    emseg.check_patch_size(network, (50, 60), name)
    whole = network(F.pad(x, (0, 4, 0, 14), mode="reflect"))
    torch.testing.assert_close(network(x), whole[..., :50, :60])
    assert network(torch.randn(2, 1, 1, 7)).shape == (2, 2, 1, 7)


# -- U-Nets


def tiny(**options):
    torch.manual_seed(0)
    return emseg.UNet(1, 2, **{"width": 4, "levels": 3, "norm": None, **options}).eval()


@pytest.mark.parametrize("up", ["transposed", "bilinear"])
def test_two_level_unet_by_hand(up):
    network = tiny(levels=2, up=up)
    x = torch.randn(1, 1, 12, 16)

    def block(x, layers):
        for conv in layers[::2]:
            x = F.conv2d(x, conv.weight, conv.bias, padding=1).relu()
        return x

    skip = block(x, network.encoder[0])
    deep = skip.unflatten(2, (6, 2)).unflatten(4, (8, 2)).amax((3, 5))      # 2 x 2 maxima
    deep = block(deep, network.encoder[1])
    if up == "transposed":
        deep = F.conv_transpose2d(deep, network.up[0].weight, network.up[0].bias, stride=2)
    else:
        deep = torch.from_numpy(ndimage.zoom(deep.detach().numpy(), (1, 1, 2, 2), order=1))
    wanted = block(torch.cat([skip, deep], 1), network.decoder[0])
    wanted = F.conv2d(wanted, network.head.weight, network.head.bias)
    torch.testing.assert_close(network(x), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("levels", [2, 4])
def test_valid_unet_equals_the_interior_of_a_padded_one(levels):
    valid, padded = tiny(levels=levels, padding=0), tiny(levels=levels)
    padded.load_state_dict(valid.state_dict())
    m, start = valid.margin, 18                         # where both pool the same pairs of pixels
    side = 2 * m + 4 + (valid.offset - 2 * m - 4) % valid.stride
    big = torch.randn(1, 1, 144, 144)
    small = valid(big[..., start : start + side, start : start + side])
    inside = slice(start + m, start + side - m)
    assert small.shape[-1] >= 4 and small.std() > 0
    torch.testing.assert_close(small, padded(big)[..., inside, inside], atol=1e-5, rtol=1e-4)


def test_a_unet_without_normalisation_keeps_its_signal():
    """He initialisation: 18 ReLUs neither extinguish nor blow up what passes through them."""
    torch.manual_seed(0)
    network, sizes = emseg.UNet5(1, 5), []
    for module in network.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda m, i, out: sizes.append(out.square().mean()))
    with torch.no_grad():
        network(torch.randn(2, 1, 64, 64))
    assert len(sizes) == 18 and 0.1 < min(sizes) and max(sizes) < 30


@pytest.mark.parametrize("depth, dtype, tolerance", [
    (1, torch.float32, 1e-5), (3, torch.float32, 1e-5), (2, torch.bfloat16, 0.02)])
def test_convolution_3d_and_its_gradients_can_be_trusted(depth, dtype, tolerance):
    torch.manual_seed(0)
    conv = emseg.Conv3d(16, 32, bias=False)
    plain = nn.Conv3d(16, 32, 3, padding=1, bias=False)
    plain.load_state_dict(conv.state_dict())
    x, y = torch.randn(2, 16, depth, 7, 8), torch.randn(2, 32, depth, 7, 8)
    results = []
    for layer, image in (conv, x.clone()), (plain.double(), x.double()):
        with torch.autocast("cpu", dtype=dtype, enabled=layer is conv and dtype != torch.float32):
            out = layer(image.requires_grad_())
        (out.double() * y).sum().backward()
        results.append([value.double() for value in (out, image.grad, layer.weight.grad)])
    for found, wanted in zip(*results):
        assert found.shape == wanted.shape
        assert (found - wanted).norm() < tolerance * wanted.norm()


def test_a_strided_bottleneck_and_its_gradients_can_be_trusted():
    """Channels last, where oneDNN has given wrong gradients (issue 6035)."""
    torch.manual_seed(0)
    block, exact = [emseg.Bottleneck(4, 32, stride=2) for _ in range(2)]
    exact.load_state_dict(block.state_dict())
    x, results = torch.randn(4, 4, 24, 20), []
    for part, image in (block.to(memory_format=torch.channels_last),
                        x.to(memory_format=torch.channels_last)), (exact.double(), x.double()):
        out = part(image.requires_grad_())
        (out.double() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        results.append([out, image.grad, *[p.grad for p in part.parameters()]])
    assert results[0][0].shape == (4, 32, 12, 10)
    for found, wanted in zip(*results):
        assert (found - wanted).norm() < 1e-4 * wanted.norm()


# -- FracTALResNet and CEECNet


def tanimoto_by_the_book(p, q, dims, depth, smooth=1e-5):
    """Diakogiannis 2021, equations 2 to 4, summed over dims, in float64."""
    def similarity(p, q, d):
        pq, pp, qq = [(a * b).sum(dims, keepdims=True) for a, b in ((p, q), (p, p), (q, q))]
        return (pq + smooth) / (2**d * (pp + qq) - (2 ** (d + 1) - 1) * pq + smooth)
    each = [(similarity(p, q, d) + similarity(1 - p, 1 - q, d)) / 2 for d in range(depth)]
    return sum(each) / depth


@pytest.mark.parametrize("depth", [1, 5, 20])
def test_fractal_tanimoto_is_that_of_the_paper(depth):
    rng = np.random.default_rng(0)
    p, q = rng.random((2, 2, 3, 4, 5))
    p[0], q[0] = (p[0] > 0.5) * 1.0, (q[0] > 0.5) * 1.0
    q[1] = (p[1] + 0.02 * q[1]).clip(0, 1)                  # close to equality
    dims = 1, (2, 3), (1, 2, 3), (0, 1, 2, 3)
    found = emseg.fractal_tanimoto(torch.tensor(p), torch.tensor(q), *dims, depth=depth)
    shapes = [(2, 1, 4, 5), (2, 3, 1, 1), (2, 1, 1, 1), (1, 1, 1, 1)]
    assert [x.shape for x in found] == shapes and found[0].dtype == torch.float32
    for one, dim in zip(found, dims):
        np.testing.assert_allclose(one, tanimoto_by_the_book(p, q, dim, depth), rtol=2e-4)


@pytest.mark.parametrize("depth", [0, 5])
def test_fractal_tanimoto_has_finite_gradients_at_equality(depth):
    for value in 0.0, 0.5, 1.0:
        p = torch.full((1, 2, 4, 4), value, requires_grad=True)
        total = sum(x.sum() for x in emseg.fractal_tanimoto(p, p.detach(), 1, (2, 3), depth=depth))
        total.backward()
        assert total.item() == pytest.approx(16 + 2) and p.grad.abs().max() < 1e-3


# -- SenFormer


def random_tokens(network):
    """In float64, with norms, biases and queries that show where they are used."""
    for name, parameter in network.double().named_parameters():
        if parameter.dim() == 1 or name.endswith(("relative_bias", "queries")):
            nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.7)
        else:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return network.eval()


def normed(state, name, x):
    """LayerNorm from its weights alone."""
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def mlp_by_hand(state, x):
    hidden = linear(state, "mlp.0", normed(state, "norm_mlp", x))
    hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    return x + linear(state, "mlp.2", hidden)


def swin_block_by_hand(state, x, heads, shift):
    """Each window and head by itself: the tokens between lines at shift, shift + 7, ..."""
    B, H, W, C = x.shape
    padded = x.new_zeros(B, H + -H % 7, W + -W % 7, C)
    padded[:, :H, :W] = normed(state, "norm_attention", x)
    q, k, v = linear(state, "attention.qkv", padded).unflatten(3, (3, heads, C // heads)).unbind(3)
    rows, columns = [(np.arange(n) - shift) // 7 for n in padded.shape[1:3]]
    seen = torch.zeros_like(q)
    for row in set(rows):
        for column in set(columns):
            ys, xs = [i.ravel() for i in np.meshgrid(np.flatnonzero(rows == row),
                                                     np.flatnonzero(columns == column))]
            offset = 13 * (ys[:, None] - ys + 6) + xs[:, None] - xs + 6
            for head in range(heads):
                place = (slice(None), ys, xs, head)
                scores = q[place] @ k[place].transpose(1, 2) / (C // heads) ** 0.5
                scores = scores + state["relative_bias"][offset, head]
                seen[place] = scores.softmax(2) @ v[place]
    return mlp_by_hand(state, x + linear(state, "attention.project", seen.flatten(3))[:, :H, :W])


@pytest.mark.parametrize("sides", [(9, 16), (14, 7), (3, 5)])
@pytest.mark.parametrize("shifted", [False, True])
def test_swin_block_and_its_gradients_against_a_loop_over_windows(shifted, sides):
    torch.manual_seed(0)
    block = random_tokens(emseg.SwinBlock(6, 2, shifted))
    x, results = torch.randn(2, *sides, 6, dtype=torch.float64, requires_grad=True), []
    state = dict(block.named_parameters())
    for out in block(x), swin_block_by_hand(state, x, 2, 3 if shifted else 0):
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        results.append([out, *torch.autograd.grad((out * weight).sum(), [x, *state.values()])])
    for found, wanted in zip(*results):
        torch.testing.assert_close(found, wanted)


def test_stochastic_depth_drops_whole_samples():
    torch.manual_seed(0)
    block, x = emseg.SwinBlock(8, 1, drop=0.5), torch.randn(64, 3, 4, 8)
    nn.init.zeros_(block.mlp[2].weight)                 # attention alone
    nn.init.zeros_(block.mlp[2].bias)
    found, whole = block.train()(x) - x, block.eval()(x) - x
    kept = found.flatten(1).any(1)
    assert 0.2 < kept.float().mean() < 0.8
    torch.testing.assert_close(found[kept], 2 * whole[kept])


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("name, branches", [("senformer", 4), ("unet++", 4), ("unet++3", 2)])
def test_branches_are_averaged_as_probabilities(name, branches, classes):
    network, _ = small("senformer", c_out=classes)
    if name != "senformer":
        network = NETWORKS[name](1, classes, 8, average_branches=True)
    x = torch.randn(2, 1, 96, 32)
    with torch.no_grad():
        out, heads = network.eval()(x), network(x, heads=True)
    prob = torch.stack([emseg.probabilities(logits) for logits in heads])
    torch.testing.assert_close(emseg.probabilities(out), prob.mean(0))
    assert len(heads) == branches and prob.std(0).mean() > 0.001
    assert torch.equal(network.combine(heads), out)


@pytest.mark.parametrize("sides, patch, message", [
    ((8, 0, 0), (20, 16), "--patch-size 20 x 16: .* multiple of 8; nearest to 20: 16 or 24"),
    ((8, 0, 0, 3), (9, 16, 17), "patch-size 9 x 16 x 17: .* nearest to 17: 16 or 24"),
    ((16, 12, 92), (570, 572), "sides of 12 \\+ a multiple of 16; nearest to 570: 556 or 572"),
    ((16, 12, 92), (60, 60), "nearest to 60: 188$"),
    ((8, 0, 0), (8, 16, 16), "--patch-size 8 x 16 x 16: unet takes two sides, Y X$"),
    ((8, 0, 0, 3), (16, 16), "--patch-size 16 x 16: unet takes three sides, Z Y X$"),
    ((8, 0, 0, 3), (7, 16, 16), "--patch-size 7 x 16 x 16: unet needs 8 slices or more$"),
])
def test_patch_sizes_that_do_not_fit_say_what_would(sides, patch, message):
    stride, offset, margin, dims = (*sides, 2)[:4]
    network = SimpleNamespace(stride=stride, offset=offset, margin=margin, dims=dims, min_depth=8)
    with pytest.raises(emseg.InputError, match=message):
        emseg.check_patch_size(network, patch, "unet")


# -- probabilities


def test_class_ids_threshold_one_channel_and_take_the_largest_of_several():
    prob = torch.tensor([[0.2, 0.5, 0.50001, 0.9]])[:, None, :, None]
    assert emseg.class_ids(prob)[0, :, 0].tolist() == [0, 0, 1, 1]
    assert emseg.class_ids(prob, threshold=0.1)[0, :, 0].tolist() == [1, 1, 1, 1]
    several = torch.tensor([[0.3, 0.2, 0.5], [0.4, 0.35, 0.25]]).T[None, :, :, None]
    ids = emseg.class_ids(several)
    assert ids.dtype == torch.int64 and ids[0, :, 0].tolist() == [2, 0]


def test_mean_logits_are_exact_for_extreme_ones():
    """Half of the heads sure of yes: log 1 - log 1; all sure of it: their mean odds."""
    for sure, wanted in ([200.0, -200.0], 0.0), ([200.0, 200.0], 200.0), ([-99.0, -99.0], -99.0):
        heads = [torch.full((1, 1, 1, 1), x).requires_grad_() for x in sure]
        found = emseg.mean_logits(heads)
        found.sum().backward()
        assert found.item() == pytest.approx(wanted, abs=1e-4)
        assert all(x.grad.isfinite() for x in heads)


# -- losses


def example(channels, shape):
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(shape[0], channels, *shape[1:]))
    label = rng.integers(0, max(channels, 2), shape)
    label[rng.random(shape) < 0.3] = IGNORE
    return [torch.from_numpy(x) for x in (logits, label, rng.uniform(0.5, 2, shape))]


def plain_dice(prob, y, weight, squared, smooth=1e-5):
    """1 - Dice of each foreground class, from the annotated voxels: prob (N, K), y (N,)."""
    losses = []
    for k in range(1, prob.shape[1]):
        p, truth = prob[:, k], (y == k).double()
        total = (p**2 + truth**2 if squared else p + truth).sum()
        losses.append(1 - (2 * (p * truth).sum() + smooth) / (total + smooth))
    return sum(losses) / len(losses)


def plain_cross_entropy(prob, y, weight):
    return -(prob[range(len(y)), y].log() * weight).mean()


LOSSES = {
    "dice": (lambda x, y, w: emseg.soft_dice_loss(x, y),
             lambda *args: plain_dice(*args, squared=False)),
    "squared dice": (lambda x, y, w: emseg.soft_dice_loss(x, y, squared=True, smooth=1.0),
                     lambda *args: plain_dice(*args, squared=True, smooth=1.0)),
    "cross entropy": (lambda x, y, w: emseg.cross_entropy(x, y),
                      lambda p, y, w: plain_cross_entropy(p, y, torch.ones_like(w))),
    "weighted cross entropy": (lambda x, y, w: emseg.cross_entropy(x, y, w.float()),
                               plain_cross_entropy)}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(2, 4, 5), (1, 3, 2, 5)])    # (B, Y, X) and (B, Z, Y, X)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_their_gradients_are_those_of_the_annotated_voxels(name, shape, channels):
    logits, label, weight = example(channels, shape)
    loss, plain = LOSSES[name]
    x, exact = [logits.detach().clone().requires_grad_() for _ in range(2)]
    found, keep = loss(x, label, weight), label != IGNORE
    kept = exact.movedim(1, -1)[keep]                           # (N, C)
    prob = kept.softmax(1) if channels > 1 else torch.cat([(-kept).sigmoid(), kept.sigmoid()], 1)
    wanted = plain(prob, label[keep], weight[keep])
    found.backward()
    wanted.backward()
    assert found.dtype == torch.float32 and found.item() == pytest.approx(wanted.item(), rel=1e-5)
    torch.testing.assert_close(x.grad, exact.grad, atol=2e-6, rtol=1e-4)
    assert not x.grad.movedim(1, -1)[~keep].any()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_nothing_annotated_gives_zero_and_no_gradient(name, channels):
    logits, label, weight = example(channels, (2, 4, 5))
    x = (50 * logits).requires_grad_()
    loss = LOSSES[name][0](x, torch.full_like(label, IGNORE), weight)
    loss.backward()
    assert loss == 0 and not x.grad.any()


def test_losses_are_exact_for_extreme_logits():
    x = torch.tensor([100.0, -100.0, 100.0, -100.0])
    label = torch.tensor([0, 1, 1, 0])[None, None]
    for logits in (x[None, None, None], torch.stack([-x / 2, x / 2])[None, :, None]):
        logits.requires_grad_()
        loss = emseg.cross_entropy(logits, label)
        loss.backward()
        assert loss.item() == pytest.approx(50)         # two of four voxels are wrong by 100
        torch.testing.assert_close(logits.grad[0, -1, 0], torch.tensor([0.25, -0.25, 0, 0]))
        assert emseg.soft_dice_loss(logits, label).item() == pytest.approx(0.5, abs=1e-5)


def test_masked_fractal_tanimoto_is_that_of_the_kept_pixels():
    p, q = torch.rand(2, 1, 3, 6, 7, requires_grad=True)
    p.retain_grad()
    valid = torch.rand(1, 1, 6, 7) > 0.4
    kept = [x[:, :, None, valid[0, 0]] for x in (p, q)]
    found, wanted = [emseg.fractal_tanimoto(*x, (1, 2, 3), depth=3, **options)[0] for x, options in
                     (((p, q), {"valid": valid}), (kept, {}))]
    torch.testing.assert_close(found, wanted)
    found.sum().backward()
    assert (p.grad.ne(0) == valid).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_mean_logits_and_their_gradient_are_those_of_the_mean_probability(channels):
    torch.manual_seed(0)
    branches, results = 3 * torch.randn(4, 2, channels, 5, 6), []
    branches[0, 0] = 15                                 # a learner that is sure
    for x in branches.clone(), branches.double():
        x.requires_grad_()
        if x.dtype == torch.float32:
            out = emseg.mean_logits(list(x))
        elif channels == 1:
            prob = (1 / (1 + (-x).exp())).mean(0)
            out = (prob / (1 - prob)).log()
        else:
            out = (x.exp() / x.exp().sum(2, keepdim=True)).mean(0).log()
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        results.append([out.double(), x.grad.double()])
    for found, wanted in zip(*results):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
