"""Runs that are killed, interrupted, short of room or fed with NaN: nothing is lost, and what goes
on ends as if nothing had happened.

By default a sample of crash points of each script is tried, spread over the kinds of event. For
more:

    python -m pytest tests/test_interruptions.py --kills 100        # points of each kind of fault
    python -m pytest tests/test_interruptions.py --kills all        # all there are: hours
    python -m pytest tests/test_interruptions.py --kills 100 -k "train_cps and killed"

With -s it says how many attempts of which kind there were.

A helper process, the nursery, imports everything once and forks a child for every attempt. In the
child all that changes the disk, each training step and each validation is a point, at which it can
die, be interrupted, or find the disk full from there on; see Trap.
"""

import builtins
import csv
import dataclasses
import errno
import functools
import importlib
import io
import json
import os
import random
import re
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest
import torch

import conftest
import emseg

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs Linux")
HERE = Path(__file__).resolve()
# What is tried with each script by default.
DEFAULT = {"killed": 3, "moments": 1, "full": 1, "limit": 1, "interrupted": 1, "not_finite": 1}

# -- the nursery: a process of its own -------------------------------------------------------------


class Burst(torch.autograd.Function):
    """Changes nothing, but its gradient is infinite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.inf


class Trap:
    """Counts the points that a script passes and springs at one of them.

    at: number of the point; spring: a signal's number, or "full": from there on nothing new fits
    on the disk; step, fault: the training step whose loss is "nan" or has an infinite "gradient".
    """

    def __init__(self, trace, folder, at=None, spring=None, step=None, fault=None, **_):
        self.trace, self.folder, self.at, self.spring = trace, folder, at, spring
        self.count, self.steps, self.step, self.fault, self.full = 0, 0, step, fault, False

    def point(self, kind, path=""):
        """One point; path: of what is about to change there, of no interest outside of the run."""
        if path and not os.path.realpath(path).startswith(self.folder) or (
                kind == "mkdir" and os.path.exists(path)):
            return
        os.write(self.trace, f"{kind} {path and os.path.relpath(path)}\n".encode())
        self.count += 1
        if self.count - 1 == self.at:
            if self.spring == "full":
                self.full = True
            else:
                os.kill(os.getpid(), self.spring)
        self.check(kind, path)

    def check(self, kind, path):
        """Raise what the system would on a full disk."""
        if self.full and kind in ("create", "write", "half", "fsync", "mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def set(self, script):
        """Put a point before all that changes the disk, in the middle of each write, and so on."""
        trap, plain_open = self, io.open

        class Raw(io.FileIO):
            """A file each write of which can end half-way: a point of the 1st, 2nd, 4th, 8th…"""
            writes = 0

            def write(self, data):
                data, self.writes = memoryview(data).cast("B"), self.writes + 1
                half = len(data) // 2
                if self.writes & (self.writes - 1) or not half:
                    trap.check("write", self.name)
                    return super().write(data)
                trap.point("write", self.name)
                if super().write(data[:half]) < half:
                    raise OSError(errno.ENOSPC, "partial write")
                trap.point("half", self.name)
                return half + super().write(data[half:])

            def truncate(self, size=None):
                trap.point("write", self.name)
                return super().truncate(size)

        def open_file(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None,
                      closefd=True, opener=None):
            if isinstance(file, int) or not set(mode) & set("wxa+"):
                return plain_open(file, mode, buffering, encoding, errors, newline, closefd,
                                  opener)
            trap.point("open" if os.path.exists(file) else "create", file)
            raw = Raw(file, mode.replace("b", "").replace("t", ""), closefd, opener)
            if buffering == 0:
                return raw
            stream = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
            return stream if "b" in mode else io.TextIOWrapper(stream, encoding, errors, newline)

        builtins.open = io.open = open_file
        for name in ("replace", "rename", "unlink", "remove", "mkdir", "rmdir"):
            setattr(os, name, self.before(getattr(os, name), name, which=1 if name in (
                "replace", "rename") else 0))
        fsync = os.fsync
        os.fsync = lambda fd: (trap.point("fsync", os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))
        figure = matplotlib.figure.Figure
        figure.savefig = self.before(figure.savefig, "savefig")
        emseg.Run.validate = self.before(emseg.Run.validate, "validate")
        emseg.Run.open_data = self.before(emseg.Run.open_data, "data")
        emseg.Run.report = self.before(emseg.Run.report, "report")
        steps = emseg.Run.steps

        def counted_steps(self, epoch):
            for step in steps(self, epoch):
                trap.point("step")
                trap.steps += 1
                yield step

        emseg.Run.steps = counted_steps
        for module, name in [(script, n) for n in ("loss_terms", "jaccard_distance", "dice_loss")
                             if hasattr(script, n)] or [(emseg, "cross_entropy")]:
            setattr(module, name, self.with_fault(getattr(module, name)))

    def before(self, function, kind, which=None):
        """The function with a point before it; which: its argument that is a path."""
        @functools.wraps(function)
        def passed(*args, **kwargs):
            path = "" if which is None or kwargs.get("dir_fd") else os.fspath(args[which])
            self.point(kind, path)
            return function(*args, **kwargs)
        return passed

    def with_fault(self, loss):
        @functools.wraps(loss)
        def faulty(*args, **kwargs):
            value = loss(*args, **kwargs)
            if self.steps - 1 != self.step:
                return value
            spoil = Burst.apply if self.fault == "gradient" else lambda x: x * torch.nan
            return tuple(map(spoil, value)) if isinstance(value, tuple) else spoil(value)
        return faulty


def live(attempt, trace):
    """What a child does: run the script as from a command line. Returns its exit status."""
    os.chdir(attempt["folder"])
    script = importlib.import_module(attempt["script"])
    sys.argv = [script.__file__, *attempt["argv"]]
    if attempt.get("limit") is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (attempt["limit"],) * 2)
    Trap(trace, **{**attempt, "folder": os.path.realpath(attempt["folder"])}).set(script)
    try:
        args = script.parse_args(attempt["argv"])
        os.write(trace, b"main\n")
        script.main(args)
        os.write(trace, b"done\n")
        return 0
    except SystemExit as stopped:
        return stopped.code or 0
    except BaseException:
        traceback.print_exc()
        return 1


def raise_child(attempt):
    """Fork a child for an attempt, send it a signal if asked; how it ended and what it said."""
    pipes = [os.pipe() for _ in range(3)]               # output, errors, points
    started = time.monotonic()
    pid = os.fork()
    if not pid:
        status = 99
        try:
            for number, (_, end) in enumerate(pipes[:2], 1):
                os.dup2(end, number)
            sys.stdout, sys.stderr = [open(n, "w", encoding="utf-8") for n in (1, 2)]
            status = live(attempt, pipes[2][1])
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)
    due = None
    with selectors.DefaultSelector() as selector:
        for number, (begin, end) in enumerate(pipes):
            os.close(end)
            selector.register(begin, selectors.EVENT_READ, number)
        said = [b"", b"", b""]
        while selector.get_map():
            wait = 120 if due is None else max(0, due - time.monotonic())
            ready = selector.select(wait)
            if not ready or (due is not None and time.monotonic() >= due):
                os.kill(pid, attempt["signal"] if due is not None else signal.SIGKILL)
                due = None
            for key, _ in ready:
                text = os.read(key.fd, 2**16)
                said[key.data] += text
                if not text:
                    selector.unregister(key.fd)
                    os.close(key.fd)
                if key.data == 2 and b"main\n" in text and "after" in attempt:
                    due = time.monotonic() + attempt["after"]
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return [status, *[text.decode() for text in said], time.monotonic() - started]


# They took most of the time, and are looked at by other tests.
PICTURES = {"emseg": ["save_slices", "save_maps", "save_surfaces", "save_slice_dice",
                      "save_curves", "save_histogram"],
            "train_2d3d": ["save_weights", "save_instances"], "evaluate": ["save_confusion"]}


def save_empty(path, *_, **__):
    """In place of all functions that draw: a small picture."""
    emseg.save_figure(emseg.new_figure(figsize=(1, 1)), path)


def nursery():
    """Read attempts as lines of JSON, answer each with a line."""
    torch.set_num_threads(1)
    for name in [*{case.script for case in CASES.values()}, "torch._dynamo"]:
        importlib.import_module(name)               # the latter is what an optimiser imports
    for module, names in PICTURES.items():
        for name in names:
            setattr(importlib.import_module(module), name, save_empty)
    emseg.new_figure().savefig(io.BytesIO())
    for line in sys.stdin:
        print(json.dumps(raise_child(json.loads(line))), flush=True)


class Nursery:
    """The helper process, as the tests see it."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, HERE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1",
                                         "PYTHONPATH": str(conftest.ROOT)})

    def attempt(self, script, argv, folder, **plan):
        """Run a script (its name) in a folder; plan: see Trap, and signal, after: a signal to send
        so many seconds after its start; limit: bytes that a file may have."""
        plan |= {"script": script, "argv": argv, "folder": str(folder)}
        self.process.stdin.write(json.dumps(plan) + "\n")
        self.process.stdin.flush()
        status, out, err, trace, seconds = json.loads(self.process.stdout.readline())
        points = [line for line in trace.splitlines() if line not in ("main", "done")]
        return SimpleNamespace(status=status, out=out, err=err, points=points, seconds=seconds,
                               ended=trace.endswith("done\n"))


