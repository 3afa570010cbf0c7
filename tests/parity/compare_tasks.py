"""tasks_*.json: the tasks' conversations, orders, parsing and verdicts, and the calculator.

Where nanochat's verdict is a trap, its own is compared by a function for that, and ours with what our rule makes of it.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from comparison import Line, Quantity, UnreadableError, exact, same
from parity_file import ParityFile

from mlxchat.data.mixture import shuffled_places
from mlxchat.engine.tools import calculate
from mlxchat.errors import MlxchatError
from mlxchat.tasks import Task, load_task, task_class
from mlxchat.tasks.answers import is_right_by_nanochat, nanochat_number
from mlxchat.tasks.base import find_fault, render_mc
from mlxchat.tasks.benchmarks import GSM8K, extract_imports, extract_program
from mlxchat.tasks.downloads import HubTask, Rows
from mlxchat.tasks.jsonl import read_conversations
from mlxchat.tasks.spelling import SpellingBee

_KNOWN = (
    "gsm8k", "mmlu", "arc", "render_mc", "slicing", "mixture", "smoltalk", "humaneval", "spellingbee", "customjson",
    "calculator",
)  # fmt: skip


def known(file: ParityFile) -> Iterator[Line]:
    """See to it that there is something known in the file.

    Raises:
        UnreadableError: there is not.
    """
    if not any(key in file.json for key in _KNOWN):
        raise UnreadableError(f"{file.path}: has none of {', '.join(_KNOWN)}; it is not in the format of tasks_*.json")
    return iter(())


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


def gsm8k(file: ParityFile) -> Iterator[Line]:
    """Compare GSM8K's conversations, numbers and verdicts."""
    if (data := file.json.get("gsm8k")) is None:
        return
    task = _task("gsm8k", "train", data)
    yield _order("gsm8k", data)
    yield _conversations("gsm8k", task, data["conversations"])
    references = [str(conversation["messages"][-1]["content"][-1]["text"]) for conversation in _all(task)]
    yield same(
        "gsm8k: the numbers of the answers",
        [(str(i), nanochat_number(text), data["references"][i]) for i, text in enumerate(references)],
    )
    cases = [(f"{case['index']} {case['response']!r}", task[case["index"]], case) for case in data["evaluate"]]
    yield same(
        "gsm8k: the numbers of responses",
        [(name, nanochat_number(case["response"]), case["extracted"]) for name, _, case in cases],
    )
    yield same(
        "gsm8k: verdicts by nanochat's rule",
        [(name, is_right_by_nanochat(talk, case["response"]), bool(case["correct"])) for name, talk, case in cases],
    )

    def ours(case: dict[str, Any]) -> bool:
        number, right = case["extracted"], data["references"][case["index"]]
        return bool(number) and bool(right) and number.rstrip(".") == right.rstrip(".") != ""

    yield same(
        "gsm8k: verdicts and rewards by our rule",
        [
            (name, (task.evaluate(talk, case["response"]), task.reward(talk, case["response"])), (right, float(right)))
            for name, talk, case in cases
            for right in [ours(case)]
        ],
    )
    yield exact(
        "gsm8k: what is no text is refused",
        [repr(case["response"]) for case in data["errors"] if not _raises(task.evaluate, task[0], case["response"])],
        len(data["errors"]),
    )
    yield exact(
        "gsm8k: other subsets and splits are refused",
        [
            str(case)
            for case in data["constructor_errors"]
            if not _raises(load_task, "gsm8k", case["split"], subset=case["subset"])
        ],
        len(data["constructor_errors"]),
    )
    yield _kind("gsm8k", data)


def choices(file: ParityFile) -> Iterator[Line]:
    """Compare MMLU and ARC: conversations, order, verdicts; and how choices are rendered."""
    for key, name, split in (("mmlu", "mmlu", "test"), ("arc", "arc_easy", "test")):
        if (data := file.json.get(key)) is None:
            continue
        task = _task(name, split, data)
        yield _order(key, data)
        yield _conversations(key, task, data["conversations"])
        yield same(
            f"{key}: verdicts",
            [
                (str(case), task.evaluate(task[case["index"]], case["response"]), bool(case["correct"]))
                for case in data["evaluate"]
            ],
        )
        # nanochat asserts that a response is one of the letters; here it is not right, unless spaces alone differ.
        yield exact(
            f"{key}: what is no letter is not right",
            [
                repr(case["response"])
                for case in data["errors"]
                if case["response"] == case["response"].strip() and task.evaluate(task[case["index"]], case["response"])
            ],
            len(data["errors"]),
        )
        yield _kind(name, data)
    if "render_mc" in file.json:
        cases = file.json["render_mc"]
        yield same(
            "multiple-choice questions",
            [
                (case["question"], render_mc(case["question"], case["letters"], case["choices"]), case["text"])
                for case in cases
            ],
        )


