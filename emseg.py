"""emseg: what the training scripts of five electron-microscopy segmentation papers share.

Copy this file and one train_*.py into any folder and they run.

Conventions
    arrays (Z, Y, X); tensors (B, C, Y, X) or (B, C, Z, Y, X); labels int64 without C
    voxel size (z, y, x) in nanometres, converted where files are read and written
    IGNORE = 255 marks voxels that nobody annotated: no loss and no metric sees them
    two classes: one output channel and a sigmoid; more: one channel each and a softmax
    a user's error raises InputError; its one line says what is wrong and how to fix it

Contents, in the order data flows
    Volumes       files as lazy arrays: TIFF, MRC, NPY, folders of slices; labels; writing
    Phantom       synthetic EM volumes with exact labels, for --demo and tests
    Patches       random crops, as uint8, and their normalisation
    Augmentation  one composed sampling grid per batch, on the device
    Networks      networks from the literature, by name: NETWORKS
    Losses        soft Dice and cross entropy, blind to IGNORE
    Inference     slices, their neighbours or 3D windows; blended tiles, eight views, slab by slab
    Metrics       confusion counts and the scores that follow from them
    Figures       slices with their errors, surfaces in 3D, Dice along z, training curves
    Runs          command line, data, run folder, checkpoints, predictions and their scores
"""

import argparse
import contextlib
import copy
import csv
import ctypes
import dataclasses
import datetime
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# Before torch is loaded: its threads spin for a moment while they wait, then sleep. Threads that go
# on spinning (the default) make a step 3 times as slow as soon as another process needs a core,
# these 1.6 times; threads that do not spin at all cost 7 % where none does.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# As many threads as a container has processors, which is less than what the machine has.
with contextlib.suppress(OSError, ValueError):          # no container; or "max", all of them
    quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
    processors = min(math.ceil(quota / period), len(os.sched_getaffinity(0)))
    os.environ.setdefault("OMP_NUM_THREADS", str(processors))

import mrcfile
import numpy as np
import scipy
import tifffile
import torch
import torch.nn.functional as F
from scipy import ndimage
from scipy.spatial import cKDTree
from torch import nn

IGNORE = 255


class InputError(ValueError):
    """A user's error: one line that says what is wrong, what was wanted and how to fix it."""


# ==================================================================================================
# Volumes: files as lazy arrays (Z, Y, X); labels; writing
# ==================================================================================================
#
# Lazy arrays, which read a box of voxels when they are indexed: a Volume is a file, Grey its grey
# values as uint8, Labels class ids; Downsampled and Resized show these at another resolution.

TIFF_EXTENSIONS = (".tif", ".tiff")
MRC_EXTENSIONS = (".mrc", ".mrcs", ".rec", ".map", ".st", ".ali")
CACHE_BYTES = 256 * 2**20           # of decoded slices that a process keeps; of labels in Patches
PLAUSIBLE_NM = (0.005, 10_000.0)    # sides outside this are header defaults, such as 72 dpi
UNIT_NM = {"å": 0.1, "a": 0.1, "angstrom": 0.1, "nm": 1.0, "nanometer": 1.0, "nanometre": 1.0,
           "um": 1e3, "µm": 1e3, "μm": 1e3, "micron": 1e3, "micrometer": 1e3, "micrometre": 1e3,
           "mm": 1e6, "cm": 1e7, "inch": 2.54e7}


class LazyArray:
    """A 3D array (Z, Y, X) that reads from its file only the box it is asked for.

    array[z], array[z0:z1, y0:y1, x0:x1]: integers and forward slices, trailing axes optional; the
    answer is a fresh NumPy array. voxel_size: (z, y, x) in nm or None. Copies in other processes
    are independent. Subclasses define read(z, y, x), which gives the box of three slices.
    """

    def __init__(self, path, shape, dtype, voxel_size):
        self.path, self.shape, self.dtype = path, tuple(shape), np.dtype(dtype)
        self.voxel_size = voxel_size

    def __len__(self):
        return self.shape[0]

    def slice_name(self, z):
        """What figures call a slice: z, and the number in its file's name if that is another."""
        return f"z = {z}"

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        parts = [range(size)[i] for size, i in zip(self.shape, index + (slice(None),) * 2)]
        box = [slice(part, part + 1) if isinstance(part, int) else
               slice(part.start, max(part.start, part.stop)) for part in parts]
        return self.read(*box)[tuple(0 if isinstance(part, int) else slice(None, None, part.step)
                                     for part in parts)]


class Volume(LazyArray):
    """A file, or a folder of slices, cropped; see open_volume.

    format: "tiff", "mrc", "npy", "png" or "folder". pages: range of z in the file -> those slices
    (Y, X). crop: three slices into `file`, whose own shape is file_shape. numbers: the last integer
    in the name of each file of a folder; None where a name has none or two are the same. origin,
    start: of an MRC file, its origin (z, y, x) in nm and nzstart, nystart, nxstart. note: what a
    user should know of the file, or None.
    """

    def __init__(self, file, format, shape, dtype, pages, voxel_size=None, numbers=None,
                 origin=None, start=None, note=None):
        if dtype.kind not in "buif" or len(shape) != 3:
            raise InputError(f"{file}: {dtype} of shape {tuple(shape)}; wanted numbers (Z, Y, X)")
        native = np.uint8 if dtype.kind == "b" else dtype.newbyteorder("=")
        low, high = PLAUSIBLE_NM
        known = voxel_size and all(low <= side <= high for side in voxel_size)
        super().__init__(file, shape, native, tuple(map(float, voxel_size)) if known else None)
        self.file, self.format, self.file_shape, self.pages = file, format, self.shape, pages
        self.crop = tuple(slice(0, size) for size in shape)
        self.numbers, self.origin, self.start, self.note = numbers, origin, start, note

    def slice_name(self, z):
        number = self.numbers[self.crop[0].start + z] if self.numbers else z
        return f"z = {z}" if number == z else f"z = {z} (file {number})"

    def cropped(self, crop, path):
        """The box of three slices into the file, under another path."""
        other = copy.copy(self)
        other.path, other.crop = path, tuple(crop)
        other.shape = tuple(part.stop - part.start for part in crop)
        return other

    def read(self, z, y, x):
        z, y, x = (slice(whole.start + part.start, whole.start + part.stop)
                   for whole, part in zip(self.crop, (z, y, x)))
        box = np.empty([part.stop - part.start for part in (z, y, x)], self.dtype)
        with _readable(self.path):
            for i, page in enumerate(self.pages(range(z.start, z.stop))):
                box[i] = page[y, x]
        return box


def open_volume(path):
    """Open a TIFF, MRC, NPY or PNG file, or a folder of TIFF or PNG slices, as a lazy Volume.

    `path@z0:z1,y0:y1,x0:x1` opens a crop (trailing axes optional; each axis a:b, a:, :b, : or one
    integer). A file whose own name holds an @ opens as it stands. A 2D image is one slice. Where
    a file gives only the pixel size, z is taken equal to x. Raises InputError, in one line, for
    whatever cannot be read.
    """
    path = os.fspath(path)
    file, crop = _split_crop(path)
    if not os.path.exists(file):
        raise InputError(f"{path}: no such file or folder")
    with _readable(path):
        volume = _open_folder(file) if os.path.isdir(file) else _open_file(file)
    parts = (crop or ":").split(",")
    box = [_parse_range(part, size, f"{path}: crop along {axis}")
           for part, size, axis in zip([*parts, ":", ":"], volume.shape, "zyx")]
    if len(parts) > 3 or any(part.step > 1 for part in box):
        raise InputError(f"{path}: a crop is z0:z1,y0:y1,x0:x1, at most three axes, got '{crop}'")
    volume = volume.cropped([slice(part.start, part.stop) for part in box], path)
    for z in (0, -1):       # a missing codec, or a file cut off, shows here, not in mid-training
        volume[z, :1, :1]
    return volume


@contextlib.contextmanager
def _readable(path):
    """Whatever the file libraries raise inside, on what they cannot read, becomes one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        no_codec = "imagecodecs" in str(error)
        mend = "pip install imagecodecs" if no_codec else "is it whole, and what its name says?"
        line = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"{path}: not readable ({line}); {mend}") from error


def _split_crop(path):
    """'em.tif@3:9' -> ('em.tif', '3:9'); a path that exists as it stands has no crop."""
    file, at, crop = path.rpartition("@")
    if os.path.exists(path) or not at or not os.path.exists(file):
        return path, ""
    return file, crop


def _parse_range(text, size, what):
    """'2:8', ':8', '2:', ':', '0:8:2' or '3' -> a range that is not empty, within 0..size - 1."""
    match = re.fullmatch(r"(\d*)(?:(:)(\d*)(?::([1-9]\d*)?)?)?", text.replace(" ", ""))
    if not match or not (match[1] or match[2]):
        raise InputError(f"{what}: '{text}' is not understood; wanted start:stop or one number")
    start = int(match[1] or 0)
    stop = int(match[3] or size) if match[2] else start + 1
    if not start < stop <= size:
        raise InputError(f"{what}: '{text}' is empty or outside the volume, 0 to {size - 1}")
    return range(start, stop, int(match[4] or 1))


# What Volumes read their slices with. They hold nothing open: each process reads for itself.

def _mapped_pages(file, dtype, offset, shape, axes, z):
    """Voxels as they lie in the file, stored axes in the order `axes`. Mapped each time anew: the
    pages of a map that stays add up, in the memory of the process, to the whole file."""
    return np.memmap(file, dtype, "r", offset, shape).transpose(axes)[z.start : z.stop]


_kept = {}                      # (decode, z) -> slice, the latest last


def _decoded_pages(decode, z):
    """Slices that must be decoded whole, by decode(z). The latest are kept, about CACHE_BYTES."""
    for i in z:
        if (decode, i) not in _kept:
            while sum(page.nbytes for page in _kept.values()) > CACHE_BYTES:
                del _kept[next(iter(_kept))]
            _kept[decode, i] = decode(i)
        yield _kept[decode, i]


def _folder_pages(slices, z):
    return (page for i in z for page in slices[i].pages(range(1)))


def _open_file(file):
    """The Volume of one file."""
    openers = {**dict.fromkeys(TIFF_EXTENSIONS, _open_tiff), ".npy": _open_npy,
               **dict.fromkeys(MRC_EXTENSIONS, _open_mrc), ".png": _open_png}
    extension = os.path.splitext(file)[1].lower()
    if extension not in openers:
        raise InputError(f"{file}: cannot read type '{extension}'; wanted TIFF, MRC, NPY or PNG")
    return openers[extension](file)


def _open_npy(file):
    stored = np.load(file, mmap_mode="r")
    shape = (1,) * (3 - stored.ndim) + stored.shape
    axes = (0, 1, 2) if stored.flags.c_contiguous else (2, 1, 0)
    stored_shape = tuple(shape[axis] for axis in axes)      # NumPy 1 wants a tuple
    pages = partial(_mapped_pages, file, stored.dtype, stored.offset, stored_shape, axes)
    return Volume(file, "npy", shape, stored.dtype, pages)


def _open_tiff(file):
    """The Volume of a TIFF file: memory-mapped where contiguous, else decoded page by page."""
    logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)  # it reports what we report
    with tifffile.TiffFile(file) as tif:
        tif.filehandle.seek(tif.pages.next_page_offset)     # else it reads as a shorter stack
        if tif.filehandle.read(tif.tiff.offsetsize) != bytes(tif.tiff.offsetsize):
            raise InputError(f"{file}: truncated, its list of pages breaks off")
        series = tif.series[0]
        if len(tif.series) > 1 or series.is_multifile or not re.fullmatch("[^CS]?YX", series.axes):
            raise InputError(f"{file}: {len(tif.series)} of axes {series.axes} {series.shape}; "
                             "wanted one stack of grey values (Fiji: Split Channels; tifffile: "
                             "metadata={'axes': 'ZYX'})")
        shape = (1, *series.shape)[-3:]
        pages = partial(_decoded_pages, partial(_decode_tiff, file))
        if series.dataoffset is not None and series.keyframe.is_final:
            dtype = series.dtype.newbyteorder(tif.byteorder)
            pages = partial(_mapped_pages, file, dtype, series.dataoffset, shape, (0, 1, 2))
        return Volume(file, "tiff", shape, series.dtype, pages, _tiff_voxel_size(tif, shape[0]))


def _decode_tiff(file, z):
    return _tiff_pages(file, os.stat(file).st_mtime_ns, os.getpid())[z].asarray()


@functools.lru_cache(maxsize=8)
def _tiff_pages(file, changed, process):
    """The pages of an opened TIFF file. Each process opens it itself: a file position that is
    shared across a fork would let two workers read each other's bytes."""
    return list(tifffile.TiffFile(file).series[0].pages)


def _tiff_voxel_size(tif, depth):
    """(z, y, x) in nm from OME, ImageJ or plain resolution tags; None where they do not say."""
    try:
        if tif.is_ome:
            pixels = tifffile.xml2dict(tif.ome_metadata)["OME"]["Image"]["Pixels"]
            sides = [f"PhysicalSize{axis}" for axis in "ZYX"]
            sides[0] = sides[0] if sides[0] in pixels else sides[2]
            return [pixels[side] * _unit_nm(pixels.get(f"{side}Unit", "um")) for side in sides]
        tags = tif.series[0].keyframe.tags
        y, x = (down / up for up, down in (tags["YResolution"].value, tags["XResolution"].value))
        metadata = tif.imagej_metadata or {}
        if "unit" in metadata:                  # ImageJ leaves the spacing out when it is 1
            z = abs(metadata.get("spacing", 1.0 if depth > 1 else x))
            units = [metadata.get(name, metadata["unit"]) for name in ("zunit", "yunit", "unit")]
            return [side * _unit_nm(unit) for side, unit in zip((z, y, x), units)]
        scale = {2: UNIT_NM["inch"], 3: UNIT_NM["cm"]}[int(tags["ResolutionUnit"].value)]
        return x * scale, y * scale, x * scale
    except (KeyError, ValueError, TypeError, ZeroDivisionError):
        return None


def _unit_nm(unit):
    """Nanometres of a unit as people and ImageJ (which escapes µ and Å) write it."""
    unit = re.sub(r"\\u([0-9A-Fa-f]{4})", lambda code: chr(int(code[1], 16)), str(unit))
    return UNIT_NM[unit.strip().lower().removesuffix("s")]


