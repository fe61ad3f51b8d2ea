"""Warm kernels: what is forked is as good as new, nothing is left behind, and nothing is shared by accident."""

import asyncio
import contextlib
import json
import os
import queue
import re
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
from jupyter_client import AsyncKernelManager

from compendium.runner import warm
from compendium.runner.plan import Job
from compendium.runner.provisioner import settings
from compendium.runner.warm import (
    THREADS,
    VARIABLE,
    NotWarm,
    WarmParent,
    declared_imports,
    kernel_environment,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux only")
SETTINGS = kernel_environment("smoke", 0, Path("run")) | dict.fromkeys(THREADS, "1")


def wait_until(condition, seconds: float = 60.0) -> None:
    """Wait until `condition()` is true; fails the test after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether the process exists and is more than a zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def parent():
    """A warm parent that has imported torch."""
    parent = WarmParent()
    parent.load([("torch", ()), ("statistics", ("mean",))], SETTINGS)
    yield parent
    assert parent.problem() == ""
    parent.close()


class Kernels:
    """Starts kernels through `jupyter_client` as the runner does, and ends them."""

    def __init__(self, parent: WarmParent, folder: Path) -> None:
        self.parent, self.folder, self.managers = parent, folder, []

    def start(self, **changes: str):
        """A new kernel, its manager and its client."""
        from jupyter_client.manager import KernelManager

        sockets = tempfile.mkdtemp(dir=self.parent.folder)
        manager = KernelManager(kernel_name="python3", config=settings(sockets, warm=True))
        manager.start_kernel(cwd=str(self.folder), env=os.environ | changes)
        client = manager.client()
        client.start_channels()
        self.managers.append((manager, client))
        client.wait_for_ready(timeout=120)
        return manager, client

    def end(self) -> None:
        for manager, client in self.managers:
            client.stop_channels()
            manager.shutdown_kernel(now=True)


@pytest.fixture
def kernels(parent, tmp_path, monkeypatch):
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(VARIABLE, str(parent.folder))
    kernels = Kernels(parent, tmp_path)
    yield kernels
    kernels.end()


def value_of(client, expression: str):
    """The value of `expression` in the kernel, through JSON."""
    code = f"import json, os, sys; print(json.dumps({expression}))"
    text = []
    client.execute_interactive(
        code,
        timeout=60,
        output_hook=lambda message: text.append(message["content"].get("text", "")),
    )
    return json.loads("".join(text))


def pid_of(manager) -> int:
    return manager.provisioner.pid


def test_the_imports_are_those_that_chapters_declare():
    cells = [
        "import numpy as np\nfrom transformers import AutoModel, AutoConfig\nimport compendium.chinese.flat",
        "%matplotlib inline\ndef late():\n    import faiss",
        "optimizer = torch.optim.AdamW(parameters)",
        "from compendium.experiment.study import Experiment",
        "from compendium.chinese.flat import Flat",
        "broken(",
    ]
    found = declared_imports([cells])
    assert ("numpy", ()) in found
    assert ("transformers", ("AutoModel", "AutoConfig")) in found
    assert ("compendium.experiment.study", ("Experiment",)) in found
    modules = {module for module, _ in found}
    assert "pandas" in modules, "a foundation imports it late, but every chapter needs it"
    assert "compendium.experiment.claims" in modules, "a relative import of a foundation"
    assert "torch._dynamo" in modules, "an optimizer imports it late"
    assert not modules & {"faiss", "compendium.chinese.flat"}
    assert not any(module.startswith("compendium.chinese") for module in modules)
    assert len(found) == len(set(found))


def test_what_few_chapters_import_does_not_let_the_others_wait():
    cells = [["import numpy", "import networkx"], *[["import numpy"]] * 3, ["import numpy"]]
    modules = [module for module, _ in declared_imports(cells)]
    assert modules == ["numpy"], "neither networkx nor, without an optimizer, torch._dynamo"
    assert "networkx" in {module for module, _ in declared_imports(cells[:4])}


def test_the_environment_may_differ_only_where_it_is_read_late():
    ours = {
        "HF_HUB_OFFLINE": "1",
        "COMPENDIUM_ROOT": "a",
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": "1",
    }
    assert warm.differing(ours, ours | {"COMPENDIUM_ROOT": "b", "WANDB_MODE": "offline"}) == []
    assert warm.differing(ours, ours | {"TMPDIR": "/scratch"}) == []
    assert warm.differing(ours, ours | {"OMP_NUM_THREADS": "4", "JPY_PARENT_PID": "7"}) == []
    assert warm.differing(ours, ours | {"PYTHONPATH": "x"}) == ["PYTHONPATH"]
    other = {"COMPENDIUM_ROOT": "a", "OMP_NUM_THREADS": "1", "SLURM_JOB_ID": "2"}
    assert warm.differing(ours, other) == ["HF_HUB_OFFLINE", "SLURM_JOB_ID"]


def test_a_process_with_threads_must_not_fork():
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        with pytest.raises(NotWarm, match=r"threads run after importing torch"):
            warm.check_forkable("torch")
    finally:
        done.set()
        thread.join()


def test_the_parent_is_quiet_and_private(parent, kernels):
    kernels.start()  # all imports have happened
    process = psutil.Process(parent._process.pid)
    assert process.num_threads() == 1
    assert stat.S_IMODE(os.stat(parent.folder).st_mode) == 0o700
    maps = Path(f"/proc/{process.pid}/maps").read_text()
    assert "libtorch_cpu" in maps and "libcuda.so" not in maps
    assert process.net_connections(kind="inet") == []
    assert not [file for file in process.open_files() if file.path.startswith("/dev/nvidia")]


def test_each_kernel_has_its_own_of_everything(kernels):
    (one, first), (two, second) = (
        kernels.start(COMPENDIUM_RUN_DIR="one"),
        kernels.start(COMPENDIUM_RUN_DIR="two", OMP_NUM_THREADS="2", TMPDIR=str(kernels.folder)),
    )
    assert {type(manager.provisioner).__name__ for manager in (one, two)} == {"WarmProvisioner"}
    assert (
        value_of(first, "os.getpid()")
        == pid_of(one)
        != pid_of(two)
        == value_of(second, "os.getpid()")
    )
    assert value_of(first, "[os.getsid(0), os.getpgrp()]") == [pid_of(one)] * 2
    assert value_of(first, "os.getcwd()") == str(kernels.folder)
    assert value_of(first, "os.environ['COMPENDIUM_RUN_DIR']") == "one"
    assert value_of(second, "os.environ['COMPENDIUM_RUN_DIR']") == "two"
    assert value_of(first, f"os.environ.get({VARIABLE!r})") is None
    assert value_of(second, "__import__('tempfile').gettempdir()") == str(kernels.folder)
    assert value_of(first, "[name for name in ('torch', 'statistics') if name in sys.modules]") == [
        "torch",
        "statistics",
    ]
    for drawn in (
        "__import__('random').random()",
        "__import__('numpy').random.rand()",
        "__import__('torch').rand(()).item()",
        "__import__('uuid').uuid4().hex",
        "__import__('tempfile').mktemp()",
    ):
        assert value_of(first, drawn) != value_of(second, drawn), drawn
    threads = "__import__('torch').get_num_threads()"
    assert [value_of(first, threads), value_of(second, threads)] == [1, 2]
    third, _ = kernels.start()
    assert third.provisioner.process.pid != pid_of(two)


def test_messages_travel_through_no_port(kernels):
    manager, _ = kernels.start()
    # ipykernel's own pipe for what forked subprocesses print stays; it takes only what has its key.
    ports = psutil.Process(pid_of(manager)).net_connections(kind="inet")
    assert len(ports) <= 1 and all(port.laddr.ip == "127.0.0.1" for port in ports)
    assert manager.connection_file.startswith(str(kernels.parent.folder))
    info = manager.get_connection_info()
    assert info["transport"] == "ipc"
    for channel in ("shell", "iopub", "stdin", "control", "hb"):
        assert stat.S_ISSOCK(os.stat(f"{info['ip']}-{info[f'{channel}_port']}").st_mode)
    assert os.stat(Path(info["ip"]).parent).st_mode & 0o777 == 0o700


def test_an_interrupt_stops_a_cell_of_one_kernel(kernels):
    (one, first), (_, second) = kernels.start(), kernels.start()
    sleeping = first.execute("import time; time.sleep(600)", stop_on_error=False)
    time.sleep(0.5)
    one.interrupt_kernel()
    answer = first.get_shell_msg(timeout=60)
    while answer["parent_header"].get("msg_id") != sleeping:
        answer = first.get_shell_msg(timeout=60)
    assert answer["content"]["ename"] == "KeyboardInterrupt"
    assert value_of(first, "1 + 1") == value_of(second, "1 + 1") == 2


def test_a_killed_kernel_takes_its_children_and_nobody_else(kernels, parent):
    (one, first), (two, second) = kernels.start(), kernels.start()
    child = value_of(first, "__import__('subprocess').Popen(['sleep', '600']).pid")
    os.kill(pid_of(one), signal.SIGKILL)  # as the system does when memory is short
    wait_until(lambda: not one.is_alive())
    wait_until(lambda: not alive(child))
    assert two.is_alive() and value_of(second, "1 + 1") == 2
    assert parent.problem() == ""
    adjusted = Path(f"/proc/{pid_of(two)}/oom_score_adj").read_text()
    assert int(adjusted) > int(Path(f"/proc/{parent._process.pid}/oom_score_adj").read_text())


def test_a_kernel_with_another_environment_starts_cold(kernels, caplog):
    manager, client = kernels.start(HF_HUB_OFFLINE="0")
    assert isinstance(manager.provisioner.process, subprocess.Popen)
    assert "its environment differs in HF_HUB_OFFLINE" in caplog.text
    assert value_of(client, "'torch' in sys.modules") is False


def test_a_lost_client_is_a_lost_child(parent, tmp_path):
    job = Job("flat", "smoke").file
    program = "from compendium.runner.warm import Forked; import os, time\n"
    program += f"print(Forked('kernel', ['-f', {str(tmp_path / 'k.json')!r}], '.', os.environ).pid, flush=True)\n"
    program += "time.sleep(600)"
    environment = os.environ | SETTINGS | {VARIABLE: str(parent.folder)}
    client = subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True
    )
    pid = int(client.stdout.readline())
    assert alive(pid), job
    client.kill()
    client.wait()
    wait_until(lambda: not alive(pid))


def test_nothing_is_left_of_a_parent_that_ends(tmp_path, monkeypatch):
    parent = WarmParent()
    parent.load([], SETTINGS)
    for name, value in (SETTINGS | {VARIABLE: str(parent.folder)}).items():
        monkeypatch.setenv(name, value)
    kernels = Kernels(parent, tmp_path)
    manager, client = kernels.start()
    client.stop_channels()
    processes = [parent._process.pid, pid_of(manager)]
    parent.close()
    wait_until(lambda: not any(map(alive, processes)))
    assert not parent.folder.exists()
    assert manager.provisioner.process.poll() == -signal.SIGKILL


def test_children_end_with_a_parent_that_is_killed(tmp_path, monkeypatch):
    parent = WarmParent()
    parent.load([], SETTINGS)
    for name, value in (SETTINGS | {VARIABLE: str(parent.folder)}).items():
        monkeypatch.setenv(name, value)
    manager, client = Kernels(parent, tmp_path).start()
    client.stop_channels()
    os.kill(parent._process.pid, signal.SIGKILL)
    wait_until(lambda: not alive(pid_of(manager)))
    assert manager.provisioner.process.poll() == -signal.SIGKILL
    assert manager.provisioner.process.orphaned
    assert parent.problem() != ""
    parent.close()


NOISY = """
import threading, time
time.sleep({seconds})
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
"""


@pytest.mark.parametrize("seconds", [0, 5])  # before the first job waits, and later
def test_a_library_that_starts_threads_is_named_once(small_checkout, tmp_path, seconds):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "noisy.py").write_text(NOISY.format(seconds=seconds))
    small_checkout.write("flat", "import noisy")
    path = os.pathsep.join([str(tmp_path / "modules"), os.environ.get("PYTHONPATH", "")])
    answer = small_checkout.compendium("run", **{VARIABLE: "", "PYTHONPATH": path})
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "C1 ✅" in answer.stdout
    assert len(answer.stderr.strip().splitlines()) == 1, answer.stderr
    line = answer.stderr.strip()
    assert line == (
        "compendium: ordinary kernels are used: 2 threads run after importing noisy; "
        "a fork would lose all but one"
    )


def test_an_installation_without_the_entry_point_is_told(monkeypatch):
    monkeypatch.setattr(warm, "PROVISIONER", "not-registered")
    with pytest.raises(NotWarm, match="pip install"):
        WarmParent()


def test_a_batch_of_gpu_chapters_has_no_parent(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    said = []
    with warm.warm_kernels(said.append) as warmth:
        folder = Path(warmth.environment[VARIABLE])
        assert folder.is_dir()
        warmth.load([Job("flat", "benchmark", device="cuda", gpus=1)])
        assert warmth.environment == {} and not folder.exists()
    assert said == []


def test_who_waits_for_kernels_waits_for_all_imports(tmp_path, monkeypatch):
    (tmp_path / "slow_to_import.py").write_text("import time; time.sleep(1)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    parent = WarmParent()
    try:
        monkeypatch.setenv(VARIABLE, str(parent.folder))
        waiting = threading.Thread(target=warm.wait_for_kernels)
        waiting.start()
        waiting.join(1)
        assert waiting.is_alive(), "it was not told yet what to import"
        parent.load([("slow_to_import", ())], SETTINGS)
        start = time.monotonic()
        waiting.join(60)
        assert not waiting.is_alive() and time.monotonic() - start > 0.9
        assert parent.problem() == ""
    finally:
        parent.close()
    warm.wait_for_kernels()  # the parent is gone, and nobody waits for it


def test_the_half_for_jobs_gives_way_to_kernels(parent, kernels):
    manager, _ = kernels.start()
    process = psutil.Process(parent._process.pid)
    [half] = {child.pid for child in process.children()} - {pid_of(manager)}
    assert psutil.Process(half).nice() > process.nice() == psutil.Process(pid_of(manager)).nice()
    assert os.getsid(half) == half


def test_a_client_is_ready_when_the_kernel_has_said_all_about_its_request(
    parent, monkeypatch, tmp_path
):
    for name, value in (SETTINGS | {VARIABLE: str(parent.folder)}).items():
        monkeypatch.setenv(name, value)

    async def heard() -> list[str]:
        sockets = tempfile.mkdtemp(dir=parent.folder)
        manager = AsyncKernelManager(config=settings(sockets, warm=True))
        await manager.start_kernel(cwd=str(tmp_path))
        client = manager.client()
        client.start_channels()
        try:
            await client.wait_for_ready(timeout=60)
            late = []
            with contextlib.suppress(queue.Empty):
                while True:
                    message = await client.get_iopub_msg(timeout=0.5)
                    late.append(message["parent_header"].get("msg_id", ""))
            await manager.provisioner.kill()
            assert not await manager.is_alive(), "jupyter_client would look for it again and again"
            await manager.shutdown_kernel(now=True)
            own = client.session.msg_id.rpartition("_")[0]
            return [name for name in late if name.startswith(own)]
        finally:
            client.stop_channels()

    assert asyncio.run(heard()) == []


def test_a_client_of_a_kernel_that_dies_is_told(parent, monkeypatch, tmp_path):
    for name, value in (SETTINGS | {VARIABLE: str(parent.folder)}).items():
        monkeypatch.setenv(name, value)

    async def ask(timeout: float, number: int) -> None:
        manager = AsyncKernelManager(
            config=settings(tempfile.mkdtemp(dir=parent.folder), warm=True)
        )
        await manager.start_kernel(cwd=str(tmp_path))
        os.kill(manager.provisioner.pid, number)
        client = manager.client()
        client.start_channels()
        try:
            await client.wait_for_ready(timeout=timeout)
        finally:
            client.stop_channels()
            await manager.shutdown_kernel(now=True)

    with pytest.raises(RuntimeError, match="died"):
        asyncio.run(ask(60, signal.SIGKILL))
    with pytest.raises(RuntimeError, match=r"did not answer in 1\.5 s"):
        asyncio.run(ask(1.5, signal.SIGSTOP))


SLEEP = "import time; time.sleep(600)"
WHICH = (
    "import os; print('warm:', os.path.basename(__import__('sys').argv[0]) == 'ipykernel_launcher')"
)


def batch_in(checkout, tmp_path: Path, *arguments: str, **options) -> subprocess.Popen:
    """A batch with its own warm parent and its own folder for temporary files."""
    (tmp_path / "tmp").mkdir()
    environment = checkout.environment(TMPDIR=str(tmp_path / "tmp"))
    environment.pop(VARIABLE, None)
    return subprocess.Popen(
        checkout.command("run", *arguments), cwd=checkout.folder, env=environment, **options
    )


def family_of(batch: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(batch.pid).children(recursive=True)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("moment", ["imports", "cells"])
def test_nothing_is_left_of_a_batch_that_is_stopped(small_checkout, tmp_path, number, moment):
    small_checkout.write("udr", WHICH, SLEEP)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    batch = batch_in(small_checkout, tmp_path, **quiet)
    runs = small_checkout.folder / ".compendium" / "runs" / "mini"

    def reached() -> bool:
        if moment == "imports":
            return any("serve()" in " ".join(p.cmdline()) for p in family_of(batch))
        cells = list(runs.glob("udr-*.part-*/cell.txt"))
        return bool(cells) and cells[0].read_text() == "5"

    try:
        wait_until(reached, 120)
        family = family_of(batch)
        batch.send_signal(number)
        batch.wait(timeout=60)
    finally:
        batch.kill()
    wait_until(lambda: not any(alive(process.pid) for process in family), 60)
    assert [path for path in (tmp_path / "tmp").rglob("*") if path.is_socket()] == []
    assert list((tmp_path / "tmp").glob("compendium-*")) == []


@pytest.mark.parametrize("half", ["kernels", "jobs"])
def test_a_batch_outlives_its_parent(small_checkout, tmp_path, half):
    small_checkout.write("udr", WHICH, "import time; time.sleep(5)")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    batch = batch_in(small_checkout, tmp_path, **pipes)
    runs = small_checkout.folder / ".compendium" / "runs" / "mini"
    wait_until(lambda: list(runs.glob("udr-*.part-*/cell.txt")), 120)
    [parent] = [
        p for p in psutil.Process(batch.pid).children() if "serve()" in " ".join(p.cmdline())
    ]
    if half == "jobs":
        [parent] = [p for p in parent.children() if p.nice() > parent.nice()]
    parent.kill()
    shown, errors = batch.communicate(timeout=200)
    assert batch.returncode == 0, shown + errors
    assert "C1 ✅" in shown
    assert len(re.findall("ordinary kernels are used", errors)) == 1
    left = [
        path for path in (tmp_path / "tmp").rglob("*") if path.is_socket() or "job-" in path.name
    ]
    assert left == list((tmp_path / "tmp").glob("compendium-*")) == []


def test_a_chapter_runs_warm_and_gives_the_same_to_the_last_bit(small_checkout):
    small_checkout.write("flat", WHICH)
    metrics, outputs = {}, {}
    for setting in (small_checkout.settings.get(VARIABLE, ""), "off"):
        answer = small_checkout.compendium("run", "flat", "--force", **{VARIABLE: setting})
        assert answer.returncode == 0, answer.stderr
        [run] = small_checkout.runs()
        metrics[setting] = json.loads((run / "record.json").read_text())["arms"]["more"]
        cells = json.loads((run / "notebook.ipynb").read_text())["cells"]
        outputs[setting] = [
            "".join(out.get("text", "")) for cell in cells for out in cell["outputs"]
        ]
    first, second = ([run["metrics"] for run in arm] for arm in metrics.values())
    assert first == second
    warm_text, cold_text = outputs.values()
    assert "warm: True\n" in warm_text and "warm: False\n" in cold_text
    assert len(warm_text) == len(cold_text)
