"""A training step with AdaLomo against `pytorch_optimizer.AdaLOMO` and AdamW: time and peak memory."""

import gc
import os
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from compendium.language_models.adalomo import AdaLomo, GradientMeter

WIDTH, DEPTH, BATCH = 512, 12, 8


def stack(width: int = WIDTH, depth: int = DEPTH) -> nn.Module:
    torch.manual_seed(0)
    layers = [(nn.Linear(width, width), nn.LayerNorm(width), nn.GELU()) for _ in range(depth)]
    return nn.Sequential(*(module for layer in layers for module in layer))


def step_of(name: str, model: nn.Module, inputs: torch.Tensor):
    """A function that makes one step: forward, backward, update."""
    if name == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    elif name == "adalomo":
        optimizer = AdaLomo(model, lr=1e-3)
    else:
        optimizer = pytest.importorskip("pytorch_optimizer").AdaLOMO(model, lr=1e-3)

    def step() -> None:
        loss = model(inputs).square().mean()
        if name == "adamw":
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            optimizer.fused_backward(loss, 1e-3)

    return step


def seconds(names: list[str], width: int, depth: int, rounds: int) -> dict[str, float]:
    """The fastest of some steps by each optimizer, taken in turns."""
    steps = {name: step_of(name, stack(width, depth), torch.ones(BATCH, width)) for name in names}
    fastest = dict.fromkeys(names, float("inf"))
    for number in range(rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if number > 1:
                fastest[name] = min(fastest[name], time.perf_counter() - start)
    return fastest


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    yield
    torch.set_num_threads(before)


def report(title: str, values: dict[str, float], unit: str) -> None:
    print(
        f"\n{title}: " + ", ".join(f"{name} {value:.2f} {unit}" for name, value in values.items())
    )


def test_a_step_is_faster_than_pytorch_optimizer_and_near_adamw():
    times = seconds(["adalomo", "pytorch_optimizer", "adamw"], WIDTH, DEPTH, rounds=8)
    report("step of 12 layers of 512", {name: 1e3 * value for name, value in times.items()}, "ms")
    assert times["adalomo"] * 1.1 <= times["pytorch_optimizer"]
    assert times["adalomo"] <= 1.6 * times["adamw"]


def test_many_small_weights_do_not_slow_it_down():
    """The peer looks at all weights whenever one gradient comes: quadratic in their number."""
    times = seconds(["adalomo", "pytorch_optimizer"], width=16, depth=150, rounds=5)
    report("step of 150 layers of 16", {name: 1e3 * value for name, value in times.items()}, "ms")
    assert times["adalomo"] * 2 <= times["pytorch_optimizer"]


PEAK = """
import sys, torch
sys.path.insert(0, {folder!r})
from test_adalomo_speed import stack, step_of
from compendium.experiment.reproducible import peak_memory, reset_peak_memory
torch.set_num_threads(1)
model = stack(1024, 24)
step = step_of({name!r}, model, torch.ones(8, 1024))
before = peak_memory(torch.device("cpu"))
step(); step()
print("bytes", peak_memory(torch.device("cpu")) - before, sum(p.nbytes for p in model.parameters()))
"""


def added_memory(name: str) -> float:
    """Peak memory that two steps add to the weights, as a multiple of the weights' bytes."""
    program = PEAK.format(folder=os.path.dirname(__file__), name=name)
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    _, added, weights = done.stdout.split()[-3:]
    return int(added) / int(weights)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from Linux")
def test_it_adds_a_fraction_of_the_memory_that_adamw_adds():
    memory = {name: added_memory(name) for name in ("adalomo", "pytorch_optimizer", "adamw")}
    report("peak memory added to the weights", memory, "× weights")
    assert memory["adalomo"] * 4 <= memory["adamw"]
    assert memory["adalomo"] <= 1.1 * memory["pytorch_optimizer"]


def test_gradients_alive_are_a_fraction_of_adamws():
    peaks = {}
    for name in ("adalomo", "adamw"):
        model = stack()
        with GradientMeter(model) as meter:
            step_of(name, model, torch.ones(BATCH, WIDTH))()
        peaks[name] = meter.peak_bytes
    assert peaks["adalomo"] * (DEPTH - 1) <= peaks["adamw"]
