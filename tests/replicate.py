"""The claims of the five papers, tried on public volumes: python tests/replicate.py --list

    EMSEG_DATA=DATA python tests/replicate.py cps --minutes 60     run what is not in results.csv
    python tests/replicate.py --table                              the README's table of results

Every finished run adds a row to tests/results.csv, or one for each stage of its method. A run that
was interrupted goes on the next time. Budgets: "cpu" are small networks, most of them up to half an
hour on one thread in float32, or many of them side by side on one GPU (--device cuda --budget cpu
--jobs 16, after nvidia-cuda-mps-control -d, by which processes share a GPU); "gpu" are the papers'
settings, as far as some 8 minutes of an H100 carry.
"""

import argparse
import csv
import fnmatch
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tests/results.csv"
COLUMNS = ("experiment variant seed budget score scores steps minutes gib hardware precision torch "
           "commit").split()
KEPT = "best.pt", "metrics.json", "log.csv"

# command: script and flags; variants: {name: more flags}; cpu, gpu: what {name} in these stands for
# on a budget, and about the minutes of the longest variant; score: of metrics.json; paper: the
# paper's number of a variant.
Experiment = namedtuple("Experiment", "source claim command variants cpu gpu score seeds paper")

LUCCHI = ("--volume {data}/lucchi/Train_In@0:110 --label {data}/lucchi/Train_Out@0:110 "
          "--test-volume {data}/lucchi/Train_In@120:165 "
          "--test-label {data}/lucchi/Train_Out@120:165 --normalize equalize "
          "--classes background mitochondrion ")
METHODS = {"supervised": "--method supervised --batch-size {labelled}",     # as many labelled crops
           "cps": "--no-cutmix --batch-size {batch} --cps-warmup 2 5",
           "cps + cutmix": "--batch-size {batch} --cps-warmup 2 5"}
ONE_SLICE = {name: f"--label-slices n=1 {flags}" for name, flags in METHODS.items()}
CPS = ("train_cps.py --model resunet --schedule linear --clip 1 --epochs 10 "
       "--steps-per-epoch {steps} {flags} ")
CPS_LUCCHI = CPS + LUCCHI + "--unlabeled-volume {data}/lucchi/Train_In@110:165 "
CPS_CPU = dict(flags="--width 16 --downsample 4 --patch-size 128 128 --lr 3e-3 --workers 0",
               steps=100, batch=8, labelled=4, minutes=28)
CPS_GPU = dict(flags="--width 64 --downsample 1 --patch-size 512 512 --lr 1e-3", steps=180,
               batch=20, labelled=10, minutes=8)
CPS_SOURCE = "Pagano 2023, table 4: nucleoli of volume 3 from 7 slices, ResUNet, Dice"

VNC_CLASSES = ("--label-map 0=1,32=1,64=1,96=1,128=1,159=2,191=3,223=4,255=0 "
               "--classes intracellular membrane glia mitochondrion synapse ")
VNC_TEST = "--test-volume {data}/vnc/raw@15:20 --test-label {data}/vnc/labels@15:20 "
SETTINGS_2D3D = ("--l2-2d 0 --l2-3d 0 --l2-p 0 --stop-miou 0 --decay-steps 500 --epochs 8 "
                 "--steps-per-epoch {steps} {flags} ")
VNC_2D3D = ("train_2d3d.py --volume {data}/vnc/raw@0:12 --label {data}/vnc/labels@0:12 "
            "--val-volume {data}/vnc/raw@12:15 --val-label {data}/vnc/labels@12:15 " + VNC_TEST +
            "{classes} --voxel-size 50 4.6 4.6 " + SETTINGS_2D3D)
VNC_SMALL = "--downsample 4 --width 8 --spacing 2 32 32 --elastic 3 --lr 2e-3 "
# Windows of about as many voxels a step for every network. A 2D network sees its window only or its
# surroundings, too: padded in windows twice as wide, or the valid U-Net, 572 pixels for 388.
CPU_2D3D = dict(
    classes="--label-map 191=1,*=0 --classes background mitochondrion --organelles 1",
    flags=VNC_SMALL + "--weight-terms 0.1 0.9 0.1 --brightness 0.03 --contrast 0.1", steps=125,
    window="--patch-size 5 68 68 --batch-size 2", minutes=15,
    alone="--model unet5 --patch-size 64 64 --batch-size 10",
    around="--model unet5 --patch-size 128 128 --batch-size 3")
