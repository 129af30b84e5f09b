"""evaluate.py --runs: one table of finished runs, made ones and those that the scripts write."""

import csv
import json
import re
import shutil
import time

import numpy as np
import pytest
import tifffile
from matplotlib.image import imread

import conftest
import emseg
import evaluate
import train_2d3d
import train_cps
import train_partial
import train_seget
from conftest import metrics, refused

TINY = ["--patch-size", "32", "32", "--batch-size", "4", "--epochs", "1", "--steps-per-epoch", "1",
        "--width", "4", "--device", "cpu"]


def block(classes, value, **more):
    """A mean block of metrics.json in which each score is a value, or as `more` says."""
    scores = dict.fromkeys(("dice", "iou", "precision", "recall"), value)
    return {"per_class": {name: {**scores, **more} for name in classes[1:]},
            **dict.fromkeys(("dice", "iou", "miou", "accuracy"), value), **more}


def made(folder, value=0.5, seed=0, script="train_cps.py", model="unet", label="label.tif",
         classes=("background", "mito"), more=None, args=None, sha256="a", **content):
    """A run folder with these scores and arguments."""
    folder.mkdir(parents=True)
    mean = value if isinstance(value, dict) else block(classes, value, **(more or {}))
    emseg.write_json(folder / "metrics.json", emseg.metrics_content(
        script, list(classes), [{"volume": "image.tif", "label": label}], mean, **{
            "model": model, "seed": seed, **content}))
    emseg.write_json(folder / "config.json", {
        "args": {"seed": seed, "out_dir": str(folder), "lr": 0.1, "label_slices": "n=7",
                 **(args or {})}, "sha256": {"emseg.py": sha256}, "part_of": None})
    return folder


def cells_of(line):
    """The cells of a line of a Markdown table."""
    assert line.startswith("| ") and line.endswith(" |")
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def tables(out):
    """{heading: rows as dicts} of table.md; each of its rows has as many cells."""
    found = {}
    for text in re.split("^### ", (out / "table.md").read_text(encoding="utf-8"), flags=re.M)[1:]:
        heading, _, heads, rule, *lines = text.strip().split("\n")
        heads = cells_of(heads)
        assert all(set(cell) == {"-"} for cell in cells_of(rule)) and heading not in found
        assert {len(cells_of(line)) for line in [rule, *lines]} == {len(heads)}
        assert len(set(heads)) == len(heads)
        found[heading] = [dict(zip(heads, cells_of(line))) for line in lines]
    return found


def tabulate(tmp_path, *arguments):
    """All tables of these runs."""
    conftest.run(evaluate, "--out-dir", tmp_path / "out", "--overwrite", "--runs", *arguments)
    return tables(tmp_path / "out")


def only(found):
    """The rows of the only table."""
    (rows,) = found.values()
    return rows


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def no_picture(monkeypatch):
    """No histogram is drawn, which takes most of the time."""
    monkeypatch.setattr(emseg, "save_histogram", lambda *arguments: None)


# -- means -----------------------------------------------------------------------------------------


def test_scores_are_means_and_sample_deviations_over_seeds(tmp_path):
    values = [0.61, 0.7, 0.86]
    runs = [made(tmp_path / f"{seed}", value, seed) for seed, value in enumerate(values)]
    other = made(tmp_path / "other", 0.5, model="resunet")
    rows = only(tabulate(tmp_path, *runs, other))
    mean, deviation = np.mean(values), np.std(values, ddof=1)
    for head in ("Dice mito", "IoU mito", "mIoU"):
        assert [row[head] for row in rows] == [f"**{mean:.4f} ± {deviation:.4f}**", "0.5000"]
    assert [row["runs"] for row in rows] == ["3", "1"]
    group = rows_of(tmp_path / "out" / "table.csv")[0]
    assert float(group["dice_mito_mean"]) == pytest.approx(mean, rel=1e-15)
    assert float(group["dice_mito_std"]) == pytest.approx(deviation, rel=1e-14)
    assert group["seeds"] == "0 1 2" and group["runs"] == "3"


def test_undefined_scores_are_left_out_and_counted(tmp_path):
    for number, value in enumerate([0.4, None, 0.6]):
        made(tmp_path / "a" / f"{number}", 0.5, number, more={"iou": value})
    made(tmp_path / "b", 0.5, model="resunet", more={"iou": None})
    some, none = only(tabulate(tmp_path, *sorted((tmp_path / "a").iterdir()), tmp_path / "b"))
    assert some["IoU mito"] == f"0.5000 ± {np.std([0.4, 0.6], ddof=1):.4f} (2 of 3)"
    assert some["Dice mito"].startswith("**0.5000 ±") and none["IoU mito"] == "undefined"
    groups = rows_of(tmp_path / "out" / "table.csv")
    assert groups[1]["iou_mito_mean"] == groups[1]["iou_mito_std"] == ""


