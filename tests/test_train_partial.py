"""train_partial.py: its equations, merged labels, and whole runs on small and real data."""

import functools
import json
import os
import re
import subprocess
import sys

import mrcfile
import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F

import conftest
import emseg
import train_partial
from conftest import BRIEF, CORNER, ROOT, log_without_seconds, metrics, weights

IGNORE = emseg.IGNORE
run = functools.partial(conftest.run, train_partial)
refused = functools.partial(conftest.refused, train_partial)
TINY = ["--width", "4", "--patch-size", "48", "48", "--batch-size", "4", "--epochs", "2",
        "--steps-per-epoch", "3", "--lr", "3e-3", "--device", "cpu"]
CLASSES = ["--classes", *emseg.PHANTOM_CLASSES]


def training_data(cells):
    return ["--volume", cells / "image.tif@0:3", "--label", cells / "label.tif@0:3", "--partial",
            cells / "image.tif@3:7", cells / "label.tif@3:7", "3=0,4=0", *CLASSES]


def train(cells, out, *more):
    run(*training_data(cells), "--test-volume", cells / "image.tif@8:12", "--test-label",
        cells / "label.tif@8:12", "--out-dir", out, *TINY, *more)


@pytest.fixture(scope="module")
def trained(cells, tmp_path_factory):
    """A finished tiny run: mixed training."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    train(cells, folder)
    return folder


@pytest.fixture(scope="module")
def compared(cells, tmp_path_factory):
    """A finished tiny run of baseline and mixed training, with validation."""
    folder = tmp_path_factory.mktemp("runs") / "compared"
    train(cells, folder, "--compare", "--val-volume", cells / "image.tif@7:8", "--val-label",
          cells / "label.tif@7:8")
    return folder


# -- equations 1 to 4


def slow_loss(logits, label, merge):
    """Eqs. 2 to 4 in float64, voxel by voxel, from probabilities; 0 where nobody annotated."""
    logits = logits.double().numpy()
    if logits.shape[1] == 1:
        logits = np.concatenate([np.zeros_like(logits), logits], 1)
    prob = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    loss = np.zeros(label.shape)
    for b, y, x in np.ndindex(label.shape):
        if label[b, y, x] != IGNORE:
            members = [k for k in range(prob.shape[1]) if merge[b, k] == label[b, y, x]]
            loss[b, y, x] = -np.log(sum(prob[b, k, y, x] for k in members))
    return loss


MERGES = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, 1, 1], [0, 0, 2, 0, 4], [3, 1, 1, 3, 1]])


def batch(seed=0, classes=5):
    """Logits (4, 5, 6, 7) and labels, each crop in its own label set, a tenth of them IGNORE."""
    torch.manual_seed(seed)
    logits = 3 * torch.randn(4, classes, 6, 7)
    full = torch.randint(0, classes, (4, 6, 7))
    label = MERGES.gather(1, full.flatten(1)).view_as(full)
    return logits, label.masked_fill(torch.rand(4, 6, 7) < 0.1, IGNORE)


def test_the_loss_equals_a_float64_loop_over_voxels():
    logits, label = batch()
    found = train_partial.merged_cross_entropy(logits, label, MERGES)
    np.testing.assert_allclose(found, slow_loss(logits, label, MERGES), atol=1e-5)
    assert (found[label == IGNORE] == 0).all() and (label == IGNORE).any()


def test_without_merges_it_is_cross_entropy():
    logits, label = batch()
    label = torch.randint(0, 5, label.shape)
    identity = torch.arange(5).expand(4, 5)
    torch.testing.assert_close(train_partial.merged_cross_entropy(logits, label, identity),
                               F.cross_entropy(logits, label, reduction="none"))


def test_two_classes_have_one_channel():
    logits, label = torch.randn(2, 1, 5, 5), torch.randint(0, 2, (2, 5, 5))
    found = train_partial.merged_cross_entropy(logits, label, torch.tensor([[0, 1], [0, 1]]))
    wanted = F.binary_cross_entropy_with_logits(logits[:, 0], label.float(), reduction="none")
    torch.testing.assert_close(found, wanted)


def test_the_gradient_is_that_of_the_equations():
    """d/dz_k of -log p^P is p_k minus the share of class k among the merged classes."""
    logits, label = batch(1)
    logits = logits.double().requires_grad_()
    train_partial.merged_cross_entropy(logits, label, MERGES).sum().backward()
    prob = logits.detach().softmax(1)
    members = (MERGES[:, :, None, None] == label[:, None]) | (label[:, None] == IGNORE)
    share = prob * members / (prob * members).sum(1, keepdim=True)
    torch.testing.assert_close(logits.grad, prob - share, atol=1e-6, rtol=1e-5)
    ignored = (label == IGNORE)[:, None].expand_as(logits)
    assert (logits.grad[ignored] == 0).all()


@pytest.mark.parametrize("scale", [1e3, 1e4])
def test_the_loss_is_finite_where_probabilities_vanish(scale):
    """p of the merged classes underflows in float32; the loss is the distance of the logits."""
    logits = torch.tensor([scale, 0.0, -5.0, 0.0, 1.0]).view(1, 5, 1, 1).requires_grad_()
    label = torch.tensor([[[1]]])
    loss = train_partial.merged_cross_entropy(logits, label, MERGES[1:2])
    assert loss.item() == pytest.approx(scale - np.log(np.exp(0) + np.exp(0) + np.exp(1)), rel=1e-6)
    loss.sum().backward()
    assert torch.isfinite(logits.grad).all() and logits.grad[0, 0] == pytest.approx(1)


def test_the_terms_of_equation_1_are_parts_of_one_mean():
    logits, label = batch(2)
    partial = torch.tensor([False, True, True, False])
    loss_full, loss_partial = train_partial.loss_terms(logits, label, MERGES, partial)
    slow, pixels = slow_loss(logits, label, MERGES), (label != IGNORE).sum().item()
    assert loss_full.item() == pytest.approx(slow[[0, 3]].sum() / pixels, rel=1e-5)
    assert loss_partial.item() == pytest.approx(slow[[1, 2]].sum() / pixels, rel=1e-5)


def test_a_batch_without_annotation_costs_nothing():
    label = torch.full((4, 6, 7), IGNORE)
    terms = train_partial.loss_terms(batch()[0], label, MERGES, torch.ones(4, dtype=torch.bool))
    assert [term.item() for term in terms] == [0, 0]


# -- merged label sets


def test_merges_as_the_paper_writes_them():
    assert emseg.parse_merge("3=1,4=1", 5) == [0, 1, 2, 1, 1]
    assert emseg.parse_merge(" 1=0 ", 3) == [0, 0, 2]
    assert emseg.parse_merge("0=2", 3) == [2, 1, 2]


@pytest.mark.parametrize("text, message", [
    ("", "not understood"), ("3", "not understood"), ("3=1,", "not understood"),
    ("*=0", "not understood"), ("a=1", "not understood"), ("-1=0", "not understood"),
    ("3=5", "class 5 is outside the 5 classes 0 to 4"), ("7=1", "class 7 is outside"),
    ("3=255", "class 255 is outside"), ("3=1,3=2", "class 3 is merged twice"),
    ("3=4,4=3", "class 3 goes to 4, which is merged itself"),
    ("3=1,1=0", "class 3 goes to 1, which is merged itself; name a class that is left"),
    ("1=2,2=1", "which is merged itself"), ("3=3", "merges nothing"),
    ("1=0,2=0,3=0,4=0", "leaves one label"),
])
def test_bad_merges(text, message):
    with pytest.raises(emseg.InputError, match=re.escape(message)):
        emseg.parse_merge(text, 5)


def merged(tmp_path, raw, merge, classes=5, **options):
    """A label file read with a merge."""
    raw = np.asarray(raw, np.uint8).reshape(1, 1, -1)
    np.save(tmp_path / "label.npy", raw)
    np.save(tmp_path / "image.npy", np.zeros_like(raw))
    volume = emseg.open_volume(tmp_path / "image.npy")
    (label,), _ = emseg.open_labels([tmp_path / "label.npy"], [volume], classes,
                                    merge=emseg.parse_merge(merge, classes), **options)
    return label


def test_a_full_label_file_can_stand_in_for_a_partial_one(tmp_path):
    label = merged(tmp_path, [0, 1, 2, 3, 4, 3], "3=1,4=1")
    assert label[0].ravel().tolist() == [0, 1, 2, 1, 1, 1]
    assert label.counts.tolist() == [[1, 4, 1, 0, 0]]
    again = merged(tmp_path, [0, 1, 2, 1, 1, 1], "3=1,4=1")         # merged already: the same
    assert again[0].ravel().tolist() == label[0].ravel().tolist()


def test_merges_follow_the_label_map_and_leave_ignored_voxels(tmp_path):
    label = merged(tmp_path, [10, 20, 30, 99], "2=0", 3, ignore_label=99,
                   label_map=emseg.parse_label_map("10=0,20=1,30=2"))
    assert label[0].ravel().tolist() == [0, 1, 0, IGNORE]


@pytest.mark.parametrize("raw, merge, wanted", [
    ([0, 255, 255], "1=0", [0, 2, 2]), ([0, 255, 0], "2=0", [0, 1, 0]),
    ([0, 2, 1], "1=0", [0, 2, 0])])
def test_a_mask_is_the_class_that_is_left(tmp_path, raw, merge, wanted):
    """Lung-only and heart-only masks of 0 and 255 need no label map."""
    assert merged(tmp_path, raw, merge, 3)[0].ravel().tolist() == wanted


@pytest.mark.parametrize("raw, merge, message", [
    ([0, 1, 7], "3=1", "label values 0, 1, 7: wanted class ids 0 to 4"),
    ([0, 1, 1], "1=0,2=0,3=0", "of the merged labels it should show 4"),
    ([0, 3, 3], "3=0,4=0", "no foreground")])
def test_labels_that_fit_no_label_set(tmp_path, raw, merge, message):
    with pytest.raises(emseg.InputError, match=re.escape(message)):
        merged(tmp_path, raw, merge)


def test_every_class_must_be_told_apart_somewhere():
    names = ["background", "lung", "heart"]
    emseg.check_merges([[0, 1, 0], [0, 0, 2]], names)               # lung here, heart there
    emseg.check_merges([[0, 1, 2], [0, 0, 0]], names)
    with pytest.raises(emseg.InputError, match="heart is merged into another one in every volume"):
        emseg.check_merges([[0, 1, 0], [0, 1, 1]], names)
    with pytest.raises(emseg.InputError, match="lung and heart are the same label in every volume"):
        emseg.check_merges([[0, 1, 1], [0, 2, 2]], names)


# -- the network and the defaults


def test_the_network_has_the_papers_size_and_shape():
    network = train_partial.MODELS["unet5"](1, 5)
    assert emseg.count_parameters(network) == 7_759_653
    assert set(emseg.NETWORKS) <= set(train_partial.MODELS)
    kinds = {type(module).__name__ for module in network.modules()}
    assert not any("Norm" in kind for kind in kinds)
    assert network(torch.zeros(1, 1, 32, 48)).shape == (1, 5, 32, 48)


def test_the_defaults_are_the_papers():
    args = train_partial.parse_args(["--volume", "a", "--label", "b"])
    assert (args.model, args.epochs, args.width) == ("unet5", 200, None)
    assert train_partial.AUGMENTATION == {"rotation": 180, "scale": 0.2}
    assert args.partial == [] and not args.compare and args.resize is None


def test_partial_can_be_given_for_several_data_sets():
    args = train_partial.parse_args(["--volume", "a", "--label", "b", "--partial", "c", "d", "2=1",
                                     "--partial", "e", "f", "1=0"])
    assert args.partial == [["c", "d", "2=1"], ["e", "f", "1=0"]]


# -- table 1


def test_undefined_validation_scores_are_undefined_in_table_1(cells, tmp_path, monkeypatch, capsys):
    """A validation label without foreground, none of which is predicted: no Dice in any epoch."""
    monkeypatch.setattr(emseg.Run, "validate", lambda self, predict: {
        "val_dice": None, **{f"val_dice_{name}": None for name in self.data.classes[1:]}})
    train(cells, tmp_path / "run", "--compare", "--val-volume", cells / "image.tif@7:8",
          "--val-label", cells / "label.tif@7:8")
    wanted = "| Validation set: Baseline |" + " undefined |" * 5
    assert wanted in capsys.readouterr().out


def test_table_1_has_the_papers_rows():
    test = {"baseline": [0.813, None, 0.639], "mixed": [0.843, 0.5, 0.706]}
    lines = train_partial.table_1(["membrane", "insulin"], {"Testing set": test}).splitlines()
    assert lines[0] == "| DSC | membrane | insulin | average |"
    assert lines[2:] == ["| Testing set: Baseline | 0.813 | undefined | 0.639 |",
                         "| Testing set: Mixed labels | 0.843 | 0.500 | 0.706 |",
                         "| Testing set: Difference in percentage | +3.7% | undefined | +10.5% |"]


# -- whole runs


def test_a_run_writes_what_the_readme_says(trained):
    assert {"config.json", "log.csv", "best.pt", "last.pt", "prediction.tif", "metrics.json",
            "figure.png", "curves.png", "surfaces.png"} == {path.name for path in trained.iterdir()}
    result = metrics(trained)
    assert result["model"] == "unet5" and list(result["volumes"][0]["per_class"]) == (
        emseg.PHANTOM_CLASSES[1:])
    rows = log_without_seconds(trained)
    assert all(float(row["loss_partial"]) > 0 and float(row["loss"]) == pytest.approx(
        float(row["loss_full"]) + float(row["loss_partial"]), rel=1e-5) for row in rows)


def test_a_comparison_scores_both_and_prints_table_1(compared, capsys):
    result, rows = metrics(compared), log_without_seconds(compared)
    assert list(result["stages"]) == ["baseline", "mixed"]
    assert result["mean"] == result["stages"]["mixed"]
    assert (compared / "stages" / "image_baseline.tif").exists()
    assert [row["stage"] for row in rows] == ["baseline"] * 2 + ["mixed"] * 2
    assert all(float(row["loss_partial"]) == 0 for row in rows[:2])
    assert all(float(row["loss_partial"]) > 0 for row in rows[2:])


def test_the_baseline_of_a_comparison_is_the_command_without_partial(cells, tmp_path):
    data = ["--volume", cells / "image.tif@0:3", "--label", cells / "label.tif@0:3", *CLASSES,
            "--test-volume", cells / "image.tif@8:12", "--test-label", cells / "label.tif@8:12"]
    run(*data, "--out-dir", tmp_path / "alone", *TINY)
    run(*data, "--partial", cells / "image.tif@3:7", cells / "label.tif@3:7", "3=0,4=0",
        "--compare", "--out-dir", tmp_path / "both", *TINY)
    both = torch.load(tmp_path / "both/best.pt", weights_only=True)["modules"]
    alone = torch.load(tmp_path / "alone/best.pt", weights_only=True)["modules"]
    assert all(torch.equal(both["network_baseline"][key], value)
               for key, value in alone["network"].items())
    assert metrics(tmp_path / "both")["stages"]["baseline"] == metrics(tmp_path / "alone")["mean"]


def write_cell(folder, name, shape, dtype, seed, merge=()):
    """A synthetic cell as MRC files; returns the paths of image and label."""
    image, label = emseg.phantom_cell(shape, seed=seed)
    for source, target in merge:
        label[label == source] = target
    image = (image.astype(int) - (128 if dtype == np.int8 else 0)).astype(dtype)
    for part, array in (("", image), ("_label", label.astype(np.int8))):
        with mrcfile.new(folder / f"{name}{part}.mrc") as mrc:
            mrc.set_data(array)
            mrc.voxel_size = (250, 250, 300)                            # x, y, z in angstrom
    return folder / f"{name}.mrc", folder / f"{name}_label.mrc"


@pytest.fixture(scope="module")
def tomograms(tmp_path_factory):
    """Whole cells of different sizes: full (int8), partial (uint16), test (int8)."""
    folder = tmp_path_factory.mktemp("tomograms")
    return {"full": write_cell(folder, "full", (40, 64, 70), np.int8, 1),
            "partial": write_cell(folder, "partial", (52, 72, 66), np.uint16, 2, [(3, 1), (4, 1)]),
            "test": write_cell(folder, "test", (36, 68, 61), np.int8, 3)}


def test_tomograms_of_different_sizes(tomograms, tmp_path):
    run("--volume", tomograms["full"][0], "--label", tomograms["full"][1], "--partial",
        *tomograms["partial"], "3=1,4=1", "--test-volume", tomograms["test"][0], "--test-label",
        tomograms["test"][1], *CLASSES, "--out-dir", tmp_path / "run", *TINY)
    with mrcfile.open(tmp_path / "run" / "prediction.mrc") as prediction:
        assert prediction.data.shape == (36, 68, 61) and prediction.data.dtype == np.int8
        assert prediction.voxel_size.tolist() == pytest.approx((250, 250, 300))


def test_resized_volumes_are_whole_slices_and_predictions_keep_their_shape(tomograms, tmp_path,
                                                                           monkeypatch):
    asked, original = [], emseg.Patches.__init__

    def noting(self, images, labels, patch_size, slices, **options):
        original(self, images, labels, patch_size, slices, **options)
        asked.append(([image.shape for image in images], [len(zs) for zs in slices]))

    monkeypatch.setattr(emseg.Patches, "__init__", noting)
    run("--volume", tomograms["full"][0], "--label", tomograms["full"][1], "--partial",
        *tomograms["partial"], "3=1,4=1", "--test-volume", tomograms["test"][0], "--test-label",
        tomograms["test"][1], *CLASSES, "--resize", 50, 48, 48, "--val-slices", "n=4",
        "--out-dir", tmp_path / "run", *TINY, "--save-probability")
    assert asked == [([(50, 48, 48)] * 2, [44, 50])]        # 4 of 40 slices are 6 of 50
    prediction = emseg.open_volume(tmp_path / "run" / "prediction.mrc")
    assert prediction.shape == (36, 68, 61)
    assert prediction.voxel_size == pytest.approx((30, 25, 25))
    probability = tifffile.imread(tmp_path / "run" / "probability.tif")
    assert probability.shape == (36, 5, 68, 61)
    np.testing.assert_array_equal(probability.argmax(1), prediction[:])


def test_several_label_sets_and_no_full_one_tell_all_classes_apart(cells, tmp_path):
    """The lung and heart of section 1: each is drawn in a data set of its own, as a mask."""
    label = emseg.open_volume(cells / "label.tif")[:]
    for name, k in (("membrane", emseg.MEMBRANE), ("mitochondrion", emseg.MITOCHONDRION)):
        tifffile.imwrite(tmp_path / f"{name}.tif", (label == k).astype(np.uint8) * 255)
    truth = np.select([label == emseg.MEMBRANE, label == emseg.MITOCHONDRION], [1, 2])
    tifffile.imwrite(tmp_path / "truth.tif", truth.astype(np.uint8))
    run("--partial", cells / "image.tif@0:5", tmp_path / "membrane.tif@0:5", "2=0", "--partial",
        cells / "image.tif@5:10", tmp_path / "mitochondrion.tif@5:10", "1=0", "--classes",
        "background", "membrane", "mitochondrion", "--test-volume", cells / "image.tif@10:12",
        "--test-label", tmp_path / "truth.tif@10:12", "--out-dir", tmp_path / "run", "--model",
        "unet", "--width", 8, "--patch-size", 64, 64, "--batch-size", 4, "--epochs", 4,
        "--steps-per-epoch", 60, "--lr", "5e-3", "--device", "cpu")
    scores = metrics(tmp_path / "run")["mean"]["per_class"]
    assert scores["membrane"]["dice"] > 0.5 and scores["mitochondrion"]["dice"] > 0.5
    rows = log_without_seconds(tmp_path / "run")
    assert all(float(row["loss_full"]) == 0 for row in rows)


def test_the_baseline_has_its_own_epochs(cells, tmp_path):
    """An epoch is a pass over the annotated slices: 3 of the baseline, 7 of mixed training."""
    data = ["--volume", cells / "image.tif@0:3", "--label", cells / "label.tif@0:3", *CLASSES,
            "--test-volume", cells / "image.tif@8:9", "--test-label", cells / "label.tif@8:9",
            "--width", 2, "--patch-size", 48, 48, "--batch-size", 2, "--epochs", 2, "--device",
            "cpu"]
    run(*data, "--out-dir", tmp_path / "alone")
    run(*data, "--partial", cells / "image.tif@3:7", cells / "label.tif@3:7", "3=0,4=0",
        "--compare", "--out-dir", tmp_path / "both")
    rows = log_without_seconds(tmp_path / "both")
    assert [(row["stage"], row["epoch"], row["step"]) for row in rows] == [
        ("baseline", "0", "2"), ("baseline", "1", "4"), ("mixed", "2", "8"), ("mixed", "3", "12")]
    assert float(rows[-1]["lr"]) == pytest.approx(1e-3 / 8)             # falls within each stage
    assert float(rows[1]["lr"]) == pytest.approx(1e-3 / 4)
    alone = log_without_seconds(tmp_path / "alone")
    assert [row["loss"] for row in alone] == [row["loss"] for row in rows[:2]]
    assert metrics(tmp_path / "both")["stages"]["baseline"] == metrics(tmp_path / "alone")["mean"]


def test_without_test_volumes_partial_annotations_are_completed(cells, tmp_path):
    run(*training_data(cells), "--out-dir", tmp_path / "run", *TINY, "--epochs", 1)
    volumes = metrics(tmp_path / "run")["volumes"]
    shapes = [emseg.open_volume(volume["prediction"]).shape for volume in volumes]
    assert shapes == [(3, 112, 128), (4, 112, 128)]


def test_partially_labelled_slices_are_not_scored(cells, tmp_path):
    run(*training_data(cells), "--test-volume", cells / "image.tif", "--test-label",
        cells / "label.tif", "--out-dir", tmp_path / "run", *TINY, "--epochs", 1)
    assert metrics(tmp_path / "run")["volumes"][0]["ignored"] == 7 * 112 * 128


def test_a_checkpoint_predicts_as_its_run_did(compared, cells, tmp_path):
    run("--checkpoint", compared / "best.pt", "--test-volume", cells / "image.tif@8:12",
        "--test-label", cells / "label.tif@8:12", "--out-dir", tmp_path / "again", "--device",
        "cpu")
    assert metrics(tmp_path / "again")["mean"] == metrics(compared)["mean"]
    assert not (tmp_path / "again" / "stages").exists()
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["args"]["partial"] == []              # of the run that was trained, not of this


def test_the_best_epoch_of_each_stage_is_kept(compared):
    rows, content = log_without_seconds(compared), torch.load(compared / "best.pt",
                                                              weights_only=True)
    best = max(rows[2:], key=lambda row: float(row["val_dice"]))
    assert content["step"] == int(best["step"])
    assert {"val_dice", "val_iou", "val_dice_membrane", "val_dice_vesicle"} <= set(rows[0])


def test_each_network_is_that_of_its_best_epoch(cells, tmp_path, monkeypatch):
    """Validation prefers the first epoch of the baseline and the second of mixed training."""
    scores, after = iter([0.9, 0.1, 0.2, 0.8]), []

    def validate(self, predict):
        after.append({name: {key: value.clone() for key, value in module.state_dict().items()}
                      for name, module in self.modules.items() if name.startswith("network")})
        return {"val_dice": next(scores)}

    monkeypatch.setattr(emseg.Run, "validate", validate)
    train(cells, tmp_path / "run", "--compare")
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)["modules"]
    for name, epoch in (("network_baseline", 0), ("network", 3)):
        assert all(torch.equal(best[name][key], value) for key, value in after[epoch][name].items())
    assert not all(torch.equal(value, after[1]["network_baseline"][key])
                   for key, value in after[0]["network_baseline"].items())


@pytest.mark.parametrize("steps", [2, 6, 9])
def test_interrupted_and_resumed_is_bit_identical(compared, cells, tmp_path, monkeypatch, steps):
    conftest.interrupt_after(monkeypatch, steps)
    with pytest.raises(SystemExit) as stopped:
        train(cells, tmp_path / "run", "--compare", "--val-volume", cells / "image.tif@7:8",
              "--val-label", cells / "label.tif@7:8")
    assert stopped.value.code == 130
    monkeypatch.undo()
    run("--resume", "--out-dir", tmp_path / "run")
    assert torch.equal(weights(compared / "best.pt"), weights(tmp_path / "run" / "best.pt"))
    assert log_without_seconds(compared) == log_without_seconds(tmp_path / "run")
    assert metrics(tmp_path / "run")["stages"] == metrics(compared)["stages"]


def test_workers_change_nothing(trained, cells, tmp_path):
    train(cells, tmp_path / "workers", "--workers", 2)
    assert torch.equal(weights(trained / "last.pt"), weights(tmp_path / "workers" / "last.pt"))


@pytest.mark.parametrize("model", sorted(train_partial.MODELS))
def test_every_network_trains(cells, tmp_path, model):
    train(cells, tmp_path / "run", *BRIEF, "--model", model, "--width", conftest.narrow(model, 4),
          "--test-volume", f"{cells}/image.tif@8:10,{CORNER}", "--test-label",
          f"{cells}/label.tif@8:10,{CORNER}")
    assert metrics(tmp_path / "run")["model"] == model


LIMITED = """
import re, sys, train_partial
train_partial.main(train_partial.parse_args(sys.argv[1:]))
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
print("peak GiB", peak / 2**20)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory needs /proc")
@pytest.mark.parametrize("depth, resize", [(512, None), (160, [64, 256, 256])])
def test_a_volume_of_512_cubed_is_predicted_in_bounded_memory(trained, tmp_path, depth, resize):
    """134 million voxels; whole, the probabilities of five classes alone would be 2.5 GiB."""
    with mrcfile.new_mmap(tmp_path / "big.mrc", (depth, 512, 512), mrc_mode=0) as mrc:
        mrc.data[depth // 2] = np.random.default_rng(0).integers(-128, 128, (512, 512))
        mrc.voxel_size = 250
    content = torch.load(trained / "best.pt", weights_only=True)
    content["args"]["resize"] = resize
    torch.save(content, tmp_path / "best.pt")
    command = [sys.executable, "-c", LIMITED, "--checkpoint", tmp_path / "best.pt", "--test-volume",
               tmp_path / "big.mrc", "--out-dir", tmp_path / "out", "--device", "cpu"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("peak GiB")[1]) < 1.5
    prediction = emseg.open_volume(tmp_path / "out" / "prediction.mrc")
    assert prediction.shape == (depth, 512, 512)
    assert prediction.voxel_size == pytest.approx((25, 25, 25))


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, message", [
    (["--partial", "missing.tif", "missing.tif", "3=1"], "missing.tif: no such file"),
    (["--partial", "a", "b"], "expected 3 arguments"),
    (["--partial", "{image}@3:7", "{label}@3:6", "3=1"], "labels of shape (3, 112, 128)"),
    (["--partial", "{image}@3:7", "{label}@3:7", "5=1"], "class 5 is outside"),
    (["--partial", "{image}@3:7", "{label}@3:7", "3=1,1=0"], "which is merged itself"),
    (["--partial", "{image}@3:7", "{label}@3:7", "0=0"], "merges nothing"),
    (["--partial", "{image}@3:7", "{image}@3:7", "3=1"], "wanted class ids 0 to 4"),
    (["--unlabeled-volume", "{image}"], "goes to --partial"),
    (["--resize", "4", "64", "64", "--downsample", "2"], "give one of them"),
    (["--resize", "0", "64", "64"], "0 is not above 0"),
    (["--resize", "4", "32", "32"], "do not fit into 4 x 32 x 32"),
    (["--patch-size", "40", "48"], "nearest to 40: 32 or 48"),
    (["--patch-size", "512", "512"], "do not fit"),
    (["--val-slices", "0,1,2"], "no slice to train on shows the class mitochondrion"),
    (["--classes", "a", "b", "c", "d", "b"], "--classes names b twice"),
    (["--demo"], "leave --label out"),
])
def test_bad_input_is_one_line_and_leaves_nothing(cells, tmp_path, capsys, change, message):
    out = tmp_path / "out"
    change = [text.format(image=cells / "image.tif", label=cells / "label.tif") for text in change]
    assert message in refused(capsys, *training_data(cells), "--out-dir", out, *TINY, *change)
    assert not out.exists()


