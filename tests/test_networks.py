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


# -- UNet++


@pytest.mark.parametrize("c_in, stride, dilation", [(3, 2, 1), (4, 2, 3), (3, 1, 2), (4, 1, 1)])
def test_basic_block_by_hand(c_in, stride, dilation):
    torch.manual_seed(0)
    block = random_statistics(emseg.BasicBlock(c_in, 4, stride, dilation)).double()
    state, x = block.state_dict(), torch.randn(2, c_in, 12, 10, dtype=torch.float64)
    options = dict(padding=dilation, dilation=dilation)
    y = normalised(state, "residual.0", x, stride=stride, **options)
    y = normalised(state, "residual.1", y, relu=False, **options)
    shortcut = x
    if (c_in, stride) != (4, 1):
        shortcut = normalised(state, "shortcut", x, relu=False, stride=stride)
    torch.testing.assert_close(block(x), (shortcut + y).relu())
    assert convolutions(block)[:2] == [(c_in, 4, 3), (4, 4, 3)]


def test_residual_stages_are_of_either_block():
    basic, narrow = [emseg.residual_stage(4, 8, [1, 2], 2, block) for block in
                     (emseg.BasicBlock, emseg.Bottleneck)]
    assert convolutions(basic) == [(4, 8, 3), (8, 8, 3), (4, 8, 1), (8, 8, 3), (8, 8, 3)]
    assert convolutions(narrow)[:3] == [(4, 2, 1), (2, 2, 3), (2, 8, 1)]
    assert [type(block) for block in emseg.residual_stage(4, 8, [1, 1])] == [emseg.Bottleneck] * 2


def unetpp_by_hand(state, x, stages):
    """Logits of all branches, the finest first: node x_d_l reads all of row l to its right."""
    skips = [normalised(state, "encoder.0", x, stride=2)]
    y = F.pad(skips[0], (1, 1, 1, 1)).unfold(2, 3, 2).unfold(3, 3, 2).amax((4, 5))      # y >= 0
    for stage, blocks in enumerate((3, 4, 6, 3)[:stages], 1):
        for block in range(blocks):
            name, stride = f"encoder.{stage}.{block}", 2 if stage > 1 and not block else 1
            z = normalised(state, f"{name}.residual.0", y, stride=stride)
            z = normalised(state, f"{name}.residual.1", z, relu=False)
            if f"{name}.shortcut.0.weight" in state:
                y = normalised(state, f"{name}.shortcut", y, relu=False, stride=stride)
            y = (y + z).relu()
        skips.append(y)
    skips, nodes = skips[::-1], {}

    def up(x):
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    for row in range(stages):
        for d in range(row, -1, -1):
            seen = [nodes[k, row] for k in range(d + 1, row + 1)] + [skips[row + 1]]
            below = nodes[d, row - 1] if d < row else skips[d]
            nodes[d, row] = normalised(state, f"rows.{row}.{d}", torch.cat([up(below), *seen], 1))
    y = normalised(state, "last", up(nodes[0, stages - 1]))
    logits = [F.conv2d(y, state["head.weight"], state["head.bias"], padding=1)]
    for d in range(1, stages):
        kernel, bias = [state[f"branch_heads.{d - 1}.{part}"] for part in ("weight", "bias")]
        logits.append(enlarged(F.conv2d(nodes[d, stages - 1], kernel, bias, padding=1), 2))
    return logits


# residual stages; parameters (1 in, 1 out): all, decoder; (name, in, out) of the decoder's blocks
UNETPPS = {
    "unet++": (4, 26_072_337, 4_793_792, [
        ("x_0_0", 768, 256), ("x_0_1", 512, 128), ("x_1_1", 384, 128), ("x_0_2", 320, 64),
        ("x_1_2", 256, 64), ("x_2_2", 192, 64), ("x_0_3", 320, 32), ("x_1_3", 256, 64),
        ("x_2_3", 192, 64), ("x_3_3", 128, 64)]),
    "unet++3": (2, 2_017_937, 676_160, [
        ("x_0_0", 192, 128), ("x_0_1", 256, 64), ("x_1_1", 128, 64)])}


