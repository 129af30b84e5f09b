"""What a run promises, whatever is trained: folders, interruption, checkpoints, bad input."""

import errno
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

import conftest
import emseg
import evaluate
import train_cps
import train_seget
from conftest import ROOT, TINY, log_without_seconds, metrics, run, tiny_cps, weights


def test_the_training_in_the_readme_works(tmp_path, monkeypatch):
    """With labels of 0 and 255, on fewer slices and with fewer steps."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("A training of your own")[2]
    code = re.search("\n\n((?:    .*\n)+)", text)[1].replace("\n    ", "\n").strip()
    image, label = emseg.phantom((8, 264, 260))
    for name, array in ("stack", image * np.uint16(16)), ("drawn", (label == 3) * np.uint8(255)):
        tifffile.imwrite(tmp_path / f"{name}.tif", array)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code.replace("@0:400", "").replace("8 * 200", "2").replace("28:32", "4:8"), names)
    assert names["ids"].shape == (4, 264, 260) and 0.5 < names["x"].std() < 2
    assert set(names["y"].unique().tolist()) == {0, 1}                  # 255 is no IGNORE here


# -- the folder ------------------------------------------------------------------------------------


def test_what_a_run_writes(trained):
    config = json.loads((trained / "config.json").read_text())
    assert sorted(os.listdir(trained)) == [
        "best.pt", "config.json", "curves.png", "figure.png", "last.pt", "log.csv", "metrics.json",
        "prediction.tif", "slice_dice.png"]
    assert config["args"]["width"] == 4 and len(config["sha256"]["emseg.py"]) == 64
    assert {"schema", "script", "model", "seed", "selected_on", "classes", "volumes", "mean",
            "train_seconds", "predict_seconds", "predict_voxels_per_second", "peak_memory_gib",
            "parameters"} <= set(metrics(trained))


def test_overwrite_replaces_what_the_run_wrote_and_nothing_else(trained, cells, tmp_path, capsys,
                                                                monkeypatch):
    monkeypatch.chdir(tmp_path)                 # the folder may lie below the current one
    out = Path("run")
    shutil.copytree(trained, out)
    (out / "prediction_corrected").mkdir()
    mine = [out / name for name in ("prediction_corrected.tif", "weights_mine.tif",
                                    "prediction_mesh.stl", "prediction_corrected/best.pt")]
    for file in mine:
        file.write_text("a person's")
    assert "give --overwrite" in conftest.refused(train_cps, capsys, *tiny_cps(cells, out))
    run(train_cps, *tiny_cps(cells, out, "--overwrite", "--no-cutmix", "--method", "supervised",
                             "--val-slices", "3"))
    assert all(file.read_text() == "a person's" for file in mine)
    assert "loss_cps" not in log_without_seconds(out)[0]
    assert metrics(out)["selected_on"] == "validation"


def test_overwriting_begins_anew_in_subfolders_too(cells, tmp_path, monkeypatch):
    """Also where it is interrupted and resumed before it has come to them."""
    def begin(*more):
        args = emseg.Run(train_cps.parse_args([
            *map(str, tiny_cps(cells, tmp_path / "run")), *more]), train_cps.__file__).args_of("b")
        return emseg.Run(args, train_cps.__file__)

    child, stage = begin(), tmp_path / "run" / "stages" / "0_coarse.tif"
    stage.parent.mkdir()
    mine = child.path("mine.txt")
    for file in child.path("metrics.json"), mine, stage:
        file.touch()
    assert begin("--resume").finished and stage.exists()
    assert not begin("--overwrite").finished and not begin("--resume").finished
    assert mine.exists() and not stage.exists()


def test_inputs_are_never_deleted(trained, cells, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    kept = (out / "prediction.tif").read_bytes()
    line = conftest.refused(train_cps, capsys, *tiny_cps(cells, out, "--overwrite",
                                                         "--test-volume", out / "prediction.tif"))
    assert "this run reads" in line and (out / "prediction.tif").read_bytes() == kept
    line = conftest.refused(train_cps, capsys, "--checkpoint", out, "--overwrite", "--test-volume",
                            cells / "image.tif", "--out-dir", out)
    assert "this run reads" in line and (out / "best.pt").exists()


def test_a_folder_of_other_files_is_refused(cells, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    for flag in ([], ["--overwrite"]):
        line = conftest.refused(train_cps, capsys, *tiny_cps(cells, tmp_path, *flag))
        assert "holds no run" in line and os.listdir(tmp_path) == ["mine.txt"]


def test_a_finished_run_is_left_alone(trained, capsys):
    before = (trained / "best.pt").stat().st_mtime_ns
    run(train_cps, "--resume", "--out-dir", trained)
    assert "finished" in capsys.readouterr().out
    assert (trained / "best.pt").stat().st_mtime_ns == before


# -- interruption ----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps, number", [(3, signal.SIGINT), (5, signal.SIGTERM)])
def test_interrupted_and_resumed_is_bit_identical(trained, cells, tmp_path, monkeypatch, capsys,
                                                  steps, number):
    """At the end of an epoch, and within one."""
    conftest.interrupt_after(monkeypatch, steps, number)
    with pytest.raises(SystemExit) as stopped:
        run(train_cps, *tiny_cps(cells, tmp_path / "run"))
    assert stopped.value.code == 130 and "--resume --out-dir" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == steps
    monkeypatch.undo()
    run(train_cps, "--resume", "--out-dir", tmp_path / "run")
    assert torch.equal(weights(trained / "last.pt"), weights(tmp_path / "run" / "last.pt"))
    assert log_without_seconds(trained) == log_without_seconds(tmp_path / "run")
    assert metrics(tmp_path / "run")["mean"] == metrics(trained)["mean"]


def test_a_killed_run_goes_on(trained, cells, tmp_path):
    process = subprocess.Popen([sys.executable, ROOT / "train_cps.py",
                                *map(str, tiny_cps(cells, tmp_path / "run"))])
    while not (tmp_path / "run" / "last.pt").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    run(train_cps, "--resume", "--out-dir", tmp_path / "run")
    assert torch.equal(weights(trained / "last.pt"), weights(tmp_path / "run" / "last.pt"))


def test_resume_refuses_other_arguments(trained, capsys):
    line = conftest.refused(train_cps, capsys, "--resume", "--out-dir", trained, "--lr", "0.5")
    assert "--lr was" in line


def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(cells, tmp_path, capsys,
                                                               monkeypatch):
    save, calls = torch.save, []

    def full(content, file):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(content, file)

    monkeypatch.setattr(torch, "save", full)
    line = conftest.refused(train_cps, capsys, *tiny_cps(cells, tmp_path / "run", "--val-slices",
                                                          "3"))
    assert "No space left on device" in line
    assert not list((tmp_path / "run").glob(".*.tmp"))
    monkeypatch.undo()
    run(train_cps, "--resume", "--out-dir", tmp_path / "run")
    assert (tmp_path / "run" / "metrics.json").exists()


def test_a_non_finite_loss_stops_with_epoch_and_step(cells, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_cps, "learning_rate", lambda *args: 1e30)
    line = conftest.refused(train_cps, capsys, *tiny_cps(cells, tmp_path / "run", "--clip", "0"))
    assert re.search("not finite after step|is (nan|inf) in epoch 0, step", line)


# -- checkpoints -----------------------------------------------------------------------------------


def test_a_checkpoint_predicts_as_its_run_did(trained, cells, tmp_path):
    run(train_cps, "--checkpoint", trained / "best.pt", "--test-volume", cells / "image.tif",
        "--test-label", cells / "mito.tif", "--out-dir", tmp_path / "again", "--device", "cpu",
        "--save-probability")
    assert metrics(tmp_path / "again")["mean"] == metrics(trained)["mean"]
    probability = emseg.open_volume(tmp_path / "again" / "probability.tif")[:]
    prediction = emseg.open_volume(tmp_path / "again" / "prediction.tif")[:]
    assert np.array_equal(probability > 0.5, prediction == 1)


@pytest.mark.parametrize("flags", [("--label-slices", "0,1"), ("--model", "resunet")])
def test_a_flag_without_effect_is_refused(trained, cells, capsys, flags):
    assert f"{flags[0]} has no effect" in conftest.refused(
        train_cps, capsys, "--checkpoint", trained, "--test-volume", cells / "image.tif", *flags)


def test_a_training_starts_from_the_networks_of_another(trained, cells, tmp_path, capsys):
    """--init: with a rate of almost 0 the weights stay those of the other run."""
    for init in trained, trained / "best.pt":
        run(train_cps, *tiny_cps(cells, tmp_path / "next", "--init", init, "--lr", "1e-12",
                                  "--label-slices", "0,5", "--overwrite"))
        one, other = [emseg.load_checkpoint(each)["modules"]["network"]
                      for each in (trained, tmp_path / "next")]
        for key in [key for key in one if key.endswith(("weight", "bias"))]:
            torch.testing.assert_close(one[key], other[key], rtol=0, atol=1e-9)
        assert metrics(tmp_path / "next")["volumes"][0]["used"] == [2, 5, 7, 9]     # of both runs
    line = conftest.refused(train_cps, capsys, *tiny_cps(
        cells, tmp_path / "other", "--init", trained, "--width", "5"))
    assert "does not fit this network" in line and not (tmp_path / "other").exists()


def test_quick_is_a_dictionary_of_flags_and_what_is_typed_wins():
    args = train_cps.parse_args(["--volume", "a.tif", "--label", "b.tif", "--quick", "--lr", "1"])
    assert args.width < 64 and args.lr == 1 and args.epochs * args.steps_per_epoch < 1000


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_a_strangers_checkpoint_runs_no_code(cells, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"a": 1}, "foreign.pt")
    for name in "evil.pt", "foreign.pt", "none.pt":
        line = conftest.refused(train_cps, capsys, "--checkpoint", name, "--test-volume",
                                cells / "image.tif")
        assert name in line
    assert not (tmp_path / "evil").exists()


def test_a_checkpoint_of_another_script_is_refused(trained, cells, capsys):
    line = conftest.refused(train_seget, capsys, "--checkpoint", trained, "--test-volume",
                            cells / "image.tif")
    assert "train_cps.py" in line


def test_two_processes_train_and_predict_together(cells, tmp_path):
    out = conftest.two_processes(train_cps, *tiny_cps(cells, tmp_path / "two",
                                                      "--val-slices", "3"))
    assert out.count("2 processes") == 1
    run(train_cps, "--checkpoint", tmp_path / "two", "--test-volume", cells / "image.tif",
        "--device", "cpu", "--out-dir", tmp_path / "one")
    two, one = [emseg.open_volume(tmp_path / name / "prediction.tif") for name in ("two", "one")]
    assert np.array_equal(two[:], one[:])


# -- bad input: one line, exit status 2, nothing written -------------------------------------------


@pytest.mark.parametrize("change, words", [
    (["--volume", "none.tif"], "no such file"),
    (["--label", "{cells}/mito.tif@0:4"], "cropped elsewhere"),
    (["--label", "{cells}/label.tif@2:10", "--classes", "background", "cell"], "--label-map"),
    (["--label-map", "255=0,*=0"], "shows the class"),
    (["--label-slices", "0,8"], "outside the volume"),
    (["--label-slices", "0:8"], "every slice is labelled"),
    (["--val-slices", "0,3,7"], "no slice is left to train on"),
    (["--val-slices", "n=9"], "wanted 1 to 5"),
    (["--volume", "{cells}/image.tif@2:10", "{cells}/image.tif@2:10"], "one label for each volume"),
    (["--test-label", "{cells}/mito.tif@0:4"], "cropped elsewhere"),
    (["--patch-size", "30", "32"], "nearest to 30: 24 or 32"),
    (["--patch-size", "512", "512"], "--downsample"),
    (["--patch-size", "32"], "two sides, Y X"),
    (["--downsample", "64"], "--downsample"),
    (["--classes", "cell"], "two names at least"),
    (["--batch-size", "6"], "multiple of 4"),
    (["--lr", "0"], "not between"),
    (["--cps-warmup", "3", "1"], "START must be below END"),
    (["--device", "cuda:77"], "--device cuda:77"),
    (["--overwrite", "--resume"], "not allowed with"),
    (["--demo"], "makes its own data"),
    (["--model", "ceecnet", "--width", "12"], "multiples of 8"),
    (["--average-branches"], "unet has no branches"),
])
def test_bad_input_is_one_line_and_leaves_nothing(cells, tmp_path, capsys, change, words):
    out = tmp_path / "out"
    change = [text.format(cells=cells) for text in change]
    assert words in conftest.refused(train_cps, capsys, *tiny_cps(cells, out, *change))
    assert not out.exists()


def test_nan_is_found_before_anything_begins(cells, tmp_path, capsys):
    image = emseg.open_volume(cells / "image.tif")[:].astype(np.float32)
    image[5, 3, 4] = np.nan
    np.save(tmp_path / "nan.npy", image)
    line = conftest.refused(train_cps, capsys, *tiny_cps(
        cells, tmp_path / "run", "--volume", tmp_path / "nan.npy@2:10"))
    assert "z = 3 holds NaN" in line and not (tmp_path / "run").exists()


def test_a_class_that_downsampling_removes_is_named(tmp_path, capsys):
    image, label = np.zeros((4, 64, 64), np.uint8), np.zeros((4, 64, 64), np.uint8)
    label[:, ::8, ::8] = 1
    np.save(tmp_path / "image.npy", image), np.save(tmp_path / "label.npy", label)
    line = conftest.refused(train_cps, capsys, "--volume", tmp_path / "image.npy", "--label",
                            tmp_path / "label.npy", "--out-dir", tmp_path / "run", *TINY,
                            "--downsample", "4", "--patch-size", "16", "16", "--method",
                            "supervised")
    assert "--downsample 4" in line
    label[0, :4, :4] = 1                        # the only block that is left
    np.save(tmp_path / "label.npy", label)
    args = train_cps.parse_args(["--volume", f"{tmp_path}/image.npy", "--label",
                                 f"{tmp_path}/label.npy"])
    emseg.check_annotation(emseg.open_training(args)[0], args)
    assert "class 1 shrinks from" in capsys.readouterr().out


def test_threads_are_told_to_sleep_before_torch_is_loaded():
    assert os.environ["OMP_WAIT_POLICY"] == "passive" and os.environ["GOMP_SPINCOUNT"] == "1000"
    for script in sorted(ROOT.glob("[te]*.py")):
        first = re.search(r"^(?:import|from) (emseg|numpy|torch|scipy)", script.read_text(), re.M)
        assert first[1] == "emseg" or script.name == "emseg.py"


def test_help_shows_the_whole_docstring(capsys):
    for script in conftest.scripts():
        with pytest.raises(SystemExit):
            script.parse_args(["--help"])
        out = capsys.readouterr().out
        assert "Differences from the paper:" in out and "--label-slices" in out


def test_readme_commands_parse():
    for script in [*conftest.scripts(), evaluate]:
        commands = conftest.readme_commands(f"{script.__name__}.py")
        assert commands
        for command in commands:
            if not {"--resume", "--checkpoint", "--init", "--ensemble"} & set(command):
                script.parse_args(command)
