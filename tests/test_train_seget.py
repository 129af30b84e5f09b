"""train_seget.py: SegET and its loss, patches and schedule; several structures in one run."""

import functools
import json
import math
import os
import re

import mrcfile
import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F
from torch import nn

import conftest
import emseg
import train_seget
from conftest import (BRIEF, CORNER, ROOT, InMemory, convolutions, enlarged, log_without_seconds,
                      metrics, narrow, normalised, random_statistics, weights)

IGNORE = emseg.IGNORE
run = functools.partial(conftest.run, train_seget)
refused = functools.partial(conftest.refused, train_seget)
TINY = ["--width", "2", "--patch-size", "48", "48", "--batch-size", "4", "--epochs", "2",
        "--steps-per-epoch", "3", "--lr", "3e-3", "--device", "cpu"]


@pytest.fixture(scope="module")
def masks(cells, tmp_path_factory):
    """A folder with a mask of 0 and 1 for the mitochondria and the vesicles of `cells`, and one of
    the mitochondria grown by two pixels, which overlaps with both."""
    folder = tmp_path_factory.mktemp("masks")
    label = tifffile.imread(cells / "label.tif")
    grown = emseg.ndimage.binary_dilation(label == 3, np.ones((1, 9, 9)))
    for name, mask in (("mito", label == 3), ("vesicle", label == 4), ("grown", grown)):
        tifffile.imwrite(folder / f"{name}.tif", mask.astype(np.uint8))
    return folder


def labels(masks, *names, crop="0:8"):
    return [f"{name}={masks / name}.tif@{crop}" for name in names]


def train(cells, masks, out, *more, structures=("mito", "vesicle")):
    run("--volume", cells / "image.tif@0:8", "--label", *labels(masks, *structures),
        "--test-volume", cells / "image.tif@8:12",
        "--test-label", *labels(masks, *structures, crop="8:12"), "--out-dir", out, *TINY, *more)


