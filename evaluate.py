"""Scores, tables and pictures of segmentations, made by the training scripts or any other program.

Predictions are compared with their labels, or the scores of finished runs put into tables (--runs).

Metrics:
    Dice, IoU, precision, recall, mIoU   emseg.scores
    HD95, ASSD (in nm)                   surface_distances: 95th percentile and mean of the
                                         distances between both surfaces (Maier-Hein et al. 2024).
                                         Faces at the border of the volume and towards ignored
                                         voxels are no surface
    surface of objects                   crofton_areas: balls from a radius of 3 voxels on are
                                         within 3 %; flat ones are 10 % low; where slices are ten
                                         pixels thick cubes are 21 % low, faces along slices 31 %
    variation of information (in bits),  segment_scores (Meila 2007; Arganda-Carreras et al. 2015).
    adapted Rand error                   Segments are the connected regions that the voxels of one
                                         class, such as membrane, separate. Predicted membrane is
                                         thinned first: each of its voxels goes to the nearest
                                         segment in its slice. Slices without any predicted segment
                                         are one segment together (CREMI)

Run:
    python evaluate.py --prediction prediction.tif --label label.tif --objects --render
    python evaluate.py --prediction cells.mrc --label truth.tif --segments 1
    python evaluate.py --runs runs/* --scores miou val_miou
"""

import argparse
import contextlib
import csv
import json
import math
import os
import statistics
from dataclasses import dataclass
from pathlib import Path

import emseg                            # before torch, see there
import numpy as np
import torch
from scipy import ndimage, sparse, spatial, stats

SLAB = 2**23                # voxels that are read together
BYTES_PER_VOXEL = 18        # of memory for objects or segments, measured


# -- surface distances -----------------------------------------------------------------------------


def neighbours(step, shape):
    """Two boxes of an array: the voxels that have a neighbour a step (z, y, x) away, and these."""
    return [tuple(slice(max(0, sign * d), side + min(0, sign * d)) for d, side in zip(step, shape))
            for sign in (-1, 1)]


def differ(one, other):
    """Where class ids differ and both are known."""
    return (one != other) & (one != emseg.IGNORE) & (other != emseg.IGNORE)


def surface_voxels(ids):
    """Which voxels of foreground classes (Z, Y, X) have a face towards another class: bool.

    The border of the array and IGNORE are no other class: nobody knows what is there.
    """
    surface = np.zeros(ids.shape, bool)
    for step in np.eye(3, dtype=int):
        low, high = neighbours(step, ids.shape)
        face = differ(ids[low], ids[high])
        surface[low] |= face
        surface[high] |= face
    return surface & (ids > 0)


def surface_distances(pair, n_classes):
    """[{"hd95_nm", "assd_nm"}] of the foreground classes, None where truth or prediction has no
    surface. Read slab by slab; memory grows with the surfaces."""
    surfaces = [[[] for _ in range(n_classes)] for _ in range(2)]       # [side][class]: (n, 3)
    for cut in emseg.slabs(pair.label.shape, SLAB):
        wide = slice(max(0, cut.start - 1), cut.stop + 1)
        inner = slice(cut.start - wide.start, cut.stop - wide.start)
        for found, ids in zip(surfaces, pair.read(wide)):
            surface = surface_voxels(ids)[inner]
            voxels, classes = np.argwhere(surface) + (cut.start, 0, 0), ids[inner][surface]
            for k in range(1, n_classes):
                found[k].append(voxels[classes == k].astype(np.int32))
    result = []
    for sides in list(zip(*surfaces))[1:]:
        truth, pred = [np.concatenate(voxels) * pair.label.voxel_size for voxels in sides]
        distances = [spatial.cKDTree(other, balanced_tree=False).query(own, workers=-1)[0]
                     for own, other in ((truth, pred), (pred, truth)) if len(own) and len(other)]
        result.append({
            "hd95_nm": max((float(np.percentile(each, 95)) for each in distances), default=None),
            "assd_nm": float(np.concatenate(distances).mean()) if distances else None})
    return result


# -- objects and segments --------------------------------------------------------------------------


def check_memory(shape, flag):
    """Objects and segments need the whole volume at once. Raises InputError where it cannot fit."""
    needed = BYTES_PER_VOXEL * math.prod(shape) / 2**30
    there = (os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
             if hasattr(os, "sysconf") else math.inf)                   # Windows does not tell
    if needed > there:
        raise emseg.InputError(f"{flag}: {emseg.format_shape(shape)} voxels need {needed:,.0f} of "
                               f"{there:,.0f} GiB of memory; score crops, PATH@z0:z1,y0:y1,x0:x1")


