"""Conversations of JSONL files: the user's, and those about the model itself. Counterpart of tasks/customjson.py.

A line is {"messages": [...]}, a list of messages, {"question", "answer"} or {"prompt", "completion"}.
"""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

from mlxchat.errors import ConfigError, DataError
from mlxchat.tasks.answers import Conversation, calculator_parts, is_answer
from mlxchat.tasks.base import Task, dialogue, find_fault, held_out
from mlxchat.tasks.downloads import UrlTask

IDENTITY_FILE = Path(__file__).with_name("identity.jsonl")
NANOCHAT_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/identity_conversations.jsonl"
"""nanochat's 1,000 conversations about itself."""
_MAX_FAULTS_SHOWN = 20
# A conversation is tokenized as a whole before it is truncated to a row: 100 MB would take 3 GB of memory.
_MOST_LINE_BYTES = 16 << 20


@dataclass(eq=False, kw_only=True)
class Jsonl(Task):
    """Conversations of a file, judged by `is_answer`. Those with the same first user message are in the same split."""

    name: ClassVar[str] = "jsonl"
    own_path: ClassVar[Path | None] = None
    usually_held_out: ClassVar[float] = 0.0
    """held_out_frac of a user's file if it is None."""
    path: str | Path | None = None
    """The .jsonl file, in UTF-8; empty lines are skipped. None: the task's default file."""
    held_out_frac: float | None = None
    """Approximate fraction of conversations in the test split, 0 to below 1. None: 0 for a user's file, 0.1 for the
    task's default file and for pairs."""
    contains: float = 0
    """1: a response is right if it contains the answer as whole words; 0: it must equal the answer."""

    def __post_init__(self) -> None:
        """Read the file."""
        super().__post_init__()
        path = self.own_path if self.path is None else self.path
        if path is None:
            raise ConfigError(f"task {self.name} has no path. Set the .jsonl file to read: path=my.jsonl.")
        if self.held_out_frac is None:
            self.held_out_frac = 0.1 if self.path is None else self.usually_held_out
        if not 0 <= self.held_out_frac < 1:
            raise ConfigError(f"held_out_frac of task {self.name} is {self.held_out_frac}, expected 0 to below 1.")
        if self.contains not in (0, 1):
            raise ConfigError(
                f"contains of task {self.name} is {self.contains:g}, expected 0 (equal) or 1 (contains the answer)."
            )
        self._conversations = self._read(Path(path))
        places = [
            place
            for place, conversation in enumerate(self._conversations)
            if held_out(f"jsonl/{_first_user(conversation)}", self.held_out_frac) == (self.split == "test")
        ]
        if not places:
            remedy = (
                "Set options: {held_out_frac: 0.1} here and for the same file in the training mixture, or use split: "
                "train for a file that is not trained on"
                if self.split == "test"
                else "Add some, or lower held_out_frac"
            )
            raise DataError(
                f"{path}: none of its conversations is in the {self.split} split of task "
                f"{self.name}, whose held_out_frac is {self.held_out_frac:g}. {remedy}."
            )
        self._places = array("Q", self._shuffled(places))
        self.num_conversations = len(self._conversations)
        """Of the file, in both splits."""
        self.num_held_out = len(places) if self.split == "test" else self.num_conversations - len(places)

    def _read(self, path: Path) -> ConversationFile:
        return read_conversations(path)

    def _own_size(self) -> int:
        return len(self._places)

    def _conversation(self, index: int, rng: random.Random) -> Conversation:
        return self._conversations[self._places[index % len(self._places)]]

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        """Judge by `is_answer`."""
        return is_answer(conversation, response, contains=bool(self.contains))


class Identity(Jsonl):
    """Conversations about the model itself: the bundled ones about mlxchat, or those of `path`."""

    name = "identity"
    own_path = IDENTITY_FILE


@dataclass(eq=False, kw_only=True)
class IdentityConversations(UrlTask):
    """All conversations of a file in its order; by default nanochat's about itself."""

    name = "identity_conversations"
    splits = ("train",)
    repeats = False
    source_options: ClassVar[tuple[str, ...]] = ("url", "sha256")
    url: str = NANOCHAT_URL
    """Address of a .jsonl file in the format of task jsonl."""
    seed: int = field(default=0, init=False)  # the order is the file's

    @cached_property
    def _conversations(self) -> ConversationFile:
        path = self._file()
        assert path is not None, "no data are bundled"
        return read_conversations(path, ends_answered=False)

    def _own_size(self) -> int:
        return len(self._conversations)

    def _conversation(self, index: int, rng: random.Random) -> Conversation:
        return self._conversations[index]

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        """Judge as task jsonl does."""
        return is_answer(conversation, response)


def _first_user(conversation: Conversation) -> str:
    return next(str(message["content"]) for message in conversation["messages"] if message["role"] == "user")


