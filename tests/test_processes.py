"""Several processes train one network: each draws crops of its own, all agree, one writes; one that
dies ends the run, and the run goes on from there.

The processes of most tests are forked by a program that has imported everything already, in place
of torchrun, so that each has to notice by itself that another one is gone.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch

import emseg
import train_2d3d
import train_cps
import train_partial
import train_seget
import train_sparse
from conftest import (ROOT, interrupt_after, log_without_seconds, metrics, refused, run,
                      weights)

# Forks two ranks for each line of JSON, an attempt: {"argv", "rank", "step" or "slab", "fault"};
# the rank meets with the fault at its training step, or when it has written a slab of a prediction.
# Answers with [[exit status, output, errors] of each rank, seconds]. All the while it checks that
# the ranks draw different crops and hold equal weights, and that only the first replaces files.
LAUNCHER = """
import hashlib, json, os, signal, socket, sys, tempfile, time, traceback
import torch, emseg, {script}
import torch._dynamo
from torch import distributed

def of_both(value):
    values = [None, None]
    distributed.all_gather_object(values, value)
    return values

def digest(tensors):
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()

class Checks:
    def __init__(self, rank, attempt):
        self.rank, self.attempt, self.steps = rank, attempt, 0
        self.mine = rank == attempt.get("rank")
        for owner, name in ((emseg.Run, "log"), (emseg.Run, "end_epoch"), (emseg, "batches"),
                            (emseg.VolumeWriter, "__setitem__"), (emseg, "replacing")):
            self.wrap(owner, name)

    def wrap(self, owner, name):
        original, check = getattr(owner, name), getattr(self, name.strip("_"))
        setattr(owner, name, lambda *args, **options: check(original, *args, **options))

    def meet(self):
        os.kill(os.getpid(), getattr(signal, self.attempt["fault"]))

    def log(self, log, run, lr, **losses):
        self.steps += 1
        if self.mine and self.steps == self.attempt.get("step"):
            if self.attempt["fault"] == "nan":
                losses["loss"] = losses["loss"] * torch.nan
            else:
                self.meet()
        log(run, lr, **losses)

    def setitem(self, write, writer, index, slab):
        write(writer, index, slab)
        if self.mine and "prediction" in str(writer.path) and self.attempt.get("slab"):
            self.meet()

    def end_epoch(self, end_epoch, run, *args, **options):
        networks = [m for m in run.modules.values() if isinstance(m, torch.nn.Module)]
        one, other = of_both(digest(v for m in networks for v in m.state_dict().values()))
        assert one == other, "the ranks have different weights"
        end_epoch(run, *args, **options)

    def batches(self, batches, *args, **options):
        for batch in batches(*args, **options):
            crops = [batch] if isinstance(batch, torch.Tensor) else batch
            one, other = of_both(digest(crops))
            assert one != other or not any(map(torch.any, crops)), "both draw the same crops"
            yield batch

    def replacing(self, replacing, path):
        assert self.rank == 0, f"the second rank writes {{path}}"
        return replacing(path)

