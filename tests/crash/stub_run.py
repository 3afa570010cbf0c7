"""Run the pipeline of stubs in a process of its own: stub_run.py OUTPUTS [key=value ...].

Keys are those of the sections (source.lines=40), of Policy (max_parallel_steps=2), `force=[step]`, and a few that stand
for the world around: host=NAME is what this machine is called, gpu=true that it has one. ranks=2 runs another pipeline,
a step of which so many processes compute together, the further ones started by python=PATH.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.dont_write_bytecode = True

from mlxchat.errors import MlxchatError  # noqa: E402
from mlxchat.runner import stage  # noqa: E402
from mlxchat.runner.plan import make_plan  # noqa: E402
from mlxchat.runner.process import Hooks  # noqa: E402
from mlxchat.runner.run import Policy, Run  # noqa: E402
from mlxchat.runner.workers import execute  # noqa: E402
from mlxchat.store import attempts, locks  # noqa: E402
from mlxchat.store.environment import Environment  # noqa: E402
from mlxchat.store.files import now  # noqa: E402
from mlxchat.store.store import Store  # noqa: E402

# Child processes come here too: they import this file under another name.
stage._PACKAGE = "stubs"
stage._folder = lambda: HERE / "stubs"  # type: ignore[assignment]

PIPELINE = {
    "source": {"stage": "source"},
    "convert": {"stage": "convert", "text": "source"},
    "train": {"stage": "train", "text": "source", "table": "convert"},
    "score": {"stage": "score", "model": "train"},
    "inspect": {"stage": "inspect", "table": "convert"},
}

OF_RANKS = {
    "source": {"stage": "source"},
    "together": {"stage": "together", "text": "source"},
    "score": {"stage": "score", "model": "together"},
}


@dataclass
class Source:
    lines: int = 40


@dataclass
class Convert:
    columns: int = 1


@dataclass
class Train:
    iterations: int = 4
    pause: float = field(default=0.0, metadata={"identity": False})
    dtype: str = field(default="auto", metadata={"identity": False})


@dataclass
class Score:
    digits: int = 2
    seconds: float = field(default=0.0, metadata={"identity": False})
    failing: list[str] = field(default_factory=list, metadata={"identity": False})


OTHER = {"force": [], "targets": None, "host": None, "gpu": False, "ranks": 0, "python": None}


@dataclass
class Settings:
    source: Source = field(default_factory=Source)
    convert: Convert = field(default_factory=Convert)
    train: Train = field(default_factory=Train)
    score: Score = field(default_factory=Score)
    machine: dict[str, Any] = field(default_factory=dict)


def describe_device() -> dict[str, Any]:
    return {"name": "stub"}


def lead(ranks: int) -> Any:
    """Return what a run with this machine.num_processes is led by."""
    from mlxchat.config.schema import MachineConfig
    from mlxchat.distributed.ranks import lead_ranks

    return lead_ranks(MachineConfig(
        num_processes=ranks, max_parallel_steps=1, blas_threads=1, device="cpu", compute_dtype="auto",
        memory_limit_bytes=None, cache_limit_bytes=None, wired_limit_bytes=None,
    ))[1]  # fmt: skip


def has_gpu() -> bool:
    return True


def main(outputs: Path, arguments: list[str]) -> None:
    """Plan and execute; exit as the command line does."""
    import yaml

    settings, policy, hooks, other = Settings(), {}, {}, dict(OTHER)
    for argument in arguments:
        key, _, text = argument.partition("=")
        section, _, name = key.partition(".")
        value = yaml.safe_load(text)
        if section == "hooks":
            hooks[name] = value
        elif name and section == "timeout":
            policy.setdefault("timeouts", {})[name] = value
        elif name:
            setattr(getattr(settings, section), name, value)
        elif key in {item.name for item in fields(Policy)}:
            policy[key] = value
        else:
            assert key in other, key
            other[key] = value
    if other["host"]:
        locks.host_name = attempts.host_name = lambda: other["host"]
    sys.executable = other["python"] or sys.executable
    store = Store(outputs)
    pipeline = OF_RANKS if other["ranks"] else PIPELINE
    plan = make_plan(settings, pipeline, store, targets=other["targets"], seed=1, force=other["force"])
    store.prepare()
    folder = outputs / "runs" / f"{now().replace(':', '')}-{os.getpid()}"
    folder.mkdir(parents=True)
    run = Run(
        folder=folder, seed=1, overrides=arguments,
        environment=Environment(describe_device), policy=Policy(**policy), hooks=Hooks(**hooks),
        say=lambda line: print(line, flush=True), **({"uses_gpu": has_gpu} if other["gpu"] else {}),
        ranks=lead(other["ranks"]) if other["ranks"] else None,
    )  # fmt: skip
    execute(plan, store, run)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2:])
    except MlxchatError as error:
        print(f"error: {error}", flush=True)
        sys.exit(error.exit_code)
