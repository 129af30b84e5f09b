"""Semi-supervised segmentation from 7 to 25 labelled slices: cross pseudo supervision with CutMix.

Pagano L, Thibault G, Bousselham W, Riesterer JL, Song X, Gray JW (2023). Efficient semi-supervised
semantic segmentation of electron microscopy cancer images with sparse annotations. Frontiers in
Bioinformatics 3:1308707. doi:10.3389/fbinf.2023.1308707

A biologist labels a handful of the thousands of slices of a volume. Two networks of the same kind,
started differently, learn from them; on all other slices each learns from the labels that the other
one predicts (cross pseudo supervision, CPS). CutMix pastes a box of one image into another, so that
a network must recognise an object from a part of it.

Equations:
    eq. 1 (soft Dice)               dice_loss, emseg.soft_dice_loss
    eq. 2 (CPS loss)                cps_loss, with the network's own loss: loss_of
    eq. 3 (total loss)              main: loss = loss_sup + weight * loss_cps
    section 2.3 (networks)          emseg.NETWORKS; their losses: dice_loss, tanimoto_loss with
                                    tanimoto_targets, ensemble_loss; their trainings: recipe
    section 2.4.1 (warm-up)         cps_weight
    section 2.4.2 (CutMix)          emseg.cutmix_boxes, cutmix
    figure 5 (Dice against z)       emseg.save_slice_dice

Differences from the paper:
    1. Soft Dice has squared terms in the denominator, as in the authors' code, and is smoothed by
       1e-5 everywhere (by 1 in their supervised trainings).
    2. Before the warm-up of lambda starts, the authors weigh CPS with 1e-5; here its passes are
       left out. Epochs are counted in fractions, so that lambda grows with every step.
    3. A crop that must hold foreground is placed around a voxel of it (class, slice and voxel drawn
       in turn); the authors crop again until there is some.
    4. --downsample averages blocks of pixels; the authors interpolate bilinearly. A crop larger
       than the slice is refused; the authors mirror the slice.
    5. Validation, if any, uses whole slices; the authors use random crops.
    6. Large slices are predicted in tiles that overlap by a quarter and blend smoothly (networks
       whose output depends on the whole image: in tiles of the size of the crops); the authors'
       overlap by three quarters and count alike.
    7. Slices are equalised (section 2.1.2) only with --normalize equalize.
    8. Several foreground classes are one softmax; the authors train one network for each, as
       --label-map "2=1,*=0" does. Their distances are sigmoids (a softmax over classes in
       Diakogiannis's code).
    9. All encoders start from random weights; whether the authors' started from ImageNet's is not
       in the paper. The average of branches, which the paper reports for UNet++, is
       --average-branches: its 26,072,337 parameters have one head.
    10. Boundaries are an edge of one pixel, grown by its four neighbours, as in the authors' code,
       but found by comparing neighbours instead of Canny's filter.
    11. SenFormer's warm-up is at most 7 % of the steps. What the paper did not train, such as
       ceecnet with CPS, has the network's own defaults (batches of 4 instead of 3).
    12. With CutMix the pseudo-labels of unlabelled images are predicted with BatchNorm's running
       statistics; the authors' code uses those of the batch, which in small batches of small crops
       cost an IoU of 0.07 (see the README).
    13. The networks of other papers are offered too; they train as resunet does.

Run:
    GPU    python train_cps.py --volume stack.tif --label drawn.tif --label-slices n=7
    CPU    python train_cps.py --demo

Expect:
    GPU    not run
    CPU    test Dice 0.87 (mitochondria) and 0.95 (nucleus), seed 0, 138 s on two busy cores
    EPFL mitochondria from 7 slices (commands in the README), test IoU, seeds 0, 1, 2, one thread:
    resunet of width 16, 1000 steps, 0.846, 0.812, 0.849 in 6 to 9 minutes; supervised 0.855, 0.853,
    0.863 in 1 to 2
"""

import argparse
import functools
import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import nn

import emseg

MODELS = {**emseg.NETWORKS}
AUGMENTATION = {"flip": True, "rot90": True}        # section 2.2

# How the paper trained its networks (authors' code). lr is that of a batch of 256 crops and grows
# with the batch where the schedule is plateau.
OF_CPS = dict(schedule="linear", lr=1e-3, batch_size=20, epochs=500, weight_decay=0.0, clip=1.0)
OF_UNETPP = dict(schedule="plateau", lr=1e-4, batch_size=3, epochs=500, weight_decay=0.0, clip=0.0)
OF_FRACTAL = dict(OF_UNETPP, lr=5e-4)
OF_SENFORMER = dict(schedule="linear", lr=6e-5, batch_size=8, epochs=750, weight_decay=0.01,
                    clip=0.1)