@pytest.mark.parametrize("left_out, message", [
    ({"--partial"}, "--compare needs --volume for the baseline, and --partial"),
    ({"--volume", "--label"}, "--compare needs --volume"),
    ({"--volume", "--label", "--compare", "--classes"}, "name them with --classes"),
    ({"--volume", "--label", "--compare"}, "mitochondrion is merged into another one in every"),
    ({"--volume", "--label", "--partial"}, "give --volume and --label"),
])
def test_what_must_be_given_together(cells, tmp_path, capsys, left_out, message):
    arguments = {"--volume": [cells / "image.tif@0:3"], "--label": [cells / "label.tif@0:3"],
                 "--partial": [cells / "image.tif@3:7", cells / "label.tif@3:7", "3=0,4=0"],
                 "--classes": emseg.PHANTOM_CLASSES, "--compare": []}
    given = [part for flag, values in arguments.items() if flag not in left_out
             for part in (flag, *values)]
    assert message in refused(capsys, *given, "--out-dir", tmp_path / "out", *TINY)


def test_slices_of_volumes_that_there_are_not_are_refused(cells, tmp_path, capsys):
    line = refused(capsys, "--partial", cells / "image.tif", cells / "label.tif", "3=0", *CLASSES,
                   "--val-slices", "0", "--out-dir", tmp_path / "out", *TINY)
    assert "choose slices of --volume" in line


