"""evaluate.py for pairs of volumes: its metrics against slow formulas, the command, its pictures.

test_runs.py tests its tables of runs.
"""

import csv
import itertools
import json
import math
import os
import time
import types
from pathlib import Path

import matplotlib.colors
import numpy as np
import pytest
import tifffile
from matplotlib.image import imread
from scipy import ndimage

import emseg
import evaluate
import train_partial
from conftest import InMemory, metrics, readme_commands, refused, run

IGNORE = emseg.IGNORE
VOXEL = (20.0, 8.0, 8.0)
SIZES = [(1.0, 1.0, 1.0), VOXEL, (50.0, 4.6, 4.6), (1.0, 30.0, 7.0)]
SLICES = [1, 2, 3, 100]                 # of a slab


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


def slabs_of(monkeypatch, shape, slices):
    monkeypatch.setattr(evaluate, "SLAB", slices * shape[1] * shape[2])


def save(path, array, voxel_size=VOXEL):
    """Write an array as TIFF, MRC or NPY; returns the path."""
    if path.suffix == ".npy":
        np.save(path, array)
        return path
    with emseg.create_volume(path, array.shape, array.dtype, voxel_size) as writer:
        writer[:] = array
    return path


def opened(*arguments):
    """(classes, pairs, notes) of the command."""
    return evaluate.open_pairs(evaluate.parse_args(list(map(str, arguments))))


def opened_arrays(folder, truth, pred, *more, dtypes=(np.uint8, np.uint8)):
    for name, array, dtype in zip(("truth", "pred"), (truth, pred), dtypes):
        np.save(folder / f"{name}.npy", np.array(array, dtype))
    return opened("--prediction", folder / "pred.npy", "--label", folder / "truth.npy", *more)


def score(folder, truth, pred, *more, voxel_size=VOXEL, fine=False):
    """The entry of metrics.json for two arrays, of the command."""
    paths = [save(folder / f"{name}.tif", array, voxel_size)
             for name, array in (("pred", pred), ("truth", truth))]
    run(evaluate, "--prediction", paths[0], "--label", paths[1], "--out-dir", folder / "out",
        *more, fine=fine)
    return metrics(folder / "out")["volumes"][0]