def live(rank, attempt, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.argv = [{script}.__file__, *attempt["argv"]]
    Checks(rank, attempt)
    try:
        {script}.main({script}.parse_args(attempt["argv"]))
        return 0
    except SystemExit as stopped:
        return stopped.code
    except BaseException:
        traceback.print_exc()
        return 1

def save_blank(path, *args, **options):
    emseg.save_figure(emseg.new_figure(figsize=(1, 1)), path)

slabs = emseg.slabs
emseg.slabs = lambda shape, pixels: slabs(shape, 1)     # for both to have some
for module in (emseg, {script}):
    for name in ("slices", "slice_dice", "maps", "surfaces", "curves", "weights", "instances"):
        if hasattr(module, "save_" + name):
            setattr(module, "save_" + name, save_blank)
for line in sys.stdin:
    attempt, started = json.loads(line), time.monotonic()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks, answer = [], []
    for rank in range(2):
        said = [tempfile.TemporaryFile("w+") for _ in range(2)]
        pid = os.fork()
        if not pid:
            for number, file in enumerate(said, 1):
                os.dup2(file.fileno(), number)
            status = live(rank, attempt, port)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        ranks.append((pid, said))
    for pid, said in ranks:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        for file in said:
            file.seek(0)
        answer.append([status, *[file.read() for file in said]])
    print(json.dumps([answer, time.monotonic() - started]), flush=True)
"""

TINY = ("--volume image.tif --test-volume test.tif --width 2 --epochs 2 --steps-per-epoch 3 "
        "--device cpu ")
CASES = {
    train_cps: "--label mito.tif --label-slices 0,2,3 --val-slices 2,3 --model unet --batch-size 4 "
               "--patch-size 16 16 --downsample 1 --cps-warmup 0.5 1 --seed 5 --lr 1e-2",
    train_partial: "--label label.tif --partial part.tif partlabel.tif 3=1,4=1 --compare "
                   "--val-slices 2,3 --batch-size 2 --patch-size 16 16",
    train_seget: "--label a=mito.tif b=vesicle.tif --val-slices 2,3 --batch-size 2 --stride 4 4 "
                 "--patch-size 16 16",
    train_2d3d: "--label label.tif --val-volume test.tif --val-label testlabel.tif --spacing 1 4 4 "
                "--instances 2 --elastic 2 --batch-size 2 --patch-size 3 28 28",
    train_sparse: "--label mito.tif --label-slices 0,2,3 --val-slices 2,3 --scm-epochs 2 --no-tta "
                  "--context 3 --min-size 5 --batch-size 2 --patch-size 16 16",
}
FAULTS = {                              # of a rank while it trains or predicts
    "killed": {"rank": 1, "step": 5, "fault": "SIGKILL"},
    "first killed": {"rank": 0, "step": 4, "fault": "SIGKILL"},
    "killed late": {"rank": 1, "slab": 1, "fault": "SIGKILL"},
    "not finite": {"rank": 1, "step": 6, "fault": "nan"},
    "interrupted": {"rank": 1, "step": 5, "fault": "SIGINT"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with small volumes and labels that show all classes."""
    folder = tmp_path_factory.mktemp("data")
    image, label = emseg.phantom((9, 112, 112), (20, 8, 8), seed=7)
    image, label = [array[:, :48, 16:64] for array in (image, label)]
    arrays = {"image": image[:4], "label": label[:4], "part": image[4:6], "partlabel": label[4:6],
              "test": image[5:], "testlabel": label[5:], "unseen": image[2:4],
              "mito": label[:4] == 3, "vesicle": label[:4] == 4}
    for name, array in arrays.items():
        assert len(np.unique(array)) > 1
        tifffile.imwrite(folder / f"{name}.tif", array.astype(np.uint8), photometric="minisblack")
    return folder


@pytest.fixture(scope="module", params=CASES, ids=lambda script: script.__name__)
def team(request, data):
    """Two processes of a script: team(folder, *arguments, **fault), and the undisturbed run."""
    script = request.param
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER.format(script=script.__name__)], cwd=data, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})

    def attempt(folder, *arguments, **fault):
        argv = [*arguments, "--out-dir", str(folder)]
        process.stdin.write(json.dumps({"argv": argv, **fault}) + "\n")
        process.stdin.flush()
        ranks, seconds = json.loads(process.stdout.readline())
        return [SimpleNamespace(status=status, out=out, err=err, seconds=seconds)
                for status, out, err in ranks]

    arguments = (TINY + CASES[script]).split()
    whole = data / f"whole_{script.__name__}"
    ended = attempt(whole, *arguments)
    assert [rank.status for rank in ended] == [0, 0], [rank.err for rank in ended]
    yield SimpleNamespace(script=script, attempt=attempt, arguments=arguments, whole=whole,
                          ended=ended)
    process.kill()
    process.wait()


def assert_same_end(folder, whole):
    """Weights and predictions of two runs are bit-identical, and their logs equal."""
    files = [path.relative_to(whole) for path in sorted(whole.rglob("*"))
             if path.suffix in (".pt", ".tif", ".csv")]
    assert len(files) > 3
    for name in files:
        if name.suffix == ".csv":
            assert log_without_seconds((folder / name).parent) == log_without_seconds(
                (whole / name).parent)
        elif name.suffix == ".tif":
            assert (folder / name).read_bytes() == (whole / name).read_bytes()
        elif torch.load(whole / name, weights_only=True)["modules"]:
            assert torch.equal(weights(folder / name), weights(whole / name))


def test_two_processes_share_a_run(team):
    """Each draws its own crops, weights stay equal and one of them writes: see LAUNCHER."""
    first, second = team.ended
    assert "2 processes" in first.out and "wrote" in first.out
    assert second.out == ""
    assert not [path for path in team.whole.rglob(".*")]


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_of_one_process_ends_the_run_which_goes_on(team, tmp_path, fault):
    broken = team.attempt(tmp_path / "run", *team.arguments, **fault)
    lines = [rank.err.strip().splitlines() for rank in broken]
    assert broken[0].seconds < 60
    if fault["fault"] == "SIGKILL":
        other = 1 - fault["rank"]
        assert broken[fault["rank"]].status == -signal.SIGKILL
        assert broken[other].status == 2 and len(lines[other]) == 1
        assert "another process has ended; --resume goes on" in lines[other][0]
    elif fault["fault"] == "nan":
        assert broken[1].status == 2 and len(lines[1]) == 1
        assert re.search(r"loss is nan at .*epoch 1, step 5; try a lower --lr", lines[1][0])
        assert broken[0].status == 2 and len(lines[0]) == 1
    else:
        assert [rank.status for rank in broken] == [130, 130] and not any(lines)
        assert " --nproc-per-node=2 " in broken[0].out
    (last,) = [path for path in [tmp_path / "run" / "last.pt"] if path.exists()]
    assert torch.load(last, weights_only=True)["script"] == f"{team.script.__name__}.py"
    resumed = team.attempt(tmp_path / "run", "--resume")
    assert [rank.status for rank in resumed] == [0, 0], [rank.err for rank in resumed]
    assert_same_end(tmp_path / "run", team.whole)


