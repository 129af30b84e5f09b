"""train_seget.py: SegET and its loss, patches and schedule; several structures in one command."""

import functools

import numpy as np
import pytest
import tifffile
import torch
from torch import nn

import conftest
import emseg
import train_seget
from conftest import InMemory, log_without_seconds, metrics, weights

IGNORE = emseg.IGNORE
run = functools.partial(conftest.run, train_seget)
refused = functools.partial(conftest.refused, train_seget)
TINY = ["--width", "2", "--patch-size", "48", "48", "--batch-size", "4", "--epochs", "2",
        "--steps-per-epoch", "3", "--lr", "3e-3", "--device", "cpu"]


@pytest.fixture(scope="module")
def masks(cells, tmp_path_factory):
    """A folder with a mask of 0 and 1 for the mitochondria and the vesicles of `cells`."""
    folder = tmp_path_factory.mktemp("masks")
    label = tifffile.imread(cells / "label.tif")
    for name, mask in (("mito", label == 3), ("vesicle", label == 4)):
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


def test_networks_have_the_convolutions_of_the_paper():
    with torch.device("meta"):
        network, unet = [train_seget.MODELS[name](1, 1) for name in ("seget", "unet")]
    assert emseg.count_parameters(network) == 4_796_761
    center = [m for part in (network.center, network.dilated, network.stack)
              for m in part.modules() if isinstance(m, nn.Conv2d)]
    assert [m.dilation[0] for m in center] == [1, 1, 1, 2, 4, 8, 1]                 # 7 of them
    assert not any(isinstance(m, nn.MaxPool2d) for m in network.modules())
    assert emseg.count_parameters(unet) == 31_042_369                   # the original's five levels


# -- loss


def batch():
    torch.manual_seed(0)
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
    alone = torch.zeros(1, 100, 100, dtype=torch.int64).index_fill(2, torch.tensor([0]), 1)
    assert train_seget.foreground_weight(alone, 50).max() == 50                     # of 99


def test_jaccard_distance_is_equation_5():
    logits, label = batch()
    kept = (label != IGNORE).numpy()
    y, t = logits[:, 0].double().sigmoid().numpy()[kept], (label.numpy() == 1)[kept]
    overlap = (y * t).sum()
    wanted = 1 - (overlap + 1) / (y.sum() + t.sum() - overlap + 1)
    assert train_seget.jaccard_distance(logits, label).item() == pytest.approx(wanted, rel=1e-5)
    nothing = train_seget.jaccard_distance(torch.full_like(logits, -50.0), label * 0)
    assert nothing.item() == pytest.approx(0, abs=1e-6)


def test_the_regulariser_is_the_sum_of_squared_kernels():
    network = train_seget.SegET(1, 1, 2)
    wanted = sum(float((m.weight.detach().double() ** 2).sum()) for m in network.modules()
                 if isinstance(m, nn.Conv2d))
    assert train_seget.squared_norm(network).item() == pytest.approx(wanted, rel=1e-5)


# -- patches, schedule and settings


def test_the_papers_patches_are_counted():
    """7 x 7 patches of each of 60 slices; 16 of 76 slices are held out (section 3.1)."""
    starts = train_seget.SlidingWindows.starts
    assert starts(2048, 512, 256).tolist() == [0, 256, 512, 768, 1024, 1280, 1536]
    assert starts(1000, 512, 256).tolist() == [0, 256, 488]         # up to the border
    assert len(emseg.parse_slices("every=5", 76)) == 16