def test_the_best_are_bold_and_short_distances_are_better(tmp_path):
    distances = {"hd95_nm": (30.0, 20.0, 40.0), "assd_nm": (5.0, 7.0, 5.00004)}
    for number, value in enumerate((0.80001, 0.8, 0.79)):
        made(tmp_path / f"{number}", value, model=f"m{number}",
             more={key: each[number] for key, each in distances.items()})
    rows = only(tabulate(tmp_path, *[tmp_path / f"{n}" for n in range(3)], "--scores", "dice",
                         "hd95_nm", "assd_nm"))
    bold = {head: [row[head].startswith("**") for row in rows] for head in rows[0]}
    assert bold["Dice mito"] == bold["mIoU"] == [True, True, False]         # as equal as they look
    assert bold["HD95 [nm] mito"] == [False, True, False]
    assert bold["ASSD [nm] mito"] == [True, False, True]
    assert rows[1]["HD95 [nm] mito"] == "**20.0**" and "IoU mito" not in rows[0]


def test_columns_of_several_classes(tmp_path):
    """The scores of each, their means, and MIoU(org) where a run has it."""
    classes = ("background", "mito", "vesicle")
    made(tmp_path / "a", 0.5, classes=classes)
    value = block(classes, 0.6)
    value["per_class"]["vesicle"]["dice"] = 0.2
    made(tmp_path / "b", value | {"miou_org": 0.3, "dice": 0.4}, model="resunet", classes=classes)
    first, second = only(tabulate(tmp_path, tmp_path / "a", tmp_path / "b"))
    assert [*first][4:-3] == ["Dice mito", "Dice vesicle", "IoU mito", "IoU vesicle", "mean Dice",
                              "mean IoU", "mIoU", "MIoU(org)"]
    assert [second[head] for head in ("Dice mito", "Dice vesicle", "mean Dice", "MIoU(org)")] == [
        "**0.6000**", "0.2000", "0.4000", "0.3000"]
    assert first["MIoU(org)"] == "undefined"


def test_parameters_and_times(tmp_path):
    for seed, (parameters, seconds, rate) in enumerate([(1_234_560, 600, 2e6), (99, 1200, None)]):
        made(tmp_path / f"{seed}", seed=seed, parameters=parameters, train_seconds=seconds,
             predict_voxels_per_second=rate)
    made(tmp_path / "foreign", model=None, script="evaluate.py", seed=None)
    row, foreign = only(tabulate(tmp_path, *[tmp_path / n for n in ("0", "1", "foreign")]))
    assert row["parameters"] == "99 to 1,234,560"
    assert row["training [min]"] == f"15 ± {np.std([10, 20], ddof=1):.2g}"
    assert row["prediction [Mvoxel/s]"] == "2"
    assert [foreign[key] for key in [*row][-3:]] == ["", "", ""]
    group = rows_of(tmp_path / "out" / "table.csv")[0]
    assert float(group["train_seconds_mean"]) == 900
    assert float(group["predict_voxels_per_second_mean"]) == 2e6


# -- rows ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("script, args, stages, method", [
    ("train_cps.py", {"method": "cps", "cutmix": True}, None, "CPS + CutMix"),
    ("train_cps.py", {"method": "cps", "cutmix": False}, None, "CPS"),
    ("train_cps.py", {"method": "supervised", "cutmix": True}, None, "supervised"),
    ("train_partial.py", {"partial": [["a.tif", "b.tif", "3=1"]]}, None, "mixed labels"),
    ("train_partial.py", {"partial": []}, None, "baseline"),
    ("train_partial.py", {"partial": [["a.tif", "b.tif", "3=1"]]}, ["baseline", "mixed"],
     ["baseline", "mixed"]),
    ("train_sparse.py", {"mpp": False, "scm": False}, ["coarse"],
     "no mpp, no scm coarse"),
    ("train_sparse.py", {"mpp": True, "scm": True}, ["coarse", "mpp", "scm"],
     ["coarse", "mpp", "scm"]),
    ("evaluate.py", {"prediction": ["cells.tif"]}, None, "cells.tif"),
])
def test_a_method_is_named_by_its_arguments(tmp_path, script, args, stages, method):
    classes = ("background", "mito")
    more = {"stages": {name: block(classes, 0.1 + n / 10) for n, name in enumerate(stages)}} if (
        stages) else {}
    made(tmp_path / "a", 0.7, script=script, args=args, **more)
    rows = only(tabulate(tmp_path, tmp_path / "a"))
    methods = method if isinstance(method, list) else [method]
    assert [(row["script"], row["model"], row["method"]) for row in rows] == [
        (script, "unet", name) for name in methods]
    wanted = [f"{0.1 + n / 10:.4f}" for n in range(len(stages))] if stages else ["0.7000"]
    assert [row["Dice mito"].strip("*") for row in rows] == wanted


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("key, one, two, words", [
    ("label_slices", "n=7", "n=15", ["--label-slices n=7", "--label-slices n=15"]),
    ("width", 8, 16, ["--width 8", "--width 16"]),
    ("lr", 0.1, 0.01, ["--lr 0.1", "--lr 0.01"]),
    ("patch_size", [8, 8], [16, 16], ["--patch-size 8 8", "--patch-size 16 16"]),
    ("weights", [0.5, 1.0], [1e-3, 1.0], ["--weights 0.5 1", "--weights 0.001 1"]),
    ("tta", True, False, ["--tta yes", "--tta no"]),
    ("epochs", None, 3, ["--epochs default", "--epochs 3"]),
    ("volume", ["data/a.tif@0:8"], ["data/b.tif", "c.tif"],
     ["--volume a.tif@0:8", "--volume b.tif c.tif"]),
    ("volume", ["one/a.tif"], ["two/a.tif"], ["--volume one/a.tif", "--volume two/a.tif"]),
    ("label", ["drawn.tif"], ["coarse.tif"], ["--label drawn.tif", "--label coarse.tif"]),
    ("label_map", "1=1,*=0", "2=1,*=0", ["--label-map 1=1,*=0", "--label-map 2=1,*=0"]),
    ("organelles", [1], [1, 2], ["--organelles 1", "--organelles 1 2"]),
    ("partial", [], [["p.tif", "l.tif", "3=1"]], ["baseline", "mixed labels"]),
    ("partial", [["p.tif", "l.tif", "3=1"]], [["p.tif", "l.tif", "3=1"], ["q.tif", "m.tif", "2=1"]],
     ["mixed labels, --partial p.tif l.tif 3=1",
      "mixed labels, --partial p.tif l.tif 3=1 q.tif m.tif 2=1"]),
])
def test_trainings_of_other_settings_are_not_averaged(tmp_path, key, one, two, words):
    for number, value in enumerate((one, two, one)):
        made(tmp_path / f"{number}", 0.5 + number / 10, number, args={key: value})
    made(tmp_path / "other", 0.1, model="resunet", args={key: two})
    rows = only(tabulate(tmp_path, *[tmp_path / n for n in ("0", "1", "2", "other")]))
    assert [row["method"] for row in rows[:2]] == words
    assert key == "partial" or rows[2]["method"] == ""   # nothing of this model differs
    assert [row["runs"] for row in rows] == ["2", "1", "1"]
    assert [row["Dice mito"].strip("*") for row in rows] == ["0.6000 ± 0.1414", "0.6000", "0.1000"]


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("key, values", [
    ("seed", (0, 1)), ("out_dir", ("a", "b")), ("device", ("cpu", "cuda")), ("workers", (0, 4)),
    ("amp", (True, False)), ("compile", (True, False)), ("save_probability", (True, False))])
