"""evaluate.py for pairs of volumes: its metrics against slow formulas, and the command.

test_runs.py tests its tables of runs.
"""

import csv
import json
import math
import shutil

import numpy as np
import pytest
from matplotlib.image import imread
from scipy import ndimage

import emseg
import evaluate
from conftest import InMemory, metrics, refused, run

IGNORE = emseg.IGNORE
VOXEL = (20.0, 8.0, 8.0)


def blobs(shape, classes=3, seed=0, ignored=0.0, smooth=1.0):
    """Random regions of class ids; a share of them is IGNORE."""
    rng = np.random.default_rng(seed)
    fields = [ndimage.gaussian_filter(rng.normal(size=shape), smooth) for _ in range(classes + 1)]
    ids = np.argmax(fields[:-1], 0).astype(np.uint8)
    ids[fields[-1] < np.quantile(fields[-1], ignored)] = IGNORE
    return ids


def pair_of(shape, classes=3, seed=0, ignored=0.1, **options):
    """A random truth, partly ignored, and a prediction that is the truth in half of its voxels."""
    truth = blobs(shape, classes, seed, ignored, **options)
    pred = np.where(blobs(shape, 2, seed + 1), truth, blobs(shape, classes, seed + 2, **options))
    return truth, np.where(pred == IGNORE, 1, pred).astype(np.uint8)


def in_memory(truth, pred, voxel_size=VOXEL):
    """The Pair of two arrays."""
    label = InMemory(truth, voxel_size=voxel_size)
    return evaluate.Pair("pair", InMemory(pred, voxel_size=voxel_size), label, None, None, label)


def save(path, array, voxel_size=VOXEL):
    """Write an array as TIFF or MRC; returns the path."""
    with emseg.create_volume(path, array.shape, array.dtype, voxel_size) as writer:
        writer[:] = array
    return path


def score(folder, truth, pred, *more, voxel_size=VOXEL):
    """The entry of metrics.json for two arrays, of the command."""
    paths = [save(folder / f"{name}.tif", array, voxel_size)
             for name, array in (("pred", pred), ("truth", truth))]
    run(evaluate, "--prediction", paths[0], "--label", paths[1], "--out-dir", folder / "out",
        *more)
    return metrics(folder / "out")["volumes"][0]


def line(text):
    """A volume of one row from its digits; a point is background."""
    return np.array([[list(text.replace(".", "0"))]]).astype(np.uint8)


def refused_pair(folder, capsys, truth, pred, *more):
    """The line with which two arrays are refused."""
    for name, array in (("pred", pred), ("truth", truth)):
        np.save(folder / f"{name}.npy", array)
    said = refused(evaluate, capsys, "--prediction", folder / "pred.npy", "--label",
                   folder / "truth.npy", "--out-dir", folder / "out", *more)
    assert not (folder / "out").exists()
    return said


@pytest.fixture
def no_pictures(monkeypatch):
    """The command without its pictures, which take most of its time."""
    for name in ("save_slices", "save_slice_dice", "save_surfaces"):
        monkeypatch.setattr(emseg, name, lambda *args, **options: None)


# -- surface distances -----------------------------------------------------------------------------


def plain_surface(ids):
    """Surface voxels, one after the other."""
    surface = np.zeros(ids.shape, bool)
    for place in np.argwhere((ids > 0) & (ids != IGNORE)):
        for step in np.concatenate([np.eye(3, dtype=int), -np.eye(3, dtype=int)]):
            there = place + step
            if (there >= 0).all() and (there < ids.shape).all():
                surface[tuple(place)] |= ids[tuple(there)] not in (IGNORE, ids[tuple(place)])
    return surface


def plain_distances(truth, pred, k, size):
    """Distances (from the truth, from the prediction) by distance transforms."""
    sides = [plain_surface(ids) & (ids == k)
             for ids in (truth, np.where(truth == IGNORE, IGNORE, pred))]
    return [ndimage.distance_transform_edt(~other, size)[own]
            for own, other in (sides, sides[::-1])]


