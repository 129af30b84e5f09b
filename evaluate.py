"""Scores, tables and pictures of segmentations, of the training scripts or of any other program.

Two volumes of class ids, a prediction and its label, become metrics.json, the same that a training
writes, and pictures of the errors; finished runs become one table. Volumes are read slab by slab.

Metrics:
    Dice, IoU, precision, recall, mIoU      emseg.scores, from one pass over both files
    HD95, ASSD (in nm)                      surface_distances. A surface voxel has a face towards
                                            another class; faces at the border of the volume and
                                            towards ignored voxels are none. HD95 is the larger one
                                            of the two directed 95th percentiles, ASSD the mean of
                                            all distances of both directions (Maier-Hein et al.
                                            2024, Metrics reloaded)
    precision, recall, F1, PQ of objects    match_objects: connected components of a class match
                                            where their IoU is above 0.5, so that each has one
                                            partner at most (Kirillov et al. 2019, eq. 1)
    volume, surface of objects              Parts. Surfaces by the Cauchy-Crofton formula from 13
                                            directions, weighted by the voxel size (Legland et al.
                                            2007): balls from a radius of 3 voxels on are within
                                            3 %, from 6 on within 1.3 % of a ball of their volume
                                            (counting faces: 50 % too much), flat ones 10 % low;
                                            where slices are ten pixels thick cubes are 21 % low,
                                            faces along slices 33 %
    variation of information (in bits),     segment_scores (Meila 2007; Arganda-Carreras et al.
    adapted Rand error                      2015). Segments are what the voxels of a class, such as
                                            membrane, separate. Predicted membrane is thinned first:
                                            each of its voxels goes to the nearest segment in its
                                            slice. Membrane of the truth does not count

Run:
    python evaluate.py --prediction prediction.tif --label label.tif --objects --render
    python evaluate.py --prediction cells.mrc --label truth.tif --segments membrane
    python evaluate.py --runs runs/*

Expect:
    165 x 768 x 1024 voxels, one class: Dice, IoU, precision and recall of 130 million voxels in
    0.5 s, all in all 6.6 s with HD95 and ASSD, 18 s and 0.8 GiB with --objects, 35 s and 1.2 GiB
    with --render too; two cores of an Intel Xeon, files uncompressed (commands in the README)
"""

import argparse
import contextlib
import csv
import functools
import io
import json
import math
import os
import re
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage, sparse
from scipy.spatial import cKDTree

import emseg

SLAB = 2**23                # voxels that are looked at together
MOST_PANELS = 24            # of histogram.png
MATCH = 0.5                 # objects are the same where their IoU is above this
ANGLES = ((-60, 25), (30, 40), (120, 15))           # of --render: azimuth and elevation in degrees
UNFINISHED = ".evaluate-"   # begins the name of the folder in which results are gathered


# -- surface distances -----------------------------------------------------------------------------


def surface_voxels(ids):
    """Which voxels of foreground classes (Z, Y, X) have a face towards another class: bool.

    The border of the array and IGNORE are no other class: nobody knows what is there.
    """
    surface = np.zeros(ids.shape, bool)
    for axis in range(3):
        low, high = [tuple(part if other == axis else slice(None) for other in range(3))
                     for part in (slice(None, -1), slice(1, None))]
        face = (ids[low] != ids[high]) & (ids[low] != emseg.IGNORE) & (ids[high] != emseg.IGNORE)
        surface[low] |= face
        surface[high] |= face
    return surface & (ids > 0)


def surface_distances(prediction, label, n_classes, voxel_size, folder, progress=None):
    """Distances from each surface voxel to the nearest one of the other volume, of each class.

    prediction, label: lazy class ids (Z, Y, X); voxel_size (z, y, x) in nm; folder: for temporary
    files, 12 bytes for each surface voxel; progress(done, total) is told about slabs. Returns for
    each foreground class the pair (from the truth, from the prediction) of (distances in nm,
    ascending; how often each occurs).
    """
    cuts = emseg.slabs(label.shape, SLAB)
    with tempfile.TemporaryDirectory(prefix=".surfaces", dir=folder) as folder:
        files = {}                              # (side, class) -> {number of slab: file of voxels}
        for number, cut in enumerate(cuts):
            wide = slice(max(0, cut.start - 1), cut.stop + 1)
            for side, ids in enumerate(read_pair(prediction, label, wide)):
                surface = surface_voxels(ids)[cut.start - wide.start:][: cut.stop - cut.start]
                voxels = np.argwhere(surface).astype(np.int32)
                voxels[:, 0] += cut.start
                classes = ids[cut.start - wide.start:][: len(surface)][surface]
                for k in np.unique(classes):
                    file = f"{folder}/{side}-{k}-{number}.npy"
                    try:
                        np.save(file, voxels[classes == k])
                    except OSError as error:        # a full disk; NumPy names no file
                        raise emseg.InputError(f"{folder}: cannot be written ({error}); is there "
                                               "room on the disk?") from error
                    files.setdefault((side, k), {})[number] = file
            if progress:
                progress(number + 1, len(cuts))
        return [[directed_distances(files.get((side, k), {}), files.get((1 - side, k), {}), cuts,
                                    np.array(voxel_size)) for side in (0, 1)]
                for k in range(1, n_classes)]


def directed_distances(own, other, cuts, voxel_size):
    """Distances from the voxels of one surface to another: (distances, ascending; how often).

    own, other: {number of a slab: file of voxels (n, 3)}. Slabs of the other surface are searched
    from near to far, and only for voxels that may have a nearer neighbour there.
    """
    @functools.lru_cache(4)
    def tree(number):
        return cKDTree(np.load(other[number]) * voxel_size, balanced_tree=False)

    distances, counts = np.empty(0, np.float32), np.empty(0, np.int64)
    for number, file in own.items() if other else ():
        voxels = np.load(file) * voxel_size
        nearest = np.full(len(voxels), np.inf)
        for there in sorted(other, key=lambda there: abs(there - number)):
            gap = np.maximum(cuts[there].start * voxel_size[0] - voxels[:, 0],
                             voxels[:, 0] - (cuts[there].stop - 1) * voxel_size[0])
            still = gap < nearest
            if still.any():
                found = tree(there).query(voxels[still], workers=-1)[0]
                nearest[still] = np.minimum(nearest[still], found)
        distances, inverse = np.unique(np.concatenate([distances, nearest.astype(np.float32)]),
                                       return_inverse=True)
        counts = np.bincount(inverse, np.concatenate([counts, np.ones(len(nearest))]))
    return distances, counts.astype(np.int64)


def hd95_and_assd(directions):
    """95th percentile Hausdorff distance and average symmetric surface distance in nm, from a class
    of surface_distances; None where truth or prediction has no surface."""
    if not all(len(distances) for distances, _ in directions):
        return {"hd95_nm": None, "assd_nm": None}
    total = sum((distances.astype(float) * counts).sum() for distances, counts in directions)
    return {"hd95_nm": max(percentile(*direction, 95) for direction in directions),
            "assd_nm": float(total / sum(counts.sum() for _, counts in directions))}


def percentile(values, counts, q):
    """np.percentile of ascending values that occur `counts` times each."""
    upto = np.cumsum(counts)
    place = (int(upto[-1]) - 1) * q / 100
    low, high = values[np.searchsorted(upto, [math.floor(place), math.ceil(place)], side="right")]
    return float(low + (high - low) * (place - math.floor(place)))


# -- objects and segments --------------------------------------------------------------------------