@pytest.fixture(scope="module")
def trained(cells, masks, tmp_path_factory):
    """A finished tiny run of two structures."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    train(cells, masks, folder)
    return folder


@pytest.fixture(scope="module")
def held_out(cells, masks, tmp_path_factory):
    """A finished tiny run of two overlapping structures without test volume."""
    folder = tmp_path_factory.mktemp("runs") / "held_out"
    run("--volume", cells / "image.tif", "--label", *labels(masks, "grown", "mito", crop="0:12"),
        "--out-dir", folder, *TINY)
    return folder


# -- network


def seget_by_hand(state, x):
    skips, levels = [], []
    for level in range(4):
        skips.append(normalised(state, f"encoder.{level}", x))
        x = normalised(state, f"down.{level}", skips[-1], stride=2)
    x = normalised(state, "center", x)
    seen = [normalised(state, f"dilated.{i}", x, padding=d, dilation=d)
            for i, d in enumerate((1, 2, 4, 8))]
    x = normalised(state, "stack", torch.cat([x, *seen], 1))
    for level in range(4):
        x = normalised(state, f"decoder.{level}", torch.cat([enlarged(x, 2), skips[3 - level]], 1))
        levels.append(x)
    higher = torch.cat([enlarged(levels[0], 4), enlarged(levels[1], 2), levels[2]], 1)
    higher = enlarged(normalised(state, "fuse_higher", higher), 2)
    x = normalised(state, "fuse", torch.cat([higher, levels[3]], 1))
    return F.conv2d(x, state["head.weight"], state["head.bias"])


def test_seget_by_hand():
    torch.manual_seed(0)
    network = random_statistics(train_seget.SegET(2, 3, 4)).double()
    x = torch.randn(2, 2, 48, 64, dtype=torch.float64)
    with torch.no_grad():
        wanted = seget_by_hand(network.state_dict(), x)
        assert wanted.std() > 0.01
        torch.testing.assert_close(network(x), wanted)


def test_seget_has_the_convolutions_of_the_paper():
    with torch.device("meta"):
        network = train_seget.MODELS["seget"](1, 1)
    assert emseg.count_parameters(network) == 4_796_761
    assert train_seget.SegET.__doc__.count("4,796,761") == 1
    assert train_seget.__doc__.count("4,796,761 parameters") == 1
    for level, width in enumerate((16, 32, 64, 128)):       # 4 blocks of 4 convolutions
        into = 1 if level == 0 else width // 2
        found = convolutions(network.encoder[level]) + convolutions(network.down[level])
        assert found == [(into, width, 3), (width, width, 3), (width, width // 2, 3),
                         (width // 2, width, 3)]
        strides = [m.stride for m in [*network.encoder[level], *network.down[level]]
                   if isinstance(m, nn.Conv2d)]
        assert strides == [(1, 1)] * 3 + [(2, 2)]
    center = [m for part in (network.center, network.dilated, network.stack)
              for m in part.modules() if isinstance(m, nn.Conv2d)]
    assert [m.kernel_size[0] for m in center] == [3] * 6 + [1]       # 7 convolutions
    assert [m.dilation[0] for m in center] == [1, 1, 1, 2, 4, 8, 1]
    assert [len(block) // 3 for block in network.decoder] == [2] * 4
    assert len(network.fuse_higher) == len(network.fuse) == 6        # 2 after each stack
    assert not any(isinstance(m, (nn.MaxPool2d, nn.AvgPool2d)) for m in network.modules())
    kinds = [type(m).__name__ for m in network.modules()
             if isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.ReLU))]
    assert kinds == ["Conv2d", "BatchNorm2d", "ReLU"] * (len(kinds) // 3) + ["Conv2d"]
    assert (network.dims, network.stride, network.offset, network.margin) == (2, 1, 0, 0)


def reach(function, channels, side=64):
    """How far from the centre, in pixels, an input changes the centre of the output."""
    x = torch.zeros(1, channels, side, side, requires_grad=True)
    function(x)[..., side // 2, side // 2].sum().backward()
    seen = x.grad.abs().sum((0, 1)).nonzero() - side // 2
    return seen.abs().max().item()


def test_the_receptive_field_of_the_center_grows_with_dilation():
    network = train_seget.SegET(1, 1, 2).eval()
    for parameter in network.parameters():
        nn.init.constant_(parameter, 0.1)                   # so that no ReLU hides a path
    assert [reach(branch, 32) for branch in network.dilated] == [1, 2, 4, 8]
    def without(center):
        return lambda x: network.stack(torch.cat([center(x)] * 5, 1))
    assert reach(without(network.center), 16) == 2
    def whole(x):
        x = network.center(x)
        return network.stack(torch.cat([x, *[branch(x) for branch in network.dilated]], 1))
    assert reach(whole, 16) == 10


@pytest.mark.parametrize("sides", [(16, 32), (48, 16), (17, 31), (50, 33), (1, 7), (96, 95)])
@pytest.mark.parametrize("width", [1, 2, 5])
def test_seget_takes_any_size_and_width(width, sides):
    network = train_seget.SegET(1, 2, width).eval()
    assert network(torch.randn(2, 1, *sides)).shape == (2, 2, *sides)
    emseg.check_patch_size(network, sides, "seget")


def test_the_gradient_reaches_every_parameter():
    torch.manual_seed(0)
    network = train_seget.SegET(1, 1, 4)
    network(torch.randn(2, 1, 64, 64)).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_every_2d_script_offers_the_rivals():
    import train_cps
    import train_partial
    import train_sparse
    for script in (train_seget, train_cps, train_partial, train_sparse):
        assert {"fcn8s", "segnet", "unet", "deeplabv3plus"} <= set(script.MODELS)
    assert set(train_seget.MODELS) == {*emseg.NETWORKS, "seget"}


# -- loss


def batch(seed=0):
    torch.manual_seed(seed)
    label = (torch.rand(4, 6, 7) < torch.tensor([0.0, 0.05, 0.4, 0.9]).view(4, 1, 1)).long()
    label[torch.rand(4, 6, 7) < 0.1] = IGNORE
    return 3 * torch.randn(4, 1, 6, 7), label


def test_weights_are_the_ratio_of_the_very_patch():
    _, label = batch()
    found = train_seget.foreground_weight(label, 2000)
    for patch, weight in zip(label.numpy(), found.numpy()):
        background, structure = (patch == 0).sum(), (patch == 1).sum()
        assert (weight[patch != 1] == 1).all()
        if structure:
            np.testing.assert_allclose(weight[patch == 1], background / structure, rtol=1e-6)
    assert found[3][label[3] == 1].max() < 1                # more structure than background
    assert found.dtype == torch.float32


def test_weights_are_capped():
    label = torch.zeros(2, 100, 100, dtype=torch.int64)
    label[0, 0, 0], label[1, :50] = 1, 1
    found = train_seget.foreground_weight(label, 2000)
    assert found[0, 0, 0] == 2000 and found[1, 0, 0] == 1
    assert train_seget.foreground_weight(label, 1e5)[0, 0, 0] == 9999


def test_weights_balance_background_and_structure_in_the_cross_entropy():
    """Eq. 3 by hand: the structure's part of the sum grows by the ratio, the background's stays."""
    logits, label = batch(1)
    label[0, 0, 0] = 1
    weight = train_seget.foreground_weight(label, 2000)
    y, t = logits[:, 0].double().numpy(), (label == 1).numpy()
    bce = np.maximum(y, 0) - y * t + np.log1p(np.exp(-np.abs(y)))
    total = 0.0
    for b in range(4):
        background, structure = (label[b] == 0).numpy(), t[b]
        ratio = background.sum() / structure.sum()
        total += bce[b][background].sum() + min(ratio, 2000) * bce[b][structure].sum()
    wanted = total / (label != IGNORE).sum().item()
    assert emseg.cross_entropy(logits, label, weight).item() == pytest.approx(wanted, rel=1e-5)


def test_jaccard_distance_is_equation_5():
    logits, label = batch(2)
    y = 1 / (1 + np.exp(-logits[:, 0].double().numpy()))
    kept = (label != IGNORE).numpy()
    y, t = y[kept], (label.numpy() == 1)[kept]
    overlap = (y * t).sum()
    wanted = 1 - (overlap + 1) / (y.sum() + t.sum() - overlap + 1)
    found = train_seget.jaccard_distance(logits, label)
    assert found.item() == pytest.approx(wanted, rel=1e-5)
    exact = train_seget.jaccard_distance(logits, label, smooth=0)
    assert exact.item() == pytest.approx(1 - overlap / (y.sum() + t.sum() - overlap), rel=1e-5)


def test_jaccard_distance_of_perfect_wrong_and_empty():
    label = torch.zeros(1, 8, 8, dtype=torch.int64)
    label[0, :4] = 1
    sure = (label[:, None] * 2 - 1) * 50.0
    assert train_seget.jaccard_distance(sure, label).item() == pytest.approx(0, abs=1e-6)
    assert train_seget.jaccard_distance(-sure, label, smooth=0).item() == pytest.approx(1)
    nothing = torch.full_like(sure, -50.0)
    assert train_seget.jaccard_distance(nothing, label * 0).item() == pytest.approx(0, abs=1e-6)


def test_jaccard_distance_has_a_gradient_where_annotated_only():
    logits, label = batch(3)
    logits.requires_grad_()
    train_seget.jaccard_distance(logits, label).backward()
    ignored = (label == IGNORE)[:, None]
    assert (logits.grad[ignored] == 0).all() and (logits.grad[~ignored] != 0).all()
    assert (logits.grad[(label == 1)[:, None]] < 0).all()
    assert (logits.grad[(label == 0)[:, None]] > 0).all()


def test_the_regulariser_is_the_sum_of_squared_kernels():
    network = train_seget.SegET(1, 1, 2)
    wanted = sum(float((m.weight.detach().double() ** 2).sum()) for m in network.modules()
                 if isinstance(m, nn.Conv2d))
    assert train_seget.squared_norm(network).item() == pytest.approx(wanted, rel=1e-5)


# -- patches


def coordinates(shape):
    """A volume whose voxels say where they are, and a label with a structure and a lone pixel."""
    z, y, x = np.indices(shape)
    image = (z * shape[1] * shape[2] + y * shape[2] + x).astype(np.int32)
    label = np.zeros(shape, np.uint8)
    label[1, 30:33, 40:44] = 1
    label[-1, -1, -1] = 1
    return InMemory(image), InMemory(label)


def corner(patch, shape):
    return tuple(int(i) for i in np.unravel_index(int(patch[0, 0]), shape))


def test_the_papers_patches_are_counted():
    """7 x 7 patches of each of 60 slices; 16 of 76 slices are held out (section 3.1)."""
    held_out = emseg.parse_slices("every=5", 76)
    assert len(held_out) == 16
    starts = train_seget.SlidingWindows.starts(2048, 512, 256)
    assert starts.tolist() == [0, 256, 512, 768, 1024, 1280, 1536]
    assert len(np.setdiff1d(np.arange(76), held_out)) * len(starts) ** 2 == 7 * 7 * 60


@pytest.mark.parametrize("side, patch, stride, wanted", [
    (768, 512, 256, [0, 256]), (1000, 512, 256, [0, 256, 488]), (512, 512, 256, [0]),
    (513, 512, 256, [0, 1]), (10, 4, 3, [0, 3, 6]), (11, 4, 3, [0, 3, 6, 7]), (9, 4, 9, [0, 5])])
def test_windows_reach_the_border(side, patch, stride, wanted):
    assert train_seget.SlidingWindows.starts(side, patch, stride).tolist() == wanted


def test_a_pass_shows_every_patch_once_and_positive_ones_again():
    shape = 4, 50, 70
    image, label = coordinates(shape)
    patches = train_seget.SlidingWindows([image], [label], (16, 20), (10, 12), [[1, 3]], copies=3)
    ys, xs = [0, 10, 20, 30, 34], [0, 12, 24, 36, 48, 50]
    every = [(z, y, x) for z in (1, 3) for y in ys for x in xs]
    positive = {(1, y, x) for y in (20, 30) for x in (24, 36)} | {(3, 34, 50)}
    wanted = sorted(every + [place for place in every if place in positive] * 3)
    assert len(patches) == len(wanted) == 60 + 3 * len(positive)
    orders = []
    for passes in range(3):
        found = []
        for i in range(len(patches)):
            patch, truth = patches[passes * len(patches) + i]
            place = corner(patch, shape)
            assert patch.shape == truth.shape == (16, 20)
            assert bool(truth.any()) == (place in positive)
            np.testing.assert_array_equal(truth, label.array[place[0], place[1]:place[1] + 16,
                                                             place[2]:place[2] + 20])
            found.append(place)
        assert sorted(found) == wanted and found != wanted
        orders.append(found)
    assert orders[0] != orders[1] != orders[2]


def test_an_item_depends_on_seed_and_index_alone():
    shape = 4, 50, 70
    image, label = coordinates(shape)
    make = functools.partial(train_seget.SlidingWindows, [image], [label], (16, 20), (10, 12),
                             [[0, 1]])
    one, two = make(seed=1), make(seed=1)
    forward = [corner(one[i][0], shape) for i in range(150)]
    backward = [corner(two[i][0], shape) for i in reversed(range(150))]
    assert forward == backward[::-1]
    assert forward != [corner(make(seed=2)[i][0], shape) for i in range(150)]


def test_several_volumes_are_cut_up():
    big, small = coordinates((2, 40, 40)), coordinates((3, 33, 44))
    patches = train_seget.SlidingWindows(*zip(big, small), (20, 20), (20, 20), [[0], [1, 2]],
                                         copies=1)
    assert len(patches) == 4 + 2 * 6 + 2        # 2 x 3 windows, one of each z with the structure
    volumes = patches.windows[:, 0].tolist()
    assert volumes == [0] * 4 + [1] * 12


def test_patches_that_do_not_fit_are_refused():
    image, label = coordinates((2, 40, 40))
    with pytest.raises(emseg.InputError, match="patches of 64 x 20 do not fit into slices of 40 x"):
        train_seget.SlidingWindows([image], [label], (64, 20), (10, 10), [[0]])


# -- schedule


def keras(history, reduce_patience, patience):
    """(halvings, stop) after each epoch, as Keras' callbacks count them."""
    best, wait_rate, wait_stop, halvings, states = -math.inf, 0, 0, 0, []
    for value in history:
        if value > best:
            best, wait_rate, wait_stop = value, 0, 0
        else:
            wait_rate, wait_stop = wait_rate + 1, wait_stop + 1
            if wait_rate >= reduce_patience:
                halvings, wait_rate = halvings + 1, 0
        states.append((halvings, wait_stop >= patience))
    return states


