"""What only a GPU shows, skipped elsewhere: every network against the CPU, every script's demo,
bf16, fp16, torch.compile, interruption and resume. With pytest-xdist: pytest -n 12."""

import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import emseg
import train_2d3d
import train_seget

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
ROOT = Path(emseg.__file__).resolve().parent
NETWORKS = {**train_2d3d.MODELS, **train_seget.MODELS, **emseg.NETWORKS, **emseg.NETWORKS_3D,
            "unet-valid": train_2d3d.MODELS["unet"]}
SCRIPTS = {"train_cps": 0.7, "train_partial": 0.4, "train_seget": 0.5, "train_2d3d": 0.25,
           "train_sparse": 0.6}                 # and the mean Dice that its demo surpasses
SHORT = ("--epochs", "2", "--steps-per-epoch", "4")
MORE = {"train_cps": ("--cps-warmup", "0", "1")}


def example(name):
    """A small network in evaluation mode (dropout would differ) and an input for it."""
    torch.manual_seed(0)
    network = NETWORKS[name](1, 3, 16).eval()
    if name == "senformer":                     # whose small weights make a constant at first
        network.apply(partial(emseg.glorot_initialization, kinds=(torch.nn.Linear,)))
    side = emseg.network_side(network, 64) + 2 * network.margin
    depth = [max(network.min_depth, 5)] if network.dims == 3 else []
    return network, torch.randn(2, 1, *depth, side, side)


def outputs(network, image, dtype=torch.float32):
    """Logits and all gradients, on the CPU in float32."""
    network.zero_grad()
    with torch.autocast(image.device.type, dtype, enabled=dtype != torch.float32):
        logits = network(image)
    direction = torch.linspace(0, 99, logits.numel()).sin().view_as(logits).to(logits.device)
    (logits.float() * direction).sum().backward()
    gradients = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
    return logits.detach().float().cpu(), torch.cat(gradients).float().cpu()


def distance(found, wanted):
    """Largest relative distance (2-norm) of logits and of gradients."""
    return max(((f - w).norm() / w.norm()).item() for f, w in zip(found, wanted))


@pytest.fixture
def exact(monkeypatch):
    """Convolutions and matrix products without TF32's 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_agree_with_the_cpu(name, exact):
    network, image = example(name)
    wanted = outputs(network, image)
    network, image = emseg.channels_last(network.cuda()), image.cuda()
    single, half = [distance(outputs(network, image, dtype), wanted)
                    for dtype in (torch.float32, torch.bfloat16)]
    print(f"{name}: float32 {single:.1e}, bf16 {half:.1e}")
    assert single < 3e-2 and half < 0.5


@pytest.mark.parametrize("name", NETWORKS)
def test_compiled_networks_agree(name, exact):
    network, image = example(name)
    network, image = emseg.channels_last(network.cuda()), image.cuda()
    wanted = outputs(network, image)
    network.compile()
    assert distance(outputs(network, image), wanted) < 1e-2


def start(script, folder, *arguments, before=""):
    """A process that runs the demo of a script; before: Python to execute in it."""
    code = (f"import sys, runpy; sys.argv = sys.argv[1:]\n{before}\n"
            "runpy.run_path(sys.argv[0], run_name='__main__')")
    command = [sys.executable, "-c", code, str(ROOT / f"{script}.py"), "--device", "cuda",
               "--out-dir", str(folder), *arguments]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def finish(process):
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    return out


@pytest.mark.parametrize("script", SCRIPTS)
def test_demo(script, tmp_path):
    started = time.monotonic()
    out = finish(start(script, tmp_path / "run", "--demo"))
    print(f"{script}: {time.monotonic() - started:.0f} s\n{out[-600:]}")
    assert "cuda:0, bfloat16" in out or torch.cuda.get_device_capability()[0] < 8
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["mean"]["dice"] > SCRIPTS[script]
    assert metrics["peak_memory_gib"] > 0


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("kind", ["compile", "no-amp", "float16"])
def test_a_few_steps(script, kind, tmp_path):
    before, flags = "", [f"--{kind}"]
    if kind == "float16":                       # what older GPUs get, with scaled gradients
        before = "import torch, emseg; emseg.choose_precision = lambda *_: torch.float16"
        flags = []
    out = finish(start(script, tmp_path / "run", "--demo", *SHORT, *MORE.get(script, ()),
                       *flags, before=before))
    assert {"compile": "bfloat16", "no-amp": "float32"}.get(kind, kind) in out
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["mean"]["dice"] >= 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_interruption_and_resume(script, tmp_path):
    folder = tmp_path / "run"
    process = start(script, folder, "--demo")
    while not list(folder.glob("**/log.csv")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130 and "--resume" in out + err, out + err
    finish(start(script, folder, "--resume"))
    assert json.loads((folder / "metrics.json").read_text())["mean"]["dice"] > SCRIPTS[script]
