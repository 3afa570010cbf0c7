"""Reads questions for a teacher from a file or a task; reference answers are removed, or compared in pairs."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from mlxchat.config.schema import TaskItem
from mlxchat.errors import DataError, visible
from mlxchat.tasks import load_item
from mlxchat.tasks.answers import Conversation, answer_text, is_answer
from mlxchat.tasks.jsonl import parse_conversation, read_conversations

# Control characters except tab and newline, and lone surrogates.
_UNFIT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
# After the system prompt, so that --system may state the criteria.
_COMPARISON = """Which of two answers to the last message of this conversation is better?

<conversation>
{conversation}
</conversation>

<answer_A>
{first}
</answer_A>

<answer_B>
{second}
</answer_B>

Reply with one word: A, B or tie."""
_VERDICT = re.compile(r"[\W_]*(?:answer[\W_]+)?(a|b|tie)[\W_]*", re.IGNORECASE)

Message = dict[str, Any]

CONVERSATION_FORMAT = {
    "type": "json_schema",
    "json_schema": {
        "name": "conversation",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {
                "messages": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {
                            "role": {"type": "string", "enum": ["user", "assistant"]},
                            "content": {"type": "string"},
                        },
                        "required": ["role", "content"],
                        "additionalProperties": False,
                    },
                }
            },
            "required": ["messages"],
            "additionalProperties": False,
        },
    },
}
"""Field response_format of a request for a whole conversation, as in nanochat's dev/gen_synthetic_data.py."""


@dataclass(frozen=True)
class Question:
    """A conversation that ends with the user's message."""

    messages: list[Message]
    """An optional system message, then user and assistant alternately."""
    name: str
    """For messages: file and number, or task and number."""
    judge: Callable[[str], bool] | None = None
    """Returns True for a right answer; None: there is no reference answer."""
    answers: tuple[Any, Any] | None = None
    """Contents of two answers that the teacher compares, as A and B; None: the teacher answers the question."""

    def asked(self) -> list[dict[str, str]]:
        """Return the messages in OpenAI's format: contents made of parts become plain text."""
        asked = [{"role": each["role"], "content": _text_of(each["content"])} for each in self.messages]
        if self.answers is None:
            return asked
        conversation = "\n\n".join(f"{each['role']}: {each['content']}" for each in asked)
        first, second = map(_text_of, self.answers)
        return [{"role": "user", "content": _COMPARISON.format(conversation=conversation, first=first, second=second)}]


def questions_of_task(item: TaskItem, limit: int | None = None) -> list[Question]:
    """Return the first `limit` questions of a task; its data are downloaded if necessary.

    Raises:
        ConfigError, DataError, PassingError: as in `load_item` and `Task.fetch`.
    """
    task = load_item(item)
    task.fetch()
    conversations = (task[index] for index in range(len(task))[:limit])
    return _distinct([
        _question(conversation, f"{item.task} conversation {index}", partial(task.evaluate, conversation))
        for index, conversation in enumerate(conversations)
    ])  # fmt: skip


def questions_of_file(path: Path) -> list[Question]:
    """Return the questions of a .txt file (one per line) or a .jsonl file; empty lines are skipped.

    Raises:
        DataError: the file cannot be read, has no question, or has invalid lines (the message names all of them).
    """
    if path.suffix == ".jsonl":
        conversations = list(read_conversations(path, ends_answered=False, least=1))
    else:
        try:
            lines = path.read_bytes().decode("utf-8").split("\n")  # splitlines would also split at U+2028
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read as UTF-8 text ({error}).") from None
        conversations = [{"messages": [{"role": "user", "content": line.strip()}]} for line in lines if line.strip()]
    if not conversations:
        raise DataError(f"{path} has no questions. Expected one on each line.")
    questions = []
    for number, conversation in enumerate(conversations, start=1):
        answered = conversation["messages"][-1]["role"] == "assistant"
        judge = partial(is_answer, conversation) if answered else None
        questions.append(_question(conversation, f"{path.name} question {number}", judge))
    return _distinct(questions)