def test_one_process_predicts_alike(team, data, tmp_path):
    """All that two processes have predicted, slab by slab in turn."""
    run(team.script, "--checkpoint", team.whole / "best.pt", "--test-volume", data / "test.tif",
        "--device", "cpu", "--out-dir", tmp_path / "out")
    predictions = [path.relative_to(tmp_path / "out")
                   for path in tmp_path.glob("out/**/prediction.tif")]
    assert predictions
    for name in predictions:
        assert (tmp_path / "out" / name).read_bytes() == (team.whole / name).read_bytes()


@pytest.mark.parametrize("team", [train_cps], indirect=True)
def test_validation_is_over_all_data(team, data, tmp_path):
    """Two slices validate, one in each process: the score is that of both."""
    run(team.script, "--checkpoint", team.whole / "best.pt", "--test-volume", data / "unseen.tif",
        "--test-label", data / "mito.tif@2:4", "--device", "cpu", "--out-dir", tmp_path / "out")
    best = max(float(row["val_dice"]) for row in log_without_seconds(team.whole))
    assert metrics(tmp_path / "out")["mean"]["dice"] == pytest.approx(best, abs=1e-9) != 0
    share = emseg.open_volume(team.whole / "prediction.tif")[:].mean(axis=(1, 2))
    assert share.min() > 0 and share.max() < 1      # or the predictions would say nothing


