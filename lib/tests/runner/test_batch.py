"""The promises of the batch, kept by the real command line on small chapters."""

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest

from compendium.runner.execute import SLOTS, slot

SECRET = "sk-3f9a1c77e5b2d8040a6e"


def records(checkout) -> dict[str, float]:
    """Chapter -> modification time of its run's record."""
    return {
        run.name.partition("-")[0]: (run / "record.json").stat().st_mtime_ns
        for run in checkout.runs()
    }


def processes_of(folder: Path) -> list[psutil.Process]:
    """The processes whose command line or working folder names `folder`."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd", "environ"]):
        environment = process.info["environ"] or {}
        if environment.get("COMPENDIUM_ROOT") == str(folder) and process.pid != os.getpid():
            found.append(process)
    return found


def wait_until(condition, seconds: float = 60.0) -> None:
    """Wait until `condition()` is true; fails the test after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.1)


def test_results_repeat_to_the_last_bit_and_are_made_once(small_checkout):
    notebook = small_checkout.write("flat")
    first = small_checkout.compendium("run", "flat")
    assert first.returncode == 0, first.stderr
    assert "C1 ✅" in first.stdout
    report = small_checkout.folder / "reports" / "mini" / "flat" / "record.json"
    before, made = json.loads(report.read_text()), records(small_checkout)

    # The prose may change without a repetition; so may the file's time.
    cells = json.loads(notebook.read_text())
    cells["cells"].insert(
        0, {"cell_type": "markdown", "id": "prose", "metadata": {}, "source": "Prose."}
    )
    notebook.write_text(json.dumps(cells))
    second = small_checkout.compendium("run", "flat")
    assert "up to date" in second.stdout
    assert "same as committed" in second.stdout
    assert records(small_checkout) == made

    forced = small_checkout.compendium("run", "flat", "--force")
    assert forced.returncode == 0, forced.stderr
    assert records(small_checkout) != made
    assert "same as committed" in forced.stdout
    again = json.loads((small_checkout.runs()[0] / "record.json").read_text())
    assert [run["metrics"] for run in again["arms"]["more"]] == [
        run["metrics"] for run in before["arms"]["more"]
    ]
    assert json.loads(report.read_text()) == before, (
        "equal results must leave the committed report alone"
    )


