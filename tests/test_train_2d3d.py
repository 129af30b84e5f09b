"""train_2d3d.py as a command: instances, ensembles, weights, interruptions, what is refused.

Its networks, weights, windows and augmentation are tested in test_2d3d.py.
"""

import math
import re
import sys

import numpy as np
import pytest
import tifffile
import torch
from matplotlib.image import imread

import emseg
import train_2d3d
from conftest import (ROOT, interrupt_after, log_without_seconds, metrics, narrow,
                      parse_readme_commands, refused, run, two_processes, weights)


TINY = ["--width", "2", "--patch-size", "3", "60", "60", "--spacing", "2", "32", "32", "--epochs",
        "2", "--steps-per-epoch", "3", "--batch-size", "2", "--elastic", "3", "--lr", "5e-3"]


def volumes(cells, train="0:8", val="8:10", test="10:12"):
    """Arguments for crops of the small volume and its labels of five classes."""
    named = {"": train, "val-": val, "test-": test}
    return [text for prefix, crop in named.items() if crop
            for text in (f"--{prefix}volume", f"{cells / 'image.tif'}@{crop}",
                         f"--{prefix}label", f"{cells / 'label.tif'}@{crop}")]


def train(cells, out, *more, fine=False, **crops):
    run(train_2d3d, *volumes(cells, **crops), "--out-dir", out, *TINY, *more, fine=fine)
    return out


@pytest.fixture(scope="module")
def trained(cells, tmp_path_factory):
    """Three instances, of which the best two are averaged."""
    return train(cells, tmp_path_factory.mktemp("2d3d") / "run", "--instances", "3", "--top-k", "2",
                 "--organelles", "3", "4", "--seed", "5")


def peak(folder):
    return max(float(row["val_miou"]) for row in log_without_seconds(folder))


def test_a_run_writes_what_the_readme_says(trained):
    assert {p.name for p in trained.iterdir()} == {
        "best.pt", "last.pt", "config.json", "metrics.json", "figure.png", "histogram.png",
        "instances.png", "prediction.tif", "weights.tif", "weights.png", "seed5", "seed6", "seed7"}
    for name in ("seed5", "seed6", "seed7"):
        assert {p.name for p in (trained / name).iterdir()} == {
            "best.pt", "last.pt", "config.json", "metrics.json", "figure.png", "curves.png",
            "log.csv", "prediction.tif"}
        for row in log_without_seconds(trained / name):
            terms = [float(row[key]) for key in ("loss_3d", "loss_2d", "loss_l2")]
            assert min(terms) > 0 and float(row["loss"]) == pytest.approx(sum(terms), rel=1e-5)
            assert "val_miou_org" in row
    for picture in ("figure", "histogram", "instances", "weights", "seed6/figure"):
        assert imread(trained / f"{picture}.png")[..., :3].std() > 0.05


def test_metrics_hold_the_ensemble_each_instance_and_the_best(trained, cells):
    content = metrics(trained)
    peaks = {name: peak(trained / name) for name in ("seed5", "seed6", "seed7")}
    ranked = sorted(peaks, key=peaks.get, reverse=True)
    assert content["ensemble"]["members"] == ranked[:2]
    assert content["single_best"]["instance"] == ranked[0]
    truth = tifffile.imread(cells / "label.tif")[10:12]

    def ious(pred):
        both, either = [[op(pred == k, truth == k).sum() for k in range(5)]
                        for op in (np.logical_and, np.logical_or)]
        return np.array(both) / np.array(either)

    for name, entry in content["instances"].items():
        found = ious(tifffile.imread(trained / name / "prediction.tif"))
        assert entry["val_miou"] == pytest.approx(peaks[name])
        assert entry["validation"]["miou"] == pytest.approx(peaks[name])
        assert entry["member"] == (name in ranked[:2]) and entry["seed"] == int(name[4:])
        assert entry["mean"]["miou"] == pytest.approx(found.mean())
        assert entry["mean"]["miou_org"] == pytest.approx(found[[3, 4]].mean())
        assert metrics(trained / name)["mean"] == entry["mean"]
    found = ious(tifffile.imread(trained / "prediction.tif"))
    assert content["mean"]["miou"] == pytest.approx(found.mean())
    assert content["volumes"][0]["miou_org"] == pytest.approx(found[[3, 4]].mean())
    assert content["single_best"]["mean"] == content["instances"][ranked[0]]["mean"]
    assert content["ensemble"]["validation"]["miou"] > 0