def crofton_areas(voxel_size):
    """{(dz, dy, dx): area in nm^2} that one crossing of a surface between a voxel and its neighbour
    in this direction, or back, stands for; 13 directions.

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


class Parts:
    """The connected parts of a volume's classes, measured while slabs go by.

    add takes slabs in order, each of which ends with the first slice of the next one: by this slice
    the parts of both are recognised as the same. Afterwards finish joins them: number (n,) is the
    final number, 0.., of each provisional one; class_id, voxels, surface (nm^2), centroid and box
    (n, 3, in voxels; low and high, exclusive) are those of the final ones.
    """

    def __init__(self, shape, structure, voxel_size):
        self.shape, self.structure = shape, structure
        self.areas = crofton_areas(voxel_size or (1.0, 1.0, 1.0))
        self.count, self.measured, self.links, self.shared = 0, [], [], None

    def add(self, start, ids, known, last):
        """Measure a slab of class ids that begins at slice `start`; last: it ends the volume.

        known: bool, False where nobody knows, or None for all. Returns provisional numbers from 1
        on, 0 for background, int32 (Z, Y, X), without the shared last slice.
        """
        numbers, classes = np.zeros(ids.shape, np.int32), []
        for k in np.flatnonzero(np.bincount(ids.ravel(), minlength=2)[1:]) + 1:
            found, n = ndimage.label(ids == k, self.structure)
            np.add(found, len(classes), out=numbers, where=found > 0)
            classes += [k] * n
        own = numbers if last else numbers[:-1]
        self.measured.append(self._measure(start, own, np.array(classes, int), numbers, ids, known))
        np.add(numbers, self.count, out=numbers, where=numbers > 0)
        self.count += len(classes)
        if self.shared is not None:
            pairs = np.stack([self.shared, numbers[0]])[:, numbers[0] > 0]
            self.links.append(np.unique(pairs, axis=1))
        self.shared = None if last else numbers[-1].copy()
        return own

    def _measure(self, start, own, classes, numbers, ids, known):
        n = len(classes)
        inside = np.nonzero(own)
        number = own[inside] - 1
        voxels = np.bincount(number, minlength=n)
        sums = np.stack([np.bincount(number, place + offset, n) for place, offset in
                         zip(inside, (start + 0.5, 0.5, 0.5))], 1).reshape(n, 3)
        boxes = [box or (slice(0, 0),) * 3 for box in ndimage.find_objects(own, n)]
        low = np.array([[s.start for s in box] for box in boxes], int).reshape(n, 3)
        high = np.array([[s.stop for s in box] for box in boxes], int).reshape(n, 3)
        empty = voxels == 0                     # in the shared slice only
        low[:, 0] += start
        high[:, 0] += start
        low[empty], high[empty] = np.iinfo(int).max, 0
        surface = np.zeros(n + 1)
        for step, area in self.areas.items():
            whole = numbers if step[0] else own         # the shared slice is the next slab's
            low_end, high_end = [tuple(
                slice(max(0, sign * d), size + min(0, sign * d)) for d, size in
                zip(step, whole.shape)) for sign in (-1, 1)]
            # of ids, not numbers: what is one part in the end may be two in a slab
            crossed = ids[: len(whole)][low_end] != ids[: len(whole)][high_end]
            if known is not None:
                crossed &= known[: len(whole)][low_end] & known[: len(whole)][high_end]
            for end in (low_end, high_end):
                surface += area * np.bincount(whole[end][crossed], minlength=n + 1)
        return classes, voxels, sums, low, high, surface[1:]

    def finish(self):
        """Join the parts that slabs have in common; returns self."""
        classes, voxels, sums, low, high, surface = map(np.concatenate, zip(*self.measured))
        links = np.concatenate([np.empty((2, 0), int), *self.links], axis=1) - 1
        graph = sparse.coo_matrix((np.ones(len(links[0])), links), (self.count, self.count))
        n, self.number = sparse.csgraph.connected_components(graph, directed=False)
        self.class_id, self.low = np.zeros(n, int), np.full((n, 3), np.iinfo(int).max)
        self.high = np.zeros((n, 3), int)
        self.class_id[self.number] = classes
        self.voxels = np.bincount(self.number, voxels, n).astype(int)
        self.surface = np.bincount(self.number, surface, n)
        self.centroid = np.stack([np.bincount(self.number, part, n) for part in sums.T], 1)
        self.centroid = self.centroid / self.voxels[:, None]
        np.minimum.at(self.low, self.number, low)
        np.maximum.at(self.high, self.number, high)
        return self

    def at_border(self):
        """Which parts touch the border of the volume, where they may go on: bool (n,)."""
        ends = np.array(self.shape) > 1                 # a single slice has no border in z
        return (((self.low == 0) | (self.high == self.shape)) & ends).any(1)


def find_parts(prediction, label, structure, voxel_size, choose=lambda ids: ids, thin=False,
               progress=None):
    """Connected parts of truth and prediction, and how they overlap.

    prediction, label: lazy class ids (Z, Y, X); structure (3, 3, 3): which neighbours connect, see
    scipy.ndimage.label; choose: class ids -> those of which parts are wanted, 0 for the others;
    thin: predicted voxels outside of all parts go to the nearest one in their slice, before
    overlaps are counted. Returns Parts of both, and the overlaps (truth, prediction, voxels), each
    (m,), parts from 0 on. Ignored voxels belong to nothing.
    """
    cuts = emseg.slabs(label.shape, SLAB)
    both = [Parts(label.shape, structure, voxel_size) for _ in range(2)]
    overlaps = []
    for done, cut in enumerate(cuts, 1):
        last = cut.stop == label.shape[0]
        pair = read_pair(prediction, label, slice(cut.start, cut.stop + (not last)))
        known = pair[0] != emseg.IGNORE
        known = None if known.all() else known
        pair = [choose(np.where(ids == emseg.IGNORE, 0, ids)) for ids in pair]
        if known is not None:
            pair = [ids * known for ids in pair]
        truth, pred = [parts.add(cut.start, ids, known, last) for parts, ids in zip(both, pair)]
        if thin:
            pred = grow(pred, voxel_size or (1.0, 1.0, 1.0))
        shared = (truth > 0) & (pred > 0)
        keys = (truth[shared] - 1).astype(np.int64) * (both[1].count + 1) + pred[shared] - 1
        keys, voxels = np.unique(keys, return_counts=True)
        overlaps.append((*np.divmod(keys, both[1].count + 1), voxels))
        if progress:
            progress(done, len(cuts))
    truth, pred = [parts.finish() for parts in both]
    t, p, voxels = map(np.concatenate, zip(*overlaps))
    keys = truth.number[t].astype(np.int64) * (len(pred.voxels) + 1) + pred.number[p]
    keys, inverse = np.unique(keys, return_inverse=True)
    voxels = np.bincount(inverse, voxels, len(keys)).astype(np.int64)
    return truth, pred, (*np.divmod(keys, len(pred.voxels) + 1), voxels)


def grow(numbers, voxel_size):
    """Every voxel of a slice gets the number of the nearest part in it; empty slices stay empty."""
    for page in numbers:
        if page.any() and not page.all():
            nearest = ndimage.distance_transform_edt(page == 0, voxel_size[1:], False, True)
            page[:] = page[tuple(nearest)]
    return numbers


def match_objects(truth, pred, overlaps, classes, min_voxels):
    """Scores of objects by class, and which objects of truth and prediction are the same.

    truth, pred, overlaps: from find_parts; objects of less than min_voxels are left out. Returns
    {class name: {"truth", "predicted", "matched", "precision", "recall", "f1", "pq", "sq"}} and the
    matches {object of the truth: (object of the prediction, IoU)}. Undefined values are None.
    """
    t, p, shared = overlaps
    kept_t, kept_p = truth.voxels >= min_voxels, pred.voxels >= min_voxels
    iou = shared / (truth.voxels[t] + pred.voxels[p] - shared)
    same = (truth.class_id[t] == pred.class_id[p]) & (iou > MATCH) & kept_t[t] & kept_p[p]
    matches = {int(a): (int(b), float(value)) for a, b, value in
               zip(t[same], p[same], iou[same])}
    matched = np.bincount(truth.class_id[t[same]], minlength=len(classes))
    quality = np.bincount(truth.class_id[t[same]], iou[same], len(classes))
    drawn = np.bincount(truth.class_id[kept_t], minlength=len(classes))
    found = np.bincount(pred.class_id[kept_p], minlength=len(classes))
    scores = {}
    for k, name in enumerate(classes[1:], 1):
        scores[name] = {
            "truth": int(drawn[k]), "predicted": int(found[k]), "matched": int(matched[k]),
            "precision": ratio(matched[k], found[k]), "recall": ratio(matched[k], drawn[k]),
            "f1": ratio(2 * matched[k], drawn[k] + found[k]),
            "pq": ratio(2 * quality[k], drawn[k] + found[k]),
            "sq": ratio(quality[k], matched[k])}
    return scores, matches


def ratio(numerator, denominator):
    """A float, or None where the denominator is 0."""
    return float(numerator / denominator) if denominator else None


def segment_scores(truth, pred, overlaps):
    """Variation of information in bits (its two parts: splits and mergers), adapted Rand error,
    Rand precision (low: mergers) and recall (low: splits), numbers of segments.

    From find_parts. Voxels count that belong to a segment of truth and prediction.
    """
    t, p, shared = overlaps
    of_truth, of_pred = np.bincount(t, shared), np.bincount(p, shared)
    total = shared.sum()
    result = {"truth": len(truth.voxels), "predicted": len(pred.voxels)}
    if not total:
        return result | dict.fromkeys(("voi", "voi_split", "voi_merge", "adapted_rand_error",
                                       "rand_precision", "rand_recall"))
    share = shared / total
    split = -(share * np.log2(shared / of_truth[t])).sum()
    merge = -(share * np.log2(shared / of_pred[p])).sum()
    together = (shared.astype(float) ** 2).sum()
    precision, recall = together / (of_pred**2).sum(), together / (of_truth**2).sum()
    split, merge = abs(float(split)), abs(float(merge))         # abs: no -0.0
    return result | {"voi": split + merge, "voi_split": split, "voi_merge": merge,
                     "adapted_rand_error": float(1 - 2 * precision * recall / (precision + recall)),
                     "rand_precision": float(precision), "rand_recall": float(recall)}


def object_rows(pair, source, parts, classes, voxel_size, min_voxels, partners):
    """Rows of objects.csv. pair: name; source: truth or prediction; partners: {object: (object of
    the other source, IoU)}."""
    size = voxel_size or (None,) * 3
    border = parts.at_border()

    def nm(values):
        return [None if s is None else round(float(v) * s, 3) for v, s in zip(values, size)]

    for n in np.flatnonzero(parts.voxels >= min_voxels):
        partner, iou = partners.get(int(n), (None, None))
        volume = parts.voxels[n] * math.prod(size) if voxel_size else None
        yield dict(zip(OBJECT_COLUMNS, (
            pair, source, classes[parts.class_id[n]], n + 1, parts.voxels[n],
            volume and round(volume, 3), round(parts.surface[n], 3) if voxel_size else None,
            *nm(parts.centroid[n]), *nm(parts.low[n]), *nm(parts.high[n]), int(border[n]),
            None if partner is None else partner + 1, iou and round(iou, 4))))


OBJECT_COLUMNS = ("pair", "source", "class", "id", "voxels", "volume_nm3", "surface_nm2",
                  "centroid_z_nm", "centroid_y_nm", "centroid_x_nm", "box_z0_nm", "box_y0_nm",
                  "box_x0_nm", "box_z1_nm", "box_y1_nm", "box_x1_nm", "at_border", "match", "iou")


# -- pairs of volumes ------------------------------------------------------------------------------


@dataclass
class Pair:
    """A prediction, its label and the grey values that both belong to (None: not given): lazy
    (Z, Y, X). counts: confusion counts of each slice (Z, K, K)."""
    name: str
    prediction: object
    label: object
    image: object
    counts: np.ndarray

    @property
    def voxel_size(self):
        return self.label.voxel_size


def read_pair(prediction, label, cut):
    """Class ids of truth and prediction in some slices, IGNORE where the truth is: uint8 each."""
    truth, pred = label[cut], prediction[cut]
    pred[truth == emseg.IGNORE] = emseg.IGNORE
    return truth, pred


def open_pairs(args):
    """Open and count all pairs of the command line: (class names, list of Pair, notes to print).

    Each file is read once, slice by slice; what its values mean is decided then. Raises InputError.
    """
    maps = [text and emseg.parse_label_map(text) for text in (args.label_map, args.prediction_map)]
    predictions = [emseg.open_volume(path) for path in args.prediction]
    images = [emseg.open_volume(path) for path in args.volume] or [None] * len(predictions)
    sources, notes = [], []
    for path, prediction, image in zip(args.label, predictions, images):
        source, rows = emseg.pair_labels(path, prediction, args.label_slices)
        sources.append((source, rows))
        if image and image.shape != prediction.shape:
            raise emseg.InputError(
                f"{image.path}: a volume of {emseg.format_shape(image.shape)} voxels, its "
                f"prediction {prediction.path} has {emseg.format_shape(prediction.shape)}")
        notes += choose_voxel_size(args, prediction, source)
    counted, started = [], time.monotonic()
    for (source, rows), prediction in zip(sources, predictions):
        counted.append(emseg.count_pairs(source, rows, prediction, functools.partial(
            emseg.show_progress, f"{prediction.path}: counting  slice")))
    pairs, drawn, found = zip(*counted)
    voxels = sum(math.prod(prediction.shape) for prediction in predictions)
    notes.append(f"counted {voxels:,} voxels in {time.monotonic() - started:.2f} s")
    names = args.classes
    if not names and not args.prediction_map:
        names = training_of(args.prediction)[0].get("classes")
        notes += [f"class names of the run: {', '.join(names)}"] if names else []
    n_classes = count_classes(names, *maps, drawn, found, args)
    options = {"require_foreground": False}
    labels, _ = emseg.open_labels(
        args.label, predictions, n_classes, maps[0], args.ignore_label, args.label_slices,
        tallies=drawn, **options)
    masks, _ = emseg.open_labels(args.prediction, predictions, n_classes, maps[1], tallies=found,
                                 flag="--prediction-map", **options)
    classes = emseg.class_names(names, n_classes)
    for flag, each in (("label", labels), ("prediction", masks)):
        notes += dict.fromkeys(filter(None, (reading(flag, item, classes) for item in each)))
    result = []
    for name, label, mask, values, image in zip(emseg.unique_names(args.prediction), labels, masks,
                                                pairs, images):
        if emseg.IGNORE in mask.ids:
            raise emseg.InputError(f"{mask.path}: --prediction-map maps to {emseg.IGNORE}, but a "
                                   "prediction cannot leave voxels out; see --ignore-label")
        counts = count_confusion(label, mask, values, n_classes)
        if not counts.sum():
            raise emseg.InputError(f"{label.path}: every voxel is ignored; nothing can be scored")
        if image:
            image.voxel_size = label.voxel_size
        if len(label.slices) < len(label):
            notes.append(f"{label.path}: {len(label.slices)} of {len(label)} slices are annotated; "
                         "surfaces and objects are cut where the others begin")
        result.append(Pair(name, mask, label, image, counts))
    total = sum(pair.counts.sum(0) for pair in result)
    extra = [classes[k] for k in np.flatnonzero((total.sum(1) == 0) & (total.sum(0) > 0)) if k]
    if extra and not names and not args.prediction_map:
        notes.append(f"warning: {', '.join(extra)} in predictions only; if their values are the "
                     'numbers of objects, give --prediction-map "0=0,*=1"')
    return classes, result, notes


def choose_voxel_size(args, prediction, source):
    """Give a prediction the voxel size that counts: --voxel-size, else the label's, else its own.
    Returns notes to print."""
    drawn, own = source.voxel_size, prediction.voxel_size
    prediction.voxel_size = tuple(args.voxel_size or drawn or own or ()) or None
    if args.voxel_size:
        return []
    if not prediction.voxel_size:
        return [f"warning: neither {prediction.path} nor {source.path} has a voxel size, so that "
                "lengths in nm are undefined; give --voxel-size Z Y X"]
    if drawn and own and not np.allclose(drawn, own, rtol=0.01):
        shown = [" x ".join(f"{side:g}" for side in size) for size in (own, drawn)]
        return [f"warning: voxels of {prediction.path} are {shown[0]} nm, those of {source.path} "
                f"{shown[1]} nm; the latter count, unless you give --voxel-size Z Y X"]
    return []


def training_of(predictions):
    """config.json and metrics.json of the run in whose folder all predictions are, else {}, {}."""
    folders = {Path(path).parent for path in predictions}
    found = []
    for name in ("config.json", "metrics.json"):
        try:
            (folder,) = folders
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            json.dumps(content, allow_nan=False)        # a NaN is no number for metrics.json
            classes = content["classes"]
            usable = isinstance(classes, list) and len(set(classes)) == len(classes) > 1 and all(
                isinstance(name, str) for name in classes)
            found.append(content if usable else {})
        except (OSError, ValueError, KeyError, TypeError):
            found.append({})
    return found


def count_classes(names, label_map, prediction_map, drawn, found, args):
    """How many classes there are: as many as names, else as the maps name and the values show.

    drawn, found: tallies of labels and predictions. Class ids 0..K may be spread over all files; a
    file with two values {0, v} is a mask of one class. Raises InputError for other values.
    """
    if names:
        return len(names)
    ids, files = {0, 1}, []
    for paths, tallies, mapping, flag in ((args.label, drawn, label_map, "--label-map"),
                                          (args.prediction, found, prediction_map,
                                           "--prediction-map")):
        if mapping:
            ids |= set(range(1 + max([0, *(k for k in mapping.values() if k != emseg.IGNORE)])))
            continue
        for path, tally in zip(paths, tallies):
            values = {int(v) for each, _ in tally.values() for v in each}
            values -= {args.ignore_label} if flag == "--label-map" else set()
            files.append((path, values, flag))
            if len(values - {0}) > 1 or min(values, default=0) < 0:
                ids |= values
    if ids != set(range(len(ids))) or len(ids) > emseg.IGNORE:
        for path, values, flag in files:
            emseg.decide_classes(sorted(values | {0}), [path], flag)
    return len(ids)


def reading(flag, labels, classes, most=8):
    """How the values of a file are read, where they are not class ids, as a line to print."""
    if (labels.values == labels.ids).all():
        return None
    groups = {}
    for value, k in zip(labels.values, labels.ids):
        name = "ignored" if k == emseg.IGNORE else classes[k]
        groups.setdefault(name, []).append(str(value))
    shown = [", ".join(values[:most]) + ", …" * (len(values) > most) + f" as {name}"
             for name, values in groups.items()]
    return f"{flag} {labels.path}: reads {'; '.join(shown)}"


def count_confusion(label, mask, values, n_classes):
    """Confusion counts (Z, K, K), [z, truth, prediction], from pairs of raw values."""
    counts = np.zeros((len(label), n_classes, n_classes), np.int64)
    for z, (drawn, found, voxels) in values.items():
        truth = label.ids[np.searchsorted(label.values, drawn)]
        pred = mask.ids[np.searchsorted(mask.values, found)]
        scored = truth != emseg.IGNORE
        np.add.at(counts[z], (truth[scored], pred[scored]), voxels[scored])
    return counts


def score_pair(pair, classes, args, folder):
    """All scores of a pair, as an entry of metrics.json, and its rows of objects.csv."""
    def progress(what):
        return functools.partial(emseg.show_progress, f"{pair.name}: {what}  slab")

    result = emseg.volume_scores(pair.counts, pair.label, classes, args.organelles)
    size, volumes = pair.voxel_size, (pair.prediction, pair.label)
    if args.distances:
        distances = surface_distances(*volumes, len(classes), size, folder, progress(
            "surfaces")) if size else [[((), ())] * 2] * (len(classes) - 1)
        for name, directions in zip(classes[1:], distances):
            result["per_class"][name].update(hd95_and_assd(directions))
    rows = []
    if args.objects:
        structure = ndimage.generate_binary_structure(3, CONNECTIVITY[args.connectivity])
        *parts, overlaps = find_parts(*volumes, structure, size, progress=progress("objects"))
        result["objects"], matches = match_objects(*parts, overlaps, classes, args.min_voxels)
        partners = matches, {b: (a, iou) for a, (b, iou) in matches.items()}
        for source, own, partner in zip(("truth", "prediction"), parts, partners):
            rows += object_rows(pair.name, source, own, classes, size, args.min_voxels, partner)
    if args.segments is not None:
        structure = ndimage.generate_binary_structure(3, 1)
        if args.segments_2d:
            structure[0] = structure[2] = False
        result["segments"] = segment_scores(*find_parts(
            *volumes, structure, size, lambda ids: (ids != args.segments).astype(np.uint8),
            thin=True, progress=progress("segments")))
    emseg.show_progress("", 1, 1)
    image = None if pair.image is None else pair.image.path
    return emseg.volume_entry(image, pair.label.path, pair.prediction.path, pair.label.shape,
                              result, args.organelles), rows


CONNECTIVITY = {6: 1, 18: 2, 26: 3}         # neighbours of a voxel -> what SciPy calls that


def mean_of(blocks):
    """The mean of dictionaries of numbers, or of such dictionaries; None values are left out."""
    if isinstance(blocks[0], dict):
        return {key: mean_of([block[key] for block in blocks]) for key in blocks[0]}
    known = [value for value in blocks if value is not None]
    return sum(known) / len(known) if known else None


# -- tables ----------------------------------------------------------------------------------------

HEADINGS = {
    "dice": "Dice", "iou": "IoU", "precision": "precision", "recall": "recall",
    "dice_slices": "Dice, slices", "dice_nonempty": "Dice, non-empty",
    "dice_slices_nonempty": "Dice, slices, non-empty", "hd95_nm": "HD95 [nm]",
    "assd_nm": "ASSD [nm]", "miou": "mIoU", "miou_org": "MIoU(org)", "accuracy": "accuracy",
    "truth": "truth", "predicted": "predicted", "matched": "matched", "f1": "F1", "pq": "PQ",
    "sq": "mean IoU of matches", "voi": "VOI [bit]", "voi_split": "VOI split",
    "voi_merge": "VOI merge", "adapted_rand_error": "adapted Rand error",
    "rand_precision": "Rand precision", "rand_recall": "Rand recall"}
OF_ALL = {"dice": "mean Dice", "iou": "mean IoU"}      # the same keys, as means over classes
COUNTS = ("truth", "predicted", "matched")
LOWER_IS_BETTER = ("hd95_nm", "assd_nm")


def markdown(rows):
    """Rows of cells, the first one the heads, as a Markdown table with straight columns."""
    rows = [[" ".join(str(cell).replace("|", "\\|").splitlines()) for cell in row]
            for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*rows)]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths)] for row in rows]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(key, value):
    """A score for people: lengths to 0.1 nm, counts whole, all else to four digits."""
    if value is None:
        return "undefined"
    return f"{value:,.{0 if key in COUNTS else 1 if key.endswith('_nm') else 4}f}"


def describe(entry, classes):
    """The scores of metrics.json's volume entry or mean as text for the terminal."""
    keys = [key for key in HEADINGS if key in entry["per_class"][classes[1]]]
    lines = [markdown([["", *(HEADINGS[key] for key in keys)]] + [
        [name, *(shown(key, scores[key]) for key in keys)]
        for name, scores in entry["per_class"].items()])]
    keys = [key for key in ("dice", "iou", "miou", "miou_org", "accuracy") if key in entry]
    names = {**HEADINGS, **OF_ALL, "miou": "mIoU with background"}
    lines.append("  ".join(f"{names[key]} {shown(key, entry[key])}" for key in keys))
    if "objects" in entry:
        keys = list(entry["objects"][classes[1]])
        lines.append(markdown([["objects", *(HEADINGS[key] for key in keys)]] + [
            [name, *(shown(key, scores[key]) for key in keys)]
            for name, scores in entry["objects"].items()]))
    if "segments" in entry:
        lines.append(markdown([["segments", *(HEADINGS[key] for key in entry["segments"])],
                               ["", *(shown(*item) for item in entry["segments"].items())]]))
    return "\n".join(lines)


