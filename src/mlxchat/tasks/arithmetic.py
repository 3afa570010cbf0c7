"""Word problems of one or two steps in GSM8K's format: calculator calls, then #### and the number.

Names, things and templates are in word_problems.json. The hash of a problem's template and numbers, without its names
and things, decides its split.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from mlxchat.errors import ConfigError
from mlxchat.tasks.answers import Conversation, calculator_parts
from mlxchat.tasks.base import Task, dialogue, held_out

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
    """Return the result of one operation on two integers, or 0 if a division leaves a remainder."""
    left, sign, right = re.split(r"([-+*/])", work)
    a, b = int(left), int(right)
    if sign == "/":
        return a // b if a % b == 0 else 0
    return {"+": a + b, "-": a - b, "*": a * b}[sign]