def test_the_schedule_is_that_of_keras():
    rng = np.random.default_rng(0)
    for length in (1, 5, 40):
        history = rng.integers(0, 12, length).tolist()
        for reduce_patience, patience in ((1, 2), (2, 5), (3, 8)):
            states = keras(history, reduce_patience, patience)
            for epochs in range(1, length + 1):
                seen = history[:epochs]
                halved = emseg.plateaus(seen, reduce_patience)
                stop = train_seget.epochs_without_improvement(seen) >= patience
                assert (halved, stop) == states[epochs - 1]
    assert train_seget.epochs_without_improvement([]) == emseg.plateaus([], 3) == 0


def test_settings_are_those_of_section_3_2():
    wanted = {"synapse": (1e-4, 1e-6, 38, 8, 3, 0, 0), "mts": (1e-3, 1e-5, 300, 8, 3, 2000, 0),
              "centriole": (2e-3, 1e-6, 300, 10, 3, 2000, 4),
              "granules": (2e-3, 1e-5, 60, 5, 2, 0, 0), "golgi": (2e-3, 1e-5, 124, 5, 2, 1000, 2)}
    args = train_seget.parse_args(["--volume", "a", "--label", *[f"{n}=b" for n in wanted]])
    structures = train_seget.parse_structures(args)
    keys = ("lr", "decay", "epochs", "patience", "reduce_patience", "weight_cap", "copies")
    assert {name: tuple(own[key] for key in keys) for name, own in structures.items()} == wanted
    assert (args.batch_size, args.patch_size, args.stride) == (12, [512, 512], [256, 256])
    assert (args.model, args.val_slices, args.augment) == ("seget", "every=5", False)


def test_the_readme_shows_these_settings():
    lines = [line for line in (ROOT / "README.md").read_text().splitlines()
             if line.startswith("| `--") and line.count("|") == 8]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    shown = {row[0][2:].replace("-", "_"): [float(value) for value in row[1:]] for row in rows}
    wanted = [*train_seget.PRESETS.values()]
    assert shown == {key: [preset[key] for preset in wanted] for key in wanted[0]}


def test_flags_override_settings_and_other_names_have_the_stated_ones():
    args = train_seget.parse_args(["--volume", "a", "--label", "Synapse=b", "nucleus=c", "--lr",
                                   "0.5", "--copies", "7", "--weight-cap", "0"])
    synapse, nucleus = train_seget.parse_structures(args).values()
    for own in synapse, nucleus:
        assert not {"lr", "copies", "weight_cap"} & set(own)        # they stay as typed
    assert (synapse["decay"], synapse["epochs"]) == (1e-6, 38)
    other = train_seget.PRESETS["other structures"]
    assert {key: nucleus[key] for key in ("decay", "epochs", "patience", "reduce_patience")} == {
        key: other[key] for key in ("decay", "epochs", "patience", "reduce_patience")}


# -- several structures


def structures_of(*arguments, known=None):
    return train_seget.parse_structures(train_seget.parse_args(
        ["--volume", "v1", "v2", *arguments]), known)


def test_labels_are_sorted_by_structure_and_volume():
    found = structures_of("--label", "a=1", "b=2", "a=3", "b=4", "--test-volume", "t",
                          "--test-label", "b=5")
    assert list(found) == ["a", "b"]
    assert found["a"]["label"] == ["1", "3"] and found["b"]["label"] == ["2", "4"]
    assert found["a"]["test_label"] == [] and found["b"]["test_label"] == ["5"]
    assert found["a"]["classes"] == ["background", "a"]


def test_labels_without_names():
    found = structures_of("--label", "1", "2", "--classes", "outside", "golgi")
    assert list(found) == ["golgi"] and found["golgi"]["classes"] == ["outside", "golgi"]
    assert found["golgi"]["patience"] == 5 and "label_map" not in found["golgi"]
    assert list(structures_of("--label", "1", "2")) == ["foreground"]


def test_class_ids_become_one_mask_for_each_class():
    found = structures_of("--label", "1", "2", "--classes", "bg", "mts", "golgi")
    assert {name: own["label_map"] for name, own in found.items()} == {
        "mts": "0=0,1=1,2=0", "golgi": "0=0,1=0,2=1"}
    found = structures_of("--label", "1", "2", "--classes", "bg", "mts", "golgi", "--label-map",
                          "7=2,8:10=1,3=255,*=0")
    assert found["golgi"]["label_map"] == "7=1,8=0,9=0,3=255,*=0"
    assert found["mts"]["label_map"] == "7=0,8=1,9=1,3=255,*=0"


