"""train_partial.py: its equations, merged labels, and whole runs on small and real data."""

import functools

import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F

import conftest
import emseg
import train_partial
from conftest import log_without_seconds, metrics, weights

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


COMPARISON = ["--compare", "--val-slices", "2"]


@pytest.fixture(scope="module")
def compared(cells, tmp_path_factory):
    """A finished tiny run of baseline and mixed training, with validation."""
    folder = tmp_path_factory.mktemp("runs") / "compared"
    train(cells, folder, *COMPARISON)
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


# -- merged label sets


def test_merges_as_the_paper_writes_them():
    assert train_partial.parse_merge("3=1,4=1", 5) == [0, 1, 2, 1, 1]
    assert train_partial.parse_merge(" 0=2 ", 3) == [2, 1, 2]


@pytest.mark.parametrize("text", ["", "3", "a=1", "3=5", "7=1", "3=1,1=0", "3=4,4=3"])
def test_bad_merges(text):
    with pytest.raises(emseg.InputError, match="--partial: .*merge"):
        train_partial.parse_merge(text, 5)


def merged(tmp_path, raw, merge, classes=5, **options):
    """The ids of a label file read with a merge."""
    raw = np.asarray(raw, np.uint8).reshape(1, 1, -1)
    np.save(tmp_path / "label.npy", raw)
    np.save(tmp_path / "image.npy", np.zeros_like(raw))
    volume = emseg.open_volume(tmp_path / "image.npy")
    (label,), _ = emseg.open_labels([tmp_path / "label.npy"], [volume], classes,
                                    merge=train_partial.parse_merge(merge, classes), **options)
    return label[0].ravel().tolist()


def test_a_full_label_file_can_stand_in_for_a_partial_one(tmp_path):
    assert merged(tmp_path, [0, 1, 2, 3, 4, 3], "3=1,4=1") == [0, 1, 2, 1, 1, 1]
    assert merged(tmp_path, [0, 1, 2, 1, 1, 1], "3=1,4=1") == [0, 1, 2, 1, 1, 1]    # merged already
    assert merged(tmp_path, [0, 255, 0], "2=0", 3) == [0, 1, 0]     # a mask is the class left
    assert merged(tmp_path, [10, 20, 30, 99], "2=0", 3, ignore_label=99,            # mapped first
                  label_map=emseg.parse_label_map("10=0,20=1,30=2")) == [0, 1, 0, IGNORE]


# -- the network, the defaults, table 1


def test_the_network_and_the_defaults_are_the_papers():
    network = train_partial.MODELS["unet5"](1, 5)
    assert emseg.count_parameters(network) == 7_759_653
    assert not any("Norm" in type(module).__name__ for module in network.modules())
    args = train_partial.parse_args(["--volume", "a", "--label", "b"])
    assert (args.model, args.epochs, args.width) == ("unet5", 200, None)
    assert train_partial.AUGMENTATION == {"rotation": 180, "scale": 0.2}
    assert args.partial == [] and not args.compare and args.resize is None


def test_table_1_has_the_papers_rows():
    lines = train_partial.table_1(["membrane", "insulin"], {"Testing set": [0.813, None, 0.639]},
                                  {"Testing set": [0.843, 0.5, 0.706]}).splitlines()
    assert lines[0] == "| DSC | membrane | insulin | average |"
    assert lines[2:] == ["| Testing set: Baseline | 0.813 | undefined | 0.639 |",
                         "| Testing set: Mixed labels | 0.843 | 0.500 | 0.706 |",
                         "| Testing set: Difference in percentage | +3.7% | undefined | +10.5% |"]


# -- whole runs


