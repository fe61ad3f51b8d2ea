"""Chapters as Slurm jobs: the translation of needs, the words for failures, and a real Slurm (make slurm-test)."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest
from one_node_slurm import installed, one_node_slurm

from compendium.catalogue import catalogue
from compendium.experiment.config import ConfigError
from compendium.runner import slurm as module
from compendium.runner.execute import reserved_gpu
from compendium.runner.plan import Job, Needs, needs_of, plan_job
from compendium.runner.slurm import QueueWatch, explanation, log_folder_of, resources
from compendium.runner.warm import kernel_environment

LOST = Job("flat", "smoke", key="0" * 12, zoo=("bert-en",))


@pytest.fixture
def planned(small_checkout, monkeypatch):
    """Plan `flat` with the needs `declared` in its metadata, a preset and settings."""
    monkeypatch.setenv("COMPENDIUM_ROOT", str(small_checkout.folder))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    path = small_checkout.write("flat")

    def make(declared=None, preset="mini", **settings) -> Job:
        notebook = json.loads(path.read_text())
        notebook["metadata"]["compendium"] = {"needs": declared} if declared else {}
        path.write_text(json.dumps(notebook))
        return plan_job(catalogue()["flat"], preset, **settings)

    return make


def test_declared_needs_become_resources_and_the_command_line_comes_first(planned):
    usual = planned()
    assert resources(usual) == {
        "gpu": 0,
        "mem_mb": 4000,
        "runtime": 25,  # the time limit of mini, and ten minutes to spare
        "cpus_per_task": 1,
        "slurm_partition": "",
        "slurm_account": "",
    }
    declared = {"memory_gb": 6.5, "benchmark": {"minutes": 90, "cores": 3, "partition": "long"}}
    assert resources(planned(declared))["mem_mb"] == 6500
    large = planned(declared, "benchmark", device="cuda")
    assert resources(large) == {
        "gpu": 1,
        "mem_mb": 6500,
        "runtime": 100,
        "cpus_per_task": 3,
        "slurm_partition": "long",
        "slurm_account": "",
    }
    asked = {"partition": "a100", "account": "nlp", "memory_gb": 40, "cores": None}
    told = resources(planned(declared, "benchmark", time_limit=60, needs=asked))
    assert (told["slurm_partition"], told["slurm_account"], told["mem_mb"]) == (
        "a100",
        "nlp",
        40000,
    )
    assert (told["runtime"], told["gpu"], told["cpus_per_task"]) == (11, 0, 3)
    assert usual.key == planned(declared).key == planned().key, "needs change no result"


def test_without_a_time_limit_slurm_is_not_given_one(planned):
    assert resources(planned(preset="paper"))["runtime"] == 0


def test_a_job_keeps_its_needs_in_its_file(planned, small_checkout):
    job = planned({"memory_gb": 7})
    job.save()
    assert Job.load(small_checkout.folder / job.file) == job


@pytest.mark.parametrize(
    ("declared", "sentence"),
    [
        ({"memory_gb": 0}, "need 'memory_gb' wants a positive number, not 0"),
        ({"memory_gb": "24"}, "need 'memory_gb' wants a positive number, not '24'"),
        ({"cores": 1.5}, "need 'cores' wants a positive number, not 1.5"),
        ({"cores": True}, "need 'cores' wants a positive number, not True"),
        ({"minutes": -1}, "need 'minutes' wants a positive number, not -1"),
        ({"partition": 3}, "need 'partition' wants a name, not 3"),
        ({"memory": 24}, "need 'memory' is unknown; did you mean 'memory_gb'?"),
        ({"mini": {"core": 2}}, "need 'core' is unknown; did you mean 'cores'?"),
        ({"benchmrk": {"cores": 2}}, "need 'benchmrk' is unknown; did you mean 'benchmark'?"),
    ],
)
def test_a_mistake_in_the_needs_is_one_sentence(declared, sentence):
    with pytest.raises(ConfigError, match=f"^{re.escape(sentence)}"):
        needs_of(declared, "mini")


def test_checkpoints_go_where_the_chapters_go_that_need_them():
    jobs = [LOST, Job("udr", "mini", zoo=("gpt-en",), needs=Needs(partition="a100", account="nlp"))]
    asked = module.zoo_resources("gpt-en", jobs)
    assert (asked["slurm_partition"], asked["slurm_account"]) == ("a100", "nlp")
    assert module.zoo_resources("bert-en", jobs)["slurm_partition"] == ""


def test_on_a_node_slurm_hands_out_cores_and_gpus(monkeypatch, tmp_path):
    monkeypatch.setenv("COMPENDIUM_ROOT", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    job = Job("flat", "benchmark", device="cuda", gpus=1)
    assert kernel_environment(job.preset, job.gpus, tmp_path)["OMP_NUM_THREADS"] == "3"
    with reserved_gpu(job) as here:
        assert here == {"CUDA_VISIBLE_DEVICES": "0"}
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with reserved_gpu(job) as one, reserved_gpu(job) as other:  # as on two nodes
        assert one == other == {}


def submitted(number: int, folder) -> str:
    """Snakemake's line about a submitted job."""
    return f"Job 1 has been submitted with SLURM jobid {number} (log: {folder}/{number}.log).\n"


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ("CANCELLED", "its Slurm job 17 was cancelled"),
        ("TIMEOUT", "its Slurm job 17 reached Slurm's time limit; raise it with --time-limit"),
        ("OUT_OF_MEMORY", "its Slurm job 17 ran out of 4 GB; ask for more with --memory-gb"),
        ("BOOT_FAIL", "its Slurm job 17 ended as BOOT_FAIL"),
        ("", "it was not run; the log of the batch says why"),
    ],
)
def test_what_only_slurm_knows_is_a_sentence(state, sentence, monkeypatch, tmp_path):
    monkeypatch.setenv("COMPENDIUM_ROOT", str(tmp_path))
    monkeypatch.setattr(module, "slurm_state", {"17": state}.__getitem__)
    batch = submitted(12, log_folder_of(LOST)) + submitted(17, log_folder_of(LOST))
    assert explanation(LOST, batch) == sentence
    assert module.slurm_log(LOST, batch) is None
    log = log_folder_of(LOST) / "17.log"
    log.parent.mkdir(parents=True)
    log.write_text("flat: another batch is running this chapter [here]\nEnded.\n")
    assert explanation(LOST, batch) == "another batch is running this chapter [here]"
    assert module.slurm_log(LOST, batch) == log


