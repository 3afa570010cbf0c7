"""A journal of a task's results, one JSON line per batch, from which an evaluation resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlxchat.store.crash import crash_point
from mlxchat.store.files import Record, Records


class Journal:
    """The results of one task's examples, by index."""

    def __init__(self, path: Path | None, about: Record) -> None:
        """Read the journal; ignore a truncated last line, and all lines of an evaluation with other settings.

        Args:
            path: the file; None: the results are only kept in memory.
            about: JSON data that identifies the evaluation.
        """
        self.records: dict[int, dict[str, Any]] = {}
        self._file: Records | None = None
        if path is None:
            return
        self._file = Records(path)
        lines = self._file.read()
        if not lines or lines[0] != {"about": about}:
            path.unlink(missing_ok=True)
            self._file.append({"about": about})
        for line in lines[1:] if lines and lines[0] == {"about": about} else ():
            self.records |= {record["index"]: record for record in line["results"]}

    def append(self, results: list[dict[str, Any]]) -> None:
        """Add the results of a batch."""
        if self._file is not None:
            self._file.append({"results": results})
            crash_point("eval.answered")
        self.records |= {record["index"]: record for record in results}