def absences(entry):
    """Which scores of an entry are undefined and why, as lines to print."""
    for name, scores in entry["per_class"].items():
        truth, pred = (scores["tp"] + scores[key] for key in ("fn", "fp"))
        missing = [HEADINGS[key] for key, value in scores.items() if value is None]
        where = ("is in neither truth nor prediction" if not truth and not pred else
                 "is not in the truth" if not truth else "is not in the prediction")
        where = "has no surface in the volume, or no voxel size" if truth and pred else where
        if missing:
            yield (f"{name} {where}: undefined (null), and left out of means, are "
                   f"{', '.join(missing)}")


# -- pictures --------------------------------------------------------------------------------------


def save_confusion(path, counts, classes):
    """confusion.png: of the voxels of each true class (row), the share that each class got."""
    counts = counts.astype(float)
    total = counts.sum(1, keepdims=True)
    share = np.divide(counts, total, where=total > 0, out=np.zeros_like(counts))
    n = len(classes)
    side = 2.2 + 0.75 * n
    figure = emseg.new_figure(figsize=(side + 0.6, side), dpi=120)
    axis = figure.subplots()
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for i in range(n):
        for j in range(n):
            if total[i]:
                axis.text(j, i, percent(share[i, j]), ha="center", va="center", fontsize=8,
                          color="white" if share[i, j] > 0.55 else "black")
    names = [emseg.plain(name) for name in classes]
    axis.set_xticks(range(n), names, rotation=40, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(n), [f"{name}\n{compact(int(voxels))}" for name, voxels in
                               zip(names, total[:, 0])])
    axis.set(xlabel="prediction", ylabel="truth (voxels)")
    emseg.save_figure(figure, path)


