"""Speed of every network on this machine: python tests/benchmark.py --width 16

Prints, for each network, the time of a training step, training patches per second, inference voxels
per second, peak memory (on a CPU so far), the share of the machine's own matrix-product rate that
training reaches, and the share of a step in which a GPU has nothing to do; then what tiles cost in
the prediction of large slices; then whole steps of train_cps.py.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import emseg                            # before torch, see there
import numpy as np
import tifffile
import torch
import train_2d3d
import train_seget
from conftest import InMemory

OF_2D3D = ("2d3d", "2d3d-no-3x3x3", "2d3d-no-pyramid", "unet3d-thin", "unet3d-thick")
NETWORKS = {**train_seget.MODELS, **emseg.NETWORKS, **emseg.NETWORKS_3D,
            **{name: train_2d3d.MODELS[name] for name in OF_2D3D}}
BATCH_3D = 2, 16, 128, 128              # patches of 3D networks, whatever the command line says


def median_seconds(function, device, runs=7, warmup=2):
    """Median wall time of a call, the device's queue included."""
    times = []
    for i in range(warmup + runs):
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[warmup:])


def matrix_rate(device, dtype):
    """Floating-point operations per second of a large matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / median_seconds(lambda: a @ a, device)


class Step:
    """One supervised training step of a network, and a prediction."""

    def __init__(self, name, args, device, dtype):
        self.device, self.dtype = device, dtype
        self.network = emseg.channels_last(NETWORKS[name](1, 1, args.width).to(device))
        flat = self.network.dims == 2
        *batch, h, w = (args.batch_size, args.patch, args.patch) if flat else BATCH_3D
        self.batch = (*batch, *(emseg.network_side(self.network, side) + 2 * self.network.margin
                                for side in (h, w)))
        self.optimizer = torch.optim.Adam(self.network.parameters())
        batch_size, *patch = self.batch
        image, label = emseg.phantom((16, patch[-2] + 32, patch[-1] + 32))
        volume, truth = InMemory(image), InMemory((label == 3).astype(np.uint8))
        patches = emseg.Patches([volume], [truth], patch, foreground=0.99)
        cuda = device.type == "cuda"                    # as Run.batches and --workers
        self.batches = iter(torch.utils.data.DataLoader(
            patches, num_workers=4 * cuda, pin_memory=cuda, batch_sampler=[
                range(i, i + batch_size) for i in range(0, 10**4 * batch_size, batch_size)]))
        self.load()

    def load(self):
        crops = [crop.to(self.device, non_blocking=True) for crop in next(self.batches)]
        self.image, self.label = emseg.augment(*crops, {"mean": 128, "std": 40}, flip=True,
                                               rot90=True)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def forward_backward(self):
        with self.autocast():
            logits = self.network(self.image)
        label = emseg.crop_like(self.label, logits)
        emseg.soft_dice_loss(logits, label, squared=True).backward()

    def whole(self):
        self.load()
        self.forward_backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def infer(self):
        self.network.eval()
        with torch.inference_mode(), self.autocast():
            emseg.predict_slices(self.network, self.image)
        self.network.train()


def floating_point_operations(step):
    """Of one forward and backward pass, counted by PyTorch."""
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        step.forward_backward()
    return counter.get_total_flops()


def idle_share(step, device, seconds, runs=5):
    """The share of a step, of so many seconds, in which the GPU runs no kernel; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(runs):
            step.whole()
        torch.cuda.synchronize(device)
    busy = sum(event.self_device_time_total for event in profile.key_averages()
               if event.device_type == torch.autograd.DeviceType.CUDA
               and not event.is_user_annotation) / 1e6 / runs
    return max(0.0, 1 - busy / seconds)


