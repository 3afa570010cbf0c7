"""The cost of answers, and the budget that limits it."""

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
# Upper bounds of the tokens that known chat formats add around each message, and before the first one (a default
# system prompt).
_MESSAGE_TOKENS, _FORMAT_TOKENS = 16, 64
_OWN_FIELDS = ("model", "messages", "temperature", "top_p", "max_tokens", "max_completion_tokens", "seed")


@dataclass
class Usage:
    """Tokens of answers, as the teacher counts them."""

    input: int = 0
    output: int = 0
    unknown: int = 0
    """Number of answers without token counts."""

    def add(self, tokens: tuple[int, int] | None) -> None:
        """Add one answer's tokens; None: unknown."""
        if tokens is None:
            self.unknown += 1
        else:
            self.input += tokens[0]
            self.output += tokens[1]


@dataclass(frozen=True)
class Prices:
    """Prices of a million tokens, in any currency; None: unknown."""

    input: float | None = None
    output: float | None = None

    def of(self, usage: Usage) -> float | None:
        """Return what these tokens cost, None if a price is unknown."""
        if self.input is None or self.output is None:
            return None
        return (usage.input * self.input + usage.output * self.output) / _MILLION


class Budget:
    """A cost limit across runs. A request's maximum cost is recorded in a ledger file before the request is sent.

    Reservations left by a killed process count in full, since the teacher may bill those requests.
    """

    def __init__(self, most: float | None, prices: Prices, ledger: Path | None = None) -> None:
        """Read the ledger and lock it.

        Args:
            most: the limit; None: no limit.
            prices: of tokens.
            ledger: the file with the costs of earlier runs; None: they do not count.

        Raises:
            StoreError: the file cannot be used, or another process holds its lock.
        """
        self.most, self._prices, self._path = most, prices, ledger
        self.spent = 0.0
        """Cost of all settled requests, including earlier runs."""
        self.unanswered = 0.0
        """Part of `spent`: unanswered requests of this run."""
        self._reserved: dict[str, float] = {}
        self._answered = False
        self._more = (0, 0)  # largest excess of an answer's tokens over their predicted maximum
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
            raise StoreError(f"another mlxchat distill --max-cost uses {ledger}: wait until it ends") from None
        except OSError as error:
            self.close()
            raise self._fault(error) from None
        self.spent = _sum_ledger(data)
        if data and not data.endswith(b"\n"):
            self._write_bytes(b"\n")

    def fits(self, most_tokens: tuple[int, int]) -> bool:
        """Return True if a request of at most these (input, output) tokens may be sent now.

        Before the first answer only one request is sent at a time: its token count shows what the chat format adds.
        """
        if self.most is None:
            return True
        if self._reserved and not self._answered:
            return False
        return math.fsum((self.spent, *self._reserved.values(), self._most(most_tokens))) <= self.most

    def has_waiting(self) -> bool:
        """Return True if there are reservations that answers may still reduce."""
        return bool(self._reserved)

    def reserve(self, most_tokens: tuple[int, int]) -> str:
        """Reserve the maximum cost of a request and return the reservation's name.

        Raises:
            StoreError: the ledger cannot be written, so the request must not be sent.
        """
        name, cost = secrets.token_hex(8), self._most(most_tokens)
        self._write({"id": name, "most": cost})
        self._reserved[name] = cost
        return name

    def settle(self, name: str, most_tokens: tuple[int, int], tokens: tuple[int, int] | None) -> None:
        """Replace a reservation by the cost of the answer's tokens; by its maximum if they are unknown."""
        self._answered = True
        if tokens is None:
            self._settle(name, self._reserved[name])
            return
        self._more = (max(self._more[0], tokens[0] - most_tokens[0]), max(self._more[1], tokens[1] - most_tokens[1]))
        self._settle(name, self._cost(tokens))

    def settle_unanswered(self, name: str, *, free: bool) -> None:
        """Count an unanswered request at its maximum, or at nothing if it is certainly not billed (`free`)."""
        cost = 0.0 if free else self._reserved[name]
        self.unanswered += cost
        self._settle(name, cost)

    def close(self) -> None:
        """Release the ledger's lock."""
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
        return StoreError(f"{self._path}, the ledger of --max-cost, cannot be used ({error.strerror})")

    def _most(self, tokens: tuple[int, int]) -> float:
        return self._cost((tokens[0] + self._more[0], tokens[1] + self._more[1]))

    def _cost(self, tokens: tuple[int, int]) -> float:
        return self._prices.of(Usage(*tokens)) or 0.0


def _sum_ledger(data: bytes) -> float:
    """Return the sum of a ledger; reservations that were never settled count in full."""
    costs: dict[str, float] = {}
    for line in data.split(b"\n"):
        record = Records.parse(line) or {}
        for field in ("most", "cost"):
            value = record.get(field)
            if isinstance(value, int | float) and value >= 0:
                costs[str(record.get("id"))] = float(value)
    return math.fsum(costs.values())


def most_tokens(body: dict[str, Any], max_tokens: int) -> tuple[int, int]:
    """Return an upper bound of a request's (input, output) tokens: a text has at most as many tokens as bytes.

    The longer of the text and its NFKC form counts, since some tokenizers normalize (one character may become 18).

    Args:
        body: of the request. Fields that mlxchat does not set (tools, a schema) count as part of the prompt.
        max_tokens: maximum length of the answer.
    """
    texts = [message["content"] for message in body["messages"]]
    size = sum(max(_num_bytes(text), _num_bytes(normalize("NFKC", text))) + _MESSAGE_TOKENS for text in texts)
    size += _FORMAT_TOKENS
    further = {name: value for name, value in body.items() if name not in _OWN_FIELDS}
    return size + (len(json.dumps(further)) if further else 0), max_tokens


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))
