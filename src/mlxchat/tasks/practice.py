"""What the default run practises by reinforcement learning: word problems, letters to count, everyday questions."""

from __future__ import annotations

import random
from dataclasses import dataclass

from mlxchat.errors import ConfigError
from mlxchat.tasks.answers import Conversation
from mlxchat.tasks.arithmetic import Arithmetic
from mlxchat.tasks.base import Task
from mlxchat.tasks.everyday import Everyday
from mlxchat.tasks.spelling import FirstLetterCount


@dataclass(eq=False, kw_only=True)
class Practice(Task):
    """Conversations of `arithmetic`, `first_letter_count` and `everyday`, judged as those tasks judge them."""

    name = "practice"
    letters_frac: float = 0.25
    """Fraction of letters to count, 0 to 1."""
    everyday_frac: float = 0.25
    """Fraction of everyday questions, 0 to 1, so that the model forgets less of what it does not practise."""
    two_step_frac: float = 0.6
    """Fraction of word problems with two steps, 0 to 1."""

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        shares = {"letters_frac": self.letters_frac, "everyday_frac": self.everyday_frac}
        for option, share in shares.items():
            if not 0 <= share <= 1:
                raise ConfigError(f"{option} of task practice is {share}, expected 0 to 1.")
        if sum(shares.values()) > 1:
            raise ConfigError(
                f"letters_frac + everyday_frac of task practice is {sum(shares.values())}, expected at most 1."
            )
        self._everyday = Everyday(self.split, seed=self.seed + 2)
        self._letters = FirstLetterCount(self.split, seed=self.seed)
        self._problems = Arithmetic(self.split, seed=self.seed, two_step_frac=self.two_step_frac)

    def _own_size(self) -> int:
        return len(self._problems)

    def _conversation(self, index: int, rng: random.Random) -> Conversation:
        draw = rng.random()
        tasks: list[Task] = [self._letters, self._everyday, self._problems]
        chosen = tasks[(draw >= self.letters_frac) + (draw >= self.letters_frac + self.everyday_frac)]
        return chosen[rng.randrange(len(chosen))]

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        """Return the verdict of the conversation's own task."""
        return (self._problems if "raw" in conversation else self._everyday).evaluate(conversation, response)
