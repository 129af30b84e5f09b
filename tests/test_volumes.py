"""Volumes: what open_volume reads, labels, lazy views and writing. EMSEG_DATA adds real files."""

import argparse
import itertools
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zlib
from collections import Counter
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import tifffile
import torch
from matplotlib.image import imread

import emseg
from conftest import MRC_MODES, InMemory, mrc_by_hand

DATA = Path(os.environ.get("EMSEG_DATA") or "nowhere")
real_data = pytest.mark.skipif(not DATA.is_dir(), reason="EMSEG_DATA is not set")
VOXEL = (50.0, 4.6, 4.7)


def random_volume(shape=(6, 20, 30), dtype=np.uint8, seed=0):
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.normal(size=shape).astype(dtype)
    return rng.integers(0, 100, shape).astype(dtype)


def write_png(path, image, bits=8, colour=0, interlace=0):
    """A PNG written by hand (no filter): image (Y, X) or (Y, X, samples)."""
    image = np.asarray(image)
    if bits == 1:
        rows = np.packbits(image, axis=1)
    else:
        rows = image.astype(">u2" if bits == 16 else "u1").reshape(len(image), -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(
            ">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", image.shape[1], image.shape[0], bits, colour, 0, 0, interlace)
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
                           + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b""))


def write_folder(folder, images, names, bits=8):
    folder.mkdir()
    for image, name in zip(images, names):
        write_png(folder / name, image, bits)
    return folder


def write_mrc(path, array, voxel_angstrom=None):
    with mrcfile.new(path, array, overwrite=True) as mrc:
        if voxel_angstrom:
            mrc.voxel_size = voxel_angstrom
    return path


