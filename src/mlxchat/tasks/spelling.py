"""Words letter by letter: spelling one, and counting a letter in it with the calculator.

`spelling` and `letter_count` take common words of the bundled texts, split by the word's hash. `simple_spelling` and
`spelling_bee` are nanochat's tasks/spellingbee.py: word, letter, quotes and the assistant's words follow the same
draws; the questions are in spelling_questions.json, and a draw picks one by its place. nanochat's test conversations
are its training ones shifted by one (Random(-n) draws what Random(n) draws); ours have seeds of their own.
"""

from __future__ import annotations

import json
import random
import string
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import ClassVar

from mlxchat.errors import DataError
from mlxchat.tasks.answers import Conversation, calculator_parts
from mlxchat.tasks.base import Task, dialogue, held_out
from mlxchat.tasks.downloads import UrlTask

WORDS_URL = "https://raw.githubusercontent.com/dwyl/english-words/refs/heads/master/words_alpha.txt"
"""370 thousand English words."""
QUESTIONS_FILE = Path(__file__).with_name("spelling_questions.json")
WORDS_FILE = Path(__file__).with_name("common_words.txt")
"""Words of 3 to 8 letters that occur 30 times or more in the Bible in Basic English and the Factbook; no names."""

_TEST_FRACTION = 0.15
_COUNT_QUESTIONS = (
    "How many '{letter}' are in '{word}'?",
    "How often does '{letter}' occur in '{word}'?",
    "Count the letter '{letter}' in '{word}'.",
    "How many times is '{letter}' in the word '{word}'?",
)
_LOWER_FRACTION, _MARK_FRACTION, _LETTER_OF_WORD_FRACTION = 0.3, 0.5, 0.9
_QUOTES = ("", "'", '"')


@cache
def common_words() -> list[str]:
    """Return the everyday words that come with mlxchat, in alphabetical order."""
    return WORDS_FILE.read_text(encoding="ascii").split()


class _WordTask(Task):
    """A task about the everyday words of a split, each once by default."""

    def __post_init__(self) -> None:
        """Choose the words."""
        super().__post_init__()
        is_test = self.split == "test"
        self._words = self._shuffled(
            [word for word in common_words() if held_out(f"word/{word}", _TEST_FRACTION) == is_test]
        )

    def _own_size(self) -> int:
        return len(self._words)

    def _word(self, index: int) -> str:
        return self._words[index % len(self._words)]


class Spelling(_WordTask):
    """Spell the word: apple -> apple:a,p,p,l,e; right only letter for letter."""

    name = "spelling"

    def _conversation(self, index: int, rng: random.Random) -> Conversation:
        word = self._word(index)
        spelled = f"{word}:{','.join(word)}"
        return dialogue(f"Spell the word: {word}", spelled, answer=spelled)


class LetterCount(_WordTask):
    """How many of one letter are in a word; right where the number after #### is."""

    name = "letter_count"

    def _conversation(self, index: int, rng: random.Random) -> Conversation:
        word = self._word(index)
        # Else the count would nearly always be one: letters that repeat are sought, and some that are absent.
        repeated = [letter for letter in word if word.count(letter) > 1]
        letter = rng.choice([*word, *repeated * 3] if rng.random() < 0.85 else string.ascii_lowercase)
        question = rng.choice(_COUNT_QUESTIONS).format(letter=letter, word=word)
        count = word.count(letter)
        raw = f"The count is <<'{word}'.count('{letter}')={count}>>{count}.\n#### {count}"
        return dialogue(question, calculator_parts(raw), raw=raw, answer=str(count))


@dataclass(eq=False, kw_only=True)
class _WordListTask(UrlTask):
    """A task about words of a list; `size` conversations, each from a draw of its own.

    With seed 0 the training split has nanochat's conversations.
    """

    source_options: ClassVar[tuple[str, ...]] = ("words", "sha256")
    bundled: ClassVar[str | None] = "bundled"
    is_shuffled: ClassVar[bool] = False
    """Whether words are drawn from another order than the list's."""
    words: str = WORDS_URL
    """Address of a list with one word per line, or "bundled": the common words of the bundled texts."""
    nanochat_seeds: bool = False
    """Whether the test split is drawn as nanochat draws it, from the training split's seeds."""

    @cached_property
    def _words(self) -> list[str]:
        words = list(_words_of(self._file()))
        if self.is_shuffled:
            random.Random(42).shuffle(words)
        return words

    def _own_size(self) -> int:
        return 1000

    def _draw(self, index: int) -> random.Random:
        """Return the source of a conversation's chances."""
        if self.seed or (self.split == "test" and not self.nanochat_seeds):
            return random.Random(f"{self.name}/{self.split}/{self.seed}/{index}")
        return random.Random(index if self.split == "train" else -(index + 1))


class SpellingBee(_WordListTask):
    """How many of a letter are in a word; right where the number after #### is."""

    name = "spelling_bee"

    def _conversation(self, index: int, rng: random.Random) -> Conversation:
        draw = self._draw(index)
        word = draw.choice(self._words)
        letter = draw.choice(word if draw.random() < _LETTER_OF_WORD_FRACTION else string.ascii_lowercase)
        question = draw.choice(_questions())
        if draw.random() < _LOWER_FRACTION:
            question = question.lower()
        quote, quote_of_word = draw.choice(_QUOTES), draw.choice(_QUOTES)
        asked = question.format(letter=f"{quote}{letter}{quote}", word=f"{quote_of_word}{word}{quote_of_word}")
        if draw.random() < _MARK_FRACTION:
            asked += "?"
        return dialogue(asked, _count_aloud(word, letter))


class SimpleSpelling(_WordListTask):
    """Spell the word: apple -> apple:a,p,p,l,e; right only letter for letter."""

    name = "simple_spelling"
    is_shuffled = True

    def _conversation(self, index: int, rng: random.Random) -> Conversation:
        word = self._draw(index).choice(self._words)
        return dialogue(f"Spell the word: {word}", f"{word}:{','.join(word)}")


def _count_aloud(word: str, letter: str) -> list[dict[str, str]]:
    """Return an answer that spells the word, counts along, asks the calculator and ends with the number."""
    lines, count = [], 0
    for place, char in enumerate(word, start=1):
        count += char == letter
        # No space after the colon: with one a letter would be another token than in the word spelled out.
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
    return list(json.loads(QUESTIONS_FILE.read_text(encoding="utf-8")))


@cache
def _words_of(path: Path | None) -> list[str]:
    """Return the words of a file (None: the bundled ones), in its order."""
    if path is None:
        return common_words()
    try:
        words = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a UTF-8 list of words ({error}).") from error
    if not words:
        raise DataError(f"{path} has no word; expected one on each line.")
    return words