@pytest.mark.parametrize("arguments, message", [
    (["--label", "a=1", "a=2", "3", "4"], "some labels have a name and some have none"),
    (["--label", "a=1", "a=2", "--classes", "bg", "a"], "--classes: the labels already have names"),
    (["--label", "background=1", "background=2"], "a structure cannot be named background"),
    (["--label", "Demo=1", "Demo=2"], "a structure cannot be named Demo"),
    (["--label", "x" * 101 + "=1", "x" * 101 + "=2"], "cannot be the name of a structure"),
    (["--label", "a=1", "a=2", "A=1", "A=2"], "two structures are named a, upper and lower case"),
    (["--label", "1", "2", "--classes", "bg", "x", "x"], "two structures are named x"),
    (["--label", "a.b=1", "a.b=2"], "'a.b' cannot be the name of a structure"),
    (["--label", "=1", "=2"], "'' cannot be the name"),
    (["--label", "a=1", "a=2", "--test-volume", "t", "--test-label", "b=1"],
     "b is none of the structures, which are a"),
    (["--label", "a=1", "a=2", "b=1", "b=2", "--val-volume", "t", "--val-label", "b=1"],
     "--val-label has none for a"),
])
def test_structures_that_make_no_sense(arguments, message):
    with pytest.raises(emseg.InputError, match=re.escape(message)):
        structures_of(*arguments)


@pytest.mark.parametrize("arguments, message", [
    (["--label", "a=1", "a=2", "b=1"], "--volume has 2 and --label 1 paths of b; give one label of "
                                       "b for each volume"),
    (["--label", "1"], "--volume has 2 and --label 1 paths; give one label for each volume"),
    (["--label", "a=1", "a=2", "--test-volume", "x", "y", "--test-label", "a=1"],
     "--test-volume has 2 and --test-label 1 paths of a"),
    (["--label", "a=1", "a=2", "--stride", "3"], "--stride 3: wanted two numbers"),
    (["--label", "a=1", "a=2", "--copies", "-1"], "--copies -1 is not 0 or more"),
    (["--label", "a=1", "a=2", "--weight-cap", "nan"], "--weight-cap nan is not 0 or more"),
    (["--label", "a=1", "a=2", "--decay", "-1"], "--decay -1.0 is not 0 or more"),
    (["--label", "a=1", "a=2", "--l2", "inf"], "--l2 inf is not 0 or more"),
    (["--label", "a=1", "a=2", "--patience", "0"], "argument --patience"),
    (["--label", "a=1", "a=2", "--unlabeled-volume", "u"], "--unlabeled-volume"),
])
def test_arguments_that_make_no_sense(capsys, arguments, message):
    assert message in refused(capsys, "--volume", "v1", "v2", *arguments)


def test_ids_in_place_of_a_mask_are_refused_with_a_map_that_works(cells, masks, tmp_path, capsys):
    command = ["--volume", cells / "image.tif", "--label", f"a={cells / 'label.tif'}", "--out-dir",
               tmp_path / "out", *TINY, "--epochs", "1"]
    message = refused(capsys, *command)
    assert message.endswith('--label-map="0=0,*=1", or name all classes with --classes')
    run(*command, "--label-map", "0=0,*=1")
    signed = -tifffile.imread(masks / "mito.tif").astype(np.int8)
    tifffile.imwrite(tmp_path / "signed.tif", signed)
    command[3] = f"a={tmp_path / 'signed.tif'}"
    assert refused(capsys, *command, "--overwrite").endswith('--label-map="0=0,*=1"')
    run(*command, "--overwrite", "--label-map", "0=0,*=1")
    entry = metrics(tmp_path / "out" / "a")["volumes"][0]["per_class"]["a"]
    assert entry["tp"] + entry["fn"] == (signed[::5] == -1).sum()


def test_a_path_that_holds_an_equals_sign_is_a_path(tmp_path):
    (tmp_path / "a=b.tif").touch()
    os.chdir(tmp_path)
    assert emseg.named_paths(["a=b.tif@0:3"]) == {None: ["a=b.tif@0:3"]}
    assert emseg.named_paths(["x=a=b.tif", "c=d.tif", "e/f=g.tif"]) == {
        "x": ["a=b.tif"], "c": ["d.tif"], None: ["e/f=g.tif"]}


def merged_by_hand(masks, overlap):
    """Pixel by pixel: the only claim, IGNORE where somebody does not know, else by the rule."""
    ids = np.zeros(masks[0].shape, np.uint8)
    for place in np.ndindex(ids.shape):
        values = [mask[place] for mask in masks]
        claims = [k for k, value in enumerate(values, 1) if value == 1]
        if IGNORE in values or (len(claims) > 1 and overlap == "highest"):
            ids[place] = IGNORE
        elif claims:
            ids[place] = claims[-1]
    return ids


@pytest.mark.parametrize("overlap", ["highest", "last"])
def test_merged_truth(overlap):
    rng = np.random.default_rng(0)
    masks = [rng.choice(np.array([0, 1, IGNORE], np.uint8), (3, 8, 9), p=[0.5, 0.4, 0.1])
             for _ in range(3)]
    lazies = [InMemory(mask) for mask in masks]
    for lazy, slices in zip(lazies, ([0, 1, 2], [1, 2], [0, 2])):
        lazy.slices = np.array(slices)
    merged = train_seget.MergedLabels(lazies, overlap)
    np.testing.assert_array_equal(merged[:], merged_by_hand(masks, overlap))
    assert merged.slices.tolist() == [2] and merged.shape == (3, 8, 9)


@pytest.mark.parametrize("overlap", ["highest", "last"])
def test_merged_score_maps(overlap):
    torch.manual_seed(0)
    prob = torch.rand(2, 3, 8, 9)
    prob[0, :, 0, 0] = 0.5                                  # not above the threshold
    found = train_seget.merge_structures(prob, 0.5, overlap)
    for n, y, x in np.ndindex(2, 8, 9):
        scores = prob[n, :, y, x].tolist()
        claims = [k for k in (1, 2, 3) if scores[k - 1] > 0.5]
        best = max(claims, key=lambda k: scores[k - 1] if overlap == "highest" else k, default=0)
        assert found[n, y, x] == best
    assert found.dtype == torch.int64 and set(found.unique().tolist()) == {0, 1, 2, 3}


# -- runs


def test_a_run_writes_what_the_readme_says(trained):
    files = {path.name for path in trained.iterdir()}
    assert files == {"config.json", "best.pt", "last.pt", "prediction.tif", "metrics.json",
                     "figure.png", "maps.png", "mito", "vesicle"}
    for name in ("mito", "vesicle"):
        assert {path.name for path in (trained / name).iterdir()} == {
            "config.json", "log.csv", "best.pt", "last.pt", "prediction.tif", "metrics.json",
            "figure.png", "curves.png"}
        rows = log_without_seconds(trained / name)
        assert [row["step"] for row in rows] == ["3", "6"]
        for row in rows:
            terms = [float(row[key]) for key in ("loss_bce", "loss_jaccard", "loss_l2")]
            assert float(row["loss"]) == pytest.approx(sum(terms), rel=1e-5)
            assert 0 < float(row["val_miou"]) < 1
    config = json.loads((trained / "mito" / "config.json").read_text())
    assert config["part_of"] == str(trained) and config["classes"] == ["background", "mito"]


