"""tasks_*.json: the tasks' conversations, orders, parsing and verdicts, and the calculator.

Where our verdicts differ from nanochat's on purpose, both rules are compared.
"""

import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from comparison import Comparison, Quantity, exact, matching, refusing, same
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


def calculator(file: ParityFile) -> Iterator[Comparison]:
    """Compare the calculator's results by our documented rule, which differs from nanochat's."""
    if "calculator" not in file.json:
        return
    cases = [(case["expr"], our_rule(case["expr"], case["result"])) for case in file.json["calculator"]]
    compared = [(repr(each), calculate(each), expected) for each, expected in cases if expected != "skip"]
    yield same("the calculator, by our rule", compared)
    few = [] if len(compared) > len(cases) / 2 else ["too few"]
    yield exact("more than half of the expressions are compared", few, len(cases))


def gsm8k(file: ParityFile) -> Iterator[Comparison]:
    """Compare GSM8K's conversations, numbers and verdicts."""
    if (data := file.json.get("gsm8k")) is None:
        return
    task = _task("gsm8k", "train", data)
    yield _order("gsm8k", data)
    yield _conversations("gsm8k", task, data["conversations"])
    answers = [{"text": str(talk["messages"][-1]["content"][-1]["text"])} for talk in _all(task)]
    yield same("gsm8k: the numbers of the answers", [
        (str(i), nanochat_number(answer["text"]), data["references"][i]) for i, answer in enumerate(answers)
    ])  # fmt: skip
    cases = data["evaluate"]
    yield matching(
        "gsm8k: the numbers of responses", cases, lambda case: nanochat_number(case["response"]), "extracted"
    )
    yield matching(
        "gsm8k: verdicts by nanochat's rule", cases,
        lambda case: is_right_by_nanochat(task[case["index"]], case["response"]), "correct",
    )  # fmt: skip

    def ours(case: dict[str, Any]) -> bool:
        number, right = case["extracted"], data["references"][case["index"]]
        return bool(number) and bool(right) and number.rstrip(".") == right.rstrip(".") != ""

    yield same("gsm8k: verdicts and rewards by our rule", [
        (str(case), tuple(judge(task[case["index"]], case["response"]) for judge in (task.evaluate, task.reward)),
         (ours(case), float(ours(case))))
        for case in cases
    ])  # fmt: skip
    yield refusing("gsm8k: what is not text is refused", data["errors"],
                   lambda case: _raises(task.evaluate, task[0], case["response"]))  # fmt: skip
    yield refusing("gsm8k: other subsets and splits are refused", data["constructor_errors"],
                   lambda case: _raises(load_task, "gsm8k", case["split"], subset=case["subset"]))  # fmt: skip
    yield _kind("gsm8k", data)


def choices(file: ParityFile) -> Iterator[Comparison]:
    """Compare conversations, order and verdicts of MMLU and ARC, and how choices are rendered."""
    for key, name in (("mmlu", "mmlu"), ("arc", "arc_easy")):
        if (data := file.json.get(key)) is None:
            continue
        task = _task(name, "test", data)
        yield _order(key, data)
        yield _conversations(key, task, data["conversations"])

        def verdict(case: dict[str, Any], task: Task = task) -> bool:
            return task.evaluate(task[case["index"]], case["response"])

        yield matching(f"{key}: verdicts", data["evaluate"], verdict, "correct")
        # nanochat asserts that a response is a letter; ours judges it wrong, unless it differs only by spaces.
        yield refusing(f"{key}: what is not a letter is not right", data["errors"],
                       lambda case, wrong=verdict: case["response"] != case["response"].strip() or not wrong(case)
                       )  # fmt: skip
        yield _kind(name, data)
    if "render_mc" in file.json:
        yield matching("multiple-choice questions", file.json["render_mc"],
                       lambda case: render_mc(case["question"], case["letters"], case["choices"]), "text")  # fmt: skip


def orders(file: ParityFile) -> Iterator[Comparison]:
    """Compare slices and the order of mixtures."""
    if (data := file.json.get("slicing")) is not None:
        # nanochat's length of a slice may exceed the data, and reading there fails; ours ends with the data.
        within = [case for case in data["cases"] if case["items"] and case.get("start", 0) < case["num_examples"]]
        yield same("slices of tasks", [
            (str(case), [f"x{i}" for i in _slice(case)], [item for item in case["items"] if item != "IndexError"])
            for case in within
        ])  # fmt: skip
        empty = [case for case in data["cases"] if not case["items"]]
        impossible = [case for case in data["errors"] if case.get("start", 0) <= case.get("num_examples", 10)]
        yield refusing("slices that select nothing", [*empty, *impossible],
                       lambda case: _raises(_slice, case) or not _slice(case))  # fmt: skip
    if (data := file.json.get("mixture")) is not None:
        listed = [f"{chr(ord('a') + task)}{i}" for task, size in enumerate(data["lengths"]) for i in range(size)]
        mixed = [listed[place] for place in shuffled_places(len(listed), data["shuffle_seed"])]
        cut = data["sliced"]
        found = [
            ("mixture", mixed, data["order"]), ("sequence", listed, data["sequence_order"]),
            ("slice of a mixture", mixed[cut["start"] : cut["stop"] : cut["step"]], cut["order"]),
        ]  # fmt: skip
        if "large" in data:
            first, second = data["large"]["lengths"]
            # Its note describes the second task's items: "second task: num_examples=300, start=100, step=2".
            numbers = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", data["large"].get("note", ""))}
            start, step = numbers.get("start", 0), numbers.get("step", 1)
            large = [f"p{i}" for i in range(first)] + [f"q{start + step * i}" for i in range(second)]
            order = [large[place] for place in shuffled_places(len(large), data["shuffle_seed"])]
            expected = data["large"]["first_40"]
            found.append(("large mixture", order[: len(expected)], expected))
        yield same("orders of mixtures", found)


