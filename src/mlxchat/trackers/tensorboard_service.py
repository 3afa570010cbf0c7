"""TensorBoard's event files, written by tensorboardX: outputs/tensorboard/<run>/<step>.

A step has a folder, and so a curve, of its own: `tensorboard --logdir outputs/tensorboard` shows the losses of
pretraining and of fine-tuning one over the other.
"""

from __future__ import annotations

import os
from typing import Any

from mlxchat.trackers.service import Numbers, Results, TrackedRun

# What a killed process may lose; the next one writes it again.
FLUSH_SECONDS = 5


class TensorBoardService:
    """One folder of event files for each step."""

    def __init__(self, run: TrackedRun) -> None:
        """Prepare the folder.

        Raises:
            ImportError: tensorboardX is not installed.
        """
        from tensorboardX import SummaryWriter

        self._open: Any = SummaryWriter
        self._folder = run.outputs / "tensorboard" / run.name
        self._writers: dict[str, Any] = {}
        self._is_continued = run.is_continued
        self._tags = run.tags

    def log(self, step: str, iteration: int, numbers: Numbers) -> None:
        """Write one scalar for each number."""
        if step not in self._writers:
            # What a killed run wrote of later iterations is computed again: the viewer drops the former.
            purge = {"purge_step": iteration} if self._is_continued else {}
            self._writers[step] = self._begin(step, **purge)
        for name, value in numbers.items():
            self._writers[step].add_scalar(name, value, iteration)

    def _begin(self, name: str, **options: Any) -> Any:
        # Without the process in its name, the file of a run that continues within a second would replace the former.
        return self._open(
            str(self._folder / name), filename_suffix=f".{os.getpid()}", flush_secs=FLUSH_SECONDS, **options
        )

    def finish(self, results: Results) -> None:
        """Write final numbers and the table, and close the files."""
        if results.numbers or results.rows:
            with self._begin("results") as writer:
                for step, numbers in results.numbers.items():
                    for name, value in numbers.items():
                        writer.add_scalar(f"{step}/{name}", value, 0)
                if results.rows:
                    writer.add_text("metrics", _markdown(results.header, results.rows), 0)
                if self._tags:
                    writer.add_text("tags", ", ".join(self._tags), 0)
        for writer in self._writers.values():
            writer.close()


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
