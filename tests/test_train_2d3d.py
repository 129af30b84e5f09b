"""train_2d3d.py as a command: instances, ensembles, weights, interruptions, what is refused.

Its networks, weights, windows and augmentation are tested in test_2d3d.py.
"""

import numpy as np
import pytest
import tifffile
import torch
from matplotlib.image import imread

import conftest
import emseg
import train_2d3d
from conftest import (interrupt_after, log_without_seconds, metrics, refused, run, two_processes,
                      weights)

TINY = ["--width", "2", "--patch-size", "3", "60", "60", "--spacing", "2", "32", "32", "--epochs",
        "2", "--steps-per-epoch", "3", "--batch-size", "2", "--elastic", "3", "--lr", "5e-3"]


def volumes(cells, train="0:8", val="8:10", test="10:12"):
    """Arguments for crops of the small volume and its labels of five classes."""
    named = {"": train, "val-": val, "test-": test}
    return [text for prefix, crop in named.items() if crop
            for text in (f"--{prefix}volume", f"{cells / 'image.tif'}@{crop}",
                         f"--{prefix}label", f"{cells / 'label.tif'}@{crop}")]


def train(cells, out, *more, **crops):
    run(train_2d3d, *volumes(cells, **crops), "--out-dir", out, *TINY, *more)
    return out


def written_weights(folder, label, w=0.01, balance=1.0, edge=25.0):
    """W of a run, from the file of its edges."""
    edges, counts = tifffile.imread(folder / "edges.tif"), np.bincount(label.ravel())
    return w + balance * (counts.min() / counts)[label] + edge * edges / edges.max()


@pytest.fixture(scope="module")
def trained(cells, tmp_path_factory):
    """Three instances, of which the best two are averaged."""
    return train(cells, tmp_path_factory.mktemp("2d3d") / "run", "--instances", "3", "--top-k", "2",
                 "--organelles", "3", "4", "--seed", "5")


def peak(folder):
    return max(float(row["val_miou"]) for row in log_without_seconds(folder))


def ious(pred, truth):
    both, either = [[op(pred == k, truth == k).sum() for k in range(5)]
                    for op in (np.logical_and, np.logical_or)]
    return np.array(both) / np.array(either)


def test_instances_are_ranked_and_the_best_are_averaged(trained, cells):
    content = metrics(trained)
    peaks = {name: peak(trained / name) for name in ("seed5", "seed6", "seed7")}
    ranked = sorted(peaks, key=peaks.get, reverse=True)
    assert content["ensemble"]["members"] == ranked[:2]
    assert list(content["ensemble"]["top"]) == ["1", "2", "3"]
    assert content["ensemble"]["top"]["1"]["miou"] == pytest.approx(peaks[ranked[0]])
    assert "| top 2 |" in (trained / "table.md").read_text()
    truth = tifffile.imread(cells / "label.tif")[10:12]
    for name in peaks:
        found = ious(tifffile.imread(trained / name / "prediction.tif"), truth)
        mean = content["instances"][name]["mean"]
        assert mean["miou"] == pytest.approx(found.mean())
        assert mean["miou_org"] == pytest.approx(found[[3, 4]].mean())
        for row in log_without_seconds(trained / name):
            terms = [float(row[key]) for key in ("loss_3d", "loss_2d", "loss_l2")]
            assert min(terms) > 0 and float(row["loss"]) == pytest.approx(sum(terms), rel=1e-5)
    for picture in ("figure", "histogram", "instances", "weights"):
        assert imread(trained / f"{picture}.png")[..., :3].std() > 0.05


def test_validation_sees_what_a_prediction_sees(cells, tmp_path):
    """The mIoU of an epoch is that of the prediction of the validation volume."""
    out = train(cells, tmp_path / "run", "--epochs", "1", train="0:4", val="4:12", test=None)
    run(train_2d3d, "--checkpoint", out / "best.pt", "--test-volume", cells / "image.tif@4:12",
        "--out-dir", tmp_path / "out")
    found = ious(tifffile.imread(tmp_path / "out" / "prediction.tif"),
                 tifffile.imread(cells / "label.tif")[4:12])
    assert found.mean() == pytest.approx(peak(out))


def test_an_ensemble_averages_the_probabilities_of_its_members(trained, cells, tmp_path):
    prob, members = {}, metrics(trained)["ensemble"]["members"]
    for name in members:
        run(train_2d3d, "--checkpoint", trained / name, "--test-volume", cells / "image.tif@10:12",
            "--out-dir", tmp_path / name, "--save-probability")
        prob[name] = tifffile.imread(tmp_path / name / "probability.tif")
        np.testing.assert_array_equal(tifffile.imread(tmp_path / name / "prediction.tif"),
                                      tifffile.imread(trained / name / "prediction.tif"))
    mean = sum(prob.values()) / 2
    np.testing.assert_array_equal(tifffile.imread(trained / "prediction.tif"), mean.argmax(1))
    assert np.abs(prob[members[0]] - prob[members[1]]).max() > 0.01