def test_a_checkpoint_that_failed_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("COMPENDIUM_ROOT", str(tmp_path))
    monkeypatch.setattr(module, "slurm_state", {"9": "CANCELLED"}.__getitem__)
    batch = submitted(9, module.log_folder() / "rule_zoo_bert_en")
    assert explanation(LOST, batch) == "checkpoint 'bert-en': its Slurm job 9 was cancelled"


def test_states_of_sacct_are_understood(monkeypatch):
    answers = {"squeue": "", "sacct": "CANCELLED by 1000\n"}
    monkeypatch.setattr(module, "_ask", lambda command, *_: answers[command])
    assert module.slurm_state("17") == "CANCELLED"


def test_the_batch_is_over_when_all_jobs_have_left_the_queue(monkeypatch, tmp_path):
    monkeypatch.setenv("COMPENDIUM_ROOT", str(tmp_path))
    queue, log = {"17": "Resources"}, tmp_path / "batch.log"
    monkeypatch.setattr(module, "queued", lambda: queue)
    log.write_text("")
    state = ["COMPLETED"]
    monkeypatch.setattr(module, "slurm_state", lambda number: state[0])
    patient = QueueWatch([LOST], log, every=0)
    assert not patient.over(), "not submitted yet"
    log.write_text(submitted(17, log_folder_of(LOST)))
    assert not patient.over(), "in the queue"
    queue.clear()
    assert not patient.over(), "its result may still be on its way through the shared folder"
    state[0] = "CANCELLED"
    assert QueueWatch([LOST], log, every=0).over(), "there will be no result"
    folder = tmp_path / LOST.folder
    folder.mkdir(parents=True)
    (folder / "status.json").write_text("{}")
    assert patient.over()


