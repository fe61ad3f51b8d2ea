"""Records: atomic, validated, comparable, and free of code."""

import ast
import errno
import json
import os

import pytest

from compendium.experiment import record as module
from compendium.experiment.record import (
    ArmRun,
    Environment,
    Record,
    RecordError,
    code_cells,
    code_hash,
    load_record,
    save_record,
    write_atomically,
)


def example(**changes) -> Record:
    run = ArmRun(
        seed=0, metrics={"f1": 71.25, "loss": float("nan")}, seconds=1.5, peak_memory_bytes=10
    )
    values = {
        "chapter": "flat",
        "part": "chinese",
        "title": "FLAT",
        "preset": "mini",
        "seed": 0,
        "config": {"sizes": (1, 2)},
        "seeds": [0],
        "arms": {"flat": [run]},
        "claims": [],
        "environment": Environment(python="3", torch="2", device="cpu", threads=1, platform="x"),
        "code_hash": "0" * 16,
    }
    return Record(**(values | changes))


def test_a_record_survives_its_file(tmp_path):
    save_record(example(), tmp_path / "record.json")
    again = load_record(tmp_path / "record.json")
    assert again.same_results(example())
    assert again.arms["flat"][0].metrics["f1"] == 71.25
    assert os.stat(tmp_path / "record.json").st_mode & 0o777 == 0o644


def test_cost_and_environment_do_not_count_as_results():
    slow = ArmRun(
        seed=0,
        metrics={"f1": 71.25, "loss": float("nan")},
        timings={"t": 1},
        seconds=99,
        peak_memory_bytes=1,
    )
    elsewhere = Environment(python="4", torch="3", device="gpu", threads=2, platform="y")
    assert example().same_results(
        example(arms={"flat": [slow]}, environment=elsewhere, wandb=["id"])
    )


@pytest.mark.parametrize("field", ["code_hash", "preset", "config", "arms", "overrides"])
def test_results_differ_with(field):
    other = ArmRun(
        seed=0, metrics={"f1": 71.250001, "loss": float("nan")}, seconds=1.5, peak_memory_bytes=10
    )
    changed = {
        "code_hash": "1" * 16,
        "preset": "smoke",
        "config": {"sizes": (1, 3)},
        "arms": {"flat": [other]},
        "overrides": {"a": 1},
    }
    assert not example().same_results(example(**{field: changed[field]}))


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-50],
        lambda text: "",
        lambda text: text.replace('"seed": 0', '"seed": "zero"', 1),
        lambda text: text.replace('"chapter"', '"chapters"', 1),
        lambda text: text.replace('"schema_version": 1', '"schema_version": 2'),
    ],
)
def test_a_damaged_record_is_refused_in_one_sentence(tmp_path, damage):
    path = tmp_path / "record.json"
    save_record(example(), path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(RecordError) as error:
        load_record(path)
    assert "is damaged" in str(error.value)
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "record.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecordError, match="damaged"):
        load_record(tmp_path / "record.json")


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    write_atomically(path, "old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(RecordError, match=r"cannot write .*record\.json: No space left on device"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="cannot write"):
        write_atomically(tmp_path / "file" / "record.json", "text")


def test_the_code_hash_sees_code_and_nothing_else(tmp_path):
    def notebook(*cells: tuple[str, str]) -> str:
        return json.dumps(
            {"cells": [{"cell_type": kind, "source": [source]} for kind, source in cells]}
        )

    path = tmp_path / "n.ipynb"
    hashes = []
    for cells in (
        [("markdown", "prose"), ("code", "x = 1")],
        [("markdown", "other prose"), ("code", "x = 1  \n"), ("markdown", "more")],
        [("code", "x = 2")],
        [("code", "x ="), ("code", " 1")],
    ):
        path.write_text(notebook(*cells))
        hashes.append(code_hash(code_cells(path)))
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_no_module_can_execute_what_it_loads(checkout):
    """No pickle and no eval in the library: weights and records are data."""
    forbidden = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    for path in (checkout / "lib" / "compendium").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not forbidden & {name.partition(".")[0] for name in names}, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "torch.load", "numpy.load", "os.system"}, (
                    f"{path}: {called}"
                )
                shell = [
                    word
                    for word in node.keywords
                    if word.arg in ("shell", "allow_pickle", "trust_remote_code")
                ]
                for word in shell:
                    assert ast.unparse(word.value) == "False", f"{path}: {ast.unparse(node)}"