def orders(file: ParityFile) -> Iterator[Line]:
    """Compare slices and the order of mixtures."""
    if (data := file.json.get("slicing")) is not None:
        # nanochat counts what lies behind the end, and fails when it is asked for; here a slice ends with the data.
        yield same(
            "slices of tasks",
            [
                (
                    str(case),
                    [f"x{i}" for i in _slice(case)],
                    [item for item in case["items"] if item != "IndexError"],
                )
                for case in data["cases"]
                if case["items"] and case.get("start", 0) < case["num_examples"]
            ],
        )
        empty = [case for case in data["cases"] if not case["items"]]
        impossible = [case for case in data["errors"] if case.get("start", 0) <= case.get("num_examples", 10)]
        yield exact(
            "slices that select nothing",
            [str(case) for case in [*empty, *impossible] if not _raises(_slice, case) and _slice(case)],
            len(empty) + len(impossible),
        )
    if (data := file.json.get("mixture")) is not None:
        listed = [f"{chr(ord('a') + task)}{i}" for task, size in enumerate(data["lengths"]) for i in range(size)]
        mixed = [listed[place] for place in shuffled_places(len(listed), data["shuffle_seed"])]
        yield same("the order of a mixture", [("order", mixed, data["order"])])
        yield same("the order of a sequence", [("order", listed, data["sequence_order"])])
        cut = data["sliced"]
        yield same("a slice of a mixture", [("order", mixed[cut["start"] : cut["stop"] : cut["step"]], cut["order"])])
        if "large" in data:
            first, second = data["large"]["lengths"]
            # Its note says which items of the second task are used: "second task: num_examples=300, start=100, step=2".
            numbers = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", data["large"].get("note", ""))}
            start, step = numbers.get("start", 0), numbers.get("step", 1)
            large = [f"p{i}" for i in range(first)] + [f"q{start + step * i}" for i in range(second)]
            order = [large[place] for place in shuffled_places(len(large), data["shuffle_seed"])]
            expected = data["large"]["first_40"]
            yield same("the order of a large mixture", [("order", order[: len(expected)], expected)])


def conversations(file: ParityFile) -> Iterator[Line]:
    """Compare SmolTalk and files of conversations."""
    if (data := file.json.get("smoltalk")) is not None:
        yield _conversations("smoltalk", _task("smoltalk", "train", data), data["conversations"])
        yield exact(
            "smoltalk: what is no conversation is refused",
            [str(case["messages"]) for case in data["errors"] if not find_fault(case["messages"])],
            len(data["errors"]),
        )
    if (data := file.json.get("customjson")) is not None:
        read = _read_lines(data["lines"])
        yield same("conversations of a file", [("all", read, data["conversations"])])
        # Ours also takes a system message and an assistant's content of parts.
        wrong = [
            case["line"] for case in data["errors"] if '"system"' not in case["line"] and '"type"' not in case["line"]
        ]
        yield exact(
            "lines that are no conversation are refused",
            [line for line in wrong if not _raises(_read_lines, [line])],
            len(wrong),
        )


def programs(file: ParityFile) -> Iterator[Line]:
    """Compare HumanEval's conversations, and how a program is made of a response."""
    if (data := file.json.get("humaneval")) is None:
        return
    yield _order("humaneval", data)
    yield _conversations("humaneval", _task("humaneval", "test", data), data["conversations"])
    yield same(
        "humaneval: programs in responses",
        [
            (case["completion"], extract_program(case["completion"]), case["program"])
            for case in data["extract_program"]
        ],
    )
    yield same(
        "humaneval: imports of prompts",
        [(case["prompt"], extract_imports(case["prompt"]), case["imports"]) for case in data["extract_imports"]],
    )
    yield _kind("humaneval", data)