def recipe(model, method):
    """The defaults of a network's training: schedule, lr, batch_size, epochs, weight_decay, clip.

    What the paper did not train, such as ceecnet with CPS, takes the network's own ones.
    """
    if model == "senformer":
        return OF_SENFORMER
    if model in ("fractalresnet", "ceecnet"):
        return OF_FRACTAL if method == "supervised" else dict(OF_FRACTAL, batch_size=4)
    if model in ("unet++", "unet++3") and method == "supervised":
        return OF_UNETPP
    return OF_CPS


# -- losses: heads is the list of a network's logits (B, C, H, W) ----------------------------------


def dice_loss(heads, label):
    """Soft Dice loss (eq. 1), the mean over the branches of a network."""
    return sum(emseg.soft_dice_loss(logits, label, squared=True) for logits in heads) / len(heads)


def ensemble_loss(heads, label):
    """Cross entropy of the mean prediction plus the mean one of all learners (Bousselham 2022)."""
    each = sum(emseg.cross_entropy(logits, label) for logits in heads) / len(heads)
    return emseg.cross_entropy(emseg.mean_logits(heads), label) + each


def tanimoto_loss(heads, label, depth=0):
    """Fractal Tanimoto loss with complement (Diakogiannis 2021, section 2.1): the mean over images
    and over segmentation, boundary and distance, the heads in this order.

    depth: 0 at first, 10 more whenever the learning rate drops. IGNORE counts nowhere.
    """
    segmentation, boundary, distance = heads
    prob = emseg.probabilities(segmentation), boundary.float().sigmoid(), distance.float().sigmoid()
    valid = (label != emseg.IGNORE)[:, None]
    return 1 - sum(emseg.fractal_tanimoto(p, target, (1, 2, 3), depth=depth, valid=valid)[0].mean()
                   for p, target in zip(prob, tanimoto_targets(label, segmentation.shape[1]))) / 3


def tanimoto_targets(label, channels):
    """Segmentation, boundary and distance maps (B, C, H, W), 0..1, of a label (B, H, W) int64.

    One channel: of class 1; else one for each class. The boundary is three pixels wide: the class's
    outermost pixels and their four neighbours. The distance to the class's complement is scaled to
    a maximum of 1 in each crop. IGNORE is no complement.
    """
    classes = torch.arange(channels, device=label.device) + int(channels == 1)
    inside = label[:, None] == classes.view(1, -1, 1, 1)
    outside = ~inside & (label != emseg.IGNORE)[:, None]
    distance = distance_to(outside) * inside
    distance = distance / distance.amax(dim=(2, 3), keepdim=True).clamp(min=1)
    return inside.float(), grow(inside & grow(outside)).float(), distance


def grow(mask):
    """A mask (B, C, H, W) bool and its four neighbours in the plane."""
    mask = mask.float()
    return torch.maximum(F.max_pool2d(mask, (3, 1), 1, (1, 0)),
                         F.max_pool2d(mask, (1, 3), 1, (0, 1))) > 0


def distance_to(mask):
    """Euclidean distance (B, C, H, W) in pixels to the nearest True pixel of a mask (B, C, H, W)
    bool in the same plane; H + W where there is none."""
    H, W = mask.shape[-2:]
    # One call for all planes, which are too far apart to see each other; a full one below them.
    planes = np.pad(~mask.flatten(0, 1).cpu().numpy(), ((1, 0), (0, 0), (0, 0)))
    distance = ndimage.distance_transform_edt(planes, sampling=(H + W, 1, 1))[1:]
    distance = np.minimum(distance, H + W).astype(np.float32)
    return torch.from_numpy(distance).view(mask.shape).to(mask.device)


def loss_of(model, drops=0):
    """The loss (heads, label) -> scalar that a network is trained with; drops: of its rate."""
    if model in ("fractalresnet", "ceecnet"):
        return functools.partial(tanimoto_loss, depth=10 * drops)
    return ensemble_loss if model == "senformer" else dice_loss


# -- schedule --------------------------------------------------------------------------------------


