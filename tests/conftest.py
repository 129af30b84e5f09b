"""Small files and real data that the tests share; how they run a command and read its results."""

import csv
import functools
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

# Networks this small gain nothing from threads, and those of two processes wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

import emseg

ROOT = Path(emseg.__file__).resolve().parent
DATA = Path(os.environ["EMSEG_DATA"]) if os.environ.get("EMSEG_DATA") else None
DPI = 24                                # of pictures that no test looks at


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
    return folder


def scripts():
    """The five training scripts, as modules."""
    return [importlib.import_module(f"train_{name}") for name in
            ("cps", "partial", "seget", "2d3d", "sparse")]


def run(script, *arguments):
    """Run a script (a module) with these arguments, its pictures with few slices and pixels."""
    new_figure = emseg.new_figure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emseg, "new_figure", lambda **size: new_figure(**{**size, "dpi": DPI}))
        patch.setattr(emseg, "save_slices", functools.partial(emseg.save_slices, rows=1))
        script.main(script.parse_args([str(a) for a in arguments]))


TINY = ["--model", "unet", "--width", "4", "--patch-size", "32", "32", "--batch-size", "4",
        "--epochs", "2", "--steps-per-epoch", "3", "--downsample", "1", "--device", "cpu",
        "--cps-warmup", "0.5", "1"]


def tiny_cps(cells, out, *more):
    """Arguments of a training of train_cps.py, which tests on slices that it has trained on too."""
    return ["--volume", f"{cells}/image.tif@2:10", "--label", f"{cells}/mito.tif@2:10",
            "--label-slices", "0,3,7", "--classes", "background", "mito", "--test-volume",
            f"{cells}/image.tif", "--test-label", f"{cells}/mito.tif", "--out-dir", out, *TINY,
            *more]


@pytest.fixture(scope="session")
def trained(cells, tmp_path_factory):
    """A finished tiny run of train_cps.py: CPS and CutMix. Tests change nothing in it."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    run(importlib.import_module("train_cps"), *tiny_cps(cells, folder))
    return folder


def refused(script, capsys, *arguments):
    """The one line with which a script refuses its arguments."""
    with pytest.raises(SystemExit) as stopped:
        run(script, *arguments)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def interrupt_after(monkeypatch, steps, number=signal.SIGINT):
    """Press Ctrl-C, or send another signal, after that many training steps."""
    log, calls = emseg.Run.log, []

    def interrupting_log(self, **values):
        log(self, **values)
        calls.append(1)
        if len(calls) == steps:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(emseg.Run, "log", interrupting_log)


def two_processes(script, *arguments):
    """Run a script (a module) in two processes; return its output."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               script.__file__, *arguments]
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def weights(path, start=""):
    """All weights of a checkpoint's modules whose names start so, in one vector."""
    modules = torch.load(path, weights_only=True)["modules"]
    chosen = [v for name in sorted(modules) if name.startswith(start)
              and not name.startswith(("optimizer", "scaler")) for v in modules[name].values()]
    return torch.cat([v.flatten().double() for v in chosen])


def log_without_seconds(folder):
    """The rows of log.csv."""
    with open(folder / "log.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def metrics(folder):
    """metrics.json, which must be strict JSON."""
    def no_constant(text):
        raise AssertionError(f"metrics.json holds {text}")
    return json.loads((folder / "metrics.json").read_text(), parse_constant=no_constant)


def readme_commands(script):
    """The arguments of the README's commands that call this script."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    calls = re.findall(rf"^ {{4}}(?:.*&& )?(?:python|torchrun \S+) {script} (.*)", text, re.M)
    return [shlex.split(call) for call in calls]


class InMemory(emseg.LazyArray):
    """A NumPy array behind the interface of a volume; read_slices lists what was read."""

    def __init__(self, array, slices=None, voxel_size=None):
        array = np.asarray(array)
        super().__init__("memory.tif", array.shape, array.dtype, voxel_size)
        self.array, self.read_slices = array, []
        self.slices = np.arange(len(array)) if slices is None else np.array(slices)

    def read(self, z, y, x):
        self.read_slices.extend(range(z.start, z.stop))
        return self.array[z, y, x].copy()


def narrow(model, width):
    """A small width that a network takes: this one, or its smallest."""
    return 8 if model in ("fractalresnet", "ceecnet") else width


CORNER = "0:32,0:48"                    # of a slice of the cells: two windows, with mitochondria