GPU_2D3D = dict(
    classes=VNC_CLASSES + "--organelles 3 4", steps=250,
    flags="--downsample 2 --spacing 2 100 100 --elastic 10 --lr 1e-3 --weight-terms 0.3 1 1",
    window="--patch-size 5 300 300 --batch-size 5", minutes=8,
    alone="--model unet5 --patch-size 304 304 --batch-size 24",
    around="--model unet --patch-size 572 572 --batch-size 15")

EXPERIMENTS = {
    "cps": Experiment(
        CPS_SOURCE, "unlabelled slices and CutMix help where few slices are labelled",
        CPS_LUCCHI,
        {**{f"{n} labelled, {name}": f"--label-slices n={n} {flags}"
            for n in (1, 2, 4, 7) for name, flags in METHODS.items()},
         "110 labelled, supervised (ceiling)": METHODS["supervised"]},
        CPS_CPU, CPS_GPU, "iou", (0, 1, 2),
        {"7 labelled, supervised": "Dice 0.705", "7 labelled, cps": "Dice 0.671",
         "7 labelled, cps + cutmix": "Dice 0.776"}),
    "cps-warmup": Experiment(
        CPS_SOURCE, "lambda grows once the networks have learnt something from the labels",
        CPS_LUCCHI,
        {f"{name}, warm-up {warmup}": f"{ONE_SLICE[name]} --cps-warmup {warmup}"
         for warmup in ("0.5 2", "2 5", "4 8") for name in ("cps", "cps + cutmix")},
        CPS_CPU, CPS_GPU, "iou", (0,), {}),
    "cps-long": Experiment(
        CPS_SOURCE, "CutMix is ahead of plain CPS in longer trainings",
        CPS_LUCCHI, ONE_SLICE,
        {**CPS_CPU, "steps": 200, "minutes": 90}, {**CPS_GPU, "steps": 360, "minutes": 16},
        "iou", (0,), {}),
    "cps-rare": Experiment(
        CPS_SOURCE, "rare structures (postsynaptic densities) gain most from unlabelled slices",
        CPS + "--volume {data}/lucchi/Train_In@0:12 --label {data}/lucchi_organelles/PSD@0:12 "
        "--label-map 128:256=1,*=0 --classes background PSD "
        "--test-volume {data}/lucchi/Train_In@14:20 "
        "--test-label {data}/lucchi_organelles/PSD@14:20 --normalize equalize "
        "--unlabeled-volume {data}/lucchi/Train_In@20:165 --voxel-size 5 5 5",
        {**{f"2 labelled, {name}": f"--label-slices n=2 {METHODS[name]}" for name in METHODS},
         "12 labelled, supervised (ceiling)": METHODS["supervised"]},
        {**CPS_CPU, "flags": "--width 16 --downsample 2 --patch-size 96 96 --lr 3e-3", "steps": 60,
         "minutes": 13}, CPS_GPU, "iou", (0, 1, 2), {}),
    "next-slice": Experiment(
        "ours, of no paper", "the slice on which both CPS networks agree least is the one to label "
        "next", "train_cps.py --quick --no-cutmix --steps-per-epoch {steps} " + LUCCHI,
        {"1 labelled": "--label-slices 27",
         "2 labelled, the second by least agreement": "--label-slices 27,{doubtful}",
         "2 labelled, evenly spaced": "--label-slices 27,82",
         "2 labelled, the second at random": "--label-slices 27,{random}"},
        dict(steps=30, minutes=6), dict(steps=100, minutes=2), "iou", (0, 1, 2), {}),
    "sparse": Experiment(
        "ISBI 2022 (sparse slices), table 2: EPFL, 32 slices, IoU",
        "deformed crops, then stage 2 (mpp), then stage 3 (scm) each improve a sparse annotation",
        "train_sparse.py " + LUCCHI + "{flags}",
        {"every 5th": "--label-slices 0:110:5", "every slice (ceiling)": "--no-mpp --no-scm",
         "every 5th, not deformed": "--label-slices 0:110:5 --deform none --no-mpp --no-scm",
         "every 10th": "--label-slices 0:110:10", "every 20th": "--label-slices 0:110:20"},
        dict(flags="--downsample 4 --width 16 --patch-size 128 128 --batch-size 4 --lr 3e-3 "
             "--epochs 10 --scm-epochs 6 --steps-per-epoch 100 --no-tta", minutes=22),
        dict(flags="--width 64 --patch-size 512 512 --batch-size 16 --epochs 12 --scm-epochs 8 "
             "--steps-per-epoch 120", minutes=8),
        "iou", (0, 1, 2),
        {"every 5th: coarse": "0.869", "every 5th: mpp": "0.880", "every 5th: scm": "0.890",
         "every 5th, not deformed": "0.826"}),
    "partial": Experiment(
        "Francis 2020, table 1: beta cells, 12 full and 12 partial, Dice",
        "volumes in which organelles were not told apart improve all classes",
        "train_partial.py --volume {data}/vnc/raw@0:3 --label {data}/vnc/labels@0:3 "
        + VNC_CLASSES + VNC_TEST + "--epochs 8 {flags}",
        {f"{name}, {kind} steps": f"--steps-per-epoch {{{kind}}}{more}"
         for kind in ("few", "many") for name, more in {
             "baseline": "",
             "mixed": " --partial {data}/vnc/raw@3:14 {data}/vnc/labels@3:14 3=0,4=0"}.items()},
        # as many passes over the full labels: mixed with `many`, baseline with `few` (14 / 3 times)
        dict(flags="--model unet --width 16 --downsample 2 --patch-size 128 128 --batch-size 4 "
             "--lr 5e-3", few=75, many=350, minutes=14),
        dict(flags="--model unet5 --patch-size 512 512 --batch-size 8 --lr 1e-3", few=160, many=747,
             minutes=8),
        "dice", (0, 1, 2), {"baseline, few steps": "0.639", "mixed, many steps": "0.706"}),
    "seget": Experiment(
        "Zhang 2018, table 1: immunological synapse, five structures, mIoU",
        "dilated context beats other networks; weights and copies help rare structures",
        "train_seget.py --volume {data}/lucchi/Train_In@0:20 "
        "--label vesicles={data}/lucchi_organelles/vesicles PSD={data}/lucchi_organelles/PSD "
        "mitochondrion={data}/lucchi_organelles/mitochondrion --label-map 128:256=1,*=0 "
        "--voxel-size 5 5 5 --augment {flags}",
        {"seget": "--model seget --weight-cap 0 --copies 0", "unet": "--model unet",
         "seget, weights and copies": "--model seget --weight-cap 1000 --copies 2",
         **{name: f"--model {name}" for name in ("deeplabv3plus", "fcn8s", "segnet")}},
        dict(flags="--width 8 --downsample 2 --patch-size 256 256 --batch-size 2 --epochs 12 "
             "--steps-per-epoch 30 --lr 4e-3 --decay 4e-3", minutes=15),
        dict(flags="--patch-size 512 512 --batch-size 12 --epochs 16 --steps-per-epoch 40 "
             "--lr 1e-3 --decay 1e-5", minutes=8),
        "miou", (0, 1, 2), {"seget": "0.874", "unet": "0.777", "fcn8s": "0.771", "segnet": "0.763",
                            "deeplabv3plus": "0.794"}),
    "2d3d": Experiment(
        "Guay 2021, table 1: platelets, test MIoU(org)",
        "neighbouring slices and the 3D pyramid help a 2D network",
        VNC_2D3D,
        {**{model: f"--model {model} {{window}}"
            for model in ("2d3d", "2d3d-no-3x3x3", "2d3d-no-pyramid", "2d3d-no-3d")},
         "2D U-Net, sees its window only": "{alone}",
         "2D U-Net, sees the surroundings": "{around}"},
        CPU_2D3D, GPU_2D3D, "miou_org", (0, 1, 2),
        {"2d3d": "0.417", "2d3d-no-3x3x3": "0.358", "2d3d-no-pyramid": "0.376",
         "2D U-Net, sees the surroundings": "0.334"}),
    "2d3d-long": Experiment(
        "Guay 2021, table 1: platelets, test MIoU(org)",
        "what neighbouring slices bring needs a longer training",
        VNC_2D3D, {model: f"--model {model} {{window}}" for model in ("2d3d", "2d3d-no-3d")},
        {**CPU_2D3D, "steps": 250, "minutes": 30}, {**GPU_2D3D, "steps": 750, "minutes": 24},
        "miou_org", (0, 1), {}),
    "2d3d-thin": Experiment(
        "Guay 2021, table 1: platelets, test MIoU(org)",
        "neighbouring slices of 5 nm help a 2D network, more than slices of other places",
        "train_2d3d.py " + LUCCHI + "--val-volume {data}/lucchi/Train_In@110:120 "
        "--val-label {data}/lucchi/Train_Out@110:120 --organelles 1 --voxel-size 5 5 5 "
        + SETTINGS_2D3D + "--weight-terms 1 0 0 ",
        {**{f"{model}{name}": f"--model {model} {windows}" for model in ("2d3d", "2d3d-no-3d")
            for name, windows in (("", "{window}"), (", 4 places of 3 slices", "{four}"))},
         "2d3d-no-3d, each slice from another place": "--model 2d3d-no-3d {places}"},
        {**CPU_2D3D, "window": "--patch-size 12 68 68 --batch-size 1", "minutes": 28,
         "four": "--patch-size 3 68 68 --batch-size 4",
         "places": "--patch-size 1 68 68 --batch-size 12"},
        {**GPU_2D3D, "window": "--patch-size 12 300 300 --batch-size 2",
         "four": "--patch-size 3 300 300 --batch-size 8",
         "places": "--patch-size 1 300 300 --batch-size 24"}, "miou_org", (0, 1, 2), {}),
    "ensemble": Experiment(
        "Guay 2021, table 1: platelets, test MIoU(org)",
        "a few of the best instances, averaged, beat the best one",
        "train_2d3d.py ",
        {"four instances": VNC_2D3D.partition(" ")[2] + "{alone} --instances 4",
         **{f"four instances, top {k}": f"--ensemble {{instances}} --top-k {k} {VNC_TEST}"
            for k in (2, 3)}},
        {**CPU_2D3D, "minutes": 12},
        GPU_2D3D, "miou_org", (0, 10, 20),
        {"four instances: single best": "0.417", "four instances: ensemble": "0.446"}),
}


