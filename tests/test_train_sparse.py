"""train_sparse.py: its three stages by themselves, and whole runs on small and real data."""

import functools
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage

import conftest
import emseg
import train_cps
import train_sparse
from conftest import CORNER, InMemory, log_without_seconds, metrics, weights

IGNORE = emseg.IGNORE
CROSS = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], dtype=bool)
run = functools.partial(conftest.run, train_sparse)
refused = functools.partial(conftest.refused, train_sparse)
TINY_TRAINING = ["--batch-size", "4", "--epochs", "2", "--steps-per-epoch", "3", "--device", "cpu",
                 "--min-size", "20", "--no-tta", "--lr", "3e-3"]
TINY = ["--width", "4", "--patch-size", "32", "32", "--context", "5", *TINY_TRAINING]


def training_data(cells):
    return ["--volume", cells / "image.tif@0:8", "--label", cells / "mito.tif@0:8",
            "--label-slices", "0,3,7"]


def new_data(cells):
    return ["--test-volume", cells / "image.tif@8:12", "--test-label", cells / "mito.tif@8:12"]


def train(cells, out, *more):
    run(*training_data(cells), *new_data(cells), "--out-dir", out, *TINY, *more)


@pytest.fixture(scope="module")
def trained(cells, tmp_path_factory):
    """A finished tiny run of all three stages."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    train(cells, folder)
    return folder


def ids_of(folder, name):
    """The class ids of a file of a run."""
    return emseg.open_volume(folder / name)[:]


def mitochondria(cells, crop):
    return (emseg.open_volume(f"{cells}/mito.tif@{crop}")[:] == 255).astype(np.uint8)


def blobs(shape, classes=2, seed=0):
    """Random class ids (Z, Y, X) uint8 with objects of all sizes that change along z."""
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.standard_normal((classes - 1, *shape)), (0, 0.7, 2, 2))
    result = np.zeros(shape, np.uint8)
    for k, one in enumerate(field, 1):
        result[one > np.quantile(one, 0.7)] = k
    return result


def annotation(shape, slices, classes=2, ignored=0.0):
    """An annotation of these slices, IGNORE elsewhere and on a share of their pixels."""
    label = blobs(shape, classes, seed=1)
    label[np.setdiff1d(np.arange(shape[0]), slices)] = IGNORE
    label[np.random.default_rng(1).random(shape) < ignored] = IGNORE
    return InMemory(label, slices)


# -- stage 1: piecewise affine maps ----------------------------------------------------------------


def test_piecewise_affine_maps_are_affine_on_triangles():
    torch.manual_seed(0)
    field = train_sparse.piecewise_affine_displacement(800, (31, 61), "cpu").numpy()
    field /= [61, 31]                               # x first
    knots = field[:, ::10, ::20]                    # 4 x 4 knots, corners included
    assert knots.var((0, 1, 2)) == pytest.approx((0.05**3 - 0.01**3) / 3 / 0.04, rel=0.1)
    strength = knots.reshape(800, 32).std(1)        # drawn for each image
    assert strength.min() < 0.015 and strength.max() > 0.045
    y, x = np.mgrid[:11, :21] / [[[10]], [[20]]]    # of the cell between four knots
    a, b, c, d = [knots[:, i, j, None, None] for i in (1, 2) for j in (1, 2)]
    y, x = y[..., None], x[..., None]
    wanted = np.where(x + y <= 1, a + x * (b - a) + y * (c - a),
                      d + (1 - x) * (c - d) + (1 - y) * (b - d))
    np.testing.assert_allclose(field[:, 10:21, 20:41], wanted, atol=1e-6)


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
    return mask & np.isin(objects, [n for n in range(1, count + 1)
                                    if (objects == n).sum() >= min_size])


def slow_stage_2(ids, label, slices, classes, erosions, min_size):
    """Section 2.3, each slice from its neighbours, in loops."""
    Z, claims = len(ids), []
    for k in range(1, classes):
        def restored(stack):
            return [np.where(label[z] == IGNORE, stack[z], label[z] == k) for z in range(Z)]

        def cleaned(stack):
            return restored([slow_remove_small(mask, min_size) for mask in stack])

        def beside(z, step):
            return stack[min(max(z + step, 0), Z - 1)]

        stack = [ids[z] == k for z in range(Z)]
        for z in range(Z):
            for j in [s for s in slices if s <= z][-1:] + [s for s in slices if s >= z][:1]:
                eroded = label[j] == k
                for _ in range(erosions * abs(z - j)):
                    eroded = ndimage.binary_erosion(eroded, CROSS, border_value=1)
                stack[z] = stack[z] | eroded
        stack = cleaned(stack)
        for pairs in ([(-1, 1)], [(-1, 2), (-2, 1)]):
            stack = restored([np.logical_and.reduce(
                [stack[z], *(beside(z, a) | beside(z, b) for a, b in pairs)]) for z in range(Z)])
            stack = cleaned([np.logical_or.reduce(
                [stack[z], *(beside(z, a) & beside(z, b) for a, b in pairs)]) for z in range(Z)])
        claims.append(stack)
    result = np.zeros_like(ids)
    for place in np.ndindex(ids.shape):
        claiming = [k for k in range(1, classes) if claims[k - 1][place[0]][place[1:]]]
        if claiming:
            result[place] = ids[place] if ids[place] in claiming else claiming[0]
    return result


@pytest.mark.parametrize("slices, classes, ignored", [
    ([], 3, 0), ([0, 5, 17], 2, 0), ([2, 3, 11], 2, 0.2), ([1, 7], 4, 0)])
@pytest.mark.parametrize("erosions, min_size", [(1, 12), (3, 0)])
def test_stage_2_in_slabs_equals_loops(slices, classes, ignored, erosions, min_size):
    shape = (18, 22, 24)
    ids, label = blobs(shape, classes), annotation(shape, slices, classes, ignored=ignored)
    args = SimpleNamespace(classes=range(classes), erosions=erosions, min_size=min_size)
    found = np.concatenate([train_sparse.postprocess(
        InMemory(ids), label if slices else None, slice(z, z + 3), args) for z in range(0, 18, 3)])
    wanted = slow_stage_2(ids, label.array, slices, classes, erosions, min_size)
    np.testing.assert_array_equal(found, wanted)
    assert found.dtype == np.uint8 and (wanted != ids).any()


# -- stage 3 ---------------------------------------------------------------------------------------


def test_the_defaults_are_the_papers():
    args = train_sparse.parse_args(["--volume", "a", "--label", "b"])
    assert (args.epochs, args.scm_epochs, args.batch_size, args.lr) == (100, 100, 16, 5e-4)
    assert (args.context, args.erosions, args.threshold, args.tta) == (15, 3, 0.5, True)
    assert args.deform == "affine" and args.mpp and args.scm and args.patch_size == [512, 512]
    args.classes = ["background", "mitochondrion"]
    assert [emseg.count_parameters(network) for network in
            train_sparse.make_networks(args).values()] == [7_701_825, 7_709_889]
    assert emseg.count_parameters(train_sparse.MODELS["unet3d"](1, 1)) == 16_318_691


def test_augmented_masks_stay_class_ids_and_pairs():
    torch.manual_seed(0)
    stack = torch.from_numpy(blobs((160 * 3, 16, 16), 4)).view(160, 3, 16, 16)
    for deform in "affine", "none":
        options = SimpleNamespace(args=SimpleNamespace(deform=deform, classes=range(4)))
        masks, soft = train_sparse.augment_masks(options, stack, stack.clone())
        masks = masks.view(160, 3, 3, 16, 16)               # class, slice
        assert set(masks.unique().tolist()) == {0, 1} and masks.sum(1).max() == 1
        coarse = sum(k * masks[:, k - 1] for k in (1, 2, 3))
        assert torch.equal(coarse[:, 1].long(), soft)
    views = [torch.rot90(stack.flip(axes), turns, (2, 3)) for axes in ((), (1,), (3,), (1, 3))
             for turns in range(4)]
    same = torch.stack([(view == coarse).flatten(1).all(1) for view in views])
    assert same.any(0).all() and same.any(1).all()          # all 16, and nothing else


# -- whole runs ------------------------------------------------------------------------------------


def test_a_run_writes_all_stages(trained, cells):
    assert {path.name for path in trained.iterdir()} == {
        "config.json", "best.pt", "prediction.tif", "metrics.json", "figure.png", "maps.png",
        "slice_dice.png", "coarse", "scm", "stages"}
    assert {"log.csv", "best.pt", "metrics.json"} < {p.name for p in (trained / "scm").iterdir()}
    result, truth = metrics(trained), mitochondria(cells, "8:12") == 1
    assert list(result["stages"]) == ["coarse", "mpp", "scm"]
    assert result["mean"] == result["stages"]["scm"] and result["train_seconds"] > 0
    for stage, name in (("coarse", "stages/1_coarse.tif"), ("mpp", "stages/1_mpp.tif"),
                        ("scm", "prediction.tif")):
        pred = ids_of(trained, name) == 1
        iou = (pred & truth).sum() / (pred | truth).sum()
        assert result["stages"][stage]["iou"] == pytest.approx(iou)


def test_soft_labels_hold_the_annotation_and_the_rules(trained, cells):
    soft, coarse = [ids_of(trained, f"stages/0_{kind}.tif") for kind in ("mpp", "coarse")]
    label = mitochondria(cells, "0:8")
    assert (coarse[[0, 3, 7]] != label[[0, 3, 7]]).any()
    label[[1, 2, 4, 5, 6]] = IGNORE
    np.testing.assert_array_equal(soft, slow_stage_2(coarse, label, [0, 3, 7], 2, 3, 20))


def test_stage_3_sees_the_masks_around_each_slice(trained):
    """The prediction, computed again slice by slice from the coarse masks and the weights."""
    network = emseg.UNet(5, 1, 4).eval()
    emseg.load_weights(network, emseg.load_checkpoint(trained), "scm", trained)
    coarse, wanted = ids_of(trained, "stages/1_coarse.tif"), []
    for z in range(4):
        masks = np.stack([coarse[min(max(z + d, 0), 3)] for d in (-2, -1, 0, 1, 2)])
        with torch.no_grad():
            wanted.append(network(torch.from_numpy(masks)[None].float())[0, 0] > 0)
    assert (np.stack(wanted) == ids_of(trained, "prediction.tif")).mean() > 0.995   # but for bf16


@pytest.mark.parametrize("steps", [2, None, 8])             # in stage 1, stage 2, stage 3
def test_interrupted_and_resumed_is_bit_identical(trained, cells, tmp_path, monkeypatch, steps):
    if steps:
        conftest.interrupt_after(monkeypatch, steps)
    else:
        monkeypatch.setattr(train_sparse, "postprocess", lambda *_: signal.raise_signal(15))
    with pytest.raises(SystemExit) as stopped:
        train(cells, tmp_path)
    assert stopped.value.code == 130
    monkeypatch.undo()
    run("--resume", "--out-dir", tmp_path)
    for name in "coarse/last.pt", "scm/last.pt", "best.pt":
        assert torch.equal(weights(trained / name), weights(tmp_path / name))
    for stage in "coarse", "scm":
        assert log_without_seconds(trained / stage) == log_without_seconds(tmp_path / stage)
    assert metrics(trained)["stages"] == metrics(tmp_path)["stages"]


def test_a_checkpoint_predicts_through_all_stages(trained, cells, tmp_path):
    for checkpoint, name, stage in ((trained, "all", "stages/0_coarse.tif"),
                                    (trained / "coarse", "coarse", "prediction.tif")):
        run("--checkpoint", checkpoint, *new_data(cells), "--out-dir", tmp_path / name, "--device",
            "cpu", "--no-tta", "--threshold", "0.05", "--save-probability")
        np.testing.assert_array_equal(ids_of(tmp_path / name, "probability.tif") > 0.05,
                                      ids_of(tmp_path / name, "prediction.tif") == 1)
        ids = ids_of(tmp_path / name, stage)                # of stage 1, more than at 0.5
        assert ids.sum() > ids_of(trained, "stages/1_coarse.tif").sum()
    np.testing.assert_array_equal(ids, ids_of(tmp_path / "all", "stages/0_coarse.tif"))


def test_the_training_stack_is_refined_with_its_annotation(trained, cells, tmp_path):
    run(*training_data(cells), "--test-volume", cells / "image.tif@0:8", "--test-label",
        cells / "mito.tif@0:8", "--out-dir", tmp_path, *TINY, "--no-scm")
    prediction = ids_of(tmp_path, "prediction.tif")
    np.testing.assert_array_equal(prediction, ids_of(trained, "stages/0_mpp.tif"))
    np.testing.assert_array_equal(prediction[[0, 3, 7]], mitochondria(cells, "0:8")[[0, 3, 7]])
    assert metrics(tmp_path)["volumes"][0]["ignored"] == 3 * 112 * 128  # those it learnt from
    assert list(metrics(tmp_path)["stages"]) == ["coarse", "mpp"]


def test_validation_chooses_the_epoch_of_each_network(cells, tmp_path, monkeypatch):
    values, shown = iter([0.2, 0.9, 0.3, 0.1, 0.8, 0.5]), []

    def validate(run, predict, items, **options):
        shown.append(items[0].image[3].max())
        return {"val_dice": next(values)}

    monkeypatch.setattr(emseg, "validate", validate)
    train(cells, tmp_path, "--val-slices", "3", "--epochs", 3)
    for key, stage in ("network", "coarse"), ("scm", "scm"):
        assert emseg.load_checkpoint(tmp_path / stage)["step"] == 2 * 3
        best = weights(tmp_path / "best.pt", key)
        assert torch.equal(best, weights(tmp_path / stage / "best.pt"))
    assert min(shown[:3]) > 1 >= max(shown[3:])             # slices, then their coarse masks
    soft = ids_of(tmp_path, "stages/0_mpp.tif")
    assert (soft[3] != mitochondria(cells, "3:4")[0]).any()     # it does not leak into soft labels


def test_many_classes_smaller_slices_and_unlabelled_volumes(cells, tmp_path):
    run("--volume", cells / "image.tif@0:8,0:109,0:127", "--label",
        cells / "label.tif@0:8,0:109,0:127", "--label-slices", "0,3,7", "--label-map",
        "3=1,2=2,*=0", "--unlabeled-volume", cells / "image.tif@8:10", "--test-volume",
        cells / "image.tif@10:12", "--test-label", cells / "label.tif@10:12", "--out-dir", tmp_path,
        *TINY, "--downsample", 2)
    assert set(metrics(tmp_path)["stages"]["mpp"]["per_class"]) == {"class 1", "class 2"}
    assert ids_of(tmp_path, "prediction.tif").shape == (2, 112, 128)
    truth = emseg.open_volume(f"{cells}/label.tif@3:4,0:109,0:127")[0]
    np.testing.assert_array_equal(ids_of(tmp_path, "stages/0_mpp.tif")[3] == 2, truth == 2)
    coarse, soft = [ids_of(tmp_path, f"stages/1_{kind}.tif") for kind in ("coarse", "mpp")]
    nothing = np.full_like(coarse, IGNORE)
    np.testing.assert_array_equal(soft, slow_stage_2(coarse, nothing, [], 3, 3, 20))


def test_a_3d_network_can_be_stage_1_alone(cells, tmp_path):
    run("--volume", f"{cells}/image.tif@:,{CORNER}", "--label", f"{cells}/mito.tif@:,{CORNER}",
        "--label-slices", "0:12:4", "--val-slices", "8", "--out-dir", tmp_path, *TINY, "--model",
        "unet3d", "--patch-size", 8, 32, 32, "--epochs", 3, "--lr", "1e-3", "--no-mpp")
    assert "stages" not in metrics(tmp_path) and not (tmp_path / "stages").exists()
    losses = [float(row["loss"]) for row in log_without_seconds(tmp_path / "coarse")]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("change, message", [
    (["--context", "4"], "no middle slice"),
    (["--patch-size", "30", "32"], "nearest to 30: 24 or 32"),
    (["--model", "unet3d"], "unet3d takes three sides, Z Y X"),
    (["--unlabeled-volume", "CELLS/image.tif@:,0:20"], "do not fit into 12 x 20"),
])
def test_bad_input_is_one_line_and_leaves_nothing(cells, tmp_path, capsys, change, message):
    out, change = tmp_path / "out", [text.replace("CELLS", str(cells)) for text in change]
    assert message in refused(capsys, *training_data(cells), "--out-dir", out, *TINY, *change)
    assert not out.exists()


def test_a_finished_run_can_be_stage_1(cells, trained, tmp_path, capsys):
    """--coarse: its network and settings, not trained again; also from train_cps.py."""
    conftest.run(train_cps, *conftest.tiny_cps(
        cells, tmp_path / "cps", "--method", "supervised", "--steps-per-epoch", 1, "--model",
        "unet++", "--average-branches"))
    for coarse in trained, tmp_path / "cps":
        out = tmp_path / f"{coarse.name}-3"
        assert "give one of them" in refused(capsys, *training_data(cells), "--coarse", coarse,
                                             "--init", trained)
        run(*training_data(cells), *new_data(cells), "--out-dir", out, "--coarse", coarse,
            "--context", 3, *TINY_TRAINING)
        assert torch.equal(weights(out / "best.pt", "network"), weights(coarse / "best.pt",
                                                                        "network"))
        assert not (out / "coarse").exists() and (out / "scm" / "best.pt").exists()
    assert np.array_equal(ids_of(tmp_path / "trained-3", "stages/1_coarse.tif"),
                          ids_of(trained, "stages/1_coarse.tif"))