def spelling(file: ParityFile) -> Iterator[Line]:
    """Compare SpellingBee and SimpleSpelling over the file's list of words."""
    if (data := file.json.get("spellingbee")) is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "words.txt"
        path.write_text("\n".join(data["words"]) + "\n", encoding="utf-8")
        for key, name, split in (
            ("train", "spelling_bee", "train"), ("test", "spelling_bee", "test"),
            ("simple_train", "simple_spelling", "train"), ("simple_test", "simple_spelling", "test"),
        ):  # fmt: skip
            task = load_task(name, split, size=len(data[key]), path=path, nanochat_seeds=True)
            # The ways of asking are our own wording, except where nanochat's values showed it: then only the
            # draws are compared, by which letter, word and their quotes stand in the question.
            yield same(
                f"spellingbee: {key}",
                [
                    (f"{i} {talk['messages'][0]['content']}", _told(talk, expected), expected)
                    for i, (talk, expected) in enumerate(zip(_all(task), data[key], strict=True))
                ],
            )
        count = 1 + max(case["index"] for case in data["evaluate"])
        bee = load_task("spelling_bee", "train", size=count, path=path)
        assert isinstance(bee, SpellingBee)
        yield same(
            "spellingbee: verdicts and rewards",
            [
                (
                    repr(case["response"]),
                    tuple(judge(bee[case["index"]], case["response"]) for judge in (bee.evaluate, bee.reward)),
                    (bool(case["correct"]), case["reward"]),
                )
                for case in data["evaluate"]
            ],
        )
        train, test = (load_task("spelling_bee", split, size=200, path=path) for split in ("train", "test"))
        shifted = sum(test[i] == train[i + 1] for i in range(199))
        yield exact(
            "spellingbee: our test conversations are not the training ones", ["shifted"] if shifted > 20 else [], 199
        )


QUANTITIES: tuple[Quantity, ...] = (
    known, calculator, gsm8k, choices, orders, conversations, programs, spelling,
)  # fmt: skip


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


def _task(name: str, split: str, data: dict[str, Any]) -> Task:
    """Return a task over the file's rows, which it reads from parquet as it does the Hub's."""
    cls = task_class(name)
    assert issubclass(cls, HubTask)
    task = cls(split)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        pq.write_table(pa.Table.from_pylist(data["rows"]), path)
        task.rows = Rows([path], cls.columns, seed=data.get("shuffle_seed", 42))
    return task


def _all(task: Task) -> list[dict[str, Any]]:
    return [task[index] for index in range(len(task))]


def _order(name: str, data: dict[str, Any]) -> Line:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        pq.write_table(pa.table({"row": list(range(len(data["rows"])))}), path)
        rows = Rows([path], ["row"], seed=data["shuffle_seed"])
    found = [rows[index]["row"] for index in range(len(rows))]
    return same(f"{name}: the order of the rows", [("order", found, data["permutation"])])


def _conversations(name: str, task: Task, expected: list[dict[str, Any]]) -> Line:
    """Compare conversations by what nanochat's have; ours say the answer of a choice besides."""
    return same(
        f"{name}: conversations",
        [
            (str(i), {key: value for key, value in talk.items() if key in theirs}, theirs)
            for i, (talk, theirs) in enumerate(zip(_all(task), expected, strict=True))
        ],
    )


def _kind(name: str, data: dict[str, Any]) -> Line:
    return same(f"{name}: kind", [("kind", task_class(name).kind, data["eval_type"])])


def _slice(case: dict[str, Any]) -> list[int]:
    """Return the numbers of the rows that a slice selects."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        count = case.get("num_examples", 10)
        pq.write_table(pa.table({"question": [str(i) for i in range(count)], "answer": ["#### 1"] * count}), path)
        task = GSM8K("train").select(case.get("start", 0), case.get("stop"), case.get("step", 1))
        task.rows = Rows([path], GSM8K.columns)
    return [int(talk["messages"][0]["content"]) for talk in _all(task)]


def _read_lines(lines: list[str]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lines.jsonl"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return list(read_conversations(path, ends_answered=False))


def _told(talk: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """Return a conversation with the expected question in place of ours if both come from the same draws."""
    ours, theirs = talk["messages"][0]["content"], expected["messages"][0]["content"]
    spells = isinstance(expected["messages"][1]["content"], str)
    if spells or ours == theirs or _draws(ours, talk) != _draws(theirs, talk):
        return talk
    return {"messages": [expected["messages"][0], *talk["messages"][1:]]}


def _draws(question: str, talk: dict[str, Any]) -> tuple[bool, ...]:
    """Return what a question shows of the draws: whether word and letter stand in which quotes, and a closing mark."""
    call = next(part["text"] for part in talk["messages"][1]["content"] if part["type"] == "python")
    word, letter = call.split("'")[1], call.split("'")[3]
    return (
        *(f"{quote}{word}{quote}" in question for quote in ("'", '"')),
        *(f"{quote}{letter}{quote}" in question for quote in ("'", '"')),
        word in question,
        question.endswith("?"),
    )


def _raises(function: Callable[..., Any], *arguments: Any, **options: Any) -> bool:
    try:
        function(*arguments, **options)
    except (MlxchatError, TypeError, AssertionError):
        return True
    return False