def patch(path, offset, data):
    with open(path, "r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def assert_refused(path, match):
    """One line that names the file and, apart from the folder's name, says what `match` says."""
    with pytest.raises(emseg.InputError) as caught:
        emseg.open_volume(path)[:]
    message, folder = str(caught.value), str(Path(path).parent)
    assert re.search(match, message.replace(folder, "")), message
    assert "\n" not in message and Path(path).name in message


# --- formats ---

@pytest.mark.parametrize("extension", ["tif", "mrc"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_written_volume_reads_back(tmp_path, extension, dtype):
    path, array = tmp_path / f"a.{extension}", random_volume(dtype=dtype)
    with emseg.create_volume(path, array.shape, dtype, VOXEL) as writer:
        writer[4:6] = array[4:]
        writer[0:4] = array[:4]
        assert not path.exists()
    volume = emseg.open_volume(path)
    np.testing.assert_array_equal(volume[:], array)
    assert volume.voxel_size == pytest.approx(VOXEL, rel=1e-6)
    assert volume.format == {"tif": "tiff"}.get(extension, extension)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("options, voxel", [
    (dict(imagej=True, resolution=(1 / .0047, 1 / .0046),
          metadata={"axes": "ZYX", "spacing": .05, "unit": "um"}), VOXEL),
    (dict(imagej=True, resolution=(1 / .0047, 1 / .0046),
          metadata={"axes": "TYX", "spacing": .05, "unit": "\\u00B5m"}), VOXEL),
    (dict(ome=True, metadata={"axes": "ZYX", "PhysicalSizeX": 4.7, "PhysicalSizeXUnit": "nm",
                              "PhysicalSizeY": .0046, "PhysicalSizeZ": .05}), VOXEL),
    (dict(bigtiff=True, resolution=(1e7 / 5, 1e7 / 5), resolutionunit=3), (5, 5, 5)),
    (dict(byteorder=">", resolution=(72, 72), resolutionunit=2), None),
    (dict(compression="zlib", predictor=True), None),
    (dict(tile=(16, 16)), None),
    (dict(compression="lzma", rowsperstrip=7), None),
])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_tiff_flavours(tmp_path, options, voxel, dtype):
    array = random_volume(dtype=dtype)
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="minisblack", **options)
    volume = emseg.open_volume(tmp_path / "a.tif")
    assert volume.shape == array.shape and volume.dtype == dtype and volume.dtype.isnative
    np.testing.assert_array_equal(volume[:], array)
    np.testing.assert_array_equal(volume[1:3, 2:9, 5:6], array[1:3, 2:9, 5:6])
    np.testing.assert_array_equal(volume[-1, 3], array[-1, 3])
    np.testing.assert_array_equal(np.stack(list(volume)), array)
    assert volume[4:4].shape == (0, 20, 30)
    assert volume.voxel_size == (None if voxel is None else pytest.approx(voxel, rel=1e-6))
    with pytest.raises(IndexError):
        volume[6]
    with pytest.raises(IndexError):
        volume[::2]


TYPES = "u1 u2 u4 u8 i1 i2 i4 i8 f2 f4 f8".split()


@pytest.mark.parametrize("options", [
    {}, {"rowsperstrip": 7}, {"tile": (16, 32)}, {"compression": "zlib"},
    {"compression": "zlib", "predictor": True}, {"compression": "zlib", "tile": (16, 16),
                                                 "predictor": True},
    {"compression": "lzma", "rowsperstrip": 5}, {"bigtiff": True}, {"contiguous": False},
    {"bigtiff": True, "compression": "zlib"}],
    ids=lambda options: " ".join(map(str, options.items())) or "plain")
def test_tiff_of_every_type_and_byte_order(tmp_path, options):
    for dtype, order in itertools.product(TYPES, "<>"):
        if "predictor" in options and (dtype[0] == "f" or dtype[1] == "8"):
            continue                                    # tifffile cannot write these by itself
        array = random_volume((4, 20, 35), np.dtype(dtype)) + np.array(0.5 if dtype[0] == "f" else
                                                                       0, dtype)
        array[1, 2, 3:5] = (np.finfo if dtype[0] == "f" else np.iinfo)(dtype).max, 0
        tifffile.imwrite(tmp_path / "a.tif", array, photometric="minisblack", byteorder=order,
                         **options)
        volume = emseg.open_volume(tmp_path / "a.tif")
        assert volume.dtype == dtype and volume.dtype.isnative, (dtype, order)
        np.testing.assert_array_equal(volume[:], array)
        np.testing.assert_array_equal(volume[1:3, 2:9, 30], array[1:3, 2:9, 30])


def imagej_by_hand(path, array, lines, order=">", tags=None):
    """What ImageJ itself writes: one page, big-endian, with all voxels behind it; pixels of 4.7 x
    4.6 and a description of these lines. tags: further ones, {number: 16 bits}."""
    text = "\n".join(["ImageJ=1.53t", *lines, "unit=nm", "min=0.0", "max=255.0", "\0"]).encode()
    short = {258: 8 * array.itemsize, 259: 1, 262: 1, 277: 1, 339: 3 if array.dtype.kind == "f"
             else 1, **(tags or {})}
    count = 9 + len(short)
    end = 8 + 2 + 12 * count + 4                        # of the header and the page
    long = {254: 0, 256: array.shape[2], 257: array.shape[1], 273: end + 16 + len(text),
            278: array.shape[1], 279: array.nbytes}
    tags = {270: (2, len(text), end + 16), 282: (5, 1, end), 283: (5, 1, end + 8),
            **{tag: (4, 1, value) for tag, value in long.items()}}
    page = b"".join(
        struct.pack(f"{order}HHIHH", tag, 3, 1, short[tag], 0) if tag in short else
        struct.pack(f"{order}HHII", tag, *tags[tag]) for tag in sorted({*short, *tags}))
    head = struct.pack(f"{order}2sHIH", b"MM" if order == ">" else b"II", 42, 8, count)
    resolution = struct.pack(f"{order}4I", 10**6, 4_700_000, 10**6, 4_600_000)
    path.write_bytes(head + page + bytes(4) + resolution + text
                     + array.astype(array.dtype.newbyteorder(order)).tobytes())


@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("lines, voxel", [
    (["images=6", "slices=6", "spacing=50.0"], VOXEL), (["images=6", "frames=6"], (1, 4.6, 4.7)),
    (["images=6", "frames=6", "slices=1", "channels=1", "hyperstack=true"], (1, 4.6, 4.7)),
    (["images=6", "channels=6", "hyperstack=true", "mode=grayscale"], "6 channels"),
    (["images=6", "channels=2", "slices=3", "hyperstack=true"], "2 channels"),
    (["images=6", "channels=3", "frames=2", "hyperstack=true"], "3 channels"),
    (["images=6", "slices=3", "frames=2", "hyperstack=true"], "wanted one stack")])
def test_imagej_hyperstacks_as_imagej_writes_them(tmp_path, lines, voxel, order, dtype):
    array = random_volume(dtype=np.dtype(dtype))
    imagej_by_hand(tmp_path / "a.tif", array, lines, order)
    if isinstance(voxel, str):
        return assert_refused(tmp_path / "a.tif", voxel)
    volume = emseg.open_volume(tmp_path / "a.tif")
    assert volume.dtype == dtype and volume.voxel_size == pytest.approx(voxel, rel=1e-6)
    np.testing.assert_array_equal(volume[:], array)
    np.testing.assert_array_equal(volume[4, 3:5, 7], array[4, 3:5, 7])


@pytest.mark.parametrize("order", "<>")
def test_voxels_that_are_stored_in_one_block_but_not_as_they_are(tmp_path, order):
    """Bits in reverse order (FillOrder 2), and differences of neighbours (Predictor 2), which
    tifffile decodes of compressed voxels only."""
    array, path = random_volume((1, 20, 30)), tmp_path / "a.tif"
    bits = np.array([int(f"{value:08b}"[::-1], 2) for value in range(256)], np.uint8)
    imagej_by_hand(path, bits[array], ["images=1"], order, {266: 2})
    np.testing.assert_array_equal(tifffile.imread(path), array[0])
    np.testing.assert_array_equal(emseg.open_volume(path)[:], array)
    imagej_by_hand(path, np.diff(array, axis=2, prepend=np.uint8(0)), ["images=1"], order, {317: 2})
    try:
        np.testing.assert_array_equal(emseg.open_volume(path)[:], array)
    except emseg.InputError as error:
        assert "slice 0 is damaged" in str(error)


@pytest.mark.parametrize("order", ["XYZCT", "XYCZT", "XYTZC", "XYZTC", "XYCTZ", "XYTCZ"])
@pytest.mark.parametrize("unit, scale", [("nm", 1), ("µm", 1e-3), ("mm", 1e-6), ("Å", 10),
                                         (None, 1e-3), ("pixel", 1)])
def test_ome_orders_and_units(tmp_path, order, unit, scale):
    array = random_volume(dtype=np.uint16)
    sides = dict(zip("ZYX", VOXEL))
    for sizes, refused in (({"Z": 6}, ""), ({"T": 6}, ""), ({"C": 6}, "6 channels"),
                           ({"Z": 3, "C": 2}, "2 channels"), ({"Z": 2, "T": 3}, "one stack")):
        text = "".join(f' Size{axis}="{sizes.get(axis, 1)}"' for axis in "CZT") + "".join(
            f' PhysicalSize{axis}="{side * scale:.12g}"' + (
                f' PhysicalSize{axis}Unit="{unit}"' if unit else "")
            for axis, side in sides.items())
        tifffile.imwrite(tmp_path / "a.tif", array, photometric="minisblack", metadata=None,
                         description=f"""<?xml version="1.0" encoding="UTF-8"?>
            <OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0">
            <Pixels ID="Pixels:0" DimensionOrder="{order}" Type="uint16" SizeX="30" SizeY="20"
            {text}><TiffData/></Pixels></Image></OME>""".encode())
        if refused:
            assert_refused(tmp_path / "a.tif", refused)
            continue
        volume = emseg.open_volume(tmp_path / "a.tif")
        np.testing.assert_array_equal(volume[:], array)
        assert volume.voxel_size == (None if unit == "pixel" else pytest.approx(VOXEL, rel=1e-6))


def test_answers_are_fresh_arrays(tmp_path):
    for options in ({}, {"compression": "zlib"}):
        tifffile.imwrite(tmp_path / "a.tif", random_volume(), **options)
        volume = emseg.open_volume(tmp_path / "a.tif")
        box = volume[0:2]
        before = box.copy()
        box[:] = 0
        assert type(box) is np.ndarray
        np.testing.assert_array_equal(volume[0:2], before)


@pytest.mark.parametrize("shape, axes, options, match", [
    ((5, 20, 30, 3), "ZYXS", dict(photometric="rgb"), "colour"),
    ((5, 2, 20, 30), "ZCYX", dict(imagej=True), "2 channels"),
    ((3, 5, 20, 30), "TZYX", dict(imagej=True), "one stack"),
])
def test_tiff_axes_refused(tmp_path, shape, axes, options, match):
    tifffile.imwrite(tmp_path / "a.tif", np.ones(shape, np.uint8), metadata={"axes": axes},
                     **options)
    assert_refused(tmp_path / "a.tif", match)


def test_tiff_pages_of_different_size_and_complex_refused(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        tif.write(np.ones((8, 9), np.uint8))
        tif.write(np.ones((8, 10), np.uint8))
    assert_refused(tmp_path / "a.tif", "different sizes")
    tifffile.imwrite(tmp_path / "b.tif", np.ones((8, 9), np.complex64))
    assert_refused(tmp_path / "b.tif", "complex64")


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"imagej": True}])
def test_truncated_tiff_refused(tmp_path, options):
    array = np.random.default_rng(0).integers(0, 255, (6, 64, 64), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", array, **options)
    whole = (tmp_path / "a.tif").read_bytes()
    for kept, match in ((3, "not readable"), (100, "not readable"), (1000, "pages breaks off"),
                        (len(whole) // 2, "pages breaks off")):
        (tmp_path / "a.tif").write_bytes(whole[:kept])
        assert_refused(tmp_path / "a.tif", match)


def test_tiff_bomb_refused_before_allocation(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((64, 64), np.uint8), compression="zlib")
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        tags = tif.pages[0].tags
        offsets = [tags[name].valueoffset for name in ("ImageWidth", "ImageLength", "RowsPerStrip")]
        kinds = [tags[name].dtype for name in ("ImageWidth", "ImageLength", "RowsPerStrip")]
    for offset, kind in zip(offsets, kinds):
        patch(tmp_path / "a.tif", offset, struct.pack("<H" if kind == 3 else "<I", 60000))
    tracemalloc.start()
    assert_refused(tmp_path / "a.tif", "hostile")
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_fuzzed_files_never_raise_anything_else(tmp_path):
    rng = np.random.default_rng(0)
    tifffile.imwrite(tmp_path / "a.tif", random_volume((3, 8, 9)), compression="zlib",
                     photometric="minisblack")
    write_mrc(tmp_path / "a.mrc", random_volume((3, 8, 9), np.float32))
    np.save(tmp_path / "a.npy", random_volume((3, 8, 9)))
    write_png(tmp_path / "a.png", random_volume((8, 9)))
    signal.alarm(60)  # a hang ends the test
    for name in ("a.tif", "a.mrc", "a.npy", "a.png"):
        whole = np.frombuffer((tmp_path / name).read_bytes(), np.uint8)
        for _ in range(100):
            damaged = whole.copy()
            damaged[rng.integers(0, min(len(whole), 1500), 4)] = rng.integers(0, 256, 4)
            (tmp_path / name).write_bytes(damaged.tobytes())
            try:
                assert emseg.open_volume(tmp_path / name)[:].ndim == 3
            except emseg.InputError as error:
                assert "\n" not in str(error)
    signal.alarm(0)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.float32, np.uint16, np.float16])
def test_mrc_modes(tmp_path, dtype):
    array = random_volume(dtype=dtype)
    volume = emseg.open_volume(write_mrc(tmp_path / "a.rec", array, (47.0, 46.0, 500.0)))
    assert volume.dtype == dtype and volume.format == "mrc"
    np.testing.assert_array_equal(volume[:], array)
    assert volume.voxel_size == pytest.approx(VOXEL, rel=1e-6)


@pytest.mark.parametrize("axes", list(itertools.permutations((1, 2, 3))))
def test_mrc_of_every_order_of_axes_and_bytes_and_type(tmp_path, axes):
    """axes: which of x, y, z (1, 2, 3) are the columns, rows and sections of the file."""
    place = [axes.index(axis) for axis in (3, 2, 1)]            # of z, y, x among those
    for dtype, order, stamp in itertools.product(MRC_MODES, "<>", "<>"):
        stored = random_volume((3, 4, 5), dtype)
        mrc_by_hand(tmp_path / "a.mrc", stored, {64: struct.pack(f"{order}3i", *axes)}, order,
                    stamp, voxel=(47, 46, 500), extended=80)
        volume = emseg.open_volume(tmp_path / "a.mrc")
        want = np.empty([(5, 4, 3)[axis] for axis in place], dtype)
        for section, row, column in np.ndindex(stored.shape):
            at = [(column, row, section)[axis] for axis in place]
            want[tuple(at)] = stored[section, row, column]
        assert volume.dtype == dtype and volume.dtype.isnative, (dtype, order, stamp)
        np.testing.assert_array_equal(volume[:], want)
        np.testing.assert_array_equal(volume[1:, 2, :2], want[1:, 2, :2])
        assert volume.voxel_size == pytest.approx(VOXEL, rel=1e-6)


def test_mrc_odd_headers(tmp_path):
    array = np.arange(24, dtype=np.int8).reshape(2, 3, 4) - 12
    path = write_mrc(tmp_path / "a.mrc", array, (10, 10, 10))
    patch(path, 152, struct.pack("<ii", 1146047817, 0))  # IMOD, bytes are not signed
    np.testing.assert_array_equal(emseg.open_volume(path)[:], array.view(np.uint8))
    patch(path, 156, struct.pack("<i", 1))
    np.testing.assert_array_equal(emseg.open_volume(path)[:], array)
    patch(path, 208, bytes(8))  # no MAP id, no machine stamp
    np.testing.assert_array_equal(emseg.open_volume(path)[:], array)
    patch(path, 64, struct.pack("<iii", 3, 1, 2))  # columns are z, rows x, sections y
    volume = emseg.open_volume(path)
    assert volume.shape == (4, 2, 3)
    np.testing.assert_array_equal(volume[:], array.transpose(2, 0, 1))
    np.testing.assert_array_equal(volume[1:3, :, 2], array.transpose(2, 0, 1)[1:3, :, 2])
    patch(path, 40, bytes(12))
    assert emseg.open_volume(path).voxel_size is None
    patch(path, 12, struct.pack("<i", 4))
    assert_refused(path, "mode 4")


def test_mrc_truncated_extended_and_compressed(tmp_path):
    path = write_mrc(tmp_path / "a.mrc", random_volume())
    patch(path, 0, struct.pack("<iii", 2**30, 2**30, 2**30))
    assert_refused(path, "truncated")
    array = random_volume(dtype=np.int16)
    with mrcfile.new(path, array, overwrite=True) as mrc:
        mrc.set_extended_header(np.ones(200, "V1"))
    np.testing.assert_array_equal(emseg.open_volume(path)[:], array)
    Path(path).write_bytes(Path(path).read_bytes()[:-1])
    assert_refused(path, "truncated")
    with mrcfile.new(tmp_path / "b.mrc", random_volume(), compression="gzip"):
        pass
    assert_refused(tmp_path / "b.mrc", "decompress")


@pytest.mark.parametrize("order", "CF")
def test_npy(tmp_path, order):
    array = random_volume(dtype=">f8").copy(order)
    np.save(tmp_path / "a.npy", array)
    volume = emseg.open_volume(tmp_path / "a.npy")
    assert volume.dtype == np.float64 and volume.dtype.isnative and volume.voxel_size is None
    np.testing.assert_array_equal(volume[1:4, 3:5], array[1:4, 3:5])
    np.save(tmp_path / "b.npy", array[0] > 0)
    flat = emseg.open_volume(tmp_path / "b.npy")
    assert flat.shape == (1, 20, 30) and flat.dtype == np.uint8
    np.testing.assert_array_equal(flat[0], array[0] > 0)
    np.save(tmp_path / "c.npy", np.array([{}]))
    assert_refused(tmp_path / "c.npy", "not readable|array of shape")
    whole = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(whole[:-8])
    assert_refused(tmp_path / "a.npy", "a.npy")


def test_png_depths_and_colours(tmp_path):
    rng = np.random.default_rng(0)
    for bits, dtype in ((8, np.uint8), (16, np.uint16), (1, np.uint8)):
        image = np.arange(2**bits).reshape(-1, 2 ** (bits // 2)) if bits > 1 else \
            rng.integers(0, 2, (5, 11))
        write_png(tmp_path / "a.png", image, bits)
        volume = emseg.open_volume(tmp_path / "a.png")
        assert volume.dtype == dtype and volume.shape == (1, *image.shape)
        np.testing.assert_array_equal(volume[0], image)
    grey = random_volume((7, 9))
    write_png(tmp_path / "rgb.png", np.stack([grey] * 3, -1), colour=2)
    np.testing.assert_array_equal(emseg.open_volume(tmp_path / "rgb.png")[0], grey)
    write_png(tmp_path / "la.png", np.stack([grey, grey * 0], -1), colour=4)
    np.testing.assert_array_equal(emseg.open_volume(tmp_path / "la.png")[0], grey)
    write_png(tmp_path / "red.png", np.stack([grey, grey, grey + 1], -1), colour=2)
    assert_refused(tmp_path / "red.png", "colour image")


def test_damaged_png_refused(tmp_path):
    write_png(tmp_path / "a.png", np.random.default_rng(0).integers(0, 255, (50, 50)))
    whole = (tmp_path / "a.png").read_bytes()
    for damaged, match in (
            (whole[:-30], "slice 0 is damaged"), (whole[:20], "not a PNG file, or truncated"),
            (whole[:-20] + b"x" + whole[-19:], "wrong checksum"),
            (whole[:-16] + bytes([whole[-16] ^ 1]) + whole[-15:], "wrong checksum")):
        (tmp_path / "a.png").write_bytes(damaged)
        assert_refused(tmp_path / "a.png", match)


def test_folder_order_numbers_and_odd_files(tmp_path):
    images = random_volume((3, 8, 9))
    folder = write_folder(tmp_path / "s", images, ["b2x10.png", "b2x9.png", "b2x100.png"])
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "notes.txt").write_text("9")
    volume = emseg.open_volume(folder)
    assert volume.numbers == (9, 10, 100) and volume.format == "slices"
    np.testing.assert_array_equal(volume[:], images[[1, 0, 2]])
    write_png(folder / "c9.png", images[0])
    assert emseg.open_volume(folder).numbers is None
    write_png(folder / "c9.png", images[0, :5])
    assert_refused(folder, "c9.png is")
    write_png(folder / "c9.png", images[0], bits=16)
    assert_refused(folder, "c9.png is")
    os.remove(folder / "c9.png")
    tifffile.imwrite(folder / "d.tif", images[0])
    assert_refused(folder, "mixes")
    (tmp_path / "none").mkdir()
    assert_refused(tmp_path / "none", "no .tif")


def test_a_slice_that_is_left_out_is_noted(tmp_path):
    images = random_volume((7, 8, 9))
    for names, notes in (([0, 1, 2, 4, 5, 6, 7], ["no slice between 2 and 4"]),
                         ([10, 20, 30, 40, 50, 60, 70], []), (range(7), [])):
        folder = write_folder(tmp_path / f"s{names[1]}{len(notes)}", images,
                              [f"s{n:03}.png" for n in names])
        found = emseg.gap_notes([emseg.open_volume(folder)])
        assert len(found) == len(notes) and all(a in b for a, b in zip(notes, found))
        assert not emseg.gap_notes([emseg.open_volume(f"{folder}@4:")])
    np.save(tmp_path / "a.npy", images)
    assert not emseg.gap_notes([emseg.open_volume(tmp_path / "a.npy")])


def test_folder_of_tiffs_and_of_masks_with_mixed_depths(tmp_path):
    folder = tmp_path / "t"
    folder.mkdir()
    images = random_volume((3, 8, 9), np.uint16)
    for z, image in enumerate(images):
        tifffile.imwrite(folder / f"{z}.tiff", image, compression="zlib" if z else None,
                         resolution=(2e6, 2e6), resolutionunit=3)
    np.testing.assert_array_equal(emseg.open_volume(folder)[0:3, 2], images[:, 2])
    assert emseg.open_volume(folder).voxel_size == pytest.approx((5, 5, 5))
    tifffile.imwrite(folder / "3.tiff", images, photometric="minisblack")
    assert_refused(folder, "3 pages")
    mask = random_volume((8, 9)) > 50
    masks = write_folder(tmp_path / "m", [mask * 255], ["0.png"])
    write_png(masks / "1.png", mask, bits=1)
    np.testing.assert_array_equal(emseg.open_volume(masks)[1], mask * 255)


def test_missing_empty_unknown_and_wrong_content(tmp_path):
    assert_refused(tmp_path / "no.tif", "no such file")
    (tmp_path / "a.tif").write_bytes(b"")
    assert_refused(tmp_path / "a.tif", "the file is empty")
    (tmp_path / "a.jpg").write_bytes(b"x")
    assert_refused(tmp_path / "a.jpg", r"\.mrc")
    for extension, match in (("tif", "not readable"), ("mrc", "cannot be read"),
                             ("npy", "not readable"), ("png", "not a PNG file")):
        (tmp_path / f"b.{extension}").write_text("This is not an image. " * 100)
        assert_refused(tmp_path / f"b.{extension}", match)


# --- crops ---

@pytest.mark.parametrize("crop, box", [
    ("1:4", np.s_[1:4]), (":2,3:", np.s_[:2, 3:]), ("3,:,7", np.s_[3:4, :, 7:8]),
    ("2:6,5:15,10:30", np.s_[2:6, 5:15, 10:30]), ("1:,:,:3", np.s_[1:, :, :3])])
def test_crops(tmp_path, crop, box):
    array = random_volume()
    for path in (tmp_path / "a.mrc", tmp_path / "a.tif"):
        with emseg.create_volume(path, array.shape, np.uint8, VOXEL) as writer:
            writer[:] = array
        volume = emseg.open_volume(f"{path}@{crop}")
        np.testing.assert_array_equal(volume[:], array[box])
        np.testing.assert_array_equal(volume[0:1, 0:2, 1:3], array[box][0:1, 0:2, 1:3])
        assert volume.file_shape == array.shape and volume.path.endswith(crop)
        assert tuple(array[volume.crop].shape) == volume.shape


@pytest.mark.parametrize("crop, match", [
    ("0:7", "z runs over 0:6"), (":,20:21", "y runs over 0:20"), ("3:3", "empty"), ("-1:3", "none"),
    (":,:,30", "x runs over 0:30"), ("1:2,3:4,5:6,7:8", "three axes"), ("a:b", "understood"),
    ("0:6:2", "understood"), ("1,,2", "understood"), ("4:2", "empty")])
def test_bad_crops(tmp_path, crop, match):
    np.save(tmp_path / "a.npy", random_volume())
    assert_refused(f"{tmp_path}/a.npy@{crop}", match)


def test_name_with_an_at(tmp_path):
    array = random_volume()
    np.save(tmp_path / "a@1:2.npy", array)
    assert emseg.open_volume(tmp_path / "a@1:2.npy").shape == array.shape
    assert emseg.open_volume(f"{tmp_path}/a@1:2.npy@1:3").shape == (2, 20, 30)
    assert_refused(tmp_path / "b@1:2.npy", "no such file")
    write_folder(tmp_path / "s", array[:3], ["0.png", "1.png", "2.png"])
    folder = write_folder(tmp_path / "s@1:2", array[3:], ["0.png", "1.png", "2.png"])
    np.testing.assert_array_equal(emseg.open_volume(folder)[:], array[3:])


# --- any shape, type, crop and index ---

def write_any(path, array, rng):
    """Write a volume as the name says, in a random one of the ways that there are."""
    order, kind = rng.choice(["<", ">"]), array.dtype
    if path.suffix == ".npy":
        np.save(path, array.astype(kind.newbyteorder(order)).copy(rng.choice(["C", "F"])))
    elif path.suffix == ".mrc":
        mrc_by_hand(path, array, order=order, stamp=rng.choice(["<", ">"]),
                    extended=int(rng.choice([0, 1024])))
    elif path.suffix == ".tif":
        options = [{}, {"tile": (16, 32)}, {"rowsperstrip": 3}, {"compression": "zlib"},
                   {"compression": "lzma", "tile": (32, 16)}, {"bigtiff": True}]
        tifffile.imwrite(path, array, photometric="minisblack", byteorder=order,
                         metadata={"axes": "ZYX"}, **options[rng.integers(len(options))])
    elif rng.random() < 0.5:
        write_folder(path, array, [f"{z}.png" for z in range(len(array))], 8 * array.itemsize)
    else:
        path.mkdir()
        for z, page in enumerate(array):
            tifffile.imwrite(path / f"s{z}.tif", page, byteorder=order, photometric="minisblack",
                             compression=rng.choice([None, "zlib"]))


def any_crop(rng, shape):
    """(text, slices) of a crop, in any of the ways to write it."""
    texts, box = [], []
    for size in shape[: rng.integers(1, 4)]:
        start = int(rng.integers(size))
        stop = int(rng.integers(start + 1, size + 1))
        text, part = [(f"{start}:{stop}", slice(start, stop)), (f"{start}:", slice(start, None)),
                      (f":{stop}", slice(0, stop)), (":", slice(None)),
                      (f" {start}", slice(start, start + 1))][rng.integers(5)]
        texts.append(text)
        box.append(part)
    return ",".join(texts), tuple(box)


def any_index(rng, shape):
    """An index of integers and slices, also negative, open, beyond the end and empty."""
    index = []
    for size in shape[: rng.integers(0, 4)]:
        if rng.random() < 0.4:
            index.append(int(rng.integers(-size, size)))
        else:
            ends = [None if rng.random() < 0.3 else int(end)
                    for end in rng.integers(-size - 2, size + 3, 2)]
            index.append(slice(*ends))
    return tuple(index)


KINDS = {".npy": TYPES, ".tif": TYPES, ".mrc": ["i1", "i2", "f4", "u2", "f2"], "": ["u1", "u2"]}


@pytest.mark.parametrize("ending", KINDS)
def test_reading_is_numpy_indexing(tmp_path, ending):
    rng = np.random.default_rng(0)
    for number in range(40):
        shape = tuple(int(side) for side in rng.integers(1, (8, 24, 40)))
        dtype = np.dtype(rng.choice(KINDS[ending]))
        array = random_volume(shape, dtype, number)
        path = tmp_path / f"{number}{ending}"
        write_any(path, array, rng)
        volume = emseg.open_volume(path)
        assert volume.shape == shape and volume.dtype == dtype and volume.dtype.isnative
        np.testing.assert_array_equal(volume[:], array)
        for _ in range(3):
            text, box = any_crop(rng, shape)
            crop, want = emseg.open_volume(f"{path}@{text}"), array[box]
            assert crop.shape == want.shape and crop.file_shape == shape, text
            for _ in range(4):
                index = any_index(rng, want.shape)
                found = crop[index] if index else crop[:]
                np.testing.assert_array_equal(found, want[index], f"{text} {index}")
                assert found.dtype == dtype
            z = int(rng.integers(len(want)))
            np.testing.assert_array_equal(crop[z], want[z])


@pytest.mark.parametrize("ending", [".tif", ".mrc"])
def test_writing_in_any_order_reads_back(tmp_path, ending):
    rng = np.random.default_rng(1)
    for number in range(80):
        shape = tuple(int(side) for side in rng.integers(1, (12, 20, 30)))
        channels = int(rng.integers(2, 5)) if ending == ".tif" and rng.random() < 0.3 else 0
        stored = (shape[0], channels, *shape[1:]) if channels else shape
        dtype = rng.choice(["uint8", "uint16", "float32"])
        highest = int(rng.choice([1, 127, 128, 255]))
        array = rng.random(stored, np.float32) if dtype == "float32" else rng.integers(
            0, highest + 1, stored).astype(dtype)
        voxel = None if rng.random() < 0.2 else tuple(np.exp(rng.uniform(-2, 7, 3)).tolist())
        path = tmp_path / f"{number}{ending}"
        cuts = np.unique([0, len(array), *rng.integers(0, len(array) + 1, 4)])
        slabs = [slice(*pair) for pair in zip(cuts, cuts[1:])]
        with emseg.create_volume(path, stored, dtype, voxel, max_value=highest) as writer:
            for slab in (slabs[i] for i in rng.permutation(len(slabs))):
                writer[slab] = array[slab]
        if channels:
            with tifffile.TiffFile(path) as tif:
                assert tif.series[0].axes.endswith("CYX")
                np.testing.assert_array_equal(tif.asarray().reshape(stored), array)
            continue
        volume = emseg.open_volume(path)
        np.testing.assert_array_equal(volume[:], array)
        assert volume.shape == shape
        assert volume.voxel_size == (voxel and pytest.approx(voxel, rel=1e-5))
        np.testing.assert_array_equal(reference(path, volume), array)
    assert len(os.listdir(tmp_path)) == 80              # and no temporary file


# --- processes, memory ---

class Slices(torch.utils.data.Dataset):
    def __init__(self, volume):
        self.volume = volume

    def __len__(self):
        return len(self.volume)

    def __getitem__(self, z):
        return z, self.volume[z]


def test_workers_share_a_compressed_tiff(tmp_path):
    array = np.random.default_rng(0).integers(0, 255, (40, 64, 64), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", array, compression="zlib")
    volume = emseg.open_volume(tmp_path / "a.tif")
    volume[3]
    loader = torch.utils.data.DataLoader(Slices(volume), batch_size=2, num_workers=2)
    for _ in range(2):
        for z, page in loader:
            np.testing.assert_array_equal(page.numpy(), array[z])
    copy = pickle.loads(pickle.dumps(volume))
    assert len(pickle.dumps(volume)) < 10_000
    np.testing.assert_array_equal(copy[7], array[7])


def test_each_process_opens_a_compressed_tiff_itself(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "a.tif", random_volume(), compression="zlib")
    volume = emseg.open_volume(tmp_path / "a.tif")
    volume[1]
    before = volume.source.decode.pages
    volume[2]
    assert volume.source.decode.pages is before
    monkeypatch.setattr(os, "getpid", lambda: -1)  # as if this process had been forked
    volume[3]
    assert volume.source.decode.pages is not before


@pytest.mark.parametrize("extension", ["tif", "mrc"])
def test_big_sparse_file_reads_in_little_memory(tmp_path, extension):
    path, shape = tmp_path / f"big.{extension}", (300, 4096, 4096)  # 4.7 GiB
    slab = random_volume((2, 4096, 4096))
    with emseg.create_volume(path, shape, np.uint8, VOXEL, max_value=100) as writer:
        writer[250:252] = slab
    assert os.stat(path).st_blocks * 512 < 200e6  # the rest was never written
    tracemalloc.start()
    volume = emseg.open_volume(path)
    np.testing.assert_array_equal(volume[251, 100:200], slab[1, 100:200])
    assert volume[100:101].max() == 0
    assert len(pickle.dumps(volume)) < 10_000
    assert tracemalloc.get_traced_memory()[1] < 60e6
    tracemalloc.stop()
    assert volume.shape == shape and volume.voxel_size == pytest.approx(VOXEL, rel=1e-6)


def test_all_volumes_share_a_bounded_page_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(emseg, "CACHE_BYTES", 3 * 64 * 64)
    volumes = []
    for name in "ab":
        tifffile.imwrite(tmp_path / f"{name}.tif", random_volume((9, 64, 64)), compression="zlib")
        volumes.append(emseg.open_volume(tmp_path / f"{name}.tif"))
    a, b = [volume.source for volume in volumes]
    volumes[0][:]
    volumes[1][2]
    volumes[0][7]
    assert list(a.cache) == [(a, 8), (b, 2), (a, 7)] and a.cached == 3 * 64 * 64
    monkeypatch.setattr(emseg, "CACHE_BYTES", 1)
    volumes[1][5]
    assert list(a.cache) == [(b, 5)] and a.cached == 64 * 64


# --- views ---

def open_array(tmp_path, array, name="v"):
    np.save(tmp_path / f"{name}.npy", array)
    return emseg.open_volume(tmp_path / f"{name}.npy")


@pytest.mark.parametrize("name", ["a.npy", "a.mrc", "a.tif"])
def test_a_file_that_becomes_shorter(tmp_path, name):
    array = np.zeros((9, 64, 64), np.uint8)
    if name == "a.npy":
        np.save(tmp_path / name, array)
    else:
        with emseg.create_volume(tmp_path / name, array.shape, array.dtype) as writer:
            writer[:] = array
    volume = emseg.open_volume(tmp_path / name)
    os.truncate(tmp_path / name, 20_000)
    with pytest.raises(emseg.InputError, match=f"{name}: is shorter than when it was opened"):
        volume[8]


def test_as_uint8(tmp_path):
    array = random_volume()
    volume = open_array(tmp_path, array)
    assert emseg.as_uint8(volume) is volume
    signed = emseg.as_uint8(open_array(tmp_path, (array.astype(int) - 50).astype(np.int8)))
    np.testing.assert_array_equal(signed[:], array + 78)
    ramp = np.arange(100_000, dtype=np.float32).reshape(10, 100, 100)
    view = emseg.as_uint8(open_array(tmp_path, ramp))
    low, high = np.percentile(ramp, (0.1, 99.9))
    want = np.clip(np.rint((ramp.astype(np.float64) - low) / (high - low) * 255), 0, 255)
    assert np.abs(view[:] - want).max() <= 1 and (view[:] == want).mean() > 0.999
    assert view.dtype == np.uint8 and (view[3:5, 7:9, 2] == view[:][3:5, 7:9, 2]).all()
    assert (emseg.as_uint8(open_array(tmp_path, np.full((2, 3, 4), 7.0)))[:] == 0).all()
    ramp[4, 5, 6] = np.nan
    with pytest.raises(emseg.InputError, match=r"v\.npy: slice 4 holds NaN"):
        emseg.as_uint8(open_array(tmp_path, ramp))
    ramp = np.zeros((40, 8, 8), np.float32)
    ramp[0, 0, 0] = np.inf  # this slice is not in the sample
    view = emseg.as_uint8(open_array(tmp_path, ramp))
    with pytest.raises(emseg.InputError, match="slice 0 holds"):
        view[0]


def test_equalize(tmp_path):
    rng = np.random.default_rng(0)
    array = (rng.normal(120, 10, (3, 200, 200))).clip(115, 255).astype(np.uint8)
    array[2] = 9
    view = emseg.as_uint8(open_array(tmp_path, array), equalize=True)
    whole = view[:]
    np.testing.assert_array_equal(emseg.as_uint8(open_array(tmp_path, array), True)[1, 5:9, 3:8],
                                  whole[1, 5:9, 3:8])
    values, inverse, counts = np.unique(array[0], return_inverse=True, return_counts=True)
    cdf = counts.cumsum()
    want = np.rint((cdf - cdf[0]) / (cdf[-1] - cdf[0]) * 255)[inverse].reshape(200, 200)
    np.testing.assert_array_equal(whole[0], want)
    assert len(np.unique(whole[2])) == 1


def test_downsample_mean_and_majority(tmp_path):
    array = random_volume((2, 7, 10))
    volume = open_array(tmp_path, array)
    volume.voxel_size = VOXEL
    small = emseg.downsample(volume, 3, "mean")
    assert small.shape == (2, 3, 4)
    assert small.voxel_size == (VOXEL[0], VOXEL[1] * 3, VOXEL[2] * 3)
    padded = np.pad(array, ((0, 0), (0, 2), (0, 2)), mode="edge")
    for reduce in ("mean", "majority"):
        small = emseg.downsample(volume, 3, reduce)
        want = np.zeros((2, 3, 4), np.uint8)
        for z, y, x in np.ndindex(want.shape):
            block = padded[z, 3 * y:3 * y + 3, 3 * x:3 * x + 3].astype(float)
            values, counts = np.unique(block, return_counts=True)
            want[z, y, x] = (np.floor(block.mean() + 0.5) if reduce == "mean"
                             else values[counts.argmax()])
        np.testing.assert_array_equal(small[:], want)
        np.testing.assert_array_equal(small[1, 1:3, 2:4], want[1, 1:3, 2:4])
    tie = open_array(tmp_path, np.array([[[3, 255], [255, 3]]], np.uint8))
    assert emseg.downsample(tie, 2, "majority")[0, 0, 0] == 3
    assert emseg.downsample(tie, 1, "mean") is tie


def slow_resize(array, shape):
    """Linear interpolation between voxel centres, one axis after the other, by np.interp."""
    array = array.astype(np.float64)
    for axis, length in enumerate(shape):
        old = np.arange(array.shape[axis]) + 0.5
        new = (np.arange(length) + 0.5) * array.shape[axis] / length
        array = np.apply_along_axis(lambda line: np.interp(new, old, line), axis, array)
    return array


@pytest.mark.parametrize("shape", [(9, 30, 11), (3, 8, 40), (6, 20, 31), (1, 1, 1), (5, 20, 7)])
def test_resize(tmp_path, shape):
    array = random_volume((5, 20, 17))
    volume = open_array(tmp_path, array)
    volume.voxel_size = VOXEL
    view, nearest = (emseg.resize(volume, shape, linear) for linear in (True, False))
    assert view.shape == nearest.shape == shape and view.dtype == np.uint8
    assert view.voxel_size == pytest.approx([v * a / b for v, a, b in zip(VOXEL, array.shape,
                                                                          shape)])
    want = slow_resize(array, shape)
    np.testing.assert_allclose(view[:], want, atol=0.501)               # rounded to whole numbers
    places = [((np.arange(new) + 0.5) * old / new).astype(int)
              for old, new in zip(array.shape, shape)]
    np.testing.assert_array_equal(nearest[:], array[np.ix_(*places)])
    box = tuple(slice(side // 3, side // 3 + (side + 1) // 2) for side in shape)
    for one in (view, nearest):
        np.testing.assert_array_equal(one[box], one[:][box])
    assert view[1:1].shape == (0, *shape[1:])
    assert emseg.resize(volume, array.shape, True) is volume


def test_resized_labels_keep_their_annotated_slices(tmp_path):
    array = np.zeros((6, 4, 4), np.uint8)
    array[1] = 1
    volume = open_array(tmp_path, array)
    (label,), _ = emseg.open_labels([volume.path], [volume], label_slices="1,4")
    large, small = emseg.resize(label, (12, 4, 4), False), emseg.resize(label, (3, 4, 4), False)
    assert large.slices.tolist() == [2, 3, 8, 9]
    assert (large[2:4] == 1).all() and (large[0] == emseg.IGNORE).all()
    assert small.slices.tolist() == [0]             # of slices 1, 3, 5 the first is annotated
    assert emseg.downsample(large, 2, "majority").slices.tolist() == [2, 3, 8, 9]


@pytest.mark.parametrize("linear, read", [(True, [38, 39, 64, 65]), (False, [39, 65])])
def test_resizing_reads_no_slices_in_between(linear, read):
    """Of 104 slices that become 4, the middle two: else memory would depend on the volume."""
    volume = InMemory(random_volume((104, 6, 7)))
    found = emseg.resize(volume, (4, 6, 7), linear)[1:3]
    assert volume.read_slices == read
    both = volume.array[38:40], volume.array[64:66]
    want = [np.rint(pair.mean(0)) if linear else pair[1] for pair in both]
    np.testing.assert_array_equal(found, want)


def test_standardize(tmp_path):
    array = np.random.default_rng(0).normal(90, 7, (40, 64, 64)).round().astype(np.uint8)
    view = emseg.standardize(open_array(tmp_path, array))
    assert view[:].mean() == pytest.approx(128, abs=0.5) and view[:].std() == pytest.approx(
        40, abs=0.7)
    want = np.clip(128 + 40 * (array - array.mean()) / array.std(), 0, 255)
    assert np.abs(view[:] - want).max() < 2
    np.testing.assert_array_equal(view[3:5, 7:9, 2], view[:][3:5, 7:9, 2])
    bright = emseg.standardize(open_array(tmp_path, (array * 1.5 + 20).astype(np.uint8), "b"))
    assert np.abs(bright[:].astype(int) - view[:]).max() <= 6       # brightness and contrast go
    flat = emseg.standardize(open_array(tmp_path, np.full((2, 3, 4), 7, np.uint8), "c"))
    assert (flat[:] == 128).all()


@pytest.mark.parametrize("mode", ["zscore", "unit", "volume", "equalize"])
def test_what_the_network_sees(tmp_path, mode):
    volume = open_array(tmp_path, random_volume((4, 20, 24)) // 2)
    args = argparse.Namespace(normalize=mode, downsample=2, resize=[4, 16, 20])
    image = {"volume": emseg.standardize(volume),
             "equalize": emseg.as_uint8(volume, equalize=True)}.get(mode, volume)
    want = emseg.downsample(emseg.resize(image, (4, 16, 20), True), 2, "mean")
    np.testing.assert_array_equal(emseg.view(volume, args)[:], want[:])
    del args.resize                                     # a flag of some scripts only
    want = emseg.downsample(image, 2, "mean")
    np.testing.assert_array_equal(emseg.view(volume, args)[:], want[:])


# --- slices, labels ---

def test_parse_slices():
    def parse(text, depth=20):
        return emseg.parse_slices(text, depth).tolist()
    assert parse("0:165:5", 165) == list(range(0, 165, 5))
    assert parse("15, 3,4") == [3, 4, 15] and parse("0:3,7") == [0, 1, 2, 7]
    assert parse("::10") == [0, 10] and parse("18:") == [18, 19]
    assert parse("n=1", 9) == [4] and parse("n=3", 9) == [1, 4, 7]
    assert parse("n=4", 4) == [0, 1, 2, 3]
    assert parse("every=5", 11) == [0, 5, 10] and parse(" every = 20 ", 11) == [0]
    assert parse("n=7", 165) == [round((i + 0.5) * 165 / 7 - 0.5) for i in range(7)]


@pytest.mark.parametrize("text, match", [
    ("0:21", "0:20"), ("20", "0:20"), ("", "understood"), ("3:3", "empty"), ("1,1", "twice"),
    ("0:5,4", "twice"), ("-1", "understood"), ("n=0", "1 to 20"), ("n=21", "1 to 20"),
    ("a", "understood"), ("0:9:0", "empty"), ("every=0", "understood"), ("every=", "understood"),
    ("1,", "understood"), ("1:2:3:4", "understood")])
def test_bad_slices(text, match):
    with pytest.raises(emseg.InputError, match=match):
        emseg.parse_slices(text, 20)


def test_parse_label_map():
    assert emseg.parse_label_map("191=1, 223=2,-1=255,*=0") == {191: 1, 223: 2, -1: 255, "*": 0}
    assert emseg.parse_label_map("128:131=1,-2:0=2, 5 : 6 = 0") == {
        128: 1, 129: 1, 130: 1, -2: 2, -1: 2, 5: 0}
    for text in ("", "1", "1=2,1=3", "1=256", "a=1", "1=-1", "1:3=1,2=0", "3:3=1", "4:3=1", "*:3=1",
                 "1:=1", ":3=1", "0:100000=1"):
        with pytest.raises(emseg.InputError, match="label map"):
            emseg.parse_label_map(text)


def label_of(tmp_path, array, **options):
    label = np.asarray(array).reshape(2, 2, -1)
    np.save(tmp_path / "label.npy", label)
    volume = open_array(tmp_path, np.zeros(label.shape, np.uint8))
    (labels,), n_classes = emseg.open_labels([tmp_path / "label.npy"], [volume], **options)
    return labels, n_classes


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.uint64])
@pytest.mark.parametrize("raw, options, want, n", [
    ([0, 99, 99, 0], {}, [0, 1, 1, 0], 2),
    ([0, 1, 2, 3], {}, [0, 1, 2, 3], 4),
    ([0, 7, 7, 7], {"classes": 2}, [0, 1, 1, 1], 2),
    ([0, 1, 2, 0], {"classes": 5}, [0, 1, 2, 0], 5),
    ([0, 1, 99, 1], {"ignore_label": 99}, [0, 1, 255, 1], 2),
    ([5, 7, 9, 11], {"label_map": {7: 1, 9: 3, "*": 0}}, [0, 1, 3, 0], 4),
    ([5, 7, 9, 5], {"label_map": {7: 1, 9: 255, 5: 0}}, [0, 1, 255, 0], 2),
    ([5, 7, 9, 9], {"label_map": {7: 1, "*": 0}, "ignore_label": 9}, [0, 1, 255, 255], 2),
])
def test_label_rules(tmp_path, dtype, raw, options, want, n):
    labels, n_classes = label_of(tmp_path, np.array(raw * 6, dtype), **options)
    want = np.array(want * 6).reshape(2, 2, 6)
    assert n_classes == n and labels.dtype == np.uint8
    np.testing.assert_array_equal(labels[:], want)
    np.testing.assert_array_equal(labels[1, 0:1, 2:5], want[1, 0:1, 2:5])
    assert labels.slices.tolist() == [0, 1]
    np.testing.assert_array_equal(
        labels.counts, [[(page == c).sum() for c in range(n)] for page in want])


@pytest.mark.parametrize("raw, options, match", [
    ([0, 1, 255, 0], {}, r'values 0, 1, 255: .*--label-map="0=0,1=1,255=2", or --ignore-label 255'),
    ([0, 3, 5, 0], {"classes": 2}, "values 0, 3, 5"),
    ([0, 1, 3, 0], {"classes": 3}, "class ids 0 to 2"),
    ([0, 2, 0, 0], {"label_map": {0: 0, 2: 3}, "classes": 3}, "class 3 is outside"),
    ([0, 2, 4, 6], {"label_map": {0: 0, 2: 1}}, "values 4, 6 are not in the label map"),
    ([0, 0, 0, 0], {}, "no foreground"),
    ([9, 9, 9, 9], {"ignore_label": 9}, "no foreground"),
    ([0, -1, 0, 0], {}, "values -1, 0"),
    ([0, 0.5, 1, 0], {}, "not whole numbers"),
    ([0, np.nan, 1, 0], {}, "not whole numbers"),
])
def test_label_errors(tmp_path, raw, options, match):
    array = np.array(raw * 2)
    with pytest.raises(emseg.InputError, match=match):
        label_of(tmp_path, array.astype(np.int16) if array.dtype.kind == "i" else array, **options)


def test_label_errors_of_files(tmp_path):
    with pytest.raises(emseg.InputError, match="instance ids"):
        label_of(tmp_path, np.arange(400, dtype=np.uint16))
    labels, n = label_of(tmp_path, np.arange(400, dtype=np.uint16), label_map={0: 0, "*": 1})
    assert n == 2 and labels.counts.sum(0).tolist() == [1, 399]
    assert label_of(tmp_path, np.zeros(8, np.uint8), require_foreground=False)[1] == 2
    volume = open_array(tmp_path, np.zeros((3, 4, 5), np.uint8))
    with pytest.raises(emseg.InputError, match=r"\(2, 2, 2\).*\(3, 4, 5\)"):
        emseg.open_labels([tmp_path / "label.npy"], [volume])
    with pytest.raises(emseg.InputError, match="1 volumes but 2 labels"):
        emseg.open_labels(["a", "b"], [volume])


def test_union_of_labels_decides_the_classes(tmp_path):
    volume = open_array(tmp_path, np.zeros((1, 2, 2), np.uint8))
    for name, values in (("a", [0, 0, 1, 1]), ("b", [0, 2, 2, 2]), ("c", [0, 200, 0, 0])):
        np.save(tmp_path / f"{name}.npy", np.array(values, np.uint8).reshape(1, 2, 2))
    a, b, c = (tmp_path / f"{name}.npy" for name in "abc")
    labels, n = emseg.open_labels([a, b], [volume] * 2)
    assert n == 3 and labels[1][0, 0, 1] == 2
    with pytest.raises(emseg.InputError, match="0, 1, 200"):
        emseg.open_labels([a, c], [volume] * 2)
    labels, _ = emseg.open_labels([a, c], [volume] * 2, classes=2)
    assert labels[1][0, 0, 1] == 1


def test_negative_and_large_raw_values(tmp_path):
    raw = np.array([-1, 300, 44, -256] * 2, np.int16)
    labels, n = label_of(tmp_path, raw, label_map={-1: 0, 300: 1, 44: 2, "*": 255})
    assert n == 3 and labels[:].ravel().tolist() == [0, 1, 2, 255] * 2


def test_label_slices(tmp_path):
    array = np.ones((2, 2, 3), np.uint8)
    labels, _ = label_of(tmp_path, array, label_slices="1")
    assert labels.slices.tolist() == [1]
    assert (labels[0] == emseg.IGNORE).all() and (labels[1] == 1).all()
    assert labels.counts.tolist() == [[0, 0], [0, 6]]


def test_sparse_label_folder(tmp_path):
    images = random_volume((12, 8, 9))
    masks = (random_volume((3, 8, 9), seed=1) > 50).astype(np.uint8)
    folder = write_folder(tmp_path / "images", images, [f"im{z + 100}.png" for z in range(12)])
    label = write_folder(tmp_path / "labels", masks * 255, ["l102.png", "l105.png", "l110.png"])
    (labels,), n = emseg.open_labels([label], [emseg.open_volume(folder)])
    assert n == 2 and labels.slices.tolist() == [2, 5, 10] and labels.shape == images.shape
    np.testing.assert_array_equal(labels[[2, 5, 10][1]], masks[1])
    assert (labels[3] == emseg.IGNORE).all() and labels.counts[3].sum() == 0
    np.testing.assert_array_equal(labels.counts[[2, 5, 10], 1], masks.sum((1, 2)))
    # the crop of the image holds for its labels, unless they have their own
    (labels,), _ = emseg.open_labels([label], [emseg.open_volume(f"{folder}@4:12,2:6,1:8")])
    assert labels.slices.tolist() == [1, 6] and labels.shape == (8, 4, 7)
    np.testing.assert_array_equal(labels[6], masks[2, 2:6, 1:8])
    (labels,), _ = emseg.open_labels([f"{label}@4:8"], [emseg.open_volume(f"{folder}@4:8")])
    assert labels.slices.tolist() == [1]
    with pytest.raises(emseg.InputError, match=r"\(3, 8, 9\) do not fit.*\(4, 8, 9\)"):
        emseg.open_labels([f"{label}@4:7"], [emseg.open_volume(f"{folder}@4:8")])
    with pytest.raises(emseg.InputError, match="asks for slice 3"):
        emseg.open_labels([label], [emseg.open_volume(folder)], label_slices="2,3")
    (labels,), _ = emseg.open_labels([label], [emseg.open_volume(folder)], label_slices="5")
    assert labels.slices.tolist() == [5]
    # a volume in one file: the number is z
    with pytest.raises(emseg.InputError, match="number 102 matches no slice"):
        emseg.open_labels([label], [open_array(tmp_path, images)])
    low = write_folder(tmp_path / "low", masks, ["0.png", "7.png", "11.png"])
    (labels,), _ = emseg.open_labels([low], [open_array(tmp_path, images)])
    assert labels.slices.tolist() == [0, 7, 11]
    (labels,), _ = emseg.open_labels([low], [emseg.open_volume(f"{tmp_path}/v.npy@0:8,1:7")])
    np.testing.assert_array_equal(labels[7], masks[1, 1:7])
    drawn = write_folder(tmp_path / "drawn", masks[:, 1:7], ["0.png", "7.png", "11.png"])
    (labels,), _ = emseg.open_labels([drawn], [emseg.open_volume(f"{tmp_path}/v.npy@0:8,1:7")])
    np.testing.assert_array_equal(labels[7], masks[1, 1:7])
    unnumbered = write_folder(tmp_path / "u", masks, ["a.png", "b.png", "c.png"])
    with pytest.raises(emseg.InputError, match="own number"):
        emseg.open_labels([unnumbered], [open_array(tmp_path, images)])
    small = emseg.downsample(labels, 2, "majority")
    assert small.slices.tolist() == [0, 7]


# --- writing ---

def test_writer_leaves_nothing_after_an_exception(tmp_path):
    with pytest.raises(RuntimeError):
        with emseg.create_volume(tmp_path / "a.tif", (4, 5, 6), np.uint8) as writer:
            writer[0:1] = np.zeros((1, 5, 6))
            raise RuntimeError
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="slab"):
        with emseg.create_volume(tmp_path / "a.tif", (4, 5, 6), np.uint8) as writer:
            writer[2:6] = np.zeros((4, 5, 6))


def test_two_processes_fill_one_file(tmp_path):
    path, array = tmp_path / "a.mrc", random_volume((4, 5, 6))
    np.save(tmp_path / "v.npy", array)
    code = ("import emseg, numpy as np\n"
            f"array = np.load({str(tmp_path / 'v.npy')!r})\n"
            f"with emseg.create_volume({str(path)!r}, array.shape, 'uint8', attach=True) as w:\n"
            "    w[2:4] = array[2:]\n")
    with emseg.create_volume(path, array.shape, np.uint8) as writer:
        subprocess.run([sys.executable, "-c", code], check=True,
                       cwd=Path(emseg.__file__).parent)
        writer[0:2] = array[:2]
        assert not path.exists()
    np.testing.assert_array_equal(emseg.open_volume(path)[:], array)


def test_mrc_class_ids_and_probability_stack(tmp_path):
    array = random_volume()
    with emseg.create_volume(tmp_path / "a.mrc", array.shape, "uint8", max_value=99) as writer:
        writer[:] = array
    with mrcfile.open(tmp_path / "a.mrc") as mrc:
        assert mrc.header.mode == 0
        np.testing.assert_array_equal(mrc.data, array)
    prob = random_volume((3, 2, 5, 6), np.float32)
    with emseg.create_volume(tmp_path / "p.tif", prob.shape, np.float32, VOXEL) as writer:
        writer[1:3] = prob[1:]
        writer[0:1] = prob[:1]
    with tifffile.TiffFile(tmp_path / "p.tif") as tif:
        assert tif.series[0].axes == "ZCYX" and tif.imagej_metadata["unit"] == "nm"
        np.testing.assert_array_equal(tif.asarray(), prob)


def test_writing_refused(tmp_path, monkeypatch):
    def create(name, shape=(2, 3, 4), **options):
        return emseg.create_volume(tmp_path / name, shape, np.uint8, **options)
    with pytest.raises(emseg.InputError, match="GiB free"):
        create("a.tif", (10**6, 10**6, 10**6))
    with pytest.raises(emseg.InputError, match="does not exist"):
        create("no/a.tif")
    with pytest.raises(emseg.InputError, match="wanted .tif or .mrc"):
        create("a.jpg")
    with pytest.raises(emseg.InputError, match="a folder that all machines share"):
        create("a.tif", attach=True)
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_is_one_line(tmp_path):
    writer = emseg.create_volume(tmp_path / "a.tif", (2, 300, 400), np.uint8)
    writer.stream.close()
    writer.stream = open("/dev/full", "r+b")
    with pytest.raises(emseg.InputError, match="a.tif: cannot be written .*[Nn]o space"):
        writer[0:2] = np.zeros((2, 300, 400), np.uint8)


# --- real files ---

def reference(path, volume):
    """What tifffile, mrcfile or matplotlib reads from a file, as the volume that we opened."""
    if volume.format == "tiff":
        return tifffile.imread(path).reshape(volume.shape)
    if volume.format == "slices":
        image = np.rint(imread(path, format="png") * np.iinfo(volume.dtype).max)
        return (image if image.ndim == 2 else image[..., 0])[None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with mrcfile.open(path, permissive=True) as mrc:
            axes = [int(mrc.header[name]) for name in ("maps", "mapr", "mapc")]
            want = mrc.data.reshape((-1, *mrc.data.shape[-2:]))
    if sorted(axes) == [1, 2, 3]:
        want = want.transpose([axes.index(axis) for axis in (3, 2, 1)])
    return want


@real_data
@pytest.mark.parametrize("folder", ["mrc", "tiff"])
def test_real_files_read_as_the_reference_reads_them_or_are_refused(folder, tmp_path):
    """Whatever they are named; in bounded time and memory, whatever their headers declare."""
    compared = Counter()
    for path in sorted(p for p in (DATA / folder).rglob("*") if p.is_file()):
        paths = [path]
        for ending in (".tif", ".mrc"):
            if path.suffix[:4] != ending:
                paths.append(tmp_path / f"renamed{ending}")
                paths[-1].write_bytes(path.read_bytes())
        for named in paths:
            volume, array = None, np.empty(0)
            signal.alarm(20)                            # a hang ends the test
            tracemalloc.start()
            try:
                volume = emseg.open_volume(named)
                array = volume[:]
            except emseg.InputError as error:
                assert "\n" not in str(error) and str(named) in str(error)
            finally:
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
                signal.alarm(0)
            assert peak < 2e6 + 4 * path.stat().st_size + 12 * array.nbytes, (path, named, peak)
            if array.size:
                np.testing.assert_array_equal(array, reference(named, volume), str(path))
                compared[volume.format] += 1
    assert compared["mrc"] >= {"mrc": 15, "tiff": 0}[folder]
    assert compared["tiff"] >= {"mrc": 0, "tiff": 50}[folder]


@real_data
def test_real_stacks():
    image = emseg.open_volume(DATA / "lucchi" / "Train_In")
    assert image.shape == (165, 768, 1024) and image.numbers == tuple(range(165))
    volume = emseg.open_volume(f"{DATA}/lucchi/Train_In@0:20")
    (labels,), n = emseg.open_labels([f"{DATA}/lucchi/Train_Out@0:20"], [volume])
    assert n == 2 and labels.slices.tolist() == list(range(20))
    (labels,), _ = emseg.open_labels([DATA / "lucchi_organelles" / "mitochondrion"],
                                     [image], label_map={**dict.fromkeys(range(128), 0), "*": 1})
    assert labels.slices.tolist() == list(range(20)) and len(labels) == 165
    vnc = emseg.open_volume(DATA / "vnc" / "raw")
    with pytest.raises(emseg.InputError, match=r"0, 32, 64, 96, 128, 159, 191, 223, 255"):
        emseg.open_labels([DATA / "vnc" / "labels"], [vnc])
    (labels,), n = emseg.open_labels([DATA / "vnc" / "labels"], [vnc],
                                     label_map=emseg.parse_label_map("191=1,223=2,*=0"))
    assert n == 3 and labels.counts.sum() == vnc[:].size
    # 19 slices of 1 bit and one of 8 bits: foreground is 255 in all
    (labels,), n = emseg.open_labels([DATA / "vnc" / "membranes"], [vnc])
    values = np.unique(emseg.open_volume(DATA / "vnc" / "synapses")[:])
    assert n == 2 and 1 not in values and 255 in values
