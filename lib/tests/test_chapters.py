"""The contract of every chapter."""

import ast
import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from compendium.catalogue import catalogue, written
from compendium.experiment.record import code_cells, code_hash, load_record
from compendium.reports.pages import committed

CHAPTERS = list(written().values())
named = pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.name)


def cells_of(checkout: Path, chapter) -> list[dict]:
    cells = json.loads((checkout / chapter.notebook).read_text())["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells]


def names_in(cells: list[dict]) -> set[str]:
    """The names that are called or assigned anywhere in the code `cells`."""
    found = set()
    for cell in cells:
        if cell["cell_type"] == "code":
            for node in ast.walk(ast.parse(cell["source"])):
                if isinstance(node, ast.Call):
                    found.add(ast.unparse(node.func))
                elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    found.add(node.id)
    return found


@named
def test_it_has_the_anatomy_of_a_chapter(checkout, chapter):
    cells = cells_of(checkout, chapter)
    assert cells[0]["cell_type"] == "markdown"
    assert cells[0]["source"].startswith("# ")
    assert chapter.title in cells[0]["source"]
    if chapter.arxiv:
        assert chapter.arxiv in cells[0]["source"]
    text = "\n".join(cell["source"] for cell in cells)
    assert f"#| default_exp {chapter.part}.{chapter.name}" in text
    parameters = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    assert len(parameters) == 1
    assigned = [ast.unparse(node.targets[0]) for node in ast.parse(parameters[0]["source"]).body]
    assert assigned == ["preset", "seed", "device", "overrides"]
    assert {
        "configure",
        "Experiment",
        "study.run",
        "study.save_figure",
        "study.finish",
        "claims",
    } <= names_in(cells)
    assert re.search(r"^## Use it yourself", text, re.M)


@named
def test_its_cells_fit_on_a_screen(checkout, chapter):
    for cell in cells_of(checkout, chapter):
        if cell["cell_type"] == "code":
            assert len(cell["source"].splitlines()) <= 45, cell["source"][:200]


@named
def test_its_module_is_documented_and_typed(checkout, chapter):
    module = import_module(chapter.module)
    tree = ast.parse(Path(module.__file__).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            arguments = [
                a for a in node.args.args + node.args.kwonlyargs if a.arg not in ("self", "cls")
            ]
            untyped = [argument.arg for argument in arguments if argument.annotation is None]
            assert not untyped and node.returns is not None, (
                f"{chapter.module}.{node.name} lacks type hints"
            )
    for name in module.__all__:
        value = getattr(module, name)
        if isinstance(value, type) or (
            callable(value) and getattr(value, "__module__", "") == module.__name__
        ):
            assert (value.__doc__ or "").strip(), f"{chapter.module}.{name} has no docstring"


@named
def test_it_has_tests_of_its_own(checkout, chapter):
    assert (checkout / "lib" / "tests" / chapter.part / f"test_{chapter.name}.py").exists()


@named
def test_its_committed_report_is_of_its_code(checkout, chapter):
    record = committed(chapter.name, "mini")
    assert record is not None, f"run: compendium run {chapter.name}"
    assert record.code_hash == code_hash(code_cells(checkout / chapter.notebook)), (
        "the report is older than the code"
    )
    assert len(record.seeds) >= 3
    assert record.claims and record.figures
    for preset in ("benchmark", "paper"):
        if other := committed(chapter.name, preset):
            assert other.code_hash == record.code_hash, (
                f"the {preset} report is older than the code"
            )


def test_all_chapters_run_with_preset_smoke(checkout, tmp_path):
    """Every cell of every chapter, through the real command line."""
    script = "from compendium.runner.cli import main; main()"
    command = [sys.executable, "-c", script, "run", "--preset", "smoke", "--force"]
    answer = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=550)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    for chapter in CHAPTERS:
        assert re.search(rf"^{chapter.name}\s+done", answer.stdout, re.M), answer.stdout
        run = max(
            (checkout / ".compendium" / "runs" / "smoke").glob(f"{chapter.name}-*/record.json"),
            key=lambda p: p.stat().st_mtime,
        )
        record = load_record(run)
        own_work = sum(arm.seconds for arms in record.arms.values() for arm in arms)
        assert own_work <= 20, f"{chapter.name}: {own_work:.0f} s of own work with preset smoke"


def test_a_new_chapter_from_the_template_passes(small_checkout):
    name = "udr"
    answer = small_checkout.compendium("new", name)
    assert answer.returncode == 0, answer.stderr
    chapter = catalogue()[name]
    cells = cells_of(small_checkout.folder, chapter)
    assert chapter.title in cells[0]["source"]
    ran = small_checkout.compendium("run", name)
    assert ran.returncode == 0, ran.stdout
    assert "C1 ✅" in ran.stdout
    test_it_has_the_anatomy_of_a_chapter(small_checkout.folder, chapter)
    test_its_cells_fit_on_a_screen(small_checkout.folder, chapter)
    exported = "\n".join(cell["source"] for cell in cells if cell["source"].startswith("#| export"))
    scope: dict = {}
    exec(compile(exported, "template", "exec"), scope)
    assert "SampleMean" in scope
    assert (small_checkout.folder / "lib" / "tests" / "retrieval" / "test_udr.py").exists()