class ConversationFile:
    """The conversations of a file. Only the offsets of their lines are in memory."""

    def __init__(self, path: Path, places: array[int], parse: Callable[[Any], Conversation]) -> None:
        """`places` are the offsets of the conversations' lines, which were checked before with `parse`."""
        self._path, self._places, self._parse = path, places, parse

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Conversation]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Conversation:
        """Return a conversation.

        Raises:
            DataError: the file changed.
        """
        place = self._places[index]
        try:
            with self._path.open("rb") as file:
                file.seek(place)
                return self._parse(json.loads(file.readline()))
        except (OSError, ValueError) as error:
            raise DataError(f"{self._path} changed while it was read ({error}).") from error


def read_conversations(path: Path, *, ends_answered: bool = True, least: int = 2) -> ConversationFile:
    """Check a .jsonl file of conversations and return them.

    Args:
        path: the file, in UTF-8; empty lines are skipped.
        ends_answered: refuse conversations that end with a user message, which nanochat accepts.
        least: minimum number of messages; 1 also accepts {"question"}, {"prompt"} and a JSON string.

    Raises:
        DataError: the file cannot be read, or has invalid lines (the message names all of them).

    """
    forms = (
        '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]}, '
        'a list of messages, {"question", "answer"} or {"prompt", "completion"}'
    )
    parse = partial(parse_conversation, ends_answered=ends_answered, least=least)
    return read_lines(path, parse, "conversations", forms)


def read_lines(path: Path, parse: Callable[[Any], Conversation], what: str, forms: str) -> ConversationFile:
    """Check each line of a .jsonl file and return what `parse` makes of them.

    Args:
        path: the file, in UTF-8; empty lines are skipped.
        parse: takes a line's JSON value; raises ValueError with what is wrong.
        what: the lines are, for messages.
        forms: of a line that are accepted.

    Raises:
        DataError: the file cannot be read, or lines of it are wrong; all of them are named.
    """
    places, faults, place = array("Q"), [], 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    fault = _find_fault(line, parse)
                    if fault:
                        faults.append(f"line {number}: {fault}")
                    places.append(place)
                place += len(line)
    except OSError as error:
        raise DataError(f"{path} cannot be read as a UTF-8 file of {what} ({error}).") from error
    if faults:
        more = len(faults) - _MAX_FAULTS_SHOWN
        shown = faults[:_MAX_FAULTS_SHOWN]
        if more > 0:
            rest = ", ".join(fault.split(":")[0].removeprefix("line ") for fault in faults[_MAX_FAULTS_SHOWN:])
            shown.append(f"and {more} more, lines {rest}")
        raise DataError(
            f"{path} has {len(faults)} lines that are not {what}:\n  " + "\n  ".join(shown) + f"\nExpected {forms}."
        )
    return ConversationFile(path, places, parse)


def _find_fault(line: bytes, parse: Callable[[Any], Conversation]) -> str:
    """Return why `parse` rejects a line, or an empty string if it does not."""
    if len(line) > _MOST_LINE_BYTES:
        return f"{len(line):,} bytes, expected at most {_MOST_LINE_BYTES:,}"
    try:
        parse(json.loads(line))
    except json.JSONDecodeError as error:
        return f"not JSON ({error.msg} at column {error.colno})"
    except UnicodeDecodeError:
        return "not UTF-8"
    except RecursionError:
        return "nested too deeply"
    except ValueError as error:
        return str(error)
    return ""


def parse_conversation(value: Any, *, ends_answered: bool = True, least: int = 2) -> Conversation:
    """Return the conversation of a parsed line, in one of the forms of `read_conversations`.

    Args:
        value: the parsed JSON.
        ends_answered: the last message must be the assistant's.
        least: fewest messages; with 1, a question alone is a conversation.

    Raises:
        ValueError: the line is no such conversation, and why.
    """
    if isinstance(value, str) and least == 1:
        value = {"question": value}
    if isinstance(value, dict):
        for asked, answered in (("question", "answer"), ("prompt", "completion")):
            if asked in value and (answered in value or least == 1):
                question, answer = value[asked], value.get(answered)
                if not (isinstance(question, str) and (isinstance(answer, str) or answered not in value)):
                    raise ValueError(f"{asked} and {answered} must be text")
                if not question.strip() and least == 1:
                    raise ValueError(f"{asked} is empty")
                if answer is None:
                    return {"messages": [{"role": "user", "content": question}]}
                return dialogue(question, calculator_parts(answer) if "<<" in answer else answer)
    messages: Any = value.get("messages") if isinstance(value, dict) else value
    if fault := find_fault(messages, least=least):
        raise ValueError(fault)
    if ends_answered and messages[-1]["role"] != "assistant":
        raise ValueError("the last message is not from the assistant")
    for message in messages:
        content = message["content"]
        if not (content.strip() if isinstance(content, str) else content):
            raise ValueError(f"content of the {message['role']} message is empty")
    return {"messages": [{"role": message["role"], "content": message["content"]} for message in messages]}