@pytest.mark.parametrize("name", UNETPPS)
def test_unetpp_by_hand(name):
    stages = UNETPPS[name][0]
    torch.manual_seed(0)
    x, other = torch.randn(2, 2, 2, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        network = emseg.NETWORKS[name](2, 3, 8, average_branches=True).double()
        with_statistics_of(network, other)
        wanted = unetpp_by_hand(network.state_dict(), x, stages)
        found = network(x, heads=True)
        assert len(found) == len(wanted) == stages
        for one, exact in zip(found, wanted):
            assert 0.01 < exact.std() < 10
            torch.testing.assert_close(one, exact)
        mean = sum(logits.softmax(1) for logits in wanted) / stages
        torch.testing.assert_close(network(x).softmax(1).double(), mean, atol=1e-5, rtol=1e-5)
        plain = emseg.NETWORKS[name](2, 3, 8).double().eval()
        assert not plain.load_state_dict(network.state_dict(), strict=False).missing_keys
        torch.testing.assert_close(plain(x), wanted[0])
        assert len(plain(x, heads=True)) == 1


@pytest.mark.parametrize("name", UNETPPS)
def test_unetpps_have_the_published_parameters_and_blocks(name):
    stages, total, decoder, table = UNETPPS[name]
    with torch.device("meta"):
        network = emseg.NETWORKS[name](1, 1)
    count = emseg.count_parameters
    assert count(network) == total
    assert f"{total:,}" in emseg.NETWORKS[name].__doc__ and f"{total:,}" in network.__doc__
    assert (count(network.rows) + count(network.last), count(network.head)) == (decoder, 145)
    blocks = [(f"x_{d}_{row}", *convolutions(block)) for row, blocks in enumerate(network.rows)
              for d, block in enumerate(blocks)]
    assert blocks == [(node, (c_in, c, 3), (c, c, 3)) for node, c_in, c in table]
    assert convolutions(network.last) == [(table[-stages][2], 16, 3), (16, 16, 3)]
    encoder = {"unet++": 21_278_400, "unet++3": 3_136 + 128 + 221_952 + 1_116_416}[name]
    assert count(network.encoder) == encoder
    assert total == encoder + decoder + 145


def test_mean_logits_are_those_of_the_mean_probability():
    torch.manual_seed(0)
    for channels in 1, 4:
        heads = list(3 * torch.randn(3, 2, channels, 5, 6, dtype=torch.float64))
        prob = [1 / (1 + (-x).exp()) if channels == 1 else x.exp() / x.exp().sum(1, keepdim=True)
                for x in heads]
        found = emseg.mean_logits([x.bfloat16() for x in heads])
        assert found.dtype == torch.float32 and found.shape == (2, channels, 5, 6)
        torch.testing.assert_close(emseg.probabilities(found).double(), sum(prob) / 3, atol=0.02,
                                   rtol=0)
        found = emseg.probabilities(emseg.mean_logits(heads)).double()
        torch.testing.assert_close(found, sum(prob) / 3, atol=1e-6, rtol=1e-5)
        assert emseg.mean_logits(heads[:1]) is heads[0]


def test_mean_logits_are_exact_for_extreme_ones():
    """Half of the heads sure of yes: log 1 - log 1; all sure of it: their mean odds."""
    for sure, wanted in ([200.0, -200.0], 0.0), ([200.0, 200.0], 200.0), ([-99.0, -99.0], -99.0):
        heads = [torch.full((1, 1, 1, 1), x).requires_grad_() for x in sure]
        found = emseg.mean_logits(heads)
        found.sum().backward()
        assert found.item() == pytest.approx(wanted, abs=1e-4)
        assert all(x.grad.isfinite() for x in heads)
        x = torch.tensor(sure[:1])
        two = [torch.stack([torch.zeros(1), x]).view(1, 2, 1, 1)] * 2
        found = emseg.mean_logits(two)
        assert (found[:, 1] - found[:, 0]).item() == pytest.approx(sure[0])


# -- FracTALResNet and CEECNet


def test_group_norm_blocks_by_hand():
    torch.manual_seed(0)
    found = [emseg.group_norm(c).num_groups for c in (1, 2, 3, 4, 6, 8, 12, 32)]
    assert found == [1, 2, 1, 4, 2, 4, 4, 4]
    block = random_norms(emseg.conv_block((4, 8, 6), norm="group", groups=2)).double()
    assert [type(layer).__name__ for layer in block] == ["Conv2d", "GroupNorm", "ReLU"] * 2
    x = torch.randn(2, 4, 7, 9, dtype=torch.float64)
    state = {f"block.{key}": value for key, value in block.state_dict().items()}
    torch.testing.assert_close(block(x), grouped(state, "block", x))
    last = random_norms(emseg.group_conv(4, 6, stride=2)).double()
    assert [type(layer).__name__ for layer in last] == ["Conv2d", "GroupNorm"]
    state = {f"last.{key}": value for key, value in last.state_dict().items()}
    torch.testing.assert_close(last(x), grouped(state, "last", x, relu=False, stride=2))


def random_norms(network):
    """Weights of norms, and scales of attention, that show where they are used."""
    torch.manual_seed(1)
    for name, parameter in network.named_parameters():
        if parameter.dim() == 1:
            low, high = (0.3, 0.7) if "gamma" in name else (-1, 1) if "bias" in name else (0.5, 2)
            nn.init.uniform_(parameter, low, high)
    return network.eval().requires_grad_(False)


def group_normalised(x, scale, shift):
    parts = x.unflatten(1, ({0: 4, 2: 2}.get(x.shape[1] % 4, 1), -1))
    mean = parts.mean((2, 3, 4), keepdim=True)
    spread = (parts - mean).square().mean((2, 3, 4), keepdim=True) + 1e-5
    x = ((parts - mean) / spread.sqrt()).flatten(1, 2)
    return x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)