def test_an_ensemble_averages_the_probabilities_of_its_members(trained, cells, tmp_path):
    prob = {}
    for name in ("seed5", "seed6", "seed7", "."):
        run(train_2d3d, "--checkpoint", trained / name / "best.pt", "--test-volume",
            cells / "image.tif@10:12", "--out-dir", tmp_path / name / "out", "--save-probability")
        prob[name] = tifffile.imread(tmp_path / name / "out" / "probability.tif")
        pred = tifffile.imread(trained / name / "prediction.tif")
        np.testing.assert_array_equal(tifffile.imread(tmp_path / name / "out" / "prediction.tif"),
                                      pred)
    members = metrics(trained)["ensemble"]["members"]
    mean = sum(prob[name] for name in members) / 2
    np.testing.assert_allclose(prob["."], mean, atol=1e-6)
    np.testing.assert_array_equal(tifffile.imread(trained / "prediction.tif"), mean.argmax(1))
    assert np.abs(prob["seed5"] - prob["seed6"]).max() > 0.01


def test_finished_runs_are_ensembled(trained, cells, tmp_path):
    """Two runs, one of three instances: the same members give the same prediction, and what any of
    them was trained on does not score."""
    alone = train(cells, tmp_path / "alone", "--seed", "7")
    run(train_2d3d, "--ensemble", trained, alone, "--top-k", "2", "--test-volume",
        cells / "image.tif@6:12", "--test-label", cells / "label.tif@6:12", "--out-dir",
        tmp_path / "out")
    content = metrics(tmp_path / "out")
    name = trained.name
    assert set(content["instances"]) == {*(f"{name}-seed{s}" for s in (5, 6, 7)), "alone"}
    best = metrics(trained)["ensemble"]["members"]
    if best[0] == "seed7":
        best = ["seed7", "seed7"]                   # its twin is as good
    elif best[1] == "seed7":
        best = [best[0], "seed7"]
    assert [m.split("-")[-1].replace("alone", "seed7")
            for m in content["ensemble"]["members"]] == best
    assert content["volumes"][0]["ignored"] == 4 * 112 * 128
    assert content["instances"]["alone"]["val_miou"] == content["instances"][
        f"{name}-seed7"]["val_miou"]
    run(train_2d3d, "--ensemble", trained, "--top-k", "2", "--test-volume",
        cells / "image.tif@10:12", "--out-dir", tmp_path / "same")
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "same" / "prediction.tif"),
                                  tifffile.imread(trained / "prediction.tif"))


def test_one_finished_run_is_an_ensemble_of_one(trained, cells, tmp_path):
    run(train_2d3d, "--ensemble", trained / "seed6", "--test-volume", cells / "image.tif@10:12",
        "--test-label", cells / "label.tif@10:12", "--out-dir", tmp_path / "out")
    content = metrics(tmp_path / "out")
    assert content["ensemble"]["members"] == ["seed6"] == list(content["instances"])
    assert content["mean"] == metrics(trained)["instances"]["seed6"]["mean"]


def test_weights_of_another_run_at_the_resolution_of_the_network(cells, tmp_path):
    small = ["--downsample", "2", "--patch-size", "3", "36", "36", "--epochs", "1"]
    one = train(cells, tmp_path / "one", *small)
    assert tifffile.imread(one / "weights.tif").shape == (8, 56, 64)
    two = train(cells, tmp_path / "two", *small, "--weights", one / "weights.tif")
    assert log_without_seconds(one) == log_without_seconds(two)


def test_networks_of_different_models_are_ensembled(trained, cells, tmp_path):
    other = train(cells, tmp_path / "thin", "--model", "unet3d-thin")
    run(train_2d3d, "--ensemble", trained / "seed5", other, "--test-volume",
        cells / "image.tif@10:12", "--test-label", cells / "label.tif@10:12", "--out-dir",
        tmp_path / "out")
    found = metrics(tmp_path / "out")["instances"]
    models = {name: entry["model"] for name, entry in found.items()}
    assert models == {"seed5": "2d3d", "thin": "unet3d-thin"}


