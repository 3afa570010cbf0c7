"""What a teacher is asked: lines of a file, filled templates, or the conversations of a task."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlxchat.config.schema import TaskItem
from mlxchat.distill.words import clean
from mlxchat.errors import ConfigError, DataError, suggest
from mlxchat.tasks import load_item
from mlxchat.tasks.answers import is_answer

_MOST_FAULTS_SHOWN = 20
_FORMS = 'a text, {"question": …}, {"prompt": …} or {"messages": [{"role": "user", "content": …}]} on each line'
_SLOT = re.compile(r"\{(\w+)\}")

Message = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """A conversation up to where the teacher answers."""

    messages: list[Message]
    """As a mixture holds them: system or not, then user and assistant in turn, the last from the user."""
    name: str
    """What people call it."""
    judge: Callable[[str], bool] | None = None
    """Tells whether an answer is right; None: nothing says so."""

    def asked(self) -> list[dict[str, str]]:
        """Return the messages as endpoints take them: contents of parts become text."""
        return [{"role": message["role"], "content": _text_of(message["content"])} for message in self.messages]


def questions_of_task(item: TaskItem) -> list[Question]:
    """Return the questions of a task, its data fetched if need be: each conversation without its last answer.

    Raises:
        ConfigError, DataError, PassingError: as `load_item` and `Task.fetch`.
    """
    task = load_item(item)
    task.fetch()
    questions = []
    for index in range(len(task)):
        conversation = task[index]
        name = f"{item.task} conversation {index}"
        messages = _without_answer(conversation["messages"])
        if not messages:
            raise DataError(f"{name} has no message of a user to ask")
        questions.append(Question(messages, name, partial(task.evaluate, conversation)))
    return questions


def questions_of_file(path: Path, *, contains: bool = False) -> list[Question]:
    """Return the questions of a .txt file (one on a line) or a .jsonl file; empty lines are skipped.

    `contains`: an answer that contains the file's is right too (`is_answer`).

    Raises:
        DataError: it cannot be read, is empty, or lines of it are no questions; all of them are named.
    """
    questions, faults = [], []
    try:
        # Not splitlines: a text may hold U+2028.
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8")
            value = text.strip() if path.suffix == ".txt" else json.loads(text)
            messages, answered = _read(value)
        except json.JSONDecodeError as error:
            faults.append(f"line {number}: not JSON ({error.msg} at column {error.colno})")
        except UnicodeDecodeError:
            faults.append(f"line {number}: not UTF-8")
        except RecursionError:
            faults.append(f"line {number}: not JSON (nested too deeply)")
        except ValueError as error:
            faults.append(f"line {number}: {error}")
        else:
            judge = partial(is_answer, {"messages": answered}, contains=contains) if answered else None
            questions.append(Question(messages, f"{path.name} line {number}", judge))
    if faults:
        more = len(faults) - _MOST_FAULTS_SHOWN
        shown = [*faults[:_MOST_FAULTS_SHOWN], *([f"and {more} more"] if more > 0 else [])]
        raise DataError(f"{path} has {len(faults)} lines that are no questions:\n  " + "\n  ".join(shown)
                        + f"\nExpected {_FORMS}.")  # fmt: skip
    if not questions:
        raise DataError(f"{path} holds no question. Expected {_FORMS}.")
    return questions


def read_fills(files: Mapping[str, Path]) -> dict[str, list[str]]:
    """Return slot → the lines of its file.

    Raises:
        DataError: files cannot be read or are empty; all of them are named.
    """
    fills, faults = {}, []
    for slot, path in files.items():
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").split("\n")]
        except (OSError, UnicodeDecodeError) as error:
            faults.append(f"--fill {slot}: {path} cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'})")
            continue
        fills[slot] = [line for line in lines if line]
        if not fills[slot]:
            faults.append(f"--fill {slot}: {path} is empty")
    if faults:
        raise DataError("\n".join(faults))
    return fills


def fill(
    questions: Sequence[Question], fills: Mapping[str, Sequence[str]], size: int | None, seed: int
) -> list[Question]:
    """Return every question with every combination of what its {slots} may be, or `size` of these, drawn evenly.

    Args:
        questions: templates; what is in braces and has no fill stays as it is.
        fills: slot → texts.
        size: how many to draw, without repetition; None: all.
        seed: of the drawing.

    Raises:
        ConfigError: a fill has no slot in any question.
    """
    slots = [[slot for slot in fills if f"{{{slot}}}" in _all_text(question)] for question in questions]
    unused = [slot for slot in fills if not any(slot in each for each in slots)]
    if unused:
        found = sorted({slot for question in questions for slot in _SLOT.findall(_all_text(question))})
        raise ConfigError(
            "\n".join(f"--fill {slot}: no question has {{{slot}}}.{suggest(slot, found)}" for slot in unused)
        )
    counts = [math.prod(len(fills[slot]) for slot in each) for each in slots]
    total = sum(counts)
    chosen = range(total) if size is None or size >= total else sorted(random.Random(seed).sample(range(total), size))
    return list(_filled(questions, slots, counts, fills, chosen))


def without_repeats(questions: Sequence[Question]) -> list[Question]:
    """Return the questions, of equal ones the first alone."""
    return list({json.dumps(question.asked()): question for question in reversed(questions)}.values())[::-1]


def _filled(
    questions: Sequence[Question], slots: Sequence[Sequence[str]], counts: Sequence[int],
    fills: Mapping[str, Sequence[str]], chosen: Sequence[int],
) -> Iterator[Question]:  # fmt: skip
    place, first = 0, 0
    for number in chosen:
        while number >= first + counts[place]:
            first += counts[place]
            place += 1
        question, rest = questions[place], number - first
        values: dict[str, str] = {}
        for slot in reversed(slots[place]):
            rest, index = divmod(rest, len(fills[slot]))
            values[slot] = fills[slot][index]

        def put(match: re.Match[str], values: Mapping[str, str] = values) -> str:
            return values.get(match[1], match[0])

        messages = [
            {**message, "content": _SLOT.sub(put, message["content"])}
            if isinstance(message["content"], str) else message
            for message in question.messages
        ]  # fmt: skip
        told = ", ".join(f"{slot}={value}" for slot, value in values.items())
        # A reference answer belongs to the question before it was filled.
        yield Question(messages, f"{question.name} ({told})", None) if told else question


def _read(value: Any) -> tuple[list[Message], list[Message]]:
    """Return the messages to ask, and the whole conversation if the line has an answer; ValueError: what is wrong."""
    if isinstance(value, str):
        value = {"question": value}
    if isinstance(value, dict):
        for asked, answered in (("question", "answer"), ("prompt", "completion")):
            if asked in value:
                if not isinstance(value[asked], str) or not value[asked].strip():
                    raise ValueError(f"{asked} is no text, or empty")
                asking: list[Message] = [{"role": "user", "content": clean(value[asked])}]
                answer = value.get(answered)
                if answer is None:
                    return asking, []
                if not isinstance(answer, str) or not answer.strip():
                    raise ValueError(f"{answered} is no text, or empty")
                return asking, [*asking, {"role": "assistant", "content": answer}]
    messages = value.get("messages") if isinstance(value, dict) else value
    if not isinstance(messages, list) or not messages:
        raise ValueError("no question, prompt or messages")
    found = []
    for message in messages:
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("content"), str)
            or not message["content"].strip()
        ):
            raise ValueError("a message has no content, or one that is no text")
        found.append({"role": message.get("role"), "content": clean(message["content"])})
    turns = found[1:] if found[0]["role"] == "system" else found
    for position, message in enumerate(turns):
        expected = "assistant" if position % 2 else "user"
        if message["role"] != expected:
            raise ValueError(f'message {position + 1} is from "{message["role"]}", expected "{expected}"')
    if not turns:
        raise ValueError("no message from a user")
    if turns[-1]["role"] == "user":
        return found, []
    return found[:-1], found


def _without_answer(messages: Sequence[Message]) -> list[Message]:
    last = max((place for place, message in enumerate(messages) if message["role"] == "user"), default=-1)
    return [{"role": message["role"], "content": message["content"]} for message in messages[: last + 1]]


def _text_of(content: Any) -> str:
    return content if isinstance(content, str) else "".join(str(part["text"]) for part in content)


def _all_text(question: Question) -> str:
    return "\n".join(_text_of(message["content"]) for message in question.messages)
