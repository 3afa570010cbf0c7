"""What a stage's `run` receives: typed config, inputs, output folder, and services of the run."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxchat.config.wording import format_number
from mlxchat.errors import Interrupted
from mlxchat.runner.process import Progress
from mlxchat.store.files import Record, Records, write_whole

if TYPE_CHECKING:
    from mlxchat.config.schema import Config
    from mlxchat.distributed.team import Team


DERIVED = "derived.json"
"""In a step's work: what it derived, for those who look while it runs."""


def stage_seed(root_seed: int, stage: str, purpose: str) -> int:
    """Return a seed for one purpose of a stage, in [0, 2^32); equal settings give equal seeds."""
    return int.from_bytes(hashlib.sha256(f"{root_seed}/{stage}/{purpose}".encode()).digest()[:4], "big")


class Sections:
    """The sections that a stage declares, and `machine`: it cannot read others, which its artifact's key lacks."""

    def __init__(self, config: Any, declared: tuple[str, ...], stage: str) -> None:
        self._config, self._declared, self._stage = config, (*declared, "machine"), stage

    def __getattr__(self, name: str) -> Any:
        if name not in self._declared:
            raise AttributeError(f"stage {self._stage} reads config.{name}, which it does not declare in `reads`")
        return getattr(self._config, name)


@dataclass(kw_only=True)
class Context:
    """Everything that a stage may use."""

    step: str  # name of the step in the pipeline
    config: Config  # the typed configuration, limited to the sections that the stage declares
    inputs: dict[str, Path]  # role → folder of the artifact that fills it; an optional role may be absent
    out: Path  # folder of the new artifact. A stage may write only here and in `work`
    work: Path  # folder of resumable state; survives crashes and is removed when the step is done
    root_seed: int  # the run's seed
    root_data_seed: int = 0  # the data's seed
    stage: str  # name of the stage
    stop_signal: Callable[[], int | None]  # returns the signal that requested the run to stop, or None
    on_metrics: Callable[[str, Record], None]  # called with the step's name and each record, for trackers
    encoded: Callable[..., Path] = field(default=lambda **request: Path())
    """Returns the folder of a shared artifact, creating it if needed: `SharedArtifacts.obtain`."""
    publish: Callable[[int, Callable[[Path], None], Mapping[str, Any]], str] = field(default=lambda *model: "")
    """Publishes the model after an iteration (from 1) as an artifact of its own and returns its name: the second
    argument fills a folder with the stage's outputs, the third is what `derive` records of it."""
    check_lock: Callable[[], None] = lambda: None
    """Raises if the lock of this step was removed, and with it maybe its work; call it before a save."""
    team: Team | None = None
    """The ranks that compute this step together, with this process as rank 0; None: a single process."""
    hints: Mapping[str, float] = field(default_factory=dict)
    """Facts about the whole run that change no result. train_chars: characters of training text that it will read."""
    externals: list[dict[str, Any]] = field(default_factory=list)
    """External data that was read: name, version or revision, licence, sha256."""
    metrics: dict[str, float] = field(default_factory=dict)  # the step's final numbers, for its manifest
    derived: dict[str, Any] = field(default_factory=dict)  # derived hyperparameters, for its manifest and the terminal
    resumed_from: int | None = None  # iteration from which this attempt resumed, if it did

    def seed(self, purpose: str) -> int:
        """Return a seed for one purpose of this stage, in [0, 2^32); equal settings give equal seeds."""
        return stage_seed(self.root_seed, self.stage, purpose)

    def data_seed(self, purpose: str) -> int:
        """Return a data seed for one purpose; equal in runs that differ only in `seed`."""
        return stage_seed(self.root_data_seed, self.stage, purpose)

    def records(self, name: str) -> Records:
        """Return a .jsonl file that belongs to the resumable work and is copied into the artifact."""
        return Records(self.work / "records" / f"{name}.jsonl")

    def log(self, record: Record) -> None:
        """Add a record to the step's metrics.jsonl (units in the keys) and pass it to the tracker."""
        self.records("metrics").append(record)
        self.on_metrics(self.step, record)

    def derive(self, numbers: dict[str, Any], *, shown: Collection[str] | None = None) -> None:
        """Record derived hyperparameters and print those in `shown`; None: all."""
        self.derived |= numbers
        self.work.mkdir(parents=True, exist_ok=True)
        write_whole(self.work / DERIVED, json.dumps(self.derived, default=str), durable=False)
        pairs = [f"{key} {format_number(value)}" for key, value in numbers.items() if shown is None or key in shown]
        print(f"{self.step:<10} {'  '.join(pairs)}", flush=True)

    def rewind_records(self, iteration: int) -> None:
        """Remove records after `iteration`, from which this attempt continues."""
        for path in (self.work / "records").glob("*.jsonl"):
            Records(path).truncate(iteration or -1)  # records at 0 are written again if no state was saved
        self.resumed_from = iteration or None

    def take_records(self, folder: Path) -> None:
        """Start with the records of a finished artifact that this step continues."""
        shutil.rmtree(self.work / "records", ignore_errors=True)
        (self.work / "records").mkdir(parents=True)
        for path in folder.glob("*.jsonl"):
            shutil.copyfile(path, self.records(path.stem).path)

    def progress(self, total: int, unit: str, *, start: int = 0) -> Progress:
        """Return a progress display for this step."""
        return Progress(self.step, total, unit, start=start)

    def should_stop(self) -> bool:
        """Return True if a signal requested the run to stop; check it between iterations."""
        return self.stop_signal() is not None

    def stop(self, where: str, *, saved: bool = False) -> Interrupted:
        """Return the exception to raise if a signal stopped the stage at `where`, after it saved its state."""
        number, how = self.stop_signal() or 15, ": saved" if saved else ""
        return Interrupted(f"{self.step} stopped{how} at {where}. The same command continues from there.", number)
