"""Layers, networks and losses against published counts, torch.nn, SciPy and NumPy loops."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import nn

import emseg
from conftest import convolutions, enlarged, normalised, random_statistics

IGNORE = emseg.IGNORE


def tiny(**options):
    torch.manual_seed(0)
    return emseg.UNet(1, 2, **{"width": 4, "levels": 3, "norm": None, **options}).eval()


# -- layers


def test_conv_block_is_convolution_normalisation_relu():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 9)
    block = emseg.conv_block((3, 4, 5))
    names = [type(layer).__name__ for layer in block]
    assert names == ["Conv2d", "BatchNorm2d", "ReLU"] * 2
    wanted = x
    for conv, _, _ in zip(block[::3], block[1::3], block[2::3]):
        wanted = F.conv2d(wanted, conv.weight, conv.bias, padding=1)
        wanted = wanted - wanted.mean((0, 2, 3), keepdim=True)
        wanted = (wanted / (wanted.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()).relu()
    torch.testing.assert_close(block(x), wanted, atol=1e-4, rtol=1e-4)


def test_conv_block_without_normalisation_and_padding():
    block = emseg.conv_block((3, 4, 5), norm=None, padding=0)
    assert [type(layer).__name__ for layer in block] == ["Conv2d", "ReLU"] * 2
    out = block(torch.randn(2, 3, 8, 9))
    assert out.shape == (2, 5, 4, 5) and out.min() == 0 < out.max()


def test_norm_conv_block_3d_normalises_first():
    block = emseg.norm_conv_block_3d(1, 4, 32)
    assert [type(layer).__name__ for layer in block] == ["GroupNorm", "Conv3d", "ReLU"] * 2
    assert [layer.num_groups for layer in block[::3]] == [1, 4]
    assert all(conv.bias is None for conv in block[1::3])
    groups = [emseg.norm_conv_block_3d(c, 1)[0].num_groups for c in (8, 12, 64, 3)]
    assert groups == [8, 4, 8, 1]


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
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


def test_bilinear_up_is_linear_with_aligned_corners():
    x = torch.randn(2, 3, 5, 7)
    wanted = ndimage.zoom(x.numpy(), (1, 1, 2, 2), order=1)     # SciPy's default: corners stay
    np.testing.assert_allclose(emseg.BilinearUp()(x), wanted, atol=1e-5)


@pytest.mark.parametrize("size, wanted", [((4, 4), np.s_[3:7, 2:6]), ((10, 9), np.s_[0:10, 0:9]),
                                          ((3, 9), np.s_[3:6, 0:9]), ((10, 2), np.s_[0:10, 3:5])])
def test_crop_like_takes_the_centre(size, wanted):
    x = torch.arange(90.0).view(1, 1, 10, 9)
    assert torch.equal(emseg.crop_like(x, torch.empty(2, 5, *size)), x[(..., *wanted)])


# -- networks


@pytest.mark.parametrize("classes, options, count", [
    (1, dict(), 7_701_825),
    (5, dict(width=32, levels=5, norm=None), 7_759_653),
    (7, dict(levels=5, norm=None, padding=0), 31_030_983),
    (1, dict(up="bilinear"), 4_283_201),
])
def test_parameter_counts_are_the_published_ones(classes, options, count):
    with torch.device("meta"):
        network = emseg.UNet(1, classes, **options)
    assert emseg.count_parameters(network) == count
    assert f"{count:,} (1 in, {classes} out)" in emseg.UNet.__doc__


def test_parameter_count_with_15_input_channels():
    with torch.device("meta"):
        assert emseg.count_parameters(emseg.UNet(15, 1)) == 7_709_889


def test_count_parameters_leaves_out_frozen_ones():
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    network[0].requires_grad_(False)
    assert emseg.count_parameters(network) == 25


def test_resunet_layers_are_the_authors():
    with torch.device("meta"):
        network = emseg.ResUNet(1, 1)
    blocks = [(1, 64, 64), (64, 128, 128), (128, 256, 256), (256, 256, 256),
              (512, 256, 128), (256, 128, 64), (128, 64, 64)]
    wanted = [pair for i, m, o in blocks for pair in ((i, m, 3), (m, o, 3))] + [(64, 1, 1)]
    assert convolutions(network) == wanted
    assert emseg.count_parameters(network) == 4_283_201
    assert sum(isinstance(m, nn.BatchNorm2d) for m in network.modules()) == 14


def test_unet_layers_double_and_halve():
    with torch.device("meta"):
        found = convolutions(emseg.UNet(3, 2, width=8, levels=3))
    encoder = [(3, 8, 3), (8, 8, 3), (8, 16, 3), (16, 16, 3), (16, 32, 3), (32, 32, 3)]
    decoder = [(32, 16, 3), (16, 16, 3), (16, 8, 3), (8, 8, 3)]
    assert found == encoder + [(32, 16, 2), (16, 8, 2)] + decoder + [(8, 2, 1)]


@pytest.mark.parametrize("name", ["unet", "resunet"])
def test_networks_by_name_take_channels_and_width(name):
    with torch.device("meta"):
        published = emseg.NETWORKS[name](1, 1)
    assert convolutions(published)[0] == (1, 64, 3)
    network = emseg.NETWORKS[name](2, 3, 4)
    assert convolutions(network)[0] == (2, 4, 3) and network.stride == 8
    for H, W in (8, 8), (16, 24), (32, 8), (40, 56):
        assert network(torch.randn(2, 2, H, W)).shape == (2, 3, H, W)


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


def valid_output(side, levels):
    """Output side of a valid U-Net, None where a pooling would drop a row or nothing is left."""
    skips = []
    for _ in range(levels - 1):
        side -= 4
        if side < 2 or side % 2:
            return None
        skips.append(side)
        side //= 2
    side -= 4
    for _ in skips:
        if side < 1:
            return None
        side = 2 * side - 4
    return side if side > 0 else None


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
def test_valid_unet_takes_exactly_the_sides_of_its_stride_and_offset(levels):
    with torch.device("meta"):
        network = emseg.UNet(1, 2, width=2, levels=levels, norm=None, padding=0)
    assert network.stride == 2 ** (levels - 1)
    for side in range(1, 300):
        wanted = valid_output(side, levels)
        taken = side % network.stride == network.offset and side > 2 * network.margin
        assert taken == (wanted is not None)
        if taken:
            assert wanted == side - 2 * network.margin


@pytest.mark.parametrize("levels", [2, 3])
def test_valid_unet_output_sides(levels):
    network = tiny(levels=levels, padding=0)
    for side in range(2 * network.margin + 1, 2 * network.margin + 20):
        if side % network.stride == network.offset:
            out = network(torch.zeros(1, 1, side, side + network.stride))
            smaller = side - 2 * network.margin
            assert out.shape == (1, 2, smaller, smaller + network.stride)


def test_valid_unet_has_the_published_sides():
    with torch.device("meta"):
        network = emseg.UNet(1, 7, width=2, levels=5, norm=None, padding=0)
        assert network(torch.zeros(1, 1, 572, 572)).shape == (1, 7, 388, 388)
    assert (network.stride, network.offset, network.margin) == (16, 12, 92)


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
@pytest.mark.parametrize("up", ["transposed", "bilinear"])
def test_padded_unet_keeps_exactly_the_multiples_of_its_stride(levels, up):
    with torch.device("meta"):
        network = emseg.UNet(1, 1, width=2, levels=levels, norm=None, up=up)
        assert (network.stride, network.offset, network.margin) == (2 ** (levels - 1), 0, 0)
        for side in range(network.stride, 40):
            kept = network(torch.zeros(1, 1, side, side)).shape == (1, 1, side, side)
            assert kept == (side % network.stride == 0)


@pytest.mark.parametrize("levels", [2, 3, 4])
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


@pytest.mark.parametrize("options", [dict(), dict(norm="batch"), dict(norm="batch", up="bilinear"),
                                     dict(padding=0)])
def test_gradient_reaches_every_parameter(options):
    network = tiny(width=8, **options).train()
    network(torch.randn(2, 1, 48, 48)).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


# -- rivals of SegET


def halves(x):
    """2 x 2 maxima (B, C, H, W) and the places of these maxima in the picture, flattened."""
    B, C, H, W = x.shape
    place = torch.arange(H * W, dtype=torch.float32).view(1, 1, H, W).expand_as(x)
    def blocks(x):
        return x.unflatten(2, (H // 2, 2)).unflatten(4, (W // 2, 2)).permute(
            0, 1, 2, 4, 3, 5).flatten(4)
    best, at = blocks(x).max(-1)
    return best, blocks(place).gather(-1, at[..., None])[..., 0].long()


def vgg_by_hand(state, x, blocks):
    """Pooled outputs, outputs and places of the encoder's blocks."""
    pooled, full, places = [], [], []
    for level in range(blocks):
        full.append(normalised(state, f"encoder.{level}", pooled[-1] if level else x))
        best, at = halves(full[-1])
        pooled.append(best)
        places.append(at)
    return pooled, full, places


