"""train_sparse.py: its three stages by themselves, and whole runs on small and real data."""

import functools
import math
import shutil

import numpy as np
import pytest
import tifffile
import torch
from scipy import ndimage, stats

import conftest
import emseg
import train_sparse
from conftest import BRIEF, CORNER, ROOT, log_without_seconds, metrics, weights

IGNORE = emseg.IGNORE
CLASSES = ["background", "mitochondrion"]
CROSS = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], dtype=bool)
run = functools.partial(conftest.run, train_sparse)
refused = functools.partial(conftest.refused, train_sparse)
TINY = ["--width", "4", "--patch-size", "32", "32", "--batch-size", "4", "--epochs", "2",
        "--steps-per-epoch", "3", "--scm-epochs", "2", "--context", "5", "--min-size", "20",
        "--no-tta", "--lr", "3e-3", "--device", "cpu"]


def training_data(cells):
    return ["--volume", cells / "image.tif@0:8", "--label", cells / "mito.tif@0:8",
            "--label-slices", "0,3,7"]


def train(cells, out, *more):
    run(*training_data(cells), "--test-volume", cells / "image.tif@8:12", "--test-label",
        cells / "mito.tif@8:12", "--out-dir", out, *TINY, *more)


@pytest.fixture(scope="module")
def trained(cells, tmp_path_factory):
    """A finished tiny run of all three stages."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    train(cells, folder)
    return folder


class InMemory(emseg.LazyArray):
    """An array as a lazy volume; of an annotation, the annotated slices."""

    def __init__(self, array, slices=None):
        super().__init__("memory", array.shape, array.dtype, None)
        self.array, self.slices = array, None if slices is None else np.array(slices)

    def read(self, z, y, x):
        return self.array[z, y, x].copy()


def blobs(shape, classes=2, seed=0):
    """Random class ids (Z, Y, X) uint8 with objects of all sizes that change along z."""
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.standard_normal((classes - 1, *shape)), (0, 0.7, 2, 2))
    result = np.zeros(shape, np.uint8)
    for k, one in enumerate(field, 1):
        result[one > np.quantile(one, 0.7)] = k
    return result


def annotation(shape, slices, classes=2, seed=1, ignored=0.0):
    """An annotation of these slices, IGNORE elsewhere and on a share of their pixels."""
    label = blobs(shape, classes, seed)
    label[np.setdiff1d(np.arange(shape[0]), slices)] = IGNORE
    label[np.random.default_rng(seed).random(shape) < ignored] = IGNORE
    return InMemory(label, slices)


# -- piecewise affine maps ------------------------------------------------------------------------


def test_piecewise_affine_moves_knots_by_a_share_of_the_side():
    torch.manual_seed(0)
    field = train_sparse.piecewise_affine_displacement(800, (31, 61), "cpu", scale=(0.05, 0.05)).numpy()
    knots = field[:, ::10, ::20]                    # 4 x 4 knots, corners included
    assert field.shape == (800, 31, 61, 2) and knots.shape == (800, 4, 4, 2)
    for axis, side in ((0, 61), (1, 31)):           # x first
        for values in knots[..., axis], knots[:, 0, 0, axis], knots[:, 3, 3, axis]:
            assert values.std() == pytest.approx(0.05 * side, rel=4 / math.sqrt(values.size))
        assert stats.kstest(knots[..., axis].ravel() / (0.05 * side), "norm").pvalue > 1e-3
    correlation = np.corrcoef(knots.reshape(800, 32), rowvar=False)
    assert np.abs(correlation - np.eye(32)).max() < 0.16    # of all knots, in x and y


def test_piecewise_affine_strength_is_drawn_for_each_image():
    torch.manual_seed(0)
    field = train_sparse.piecewise_affine_displacement(800, (31, 31), "cpu")
    knots = field[:, ::10, ::10] / 31
    assert knots.var() == pytest.approx((0.05**3 - 0.01**3) / 3 / 0.04, rel=0.1)
    strength = knots.flatten(1).std(1)
    assert strength.min() < 0.015 and strength.max() > 0.045
    x, y = knots.flatten(1, 2).std(1).T             # one strength for both axes of an image
    assert np.corrcoef(x, y)[0, 1] > 0.7


def affine_on_triangles(knots, size):
    """Field (H, W, 2) from knots (P, P, 2): each cell cut along its anti-diagonal, by loops."""
    P = len(knots)
    place = np.stack(np.meshgrid(*(np.linspace(0, P - 1, n) for n in size), indexing="ij"), -1)
    place = np.concatenate([place, np.ones((*size, 1))], axis=-1)
    field = np.full((*size, 2), np.nan)
    for r, c in np.ndindex(P - 1, P - 1):
        for tip in (r, c), (r + 1, c + 1):
            corners = [tip, (r, c + 1), (r + 1, c)]
            share = place @ np.linalg.inv(np.column_stack([corners, np.ones(3)]))   # barycentric
            inside = (share > -1e-9).all(axis=-1)
            field[inside] = share[inside] @ [knots[corner] for corner in corners]
    return field


@pytest.mark.parametrize("points, size", [(4, (31, 61)), (4, (32, 50)), (2, (9, 20)),
                                          (5, (41, 23)), (4, (3, 2)), (4, (1, 7))])
def test_piecewise_affine_is_affine_on_each_triangle(points, size):
    fields, fine = [], 10 * (points - 1) + 1
    for shape in size, (fine, fine):                # the same draw, once with pixels at the knots
        torch.manual_seed(0)
        fields.append(train_sparse.piecewise_affine_displacement(3, shape, "cpu", points=points).numpy())
    for field, full in zip(*fields):
        knots = full[::10, ::10] * np.array(size)[::-1] / fine
        np.testing.assert_allclose(field, affine_on_triangles(knots, size), atol=1e-4)


def test_piecewise_affine_is_straight_inside_triangles_and_whole_across_their_borders():
    torch.manual_seed(0)
    field = train_sparse.piecewise_affine_displacement(5, (61, 61), "cpu").double()      # cells of 20 pixels
    knots = field[:, ::20, ::20]
    y, x = np.mgrid[:61, :61] % 20
    for axis, place in ((1, y), (2, x)):
        step, slope = field.diff(dim=axis), knots.diff(dim=axis).abs().amax((1, 2)) / 20
        assert (step.abs() <= slope[:, None, None] + 1e-4).all()                # it never jumps
        border = np.take((place == 0) | (x + y == 20), range(1, 60), axis - 1)
        bend = field.diff(n=2, dim=axis).abs().amax((0, 3)).numpy()
        assert bend[~border].max() < 1e-4 and np.median(bend[border]) > 1e-2


def test_half_of_the_crops_are_deformed():
    torch.manual_seed(0)
    image = torch.zeros(400, 64, 64)
    for kind in "affine", "elastic":
        moved = (train_sparse.deformation(image, kind) != 0).flatten(1).any(1)
        assert moved.float().mean() == pytest.approx(0.5, abs=0.08)
    assert train_sparse.deformation(image, "none") is None


# -- stage 2: an independent implementation, slice by slice and erosion by erosion -----------------


def slow_remove_small(mask, min_size):
    objects, count = ndimage.label(mask, CROSS)
    for number in range(1, count + 1):
        if (objects == number).sum() < min_size:
            mask = mask & (objects != number)
    return mask


def slow_stage_2(ids, label, slices, classes, erosions, min_size):
    """Section 2.3, each slice from its neighbours, in loops."""
    Z, claims = len(ids), []
    for k in range(1, classes):
        stack = [ids[z] == k for z in range(Z)]

        def restored(stack):
            return [np.where(label[z] == IGNORE, stack[z], label[z] == k) for z in range(Z)]

        def cleaned(stack):
            return restored([slow_remove_small(mask, min_size) for mask in stack])

        reached = []
        for z in range(Z):
            mask = stack[z].copy()
            for j in ([max(s for s in slices if s <= z)] if min(slices, default=Z) <= z else []) + (
                    [min(s for s in slices if s >= z)] if max(slices, default=-1) >= z else []):
                eroded = label[j] == k
                for _ in range(erosions * abs(z - j)):
                    eroded = ndimage.binary_erosion(eroded, CROSS, border_value=1)
                mask |= eroded
            reached.append(mask)
        stack = cleaned(reached)
        for pairs in ([(-1, 1)], [(-1, 2), (-2, 1)]):
            def beside(z, pair):
                return [stack[min(max(z + step, 0), Z - 1)] for step in pair]
            stack = restored([np.logical_and.reduce(
                [stack[z], *(np.logical_or(*beside(z, pair)) for pair in pairs)])
                for z in range(Z)])
            stack = cleaned([np.logical_or.reduce(
                [stack[z], *(np.logical_and(*beside(z, pair)) for pair in pairs)])
                for z in range(Z)])
        claims.append(stack)
    result = np.zeros_like(ids)
    for place in np.ndindex(ids.shape):
        claiming = [k + 1 for k in range(classes - 1) if claims[k][place[0]][place[1:]]]
        if claiming:
            result[place] = ids[place] if ids[place] in claiming else claiming[0]
    return result


@pytest.mark.parametrize("slices, classes, ignored", [
    ([], 2, 0), ([0, 5, 10], 2, 0), ([3], 2, 0), ([2, 3, 11], 2, 0.2), ([1, 7], 4, 0), ([], 3, 0)])
@pytest.mark.parametrize("erosions, min_size", [(1, 12), (3, 0)])
def test_stage_2_equals_loops(slices, classes, ignored, erosions, min_size):
    shape = (12, 30, 34)
    ids, label = blobs(shape, classes), annotation(shape, slices, classes, ignored=ignored)
    rules = {"erosions": erosions, "min_size": min_size}
    wanted = slow_stage_2(ids, label.array, slices, classes, erosions, min_size)
    found = train_sparse.postprocess(InMemory(ids), label if slices else None, slice(0, 12),
                                     range(classes), rules)
    np.testing.assert_array_equal(found, wanted)
    assert found.dtype == np.uint8 and (found != ids).any()


@pytest.mark.parametrize("slices", [[], [4, 20, 31]])
@pytest.mark.parametrize("step", [1, 7])
def test_stage_2_in_slabs_equals_the_whole_stack(slices, step):
    shape = (40, 24, 26)
    ids, label = InMemory(blobs(shape, 3)), annotation(shape, slices, 3) if slices else None
    rules = {"erosions": 1, "min_size": 10}
    whole = train_sparse.postprocess(ids, label, slice(0, 40), range(3), rules)
    for z in range(0, 40, step):
        slab = slice(z, min(40, z + step))
        found = train_sparse.postprocess(ids, label, slab, range(3), rules)
        np.testing.assert_array_equal(found, whole[slab])


def test_annotated_pixels_stay_exactly_as_annotated():
    shape, slices = (13, 40, 40), [0, 6, 12]
    label = annotation(shape, slices, 3, ignored=0.1)
    known = label.array != IGNORE
    for rules in ({"erosions": 2, "min_size": 500}, None):
        found = train_sparse.postprocess(InMemory(blobs(shape, 3)), label, slice(0, 13), range(3),
                                         rules)
        np.testing.assert_array_equal(found[known], label.array[known])


def test_without_rules_all_else_stays_as_it_was():
    ids, label = blobs((5, 9, 9)), annotation((5, 9, 9), [2])
    found = train_sparse.postprocess(InMemory(ids), label, slice(0, 5), CLASSES, None)
    np.testing.assert_array_equal(found[[0, 1, 3, 4]], ids[[0, 1, 3, 4]])
    unlabelled = train_sparse.postprocess(InMemory(ids), None, slice(1, 4), CLASSES, None)
    np.testing.assert_array_equal(unlabelled, ids[1:4])


def column(*values):
    """A stack of single-pixel slices, bool (Z, 1, 1)."""
    return np.array(values, dtype=bool)[:, None, None]


def continued(masks, n, rule):
    """Eq. 2 or 3 on a stack (Z, Y, X)."""
    return np.stack(list(train_sparse.with_neighbours(masks, n, rule)))


def propagated(masks, depth, erosions):
    """Eq. 1 on as many slices as `depth` from labelled ones {z: mask}: (Z, Y, X)."""
    label = np.full((depth, *next(iter(masks.values())).shape), IGNORE, np.uint8)
    for z, mask in masks.items():
        label[z] = mask
    return np.stack(list(train_sparse.propagate(InMemory(label, [*masks]), 1, range(depth),
                                                erosions)))


def test_equation_2_removes_what_neither_neighbour_has():
    masks = column(0, 1, 0, 1, 1, 0, 0, 1)
    # slice 1 stands alone; 3 and 4 hold each other; 7 is the last slice, which is its own neighbour
    assert continued(masks, 1, train_sparse.remove_false_positives)[:, 0, 0].tolist() == [0, 0, 0, 1, 1, 0, 0, 1]


def test_equation_3_fills_what_both_neighbours_have():
    masks = column(0, 1, 0, 1, 0, 0, 1, 0)
    assert continued(masks, 1, train_sparse.fill_false_negatives)[:, 0, 0].tolist() == [0, 1, 1, 1, 0, 0, 1, 0]


def runs_along_z(masks, value):
    """For each voxel the length of its run of equal values along z, endless at the ends."""
    lengths = np.zeros(masks.shape, int)
    for y, x in np.ndindex(masks.shape[1:]):
        line = masks[:, y, x]
        for z in range(len(line)):
            low, high = z, z
            while low >= 0 and line[low] == line[z]:
                low -= 1
            while high < len(line) and line[high] == line[z]:
                high += 1
            lengths[z, y, x] = 99 if low < 0 or high == len(line) else high - low - 1
    return np.where(masks == value, lengths, 99)


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("rule, value", [(train_sparse.remove_false_positives, True),
                                         (train_sparse.fill_false_negatives, False)])
def test_faults_of_up_to_two_slices_are_mended_and_no_longer_ones(depth, rule, value):
    masks = np.random.default_rng(depth).random((depth, 9, 9)) < 0.5
    once = continued(masks, 1, rule)
    np.testing.assert_array_equal(once, masks ^ (runs_along_z(masks, value) < 2))
    left = runs_along_z(once, value)
    np.testing.assert_array_equal(continued(once, 2, rule), once ^ (left < 3))


def test_equation_1_erodes_by_the_distance():
    square = np.zeros((21, 21), dtype=bool)
    square[5:16, 5:16] = True                                           # 11 x 11
    reached = propagated({3: square}, 7, 2)
    assert reached.sum((1, 2)).tolist() == [0, 9, 49, 121, 49, 9, 0]    # sides 11, 7, 3, gone
    assert reached[1, 9:12, 9:12].all()


def test_both_neighbouring_annotations_reach_a_slice_but_no_farther_one():
    left, right = np.zeros((2, 9, 9), dtype=bool)
    left[:, :4], right[:, 5:] = True, True
    whole = np.ones((9, 9), dtype=bool)
    reached = propagated({0: whole, 2: left, 4: right}, 6, 1)
    assert reached[3].any(0).tolist() == [1, 1, 1, 0, 0, 0, 1, 1, 1]    # one column less on each
    assert not reached[5][:, :6].any() and reached[1].all()


def test_small_objects_are_removed():
    mask = np.zeros((8, 8), dtype=bool)
    mask[:2, :2] = True
    mask[4:7, 4:7] = True
    mask[7, 7] = True                                   # touches the square at a corner only
    assert train_sparse.remove_small(mask, 5).sum() == 9
    assert train_sparse.remove_small(mask, 0).sum() == mask.sum()


# -- stage 3 ---------------------------------------------------------------------------------------


def test_the_networks_have_the_papers_sizes():
    args = train_sparse.parse_args(["--volume", "a", "--label", "b"])
    coarse = train_sparse.MODELS[args.model](1, 1, args.width)
    assert emseg.count_parameters(coarse) == 7_701_825
    assert emseg.count_parameters(emseg.UNet(args.context, 1)) == 7_709_889
    assert emseg.count_parameters(train_sparse.MODELS["unet3d"](1, 1)) == 16_318_691
    assert set(emseg.NETWORKS) < set(train_sparse.MODELS)


def test_the_defaults_are_the_papers():
    args = train_sparse.parse_args(["--volume", "a", "--label", "b"])
    assert (args.epochs, args.scm_epochs, args.batch_size, args.lr) == (100, 100, 16, 5e-4)
    assert (args.context, args.erosions, args.threshold, args.tta) == (15, 3, 0.5, True)
    assert args.deform == "affine" and args.mpp and args.scm and args.patch_size == [512, 512]


def test_the_loss_is_soft_dice_smoothed_by_one():
    class Plain:
        def autocast(self):
            return torch.autocast("cpu", enabled=False)

    label = torch.tensor([[[1, 1, 0, IGNORE]]])
    loss = train_sparse.dice_loss(Plain(), torch.nn.Identity(), torch.zeros(1, 1, 1, 4), label)
    assert loss == pytest.approx(1 - (2 * 1.0 + 1) / (1.5 + 2 + 1))     # p = 0.5 everywhere


def test_neighbour_masks_are_one_channel_for_each_class_and_slice():
    ids = torch.tensor([[0, 1, 2], [2, 2, 0]])[..., None, None]         # B 2, context 3
    masks = train_sparse.neighbour_masks(ids, ["background", "a", "b"])
    assert masks.dtype == torch.float32
    assert masks[..., 0, 0].tolist() == [[0, 1, 0, 0, 0, 1], [0, 0, 0, 1, 1, 0]]


def test_augmented_masks_stay_class_ids_and_pairs():
    torch.manual_seed(0)
    stack = torch.from_numpy(blobs((64 * 3, 16, 16), 4)).view(64, 3, 16, 16)
    coarse, soft = train_sparse.augment_masks(stack, stack.clone(), "none")
    assert torch.equal(coarse[:, 1].long(), soft) and soft.dtype == torch.int64
    assert set(coarse.unique().tolist()) == {0, 1, 2, 3}
    for before, after in zip(stack, coarse):
        assert torch.equal(before.flatten().bincount(), after.flatten().long().bincount())
    views = {(axes, turns): lambda x, axes=axes, turns=turns: torch.rot90(
        x.flip(axes), turns, (1, 2)) for axes in ((), (0,), (2,), (0, 2)) for turns in range(4)}
    seen = {name for before, after in zip(stack, coarse) for name, view in views.items()
            if torch.equal(view(before).float(), after)}
    assert len(views) == 16 and seen == set(views)
    coarse, soft = train_sparse.augment_masks(stack, stack.clone(), "affine")
    assert torch.equal(coarse[:, 1].long(), soft) and set(soft.unique().tolist()) <= {0, 1, 2, 3}


# -- whole runs ------------------------------------------------------------------------------------


def test_a_run_writes_all_stages(trained, cells):
    assert {"config.json", "log.csv", "best.pt", "last.pt", "prediction.tif", "metrics.json",
            "figure.png", "curves.png", "stages"} == {path.name for path in trained.iterdir()}
    files = {str(p.relative_to(trained)) for p in trained.glob("stages/**/*.tif")}
    assert files == {"stages/train/image_coarse.tif", "stages/train/image_soft.tif",
                     "stages/image_coarse.tif", "stages/image_mpp.tif"}
    result, truth = metrics(trained), emseg.open_volume(f"{cells}/mito.tif@8:12")[:] == 255
    assert list(result["stages"]) == ["coarse", "mpp", "scm"]
    assert result["mean"] == result["stages"]["scm"]
    assert result["volumes"][0]["stages"]["mpp"]["dice"] == result["stages"]["mpp"]["dice"]
    for stage, path in (("coarse", "stages/image_coarse.tif"), ("mpp", "stages/image_mpp.tif"),
                        ("scm", "prediction.tif")):
        pred = emseg.open_volume(str(trained / path))[:] == 1
        iou = (pred & truth).sum() / (pred | truth).sum()
        assert result["stages"][stage]["iou"] == pytest.approx(iou)
    counts = [emseg.count_parameters(emseg.UNet(c, 1, 4)) for c in (1, 5)]
    assert result["parameters"] == sum(counts)


def test_the_log_has_both_trainings(trained):
    rows = log_without_seconds(trained)
    assert [row["stage"] for row in rows] == ["coarse", "coarse", "scm", "scm"]
    assert [row["step"] for row in rows] == ["3", "6", "9", "12"]


def test_soft_labels_hold_the_annotation_and_the_rules(trained, cells):
    soft = emseg.open_volume(str(trained / "stages/train/image_soft.tif"))[:]
    coarse = emseg.open_volume(str(trained / "stages/train/image_coarse.tif"))[:]
    truth = (emseg.open_volume(f"{cells}/mito.tif@0:8")[:] == 255).astype(np.uint8)
    np.testing.assert_array_equal(soft[[0, 3, 7]], truth[[0, 3, 7]])
    assert (coarse[[0, 3, 7]] != truth[[0, 3, 7]]).any()
    label = truth.copy()
    label[[1, 2, 4, 5, 6]] = IGNORE
    np.testing.assert_array_equal(soft, slow_stage_2(coarse, label, [0, 3, 7], 2, 3, 20))


def test_stage_3_sees_the_masks_around_each_slice(trained):
    """The prediction, computed again slice by slice from the coarse masks and the weights."""
    network = emseg.UNet(5, 1, 4).eval()
    checkpoint = torch.load(trained / "best.pt", weights_only=True)
    network.load_state_dict(checkpoint["modules"]["scm"])
    coarse = emseg.open_volume(str(trained / "stages/image_coarse.tif"))[:]
    wanted = []
    for z in range(4):
        masks = np.stack([coarse[min(max(z + d, 0), 3)] for d in (-2, -1, 0, 1, 2)])
        with torch.no_grad():
            wanted.append(network(torch.from_numpy(masks)[None].float())[0, 0] > 0)
    found = emseg.open_volume(str(trained / "prediction.tif"))[:]
    assert (np.stack(wanted) == found).mean() > 0.995           # but for bf16


@pytest.mark.parametrize("flags, stages", [
    (["--no-scm"], ["coarse", "mpp"]), (["--no-scm", "--no-mpp", "--deform", "none"], ["coarse"]),
    (["--no-mpp"], ["coarse", "scm"])])
def test_the_ablation_leaves_stages_out(trained, cells, tmp_path, flags, stages):
    train(cells, tmp_path / "run", *flags)
    result = metrics(tmp_path / "run")
    assert list(result["stages"]) == stages and result["mean"] == result["stages"][stages[-1]]
    same = result["stages"]["coarse"] == metrics(trained)["stages"]["coarse"]
    assert same == ("--deform" not in flags)
    assert (tmp_path / "run/prediction.tif").exists()
    assert not (tmp_path / f"run/stages/image_{stages[-1]}.tif").exists()
    if stages == ["coarse", "scm"]:
        soft, coarse = [emseg.open_volume(str(tmp_path / f"run/stages/train/image_{kind}.tif"))[:]
                        for kind in ("soft", "coarse")]
        np.testing.assert_array_equal(soft[[1, 2, 4, 5, 6]], coarse[[1, 2, 4, 5, 6]])


def test_a_label_folder_may_hold_only_the_annotated_slices(trained, cells, tmp_path):
    label = emseg.open_volume(f"{cells}/mito.tif@0:8")[:]
    (tmp_path / "drawn").mkdir()
    for z in (0, 3, 7):
        tifffile.imwrite(tmp_path / "drawn" / f"slice_{z:03}.tif", label[z])
    run("--volume", cells / "image.tif@0:8", "--label", tmp_path / "drawn", "--test-volume",
        cells / "image.tif@8:12", "--test-label", cells / "mito.tif@8:12", "--out-dir",
        tmp_path / "run", *TINY)
    assert_same_run(trained, tmp_path / "run")


def test_same_seed_same_weights_and_workers_change_nothing(trained, cells, tmp_path):
    train(cells, tmp_path / "same", "--workers", 2)
    train(cells, tmp_path / "other", "--seed", 1)
    assert torch.equal(weights(trained / "last.pt"), weights(tmp_path / "same" / "last.pt"))
    assert not torch.equal(weights(trained / "last.pt"), weights(tmp_path / "other" / "last.pt"))


@pytest.mark.parametrize("steps", [1, 3, 6, 8, 12])
def test_interrupted_and_resumed_is_bit_identical(trained, cells, tmp_path, monkeypatch, capsys,
                                                  steps):
    conftest.interrupt_after(monkeypatch, steps)
    with pytest.raises(SystemExit) as stopped:
        train(cells, tmp_path / "stopped")
    assert stopped.value.code == 130 and "--resume --out-dir" in capsys.readouterr().out
    monkeypatch.undo()
    run("--resume", "--out-dir", tmp_path / "stopped")
    assert_same_run(trained, tmp_path / "stopped")


def assert_same_run(one, other):
    assert torch.equal(weights(one / "last.pt"), weights(other / "last.pt"))
    assert log_without_seconds(one) == log_without_seconds(other)
    assert metrics(one)["stages"] == metrics(other)["stages"]
    for path in one.glob("**/*.tif"):
        assert path.read_bytes() == (other / path.relative_to(one)).read_bytes()


@pytest.mark.parametrize("stage", ["train/image_coarse", "train/image_soft", "image_coarse",
                                   "image_mpp"])
def test_resumed_between_trainings_is_identical(trained, cells, tmp_path, monkeypatch, capsys,
                                                stage):
    original = emseg.VolumeWriter.__setitem__

    def interrupted(self, index, slab):
        original(self, index, slab)
        if f"stages/{stage}.tif" in self.path:
            raise KeyboardInterrupt

    monkeypatch.setattr(emseg.VolumeWriter, "__setitem__", interrupted)
    with pytest.raises(SystemExit) as stopped:
        train(cells, tmp_path / "run")
    assert stopped.value.code == 130
    assert f"--resume --out-dir {tmp_path / 'run'}" in capsys.readouterr().err
    assert not (tmp_path / f"run/stages/{stage}.tif").exists()
    monkeypatch.undo()
    run("--resume", "--out-dir", tmp_path / "run")
    assert_same_run(trained, tmp_path / "run")


def test_a_checkpoint_predicts_through_all_stages(trained, cells, tmp_path):
    run("--checkpoint", trained / "best.pt", "--test-volume", cells / "image.tif@8:12",
        "--test-label", cells / "mito.tif@8:12", "--out-dir", tmp_path / "again", "--device", "cpu",
        "--save-probability", "--no-tta")
    assert metrics(tmp_path / "again")["stages"] == metrics(trained)["stages"]
    probability = emseg.open_volume(tmp_path / "again" / "probability.tif")[:]
    prediction = emseg.open_volume(tmp_path / "again" / "prediction.tif")[:]
    np.testing.assert_array_equal(probability > 0.5, prediction == 1)


def test_the_threshold_works_in_both_networks(trained, cells, tmp_path):
    run("--checkpoint", trained / "best.pt", "--test-volume", cells / "image.tif@8:12",
        "--out-dir", tmp_path / "low", "--device", "cpu", "--save-probability", "--no-tta",
        "--threshold", "0.05")
    low, high = [emseg.open_volume(str(folder / "stages/image_coarse.tif"))[:].sum()
                 for folder in (tmp_path / "low", trained)]
    assert low > high
    probability = emseg.open_volume(tmp_path / "low" / "probability.tif")[:]
    prediction = emseg.open_volume(tmp_path / "low" / "prediction.tif")[:]
    np.testing.assert_array_equal(probability > 0.05, prediction == 1)


def test_the_training_stack_is_refined_with_its_annotation(trained, cells, tmp_path):
    run(*training_data(cells), "--out-dir", tmp_path / "run", *TINY)
    assert torch.equal(weights(trained / "last.pt"), weights(tmp_path / "run" / "last.pt"))
    folder = tmp_path / "run" / "stages"
    assert {p.name for p in folder.glob("*.tif")} == {"image_mpp.tif"}      # coarse is in train/
    assert (folder / "image_mpp.tif").read_bytes() == (folder / "train/image_soft.tif").read_bytes()
    assert len(emseg.open_volume(tmp_path / "run" / "prediction.tif")) == 8


def test_eight_views_in_both_networks(trained, cells, tmp_path, monkeypatch):
    shapes, original = [], emseg.predict_slices

    def noting(network, image, *tiling):
        shapes.append((image.shape[1], tuple(image.flatten()[:9].tolist())))
        return original(network, image, *tiling)

    monkeypatch.setattr(emseg, "predict_slices", noting)
    run("--checkpoint", trained / "best.pt", "--test-volume", cells / "image.tif@8:9",
        "--out-dir", tmp_path / "out", "--device", "cpu", "--tta")
    assert [channels for channels, _ in shapes] == [1] * 8 + [5] * 8
    assert len(set(shapes[:8])) == 8                                    # eight distinct views


def test_validation_chooses_the_epoch_of_each_network(cells, tmp_path, monkeypatch):
    def train_with(dices, out, *more):
        values = iter(dices)
        monkeypatch.setattr(emseg.Run, "validate",
                            lambda self, *_, **__: {"val_dice": next(values)})
        train(cells, out, "--val-slices", "3", *more)

    train_with([0.2, 0.9, 0.3, 0.1, 0.8, 0.5], tmp_path / "run", "--epochs", 3, "--scm-epochs", 3)
    train_with([0.2, 0.9], tmp_path / "short", "--no-scm")
    assert torch.equal(weights(tmp_path / "run/best.pt", "coarse"),
                       weights(tmp_path / "short/last.pt", "coarse"))
    assert torch.load(tmp_path / "run/best.pt", weights_only=True)["step"] == 5 * 3
    assert metrics(tmp_path / "run")["selected_on"] == "validation"
    soft = emseg.open_volume(str(tmp_path / "run/stages/train/image_soft.tif"))[:]
    truth = (emseg.open_volume(f"{cells}/mito.tif@0:8")[:] == 255).astype(np.uint8)
    assert (soft[3] != truth[3]).any()          # a validation slice does not leak into soft labels


def test_validation_scores_stage_3_by_its_own_prediction(cells, tmp_path):
    run(*training_data(cells), "--val-volume", cells / "image.tif@8:11", "--val-label",
        cells / "mito.tif@8:11", "--out-dir", tmp_path / "run", *TINY, "--no-amp")
    shutil.copy(cells / "image.tif", tmp_path / "copy.tif")     # what validated is not scored
    run("--checkpoint", tmp_path / "run/best.pt", "--test-volume", tmp_path / "copy.tif@8:11",
        "--test-label", cells / "mito.tif@8:11", "--out-dir", tmp_path / "again", "--device", "cpu",
        "--no-tta", "--no-amp")
    rows = log_without_seconds(tmp_path / "run")
    best = max(float(row["val_dice"]) for row in rows if row["stage"] == "scm")
    assert metrics(tmp_path / "again")["mean"]["dice"] == pytest.approx(best, abs=2e-3)


def test_many_classes_and_downsampling_go_through_all_stages(cells, tmp_path):
    run("--volume", cells / "image.tif@0:8,0:109,0:127", "--label",
        cells / "label.tif@0:8,0:109,0:127", "--label-slices", "0,3,7", "--label-map",
        "3=1,2=2,*=0", "--test-volume", cells / "image.tif@8:12", "--test-label",
        cells / "label.tif@8:12", "--out-dir", tmp_path / "run", *TINY, "--downsample", 2,
        "--patch-size", 32, 32)
    result = metrics(tmp_path / "run")
    assert result["classes"] == ["background", "class 1", "class 2"]
    assert set(result["stages"]["mpp"]["per_class"]) == {"class 1", "class 2"}
    assert emseg.open_volume(tmp_path / "run" / "prediction.tif").shape == (4, 112, 128)
    soft = emseg.open_volume(str(tmp_path / "run/stages/train/image_soft.tif"))[:]
    truth = emseg.open_volume(f"{cells}/label.tif@0:8,0:109,0:127")[:]
    np.testing.assert_array_equal(soft[3] == 2, truth[3] == 2)


def test_unlabelled_volumes_teach_stage_3(cells, tmp_path):
    run(*training_data(cells), "--unlabeled-volume", cells / "image.tif@8:12", "--test-volume",
        cells / "image.tif@8:9", "--out-dir", tmp_path / "run", *TINY)
    folder = tmp_path / "run/stages/train"
    coarse = emseg.open_volume(str(folder / "2_image_coarse.tif"))[:]
    soft = emseg.open_volume(str(folder / "2_image_soft.tif"))[:]
    assert len(soft) == 4
    np.testing.assert_array_equal(soft, slow_stage_2(coarse, np.full_like(coarse, IGNORE), [], 2,
                                                     3, 20))


@pytest.mark.parametrize("model", sorted(train_sparse.MODELS))
def test_every_network_can_be_stage_1(cells, tmp_path, model):
    volumetric = model in emseg.NETWORKS_3D
    run("--volume", f"{cells}/image.tif@0:8,{CORNER}", "--label", f"{cells}/mito.tif@0:8,{CORNER}",
        "--label-slices", "0,3,7", "--val-slices", "3", "--test-volume",
        f"{cells}/image.tif@8:12,{CORNER}", "--test-label", f"{cells}/mito.tif@8:12,{CORNER}",
        "--out-dir", tmp_path / "run", *TINY, *BRIEF, "--model", model, "--scm-epochs", 1,
        "--patch-size", *[8, 32, 32][not volumetric:], "--width", conftest.narrow(model, 4))
    result = metrics(tmp_path / "run")
    assert result["model"] == model and list(result["stages"]) == ["coarse", "mpp", "scm"]


def test_a_3d_network_learns_from_sparse_slices_of_its_windows(cells, tmp_path):
    run("--volume", cells / "image.tif", "--label", cells / "mito.tif", "--label-slices", "0:12:4",
        "--test-volume", cells / "image.tif", "--test-label", cells / "mito.tif", "--out-dir",
        tmp_path / "run", "--model", "unet3d", "--no-mpp", "--no-scm", "--width", 8, "--epochs", 4,
        "--steps-per-epoch", 15, "--batch-size", 2, "--patch-size", 8, 64, 64, "--lr", "1e-3",
        "--device", "cpu", "--no-tta", "--foreground", 1)
    assert metrics(tmp_path / "run")["mean"]["iou"] > 0.1


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, message", [
    (["--context", "4"], "no middle slice"),
    (["--threshold", "1.5"], "between 0 and 1"),
    (["--min-size", "-1"], "--min-size -1"),
    (["--erosions", "0"], "0 is not above 0"),
    (["--foreground", "2"], "between 0 and 1"),
    (["--patch-size", "32"], "unet takes two sides, Y X"),
    (["--patch-size", "30", "32"], "nearest to 30: 24 or 32"),
    (["--model", "unet3d"], "unet3d takes three sides, Z Y X"),
    (["--model", "unet3d", "--patch-size", "4", "32", "32"], "needs 8 slices"),
    (["--model", "unet3d", "--patch-size", "16", "32", "32"], "do not fit into 8 x 112 x 128"),
    (["--no-scm", "--save-probability"], "gives no probabilities"),
    (["--label", "missing.tif"], "missing.tif: no such file"),
    (["--label-slices", "0,99"], "99"),
    (["--val-slices", "0,3,7"], "no slice is left to train on"),
])
def test_bad_input_is_one_line_and_leaves_nothing(cells, tmp_path, capsys, change, message):
    out = tmp_path / "out"
    assert message in refused(capsys, *training_data(cells), "--out-dir", out, *TINY, *change)
    assert not out.exists()


def test_a_class_without_annotation_is_refused(cells, tmp_path, capsys):
    line = refused(capsys, "--volume", cells / "image.tif", "--label", cells / "label.tif",
                   "--label-map", "3=1,7=2,*=0", "--classes", "background", "mitochondrion",
                   "synapse", "--out-dir", tmp_path / "out", *TINY)
    assert "no slice to train on shows the class synapse" in line


def test_empty_slices_that_count_as_annotated_are_noted(cells, tmp_path, capsys):
    label = emseg.open_volume(cells / "mito.tif")[:]
    label[[z for z in range(12) if z % 4]] = 0
    tifffile.imwrite(tmp_path / "drawn.tif", label)
    run("--volume", cells / "image.tif", "--label", tmp_path / "drawn.tif", "--out-dir",
        tmp_path / "out", *TINY, "--no-scm")
    assert "note: 9 of 12 annotated slices show background only" in capsys.readouterr().out


def test_an_interrupted_prediction_says_to_start_again(trained, cells, tmp_path, monkeypatch,
                                                       capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(emseg, "predict_volume", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run("--checkpoint", trained / "best.pt", "--test-volume", cells / "image.tif", "--out-dir",
            tmp_path / "out", "--device", "cpu")
    assert stopped.value.code == 130 and "--overwrite" in capsys.readouterr().err


def test_a_threshold_needs_two_classes(cells, tmp_path, capsys):
    line = refused(capsys, "--volume", cells / "image.tif", "--label", cells / "label.tif",
                   "--threshold", "0.2", "--out-dir", tmp_path / "out", *TINY)
    assert "--threshold is for two classes" in line


def test_a_checkpoint_before_stage_3_is_refused(cells, tmp_path, capsys, monkeypatch):
    conftest.interrupt_after(monkeypatch, 8)
    with pytest.raises(SystemExit):
        train(cells, tmp_path / "run")
    monkeypatch.undo()
    capsys.readouterr()
    line = refused(capsys, "--checkpoint", tmp_path / "run" / "best.pt", "--test-volume",
                   cells / "image.tif", "--out-dir", tmp_path / "out")
    assert "has not reached stage 3" in line and not (tmp_path / "out").exists()


def test_overwrite_leaves_no_stage_of_the_old_run(trained, cells, tmp_path):
    train(cells, tmp_path / "run", "--seed", 1)
    train(cells, tmp_path / "run", "--overwrite")
    assert_same_run(trained, tmp_path / "run")


# -- README, demo, real data -----------------------------------------------------------------------


def test_every_readme_command_parses(trained, monkeypatch):
    assert conftest.parse_readme_commands(train_sparse, trained / "best.pt", monkeypatch) >= 4


@pytest.mark.background(ROOT / "train_sparse.py", "--demo")
def test_the_demo_does_what_the_readme_says(finished):
    assert finished.returncode == 0, finished.stderr
    result = metrics(finished.folder / "runs" / "train_sparse-unet-seed0-demo")
    assert result["mean"]["dice"] > 0.65
    assert result["stages"]["scm"]["dice"] > result["stages"]["coarse"]["dice"] - 0.03


def test_real_mitochondria_from_sparse_slices(real_data, tmp_path):
    run("--volume", real_data / "lucchi/Train_In@0:40", "--label",
        real_data / "lucchi/Train_Out@0:40", "--label-slices", "0:40:5", "--test-volume",
        real_data / "lucchi/Train_In@120:128", "--test-label",
        real_data / "lucchi/Train_Out@120:128", "--width", "8", "--patch-size", "128", "128",
        "--batch-size", "8", "--epochs", "4", "--steps-per-epoch", "40", "--scm-epochs", "1",
        "--downsample", "2", "--lr", "1e-3", "--normalize", "volume", "--no-tta", "--out-dir",
        tmp_path / "run", "--device", "cpu")
    stages = metrics(tmp_path / "run")["stages"]
    assert stages["scm"]["iou"] > 0.5 and stages["mpp"]["iou"] > 0.5
