"""What a search remembers: a line for each thing that was asked and told, added to and never changed.

The first line says what is searched. A process may die at any moment: what was asked and not told is run again, a last
line that was not written whole is taken away.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxchat.errors import ConfigError, StoreError
from mlxchat.runner.crash import crash_point
from mlxchat.runner.records import now

_MOST_SHOWN = 4


@dataclass(kw_only=True)
class Trial:
    """One run of a search."""

    number: int
    """From 1."""
    values: dict[str, Any]
    """Key → what was chosen."""
    status: str = "asked"
    """asked, done or failed."""
    value: float | None = None
    """The metric."""
    row: dict[str, Any] | None = None
    """Metrics, seconds, run and error."""


class Journal:
    """trials.jsonl of a search; whoever uses it holds the search's lock."""

    def __init__(self, path: Path) -> None:
        """Read what is there.

        Raises:
            StoreError: a line in the middle is damaged, or the file cannot be read.
        """
        self.path = path
        self.study: dict[str, Any] | None = None
        self.trials: list[Trial] = []
        try:
            text = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise StoreError(f"{path} cannot be read ({error.strerror})") from None
        whole = text[: text.rfind(b"\n") + 1]
        self._torn_at = len(whole) if len(whole) < len(text) else None
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, IndexError, TypeError, AttributeError):
                raise StoreError(
                    f"{path}: line {number} is damaged. Mend or remove it, or search on under sweep.name=NAME"
                ) from None

    def begin(self, study: dict[str, Any]) -> None:
        """Write down what is searched, or check that it is what was searched before.

        Raises:
            ConfigError: it is another search; with what differs.
        """
        if self.study is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._add({"study": study})
            return
        before, after = _flat(self.study), _flat(json.loads(json.dumps(study)))
        changes = [
            f"  {key}: {before.get(key, 'absent')} → {after.get(key, 'absent')}"
            for key in sorted(before.keys() | after.keys())
            if before.get(key, "absent") != after.get(key, "absent")
        ]
        if changes:
            more = [f"  and {len(changes) - _MOST_SHOWN} more"] if len(changes) > _MOST_SHOWN else []
            raise ConfigError(
                "\n".join(
                    [
                        f"{self.path.parent} holds another search, whose results would mean something else here:",
                        *changes[:_MOST_SHOWN],
                        *more,
                        "Search under another name (sweep.name=NAME), or remove that folder.",
                    ]
                )
            )

    def ask(self, values: dict[str, Any]) -> Trial:
        """Write down what the next trial is to try."""
        crash_point("search.asked")
        self._add({"ask": len(self.trials) + 1, "values": values})
        return self.trials[-1]

    def tell(self, trial: Trial, value: float | None, row: dict[str, Any]) -> None:
        """Write down what came of a trial; a value of None means that it failed."""
        self._add({"tell": trial.number, "value": value, **row})
        crash_point("search.told")

    @property
    def waiting(self) -> Trial | None:
        """The trial that was asked and has no result."""
        return next((trial for trial in self.trials if trial.status == "asked"), None)

    def _take(self, record: dict[str, Any]) -> None:
        if "study" in record:
            self.study = record["study"]
        elif "ask" in record:
            if record["ask"] != len(self.trials) + 1:
                raise ValueError
            self.trials.append(Trial(number=record["ask"], values=dict(record["values"])))
        else:
            trial = self.trials[record["tell"] - 1]
            trial.value = record["value"]
            trial.status = "failed" if trial.value is None else "done"
            trial.row = {key: value for key, value in record.items() if key not in ("tell", "value")}

    def _add(self, record: dict[str, Any]) -> None:
        record = {**record, "time": now()}
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        try:
            with self.path.open("ab") as file:
                if self._torn_at is not None:
                    file.truncate(self._torn_at)
                self._torn_at = file.seek(0, os.SEEK_END)
                file.write(line)
                file.flush()
                crash_point("search.written")
                os.fsync(file.fileno())
            self._torn_at = None
        except OSError as error:
            raise StoreError(
                f"{self.path} cannot be written ({error.strerror}). Mend that and run the same command again."
            ) from error
        self._take(record)


def _flat(study: dict[str, Any]) -> dict[str, Any]:
    from mlxchat.runner.plan import flatten_config

    return flatten_config(study)