def _open_mrc(file):
    """The Volume of an MRC file, its stored axes in whatever order.

    Bytes (mode 0) are signed by the standard of 2014. Unsigned are those that IMOD marks so, and,
    without IMOD's mark, those whose header gives a range that only unsigned bytes have.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # wrong stamps and missing MAP ids are common and harmless
        with mrcfile.mmap(file, "r", permissive=True) as mrc:
            header, data = mrc.header, mrc.data
    if data is None:
        raise InputError(f"{file}: truncated, or MRC mode {header.mode} (IMOD: newstack -mode)")
    stored, dtype, note = (math.prod(data.shape[:-2]), *data.shape[-2:]), data.dtype, None
    order = [int(header[name]) for name in ("maps", "mapr", "mapc")]
    axes = [order.index(axis) if axis in order else 3 - axis for axis in (3, 2, 1)]
    if dtype == np.int8:
        stamp, flags = np.frombuffer(header.tobytes(), header.dtype["mode"], count=2, offset=152)
        by_imod = stamp == 1146047817
        if not flags & 1 if by_imod else header.dmin >= 0 and header.dmax > 127:
            dtype = np.dtype(np.uint8)
        elif not by_imod and header.dmin >= header.dmax and (data[len(data) // 2] < 0).any():
            note = "its header does not say whether bytes are signed; read as -128 to 127"
    sides = [(float(header.cella[axis]), int(header["m" + axis])) for axis in "zyx"]
    start = [int(header[f"n{axis}start"]) for axis in "zyx"]
    return Volume(file, "mrc", [stored[axis] for axis in axes], dtype,
                  partial(_mapped_pages, file, dtype, data.offset, stored, axes),
                  [side / n / 10 if n > 0 else 0 for side, n in sides],     # Å to nm
                  origin=[float(header.origin[axis]) / 10 for axis in "zyx"],
                  start=[start[axis] for axis in axes], note=note)


def _png(file):
    """An opened PNG file. Matplotlib reads PNG by Pillow, which gives palette indices."""
    from matplotlib.image import PIL                        # takes 0.3 s, of use here only
    return PIL.Image.open(file, formats=["png"])


def _open_png(file):
    with _png(file) as image:
        dtype, shape = np.dtype("u2" if image.mode[0] == "I" else "u1"), (1, *image.size[::-1])
    pages = partial(_decoded_pages, partial(_decode_png, file))
    return Volume(file, "png", shape, dtype, pages)


def _decode_png(file, z):
    """Grey values (Y, X), palette indices as they stand. White is 255 in masks of 1 bit, too."""
    with _png(file) as image:
        page, n_colours = np.asarray(image), len(image.mode.rstrip("A"))
    if page.ndim == 3:
        if (page[..., :n_colours] != page[..., :1]).any() or (page[..., n_colours:] < 255).any():
            raise InputError(f"{file}: colours or transparent pixels (Fiji: Image > Type > 8-bit)")
        page = page[..., 0]
    return page * np.uint8(255) if page.dtype == bool else page


def _open_folder(folder):
    """The Volume of a folder of slices in natural order (2 before 10)."""
    names = tifffile.natural_sorted(name for name in os.listdir(folder) if name[0] != "."
                                    and name.lower().endswith((*TIFF_EXTENSIONS, ".png")))
    if not names:
        raise InputError(f"{folder}: no .tif, .tiff or .png slices in this folder")
    slices = [_open_file(os.path.join(folder, name)) for name in names]
    kinds = {f"{one.format} {one.shape} {one.dtype}": one.file for one in slices}
    first = slices[0]
    if len(kinds) > 1 or len(first) > 1:
        found = [f"{kind} in {file}" for kind, file in kinds.items()]
        raise InputError(f"{folder}: wanted single slices, all alike, got {_listed(found, 2)}")
    digits = [re.findall(r"\d+", os.path.splitext(name)[0]) for name in names]
    numbers = tuple(int(each[-1]) for each in digits if each)
    numbers = numbers if len(set(numbers)) == len(names) else None
    steps, note = np.diff(numbers or ()), None
    if len(steps) and steps.max() > steps.min():
        note = f"no slice between {numbers[steps.argmax()]} and {numbers[steps.argmax() + 1]}"
    return Volume(folder, "folder", (len(slices), *first.shape[1:]), first.dtype,
                  partial(_folder_pages, slices), first.voxel_size, numbers, note=note)


STANDARD = {"mean": 128.0, "std": 40.0}     # of normalize="volume"; beyond 3.2 deviations: clipped


class Grey(LazyArray):
    """The grey values of a Volume as uint8, each voxel of one value whatever is cropped.

    uint8 stays, int8 is shifted by 128, whole numbers from 0 to 255 in another type stay, too.
    Anything else is stretched linearly so that the 0.1 and 99.9 percentiles of a sample of the file
    (at most 16 slices, about 4 million voxels) become 0 and 255; see grey_range. normalize:
    "equalize" equalises the histogram of every slice (Pagano 2023, section 2.1.2); "volume" gives
    the file mean 128 and standard deviation 40, measured on at most 32 slices.
    """

    def __init__(self, volume, normalize=None):
        super().__init__(volume.path, volume.shape, np.uint8, volume.voxel_size)
        self.volume, self.normalize, self.tables = volume, normalize, {}
        self.whole = volume.cropped([slice(0, size) for size in volume.file_shape], volume.file)
        self.low, self.high = grey_range(self.whole)

    def read(self, z, y, x):
        box = self.stretched(self.volume.read(z, y, x))
        if self.normalize in ("equalize", "volume"):
            for i, page in enumerate(box, z.start + self.volume.crop[0].start):
                mapped = page.tobytes().translate(self.table(i))    # faster than table[page]
                page[:] = np.frombuffer(mapped, np.uint8).reshape(page.shape)
        return box

    def slice_name(self, z):
        return self.volume.slice_name(z)

    def stretched(self, box):
        """Voxels as uint8."""
        if box.dtype == np.uint8:
            return box
        box = box.astype(np.float32 if box.itemsize <= 2 else np.float64)
        box -= self.low
        box *= 255 / (self.high - self.low) if self.high > self.low else 1.0
        return np.rint(box.clip(0, 255, out=box), out=box).astype(np.uint8)

    def table(self, z):
        """(256,) uint8: the grey values that those of slice z of the file become."""
        slices = [z]
        if self.normalize == "volume":          # one table for all slices
            z, slices = 0, np.linspace(0, len(self.whole) - 1, min(32, len(self.whole))).round()
        if z not in self.tables:
            counts = sum(_count_values(self.stretched(self.whole[int(i)])) for i in slices)
            if self.normalize == "equalize":
                below = np.cumsum(counts).astype(np.float64)
                below -= below[below > 0][0]                    # voxels of the darkest grey value
                table = below * (255 / max(below[-1], 1))
            else:
                grey = np.arange(256)
                mean = np.average(grey, weights=counts)
                std = math.sqrt(np.average((grey - mean) ** 2, weights=counts))
                table = STANDARD["mean"] + STANDARD["std"] * (grey - mean) / max(std, 1e-3)
            self.tables[z] = np.clip(np.rint(table), 0, 255).astype(np.uint8)
        return self.tables[z]


def grey_range(volume):
    """The values that become 0 and 255; see Grey.

    A constant fill, such as the border of an aligned stack, is left out: the lowest or highest
    value, where it has more than 0.1 % of the voxels and lies apart from all others.
    """
    if volume.dtype in (np.int8, np.uint8):
        return np.iinfo(volume.dtype).min, np.iinfo(volume.dtype).max
    Z, Y, X = volume.shape
    n = min(Z, 16)
    step = math.ceil(math.sqrt(n * Y * X / 4e6))
    sample = np.concatenate([volume[z][::step, ::step].ravel()
                             for z in (np.arange(n) * Z + Z // 2) // n])
    sample = sample[np.isfinite(sample)].astype(np.float32 if sample.itemsize <= 2 else np.float64)
    if ((sample >= 0) & (sample <= 255) & (sample == np.rint(sample))).all():
        return 0.0, 255.0               # 8 bits, saved as 16 bits or as floats
    for fill in (sample.min(), sample.max()):
        rest = sample[sample != fill]
        if 0 < len(rest) < 0.999 * len(sample):
            low, high = np.percentile(rest, (0.1, 99.9))
            if max(low - fill, fill - high) > (high - low) / 4:
                sample = rest
    return np.percentile(sample, (0.1, 99.9)).tolist()


def _count_values(array):
    """Voxels of each value of an array of uint8 or uint16: int64 (256,) or (65536,)."""
    values = torch.from_numpy(array if array.itemsize == 1 else array.astype(np.int32))
    return values.flatten().bincount(minlength=2 ** (8 * array.itemsize)).numpy()


class Downsampled(LazyArray):
    """A uint8 LazyArray `factor` times smaller in Y and X: (Z, ceil(Y / factor), ceil(X / factor)).

    reduce="mean" for images (rounded), "majority" for class ids: the most frequent value of each
    block, the lower one at a tie, IGNORE like any other. Blocks that stick out are filled by
    repeating the edge. slices: those of Labels.
    """

    def __init__(self, array, factor, reduce):
        (Z, Y, X), sides = array.shape, array.voxel_size
        super().__init__(array.path, (Z, math.ceil(Y / factor), math.ceil(X / factor)), np.uint8,
                         sides and (sides[0], sides[1] * factor, sides[2] * factor))
        self.array, self.factor, self.reduce = array, factor, reduce
        self.slices = getattr(array, "slices", None)

    def read(self, z, y, x):
        n = self.factor
        box = self.array[z, y.start * n : y.stop * n, x.start * n : x.stop * n]
        H, W = (n * (part.stop - part.start) for part in (y, x))
        box = np.pad(box, ((0, 0), (0, H - box.shape[1]), (0, W - box.shape[2])), mode="edge")

        def sums(box, most):                    # far faster than over both axes at once
            rows = sum(box[:, k::n].astype(np.min_scalar_type(most * n**2)) for k in range(n))
            return sum(rows[..., k::n] for k in range(n))

        if self.reduce == "mean":
            return np.floor(sums(box, 255) / n**2 + 0.5).astype(np.uint8)
        values = np.flatnonzero(_count_values(box)).astype(np.uint8)
        votes = [sums(box == value, 1) for value in values]
        return values[np.argmax(votes, axis=0)]                 # the first, lower one at a tie


class Resized(LazyArray):
    """A uint8 LazyArray in another shape (Z, Y, X) over the same field of view, held in memory.

    linear=True interpolates between the two nearest voxels along each axis (images, rounded), else
    the nearest voxel counts (class ids). Voxel centres are what is aligned. slices: of labels,
    those in which anything is annotated.
    """

    def __init__(self, array, shape, linear):
        zoom = [new / old for old, new in zip(array.shape, shape)]
        sides = array.voxel_size and tuple(a / b for a, b in zip(array.voxel_size, zoom))
        super().__init__(array.path, shape, np.uint8, sides)
        self.voxels = np.empty(shape, np.uint8)
        for z, (low, high, share) in enumerate(zip(*resampling(len(array), len(self)))):
            share = share if linear else np.floor(share + 0.5)
            page = (1 - share) * array[low] + share * array[high]
            page = ndimage.zoom(page, zoom[1:], order=int(linear), mode="nearest", grid_mode=True)
            self.voxels[z] = np.rint(page)
        self.slices = np.flatnonzero((self.voxels != IGNORE).any((1, 2)))

    def read(self, z, y, x):
        return self.voxels[z, y, x].copy()


def resampling(size, length):
    """Where `length` new voxels lie among `size` old ones: (low, high, share of high)."""
    place = np.clip((np.arange(length) + 0.5) * size / length - 0.5, 0, size - 1)
    low = place.astype(int)
    return low, np.ceil(place).astype(int), (place - low).astype(np.float32)


def parse_slices(text, depth):
    """Slice numbers from text, as a sorted int array within 0..depth - 1.

    "0:165:5" (start:stop:step, stop left out of the set), "0,40,80", mixtures "0:10,40", "every=5",
    which is 0:depth:5, or "n=7": seven evenly spaced slices, each in the middle of its seventh of
    the volume, that is round((i + 0.5) * depth / 7 - 0.5) for i = 0..6; n=1 is the middle slice.
    Raises InputError for text that is malformed or leaves the volume.
    """
    rule = re.fullmatch(r" *(n|every) *= *([1-9]\d*) *", text)
    if rule and rule[1] == "n":
        n = int(rule[2])
        if n > depth:
            raise InputError(f"slices '{text}': wanted 1 to {depth}, the slices of the volume")
        return np.array([round((i + 0.5) * depth / n - 0.5) for i in range(n)])
    parts = [f"::{rule[2]}"] if rule else text.split(",")
    return np.unique([z for part in parts for z in _parse_range(part, depth, f"slices '{text}'")])


def parse_label_map(text):
    """'191=1,223=2,*=0' -> {191: 1, 223: 2, "*": 0}; * stands for all values not named.

    '128:256=1' maps the values 128 to 255, as in slices. Class ids are 0 to 254; 255 (IGNORE) marks
    values that no loss and no metric shall see.
    """
    mapping = {}
    for part in text.split(","):
        match = re.fullmatch(r"(?:\*|(-?\d+)(?::(-?\d+))?)=(\d+)", part.replace(" ", ""))
        first, stop, class_id = match.groups() if match else ("0", "0", "0")
        values = range(int(first), int(stop or int(first) + 1)) if first else ["*"]
        if not values or int(class_id) > IGNORE:
            raise InputError(f"label map '{text}': '{part}' is not understood; wanted value=class "
                             "or first:stop=class, with classes 0 to 254, or 255 to ignore")
        mapping |= dict.fromkeys(values, int(class_id))
    return mapping


class Labels(LazyArray):
    """Class ids of a volume, uint8 (Z, Y, X), IGNORE where nobody annotated; see open_labels.

    raw, rows: from pair_labels. found: {z: (values in raw, voxels of each)}, until these are
    assigned. values, ids: all values in raw, sorted, and their class ids. counts (Z, n_classes)
    int64: annotated voxels of each class in each slice. slices: sorted int array of the z that
    have some.
    """

    def __init__(self, path, volume, label_slices):
        self.raw, self.rows = pair_labels(path, volume, label_slices)
        super().__init__(self.raw.path, volume.shape, np.uint8, volume.voxel_size)
        self.found = {z: _slice_values(self.raw, self.rows[z])
                      for z in np.flatnonzero(self.rows >= 0)}
        self.values = np.array(sorted({v for values, _ in self.found.values()
                                       for v in values.tolist()}), np.int64)

    def assign(self, class_of, n_classes):
        """Give all values their class ids: class_of {value: class id}."""
        self.ids, self.table = np.array([class_of[v] for v in self.values.tolist()], np.uint8), None
        if self.raw.dtype.kind in "iu" and self.raw.dtype.itemsize <= 2:    # else searched: slower
            self.table = np.full(2 ** (8 * self.raw.dtype.itemsize), IGNORE, np.uint8)
            self.table[self.values] = self.ids                      # negative ones from its end
        self.counts = np.zeros((len(self), n_classes), np.int64)
        for z, (values, voxels) in self.found.items():
            ids = self.ids[np.searchsorted(self.values, values)]
            self.counts[z] = np.bincount(ids, voxels, 256)[:n_classes]
        self.rows, self.found = np.where(self.counts.any(axis=1), self.rows, -1), None

    @property
    def slices(self):
        return np.flatnonzero(self.rows >= 0)

    def only(self, slices):
        """The same labels, of which only these slices count as annotated."""
        other, kept = copy.copy(self), np.isin(np.arange(len(self)), slices)
        other.rows, other.counts = np.where(kept, self.rows, -1), self.counts * kept[:, None]
        return other

    def read(self, z, y, x):
        out = np.full([part.stop - part.start for part in (z, y, x)], IGNORE, np.uint8)
        for i, row in enumerate(self.rows[z]):
            if row >= 0:
                raw = self.raw.read(slice(row, row + 1), y, x)[0]
                out[i] = (self.table.take(raw) if self.table is not None else
                          self.ids[np.searchsorted(self.values, raw)])
        return out


def open_labels(label_paths, volumes, classes=None, label_map=None, ignore_label=None,
                label_slices=None, merge=None):
    """Labels of opened Volumes: (list of Labels, number of classes).

    classes: how many, where that is known (from the training labels or a checkpoint). label_map:
    from parse_label_map. ignore_label: raw value, or tuple of raw values, that becomes IGNORE.
    label_slices: text for parse_slices, the annotated slices to use. merge: for each class, the one
    as which it was drawn. Without a map, values 0..K stand as they are and {0, v} is background and
    foreground (also where the merge leaves two classes); others are an InputError that lists them.
    How slices are paired: see pair_labels.
    """
    labels = [Labels(path, volume, label_slices)
              for path, volume in zip(label_paths, volumes, strict=True)]
    ignored = {*ignore_label} if isinstance(ignore_label, tuple) else {ignore_label}
    values = sorted({v for label in labels for v in label.values.tolist()} - ignored)
    n_classes = classes or max(2, len(values))
    if label_map:
        n_classes = classes or max([1, *(k for k in label_map.values() if k != IGNORE)]) + 1
    paths = ", ".join(label.path for label in labels)
    class_of = class_of_values(paths, values, n_classes, label_map, merge)
    for label in labels:
        label.assign(class_of | dict.fromkeys(ignored, IGNORE), n_classes)
        if not len(label.slices):
            raise InputError(f"{label.path}: every voxel is ignored, none is annotated")
    return labels, n_classes


def pair_labels(path, volume, label_slices=None):
    """(Volume of labels, rows): rows[z] is the label slice of the volume's slice z, -1 for none.

    Labels are paired with the slices of the volume by the numbers in the names of the files where
    both are folders, or where a folder has fewer slices than the volume's file (whose slices, if it
    is one file, have the numbers 0, 1, …); else slice by slice. They are cropped as their own path
    says; an axis that it leaves whole, as long as the volume's file, takes the volume's crop, and
    another was drawn on the crop. Then shapes must be equal. label_slices: as in open_labels.
    """
    label, (depth, *_) = open_volume(path), volume.file_shape
    if label.shape != label.file_shape == volume.file_shape and label.crop != volume.crop:
        raise InputError(f"{path} is cropped elsewhere than {volume.path}; crop the volume alone")
    box = [of_volume if own == slice(0, whole) else own for own, of_volume, whole in
           zip(label.crop, volume.crop, volume.file_shape)]
    rows = np.arange(box[0].stop - box[0].start)
    fewer = label.format == "folder" and label.file_shape[0] < depth
    if fewer and label.shape[0] < label.file_shape[0]:
        raise InputError(f"{path} has fewer slices than {volume.path}; crop the volume alone")
    if fewer or label.numbers and volume.numbers:
        names = list(volume.numbers or range(depth))
        numbers = list(label.numbers or ["none"])[label.crop[0]]
        unknown = [number for number in numbers if number not in names]
        if unknown:
            raise InputError(f"{path}: each label slice needs the number of a slice of "
                             f"{volume.path}: {_listed(names)}; got {_listed(unknown)}")
        rows = np.array([numbers.index(number) if number in numbers else -1
                         for number in names[volume.crop[0]]])
        box[0] = label.crop[0]
    label = label.cropped(box, label.path)
    shape = (len(rows), *label.shape[1:])
    if shape != volume.shape:
        raise InputError(f"{path}: labels {shape} do not fit {volume.path} {volume.shape}")
    if label_slices is not None:
        chosen = parse_slices(label_slices, len(rows))
        for z in chosen[rows[chosen] < 0]:
            raise InputError(f"{path}: --label-slices asks for {volume.slice_name(z)}, which has "
                             "no label")
        rows[np.setdiff1d(np.arange(len(rows)), chosen)] = -1
    return label, rows


def _slice_values(volume, z):
    """The values in a slice of labels and how often each occurs: int64 (n,), (n,)."""
    page = volume[z]
    if page.dtype.kind in "iu" and page.itemsize <= 2:          # far faster than to sort
        counts = _count_values(page.view(f"u{page.itemsize}"))
        values = np.flatnonzero(counts).astype(page.dtype)      # as they were: some are negative
        counts = counts[counts > 0]
    else:
        values, counts = np.unique(page, return_counts=True)
    if (values % 1 != 0).any():
        raise InputError(f"{volume.path}: {volume.slice_name(z)} holds numbers that are not whole: "
                         "no class ids")
    return values.astype(np.int64), counts


def class_of_values(path, values, n_classes, label_map=None, merge=None):
    """{value in files of labels: class id} by the rules of open_labels."""
    merged = {**dict(enumerate(merge or range(n_classes))), IGNORE: IGNORE}
    if label_map:
        class_of = {v: merged.get(label_map.get(v, label_map.get("*"))) for v in values}
        without = [v for v, k in class_of.items() if k is None]
        if without:
            raise InputError(f"{path}: the label map gives values {_listed(without)} no class from "
                             f"0 to {n_classes - 1}; add them, or *=0 for all the rest")
        return class_of
    if {*values} <= {*range(min(n_classes, IGNORE))}:
        return {v: merged[v] for v in values}
    left = sorted({*merged.values()} - {IGNORE})
    if len(left) == 2 and len({0, *values}) == 2:               # a mask
        return {v: left[v != 0] for v in values}
    first = 0 if 0 in values else values[0]                     # the background's, probably
    others = [v for v in values if v != first]
    advice = ",".join(f"{v}={k}" for k, v in enumerate([first, *others]))
    if len(values) > min(n_classes, 12):
        advice = f'{first}=0,*=1" or, for a mask with soft borders, "128:256=1,*=0'
    raise InputError(f"{path}: label values {_listed(values)}: neither class ids 0 to "
                     f"{n_classes - 1} nor a mask of 0 and one value; see --classes, "
                     f'--ignore-label and --label-map (--prediction-map), such as "{advice}"')


def _listed(values, most=12):
    shown = ", ".join(str(v) for v in list(values)[:most])
    return shown + (f", … ({len(values)} in all)" if len(values) > most else "")


class VolumeWriter:
    """A volume file being written: writer[z0:z1] = slab, in any order, broadcast as in NumPy; see
    create_volume."""

    def __init__(self, stream, offset, shape, dtype):
        self.stream, self.offset, self.shape, self.dtype = stream, offset, shape, dtype

    def __setitem__(self, index, slab):
        start, stop, _ = index.indices(self.shape[0])
        slab = np.broadcast_to(np.asarray(slab, self.dtype), (stop - start, *self.shape[1:]))
        self.stream.seek(self.offset + start * math.prod(self.shape[1:]) * self.dtype.itemsize)
        self.stream.write(slab.tobytes())
        self.stream.flush()


@contextlib.contextmanager
def create_volume(path, shape, dtype, voxel_size=None, max_value=None, like=None, attach=False):
    """Create a .tif or .mrc file for a volume larger than memory: a VolumeWriter, to use in `with`.

    shape (Z, Y, X), or (Z, C, Y, X) for a TIFF of several channels; dtype uint8, uint16 or float32;
    voxel_size (z, y, x) in nm or None; max_value: the highest value, for the display of Fiji. MRC
    has no unsigned bytes: uint8 is stored as int8 where max_value <= 127, else as uint16. like: the
    Volume that it belongs to, whose place in an MRC's space it takes. The file is renamed to path
    when the block ends, and removed when it ends by an exception. Several processes can fill one
    file: the first creates it, the others call this with attach=True, it leaves last.
    """
    shape, dtype = tuple(shape), np.dtype(dtype)
    is_mrc = Path(path).suffix.lower() in MRC_EXTENSIONS
    if is_mrc and dtype == np.uint8:
        dtype = np.dtype(np.int8 if max_value is not None and max_value <= 127 else np.uint16)
    with contextlib.nullcontext(_temporary(path)) if attach else replacing(path) as temporary:
        if is_mrc and not attach:
            _create_mrc(temporary, shape, dtype, voxel_size, max_value, like)
        elif not attach:
            _create_tiff(temporary, shape, dtype, voxel_size, max_value)
        offset = 1024
        if not is_mrc:
            with tifffile.TiffFile(temporary) as tif:
                offset = tif.pages[0].dataoffsets[0]
        with open(temporary, "r+b") as stream:
            yield VolumeWriter(stream, offset, shape, dtype)


def _create_tiff(file, shape, dtype, voxel_size, max_value):
    """Header and room for the voxels, which stay unwritten; ImageJ, or OME above 4 GB."""
    z, y, x = voxel_size or (1.0, 1.0, 1.0)
    options = {"axes": "ZYX" if len(shape) == 3 else "ZCYX"}
    big = math.prod(shape) * dtype.itemsize > 2**32 - 2**26
    if big and voxel_size:
        options |= {f"PhysicalSize{axis}": side for axis, side in zip("ZYX", (z, y, x))}
        options |= {f"PhysicalSize{axis}Unit": "nm" for axis in "ZYX"}
    elif voxel_size:
        options |= {"spacing": z, "unit": "nm"}
    if not big and dtype.kind == "u" and max_value:
        options |= {"min": 0.0, "max": float(max_value)}        # else class ids open black
    tifffile.imwrite(file, shape=shape, dtype=dtype, byteorder="<", imagej=not big, ome=big,
                     bigtiff=big, photometric="minisblack", metadata=options,
                     resolution=(1 / x, 1 / y) if voxel_size else None, resolutionunit=1)


def _create_mrc(file, shape, dtype, voxel_size, max_value, like):
    """Header and room for the voxels, which lie where `like`, a Volume, does in an MRC's space."""
    with mrcfile.new_mmap(file, shape, mrcfile.utils.mode_from_dtype(dtype), overwrite=True) as mrc:
        if voxel_size:
            mrc.voxel_size = tuple(side * 10 for side in reversed(voxel_size))  # x, y, z in Å
        if max_value or dtype == np.int8:       # else programs must guess whether it is signed
            mrc.header.dmin, mrc.header.dmax = (0, max_value) if max_value else (-128, 127)
        if getattr(like, "origin", None):
            first, origin, start = np.array([[part.start for part in like.crop], like.origin,
                                             like.start])
            if origin.any() or not start.any():         # else programs place it by nxstart, ...
                origin += first * (voxel_size or 0)
            mrc.header.origin = tuple(origin[::-1] * 10)
            mrc.nstart = tuple((start + first)[::-1].astype(int))


def _temporary(path):
    return Path(path).with_name(f".{Path(path).name}.tmp")


@contextlib.contextmanager
def replacing(path):
    """A temporary file's name, beside path, to write in the block and then renamed to path: a file
    there is whole at any moment. Where the block fails the temporary file goes."""
    temporary = _temporary(path)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ==================================================================================================
# Phantom: synthetic electron-microscopy volumes with exact labels
# ==================================================================================================

PHANTOM_CLASSES = ["background", "membrane", "nucleus", "mitochondrion", "vesicle"]
BACKGROUND, MEMBRANE, NUCLEUS, MITOCHONDRION, VESICLE = range(5)

CLEARANCE = 22                  # nm of cytoplasm between two structures
DARK = 62                       # grey level of membranes, before blur and noise


@dataclass
class Tissue:
    """A volume while it is drawn; arrays are (Z, Y, X) unless noted.

    position (Z, Y, X, 3): nm in the undeformed tissue. Shapes are simple there; the deformation
    bends them together. cell: its number. free: nm to the nearest structure, negative inside it.
    """
    voxel_size: np.ndarray
    position: np.ndarray
    cell: np.ndarray
    free: np.ndarray
    grey: np.ndarray
    label: np.ndarray

    def around(self, voxel, reach):
        """The box of half width `reach` nm around a voxel, as slices, and its nm from the voxel."""
        half = np.ceil(reach / self.voxel_size).astype(int)
        box = tuple(slice(max(0, v - h), v + h + 1) for v, h in zip(voxel, half))
        return box, self.position[box] - self.position[voxel]

    def draw(self, box, depth, cell, grey, class_id):
        """Fill depth > 0 (nm below the surface) within a cell with `grey` behind a dark wall. A
        smooth minimum keeps the surface off others and rounds it. Returns how many voxels."""
        room = np.where(self.cell[box] == cell, self.free[box] - CLEARANCE, np.float32(-1e4))
        depth = -12 * np.logaddexp(-depth / 12, -room / 12)
        inside = depth > 0
        wall = np.exp(-3 * (depth / 11 - 0.5) ** 2)
        self.grey[box][inside] = (grey + (DARK - grey) * wall)[inside]
        self.label[box][inside] = class_id
        self.free[box] = np.minimum(self.free[box], -depth)
        return inside.sum()


def smooth_noise(shape, voxel_size, rng, scale):
    """Gaussian random field (Z, Y, X) float32, mean 0, variance 1, correlated over `scale` nm:
    random knots times separable bumps, three small matrix products whatever the scale."""
    bumps = []
    for size, step in zip(shape, voxel_size):
        pitch = max(scale, step)
        knots = np.arange(-3, size * step / pitch + 4)
        bump = np.exp(-((np.arange(size)[:, None] * step / pitch - knots) ** 2))
        bumps.append((bump / np.linalg.norm(bump, axis=1, keepdims=True)).astype(np.float32))
    field = rng.standard_normal([bump.shape[1] for bump in bumps], dtype=np.float32)
    return bumps[1] @ np.tensordot(bumps[0], field, 1) @ bumps[2].T


def grow_cells(shape, voxel_size, soma, radius, noise, rng):
    """A Tissue of Voronoi cells; cell 0, around `soma`, has room for a ball of `radius` (nm)."""
    position = np.stack([axis * step + 60 * noise(220) for axis, step in
                         zip(np.indices(shape, np.float32), voxel_size)], axis=-1)
    extent = shape * voxel_size
    points = rng.uniform(-500, extent + 500, (int(8e-9 * np.prod(extent + 1000)), 3))
    points = np.stack([soma, *points[np.linalg.norm(points - soma, axis=1) > 2.5 * radius]])
    # a fourth coordinate, 0 of all voxels: the higher that of a cell, the smaller it stays
    lift = np.append(0, rng.uniform(0, 300, len(points) - 1))
    voxels = np.pad(position.reshape(-1, 3), ((0, 0), (0, 1)))
    distance, nearest = cKDTree(np.c_[points, lift]).query(voxels, k=2, workers=-1)
    apart = 2 * np.linalg.norm(points[nearest[:, 0]] - points[nearest[:, 1]], axis=1)
    border = np.float32(np.diff(distance**2)[:, 0] / apart).reshape(shape)      # nm
    cell = nearest[:, 0].reshape(shape)

    tone = rng.normal(0, 7, len(points)) - 25 * (rng.random(len(points)) < 0.12)    # dark glia
    grey = 172 + np.float32(tone)[cell] - 36 * np.maximum(noise(11) - 0.8, 0)       # ribosomes
    stain = np.exp(-(((border - 6 - 4 * noise(120)) / 7) ** 2))     # either side of a thin cleft
    label = np.where(border < 13, MEMBRANE, BACKGROUND).astype(np.uint8)
    return Tissue(voxel_size, position, cell, border - 13, grey + (DARK - grey) * stain, label)


def add_mitochondria(tissue, rng):
    """Capsules moulded by their cell and striped by cristae, 8 % of the volume or more."""
    wanted = 0.08 * tissue.cell.size
    for voxel in map(tuple, rng.integers(tissue.cell.shape, size=(4000, 3))):
        radius, half_length, axis = rng.uniform(60, 110), rng.uniform(60, 300), rng.normal(size=3)
        if wanted > 0 and tissue.free[voxel] > 0.6 * radius + CLEARANCE:
            box, offset = tissue.around(voxel, half_length + radius + 150)
            along = offset @ np.float32(axis / np.linalg.norm(axis))
            beyond = np.maximum(np.abs(along) - half_length, 0)
            depth = radius - np.sqrt((offset**2).sum(-1) - along**2 + beyond**2)
            grey = rng.normal(128, 6) - 44 * np.sin(along * (np.pi / 42)) ** 4          # cristae
            wanted -= tissue.draw(box, depth, tissue.cell[voxel], grey, MITOCHONDRION)


