"""Hostile and broken input, given to the scripts as a user would: one line on stderr, status 2, no
traceback, nothing written, no code run. And what only looks odd, which must be read right."""

import bz2
import functools
import gzip
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
import zlib
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import tifffile
import torch

import emseg
import evaluate
import train_2d3d
import train_cps
import train_partial
import train_seget
import train_sparse
from conftest import mrc_by_hand, run

TRAINING = (train_cps, train_partial, train_seget, train_2d3d, train_sparse)

# A run of each script that is whole: what a row adds, spoils it.
ANY = ("--volume image.tif --label label.tif --label-slices 0,2,4 --model unet --width 4 "
       "--patch-size 16 16 --batch-size 4 --epochs 1 --steps-per-epoch 1 --device cpu "
       "--out-dir out ")
WHOLE = {train_cps: ANY + "--downsample 1 --cps-warmup 0 1", train_partial: ANY, train_seget: ANY,
         train_2d3d: ANY + "--model unet3d-thin --width 2 --patch-size 3 32 32 --spacing 2 16 16 "
                           "--elastic 2",
         train_sparse: ANY + "--context 3 --scm-epochs 1",
         evaluate: "--prediction label.tif --label label.tif --out-dir out"}
RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (6, 40, 48), np.uint8)
LABEL = np.zeros_like(IMAGE)
LABEL[:, 8:30, 10:40] = 1


# -- how a row is given to the scripts: [(script, what it adds to the run of a script), ...]


def arguments(text, *scripts):
    """Arguments of all five training scripts, or of these."""
    return [(script, shlex.split(text)) for script in scripts or TRAINING]


def volume(path):
    """A volume, through every flag that takes one."""
    return [*arguments(f"--volume '{path}'"), *arguments(f"--test-volume '{path}'"),
            *arguments(f"--val-volume '{path}' --val-label label.tif"),
            *arguments(f"--unlabeled-volume '{path}'", train_cps, train_sparse),
            *arguments(f"--partial '{path}' label.tif 2=1 --classes a b c", train_partial),
            *arguments(f"--weights '{path}'", train_2d3d),
            *arguments(f"--prediction '{path}'", evaluate),
            *arguments(f"--volume '{path}'", evaluate)]


def label(path):
    """A label, through every flag that takes one."""
    return [*arguments(f"--label '{path}'"), *arguments(f"--label '{path}'", evaluate),
            *arguments(f"--label 'name={path}'", train_seget),
            *arguments(f"--val-volume image.tif --val-label '{path}'"),
            *arguments(f"--test-volume image.tif --test-label '{path}'"),
            *arguments(f"--partial image.tif '{path}' 2=1 --classes a b c", train_partial)]


def checkpoint(path, *scripts, more=""):
    """A checkpoint of these scripts, to predict with; of all five where none is named."""
    given = f"--checkpoint '{path}' --test-volume image.tif --device cpu --out-dir out {more}"
    return [(script, [NOTHING, *each]) for script, each in arguments(given, *scripts)]


NOTHING = "nothing else than:"      # in place of the run of a script


# -- what rows are made of; all of it in the working folder


def save(name, array, **options):
    """Write an array as its name says; options of tifffile, or {offset: bytes} of an MRC header."""
    if name.endswith(".npy"):
        np.save(name, array, **options)
    elif name.endswith(".mrc"):
        with mrcfile.new(name, array.view(np.int8) if array.dtype == np.uint8 else array):
            pass
        for offset, data in options.get("header", {}).items():
            spoil(name, offset, data)
    else:
        tifffile.imwrite(name, array, **{"photometric": "minisblack", **options})


def write(name, content):
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)


def spoil(name, offset, data):
    """Overwrite some bytes of a file."""
    with open(name, "r+b") as file:
        file.seek(offset)
        file.write(data)


def cut(name, kept):
    """Keep only some bytes of a file."""
    write(name, Path(name).read_bytes()[:kept])


def tagged(name, array, tags, **options):
    """A TIFF file whose first page has other tags than it should."""
    save(name, array, **options)
    with tifffile.TiffFile(name, mode="r+") as tif:
        for tag, value in tags.items():
            tif.pages[0].tags[tag].overwrite(value)


def pages(name, *arrays):
    """A TIFF file of pages that need not be alike."""
    with tifffile.TiffWriter(name) as tif:
        for array in arrays:
            tif.write(array, photometric="minisblack")


def circle(name):
    """A TIFF file whose last page is followed by its first."""
    save(name, IMAGE[0])
    with tifffile.TiffFile(name) as tif:
        start, tags = tif.pages[0].offset, len(tif.pages[0].tags)
    spoil(name, start + 2 + 12 * tags, struct.pack("<I", start))


