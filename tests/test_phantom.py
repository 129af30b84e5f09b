"""Tests of the synthetic EM volume: exact labels, plausible fractions, not trivial."""
import numpy as np
import pytest
from scipy import ndimage

from emseg import (MEMBRANE, MITOCHONDRION, NUCLEUS, PHANTOM_CLASSES, VESICLE, phantom,
                   phantom_cell)

SHAPE = (16, 192, 192)


@pytest.fixture(scope="module")
def volumes():
    return [phantom(SHAPE, seed=seed) for seed in range(6)]


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def edge(mask):
    """Voxels of a mask with a 4-neighbour in the slice outside it."""
    inner = np.ones_like(mask)
    for axis in (1, 2):
        for step in (-1, 1):
            inner &= np.roll(mask, step, axis)
    return mask & ~inner


def test_same_seed_same_bits_other_seed_other_volume(volumes):
    image, label = phantom(SHAPE, seed=0)
    assert np.array_equal(image, volumes[0][0]) and np.array_equal(label, volumes[0][1])
    assert dice(label == MITOCHONDRION, volumes[1][1] == MITOCHONDRION) < 0.5


@pytest.mark.parametrize("shape", [(1, 96, 96), (2, 96, 200), (7, 250, 131), (1, 512, 300)])
def test_any_shape(shape):
    image, label = phantom(shape, seed=1)
    assert image.shape == label.shape == shape
    assert image.dtype == label.dtype == np.uint8
    assert label.max() < len(PHANTOM_CLASSES)
    assert image.std() > 15 and 100 < image.mean() < 180


@pytest.mark.parametrize("voxel_size", [(5, 5, 5), (45, 5, 5), (40, 12, 12)])
def test_sizes_are_in_nm(voxel_size):
    """A vesicle has the same diameter in nm at any voxel size: 40 to 60 nm."""
    _, label = phantom((12, 200, 200), voxel_size=voxel_size, seed=2)
    runs = np.diff(np.pad(label[:, 2:-2, 2:-2] == VESICLE, ((0, 0), (0, 0), (1, 1))).astype(int))
    starts, stops = np.argwhere(runs == 1), np.argwhere(runs == -1)
    widest = (np.percentile((stops - starts)[:, 2], 95) + 0.5) * voxel_size[2]
    assert 38 < widest < 75


def test_typical_volume_has_every_class_and_no_invalid_arithmetic():
    with np.errstate(invalid="raise", divide="raise"):
        _, label = phantom((32, 256, 256), seed=0)
    assert (np.bincount(label.ravel(), minlength=5) > 0.005 * label.size).all()


def test_class_fractions(volumes):
    fractions = np.array([np.bincount(label.ravel(), minlength=5) for _, label in volumes])
    fractions = fractions / np.prod(SHAPE)
    assert ((0.06 <= fractions[:, MITOCHONDRION]) & (fractions[:, MITOCHONDRION] <= 0.12)).all()
    assert ((0.005 <= fractions[:, VESICLE]) & (fractions[:, VESICLE] <= 0.03)).all()
    assert ((0.04 <= fractions[:, MEMBRANE]) & (fractions[:, MEMBRANE] <= 0.13)).all()
    assert 0.05 <= fractions[:, MEMBRANE].mean() <= 0.10
    assert ((0.02 <= fractions[:, NUCLEUS]) & (fractions[:, NUCLEUS] <= 0.25)).all()


@pytest.mark.parametrize("class_id, least", [(MITOCHONDRION, 0.75), (NUCLEUS, 0.85),
                                             (MEMBRANE, 0.35)])
def test_structures_continue_through_z(volumes, class_id, least):
    for _, label in volumes:
        mask = label == class_id
        assert dice(mask[1:], mask[:-1]) > least
        assert dice(mask[8:], mask[:-8]) < dice(mask[1:], mask[:-1])


def test_image_continues_through_z_but_noise_does_not():
    """Neighbouring slices correlate, far ones do not: the image follows the geometry."""
    image, _ = phantom((24, 192, 192), seed=3)
    def correlation(gap):
        return np.mean([np.corrcoef(a.ravel(), b.ravel())[0, 1]
                        for a, b in zip(image, image[gap:])])
    assert 0.95 > correlation(1) > 0.4 and correlation(1) > correlation(20) + 0.25


