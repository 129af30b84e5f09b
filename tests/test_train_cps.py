"""train_cps.py: its equations, and whole runs on small and real data."""

import argparse
import functools

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

import conftest
import emseg
import train_cps
from conftest import TINY, log_without_seconds, metrics, tiny_cps, weights

run = functools.partial(conftest.run, train_cps)

# -- the paper's functions -------------------------------------------------------------------------


def test_cps_weight_is_the_authors_schedule():
    args = train_cps.parse_args(["--volume", "a", "--label", "b"])
    weights = [train_cps.cps_weight(epoch, args.cps_warmup, args.cps_weight)
               for epoch in (0, 5, 6, 10, 15, 20, 499)]
    assert np.allclose(weights, [0, 0, 1 / 15, 1 / 3, 2 / 3, 1, 1]) and args.epochs == 500


def rate(step, total, drops=0, **args):
    return train_cps.learning_rate(argparse.Namespace(lr=0.5, **args), step, total, drops)


@pytest.mark.parametrize("total, warmup", [(1000, 70), (100_000, 1500)])
def test_the_rate_warms_up_and_decays(total, warmup):
    rates = np.array([rate(step, total, schedule="linear") for step in range(total)])
    steps = np.arange(total)
    np.testing.assert_allclose(rates[: warmup // 2], 0.5 * (steps + 1)[: warmup // 2] / warmup,
                               rtol=1e-4)
    np.testing.assert_allclose(rates[warmup:], 0.5 * (1 - steps / total)[warmup:])
    assert rate(7, total, 2, schedule="plateau") == pytest.approx(0.005)
    assert rate(7, total, 0, schedule="constant") == 0.5


@pytest.mark.parametrize("seed", range(2))
def test_the_rate_drops_as_in_the_authors_schedule(seed):
    """PyTorch's own scheduler, a new one after each drop."""
    losses = np.random.default_rng(seed).uniform(0.5, 0.6, 150).cumsum() / np.arange(1, 151)
    losses += np.arange(150) // 40                      # the loss jumps, as after a drop
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)

    def new_schedule():
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=15,
                                                          threshold=1e-5)
    schedule, drops = new_schedule(), 0
    for epoch, loss in enumerate(losses, 1):
        before = optimizer.param_groups[0]["lr"]
        if drops < 2:
            schedule.step(loss)
        if optimizer.param_groups[0]["lr"] < before:
            schedule, drops = new_schedule(), drops + 1
        seen = losses[:epoch]
        assert train_cps.rate_drops([{"loss": 9, "loss_sup": each} for each in seen]) == drops
        assert train_cps.rate_drops([{"loss": 9, "val_dice": 1 - each} for each in seen]) == drops
    assert drops == 2


class TwoHeads(torch.nn.Module):
    """A network of two heads, of which the second predicts; it notes what it sees."""

    def __init__(self, sign):
        super().__init__()
        self.sign, self.seen = torch.nn.Parameter(torch.tensor(sign)), []

    def combine(self, heads):
        return heads[1]


def heads_of(network, image):
    network.seen.append((len(image), torch.is_grad_enabled(), network.training))
    return [network.sign * image - 9, network.sign * image]


@pytest.fixture
def batch():
    """Two networks, 4 labelled and 4 unlabelled images, and a loss that notes what it is asked."""
    torch.manual_seed(0)
    asked = []

    def loss(heads, label):
        asked.append((heads, label))
        return sum(head.sum() for head in heads)
    return [TwoHeads(1.0), TwoHeads(-1.0)], *torch.randn(2, 4, 1, 8, 8), loss, asked


def check(asked, seen):
    """Each network must have learnt from what the other one predicts of the images seen."""
    learnt, taught = seen
    wanted = [(learnt, (-taught > 0)[:, 0].long()), (-learnt, (taught > 0)[:, 0].long())]
    for (heads, target), (image, exact) in zip(asked, wanted, strict=True):
        assert torch.equal(heads[0], image - 9) and torch.equal(heads[1], image)
        assert torch.equal(target, exact)


def test_each_network_learns_from_the_other(batch):
    networks, image_l, image_u, loss, asked = batch
    heads_l = [heads_of(network, image_l) for network in networks]
    train_cps.cps_loss(heads_of, networks, loss, heads_l, image_u).backward()
    seen = torch.cat([image_l, image_u])
    check(asked, (seen, seen))
    assert all(network.sign.grad is not None for network in networks)


