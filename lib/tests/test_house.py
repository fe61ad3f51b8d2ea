"""The house is in order: exports, clean notebooks, style, light imports, a README that runs."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from compendium.catalogue import catalogue
from compendium.reports.pages import all_records, chapter_page, index_page, update_readme

TOOLS = Path(sys.executable).parent


def notebooks(checkout: Path) -> list[Path]:
    return sorted(
        path
        for path in (checkout / "nbs").rglob("*.ipynb")
        if ".ipynb_checkpoints" not in path.parts
    )


def files_below(folder: Path) -> dict[str, bytes]:
    """Relative path -> content of the Python files below `folder`."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*.py"))
    }


def test_the_library_is_what_the_notebooks_export(checkout, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(checkout / "nbs", copy / "nbs")
    shutil.copy(checkout / "settings.ini", copy)
    (copy / "lib").mkdir()
    environment = os.environ | {"PATH": f"{TOOLS}:{os.environ['PATH']}"}
    subprocess.run(
        [TOOLS / "nbdev_export"], cwd=copy, env=environment, check=True, capture_output=True
    )
    exported, committed = (
        files_below(copy / "lib" / "compendium"),
        files_below(checkout / "lib" / "compendium"),
    )
    assert sorted(exported) == sorted(committed)
    assert [name for name in exported if exported[name] != committed[name]] == [], (
        "run: make export"
    )


def test_notebooks_are_clean(checkout, tmp_path):
    for path in notebooks(checkout):
        for cell in json.loads(path.read_text())["cells"]:
            assert not cell.get("outputs"), f"{path} holds outputs; run: nbdev_clean"
            assert cell.get("execution_count") is None, (
                f"{path} holds execution counts; run: nbdev_clean"
            )
    shutil.copytree(checkout / "nbs", tmp_path / "nbs")
    shutil.copy(checkout / "settings.ini", tmp_path)
    environment = os.environ | {"PATH": f"{TOOLS}:{os.environ['PATH']}"}
    subprocess.run(
        [TOOLS / "nbdev_clean"], cwd=tmp_path, env=environment, check=True, capture_output=True
    )
    for path in notebooks(checkout):
        assert (tmp_path / path.relative_to(checkout)).read_text() == path.read_text(), (
            f"{path}: run nbdev_clean"
        )


@pytest.mark.parametrize("arguments", [("check",), ("format", "--check")])
def test_style(checkout, arguments):
    answer = subprocess.run(
        [TOOLS / "ruff", *arguments, "."], cwd=checkout, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stdout[-3000:]


def test_foundation_notebooks_run(checkout):
    """`nbdev_test` on the foundations: every check beside its definition."""
    environment = os.environ | {"PATH": f"{TOOLS}:{os.environ['PATH']}", "WANDB_MODE": "disabled"}
    command = [TOOLS / "nbdev_test", "--path", "nbs/00_foundations", "--n_workers", "2"]
    answer = subprocess.run(
        command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=550
    )
    assert answer.returncode == 0, (answer.stdout + answer.stderr)[-3000:]


def test_importing_and_asking_for_help_is_light():
    script = (
        "import sys, compendium, compendium.runner.cli\n"
        "from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(compendium.runner.cli.app, ['--help']).exit_code == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'papermill', 'snakemake', 'matplotlib', 'wandb'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"


def test_arrows_run_downwards(checkout):
    """A foundation imports what lies below it, a chapter imports foundations only."""
    floors = ["metrics", "data", "models", "training", "experiment", "zoo", "reports", "runner"]
    allowed = {
        "metrics": set(),
        "data": set(),
        "models": set(),
        "training": set(),
        "experiment": {"metrics"},
        "zoo": {"models", "data", "training"},
        "reports": {"experiment"},
        "runner": set(floors),
    }
    package = checkout / "lib" / "compendium"
    parts = {chapter.part for chapter in catalogue().values()}
    for path in package.rglob("*.py"):
        home = path.relative_to(package).parts[0]
        if home not in allowed and home not in parts:
            continue
        may = allowed.get(home, set(floors) - {"runner", "reports"}) | {home, "hints", "catalogue"}
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom):
                continue
            base = ["compendium", *path.relative_to(package).parts[:-1]]
            above = base[: len(base) + 1 - node.level] if node.level else []
            target = [*above, *(node.module or "").split(".")]
            if target[0] == "compendium" and len(target) > 1 and target[1]:
                assert target[1] in may, f"{path.relative_to(package)} imports {'.'.join(target)}"
                own = home in parts and target[1] == home
                assert not own or target[2] == path.stem, f"{path}: a chapter imports a chapter"


def test_committed_reports_are_what_their_records_give(checkout):
    records = all_records()
    for record in records:
        folder = checkout / "reports" / record.preset / record.chapter
        assert (folder / "README.md").read_text() == chapter_page(record), "run: compendium report"
        for figure in record.figures:
            assert (folder / figure.file).exists() and (folder / figure.file).with_suffix(
                ".svg"
            ).exists()
    assert (checkout / "reports" / "README.md").read_text() == index_page(records)
    readme = (checkout / "README.md").read_text()
    assert update_readme(readme, records) == readme


def test_the_readme_example_runs(checkout):
    blocks = re.findall(r"```python\n(.*?)```", (checkout / "README.md").read_text(), re.S)
    assert blocks, "README.md has lost its example"
    for block in blocks:
        subprocess.run([sys.executable, "-c", block], check=True, cwd=checkout, timeout=120)


def test_the_lock_pins_everything_that_is_declared(checkout):
    import tomllib

    pinned = {}
    for line in (checkout / "requirements.lock").read_text().splitlines():
        if not line.startswith("#"):
            name, equals, version = line.partition("==")
            assert equals and version, f"{line!r} is not an exact pin"
            pinned[re.sub(r"[-_.]+", "-", name).lower()] = version
    project = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    for requirement in [*project["dependencies"], *(line for extra in extras for line in extra)]:
        name = re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()
        assert name in pinned, f"{name} is declared but not locked; run: make lock"
    assert pinned["torch"] == "2.13.0"


def test_nothing_else_stands_at_the_top(checkout):
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=checkout, capture_output=True, text=True, check=True
    )
    top = {line.partition("/")[0] for line in tracked.stdout.splitlines()}
    allowed = {
        "README.md",
        "settings.ini",
        "environment.yml",
        "requirements.lock",
        "pyproject.toml",
        "Makefile",
    }
    allowed |= {
        "Snakefile",
        "nbs",
        "lib",
        "data",
        "reports",
        "LICENSE",
        "CITATION.cff",
        "CONTRIBUTING.md",
    }
    assert {name for name in top if not name.startswith(".")} <= allowed