def test_every_kind_of_failure_is_named_and_the_others_finish(small_checkout):
    small_checkout.write("flat")
    small_checkout.write("mccws", "raise ValueError('the lexicon is empty')")
    small_checkout.write("cnn_ner", "import time; time.sleep(600)")
    small_checkout.write("udr", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    small_checkout.write("dore", "def broken(:")
    small_checkout.write("aor", "1 + 1", toy=False)
    answer = small_checkout.compendium("run", "--time-limit", "40", "--jobs", "3")
    assert answer.returncode == 1
    lines = {line.split()[0]: line for line in answer.stdout.splitlines() if line.strip()}
    assert "C1 ✅" in lines["flat"]
    assert "cell 4: ValueError: the lexicon is empty" in lines["mccws"]
    assert "time limit of 40 s" in lines["cnn_ner"]
    assert "the kernel was killed" in lines["udr"]
    assert "SyntaxError" in lines["dore"]
    assert "left no record" in lines["aor"]
    named = Path(lines["mccws"].rpartition("[")[2].rstrip("] "))
    assert "the lexicon is empty" in named.read_text(), "the executed notebook shows the error"
    assert [run.name.partition("-")[0] for run in small_checkout.runs()] == ["flat"]


def test_kill_at_any_moment_then_the_same_command(small_checkout):
    small_checkout.write("flat")
    small_checkout.write("udr", "import time; time.sleep(15)")
    batch = subprocess.Popen(
        small_checkout.command("run", "--jobs", "2"),
        cwd=small_checkout.folder,
        env=small_checkout.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: "flat" in records(small_checkout))
    made = records(small_checkout)
    batch.kill()
    batch.wait()
    wait_until(lambda: not processes_of(small_checkout.folder), seconds=15)
    assert records(small_checkout) == made
    answer = small_checkout.compendium("run", "--jobs", "2")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert records(small_checkout)["flat"] == made["flat"], "a finished chapter was run again"
    assert "udr" in records(small_checkout)
    assert not list((small_checkout.folder / ".compendium" / "runs" / "mini").glob("*.part-*"))


@pytest.mark.parametrize("kernels", ["warm", "ordinary"])
def test_who_waits_for_a_slot_ends_with_the_batch(small_checkout, kernels):
    for name in ("flat", "udr", "aor"):
        small_checkout.write(name, "import time; time.sleep(600)")
    batch = subprocess.Popen(
        small_checkout.command("run", "--jobs", "1"),
        cwd=small_checkout.folder,
        env=small_checkout.environment(COMPENDIUM_WARM="" if kernels == "warm" else "off"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    runs = small_checkout.folder / ".compendium" / "runs" / "mini"
    wait_until(lambda: len(list(runs.glob("*.lock"))) == 3 and list(runs.glob("*/cell.txt")))
    batch.kill()
    batch.wait()
    wait_until(lambda: not processes_of(small_checkout.folder), seconds=15)
    assert list(runs.glob("*/record.json")) == []


def test_interrupt_ends_everything_below(small_checkout):
    small_checkout.write("udr", "import time; time.sleep(600)")
    batch = subprocess.Popen(
        small_checkout.command("run"),
        cwd=small_checkout.folder,
        env=small_checkout.environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # the suite may ignore it
    )
    progress = small_checkout.folder / ".compendium" / "runs" / "mini"
    wait_until(lambda: list(progress.glob("udr-*.part-*/cell.txt")))
    batch.send_signal(signal.SIGINT)
    _, errors = batch.communicate(timeout=30)
    assert batch.returncode != 0
    assert errors.strip() == "compendium: interrupted; what was finished is kept"
    wait_until(lambda: not processes_of(small_checkout.folder), seconds=15)


def test_secrets_reach_no_file(small_checkout):
    small_checkout.write("flat", "import os; print(os.environ['WANDB_API_KEY'])")
    small_checkout.write("udr", "import os; raise ValueError(os.environ['HF_TOKEN'])")
    answer = small_checkout.compendium(
        "run", WANDB_API_KEY=SECRET, HF_TOKEN=SECRET, WANDB_MODE="offline"
    )
    assert answer.returncode == 1
    assert "ValueError: [secret]" in answer.stdout
    assert SECRET not in answer.stdout + answer.stderr
    files = [path for path in small_checkout.folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files), "W&B has recorded the runs offline"
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    assert any(b"[secret]" in path.read_bytes() for path in files if path.name == "notebook.ipynb")


def test_a_second_batch_waits_its_turn(small_checkout):
    from compendium.runner.execute import locked

    small_checkout.write("flat")
    with locked(small_checkout.folder / ".compendium" / "batch.lock") as free:
        assert free
        answer = small_checkout.compendium("run", "flat")
    assert answer.returncode == 2
    assert "another batch is running in this checkout" in answer.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "flatt"], "chapter 'flatt' is unknown; did you mean 'flat'?"),
        (["run", "udr"], "chapter 'udr' is not written yet"),
        (["run", "flat", "--preset", "mimi"], "preset 'mimi' is unknown; did you mean 'mini'?"),
        (["show", "flat"], "no report of 'flat' with preset 'mini'"),
        (["new", "flat"], "exists already"),
        (["data", "verify", "weibo"], "did you mean 'weibo_ner'?"),
        (["zoo", "build", "bert"], "zoo model 'bert' is unknown"),
        (["report", "--from-wandb", "nonsense"], "wants the form ENTITY/PROJECT"),
    ],
)
def test_a_mistake_gets_one_sentence(small_checkout, arguments, sentence):
    small_checkout.write("flat")
    answer = small_checkout.compendium(*arguments)
    assert answer.returncode == 2
    assert sentence in answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1


def test_a_setting_without_equals_sign_is_a_usage_error(small_checkout):
    small_checkout.write("flat")
    answer = small_checkout.compendium("run", "flat", "--set", "epochs")
    assert answer.returncode == 2
    assert "field=value" in answer.stderr