def networks(args, device, dtype):
    rate = matrix_rate(device, dtype)
    print(f"{device}, {str(dtype)[6:]}, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}; matrix product {rate / 1e9:.0f} GFLOP/s; width "
          f"{args.width or 'of the paper'}")
    print(f"{'network':18}{'batch':>20}{'parameters':>12}{'ms/step':>9}{'patches/s':>11}"
          f"{'Mvoxel/s':>10}{'GiB':>7}{'of matrix rate':>16}{'GPU idle':>10}")
    for name in args.networks or NETWORKS:
        step = None                                     # frees the memory of the one before
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        step = Step(name, args, device, dtype)
        seconds = median_seconds(step.whole, device)
        inference = median_seconds(step.infer, device)
        share = floating_point_operations(step) / seconds / rate
        print(f"{name:18}{emseg.format_shape(step.batch):>20}"
              f"{emseg.count_parameters(step.network):12,}{1000 * seconds:9.0f}"
              f"{step.batch[0] / seconds:11.1f}"
              f"{step.image.numel() / inference / 1e6:10.2f}"
              f"{emseg.peak_memory_gib(device) or 0:7.2f}{share:16.0%}"
              f"{idle_share(step, device, seconds):10.0%}")


def tiles(args, device, dtype):
    """Large slices: in tiles, as they are predicted, against the whole slice at once."""
    network = emseg.NETWORKS[args.model](1, 1, args.width).to(device).eval()
    emseg.channels_last(network)
    print(f"\none slice of {args.model}, in tiles and whole")
    for side in args.sides:
        image, tile = torch.randn(1, 1, side, side, device=device), emseg.MAX_TILE

        def predict(largest):
            emseg.MAX_TILE = largest
            with torch.inference_mode(), torch.autocast(device.type, dtype,
                                                        enabled=dtype != torch.float32):
                return emseg.predict_slices(network, image)
        whole, parts = predict(side), predict(tile)
        computed = (len(emseg.tiles(side, emseg.tile_side(side, network.stride), network.stride))
                    * emseg.tile_side(side, network.stride) / side) ** 2
        seconds = [median_seconds(lambda: predict(n), device, 3, 1) for n in (tile, side)]
        print(f"{side} x {side}: {computed:.2f} times the pixels; {seconds[0]:.2f} s, whole "
              f"{seconds[1]:.2f} s; largest difference {(whole - parts).abs().max():.1e}")
        emseg.MAX_TILE = tile


def script(device):
    """Whole steps of train_cps.py from files, its reading of crops and progress included, and its
    prediction: as the paper has it, on a CPU with --quick."""
    image, label = emseg.phantom((16, 256, 256))
    flags, steps, copies = ([], 50, (4, 9, 9)) if device.type == "cuda" else (
        ["--quick"], 20, (1, 4, 4))
    with tempfile.TemporaryDirectory() as folder:
        for name, array in ("volume", image), ("label", (label == 3).astype(np.uint8)):
            tifffile.imwrite(f"{folder}/{name}.tif", np.tile(array, copies))
        subprocess.run([sys.executable, ROOT / "train_cps.py", *flags, "--epochs", "3",
                        "--steps-per-epoch", str(steps), "--cps-warmup", "0", "1",
                        "--volume", f"{folder}/volume.tif", "--label", f"{folder}/label.tif",
                        "--label-slices", "n=7", "--device", str(device), "--out-dir",
                        f"{folder}/run"], check=True, stdout=subprocess.DEVNULL,
                       env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
        with open(f"{folder}/run/log.csv") as file:
            seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
        metrics = json.loads(Path(folder, "run/metrics.json").read_text())
    print(f"\ntrain_cps.py {' '.join(flags) or 'as in the paper'}: "
          f"{1000 * (seconds[2] - seconds[0]) / steps / 2:.0f} ms a step, prediction "
          f"{metrics['predict_voxels_per_second'] / 1e6:.1f} Mvoxel/s")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="unet", choices=sorted(emseg.NETWORKS),
                        help="the network that predicts large slices")
    parser.add_argument("--networks", nargs="+", choices=sorted(NETWORKS), metavar="NAME",
                        help="default: all")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--patch", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sides", type=int, nargs="*", default=[1024, 2048, 4096],
                        help="of slices that are predicted in tiles and whole")
    parser.add_argument("--device")
    args = parser.parse_args()
    device = emseg.choose_device(args.device)
    dtype = emseg.choose_precision(device, None)
    torch.backends.cudnn.benchmark = True               # as Run
    if device.type == "cpu":
        emseg.keep_freed_memory()
    networks(args, device, dtype)
    tiles(args, device, dtype)
    script(device)


if __name__ == "__main__":
    main()
