"""Small files and real data that the tests share; how they run a command and read its results."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tifffile
import torch

import emseg

ROOT = Path(emseg.__file__).resolve().parent
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


def run(script, *arguments):
    """Run a training script (a module) with these arguments."""
    script.main(script.parse_args([str(a) for a in arguments]))


def refused(script, capsys, *arguments):
    """The one line with which a script refuses its arguments."""
    with pytest.raises(SystemExit) as stopped:
        run(script, *arguments)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def interrupt_after(monkeypatch, steps):
    """Press Ctrl-C after that many training steps."""
    log, calls = emseg.Run.log, []

    def interrupting_log(self, **values):
        log(self, **values)
        calls.append(1)
        if len(calls) == steps:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(emseg.Run, "log", interrupting_log)


def kill_after_an_epoch(script, out, *arguments):
    """Start a script (a module) in a process of its own and kill it once log.csv is there."""
    command = [sys.executable, script.__file__, *arguments, "--out-dir", out]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    while not (out / "log.csv").exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()


CHECKED_RANKS = """
import torch, emseg, {script}
use_best = emseg.Run.use_best

def checked(self, **networks):
    for network in networks.values():
        for parameter in network.parameters():
            first = parameter.detach().clone()
            torch.distributed.broadcast(first, 0)
            assert torch.equal(first, parameter), "ranks drift apart"
    use_best(self, **networks)

emseg.Run.use_best = checked
{script}.main({script}.parse_args())
"""


def two_processes(script, folder, *arguments):
    """Run a script (a module) in two processes whose weights must stay equal; return its output."""
    program = folder / "checked.py"
    program.write_text(CHECKED_RANKS.format(script=script.__name__))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", program,
               *arguments]
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True,
                          timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1",
                                            "PYTHONPATH": str(ROOT)})
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


def parse_readme_commands(script, checkpoint, monkeypatch):
    """Parse every README command of a script, with this checkpoint in place of the one it names;
    return how many there are."""
    content = torch.load(checkpoint, weights_only=True)
    monkeypatch.setattr(emseg, "load_checkpoint", lambda path, script: content)
    commands = readme_commands(Path(script.__file__).name)
    for command in commands:
        if "--resume" not in command:
            script.parse_args(command)
    return len(commands)


def readme_commands(script):
    """The arguments of the README's commands that call this script, continued lines joined."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    return [line.split(script, 1)[1].split() for line in text.splitlines()
            if line.startswith("    ") and script in line and "cp " not in line]
