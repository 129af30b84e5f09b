"""emseg: what the training scripts of five electron-microscopy segmentation papers share.

Copy this file and one train_*.py into any folder and they run.

Conventions
    arrays (Z, Y, X); tensors (B, C, Y, X) or (B, C, Z, Y, X); labels int64 without C
    voxel size (z, y, x) in nanometres, converted where files are read and written
    IGNORE = 255 marks voxels that nobody annotated: no loss and no metric sees them
    two classes: one output channel and a sigmoid; more: one channel each and a softmax
    bad input raises InputError, whose message is one line

Contents, in the order data flows
    Volumes       files as lazy arrays: TIFF, MRC, NPY, folders of slices; labels; writing
    Phantom       synthetic EM volumes and whole cells with exact labels, for --demo and tests
    Patches       random crops, as uint8, and their normalisation
    Augmentation  one composed sampling grid per batch, on the device
    Layers        building blocks of networks
    Networks      networks from the literature, by name: NETWORKS
    Losses        soft Dice and cross entropy, blind to IGNORE
    Inference     slices, their neighbours or 3D windows; blended tiles, eight views, slab by slab
    Metrics       confusion counts and the scores that follow from them
    Figures       slices with their errors, class maps, surfaces in 3D, training curves
    Runs          command line, data, run folder, checkpoints, progress
"""

import argparse
import atexit
import bisect
import contextlib
import csv
import ctypes
import datetime
import functools
import hashlib
import io
import json
import logging
import math
import operator
import os
import platform
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import mrcfile
import numpy as np
import scipy
import tifffile
import torch
import torch.nn.functional as F
from matplotlib.image import imread
from scipy import ndimage
from torch import nn

try:
    import fcntl
    import resource
except ImportError:         # Windows
    fcntl = resource = None

IGNORE = 255


class InputError(ValueError):
    """Input that the user can mend: one line that says what, got, wanted, how."""


# ==================================================================================================
# Volumes: files as lazy arrays (Z, Y, X); labels; writing
# ==================================================================================================
#
# open_volume -> as_uint8, downsample, open_labels -> ... -> create_volume. All of them are lazy:
# a LazyArray knows its shape and reads a box of voxels when it is indexed.

TIFF_EXTENSIONS = (".tif", ".tiff")
MRC_EXTENSIONS = (".mrc", ".rec", ".map", ".st", ".ali")
READABLE = ".tif .tiff .mrc .rec .map .st .ali .npy .png, or a folder of .tif or .png slices"
CACHE_BYTES = 256 * 2**20  # decoded slices that a process keeps
PLAUSIBLE_NM = (0.005, 10_000.0)  # sides outside this are header defaults, such as 72 dpi
UNIT_NM = {"pm": 1e-3, "å": 0.1, "a": 0.1, "angstrom": 0.1, "nm": 1.0, "nanometer": 1.0,
           "um": 1e3, "µm": 1e3, "μm": 1e3, "micron": 1e3, "microns": 1e3, "micrometer": 1e3,
           "mm": 1e6, "millimeter": 1e6, "cm": 1e7, "centimeter": 1e7, "inch": 2.54e7,
           "in": 2.54e7, "m": 1e9}
MOST_PAGES = 10**6          # of a TIFF file that does not hold them
# Bytes that one stored byte can become, by TIFF compression: none, LZW, Deflate twice, PackBits.
MAX_EXPANSION = {1: 1, 5: 2000, 8: 2000, 32946: 2000, 32773: 64}


class LazyArray:
    """A 3D array (Z, Y, X) that reads from its file only the box it is asked for.

    array[z], array[z0:z1, y0:y1, x0:x1]: integers and slices of step 1, trailing axes optional;
    the answer is a fresh NumPy array. shape, dtype (native byte order), voxel_size ((z, y, x) in nm
    or None) and path are attributes. Copies in other processes (fork or pickle) are independent.
    Subclasses define read(z, y, x): the box of three slices, 0 <= start <= stop <= size, as a 3D
    array.
    """

    ndim = 3

    def __init__(self, path, shape, dtype, voxel_size):
        self.path, self.shape, self.dtype = path, tuple(shape), np.dtype(dtype)
        self.voxel_size = voxel_size

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        if len(index) > 3:
            raise IndexError(f"a volume has 3 axes (Z, Y, X), got {len(index)} indices")
        box, keep = [], []
        for i, size in zip(index + (slice(None),) * (3 - len(index)), self.shape):
            if isinstance(i, slice):
                start, stop, step = i.indices(size)
                if step != 1:
                    raise IndexError(f"a volume is read with slices of step 1, got step {step}")
                box.append(slice(start, max(start, stop)))
                keep.append(slice(None))
            else:
                i = operator.index(i)
                if not -size <= i < size:
                    raise IndexError(f"index {i} is outside an axis of {size}")
                box.append(slice(i % size, i % size + 1))
                keep.append(0)
        return self.read(*box)[tuple(keep)]


class Volume(LazyArray):
    """An opened file or folder; see open_volume.

    format: "tiff", "mrc", "npy" or "slices". crop: three slices into `file`, whose own shape is
    file_shape. numbers: for a folder, the last integer in each file's name, in file order and not
    cropped; None when a name has none or two are the same.
    """

    def __init__(self, path, format, source, voxel_size, crop, numbers=None):
        super().__init__(path, [c.stop - c.start for c in crop], source.dtype, voxel_size)
        self.format, self.source, self.crop, self.numbers = format, source, crop, numbers
        self.file, self.file_shape = _split_crop(path)[0], source.shape

    def read(self, z, y, x):
        return self.source.read(*(slice(c.start + s.start, c.start + s.stop)
                                  for c, s in zip(self.crop, (z, y, x))))


def open_volume(path):
    """Open a TIFF, MRC, NPY or PNG file, or a folder of TIFF or PNG slices, as a lazy Volume.

    `path@z0:z1,y0:y1,x0:x1` opens a crop (trailing axes optional; each axis a:b, a:, :b, : or one
    integer). A file whose own name holds an @ opens as it stands. A 2D image is one slice. Where
    a file gives only the pixel size, z is taken equal to x. Raises InputError, in one line, for
    whatever cannot be read; a header that declares more than the file holds is refused before
    anything is allocated.
    """
    path = os.fspath(path)
    file, crop_text = _split_crop(path)
    extension = os.path.splitext(file)[1].lower()
    numbers = None
    if not os.path.exists(file):
        raise InputError(f"{path}: no such file or folder")
    try:
        if os.path.isdir(file):
            format, (source, voxel_size, numbers) = "slices", _open_slices(file)
        elif os.path.getsize(file) == 0:
            raise InputError(f"{path}: the file is empty")
        elif extension in TIFF_EXTENSIONS:
            format, (source, voxel_size) = "tiff", _open_tiff(file)
        elif extension in MRC_EXTENSIONS:
            format, (source, voxel_size) = "mrc", _open_mrc(file)
        elif extension == ".npy":
            format, (source, voxel_size) = "npy", _open_npy(file)
        elif extension == ".png":
            format, (source, voxel_size, numbers) = "slices", _slice_stack(file, [file])
        elif extension in (".gz", ".bz2"):
            raise InputError(f"{path}: compressed with {extension[1:]}; decompress it first")
        else:
            raise InputError(f"{path}: cannot read files of type '{extension}'; wanted {READABLE}")
        if isinstance(source, _PagedSource):
            source.page(0)  # a codec that is missing shows here rather than in mid-training
    except InputError:
        raise
    except Exception as error:  # the file libraries raise almost anything on damaged headers
        raise InputError(f"{path}: not readable ({_one_line(error)}); "
                         "is the file whole, and what its extension says?") from error
    return Volume(path, format, source, voxel_size, _parse_crop(path, crop_text, source.shape),
                  numbers)


def _one_line(error):
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _split_crop(path):
    """'em.tif@3:9' -> ('em.tif', '3:9'); a path that exists as it stands has no crop."""
    file, at, crop_text = path.rpartition("@")
    if os.path.exists(path) or not at or not os.path.exists(file):
        return path, ""
    return file, crop_text


def _parse_crop(path, text, shape):
    """'z0:z1,y0:y1,x0:x1' -> three slices with start and stop, inside shape (Z, Y, X)."""
    parts = [p.strip() for p in text.split(",")] if text else []
    if len(parts) > 3:
        raise InputError(f"{path}: a crop has at most three axes z,y,x, got '{text}'")
    crop = []
    for axis, size, part in zip("zyx", shape, parts + [":"] * (3 - len(parts))):
        match = re.fullmatch(r"(\d{0,18})(:?)(\d{0,18})", part, re.ASCII)
        if not match or not part:
            raise InputError(f"{path}: crop '{part}' along {axis} is not understood; "
                             "wanted a:b, a:, :b, : or one integer, none negative")
        start = int(match[1] or 0)
        stop = start + 1 if not match[2] else int(match[3] or size)
        if not start < stop <= size:
            raise InputError(f"{path}: crop {part} along {axis} is empty or outside the file, "
                             f"whose {axis} runs over 0:{size}")
        crop.append(slice(start, stop))
    return tuple(crop)


def _native(path, dtype):
    """The dtype in which voxels are handed out: native byte order, bool as uint8."""
    if dtype is None or dtype.kind not in "buif" or dtype.itemsize > 8:
        raise InputError(f"{path}: voxels of type {dtype} cannot be read; "
                         "wanted integers or real numbers of 8 to 64 bits")
    return np.dtype(np.uint8) if dtype.kind == "b" else dtype.newbyteorder("=")


def _plausible(voxel_size):
    """(z, y, x) in nm as floats, or None where a side cannot be that of an EM voxel."""
    low, high = PLAUSIBLE_NM
    ok = all(math.isfinite(side) and low <= side <= high for side in voxel_size)
    return tuple(float(side) for side in voxel_size) if ok else None


# Sources: how boxes come out of files. A source has shape, dtype and read(z, y, x).

class _MappedSource:
    """Uncompressed voxels in one contiguous block, read through a memory map of what is asked for.

    shape and dtype are as stored, from byte offset; order transposes the stored axes to (Z, Y, X).
    A map of the whole file would count as memory of the process, page by page.
    """

    def __init__(self, file, dtype, shape, offset, order=(0, 1, 2)):
        self.dtype = _native(file, dtype)
        need, held = offset + math.prod(shape) * dtype.itemsize, os.path.getsize(file)
        if min(shape) < 1 or offset < 0:
            raise InputError(f"{file}: damaged header, it declares a volume of shape {shape}")
        if need > held:
            raise InputError(f"{file}: truncated, its header declares {shape} voxels of {dtype} "
                             f"({need} bytes) but the file holds {held} bytes")
        self.file, self.stored, self.offset = file, (dtype, shape), offset
        self.order = order
        self.shape = tuple(shape[axis] for axis in order)

    def read(self, *box):
        dtype, shape = self.stored
        first, *others = [box[self.order.index(axis)] for axis in range(3)]     # as stored
        count = first.stop - first.start
        if not count:
            return np.empty([part.stop - part.start for part in box], self.dtype)
        start = self.offset + first.start * math.prod(shape[1:]) * dtype.itemsize
        try:
            part = np.memmap(self.file, dtype, "r", start, (count, *shape[1:]))
        except ValueError as error:
            raise InputError(f"{self.file}: is shorter than when it was opened") from error
        part = part[:, others[0], others[1]]
        return np.array(part.transpose(self.order), dtype=self.dtype, order="C", subok=False)


class _PagedSource:
    """Slices that must be decoded whole: decode(z) -> (Y, X). The latest are kept: CACHE_BYTES of
    all sources together, or the last one."""

    cache, cached = OrderedDict(), 0            # (source, z) -> slice, the latest last; their bytes

    def __init__(self, name, shape, dtype, decode):
        self.name, self.shape, self.dtype, self.decode = name, shape, _native(name, dtype), decode

    def page(self, z):
        page = self.cache.get((self, z))
        if page is None:
            try:
                page = np.asarray(self.decode(z), self.dtype).reshape(self.shape[1:])
            except InputError:
                raise
            except Exception as error:
                raise InputError(f"{self.name}: slice {z} is damaged "
                                 f"({_one_line(error)})") from error
            self.cache[self, z] = page
            _PagedSource.cached += page.nbytes
        self.cache.move_to_end((self, z))
        while self.cached > CACHE_BYTES and len(self.cache) > 1:
            _PagedSource.cached -= self.cache.popitem(last=False)[1].nbytes
        return page

    def read(self, z, y, x):
        out = np.empty((z.stop - z.start, y.stop - y.start, x.stop - x.start), self.dtype)
        for i in range(len(out)):
            out[i] = self.page(z.start + i)[y, x]
        return out


class _TiffPages:
    """decode(z) of a compressed TIFF. Each process opens the file itself: a file position that is
    shared across a fork would let two workers read each other's bytes."""

    def __init__(self, file):
        self.file, self.process, self.pages = file, None, None

    def __getstate__(self):
        return {"file": self.file, "process": None, "pages": None}

    def __call__(self, z):
        if self.process != os.getpid():
            self.pages = list(tifffile.TiffFile(self.file).series[0].pages)
            self.process = os.getpid()
        try:
            return self.pages[z].asarray()
        except Exception as error:
            if isinstance(error, ImportError) or re.search("imagecodecs|not supported", str(error)):
                key = self.pages[z].keyframe
                raise InputError(
                    f"{self.file}: compression {key.compression.name} of {key.bitspersample} bits "
                    "needs a codec that is not installed; save it uncompressed or with Deflate, "
                    "8 or 16 bits") from error
            raise


def _open_tiff(file):
    """(source, voxel_size) of a TIFF file: memory-mapped where contiguous, else page by page."""
    logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)  # it reports what we report
    with tifffile.TiffFile(file) as tif:
        tif.filehandle.seek(tif.pages.next_page_offset)
        n = tif.tiff.offsetsize
        whole = tif.filehandle.read(n) == bytes(n)
        declared = math.prod(int(size[:18]) for size in re.findall(
            r'\bSize[ZCT]="(\d+)"', tif.ome_metadata or "")[:3])
        if declared > MOST_PAGES + len(tif.pages):      # tifffile makes a list of so many
            raise InputError(f"{file}: damaged or hostile, its OME header declares {declared:,} "
                             f"pages but the file holds {len(tif.pages)}")
        if not whole or not tif.series:
            raise InputError(f"{file}: truncated or damaged, its list of pages breaks off after "
                             f"{len(tif.pages)}")
        if len(tif.series) != 1:
            raise InputError(f"{file}: holds {len(tif.series)} images of different sizes or types; "
                             "save the one stack that is meant")
        series = tif.series[0]
        shape = _tiff_shape(file, series)
        dtype = series.dtype
        _native(file, dtype)
        voxel_size = _tiff_voxel_size(tif, shape)
        if series.dataoffset is not None and series.keyframe.is_final:
            source = _MappedSource(file, dtype.newbyteorder(tif.byteorder), shape,
                                   series.dataoffset)
        else:
            _check_pages(file, series, shape)
            source = _PagedSource(file, shape, dtype, _TiffPages(file))
    return source, voxel_size


def _tiff_shape(file, series):
    """(Z, Y, X) of a TIFF series, whatever its third axis is called."""
    sizes = {axis: n for axis, n in zip(series.axes, series.shape) if n != 1 or axis in "YX"}
    axes = f"axes {series.axes} {tuple(series.shape)}"
    if "S" in sizes or series.keyframe.samplesperpixel > 1:
        raise InputError(f"{file}: colour image, {axes}; wanted grey values (Fiji: Image > Type)")
    if "C" in sizes:
        raise InputError(f"{file}: {sizes['C']} channels, {axes}; wanted one "
                         "(Fiji: Image > Color > Split Channels, or Re-order Hyperstack)")
    if len(sizes) > 3 or len(sizes) < len(series.axes) - series.shape.count(1):
        raise InputError(f"{file}: {axes}; wanted one stack (Z, Y, X), not several in one file")
    if "".join(sizes)[-2:] != "YX" or min(sizes.values()) < 1 or series.is_multifile:
        raise InputError(f"{file}: {axes}; wanted one stack (Z, Y, X) in one file")
    return tuple(sizes.values()) if len(sizes) == 3 else (1, *sizes.values())


def _check_pages(file, series, shape):
    """Refuse pages that are missing, lie past the end of the file, or declare absurd sizes."""
    held, key = os.path.getsize(file), series.keyframe
    pages = list(series.pages)
    if len(pages) != shape[0] or None in pages:
        raise InputError(f"{file}: truncated or damaged, {shape[0]} slices declared, "
                         f"{len(pages) - pages.count(None)} found")
    declared = key.imagewidth * key.imagelength * key.bitspersample / 8
    chunks = math.prod(key.chunked)
    expansion = MAX_EXPANSION.get(int(key.compression), 100_000)
    for z, page in enumerate(pages):
        offsets, counts = page.dataoffsets, page.databytecounts
        end = max(map(operator.add, offsets, counts))
        if min(len(offsets), len(counts)) < chunks or end > held:
            raise InputError(f"{file}: truncated, slice {z} lies past the end of the file "
                             f"({held} bytes)")
        if declared > expansion * sum(counts):
            raise InputError(f"{file}: damaged or hostile, slice {z} declares {shape[1:]} voxels "
                             f"but stores {sum(counts)} bytes")


def _tiff_voxel_size(tif, shape):
    """(z, y, x) in nm from OME, ImageJ or plain resolution tags; None where they do not say."""
    try:
        if tif.is_ome:
            found = dict(re.findall(r'PhysicalSize([XYZ](?:Unit)?)="([^"]+)"', tif.ome_metadata))
            if "Z" not in found:
                found["Z"], found["ZUnit"] = found["X"], found.get("XUnit", "um")
            return _plausible([float(found[axis]) * UNIT_NM[found.get(axis + "Unit", "um").lower()]
                               for axis in "ZYX"])
        tags = tif.series[0].keyframe.tags
        y, x = (down / up for up, down in (tags["YResolution"].value, tags["XResolution"].value))
        metadata = tif.imagej_metadata or {}
        unit = str(metadata.get("unit", "")).replace("\\u00B5", "µ").lower()
        if unit in UNIT_NM:  # ImageJ leaves the spacing out when it is 1, and for a single slice
            spacing = abs(metadata.get("spacing", 1.0 if shape[0] > 1 else x))
            return _plausible([side * UNIT_NM[unit] for side in (spacing, y, x)])
        scale = {2: UNIT_NM["inch"], 3: UNIT_NM["cm"]}[int(tags["ResolutionUnit"].value)]
        return _plausible((x * scale, y * scale, x * scale))
    except (KeyError, ValueError, TypeError, ZeroDivisionError, OverflowError):
        return None


def _open_mrc(file):
    """(source, voxel_size) of an MRC file; IMOD's unsigned bytes; any order of the stored axes."""
    with open(file, "rb") as stream:
        start = stream.read(1024)
    if start[:2] == b"\x1f\x8b" or start[:3] == b"BZh":
        raise InputError(f"{file}: compressed with gzip or bzip2; decompress it first")
    plain = start[:92] + bytes(4) + start[96:]  # without the size of the extended header, which
    with warnings.catch_warnings():             # mrcfile would allocate
        warnings.simplefilter("ignore")  # wrong stamps and missing MAP ids are common and harmless
        header = mrcfile.mrcinterpreter.MrcInterpreter(io.BytesIO(plain), permissive=True,
                                                       header_only=True).header
    integer = header.dtype["mode"]  # int32 in the byte order of the file
    mode = int(header.mode)
    if mode == 0 and _mrc_sides_fit(file, start, integer.newbyteorder()) and not _mrc_sides_fit(
            file, start, integer):      # the stamp lies, which mrcfile knows from other modes only
        header, integer = header.view(header.dtype.newbyteorder()), integer.newbyteorder()
    types = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}
    if mode not in types:
        raise InputError(f"{file}: MRC mode {mode} cannot be read; wanted 0, 1, 2, 6 or 12 "
                         "(IMOD: newstack -mode)")
    dtype = np.dtype(types[mode]).newbyteorder(integer.byteorder)
    stamp, flags = np.frombuffer(header.tobytes(), integer, count=2, offset=152)
    if mode == 0 and stamp == 1146047817 and not flags & 1:
        dtype = np.dtype(np.uint8)  # imodStamp present, "bytes are signed" not set
    stored_axes = [int(header.maps), int(header.mapr), int(header.mapc)]  # 1, 2, 3 = x, y, z
    order = (0, 1, 2)
    if sorted(stored_axes) == [1, 2, 3]:
        order = tuple(stored_axes.index(axis) for axis in (3, 2, 1))
    shape = (int(header.nz), int(header.ny), int(header.nx))
    extended = int(np.frombuffer(start, integer, count=1, offset=92)[0])
    if extended < 0:
        raise InputError(f"{file}: damaged header, extended header of {extended} bytes")
    source = _MappedSource(file, dtype, shape, 1024 + extended, order)
    cell = [(float(header.cella[axis]), int(header["m" + axis])) for axis in "zyx"]
    return source, _plausible([length / n / 10 if n > 0 else 0 for length, n in cell])  # Å to nm


def _mrc_sides_fit(file, start, integer):
    """Whether the sides of an MRC header, read as this type, fit into the file."""
    sides = [int(side) for side in np.frombuffer(start, integer, count=3)]
    return min(sides) > 0 and 1024 + math.prod(sides) <= os.path.getsize(file)


def _open_npy(file):
    """(source, None) of an NPY file of 2 or 3 axes."""
    with open(file, "rb") as stream:
        start = stream.read(12)
    if start[:6] != b"\x93NUMPY":
        raise InputError(f"{file}: not readable, it is no NPY file")
    header = int.from_bytes(start[8:10 if start[6:7] == b"\1" else 12], "little")
    if header > os.path.getsize(file):          # NumPy would allocate it
        raise InputError(f"{file}: not readable, its header of {header} bytes is cut off")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes that overflow, before they are refused
        stored = np.load(file, mmap_mode="r", allow_pickle=False)
    if not isinstance(stored, np.memmap) or stored.ndim not in (2, 3):
        raise InputError(f"{file}: array of shape {np.shape(stored)}; wanted (Z, Y, X) or (Y, X)")
    shape = (1,) * (3 - stored.ndim) + stored.shape
    if stored.flags.c_contiguous:
        return _MappedSource(file, stored.dtype, shape, stored.offset), None
    return _MappedSource(file, stored.dtype, shape[::-1], stored.offset, order=(2, 1, 0)), None


def _open_slices(folder):
    """(source, voxel_size, numbers) of a folder of slices in natural order (2 before 10)."""
    names = [name for name in os.listdir(folder) if not name.startswith(".")
             and name.lower().endswith((*TIFF_EXTENSIONS, ".png"))]
    if not names:
        raise InputError(f"{folder}: no .tif, .tiff or .png slices in this folder")
    for name in names:
        if not os.path.isfile(os.path.join(folder, name)):      # to open a pipe would wait for ever
            raise InputError(f"{folder}: {name} is no file; wanted slices only")
    names.sort(key=lambda name: [int(part) if part.isdecimal() else part.lower()
                                 for part in re.split(r"(\d+)", name)])
    return _slice_stack(folder, [os.path.join(folder, name) for name in names])


def _slice_stack(name, files):
    """(source, voxel_size, numbers) of slice files; only their headers are read here."""
    is_png = files[0].lower().endswith(".png")
    depth, voxel_size, first = 1, None, None
    for file in files:
        if file.lower().endswith(".png") != is_png:
            raise InputError(f"{name}: mixes TIFF and PNG slices ({os.path.basename(files[0])}, "
                             f"{os.path.basename(file)}); wanted one type in a folder")
        if is_png:
            shape, bits = _png_header(file)
            depth, dtype = max(depth, bits), np.dtype(np.uint16 if bits == 16 else np.uint8)
        else:
            try:
                source, size = _open_tiff(file)
            except InputError:
                raise
            except Exception as error:
                raise InputError(f"{file}: not readable ({_one_line(error)})") from error
            shape, dtype = source.shape[1:], source.dtype
            voxel_size = size if first is None else voxel_size
            if source.shape[0] != 1:
                raise InputError(f"{file}: {source.shape[0]} pages; wanted one slice in each file "
                                 "of a folder")
        first = first or (shape, dtype)
        if first != (shape, dtype):
            raise InputError(f"{name}: {os.path.basename(file)} is {shape} {dtype} but "
                             f"{os.path.basename(files[0])} is {first[0]} {first[1]}; "
                             "wanted the same size and type in all slices")
    decode = functools.partial(_decode_slice, files, depth)
    found = [re.findall(r"\d+", os.path.splitext(os.path.basename(file))[0]) for file in files]
    numbers = tuple(int(digits[-1]) for digits in found if digits)
    if len(set(numbers)) < len(files):
        numbers = None
    return _PagedSource(name, (len(files), *shape), dtype, decode), voxel_size, numbers


def _decode_slice(files, depth, z):
    if files[z].lower().endswith(".png"):
        return _read_png(files[z], depth)
    source, _ = _open_tiff(files[z])
    return source.read(*(slice(0, size) for size in source.shape))[0]


def _png_header(file):
    """((Y, X), bits) from a PNG's IHDR chunk; the samples of a palette have 8 bits."""
    with open(file, "rb") as stream:
        head = stream.read(33)
    if len(head) < 33 or head[:8] != b"\x89PNG\r\n\x1a\n" or head[12:16] != b"IHDR":
        raise InputError(f"{file}: not a PNG file, or truncated")
    X, Y, bits, colour, *_, crc = struct.unpack(">IIBBBBBI", head[16:])
    if zlib.crc32(head[12:29]) != crc or min(X, Y) < 1 or colour not in (0, 2, 3, 4, 6):
        raise InputError(f"{file}: damaged PNG header")
    if colour != 0 and bits == 16:
        raise InputError(f"{file}: colour image of 16 bits; save it as 16-bit grey")
    if Y * X * bits / 8 > 2000 * os.path.getsize(file):
        raise InputError(f"{file}: damaged or hostile, declares {Y} x {X} pixels in "
                         f"{os.path.getsize(file)} bytes")
    return (Y, X), bits if colour == 0 else 8