def conversations(file: ParityFile) -> Iterator[Comparison]:
    """Compare SmolTalk and files of conversations."""
    if (data := file.json.get("smoltalk")) is not None:
        yield _conversations("smoltalk", _task("smoltalk", "train", data), data["conversations"])
        yield refusing("smoltalk: invalid conversations are refused", data["errors"],
                       lambda case: bool(find_fault(case["messages"])))  # fmt: skip
    if (data := file.json.get("customjson")) is not None:
        yield same("conversations of a file", [("all", _read_lines(data["lines"]), data["conversations"])])
        # Ours also accepts a system message and assistant contents made of parts.
        wrong = [each for each in data["errors"] if '"system"' not in each["line"] and '"type"' not in each["line"]]
        yield refusing("invalid lines are refused", wrong, lambda case: _raises(_read_lines, [case["line"]]))


def programs(file: ParityFile) -> Iterator[Comparison]:
    """Compare HumanEval's conversations, and how programs are assembled from responses."""
    if (data := file.json.get("humaneval")) is None:
        return
    yield _order("humaneval", data)
    yield _conversations("humaneval", _task("humaneval", "test", data), data["conversations"])
    yield matching("humaneval: programs in responses", data["extract_program"],
                   lambda case: extract_program(case["completion"]), "program")  # fmt: skip
    yield matching("humaneval: imports of prompts", data["extract_imports"],
                   lambda case: extract_imports(case["prompt"]), "imports")  # fmt: skip
    yield _kind("humaneval", data)


def spelling(file: ParityFile) -> Iterator[Comparison]:
    """Compare SpellingBee and SimpleSpelling with the file's list of words."""
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
            # Questions have our wording, except where nanochat's values contain it: otherwise only the draws are
            # compared, by the letter, the word and their quotes in the question.
            yield same(f"spellingbee: {key}", [
                (f"{i} {talk['messages'][0]['content']}", _with_equal_draws(talk, expected), expected)
                for i, (talk, expected) in enumerate(zip(_all(task), data[key], strict=True))
            ])  # fmt: skip
        count = 1 + max(case["index"] for case in data["evaluate"])
        bee = load_task("spelling_bee", "train", size=count, path=path)
        for judge, key in ((bee.evaluate, "correct"), (bee.reward, "reward")):
            yield matching(f"spellingbee: {key}", data["evaluate"],
                           lambda case, judge=judge: judge(bee[case["index"]], case["response"]), key)  # fmt: skip
        train, test = (load_task("spelling_bee", split, size=200, path=path) for split in ("train", "test"))
        shifted = sum(test[i] == train[i + 1] for i in range(199))
        yield exact("spellingbee: splits are not shifted by one", ["shifted"] if shifted > 20 else [], 199)


QUANTITIES: tuple[Quantity, ...] = (
    calculator, gsm8k, choices, orders, conversations, programs, spelling,
)  # fmt: skip


def our_rule(expression: str, theirs: str | None) -> str | None:
    """Return our rule's result from nanochat's, or 'skip' if only ours supports the expression.

    Ours has integers without a point, ten decimals, limits of 1e15 and 200 characters, % and exponents, and counts
    letters in any text, commas included.
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
    """Return a task that reads the file's rows from parquet, as from the Hub."""
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


def _order(name: str, data: dict[str, Any]) -> Comparison:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        pq.write_table(pa.table({"row": list(range(len(data["rows"])))}), path)
        rows = Rows([path], ["row"], seed=data["shuffle_seed"])
    found = [rows[index]["row"] for index in range(len(rows))]
    return same(f"{name}: the order of the rows", [("order", found, data["permutation"])])


def _conversations(name: str, task: Task, expected: list[dict[str, Any]]) -> Comparison:
    """Compare conversations by nanochat's keys; ours also have the answer of a choice."""
    return same(
        f"{name}: conversations",
        [
            (str(i), {key: value for key, value in talk.items() if key in theirs}, theirs)
            for i, (talk, theirs) in enumerate(zip(_all(task), expected, strict=True))
        ],
    )


def _kind(name: str, data: dict[str, Any]) -> Comparison:
    return same(f"{name}: kind", [("kind", task_class(name).kind, data["eval_type"])])


def _slice(case: dict[str, Any]) -> list[int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        count = case.get("num_examples", 10)
        pq.write_table(pa.table({"question": [str(i) for i in range(count)], "answer": ["#### 1"] * count}), path)
        task = GSM8K("train").select(case.get("start", 0), case.get("stop"), case.get("step", 1))
        task.rows = Rows([path], GSM8K.columns, seed=0)
        task.rows.order = list(range(count))
    return [int(talk["messages"][0]["content"]) for talk in _all(task)]


def _read_lines(lines: list[str]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lines.jsonl"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return list(read_conversations(path, ends_answered=False))


def _with_equal_draws(talk: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """Return our conversation with the expected question if both have the same draws."""
    ours, theirs = talk["messages"][0]["content"], expected["messages"][0]["content"]
    spells = isinstance(expected["messages"][1]["content"], str)
    if spells or ours == theirs or _draws(ours, talk) != _draws(theirs, talk):
        return talk
    return {"messages": [expected["messages"][0], *talk["messages"][1:]]}


def _draws(question: str, talk: dict[str, Any]) -> tuple[bool, ...]:
    """Return the draws that a question shows: quotes of word and letter, and a question mark."""
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
