"""evaluate.py --runs: tables of finished runs, made ones and those that the scripts write."""

import csv
import re

import numpy as np
import pytest
import tifffile

import conftest
import emseg
import evaluate
from conftest import metrics, refused


def block(classes, value, **more):
    """A mean block of metrics.json in which each score is a value, or as `more` says."""
    scores = dict.fromkeys(("dice", "iou", "precision", "recall"), value)
    return {"per_class": {name: {**scores, **more} for name in classes[1:]},
            **dict.fromkeys(("dice", "iou", "miou", "accuracy"), value), **more}


def made(folder, value=0.5, seed=0, script="train_cps.py", model="unet", volume="image.tif",
         ignored=0, classes=("background", "mito"), args=None, slices=None, log="", scored=3,
         **content):
    """A run folder with these scores and arguments. value: of all scores, or a mean block."""
    folder.mkdir(parents=True)
    mean = block(classes, value) if isinstance(value, float) else value
    entry = {"volume": volume, "label": "label.tif", "voxels": 1000, "ignored": ignored,
             "slices": [*range(scored)], "dice_of_slices": slices or {}}
    emseg.write_json(folder / "metrics.json", {
        "schema": 1, "script": script, "classes": list(classes), "volumes": [entry], "mean": mean,
        "model": model, "seed": seed, "parameters": None, "train_seconds": None,
        "predict_seconds": None, "predict_voxels_per_second": None, "peak_memory_gib": None,
        **content})
    emseg.write_json(folder / "config.json", {
        "args": {"seed": seed, "out_dir": str(folder), "lr": 0.1, **(args or {})}})
    if log:
        (folder / "log.csv").write_text(log)
    return folder


def tables(out):
    """{heading: rows as dicts} of table.md."""
    found = {}
    for text in re.split("^### ", (out / "table.md").read_text(encoding="utf-8"), flags=re.M)[1:]:
        heading, _, heads, rule, *lines = text.strip().split("\n")
        heads, *rows = [[cell.strip() for cell in line[2:-2].split("|")]
                        for line in (heads, *lines)]
        assert {*map(len, rows)} == {len(heads)}
        found[heading] = [dict(zip(heads, row)) for row in rows]
    return found


def tabulate(tmp_path, *arguments):
    """All tables of these runs."""
    conftest.run(evaluate, "--out-dir", tmp_path / "out", "--overwrite", "--runs", *arguments)
    return tables(tmp_path / "out")


def first(found):
    """The rows of the first table."""
    return next(iter(found.values()))


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """What is drawn, in place of the pictures."""
    found = {}
    for name in ("save_histogram", "save_slice_dice"):
        monkeypatch.setattr(emseg, name, lambda *args, name=name: found.update({name: args}))
    return found


def test_scores_are_means_and_sample_deviations_over_seeds(tmp_path, capsys):
    values = [0.61, 0.7, 0.86]
    runs = [made(tmp_path / f"{seed}", value, seed, parameters=99, train_seconds=60)
            for seed, value in enumerate(values)]
    runs.append(made(tmp_path / "other", 0.5, model="resunet", parameters=1_234_567))
    several, one = first(tabulate(tmp_path, *runs))
    mean, deviation = np.mean(values), np.std(values, ddof=1)
    for head in ("dice mito", "iou mito", "miou mito"):
        assert (several[head], one[head]) == (f"{mean:.4f} ± {deviation:.4f}", "0.5000")
    assert (several["row"], several["runs"], one["row"]) == ("unet", "3", "resunet")
    assert several["folders"] == " ".join(map(str, runs[:3])) and one["folders"] == str(runs[3])
    assert one["parameters"] == "1,234,567" and one["train_seconds"] == "undefined"
    assert (several["parameters"], several["train_seconds"]) == ("99.0 ± 0.0", "60.0 ± 0.0")
    with open(tmp_path / "out" / "table.csv", newline="") as file:
        line = next(csv.DictReader(file))
    assert float(line["dice_mito_mean"]) == pytest.approx(mean, rel=1e-15)
    assert float(line["dice_mito_std"]) == pytest.approx(deviation, rel=1e-14)
    printed = capsys.readouterr().out                   # what all share stands above
    assert "script train_cps.py" in printed.split("###")[0] and "model" not in printed
    assert (tmp_path / "out" / "table.md").read_text(encoding="utf-8").strip() in printed


@pytest.mark.parametrize("key, one, two", [
    ("label_slices", "n=7", "n=15"), ("volume", ["a.tif"], ["b.tif"]), ("cutmix", True, False)])