def _read_png(file, depth):
    """(Y, X) grey values of a PNG, on the scale of `depth` bits, the largest in its folder.

    PNG defines the brightest sample as white whatever the depth, so that in a folder of masks of
    which some were saved with 1 bit and others with 8, foreground is 255 in all.
    """
    with open(file, "rb") as stream:
        data = stream.read()
    position, kind = 8, None
    while kind != b"IEND":  # the decoder below skips the checksums of image data
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        if zlib.crc32(data[position + 4:end]) != struct.unpack_from(">I", data, end)[0]:
            raise InputError(f"{file}: damaged PNG, wrong checksum at byte {position}")
        position = end + 4
    image = imread(io.BytesIO(data), format="png")  # floats 0..1; (Y, X), or (Y, X, 3 or 4)
    if image.ndim == 3:
        if (image[..., 1:3] != image[..., :1]).any():
            raise InputError(f"{file}: colour image; wanted grey values (Fiji: Image > Type)")
        image = image[..., 0]
    return np.rint(image * (2**depth - 1))


def as_uint8(volume, equalize=False):
    """A lazy uint8 version of a LazyArray.

    uint8 stays, int8 is shifted by 128, anything else is stretched linearly so that the 0.1 and
    99.9 percentiles of a sample (at most 16 slices, about 4 million voxels) become 0 and 255.
    equalize=True equalises the histogram of every slice (Pagano 2023, section 2.1.2); the
    table of a slice comes from the whole slice, so a crop equals the crop of the equalised slice.
    Raises InputError that names path and slice where voxels are NaN or infinite.
    """
    volume = volume if volume.dtype == np.uint8 else _Stretched(volume)
    return _Equalized(volume) if equalize else volume