@pytest.mark.parametrize("slices, size, ignored", [(1, VOXEL, 0.2), (2, (1.0, 30.0, 7.0), 0),
                                                   (100, (1.0, 1.0, 1.0), 0.2)])
def test_distances_are_those_of_distance_transforms(monkeypatch, slices, size, ignored):
    """Whatever number of slices is read together."""
    truth, pred = pair_of((7, 12, 13), 4, 3, ignored)
    monkeypatch.setattr(evaluate, "SLAB", slices * 12 * 13)
    for k, got in enumerate(evaluate.surface_distances(in_memory(truth, pred, size), 4), 1):
        expected = plain_distances(truth, pred, k, size)
        assert got["hd95_nm"] == pytest.approx(max(np.percentile(e, 95) for e in expected))
        assert got["assd_nm"] == pytest.approx(np.concatenate(expected).mean())


def test_a_class_in_one_volume_only_has_no_distances():
    volumes = np.zeros((2, 4, 5, 6), np.uint8)
    volumes[0, 1:3, 1:3, 1:3] = 1
    assert evaluate.surface_distances(in_memory(*volumes), 2) == [
        {"hd95_nm": None, "assd_nm": None}]


# -- objects ---------------------------------------------------------------------------------------


def plain_objects(ids, size):
    """(class, voxels, volume, surface, centroid, box) of each object, one after the other."""
    for k in np.unique(ids[(ids > 0) & (ids != IGNORE)]):
        labels, n = ndimage.label(ids == k, np.ones((3, 3, 3)))
        for number in range(1, n + 1):
            places, surface = np.argwhere(labels == number), 0
            for step, area in evaluate.crofton_areas(size).items():
                for there in (places + step, places - step):
                    there = there[((there >= 0) & (there < ids.shape)).all(1)].T
                    surface += area * (~np.isin(ids[tuple(there)], (k, IGNORE))).sum()
            yield (int(k), len(places), len(places) * math.prod(size), surface,
                   *(places.mean(0) + 0.5) * size, *places.min(0) * size,
                   *(places.max(0) + 1) * size)