def png(name, image, colour=0, sides=None):
    """A PNG file, grey (0) or colour (2), whose header may declare other sides (X, Y)."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(
            ">I", zlib.crc32(kind + data))
    X, Y = sides or (image.shape[1], image.shape[0])
    rows = b"".join(b"\0" + row.tobytes() for row in np.ascontiguousarray(image))
    write(name, b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", X, Y, 8, colour, 0,
                                                                  0, 0))
          + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def npy_header(name, text, stored=500):
    """An NPY file of version 1.0 with this header and some bytes."""
    text = text.encode().ljust(118) + b"\n"
    write(name, b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + bytes(stored))


def folder(name, make=None, slices=6, ending="png"):
    """A folder of slices; make: spoils it, called with the path of the last one."""
    os.mkdir(name)
    for z in range(slices):
        (png if ending == "png" else save)(f"{name}/{z}.{ending}", IMAGE[z])
    if make:
        os.remove(f"{name}/{slices - 1}.{ending}")
        make(f"{name}/{slices - 1}.{ending}")


def masks(name, *numbers):
    """A folder of label slices with these numbers in their names."""
    os.mkdir(name)
    for number, mask in zip(numbers, LABEL):
        png(f"{name}/{number}.png", mask)


def ome(name, **sides):
    """An OME-TIFF file that declares other sides than it has."""
    save("good.ome.tif", IMAGE, ome=True, metadata={"axes": "ZYX"})
    with tifffile.TiffFile("good.ome.tif") as tif:
        text = tif.ome_metadata
    for side, size in sides.items():
        text = re.sub(f'{side}="[0-9]+"', f'{side}="{size}"', text)
    save(name, IMAGE, description=text.encode(), metadata=None)


class Malicious:
    """Unpickled, it makes the folder `pwned`."""

    def __reduce__(self):
        return os.mkdir, ("pwned",)


def malicious_npy(name):
    np.save(name, np.array([[[Malicious()]]], object), allow_pickle=True)


def malicious_torch(name):
    torch.save({"script": "train_cps.py", "args": Malicious()}, name)


def malicious_torch_legacy(name):
    torch.save({"script": "train_cps.py", "args": Malicious()}, name,
               _use_new_zipfile_serialization=False)


def malicious_pickle(name):
    with open(name, "wb") as file:
        pickle.dump({"script": "train_cps.py", "args": Malicious()}, file)


def malicious_system(name):
    """A torch archive made by hand, whose data.pkl calls os.system."""
    program = b"cposix\nsystem\n(S'mkdir pwned'\ntR."
    with zipfile.ZipFile(name, "w") as archive:
        for inside, content in (("data.pkl", program), ("version", b"3\n"), ("byteorder",
                                                                             b"little")):
            archive.writestr(f"archive/{inside}", content)


MALICIOUS = {"bad.npy": malicious_npy, "torch.pt": malicious_torch,
             "legacy.pt": malicious_torch_legacy, "pickle.pt": malicious_pickle,
             "system.pt": malicious_system}


def trained(change, name="bad.pt"):
    """The checkpoint good.pt of train_cps.py, changed."""
    content = torch.load("good.pt", weights_only=True)
    torch.save(change(content) or content, name)


def with_entry(value, *keys):
    """The checkpoint good.pt with one entry of another value; None: without it."""
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value
        if value is None:
            del content[keys[-1]]
    trained(change)


def storage_of(gigabytes):
    """A checkpoint one of whose tensors claims to be far larger than the file."""
    trained(lambda content: None, "small.pt")
    with zipfile.ZipFile("small.pt") as old, zipfile.ZipFile("bad.pt", "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("data.pkl"):       # of the first weights, 36 floats in 4 x 1 x 3 x 3
                data = data.replace(b"K$", b"J" + struct.pack("<i", gigabytes * 2**28), 1)
            new.writestr(name, data)


BELOW_A_FILE, HUGE = "image.tif/out", "9" * 5000

# (name, what makes the input in the working folder, how it is given, what the line must say)
ROWS = [
    # -- no volume at all
    ("missing file", None, volume("no.tif"), r"no\.tif: no such file"),
    ("missing folder", None, volume("no/such/em.mrc"), r"no such file or folder"),
    ("missing file with a crop", None, volume("no.tif@0:3"), r"no\.tif@0:3: no such file"),
    ("name too long", None, volume("x" * 300 + ".tif"), "no such file"),
    ("empty name", None, arguments("--volume ''"), "--volume|: no such file"),
    ("dangling link", lambda: os.symlink("nowhere", "bad.tif"), volume("bad.tif"), "no such file"),
    ("empty TIFF", lambda: write("bad.tif", b""), volume("bad.tif"), "the file is empty"),
    ("empty MRC", lambda: write("bad.mrc", b""), volume("bad.mrc"), "the file is empty"),
    ("a pipe", lambda: os.mkfifo("bad.tif"), volume("bad.tif"), "the file is empty"),
    ("a device", None, volume("/dev/zero"), "the file is empty"),
    ("text named TIFF", lambda: write("bad.tif", "no image" * 99), volume("bad.tif"),
     "not a TIFF file"),
    ("text named MRC", lambda: write("bad.mrc", "no image" * 999), volume("bad.mrc"),
     "MRC mode [0-9]+ cannot be read"),
    ("text named NPY", lambda: write("bad.npy", "no image" * 99), volume("bad.npy"),
     "it is no NPY file"),
    ("text named PNG", lambda: write("bad.png", "no image" * 99), volume("bad.png"),
     "not a PNG file"),
    ("PNG named TIFF", lambda: png("bad.tif", IMAGE[0]), volume("bad.tif"), "not a TIFF file"),
    ("TIFF named NPY", lambda: (save("a.tif", IMAGE), os.rename("a.tif", "bad.npy")),
     volume("bad.npy"), "it is no NPY file"),
    ("JPEG", lambda: write("bad.jpg", b"\xff\xd8\xff"), volume("bad.jpg"), r"type '\.jpg'; wanted"),
    ("no extension", lambda: write("bad", b"x"), volume("bad"), "type ''; wanted"),
    ("gzip", lambda: write("bad.mrc.gz", gzip.compress(bytes(9))), volume("bad.mrc.gz"),
     "decompress it first"),
    ("gzip named MRC", lambda: write("bad.mrc", gzip.compress(bytes(9999))), volume("bad.mrc"),
     "decompress it first"),
    ("bzip2 named MRC", lambda: write("bad.map", bz2.compress(bytes(9999))), volume("bad.map"),
     "decompress it first"),

    # -- TIFF
    ("TIFF of a few bytes", lambda: write("bad.tif", b"II*\0"), volume("bad.tif"), "not readable"),
    ("TIFF cut", lambda: (save("bad.tif", IMAGE), cut("bad.tif", 7000)), volume("bad.tif"),
     "truncated"),
    ("ImageJ TIFF cut", lambda: (save("bad.tif", IMAGE, imagej=True), cut("bad.tif", 7000)),
     volume("bad.tif"), "truncated|pages breaks off"),
    ("compressed TIFF cut", lambda: (save("bad.tif", IMAGE, compression="zlib"),
                                     cut("bad.tif", 7000)), volume("bad.tif"), "truncated"),
    ("TIFF declares too much", lambda: tagged(
        "bad.tif", IMAGE[0], {"ImageWidth": 60000, "ImageLength": 60000, "RowsPerStrip": 60000}),
     volume("bad.tif"), "truncated|hostile"),
    ("TIFF bomb", lambda: tagged(
        "bad.tif", IMAGE[0], {"ImageWidth": 60000, "ImageLength": 60000, "RowsPerStrip": 60000},
        compression="zlib"), volume("bad.tif"), "hostile, slice 0 declares"),
    ("OME declares too much", lambda: ome("bad.tif", SizeZ=999999999), volume("bad.tif"),
     "damaged or hostile, its OME header declares 999,999,999 pages"),
    ("TIFF in a circle", lambda: circle("bad.tif"), volume("bad.tif"), "pages breaks off"),
    ("Zstandard without codec", lambda: tagged("bad.tif", IMAGE, {"Compression": 50000},
                                               compression="zlib"), volume("bad.tif"),
     "compression ZSTD of 8 bits needs a codec"),
    ("JPEG without codec", lambda: tagged("bad.tif", IMAGE, {"Compression": 7},
                                          compression="zlib"), volume("bad.tif"),
     "compression JPEG of 8 bits needs a codec"),
    ("unknown compression", lambda: tagged("bad.tif", IMAGE, {"Compression": 12345},
                                           compression="zlib"), volume("bad.tif"), "12345"),
    ("colour TIFF", lambda: save("bad.tif", np.stack([IMAGE] * 3, -1), photometric="rgb"),
     volume("bad.tif"), "colour image"),
    ("two channels", lambda: save("bad.tif", np.stack([IMAGE] * 2, 1), imagej=True),
     volume("bad.tif"), "2 channels"),
    ("time series of stacks", lambda: save("bad.tif", np.stack([IMAGE] * 2), imagej=True,
                                           metadata={"axes": "TZYX"}), volume("bad.tif"),
     "wanted one stack"),
    ("pages of two sizes", lambda: pages("bad.tif", IMAGE[0], IMAGE[1, :9]), volume("bad.tif"),
     "2 images of different sizes"),
    ("pages of two types", lambda: pages("bad.tif", IMAGE[0], IMAGE[1].astype(np.uint16)),
     volume("bad.tif"), "2 images of different sizes or types"),
    ("complex TIFF", lambda: save("bad.tif", IMAGE.astype(np.complex64)), volume("bad.tif"),
     "type complex64 cannot be read"),

    # -- MRC
    ("half an MRC header", lambda: (save("bad.mrc", IMAGE), cut("bad.mrc", 500)),
     volume("bad.mrc"), "not readable"),
    ("MRC cut", lambda: (save("bad.mrc", IMAGE), cut("bad.mrc", 9000)), volume("bad.mrc"),
     r"truncated, its header declares \(6, 40, 48\)"),
    ("MRC declares too much", lambda: save(
        "bad.mrc", IMAGE, header={0: struct.pack("<iii", *[2**31 - 1] * 3)}), volume("bad.mrc"),
     "truncated, its header declares"),
    ("MRC of a negative side", lambda: save("bad.mrc", IMAGE, header={4: struct.pack("<i", -40)}),
     volume("bad.mrc"), r"damaged header, it declares a volume of shape \(6, -40, 48\)"),
    ("MRC without voxels", lambda: save("bad.mrc", IMAGE, header={8: bytes(4)}), volume("bad.mrc"),
     "damaged header"),
    ("MRC with an endless extended header", lambda: save(
        "bad.mrc", IMAGE, header={92: struct.pack("<i", 2**31 - 1)}), volume("bad.mrc"),
     "truncated"),
    ("MRC with a negative extended header", lambda: save(
        "bad.mrc", IMAGE, header={92: struct.pack("<i", -1024)}), volume("bad.mrc"),
     "extended header of -1024 bytes"),
    ("complex MRC", lambda: save("bad.mrc", IMAGE.astype(np.complex64)), volume("bad.mrc"),
     "MRC mode 4 cannot be read"),
    ("MRC of 4 bits", lambda: save("bad.mrc", IMAGE, header={12: struct.pack("<i", 101)}),
     volume("bad.mrc"), "MRC mode 101 cannot be read"),

    # -- NPY
    ("NPY cut", lambda: (save("bad.npy", IMAGE), cut("bad.npy", 9000)), volume("bad.npy"),
     "not readable"),
    ("NPY declares too much", lambda: npy_header(
        "bad.npy", "{'descr': '|u1', 'fortran_order': False, 'shape': (2**9, 9, 9)}".replace(
            "2**9", "9" * 18)), volume("bad.npy"), "not readable"),
    ("NPY of a negative side", lambda: npy_header(
        "bad.npy", "{'descr': '|u1', 'fortran_order': False, 'shape': (-3, 4, 5)}"),
     volume("bad.npy"), "not readable"),
    ("NPY header of 4 GiB", lambda: write("bad.npy", b"\x93NUMPY\2\0" + b"\xff" * 99),
     volume("bad.npy"), "not readable"),
    ("NPY of a call", lambda: npy_header("bad.npy", "{'descr': __import__('os').mkdir('pwned'), "
                                                    "'fortran_order': False, 'shape': (3, 4)}"),
     volume("bad.npy"), "not readable"),
    ("NPY of pickles", lambda: malicious_npy("bad.npy"), volume("bad.npy"), "Python objects"),
    ("NPY of one axis", lambda: save("bad.npy", IMAGE.ravel()), volume("bad.npy"),
     r"array of shape \(11520,\); wanted \(Z, Y, X\)"),
    ("NPY of four axes", lambda: save("bad.npy", IMAGE[None]), volume("bad.npy"),
     r"array of shape \(1, 6, 40, 48\); wanted"),
    ("NPY without voxels", lambda: save("bad.npy", IMAGE[:0]), volume("bad.npy"), "damaged header"),
    ("NPY of text", lambda: save("bad.npy", IMAGE.astype(str)), volume("bad.npy"),
     "type <U3 cannot be read"),
    ("NPZ named NPY", lambda: (np.savez("a.npz", IMAGE), os.rename("a.npz", "bad.npy")),
     volume("bad.npy"), "it is no NPY file"),

    # -- PNG and folders
    ("PNG cut", lambda: (png("bad.png", IMAGE[0]), cut("bad.png", 500)), volume("bad.png"),
     "slice 0 is damaged"),
    ("PNG declares too much", lambda: png("bad.png", IMAGE[0], sides=(10**5, 10**5)),
     volume("bad.png"), "hostile, declares 100000 x 100000 pixels"),
    ("colour PNG", lambda: png("bad.png", np.stack([IMAGE[0], IMAGE[1], IMAGE[2]], -1), colour=2),
     volume("bad.png"), "colour image"),
    ("empty folder", lambda: os.mkdir("bad"), volume("bad"), "no .tif, .tiff or .png slices"),
    ("slices of two sizes", lambda: folder("bad", lambda path: png(path, IMAGE[0, :9])),
     volume("bad"), r"5\.png is \(9, 48\) uint8 but 0\.png is \(40, 48\)"),
    ("TIFF among PNG", lambda: folder("bad", lambda path: save(path[:-3] + "tif", IMAGE[0])),
     volume("bad"), "mixes TIFF and PNG"),
    ("text among slices", lambda: folder("bad", lambda path: write(path, "no image"), ending="tif"),
     volume("bad"), r"bad/5\.tif: not readable"),
    ("a stack among slices", lambda: folder("bad", lambda path: save(path, IMAGE), ending="tif"),
     volume("bad"), r"bad/5\.tif: 6 pages; wanted one slice"),
    ("a folder among slices", lambda: folder("bad", os.mkdir), volume("bad"),
     r"bad: 5\.png is no file"),
    ("a pipe among slices", lambda: folder("bad", os.mkfifo), volume("bad"),
     r"bad: 5\.png is no file"),

    # -- grey values, crops
    ("NaN", lambda: save("bad.tif", np.where(IMAGE > 250, np.nan, IMAGE).astype(np.float32)),
     volume("bad.tif"), "slice 0 holds (NaN or infinite values|values that are not whole)|"
                        "weights must be numbers"),
    ("infinity", lambda: save("bad.npy", np.where(IMAGE > 250, np.inf, IMAGE)), volume("bad.npy"),
     "slice 0 holds (NaN or infinite values|values that are not whole)|weights must be numbers"),
    ("NaN in a slice that no sample holds",
     lambda: save("bad.tif", np.where(np.arange(50)[:, None, None] == 33, np.nan, IMAGE[[0] * 50])
                  .astype(np.float32)),
     [*arguments("--test-volume bad.tif"),
      *arguments("--unlabeled-volume bad.tif", train_cps, train_sparse)],
     "slice 33 holds NaN or infinite values"),
    ("values whose span is infinite", lambda: save("bad.npy", (IMAGE / 127.5 - 1) * 1.2e308),
     arguments("--volume bad.npy"), "slice 0 holds values beyond 1e300"),
    ("crop beyond the file", None, volume("image.tif@0:7"), "z runs over 0:6"),
    ("crop that is empty", None, volume("image.tif@:,9:9"), "crop 9:9 along y is empty"),
    ("crop that is reversed", None, volume("image.tif@5:2"), "crop 5:2 along z is empty"),
    ("crop of words", None, volume("image.tif@a:b"), "crop 'a:b' along z is not understood"),
    ("crop of four axes", None, volume("image.tif@1,2,3,4"), "at most three axes"),
    ("crop of 5000 digits", None, volume(f"image.tif@{HUGE}"), "is not understood"),

    # -- labels
    ("label missing", None, label("no.tif"), r"no\.tif: no such file"),
    ("label of another shape", lambda: save("bad.tif", LABEL[:5]), label("bad.tif"),
     r"labels of shape \(5, 40, 48\) do not fit \S+ of shape \(6, 40, 48\)"),
    ("label with its axes turned", lambda: save("bad.npy", LABEL.transpose(2, 1, 0)),
     label("bad.npy"), "axes of one of them are in another order"),
    ("label of fractions", lambda: save("bad.npy", LABEL / 2), label("bad.npy"),
     "not whole numbers"),
    ("label of NaN", lambda: save("bad.npy", np.where(LABEL, np.nan, 0)), label("bad.npy"),
     "not whole numbers"),
    ("label with gaps", lambda: save("bad.npy", LABEL * 3 + (IMAGE > 200)), label("bad.npy"),
     'values 0, 1, 3, 4: .*--label-map="0=0,'),
    ("label of negative values", lambda: save("bad.npy", -LABEL.astype(np.int8)), label("bad.npy"),
     'values -1, 0: .*--label-map="0=0,'),
    ("label of instances", lambda: save("bad.npy", np.arange(11520).reshape(LABEL.shape)),
     label("bad.npy"), "[0-9]+ different label values; looks like instance ids"),
    ("label beyond 2^63", lambda: save("bad.npy", LABEL * np.uint64(2**64 - 1)), label("bad.npy"),
     r"values beyond 2\^63"),
    ("label of 1e30", lambda: save("bad.npy", LABEL * np.float32(1e30)), label("bad.npy"),
     r"values beyond 2\^63"),
    ("label in colour", lambda: save("bad.tif", np.stack([LABEL] * 3, -1), photometric="rgb"),
     label("bad.tif"), "colour image"),
    ("labels without foreground", lambda: save("bad.npy", LABEL * 0), arguments("--label bad.npy"),
     r"no foreground, all voxels are background or ignored \(values 0\)"),
    ("labels ignored altogether", lambda: save("bad.npy", LABEL * 0 + 9),
     [*arguments("--label bad.npy --ignore-label 9"),
      *arguments("--label bad.npy --ignore-label 9", evaluate)],
     r"(values none left\)|every voxel is ignored)"),
    ("label slices of other numbers", lambda: masks("bad", 0, 77), label("bad"),
     "label slice with number 77 matches no slice"),
    ("label slices without numbers", lambda: masks("bad", "a", "b"), label("bad"),
     "paired by the numbers in their names"),
    ("one label for two volumes", None, arguments("--volume image.tif image.tif"),
     "--volume has 2 and --label 1 paths"),
    ("test labels without test volumes", None, arguments("--test-label label.tif"),
     "--test-volume has 0 and --test-label 1 paths"),

    # -- slices and values of labels
    ("label slice out of range", None, arguments("--label-slices 0,6"),
     "--label-slices.* '6' is empty or outside the volume"),
    ("label slices of words", None, arguments("--label-slices first"),
     "--label-slices.* 'first' is not understood"),
    ("label slice twice", None, arguments("--label-slices 0:3,2"), "--label-slices.* 2 is named "),
    ("label slices of 5000 digits", None, arguments(f"--label-slices n={HUGE}"),
     "--label-slices.* not understood"),
    ("validation slice without label", None, arguments("--val-slices 1"),
     r"--val-slices 1: slice 1 of label\.tif is not annotated"),
    ("no slice left to train on", None, arguments("--val-slices n=3"), "no slice is left to train"),
    ("label map that says nothing", None, arguments("--label-map 1"), "label map '1': .*wanted"),
    ("label map that maps twice", None, arguments("--label-map 0=0,1=1,1=0"), "1 is mapped twice"),
    ("label map with a gap", None, arguments("--label-map 0=0"),
     r"label\.tif: label values 1 are not in the label map"),
    ("label map to class 256", None, arguments("--label-map 0=0,1=256"), "classes 0 to 254"),
    ("label map of an endless range", None, arguments(f"--label-map 0:{'9' * 18}=1"), "label map"),
    ("label map of 5000 digits", None, arguments(f"--label-map {HUGE}=1"), "label map"),
    ("label to ignore is no number", None, arguments("--ignore-label none"), "--ignore-label"),
    ("one class", None, arguments("--classes background"), "--classes needs two names"),
    ("too many classes", None, arguments("--classes " + " ".join(f"c{i}" for i in range(256))),
     "--classes: 256 names, .* 255"),

    # -- numbers that make no sense
    ("patch larger than the volume", None,
     [*arguments("--patch-size 64 64", train_cps, train_partial, train_seget, train_sparse),
      *arguments("--patch-size 3 64 64", train_2d3d)], "do not fit into .*--patch-size"),
    ("patch of one pixel", None, arguments("--patch-size 1 1"), "--patch-size 1 x 1: unet"),
    ("patch of one side", None, arguments("--patch-size 16"), "--patch-size 16: unet.* takes "),
    ("patch of no size", None, arguments("--patch-size 0 16"), "--patch-size: 0 is not above 0"),
    ("width 0", None, arguments("--width 0"), "--width: 0 is not above 0"),
    ("width of words", None, arguments("--width wide"), "--width: invalid .* 'wide'"),
    ("width beyond all memory", None, arguments("--width 100000"), "--width 100000: out of memory"),
    ("width beyond all numbers", None, arguments("--width " + "9" * 400), "--width 9+: out of mem"),
    ("no epoch", None, arguments("--epochs 0"), "--epochs: 0 is not above 0"),
    ("half an epoch", None, arguments("--epochs 0.5"), "--epochs: invalid .* '0.5'"),
    ("endless epochs", None, arguments(f"--epochs {10**12}"), "--epochs 10+ is above 1000000"),
    ("endless steps", None, arguments(f"--steps-per-epoch {10**12}"),
     "--steps-per-epoch 10+ is above 10+"),
    ("endless batches", None, arguments(f"--batch-size {10**12}"), "--batch-size 10+ is above 10+"),
    ("batches beyond all memory", None, arguments("--batch-size 99999 --patch-size 16 512 512"),
     "--batch-size 99999 of --patch-size 16 x 512 x 512: more than 4,294,967,296 pixels"),
    ("rate 0", None, arguments("--lr 0"), "--lr: 0 is not above 0"),
    ("rate NaN", None, arguments("--lr nan"), "--lr: nan is not above 0"),
    ("rate 1e30", None, arguments("--lr 1e30"), r"--lr 1e\+30 is above 1000"),
    ("fewer workers than none", None, arguments("--workers -1"), "--workers -1 is negative"),
    ("ten thousand workers", None, arguments("--workers 10000"), "--workers 10000 is above 256"),
    ("negative seed", None, arguments("--seed -1"), "--seed -1 is not between"),
    ("seed of 40 digits", None, arguments("--seed " + "9" * 40), "--seed 9+ is not between"),
    ("downsampled to less than a pixel", None, arguments("--downsample 49"),
     r"--downsample 49: image\.tif has slices of 40 x 48 pixels"),
    ("downsampled to nothing", None, arguments(f"--downsample {10**12}"), "--downsample 10+: im"),
    ("voxels of NaN", None, [*arguments("--voxel-size nan 1 1"),
                             *arguments("--voxel-size nan 1 1", evaluate)],
     "--voxel-size: nan is not above 0"),
    ("voxels of 1e-300 nm", None, [*arguments("--voxel-size 1 1 1e-300"),
                                   *arguments("--voxel-size 1 1 1e-300", evaluate)],
     "--voxel-size: 1e-300 is not between 0.005 and 10000"),
    ("two sides of a voxel", None, arguments("--voxel-size 1 1"), "--voxel-size: expected 3"),
    ("unknown network", None, arguments("--model vgg"), "--model: invalid choice: 'vgg'"),
    ("device that is not there", None, arguments("--device cuda:77"), "--device cuda:77: "),
    ("device that holds nothing", None, arguments("--device meta"), "--device meta: "),
    ("device of words", None, arguments("--device fast"), "--device fast: "),
    ("unknown flag", None, arguments("--fast"), "unrecognized arguments: --fast"),
    ("name that is not UTF-8", None, volume("em\udcff.tif"), r"'em\\udcff\.tif' is not UTF-8"),
    ("context beyond all memory", None, arguments("--context 99999", train_sparse),
     "--context 99999 is above 255"),
    ("endless erosions", None, arguments(f"--erosions {10**12}", train_sparse), "--erosions 10+"),
    ("endless warm-up", None, arguments("--cps-warmup 0 inf", train_cps), "--cps-warmup 0 inf: "),
    ("resized beyond all memory", None, arguments("--resize 4 99999 64", train_partial),
     "--resize: 99999 is not between 1 and 16384"),

    # -- the output folder
    ("output is a file", None, [*arguments("--out-dir image.tif"),
                                *arguments("--out-dir image.tif", evaluate)],
     r"--out-dir image\.tif is a file"),
    ("output beneath a file", None, [*arguments(f"--out-dir {BELOW_A_FILE}"),
                                     *arguments(f"--out-dir {BELOW_A_FILE}", evaluate)],
     f"--out-dir {BELOW_A_FILE}: Not a directory"),
    ("output of a demo beneath a file", None,
     [(script, [NOTHING, "--demo", "--out-dir", BELOW_A_FILE]) for script in TRAINING],
     f"Not a directory.*{BELOW_A_FILE}"),
    ("output where nobody may write", None, [*arguments("--out-dir /proc/nothing/out"),
                                             *arguments("--out-dir /proc/nothing/out", evaluate)],
     "--out-dir /proc/nothing/out: "),
    ("output with too long a name", None, [*arguments(f"--out-dir {'x' * 300}"),
                                           *arguments(f"--out-dir {'x' * 300}", evaluate)],
     "--out-dir x+: File name too long|File name too long: 'x+'"),
    ("output that holds something", lambda: (os.mkdir("out"), write("out/mine.txt", "x")),
     [*arguments(""), *arguments("", evaluate)], "--out-dir out is not empty"),
    ("nothing to resume", None, arguments("--resume"), "--resume: out/config.json is no config"),
    ("damaged run to resume", lambda: (os.mkdir("out"), write("out/config.json", '{"args": [3]}')),
     arguments("--resume"), "--resume: out/config.json is no config"),
    *[(f"damaged run of {script.__name__} to resume", lambda script=script: (
        os.mkdir("out"), write("out/config.json", json.dumps(
            {"args": {"spacing": "x", "downsample": "x"},
             "sha256": {"emseg.py": "", f"{script.__name__}.py": ""}}))),
       [(script, [NOTHING, "--resume", "--out-dir", "out"])],
       "out/config.json: damaged, or of another version, its --(downsample|spacing) is 'x'")
      for script in TRAINING],
    ("another script's run to resume", lambda: (os.mkdir("out"), write(
        "out/config.json", '{"args": {}, "sha256": {"emseg.py": "", "evaluate.py": ""}}')),
     arguments("--resume"), "--resume: out holds a run of evaluate.py, not of train_"),
    ("finished run without last.pt to resume", lambda: (os.mkdir("out"), write(
        "out/config.json", '{"args": {}, "sha256": {"train_cps.py": ""}}'),
        write("out/metrics.json", "{}")),
     [(train_cps, [NOTHING, "--resume", "--out-dir", "out"])],
     "--resume: out holds no last.pt; start with --overwrite"),

    # -- checkpoints
    ("checkpoint missing", None, checkpoint("no.pt"), r"no\.pt: no such checkpoint"),
    ("checkpoint empty", lambda: write("bad.pt", b""), checkpoint("bad.pt"), "damaged, or not"),
    ("checkpoint of text", lambda: write("bad.pt", "weights"), checkpoint("bad.pt"),
     "damaged, or not"),
    ("checkpoint is a folder", lambda: os.mkdir("bad.pt"), checkpoint("bad.pt"),
     r"bad\.pt: a folder; give the file best\.pt in it"),
    ("checkpoint is a pipe", lambda: os.mkfifo("bad.pt"), checkpoint("bad.pt"), "no file"),
    ("checkpoint cut", lambda: (shutil.copy("good.pt", "bad.pt"), cut("bad.pt", 9000)),
     checkpoint("bad.pt"), "damaged, or not"),
    ("checkpoint of another script", None,
     checkpoint("good.pt", train_partial, train_seget, train_2d3d, train_sparse),
     r"good\.pt: a checkpoint of train_cps\.py, not of train_"),
    ("checkpoint of an older version", lambda: with_entry(None, "seen"),
     checkpoint("bad.pt", train_cps), "a checkpoint of another version"),
    ("checkpoint is a list", lambda: trained(lambda content: [content]), checkpoint("bad.pt"),
     "not a checkpoint of emseg"),
    ("malicious checkpoint", lambda: malicious_torch("bad.pt"), checkpoint("bad.pt"),
     "safe to load"),
    ("malicious checkpoint, old format", lambda: malicious_torch_legacy("bad.pt"),
     checkpoint("bad.pt"), "safe to load"),
    ("malicious pickle", lambda: malicious_pickle("bad.pt"), checkpoint("bad.pt"), "safe to load"),
    ("malicious archive", lambda: malicious_system("bad.pt"), checkpoint("bad.pt"), "safe to load"),
    ("malicious part of an ensemble", lambda: malicious_torch("bad.pt"),
     [(train_2d3d, [NOTHING, "--ensemble", "bad.pt", "--test-volume", "image.tif"])],
     "safe to load"),
    ("checkpoint that declares too much", lambda: storage_of(4), checkpoint("bad.pt", train_cps),
     "damaged, or not"),
    ("checkpoint of another width", None, checkpoint("good.pt", train_cps, more="--width 8"),
     "--width cannot differ from the checkpoint's 4"),
    ("checkpoint of another network", None, checkpoint("good.pt", train_cps, more="--model unet5"),
     "--model cannot differ from the checkpoint's unet"),
    ("checkpoint of a network that is not known", lambda: with_entry("vgg", "args", "model"),
     checkpoint("bad.pt", train_cps), r"bad\.pt: damaged, .*its --model is 'vgg'"),
    ("checkpoint of a negative width", lambda: with_entry(-4, "args", "width"),
     checkpoint("bad.pt", train_cps), "its --width is '-4'"),
    ("checkpoint of an endless width", lambda: with_entry(10**9, "args", "width"),
     checkpoint("bad.pt", train_cps), "--width 1000000000: out of memory"),
    ("checkpoint without arguments", lambda: with_entry([], "args"),
     checkpoint("bad.pt", train_cps), "its 'args' makes no sense"),
    ("checkpoint of one class", lambda: with_entry(["all"], "classes"),
     checkpoint("bad.pt", train_cps), "its 'classes' makes no sense"),
    ("checkpoint without contrast", lambda: with_entry({"mean": 0.0, "std": 0.0}, "normalization"),
     checkpoint("bad.pt", train_cps), "its 'normalization' makes no sense"),
    ("checkpoint that has seen nonsense", lambda: with_entry([{"file": "x"}], "seen"),
     checkpoint("bad.pt", train_cps), "its 'seen' makes no sense"),
    ("checkpoint of texts as weights", lambda: with_entry("x", "modules", "network_a"),
     checkpoint("bad.pt", train_cps), "its 'modules' makes no sense"),
    ("checkpoint of broken parts", lambda: with_entry({"a": 3}, "parts"),
     checkpoint("bad.pt", train_cps), "of another version"),
    ("checkpoint without volumes", None,
     [(script, [NOTHING, "--checkpoint", "good.pt"]) for script in (train_cps,)],
     "--checkpoint needs --test-volume"),
]


@pytest.fixture(scope="module")
def good_checkpoint(tmp_path_factory):
    """The best.pt of a short run of train_cps.py."""
    folder = tmp_path_factory.mktemp("good")
    save(str(folder / "image.tif"), IMAGE)
    save(str(folder / "label.tif"), LABEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(train_cps, *shlex.split(WHOLE[train_cps]))
    return folder / "out" / "best.pt"


@pytest.fixture
def work(tmp_path, monkeypatch, good_checkpoint):
    """The working folder, with whole input that rows can spoil."""
    monkeypatch.chdir(tmp_path)
    save("image.tif", IMAGE)
    save("label.tif", LABEL)
    os.link(good_checkpoint, "good.pt")
    signal.alarm(60)                                    # a hang ends the tests
    yield tmp_path
    signal.alarm(0)


def listing(folder):
    """All that is in a folder: names, sizes, times of change."""
    return sorted((str(path.relative_to(folder)), path.lstat().st_size, path.lstat().st_mtime_ns)
                  for path in folder.rglob("*"))


def command_line(script, given):
    """The arguments of a script for a row: those of its whole run and what the row adds."""
    return given[1:] if given[:1] == [NOTHING] else [*shlex.split(WHOLE[script]), *given]


def check_refusal(line, script, given, message):
    """One line that comes from the script, says what it should, and names a file or flag."""
    assert line.startswith(f"{Path(script.__file__).name}: error: ") and "Traceback" not in line
    assert re.search(message, line), line
    words = [word.split("=")[-1] for word in given]
    assert any(word in line or ascii(word) in line for word in words), line


@pytest.mark.parametrize("make, attempts, message", [pytest.param(*row[1:], id=row[0])
                                                     for row in ROWS])
def test_bad_input_is_one_line_and_leaves_nothing(work, monkeypatch, capfd, caplog, make, attempts,
                                                  message):
    if make:
        make()
    before = listing(work)
    for script, given in attempts:
        given = command_line(script, given)
        monkeypatch.setattr(sys, "argv", [script.__file__, *given])
        with pytest.raises(SystemExit) as stopped, warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")             # a warning would be a line on stderr
            warnings.simplefilter("ignore", ResourceWarning)
            script.main(script.parse_args(given))
        out, err = capfd.readouterr()
        assert stopped.value.code == 2 and err.count("\n") == 1, err
        check_refusal(err, script, given, message)
        assert not warned and not caplog.records
        assert listing(work) == before, "something was written"
        assert "wrote" not in out


# Rows that a process of its own must refuse alike: what Python or a library prints besides shows.
OF_A_PROCESS = {"NaN": train_cps, "MRC declares too much": train_partial,
                "colour TIFF": train_seget, "rate 1e30": train_2d3d,
                "malicious archive": train_sparse, "label of 1e30": evaluate}


@pytest.mark.parametrize("name", OF_A_PROCESS)
def test_a_process_refuses_alike(work, name):
    script, (_, make, attempts, message) = OF_A_PROCESS[name], {row[0]: row for row in ROWS}[name]
    given = command_line(script, next(given for one, given in attempts if one is script))
    if make:
        make()
    before = listing(work)
    done = subprocess.run([sys.executable, script.__file__, *given], capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    check_refusal(done.stderr, script, given, message)
    assert listing(work) == before and "wrote" not in done.stdout


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("script", WHOLE)
def test_a_folder_that_nobody_may_write_to(work, capfd, script):
    os.mkdir("locked")
    os.chmod("locked", 0o500)
    before = listing(work)
    with pytest.raises(SystemExit) as stopped:
        run(script, *command_line(script, ["--out-dir", "locked/out"]))
    err = capfd.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1 and listing(work) == before
    assert "--out-dir locked/out: Permission denied" in err


def first_weights(content):
    """The name of the first weights of a checkpoint."""
    return next(iter(content["modules"]["network_a"]))


def lacking(content):
    del content["modules"]["network_a"][first_weights(content)]


def too_large(content):
    content["modules"]["network_a"][first_weights(content)] = torch.empty(1).expand(10**6, 10**6)


@pytest.mark.parametrize("change, message", [
    (lacking, "Missing key"), (too_large, "size mismatch"),
    (lambda content: content["modules"].clear(), "KeyError: 'network_a'"),
    (lambda content: content["classes"].append("more"), "size mismatch for head"),
    (lambda content: content["args"].update(width=8), "size mismatch"),
    (lambda content: content["args"].update(model="unet5"), "does not fit this network"),
])
def test_weights_of_another_network_leave_nothing(work, capfd, change, message):
    trained(change)
    before = listing(work)
    ((script, given),) = checkpoint("bad.pt", train_cps)
    with pytest.raises(SystemExit) as stopped:
        run(script, *command_line(script, given))
    err = capfd.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1
    assert re.search(f"bad.pt: does not fit this network .*{message}|bad.pt: {message}", err), err
    assert listing(work) == before


@pytest.mark.parametrize("name", MALICIOUS)
def test_malicious_files_are_dangerous_where_they_are_trusted(work, name):
    """What makes sure that the rows above would have shown it, had the code run."""
    MALICIOUS[name](name)
    if name == "bad.npy":
        np.load(name, allow_pickle=True)
    elif name == "pickle.pt":
        pickle.loads(Path(name).read_bytes())
    else:
        torch.load(name, weights_only=False)
    assert os.path.isdir("pwned")


OF_VOLUMES = [row for row in ROWS if row[2][0][1][:1] == ["--volume"] and len(row[2][0][1]) == 2]


@pytest.mark.parametrize("make, attempts", [pytest.param(*row[1:3], id=row[0])
                                            for row in OF_VOLUMES])
def test_nothing_is_allocated_that_a_header_claims(work, make, attempts):
    if make:
        make()
    tracemalloc.start()
    try:
        emseg.open_volume(attempts[0][1][-1])[:]
    except emseg.InputError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 3e6


# -- odd, but right


def numbers(*values, order="<"):
    return struct.pack(f"{order}{len(values)}{'f' if isinstance(values[0], float) else 'i'}",
                       *values)


GREY = {kind: (IMAGE.astype(int) - 100).astype(kind) if kind != "uint16" else IMAGE.astype(kind)
        for kind in ("int8", "int16", "float32", "uint16", "float16")}
odd = functools.partial(mrc_by_hand, "odd.mrc")
FOUR = (4.0, 4.0, 4.0)              # nm, from 40 angstrom
ODD = [
    ("axes permuted", lambda: odd(GREY["int16"], {64: numbers(3, 1, 2)}),
     GREY["int16"].transpose(2, 0, 1), FOUR),
    ("axes that make no sense", lambda: odd(GREY["int16"], {64: numbers(7, 7, 7)}),
     GREY["int16"], FOUR),
    ("byte-swapped", lambda: odd(GREY["float32"], order=">"), GREY["float32"], FOUR),
    *((f"stamp of {kind} lies, {order}", lambda kind=kind, order=order: odd(
        GREY[kind], order=order, stamp={"<": ">", ">": "<"}[order]), GREY[kind], FOUR)
      for kind in GREY for order in "<>"),
    ("no stamp", lambda: odd(GREY["int8"], {208: bytes(8)}), GREY["int8"], FOUR),
    ("stamp of nonsense", lambda: odd(GREY["int16"], {212: b"abcd"}), GREY["int16"], FOUR),
    ("unsigned bytes of IMOD", lambda: odd(GREY["int8"], {152: numbers(1146047817, 0)}),
     GREY["int8"].view(np.uint8), FOUR),
    ("negative voxels", lambda: odd(GREY["int8"], {40: numbers(-9.0)}), GREY["int8"], None),
    ("negative intervals", lambda: odd(GREY["int8"], {28: numbers(-48)}), GREY["int8"], None),
    ("voxels of nothing", lambda: odd(GREY["int8"], {40: bytes(12)}), GREY["int8"], None),
    ("voxels of NaN", lambda: odd(GREY["int8"], {40: numbers(float("nan"))}), GREY["int8"],
     None),
    ("voxels of kilometres", lambda: odd(GREY["int8"], {40: numbers(1e30)}), GREY["int8"],
     None),
]


@pytest.mark.parametrize("make, want, voxel_size", [pytest.param(*row[1:], id=row[0])
                                                    for row in ODD])
def test_odd_mrc_files_are_read_right(work, make, want, voxel_size):
    make()
    opened = emseg.open_volume("odd.mrc")
    assert opened.dtype == want.dtype and opened.dtype.isnative
    np.testing.assert_array_equal(opened[:], want)
    np.testing.assert_array_equal(opened[1:3, 2, 3:5], want[1:3, 2, 3:5])
    assert opened.voxel_size == (voxel_size and pytest.approx(voxel_size))


NAMES = ["em 1.tif", "Gehirn ü.tif", "電子顕微鏡.tif", "x@1:3.tif", "a@b/x@1:3.tif", "a@b ü/@.tif",
         "a=b.tif", "50 %s {0} $HOME $x$ ~.tif", "#1 'q' \"q\".tif", "line\nbreak.tif", "-.tif"]


@pytest.mark.parametrize("name", NAMES)
def test_files_of_any_name_are_opened_whole_and_cropped(work, name):
    os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
    save(name, IMAGE)
    np.testing.assert_array_equal(emseg.open_volume(name)[:], IMAGE)
    np.testing.assert_array_equal(emseg.open_volume(f"{name}@2:5,:,7:9")[:], IMAGE[2:5, :, 7:9])
    (short,) = emseg.unique_names([f"{name}@2:5"])
    assert re.fullmatch(r"[\w.-]+", short)


def test_a_run_whose_every_name_is_odd(work, capfd):
    home = Path("a@b 1:2 ü $x$ 電")
    home.mkdir()
    save(str(home / "em @0:2 ü.tif"), IMAGE)
    save(str(home / "mito@ü.mrc"), LABEL)
    classes, out = ["back ground", "mito@ü $x$ 1:2"], home / "out @ ü, 電"
    image = f"{home}/em @0:2 ü.tif"
    run(train_cps, *shlex.split(WHOLE[train_cps]), "--volume", f"{image}@0:5", "--label",
        f"{home}/mito@ü.mrc@0:5", "--classes", *classes, "--out-dir", out, "--test-volume",
        f"{image}@5:6", "--test-label", f"{home}/mito@ü.mrc@5:6")
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["classes"] == classes
    assert metrics["volumes"][0]["volume"] == f"{image}@5:6"
    assert emseg.open_volume(out / "prediction.tif").shape == (1, 40, 48)
    again = home / "again @0:1"
    run(train_cps, "--checkpoint", out / "best.pt", "--test-volume", f"{image}@0:1", "--out-dir",
        again, "--device", "cpu")
    assert emseg.open_volume(f"{again}/prediction.tif@0:1").shape == (1, 40, 48)
    run(evaluate, "--prediction", out / "prediction.tif", "--label", f"{home}/mito@ü.mrc@5:6",
        "--volume", f"{image}@5:6", "--out-dir", home / "scores @ ü")
    assert (home / "scores @ ü" / "figure.png").stat().st_size > 1000
    assert capfd.readouterr().err == ""


def test_the_table_is_large_and_its_names_are_unique():
    names = [row[0] for row in ROWS]
    assert len(set(names)) == len(names) >= 70