def percent(share):
    """0.0042 -> 0.42 %, as short as it can be read."""
    digits = 1 if share >= 0.0995 else 2 if share >= 0.001 else 3
    return f"{100 * share:.{digits if 0 < share < 1 else 0}f} %"


def compact(number):
    """9077301 -> 9.08 M."""
    for power, letter in ((9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.3g} {letter}"
    return str(number)


def save_renders(folder, suffix, pair, classes, max_side=384, pixels=1000):
    """render.png, all classes together, and one more for each of several that occur: truth and
    prediction in 3D from three sides."""
    emseg.show_progress(f"{pair.name}: drawing surfaces", 0, 1)
    items = {"truth": pair.label, "prediction": pair.prediction}
    seen, glass, side, edges = emseg.see_surfaces(items, classes, ANGLES, max_side, pixels)
    total = pair.counts.sum(0)
    found = [k for k in range(len(classes) - 1) if total[k + 1].any() or total[:, k + 1].any()]
    pictures = [("", range(len(classes) - 1), glass)]
    if len(classes) > 2:
        names = [re.sub(r"[^\w.-]+", "_", name) for name in classes[1:]]
        pictures += [(f"_{names[k]}", [k], [False]) for k in found]
    for name, chosen, see_through in pictures:
        rows = {source: [emseg.compose([view[k] for k in chosen], chosen, see_through)
                         for view in views] for source, views in seen.items()}
        path = folder / f"render{suffix}{name}.png"
        while path.exists():                            # the classes "a b" and "a_b"
            path = path.with_stem(path.stem + "_")
        emseg.save_pictures(path, rows, [""] * len(ANGLES), side, edges,
                            classes if len(chosen) > 1 else (), inches=4.5, dpi=160)
    emseg.show_progress("", 1, 1)


# -- tables of runs --------------------------------------------------------------------------------

# Arguments that two trainings of one method may differ in, or that belong to what is scored.
NO_SETTING = {"seed", "out_dir", "overwrite", "resume", "checkpoint", "device", "amp", "compile",
              "workers", "demo", "save_probability", "test_volume", "test_label", "classes",
              "voxel_size", "instances", "top_k", "ensemble", "compare",
              # of evaluate.py
              "prediction_map", "distances", "objects", "connectivity", "min_voxels",
              "segments", "segments_2d", "render", "runs", "scores"}


@dataclass
class Result:
    """The scores of one trained network, ensemble or stage; see read_run. settings: the arguments
    of its training that may tell it from others; is_part: whether its folder is within that of the
    run that it is a part of."""
    run: str
    script: str
    model: str
    method: str
    seed: object
    classes: tuple
    labels: tuple
    mean: dict
    settings: dict
    sources: dict
    is_part: bool
    parameters: object = None
    train_seconds: object = None
    predict_rate: object = None

    def __post_init__(self):
        """Raises TypeError where metrics.json held something else."""
        for key, kinds in (("script", str), ("model", str), ("method", str),
                           ("seed", (int, type(None)))):
            if not isinstance(getattr(self, key), kinds):
                raise TypeError(f"{key} is {getattr(self, key)!r}")
        for key in ("parameters", "train_seconds", "predict_rate"):
            check_number(key, getattr(self, key))
        for key in HEADINGS:
            check_number(key, self.mean.get(key))
        for scores in self.mean["per_class"].values():
            for key, value in scores.items():
                check_number(key, value)

    @property
    def title(self):
        return (self.script, self.model, self.method)


def read_run(folder):
    """The Results in a run folder: its own, those of its stages, instances and structures. Raises
    InputError, as a reason, where there are none."""
    folder = Path(folder)
    try:
        if not folder.is_dir():
            raise emseg.InputError("a file, no run folder" if folder.exists() else
                                   "no such folder")
        if not (folder / "metrics.json").exists():
            begun = (folder / "config.json").exists() and not (folder / "table.md").exists()
            raise emseg.InputError("unfinished, it holds no metrics.json" if begun else
                                   "not a run, it holds no metrics.json")
        content = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        if content["schema"] != 1:
            raise emseg.InputError(f"metrics.json of schema {content['schema']}, wanted 1")
        config = folder / "config.json"
        config = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
        if content["mean"] is None or not any(entry["label"] for entry in content["volumes"]):
            raise emseg.InputError("no scores: its test volumes have no labels")
        return list(results_of(folder, content, config))
    except emseg.InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError,
            RecursionError) as error:
        raise emseg.InputError(f"damaged ({type(error).__name__}: {error})".replace("\n", " "))


