"""Warm kernels against ordinary ones, `jupyter execute` and `nbdev_test`, on the same notebooks in the same run."""

import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compendium.catalogue import catalogue, root, written
from compendium.experiment.record import load_record
from compendium.runner.warm import (
    THREADS,
    VARIABLE,
    WarmParent,
    declared_imports,
    kernel_environment,
)

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


def batch(checkout) -> float:
    """Seconds of `compendium run` on all notebooks of `checkout`, two at a time."""
    environment = checkout.environment(**{VARIABLE: ""})
    command = checkout.command("run", "--force", "--jobs", "2")
    return seconds(command, cwd=checkout.folder, env=environment)


@pytest.fixture
def heavy_checkout(small_checkout):
    """Six chapters that import what most chapters import, and do nothing else."""
    for name in CHAPTERS:
        small_checkout.write(name, IMPORTS, RECORD.replace("CHAPTER", repr(name)), toy=False)
    return small_checkout


def job_seconds(checkout, number: int, setting: str) -> float:
    """Seconds of the process that Snakemake starts for a chapter, from its start to its end."""
    planned = plan_of(checkout, number)
    program = "from compendium.runner.warm import main; main()"
    environment = checkout.environment(**{VARIABLE: setting})
    command = [sys.executable, "-c", program, str(planned)]
    return seconds(command, cwd=checkout.folder, env=environment)


def plan_of(checkout, number: int) -> Path:
    """The file that describes a run of the first chapter with seed `number`."""
    program = "import sys; from compendium.runner.plan import plan; "
    program += (
        "[job] = plan([sys.argv[1]], 'smoke', seed=int(sys.argv[2])); job.save(); print(job.file)"
    )
    command = [sys.executable, "-c", program, CHAPTERS[0], str(number)]
    environment = checkout.environment()
    answer = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, cwd=checkout.folder
    )
    return Path(answer.stdout.strip())


def test_the_fixed_cost_of_a_notebook(heavy_checkout, tmp_path, capsys):
    environment = kernel_environment("smoke", 0, tmp_path) | dict.fromkeys(THREADS, "1")
    environment["COMPENDIUM_ROOT"] = str(heavy_checkout.folder)
    imports = declared_imports([[IMPORTS, RECORD]])
    parent = WarmParent()
    parent.load(imports, environment | {"WANDB_MODE": "disabled"})
    try:
        job_seconds(heavy_checkout, 0, str(parent.folder))  # waits until all is imported
        warm, cold = [], []
        for number in range(1, 7, 2):
            warm.append(job_seconds(heavy_checkout, number, str(parent.folder)))
            cold.append(job_seconds(heavy_checkout, number + 1, "off"))
        assert parent.problem() == ""
    finally:
        parent.close()
    ratio = min(cold) / min(warm)
    with capsys.disabled():
        print(f"\nper notebook: cold {min(cold):.2f} s, warm {min(warm):.2f} s, {ratio:.1f}x")
    assert ratio >= 3.0
    assert min(warm) <= 2.0


def test_against_nbdev_and_jupyter(heavy_checkout, capsys):
    """Ahead of both, although ours gives every notebook a process of its own, and `nbdev_test` does not.

    Ours and `nbdev_test` take turns, since a machine is not equally fast at all times; medians are compared.
    """
    folder = heavy_checkout.folder
    paths = [folder / catalogue()[name].notebook for name in CHAPTERS]
    environment = heavy_checkout.environment(
        OMP_NUM_THREADS="1", PATH=f"{TOOLS}:{os.environ['PATH']}"
    )
    options = {"cwd": folder, "env": environment}
    nbdev_test = [TOOLS / "nbdev_test", "--n_workers", "2"]
    pairs = [(batch(heavy_checkout), seconds(nbdev_test, **options)) for _ in range(7)]
    ours, nbdev = map(statistics.median, zip(*pairs, strict=True))
    copies = folder / "copies"
    copies.mkdir()
    loop = " && ".join(f"jupyter execute {shutil.copy(path, copies)}" for path in paths)
    jupyter = seconds(["bash", "-c", loop], **options)
    with capsys.disabled():
        turns = ", ".join(f"{theirs / mine:.2f}x" for mine, theirs in pairs)
        print(
            f"\n{len(paths)} notebooks: compendium run {ours:.1f} s, nbdev_test --n_workers 2 {nbdev:.1f} s "
            f"({nbdev / ours:.2f}x; {turns}), jupyter execute {jupyter:.1f} s ({jupyter / ours:.2f}x)"
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