def test_an_unknown_field_is_named_with_the_nearest(small_checkout):
    small_checkout.write("flat")
    answer = small_checkout.compendium("run", "flat", "--set", "noize=0.2")
    assert answer.returncode == 1
    assert "ConfigError: field of Toy 'noize' is unknown; did you mean 'noise'?" in answer.stdout


def test_an_override_reaches_the_chapter_but_not_the_committed_report(small_checkout):
    small_checkout.write("flat")
    answer = small_checkout.compendium("run", "flat", "--set", "noise=0.25")
    assert answer.returncode == 0, answer.stdout
    record = json.loads((small_checkout.runs()[0] / "record.json").read_text())
    assert record["config"]["noise"] == 0.25
    assert record["overrides"] == {"noise": 0.25}
    assert not (small_checkout.folder / "reports" / "mini" / "flat").exists()


def test_a_damaged_notebook_is_one_sentence(small_checkout):
    small_checkout.write("flat").write_text('{"cells": [')
    answer = small_checkout.compendium("run", "flat")
    assert answer.returncode == 2
    assert "is not a notebook" in answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1


def test_a_work_folder_that_cannot_be_written_is_one_sentence(small_checkout):
    small_checkout.write("flat")
    (small_checkout.folder / ".compendium").write_text("in the way")
    answer = small_checkout.compendium("run", "flat")
    assert answer.returncode == 2
    assert "cannot write" in answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1


def test_a_damaged_record_is_made_again(small_checkout):
    small_checkout.write("flat")
    assert small_checkout.compendium("run", "flat", "--preset", "smoke").returncode == 0
    path = small_checkout.runs("smoke")[0] / "record.json"
    path.write_text(path.read_text()[:-100])
    answer = small_checkout.compendium("run", "flat", "--preset", "smoke")
    assert answer.returncode == 0, answer.stderr
    assert "done" in answer.stdout
    assert json.loads(path.read_text())["chapter"] == "flat"


def test_a_damaged_committed_record_is_one_sentence(small_checkout):
    small_checkout.write("flat")
    path = small_checkout.folder / "reports" / "mini" / "flat" / "record.json"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    answer = small_checkout.compendium("report")
    assert answer.returncode == 2
    assert "is damaged" in answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1


def test_folders_named_relative_to_the_caller_reach_the_chapter(small_checkout):
    cell = "import os; assert os.path.isdir(os.environ['COMPENDIUM_DATA']), os.environ['COMPENDIUM_DATA']"
    small_checkout.write("flat", cell)
    (small_checkout.folder / "here").mkdir()
    answer = small_checkout.compendium("run", "flat", "--preset", "smoke", COMPENDIUM_DATA="here")
    assert answer.returncode == 0, answer.stdout


TIMES = """
import pathlib, time
began = time.time()
time.sleep(1)
pathlib.Path({folder!r}, {name!r}).write_text(f"{{began}} {{time.time()}}")
"""


@pytest.mark.parametrize("at_a_time", [1, 2])
def test_no_more_chapters_run_than_asked(small_checkout, tmp_path, at_a_time):
    names = ["flat", "udr", "aor", "mccws"]
    (tmp_path / "times").mkdir()
    for name in names:
        small_checkout.write(name, TIMES.format(folder=str(tmp_path / "times"), name=name))
    answer = small_checkout.compendium("run", "--jobs", str(at_a_time))
    assert answer.returncode == 0, answer.stderr
    spans = [tuple(map(float, (tmp_path / "times" / name).read_text().split())) for name in names]
    together = [sum(begin <= moment < end for begin, end in spans) for moment, _ in spans]
    assert max(together) == at_a_time


def test_a_slot_is_waited_for_and_given_back(small_checkout, monkeypatch):
    monkeypatch.setenv("COMPENDIUM_ROOT", str(small_checkout.folder))
    monkeypatch.setenv(SLOTS, "1")
    done = threading.Event()

    def second() -> None:
        with slot():
            done.set()

    thread = threading.Thread(target=second)
    with slot():
        thread.start()
        assert not done.wait(0.3)
    assert done.wait(10)
    thread.join()
    monkeypatch.delenv(SLOTS)
    with slot(), slot():  # outside a batch there is nothing to wait for
        pass
