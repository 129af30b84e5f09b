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
    eq. 2 (CPS loss)                cps_loss, with the network's own loss (loss_of)
    eq. 3 (total loss)              main: loss = loss_sup + weight * loss_cps
    section 2.3 (networks)          emseg.NETWORKS; their losses: dice_loss, tanimoto_loss with
                                    tanimoto_targets, ensemble_loss; their trainings: RECIPES
    section 2.4.1 (warm-up)         cps_weight
    section 2.4.2 (CutMix)          cps_cutmix_loss, cutmix_boxes, mix
    figure 5 (Dice against z)       emseg.save_slice_dice

Differences from the paper:
    1. Soft Dice has squared terms in the denominator, as in the authors' code, and is smoothed by
       1e-5 everywhere (by 1 in their supervised trainings).
    2. Before the warm-up of lambda starts, the authors weigh CPS with 1e-5; here its passes are
       left out. Epochs are counted in fractions, so that lambda grows with every step.
    3. Crops are drawn again until they hold foreground, as in the authors' code, but 50 times at
       most, then around a voxel of it. Of several classes one is drawn, and sought.
    4. --downsample averages blocks of pixels; the authors interpolate bilinearly.
    5. Validation, if any, uses whole slices, and its Dice decides on the plateau schedule; the
       authors use random crops and their loss.
    6. Large slices are predicted in tiles that share 96 pixels and blend smoothly (in tiles of the
       size of the crops by fractalresnet, ceecnet and senformer); the authors' overlap
       by three quarters and count alike.
    7. Slices are equalised (section 2.1.2) only with --normalize equalize.
    8. Several foreground classes are one softmax; the authors train one network for each, as
       --label-map "2=1,*=0" does. Heads of distances and boundaries are sigmoids (a softmax over
       classes in Diakogiannis's code); boundaries are found by comparing neighbours, not by
       Canny's filter.
    9. All encoders start from random weights; whether the authors' started from ImageNet's is not
       in the paper. The average of branches, which it reports for UNet++, is --average-branches.
    10. The linear warm-up is at most 7 % of the steps, the authors' 1500 of 22,000. What they did
       not train is marked as ours in RECIPES. "resunet" is the authors' small U-Net; the row
       "ResUNet" of the paper's tables is another, residual one of 2021.

Run:
    GPU    python train_cps.py --volume stack.tif --label drawn.tif --label-slices n=7
    CPU    python train_cps.py --demo

Expect:
    GPU    0.23 s a step at the defaults on an H200; not trained to the end
    CPU    test Dice 0.82 (mitochondria) and 0.90 (nucleus), seed 0, 175 s on two cores without bf16
    EPFL mitochondria, resunet of width 16, 1000 steps (tests/replicate.py cps), test IoU from one
    labelled slice (3 seeds): supervised 0.781 +- 0.031, CPS 0.875 +- 0.013, CPS + CutMix 0.862 +-
    0.008; from all 110 slices 0.894 +- 0.007; one to two minutes on an H200
"""

import argparse
import functools
import math

import emseg                            # before torch, see there
import torch
import torch.nn.functional as F

MODELS = emseg.NETWORKS
AUGMENTATION = {"flip": True, "rot90": True}        # section 2.2

# How the authors trained (their code), or, where marked, how we do. plateau: the rate falls to a
# tenth, at most twice, after 16 epochs without improvement; linear: a warm-up, then a decay to 0.
# The plateau's rates are the authors' times batch / 256.
PLATEAU = dict(schedule="plateau", weight_decay=0.0, clip=0.0, epochs=500)
LINEAR = dict(schedule="linear", weight_decay=0.0, clip=1.0, epochs=500)
TRANSFORMER = dict(schedule="linear", lr=6e-5, batch_size=8, epochs=750, weight_decay=0.01,
                   clip=0.1)
HEAVY_CPS = {"fractalresnet": dict(PLATEAU, lr=4 * 5e-4 / 256, batch_size=4),              # ours
             "ceecnet": dict(PLATEAU, lr=4 * 5e-4 / 256, batch_size=4),                    # ours
             "senformer": TRANSFORMER}                                                     # ours
RECIPES = {
    "supervised": {
        "resunet": dict(schedule="constant", lr=1e-2, batch_size=8, epochs=500, weight_decay=0.0,
                        clip=0.0),
        "unet++": dict(PLATEAU, lr=3 * 1e-4 / 256, batch_size=3),
        "unet++3": dict(PLATEAU, lr=3 * 1e-4 / 256, batch_size=3),                         # ours
        "fractalresnet": dict(PLATEAU, lr=3 * 5e-4 / 256, batch_size=3),
        "ceecnet": dict(PLATEAU, lr=3 * 5e-4 / 256, batch_size=3),
        "senformer": TRANSFORMER,
        "others": dict(LINEAR, lr=1e-3, batch_size=20)},                                   # ours
    "cps": {**HEAVY_CPS, "others": dict(LINEAR, lr=1e-3, batch_size=12, epochs=300)},
    "cps + cutmix": {**HEAVY_CPS, "others": dict(LINEAR, lr=1e-3, batch_size=20)},
}


def recipe(args):
    """The defaults of a command line that depend on its method and network."""
    rows = RECIPES["cps + cutmix" if args.method == "cps" and args.cutmix else args.method]
    return rows.get(args.model, rows["others"])


# -- losses: heads is the list of a network's logits (B, C, H, W) ----------------------------------


def dice_loss(heads, label):
    """Soft Dice loss (eq. 1), the mean over the branches of a network."""
    return sum(emseg.soft_dice_loss(logits, label, squared=True) for logits in heads) / len(heads)


def ensemble_loss(heads, label):
    """Cross entropy of the mean prediction plus the mean one of all learners (Bousselham 2022)."""
    learners = [emseg.cross_entropy(logits, label) for logits in heads]
    return emseg.cross_entropy(emseg.mean_logits(heads), label) + sum(learners) / len(heads)


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
    bool in the same plane; H + W where there is none. Exact, and all on the mask's device: along
    columns first, then along rows (Saito & Toriwaki 1994)."""
    H, W = mask.shape[-2:]
    y = torch.arange(H, dtype=torch.float32, device=mask.device).view(-1, 1)
    above = torch.where(mask, y, -H - W).cummax(-2).values
    below = torch.where(mask, y, 2 * H + W).flip(-2).cummin(-2).values.flip(-2)
    column = torch.minimum(y - above, below - y).square()
    nearest = column.clone()
    for d in range(1, W):
        if d % 32 == 0 and nearest.max() < d**2:        # all pixels have found theirs
            break
        torch.minimum(nearest[..., d:], column[..., :-d] + d * d, out=nearest[..., d:])
        torch.minimum(nearest[..., :-d], column[..., d:] + d * d, out=nearest[..., :-d])
    return nearest.sqrt().clamp(max=H + W)


def loss_of(model, drops=0):
    """The loss (heads, label) -> scalar that a network is trained with; drops: how often the rate
    has fallen."""
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


def learning_rate(args, step, total, drops):
    """The rate of a step: linear warm-up over 1500 steps, at most 7 %, then linear decay to 0; a
    tenth after each of the drops; or constant (authors' code, but for the 7 %)."""
    if args.schedule == "linear":
        warmup = min(1500, 0.07 * total)
        return args.lr * min((step + 1) / warmup, 1 - step / total)
    return args.lr * 0.1**drops


def rate_drops(rows, patience=15, most=2):
    """How often the rate has dropped, from the rows of log.csv: after `patience` + 1 epochs without
    a better validation Dice (without validation, a lower supervised loss), `most` times at most.
    After a drop the best value is sought anew, since the Tanimoto loss then becomes steeper
    (authors' code)."""
    drops, best, waited = 0, math.inf, 0
    for row in rows:
        dice = row.get("val_dice")
        loss = row.get("loss_sup", row["loss"]) if dice is None else 1 - dice
        best, waited = (loss, 0) if loss < best * (1 - 1e-5) else (best, waited + 1)
        if waited > patience and drops < most:
            drops, best, waited = drops + 1, math.inf, 0
    return drops


def optimizer_of(network, args):
    """Adam; with weight decay AdamW, which leaves biases, norms, tables of positions and queries
    alone (Liu 2021, Bousselham 2022)."""
    free, decayed = [], []                  # relative: Swin's tables; queries: SenFormer's
    for name, p in network.named_parameters():
        (free if p.dim() < 2 or "relative" in name or "queries" in name else decayed).append(p)
    return torch.optim.AdamW([{"params": decayed, "weight_decay": args.weight_decay},
                              {"params": free, "weight_decay": 0.0}], lr=args.lr)


# -- cross pseudo supervision ----------------------------------------------------------------------


def pseudo_label(network, heads):
    """What a network predicts: class ids (B, H, W) int64, without gradient."""
    logits = network.combine(heads) if hasattr(network, "combine") else heads[0]
    return emseg.class_ids(emseg.probabilities(logits.detach()))


def cps_loss(heads_of, networks, loss_function, heads_l, image_u):
    """Cross pseudo supervision (eq. 2): each network learns what the other one predicts.

    heads_of: network, image (B, 1, H, W) -> list of logits (B, C, H, W); heads_l: those of both
    networks for the labelled images; image_u (B, 1, H, W): unlabelled ones. Both are learnt from.
    """
    heads_u = [heads_of(network, image_u) for network in networks]
    heads_a, heads_b = [[torch.cat([head_l, head_u]) for head_l, head_u in zip(own_l, own_u)]
                        for own_l, own_u in zip(heads_l, heads_u)]
    pseudo_a, pseudo_b = map(pseudo_label, networks, (heads_a, heads_b))
    return loss_function(heads_a, pseudo_b) + loss_function(heads_b, pseudo_a)


def cps_cutmix_loss(heads_of, networks, loss_function, image_l, image_u):
    """Cross pseudo supervision with CutMix (section 2.4.2): see cps_loss.

    Pseudo-labels come from the whole images, in one batch and in training mode; each network learns
    the other's, mixed like the images. Labelled crops are mixed with labelled ones, so that half of
    the batch holds foreground.
    """
    # even labelled, even unlabelled, odd labelled, odd unlabelled: see mix
    image = torch.cat([each[half::2] for half in (0, 1) for each in (image_l, image_u)])
    with torch.no_grad():
        pseudo_a, pseudo_b = [pseudo_label(network, heads_of(network, image))
                              for network in networks]
    box = cutmix_boxes(len(image) // 2, image.shape[-2:], image.device)
    heads_a, heads_b = [heads_of(network, mix(image, box)) for network in networks]
    return (loss_function(heads_a, mix(pseudo_b, box))
            + loss_function(heads_b, mix(pseudo_a, box)))


def mix(batch, box):
    """Paste boxes of the second half of a batch (2 B, ...) into its first half: (B, ...).

    box: bool (B, H, W)."""
    into, source = batch.chunk(2)
    return torch.where(box.view(-1, *[1] * (batch.dim() - 3), *box.shape[1:]), source, into)


def cutmix_boxes(batch, size, device, area=(0.25, 0.5)):
    """One random box per image: bool (B, H, W), True inside (Pagano 2023, authors' code).

    The box covers a share p of the image, p uniform in `area`; its height is p^u of the image's,
    u uniform in (0, 1), so its width is p^(1-u); it lies wholly inside at a uniform place.
    """
    H, W = size
    p = torch.empty(batch, device=device).uniform_(*area)
    u = torch.rand(batch, device=device)
    height, width = (p**u * H).round(), (p ** (1 - u) * W).round()
    top = (torch.rand(batch, device=device) * (H - height + 1)).floor().view(-1, 1, 1)
    left = (torch.rand(batch, device=device) * (W - width + 1)).floor().view(-1, 1, 1)
    y = torch.arange(H, device=device).view(1, -1, 1)
    x = torch.arange(W, device=device).view(1, 1, -1)
    inside_y = (y >= top) & (y < top + height.view(-1, 1, 1))
    inside_x = (x >= left) & (x < left + width.view(-1, 1, 1))
    return inside_y & inside_x


def parse_args(argv=None):
    parser = emseg.Parser(__file__, __doc__)
    emseg.add_common_args(parser, MODELS, sources={
        "model": "section 2.3",
        "steps_per_epoch": "default: 64 crops of each annotated slice in an epoch, authors' code",
        **dict.fromkeys(("epochs", "batch_size", "lr"), "default: see RECIPES in the script"),
        "downsample": "section 2.2",
        "patch_size": "section 2.2", "normalize": "equalize is the paper's, section 2.1.2"})
    method = parser.add_argument_group("method (Pagano 2023)").add_argument
    method("--unlabeled-volume", nargs="+", metavar="P", default=[],
           help="volumes without labels; the other slices of --volume are used in any case")
    method("--method", choices=("supervised", "cps"), default="cps",
           help="labelled slices only, or cross pseudo supervision as well (section 2.4.1)")
    method("--cutmix", action=argparse.BooleanOptionalAction, default=True,
           help="mix the images of the CPS loss (section 2.4.2)")
    method("--cps-weight", type=emseg.positive(float), default=1.0, metavar="W",
           help="lambda of eq. 3 after its warm-up (section 2.4.1)")
    method("--cps-warmup", nargs=2, type=emseg.nonnegative, metavar=("START", "END"),
           default=[5.0, 20.0],
           help="epochs between which lambda grows from 0 (section 2.4.1; authors' code)")
    method("--average-branches", action="store_true",
           help="of unet++ and unet++3: a head for every branch; loss and prediction are their "
           "means (section 2.3.2)")
    method("--schedule", choices=("linear", "plateau", "constant"),
           help="learning rate: linear warm-up and decay; a tenth, at most twice, after 16 epochs "
           "that brought no better validation Dice (supervised loss without validation); constant; "
           "default, also of the next two: see RECIPES in the script")
    method("--weight-decay", type=emseg.nonnegative, metavar="W", help="of AdamW; 0: Adam")
    method("--clip", type=emseg.nonnegative, metavar="C",
           help="largest norm of a network's gradient; 0: any")
    method("--foreground", type=emseg.share, default=0.99, metavar="P",
           help="share of labelled crops that must hold foreground (section 2.2)")
    parser.set_defaults(model="resunet", patch_size=[512, 512], downsample=4)
    demo = dict(model="unet", width=12, epochs=10, steps_per_epoch=20, batch_size=8,
                patch_size=[128, 128], downsample=2, label_slices="n=7", lr=5e-3,
                cps_warmup=[3.0, 8.0], label_map="3=1,2=2,*=0",
                classes=["background", "mitochondrion", "nucleus"])
    quick = dict(model="unet", width=16, epochs=10, steps_per_epoch=20, batch_size=16, cutmix=False,
                 patch_size=[64, 64], downsample=4, lr=5e-3, cps_warmup=[4.0, 8.0])
    args = emseg.parse(parser, argv, demo, quick, settings=recipe)
    if args.average_branches and args.model not in ("unet++", "unet++3"):
        parser.error(f"--average-branches: {args.model} has no branches; unet++ and unet++3 "
                     f"have")
    start, end = args.cps_warmup
    if args.method == "cps" and start >= min(end, args.epochs):
        parser.error(f"--cps-warmup {start:g} {end:g}: START must be below END and below the "
                     f"{args.epochs} epochs; or give --method supervised")
    wanted = 1 if args.method == "supervised" else 4 if args.cutmix else 2
    if args.batch_size % wanted:
        parser.error(f"--batch-size {args.batch_size}: half of the crops are labelled, and CutMix "
                     f"needs pairs of each; give a multiple of {wanted}")
    return args


def make_network(args):
    """The network that the arguments describe."""
    options = {"average_branches": True} if args.average_branches else {}
    return MODELS[args.model](1, emseg.out_channels(args.classes), args.width, **options)


@emseg.command
def main(args):
    # run folder, seed, device
    run = emseg.Run(args, __file__)
    if run.finished:
        return
    if args.demo:
        emseg.write_demo(run, shape=(28, 256, 256))
    if args.checkpoint:
        network = run.load(make_network(args))
        return emseg.predict_and_score(run, network, emseg.open_test(args, run.used))

    # data
    cps = args.method == "cps"
    train, val = emseg.open_training(args)
    unlabelled = emseg.open_unlabelled(args, train, val) if cps else []
    run.used += emseg.used_slices(train + val)
    test = emseg.open_test(args, run.used, train)
    emseg.describe_data(args, train=train, validate=val, unlabelled=unlabelled, test=test)
    emseg.check_annotation(train, args)
    images, targets, slices = zip(*[(item.image, item.target, item.slices) for item in train])
    run.normalization = emseg.measure_normalization(train, args.normalize)
    patches_l = emseg.Patches(images, targets, args.patch_size, slices, args.foreground,
                              seed=(args.seed, 0))
    patches_u = emseg.Patches([item.image for item in unlabelled], None, args.patch_size,
                              [item.slices for item in unlabelled], seed=(args.seed, 1))
    if cps and not unlabelled:
        raise emseg.InputError("--method cps: every slice is labelled; give --label-slices or "
                               "--unlabeled-volume, or --method supervised")

    # networks
    networks = [run.prepare(make_network(args)) for _ in range(2 if cps else 1)]
    emseg.check_patch_size(networks[0], args.patch_size, args.model)
    predict = functools.partial(emseg.predict, run, networks[0])    # alone, as the authors do

    def heads_of(network, image):
        """All logits that a network is trained by, a list of (B, C, H, W); `combine` makes of
        several those that it predicts with."""
        with run.autocast():
            return network(image, heads=True) if hasattr(network, "combine") else [network(image)]

    # optimiser
    optimizers = [optimizer_of(network, args) for network in networks]

    # train
    count = args.batch_size // 2 if cps else args.batch_size
    run.begin(args.steps_per_epoch or math.ceil(64 * len(patches_l.slices) / count),
              **dict(zip(("network", "network_b"), networks)),
              **dict(zip(("optimizer", "optimizer_b"), optimizers)))
    batches_l, batches_u = run.batches(patches_l, count), run.batches(patches_u, count)
    for epoch in run.epochs():
        for network in networks:
            network.train()
        drops = rate_drops(run.rows) if args.schedule == "plateau" else 0
        loss_function = loss_of(args.model, drops)
        for step in run.steps(epoch):
            lr = learning_rate(args, step, run.total, drops)
            image_l, label_l = emseg.augment(*next(batches_l), run.normalization, **AUGMENTATION)
            heads_l = [heads_of(network, image_l) for network in networks]
            loss_sup = sum(loss_function(heads, label_l) for heads in heads_l)
            loss, terms = loss_sup, {}
            if cps:
                image_u, _ = emseg.augment(*next(batches_u), None, run.normalization,
                                           **AUGMENTATION)
                weight = cps_weight(step / run.steps_per_epoch, args.cps_warmup, args.cps_weight)
                loss_cps = torch.zeros_like(loss_sup)
                if weight and args.cutmix:
                    loss_cps = cps_cutmix_loss(heads_of, networks, loss_function, image_l, image_u)
                elif weight:
                    loss_cps = cps_loss(heads_of, networks, loss_function, heads_l, image_u)
                loss = loss_sup + weight * loss_cps                                     # eq. 3
                terms = {"loss_sup": loss_sup, "loss_cps": loss_cps,
                         "cps_weight": torch.full_like(loss_sup, weight)}
            run.update(loss, lr, *zip(networks, optimizers), clip=args.clip)
            run.log(lr=lr, loss=loss, **terms)
        run.end_epoch(emseg.validate(run, predict, val))

    # predict and evaluate
    run.use_best(networks[0])
    emseg.predict_and_score(run, networks[0], test)


if __name__ == "__main__":
    main(parse_args())