def test_finished_runs_are_ensembled_also_of_other_windows(trained, cells, tmp_path):
    """What any of them was trained on does not score; validation lists top 1, 2, …"""
    alone = train(cells, tmp_path / "alone", "--model", "unet5", "--patch-size", "64", "64",
                  "--spacing", "1", "32", "32")
    runs = [trained / "seed5", trained / "seed6", alone]
    run(train_2d3d, "--ensemble", *runs, "--test-volume", cells / "image.tif@6:12",
        "--test-label", cells / "label.tif@6:12", "--val-volume", cells / "image.tif@8:10",
        "--val-label", cells / "label.tif@8:10", "--out-dir", tmp_path / "out")
    content = metrics(tmp_path / "out")
    assert set(content["instances"]) == {"seed5", "seed6", "alone"}
    assert list(content["ensemble"]["top"]) == ["1", "2", "3"]
    assert content["volumes"][0]["ignored"] == 4 * 112 * 128


def test_an_instance_trains_as_if_it_were_alone(trained, cells, tmp_path):
    alone = train(cells, tmp_path / "alone", "--seed", "6", "--organelles", "3", "4")
    assert torch.equal(weights(alone / "last.pt"), weights(trained / "seed6" / "last.pt"))
    assert log_without_seconds(alone) == log_without_seconds(trained / "seed6")
    np.testing.assert_array_equal(*[tifffile.imread(folder / "prediction.tif")
                                    for folder in (alone, trained / "seed6")])


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
    weight = torch.from_numpy(written_weights(out, label))
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
    assert options["betas"] == pytest.approx((0.9683772, 0.9920567))
    assert options["eps"] == 1e-7 / (5 * 296 * 296)
    assert [float(row["lr"]) for row in rows] == pytest.approx([1e-3, 1e-3, 0.75e-3])


def test_weights_of_several_volumes_share_their_scale():
    label = np.zeros((2, 20, 20), np.uint8)
    label[:, 5:9] = 1
    edges = train_2d3d.edge_weights(label)
    lazy = conftest.InMemory(label, [0]), conftest.InMemory(edges)
    weights = train_2d3d.Weights(*lazy, 10 / edges.max(), np.array([1.0, 2.0]), 0.5)
    wanted = 0.5 + np.array([1.0, 2.0])[label] + 10 * edges / edges.max()
    np.testing.assert_allclose(weights[:], wanted, rtol=1e-6)
    np.testing.assert_allclose(weights[1, 3:9, 2:5], wanted[1, 3:9, 2:5], rtol=1e-6)


def test_given_weights_take_the_place_of_computed_ones(cells, tmp_path, capsys):
    given = np.full((8, 112, 128), 3.0, np.float32)
    tifffile.imwrite(tmp_path / "ones.tif", given / 3)
    tifffile.imwrite(tmp_path / "threes.tif", given)
    losses = []
    for name in ("ones", "threes"):
        out = train(cells, tmp_path / name, "--weights", tmp_path / f"{name}.tif", "--epochs", "1",
                    "--steps-per-epoch", "1")
        losses.append(float(log_without_seconds(out)[0]["loss_3d"]))
        assert not (out / "edges.tif").exists()
    assert losses[1] == pytest.approx(3 * losses[0], rel=1e-4)
    tifffile.imwrite(tmp_path / "bad.tif", given[:7])
    found = refused(train_2d3d, capsys, *volumes(cells), "--out-dir", tmp_path / "bad", *TINY,
                    "--weights", tmp_path / "bad.tif")
    assert "the weights have 7 x 112 x 128 voxels" in found


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
    assert capsys.readouterr().out.count("no validation MIoU of 0.99 in 2 epochs; given up") == 2
    run(train_2d3d, "--resume", "--out-dir", out)           # trains no further
    assert len(log_without_seconds(out / "seed1")) == 2
    kept = train(cells, tmp_path / "kept", "--epochs", "3", "--steps-per-epoch", "1",
                 "--stop-epoch", "2", "--stop-miou", "0.001")
    assert len(log_without_seconds(kept)) == 3