def test_metrics_hold_the_papers_table(trained, cells, masks, capsys):
    content, found = metrics(trained), {}
    for name in ("mito", "vesicle"):
        pred = tifffile.imread(trained / name / "prediction.tif")
        truth = tifffile.imread(masks / f"{name}.tif")[8:12]
        ious = [((pred == k) & (truth == k)).sum() / ((pred == k) | (truth == k)).sum()
                for k in (0, 1)]
        found[name] = np.mean(ious), (pred == truth).mean()
        part = metrics(trained / name)
        assert part["mean"] == content["structures"][name]
        assert part["parameters"] * 2 == content["parameters"]
        assert part["volumes"][0]["label"].endswith(f"{name}.tif@8:12")
    for name, (miou, accuracy) in found.items():
        assert content["structures"][name]["miou"] == pytest.approx(miou)
        assert content["structures"][name]["accuracy"] == pytest.approx(accuracy)
    for key, place in (("miou", 0), ("accuracy", 1)):
        wanted = np.mean([values[place] for values in found.values()])
        assert content["average"][key] == pytest.approx(wanted)
    assert content["classes"] == ["background", "mito", "vesicle"]
    assert content["selected_on"] == "validation" and content["train_seconds"] > 0


def test_table_1_has_the_papers_columns():
    block = {"miou": 0.5}
    assert train_seget.table_1("seget", "here", {"a": block, "b": {"miou": 0.75}}).splitlines() == [
        "| mIoU, here | a | b | average |", "| --- | --- | --- | --- |",
        "| seget | 0.5000 | 0.7500 | 0.6250 |"]
    assert train_seget.table_1("seget", "", {"a": block, "b": None}).splitlines()[-1] == (
        "| seget | 0.5000 | undefined | undefined |")


def test_a_structure_trains_as_if_it_were_alone(trained, cells, masks, tmp_path):
    train(cells, masks, tmp_path / "alone", structures=("vesicle",))
    alone, among = [folder / "vesicle" for folder in (tmp_path / "alone", trained)]
    assert torch.equal(weights(alone / "last.pt"), weights(among / "last.pt"))
    assert log_without_seconds(alone) == log_without_seconds(among)
    np.testing.assert_array_equal(*[tifffile.imread(folder / "prediction.tif")
                                    for folder in (alone, among)])
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "alone" / "prediction.tif"),
                                  tifffile.imread(alone / "prediction.tif"))


@pytest.mark.parametrize("overlap", ["highest", "last"])
def test_predictions_and_score_maps_agree(held_out, cells, tmp_path, overlap):
    """Every mask is its score above 0.5, and the merged prediction follows from the scores."""
    run("--checkpoint", held_out / "best.pt", "--test-volume", cells / "image.tif@8:12",
        "--out-dir", tmp_path / "out", "--save-probability", *(
            ["--overlap", overlap] if overlap != "highest" else []))
    prob = tifffile.imread(tmp_path / "out" / "probability.tif")
    assert prob.shape == (4, 2, 112, 128) and prob.dtype == np.float32
    for k, name in enumerate(("grown", "mito")):
        np.testing.assert_array_equal(tifffile.imread(tmp_path / "out" / name / "prediction.tif"),
                                      prob[:, k] > 0.5)
    merged = tifffile.imread(tmp_path / "out" / "prediction.tif")
    ranked = prob if overlap == "highest" else np.broadcast_to(
        np.array([1, 2]).reshape(1, 2, 1, 1), prob.shape)
    wanted = np.where(prob > 0.5, ranked, 0)
    np.testing.assert_array_equal(merged, np.where(wanted.max(1) > 0, wanted.argmax(1) + 1, 0))


def test_every_fifth_slice_is_held_out_and_scored(held_out, masks):
    """Slices 0, 5 and 10 of 12 train nothing and are the ones that count."""
    content = metrics(held_out)
    truth = tifffile.imread(masks / "mito.tif")
    pred = tifffile.imread(held_out / "mito" / "prediction.tif")
    entry = metrics(held_out / "mito")["volumes"][0]
    assert entry["ignored"] == 9 * 112 * 128 and pred.shape == truth.shape
    kept = [0, 5, 10]
    found = entry["per_class"]["mito"]
    assert found["tp"] == ((pred == 1) & (truth == 1))[kept].sum()
    assert found["fp"] == ((pred == 1) & (truth == 0))[kept].sum()
    grown = tifffile.imread(masks / "grown.tif")
    both = ((truth == 1) & (grown == 1))[kept].sum()
    assert content["volumes"][0]["ignored"] == 9 * 112 * 128 + both and both > 0


def test_held_out_slices_do_not_leak(cells, masks, tmp_path, monkeypatch):
    """What they show changes neither patches nor normalisation nor a weight."""
    image = tifffile.imread(cells / "image.tif")
    noise = np.random.default_rng(0).integers(0, 256, image.shape, np.uint8)
    for held in (0, 5, 10):
        image[held] = noise[held]
    tifffile.imwrite(tmp_path / "changed.tif", image)
    spoiled = tifffile.imread(masks / "mito.tif")
    spoiled[[0, 5, 10]] = 1 - spoiled[[0, 5, 10]]
    tifffile.imwrite(tmp_path / "mito.tif", spoiled)
    for name, volume, mask in (("one", cells / "image.tif", masks / "mito.tif"),
                               ("two", tmp_path / "changed.tif", tmp_path / "mito.tif")):
        run("--volume", volume, "--label", f"mito={mask}", "--out-dir", tmp_path / name, *TINY)
    one, two = [torch.load(tmp_path / name / "mito" / "last.pt", weights_only=True)
                for name in ("one", "two")]
    assert one["normalization"] == two["normalization"]
    trained = [torch.cat([v.flatten() for k, v in each["modules"]["network"].items()])
               for each in (one, two)]
    assert torch.equal(*trained)
    assert one["history"] != two["history"]


