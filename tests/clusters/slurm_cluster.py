"""Steps and sweeps as jobs of a real SLURM without accounting, as small clusters have it."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kit.commands import saved_trainings, start_process
from mlxchat.store.manifest import read_manifest
from mlxchat.store.naming import refs_of
from mlxchat.store.store import Store

CONF = """
ClusterName=mlxchat
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={place}/munge/socket,cred_expire=10
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool-%n
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/%n.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MpiDefault=none
ReturnToService=2
KillWait=20
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=2000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=2000
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 State=UP
PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF State=UP
"""


def wait_for(found: Callable[[], object], seconds: float = 90.0) -> None:
    """Wait until `found` returns something true."""
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.2)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a running SLURM with two nodes; SLURM_CONF names its configuration."""
    programs = ("munged", "slurmctld", "slurmd", "squeue")
    if missing := [name for name in programs if shutil.which(name) is None]:
        pytest.skip(f"needs {', '.join(missing)}")
    if os.geteuid() != 0:
        pytest.skip("slurmd needs root")
    place = tmp_path_factory.mktemp("slurm")
    for name in ("munge", "state"):
        (place / name).mkdir(mode=0o700)
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    (place / "munge" / "key").write_bytes(os.urandom(64))
    (place / "munge" / "key").chmod(0o600)
    (place / "slurm.conf").write_text(CONF.format(place=place, host=socket.gethostname(), ports=ports))
    (place / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    munge = place / "munge"
    daemons = [
        ["munged", "--force", "--foreground", f"--socket={munge}/socket", f"--key-file={munge}/key",
         f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed"],
        ["slurmctld", "-D", "-f", place / "slurm.conf"],
        ["slurmd", "-D", "-N", "n1", "-f", place / "slurm.conf"],
        ["slurmd", "-D", "-N", "n2", "-f", place / "slurm.conf"],
    ]  # fmt: skip
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("SLURM_CONF", str(place / "slurm.conf"))
        for command in daemons:
            log = stack.enter_context((place / f"{command[0]}.out").open("a"))
            daemon = stack.enter_context(subprocess.Popen(command, stdout=log, stderr=log))
            stack.callback(daemon.terminate)
            time.sleep(1)
        stack.callback(lambda: subprocess.run(["scancel", "--user=root"], check=False))
        wait_for(lambda: "2 idle" in ask("sinfo", "--noheader", "--partition=low", "--format=%D %t"), 60)
        yield place


def ask(*command: str) -> str:
    """Return what a command prints."""
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout


pytestmark = pytest.mark.usefixtures("slurm")


@pytest.fixture
def command(tiny: tuple[str, ...], outputs: Path) -> list[str]:
    """A pretraining of about ten seconds as a job."""
    settings = ["stage=pretrain", "pretrain.num_iterations=200", "machine.checkpoint_seconds=0", f"outputs={outputs}"]
    return [*tiny, *settings, "pipeline.pretrain.executor={kind: slurm, signal_delay_s: 30}"]


def jobs() -> list[str]:
    """Return "id state" of all jobs that SLURM remembers."""
    return sorted(ask("squeue", "--noheader", "--states=all", "--format=%i %T").splitlines())


def newest() -> str:
    return max((line.split()[0] for line in jobs()), key=int)


def attempts(outputs: Path) -> list[dict[str, Any]]:
    return read_manifest(refs_of(Store(outputs))["pretrain"])["attempts"]


def running(outputs: Path, process: subprocess.Popen[str]) -> str:
    """Wait until the training has saved, and return its job."""
    wait_for(lambda: process.poll() is None and saved_trainings(outputs))
    return newest()


def finish(process: subprocess.Popen[str]) -> str:
    text, _ = process.communicate(timeout=200)
    assert process.returncode == 0, text
    return text


def test_preempted_step_saves_and_is_queued_again(command, outputs, start_mlxchat):
    """SLURM sends two SIGTERMs 57 ms apart; the second one ended the job before it saved."""
    process = start_mlxchat(*command)
    running(outputs, process)
    ask("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
    text = finish(process)
    assert re.search(r"pretrain +SLURM job \d+ is queued again", text), text
    assert [each["outcome"] for each in attempts(outputs)] == ["interrupted", "done"]
    assert attempts(outputs)[1]["resumed_from"] > 0


def test_step_at_its_time_limit_continues_every_time(command, outputs, start_mlxchat):
    """The second start obeyed the signal of the first one, and the step was lost."""
    process = start_mlxchat(*command)
    log = None
    for count in (1, 2):
        job = running(outputs, process)
        (log,) = outputs.glob("work/*/attempts.jsonl")
        wait_for(lambda log=log, count=count: len(re.findall('"started"', log.read_text())) == count)
        wait_for(lambda log=log: (log.parent / "ckpt" / "records" / "metrics.jsonl").exists())
        ask("scancel", "--signal=USR2", job)
        wait_for(lambda log=log, count=count: len(re.findall('"ended"', log.read_text())) == count)
    finish(process)
    assert [each["outcome"] for each in attempts(outputs)] == ["interrupted", "interrupted", "done"]


def test_same_command_awaits_the_job_of_a_killed_one(command, outputs, start_mlxchat, mlxchat):
    process = start_mlxchat(*command)
    job = running(outputs, process)
    with process:
        process.kill()
    assert re.search(rf"pretrain +SLURM job {job} runs on ", mlxchat("status", f"outputs={outputs}").stdout)
    done = mlxchat(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"awaits SLURM job {job} " in done.stdout
    assert newest() == job, "no second job was submitted"
    assert [each["outcome"] for each in attempts(outputs)] == ["done"]


@pytest.mark.parametrize("way", ["Ctrl-C", "status --cancel"])
def test_cancelled_step_saves_and_no_job_is_left(way, command, outputs, start_mlxchat, mlxchat):
    process = start_mlxchat(*command)
    job = running(outputs, process)
    if way == "Ctrl-C":
        process.send_signal(signal.SIGINT)
    else:
        assert "is cancelled" in mlxchat("status", "--cancel", f"outputs={outputs}").stdout
    text, _ = process.communicate(timeout=100)
    assert process.returncode == (130 if way == "Ctrl-C" else 1), text
    wait_for(lambda: not ask("squeue", "--noheader", f"--jobs={job}", "--states=RUNNING,PENDING,COMPLETING"))
    (log,) = outputs.glob("work/*/attempts.jsonl")
    assert '"outcome": "interrupted"' in log.read_text()


def test_lost_step_is_reported_without_accounting(command, outputs, start_mlxchat, mlxchat):
    """Without sacct the command waited without end."""
    process = start_mlxchat(*command)
    job = running(outputs, process)
    (log,) = outputs.glob("work/*/attempts.jsonl")
    os.kill(int(re.findall(r'"pid": (\d+)', log.read_text())[-1]), signal.SIGKILL)
    text, _ = process.communicate(timeout=100)
    assert process.returncode == 1, text
    assert re.search(rf"step pretrain failed: SLURM job {job} was lost \(.+\)\.", text), text
    done = mlxchat(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [each["outcome"] for each in attempts(outputs)] == ["killed", "done"]


def test_sweep_outlives_its_command(tiny, outputs, mlxchat, tmp_path):
    settings = ["stage=pretrain", "pretrain.num_iterations=150", "optimizer.matrix_lr=0.011,0.012", "executor=slurm"]
    command = ["-m", *tiny, *settings, f"outputs={outputs}"]
    before = len(jobs())
    process = start_process(*command, cwd=tmp_path)
    wait_for(lambda: len(list(outputs.glob("work/*/attempts.jsonl"))) == 2)
    with process:
        process.kill()
    done = mlxchat(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(jobs()) == before + 2, "the jobs of the first command were awaited"
    (folder,) = (path.parent for path in outputs.glob("multirun/*/table.json"))
    rows = json.loads((folder / "table.json").read_text())
    assert [row["status"] for row in rows] == ["done", "done"]