def cps_weight(epoch, warmup, weight):
    """lambda at a (fractional) epoch: 0, then linear up to `weight` (section 2.4.1).

    warmup: the epochs at which it leaves 0 and reaches `weight`. At first the supervised loss must
    lead: pseudo-labels of untrained networks are background only, and both networks would agree on
    that for good.
    """
    start, end = warmup
    return weight * min(max((epoch - start) / (end - start), 0.0), 1.0)


def learning_rate(step, total, peak):
    """Linear warm-up over 1500 steps, at most 7 %, then linear decay to 0 (authors' code)."""
    warmup = min(1500, 0.07 * total)
    return peak * min((step + 1) / warmup, 1 - step / total)


def rate_drops(run):
    """How often the learning rate has dropped to a tenth: where 16 epochs brought nothing better,
    with a pause of 15 after each drop, twice at most (authors' code). The validation Dice decides,
    or the supervised loss where nothing validates."""
    history = run.history or [-losses.get("loss_sup", losses["loss"]) for losses in run.losses]
    return min(2, emseg.plateaus(history, patience=16, cooldown=15, threshold=1e-5))


def optimizer_of(network, args):
    """Adam; with weight decay AdamW, which leaves biases, norms, tables of positions and queries
    alone (Liu 2021, Bousselham 2022)."""
    free = [p for name, p in network.named_parameters()
            if p.dim() < 2 or "relative" in name or "queries" in name]
    decayed = [p for p in network.parameters() if all(p is not other for other in free)]
    return torch.optim.AdamW([{"params": decayed, "weight_decay": args.weight_decay},
                              {"params": free, "weight_decay": 0.0}], lr=args.lr)


# -- cross pseudo supervision ----------------------------------------------------------------------


def network_heads(run, network, image):
    """All logits that a network is trained by, a list of (B, C, H, W)."""
    with run.autocast():
        return network(image, heads=True) if hasattr(network, "combine") else [network(image)]


def pseudo_label(network, heads):
    """What a network predicts: class ids (B, H, W) int64, without gradient."""
    logits = network.combine(heads) if hasattr(network, "combine") else heads[0]
    return emseg.class_ids(emseg.probabilities(logits.detach()))


def cps_loss(heads_a, heads_b, pseudo_a, pseudo_b, loss):
    """Cross pseudo supervision (eq. 2, with the network's own loss): each from the other.

    heads: lists of logits (B, C, H, W) of the networks a and b; pseudo (B, H, W) int64, their hard
    predictions.
    """
    return loss(heads_a, pseudo_b) + loss(heads_b, pseudo_a)


def cutmix(labelled, unlabelled, box):
    """Paste boxes of the second half of a batch into its first half (section 2.4.2).

    labelled, unlabelled (B, ...): the halves of each are mixed with each other, so that half of the
    B results still come from crops that hold foreground. box (B, 1, H, W) bool, or (B, H, W).
    """
    half = len(labelled) // 2
    into = torch.cat([labelled[:half], unlabelled[:half]])
    source = torch.cat([labelled[half:], unlabelled[half:]])
    return torch.where(box, source, into)


def cps_losses(run, network_a, network_b, loss, image_l, label_l, image_u, mix):
    """Supervised and CPS loss of one batch, each the sum over both networks (eqs. 1-3).

    image_l (B, 1, H, W), label_l (B, H, W): labelled; image_u (B, 1, H, W): unlabelled, or None
    during the first epochs, when the supervised loss leads alone. mix: whether to use CutMix.
    """
    def forward(image):
        return [network_heads(run, network, image) for network in (network_a, network_b)]

    heads_a, heads_b = forward(image_l)
    loss_sup = loss(heads_a, label_l) + loss(heads_b, label_l)
    if image_u is None:
        return loss_sup, torch.zeros_like(loss_sup)
    # With CutMix the unmixed images only teach: as in prediction, since the statistics of a few
    # crops without foreground make a network see it everywhere.
    for network in (network_a, network_b):
        network.train(not mix)
    with torch.set_grad_enabled(not mix):
        unlabelled_a, unlabelled_b = forward(image_u)
    for network in (network_a, network_b):
        network.train()
    pseudo_a = [pseudo_label(network_a, heads) for heads in (heads_a, unlabelled_a)]
    pseudo_b = [pseudo_label(network_b, heads) for heads in (heads_b, unlabelled_b)]
    if not mix:
        return loss_sup, cps_loss(
            [torch.cat(pair) for pair in zip(heads_a, unlabelled_a)],
            [torch.cat(pair) for pair in zip(heads_b, unlabelled_b)],
            torch.cat(pseudo_a), torch.cat(pseudo_b), loss)
    box = emseg.cutmix_boxes(len(image_l), image_l.shape[-2:], image_l.device)
    mixed_a, mixed_b = forward(cutmix(image_l, image_u, box))
    return loss_sup, cps_loss(mixed_a, mixed_b, cutmix(*pseudo_a, box[:, 0]),
                              cutmix(*pseudo_b, box[:, 0]), loss)