# -- the runs --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Case:
    """A tiny run: a script and its arguments, in which {data} is a folder of volumes."""
    script: str
    arguments: str
    steps: int = 0                      # training steps of all its stages and parts,
    parts: int = 1                      # of which there are so many
    checkpoint: str = ""                # the case whose best.pt it reads


PER_EPOCH = 2
TINY = (f"--width 2 --epochs 2 --steps-per-epoch {PER_EPOCH} --batch-size 2 --patch-size 16 16 "
        "--save-probability --device cpu ")
TEST = "--test-volume {data}/image.tif@4:6 --test-label {data}/label.tif@4:6 "
CASES = {
    "train_partial": Case(
        "train_partial", TINY + TEST + "--compare --volume {data}/image.tif@0:2 --label "
        "{data}/label.tif@0:2 --partial {data}/image.tif@2:4 {data}/label.tif@2:4 3=1,4=1 "
        "--classes a b c d e --val-volume {data}/image.tif@6:7 --val-label {data}/label.tif@6:7",
        8),
    "train_seget": Case(
        "train_seget", TINY + "--no-amp --volume {data}/image.tif@0:4 --label "
        "mito={data}/mito.tif@0:4 vesicle={data}/vesicle.tif@0:4 --val-slices 3 --test-volume "
        "{data}/image.mrc --test-label mito={data}/mito.tif@4:6 vesicle={data}/vesicle.tif@4:6",
        8, parts=2),
    "train_2d3d": Case(
        "train_2d3d", TINY.replace("16 16", "3 28 28") + TEST.replace("4:6", "4:6,:32,:32") +
        "--volume {data}/image.tif@0:4 --label {data}/label.tif@0:4 --val-volume "
        "{data}/image.tif@6:9,:32,:32 --val-label {data}/label.tif@6:9,:32,:32 --spacing 1 8 8 "
        "--instances 2 --elastic 2", 8, parts=2),
    "train_sparse": Case(
        "train_sparse", TINY + TEST.replace("label.tif", "mito.tif") + "--no-tta --volume "
        "{data}/image.tif@0:4 --label {data}/mito.tif@0:4 --label-slices 0,2,3 --val-volume "
        "{data}/image.tif@6:8 --val-label {data}/mito.tif@6:8 --scm-epochs 2 --context 3 "
        "--min-size 5", 8),
    "train_cps": Case(
        "train_cps", TINY.replace("size 2", "size 4") + "--model unet --downsample 1 --cps-warmup "
        "0.5 1 --volume {data}/image.tif@0:4 --label {data}/mito.tif@0:4 --label-slices 0,2,3 "
        "--val-slices 3 --test-volume {data}/image.mrc --test-label {data}/mito.tif@4:6", 4),
    "prediction": Case(
        "train_cps", "--checkpoint {train_cps}/best.pt --test-volume {data}/image.tif@4:6 "
        "{data}/image.mrc --test-label {data}/mito.tif@4:6 {data}/mito.tif@4:6 --device cpu "
        "--save-probability", checkpoint="train_cps"),
    "evaluate": Case(
        "evaluate", "--prediction {train_cps}/prediction.mrc --label {data}/mito.tif@4:6 --volume "
        "{data}/image.mrc --objects --overwrite", checkpoint="train_cps"),
}
TRAININGS = [name for name, case in CASES.items() if case.steps]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with a small volume and its labels, 9 x 48 x 48 voxels that show all classes."""
    folder = tmp_path_factory.mktemp("data")
    image, label = emseg.phantom((9, 112, 112), (20, 8, 8), seed=7)
    image, label = [array[:, :48, 16:64] for array in (image, label)]
    arrays = {"image.tif": image, "label.tif": label, "mito.tif": (label == 3).astype(np.uint8),
              "vesicle.tif": (label == 4).astype(np.uint8),
              "image.mrc": (image[4:6].astype(int) - 128).astype(np.int8)}
    for name, array in arrays.items():
        with emseg.create_volume(folder / name, array.shape, array.dtype, (20, 8, 8)) as writer:
            writer[:] = array
    return folder


class Runs:
    """Runs cases, and knows how each of them ends where nothing disturbs it."""

    def __init__(self, nursery, data, folder):
        self.nursery, self.data, self.folder, self.whole = nursery, data, folder, {}
        self.counts = Counter()

    def undisturbed(self, name):
        """How a case ends (an attempt), and where (folder)."""
        if name not in self.whole:
            folder = self.folder / name
            folder.mkdir()
            self.prepare(name, folder)
            done = self.try_once(name, folder, self.argv(name))
            assert done.status == 0, done.err
            assert_whole(folder / "run")
            done.folder = folder / "run"
            self.whole[name] = done
        return self.whole[name]

    def prepare(self, name, folder):
        """evaluate.py: an earlier evaluation, of fewer files, that the new one replaces."""
        if name == "evaluate":
            argv = [a for a in self.argv(name) if a != "--objects"] + ["--no-distances"]
            assert self.try_once(name, folder, argv).status == 0

    def argv(self, name):
        case = CASES[name]
        paths = {"data": self.data}
        if case.checkpoint:
            paths[case.checkpoint] = self.undisturbed(case.checkpoint).folder
        return case.arguments.format(**paths).split() + ["--out-dir", "run"]

    def label(self, name, plan):
        """Where a plan does something: a point, or "after" so many seconds, or the like."""
        return self.undisturbed(name).points[plan["at"]] if "at" in plan else [*plan][-1]

    def try_once(self, name, folder, argv, **plan):
        return self.nursery.attempt(CASES[name].script, argv, folder, **plan)

    def how_to_go_on(self, name, folder):
        """The command line with which a user goes on after a kill."""
        run = folder / "run"
        if CASES[name].steps and (run / "config.json").exists():
            return ["--resume", "--out-dir", "run"]
        used = run.exists() and any(run.iterdir()) and name != "evaluate"
        return self.argv(name) + ["--overwrite"] * used

    def finish(self, name, folder, argv=None, kills=()):
        """Go on, with a kill after each of these seconds, until the run ends as if undisturbed.
        Returns the last attempt."""
        whole = self.undisturbed(name)
        for seconds in [*kills, None]:
            plan = {} if seconds is None else {"signal": signal.SIGKILL, "after": seconds}
            done = self.try_once(name, folder, argv or self.how_to_go_on(name, folder), **plan)
            assert done.status in ((0, -9) if plan else (0,)), done.err or done.out
            assert_whole(folder / "run", whole.folder)
            argv = None
            if done.status == 0:
                break
        assert_same(folder / "run", whole.folder)
        return done


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    nursery = Nursery()
    runs = Runs(nursery, data, tmp_path_factory.mktemp("undisturbed"))
    yield runs
    nursery.process.stdin.close()
    nursery.process.wait(60)
    print("", *[" ".join(map(str, (count, *what))) for what, count in sorted(runs.counts.items())],
          sep="\n")


@pytest.fixture
def sample(request):
    """sample(kind, points): the numbers of points to try, spread over the kinds of event: those
    that tell most first, and other ones for each script."""
    wanted, name = request.config.getoption("--kills"), request.node.callspec.params["name"]

    def choose(kind, points, share=1.0):
        count = max(1, len(points) if wanted == "all" else int(int(wanted) * share) if wanted
                    else DEFAULT[kind])
        groups = {}
        for number, point in enumerate(points):
            event, _, file = point.removesuffix(".tmp").partition(" ")
            file = Path(file).name.lstrip(".")
            if file.endswith((".png", ".tif", ".mrc")):
                file = Path(file).suffix
            groups.setdefault((event, file), []).append(number)
        events = sorted(groups, key=lambda event: random.Random(str(event)).random())
        best = [event for event in events if event[0] in ("half", "replace", "step")]
        first = [*CASES].index(name) * count % max(1, len(best))
        keys = [event for event in events if event[0] == "unlink"]
        count += len(keys)
        keys += best[first:] + best[:first]
        keys += [event for event in events if event not in keys]
        for event in keys:
            choose.rng.shuffle(groups[event])
        order = [groups[event][k] for k in range(len(points)) for event in keys
                 if k < len(groups[event])]
        return order[:count]
    choose.rng = random.Random(request.node.name)
    return choose


# -- what must hold --------------------------------------------------------------------------------


def visible(run):
    """{path in the run's folder: file} of all files, those with a dot apart."""
    files = {file.relative_to(run): file for file in sorted(run.rglob("*")) if file.is_file()}
    return {name: file for name, file in files.items()
            if not any(part.startswith(".") for part in name.parts)}


def hidden(run):
    """What is left of unfinished files and folders."""
    return [str(path) for path in run.rglob(".*")]


def volume(file):
    """All voxels of a TIFF or MRC file and their size."""
    opened = emseg.open_volume(str(file)) if "probability" not in file.name else None
    if opened is None:
        return conftest.tifffile.imread(file), None
    return opened[:], opened.voxel_size


def assert_whole(run, whole=None):
    """Every visible file can be read to its end; volumes, written once, are as they must be."""
    for name, file in visible(run).items():
        if file.suffix == ".pt":
            modules = torch.load(file, weights_only=True)["modules"]
            assert all(torch.isfinite(v).all() for key, module in modules.items()
                       if "optimizer" not in key for v in module.values()), name
        elif file.suffix == ".json":
            json.loads(file.read_text())
        elif file.suffix == ".png":
            assert file.read_bytes().endswith(b"IEND\xaeB`\x82"), name
            assert matplotlib.image.imread(file).size, name
        elif file.suffix == ".csv":
            text = file.read_text()
            rows = list(csv.reader(text.splitlines()))
            assert text.endswith("\n") and len({len(row) for row in rows}) == 1, name
        elif whole and (whole / name).exists():
            for mine, other in zip(volume(file), volume(whole / name)):
                np.testing.assert_array_equal(mine, other, str(name))


OF_CALL = {"argv", "overwrite", "resume", "seconds", "train_seconds", "predict_seconds", "sums",
           "predict_voxels_per_second", "peak_memory_gib"}          # sums: of an unfinished epoch


def comparable(content):
    """Nested lists and dictionaries, tensors as bytes, without times and what was typed."""
    if isinstance(content, dict):
        return {key: comparable(value) for key, value in content.items() if key not in OF_CALL}
    if isinstance(content, (list, tuple)):
        return [comparable(value) for value in content]
    if isinstance(content, torch.Tensor):
        return str(content.dtype), tuple(content.shape), content.numpy().tobytes()
    return content


def assert_same(run, whole):
    """A run has ended like the undisturbed one: weights to the bit, log, scores, volumes."""
    mine, others = visible(run), visible(whole)
    assert mine.keys() == others.keys()
    assert not hidden(run)
    for name, file in mine.items():
        other = others[name]
        if file.suffix == ".pt":
            one, two = [comparable(torch.load(f, weights_only=True)) for f in (file, other)]
            assert one.keys() == two.keys()
            assert not [key for key in one if one[key] != two[key]], name
        elif file.suffix == ".json":
            one, two = [comparable(json.loads(f.read_text())) for f in (file, other)]
            assert one == two, name
        elif file.name == "log.csv":
            assert conftest.log_without_seconds(file.parent) == conftest.log_without_seconds(
                other.parent), name
        else:
            assert file.read_bytes() == other.read_bytes() or file.suffix == ".mrc", name
    assert_whole(run, whole)


# -- the tests -------------------------------------------------------------------------------------


def try_all(runs, name, plans, tmp_path, attempt):
    """attempt(folder, **plan) for each plan, each in a new folder; tell all failures together."""
    failures = []
    for number, plan in enumerate(plans):
        folder, label = tmp_path / str(number), runs.label(name, plan)
        folder.mkdir()
        runs.prepare(name, folder)
        runs.counts[attempt.__name__, re.sub(r"\W.*", "", label), name] += 1
        try:
            attempt(folder, **plan)
        except Exception as error:      # also what a damaged file raises
            where = traceback.extract_tb(error.__traceback__)[-1]
            reason = "\n    ".join(str(error).splitlines()[:2])
            failures.append(f"{label} {plan}: {where.name}: {reason}")
        shutil.rmtree(folder)
    assert not failures, "\n".join(["", *failures])


@pytest.mark.parametrize("name", CASES)
def test_killed_at_any_point(runs, sample, tmp_path, name):
    """SIGKILL before anything that changes the disk, or in the middle of a write, and again at a
    random moment when it goes on."""
    whole = runs.undisturbed(name)

    def killed(folder, at, again):
        done = runs.try_once(name, folder, runs.argv(name), at=at, spring=signal.SIGKILL)
        assert done.status == -9, done.err
        assert_whole(folder / "run", whole.folder)
        runs.finish(name, folder, kills=again)

    plans = [{"at": at, "again": [sample.rng.uniform(0, whole.seconds)][: number % 2]}
             for number, at in enumerate(sample("killed", whole.points))]
    try_all(runs, name, plans, tmp_path, killed)


@pytest.mark.parametrize("name", CASES)
def test_killed_at_random_moments(runs, sample, tmp_path, name):
    """SIGKILL after a random time, and up to three times more while it goes on."""
    whole = runs.undisturbed(name)

    def killed_often(folder, first, again):
        done = runs.try_once(name, folder, runs.argv(name), signal=signal.SIGKILL, after=first)
        if done.status == 0:                        # it was faster than the undisturbed run
            shutil.rmtree(folder / "run")
            runs.prepare(name, folder)
            return killed_often(folder, first / 2, again)
        assert done.status == -9, done.err
        assert_whole(folder / "run", whole.folder)
        assert runs.finish(name, folder, kills=again).ended

    plans = [{"first": sample.rng.uniform(0, whole.seconds),
              "again": [sample.rng.uniform(0, whole.seconds) for _ in range(3)]}
             for _ in sample("moments", whole.points, 0.2)]
    try_all(runs, name, plans, tmp_path, killed_often)


def one_line(done):
    """What a refused attempt says."""
    assert "Traceback" not in done.err + done.out, done.err[-600:]
    lines = done.err.strip().splitlines()
    assert len(lines) == 1, done.err
    return lines[0]


def contents(run):
    """{path in the run's folder: bytes}, config.json apart."""
    return {name: file.read_bytes() for name, file in visible(run).items()
            if name.name != "config.json"}


@pytest.mark.parametrize("name", CASES)
def test_disk_full(runs, sample, tmp_path, name):
    """From some point on nothing new fits on the disk, or the system refuses to write more than
    some bytes into a file: one line that names the file, what there was is whole, and with room
    again the run ends as if undisturbed. An earlier evaluation stays, or all of it is new."""
    whole = runs.undisturbed(name)

    def full(folder, **plan):
        run = folder / "run"
        earlier = contents(run)
        done = runs.try_once(name, folder, runs.argv(name), spring="full", **plan)
        assert done.status == 2, done.err
        line = one_line(done)
        assert re.search(r"\brun\b", line), line
        assert re.search("cannot be written|room|No space|too large", line), line
        assert not run.exists() or not hidden(run), hidden(run)
        assert_whole(run, whole.folder)
        saved = [point.split()[1] for point in done.points if point.startswith("replace")]
        assert all((folder / file).exists() for file in saved if file.endswith("last.pt"))
        if name == "evaluate":
            assert contents(run) in (earlier, contents(whole.folder)), "neither old nor new"
        runs.finish(name, folder)

    changes = [number for number, point in enumerate(whole.points)
               if point.split()[0] in ("create", "write", "half", "fsync", "mkdir")]
    plans = [{"at": changes[place]} for place in
             sample("full", [whole.points[number] for number in changes], 0.5)]
    sizes = sorted({file.stat().st_size for file in visible(whole.folder).values()})
    limits = [limit for size in sizes for limit in (size // 3, size - 1)]
    plans += [{"limit": limits[place]} for place in sample("limit", list(map(str, limits)), 0.2)]
    try_all(runs, name, plans, tmp_path, full)


def what_it_says(runs, name, done):
    """The command line with which an interrupted script says to go on."""
    lines = [line for line in (done.out + done.err).splitlines() if "interrupted" in line]
    assert len(lines) == 1, done.out + done.err
    if "--resume" in lines[0]:
        script, *argv = shlex.split(lines[0].partition("python ")[2])
        assert Path(script).resolve() == conftest.ROOT / f"{CASES[name].script}.py"
        return argv
    assert "start again" in lines[0]
    return runs.argv(name) + ["--overwrite"] * ("--overwrite" in lines[0])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_interrupted(runs, sample, tmp_path, name, number):
    """Ctrl-C, or a cluster's SIGTERM, at a point or at a random moment."""
    whole = runs.undisturbed(name)

    def interrupted(folder, **plan):
        done = runs.try_once(name, folder, runs.argv(name), **plan)
        assert_whole(folder / "run", whole.folder)
        idle = not done.points or "wrote run/: " in done.out        # before its work, or after
        if done.ended or (idle and done.status == -number):
            return
        assert "Traceback" not in done.err + done.out, done.err[-600:]
        assert done.status == 130, (done.status, done.err)
        cleaning = "at" in plan and whole.points[plan["at"]].split()[0] in ("unlink", "rmdir")
        assert cleaning or not hidden(folder), hidden(folder)
        more = runs.finish(name, folder, what_it_says(runs, name, done))
        steps = done.points.count("step ") + more.points.count("step ")
        assert steps == CASES[name].steps, f"{steps} steps: not saved"

    points = sample("interrupted", whole.points, 0.5)
    steps = [at for at, point in enumerate(whole.points) if point == "step "]
    if steps:                                           # in the middle of an epoch
        points = [sample.rng.choice(steps[::PER_EPOCH])] + points
    first = number == signal.SIGTERM
    plans = [{"at": at, "spring": number} for at in points[first::2]]
    plans += [{"signal": number, "after": sample.rng.uniform(0, whole.seconds)}
              for _ in points[1 - first::2]]
    try_all(runs, name, plans, tmp_path, interrupted)


@pytest.mark.parametrize("name", TRAININGS)
@pytest.mark.parametrize("fault", ["nan", "gradient"])
def test_not_finite(runs, sample, tmp_path, name, fault):
    """A loss that is NaN, or a gradient that makes weights NaN: in any step of an epoch, also the
    last, the run stops with epoch and step and keeps what is finite."""
    case, whole = CASES[name], runs.undisturbed(name)

    def not_finite(folder, step):
        done = runs.try_once(name, folder, runs.argv(name), step=step, fault=fault)
        assert done.status == 2, done.err
        line = one_line(done)
        own = step % (case.steps // case.parts)
        when = (own // PER_EPOCH, own) if fault == "nan" else (r"\d+", r"\d+")
        assert re.search("epoch {}, step {}; ".format(*when), line), line
        assert_whole(folder / "run", whole.folder)
        assert not hidden(folder), hidden(folder)
        runs.finish(name, folder)

    steps = sample("not_finite", [f"step {step}" for step in range(case.steps)])
    if fault == "gradient":             # the losses of an epoch do not see its last update
        steps += [sample.rng.randrange(PER_EPOCH - 1, case.steps, PER_EPOCH)]
    try_all(runs, name, [{"step": step} for step in sorted(set(steps))], tmp_path, not_finite)


if __name__ == "__main__":
    nursery()


LEAVES = """
import atexit, os, signal, emseg
for number in signal.SIGTERM, signal.SIGINT:        # what is registered first comes last
    atexit.register(os.kill, os.getpid(), number)
emseg.command(lambda args: None)(None)
"""


def test_a_signal_while_python_leaves_changes_nothing():
    done = subprocess.run([sys.executable, "-c", LEAVES], capture_output=True, text=True,
                          cwd=conftest.ROOT)
    assert (done.returncode, done.stderr) == (0, "")