def rows_of(folder):
    with open(folder / "objects.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def no_pictures(monkeypatch):
    """The command without its pictures, which take most of its time."""
    for module, name in ((emseg, "save_slices"), (emseg, "save_slice_dice"),
                         (evaluate, "save_confusion")):
        monkeypatch.setattr(module, name, lambda *args, **options: None)


def counts_of(truth, pred, n):
    """Confusion counts (Z, n, n), one voxel class after the other."""
    return np.array([[[((t == a) & (p == b)).sum() for b in range(n)] for a in range(n)]
                     for t, p in zip(truth, pred)])


# -- counting --------------------------------------------------------------------------------------

# raw values: of class 2, 0, 1 and ignored in labels; of class 1, 2, 0 and 1 in predictions
VALUES = {"uint8": (2, 9, 200, 255), "int8": (-128, -1, 0, 127), "uint16": (0, 300, 65535, 256),
          "int16": (-300, -1, 32767, 256), "int32": (-70000, 0, 70000, 2**31 - 1),
          "uint32": (0, 3, 2**31, 2**32 - 1), "float32": (-1, 0, 65536, 300)}


@pytest.mark.parametrize("label_type, pred_type", [*itertools.product(VALUES, repeat=2)])
def test_counts_are_those_of_a_plain_confusion_matrix(tmp_path, monkeypatch, label_type, pred_type):
    rng = np.random.default_rng(0)
    truth, pred = rng.integers(0, 4, (2, 3, 9, 11))
    a, b, c, ignored = VALUES[label_type]
    d, e, f, g = VALUES[pred_type]
    read, reads = emseg.Volume.read, []
    monkeypatch.setattr(emseg.Volume, "read", lambda self, z, *yx: reads.extend(
        (self.path, s) for s in range(z.start, z.stop)) or read(self, z, *yx))
    classes, [pair], _ = opened_arrays(
        tmp_path, np.array([a, b, c, ignored])[truth], np.array([d, e, f, g])[pred],
        f"--label-map={a}=2,{b}=0,{c}=1", "--ignore-label", ignored,
        f"--prediction-map={d}=1,{e}=2,{f}=0,{g}=1", dtypes=(label_type, pred_type))
    truth, pred = np.array([2, 0, 1, IGNORE])[truth], np.array([1, 2, 0, 1])[pred]
    np.testing.assert_array_equal(pair.counts, counts_of(truth, pred, 3))
    assert sorted(reads) == [(str(tmp_path / f"{name}.npy"), z) for name in ("pred", "truth")
                             for z in range(3)]
    np.testing.assert_array_equal(pair.label[:], truth)
    np.testing.assert_array_equal(pair.prediction[:], pred)
    assert len(classes) == 3


@pytest.mark.parametrize("types", [("uint16", "uint16"), ("int32", "uint16"), ("uint8", "int32"),
                                   ("int32", "float32")])
@pytest.mark.parametrize("n, m", [(1, 65536), (65536, 1), (256, 256), (300, 300), (5000, 5000)])
def test_pairs_of_many_values(types, n, m):
    rng = np.random.default_rng(0)
    drawn, found = [rng.permutation(np.arange(65536) % k).reshape(1, 256, 256).astype(dtype)
                    for k, dtype in zip((n, m), types)]
    label, volume = InMemory(drawn), InMemory(found)
    pairs, *tallies = emseg.count_pairs(label, np.arange(1), volume)
    rows, voxels = np.unique(np.stack([drawn.ravel(), found.ravel()]).astype(int), axis=1,
                             return_counts=True)
    got = np.stack(pairs[0])
    np.testing.assert_array_equal(got[:, np.lexsort(got[1::-1])], [*rows, voxels])
    for array, tally in zip((drawn, found), tallies):
        np.testing.assert_array_equal(tally[0], np.unique(array.astype(int), return_counts=True))
    assert label.read_slices == volume.read_slices == [0]


def test_slices_without_label_are_not_read_and_not_counted():
    label, volume = InMemory(np.ones((2, 3, 4), np.uint8)), InMemory(np.ones((5, 3, 4), np.uint8))
    pairs, *tallies = emseg.count_pairs(label, np.array([-1, 1, -1, -1, 0]), volume)
    assert [*pairs] == [*tallies[0]] == [*tallies[1]] == [1, 4]
    assert label.read_slices == [1, 0] and volume.read_slices == [1, 4]


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
    if not all(side.any() for side in sides):
        return [np.empty(0), np.empty(0)]
    return [np.sort(ndimage.distance_transform_edt(~other, size)[own])
            for own, other in (sides, sides[::-1])]


def distances_of(truth, pred, n, size, folder):
    return evaluate.surface_distances(InMemory(pred), InMemory(truth), n, size, folder)


@pytest.mark.parametrize("shape", [(9, 14, 17), (1, 20, 15), (7, 1, 12), (2, 9, 9)])
@pytest.mark.parametrize("ignored", [0, 0.3])
def test_surface_voxels(shape, ignored):
    ids = blobs(shape, 4, ignored=ignored)
    np.testing.assert_array_equal(evaluate.surface_voxels(ids), plain_surface(ids))


@pytest.mark.parametrize("slices", SLICES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ignored", [0, 0.2])
def test_distances_are_those_of_distance_transforms(monkeypatch, tmp_path, slices, size, ignored):
    truth, pred = pair_of((9, 14, 17), 4, 3, ignored)
    slabs_of(monkeypatch, truth.shape, slices)
    for k, got in enumerate(distances_of(truth, pred, 4, size, tmp_path), 1):
        expected = plain_distances(truth, pred, k, size)
        for (values, counts), plain in zip(got, expected):
            assert (np.diff(values) > 0).all()
            np.testing.assert_allclose(np.repeat(values, counts), plain, rtol=1e-6)
        scores = evaluate.hd95_and_assd(got)
        assert scores["hd95_nm"] == pytest.approx(max(np.percentile(e, 95) for e in expected))
        assert scores["assd_nm"] == pytest.approx(np.concatenate(expected).mean())
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("slices", SLICES)
def test_a_class_that_is_far_away_in_other_slabs(monkeypatch, tmp_path, slices):
    truth, pred = np.zeros((2, 30, 8, 8), np.uint8)
    truth[2:4, 2:5, 2:5], pred[25:27, 2:5, 3:6] = 1, 1
    slabs_of(monkeypatch, truth.shape, slices)
    size = (5.0, 1.0, 2.0)
    got = evaluate.hd95_and_assd(distances_of(truth, pred, 2, size, tmp_path)[0])
    plain = plain_distances(truth, pred, 1, size)
    assert got["hd95_nm"] == pytest.approx(np.percentile(plain[0], 95))
    assert got["assd_nm"] == pytest.approx(np.concatenate(plain).mean())
    assert got["assd_nm"] > 22 * 5


def test_the_nearest_voxel_may_lie_in_a_far_slab(monkeypatch, tmp_path):
    truth, pred = np.zeros((2, 12, 3, 9), np.uint8)
    truth[1, 1, 1] = pred[1, 1, 8] = pred[9, 1, 1] = 1
    slabs_of(monkeypatch, truth.shape, 1)
    [(forth, back)] = distances_of(truth, pred, 2, (1.0, 30.0, 30.0), tmp_path)
    assert forth[0].tolist() == [8] and back[0].tolist() == [8, 210]


@pytest.mark.parametrize("side", [0, 1])
def test_a_class_in_one_volume_only_has_no_distances(tmp_path, side):
    volumes = np.zeros((2, 4, 5, 6), np.uint8)
    volumes[side, 1:3, 1:3, 1:3] = 1
    [directions] = distances_of(*volumes, 2, VOXEL, tmp_path)
    assert evaluate.hd95_and_assd(directions) == {"hd95_nm": None, "assd_nm": None}


def test_hd95_is_the_larger_of_both_directions_and_assd_weighs_all_voxels():
    few, many = np.array([1.0, 2.0]), np.array([10.0, 20.0])
    directions = [(few, np.array([3, 1])), (many, np.array([1, 1]))]
    for both in (directions, directions[::-1]):
        assert evaluate.hd95_and_assd(both) == {"hd95_nm": 19.5, "assd_nm": pytest.approx(35 / 6)}


@pytest.mark.parametrize("q", [0, 5, 50, 95, 100])
def test_percentile_of_values_that_occur_often(q):
    rng = np.random.default_rng(q)
    for n in (1, 2, 21, 50):
        values, counts = np.sort(rng.random(n)), rng.integers(1, 9, n)
        expected = np.percentile(np.repeat(values, counts), q)
        assert evaluate.percentile(values, counts, q) == pytest.approx(expected)


# -- objects ---------------------------------------------------------------------------------------

STRUCTURES = {n: ndimage.generate_binary_structure(3, rank) for n, rank in ((6, 1), (18, 2),
                                                                            (26, 3))}


def parts_of(truth, pred, connectivity=26, size=VOXEL, **options):
    return evaluate.find_parts(InMemory(pred), InMemory(truth), STRUCTURES[connectivity], size,
                               **options)


def plain_parts(ids, known, connectivity, size):
    """(class, voxels, box, centroid, surface) and mask of each part, from the whole volume."""
    areas = evaluate.crofton_areas(size)
    for k in np.unique(ids[(ids > 0) & known]):
        labels, n = ndimage.label((ids == k) & known, STRUCTURES[connectivity])
        for number in range(1, n + 1):
            mask = labels == number
            places = np.argwhere(mask)
            surface = 0
            for step, area in areas.items():
                for there in (places + step, places - step):
                    there = there[((there >= 0) & (there < ids.shape)).all(1)].T
                    surface += area * ((ids != k) & known)[tuple(there)].sum()
            yield (int(k), len(places), *places.min(0), *(places.max(0) + 1),
                   *(places.mean(0) + 0.5).round(6), round(surface, 4)), mask


def described(parts):
    return [(int(k), int(voxels), *low, *high, *centroid.round(6), round(float(surface), 4))
            for k, voxels, low, high, centroid, surface in zip(
                parts.class_id, parts.voxels, parts.low, parts.high, parts.centroid,
                parts.surface)]


def assert_parts_are_plain(truth, pred, connectivity, size=VOXEL):
    """Compare parts and overlaps with those of the whole volumes."""
    known = truth != IGNORE
    *parts, (t, p, shared) = parts_of(truth, pred, connectivity, size)
    got = [described(part) for part in parts]
    plain = [list(plain_parts(ids, known, connectivity, size)) for ids in (truth, pred)]
    for found, expected in zip(got, plain):
        np.testing.assert_allclose(sorted(found), sorted(a for a, _ in expected), rtol=1e-6)
    overlaps = sorted((a[:-1], b[:-1], int((m & n).sum())) for a, m in plain[0]
                      for b, n in plain[1] if (m & n).any())
    assert sorted((got[0][i][:-1], got[1][j][:-1], int(n))
                  for i, j, n in zip(t, p, shared)) == overlaps


@pytest.mark.parametrize("slices", SLICES)
@pytest.mark.parametrize("connectivity", STRUCTURES)
@pytest.mark.parametrize("ignored", [0, 0.15])
def test_parts_are_those_of_the_whole_volume(monkeypatch, slices, connectivity, ignored):
    truth, pred = pair_of((7, 12, 13), 3, 5, ignored, smooth=0.55)
    slabs_of(monkeypatch, truth.shape, slices)
    assert_parts_are_plain(truth, pred, connectivity)


def drawn_parts():
    """Shapes that slabs tear apart: {name: ids}."""
    shapes = {name: np.zeros((8, 11, 11), np.uint8) for name in
              ("U", "upside down", "comb", "spiral", "one slice", "stairs", "changes class")}
    shapes["U"][:, 2, [2, 8]] = shapes["U"][7, 2, 2:9] = 1
    shapes["upside down"][:, 2, [2, 8]] = shapes["upside down"][0, 2, 2:9] = 1
    shapes["comb"][:, 2, ::2] = shapes["comb"][7, 2] = 1
    shapes["comb"][:, 8, ::2] = shapes["comb"][0, 8] = 2
    for z, turn in enumerate(np.arange(8) * math.pi / 3):
        for step in np.linspace(0, math.pi / 3, 9):
            shapes["spiral"][z, int(5.5 + 4 * math.sin(turn + step)),
                             int(5.5 + 4 * math.cos(turn + step))] = 1
    shapes["one slice"][[2, 4], 3:6, 3:6] = 1
    shapes["one slice"][3, 8:, 8:] = shapes["one slice"][7, 0, 0] = 2
    shapes["stairs"][np.arange(8), np.arange(8), np.arange(8)] = 1
    shapes["stairs"][np.arange(8), 10, np.arange(8)] = 2
    shapes["changes class"][:4, 5, 5], shapes["changes class"][4:, 5, 5] = 1, 2
    return shapes


@pytest.mark.parametrize("name", drawn_parts())
@pytest.mark.parametrize("slices", SLICES)
def test_parts_are_joined_over_slabs(monkeypatch, name, slices):
    ids = drawn_parts()[name]
    slabs_of(monkeypatch, ids.shape, slices)
    for connectivity in STRUCTURES:
        assert_parts_are_plain(ids, np.flip(ids, 2).copy(), connectivity)


@pytest.mark.parametrize("connectivity, n", [(6, 8), (18, 8), (26, 1)])
def test_connectivity_counts_at_the_seams_of_slabs(monkeypatch, connectivity, n):
    ids = drawn_parts()["stairs"] == 1
    slabs_of(monkeypatch, ids.shape, 1)
    truth, *_ = parts_of(ids.astype(np.uint8), ids.astype(np.uint8), connectivity)
    assert len(truth.voxels) == n


def test_parts_at_the_border():
    ids = np.zeros((4, 9, 9), np.uint8)
    ids[0, 1, 1] = ids[3, 3, 3] = ids[1, 0, 5] = ids[1, 8, 5] = ids[1, 5, 0] = ids[1, 5, 8] = 1
    ids[1:3, 3:7, 5:7] = 2
    parts = parts_of(ids, ids)[0]
    assert parts.at_border().tolist() == (parts.class_id == 1).tolist()
    flat = ids[1:2].copy()
    parts = parts_of(flat, flat)[0]
    assert parts.at_border().sum() == 4 and len(parts.voxels) == 5


@pytest.mark.parametrize("label", [np.zeros((3, 4, 5), np.uint8),
                                   np.full((3, 4, 5), IGNORE, np.uint8)])
def test_volumes_without_parts(monkeypatch, label):
    monkeypatch.setattr(evaluate, "SLAB", 1)
    truth, pred, overlaps = parts_of(label, np.zeros((3, 4, 5), np.uint8))
    assert len(truth.voxels) == len(pred.voxels) == len(overlaps[2]) == 0
    scores, matches = evaluate.match_objects(truth, pred, overlaps, ["background", "a"], 1)
    assert set(scores["a"].values()) == {0, None} and not matches
    assert evaluate.segment_scores(truth, pred, overlaps)["voi"] is None


# -- their surfaces


def surface_of(mask, size):
    return float(parts_of(mask.astype(np.uint8), mask.astype(np.uint8), size=size)[0].surface[0])


@pytest.mark.parametrize("size", [(1.0, 1.0, 1.0), VOXEL, (50.0, 4.6, 4.6)])
@pytest.mark.parametrize("voxels, error", [(3, 0.03), (4.3, 0.03), (6, 0.013), (9, 0.013)])
def test_surfaces_of_balls_are_within_the_promised_error(size, voxels, error):
    """Of balls of as many voxels, around the middle of a voxel and around random places."""
    sides = [2 * math.ceil(voxels * max(size) / s) + 5 for s in size]
    grid = np.ogrid[tuple(slice(side) for side in sides)]
    for middle in (np.zeros(3), *(np.random.default_rng(0).random((3, 3)) - 0.5)):
        ball = sum(((g - side // 2 + m) * s) ** 2 for g, side, m, s in
                   zip(grid, sides, middle, size)) <= (voxels * max(size)) ** 2
        radius = (ball.sum() * np.prod(size) * 3 / 4 / math.pi) ** (1 / 3)
        assert surface_of(ball, size) == pytest.approx(4 * math.pi * radius**2, rel=error)


@pytest.mark.parametrize("size, cube, plate", [
    ((1.0, 1.0, 1.0), 0.10, 0.10), (VOXEL, 0.13, 0.15), ((50.0, 5.0, 5.0), 0.21, 0.33)])
def test_flat_surfaces_are_as_low_as_the_docstring_says(size, cube, plate):
    sides = np.array([round(400 / s) if size[0] > 1 else 20 for s in size])
    area = 2 * (sides * size).prod() * (1 / (sides * size)).sum()
    whole = surface_of(np.pad(np.ones(sides, bool), 2), size)
    assert whole / area == pytest.approx(1 - cube, abs=0.01)
    ends = surface_of(np.pad(np.ones((2, 90, 90), bool), ((3, 3), (0, 0), (0, 0))), size)
    assert ends / (2 * 90**2 * size[1] * size[2]) == pytest.approx(1 - plate, abs=0.015)


def test_areas_of_crossings_are_the_weights_of_legland():
    """Table 1 of Legland et al. 2007, for isotropic voxels."""
    weights = {1: 0.0457779, 2: 0.0369806, 3: 0.0351956}
    for step, area in evaluate.crofton_areas((1, 1, 1)).items():
        n = np.abs(step).sum()
        assert area == pytest.approx(4 * weights[n] / math.sqrt(n), rel=0.01)


@pytest.mark.parametrize("size", SIZES)
def test_areas_of_crossings_stand_for_the_directions_around_them(size):
    rng = np.random.default_rng(0)
    rays = rng.normal(size=(200_000, 3))
    areas = evaluate.crofton_areas(size)
    assert {max(step, tuple(-s for s in step)) for step in itertools.product((-1, 0, 1), repeat=3)
            if any(step)} == {max(step, tuple(-s for s in step)) for step in areas}
    ways = np.array([*areas]) * size
    long = np.linalg.norm(ways, axis=1)
    share = np.bincount(np.abs(rays @ (ways / long[:, None]).T).argmax(1), minlength=13) / len(rays)
    np.testing.assert_allclose([*areas.values()], 2 * share * np.prod(size) / long, rtol=0.06,
                               atol=1e-3 * np.prod(size) / long.min())


# -- which objects match


def line(text):
    """A volume of one row from its digits; a point is background."""
    return np.array([[list(text.replace(".", "0"))]]).astype(np.uint8)


#         same   split      merger      half  class small
TRUTH = "11111..1111111111..111111.1111..1111..111..1..."
PREDS = "11111..111111.111..11111111111..11....222..1..."


@pytest.mark.parametrize("least, small", [(1, 1), (2, 0)])
def test_objects_match_as_by_hand(least, small):
    classes = ["background", "a", "b", "c"]
    scores, matches = evaluate.match_objects(*parts_of(line(TRUTH), line(PREDS)), classes, least)
    quality, matched = 1 + 6 / 10 + 6 / 11 + small, 3 + small
    truth, predicted = 6 + small, 5 + small
    assert scores["a"] == {
        "truth": truth, "predicted": predicted, "matched": matched,
        "precision": pytest.approx(matched / predicted), "recall": pytest.approx(matched / truth),
        "f1": pytest.approx(matched / (matched + (predicted - matched) / 2
                                       + (truth - matched) / 2)),
        "pq": pytest.approx(quality / ((truth + predicted) / 2)),
        "sq": pytest.approx(quality / matched)}
    assert scores["b"] == {"truth": 0, "predicted": 1, "matched": 0, "precision": 0.0, "f1": 0.0,
                           "recall": None, "pq": 0.0, "sq": None}
    assert set(scores["c"].values()) == {0, None}
    assert sorted(iou for _, iou in matches.values()) == pytest.approx(
        [6 / 11, 6 / 10, 1, 1][: matched])


def test_an_object_of_the_least_size_counts():
    volume = line("11..111")
    scores, _ = evaluate.match_objects(*parts_of(volume, volume), ["background", "a"], 2)
    assert scores["a"]["truth"] == scores["a"]["predicted"] == scores["a"]["matched"] == 2


@pytest.mark.parametrize("side", [0, 1])
def test_a_partner_that_is_too_small_is_no_match(side):
    volumes = [line("1111..111"), line("111...111")]
    truth, pred = volumes if side else volumes[::-1]
    scores, matches = evaluate.match_objects(*parts_of(truth, pred), ["background", "a"], 4)
    assert scores["a"]["matched"] == 0 and not matches
    assert scores["a"]["truth"] == side and scores["a"]["predicted"] == 1 - side


def test_ignored_voxels_belong_to_no_object(tmp_path, no_pictures):
    truth, pred = line("1111111..55555"), line("111111111.1111")
    entry = score(tmp_path, truth, pred, "--ignore-label", 5, "--objects")
    assert entry["objects"]["class 1"] == {
        "truth": 1, "predicted": 1, "matched": 1, "precision": 1.0, "recall": 1.0, "f1": 1.0,
        "pq": pytest.approx(7 / 9), "sq": pytest.approx(7 / 9)}
    assert entry["ignored"] == 5


# -- objects.csv


def test_objects_csv(tmp_path, monkeypatch, no_pictures):
    truth, pred = pair_of((6, 24, 26), 3, 7, 0.1)
    slabs_of(monkeypatch, truth.shape, 2)
    entry = score(tmp_path, np.where(truth == IGNORE, 9, truth), pred, "--objects", "--min-voxels",
                  3, "--ignore-label", 9, "--connectivity", 6, "--classes", "background", "a", "b")
    rows = rows_of(tmp_path / "out")
    assert list(rows[0]) == list(evaluate.OBJECT_COLUMNS)
    numbers = [key for key in rows[0] if key.endswith("_nm")]
    for source, ids in (("truth", truth), ("prediction", pred)):
        expected = []
        for (k, voxels, *box, z, y, x, surface), _ in plain_parts(ids, truth != IGNORE, 6, VOXEL):
            if voxels >= 3:
                expected.append((k, voxels, voxels * np.prod(VOXEL), surface, *(
                    np.array([z, y, x, *box]) * (VOXEL * 3))))
        own = [row for row in rows if row["source"] == source]
        got = [("background a b".split().index(row["class"]), int(row["voxels"]),
                float(row["volume_nm3"]), float(row["surface_nm2"]),
                *(float(row[key]) for key in numbers)) for row in own]
        np.testing.assert_allclose(sorted(got), sorted(expected), rtol=1e-4)
        assert len({row["id"] for row in own}) == len(own)
        for row in own:
            edge = [float(row[f"box_{axis}{end}_nm"]) for end in (0, 1) for axis in "zyx"]
            assert row["at_border"] == str(int(0 in edge[:3] or any(
                b == n * s for b, n, s in zip(edge[3:], truth.shape, VOXEL))))
    partner = {source: {row["id"]: (row["match"], row["iou"]) for row in rows
                        if row["source"] == source and row["match"]}
               for source in ("truth", "prediction")}
    assert partner["prediction"] == {match: (own, iou) for own, (match, iou) in
                                     partner["truth"].items()}
    assert len(partner["truth"]) == sum(s["matched"] for s in entry["objects"].values()) > 1
    by_id = {(row["source"], row["id"]): row for row in rows}
    for own, (match, iou) in partner["truth"].items():
        assert by_id["truth", own]["class"] == by_id["prediction", match]["class"]
        assert 0.5 < float(iou) <= 1


def test_objects_csv_without_voxel_size(tmp_path, capsys, no_pictures):
    ids = line("11..1")
    entry = score(tmp_path, ids, ids, "--objects", voxel_size=None)
    rows = rows_of(tmp_path / "out")
    assert [row["voxels"] for row in rows] == ["2", "1"] * 2
    assert {row[key] for row in rows for key in row if "nm" in key} == {""}
    assert [row["match"] for row in rows] == ["1", "2"] * 2
    assert entry["per_class"]["class 1"]["hd95_nm"] is None
    assert "give --voxel-size Z Y X" in capsys.readouterr().out


# -- segments --------------------------------------------------------------------------------------


def segments_of(truth, pred):
    """segment_scores of what class 1 separates."""
    return evaluate.segment_scores(*parts_of(
        truth, pred, 6, choose=lambda ids: (ids != 1).astype(np.uint8), thin=True))


@pytest.mark.parametrize("truth, pred, split, merge, precision, recall", [
    ("00011000", "00000000", 0, 1, 1 / 2, 1),
    ("00000000", "00011000", 1, 0, 1, 1 / 2),
    ("000000000000", "011110000000", 2 - 0.75 * math.log2(3), 0, 1, 90 / 144),     # thinned: 3, 9
    ("00011000", "00011000", 0, 0, 1, 1),
    ("000110000011000", "001111000111110", 0, 0, 1, 1),
])
def test_segments_as_by_hand(truth, pred, split, merge, precision, recall):
    got = segments_of(line(truth), line(pred))
    error = 1 - 2 * precision * recall / (precision + recall)
    assert got == {
        "truth": truth.count("10") + 1, "predicted": pred.count("10") + 1,
        "voi": pytest.approx(split + merge), "voi_split": pytest.approx(split),
        "voi_merge": pytest.approx(merge), "adapted_rand_error": pytest.approx(error),
        "rand_precision": pytest.approx(precision), "rand_recall": pytest.approx(recall)}


@pytest.mark.parametrize("seed", range(4))
def test_segment_scores_are_those_of_a_dense_table(seed):
    rng = np.random.default_rng(seed)
    table = rng.integers(0, 40, (5, 7)) * (rng.random((5, 7)) < 0.6)
    table[0, 0] = 3
    t, p = np.nonzero(table)
    sides = [types.SimpleNamespace(voxels=np.ones(n)) for n in table.shape]
    got = evaluate.segment_scores(*sides, (t, p, table[t, p]))
    joint = table / table.sum()

    def entropy(share):
        return -sum(s * math.log2(s) for s in np.ravel(share) if s)

    split, merge = [entropy(joint) - entropy(joint.sum(axis)) for axis in (1, 0)]
    together, of_truth, of_pred = [(counts**2).sum() for counts in (
        table.astype(float), table.sum(1).astype(float), table.sum(0).astype(float))]
    assert (got["truth"], got["predicted"]) == (5, 7)
    assert (got["voi_split"], got["voi_merge"]) == pytest.approx((split, merge))
    assert got["voi"] == pytest.approx(split + merge)
    assert got["rand_precision"] == pytest.approx(together / of_pred)
    assert got["rand_recall"] == pytest.approx(together / of_truth)
    assert got["adapted_rand_error"] == pytest.approx(1 - 2 * together / (of_truth + of_pred))


@pytest.fixture(scope="module")
def tissue():
    """Cells with thin membrane (class 1), and the same with thicker membrane."""
    grid = np.random.default_rng(0).random((9, 3)) * (5, 60, 60)
    places = np.stack(np.indices((5, 60, 60)), -1)[..., None, :]
    cell = (((places - grid) * (3, 1, 1)) ** 2).sum(-1).argmin(-1)
    cell[:] = cell[2]                           # walls are upright
    wall = np.zeros(cell.shape, bool)
    wall[:, 1:] |= cell[:, 1:] != cell[:, :-1]
    wall[..., 1:] |= cell[..., 1:] != cell[..., :-1]
    thick = np.stack([ndimage.binary_dilation(page) for page in wall])
    return wall.astype(np.uint8), thick.astype(np.uint8)


@pytest.mark.parametrize("slices", SLICES)
@pytest.mark.parametrize("more", [(), ("--segments-2d",)])
def test_thicker_membrane_is_no_error(tissue, tmp_path, monkeypatch, no_pictures, slices, more):
    wall, thick = tissue
    slabs_of(monkeypatch, wall.shape, slices)
    got = score(tmp_path, wall, thick, "--segments", "class 1", *more)["segments"]
    assert got["truth"] == got["predicted"] > 5 * (5 if more else 1)
    assert got["voi"] == pytest.approx(0, abs=1e-9) and got["adapted_rand_error"] < 1e-9


@pytest.mark.parametrize("slices", SLICES)
def test_random_segments_do_not_depend_on_slabs(monkeypatch, slices):
    truth, pred = pair_of((8, 20, 21), 2, 11, 0.1)
    known = truth != IGNORE
    labels = [ndimage.label((ids != 1) & known)[0] for ids in (truth, pred)]
    grown = [page[tuple(ndimage.distance_transform_edt(page == 0, VOXEL[1:], return_distances=False,
                                                       return_indices=True))] for page in labels[1]]
    table = np.zeros([labels[0].max() + 1, labels[1].max() + 1], int)
    np.add.at(table, (labels[0], np.array(grown)), 1)
    table = table[1:, 1:]
    t, p = np.nonzero(table)
    sides = [types.SimpleNamespace(voxels=np.ones(n)) for n in table.shape]
    expected = evaluate.segment_scores(*sides, (t, p, table[t, p]))
    slabs_of(monkeypatch, truth.shape, slices)
    assert segments_of(truth, pred) == pytest.approx(expected)


def test_growing_respects_the_sides_of_voxels():
    page = np.zeros((3, 9, 9), np.int64)
    page[0, 0, 4], page[0, 4, 6], page[2, 0, 0] = 1, 2, 7
    grown = evaluate.grow(page.copy(), (50.0, 1.0, 10.0))
    assert grown[0, 4, 4] == 1 and grown[0, 4, 6] == 2
    assert not grown[1].any() and (grown[2] == 7).all()
    assert evaluate.grow(page.copy(), (50.0, 10.0, 1.0))[0, 4, 4] == 2


def test_segments_in_2d_are_regions_of_each_slice(tmp_path, no_pictures):
    ids = np.zeros((3, 4, 9), np.uint8)
    ids[0, :, 4] = ids[1, :, 5] = ids[2, :, 4] = 1
    counts = [score(tmp_path, ids, ids, "--segments", 1, "--overwrite", *more)["segments"]["truth"]
              for more in ((), ("--segments-2d",))]
    assert counts == [2, 6]


def test_a_slanted_membrane_separates_and_ignored_voxels_do_too(tmp_path, no_pictures):
    ids = np.eye(9, dtype=np.uint8)[None] * 2
    ids[0, 4, 4] = 9
    got = score(tmp_path, ids, np.where(ids == 9, 0, ids), "--segments", "class 2",
                "--ignore-label", 9, "--label-map", "0=0,1=1,2=2", "--prediction-map",
                "0=0,1=1,2=2")["segments"]
    assert got["truth"] == got["predicted"] == 2 and got["voi"] == 0


# -- what values mean ------------------------------------------------------------------------------


@pytest.mark.parametrize("truth, pred, more, expected_truth, expected_pred, n", [
    ("0123", "0014", (), "0123", "0014", 5),                    # ids spread over both
    ("0022", "0012", (), "0022", "0012", 3),
    ("0022", "0101", (), "0011", "0101", 2),                    # masks
    ("0033", "0909", (), "0011", "0101", 2),
    ("0000", "0000", (), "0000", "0000", 2),
    ("0012", "0004", ("--prediction-map", "4=2,*=0"), "0012", "0002", 3),
    ("5678", "0123", ("--label-map", "5:7=1,*=0"), "1100", "0123", 4),
    ("0079", "0012", ("--label-map", "0=0,7=1,9=2"), "0012", "0012", 3),
    ("0001", "0001", ("--classes", "a", "b", "c"), "0001", "0001", 3),
    ("0019", "0012", ("--ignore-label", "9"), "001.", "0012", 3),
    ("0019", "0012", ("--label-map", "9=255,*=1"), "111.", "0012", 3),
])
def test_values_become_class_ids(tmp_path, truth, pred, more, expected_truth, expected_pred, n):
    classes, [pair], _ = opened_arrays(tmp_path, line(truth), line(pred), *more)
    expected = [255 if c == "." else int(c) for c in expected_truth]
    assert len(classes) == n and pair.label[:].ravel().tolist() == expected
    assert pair.prediction[:].ravel().tolist() == [int(c) for c in expected_pred]
    np.testing.assert_array_equal(pair.counts[0], counts_of(
        np.array([expected]), pair.prediction[0], n)[0])


@pytest.mark.parametrize("values", [(0, 255), (0, 1)])
def test_a_mask_of_255_equals_one_of_1(tmp_path, values):
    truth, pred = pair_of((3, 8, 9), 2, 0, 0)
    _, [pair], notes = opened_arrays(tmp_path, truth * values[1], pred)
    np.testing.assert_array_equal(pair.counts, counts_of(truth, pred, 2))
    said = [note for note in notes if "255 as class 1" in note and "truth.npy" in note]
    assert len(said) == (values[1] == 255)


@pytest.mark.parametrize("truth, pred, more, words", [
    ("0014", "0012", (), ["truth.npy", "--label-map", "0, 1, 4"]),
    ("0012", "0014", (), ["pred.npy", "--prediction-map", "0, 1, 4"]),
    ("0012", "0003", (), ["pred.npy", "--prediction-map", "class ids 0 to 2"]),
    ("0003", "0012", (), ["truth.npy", "--label-map", "class ids 0 to 2"]),
    ("0012", "0003", ("--classes", "a", "b", "c"), ["pred.npy", "--prediction-map"]),
    ("0012", "0001", ("--classes", "a", "b"), ["truth.npy", "--label-map"]),
    ("0012", "0001", ("--classes", "a", "b", "b"), ["--classes names b twice"]),
    ("0012", "0001", ("--label-map", "0=0,1=1"), ["truth.npy", "--label-map", "2"]),
    ("0012", "0003", ("--prediction-map", "0=0,1=1"), ["pred.npy", "--prediction-map", "3"]),
    ("0001", "0001", ("--prediction-map", "0=0,1=255"), ["--ignore-label", "255"]),
    ("0001", "0001", ("--label-map", "0:2=255"), ["every voxel is ignored"]),
    ("1111", "0001", ("--ignore-label", "1"), ["every voxel is ignored"]),
    ("0001", "0001", ("--segments", "2"), ["--segments", "no class 2", "class 1"]),
    ("0001", "0001", ("--organelles", "mito"), ["--organelles", "no class mito"]),
    ("0001", "0001", ("--label-map", "0=0;1=1"), ["label map"]),
    ("0001", "0001", ("--label-slices", "3"), ["3", "outside"]),
])
def test_values_that_are_refused(tmp_path, capsys, truth, pred, more, words):
    for name, text in (("truth", truth), ("pred", pred)):
        np.save(tmp_path / f"{name}.npy", line(text))
    said = refused(evaluate, capsys, "--prediction", tmp_path / "pred.npy", "--label",
                   tmp_path / "truth.npy", "--out-dir", tmp_path / "out", *more)
    assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("array, words", [
    (np.full((2, 4, 6), 0.5, np.float32), ["whole numbers", "probability"]),
    (np.full((2, 4, 6), np.nan, np.float32), ["whole numbers"]),
    (np.zeros((4, 6, 2), np.uint8), ["another order", "(Z, Y, X)"]),
    (np.zeros((2, 4, 5), np.uint8), ["(2, 4, 5)", "crop both"]),
    (np.arange(48).reshape(2, 4, 6) * 7, ["--prediction-map", "48 in all"]),
])
def test_volumes_that_are_refused(tmp_path, capsys, array, words):
    np.save(tmp_path / "pred.npy", array)
    np.save(tmp_path / "truth.npy", np.ones((2, 4, 6), np.uint8) * np.arange(6).astype(np.uint8))
    said = refused(evaluate, capsys, "--prediction", tmp_path / "pred.npy", "--label",
                   tmp_path / "truth.npy", "--out-dir", tmp_path / "out", "--voxel-size", 1, 1, 1)
    assert "pred.npy" in said and not (tmp_path / "out").exists()
    assert all(word in said for word in words), said


@pytest.mark.parametrize("arguments, words", [
    ((), "give --prediction"), (("--prediction", "a"), "0 paths"),
    (("--prediction", "a", "b", "--label", "c"), "one label for each"),
    (("--prediction", "a", "--label", "c", "--volume", "d", "e"), "one volume for each"),
    (("--prediction", "a", "--label", "c", "--segments-2d"), "--segments CLASS"),
    (("--prediction", "a", "--label", "c", "--connectivity", "8"), "8"),
    (("--prediction", "a", "--label", "c", "--voxel-size", "1", "0", "1"), "above 0"),
    (("--prediction", "a", "--label", "c", "--min-voxels", "0"), "above 0"),
    (("--prediction", "a", "--label", "c", "--runs", "d"), "two commands"),
    (("--prediction", "no.tif", "--label", "no.tif"), "no such file"),
])
def test_commands_that_are_refused(capsys, tmp_path, arguments, words):
    out = () if "no.tif" not in arguments else ("--out-dir", tmp_path / "out")
    assert words in refused(evaluate, capsys, *arguments, *out)
    assert not any(tmp_path.iterdir())


def test_an_image_of_another_shape_is_refused(tmp_path, capsys):
    for name, n in (("pred", 2), ("truth", 2), ("image", 3)):
        np.save(tmp_path / f"{name}.npy", np.ones((n, 4, 4), np.uint8))
    said = refused(evaluate, capsys, "--prediction", tmp_path / "pred.npy", "--label",
                   tmp_path / "truth.npy", "--volume", tmp_path / "image.npy", "--out-dir",
                   tmp_path / "out")
    assert "image.npy" in said and "3 x 4 x 4" in said.replace("\u00d7", "x")


def test_names_come_from_the_run_that_the_prediction_is_in(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"classes": ["background", "mito", "vesicle"]}))
    arrays = tmp_path, line("0011"), line("0101")
    classes, _, notes = opened_arrays(*arrays)
    assert classes == ["background", "mito", "vesicle"]
    assert "class names of the run: background, mito, vesicle" in notes
    assert opened_arrays(*arrays, "--classes", "a", "b")[0] == ["a", "b"]
    assert opened_arrays(*arrays, "--prediction-map", "0=0,1=1")[0] == ["background", "class 1"]
    for broken in ("{}", "[]", "{", '{"classes": null}', '{"classes": 3}', '{"classes": "abc"}',
                   '{"classes": [1, 2, 3]}', '{"classes": ["a", "b", "b"]}', '{"classes": ["a"]}',
                   '{"classes": ["a", "b"], "args": {"lr": NaN}}'):
        config.write_text(broken)
        assert opened_arrays(*arrays)[0] == ["background", "class 1"]


# -- voxel sizes


@pytest.mark.parametrize("own, drawn, given, result, warned", [
    (VOXEL, (20.0, 8.0, 9.0), None, (20.0, 8.0, 9.0), "20 x 8 x 8 nm"),
    (VOXEL, (20.0, 8.0, 8.01), None, (20.0, 8.0, 8.01), None),
    (VOXEL, None, None, VOXEL, None),
    (None, VOXEL, None, VOXEL, None),
    (None, None, None, None, "undefined"),
    (VOXEL, (30.0, 8.0, 8.0), (5.0, 6.0, 7.0), (5.0, 6.0, 7.0), None),
])
def test_which_voxel_size_counts(tmp_path, own, drawn, given, result, warned):
    paths = [save(tmp_path / f"{name}.tif", np.eye(9, dtype=np.uint8)[None].repeat(2, 0), size)
             for name, size in (("pred", own), ("truth", drawn))]
    _, [pair], notes = opened("--prediction", paths[0], "--label", paths[1], "--volume", paths[0],
                              *(("--voxel-size", *given) if given else ()))
    for volume in (pair, pair.label, pair.image):
        assert volume.voxel_size == (result and pytest.approx(result, rel=1e-5))
    warnings = [note for note in notes if note.startswith("warning")]
    assert len(warnings) == bool(warned) and (not warned or warned in warnings[0])


def test_distances_follow_the_voxel_size(tmp_path, no_pictures):
    truth, pred = np.zeros((2, 3, 9, 9), np.uint8)
    truth[:, 2:5, 2:5], pred[:, 2:5, 4:7] = 1, 1
    scores = [score(tmp_path, truth, pred, "--overwrite", "--voxel-size", *size)["per_class"][
        "class 1"] for size in ((9, 9, 3), (9, 9, 6))]
    assert scores[0]["hd95_nm"] == 6 and scores[1]["hd95_nm"] == 12
    assert scores[1]["assd_nm"] == pytest.approx(2 * scores[0]["assd_nm"])


def test_without_distances(tmp_path, no_pictures):
    ids = line("0011")
    entry = score(tmp_path, ids, ids, "--no-distances")
    assert not {"hd95_nm", "assd_nm"} & set(entry["per_class"]["class 1"])


# -- metrics.json and what is printed --------------------------------------------------------------


@pytest.mark.parametrize("slices", SLICES)
def test_scores_equal_those_of_emseg_and_do_not_depend_on_slabs(tmp_path, monkeypatch, no_pictures,
                                                               slices):
    truth, pred = pair_of((7, 14, 15), 4, 20, 0.2)
    truth[4] = IGNORE
    slabs_of(monkeypatch, truth.shape, slices)
    names = ["background", "a", "b", "c"]
    entry = score(tmp_path, np.where(truth == IGNORE, 77, truth), pred, "--ignore-label", 77,
                  "--classes", *names, "--organelles", "a", "3")
    assert entry["ignored"] == (truth == IGNORE).sum() and entry["voxels"] == truth.size
    shared = emseg.evaluate(InMemory(pred), InMemory(truth), names, organelles=[1, 3])
    for name, scores in entry["per_class"].items():
        distances = plain_distances(truth, pred, names.index(name), VOXEL)
        assert scores.pop("hd95_nm") == pytest.approx(max(np.percentile(d, 95) for d in distances))
        assert scores.pop("assd_nm") == pytest.approx(np.concatenate(distances).mean())
    assert {key: entry[key] for key in shared} == shared


def test_metrics_equal_those_of_the_training(cells, tmp_path, capsys, no_pictures):
    folder = tmp_path / "run"
    run(train_partial, "--volume", cells / "image.tif@0:3", "--label", cells / "label.tif@0:3",
        "--classes", *emseg.PHANTOM_CLASSES, "--test-volume", cells / "image.tif@8:12",
        "--test-label", cells / "label.tif@8:12", "--out-dir", folder, "--width", 4, "--patch-size",
        48, 48, "--batch-size", 4, "--epochs", 1, "--steps-per-epoch", 2, "--device", "cpu",
        "--no-tta")
    arguments = ["--prediction", folder / "prediction.tif", "--label", cells / "label.tif@8:12",
                 "--volume", cells / "image.tif@8:12", "--no-distances"]
    run(evaluate, *arguments, "--out-dir", tmp_path / "out")
    trained, scored = metrics(folder), metrics(tmp_path / "out")
    assert list(scored) == list(trained) and scored["schema"] == 1
    assert scored["volumes"] == trained["volumes"] and scored["mean"] == trained["mean"]
    assert scored["classes"] == trained["classes"] == list(emseg.PHANTOM_CLASSES)
    assert scored["script"] == "evaluate.py"
    for key in ("model", "seed", "selected_on", "parameters", "train_seconds", "predict_seconds"):
        assert scored[key] == trained[key] is not None, key
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["training"]["script"] == "train_partial.py"
    assert config["training"]["args"]["width"] == 4
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for more in ((), ("--overwrite",)):
        refused(evaluate, capsys, *arguments, "--out-dir", folder, *more)
    assert before == {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_several_pairs_and_their_mean(tmp_path, capsys, no_pictures):
    arrays = {"a": pair_of((3, 9, 9), 3, 30, 0), "b": pair_of((4, 8, 9), 3, 31, 0)}
    arrays["b"][0][arrays["b"][0] == 2] = 0             # class 2 is in the prediction only
    for name, (truth, pred) in arrays.items():
        for kind, array in (("truth", truth), ("pred", pred)):
            (tmp_path / name).mkdir(exist_ok=True)
            save(tmp_path / name / f"{kind}.tif", array)
    run(evaluate, "--prediction", *(tmp_path / n / "pred.tif" for n in arrays), "--label",
        *(tmp_path / n / "truth.tif" for n in arrays), "--objects", "--segments", "1", "--out-dir",
        tmp_path / "out")
    content = metrics(tmp_path / "out")
    first, second = content["volumes"]
    assert [entry["prediction"] for entry in content["volumes"]] == [
        str(tmp_path / n / "pred.tif") for n in arrays]
    for block, key in (("per_class", "dice"), ("per_class", "assd_nm"), ("objects", "matched"),
                       ("objects", "pq")):
        values = [entry[block]["class 1"][key] for entry in (first, second)]
        assert content["mean"][block]["class 1"][key] == pytest.approx(np.mean(values))
    assert second["per_class"]["class 2"]["hd95_nm"] is None
    assert content["mean"]["per_class"]["class 2"]["hd95_nm"] == first["per_class"]["class 2"][
        "hd95_nm"]
    assert second["objects"]["class 2"]["recall"] is None
    assert content["mean"]["objects"]["class 2"]["recall"] == first["objects"]["class 2"][
        "recall"] > 0
    assert content["mean"]["segments"]["voi"] == pytest.approx(
        (first["segments"]["voi"] + second["segments"]["voi"]) / 2)
    assert {row["pair"] for row in rows_of(tmp_path / "out")} == {"1_pred", "2_pred"}
    assert "mean of 2 pairs" in capsys.readouterr().out


@pytest.mark.parametrize("truth, pred, said, undefined", [
    ("0011", "0011", "class 2 is in neither truth nor prediction",
     "dice precision recall hd95_nm assd_nm"),
    ("0011", "0021", "class 2 is not in the truth", "recall hd95_nm assd_nm"),
    ("0021", "0011", "class 2 is not in the prediction", "precision hd95_nm assd_nm"),
    ("0021", "0021", None, ""),
])
def test_undefined_scores_are_null_and_explained(tmp_path, capsys, no_pictures, truth, pred, said,
                                                 undefined):
    entry = score(tmp_path, line(truth), line(pred), "--classes", "background", "class 1",
                  "class 2")
    scores = entry["per_class"]["class 2"]
    keys = ("dice", "precision", "recall", "hd95_nm", "assd_nm")
    assert [key for key in keys if scores[key] is None] == undefined.split()
    printed = capsys.readouterr().out
    [row] = [text for text in printed.splitlines() if text.startswith("| class 2")]
    assert row.count("undefined") == sum(value is None for key, value in scores.items()
                                         if key in evaluate.HEADINGS)
    assert ("undefined (null)" in printed) == bool(said) and (said or "") in printed


def test_the_printed_table_shows_what_metrics_json_holds(tmp_path, capsys, no_pictures):
    entry = score(tmp_path, *pair_of((3, 14, 15), 3, 40, 0), "--objects", "--segments", "2")
    printed = capsys.readouterr().out
    tables = {text.split("|")[1].strip(): [cell.strip() for cell in text.split("|")[2:-1]]
              for text in printed.splitlines()[:7] if text.startswith("|")}
    for name, scores in entry["per_class"].items():
        row = dict(zip(tables[""], tables[name]))
        assert row["Dice"] == f"{scores['dice']:.4f}" and row["recall"] == f"{scores['recall']:.4f}"
        assert row["HD95 [nm]"] == f"{scores['hd95_nm']:.1f}"
    assert f"mIoU with background {entry['miou']:.4f}" in printed
    assert f"{entry['segments']['adapted_rand_error']:.4f}" in printed
    assert f"{entry['objects']['class 2']['pq']:.4f}" in printed


@pytest.mark.parametrize("key, value, text", [
    ("dice", None, "undefined"), ("truth", 3, "3"), ("predicted", 12345, "12,345"),
    ("dice", 0.12345, "0.1235"), ("hd95_nm", 1234.56, "1,234.6"), ("assd_nm", 2.96, "3.0"),
    ("matched", 0, "0"), ("pq", 0.0, "0.0000"), ("voi", 12.3, "12.3000")])
def test_scores_for_people(key, value, text):
    assert evaluate.shown(key, value) == text


# -- formats ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The same two volumes in all formats: {format: (prediction, label)}, and larger ones."""
    folder, arrays = tmp_path_factory.mktemp("stored"), pair_of((5, 12, 13), 3, 50, 0)[::-1]
    paths = {}
    for format in ("tif", "mrc", "npy", "slices", "crop", "name with spaces.tif"):
        paths[format] = []
        for name, array in zip(("pred", "truth"), arrays):
            path = folder / (f"{name}.{format}" if " " not in format else f"{name} {format}")
            if format == "slices":
                path.mkdir()
                for z, page in enumerate(array):
                    tifffile.imwrite(path / f"slice_{z + 3:03}.tif", page)
            elif format == "crop":
                path = f"{save(folder / f'{name}_wide.tif', np.pad(array, 2))}@2:7,2:14,2:15"
            else:
                save(path, array)
            paths[format].append(path)
    return folder, arrays, paths


@pytest.mark.parametrize("pred, label", [("mrc", "mrc"), ("npy", "npy"), ("slices", "slices"),
                                         ("tif", "crop"), ("crop", "npy"), ("slices", "tif"),
                                         ("name with spaces.tif", "name with spaces.tif")])
def test_formats_give_the_same_scores(stored, tmp_path, no_pictures, pred, label):
    _, (pred_array, truth), paths = stored
    run(evaluate, "--prediction", paths[pred][0], "--label", paths[label][1], "--out-dir",
        tmp_path / "out dir", "--voxel-size", *VOXEL)
    [entry] = metrics(tmp_path / "out dir")["volumes"]
    assert entry["prediction"] == str(paths[pred][0]) and entry["label"] == str(paths[label][1])
    shared = emseg.evaluate(InMemory(pred_array), InMemory(truth), ["", "class 1", "class 2"])
    for k, name in enumerate(shared["per_class"], 1):
        assert shared["per_class"][name].items() <= entry["per_class"][name].items()
        assert entry["per_class"][name]["assd_nm"] == pytest.approx(np.concatenate(
            plain_distances(truth, pred_array, k, VOXEL)).mean())


@pytest.mark.parametrize("chosen, more", [([1, 4], ()), ([0, 1, 3], ("--label-slices", "1,3"))])
def test_sparse_labels(stored, tmp_path, monkeypatch, no_pictures, chosen, more):
    _, (pred, truth), paths = stored
    slabs_of(monkeypatch, pred.shape, 2)
    (tmp_path / "sparse").mkdir()
    for z in chosen:
        tifffile.imwrite(tmp_path / "sparse" / f"{z}.tif", truth[z])
    run(evaluate, "--prediction", paths["tif"][0], "--label", tmp_path / "sparse", "--out-dir",
        tmp_path / "out", *more)
    [entry] = metrics(tmp_path / "out")["volumes"]
    known = np.full_like(truth, IGNORE)
    kept = [1, 3] if more else chosen
    known[kept] = truth[kept]
    shared = emseg.evaluate(InMemory(pred), InMemory(known), ["", "class 1", "class 2"])
    assert entry["ignored"] == (5 - len(kept)) * 12 * 13 and entry["miou"] == shared["miou"]
    assert entry["per_class"]["class 1"]["assd_nm"] == pytest.approx(np.concatenate(
        plain_distances(known, pred, 1, VOXEL)).mean())


# -- folders ---------------------------------------------------------------------------------------


def test_a_folder_is_replaced_only_when_told_to(tmp_path, capsys, no_pictures):
    ids, out = line("0011"), tmp_path / "out"
    score(tmp_path, ids, ids, "--objects")
    mine = {"mine.txt", "render_talk.png"}                  # only what evaluations wrote may go
    for name in mine:
        (out / name).write_text("keep")
    before = (out / "metrics.json").read_bytes()
    arguments = ["--prediction", tmp_path / "pred.tif", "--label", tmp_path / "truth.tif",
                 "--out-dir", out]
    assert "--overwrite" in refused(evaluate, capsys, *arguments)
    assert "no such file" in refused(evaluate, capsys, "--prediction", "none.tif", "--label",
                                     "none.tif", "--out-dir", out, "--overwrite")
    assert (out / "metrics.json").read_bytes() == before and (out / "objects.csv").exists()
    run(evaluate, *arguments, "--overwrite")
    assert {path.name for path in out.iterdir()} == {"config.json", "metrics.json", *mine}


@pytest.mark.parametrize("error", [KeyboardInterrupt, emseg.InputError("no"), RuntimeError])
def test_an_evaluation_that_ends_early_leaves_the_earlier_one(tmp_path, monkeypatch, no_pictures,
                                                              error):
    ids, out = line("0011"), tmp_path / "out"
    score(tmp_path, ids, ids)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail(*arguments):
        raise error
    monkeypatch.setattr(evaluate, "save_confusion", fail)
    for folder in (out, tmp_path / "new"):
        with pytest.raises((SystemExit, RuntimeError)):
            run(evaluate, "--prediction", tmp_path / "pred.tif", "--label", tmp_path / "truth.tif",
                "--out-dir", folder, "--overwrite", "--objects")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_an_evaluation_that_ends_while_its_files_move_can_be_repeated(tmp_path, monkeypatch,
                                                                      no_pictures):
    ids, out = line("0011"), tmp_path / "out"
    score(tmp_path, ids, ids)
    replace = os.replace

    def interrupted(source, target):
        if Path(target).name == "metrics.json" and Path(target).parent == out:
            raise KeyboardInterrupt
        replace(source, target)
    arguments = ["--prediction", tmp_path / "pred.tif", "--label", tmp_path / "truth.tif",
                 "--objects", "--overwrite", "--out-dir", out]
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(SystemExit):
            run(evaluate, *arguments)
    assert {"metrics.json", "objects.csv"} <= set(
        json.loads((out / "config.json").read_text())["files"])
    run(evaluate, *arguments)
    assert {path.name for path in out.iterdir()} == {"config.json", "metrics.json", "objects.csv"}


@pytest.mark.parametrize("kind", ["folder", "link to nothing"])
def test_what_is_in_the_way_stops_before_anything_is_replaced(tmp_path, capsys, no_pictures, kind):
    ids, out = line("0011"), tmp_path / "out"
    score(tmp_path, ids, ids)
    before = (out / "metrics.json").read_bytes()
    if kind == "folder":
        (out / "objects.csv").mkdir()
    else:
        (out / "objects.csv").symlink_to(tmp_path / "none")
    assert "in the way" in refused(
        evaluate, capsys, "--prediction", tmp_path / "pred.tif", "--label", tmp_path / "truth.tif",
        "--out-dir", out, "--overwrite", "--objects")
    assert (out / "metrics.json").read_bytes() == before and os.path.lexists(out / "objects.csv")


def test_too_little_memory_is_one_line(tmp_path, monkeypatch, capsys):
    def fail(*arguments):
        raise MemoryError("Unable to allocate 9 TiB")
    monkeypatch.setattr(emseg, "count_pairs", fail)
    np.save(tmp_path / "a.npy", line("0011"))
    assert "out of memory (Unable to allocate 9 TiB)" in refused(
        evaluate, capsys, "--prediction", tmp_path / "a.npy", "--label", tmp_path / "a.npy")


def test_files_of_others_are_not_replaced(tmp_path, capsys, no_pictures):
    ids, out = line("0011"), tmp_path / "out"
    score(tmp_path, ids, ids)
    (out / "objects.csv").write_text("mine")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "objects.csv is in the way" in refused(
        evaluate, capsys, "--prediction", tmp_path / "pred.tif", "--label", tmp_path / "truth.tif",
        "--out-dir", out, "--overwrite", "--objects")
    config = json.loads(before["config.json"])
    config["files"] += ["../pred.tif", 3]                   # a config.json that somebody made up
    (out / "config.json").write_text(json.dumps(config))
    assert "holds no evaluation" in refused(
        evaluate, capsys, "--prediction", tmp_path / "pred.tif", "--label", tmp_path / "truth.tif",
        "--out-dir", out, "--overwrite")
    assert (tmp_path / "pred.tif").exists()


def test_the_slower_of_two_evaluations_is_refused(tmp_path, monkeypatch, capsys, no_pictures):
    """Where the file system has no locks; else the second one is, before it begins."""
    monkeypatch.setattr(emseg, "lock_folder", lambda folder: None)
    ids = line("0011")
    for name in ("pred.npy", "truth.npy"):
        np.save(tmp_path / name, ids)
    arguments = ["--prediction", tmp_path / "pred.npy", "--label", tmp_path / "truth.npy",
                 "--voxel-size", 1, 1, 1, "--out-dir", tmp_path / "out"]

    def meanwhile(*_):
        monkeypatch.setattr(evaluate, "save_confusion", lambda *_: None)
        run(evaluate, *arguments)
    monkeypatch.setattr(evaluate, "save_confusion", meanwhile)
    assert "is not empty" in refused(evaluate, capsys, *arguments)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "metrics.json"}


def test_a_folder_into_which_another_process_writes_is_left_alone(tmp_path, monkeypatch, capsys):
    np.save(tmp_path / "a.npy", line("0011"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"{evaluate.UNFINISHED}other").mkdir()
    arguments = ["--prediction", tmp_path / "a.npy", "--label", tmp_path / "a.npy",
                 "--voxel-size", 1, 1, 1, "--no-distances", "--out-dir", tmp_path / "out"]
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with monkeypatch.context() as other:            # descriptors do not share a lock
        other.setattr(emseg, "LOCKED", [])
        emseg.lock_folder(tmp_path / "out")
        held = emseg.LOCKED.pop()
    assert "another process is writing into it" in refused(evaluate, capsys, *arguments)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"{evaluate.UNFINISHED}other"]
    os.close(held)
    run(evaluate, *arguments)                       # and what was left unfinished goes
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "log.csv", "golgi/best.pt"])
def test_a_training_is_never_overwritten(tmp_path, capsys, name):
    np.save(tmp_path / "a.npy", line("0011"))
    (tmp_path / "run" / name).parent.mkdir(parents=True)
    (tmp_path / "run" / name).write_text("weights")
    (tmp_path / "run" / "config.json").write_text('{"args": {}, "classes": ["background", "a"]}')
    assert "holds no evaluation" in refused(
        evaluate, capsys, "--prediction", tmp_path / "a.npy", "--label", tmp_path / "a.npy",
        "--out-dir", tmp_path / "run", "--overwrite")
    assert (tmp_path / "run" / name).read_text() == "weights"
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path, capsys):
    np.save(tmp_path / "a.npy", line("0011"))
    arguments = ["--prediction", tmp_path / "a.npy", "--label", tmp_path / "a.npy", "--out-dir"]
    for folder in (tmp_path / "a.npy", tmp_path / "a.npy" / "deeper"):
        assert str(folder) in refused(evaluate, capsys, *arguments, folder)