def parse_args(argv=None):
    parser = emseg.Parser(__file__, __doc__)
    emseg.add_common_args(parser, MODELS, sources={
        "model": "section 2.3; widths of table 1",
        "steps_per_epoch": "default: 64 crops of each annotated slice in an epoch, authors' code",
        **dict.fromkeys(("epochs", "batch_size", "lr"), "default: the network's, authors' code"),
        "downsample": "section 2.2",
        "patch_size": "section 2.2", "normalize": "equalize is the paper's, section 2.1.2"})
    method = parser.add_argument_group("method (Pagano 2023)").add_argument
    method("--method", choices=("supervised", "cps"), default="cps",
           help="labelled slices only, or cross pseudo supervision as well (section 2.4.1)")
    method("--cutmix", action=argparse.BooleanOptionalAction, default=True,
           help="mix the images of the CPS loss (section 2.4.2)")
    method("--cps-weight", type=emseg.positive(float), default=1.0, metavar="W",
           help="lambda of eq. 3 after its warm-up (section 2.4.1)")
    method("--cps-warmup", nargs=2, type=float, metavar=("START", "END"), default=[5.0, 20.0],
           help="epochs between which lambda grows from 0 (section 2.4.1; authors' code)")
    method("--average-branches", action="store_true",
           help="of unet++ and unet++3: a head for every branch; loss and prediction are their "
           "means (section 2.3.2)")
    method("--schedule", choices=("linear", "plateau"),
           help="learning rate: linear warm-up and decay, or a tenth, twice at most, after 16 "
           "epochs that brought no better validation Dice (supervised loss without validation)")
    method("--weight-decay", type=float, metavar="W", help="of AdamW; 0: Adam")
    method("--clip", type=float, metavar="C",
           help="largest norm of a network's gradient; 0: any")
    method("--foreground", type=float, default=0.99, metavar="P",
           help="share of labelled crops that must hold foreground (section 2.2)")
    parser.set_defaults(model="resunet", patch_size=[512, 512], downsample=4)
    demo = dict(model="unet", width=12, epochs=10, steps_per_epoch=20, batch_size=8,
                patch_size=[128, 128], downsample=2, label_slices="n=7", lr=5e-3,
                cps_warmup=[3.0, 8.0], label_map="3=1,2=2,*=0",
                classes=["background", "mitochondrion", "nucleus"])
    args = emseg.parse(parser, argv, demo)
    own = recipe(args.model, args.method)
    untyped = [name for name in own if getattr(args, name) is None]
    for name in untyped:
        setattr(args, name, own[name])
    if "lr" in untyped and own["schedule"] == "plateau":
        args.lr *= args.batch_size * int(os.environ.get("WORLD_SIZE", 1)) / 256
    if args.average_branches and args.model not in ("unet++", "unet++3"):
        parser.error(f"--average-branches: {args.model} has no branches; unet++ and unet++3 "
                     f"have")
    for name in ("weight_decay", "clip"):
        if not 0 <= getattr(args, name) < math.inf:
            parser.error(f"{emseg.flag_name(name)} {getattr(args, name)} is not 0 or above")
    for name, most in (("cps_weight", 1e6), ("weight_decay", 1e3)):
        if getattr(args, name) > most:
            parser.error(f"{emseg.flag_name(name)} {getattr(args, name):g} is above {most:g}")
    if not 0 <= args.foreground <= 1:
        parser.error(f"--foreground {args.foreground} is not between 0 and 1")
    start, end = args.cps_warmup
    if not 0 <= start < end < math.inf:
        parser.error(f"--cps-warmup {start:g} {end:g}: START must be at least 0 and below END, a "
                     f"number")
    if args.method == "cps" and start >= args.epochs:
        parser.error(f"--cps-warmup starts at epoch {start:g}, but there are {args.epochs} epochs; "
                     f"start earlier, or give --method supervised")
    wanted = 1 if args.method == "supervised" else 4 if args.cutmix else 2
    if args.batch_size % wanted:
        parser.error(f"--batch-size {args.batch_size}: half of the crops are labelled and CutMix "
                     f"mixes in pairs; give a multiple of {wanted}")
    return args


