"""Words letter by letter: spelling one, and counting a letter in it with the calculator.

Counterpart of nanochat's SimpleSpelling and SpellingBee, with the common words of the bundled texts. A word
is of the test split by its hash, in both tasks alike.
"""

from __future__ import annotations

import random
import string

from mlxchat.data.bundled import common_words
from mlxchat.tasks.arithmetic import parse_gsm8k
from mlxchat.tasks.base import Conversation, Task, answer_text, dialogue, held_out
from mlxchat.tasks.gsm8k import same_final_number

_TEST_FRACTION = 0.15
_COUNT_QUESTIONS = (
    "How many '{letter}' are in '{word}'?",
    "How often does '{letter}' occur in '{word}'?",
    "Count the letter '{letter}' in '{word}'.",
    "How many times is '{letter}' in the word '{word}'?",
)


class _WordTask(Task):
    def __init__(self, split: str, *, size: int | None = None, seed: int = 0) -> None:
        """Choose the words of a split; `size` None means every word once."""
        super().__init__(split, size=size, seed=seed)
        words = [word for word in common_words() if held_out(f"word/{word}", _TEST_FRACTION) == (split == "test")]
        self._words = self._shuffled(words)

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

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        """Compare the whole response, spaces around it aside."""
        return response.strip() == str(conversation["answer"])


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
        return dialogue(question, parse_gsm8k(raw), raw=raw, answer=str(count))

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        """Compare the number after ####; a response without the marker is wrong."""
        return same_final_number(answer_text(conversation), response)