class Job(namedtuple("Job", "name variant seed budget device folder")):
    """A command: an experiment's variant with a seed on a budget; folder: of all runs."""

    def out_dir(self):
        name = f"{self.variant}-{self.budget}-seed{self.seed}"
        return Path(self.folder, self.name, re.sub(r"[^\w.]+", "-", name))

    def command(self):
        """The command line, a list that begins with the script's name."""
        experiment = EXPERIMENTS[self.name]
        text = f"{experiment.command} {experiment.variants[self.variant]}"
        names = {"data": os.environ.get("EMSEG_DATA"), **getattr(experiment, self.budget),
                 "random": random.Random(self.seed).randrange(110)}
        if "{doubtful}" in text:
            names["doubtful"] = doubtful_slice(self.first().out_dir())
        if "{instances}" in text:
            names["instances"] = " ".join(map(str, sorted(self.first().out_dir().glob("seed*"))))
        else:
            text += " --seed " + str(self.seed)
        return [*text.format(**names).split(), "--device", self.device,
                "--out-dir", str(self.out_dir())]

    def first(self):
        """The job whose networks this one needs, if any: the first variant."""
        first, *_ = variants = EXPERIMENTS[self.name].variants
        needs = re.search("{doubtful}|{instances}", variants[self.variant])
        return self._replace(variant=first) if needs else None

    def is_done(self):
        wanted = self.name, self.variant, str(self.seed), self.budget, self.device == "cuda"
        return any(wanted == (row["experiment"], variant_of(row), row["seed"], row["budget"],
                              row["hardware"].startswith("GPU")) for row in read_rows())


