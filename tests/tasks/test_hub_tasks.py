"""nanochat's data sets: conversations against hand-written ones, verdicts, malformed rows."""

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlxchat.tasks import Task, load_task
from mlxchat.tasks.base import calculator_parts, final_number, is_right_by_nanochat
from mlxchat.tasks.downloads import Rows, assemble_program


def text(part: str) -> dict[str, str]:
    return {"type": "text", "text": part}


def everything(task: Task) -> list[dict[str, Any]]:
    return [task[index] for index in range(len(task))]


def add(hub: Any, repository: str, files: dict[str, list[dict[str, Any]]]) -> None:
    """Add a repository of parquet files to the Hub."""
    made = {}
    for name, rows in files.items():
        file = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), file)
        made[name] = file.getvalue()
    hub.add(repository, made)


@pytest.fixture
def problems(hub: Any) -> list[dict[str, str]]:
    rows = [{"question": f"{n}+1?", "answer": f"It is <<{n}+1={n + 1}>>{n + 1}.\n#### {n + 1}"} for n in range(10)]
    parts = {"train-00000-of-00002": rows[:4], "train-00001-of-00002": rows[4:], "test-00000-of-00001": rows[:1]}
    add(hub, "openai/gsm8k", {f"main/{name}.parquet": part for name, part in parts.items()})
    return rows


def test_slices_are_pythons_and_size_is_bounded_by_the_rows(problems):
    whole = everything(load_task("gsm8k", "train"))
    for start, stop, step in ((0, None, 1), (3, None, 1), (0, 4, 1), (2, 9, 3), (1, 50, 2)):
        assert everything(load_task("gsm8k", "train").select(start, stop, step)) == whole[start:stop:step]
    assert everything(load_task("gsm8k", "train", size=3)) == whole[:3]
    assert everything(load_task("gsm8k", "train", size=99)) == whole


def test_calculator_calls_become_parts():
    answer = "So <<12/60=0.2>>0.2 each,\n<<0.2*50=10>><<5*3>>.\n#### 10"
    assert calculator_parts(answer, keep_empty=True) == [
        text("So "), {"type": "python", "text": "12/60"}, {"type": "python_output", "text": "0.2"},
        text("0.2 each,\n"), {"type": "python", "text": "0.2*50"}, {"type": "python_output", "text": "10"},
        text(""), {"type": "python", "text": "5*3"}, {"type": "python_output", "text": ""}, text(".\n#### 10"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("response", "number"),
    [
        ("#### 18", "18"), ("so\n#### 1,234 dollars", "1234"), ("#### 18.", "18"), ("#### -3", "-3"),
        ("#### 7\n#### 8", "7"), ("#### 2.50", "2.50"), ("#### x", None), ("18", None),
        ("####18", None), ("#### .", None), ("", None),
    ],
)  # fmt: skip
def test_number_follows_the_first_marker(response, number):
    assert final_number(response) == number


@pytest.mark.parametrize(
    ("answer", "response", "ours", "nanochats"),
    [("It is eight.", "It is eight.", False, True), ("#### 18", "#### 18.", True, False),
     ("#### 18", "#### 18", True, True), ("#### 18", "18", False, False)],
)  # fmt: skip
def test_verdicts_are_ours_or_nanochats(answer, response, ours, nanochats):
    talk = {"messages": [{}, {"content": [text(answer)]}]}
    task: Any = load_task("gsm8k", "test")
    assert (task.reward(talk, response), is_right_by_nanochat(talk, response)) == (float(ours), nanochats)
    assert task.explain(talk, response) == (ours, {"nanochat_verdict": nanochats})


QUESTION = {"question": "Which is red?", "subject": "colour", "choices": ["sky", "sea", "rose", "leaf"], "answer": 2}
RENDERED = (
    "Multiple Choice question: Which is red?\n- sky=A\n- sea=B\n- rose=C\n- leaf=D\n\n"
    "Respond only with the letter of the correct answer."
)


def test_mmlu_conversation_is_exact(hub):
    add(hub, "cais/mmlu", {"all/test-00000-of-00001.parquet": [QUESTION]})
    task = load_task("mmlu", "test")
    assert everything(task) == [
        {
            "messages": [{"role": "user", "content": RENDERED}, {"role": "assistant", "content": "C"}],
            "subject": "colour", "letters": ["A", "B", "C", "D"], "answer": "C",
            "question": "Which is red?", "choices": ["sky", "sea", "rose", "leaf"],
        }
    ]  # fmt: skip
    assert [task.evaluate(task[0], letter) for letter in ("A", "C", "E", "")] == [False, True, False, False]


def test_arc_keeps_the_data_sets_labels(hub):
    choices = {"text": ["ice", "steam", "fog"], "label": ["1", "2", "3"]}
    row = {"id": "x", "question": "Cold?", "choices": choices, "answerKey": "1"}
    add(hub, "allenai/ai2_arc", {"ARC-Challenge/train-00000-of-00001.parquet": [row]})
    talk = load_task("arc_challenge", "train")[0]
    assert (talk["letters"], talk["answer"]) == (["1", "2", "3"], "1")
    assert "- steam=2\n" in talk["messages"][0]["content"]


def test_humaneval_program_passes_and_fails_its_tests(hub):
    row = {
        "task_id": "x/1", "prompt": "import math\n\ndef f(x):\n", "canonical_solution": "    return math.floor(x)\n",
        "entry_point": "f", "test": "def check(g):\n    assert g(1.5) == 1",
    }  # fmt: skip
    add(hub, "openai/openai_humaneval", {"openai_humaneval/test-00000-of-00001.parquet": [row]})
    task = load_task("humaneval", "test")
    talk = task[0]
    assert talk["messages"][1]["content"] == "import math\n\ndef f(x):\n\n    return math.floor(x)\n"
    assert assemble_program(talk, "```python\ndef f(x):\n    return 1\n```") == (
        "import math\n\ndef f(x):\n    return 1\n\ndef check(g):\n    assert g(1.5) == 1\ncheck(f)"
    )
    assert task.evaluate(talk, talk["messages"][1]["content"])
    assert not task.evaluate(talk, "import sys\nsys.exit(0)")  # a pass in nanochat, since nothing failed


# Rows of parquet files
def test_seed_42_gives_the_order_of_datasets_shuffle(tmp_path):
    """As `datasets.Dataset.shuffle(seed=42)` orders six rows: nanochat's HumanEval rows show it."""
    pq.write_table(pa.table({"text": list("012345")}), tmp_path / "a", row_group_size=2)
    rows = Rows([tmp_path / "a"], ["text"], seed=42)
    assert [rows[index]["text"] for index in range(6)] == list("325410")