def test_trainings_of_other_settings_are_not_averaged(tmp_path, key, one, two):
    for number, value in enumerate((one, two, one)):
        made(tmp_path / f"{number}", 0.5 + number / 10, number, args={key: value})
    made(tmp_path / "other", 0.1, model="resunet", args={key: two})
    rows = first(tabulate(tmp_path, *[tmp_path / n for n in ("0", "1", "2", "other")]))
    assert [row["runs"] for row in rows] == ["2", "1", "1"]
    assert [emseg.flag_name(key) in row["row"] for row in rows] == [True, True, False]
    assert rows[0]["row"] != rows[1]["row"] and rows[2]["row"] == "resunet"


def test_scores_of_other_voxels_are_never_in_one_table(tmp_path):
    for name, options in (("a", {}), ("b", {"model": "resunet"}), ("c", {"volume": "two.tif"}),
                          ("d", {"ignored": 100}), ("e", {"scored": 4})):
        made(tmp_path / name, **options)
    found = tabulate(tmp_path, *[tmp_path / name for name in "abcde"])
    assert {head: len(rows) for head, rows in found.items() if head.startswith("Scored")} == {
        f"Scored on {name} voxels of {n} slices)": rows for name, n, rows in (
            ("image.tif (1,000", 3, 2), ("two.tif (1,000", 3, 1), ("image.tif (900", 3, 1),
            ("image.tif (1,000", 4, 1))}


def test_structures_of_a_model_are_one_row(tmp_path):
    """Li et al. 2018, table 1: the mIoU of each structure, trained by itself, and their average."""
    for model, values in (("seget", (0.9, 0.7)), ("fcn8s", (0.8, 0.5))):
        for name, value in zip(("synapse", "golgi"), values):
            made(tmp_path / model / name, value, model=model, classes=("background", name),
                 args={"label": f"{name}.mrc", "lr": value})
    rows = first(tabulate(tmp_path, *sorted(tmp_path.glob("*/*")), "--scores", "miou"))
    assert [[row[head] for head in ("row", "miou synapse", "miou golgi", "miou mean")]
            for row in rows] == [["fcn8s", "0.8000", "0.5000", "0.6500"],
                                 ["seget", "0.9000", "0.7000", "0.8000"]]


def test_validation_stands_beside_test_and_its_peaks_in_the_histogram(tmp_path, drawn):
    """Guay et al. 2021, table 1 and figure 4."""
    log = "epoch,val_dice,val_miou,val_miou_org\n0,0.9,,\n1,0.1,{},0.3\n2,0.2,0.2,0.4\n"
    for seed in (0, 1):
        made(tmp_path / f"{seed}", 0.5, seed, log=log.format(0.6 + seed / 10))
    made(tmp_path / "other", 0.4, model="resunet", log=log.format(0.5))
    row, _ = first(tabulate(tmp_path, *[tmp_path / n for n in ("0", "1", "other")], "--scores",
                            "miou", "val_miou", "val_miou_org"))
    assert list(row)[3:] == ["miou mito", "val_miou mito", "val_miou_org mito"]
    assert row["val_miou mito"] == f"0.6500 ± {np.std([0.6, 0.7], ddof=1):.4f}"
    assert row["val_miou_org mito"].startswith("0.3000")
    assert drawn["save_histogram"][1] == {
        "runs scored on image.tif": {"unet": [0.6, 0.7], "resunet": [0.5]}}


def test_rows_are_ranked_over_data_sets(tmp_path):
    """Pagano et al. 2023, table 2."""
    values = {"unet": (0.5, 0.9, 0.4), "resunet": (0.6, 0.8, 0.7)}
    for model, each in values.items():
        for number, value in enumerate(each):
            made(tmp_path / f"{model}{number}", value, model=model, volume=f"{number}.tif",
                 args={"volume": f"{number}.tif"}, train_seconds=value)
    def rows_of(key):                   # the second time among them: the folder of the first table
        return tabulate(tmp_path, *sorted(tmp_path.iterdir()), "--scores", key)["Over 3 data sets"]

    rows = rows_of("dice")
    for row in rows:
        assert row["average dice"] == f"{np.mean(values[row['row']]):.4f}"
        assert row["SD over data sets"] == f"{np.std(values[row['row']], ddof=1):.4f}"
    assert [(row["row"], row["average rank"]) for row in rows] == [
        ("resunet", "1.3333"), ("unet", "1.6667")]
    assert [row["average rank"] for row in rows_of("train_seconds")] == ["1.6667", "1.3333"]