def doubtful_slice(folder):
    """The slice of the training volume on which both networks of a train_cps.py run agree least:
    the lowest Dice of their predictions; slices without any foreground agree."""
    sys.path.insert(0, str(ROOT))
    import emseg
    import torch
    import train_cps
    checkpoint = emseg.load_checkpoint(folder)
    args, networks = argparse.Namespace(**checkpoint["args"]), []
    for key in ("network", "network_b"):
        networks.append(train_cps.make_network(args).eval())
        emseg.load_weights(networks[-1], checkpoint, key, folder)
    image = emseg.Grey(emseg.open_volume(args.volume[0]), args.normalize)
    image, dice = emseg.shrink(image, args, image=True), []
    for z in range(len(image)):
        with torch.inference_mode():
            page = emseg.normalize(torch.from_numpy(image[z : z + 1]), checkpoint["normalization"])
            a, b = [emseg.class_ids(emseg.predict_slices(network, page)) for network in networks]
        dice.append(float((2 * (a * b).sum() + 1e-9) / (a.sum() + b.sum() + 1e-9)))
    return dice.index(min(dice))


def read_rows():
    with open(RESULTS, newline="") as file:
        return list(csv.DictReader(file))


def variant_of(row):
    """The variant of a row without its stage: "every 5th" of "every 5th: mpp"."""
    return row["variant"].rpartition(": ")[0] or row["variant"]