class _Stretched(LazyArray):
    def __init__(self, volume):
        super().__init__(volume.path, volume.shape, np.uint8, volume.voxel_size)
        self.volume = volume
        self.compute = np.float32 if volume.dtype.itemsize <= 2 else np.float64
        if volume.dtype == np.int8:
            self.low, self.high = -128.0, 127.0
        else:
            self.low, self.high = self._percentiles()

    def _percentiles(self):
        Z, Y, X = self.shape
        n = min(Z, 16)
        step = math.ceil(math.sqrt(n * Y * X / 4e6))
        sample = []
        for z in (np.arange(n) * Z + Z // 2) // n:
            sample.append(self._checked(self.volume[z][None], z)[:, ::step, ::step].ravel())
        sample = np.concatenate(sample)
        low, high = np.percentile(sample, (0.1, 99.9))
        if low == high:  # a few bright voxels on a constant ground
            low, high = sample.min(), sample.max()
        return float(low), float(high)

    def _checked(self, box, z):
        if self.volume.dtype.kind == "f":
            check_finite(box, z, self.path)
        return box.astype(self.compute)

    def read(self, z, y, x):
        box = self._checked(self.volume.read(z, y, x), z.start)
        box -= self.low
        box *= 255 / (self.high - self.low) if self.high > self.low else 1.0
        return np.rint(box.clip(0, 255, out=box), out=box).astype(np.uint8)


def check_finite(volume, first=0, path=None):
    """Raise InputError, naming path and slice, where floats (Z, Y, X) hold NaN or infinite values,
    or such that a difference of two overflows.

    volume: a LazyArray, read slice by slice, or an array that begins with slice `first` of `path`.
    """
    for z in range(len(volume)):
        page = volume[z]
        good = np.abs(page) < 1e300 if page.itemsize == 8 else np.isfinite(page)
        if not good.all():
            what = "values beyond 1e300" if np.isfinite(page).all() else "NaN or infinite values"
            raise InputError(f"{path or volume.path}: slice {first + z} holds {what}; replace them "
                             "before use")


class _Equalized(LazyArray):
    def __init__(self, volume):
        super().__init__(volume.path, volume.shape, np.uint8, volume.voxel_size)
        self.volume, self.tables = volume, {}

    def _table(self, z):
        if z not in self.tables:
            below = np.cumsum(_count_values(self.volume[z])).astype(np.float64)
            lowest = below[np.flatnonzero(below)[0]]  # voxels of the darkest grey value
            scale = 255 / (below[-1] - lowest) if below[-1] > lowest else 0.0
            table = np.clip(np.rint((below - lowest) * scale), 0, 255).astype(np.uint8)
            self.tables[z] = table
        return self.tables[z]

    def read(self, z, y, x):
        box = self.volume.read(z, y, x)
        for i, page in enumerate(box):
            box[i] = self._table(z.start + i)[page]
        return box


def standardize(volume):
    """A lazy uint8 version of a uint8 LazyArray whose mean is 128 and whose standard deviation 40.

    Measured on at most 32 evenly spaced slices; what lies beyond 3.2 deviations is clipped.
    """
    return _Standardized(volume)


STANDARD = {"mean": 128.0, "std": 40.0}     # of what standardize returns


class _Standardized(LazyArray):
    def __init__(self, volume):
        super().__init__(volume.path, volume.shape, np.uint8, volume.voxel_size)
        self.volume = volume
        zs = np.unique(np.linspace(0, len(volume) - 1, 32).round().astype(int))
        share = sum(_count_values(volume[z]) for z in zs) / (len(zs) * math.prod(volume.shape[1:]))
        grey = np.arange(256)
        mean = (share * grey).sum()
        std = max(1e-3, math.sqrt((share * (grey - mean) ** 2).sum()))
        table = STANDARD["mean"] + STANDARD["std"] * (grey - mean) / std
        self.table = np.clip(np.rint(table), 0, 255).astype(np.uint8)

    def read(self, z, y, x):
        return self.table[self.volume.read(z, y, x)]


def _count_values(array):
    """Voxels of each value of an array of integers from 0 on: int64 (256,) or (65536,) for uint8 or
    uint16, else up to the largest value."""
    flat = array.ravel()
    if array.itemsize > 2:
        return np.bincount(flat)
    parts = np.array_split(flat, 1 + flat.size // 2**22)  # bincount makes an int64 copy
    return sum(np.bincount(part, minlength=2 ** (8 * array.itemsize)) for part in parts)


def downsample(array, factor, reduce):
    """A LazyArray `factor` times smaller in Y and X: (Z, ceil(Y / factor), ceil(X / factor)).

    reduce="mean" for images (integers are rounded), "majority" for class ids: the most frequent
    value of each block, the lower one at a tie, IGNORE like any other. Blocks that stick out are
    filled by repeating the edge. Labels keep their `slices`. Raises InputError where a slice is
    smaller than a block.
    """
    if reduce not in ("mean", "majority"):
        raise ValueError(f"reduce is 'mean' or 'majority', got {reduce!r}")
    if factor > max(1, *array.shape[1:]):
        raise InputError(f"--downsample {factor}: {array.path} has slices of {array.shape[1]} x "
                         f"{array.shape[2]} pixels; give a smaller factor")
    return array if factor == 1 else _Downsampled(array, factor, reduce)


class _Downsampled(LazyArray):
    def __init__(self, array, factor, reduce):
        Z, Y, X = array.shape
        size = array.voxel_size and (array.voxel_size[0], array.voxel_size[1] * factor,
                                     array.voxel_size[2] * factor)
        super().__init__(array.path, (Z, -(-Y // factor), -(-X // factor)), array.dtype, size)
        self.array, self.factor, self.reduce = array, factor, reduce
        if hasattr(array, "slices"):
            self.slices = array.slices

    def read(self, z, y, x):
        n = self.factor
        _, Y, X = self.array.shape
        shape = (z.stop - z.start, y.stop - y.start, x.stop - x.start)
        box = self.array.read(z, slice(min(y.start * n, Y), min(y.stop * n, Y)),
                              slice(min(x.start * n, X), min(x.stop * n, X)))
        if box.size == 0:
            return np.empty(shape, self.dtype)
        pad = ((0, 0), (0, shape[1] * n - box.shape[1]), (0, shape[2] * n - box.shape[2]))
        if box.shape[1:] != (shape[1] * n, shape[2] * n):
            box = np.pad(box, pad, mode="edge")
        if self.reduce == "mean":
            mean = _sum_blocks(box, n, np.int32 if box.itemsize == 1 else np.float64) / n**2
            return (np.floor(mean + 0.5) if self.dtype.kind in "iu" else mean).astype(self.dtype)
        most, winner = np.zeros(shape, np.int32), np.zeros(shape, self.dtype)
        found = np.flatnonzero(_count_values(box)) if box.dtype == np.uint8 else np.unique(box)
        for value in found:  # ascending, so that a tie stays with the lower id
            votes = _sum_blocks(box == value, n, np.int32)
            winner[votes > most] = value
            np.maximum(most, votes, out=most)
        return winner


def _sum_blocks(box, n, dtype):
    """Sums of the n x n pixels of each block, (Z, Y, X) -> (Z, Y / n, X / n)."""
    rows = sum(box[:, k::n].astype(dtype) for k in range(n))
    return sum(rows[..., k::n] for k in range(n))           # far faster than over both axes at once


def resize(array, shape, linear):
    """A LazyArray of another shape (Z, Y, X) over the same field of view.

    linear=True interpolates between the two nearest voxels along each axis (images; integers are
    rounded), else the nearest voxel counts (class ids). Voxel centres are what is aligned. Labels
    keep their `slices`: those whose nearest slice is annotated.
    """
    return array if array.shape == tuple(shape) else _Resized(array, shape, linear)


def resampling(size, length):
    """Where `length` new voxels lie among `size` old ones: (low, high, share of high), each
    (length,)."""
    place = np.clip((np.arange(length) + 0.5) * size / length - 0.5, 0, size - 1)
    low = place.astype(int)
    return low, np.ceil(place).astype(int), (place - low).astype(np.float32)


class _Resized(LazyArray):
    def __init__(self, array, shape, linear):
        sides = array.voxel_size and tuple(
            side * old / new for side, old, new in zip(array.voxel_size, array.shape, shape))
        super().__init__(array.path, shape, array.dtype, sides)
        self.array, self.linear = array, linear
        self.places = [resampling(old, new) for old, new in zip(array.shape, shape)]
        self.nearest = [(2 * np.arange(new) + 1) * old // (2 * new)
                        for old, new in zip(array.shape, shape)]
        if hasattr(array, "slices"):
            self.slices = np.flatnonzero(np.isin(self.nearest[0], array.slices))

    def read(self, z, y, x):
        out = np.empty([axis.stop - axis.start for axis in (z, y, x)], self.dtype)
        for i in range(len(out) if out.size else 0):        # slices in between are not read
            box = (slice(z.start + i, z.start + i + 1), y, x)
            out[i] = (self._interpolated(box) if self.linear else self._nearest(box))[0]
        return out

    def _nearest(self, box):
        places = [nearest[axis] for nearest, axis in zip(self.nearest, box)]
        old = self.array.read(*(slice(place[0], place[-1] + 1) for place in places))
        return old[np.ix_(*(place - place[0] for place in places))]

    def _interpolated(self, box):
        places = [[part[axis] for part in place] for place, axis in zip(self.places, box)]
        new = self.array.read(*(slice(low[0], high[-1] + 1) for low, high, _ in places))
        new = new.astype(np.float32)
        for axis, (low, high, share) in enumerate(places):
            below, above = (new.take(place - low[0], axis) for place in (low, high))
            new = below + (above - below) * share.reshape([-1, 1, 1][: 3 - axis])
        return np.rint(new) if self.dtype.kind in "iu" else new


def parse_slices(text, depth):
    """Slice numbers from text, as a sorted int array within 0..depth - 1.

    "0:165:5" (start:stop:step, stop left out of the set), "0,40,80", mixtures "0:10,40", "every=5",
    which is 0:depth:5, or "n=7": seven evenly spaced slices, each in the middle of its seventh of
    the volume, that is round((i + 0.5) * depth / 7 - 0.5) for i = 0..6; n=1 is the middle slice.
    Raises InputError for text that is malformed, empty, repeats a slice or leaves the volume.
    """
    text = text.strip()
    every = re.fullmatch(r"every\s*=\s*([1-9]\d{0,17})", text)
    if every:
        return np.arange(0, depth, int(every[1]))
    even = re.fullmatch(r"n\s*=\s*(\d{1,18})", text)
    if even:
        n = int(even[1])
        if not 1 <= n <= depth:
            raise InputError(f"slices '{text}': wanted 1 to {depth}, the slices of the volume")
        return np.array([round((i + 0.5) * depth / n - 0.5) for i in range(n)])
    chosen = []
    for part in text.split(","):
        match = re.fullmatch(
            r"\s*(\d{1,18})\s*|\s*(\d{0,18})\s*:\s*(\d{0,18})\s*(?::\s*(\d{0,18})\s*)?", part)
        if not match:
            raise InputError(f"slices '{text}': '{part.strip()}' is not understood; wanted "
                             "start:stop:step, numbers with commas between, n=7 or every=5")
        single, start, stop, step = match.groups()
        first = int(single or start or 0)
        last = first + 1 if single else int(stop or depth)
        found = range(first, last, int(step or 1)) if step != "0" else range(0)
        if last > depth or not found:
            raise InputError(f"slices '{text}': '{part.strip()}' is empty or outside the volume, "
                             f"whose slices are 0:{depth}")
        chosen += found
    repeated = [z for z, times in Counter(chosen).items() if times > 1]
    if repeated:
        raise InputError(f"slices '{text}': slice {repeated[0]} is named twice")
    return np.array(sorted(chosen))


def parse_label_map(text):
    """'191=1,223=2,*=0' -> {191: 1, 223: 2, "*": 0}; * stands for all values not named.

    '128:256=1' maps the values 128 to 255, as in slices. Class ids are 0 to 254; 255 (IGNORE) marks
    values that no loss and no metric shall see.
    """
    mapping = {}
    for part in text.split(","):
        match = re.fullmatch(
            r"\s*(-?\d{1,19}|\*)\s*(?::\s*(-?\d{1,19})\s*)?=\s*(\d{1,3})\s*", part)
        values, count, target = [], 0, int(match[3]) if match else 0
        if match and match[1] == "*":
            values, count = ["*"], 1
        elif match:
            first = int(match[1])
            stop = first + 1 if match[2] is None else int(match[2])
            values, count = range(first, stop), stop - first
        if not 0 < count <= 2**16 or (values == ["*"] and match[2]) or target > IGNORE:
            raise InputError(f"label map '{text}': '{part.strip()}' is not understood; wanted "
                             "value=class or first:stop=class with classes 0 to 254, or 255 to "
                             "ignore: '191=1,*=0'")
        for value in values:
            if value in mapping:
                raise InputError(f"label map '{text}': {value} is mapped twice")
            mapping[value] = target
    return mapping


class Labels(LazyArray):
    """Class ids of a volume, lazy uint8 (Z, Y, X), IGNORE where nobody annotated; see open_labels.

    slices: sorted int array of the annotated z. counts: (Z, n_classes) int64, annotated voxels of
    each class in each slice.
    """

    def __init__(self, source, rows, voxel_size, values, ids, counts):
        super().__init__(source.path, (len(rows), *source.shape[1:]), np.uint8, voxel_size)
        self.source = source  # raw values of the annotated slices
        self.rows = rows  # (Z,) slice of source for each z, -1 where not annotated
        self.values, self.ids, self.counts = values, ids, counts  # values sorted; ids of values
        self.slices = np.flatnonzero(rows >= 0)
        self.table = None
        if source.dtype.kind in "iu" and source.dtype.itemsize <= 2:
            self.table = np.full(2 ** (8 * source.dtype.itemsize), IGNORE, np.uint8)
            self.table[values % len(self.table)] = ids  # a negative value is its unsigned bits

    def read(self, z, y, x):
        out = np.full((z.stop - z.start, y.stop - y.start, x.stop - x.start), IGNORE, np.uint8)
        for i, row in enumerate(self.rows[z]):
            if row >= 0:
                raw = self.source.read(slice(row, row + 1), y, x)[0]
                if self.table is not None:
                    out[i] = self.table[_unsigned(raw)]
                else:
                    known = np.searchsorted(self.values, raw).clip(max=len(self.values) - 1)
                    out[i] = np.where(self.values[known] == raw, self.ids[known], IGNORE)
        return out


def parse_merge(text, n_classes):
    """'3=1,4=1' -> [0, 1, 2, 1, 1]: the class as which an annotator drew each of the n classes.

    Raises InputError for unknown classes, and for a class that takes in others but is itself merged
    away: a file would not tell whether its labels are merged already. At least one class is merged,
    at least two labels are left.
    """
    merge = list(range(n_classes))
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,18})\s*=\s*(\d{1,18})\s*", part, re.ASCII)
        if not match:
            raise InputError(f"merge '{text}': '{part.strip()}' is not understood; wanted "
                             "class=class it was drawn as: '3=1,4=1'")
        source, target = int(match[1]), int(match[2])
        if max(source, target) >= n_classes:
            raise InputError(f"merge '{text}': class {max(source, target)} is outside the "
                             f"{n_classes} classes 0 to {n_classes - 1}")
        if merge[source] != source:
            raise InputError(f"merge '{text}': class {source} is merged twice")
        merge[source] = target
    for source, target in enumerate(merge):
        if merge[target] != target:
            raise InputError(f"merge '{text}': class {source} goes to {target}, which is merged "
                             f"itself; name a class that is left")
    if len(set(merge)) == n_classes:
        raise InputError(f"merge '{text}': merges nothing; a fully labelled volume goes to "
                         f"--volume")
    if len(set(merge)) == 1:
        raise InputError(f"merge '{text}': leaves one label for everything, which teaches nothing")
    return merge


def open_labels(label_paths, volumes, classes=None, label_map=None, ignore_label=None,
                label_slices=None, require_foreground=True, merge=None, tallies=None,
                flag="--label-map"):
    """Labels of opened Volumes: (list of Labels, number of classes).

    classes: how many, where that is known (from the training labels or a checkpoint). label_map:
    from parse_label_map. ignore_label: raw value, or tuple of raw values, that becomes IGNORE.
    label_slices: text for parse_slices, the annotated slices to use. merge: from parse_merge,
    applied last. tallies: for each label, what count_pairs found in it; default: it is read. flag:
    the option that advice on the values names. Without a map,
    values 0..K stand as they are and {0, v} is background and foreground (also where two labels are
    left by the merge and v is no class id); other values are an InputError that lists them.

    A label folder with fewer files than the volume's has slices is paired by the number in each
    file's name: with the numbers of the image files, or as z where the volume is one file. Raises
    InputError for what does not fit, and for labels without foreground if require_foreground.
    """
    if len(label_paths) != len(volumes):
        raise InputError(f"{len(volumes)} volumes but {len(label_paths)} labels; wanted one label "
                         "for each volume, in the same order")
    raw = []
    for path, volume, tally in zip(label_paths, volumes, tallies or [None] * len(volumes)):
        source, rows = pair_labels(path, volume, label_slices)
        tally = _scan_labels(source, rows) if tally is None else tally
        values = np.unique(np.concatenate([found for found, _ in tally.values()]))
        raw.append((source, rows, values, tally))
    ignored = ignore_label if isinstance(ignore_label, tuple) else (ignore_label,)
    union = sorted({int(v) for _, _, values, _ in raw for v in values} - {*ignored})
    if label_map is not None:
        mapped = [target for target in label_map.values() if target != IGNORE]
        n_classes = classes or max([1, *mapped]) + 1
    else:
        n_classes = classes or decide_classes(union, [source.path for source, *_ in raw], flag)
    merge = np.arange(IGNORE + 1, dtype=np.uint8) if merge is None else np.array(
        [*merge, *range(n_classes, IGNORE + 1)], np.uint8)
    left = sorted(set(merge[:n_classes].tolist()))
    mask_class = left[1] if len(left) == 2 and left[0] == 0 else None
    labels = []
    for (source, rows, values, tally), volume in zip(raw, volumes):
        ids = merge[_class_ids(source.path, values, n_classes, label_map, ignored, mask_class,
                               flag)]
        counts = np.zeros((len(rows), n_classes), np.int64)
        for z, (found, voxels) in tally.items():
            id_of = ids[np.searchsorted(values, found)]
            np.add.at(counts[z], id_of[id_of != IGNORE], voxels[id_of != IGNORE])
        labels.append(Labels(source, rows, volume.voxel_size, values, ids, counts))
    if require_foreground and not sum(label.counts[:, 1:].sum() for label in labels):
        advice = "see --label-map and --label-slices" if len(left) == n_classes else (
            f"of the merged labels it should show {_listed(left[1:])}: see --label-map, or save a "
            "mask as 0 and 255")
        raise InputError(f"{', '.join(label.path for label in labels)}: no foreground, all voxels "
                         f"are background or ignored (values {_listed(union) or 'none left'}); "
                         f"{advice}")
    return labels, n_classes


def pair_labels(path, volume, label_slices=None):
    """(label Volume, rows): rows[z] is the label slice of the volume's slice z, -1 for none.

    label_slices: text for parse_slices, of the slices to use. See open_labels, which maps values.
    """
    source, rows = _pair_labels(os.fspath(path), volume)
    return source, rows if label_slices is None else _choose_slices(source.path, rows, label_slices)


def _pair_labels(path, volume):
    file, crop_text = _split_crop(path)
    label = open_volume(file)
    depth = volume.file_shape[0]
    if label.format != "slices" or label.file_shape[0] >= depth:
        label = open_volume(path)
        if label.shape != volume.shape:
            turned = sorted(label.shape) == sorted(volume.shape)
            advice = ("the axes of one of them are in another order, wanted (Z, Y, X)" if turned
                      else "crop both alike with @z0:z1,y0:y1,x0:x1")
            raise InputError(f"{path}: labels of shape {label.shape} do not fit {volume.path} of "
                             f"shape {volume.shape}; {advice}")
        return label, np.arange(len(label))
    if label.numbers is None:
        raise InputError(f"{path}: {label.file_shape[0]} label slices for {depth} image slices "
                         "are paired by the numbers in their names; give each its own number")
    names = volume.numbers or range(depth)
    z_of_number = {number: z for z, number in enumerate(names)}
    for number in label.numbers:
        if number not in z_of_number:
            raise InputError(f"{path}: the label slice with number {number} matches no slice of "
                             f"{volume.path}, numbered {min(names)} to {max(names)}")
    crop = volume.crop
    if crop_text:
        crop = _parse_crop(path, crop_text, (depth, *label.file_shape[1:]))
    elif label.file_shape[1:] != volume.file_shape[1:]:
        crop = (crop[0], *label.crop[1:])  # the label slices were drawn on the crop
    label = Volume(path, "slices", label.source, label.voxel_size, (label.crop[0], *crop[1:]),
                   label.numbers)
    shape = (crop[0].stop - crop[0].start, *label.shape[1:])
    if shape != volume.shape:
        raise InputError(f"{path}: labels of shape {shape} do not fit {volume.path} of shape "
                         f"{volume.shape}; crop both alike with @z0:z1,y0:y1,x0:x1")
    rows = np.full(depth, -1)
    rows[[z_of_number[number] for number in label.numbers]] = np.arange(len(label))
    rows = rows[crop[0]]
    if rows.max() < 0:
        raise InputError(f"{path}: none of its slices lies in {volume.path}")
    return label, rows


def _choose_slices(path, rows, text):
    """rows with only the slices in text left; asking for a slice that has no label is an error."""
    try:
        chosen = parse_slices(text, len(rows))
    except InputError as error:
        raise InputError(f"--label-slices, of {path}: {error}")
    missing = chosen[rows[chosen] < 0]
    if len(missing):
        raise InputError(f"{path}: --label-slices {text} asks for slice {missing[0]}, which has no "
                         f"label; labelled are {_listed(np.flatnonzero(rows >= 0))}")
    kept = np.full_like(rows, -1)
    kept[chosen] = rows[chosen]
    return kept


def _unsigned(array):
    return array.view(f"u{array.itemsize}")


def _scan_labels(source, rows):
    """{z: (values, voxels)} of the annotated slices: the raw values and how often they occur."""
    tallies = {}
    for z in np.flatnonzero(rows >= 0):
        values, ranks = _ranked(source, rows[z])
        counts = _count_values(ranks)
        found = np.flatnonzero(counts)
        tallies[z] = values[found], counts[found]
    return tallies


def count_pairs(source, rows, volume, progress=None):
    """Read a label and a volume alike, a prediction, once, slice by slice: their pairs of values.

    source, rows: from pair_labels; progress(done, total) is told about slices. Returns {z: (label
    values, volume values, voxels)} of the annotated slices, int64 arrays of one length, and the
    tallies of each, as open_labels takes them. Raises InputError where a voxel is no whole number.
    """
    pairs, of_label, of_volume = {}, {}, {}
    slices = np.flatnonzero(rows >= 0)
    for done, z in enumerate(slices, 1):
        (values_l, ranks_l), (values_v, ranks_v) = _ranked(source, rows[z]), _ranked(volume, z)
        n = len(values_v)
        index = np.uint16 if n < 2**16 and len(values_l) * n <= 2**16 else np.int64
        index = ranks_l.astype(index) * index(n) + ranks_v.astype(index)
        if len(values_l) * n <= 2**24:
            counts = _count_values(index)
            found = np.flatnonzero(counts)
            counts = counts[found]
        else:
            found, counts = np.unique(index, return_counts=True)
        pairs[z] = values_l[found // n], values_v[found % n], counts
        for tally, values in ((of_label, pairs[z][0]), (of_volume, pairs[z][1])):
            own, inverse = np.unique(values, return_inverse=True)
            tally[z] = own, np.bincount(inverse, counts).astype(np.int64)
        if progress:
            progress(done, len(slices))
    return pairs, of_label, of_volume


def _ranked(volume, z):
    """The values of slice z, int64 (n,), and for each voxel the number of its own (Y, X), unsigned.
    Some of the values may not occur. Raises InputError where a voxel is no whole number."""
    page = volume[z]
    if page.dtype.kind == "f" and not (np.isfinite(page) & (page == np.rint(page))).all():
        raise InputError(f"{volume.path}: slice {z} holds values that are not whole numbers; "
                         "wanted class ids, not an image or a probability, of which a threshold "
                         "makes ids")
    if page.dtype.kind != "i" and page.itemsize > 2 and page.max() >= 2**63 or (
            page.dtype.kind == "f" and page.min() < -(2**63)):
        raise InputError(f"{volume.path}: slice {z} holds values beyond 2^63; wanted class ids")
    if page.itemsize == 1:
        return np.arange(256, dtype=np.uint8).view(page.dtype).astype(np.int64), _unsigned(page)
    page = page.astype(np.int64)
    low = page.min()
    if int(page.max()) - int(low) >= 2**16:
        values, ranks = np.unique(page, return_inverse=True)
        return values, ranks.reshape(page.shape).astype(np.uint32)
    page = (page - low).astype(np.uint16)               # a table is far faster than to sort
    found = np.flatnonzero(_count_values(page))
    table = np.zeros(2**16, np.uint16)
    table[found] = np.arange(len(found))
    return found + low, table[page]


def _listed(values, most=12):
    shown = ", ".join(str(v) for v in list(values)[:most])
    return shown + (f", … ({len(values)} in all)" if len(values) > most else "")


def _values_error(path, values, problem, n_classes=None, flag="--label-map"):
    """InputError that lists the label values and shows the flags that would settle them."""
    if len(values) > 255:
        return InputError(f"{path}: {len(values)} different label values; looks like instance ids, "
                          f'wanted class ids: {flag} "0=0,*=1" makes one foreground class')
    first = sorted(values, key=lambda value: value != 0)[:12]           # 0 stays background
    pairs = ",".join(f"{v}={i}" for i, v in enumerate(first))
    if len(values) > 12:
        smooth = 0 <= min(values) and 128 <= max(values) <= 255        # the borders of a 0/255 mask
        pairs = "128:256=1,*=0" if smooth else f"{pairs},*=0"
    elif n_classes == 2:
        pairs = "0=0,*=1"
    advice = f'map them, for example {flag}="{pairs}"'
    if n_classes is None and 0 <= values[0] and values[-1] < IGNORE:
        advice += ", or name all classes, missing ones too, with --classes"
    if n_classes == 2 and len(values) > 2:
        advice += ", or name all classes with --classes"
    if IGNORE in values and flag == "--label-map":
        advice += ", or --ignore-label 255 if that marks voxels nobody annotated"
    kind = "label" if flag == "--label-map" else "predicted"
    return InputError(f"{path}: {kind} values {_listed(values)}: {problem}; {advice}")


def decide_classes(union, paths, flag="--label-map"):
    """Number of classes from the values in all labels: {0, v} is 2, 0..K is K + 1. Raises
    InputError for other values, with advice on the option `flag`."""
    if len([v for v in union if v != 0]) <= 1 and min(union, default=0) >= 0:
        return 2
    if union != list(range(len(union))) or len(union) > 255:
        raise _values_error(", ".join(paths), union, "neither 0..K without gaps nor a mask {0, v}",
                            flag=flag)
    return len(union)


def _class_ids(path, values, n_classes, label_map, ignored, mask_class, flag):
    """(len(values),) uint8: the class id of each raw value, IGNORE for those to leave out.

    mask_class: the class that the foreground of a mask {0, v} is, or None.
    """
    used = [int(v) for v in values if v not in ignored]
    if label_map is not None:
        too_high = [t for t in label_map.values() if n_classes <= t != IGNORE]
        if too_high:
            raise InputError(f"label map: class {too_high[0]} is outside the {n_classes} classes "
                             f"0 to {n_classes - 1}")
        unmapped = [v for v in used if v not in label_map and "*" not in label_map]
        if unmapped:
            raise InputError(f"{path}: label values {_listed(unmapped)} are not in the label map "
                             f"({flag}); map them too, or add *=0 for all the rest")
        id_of = {v: label_map.get(v, label_map.get("*")) for v in used}
    elif mask_class and len([v for v in used if v != 0]) <= 1 and min(used, default=0) >= 0 and (
            n_classes == 2 or max(used, default=0) >= n_classes):
        id_of = {v: mask_class if v else 0 for v in used}
    elif n_classes == 2 or min(used, default=0) < 0 or max(used, default=0) >= n_classes:
        raise _values_error(path, used, f"wanted class ids 0 to {n_classes - 1}", n_classes, flag)
    else:
        id_of = {v: v for v in used}
    return np.array([id_of.get(int(v), IGNORE) for v in values], np.uint8)


class VolumeWriter:
    """A volume file being written: writer[z0:z1] = slab, in any order; see create_volume."""

    def __init__(self, path, dtype, shape, offset, owner):
        self.path, self.dtype, self.shape = path, dtype, shape
        self.offset, self.owner = offset, owner  # byte of the first voxel; whether this one renames
        self.nbytes = math.prod(shape) * dtype.itemsize
        self.temporary = _temporary(path)
        self.stream = open(self.temporary, "r+b")

    def __setitem__(self, index, slab):
        start, stop, step = index.indices(self.shape[0])
        slab = np.ascontiguousarray(slab, self.dtype)
        if step != 1 or slab.shape != (stop - start, *self.shape[1:]):
            raise ValueError(f"{self.path}: slab of shape {slab.shape} for slices {start}:{stop} "
                             f"of a volume of shape {self.shape}")
        with _disk_errors(self.path):
            position = start * math.prod(self.shape[1:]) * self.dtype.itemsize
            self.stream.seek(self.offset + position)
            self.stream.write(slab.data.cast("B") if slab.size else b"")
            self.stream.flush()

    def close(self):
        """Finish: the process that created the file renames it to its path, the others let go."""
        with _disk_errors(self.path):
            os.fsync(self.stream.fileno())
            self.stream.close()
            if self.owner:
                os.replace(self.temporary, self.path)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if kind is None:
            with _removed_on_failure(self.temporary) if self.owner else contextlib.nullcontext():
                return self.close()
        with contextlib.suppress(OSError):      # closing flushes, which a full disk refuses again
            self.stream.close()
        if self.owner:
            with contextlib.suppress(OSError):
                os.remove(self.temporary)


def create_volume(path, shape, dtype, voxel_size=None, max_value=255, attach=False, promised=0):
    """Create a .tif or .mrc file for a volume larger than memory: a VolumeWriter, to use in `with`.

    shape (Z, Y, X), or (Z, C, Y, X) for a TIFF of several channels; dtype uint8, uint16 or float32;
    voxel_size (z, y, x) in nm or None. The voxels go to a temporary file beside path, renamed when
    the block ends and removed when it ends by an exception. Several processes can fill one file:
    the first creates it, then the others call this with attach=True, and the first may leave the
    block only after the others have. promised: bytes on the same disk that other files still need,
    which like this one take their room as they are filled. MRC has no unsigned bytes: uint8 is
    stored as int8 where max_value <= 127, else as uint16. TIFF carries ImageJ metadata, or OME
    above 4 GB. Raises InputError where the folder is missing or the disk too small, before anything
    is written.
    """
    path, shape, dtype = os.fspath(path), tuple(shape), np.dtype(dtype)
    extension = os.path.splitext(path)[1].lower()
    is_mrc = extension in MRC_EXTENSIONS
    if is_mrc and dtype == np.uint8:
        dtype = np.dtype(np.int8 if max_value <= 127 else np.uint16)
    if not is_mrc and extension not in TIFF_EXTENSIONS:
        raise InputError(f"{path}: cannot write files of type '{extension}'; wanted .tif or .mrc")
    temporary = _temporary(path)
    if attach and not os.path.exists(temporary):
        raise InputError(f"{path}: begun by another process, but not seen by this one; is it in a "
                         "folder that all machines share?")
    if not attach:
        folder = os.path.dirname(temporary) or "."
        if not os.path.isdir(folder):
            raise InputError(f"{path}: the folder {folder} does not exist")
        need = math.prod(shape) * dtype.itemsize + promised
        free = shutil.disk_usage(folder).free
        if need > free:
            raise InputError(f"{path}: needs {need / 2**30:.2f} GiB but the disk has "
                             f"{free / 2**30:.2f} GiB free; make room or choose another folder")
    with contextlib.nullcontext() if attach else _removed_on_failure(temporary):
        if not attach:
            with _disk_errors(path):
                (_create_mrc if is_mrc else _create_tiff)(temporary, shape, dtype, voxel_size)
        return VolumeWriter(path, dtype, shape, _data_offset(temporary, is_mrc), owner=not attach)


def _temporary(path):
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.tmp")


@contextlib.contextmanager
def _disk_errors(path):
    """An OSError inside, such as a full disk, becomes an InputError that names path."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); is there room "
                         "on the disk and the right to write?") from error


@contextlib.contextmanager
def _removed_on_failure(file):
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(file)
        raise


@contextlib.contextmanager
def replacing(path):
    """The name of a temporary file to write in the block, beside path and renamed to it at the end.

    So the file at path is whole at any moment, even after a crash or a power cut. Where the block
    fails the temporary file goes; an OSError, such as a full disk, becomes an InputError.
    """
    temporary = _temporary(path)
    with _removed_on_failure(temporary), _disk_errors(path):
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)


def _create_tiff(file, shape, dtype, voxel_size):
    """Header and room for the voxels, which stay unwritten; little-endian, contiguous."""
    z, y, x = voxel_size or (1.0, 1.0, 1.0)
    options = {"axes": "ZYX" if len(shape) == 3 else "ZCYX"}
    big = math.prod(shape) * dtype.itemsize > 2**32 - 2**26
    if shape[-1] == 1 and not big:          # which tifffile takes for the samples of a pixel
        shape, options = (*shape, 1), {"axes": options["axes"] + "S"}
    if voxel_size and big:
        options |= {f"PhysicalSize{axis}": side for axis, side in zip("ZYX", (z, y, x))}
        options |= {f"PhysicalSize{axis}Unit": "nm" for axis in "ZYX"}
    elif voxel_size:
        options |= {"spacing": z, "unit": "nm"}
    tifffile.imwrite(file, shape=shape, dtype=dtype, byteorder="<", imagej=not big, ome=big,
                     bigtiff=big, photometric="minisblack", metadata=options,
                     resolution=(1 / x, 1 / y) if voxel_size else None,
                     resolutionunit=1)


def _create_mrc(file, shape, dtype, voxel_size):
    mode = {"int8": 0, "int16": 1, "float32": 2, "uint16": 6}[dtype.name]
    with mrcfile.new_mmap(file, shape, mrc_mode=mode, overwrite=True) as mrc:
        if voxel_size:
            mrc.voxel_size = tuple(side * 10 for side in reversed(voxel_size))  # x, y, z in Å


def _data_offset(file, is_mrc):
    """Byte at which the voxels of a file made by create_volume begin."""
    if is_mrc:
        return 1024
    with tifffile.TiffFile(file) as tif:
        return tif.pages[0].dataoffsets[0]


# ==================================================================================================
# Phantom: synthetic electron-microscopy volumes and whole cells, with exact labels
# ==================================================================================================

PHANTOM_CLASSES = ["background", "membrane", "nucleus", "mitochondrion", "vesicle"]
BACKGROUND, MEMBRANE, NUCLEUS, MITOCHONDRION, VESICLE = range(5)

# Lengths in nm. Organelles have their real sizes; the soma is shrunk to fit the field of view.
WARP_AMPLITUDE, WARP_SCALE = 50, 150    # deformation of the tissue
NEURITE_RADIUS, NEURITE_HALF_LENGTH = (60, 380), (50, 700)
NEURITES_PER_UM3 = 5
LEAFLET = 9                             # a plasma membrane with its stain
CLEFT = 14                              # widest half extracellular gap
WALL, ENVELOPE = 11, 18                 # membranes of an organelle, of the nucleus
CLEARANCE = 22                          # cytoplasm left between two structures
ROUNDING = 14                           # radius to which moulded corners are rounded
MITO_RADIUS, MITO_HALF_LENGTH, CRISTA_PERIOD = (75, 140), (80, 420), 42
VESICLE_RADIUS, VESICLES_PER_CLUSTER, CLUSTER_SPREAD = (20, 30), 80, 75
LYSOSOME_RADIUS = (40, 75)
RIBOSOME = 11
BEAM = 5                                # sigma of the in-plane point spread function

# Fractions of the volume, and mean grey levels before blur and noise.
MITO_FRACTION, VESICLE_FRACTION, LYSOSOME_FRACTION = (0.075, 0.115), 0.014, 0.004
GREY_CYTOPLASM, GREY_CLEFT, GREY_MEMBRANE = 172, 185, 62
GREY_NUCLEOPLASM, GREY_CHROMATIN = 160, 108
GREY_MATRIX, GREY_CRISTA, GREY_LUMEN, GREY_LYSOSOME, GREY_ER = 128, 84, 188, 72, 95
ELECTRONS_PER_GREY = 0.75               # dose: sets the shot noise

# Whole cells: insulin granules, and the medium around the cell.
GRANULE_RADIUS, GRANULE_FRACTION, GREY_GRANULE, GREY_MEDIUM = (60, 110), 0.012, 70, 194


@dataclass
class Tissue:
    """A volume while it is being drawn; every array is (Z, Y, X) unless noted.

    position (3, Z, Y, X): where each voxel lies in the undeformed tissue, nm. Shapes are simple
    there; sampling them at warped positions bends them together, so neighbours keep fitting.
    free: distance in nm to the nearest structure drawn so far, negative inside it. A new organelle
    only takes free voxels, so labels cannot overlap.
    """
    voxel_size: np.ndarray
    position: np.ndarray
    cell: np.ndarray
    axes: np.ndarray                    # (cells, 3), unit vector along each cell
    free: np.ndarray
    grey: np.ndarray
    label: np.ndarray

    def around(self, voxel, reach):
        """Slices of the box of half width `reach` nm around a voxel."""
        half = np.ceil(reach / self.voxel_size).astype(int)
        low, high = np.maximum(voxel - half, 0), np.minimum(voxel + half + 1, self.cell.shape)
        return tuple(slice(a, b) for a, b in zip(low, high))

    def mould(self, depth, box, cell, clearance):
        """Shrink a shape to the free space of its cell: a smooth minimum, which rounds corners."""
        room = np.where(self.cell[box] == cell, self.free[box] - clearance, -np.inf)
        return -ROUNDING * np.logaddexp(-depth / ROUNDING, -room / ROUNDING)

    def draw(self, box, depth, grey, class_id, wall=WALL):
        """Fill depth > 0 (nm inside the surface) with `grey` behind a dark wall; mark it taken."""
        inside = depth > 0
        stain = np.exp(-((depth / wall - 0.5) ** 2) * 3)
        self.grey[box][inside] = (grey + (GREY_MEMBRANE - grey) * stain)[inside]
        self.label[box][inside] = class_id
        np.minimum(self.free[box], -depth, out=self.free[box])


def smooth_noise(shape, scale, voxel_size, rng):
    """Gaussian random field (Z, Y, X) float32, mean 0, variance 1, correlated over `scale` nm.

    Random knots times separable Gaussian bumps: three small matrix products, whatever the scale.
    """
    bumps = []
    for size, step in zip(shape, voxel_size):
        pitch = max(scale, step)
        knots = np.arange(-3, size * step / pitch + 4)
        bump = np.exp(-((np.arange(size)[:, None] * step / pitch - knots) ** 2))
        bumps.append((bump / np.linalg.norm(bump, axis=1, keepdims=True)).astype(np.float32))
    field = rng.standard_normal([bump.shape[1] for bump in bumps], dtype=np.float32)
    return bumps[1] @ np.tensordot(bumps[0], field, 1) @ bumps[2].T


def surface_distance(field, voxel_size, slope):
    """Distance in nm from the zero surface of a field, to first order |f| / |grad f|.

    slope: (low, high) bounds on |grad f| per nm, which keep jumps of f from posing as surfaces.
    """
    squared = np.zeros_like(field)
    for axis, step in enumerate(voxel_size):
        if field.shape[axis] > 1:
            squared += np.gradient(field, step, axis=axis) ** 2
    return np.abs(field) / np.clip(np.sqrt(squared), *slope)


def partition(position, extent, voxel_size, rng):
    """Fill space with cells: each voxel belongs to the nearest of many capsules (neurites).

    Cell 0 is the soma, a large ball. Returns cell (Z, Y, X), border distance (Z, Y, X) in nm,
    axes (cells, 3), the soma's centre and radius.
    """
    field = min(extent[1:])
    soma, soma_radius = extent * rng.uniform([0.4, 0.2, 0.2], [0.6, 0.8, 0.8]), 0.3 * field
    margin = NEURITE_RADIUS[1]
    count = int(NEURITES_PER_UM3 * np.prod((extent + 2 * margin) / 1000)) + 1
    axes = rng.normal(size=(count, 3))
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    centres = rng.uniform(-margin, extent + margin, (count, 3))
    radii, halves = rng.uniform(*NEURITE_RADIUS, count), rng.uniform(*NEURITE_HALF_LENGTH, count)

    nearest = np.linalg.norm(position - soma[:, None, None, None], axis=0) - soma_radius
    second, cell = np.full_like(nearest, 1e4), np.zeros(nearest.shape, np.int16)
    rival = np.full_like(cell, -1)
    for i in range(1, count):
        reach = np.abs(axes[i]) * halves[i] + 2 * margin
        low = np.maximum((centres[i] - reach) / voxel_size, 0).astype(int)
        high = np.maximum((centres[i] + reach) / voxel_size, 0).astype(int)
        box = tuple(slice(a, b) for a, b in zip(low, high))
        axis = axes[i].astype(np.float32)
        offset = position[(slice(None), *box)] - centres[i][:, None, None, None].astype(np.float32)
        along = np.clip(np.tensordot(axis, offset, 1), -halves[i], halves[i])
        offset -= along * axis[:, None, None, None]            # from the nearest point of the core
        distance = np.sqrt((offset ** 2).sum(0)) - radii[i]
        wins, places = distance < nearest[box], distance < second[box]
        rival[box] = np.where(wins, cell[box], np.where(places, i, rival[box]))
        second[box] = np.where(wins, nearest[box], np.minimum(second[box], distance))
        nearest[box] = np.where(wins, distance, nearest[box])
        cell[box] = np.where(wins, i, cell[box])
    # signed by cell order, the difference passes smoothly through zero at the border
    signed = np.where(cell < rival, second - nearest, nearest - second)
    return cell, surface_distance(signed, voxel_size, (0.6, 1.8)), axes, soma, soma_radius


def grow_cells(shape, voxel_size, rng):
    """Cells, their cytoplasm and plasma membranes. Returns a Tissue, soma centre and radius."""
    grid = np.indices(shape, dtype=np.float32) * voxel_size[:, None, None, None]
    position = np.stack([axis + WARP_AMPLITUDE * smooth_noise(shape, WARP_SCALE, voxel_size, rng)
                         for axis in grid])
    cell, border, axes, soma, soma_radius = partition(
        position, np.array(shape) * voxel_size, voxel_size, rng)

    tone = rng.normal(0, 9, len(axes)) - 30 * (rng.random(len(axes)) < 0.12)   # some dark glia
    tone[0] = 0
    grain = smooth_noise(shape, RIBOSOME, voxel_size, rng)
    clumps = smooth_noise(shape, 60, voxel_size, rng)
    grey = (GREY_CYTOPLASM + tone[cell]).astype(np.float32)
    grey -= 36 * np.maximum(grain + 0.4 * clumps - 0.8, 0) + 4 * clumps

    # two leaflets; the cleft between them opens only here and there, else they look like one line
    cleft = np.clip(CLEFT * (0.5 * smooth_noise(shape, 120, voxel_size, rng) - 0.1), 0, CLEFT)
    stain = np.exp(-(((border - cleft - 0.4 * LEAFLET) / (0.7 * LEAFLET)) ** 2))
    grey[border < cleft] = GREY_CLEFT
    grey += (GREY_MEMBRANE - grey) * stain
    free = border - cleft - LEAFLET
    label = ((border >= cleft) & (free < 0)).astype(np.uint8) * MEMBRANE
    return Tissue(voxel_size, position, cell, axes, free, grey, label), soma, soma_radius


def add_nucleus(tissue, soma, soma_radius, rng):
    """A nucleus in the soma: dark envelope, heterochromatin in patches that lean on it."""
    shape, everywhere = tissue.cell.shape, np.s_[:, :, :]
    radius = np.linalg.norm(tissue.position - soma[:, None, None, None], axis=0)
    depth = tissue.mould(0.72 * soma_radius - radius, everywhere, 0, CLEARANCE)
    patches = smooth_noise(shape, 55, tissue.voxel_size, rng) + 1.8 * np.exp(-depth / 45) - 0.9
    mottle = smooth_noise(shape, 14, tissue.voxel_size, rng)
    grey = GREY_NUCLEOPLASM + (GREY_CHROMATIN - GREY_NUCLEOPLASM) * np.clip(2 * patches, 0, 1)
    tissue.draw(everywhere, depth, grey + 9 * mottle, NUCLEUS, ENVELOPE)


def add_mitochondria(tissue, rng, fraction=MITO_FRACTION, tries=4000):
    """Bent capsules moulded by their cell, filled with lamellae that follow the capsule's axis."""
    filled, (low, high) = 0, np.array(fraction) * tissue.cell.size
    for voxel in rng.integers(tissue.cell.shape, size=(tries, 3)):
        radius, half_length = rng.uniform(*MITO_RADIUS), rng.uniform(*MITO_HALF_LENGTH)
        bend, tilt = rng.uniform(0, 0.0007), rng.uniform(-0.6, 0.6)
        frame = rng.normal(size=(3, 3))
        own = tissue.cell[tuple(voxel)]
        if filled >= low or tissue.free[tuple(voxel)] < 0.5 * radius + CLEARANCE:
            continue
        frame[:, 0] = 0.25 * frame[:, 0] + tissue.axes[own]        # it runs along the neurite
        frame = np.linalg.qr(frame)[0].T.astype(np.float32)
        reach = half_length + radius + bend * half_length ** 2 + 4 * WARP_AMPLITUDE
        box = tissue.around(voxel, reach)
        origin = tissue.position[(slice(None), *voxel)].reshape(3, 1, 1, 1)
        offset = tissue.position[(slice(None), *box)] - origin
        along, side, third = np.tensordot(frame, offset, 1)
        side = side + bend * along ** 2
        beyond = np.maximum(np.abs(along) - half_length, 0)
        depth = radius - np.sqrt(beyond ** 2 + side ** 2 + third ** 2)
        wanted = (depth > 0).sum()
        depth = tissue.mould(depth, box, own, CLEARANCE)
        taken = (depth > 0).sum()
        if taken < 0.6 * wanted or filled + taken > high:
            continue
        filled += taken
        phase = (along * np.cos(tilt) + side * np.sin(tilt)) / CRISTA_PERIOD
        crista = (0.5 + 0.5 * np.sin(2 * np.pi * phase)) ** 2
        grey = GREY_MATRIX + rng.normal(0, 6) + (GREY_CRISTA - GREY_MATRIX) * crista
        tissue.draw(box, depth, grey, MITOCHONDRION)


def add_balls(tissue, voxels, radius_range, grey, class_id, rng, most=np.inf):
    """Draw a ball at each voxel whose surroundings are free; returns the voxels filled."""
    filled = 0
    for voxel in voxels[((voxels >= 0) & (voxels < tissue.cell.shape)).all(1)]:
        radius = rng.uniform(*radius_range)
        if filled >= most or tissue.free[tuple(voxel)] < radius + 3:
            continue
        box = tissue.around(voxel, radius + CLEARANCE)
        # measured in the unwarped grid: surface tension keeps a vesicle round
        squared = sum(((axis - centre) * step) ** 2
                      for axis, centre, step in zip(np.ogrid[box], voxel, tissue.voxel_size))
        depth = np.minimum(radius - np.sqrt(squared), tissue.free[box])
        tissue.draw(box, depth, grey, class_id)
        filled += (depth > 0).sum()
    return filled


def add_vesicles(tissue, rng, tries=2000):
    """Clusters of small round vesicles: dark rim, bright lumen."""
    wanted = VESICLE_FRACTION * tissue.cell.size
    for centre in rng.integers(tissue.cell.shape, size=(tries, 3)):
        scatter = rng.normal(0, CLUSTER_SPREAD, (VESICLES_PER_CLUSTER, 3)) / tissue.voxel_size
        if wanted > 0 and tissue.free[tuple(centre)] > 60 and tissue.cell[tuple(centre)] > 0:
            voxels = centre + np.round(scatter).astype(int)
            wanted -= add_balls(tissue, voxels, VESICLE_RADIUS, GREY_LUMEN, VESICLE, rng, wanted)


def add_distractors(tissue, rng):
    """What is left unlabelled: dark lysosomes, endoplasmic reticulum in the free cytoplasm."""
    shape, voxel_size = tissue.cell.shape, tissue.voxel_size
    add_balls(tissue, rng.integers(shape, size=(40, 3)), LYSOSOME_RADIUS, GREY_LYSOSOME,
              BACKGROUND, rng, most=LYSOSOME_FRACTION * tissue.cell.size)
    sheet = surface_distance(smooth_noise(shape, 110, voxel_size, rng), voxel_size, (0.004, 1))
    patch = smooth_noise(shape, 130, voxel_size, rng) > 0.7
    double_line = np.exp(-(((sheet - WALL) / (0.5 * WALL)) ** 2))
    fade = np.clip(tissue.free / CLEARANCE, 0, 1) * patch
    tissue.grey += (GREY_ER - tissue.grey) * double_line * fade


def expose(grey, voxel_size, rng):
    """Image of a grey volume: shading, section and beam blur, shot and detector noise -> uint8."""
    shape = grey.shape
    field = max(shape[1:]) * voxel_size[1]
    grey = ndimage.gaussian_filter(grey, (0.4, BEAM / voxel_size[1], BEAM / voxel_size[2]))
    grey += 6 * smooth_noise(shape, field / 3, voxel_size, rng)
    grey *= rng.normal(1, 0.025, (shape[0], 1, 1)).astype(np.float32)       # section thickness
    image = rng.poisson(np.maximum(grey, 0) * ELECTRONS_PER_GREY) / ELECTRONS_PER_GREY
    streaks = rng.standard_normal(shape, dtype=np.float32)
    image += 8 * ndimage.gaussian_filter1d(streaks, 1, axis=2)              # along the scan line
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


def phantom(shape, voxel_size=(20, 8, 8), seed=0):
    """Synthetic EM volume of neural tissue with exact labels.

    shape (Z, Y, X), Z from 1, Y and X from about 96; voxel_size (z, y, x) in nm. Returns image
    (Z, Y, X) uint8 and label (Z, Y, X) uint8, ids in the order of PHANTOM_CLASSES. Structures are
    solid shapes in 3D: slices are cuts through them. Same arguments, same bits.
    """
    rng = np.random.default_rng(seed)
    voxel_size = np.array(voxel_size, np.float32)
    tissue, soma, soma_radius = grow_cells(tuple(shape), voxel_size, rng)
    add_nucleus(tissue, soma, soma_radius, rng)
    add_mitochondria(tissue, rng)
    add_vesicles(tissue, rng)
    add_distractors(tissue, rng)
    return expose(tissue.grey, voxel_size, rng), tissue.label


def phantom_cell(shape, voxel_size=(25, 25, 25), seed=0):
    """Synthetic soft X-ray tomogram of a whole cell with exact labels.

    shape (Z, Y, X) from about 64 each; voxel_size (z, y, x) in nm. Returns image and label, both
    (Z, Y, X) uint8, ids in the order of PHANTOM_CLASSES: "membrane" is all of the cell that is no
    other structure, as in the partial-label paper (section 2.1). Cells differ in size, shape, tone
    and sharpness, and drift in a cloudy medium. Same arguments, same bits.
    """
    rng = np.random.default_rng(seed)
    shape, voxel_size = tuple(shape), np.array(voxel_size, np.float32)
    extent = np.array(shape) * voxel_size
    size = extent.min()
    position = np.indices(shape, dtype=np.float32) * voxel_size[:, None, None, None]
    position += np.stack([0.05 * size * smooth_noise(shape, 0.25 * size, voxel_size, rng)
                          for _ in range(3)])
    centre, radius = extent * rng.uniform(0.46, 0.54, 3), size * rng.uniform(0.41, 0.48)
    offset = (position - centre[:, None, None, None]) * rng.uniform(0.9, 1.15, 3)[
        :, None, None, None]
    free = (radius - np.sqrt((offset**2).sum(0))).astype(np.float32)

    medium = GREY_MEDIUM + 16 * smooth_noise(shape, 0.15 * size, voxel_size, rng)
    grain = smooth_noise(shape, 60, voxel_size, rng) + smooth_noise(shape, 250, voxel_size, rng)
    grey = np.where(free > 0, GREY_CYTOPLASM + 8 * grain, medium).astype(np.float32)
    axis = rng.normal(size=(1, 3))
    tissue = Tissue(voxel_size, position, np.where(free > 0, 0, -1).astype(np.int16),
                    axis / np.linalg.norm(axis), free, grey, (free > 0).astype(np.uint8) * MEMBRANE)
    add_nucleus(tissue, centre + radius * rng.uniform(-0.25, 0.25, 3), 0.72 * radius, rng)
    add_mitochondria(tissue, rng, np.array(MITO_FRACTION) * rng.uniform(0.2, 0.35), tries=400)
    add_balls(tissue, rng.integers(shape, size=(3000, 3)), GRANULE_RADIUS, GREY_GRANULE, VESICLE,
              rng, most=GRANULE_FRACTION * rng.uniform(0.6, 1.4) * free.size)
    tone, contrast = rng.normal(0, 12), rng.uniform(0.75, 1.1)
    grey = GREY_CYTOPLASM + tone + contrast * (tissue.grey - GREY_CYTOPLASM)
    image = expose(grey, voxel_size, rng).astype(np.float32)
    return np.round(ndimage.gaussian_filter(image, 0.7)).astype(np.uint8), tissue.label


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

    Item i is `image` or `(image, label)`, tensors of the patch's shape; with numbered=True the
    number of the volume follows. It depends on (seed, i) alone: the number of workers and a resumed
    run change nothing.
    Raises InputError where a patch is larger than a volume or no slice is left to draw from.
    """

    def __init__(self, images, labels=None, patch_size=(512, 512), slices=None, foreground=0.0,
                 seed=(0,), numbered=False):
        self.images, self.labels, self.seed, self.numbered = images, labels, seed, numbered
        self.patch_size = (1,) * (3 - len(patch_size)) + tuple(patch_size)
        self.flat = len(patch_size) == 2
        for image in images:
            if any(p > s for p, s in zip(self.patch_size, image.shape)):
                raise InputError(
                    f"{image.path}: patches of {format_shape(patch_size)} do not fit into "
                    f"{format_shape(image.shape)} voxels, as the network sees it; give a smaller "
                    f"--patch-size or --downsample")
        slices = slices if slices is not None else [range(len(image)) for image in images]
        self.slices = [(v, int(z)) for v, zs in enumerate(slices) for z in zs]
        if not self.slices:
            raise InputError("no slice is left to draw patches from; check --label-slices and "
                             "--val-slices")
        self.foreground = foreground
        self.points = self._foreground_points() if foreground else []

    def _foreground_points(self):
        """For each foreground class: its id, and a list of (volume, z, voxels (N, 2) of y, x)."""
        rng = np.random.default_rng(self.seed)
        points = {}
        for v, z in self.slices:
            label = self.labels[v][z]
            for value in np.setdiff1d(label, [0, IGNORE]):
                found = rng.permutation(np.argwhere(label == value).astype(np.int32))
                points.setdefault(int(value), []).append((v, z, found[:POINTS_PER_SLICE]))
        if not points:
            raise InputError("none of the slices to train on holds foreground; check "
                             "--label-slices, --val-slices and --label-map")
        return sorted(points.items())

    def __getitem__(self, index):
        rng = np.random.default_rng((*self.seed, index))
        if self.points and rng.random() < self.foreground:
            v, window = self._foreground_window(rng)
        else:
            v, z = self.slices[rng.integers(len(self.slices))]
            window = self._window(rng, v, z)
        item = [self._crop(self.images[v], window)]
        if self.labels:
            item.append(self._crop(self.labels[v], window))
        if self.numbered:
            item.append(v)
        return tuple(item) if len(item) > 1 else item[0]

    def _foreground_window(self, rng):
        """A volume and a window of it that holds some of a foreground class."""
        value, places = self.points[rng.integers(len(self.points))]
        for _ in range(TRIES):
            v, z, voxels = places[rng.integers(len(places))]
            window = self._window(rng, v, z)
            if (self.labels[v][window] == value).any():
                return v, window
        return v, self._window(rng, v, z, *voxels[rng.integers(len(voxels))])

    def _window(self, rng, v, z, y=None, x=None):
        """A random window of volume v that holds slice z, and row y and column x if given."""
        window = []
        for point, size, side in zip((z, y, x), self.patch_size, self.images[v].shape):
            low = 0 if point is None else max(0, point - size + 1)
            high = side - size if point is None else min(point, side - size)
            start = int(rng.integers(low, high + 1))
            window.append(slice(start, start + size))
        return tuple(window)

    def _crop(self, array, window):
        crop = torch.from_numpy(array[window])
        return crop[0] if self.flat else crop


def batches(patches, batch_size, start, stop, workers=0, rank=0, world=1, pin_memory=False):
    """Yield the batches of training steps start..stop-1: uint8 tensors (B, Y, X) or (B, Z, Y, X).

    The batch of a step is the same wherever the run (re)starts; ranks draw different crops.
    """
    windows = (range((step * world + rank) * batch_size, (step * world + rank + 1) * batch_size)
               for step in range(start, stop))
    # A generator of its own: the loader must not draw from the one that seeds the augmentation.
    return iter(torch.utils.data.DataLoader(
        patches, batch_sampler=windows, num_workers=workers, pin_memory=pin_memory,
        generator=torch.Generator()))


def measure_normalization(images, slices, mode):
    """Mean and standard deviation of the training slices: {"mode", "mean", "std"}, in grey levels.

    `zscore` and `equalize` average each slice's mean and standard deviation (Pagano 2023, authors'
    code) over at most 32 evenly spaced slices; `unit` maps 0..255 to 0..1; for `volume` see
    standardize.
    """
    if mode == "unit":
        return {"mode": mode, "mean": 0.0, "std": 255.0}
    if mode == "volume":
        return {"mode": mode, **STANDARD}
    chosen = [(image, z) for image, zs in zip(images, slices) for z in zs]
    chosen = chosen[:: math.ceil(len(chosen) / 32)]
    stats = np.array([(s.mean(), s.std()) for s in (image[z] for image, z in chosen)])
    mean, std = stats.mean(axis=0)
    return {"mode": mode, "mean": float(mean), "std": float(max(std, 1e-3))}


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
    turn = turn + skew.view(-1, 1, 1) * turn[:, :, :1] * turn.new_tensor([0.0, 1.0])
    turn = turn / (1 + uniform(scale)).view(-1, 1, 1)
    turn = turn * (signs[:, None] if flip else 1)
    y = torch.arange(H, device=device) - (H - 1) / 2
    x = torch.arange(W, device=device) - (W - 1) / 2
    pixel = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    pixel = torch.einsum("hwj,bij->bhwi", pixel, turn)
    if displacement is not None:
        pixel = pixel + displacement
    return pixel * 2 / pixel.new_tensor([W, H])


def warp(image, grid, mode):
    """Sample image (B, H, W) at grid (B, h, w, 2), float32; mode bilinear, or nearest for labels.

    All slices of a crop (B, Z, H, W) are sampled alike. What lies outside is mirrored, so that
    image and label stay a true pair up to the border.
    """
    slices = image.reshape(len(image), -1, *image.shape[-2:]).float()
    return F.grid_sample(slices, grid, mode=mode, padding_mode="reflection",
                         align_corners=False).reshape(*image.shape[:-2], *grid.shape[1:3])


def augment(image, label, normalization, brightness=0.0, contrast=0.0, **geometry):
    """A batch of uint8 crops -> normalised, augmented network input, all on the crops' device.

    image (B, H, W) or (B, Z, H, W) uint8; label alike, or None; geometry: see sampling_grid.
    brightness: shift drawn from +- this share of the grey range; contrast: factor from 1 +- this.
    Returns image (B, 1, ...) float32 and label (B, ...) int64 or None.
    """
    B, H, W = len(image), *image.shape[-2:]
    if geometry:
        grid = sampling_grid(B, (H, W), image.device, **geometry)
        image = warp(image, grid, "bilinear")
        label = None if label is None else warp(label, grid, "nearest")
    image = normalize(image, normalization)
    one_each = (B, *[1] * (image.dim() - 1))
    if contrast:
        image = image * (1 + image.new_empty(one_each).uniform_(-contrast, contrast))
    if brightness:
        shift = image.new_empty(one_each).uniform_(-brightness, brightness)
        image = image + shift * (255 / normalization["std"])
    return image, None if label is None else label.long()


# ==================================================================================================
# Layers
# ==================================================================================================


class Conv2d(nn.Conv2d):
    """nn.Conv2d, but not in bf16 where the image is one pixel wide: there the weight gradient of a
    strided one is that of uninitialised memory on a CPU (PyTorch 2.14, oneDNN)."""

    def forward(self, x):
        if x.shape[-1] > 1 or x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


def conv_block(channels, norm="batch", padding=1, kernel=3, **options):
    """Convolution (+ normalisation) + ReLU for each step of channels (in, ..., out); norm: batch,
    group or None; options: of nn.Conv2d."""
    layers = []
    for c_in, c_out in zip(channels[:-1], channels[1:]):
        layers.append(Conv2d(c_in, c_out, kernel, padding=padding, **options))
        if norm:
            layers.append(nn.BatchNorm2d(c_out) if norm == "batch" else group_norm(c_out))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def group_norm(channels):
    """GroupNorm of up to 4 groups (Diakogiannis 2021)."""
    return nn.GroupNorm(math.gcd(4, channels), channels)


def group_conv(c_in, c_out, **options):
    """Convolution + GroupNorm, without ReLU; options: of conv_block."""
    return conv_block((c_in, c_out), norm="group", **options)[:-1]


class BySlice(nn.Module):
    """A 2D layer on every slice: (B, C, Z, H, W) -> (B, C', Z, H', W'), no copy in channels-last
    memory."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return fold_slices(x, self.layer)


def fold_slices(x, layer):
    """Call a 2D layer on x (B, C, Z, H, W) as B * Z images."""
    B, _, Z = x.shape[:3]
    return layer(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (B, Z)).transpose(1, 2)


def channels_last(network):
    """The network, its 2D and 3D kernels in the channels-last memory format."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in network.parameters():
        if parameter.dim() in formats:
            parameter.data = parameter.data.to(memory_format=formats[parameter.dim()])
    return network


class Conv3d(nn.Conv3d):
    """A 3 x 3 x 3 convolution with padding 1, as a 2D one over each slice and its two neighbours.

    nn.Conv3d on a CPU is up to six times slower below 32 channels (torch 2.14), and in bf16 gets
    the gradient of its weights wrong where the input is two slices deep (seen in 2.13).
    """

    def __init__(self, in_channels, out_channels, bias=True):
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias)

    def forward(self, x):
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


class BilinearUp(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W), bilinear with aligned corners."""

    def forward(self, x):
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


def bilinear(x, size):
    """x (B, C, h, w) at another size (H, W)."""
    return F.interpolate(x, size=size, mode="bilinear")


def he_initialization(module):
    """Gaussian weights of variance 2 / (inputs of a neuron), no bias (He 2015, for ReLU)."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(module.bias)


def glorot_initialization(module, kinds=(nn.Conv2d,)):
    """Uniform weights of variance 2 / (inputs + outputs of a neuron), no bias (Glorot 2010), with
    which Keras begins a convolution; kinds: the layers to treat so."""
    if isinstance(module, kinds) and not isinstance(module, LearnedUp):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def crop_like(x, reference):
    """The centre of x (B, C, H, W) at the spatial size of reference."""
    (H, W), (h, w) = x.shape[-2:], reference.shape[-2:]
    top, left = (H - h) // 2, (W - w) // 2
    return x[..., top : top + h, left : left + w]


def any_size(multiple):
    """Decorator of forward(self, x): x (B, C, H, W) of any size is mirrored at its lower and right
    border up to the next multiples, and the result (B, K, H, W) is cut back."""
    def decorate(forward):
        @functools.wraps(forward)
        def padded(self, x):
            H, W = x.shape[-2:]
            bottom, right = -H % multiple, -W % multiple
            if bottom or right:
                x = mirror_pad(x, 0, bottom, 0, right)
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
        with torch.no_grad():
            self.weight.copy_((line[:, None] * line).expand_as(self.weight))


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


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions (He 2016, figure 5, left); the first takes the stride, both dilation."""

    def __init__(self, c_in, c_out, stride=1, dilation=1):
        options = dict(padding=dilation, dilation=dilation, bias=False)
        super().__init__(c_in, c_out, stride, nn.Sequential(
            conv_block((c_in, c_out), stride=stride, **options),
            conv_block((c_out, c_out), **options)[:-1]))


class Bottleneck(ResidualBlock):
    """Three convolutions, 1x1, 3x3 and 1x1 (He 2016, figure 5, right), of which the first two have
    a quarter of c_out filters; the 3x3 one takes stride and dilation."""

    def __init__(self, c_in, c_out, stride=1, dilation=1):
        c = c_out // 4
        super().__init__(c_in, c_out, stride, nn.Sequential(
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


def fractal_tanimoto(p, q, *dims, depth=5, valid=None, smooth=1e-5):
    """Similarities, 0..1, of two maps of values 0..1 and of their complements, one for each of the
    dims, over which it is summed and which stay as sides of 1 (Diakogiannis 2021, section 2.1).

    The mean over d < depth, and over p, q and 1 - p, 1 - q, of
    (pq + smooth) / (2^d (pp + qq) - (2^(d+1) - 1) pq + smooth), products summed over dims. The
    denominator is 2^d (p - q)^2 + pq, in which nothing cancels: the deeper, the steeper near
    equality. valid: 0 where nothing counts, of a shape like p's; depth 0 is depth 1.
    """
    p, q = p.float(), q.float()
    valid = 1.0 if valid is None else valid
    difference = (p - q).square() * valid
    agreements = p * q * valid, (1 - p) * (1 - q) * valid
    similarities = []
    for dim in dims:
        apart, total = difference.sum(dim, keepdim=True), 0
        for agreement in agreements:
            common = agreement.sum(dim, keepdim=True) + smooth
            total = total + sum(common / (2**d * apart + common) for d in range(max(depth, 1)))
        similarities.append(total / (2 * max(depth, 1)))
    return similarities


class FractalAttention(nn.Module):
    """FracTAL attention (Diakogiannis 2021, section 2.2): what x (B, c, H, W) should be multiplied
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
        return 1 + self.gamma * self.norm(weight * value.square())


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
    (Diakogiannis 2021, section 2.4)."""

    def __init__(self, c_in, c_out, heads):
        super().__init__()
        self.attention_a, self.attention_b = [FractalAttention(c_in, heads) for _ in range(2)]
        self.merge = conv_block((2 * c_in, c_out), norm="group", groups=heads)

    def forward(self, a, b):
        return self.merge(torch.cat([a * self.attention_a(a, b), b * self.attention_b(b, a)], 1))


class CEECUnit(nn.Module):
    """Compress-expand, expand-compress (Diakogiannis 2021, section 2.4, V2): (B, c, H, W) stays.

    One branch looks at the input at half the resolution, the other at twice; each is emphasised
    after a look at the other, and both are added to the input.
    """

    def __init__(self, c, heads):
        super().__init__()
        half, quarter = c // 2, c // 4
        block = functools.partial(conv_block, norm="group", groups=heads)
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

    def __init__(self, c_in, c, depth=4):
        super().__init__()
        self.parts = nn.ModuleList(group_conv(c_in, c, kernel=1, padding=0) for _ in range(depth))
        self.project = group_conv(c_in + depth * c, c, kernel=1, padding=0)

    def forward(self, x):
        size = x.shape[-2:]
        pooled = [F.interpolate(part(F.adaptive_max_pool2d(x, 2**level)), size=size)
                  for level, part in enumerate(self.parts)]
        return self.project(torch.cat([x, *pooled], dim=1))


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

    side = 7

    def __init__(self, dim, heads, shifted=False, drop=0.0):
        super().__init__()
        self.shift, self.drop = self.side // 2 if shifted else 0, drop
        self.norm_attention, self.attention = nn.LayerNorm(dim), SelfAttention(dim, heads)
        self.relative_bias = nn.Parameter(torch.empty((2 * self.side - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_bias, std=0.02)
        self.norm_mlp, self.mlp = nn.LayerNorm(dim), mlp(dim)

    def forward(self, x):
        x = x + self.drop_samples(self.attend(self.norm_attention(x)))
        return x + self.drop_samples(self.mlp(self.norm_mlp(x)))

    def attend(self, x):
        (B, H, W, _), side, shift = x.shape, self.side, self.shift
        x = F.pad(x, (0, 0, 0, -W % side, 0, -H % side))
        bias = self.score_bias()
        if shift:
            adjacent = self.adjacent(*x.shape[1:3], x.device)
            bias = bias.masked_fill(~adjacent, -torch.inf)                  # (windows, heads, N, N)
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

    def adjacent(self, H, W, device):
        """(windows, 1, N, N) bool: pairs of tokens of a rolled map that no border divides."""
        row, column = [torch.arange(n, device=device) >= n - self.shift for n in (H, W)]
        region = 2 * row[:, None] + column
        region = split_windows(region[None, ..., None], self.side).reshape(-1, 1, self.side**2)
        return region[..., None] == region[..., None, :]

    def drop_samples(self, x):
        # Samples stand where dropout3d expects the channels of one volume, which it drops whole.
        return F.dropout3d(x, self.drop, self.training)


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


# ==================================================================================================
# Networks: (in_channels, out_channels, width=None) -> module with dims, stride, margin, offset;
# 3D ones also with min_depth, the slices that they need
# ==================================================================================================


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
            c = widths[level]
            if up == "bilinear":
                c_out = widths[max(level - 1, 0)]
                self.up.append(BilinearUp())
                self.decoder.append(conv_block((c + c_in, c, c_out), norm, padding))
            else:
                c_out = c
                self.up.append(nn.ConvTranspose2d(c_in, c, 2, stride=2))
                self.decoder.append(conv_block((c + c, c, c_out), norm, padding))
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
        widths, depths = [w, w, 2 * w, 4 * w, 8 * w][: stages + 1], (3, 4, 6, 3)
        self.encoder = nn.ModuleList([
            conv_block((in_channels, w), kernel=7, padding=3, stride=2, bias=False)])
        for stage in range(stages):
            c_in, c = widths[stage : stage + 2]
            self.encoder.append(residual_stage(c_in, c, [1] * depths[stage], 1 + (stage > 0),
                                               BasicBlock))
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
        heads = max(w // 32, 1)
        if w < 2 or w % heads:
            raise InputError(f"--width {w}: senformer takes 2 or more; from 64 on, multiples of "
                             "width // 32, its attention heads")
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

    Dice = (2 sum p y + smooth) / (sum p + sum y + smooth) (Milletari 2016); with squared=True the
    denominator is sum p^2 + sum y^2 (Pagano 2023, authors' code). IGNORE voxels count nowhere.
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

MAX_TILE = 1024             # longer slice sides are predicted in overlapping tiles
OVERLAP = 0.25              # share of a tile that its neighbour covers too


def network_side(network, side):
    """The smallest side >= `side` that the network predicts (its margin already taken off)."""
    stride, offset, margin = network.stride, network.offset, network.margin
    return side + (offset - side - 2 * margin) % stride


def check_patch_size(network, patch_size, name):
    """Raise InputError, naming the nearest sides that fit, for sides the network cannot take."""
    stride, offset = network.stride, network.offset
    if len(patch_size) != network.dims:
        raise InputError(f"--patch-size {format_shape(patch_size)}: {name} takes "
                         f"{'two sides, Y X' if network.dims == 2 else 'three sides, Z Y X'}")
    if network.dims == 3 and patch_size[0] < network.min_depth:
        raise InputError(f"--patch-size {format_shape(patch_size)}: {name} needs "
                         f"{network.min_depth} slices or more")
    smallest = 2 * network.margin + 1
    wrong = [s for s in patch_size[-2:] if s % stride != offset or s < smallest]
    if wrong:
        above = max(wrong[0], smallest)
        above += (offset - above) % stride
        near = [s for s in (above - stride, above) if s >= smallest]
        raise InputError(f"--patch-size {format_shape(patch_size)}: {name} takes sides of "
                         f"{offset} + a multiple of {stride}; nearest to {wrong[0]}: "
                         f"{' or '.join(map(str, near))}".replace("of 0 + a", "that are a"))


def tile_starts(side, tile, overlap=OVERLAP):
    """Evenly spaced starts of tiles that cover `side` and overlap by about that share or more."""
    if tile >= side:
        return [0]
    count = math.ceil((side - tile) / max(1, tile * (1 - overlap))) + 1
    return np.linspace(0, side - tile, count).round().astype(int).tolist()


def blending_window(*sides, device=None):
    """Weights of a tile or window of these sides: squared sines, largest in the centre, above 0."""
    window = torch.ones((), device=device)
    for side in sides:
        place = (torch.arange(side, device=device) + 0.5) / side
        window = window[..., None] * torch.sin(math.pi * place) ** 2
    return window


def predict_slices(network, image, max_tile=None, overlap=OVERLAP):
    """Probabilities (B, C, ..., H, W) float32 of network input (B, C', ..., H, W) of any H, W.

    Sides up to max_tile (y, x; default: MAX_TILE) are predicted whole, longer ones in tiles that
    overlap by a share `overlap` or more and are blended. Borders are mirrored up to a size that the
    network takes and cut off.
    """
    H, W = image.shape[-2:]
    margin = network.margin
    tile_h, tile_w = [network_side(network, min(side, most))
                      for side, most in zip((H, W), max_tile or (MAX_TILE, MAX_TILE))]
    bottom, right = max(tile_h - H, 0), max(tile_w - W, 0)
    image = mirror_pad(image, margin, bottom + margin, margin, right + margin)
    starts = [(y, x) for y in tile_starts(H, tile_h, overlap)
              for x in tile_starts(W, tile_w, overlap)]
    if len(starts) == 1:
        return probabilities(network(image))[..., :H, :W]
    window = blending_window(tile_h, tile_w, device=image.device)
    total, weight = None, torch.zeros(H + bottom, W + right, device=image.device)
    for y, x in starts:
        prob = probabilities(network(
            image[..., y : y + tile_h + 2 * margin, x : x + tile_w + 2 * margin]))
        if total is None:
            total = prob.new_zeros(*prob.shape[:-2], *weight.shape)
        total[..., y : y + tile_h, x : x + tile_w] += prob.mul_(window)
        weight[y : y + tile_h, x : x + tile_w] += window
    return total.div_(weight)[..., :H, :W]


def mirror_pad(image, top, bottom, left, right):
    """Pad (B, C, ..., H, W) by mirroring, or with the border's values where it is too small."""
    H, W = image.shape[-2:]
    fits = max(top, bottom) < H and max(left, right) < W
    slices = F.pad(image.flatten(1, -3), (left, right, top, bottom),
                   mode="reflect" if fits else "replicate")
    return slices.view(*image.shape[:-2], *slices.shape[-2:])


def eight_views(predict, image):
    """Mean prediction over the eight symmetries of the square: 4 turns x mirrored or not."""
    total = 0
    for turns in range(4):
        view = torch.rot90(image, turns, (-2, -1))
        total = total + torch.rot90(predict(view), -turns, (-2, -1))
        prob = predict(view.flip(-1)).flip(-1)
        total = total + torch.rot90(prob, -turns, (-2, -1))
    return total / 8


def slabs(shape, pixels):
    """Slices along z that cut a volume (Z, Y, X) into slabs of about `pixels` pixels."""
    step = max(1, int(pixels // (shape[1] * shape[2])))
    return [slice(z, min(z + step, shape[0])) for z in range(0, shape[0], step)]


class EdgePadded(LazyArray):
    """A volume with its first slice repeated `below` times under it and the last `above` times."""

    def __init__(self, array, below, above):
        shape = (len(array) + below + above, *array.shape[1:])
        super().__init__(array.path, shape, array.dtype, array.voxel_size)
        self.array, self.below = array, below

    def read(self, z, y, x):
        zs = np.clip(np.arange(z.start, z.stop) - self.below, 0, len(self.array) - 1)
        if not len(zs):
            return self.array.read(slice(0, 0), y, x)
        return self.array.read(slice(zs[0], zs[-1] + 1), y, x)[zs - zs[0]]


def with_context(array, context):
    """Nearest padding along z, so that slice z is the middle of slices z : z + context."""
    return EdgePadded(array, context // 2, context - 1 - context // 2) if context > 1 else array


def predict_by_slabs(predict, image, shape, context=1, pixels=2**20, rank=0, world=1):
    """Yield (slab, probabilities (n, C, H, W)) of a network that sees `context` slices at a time.

    predict: uint8 tensor (n + context - 1, H, W) -> the n slices in whose middle it could look.
    shape: of the volume whose slabs are wanted. Where it has another number of slices than the
    image (see resize), the two nearest predictions are interpolated.
    """
    other_grid = len(image) != shape[0]
    low, high, share = resampling(len(image), shape[0])
    pixels = pixels * min(1.0, math.prod(shape) / math.prod(image.shape))
    image = with_context(image, context)
    for slab in slabs(shape, pixels)[rank::world]:
        first, last = low[slab.start], high[slab.stop - 1]
        prob = predict(torch.from_numpy(image[first : last + context]))
        if other_grid:
            prob = between(prob, low[slab] - first, high[slab] - first, share[slab], dim=0)
        yield slab, prob


def predict_by_windows(predict, image, depth, overlap=1 / 3, rank=0, world=1, slices=None):
    """Yield (slab, probabilities (n, C, H, W)) of a 3D network, blended along z.

    predict: uint8 tensor (depth, H, W) -> (depth, C, H, W); a volume with fewer slices is one
    window. Windows overlap by `overlap` or more; only as many slices as a window has are held at a
    time. Ranks share the slices in equal parts. slices: the only z that are needed; windows
    without one of them are left out.
    """
    depth = min(depth, len(image))
    starts = tile_starts(len(image), depth, overlap)
    if slices is not None:
        starts = [z for z in starts if np.any((z <= slices) & (slices < z + depth))]
    ends = [min(z + depth, above)                   # slices start:end are done after their window
            for z, above in zip(starts, [*starts[1:], len(image)])]
    first, last = [rank_ * len(starts) // world for rank_ in (rank, rank + 1)]
    total = None
    for start, end in list(zip(starts, ends))[:last]:
        if first == last or start + depth <= starts[first]:     # none of this process's slices
            continue
        prob = predict(torch.from_numpy(image[start : start + depth]))
        window = blending_window(depth, device=prob.device).view(-1, 1, 1, 1)
        if total is None:
            total, weight = torch.zeros_like(prob), torch.zeros_like(window)
        total.addcmul_(prob, window)
        del prob                                    # one buffer of a window's size, not two
        weight += window
        done = end - start
        if start >= starts[first]:
            yield slice(start, end), total[:done] / weight[:done]
        for buffer in (total, weight):              # what overlaps the next window moves down
            for z in range(depth):
                buffer[z] = buffer[z + done] if z + done < depth else 0


def between(prob, low, high, share, dim):
    """What lies `share` of the way from the entries `low` to the entries `high` along an axis of a
    tensor: see resampling."""
    low, high, share = (torch.from_numpy(array).to(prob.device) for array in (low, high, share))
    share = share.view(-1, *[1] * (prob.dim() - 1 - dim))
    return torch.lerp(prob.index_select(dim, low), prob.index_select(dim, high), share)


def enlarged(prob, size, factor, pixels=2**18):
    """Yield (rows, probabilities (n, C, rows, X)) of a slab (n, C, H, W) at full resolution.

    Linear to `factor` times the sides, less what then sticks out of size (Y, X); to exactly that
    where factor is 1. A few `pixels` at a time, which is fast on a CPU and takes little memory.
    """
    n, _, H, W = prob.shape
    tall, wide = (H * factor, W * factor) if factor > 1 else size
    low, high, share = resampling(H, tall)
    for rows in slabs((size[0], n, size[1]), pixels):
        first, last = low[rows][0], high[rows][-1]
        part = prob[:, :, first : last + 1]
        if wide != W:                               # first, while the rows are few
            part = F.interpolate(part, size=(part.shape[2], wide), mode="bilinear")
        if tall != H:
            part = between(part, low[rows] - first, high[rows] - first, share[rows], dim=2)
        yield rows, part[..., : size[1]]


def predict_volume(stream, writers, shape, downsample=1, probability=None, progress=None):
    """Write a stream of predictions: memory depends on its slabs, not on the volume.

    stream: yields (slab, probabilities (n, C, H, W)), see predict_by_slabs and predict_by_windows,
    `downsample` times smaller in y and x than `shape` (Z, Y, X), the shape of the prediction, or of
    any other size; see enlarged. writers: {VolumeWriter: probabilities (n, C, rows, X) of some rows
    -> class ids (n, rows, X)}, for example class_ids; probability: VolumeWriter of the
    probabilities, (Z, Y, X) of the one channel or (Z, C, Y, X). progress: called with the slices
    done and the slices of the volume.
    """
    fills = {writer: lambda prob, decide=decide: decide(prob).to(torch.uint8)
             for writer, decide in writers.items()}
    if probability is not None:
        fills[probability] = lambda prob: prob[:, 0] if prob.shape[1] == 1 else prob
    done = 0
    for slab, prob in stream:
        slab = slice(slab.start, min(slab.stop, shape[0]))
        for part in slabs((slab.stop - slab.start, *shape[1:]), 2**22):     # at full resolution
            place = slice(slab.start + part.start, slab.start + part.stop)
            pages = None
            for rows, large in enlarged(prob[part], shape[1:], downsample):
                found = [fill(large).cpu().numpy() for fill in fills.values()]
                pages = pages or [np.empty((*f.shape[:-2], *shape[1:]), f.dtype) for f in found]
                for page, values in zip(pages, found):
                    page[..., rows, :] = values
            for writer, page in zip(fills, pages):
                writer[place] = page
        done += slab.stop - slab.start
        if progress:
            progress(done, shape[0])


def score_slices(predict, image, label, classes, context=1, threshold=0.5, rank=0, world=1,
                 depth=None):
    """Confusion counts (N, K, K) of the N annotated slices of a lazy image and its Labels.

    predict: uint8 tensor (context, H, W) around a slice -> probabilities (n, C, H, W), of which the
    middle one is the slice's. depth: of the windows of a 3D network, see predict_by_windows.
    """
    def middles():
        padded = with_context(image, context)
        for z in label.slices[rank::world]:
            prob = predict(torch.from_numpy(padded[z : z + context]))
            yield slice(z, z + 1), prob[len(prob) // 2][None]

    counts = np.zeros((len(label.slices), len(classes), len(classes)), dtype=np.int64)
    stream = middles() if depth is None else predict_by_windows(
        predict, image, depth, rank=rank, world=world, slices=label.slices)
    for slab, prob in stream:
        for row, z in enumerate(label.slices):
            if slab.start <= z < slab.stop:
                pred = class_ids(prob[z - slab.start][None], threshold)
                counts[row] = confusion(pred.to(torch.uint8).cpu().numpy(), label[z][None],
                                        len(classes))[0]
    if world > 1:
        total = torch.from_numpy(counts)
        torch.distributed.all_reduce(total)
        counts = total.numpy()
    return counts


# ==================================================================================================
# Metrics: streaming confusion counts and the scores that follow from them
# ==================================================================================================


def confusion(pred, label, n_classes):
    """Confusion counts of slices: int64 (Z, n_classes, n_classes), [z, truth, prediction].

    pred, label: uint8 (Z, Y, X), label with IGNORE, which is counted nowhere.
    """
    counts = np.zeros((len(label), n_classes, n_classes), dtype=np.int64)
    for z, (p, l) in enumerate(zip(pred, label)):
        index = l.astype(np.uint16) * n_classes + p
        index[l == IGNORE] = n_classes * n_classes
        counts[z] = _count_values(index)[: n_classes * n_classes].reshape(n_classes, n_classes)
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
    """Scores of one volume from its per-slice confusion counts (Z, K, K): the metrics.json block.

    Per foreground class: Dice, IoU, precision, recall over the whole volume (3D); dice_slices, the
    mean of the 2D Dice of the slices, where a slice without the class in truth and prediction
    counts 1; the two `nonempty` variants leave out slices without the class in the truth
    (Pagano 2023). dice and iou: means over foreground classes; miou: over all classes; accuracy;
    miou_org: mean IoU over the classes `organelles` (ids), where they are given (Guay 2021).
    Undefined values (the class is in neither truth nor prediction) are None.
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


def evaluate(prediction, label, classes, pixels=2**24, organelles=None):
    """`scores` of two lazy volumes (Z, Y, X) of class ids, and their voxels: see confusion_volume,
    which raises InputError."""
    return volume_scores(confusion_volume(prediction, label, classes, pixels), label, classes,
                         organelles)


def confusion_volume(prediction, label, classes, pixels=2**24):
    """Confusion counts (Z, K, K) of two lazy volumes of class ids, read slab by slab.

    Raises InputError where the shapes differ or the prediction holds a class that does not exist.
    """
    if prediction.shape != label.shape:
        raise InputError(f"{prediction.path}: the prediction has {format_shape(prediction.shape)} "
                         f"voxels, its label {format_shape(label.shape)}")
    counts = []
    for slab in slabs(label.shape, pixels):
        pred, truth = prediction[slab], label[slab]
        wrong = pred[(pred < 0) | (pred >= len(classes)) | (pred != pred.astype(np.uint8))]
        if wrong.size:
            raise InputError(f"{prediction.path}: holds {wrong[0]}, but class ids run from 0 to "
                             f"{len(classes) - 1}")
        counts.append(confusion(pred.astype(np.uint8), truth, len(classes)))
    return np.concatenate(counts)


def volume_scores(counts, label, classes, organelles=None):
    """`scores` of confusion counts (Z, K, K), with the voxels of the label and those ignored."""
    voxels = math.prod(label.shape)
    return {"voxels": voxels, "ignored": voxels - int(counts.sum()),
            **scores(counts, classes, organelles)}


# ==================================================================================================
# Figures
# ==================================================================================================

# Colour-blind-safe class colours (Okabe & Ito 2008); errors: TP green, FN red, FP blue.
CLASS_COLORS = ["#e69f00", "#cc79a7", "#f0e442", "#56b4e9", "#d55e00", "#009e73", "#0072b2"]
ERROR_COLORS = {"true positive": "#2ca02c", "false negative": "#d62728",
                "false positive": "#1f77b4"}


def new_figure(**options):
    """A matplotlib figure that needs no screen and no global state."""
    import matplotlib.figure
    return matplotlib.figure.Figure(layout="constrained", **options)


def save_figure(figure, path):
    """Write a figure as a PNG file that is always whole; see replacing."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def plain(text):
    """A name as matplotlib shows it letter by letter: $ begins no formula."""
    return text.replace("$", r"\$")


def overlay(image, masks, colors, alpha=0.45):
    """RGB float (Y, X, 3) of a grey uint8 image (Y, X) with coloured masks on top."""
    import matplotlib.colors
    rgb = np.repeat(image[..., None] / 255.0, 3, axis=2)
    for mask, color in zip(masks, colors):
        rgb[mask] = (1 - alpha) * rgb[mask] + alpha * np.array(matplotlib.colors.to_rgb(color))
    return rgb


def class_overlay(image, label, classes, colors=CLASS_COLORS, alpha=0.45):
    """The image with every foreground class of `label` in its fixed colour."""
    masks = [label == k for k in range(1, len(classes))]
    return overlay(image, masks, list(colors) * (1 + len(classes) // len(colors)), alpha)


def error_overlay(image, label, pred, alpha=0.45):
    """The image with true positives green, false negatives red, false positives blue.

    A foreground voxel given another foreground class counts as a false negative.
    """
    valid = label != IGNORE
    masks = [valid & (label > 0) & (pred == label), valid & (label > 0) & (pred != label),
             valid & (label == 0) & (pred > 0)]
    return overlay(image, masks, ERROR_COLORS.values(), alpha)


def save_slices(path, items, classes, colors=CLASS_COLORS, rows=4, max_side=768):
    """figure.png: slices as image | truth | prediction | errors, without truth image | prediction.

    items: list of (name, image or None, label or None, {stage: prediction}), lazy volumes. Of a
    method in stages, the errors of each stage are shown side by side. The rows are spread evenly
    over the items and over the slices that are annotated. Without an image, paper is white. colors:
    of the foreground classes.
    """
    panels = []
    for name, image, label, predictions in items:
        like = next(iter(predictions.values())) if image is None else image
        for z in _spread(like, label, rows // len(items)):
            shown = _panels(z, image, label, predictions, classes, colors,
                            step=max(1, math.ceil(max(like.shape[1:]) / max_side)))
            panels.append((f"{name}  z = {z}", like, shown))
    titles = max((list(shown) for *_, shown in panels), key=len)
    height = 3.1 * np.mean([min(1.6, i.shape[1] / i.shape[2]) for _, i, _ in panels]) + 0.25
    figure = new_figure(figsize=(3.1 * len(titles), height * len(panels) + 0.4), dpi=120)
    axes = figure.subplots(len(panels), len(titles), squeeze=False)
    for title, axis in zip(titles, axes[0]):
        axis.set_title(title)
    for row, (name, image, shown) in zip(axes, panels):
        for axis, title in zip(row, titles):
            axis.set(xticks=[], yticks=[], frame_on="image" not in titles)
            if title in shown:
                axis.imshow(shown[title], interpolation="antialiased")
        row[0].text(0.02, 0.97, plain(name), transform=row[0].transAxes, fontsize=7, va="top",
                    color="white", bbox={"facecolor": "black", "alpha": 0.6, "pad": 1.5,
                                         "edgecolor": "none"})
        shrunk = image.shape[2] / shown[titles[0]].shape[1]
        _scale_bar(row[0], image.voxel_size, shrunk)
    legend(figure, classes, "truth" in titles, colors)
    save_figure(figure, path)


def _spread(image, label, count):
    """The z of `count` slices, at least one, spread evenly over those that are annotated."""
    zs = label.slices if label is not None else np.arange(len(image))
    count = min(len(zs), max(1, count))
    return zs[((np.arange(count) + 0.5) * len(zs) / count).astype(int)]


def _panels(z, image, label, predictions, classes, colors, step):
    """{title: RGB} of slice z, every step-th pixel; see save_slices."""
    preds = {name: prediction[z][::step, ::step] for name, prediction in predictions.items()}
    shown, alpha = {}, 0.45
    if image is None:
        grey, alpha = np.full_like(next(iter(preds.values())), 255), 0.9
    else:
        grey = image[z][::step, ::step]
        shown["image"] = overlay(grey, [], [])
    if label is None:
        return shown | {name: class_overlay(grey, pred, classes, colors, alpha)
                        for name, pred in preds.items()}
    truth = label[z][::step, ::step]
    shown["truth"] = class_overlay(grey, truth, classes, colors, alpha)
    if len(preds) == 1:
        shown |= {name: class_overlay(grey, pred, classes, colors, alpha)
                  for name, pred in preds.items()}
        return shown | {"errors": error_overlay(grey, truth, *preds.values(), alpha)}
    return shown | {f"{name}: errors": error_overlay(grey, truth, pred, alpha)
                    for name, pred in preds.items()}


def _scale_bar(axis, voxel_size, step, on_white=False):
    """A bar of a round length, about a quarter of the panel wide, where the voxel size is known."""
    if not voxel_size:
        return
    from matplotlib.patheffects import withStroke
    (x0, x1), (y1, y0) = axis.get_xlim(), axis.get_ylim()
    nm = voxel_size[2] * step
    length = (x1 - x0) * nm / 4
    power = 10 ** math.floor(math.log10(length))
    length = power * max(f for f in (1, 2, 5) if f * power <= length)
    y, x = y1 - 0.06 * (y1 - y0), x0 + 0.05 * (x1 - x0)
    text = f"{length:g} nm" if length < 1000 else f"{length / 1000:g} µm"
    outline = [] if on_white else [withStroke(linewidth=2, foreground="black")]
    axis.plot([x, x + length / nm], [y, y], color="black", linewidth=2.5 if on_white else 4)
    if not on_white:
        axis.plot([x, x + length / nm], [y, y], color="white", linewidth=2.5)
    axis.text(x, y - 0.02 * (y1 - y0), text, color="black" if on_white else "white",
              fontsize=9 if on_white else 7, va="bottom", path_effects=outline)


def legend(figure, classes, errors, colors, unknown=False):
    """Class colours and, where truth is known, error colours below the panels; unknown: what grey
    means, too."""
    from matplotlib.patches import Patch
    handles = [Patch(facecolor=colors[k % len(colors)], label=plain(name), edgecolor="0.6")
               for k, name in enumerate(classes[1:])]
    if unknown:
        handles.append(Patch(facecolor=UNKNOWN_COLOR, label="not scored", edgecolor="0.6"))
    if errors:
        handles += [Patch(color=color, label=name) for name, color in ERROR_COLORS.items()]
    columns = math.ceil(len(handles) / math.ceil(len(handles) / 6))     # rows of equal length
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8,
                  frameon=False)


INSET, ZOOM = 0.4, 2.5                  # side of the inset in a panel; its magnification
UNKNOWN_COLOR = "0.45"                  # IGNORE in a truth


def save_maps(path, items, classes, colors=CLASS_COLORS, rows=2, max_side=768):
    """maps.png: slices as image | prediction | truth, every structure in its colour on black, with
    the busiest place of each slice enlarged in the upper left corner (Zhang 2018, figure 4).

    items: list of (name, image, label or None, prediction), lazy volumes; colors: of the foreground
    classes. The rows are spread evenly over the items and their annotated slices. IGNORE is grey.
    """
    import matplotlib.colors
    palette = np.zeros((IGNORE + 1, 3))
    for k in range(1, len(classes)):
        palette[k] = matplotlib.colors.to_rgb(colors[(k - 1) % len(colors)])
    palette[IGNORE] = matplotlib.colors.to_rgb(UNKNOWN_COLOR)
    panels, unknown = [], False
    for name, image, label, prediction in items:
        step = max(1, math.ceil(max(image.shape[1:]) / max_side))
        for z in _spread(image, label, rows // len(items)):
            slices = {"image": image[z], "prediction": prediction[z]}
            if label is not None:
                slices["truth"] = label[z]
                unknown |= bool((slices["truth"] == IGNORE).any())
            whole = {title: ids[::step, ::step] for title, ids in slices.items()}
            place = _busiest(list(whole.values())[-1], len(classes))
            y, x, height, width = [step * n for n in place]
            shown = {title: [palette[ids] if title != "image" else overlay(ids, [], [])
                             for ids in (whole[title], ids[y : y + height, x : x + width])]
                     for title, ids in slices.items()}
            panels.append((f"{name}  z = {z}", image, shown, place, step))
    titles = max((list(shown) for _, _, shown, *_ in panels), key=len)
    height = np.mean([np.clip(i.shape[1] / i.shape[2], 0.2, 1.6) for _, i, *_ in panels])
    figure = new_figure(figsize=(4 * len(titles), (4 * height + 0.1) * len(panels) + 0.5), dpi=120)
    axes = figure.subplots(len(panels), len(titles), squeeze=False)
    for row, (name, image, shown, place, step) in zip(axes, panels):
        for axis, title in zip(row, titles):
            axis.set_axis_off()
            if title not in shown:
                continue
            axis.set_title(title)
            picture, enlarged = shown[title]
            axis.imshow(picture, interpolation="antialiased")
            _inset(axis, enlarged, place)
        row[0].text(0.98, 0.03, name, transform=row[0].transAxes, fontsize=8, ha="right",
                    color="white", bbox={"facecolor": "black", "alpha": 0.6, "pad": 1.5,
                                         "edgecolor": "none"})
        _scale_bar(row[0], image.voxel_size, step)
    legend(figure, classes, False, colors, unknown)
    figure.get_layout_engine().set(h_pad=0.08)
    save_figure(figure, path)


def _busiest(ids, n_classes):
    """Where to enlarge a slice of class ids: (y, x, height, width) of the place with the largest
    share of all its structures, each of which counts alike."""
    height, width = [max(1, round(side * INSET / ZOOM)) for side in ids.shape]
    share = np.zeros(ids.shape)
    for k in range(1, n_classes):
        share += (ids == k) / max(1, (ids == k).sum())
    total = ndimage.uniform_filter(share, (height, width), mode="constant")
    y, x = np.unravel_index(total.argmax(), ids.shape)
    return (int(np.clip(y - height // 2, 0, ids.shape[0] - height)),
            int(np.clip(x - width // 2, 0, ids.shape[1] - width)), height, width)


def _inset(axis, enlarged, place):
    """What is at a place (y, x, height, width) of an axis's picture, enlarged in its upper left
    corner; both framed in grey."""
    from matplotlib.patches import Rectangle
    y, x, height, width = place
    inset = axis.inset_axes((0, 1 - INSET, INSET, INSET))
    inset.imshow(enlarged, interpolation="nearest", aspect="auto")
    inset.set(xticks=[], yticks=[])
    for spine in inset.spines.values():
        spine.set(edgecolor="0.6", linewidth=1.5)
    axis.add_patch(Rectangle((x - 0.5, y - 0.5), width, height, fill=False, edgecolor="0.6",
                             linewidth=1))


VIEWS = ((-60, 25), (30, 40))           # azimuth and elevation of the eye, in degrees
LIGHT = (-0.45, 0.55, 0.7)              # to the right, up, towards the eye


def save_surfaces(path, items, classes, max_side=128, pixels=300):
    """surfaces.png: the segmented structures as shaded surfaces in 3D, cut open at the border.

    items: {title: lazy class ids (Z, Y, X)} of one volume, such as its truth and its prediction: a
    row each. Columns: all classes together from two sides, then each by itself; see see_surfaces.
    """
    seen, glass, side, _ = see_surfaces(items, classes, VIEWS, max_side, pixels)
    rows = {name: [compose(surfaces, range(len(surfaces)), glass) for surfaces in views]
            + [compose([surface], [k], [False]) for k, surface in enumerate(views[0])]
            for name, views in seen.items()}
    save_pictures(path, rows, ["all", "turned", *classes[1:]], side)


def see_surfaces(items, classes, views, max_side, pixels):
    """What is seen of the foreground classes of volumes, all in one frame, to be composed.

    items: {name: lazy class ids (Z, Y, X)}; views: (azimuth, elevation) each, see cast_rays. Voxels
    are averaged in blocks until no side is longer than max_side; their sizes are respected (cubes
    where the file does not say). Returns {name: [what cast_rays returns of each class, of each
    view]}; which classes enclose others, to be drawn like glass; the side of a pixel in nm, or
    None; and for each view the edges of the volume (12, 2, 2): edge, end, x and y in pixels.
    """
    blocks = [class_shares(volume, len(classes), max_side) for volume in items.values()]
    filled = sum(shares.sum(0) for shares, _ in blocks) > 0
    objects = ndimage.find_objects(filled.astype(int))
    box = objects[0] if objects else (slice(None),) * 3                 # the same in all rows
    seen = {name: [[cast_rays(share[box], block, *view, pixels) for share in shares]
                   for view in views] for name, (shares, block) in zip(items, blocks)}
    size = np.array(filled[box].shape) * blocks[0][1]
    side = float(np.linalg.norm(size)) / pixels
    corners = np.array([[z, y, x] for z in (-1, 1) for y in (-1, 1) for x in (-1, 1)])
    edges = np.array([(a, b) for a in corners for b in corners if (b - a).sum() == 2
                      and (b != a).sum() == 1])
    edges = (edges * size / 2)[..., ::-1] @ np.stack([_eye_frame(*view) for view in views])[
        :, None, :2].swapaxes(-1, -2)
    edges = edges * (1, -1) / side + pixels / 2 - 0.5
    known = all(volume.voxel_size for volume in items.values())
    return (seen, _enclosing(next(iter(seen.values()))[0]), side if known else None, edges)


def _eye_frame(azimuth, elevation):
    """Directions to the right, up and to the eye (in degrees: see cast_rays) in x, y, z of the
    volume: (3, 3)."""
    a, e = np.deg2rad([azimuth, elevation])
    return np.array([[-np.sin(a), np.cos(a), 0],
                     [-np.sin(e) * np.cos(a), -np.sin(e) * np.sin(a), np.cos(e)],
                     [np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)]]) * (1, -1, -1)


def save_pictures(path, rows, titles, side, edges=None, classes=(), inches=2.2, dpi=120):
    """A grid of square pictures on white, without the margin that all of them have.

    rows: {name: [RGB float (P, P, 3), one for each title]}; side: of a pixel in nm, for a scale
    bar, or None; edges: lines behind the pictures, for each title (n, 2, 2), see see_surfaces;
    classes: those that a legend shall name, background first; inches, dpi: of a picture.
    """
    pictures = np.array([*rows.values()])
    pixels = pictures.shape[2]
    ink = np.argwhere((pictures < 1).any(axis=(0, 1, 4)))
    if edges is not None:
        ink = np.concatenate([ink, edges[..., ::-1].reshape(-1, 2)])
    ink = ink if len(ink) else np.array([[0, 0], [pixels, pixels]])
    (top, left), (bottom, right) = ink.min(0) - pixels / 40, ink.max(0) + pixels / 40
    height = inches * (bottom - top) / (right - left)
    figure = new_figure(figsize=(inches * len(titles), height * len(rows) + 0.2
                                 + 0.3 * any(titles) + 0.4 * bool(classes)), dpi=dpi)
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for (name, pictures), axes_of_row in zip(rows.items(), axes):
        for number, (picture, axis) in enumerate(zip(pictures, axes_of_row)):
            axis.set_axis_off()
            if edges is not None:
                for (x, y) in edges[number].swapaxes(1, 2):
                    axis.plot(x, y, color="0.8", linewidth=0.8, zorder=0)
                picture = np.concatenate([picture, (picture < 1).any(-1, keepdims=True)], -1)
            axis.imshow(picture, zorder=1)
            axis.set(xlim=(left, right), ylim=(bottom, top))
        axes_of_row[0].text(0.02, 0.98, name, transform=axes_of_row[0].transAxes,
                            fontsize=8 if inches < 3 else 12, va="top")
        _scale_bar(axes_of_row[0], side and (side,) * 3, 1, on_white=True)
    for axis, title in zip(axes[0], titles):
        axis.set_title(plain(title), fontsize=9)
    if classes:
        legend(figure, classes, False, CLASS_COLORS)
    save_figure(figure, path)


def class_shares(volume, n_classes, max_side):
    """How much of each block of voxels each foreground class fills, read slab by slab.

    Returns float32 (n_classes - 1, z, y, x), no side above max_side, and the sides (z, y, x) of a
    block in nm, or in voxels where the volume has no voxel size.
    """
    steps = [math.ceil(side / max_side) for side in volume.shape]
    edges = [np.arange(0, side, step) for side, step in zip(volume.shape, steps)]
    shares = np.zeros((n_classes - 1, *map(len, edges)), np.float32)
    for i, start in enumerate(edges[0]):
        slab = volume[start : start + steps[0]]
        for k in range(1, n_classes):
            count = np.add.reduceat((slab == k).sum(0, dtype=np.float32), edges[1], axis=0)
            shares[k - 1, i] = np.add.reduceat(count, edges[2], axis=1)
    for axis, (step, edge, side) in enumerate(zip(steps, edges, volume.shape)):
        sizes = np.minimum(edge + step, side) - edge
        shares /= np.expand_dims(sizes, [other for other in range(3) if other != axis])
    return shares, np.array(volume.voxel_size or (1.0, 1.0, 1.0)) * steps


def cast_rays(share, block, azimuth, elevation, pixels):
    """What parallel rays meet of a class: float32 (3, pixels, pixels).

    share (z, y, x), block (3,): see class_shares. azimuth, elevation: direction to the eye in
    degrees; slice 0 lies on top, and seen from straight above, (-90, 90), slices look as on a
    screen. A surface lies where the class fills half of a block, or less where thin sheets would
    vanish: it encloses as much as the class fills. Outside of the volume everything is empty.
    Returns the way to the first hit, infinite where there is none, the brightness there, and the
    cosine between the surface's normal and the ray.
    """
    extent = np.array(share.shape[::-1]) * block[::-1]
    frame = _eye_frame(azimuth, elevation)
    frame = torch.from_numpy(frame * 2 / extent).float()            # in x, y, z from -1 to 1
    field = ndimage.gaussian_filter(share, 0.7)
    level = min(np.quantile(field, 1 - share.mean()), 0.7 * field.max())
    level = float(np.clip(level, 0.05, 0.5))
    field = torch.from_numpy(field * (0.5 / level))[None, None]
    half, fine = float(np.linalg.norm(extent)) / 2, float(min(block))   # whole from any side
    step = fine / 2                     # along a ray: no sheet is stepped over
    across = (torch.arange(pixels) + 0.5) * (2 * half / pixels) - half
    up, right = (part.reshape(-1, 1) for part in torch.meshgrid(-across, across, indexing="ij"))

    def place(right, up, toward):
        return torch.stack(torch.broadcast_tensors(right, up, toward), -1) @ frame

    def sample(right, up, toward, grid=field, **how):
        return F.grid_sample(grid, place(right, up, toward)[None, None], **how,
                             align_corners=False)[0, 0, 0]

    result = torch.full((3, pixels**2), math.inf)
    if field.max() <= 0.5:
        return result.view(3, pixels, pixels).numpy()
    # where each ray enters and leaves the box around the class, one block wider
    filled = [np.flatnonzero(share.any(others)) for others in ((0, 1), (0, 2), (1, 2))]
    size = torch.tensor(share.shape[::-1])
    box = torch.tensor([[part[0] - 1, part[-1] + 2] for part in filled]) * 2.0
    box = (box / size[:, None] - 1).T[:, None]                                      # (2, 1, 3)
    slope = torch.where(frame[2].abs() < 1e-9, 1e-9, frame[2])
    ends = (box - place(right, up, torch.zeros(()))[:, 0]) / slope                  # (2, rays, 3)
    enter, leave = ends.amax(0).amin(-1, keepdim=True), ends.amin(0).amax(-1, keepdim=True)
    rays = torch.nonzero(enter[:, 0] > leave[:, 0])[:, 0]
    x, y, start, last = right[rays], up[rays], enter[rays], (enter - leave)[rays] / step + 1
    leaps = _leaps(field, block, (frame[2].abs() * size / 2 * step).tolist()[::-1])
    first = _first_inside(sample, leaps, x, y, start, last, step)                   # (rays, 1)
    rays, x, y, start, first = (part[first[:, 0] < math.inf]
                                for part in (rays, x, y, start, first))
    there, before = (sample(x, y, start - step * number)
                     for number in (first, (first - 1).clamp(min=0)))
    back = ((there - 0.5) / (there - before).clamp(min=1e-6)).clamp(0, 1)
    toward = start - step * first + back * step                         # (rays, 1)
    nudge = torch.tensor([-1.5 * fine, 1.5 * fine])
    normal = -torch.cat([sample(x + nudge, y, toward).diff(),
                         sample(x, y + nudge, toward).diff(),
                         sample(x, y, toward + nudge).diff()], -1)
    normal = F.normalize(normal, dim=-1)
    light = 0.3 + 0.7 * (normal @ F.normalize(torch.tensor(LIGHT), dim=0)).clamp(min=0)
    result[:, rays] = torch.stack([half - toward[:, 0], light, normal[:, 2].clamp(0, 1)])
    return result.view(3, pixels, pixels).numpy()


def _first_inside(sample, leaps, x, y, start, last, step, few=4):
    """Which of a ray's samples, one every step from `start` on, is the first above 0.5, infinite
    where none of the `last` ones is: float (rays, 1), as x, y, start and last are.

    In each round a ray either leaps over many samples that cannot be or takes a few.
    """
    first, going = torch.zeros_like(x), torch.arange(len(x))
    while len(going):
        now, toward = first[going], start[going]
        leap = sample(x[going], y[going], toward - step * now, leaps, mode="nearest",
                      padding_mode="border")
        near = torch.nonzero(leap[:, 0] < few)[:, 0]
        along = sample(x[going[near]], y[going[near]],
                       toward[near] - step * (now[near] + torch.arange(few)))       # (near, few)
        leap[near] = (along <= 0.5).cumprod(-1).sum(-1, keepdim=True).float()
        missed = (leap >= few) & (now + leap >= last[going])
        first[going] = torch.where(missed, math.inf, now + leap)
        going = going[((leap >= few) & ~missed)[:, 0]]
    return first


def _leaps(field, block, steps):
    """After how many steps of a ray its next sample may be above 0.5, at the earliest.

    field (1, 1, z, y, x); block (3,): see class_shares; steps (3,): one step of the ray in blocks.
    Returns float (1, 1, cells...), each number for a start anywhere in a cell.
    """
    size = field.shape[2:]                          # a cell is at least one block long on each axis
    cells = [math.ceil(n * min(1, side / min(block) / 2)) for n, side in zip(size, block)]
    empty = F.adaptive_max_pool3d(field[0], cells)[0] < 0.499           # not 0.5: rounding
    free = torch.from_numpy(ndimage.distance_transform_cdt(empty, "chessboard"))
    # From a cell to another that is free cells away there are at least free - 1 between their
    # faces; interpolation feels blocks half a block, so at most half a cell, before their faces.
    stride = max(step * m / n for step, m, n in zip(steps, cells, size))        # a step in cells
    return (((free - 1.5) / stride).floor() + 1)[None, None]


def _enclosing(surfaces):
    """Which of several classes hide at least half of what the others would show."""
    depth = np.stack([surface[0] for surface in surfaces])
    hidden = []
    for k, own in enumerate(depth):
        others = np.delete(depth, k, axis=0).min(0, initial=math.inf)
        hidden.append((own < others)[np.isfinite(others)].mean() >= 0.5
                      if np.isfinite(others).any() else False)
    return hidden


def compose(surfaces, classes, glass):
    """RGB float (Y, X, 3) on white: what cast_rays returned for each class, nearest first.

    classes: their numbers, for their colours; glass: which are see-through except at their rim.
    """
    import matplotlib.colors
    depth, light, facing = np.stack(surfaces, axis=1)                   # each (K, Y, X)
    colors = np.array([matplotlib.colors.to_rgb(CLASS_COLORS[k % len(CLASS_COLORS)])
                       for k in classes])
    hit = np.isfinite(depth)
    depth, light, facing = (np.where(hit, part, 0) for part in (depth, light, facing))
    # what lies deeper than its surroundings gets less light
    wide = hit.shape[1] / 40
    blurred, weight = (ndimage.gaussian_filter(part.astype(np.float32), (0, wide, wide))
                       for part in (depth, hit))
    hollow = (depth - blurred / np.maximum(weight, 1e-6)) / (0.1 * max(float(depth.max()), 1e-6))
    shade = colors[:, None, None] * (light * np.clip(1 - hollow, 0.6, 1.1))[..., None]
    shade = np.clip(shade + 0.2 * (facing**40)[..., None], 0, 1)
    alpha = hit * np.where(np.reshape(glass, (-1, 1, 1)), 0.12 + 0.5 * (1 - facing) ** 2, 1.0)
    order = np.where(hit, depth, np.inf).argsort(axis=0)
    shade, alpha = (np.take_along_axis(part, order.reshape(order.shape + (1,) * (part.ndim - 3)), 0)
                    for part in (shade, alpha))
    picture, through = np.zeros(shade.shape[1:]), np.ones(hit.shape[1:])
    for color, a in zip(shade, alpha):
        picture += (through * a)[..., None] * color
        through = through * (1 - a)
    return np.clip(picture + through[..., None], 0, 1)


def save_slice_dice(path, items, classes, colors=CLASS_COLORS):
    """slice_dice.png: the 2D Dice of every foreground class against z, a row for each volume, with
    the slices marked that were trained or validated on (Pagano 2023, figure 5).

    items: list of (name, Dice (Z, K), NaN where it is undefined or not scored, marked z).
    """
    figure = new_figure(figsize=(9, 2.6 * len(items) + 0.5), dpi=120)
    shown = {}                                  # label -> line, for the legend
    for axis, (name, dice, marked) in zip(figure.subplots(len(items), squeeze=False)[:, 0], items):
        for z in marked:
            shown["labelled slices"] = axis.axvline(z, color="0.4", linewidth=1, linestyle="--")
        for k, class_name in enumerate(classes[1:], 1):
            name_k = plain(class_name)
            shown[name_k], = axis.plot(dice[:, k], ".-", color=colors[(k - 1) % len(colors)],
                                       linewidth=1, markersize=4, label=name_k)
        axis.set(title=plain(name), ylabel="Dice of the slice", ylim=(-0.03, 1.03),
                 xlim=(-0.5, len(dice) - 0.5))
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("z")
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=6, fontsize=8,
                  frameon=False)
    save_figure(figure, path)


def save_histogram(path, panels, score):
    """histogram.png: how the values of a score spread over trained networks, as the share of each
    group (Guay 2021, figure 4).

    panels: {title: {name of a group: [value, ...]}}, one below the other; score: what the values
    are.
    """
    figure = new_figure(figsize=(6, sum(2.6 + 0.2 * len(groups) for groups in panels.values())),
                        dpi=120)
    for axis, (title, groups) in zip(figure.subplots(len(panels), squeeze=False)[:, 0],
                                     panels.items()):
        values = np.concatenate([*groups.values()])
        low, high = np.floor(values.min() * 50) / 50, np.ceil((values.max() + 1e-9) * 50) / 50
        width = next(w for w in (0.01, 0.02, 0.05, math.inf) if (high - low) / w <= 24)
        edges = low + width * np.arange(max(2, math.ceil((high - low) / width - 1e-6) + 1))
        axis.hist([*groups.values()], edges, edgecolor="0.3",
                  color=(CLASS_COLORS * len(groups))[: len(groups)],
                  weights=[np.full(len(found), 1 / len(found)) for found in groups.values()],
                  label=[plain(f"{name} ({len(found)})") for name, found in groups.items()])
        axis.set(title=plain(title), xlabel=score, ylabel="share of instances")
        axis.title.set_fontsize(9)
        axis.legend(loc="upper left", bbox_to_anchor=(0, -0.2), fontsize=8, frameon=False)
    save_figure(figure, path)


def save_curves(path, log):
    """curves.png: loss terms and validation scores against the epoch, from the path of log.csv."""
    with open(log, newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return
    stages = list(dict.fromkeys(row.get("stage", "") for row in rows))
    terms = [key for key in rows[0] if key.startswith("loss_")]     # the total moves with weights
    groups = {"loss": terms or ["loss"],
              "validation": [key for key in ("val_dice", "val_iou", "val_miou",
                                              "val_miou_org") if key in rows[0]]}
    groups = {title: keys for title, keys in groups.items() if keys}
    figure = new_figure(figsize=(5 * len(groups), 3.5), dpi=120)
    for axis, (title, keys) in zip(figure.subplots(1, len(groups), squeeze=False)[0],
                                   groups.items()):
        for key in keys:
            for stage in stages:
                points = [(int(row["epoch"]), float(row[key] or "nan")) for row in rows
                          if row.get("stage", "") == stage]
                axis.plot(*zip(*points), marker=".", label=f"{key} {stage}".strip())
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    save_figure(figure, path)


# ==================================================================================================
# Runs: command line, data, run folder, checkpoints, progress
# ==================================================================================================

# How long a process waits for the others, such as for the slowest share of a large prediction. One
# that has died is noticed at once: its connections close.
MOST_WAITING = datetime.timedelta(hours=12)
RUN_FILES = ("config.json", "log.csv", "best.pt", "last.pt", "metrics.json", "figure.png",
             "curves.png", "maps.png", "surfaces.png", "surfaces_*.png", "prediction.*",
             "prediction_*", "probability.tif", "probability_*.tif", "stages/*.tif",
             "stages/*/*.tif", "weights*.tif", "weights.png", "histogram.png",
             "instances.png", "instances_*.png", "slice_dice.png")
# A resumed run takes these from the command line, all else from its config.json; so does it with
# those of the machine that it is not given.
OF_THIS_CALL = {"out_dir", "overwrite", "resume", "checkpoint", "device", "amp", "compile",
                "workers"}
OF_THIS_MACHINE = {"device", "amp", "compile", "workers"}
# A prediction from a checkpoint takes these from the command line too, and may change the last.
INPUTS = {"volume", "label", "unlabeled_volume", "val_volume", "val_label", "test_volume",
          "test_label"}
OF_THIS_DATA = INPUTS | {"partial", "weights", "ensemble", "label_slices", "val_slices",
                         "test_ignore_label", "voxel_size", "demo", "tta", "save_probability"}
# Higher numbers are mistakes, which would take all memory, all processes or all weights at once.
LIMITS = {"lr": 1000, "epochs": 10**6, "scm_epochs": 10**6, "steps_per_epoch": 10**9,
          "batch_size": 10**6, "workers": 256}
MOST_PIXELS = 2**32         # of the crops in a step, far more than any GPU holds
OF_PREDICTION = {"label_map", "ignore_label", "seed", "threshold", "overlap", "top_k", "organelles"}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that there are: no (default: None)."""

    def _get_help_string(self, action):
        nothing = action.default is None or action.default in ([], False)
        return action.help if nothing else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def __init__(self, script, doc):
        super().__init__(prog=Path(script).name, description=doc.splitlines()[0],
                         formatter_class=HelpFormatter, allow_abbrev=False)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse_args(self, args=None, namespace=None):
        """Refuses names that neither a terminal nor a figure can show."""
        for text in sys.argv[1:] if args is None else args:
            if not text.isascii() and text != text.encode(errors="ignore").decode():
                self.error(f"{ascii(text)} is not UTF-8; rename it")
        return super().parse_args(args, namespace)


def positive(kind, least=0, most=math.inf):
    """An argparse type: a finite number of `kind` above zero, from least to most."""
    def convert(text):
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least:g} and {most:g}")
        return value
    convert.__name__ = f"positive {kind.__name__}"
    return convert


def add_common_args(parser, models, sources):
    """The flags that all scripts share, in the groups data, training and run.

    sources: for each flag with a default of the paper's, where it stands there.
    """
    parser.models = models
    flag = argparse.BooleanOptionalAction
    data = parser.add_argument_group("data").add_argument
    data("--volume", nargs="+", metavar="P", default=[], help="training volumes: TIFF, MRC, NPY or "
         "a folder of slices; P@z0:z1,y0:y1,x0:x1 crops")
    data("--label", nargs="+", metavar="P", default=[], help="their labels, in the same order")
    data("--label-slices", metavar="S", help="annotated slices: 0:165:5, 0,40,80, n=7 or every=5")
    data("--label-map", metavar="M", help="label value=class id: 191=1,223=2,*=0 or 128:256=1,*=0")
    data("--ignore-label", type=int, metavar="V", help="label value that marks unannotated voxels")
    data("--classes", nargs="+", metavar="NAME", help="class names, background first")
    data("--unlabeled-volume", nargs="+", metavar="P", default=[], help="volumes without labels")
    data("--val-volume", nargs="+", metavar="P", default=[], help="volumes that choose best.pt")
    data("--val-label", nargs="+", metavar="P", default=[], help="their labels")
    data("--val-slices", metavar="S", help="annotated slices of --volume kept for validation; n=2 "
         "or every=5: of those that are not among --label-slices, if there are such")
    data("--test-volume", nargs="+", metavar="P", default=[], help="volumes to predict; without "
         "them --volume is predicted")
    data("--test-label", nargs="+", metavar="P", default=[], help="their labels, for the scores")
    data("--voxel-size", nargs=3, type=positive(float, *PLAUSIBLE_NM), metavar=("Z", "Y", "X"),
         help="voxel size in nm, in place of the files'")
    data("--downsample", type=positive(int), default=1, metavar="N",
         help="show the network slices N times smaller in y and x")
    data("--normalize", choices=("zscore", "volume", "unit", "equalize"), default="zscore",
         help="grey levels: zero mean and unit variance, of all training slices together or of "
         "each volume by itself; 0..1; histogram equalisation per slice")
    training = parser.add_argument_group("training").add_argument
    training("--model", choices=sorted(models), help="the network")
    training("--width", type=positive(int), metavar="N", help="filters of the first level; "
             "default: the paper's")
    training("--epochs", type=positive(int), metavar="N", help="rounds of --steps-per-epoch")
    training("--steps-per-epoch", type=positive(int), metavar="N", help="optimiser steps per epoch")
    training("--batch-size", type=positive(int), metavar="N", help="crops in a step of one process")
    training("--patch-size", type=positive(int), nargs="+", metavar="N",
             help="sides Y X of the crops in pixels, after --downsample; Z Y X for a 3D network")
    training("--lr", type=positive(float), metavar="R", help="highest learning rate")
    training("--workers", type=int, metavar="N", default=4 if torch.cuda.is_available() else 0,
             help="processes that read crops")
    run = parser.add_argument_group("run").add_argument
    run("--out-dir", metavar="D", help="run folder; default runs/SCRIPT-MODEL-seedSEED")
    run("--overwrite", action="store_true", help="replace the files of an earlier run")
    run("--resume", action="store_true", help="continue an interrupted run in its folder")
    run("--checkpoint", metavar="F", help="best.pt of a run: predict --test-volume, no training")
    run("--seed", type=int, default=0, metavar="N", help="seed of everything random")
    run("--device", metavar="D", help="cpu, cuda, cuda:1, mps; default: the best there is")
    run("--amp", action=flag, help="mixed precision; default: what the device does well")
    run("--compile", action="store_true", help="torch.compile the networks")
    run("--save-probability", action="store_true", help="also write the probabilities")
    run("--tta", action=flag, default=False, help="average predictions over eight views")
    run("--demo", action="store_true", help="synthetic data, about a minute on two CPU cores")
    for action in parser._actions:
        if action.dest in sources:
            action.help += f" ({sources[action.dest]})"


def parse(parser, argv, demo, named_labels=False, settings=lambda args: {}):
    """Parse the command line; --demo, --resume and --checkpoint bring their own defaults.

    demo: the flags of the demo; settings: args -> defaults that depend on other flags, such as
    those of a model. What is typed always wins, except that a resumed run must have
    the arguments that it was started with. named_labels: labels may be NAME=PATH, see named_paths,
    as many of each name as there are volumes.
    """
    untyped = []                # a list, so that flags that can be given twice append to a copy
    names = vars(parser.parse_args([]))
    args = parser.parse_args(argv)
    typed = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, untyped))))
    typed = {name: value for name, value in typed.items() if value is not untyped}
    try:
        if args.checkpoint:
            saved = load_checkpoint(args.checkpoint, parser.prog)["args"]
            keep = {n: v for n, v in saved.items()
                    if n in names and n not in OF_THIS_CALL | OF_THIS_DATA}
            check_saved(parser, keep, args.checkpoint)
            changed = [n for n in typed if n in keep and n not in OF_PREDICTION
                       and typed[n] != keep[n]]
            if changed:
                parser.error(f"{flag_name(changed[0])} cannot differ from the checkpoint's "
                             f"{keep[changed[0]]}")
            args = argparse.Namespace(**{**vars(args), **keep, **typed})
        elif args.demo:
            given = sorted(n for n in typed if n in INPUTS | {"partial", "weights"})
            if given:
                parser.error(f"--demo makes its own data; leave {flag_name(given[0])} out")
            args = argparse.Namespace(**{**vars(args), **demo, **typed})
        if not args.checkpoint:
            given = {**(demo if args.demo else {}), **typed}
            args = argparse.Namespace(**{**vars(args), **settings(args), **given})
        args.out_dir = args.out_dir or default_folder(parser.prog, args)
        if args.resume:
            args = resume_args(parser, args, typed)
    except InputError as error:
        parser.error(str(error))
    check_args(parser, args, named_paths if named_labels else lambda paths: {None: paths})
    return args


def flag_name(name):
    """patch_size -> --patch-size."""
    return "--" + name.replace("_", "-")


def named_paths(texts):
    """{name: [path, ...]} of arguments NAME=PATH, in their order; a bare path has the name None."""
    paths = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or "/" in name or os.path.exists(_split_crop(text)[0]):
            name, path = None, text
        paths.setdefault(name, []).append(path)
    return paths


def format_shape(shape):
    """(110, 768, 1024) -> 110 x 768 x 1024."""
    return " x ".join(str(side) for side in shape)


def default_folder(prog, args):
    """runs/SCRIPT-MODEL-seedSEED, with -prediction for a prediction from a checkpoint, -ensemble
    for one from several runs."""
    ensemble = getattr(args, "ensemble", None)
    kind = ("-ensemble" if ensemble else "-prediction" if args.checkpoint else
            "-demo" if args.demo else "")
    return f"runs/{Path(prog).stem}-{args.model}-seed{args.seed}{kind}"


def resume_args(parser, args, typed):
    """The arguments of the run in args.out_dir; an error where the command line differs."""
    path = Path(args.out_dir) / "config.json"
    try:
        config = json.loads(path.read_text())
        saved, whole = {**config["args"]}, config.get("part_of")
        *_, script = config["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"--resume: {path} is no config of an earlier run; check --out-dir")
    if whole:
        raise InputError(f"--resume: {args.out_dir} is part of the run {whole}; resume that one")
    if script != parser.prog:
        raise InputError(f"--resume: {args.out_dir} holds a run of {script}, not of {parser.prog}")
    if saved.get("checkpoint"):
        raise InputError(f"--resume: {args.out_dir} holds a prediction, no training; start it "
                         "again with --overwrite")
    for name, value in typed.items():
        if name not in OF_THIS_CALL and saved.get(name) != value:
            raise InputError(f"--resume: {flag_name(name)} was {saved.get(name)} and is now "
                             f"{value}; leave it out, or start a new run in another --out-dir")
    kept = OF_THIS_MACHINE - set(typed)
    own = {name: value for name, value in vars(args).items() if name in OF_THIS_CALL - kept}
    check_saved(parser, {n: v for n, v in saved.items() if n not in own}, path)
    if not (path.parent / "last.pt").exists():
        if any([*path.parent.glob(f"**/{name}")]
               for name in ("log.csv", "best.pt", "metrics.json")):
            raise InputError(f"--resume: {args.out_dir} holds no last.pt; start with --overwrite")
        own |= {"resume": False, "overwrite": True}     # it was stopped before the first one
    return argparse.Namespace(**{**vars(args), **saved, **own})


def check_saved(parser, saved, path):
    """Raise InputError where arguments from a file are not what the command line could give."""
    for action in parser._actions:
        value, default = saved.get(action.dest, action.default), action.default
        if not (_could_give(action, value) or type(value) is type(default) and value == default):
            raise InputError(f"{path}: damaged, or of another version, its "
                             f"{flag_name(action.dest)} is {str(value)[:100]!r}")


def _could_give(action, value):
    """Whether an argparse action can result in this value."""
    if action.nargs == 0:
        return isinstance(value, bool)
    is_list = isinstance(value, (list, tuple))
    if isinstance(action, argparse._AppendAction):              # --partial
        return is_list and all(isinstance(each, list) and len(each) == action.nargs and all(
            isinstance(text, str) for text in each) for each in value)
    if action.nargs and not (is_list and action.nargs in ("+", len(value))):
        return False
    try:
        values = value if action.nargs else [value]
        return all((action.type or str)(str(each)) == each for each in values) and (
            value in (action.choices or [value]))
    except (ValueError, TypeError, RuntimeError, OverflowError, argparse.ArgumentTypeError):
        return False


def check_args(parser, args, by_name):
    """Errors that need no file: what must be given together. by_name: label arguments -> {name or
    None: paths}."""
    for name, most in LIMITS.items():
        value = getattr(args, name, None) or 0
        if value > most:
            shown = f"{value:g}" if isinstance(value, float) else value
            parser.error(f"{flag_name(name)} {shown} is above {most}")
    batch_size, sides = args.batch_size or 1, args.patch_size or [512, 512]
    if batch_size * math.prod(sides) > MOST_PIXELS and batch_size > 1:
        parser.error(f"--batch-size {batch_size} of --patch-size {format_shape(sides)}: more than "
                     f"{MOST_PIXELS:,} pixels in a step; give smaller ones")
    if (args.width or 0) > 512 and not fits_memory(parser.models[args.model], args.width):
        parser.error(f"--width {args.width}: out of memory, which the weights of {args.model} "
                     f"alone would fill; give a smaller one")
    if args.workers < 0:
        parser.error(f"--workers {args.workers} is negative")
    if not 0 <= args.seed < 2**63:
        parser.error(f"--seed {args.seed} is not between 0 and 2^63 - 1")
    if args.checkpoint and not args.test_volume:
        parser.error("--checkpoint needs --test-volume: the volumes to predict")
    if not (args.checkpoint or args.demo or args.volume or getattr(args, "partial", [])):
        parser.error("give --volume and --label (or --demo, or --checkpoint and --test-volume)")
    for volume, label in (("volume", "label"), ("val_volume", "val_label"),
                          ("test_volume", "test_label")):
        volumes, groups = len(getattr(args, volume)), by_name(getattr(args, label))
        for name, paths in (groups or {None: []}).items():
            optional = volume == "test_volume" and not paths
            if volumes != len(paths) and not optional and not args.demo:
                of = f" of {name}" if name else ""
                parser.error(f"{flag_name(volume)} has {volumes} and {flag_name(label)} "
                             f"{len(paths)} paths{of}; give one label{of} for each volume")
    if args.classes and len(args.classes) < 2:
        parser.error("--classes needs two names at least, the background's first")
    if len(args.classes or []) > IGNORE:
        parser.error(f"--classes: {len(args.classes)} names, there can be {IGNORE}")
    for one, other in (("resume", "overwrite"), ("resume", "checkpoint"), ("demo", "checkpoint")):
        if getattr(args, one) and getattr(args, other):
            parser.error(f"--{one} and --{other} contradict each other")


def fits_memory(model, width):
    """Whether the weights of a network this wide, and their gradients, fit into this machine."""
    try:
        with torch.device("meta"):              # shapes only: nothing is allocated
            weights = count_parameters(model(1, 1, width))
        return 8 * weights < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except InputError:                          # of its own about the width, later
        return True
    except (AttributeError, OSError):           # Windows does not tell
        return True
    except (RuntimeError, TypeError, ValueError, OverflowError):    # numbers beyond 64 bits
        return False


# -- data ------------------------------------------------------------------------------------------


@dataclass
class Item:
    """A volume to predict: its file, what the network sees of it, and its labels or None."""
    name: str
    volume: object
    image: object
    label: object


@dataclass
class Data:
    """The opened volumes of a run. Lists run in the order of the command line.

    images, labels: lazy uint8 (Z, Y, X), as the network sees them (--downsample, --resize); slices:
    their annotated z for training; merges: for each of them, see parse_merge, the partially
    labelled ones last; unlabeled, unlabeled_slices: what has no label, for the semi-supervised
    scripts; train, val, test: Items, train holding the training volumes with the labels to train on
    and the unlabelled ones without; classes: names; normalization: see normalize; seen: see
    seen_slices; notes: lines to print.
    """
    classes: list
    normalization: dict
    seen: list
    test: list
    images: list = field(default_factory=list)
    labels: list = field(default_factory=list)
    slices: list = field(default_factory=list)
    merges: list = field(default_factory=list)
    unlabeled: list = field(default_factory=list)
    unlabeled_slices: list = field(default_factory=list)
    train: list = field(default_factory=list)
    val: list = field(default_factory=list)
    notes: list = field(default_factory=list)

    @property
    def out_channels(self):
        """One channel with a sigmoid for two classes, else one per class with a softmax."""
        return 1 if len(self.classes) == 2 else len(self.classes)


def open_data(args, checkpoint=None, score_validation=False):
    """Open every volume and label that the command line names, and check them, before any work.

    With a checkpoint, classes and normalisation are the checkpoint's and only the test volumes are
    opened. score_validation: for want of test volumes, training and validation volumes are
    predicted, and what validates scores. Raises InputError.
    """
    label_map = parse_label_map(args.label_map) if args.label_map else None
    n_classes = len(checkpoint["classes"]) if checkpoint else len(args.classes or []) or None
    rules = {"label_map": label_map, "ignore_label": args.ignore_label}
    if not checkpoint:
        volumes, labels, merges, n_classes = open_training(args, n_classes, rules)
    names = checkpoint["classes"] if checkpoint else class_names(args.classes, n_classes)
    items = {}
    for kind in ("val", "test"):
        paths = getattr(args, f"{kind}_volume")
        opened = [open_input(path, args) for path in paths]
        label_paths = getattr(args, f"{kind}_label")
        own = dict(rules)
        if kind == "test" and getattr(args, "test_ignore_label", None) is not None:
            own["ignore_label"] = (args.ignore_label, args.test_ignore_label)
        truths = open_labels(label_paths, opened, n_classes, require_foreground=False,
                             **own)[0] if label_paths else [None] * len(opened)
        items[kind] = [Item(name, v, view(v, args), truth)
                       for name, v, truth in zip(unique_names(paths), opened, truths)]
    if checkpoint:
        return Data(names, checkpoint["normalization"], checkpoint["seen"],
                    [without_seen_slices(item, checkpoint["seen"]) for item in items["test"]],
                    notes=gap_notes(item.volume for item in items["test"]))

    check_merges(merges, names)
    every = list(labels)                                # with the slices that may validate
    if args.val_slices and args.label_slices:
        every[: len(args.volume)] = open_labels(args.label, volumes[: len(args.volume)], n_classes,
                                                **rules)[0]
    held_out = [validation_slices(args.val_slices, label, all_of_it.slices)
                if args.val_slices and i < len(args.volume) else []
                for i, (label, all_of_it) in enumerate(zip(labels, every))]
    images = [view(volume, args) for volume in volumes]
    slices = [np.setdiff1d(label.slices, zs) for label, zs in zip(labels, held_out)]
    if not sum(map(len, slices)):
        raise InputError(f"--val-slices {args.val_slices}: no slice is left to train on")
    drawn = np.concatenate([label.counts[zs] for label, zs in zip(labels, slices)])
    notes = check_annotation(drawn, names, args.label_slices)
    notes += [merge_note(volume.path, merge, names) for volume, merge in zip(volumes, merges)
              if len(set(merge)) < len(names)]
    val = [Item(f"val/{item.name}", item.volume, item.image, shrink(item.label, args))
           for item in items["val"]]
    paths = [volume.path for volume in volumes]
    names_in = [f"train/{name}" for name in unique_names([*paths, *args.unlabeled_volume])]
    val += [Item(name, v, image, shrink(OnlySlices(label, zs), args))
            for name, v, image, label, zs in zip(names_in, volumes, images, every, held_out)
            if len(zs)]
    train = [Item(name, v, image, OnlySlices(label, zs))
             for name, v, image, label, zs in zip(names_in, volumes, images, labels, slices)]
    for name, path in zip(names_in[len(train):], args.unlabeled_volume):
        volume = open_input(path, args)
        train.append(Item(name, volume, view(volume, args), None))
    notes += gap_notes(item.volume for item in train + items["val"] + items["test"])
    used = [OnlySlices(label, np.union1d(label.slices, zs)) for label, zs in zip(labels, held_out)]
    seen = seen_slices([*volumes, *(item.volume for item in items["val"])],
                       [*used, *(item.label for item in items["val"])])
    if items["test"]:
        test = [without_seen_slices(item, seen) for item in items["test"]]
    else:
        own = [(v, image, OnlySlices(label, zs) if score_validation and len(zs) else None)
               for v, image, label, zs in zip(volumes, images, every, held_out)]
        own += [(item.volume, item.image, item.label) for item in items["val"] if score_validation]
        test = [Item(name, *each)
                for name, each in zip(unique_names([v.path for v, *_ in own]), own)]
    shrunk = [shrink(item.label, args) for item in train[: len(volumes)]]
    slices = [label.slices for label in shrunk]
    return Data(
        names, measure_normalization(images, slices, args.normalize), seen,
        test, images, shrunk, slices, merges,
        [item.image for item in train],
        [np.setdiff1d(np.arange(len(image)), shrink(label, args).slices)
         for image, label in zip(images, used)]
        + [np.arange(len(item.image)) for item in train[len(volumes):]], train, val, notes)


def gap_notes(volumes):
    """A line to print for each folder of slices whose numbers leave one out."""
    notes = []
    for volume in volumes:
        numbers = (volume.numbers or ())[volume.crop[0]]
        steps = np.diff(numbers)
        if len(steps) and steps.max() != steps.min():
            place = int(steps.argmax())
            notes.append(f"note: {volume.path}: no slice between {numbers[place]} and "
                         f"{numbers[place + 1]}, which are taken for neighbours")
    return notes


def merge_note(path, merge, names):
    """How a partially labelled volume is read, as a line to print."""
    shown = [f"{names[k]} (with {' and '.join(others)})" if others else names[k]
             for k in sorted(set(merge))
             for others in [[names[j] for j, target in enumerate(merge) if target == k != j]]]
    return f"{path} shows {', '.join(shown)}"


def open_training(args, n_classes, rules):
    """The training volumes, fully labelled ones first, then partially labelled ones (--partial).

    n_classes: how many, None where the labels decide; rules: options of open_labels. Returns lists
    of Volumes, of Labels and of merges (see parse_merge), and the number of classes.
    """
    volumes, labels = [open_input(path, args) for path in args.volume], []
    if volumes:
        labels, n_classes = open_labels(args.label, volumes, n_classes,
                                        label_slices=args.label_slices, **rules)
    merges = [list(range(n_classes))] * len(volumes)
    for path, label, text in getattr(args, "partial", []):
        merges.append(parse_merge(text, n_classes))
        volumes.append(open_input(path, args))
        labels += open_labels([label], volumes[-1:], n_classes, merge=merges[-1], **rules)[0]
    return volumes, labels, merges, n_classes


def check_merges(merges, names):
    """Raise InputError where a class has no label of its own in any volume, or where no volume
    tells two classes apart: nothing would teach the network the difference."""
    for k, name in enumerate(names):
        if all(merge[k] != k for merge in merges):
            raise InputError(f"--partial: the class {name} is merged into another one in every "
                             f"volume; one volume must show it as {k}")
        for j in range(k):
            if all(merge[j] == merge[k] for merge in merges):
                raise InputError(f"--partial: the classes {names[j]} and {name} are the same label "
                                 f"in every volume; one volume must tell them apart")


def check_annotation(counts, names, label_slices):
    """Notes on the annotated voxels (slices, classes) to train on, as lines to print.

    Raises InputError where a class has none: nothing would stop a network from seeing it anywhere.
    """
    missing = [name for name, voxels in zip(names[1:], counts.sum(0)[1:]) if not voxels]
    if missing:
        raise InputError(f"no slice to train on shows the class {missing[0]}; annotate some, "
                         f"choose other slices, or leave the class out with --label-map")
    empty = int((counts[:, 1:].sum(1) == 0).sum())
    if label_slices or 2 * empty <= len(counts):
        return []
    return [f"note: {empty} of {len(counts)} annotated slices show background only; if nobody "
            f"annotated them, name the others with --label-slices"]


def validation_slices(text, label, annotated):
    """The slices that --val-slices keeps for validation (sorted int array).

    label: the Labels to train on; annotated: every annotated slice of their file. Numbers name
    annotated slices. n=2 or every=5 draw from those that are not trained on, or, where all are,
    from these.
    """
    rest = np.setdiff1d(annotated, label.slices)
    rest = rest if len(rest) else annotated
    try:
        if "=" in text:
            return rest[parse_slices(text, len(rest))]
        chosen = parse_slices(text, len(label))
    except InputError as error:
        raise InputError(f"--val-slices, of {len(rest)} annotated slices: {error}")
    missing = np.setdiff1d(chosen, annotated)
    if len(missing):
        raise InputError(f"--val-slices {text}: slice {missing[0]} of {label.path} is not "
                         f"annotated")
    return chosen


def open_input(path, args):
    """open_volume with the voxel size of the command line, where one is given."""
    volume = open_volume(path)
    if args.voxel_size:
        volume.voxel_size = tuple(args.voxel_size)
    return volume


def view(volume, args):
    """What a network sees of a volume: uint8, normalised, resized and downsampled as asked. Raises
    InputError where any voxel is NaN: better now than after hours of training."""
    if volume.dtype.kind == "f":
        check_finite(volume)
    image = as_uint8(volume, equalize=args.normalize == "equalize")
    if args.normalize == "volume":
        image = standardize(image)
    if getattr(args, "resize", None):
        image = resize(image, args.resize, linear=True)
    return downsample(image, args.downsample, "mean")


def shrink(label, args):
    """Labels at the resolution that the network sees."""
    if getattr(args, "resize", None):
        label = resize(label, args.resize, linear=False)
    return downsample(label, args.downsample, "majority")


class OnlySlices(LazyArray):
    """Labels of which only some slices count as annotated; the others read as IGNORE."""

    def __init__(self, label, slices):
        super().__init__(label.path, label.shape, label.dtype, label.voxel_size)
        self.label, self.slices = label, np.asarray(slices, dtype=int)

    def read(self, z, y, x):
        box = self.label.read(z, y, x)
        box[~np.isin(np.arange(z.start, z.stop), self.slices)] = IGNORE
        return box


def seen_slices(volumes, labels):
    """What a run trains and validates on, for its checkpoints: for each volume its file, the y and
    x it is cropped to, and the annotated z, counted in the file."""
    return [{"file": os.path.realpath(volume.file),
             "yx": [[c.start, c.stop] for c in volume.crop[1:]],
             "z": [int(z) + volume.crop[0].start for z in label.slices]}
            for volume, label in zip(volumes, labels)]


def without_seen_slices(item, seen):
    """The item, its label without the slices that were trained or validated on: they do not score.

    So a whole stack with dense labels can be the test volume of a run that used a few of its slices
    (as in train_cps.py's paper).
    """
    if item.label is None:
        return item
    slices = np.setdiff1d(item.label.slices, seen_in(item.volume, seen))
    if not len(slices):
        raise InputError(f"{item.volume.path}: every labelled slice was trained or "
                         f"validated on; test on others")
    return Item(item.name, item.volume, item.image, OnlySlices(item.label, slices))


def seen_in(volume, seen):
    """The z of a volume that were trained or validated on, in order; see seen_slices."""
    file, (depth, *sides) = os.path.realpath(volume.file), volume.crop
    zs = {z - depth.start for other in seen for z in other["z"]
          if other["file"] == file and all(own.start < end and start < own.stop
                                           for own, (start, end) in zip(sides, other["yx"]))}
    return sorted(z for z in zs if 0 <= z < len(volume))


def class_names(names, n_classes):
    """Names for all classes: those given, else background, class 1, class 2, …"""
    repeated = [name for name, times in Counter(names or []).items() if times > 1]
    if repeated:
        raise InputError(f"--classes names {repeated[0]} twice")
    if names and len(names) != n_classes:
        raise InputError(f"--classes has {len(names)} names, the labels have {n_classes} classes")
    return list(names or ["background", *(f"class {k}" for k in range(1, n_classes))])


def unique_names(paths):
    """A short name for each path, for file names: the stem, all numbered where two are alike."""
    stems = [re.sub(r"[^\w.-]+", "_", Path(_split_crop(path)[0]).stem) for path in paths]
    if len(set(stems)) == len(stems):
        return stems
    return [f"{number}_{stem}" for number, stem in enumerate(stems, 1)]


def write_demo(run, shape, voxel_size=(20.0, 8.0, 8.0)):
    """Write two synthetic volumes into the run folder and point the arguments at them.

    A training volume as TIFF (uint8) and a test volume as MRC (int8, as tomograms often are), each
    with labels of PHANTOM_CLASSES.
    """
    args, folder = run.args, run.folder / "demo"
    args.volume, args.label = [str(folder / "train.tif")], [str(folder / "train_label.tif")]
    args.test_volume, args.test_label = [str(folder / "test.mrc")], [str(folder / "test_label.mrc")]
    if run.rank == 0 and not args.resume:
        folder.mkdir(parents=True, exist_ok=True)
        pairs = args.volume + args.label, args.test_volume + args.test_label
        for seed, paths in enumerate(pairs):
            image, label = phantom(shape, voxel_size, seed=1000 * args.seed + seed)
            write_volumes(paths, image, [label], voxel_size)
    run.barrier()


def write_volumes(paths, image, labels, voxel_size):
    """Write an image and its labels, all uint8, as TIFF or MRC; an MRC image becomes int8, shifted
    by 128, as tomograms often are."""
    if paths[0].endswith(MRC_EXTENSIONS):
        image = (image.astype(np.int16) - 128).astype(np.int8)
    for path, array in zip(paths, (image, *labels)):
        with create_volume(path, array.shape, array.dtype, voxel_size,
                           max_value=max(int(label.max()) for label in labels)) as writer:
            writer[:] = array


# -- device and processes --------------------------------------------------------------------------


def choose_device(name):
    """The device of that name, or the best there is. Raises InputError where it does not exist."""
    if name is None:
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.zeros(1, device=name).item()      # "meta" makes tensors, but holds nothing
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
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(-3, 1 << 30)                    # M_MMAP_THRESHOLD
    mallopt(-1, (1 << 31) - 1)              # M_TRIM_THRESHOLD


def average_gradients(network):
    """Average the gradients of all processes. A step may run the network more than once, which
    DistributedDataParallel does not allow together with BatchNorm."""
    if torch.distributed.is_initialized():
        _average([p.grad for p in network.parameters() if p.grad is not None])


def average_statistics(network):
    """Average the running statistics of BatchNorm over all processes."""
    if torch.distributed.is_initialized():
        _average([buffer for name, buffer in network.named_buffers() if "running_" in name])


def _average(tensors):
    if not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(part.view_as(tensor))


# -- run -------------------------------------------------------------------------------------------


def plateaus(history, patience, cooldown=0, threshold=0.0):
    """How often `patience` epochs in a row brought nothing better: a learning-rate reducer.

    history: a value of each epoch, the higher the better; better is what exceeds the best by a
    share `threshold` of it. cooldown: epochs that do not count after each time.
    """
    best, waited, rest, count = None, 0, 0, 0
    for value in history:
        better = best is None or value > best + threshold * abs(best)
        best, waited = (value, 0) if better else (best, waited + 1)
        if rest:
            rest, waited = rest - 1, 0
        if waited >= patience:
            count, waited, rest = count + 1, 0, cooldown
    return count


def how_to_resume(script, folder):
    """The command that goes on with an interrupted run, for a shell."""
    launcher = "python" if shutil.which("python") == sys.executable else sys.executable
    world, here = [int(os.environ.get(name, 0)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")]
    if here:
        module = f"{launcher} -m torch.distributed.run"
        launcher = f"{'torchrun' if shutil.which('torchrun') else module} --nproc-per-node={here}"
    if here < world:
        launcher += f" --nnodes={world // here} …"
    typed = sys.argv[0] if Path(sys.argv[0]).name == script else script
    return f"continue with: {launcher} {shlex.join([typed, '--resume', '--out-dir', str(folder)])}"


LOCKED = []         # descriptors of folders into which no other process may write, see lock_folder


def lock_folder(folder):
    """Keep other processes from writing into a folder until this command ends or dies; whether the
    system can do that.

    Raises InputError where one does already, and does not end within ten seconds, as the --workers
    of one that was killed do.
    """
    if fcntl is None:
        return False
    descriptor = os.open(folder, os.O_RDONLY)
    LOCKED.append(descriptor)
    for tries_left in reversed(range(20)):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if not tries_left:
                raise InputError(f"--out-dir {folder}: another process is writing into it")
        except OSError:                     # a file system without locks
            return False
        time.sleep(0.5)


LOST_WORKER = ("one of the --workers was killed, for want of memory perhaps; give fewer; --resume "
               "goes on from the last checkpoint")


def command(main):
    """Run main(args) as a command: bad input is one line and exit status 2, never a traceback; an
    interruption, Ctrl-C or SIGTERM, one line and status 130."""
    @functools.wraps(main)
    def wrapper(args):
        prog = Path(sys.argv[0]).name
        for stream in (sys.stdout, sys.stderr):         # names that the terminal cannot show
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        for number in signal.SIGINT, signal.SIGTERM:    # Python's own end is no work to interrupt
            atexit.register(signal.signal, number, signal.SIG_IGN)
        handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            result = main(args)
            if torch.distributed.is_initialized():      # should one crash as it leaves, all is done
                torch.distributed.barrier()
            return result
        except InputError as error:         # one of --workers sends its traceback along
            line = str(error).splitlines()[-1].removeprefix("emseg.InputError: ")
            print(f"{prog}: error: {line}", file=sys.stderr)
            raise SystemExit(2)
        except OSError as error:
            print(f"{prog}: error: {error}", file=sys.stderr)
            raise SystemExit(2)
        except (RuntimeError, ValueError, MemoryError) as error:
            if torch.distributed.is_initialized() and (
                    isinstance(error, torch.distributed.DistError)
                    or re.search("gloo|by peer", str(error))):
                advice = "another process has ended; --resume goes on from the last checkpoint"
            elif re.search("DataLoader worker|Pin memory thread", str(error)):
                advice = LOST_WORKER
            elif isinstance(error, MemoryError):        # NumPy's
                advice = f"out of memory ({error or 'none is left'})"
            elif re.search("out of memory|allocate memory", str(error)):
                advice = "out of memory; give a smaller --batch-size, --patch-size or --width"
            elif "more than 1 value per channel" in str(error):
                advice = "a batch of one so small patch cannot be normalised; give larger ones"
            else:
                raise
            print(f"{prog}: error: {advice}", file=sys.stderr)
            raise SystemExit(2)
        except KeyboardInterrupt:
            folder = Path(args.out_dir)
            how = (how_to_resume(prog, folder) if (folder / "last.pt").exists() else
                   "start again, with --overwrite" if folder.exists() else "start again")
            print(f"{prog}: interrupted; {how}", file=sys.stderr)
            raise SystemExit(130)
        finally:
            signal.signal(signal.SIGTERM, handler)
            while LOCKED:
                os.close(LOCKED.pop())
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    return wrapper


def write_text(path, text):
    """Write a small file so that it is always whole. Raises InputError."""
    with replacing(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8", newline="\n")


def write_json(path, content):
    """Write a JSON file, None for null; see write_text."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def provenance(args, script):
    """What it takes to run a script (its path) again, for config.json."""
    script = Path(script)
    sources = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()
               for path in (Path(__file__), script)}
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True,
                         cwd=script.resolve().parent) if shutil.which("git") else None
    return {"args": vars(args), "argv": sys.argv, "python": platform.python_version(),
            "versions": {m.__name__: m.__version__ for m in (torch, np, scipy, tifffile, mrcfile)},
            "sha256": sources,
            "git": git.stdout.strip() if git and git.returncode == 0 else None}


def volume_entry(volume, label, prediction, shape, result=None, organelles=None):
    """The entry of a volume in metrics.json: paths, voxels and its `volume_scores`, None where it
    has no label."""
    keys = ("ignored", "per_class", "dice", "iou", "miou", "accuracy")
    return {"volume": volume, "label": label, "prediction": str(prediction),
            "voxels": math.prod(shape),
            **dict.fromkeys([*keys, *(["miou_org"] if organelles else [])]), **(result or {})}


def metrics_content(script, classes, volumes, mean, **more):
    """What metrics.json holds: the training scripts' and evaluate.py's. Keys that `more` does not
    give, such as the model of a foreign program, are None."""
    return {"schema": 1, "script": script, **dict.fromkeys(("model", "seed", "selected_on")),
            "classes": classes, "volumes": volumes, "mean": mean,
            **dict.fromkeys(("train_seconds", "predict_seconds", "predict_voxels_per_second",
                             "peak_memory_gib", "parameters")), **more}


def save_checkpoint(path, content):
    """Write a checkpoint so that the file is always whole; see replacing. Raises InputError."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:   # as which PyTorch's writer passes on a full disk or Ctrl-C
            raise error.__context__ or OSError(_one_line(error))


def load_checkpoint(path, script):
    """A checkpoint of `script`; a stranger's file runs no code. Raises InputError."""
    if os.path.isdir(path):
        raise InputError(f"{path}: a folder; give the file best.pt in it")
    if os.path.exists(path) and not os.path.isfile(path):       # to open a pipe would wait for ever
        raise InputError(f"{path}: no file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # of odd pickles, before they are refused
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint")
    except Exception as error:     # torch.load raises what it likes on damaged or malicious files
        raise InputError(f"{path}: damaged, or not a checkpoint that is safe to load "
                         f"({type(error).__name__})")
    if not isinstance(content, dict) or "script" not in content:
        raise InputError(f"{path}: not a checkpoint of emseg")
    if content["script"] != Path(script).name:
        raise InputError(f"{path}: a checkpoint of {content['script']}, not of {Path(script).name}")
    for part in (content, *_parts(content)):
        if not set(CHECKPOINT) <= set(part):
            raise InputError(f"{path}: a checkpoint of another version; train again")
        for key in CHECKPOINT:
            if not _makes_sense(part, key):
                raise InputError(f"{path}: damaged, or not a checkpoint of emseg: its '{key}' "
                                 f"makes no sense")
    return content


def _makes_sense(checkpoint, key):
    """Whether an entry of a checkpoint is what CHECKPOINT wants. A run of parts has no network of
    its own, and may have no grey levels."""
    if key == "normalization" and checkpoint[key] is None:
        return not checkpoint["modules"]
    try:
        return CHECKPOINT[key](checkpoint[key])
    except (KeyError, TypeError, ValueError):
        return False


def _parts(content):
    """The checkpoints of parts in a checkpoint; whatever they are, dictionaries."""
    parts = content.get("parts", {})
    parts = list(parts.values()) if isinstance(parts, dict) else [parts]
    return [part if isinstance(part, dict) else {} for part in parts]


def _is_number(value, least=-math.inf):
    return isinstance(value, (int, float)) and math.isfinite(value) and value >= least


# What the entries of a checkpoint must be.
CHECKPOINT = {
    "args": lambda value: isinstance(value, dict),
    "modules": lambda value: isinstance(value, dict) and all(
        isinstance(state, dict) for state in value.values()),
    "classes": lambda value: isinstance(value, list) and 2 <= len(value) <= IGNORE and all(
        isinstance(name, str) for name in value),
    "normalization": lambda value: _is_number(value["mean"]) and _is_number(value["std"], 1e-6),
    "seen": lambda value: isinstance(value, list) and all(
        isinstance(each["file"], str) and all(map(_is_number, each["z"]))
        and all(_is_number(start) and _is_number(end) for start, end in each["yx"])
        for each in value),
    "best": lambda value: value is None or _is_number(value),
    "seconds": lambda value: _is_number(value, 0)}


class Run:
    """The bookkeeping of one run: folder, device, seeds, log, checkpoints, progress, results.

    The training loop stays in the script:

        run = Run(args, __file__)
        data = run.open_data()
        run.begin(steps_per_epoch, network=network, optimizer=optimizer)
        for epoch in run.epochs():
            for step in run.steps(epoch):
                ...
                run.log(lr=lr, loss=loss)
            run.end_epoch(run.validate(predict))
        run.use_best(network=network)
        run.report([run.predict(predict, item) for item in data.test])

    A run may consist of parts, runs in its subfolders that train one after another: see part,
    begin_parts and gather.
    """

    def __init__(self, args, script, whole=None, checkpoint=None):
        self.args, self.script, self.whole = args, Path(script), whole
        self.device = choose_device(args.device)
        self.dtype = choose_precision(self.device, args.amp)
        self.rank, self.world = 0, int(os.environ.get("WORLD_SIZE", 1))
        if self.world > 1:
            if not whole:
                torch.distributed.init_process_group(
                    "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo",
                    timeout=MOST_WAITING)
            self.rank = torch.distributed.get_rank()
        self.training = not args.checkpoint
        if args.checkpoint and not checkpoint:
            checkpoint = load_checkpoint(args.checkpoint, script)
        self.checkpoint = checkpoint
        self.folder = Path(args.out_dir)
        if self.rank == 0:
            self._check_folder()
        if self.device.type == "cpu":
            keep_freed_memory()
        elif self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.benchmark = True
        torch.manual_seed(args.seed)
        self.step, self.seconds, self.sums, self.pending = 0, 0.0, {}, None
        self.best, self.history = None, []      # the metric of end_epoch: highest, of each epoch
        self.losses = []                        # the mean losses of each epoch, {name: value}
        self.predicted_voxels, self.predict_seconds, self.interrupted = 0, 0.0, None
        self.stage, self.threshold = None, getattr(args, "threshold", 0.5)
        self.colors = CLASS_COLORS              # of the foreground classes, in figure.png
        self.organelles = getattr(args, "organelles", None)     # class ids of miou_org
        if self.checkpoint:
            self.best, self.seconds = self.checkpoint["best"], self.checkpoint["seconds"]
        if not whole:
            self.say(f"{self.device}, {str(self.dtype)[6:]}" + (f", {self.world} processes"
                                                                if self.world > 1 else ""))

    def _check_folder(self):
        """Refuse a folder that holds something, unless told what to do with it, and one into which
        another process writes."""
        if not self.folder.exists():
            return
        if not self.folder.is_dir():
            raise InputError(f"--out-dir {self.folder} is a file")
        if not self.whole:
            lock_folder(self.folder)
        used = any(not file.name.startswith(".") for file in self.folder.iterdir())
        if used and not (self.args.overwrite or self.args.resume):
            raise InputError(f"--out-dir {self.folder} is not empty; give --overwrite, --resume or "
                             f"another folder")
        if self.checkpoint and (self.folder / "last.pt").exists():
            raise InputError(f"--out-dir {self.folder} holds a training run; predict into another "
                             f"folder")

    def part(self, name, **changes):
        """A run in the subfolder `name`, a part of this one: with changed arguments, resumed with
        this one if it has begun, and with its own share of a checkpoint (see gather)."""
        folder = self.folder / name
        changes["resume"] = self.args.resume and (folder / "last.pt").exists()
        changes["overwrite"] = self.args.overwrite or self.args.resume
        checkpoint = self.checkpoint and self.checkpoint.get("parts", {}).get(name, self.checkpoint)
        if checkpoint and not checkpoint["modules"]:
            raise InputError(f"{self.args.checkpoint}: holds no network; give best.pt")
        self.barrier()          # before a process can write the file that another one looks for
        return Run(argparse.Namespace(**{**vars(self.args), **changes, "out_dir": str(folder)}),
                   self.script, self, checkpoint)

    def begin_parts(self):
        """Start or resume a run that has nothing to train but its parts, before these begin."""
        if self.training:
            self.begin(0, stages={})
        else:
            self._new_folder()
        self.barrier()

    def gather(self, parts):
        """Take over what the parts {name: Run} have learnt. In training write their best.pt into
        one, from which --checkpoint predicts all of them."""
        self.networks = {f"{name}/{key}": network for name, part in parts.items()
                         for key, network in part.networks.items()}
        self.seconds = sum(part.seconds for part in parts.values())
        bests = [part.best for part in parts.values()]
        self.best = None if None in bests else sum(bests) / len(bests)
        if self.training and self.rank == 0:
            self.save("best.pt", parts={name: load_checkpoint(part.folder / "best.pt", self.script)
                                        for name, part in parts.items()})

    def say(self, text):
        """Print a line, once for all processes."""
        if self.rank == 0:
            print(text, flush=True)

    def gradient_scaler(self):
        """A GradScaler that scales for float16 only."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def autocast(self):
        """The context of mixed precision. Weights cast under no_grad are cached without gradient,
        so teacher and student passes need contexts of their own."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def prepare(self, network):
        """Move a network to the device, channels last, and compile it if asked."""
        network = channels_last(network.to(self.device))
        if self.args.compile:
            network.compile()
        return network

    def batches(self, patches, batch_size):
        """Batches of crops from the current step to the last, on the device."""
        cuda = self.device.type == "cuda"
        stream = batches(patches, batch_size, self.step, self.total, self.args.workers, self.rank,
                         self.world, pin_memory=cuda)
        try:
            for batch in stream:
                if isinstance(batch, torch.Tensor):
                    yield batch.to(self.device, non_blocking=True)
                else:
                    yield [crop.to(self.device, non_blocking=True) for crop in batch]
        except (ConnectionError, EOFError) as error:    # a worker has died while it sent one
            time.sleep(5)                       # in which PyTorch's handler of its death raises
            raise RuntimeError("DataLoader worker") from error

    def open_data(self, **options):
        """See the function open_data."""
        self.data = open_data(self.args, self.checkpoint, **options)
        for note in self.data.notes:
            self.say(f"{self.folder.name}: {note}" if self.whole else note)
        return self.data

    def begin(self, steps_per_epoch, stages=None, **modules):
        """Start or resume: modules are the networks, optimisers and scalers to save.

        stages: {name: epochs} of a training in stages; default: one stage of --epochs.
        steps_per_epoch: a number, or {name: number}.
        """
        self.modules, self.ends = modules, []           # ends: the last step + 1 of each epoch
        self.stages, self.total = {}, 0                 # name -> its first step, its last + 1
        for name, epochs in ({None: self.args.epochs} if stages is None else stages).items():
            steps = steps_per_epoch[name] if isinstance(steps_per_epoch, dict) else steps_per_epoch
            start, self.total = self.total, self.total + epochs * steps
            self.ends += range(start + steps, self.total + 1, steps)
            self.stages[name] = start, self.total
        if self.args.resume:
            self._restore(load_checkpoint(self.folder / "last.pt", self.script))
            if not self.whole:
                self._note_changes()
        else:
            self._new_folder()
            self.save("last.pt")
        self.printed = 0.0

    def _new_folder(self):
        """Make the run folder, without the files of an earlier run, and write config.json."""
        if self.rank:
            return
        parts = [file.parent for file in self.folder.glob("*/config.json") if _is_part(file)]
        old = [file for folder in (self.folder, *parts) for pattern in RUN_FILES
               for file in (*folder.glob(pattern), *folder.glob(_temporary(pattern)))]
        inputs = {os.path.realpath(file) for file in self._inputs()}
        for file in old:
            if os.path.realpath(file) in inputs:
                raise InputError(f"--overwrite would delete {file}, which this run reads; choose "
                                 f"another --out-dir")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not LOCKED:
                lock_folder(self.folder)
            for file in old:
                file.unlink()
            for folder in parts:
                if not any(folder.iterdir()):
                    folder.rmdir()
            write_json(self.folder / "config.json", self._config())
        except OSError as error:
            raise InputError(f"--out-dir {self.folder}: {error.strerror}")

    def _inputs(self):
        """The files and folders that the command line names, without their crops."""
        read = [path for name in sorted(INPUTS)
                for paths in named_paths(getattr(self.args, name)).values() for path in paths]
        read += [path for pair in getattr(self.args, "partial", []) for path in pair[:2]]
        read += getattr(self.args, "weights", [])
        return list(dict.fromkeys(_split_crop(path)[0] for path in read))

    def _conditions(self):
        """What must stay as it is for a resumed run to end like one without interruption."""
        return {"processes": self.world, "precision": str(self.dtype)[6:],
                "threads": torch.get_num_threads(),
                "inputs": {file: _last_change(file) for file in self._inputs()}}

    def _note_changes(self):
        """Say which conditions are other ones than when the run began."""
        began = json.loads((self.folder / "config.json").read_text())
        now = self._conditions()
        files = now.pop("inputs")
        changed = [f"{file} has changed" for file in files
                   if began.get("inputs", files).get(file) != files[file]]
        changed += [f"{what} {began[what]} before, now {value}" for what, value in now.items()
                    if began.get(what, value) != value]
        for each in changed:
            self.say(f"note: {each}; the result will not be that of a run without interruption")

    def _config(self):
        """What it takes to do the run again."""
        cuda = self.device.type == "cuda"
        return {
            **provenance(self.args, self.script),
            "part_of": str(self.whole.folder) if self.whole else None,
            "classes": self.data.classes,
            "normalization": self.data.normalization,
            "device": torch.cuda.get_device_name(self.device) if cuda else platform.processor()
            or platform.machine(), **self._conditions()}

    # -- training

    def epochs(self, stage=None):
        """The epochs of a stage that are left; none without training. Catches Ctrl-C meanwhile."""
        if not self.training or self.step >= self.stages[stage][1]:
            return
        self.stage = stage
        if self.step == self.stages[stage][0]:
            self.best, self.history, self.losses = None, [], []
        self.session = (time.monotonic(), self.step)
        handlers = {number: signal.signal(number, self._interrupt)
                    for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self.step < self.stages[stage][1]:
                yield self.epoch_of(self.step)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def steps(self, epoch):
        """The steps of an epoch that are left. Seeds each step by itself, so that a run continues
        from any step as if it had never stopped; saves and exits on Ctrl-C."""
        while self.step < self.ends[epoch]:
            started = time.monotonic()
            state = np.random.SeedSequence((self.args.seed, self.step, self.rank))
            torch.manual_seed(int(state.generate_state(1)[0]))
            yield self.step
            for module in self.modules.values():
                if isinstance(module, nn.Module):
                    average_statistics(module)
            self.step += 1
            self.seconds += time.monotonic() - started
            if self.step < self.ends[epoch]:             # else end_epoch saves
                self._stop_if_interrupted()

    def epoch_of(self, step):
        """The epoch in which a step is, counted over all stages."""
        return bisect.bisect_right(self.ends, step)

    def left(self, step):
        """The share of its stage that is left at a step, from 1 down to almost 0."""
        first, last = self.stages[self.stage]
        return (last - step) / (last - first)

    def _interrupt(self, number, frame):
        """First Ctrl-C: finish the step and save. One a second later or more: stop at once.

        Before that it may be the same one, which torchrun passes on to its processes.
        """
        now = time.monotonic()
        if self.interrupted and now - self.interrupted > 1:
            raise KeyboardInterrupt
        self.interrupted = self.interrupted or now

    def _stop_if_interrupted(self):
        """Where any process was interrupted: save, say how to go on, leave with status 130."""
        interrupted = bool(self.interrupted)
        if self.world > 1:
            count = torch.tensor(float(interrupted), device=self.device)
            torch.distributed.all_reduce(count)
            interrupted = bool(count)
        if not interrupted:
            return
        self._check_finite()
        self._check_weights()
        sums = [self.sums] * self.world
        if self.world > 1:
            torch.distributed.all_gather_object(sums, self.sums)
        self.save("last.pt", sums=sums)
        self.say(f"\ninterrupted at step {self.step}; saved {self.folder / 'last.pt'}; "
                 f"{how_to_resume(self.script.name, (self.whole or self).folder)}")
        raise SystemExit(130)

    def log(self, lr, **losses):
        """Note the learning rate and the losses (scalar tensors) of a step; print the progress.

        The values are fetched one step late, so that a GPU never waits for them.
        """
        self._check_finite()
        self.lr = lr
        self.pending = (self.step, list(losses), torch.stack([v.detach() for v in losses.values()]))
        self._progress()

    def _check_finite(self):
        """Add the pending losses to the epoch's sums. Raises InputError where one is not finite."""
        if self.pending is None:
            return
        step, names, values = self.pending
        self.pending = None
        for name, value in zip(names, values.tolist()):
            if not math.isfinite(value):
                epoch = self._title(self.epoch_of(step))
                raise InputError(f"{name} is {value} at {epoch}, step {step}; {self._advice()}")
            self.sums[name] = self.sums.get(name, 0.0) + value

    def _check_weights(self):
        """Raise InputError where a weight is not finite: such a network must not be saved."""
        values = [value for module in self.modules.values() if isinstance(module, nn.Module)
                  for value in module.state_dict().values()]
        if not torch.stack([value.isfinite().all() for value in values]).all():
            step = self.step - 1
            raise InputError(f"the weights are not finite after {self._title(self.epoch_of(step))},"
                             f" step {step}; {self._advice()}")

    def _advice(self):
        """What to do about losses and weights that are not finite."""
        return f"try a lower --lr or --no-amp; the last good checkpoint in {self.folder} is kept"

    def _mean_of_processes(self, sums):
        """{name: number} averaged over all processes, so that all decide alike."""
        if self.world == 1:
            return sums
        values = torch.tensor(list(sums.values()), dtype=torch.float64)
        values = values.to(self.device if self.device.type == "cuda" else "cpu")
        torch.distributed.all_reduce(values)
        return dict(zip(sums, (values / self.world).tolist()))

    def _title(self, epoch):
        """The epoch for printing, with its stage or the part where there are several."""
        of = self.stage or (self.folder.name if self.whole else "")
        return f"{of} epoch {epoch}".lstrip()

    def _progress(self):
        """A line that renews itself on a terminal; elsewhere a line every few seconds."""
        now, (start, first) = time.monotonic(), self.session
        terminal = sys.stdout.isatty()
        if self.rank or now - self.printed < (0.2 if terminal else 5) or not self.sums:
            return
        self.printed = now
        rate = (now - start) / max(1, self.step - first)
        epoch = self.epoch_of(self.step)
        count = self.step - (self.ends[epoch - 1] if epoch else 0)
        text = (f"{self._title(epoch)}  step {self.step}/{self.total}  "
                f"loss {self.sums['loss'] / count:.3f}  {rate:.2f} s/step  "
                f"{duration(rate * (self.total - self.step))} left")
        print(f"\r{text}\x1b[K" if terminal else text, end="" if terminal else "\n", flush=True)

    def validate(self, predict, items=None, context=1, depth=None):
        """val_dice and val_iou, means over foreground classes and validation volumes, val_miou, the
        mean over all classes (and val_miou_org over self.organelles), and the Dice of each class,
        val_dice_NAME; or {}.

        items: Items to score in place of data.val; predict, context, depth: see score_slices.
        """
        items = self.data.val if items is None else items
        if not items:
            return {}
        results = [scores(score_slices(predict, item.image, item.label, self.data.classes, context,
                                       self.threshold, self.rank, self.world, depth),
                          self.data.classes, self.organelles) for item in items]
        mean = mean_scores(results)
        return {**{f"val_{key}": mean[key] for key in ("dice", "iou", "miou", "miou_org")
                   if key in mean},
                **{f"val_dice_{name}": score["dice"] for name, score in mean["per_class"].items()}}

    def end_epoch(self, validation, metric="val_dice"):
        """Write the epoch's row of log.csv, last.pt, and best.pt if this metric of the validation
        has not been as high before."""
        self._check_finite()
        self._check_weights()
        epoch = self.epoch_of(self.step) - 1
        count = self.step - (self.ends[epoch - 1] if epoch else 0)
        row = {"stage": self.stage} if self.stage else {}
        self.losses.append({name: total / count for name, total in
                            self._mean_of_processes(self.sums).items()})
        row |= {"epoch": epoch, "step": self.step, "seconds": round(self.seconds, 1), "lr": self.lr,
                **self.losses[-1], **validation}
        self.sums = {}
        if self.rank == 0:
            self._write_row(epoch, row)
        value = validation.get(metric)
        better = value is not None and (self.best is None or value > self.best)
        if better:
            self.best = value
        if value is not None:
            self.history.append(value)
        if better or (self.step == self.stages[self.stage][1] and self.best is None):
            self.save("best.pt")
        self.save("last.pt")
        terminal = sys.stdout.isatty()
        shown = "  ".join(f"{key} {value:.4f}" for key, value in row.items()
                          if key.startswith(("loss", "val")) and value is not None
                          and not key.startswith("val_dice_"))
        line = f"{self._title(epoch)}  {shown}"
        self.say(f"\r{line}\x1b[K" if terminal else line)
        self._stop_if_interrupted()

    def _write_row(self, epoch, row):
        """Add a row to log.csv, a new file in the first epoch."""
        log, text = self.folder / "log.csv", io.StringIO()
        if epoch and log.exists():
            text.write(log.read_text(encoding="utf-8"))
        writer = csv.DictWriter(text, row, lineterminator="\n")
        if not text.tell():
            writer.writeheader()
        writer.writerow(row)
        write_text(log, text.getvalue())

    def save(self, name, **more):
        """last.pt: everything; best.pt: the networks, without optimisers. more: also to save."""
        if self.rank:
            return
        keep = {key: module.state_dict() for key, module in self.modules.items()
                if name == "last.pt" or isinstance(module, nn.Module)}
        save_checkpoint(self.folder / name, {
            "script": self.script.name, "model": self.args.model, "args": vars(self.args),
            "classes": self.data.classes, "normalization": self.data.normalization,
            "seen": self.data.seen, "stage": self.stage, "step": self.step,
            "seconds": self.seconds, "best": self.best, "history": self.history,
            "losses": self.losses, "sums": [], "modules": keep, **more})

    def _restore(self, checkpoint):
        """Take over the state of an interrupted run."""
        for key, module in self.modules.items():
            load_weights(module, checkpoint, key, self.folder / "last.pt")
        self.step, self.seconds = checkpoint["step"], checkpoint["seconds"]
        self.best, sums = checkpoint["best"], checkpoint["sums"]
        self.sums = sums[self.rank % len(sums)] if sums else {}
        self.history, self.losses = checkpoint["history"], checkpoint.get("losses", [])
        log, epoch = self.folder / "log.csv", self.epoch_of(self.step)
        if self.rank == 0 and log.exists():
            lines = log.read_text().splitlines(keepends=True)
            write_text(log, "".join(lines[: epoch + 1]))
        if self.total:
            self.say(f"resuming {self.folder} at step {self.step} of {self.total}")

    # -- results

    def use_best(self, **networks):
        """Load the weights to predict with: best.pt, or the checkpoint of the command line."""
        self.networks = networks
        path, checkpoint = self.args.checkpoint, self.checkpoint
        if self.training:
            path = self.folder / "best.pt"
            self.barrier()
            checkpoint = load_checkpoint(path, self.script)
        for name, network in networks.items():
            load_weights(network, checkpoint, name, path)
        if not self.training:
            self._new_folder()

    @torch.inference_mode()
    def predict_slices(self, network, image, prepare=None, tile=None, overlap=OVERLAP):
        """uint8 slices (B, H, W) -> probabilities (B, C, H, W): prepared, tiled, eight views.

        prepare: slices on the device -> network input, in place of the normalisation. For a 3D
        network the slices are a window (Z, H, W), tiled like the crops that it was trained on; so
        are those of a network whose output depends on the whole image (global_context).
        tile, overlap: see predict_slices, in place of the defaults.
        """
        network.eval()
        n = len(image)
        if network.dims == 3 or getattr(network, "global_context", False):
            tile = tile or self.args.patch_size[-2:]
        if network.dims == 3 and n < network.min_depth:         # the last slice, again
            image = torch.cat([image, image[-1:].expand(network.min_depth - n, -1, -1)])
        image = image.to(self.device)
        image = prepare(image) if prepare else normalize(image, self.data.normalization)
        if network.dims == 3:
            image = image.transpose(0, 1)[None]

        def once(view):
            with self.autocast():
                return predict_slices(network, view, tile, overlap)
        prob = eight_views(once, image) if self.args.tta else once(image)
        return prob if network.dims == 2 else prob[0].transpose(0, 1)[:n]

    def output(self, item, stage=None):
        """The path of an Item's prediction, or of its result at an earlier stage, always TIFF."""
        if stage:
            return self.folder / "stages" / f"{item.name}_{stage}.tif"
        ending = "mrc" if item.volume.format == "mrc" else "tif"
        name = f"_{item.name}" if len(self.data.test) > 1 else ""
        return self.folder / f"prediction{name}.{ending}"

    @contextlib.contextmanager
    def writers(self, item, *outputs):
        """VolumeWriters of (path, shape, dtype), filled by all processes, whole when all are done.
        """
        options = {"voxel_size": item.volume.voxel_size, "max_value": len(self.data.classes) - 1}
        writers = []
        with contextlib.ExitStack() as files:
            if self.rank == 0:
                for path, *_ in outputs:
                    with _disk_errors(path.parent):
                        path.parent.mkdir(parents=True, exist_ok=True)
                for o in outputs:
                    writers.append(files.enter_context(create_volume(
                        *o, **options, promised=sum(writer.nbytes for writer in writers))))
            self.barrier()
            if self.rank:
                writers = [files.enter_context(create_volume(*o, **options, attach=True))
                           for o in outputs]
            yield writers
            self.barrier()
        self.barrier()

    def predict(self, predict, item, image=None, stage=None, context=1, depth=None, channels=None,
                decide=None, also=None):
        """Write the prediction of an Item, and its probabilities if asked. Returns its path.

        predict: uint8 slices (B, H, W) -> probabilities (B, C, H, W). All processes share the work.
        image: what the network sees, in place of item.image; stage: see output; context: see
        predict_by_slabs; depth: of the windows of a 3D network. channels: of the probabilities,
        where they are not one for each class. decide: probabilities (n, C, ...) -> class ids
        (n, ...), voxel by voxel, in place of class_ids; also: {path: function alike} of further
        files.
        """
        started = time.monotonic()
        image, also = item.image if image is None else image, also or {}
        shape, path = item.volume.shape, self.output(item, stage)
        channels = channels or self.data.out_channels
        decide = decide or functools.partial(class_ids, threshold=self.threshold)
        outputs = [(file, shape, np.uint8) for file in (path, *also)]
        if self.args.save_probability and not stage:
            stacked = shape if channels == 1 else (shape[0], channels, *shape[1:])
            name = path.stem.replace("prediction", "probability", 1)
            outputs.append((self.folder / f"{name}.tif", stacked, np.float32))
        share = {"rank": self.rank, "world": self.world}
        if depth:
            stream = predict_by_windows(predict, image, depth, **share)
        else:
            stream = predict_by_slabs(predict, image, shape, context, **share,
                                      pixels=2**22 if self.device.type == "cuda" else 2**20)
        with self.writers(item, *outputs) as writers:
            ids = dict(zip(writers, (decide, *also.values())))
            predict_volume(stream, ids, shape, self.args.downsample, *writers[len(ids):],
                           progress=functools.partial(self.progress, "predicting  slice"))
        self.progress("", 1, 1)
        self.predicted_voxels += math.prod(shape)
        self.predict_seconds += time.monotonic() - started
        return path

    def progress(self, what, done, total):
        """How far something other than training is, shown by the first process."""
        if self.rank == 0:
            show_progress(what, done, total)

    def barrier(self):
        """Wait for all processes."""
        if self.world > 1:
            torch.distributed.barrier()

    def report(self, predictions, stages=None, surfaces=False, slices=False, draw=None, **more):
        """Score the predictions (paths, one per test Item); write metrics.json, figure.png and
        curves.png; print the scores and what was written. stages: {name: paths} of a method in
        stages, the last of which are the predictions; each is scored and shown, for each volume
        and as the mean over volumes. surfaces: also draw each volume's structures in 3D. slices:
        also draw the Dice of each slice. draw: called with the content of metrics.json, to draw
        more. more: for metrics.json, too. Returns what it holds, in the first process.
        """
        if self.rank:
            return None
        named, stages = stages is not None, stages or {"prediction": predictions}
        results = {name: [] for name in stages}             # the `scores` of every labelled Item
        volumes, shown, curves = [], [], []
        for number, item in enumerate(self.data.test):
            opened = {name: open_volume(str(paths[number])) for name, paths in stages.items()}
            entry = volume_entry(item.volume.path, item.label and item.label.path,
                                 predictions[number], item.volume.shape, None, self.organelles)
            if item.label is not None:
                for name, prediction in opened.items():
                    counts = confusion_volume(prediction, item.label, self.data.classes)
                    results[name].append(volume_scores(counts, item.label, self.data.classes,
                                                       self.organelles))
                    self._say_scores(predictions[number], name if named else "",
                                     results[name][-1])
                entry.update(results[name][-1])
                curves.append((item.name, dice_of_slices(counts),
                               seen_in(item.volume, self.data.seen)))
                if named:
                    entry["stages"] = {name: each[-1] for name, each in results.items()}
            volumes.append(entry)
            shown.append((Path(item.volume.path).name, as_uint8(item.volume), item.label, opened))
        mean = {name: mean_scores(each) if each else None for name, each in results.items()}
        content = metrics_content(
            self.script.name, self.data.classes, volumes, list(mean.values())[-1],
            model=self.args.model, seed=self.args.seed,
            selected_on="last epoch" if self.best is None else "validation",
            train_seconds=round(self.seconds, 1), predict_seconds=round(self.predict_seconds, 1),
            predict_voxels_per_second=round(self.predicted_voxels / self.predict_seconds)
            if self.predict_seconds else None,
            peak_memory_gib=peak_memory_gib(self.device),
            parameters=sum(map(count_parameters, self.networks.values())),
            **({"stages": mean} if named else {}), **more)
        write_json(self.folder / "metrics.json", content)
        if shown:
            save_slices(self.folder / "figure.png", shown, self.data.classes, self.colors)
        if slices and curves:
            save_slice_dice(self.folder / "slice_dice.png", curves, self.data.classes, self.colors)
        for number, (_, _, label, opened) in enumerate(shown if surfaces else []):
            name = self.output(self.data.test[number]).stem.replace("prediction", "surfaces", 1)
            rows = opened if label is None else {"truth": label, **opened}
            save_surfaces(self.folder / f"{name}.png", rows, self.data.classes)
        if (self.folder / "log.csv").exists():
            save_curves(self.folder / "curves.png", self.folder / "log.csv")
        if draw:
            draw(content)
        written = sorted(p.name for p in self.folder.iterdir() if not p.name.startswith("."))
        self.say(f"wrote {self.folder}/: {', '.join(written)}")
        return content

    def _say_scores(self, prediction, stage, result):
        """One line for each class of a prediction (its path)."""
        shown = prediction.relative_to((self.whole or self).folder)
        for name, score in result["per_class"].items():
            values = [(key, score[key]) for key in ("dice", "iou", "precision", "recall")]
            self.say(f"{shown}  {stage}{': ' * bool(stage)}{name}: " + "  ".join(
                f"{key} {'undefined' if value is None else format(value, '.4f')}"
                for key, value in values))


def _last_change(file):
    """[bytes, time] of the last change to a file, or to those of a folder."""
    found = [entry.stat() for entry in os.scandir(file)] if os.path.isdir(file) else [os.stat(file)]
    return [sum(each.st_size for each in found), max(each.st_mtime_ns for each in found)]


def _is_part(config):
    """Whether a config.json is that of a part of another run."""
    try:
        return json.loads(config.read_text()).get("part_of") is not None
    except (OSError, ValueError, AttributeError):
        return False


def show_progress(what, done, total):
    """A line that renews itself, and goes when all is done; on a terminal only."""
    if sys.stdout.isatty():
        text = f"{what} {done}/{total}" if done < total else ""
        print(f"\r{text}\x1b[K", end="", flush=True)


def duration(seconds):
    """75 -> 1 min 15 s."""
    seconds = round(seconds)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"


def load_weights(module, checkpoint, key, path):
    """Load a module's state from a checkpoint. Raises InputError where it does not fit."""
    try:
        module.load_state_dict(checkpoint["modules"][key])
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: does not fit this network ({_one_line(error)})")


def peak_memory_gib(device):
    """Most memory used so far: of the GPU, else of this process; None where it is not known."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    try:        # Linux; getrusage there includes the process that started this one
        status = Path("/proc/self/status").read_text()
        return round(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20, 2)
    except (OSError, TypeError):
        pass
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 2)
