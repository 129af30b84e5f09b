"""Semi-supervised segmentation from 7 to 25 labelled slices: cross pseudo supervision with CutMix.

Pagano L, Thibault G, Bousselham W, Riesterer JL, Song X, Gray JW (2023). Efficient semi-supervised
semantic segmentation of electron microscopy cancer images with sparse annotations. Frontiers in
Bioinformatics 3:1308707. doi:10.3389/fbinf.2023.1308707

A biologist labels a handful of the thousands of slices of a volume. Two networks of the same kind,
started differently, learn from them; on all other slices each learns from the labels that the other
one predicts (cross pseudo supervision, CPS). CutMix pastes a box of one image into another, so that
a network must recognise an object from a part of it.

Equations:
    eq. 1 (soft Dice)               emseg.soft_dice_loss
    eq. 2 (CPS loss, with eq. 1)    cps_loss
    eq. 3 (total loss)              main: loss = loss_sup + weight * loss_cps
    section 2.4.1 (warm-up)         cps_weight
    section 2.4.2 (CutMix)          emseg.cutmix_boxes, cutmix

Differences from the paper:
    1. Soft Dice has squared terms in the denominator, as in the authors' code.
    2. Before the warm-up of lambda starts, the authors weigh CPS with 1e-5; here its passes are
       left out. Epochs are counted in fractions, so that lambda grows with every step.
    3. A crop that must hold foreground is placed around a voxel of it (class, slice and voxel drawn
       in turn); the authors crop again until there is some.
    4. --downsample averages blocks of pixels; the authors interpolate bilinearly. A crop larger
       than the slice is refused; the authors mirror the slice.
    5. Validation, if any, uses whole slices; the authors use random crops.
    6. Large slices are predicted in tiles that overlap by a quarter and blend smoothly; the
       authors' overlap by three quarters and count alike.
    7. Slices are equalised (section 2.1.2) only with --normalize equalize.
    8. Several foreground classes are one softmax; the authors train one network for each.
    9. Of the paper's networks there is "ResUNet" (resunet) so far; unet is not in the paper.

Run:
    GPU    python train_cps.py --volume stack.tif --label drawn.tif --label-slices n=7
    CPU    python train_cps.py --demo

Expect:
    GPU    not run
    CPU    test Dice 0.87 (mitochondria) and 0.94 (nucleus), seed 0, 73 s on two cores
    EPFL mitochondria from 7 slices (command in the README): test IoU 0.790 and 0.790, seeds 0 and
    1, unet of width 16, 800 steps, 9.9 minutes and 1.4 GiB on two CPU cores
"""

import argparse
import math

import torch
from torch import nn

import emseg

MODELS = {**emseg.NETWORKS}
AUGMENTATION = {"flip": True, "rot90": True}        # section 2.2


def cps_weight(epoch, warmup, weight):
    """lambda at a (fractional) epoch: 0, then linear up to `weight` (section 2.4.1).

    warmup: the epochs at which it leaves 0 and reaches `weight`. At first the supervised loss must
    lead: pseudo-labels of untrained networks are background only, and both networks would agree on
    that for good.
    """
    start, end = warmup
    return weight * min(max((epoch - start) / (end - start), 0.0), 1.0)


def learning_rate(step, total, peak):
    """Linear warm-up over the first 7 % of the steps, then linear decay to 0 (authors' code)."""
    warmup = 0.07 * total
    return peak * min((step + 1) / warmup, 1 - step / total)


def cps_loss(logits_a, logits_b, pseudo_a, pseudo_b):
    """Cross pseudo supervision (eq. 2 with the soft Dice loss of eq. 1): each from the other.

    logits (B, C, H, W) of the networks a and b; pseudo (B, H, W) int64, their hard predictions.
    """
    return (emseg.soft_dice_loss(logits_a, pseudo_b, squared=True)
            + emseg.soft_dice_loss(logits_b, pseudo_a, squared=True))


def cutmix(labelled, unlabelled, box):
    """Paste boxes of the second half of a batch into its first half (section 2.4.2).

    labelled, unlabelled (B, ...): the halves of each are mixed with each other, so that half of the
    B results still come from crops that hold foreground. box (B, 1, H, W) bool, or (B, H, W).
    """
    half = len(labelled) // 2
    into = torch.cat([labelled[:half], unlabelled[:half]])
    source = torch.cat([labelled[half:], unlabelled[half:]])
    return torch.where(box, source, into)


def supervised_loss(run, network, image, label):
    """Soft Dice loss (eq. 1) of one network on a labelled batch: image (B, 1, H, W)."""
    with run.autocast():
        logits = network(image)
    return emseg.soft_dice_loss(logits, label, squared=True)