@pytest.mark.parametrize("prediction, folder", [
    ("runs/mito/prediction.tif", "runs/evaluate-mito"), ("a/cells.mrc", "runs/evaluate-cells"),
    ("prediction.tif", "runs/evaluate-prediction"), ("a/cells.tif@0:3", "runs/evaluate-cells"),
    ("my cells", "runs/evaluate-my cells")])
def test_default_folders(prediction, folder):
    args = evaluate.parse_args(["--prediction", prediction, "--label", "b"])
    assert args.out_dir == folder


def test_config_tells_how_to_repeat_it(tmp_path, no_pictures):
    score(tmp_path, line("0011"), line("0011"), "--min-voxels", 2, "--segments", "class 1")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["args"]["min_voxels"] == 2 and config["args"]["segments"] == 1
    assert set(config["sha256"]) == {"emseg.py", "evaluate.py"}


# -- pictures --------------------------------------------------------------------------------------


def rgb(color):
    return np.array(matplotlib.colors.to_rgb(color))


def share_of(picture, color, tolerance=0.02):
    """Share of a picture's pixels that have a colour."""
    return float((np.abs(picture[..., :3] - color).max(-1) < tolerance).mean())


def place_of(picture, color, tolerance=0.02):
    """Mean row and column of the pixels with a colour, and the height and width they span."""
    places = np.argwhere(np.abs(picture[..., :3] - color).max(-1) < tolerance)
    return places.mean(0), np.ptp(places, 0)