def results_of(folder, content, config):
    """The Results of a run, from its metrics.json and config.json."""
    classes, training = content["classes"], config.get("training") or {}
    args, script = (training.get(key) or own for key, own in (
        ("args", config.get("args", {})), ("script", content["script"])))
    if not (isinstance(classes, list) and len(classes) > 1 and all(
            isinstance(name, str) for name in classes)):
        raise TypeError(f"classes is {classes!r}")
    method = method_of(args, content) + ", by evaluate.py" * bool(training)
    own = Result(
        str(folder), script, "" if content["model"] is None else content["model"],
        method.removeprefix(", "), content["seed"], tuple(classes),
        tuple(str(entry["label"]) for entry in content["volumes"] if entry["label"]),
        content["mean"], {key: value for key, value in args.items() if has_effect(key, args)},
        config.get("sha256", {}), bool(config.get("part_of")),
        content["parameters"], content["train_seconds"], content["predict_voxels_per_second"])
    if content.get("stages"):
        # networks and times are those of all stages, or of two trainings that were compared
        unknown = dict.fromkeys(("parameters", "train_seconds", "predict_rate"))
        for name, mean in content["stages"].items():
            whole = name == list(content["stages"])[-1] and not args.get("compare")
            yield replace(own, method=" ".join(filter(None, (own.method, name))), mean=mean,
                           **{} if whole else unknown)
        return
    yield own
    for name, block in content.get("instances", {}).items():
        part = folder / name / "metrics.json"
        part = json.loads(part.read_text(encoding="utf-8")) if part.exists() else {}
        if block["mean"] is not None:
            yield replace(
                own, run=str(folder / name), model=block["model"], seed=block["seed"], method="",
                mean=block["mean"], parameters=part.get("parameters"),
                train_seconds=part.get("train_seconds"),
                predict_rate=part.get("predict_voxels_per_second"))
    structures = content.get("structures", {})
    if structures and None not in structures.values():
        average = {key: content["average"][key] for key in ("dice", "iou", "miou", "accuracy")}
        per_class = {name: scores for block in structures.values()
                     for name, scores in block["per_class"].items()}
        yield replace(own, method="masks by themselves", mean={
            "per_class": per_class, **average})


