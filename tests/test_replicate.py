"""tests/replicate.py: every command parses, and the README shows the results."""

import csv
import importlib
import json
import re
from pathlib import Path

import emseg
import pytest
import replicate

ROOT = Path(replicate.__file__).resolve().parent.parent


@pytest.mark.parametrize("budget", ("cpu", "gpu"))
@pytest.mark.parametrize("name", replicate.EXPERIMENTS)
def test_every_command_parses(name, budget, tmp_path, monkeypatch):
    monkeypatch.setattr(replicate, "doubtful_slice", lambda folder: 7)
    monkeypatch.setattr(emseg, "load_checkpoint", lambda path: {"args": {"seed": 3}})
    for variant in replicate.EXPERIMENTS[name].variants:
        job = replicate.Job(name, variant, 3, budget, "cpu", tmp_path)
        for seed in "345":                                      # of instances
            (job.out_dir() / f"seed{seed}").mkdir(parents=True)
        script, *flags = job.command()
        args = importlib.import_module(script.removesuffix(".py")).parse_args(flags)
        assert args.seed == 3 and args.test_volume + args.val_volume + args.volume


def test_readme_shows_the_table():
    shown = re.search(r"<!-- results -->\n(.*?)\n<!-- /results -->",
                      (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert shown[1].strip() == replicate.table()


def test_rows_of_stages_count_as_done_and_reach_the_table(tmp_path, monkeypatch):
    """A run's metrics.json becomes rows; its predictions go; the table has mean and spread."""
    results = tmp_path / "results.csv"
    results.write_text(",".join(replicate.COLUMNS) + "\n")
    monkeypatch.setattr(replicate, "RESULTS", results)
    for seed, iou in enumerate((0.8, 0.9)):
        job = replicate.Job("sparse", "every 5th", seed, "cpu", "cpu", tmp_path)
        assert not job.is_done()
        folder = job.out_dir()
        folder.mkdir(parents=True)
        block = {"iou": iou, "per_class": {"mitochondrion": {"dice": 0.95, "iou": iou}}}
        (folder / "metrics.json").write_text(json.dumps(dict(
            mean=block, stages={"coarse": {**block, "iou": 0.5}, "scm": block}, train_seconds=0.0,
            predict_seconds=None, peak_memory_gib=1.5)))
        (folder / "config.json").write_text(json.dumps(dict(
            precision="float32", versions={"torch": "2"}, git=None)))
        (folder / "log.csv").write_text("epoch,step,seconds\n0,10,60\n1,20,120.0\n")
        (folder / "prediction.tif").touch()
        folder.with_name(f"{folder.name}.txt").touch()
        replicate.finish(job, 0)
        assert job.is_done()
        assert sorted(file.name for file in folder.iterdir()) == ["log.csv", "metrics.json"]
    row = [line for line in replicate.table().splitlines() if "every 5th: scm" in line]
    assert len(row) == 1 and "0.850 ± 0.071 (2) | 0.890 | 20 | 2.0 |" in row[0]
    assert list(csv.DictReader(results.open()))[0]["scores"] == "mitochondrion 0.9500 0.8000"
