"""train_2d3d.py as a command; its networks, weights and windows are tested in test_2d3d.py."""

import numpy as np
import pytest
import tifffile
import torch

import emseg
import train_2d3d
from conftest import interrupt_after, log_without_seconds, metrics, refused, run, weights

TINY = ["--width", "2", "--patch-size", "3", "28", "28", "--spacing", "2", "16", "16", "--epochs",
        "2", "--steps-per-epoch", "3", "--batch-size", "2", "--elastic", "3", "--lr", "5e-3",
        "--no-tta", "--stop-miou", "0.001"]
CORNER = "0:64,0:72"                    # of every slice


@pytest.fixture(autouse=True, scope="module")
def no_pictures():
    """They take half of the time of a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emseg, "save_figure", lambda figure, path: None)
        yield


def volumes(cells, train="0:5", val="8:10", test="10:12"):
    """Arguments for crops of the small volume and its labels of five classes."""
    named = {"": train, "val-": val, "test-": test}
    return [text for prefix, crop in named.items() if crop
            for text in (f"--{prefix}volume", f"{cells / 'image.tif'}@{crop},{CORNER}",
                         f"--{prefix}label", f"{cells / 'label.tif'}@{crop},{CORNER}")]


def train(cells, out, *more, **crops):
    run(train_2d3d, *volumes(cells, **crops), "--out-dir", out, *TINY, *more)
    return out


TWO = ["--instances", "2", "--organelles", "3", "4", "--seed", "5"]


@pytest.fixture(scope="module")
def trained(cells, tmp_path_factory):
    """Two instances and their average."""
    return train(cells, tmp_path_factory.mktemp("2d3d") / "run", *TWO)


def peak(folder):
    return max(float(row["val_miou"]) for row in log_without_seconds(folder))


def read(folder, name="prediction"):
    return tifffile.imread(folder / f"{name}.tif")


def truth(cells, z):
    return tifffile.imread(cells / "label.tif")[z, :64, :72]


def ious(pred, label):
    both, either = [[op(pred == k, label == k).sum() for k in range(5)]
                    for op in (np.logical_and, np.logical_or)]
    with np.errstate(invalid="ignore"):
        return np.array(both) / np.array(either)


def test_instances_are_ranked_and_averaged(trained, cells):
    content, table = metrics(trained), " ".join((trained / "table.md").read_text().split())
    peaks = {name: peak(trained / name) for name in ("seed5", "seed6")}
    ranked = sorted(peaks, key=peaks.get, reverse=True)
    assert content["ensemble"]["members"] == ranked
    assert list(content["ensemble"]["top"]) == ["1", "2"]
    assert content["ensemble"]["top"]["1"]["val_miou"] == pytest.approx(peaks[ranked[0]])
    for name in peaks:
        found = ious(read(trained / name), truth(cells, slice(10, 12)))
        mean = content["instances"][name]["mean"]
        assert mean["miou"] == pytest.approx(np.nanmean(found))
        assert mean["miou_org"] == pytest.approx(np.nanmean(found[[3, 4]]))
        assert f"| 2d3d {name} | {peaks[name]:.4f} |" in table
    rows = zip(*[log_without_seconds(trained / name) for name in peaks])
    first, last = [sum(float(row["loss"]) for row in epoch) for epoch in rows]
    assert last < 0.95 * first
    two, mean = content["ensemble"]["top"]["2"], content["mean"]
    scores = two["val_miou"], two["val_miou_org"], mean["miou"], mean["miou_org"]
    assert f"| top 2 | {' | '.join(f'{score:.4f}' for score in scores)} |" in table


def test_an_ensemble_averages_the_probabilities_of_its_members(trained, cells, tmp_path):
    prob, members = {}, metrics(trained)["ensemble"]["members"]
    for name in members:
        run(train_2d3d, "--checkpoint", trained / name, *volumes(cells, None, None)[:2],
            "--out-dir", tmp_path / name, "--save-probability")
        prob[name] = read(tmp_path / name, "probability")
        np.testing.assert_array_equal(read(tmp_path / name), read(trained / name))
    np.testing.assert_array_equal(read(trained), (sum(prob.values()) / 2).argmax(1))
    assert np.abs(prob[members[0]] - prob[members[1]]).max() > 0.01


def test_the_best_of_finished_runs_are_averaged_also_of_other_windows(trained, cells, tmp_path):
    """What any of these was trained on does not score, nor what nobody annotated."""
    alone = train(cells, tmp_path / "seed5", "--model", "unet5", "--patch-size", "64", "64",
                  "--spacing", "1", "32", "32", "--epochs", "1")
    runs = {"1_seed5": trained / "seed5", "2_seed6": trained / "seed6", "3_seed5": alone}
    run(train_2d3d, "--ensemble", *runs.values(), "--top-k", "2", "--test-ignore-label", "0",
        *volumes(cells, None, test="3:12"), "--out-dir", tmp_path / "out")
    content = metrics(tmp_path / "out")
    ranked = sorted(runs, key=lambda name: -peak(runs[name]))
    assert content["ensemble"]["members"] == ranked[:2] and set(content["instances"]) == set(runs)
    assert list(content["ensemble"]["top"]) == ["1", "2"]
    free = truth(cells, [5, 6, 7, 10, 11])
    assert content["volumes"][0]["ignored"] == 4 * 64 * 72 + (free == 0).sum()


def test_validation_sees_what_a_prediction_sees(cells, tmp_path):
    """The mIoU of an epoch is that of the prediction of the validation volume."""
    out = train(cells, tmp_path / "run", "--epochs", "1", val="4:12", test=None)
    run(train_2d3d, "--checkpoint", out, *volumes(cells, None, None, "4:12")[:2], "--out-dir",
        tmp_path / "out")
    assert np.nanmean(ious(read(tmp_path / "out"), truth(cells, slice(4, 12)))) == pytest.approx(
        peak(out))


@pytest.mark.parametrize("model, factors", [
    ("2d3d", (1, 0.33)), ("2d3d-no-multiloss", (1, 0)), ("2d3d-no-pyramid", (0, 0.33))])
def test_the_first_step_is_equation_1(cells, tmp_path, model, factors):
    """One window, the whole crop, unchanged; the terms of the initial network."""
    out, image = tmp_path / "out", tifffile.imread(cells / "image.tif")[:3, :64, :72]
    label = np.array([0, 1, 0, 2, 0])[truth(cells, slice(0, 3))]
    np.save(tmp_path / "image.npy", image)
    np.save(tmp_path / "label.npy", label.astype(np.uint8))
    run(train_2d3d, "--volume", tmp_path / "image.npy", "--label", tmp_path / "label.npy",
        "--out-dir", out, "--model", model, "--width", "2", "--patch-size", "3", "68", "76",
        "--spacing", "1", "1", "1", "--epochs", "3", "--elastic", "0", "--brightness", "0",
        "--contrast", "0", "--no-reflect", "--seed", "3", "--l2-2d", "0.01", "--l2-3d", "0.02",
        "--l2-p", "0.03", "--decay-steps", "2", "--no-amp", "--no-tta")
    rows = log_without_seconds(out)
    torch.manual_seed(3)
    network = train_2d3d.MODELS[model](1, 3, 2)
    network.apply(lambda m: emseg.glorot_initialization(m, train_2d3d.CONVOLUTIONS))
    image = np.clip(np.rint(128 + 40 * (image - image.mean()) / image.std()), 0, 255)
    padded = np.pad((image - 128) / 40, ((0, 0), (2, 2), (2, 2)), mode="symmetric")
    edges = np.stack([train_2d3d.edge_weights(each) for each in label])
    counts = np.bincount(label.ravel())
    weight = 0.01 + (counts.min() / counts)[label] + 25 * edges / edges.max()
    logits = network(torch.from_numpy(padded).float()[None, None], both=True)
    for key, x, factor in zip(("loss_3d", "loss_2d"), logits, factors):
        log_p = x[0].log_softmax(0).gather(0, torch.from_numpy(label)[None])[0] if factor else 0
        wanted = -factor * (torch.from_numpy(weight) * log_p).mean().item()
        assert float(rows[0][key]) == pytest.approx(wanted, rel=1e-3)
    group = {name: 0.03 if name.startswith("predict") else 0.02
             if name.startswith(("scale", "narrow", "enlarge")) else 0.01
             for name, _ in network.named_parameters()}
    l2 = sum(group[name] * p.square().sum().item() for name, p in network.named_parameters())
    assert float(rows[0]["loss_l2"]) == pytest.approx(l2, rel=1e-4)
    terms = sum(float(rows[0][key]) for key in ("loss_3d", "loss_2d", "loss_l2"))
    assert float(rows[0]["loss"]) == pytest.approx(terms)
    state = torch.load(out / "last.pt", weights_only=True)["modules"]["optimizer"]
    options = state["param_groups"][0]
    assert options["betas"] == pytest.approx((0.9683772, 0.9920567))
    assert options["eps"] == 1e-7 / (5 * 296 * 296)
    assert [float(row["lr"]) for row in rows] == pytest.approx([1e-3, 1e-3, 0.75e-3])


def test_a_network_that_does_not_start_is_given_up(cells, tmp_path, monkeypatch):
    monkeypatch.setattr(train_2d3d, "STOP_EPOCH", 2)
    out = train(cells, tmp_path, "--epochs", "3", "--steps-per-epoch", "1", "--stop-miou", "0.99")
    assert len(log_without_seconds(out)) == 2 and metrics(out)["best"] == peak(out)


def test_interrupted_and_resumed_is_bit_identical(trained, cells, tmp_path, monkeypatch):
    """Ctrl-C within the second instance; none is given up, whose mIoU is high enough."""
    monkeypatch.setattr(train_2d3d, "STOP_EPOCH", 1)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        interrupt_after(patch, 8)
        train(cells, tmp_path / "run", *TWO)
    assert stopped.value.code == 130
    run(train_2d3d, "--resume", "--out-dir", tmp_path / "run")
    for name in "seed5", "seed6":
        assert torch.equal(*[weights(folder / name / "last.pt")
                             for folder in (trained, tmp_path / "run")])
        assert log_without_seconds(tmp_path / "run" / name) == log_without_seconds(trained / name)
    np.testing.assert_array_equal(read(tmp_path / "run"), read(trained))
    assert metrics(tmp_path / "run")["instances"] == metrics(trained)["instances"]


PATCHES = {"deepvess": "7 33 33", "unet3d-thick": "4 32 32", "unet3d-thin": "3 36 36",
           "unet": "204 204", "unet5": "64 64"}


@pytest.mark.parametrize("model", PATCHES)
def test_every_rival_trains_and_predicts(cells, tmp_path, model):
    """On slices whose sides are no multiple of anything, also where windows are deeper than they
    are many."""
    out = train(cells, tmp_path, "--model", model, "--patch-size", *PATCHES[model].split(),
                "--epochs", "1", "--steps-per-epoch", "1", "--test-volume",
                f"{cells / 'image.tif'}@10:12,0:53,0:45", val="10:11", test=None)
    assert read(out).shape == (2, 53, 45)
    assert 0 <= peak(out) <= 1


@pytest.mark.parametrize("change, message", [
    (["--organelles", "3", "5"], "--organelles 5: class ids run from 0 to 4"),
    (["--top-k", "2"], "--top-k 2: there are 1 instances"),
    (["--patch-size", "6", "28", "28"], "windows that predict 6 x 24 x 24 voxels do not fit"),
    (["--patch-size", "3", "40", "60"], "nearest to 40: 36 or 44"),
    (["--patch-size", "3", "40", "60", "--instances", "2"], "nearest to 40: 36 or 44"),
    (["--val-slices", "0:5"], "no slice is left to train on"),
    (["--unlabeled-volume", "a.tif"], "unrecognized arguments")])
def test_bad_input_is_one_line_and_leaves_nothing(cells, tmp_path, capsys, change, message):
    out = tmp_path / "out"
    assert message in refused(train_2d3d, capsys, *volumes(cells), *TINY, "--out-dir", out, *change)
    assert not out.exists()


def test_ensembles_of_runs_with_other_classes_are_refused(trained, cells, tmp_path, capsys):
    other = train(cells, tmp_path / "two", "--label-map", "0=0,1=1,*=0", "--epochs", "1",
                  "--steps-per-epoch", "1")
    found = refused(train_2d3d, capsys, "--ensemble", trained / "seed5", other,
                    *volumes(cells, None, None)[:2], "--out-dir", tmp_path / "out")
    assert "--classes" in found and not (tmp_path / "out").exists()
    assert "--top-k needs" in refused(train_2d3d, capsys, *volumes(cells, val=None), "--top-k", "1")


def test_the_demo_trains_two_instances(tmp_path, monkeypatch):
    """For a few steps, on one volume that is smaller than the demo's two."""
    phantom, out = emseg.phantom((30, 176, 176)), tmp_path / "demo"
    monkeypatch.setattr(emseg, "phantom", lambda *arguments, **options: phantom)
    run(train_2d3d, "--demo", "--epochs", "1", "--steps-per-epoch", "3", "--width", "2",
        "--no-tta", "--out-dir", out)
    content = metrics(out)
    assert content["classes"] == ["background", "nucleus", "mitochondrion"]
    assert set(content["instances"]) == {"seed0", "seed1"} == set(content["ensemble"]["members"])
    assert emseg.open_volume(out / "prediction.mrc").voxel_size == (20.0, 8.0, 8.0)
