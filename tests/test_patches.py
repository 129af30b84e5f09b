"""Patches and augmentation: what is drawn, from where, and what geometry does to it."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

import emseg
from conftest import InMemory

RAW = {"mean": 0.0, "std": 1.0}      # augment keeps grey levels as they are
CPU = torch.device("cpu")


def random_volume(shape=(6, 30, 40), seed=0):
    return np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8)


def places(crop, array):
    """All (z, y, x) at which array holds crop."""
    crop = np.asarray(crop)
    crop = crop.reshape((1,) * (3 - crop.ndim) + crop.shape)
    windows = np.lib.stride_tricks.sliding_window_view(array, crop.shape)
    return [tuple(map(int, p)) for p in np.argwhere((windows == crop).all(axis=(3, 4, 5)))]


def draw(patches, count):
    return [patches[i] for i in range(count)]


def single_voxels(label, count=1000, slices=None, foreground=1.0, **options):
    """Label values of patches of one voxel."""
    label = np.asarray(label, np.uint8)
    patches = emseg.Patches([InMemory(np.zeros_like(label))], [InMemory(label)], (1, 1),
                            slices and [slices], foreground, **options)
    return np.array([int(y) for _, y in draw(patches, count)])


# -- patches


@pytest.mark.parametrize("foreground", [0, 0.5])
def test_a_crop_depends_on_seed_and_index_alone(foreground):
    volume, label = InMemory(random_volume()), InMemory((random_volume(seed=1) > 250).astype("u1"))

    def drawn(seed, order=range(10)):
        patches = emseg.Patches([volume], [label], (5, 6), foreground=foreground, seed=seed)
        crops = {i: torch.stack(patches[i]) for i in order}
        return [crops[i] for i in range(10)]

    first, backward = drawn((3, 0)), drawn((3, 0), range(9, -1, -1))
    assert all(torch.equal(a, b) for a, b in zip(first, backward))
    for seed in (4, 0), (3, 1):
        assert not any(torch.equal(a, b) for a, b in zip(first, drawn(seed)))
    assert len({crop.numpy().tobytes() for crop in first}) == 10


def test_numbered_crops_name_their_volume_and_are_the_same_crops():
    volumes = [InMemory(np.full((2, 8, 8), value, np.uint8)) for value in (10, 20, 30)]
    patches, plain = [emseg.Patches(volumes, volumes, (4, 4), numbered=numbered)
                      for numbered in (True, False)]
    for (image, label, number), (same, _) in zip(draw(patches, 30), draw(plain, 30)):
        assert (image == 10 * (number + 1)).all() and torch.equal(image, same)
    batch = next(batches(patches, 8, 0, 1))
    assert batch[2].dtype == torch.int64 and batch[2].tolist() == [patches[i][2] for i in range(8)]


@pytest.mark.parametrize("foreground", [0.0, 1.0])
@pytest.mark.parametrize("size", [(7, 9), (30, 40), (3, 7, 9)])
def test_image_and_label_are_cut_at_the_same_place_of_the_same_volume(size, foreground):
    pairs = [(random_volume(seed=n), random_volume(seed=n + 2)) for n in (0, 1)]
    images, labels = [[InMemory(array) for array in arrays] for arrays in zip(*pairs)]
    patches = emseg.Patches(images, labels, size, [[0, 2], [1]], foreground)
    volumes = []
    for crop, crop_label in draw(patches, 12):
        assert crop.dtype == crop_label.dtype == torch.uint8
        assert crop.shape == crop_label.shape == size
        found = [(v, places(crop, image)) for v, (image, label) in enumerate(pairs)
                 if places(crop, image) and places(crop, image) == places(crop_label, label)]
        assert len(found) == 1 and len(found[0][1]) == 1
        volumes.append(found[0][0])
    assert {*volumes} == {0, 1}


def test_every_place_is_drawn_equally_often_up_to_the_borders():
    image = random_volume((2, 9, 10))
    patches = emseg.Patches([InMemory(image)], None, (6, 7))
    drawn = [places(crop, image)[0] for crop, in draw(patches, 1500)]       # the image alone
    counts = [drawn.count((z, y, x)) for z in range(2) for y in range(4) for x in range(4)]
    assert sum(counts) == 1500 and stats.chisquare(counts).pvalue > 1e-3


def test_volumes_share_the_crops_by_their_slices():
    images = [InMemory(np.full((n, 8, 8), n, np.uint8)) for n in (2, 6)]
    patches = emseg.Patches(images, None, (4, 4))
    values = np.array([int(crop[0, 0]) for crop, in draw(patches, 1000)])
    assert (values == 6).mean() == pytest.approx(0.75, abs=0.05)


@pytest.mark.parametrize("foreground", [0.0, 0.5, 1.0])
def test_no_crop_comes_from_a_slice_that_was_not_given(foreground):
    z = np.arange(10, dtype=np.uint8)[:, None, None] * np.ones((1, 9, 9), np.uint8)
    label = np.ones_like(z)
    images, labels = [InMemory(z), InMemory(z + 100)], [InMemory(label), InMemory(label)]
    patches = emseg.Patches(images, labels, (4, 5), [[2, 7], np.array([0, 9])], foreground)
    values = [crop.unique().tolist() for crop, _ in draw(patches, 200)]
    assert {value for value, in values} == {2, 7, 100, 109}


def test_foreground_of_other_slices_is_not_sought():
    label = np.zeros((4, 9, 9), np.uint8)
    label[3, 4, 4] = 1
    assert not emseg.Patches([InMemory(label)], [InMemory(label)], (3, 3), [[0, 1]], 1.0).points
    label[1, 4, 4] = 1
    patches = emseg.Patches([InMemory(label)], [InMemory(label)], (3, 3), [[0, 1]], 1.0)
    assert {z for _, places in patches.points for _, z, _ in places} == {1}


def test_3d_crop_holds_the_slice_that_it_was_drawn_for():
    z = np.arange(10, dtype=np.uint8)[:, None, None] * np.ones((1, 6, 6), np.uint8)
    patches = emseg.Patches([InMemory(z)], None, (3, 4, 4), [[5]])
    firsts = {int(crop[0, 0, 0]) for crop, in draw(patches, 100)}
    assert firsts == {3, 4, 5}


def test_foreground_share_is_a_share():
    label = np.zeros((1, 40, 40), np.uint8)
    label[:, :, :10] = 1
    assert single_voxels(label, 1000, foreground=0.0).mean() == pytest.approx(0.25, abs=0.05)
    assert single_voxels(label, 1000, foreground=0.6).mean() == pytest.approx(0.7, abs=0.05)
    assert single_voxels(label, 100, foreground=1.0).mean() == 1


def test_classes_are_drawn_evenly_however_rare_and_ignored_voxels_never():
    label = np.full((2, 40, 40), emseg.IGNORE, np.uint8)
    label[:, :30] = 1
    label[0, 3, 4], label[1, 5, 6], label[1, 0, 0] = 2, 0, 7
    values = single_voxels(label, 600)
    assert {int(v): pytest.approx((values == v).mean(), abs=0.07) for v in set(values)} == {
        1: 1 / 3, 2: 1 / 3, 7: 1 / 3}


def test_crops_are_uniform_over_those_that_hold_the_class():
    label = np.zeros((2, 9, 12), np.uint8)
    label[0, 2:7, 3:9], label[1, 4, 4] = 1, 1           # a large and a small object
    image = np.arange(label.size, dtype=np.uint8).reshape(label.shape)
    patches = emseg.Patches([InMemory(image)], [InMemory(label)], (3, 4), foreground=1.0)
    drawn = [places(crop, image)[0] for crop, _ in draw(patches, 2000)]
    holding = [(z, y, x) for z in range(2) for y in range(7) for x in range(9)
               if label[z, y : y + 3, x : x + 4].any()]
    counts = np.array([drawn.count(place) for place in holding])
    assert counts.sum() == 2000 and stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("size", [(8, 8), (2, 8, 8)])
def test_one_voxel_in_a_large_volume_is_found(size):
    label = np.zeros((2, 1000, 1000), np.uint8)
    label[1, 500, 500] = 1
    patches = emseg.Patches([InMemory(label)], [InMemory(label)], size, foreground=1.0)
    assert all(y.sum() == 1 for _, y in draw(patches, 20))


@pytest.mark.parametrize("size", [(31, 4), (4, 41), (7, 4, 4)])
def test_patch_larger_than_a_volume_is_refused(size):
    images = [InMemory(random_volume((9, 60, 60))), InMemory(random_volume())]
    with pytest.raises(emseg.InputError, match="memory.tif: patches of .* do not fit into 6 x 30"):
        emseg.Patches(images, None, size)


# -- batches


class Indices(torch.utils.data.Dataset):
    def __getitem__(self, index):
        return index


def batches(patches, batch_size, step, total, workers=0, rank=0, world=1):
    run = SimpleNamespace(step=step, total=total, args=SimpleNamespace(workers=workers), rank=rank,
                          world=world, device=torch.device("cpu"))
    return emseg.Run.batches(run, patches, batch_size)


def indices(*args, **options):
    return [list(map(int, batch)) for batch in batches(Indices(), *args, **options)]


def test_ranks_and_steps_share_all_indices_without_repeats():
    by_rank = [indices(3, 0, 4, rank=rank, world=2) for rank in (0, 1)]
    assert sorted(i for batches in by_rank for batch in batches for i in batch) == list(range(24))
    for step, both in enumerate(zip(*by_rank)):     # together: the batch of one process
        assert both[0] + both[1] == indices(6, step, step + 1)[0]


def test_workers_and_the_first_step_do_not_change_the_batches():
    patches = emseg.Patches([InMemory(random_volume())], None, (4, 5), seed=(1, 2))
    whole = [image for image, in batches(patches, 2, 0, 6)]
    assert len(whole) == 6
    for again, wanted in ((batches(patches, 2, 0, 6, workers=2), whole),
                          (batches(patches, 2, 3, 6), whole[3:]),
                          (batches(patches, 2, 3, 6, workers=2), whole[3:])):
        again = [image for image, in again]
        assert len(again) == len(wanted) and all(map(torch.equal, again, wanted))


# -- normalisation


def normalization(*volumes, mode="zscore"):
    return emseg.measure_normalization([SimpleNamespace(image=volume, slices=volume.slices)
                                        for volume in volumes], mode)


def test_zscore_averages_the_statistics_of_the_given_slices():
    a = random_volume((3, 8, 9))
    b = (random_volume((2, 10, 10), seed=1) // 4) + 3
    used = [a[0], a[2], b[1]]
    found = normalization(InMemory(a, [0, 2]), InMemory(b, [1]))
    assert found == {"mean": pytest.approx(np.mean([s.mean() for s in used])),
                     "std": pytest.approx(np.mean([s.std() for s in used]))}


def test_zscore_samples_many_slices_evenly():
    volume = InMemory(np.arange(200, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), np.uint8))
    assert normalization(volume, mode="equalize")["mean"] == pytest.approx(99.5, abs=5)
    assert 16 <= len(volume.read_slices) <= 32 and np.ptp(np.diff(volume.read_slices)) <= 1


def test_constant_slices_do_not_divide_by_zero():
    found = normalization(InMemory(np.full((2, 4, 4), 9, np.uint8), [0]))
    image = emseg.normalize(torch.full((1, 4, 4), 9, dtype=torch.uint8), found)
    assert found["std"] > 0 and torch.equal(image, torch.zeros(1, 1, 4, 4))


@pytest.mark.parametrize("shape", [(2, 4, 5), (2, 3, 4, 5)])
def test_normalize_adds_a_channel_and_scales(shape):
    image = random_volume(shape)
    out = emseg.normalize(torch.from_numpy(image), {"mean": 30.0, "std": 7.0})
    assert out.dtype == torch.float32 and out.shape == (shape[0], 1, *shape[1:])
    np.testing.assert_allclose(out[:, 0], (image - 30.0) / 7, rtol=1e-5, atol=1e-6)


# -- geometry


def symmetries(array):
    """The eight symmetries of an array (Y, X): 0, 2, 4, 6 turned, 1, 3, 5, 7 mirrored as well."""
    return [view for turns in range(4) for turned in [np.rot90(array, turns)]
            for view in (turned, turned[:, ::-1])]


def which(view, candidates):
    """Index of the candidate that view equals within 1e-3."""
    hits = [i for i, c in enumerate(candidates)
            if c.shape == view.shape and np.abs(c - view).max() < 1e-3]
    assert len(hits) == 1
    return hits[0]


def linear_parts(grid):
    """(B, 2, 2) columns d(input x, y)/d(output x), d(input x, y)/d(output y), in pixels."""
    H, W = grid.shape[1:3]
    pixel = grid.double() * torch.tensor([W, H]) / 2
    return torch.stack([(pixel[:, 0, -1] - pixel[:, 0, 0]) / (W - 1),
                        (pixel[:, -1, 0] - pixel[:, 0, 0]) / (H - 1)], dim=2).numpy()


@pytest.mark.parametrize("size", [(8, 8), (7, 12), (33, 50)])
def test_identity_grid_returns_image_and_label(size):
    image, label = [torch.from_numpy(random_volume((2, *size), seed)) for seed in (0, 1)]
    grid = emseg.sampling_grid(2, size, CPU)
    assert grid.shape == (2, *size, 2)
    np.testing.assert_allclose(emseg.warp(image, grid, "bilinear"), image, atol=1e-2)
    assert torch.equal(emseg.warp(label, grid, "nearest"), label.float())


@pytest.mark.parametrize("size, options, wanted", [
    ((9, 9), dict(flip=True, rot90=True), range(8)),
    ((8, 8), dict(rot90=True), [0, 2, 4, 6]),
    ((8, 8), dict(flip=True), [0, 1, 4, 5]),
    ((6, 9), dict(flip=True, rot90=True), [0, 1, 4, 5]),
    ((6, 9), dict(rot90=True), [0, 4]),
])
def test_flips_and_turns_are_the_symmetries_and_all_occur(size, options, wanted):
    torch.manual_seed(0)
    image = random_volume(size)
    batch = torch.from_numpy(image).expand(300, -1, -1)
    out, out_label = emseg.augment(batch, batch, RAW, **options)
    candidates = symmetries(image.astype(float))
    found = [which(view, candidates) for view in out[:, 0].double().numpy()]
    assert found == [which(view, candidates) for view in out_label.double().numpy()]
    assert set(found) == set(wanted)
    counts = np.bincount(found, minlength=8)[list(wanted)]
    assert np.ptp(counts) < 6 * math.sqrt(counts.mean())


GEOMETRY = {
    "symmetries": dict(flip=True, rot90=True),
    "rotation": dict(rotation=180.0),
    "scale": dict(scale=0.3),
    "shear": dict(shear=20.0),
    "elastic": dict(displacement=emseg.elastic_displacement),
    "all": dict(flip=True, rot90=True, rotation=180.0, scale=0.2, shear=10.0,
                displacement=emseg.elastic_displacement),
}


def geometry(name, batch, size):
    options = dict(GEOMETRY[name])
    if "displacement" in options:
        options["displacement"] = options["displacement"](batch, size, CPU)
    return options


@pytest.mark.parametrize("name", GEOMETRY)
def test_image_and_label_stay_a_pair_of_the_same_values(name, size=(40, 56)):
    torch.manual_seed(1)
    noise = np.random.default_rng(0).normal(size=(8, *size))
    blobs = ndimage.gaussian_filter(noise, (0, 5, 5)) > 0
    batch = torch.from_numpy((200 * blobs).astype(np.uint8))
    image, label = emseg.augment(batch, batch, RAW, **geometry(name, 8, size))
    image, label = image[:, 0].round(), label.float()
    pure = (image == 0) | (image == 200)            # all neighbours agree: nearest is one of them
    assert pure.float().mean() > 0.75
    assert torch.equal(image[pure], label[pure])
    assert ((label - batch).abs() > 0).float().mean() > 0.02
    label = torch.tensor([0, 1, 7, emseg.IGNORE], dtype=torch.uint8)[torch.randint(4, (4, 24, 24))]
    _, out = emseg.augment(label, label, RAW, **geometry(name, 4, (24, 24)))
    assert out.dtype == torch.int64 and out.unique().tolist() == [0, 1, 7, emseg.IGNORE]


@pytest.mark.parametrize("size", [(41, 41), (41, 61)])
def test_rotation_against_scipy(size):
    torch.manual_seed(0)
    image = ndimage.gaussian_filter(random_volume(size).astype(float), 2)
    grid = emseg.sampling_grid(3, size, CPU, rotation=180.0)
    out = emseg.warp(torch.from_numpy(image).expand(3, -1, -1), grid, "bilinear").numpy()
    inside = np.hypot(*np.ogrid[-20:21, -(size[1] // 2):size[1] // 2 + 1]) < 19
    for view, part in zip(out, linear_parts(grid)):
        angle = math.degrees(math.atan2(part[1, 0], part[0, 0]))
        wanted = ndimage.rotate(image, angle, reshape=False, order=1)
        np.testing.assert_allclose(view[inside], wanted[inside], atol=0.05)


ALL = dict(flip=True, rot90=True, rotation=30.0, scale=0.2, shear=20.0)
# option: its value, the drawn number from the linear part, the numbers' range
DRAWN = {"rotation": (lambda part: np.degrees(np.arctan2(part[:, 1, 0], part[:, 0, 0])), -30, 30),
         "scale": (lambda part: 1 / part[:, 0, 0], 0.8, 1.2),       # above 1: things get larger
         "shear": (lambda part: np.degrees(np.arctan(part[:, 0, 1])), -20, 20)}


@pytest.mark.parametrize("option", DRAWN)
def test_rotation_scale_and_shear_are_uniform_within_their_range(option):
    torch.manual_seed(0)
    number, low, high = DRAWN[option]
    part = linear_parts(emseg.sampling_grid(2000, (5, 9), CPU, **{option: ALL[option]}))
    drawn = number(part)
    assert stats.kstest(drawn, stats.uniform(low, high - low).cdf).pvalue > 1e-3
    eye = np.broadcast_to(np.eye(2), part.shape)
    if option == "rotation":
        np.testing.assert_allclose(part.swapaxes(1, 2) @ part, eye, atol=1e-5)
    elif option == "scale":
        np.testing.assert_allclose(part, eye / drawn[:, None, None], atol=1e-5)
    else:
        part[:, 0, 1] = 0                                           # one axis leans
        np.testing.assert_allclose(part, eye, atol=1e-5)


def test_displacement_is_in_pixels_x_first():
    image = torch.from_numpy(random_volume((1, 10, 14)))
    shift = torch.tensor([3.0, -2.0]).expand(1, 10, 14, 2)
    out = emseg.warp(image, emseg.sampling_grid(1, (10, 14), CPU, displacement=shift), "bilinear")
    np.testing.assert_allclose(out[0, 2:, :11], image[0, :8, 3:], atol=1e-2)


def test_outside_is_mirrored_for_image_and_label():
    image = torch.from_numpy(random_volume((1, 6, 8)))
    shift = torch.tensor([5.0, 4.0]).expand(1, 6, 8, 2)
    grid = emseg.sampling_grid(1, (6, 8), CPU, displacement=shift)
    wanted = np.pad(image[0], ((0, 4), (0, 5)), mode="symmetric")[4:, 5:]
    np.testing.assert_allclose(emseg.warp(image, grid, "bilinear")[0], wanted, atol=1e-2)
    np.testing.assert_array_equal(emseg.warp(image, grid, "nearest")[0], wanted)


@pytest.mark.parametrize("size", [(16, 16), (12, 17)])
def test_slices_of_a_crop_are_augmented_as_a_2d_crop_would_be(size, Z=3):
    image, label = [torch.from_numpy(random_volume((4, Z, *size), seed)) for seed in (0, 1)]
    options = dict(flip=True, rot90=True, rotation=30.0, scale=0.1)
    norm = {"mean": 100.0, "std": 50.0}

    def augmented(*crops):
        torch.manual_seed(0)
        return emseg.augment(*crops, norm, **options)

    out, out_label = augmented(image, label)
    assert out.shape == (4, 1, Z, *size) and out.dtype == torch.float32
    assert out_label.shape == (4, Z, *size) and out_label.dtype == torch.int64
    for z in range(Z):
        flat, flat_label = augmented(image[:, z], label[:, z])
        assert torch.equal(out[:, :, z], flat) and torch.equal(out_label[:, z], flat_label)


def test_flip_and_turn_act_on_each_image_by_itself():
    torch.manual_seed(0)
    part = linear_parts(emseg.sampling_grid(64, (8, 8), CPU, **ALL))
    assert len(np.unique(part.round(4), axis=0)) == 64


def test_elastic_statistics_at_the_knots():
    torch.manual_seed(0)
    k = 6                                           # knots every 20 pixels: 7 x 7
    field = emseg.elastic_displacement(800, (121, 121), CPU, amplitude=10.0, pitch=21)
    knots = field[:, ::20, ::20].numpy()
    assert field.shape == (800, 121, 121, 2)
    delta = np.zeros((2 * k + 1, 2 * k + 1))
    delta[k, k] = 1
    kernel = ndimage.gaussian_filter(delta, 0.6)
    std = 10 / math.sqrt(3) * math.sqrt((kernel**2).sum())
    assert knots[:, 3, 3].std() == pytest.approx(std, rel=0.06)
    assert np.abs(knots).max() < 10
    neighbour = (kernel * np.roll(kernel, 1, axis=0)).sum() / (kernel**2).sum()
    for other in knots[:, 3, 4], knots[:, 4, 3]:
        found = np.corrcoef(knots[:, 3, 3].ravel(), other.ravel())[0, 1]
        assert found == pytest.approx(neighbour, abs=0.08)
    assert abs(np.corrcoef(knots[:, 3, 3, 0], knots[:, 3, 3, 1])[0, 1]) < 0.12
