"""Sends metrics to W&B, Trackio, TensorBoard or a user's own service.

A tracker never fails or delays a training: it runs in a thread, and its first failure (missing package, no network, any
error) gives one warning, after which the run continues without it.

runs/<run>/tracker.json records the tracked run and what was sent. The same command after a crash or Ctrl-C plans the
same ids, so an unfinished tracked run with the same ids is continued; after a finished one a new one starts.
"""

import hashlib
import json
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from mlxchat.config.pins import is_own, load_part
from mlxchat.config.schema import TrackerConfig
from mlxchat.errors import redact
from mlxchat.store.files import Records, write_whole

# How long the end of a run waits for the service to send the rest.
FINISH_SECONDS = 60.0
NOTE = "tracker.json"
_NOTE_SECONDS = 10.0
_INIT_SECONDS = 60.0
# Records that a killed process may lose of TensorBoard's files; the next process writes them again.
_FLUSH_SECONDS = 5

Numbers = dict[str, float]


# What a tracker passes to a service


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


# The tracker


class Tracker:
    """Passes records to a service, in order, in a thread. With kind 'none' every call does nothing."""

    def __init__(
        self, config: TrackerConfig, folder: Path, *, ids: Iterable[str] = (), settings: dict[str, Any] | None = None,
        records: Callable[[str], Path] | None = None, say: Callable[[str], None] = print,
        open_service: Callable[[TrackedRun], Service] | None = None,
    ) -> None:  # fmt: skip
        """Start tracking, or continue an unfinished tracked run with the same ids.

        `folder` is the run's, below outputs/runs; `ids` are of all steps of the plan; `settings` have no secrets.
        `records` returns the path of a running step's metrics: earlier records are sent before the first new one.
        `say` prints a warning; `open_service` replaces that of `config.kind`.
        """
        self._kind, self._say, self._records = config.kind, say, records
        self._begun: set[str] = set()
        self._waiting: queue.Queue[tuple[str, int, dict[str, float]] | Results] = queue.Queue()
        self._is_broken = False
        self._thread: threading.Thread | None = None
        if config.kind == "none":
            return
        self._journal = Journal(folder, config.kind, config.project, ids)
        run = TrackedRun(
            project=config.project, name=self._journal.name, key=self._journal.key,
            outputs=folder.parent.parent.resolve(), settings=settings or {}, tags=list(config.tags),
            is_continued=self._journal.is_continued,
        )  # fmt: skip
        arguments = (run, open_service or self._open)
        self._thread = threading.Thread(target=self._work, args=arguments, name="tracker", daemon=True)
        self._thread.start()

    def log(self, step: str, record: dict[str, Any]) -> None:
        """Send the numbers of a metrics record; a step's first call also sends its earlier records."""
        iteration = record.get("iteration")
        if self._thread is None or self._is_broken or not isinstance(iteration, int):
            return
        records = [record]
        if step not in self._begun and self._records is not None:
            with suppress(OSError):
                past = Records(self._records(step)).read()
                earlier = [each for each in past if isinstance(each.get("iteration"), int)]
                records = [*(each for each in earlier if each["iteration"] < iteration), record]
        self._begun.add(step)
        for each in records:
            numbers = numbers_of(each, without="iteration")
            if self._journal.is_new(step, each["iteration"]) and numbers:
                self._waiting.put((step, each["iteration"], numbers))

    def finish(self, results: Results | None = None) -> None:
        """End the tracked run with its results; wait up to `FINISH_SECONDS` for the service."""
        if self._thread is None:
            return
        results = results or Results(is_done=False)
        self._waiting.put(results)
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            self._complain(f"still busy after {FINISH_SECONDS:g} s, not waiting any longer")
        self._journal.write(is_ended=results.is_done)
        self._thread = None

    def _work(self, run: TrackedRun, open_service: Callable[[TrackedRun], Service]) -> None:
        try:
            service = open_service(run)
            while not isinstance(entry := self._waiting.get(), Results):
                service.log(*entry)
            service.finish(entry)
        except ImportError as error:
            remedy = "" if is_own(self._kind) else f"; install it: pip install 'mlxchat[{self._kind}]'"
            self._complain(f"{error}{remedy}")
        except BaseException as error:  # some services end the process if they are refused; here only the thread ends
            self._complain(f"{type(error).__name__}: {error}")

    def _open(self, run: TrackedRun) -> Service:
        part: Any = load_part(self._kind) if is_own(self._kind) else _SERVICES[self._kind]
        service: Service = part(run)
        return service

    def _complain(self, problem: str) -> None:
        if not self._is_broken:
            self._is_broken = True
            line = " ".join(problem.split())
            self._say(redact(f"warning: tracker={self._kind} failed ({line}); the run continues without it"))


def numbers_of(record: Mapping[str, Any], *, without: str = "") -> dict[str, float]:
    """Return the finite numbers of a record; other values break the plots of some services."""
    return {
        name: value
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and name != without
    }


class Journal:
    """The note of one run: its tracked run and the last iteration of each step that was sent."""

    def __init__(self, folder: Path, kind: str, project: str, ids: Iterable[str]) -> None:
        """Find the tracked run that this run, in a folder below outputs/runs, continues; `ids` are of all its steps."""
        same = hashlib.sha256(json.dumps([kind, project, sorted(ids)]).encode()).hexdigest()
        self._path = folder / NOTE
        found = _unfinished(folder, same)
        self.is_continued = found is not None
        self.name: str = found["name"] if found else folder.name
        self.key = hashlib.sha256(f"{same}/{self.name}".encode()).hexdigest()[:16]
        self._before: dict[str, int] = dict(found["passed"]) if found else {}
        self._passed = dict(self._before)
        self._note = {"kind": kind, "project": project, "same": same, "name": self.name, "key": self.key}
        self._written = 0.0
        self.write(is_ended=False)

    def is_new(self, step: str, iteration: int) -> bool:
        """Return True if a record was not sent before, and mark it as sent.

        A step logs several records per iteration (loss, then validation) with different numbers.
        """
        if iteration <= self._before.get(step, -1):
            return False
        self._passed[step] = max(iteration, self._passed.get(step, -1))
        if time.monotonic() - self._written >= _NOTE_SECONDS:
            self.write(is_ended=False)
        return True

    def write(self, *, is_ended: bool) -> None:
        """Write the note."""
        self._written = time.monotonic()
        note = {**self._note, "ended": is_ended, "passed": self._passed}
        with suppress(OSError):  # without the note the next run starts a new tracked run
            write_whole(self._path, json.dumps(note))


def _unfinished(folder: Path, same: str) -> dict[str, Any] | None:
    """Return the note of the newest unfinished other run with the same ids."""
    for path in sorted(folder.parent.glob(f"*/{NOTE}"), reverse=True):
        with suppress(OSError, ValueError):
            note: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if path.parent != folder and note["same"] == same:
                return None if note["ended"] else note
    return None


# The services: each imports its package when a run starts to use it


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


_SERVICES = {"wandb": WandbService, "trackio": TrackioService, "tensorboard": TensorBoardService}
