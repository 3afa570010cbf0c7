"""Spelling words, and counting letters with the calculator.

`first_letter_count` uses the words that newcomers ask about first. `simple_spelling` and `spelling_bee` are the
counterparts of nanochat's tasks/spellingbee.py, with the same random draws of word, letter, question
(spelling_questions.json), quotes and answer. nanochat's test conversations are its training conversations shifted by
one, since Random(-n) equals Random(n); ours have separate seeds.
"""

import json
import random
import string
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import ClassVar

from mlxchat.tasks.base import Conversation, Task, calculator_parts, dialogue, held_out
from mlxchat.tasks.downloads import UrlTask

WORDS_URL = "https://raw.githubusercontent.com/dwyl/english-words/refs/heads/master/words_alpha.txt"
"""370 thousand English words."""
_FOLDER = Path(__file__).parent
_TEST_FRACTION = 0.15
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
    return (_FOLDER / "first_words.txt").read_text(encoding="ascii").split()


def is_only_spelled(word: str) -> bool:
    """Return True if training spells a first word but never counts its letters: about 15% of all."""
    return held_out(f"letters/{word}", _TEST_FRACTION)


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
        """Return the random generator of a conversation."""
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
    return list(json.loads((_FOLDER / "spelling_questions.json").read_text(encoding="utf-8")))