def test_a_comparison_is_two_runs_and_table_1(compared):
    assert (compared / "mixed" / "surfaces.png").exists()
    assert [bool(emseg.load_checkpoint(compared / name)["args"]["partial"])
            for name in ("baseline", "mixed")] == [False, True]
    rows = {name: log_without_seconds(compared / name) for name in ("baseline", "mixed")}
    assert {float(row["loss_partial"]) > 0 for row in rows["baseline"]} == {False}
    assert {float(row["loss_partial"]) > 0 for row in rows["mixed"]} == {True}
    assert all(float(row["loss"]) == pytest.approx(float(row["loss_full"]) + float(
        row["loss_partial"]), rel=1e-5) for row in rows["mixed"])
    table = (compared / "table.md").read_text().splitlines()
    for line, name in ((2, "baseline"), (3, "mixed")):
        best = max(float(row["val_dice"]) for row in rows[name])
        assert table[line].startswith("| Validation set: ") and table[line].endswith(
            f" {best:.3f} |")
        content = metrics(compared / name)
        assert content["best"] == best and table[line + 3].endswith(
            f" {content['mean']['dice']:.3f} |")
        assert content["volumes"][0]["label"].endswith("label.tif@8:12")


def test_the_baseline_is_the_command_without_partial(compared, cells, tmp_path):
    run("--volume", cells / "image.tif@0:3", "--label", cells / "label.tif@0:3", *CLASSES,
        "--test-volume", cells / "image.tif@8:12", "--test-label", cells / "label.tif@8:12",
        "--val-slices", "2", "--out-dir", tmp_path / "alone", *TINY)
    assert torch.equal(weights(tmp_path / "alone/last.pt"), weights(compared / "baseline/last.pt"))
    assert metrics(tmp_path / "alone")["mean"] == metrics(compared / "baseline")["mean"]


def test_both_runs_of_a_comparison_begin_alike(cells, tmp_path):
    train(cells, tmp_path / "run", "--compare", "--lr", "1e-30", "--epochs", "1",
          "--steps-per-epoch", "1")
    torch.testing.assert_close(*[weights(tmp_path / f"run/{name}/last.pt")
                                 for name in ("baseline", "mixed")], rtol=0, atol=1e-20)


def test_resized_tomograms_keep_their_own_size_in_predictions(tmp_path):
    for seed, name in enumerate(("full", "partial", "test")):
        image, label = emseg.phantom((18 + 4 * seed, 72 - seed, 64 + seed), (30, 25, 25), seed)
        emseg.write_volumes([str(tmp_path / f"{name}{part}.mrc") for part in ("", "_label")],
                            image, [label], (30.0, 25.0, 25.0))
    run("--volume", tmp_path / "full.mrc", "--label", tmp_path / "full_label.mrc", "--partial",
        tmp_path / "partial.mrc", tmp_path / "partial_label.mrc", "3=1,4=1", "--test-volume",
        tmp_path / "test.mrc", *CLASSES, "--out-dir", tmp_path / "run", *TINY, "--resize", 16, 48,
        48, "--save-probability")
    prediction = emseg.open_volume(tmp_path / "run" / "prediction.mrc")
    assert prediction.shape == (26, 70, 66)
    assert prediction.voxel_size == pytest.approx((30, 25, 25))
    probability = tifffile.imread(tmp_path / "run" / "probability.tif")
    np.testing.assert_array_equal(probability.argmax(1), prediction[:])


