"""Tests of the synthetic EM volume: exact labels in nm."""

import numpy as np
import pytest

from emseg import MITOCHONDRION, VESICLE, phantom


def test_same_seed_same_bits_other_seed_other_volume():
    one, again, other = [phantom((16, 160, 160), seed=seed) for seed in (0, 0, 1)]
    assert all(np.array_equal(a, b) for a, b in zip(one, again))
    a, b = [label == MITOCHONDRION for _, label in (one, other)]
    assert 0 < 2 * (a & b).sum() / (a.sum() + b.sum()) < 0.5


@pytest.mark.parametrize("voxel_size", [(45, 5, 5), (40, 10, 10)])
def test_sizes_are_in_nm(voxel_size):
    """A vesicle is about 50 nm wide at any voxel size."""
    _, label = phantom((12, 200, 200), voxel_size=voxel_size, seed=2)
    runs = np.diff(np.pad(label[:, 2:-2, 2:-2] == VESICLE, ((0, 0), (0, 0), (1, 1))).astype(int))
    widths = np.argwhere(runs == -1)[:, 2] - np.argwhere(runs == 1)[:, 2]
    assert 35 < np.percentile(widths, 95) * voxel_size[2] < 75
