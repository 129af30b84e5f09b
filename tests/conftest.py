"""Small files and real data that the tests share."""

import os
from pathlib import Path

import pytest
import tifffile

import emseg

DATA = Path(os.environ["EMSEG_DATA"]) if os.environ.get("EMSEG_DATA") else None


@pytest.fixture
def real_data():
    """The folder of real volumes; the test is skipped without EMSEG_DATA."""
    if DATA is None or not DATA.is_dir():
        pytest.skip("EMSEG_DATA is not set")
    return DATA.resolve()


@pytest.fixture(scope="session")
def cells(tmp_path_factory):
    """A folder with a small synthetic volume and its labels: image.tif, label.tif (ids 0..4),
    mito.tif (0 and 255), 12 x 112 x 128 voxels of 20 x 8 x 8 nm."""
    folder = tmp_path_factory.mktemp("cells")
    image, label = emseg.phantom((12, 112, 128), (20, 8, 8), seed=3)
    arrays = {"image": image, "label": label, "mito": (label == 3).astype("uint8") * 255}
    for name, array in arrays.items():
        with emseg.create_volume(folder / f"{name}.tif", array.shape, array.dtype,
                                 (20.0, 8.0, 8.0)) as writer:
            writer[:] = array
    tifffile.imwrite(folder / "small.tif", image[:, :24, :24])
    return folder
