"""Warm kernels against ordinary ones, `nbdev_test` and `jupyter execute`, on the same notebooks in the same run."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compendium.catalogue import catalogue, root, written
from compendium.experiment.record import load_record
from compendium.runner.warm import VARIABLE

TOOLS = Path(sys.executable).parent
CHAPTERS = ("flat", "udr", "aor", "cnn_ner", "dore", "mccws")
IMPORTS = "import datasets, matplotlib.pyplot, torch, transformers, wandb"
RECORD = """
from compendium.experiment.study import Experiment
from dataclasses import dataclass
@dataclass(frozen=True)
class Nothing:
    num_seeds: int = 1
study = Experiment(CHAPTER, Nothing(), [], preset=preset, seed=seed, device=device, overrides=overrides)
study.finish()
"""


def seconds(command, **options) -> float:
    """Wall-clock seconds of `command`, which must succeed."""
    start = time.perf_counter()
    answer = subprocess.run(command, capture_output=True, text=True, **options)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return time.perf_counter() - start


def batch(checkout, warm: bool, *arguments: str, workers: int = 2) -> float:
    """Seconds of `compendium run` with or without warm kernels."""
    environment = checkout.environment(**{VARIABLE: "" if warm else "off"})
    command = checkout.command("run", *arguments, "--force", "--jobs", str(workers))
    return seconds(command, cwd=checkout.folder, env=environment)


@pytest.fixture
def heavy_checkout(small_checkout):
    """Six chapters that import what most chapters import, and do nothing else."""
    for name in CHAPTERS:
        small_checkout.write(name, IMPORTS, RECORD.replace("CHAPTER", repr(name)), toy=False)
    return small_checkout


def fixed_cost(checkout, warm: bool) -> float:
    """Seconds that one more notebook costs: five more, one at a time, by five."""
    one = batch(checkout, warm, CHAPTERS[0], workers=1)
    return (batch(checkout, warm, *CHAPTERS, workers=1) - one) / (len(CHAPTERS) - 1)


def test_the_fixed_cost_of_a_notebook(heavy_checkout, capsys):
    warm, cold = (fixed_cost(heavy_checkout, setting) for setting in (True, False))
    with capsys.disabled():
        print(f"\nper notebook: cold {cold:.2f} s, warm {warm:.2f} s, {cold / warm:.1f}x")
    assert cold / warm >= 3.0
    assert warm <= 2.0


def test_against_nbdev_and_jupyter(heavy_checkout, capsys):
    folder = heavy_checkout.folder
    paths = [folder / catalogue()[name].notebook for name in CHAPTERS]
    environment = heavy_checkout.environment(
        OMP_NUM_THREADS="1", PATH=f"{TOOLS}:{os.environ['PATH']}"
    )
    options = {"cwd": folder, "env": environment}
    ours = batch(heavy_checkout, True)
    nbdev = seconds([TOOLS / "nbdev_test", "--n_workers", "2"], **options)
    copies = folder / "copies"
    copies.mkdir()
    loop = " && ".join(f"jupyter execute {shutil.copy(path, copies)}" for path in paths)
    jupyter = seconds(["bash", "-c", loop], **options)
    with capsys.disabled():
        print(
            f"\n{len(paths)} notebooks: compendium run {ours:.1f} s, nbdev_test --n_workers 2 {nbdev:.1f} s "
            f"({nbdev / ours:.2f}x), jupyter execute {jupyter:.1f} s ({jupyter / ours:.2f}x)"
        )
    assert jupyter / ours > 1.0
    assert nbdev / ours > 1.0


def smoke(warm: bool) -> tuple[float, dict]:
    """Seconds and records of all chapters with preset `smoke`."""
    command = [sys.executable, "-c", "from compendium.runner.cli import main; main()"]
    command += ["run", "--preset", "smoke", "--force", "--jobs", "2"]
    environment = os.environ | {VARIABLE: "" if warm else "off", "WANDB_MODE": "disabled"}
    took = seconds(command, cwd=root(), env=environment)
    records = {}
    for name in written():
        found = (root() / ".compendium" / "runs" / "smoke").glob(f"{name}-*/record.json")
        records[name] = load_record(max(found, key=lambda path: path.stat().st_mtime))
    return took, records


def test_all_chapters_with_preset_smoke(capsys):
    """The same results to the last bit, in half the time."""
    warm, ours = smoke(True)
    cold, theirs = smoke(False)
    with capsys.disabled():
        print(
            f"\n{len(ours)} chapters, smoke: cold {cold:.1f} s, warm {warm:.1f} s, {cold / warm:.2f}x"
        )
    for name, record in ours.items():
        assert record.same_results(theirs[name]), name
    assert cold / warm >= 2.0
