"""Conversations of JSONL files: the user's, pairs of answers, and those about the model itself.

Counterpart of nanochat's tasks/customjson.py.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from mlxchat.errors import ConfigError, DataError
from mlxchat.tasks.base import Conversation, Task, answered, find_fault, held_out, is_answer
from mlxchat.tasks.downloads import UrlTask

NANOCHAT_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/identity_conversations.jsonl"
"""nanochat's 1,000 conversations about itself."""
_FORMS = (
    '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]}, a list of messages, '
    '{"question", "answer"} or {"prompt", "completion"}'
)
_PAIR_FORMS = (
    '{"prompt" or "messages": text or messages, "chosen": ..., "rejected": ...}, where both answers are text or lists '
    "of messages; lists that begin with the user's message need no prompt"
)
_FAULTS_SHOWN = 10
T = TypeVar("T")


def read_lines(path: Path, parse: Callable[[Any], T], forms: str) -> list[T]:
    """Return what the lines of a .jsonl file in UTF-8 stand for; empty lines are skipped.

    `parse` takes a line's JSON value; its ValueErrors become one DataError, with the lines and the accepted `forms`.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}).") from None
    found, faults = [], []
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                found.append(parse(json.loads(line)))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            faults.append(f"line {number}: not JSON ({error})")
        except ValueError as error:
            faults.append(f"line {number}: {error}")
    if faults:
        shown = "\n  ".join(faults[:_FAULTS_SHOWN] + ["…"] * (len(faults) > _FAULTS_SHOWN))
        raise DataError(f"{path} has {len(faults)} lines that are wrong:\n  {shown}\nExpected {forms}.")
    return found


def read_conversations(path: Path, *, ends_answered: bool = True, least: int = 2) -> list[Conversation]:
    """Return the conversations of a .jsonl file, whose lines are checked by `parse_conversation`."""
    return read_lines(path, partial(parse_conversation, ends_answered=ends_answered, least=least), _FORMS)


def parse_conversation(value: Any, *, ends_answered: bool = True, least: int = 2) -> Conversation:
    """Return the conversation of a parsed line; raises ValueError with what is wrong.

    `ends_answered` refuses conversations that end with a user message, which nanochat accepts. `least` is the minimum
    number of messages; 1 also accepts {"question"}, {"prompt"} and a JSON string.
    """
    if isinstance(value, str) and least == 1:
        value = {"question": value}
    if isinstance(value, dict):
        for asked, answer in (("question", "answer"), ("prompt", "completion")):
            if asked in value and answer in value:
                if not isinstance(value[asked], str) or not isinstance(value[answer], str):
                    raise ValueError(f"{asked} and {answer} must be text")
                return answered(value[asked], value[answer])
            if asked in value and least == 1:
                value = [{"role": "user", "content": value[asked]}]
                break
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


@dataclass(eq=False, kw_only=True)
class Jsonl(Task):
    """Conversations of a file, judged by `is_answer`. Those with the same first user message are in the same split."""

    name: ClassVar[str] = "jsonl"
    own_path: ClassVar[Path | None] = None
    usually_held_out: ClassVar[float] = 0.0
    """held_out_frac if it is None."""
    path: str | Path | None = None
    """The .jsonl file, in UTF-8; empty lines are skipped. None: the task's default file."""
    held_out_frac: float | None = None
    """Approximate fraction of conversations in the test split, 0 to below 1. None: 0 for a user's file, 0.1 for the
    task's default file and for pairs."""
    contains: float = 0
    """1: a response is right if it contains the answer as whole words; 0: it must equal the answer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path is None and self.own_path is None:
            raise ConfigError(f"task {self.name} has no path. Set the .jsonl file to read: path=my.jsonl.")
        if self.held_out_frac is None:
            self.held_out_frac = 0.1 if self.path is None else self.usually_held_out
        if not 0 <= self.held_out_frac < 1:
            raise ConfigError(f"held_out_frac of task {self.name} is {self.held_out_frac}, expected 0 to below 1.")

    def _read(self, path: Path) -> list[Conversation]:
        return read_conversations(path)

    @cached_property
    def _lines(self) -> list[Conversation]:
        return self._read(Path(self.path or self.own_path or ""))

    @cached_property
    def _places(self) -> list[int]:
        """The indices of the split's conversations."""
        fraction, places = self.held_out_frac or 0.0, []
        for place, conversation in enumerate(self._lines):
            asked = next(each["content"] for each in conversation["messages"] if each["role"] == "user")
            if held_out(f"jsonl/{asked}", fraction) == (self.split == "test"):
                places.append(place)
        if not places:
            raise DataError(
                f"{self.path}: none of its conversations is in the {self.split} split of task {self.name}, whose "
                f"held_out_frac is {fraction:g}. Set options: {{held_out_frac: 0.1}} here and for the same file in the "
                "training mixture, or use split: train for a file that is not trained on."
            )
        return self._shuffled(places)

    def _own_size(self) -> int:
        return len(self._places)

    def _conversation(self, index: int, rng: random.Random) -> Conversation:
        return self._lines[self._places[index % len(self._places)]]

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        """Return the verdict of `is_answer`."""
        return is_answer(conversation, response, contains=bool(self.contains))