def test_the_rate_is_halved_and_the_training_ended(cells, masks, tmp_path, capsys):
    """A rate too small to learn, and no BatchNorm: the first epoch stays the best one."""
    run("--volume", cells / "image.tif@0:8", "--label", *labels(masks, "mito"), "--out-dir",
        tmp_path / "out", *TINY, "--epochs", "30", "--lr", "1e-30", "--patience", "5",
        "--reduce-patience", "2", "--decay", "0.5", "--steps-per-epoch", "1", "--model", "unet5")
    rows = log_without_seconds(tmp_path / "out" / "mito")
    assert len(rows) == 6 and len({row["val_miou"] for row in rows}) == 1
    rates = [float(row["lr"]) * (1 + 0.5 * step) / 1e-30 for step, row in enumerate(rows)]
    np.testing.assert_allclose(rates, [1, 1, 1, 0.5, 0.5, 0.25], rtol=1e-6)
    assert "mito: no better validation mIoU in 5 epochs" in capsys.readouterr().out
    best = torch.load(tmp_path / "out" / "mito" / "best.pt", weights_only=True)
    assert best["step"] == 1 and best["best"] == float(rows[0]["val_miou"])
    before = (tmp_path / "out" / "mito" / "log.csv").read_text()
    run("--resume", "--out-dir", tmp_path / "out")          # an ended training trains no further
    assert (tmp_path / "out" / "mito" / "log.csv").read_text() == before


def test_networks_begin_as_in_keras_and_patches_follow_the_seed(cells, masks, tmp_path,
                                                                monkeypatch):
    """Glorot's uniform weights, no bias; a rate of 1e-30 leaves them as they are."""
    seeds, windows = [], train_seget.SlidingWindows
    monkeypatch.setattr(train_seget, "SlidingWindows",
                        lambda *args: seeds.append(args[-1]) or windows(*args))
    run("--volume", cells / "image.tif@0:8", "--label", *labels(masks, "mito"), "--out-dir",
        tmp_path / "out", *TINY, "--epochs", "1", "--steps-per-epoch", "1", "--lr", "1e-30",
        "--width", "8", "--seed", "7")
    state = torch.load(tmp_path / "out" / "mito" / "last.pt", weights_only=True)["modules"]
    kernel = state["network"]["decoder.0.0.weight"]
    side = math.sqrt(6 / (9 * (kernel.shape[0] + kernel.shape[1])))
    assert 0.99 * side < kernel.abs().max() <= side
    assert kernel.std().item() == pytest.approx(side / math.sqrt(3), rel=0.02)
    assert state["network"]["decoder.0.0.bias"].abs().max() < 1e-20 and seeds == [7]


def test_without_validation_the_last_epoch_counts(cells, masks, tmp_path):
    run("--volume", cells / "image.tif@0:8", "--label", *labels(masks, "mito"), "--out-dir",
        tmp_path / "out", *TINY, "--val-slices", "")
    assert metrics(tmp_path / "out")["selected_on"] == "last epoch"
    assert torch.equal(*[weights(tmp_path / "out" / "mito" / f) for f in ("best.pt", "last.pt")])


def test_validation_volumes_take_the_place_of_slices(cells, masks, tmp_path):
    run("--volume", cells / "image.tif@0:8", "--label", *labels(masks, "mito"), "--val-volume",
        cells / "image.tif@8:12", "--val-label", *labels(masks, "mito", crop="8:12"),
        "--out-dir", tmp_path / "out", *TINY, "--epochs", "1")
    seen = torch.load(tmp_path / "out" / "mito" / "best.pt", weights_only=True)["seen"]
    assert [each["z"] for each in seen] == [[*range(8)], [*range(8, 12)]]
    content = metrics(tmp_path / "out")                     # they are predicted, and score
    assert [v["voxels"] for v in content["volumes"]] == [8 * 112 * 128, 4 * 112 * 128]
    pred = tifffile.imread(tmp_path / "out" / "mito" / "prediction_2_image.tif")
    truth = tifffile.imread(masks / "mito.tif")[8:12]
    assert content["structures"]["mito"]["accuracy"] == pytest.approx((pred == truth).mean())
    rows = log_without_seconds(tmp_path / "out" / "mito")
    assert content["average"]["miou"] == pytest.approx(float(rows[0]["val_miou"]))


def test_weights_and_copies_reach_the_training(trained, cells, masks, tmp_path, capsys):
    train(cells, masks, tmp_path / "weighted", "--weight-cap", "50", structures=("mito",))
    train(cells, masks, tmp_path / "copied", "--copies", "2", structures=("mito",))
    train(cells, masks, tmp_path / "normed", "--l2", "0.1", structures=("mito",))
    train(cells, masks, tmp_path / "turned", "--augment", structures=("mito",))
    first = {name: log_without_seconds(folder / "mito")[0] for name, folder in (
        ("plain", trained), *[(n, tmp_path / n) for n in ("weighted", "copied", "normed",
                                                          "turned")])}
    assert float(first["weighted"]["loss_bce"]) > 1.2 * float(first["plain"]["loss_bce"])
    ratio = float(first["normed"]["loss_l2"]) / float(first["plain"]["loss_l2"])
    assert ratio == pytest.approx(1e4, rel=0.1)
    for name in ("copied", "turned"):
        assert first[name]["loss_bce"] != first["plain"]["loss_bce"]
    said = capsys.readouterr().out
    assert "with 2 copies of positive ones, no weights" in said and "weights up to 50" in said


def test_a_checkpoint_of_all_or_one_structure_predicts_as_its_run_did(trained, cells, masks,
                                                                      tmp_path):
    run("--checkpoint", trained / "best.pt", "--test-volume", cells / "image.tif@8:12",
        "--test-label", *labels(masks, "vesicle", "mito", crop="8:12"), "--out-dir",
        tmp_path / "all")
    for name in (".", "mito", "vesicle"):
        np.testing.assert_array_equal(tifffile.imread(tmp_path / "all" / name / "prediction.tif"),
                                      tifffile.imread(trained / name / "prediction.tif"))
    assert metrics(tmp_path / "all")["structures"] == metrics(trained)["structures"]
    assert metrics(tmp_path / "all")["average"] == metrics(trained)["average"]
    run("--checkpoint", trained / "vesicle" / "best.pt", "--test-volume",
        cells / "image.tif@8:12", "--test-label", masks / "vesicle.tif@8:12", "--out-dir",
        tmp_path / "one")
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "one" / "prediction.tif"),
                                  tifffile.imread(trained / "vesicle" / "prediction.tif"))
    structures = metrics(tmp_path / "one")["structures"]
    assert structures == {"vesicle": metrics(trained)["structures"]["vesicle"]}


def test_one_label_file_with_class_ids(trained, cells, masks, tmp_path):
    """The same masks, as values of one file: the same weights and scores."""
    run("--volume", cells / "image.tif@0:8", "--label", cells / "label.tif@0:8", "--test-volume",
        cells / "image.tif@8:12", "--test-label", cells / "label.tif@8:12", "--label-map",
        "3=1,4=2,*=0", "--classes", "background", "mito", "vesicle", "--out-dir",
        tmp_path / "ids", *TINY)
    for name in ("mito", "vesicle"):
        assert torch.equal(weights(tmp_path / "ids" / name / "last.pt"),
                           weights(trained / name / "last.pt"))
    assert metrics(tmp_path / "ids")["structures"] == metrics(trained)["structures"]
    run("--checkpoint", tmp_path / "ids" / "best.pt", "--test-volume", cells / "image.tif@8:12",
        "--test-label", cells / "label.tif@8:12", "--out-dir", tmp_path / "again")
    assert metrics(tmp_path / "again")["structures"] == metrics(trained)["structures"]


