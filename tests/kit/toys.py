"""Toy stages, and the runner on top of them."""

import importlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent, indent
from types import SimpleNamespace
from typing import Any

from mlxchat.runner import stage as stage_module
from mlxchat.runner.leader import execute
from mlxchat.runner.plan import PlannedStep, make_plan
from mlxchat.runner.process import Environment
from mlxchat.runner.run import Run
from mlxchat.store.files import Records
from mlxchat.store.store import Store

ONE = {"one": {"stage": "make"}}
PIPELINE = {"first": {"stage": "make"}, "second": {"stage": "copy", "source": "first"}}
CHAIN = {"one": {"stage": "make"}, "two": {"stage": "copy", "source": "one"}}


def started(run: Run) -> list[str]:
    """Return the steps that a run computed, in order."""
    return [event["step"] for event in Records(run.folder / "events.jsonl").read() if event["event"] == "step_started"]


@dataclass
class ToySection:
    number: int = 1
    cadence: int = field(default=5, metadata={"identity": False})


@dataclass
class ToyConfig:
    """What the toy stages are configured with."""

    toy: ToySection = field(default_factory=ToySection)
    other: ToySection = field(default_factory=ToySection)
    machine: dict[str, Any] = field(default_factory=dict)


@dataclass
class Toys:
    """A folder of throw-away stages in place of stages/, and the runner on top of it."""

    package: Path
    outputs: Path
    config: ToyConfig = field(default_factory=ToyConfig)
    said: list[str] = field(default_factory=list)
    invocations: int = 0

    def add(
        self, name: str, body: str, *, inputs: dict[str, str] | None = None, config: tuple[str, ...] = ("toy",),
        outputs: tuple[str, ...] = ("result.txt",), produces: str = "thing", version: int = 1,
        metrics: dict[str, str | None] | None = None,
    ) -> None:  # fmt: skip
        """Write a stage whose `run(ctx)` is `body`, or write it anew."""
        self.package.joinpath(f"{name}.py").write_text(
            "import os, signal, time\nfrom mlxchat.errors import DataError\n"
            "from mlxchat.runner.stage import Metric, Stage\n"
            f"stage = Stage(version={version}, inputs={inputs or {}}, produces={produces!r}, outputs={list(outputs)}, "
            f"reads={list(config)}, metrics=[Metric(*each) for each in {list((metrics or {}).items())}])\n"
            f"def run(ctx):\n{indent(dedent(body).strip(), '    ')}\n"
        )
        stage_module.read_stage.cache_clear()
        sys.modules.pop(f"{self.package.name}.{name}", None)
        importlib.invalidate_caches()

    @property
    def store(self) -> Store:
        """The store as a new process sees it."""
        return Store(self.outputs)

    def plan(self, pipeline: dict[str, dict[str, str]], **options: Any) -> list[PlannedStep]:
        """Return the plan as a new process makes it."""
        options = {"targets": None, "seed": 1, "force": [], "stages": [], **options}
        options = {"data_seed": options["seed"], **options}
        config = SimpleNamespace(**vars(self.config), pipeline=pipeline, **options)
        return make_plan(config, self.store)

    def run(self, plan: list[PlannedStep], store: Store | None = None, **options: Any) -> Run:
        """Execute a plan as one invocation does; options are those of Run."""
        store, run = store or self.store, self.make_run(**options)
        execute(plan, store, run)
        return run

    def make_run(self, **options: Any) -> Run:
        """Return a new run."""
        self.store.prepare()
        self.invocations += 1
        folder = self.outputs / "runs" / f"run{self.invocations}"
        folder.mkdir(exist_ok=True)
        options = {"say": self.said.append, **options}
        return Run(
            folder=folder, seed=1, data_seed=1, overrides=["toy.number=1"],
            environment=Environment(lambda: {"name": "toy"}), **options,
        )  # fmt: skip