def test_interrupted_and_resumed_is_bit_identical(trained, cells, tmp_path, monkeypatch):
    """Ctrl-C within the second instance."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        interrupt_after(patch, 8)
        train(cells, tmp_path / "run", "--instances", "3", "--top-k", "2", "--organelles", "3", "4",
              "--seed", "5")
    assert stopped.value.code == 130
    run(train_2d3d, "--resume", "--out-dir", tmp_path / "run")
    for name in ("seed5", "seed6", "seed7"):
        for file in ("best.pt", "last.pt"):
            assert torch.equal(*[weights(folder / name / file)
                                 for folder in (trained, tmp_path / "run")])
        assert log_without_seconds(tmp_path / "run" / name) == log_without_seconds(trained / name)
    for file in ("prediction.tif", "edges.tif"):
        np.testing.assert_array_equal(*[tifffile.imread(folder / file)
                                        for folder in (trained, tmp_path / "run")])
    assert metrics(tmp_path / "run")["instances"] == metrics(trained)["instances"]


def test_two_processes_train_and_predict_together(cells, tmp_path):
    said = two_processes(train_2d3d, *volumes(cells), *TINY, "--instances", "2",
                         "--out-dir", tmp_path / "out")
    assert "2 processes" in said
    edges = tifffile.imread(tmp_path / "out" / "edges.tif")
    label = tifffile.imread(cells / "label.tif")[:8]
    np.testing.assert_allclose(edges, train_2d3d.edge_weights(label), rtol=1e-5)


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
    assert entry["per_class"]["class 2"]["fp"] == ((pred == 2) & (label != 2) & kept).sum()
    ious = [entry["per_class"][name]["iou"] for name in ("class 2", "class 3")]
    assert entry["miou_org"] == pytest.approx(np.mean([i for i in ious if i is not None]))


PATCHES = {"deepvess": ["7", "33", "33"], "unet3d-thick": ["4", "32", "32"],
           "unet3d-thin": ["3", "36", "36"], "unet": ["204", "204"]}


@pytest.mark.parametrize("model", ["2d3d-no-3x3x3", "unet", "unet3d-thin", "unet3d-thick",
                                   "deepvess", "deeplab-resnet101", "deeplab-drn"])
def test_every_network_trains_and_predicts(cells, tmp_path, model):
    """On slices whose sides are no multiple of anything, also where windows are deeper than they
    are many."""
    patch = PATCHES.get(model, ["3", "36", "36"] if model.startswith("2d3d") else ["64", "64"])
    out = tmp_path / "out"
    run(train_2d3d, "--volume", cells / "image.tif@0:9,0:101,0:110", "--label",
        cells / "label.tif@0:9,0:101,0:110", "--val-volume", cells / "image.tif@10:11,0:50,0:41",
        "--val-label", cells / "label.tif@10:11,0:50,0:41", "--test-volume",
        cells / "image.tif@10:12,0:53,0:45", "--out-dir", out, "--model", model, "--width",
        2, "--epochs", "1", "--steps-per-epoch", "1", "--batch-size", "1",
        "--elastic", "4", "--patch-size", *patch)
    assert tifffile.imread(out / "prediction.tif").shape == (2, 53, 45)
    assert 0 <= float(log_without_seconds(out)[0]["val_miou"]) <= 1


# -- what does not fit -----------------------------------------------------------------------------


@pytest.mark.parametrize("change, message", [
    (["--organelles", "3", "5"], "--organelles 5: class ids run from 0 to 4"),
    (["--top-k", "2"], "--top-k 2: there are 1 instances"),
    (["--patch-size", "10", "60", "60"], "has 8 slices, and a window predicts 10"),
    (["--patch-size", "3", "40", "60"], "nearest to 40: 36 or 44"),
    (["--weight-terms", "0", "0", "0"], "--weight-terms must not all be 0"),
    (["--weights", "a.tif", "b.tif"], "--weights has 2 and --volume 1 paths"),
    (["--unlabeled-volume", "a.tif"], "learns from labels only"),
    (["--ensemble", "x"], "no effect"),
])
def test_bad_input_is_one_line_and_leaves_nothing(cells, tmp_path, capsys, change, message):
    found = refused(train_2d3d, capsys, *volumes(cells), "--out-dir", tmp_path / "out", *TINY,
                    *change)
    assert message in found and not (tmp_path / "out").exists()


def test_ensembles_that_make_no_sense(trained, cells, tmp_path, capsys):
    other = train(cells, tmp_path / "two", "--label-map", "0=0,1=1,*=0", "--epochs", "1",
                  "--steps-per-epoch", "1")
    for runs, message in (([trained / "seed5", other], "--classes"),
                          ([tmp_path / "none"], "no such checkpoint")):
        found = refused(train_2d3d, capsys, "--ensemble", *runs, "--test-volume",
                        cells / "image.tif", "--out-dir", tmp_path / "out")
        assert message in found and not (tmp_path / "out").exists()


# -- demo, real data ---------------------------------------------------------------


def test_the_demo_trains_two_instances(tmp_path):
    """For a tenth of its steps, to save time: that it learns is for the real data to show."""
    run(train_2d3d, "--demo", "--epochs", "2", "--steps-per-epoch", "30", "--out-dir",
        tmp_path / "demo")
    out = tmp_path / "demo"
    content = metrics(out)
    assert content["classes"] == ["background", "nucleus", "mitochondrion"]
    assert set(content["instances"]) == {"seed0", "seed1"} == set(content["ensemble"]["members"])
    for name in ("seed0", "seed1"):
        first, last = [float(row["loss"]) for row in log_without_seconds(out / name)]
        assert last < 0.95 * first
    assert emseg.open_volume(out / "prediction.mrc").voxel_size == (20.0, 8.0, 8.0)


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
