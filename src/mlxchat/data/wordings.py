"""How the short facts of the Factbook are worded, in the corpus and in the tasks alike."""

from __future__ import annotations

import re
from dataclasses import dataclass

_WITH_ARTICLE = re.compile(
    r".*Islands$|.*Republic$|.*Ocean$|.*Territory$|.*Strip$|.*Refuges$|.* Lands$"
    r"|(United|Republic|Democratic Republic|Federated|Isle|European) .*"
    r"|Bahamas|Caribbean|Comoros|Gambia|Middle East|Maldives|Netherlands|Ottoman Empire|Philippines"
    r"|Seychelles|Soviet Union|West Bank|World"
)


def with_article(name: str) -> str:
    """Return a place name as it stands inside a sentence: "Peru", "the Netherlands"."""
    return f"the {name}" if _WITH_ARTICLE.fullmatch(name) else name


@dataclass(frozen=True)
class Field:
    """How one kind of fact is worded. `{place}` is the country in a sentence, `{value}` the value in one."""

    label: str
    questions: tuple[str, ...]
    statements: tuple[str, ...]

    def state(self, country: str, value: str, wording: int = 0) -> str:
        """Return the fact as a sentence, by any of the wordings (taken modulo their number)."""
        template = self.statements[wording % len(self.statements)]
        sentence = template.format(place=with_article(country), value=with_article(value))
        return sentence[0].upper() + sentence[1:]

    def ask(self, country: str, wording: int = 0) -> str:
        """Return the question for a country, by any of the wordings (taken modulo their number)."""
        return self.questions[wording % len(self.questions)].format(place=with_article(country))

    def tag(self, value: str) -> str:
        """Return label and value, as in a list: "capital Lima"."""
        return f"{self.label} {with_article(value)}"


FIELDS = {
    "capital": Field(
        "capital",
        (
            "What is the capital of {place}?",
            "Which city is the capital of {place}?",
            "Name the capital of {place}.",
            "Tell me the capital of {place}.",
        ),
        ("The capital of {place} is {value}.", "{value} is the capital of {place}."),
    ),
    "region": Field(
        "region",
        (
            "Where is {place}?",
            "Which part of the world is {place} in?",
            "In what region is {place}?",
            "Where in the world is {place}?",
        ),
        ("{place} is in {value}.", "{place} lies in {value}."),
    ),
    "nationality": Field(
        "nationality",
        (
            "What do you call a person from {place}?",
            "What is the nationality of a person from {place}?",
            "Someone comes from {place}. What are they?",
        ),
        ("A person from {place} is {value}.", "{value} people come from {place}."),
    ),
    "currency": Field(
        "currency",
        (
            "What is the currency of {place}?",
            "Which currency is used in {place}?",
            "What money do people use in {place}?",
        ),
        ("The currency of {place} is the {value}.", "People in {place} pay with the {value}."),
    ),
    "language": Field(
        "official language",
        (
            "What is an official language of {place}?",
            "Which language is official in {place}?",
            "Name an official language of {place}.",
        ),
        ("An official language of {place} is {value}.", "{value} is an official language of {place}."),
    ),
    "religion": Field(
        "largest religious group",
        (
            "What is the largest religious group in {place}?",
            "Which religious group is the largest in {place}?",
        ),
        ("The largest religious group in {place} is {value}.",),
    ),
    "neighbor": Field(
        "longest border",
        (
            "Which country has the longest border with {place}?",
            "With which country does {place} share its longest border?",
        ),
        ("The longest border of {place} is with {value}.", "{place} has its longest border with {value}."),
    ),
    "internet": Field(
        "internet country code",
        (
            "What is the internet country code of {place}?",
            "How do internet addresses from {place} end?",
        ),
        (
            "The internet country code of {place} is {value}.",
            "Internet addresses from {place} end in {value}.",
        ),
    ),
    "independence": Field(
        "independent from",
        (
            "From which country did {place} become independent?",
            "Which country did {place} gain independence from?",
        ),
        ("{place} became independent from {value}.", "{place} gained its independence from {value}."),
    ),
    "highest_point": Field(
        "highest point",
        ("What is the highest point of {place}?", "What is the highest place in {place}?"),
        ("The highest point of {place} is {value}.", "No place in {place} is higher than {value}."),
    ),
    "symbol": Field(
        "national symbol",
        ("What is a national symbol of {place}?", "Name a national symbol of {place}."),
        ("A national symbol of {place} is the {value}.", "The {value} is a national symbol of {place}."),
    ),
    "colors": Field(
        "national colors",
        ("What are the national colors of {place}?", "Which colors are the national colors of {place}?"),
        ("The national colors of {place} are {value}.",),
    ),
    "product": Field(
        "main farm product",
        ("What is the main farm product of {place}?", "What do farms in {place} produce most?"),
        ("The main farm product of {place} is {value}.", "Farms in {place} produce {value} most of all."),
    ),
    "export": Field(
        "main export",
        ("What is the main export of {place}?", "What does {place} export most?"),
        ("The main export of {place} is {value}.", "{place} exports {value} most of all."),
    ),
}
