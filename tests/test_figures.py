"""Figures: what pictures show, read from what was drawn. No warning of matplotlib passes."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

import emseg
from conftest import InMemory
from emseg import IGNORE

CLASSES = ["background", "a", "b"]
VOXEL = (20.0, 8.0, 8.0)
pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, in few pixels."""
    drawn, new_figure = [], emseg.new_figure
    monkeypatch.setattr(emseg, "new_figure",
                        lambda **options: drawn.append(new_figure(dpi=30, **options)) or drawn[-1])
    return drawn


def item(shape=(5, 40, 40), labelled=True, dice=None, slices=None):
    """Black volumes: the left half is class 1, of which the upper half is predicted as class 2."""
    truth = np.zeros(shape, np.uint8)
    truth[:, :, : shape[2] // 2] = 1
    pred = truth.copy()
    pred[:, : shape[1] // 2] *= 2
    return ("name", InMemory(np.zeros(shape, np.uint8), voxel_size=VOXEL),
            InMemory(truth, slices) if labelled else None, {"prediction": InMemory(pred)}, dice)


def picture(axis):
    return axis.images[0].get_array()


# -- slices


def test_overlays_by_hand():
    def wide(*values):                          # three pixels of each: two outlines and between
        return np.repeat(np.array([values], np.uint8), 3, axis=1)

    grey = wide(100, 100, 200, 0, 50, 60)
    truth, pred = wide(1, 1, 0, 0, IGNORE, 2), wide(1, 0, 1, 0, 1, 1)
    green, red, blue = [np.array(to_rgb(c)) for c in ("#2ca02c", "#d62728", "#1f77b4")]
    base = 0.55 * grey[0, 1::3, None] / 255
    wanted = [base[0] + 0.45 * green, base[1] + 0.45 * red, base[2] + 0.45 * blue, [0] * 3,
              [50 / 255] * 3, base[5] + 0.45 * red]
    errors = emseg.error_overlay(grey, truth, pred)[0]
    np.testing.assert_allclose(errors[1::3], wanted)
    np.testing.assert_allclose(errors[[2, 3, 5, 6, 8]], [green, red, red, blue, blue])
    colored = emseg.overlay(grey, truth)[0]
    one, two = [0.45 * np.array(to_rgb(c)) for c in ("#e69f00", "#cc79a7")]
    np.testing.assert_allclose(colored[1], base[0] + one)
    np.testing.assert_allclose(colored[13::3], [[50 / 255] * 3, base[5] + two])


@pytest.mark.parametrize("shape", [(5, 40, 40), (1, 1500, 30), (1, 2, 2)])
def test_a_figure_shows_image_truth_prediction_and_errors(tmp_path, figures, shape):
    items = [item(shape), item(labelled=False)]
    emseg.save_slices(tmp_path / "figure.png", items, CLASSES, rows=2)
    assert imread(tmp_path / "figure.png").std() > 0
    axes = figures[0].axes
    assert [axis.get_title() for axis in axes[:4]] == ["image", "truth", "prediction", "errors"]
    _, image, label, preds, _ = items[0]
    z, step = shape[0] // 2, -(-max(shape[1:]) // 768)
    arrays = [volume.array[z, ::step, ::step] for volume in (image, label, preds["prediction"])]
    np.testing.assert_allclose(picture(axes[1]), emseg.overlay(*arrays[:2]))
    np.testing.assert_allclose(picture(axes[3]), emseg.error_overlay(*arrays))
    assert [len(axis.images) for axis in axes[4:]] == [1, 0, 1, 0]      # no truth, no errors


def test_the_worst_annotated_slices_come_first(tmp_path, figures):
    dice = np.array([[0.9, 0.5, 0.3], [1, 0, 0], [0.9, 0.9, 0.9], [1, np.nan, np.nan],
                     [0.9, np.nan, 0.2]])
    emseg.save_slices(tmp_path / "figure.png", [item(dice=dice, slices=[0, 2, 3, 4])], CLASSES)
    names = [axis.texts[0].get_text() for axis in figures[0].axes[::4]]
    assert names == ["name  z = 4  Dice 0.200", "name  z = 0  Dice 0.400",
                     "name  z = 2  Dice 0.900", "name  z = 3"]


def test_without_truth_slices_are_spread_evenly_over_the_volumes(tmp_path):
    items = [item((40, 8, 8), labelled=False), item((9, 8, 8), labelled=False)]
    emseg.save_slices(tmp_path / "figure.png", items, CLASSES, rows=4)
    assert [volume.read_slices for _, volume, *_ in items] == [[5, 25], [1, 5]]


@pytest.mark.parametrize("maps, first, second", [(False, "first: errors", "second: errors"),
                                                 (True, "first", "second")])
def test_stages_stand_side_by_side(tmp_path, figures, maps, first, second):
    name, image, label, preds, _ = item((1, 40, 40))
    image.array[:], stages = 51, {"first": preds["prediction"], "second": label}
    emseg.save_slices(tmp_path / "s.png", [(name, image, label, stages, None)], CLASSES, maps)
    axes = figures[0].axes
    assert [axis.get_title() for axis in axes] == ["image", "truth", first, second]
    assert not np.allclose(picture(axes[2]), picture(axes[3]))
    assert np.allclose(picture(axes[1]), picture(axes[3])) == maps          # classes, not errors
    label.array[0, 0, 0] = IGNORE
    truth = emseg._panels(0, image, label, stages, 1, maps)["truth"]
    assert truth[0, [0, -1], 0].tolist() == ([128 / 255, 0] if maps else [51 / 255] * 2)
    assert np.allclose(truth[20, 10], to_rgb(emseg.CLASS_COLORS[0])) == maps    # not mixed
    assert ("true positive" in [text.get_text() for text in figures[0].legends[0].texts]) != maps


def test_small_objects_are_shown_enlarged(tmp_path, figures):
    truth = np.zeros((1, 80, 80), np.uint8)
    truth[0, 60:64, 8:12] = 1
    arrays = InMemory(0 * truth), InMemory(truth), {"prediction": InMemory(0 * truth)}
    emseg.save_slices(tmp_path / "figure.png", [("small", *arrays, None)], CLASSES)
    (inset,) = figures[0].axes[3].child_axes                # errors
    (left, right), (low, high) = inset.get_xlim(), inset.get_ylim()
    assert left < 8 and 12 < right < left + 11 and high < 60 and 64 < low < high + 11
    emseg.save_slices(tmp_path / "figure.png", [item()], CLASSES)
    assert not figures[1].axes[3].child_axes


@pytest.mark.parametrize("side, step, nm, text", [(400, 1, 8.0, "500 nm"), (400, 1, 40.0, "2 µm"),
                                                  (2000, 3, 0.5, "200 nm"), (64, 1, 5.0, "50 nm")])
def test_scale_bar_has_the_length_that_it_names(side, step, nm, text):
    axis = emseg.new_figure().subplots()
    axis.imshow(np.zeros((9, -(-side // step))))
    emseg._scale_bar(axis, nm * step)
    x0, x1 = axis.lines[0].get_xdata()
    found, unit = axis.texts[0].get_text().split()
    assert f"{found} {unit}" == text
    assert (x1 - x0) * step * nm == pytest.approx(float(found) * {"nm": 1, "µm": 1000}[unit])


def ball(side, radius):
    return sum((axis + 0.5 - side / 2) ** 2 for axis in np.ogrid[:side, :side, :side]) < radius**2


def test_seen_from_above_slices_look_as_on_a_screen():
    """Slice 0 hides the others; x runs to the right, y down; nothing is mirrored."""
    ids = np.zeros((10, 40, 60), np.uint8)
    ids[:2, 5:15, 10:30] = 1
    ids[5:, 5:35, 10:30] = 2
    rgb = emseg._relief(emseg._first_hits(ids, 3, emseg.VIEWS[0]), ["red", "blue"])
    red, blue = rgb[..., 0] > rgb[..., 2], rgb[..., 2] > rgb[..., 0]
    for mask, place in (red, (5, 15, 10, 30)), (blue, (15, 35, 10, 30)):
        (y, x) = np.nonzero(mask)
        np.testing.assert_allclose((y.min(), y.max() + 1, x.min(), x.max() + 1), place, atol=1)


@pytest.mark.parametrize("voxel_size", [None, VOXEL])
def test_surfaces_show_all_and_each_class_of_truth_and_prediction(tmp_path, figures, voxel_size):
    ids = 2 * ball(24, 10).astype(np.uint8) - ball(24, 5)
    rows = {"truth": InMemory(ids, voxel_size=voxel_size),
            "prediction": InMemory(0 * ids, voxel_size=voxel_size)}
    emseg.save_surfaces(tmp_path / "surfaces.png", rows, CLASSES, max_side=30)
    axes = np.array(figures[0].axes).reshape(6, 3)
    assert [axis.get_title(loc="left") for axis in axes[1:3, 0]] == ["prediction: all", "truth: a"]
    for axis, color in zip(axes[::2, 1], [emseg.CLASS_COLORS[k] for k in (1, 0, 1)]):
        middle = picture(axis)[picture(axis).shape[0] // 2, picture(axis).shape[1] // 2]
        np.testing.assert_allclose(middle / middle.max(), to_rgb(color) / np.max(to_rgb(color)))
    assert all((picture(axis) == 1).all() for axis in axes[1::2].flat)      # nothing predicted
    assert bool(axes[0, 0].lines) == (voxel_size is not None)               # the scale bar


# -- curves


def test_curves_with_gaps_where_nothing_was_measured(tmp_path, figures):
    emseg.save_curves(tmp_path / "curves.png", [
        {"loss": 3.0, "loss_x": 1.0, "val_dice": 0.1}, {"loss": 2.0, "loss_x": 0.0,
                                                        "val_dice": None}])
    losses, dice = [axis.lines for axis in figures[0].axes]
    assert [line.get_label() for line in losses] == ["loss_x"]                  # not the total
    np.testing.assert_array_equal(losses[0].get_xydata(), [[0, 1], [1, 0]])
    np.testing.assert_array_equal(dice[0].get_xydata(), [[0, 0.1], [1, np.nan]])
    emseg.save_curves(tmp_path / "curves.png", [{"loss": 3.0, "cps_weight": 0.0},
                                                {"loss": 2.0, "cps_weight": 0.5}])
    (area,) = figures[1].axes[0].collections
    assert area.get_paths()[0].vertices[:, 1].max() == 0.5


def test_slice_dice_shows_every_class_against_z_on_a_fitted_axis(tmp_path, figures):
    dice = np.array([[0.9, 0.61, np.nan], [0.9, 0.62, 0.65], [0.8, np.nan, 0.66]])
    items = [("first", dice, [1], lambda z: f"z = {z} (file {z + 10})"),
             ("nothing scored", np.full((2, 3), np.nan), [], "z = {}".format)]
    emseg.save_slice_dice(tmp_path / "slice_dice.png", items, CLASSES)
    axis = figures[0].axes[0]
    (marks,) = axis.collections
    assert [mark[:, 0].tolist() for mark in marks.get_segments()] == [[1, 1]]
    for line, column, color in zip(axis.lines, dice.T[1:], emseg.CLASS_COLORS):
        np.testing.assert_array_equal(line.get_ydata(), column)
        assert line.get_color() == color
    low, high = axis.get_ylim()
    assert 0.59 < low < 0.61 and 0.66 < high < 0.68
    assert [text.get_text() for text in axis.get_legend().get_texts()] == [
        "a", "b", "labelled slices"]
    ticks = {tick: text.get_text() for tick, text in zip(axis.get_xticks(), axis.get_xticklabels())}
    assert ticks == {z: f"z = {z}\n(file {z + 10})" for z in range(3)}
    assert {text.get_text() for text in figures[0].axes[1].get_xticklabels()} == {"z = 0", "z = 1"}


def test_a_histogram_shows_a_dot_for_each_run_and_a_line_for_each_model(tmp_path, figures):
    groups = {"unet": [0.5, 0.7, 0.6], "a": [0.9]}
    emseg.save_histogram(tmp_path / "histogram.png", {"one": groups, "two": {"x": [0.1]}}, "mIoU")
    axis, _ = figures[0].axes
    assert [[*line.get_xdata()] for line in axis.lines] == [[0.5, 0.7, 0.6], [0.9]]
    assert [[*line.get_ydata()] for line in axis.lines] == [[0, 0, 0], [1]]
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["unet (3)", "a (1)"]
    assert axis.get_xlabel() == "mIoU"