def test_a_pass_shows_every_patch_once_and_positive_ones_again():
    shape = 4, 50, 70
    image = np.arange(4 * 50 * 70, dtype=np.int32).reshape(shape)       # voxels say where they are
    label = np.zeros(shape, np.uint8)
    label[1, 30:33, 40:44] = label[3, -1, -1] = 1
    patches = train_seget.SlidingWindows([InMemory(image)], [InMemory(label)], (16, 20), (10, 12),
                                         [[1, 3]], copies=3)
    every = [(z, y, x) for z in (1, 3) for y in (0, 10, 20, 30, 34)
             for x in (0, 12, 24, 36, 48, 50)]
    positive = [(1, y, x) for y in (20, 30) for x in (24, 36)] + [(3, 34, 50)]
    orders = [[], []]
    for i in range(2 * len(patches)):
        patch, truth = patches[i]
        z, y, x = np.unravel_index(int(patch[0, 0]), shape)
        np.testing.assert_array_equal(truth, label[z, y : y + 16, x : x + 20])
        orders[i // len(patches)].append((z, y, x))
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(every + 3 * positive)
    assert orders[0] != orders[1]


def test_the_schedule_is_that_of_keras():
    """(Epochs since the best one, how often the rate was halved) after each epoch."""
    history = [0.5, 0.6, 0.6, 0.4, 0.5, 0.6, 0.7, 0.1, 0.2]     # better in epochs 0, 1 and 6
    assert [train_seget.plateau(history[:n], 2) for n in range(len(history) + 1)] == [
        (0, 0), (0, 0), (0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (0, 2), (1, 2), (2, 3)]


def test_settings_are_those_of_section_3_2_unless_a_flag_overrides_them():
    wanted = {"synapse": (1e-4, 1e-6, 38, 8, 3, 0, 0), "mts": (1e-3, 1e-5, 300, 8, 3, 2000, 0),
              "centriole": (2e-3, 1e-6, 300, 10, 3, 2000, 4),
              "granules": (2e-3, 1e-5, 60, 5, 2, 0, 0), "golgi": (2e-3, 1e-5, 124, 5, 2, 1000, 2)}
    args = train_seget.parse_args(["--volume", "a", "--label", *[f"{n}=b" for n in wanted]])
    assert {name: tuple(own[key] for key in train_seget.PRESET_KEYS)
            for name, own in train_seget.structures_of(args).items()} == wanted
    assert (args.batch_size, args.patch_size, args.stride) == (12, [512, 512], [256, 256])
    assert (args.model, args.val_slices, args.augment) == ("seget", "every=5", False)
    synapse, nucleus = structures_of("--label", "Synapse=1", "Synapse=2", "nucleus=3", "nucleus=4",
                                     "--lr", "0.5").values()
    assert "lr" not in synapse and "lr" not in nucleus                  # it stays as typed
    assert (synapse["epochs"], nucleus["epochs"]) == (38, 100)


# -- several structures


def structures_of(*arguments):
    return train_seget.structures_of(train_seget.parse_args(["--volume", "v1", "v2", *arguments]))


def test_labels_are_sorted_by_structure_and_volume_and_class_ids_become_masks():
    found = structures_of("--label", "a=1", "b=2", "a=3", "b=4", "--test-volume", "t",
                          "--test-label", "b=5")
    assert list(found) == ["a", "b"]
    assert found["a"]["label"] == ["1", "3"] and found["b"]["label"] == ["2", "4"]
    assert found["a"]["test_label"] == [] and found["b"]["test_label"] == ["5"]
    assert found["a"]["classes"] == ["background", "a"]
    assert list(structures_of("--label", "/k=1/m1.tif", "/k=1/m2.tif", "--classes", "bg",
                              "mts")) == ["mts"]
    ids = structures_of("--label", "1", "2", "--classes", "bg", "mts", "golgi", "--label-map",
                        "7=2,8:10=1,3=255,*=0")
    assert {name: own["label_map"] for name, own in ids.items()} == {
        "mts": "7=0,8=1,9=1,3=255,*=0", "golgi": "7=1,8=0,9=0,3=255,*=0"}


@pytest.mark.parametrize("arguments, message", [
    (["--label", "a=1", "a=2", "b=3", "b=4", "--test-volume", "t", "--test-label", "masks"],
     "which structure.*NAME=PATH.*a or b"),
    (["--label", "a=1", "a=2", "--test-volume", "t", "--test-label", "b=5"], "NAME being a"),
    (["--label", "a=1", "a=2", "b=3"], "--label has 1 paths for b.* 2 volumes"),
    (["--label", "1", "2"], "which structure is each label"),
])
def test_labels_of_no_or_the_wrong_structure(arguments, message):
    with pytest.raises(emseg.InputError, match=message):
        structures_of(*arguments)


def test_where_structures_overlap():
    """The truth counts nowhere; of predictions above the threshold the highest score does."""
    masks = [[0, 1, 1, IGNORE, 0, 1], [0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0]]
    merged = train_seget.MergedLabels([InMemory(np.array([[mask]], np.uint8), slices)
                                       for mask, slices in zip(masks, ([0], [0], []))])
    assert merged[0].ravel().tolist() == [0, 1, IGNORE, IGNORE, 2, 1]
    assert merged.slices.tolist() == [0] and merged[0].dtype == np.uint8
    prob = torch.tensor([[0.5, 0.9, 0.9, 0.6, 0.1], [0.5, 0.2, 0.8, 0.7, 0.6]]).view(1, 2, 1, 5)
    assert train_seget.merge_scores(prob).flatten().tolist() == [0, 1, 1, 2, 2]


# -- runs


def test_each_structure_is_a_run_and_metrics_hold_the_papers_table(trained, masks):
    assert {"prediction.tif", "metrics.json", "figure.png"} <= {p.name for p in trained.iterdir()}
    content, found = metrics(trained), []
    for name in ("mito", "vesicle"):
        for row in log_without_seconds(trained / name):
            terms = [float(row[key]) for key in ("loss_bce", "loss_jaccard", "loss_l2")]
            assert float(row["loss"]) == pytest.approx(sum(terms), rel=1e-5)
        pred = tifffile.imread(trained / name / "prediction.tif")
        truth = tifffile.imread(masks / f"{name}.tif")[8:12]
        found.append(np.mean([((pred == k) & (truth == k)).sum()
                              / ((pred == k) | (truth == k)).sum() for k in (0, 1)]))     # eq. 6
        assert content["structures"][name]["miou"] == pytest.approx(found[-1])
    assert content["average"]["miou"] == pytest.approx(np.mean(found))
    assert f"| average   | {np.mean(found):.4f} |" in (trained / "table.md").read_text()


def test_the_run_of_a_structure_is_a_checkpoint(trained, cells, masks, tmp_path):
    run("--checkpoint", trained / "vesicle", "--test-volume", cells / "image.tif@8:12",
        "--test-label", masks / "vesicle.tif@8:12", "--out-dir", tmp_path / "out")
    assert metrics(tmp_path / "out")["mean"] == metrics(trained / "vesicle")["mean"]
    assert not any(path.is_dir() for path in (tmp_path / "out").iterdir())


def test_a_run_of_several_structures_is_a_checkpoint(trained, cells, masks, tmp_path):
    """It predicts as the run did; masks are score maps above 0.5, the merged prediction follows
    from these."""
    run("--checkpoint", trained, "--test-volume", cells / "image.tif@8:12", "--test-label",
        *labels(masks, "vesicle", "mito", crop="8:12"), "--out-dir", tmp_path / "out",
        "--save-probability")
    assert metrics(tmp_path / "out")["structures"] == metrics(trained)["structures"]
    prob = tifffile.imread(tmp_path / "out" / "probability.tif")
    for k, name in enumerate(("mito", "vesicle")):
        mask = tifffile.imread(tmp_path / "out" / name / "prediction.tif")
        np.testing.assert_array_equal(mask, prob[:, k] > 0.5)
        np.testing.assert_array_equal(mask, tifffile.imread(trained / name / "prediction.tif"))
    merged = train_seget.merge_scores(torch.from_numpy(prob))
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out" / "prediction.tif"), merged)


def test_a_run_of_several_structures_starts_another(trained, cells, masks, tmp_path):
    """--init: with a rate of almost 0 the weights of each structure stay."""
    train(cells, masks, tmp_path / "out", "--init", trained, "--lr", "1e-12", "--epochs", "1")
    for name in "mito", "vesicle":
        one, other = [emseg.load_checkpoint(folder / name)["modules"]["network"]
                      for folder in (trained, tmp_path / "out")]
        for key in [key for key in one if key.endswith("weight")]:
            torch.testing.assert_close(one[key], other[key], rtol=0, atol=1e-9)


def test_every_fifth_slice_is_held_out_and_scores(cells, masks, tmp_path):
    """And a single structure needs no subfolder."""
    run("--volume", cells / "image.tif", "--label", f"mito={masks / 'mito.tif'}", "--out-dir",
        tmp_path / "out", *TINY, "--epochs", "1")
    held, (entry,) = [0, 5, 10], metrics(tmp_path / "out")["volumes"]
    train, val = emseg.load_checkpoint(tmp_path / "out")["used"]
    assert train["z"] == [1, 2, 3, 4, 6, 7, 8, 9, 11] and val["z"] == held
    pred, mask = [tifffile.imread(path) for path in (tmp_path / "out/prediction.tif",
                                                     masks / "mito.tif")]
    assert entry["ignored"] == 9 * 112 * 128
    assert entry["per_class"]["mito"]["tp"] == ((pred == 1) & (mask == 1))[held].sum()


def test_the_rate_is_halved_and_the_training_ended(cells, masks, tmp_path):
    """A rate too small to learn, and no BatchNorm: the first epoch stays the best one."""
    run("--volume", cells / "image.tif@0:8", "--label", *labels(masks, "mito"), "--out-dir",
        tmp_path / "out", *TINY, "--epochs", "30", "--lr", "1e-12", "--patience", "5",
        "--reduce-patience", "2", "--decay", "0.5", "--steps-per-epoch", "1", "--model", "unet5")
    rows = log_without_seconds(tmp_path / "out")
    assert len(rows) == 6
    rates = [float(row["lr"]) * (1 + 0.5 * step) / 1e-12 for step, row in enumerate(rows)]
    np.testing.assert_allclose(rates, [1, 1, 1, 0.5, 0.5, 0.25], rtol=1e-6)
    best = torch.load(tmp_path / "out" / "best.pt", weights_only=True)
    assert best["step"] == 1 and best["best"] == float(rows[0]["val_miou"])


def test_flags_reach_the_loss(trained, cells, masks, tmp_path):
    train(cells, masks, tmp_path / "out", "--weight-cap", "50", "--l2", "0.1", "--epochs", "1",
          structures=("mito",))
    plain, flagged = [{key: float(value) for key, value in log_without_seconds(folder)[0].items()}
                      for folder in (trained / "mito", tmp_path / "out")]
    assert flagged["loss_bce"] > 1.2 * plain["loss_bce"]
    assert flagged["loss_l2"] / plain["loss_l2"] == pytest.approx(1e4, rel=0.1)


def test_interrupted_and_resumed_is_bit_identical(trained, cells, masks, tmp_path, monkeypatch):
    """Ctrl-C in the first epoch of the second structure."""
    conftest.interrupt_after(monkeypatch, 8)
    with pytest.raises(SystemExit) as stopped:
        train(cells, masks, tmp_path / "out")
    assert stopped.value.code == 130
    monkeypatch.undo()
    run("--resume", "--out-dir", tmp_path / "out")
    for name in "mito", "vesicle":
        assert torch.equal(*[weights(folder / name / "last.pt")
                             for folder in (tmp_path / "out", trained)])
        assert log_without_seconds(tmp_path / "out" / name) == log_without_seconds(trained / name)
    assert metrics(tmp_path / "out")["mean"] == metrics(trained)["mean"]


@pytest.mark.parametrize("change, message", [
    (["--patch-size", "40", "48", "--model", "unet"], "nearest to 40: 32 or 48"),
    (["--label-map", "1=0,*=0"], "no slice to train on shows the class mito"),
    (["--val-slices", "7"], "no validation slice shows rare"),
])
def test_bad_data_of_any_structure_is_refused_before_one_trains(cells, masks, tmp_path, capsys,
                                                                change, message):
    mask = tifffile.imread(masks / "mito.tif")[:8]
    mask[7] = 0
    tifffile.imwrite(tmp_path / "mask.tif", mask)
    found = refused(capsys, "--volume", cells / "image.tif@0:8", "--label",
                    *labels(masks, "mito"), f"rare={tmp_path / 'mask.tif'}", "--out-dir",
                    tmp_path / "out", *TINY, *change)
    assert message in found and not (tmp_path / "out").exists()