def has_effect(key, args):
    """Whether an argument of a training may tell it from others of the same method."""
    idle = key.startswith("cps_") and args.get("method") == "supervised"
    return not (key in NO_SETTING or idle or (key == "partial" and not args[key]))


def check_number(name, value):
    """Raise TypeError for what is neither None nor a number of a size that scores may have."""
    if value is not None and not (type(value) in (int, float) and abs(value) < 2**63):
        raise TypeError(f"{name} is {value!r}")


def method_of(args, content):
    """What was trained, in words, from the arguments of a run."""
    words = []
    if "method" in args:
        cutmix = " + CutMix" if args.get("cutmix") else ""
        words.append(f"CPS{cutmix}" if args["method"] == "cps" else args["method"])
    if "partial" in args and "stages" not in content:
        words.append("mixed labels" if args["partial"] else "baseline")
    words += [f"no {flag}" for flag in ("mpp", "scm") if args.get(flag) is False]
    if content.get("instances"):
        words.append(f"ensemble of {len(content['ensemble']['members'])}")
    if "prediction" in args:
        words.append(", ".join(args["prediction"]))
    return ", ".join(words)


def read_runs(folders):
    """The Results of all folders, and a line for each one that has none. A part of a run that is
    given too is left to it."""
    found, skipped = {}, []                     # found: real path -> Results
    for folder in folders:
        real = os.path.realpath(folder)
        if real in found:
            continue
        try:
            found[real] = read_run(folder)
        except emseg.InputError as error:
            found[real] = []
            skipped.append(f"skipped {folder}: {error}")
    return [result for real, results in found.items() for result in results
            if not (result.is_part and found.get(os.path.dirname(real)))], skipped


def grouped(results):
    """[(classes, labels), {title: [Result]}] of what was scored alike, in the order given.

    Within a table the title is (script, model, method), the method followed by all settings in
    which trainings of the same script and model differ.
    """
    tables = {}
    for result in results:
        tables.setdefault((result.classes, result.labels), []).append(result)
    for scored, members in tables.items():
        values = {}                             # (script, model, key) -> the values that occur
        for result in members:
            for key, value in result.settings.items():
                found = values.setdefault((result.script, result.model, key), [])
                found += [] if value in found else [value]
        rows = {}
        for result in members:
            words = [result.method]
            for key, value in result.settings.items():
                found = values[result.script, result.model, key]
                if len(found) > 1 and key not in METHOD:
                    words.append(setting(key, value, found))
            title = (*result.title[:2], ", ".join(filter(None, words)))
            rows.setdefault(title, []).append(result)
        yield scored, rows


def natural(text):
    """A key that sorts n=7 before n=10."""
    return [part.zfill(20) if part.isdecimal() else part for part in re.split(r"(\d+)", text)]


METHOD = {"method", "cutmix", "deform", "mpp", "scm", "prediction", "model"}


def setting(key, value, others):
    """An argument as text that tells it from its other values: --label-slices n=7; of paths only
    the names, where these are enough."""
    texts = {short: [as_text(other, short) for other in others] for short in (True, False)}
    short = len(set(texts[True])) == len(others)
    return f"{emseg.flag_name(key)} {texts[short][others.index(value)]}"


def as_text(value, short):
    """The value of an argument; short: of paths only the names, of floats only six digits."""
    if isinstance(value, (list, tuple)):
        return " ".join(as_text(part, short) for part in value)
    if value is None or isinstance(value, bool):
        return {None: "default", True: "yes", False: "no"}[value]
    if short and isinstance(value, str):
        return Path(value).name
    return f"{value:g}" if short and isinstance(value, float) else str(value)


def columns_of(results, classes, wanted):
    """(heading, key, class or None) of the scores in a table, those asked for of every class."""
    columns = [(f"{HEADINGS[key]} {name}", key, name) for key in wanted for name in classes[1:]]
    whole = [key for key in wanted if key in ("dice", "iou") and len(classes) > 2]
    whole += [key for key in ("miou", "miou_org") if any(key in r.mean for r in results)]
    return columns + [(OF_ALL.get(key, HEADINGS[key]), key, None) for key in whole]


def value_of(result, key, name):
    """A score of a Result, of a class or of the whole; None where it is undefined."""
    block = result.mean if name is None else result.mean["per_class"].get(name, {})
    return block.get(key)


def spread(values):
    """(mean, standard deviation over n - 1 or None, how many) of those that are not None."""
    known = [value for value in values if value is not None]
    if not known:
        return None, None, 0
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known)