def test_an_instance_trains_as_if_it_were_alone(trained, cells, tmp_path):
    alone = train(cells, tmp_path / "alone", "--seed", "6", "--organelles", "3", "4")
    assert torch.equal(weights(alone / "last.pt"), weights(trained / "seed6" / "last.pt"))
    assert log_without_seconds(alone) == log_without_seconds(trained / "seed6")
    np.testing.assert_array_equal(*[tifffile.imread(folder / "prediction.tif")
                                    for folder in (alone, trained / "seed6")])
    assert "instances" not in metrics(alone)
    assert {p.name for p in alone.iterdir()} >= {"log.csv", "curves.png", "weights.tif", "best.pt"}


def test_the_first_step_is_equation_1(cells, tmp_path):
    """One window, the whole crop, unchanged; terms and update from the initial network."""
    out = tmp_path / "out"
    run(train_2d3d, *volumes(cells, train="0:3", val=None, test=None), "--out-dir", out, "--width",
        "2", "--patch-size", "3", "116", "132", "--spacing", "1", "1", "1", "--epochs", "3",
        "--elastic", "0", "--brightness", "0", "--contrast", "0", "--no-reflect", "--seed", "3",
        "--label-map", "0=0,1=1,3=2,*=0", "--l2-2d", "0.01", "--l2-3d", "0.02", "--l2-p", "0.03",
        "--decay-steps", "2", "--no-amp")
    rows = log_without_seconds(out)
    torch.manual_seed(3)
    network = train_2d3d.Hybrid(1, 3, 2)
    network.apply(lambda m: emseg.glorot_initialization(m, train_2d3d.CONVOLUTIONS))
    image = tifffile.imread(cells / "image.tif")[:3].astype(float)
    image = np.clip(np.rint(128 + 40 * (image - image.mean()) / image.std()), 0, 255)
    padded = np.pad((image - 128) / 40, ((0, 0), (2, 2), (2, 2)), mode="symmetric")
    label = np.array([0, 1, 0, 2, 0])[tifffile.imread(cells / "label.tif")[:3]]
    weight = torch.from_numpy(tifffile.imread(out / "weights.tif"))
    logits = network(torch.from_numpy(padded).float()[None, None], both=True)
    for key, x, factor in (("loss_3d", logits[0], 1), ("loss_2d", logits[1], 0.33)):
        log_p = x[0].log_softmax(0).gather(0, torch.from_numpy(label)[None])[0]
        assert float(rows[0][key]) == pytest.approx(factor * -(weight * log_p).mean().item(),
                                                    rel=1e-3)
    group = {name: 0.03 if name.startswith("predict") else 0.02
             if name.startswith(("scale", "narrow", "enlarge")) else 0.01
             for name, _ in network.named_parameters()}
    l2 = sum(group[name] * p.square().sum().item() for name, p in network.named_parameters())
    assert float(rows[0]["loss_l2"]) == pytest.approx(l2, rel=1e-4)
    state = torch.load(out / "last.pt", weights_only=True)["modules"]["optimizer"]
    options = state["param_groups"][0]
    assert options["betas"] == pytest.approx((0.9683772, 0.9920567)) and options["eps"] == 1e-7
    assert [float(row["lr"]) for row in rows] == pytest.approx([1e-3, 1e-3, 0.75e-3])


def test_weights_of_a_run_are_those_of_equation_1(trained, cells):
    label = tifffile.imread(cells / "label.tif")[:8]
    found = tifffile.imread(trained / "weights.tif")
    counts = np.bincount(label.ravel(), minlength=5)
    edges = train_2d3d.edge_weights(label)
    wanted = 0.01 + (counts.min() / counts)[label] + 25 * edges / edges.max()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_weights_of_several_volumes_share_their_scale(cells, tmp_path):
    out = tmp_path / "out"
    run(train_2d3d, "--volume", *[cells / f"image.tif@{c}" for c in ("0:4", "4:12")], "--label",
        *[cells / f"label.tif@{c}" for c in ("0:4", "4:12")], "--out-dir", out, *TINY,
        "--label-slices", "0:4", "--weight-terms", "0.5", "2", "10", "--epochs", "1")
    label = tifffile.imread(cells / "label.tif")
    counts = np.bincount(label[:8].ravel(), minlength=5)
    edges = train_2d3d.edge_weights(label[:8])
    wanted = 0.5 + 2 * (counts.min() / counts)[label[:8]] + 10 * edges / edges.max()
    one, two = [tifffile.imread(out / f"weights_{n}_image.tif") for n in (1, 2)]
    np.testing.assert_allclose(np.concatenate([one, two[:4]]), wanted, rtol=1e-5)
    assert not two[4:].any()                        # nobody annotated these


