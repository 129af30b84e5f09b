"""Volumes several times larger than the memory that a process may have."""

import json
import os
import subprocess
import sys
import warnings
import zlib

import mrcfile
import numpy as np
import pytest
import tifffile

import emseg
from conftest import ROOT

DEPTH, SIDE = 80, 2048                  # 320 MiB


def create(path, depth, side, drawn):
    """Write a uint8 volume (depth, side, side), zero but for the slices drawn {z: (side, side)}, as
    MRC or, by the path's ending, a BigTIFF of compressed pages. Returns the path."""
    shape = (depth, side, side)
    if path.endswith(".mrc"):
        with mrcfile.new_mmap(path, shape, mrc_mode=0) as mrc:
            for z, page in drawn.items():
                mrc.data[z] = page.view(np.int8)
        return path
    empty = zlib.compress(bytes(side * side), 1)
    pages = (zlib.compress(drawn[z].tobytes(), 1) if z in drawn else empty for z in range(depth))
    with tifffile.TiffWriter(path, bigtiff=True) as tif:
        tif.write(pages, shape=shape, dtype=np.uint8, compression="zlib", rowsperstrip=side,
                  photometric="minisblack", metadata={"axes": "ZYX"})
    return path


def examples(depth, side, count=5):
    """Slices of an image and of its labels {z: (side, side) uint8}, spread over `depth`."""
    rng = np.random.default_rng(0)
    zs = [round((i + 0.5) * depth / count - 0.5) for i in range(count)]
    labels = {z: (np.kron(rng.integers(0, 3, (side // 64, side // 64), np.uint8),
                          np.ones((64, 64), np.uint8))) for z in zs}
    images = {z: label * 60 + rng.integers(20, 60, label.shape, np.uint8)
              for z, label in labels.items()}
    return images, labels


# Trains on a mapped and on a compressed volume, predicts the first and scores it by compressed
# labels, in a process that may allocate as much as one of the volumes takes, beside what Python,
# PyTorch and OpenBLAS have; without its figure, which takes some 100 MiB.
LIMITED = f"""
import re, resource, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import test_large, numpy, torch._dynamo, emseg, train_cps
emseg.CACHE_BYTES = 2**25                       # of decoded slices
emseg.save_slices = lambda *args, **options: None
numpy.linalg.inv(numpy.eye(99))
volumes, labels = [[test_large.create(f"{{name}}.{{ending}}", {DEPTH}, {SIDE}, drawn)
                    for ending in ("mrc", "tif")] for name, drawn in
                   zip(("image", "label"), test_large.examples({DEPTH}, {SIDE}))]
used = int(re.search(r"VmData:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + {DEPTH} * {SIDE}**2,) * 2)
train_cps.main(train_cps.parse_args([
    "--volume", *volumes, "--label", *labels, "--label-slices", "8,40,41", "--test-volume",
    volumes[0], "--test-label", labels[1], *"--method supervised --model unet --width 4 "
    "--downsample 8 --patch-size 64 64 --batch-size 4 --epochs 1 --steps-per-epoch 5 "
    "--device cpu --out-dir run".split()]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory limits of Linux")
def test_training_prediction_and_scores_need_little_memory(tmp_path):
    done = subprocess.run([sys.executable, "-c", LIMITED], cwd=tmp_path, capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-2000:]
    prediction = emseg.open_volume(tmp_path / "run" / "prediction.mrc")
    assert prediction.shape == (DEPTH, SIDE, SIDE)
    content = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert content["volumes"][0]["voxels"] == DEPTH * SIDE**2
    assert content["volumes"][0]["ignored"] == 3 * SIDE**2          # trained on


def test_the_huge_page_of_imagej(tmp_path):
    """More than 4 GiB in a TIFF of 32-bit offsets: one page and a line that counts the slices."""
    path, shape = tmp_path / "a.tif", (260, 4096, 4096)
    with warnings.catch_warnings(), tifffile.TiffWriter(path, imagej=True) as tif:
        warnings.simplefilter("ignore")
        offset, _ = tif.write(shape=shape, dtype=np.uint8, returnoffset=True,
                              photometric="minisblack", metadata={"axes": "ZYX"})
    with open(path, "r+b") as file:
        file.seek(offset + 259 * 4096**2)
        file.write(bytes([7]) * 4096**2)
    with tifffile.TiffFile(path) as tif:
        assert len(tif.pages) == 1 and not tif.is_bigtiff
    volume = emseg.open_volume(path)
    assert volume.shape == shape
    assert (volume[259] == 7).all() and not volume[258].any()