def crofton_areas(voxel_size):
    """{(dz, dy, dx): area in nm^2} that one crossing of a surface between a voxel and its neighbour
    in this direction, or back, stands for; 13 directions (Legland et al. 2007).

    Lines along a direction d, one through every voxel, lie V / |d| apart (V: volume of a voxel). By
    the Cauchy-Crofton formula a surface is twice its crossings with all lines, averaged over
    directions; each direction stands for those of the sphere that are nearest to it.
    """
    steps = [(0, 0, 1), (0, 1, -1), (0, 1, 0), (0, 1, 1)]
    steps += [(1, y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    vectors = np.array(steps) * voxel_size
    lengths = np.linalg.norm(vectors, axis=1)
    n = 2**15                                                   # directions, evenly on a sphere
    height = (np.arange(n) + 0.5) / n * 2 - 1
    angle, radius = np.arange(n) * math.pi * (3 - math.sqrt(5)), np.sqrt(1 - height**2)
    sphere = np.stack([height, radius * np.sin(angle), radius * np.cos(angle)], 1)
    nearest = np.abs(sphere @ (vectors / lengths[:, None]).T).argmax(1)
    share = np.bincount(nearest, minlength=len(steps)) / n
    return dict(zip(steps, 2 * share * math.prod(voxel_size) / lengths))


def measure(numbers, n, ids, voxel_size):
    """Voxels (n,), surface (n,) in nm^2, centroid, and bounding box (low, high: exclusive) in
    voxels (n, 3) of the objects 0 (background) to n - 1 in ids; numbers (Z, Y, X): which is where.
    """
    voxels, sums, surface = np.zeros(n, int), np.zeros((n, 3)), np.zeros(n)
    for z, page in enumerate(numbers):
        inside = np.nonzero(page)
        count = np.bincount(page[inside], minlength=n)
        voxels += count
        sums += np.stack([z * count, *(np.bincount(page[inside], at, n) for at in inside)], 1)
    for step, area in crofton_areas(voxel_size).items():
        low, high = neighbours(step, ids.shape)
        crossed = differ(ids[low], ids[high])
        for side in (low, high):
            surface += area * np.bincount(numbers[side][crossed], minlength=n)
    boxes = [(slice(0, 0),) * 3, *ndimage.find_objects(numbers)]
    low, high = [np.array([[getattr(side, end) for side in box] for box in boxes])
                 for end in ("start", "stop")]
    return voxels, surface, sums / np.maximum(voxels, 1)[:, None] + 0.5, low, high


def object_rows(pair, classes, min_voxels):
    """Rows of objects.csv: the connected components of each foreground class in truth and
    prediction, 26 neighbours of a voxel connected; those below min_voxels are left out."""
    shape, size = np.array(pair.label.shape), pair.label.voxel_size
    check_memory(shape, "--objects")
    nm = np.array(size or (math.nan,) * 3)
    for source, ids in zip(("truth", "prediction"), pair.read(slice(None), whole=True)):
        numbers, class_id = np.zeros(ids.shape, np.int32), [0]
        for k in range(1, len(classes)):
            found, n = ndimage.label(ids == k, np.ones((3, 3, 3)))
            np.add(found, len(class_id) - 1, out=numbers, where=found > 0)
            class_id += [k] * n
        voxels, surface, centroid, low, high = measure(
            numbers, len(class_id), ids, size or (1, 1, 1))
        at_border = (((low == 0) | (high == shape)) & (shape > 1)).any(1)
        for n in np.flatnonzero(voxels >= min_voxels):
            lengths = {"volume_nm3": voxels[n] * nm.prod(), "surface_nm2": surface[n] + 0 * nm[0]}
            for key, place in (("centroid_{}_nm", centroid), ("box_{}0_nm", low),
                               ("box_{}1_nm", high)):
                lengths |= zip(map(key.format, "zyx"), place[n] * nm)
            yield {"pair": pair.name, "source": source, "class": classes[class_id[n]], "id": n,
                   "voxels": voxels[n], **{key: None if math.isnan(value) else round(
                       float(value), 3) for key, value in lengths.items()},
                   "at_border": int(at_border[n])}


def overlap_table(truth, pred, shape):
    """Voxels that a part of the truth (row) shares with a part of the prediction (column): sparse
    of this shape, row 0 empty. truth, pred: numbers (Y, X), 0 for no part."""
    places = truth[inside := truth > 0], pred[inside]
    return sparse.coo_matrix((np.ones(len(places[0]), np.int64), places), shape).tocsr()


def find_segments(pair, membrane, in_2d):
    """Numbers (Z, Y, X) of the segments of truth and thinned prediction, 0 for none.

    membrane: the class that separates them; in_2d: segments are regions of each slice by itself.
    """
    check_memory(pair.label.shape, "--segments")
    structure = ndimage.generate_binary_structure(3, 1)
    structure[::2] &= not in_2d
    truth, pred = [ndimage.label((ids != membrane) & (ids != emseg.IGNORE), structure)[0]
                   for ids in pair.read(slice(None), whole=True)]
    truth[np.setdiff1d(range(len(truth)), pair.label.slices)] = 0               # do not score
    for page in pred:
        if page.any():
            nearest = ndimage.distance_transform_edt(
                page == 0, (pair.label.voxel_size or (1, 1, 1))[1:], return_distances=False,
                return_indices=True)
            page[:] = page[tuple(nearest)]
    return truth, pred


def segment_scores(table):
    """Variation of information in bits (its two parts: splits and mergers), adapted Rand error,
    Rand precision (low: mergers) and recall (low: splits), from an overlap_table.

    All voxels of the truth's segments count; those without a predicted one are one segment.
    """
    table = table.tocoo()
    shared, total = table.data, table.data.sum()
    if not total:
        return dict.fromkeys(("voi", "voi_split", "voi_merge", "adapted_rand_error",
                              "rand_precision", "rand_recall"))
    of_truth, of_pred = np.bincount(table.row, shared), np.bincount(table.col, shared)
    split = abs(float((shared / total * np.log2(shared / of_truth[table.row])).sum()))
    merge = abs(float((shared / total * np.log2(shared / of_pred[table.col])).sum()))
    together = (shared.astype(float) ** 2).sum()
    precision, recall = together / (of_pred**2).sum(), together / (of_truth**2).sum()
    return {"voi": split + merge, "voi_split": split, "voi_merge": merge,
            "adapted_rand_error": float(1 - 2 * precision * recall / (precision + recall)),
            "rand_precision": float(precision), "rand_recall": float(recall)}


def score_segments(truth, pred):
    """segment_scores of whole volumes, and VOI and adapted Rand error of each slice by itself."""
    shape = int(truth.max()) + 1, int(pred.max()) + 1
    tables = [overlap_table(*pages, shape) for pages in zip(truth, pred)]
    slices = [segment_scores(table) for table in tables]
    return {"truth": shape[0] - 1, "predicted": shape[1] - 1, **segment_scores(sum(tables)),
            **{f"{key}_slices": [each[key] for each in slices]
               for key in ("voi", "adapted_rand_error")}}


def save_segments(path, pair, truth, pred, voi, rows=4):
    """segments_NAME.png: segments of truth and prediction in random colours, of the slices with the
    highest variation of information; what separates them is black."""
    worst = sorted([z for z, value in enumerate(voi) if value is not None],
                   key=lambda z: -voi[z])[:rows]
    colors = np.random.default_rng(0).uniform(0.2, 1, (max(truth.max(), pred.max()) + 1, 3))
    colors[0] = 0
    figure = emseg.new_figure(figsize=(9, 3.2 * len(worst)))
    for z, axes in zip(worst, figure.subplots(max(1, len(worst)), 3, squeeze=False)):
        if pair.image is not None:
            axes[0].imshow(emseg.Grey(pair.image)[z], cmap="gray", vmin=0, vmax=255)
        name = (pair.image or pair.prediction).slice_name(z)
        for axis, page in zip(axes[1:], (truth, pred)):
            axis.imshow(colors[page[z]], interpolation="nearest")
        for axis, title in zip(axes, (f"image  {name}", "segments of the truth",
                                      f"predicted  VOI {voi[z]:.3f} bit")):
            axis.set(title=title, xticks=[], yticks=[])
    emseg.save_figure(figure, path)


# -- pairs of volumes ------------------------------------------------------------------------------


@dataclass
class Pair:
    """A prediction, its label, the image (or None): lazy (Z, Y, X). counts: see emseg.scores;
    whole: the label with slices that were trained on; place: the same for what shows the same."""
    name: str
    prediction: object
    label: object
    image: object
    counts: np.ndarray
    whole: object
    place: tuple = ()

    def read(self, cut, whole=False):
        """Class ids of truth and prediction in some slices, IGNORE where the truth is: uint8."""
        truth, pred = (self.whole if whole else self.label)[cut], self.prediction[cut]
        pred[truth == emseg.IGNORE] = emseg.IGNORE
        return truth, pred


def read_json(folder):
    """metrics.json and config.json of a run."""
    return [json.loads((Path(folder) / f"{name}.json").read_text(encoding="utf-8"))
            for name in ("metrics", "config")]


def run_of(prediction):
    """metrics.json of the run in whose folder a prediction lies, and its arguments, else {}."""
    try:
        metrics, config = read_json(Path(prediction).parent)
        return metrics | {"training": {"script": metrics["script"], "args": config["args"]}}
    except (OSError, ValueError, KeyError, TypeError):                      # no run
        return {}


def without_used_slices(label, used, path):
    """A label without the slices that were trained or validated on, where others are left."""
    left = np.setdiff1d(label.slices, used)
    n = len(label.slices) - len(left)
    if n:
        print(f"{path}: {n} slices were trained or validated on, and " + (
            "are left out" if len(left) else "there are no others: these are no test scores"))
    return label.only(left) if n and len(left) else label


def open_pairs(args, runs, metrics):
    """Open and count all pairs of the command line: (class names, list of Pair). Classes are those
    that are named, else those of the runs or the labels. runs, metrics: see main."""
    names = args.classes or (None if args.prediction_map else metrics.get("classes"))
    maps = [text and emseg.parse_label_map(text) for text in (args.label_map, args.prediction_map)]
    volumes = [emseg.open_volume(path) for path in args.prediction]
    images = [emseg.open_volume(path) for path in args.volume] or [None] * len(volumes)
    for volume, image, path in zip(volumes, images, args.label):
        if image and len(image) == volume.file_shape[0]:
            volume.numbers = emseg.numbers_of(image)        # for labels in a folder
        volume.voxel_size = (args.voxel_size or emseg.open_volume(path).voxel_size
                             or volume.voxel_size)
    labels, n = emseg.open_labels(args.label, volumes, len(names or ()) or None, maps[0],
                                  args.ignore_label, args.label_slices)
    masks, n_found = emseg.open_labels(
        args.prediction, volumes, n if names or maps[1] or n > 2 else None, maps[1])
    if n_found > n or emseg.IGNORE in (maps[1] or {}).values():
        raise emseg.InputError(f"{args.prediction[0]}: classes 0 to {n_found - 1}, the labels show "
                               f"0 to {n - 1}; give all --classes, or a --prediction-map to these")
    classes, pairs = emseg.class_names(names, n), []
    places = [(label.path, str(label.raw.crop), *label.rows) for label in labels]
    used = {place: [] for place in places}              # predictions of one place share this
    for place, volume, run in zip(places, volumes, runs):
        used[place] += [z - volume.crop[0].start for entry in run.get("volumes", ())
                        if Path(entry["prediction"]).name == Path(volume.file).name
                        for z in entry.get("used", ())]
    for name, volume, label, mask, image, place in zip(
            emseg.unique_names(args.prediction), volumes, labels, masks, images, places):
        if image:
            image.voxel_size = volume.voxel_size
            if image.shape != mask.shape:
                raise emseg.InputError(f"{image.path} has shape {image.shape}, its prediction "
                                       f"{mask.path} {mask.shape}")
        whole, label = label, without_used_slices(label, used[place], volume.path)
        counts = emseg.confusion_volume(mask, label, classes, SLAB)
        pairs.append(Pair(name, mask, label, image, counts, whole, place))
    return classes, pairs


def score_pair(pair, classes, args):
    """The scores of a pair as an entry of metrics.json; the picture of its segments."""
    result = emseg.volume_scores(pair.counts, pair.label, classes, args.organelles)
    if args.distances:
        distances = surface_distances(pair, len(classes)) if pair.label.voxel_size else [
            {"hd95_nm": None, "assd_nm": None}] * len(classes)
        for scores, found in zip(result["per_class"].values(), distances):
            scores.update(found)
    if args.segments is not None:
        segments = find_segments(pair, args.segments, args.segments_2d)
        result["segments"] = score_segments(*segments)
        save_segments(Path(args.out_dir, f"segments_{pair.name}.png"), pair, *segments,
                      result["segments"]["voi_slices"])
    return {"volume": pair.image and pair.image.path, "label": pair.label.path,
            "prediction": pair.prediction.path, **result}


def draw(folder, pairs, classes):
    """figure.png, maps.png, slice_dice.png. Predictions of one label are shown side by side, with a
    line each in the Dice of every class; those of several have rows of their own."""
    dice = [emseg.dice_of_slices(pair.counts) for pair in pairs]
    shown = [(pair.name, pair.image and emseg.Grey(pair.image), pair.label,
              {"prediction": pair.prediction}, each) for pair, each in zip(pairs, dice)]
    curves = [(pair.name, each, np.setdiff1d(pair.whole.slices, pair.label.slices),   # trained on
               (pair.image or pair.prediction).slice_name) for pair, each in zip(pairs, dice)]
    lines = classes
    if len(pairs) > 1 and len({pair.place for pair in pairs}) == 1:
        (_, image, label, *_), (_, _, *marks) = shown[0], curves[0]
        predictions = {pair.name: pair.prediction for pair in pairs}
        shown = [(f"mean of {len(pairs)}", image, label, predictions,
                  np.ma.masked_invalid(dice).mean(0).filled(np.nan))]
        curves = [(name, np.insert(np.stack(dice)[:, :, k].T, 0, np.nan, 1), *marks)
                  for k, name in enumerate(classes[1:], 1)]
        lines = ["", *predictions]
    emseg.save_slices(folder / "figure.png", shown, classes)
    if len(classes) > 2 or len(shown[0][3]) > 1:
        emseg.save_slices(folder / "maps.png", shown, classes, maps=True)
    emseg.save_slice_dice(folder / "slice_dice.png", curves, lines)


# -- text ------------------------------------------------------------------------------------------


def format_score(value, like=None):
    """A score for people: the larger, the fewer decimals; like: what it is the deviation of."""
    if value is None:
        return "undefined"          # not in the truth, not in the prediction, or no voxel size
    size = value if like is None else like
    decimals = 0 if isinstance(size, int) or size >= 1000 else 1 if size >= 10 else 4
    return f"{value:,.{decimals}f}"


def spread(values):
    """(mean, standard deviation over n - 1 or None, how many) of those that are not None."""
    known = [value for value in values if value is not None]
    return (statistics.fmean(known) if known else None,
            statistics.stdev(known) if len(known) > 1 else None, len(known))


def describe(entry, what="mean"):
    """An entry or the mean of metrics.json as text; what: how its mean over classes is called."""
    lines = ["  ".join(f"{text} {format_score(entry[key])}" for key, text in (
        ("dice", f"{what} dice"), ("iou", f"{what} iou"), ("miou", f"{what} iou with background"),
        ("miou_org", "miou_org"), ("accuracy", "accuracy")) if key in entry)]
    for block in (entry["per_class"], {"segments": entry.get("segments", {})}):
        heads = [key for key, value in next(iter(block.values())).items()
                 if key not in ("tp", "fp", "fn") and not isinstance(value, list)]
        if heads:
            lines.append(emseg.markdown([["", *heads]] + [
                [name, *(format_score(scores[key]) for key in heads)]
                for name, scores in block.items()]))
    return "\n".join(lines)


# -- tables of runs --------------------------------------------------------------------------------

# Arguments that tell no training from another, or that say what is scored.
NO_SETTING = emseg.OF_THIS_CALL | {
    "seed", "checkpoint", "demo", "save_probability", "test_volume", "test_label", "classes",
    "voxel_size", "model", "method", "distances", "objects", "min_voxels", "segments",
    "segments_2d", "render", "runs", "scores"}
LOWER_IS_BETTER = ("hd95_nm", "assd_nm", "voi", "voi_split", "voi_merge", "adapted_rand_error",
                   "fp", "fn", "parameters", "train_seconds", "predict_seconds", "peak_memory_gib")
DEFAULT_SCORES = "dice iou miou miou_org val_miou val_miou_org parameters train_seconds".split()


@dataclass
class Result:
    """A finished run, or one of its stages, and its row in tables. title, settings: {name: text};
    scored_on: ((volume, scored voxels, slices), …); slices: {(number of the volume, class): [Dice,
    …]}."""
    folder: str
    title: dict
    settings: dict
    classes: tuple
    scored_on: tuple
    scores: dict
    slices: dict
    row: str = ""


def read_run(folder):
    """The Results of a run folder, several where it has stages. Raises InputError."""
    folder = Path(folder)
    try:
        content, config = read_json(folder)
        mean = content["mean"]
        training = config.get("training") or {"script": content["script"], "args": config["args"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise emseg.InputError(f"no finished run ({error!r})")
    if mean is None:
        raise emseg.InputError("no scores, its test volumes have no labels")
    settings = {emseg.flag_name(key): json.dumps(value).strip('[]"').replace('"', "")
                for key, value in training["args"].items() if key not in NO_SETTING}
    # several trainings of one command have folders in its folder: seed3, scm
    is_part = (folder.parent / "config.json").exists()
    settings |= {"scored by": content["script"],
                 "part": folder.name.rstrip("0123456789") if is_part else "whole"}
    volumes = [entry for entry in content["volumes"] if entry["label"]]
    scored_on = tuple((entry["volume"] or entry["label"], entry["voxels"] - entry["ignored"],
                       tuple(entry.get("slices", ()))) for entry in volumes)
    slices = {(number, name): dice for number, entry in enumerate(volumes)
              for name, dice in entry.get("dice_of_slices", {}).items()}
    log = folder / "log.csv"
    validation = peak_validation(log) if log.exists() else {}
    return [Result(str(folder), {"script": training["script"], "model": content["model"] or "",
                                 "method": training["args"].get("method", ""), "stage": stage},
                   settings, tuple(content["classes"]), scored_on,
                   flat_scores(block, content, validation), slices if block == mean else {})
            for stage, block in content.get("stages", {"": mean}).items()]      # last: mean


def peak_validation(log):
    """The validation scores of log.csv's epoch with the highest mIoU: {"val_miou": …}, or {}."""
    with open(log, newline="", encoding="utf-8") as file:
        rows = [{key: float(value) for key, value in row.items()
                 if key.startswith("val_") and value} for row in csv.DictReader(file)]
    return max(rows, key=lambda row: row.get("val_miou", -1), default={})


def flat_scores(mean, content, validation):
    """{(key, class): value} of all scores of a run; the class is "mean" for means over classes and
    "" for what belongs to none. What a run of one structure scores as a whole is its structure's.
    """
    classes = content["classes"]
    scores = {(key, name): value for name, each in mean["per_class"].items()
              for key, value in each.items()}
    for key, value in {**mean, **mean.get("segments", {}), **validation}.items():
        if not isinstance(value, dict):
            whole = "mean" if (key, classes[1]) in scores else ""
            scores[key, classes[1] if len(classes) == 2 else whole] = value
    return scores | {(key, ""): content[key] for key in (
        "parameters", "train_seconds", "predict_seconds", "predict_voxels_per_second",
        "peak_memory_gib")}


def name_rows(results):
    """Name the row of each Result by what is not the same for all: script, model, method, stage,
    and the settings in which trainings of the same script, model and classes differ that were
    scored on the same voxels. Returns what all share, as text."""
    shared = set.intersection(*(set(r.title.items()) for r in results))
    kinds = [(r.scored_on, *r.title.values(), r.classes) for r in results]
    texts = {}                                          # (kind, setting) -> those that occur
    for kind, r in zip(kinds, results):
        for key, text in r.settings.items():
            texts.setdefault((kind, key), set()).add(text)
    for kind, r in zip(kinds, results):
        words = [text for key, text in r.title.items() if (key, text) not in shared]
        words += [f"{key} {text}" for key, text in r.settings.items() if len(texts[kind, key]) > 1]
        r.row = " ".join(filter(None, words)) or r.title["model"]
    return ", ".join(sorted(f"{key} {text}" for key, text in shared if text))


def table_of(rows, keys):
    """{row: {(key, class): spread over its runs}}, rows: {row: [Result]}; the mean over classes
    that are runs of their own is that of the row."""
    table = {}
    for row, members in rows.items():
        table[row] = cells = {}
        for key in keys:
            own = dict.fromkeys(column for r in members for column in r.scores if column[0] == key)
            cells |= {column: spread([r.scores.get(column) for r in members]) for column in own}
            if len(own) > 1 and (key, "mean") not in own:
                cells[key, "mean"] = spread([cells[column][0] for column in own])[0], None, 1
    return table


def show_table(scored_on, rows, keys):
    """A table as Markdown, and the lines of table.csv."""
    volumes = ", ".join(f"{volume} ({voxels:,} voxels of {len(slices)} slices)"
                        for volume, voxels, slices in scored_on)
    shown, lines = [], []
    for row, cells in table_of(rows, keys).items():
        folders = [r.folder for r in rows[row]]
        lines.append({"scored_on": volumes, "row": row, "runs": len(folders),
                      "folders": " ".join(folders)})
        folders[3:-1] = ["…"] * (len(folders) > 4)
        shown.append({"row": row, "runs": len(rows[row]), "folders": " ".join(folders)})
        for (key, name), (mean, deviation, n) in cells.items():
            shown[-1][f"{key} {name}".strip()] = format_score(mean) + (
                f" ± {format_score(deviation, mean)}" if n > 1 else "")
            lines[-1] |= {f"{key}_{name}_mean": mean, f"{key}_{name}_std": deviation}
    found = dict.fromkeys(head for line in shown for head in line)
    heads = [*found][:3] + [head for key in keys for head in found if head.split(" ")[0] == key]
    cells = [[line.get(head, "") for head in heads] for line in shown]
    return f"### Scored on {volumes}\n\n{emseg.markdown([heads] + cells)}\n", lines


def dice_along_z(rows, column):
    """{row: Dice (Z,) of a class in the slices of a volume, mean over runs}; column: (number of the
    volume, class)."""
    found = {row: [r.slices[column] for r in members if column in r.slices]
             for row, members in rows.items()}
    return {row: np.ma.masked_invalid(np.array(dice, float)).mean(0).filled(np.nan)
            for row, dice in found.items() if dice}


def rank_rows(tables, key):
    """Average, standard deviation and average rank of the rows that are in all tables over the data
    sets, which are the classes of each table (Pagano 2023, table 2): Markdown, "" where there is
    nothing to rank."""
    cases = []                                          # {row: score}
    for rows in tables.values():
        table = table_of(rows, [key])
        for column in dict.fromkeys(c for cells in table.values() for c in cells if c[1] != "mean"):
            cases.append({row: cells[column][0] for row, cells in table.items()
                          if cells.get(column, [None])[0] is not None})
    names = [row for row in next(iter(cases), {}) if all(row in case for case in cases)]
    if len(cases) < 2 or len(names) < 2:
        return ""
    scores = np.array([[case[row] for row in names] for case in cases])
    ranks = stats.rankdata(scores if key in LOWER_IS_BETTER else -scores, axis=1)
    numbers = scores.mean(0), scores.std(0, ddof=1), ranks.mean(0)
    return f"### Over {len(cases)} data sets\n\n" + emseg.markdown(
        [["row", f"average {key}", "SD over data sets", "average rank"]] + [
            [row, *(format_score(float(number)) for number in each)]
            for row, *each in zip(names, *numbers)]) + "\n"


def draw_runs(folder, tables):
    """histogram.png: peak validation mIoU (Guay 2021, figure 4), and slice_dice.png: Dice along z,
    a line for each row (Pagano 2023, figure 5)."""
    panels, curves, names = {}, [], [*dict.fromkeys(r for rows in tables.values() for r in rows)]
    for scored_on, rows in tables.items():
        volumes = [volume for volume, *_ in scored_on]
        peaks = {row: each for row, members in rows.items()
                 if (each := [value for r in members for (key, _), value in r.scores.items()
                              if key == "val_miou"])}
        if peaks:
            panels[f"runs scored on {', '.join(volumes)}"] = peaks
        for column in dict.fromkeys(c for each in rows.values() for r in each for c in r.slices):
            dice = dice_along_z(rows, column)
            empty, slice_name = np.full(max(map(len, dice.values())), np.nan), "z = {}".format
            with contextlib.suppress(emseg.InputError):             # moved since
                volume = emseg.open_volume(volumes[column[0]])
                slice_name = volume.slice_name if len(volume) == len(empty) else slice_name
            curves.append((f"{column[1]}, {volumes[column[0]]}; means of each row's runs", np.stack(
                [empty, *(dice.get(row, empty) for row in names)], 1), [], slice_name))
    if panels:
        emseg.save_histogram(folder / "histogram.png", panels, "peak validation mIoU")
    if curves:
        emseg.save_slice_dice(folder / "slice_dice.png", curves, ["", *names])


def tabulate(args):
    """evaluate.py --runs: tables of finished runs, printed and as files. Only what was scored on
    the same voxels is in one table."""
    folder, results, tables = Path(args.out_dir), [], {}
    emseg.check_folder(argparse.Namespace(out_dir=folder, overwrite=args.overwrite),
                       Path(__file__).name)
    if (folder / "metrics.json").exists():
        raise emseg.InputError(f"--out-dir {folder} holds scores of predictions; choose another")
    for run in args.runs:
        try:
            results += read_run(run)
        except emseg.InputError as error:
            print(f"skipped {run}: {error}")
    there = {key for r in results for key, _ in r.scores}
    unknown = [key for key in args.scores if key not in there]
    if not results or (unknown and args.scores != DEFAULT_SCORES):
        raise emseg.InputError(f"--scores: no run has {unknown[0]}; there are "
                               f"{', '.join(sorted(there)) or 'no finished runs'}")
    shared = name_rows(results)
    for r in results:
        tables.setdefault(r.scored_on, {}).setdefault(r.row, []).append(r)
    shown = [show_table(scored_on, rows, args.scores) for scored_on, rows in tables.items()]
    heading = f"All rows: {shared}. Mean ± SD over runs; miou counts background, too.\n"
    text = "\n".join([heading, *(table for table, _ in shown), rank_rows(tables, args.scores[0])])
    print(text)
    write_config(args)
    emseg.write_text(folder / "table.md", text)
    emseg.write_csv(folder / "table.csv", [line for _, lines in shown for line in lines])
    draw_runs(folder, tables)


# -- the command -----------------------------------------------------------------------------------

def write_config(args, **more):
    """Begin a folder with config.json."""
    emseg.start_folder(Path(args.out_dir))
    emseg.write_json(Path(args.out_dir, "config.json"), {
        "script": Path(__file__).name, "args": vars(args), **emseg.provenance(__file__), **more})


def class_of(text, classes):
    """The id of a class, given by name or id. Raises InputError."""
    ids = {str(k): k for k in range(len(classes))} | {name: k for k, name in enumerate(classes)}
    if text not in ids:
        raise emseg.InputError(f"there is no class {text}; classes are {', '.join(classes)}")
    return ids[text]


def parse_args(argv=None):
    parser = emseg.Parser(__file__, __doc__)
    data = parser.add_argument_group("data").add_argument
    data("--prediction", nargs="+", metavar="P", default=[], help="predicted class ids: TIFF, MRC, "
         "NPY or a folder of slices; P@z0:z1,y0:y1,x0:x1 crops")
    data("--label", nargs="+", metavar="P", default=[], help="one for each prediction, or for all")
    data("--volume", nargs="+", metavar="P", default=[], help="the images, likewise")
    emseg.add_label_args(data)
    data("--prediction-map", metavar="M", help="a --label-map for the values of the predictions")
    scores = parser.add_argument_group("scores").add_argument
    scores("--organelles", nargs="+", metavar="CLASS", default=[], help="classes of miou_org")
    scores("--distances", action=argparse.BooleanOptionalAction, default=True,
           help="HD95 and ASSD in nm")
    scores("--objects", action="store_true", help="objects.csv: components, sizes and places")
    scores("--min-voxels", type=emseg.positive(int), default=1, metavar="N",
           help="smaller objects are left out")
    scores("--segments", metavar="CLASS", help="variation of information and adapted Rand error of "
           "the connected regions that this class separates, such as cells between membranes")
    scores("--segments-2d", action="store_true", help="segments are regions of each slice by "
           "itself, for thick slices")
    scores("--render", action="store_true", help="surfaces in 3D")
    runs = parser.add_argument_group("table of runs").add_argument
    runs("--runs", nargs="+", metavar="RUN", default=[], help="run folders: tables of their scores")
    runs("--scores", nargs="+", metavar="KEY", default=DEFAULT_SCORES, help="columns: keys of "
         "metrics.json (dice, miou, hd95_nm, voi, …), val_miou and the like at its best epoch")
    run = parser.add_argument_group("run").add_argument
    run("--out-dir", metavar="D", help="folder of the results; default runs/evaluate-NAME")
    run("--overwrite", action="store_true", help="replace an earlier evaluation")
    args = parser.parse_args(argv)
    if bool(args.runs) == bool(args.prediction):
        parser.error("give either --prediction and --label, or --runs")
    for name in ("label", "volume"):
        paths, n = getattr(args, name), len(args.prediction)
        if n and len(paths) == 1:
            setattr(args, name, n * paths)
        elif len(paths) != n and (paths or name == "label"):
            parser.error(f"--{name} has {len(paths)} paths and --prediction {n}; give one, or {n}")
    first = Path((args.prediction or ["runs"])[0])
    name = first.parent.name if first.stem == "prediction" else first.stem
    args.out_dir = args.out_dir or f"runs/evaluate-{name}"
    return args


@emseg.command
def main(args):
    if args.runs:
        return tabulate(args)
    folder = Path(args.out_dir)
    emseg.check_folder(args, Path(__file__).name)

    # data
    runs = [run_of(path) for path in args.prediction]               # {} for other programs'
    metrics = {key: value for key, value in runs[0].items()
               if all(each.get(key) == value for each in runs)}
    classes, pairs = open_pairs(args, runs, metrics)
    args.organelles = [class_of(text, classes) for text in args.organelles]
    if args.segments is not None:
        args.segments = class_of(args.segments, classes)
    write_config(args, classes=classes, training=metrics.get("training"))

    # scores
    entries = []
    for pair in pairs:
        if not pair.label.voxel_size:
            print(f"note: {pair.label.path} has no voxel size: no distances, no sizes and places "
                  f"in nm, cubes in 3D; give --voxel-size Z Y X")
        entries.append(score_pair(pair, classes, args))
        print(f"\n{pair.prediction.path} against {pair.label.path}: "
              f"{emseg.format_shape(pair.label.shape)} voxels, {entries[-1]['ignored']:,} ignored\n"
              + describe(entries[-1]))
    mean = emseg.mean_scores(entries)
    if args.segments is not None:
        mean["segments"] = {key: spread([entry["segments"][key] for entry in entries])[0]
                            for key, value in entries[0]["segments"].items()
                            if not isinstance(value, list)}
    if len(pairs) > 1:
        print(f"\nmean of {len(pairs)} pairs\n{describe(mean, 'mean over pairs of the mean')}")
    emseg.write_json(folder / "metrics.json", {
        "schema": 1, "script": Path(__file__).name, "classes": classes, "volumes": entries,
        "mean": mean, "peak_memory_gib": emseg.peak_memory_gib(torch.device("cpu")),
        **{key: metrics.get(key) for key in (
            "model", "seed", "selected_on", "train_seconds", "predict_seconds",
            "predict_voxels_per_second", "parameters")}})
    if args.objects:
        emseg.write_csv(folder / "objects.csv", [row for pair in pairs for row in object_rows(
            pair, classes, args.min_voxels)])

    # pictures
    draw(folder, pairs, classes)
    for pair in pairs if args.render else ():
        emseg.save_surfaces(folder / f"render_{pair.name}.png", {
            "truth": pair.whole, "prediction": pair.prediction}, classes)
    print(f"wrote {folder}/")


if __name__ == "__main__":
    main(parse_args())
