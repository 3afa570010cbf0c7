"""tasks_*.json: the calculator; the rest is for tasks that this project does not have."""

from __future__ import annotations

from collections.abc import Iterator

from comparison import Line, Quantity, Unchecked, UnreadableError, exact, same
from parity_file import ParityFile

from mlxchat.engine.tools import calculate

_MEANINGS = {
    "gsm8k": "GSM8K: conversations and verdicts",
    "mmlu": "MMLU: conversations and verdicts",
    "arc": "ARC: conversations and verdicts",
    "render_mc": "multiple-choice questions",
    "slicing": "slices of tasks",
    "mixture": "the order of a mixture",
    "smoltalk": "SmolTalk: conversations",
    "humaneval": "HumanEval: programs and their execution",
    "spellingbee": "SpellingBee: conversations and verdicts",
    "customjson": "conversations of a file",
}


def calculator(file: ParityFile) -> Iterator[Line]:
    """Compare the calculator's results by our documented rule, which departs from nanochat's."""
    if "calculator" not in file.json:
        return
    cases = [(case["expr"], our_rule(case["expr"], case["result"])) for case in file.json["calculator"]]
    compared = [(expression, expected) for expression, expected in cases if expected != "skip"]
    yield same(
        "the calculator, by our rule",
        [(repr(expression), calculate(expression), expected) for expression, expected in compared],
    )
    few = [] if len(compared) > len(cases) / 2 else ["too few"]
    yield exact("more than half of the expressions are compared", few, len(cases))


def unchecked(file: ParityFile) -> Iterator[Line]:
    """Say what nothing compares yet.

    Raises:
        UnreadableError: there is nothing known in the file.
    """
    known = [key for key in file.json if key in _MEANINGS]
    if not known and "calculator" not in file.json:
        raise UnreadableError(
            f"{file.path}: has neither calculator nor any of {', '.join(_MEANINGS)}; "
            "it is not in the format of tasks_*.json"
        )
    for key in known:
        yield Unchecked(_MEANINGS[key], "this project has no such task")


QUANTITIES: tuple[Quantity, ...] = (calculator, unchecked)


def our_rule(expression: str, theirs: str | None) -> str | None:
    """Return what our documented rule makes of nanochat's result, or 'skip' where only ours takes the expression.

    Ours has whole results without a point, ten decimals, a bound of 1e15 and of 200 characters, % and exponents, and
    counts letters in any text, commas kept; nothing else has a result.
    """
    if theirs is None:
        only_ours = "%" in expression or "e" in expression or "\t" in expression or ".count" in expression
        return "skip" if only_ours and "__" not in expression and "(" not in expression.split(".count")[0] else None
    if ".count" in expression:
        literal = expression.count("'") + expression.count('"') == 4 and " or " not in expression
        return theirs if literal and "," not in expression and ".upper" not in expression else "skip"
    try:
        value = float(theirs)
    except ValueError:
        return None
    if abs(value) > 1e15 or len(expression) > 200:
        return None
    return str(int(value)) if value == int(value) else str(round(value, 10))
