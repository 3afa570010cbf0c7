"""The base class of tasks: conversations by index, and a verdict on a response.

Train and test splits of the bundled tasks never share a user message: a hash of the conversation's subject decides the
split. Conversations are dictionaries as `render_conversation` expects them. Reference answers may have calculator
calls, and the number after ####.
"""

import hashlib
import random
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import KW_ONLY, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

from mlxchat.errors import ConfigError, DataError, suggest

_T = TypeVar("_T")
LETTERS = ("A", "B", "C", "D")
PARTS = ("text", "python", "python_output")  # types of the parts of an answer: {"type", "text"}
Conversation = dict[str, Any]
"""{"messages": [{"role", "content"}, ...]}, plus "letters" and "answer" in a categorical task."""

_NUMBER = re.compile(r"#### (-?[0-9.,]+)")
_ANY_NUMBER = re.compile(r"(?<![\d)])-?\d[\d,]*(?:\.\d+)?")
_CALL = re.compile(r"(<<[^>]+>>)")
_VALUE = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]+)?(?<=[0-9])")
_GAPS = re.compile(r"[\s—…]|\.{2,}|--+")
_SAME_SIGNS = str.maketrans("−’‘“”", "-''\"\"")
# Not stripped: signs such as + - # % $, which change the meaning (C and C++, 5 and -5).
_OPENING = "([{\"'«¿¡,;:"
_CLOSING = ")]}\"'».,;:!?"
_EMPHASIS = "*_`"