@pytest.mark.parametrize("steps", [2, 8, 12])
def test_interrupted_and_resumed_is_bit_identical(trained, cells, masks, tmp_path, monkeypatch,
                                                  capsys, steps):
    conftest.interrupt_after(monkeypatch, steps)
    with pytest.raises(SystemExit) as stopped:
        train(cells, masks, tmp_path / "out")
    assert stopped.value.code == 130
    assert f"--resume --out-dir {tmp_path / 'out'}\n" in capsys.readouterr().out
    assert not (tmp_path / "out" / "metrics.json").exists()
    monkeypatch.undo()
    run("--resume", "--out-dir", tmp_path / "out")
    for name in ("mito", "vesicle"):
        for file in ("best.pt", "last.pt"):
            assert torch.equal(weights(tmp_path / "out" / name / file),
                               weights(trained / name / file))
        assert log_without_seconds(tmp_path / "out" / name) == log_without_seconds(trained / name)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out" / "prediction.tif"),
                                  tifffile.imread(trained / "prediction.tif"))


def test_a_checkpoint_without_networks_is_refused(trained, cells, tmp_path, capsys):
    message = refused(capsys, "--checkpoint", trained / "last.pt", "--test-volume",
                      cells / "image.tif", "--out-dir", tmp_path / "out")
    assert "last.pt: holds no network; give best.pt" in message
    assert not (tmp_path / "out").exists()


def test_a_batch_that_cannot_be_normalised_is_one_line(cells, masks, tmp_path, capsys):
    message = refused(capsys, "--volume", cells / "image.tif@0:8", "--label",
                      *labels(masks, "mito"), "--out-dir", tmp_path / "out", *TINY, "--batch-size",
                      "1", "--patch-size", "16", "16")
    assert "a batch of one so small patch cannot be normalised" in message


def test_scores_say_which_prediction_they_are_of(cells, masks, tmp_path, capsys):
    train(cells, masks, tmp_path / "out", "--epochs", "1")
    said = capsys.readouterr().out.splitlines()
    for start in ("mito/prediction.tif  mito: dice", "prediction.tif  mito: dice",
                  "prediction.tif  vesicle: dice", "mito epoch 0  loss", "| mIoU, test |",
                  "vesicle/prediction.tif  vesicle: dice"):
        assert sum(line.startswith(start) for line in said) == 1, start


def test_a_part_is_not_resumed_by_itself(trained, capsys):
    message = refused(capsys, "--resume", "--out-dir", trained / "mito")
    assert message.endswith(f"is part of the run {trained}; resume that one")


def test_overwrite_replaces_the_structures(trained, cells, masks, tmp_path, capsys):
    train(cells, masks, tmp_path / "out", "--seed", "5")
    assert "is not empty" in refused(
        capsys, "--volume", cells / "image.tif@0:8", "--label", *labels(masks, "mito", "vesicle"),
        "--out-dir", tmp_path / "out", *TINY)
    other = tmp_path / "out" / "other"                      # a run of its own that stands here
    train(cells, masks, other, structures=("mito",))
    train(cells, masks, tmp_path / "out", "--overwrite", structures=("mito",))
    assert torch.equal(weights(tmp_path / "out" / "mito" / "last.pt"),
                       weights(trained / "mito" / "last.pt"))
    assert not (tmp_path / "out" / "vesicle").exists()
    assert (other / "best.pt").exists() and (other / "mito" / "best.pt").exists()


@pytest.mark.parametrize("place", ["prediction.tif", "mito/prediction.tif"])
def test_overwrite_never_deletes_a_label(cells, masks, tmp_path, capsys, place):
    train(cells, masks, tmp_path / "out", "--epochs", "1", structures=("mito",))
    read = tmp_path / "out" / place
    tifffile.imwrite(read, tifffile.imread(masks / "mito.tif")[8:12],       # as if drawn into it
                     photometric="minisblack")
    message = refused(capsys, "--volume", cells / "image.tif@8:12", "--label", f"mito={read}",
                      "--out-dir", tmp_path / "out", "--overwrite", *TINY)
    assert f"would delete {read}" in message and read.exists()
    assert (tmp_path / "out" / "mito" / "best.pt").exists()


@pytest.mark.parametrize("sides", [(32, 48), (50, 33), (17, 90)])
@pytest.mark.parametrize("model", sorted(train_seget.MODELS))
def test_every_network_predicts_slices_of_any_size(model, sides):
    """Multiples of 16 or not: padded, and cut back to the same size."""
    network = train_seget.MODELS[model](1, 1, narrow(model, 2)).eval()
    with torch.no_grad():
        prob = emseg.predict_slices(network, torch.randn(2, 1, *sides))
    assert prob.shape == (2, 1, *sides) and (prob >= 0).all() and (prob <= 1).all()


@pytest.mark.parametrize("model", sorted(train_seget.MODELS))
def test_every_network_trains(cells, masks, tmp_path, model):
    run("--volume", f"{cells}/image.tif@0:8,{CORNER}", "--label",
        *labels(masks, "mito", crop=f"0:8,{CORNER}"), "--test-volume",
        f"{cells}/image.tif@8:10,{CORNER}", "--test-label",
        *labels(masks, "mito", crop=f"8:10,{CORNER}"), "--out-dir", tmp_path / "out", *TINY, *BRIEF,
        "--model", model, "--width", narrow(model, 2))
    content = metrics(tmp_path / "out")
    assert content["model"] == model and 0 < content["average"]["miou"] <= 1
    before, after = [weights(path) for path in (tmp_path / "out" / "mito" / "best.pt",
                                                tmp_path / "out" / "mito" / "last.pt")]
    assert torch.isfinite(after).all() and torch.equal(before, after)


# -- tomograms as those of the paper


@pytest.fixture(scope="module")
def tomogram(cells, masks, tmp_path_factory):
    """The image as int8 MRC, the masks as int8 MRC of 0 and 1, with voxels of 150 x 2.255 nm."""
    folder = tmp_path_factory.mktemp("tomogram")
    image = tifffile.imread(cells / "image.tif").astype(np.int16) - 128
    arrays = {"cell": image, **{name: tifffile.imread(masks / f"{name}.tif")
                                for name in ("mito", "vesicle")}}
    for name, array in arrays.items():
        with mrcfile.new(folder / f"{name}.mrc", array.astype(np.int8)) as file:
            file.voxel_size = (22.55, 22.55, 1500.0)        # x, y, z in angstrom
    return folder


