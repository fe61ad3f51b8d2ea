"""A real Slurm of one node in a temporary folder, without root and without installing anything.

    python lib/tests/runner/one_node_slurm.py bash     # a shell in which sbatch, squeue, … work

The programs are those on this machine; where there are none, the Debian packages are downloaded and
unpacked beside the cluster's own files. Everything listens on 127.0.0.1 and ends with the program
that started it.
"""

import contextlib
import ctypes
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client")
LIBRARIES = Path("usr/lib/x86_64-linux-gnu".replace("x86_64", os.uname().machine))
CONFIGURATION = """
ClusterName=compendium
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={controller_port}
SlurmdPort={node_port}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
{plugins}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
MpiDefault=none
KillWait=5
ReturnToService=2
SchedulerParameters=sched_interval=2,batch_sched_delay=0
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory}
PartitionName=short Nodes={host} Default=YES MaxTime=60 State=UP
PartitionName=gpu Nodes={host} MaxTime=INFINITE State=UP
"""


class SlurmError(RuntimeError):
    """Slurm cannot be had or did not start here."""


def installed() -> bool:
    """Whether the programs of a whole Slurm are on this machine."""
    places = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    return all(shutil.which(name, path=places) for name in ("munged", "slurmctld", "slurmd"))


def download(folder: Path) -> None:
    """Unpack below `folder` the Debian packages of Slurm that are not installed here."""
    if not shutil.which("apt-get"):
        raise SlurmError("Slurm is not installed, and without apt-get it cannot be downloaded")
    lists = folder / "lists"
    (lists / "partial").mkdir(parents=True)
    # A package list of our own, if this machine's is missing or old; neither wants root.
    for own in ([], ["-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={folder}"]):
        if own:
            subprocess.run(["apt-get", *own, "update"], capture_output=True)
        needed = subprocess.run(
            ["apt-get", *own, "install", "--simulate", "--no-install-recommends", *PACKAGES],
            capture_output=True,
            text=True,
        )
        names = re.findall(r"^Inst (\S+)", needed.stdout, flags=re.M)
        loaded = subprocess.run(
            ["apt-get", *own, "download", *names], cwd=folder, capture_output=True, text=True
        )
        if names and not loaded.returncode and not needed.returncode:
            break
    else:
        raise SlurmError(f"the packages cannot be downloaded: {loaded.stderr or needed.stderr}")
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg", "--extract", package, folder / "root"], check=True)


def free_ports(count: int) -> list[int]:
    """TCP ports of 127.0.0.1 that nobody uses."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def variables(folder: Path) -> dict[str, str]:
    """The environment variables with which the commands of the Slurm in `folder` work."""
    top = folder / "root"
    libraries = [str(top / LIBRARIES), str(top / LIBRARIES / "slurm-wlm")]
    changes = {"SLURM_CONF": str(folder / "slurm.conf")}
    programs = [str(top / "usr" / "bin"), str(top / "usr" / "sbin")] if top.exists() else []
    changes["PATH"] = ":".join([str(folder / "bin"), *programs, os.environ["PATH"], "/usr/sbin"])
    if top.exists():
        changes["LD_LIBRARY_PATH"] = ":".join(
            [*libraries, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        )
    return changes


def node_name() -> str:
    """The name of the one node: this machine's."""
    return socket.gethostname().partition(".")[0]


def configure(folder: Path) -> None:
    """Write the configuration files and the key."""
    plugins = folder / "root" / LIBRARIES / "slurm-wlm"
    controller_port, node_port = free_ports(2)
    text = CONFIGURATION.format(
        folder=folder,
        host=node_name(),
        user=psutil.Process().username(),
        controller_port=controller_port,
        node_port=node_port,
        plugins=f"PluginDir={plugins}" if plugins.exists() else "",
        cpus=os.cpu_count(),
        memory=psutil.virtual_memory().total // 2**20,
    )
    (folder / "slurm.conf").write_text(text)
    (folder / "gres.conf").write_text("")
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    for name in ("state", "spool", "bin"):
        (folder / name).mkdir()
    # Snakemake takes SLURM_CONF from the jobs that it starts; a cluster has its file in /etc.
    real = shutil.which("srun", path=variables(folder)["PATH"])
    (folder / "bin" / "srun").write_text(
        f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {real} "$@"\n'
    )
    (folder / "bin" / "srun").chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)


def start(name: str, arguments: list[str], folder: Path) -> subprocess.Popen:
    """Start the daemon `name`; it dies with us."""
    path = variables(folder)["PATH"]
    # Debian's real programs end in -wlm; the plain names are links made at installation.
    program = shutil.which(name, path=path) or shutil.which(f"{name}-wlm", path=path)
    with (folder / f"{name}.out").open("w") as output:
        return subprocess.Popen(
            [str(program), *arguments],
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            env=os.environ | variables(folder),
            preexec_fn=lambda: ctypes.CDLL(None).prctl(1, signal.SIGKILL),
        )


def wait_for(condition, seconds: float, what: str) -> None:
    """Wait until `condition()` holds; raises `SlurmError` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SlurmError(f"{what} after {seconds:.0f} s")
        time.sleep(0.2)


def end_all(folder: Path) -> None:
    """Kill every process that belongs to the Slurm in `folder`: daemons, job steps, jobs."""
    ours = str(folder / "slurm.conf")
    for _ in range(3):
        family = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                named = str(folder) in " ".join(process.cmdline())
                if (named or process.environ().get("SLURM_CONF") == ours) and (
                    process.pid not in (os.getpid(), os.getppid())
                ):
                    family.append(process)
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(family, timeout=5)


@contextlib.contextmanager
def one_node_slurm() -> Iterator[Mapping[str, str]]:
    """Run a one-node Slurm; yields the environment variables with which its commands work."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)  # munge wants its socket where everybody may look
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` is reached
    try:
        if not installed():
            download(folder)
        configure(folder)
        files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid"}
        files |= {"log-file": "munged.log", "seed-file": "munge.seed"}
        start(
            "munged", ["-F", *(f"--{key}={folder / name}" for key, name in files.items())], folder
        )
        wait_for((folder / "munge.socket").exists, 10, "munged has no socket")
        start("slurmctld", ["-D", "-f", str(folder / "slurm.conf")], folder)
        path = variables(folder)["PATH"]
        step = shutil.which("slurmstepd", path=path) or shutil.which("slurmstepd-wlm", path=path)
        start("slurmd", ["-D", "-f", str(folder / "slurm.conf"), "-d", str(step)], folder)

        def idle() -> bool:
            asked = subprocess.run(
                ["sinfo", "--noheader", "--format=%t"],
                env=os.environ | variables(folder),
                capture_output=True,
                text=True,
            )
            return set(asked.stdout.split()) == {"idle"}

        try:
            wait_for(idle, 60, "the node is not idle")
        except SlurmError as error:
            logs = [path.read_text()[-2000:] for path in folder.glob("*.log")]
            raise SlurmError("\n".join([str(error), *logs])) from error
        # A GPU on paper: the controller hands it out, the node need not have one.
        gpu = ["scontrol", "update", f"nodename={node_name()}", "gres=gpu:1"]
        subprocess.run(gpu, env=os.environ | variables(folder), check=True)
        yield variables(folder)
    finally:
        end_all(folder)
        shutil.rmtree(folder, ignore_errors=True)
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    with one_node_slurm() as changes:
        sys.exit(subprocess.run(sys.argv[1:] or ["bash"], env=os.environ | changes).returncode)
