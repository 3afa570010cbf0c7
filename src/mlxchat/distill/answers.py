"""A cache of teachers' answers, keyed by the hash of the request: one append-only JSONL file for each teacher.

A killed command resumes from it, and no request is paid for twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from mlxchat.errors import StoreError
from mlxchat.store.crash import crash_point
from mlxchat.store.files import Records, now
from mlxchat.store.fingerprint import canonical_json

_SYNC_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A teacher's answer to one request."""

    text: str
    parts: list[dict[str, str]] | None = None
    """Text and calculator calls, if the teacher separates them (mlxchat serve)."""
    finish: str | None = None
    """The finish reason: stop, length, …"""
    tokens: tuple[int, int] | None = None
    """Input and output tokens, as the teacher counts them; None: unknown."""
    model: str | None = None
    """The model's name in the response."""


def request_key(url: str, body: dict[str, Any], sample: int, fingerprint: str | None = None) -> str:
    """Return the cache key of a request: a SHA-256 of these values.

    Args:
        url: the endpoint.
        body: of the request.
        sample: index among several answers to one question.
        fingerprint: of the model's weights; None if the endpoint sends none.
    """
    parts = {"url": url, "body": body, "sample": sample}
    if fingerprint is not None:
        parts["fingerprint"] = fingerprint
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()


def public_url(url: str) -> str:
    """Return an address without its query, which may contain a key."""
    return urlunsplit(urlsplit(url)._replace(query="", fragment=""))


class Answers:
    """The cached answers of one teacher. Only their file offsets are kept in memory."""

    def __init__(self, folder: Path, url: str, model: str) -> None:
        """Index the file. Truncated and damaged lines are skipped and counted in `num_damaged`.

        Raises:
            StoreError: the file cannot be read.
        """
        self.path = folder / f"{hashlib.sha256(f'{url} {model}'.encode()).hexdigest()[:16]}.jsonl"
        self.num_damaged = 0
        self.fingerprint: str | None = None
        """Of the model that gave the latest answers; None: unknown."""
        self._places: dict[str, int] = {}
        self._synced = time.monotonic()
        self._about = {"teacher": public_url(url), "model": model}
        self._pending: list[dict[str, Any]] = []  # records to write before the next answer
        try:
            self._read()
        except FileNotFoundError:
            self._pending.append(self._about)
        except OSError as error:
            raise StoreError(
                f"{self.path} cannot be read ({error.strerror}). Choose another folder: --cache DIR"
            ) from None

    def __contains__(self, key: str) -> bool:
        """Return True if the request was answered."""
        return key in self._places

    def __getitem__(self, key: str) -> Answer:
        """Return the answer to a request."""
        with self.path.open("rb") as file:
            file.seek(self._places[key])
            record = json.loads(file.readline())["answer"]
        tokens = record["tokens"]
        return Answer(**{**record, "tokens": None if tokens is None else (tokens[0], tokens[1])})

    def identify(self, fingerprint: str | None) -> None:
        """Record the model's fingerprint together with the next answer."""
        if fingerprint != self.fingerprint:
            self.fingerprint = fingerprint
            self._pending.append({**self._about, "fingerprint": fingerprint})

    def forget(self, keys: Iterable[str]) -> None:
        """Forget these answers. The file changes with the first new answer: an unreachable teacher loses none."""
        known = [key for key in keys if self._places.pop(key, None) is not None]
        if known:
            self._pending.append({"forgotten": known})

    def add(self, key: str, answer: Answer) -> None:
        """Append an answer to the file, which is synced at most every second.

        Raises:
            StoreError: the file cannot be written.
        """
        # ASCII can represent lone surrogates. A single write, since other processes may append at the same time.
        line = json.dumps({"key": key, "answer": asdict(answer), "time": now()}).encode("ascii") + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for record in self._pending:
                Records(self.path).append(record)
            self._pending.clear()
            with self.path.open("ab+", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                file.seek(max(0, end - 1))
                cut = file.read(1) not in (b"\n", b"")
                written = file.write(b"\n" + line if cut else line)
                # Not `end`: another process may have appended meanwhile.
                self._places[key] = file.tell() - len(line)
                if written < len(line):
                    raise OSError(28, "no space is left on its disk")
                crash_point("distill.answered")
                if time.monotonic() - self._synced >= _SYNC_SECONDS:
                    os.fsync(file.fileno())
                    self._synced = time.monotonic()
        except OSError as error:
            raise StoreError(
                f"{self.path} cannot be written ({error.strerror}). Correct that or choose another folder with "
                "--cache DIR, then run the same command again."
            ) from None

    def _read(self) -> None:
        place = 0
        with self.path.open("rb") as file:
            for line in file:
                record = Records.parse(line) if line.endswith(b"\n") else None
                if record is None and line.strip():
                    self.num_damaged += 1
                elif record and _is_answer(record):
                    self._places[str(record["key"])] = place
                elif record and isinstance(record.get("forgotten"), list):
                    for key in record["forgotten"]:
                        self._places.pop(str(key), None)
                elif record and "teacher" in record:
                    fingerprint = record.get("fingerprint")
                    self.fingerprint = fingerprint if isinstance(fingerprint, str) else None
                place += len(line)


def _is_answer(record: dict[str, Any]) -> bool:
    answer = record.get("answer")
    return isinstance(record.get("key"), str) and isinstance(answer, dict) and isinstance(answer.get("text"), str) and (
        answer.keys() == Answer.__dataclass_fields__.keys()
    )  # fmt: skip
