"""ARC: science questions of school tests, easy and hard. Counterpart of nanochat's tasks/arc.py."""

from __future__ import annotations

import random
from typing import ClassVar

from mlxchat.errors import DataError
from mlxchat.tasks.base import Conversation
from mlxchat.tasks.downloads import HubTask, choice_dialogue


class ArcEasy(HubTask):
    """Questions with three to five choices, labelled as in the data: A, B, ... or 1, 2, ..."""

    name = "arc_easy"
    kind = "categorical"
    chance = 0.25
    repository: ClassVar[str] = "allenai/ai2_arc"
    splits = ("train", "validation", "test")
    subsets: ClassVar[tuple[str, ...]] = ("ARC-Easy",)
    columns = ("question", "choices", "answerKey")
    texts = ("question", "answerKey")

    def _conversation(self, index: int, rng: random.Random) -> Conversation:
        row = self.row(index)
        letters, answer = row["choices"]["label"], row["answerKey"]
        if answer not in letters:
            raise DataError(f'{self.place(index)} has the answer "{answer}", which is none of {", ".join(letters)}')
        if len(letters) != len(row["choices"]["text"]):
            raise DataError(f"{self.place(index)} has {len(letters)} labels for {len(row['choices']['text'])} choices")
        return choice_dialogue(row["question"], letters, row["choices"]["text"], answer)


class ArcChallenge(ArcEasy):
    """The questions that simple methods of 2018 got wrong."""

    name = "arc_challenge"
    subsets = ("ARC-Challenge",)
