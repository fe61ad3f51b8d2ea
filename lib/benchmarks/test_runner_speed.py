"""The runner against a shell loop of plain papermill on the same notebooks, and the start of the command."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from compendium.catalogue import catalogue

TOOLS = Path(sys.executable).parent
CHAPTERS = ("flat", "udr", "aor", "cnn_ner")


def seconds(action) -> float:
    """Wall-clock seconds of `action()`."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def papermill_loop(checkout, chapters, output: Path) -> float:
    """Seconds of a shell loop of plain papermill over the notebooks of `chapters`."""
    paths = [checkout.folder / catalogue()[name].notebook for name in chapters]
    loop = f'for n in {" ".join(map(str, paths))}; do {TOOLS}/papermill -k python3 "$n" "{output}/$(basename $n)"; done'
    environment = checkout.environment(COMPENDIUM_RUN_DIR=str(output), OMP_NUM_THREADS="1")
    command = ["bash", "-ec", loop]
    return seconds(
        lambda: subprocess.run(command, env=environment, check=True, capture_output=True)
    )


def runner(checkout, *arguments: str) -> float:
    """Seconds of `compendium run` with `arguments`."""

    def run() -> None:
        answer = checkout.compendium("run", *arguments, "--force")
        assert answer.returncode == 0, answer.stdout + answer.stderr

    return seconds(run)


def test_four_chapters_on_two_cores(small_checkout, tmp_path, capsys):
    for name in CHAPTERS:
        small_checkout.write(name)
    (tmp_path / "papermill").mkdir()
    ours = [runner(small_checkout, "--jobs", "2") for _ in range(2)]
    theirs = [papermill_loop(small_checkout, CHAPTERS, tmp_path / "papermill") for _ in range(2)]
    ratio = min(theirs) / min(ours)
    with capsys.disabled():
        print(
            f"\n4 chapters: papermill loop {min(theirs):.1f} s, runner {min(ours):.1f} s, {ratio:.2f}x"
        )
    assert ratio >= 1.6


def test_the_fixed_cost_over_papermill(small_checkout, tmp_path, capsys):
    small_checkout.write("flat")
    (tmp_path / "papermill").mkdir()
    ours = [runner(small_checkout) for _ in range(3)]
    theirs = [papermill_loop(small_checkout, ["flat"], tmp_path / "papermill") for _ in range(3)]
    cost = min(ours) - min(theirs)
    with capsys.disabled():
        print(
            f"\n1 chapter: papermill {min(theirs):.1f} s, runner {min(ours):.1f} s, {cost:+.1f} s"
        )
    assert cost <= 3.0


@pytest.mark.parametrize(
    "arguments", [["-c", "import compendium"], [str(TOOLS / "compendium"), "--help"]]
)
def test_the_command_starts_fast(arguments, capsys):
    command = [sys.executable, *arguments]
    best = min(
        seconds(lambda: subprocess.run(command, check=True, capture_output=True)) for _ in range(5)
    )
    with capsys.disabled():
        print(f"\n{' '.join(arguments[-2:])}: {best:.2f} s")
    assert best <= 0.5