def test_a_comparison_without_labels_is_refused_before_it_trains(cells, tmp_path, capsys):
    line = refused(capsys, *training_data(cells), "--compare", "--test-volume",
                   cells / "image.tif@8:12", "--out-dir", tmp_path / "out", *TINY)
    assert "no labels to score with" in line and not (tmp_path / "out").exists()


def test_a_checkpoint_takes_no_partial_volumes(trained, cells, tmp_path, capsys):
    line = refused(capsys, "--checkpoint", trained / "best.pt", "--test-volume",
                   cells / "image.tif", "--partial", "a", "b", "3=1", "--out-dir", tmp_path / "out")
    assert "trains nothing" in line


def test_how_partial_volumes_are_read_is_said(cells, tmp_path, capsys):
    run(*training_data(cells), "--test-volume", cells / "image.tif@8:9", "--out-dir",
        tmp_path / "run", *TINY, "--epochs", 1)
    said = "image.tif@3:7 shows background (with mitochondrion and vesicle), membrane, nucleus"
    assert said in capsys.readouterr().out


def test_the_demo_takes_no_other_volumes(capsys):
    assert "leave --partial out" in refused(capsys, "--demo", "--partial", "a", "b", "3=1")


def test_overwrite_never_deletes_a_partial_label(cells, tmp_path, capsys):
    out = tmp_path / "out"
    train(cells, out)
    line = refused(capsys, "--volume", cells / "image.tif@0:3", "--label", cells / "label.tif@0:3",
                   "--partial", cells / "image.tif@8:12", out / "prediction.tif", "3=0", *CLASSES,
                   "--out-dir", out, "--overwrite", *TINY)
    assert "would delete" in line and (out / "prediction.tif").exists()