def test_what_changes_no_training_is_averaged(tmp_path, key, values):
    for number, value in enumerate(values):
        made(tmp_path / f"{number}", 0.5, number, args={key: value})
    (row,) = only(tabulate(tmp_path, tmp_path / "0", tmp_path / "1"))
    assert row["runs"] == "2" and row["method"] == ""


def test_a_setting_that_an_older_version_did_not_have_makes_no_difference(tmp_path):
    made(tmp_path / "old", seed=0)
    made(tmp_path / "new", seed=1, args={"tta": False})
    (row,) = only(tabulate(tmp_path, tmp_path / "old", tmp_path / "new"))
    assert row["runs"] == "2"


def test_other_labels_and_classes_make_tables_in_the_order_given(tmp_path):
    made(tmp_path / "a", label="b/two.tif")
    made(tmp_path / "b", label="one.tif", model="z")
    made(tmp_path / "c", label="one.tif", model="a")
    made(tmp_path / "d", label="b/two.tif", classes=("background", "nucleus"))
    found = tabulate(tmp_path, *[tmp_path / n for n in "abcd"])
    assert list(found) == ["mito, scored on two.tif", "mito, scored on one.tif",
                           "nucleus, scored on two.tif"]
    assert [row["model"] for row in found["mito, scored on one.tif"]] == ["z", "a"]
    assert [row["model"] for row in tabulate(tmp_path, tmp_path / "c", tmp_path / "b")[
        "mito, scored on one.tif"]] == ["a", "z"]
    assert [row["scored_on"] for row in rows_of(tmp_path / "out" / "runs.csv")] == ["one.tif"] * 2


@pytest.mark.parametrize("given, wanted", [
    (["n-10", "n-15", "n-7"], ["7", "10", "15"]),           # as a shell sorts a pattern
    (["n-15", "n-7", "n-10"], ["15", "7", "10"])])          # as a person wrote it
def test_numbers_of_a_shell_pattern_are_sorted(tmp_path, given, wanted):
    for name in given:
        made(tmp_path / name, args={"label_slices": f"n={name[2:]}"})
    rows = only(tabulate(tmp_path, *[tmp_path / name for name in given]))
    assert [row["method"] for row in rows] == [f"--label-slices n={n}" for n in wanted]


def test_settings_without_effect_do_not_split_supervised_runs(tmp_path):
    for seed, warmup in enumerate(([5, 20], [1, 2])):
        made(tmp_path / f"s{seed}", seed=seed, args={"method": "supervised", "cps_warmup": warmup})
        made(tmp_path / f"c{seed}", seed=seed, args={"method": "cps", "cps_warmup": warmup})
    rows = only(tabulate(tmp_path, *[tmp_path / n for n in ("s0", "s1", "c0", "c1")]))
    assert [(row["method"], row["runs"]) for row in rows] == [
        ("supervised", "2"), ("CPS, --cps-warmup 5 20", "1"), ("CPS, --cps-warmup 1 2", "1")]


