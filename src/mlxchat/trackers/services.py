"""Tracking services: Weights & Biases, Trackio, TensorBoard, and the protocol of users' own services.

Each imports its package when a run starts to use it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

Numbers = dict[str, float]

_INIT_SECONDS = 60.0
# Records that a killed process may lose of TensorBoard's files; the next process writes them again.
_FLUSH_SECONDS = 5


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """One tracked run; a command that continues another's work continues its tracked run."""

    project: str
    name: str
    """Name of the folder of the run that started it."""
    key: str
    """Sixteen hexadecimal digits, stable over continuations."""
    outputs: Path
    """The outputs folder, absolute; a service keeps its files in a subfolder."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The whole configuration, without secrets."""
    tags: list[str] = field(default_factory=list)
    is_continued: bool = False


@dataclass(frozen=True, kw_only=True)
class Published:
    """A step's artifact."""

    id: str
    kind: str
    """checkpoint, tokenizer, scores, …"""
    folder: Path


@dataclass(frozen=True, kw_only=True)
class Results:
    """Final results of a run."""

    numbers: dict[str, Numbers] = field(default_factory=dict)
    """Step → its final numbers."""
    artifacts: dict[str, Published] = field(default_factory=dict)
    """Step → its artifact."""
    report: Path | None = None
    """Path of report.html, with report.md beside it; None if there is no report."""
    is_done: bool = True
    """Whether every step has its artifact."""


class Service(Protocol):
    """A destination of metrics. If it raises, this is reported once and it is not called again."""

    def log(self, step: str, iteration: int, numbers: Numbers) -> None:
        """Log the numbers of a step at one of its iterations."""

    def finish(self, results: Results) -> None:
        """Log the results and end. The run may start again under the same key."""


class WandbService:
    """A run of Weights & Biases, online or offline in outputs/wandb (WANDB_MODE=offline) for a later `wandb sync`.

    The x axis of a step's curves is the step's iteration.
    """

    package = "wandb"

    def __init__(self, run: TrackedRun) -> None:
        """Begin the run, or continue it; ImportError without the package, or the package's own error."""
        self._library: Any = import_module(self.package)
        self._run = self._begin(run)
        self._steps: set[str] = set()

    def _begin(self, run: TrackedRun) -> Any:
        return self._library.init(
            project=run.project, name=run.name, id=run.key, resume="allow", config=run.settings, tags=run.tags,
            dir=os.environ.get("WANDB_DIR") or str(run.outputs),
            # wandb must neither capture nor print terminal output
            settings=self._library.Settings(console="off", silent=True, init_timeout=_INIT_SECONDS),
        )  # fmt: skip

    def log(self, step: str, iteration: int, numbers: Numbers) -> None:
        """Add a point to each of the step's curves."""
        if step not in self._steps:
            self._steps.add(step)
            self._run.define_metric(f"{step}/iteration")
            self._run.define_metric(f"{step}/*", step_metric=f"{step}/iteration")
        self._run.log({f"{step}/iteration": iteration, **{f"{step}/{name}": value for name, value in numbers.items()}})

    def finish(self, results: Results) -> None:
        """Add final numbers and the report, link the artifacts, and end the run."""
        final = {f"final/{step}/{name}": value for step, ns in results.numbers.items() for name, value in ns.items()}
        self._run.log(final)
        if results.report is not None:
            self._run.log({"report": self._library.Html(results.report.read_text("utf-8"), data_is_not_path=True)})
        for step, published in results.artifacts.items():
            # A link: the id and the folder, without copying files.
            about = {"id": published.id, "step": step}
            artifact = self._library.Artifact(f"{step}-{published.id}", type=published.kind, metadata=about)
            artifact.add_reference(published.folder.absolute().as_uri(), checksum=False)
            self._library.log_artifact(artifact)
        self._end(is_done=results.is_done)

    def _end(self, *, is_done: bool) -> None:
        self._run.finish(exit_code=0 if is_done else 1)


class TrackioService(WandbService):
    """A run of Trackio, which speaks wandb's API: a local SQLite file (TRACKIO_DIR), or a Space (TRACKIO_SPACE_ID)."""

    package = "trackio"

    def _begin(self, run: TrackedRun) -> Any:
        # Trackio reserves names that begin with an underscore.
        settings = {name: value for name, value in run.settings.items() if not name.startswith("_")}
        return self._library.init(
            project=run.project, name=run.name, config={**settings, "tags": run.tags}, resume="allow", embed=False,
            auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip

    def log(self, step: str, iteration: int, numbers: Numbers) -> None:
        """Add a point to each of the step's curves."""
        self._run.log({f"{step}/{name}": value for name, value in numbers.items()}, step=iteration)

    def _end(self, *, is_done: bool) -> None:
        self._run.finish()


class TensorBoardService:
    """TensorBoard event files, written by tensorboardX: outputs/tensorboard/<run>/<step>.

    Each step has a folder and so a curve: `tensorboard --logdir outputs/tensorboard` overlays the losses of pretraining
    and fine-tuning. The report is shown as text.
    """

    def __init__(self, run: TrackedRun) -> None:
        """Create the folder; ImportError without tensorboardX."""
        from tensorboardX import SummaryWriter

        self._open: Any = SummaryWriter
        self._folder = run.outputs / "tensorboard" / run.name
        self._writers: dict[str, Any] = {}
        self._is_continued = run.is_continued

    def log(self, step: str, iteration: int, numbers: Numbers) -> None:
        """Write one scalar for each number."""
        if step not in self._writers:
            # A killed run's records of later iterations are computed again; the viewer drops the old ones.
            self._writers[step] = self._begin(step, **({"purge_step": iteration} if self._is_continued else {}))
        for name, value in numbers.items():
            self._writers[step].add_scalar(name, value, iteration)

    def _begin(self, name: str, **options: Any) -> Any:
        # Without the pid in its name, the file of a run that continues within a second would overwrite the old one.
        return self._open(
            str(self._folder / name), filename_suffix=f".{os.getpid()}", flush_secs=_FLUSH_SECONDS, **options
        )

    def finish(self, results: Results) -> None:
        """Write final numbers and the report, and close the files."""
        if results.numbers or results.report is not None:
            with self._begin("results") as writer:
                for step, numbers in results.numbers.items():
                    for name, value in numbers.items():
                        writer.add_scalar(f"{step}/{name}", value, 0)
                if results.report is not None:
                    writer.add_text("report", results.report.with_suffix(".md").read_text("utf-8"), 0)
        for writer in self._writers.values():
            writer.close()