def describe(args):
    """One line: how the network is trained."""
    loss = loss_of(args.model)
    kind = {dice_loss: "soft Dice", ensemble_loss: "cross entropy of ensemble and learners"}.get(
        loss, "Tanimoto of segmentation, boundary and distance")
    method = "supervised" if args.method == "supervised" else "CPS" + " + CutMix" * args.cutmix
    decay = f"AdamW, weight decay {args.weight_decay:g}" if args.weight_decay else "Adam"
    return (f"{args.model}, {method}: {kind}; {decay}, learning rate {args.lr:g}, {args.schedule}; "
            f"batches of {args.batch_size}, {args.epochs} epochs, gradients "
            + (f"clipped at {args.clip:g}" if args.clip else "not clipped"))


@emseg.command
def main(args):
    # run folder, seed, device
    run = emseg.Run(args, __file__)
    if args.demo:
        emseg.write_demo(run, shape=(28, 256, 256))

    # data
    data = run.open_data()
    cps = args.method == "cps"
    if cps and run.training and not any(len(zs) for zs in data.unlabeled_slices):
        raise emseg.InputError("--method cps: every slice is labelled; give --label-slices or "
                               "--unlabeled-volume, or --method supervised")

    # networks
    options = {"average_branches": True} if args.average_branches else {}
    networks = [run.prepare(MODELS[args.model](1, data.out_channels, args.width, **options))
                for _ in ("ab" if cps and run.training else "a")]
    modules = dict(zip(("network_a", "network_b"), networks))

    def predict(image):
        """uint8 slices (B, H, W) -> probabilities (B, C, H, W) of the first network."""
        return run.predict_slices(networks[0], image)

    # optimiser
    optimizers = [optimizer_of(network, args) for network in networks]
    scaler = run.gradient_scaler()
    modules.update(zip(("optimizer_a", "optimizer_b"), optimizers), scaler=scaler)

    # train
    if run.training:
        emseg.check_patch_size(networks[0], args.patch_size, args.model)
        count = args.batch_size // 2 if cps else args.batch_size
        labelled = emseg.Patches(data.images, data.labels, args.patch_size, data.slices,
                                 args.foreground, seed=(args.seed, 0))
        unlabelled = emseg.Patches(data.unlabeled, None, args.patch_size, data.unlabeled_slices,
                                   seed=(args.seed, 1)) if cps else None
        steps_per_epoch = args.steps_per_epoch or math.ceil(64 * len(labelled.slices) / count)
        run.say(describe(args))
        run.begin(steps_per_epoch, **modules)
        batches_l, batches_u = run.batches(labelled, count), run.batches(unlabelled, count)
    for epoch in run.epochs():
        for network in networks:
            network.train()
        drops = rate_drops(run) if args.schedule == "plateau" else 0
        loss_function = loss_of(args.model, drops)
        for step in run.steps(epoch):
            lr = (args.lr * 0.1**drops if args.schedule == "plateau"
                  else learning_rate(step, run.total, args.lr))
            image_l, label_l = emseg.augment(*next(batches_l), data.normalization, **AUGMENTATION)
            if cps:
                weight = cps_weight(step / steps_per_epoch, args.cps_warmup, args.cps_weight)
                image_u = next(batches_u)
                if weight:
                    image_u, _ = emseg.augment(image_u, None, data.normalization, **AUGMENTATION)
                loss_sup, loss_cps = cps_losses(run, *networks, loss_function, image_l, label_l,
                                                image_u if weight else None, args.cutmix)
                loss = loss_sup + weight * loss_cps                                     # eq. 3
                terms = {"loss_sup": loss_sup, "loss_cps": loss_cps}
            else:
                loss = loss_function(network_heads(run, networks[0], image_l), label_l)
                terms = {}
            scaler.scale(loss).backward()
            for network, optimizer in zip(networks, optimizers):
                emseg.average_gradients(network)
                scaler.unscale_(optimizer)
                if args.clip:
                    nn.utils.clip_grad_norm_(network.parameters(), args.clip)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                scaler.step(optimizer)
                optimizer.zero_grad()
            scaler.update()
            run.log(lr=lr, loss=loss, **terms)
        run.end_epoch(run.validate(predict))

    # predict
    run.use_best(network_a=networks[0])
    predictions = [run.predict(predict, item) for item in data.test]

    # evaluate
    run.report(predictions, slices=True)


if __name__ == "__main__":
    main(parse_args())