def test_evaluations_of_runs_are_averaged_over_their_seeds(tmp_path):
    for seed in range(2):
        out = made(tmp_path / f"e{seed}", 0.5 + seed / 10, seed=seed, script="evaluate.py",
                   args={"prediction": [f"runs/{seed}/prediction.tif"]})
        config = json.loads((out / "config.json").read_text())
        config["training"] = {"script": "train_cps.py", "args": {"method": "supervised", "lr": 1}}
        (out / "config.json").write_text(json.dumps(config))
    (row,) = only(tabulate(tmp_path, tmp_path / "e0", tmp_path / "e1"))
    assert (row["script"], row["method"]) == ("train_cps.py", "supervised, by evaluate.py")
    assert row["Dice mito"] == "0.5500 ± 0.0707"


def test_labels_of_the_same_name_are_told_apart(tmp_path):
    for name in ("one", "two"):
        made(tmp_path / name, label=f"{name}/label.tif")
    assert list(tabulate(tmp_path, tmp_path / "one", tmp_path / "two")) == [
        "mito, scored on one/label.tif", "mito, scored on two/label.tif"]
    assert [run["scored_on"] for run in rows_of(tmp_path / "out" / "runs.csv")] == [
        "one/label.tif", "two/label.tif"]


def test_a_folder_given_twice_counts_once(tmp_path):
    run = made(tmp_path / "a")
    (tmp_path / "link").symlink_to(run)
    (row,) = only(tabulate(tmp_path, run, run, tmp_path / "link", tmp_path / "b" / ".." / "a"))
    assert row["runs"] == "1" and "±" not in row["Dice mito"]


def test_the_output_folder_is_no_run(tmp_path, capsys):
    made(tmp_path / "a", 0.3)
    out = made(tmp_path / "out", 0.9)               # as an evaluation of a pair leaves it
    (out / "config.json").write_text('{"files": ["config.json", "metrics.json"]}')
    (row,) = only(tabulate(tmp_path, tmp_path / "a", tmp_path / "out"))
    assert row["Dice mito"] == "0.3000" and "skipped" not in capsys.readouterr().out
    only(tabulate(tmp_path, tmp_path / "a", tmp_path / "out"))
    assert "skipped" not in capsys.readouterr().out


