"""Questions about the countries of the Factbook: free answers, multiple choice, and reading comprehension.

The facts are in countries.csv, derived from the World Factbook (public domain): a row per country, a column per field.
Of values joined by | the first is the answer, and the others are right, too. countries.json has the wordings of each
field with the placeholders `{place}` (country) and `{value}`.

Pairs of a country and a field, such as Peru and capital, are held out. A held-out pair is in no training conversation
of these tasks, but may occur in the corpus.
"""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

from mlxchat.errors import ConfigError, suggest
from mlxchat.tasks.answers import Conversation
from mlxchat.tasks.base import LETTERS, Task, choice_dialogue, dialogue, held_out

_TEST_FRACTION = 0.15
# Capitals that the documentation's examples ask for are trained on.
_SHOWN = (
    "Brazil|Canada|China|Egypt|France|Germany|India|Italy|Japan|Mexico|Peru|Russia|Spain|United Kingdom|United States"
)
_ALWAYS_TRAINED = frozenset(("capital", country) for country in _SHOWN.split("|"))


_WITH_ARTICLE = re.compile(
    r".*Islands$|.*Republic$|.*Ocean$|.*Territory$|.*Strip$|.*Refuges$|.* Lands$"
    r"|(United|Republic|Democratic Republic|Federated|Isle|European) .*"
    r"|Bahamas|Caribbean|Comoros|Gambia|Middle East|Maldives|Netherlands|Ottoman Empire|Philippines"
    r"|Seychelles|Soviet Union|West Bank|World"
)


def with_article(name: str) -> str:
    """Return a place name as in a sentence: "Peru", "the Netherlands"."""
    return f"the {name}" if _WITH_ARTICLE.fullmatch(name) else name


@dataclass(frozen=True)
class Field:
    """Wordings of one kind of fact, with the placeholders `{place}` and `{value}`."""

    label: str
    questions: list[str]
    statements: list[str]

    def state(self, country: str, value: str, wording: int = 0) -> str:
        """Return the fact as a sentence; `wording` is taken modulo the number of wordings."""
        template = self.statements[wording % len(self.statements)]
        sentence = template.format(place=with_article(country), value=with_article(value))
        return sentence[0].upper() + sentence[1:]

    def ask(self, country: str, wording: int = 0) -> str:
        """Return the question for a country; `wording` is taken modulo the number of wordings."""
        return self.questions[wording % len(self.questions)].format(place=with_article(country))

    def tag(self, value: str) -> str:
        """Return the label and the value with its article: "capital Lima", "neighbor the Gambia"."""
        return f"{self.label} {with_article(value)}"


FIELDS = {
    name: Field(**words)
    for name, words in json.loads(Path(__file__).with_name("countries.json").read_text(encoding="ascii")).items()
}


@dataclass(frozen=True)
class Fact:
    """A value in ASCII; `others` are values of the same field that are also right."""

    country: str
    field: str
    value: str
    others: tuple[str, ...] = ()

    def state(self, wording: int = 0) -> str:
        """Return the fact as a sentence, as `Field.state` does."""
        return FIELDS[self.field].state(self.country, self.value, wording)


@cache
def facts() -> list[Fact]:
    """Return all facts by field, then by country name."""
    with Path(__file__).with_name("countries.csv").open(encoding="ascii", newline="") as file:
        countries = list(csv.DictReader(file))
    values = ((row["country"], field, row[field].split("|")) for field in FIELDS for row in countries if row[field])
    return [Fact(country, field, first, tuple(others)) for country, field, (first, *others) in values]


def is_test_pair(fact: Fact) -> bool:
    """Return True if the fact's country and field are held out; about 15% are."""
    if (fact.field, fact.country) in _ALWAYS_TRAINED:
        return False
    return held_out(f"{fact.field}/{fact.country}", _TEST_FRACTION)


@dataclass(eq=False, kw_only=True)
class _FactTask(Task):
    """Questions about the facts of some fields; the training split asks for each several times."""

    own_fields: ClassVar[tuple[str, ...]]
    train_rounds: ClassVar[int]
    fields: Sequence[str] | None = None
    """Names from `FIELDS`; None: the task's own."""

    def __post_init__(self) -> None:
        """Select the facts."""
        super().__post_init__()
        fields = self.own_fields if self.fields is None else self.fields
        known = ", ".join(FIELDS)
        for field in fields:
            if field not in FIELDS:
                hint = suggest(field, FIELDS)
                raise ConfigError(f'fields of task {self.name} has "{field}", expected some of {known}.{hint}')
        if not fields:
            raise ConfigError(f"fields of task {self.name} is empty, expected some of {known}.")
        self._facts = self._shuffled(
            [fact for fact in facts() if fact.field in fields and is_test_pair(fact) == (self.split == "test")]
        )

    def _own_size(self) -> int:
        return len(self._facts) * (self.train_rounds if self.split == "train" else 1)

    def _fact(self, index: int) -> Fact:
        return self._facts[index % len(self._facts)]


