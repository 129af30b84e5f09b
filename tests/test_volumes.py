"""Volumes: what open_volume reads, labels, lazy views and writing. EMSEG_DATA adds real files."""

import os
import pickle
import re
import struct
import tracemalloc
import warnings
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import tifffile
import torch
from matplotlib.image import PIL
from torch.utils.data import DataLoader

import emseg

VOXEL = (50.0, 4.6, 4.7)
TYPES = "u1 u2 u4 u8 i1 i2 i4 i8 f2 f4 f8".split()
MRC_MODES = {"int8": 0, "int16": 1, "float32": 2, "uint16": 6, "float16": 12}


def random_volume(shape=(6, 20, 30), dtype=np.uint8, seed=0):
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.normal(size=shape).astype(dtype)
    return rng.integers(0, 100, shape).astype(dtype)


def open_array(tmp_path, array, name="v"):
    np.save(tmp_path / f"{name}.npy", array)
    return emseg.open_volume(tmp_path / f"{name}.npy")


def mrc_by_hand(path, array, header=(), order="<", stamp=None, voxel=(40.0, 40.0, 40.0),
                extended=0):
    """Write an MRC file: an array (sections, rows, columns), other header entries {offset: bytes},
    the byte order and that of the machine stamp, the same where none is given. voxel: x, y, z in
    angstrom; extended: bytes between header and voxels."""
    head = bytearray(1024)
    sides = array.shape[::-1]
    struct.pack_into(f"{order}10i6f", head, 0, *sides, MRC_MODES[array.dtype.name], 0, 0, 0, *sides,
                     *(n * side for n, side in zip(sides, voxel)), 90, 90, 90)
    struct.pack_into(f"{order}3i", head, 64, 1, 2, 3)
    struct.pack_into(f"{order}i", head, 92, extended)
    head[208:216] = b"MAP " + {"<": b"DD\0\0", ">": b"\x11\x11\0\0"}[stamp or order]
    for offset, data in dict(header).items():
        head[offset:offset + len(data)] = data
    voxels = array.astype(array.dtype.newbyteorder(order)).tobytes()
    Path(path).write_bytes(bytes(head) + b"\x55" * extended + voxels)


def write_png(path, image, mode=None, palette=None):
    """A PNG file of a grey image, of one in colour, or of palette indices (mode "P")."""
    mode = mode or {"bool": "1", "uint8": "L", "uint16": "I;16"}[image.dtype.name]
    data = np.packbits(image, axis=1) if mode == "1" else image
    one = PIL.Image.frombytes(mode, image.shape[1::-1], data.tobytes())
    if palette:
        one.putpalette(palette)
    one.save(path)


def write_folder(folder, images, names):
    folder.mkdir()
    for image, name in zip(images, names):
        write_png(folder / name, image)
    return folder


def assert_refused(path, match):
    """One line that names the file and, apart from the folder's name, says what `match` says."""
    with pytest.raises(emseg.InputError) as caught:
        emseg.open_volume(path)
    message, folder = str(caught.value), str(Path(path).parent)
    assert re.search(match, message.replace(folder, "")), message
    assert "\n" not in message and Path(path).name in message


def check_reading(path, array):
    """The volume at path is this array, also cropped and indexed; what it hands out is fresh."""
    volume, rng = emseg.open_volume(path), np.random.default_rng(0)
    assert volume.shape == array.shape and volume.dtype == array.dtype and volume.dtype.isnative
    np.testing.assert_array_equal(volume[:], array)
    for _ in range(6):
        start = [int(rng.integers(size)) for size in array.shape]
        stop = [int(rng.integers(low + 1, size + 1)) for low, size in zip(start, array.shape)]
        text = ",".join(f"{low}:{high}" for low, high in zip(start, stop))
        crop, want = emseg.open_volume(f"{path}@{text}"), array[tuple(map(slice, start, stop))]
        index = tuple(int(rng.integers(-size, size)) if rng.random() < 0.4 else
                      slice(*rng.integers(-size - 2, size + 3, 2).tolist())
                      for size in want.shape[: rng.integers(1, 4)])
        crop[:].fill(0)
        np.testing.assert_array_equal(crop[index], want[index], f"{text} {index}")
    return volume


# --- formats ---

@pytest.mark.parametrize("options, voxel", [
    (dict(imagej=True, resolution=(1 / .0047, 1 / .0046),
          metadata={"axes": "ZYX", "spacing": .05, "unit": "um"}), VOXEL),
    (dict(imagej=True, resolution=(1 / .0047, 1 / .0046),
          metadata={"axes": "TYX", "spacing": .05, "unit": "\\u00B5m"}), VOXEL),
    (dict(ome=True, metadata={"axes": "ZYX", "PhysicalSizeX": 4.7, "PhysicalSizeXUnit": "nm",
                              "PhysicalSizeY": .0046, "PhysicalSizeZ": .05}), VOXEL),
    (dict(ome=True, metadata={"axes": "TYX", "PhysicalSizeX": 47, "PhysicalSizeXUnit": "Å",
                              "PhysicalSizeY": 46, "PhysicalSizeYUnit": "Å"}), (4.7, 4.6, 4.7)),
    (dict(bigtiff=True, resolution=(1e7 / 5, 1e7 / 5), resolutionunit=3), (5, 5, 5)),
    (dict(byteorder=">", resolution=(72, 72), resolutionunit=2), None),
    (dict(tile=(16, 16), byteorder=">"), None), (dict(rowsperstrip=7), None),
    (dict(compression="lzma", rowsperstrip=7), None), (dict(contiguous=False), None),
    (dict(compression="zlib", tile=(16, 32), bigtiff=True), None)])