class Identity(Jsonl):
    """Conversations about the model itself: the bundled ones about mlxchat, or those of `path`."""

    name = "identity"
    own_path = Path(__file__).with_name("identity.jsonl")


class Pairs(Jsonl):
    """Pairs of a file: conversations that end with the chosen answer, the content of the rejected one beside them."""

    name = "pairs"
    is_paired = True
    usually_held_out = 0.1

    def _read(self, path: Path) -> list[Conversation]:
        return read_lines(path, parse_pair, _PAIR_FORMS)


def parse_pair(value: Any) -> Conversation:
    """Return {"messages", "rejected"} of a line: messages up to the chosen answer, rejected content."""
    if not isinstance(value, dict) or not {"chosen", "rejected"} <= value.keys():
        raise ValueError('not an object with "chosen" and "rejected"')
    chosen, rejected = (_whole(value, name) for name in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("chosen and rejected differ before their last message")
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same")
    return {"messages": chosen, "rejected": rejected[-1]["content"]}


def _whole(value: dict[str, Any], name: str) -> list[dict[str, Any]]:
    answer = value[name]
    if not isinstance(answer, list):
        answer = [{"role": "assistant", "content": answer}]
    # A list that begins with a question is the whole conversation.
    if not (answer and isinstance(answer[0], dict) and answer[0].get("role") in ("user", "system")):
        asked = next((value[key] for key in ("messages", "prompt", "question") if key in value), None)
        if isinstance(asked, str):
            asked = [{"role": "user", "content": asked}]
        if not isinstance(asked, list):
            raise ValueError(f"no question before {name}, neither in it nor as messages, prompt, question")
        if isinstance(system := value.get("system"), str) and system.strip():
            asked = [{"role": "system", "content": system}, *asked]
        answer = [*asked, *answer]
    try:
        messages: list[dict[str, Any]] = parse_conversation(answer)["messages"]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return messages


def both_answers(pairs: Sequence[Conversation] | Task) -> list[Conversation]:
    """Return both answers of each pair as conversations, the chosen one first."""
    found: list[Conversation] = []
    for pair in (pairs[index] for index in range(len(pairs))):
        rejected = {"role": "assistant", "content": pair["rejected"]}
        found += [{"messages": pair["messages"]}, {"messages": [*pair["messages"][:-1], rejected]}]
    return found


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
    def _lines(self) -> list[Conversation]:
        return read_conversations(self._file(), ends_answered=False)

    def _own_size(self) -> int:
        return len(self._lines)

    def _conversation(self, index: int, rng: random.Random) -> Conversation:
        return self._lines[index]
