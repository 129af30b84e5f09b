"""Tests of the synthetic EM volume: exact labels, plausible, not trivial."""
import numpy as np
import pytest

from emseg import MITOCHONDRION, PHANTOM_CLASSES, VESICLE, phantom


@pytest.fixture(scope="module")
def volumes():
    return [phantom((16, 160, 160), seed=seed) for seed in range(3)]


def test_same_seed_same_bits_other_seed_other_volume(volumes):
    again = phantom((16, 160, 160), seed=0)
    assert all(np.array_equal(a, b) for a, b in zip(again, volumes[0]))
    a, b = [label == MITOCHONDRION for _, label in volumes[:2]]
    assert 2 * (a & b).sum() / (a.sum() + b.sum()) < 0.5


def test_every_class_has_a_plausible_share(volumes):
    for _, label in volumes:
        share = np.bincount(label.ravel(), minlength=len(PHANTOM_CLASSES)) / label.size
        assert ((0, 0.06, 0.04, 0.06, 0.008) < share).all()
        assert (share < (0.8, 0.16, 0.25, 0.14, 0.02)).all()


@pytest.mark.parametrize("voxel_size", [(45, 5, 5), (40, 10, 10)])
def test_sizes_are_in_nm(voxel_size):
    """A vesicle is about 50 nm wide at any voxel size."""
    _, label = phantom((12, 200, 200), voxel_size=voxel_size, seed=2)
    runs = np.diff(np.pad(label[:, 2:-2, 2:-2] == VESICLE, ((0, 0), (0, 0), (1, 1))).astype(int))
    widths = np.argwhere(runs == -1)[:, 2] - np.argwhere(runs == 1)[:, 2]
    assert 35 < np.percentile(widths, 95) * voxel_size[2] < 75


def test_no_grey_threshold_finds_mitochondria_though_they_are_dark(volumes):
    """Membranes, chromatin and dark cells share their grey: the best band has Dice below 0.7."""
    image, label = map(np.concatenate, zip(*volumes))
    mito = label == MITOCHONDRION
    assert image[mito].mean() < image[label == 0].mean() - 25
    inside, total = (np.append(0, np.bincount(v.ravel(), minlength=256).cumsum())
                     for v in (image[mito], image))
    low, high = np.triu_indices(257, 1)
    hits, size = inside[high] - inside[low], total[high] - total[low]
    assert (2 * hits / (size + mito.sum())).max() < 0.7