@cache
def _values(field: str) -> list[str]:
    return sorted({fact.value for fact in facts() if fact.field == field})


@cache
def _facts_of(country: str) -> list[Fact]:
    return [fact for fact in facts() if fact.country == country]


def _question(fact: Fact, rng: random.Random) -> str:
    return FIELDS[fact.field].ask(fact.country, rng.randrange(len(FIELDS[fact.field].questions)))


class Facts(_FactTask):
    """A question about a country, answered in one sentence; a response is right if it contains the value."""

    name = "facts"
    own_fields = ("capital", "region", "nationality", "currency", "language", "religion", "neighbor", "internet")
    train_rounds = 4

    def _conversation(self, index: int, rng: random.Random) -> Conversation:
        fact = self._fact(index)
        return dialogue(_question(fact, rng), fact.state(), answer=fact.value)

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        """Return True if the response contains the value as whole words, in any letter case."""
        value = re.escape(conversation["answer"])
        return re.search(rf"(?<!\w){value}(?!\w)", response, re.IGNORECASE) is not None


class FactsMC(_FactTask):
    """A question about a country with four values to choose from; the model must know the fact."""

    name = "facts_mc"
    kind = "categorical"
    chance = 1 / len(LETTERS)
    own_fields: ClassVar[tuple[str, ...]] = ("capital", "region", "nationality", "currency", "internet")
    train_rounds = 4

    def _conversation(self, index: int, rng: random.Random) -> Conversation:
        fact = self._fact(index)
        return self._choice(index, _question(fact, rng), rng, ())

    def _choice(self, index: int, question: str, rng: random.Random, passage: Sequence[str]) -> Conversation:
        """Return the question with three wrong values of the field that are not in the passage.

        Every letter is right equally often; a repeated fact gets another letter each time.
        """
        fact = self._fact(index)
        right = {fact.value, *fact.others}
        others = [value for value in _values(fact.field) if value not in right]
        others = [value for value in others if not any(value in line for line in passage)]
        wrong = rng.sample(others, len(LETTERS) - 1)
        place = (index + index // len(self._facts)) % len(LETTERS)
        choices = [*wrong[:place], fact.value, *wrong[place:]]
        return choice_dialogue(question, LETTERS, choices, LETTERS[place])


class ReadingMC(FactsMC):
    """The same with a passage that states the fact; the model only needs to read."""

    name = "reading_mc"
    own_fields = tuple(FIELDS)
    train_rounds = 2

    def _conversation(self, index: int, rng: random.Random) -> Conversation:
        fact = self._fact(index)
        # A training passage never contains a held-out pair; a test passage may contain any fact.
        beside = [
            other
            for other in _facts_of(fact.country)
            if other.field != fact.field and not (self.split == "train" and is_test_pair(other))
        ]
        stated = [fact, *rng.sample(beside, min(len(beside), rng.randrange(3)))]
        rng.shuffle(stated)
        if rng.random() < 0.5:
            tags = ", ".join(FIELDS[other.field].tag(other.value) for other in stated)
            lines = [f"{fact.country}: {tags}."]
        else:
            lines = [other.state(rng.randrange(2)) for other in stated]
        return self._choice(index, f"{' '.join(lines)} {_question(fact, rng)}", rng, lines)


KINDS = {
    "capital": "a capital city",
    "currency": "a currency",
    "highest_point": "a mountain or hill",
    "nationality": "a nationality",
}
"""Field → kind of its values."""


@cache
def kind_names(*, is_test: bool) -> list[tuple[str, str]]:
    """Return (name, field of KINDS) of a split in alphabetical order; names of two kinds are left out."""
    kinds_of: dict[str, set[str]] = {}
    for fact in facts():
        if fact.field in KINDS:
            kinds_of.setdefault(fact.value, set()).add(fact.field)
    return [
        (name, next(iter(kinds)))
        for name, kinds in sorted(kinds_of.items())
        if len(kinds) == 1 and held_out(f"kind/{name}", _TEST_FRACTION) == is_test
    ]


class KindsMC(Task):
    """The kind of a name: a capital, a currency, a mountain or a nationality, always in this order.

    The easiest categorical task: each letter always means the same kind, and names of a kind look alike. The split is
    by name.
    """

    name = "kinds_mc"
    kind = "categorical"
    chance = 1 / len(LETTERS)
    questions = ("What is {name}?", "What kind of thing is {name}?", "Which of these is {name}?")

    def __post_init__(self) -> None:
        """Select the names."""
        super().__post_init__()
        self._names = self._shuffled(kind_names(is_test=self.split == "test"))

    def _own_size(self) -> int:
        return len(self._names) * (len(self.questions) if self.split == "train" else 1)

    def _conversation(self, index: int, rng: random.Random) -> Conversation:
        name, field = self._names[index % len(self._names)]
        question = self.questions[(index // len(self._names)) % len(self.questions)].format(name=name)
        letter = LETTERS[list(KINDS).index(field)]
        return choice_dialogue(question, LETTERS, list(KINDS.values()), letter)
