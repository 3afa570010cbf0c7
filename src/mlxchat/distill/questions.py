"""Reads questions for a teacher from a file or a task; reference answers are removed."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlxchat.config.schema import TaskItem
from mlxchat.errors import DataError, visible
from mlxchat.tasks import load_item
from mlxchat.tasks.base import Conversation, answer_text, is_answer
from mlxchat.tasks.jsonl import parse_conversation, read_conversations

# Control characters except tab and newline, and lone surrogates.
_UNFIT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
Message = dict[str, Any]

_MESSAGE_SCHEMA = {
    "type": "object",
    "properties": {"role": {"type": "string", "enum": ["user", "assistant"]}, "content": {"type": "string"}},
    "required": ["role", "content"],
    "additionalProperties": False,
}
_SCHEMA = {
    "type": "object",
    "properties": {"messages": {"type": "array", "items": _MESSAGE_SCHEMA}},
    "required": ["messages"],
    "additionalProperties": False,
}
CONVERSATION_FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "conversation", "strict": True, "schema": _SCHEMA},
}
"""Field response_format of a request for a whole conversation, as in nanochat's dev/gen_synthetic_data.py."""


@dataclass(frozen=True)
class Question:
    """A conversation that ends with the user's message."""

    messages: list[Message]  # an optional system message, then user and assistant alternately
    name: str  # for messages: file and number, or task and number
    judge: Callable[[str], bool] | None = None  # returns True for a right answer; None: there is no reference answer

    def asked(self, system: str | None = None) -> list[Message]:
        """Return the messages in OpenAI's format, after a system prompt: contents made of parts become plain text."""
        asked = [{"role": each["role"], "content": _text_of(each["content"])} for each in self.messages]
        if system is not None and asked[0]["role"] == "system":
            system = f"{system}\n\n{asked.pop(0)['content']}"
        return asked if system is None else [{"role": "system", "content": system}, *asked]


def questions_of_task(item: TaskItem, limit: int | None = None) -> list[Question]:
    """Return the first `limit` questions of a task; its data are downloaded if necessary."""
    task = load_item(item)
    task.fetch()
    questions = []
    for index in range(len(task))[:limit]:
        conversation = task[index]
        judge = partial(task.evaluate, conversation)
        questions.append(_question(conversation, f"{item.task} conversation {index}", judge))
    return _distinct(questions)


def questions_of_file(path: Path) -> list[Question]:
    """Return the questions of a .txt file (one per line) or a .jsonl file; empty lines are skipped."""
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


def _text_of(content: Any) -> str:
    return clean(answer_text({"messages": [{"role": "assistant", "content": content}]}))


def _question(conversation: Conversation, name: str, judge: Callable[[str], bool] | None) -> Question:
    messages = [dict(message) for message in conversation["messages"]]
    while messages and messages[-1]["role"] != "user":
        messages.pop()
    if not messages:
        raise DataError(f"{name} has no user message")
    for message in messages:
        if message["role"] != "assistant":
            message["content"] = clean(message["content"])
    return Question(messages, name, judge)


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