def fcn8s_by_hand(state, x):
    (_, _, pool3, pool4, pool5), *_ = vgg_by_hand(state, x, 5)
    x = normalised(state, "classifier.0", pool5)
    x = normalised(state, "classifier.2", x)

    def score(name, x):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def up(name, x, factor):
        return F.conv_transpose2d(x, state[f"{name}.weight"], stride=factor, padding=factor // 2,
                                  groups=x.shape[1])

    x = up("up", score("score", x), 2) + score("score_pool4", pool4)
    return up("up_pool3", up("up_pool4", x, 2) + score("score_pool3", pool3), 8)


def segnet_by_hand(state, x):
    pooled, full, places = vgg_by_hand(state, x, 5)
    x = pooled[-1]
    for level in range(5):
        flat = torch.zeros_like(full[4 - level]).flatten(2)
        x = flat.scatter(2, places[4 - level].flatten(2), x.flatten(2)).view_as(full[4 - level])
        x = normalised(state, f"decoder.{level}", x)
    return F.conv2d(x, state["head.weight"], state["head.bias"], padding=1)


def deeplab_by_hand(state, x):
    _, full, _ = vgg_by_hand(state, x, 5)
    x = full[4]
    for block in range(3):
        x = normalised(state, f"dilated.{block}", x, padding=2, dilation=2)
    seen = [normalised(state, "aspp.branches.0", x)] + [
        normalised(state, f"aspp.branches.{i}", x, padding=rate, dilation=rate)
        for i, rate in enumerate((6, 12, 18), 1)]
    kernel, bias = state["aspp.image.0.weight"], state["aspp.image.0.bias"]
    image = F.conv2d(x.mean((2, 3), keepdim=True), kernel, bias)
    seen.append(image.relu() * torch.ones_like(seen[0]))
    x = normalised(state, "aspp.project", torch.cat(seen, 1))
    low = normalised(state, "low_level", full[2])
    x = normalised(state, "decoder", torch.cat([enlarged(x, 4), low], 1))
    return enlarged(F.conv2d(x, state["head.weight"], state["head.bias"]), 4)