def test_organelles_do_not_touch(volumes):
    """Cytoplasm separates mitochondria and nuclei from membranes: no neighbouring labels."""
    for _, label in volumes:
        for axis in (1, 2):
            a, b = np.moveaxis(label, axis, 0)[1:], np.moveaxis(label, axis, 0)[:-1]
            for class_id in (MITOCHONDRION, NUCLEUS):
                touching = (a == class_id) & ~np.isin(b, (0, class_id))
                touching |= (b == class_id) & ~np.isin(a, (0, class_id))
                assert touching.sum() < 0.02 * edge(label == class_id).sum()


def test_contrast_between_classes(volumes):
    for image, label in volumes:
        grey = [image[label == class_id].mean() for class_id in range(5)]
        assert grey[0] - grey[MITOCHONDRION] > 25
        assert grey[0] - grey[MEMBRANE] > 40
        assert grey[VESICLE] > grey[MEMBRANE] + 10
        assert grey[0] - grey[NUCLEUS] < 40
        mito, nucleus = label == MITOCHONDRION, label == NUCLEUS
        assert image[edge(mito)].mean() < image[mito & ~edge(mito)].mean() - 5     # dark wall
        assert image[edge(nucleus)].mean() < image[nucleus & ~edge(nucleus)].mean() - 20


def test_no_grey_threshold_finds_mitochondria(volumes):
    """Dark membranes, chromatin, lysosomes share their grey: best band Dice below 0.7."""
    image = np.concatenate([image for image, _ in volumes]).ravel()
    mito = np.concatenate([label for _, label in volumes]).ravel() == MITOCHONDRION
    inside = np.bincount(image[mito], minlength=256).cumsum()
    total = np.bincount(image, minlength=256).cumsum()
    low, high = np.meshgrid(np.arange(256), np.arange(256))
    hits, size = inside[high] - inside[low], total[high] - total[low]
    best = (2 * hits / np.maximum(size + mito.sum(), 1))[high > low].max()
    assert 0.15 < best < 0.7


# -- whole cells


@pytest.fixture(scope="module")
def whole_cells():
    return [phantom_cell((64, 72, 80), seed=seed) for seed in range(4)]


def test_a_cell_is_whole_and_has_every_structure(whole_cells):
    for image, label in whole_cells:
        assert image.shape == label.shape == (64, 72, 80) and image.dtype == label.dtype == np.uint8
        share = np.bincount(label.ravel(), minlength=5) / label.size
        assert 0.05 < share[MEMBRANE:].sum() < 0.45 and (share > 0.001).all()
        border = label.copy()
        border[2:-2, 2:-2, 2:-2] = 0
        assert (border > 0).mean() < 0.01                       # it does not leave the tomogram
        cell, count = ndimage.label(label > 0)
        assert np.bincount(cell.ravel())[1:].max() > 0.99 * (label > 0).sum()


def test_organelles_lie_inside_the_cell(whole_cells):
    for _, label in whole_cells:
        touching = ndimage.binary_dilation(label >= NUCLEUS) & (label == 0)
        assert touching.sum() < 0.05 * (label >= NUCLEUS).sum()


def test_cells_are_reproducible_and_differ(whole_cells):
    again = phantom_cell((64, 72, 80), seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(again, whole_cells[1]))
    assert dice(whole_cells[0][1] > 0, whole_cells[1][1] > 0) < 0.97
    means = [image[label == MEMBRANE].mean() for image, label in whole_cells]
    assert np.ptp(means) > 5                                    # each has its own tone


def test_organelles_are_darker_than_the_cell_and_the_cell_than_its_medium(whole_cells):
    for image, label in whole_cells:
        grey = [image[label == k].mean() for k in range(5)]
        assert grey[0] > grey[MEMBRANE] + 5
        assert max(grey[MITOCHONDRION], grey[VESICLE]) < grey[MEMBRANE] - 15
