"""The grid of arms and seeds, what it records, and its mirror on W&B."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from compendium.catalogue import CatalogueError
from compendium.experiment.claims import Outcome, gain
from compendium.experiment.config import ConfigError
from compendium.experiment.record import Published, RecordError, load_record
from compendium.experiment.study import Experiment, published_numbers, run_folder
from compendium.experiment.tracking import records_from_wandb, tracking_mode
from compendium.reports import pages


@dataclasses.dataclass(frozen=True)
class Toy:
    num_seeds: int = 3


CLAIM = gain("C1", "a beats b", metric="score", of="a", over="b", at_least=0.5)


def train(arm: str, seed: int, log) -> Outcome:
    log(step=0, loss=1.0)
    log(step=1, loss=0.5)
    score = float((arm == "a") + 0.1 * torch.rand(()) + 0.1 * np.random.rand())  # noqa: NPY002
    return Outcome({"score": score}, timings={"rate": 5.0}, artifacts=arm)


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPENDIUM_RUN_DIR", str(tmp_path / "run"))

    def make(**settings) -> Experiment:
        return Experiment(
            "flat", Toy(), [CLAIM], **({"preset": "mini", "device": "cpu"} | settings)
        )

    (tmp_path / "run").mkdir()
    return make


def test_every_arm_runs_with_every_seed(study):
    experiment = study(seed=5)
    calls = []
    experiment.run(lambda arm, seed, log: calls.append((arm, seed)) or {"score": 1.0}, ["a", "b"])
    assert sorted(calls) == [(arm, seed) for arm in "ab" for seed in (5, 6, 7)]
    record = experiment.record()
    assert record.seeds == [5, 6, 7]
    assert [run.seed for run in record.arms["b"]] == [5, 6, 7]


def test_a_run_depends_on_its_seed_and_not_on_its_neighbours(study):
    both, alone = study(), study()
    both.run(train, ["a", "b"])
    alone.run(train, ["b"])
    assert list(both.values("b", "score")) == list(alone.values("b", "score"))
    assert len(set(both.values("b", "score"))) == 3


def test_the_record_is_complete(study, tmp_path):
    experiment = study()
    experiment.run(train, ["a", "b"])
    table = experiment.finish()
    assert table.verdict["C1"] == "holds"
    record = load_record(tmp_path / "run" / "record.json")
    assert record.claims[0].verdict == "holds"
    assert record.arms["a"][0].timings == {"rate": 5.0}
    assert record.arms["a"][0].seconds > 0
    assert record.arms["a"][0].peak_memory_bytes > 10**7
    assert record.environment.device == "cpu"
    assert experiment.histories["a"][0] == [{"step": 0, "loss": 1.0}, {"step": 1, "loss": 0.5}]


def test_smoke_decides_nothing(study):
    experiment = study(preset="smoke")
    experiment.run(train, ["a", "b"])
    assert experiment.record().claims[0].verdict == "not testable here"


def test_bad_parameters_are_refused(study, monkeypatch):
    with pytest.raises(ConfigError, match="did you mean 'mini'"):
        study(preset="minni")
    with pytest.raises(ConfigError, match="device 'gpu' is unknown"):
        study(device="gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no GPU"):
        study(device="cuda")
    with pytest.raises(CatalogueError, match="is not in"):
        Experiment("flatt", Toy(), [], preset="mini")


def test_without_a_runner_files_go_to_a_scratch_folder(monkeypatch):
    monkeypatch.delenv("COMPENDIUM_RUN_DIR", raising=False)
    assert run_folder("flat", "mini").parts[-4:] == (".compendium", "interactive", "mini", "flat")


def test_published_numbers_are_well_formed():
    from compendium.catalogue import written

    for name in written():
        for row in published_numbers(name):
            assert row.source, f"{name}: a published number needs its table"


def test_ours_stands_beside_a_published_number_only_where_we_have_it(study, monkeypatch):
    row = dict(system="s", dataset="d", value=90.0, source="Table 1")
    rows = [dict(row, arm="a", metric="score"), dict(row, arm="a", metric="f1")]
    rows += [dict(row, arm="c", metric="score")]
    numbers = [Published(**one) for one in rows]
    monkeypatch.setattr("compendium.experiment.study.published_numbers", lambda chapter: numbers)
    experiment = study()
    experiment.run(train, ["a", "b"])
    assert [bool(ours) for ours in experiment.published().ours] == [True, False, False]
    assert "nan" not in pages.published_section(experiment.record())


# W&B


def test_the_mode_follows_environment_and_login(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tracking_mode() == "offline"
    login = tmp_path / ".netrc"
    login.write_text("machine api.wandb.ai login user password 0123456789\n")
    login.chmod(0o600)
    assert tracking_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert tracking_mode() == "disabled"


def test_runs_are_mirrored_offline(study, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    experiment = study()
    experiment.seeds = [0]
    experiment.run(train, ["a", "b"])
    experiment.finish()
    record = load_record(tmp_path / "run" / "record.json")
    assert len(set(record.wandb)) == 3, "two arms and the record"
    stored = {
        path.stem.removeprefix("run-") for path in (tmp_path / "run" / "wandb").rglob("*.wandb")
    }
    assert stored == set(record.wandb)


def test_a_mirror_that_breaks_does_not_change_the_result(study, monkeypatch, tmp_path):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(
        wandb, "init", lambda **_: (_ for _ in ()).throw(ConnectionError("unreachable"))
    )
    broken, plain = study(), study()
    with pytest.warns(UserWarning, match="W&B is put away"):
        broken.run(train, ["a", "b"])
        broken.finish()
    plain.tracker._broken = True
    plain.run(train, ["a", "b"])
    assert broken.record().same_results(plain.record())
    assert (tmp_path / "run" / "record.json").exists()


class StandInApi:
    """An object with the part of the shape of `wandb.Api` that is used; no server is asked."""

    def __init__(self, runs: list[SimpleNamespace]) -> None:
        self.asked, self._runs = [], runs

    def runs(self, path, filters, order):
        self.asked.append((path, filters, order))
        return self._runs


def wandb_run(record, folder: Path) -> SimpleNamespace:
    def file(name: str) -> SimpleNamespace:
        return SimpleNamespace(
            download=lambda root, replace: Path(root, name).write_bytes(
                (folder / name).read_bytes()
            )
        )

    return SimpleNamespace(id="abc", summary={"record": record.model_dump_json()}, file=file)


def test_reports_from_wandb_equal_those_from_local_records(study, tmp_path, monkeypatch):
    """Against a stand-in with the shape of `wandb.Api`, not against a server."""
    import matplotlib.pyplot as plt

    experiment = study()
    experiment.run(train, ["a", "b"])
    figure, axes = plt.subplots()
    axes.plot([1, 2])
    experiment.save_figure(figure, "line", "A line.")
    experiment.finish()
    record = load_record(tmp_path / "run" / "record.json")
    api = StandInApi([wandb_run(record, tmp_path / "run")])
    written = {}
    for source in ("local", "wandb"):
        home = tmp_path / source
        home.mkdir()
        monkeypatch.setenv("COMPENDIUM_ROOT", str(home))
        if source == "local":
            assert pages.publish(tmp_path / "run")
        else:
            pages.adopt_from_wandb("team/compendium", api)
        written[source] = {
            path.relative_to(home): path.read_bytes()
            for path in home.rglob("*.*")
            if path.is_file()
        }
    assert written["local"] == written["wandb"]
    assert len(written["local"]) == 4, "record, page, PNG, SVG"
    assert api.asked[0][:2] == ("team/compendium", {"jobType": "record"})


def test_a_project_without_valid_records_is_refused():
    with pytest.raises(RecordError, match="ENTITY/PROJECT"):
        records_from_wandb("compendium", StandInApi([]))
    bad = SimpleNamespace(id="abc", summary={"record": json.dumps({"chapter": "flat"})})
    with pytest.raises(RecordError, match="run abc of 'team/compendium' holds no valid record"):
        records_from_wandb("team/compendium", StandInApi([bad]))