def rows_of(folder):
    with open(folder / "objects.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_objects_csv(tmp_path, no_pictures):
    truth, pred = pair_of((6, 24, 26), 3, 7, 0.1)
    score(tmp_path, np.where(truth == IGNORE, 9, truth), pred, "--objects", "--min-voxels", 3,
          "--ignore-label", 9, "--classes", "background", "a", "b")
    numbers = [f"{part}_nm" for part in (
        *(f"centroid_{axis}" for axis in "zyx"), *(f"box_{axis}0" for axis in "zyx"),
        *(f"box_{axis}1" for axis in "zyx"))]
    for source, ids in (("truth", truth), ("prediction", np.where(truth == IGNORE, IGNORE, pred))):
        expected = [each for each in plain_objects(ids, VOXEL) if each[1] >= 3]
        own = [row for row in rows_of(tmp_path / "out") if row["source"] == source]
        got = [("background a b".split().index(row["class"]), int(row["voxels"]),
                float(row["volume_nm3"]), float(row["surface_nm2"]),
                *(float(row[key]) for key in numbers)) for row in own]
        np.testing.assert_allclose(sorted(got), sorted(expected), rtol=1e-4)
        assert len({row["id"] for row in own}) == len(own) > 3
        for row in own:
            ends = [float(row[f"box_{axis}{end}_nm"]) for end in (0, 1) for axis in "zyx"]
            assert row["at_border"] == str(int(0 in ends[:3] or any(
                end == n * side for end, n, side in zip(ends[3:], truth.shape, VOXEL))))


def test_objects_and_distances_without_voxel_size(tmp_path, no_pictures):
    ids = line("11..1")
    entry = score(tmp_path, ids, ids, "--objects", voxel_size=None)
    rows = rows_of(tmp_path / "out")
    assert [row["voxels"] for row in rows] == ["2", "1"] * 2
    assert {row[key] for row in rows for key in row if "nm" in key} == {""}
    assert entry["per_class"]["class 1"]["hd95_nm"] is None


def surface_of(mask, size):
    """The surface of the only object."""
    numbers = mask.astype(np.int32)
    return evaluate.measure(numbers, 2, mask.astype(np.uint8), size)[1][1]


@pytest.mark.parametrize("size", [(1.0, 1.0, 1.0), VOXEL])
@pytest.mark.parametrize("voxels, error", [(3, 0.03), (6, 0.013)])
def test_surfaces_of_balls_are_within_the_promised_error(size, voxels, error):
    sides = [2 * math.ceil(voxels * max(size) / s) + 5 for s in size]
    grid = np.ogrid[tuple(slice(side) for side in sides)]
    for middle in (np.zeros(3), np.random.default_rng(0).random(3) - 0.5):
        ball = sum(((g - side // 2 + m) * s) ** 2 for g, side, m, s in
                   zip(grid, sides, middle, size)) <= (voxels * max(size)) ** 2
        radius = (ball.sum() * np.prod(size) * 3 / 4 / math.pi) ** (1 / 3)
        assert surface_of(ball, size) == pytest.approx(4 * math.pi * radius**2, rel=error)


def test_volumes_that_do_not_fit_into_memory_are_refused_with_their_size(tmp_path, monkeypatch,
                                                                       capsys):
    monkeypatch.setattr(evaluate, "BYTES_PER_VOXEL", 2**50)
    paths = [save(tmp_path / f"{name}.mrc", line("0011")) for name in ("pred", "truth")]
    said = refused(evaluate, capsys, "--prediction", paths[0], "--label", paths[1], "--objects",
                   "--out-dir", tmp_path / "out")
    assert "1 x 1 x 4" in said and "GiB of memory" in said


# -- segments --------------------------------------------------------------------------------------


def segments_of(truth, pred, in_2d=False):
    """Scores of what class 1 separates."""
    return evaluate.score_segments(*evaluate.find_segments(in_memory(truth, pred), 1, in_2d))


@pytest.mark.parametrize("truth, pred, split, merge, precision, recall", [
    ("00011000", "00000000", 0, 1, 1 / 2, 1),
    ("00000000", "00011000", 1, 0, 1, 1 / 2),
    ("000000000000", "011110000000", 2 - 0.75 * math.log2(3), 0, 1, 90 / 144),     # thinned: 3, 9
    ("00011000", "00011000", 0, 0, 1, 1),
    ("00011000", "11111111", 0, 1, 1 / 2, 1),                   # no segment is one segment
])
def test_segments_as_by_hand(truth, pred, split, merge, precision, recall):
    got = segments_of(line(truth), line(pred))
    error = 1 - 2 * precision * recall / (precision + recall)
    assert (got["truth"], got["predicted"]) == (truth.count("10") + 1,
                                                pred.count("10") + (pred[-1] == "0"))
    assert got["voi_split"] == pytest.approx(split) and got["voi_merge"] == pytest.approx(merge)
    assert got["voi"] == pytest.approx(split + merge) == got["voi_slices"][0]
    assert got["rand_precision"] == pytest.approx(precision)
    assert got["rand_recall"] == pytest.approx(recall)
    assert got["adapted_rand_error"] == pytest.approx(error)
    assert got["adapted_rand_error_slices"] == [pytest.approx(error)]


def test_slices_without_a_predicted_segment_count():
    """16 cells; five of six slices are predicted as membrane only. 3.98 bit and 0.88 are what
    CREMI's own program gives."""
    truth = np.zeros((6, 80, 80), np.uint8)
    for k in (20, 40, 60):
        truth[:, k : k + 2], truth[:, :, k : k + 2] = 1, 1
    pred = np.ones_like(truth)
    pred[2] = truth[2]
    got = segments_of(truth, pred)
    assert got["voi"] == pytest.approx(3.9808, abs=1e-4)
    assert got["adapted_rand_error"] == pytest.approx(0.8805, abs=1e-4)
    assert got["voi_slices"][2] == 0 and got["voi_slices"][0] == pytest.approx(3.9969, abs=1e-4)
    assert got["adapted_rand_error_slices"][2] == 0


@pytest.mark.parametrize("in_2d", [False, True])
def test_random_segments_are_scored_as_in_a_dense_table(in_2d):
    truth, pred = pair_of((5, 20, 21), 2, 11, 0.1)
    known, structure = truth != IGNORE, ndimage.generate_binary_structure(3, 1)
    structure[[0, 2]] &= not in_2d
    labels = [ndimage.label((ids != 1) & known, structure)[0] for ids in (truth, pred)]
    grown = [page[tuple(ndimage.distance_transform_edt(
        page == 0, VOXEL[1:], return_distances=False, return_indices=True))] for page in labels[1]]
    table = np.zeros([label.max() + 1 for label in labels])
    np.add.at(table, (labels[0], np.array(grown)), 1)
    joint = table[1:] / table[1:].sum()

    def entropy(share):
        return -sum(s * math.log2(s) for s in np.ravel(share) if s)

    got = segments_of(truth, pred, in_2d)
    assert got["voi_split"] == pytest.approx(entropy(joint) - entropy(joint.sum(1)))
    assert got["voi_merge"] == pytest.approx(entropy(joint) - entropy(joint.sum(0)))
    assert got["adapted_rand_error"] == pytest.approx(1 - 2 * (joint**2).sum() / (
        (joint.sum(0) ** 2).sum() + (joint.sum(1) ** 2).sum()))


# -- what values mean ------------------------------------------------------------------------------


@pytest.mark.parametrize("truth, pred, more, expected_truth, expected_pred", [
    ("0022", "0101", (), "0011", "0101"),                       # masks
    ("0123", "0012", (), "0123", "0012"),
    ("0012", "0004", ("--prediction-map", "4=2,*=0"), "0012", "0002"),
    ("0079", "0012", ("--label-map", "0=0,7=1,9=2"), "0012", "0012"),
    ("1221", "1222", ("--label-map", "1=0,2=1", "--prediction-map", "1=0,2=1"), "0110", "0111"),
    ("0001", "0002", ("--classes", "a", "b", "c"), "0001", "0002"),
    ("0019", "0011", ("--ignore-label", "9"), "001.", "0011"),
])
def test_values_become_class_ids(tmp_path, no_pictures, truth, pred, more, expected_truth,
                                 expected_pred):
    entry = score(tmp_path, line(truth), line(pred), *more)
    for k, scores in enumerate(entry["per_class"].values(), 1):
        pairs = list(zip(expected_truth, expected_pred))
        assert scores["tp"] == pairs.count((str(k), str(k)))
        assert scores["fn"] == sum(t == str(k) != p for t, p in pairs)
        assert scores["fp"] == sum(p == str(k) != t != "." for t, p in pairs)
    assert entry["ignored"] == expected_truth.count(".")


@pytest.mark.parametrize("truth, pred, more, words", [
    ("0014", "0012", (), ["truth.npy", "--label-map"]),
    ("0012", "0003", (), ["pred.npy", "--prediction-map"]),
    ("0011", "0012", (), ["pred.npy", "--prediction-map", "--classes"]),
    ("1221", "0110", (), ["truth.npy", "--label-map", "1=0,2=1"]),              # of ilastik
    ("0001", "0001", ("--prediction-map", "0=0,1=255"), ["--prediction-map"]),
    ("1111", "0001", ("--ignore-label", "1"), ["every voxel is ignored"]),
    ("0001", "0001", ("--segments", "mito"), ["no class mito", "class 1"]),
])
def test_values_that_are_refused(tmp_path, capsys, truth, pred, more, words):
    said = refused_pair(tmp_path, capsys, line(truth), line(pred), *more)
    assert all(word in said for word in words), said


def test_a_prediction_of_another_shape_is_refused(tmp_path, capsys):
    assert "(1, 1, 3)" in refused_pair(tmp_path, capsys, line("0011"), line("001"))


@pytest.mark.parametrize("arguments, words", [
    ((), "--prediction"), (("--prediction", "a"), "0 paths"),
    (("--prediction", "a", "--label", "c", "--runs", "d"), "--runs")])
def test_commands_that_are_refused(capsys, arguments, words):
    assert words in refused(evaluate, capsys, *arguments)


@pytest.mark.parametrize("own, drawn, given, result", [
    (VOXEL, (20.0, 8.0, 9.0), None, (20.0, 8.0, 9.0)), (VOXEL, None, None, VOXEL),
    (VOXEL, (30.0, 8.0, 8.0), (5.0, 6.0, 7.0), (5.0, 6.0, 7.0))])
def test_which_voxel_size_counts(tmp_path, own, drawn, given, result):
    paths = [save(tmp_path / f"{name}.tif", np.eye(9, dtype=np.uint8)[None].repeat(2, 0), size)
             for name, size in (("pred", own), ("truth", drawn))]
    _, [pair] = evaluate.open_pairs(evaluate.parse_args([
        "--prediction", str(paths[0]), "--label", str(paths[1]), "--volume", str(paths[0]),
        *(("--voxel-size", *map(str, given)) if given else ())]), [{}], {})
    for volume in (pair.prediction, pair.label, pair.image):
        assert volume.voxel_size == pytest.approx(result, rel=1e-5)


# -- metrics.json ----------------------------------------------------------------------------------


def test_scores_equal_those_of_emseg(tmp_path, monkeypatch, no_pictures):
    truth, pred = pair_of((7, 14, 15), 4, 20, 0.2)
    truth[4] = IGNORE
    monkeypatch.setattr(evaluate, "SLAB", 2 * 14 * 15)
    names = ["background", "a", "b", "c"]
    entry = score(tmp_path, np.where(truth == IGNORE, 77, truth), pred, "--ignore-label", 77,
                  "--classes", *names, "--organelles", "a", "3", "--no-distances")
    counts = emseg.confusion(pred, truth, 4)
    expected = emseg.scores(counts, names, [1, 3])
    assert {key: entry[key] for key in expected} == expected
    assert entry["ignored"] == (truth == IGNORE).sum() and entry["voxels"] == truth.size
    np.testing.assert_array_equal(np.array(entry["dice_of_slices"]["b"], float),
                                  emseg.dice_of_slices(counts)[:, 2])


def test_sparse_labels(tmp_path, no_pictures):
    truth, pred = pair_of((5, 12, 13), 3, 50, 0)
    entry = score(tmp_path, truth, pred, "--label-slices", "1,3")
    known = np.full_like(truth, IGNORE)
    known[[1, 3]] = truth[[1, 3]]
    assert entry["ignored"] == 3 * 12 * 13
    assert entry["miou"] == emseg.scores(emseg.confusion(pred, known, 3), ["", "a", "b"])["miou"]
    assert entry["per_class"]["class 1"]["assd_nm"] == pytest.approx(np.concatenate(
        plain_distances(known, pred, 1, VOXEL)).mean())


def test_several_pairs_and_their_mean(tmp_path, capsys, no_pictures):
    paths = []
    for name, seed, depth in (("a", 30, 3), ("b", 31, 4)):
        truth, pred = pair_of((depth, 9, 9), 3, seed, 0)
        truth[truth == (2 if name == "b" else IGNORE)] = 0      # class 2: nowhere in b's truth
        paths.append([save(tmp_path / f"{name}_{kind}.tif", array)
                      for kind, array in (("pred", pred), ("truth", truth))])
    run(evaluate, "--prediction", *(p for p, _ in paths), "--label", *(t for _, t in paths),
        "--objects", "--segments", "class 1", "--out-dir", tmp_path / "out", "--classes", "bg",
        "class 1", "class 2")
    content, printed = metrics(tmp_path / "out"), capsys.readouterr().out
    first, second = content["volumes"]
    assert content["mean"]["per_class"]["class 1"]["assd_nm"] == pytest.approx(np.mean(
        [entry["per_class"]["class 1"]["assd_nm"] for entry in (first, second)]))
    assert second["per_class"]["class 2"]["hd95_nm"] is None and "undefined" in printed
    assert content["mean"]["per_class"]["class 2"]["hd95_nm"] == first["per_class"]["class 2"][
        "hd95_nm"]
    assert content["mean"]["segments"]["voi"] == pytest.approx(
        (first["segments"]["voi"] + second["segments"]["voi"]) / 2)
    assert {row["pair"] for row in rows_of(tmp_path / "out")} == {"a_pred", "b_pred"}
    assert f"mean over pairs of the mean dice {content['mean']['dice']:.4f}" in printed
    assert f"{first['per_class']['class 1']['hd95_nm']:.1f}" in printed


def test_segments_are_drawn_worst_slice_first(monkeypatch):
    figures = []
    monkeypatch.setattr(emseg, "save_figure", lambda figure, path: figures.append(figure))
    truth = np.array([[[1, 1]], [[1, 2]], [[2, 0]]])
    evaluate.save_segments("", in_memory(truth, truth), truth, truth[:, :, ::-1], [0.5, 2.0, None])
    rows = np.reshape(figures[0].axes, (2, 3))
    assert [row[0].get_title() for row in rows] == ["image  z = 1", "image  z = 0"]
    true, pred = [axis.images[0].get_array()[0] for axis in rows[0, 1:]]
    assert (true == pred[::-1]).all() and (true[0] != true[1]).any() and true.min() > 0


# -- predictions of a run --------------------------------------------------------------------------


def test_a_run_is_scored_as_in_its_training(trained, cells, tmp_path, capsys, no_pictures):
    """Without the slices that it used, with its class names, model and seed."""
    run(evaluate, "--prediction", trained / "prediction.tif", "--label", cells / "mito.tif",
        "--volume", cells / "image.tif", "--no-distances", "--objects", "--out-dir",
        tmp_path / "out")
    _, count = ndimage.label(emseg.open_volume(cells / "mito.tif")[:], np.ones((3, 3, 3)))
    assert [row["source"] for row in rows_of(tmp_path / "out")].count("truth") == count
    before, after = metrics(trained), metrics(tmp_path / "out")
    assert before["volumes"][0].pop("used") == [2, 5, 9]
    assert set(after) <= set(before) and after["script"] == "evaluate.py"
    assert after["volumes"] == before["volumes"] and after["mean"] == before["mean"]
    assert after["volumes"][0]["ignored"] == 3 * 112 * 128
    assert "3 slices were trained" in capsys.readouterr().out
    for key in ("classes", "model", "seed", "selected_on", "parameters", "train_seconds"):
        assert after[key] == before[key] is not None, key
    assert json.loads((tmp_path / "out" / "config.json").read_text())["training"]["script"] == (
        "train_cps.py")


def test_scores_of_slices_that_were_trained_on_are_marked(trained, cells, tmp_path, capsys,
                                                          no_pictures):
    run(evaluate, "--prediction", f"{trained / 'prediction.tif'}@5:6", "--label",
        f"{cells / 'mito.tif'}@5:6", "--no-distances", "--out-dir", tmp_path / "out")
    assert "these are no test scores" in capsys.readouterr().out
    assert metrics(tmp_path / "out")["volumes"][0]["ignored"] == 0


def test_predictions_of_one_label_are_shown_side_by_side(tmp_path, monkeypatch, no_pictures):
    """They score on the same voxels: slices that one of their runs used do not score for any.
    Several crops of one label are several labels."""
    truth, drawn = line("0110") * np.array([1, 1, 1, 1, 0], np.uint8)[:, None, None], []
    preds = {"a": truth.copy(), "b": truth.copy()}
    preds["a"][[1, 4], 0, 0] = preds["b"][2] = 1
    for (name, pred), used in zip(preds.items(), (0, 3)):
        (tmp_path / name).mkdir()
        save(tmp_path / name / "prediction.tif", pred)
        content = {"script": "train_cps.py", "classes": ["bg", "mito"], "seed": 5, "model": name,
                   "volumes": [{"prediction": "prediction.tif", "used": [used]},
                               {"prediction": "prediction_other.tif", "used": [1]}]}
        for file, each in ("metrics", content), ("config", {"args": {}}):
            (tmp_path / name / f"{file}.json").write_text(json.dumps(each))
    for name in ("save_slices", "save_slice_dice"):
        monkeypatch.setattr(emseg, name, lambda path, *args, **more: drawn.append(args))
    run(evaluate, "--prediction", tmp_path / "a/prediction.tif", tmp_path / "b/prediction.tif",
        "--label", save(tmp_path / "truth.tif", truth), "--out-dir", tmp_path / "out")
    content = metrics(tmp_path / "out")
    assert [entry["slices"] for entry in content["volumes"]] == [[1, 2, 4]] * 2
    assert content["classes"] == ["bg", "mito"] and content["seed"] == 5
    assert content["model"] is None
    ([(_, image, label, shown, dice)], classes), maps, (curves, lines) = drawn
    np.testing.assert_allclose(dice[:, 1], [np.nan, (0.8 + 1) / 2, (1 + 2 / 3) / 2, np.nan, 0])
    assert {name: pred[:].tolist() for name, pred in shown.items()} == {
        name: pred.tolist() for name, pred in preds.items()}
    [(title, each, marked, _)] = curves
    assert title == "mito" and lines == ["", *preds] and list(marked) == [0, 3]
    np.testing.assert_allclose(each[[1, 2, 4], 1:], [[0.8, 1], [1, 2 / 3], [0, np.nan]])
    crops = [tmp_path / f"a/prediction.tif@{crop}" for crop in ("0:3", "3:5")]
    run(evaluate, "--prediction", *crops, "--label", tmp_path / "truth.tif", "--out-dir",
        tmp_path / "crops")
    assert [entry["slices"] for entry in metrics(tmp_path / "crops")["volumes"]] == [[1, 2], [0, 1]]
    assert len(drawn[3][0]) == 2


# -- folder and pictures ---------------------------------------------------------------------------


def test_an_evaluation_is_replaced_only_when_told_to(tmp_path, capsys, no_pictures):
    ids, out = line("0011"), tmp_path / "out"
    score(tmp_path, ids, ids, "--objects")
    arguments = ["--prediction", tmp_path / "pred.tif", "--label", tmp_path / "truth.tif",
                 "--out-dir", out]
    assert "--overwrite" in refused(evaluate, capsys, *arguments)
    run(evaluate, *arguments, "--overwrite")
    assert (out / "metrics.json").exists()
    (out / "objects_mine.csv").write_text("a person's")
    run(evaluate, *arguments, "--overwrite")
    assert (out / "objects_mine.csv").read_text() == "a person's"
    assert "holds scores" in refused(evaluate, capsys, "--runs", out, "--out-dir", out,
                                     "--overwrite")
    inside = shutil.copy(tmp_path / "truth.tif", out)
    assert "lies in it" in refused(evaluate, capsys, *arguments[:3], inside, "--out-dir", out,
                                   "--overwrite")


def test_all_pictures_are_there_and_none_is_blank(tmp_path):
    grid = np.indices((12, 40, 40))
    truth = (((grid[0] - 6) * 2.5) ** 2 + (grid[1] - 18) ** 2 + (grid[2] - 18) ** 2 < 144) * 1
    truth[:, :20] *= 2
    pred = truth.copy()
    pred[3:9, 30:38, 4:16] = 1
    paths = [save(tmp_path / f"{name}.tif", array.astype(np.uint8))
             for name, array in (("pred", pred), ("truth", truth), ("image", truth * 99))]
    run(evaluate, "--prediction", paths[0], "--label", paths[1], "--volume", paths[2], "--render",
        "--out-dir", tmp_path / "out", "--no-distances")
    pictures = {path.stem: imread(path)[..., :3] for path in (tmp_path / "out").glob("*.png")}
    assert set(pictures) == {"figure", "maps", "slice_dice", "render_pred"}
    assert all(picture.std() > 0.03 for picture in pictures.values())