def answer_text(conversation: Conversation) -> str:
    """Return the text of the last message: a string, or its parts of type text joined."""
    content = conversation["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def content_text(content: str | list[dict[str, str]]) -> str:
    """Return a message's content as text, with calculator calls in GSM8K's notation, <<12+7=19>>."""
    if isinstance(content, str):
        return content
    marks = {"text": "{}", "python": "<<{}", "python_output": "={}>>"}
    return "".join(marks[part["type"]].format(part["text"]) for part in content)


def calculator_parts(answer: str, *, keep_empty: bool = False) -> list[dict[str, str]]:
    """Return the parts of an answer in GSM8K's notation: each <<12+7=19>> becomes a python and a python_output part.

    The output is the text after the last =, or empty. `keep_empty` keeps empty texts between calls, as nanochat does.
    """
    parts = []
    for piece in _CALL.split(answer):
        if piece.startswith("<<") and piece.endswith(">>"):
            expression, sign, result = piece[2:-2].rpartition("=")
            parts.append({"type": "python", "text": expression if sign else result})
            parts.append({"type": "python_output", "text": result if sign else ""})
        elif piece or keep_empty:
            parts.append({"type": "text", "text": piece})
    return parts


def nanochat_number(text: str) -> str | None:
    """Return the number after the first #### as nanochat extracts it, without commas but with full stops; or None."""
    found = _NUMBER.search(text)
    return found[1].replace(",", "") if found else None


def final_number(text: str) -> str | None:
    """Return the number after the first ####, without commas and a trailing full stop; or None."""
    number = nanochat_number(text)
    return number.rstrip(".") or None if number is not None else None


def is_right(conversation: Conversation, response: str) -> bool:
    """Return True if a response has the conversation's number after ####, or, without one, equals its answer."""
    answer = answer_text(conversation)
    number = final_number(answer)
    return final_number(response) == number if number is not None else response.strip() == answer.strip()


def number_and_form(expected: str, response: str) -> tuple[bool, bool] | None:
    """Return whether a response has the expected number (else its last), and one after ####; None: none is expected."""
    number, given = final_number(expected), final_number(response)
    if number is None:
        return None
    numbers = _ANY_NUMBER.findall(response)[-1:] if given is None else [given]
    return any(_word(each) == _word(number) for each in numbers), given is not None


def is_right_by_nanochat(conversation: Conversation, response: str) -> bool:
    """Return nanochat's verdict on a GSM8K response: two missing numbers are equal, and "18." differs from "18"."""
    answer = str(conversation["messages"][-1]["content"][-1]["text"])
    return nanochat_number(response) == nanochat_number(answer)


def is_answer(conversation: Conversation, response: str, *, contains: bool = False) -> bool:
    """Return True if a response equals a conversation's answer after normalisation.

    Numbers are compared by value (4, 4.0; 1000, 1,000), words without letter case and surrounding punctuation; of an
    answer with a number after ####, only that number. `contains` accepts the answer's words anywhere in sequence.
    """
    answer = answer_text(conversation)
    if (number := final_number(answer)) is not None:
        given = final_number(response)
        return given is not None and _word(given) == _word(number)
    expected, words = _words(answer), _words(response)
    if not contains:
        return words == expected
    count = len(expected)
    return any(words[start : start + count] == expected for start in range(len(words) - count + 1))


def _words(text: str) -> list[str | Decimal]:
    """Return the normalised words of a text, or its punctuation if it has no words."""
    plain = unicodedata.normalize("NFC", text).casefold().translate(_SAME_SIGNS)
    words = [word for word in map(_word, _GAPS.split(plain)) if word != ""]
    return words or list(plain.split())


def _word(word: str) -> str | Decimal:
    """Return a word without surrounding punctuation, or the value of a number."""
    bare = word.rstrip(_CLOSING).lstrip(_OPENING)
    bare = bare.strip(_EMPHASIS).rstrip(_CLOSING) or bare
    return Decimal(bare.replace(",", "")) if _VALUE.fullmatch(bare) else bare


@dataclass(eq=False)
class Task(ABC):
    """A sequence of conversations, equal for equal options on every machine.

    The fields are the options that an item of a mixture or suite may set. A subclass that adds options must be a
    dataclass, too. Creating a task checks its options; data is read when the first conversation is needed.
    """

    name: ClassVar[str] = ""  # in the registry; by default the class's name
    # categorical: the answer is one of conversation["letters"]; generative: it is free text
    kind: ClassVar[Literal["categorical", "generative"]] = "generative"
    chance: ClassVar[float] = 0.0  # accuracy of random guessing, 0 to 1
    splits: ClassVar[tuple[str, ...]] = ("train", "test")
    training_splits: ClassVar[tuple[str, ...]] = ("train",)
    source_options: ClassVar[tuple[str, ...]] = ()  # options that locate the data
    is_paired: ClassVar[bool] = False  # whether conversations have a rejected answer, conversation["rejected"]
    repeats: ClassVar[bool] = True  # whether a `size` above the number of conversations repeats them
    prompt_tokens: ClassVar[int | None] = None  # upper bound of prompts, for predictions of memory; None: unknown

    split: str
    """One of `splits`."""
    _: KW_ONLY
    size: int | None = None
    """Number of conversations; None: the task's own."""
    seed: int = 0
    """Selects other conversations of the same split."""

    def __init_subclass__(cls) -> None:
        cls.name = cls.name or cls.__name__

    def __post_init__(self) -> None:
        self._check_choice("split", self.split, self.splits)
        if self.size is not None and self.size < 1:
            raise ConfigError(f"size of task {self.name} is {self.size}, expected 1 or more, or null for all.")
        # Options of a configuration are floats.
        self.seed, self.size = int(self.seed), None if self.size is None else int(self.size)
        self._slice = slice(0, None, 1)

    def _check_choice(self, option: str, value: str, known: Collection[str]) -> None:
        if value not in known:
            expected = " or ".join(known)
            raise ConfigError(f'{option} of task {self.name} is "{value}", expected {expected}.{suggest(value, known)}')

    def select(self, start: int = 0, stop: int | None = None, step: int = 1) -> Self:
        """Restrict the task to conversations[start:stop:step] and return it; raises ConfigError if none can be left."""
        end = min(bound for bound in (stop, self.size, float("inf")) if bound is not None)
        if not 0 <= start < end or step < 1:
            chosen = f"start={start}, stop={'null' if stop is None else stop}, step={step} of task {self.name}"
            raise ConfigError(f"{chosen} select nothing: start from 0, stop and size above it, step at least 1.")
        self._slice = slice(start, stop, step)
        return self

    def needs(self) -> Sequence[Any]:
        """Return the `HubSource`s and `UrlSource`s of the task; nothing is downloaded."""
        return []

    def fetch(self, check: Callable[[], None] = lambda: None) -> list[Path]:
        """Download the task's missing files, and return the paths of all; `check` may raise to end it."""
        return [path for source in self.needs() for path in source.fetch(check)]

    def check(self) -> None:  # noqa: B027  (most tasks need nothing of the machine)
        """Check that this machine can judge responses; raises StepFailed."""

    def sources(self) -> list[dict[str, Any]]:
        """Return a record of each file that the task downloaded, for the manifest."""
        return [record for source in self.needs() for record in source.records()]

    @abstractmethod
    def _own_size(self) -> int:
        """Return the number of conversations if `size` is None."""

    @abstractmethod
    def _conversation(self, index: int, rng: random.Random) -> Conversation:
        """Return conversation `index`. All randomness comes from `rng`, which is seeded for this index."""

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        """Return True if a response is right; by default judged by `is_right`."""
        return is_right(conversation, response)

    def explain(self, conversation: Conversation, response: str) -> tuple[bool, dict[str, Any]]:
        """Return the verdict, and details for the examples of an evaluation."""
        return bool(self.evaluate(conversation, response)), {}

    def reward(self, conversation: Conversation, response: str) -> float:
        """Return 1.0 for a right response, 0.0 for a wrong one."""
        return float(self.evaluate(conversation, response))

    def _indices(self) -> range:
        count = self.size if self.size is not None and self.repeats else self._own_size()
        return range(min(count, self.size or count))[self._slice]

    def __len__(self) -> int:
        return len(self._indices())

    def __getitem__(self, index: int) -> Conversation:
        number = self._indices()[index]
        return self._conversation(number, random.Random(f"{self.name}/{self.split}/{self.seed}/{number}"))

    def _shuffled(self, items: Sequence[_T]) -> list[_T]:
        """Return the items shuffled by the task's name, split and seed."""
        return random.Random(f"{self.name}/{self.split}/{self.seed}").sample(items, len(items))


def held_out(key: str, fraction: float) -> bool:
    """Return True if `key` belongs to the test split, which is a share `fraction` (0 to 1) of all hashes."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < fraction * 2.0**64


def render_mc(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """Return a multiple-choice question in nanochat's wording; no space before letters, as in answers."""
    lines = "".join(f"- {choice}={letter}\n" for letter, choice in zip(letters, choices, strict=False))
    return f"Multiple Choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."


def choice_dialogue(
    question: str, letters: Sequence[str], choices: Sequence[str], answer: str, **extra: Any
) -> Conversation:
    """Return a multiple-choice conversation with the keys "letters" and "answer"; raises DataError if unanswerable."""
    if len(letters) != len(choices) or answer not in letters:
        raise DataError(f"{question}: answer {answer} of {len(choices)} choices, expected one of {', '.join(letters)}")
    offered = {"question": question, "choices": list(choices), "letters": list(letters), "answer": answer}
    return dialogue(render_mc(question, letters, choices), answer, **extra, **offered)


def dialogue(user: str, assistant: str | list[dict[str, str]], **extra: Any) -> Conversation:
    """Return a conversation of one question and one answer, with `extra` keys beside its messages."""
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return {"messages": messages, **extra}


def answered(question: str, answer: str) -> Conversation:
    """Return a conversation whose answer is in GSM8K's notation: calculator calls, if any, become parts."""
    return dialogue(question, calculator_parts(answer) if "<<" in answer else answer)


def find_fault(messages: Any, *, least: int = 2) -> str:
    """Return why messages are not a conversation, or an empty string if they are.

    A conversation is an optional system message, then at least `least` messages alternating between user and assistant.
    Contents are text; the assistant's may also be a list of parts.
    """
    if not isinstance(messages, list):
        return "no messages"
    if not all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in messages):
        return "a message lacks role or content"
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if len(turns) < least:
        return f"{len(turns)} messages, expected a user and an assistant message or more"
    for position, message in enumerate(turns):
        expected = "assistant" if position % 2 else "user"
        if message["role"] != expected:
            return f'message {position + 1} is from "{message["role"]}", expected "{expected}"'
    for message in messages:
        role, content = message["role"], message["content"]
        parts = content if role == "assistant" and isinstance(content, list) else [{"type": "text", "text": content}]
        for part in parts:
            if not (isinstance(part, dict) and part.get("type") in PARTS and isinstance(part.get("text"), str)):
                also = f", or a list of parts: {', '.join(PARTS)}" if role == "assistant" else ""
                return f"content of the {role} message is not text{also}"
    return ""