def test_several_label_sets_and_no_full_one_tell_all_classes_apart(tmp_path):
    """The lung and heart of section 1: each is drawn in a data set of its own, as a mask."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, (12, 4, 4)).repeat(16, 1).repeat(16, 2).astype(np.uint8)
    image = np.array([120, 200, 40])[truth] + rng.normal(0, 5, truth.shape)
    for name, array in (("image", image.clip(0, 255)), ("truth", truth),
                        ("lung", 255 * (truth == 1)), ("heart", 255 * (truth == 2))):
        tifffile.imwrite(tmp_path / f"{name}.tif", array.astype(np.uint8))
    run("--partial", tmp_path / "image.tif@0:5", tmp_path / "lung.tif@0:5", "2=0", "--partial",
        tmp_path / "image.tif@5:10", tmp_path / "heart.tif@5:10", "1=0", "--classes", "background",
        "lung", "heart", "--test-volume", tmp_path / "image.tif@10:12", "--test-label",
        tmp_path / "truth.tif@10:12", "--out-dir", tmp_path / "run", *TINY, "--model", "unet",
        "--width", 8, "--patch-size", 32, 32, "--epochs", 1, "--steps-per-epoch", 40, "--lr",
        "1e-2")
    assert metrics(tmp_path / "run")["mean"]["dice"] > 0.8
    assert float(log_without_seconds(tmp_path / "run")[0]["loss_full"]) == 0


def test_without_test_volumes_partial_annotations_are_completed(cells, tmp_path):
    run(*training_data(cells), "--out-dir", tmp_path / "run", *TINY, "--epochs", 1)
    volumes = metrics(tmp_path / "run")["volumes"]
    shapes = [emseg.open_volume(volume["prediction"]).shape for volume in volumes]
    assert shapes == [(3, 112, 128), (4, 112, 128)]


def test_partially_labelled_slices_are_not_scored(cells, tmp_path, capsys):
    """And how they are read is said."""
    run(*training_data(cells), "--test-volume", cells / "image.tif", "--test-label",
        cells / "label.tif", "--out-dir", tmp_path / "run", *TINY, "--epochs", 1)
    assert metrics(tmp_path / "run")["volumes"][0]["ignored"] == 7 * 112 * 128
    assert "mitochondrion drawn as background" in capsys.readouterr().out


def test_a_checkpoint_predicts_as_its_run_did(compared, cells, tmp_path):
    run("--checkpoint", compared / "mixed", "--test-volume", cells / "image.tif@8:12",
        "--test-label", cells / "label.tif@8:12", "--out-dir", tmp_path / "again", "--device",
        "cpu")
    assert metrics(tmp_path / "again")["mean"] == metrics(compared / "mixed")["mean"]


def test_interrupted_and_resumed_is_bit_identical(compared, cells, tmp_path, monkeypatch):
    conftest.interrupt_after(monkeypatch, 8)                            # in mixed training
    with pytest.raises(SystemExit) as stopped:
        train(cells, tmp_path / "run", *COMPARISON)
    assert stopped.value.code == 130
    monkeypatch.undo()
    run("--resume", "--out-dir", tmp_path / "run")
    for name in ("baseline", "mixed"):
        assert torch.equal(*[weights(folder / name / "best.pt")
                             for folder in (compared, tmp_path / "run")])
        assert log_without_seconds(compared / name) == log_without_seconds(tmp_path / "run" / name)
    assert (compared / "table.md").read_text() == (tmp_path / "run" / "table.md").read_text()


# -- bad input


@pytest.mark.parametrize("change, message", [
    (["--partial", "missing.tif", "missing.tif", "3=1"], "missing.tif: no such file"),
    (["--partial", "{image}@3:7", "{label}@3:6", "3=1"], "do not fit"),
    (["--partial", "{image}@3:7", "{label}@3:7", "5=1"], "classes 0 to 4"),
    (["--partial", "{image}@3:7", "{image}@3:7", "3=1"], "class ids 0 to 4"),
    (["--unlabeled-volume", "{image}"], "goes to --partial"),
    (["--resize", "4", "64", "64", "--downsample", "2"], "give one of them"),
    (["--resize", "4", "32", "32"], "do not fit into 4 x 32 x 32"),
    (["--val-slices", "0,1,2"], "no slice to train on shows the class mitochondrion"),
    (["--compare"], "no labels to score with"),
])
def test_bad_input_is_one_line_and_leaves_nothing(cells, tmp_path, capsys, change, message):
    out = tmp_path / "out"
    change = [text.format(image=cells / "image.tif", label=cells / "label.tif") for text in change]
    assert message in refused(capsys, *training_data(cells), "--out-dir", out, *TINY, *change)
    assert not out.exists()


def test_what_must_be_given_together(cells, capsys):
    full = ["--volume", cells / "image.tif@0:3", "--label", cells / "label.tif@0:3"]
    partial = ["--partial", cells / "image.tif@3:7", cells / "label.tif@3:7", "3=0,4=0"]
    assert "--classes" in refused(capsys, *partial)
    assert "--volume" in refused(capsys, *partial, *CLASSES, "--compare")
    assert "--partial" in refused(capsys, *full, "--compare")
    assert "slices of --volume" in refused(capsys, *partial, *CLASSES, "--val-slices", "0")


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