def table_of_runs(title, classes, rows, wanted):
    """A title and a Markdown table of means ± standard deviations, the best of each in bold."""
    results = [result for members in rows.values() for result in members]
    columns = columns_of(results, classes, wanted)
    spreads = [[spread([value_of(r, key, name) for r in members]) for _, key, name in columns]
               for members in rows.values()]
    best = []
    for (_, key, _), column in zip(columns, zip(*spreads)):
        means = [round(mean, 4) for mean, *_ in column if mean is not None]
        choose = min if key in LOWER_IS_BETTER else max
        best.append(choose(means) if len(means) > 1 else None)
    heads = ["script", "model", "method", "runs", *(head for head, *_ in columns), "parameters",
             "training [min]", "prediction [Mvoxel/s]"]
    lines = [heads]
    for (names, members), row in zip(rows.items(), spreads):
        cells = []
        for (mean, deviation, n), top, (_, key, _) in zip(row, best, columns):
            if mean is None:
                cells.append("undefined")
                continue
            text = shown(key, mean) + (f" ± {shown(key, deviation)}" if n > 1 else "")
            text = f"**{text}**" if top is not None and round(mean, 4) == top else text
            cells.append(text + (f" ({n} of {len(members)})" if n < len(members) else ""))
        parameters = sorted({r.parameters for r in members if r.parameters is not None})
        times = [spread([r.train_seconds and r.train_seconds / 60 for r in members]),
                 spread([r.predict_rate and r.predict_rate / 1e6 for r in members])]
        lines.append([*names, len(members), *cells, " to ".join(f"{p:,}" for p in parameters),
                      *(("" if mean is None else f"{mean:.3g}") + (
                          f" ± {deviation:.2g}" if deviation is not None else "")
                        for mean, deviation, _ in times)])
    return f"### {title}\n\n{markdown(lines)}\n"


def titles_of(tables):
    """A title for each of `grouped` tables: its classes and the labels that its runs were scored
    on, with their folders where two files have the same name."""
    names = {label: Path(label).name for (_, labels), _ in tables for label in labels}
    if len(set(names.values())) < len(names):
        names = {label: label for label in names}
    return [f"{', '.join(classes[1:])}, scored on {', '.join(names[label] for label in labels)}"
            for (classes, labels), _ in tables]


def doubtful(rows):
    """What makes a mean over runs doubtful, as lines to print."""
    for title, members in rows.items():
        name = " ".join(filter(None, title))
        seeds = [r.seed for r in members if r.seed is not None]
        if len(set(seeds)) < len(seeds):
            yield f"warning: {name}: runs with the same seed count as several"
        versions = {json.dumps(r.sources, sort_keys=True) for r in members if r.sources}
        if len(versions) > 1:
            yield f"warning: {name}: runs of different versions of the code are averaged"


def csv_rows(tables):
    """Rows of table.csv, one for each group of runs, and of runs.csv, one for each run."""
    groups, runs = [], []
    for (classes, labels), rows in tables:
        for title, members in rows.items():
            head = dict(zip(("script", "model", "method"), title), scored_on="; ".join(labels))
            group = {**head, "runs": len(members),
                     "seeds": " ".join(str(r.seed) for r in members)}
            flat = [scores_by_name(r) for r in members]
            for key in dict.fromkeys(key for each in flat for key in each):
                mean, deviation, _ = spread([each.get(key) for each in flat])
                group |= {f"{key}_mean": mean, f"{key}_std": deviation}
            groups.append(group)
            runs += [{**head, "run": r.run, "seed": r.seed, **each}
                     for r, each in zip(members, flat)]
    return groups, runs


def scores_by_name(result):
    """All scores of a Result as {name: value}, with its parameters and times."""
    whole = {key: result.mean[key] for key in HEADINGS if key in result.mean}
    each = {f"{key}_{name}": value for name, scores in result.mean["per_class"].items()
            for key, value in scores.items()}
    return whole | each | {"parameters": result.parameters, "train_seconds": result.train_seconds,
                           "predict_voxels_per_second": result.predict_rate}


def write_csv(path, rows, columns=None):
    """A CSV file, whole or not at all; columns: default all that occur, in order."""
    columns = columns or [*dict.fromkeys(key for row in rows for key in row)]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    emseg.write_text(path, text.getvalue())


def histogram_groups(rows, most=8):
    """{name: mIoU of its runs} of a table, for the histogram: by method where that gives few
    groups, else by model, else by script."""
    results = [(title, r.mean["miou"]) for title, members in rows.items() for r in members
               if r.mean.get("miou") is not None]
    for length in (3, 2, 1):
        groups = {}
        for title, miou in results:
            groups.setdefault(" ".join(filter(None, title[:length])), []).append(miou)
        if len(groups) <= most:
            break
    return groups


def tabulate(args):
    """evaluate.py --runs: table.md, table.csv, runs.csv and histogram.png of finished runs."""
    own, runs = os.path.realpath(args.out_dir), args.runs
    if runs == sorted(runs):                        # a shell pattern, in which 15 comes before 7
        runs = sorted(runs, key=natural)
    results, skipped = read_runs([run for run in runs if os.path.realpath(run) != own])
    for line in skipped:
        print(line)
    if not results:
        raise emseg.InputError(f"--runs: none of {len(args.runs)} folders holds a finished run")
    tables = list(grouped(results))
    titles = titles_of(tables)
    texts = [table_of_runs(title, classes, rows, args.scores)
             for title, ((classes, _), rows) in zip(titles, tables)]
    panels = {title: histogram_groups(rows) for title, (_, rows) in zip(titles, tables)}
    panels = {title: groups for title, groups in [*panels.items()][:MOST_PANELS] if groups}
    print("\n".join(texts))
    for _, rows in tables:
        for line in doubtful(rows):
            print(line)
    with results_folder(args) as folder:
        emseg.write_text(folder / "table.md", "\n".join(texts))
        for name, rows in zip(("table.csv", "runs.csv"), csv_rows(tables)):
            write_csv(folder / name, rows)
        if panels:
            emseg.save_histogram(folder / "histogram.png", panels, "mIoU")


# -- the command -----------------------------------------------------------------------------------


def check_folder(folder, overwrite):
    """Refuse a folder that holds something else than an evaluation to replace."""
    if folder.exists() and not folder.is_dir():
        raise emseg.InputError(f"--out-dir {folder} is a file")
    if not folder.exists() or all(file.name.startswith(UNFINISHED) for file in folder.iterdir()):
        return
    if not overwrite:
        raise emseg.InputError(f"--out-dir {folder} is not empty; give --overwrite or another "
                               "folder")
    if not earlier_files(folder):
        raise emseg.InputError(f"--out-dir {folder} holds no evaluation that --overwrite could "
                               "replace; give another folder")


def earlier_files(folder):
    """Names of the files that an evaluation has written into a folder, from its config.json."""
    try:
        files = json.loads((folder / "config.json").read_text(encoding="utf-8"))["files"]
        return {name for name in files if Path(name).name == name}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


@contextlib.contextmanager
def results_folder(args, **more):
    """A temporary folder, whose files take the place of an earlier evaluation in --out-dir when all
    are written. Until then, and where something fails, that one stays as it is.

    more: for config.json, too.
    """
    folder = Path(args.out_dir)
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise emseg.InputError(f"--out-dir {folder}: {error.strerror}")
    is_locked = emseg.lock_folder(folder)
    try:
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=folder) as unfinished:
            unfinished = Path(unfinished)
            yield unfinished
            names = {file.name for file in unfinished.iterdir()} | {"config.json"}
            check_folder(folder, args.overwrite)            # another one may have been faster
            earlier = earlier_files(folder)
            for name in names | earlier:
                if os.path.lexists(folder / name) and (
                        name not in earlier or not (folder / name).is_file()):
                    raise emseg.InputError(f"{folder / name} is in the way and of no evaluation; "
                                           "give another --out-dir")
            # should this be interrupted, all files that may be there are known to be ours
            config = {**emseg.provenance(args, __file__), **more}
            emseg.write_json(folder / "config.json", {**config, "files": sorted(names | earlier)})
            for name in earlier - names:
                (folder / name).unlink(missing_ok=True)
            for name in names - {"config.json"}:
                os.replace(unfinished / name, folder / name)
            emseg.write_json(folder / "config.json", {**config, "files": sorted(names)})
        for other in folder.glob(f"{UNFINISHED}*") if is_locked else []:    # of a killed one
            shutil.rmtree(other, ignore_errors=True)
        print(f"wrote {folder}/: {', '.join(sorted(names))}")
    finally:
        if is_new:
            with contextlib.suppress(OSError):              # it is not empty
                folder.rmdir()