def test_given_weights_take_the_place_of_computed_ones(cells, tmp_path, capsys):
    given = np.full((8, 112, 128), 3.0, np.float32)
    tifffile.imwrite(tmp_path / "ones.tif", given / 3)
    tifffile.imwrite(tmp_path / "threes.tif", given)
    losses = []
    for name in ("ones", "threes"):
        out = train(cells, tmp_path / name, "--weights", tmp_path / f"{name}.tif", "--epochs", "1",
                    "--steps-per-epoch", "1")
        losses.append(float(log_without_seconds(out)[0]["loss_3d"]))
        assert not (out / "weights.tif").exists()
    assert losses[1] == pytest.approx(3 * losses[0], rel=1e-4)
    for bad, message in ((given[:7], "the weights have 7 x 112 x 128 voxels"),
                         (-given, "weights must be numbers of 0 or more"),
                         (0 * given, "all weights are 0")):
        tifffile.imwrite(tmp_path / "bad.tif", bad)
        found = refused(train_2d3d, capsys, *volumes(cells), "--out-dir", tmp_path / "bad", *TINY,
                        "--weights", tmp_path / "bad.tif")
        assert message in found and not (tmp_path / "bad").exists()


@pytest.mark.parametrize("model, silent", [("2d3d-no-multiloss", "loss_2d"),
                                           ("2d3d-no-pyramid", "loss_3d")])
def test_ablations_leave_a_term_out(cells, tmp_path, model, silent):
    row = log_without_seconds(train(cells, tmp_path / "out", "--model", model, "--epochs", "1",
                                    val=None, test=None))[0]
    terms = {key: float(row[key]) for key in ("loss_3d", "loss_2d")}
    assert terms.pop(silent) == 0 and min(terms.values()) > 0


def test_a_network_that_does_not_start_is_given_up(cells, tmp_path, capsys):
    out = train(cells, tmp_path / "out", "--epochs", "5", "--steps-per-epoch", "1", "--stop-epoch",
                "2", "--stop-miou", "0.99", "--instances", "2")
    assert [len(log_without_seconds(out / f"seed{s}")) for s in (0, 1)] == [2, 2]
    assert "seed1: no validation MIoU of 0.99 in 2 epochs; given up" in capsys.readouterr().out
    run(train_2d3d, "--resume", "--out-dir", out)           # trains no further
    assert len(log_without_seconds(out / "seed1")) == 2
    kept = train(cells, tmp_path / "kept", "--epochs", "3", "--steps-per-epoch", "1",
                 "--stop-epoch", "2", "--stop-miou", "0.001")
    assert len(log_without_seconds(kept)) == 3


