"""Volumes larger than memory: python tests/large.py [--gib 1 4 16] [--limit 4]
[--formats tif imagej deflate mrc npy folder] [--folder D]

For each format and size, trains train_cps.py on a volume of that many GiB and its labels, predicts
it whole and scores the prediction, each in a process that may allocate --limit GiB. Prints seconds,
voxels per second and the most memory that was resident. The volumes are sparse files that hold grey
levels in a few slices: they take no room on the disk, their predictions do.
"""

import argparse
import itertools
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from pathlib import Path

import mrcfile
import numpy as np
import tifffile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import emseg

FORMATS = ("tif", "imagej", "deflate", "mrc", "npy", "folder")
SIDE = 4096
FLAGS = ("--method supervised --model unet --width 4 --downsample 8 --patch-size 256 256 "
         "--batch-size 4 --epochs 1 --steps-per-epoch 20 --device cpu --classes background a b")


def create(path, kind, depth, side, drawn):
    """Write a uint8 volume (depth, side, side), zero but for the slices drawn {z: (side, side)}.

    kind: BigTIFF, the single huge page that ImageJ writes, Deflate, MRC, NPY or a folder of TIFFs.
    Returns the path with its ending.
    """
    shape, options = (depth, side, side), {"photometric": "minisblack"}
    path = Path(f"{path}.{'tif' if kind in ('imagej', 'deflate') else kind}")
    if kind == "folder":
        path.mkdir()
        for z in range(depth):
            name = path / f"{z:05}.tif"
            tifffile.imwrite(name, shape=shape[1:], dtype=np.uint8, **options)
            if z in drawn:
                tifffile.imwrite(name, drawn[z], **options)
        return path
    if kind == "deflate":
        empty = zlib.compress(bytes(side * side), 1)
        pages = (zlib.compress(drawn[z].tobytes(), 1) if z in drawn else empty
                 for z in range(depth))
        with tifffile.TiffWriter(path, bigtiff=True) as tif:
            tif.write(pages, shape=shape, dtype=np.uint8, compression="zlib",
                      rowsperstrip=side, metadata={"axes": "ZYX"}, **options)
        return path
    if kind == "mrc":
        with mrcfile.new_mmap(path, shape, mrc_mode=0) as mrc:
            mrc.voxel_size = 50
        offset = 1024
    elif kind == "npy":
        np.lib.format.open_memmap(path, "w+", np.uint8, shape).flush()
        offset = path.stat().st_size - depth * side * side
    else:
        with warnings.catch_warnings(), tifffile.TiffWriter(
                path, bigtiff=kind == "tif", imagej=kind == "imagej") as tif:
            warnings.simplefilter("ignore")         # that ImageJ's large files have one page
            offset, _ = tif.write(shape=shape, dtype=np.uint8, returnoffset=True,
                                  metadata={"axes": "ZYX"}, **options)
    with open(path, "r+b") as file:
        for z, page in drawn.items():
            file.seek(offset + z * side * side)
            file.write(page.tobytes())
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


def limited(limit, *command):
    """Run a script with `limit` GiB to allocate; (its output, seconds)."""
    most = int(limit * 2**30)
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (most, most)))
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: {done.stderr.strip()[-1000:]}")
    return done.stdout, time.perf_counter() - started


def measure(kind, gib, limit, folder):
    """Train on a volume, predict and score it: a row of the table."""
    depth = max(5, round(gib * 2**30 / SIDE**2))
    with tempfile.TemporaryDirectory(dir=folder) as folder:
        folder, drawn = Path(folder), examples(depth, SIDE)
        volume, label = [create(folder / name, kind, depth, SIDE, slices)
                         for name, slices in zip(("image", "label"), drawn)]
        _, seconds = limited(limit, ROOT / "train_cps.py", "--volume", volume, "--label", label,
                             "--test-volume", volume, *FLAGS.split(), "--out-dir", folder / "run")
        (prediction,) = (folder / "run").glob("prediction.*")
        out, scoring = limited(limit, ROOT / "evaluate.py", "--prediction", prediction, "--label",
                               label, "--no-distances", "--out-dir", folder / "scores")
        content = json.loads((folder / "run" / "metrics.json").read_text())
        scored = json.loads((folder / "scores" / "metrics.json").read_text())
        rate = content["predict_voxels_per_second"] / 1e6
        return [kind, gib, f"{seconds:.0f}", f"{content['predict_seconds']:.0f}",
                f"{rate:.0f}", content["peak_memory_gib"], f"{scoring:.0f}",
                scored["peak_memory_gib"]]


def main():
    parser = argparse.ArgumentParser(description=re.sub(r"\s+", " ", __doc__.split("\n\n")[0]))
    parser.add_argument("--gib", nargs="+", type=float, default=[1, 4, 16])
    parser.add_argument("--limit", type=float, default=4, help="GiB")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--folder", help="with room for the largest prediction")
    args = parser.parse_args()
    heads = ("format", "GiB", "training and prediction, s", "of it prediction, s",
             "Mvoxel/s", "peak GiB", "evaluate.py, s", "peak GiB")
    print(f"at most {args.limit:g} GiB allocated, {os.cpu_count()} cores, PyTorch "
          f"{emseg.torch.__version__}\n\n| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for case in itertools.product(args.formats, args.gib):
        print(f"| {' | '.join(map(str, measure(*case, args.limit, args.folder)))} |", flush=True)


if __name__ == "__main__":
    main()