def class_of(text, classes, flag):
    """The id of a class, given by name or id. Raises InputError."""
    if text in classes:
        return classes.index(text)
    if text.isdecimal() and int(text) < len(classes):
        return int(text)
    raise emseg.InputError(f"{flag}: there is no class {text}; classes are {', '.join(classes)} "
                           f"(0 to {len(classes) - 1})")


def default_folder(args):
    """runs/evaluate-NAME, after the prediction or the run that it is in."""
    if args.runs:
        return "runs/evaluate-runs"
    path = Path(args.prediction[0]) if args.prediction else Path("none")
    name = path.parent.name if path.stem == "prediction" and path.parent.name else path.stem
    return f"runs/evaluate-{name}"


def parse_args(argv=None):
    parser = emseg.Parser(__file__, __doc__)
    flag = argparse.BooleanOptionalAction
    data = parser.add_argument_group("data").add_argument
    data("--prediction", nargs="+", metavar="P", default=[], help="predicted class ids: TIFF, MRC, "
         "NPY or a folder of slices; P@z0:z1,y0:y1,x0:x1 crops")
    data("--label", nargs="+", metavar="P", default=[], help="their labels, in the same order")
    data("--volume", nargs="+", metavar="P", default=[], help="the images, for figure.png")
    data("--label-map", metavar="M", help="label value=class id: 191=1,223=2,*=0 or 128:256=1,*=0")
    data("--prediction-map", metavar="M", help="the same for the values of the predictions")
    data("--label-slices", metavar="S", help="slices of the labels that count: 0:165:5, 0,40,80, "
         "n=7 or every=5")
    data("--ignore-label", type=int, metavar="V", help="label value that marks unannotated voxels")
    data("--classes", nargs="+", metavar="NAME", help="class names, background first; default: "
         "those of the run whose folder the prediction is in")
    data("--voxel-size", nargs=3, type=emseg.positive(float, *emseg.PLAUSIBLE_NM),
         metavar=("Z", "Y", "X"), help="voxel size in nm, in place of the files'")
    scores = parser.add_argument_group("scores").add_argument
    scores("--organelles", nargs="+", metavar="CLASS", help="classes (names or ids) of MIoU(org)")
    scores("--distances", action=flag, default=True, help="HD95 and ASSD in nm")
    scores("--objects", action="store_true", help="connected components: which ones match, and "
           "objects.csv with their sizes and places")
    scores("--connectivity", type=int, choices=CONNECTIVITY, default=26, help="neighbours of a "
           "voxel that belong to the same object")
    scores("--min-voxels", type=emseg.positive(int), default=1, metavar="N",
           help="smaller objects are left out")
    scores("--segments", metavar="CLASS", help="variation of information and adapted Rand error of "
           "what the voxels of this class separate, such as membrane")
    scores("--segments-2d", action="store_true", help="segments are regions of each slice, for "
           "thick slices")
    scores("--render", action="store_true", help="surfaces in 3D, from three sides")
    runs = parser.add_argument_group("table of runs").add_argument
    runs("--runs", nargs="+", metavar="RUN", default=[], help="run folders, in place of volumes: "
         "one table of their scores")
    runs("--scores", nargs="+", metavar="KEY", default=["dice", "iou"], help="the scores of each "
         f"class in the table: {', '.join([*HEADINGS][:9])}")
    run = parser.add_argument_group("run").add_argument
    run("--out-dir", metavar="D", help="folder of the results; default runs/evaluate-NAME")
    run("--overwrite", action="store_true", help="replace an earlier evaluation")
    args = parser.parse_args(argv)
    if args.runs and (args.prediction or args.label):
        parser.error("--runs and --prediction are two commands; give one of them")
    if not args.runs and not args.prediction:
        parser.error("give --prediction and --label, or --runs")
    for name in ("label", "volume"):
        n = len(getattr(args, name))
        if n != len(args.prediction) and (n or name == "label"):
            parser.error(f"--prediction has {len(args.prediction)} and --{name} {n} paths; give "
                         f"one {name} for each prediction")
    unknown = [key for key in args.scores if key not in [*HEADINGS][:9]]
    if unknown:
        parser.error(f"--scores: there is no score {unknown[0]}; there are "
                     f"{', '.join([*HEADINGS][:9])}")
    if args.classes and len(args.classes) < 2:
        parser.error("--classes needs two names at least, the background's first")
    if len(args.classes or []) > emseg.IGNORE:
        parser.error(f"--classes: {len(args.classes)} names, there can be {emseg.IGNORE}")
    if args.segments_2d and args.segments is None:
        parser.error("--segments-2d needs --segments CLASS")
    args.out_dir = args.out_dir or default_folder(args)
    return args


@emseg.command
def main(args):
    check_folder(Path(args.out_dir), args.overwrite)
    if args.runs:
        return tabulate(args)

    # data
    classes, pairs, notes = open_pairs(args)
    if args.organelles:
        args.organelles = [class_of(text, classes, "--organelles") for text in args.organelles]
        if len(set(args.organelles)) < len(args.organelles):
            raise emseg.InputError("--organelles names a class twice")
    if args.segments is not None:
        args.segments = class_of(args.segments, classes, "--segments")
    for note in notes:
        print(note)
    config, metrics = training_of(args.prediction)
    training = config and metrics and {"script": metrics.get("script"), "args": config.get("args")}
    with results_folder(args, classes=classes, training=training) as folder:

        # scores
        entries, objects = [], []
        for pair in pairs:
            entry, rows = score_pair(pair, classes, args, folder)
            entries.append(entry)
            objects += rows
            print(f"\n{entry['prediction']} against {entry['label']}: "
                  f"{emseg.format_shape(pair.label.shape)} voxels, {entry['ignored']:,} ignored")
            print("\n".join([describe(entry, classes), *absences(entry)]))
        mean = emseg.mean_scores(entries)
        mean |= {key: mean_of([entry[key] for entry in entries]) for key in ("objects", "segments")
                 if key in entries[0]}
        if len(pairs) > 1:
            print(f"\nmean of {len(pairs)} pairs\n{describe(mean, classes)}")
        emseg.write_json(folder / "metrics.json", emseg.metrics_content(
            Path(__file__).name, classes, entries, mean,
            **{key: metrics.get(key) for key in OF_TRAINING},
            peak_memory_gib=emseg.peak_memory_gib(torch.device("cpu"))))
        if args.objects:
            write_csv(folder / "objects.csv", objects, OBJECT_COLUMNS)

        # pictures
        emseg.save_slices(folder / "figure.png", [
            (pair.name, pair.image and emseg.as_uint8(pair.image), pair.label,
             {"prediction": pair.prediction}) for pair in pairs], classes)
        emseg.save_slice_dice(folder / "slice_dice.png", [
            (pair.name, emseg.dice_of_slices(pair.counts), []) for pair in pairs], classes)
        save_confusion(folder / "confusion.png", sum(pair.counts.sum(0) for pair in pairs), classes)
        if args.render:
            for pair in pairs:
                save_renders(folder, f"_{pair.name}" if len(pairs) > 1 else "", pair, classes)


# What metrics.json takes over from that of the run whose predictions are scored.
OF_TRAINING = ("model", "seed", "selected_on", "train_seconds", "predict_seconds",
               "predict_voxels_per_second", "parameters")


if __name__ == "__main__":
    main(parse_args())
