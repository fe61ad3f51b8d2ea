"""What makes a result out of date, and which device a job gets."""

import json

import pytest

from compendium.catalogue import catalogue
from compendium.experiment.config import ConfigError
from compendium.runner import plan as module
from compendium.runner.plan import (
    default_device,
    imported_modules,
    library_hashes,
    plan,
    plan_job,
    visible_gpus,
)


@pytest.fixture
def key(small_checkout, monkeypatch):
    monkeypatch.setenv("COMPENDIUM_ROOT", str(small_checkout.folder))
    path = small_checkout.write("flat")

    def make(change=None, **settings) -> str:
        if change:
            path.write_text(json.dumps(change(json.loads(path.read_text()))))
        return plan_job(catalogue()["flat"], **settings).key

    return make


def test_the_key_follows_code_and_parameters_only(key):
    first = key()

    def prose(notebook):
        notebook["cells"].insert(
            0, {"cell_type": "markdown", "id": "a", "metadata": {}, "source": "Prose."}
        )
        return notebook

    def code(notebook):
        notebook["cells"][-1]["source"] += "\n1 + 1"
        return notebook

    assert key(prose) == first
    assert key(time_limit=5) == first
    others = {
        key(seed=1),
        key(preset="smoke"),
        key(device="cuda"),
        key(overrides={"noise": 0.2}),
        key(code),
    }
    assert len(others) == 5 and first not in others


def test_the_key_follows_modules_that_are_imported_through_others(key, monkeypatch):
    first = key()
    original = module._module

    def changed(name):
        return lambda path: ("other", original(path)[1]) if path.name == name else original(path)

    monkeypatch.setattr(module, "_module", changed("bootstrap.py"))
    assert key() != first, "claims import the bootstrap"
    monkeypatch.setattr(module, "_module", changed("book.py"))
    assert key() == first, "no chapter imports the book"


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("from compendium.hints import unknown", {"hints.py"}),
        ("import compendium.hints", {"hints.py"}),
        (
            "from compendium.metrics import (\n    spans,\n    basic as b,\n)",
            {"spans.py", "basic.py", "__init__.py"},
        ),
        ("from .metrics.spans import x", {"spans.py"}),
        ("%matplotlib inline\nfrom compendium import hints", {"hints.py", "__init__.py"}),
        ("this is not Python", set()),
        ("import numpy", set()),
    ],
)
def test_imports_are_read_from_the_source(source, names):
    assert {path.name for path in imported_modules(source)} == names


def test_hashes_do_not_depend_on_cell_positions(monkeypatch, tmp_path):
    (tmp_path / "one.py").write_text("# %% nbs/one.ipynb #1234\nx = 1\n")
    (tmp_path / "two.py").write_text("# %% nbs/one.ipynb #5678\nx = 1\n")
    monkeypatch.setattr(module, "PACKAGE", tmp_path)
    hashes = library_hashes(["import compendium.one, compendium.two"])
    assert len(hashes) == 2 and len(set(hashes.values())) == 1


def test_gpus_are_those_that_may_be_seen(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert visible_gpus() == ["2", "5"]
    assert (default_device("mini"), default_device("benchmark")) == ("cpu", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []
    assert default_device("benchmark") == "cpu"


def test_gpu_jobs_take_different_gpus(monkeypatch, tmp_path):
    from compendium.runner.execute import reserved_gpu

    monkeypatch.setenv("COMPENDIUM_ROOT", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    job = module.Job(chapter="flat", preset="benchmark", device="cuda", gpus=1)
    with reserved_gpu(job) as first, reserved_gpu(job) as second:
        assert first["CUDA_VISIBLE_DEVICES"] == "2"
        assert second["CUDA_VISIBLE_DEVICES"] == "5"
    with reserved_gpu(job) as again:
        assert again["CUDA_VISIBLE_DEVICES"] == "2"
    with reserved_gpu(module.Job(chapter="flat", preset="mini")) as none:
        assert none == {}


def test_nothing_written_is_an_error(small_checkout, monkeypatch):
    monkeypatch.setenv("COMPENDIUM_ROOT", str(small_checkout.folder))
    with pytest.raises(ConfigError, match="no chapter is written yet"):
        plan()