def add_vesicles(tissue, noise, rng):
    """Clusters of small balls with a bright lumen, 1.4 % of the volume."""
    wanted = 0.014 * tissue.cell.size
    density = np.where(tissue.free > 50, noise(150), -9)
    where = np.argwhere(density > np.quantile(density, 0.9))
    for voxel in map(tuple, rng.choice(where, len(where) // 20)):
        radius = rng.uniform(20, 30)
        if wanted > 0 and tissue.free[voxel] > radius + CLEARANCE:
            box, offset = tissue.around(voxel, 60)
            depth = radius - np.sqrt((offset**2).sum(-1))
            wanted -= tissue.draw(box, depth, tissue.cell[voxel], 188, VESICLE)


def phantom(shape, voxel_size=(20, 8, 8), seed=0):
    """Synthetic EM volume of neural tissue with exact labels.

    shape (Z, Y, X), Z from 1, Y and X from about 96; voxel_size (z, y, x) in nm. Returns image
    (Z, Y, X) uint8 and label (Z, Y, X) uint8, ids in the order of PHANTOM_CLASSES. Structures are
    solid shapes in 3D: slices are cuts through them. Same arguments, same bits.
    """
    rng = np.random.default_rng(seed)
    shape, voxel_size = tuple(shape), np.array(voxel_size, np.float32)
    noise = partial(smooth_noise, shape, voxel_size, rng)
    extent = shape * voxel_size
    soma, radius = extent * rng.uniform(0.3, 0.7, 3), 0.21 * extent[1:].min()
    tissue = grow_cells(shape, voxel_size, soma, radius, noise, rng)
    depth = radius - np.sqrt(((tissue.position - np.float32(soma)) ** 2).sum(-1))
    grey = 160 - 52 * np.clip(2 * noise(55) - 0.5, 0, 1)                        # chromatin
    tissue.draw(np.s_[:, :, :], depth, 0, grey, NUCLEUS)
    add_mitochondria(tissue, rng)
    add_vesicles(tissue, noise, rng)

    grey = ndimage.gaussian_filter(tissue.grey, (0.4, 5 / voxel_size[1], 5 / voxel_size[2]))
    grey = (grey + 6 * noise(700)) * rng.normal(1, 0.025, (len(grey), 1, 1))    # uneven sections
    return np.clip(rng.poisson(0.7 * grey) / 0.7, 0, 255).astype(np.uint8), tissue.label


# ==================================================================================================
# Patches: random crops, as uint8, and what turns them into network input
# ==================================================================================================

POINTS_PER_SLICE = 100      # voxels of each class remembered for a slice
TRIES = 50                  # crops drawn in search of a class, before one is placed around it


class Patches(torch.utils.data.Dataset):
    """Random crops of volumes and of their labels, both uint8: an endless, reproducible stream.

    images: lazy uint8 arrays (Z, Y, X). labels: lazy label arrays of the same shapes, or None.
    patch_size: (Y, X) for 2D crops, (Z, Y, X) for 3D ones. slices: for each volume, the z of which
    a crop holds at least one (default: all). foreground: the share of crops that must hold some of
    a foreground class, which is drawn uniformly; they are uniform over the crops that do, as where
    one crops again until there is some (Pagano 2023, authors' code). A class so rare that TRIES
    crops miss it gets one around a voxel of it.

    Item i is `(image,)` or `(image, label)`, tensors of the patch's shape; with numbered=True the
    number of the volume follows. It depends on (seed, i) alone: the number of workers and a resumed
    run change nothing. Raises InputError where a patch is larger than a volume.
    """

    def __init__(self, images, labels=None, patch_size=(512, 512), slices=None, foreground=0.0,
                 seed=(0,), numbered=False):
        self.images, self.labels, self.seed, self.numbered = images, labels, seed, numbered
        self.patch_size, self.sides = patch_size, (1, *patch_size)[-3:]
        for image in images:
            if any(p > s for p, s in zip(self.sides, image.shape)):
                raise InputError(
                    f"{image.path}: patches of {format_shape(patch_size)} do not fit into "
                    f"{format_shape(image.shape)}, as the network sees it; give a smaller "
                    "--patch-size or --downsample")
        slices = [range(len(image)) for image in images] if slices is None else slices
        self.slices = [(v, int(z)) for v, zs in enumerate(slices) for z in zs]
        self.foreground, self.pages = foreground, {}    # pages: label slices that are kept
        self.points = self._foreground_points() if foreground else []

    def _foreground_points(self):
        """For each foreground class: its id, and a list of (volume, z, voxels (N, 2) of y, x)."""
        rng = np.random.default_rng(self.seed)
        points = {}
        for v, z in self.slices:
            label = self.labels[v][z]
            if (len(self.pages) + 1) * label.nbytes <= CACHE_BYTES:
                self.pages[v, z] = label
            for value in np.setdiff1d(label, [0, IGNORE]):
                found = rng.permutation(np.argwhere(label == value).astype(np.int32))
                points.setdefault(int(value), []).append((v, z, found[:POINTS_PER_SLICE]))
        return sorted(points.items())

    def __getitem__(self, index):
        rng = np.random.default_rng((*self.seed, index))
        if self.points and rng.random() < self.foreground:
            v, window = self._foreground_window(rng)
        else:
            v, z = self.slices[rng.integers(len(self.slices))]
            window = self._window(rng, v, z)
        item = [self.images[v][window], *([self._label(v, window)] if self.labels else [])]
        item = [torch.from_numpy(crop).reshape(self.patch_size) for crop in item]
        return (*item, v) if self.numbered else tuple(item)

    def _label(self, v, window):
        """The labels in a window, from kept slices if all are: many are searched for a class."""
        pages = [self.pages.get((v, z)) for z in range(window[0].start, window[0].stop)]
        if any(page is None for page in pages):
            return self.labels[v][window]
        return np.stack([page[window[1:]] for page in pages])

    def _foreground_window(self, rng):
        """A volume and a window of it that holds some of a foreground class."""
        value, places = self.points[rng.integers(len(self.points))]
        for _ in range(TRIES):
            v, z, voxels = places[rng.integers(len(places))]
            window = self._window(rng, v, z)
            if (self._label(v, window) == value).any():
                return v, window
        return v, self._window(rng, v, z, *voxels[rng.integers(len(voxels))])

    def _window(self, rng, v, z, y=None, x=None):
        """A random window of volume v that holds slice z, and row y and column x if given."""
        window = []
        for point, size, side in zip((z, y, x), self.sides, self.images[v].shape):
            low = 0 if point is None else max(0, point - size + 1)
            high = side - size if point is None else min(point, side - size)
            start = int(rng.integers(low, high + 1))
            window.append(slice(start, start + size))
        return tuple(window)


def measure_normalization(items, mode):
    """{"mean", "std"} of the `slices` of the `image` of Items: averages of each slice's mean and
    standard deviation (Pagano 2023, authors' code), at most 32 slices. For "volume" see Grey."""
    if mode == "volume":
        return STANDARD
    chosen = [(item.image, z) for item in items for z in item.slices]
    pages = (image[z] for image, z in chosen[:: math.ceil(len(chosen) / 32)])
    mean, std = np.mean([(page.mean(), page.std()) for page in pages], axis=0)
    return {"mean": float(mean), "std": float(max(std, 1e-3))}


def normalize(image, normalization):
    """Grey levels 0..255 (B, ...) of any dtype -> float32 (B, 1, ...), on the image's device."""
    return (image[:, None].float() - normalization["mean"]) / normalization["std"]


# ==================================================================================================
# Augmentation: one composed sampling grid per batch, on the device
# ==================================================================================================


def elastic_displacement(batch, size, device, amplitude=20.0, sigma=0.6, pitch=40):
    """Displacement (B, H, W, 2) in pixels (x, y): smoothed uniform noise on a coarse grid.

    Noise in (-1, 1) every `pitch` pixels, smoothed by a Gaussian of `sigma` grid steps, times
    `amplitude` pixels, enlarged with cubic interpolation (Guay 2021, authors' code).
    """
    coarse = [math.ceil(side / pitch) + 1 for side in size]
    noise = torch.empty(batch * 2, 1, *coarse, device=device).uniform_(-1, 1)
    radius = max(1, math.ceil(3 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=device) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    noise = F.pad(noise, (radius,) * 4, mode="replicate")
    noise = F.conv2d(F.conv2d(noise, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
    field = F.interpolate(noise, size=size, mode="bicubic", align_corners=True) * amplitude
    return field.view(batch, 2, *size).permute(0, 2, 3, 1)


def sampling_grid(batch, size, device, flip=False, rot90=False, rotation=0.0, scale=0.0, shear=0.0,
                  displacement=None):
    """Grid (B, H, W, 2) for grid_sample that composes all geometric augmentation of a batch.

    flip: each axis with probability 1/2. rot90: quarter turns (half turns where H != W).
    rotation: degrees, drawn from (-rotation, rotation]. scale: zoom drawn from 1 +- scale.
    shear: degrees, drawn like the rotation. displacement (B, H, W, 2): pixels, added on top.
    """
    H, W = size

    def uniform(limit):
        return torch.empty(batch, device=device).uniform_(-limit, limit)

    turns = torch.randint(0, 4 if H == W else 2, (batch,), device=device) * int(rot90)
    angle = torch.deg2rad(uniform(rotation)) + turns * (math.pi / 2 if H == W else math.pi)
    cos, sin, skew = angle.cos(), angle.sin(), torch.deg2rad(uniform(shear)).tan()
    signs = torch.randint(0, 2, (batch, 2), device=device) * 2 - 1 if flip else 1
    turn = torch.stack([cos, -sin, sin, cos], dim=1).view(batch, 2, 2)
    turn = turn + skew.view(-1, 1, 1) * turn[:, :, :1] * torch.arange(2.0, device=device)
    turn = turn / (1 + uniform(scale)).view(-1, 1, 1)
    turn = turn * (signs[:, None] if flip else 1)
    y = torch.arange(H, device=device) - (H - 1) / 2
    x = torch.arange(W, device=device) - (W - 1) / 2
    pixel = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    pixel = torch.einsum("hwj,bij->bhwi", pixel, turn)
    if displacement is not None:
        pixel = pixel + displacement
    return pixel * 2 / torch.linspace(W, H, 2, device=device)     # a copy would wait for the GPU


def warp(image, grid, mode):
    """Sample image (B, H, W) at grid (B, h, w, 2), float32; mode bilinear, or nearest for labels.

    All slices of a crop (B, Z, H, W) are sampled alike. What lies outside is mirrored, so that
    image and label stay a true pair up to the border.
    """
    slices = image.reshape(len(image), -1, *image.shape[-2:]).float()
    return F.grid_sample(slices, grid, mode=mode, padding_mode="reflection",
                         align_corners=False).reshape(*image.shape[:-2], *grid.shape[1:3])


def augment(image, label, normalization, **geometry):
    """A batch of crops -> normalised, augmented network input, all on the crops' device.

    image (B, H, W) or (B, Z, H, W), 0..255 of any dtype, so that grey levels can be changed before;
    label (B, ...) uint8, or None; geometry: see sampling_grid.
    Returns image (B, 1, ...) float32 and label (B, ...) int64 or None.
    """
    if geometry:
        grid = sampling_grid(len(image), image.shape[-2:], image.device, **geometry)
        image = warp(image, grid, "bilinear")
        label = None if label is None else warp(label, grid, "nearest")
    return normalize(image, normalization), None if label is None else label.long()


# ==================================================================================================
# Networks: (in_channels, out_channels, width=None) -> module with dims, 2 or 3; stride and offset:
# sides n of its input satisfy n % stride == offset; margin: pixels that its output lacks on each
# side; in 3D min_depth: the slices that it needs. Blocks stand above their first network
# ==================================================================================================


def conv_block(channels, norm="batch", padding=1, kernel=3, **options):
    """Convolution (+ normalisation) + ReLU for each step of channels (in, ..., out); norm: batch,
    group or None; options: of nn.Conv2d."""
    layers = []
    for c_in, c_out in zip(channels[:-1], channels[1:]):
        layers.append(nn.Conv2d(c_in, c_out, kernel, padding=padding, **options))
        if norm:
            layers.append(nn.BatchNorm2d(c_out) if norm == "batch" else group_norm(c_out))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def group_norm(channels):
    """GroupNorm of up to 4 groups (Diakogiannis 2021)."""
    return nn.GroupNorm(math.gcd(4, channels), channels)


def crop_like(x, reference):
    """The centre of x (..., H, W) at the spatial size of reference."""
    (H, W), (h, w) = x.shape[-2:], reference.shape[-2:]
    top, left = (H - h) // 2, (W - w) // 2
    return x[..., top : top + h, left : left + w]


def he_initialization(module):
    """Gaussian weights of variance 2 / (inputs of a neuron), no bias (He 2015, for ReLU)."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(module.bias)


class UNet(nn.Module):
    """U-Net (Ronneberger 2015) with the options of the five papers' plain U-Nets.

    (B, in_channels, H, W) -> logits (B, out_channels, H - 2 margin, W - 2 margin). width: filters
    of the first level, doubling with each level. Sides n must satisfy n % stride == offset.

    | paper | options | parameters |
    | --- | --- | --- |
    | sparse slices, arXiv 2206.02392 | (default) | 7,701,825 (1 in, 1 out) |
    | partial labels, soft X-ray | width=32, levels=5, norm=None | 7,759,653 (1 in, 5 out) |
    | 2D-3D ensembles, Guay 2021 | levels=5, norm=None, padding=0 | 31,030,983 (1 in, 7 out) |
    | Pagano 2023, "ResUNet" | up="bilinear" | 4,283,201 (1 in, 1 out) |

    up="bilinear" halves the deepest level and narrows before each enlargement instead of after it.
    padding=0 gives the original's valid convolutions: margin pixels are lost on each side. Without
    normalisation weights start as in the original (section 3), so that 18 ReLUs in a row neither
    extinguish nor blow up their input.
    """

    dims = 2

    def __init__(self, in_channels, out_channels, width=None, levels=4, norm="batch",
                 up="transposed", padding=1):
        super().__init__()
        widths = [(width or 64) * 2**level for level in range(levels)]
        if up == "bilinear":
            widths[-1] //= 2
        self.encoder = nn.ModuleList(conv_block((c_in, c, c), norm, padding)
                                     for c_in, c in zip([in_channels, *widths], widths))
        self.pool = nn.MaxPool2d(2)
        self.up, self.decoder = nn.ModuleList(), nn.ModuleList()
        c_in = widths[-1]
        for level in reversed(range(levels - 1)):
            c = c_out = widths[level]
            if up == "bilinear":
                c_out = widths[max(level - 1, 0)]
                self.up.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True))
            else:
                self.up.append(nn.ConvTranspose2d(c_in, c, 2, stride=2))
                c_in = c
            self.decoder.append(conv_block((c + c_in, c, c_out), norm, padding))
            c_in = c_out
        self.head = nn.Conv2d(c_in, out_channels, 1)
        self.stride = 2 ** (levels - 1)
        if norm is None:
            self.apply(he_initialization)
        # Two valid convolutions lose 4 pixels on each level, seen at full size 4 * 2^level.
        self.offset = 0 if padding else 4 * (self.stride - 1) % self.stride
        self.margin = 0 if padding else 6 * self.stride - 4

    def forward(self, x):
        skips = []
        for block in self.encoder:
            x = block(self.pool(x) if skips else x)
            skips.append(x)
        skips.pop()
        for up, block in zip(self.up, self.decoder):
            x = up(x)
            x = block(torch.cat([crop_like(skips.pop(), x), x], dim=1))
        return self.head(x)


def ResUNet(in_channels, out_channels, width=None):
    """The "ResUNet" of Pagano 2023: in the authors' code a bilinear U-Net without residuals."""
    return UNet(in_channels, out_channels, width, up="bilinear")


def UNet5(in_channels, out_channels, width=None):
    """The U-Net of the partial-label paper: 5 levels, 32 filters, no normalisation."""
    return UNet(in_channels, out_channels, width or 32, levels=5, norm=None)


class BySlice(nn.Module):
    """A 2D layer on every slice: (B, C, Z, H, W) -> (B, C', Z, H', W')."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return fold_slices(x, self.layer)


def fold_slices(x, layer):
    """Call a 2D layer on x (B, C, Z, H, W) as B * Z images: no copy in channels-last memory."""
    B, _, Z = x.shape[:3]
    return layer(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (B, Z)).transpose(1, 2)


class Conv3d(nn.Conv3d):
    """A 3 x 3 x 3 convolution with padding 1. On a CPU it is a 2D one over each slice and its two
    neighbours: nn.Conv3d is up to six times slower there below 32 channels (torch 2.14)."""

    def __init__(self, in_channels, out_channels, bias=True):
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias)

    def forward(self, x):
        if x.device.type == "cuda":
            return super().forward(x)
        Z = x.shape[2]
        x = F.pad(x, (0, 0, 0, 0, 1, 1))
        x = torch.cat([x[:, :, k : k + Z] for k in range(3)], dim=1)        # (B, 3 C, Z, H, W)
        weight = self.weight.transpose(1, 2).flatten(1, 2)                  # (C', 3 C, 3, 3)
        weight = weight.contiguous(memory_format=torch.channels_last)
        return fold_slices(x, lambda x: F.conv2d(x, weight, self.bias, padding=1))


def norm_conv_block_3d(*channels):
    """GroupNorm of up to 8 groups + 3x3x3 convolution + ReLU for each step of (in, ..., out)."""
    layers = []
    for c_in, c_out in zip(channels[:-1], channels[1:]):
        layers += [nn.GroupNorm(math.gcd(8, c_in), c_in),
                   Conv3d(c_in, c_out, bias=False), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet3D(nn.Module):
    """3D U-Net (Çiçek 2016) with GroupNorm before each convolution: 16,318,691 parameters.

    (B, in_channels, Z, H, W) -> logits (B, out_channels, Z, H, W), sides of 8 or more. The baseline
    of the sparse-slice paper (arXiv 2206.02392, sections 2.4 and 3): 4 levels, width filters
    doubling with each, nearest enlargement. Slices that nobody annotated are IGNORE in its labels,
    which is Çiçek's training from sparse annotation.
    """

    dims, stride, offset, margin, min_depth = 3, 8, 0, 0, 8

    def __init__(self, in_channels, out_channels, width=None):
        super().__init__()
        widths = [(width or 64) * 2**level for level in range(4)]
        self.encoder = nn.ModuleList(
            norm_conv_block_3d(c_in, max(c // 2, c_in), c)
            for c_in, c in zip([in_channels, *widths], widths))
        self.pool = nn.MaxPool3d(2)
        self.decoder = nn.ModuleList(
            norm_conv_block_3d(below + c, c, c)
            for below, c in zip(widths[:0:-1], widths[-2::-1]))
        self.head = nn.Conv3d(widths[0], out_channels, 1)

    def forward(self, x):
        skips = []
        for block in self.encoder:
            x = block(self.pool(x) if skips else x)
            skips.append(x)
        skips.pop()
        for block in self.decoder:
            skip = skips.pop()
            x = block(torch.cat([skip, F.interpolate(x, size=skip.shape[2:])], dim=1))
        return self.head(x)


def any_size(multiple):
    """Decorator of forward(self, x): x (B, C, H, W) of any size is mirrored at its lower and right
    border up to the next multiples, and the result (B, K, H, W) is cut back."""
    def decorate(forward):
        def padded(self, x):
            H, W = x.shape[-2:]
            x = mirror_pad(x, 0, -H % multiple, 0, -W % multiple)
            return forward(self, x)[..., :H, :W]
        return padded
    return decorate


def vgg_encoder(in_channels, width, depths):
    """The blocks of a VGG network (Simonyan 2015), with BatchNorm; pooling stands between them.

    width: filters of the first block, doubling with each up to 8 width; depths: convolutions of
    each block, (2, 2, 3, 3, 3) for VGG16, (2, 2, 4, 4, 4) for VGG19.
    """
    widths = [width * min(2**level, 8) for level in range(len(depths))]
    return nn.ModuleList(conv_block((c_in, *[c] * depth))
                         for c_in, c, depth in zip([in_channels, *widths], widths, depths))


class LearnedUp(nn.ConvTranspose2d):
    """(B, C, H, W) -> (B, C, fH, fW): each channel enlarged by itself, bilinear to begin with
    (Long 2015, section 3.3)."""

    def __init__(self, channels, factor):
        super().__init__(channels, channels, 2 * factor, stride=factor, padding=factor // 2,
                         groups=channels, bias=False)
        place = (torch.arange(2 * factor) + 0.5) / factor       # 0..2, the pixel's centre at 1
        line = 1 - (place - 1).abs()
        self.weight.data.copy_((line[:, None] * line).expand_as(self.weight))


class FCN8s(nn.Module):
    """Fully convolutional network with VGG16 as encoder (Long 2015): 134,289,379 parameters.

    (B, in_channels, H, W) -> logits (B, out_channels, H, W) of any size, at 1 input and 1 output
    channel. width: filters of the first block, 64 there. The scores of pool3 and pool4 join those
    of the last layer on the way up. BatchNorm, since it is trained from scratch; padded
    convolutions in place of a border of 100 pixels.
    """

    dims, stride, offset, margin = 2, 1, 0, 0

    def __init__(self, in_channels, out_channels, width=None):
        super().__init__()
        w = width or 64
        self.encoder = vgg_encoder(in_channels, w, (2, 2, 3, 3, 3))
        self.pool = nn.MaxPool2d(2)
        self.classifier = nn.Sequential(                                    # 4096 = 64 * 64
            conv_block((8 * w, 64 * w), kernel=7, padding=3), nn.Dropout(),
            conv_block((64 * w, 64 * w), kernel=1, padding=0), nn.Dropout())
        self.score, self.score_pool4, self.score_pool3 = [
            nn.Conv2d(c, out_channels, 1) for c in (64 * w, 8 * w, 4 * w)]
        self.up, self.up_pool4 = LearnedUp(out_channels, 2), LearnedUp(out_channels, 2)
        self.up_pool3 = LearnedUp(out_channels, 8)

    @any_size(32)
    def forward(self, x):
        pooled = []
        for block in self.encoder:
            x = self.pool(block(x))
            pooled.append(x)
        x = self.up(self.score(self.classifier(x)))
        x = self.up_pool4(x + self.score_pool4(pooled[3]))
        return self.up_pool3(x + self.score_pool3(pooled[2]))


class SegNet(nn.Module):
    """SegNet (Badrinarayanan 2017): 29,479,489 parameters at 1 input and 1 output channel.

    (B, in_channels, H, W) -> logits (B, out_channels, H, W) of any size. width: filters of the
    first block, 64 there. Five blocks of VGG16 down and five mirrored ones up, which put each value
    back where the maximum was (pooling indices).
    """

    dims, stride, offset, margin = 2, 1, 0, 0

    def __init__(self, in_channels, out_channels, width=None):
        super().__init__()
        w, depths = width or 64, (2, 2, 3, 3, 3)
        self.encoder = vgg_encoder(in_channels, w, depths)
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
        widths = [8 * w, 8 * w, 4 * w, 2 * w, w, w]
        self.decoder = nn.ModuleList(
            conv_block((*[c] * depth, c_out))
            for c, c_out, depth in zip(widths, widths[1:], reversed(depths)))
        self.head = nn.Conv2d(w, out_channels, 3, padding=1)

    @any_size(32)
    def forward(self, x):
        places = []
        for block in self.encoder:
            x, indices = self.pool(block(x))
            places.append(indices)
        for block in self.decoder:
            x = block(self.unpool(x, places.pop()))
        return self.head(x)


def bilinear(x, size):
    """x (B, C, h, w) at another size (H, W)."""
    return F.interpolate(x, size=size, mode="bilinear")


class ResidualBlock(nn.Module):
    """ReLU of input + residual (He 2016), with BatchNorm: (B, c_in, H, W) -> (B, c_out, H', W').

    residual: the convolutions, which take the stride; the input is added, through a 1x1 convolution
    where its shape changes.
    """

    def __init__(self, c_in, c_out, stride, residual):
        super().__init__()
        self.residual, self.stride, self.shortcut = residual, stride, nn.Identity()
        if stride > 1 or c_in != c_out:
            self.shortcut = conv_block((c_in, c_out), kernel=1, padding=0, bias=False)[:-1]

    def forward(self, x):
        # The shortcut's stride is taken here: on a CPU a strided 1x1 convolution of few channels,
        # channels last, has a wrong gradient or crashes (oneDNN issue 6035).
        shortcut = self.shortcut(x[..., :: self.stride, :: self.stride])
        return F.relu(shortcut + self.residual(x))


def Bottleneck(c_in, c_out, stride=1, dilation=1):
    """ResidualBlock of three convolutions, 1x1, 3x3 and 1x1 (He 2016, figure 5, right), of which
    the first two have a quarter of c_out filters; the 3x3 one takes stride and dilation."""
    c = c_out // 4
    return ResidualBlock(c_in, c_out, stride, nn.Sequential(
        conv_block((c_in, c), kernel=1, padding=0, bias=False),
        conv_block((c, c), padding=dilation, stride=stride, dilation=dilation, bias=False),
        conv_block((c, c_out), kernel=1, padding=0, bias=False)[:-1]))


def residual_stage(c_in, c_out, dilations, stride=1, block=Bottleneck):
    """Residual blocks in a row, one for each dilation; the first one takes the stride."""
    return nn.Sequential(block(c_in, c_out, stride, dilations[0]),
                         *[block(c_out, c_out, 1, dilation) for dilation in dilations[1:]])


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling (Chen 2017, section 3.3): (B, c_in, H, W) -> (B, c, H, W).

    A 1x1 convolution, a 3x3 one dilated by each of the rates, and the mean of the whole image, c
    filters each, are narrowed to c together. bias: of the convolutions before BatchNorm.
    """

    def __init__(self, c_in, c, rates, bias=False):
        super().__init__()
        self.branches = nn.ModuleList([
            conv_block((c_in, c), kernel=1, padding=0, bias=bias),
            *[conv_block((c_in, c), padding=rate, dilation=rate, bias=bias) for rate in rates]])
        # One value for each image: nothing that BatchNorm could normalise in a batch of one.
        self.image = conv_block((c_in, c), norm=None, kernel=1, padding=0)
        self.project = conv_block(((len(rates) + 2) * c, c), kernel=1, padding=0, bias=bias)

    def forward(self, x):
        image = self.image(x.mean(dim=(2, 3), keepdim=True)).expand(-1, -1, *x.shape[-2:])
        return self.project(torch.cat([*[branch(x) for branch in self.branches], image], dim=1))


class DeepLabV3(nn.Module):
    """DeepLabv3 (Chen 2017, arXiv 1706.05587): a dilated backbone, ASPP and a classifier.

    (B, in_channels, H, W) -> logits (B, out_channels, H, W) of any size, mirrored up to multiples
    of 16. backbone: an image -> c_in channels at a stride that divides 16; rates: of ASPP, whose
    branches have c filters. As in torchvision, not in the paper, the classifier begins with a 3x3
    convolution.
    """

    dims, stride, offset, margin = 2, 1, 0, 0

    def __init__(self, backbone, c_in, c, rates, out_channels):
        super().__init__()
        self.backbone, self.aspp = backbone, ASPP(c_in, c, rates)
        self.classifier = conv_block((c, c), bias=False)
        self.head = nn.Conv2d(c, out_channels, 1)

    @any_size(16)
    def forward(self, x):
        return bilinear(self.head(self.classifier(self.aspp(self.backbone(x)))), x.shape[-2:])


def DeepLabResNet101(in_channels, out_channels, width=None):
    """DeepLabv3 on ResNet-101 (He 2016): 58,620,871 parameters at 1 input and 7 output channels.

    width: filters of the first convolution, 64 by default. Output stride 16: the last stage is
    dilated by 2 x (1, 2, 4), the multi-grid of DeepLabv3 (section 3.2.1), instead of strided.
    """
    w = width or 64
    backbone = nn.Sequential(
        conv_block((in_channels, w), kernel=7, padding=3, stride=2, bias=False),
        nn.MaxPool2d(3, stride=2, padding=1),
        residual_stage(w, 4 * w, [1] * 3),
        residual_stage(4 * w, 8 * w, [1] * 4, stride=2),
        residual_stage(8 * w, 16 * w, [1] * 23, stride=2),
        residual_stage(16 * w, 32 * w, [2, 4, 8]))
    return DeepLabV3(backbone, 32 * w, 4 * w, (6, 12, 18), out_channels)


def DeepLabDRN(in_channels, out_channels, width=None):
    """DeepLabv3 on DRN-D-54 (Yu 2017, arXiv 1705.09914): 40,018,327 parameters at 1 input and 7
    output channels.

    width: filters of the first convolution, 16 by default. Output stride 8; no pooling, and behind
    the last stage two levels without residuals, which smooth the grid that dilation leaves.
    """
    w = width or 16
    backbone = nn.Sequential(
        conv_block((in_channels, w), kernel=7, padding=3, bias=False),
        conv_block((w, w), bias=False),
        conv_block((w, 2 * w), stride=2, bias=False),
        residual_stage(2 * w, 16 * w, [1] * 3, stride=2),
        residual_stage(16 * w, 32 * w, [1] * 4, stride=2),
        residual_stage(32 * w, 64 * w, [2] * 6),
        residual_stage(64 * w, 128 * w, [4] * 3),
        conv_block((128 * w, 32 * w), padding=2, dilation=2, bias=False),
        conv_block((32 * w, 32 * w), bias=False))
    return DeepLabV3(backbone, 32 * w, 16 * w, (12, 24, 36), out_channels)


class DeepLabV3Plus(nn.Module):
    """DeepLabv3+ (Chen 2018) with a VGG19-like encoder: 41,997,393 parameters.

    (B, in_channels, H, W) -> logits (B, out_channels, H, W) of any size, at 1 input and 1 output
    channel. width: filters of the first block, 64 by default. The encoder of the SegET paper
    (section 3.3) has 23 convolutions in 8 blocks: VGG19's 16 in five, then 3, 2 and 2 dilated by 2
    at an output stride of 16. Atrous rates 6, 12, 18 and the pooled image; low-level features of
    stride 4, the third block's, narrowed to 3/4 of the width (48 there).
    """

    dims, stride, offset, margin = 2, 1, 0, 0

    def __init__(self, in_channels, out_channels, width=None):
        super().__init__()
        w = width or 64
        self.encoder = vgg_encoder(in_channels, w, (2, 2, 4, 4, 4))
        self.pool = nn.MaxPool2d(2)
        self.dilated = nn.Sequential(*[
            conv_block([8 * w] * (depth + 1), padding=2, dilation=2) for depth in (3, 2, 2)])
        self.aspp = ASPP(8 * w, 4 * w, (6, 12, 18), bias=True)
        low = max(3 * w // 4, 1)
        self.low_level = conv_block((4 * w, low), kernel=1, padding=0)
        self.decoder = conv_block((4 * w + low, 4 * w, 4 * w))
        self.head = nn.Conv2d(4 * w, out_channels, 1)

    @any_size(16)
    def forward(self, x):
        size = x.shape[-2:]
        for number, block in enumerate(self.encoder):
            x = block(self.pool(x) if number else x)
            if number == 2:
                low_level = self.low_level(x)
        x = self.aspp(self.dilated(x))
        x = torch.cat([bilinear(x, low_level.shape[-2:]), low_level], dim=1)
        return bilinear(self.head(self.decoder(x)), size)


def BasicBlock(c_in, c_out, stride=1, dilation=1):
    """ResidualBlock of two 3x3 convolutions (He 2016, figure 5, left); the first takes the stride,
    both dilation."""
    options = dict(padding=dilation, dilation=dilation, bias=False)
    return ResidualBlock(c_in, c_out, stride, nn.Sequential(
        conv_block((c_in, c_out), stride=stride, **options),
        conv_block((c_out, c_out), **options)[:-1]))


class UNetPlusPlus(nn.Module):
    """UNet++ (Zhou 2018) on a ResNet encoder (He 2016), as in segmentation_models.pytorch.

    (B, in_channels, H, W) -> logits (B, out_channels, H, W), sides multiples of the stride. width:
    filters of the first level, 64 by default. Between encoder and decoder stands a triangle of
    blocks, in which each block sees all that came before it at its resolution, and the enlarged
    output of the block below.

    | paper | residual stages of the encoder | parameters (1 in, 1 out) |
    | --- | --- | --- |
    | Pagano 2023, "UNet++" | the 4 of ResNet-34 | 26,072,337 |
    | Pagano 2023, "SSL-UNet++" | 2 | 2,017,937 |

    average_branches: deep supervision. The blocks of the finest row that end the shorter paths get
    heads of their own, at half the resolution, and the network's logits are those of the mean
    probability of all branches. forward(x, heads=True) returns the logits of each branch, a list.
    """

    dims, offset, margin = 2, 0, 0

    def __init__(self, in_channels, out_channels, width=None, stages=4, average_branches=False):
        super().__init__()
        w = width or 64
        widths = [w, w, 2 * w, 4 * w, 8 * w][: stages + 1]
        self.encoder = nn.ModuleList([
            conv_block((in_channels, w), kernel=7, padding=3, stride=2, bias=False)])
        for c_in, c, depth, stride in zip(widths, widths[1:], (3, 4, 6, 3), (1, 2, 2, 2)):
            self.encoder.append(residual_stage(c_in, c, [1] * depth, stride, BasicBlock))
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        skips = widths[::-1]                                    # deepest first, as all that follows
        self.rows, lower = nn.ModuleList(), skips[:1]           # lower: filters of the row below
        for level in range(stages):
            skip, row = skips[level + 1], []
            for place in reversed(range(level + 1)):
                c_in = lower[place] + sum(c for c, _ in row) + skip
                c = skip if place else max(1, stages * w >> level)  # 256, 128, … or 128, 64
                row.insert(0, (c, conv_block((c_in, c, c), bias=False)))
            self.rows.append(nn.ModuleList(block for _, block in row))
            lower = [*[c for c, _ in row], skip]
        last = max(1, w // 4)
        self.last = conv_block((lower[0], last, last), bias=False)
        self.head = nn.Conv2d(last, out_channels, 3, padding=1)
        self.branch_heads = nn.ModuleList(
            nn.Conv2d(c, out_channels, 3, padding=1)
            for c in (lower[1:-1] if average_branches else []))
        self.stride = 2 ** (stages + 1)

    def forward(self, x, heads=False):
        size, skips = x.shape[-2:], []
        for number, stage in enumerate(self.encoder):
            x = stage(self.pool(x) if number == 1 else x)
            skips.append(x)
        lower = [skips.pop()]
        for row in self.rows:
            same = [skips.pop()]
            for x, block in zip(lower[::-1], row[::-1]):
                same.insert(0, block(torch.cat([F.interpolate(x, scale_factor=2), *same], dim=1)))
            lower = same
        logits = [self.head(self.last(F.interpolate(lower[0], scale_factor=2)))]
        logits += [bilinear(head(x), size) for head, x in zip(self.branch_heads, lower[1:])]
        return logits if heads else self.combine(logits)

    def combine(self, heads):
        return mean_logits(heads)


def UNetPlusPlus3(in_channels, out_channels, width=None, average_branches=False):
    """UNet++ with a three-stage encoder: 2,017,937 parameters, the "SSL-UNet++" of Pagano 2023,
    whose 21,954,705 count two stages that nothing is connected to."""
    return UNetPlusPlus(in_channels, out_channels, width, 2, average_branches)


def group_conv(c_in, c_out, **options):
    """Convolution + GroupNorm, without ReLU; options: of conv_block."""
    return conv_block((c_in, c_out), norm="group", **options)[:-1]


def fractal_tanimoto(p, q, *dims, depth=5, valid=None, smooth=1e-5):
    """Similarities, 0..1, of two maps of values 0..1 and of their complements, one for each of the
    dims, over which it is summed and which stay as sides of 1 (Diakogiannis 2021, section 2.1).

    The mean over d < depth, and over p, q and 1 - p, 1 - q, of
    (pq + smooth) / (2^d (pp + qq) - (2^(d+1) - 1) pq + smooth), products summed over dims. The
    denominator is 2^d (p - q)^2 + pq, in which nothing cancels: the deeper, the steeper near
    equality. valid: 0 where nothing counts, of a shape like p's; depth 0 is depth 1.
    """
    p, q, depth = p.float(), q.float(), max(depth, 1)
    both = p * q
    maps = [(p - q).square(), both, (1 - q) - p + both]     # the last: (1 - p) (1 - q)
    if valid is not None:
        maps = [x * valid for x in maps]
    similarities = []
    for dim in dims:
        apart, *agreements = [x.sum(dim, keepdim=True) for x in maps]
        total = sum((common + smooth) / (2**d * apart + common + smooth)
                    for common in agreements for d in range(depth))
        similarities.append(total / (2 * depth))
    return similarities


class FractalAttention(nn.Module):
    """FracTAL attention (Diakogiannis 2021): what x (B, c, H, W) should be multiplied
    by after a look at y of the same shape, 1 + gamma * attention, gamma 0 to begin with.

    A query from x, a key and a value from y; the value, weighed by the similarity of query and key
    at each pixel and in each channel (their product, as in Pagano's code; the mean of both in
    Diakogiannis's). heads: groups of the convolutions.
    """

    def __init__(self, c, heads):
        super().__init__()
        self.query, self.key, self.value = [group_conv(c, c, groups=heads) for _ in range(3)]
        self.norm, self.gamma = group_norm(c), nn.Parameter(torch.zeros(1))

    def forward(self, x, y):
        query, key, value = [layer(z).sigmoid() for layer, z in
                             ((self.query, x), (self.key, y), (self.value, y))]
        at_pixel, in_channel = fractal_tanimoto(query, key, 1, (2, 3))
        weight = (at_pixel * in_channel).to(value.dtype)
        # gamma and the 1 are taken into scale and shift of the norm: two maps fewer in memory.
        return F.group_norm(weight * value.square(), self.norm.num_groups,
                            self.gamma * self.norm.weight, 1 + self.gamma * self.norm.bias)


class FractalUnit(nn.Module):
    """Residual block with FracTAL attention (Diakogiannis 2021, figure 4): (B, c, H, W) stays."""

    def __init__(self, c, heads):
        super().__init__()
        self.residual = nn.Sequential(
            group_norm(c), nn.ReLU(inplace=True),
            nn.Conv2d(c, c, 3, padding=1, groups=heads, bias=False),
            group_norm(c), nn.ReLU(inplace=True), nn.Conv2d(c, c, 3, padding=1, groups=heads))
        self.attention = FractalAttention(c, heads)

    def forward(self, x):
        return (x + self.residual(x)) * self.attention(x, x)


class Fusion(nn.Module):
    """Two maps (B, c_in, H, W), each emphasised after a look at the other, as one (B, c_out, H, W)
    (Diakogiannis 2021)."""

    def __init__(self, c_in, c_out, heads):
        super().__init__()
        self.attention_a, self.attention_b = [FractalAttention(c_in, heads) for _ in range(2)]
        self.merge = conv_block((2 * c_in, c_out), norm="group", groups=heads)

    def forward(self, a, b):
        return self.merge(torch.cat([a * self.attention_a(a, b), b * self.attention_b(b, a)], 1))


class CEECUnit(nn.Module):
    """Compress-expand, expand-compress (Diakogiannis 2021, V2): (B, c, H, W) stays.

    One branch looks at the input at half the resolution, the other at twice; each is emphasised
    after a look at the other, and both are added to the input.
    """

    def __init__(self, c, heads):
        super().__init__()
        half, quarter = c // 2, c // 4
        block = partial(conv_block, norm="group", groups=heads)
        self.enter_ce, self.enter_ec = [group_conv(c, half, groups=heads) for _ in range(2)]
        self.compress_ce = nn.Sequential(block((half, c), stride=2), block((c, c)))
        self.expand_ce, self.skip_ce = block((c, half)), block((half, half))
        self.fuse_ce = Fusion(half, half, heads)
        self.expand_ec = block((half, quarter, quarter))
        self.compress_ec = block((quarter, half), stride=2)
        self.fuse_ec = Fusion(half, half, heads)
        self.attention = FractalAttention(c, heads)
        self.attention_ce, self.attention_ec = [FractalAttention(half, heads) for _ in range(2)]
        self.collect = Fusion(half, c, 1)

    def forward(self, x):
        H, W = x.shape[-2:]
        ce, ec = self.enter_ce(x), self.enter_ec(x)
        ce = self.fuse_ce(self.expand_ce(bilinear(self.compress_ce(ce), (H, W))), self.skip_ce(ce))
        ec = self.fuse_ec(self.compress_ec(self.expand_ec(bilinear(ec, (2 * H, 2 * W)))), ec)
        both = self.collect(ce * self.attention_ce(ce, ec), ec * self.attention_ec(ec, ce))
        return (x + both) * self.attention(x, x)


class PSPPooling(nn.Module):
    """Pyramid scene pooling (Zhao 2017; Diakogiannis 2021): (B, c_in, H, W) -> (B, c, H, W).

    The maxima of the whole image and of its 2 x 2, 4 x 4 and 8 x 8 parts, each narrowed to c
    filters, join the input. Sides that 8 does not divide have parts that overlap.
    """

    def __init__(self, c_in, c):
        super().__init__()
        self.parts = nn.ModuleList(group_conv(c_in, c, kernel=1, padding=0) for _ in range(4))
        self.project = group_conv(c_in + 4 * c, c, kernel=1, padding=0)

    def forward(self, x):
        size = x.shape[-2:]
        pooled = [F.interpolate(part(F.adaptive_max_pool2d(x, 2**level)), size=size)
                  for level, part in enumerate(self.parts)]
        return self.project(torch.cat([x, *pooled], dim=1))


class FractalNet(nn.Module):
    """FracTALResNet and CEECNet (Diakogiannis 2021, doi:10.3390/rs13183707): a U-Net of attention
    units with heads for segmentation, boundary and distance.

    (B, in_channels, H, W) -> logits (B, out_channels, H, W) of the segmentation, sides multiples of
    32 (of 256, or the pyramid's parts overlap). forward(x, heads=True) returns the logits of the
    segmentation, of the boundary of each class and of the distance to it, whose probabilities are
    sigmoids. The segmentation head sees the other two. unit: (channels, heads) -> module; width:
    filters of the first level, 32 by default, a multiple of 8, doubling with each of six.
    """

    dims, stride, offset, margin = 2, 32, 0, 0
    global_context = True               # prediction in tiles of the size trained on

    def __init__(self, in_channels, out_channels, width, unit):
        super().__init__()
        w = width or 32
        if w % 8:
            raise InputError(f"--width {w}: fractalresnet and ceecnet take multiples of 8")
        widths = [w * 2**level for level in range(6)]
        narrow = dict(norm="group", kernel=1, padding=0)
        self.first = conv_block((in_channels, w), **narrow)[:-1]
        self.encoder = nn.ModuleList(unit(c, c // 8) for c in widths)
        self.down = nn.ModuleList(group_conv(c, 2 * c, stride=2) for c in widths[:-1])
        self.middle = PSPPooling(widths[-1], widths[-1])
        self.up = nn.ModuleList(conv_block((2 * c, c), **narrow) for c in widths[-2::-1])
        self.join = nn.ModuleList(conv_block((2 * c, c), **narrow)[:-1] for c in widths[-2::-1])
        self.decoder = nn.ModuleList(unit(c, c // 4) for c in widths[-2::-1])
        self.pyramid = PSPPooling(2 * w, w)
        self.distance, self.boundary, self.segmentation = [
            nn.Sequential(conv_block((2 * w, w, w), norm="group"), nn.Conv2d(w, out_channels, 1))
            for _ in range(3)]
        self.from_distance, self.from_boundary = [
            conv_block((out_channels, w), **narrow) for _ in range(2)]
        self.balance = conv_block((2 * w, w), **narrow)
        self.crispness = nn.Parameter(torch.ones(1))

    def forward(self, x, heads=False):
        first = x = self.first(x)
        skips = []
        for level, unit in enumerate(self.encoder):
            x = unit(self.down[level - 1](x) if level else x)
            skips.append(x)
        skips.pop()
        x = F.relu(self.middle(x))
        for up, join, unit in zip(self.up, self.join, self.decoder):
            x = torch.cat([up(F.interpolate(x, scale_factor=2)), skips.pop()], dim=1)
            x = unit(join(x))
        x = torch.cat([first, x], dim=1)
        pyramid = F.relu(self.pyramid(x))
        distance = self.distance(x)
        seen = self.from_distance(distance.sigmoid())
        boundary = self.boundary(torch.cat([pyramid, seen], dim=1))
        boundary = boundary / (0.01 + self.crispness.sigmoid())
        seen = self.balance(torch.cat([self.from_boundary(boundary.sigmoid()), seen], dim=1))
        segmentation = self.segmentation(torch.cat([seen, pyramid], dim=1))
        return [segmentation, boundary, distance] if heads else segmentation

    def combine(self, heads):
        return heads[0]


def FracTALResNet(in_channels, out_channels, width=None):
    """FractalNet of residual units: 18,199,919 parameters at 1 input and 1 output channel."""
    return FractalNet(in_channels, out_channels, width, FractalUnit)


def CEECNet(in_channels, out_channels, width=None):
    """FractalNet of CEEC units (V2): 58,964,079 parameters at 1 input and 1 output channel."""
    return FractalNet(in_channels, out_channels, width, CEECUnit)


def transformer_initialization(module):
    """Gaussian weights of deviation 0.02 in linear layers, no bias (Liu 2021, authors' code)."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def mlp(dim):
    """Two linear layers with four times the width between them: (..., dim) -> (..., dim)."""
    return nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))


def split_windows(x, side):
    """(B, H, W, C) -> (B, H / side, W / side, side, side, C), without a copy."""
    return x.unflatten(1, (-1, side)).unflatten(3, (-1, side)).transpose(2, 3)


class SelfAttention(nn.Module):
    """Attention of tokens (B, N, dim) to each other (Vaswani 2017, section 3.2); bias, which
    broadcasts to (B, heads, N, N), is added to the scores."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.project = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, bias=None):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)         # (B, heads, N, d)
        return self.project(x.transpose(1, 2).flatten(2))


class SwinBlock(nn.Module):
    """Attention within windows of 7 x 7, then an MLP (Liu 2021, eqs. 3, 4): (B, H, W, dim), as out.

    shifted: windows begin 3 down and right; the map is rolled for it, and tokens that came together
    only by that ignore each other. relative_bias: what is added to the score of two tokens, for
    each of 13 x 13 offsets and each head. Maps are filled up to multiples of 7 with zeros, which
    take part like any other token, as in the authors' code. drop: share of samples that skip each
    of the two residuals in training (stochastic depth, Huang 2016).
    """

    def __init__(self, dim, heads, shifted=False, drop=0.0):
        super().__init__()
        self.side, self.shift, self.drop = 7, 3 if shifted else 0, drop
        self.norm_attention, self.attention = nn.LayerNorm(dim), SelfAttention(dim, heads)
        self.relative_bias = nn.Parameter(torch.empty((2 * self.side - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_bias, std=0.02)
        self.norm_mlp, self.mlp = nn.LayerNorm(dim), mlp(dim)

    def forward(self, x):
        # Samples stand where dropout3d expects the channels of one volume, which it drops whole.
        x = x + F.dropout3d(self.attend(self.norm_attention(x)), self.drop, self.training)
        return x + F.dropout3d(self.mlp(self.norm_mlp(x)), self.drop, self.training)

    def attend(self, x):
        (B, H, W, _), side, shift = x.shape, self.side, self.shift
        x = F.pad(x, (0, 0, 0, -W % side, 0, -H % side))
        bias = self.score_bias()
        if shift:
            row, column = [torch.arange(n, device=x.device) >= n - shift for n in x.shape[1:3]]
            region = (2 * row[:, None] + column)[None, ..., None]       # wrapped around, or not
            region = split_windows(region, side).reshape(-1, 1, side**2)
            apart = region[..., None] != region[..., None, :]
            bias = bias.masked_fill(apart, -torch.inf)                      # (windows, heads, N, N)
            bias = bias.expand(B, -1, -1, -1, -1).flatten(0, 1)
            x = x.roll((-shift, -shift), (1, 2))
        x = split_windows(x, side)                                          # (B, h, w, 7, 7, dim)
        x = self.attention(x.flatten(3, 4).flatten(0, 2), bias).view(x.shape)
        x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)                   # (B, 7 h, 7 w, dim)
        if shift:
            x = x.roll((shift, shift), (1, 2))
        return x[:, :H, :W]

    def score_bias(self):
        """(1, heads, N, N): entry [.., i, j] is that of token i's place less token j's."""
        n = self.side
        table = self.relative_bias.view(2 * n - 1, 2 * n - 1, -1)
        # Key (k, l) of query (i, j) at [i, j, :, n - 1 - k, n - 1 - l]: an index needs no buffer.
        bias = table.unfold(0, n, 1).unfold(1, n, 1).flip(3, 4)
        return bias.permute(2, 0, 1, 3, 4).reshape(1, -1, n * n, n * n)


class PatchMerging(nn.Module):
    """(B, H, W, dim) -> (B, H / 2, W / 2, 2 dim): a linear map of 2 x 2 tokens (Liu 2021)."""

    def __init__(self, dim):
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x):
        return self.reduce(self.norm(split_windows(x, 2).flatten(3)))


class Swin(nn.Module):
    """Swin Transformer (Liu 2021) without its classifier: (B, in_channels, H, W) -> a list of
    (B, width * 2^i, H / (4 * 2^i), W / (4 * 2^i)), each normalised.

    depths: blocks of each level, every second one shifted; heads: of the first level, doubling as
    width does; drop: that of the last block, growing from 0.
    """

    def __init__(self, in_channels, width, depths, heads, drop):
        super().__init__()
        self.embed = nn.Conv2d(in_channels, width, 4, stride=4)
        self.norm_embed = nn.LayerNorm(width)
        drops = iter(np.linspace(0, drop, sum(depths)).tolist())
        self.stages, self.norms = nn.ModuleList(), nn.ModuleList()
        for level, depth in enumerate(depths):
            dim = width * 2**level
            merging = [PatchMerging(dim // 2)] if level else []
            blocks = [SwinBlock(dim, heads * 2**level, i % 2 == 1, next(drops))
                      for i in range(depth)]
            self.stages.append(nn.Sequential(*merging, *blocks))
            self.norms.append(nn.LayerNorm(dim))

    def forward(self, x):
        x = self.norm_embed(self.embed(x).permute(0, 2, 3, 1))              # (B, H / 4, W / 4, C)
        outputs = []
        for stage, norm in zip(self.stages, self.norms):
            x = stage(x)
            outputs.append(norm(x).permute(0, 3, 1, 2))
        return outputs


class FPNT(nn.Module):
    """Feature pyramid of Swin blocks (Bousselham 2022): maps (B, C_i, H_i, W_i), each half as large
    as the one before -> list of (B, H_i, W_i, dim).

    As in Pagano 2023's code, whose parameters these are, BatchNorm and ReLU follow the 1x1
    convolutions, not in the original. That code also pads them, which moves every level; not here.
    """

    def __init__(self, widths, dim, heads):
        super().__init__()
        self.lateral = nn.ModuleList(conv_block((c, dim), kernel=1, padding=0) for c in widths)
        self.blocks = nn.ModuleList(SwinBlock(dim, heads) for _ in widths)

    def forward(self, maps):
        laterals = [lateral(x) for lateral, x in zip(self.lateral, maps)]
        for level in reversed(range(len(laterals) - 1)):
            laterals[level] = laterals[level] + F.interpolate(laterals[level + 1], scale_factor=2)
        return [block(x.permute(0, 2, 3, 1)) for block, x in zip(self.blocks, laterals)]


class ClassAttention(nn.Module):
    """Attention of L queries (B, L, dim) to features (B, N, dim) (Vaswani 2017, section 3.2).

    The projections of keys and values are applied to the few queries instead of the many features:
    q . (K f) = (K' q) . f, and the mean of V f is V times the mean of f. A bias of the keys would
    change all scores of a query alike; it is counted as in the paper and has no effect.
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.query, self.project = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)

    def forward(self, queries, features):
        key, value = self.key_value.weight.unflatten(0, (2, self.heads, -1))    # (heads, d, dim)
        q = self.query(queries).unflatten(2, (self.heads, -1))
        q = torch.einsum("blhd,hdc->blhc", q, key).flatten(1, 2)                # (B, L heads, dim)
        x = F.scaled_dot_product_attention(q, features, features, scale=key.shape[1] ** -0.5)
        x = torch.einsum("blhc,hdc->blhd", x.unflatten(1, (-1, self.heads)), value)
        return self.project(x.flatten(2) + self.key_value.bias.chunk(2)[1])


class LearnerBlock(nn.Module):
    """Queries (B, L, dim) attend to features (B, N, dim), then to each other, then pass an MLP;
    each step is a residual of the normalised queries (Bousselham 2022, authors' code)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm_cross, self.cross = nn.LayerNorm(dim), ClassAttention(dim, heads)
        self.norm_attention, self.attention = nn.LayerNorm(dim), SelfAttention(dim, heads)
        self.norm_mlp, self.mlp = nn.LayerNorm(dim), mlp(dim)

    def forward(self, queries, features):
        queries = queries + self.cross(self.norm_cross(queries), features)
        queries = queries + self.attention(self.norm_attention(queries))
        return queries + self.mlp(self.norm_mlp(queries))


class Learner(nn.Module):
    """Logits (B, classes, H, W) of features (B, H, W, dim): their product with one embedding of
    each class, which blocks of attention make of a learnt query and the features."""

    def __init__(self, dim, heads, depth, classes):
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(classes, dim))
        self.norm_features, self.norm_queries = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(LearnerBlock(dim, heads) for _ in range(depth))

    def forward(self, x):
        B, H, W, _ = x.shape
        features = self.norm_features(x).flatten(1, 2)
        queries = self.queries.expand(B, -1, -1)
        for block in self.blocks:
            queries = block(queries, features)
        return (self.norm_queries(queries) @ features.transpose(1, 2)).unflatten(2, (H, W))


class SenFormer(nn.Module):
    """SenFormer (Bousselham 2022) on Swin-Small (Liu 2021): 163,100,906 parameters (1 in, 1 out).

    (B, in_channels, H, W) -> logits (B, out_channels, H, W) of the mean of the probabilities of
    four learners, one for each level of the feature pyramid. forward(x, heads=True) returns the
    logits of each learner, a list. width: filters of the first level, 96 by default, with one
    attention head for each 32; the pyramid has 16 / 3 as many and 8 heads. Trained from scratch
    with stochastic depth of up to 0.2 in the backbone, both as in the code of Pagano 2023.
    """

    dims, stride, offset, margin = 2, 32, 0, 0
    global_context = True               # prediction in tiles of the size trained on

    def __init__(self, in_channels, out_channels, width=None):
        super().__init__()
        w = width or 96
        heads = math.gcd(w, max(w // 32, 1))
        dim = 8 * max(round(w * 64 / 96), 1)
        self.backbone = Swin(in_channels, w, (2, 2, 18, 2), heads, drop=0.2)
        self.pyramid = FPNT([w, 2 * w, 4 * w, 8 * w], dim, 8)
        self.learners = nn.ModuleList(Learner(dim, 8, 6, out_channels) for _ in range(4))
        self.apply(transformer_initialization)

    def forward(self, x, heads=False):
        levels = self.pyramid(self.backbone(x))
        logits = [bilinear(learner(level), x.shape[-2:])
                  for learner, level in zip(self.learners, levels)]
        return logits if heads else self.combine(logits)

    def combine(self, heads):
        return mean_logits(heads)


NETWORKS = {"unet": UNet, "resunet": ResUNet, "unet5": UNet5, "fcn8s": FCN8s, "segnet": SegNet,
            "deeplabv3plus": DeepLabV3Plus, "deeplab-resnet101": DeepLabResNet101,
            "deeplab-drn": DeepLabDRN, "unet++": UNetPlusPlus, "unet++3": UNetPlusPlus3,
            "fractalresnet": FracTALResNet, "ceecnet": CEECNet, "senformer": SenFormer}
NETWORKS_3D = {"unet3d": UNet3D}


def count_parameters(network):
    """Trainable parameters of a module."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def channels_last(network):
    """The network, its 2D and 3D kernels in the channels-last memory format."""
    for parameter in network.parameters():
        if parameter.dim() > 3:
            format = torch.channels_last if parameter.dim() == 4 else torch.channels_last_3d
            parameter.data = parameter.data.to(memory_format=format)
    return network


def glorot_initialization(module, kinds=(nn.Conv2d,)):
    """Uniform weights of variance 2 / (inputs + outputs of a neuron), no bias (Glorot 2010), with
    which Keras begins a convolution; kinds: the layers to treat so."""
    if isinstance(module, kinds) and not isinstance(module, LearnedUp):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# ==================================================================================================
# Losses: logits (B, C, H, W) or (B, C, Z, H, W), label (B, ...) int64 with IGNORE; scalars
# ==================================================================================================


def probabilities(logits):
    """float32 probabilities of (B, C, ...) logits: sigmoid for one channel, else softmax."""
    logits = logits.float()
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(dim=1)


def class_ids(prob, threshold=0.5):
    """Class ids (B, ...) int64 of probabilities (B, C, ...): threshold one channel, else argmax
    (through max, which on a CPU is five times faster)."""
    return (prob[:, 0] > threshold).long() if prob.shape[1] == 1 else prob.max(dim=1).indices


def mean_logits(heads):
    """The logits (B, C, ...) whose probabilities are the mean of those of several logits, a list:
    stable, float32; a single one is returned as it is."""
    if len(heads) == 1:
        return heads[0]
    stacked = torch.stack(heads).float()
    if stacked.shape[2] == 1:
        return F.logsigmoid(stacked).logsumexp(0) - F.logsigmoid(-stacked).logsumexp(0)
    return stacked.log_softmax(2).logsumexp(0) - math.log(len(heads))


def soft_dice_loss(logits, label, squared=False, smooth=1e-5):
    """1 - soft Dice, summed over the whole batch for each foreground class, then averaged.

    Dice = (2 sum p y + smooth) / (sum p + sum y + smooth); with squared=True the denominator is
    sum p^2 + sum y^2 (Milletari 2016; Pagano 2023, authors' code). IGNORE voxels count nowhere.
    """
    prob, valid = probabilities(logits), (label != IGNORE)[:, None]
    if prob.shape[1] > 1:
        prob = prob[:, 1:]                                              # (B, C - 1, ...)
    classes = torch.arange(1, prob.shape[1] + 1, device=label.device)
    classes = classes.view(1, -1, *[1] * (label.dim() - 1))
    target = (label[:, None] == classes).float()
    prob = prob * valid
    dims = [d for d in range(prob.dim()) if d != 1]
    overlap = (prob * target).sum(dims)
    total = (prob.square() if squared else prob).sum(dims) + target.sum(dims)
    return (1 - (2 * overlap + smooth) / (total + smooth)).mean()


def cross_entropy(logits, label, weight=None):
    """Mean cross entropy over annotated voxels: binary for one channel, else categorical.

    weight: (B, ...) factors, or None. Computed from logits (log-sum-exp), stable for p near 0.
    A batch without an annotated voxel gives 0, not NaN.
    """
    valid = label != IGNORE
    target = label.masked_fill(~valid, 0)
    if logits.shape[1] == 1:
        loss = F.binary_cross_entropy_with_logits(
            logits[:, 0].float(), target.float(), reduction="none")
    else:
        loss = F.cross_entropy(logits.float(), target, reduction="none")
    weight = valid.float() if weight is None else torch.where(valid, weight, 0.0)
    return (loss * weight).sum() / valid.sum().clamp(min=1)


# ==================================================================================================
# Inference: slices, their neighbours or 3D windows; blended tiles, eight views, slab by slab
# ==================================================================================================

MAX_TILE = 1152             # longer slice sides are predicted in overlapping tiles
OVERLAP = 96                # pixels that tiles share: a U-Net of 4 levels sees up to 51 around


def network_side(network, side):
    """The smallest side >= `side` that the network predicts (its margin already taken off)."""
    return side + (network.offset - side - 2 * network.margin) % network.stride


def check_patch_size(network, patch_size, name):
    """Raise InputError, naming the nearest sides that fit, for sides the network cannot take."""
    given, margins = f"--patch-size {format_shape(patch_size)}: {name}", 2 * network.margin
    if len(patch_size) != network.dims:
        sides = "two sides, Y X" if network.dims == 2 else "three sides, Z Y X"
        raise InputError(f"{given} takes {sides}")
    if network.dims == 3 and patch_size[0] < network.min_depth:
        raise InputError(f"{given} needs {network.min_depth} slices or more")
    for side in patch_size[-2:]:
        fits = network_side(network, max(1, side - margins)) + margins
        if side != fits:
            near = [str(n) for n in (fits - network.stride, fits) if n > margins]
            raise InputError(f"{given} takes sides of {network.offset} + a multiple of "
                             f"{network.stride}; nearest to {side}: {' or '.join(near)}")


def tile_side(side, grid):
    """Side of the fewest tiles up to MAX_TILE that cover `side`, begin at multiples of `grid` and
    share OVERLAP pixels."""
    count = max(1, math.ceil((side - OVERLAP) / (MAX_TILE - OVERLAP)))
    return min(side, OVERLAP + math.ceil((side - OVERLAP) / count / grid) * grid)


def tiles(side, tile, grid=1, power=2):
    """[(start, weights (tile,) float32)] of the fewest tiles that cover `side`, weights adding up
    to 1 everywhere. Tiles share OVERLAP pixels, a third of a tile at most; starts are evenly spaced
    multiples of `grid`, as is side - tile. Weights are a half-wave of the sine to a power: the
    higher, the less the borders count, where a network sees less."""
    count = 1 + math.ceil((side - tile) / max(1, tile - min(OVERLAP, tile / 3)))
    starts = (np.linspace(0, (side - tile) / grid, count).round() * grid).astype(int)
    window = np.sin(np.pi * (np.arange(tile) + 0.5) / tile) ** power
    places = starts[:, None] + np.arange(tile)
    total = np.bincount(places.ravel(), np.tile(window, count))
    return list(zip(starts.tolist(), torch.from_numpy(window / total[places]).float()))


def predict_slices(network, image, tile=None):
    """Probabilities (B, C, ..., H, W) float32 of network input (B, C', ..., H, W) of any H, W; the
    caller has set network.eval() and torch.inference_mode().

    Sides up to MAX_TILE are predicted whole, longer ones in overlapping tiles, which are blended;
    tile (y, x): their sides, for networks that want those of their crops. Borders are mirrored up
    to a size that the network takes and cut off. Without `tile`, tiles begin at multiples of the
    network's stride: pooled in other groups than in the whole slice, pixels differ everywhere.
    """
    (H, W), margin = image.shape[-2:], network.margin
    grid, power = 1, 2
    if not tile:
        grid, power = network.stride if network.stride > 1 else 32, 6       # 32: of any_size
        tile = tile_side(H, grid), tile_side(W, grid)
    tile_h, tile_w = [network_side(network, min(sides)) for sides in zip((H, W), tile)]
    bottom, right = [max(most - side, (most - side) % grid)
                     for side, most in ((H, tile_h), (W, tile_w))]
    image = mirror_pad(image, margin, bottom + margin, margin, right + margin)
    places = list(itertools.product(tiles(H + bottom, tile_h, grid, power),
                                    tiles(W + right, tile_w, grid, power)))
    at_once = max(1, 2**22 // image[..., :tile_h, :tile_w].numel()) if image.is_cuda else 1
    for i in range(0, len(places), at_once):
        some = places[i : i + at_once]
        prob = probabilities(network(torch.cat([
            image[..., y : y + tile_h + 2 * margin, x : x + tile_w + 2 * margin]
            for (y, _), (x, _) in some])))
        if i == 0:
            total = prob.new_zeros(len(image), *prob.shape[1:-2], H + bottom, W + right)
        for ((y, along_y), (x, along_x)), part in zip(some, prob.chunk(len(some))):
            along_y, along_x = [w.to(part.device, non_blocking=True) for w in (along_y, along_x)]
            weight = along_y[:, None] * along_x
            total[..., y : y + tile_h, x : x + tile_w] += part * weight
    return total[..., :H, :W]


def mirror_pad(image, top, bottom, left, right):
    """Pad (B, C, ..., H, W) by mirroring, or with the border's values where it is too small."""
    H, W = image.shape[-2:]
    fits = max(top, bottom) < H and max(left, right) < W
    sides = (left, right, top, bottom, 0, 0)[: 2 * image.dim() - 4]
    return F.pad(image, sides, mode="reflect" if fits else "replicate")


def eight_views(predict, image):
    """Mean prediction over the eight symmetries of the square: 4 turns x mirrored or not."""
    total = 0
    for turns, mirrored in itertools.product(range(4), ((), (-1,))):
        prob = predict(torch.rot90(image, turns, (-2, -1)).flip(mirrored)).flip(mirrored)
        total = total + torch.rot90(prob, -turns, (-2, -1))
    return total / 8


def slabs(shape, pixels):
    """Slices along z that cut a volume (Z, Y, X) into slabs of about `pixels` pixels."""
    step = max(1, int(pixels // (shape[1] * shape[2])))
    return [slice(z, min(z + step, shape[0])) for z in range(0, shape[0], step)]


class WithContext(LazyArray):
    """A volume whose first and last slices are repeated, so that slice z is the middle one of its
    slices z : z + context."""

    def __init__(self, array, context):
        shape = (len(array) + context - 1, *array.shape[1:])
        super().__init__(array.path, shape, array.dtype, array.voxel_size)
        self.array, self.below = array, context // 2

    def read(self, z, y, x):
        zs = np.clip(np.arange(z.start, z.stop) - self.below, 0, len(self.array) - 1)
        return self.array.read(slice(zs[0], zs[-1] + 1), y, x)[zs - zs[0]]


def predict_by_slabs(predict, image, shape, context=1, pixels=2**20, rank=0, world=1):
    """Yield (slab, probabilities (n, C, H, W)) of a network that sees `context` slices at a time.

    predict: uint8 tensor (n + context - 1, H, W) -> probabilities of the n middle slices.
    shape: of the volume whose slabs are wanted. Where it has another number of slices than the
    image (see Resized), the two nearest predictions are interpolated.
    """
    low, high, share = resampling(len(image), shape[0])
    pixels = pixels * min(1.0, math.prod(shape) / math.prod(image.shape))
    padded = WithContext(image, context)
    for slab in slabs(shape, pixels)[rank::world]:
        first, last = low[slab.start], high[slab.stop - 1]
        prob = predict(torch.from_numpy(padded[first : last + context]))
        if len(image) != shape[0]:
            above = torch.from_numpy(share[slab]).to(prob.device).view(-1, 1, 1, 1)
            prob = torch.lerp(prob[low[slab] - first], prob[high[slab] - first], above)
        yield slab, prob


def predict_by_windows(predict, image, depth, rank=0, world=1):
    """Yield (slab, probabilities (n, C, H, W)) of a 3D network, blended along z.

    predict: uint8 tensor (depth, H, W) -> (depth, C, H, W); a volume with fewer slices is one
    window. Ranks share the windows in equal parts; each also predicts those before that reach into
    its own slices.
    """
    depth = min(depth, len(image))
    windows = tiles(len(image), depth)
    starts = [*(start for start, _ in windows), len(image)]
    begin, stop = [starts[r * len(windows) // world] for r in (rank, rank + 1)]
    rest = None                                 # what the windows so far add to the next ones
    for (start, weight), end in zip(windows, starts[1:]):
        if begin < start + depth and start < stop:
            prob = predict(torch.from_numpy(image[start : start + depth]))
            prob = prob * weight.to(prob.device, non_blocking=True).view(-1, 1, 1, 1)
            if rest is not None:
                prob[: len(rest)] += rest
            if start >= begin:
                yield slice(start, end), prob[: end - start]
            rest = prob[end - start :].clone()


def predict_volume(stream, writer, decide, shape, progress, downsample=1, probability=None):
    """Write a stream of predictions: memory depends on its slabs, not on the volume.

    stream: yields (slab, probabilities (n, C, H, W)), which are enlarged linearly by `downsample`
    and cut; where that is 1, to (Y, X). shape: of the prediction (Z, Y, X). writer: a VolumeWriter;
    decide: probabilities (1, C, Y, X) -> class ids (1, Y, X); probability: a VolumeWriter of (Z, Y,
    X) or (Z, C, Y, X). progress: called with the slices done and the slices of the volume.
    """
    Y, X = shape[1:]

    def write(slab, prob):
        sides = (Y, X) if downsample == 1 else tuple(side * downsample for side in prob.shape[2:])
        ids = []                # on the device: a copy would wait for the next slab's prediction
        for z, large in enumerate(prob.split(1), slab.start):
            if large.shape[2:] != sides:            # channels last: three times faster on a CPU
                large = bilinear(large.contiguous(memory_format=torch.channels_last), sides)
            large = large[..., :Y, :X]
            ids.append(decide(large).to(torch.uint8))
            if probability is not None:
                probability[z : z + 1] = large.squeeze(1).cpu().numpy()
        writer[slab] = torch.cat(ids).cpu().numpy()
        progress(slab.stop, shape[0])

    with ThreadPoolExecutor(1) as pool:             # writes a slab while the next is predicted
        writing = pool.submit(lambda: None)         # nothing yet
        for slab, prob in stream:
            writing.result()
            writing = pool.submit(write, slab, prob)
        writing.result()


# ==================================================================================================
# Metrics: streaming confusion counts and the scores that follow from them
# ==================================================================================================


def confusion(pred, label, n_classes):
    """Confusion counts of slices: int64 (Z, n_classes, n_classes), [z, truth, prediction].

    pred, label: uint8 (Z, Y, X), label with IGNORE, which is counted nowhere.
    """
    counts = np.zeros((len(label), n_classes, n_classes), dtype=np.int64)
    kind = np.uint8 if n_classes <= 15 else np.uint16   # one byte is counted faster
    for z, (p, l) in enumerate(zip(pred, label)):
        pair = l.astype(kind) * kind(n_classes) + p     # IGNORE makes more than all others: cut
        counts[z] = _count_values(pair)[: n_classes**2].reshape(n_classes, n_classes)
    return counts


def _ratio(numerator, denominator):
    """numerator / denominator as arrays, NaN where the denominator is 0."""
    return np.divide(numerator, denominator, where=denominator > 0,
                     out=np.full(np.shape(denominator), np.nan))


def _nanmean(values, axis=None):
    """Mean of what is not NaN; NaN, without a warning, where nothing is left."""
    valid = ~np.isnan(values)
    return _ratio(np.where(valid, values, 0).sum(axis), valid.sum(axis))


def scores(counts, classes, organelles=None):
    """Scores of one volume from the counts (Z, K, K) of `confusion`: the block of metrics.json.

    Per foreground class: Dice, IoU, precision, recall over the whole volume (3D); dice_slices, the
    mean of the 2D Dice of the slices, where a slice without the class in truth and prediction
    counts 1; the two `nonempty` variants leave out slices without the class in the truth
    (Pagano 2023). dice and iou: means over foreground classes; miou: over all classes; accuracy;
    miou_org: mean IoU over the classes `organelles` (ids), where they are given (Guay 2021).
    Undefined values are None: of a class in neither, the precision of one predicted nowhere.
    """
    tp = np.diagonal(counts, axis1=1, axis2=2).astype(float)                # (Z, K)
    truth, pred = counts.sum(2), counts.sum(1)                              # (Z, K)
    scored = counts.sum((1, 2)) > 0                                         # slices with any voxel
    nonempty = truth > 0
    dice_slice = dice_of_slices(counts)
    dice_slice_all = np.where(np.isnan(dice_slice) & scored[:, None], 1.0, dice_slice)
    TP, T, P = tp.sum(0), truth.sum(0), pred.sum(0)
    values = {
        "dice": _ratio(2 * TP, T + P), "iou": _ratio(TP, T + P - TP),
        "precision": _ratio(TP, P), "recall": _ratio(TP, T), "tp": TP, "fp": P - TP, "fn": T - TP,
        "dice_slices": _nanmean(dice_slice_all, 0),
        "dice_nonempty": _ratio(2 * (tp * nonempty).sum(0), ((truth + pred) * nonempty).sum(0)),
        "dice_slices_nonempty": _nanmean(np.where(nonempty, dice_slice, np.nan), 0),
    }
    per_class = {name: {key: _plain(value[k], count=key in ("tp", "fp", "fn"))
                        for key, value in values.items()}
                 for k, name in enumerate(classes) if k > 0}
    result = {
        "per_class": per_class,
        "dice": _plain(_nanmean(values["dice"][1:])), "iou": _plain(_nanmean(values["iou"][1:])),
        "miou": _plain(_nanmean(values["iou"])), "accuracy": _plain(_ratio(TP.sum(), T.sum())),
    }
    if organelles:
        result["miou_org"] = _plain(_nanmean(values["iou"][list(organelles)]))
    return result


def _plain(value, count=False):
    """A number as JSON takes it: None for NaN."""
    return None if np.isnan(value) else int(value) if count else float(value)


def mean_scores(volumes):
    """Mean of the `scores` of several volumes; undefined values are left out of each mean."""
    def mean(values):
        return _plain(_nanmean(np.array(values, dtype=float)))

    names = volumes[0]["per_class"]
    per_class = {name: {key: mean([v["per_class"][name][key] for v in volumes])
                        for key in volumes[0]["per_class"][name]} for name in names}
    return {"per_class": per_class,
            **{key: mean([v[key] for v in volumes]) for key in volumes[0]
               if key in ("dice", "iou", "miou", "miou_org", "accuracy")}}


def dice_of_slices(counts):
    """2D Dice (Z, K) of each slice and class from confusion counts (Z, K, K); NaN where the class
    is in neither truth nor prediction."""
    tp = np.diagonal(counts, axis1=1, axis2=2)
    return _ratio(2.0 * tp, counts.sum(1) + counts.sum(2))


def confusion_volume(prediction, label, classes, pixels=2**24):
    """Confusion counts (Z, K, K) of two lazy volumes of class ids of one shape, slab by slab."""
    return np.concatenate([
        confusion(prediction[slab].astype(np.uint8), label[slab], len(classes))
        for slab in slabs(label.shape, pixels)])


def volume_scores(counts, label, classes, organelles=None):
    """`scores` of confusion counts (Z, K, K), with the voxels of the label, those ignored, the
    slices that count, and the 2D Dice of each: {class name: [...]}, None where it is undefined."""
    voxels, dice = math.prod(label.shape), dice_of_slices(counts)
    return {"voxels": voxels, "ignored": voxels - int(counts.sum()),
            "slices": np.flatnonzero(counts.any((1, 2))).tolist(),
            **scores(counts, classes, organelles),
            "dice_of_slices": {name: [_plain(value) for value in dice[:, k]]
                               for k, name in enumerate(classes) if k > 0}}


# ==================================================================================================
# Figures
# ==================================================================================================

# Colour-blind-safe class colours (Okabe & Ito 2008); errors: TP green, FN red, FP blue.
CLASS_COLORS = ["#e69f00", "#cc79a7", "#f0e442", "#56b4e9", "#d55e00", "#009e73", "#0072b2"]
ERROR_COLORS = {"true positive": "#2ca02c", "false negative": "#d62728",
                "false positive": "#1f77b4"}
VIEWS = ((0, 0), (-30, 60), (-120, 60))     # degrees: a turn about z, then a tilt to the eye


def new_figure(dpi=120, **options):
    """A matplotlib figure that needs no screen and no global state."""
    import matplotlib.figure
    return matplotlib.figure.Figure(layout="constrained", dpi=dpi, **options)


def save_figure(figure, path):
    """Write a figure as a PNG file that is always whole; see replacing."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", bbox_inches="tight")


def overlay(image, ids, colors=CLASS_COLORS, opacity=0.45):
    """RGB float (Y, X, 3) of a grey uint8 image (Y, X) with ids 1, 2, … coloured and outlined."""
    import matplotlib.colors
    rgb = np.repeat(image[..., None] / 255.0, 3, axis=2)
    for k in np.setdiff1d(ids, [0, IGNORE]):
        mask, color = ids == k, np.array(matplotlib.colors.to_rgb(colors[(k - 1) % len(colors)]))
        rgb[mask] = (1 - opacity) * rgb[mask] + opacity * color
        rgb[mask & ~ndimage.binary_erosion(mask, border_value=1)] = color
    return rgb


def error_overlay(image, label, pred):
    """The image with true positives green, false negatives red, false positives blue.

    A foreground voxel given another foreground class counts as a false negative.
    """
    errors = np.select([label == IGNORE, label == 0, label == pred], [0, 3 * (pred > 0), 1], 2)
    return overlay(image, errors, [*ERROR_COLORS.values()])


def save_slices(path, items, classes, maps=False, rows=4, max_side=768):
    """figure.png: slices as image | truth | prediction | errors, without truth image | prediction;
    with maps, maps.png: image | truth | prediction as colours on black, what is ignored grey.

    items: list of (name, image or None, label or None, {stage: prediction}, Dice (Z, K) or None),
    lazy volumes, Dice see dice_of_slices. The rows are shared among them: the annotated slices with
    the lowest mean Dice, worst first; without Dice, slices at even distances. Without an image,
    paper is white.
    """
    from matplotlib.patches import Patch
    panels = []
    for name, image, label, predictions, dice in items:
        like = next(iter(predictions.values())) if image is None else image
        step = math.ceil(max(like.shape[1:]) / max_side)
        for z, score in _slices_to_show(like, label, dice, max(1, rows // len(items))):
            title = f"{name}  {like.slice_name(z)}"
            title += "" if np.isnan(score) else f"  Dice {score:.3f}"
            panels.append((title, like, step, _panels(z, image, label, predictions, step, maps)))
    titles = max((list(shown) for *_, shown in panels), key=len)
    heights = [3.1 * np.clip(like.shape[1] / like.shape[2], 0.2, 1.6) + 0.25
               for _, like, *_ in panels]
    figure = new_figure(figsize=(3.1 * len(titles), sum(heights) + 0.4))
    axes = figure.subplots(len(panels), len(titles), squeeze=False)
    for title, axis in zip(titles, axes[0]):
        axis.set_title(textwrap.fill(title, 28))
    for row, (name, like, step, shown) in zip(axes, panels):
        inset = _inset(shown)
        for axis, title in zip(row, titles):
            axis.set(xticks=[], yticks=[], frame_on=title in shown)
            if title in shown:
                axis.imshow(shown[title], interpolation="antialiased")
            if title in shown and inset:
                zoom = axis.inset_axes((0.55, 0.02, 0.43, 0.43), xticks=[], yticks=[], **inset)
                zoom.imshow(shown[title])
                axis.indicate_inset_zoom(zoom, edgecolor="white", alpha=1)
        name = textwrap.fill(name, 45)
        row[0].text(0.02, 0.97, name, transform=row[0].transAxes, fontsize=7, va="top",
                    color="white", bbox={"color": "black", "alpha": 0.6, "pad": 1.5})
        _scale_bar(row[0], like.voxel_size and like.voxel_size[2] * step)
    colors = dict(zip(classes[1:], itertools.cycle(CLASS_COLORS)))
    colors |= ERROR_COLORS if "truth" in titles and not maps else {}
    figure.legend([Patch(facecolor=color, edgecolor="0.6") for color in colors.values()], colors,
                  loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    save_figure(figure, path)


def _slices_to_show(image, label, dice, count):
    """(z, mean Dice of the foreground or NaN) of the slices to show; see save_slices."""
    zs = np.asarray(label.slices if label is not None else range(len(image)))
    if dice is None:
        even = ((np.arange(count) + 0.25) * len(zs) / count).astype(int)    # none of n=COUNT
        return [(z, np.nan) for z in dict.fromkeys(zs[even])]
    mean = _nanmean(dice[:, 1:], 1)
    return [(z, mean[z]) for z in zs[mean[zs].argsort(kind="stable")][:count]]      # NaN last


def _panels(z, image, label, predictions, step, maps):
    """{title: RGB} of slice z, every step-th pixel; see save_slices."""
    preds = {name: prediction[z][::step, ::step] for name, prediction in predictions.items()}
    grey = (np.full_like([*preds.values()][0], 255, np.uint8) if image is None else
            image[z][::step, ::step])
    shown = {} if image is None else {"image": overlay(grey, 0 * grey)}
    truth = None if label is None else label[z][::step, ::step]
    paint = partial(overlay, grey)
    if maps:
        paint = partial(overlay, 128 * np.uint8(truth == IGNORE) + 0 * grey, opacity=1.0)
    if truth is not None:
        shown["truth"] = paint(truth)
    for name, pred in preds.items():
        if truth is None or maps or len(preds) == 1:
            shown[name] = paint(pred)
        if truth is not None and not maps:
            title = "errors" if len(preds) == 1 else f"{name}: errors"
            shown[title] = error_overlay(grey, truth, pred)
    return shown


def _inset(shown, share=0.03, part=8):
    """Limits (xlim, ylim) of the densest part of a slice's panels (titles -> RGB), an eighth of
    its sides, where less than a share of it is coloured; else None."""
    coloured = np.any([np.ptp(rgb, axis=2) > 0 for rgb in shown.values()], 0)
    if not 0 < coloured.mean() < share:
        return None
    (H, W), (h, w) = coloured.shape, [math.ceil(side / part) for side in coloured.shape]
    dense = ndimage.gaussian_filter(coloured.astype(float), (h / 4, w / 4), mode="constant")
    y, x = np.unravel_index(dense.argmax(), dense.shape)
    y, x = np.clip(y - h // 2, 0, H - h), np.clip(x - w // 2, 0, W - w)
    return {"xlim": (x - 0.5, x + w - 0.5), "ylim": (y + h - 0.5, y - 0.5)}


def _scale_bar(axis, nm):
    """A bar of a round length, about a quarter of the panel wide. nm: of a pixel, or None."""
    if not nm:
        return
    from matplotlib.patheffects import withStroke
    left, right = axis.get_xlim()
    length, x = (right - left) * nm / 4, left + 0.05 * (right - left)
    power = 10 ** math.floor(math.log10(length))
    length = power * max(f for f in (1, 2, 5) if f * power <= length)
    text = f"{length:g} nm" if length < 1000 else f"{length / 1000:g} µm"
    place = {"color": "white", "transform": axis.get_xaxis_transform()}
    axis.plot([x, x + length / nm], [0.06, 0.06], linewidth=2.5, **place,
              path_effects=[withStroke(linewidth=4, foreground="black")])
    axis.text(x, 0.08, text, fontsize=7, va="bottom", **place,
              path_effects=[withStroke(linewidth=2, foreground="black")])


def save_surfaces(path, rows, classes, max_side=200):
    """A picture of structures in 3D as shaded reliefs from three sides, all and each by itself.

    rows: {title: lazy class ids (Z, Y, X)} of one volume, such as its truth and its prediction,
    one below the other, as cubes, max_side along the longest side of the volume.
    """
    shown = {name: [k] for k, name in enumerate(classes[1:])}
    if len(shown) > 1:
        shown = {"all": range(len(shown)), **shown}
    depths = {}
    for title, volume in rows.items():
        ids, side = _cubes(volume, max_side)
        depths[title] = views = [_first_hits(ids, len(classes), view) for view in VIEWS]
    height, widths = max(depth.shape[1] for depth in views), [depth.shape[2] for depth in views]
    panels = list(itertools.product(shown.items(), depths.items()))
    figure = new_figure(figsize=(12, 12 * height / sum(widths) * len(panels)))
    axes = figure.subplots(len(panels), len(VIEWS), squeeze=False, width_ratios=widths)
    for row, ((name, chosen), (title, views)) in zip(axes, panels):
        for axis, depth in zip(row, views):
            colors = [CLASS_COLORS[k % len(CLASS_COLORS)] for k in chosen]
            axis.imshow(_relief(depth[chosen], colors), interpolation="bilinear")
            axis.set_axis_off()
        row[0].set_title(f"{title}: {name}", fontsize=10, loc="left")
        _scale_bar(row[0], side)
    save_figure(figure, path)


def _cubes(volume, max_side):
    """Class ids (Z, Y, X) at the centres of cubes, and the cubes' side in nm or None."""
    size = np.array(volume.voxel_size or (1, 1, 1))
    side = max(min(size), *size * volume.shape / max_side)
    z, y, x = [((np.arange(max(1, round(n * step / side))) + 0.5) * side / step).clip(0, n - 1)
               .astype(int) for n, step in zip(volume.shape, size)]
    return np.stack([volume[i][y][:, x] for i in z]), side if volume.voxel_size else None


def _first_hits(ids, n_classes, view):
    """How near the surface of each foreground class is, float (n_classes - 1, P, Q), in cubes, -inf
    where there is none. view: see VIEWS; slice 0 lies on top, and seen from there slices look as on
    a screen."""
    for angle, axes in zip(view, ((2, 1), (1, 0))):
        ids = ndimage.rotate(ids, angle, axes, order=0)
    hits = ids == np.arange(1, n_classes)[:, None, None, None]
    depth = np.where(hits.any(1), -hits.argmax(1), -np.inf)
    return ndimage.maximum_filter(depth, (1, 2, 2))         # turned sheets have pinholes


def _relief(depth, colors):
    """RGB (P, Q, 3) of the nearest surfaces in a Z-buffer (K, P, Q), lit from the upper left."""
    import matplotlib.colors
    nearest = depth.max(0)
    hit = np.isfinite(nearest)
    weight = ndimage.gaussian_filter(hit.astype(np.float32), 1)
    smooth = ndimage.gaussian_filter(np.where(hit, nearest, 0), 1) / np.maximum(weight, 1e-6)
    light = matplotlib.colors.LightSource(315, 50).hillshade(np.where(hit, smooth, 0))
    rgb = np.array([matplotlib.colors.to_rgb(color) for color in colors])[depth.argmax(0)]
    alpha = (hit * np.minimum(1, 2 * weight - 0.5))[..., None]          # soft edges
    return 1 - alpha + alpha * rgb * (0.3 + 0.7 * light[..., None])


def save_slice_dice(path, items, classes):
    """slice_dice.png: the 2D Dice of every foreground class against z, a row for each volume, with
    the slices marked that were trained or validated on (Pagano 2023, figure 5).

    items: list of (name, Dice (Z, K), NaN where it is undefined or not scored, marked z, z -> name
    of the slice, see LazyArray.slice_name).
    """
    figure = new_figure(figsize=(9, 2.9 * len(items)))
    rows = figure.subplots(len(items), squeeze=False)[:, 0]
    for axis, (name, dice, marked, slice_name) in zip(rows, items):
        for column, label, color in zip(dice.T[1:], classes[1:], itertools.cycle(CLASS_COLORS)):
            axis.plot(column, ".-", color=color, linewidth=1, label=textwrap.fill(label, 32))
        if len(marked):
            axis.vlines(marked, 0, 1, color="0.4", linewidth=1, linestyle="--",
                        transform=axis.get_xaxis_transform(), label="labelled slices")
        axis.set(title=textwrap.fill(name, 80), ylabel="Dice of the slice",
                 xlim=(-0.5, len(dice) - 0.5))
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
        ticks = [int(z) for z in axis.get_xticks() if 0 <= z < len(dice)]
        axis.set_xticks(ticks, [slice_name(z).replace(" (", "\n(") for z in ticks])
        if axis.get_legend_handles_labels()[1]:
            axis.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)
    save_figure(figure, path)


def save_histogram(path, panels, score):
    """histogram.png: the scores of trained networks, a dot for each, a line for each group (Guay
    2021, figure 4, shows bars; dots also show few networks).

    panels: {title: {name of a group: [value, ...]}}, one below the other; score: its name.
    """
    figure = new_figure(figsize=(7, sum(1.1 + 0.3 * len(groups) for groups in panels.values())))
    for axis, (title, groups) in zip(figure.subplots(len(panels), squeeze=False)[:, 0],
                                     panels.items()):
        for line, values in enumerate(groups.values()):
            axis.plot(values, [line] * len(values), "o", color=CLASS_COLORS[-1], alpha=0.5)
        axis.set_yticks(range(len(groups)), [textwrap.fill(f"{name} ({len(values)})", 40)
                                             for name, values in groups.items()], fontsize=8)
        axis.set(xlabel=score, ylim=(len(groups) - 0.5, -0.5))
        axis.set_title(textwrap.fill(title, 80), fontsize=9)
        axis.grid(alpha=0.3)
    save_figure(figure, path)


def save_curves(path, rows):
    """curves.png: loss terms and validation scores against the epoch, from the rows of log.csv."""
    terms = [key for key in rows[0] if key.startswith("loss_")]     # the total moves with weights
    scores = [key for key in ("val_dice", "val_iou", "val_miou", "val_miou_org") if key in rows[0]]
    groups = {"loss": terms or ["loss"], **({"validation score": scores} if scores else {})}
    figure = new_figure(figsize=(5 * len(groups), 3.5))
    epochs = range(len(rows))
    for axis, (title, keys) in zip(figure.subplots(1, len(groups), squeeze=False)[0],
                                   groups.items()):
        for key in keys:
            axis.plot(epochs, np.array([row[key] for row in rows], float), marker=".", label=key)
        if "cps_weight" in rows[0]:                     # of train_cps.py: the loss has more terms
            axis.fill_between(epochs, [row["cps_weight"] for row in rows], color="0.9",
                              transform=axis.get_xaxis_transform(), label="weight of CPS")
        axis.set(xlabel="epoch", ylabel=title)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    save_figure(figure, path)


# ==================================================================================================
# Runs: command line, data, run folder, checkpoints, progress
# ==================================================================================================

# What a resumed run may be given anew; all else is from its config.json.
OF_THIS_CALL = {"out_dir", "overwrite", "resume", "device", "amp", "compile", "workers"}
# What --checkpoint does not take over from its run, like these.
INPUTS = {"volume", "label", "unlabeled_volume", "val_volume", "val_label", "test_volume",
          "test_label", "voxel_size", "demo", "checkpoint", "init"}
# What may be said with --checkpoint; all else has no effect there.
OF_PREDICTION = OF_THIS_CALL | {"checkpoint", "test_volume", "test_label", "label_map", "tta",
                                "ignore_label", "voxel_size", "save_probability"}
# What --init and train_sparse.py's --coarse take over from another run.
OF_NETWORK = {"model", "width", "average_branches", "patch_size", "downsample", "normalize",
              "classes"}


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The script's docstring as it stands, and the defaults that there are: no (default: None)."""

    def _get_help_string(self, action):
        nothing = action.default in (None, []) or action.default is False
        return action.help if nothing else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def __init__(self, script, doc):
        super().__init__(prog=Path(script).name, description=doc, formatter_class=HelpFormatter,
                         allow_abbrev=False)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind, least, most=1e12):
    """An argparse type: a number of `kind` from least to most."""
    def convert(text):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least:g} and {most:g}")
        return value
    convert.__name__ = kind.__name__
    return convert


def positive(kind):
    """An argparse type: a number of `kind` above zero."""
    return number(kind, 1 if kind is int else 1e-12)


nonnegative, share = number(float, 0), number(float, 0, 1)


def add_label_args(data):
    """The flags on labels, those of evaluate.py, too; data: adds one to its group."""
    data("--label-slices", metavar="S", help="annotated slices: 0:165:5, 0,40,80, n=7 or every=5")
    data("--label-map", metavar="M", help="label value=class id: 191=1,223=2,*=0 or 128:256=1,*=0")
    data("--ignore-label", type=int, metavar="V", help="label value that marks unannotated voxels")
    data("--classes", nargs="+", metavar="NAME", help="class names, background first")
    data("--voxel-size", nargs=3, type=number(float, *PLAUSIBLE_NM), metavar=("Z", "Y", "X"),
         help="voxel size in nm, in place of the files'")


def add_common_args(parser, models, sources):
    """The flags that all scripts share, in the groups data, training and run.

    sources: {flag: a remark for its help}, such as its section in the paper.
    """
    flag = argparse.BooleanOptionalAction
    paths = {"nargs": "+", "metavar": "P", "default": []}
    count = {"type": positive(int), "metavar": "N"}
    data = parser.add_argument_group("data").add_argument
    data("--volume", **paths, help="training volumes: TIFF, MRC, NPY or a folder of slices; "
         "P@z0:z1,y0:y1,x0:x1 crops")
    data("--label", **paths, help="their labels, in the same order")
    add_label_args(data)
    data("--val-volume", **paths, help="volumes that choose best.pt")
    data("--val-label", **paths, help="their labels")
    data("--val-slices", metavar="S", help="annotated slices of --volume kept for validation; n=2 "
         "or every=5: of those that are not among --label-slices, if there are such")
    data("--test-volume", **paths, help="volumes to predict; default: --volume")
    data("--test-label", **paths, help="their labels, for the scores")
    data("--downsample", **count, default=1, help="show the network slices N times smaller in y, x")
    data("--normalize", choices=("zscore", "volume", "equalize"), default="zscore",
         help="grey levels: zero mean and unit variance, of all training slices together or of "
         "each volume by itself; histogram equalisation per slice")
    training = parser.add_argument_group("training").add_argument
    training("--model", choices=sorted(models), help="the network")
    training("--width", **count, help="filters of the first level; default: the paper's")
    training("--epochs", **count, help="rounds of --steps-per-epoch")
    training("--steps-per-epoch", **count, help="optimiser steps per epoch")
    training("--batch-size", **count, help="crops in a step of one process")
    training("--patch-size", **count, nargs="+",
             help="sides Y X of the crops in pixels, after --downsample; Z Y X for a 3D network")
    training("--lr", type=positive(float), metavar="R", help="highest learning rate")
    training("--workers", type=number(int, 0), metavar="N", help="processes that read crops",
             default=4 if torch.cuda.is_available() else 0)
    group = parser.add_argument_group("run")
    run = group.add_argument
    again, kinds = [group.add_mutually_exclusive_group().add_argument for _ in range(2)]
    run("--out-dir", metavar="D", help="run folder; default runs/SCRIPT-MODEL-seedSEED…")
    again("--overwrite", action="store_true", help="replace an earlier run in its folder")
    again("--resume", action="store_true", help="continue an interrupted run in its folder")
    run("--checkpoint", metavar="F", help="a run or its best.pt: only predict --test-volume")
    run("--init", metavar="F", help="a run or its best.pt: start the training from its networks, "
        "with its --model, --width, --downsample, …, after a few slices were corrected, say")
    run("--seed", type=number(int, 0), default=0, metavar="N", help="seed of everything random")
    run("--device", metavar="D", help="cpu, cuda, cuda:1, mps; default: the best there is")
    run("--amp", action=flag, help="mixed precision; default: what the device does well")
    run("--compile", action="store_true", help="torch.compile the networks")
    run("--save-probability", action="store_true", help="also write the probabilities")
    run("--tta", action=flag, default=False, help="average predictions over eight views")
    kinds("--demo", action="store_true", help="synthetic data, minutes on two CPU cores")
    kinds("--quick", action="store_true", help="a first result on own slices of 256 pixels or more "
        "in some two minutes on two CPU cores: a small network, few steps, see the script")
    for action in parser._actions:
        if action.dest in sources:
            action.help += f" ({sources[action.dest]})"


def parse(parser, argv, demo, quick, settings=lambda args: {}, of_prediction=()):
    """Parse the command line: typed arguments win over those of the run that is resumed, predicts
    or is trained on, these over --demo and --quick, and these over the defaults.

    demo, quick: flags that these stand for; settings: args -> defaults that depend on other flags,
    such as those of a model; of_prediction: flags of the script that work with --checkpoint. What
    is typed with --resume must be what the run was started with.
    """
    untyped = []                            # stands for a default; a list: --partial adds to a copy
    defaults = vars(parser.parse_args([]))
    typed = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, untyped))))
    typed = {name: value for name, value in typed.items() if value is not untyped}
    args = argparse.Namespace(**{**defaults, **typed})
    without_effect = sorted(typed.keys() - OF_PREDICTION - {*of_prediction})
    if args.checkpoint and without_effect:
        parser.error(f"{flag_name(without_effect[0])} has no effect with --checkpoint, which only "
                     f"predicts --test-volume; --init trains on from a checkpoint")
    try:
        source = args.checkpoint or args.init or getattr(args, "coarse", None)
        saved = load_checkpoint(source)["args"] if source else {}
        kept = defaults.keys() - OF_THIS_CALL - INPUTS if args.checkpoint else OF_NETWORK
        given = {**(demo if args.demo else quick if args.quick else {}),
                 **{name: saved[name] for name in kept & saved.keys()}, **typed}
        vars(args).update(given)
        vars(args).update({**settings(args), **given})
        kind = "-prediction" if args.checkpoint else "-demo" if args.demo else ""
        args.out_dir = args.out_dir or (
            f"runs/{Path(parser.prog).stem}-{args.model}-seed{args.seed}{kind}")
        begun = read_config(Path(args.out_dir), parser.prog)["args"] if args.resume else {}
    except InputError as error:
        parser.error(str(error))
    for name in begun.keys() - {"out_dir", "overwrite", "resume"} - (OF_THIS_CALL & typed.keys()):
        if typed.get(name, begun[name]) != begun[name]:
            parser.error(f"--resume: {flag_name(name)} was {begun[name]} and is now {typed[name]}; "
                         f"leave it out, or start a new run in another --out-dir")
        setattr(args, name, begun[name])
    if args.demo and {"volume", "label", "test_volume", "test_label"} & typed.keys():
        parser.error("--demo makes its own data; leave --volume and --label out")
    if not (args.volume or args.demo or args.checkpoint or getattr(args, "partial", None)):
        parser.error("--volume and --label name the training data; or try --demo")
    if args.checkpoint and not args.test_volume:
        parser.error("--checkpoint needs --test-volume: the volumes to predict")
    if args.classes and not 1 < len(args.classes) == len({*args.classes}):
        parser.error("--classes needs two names at least, the background's first, all different")
    return args


def flag_name(name):
    """patch_size -> --patch-size."""
    return "--" + name.replace("_", "-")


def format_shape(shape):
    """(110, 768, 1024) -> 110 x 768 x 1024."""
    return " x ".join(str(side) for side in shape)


# -- data ------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Item:
    """A volume of a run: its file, what the network sees of it (lazy uint8), its Labels or None.

    target: the labels at the resolution that the network sees; slices: those of them in which
    anything is annotated.
    """
    volume: Volume
    image: LazyArray
    label: Labels = None
    target: LazyArray = None
    slices: np.ndarray = ()


def open_items(volumes, labels, args, slices=None, **rules):
    """Items of volumes and of their labels; none have labels where these are None.

    The first labels that are opened decide on args.classes, where no names were given. slices: text
    for parse_slices, the annotated slices to use; rules: of open_labels.
    """
    if labels is not None and len(labels) != len(volumes):
        raise InputError(f"{len(volumes)} volumes and {len(labels)} labels "
                         f"({', '.join([*volumes, *labels])}); give one label for each volume")
    items, opened = [], [open_volume(path) for path in volumes]
    for volume in opened:
        volume.voxel_size = tuple(args.voxel_size or ()) or volume.voxel_size
        for z in range(len(volume) if volume.dtype.kind == "f" else 0):     # before hours of work
            if not np.isfinite(volume[z]).all():
                raise InputError(f"{volume.path}: {volume.slice_name(z)} holds NaN or infinity; "
                                 "replace it (numpy.nan_to_num), or crop or leave out the slice")
        grey = Grey(volume, args.normalize)
        items.append(Item(volume, shrink(grey, args, image=True)))
        if volume.dtype != np.uint8:
            volume.note = volume.note or f"{grey.low:g} to {grey.high:g} become 0 to 255"
    if not volumes or labels is None:
        return items
    rules = {"label_map": args.label_map, "ignore_label": args.ignore_label, **rules}
    rules["label_map"] = rules["label_map"] and parse_label_map(rules["label_map"])
    truths, n_classes = open_labels(labels, opened, len(args.classes or []) or None,
                                    label_slices=slices, **rules)
    args.classes = class_names(args.classes, n_classes)
    return [with_label(item, label, args) for item, label in zip(items, truths)]


def with_label(item, label, args):
    """The Item with other Labels."""
    target = shrink(label, args)
    slices = target.slices
    if args.downsample > 1:             # scribbles may vanish
        slices = np.array([z for z in slices if (target[z] != IGNORE).any()], int)
    return dataclasses.replace(item, label=label, target=target, slices=slices)


def open_training(args, **rules):
    """(train, val): Items of --volume with the labels to train on, and Items that choose the epoch:
    --val-volume, and --val-slices of --volume. rules: of open_labels.

    Numbers in --val-slices name annotated slices; n=2 or every=5 draw from those that are not
    trained on, or, where all are, from these.
    """
    text = args.val_slices
    train = open_items(args.volume, args.label, args, args.label_slices, **rules)
    val = open_items(args.val_volume, args.val_label, args)
    if not text:
        return train, val
    every = open_items(args.volume, args.label, args, **rules) if args.label_slices else train
    for i, (item, whole) in enumerate(zip(train, every)):
        trained, annotated = item.label.slices, whole.label.slices
        rest = np.setdiff1d(annotated, trained)
        rest = rest if len(rest) else annotated
        kept = rest[parse_slices(text, len(rest))] if "=" in text else parse_slices(
            text, len(item.label))
        for z in np.setdiff1d(kept, annotated):
            raise InputError(f"--val-slices: nothing is annotated in {item.label.path} at "
                             f"{item.volume.slice_name(z)}")
        val.append(with_label(item, whole.label.only(kept), args))
        train[i] = with_label(item, item.label.only(np.setdiff1d(trained, kept)), args)
    return train, val


def open_unlabelled(args, train, val):
    """Items of what has no label, their `slices`: the other slices of the training volumes, and
    --unlabeled-volume."""
    used, items = used_slices(train + val), []
    for item in open_items(args.unlabeled_volume, None, args) + train:
        slices = np.setdiff1d(np.arange(len(item.volume)), used_in(item.volume, used))
        if len(slices):
            items.append(Item(item.volume, item.image, slices=slices))
    return items


def open_test(args, used, train=(), val=()):
    """Items to predict: --test-volume, scored in slices that were not `used` (see used_slices); or
    else `val`, which scores, or else the volumes of `train`. With --checkpoint it also prints what
    was read."""
    ignored = args.ignore_label, getattr(args, "test_ignore_label", None)
    items = open_items(args.test_volume, args.test_label or None, args, ignore_label=ignored)
    if not items:
        return list(val) or [Item(item.volume, item.image) for item in train]
    items = [drop_used_slices(item, used) for item in items]
    if args.checkpoint:
        describe_data(args, test=items)
    return items


def check_annotation(train, args):
    """Raise InputError where no training slice, as the network sees it, shows a class: nothing
    would stop a network from seeing it anywhere. Print a note where most slices show nothing."""
    counts = [_count_values(item.target[z])[: len(args.classes)]
              for item in train for z in item.slices]
    at = f" at --downsample {args.downsample}; try a smaller one" if args.downsample > 1 else ""
    if not counts:
        raise InputError("no slice is left to train on; check --label-slices, --val-slices and "
                         "--downsample")
    seen, drawn = sum(counts), sum(item.label.counts.sum(0) for item in train)
    for name, new, old in zip(args.classes[1:], seen[1:] / seen.sum(), drawn[1:] / drawn.sum()):
        if not new:
            raise InputError(f"no slice to train on shows the class {name}{at if old else ''}; "
                             "annotate some, choose other slices, or leave it out with --label-map")
        if new < old / 2:
            print0(f"note: {name} shrinks from {100 * old:.2g} to {100 * new:.2g} % of all voxels"
                   f"{at}")
    empty = sum(not each[1:].any() for each in counts)
    if not args.label_slices and 2 * empty > len(counts):
        print0(f"note: {empty} of {len(counts)} annotated slices show background only; if nobody "
               f"annotated them, name the others with --label-slices")


def describe_data(args, **groups):
    """Print what was read, a line for each volume: its shape, voxel size and annotated slices, with
    their numbers in the files' names, and the label value and share of each class."""
    for kind, items in groups.items():
        for item in items:
            volume, label = item.volume, item.label
            parts = [f"{kind}: {volume.path}, {format_shape(volume.shape)} voxels"]
            if volume.voxel_size:
                parts.append(f"{format_shape(f'{side:g}' for side in volume.voxel_size)} nm")
            zs = item.slices if label is None else label.slices
            shown = [volume.slice_name(z).removeprefix("z = ") for z in zs]
            if label is not None and len(label.slices):
                parts.append(f"labelled slices {_listed(shown)}")
                share = 100 * label.counts.sum(0) / label.counts.sum()
                values = [_listed(label.values[label.ids == k], 4) for k in range(len(share))]
                parts += [f"{value or 'nothing'} = {name}, {part:.3g} %"
                          for value, name, part in zip(values, args.classes, share)]
            elif shown:
                parts.append(f"slices {_listed(shown)}")
            print0("; ".join(parts))
            if volume.note:
                print0(f"note: {volume.path}: {volume.note}")


def shrink(array, args, image=False):
    """An image, Labels or class ids at the resolution that the network sees."""
    if getattr(args, "resize", None):
        array = Resized(array, args.resize, linear=image)
    if args.downsample > 1:
        array = Downsampled(array, args.downsample, "mean" if image else "majority")
    return array


def out_channels(classes):
    """One channel with a sigmoid for two classes, else one per class with a softmax."""
    return 1 if len(classes) == 2 else len(classes)


def used_slices(items):
    """What a run trains and validates on, for its checkpoints: for each volume its file, the y and
    x it is cropped to, and the annotated slices, by their numbers in a folder, which may grow."""
    return [{"file": os.path.realpath(item.volume.file),
             "yx": [[c.start, c.stop] for c in item.volume.crop[1:]],
             "z": [numbers_of(item.volume)[z] for z in item.label.slices]} for item in items]


def numbers_of(volume):
    """The numbers of the slices of a volume in its file: those in the names of a folder, or z."""
    return (volume.numbers or range(volume.file_shape[0]))[volume.crop[0]]


def used_in(volume, used):
    """The z of a volume that were trained or validated on, in order; see used_slices."""
    file, sides = os.path.realpath(volume.file), volume.crop[1:]
    numbers = {number for other in used for number in other["z"]
               if other["file"] == file and all(own.start < end and start < own.stop
                                                for own, (start, end) in zip(sides, other["yx"]))}
    return [z for z, number in enumerate(numbers_of(volume)) if number in numbers]


def drop_used_slices(item, used):
    """The item, its label without the slices that were trained or validated on: they do not score.

    So a whole stack with dense labels can be the test volume of a run that used a few of its slices
    (as in train_cps.py's paper).
    """
    slices = item.label.slices if item.label else []
    left = np.setdiff1d(slices, used_in(item.volume, used))
    if len(left) == len(slices):
        return item
    print0(f"{item.volume.path}: {len(slices) - len(left)} slices that were trained or validated "
           f"on do not score")
    if not len(left):
        raise InputError(f"{item.volume.path}: no other slice is labelled; test on others")
    return dataclasses.replace(item, label=item.label.only(left))


def class_names(names, n_classes):
    """Names for all classes: those given, else background, class 1, class 2, …"""
    return list(names or ["background", *(f"class {k}" for k in range(1, n_classes))])


def unique_names(paths):
    """A short name for each path, for file names: the stem; where two are alike the folder's name;
    where two of these are the stem and a number."""
    files = [Path(os.path.abspath(_split_crop(path)[0])) for path in paths]
    clean = partial(re.sub, r"[^\w.-]+", "_")
    stems, folders = [clean(f.stem) for f in files], [clean(f.parent.name) for f in files]
    numbered = [f"{number}_{stem}" for number, stem in enumerate(stems, 1)]
    return next(names for names in (stems, folders, numbered) if len({*names}) == len(names))


def write_demo(run, shape, voxel_size=(20.0, 8.0, 8.0)):
    """Write two synthetic volumes into the run folder and point the arguments at them.

    A training volume as TIFF (uint8) and a test volume as MRC (int8, as tomograms often are), each
    with labels of PHANTOM_CLASSES.
    """
    for number, (kind, ending) in enumerate((("", "tif"), ("test_", "mrc"))):
        paths = [str(run.path(f"demo/{kind or 'train_'}{part}.{ending}"))
                 for part in ("volume", "label")]
        vars(run.args).update({f"{kind}volume": paths[:1], f"{kind}label": paths[1:]})
        if run.rank == 0 and not (run.args.resume and all(map(os.path.exists, paths))):
            image, label = phantom(shape, voxel_size, seed=1000 * run.args.seed + number)
            if ending == "mrc":
                image = (image.astype(np.int16) - 128).astype(np.int8)
            for path, array, most in zip(paths, (image, label), (None, int(label.max()))):
                with create_volume(path, array.shape, array.dtype, voxel_size, most) as writer:
                    writer[:] = array
    run.barrier()


# -- device and processes --------------------------------------------------------------------------


def choose_device(name):
    """The device of that name, or the best there is. Raises InputError where it does not exist."""
    if name is None:
        there = torch.accelerator.is_available()
        name = torch.accelerator.current_accelerator().type if there else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.zeros(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}")


def choose_precision(device, amp):
    """The dtype of mixed precision that the device does well; float32 means none."""
    if amp is False:
        return torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    native = device.type == "cpu" and any(
        getattr(torch.cpu, name, bool)()        # names that PyTorch may change
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return torch.bfloat16 if native or amp else torch.float32


def keep_freed_memory():
    """Make glibc keep freed memory: new pages for every tensor cost a fifth of a CPU step."""
    with contextlib.suppress(OSError, AttributeError):          # another library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 1 << 30)                # M_MMAP_THRESHOLD
        mallopt(-1, (1 << 31) - 1)          # M_TRIM_THRESHOLD


def print0(text):
    """Print a line, once for all processes."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def average(tensors):
    """Average tensors over all processes, in place. A step may run a network more than once, which
    DistributedDataParallel does not allow together with BatchNorm."""
    if not torch.distributed.is_initialized() or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(part.view_as(tensor))


def command(main):
    """Run main(args) as a command: bad input is one line and exit status 2, an interruption, Ctrl-C
    or SIGTERM, one line and status 130."""
    @functools.wraps(main)
    def wrapper(args):
        prog = Path(sys.argv[0]).name
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            return main(args)
        except (InputError, OSError, MemoryError, torch.OutOfMemoryError) as error:
            line = str(error).splitlines()[-1] if str(error) else "out of memory"
            if isinstance(error, torch.OutOfMemoryError):
                line = "out of memory; give a smaller --batch-size, --patch-size or --width"
            print(f"{prog}: error: {line.removeprefix('emseg.InputError: ')}", file=sys.stderr)
            raise SystemExit(2)
        except KeyboardInterrupt:
            line = f"{prog}: interrupted"
            if hasattr(args, "resume") and Path(args.out_dir, "config.json").exists():
                line += f"; continue with --resume --out-dir {shlex.quote(str(args.out_dir))}"
            print(line, file=sys.stderr)
            raise SystemExit(130)
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    return wrapper


# -- run -------------------------------------------------------------------------------------------

# Files by which a run is known and resumed, or that not every run writes: --overwrite removes them.
RUN_FILES = ("log.csv", "last.pt", "best.pt", "metrics.json", "maps.png",
             "slice_dice.png", "stages/[0-9]*_coarse.tif", "stages/[0-9]*_mpp.tif")
PROGRESS = ("step", "seconds", "best", "rows", "sums")          # of a Run, in its checkpoints


class Run:
    """One run: its folder, device, seeds, log and checkpoints. The training loop is the script's:

        run = Run(args, __file__)
        run.begin(steps_per_epoch, network=network, optimizer=optimizer)
        for epoch in run.epochs():
            for step in run.steps(epoch):
                ...
                run.update(loss, lr, (network, optimizer))
                run.log(lr=lr, loss=loss)
            run.end_epoch(validate(run, predict, val))

    normalization and used (see used_slices) go into its checkpoints. checkpoint: what it starts
    from, --checkpoint, --init or --coarse. finished: a resumed run has nothing left to do.
    """

    def __init__(self, args, script):
        self.args, self.script, self.folder = args, Path(script), Path(args.out_dir)
        self.device = choose_device(args.device)
        self.dtype = choose_precision(self.device, args.amp)
        self.rank = int(os.environ.get("RANK", 0))                          # as torchrun says
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        cuda = self.device.type == "cuda"
        if self.world > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo",
                                                 timeout=datetime.timedelta(hours=12))
        if cuda:
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.benchmark = True
        else:
            keep_freed_memory()
        self.config, self.normalization, self.written = None, None, set()
        self.step, self.seconds, self.sums = 0, 0.0, {}     # of the losses of an epoch
        self.rows, self.best = [], None         # of log.csv; the highest metric of end_epoch
        self.interrupted = False
        self.finished = args.resume and (self.folder / "metrics.json").exists()
        self.predicted_voxels, self.predict_seconds = 0, 0.0
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        if not args.resume:
            check_folder(args, self.script.name)
        elif (self.folder / "config.json").exists():
            self.config = read_config(self.folder, self.script.name)
        self.barrier()
        source = args.checkpoint or args.init or getattr(args, "coarse", None)
        self.checkpoint = load_checkpoint(source) if source else None
        self.used = self.checkpoint["used"] if source else []
        if args.checkpoint:
            if self.checkpoint["script"] != self.script.name:
                raise InputError(f"{args.checkpoint}: a checkpoint of {self.checkpoint['script']}, "
                                 f"not of {self.script.name}")
            for key in ("normalization", "best", "seconds"):
                setattr(self, key, self.checkpoint[key])
        torch.manual_seed(args.seed)
        state = "is finished" if self.finished else f"{self.device}, {str(self.dtype)[6:]}"
        print0(f"{self.folder}: {state}" + (f", {self.world} processes" if self.world > 1 else ""))

    # -- folder

    def write_config(self):
        """Write config.json with the arguments as they are now; the first time make the folder."""
        if self.config is None:
            cuda = self.device.type == "cuda"
            self.config = {"script": self.script.name, "runs": [], **provenance(self.script),
                           "device": torch.cuda.get_device_name() if cuda else platform.machine(),
                           "precision": str(self.dtype)[6:]}
            if self.rank == 0:
                start_folder(self.folder)
        if self.rank == 0:
            write_json(self.folder / "config.json", {**self.config, "args": vars(self.args)})
        self.barrier()

    def path(self, name):
        """The path of a file of this run, in a folder that exists."""
        if self.config is None:
            self.write_config()
        (self.folder / name).parent.mkdir(exist_ok=True)
        self.written.add(name)
        return self.folder / name

    def args_of(self, name, **changes):
        """The arguments of a run in the subfolder `name`, which is resumed if it has begun; --init
        RUN starts it from RUN/name, if there is one."""
        folder, begun = self.path(name), self.config["runs"]            # start_folder reads it
        self.config["runs"] = sorted({name, *begun})
        self.write_config()
        init = Path((self.args.init or "").removesuffix("best.pt"), name)
        if self.args.init and init.is_dir():
            changes["init"] = str(init)
        return argparse.Namespace(**{**vars(self.args), "demo": False, "out_dir": str(folder),
                                     "overwrite": name not in begun, "resume": name in begun,
                                     **changes})

    # -- networks

    def prepare(self, network):
        """Move a network to the device, channels last, and compile it if asked."""
        network = channels_last(network.to(self.device))
        if self.args.compile:
            network.compile()
        return network

    def load(self, network, key="network"):
        """Prepare a network with the weights of the checkpoint."""
        load_weights(network, self.checkpoint, key, self.args.checkpoint)
        return self.prepare(network)

    def autocast(self):
        """The context of mixed precision. Weights cast under no_grad are cached without gradient,
        so teacher and student passes need contexts of their own."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def batches(self, patches, batch_size):
        """The batches of the steps from the current one on, on the device. That of a step is the
        same wherever the run (re)starts; processes draw different crops."""
        numbers = range(self.step * self.world + self.rank, self.total * self.world, self.world)
        # A generator of its own: the loader must not draw from the one that seeds the augmentation.
        for batch in torch.utils.data.DataLoader(
                patches, num_workers=self.args.workers, generator=torch.Generator(),
                batch_sampler=(range(n * batch_size, (n + 1) * batch_size) for n in numbers),
                pin_memory=self.device.type == "cuda"):
            yield [crop.to(self.device, non_blocking=True) for crop in batch]

    # -- training

    def begin(self, steps_per_epoch, **modules):
        """Start or resume: modules are the networks and optimisers to save, by name."""
        self.modules, self.steps_per_epoch = {**modules, "scaler": self.scaler}, steps_per_epoch
        self.total = self.args.epochs * steps_per_epoch
        last = self.folder / "last.pt"
        if self.args.resume and last.exists():
            checkpoint = load_checkpoint(last)
            for key, module in self.modules.items():
                load_weights(module, checkpoint, key, last)
            for key in PROGRESS:
                setattr(self, key, checkpoint[key])
            print0(f"resuming {self.folder} at step {self.step} of {self.total}")
        elif self.args.init:
            for key in {"network", *self.checkpoint["modules"].keys() & modules.keys()}:
                load_weights(modules[key], self.checkpoint, key, self.args.init)
        self.write_config()
        self.printed, self.session, self.warned = 0.0, (time.monotonic(), self.step), False

    def epochs(self):
        """The epochs that are left. Ctrl-C and SIGTERM meanwhile save and leave after a step; a
        second one at once."""
        def interrupt(number, frame):
            if self.interrupted and self.world == 1:    # torchrun passes the same one on
                raise KeyboardInterrupt
            self.interrupted = True

        handlers = {number: signal.signal(number, interrupt)
                    for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self.step < self.total:
                yield self.step // self.steps_per_epoch
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def steps(self, epoch):
        """The steps of an epoch that are left. Seeds each step by itself, so that a run continues
        from any step as if it had never stopped."""
        while self.step < (epoch + 1) * self.steps_per_epoch:
            started = time.monotonic()
            state = np.random.SeedSequence((self.args.seed, self.step, self.rank))
            torch.manual_seed(int(state.generate_state(1)[0]))
            yield self.step
            self.step += 1
            self.seconds += time.monotonic() - started
            if self.step < (epoch + 1) * self.steps_per_epoch:      # else end_epoch saves
                self._stop_if_interrupted()

    def update(self, loss, lr, *pairs, clip=0.0):
        """Backward pass and a step of each (network, optimizer) at the rate lr. All processes
        average gradients and BatchNorm statistics. clip: largest norm of a gradient, 0 for any."""
        self.scaler.scale(loss).backward()
        for network, optimizer in pairs:
            average([p.grad for p in network.parameters() if p.grad is not None])
            self.scaler.unscale_(optimizer)
            if clip:
                nn.utils.clip_grad_norm_(network.parameters(), clip)
            for group in optimizer.param_groups:
                group["lr"] = lr
            self.scaler.step(optimizer)
            optimizer.zero_grad()
            average([buffer for name, buffer in network.named_buffers() if "running_" in name])
        self.scaler.update()

    def log(self, lr, **losses):
        """Add the losses of a step (scalar tensors), means over all processes, to those of the
        epoch; print the progress. The sums stay on the device: a GPU never waits for them."""
        values = torch.stack([value.detach().float() for value in losses.values()])
        average([values])
        self.lr = lr
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in zip(losses, values)}
        self._progress()

    def _mean_losses(self, steps):
        """The losses of the epoch so far. Raises InputError where one is not finite."""
        means = {name: float(total) / steps for name, total in self.sums.items()}
        for name, mean in means.items():
            if not math.isfinite(mean):
                raise InputError(f"{name} is {mean} in epoch {len(self.rows)}, step {steps} or "
                                 f"before; try a lower --lr or --no-amp; the last good checkpoint "
                                 f"in {self.folder} is kept")
        return means

    def _progress(self):
        """A line that renews itself on a terminal; elsewhere a line every few seconds."""
        now, (start, first), terminal = time.monotonic(), self.session, sys.stdout.isatty()
        if self.rank or now - self.printed < (1 if terminal else 5):
            return
        epoch, count = divmod(self.step, self.steps_per_epoch)
        loss, self.printed = self._mean_losses(count + 1)["loss"], now
        rate = (now - start) / max(1, self.step - first)
        left = rate * (self.total - self.step)
        if now - start > 60:                    # the latest minute, since steps may become longer
            self.session = now - 30, self.step - 30 / rate
            if left > 86400 and not self.warned:
                self.warned = True
                print("\nnote: more than a day is left; a larger --downsample, a smaller --width, "
                      "--patch-size or --epochs make it shorter; --quick shows a first result")
        text = (f"epoch {epoch}  step {self.step}/{self.total}  loss {loss:.3f}  {rate:.2f} s/step "
                f" {datetime.timedelta(seconds=round(left))} left")
        print(f"\r{text}\x1b[K" if terminal else text, end="" if terminal else "\n", flush=True)

    def end_epoch(self, validation, metric="val_dice"):
        """Write the epoch's row of log.csv, last.pt, and best.pt if this metric of the validation
        has not been as high before, or in the end where nothing validates."""
        row = {"epoch": len(self.rows), "step": self.step, "seconds": round(self.seconds, 1),
               "lr": self.lr, **self._mean_losses(self.steps_per_epoch), **validation}
        self.rows, self.sums = [*self.rows, row], {}
        if self.rank == 0:
            write_csv(self.path("log.csv"), self.rows)
        value = validation.get(metric)
        better = value is not None and (self.best is None or value > self.best)
        self.best = value if better else self.best
        if better or (self.step == self.total and self.best is None):
            self.save("best.pt")
        self.save("last.pt")
        shown = "  ".join(f"{key} {value:.4f}" for key, value in row.items() if value is not None
                          and key.startswith(("loss", "val")) and "val_dice_" not in key)
        print0(f"{chr(13) if sys.stdout.isatty() else ''}epoch {row['epoch']}  {shown}")
        self._stop_if_interrupted()

    # -- interruption and checkpoints

    def _stop_if_interrupted(self):
        """Where any process was interrupted: save and leave, see command."""
        if self.world > 1:
            flag = torch.tensor(float(self.interrupted))
            average([flag])
            self.interrupted = bool(flag)
        if self.interrupted:
            self.save("last.pt")
            print0(f"\nsaved {self.folder / 'last.pt'} at step {self.step}")
            raise KeyboardInterrupt

    def save(self, name):
        """last.pt: everything; best.pt: the networks, without optimisers. Raises InputError where
        a weight is not finite: such a network must not replace a good one."""
        path = self.path(name)                  # in all processes
        if self.rank:
            return
        states = {key: module.state_dict() for key, module in self.modules.items()
                  if name == "last.pt" or isinstance(module, nn.Module)}
        networks = [states[key] for key, module in self.modules.items()
                    if isinstance(module, nn.Module)]
        if not all(value.isfinite().all() for state in networks for value in state.values()):
            raise InputError(f"the weights are not finite after step {self.step}; try a lower --lr "
                             f"or --no-amp; the last good checkpoint is kept")
        content = {"script": self.script.name, "args": vars(self.args), "used": self.used,
                   "normalization": self.normalization, "modules": states}
        with replacing(path) as temporary:
            torch.save({**content, **{key: getattr(self, key) for key in PROGRESS}}, temporary)

    def use_best(self, network):
        """Load the weights to predict with."""
        self.barrier()
        path = self.folder / "best.pt"
        load_weights(network, load_checkpoint(path), "network", path)

    def barrier(self):
        """Wait for all processes."""
        if self.world > 1:
            torch.distributed.barrier()


def read_config(folder, script):
    """config.json of the run of a script in a folder (a Path). Raises InputError."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        config = {}
    if config.get("script") != script:
        raise InputError(f"--out-dir {folder} holds no run of {script}; choose another folder")
    return config


def check_folder(args, script):
    """Raise InputError where args.out_dir holds anything but a run of this script to overwrite, or
    a file or folder that args name."""
    folder = Path(args.out_dir)
    if not folder.is_dir() or all(file.name.startswith(".") for file in folder.iterdir()):
        return
    read_config(folder, script)
    if not args.overwrite:
        others = ", or --resume" if "resume" in args else ""
        raise InputError(f"--out-dir {folder} holds a run; give --overwrite or another folder"
                         f"{others}")
    named = [text for name, value in vars(args).items() if name != "out_dir"
             for text in np.ravel(value).astype(str)]           # some are lists of lists
    for path, _ in map(_split_crop, [*named, *(text.partition("=")[2] for text in named)]):
        if os.path.exists(path) and Path(path).resolve().is_relative_to(folder.resolve()):
            raise InputError(f"--overwrite {folder}: this run reads {path}, which lies in it; "
                             f"choose another --out-dir")


def start_folder(folder):
    """Make a run folder (a Path), without the RUN_FILES of an earlier run and of its runs in
    subfolders. All else stays until it is replaced."""
    config = folder / "config.json"
    runs = json.loads(config.read_text()).get("runs", []) if config.exists() else []
    for run in (*runs, "."):
        for pattern in RUN_FILES:
            for file in (folder / run).glob(pattern):
                file.unlink()
    folder.mkdir(parents=True, exist_ok=True)


def load_checkpoint(path):
    """A checkpoint (a file, or the best.pt of a folder); a stranger's file runs no code. Raises
    InputError."""
    path = Path(path) / "best.pt" if os.path.isdir(path) else Path(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        assert {"script", "args", "modules", "used"} <= content.keys()
    except Exception as error:     # torch.load raises what it likes on damaged or malicious files
        found = type(error).__name__ if path.exists() else "no such file, or in a subfolder"
        raise InputError(f"{path}: no checkpoint of emseg ({found})")
    return content


def load_weights(module, checkpoint, key, path):
    """Load a module's state from a checkpoint. Raises InputError where it does not fit."""
    try:
        module.load_state_dict(checkpoint["modules"][key])
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: does not fit this network, which must have the same --model, "
                         f"--width and number of classes ({str(error).splitlines()[0]} …)")


def write_text(path, text):
    """Write a small file so that it is always whole. Raises InputError."""
    with replacing(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8", newline="\n")


def write_json(path, content):
    """Write a JSON file, None for null; see write_text."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_csv(path, rows):
    """Write a CSV file of rows, {column: value}, with all columns that occur; see write_text."""
    columns = dict.fromkeys(key for row in rows for key in row)
    with replacing(path) as temporary, open(
            temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def markdown(rows):
    """Rows of cells, the heads first, as a Markdown table with straight columns."""
    rows = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*rows)]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths)] for row in rows]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def provenance(script):
    """What it takes to run a script (its path) again, for config.json."""
    sources = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()
               for path in (Path(__file__), Path(script))}
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True,
                         cwd=Path(script).resolve().parent) if shutil.which("git") else None
    return {"argv": sys.argv, "python": platform.python_version(), "sha256": sources,
            "versions": {m.__name__: m.__version__ for m in (torch, np, scipy, tifffile, mrcfile)},
            "git": git.stdout.strip() if git and git.returncode == 0 else None}


# -- predictions and their scores ------------------------------------------------------------------


@torch.inference_mode()
def predict(run, network, image, prepare=None, tile=None):
    """Run a network on uint8 slices (B, H, W): probabilities (B, C, H, W), in tiles and eight views
    as asked.

    prepare: slices on the device -> network input, in place of the normalisation. For a 3D network
    the slices are a window (Z, H, W), tiled like the crops that it was trained on; so are those of
    a network whose output depends on the whole image (global_context). tile: see predict_slices.
    """
    network.eval()
    n = len(image)
    if network.dims == 3 or getattr(network, "global_context", False):
        tile = tile or run.args.patch_size[-2:]
    if network.dims == 3 and n < network.min_depth:         # the last slice, again
        image = torch.cat([image, image[-1:].expand(network.min_depth - n, -1, -1)])
    image = image.to(run.device)
    image = prepare(image) if prepare else normalize(image, run.normalization)
    if network.dims == 3:
        image = image.transpose(0, 1)[None]

    def once(view):
        with run.autocast():
            return predict_slices(network, view, tile)
    prob = eight_views(once, image) if run.args.tta else once(image)
    return prob if network.dims == 2 else prob[0].transpose(0, 1)[:n]


def score_slices(run, predict, item, context=1, depth=None):
    """Confusion counts (N, K, K) of the N annotated slices of an Item. All processes share them.

    predict: uint8 tensor (context, H, W) around a slice -> its probabilities (1, C, H, W).
    depth: of the windows of a 3D network, blended as in a prediction, see predict_by_windows.
    """
    image, target, n = item.image, item.target, len(run.args.classes)
    counts = np.zeros((len(target.slices), n, n), dtype=np.int64)
    padded = WithContext(image, context)
    stream = predict_by_windows(predict, image, depth, run.rank, run.world) if depth else (
        (slice(z, z + 1), predict(torch.from_numpy(padded[z : z + context])))
        for z in target.slices[run.rank :: run.world])
    for slab, prob in stream:
        for row, z in enumerate(target.slices):
            if slab.start <= z < slab.stop:
                pred = class_ids(prob[z - slab.start][None], getattr(run.args, "threshold", 0.5))
                pred = pred.to(torch.uint8).cpu().numpy()
                counts[row] = confusion(pred, target[z][None], n)[0]
    if run.world > 1:
        torch.distributed.all_reduce(torch.from_numpy(counts))      # in place
    return counts


def validate(run, predict, items, context=1, depth=None, organelles=None):
    """val_dice and val_iou, means over foreground classes and volumes, val_miou over all classes,
    val_miou_org over `organelles`, and the Dice of each class, val_dice_NAME; {} without items.

    predict, context, depth: see score_slices.
    """
    if not items:
        return {}
    mean = mean_scores([scores(score_slices(run, predict, item, context, depth), run.args.classes,
                               organelles) for item in items])
    return {**{f"val_{key}": mean[key] for key in ("dice", "iou", "miou", "miou_org")
               if key in mean},
            **{f"val_dice_{name}": score["dice"] for name, score in mean["per_class"].items()}}


@contextlib.contextmanager
def writers_of(run, item, outputs):
    """VolumeWriters of [(path, shape, dtype)], filled by all processes, whole when all are done."""
    with contextlib.ExitStack() as files:
        if run.rank:                            # the first process creates the files
            run.barrier()
        writers = [files.enter_context(create_volume(
            *output, item.volume.voxel_size, len(run.args.classes) - 1, item.volume,
            attach=run.rank > 0)) for output in outputs]
        if not run.rank:
            run.barrier()
        yield writers
        run.barrier()
    run.barrier()


def result_name(item, items):
    """prediction.tif, or prediction_NAME.tif where there are several items; MRC for MRC."""
    name = unique_names([each.volume.path for each in items])[items.index(item)]
    ending = "mrc" if item.volume.format == "mrc" else "tif"
    return f"prediction_{name}.{ending}" if len(items) > 1 else f"prediction.{ending}"


def write_prediction(run, predict, item, name, context=1, depth=None, channels=None, decide=None):
    """Write the prediction of an Item into the run's file `name`; returns its path. With
    --save-probability, "probability…" is written beside "prediction…"; other files have none.

    predict: uint8 slices (B, H, W) -> probabilities (B, C, H, W). All processes share the work.
    context: see predict_by_slabs; depth: of the windows of a 3D network. channels: of the
    probabilities, where they are not one for each class. decide: probabilities (n, C, ...) -> class
    ids (n, ...), in place of class_ids.
    """
    started, shape = time.monotonic(), item.volume.shape
    channels = channels or out_channels(run.args.classes)
    decide = decide or partial(class_ids, threshold=getattr(run.args, "threshold", 0.5))
    outputs = [(run.path(name), shape, np.uint8)]
    if run.args.save_probability and name.startswith("prediction"):
        other = Path(name).with_suffix(".tif").name.replace("prediction", "probability", 1)
        stacked = shape if channels == 1 else (shape[0], channels, *shape[1:])
        outputs.append((run.path(other), stacked, np.float32))
    share = {"rank": run.rank, "world": run.world}
    if depth:
        stream = predict_by_windows(predict, item.image, depth, **share)
    else:
        pixels = 2**22 * min(run.args.downsample, 4) ** 2 if run.device.type == "cuda" else 2**20
        stream = predict_by_slabs(predict, item.image, shape, context, pixels, **share)

    def progress(done, total):
        if sys.stdout.isatty() and not run.rank:        # a line that goes when all is done
            print(f"\r{f'predicting  slice {done}/{total}' if done < total else ''}\x1b[K", end="",
                  flush=True)

    with writers_of(run, item, outputs) as writers:
        predict_volume(stream, writers[0], decide, shape, progress, run.args.downsample,
                       *writers[1:])
    run.predicted_voxels += math.prod(shape)
    run.predict_seconds += time.monotonic() - started
    return run.folder / name


def predict_all(run, predict, items, **options):
    """Write the predictions of all Items, see write_prediction; their paths."""
    return [write_prediction(run, predict, item, result_name(item, items), **options)
            for item in items]


def predict_and_score(run, network, items):
    """Predict all Items with a network of 2D slices, score and draw the predictions."""
    paths = predict_all(run, partial(predict, run, network), items)
    report(run, items, paths, count_parameters(network))


def report(run, items, stages, parameters, organelles=None, **more):
    """Score predictions; write metrics.json, figure.png, maps.png, slice_dice.png and curves.png;
    print the scores and what was written. Returns metrics.json's content, in the first process.

    stages: paths of the predictions of the Items, or {name: paths} of the stages of a method, the
    last of which counts. parameters: of the networks. more: for metrics.json, too.
    """
    run.write_config()                  # with the arguments as they are in the end
    if run.rank:
        return run.barrier()
    stages = stages if isinstance(stages, dict) else {"prediction": stages}
    classes, results = run.args.classes, {stage: [] for stage in stages}
    volumes, shown, curves = [], [], []
    for number, item in enumerate(items):
        opened = {stage: open_volume(paths[number]) for stage, paths in stages.items()}
        name, dice = Path(item.volume.path).name, None
        entry = {"volume": item.volume.path, "label": item.label and item.label.path,
                 "prediction": [*opened.values()][-1].path, "used": used_in(item.volume, run.used)}
        for stage, prediction in opened.items() if item.label else ():
            counts = confusion_volume(prediction, item.label, classes)
            result = volume_scores(counts, item.label, classes, organelles)
            results[stage].append(result)
            dice, entry = dice_of_slices(counts), entry | result            # of the last stage
            for class_name, score in result["per_class"].items():
                print0(f"{Path(prediction.path).relative_to(run.folder)}  {class_name}: "
                       + "  ".join(f"{key} {math.nan if score[key] is None else score[key]:.4f}"
                                   for key in ("dice", "iou", "precision", "recall")))
        if item.label:
            curves.append((name, dice, entry["used"], item.volume.slice_name))
        volumes.append(entry)
        shown.append((name, Grey(item.volume), item.label, opened, dice))
    mean = {stage: mean_scores(each) if each else None for stage, each in results.items()}
    seconds = run.predict_seconds
    content = {
        "schema": 1, "script": run.script.name, "model": run.args.model, "seed": run.args.seed,
        "selected_on": "last epoch" if run.best is None else "validation", "best": run.best,
        "classes": classes, "volumes": volumes, "mean": list(mean.values())[-1],
        **({"stages": mean} if len(stages) > 1 else {}), "train_seconds": round(run.seconds, 1),
        "predict_seconds": round(seconds, 1),
        "predict_voxels_per_second": round(run.predicted_voxels / seconds) if seconds else None,
        "peak_memory_gib": peak_memory_gib(run.device), "parameters": parameters, **more}
    if shown:
        save_slices(run.path("figure.png"), shown, classes)
    if shown and (len(classes) > 2 or len(stages) > 1):
        save_slices(run.path("maps.png"), shown, classes, maps=True)
    if curves:
        save_slice_dice(run.path("slice_dice.png"), curves, classes)
    if run.rows:
        save_curves(run.path("curves.png"), run.rows)
    write_json(run.path("metrics.json"), content)
    print0(f"wrote {run.folder}/: {', '.join(sorted(run.written))}")
    run.barrier()
    return content


def peak_memory_gib(device):
    """Most memory used so far: of the GPU, else of this process; None where it is not known."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    status = Path("/proc/self/status")      # getrusage includes the process that started this one
    peak = status.exists() and re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    return round(int(peak[1]) / 2**20, 2) if peak else None