@pytest.mark.parametrize("team", [train_cps], indirect=True)
def test_one_process_goes_on_where_two_stopped(team, tmp_path, capsys):
    team.attempt(tmp_path / "run", *team.arguments, **FAULTS["interrupted"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(team.whole.parent)
        run(team.script, "--resume", "--out-dir", tmp_path / "run")
    assert "note: processes 2 before, now 1" in capsys.readouterr().out
    assert [row["step"] for row in log_without_seconds(tmp_path / "run")] == ["3", "6"]


@pytest.mark.parametrize("pause", [0, 1.1])
def test_a_second_interruption_counts_a_second_later(data, tmp_path, monkeypatch, capsys, pause):
    """At once it is the one that torchrun passes on, later somebody does not want to wait."""
    log = emseg.Run.log

    def interrupted_log(self, lr, **losses):
        log(self, lr, **losses)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(pause)

    monkeypatch.setattr(emseg.Run, "log", interrupted_log)
    monkeypatch.chdir(data)
    with pytest.raises(SystemExit) as stopped:
        run(train_cps, *TINY.split(), *CASES[train_cps].split(), "--out-dir", tmp_path / "run")
    assert stopped.value.code == 130
    out, err = capsys.readouterr()
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"]
    assert ("saved" in out, ": interrupted; " in err, saved) == (
        (True, False, 1) if not pause else (False, True, 0))


@pytest.mark.parametrize("team", [train_cps], indirect=True)
@pytest.mark.parametrize("what, note", [
    ("threads", "note: threads {} before, now {}; the result will not be that of a run without"),
    ("image.tif", "note: image.tif has changed; the result"), (None, None)])
def test_what_changes_before_a_run_goes_on_is_noted(team, tmp_path, monkeypatch, capsys, what,
                                                    note):
    for name in ("image.tif", "mito.tif", "test.tif"):
        shutil.copy(team.whole.parent / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt_after(patch, 4)
        run(train_cps, *team.arguments, "--out-dir", "run")
    threads = torch.get_num_threads()
    if what == "image.tif":
        tifffile.imwrite(what, 255 - tifffile.imread(what), photometric="minisblack")
    elif what:
        torch.set_num_threads(threads + 1)
    try:
        run(train_cps, "--resume", "--out-dir", "run")
    finally:
        torch.set_num_threads(threads)
    notes = [line for line in capsys.readouterr().out.splitlines() if "without inter" in line]
    assert len(notes) == (note is not None)
    assert not note or notes[0].startswith(note.format(threads, threads + 1))


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
@pytest.mark.parametrize("team", [train_cps], indirect=True)
def test_a_folder_has_one_writer(team, tmp_path, monkeypatch, capsys, flag):
    """As where a cluster starts a job again while the first one still runs."""
    program = "import sys, emseg; emseg.lock_folder(sys.argv[1]); print(flush=True); input()"
    folder = tmp_path / "run"
    shutil.copytree(team.whole, folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    given = team.arguments if flag == "--overwrite" else []
    monkeypatch.chdir(team.whole.parent)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with subprocess.Popen([sys.executable, "-c", program, folder], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, cwd=ROOT) as other:
        other.stdout.readline()
        assert f"--out-dir {folder}: another process is writing into it" in refused(
            train_cps, capsys, *given, flag, "--out-dir", folder)
        assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        other.kill()
    run(train_cps, *given, flag, "--out-dir", folder)
    run(train_cps, *given, flag, "--out-dir", folder)       # the first one has let go


OVERLOOKS_NAN = """
import emseg, train_cps
check = emseg.check_finite
emseg.check_finite = lambda volume, *crop: crop and check(volume, *crop)
train_cps.main(train_cps.parse_args())
"""

KILLS_A_WORKER = """
import multiprocessing, emseg, train_cps
log = emseg.Run.log

def killing_log(self, lr, **losses):
    log(self, lr, **losses)
    if self.step == 2:
        multiprocessing.active_children()[0].kill()

emseg.Run.log = killing_log
train_cps.main(train_cps.parse_args())
"""

# The connection breaks, and a little later, while a line is being written, the system says why.
LOSES_A_WORKER = """
import signal, sys, time, emseg, train_cps

def died(*_):
    raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

def broken(*arguments, **options):
    signal.signal(signal.SIGALRM, died)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    sys.stderr.write = lambda text, write=sys.stderr.write: (write(text), time.sleep(0.5))
    raise ConnectionResetError
    yield

emseg.batches = broken
train_cps.main(train_cps.parse_args())
"""


@pytest.mark.parametrize("program, message", [
    (OVERLOOKS_NAN, "nan.tif: slice 70 holds NaN or infinite values; replace them before use"),
    *((program, "one of the --workers was killed, for want of memory perhaps; give fewer")
      for program in (KILLS_A_WORKER, LOSES_A_WORKER))], ids=["not a number", "killed", "lost"])
def test_a_fault_of_a_worker_is_one_line(tmp_path, program, message):
    image = np.random.default_rng(0).normal(size=(80, 32, 32)).astype(np.float32)
    label = (image > 0.5).astype(np.uint8)
    if "NaN" in message:
        image[70], label[:70] = np.nan, 0           # not among the slices that are looked at first
    for name, array in (("nan.tif", image), ("label.tif", label)):
        tifffile.imwrite(tmp_path / name, array, photometric="minisblack")
    arguments = TINY.replace("image", "nan").replace("test.tif", "nan.tif") + (
        "--label label.tif --method supervised --model unet --downsample 1 --patch-size 16 16 "
        "--batch-size 4 --steps-per-epoch 200 --workers 2 --out-dir run")
    done = subprocess.run([sys.executable, "-c", program, *arguments.split()], cwd=tmp_path,
                          capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1 and message in lines[0], done.stderr


# -- torchrun itself -------------------------------------------------------------------------------

DOOMED = """
import os, signal, emseg, train_cps
log = emseg.Run.log

def last_log(self, lr, **losses):
    log(self, lr, **losses)
    if self.rank == 1 and self.step == 4:
        os.kill(os.getpid(), signal.SIGKILL)

emseg.Run.log = last_log
train_cps.main(train_cps.parse_args())
"""


def torchrun(data, program, *arguments):
    """Start a program in two processes, in a session of its own."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", program,
               *TINY.split(), *CASES[train_cps].split(), *arguments]
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=data, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


def test_torchrun_ends_when_a_process_dies(data, tmp_path):
    program = tmp_path / "doomed.py"
    program.write_text(DOOMED)
    process = torchrun(data, program, "--out-dir", tmp_path / "run")
    _, err = process.communicate(timeout=60)
    assert process.returncode not in (0, None) and "SIGKILL" in err
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == 3


def test_ctrl_c_reaches_all_processes_of_torchrun_and_saves(data, tmp_path):
    """A terminal interrupts torchrun and its processes; torchrun then interrupts these again."""
    folder = tmp_path / "run"
    process = torchrun(data, ROOT / "train_cps.py", "--epochs", "1000", "--out-dir", folder)
    while not (folder / "log.csv").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    step = torch.load(folder / "last.pt", weights_only=True)["step"]
    assert process.returncode not in (0, None)
    assert f"interrupted at step {step}; saved {folder / 'last.pt'}; continue with: " in out
    assert f" --nproc-per-node=2 {ROOT / 'train_cps.py'} --resume --out-dir {folder}\n" in out
    assert 3 <= step < 3000 and "train_cps.py: error" not in err
