"""Counting a letter in a word, first by hand and then by calculator, and spelling words.

Counterpart of nanochat's tasks/spellingbee.py: word, letter, quotes and what the assistant says follow the same
draws. The ways of asking stand in spelling_questions.json; a draw picks one by its place. Where nanochat's test
conversations are its training ones shifted by one (Random(-n) draws what Random(n) draws), ours have seeds of their
own.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path
from typing import ClassVar

from mlxchat.errors import ConfigError, DataError
from mlxchat.tasks.base import Conversation, Task, answer_text, dialogue
from mlxchat.tasks.gsm8k import same_final_number
from mlxchat.tasks.url_file import UrlSource, fetch_source, record_source, url_source

WORDS_URL = "https://raw.githubusercontent.com/dwyl/english-words/refs/heads/master/words_alpha.txt"
"""370 thousand English words."""
BUNDLED = "bundled"
QUESTIONS_FILE = Path(__file__).with_name("spelling_questions.json")

_LOWER_FRACTION, _MARK_FRACTION, _LETTER_OF_WORD_FRACTION = 0.3, 0.5, 0.9
_QUOTES = ("", "'", '"')


class _WordListTask(Task):
    """A task about words of a list; `size` conversations, each from a draw of its own."""

    source_options: ClassVar[tuple[str, ...]] = ("words", "sha256")
    is_lazy = True
    is_shuffled: ClassVar[bool] = False
    """Whether words are drawn from another order than the list's."""

    def __init__(
        self,
        split: str,
        *,
        size: int | None = None,
        seed: int = 0,
        words: str = WORDS_URL,
        sha256: str | None = None,
        path: str | Path | None = None,
        nanochat_seeds: bool = False,
    ) -> None:
        """Choose words; none is read yet.

        Args:
            split: "train" or "test".
            size: number of conversations; None: 1,000.
            seed: 0 gives nanochat's conversations of the training split, another seed others.
            words: address of a list with one word per line, or "bundled": the common words of the bundled texts.
            sha256: of what is at the address; None: whatever is there.
            path: a file with one word per line, in place of `words`.
            nanochat_seeds: whether the test split is drawn as nanochat draws it, from the training split's seeds.

        Raises:
            ConfigError: split, size or words cannot be.

        """
        super().__init__(split, size=size, seed=seed)
        self._path = None if path is None else Path(path)
        self._source = None
        if path is None and words != BUNDLED:
            if not words.startswith(("http://", "https://")):
                raise ConfigError(
                    f'words of task {self.name} is "{words}", expected an address (http://, https://) or '
                    f"{BUNDLED}. A list of your own is given as path=FILE."
                )
            self._source = url_source(self.name, words, sha256)
        self._nanochat_seeds = bool(nanochat_seeds)

    def needs(self) -> list[UrlSource]:
        """Return the address of the words, if they are read from one."""
        return [self._source] if self._source else []

    def fetch(self, check: Callable[[], None] = lambda: None) -> list[Path]:
        """Return the file of the words, downloaded if it is not there."""
        return [fetch_source(source, check) for source in self.needs()]

    def sources(self) -> list[dict[str, object]]:
        """Return a record of the words that were read."""
        return [record_source(source) for source in self.needs()]

    @cached_property
    def _words(self) -> list[str]:
        return _words_of(self._path or next(iter(self.fetch()), None), is_shuffled=self.is_shuffled)

    def _own_size(self) -> int:
        return 1000

    def _draw(self, index: int) -> random.Random:
        """Return the source of a conversation's chances."""
        if self.seed or (self.split == "test" and not self._nanochat_seeds):
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

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        """Compare the number after ####; a response without the marker is wrong."""
        return same_final_number(answer_text(conversation), response)


class SimpleSpelling(_WordListTask):
    """Spell the word: apple -> apple:a,p,p,l,e; right only letter for letter."""

    name = "simple_spelling"
    is_shuffled = True

    def _conversation(self, index: int, rng: random.Random) -> Conversation:
        word = self._draw(index).choice(self._words)
        return dialogue(f"Spell the word: {word}", f"{word}:{','.join(word)}")

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        """Compare the whole response, spaces around it aside."""
        return response.strip() == answer_text(conversation)


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
def _words_of(path: Path | None, *, is_shuffled: bool) -> list[str]:
    """Return the words of a file (None: the bundled ones), in its order or in that of SimpleSpelling."""
    if is_shuffled:
        words = list(_words_of(path, is_shuffled=False))
        random.Random(42).shuffle(words)
        return words
    if path is None:
        from mlxchat.data.bundled import common_words

        return list(common_words())
    try:
        words = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a UTF-8 list of words ({error}).") from error
    if not words:
        raise DataError(f"{path} has no word; expected one on each line.")
    return words