def cps_losses(run, network_a, network_b, image_l, label_l, image_u, mix):
    """Supervised and CPS loss of one batch, each the sum over both networks (eqs. 1-3).

    image_l (B, 1, H, W), label_l (B, H, W): labelled; image_u (B, 1, H, W): unlabelled, or None
    during the first epochs, when the supervised loss leads alone. mix: whether to use CutMix.
    """
    def forward(image):
        with run.autocast():
            return network_a(image), network_b(image)

    logits_a, logits_b = forward(image_l)
    loss_sup = (emseg.soft_dice_loss(logits_a, label_l, squared=True)
                + emseg.soft_dice_loss(logits_b, label_l, squared=True))
    if image_u is None:
        return loss_sup, torch.zeros_like(loss_sup)
    with torch.set_grad_enabled(not mix):       # with CutMix the unmixed images only teach
        unlabelled_a, unlabelled_b = forward(image_u)
    pseudo_a = [emseg.class_ids(emseg.probabilities(x)) for x in (logits_a, unlabelled_a)]
    pseudo_b = [emseg.class_ids(emseg.probabilities(x)) for x in (logits_b, unlabelled_b)]
    if not mix:
        return loss_sup, cps_loss(torch.cat([logits_a, unlabelled_a]),
                                  torch.cat([logits_b, unlabelled_b]),
                                  torch.cat(pseudo_a), torch.cat(pseudo_b))
    box = emseg.cutmix_boxes(len(image_l), image_l.shape[-2:], image_l.device)
    mixed_a, mixed_b = forward(cutmix(image_l, image_u, box))
    return loss_sup, cps_loss(mixed_a, mixed_b, cutmix(*pseudo_a, box[:, 0]),
                              cutmix(*pseudo_b, box[:, 0]))


def parse_args(argv=None):
    parser = emseg.Parser(__file__, __doc__)
    emseg.add_common_args(parser, MODELS, sources={
        "model": "section 2.3; widths of table 1", "epochs": "authors' code",
        "steps_per_epoch": "default: 64 crops of each annotated slice in an epoch, authors' code",
        "batch_size": "authors' code", "lr": "authors' code", "downsample": "section 2.2",
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
    method("--clip", type=emseg.positive(float), default=1.0, metavar="C",
           help="largest norm of a network's gradient (authors' code)")
    method("--foreground", type=float, default=0.99, metavar="P",
           help="share of labelled crops that must hold foreground (section 2.2)")
    parser.set_defaults(model="resunet", epochs=500, batch_size=20, patch_size=[512, 512],
                        downsample=4, lr=1e-3)
    demo = dict(model="unet", width=12, epochs=10, steps_per_epoch=20, batch_size=8,
                patch_size=[128, 128], downsample=2, label_slices="n=7", lr=5e-3,
                cps_warmup=[3.0, 8.0], label_map="3=1,2=2,*=0",
                classes=["background", "mitochondrion", "nucleus"])
    args = emseg.parse(parser, argv, demo)
    if not 0 <= args.foreground <= 1:
        parser.error(f"--foreground {args.foreground} is not between 0 and 1")
    start, end = args.cps_warmup
    if not 0 <= start < end:
        parser.error(f"--cps-warmup {start:g} {end:g}: START must be at least 0 and below END")
    if args.method == "cps" and start >= args.epochs:
        parser.error(f"--cps-warmup starts at epoch {start:g}, but there are {args.epochs} epochs; "
                     f"start earlier, or give --method supervised")
    wanted = 1 if args.method == "supervised" else 4 if args.cutmix else 2
    if args.batch_size % wanted:
        parser.error(f"--batch-size {args.batch_size}: half of the crops are labelled and CutMix "
                     f"mixes in pairs; give a multiple of {wanted}")
    return args


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
    networks = [run.prepare(MODELS[args.model](1, data.out_channels, args.width))
                for _ in ("ab" if cps and run.training else "a")]
    modules = dict(zip(("network_a", "network_b"), networks))

    def predict(image):
        """uint8 slices (B, H, W) -> probabilities (B, C, H, W) of the first network."""
        return run.predict_slices(networks[0], image)

    # optimiser
    optimizers = [torch.optim.Adam(network.parameters(), lr=args.lr) for network in networks]
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
        run.begin(steps_per_epoch, **modules)
        batches_l, batches_u = run.batches(labelled, count), run.batches(unlabelled, count)
    for epoch in run.epochs():
        for network in networks:
            network.train()
        for step in run.steps(epoch):
            lr = learning_rate(step, run.total, args.lr)
            image_l, label_l = emseg.augment(*next(batches_l), data.normalization, **AUGMENTATION)
            if cps:
                weight = cps_weight(step / steps_per_epoch, args.cps_warmup, args.cps_weight)
                image_u = next(batches_u)
                if weight:
                    image_u, _ = emseg.augment(image_u, None, data.normalization, **AUGMENTATION)
                loss_sup, loss_cps = cps_losses(run, *networks, image_l, label_l,
                                                image_u if weight else None, args.cutmix)
                loss = loss_sup + weight * loss_cps                                     # eq. 3
                terms = {"loss_sup": loss_sup, "loss_cps": loss_cps}
            else:
                loss, terms = supervised_loss(run, networks[0], image_l, label_l), {}
            scaler.scale(loss).backward()
            for network, optimizer in zip(networks, optimizers):
                emseg.average_gradients(network)
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(network.parameters(), args.clip)
                optimizer.param_groups[0]["lr"] = lr
                scaler.step(optimizer)
                optimizer.zero_grad()
            scaler.update()
            run.log(lr=lr, loss=loss, **terms)
        run.end_epoch(run.validate(predict))

    # predict
    run.use_best(network_a=networks[0])
    predictions = [run.predict(predict, item) for item in data.test]

    # evaluate
    run.report(predictions)


if __name__ == "__main__":
    main(parse_args())