@pytest.mark.parametrize("steps", [8, 12])
def test_interrupted_and_resumed_is_bit_identical(trained, cells, tmp_path, monkeypatch, steps):
    """Ctrl-C within the second instance, and at the end of its last epoch."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        interrupt_after(patch, steps)
        train(cells, tmp_path / "run", "--instances", "3", "--top-k", "2", "--organelles", "3", "4",
              "--seed", "5")
    assert stopped.value.code == 130
    run(train_2d3d, "--resume", "--out-dir", tmp_path / "run")
    for name in ("seed5", "seed6", "seed7"):
        for file in ("best.pt", "last.pt"):
            assert torch.equal(*[weights(folder / name / file)
                                 for folder in (trained, tmp_path / "run")])
        assert log_without_seconds(tmp_path / "run" / name) == log_without_seconds(trained / name)
    for file in ("prediction.tif", "weights.tif"):
        np.testing.assert_array_equal(*[tifffile.imread(folder / file)
                                        for folder in (trained, tmp_path / "run")])
    assert metrics(tmp_path / "run")["instances"] == metrics(trained)["instances"]


def test_weights_interrupted_while_computed_are_computed_again(cells, tmp_path, monkeypatch):
    """A crash between the two passes over the label leaves nothing that a resumed run trusts."""
    whole = train(cells, tmp_path / "whole", "--epochs", "1")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train_2d3d, "voxel_weights", lambda *a: 1 / 0)
        train(cells, tmp_path / "run", "--epochs", "1")
    assert not (tmp_path / "run" / "weights.tif").exists()
    run(train_2d3d, "--resume", "--out-dir", tmp_path / "run")
    np.testing.assert_array_equal(*[tifffile.imread(folder / "weights.tif")
                                    for folder in (whole, tmp_path / "run")])
    assert {p.name for p in (tmp_path / "run").iterdir()} == {p.name for p in whole.iterdir()}


def test_two_processes_train_and_predict_together(cells, tmp_path):
    said = two_processes(train_2d3d, tmp_path, *volumes(cells), *TINY, "--instances", "2",
                         "--out-dir", tmp_path / "out")
    assert "2 processes" in said and said.count("wrote") == 3
    found = tifffile.imread(tmp_path / "out" / "weights.tif")
    label = tifffile.imread(cells / "label.tif")[:8]
    edges, counts = train_2d3d.edge_weights(label), np.bincount(label.ravel())
    by_hand = 0.01 + (counts.min() / counts)[label] + 25 * edges / edges.max()
    np.testing.assert_allclose(found, by_hand, rtol=1e-5)
    assert found.max() > 25
    run(train_2d3d, "--checkpoint", tmp_path / "out" / "best.pt", "--test-volume",
        cells / "image.tif@10:12", "--out-dir", tmp_path / "again")
    one, two = [tifffile.imread(tmp_path / name / "prediction.tif") for name in ("out", "again")]
    assert (one == two).mean() > 0.999
    wanted = train(cells, tmp_path / "one", "--epochs", "1", "--steps-per-epoch", "1")
    np.testing.assert_allclose(found, tifffile.imread(wanted / "weights.tif"), rtol=1e-6)


def test_only_one_cell_of_a_test_volume_is_labelled(trained, cells, tmp_path):
    """Zeros around the cell are not annotated in the test label, and background in all others."""
    label = tifffile.imread(cells / "label.tif")[10:12]
    label[:, :, 64:] = 0
    label[:, :9] = 77                               # --ignore-label holds in test labels too
    tifffile.imwrite(tmp_path / "cell.tif", label)
    out = train(cells, tmp_path / "run", "--epochs", "1", "--test-volume",
                cells / "image.tif@10:12", "--test-label", tmp_path / "cell.tif", "--organelles",
                "2", "3", "--test-ignore-label", "0", "--ignore-label", "77", test=None)
    entry, pred = metrics(out)["volumes"][0], tifffile.imread(out / "prediction.tif")
    kept = (label > 0) & (label < 77)
    assert entry["ignored"] == (~kept).sum()
    for k, name in ((2, "class 2"), (3, "class 3")):
        assert entry["per_class"][name]["fp"] == ((pred == k) & (label != k) & kept).sum()
        assert entry["per_class"][name]["fn"] == ((pred != k) & (label == k)).sum()
    ious = [entry["per_class"][name]["iou"] for name in ("class 2", "class 3")]
    assert entry["miou_org"] == pytest.approx(np.mean([i for i in ious if i is not None]))
    trained_on = torch.load(out / "best.pt", weights_only=True)["seen"]
    assert len(trained_on) == 2


def test_without_validation_all_instances_are_averaged(cells, tmp_path):
    out = train(cells, tmp_path / "out", "--instances", "2", val=None, test=None)
    content = metrics(out)
    assert content["ensemble"]["members"] == ["seed0", "seed1"]
    assert content["single_best"] is None and content["selected_on"] == "last epoch"
    assert not (out / "histogram.png").exists() and not (out / "instances.png").exists()
    assert (out / "seed1" / "curves.png").exists()
    assert tifffile.imread(out / "prediction.tif").shape == (8, 112, 128)


def test_two_classes_have_one_channel(cells, tmp_path):
    out = tmp_path / "out"
    run(train_2d3d, "--volume", cells / "image.tif@0:8", "--label", cells / "mito.tif@0:8",
        "--test-volume", cells / "image.tif@8:12", "--test-label", cells / "mito.tif@8:12",
        "--out-dir", out, *TINY, "--instances", "2", "--save-probability", "--tta")
    prob = tifffile.imread(out / "probability.tif")
    assert prob.shape == (4, 112, 128)
    np.testing.assert_array_equal(tifffile.imread(out / "prediction.tif"), prob > 0.5)


PATCHES = {"deepvess": ["7", "33", "33"], "unet3d-thick": ["4", "32", "32"],
           "unet3d-thin": ["3", "36", "36"], "unet": ["204", "204"]}


@pytest.mark.parametrize("model", sorted(train_2d3d.MODELS))
def test_every_network_trains_and_predicts(cells, tmp_path, model):
    """On slices whose sides are no multiple of anything, also where windows are deeper than they
    are many."""
    patch = PATCHES.get(model, ["3", "36", "36"] if model.startswith("2d3d") else ["64", "64"])
    out = tmp_path / "out"
    run(train_2d3d, "--volume", cells / "image.tif@0:9,0:101,0:110", "--label",
        cells / "label.tif@0:9,0:101,0:110", "--val-volume", cells / "image.tif@10:11,0:50,0:41",
        "--val-label", cells / "label.tif@10:11,0:50,0:41", "--test-volume",
        cells / "image.tif@10:12,0:53,0:45", "--out-dir", out, "--model", model, "--width",
        narrow(model, 2), "--epochs", "1", "--steps-per-epoch", "1", "--batch-size", "1",
        "--elastic", "4", "--patch-size", *patch)
    assert tifffile.imread(out / "prediction.tif").shape == (2, 53, 45)
    assert 0 <= float(log_without_seconds(out)[0]["val_miou"]) <= 1


def test_a_prediction_blends_windows_that_overlap_by_a_third(trained, cells, tmp_path,
                                                            monkeypatch):
    """The windows of a prediction: their size, and that each begins before two thirds of the last
    one are over, in z, y and x."""
    shapes, starts = [], []
    tiles, windows = emseg.tile_starts, emseg.predict_by_windows

    def seen_starts(side, tile, overlap=0.25):
        found = tiles(side, tile, overlap)
        starts.append((side, tile, found))
        return found

    monkeypatch.setattr(emseg, "tile_starts", seen_starts)
    forward = train_2d3d.Hybrid.forward
    monkeypatch.setattr(train_2d3d.Hybrid, "forward",
                        lambda self, x: shapes.append(x.shape) or forward(self, x))
    run(train_2d3d, "--checkpoint", trained / "seed5" / "best.pt", "--test-volume",
        cells / "image.tif", "--out-dir", tmp_path / "out")
    assert {tuple(shape[2:]) for shape in shapes} == {(3, 60, 60)}
    assert {(side, tile) for side, tile, _ in starts} == {(12, 3), (112, 56), (128, 56)}
    for side, tile, found in starts:
        assert found[0] == 0 and found[-1] == side - tile
        assert np.diff(found).max() <= math.ceil(tile * 2 / 3)


# -- what does not fit -----------------------------------------------------------------------------


@pytest.mark.parametrize("change, message", [
    (["--organelles", "3", "5"], "--organelles 5: class ids run from 0 to 4"),
    (["--top-k", "2"], "--top-k 2: there are 1 instances"),
    (["--patch-size", "10", "60", "60"], "has 8 slices, fewer than the 10 that a window of 10"),
    (["--patch-size", "3", "40", "60"], "2d3d takes sides of 4 + a multiple of 8; nearest to 40: "
                                        "36 or 44"),
    (["--patch-size", "36", "36"], "2d3d takes three sides, Z Y X"),
    (["--patch-size", "3", "124", "60"], "windows that predict 120 x 56 pixels do not fit"),
    (["--elastic", "-1"], "--elastic -1.0 is not 0 or more"),
    (["--weight-terms", "0", "0", "0"], "--weight-terms must be 0 to 1000000, and not all 0"),
    (["--weight-terms", "1", "1e39", "0"], "--weight-terms must be 0 to 1000000"),
    (["--elastic", "1e9"], "--elastic 1e+09: more pixels than a window has"),
    (["--lr", "1e300"], "--lr 1e+300 is above 1000"),
    (["--brightness", "2"], "--brightness 2 is above 1"),
    (["--stop-miou", "2"], "--stop-miou 2 is above 1"),
    (["--organelles", "3", "3"], "--organelles names a class twice"),
    (["--seed", str(2**63 - 1), "--instances", "2"], "is too high for 2 instances"),
    (["--decay", "1.5"], "--decay 1.5 is not above 0 and at most 1"),
    (["--weights", "a.tif", "b.tif"], "--weights has 2 and --volume 1 paths"),
    (["--weights", "missing.tif"], "missing.tif"),
    (["--unlabeled-volume", "a.tif"], "learns from labels only"),
    (["--model", "unet3d-thick", "--patch-size", "3", "36", "36"], "needs 4 slices or more"),
    (["--ensemble", "x"], "leave --volume out"),
])
def test_bad_input_is_one_line_and_leaves_nothing(cells, tmp_path, capsys, change, message):
    found = refused(train_2d3d, capsys, *volumes(cells), "--out-dir", tmp_path / "out", *TINY,
                    *change)
    assert message in found and not (tmp_path / "out").exists()


def test_a_flat_volume_is_told_what_to_pass_and_that_works(cells, tmp_path, capsys):
    arguments = [*volumes(cells, train="0:3", val=None, test=None), "--out-dir", tmp_path / "out",
                 *TINY, "--label-map", "0=0,1=1,*=0", "--epochs", "1", "--steps-per-epoch", "1"]
    found = refused(train_2d3d, capsys, *arguments, "--patch-size", "5", "36", "36")
    advice = re.search(r"--patch-size (\d+ \d+ \d+)", found)[1].split()
    run(train_2d3d, *arguments, "--patch-size", *advice)
    assert (tmp_path / "out" / "prediction.tif").exists()


def test_top_k_needs_validation(trained, cells, tmp_path, capsys):
    found = refused(train_2d3d, capsys, *volumes(cells, val=None), "--out-dir", tmp_path / "out",
                    *TINY, "--instances", "2", "--top-k", "1")
    assert "--top-k: the instances were not validated" in found
    found = refused(train_2d3d, capsys, "--ensemble", trained, "--top-k", "9", "--test-volume",
                    cells / "image.tif", "--out-dir", tmp_path / "out")
    assert "--top-k 9: there are 3 instances" in found and not (tmp_path / "out").exists()


def test_ensembles_that_make_no_sense(trained, cells, tmp_path, capsys):
    other = train(cells, tmp_path / "two", "--label-map", "0=0,1=1,*=0", "--epochs", "1",
                  "--steps-per-epoch", "1")
    flat = train(cells, tmp_path / "flat", "--model", "resunet", "--patch-size", "32", "32",
                 "--epochs", "1", "--steps-per-epoch", "1")
    for runs, message in (([trained, other], "differ in classes"),
                          ([trained, flat], "differ in window depth: 3 and 1"),
                          ([trained, trained], "two runs are named"),
                          ([tmp_path / "none"], "no such checkpoint")):
        found = refused(train_2d3d, capsys, "--ensemble", *runs, "--test-volume",
                        cells / "image.tif", "--out-dir", tmp_path / "out")
        assert message in found and not (tmp_path / "out").exists()
    found = refused(train_2d3d, capsys, "--ensemble", trained)
    assert "--ensemble needs --test-volume" in found


# -- memory, README, demo, real data ---------------------------------------------------------------


LIMITED = """
import resource
import numpy as np, tifffile, torch
import emseg, train_2d3d

