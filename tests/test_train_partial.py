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
    run(*training_data(cells), "--test-volume", cells / "image.tif", "--test-label",
        cells / "label.tif", "--val-slices", "2", "--out-dir", out, *TINY, *more)


@pytest.fixture(scope="module")
def trained(cells, tmp_path_factory):
    """A finished tiny run with validation."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    train(cells, folder)
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


def test_the_loss_is_finite_where_probabilities_vanish():
    """p of the merged classes underflows in float32; the loss is the distance of the logits."""
    logits = torch.tensor([1e4, 0.0, -5.0, 0.0, 1.0]).view(1, 5, 1, 1).requires_grad_()
    loss = train_partial.merged_cross_entropy(logits, torch.tensor([[[1]]]), MERGES[1:2])
    assert loss.item() == pytest.approx(1e4 - np.log(np.exp(0) + np.exp(0) + np.exp(1)), rel=1e-6)
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


def test_the_network_and_the_defaults_are_the_papers():
    network = train_partial.MODELS["unet5"](1, 5)
    assert emseg.count_parameters(network) == 7_759_653
    args = train_partial.parse_args(["--volume", "a", "--label", "b"])
    assert (args.model, args.epochs, args.width) == ("unet5", 200, None)
    assert train_partial.AUGMENTATION == {"rotation": 180, "scale": 0.2}
    assert args.partial == [] and args.resize is None


# -- whole runs


def test_eq_1_is_a_sum_and_partially_labelled_slices_do_not_score(trained):
    for row in log_without_seconds(trained):
        parts = [float(row[key]) for key in ("loss_full", "loss_partial")]
        assert float(row["loss"]) == pytest.approx(sum(parts), rel=1e-5) and min(parts) > 0
    assert metrics(trained)["volumes"][0]["ignored"] == 7 * 112 * 128


def test_the_demo_has_full_and_partial_labels(tmp_path):
    run("--demo", "--epochs", 1, "--steps-per-epoch", 4, "--width", 2, "--device", "cpu",
        "--out-dir", tmp_path / "run")
    (row,) = log_without_seconds(tmp_path / "run")
    assert float(row["loss_full"]) > 0 and float(row["loss_partial"]) > 0
    assert metrics(tmp_path / "run")["volumes"][0]["ignored"] == 0


def test_partial_files_may_have_values_of_their_own(trained, cells, tmp_path):
    tifffile.imwrite(tmp_path / "old.tif", tifffile.imread(cells / "label.tif")[3:7] * 10 + 5,
                     photometric="minisblack")
    run("--volume", cells / "image.tif@0:3", "--label", cells / "label.tif@0:3", "--partial",
        cells / "image.tif@3:7", tmp_path / "old.tif", "3=0,4=0", "--partial-map",
        "5=0,15=1,25=2,35=3,45=4", *CLASSES, "--test-volume", cells / "image.tif", "--test-label",
        cells / "label.tif", "--val-slices", "2", "--out-dir", tmp_path / "run", *TINY)
    assert log_without_seconds(tmp_path / "run") == log_without_seconds(trained)


def test_partial_labels_alone_and_resized_volumes(cells, tmp_path):
    """Predictions keep the shape of their volume."""
    image, label = cells / "image.tif", cells / "label.tif"
    run("--partial", f"{image}@0:3", f"{label}@0:3", "3=0", "--partial", f"{image}@3:7",
        f"{label}@3:7", "4=0", "--test-volume", f"{image}@8:12,0:110,0:126", *CLASSES, "--out-dir",
        tmp_path / "run", *TINY, "--resize", 6, 48, 64, "--save-probability")
    prediction = emseg.open_volume(tmp_path / "run" / "prediction.tif")
    assert prediction.shape == (4, 110, 126) and prediction.voxel_size == pytest.approx((20, 8, 8))
    probability = tifffile.imread(tmp_path / "run" / "probability.tif")
    np.testing.assert_array_equal(probability.argmax(1), prediction[:])
    assert {float(row["loss_full"]) for row in log_without_seconds(tmp_path / "run")} == {0}


def test_interrupted_and_resumed_is_bit_identical(trained, cells, tmp_path, monkeypatch, capsys):
    conftest.interrupt_after(monkeypatch, 4)
    with pytest.raises(SystemExit) as stopped:
        train(cells, tmp_path / "run")
    assert stopped.value.code == 130
    assert "mitochondrion drawn as background" in capsys.readouterr().out
    monkeypatch.undo()
    run("--resume", "--out-dir", tmp_path / "run")
    assert torch.equal(*[weights(folder / "best.pt") for folder in (trained, tmp_path / "run")])
    assert log_without_seconds(trained) == log_without_seconds(tmp_path / "run")


@pytest.mark.parametrize("change, message", [
    (["--partial", "{image}@3:7", "{label}@3:7", "5=1"], "classes 0 to 4"),
    (["--partial", "{image}@3:7", "{image}@3:7", "3=1"], "class ids 0 to 4"),
    (["--unlabeled-volume", "{image}"], "unrecognized arguments"),
    (["--resize", "4", "64", "64", "--downsample", "2"], "give one of them"),
    (["--val-slices", "0,1,2"], "no slice to train on shows the class mitochondrion"),
])
def test_bad_input_is_one_line_and_leaves_nothing(cells, tmp_path, capsys, change, message):
    out = tmp_path / "out"
    change = [text.format(image=cells / "image.tif", label=cells / "label.tif") for text in change]
    assert message in refused(capsys, *training_data(cells), "--out-dir", out, *TINY, *change)
    assert not out.exists()


def test_partial_labels_alone_need_the_names_of_all_classes(cells, capsys):
    assert "--classes" in refused(capsys, "--partial", cells / "image.tif@3:7",
                                  cells / "label.tif@3:7", "3=0,4=0")


def test_a_batch_without_annotation_costs_nothing():
    label = torch.full((4, 6, 7), IGNORE)
    terms = train_partial.loss_terms(batch()[0], label, MERGES, torch.ones(4, dtype=torch.bool))
    assert [term.item() for term in terms] == [0, 0]