def test_resume_refuses_other_partial_volumes(trained, capsys):
    assert "--partial was" in refused(capsys, "--resume", "--out-dir", trained, "--partial", "a",
                                      "b", "3=1")


# -- README, demo, real data -----------------------------------------------------------------------


def test_every_readme_command_parses(trained, monkeypatch):
    assert conftest.parse_readme_commands(train_partial, trained / "best.pt", monkeypatch) >= 4


@pytest.mark.background(ROOT / "train_partial.py", "--demo")
def test_the_demo_prints_the_papers_table(finished):
    assert finished.returncode == 0, finished.stderr
    (folder,) = (finished.folder / "runs").iterdir()
    stages = metrics(folder)["stages"]
    assert stages["mixed"]["dice"] > stages["baseline"]["dice"]
    table = [line for line in finished.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 5 and f"{stages['mixed']['dice']:.3f} |" in table[3]


VNC_MAP = "0=1,32=1,64=1,96=1,128=1,159=2,191=3,223=4,255=0"


def test_real_neuropil_with_partial_labels(real_data, tmp_path):
    raw, labels = real_data / "vnc/raw", real_data / "vnc/labels"
    run("--volume", f"{raw}@0:3", "--label", f"{labels}@0:3", "--partial", f"{raw}@3:14",
        f"{labels}@3:14", "3=0,4=0", "--test-volume", f"{raw}@15:17,0:512,0:512", "--test-label",
        f"{labels}@15:17,0:512,0:512", "--label-map", VNC_MAP, "--classes", "intracellular",
        "membrane", "glia", "mitochondrion", "synapse", "--model", "unet", "--width", 8,
        "--patch-size", 128, 128, "--batch-size", 8, "--epochs", 2, "--steps-per-epoch", 60,
        "--downsample", 2, "--lr", "5e-3", "--out-dir", tmp_path / "run", "--device", "cpu")
    scores = metrics(tmp_path / "run")["mean"]["per_class"]
    assert scores["membrane"]["dice"] > 0.5 and scores["mitochondrion"]["dice"] > 0.2