class Tiny(torch.nn.Module):
    dims, stride, offset, margin, min_depth = 3, 8, 4, 2, 1

    def __init__(self, in_channels, out_channels, width=None):
        super().__init__()
        self.head = emseg.BySlice(torch.nn.Conv2d(in_channels, out_channels, 5))

    def forward(self, x):
        return self.head(x)

train_2d3d.MODELS["2d3d"] = Tiny
folder, limit = ".", 2**32
tifffile.imwrite("patient1.tif", shape=(250, 2000, 2000), dtype=np.uint8, metadata={"axes": "ZYX"},
                 imagej=True)
image = np.random.default_rng(0).integers(0, 255, (5, 40, 40), np.uint8)
tifffile.imwrite(folder + "/image.tif", image)
tifffile.imwrite(folder + "/label.tif", image % 7)
run = lambda *arguments: train_2d3d.main(train_2d3d.parse_args(list(arguments)))
run("--volume", folder + "/image.tif", "--label", folder + "/label.tif", "--patch-size", "5", "36",
    "36", "--epochs", "1", "--steps-per-epoch", "1", "--out-dir", folder + "/trained",
    "--normalize", "unit")
checkpoint = torch.load(folder + "/trained/best.pt", weights_only=True)
checkpoint["args"]["patch_size"] = [5, 300, 300]
torch.save(checkpoint, folder + "/paper.pt")
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + limit, used + limit))
run("--checkpoint", folder + "/paper.pt", "--test-volume", folder + "/patient1.tif@100:148",
    "--out-dir", folder + "/out")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="address space limits of Linux")