def test_tiff(tmp_path, options, voxel):
    for dtype in ("u1", "u2", "f4") if {*options} & {"imagej", "ome"} else TYPES:
        array = random_volume(dtype=dtype)
        tifffile.imwrite(tmp_path / "a.tif", array, photometric="minisblack", **options)
        volume = check_reading(tmp_path / "a.tif", array)
        assert volume.voxel_size == (voxel and pytest.approx(voxel, rel=1e-6))


@pytest.mark.parametrize("order", "<>")
def test_mrc(tmp_path, order):
    path = tmp_path / "a.mrcs"
    for dtype in MRC_MODES:
        array = random_volume((4, 5, 6), dtype)
        mrc_by_hand(path, array, order=order, voxel=(47, 46, 500), extended=80)
        assert check_reading(path, array).voxel_size == pytest.approx(VOXEL)
    for header, want in (
            ({152: struct.pack(f"{order}ii", 1146047817, 0)}, np.uint8),    # IMOD: unsigned
            ({152: struct.pack(f"{order}ii", 1146047817, 1)}, np.int8)):    # IMOD: signed
        array = random_volume((4, 5, 6), np.int8) - np.int8(50)
        mrc_by_hand(path, array, header, order)
        check_reading(path, array.view(want))
    mrc_by_hand(path, array, {64: struct.pack(f"{order}3i", 3, 1, 2)}, order)   # columns are z, ...
    check_reading(path, array.transpose(2, 0, 1))
    mrc_by_hand(path, array, {40: bytes(12)}, order)
    assert emseg.open_volume(path).voxel_size is None
    mrc_by_hand(path, array, {12: struct.pack(f"{order}i", 4)}, order)
    assert_refused(path, "mode 4")
    array = array.astype(np.int16)
    mrc_by_hand(path, array, order=order, stamp="<" if order == ">" else ">")           # it lies
    check_reading(path, array)
    if order == "<":
        mrc_by_hand(path, array, {208: bytes(8)})       # no MAP id, no machine stamp
        check_reading(path, array)


@pytest.mark.parametrize("order", "CF")
def test_npy(tmp_path, order):
    for dtype in TYPES:
        array = random_volume(dtype=dtype)
        stored = array.astype(array.dtype.newbyteorder(">")).copy(order)
        assert check_reading(open_array(tmp_path, stored).path, array).voxel_size is None
    check_reading(open_array(tmp_path, array[0] > 0).path, (array[:1] > 0).astype(np.uint8))


def test_png_depths_and_colours(tmp_path):
    grey = random_volume((7, 16))
    for image, want in ((grey, grey), (grey * np.uint16(600), grey * np.uint16(600)),
                        (grey > 50, (grey > 50) * np.uint8(255))):
        write_png(tmp_path / "a.png", image)
        check_reading(tmp_path / "a.png", want[None])
    write_png(tmp_path / "rgb.png", np.stack([grey] * 3, -1), "RGB")
    check_reading(tmp_path / "rgb.png", grey[None])
    write_png(tmp_path / "red.png", np.stack([grey, grey, grey + 1], -1), "RGB")
    assert_refused(tmp_path / "red.png", "colours")


def test_folders(tmp_path):
    images = random_volume((3, 8, 9))
    folder = write_folder(tmp_path / "s", images, ["b2x10.png", "b2x9.png", "b2x100.png"])
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "notes.txt").write_text("9")
    assert check_reading(folder, images[[1, 0, 2]]).numbers == (9, 10, 100)
    write_png(folder / "c9.png", images[0])
    assert emseg.open_volume(folder).numbers is None        # two files of one number
    for odd in (images[0, :5], images[0].astype(np.uint16)):
        write_png(folder / "c9.png", odd)
        with pytest.raises(emseg.InputError, match="all alike, got .*c9.png"):
            emseg.open_volume(folder)
    (tmp_path / "t").mkdir()
    assert_refused(tmp_path / "t", "no .tif")
    for z, image in enumerate(images):
        tifffile.imwrite(tmp_path / f"t/{z}.tiff", image, compression="zlib" if z else None,
                         resolution=(2e6, 2e6), resolutionunit=3)
    assert check_reading(tmp_path / "t", images).voxel_size == pytest.approx((5, 5, 5))
    write_png(tmp_path / "t/3.png", images[0])
    with pytest.raises(emseg.InputError, match="all alike, got .*3.png"):
        emseg.open_volume(tmp_path / "t")


@pytest.mark.parametrize("shape, options", [
    ((5, 20, 30, 3), dict(metadata={"axes": "ZYXS"}, photometric="rgb")),
    ((5, 2, 20, 30), dict(metadata={"axes": "ZCYX"}, imagej=True)),
    ((3, 5, 20, 30), dict(metadata={"axes": "TZYX"}, imagej=True)),
    ((6, 20, 30), dict(metadata={"axes": "CYX"}, ome=True))])
def test_tiff_that_is_no_stack(tmp_path, shape, options):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.ones(shape, np.uint8), **options)
    assert_refused(path, "axes .*wanted one stack of grey values")
    tifffile.imwrite(path, np.ones((8, 9), np.complex64))
    assert_refused(path, "complex64")
    with tifffile.TiffWriter(path) as tif:
        tif.write(np.ones((8, 9), np.uint8))
        tif.write(np.ones((8, 10), np.uint8))
    assert_refused(path, "2 of axes")