def test_hundreds_of_runs_take_seconds(tmp_path):
    args = {f"setting{n}": n for n in range(60)}
    for number in range(300):
        made(tmp_path / "runs" / f"{number:03}", number / 300, number,
             args=args | {"lr": 0.1 * (1 + number // 100)})
    started = time.monotonic()
    rows = only(tabulate(tmp_path, *sorted((tmp_path / "runs").iterdir())))
    assert time.monotonic() - started < 5
    assert [row["runs"] for row in rows] == ["100"] * 3
    runs = rows_of(tmp_path / "out" / "runs.csv")
    assert [float(run["dice"]) for run in runs] == [n / 300 for n in range(300)]


# -- parts of runs ---------------------------------------------------------------------------------


def ensemble(folder, part_of=True):
    """A made run of two instances."""
    instances = {f"seed{seed}": {"model": "unet", "seed": seed, "mean": block(
        ("background", "mito"), 0.4 + seed / 10)} for seed in (0, 1)}
    made(folder, 0.6, script="train_2d3d.py", instances=instances, parameters=20,
         ensemble={"members": ["seed0", "seed1"]})
    for seed in (0, 1):
        part = made(folder / f"seed{seed}", 0.4 + seed / 10, seed, script="train_2d3d.py",
                    parameters=10, train_seconds=60 * (1 + seed))
        config = evaluate.json.loads((part / "config.json").read_text())
        emseg.write_json(part / "config.json", {**config, "part_of": str(folder)})
    return folder


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("given", [["."], [".", "seed0"], ["seed1", ".", "seed0"]])
def test_instances_are_a_row_next_to_their_ensemble(tmp_path, given):
    folder = ensemble(tmp_path / "run")
    whole, parts = only(tabulate(tmp_path, *[folder / name for name in given]))
    assert (whole["method"], whole["runs"]) == ("ensemble of 2", "1")
    assert (parts["method"], parts["runs"]) == ("", "2")
    assert (whole["Dice mito"], parts["Dice mito"]) == ("**0.6000**", "0.4500 ± 0.0707")
    assert (whole["parameters"], parts["parameters"]) == ("20", "10")
    assert parts["training [min]"] == "1.5 ± 0.71"
    assert [(run["run"], run["seed"]) for run in rows_of(tmp_path / "out" / "runs.csv")] == [
        (str(folder), "0"), (str(folder / "seed0"), "0"), (str(folder / "seed1"), "1")]


def test_an_instance_without_its_whole_counts(tmp_path, capsys):
    folder = ensemble(tmp_path / "run")
    (folder / "metrics.json").write_text("{")
    (row,) = only(tabulate(tmp_path, folder, folder / "seed1"))
    assert row["Dice mito"] == "0.5000" and f"skipped {folder}: damaged" in capsys.readouterr().out


def test_structures_are_a_row_of_masks_by_themselves(tmp_path):
    classes = ("background", "a", "b")
    structures = {"a": block(classes[:2], 0.7), "b": block(("background", "b"), 0.8)}
    made(tmp_path / "run", 0.6, classes=classes, script="train_seget.py", structures=structures,
         average=dict.fromkeys(("dice", "iou", "miou", "accuracy"), 0.75))
    merged, masks = only(tabulate(tmp_path, tmp_path / "run"))
    assert (merged["method"], masks["method"]) == ("", "masks by themselves")
    assert [masks[f"Dice {name}"] for name in "ab"] == ["**0.7000**", "**0.8000**"]
    assert merged["Dice a"] == "0.6000" and masks["mIoU"] == "**0.7500**"
    made(tmp_path / "part", 0.6, classes=classes, script="train_seget.py",
         structures=structures | {"b": None}, average=None)
    assert len(only(tabulate(tmp_path, tmp_path / "part"))) == 1


@pytest.mark.parametrize("args, wanted", [
    ({}, ["", "20"]), ({"compare": True}, ["", ""])])
def test_the_parameters_of_all_stages_are_those_of_the_last(tmp_path, args, wanted):
    """Those of a comparison belong to two networks, of one stage each."""
    stages = {name: block(("background", "mito"), 0.5) for name in ("one", "two")}
    made(tmp_path / "a", script="train_partial.py", stages=stages, args=args, parameters=20,
         train_seconds=60, predict_voxels_per_second=1e6)
    rows = only(tabulate(tmp_path, tmp_path / "a"))
    assert [row["parameters"] for row in rows] == wanted
    for key, value in (("training [min]", "1"), ("prediction [Mvoxel/s]", "1")):
        assert [row[key] for row in rows] == [text and value for text in wanted]


# -- what the scripts write ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(cells, tmp_path_factory):
    """Tiny runs: train_cps of two seeds and of another method, train_2d3d of two instances,
    train_partial --compare, train_seget."""
    runs = tmp_path_factory.mktemp("runs")
    image, mito, label = [cells / f"{name}.tif" for name in ("image", "mito", "label")]

    def tested_on(path):
        return ["--test-volume", f"{image}@8:9", "--test-label", f"{path}@8:9"]

    for name, more in (("cps0", []), ("cps1", ["--seed", "1"]),
                       ("alone", ["--method", "supervised"])):
        conftest.run(train_cps, "--volume", f"{image}@0:4", "--label", f"{mito}@0:4",
                     "--label-slices", "0,2", "--downsample", "2", "--model", "unet", "--classes",
                     "background", "mito", "--cps-warmup", "0", "1", *tested_on(mito), *TINY, *more,
                     "--out-dir", runs / name)
    conftest.run(train_2d3d, "--volume", f"{image}@0:3", "--label", f"{label}@0:3",
                 *tested_on(label), "--instances", "2", "--width", "2", "--patch-size", "3", "60",
                 "60", "--spacing", "2", "32", "32", "--epochs", "1", "--steps-per-epoch", "1",
                 "--batch-size", "1", "--elastic", "3", "--out-dir", runs / "2d3d")
    conftest.run(train_partial, "--volume", f"{image}@0:3", "--label", f"{label}@0:3", "--partial",
                 f"{image}@3:6", f"{label}@3:6", "3=0,4=0", "--compare", "--classes",
                 *emseg.PHANTOM_CLASSES, *tested_on(label), *TINY, "--model", "unet", "--out-dir",
                 runs / "partial")
    vesicle = runs / "vesicle.tif"
    tifffile.imwrite(vesicle, (tifffile.imread(label) == 4).astype(np.uint8))
    parts = [[f"a={mito}@{crop}", f"b={vesicle}@{crop}"] for crop in ("0:3", "8:9")]
    conftest.run(train_seget, "--volume", f"{image}@0:3", "--label", *parts[0], "--test-volume",
                 f"{image}@8:9", "--test-label", *parts[1], *TINY, "--width", "2", "--out-dir",
                 runs / "seget")
    return runs


def test_real_runs_of_train_cps(real, tmp_path):
    both, alone = only(tabulate(tmp_path, real / "cps0", real / "cps1", real / "alone"))
    contents = [metrics(real / name) for name in ("cps0", "cps1", "alone")]
    dice = [content["mean"]["per_class"]["mito"]["dice"] for content in contents]
    assert (both["method"], both["runs"]) == ("CPS + CutMix", "2")
    assert (alone["method"], alone["runs"]) == ("supervised", "1")
    mean, deviation = np.mean(dice[:2]), np.std(dice[:2], ddof=1)
    assert both["Dice mito"].strip("*") == f"{mean:.4f} ± {deviation:.4f}"
    assert alone["Dice mito"].strip("*") == f"{dice[2]:.4f}"
    assert both["parameters"] == f"{contents[0]['parameters']:,}"
    assert all(both[head] for head in [*both][-2:])


def test_real_runs_of_train_2d3d(real, tmp_path, capsys):
    whole, parts = only(tabulate(tmp_path, real / "2d3d", real / "2d3d" / "seed0"))
    found = metrics(real / "2d3d")
    assert (whole["method"], parts["method"]) == ("ensemble of 2", "") and parts["runs"] == "2"
    mious = [part["mean"]["miou"] for part in found["instances"].values()]
    assert whole["mIoU"].strip("*") == f"{found['mean']['miou']:.4f}"
    assert parts["mIoU"].strip("*") == f"{np.mean(mious):.4f} ± {np.std(mious, ddof=1):.4f}"
    assert whole["parameters"] != parts["parameters"] != ""
    assert "warning" not in capsys.readouterr().out


def test_real_stages_and_structures(real, tmp_path):
    stages, structures = tabulate(tmp_path, real / "partial", real / "seget").values()
    found = metrics(real / "partial")["stages"]
    assert [row["method"] for row in stages] == ["baseline", "mixed"]
    assert [row["mIoU"].strip("*") for row in stages] == [
        f"{found[name]['miou']:.4f}" for name in ("baseline", "mixed")]
    masks = metrics(real / "seget")["structures"]
    assert [row["method"] for row in structures] == ["", "masks by themselves"]
    for name in "ab":
        assert structures[1][f"Dice {name}"].strip("*") == (
            f"{masks[name]['per_class'][name]['dice']:.4f}")


# -- what is no run --------------------------------------------------------------------------------


def changed(**content):
    """Write metrics.json with other content."""
    def write(folder):
        emseg.write_json(folder / "metrics.json", {**metrics(folder), **content})
    return write


def text(text, name="metrics.json"):
    def write(folder):
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return write


def scored(**scores):
    """metrics.json with these scores of mitochondria."""
    return changed(mean=block(("background", "mito"), 0.5, **scores))


def nothing(folder):
    shutil.rmtree(folder)


def a_file(folder):
    nothing(folder)
    folder.touch()


def without(*names):
    def remove(folder):
        for name in names:
            (folder / name).unlink()
    return remove


NO_RUN = {
    "truncated": (text('{"schema": 1, "script": "tr'), "damaged"),
    "empty": (text(""), "damaged"), "binary": (text(b"\x89PNG\xff\x00\n"), "damaged"),
    "list": (text("[1, 2]"), "damaged"), "number": (text("5"), "damaged"),
    "keys": (text('{"schema": 1}'), "damaged"), "deep": (text("[" * 10**5), "damaged"),
    "schema": (changed(schema=2), "metrics.json of schema 2, wanted 1"),
    "string": (scored(dice="0.5"), "damaged (TypeError: dice is '0.5')"),
    "nan": (text('{"schema": 1, "mean": NaN}'), "damaged"),
    "nan score": (lambda folder: text((folder / "metrics.json").read_text().replace(
        "0.5", "NaN"))(folder), "damaged (TypeError: dice is nan)"),
    "infinite": (lambda folder: text((folder / "metrics.json").read_text().replace(
        "0.5", "1e999"))(folder), "damaged (TypeError: dice is inf)"),
    "count": (scored(tp="x"), "damaged (TypeError: tp is"),
    "other key": (scored(mine=[1]), "damaged (TypeError: mine is"),
    "huge": (scored(dice=10**400), "damaged"), "overflow": (scored(dice=1.7e308), "damaged"),
    "mean list": (changed(mean=[]), "damaged"), "mean text": (changed(mean="0.5"), "damaged"),
    "per class": (changed(mean={"per_class": {"mito": 0.5}}), "damaged"),
    "classes": (changed(classes=5), "damaged"), "class ids": (changed(classes=[0, 1]), "damaged"),
    "class lists": (changed(classes=[[], []]), "damaged"),
    "no class": (changed(classes=["a"]), "damaged"),
    "class text": (changed(classes="ab"), "damaged"),
    "script": (changed(script=5), "damaged"), "model": (changed(model={}), "damaged"),
    "seed": (changed(seed=[1]), "damaged"), "volumes": (changed(volumes=["a"]), "damaged"),
    "parameters": (changed(parameters="many"), "damaged"),
    "seconds": (changed(train_seconds="long"), "damaged"),
    "rate": (changed(predict_voxels_per_second=[1]), "damaged"),
    "stages": (changed(stages=[1]), "damaged"),
    "instances": (changed(instances={"seed0": 5}), "damaged"),
    "structures": (changed(structures={"mito": 5}), "damaged"),
    "no labels": (changed(mean=None), "no scores: its test volumes have no labels"),
    "unfinished": (without("metrics.json"), "unfinished, it holds no metrics.json"),
    "no run": (without("metrics.json", "config.json"), "not a run, it holds no metrics.json"),
    "a table": (lambda folder: [without("metrics.json")(folder), text("", "table.md")(folder)],
                "not a run, it holds no metrics.json"),
    "a file": (a_file, "a file, no run folder"), "missing": (nothing, "no such folder"),
    "config": (text("{", "config.json"), "damaged"),
    "config bytes": (text(b"\xff\xfe", "config.json"), "damaged"),
    "config list": (text("[]", "config.json"), "damaged"),
    "args": (text('{"args": [1]}', "config.json"), "damaged"),
    "no args": (text('{"args": null}', "config.json"), "damaged"),
    "prediction": (text('{"args": {"prediction": [5]}}', "config.json"), "damaged"),
}


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("how, reason", NO_RUN.values(), ids=NO_RUN)
def test_what_is_no_run_is_named_and_skipped(tmp_path, capsys, how, reason):
    bad = made(tmp_path / "bad")
    how(bad)
    made(tmp_path / "a", 0.3)
    made(tmp_path / "b", 0.5, 1)
    (row,) = only(tabulate(tmp_path, tmp_path / "a", bad, tmp_path / "b"))
    assert row["runs"] == "2" and row["Dice mito"] == "0.4000 ± 0.1414"
    lines = [line for line in capsys.readouterr().out.split("\n") if "bad" in line]
    assert len(lines) == 1 and lines[0].startswith(f"skipped {bad}: {reason}"), lines


def test_a_path_that_no_system_takes_is_skipped(tmp_path, capsys):
    (row,) = only(tabulate(tmp_path, made(tmp_path / "a"), tmp_path / ("b" * 300)))
    assert row["runs"] == "1" and "skipped" in capsys.readouterr().out


def test_a_run_without_config_counts(tmp_path):
    run = made(tmp_path / "a", 0.3)
    (run / "config.json").unlink()
    (row,) = only(tabulate(tmp_path, run))
    assert row["Dice mito"] == "0.3000" and row["method"] == ""


def test_without_any_run_nothing_is_written(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    message = refused(evaluate, capsys, "--out-dir", tmp_path / "out", "--runs", tmp_path / "a",
                      tmp_path / "b")
    assert message.endswith("--runs: none of 2 folders holds a finished run")
    assert not (tmp_path / "out").exists()


# -- warnings --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("seeds, versions, warning", [
    ((1, 1), "aa", "runs with the same seed count as several"),
    ((1, 2), "ab", "runs of different versions of the code are averaged"),
    ((1, 2), "aa", None), ((None, None), "aa", None)])
def test_doubtful_means_are_named(tmp_path, capsys, seeds, versions, warning):
    for number, (seed, version) in enumerate(zip(seeds, versions)):
        made(tmp_path / f"{number}", 0.5, seed, sha256=version, args={"seed": seed})
    made(tmp_path / "other", 0.5, 1, model="resunet", sha256="c")
    tabulate(tmp_path, *[tmp_path / n for n in ("0", "1", "other")])
    lines = [line for line in capsys.readouterr().out.split("\n") if line.startswith("warning")]
    assert lines == ([f"warning: train_cps.py unet: {warning}"] if warning else [])


# -- files -----------------------------------------------------------------------------------------


def test_names_break_neither_table(tmp_path, capsys):
    names = ("background", "a|b", 'c, "d"', "Zellkörper ± µ")
    run = made(tmp_path / "r|u, n", 1 / 3, classes=names, model="m|n", label="x|y,z.tif")
    found = tabulate(tmp_path, run)
    (row,) = only(found)
    shown = ("a\\|b", 'c, "d"', "Zellkörper ± µ")
    assert [row[f"Dice {name}"] for name in shown] == ["0.3333"] * 3
    assert row["model"] == "m\\|n" and next(iter(found)).endswith("scored on x|y,z.tif")
    (one,) = rows_of(tmp_path / "out" / "runs.csv")
    assert one["run"] == str(run) and one["model"] == "m|n" and one["scored_on"] == "x|y,z.tif"
    assert {one[f"dice_{name}"] for name in names[1:]} == {repr(1 / 3)}
    assert (tmp_path / "out" / "table.md").read_text(encoding="utf-8").strip() in (
        capsys.readouterr().out)


def test_all_files_hold_the_same_numbers(tmp_path):
    values = np.random.default_rng(0).random((2, 3)).tolist()
    for number, row in enumerate(values):
        for seed, value in enumerate(row):
            made(tmp_path / f"{number}{seed}", value, seed, model=f"m{number}",
                 more={"dice_slices": value / 3})
    lines = only(tabulate(tmp_path, *sorted(tmp_path.iterdir()), "--scores", "dice_slices"))
    groups, runs = [rows_of(tmp_path / "out" / f"{name}.csv") for name in ("table", "runs")]
    assert [float(run["dice"]) for run in runs] == sum(values, [])
    assert [(run["run"], run["seed"]) for run in runs] == [
        (str(tmp_path / f"{number}{seed}"), str(seed)) for number in range(2) for seed in range(3)]
    for row, line, group in zip(values, lines, groups):
        for key, scale in (("dice_mito", 1), ("dice", 1), ("dice_slices_mito", 3)):
            assert float(group[f"{key}_mean"]) == pytest.approx(np.mean(row) / scale, rel=1e-15)
            assert float(group[f"{key}_std"]) == pytest.approx(np.std(row, ddof=1) / scale)
        shown = f"{np.mean(row) / 3:.4f} ± {np.std(row, ddof=1) / 3:.4f}"
        assert line["Dice, slices mito"].strip("*") == shown
        assert "Dice mito" not in line and line["mIoU"].strip("*").startswith(
            f"{np.mean(row):.4f}")


def test_the_folder_holds_what_is_printed(tmp_path, capsys):
    tabulate(tmp_path, made(tmp_path / "a"))
    names = ["config.json", "histogram.png", "runs.csv", "table.csv", "table.md"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    assert capsys.readouterr().out.strip().endswith(f"{', '.join(names)}")
    assert imread(tmp_path / "out" / "histogram.png")[..., :3].std() > 0.05


def test_no_score_no_histogram(tmp_path):
    (row,) = only(tabulate(tmp_path, made(tmp_path / "a", more={"miou": None})))
    assert row["mIoU"] == "undefined" and not (tmp_path / "out" / "histogram.png").exists()


@pytest.mark.parametrize("count, varied, wanted", [
    (8, "lr", [f"train_cps.py unet --lr {n + 1}" for n in range(8)]),
    (9, "lr", ["train_cps.py unet"]),
    (9, "model", ["train_cps.py"]), (9, "script", [f"{n}.py" for n in range(9)])])
def test_a_histogram_has_few_groups(tmp_path, monkeypatch, count, varied, wanted):
    drawn = []
    monkeypatch.setattr(emseg, "save_histogram", lambda *arguments: drawn.append(arguments))
    for n in range(count):
        made(tmp_path / f"{n}", 0.5 + n / 100, **{
            "lr": {"args": {"lr": n + 1}}, "model": {"model": f"m{n}"},
            "script": {"script": f"{n}.py"}}[varied])
    tabulate(tmp_path, *[tmp_path / f"{n}" for n in range(count)])
    ((path, panels, score),) = drawn
    ((title, groups),) = panels.items()
    assert path.name == "histogram.png" and score == "mIoU" and [*groups] == wanted
    assert title == "mito, scored on label.tif"
    assert sum(groups.values(), []) == [0.5 + n / 100 for n in range(count)]


@pytest.mark.parametrize("groups", [{"a": [1.0]}, {"a": [0.0, 0.0], "b": [0.515]}, {
    f"a $\\x$ _{n}": [n / 20, 1 - n / 30] for n in range(12)}])
def test_a_histogram_shows_the_share_of_each_group(tmp_path, monkeypatch, groups):
    figures, new_figure = [], emseg.new_figure
    monkeypatch.setattr(emseg, "new_figure", lambda **kwargs: figures.append(
        new_figure(**kwargs)) or figures[-1])
    emseg.save_histogram(tmp_path / "histogram.png", {"one": groups, "$\\x$": groups}, "mIoU")
    assert imread(tmp_path / "histogram.png")[..., :3].std() > 0.05
    axis, other = figures[0].axes
    assert (axis.get_title(), other.get_title()) == ("one", r"\$\x\$")
    assert len(axis.containers[0]) <= 24
    assert len(axis.containers) == len(groups)
    for bars in axis.containers:
        assert sum(bar.get_height() for bar in bars) == pytest.approx(1)
    assert [text.get_text() for text in axis.get_legend().get_texts()] == [
        f"{name} ({len(values)})".replace("$", r"\$") for name, values in groups.items()]
    low, high = axis.get_xlim()
    assert low <= min(map(min, groups.values())) and max(map(max, groups.values())) <= high


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, message", [
    (["--runs", "a", "--prediction", "p.tif"], "--runs and --prediction are two commands"),
    (["--runs", "a", "--label", "l.tif"], "--runs and --prediction are two commands"),
    (["--runs", "a", "--scores", "dice", "f1"], "--scores: there is no score f1; there are dice"),
    ([], "give --prediction and --label, or --runs"),
])
def test_contradictions_are_refused(capsys, arguments, message):
    assert message in refused(evaluate, capsys, *arguments)


def test_a_used_folder_is_kept(tmp_path, capsys):
    run = made(tmp_path / "a")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    assert "is not empty" in refused(evaluate, capsys, "--runs", run, "--out-dir", tmp_path / "out")
    (tmp_path / "out" / "last.pt").touch()
    assert "holds no evaluation" in refused(evaluate, capsys, "--runs", run, "--out-dir",
                                            tmp_path / "out", "--overwrite")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"notes.txt", "last.pt"}


def test_a_new_table_replaces_the_old_one(tmp_path):
    tabulate(tmp_path, made(tmp_path / "a"))
    (tmp_path / "out" / "notes.txt").touch()
    tabulate(tmp_path, made(tmp_path / "b", more={"miou": None}))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json", "runs.csv", "table.csv", "table.md", "notes.txt"}


def test_the_folder_of_a_table_has_a_name():
    assert evaluate.parse_args(["--runs", "a", "b"]).out_dir == "runs/evaluate-runs"


@pytest.mark.parametrize("values, wanted", [
    ([], (None, None, 0)), ([None], (None, None, 0)), ([0.0], (0.0, None, 1)),
    ([1, None, 3], (2.0, np.sqrt(2), 2))])
def test_spread(values, wanted):
    assert evaluate.spread(values) == pytest.approx(wanted)


def test_markdown_is_straight():
    lines = evaluate.markdown([["", "a|b"], ["long name", 1]]).split("\n")
    assert lines == ["|           | a\\|b |", "| --------- | ---- |", "| long name | 1    |"]
