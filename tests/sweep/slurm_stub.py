#!/usr/bin/env python3
"""A SLURM of one machine, in as far as submitit asks for it: sbatch, srun, sacct, scontrol requeue, scancel.

It is put on PATH under each of these names and really runs the script that sbatch is given, each task of an array with
its environment, at most so many at a time, again if it was queued again. Its state is files in $SLURM_STUB.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

STATE = Path(os.environ["SLURM_STUB"])


def sbatch(arguments: list[str]) -> None:
    script = Path(arguments[-1])
    number = 1000 + len(list(STATE.glob("script-*")))
    (STATE / f"script-{number}").write_text(script.read_text())
    lines = re.findall(r"^#SBATCH (.*)$", script.read_text(), re.MULTILINE)
    flags = dict(re.findall(r"--([\w-]+)=(\S+)", " ".join(lines)))
    jobs, parallel = [str(number)], "1"
    if "array" in flags:
        last, parallel = re.fullmatch(r"0-(\d+)(?:%(\d+))?", flags["array"]).groups("2")
        jobs = [f"{number}_{task}" for task in range(int(last) + 1)]
    for job in jobs:
        write(job, "PENDING")
    subprocess.Popen(
        [sys.executable, __file__, "controller", parallel, *jobs],
        start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    print(f"Submitted batch job {number}")


def controller(parallel: str, *jobs: str) -> None:
    waiting, running = list(jobs), {}
    while waiting or running:
        for job in [each for each in waiting if read(each) == "CANCELLED"]:
            waiting.remove(job)
        while waiting and len(running) < int(parallel):
            running[job] = begin(job := waiting.pop(0))
        for job, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[job]
            again = STATE / f"requeue-{job}"
            if again.exists():
                again.unlink()
                write(job, "PENDING")
                waiting.append(job)
            elif read(job) != "CANCELLED":
                write(job, "COMPLETED" if process.returncode == 0 else "FAILED")
        time.sleep(0.1)


def begin(job: str) -> subprocess.Popen[bytes]:
    write(job, "RUNNING")
    number, _, task = job.partition("_")
    variables = {
        "SLURM_JOB_ID": job, **({"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": task} if task else {}),
        "SLURM_NTASKS": "1",
        "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
        "SLURM_JOB_NODELIST": "node1",
    }  # fmt: skip
    return subprocess.Popen(
        ["bash", str(STATE / f"script-{number}")], env=os.environ | variables, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=(STATE / f"stderr-{job}").open("ab"),
    )  # fmt: skip


def srun(arguments: list[str]) -> None:
    places: dict[str, str] = {}
    while arguments and arguments[0].startswith("--"):
        flag = arguments.pop(0)
        if flag in ("--output", "--error"):
            places[flag] = arguments.pop(0)
    job = os.environ["SLURM_JOB_ID"]
    number, _, task = job.partition("_")
    names = {"%A": number, "%a": task, "%j": job, "%t": "0"}
    for descriptor, flag in ((1, "--output"), (2, "--error")) if places else ():
        place = places.get(flag, places["--output"])
        for short, text in names.items():
            place = place.replace(short, text)
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        os.dup2(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    (STATE / f"pid-{os.environ['SLURM_JOB_ID']}").write_text(str(os.getpid()))
    os.execvp(arguments[0], arguments)


def sacct(arguments: list[str]) -> None:
    print("JobID|State|NodeList")
    for path in sorted(STATE.glob("state-*")):
        print(f"{path.name.removeprefix('state-')}|{path.read_text()}|node1")


def scontrol(arguments: list[str]) -> None:
    assert arguments[0] == "requeue"
    (STATE / f"requeue-{arguments[1]}").touch()


def scancel(arguments: list[str]) -> None:
    job = arguments[-1]
    was = read(job)
    write(job, "CANCELLED")
    if was == "RUNNING":
        os.kill(int((STATE / f"pid-{job}").read_text()), signal.SIGTERM)


def read(job: str) -> str:
    return (STATE / f"state-{job}").read_text()


def write(job: str, state: str) -> None:
    temporary = STATE / f".{job}-{os.getpid()}"
    temporary.write_text(state)
    temporary.replace(STATE / f"state-{job}")


if __name__ == "__main__":
    name = Path(sys.argv[0]).name
    if name == "slurm_stub.py":
        controller(*sys.argv[2:])
    else:
        globals()[name](sys.argv[1:])
