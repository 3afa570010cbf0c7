"""MMLU: multiple choice over 57 subjects. Counterpart of nanochat's tasks/mmlu.py."""

from __future__ import annotations

import random
from typing import ClassVar

from mlxchat.errors import ConfigError, DataError
from mlxchat.tasks.base import LETTERS, Conversation
from mlxchat.tasks.downloads import HubTask, choice_dialogue

_AUXILIARY = "auxiliary_train"


class MMLU(HubTask):
    """Questions with four choices; the answer is a letter.

    The split auxiliary_train, questions of other data sets to train on, is on the Hub twice: in subset `all`, and
    in a subset of its own with each row inside a column `train`. Both are read.
    """

    name = "mmlu"
    kind = "categorical"
    chance = 1 / len(LETTERS)
    repository: ClassVar[str] = "cais/mmlu"
    splits = (_AUXILIARY, "test", "validation", "dev")
    training_splits = (_AUXILIARY,)
    subsets: ClassVar[tuple[str, ...]] = ("all", _AUXILIARY)
    columns = ("question", "subject", "choices", "answer")
    texts = ("question",)
    may_be_null = ("subject",)
    nested = "train"

    def check(self) -> None:
        """Refuse other splits of the subset auxiliary_train."""
        if self.subset == _AUXILIARY and self.split != _AUXILIARY:
            raise ConfigError(f"subset {_AUXILIARY} of task mmlu has only the split {_AUXILIARY}, not {self.split}.")

    def pattern(self) -> str:
        """Return the shell pattern of the files of the split."""
        file = "train" if self.subset == _AUXILIARY else self.split
        return f"{self.subset}/{file}-*.parquet"

    def _conversation(self, index: int, rng: random.Random) -> Conversation:
        row = self.row(index)
        if len(row["choices"]) != len(LETTERS) or row["answer"] not in range(len(LETTERS)):
            raise DataError(f"{self.place(index)} has {len(row['choices'])} choices and answer {row['answer']}, not 4")
        letter = LETTERS[row["answer"]]
        return choice_dialogue(row["question"], list(LETTERS), row["choices"], letter, subject=row["subject"])