def test_jobs_that_can_never_start_are_cancelled_and_say_why(monkeypatch, tmp_path):
    monkeypatch.setenv("COMPENDIUM_ROOT", str(tmp_path))
    commands = []
    monkeypatch.setattr(module, "_ask", lambda *command: commands.append(command) or "")
    zoo = module.log_folder() / "rule_zoo_bert_en"
    batch = submitted(17, log_folder_of(LOST)) + submitted(18, zoo)
    for folder in (log_folder_of(LOST), zoo):
        folder.mkdir(parents=True)
    module.give_up([LOST], batch, {"17": "Resources", "18": "PartitionTimeLimit", "3": "Priority"})
    assert commands == [("scancel", "18")]
    assert explanation(LOST, batch) == (
        "checkpoint 'bert-en': its Slurm job 18 can never start here (PartitionTimeLimit); "
        "ask for less, or another partition"
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--executor", "slurm"], "the command 'sbatch' is not here"),
        (["--executor", "slrum"], "executor 'slrum' is unknown; did you mean 'slurm'?"),
        (["--memory-gb", "8"], "--memory-gb wants --executor slurm"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(small_checkout, arguments, sentence):
    small_checkout.write("flat")
    answer = small_checkout.compendium("run", "flat", *arguments, PATH="/nowhere")
    assert answer.returncode == 2
    assert sentence in re.sub(r"[\s│]+", " ", answer.stderr)


# A real Slurm


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    """The environment variables of a running one-node Slurm."""
    if not installed() and not os.environ.get("COMPENDIUM_SLURM_TEST"):
        pytest.skip("there is no Slurm on this machine; `make slurm-test` brings one along")
    with one_node_slurm() as variables:
        yield dict(variables)


class Cluster:
    """A small checkout on the one-node Slurm."""

    def __init__(self, checkout, slurm: dict[str, str]) -> None:
        self.checkout, self.slurm = checkout, slurm
        self.batches: list[subprocess.Popen] = []

    def command(self, *command: str) -> str:
        """What a Slurm command prints."""
        return subprocess.run(
            command, env=os.environ | self.slurm, capture_output=True, text=True, check=True
        ).stdout

    def start(self, *arguments: str) -> subprocess.Popen:
        """Begin `compendium run` with Slurm as the executor."""
        batch = subprocess.Popen(
            self.checkout.command("run", "--executor", "slurm", *arguments),
            cwd=self.checkout.folder,
            env=self.checkout.environment(**self.slurm),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.batches.append(batch)
        return batch

    def run(self, *arguments: str) -> tuple[int, dict[str, str], str]:
        """The exit status, the lines of the table by chapter, and the errors of `compendium run`."""
        return self.result(self.start(*arguments))

    def result(self, batch: subprocess.Popen) -> tuple[int, dict[str, str], str]:
        """What became of a `batch` that was started."""
        output, errors = batch.communicate(timeout=200)
        rows = output.partition("chapter  state")[2].partition("\n\n")[0].splitlines()[1:]
        return batch.returncode, {row.split()[0]: row for row in rows if row.strip()}, errors

    def jobs(self, form: str) -> dict[str, list[str]]:
        """Chapter -> a line of `squeue` in the format `form` for each of its jobs, also ended ones.

        A chapter should run in one test only: the queue remembers it.
        """
        found: dict[str, list[str]] = {}
        for line in self.command(
            "squeue", "--states=all", "-h", f"--format=%k@{form}"
        ).splitlines():
            comment, _, told = line.partition("@")
            found.setdefault(comment.rpartition("_")[2].partition("-")[0], []).append(told)
        return found


@pytest.fixture
def cluster(small_checkout, slurm) -> Iterator[Cluster]:
    """A `Cluster` whose batches and jobs are ended afterwards."""
    here = Cluster(small_checkout, slurm)
    yield here
    for batch in here.batches:
        batch.kill()
    subprocess.run(["scancel", "--me"], env=os.environ | slurm, capture_output=True)


def wait_until(condition, seconds: float = 120.0) -> None:
    """Wait until `condition()` is true; fails the test after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.5)


WAITS = "import os, time\nwhile not os.path.exists(GO):\n    time.sleep(0.5)"


def test_three_chapters_one_cancelled_midway_and_the_rerun_completes_it(cluster):
    folder, runs = cluster.checkout.folder, cluster.checkout.folder / ".compendium/runs/smoke"
    cluster.checkout.write("flat")
    cluster.checkout.write("mccws", "raise ValueError('the lexicon is empty')")
    cluster.checkout.write("udr", WAITS.replace("GO", repr(str(folder / "go"))))
    smoke = ("--preset", "smoke", "--partition", "gpu", "--account", "nlp")
    batch = cluster.start(*smoke, "--memory-gb", "2")
    wait_until(lambda: list(runs.glob("udr-*.part-*/cell.txt")))  # its notebook runs
    (line,) = cluster.jobs("%i %T %m %C %l %b %P %a")["udr"]
    number, *told = line.split()
    assert told == ["RUNNING", "2000M", "1", "15:00", "N/A", "gpu", "nlp"]
    cluster.command("scancel", number)
    status, rows, errors = cluster.result(batch)
    assert (status, errors) == (1, "")
    assert f"its Slurm job {number} was cancelled" in rows["udr"]
    assert "cell 4: ValueError: the lexicon is empty" in rows["mccws"]
    assert rows["flat"].split()[1] == "done", "the others finish"
    for chapter, row in rows.items():
        log = folder / row.split()[-1]
        assert log.parts[-4:-2] == ("slurm", "rule_chapter") and log.suffix == ".log", chapter
        assert f"{chapter}-" in log.read_text()

    made = (cluster.checkout.runs("smoke")[0] / "record.json").stat().st_mtime_ns
    (folder / "go").touch()
    cluster.checkout.write("mccws")
    status, rows, errors = cluster.run(*smoke)
    assert (status, errors) == (0, ""), rows
    assert [rows[name].split()[1] for name in ("mccws", "udr")] == ["done", "done"]
    assert "up to date" in rows["flat"]
    flat, *_ = cluster.checkout.runs("smoke")
    assert (flat / "record.json").stat().st_mtime_ns == made
    assert {name: len(jobs) for name, jobs in cluster.jobs("%i").items()} == {
        "flat": 1,
        "mccws": 2,
        "udr": 2,
    }, "the second call submits only what is missing"

    status, rows, _ = cluster.run(*smoke)
    assert status == 0 and all("up to date" in row for row in rows.values())
    assert sum(map(len, cluster.jobs("%i").values())) == 5, "the third call submits nothing"


def test_a_gpu_preset_asks_for_a_gpu(cluster):
    cluster.checkout.write("aor")
    arguments = ("--preset", "benchmark", "--cores", "2", "--partition", "gpu")
    status, rows, errors = cluster.run("aor", *arguments)
    assert errors == ""
    (number,) = cluster.jobs("%i")["aor"]
    told = cluster.command("scontrol", "show", "job", number)
    assert "TresPerJob=gres:gpu:1" in told
    assert "NumCPUs=2" in told and "TimeLimit=01:10:00" in told
    assert status == 1, "this node has a GPU on paper only"
    assert "ConfigError: device 'cuda' was asked for, but torch sees no GPU" in rows["aor"]


def test_what_slurm_refuses_is_one_line(cluster):
    cluster.checkout.write("flat")
    status, rows, errors = cluster.run("--preset", "smoke", "--partition", "nowhere")
    assert (status, errors) == (1, "")
    assert "Slurm refused its job: invalid partition specified: nowhere" in rows["flat"]


def test_a_job_that_can_never_start_does_not_wait_for_ever(cluster):
    cluster.checkout.write("cnn_ner")
    status, rows, errors = cluster.run("--preset", "smoke", "--time-limit", "7200")
    assert (status, errors) == (1, "")
    assert "can never start here (PartitionTimeLimit); ask for less" in rows["cnn_ner"]


def test_jobs_end_with_the_batch_and_those_of_a_killed_batch_with_the_next(cluster):
    cluster.checkout.write("udr", "import time; time.sleep(600)")

    def alive() -> list[str]:
        return cluster.command("squeue", "--me", "-h", "--format=%i").split()

    first = cluster.start("--preset", "smoke")
    wait_until(alive)
    before = alive()
    first.kill()
    first.communicate()
    time.sleep(2)
    assert alive() == before, "nobody could end it"
    second = cluster.start("--preset", "smoke")
    wait_until(lambda: alive() and alive() != before)
    assert not set(alive()) & set(before), "the next batch ends it first"
    second.send_signal(signal.SIGINT)
    _, errors = second.communicate(timeout=90)
    assert second.returncode == 130
    assert errors.strip() == "compendium: interrupted; what was finished is kept"
    assert alive() == []
