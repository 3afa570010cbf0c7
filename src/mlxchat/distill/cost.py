"""What answers cost, and how much may still be spent."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from unicodedata import normalize

from mlxchat.errors import StoreError
from mlxchat.store.files import Records

_MILLION = 1e6
# Tokens around a message in any chat format that is known, and those that formats put before all of them (a system
# prompt of their own); a text has no more tokens than bytes.
_MESSAGE_TOKENS, _FORMAT_TOKENS = 16, 64
_OWN_FIELDS = ("model", "messages", "temperature", "top_p", "max_tokens", "max_completion_tokens", "seed")


@dataclass
class Usage:
    """Tokens of answers, as the teacher counts them."""

    input: int = 0
    output: int = 0
    unknown: int = 0
    """Answers of which the teacher did not say."""

    def add(self, tokens: tuple[int, int] | None) -> None:
        """Count one answer's tokens; None: not told."""
        if tokens is None:
            self.unknown += 1
        else:
            self.input += tokens[0]
            self.output += tokens[1]


@dataclass(frozen=True)
class Prices:
    """Of a million tokens, in any currency; None: unknown."""

    input: float | None = None
    output: float | None = None

    def of(self, usage: Usage) -> float | None:
        """Return what these tokens cost, None if a price is unknown."""
        if self.input is None or self.output is None:
            return None
        return (usage.input * self.input + usage.output * self.output) / _MILLION


class Budget:
    """Money that may be spent. The most that a request can cost is reserved, in a file, before the request is sent.

    A reservation that nothing settled, since the process was killed, counts in full: the teacher may bill the request.
    """

    def __init__(self, most: float | None, prices: Prices, ledger: Path | None = None) -> None:
        """Take the limit (None: none) and the file with the costs of earlier runs (None: they do not count).

        Raises:
            StoreError: the file cannot be used, or another process spends by it now.
        """
        self.most, self._prices, self._path = most, prices, ledger
        self.spent = 0.0
        """Cost of all requests that were settled, those of earlier runs among them."""
        self.unanswered = 0.0
        """Part of it: reserved by this run for requests without an answer."""
        self._reserved: dict[str, float] = {}
        self._answered = False
        self._more = (0, 0)  # tokens that answers had beyond what was thought to be the most
        self._file: BinaryIO | None = None
        if most is None or ledger is None:
            return
        try:
            self._file = ledger.open("ab+", buffering=0)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file.seek(0)
            data = self._file.read()
        except BlockingIOError:
            self.close()
            raise StoreError(f"another mlxchat distill --max-cost works on {ledger}: wait until it has ended") from None
        except OSError as error:
            self.close()
            raise self._fault(error) from None
        self.spent = _sum_ledger(data)
        if data and not data.endswith(b"\n"):
            self._write_bytes(b"\n")

    def fits(self, most_tokens: tuple[int, int]) -> bool:
        """Tell whether a request of at most so many input and output tokens may be sent now.

        Before the first answer, only one request is sent at a time, since only an answer shows how many tokens the
        teacher's own format adds.
        """
        if self.most is None:
            return True
        if self._reserved and not self._answered:
            return False
        return math.fsum((self.spent, *self._reserved.values(), self._most(most_tokens))) <= self.most

    def has_waiting(self) -> bool:
        """Tell whether something is reserved, part of which will be free again."""
        return bool(self._reserved)

    def reserve(self, most_tokens: tuple[int, int]) -> str:
        """Count a request that is about to be sent at its maximum; return the reservation.

        Raises:
            StoreError: it cannot be written down, so the request must not be sent.
        """
        name, cost = secrets.token_hex(8), self._most(most_tokens)
        self._write({"id": name, "most": cost})
        self._reserved[name] = cost
        return name

    def settle(self, name: str, most_tokens: tuple[int, int], tokens: tuple[int, int] | None) -> None:
        """Count an answer: by its tokens, or at the maximum if the teacher did not say them."""
        self._answered = True
        if tokens is None:
            self._settle(name, self._reserved[name])
            return
        self._more = (max(self._more[0], tokens[0] - most_tokens[0]), max(self._more[1], tokens[1] - most_tokens[1]))
        self._settle(name, self._cost(tokens))

    def settle_unanswered(self, name: str, *, free: bool) -> None:
        """Count a request without an answer: at the maximum, unless the teacher certainly did no work (`free`)."""
        cost = 0.0 if free else self._reserved[name]
        self.unanswered += cost
        self._settle(name, cost)

    def close(self) -> None:
        """Let other processes use the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _settle(self, name: str, cost: float) -> None:
        self.spent += cost
        del self._reserved[name]
        self._write({"id": name, "cost": cost})

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            self._write_bytes(json.dumps(record).encode() + b"\n")

    def _write_bytes(self, line: bytes) -> None:
        assert self._file is not None
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise self._fault(error) from None

    def _fault(self, error: OSError) -> StoreError:
        return StoreError(f"{self._path}, the costs that --max-cost limits, cannot be used ({error.strerror})")

    def _most(self, tokens: tuple[int, int]) -> float:
        return self._cost((tokens[0] + self._more[0], tokens[1] + self._more[1]))

    def _cost(self, tokens: tuple[int, int]) -> float:
        return self._prices.of(Usage(*tokens)) or 0.0


def _sum_ledger(data: bytes) -> float:
    """Return what the lines of a ledger add up to; a reservation without its settlement counts in full."""
    costs: dict[str, float] = {}
    for line in data.split(b"\n"):
        record = Records.parse(line) or {}
        for field in ("most", "cost"):
            value = record.get(field)
            if isinstance(value, int | float) and value >= 0:
                costs[str(record.get("id"))] = float(value)
    return math.fsum(costs.values())


def most_tokens(body: dict[str, Any], max_tokens: int) -> tuple[int, int]:
    """Return the most input and output tokens that a request can have: a text has no more tokens than bytes.

    Some tokenizers normalize text by NFKC first, which can make 18 letters of one character.

    Args:
        body: of the request. Fields that mlxchat does not set itself (tools, a schema) may become part of the prompt.
        max_tokens: longest answer.
    """
    texts = [message["content"] for message in body["messages"]]
    size = sum(max(_num_bytes(text), _num_bytes(normalize("NFKC", text))) + _MESSAGE_TOKENS for text in texts)
    size += _FORMAT_TOKENS
    further = {name: value for name, value in body.items() if name not in _OWN_FIELDS}
    return size + (len(json.dumps(further)) if further else 0), max_tokens


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))