def rows_of(job):
    """The rows of a finished run, one for each of its stages."""
    metrics, config = [json.loads((job.out_dir() / f"{name}.json").read_text())
                       for name in ("metrics", "config")]
    logs = [list(csv.DictReader(file.open())) for file in job.out_dir().rglob("log.csv")]
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    common = dict(
        experiment=job.name, seed=job.seed, budget=job.budget,
        steps=sum(int(log[-1]["step"]) for log in logs), gib=metrics["peak_memory_gib"],
        minutes=round((sum(float(log[-1]["seconds"]) for log in logs)
                       + (metrics["predict_seconds"] or 0)) / 60, 1),
        hardware=f"GPU {config['device']}" if job.device == "cuda" else f"CPU {cpu[1]}, 1 thread",
        precision=config["precision"], torch=config["versions"]["torch"],
        commit=(config["git"] or "")[:9])
    stages = metrics.get("stages", {})
    if "ensemble" in metrics and not job.first():
        best = max(metrics["instances"].values(), key=lambda each: each["val_miou"])
        stages = {"single best": best["mean"], "ensemble": metrics["mean"]}
    elif len(stages) < 2:
        stages = {"": metrics.get("average", metrics["mean"])}
    rows = []
    for stage, block in stages.items():
        classes = metrics.get("structures") or block["per_class"]
        scores = [" ".join([name, *(f"{own[key]:.4f}" for key in ("dice", "iou", "miou")
                                    if own.get(key) is not None)]) for name, own in classes.items()]
        rows.append({**common, "variant": f"{job.variant}: {stage}" if stage else job.variant,
                     "score": round(block[EXPERIMENTS[job.name].score], 4),
                     "scores": "; ".join(scores)})
    return rows


def start(job):
    """Start or resume a job's command; what it prints goes into a file beside its folder."""
    folder, environment = job.out_dir(), {**os.environ}
    if job.device == "cpu":
        environment["OMP_NUM_THREADS"] = "1"
    folder.parent.mkdir(parents=True, exist_ok=True)
    script, *flags = job.command()
    mode = "--resume" if (folder / "config.json").exists() else "--overwrite"
    print(f"{job.name}, {job.variant}, seed {job.seed}: {mode}", flush=True)
    with folder.with_name(f"{folder.name}.txt").open("a") as log:
        # in a session of its own, so that Ctrl-C reaches it once, from here
        return subprocess.Popen([sys.executable, str(ROOT / script), *flags, mode], stdout=log,
                                stderr=log, env=environment, start_new_session=True)


def finish(job, status):
    """Note the result of a command that has ended."""
    folder = job.out_dir()
    log = folder.with_name(f"{folder.name}.txt")
    if status:
        last = log.read_text().strip().splitlines()[-1:]
        print(f"{job.name}, {job.variant}, seed {job.seed}: status {status}", *last, flush=True)
        return
    rows = rows_of(job)
    with open(RESULTS, "a", newline="") as file:        # one write, so several may append
        csv.DictWriter(file, COLUMNS, lineterminator="\n").writerows(rows)
    for row in rows:
        print(f"{job.name}, {row['variant']}, seed {job.seed}: {row['score']}", flush=True)
    log.unlink()
    for file in [*folder.rglob("*")]:
        if file.is_file() and file.name not in KEPT:
            file.unlink()


def run(jobs, args):
    """Run jobs side by side until all are done or the time is over."""
    end = time.monotonic() + 60 * args.minutes
    waiting, running, stopping = list(jobs), {}, False
    while running or (waiting and not stopping):
        try:
            if time.monotonic() > end and not stopping:
                raise KeyboardInterrupt
            ready = [job for job in waiting if not job.first() or job.first().is_done()]
            if not (ready or running):                  # what they need has failed
                break
            if ready and len(running) < args.jobs and not stopping:
                waiting.remove(ready[0])
                if not ready[0].is_done():              # by another process meanwhile
                    running[ready[0]] = start(ready[0])
            for job in [job for job, process in running.items() if process.poll() is not None]:
                finish(job, running.pop(job).returncode)
            time.sleep(0.2)
        except KeyboardInterrupt:                       # each command saves its state and ends
            stopping = True
            for process in running.values():
                process.send_signal(signal.SIGINT)
    print(f"{len(waiting)} not begun")