def test_under_cutmix_whole_images_teach_in_one_training_batch(batch, monkeypatch):
    networks, image_l, image_u, loss, asked = batch
    box = torch.rand(4, 8, 8) > 0.5
    monkeypatch.setattr(train_cps, "cutmix_boxes", lambda *args: box)
    train_cps.cps_cutmix_loss(heads_of, networks, loss, image_l, image_u).backward()
    first, second = [torch.cat([each[half::2] for each in (image_l, image_u)]) for half in (0, 1)]
    mixed = torch.where(box[:, None], second, first)
    check(asked, (mixed, mixed))                        # the sign of a mixture is the mixed sign
    assert all(network.seen == [(8, False, True), (4, True, True)] for network in networks)


def test_the_second_half_of_a_batch_is_pasted_into_the_first():
    box = torch.zeros(2, 2, 2, dtype=torch.bool)
    box[:, 0, 0] = True
    batch = torch.arange(4.0).view(4, 1, 1).expand(4, 2, 2)
    for mixed in train_cps.mix(batch, box), train_cps.mix(batch[:, None], box)[:, 0]:
        assert mixed[:, 0, 0].tolist() == [2, 3] and mixed[:, 1, 1].tolist() == [0, 1]


def corners(boxes):
    """top, left, height, width of each of the boxes (B, H, W), which must be rectangles."""
    parts = []
    for box in boxes.numpy():
        rows, columns = np.flatnonzero(box.any(1)), np.flatnonzero(box.any(0))
        part = rows[0], columns[0], np.ptp(rows) + 1, np.ptp(columns) + 1
        assert box.sum() == part[2] * part[3]       # one full rectangle
        parts.append(part)
    return np.array(parts).T


def test_cutmix_boxes_have_the_papers_sizes_and_places():
    torch.manual_seed(0)
    H, W = 200, 300
    boxes = train_cps.cutmix_boxes(500, (H, W), "cpu")
    assert boxes.shape == (500, H, W) and boxes.dtype == torch.bool
    top, left, height, width = corners(boxes)
    share = height * width / (H * W)
    assert share.min() > 0.245 and share.max() < 0.505
    loose = (height < H - 20) & (width < W - 20)    # room enough to call a place uniform
    for values, low, span in ((share, 0.25, 0.25), (np.log(height / H) / np.log(share), 0, 1),
                              ((top + 0.5)[loose] / (H - height + 1)[loose], 0, 1),
                              ((left + 0.5)[loose] / (W - width + 1)[loose], 0, 1)):
        assert stats.kstest(values, stats.uniform(low, span).cdf).pvalue > 1e-3


NAMES = "schedule", "lr", "batch_size", "epochs", "weight_decay", "clip"
# model and flags -> schedule, lr, batch_size, epochs, weight_decay, clip
RECIPES = {
    "resunet": ("linear", 1e-3, 20, 500, 0, 1),
    "resunet --no-cutmix": ("linear", 1e-3, 12, 300, 0, 1),
    "resunet --method supervised": ("constant", 1e-2, 8, 500, 0, 0),
    "unet++3": ("linear", 1e-3, 20, 500, 0, 1),
    "unet++ --method supervised": ("plateau", 1e-4 * 3 / 256, 3, 500, 0, 0),
    "ceecnet --method supervised": ("plateau", 5e-4 * 3 / 256, 3, 500, 0, 0),
    "ceecnet": ("plateau", 5e-4 * 4 / 256, 4, 500, 0, 0),
    "senformer": ("linear", 6e-5, 8, 750, 0.01, 0.1),
}


@pytest.mark.parametrize("chosen", RECIPES)
def test_every_network_trains_as_the_authors_did_unless_told(chosen):
    def parsed(*more):
        args = train_cps.parse_args(["--volume", "a", "--label", "b", "--model", *chosen.split(),
                                     *more])
        return tuple(getattr(args, name) for name in NAMES)

    assert parsed() == pytest.approx(RECIPES[chosen])
    typed = dict(zip(NAMES, ("linear", 0.01, 12, 30, 0.5, 0.25)))
    flags = [text for name, value in typed.items() for text in (emseg.flag_name(name), str(value))]
    assert parsed(*flags) == tuple(typed.values())


