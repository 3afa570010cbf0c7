"""Append-only JSON lines that survive a kill: of a step's metrics, of its attempts, of a run's events."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from mlxchat.config.secrets import redact

Record = dict[str, Any]


def now() -> str:
    """Return the time as ISO 8601 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Records:
    """One .jsonl file."""

    def __init__(self, path: Path) -> None:
        """Remember the file; it is made by the first record."""
        self.path = path

    def append(self, record: Record) -> None:
        """Write one line, at once, without the environment's secrets."""
        # Half a character, which no UTF-8 is of, becomes the escape that JSON has for it.
        line = json.dumps(redact(record), ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            if file.tell() and self._is_cut(file):
                file.write(b"\n")
            file.write(line)

    def read(self) -> list[Record]:
        """Return all whole records; a line cut by a crash is left out."""
        try:
            text = self.path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return []
        # Not splitlines: text may hold U+2028.
        records = (self.parse(line) for line in text.split(b"\n"))
        return [record for record in records if record is not None]

    @staticmethod
    def parse(line: bytes) -> Record | None:
        """Return the record of a line, or None if it is cut or damaged."""
        try:
            record = json.loads(line)
        except ValueError:
            return None
        return record if isinstance(record, dict) else None

    @staticmethod
    def _is_cut(file: IO[bytes]) -> bool:
        """Tell whether the last line lacks its end, as a crash leaves it."""
        file.seek(-1, 2)
        return file.read(1) != b"\n"

    def truncate(self, iteration: int) -> None:
        """Drop the records after `iteration`: work that a resumed attempt does again."""
        kept = [record for record in self.read() if record.get("iteration", 0) <= iteration]
        temporary = self.path.with_suffix(".tmp")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
        temporary.write_text(text, "utf-8", errors="backslashreplace")
        temporary.replace(self.path)