def comparisons_of_file(path: Path) -> list[Question]:
    """Return comparisons of the different answers that the conversations of a .jsonl file give to the same question.

    The answers to a question are put in a random order, and each is compared with the next: n answers give n - 1
    comparisons. A hash of the texts determines the order, so it does not depend on other lines.

    Raises:
        DataError: the file cannot be read, has invalid lines, or has no question with two different answers.
    """
    groups: dict[str, tuple[Question, dict[str, Any]]] = {}
    for number, conversation in enumerate(read_conversations(path), start=1):
        question = _question(conversation, f"{path.name} conversation {number}", None)
        content = conversation["messages"][-1]["content"]
        key = json.dumps(question.asked())
        groups.setdefault(key, (question, {}))[1].setdefault(_text_of(content).strip(), content)
    comparisons = []
    for key, (question, answers) in groups.items():
        texts = sorted(answers)
        random.Random(json.dumps([key, texts])).shuffle(texts)
        comparisons += [replace(question, answers=pair) for pair in pairwise(answers[text] for text in texts)]
    if not comparisons:
        raise DataError(
            f"{path} has no question with two different answers. Expected conversations that differ in the last "
            "message alone, as mlxchat distill --samples 4 --temperature 1 writes them."
        )
    return comparisons


def read_verdict(text: str) -> str | None:
    """Return a judge's verdict: a, b or tie; None if the reply is something else."""
    found = _VERDICT.fullmatch(text)
    return found[1].lower() if found else None


def _text_of(content: Any) -> str:
    return clean(answer_text({"messages": [{"role": "assistant", "content": content}]}))


def _question(conversation: Conversation, name: str, judge: Callable[[str], bool] | None) -> Question:
    messages = conversation["messages"]
    last = max((place for place, message in enumerate(messages) if message["role"] == "user"), default=-1)
    if last < 0:
        raise DataError(f"{name} has no user message")
    return Question(
        [
            {
                "role": each["role"],
                "content": clean(each["content"]) if each["role"] != "assistant" else each["content"],
            }
            for each in messages[: last + 1]
        ],
        name,
        judge,
    )


def _distinct(questions: Sequence[Question]) -> list[Question]:
    """Return the questions without duplicates."""
    return list({json.dumps(question.asked()): question for question in reversed(questions)}.values())[::-1]


def read_answered_conversation(text: str) -> tuple[list[Message], str]:
    """Return the messages of a conversation that a teacher wrote as JSON, and "" or the fault if it is not valid.

    User and assistant alternate; the user is first, the assistant last; contents are cleaned text, none is empty.
    """

    def cleaned(message: dict[str, Any]) -> dict[str, Any]:
        return {name: clean(value).strip() if isinstance(value, str) else value for name, value in message.items()}

    try:
        value = json.loads(text, object_hook=cleaned)
        messages = value.get("messages") if isinstance(value, dict) else value
        messages = parse_conversation({"messages": messages})["messages"]
    except json.JSONDecodeError as error:
        return [], f"not JSON ({error.msg} at character {error.pos})"
    except RecursionError:
        return [], "nested too deeply"
    except ValueError as error:
        return [], one_line(str(error))
    if messages[0]["role"] == "system":
        return [], 'message 1 is from "system", expected "user"'
    if not all(isinstance(message["content"], str) for message in messages):
        return [], "content of an assistant message is not text"
    return messages, ""


def clean(text: str) -> str:
    r"""Return a text without control characters and lone surrogates, with \n as its only line end.

    Special tokens of a chat format (<|assistant_end|>) stay: rendering encodes them as ordinary text.
    """
    return _UNFIT.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def one_line(text: str, longest: int = 200) -> str:
    """Return a text on one line, without control characters, cut to `longest` characters."""
    line = visible(" ".join(text.split()))
    return line if len(line) <= longest else line[: longest - 1] + "…"