def grouped(state, name, x, relu=True, **options):
    """Convolutions, GroupNorms and ReLUs of a conv_block, from its weights alone."""
    for i in 0, 3:
        if f"{name}.{i}.weight" in state:
            kernel, bias = state[f"{name}.{i}.weight"], state[f"{name}.{i}.bias"]
            x = F.conv2d(x, kernel, bias, padding=kernel.shape[-1] // 2,
                         groups=x.shape[1] // kernel.shape[1], **options)
            x = group_normalised(x, state[f"{name}.{i + 1}.weight"], state[f"{name}.{i + 1}.bias"])
            x = x.relu() if relu else x
    return x


def tanimoto_by_the_book(p, q, dims, depth, smooth=1e-5):
    """Diakogiannis 2021, equations 2 to 4, summed over dims, in float64."""
    def similarity(p, q, d):
        pq, pp, qq = [(a * b).sum(dims, keepdims=True) for a, b in ((p, q), (p, p), (q, q))]
        return (pq + smooth) / (2**d * (pp + qq) - (2 ** (d + 1) - 1) * pq + smooth)
    each = [(similarity(p, q, d) + similarity(1 - p, 1 - q, d)) / 2 for d in range(depth)]
    return sum(each) / depth


@pytest.mark.parametrize("depth", [1, 2, 5, 10, 20])
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


def test_fractal_tanimoto_of_equal_and_opposite_maps():
    q = (torch.rand(2, 3, 8, 8) > 0.5).float()
    same, opposite = [emseg.fractal_tanimoto(p, q, (1, 2, 3))[0] for p in (q, 1 - q)]
    assert (same == 1).all() and (opposite < 1e-6).all()
    steep = [emseg.fractal_tanimoto(0.9 * q, q, (1, 2, 3), depth=depth)[0].mean().item()
             for depth in (0, 1, 5, 10)]
    assert steep[0] == steep[1] > steep[2] > steep[3]
    p = torch.rand(2, 3, 8, 8)
    five, unsaid = [emseg.fractal_tanimoto(p, q, 1, **depth)[0] for depth in ({"depth": 5}, {})]
    assert torch.equal(five, unsaid)
    half = p.bfloat16()
    found, = emseg.fractal_tanimoto(half, q, (1, 2, 3))
    torch.testing.assert_close(found, emseg.fractal_tanimoto(half.float(), q, (1, 2, 3))[0])


@pytest.mark.parametrize("depth", [0, 1, 5, 30])
def test_fractal_tanimoto_has_finite_gradients_at_equality(depth):
    for value in 0.0, 0.5, 1.0:
        p = torch.full((1, 2, 4, 4), value, requires_grad=True)
        total = sum(x.sum() for x in emseg.fractal_tanimoto(p, p.detach(), 1, (2, 3), depth=depth))
        total.backward()
        assert total.item() == pytest.approx(16 + 2) and p.grad.abs().max() < 1e-3


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


def attention_by_hand(state, name, x, y):
    query, key, value = [1 / (1 + (-grouped(state, f"{name}.{part}", z, relu=False)).exp()) for
                         part, z in (("query", x), ("key", y), ("value", y))]
    at_pixel, in_channel = [torch.from_numpy(tanimoto_by_the_book(query.numpy(), key.numpy(), dim,
                                                                  5)) for dim in (1, (2, 3))]
    out = group_normalised((in_channel * value) * (at_pixel * value),
                           state[f"{name}.norm.weight"], state[f"{name}.norm.bias"])
    return 1 + state[f"{name}.gamma"] * out


def named(network, name):
    return {f"{name}.{key}": value for key, value in network.state_dict().items()}


def assert_close(found, wanted):
    """fractal_tanimoto is float32."""
    assert 0.01 < wanted.std() < 100
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("channels, heads", [(8, 1), (8, 4), (4, 2), (6, 3)])
def test_fractal_attention_by_hand(channels, heads):
    torch.manual_seed(0)
    attention = emseg.FractalAttention(channels, heads).double()
    x, y = torch.randn(2, 2, channels, 7, 9, dtype=torch.float64)
    assert (attention(x, y) == 1).all()                     # gamma is 0 to begin with
    state = named(random_norms(attention), "attention")
    assert_close(attention(x, y), attention_by_hand(state, "attention", x, y))
    assert {module.groups for module in attention.modules() if isinstance(module, nn.Conv2d)} == {
        heads}


def fractal_unit_by_hand(state, name, x):
    y = x
    for norm in 0, 3:
        y = group_normalised(y, state[f"{name}.residual.{norm}.weight"],
                             state[f"{name}.residual.{norm}.bias"]).relu()
        kernel, bias = [state.get(f"{name}.residual.{norm + 2}.{part}") for part in
                        ("weight", "bias")]
        assert (bias is None) == (norm == 0)
        y = F.conv2d(y, kernel, bias, padding=1, groups=x.shape[1] // kernel.shape[1])
    return (x + y) * attention_by_hand(state, f"{name}.attention", x, x)


def fusion_by_hand(state, name, a, b):
    emphasised = [a * attention_by_hand(state, f"{name}.attention_a", a, b),
                  b * attention_by_hand(state, f"{name}.attention_b", b, a)]
    return grouped(state, f"{name}.merge", torch.cat(emphasised, 1))


def ceec_unit_by_hand(state, name, x):
    ce, ec = [grouped(state, f"{name}.enter_{way}", x, relu=False) for way in ("ce", "ec")]
    low = grouped(state, f"{name}.compress_ce.0", ce, stride=2)
    low = enlarged(grouped(state, f"{name}.compress_ce.1", low), 2)
    ce = fusion_by_hand(state, f"{name}.fuse_ce", grouped(state, f"{name}.expand_ce", low),
                        grouped(state, f"{name}.skip_ce", ce))
    high = grouped(state, f"{name}.expand_ec", enlarged(ec, 2))
    ec = fusion_by_hand(state, f"{name}.fuse_ec",
                        grouped(state, f"{name}.compress_ec", high, stride=2), ec)
    both = fusion_by_hand(state, f"{name}.collect",
                          ce * attention_by_hand(state, f"{name}.attention_ce", ce, ec),
                          ec * attention_by_hand(state, f"{name}.attention_ec", ec, ce))
    return (x + both) * attention_by_hand(state, f"{name}.attention", x, x)


UNITS = {"fractalresnet": (emseg.FractalUnit, fractal_unit_by_hand),
         "ceecnet": (emseg.CEECUnit, ceec_unit_by_hand)}


@pytest.mark.parametrize("channels, heads", [(8, 1), (16, 4)])
@pytest.mark.parametrize("name", UNITS)
def test_fractal_units_by_hand(name, channels, heads):
    unit, by_hand = UNITS[name]
    torch.manual_seed(0)
    unit = random_norms(unit(channels, heads).double())
    x = torch.randn(2, channels, 6, 10, dtype=torch.float64)
    assert_close(unit(x), by_hand(named(unit, "unit"), "unit", x))


def psp_by_hand(state, name, x):
    """Maxima of parts that overlap where the side is no multiple of their number."""
    H, W = x.shape[-2:]
    seen = [x]
    for level in range(4):
        n = 2**level
        rows, columns = [[slice(i * side // n, -(-(i + 1) * side // n)) for i in range(n)]
                         for side in (H, W)]
        pooled = torch.stack([torch.stack([x[..., r, c].amax((2, 3)) for c in columns], -1)
                              for r in rows], -2)
        part = grouped(state, f"{name}.parts.{level}", pooled, relu=False)
        seen.append(part[..., np.arange(H) * n // H, :][..., np.arange(W) * n // W])
    return grouped(state, f"{name}.project", torch.cat(seen, 1), relu=False)


def test_psp_pooling_against_maxima_of_blocks():
    """As the authors do it: the maxima tiled to full size before they are narrowed."""
    torch.manual_seed(0)
    pooling = random_norms(emseg.PSPPooling(3, 8).double())
    x, state = torch.randn(2, 3, 16, 24, dtype=torch.float64), named(pooling, "psp")
    seen = [x]
    for level, n in enumerate((1, 2, 4, 8)):
        blocks = x.numpy().reshape(2, 3, n, 16 // n, n, 24 // n).max((3, 5))
        tiled = torch.from_numpy(blocks.repeat(16 // n, 2).repeat(24 // n, 3))
        seen.append(grouped(state, f"psp.parts.{level}", tiled, relu=False))
    wanted = grouped(state, "psp.project", torch.cat(seen, 1), relu=False)
    torch.testing.assert_close(pooling(x), wanted)
    torch.testing.assert_close(psp_by_hand(state, "psp", x), wanted)


@pytest.mark.parametrize("sides", [(5, 7), (12, 3), (1, 1)])
def test_psp_pooling_of_other_sides_has_parts_that_overlap(sides):
    torch.manual_seed(0)
    pooling = random_norms(emseg.PSPPooling(4, 8).double())
    x = torch.randn(2, 4, *sides, dtype=torch.float64)
    torch.testing.assert_close(pooling(x), psp_by_hand(named(pooling, "psp"), "psp", x))


def fractal_net_by_hand(state, x, unit):
    """Logits of segmentation, boundary and distance."""
    def up(x):
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def head(name, x):
        x = grouped(state, f"{name}.0", x)
        return F.conv2d(x, state[f"{name}.1.weight"], state[f"{name}.1.bias"])

    def sigmoid(x):
        return 1 / (1 + (-x).exp())

    first = x = grouped(state, "first", x, relu=False)
    skips = []
    for level in range(6):
        if level:
            x = grouped(state, f"down.{level - 1}", x, relu=False, stride=2)
        x = unit(state, f"encoder.{level}", x)
        skips.append(x)
    x = psp_by_hand(state, "middle", x).relu()
    for level in range(5):
        x = torch.cat([grouped(state, f"up.{level}", up(x)), skips[4 - level]], 1)
        x = unit(state, f"decoder.{level}", grouped(state, f"join.{level}", x, relu=False))
    x = torch.cat([first, x], 1)
    pyramid = psp_by_hand(state, "pyramid", x).relu()
    distance = head("distance", x)
    distance_eq = grouped(state, "from_distance", sigmoid(distance))
    boundary = head("boundary", torch.cat([pyramid, distance_eq], 1))
    boundary = boundary / (0.01 + sigmoid(state["crispness"]))
    boundary_eq = grouped(state, "from_boundary", sigmoid(boundary))
    seen = grouped(state, "balance", torch.cat([boundary_eq, distance_eq], 1))
    return head("segmentation", torch.cat([seen, pyramid], 1)), boundary, distance


@pytest.mark.parametrize("name", UNITS)
def test_fractal_nets_by_hand(name):
    torch.manual_seed(0)
    network = random_norms(emseg.NETWORKS[name](2, 3, 8).double())
    x = torch.randn(1, 2, 64, 128, dtype=torch.float64)
    found = network(x, heads=True)
    wanted = fractal_net_by_hand(network.state_dict(), x, UNITS[name][1])
    for one, exact in zip(found, wanted, strict=True):
        assert 0.1 < exact.std() < 100
        assert (one - exact).norm() < 2e-6 * exact.norm()
    assert torch.equal(network(x), found[0]) and network.combine(found) is found[0]


# parameters at 1 in, 1 out, width 32: all, units of the encoder, of the decoder
FRACTALS = {
    "fractalresnet": (18_199_919, [12_033, 24_065, 48_129, 96_257, 192_513, 385_025],
                      [100_353, 50_177, 25_089, 12_545, 6_273]),
    "ceecnet": (58_964_079, [53_273, 152_617, 489_545, 1_716_361, 6_381_833, 24_560_137],
                [6_159_497, 1_605_193, 433_961, 124_825, 39_377])}


@pytest.mark.parametrize("name", FRACTALS)
def test_fractal_nets_have_the_published_parameters(name):
    total, encoder, decoder = FRACTALS[name]
    with torch.device("meta"):
        network = emseg.NETWORKS[name](1, 1)
    count = emseg.count_parameters
    assert count(network) == total and f"{total:,} parameters" in emseg.NETWORKS[name].__doc__
    assert [count(unit) for unit in network.encoder] == encoder
    assert [count(unit) for unit in network.decoder] == decoder
    assert [count(conv) for conv in network.down] == [18_624, 74_112, 295_680, 1_181_184, 4_721_664]
    assert [count(up) + count(join) for up, join in zip(network.up, network.join)] == [
        1_051_648, 263_680, 66_304, 16_768, 4_288]
    assert [count(part) for part in (network.first, network.middle, network.pyramid,
                                     network.distance)] == [128, 9_452_544, 14_816, 27_873]
    parts = network.first, network.encoder, network.down, network.middle, network.up, network.join
    assert total - sum(map(count, (*parts, network.decoder))) == 100_836
    assert network.crispness.shape == (1,)


def test_scales_of_attention_begin_at_0_and_crispness_at_1():
    network = emseg.CEECNet(1, 1, 8)
    gammas = [p for name, p in network.named_parameters() if name.endswith("gamma")]
    assert len(gammas) == 11 * 9 and not any(gammas) and network.crispness == 1


@pytest.mark.parametrize("width", [4, 12, 20])
@pytest.mark.parametrize("name", FRACTALS)
def test_fractal_nets_refuse_widths_that_heads_do_not_divide(name, width):
    with pytest.raises(emseg.InputError, match=f"--width {width}: fractalresnet and ceecnet take"):
        emseg.NETWORKS[name](1, 1, width)


# -- what the new networks share

STRIDES = {"unet++": 32, "unet++3": 8, "fractalresnet": 32, "ceecnet": 32}


@pytest.mark.parametrize("name", STRIDES)
def test_networks_take_exactly_the_multiples_of_their_stride(name):
    network, stride = emseg.NETWORKS[name](3, 2, 8).eval(), STRIDES[name]
    assert (network.stride, network.offset, network.margin) == (stride, 0, 0)
    for halves in 1, 2, 3, 6:
        sides = halves * stride // 2, stride
        x = torch.randn(1, 3, *sides)
        if halves % 2:
            with pytest.raises(RuntimeError), torch.no_grad():
                network(x)
            with pytest.raises(emseg.InputError, match=f"multiple of {stride}"):
                emseg.check_patch_size(network, sides, name)
        else:
            with torch.no_grad():
                assert network(x).shape == (1, 2, *sides)
            emseg.check_patch_size(network, sides, name)


@pytest.mark.parametrize("width", [1, 3, 6])
@pytest.mark.parametrize("name", UNETPPS)
def test_unetpps_take_channels_and_narrow_widths(name, width):
    network = emseg.NETWORKS[name](3, 4, width, average_branches=True).eval()
    assert network(torch.randn(1, 3, 32, 64)).shape == (1, 4, 32, 64)
    assert convolutions(network)[0] == (3, width, 7)


@pytest.mark.parametrize("name, options", [(name, {}) for name in STRIDES] + [
    (name, {"average_branches": True}) for name in UNETPPS])
def test_what_is_predicted_depends_on_every_parameter(name, options):
    torch.manual_seed(0)
    network = emseg.NETWORKS[name](1, 2, 8, **options).train()
    for parameter_name, parameter in network.named_parameters():
        if parameter_name.endswith("gamma"):
            nn.init.constant_(parameter, 0.5)
    network(torch.randn(2, 1, 64, 64)).square().mean().backward()
    for parameter_name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), parameter_name


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


def test_relative_bias_goes_from_the_query_to_the_key():
    block = emseg.SwinBlock(4, 2)
    block.relative_bias = nn.Parameter(torch.arange(338.0).view(169, 2))
    bias = block.score_bias()
    assert bias.shape == (1, 2, 49, 49)
    for query, key in np.ndindex(49, 49):
        down, right = query // 7 - key // 7, query % 7 - key % 7
        assert bias[0, :, query, key].tolist() == [2 * (13 * (down + 6) + right + 6) + head
                                                   for head in range(2)]


def test_stochastic_depth_drops_whole_samples():
    torch.manual_seed(0)
    block, x = emseg.SwinBlock(2, 1, drop=0.2), torch.ones(500, 3, 4, 2)
    out = block.train().drop_samples(x).flatten(1)
    assert set(out.unique().tolist()) == {0, 1.25} and (out == out[:, :1]).all()
    assert (out[:, 0] == 0).float().mean().item() == pytest.approx(0.2, abs=0.06)
    assert torch.equal(block.eval().drop_samples(x), x)


def test_patch_merging_by_hand():
    torch.manual_seed(0)
    merging = random_tokens(emseg.PatchMerging(3))
    x = torch.randn(2, 4, 6, 3, dtype=torch.float64)
    out = merging(x)
    assert out.shape == (2, 2, 3, 6)
    for b, i, j in np.ndindex(2, 2, 3):
        tokens = torch.cat([x[b, 2 * i + di, 2 * j + dj] for di in (0, 1) for dj in (0, 1)])
        wanted = merging.reduce.weight @ normed(merging.state_dict(), "norm", tokens)
        torch.testing.assert_close(out[b, i, j], wanted)


def test_swin_by_hand():
    torch.manual_seed(0)
    swin = random_tokens(emseg.Swin(2, 4, (1, 3), 2, drop=0.4))
    state, x = swin.state_dict(), torch.randn(2, 2, 24, 40, dtype=torch.float64)
    patches = x.unflatten(2, (6, 4)).unflatten(4, (10, 4))                  # (B, C, h, 4, w, 4)
    x = torch.einsum("bcyixj,ocij->byxo", patches, state["embed.weight"]) + state["embed.bias"]
    x = swin.stages[0][0](normed(state, "norm_embed", x))
    wanted = [normed(state, "norms.0", x)]
    for block in swin.stages[1]:
        x = block(x)
    wanted.append(normed(state, "norms.1", x))
    assert [x.shape for x in wanted] == [(2, 6, 10, 4), (2, 3, 5, 8)]
    torch.testing.assert_close(swin(patches.flatten(4, 5).flatten(2, 3)),
                               [x.movedim(3, 1) for x in wanted])


def test_swin_small_is_the_published_one():
    with torch.device("meta"):
        network = emseg.SenFormer(1, 1)
    blocks = [m for m in network.backbone.modules() if isinstance(m, emseg.SwinBlock)]
    assert [len(stage) for stage in network.backbone.stages] == [2, 1 + 2, 1 + 18, 1 + 2]
    assert [block.shift for block in blocks] == 12 * [0, 3]
    assert [block.drop for block in blocks] == pytest.approx([0.2 * i / 23 for i in range(24)])
    assert [(block.attention.heads, len(block.norm_mlp.weight)) for block in blocks] == [
        (h, 32 * h) for h, depth in zip((3, 6, 12, 24), (2, 2, 18, 2)) for _ in range(depth)]
    for block in network.pyramid.blocks:
        assert (block.shift, block.drop, block.attention.heads) == (0, 0, 8)


def test_feature_pyramid_by_hand():
    torch.manual_seed(0)
    pyramid = random_statistics(random_tokens(emseg.FPNT([2, 3, 5], 8, 4)))
    maps = [torch.randn(2, c, 4 * n, 6 * n, dtype=torch.float64)
            for c, n in ((2, 4), (3, 2), (5, 1))]
    state, x, wanted = pyramid.state_dict(), 0, []
    for level in (2, 1, 0):
        x = x + normalised(state, f"lateral.{level}", maps[level])
        wanted.insert(0, pyramid.blocks[level](x.movedim(1, 3)))
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(pyramid(maps), wanted)


def attention_by_torch(state, queries, tokens, parts, heads):
    """Multi-head attention of torch; parts: names and rows of the weights of q, k and v."""
    weight, bias = [torch.cat([state[f"{name}.{kind}"].unflatten(0, (-1, queries.shape[2]))[row]
                               for name, row in parts]) for kind in ("weight", "bias")]
    project = parts[0][0].split(".")[0] + ".project"
    out, _ = F.multi_head_attention_forward(
        queries.transpose(0, 1), tokens.transpose(0, 1), tokens.transpose(0, 1), queries.shape[2],
        heads, weight, bias, None, None, False, 0.0, state[f"{project}.weight"],
        state[f"{project}.bias"])
    return out.transpose(0, 1)


def learner_block_by_hand(state, queries, features, heads):
    normal = normed(state, "norm_cross", queries)
    queries = queries + attention_by_torch(
        state, normal, features, [("cross.query", 0), ("cross.key_value", 0),
                                  ("cross.key_value", 1)], heads)
    normal = normed(state, "norm_attention", queries)
    queries = queries + attention_by_torch(
        state, normal, normal, [("attention.qkv", row) for row in range(3)], heads)
    return mlp_by_hand(state, queries)


def test_learner_block_and_its_gradients_against_torch():
    torch.manual_seed(0)
    block = random_tokens(emseg.LearnerBlock(6, 3))
    queries, features = [torch.randn(2, n, 6, dtype=torch.float64, requires_grad=True)
                         for n in (4, 35)]
    state, results = dict(block.named_parameters()), []
    for out in block(queries, features), learner_block_by_hand(state, queries, features, 3):
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        results.append([out, *torch.autograd.grad((out * weight).sum(),
                                                  [queries, features, *state.values()])])
    for found, wanted in zip(*results):
        torch.testing.assert_close(found, wanted)


def test_learner_by_hand():
    torch.manual_seed(0)
    learner = random_tokens(emseg.Learner(8, 2, 3, 4))
    x, state = torch.randn(2, 5, 7, 8, dtype=torch.float64), learner.state_dict()
    features = normed(state, "norm_features", x)
    queries = torch.stack([state["queries"]] * 2)
    for block in learner.blocks:
        queries = block(queries, features.flatten(1, 2))
    queries = normed(state, "norm_queries", queries)
    torch.testing.assert_close(learner(x), torch.einsum("bkc,byxc->bkyx", queries, features))


def test_senformer_has_the_published_parameters():
    with torch.device("meta"):
        network, two = emseg.NETWORKS["senformer"](1, 1), emseg.SenFormer(1, 2)
    assert emseg.count_parameters(network) == 163_100_906
    assert "163,100,906 parameters" in emseg.SenFormer.__doc__
    assert emseg.count_parameters(two) == 163_102_954
    parts = [network.backbone, network.pyramid, network.learners]
    assert [emseg.count_parameters(part) for part in parts] == [48_835_530, 13_358_368, 100_907_008]
    assert [len(learner.blocks) for learner in network.learners] == [6] * 4
    heads = {(block.cross.heads, block.attention.heads) for learner in network.learners
             for block in learner.blocks}
    assert heads == {(8, 8)}


def tiny_senformer(classes, width=8):
    """With class queries that differ: at 0 all classes are the same."""
    torch.manual_seed(0)
    network = emseg.SenFormer(1, classes, width)
    for learner in network.learners:
        nn.init.normal_(learner.queries)
    return network.eval()


@pytest.mark.parametrize("sides", [(32, 64), (96, 32)])
@pytest.mark.parametrize("classes", [1, 3])
def test_senformer_is_the_mean_of_four_learners(classes, sides):
    network, x = tiny_senformer(classes), torch.randn(2, 1, *sides)
    assert (network.dims, network.stride, network.offset, network.margin) == (2, 32, 0, 0)
    assert network.global_context
    with torch.no_grad():
        out, branches = network(x), network(x, heads=True)
        assert torch.equal(network.combine(branches), out)
        levels = network.pyramid(network.backbone(x))
        for level, found in enumerate(branches):
            small = network.learners[level](levels[level])
            assert small.shape == (2, classes, *[side // 2 ** (2 + level) for side in sides])
            torch.testing.assert_close(found.double(), enlarged(small.double(), 4 * 2**level),
                                       atol=1e-4, rtol=1e-4)
        assert len(branches) == 4 and out.shape == (2, classes, *sides)
        assert torch.equal(out, network(x))
        prob = torch.stack([emseg.probabilities(branch) for branch in branches])
        torch.testing.assert_close(emseg.probabilities(out), prob.mean(0))
        assert prob.std(0).mean() > 0.01
        torch.testing.assert_close(
            emseg.channels_last(network)(x.to(memory_format=torch.channels_last)), out,
            atol=1e-4, rtol=1e-4)


def test_senformer_gradient_reaches_every_parameter():
    network = tiny_senformer(1)
    network(torch.randn(2, 1, 64, 96)).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_senformer_in_half_precision(dtype):
    network, x, results = tiny_senformer(2), torch.randn(2, 1, 64, 64), []
    for enabled in True, False:
        network.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            out = network(x)
        assert out.dtype == torch.float32
        emseg.cross_entropy(out, (x[:, 0] > 0).long()).backward()
        results.append([out, torch.cat([p.grad.flatten() for p in network.parameters()])])
    for found, wanted, tolerance in zip(*results, (0.1, 0.4)):
        assert (found - wanted).norm() < tolerance * wanted.norm()


def test_senformer_widths():
    for width, heads, dim in (2, 1, 8), (4, 1, 24), (24, 1, 128), (48, 1, 256), (66, 2, 352):
        with torch.device("meta"):
            network = emseg.SenFormer(1, 1, width)
        assert network.backbone.embed.out_channels == width
        assert network.backbone.stages[0][0].attention.heads == heads
        assert network.learners[0].queries.shape == (1, dim)
    for width in 1, 65, 100:
        with pytest.raises(emseg.InputError, match=f"^--width {width}: senformer takes 2 or more"):
            emseg.SenFormer(1, 1, width)


def test_senformer_begins_as_its_authors_do():
    network = emseg.SenFormer(1, 2, 24)
    weights = {name: p.detach() for name, p in network.named_parameters()}
    assert not any(weights[f"learners.{i}.queries"].any() for i in range(4))
    for module in network.modules():
        if isinstance(module, nn.Linear):
            assert module.bias is None or not module.bias.any()
    for name in ("backbone.stages.2.1.attention.qkv.weight", "learners.3.blocks.5.mlp.0.weight",
                 "pyramid.blocks.0.mlp.2.weight", "backbone.stages.3.1.relative_bias"):
        assert weights[name].std().item() == pytest.approx(0.02, rel=0.1), name


def test_what_weight_decay_should_spare_in_senformer_can_be_told_by_name():
    network = tiny_senformer(2)
    spared = {name for name, p in network.named_parameters()
              if p.dim() == 1 or "relative" in name or "queries" in name}
    kernels = {f"{name}.weight" for name, m in network.named_modules()
               if isinstance(m, (nn.Linear, nn.Conv2d))}
    assert spared == {name for name, _ in network.named_parameters()} - kernels


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


@pytest.mark.parametrize("channels", [1, 3])
def test_mean_logits_are_finite_for_extreme_logits(channels):
    signs = torch.tensor([[1.0, 1, -1, -1], [1, -1, 1, -1]]).view(2, 1, 1, 4).expand(
        -1, -1, channels, -1)
    x = (200 * signs * torch.arange(1, channels + 1).view(-1, 1)).requires_grad_()
    out = emseg.mean_logits(list(x))
    out.sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()
    wanted = torch.stack([emseg.probabilities(part) for part in x]).mean(0)
    torch.testing.assert_close(emseg.probabilities(out), wanted)
    if channels == 1:
        assert out.flatten().tolist() == pytest.approx([200, 0, 0, -200], abs=1e-4)


def test_mean_logits_are_float32_and_those_of_equal_branches():
    x = torch.randn(2, 1, 3, 4).bfloat16()
    for part in x, x.expand(-1, 3, -1, -1) * torch.tensor([1, 2, 3]).view(3, 1, 1):
        out = emseg.mean_logits([part] * 3)
        assert out.dtype == torch.float32
        torch.testing.assert_close(emseg.probabilities(out), emseg.probabilities(part))
        assert emseg.mean_logits([part]) is part


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


@pytest.mark.parametrize("side", [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("groups", [1, 32])
def test_a_strided_convolution_of_few_pixels_in_bf16(groups, side):
    """PyTorch's own weight gradient of one pixel in width is that of memory that held NaN here."""
    torch.manual_seed(0)
    layer = emseg.conv_block((128, 256), norm=None, stride=2, groups=groups)[0]
    layer = layer.to(memory_format=torch.channels_last)
    for _ in range(20):
        used = [torch.full((n,), torch.nan) for n in (1000, 9216, 20000, 36864)]
        del used
        x = torch.randn(2, 128, *side).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        (found,) = torch.autograd.grad(out.sum(), layer.weight)
        (wanted,) = torch.autograd.grad(
            F.conv2d(x, layer.weight, layer.bias, 2, 1, groups=groups).sum(), layer.weight)
        torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)