@pytest.mark.parametrize("ending, options", [
    ("mrc", {}), ("npy", {}), ("png", {}), ("tif", {}), ("tif", {"imagej": True}),
    ("tif", {"compression": "zlib"})])
def test_files_that_are_damaged(tmp_path, ending, options):
    path, array = tmp_path / f"a.{ending}", np.random.default_rng(0).integers(0, 99, (6, 64, 64))
    assert_refused(path, "no such file")
    write = {"mrc": mrc_by_hand, "npy": np.save, "png": write_png, "tif": tifffile.imwrite}[ending]
    write(path, array[0].astype(np.uint8) if ending == "png" else array.astype(np.int16), **options)
    whole = path.read_bytes()
    for content in (b"", b"This is not an image. " * 100, whole[:100], whole[:1000],
                    whole[:len(whole) // 2], whole[:-100]):
        path.write_bytes(content)
        assert_refused(path, "not readable|breaks off|truncated")
    path.rename(tmp_path / "a.jpg")
    assert_refused(tmp_path / "a.jpg", "cannot read type '.jpg'")


def test_a_codec_that_is_missing_is_named(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", random_volume(), compression="zlib")
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as tif:
        for page in tif.pages:
            page.tags["Compression"].overwrite(5)           # LZW
    assert_refused(tmp_path / "a.tif", "pip install imagecodecs")


# --- crops ---

@pytest.mark.parametrize("crop, match", [
    ("0:7", "along z.* 0 to 5"), (":,20:21", "along y.* 0 to 19"), (":,:,30", "along x.* 0 to 29"),
    ("4:2", "empty"), ("1,2,3,4", "three axes"), ("0:6:2", "a crop is"), ("-1:3", "understood")])
def test_bad_crops(tmp_path, crop, match):
    assert_refused(f"{open_array(tmp_path, random_volume()).path}@{crop}", match)


def test_name_with_an_at(tmp_path):
    array = random_volume()
    np.save(tmp_path / "a@1:2.npy", array)
    check_reading(tmp_path / "a@1:2.npy", array)
    assert_refused(tmp_path / "b@1:2.npy", "no such file")
    write_folder(tmp_path / "s", array[:3], ["0.png", "1.png", "2.png"])
    check_reading(write_folder(tmp_path / "s@1:2", array[3:], ["0.png", "1.png", "2.png"]),
                  array[3:])


# --- what people's files hold: reports about programs that do this job ---

def test_unsigned_bytes_of_mrc_files_without_imods_mark(tmp_path):
    """Mode 0 as CCP4, EMAN and Amira wrote it: the range in the header says that it is unsigned."""
    array, path = random_volume() * 2, tmp_path / "a.mrc"
    mrc_by_hand(path, array.view(np.int8))                      # says nothing: signed, with a note
    assert "signed" in check_reading(path, array.view(np.int8)).note
    mrc_by_hand(path, array.view(np.int8), {76: struct.pack("<3f", array.min(), array.max(), 99)})
    assert not check_reading(path, array).note


@pytest.mark.parametrize("raw, advice", [
    ([-128, -127], "-128=0,-127=1"),                            # a mask drawn in IMOD
    ([1, 2], "1=0,2=1"), ([1, 2, 3], "1=0,2=1,3=2")])           # ilastik, whose background is 1
def test_advice_on_values_without_background(tmp_path, raw, advice):
    raw = np.array(raw * 4, np.int16)
    for classes in {None, len(set(raw))}:       # also where classes are known, as from a checkpoint
        with pytest.raises(emseg.InputError, match=f'such as "{advice}"'):
            label_of(tmp_path, raw, classes=classes)
    labels, n = label_of(tmp_path, raw, label_map=emseg.parse_label_map(advice))
    assert n == len(set(raw)) and (np.diff(labels.counts.sum(0)) == 0).all()


def test_folders_are_paired_by_number_whatever_the_counts(tmp_path):
    """Image 5 was lost and label 2 was not drawn: as many files, but not the same slices."""
    array = random_volume((10, 8, 9))
    em, lab = ([z for z in range(10) if z != lost] for lost in (5, 2))
    images = write_folder(tmp_path / "em", array[em], [f"em_{z:03}.png" for z in em])
    masks = (array > 50).astype(np.uint8)
    label = write_folder(tmp_path / "lab", masks[lab], [f"label_{z:03}.png" for z in lab])
    with pytest.raises(emseg.InputError, match="slice of .*em.*got 5$"):
        emseg.open_labels([label], [emseg.open_volume(images)])
    os.remove(label / "label_005.png")
    (labels,), _ = emseg.open_labels([label], [emseg.open_volume(images)])
    assert labels.slices.tolist() == [z for z in range(9) if em[z] != 2]
    for z in labels.slices:
        np.testing.assert_array_equal(labels[z], masks[em[z]])
    single = write_folder(tmp_path / "z", masks, [f"{z}.png" for z in range(1, 11)])
    (labels,), _ = emseg.open_labels([single], [open_array(tmp_path, array)])   # by position
    np.testing.assert_array_equal(labels[:], masks)


def test_slices_without_an_annotated_voxel_are_not_labelled(tmp_path):
    scribbles = np.zeros((6, 8, 8), np.uint8)
    scribbles[1, 2:4, 2:6], scribbles[4, :, 5] = 1, 2
    volume = open_array(tmp_path, scribbles)
    (labels,), n = emseg.open_labels([volume.path], [volume], ignore_label=0,
                                     label_map={1: 0, 2: 1})
    assert n == 2 and labels.slices.tolist() == [1, 4]
    assert labels.counts.tolist() == [[0, 0], [8, 0], [0, 0], [0, 0], [0, 8], [0, 0]]
    assert emseg.Downsampled(labels, 2, "majority").slices.tolist() == [1, 4]
    some = labels.only([0, 4])
    assert some.slices.tolist() == [4] and some.counts.sum() == 8 and (some[1] == 255).all()
    with pytest.raises(emseg.InputError, match="every voxel is ignored"):
        emseg.open_labels([f"{volume.path}@2:4"], [emseg.open_volume(f"{volume.path}@2:4")], 2,
                          ignore_label=0, label_map={1: 0, 2: 1})


@pytest.mark.parametrize("fill, dtype", [(0, np.uint16), (-1e5, np.float32), (65535, np.uint16)])
def test_a_constant_border_takes_no_grey_levels(tmp_path, fill, dtype):
    plain = np.random.default_rng(0).normal(31000, 100, (6, 64, 64)).astype(dtype)
    bordered = plain.copy()
    bordered[:, :9] = fill
    grey, other = (emseg.Grey(open_array(tmp_path, array, name))[:, 9:].astype(int)
                   for array, name in ((plain, "a"), (bordered, "b")))
    assert np.abs(grey - other).max() <= 4 and other.std() > 30


@pytest.mark.parametrize("dtype", [np.uint16, np.float32, np.uint8])
@pytest.mark.parametrize("normalize", [None, "equalize", "volume"])
def test_a_voxel_has_one_grey_value_whatever_is_cropped(tmp_path, dtype, normalize):
    array = (random_volume((30, 20, 20)) + np.arange(30, dtype=dtype)[:, None, None] * 5) * 1
    array = (array * (300 if dtype == np.uint16 else 1)).astype(dtype)
    path = open_array(tmp_path, array).path
    whole = emseg.Grey(emseg.open_volume(path), normalize)[:]
    crop = emseg.Grey(emseg.open_volume(f"{path}@3:9,2:17,5:"), normalize)
    np.testing.assert_array_equal(crop[:], whole[3:9, 2:17, 5:])
    np.testing.assert_array_equal(crop[2:4, 3], whole[5:7, 5, 5:])


@pytest.mark.parametrize("pixel, lines, voxel", [
    (5, "unit=nm spacing=0.05 yunit=nm zunit=micron", (50, 5, 5)),
    (.005, "unit=micron spacing=50.0 zunit=nm", (50, 5, 5)),
    (1, "unit=pixel spacing=50.0 zunit=nm", None),
    (5, "unit=nanometers spacing=50", (50, 5, 5)), (50, "unit=Angstroms spacing=500", (50, 5, 5)),
    (50, r"unit=\u00C5 spacing=500", (50, 5, 5)), (.005, r"unit=\u00B5m spacing=.05", (50, 5, 5)),
    (.005, "unit=micrometers spacing=0.05", (50, 5, 5))])
def test_units_as_people_write_them(tmp_path, pixel, lines, voxel):
    array = random_volume()
    text = "\n".join(["ImageJ=1.54f", "images=6", "slices=6", *lines.split(), "loop=false", ""])
    tifffile.imwrite(tmp_path / "a.tif", array, description=text.encode(), metadata=None,
                     photometric="minisblack", resolution=(1 / pixel, 1 / pixel), resolutionunit=1)
    volume = emseg.open_volume(tmp_path / "a.tif")
    assert volume.voxel_size == (voxel and pytest.approx(voxel, rel=1e-6))


def test_palette_indices_and_transparency_of_png(tmp_path):
    ids = (random_volume((7, 9)) % 3).astype(np.uint8)
    write_png(tmp_path / "p.png", ids, "P", [0, 0, 0, 128, 0, 0, 0, 128, 0])
    np.testing.assert_array_equal(emseg.open_volume(tmp_path / "p.png")[0], ids)
    ink = np.full((7, 9, 4), 255, np.uint8)
    write_png(tmp_path / "opaque.png", ink, "RGBA")
    assert (emseg.open_volume(tmp_path / "opaque.png")[:] == 255).all()
    ink[..., 3] = (ids == 1) * 255                              # white ink on transparent ground
    write_png(tmp_path / "ink.png", ink, "RGBA")
    assert_refused(tmp_path / "ink.png", "transparent")


@pytest.mark.parametrize("origin, start, crop, wanted", [
    ((1000, 2000, 3000), (20, 40, 30), "", ((1000, 2000, 3000), (20, 40, 30))),
    ((1000, 2000, 3000), (20, 40, 30), "@2:5,3:,4:", ((1200, 2150, 3200), (24, 43, 32))),
    ((0, 0, 0), (20, 40, 30), "@2:5,3:,4:", ((0, 0, 0), (24, 43, 32))),
    ((0, 0, 0), (0, 0, 0), "@2:5,3:,4:", ((200, 150, 200), (4, 3, 2)))])
def test_a_prediction_lies_on_its_tomogram(tmp_path, origin, start, crop, wanted):
    """ChimeraX places a map by its origin, or by nxstart, ... where that is 0."""
    with mrcfile.new(tmp_path / "a.mrc", random_volume().view(np.int8)) as mrc:
        mrc.voxel_size, mrc.header.origin, mrc.nstart = (50, 50, 100), origin, start    # x, y, z
    volume = emseg.open_volume(f"{tmp_path}/a.mrc{crop}")
    with emseg.create_volume(tmp_path / "p.mrc", volume.shape, np.uint8, volume.voxel_size,
                             max_value=1, like=volume) as writer:
        writer[:] = volume[:] > 3
    with mrcfile.open(tmp_path / "p.mrc") as mrc:
        assert mrc.header.origin.tolist() == wanted[0] and mrc.nstart.tolist() == wanted[1]
        assert mrc.voxel_size.tolist() == (50, 50, 100)


def test_workers_share_a_compressed_tiff(tmp_path):
    array = np.random.default_rng(0).integers(0, 255, (40, 64, 64), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", array, compression="zlib")
    volume = emseg.open_volume(tmp_path / "a.tif")
    volume[3]
    found = torch.cat([*DataLoader(volume, batch_size=2, num_workers=2)])       # by fork
    np.testing.assert_array_equal(found.numpy(), array)
    assert len(pickle.dumps(volume)) < 10_000                                   # by spawn
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(volume))[7], array[7])


# --- grey values and other resolutions ---

def test_grey_values(tmp_path):
    array = random_volume()
    volume = open_array(tmp_path, array)
    np.testing.assert_array_equal(emseg.Grey(volume)[:], array)
    signed = emseg.Grey(open_array(tmp_path, (array.astype(int) - 50).astype(np.int8)))
    np.testing.assert_array_equal(signed[:], array + 78)
    for dtype in (np.uint16, np.int16, np.float32):         # Fiji: Image > Type > 16-bit
        np.testing.assert_array_equal(
            emseg.Grey(open_array(tmp_path, array.astype(dtype)))[:], array)
    ramp = np.arange(100_000, dtype=np.float32).reshape(10, 100, 100)
    view = emseg.Grey(open_array(tmp_path, ramp))
    low, high = np.percentile(ramp, (0.1, 99.9))
    want = np.clip(np.rint((ramp.astype(np.float64) - low) / (high - low) * 255), 0, 255)
    assert np.abs(view[:] - want).max() <= 1 and (view[:] == want).mean() > 0.999


def test_equalize(tmp_path):
    array = np.random.default_rng(0).normal(120, 10, (3, 200, 200)).clip(115, 255).astype(np.uint8)
    array[1], array[2] = array[0] + 50, 9
    view = emseg.Grey(open_array(tmp_path, array), "equalize")
    values, inverse, counts = np.unique(array[0], return_inverse=True, return_counts=True)
    cdf = counts.cumsum()
    want = np.rint((cdf - cdf[0]) / (cdf[-1] - cdf[0]) * 255)[inverse].reshape(200, 200)
    np.testing.assert_array_equal(view[:2], [want, want])
    assert len(np.unique(view[2])) == 1


def test_standardize(tmp_path):
    array = np.random.default_rng(0).normal(90, 7, (40, 64, 64)).round().astype(np.uint8)
    array += np.arange(40, dtype=np.uint8)[:, None, None]       # slices grow brighter
    view = emseg.Grey(open_array(tmp_path, array), "volume")
    want = np.clip(128 + 40 * (array - array.mean()) / array.std(), 0, 255)
    assert np.abs(view[:] - want).max() < 2


def test_downsample_mean_and_majority(tmp_path):
    array = random_volume((2, 7, 10)) // 20 * 60
    volume = open_array(tmp_path, array)
    volume.voxel_size = VOXEL
    padded = np.pad(array, ((0, 0), (0, 2), (0, 2)), mode="edge")
    for reduce in ("mean", "majority"):
        small = emseg.Downsampled(volume, 3, reduce)
        assert small.voxel_size == (VOXEL[0], VOXEL[1] * 3, VOXEL[2] * 3)
        want = np.zeros((2, 3, 4), np.uint8)
        for z, y, x in np.ndindex(want.shape):
            block = padded[z, 3 * y:3 * y + 3, 3 * x:3 * x + 3].astype(int)
            want[z, y, x] = (np.floor(block.mean() + 0.5) if reduce == "mean"
                             else np.bincount(block.ravel()).argmax())      # the lower at a tie
        np.testing.assert_array_equal(small[:], want)
        np.testing.assert_array_equal(small[1, 1:3, 2:4], want[1, 1:3, 2:4])
        white = open_array(tmp_path, np.full((1, 20, 30), 255, np.uint8), "white")
        assert (emseg.Downsampled(white, 17, reduce)[:] == 255).all()


@pytest.mark.parametrize("shape", [(9, 30, 11), (3, 8, 40), (1, 1, 1)])
def test_resize(tmp_path, shape):
    array = random_volume((5, 20, 17))
    volume = open_array(tmp_path, array)
    volume.voxel_size = VOXEL
    view, nearest = (emseg.Resized(volume, shape, linear) for linear in (True, False))
    assert view.voxel_size == pytest.approx([v * a / b for v, a, b in zip(VOXEL, array.shape,
                                                                          shape)])
    want = array.astype(np.float64)             # between voxel centres, one axis after the other
    for axis, (old, new) in enumerate(zip(array.shape, shape)):
        place = (np.arange(new) + 0.5) * old / new
        want = np.apply_along_axis(lambda line: np.interp(place, np.arange(old) + 0.5, line), axis,
                                   want)
    np.testing.assert_allclose(view[:], want, atol=0.501)               # rounded to whole numbers
    places = [((np.arange(new) + 0.5) * old / new).astype(int)
              for old, new in zip(array.shape, shape)]
    np.testing.assert_array_equal(nearest[:], array[np.ix_(*places)])
    box = tuple(slice(side // 3, side // 3 + (side + 1) // 2) for side in shape)
    for one in (view, nearest):
        np.testing.assert_array_equal(one[box], one[:][box])


def test_resized_labels_keep_their_annotated_slices(tmp_path):
    array = np.zeros((6, 4, 4), np.uint8)
    array[1] = 1
    volume = open_array(tmp_path, array)
    (label,), _ = emseg.open_labels([volume.path], [volume], label_slices="1,4")
    large, small = emseg.Resized(label, (12, 4, 4), False), emseg.Resized(label, (3, 4, 4), False)
    assert large.slices.tolist() == [2, 3, 8, 9]
    assert (large[2:4] == 1).all() and (large[0] == emseg.IGNORE).all()
    assert small.slices.tolist() == [0]             # of slices 1, 3, 5 the first is annotated
    assert emseg.Downsampled(large, 2, "majority").slices.tolist() == [2, 3, 8, 9]


# --- slices, labels ---

def test_parse_slices():
    def parse(text, depth=20):
        return emseg.parse_slices(text, depth).tolist()
    assert parse("0:165:5", 165) == list(range(0, 165, 5))
    assert parse("15, 3,4") == [3, 4, 15] and parse("0:3,7,1") == [0, 1, 2, 7]
    assert parse("::10") == [0, 10] and parse("18:") == [18, 19]
    assert parse("n=1", 9) == [4] and parse("n=3", 9) == [1, 4, 7]
    assert parse("every=5", 11) == [0, 5, 10] and parse(" every = 20 ", 11) == [0]
    assert parse("n=7", 165) == [round((i + 0.5) * 165 / 7 - 0.5) for i in range(7)]
    for text, message in (("0:21", "0 to 19"), ("20", "0 to 19"), ("3:3", "empty"),
                          ("n=21", "1 to 20"), ("", "understood"), ("-1", "understood"),
                          ("n=0", "understood"), ("a", "understood"), ("0:9:0", "understood"),
                          ("1,", "understood")):
        with pytest.raises(emseg.InputError, match=message):
            emseg.parse_slices(text, 20)


def test_parse_label_map():
    assert emseg.parse_label_map("191=1, 223=2,-1=255,*=0") == {191: 1, 223: 2, -1: 255, "*": 0}
    assert emseg.parse_label_map("128:131=1,-2:0=2, 5 : 6 = 0") == {
        128: 1, 129: 1, 130: 1, -2: 2, -1: 2, 5: 0}
    for text in ("", "1", "1=256", "a=1", "1=-1", "1.5=0", "9:1=0", "*:3=1"):
        with pytest.raises(emseg.InputError, match="label map"):
            emseg.parse_label_map(text)


def label_of(tmp_path, array, **options):
    label = open_array(tmp_path, np.asarray(array).reshape(2, 2, -1), "label")
    (labels,), n_classes = emseg.open_labels([label.path], [label], **options)
    return labels, n_classes


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.uint64])
@pytest.mark.parametrize("raw, options, want, n", [
    ([0, 99, 99, 0], {}, [0, 1, 1, 0], 2),
    ([0, 1, 2, 3], {}, [0, 1, 2, 3], 4),
    ([0, 7, 7, 7], {"classes": 2}, [0, 1, 1, 1], 2), ([0, -1, 0, -1], {}, [0, 1, 0, 1], 2),
    ([0, 1, 2, 0], {"classes": 5}, [0, 1, 2, 0], 5),
    ([0, 1, 99, 1], {"ignore_label": 99}, [0, 1, 255, 1], 2),
    ([5, 7, 9, 11], {"label_map": {7: 1, 9: 3, "*": 0}}, [0, 1, 3, 0], 4),
    ([5, 7, 9, 5], {"label_map": {7: 1, 9: 255, 5: 0}}, [0, 1, 255, 0], 2),
    ([5, 7, 9, 9], {"label_map": {7: 1, "*": 0}, "ignore_label": 9}, [0, 1, 255, 255], 2),
    ([-1, 300, 44, -256], {"label_map": {-1: 0, 300: 1, 44: 2, "*": 255}}, [0, 1, 2, 255], 3),
])
def test_label_rules(tmp_path, dtype, raw, options, want, n):
    if min(raw) < 0 and np.dtype(dtype).kind == "u":
        pytest.skip("no negative values")
    labels, n_classes = label_of(tmp_path, np.array(raw * 6).astype(dtype), **options)
    want = np.array(want * 6).reshape(2, 2, 6)
    assert n_classes == n and labels.dtype == np.uint8
    np.testing.assert_array_equal(labels[:], want)
    np.testing.assert_array_equal(labels[1, 0:1, 2:5], want[1, 0:1, 2:5])
    np.testing.assert_array_equal(
        labels.counts, [[(page == c).sum() for c in range(n)] for page in want])


@pytest.mark.parametrize("raw, options, match", [
    ([0, 3, 5, 0], {"classes": 2}, 'values 0, 3, 5: .*"0=0,.=1"'),
    ([0, 1, 3, 0], {"classes": 3}, "class ids 0 to 2"),
    ([0, 2, 0, 0], {"label_map": {0: 0, 2: 3}, "classes": 3}, "values 2 no class from 0 to 2"),
    ([0, 2, 4, 6], {"label_map": {0: 0, 2: 1}}, "values 4, 6 no class"),
    ([0, 0.5, 1, 0], {}, "not whole"), ([0, np.nan, 1, 0], {}, "not whole"),
    ([*range(400)], {}, '400 in all.*"0=0,.=1"'),               # instances
])
def test_label_errors(tmp_path, raw, options, match):
    with pytest.raises(emseg.InputError, match=match):
        label_of(tmp_path, np.array(raw * 2), **options)


def test_union_of_labels_decides_the_classes(tmp_path):
    a, b, c = (open_array(tmp_path, np.array([[values]], np.uint8), name) for name, values in
               (("a", [0, 0, 1, 1]), ("b", [0, 2, 2, 2]), ("c", [0, 200, 0, 0])))
    labels, n = emseg.open_labels([a.path, b.path], [a, b])
    assert n == 3 and labels[1][0, 0, 1] == 2
    with pytest.raises(emseg.InputError, match="0, 1, 200"):
        emseg.open_labels([a.path, c.path], [a, c])
    with pytest.raises(emseg.InputError, match=r"\(1, 1, 4\) do not fit.*\(6, 20, 30\)"):
        emseg.open_labels([a.path], [open_array(tmp_path, random_volume())])


def test_sparse_label_folder(tmp_path):
    images = random_volume((12, 8, 9))
    masks = (random_volume((3, 8, 9), seed=1) > 50).astype(np.uint8)
    folder = write_folder(tmp_path / "images", images, [f"im{z + 100}.png" for z in range(12)])
    label = write_folder(tmp_path / "labels", masks * 255, ["l102.png", "l105.png", "l110.png"])

    def paired(label, image, **options):
        return emseg.open_labels([label], [emseg.open_volume(image)], **options)[0][0]

    labels = paired(label, folder)
    assert labels.slices.tolist() == [2, 5, 10] and labels.shape == images.shape
    np.testing.assert_array_equal(labels[5], masks[1])
    assert (labels[3] == emseg.IGNORE).all() and labels.counts[3].sum() == 0
    # the crop of the image holds for its labels, unless they have their own or were drawn on it
    labels = paired(label, f"{folder}@4:12,2:6,1:8")
    assert labels.slices.tolist() == [1, 6] and labels.shape == (8, 4, 7)
    np.testing.assert_array_equal(labels[6], masks[2, 2:6, 1:8])
    drawn = write_folder(tmp_path / "drawn", masks[:, 1:7], ["102.png", "105.png", "110.png"])
    np.testing.assert_array_equal(paired(drawn, f"{folder}@0:8,1:7")[5], masks[1, 1:7])
    assert paired(label, folder, label_slices="5").slices.tolist() == [5]
    with pytest.raises(emseg.InputError, match=r"asks for z = 3 \(file 103\), which has no label"):
        paired(label, folder, label_slices="3:6")
    with pytest.raises(emseg.InputError, match="crop the volume alone"):
        paired(f"{label}@1:", folder)
    # a volume in one file: the number is z
    volume = open_array(tmp_path, images).path
    with pytest.raises(emseg.InputError, match="got 102, 105, 110$"):
        paired(label, volume)
    low = write_folder(tmp_path / "low", masks, ["0.png", "7.png", "11.png"])
    assert paired(low, volume).slices.tolist() == [0, 7, 11]
    with pytest.raises(emseg.InputError, match="got none$"):
        paired(write_folder(tmp_path / "u", masks, ["a.png", "b.png", "c.png"]), volume)


def test_used_slices_are_known_by_their_numbers_when_a_folder_grows(tmp_path):
    folder = write_folder(tmp_path / "em", random_volume((3, 8, 9)), ["10.png", "12.png", "13.png"])
    volume = emseg.open_volume(f"{folder}@1:")
    used = emseg.used_slices([emseg.Item(volume, None, label=type("", (), {"slices": [0]}))])
    write_png(folder / "11.png", random_volume((8, 9)))
    assert emseg.used_in(emseg.open_volume(folder), used) == [2]


# --- writing ---

@pytest.mark.parametrize("extension", ["tif", "mrc"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_written_volume_reads_back(tmp_path, extension, dtype):
    path, array = tmp_path / f"a.{extension}", random_volume(dtype=dtype)
    with emseg.create_volume(path, array.shape, dtype, VOXEL) as writer:
        writer[4:6] = array[4:]
        writer[0:4] = array[:4]
        with pytest.raises(ValueError, match="broadcast"):
            writer[0:1] = array[:2]
        assert not path.exists()
    volume = emseg.open_volume(path)
    np.testing.assert_array_equal(volume[:], array)
    assert volume.voxel_size == pytest.approx(VOXEL, rel=1e-6)
    assert os.listdir(tmp_path) == [path.name]


def test_bytes_of_mrc_and_probability_stack(tmp_path):
    array = random_volume()
    with emseg.create_volume(tmp_path / "a.mrc", array.shape, "uint8", max_value=99) as writer:
        writer[:] = array
    with mrcfile.open(tmp_path / "a.mrc") as mrc:
        assert mrc.header.mode == 0
        np.testing.assert_array_equal(mrc.data, array)
    prob = random_volume((3, 2, 5, 6), np.float32)
    with emseg.create_volume(tmp_path / "p.tif", prob.shape, np.float32, VOXEL) as writer:
        writer[:] = prob
    with emseg.create_volume(tmp_path / "a.tif", (2, 3, 4), np.uint8, VOXEL, max_value=3):
        pass                                            # what Fiji shows as white, else it is black
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        assert tif.imagej_metadata["min"] == 0 and tif.imagej_metadata["max"] == 3
    with tifffile.TiffFile(tmp_path / "p.tif") as tif:
        assert tif.series[0].axes == "ZCYX" and tif.imagej_metadata["unit"] == "nm"
        np.testing.assert_array_equal(tif.asarray(), prob)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("name, full, error, match", [
    ("a.tif", False, RuntimeError, "in the block"), ("no/a.tif", False, OSError, "no/.a.tif.tmp"),
    ("a.tif", True, OSError, "[Nn]o space")])
def test_where_writing_fails_nothing_is_left(tmp_path, name, full, error, match):
    with pytest.raises(error, match=match):
        with emseg.create_volume(tmp_path / name, (2, 5, 6), np.uint8) as writer:
            writer.stream = open("/dev/full", "r+b") if full else writer.stream
            writer[0:2] = np.zeros((2, 5, 6), np.uint8)
            raise RuntimeError("in the block")
    assert os.listdir(tmp_path) == []


# --- real files ---

def read_by_library(path):
    """What mrcfile or tifffile makes of a file, its axes in the order (Z, Y, X)."""
    if path.suffix[:4] == ".tif":
        return tifffile.imread(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with mrcfile.open(path, permissive=True) as mrc:
            axes = [int(mrc.header[name]) for name in ("maps", "mapr", "mapc")]
            want = mrc.data.reshape((-1, *mrc.data.shape[-2:]))
    return want.transpose([axes.index(a) for a in (3, 2, 1)]) if sorted(axes) == [1, 2, 3] else want


@pytest.mark.parametrize("folder, least", [("mrc", 13), ("tiff", 50)])
def test_real_files_are_read_as_the_library_reads_them_or_refused(real_data, folder, least):
    compared = 0
    for path in sorted(p for p in (real_data / folder).rglob("*.[!p]*") if p.is_file()):
        try:
            array = emseg.open_volume(path)[:]
        except emseg.InputError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            continue
        np.testing.assert_array_equal(array, read_by_library(path).reshape(array.shape), str(path))
        compared += 1
    assert compared >= least


def test_real_labels(real_data):
    vnc = emseg.open_volume(real_data / "vnc" / "raw")
    with pytest.raises(emseg.InputError, match=r"0, 32, 64, 96, 128, 159, 191, 223, 255"):
        emseg.open_labels([real_data / "vnc" / "labels"], [vnc])
    (labels,), n = emseg.open_labels([real_data / "vnc" / "labels"], [vnc],
                                     label_map=emseg.parse_label_map("191=1,223=2,*=0"))
    assert n == 3 and labels.counts.sum() == vnc[:].size
    # 19 slices of 1 bit and one of 8 bits: foreground is 255 in all
    assert emseg.open_labels([real_data / "vnc" / "membranes"], [vnc])[1] == 2


def test_a_label_takes_the_crop_of_its_volume_and_no_other(tmp_path):
    array = random_volume()
    np.save(tmp_path / "image.npy", array)
    np.save(tmp_path / "label.npy", (array > 3).astype(np.uint8))
    volume = emseg.open_volume(f"{tmp_path}/image.npy@2:5,:,4:")
    for path in f"{tmp_path}/label.npy", f"{tmp_path}/label.npy@2:5,:,4:":
        (label,), _ = emseg.open_labels([path], [volume])
        np.testing.assert_array_equal(label[:], (array > 3)[2:5, :, 4:])
    with pytest.raises(emseg.InputError, match="cropped elsewhere"):
        emseg.open_labels([f"{tmp_path}/label.npy@1:4,:,4:"], [volume])
    np.save(tmp_path / "drawn.npy", (array > 3).astype(np.uint8)[:, :, 4:])     # on the crop in x
    (label,), _ = emseg.open_labels([tmp_path / "drawn.npy"], [volume])
    np.testing.assert_array_equal(label[:], (array > 3)[2:5, :, 4:])
    np.save(tmp_path / "piece.npy", array[2:5, :, 4:])          # a crop of the label is as large
    (label,), _ = emseg.open_labels([f"{tmp_path}/label.npy@2:5,:,4:"],
                                    [emseg.open_volume(tmp_path / "piece.npy")])
    np.testing.assert_array_equal(label[:], (array > 3)[2:5, :, 4:])


def test_own_mrc_files_say_how_bytes_are_signed(tmp_path):
    for name, most, wanted in ("image.mrc", None, (-128, 127)), ("label.mrc", 3, (0, 3)):
        with emseg.create_volume(tmp_path / name, (2, 8, 9), np.int8, max_value=most) as writer:
            writer[:] = np.full((2, 8, 9), -5 if most is None else 1)
        assert emseg.open_volume(tmp_path / name).note is None
        with mrcfile.open(tmp_path / name, header_only=True) as mrc:
            assert (mrc.header.dmin, mrc.header.dmax) == wanted


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
    assert tracemalloc.get_traced_memory()[1] < 60e6
    tracemalloc.stop()
    assert volume.shape == shape and volume.voxel_size == pytest.approx(VOXEL, rel=1e-6)