def list_experiments(names):
    rows = read_rows()
    for name in names:
        each = EXPERIMENTS[name]
        done = {(variant_of(row), row["seed"]) for row in rows if row["experiment"] == name}
        print(f"{name}: {each.claim}\n    {each.source}\n    minutes a run: {each.cpu['minutes']} "
              f"on one CPU thread, {each.gpu['minutes']} on a GPU; {len(done)} of "
              f"{len(each.seeds) * len(each.variants)} runs done", *each.variants, sep="\n      ")


def table():
    """The README's table: mean and spread over seeds of each variant, stage, budget and machine;
    what has one seed only stays in results.csv."""
    lines = ["| experiment | variant | score | ours (seeds) | paper | steps | minutes | hardware |",
             "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    rows = read_rows()
    for name, experiment in EXPERIMENTS.items():
        own = [row for row in rows if row["experiment"] == name]
        if not own:
            lines.append(f"| {name} | all | {experiment.score} | not run | | | | |")
        for variant in experiment.variants if own else []:
            groups = {}
            for row in [row for row in own if variant_of(row) == variant]:
                hardware = f"{row['hardware']}, {row['precision']}"
                key = row["variant"], row["budget"], hardware
                groups.setdefault(key, []).append(row)
            for (label, _, hardware), group in groups.items():
                if len(group) < 2:
                    continue
                scores = [float(row["score"]) for row in group]
                minutes = statistics.mean(float(row["minutes"]) for row in group)
                steps = " to ".join(sorted({row["steps"] for row in group}, key=int))
                lines.append(f"| {name} | {label} | {experiment.score} | "
                             f"{statistics.mean(scores):.3f} ± {statistics.stdev(scores):.3f} "
                             f"({len(scores)}) | {experiment.paper.get(label, '')} | {steps} | "
                             f"{minutes:.1f} | {hardware} |")
            if not groups:
                lines.append(f"| {name} | {variant} | {experiment.score} | not run | | | | |")
    return "\n".join(lines)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("names", nargs="*", metavar="NAME", help=f"experiments: {', '.join(EXPERIMENTS)}")
    flag("--list", action="store_true", help="show the experiments")
    flag("--table", action="store_true", help="print the README's table of results")
    flag("--minutes", type=float, default=float("inf"), help="stop then; to go on the next time")
    flag("--device", choices=("cpu", "cuda"), default="cpu")
    flag("--budget", choices=("cpu", "gpu"), help="default: that of the device")
    flag("--jobs", type=int, help="commands side by side; default: 2 on a CPU, 1 on a GPU")
    flag("--seeds", type=int, nargs="+", help="default: the experiment's")
    flag("--variants", nargs="+", default=["*"], metavar="PATTERN", help="such as '1 labelled*'")
    flag("--folder", default=str(ROOT / "runs/replicate"), help="where the runs go")
    args = parser.parse_args(argv)
    args.jobs = args.jobs or {"cpu": 2, "cuda": 1}[args.device]
    args.folder = str(Path(args.folder).resolve())
    if not {*args.names} <= {*EXPERIMENTS}:
        parser.error(f"the experiments are {', '.join(EXPERIMENTS)}")
    if not (args.list or args.table) and not (args.names and os.environ.get("EMSEG_DATA")):
        parser.error("name experiments, and set EMSEG_DATA to the folder of lucchi and vnc")
    return args


def main(args):
    if args.table:
        print(table())
    elif args.list:
        list_experiments(args.names or EXPERIMENTS)
    else:
        budget = args.budget or {"cpu": "cpu", "cuda": "gpu"}[args.device]
        run([job for name in args.names for seed in args.seeds or EXPERIMENTS[name].seeds
             for variant in EXPERIMENTS[name].variants
             if any(fnmatch.fnmatch(variant, pattern) for pattern in args.variants)
             and not (job := Job(name, variant, seed, budget, args.device, args.folder)).is_done()],
            args)


if __name__ == "__main__":
    for number in signal.SIGINT, signal.SIGTERM:        # also where a shell ignores the first
        signal.signal(number, signal.default_int_handler)
    main(parse_args())