RIVALS = {"fcn8s": (fcn8s_by_hand, 134_289_379), "segnet": (segnet_by_hand, 29_479_489),
          "deeplabv3plus": (deeplab_by_hand, 41_997_393)}


@pytest.mark.parametrize("name", RIVALS)
def test_rivals_by_hand(name):
    torch.manual_seed(0)
    network = random_statistics(emseg.NETWORKS[name](2, 3, 4)).double()
    x = torch.randn(2, 2, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        wanted = RIVALS[name][0](network.state_dict(), x)
        assert wanted.std() > 0.01
        torch.testing.assert_close(network(x), wanted)


@pytest.mark.parametrize("name", RIVALS)
def test_rivals_have_the_parameters_that_they_say(name):
    with torch.device("meta"):
        network = emseg.NETWORKS[name](1, 1)
    assert emseg.count_parameters(network) == RIVALS[name][1]
    assert f"{RIVALS[name][1]:,} parameters" in emseg.NETWORKS[name](1, 1, 2).__doc__


def test_rivals_have_the_convolutions_of_their_papers():
    with torch.device("meta"):
        fcn8s, segnet, deeplab = [emseg.NETWORKS[name](1, 1) for name in RIVALS]
    vgg16 = [(1, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 256),
             (256, 512), *[(512, 512)] * 5]
    assert convolutions(fcn8s.encoder) == convolutions(segnet.encoder) == [(*c, 3) for c in vgg16]
    assert convolutions(fcn8s.classifier) == [(512, 4096, 7), (4096, 4096, 1)]
    mirrored = [(o, i, 3) for i, o in reversed(vgg16)]
    mirrored[-1] = (64, 64, 3)
    assert convolutions(segnet.decoder) == mirrored
    encoder = convolutions(deeplab.encoder) + convolutions(deeplab.dilated)
    assert len(encoder) == 23 and len(deeplab.encoder) + len(deeplab.dilated) == 8
    assert [len(block) // 3 for block in deeplab.encoder] == [2, 2, 4, 4, 4]
    assert convolutions(deeplab.aspp.branches) == [(512, 256, 1), *[(512, 256, 3)] * 3]
    rates = [m.dilation[0] for m in deeplab.aspp.branches.modules() if isinstance(m, nn.Conv2d)]
    assert rates == [1, 6, 12, 18]
    assert convolutions(deeplab.low_level) == [(256, 48, 1)]


# -- DeepLabv3


def stage_by_hand(state, name, x, dilations, stride=1):
    for block, dilation in enumerate(dilations):
        part, stride = f"{name}.{block}", 1 if block else stride
        y = normalised(state, f"{part}.residual.0", x)
        y = normalised(state, f"{part}.residual.1", y, stride=stride, padding=dilation,
                       dilation=dilation)
        y = normalised(state, f"{part}.residual.2", y, relu=False)
        if not block:
            x = normalised(state, f"{part}.shortcut", x, relu=False, stride=stride)
        x = (x + y).relu()
    return x


def resnet101_by_hand(state, x):
    x = normalised(state, "backbone.0", x, stride=2)
    x = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 2).unfold(3, 3, 2).amax((4, 5))     # x >= 0
    x = stage_by_hand(state, "backbone.2", x, 3 * [1])
    x = stage_by_hand(state, "backbone.3", x, 4 * [1], stride=2)
    x = stage_by_hand(state, "backbone.4", x, 23 * [1], stride=2)
    return stage_by_hand(state, "backbone.5", x, [2 * 1, 2 * 2, 2 * 4])


def drn_by_hand(state, x):
    x = normalised(state, "backbone.1", normalised(state, "backbone.0", x))
    x = normalised(state, "backbone.2", x, stride=2)
    x = stage_by_hand(state, "backbone.3", x, 3 * [1], stride=2)
    x = stage_by_hand(state, "backbone.4", x, 4 * [1], stride=2)
    x = stage_by_hand(state, "backbone.5", x, 6 * [2])
    x = stage_by_hand(state, "backbone.6", x, 3 * [4])
    x = normalised(state, "backbone.7", x, padding=2, dilation=2)
    return normalised(state, "backbone.8", x)


# backbone, its output stride, how far it sees to each side, rates; parameters (1 in, 7 out)
DEEPLABS = {
    "deeplab-resnet101": (resnet101_by_hand, 16, 3 + 2 + 3 * 4 + (4 + 3 * 8) + (8 + 22 * 16)
                          + (2 + 4 + 8) * 16, (6, 12, 18), 58_620_871),
    "deeplab-drn": (drn_by_hand, 8, 3 + 1 + 1 + (2 + 2 * 4) + (4 + 3 * 8) + 6 * 2 * 8 + 3 * 4 * 8
                    + 2 * 8 + 8, (12, 24, 36), 40_018_327)}


def with_statistics_of(network, x):
    """random_statistics, but the running ones are those of x: over 100 layers random ones grow to
    values that no shift can change."""
    random_statistics(network)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1
    network.train()(x)
    return network.eval()


@pytest.mark.parametrize("sides", [(32, 608), (608, 32)])     # long enough for the largest rate
@pytest.mark.parametrize("name", DEEPLABS)
def test_deeplabs_by_hand(name, sides):
    backbone, factor, _, rates, _ = DEEPLABS[name]
    torch.manual_seed(0)
    x, other = torch.randn(2, 2, 2, *sides, dtype=torch.float64)
    with torch.no_grad():
        network = with_statistics_of(emseg.NETWORKS[name](2, 3, 4).double(), other)
        state = network.state_dict()
        y = backbone(state, x)
        seen = [normalised(state, "aspp.branches.0", y)] + [
            normalised(state, f"aspp.branches.{i}", y, padding=rate, dilation=rate)
            for i, rate in enumerate(rates, 1)]
        kernel, bias = state["aspp.image.0.weight"], state["aspp.image.0.bias"]
        image = F.conv2d(y.mean((2, 3), keepdim=True), kernel, bias)
        seen.append(image.relu() * torch.ones_like(seen[0]))
        y = normalised(state, "classifier", normalised(state, "aspp.project", torch.cat(seen, 1)))
        wanted = enlarged(F.conv2d(y, state["head.weight"], state["head.bias"]), factor)
        assert 0.01 < wanted.std() < 10
        torch.testing.assert_close(network(x), wanted)


@pytest.mark.parametrize("c_in, stride, dilation", [(4, 2, 1), (4, 1, 2), (32, 1, 3)])
def test_bottleneck_and_its_gradients_can_be_trusted(c_in, stride, dilation):
    torch.manual_seed(0)
    block, exact = [emseg.Bottleneck(c_in, 32, stride, dilation) for _ in range(2)]
    exact.load_state_dict(block.state_dict())
    x, results = torch.randn(4, c_in, 24, 20), []
    for part, image in (block.to(memory_format=torch.channels_last),
                        x.to(memory_format=torch.channels_last)), (exact.double(), x.double()):
        out = part(image.requires_grad_())
        (out.double() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        results.append([out, image.grad, *[p.grad for p in part.parameters()]])
    assert results[0][0].shape == (4, 32, 24 // stride, 20 // stride)
    for found, wanted in zip(*results):
        assert (found - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize("name", DEEPLABS)
def test_deeplabs_mirror_up_to_multiples_of_16(name):
    torch.manual_seed(0)
    network, x = emseg.NETWORKS[name](1, 2, 2).eval(), torch.randn(1, 1, 24, 40)
    mirrored = torch.cat([x, x[..., 15:23, :].flip(2)], 2)
    mirrored = torch.cat([mirrored, mirrored[..., 31:39].flip(3)], 3)
    torch.testing.assert_close(network(x), network(mirrored)[..., :24, :40])


@pytest.mark.parametrize("name", DEEPLABS)
def test_backbones_see_as_far_as_their_strides_and_dilations_say(name):
    """One bright column, without bias or negative weight: what is not 0 has seen it."""
    _, stride, radius, _, _ = DEEPLABS[name]
    backbone = emseg.NETWORKS[name](1, 1, 1).backbone.double().eval()
    for conv in backbone.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.constant_(conv.weight, 1 / conv.weight[0].numel())
    width = 2 * radius + 6 * stride
    width -= width % stride
    columns = width // 2 + torch.arange(stride)
    x = F.one_hot(columns, width).double()[:, None, None].expand(-1, 1, stride, width)
    with torch.no_grad():
        reached = backbone(x).amax((1, 2)) > 0
    centres = stride * torch.arange(width // stride)
    assert torch.equal(reached, (centres - columns[:, None]).abs() <= radius)


def test_deeplabs_have_the_published_parameters():
    with torch.device("meta"):
        for name, (*_, count) in DEEPLABS.items():
            assert emseg.count_parameters(emseg.NETWORKS[name](1, 7)) == count
            assert f"{count:,} parameters" in emseg.NETWORKS[name].__doc__
        resnet, drn = [emseg.NETWORKS[name](3, 21) for name in DEEPLABS]
    # torchvision's, with 1000 classes; with DeepLabv3, and BatchNorm in place of a bias of 256
    assert emseg.count_parameters(resnet.backbone) + 2049 * 1000 == 44_549_160
    assert emseg.count_parameters(resnet) + 256 == 58_630_997
    assert round((emseg.count_parameters(drn.backbone) + 513 * 1000) / 1e6, 1) == 35.8


def bottlenecks(c_in, c, blocks):
    """Convolutions of a stage: the first block's shortcut is a convolution."""
    first = [(c_in, c, 1), (c, c, 3), (c, 4 * c, 1), (c_in, 4 * c, 1)]
    return first + (blocks - 1) * [(4 * c, c, 1), (c, c, 3), (c, 4 * c, 1)]


def test_deeplabs_have_the_convolutions_of_their_papers():
    with torch.device("meta"):
        resnet, drn = networks = [emseg.NETWORKS[name](1, 7) for name in DEEPLABS]
    assert convolutions(resnet.backbone) == [
        (1, 64, 7), *bottlenecks(64, 64, 3), *bottlenecks(256, 128, 4),
        *bottlenecks(512, 256, 23), *bottlenecks(1024, 512, 3)]
    assert convolutions(drn.backbone) == [
        (1, 16, 7), (16, 16, 3), (16, 32, 3), *bottlenecks(32, 64, 3), *bottlenecks(256, 128, 4),
        *bottlenecks(512, 256, 6), *bottlenecks(1024, 512, 3), (2048, 512, 3), (512, 512, 3)]
    for network, c, (*_, rates, _) in zip(networks, (2048, 512), DEEPLABS.values()):
        assert convolutions(network.aspp) == [(c, 256, 1), *[(c, 256, 3)] * 3, (c, 256, 1),
                                              (5 * 256, 256, 1)]
        found = [m.dilation[0] for m in network.aspp.modules() if isinstance(m, nn.Conv2d)]
        assert found == [1, *rates, 1, 1]
        assert convolutions(network)[-2:] == [(256, 256, 3), (256, 7, 1)]


# -- any size


@pytest.mark.parametrize("sides", [(32, 64), (16, 48), (17, 31), (50, 33), (1, 7)])
@pytest.mark.parametrize("name", [*RIVALS, *DEEPLABS])
def test_any_size_is_taken(name, sides):
    network = emseg.NETWORKS[name](1, 2, 2).eval()
    assert (network.stride, network.offset, network.margin) == (1, 0, 0)
    x = torch.randn(2, 1, *sides)
    assert network(x).shape == (2, 2, *sides)
    emseg.check_patch_size(network, sides, name)


@pytest.mark.parametrize("name", [*RIVALS, *DEEPLABS])
def test_a_batch_of_one_teaches_every_parameter(name):
    torch.manual_seed(0)
    network = emseg.NETWORKS[name](1, 1, 4).train()
    network(torch.randn(1, 1, 64, 64)).square().mean().backward()
    for parameter_name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), parameter_name


def test_any_size_mirrors_and_cuts():
    class Shifted(nn.Module):
        @emseg.any_size(4)
        def forward(self, x):
            assert x.shape[-2] % 4 == x.shape[-1] % 4 == 0
            self.seen = x
            return x + 1

    x, network = torch.randn(1, 2, 6, 11), Shifted()
    torch.testing.assert_close(network(x), x + 1)
    assert network.seen.shape == (1, 2, 8, 12)
    torch.testing.assert_close(network.seen[..., 6:, :11], x[..., [4, 3], :])
    torch.testing.assert_close(network.seen[..., :6, 11], x[..., 9])


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_learned_up_begins_bilinear(factor):
    up, x = emseg.LearnedUp(3, factor), torch.randn(2, 3, 5, 7)
    out = up(x).detach()
    assert out.shape == (2, 3, 5 * factor, 7 * factor)
    inside = (..., slice(factor, -factor), slice(factor, -factor))      # borders fade to 0
    torch.testing.assert_close(out[inside], enlarged(x, factor).float()[inside], atol=1e-5, rtol=0)


def test_conv_block_passes_options_to_its_convolutions():
    block = emseg.conv_block((2, 4, 6), kernel=5, padding=4, dilation=2, stride=2)
    convs = block[::3]
    assert [(c.kernel_size, c.padding, c.dilation, c.stride) for c in convs] == [
        ((5, 5), (4, 4), (2, 2), (2, 2))] * 2
    assert block(torch.randn(2, 2, 16, 16)).shape == (2, 6, 4, 4)


def tiny_3d(in_channels=1, out_channels=2, width=8):
    torch.manual_seed(0)
    return emseg.UNet3D(in_channels, out_channels, width)


def test_every_network_says_how_many_dimensions_it_has():
    with torch.device("meta"):
        for networks, dims in (emseg.NETWORKS, 2), (emseg.NETWORKS_3D, 3):
            assert {network(1, 1).dims for network in networks.values()} == {dims}
        found = emseg.NETWORKS_3D["unet3d"](1, 1)
        assert emseg.UNet(1, 1, padding=0, norm=None).dims == 2
    assert (found.stride, found.offset, found.margin) == (8, 0, 0)


def test_unet3d_has_the_published_parameters():
    with torch.device("meta"):
        network = emseg.NETWORKS_3D["unet3d"](1, 1)
        steps = [(m.in_channels, m.out_channels) for m in network.modules()
                 if isinstance(m, nn.Conv3d)]
    assert emseg.count_parameters(network) == 16_318_691
    assert "16,318,691 parameters" in emseg.UNet3D.__doc__
    assert steps == [(1, 32), (32, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256),
                     (256, 512), (768, 256), (256, 256), (384, 128), (128, 128), (192, 64),
                     (64, 64), (64, 1)]


def unet3d_by_hand(state, x):
    """A 3D U-Net from its weights alone, in float64: nothing of the module's layers is used."""
    def block(x, name):
        for norm, conv in (0, 1), (3, 4):
            scale, shift, kernel = [state[f"{name}.{part}"].double() for part in
                                    (f"{norm}.weight", f"{norm}.bias", f"{conv}.weight")]
            groups = max(g for g in (1, 2, 4, 8) if x.shape[1] % g == 0)
            parts = x.unflatten(1, (groups, -1))
            mean = parts.mean((2, 3, 4, 5), keepdim=True)
            spread = (parts - mean).square().mean((2, 3, 4, 5), keepdim=True) + 1e-5
            x = ((parts - mean) / spread.sqrt()).flatten(1, 2)
            x = x * scale.view(-1, 1, 1, 1) + shift.view(-1, 1, 1, 1)
            x = F.conv3d(x, kernel, padding=1).relu()
        return x

    def halve(x):
        Z, H, W = [side // 2 for side in x.shape[2:]]
        return x[:, :, : 2 * Z, : 2 * H, : 2 * W].unflatten(2, (Z, 2)).unflatten(
            4, (H, 2)).unflatten(6, (W, 2)).amax((3, 5, 7))

    def enlarge(x, sides):
        z, y, xs = [torch.arange(new) * old // new for new, old in zip(sides, x.shape[2:])]
        return x[:, :, z][:, :, :, y][..., xs]

    x, skips = x.double(), []
    for level in range(4):
        x = block(halve(x) if level else x, f"encoder.{level}")
        skips.append(x)
    for level, skip in enumerate(skips[2::-1]):
        x = block(torch.cat([skip, enlarge(x, skip.shape[2:])], 1), f"decoder.{level}")
    head, bias = state["head.weight"].double(), state["head.bias"].double()
    return torch.einsum("oi,bizyx->bozyx", head[:, :, 0, 0, 0], x) + bias.view(-1, 1, 1, 1)


@pytest.mark.parametrize("sides", [(8, 16, 24), (16, 16, 8), (13, 17, 10)])
def test_unet3d_by_hand(sides):
    network = tiny_3d(in_channels=2, out_channels=3)
    for norm in network.modules():
        if isinstance(norm, nn.GroupNorm):              # 1 and 0 at first, which hides their place
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.uniform_(norm.bias, -1, 1)
    x = torch.randn(2, 2, *sides)
    with torch.no_grad():
        wanted = unet3d_by_hand(network.state_dict(), x)
        assert wanted.std() > 0.05
        torch.testing.assert_close(network(x).double(), wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("sides", [(8, 8, 8), (8, 16, 32), (16, 24, 8), (9, 15, 23), (31, 8, 10)])
def test_unet3d_keeps_the_sides_of_its_input(sides):
    assert tiny_3d()(torch.randn(2, 1, *sides)).shape == (2, 2, *sides)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("width", [1, 2, 3, 5, 8, 12, 16])
def test_unet3d_takes_channels_and_narrow_widths(width, channels):
    network = emseg.NETWORKS_3D["unet3d"](channels, 4, width)
    assert network(torch.randn(1, channels, 8, 8, 16)).shape == (1, 4, 8, 8, 16)
    assert network.head.in_channels == width


def test_unet3d_gradient_reaches_every_parameter():
    network = tiny_3d()
    network(torch.randn(2, 1, 16, 16, 16)).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


class Sides:
    def __init__(self, stride, offset, margin, dims=2, min_depth=8):
        self.stride, self.offset, self.margin = stride, offset, margin
        self.dims, self.min_depth = dims, min_depth


@pytest.mark.parametrize("numbers", [(1, 0, 0), (8, 0, 0), (16, 12, 92), (4, 1, 2)])
def test_network_side_is_the_smallest_output_that_fits(numbers):
    stride, offset, margin = numbers
    for side in range(1, 40):
        fits = [n for n in range(side, side + 20) if (n + 2 * margin) % stride == offset]
        assert emseg.network_side(Sides(*numbers), side) == fits[0]


@pytest.mark.parametrize("sides, patch", [
    ((8, 0, 0), (16, 24)), ((16, 12, 92), (188, 572)),
    ((8, 0, 0, 3), (8, 8, 16)), ((8, 0, 0, 3), (13, 16, 24))])
def test_patch_sizes_that_fit_are_taken(sides, patch):
    assert emseg.check_patch_size(Sides(*sides), patch, "unet") is None


@pytest.mark.parametrize("sides, patch, message", [
    ((8, 0, 0), (20, 16), "--patch-size 20 x 16: unet takes sides that are a multiple of 8; "
                          "nearest to 20: 16 or 24"),
    ((8, 0, 0), (16, 30), "nearest to 30: 24 or 32"),
    ((8, 0, 0), (3, 16), "nearest to 3: 8$"),
    ((8, 0, 0, 3), (9, 16, 17), "patch-size 9 x 16 x 17: .* nearest to 17: 16 or 24"),
    ((8, 0, 0, 3), (8, 4, 16), "nearest to 4: 8$"),
    ((16, 12, 92), (570, 572), "sides of 12 \\+ a multiple of 16; nearest to 570: 556 or 572"),
    ((16, 12, 92), (186, 188), "nearest to 186: 188$"),
    ((16, 12, 92), (60, 60), "nearest to 60: 188$"),
    ((16, 12, 92), (172, 188), "nearest to 172: 188$"),
    ((8, 0, 0), (8, 16, 16), "--patch-size 8 x 16 x 16: unet takes two sides, Y X$"),
    ((8, 0, 0, 3), (16, 16), "--patch-size 16 x 16: unet takes three sides, Z Y X$"),
    ((8, 0, 0, 3), (7, 16, 16), "--patch-size 7 x 16 x 16: unet needs 8 slices or more$"),
])
def test_patch_sizes_that_do_not_fit_say_what_would(sides, patch, message):
    with pytest.raises(emseg.InputError, match=message):
        emseg.check_patch_size(Sides(*sides), patch, "unet")


# -- probabilities


def test_probabilities_are_a_sigmoid_or_a_softmax():
    logits = torch.randn(2, 3, 4, 5, dtype=torch.bfloat16)
    x = logits.double().numpy()
    for part, wanted in ((logits[:, :1], 1 / (1 + np.exp(-x[:, :1]))),
                         (logits, np.exp(x) / np.exp(x).sum(1, keepdims=True))):
        prob = emseg.probabilities(part)
        assert prob.dtype == torch.float32 and prob.shape == part.shape
        np.testing.assert_allclose(prob, wanted, rtol=1e-5)


def test_class_ids_threshold_one_channel_and_take_the_largest_of_several():
    prob = torch.tensor([[0.2, 0.5, 0.50001, 0.9]])[:, None, :, None]
    assert emseg.class_ids(prob)[0, :, 0].tolist() == [0, 0, 1, 1]
    assert emseg.class_ids(prob, threshold=0.1)[0, :, 0].tolist() == [1, 1, 1, 1]
    several = torch.tensor([[0.3, 0.2, 0.5], [0.4, 0.35, 0.25]]).T[None, :, :, None]
    ids = emseg.class_ids(several)
    assert ids.dtype == torch.int64 and ids[0, :, 0].tolist() == [2, 0]


# -- losses


SHAPES = [(2, 4, 5), (1, 3, 2, 5)]                      # (B, Y, X) and (B, Z, Y, X)


def example(channels, shape, ignore=True, seed=0):
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(shape[0], channels, *shape[1:]))
    label = rng.integers(0, max(channels, 2), shape)
    if ignore:
        label[rng.random(shape) < 0.3] = IGNORE
    weight = rng.uniform(0.5, 2, shape)
    return logits, label, weight


def voxels(logits, label):
    """(batch, place) and the probabilities of every annotated voxel, one by one."""
    for place in np.ndindex(label.shape):
        if label[place] != IGNORE:
            x = logits[(place[0], slice(None), *place[1:])]
            if len(x) == 1:
                p = 1 / (1 + np.exp(-x[0]))
                yield place, np.array([1 - p, p])
            else:
                e = np.exp(x - x.max())
                yield place, e / e.sum()


def dice_by_loops(logits, label, squared, smooth):
    losses = []
    for k in range(1, max(2, logits.shape[1])):
        overlap = total = 0.0
        for place, p in voxels(logits, label):
            y = float(label[place] == k)
            overlap += p[k] * y
            total += p[k] ** 2 + y**2 if squared else p[k] + y
        losses.append(1 - (2 * overlap + smooth) / (total + smooth))
    return np.mean(losses)


def cross_entropy_by_loops(logits, label, weight):
    terms = [-np.log(p[label[place]]) * weight[place] for place, p in voxels(logits, label)]
    return np.sum(terms) / len(terms)


def value_and_gradient(loss, logits, *args, **options):
    x = torch.tensor(logits, dtype=torch.float32, requires_grad=True)
    value = loss(x, *args, **options)
    value.backward()
    return value.item(), x.grad.double().numpy()


def finite_differences(function, x, step=1e-5):
    gradient = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[place] += step
        down[place] -= step
        gradient[place] = (function(up) - function(down)) / (2 * step)
    return gradient


@pytest.mark.parametrize("smooth", [1e-5, 1.0])
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_soft_dice_and_its_gradient_against_loops(shape, channels, squared, smooth):
    logits, label, _ = example(channels, shape)
    value, gradient = value_and_gradient(emseg.soft_dice_loss, logits, torch.from_numpy(label),
                                         squared=squared, smooth=smooth)

    def reference(x):
        return dice_by_loops(x, label, squared, smooth)

    assert value == pytest.approx(reference(logits), rel=1e-5)
    np.testing.assert_allclose(gradient, finite_differences(reference, logits), atol=2e-6)


def test_soft_dice_defaults_are_plain_with_little_smoothing():
    logits, label, _ = example(1, SHAPES[0])
    found = emseg.soft_dice_loss(torch.from_numpy(logits), torch.from_numpy(label)).item()
    assert found == pytest.approx(dice_by_loops(logits, label, False, 1e-5), rel=1e-6)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 4])
def test_soft_dice_of_right_and_wrong_predictions(channels, squared):
    label = torch.arange(24).view(2, 3, 4) % max(2, channels)
    right = F.one_hot(label, max(2, channels)).movedim(-1, 1)[:, -channels:] * 60.0 - 30
    loss = emseg.soft_dice_loss
    assert loss(right, label, squared=squared) == pytest.approx(0, abs=1e-5)
    assert loss(-right if channels < 3 else right.roll(1, 1), label,
                squared=squared) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_cross_entropy_and_its_gradient_against_loops(shape, channels, weighted):
    logits, label, weight = example(channels, shape)
    weight = weight if weighted else np.ones_like(weight)
    value, gradient = value_and_gradient(
        emseg.cross_entropy, logits, torch.from_numpy(label),
        weight=torch.from_numpy(weight).float() if weighted else None)

    def reference(x):
        return cross_entropy_by_loops(x, label, weight)

    assert value == pytest.approx(reference(logits), rel=1e-5)
    np.testing.assert_allclose(gradient, finite_differences(reference, logits), atol=2e-6)


def test_cross_entropy_equals_torch():
    logits, label, _ = example(3, (2, 6, 7))
    logits, label = torch.from_numpy(logits).float(), torch.from_numpy(label)
    torch.testing.assert_close(emseg.cross_entropy(logits, label),
                               nn.CrossEntropyLoss(ignore_index=IGNORE)(logits, label))
    keep, binary = label != IGNORE, label.clamp(max=1)
    torch.testing.assert_close(
        emseg.cross_entropy(logits[:, :1], torch.where(keep, binary, IGNORE)),
        nn.BCEWithLogitsLoss()(logits[:, 0][keep], binary[keep].float()))


LOSSES = {"dice": emseg.soft_dice_loss, "cross entropy": emseg.cross_entropy,
          "squared dice": lambda *args: emseg.soft_dice_loss(*args, squared=True)}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LOSSES)
def test_masked_loss_is_the_loss_on_the_kept_voxels(name, shape, channels):
    logits, label, _ = example(channels, shape)
    keep = label != IGNORE
    value, gradient = value_and_gradient(LOSSES[name], logits, torch.from_numpy(label))
    kept = np.moveaxis(logits, 1, -1)[keep].T[None, :, None]                # (1, C, 1, N)
    wanted, wanted_gradient = value_and_gradient(LOSSES[name], kept,
                                                 torch.from_numpy(label[keep][None, None]))
    assert value == pytest.approx(wanted, rel=1e-5)
    gradient = np.moveaxis(gradient, 1, -1)
    np.testing.assert_allclose(gradient[keep].T, wanted_gradient[0, :, 0], atol=1e-6)
    assert not gradient[~keep].any() and gradient[keep].all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_nothing_annotated_gives_zero_and_no_gradient(name, channels):
    logits, label, _ = example(channels, SHAPES[0])
    value, gradient = value_and_gradient(LOSSES[name], 50 * logits,
                                         torch.full(label.shape, IGNORE))
    assert value == 0 and not gradient.any()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_float32_for_half_precision_logits(name, channels):
    logits, label, _ = example(channels, (2, 20, 20))
    label = torch.from_numpy(label)
    for dtype in torch.bfloat16, torch.float16:
        half = torch.from_numpy(logits).to(dtype)
        found = LOSSES[name](half, label)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, LOSSES[name](half.float(), label))


def test_cross_entropy_is_exact_for_extreme_logits():
    x = torch.tensor([100.0, -100.0, 100.0, -100.0])
    label = torch.tensor([0, 1, 1, 0])[None, None]
    for logits in (x[None, None, None], torch.stack([-x / 2, x / 2])[None, :, None]):
        value, gradient = value_and_gradient(emseg.cross_entropy, logits.numpy(), label)
        assert value == pytest.approx(50)               # two of four voxels are wrong by 100
        wanted = np.array([0.25, -0.25, 0, 0])
        np.testing.assert_allclose(gradient[0, -1, 0], wanted, atol=1e-6)


@pytest.mark.parametrize("name", ["dice", "squared dice"])
@pytest.mark.parametrize("channels", [1, 3])
def test_dice_is_finite_for_extreme_logits(name, channels):
    logits, label, _ = example(channels, SHAPES[0])
    value, gradient = value_and_gradient(LOSSES[name], 1000 * logits, torch.from_numpy(label))
    assert 0 <= value <= 1 and np.isfinite(gradient).all()


def test_weights_scale_the_loss():
    logits, label, weight = example(3, SHAPES[0])
    logits, label, weight = map(torch.from_numpy, (logits, label, weight))
    one, two = [emseg.cross_entropy(logits, label, factor * weight) for factor in (1, 2)]
    torch.testing.assert_close(two, 2 * one)


def test_a_unet_without_normalisation_keeps_its_signal():
    """He initialisation: 18 ReLUs neither extinguish nor blow up what passes through them."""
    torch.manual_seed(0)
    network, sizes = emseg.UNet5(1, 5), []
    for module in network.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda m, i, out: sizes.append(out.square().mean().item()))
    with torch.no_grad():
        network(torch.randn(2, 1, 64, 64))
    assert len(sizes) == 18 and 0.1 < min(sizes) and max(sizes) < 30
    plain = nn.Conv2d(64, 64, 3)
    emseg.he_initialization(plain)
    assert plain.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)
    assert (plain.bias == 0).all()