class Parts(torch.nn.Module):
    """A kernel, a bias, a norm, a table of positions and queries."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(2, 3, 3), torch.nn.GroupNorm(1, 3)
        self.relative_positions = torch.nn.Parameter(torch.ones(4, 4))
        self.queries, self.gamma = [torch.nn.Parameter(torch.ones(s)) for s in ((2, 8), 1)]


def test_weight_decay_is_for_kernels_alone():
    network, args = Parts(), argparse.Namespace(lr=0.1, weight_decay=0.2)
    torch.nn.init.ones_(network.conv.bias)
    optimizer = train_cps.optimizer_of(network, args)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in network.named_parameters():
        kept = 1 - 0.1 * 0.2 if name == "conv.weight" else 1
        torch.testing.assert_close(p.detach(), kept * before[name])
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(before)


def labels_of(channels, seed=0, ignore=True):
    """Class ids (4, 21, 30) in blobs; the second picture lacks class 1, the third is full of it."""
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.normal(size=(4, 21, 30)), (0, 2, 2))
    edges = np.quantile(noise, np.linspace(0, 1, max(2, channels) + 1)[1:-1])
    label = np.digitize(noise, edges)
    label[1][label[1] == 1] = 0
    label[2] = 1
    if ignore:
        label[0, :, 12:15] = emseg.IGNORE
        label[0, 18:][rng.random((3, 30)) < 0.3] = emseg.IGNORE
        label[2, :4] = emseg.IGNORE
        label[3, :, 25:] = emseg.IGNORE
    return label


def tanimoto_targets_by_scipy(label, channels):
    """Segmentation, boundary and distance (B, C, H, W), one picture and class after the other."""
    targets = np.zeros((3, len(label), channels, *label.shape[1:]))
    for place in np.ndindex(len(label), channels):
        b, k = place
        inside = label[b] == (k if channels > 1 else 1)
        outside = ~inside & (label[b] != emseg.IGNORE)
        targets[0][place] = inside
        edge = inside & ndimage.binary_dilation(outside)                # SciPy's cross
        targets[1][place] = ndimage.binary_dilation(edge)
        if outside.any() and inside.any():
            distance = ndimage.distance_transform_edt(~outside) * inside
            targets[2][place] = distance / distance.max()
        else:
            targets[2][place] = inside
    return targets


@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_tanimoto_targets_against_scipy(channels, ignore):
    label = labels_of(channels, ignore=ignore)
    found = train_cps.tanimoto_targets(torch.from_numpy(label), channels)
    wanted = tanimoto_targets_by_scipy(label, channels)
    assert {x.shape for x in found} == {(4, channels, 21, 30)}
    for one, exact in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        np.testing.assert_allclose(one, exact, atol=1e-6)


def predictions_of(label, channels, heads, seed=1):
    """Logits (heads, B, C, H, W)."""
    rng = np.random.default_rng(seed)
    return 2 * rng.normal(size=(heads, len(label), channels, *label.shape[1:]))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    return np.exp(x) / np.exp(x).sum(1, keepdims=True)


def tanimoto_loss_by_the_book(heads, label, depth):
    """A loop over pictures, maps and depths of the formula of the paper."""
    channels = heads.shape[2]
    prob = [(sigmoid if channels == 1 else softmax)(heads[0]), sigmoid(heads[1]), sigmoid(heads[2])]
    similarities = []
    for p, target in zip(prob, tanimoto_targets_by_scipy(label, channels)):
        for b, kept in enumerate(label != emseg.IGNORE):
            for d in range(max(depth, 1)):
                for complement in False, True:
                    x, y = [(1 - z if complement else z)[b][:, kept] for z in (p, target)]
                    xy, xx, yy = (x * y).sum(), (x * x).sum(), (y * y).sum()
                    similarities.append((xy + 1e-5) / (
                        2**d * (xx + yy) - (2 ** (d + 1) - 1) * xy + 1e-5))
    return 1 - np.mean(similarities)


@pytest.mark.parametrize("depth", [0, 1, 10])
@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_tanimoto_loss_is_that_of_the_paper(channels, ignore, depth):
    label = labels_of(channels, ignore=ignore)
    heads = predictions_of(label, channels, 3)
    x = torch.tensor(heads, dtype=torch.float32, requires_grad=True)
    loss = train_cps.tanimoto_loss(list(x), torch.from_numpy(label), depth)
    assert loss.item() == pytest.approx(tanimoto_loss_by_the_book(heads, label, depth), rel=1e-4)
    loss.backward()
    taught = x.grad.ne(0).any(2)
    assert (taught == torch.from_numpy(label != emseg.IGNORE)).all()


@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_losses_of_branches_and_learners_by_hand(channels, ignore):
    label = labels_of(channels, ignore=ignore)
    heads = predictions_of(label, channels, 4)
    kept, classes = label != emseg.IGNORE, range(1, max(2, channels))
    prob = [np.concatenate([1 - sigmoid(x), sigmoid(x)], 1) if channels == 1 else softmax(x)
            for x in heads]
    right = [np.take_along_axis(p, np.where(kept, label, 0)[:, None], 1)[:, 0][kept] for p in prob]
    ensemble = -np.log(np.mean(right, 0)).mean() + np.mean([-np.log(p).mean() for p in right])
    dice = []
    for p in prob:
        for k in classes:
            x, y = p[:, k][kept], label[kept] == k
            dice.append(1 - (2 * (x * y).sum() + 1e-5) / ((x**2).sum() + y.sum() + 1e-5))
    for loss, wanted in (train_cps.ensemble_loss, ensemble), (train_cps.dice_loss, np.mean(dice)):
        x = torch.tensor(heads, requires_grad=True)
        found = loss(list(x), torch.from_numpy(label))
        assert found.item() == pytest.approx(wanted, rel=1e-5)
        found.backward()
        assert (x.grad.ne(0).any(2).numpy() == kept).all()


def test_every_network_has_the_loss_of_its_paper():
    label = torch.from_numpy(labels_of(1))
    heads = list(torch.from_numpy(predictions_of(label.numpy(), 1, 3)))
    for model in "fractalresnet", "ceecnet":
        for drops in 0, 1, 2:
            found = train_cps.loss_of(model, drops)(heads, label)
            assert found == train_cps.tanimoto_loss(heads, label, 10 * drops)
        assert train_cps.loss_of(model)(heads, label) == train_cps.tanimoto_loss(heads, label)
    assert train_cps.loss_of("senformer", 2) is train_cps.ensemble_loss
    assert {train_cps.loss_of(model, 2) for model in ("resunet", "unet", "unet++", "unet++3")} == {
        train_cps.dice_loss}


# -- whole runs ------------------------------------------------------------------------------------


def test_the_metrics_are_those_of_the_prediction_file_without_training_slices(trained, cells):
    prediction = emseg.open_volume(trained / "prediction.tif")
    known = np.setdiff1d(np.arange(12), [2, 5, 9])
    truth = emseg.open_volume(cells / "mito.tif")[:][known] == 255
    predicted = prediction[:][known] == 1
    assert prediction.voxel_size == pytest.approx((20, 8, 8))
    tp = int((predicted & truth).sum())
    [entry] = metrics(trained)["volumes"]
    scores = entry["per_class"]["mito"]
    assert scores["tp"] == tp and scores["fn"] == truth.sum() - tp
    assert scores["fp"] == predicted.sum() - tp and entry["ignored"] == 3 * 112 * 128


def test_same_seed_same_weights_other_seed_other_weights(trained, cells, tmp_path):
    """Also with processes that read crops."""
    run(*tiny_cps(cells, tmp_path / "same", "--workers", 2))
    run(*tiny_cps(cells, tmp_path / "other", "--seed", 1))
    assert torch.equal(weights(trained / "last.pt"), weights(tmp_path / "same" / "last.pt"))
    assert not torch.equal(weights(trained / "last.pt"), weights(tmp_path / "other" / "last.pt"))


def test_supervised_multi_class_with_validation(cells, tmp_path):
    """Also at half the resolution, of odd sides."""
    run("--volume", cells / "image.tif@:,0:109,0:127", "--label",
        cells / "label.tif@:,0:109,0:127", "--classes", "background", "membrane", "nucleus",
        "mitochondrion", "vesicle", "--label-slices", "0,3,7", "--val-slices", "n=2",
        "--test-volume", cells / "image.tif@:,0:109,0:127", "--out-dir", tmp_path / "run", *TINY,
        "--downsample", 2, "--method", "supervised", "--epochs", 3, "--tta")
    rows = log_without_seconds(tmp_path / "run")
    best = max(rows, key=lambda row: float(row["val_dice"]))
    checkpoint = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert checkpoint["step"] == int(best["step"])
    assert set(checkpoint["modules"]) == {"network"}
    chosen = np.setdiff1d(np.arange(12), [0, 3, 7])[emseg.parse_slices("n=2", 9)]
    used = [z for each in checkpoint["used"] for z in each["z"]]
    assert sorted(used) == sorted([0, 3, 7, *chosen])       # validated on slices of its own
    result = metrics(tmp_path / "run")
    assert result["selected_on"] == "validation" and result["mean"] is None
    prediction = emseg.open_volume(tmp_path / "run" / "prediction.tif")
    assert prediction.shape == (12, 109, 127) and prediction[:].max() <= 4


@pytest.mark.parametrize("model, options", [
    ("unet++3", ["--average-branches"]), ("fractalresnet", ["--no-cutmix"]), ("senformer", [])])
def test_networks_of_several_heads_teach_each_other(cells, tmp_path, model, options):
    label = ["--label", cells / "label.tif", "--label-map", "3=1,2=2,*=0"]
    run("--volume", cells / "image.tif", *label, "--label-slices", "0,3", "--test-volume",
        cells / "image.tif@0:1,0:32,0:32", "--out-dir", tmp_path / "run", *TINY, "--model", model,
        *options, "--width", 4 if model == "senformer" else 8, "--steps-per-epoch", 1)
    first, second = log_without_seconds(tmp_path / "run")
    assert float(first["loss_cps"]) == 0 < float(second["loss_cps"])
    assert set(torch.load(tmp_path / "run" / "last.pt", weights_only=True)["modules"]) == {
        "network", "network_b", "optimizer", "optimizer_b", "scaler"}
    assert emseg.open_volume(tmp_path / "run" / "prediction.tif").shape == (1, 32, 32)


def test_the_rate_drops_and_a_resumed_run_knows_the_losses(cells, tmp_path, monkeypatch):
    arguments = ["--volume", cells / "image.tif", "--label", cells / "mito.tif", "--label-slices",
                 "0,3,7", "--test-volume", cells / "image.tif@0:1", *TINY, "--model", "unet++3",
                 "--width", 8, "--method", "supervised", "--epochs", 3, "--steps-per-epoch", 1]
    monkeypatch.setattr(train_cps, "rate_drops", lambda rows: len(rows) // 2)
    run(*arguments, "--out-dir", tmp_path / "whole")
    rows = log_without_seconds(tmp_path / "whole")
    peak = 3 * 1e-4 / 256
    assert [float(row["lr"]) for row in rows] == pytest.approx([peak, peak, peak / 10])
    with monkeypatch.context() as stopped:
        conftest.interrupt_after(stopped, 2)
        with pytest.raises(SystemExit):
            run(*arguments, "--out-dir", tmp_path / "stopped")
    run("--resume", "--out-dir", tmp_path / "stopped")
    assert log_without_seconds(tmp_path / "stopped") == rows
    assert torch.equal(weights(tmp_path / "whole" / "last.pt"),
                       weights(tmp_path / "stopped" / "last.pt"))


def test_an_unlabelled_volume_is_used(cells, tmp_path, monkeypatch):
    asked = []
    original = emseg.Patches.__init__

    def noting(self, images, labels=None, *args, **kwargs):
        original(self, images, labels, *args, **kwargs)
        asked.append((labels is None, len(self.slices)))

    monkeypatch.setattr(emseg.Patches, "__init__", noting)
    run("--volume", cells / "image.tif@0:3", "--label", cells / "mito.tif@0:3",
        "--unlabeled-volume", cells / "image.tif@4:12", "--out-dir", tmp_path / "run", *TINY,
        "--epochs", 1, "--steps-per-epoch", 1)
    assert asked == [(False, 3), (True, 8)]


def test_volumes_of_the_same_name_get_predictions_of_their_own(trained, cells, tmp_path):
    run("--checkpoint", trained / "best.pt", "--device", "cpu", "--out-dir", tmp_path / "out",
        "--test-volume", *[f"{cells}/image.tif@{crop}" for crop in ("0:1", "0:2", "2:5")])
    volumes = metrics(tmp_path / "out")["volumes"]
    assert [len(emseg.open_volume(v["prediction"])) for v in volumes] == [1, 2, 3]
    assert len({v["prediction"] for v in volumes}) == 3


def test_a_short_demo_learns_what_mitochondria_and_nuclei_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run("--demo", "--width", 8, "--downsample", 4, "--patch-size", 64, 64, "--epochs", 4,
        "--steps-per-epoch", 10, "--cps-warmup", 1, 3)
    assert "wrote runs/train_cps-unet-seed0-demo/" in capsys.readouterr().out
    scores = metrics(tmp_path / "runs" / "train_cps-unet-seed0-demo")["mean"]["per_class"]
    assert all(score["dice"] > 0.4 for score in scores.values()) and len(scores) == 2


def test_real_mitochondria_from_seven_slices(real_data, tmp_path):
    folder = real_data / "lucchi"
    run("--volume", f"{folder}/Train_In@0:110", "--label", f"{folder}/Train_Out@0:110",
        "--label-slices", "n=7", "--test-volume", f"{folder}/Train_In@120:122", "--test-label",
        f"{folder}/Train_Out@120:122", *TINY, "--width", 8, "--patch-size", 64, 64,
        "--batch-size", 8, "--epochs", 4, "--steps-per-epoch", 10, "--downsample", 4, "--lr",
        "5e-3", "--cps-warmup", 1, 3, "--out-dir", tmp_path / "run")
    assert metrics(tmp_path / "run")["mean"]["iou"] > 0.3
