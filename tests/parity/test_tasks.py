"""The tasks' conversations, orders, parsing and verdicts.

Where our verdicts differ from nanochat's on purpose, our documented rule is compared.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlxchat.data.tokens import shuffled_places
from mlxchat.tasks import Task, load_task, task_class
from mlxchat.tasks.base import is_right_by_nanochat, nanochat_number, render_mc
from mlxchat.tasks.downloads import Rows, extract_imports, extract_program
from mlxchat.tasks.jsonl import read_conversations
from parity.values import assert_same, of_files

each_file = of_files("tasks_*.json")


def task_of(name: str, split: str, data: dict[str, Any], folder: Path) -> Task:
    """Return a task that reads the file's rows from parquet, as from the Hub."""
    cls: Any = task_class(name)
    task = cls(split)
    pq.write_table(pa.Table.from_pylist(data["rows"]), folder / "rows.parquet")
    task.rows = Rows([folder / "rows.parquet"], cls.columns, seed=data.get("shuffle_seed", 42))
    return task


def everything(task: Task) -> list[dict[str, Any]]:
    return [task[index] for index in range(len(task))]


@each_file
@pytest.mark.parametrize(
    ("section", "name", "split"),
    [("gsm8k", "gsm8k", "train"), ("mmlu", "mmlu", "test"), ("arc", "arc_easy", "test"),
     ("humaneval", "humaneval", "test"), ("smoltalk", "smoltalk", "train")],
)  # fmt: skip
def test_conversations_and_their_order(values, section, name, split, tmp_path):
    """By nanochat's keys; ours also have the answer of a choice."""
    data = values.json[section]
    task, expected = task_of(name, split, data, tmp_path), data["conversations"]
    assert_same(
        (number, {key: value for key, value in talk.items() if key in theirs}, theirs)
        for number, (talk, theirs) in enumerate(zip(everything(task), expected, strict=True))
    )
    assert section == "smoltalk" or task.rows.order == data["permutation"]
    assert section == "smoltalk" or task.kind == data["eval_type"]


@each_file
def test_numbers_and_verdicts_of_gsm8k(values, tmp_path):
    data, pairs = values.json["gsm8k"], []
    task = task_of("gsm8k", "train", data, tmp_path)
    for number, talk in enumerate(everything(task)):
        answer = str(talk["messages"][-1]["content"][-1]["text"])
        pairs.append((number, nanochat_number(answer), data["references"][number]))
    for case in data["evaluate"]:
        talk, response, right = task[case["index"]], case["response"], data["references"][case["index"]]
        number = nanochat_number(response)
        ours = bool(number) and bool(right) and number.rstrip(".") == right.rstrip(".") != ""
        got = number, is_right_by_nanochat(talk, response), task.evaluate(talk, response), task.reward(talk, response)
        pairs.append((response, got, (case["extracted"], case["correct"], ours, float(ours))))
    assert_same(pairs)


@each_file
@pytest.mark.parametrize(("section", "name"), [("mmlu", "mmlu"), ("arc", "arc_easy")])
def test_verdicts_on_choices(values, section, name, tmp_path):
    data = values.json[section]
    task = task_of(name, "test", data, tmp_path)
    assert_same(
        (case, task.evaluate(task[case["index"]], case["response"]), case["correct"]) for case in data["evaluate"]
    )


@each_file
def test_texts_of_choices_files_and_programs(values, tmp_path):
    cases = values.json["render_mc"]
    assert_same((case, render_mc(case["question"], case["letters"], case["choices"]), case["text"]) for case in cases)
    data, path = values.json["customjson"], tmp_path / "lines.jsonl"
    path.write_text("\n".join(data["lines"]) + "\n", encoding="utf-8")
    assert list(read_conversations(path, ends_answered=False)) == data["conversations"]
    data = values.json["humaneval"]
    assert_same((case, extract_program(case["completion"]), case["program"]) for case in data["extract_program"])
    assert_same((case, extract_imports(case["prompt"]), case["imports"]) for case in data["extract_imports"])


@each_file
def test_order_of_a_mixture(values):
    data = values.json["mixture"]
    listed = [f"{chr(ord('a') + task)}{i}" for task, size in enumerate(data["lengths"]) for i in range(size)]
    mixed = [listed[place] for place in shuffled_places(len(listed), data["shuffle_seed"])]
    cut = data["sliced"]
    assert (listed, mixed) == (data["sequence_order"], data["order"])
    assert mixed[cut["start"] : cut["stop"] : cut["step"]] == cut["order"]


# Spelling


def draws(question: str, talk: dict[str, Any]) -> list[bool]:
    """Return the draws that a question shows: quotes of word and letter, and a question mark."""
    call = next(part["text"] for part in talk["messages"][1]["content"] if part["type"] == "python")
    quoted = [f"{quote}{text}{quote}" for text in call.split("'")[1:4:2] for quote in ("'", '"')]
    return [*(text in question for text in quoted), question.endswith("?")]


@each_file
def test_spelling(values, tmp_path):
    """Questions have our wording, except where nanochat's values contain it: else their draws are compared."""
    data, path = values.json["spellingbee"], tmp_path / "words.txt"
    path.write_text("\n".join(data["words"]) + "\n", encoding="utf-8")
    names = {"train": "spelling_bee", "test": "spelling_bee", "simple_train": "simple_spelling",
             "simple_test": "simple_spelling"}  # fmt: skip
    for key, name in names.items():
        split, size = key.removeprefix("simple_"), len(data[key])
        task = load_task(name, split, size=size, path=path, nanochat_seeds=True)
        for talk, expected in zip(everything(task), data[key], strict=True):
            ours, theirs = talk["messages"][0]["content"], expected["messages"][0]["content"]
            assert talk["messages"][1:] == expected["messages"][1:]
            assert ours == theirs or draws(ours, talk) == draws(theirs, talk)
    bee = load_task("spelling_bee", "train", size=1 + max(case["index"] for case in data["evaluate"]), path=path)
    for case in data["evaluate"]:
        talk, response = bee[case["index"]], case["response"]
        assert (bee.evaluate(talk, response), bee.reward(talk, response)) == (case["correct"], case["reward"])