def test_dice_is_drawn_along_z(tmp_path, drawn):
    """Pagano et al. 2023, figure 5."""
    dice, stack = [[0.2, 0.5, None, 0.9], [0.4, 0.5, None, 0.7]], tmp_path / "stack"
    stack.mkdir()
    for number in range(10, 14):
        tifffile.imwrite(stack / f"{number}.tif", np.zeros((4, 4), np.uint8))
    runs = [made(tmp_path / f"{seed}", 0.5, seed, volume=str(stack), slices={"mito": each})
            for seed, each in enumerate(dice)]
    runs.append(made(tmp_path / "other", 0.5, model="resunet", volume=str(stack),
                     slices={"mito": [0.1, 0.6, 0.5, 0.9]}))
    tabulate(tmp_path, *runs)
    _, [(title, curves, _, slice_name)], names = drawn["save_slice_dice"]
    assert names[1:] == ["unet", "resunet"] and title == f"mito, {stack}; means of each row's runs"
    assert slice_name(3) == "z = 3 (file 13)"
    np.testing.assert_allclose(curves[:, 1], [0.3, 0.5, np.nan, 0.8])
    np.testing.assert_allclose(curves[:, 2], [0.1, 0.6, 0.5, 0.9])


def test_parts_and_stages_are_rows(tmp_path):
    """Seeds of an ensemble are averaged beside it; stages and named parts stand by themselves."""
    made(tmp_path / "all", 0.6)
    for seed in (0, 1):
        made(tmp_path / "all" / f"seed{seed}", 0.4 + seed / 10, seed)
    whole, seeds = first(tabulate(tmp_path, tmp_path / "all", *(tmp_path / "all").glob("seed*")))
    assert (whole["row"], seeds["row"], seeds["runs"]) == ("part whole", "part seed", "2")
    assert seeds["dice mito"].startswith("0.4500 ±")
    made(tmp_path / "stages", stages={name: block(("", "mito"), value) for name, value in
                                      (("coarse", 0.3), ("scm", 0.4))})
    rows = first(tabulate(tmp_path, tmp_path / "stages"))
    assert [(row["row"], row["dice mito"]) for row in rows] == [("coarse", "0.3000"),
                                                                ("scm", "0.4000")]


def test_any_key_of_metrics_json_is_a_column(tmp_path, capsys):
    mean = block(("", "mito"), 0.5, hd95_nm=1234.5) | {"segments": {"voi": 1.5}}
    run = made(tmp_path / "a", mean, peak_memory_gib=2.5)
    (row,) = first(tabulate(tmp_path, run, "--scores", "voi", "hd95_nm", "peak_memory_gib"))
    assert list(row.values())[3:] == ["1.5000", "1,234", "2.5000"]
    said = refused(evaluate, capsys, "--runs", run, "--scores", "f1", "--out-dir", tmp_path / "b")
    assert "no run has f1" in said and "hd95_nm" in said and not (tmp_path / "b").exists()


def test_what_is_no_finished_run_is_named_and_skipped(tmp_path, capsys):
    run, unscored = made(tmp_path / "a"), made(tmp_path / "c", None)
    (tmp_path / "b").mkdir()
    for name in "metrics", "config":
        (tmp_path / "b" / f"{name}.json").write_text("{}")
    for _ in "ab":                              # the second time it lists its own folder, too
        assert len(first(tabulate(tmp_path, run, tmp_path / "b", unscored, tmp_path / "out"))) == 1
    printed = capsys.readouterr().out
    assert f"skipped {tmp_path / 'b'}: no finished run" in printed
    assert f"skipped {unscored}: no scores" in printed
    assert "no finished runs" in refused(evaluate, capsys, "--runs", tmp_path / "b", "--out-dir",
                                         tmp_path / "d")


def test_a_run_and_its_evaluation_are_two_rows(trained, cells, tmp_path):
    conftest.run(evaluate, "--prediction", trained / "prediction.tif", "--label",
                 cells / "mito.tif", "--volume", cells / "image.tif", "--no-distances", "--out-dir",
                 tmp_path / "scores")
    rows = first(tabulate(tmp_path, trained, tmp_path / "scores"))
    assert [row["row"] for row in rows] == ["scored by train_cps.py", "scored by evaluate.py"]
    assert {row["dice mito"] for row in rows} == {f"{metrics(trained)['mean']['dice']:.4f}"}
