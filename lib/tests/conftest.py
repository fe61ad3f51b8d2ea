"""What several test files share: the checkout, the environment of a run, and a small checkout to run in."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The top folder of this checkout."""
    return ROOT


TOY = """
from dataclasses import dataclass
from compendium.experiment.config import configure
from compendium.experiment.study import Experiment
from compendium.experiment.claims import gain

@dataclass(frozen=True)
class Toy:
    num_seeds: int = 2
    noise: float = 0.1

config = configure(Toy, {"smoke": {"num_seeds": 1}, "mini": {}, "benchmark": {}, "paper": {}}, preset, overrides)
claims = [gain("C1", "more is more", metric="score", of="more", over="less", at_least=0.5)]
study = Experiment(CHAPTER, config, claims, preset=preset, seed=seed, device=device, overrides=overrides)
"""
FINISH = """
import torch
study.run(lambda arm, seed, log: {"score": float((arm == "more") + config.noise * torch.rand(()))}, ["more", "less"])
study.finish()
"""


def notebook(*cells: str) -> str:
    """A notebook with a `parameters` cell and code `cells`, as JSON."""
    parameters = 'preset = "mini"\nseed = 0\ndevice = "auto"\noverrides = {}'
    sources = [(parameters, ["parameters"]), *((cell.strip(), []) for cell in cells)]
    return json.dumps(
        {
            "cells": [
                {
                    "cell_type": "code",
                    "execution_count": None,
                    "id": f"cell-{index}",
                    "metadata": {"tags": tags},
                    "outputs": [],
                    "source": source,
                }
                for index, (source, tags) in enumerate(sources)
            ],
            "metadata": {
                "kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}
            },
            "nbformat": 4,
            "nbformat_minor": 5,
        }
    )


class SmallCheckout:
    """A checkout with toy chapters, where the real command line runs."""

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        self.folder, self.settings = folder, settings
        for name in ("settings.ini", "Snakefile", "README.md"):
            shutil.copy(ROOT / name, folder / name)
        (folder / "nbs").mkdir()

    def write(self, chapter: str, *cells: str, toy: bool = True) -> Path:
        """Write `chapter` as a toy experiment with `cells` before its last one (or from `cells` alone)."""
        from compendium.catalogue import catalogue

        path = self.folder / catalogue()[chapter].notebook
        path.parent.mkdir(parents=True, exist_ok=True)
        around = [TOY.replace("CHAPTER", repr(chapter)), *cells, FINISH] if toy else cells
        path.write_text(notebook(*around), encoding="utf-8")
        return path

    def environment(self, **changes: str) -> dict[str, str]:
        """The environment for a command in this checkout."""
        return (
            os.environ | {"COMPENDIUM_ROOT": str(self.folder), "WANDB_MODE": "disabled"} | changes
        )

    def command(self, *arguments: str) -> list[str]:
        """The command line of `compendium` with `arguments`."""
        return [sys.executable, "-c", "from compendium.runner.cli import main; main()", *arguments]

    def compendium(self, *arguments: str, **changes: str) -> subprocess.CompletedProcess:
        """Run `compendium` with `arguments` here; returns the completed process with its text."""
        return subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment(**self.settings | changes),
            capture_output=True,
            text=True,
            timeout=300,
        )

    def runs(self, preset: str = "mini") -> list[Path]:
        """The folders of finished runs."""
        found = (self.folder / ".compendium" / "runs" / preset).glob("*/record.json")
        return sorted(path.parent for path in found if "." not in path.parent.name)


@pytest.fixture(scope="session")
def warm_parent() -> Iterator[dict[str, str]]:
    """The setting that lets all batches of the tests share one warm parent; empty where there is none."""
    from compendium.runner.warm import (
        VARIABLE,
        NotWarm,
        WarmParent,
        declared_imports,
        kernel_environment,
    )

    try:
        parent = WarmParent()
    except NotWarm:
        yield {}
        return
    parent.load(declared_imports([[TOY, FINISH]]), kernel_environment("smoke", 0, Path()))
    yield {VARIABLE: str(parent.folder)}
    parent.close()


@pytest.fixture
def small_checkout(tmp_path: Path, warm_parent) -> SmallCheckout:
    """An empty `SmallCheckout`, where `compendium` uses the shared warm parent."""
    return SmallCheckout(tmp_path, warm_parent)