def on_paper(color):
    return 0.1 + 0.9 * rgb(color)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Pictures of two balls, of which the prediction has one, and a bit too much of it."""
    folder = tmp_path_factory.mktemp("drawn")
    grid = np.indices((12, 60, 60))
    truth = np.zeros((12, 60, 60), np.uint8)
    for k, (y, x) in enumerate(((18, 18), (42, 42)), 1):
        truth[((grid[0] - 6) * 2.5)**2 + (grid[1] - y)**2 + (grid[2] - x)**2 < 144] = k
    pred = np.where(truth == 1, 1, 0).astype(np.uint8)
    pred[3:9, 44:56, 4:16] = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.save_renders, "__defaults__", (60, 250))         # sides; pixels
        score(folder, truth, pred, "--render", "--classes", "background", "mito", "big body",
              fine=True)
    return {path.stem: imread(path) for path in (folder / "out").glob("*.png")}


def test_all_pictures_are_there_and_none_is_blank(drawn):
    assert set(drawn) == {"figure", "slice_dice", "confusion", "render", "render_mito",
                          "render_big_body"}
    assert all(picture[..., :3].std() > 0.03 for picture in drawn.values())


def test_figure_shows_classes_and_errors(drawn):
    mito, body = map(on_paper, emseg.CLASS_COLORS[:2])
    hit, miss, false = map(on_paper, emseg.ERROR_COLORS.values())
    width = drawn["figure"].shape[1]                        # without an image there are three
    truth, pred, errors = [drawn["figure"][:, width * i // 3 : width * (i + 1) // 3]
                           for i in range(3)]
    assert share_of(truth, mito) > 0.01 and share_of(truth, body) > 0.01
    assert share_of(pred, mito) > share_of(truth, mito) and share_of(pred, body) == 0
    assert min(share_of(errors, color) for color in (hit, miss, false)) > 0.005
    assert share_of(errors, hit) == pytest.approx(share_of(truth, mito), rel=0.2)


def test_odd_class_names_have_pictures_of_their_own(tmp_path):
    names = ["bg", r"$\frac{$", "a b", "a_b"]
    ids = np.zeros((3, 12, 12), np.uint8)
    for k in (1, 2, 3):
        ids[:, 3 * k - 2 : 3 * k, 3:9] = k
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.save_renders, "__defaults__", (20, 40))
        score(tmp_path, ids, ids, "--render", "--classes", *names)
    assert len(list((tmp_path / "out").glob("render_*.png"))) == 3


def test_figure_shows_the_image_that_is_given(cells, tmp_path):
    run(evaluate, "--prediction", cells / "mito.tif@0:2", "--label", cells / "mito.tif@0:2",
        "--volume", cells / "image.tif@0:2", "--no-distances", "--out-dir", tmp_path / "out",
        fine=True)
    picture = imread(tmp_path / "out" / "figure.png")
    assert len(np.unique(picture[:, : picture.shape[1] // 4, 0])) > 50
    [entry] = metrics(tmp_path / "out")["volumes"]
    assert entry["volume"] == f"{cells / 'image.tif'}@0:2" and entry["dice"] == 1


def test_slice_dice_shows_each_class_at_its_height(drawn):
    picture = drawn["slice_dice"][: int(drawn["slice_dice"].shape[0] * 0.8)]
    (mito, _), (body, _) = [place_of(picture, rgb(color)) for color in emseg.CLASS_COLORS[:2]]
    assert mito[0] < body[0] - picture.shape[0] / 4


def test_renders_show_truth_above_prediction(drawn):
    def halves(name):
        picture = drawn[name][..., :3]
        colored = np.ptp(picture, -1) > 0.2
        return [half.mean() for half in np.array_split(colored, 2)]

    truth, pred = halves("render_mito")
    assert pred > 1.2 * truth > 0.01
    truth, pred = halves("render_big_body")
    assert truth > 0.01 and pred == 0
    truth, pred = halves("render")
    assert truth > 0.01 and pred > 0.01


def test_renders_of_several_pairs_are_named_after_them(tmp_path, monkeypatch, no_pictures):
    names = []
    monkeypatch.setattr(evaluate.save_renders, "__defaults__", (8, 30))
    monkeypatch.setattr(emseg, "save_pictures", lambda path, *args, **options: names.append(
        path.name))
    for name in "ab":
        save(tmp_path / f"{name}.tif", np.pad(np.ones((2, 4, 4), np.uint8), 2))
    paths = [tmp_path / "a.tif", tmp_path / "b.tif"]
    run(evaluate, "--prediction", *paths, "--label", *paths, "--render", "--out-dir",
        tmp_path / "out")
    assert names == ["render_a.png", "render_b.png"]


def test_confusion_shows_truth_in_rows_and_classes_without_voxels(tmp_path, recwarn):
    counts = np.zeros((3, 3), int)
    counts[0, 0], counts[1, 2] = 900, 50
    evaluate.save_confusion(tmp_path / "a.png", counts, ["background", "a", "b"])
    picture = imread(tmp_path / "a.png")
    full = matplotlib.colormaps["Blues"](1.0)[:3]
    _, (height, width) = place_of(picture, np.array(full))
    assert width > 1.3 * height > 0 and not recwarn.list
    evaluate.save_confusion(tmp_path / "b.png", counts * [[1], [1000], [1]],
                            ["background", "a", "b"])
    assert share_of(imread(tmp_path / "b.png"), full) == pytest.approx(share_of(picture, full),
                                                                       rel=0.1)


@pytest.mark.parametrize("share, text", [(0, "0 %"), (1, "100 %"), (0.5, "50.0 %"),
                                         (0.0042, "0.42 %"), (0.0004, "0.040 %"),
                                         (0.0995, "10.0 %"), (0.9996, "100.0 %")])
def test_shares_in_percent(share, text):
    assert evaluate.percent(share) == text


@pytest.mark.parametrize("number, text", [(9077301, "9.08 M"), (0, "0"), (999, "999"),
                                          (1000, "1 k"), (2_500_000_000, "2.5 G")])
def test_numbers_of_voxels(number, text):
    assert evaluate.compact(number) == text


# -- README ----------------------------------------------------------------------------------------


def test_every_readme_command_parses():
    commands = readme_commands("evaluate.py")
    assert len(commands) >= 3
    for command in commands:
        evaluate.parse_args(command)