@pytest.mark.background("-c", LIMITED)
def test_memory_is_bounded_for_the_patient_1_volume(finished):
    """48 slices of a file of 250 x 2000 x 2000 voxels, in the paper's windows, with 4 GiB beside
    what Python and PyTorch take: their probabilities alone would be 5 GiB."""
    assert finished.returncode == 0, finished.stderr[-2000:]
    prediction = emseg.open_volume(str(finished.folder / "out" / "prediction.tif"))
    assert prediction.shape == (48, 2000, 2000)


def test_every_readme_command_parses(trained, monkeypatch):
    monkeypatch.setattr(train_2d3d, "as_checkpoint",
                        lambda parser, typed, argv: [*argv, "--checkpoint", "x"])
    assert parse_readme_commands(train_2d3d, trained / "best.pt", monkeypatch) >= 6


@pytest.mark.background(ROOT / "train_2d3d.py", "--demo", "--epochs", "2", "--steps-per-epoch",
                        "30", "--out-dir", "demo")
def test_the_demo_trains_two_instances(finished):
    """For a tenth of its steps, to save time: that it learns is for the real data to show."""
    assert finished.returncode == 0, finished.stderr
    out = finished.folder / "demo"
    content = metrics(out)
    assert content["classes"] == ["background", "nucleus", "mitochondrion"]
    assert list(content["instances"]) == ["seed0", "seed1"] == sorted(
        content["ensemble"]["members"])
    for name in ("seed0", "seed1"):
        first, last = [float(row["loss"]) for row in log_without_seconds(out / name)]
        assert last < 0.95 * first
    assert emseg.open_volume(str(out / "prediction.mrc")).voxel_size == (20.0, 8.0, 8.0)
    assert imread(out / "instances.png")[..., :3].std() > 0.05