def test_int8_tomograms_and_masks_as_mrc(tomogram, trained, tmp_path):
    files = {name: tomogram / f"{name}.mrc" for name in ("cell", "mito", "vesicle")}
    run("--volume", f"{files['cell']}@0:8", "--label",
        *[f"{name}={files[name]}@0:8" for name in ("mito", "vesicle")], "--test-volume",
        f"{files['cell']}@8:12", "--test-label",
        *[f"{name}={files[name]}@8:12" for name in ("mito", "vesicle")], "--out-dir",
        tmp_path / "out", *TINY)
    assert torch.equal(weights(tmp_path / "out" / "mito" / "last.pt"),
                       weights(trained / "mito" / "last.pt"))       # int8 is only shifted
    for name in (".", "mito", "vesicle"):
        path = tmp_path / "out" / name / "prediction.mrc"
        with mrcfile.open(path) as file:
            assert file.data.shape == (4, 112, 128) and file.header.mode == 0
            found = [float(file.voxel_size[axis]) for axis in "xyz"]
            np.testing.assert_allclose(found, [22.55, 22.55, 1500.0], rtol=1e-5)
        assert emseg.open_volume(str(path)).voxel_size == pytest.approx((150, 2.255, 2.255))
        np.testing.assert_array_equal(
            emseg.open_volume(str(path))[:],
            tifffile.imread(trained / name / "prediction.tif"))


# -- structures that are not there


def test_a_structure_without_training_pixels_is_refused(cells, masks, tmp_path, capsys):
    tifffile.imwrite(tmp_path / "empty.tif", np.zeros((8, 112, 128), np.uint8),
                     photometric="minisblack")
    message = refused(capsys, "--volume", cells / "image.tif@0:8", "--label",
                      *labels(masks, "mito"), f"none={tmp_path / 'empty.tif'}", "--out-dir",
                      tmp_path / "out", *TINY)
    assert "error: none: " in message and "empty.tif: no foreground" in message
    assert not (tmp_path / "out").exists()


def test_a_structure_without_validation_pixels_is_refused(cells, masks, tmp_path, capsys):
    mask = tifffile.imread(masks / "mito.tif")[:8]
    mask[[0, 5]] = 0
    tifffile.imwrite(tmp_path / "mask.tif", mask)
    message = refused(capsys, "--volume", cells / "image.tif@0:8", "--label",
                      f"rare={tmp_path / 'mask.tif'}", "--out-dir", tmp_path / "out", *TINY)
    assert "no validation slice shows rare" in message and not (tmp_path / "out").exists()


def test_a_structure_that_is_not_in_the_test_volume_has_no_scores_of_its_own(trained, cells, masks,
                                                                             tmp_path, capsys):
    tifffile.imwrite(tmp_path / "empty.tif", np.zeros((4, 112, 128), np.uint8),
                     photometric="minisblack")
    run("--checkpoint", trained / "best.pt", "--test-volume", cells / "image.tif@8:12",
        "--test-label", *labels(masks, "mito", crop="8:12"), f"vesicle={tmp_path / 'empty.tif'}",
        "--out-dir", tmp_path / "empty")
    found = metrics(tmp_path / "empty")["structures"]["vesicle"]
    pred = tifffile.imread(tmp_path / "empty" / "vesicle" / "prediction.tif")
    background = (pred == 0).mean()
    assert found["miou"] == pytest.approx(background / 2 if pred.any() else 1)
    run("--checkpoint", trained / "best.pt", "--test-volume", cells / "image.tif@8:12",
        "--test-label", *labels(masks, "mito", crop="8:12"), "--out-dir", tmp_path / "unknown")
    content = metrics(tmp_path / "unknown")
    assert content["structures"]["vesicle"] is None and content["average"]["miou"] is None
    assert content["structures"]["mito"] == metrics(trained)["structures"]["mito"]
    assert "undefined | undefined |" in capsys.readouterr().out


@pytest.mark.parametrize("change, message", [
    (["--patch-size", "128", "48"], "patches of 128 x 48 do not fit into slices of 112 x 128"),
    (["--patch-size", "48"], "seget takes two sides, Y X"),
    (["--val-slices", "0:8"], "no slice is left to train on"),
    (["--val-slices", "every=0"], "every=0"),
    (["--model", "unet5", "--patch-size", "40", "40"], "nearest to 40: 32 or 48"),
    (["--label-map", "1=0,*=0"], "no foreground"),
])
def test_bad_input_is_one_line_and_leaves_nothing(cells, masks, tmp_path, capsys, change, message):
    found = refused(capsys, "--volume", cells / "image.tif@0:8", "--label",
                    *labels(masks, "mito", "vesicle"), "--out-dir", tmp_path / "out", *TINY,
                    *change)
    assert message in found and not (tmp_path / "out").exists()


def test_antialiased_masks_need_a_label_map(cells, tmp_path, capsys):
    smooth = np.tile(np.arange(128, dtype=np.uint8) * 2, (12, 112, 1))
    tifffile.imwrite(tmp_path / "smooth.tif", smooth)
    command = ["--volume", cells / "image.tif", "--label", f"a={tmp_path / 'smooth.tif'}",
               "--out-dir", tmp_path / "out", *TINY, "--epochs", "1"]
    assert '--label-map="128:256=1,*=0"' in refused(capsys, *command)
    run(*command, "--label-map", "128:256=1,*=0")
    entry = metrics(tmp_path / "out" / "a")["volumes"][0]["per_class"]["a"]
    assert entry["tp"] + entry["fn"] == 3 * 112 * 64


# -- figure, README, demo, real data


def test_the_papers_structures_have_its_colours():
    assert train_seget.structure_colors(["Golgi", "x", "mts", "y"]) == [
        "limegreen", emseg.CLASS_COLORS[0], "red", emseg.CLASS_COLORS[1]]


def test_every_readme_command_parses(trained, monkeypatch):
    assert conftest.parse_readme_commands(train_seget, trained / "best.pt", monkeypatch) >= 5


@pytest.mark.background(ROOT / "train_seget.py", "--demo", "--epochs", "6")
def test_the_demo_segments_three_structures(finished):
    assert finished.returncode == 0, finished.stderr
    (folder,) = (finished.folder / "runs").iterdir()
    content = metrics(folder)
    assert list(content["structures"]) == [*train_seget.DEMO_STRUCTURES]
    for name, least in ("membrane", 0.6), ("mitochondrion", 0.6):       # 0.47 without any
        assert content["structures"][name]["miou"] > least
    assert (folder / "demo" / "test_vesicle.mrc").exists()
    assert f"{content['average']['miou']:.4f} |" in finished.stdout.splitlines()[-1]


ORGANELLES = {"mitochondrion": 0.65, "vesicles": 0.55}      # mIoU is 0.45, 0.48 without any


def test_real_organelles_one_network_each(real_data, tmp_path):
    masks = [f"{name}={real_data / 'lucchi_organelles' / name}@0:10,0:512,0:768"
             for name in ORGANELLES]
    run("--volume", f"{real_data / 'lucchi/Train_In'}@0:10,0:512,0:768", "--label", *masks,
        "--label-map", "128:256=1,*=0", "--width", 8, "--downsample", 2, "--patch-size", 128, 128,
        "--batch-size", 4, "--epochs", 6, "--steps-per-epoch", 25, "--lr", "6e-3", "--augment",
        "--out-dir", tmp_path / "run", "--device", "cpu")
    content = metrics(tmp_path / "run")
    for name, least in ORGANELLES.items():
        assert content["structures"][name]["miou"] > least
    assert content["volumes"][0]["ignored"] > 8 * 512 * 768      # only slices 0 and 5 are scored