def test_real_neuropil_membranes(real_data, tmp_path):
    """A minute of training on four times smaller slices, without the pyramid."""
    raw, labels = real_data / "vnc" / "raw", real_data / "vnc" / "labels"
    run(train_2d3d, *[text for kind, crop in (("", "0:12"), ("val-", "12:15"), ("test-", "15:20"))
                      for text in (f"--{kind}volume", f"{raw}@{crop}", f"--{kind}label",
                                   f"{labels}@{crop}")],
        "--label-map", "0=1,32=1,64=1,96=1,128=1,159=2,191=3,223=4,255=0", "--out-dir",
        tmp_path / "out", "--model", "2d3d-no-pyramid", "--width", "8", "--downsample", "4",
        "--patch-size", "5", "68", "68", "--spacing", "2", "32", "32", "--elastic", "3",
        "--epochs", "1", "--steps-per-epoch", "250", "--lr", "2e-3", "--weight-terms", "0.3", "1",
        "1", "--l2-2d", "0", "--l2-3d", "0", "--l2-p", "0")
    scores = metrics(tmp_path / "out")["mean"]["per_class"]
    assert scores["class 1"]["dice"] > 0.45
    assert float(log_without_seconds(tmp_path / "out")[0]["val_dice_class 1"]) > 0.45
