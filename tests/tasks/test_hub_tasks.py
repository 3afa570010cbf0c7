"""nanochat's data sets as tasks: conversations against ones written by hand, verdicts, and what is read when."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlxchat.errors import ConfigError, DataError
from mlxchat.tasks import Task, load_task
from mlxchat.tasks.answers import calculator_parts, final_number, is_right_by_nanochat, nanochat_number
from mlxchat.tasks.benchmarks import assemble_program, extract_imports, extract_program


def text(part: str) -> dict[str, str]:
    return {"type": "text", "text": part}


def everything(task: Task) -> list[dict[str, Any]]:
    return [task[index] for index in range(len(task))]


@pytest.fixture
def problems(hub: Any) -> list[dict[str, str]]:
    rows = [{"question": f"{n}+1?", "answer": f"It is <<{n}+1={n + 1}>>{n + 1}.\n#### {n + 1}"} for n in range(10)]
    hub.write("openai/gsm8k", "main/train-00000-of-00002.parquet", rows[:4])
    hub.write("openai/gsm8k", "main/train-00001-of-00002.parquet", rows[4:])
    hub.write("openai/gsm8k", "main/test-00000-of-00001.parquet", rows[:1])
    return rows


def test_rows_of_all_files_come_in_the_order_of_nanochats_shuffle(problems: list[dict[str, str]]) -> None:
    expected = [problems[number]["question"] for number in np.random.default_rng(42).permutation(10)]
    assert [talk["messages"][0]["content"] for talk in everything(load_task("gsm8k", "train"))] == expected


def test_another_seed_is_another_order_of_the_same_rows(problems: list[dict[str, str]]) -> None:
    asked = [
        [talk["messages"][0]["content"] for talk in everything(load_task("gsm8k", "train", seed=seed))]
        for seed in (42, 1)
    ]
    assert asked[0] != asked[1]
    assert sorted(asked[0]) == sorted(asked[1])


def test_a_slice_is_pythons(problems: list[dict[str, str]]) -> None:
    whole = everything(load_task("gsm8k", "train"))
    for start, stop, step in ((0, None, 1), (3, None, 1), (0, 4, 1), (2, 9, 3), (1, 50, 2)):
        assert everything(load_task("gsm8k", "train").select(start, stop, step)) == whole[start:stop:step]


def test_size_takes_the_first_and_never_more_than_there_are(problems: list[dict[str, str]]) -> None:
    whole = everything(load_task("gsm8k", "train"))
    assert everything(load_task("gsm8k", "train", size=3)) == whole[:3]
    assert everything(load_task("gsm8k", "train", size=99)) == whole


def test_nothing_is_read_before_a_conversation_is_asked_for(hub: Any) -> None:
    task = load_task("mmlu", "auxiliary_train", revision="v1", repository="me/copy")
    assert [(need.repository, need.revision, need.pattern) for need in task.needs()] == [
        ("me/copy", "v1", "all/auxiliary_train-*.parquet")
    ]
    assert hub.asked == []
    with pytest.raises(DataError, match=r"me/copy at v1 has no file all/auxiliary_train-\*\.parquet"):
        len(task)


def test_the_files_that_were_read_are_named_with_their_commit(hub: Any, problems: list[dict[str, str]]) -> None:
    sources = load_task("gsm8k", "train").sources()
    assert [source["name"] for source in sources] == [
        f"openai/gsm8k/main/train-0000{n}-of-00002.parquet" for n in (0, 1)
    ]
    assert {source["revision"] for source in sources} == {"5ca1ab1e" * 5}


# GSM8K


def test_calculator_calls_become_parts() -> None:
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
def test_the_number_is_what_follows_the_first_marker(response: str, number: str | None) -> None:
    assert final_number(response) == number


def test_a_missing_number_is_wrong_even_where_the_answer_has_none() -> None:
    talk = {"messages": [{}, {"content": [text("It is eight.")]}]}
    task = load_task("gsm8k", "test")
    assert not task.evaluate(talk, "It is eight.")
    assert is_right_by_nanochat(talk, "It is eight.")


def test_a_full_stop_after_the_number_is_no_part_of_it() -> None:
    talk = {"messages": [{}, {"content": [text("#### 18")]}]}
    assert load_task("gsm8k", "test").reward(talk, "#### 18.") == 1.0
    assert nanochat_number("#### 18.") == "18."


def test_nanochats_verdict_is_an_option() -> None:
    talk = {"messages": [{}, {"content": [text("#### 18")]}]}
    task = load_task("gsm8k", "test", nanochat_verdict=1.0)
    assert [task.reward(talk, response) for response in ("#### 18.", "#### 18", "18")] == [0.0, 1.0, 0.0]
    assert task.explain(talk, "#### 18.") == (False, {"nanochat_verdict": False})  # type: ignore[attr-defined]


# Multiple choice

QUESTION = {"question": "Which is red?", "subject": "colour", "choices": ["sky", "sea", "rose", "leaf"], "answer": 2}
RENDERED = (
    "Multiple Choice question: Which is red?\n- sky=A\n- sea=B\n- rose=C\n- leaf=D\n\n"
    "Respond only with the letter of the correct answer."
)


def test_mmlu_asks_for_a_letter(hub: Any) -> None:
    hub.write("cais/mmlu", "all/test-00000-of-00001.parquet", [QUESTION])
    task = load_task("mmlu", "test")
    assert everything(task) == [
        {
            "messages": [{"role": "user", "content": RENDERED}, {"role": "assistant", "content": "C"}],
            "subject": "colour", "letters": ["A", "B", "C", "D"], "answer": "C",
        }
    ]  # fmt: skip
    assert [task.evaluate(task[0], letter) for letter in ("A", "C", "E", "")] == [False, True, False, False]


def test_mmlus_training_rows_are_read_flat_and_from_inside_a_column(hub: Any) -> None:
    rows = [{**QUESTION, "question": f"q{n}", "answer": n % 4} for n in range(20)]
    hub.write("cais/mmlu", "all/auxiliary_train-00000-of-00001.parquet", rows)
    hub.write("cais/mmlu", "auxiliary_train/train-00000-of-00001.parquet", [{"train": row} for row in rows])
    flat = load_task("mmlu", "auxiliary_train")
    nested = load_task("mmlu", "auxiliary_train", subset="auxiliary_train")
    assert everything(flat) == everything(nested)
    assert len(flat) == 20


def test_the_subset_for_training_has_no_other_split() -> None:
    with pytest.raises(ConfigError, match="only the split auxiliary_train, not test"):
        load_task("mmlu", "test", subset="auxiliary_train")


def test_arc_keeps_the_labels_of_the_data(hub: Any) -> None:
    choices = {"text": ["ice", "steam", "fog"], "label": ["1", "2", "3"]}
    row = {"id": "x", "question": "Cold?", "choices": choices, "answerKey": "1"}
    hub.write("allenai/ai2_arc", "ARC-Challenge/train-00000-of-00001.parquet", [row])
    talk = load_task("arc_challenge", "train")[0]
    assert (talk["letters"], talk["answer"]) == (["1", "2", "3"], "1")
    assert "- steam=2\n" in talk["messages"][0]["content"]


def test_an_answer_that_is_no_label_names_the_row(hub: Any) -> None:
    row = {"question": "?", "choices": {"text": ["x"], "label": ["A"]}, "answerKey": "B"}
    hub.write("allenai/ai2_arc", "ARC-Easy/test-00000-of-00001.parquet", [row])
    with pytest.raises(DataError, match=r'row 0 of allenai/ai2_arc/ARC-Easy/test-\*\.parquet has the answer "B"'):
        load_task("arc_easy", "test")[0]


# Rows of a wrong form

ARC = {"question": "?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}
MMLU = {"question": "?", "subject": "s", "choices": ["a", "b", "c", "d"], "answer": 1}
GSM8K = {"question": "?", "answer": "#### 1"}
HUMANEVAL = {"prompt": "p", "canonical_solution": "c", "entry_point": "e", "test": "t"}
TALK = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("task", "split", "file", "row"),
    [
        *(("gsm8k", "test", "openai/gsm8k:main", GSM8K | change) for change in (
            {"answer": None}, {"answer": 3}, {"question": ["?"]}, {"question": b"\xff"},
        )),
        *(("mmlu", "test", "cais/mmlu:all", MMLU | change) for change in (
            {"question": None}, {"question": ["?"]}, {"choices": None}, {"choices": 3}, {"answer": "B"}, {"answer": -1},
            {"choices": ["a", None, "c", "d"]}, {"choices": ["a"]},
        )),
        *(("arc_easy", "test", "allenai/ai2_arc:ARC-Easy", ARC | change) for change in (
            {"question": None}, {"choices": None}, {"choices": ["x", "y"]}, {"answerKey": 1},
            {"choices": {"text": ["x"], "label": ["A", "B"]}}, {"choices": {"text": ["x", None], "label": ["A", "B"]}},
        )),
        *(("humaneval", "test", "openai/openai_humaneval:openai_humaneval", HUMANEVAL | change) for change in (
            {"test": None}, {"entry_point": 3}, {"prompt": ["p"]},
        )),
        *(("smoltalk", "test", "HuggingFaceTB/smol-smoltalk:data", {"messages": talk}) for talk in (
            [None, *TALK], "talk", ["u", "a"], {"role": "user"}, 3, [{"role": "user"}, {"role": "assistant"}],
        )),
    ],
    ids=str,
)  # fmt: skip
def test_a_row_of_a_wrong_form_is_named_and_never_becomes_text(
    hub: Any, task: str, split: str, file: str, row: dict[str, Any]
) -> None:
    """A null once became the question "None", and other faults ended in tracebacks without the row."""
    repository, folder = file.split(":")
    hub.write(repository, f"{folder}/{split}-00000-of-00001.parquet", [row])
    with pytest.raises(DataError, match=f"task {task}: row 0 of {repository}/"):
        load_task(task, split)[0]


def test_a_message_that_quotes_a_row_cannot_move_the_cursor(hub: Any) -> None:
    """Nor can what a server says: every message of ours goes the same way."""
    row = {**ARC, "answerKey": "\x1b[2J\x1b]0;title\x07\u202e"}
    hub.write("allenai/ai2_arc", "ARC-Easy/test-00000-of-00001.parquet", [row])
    with pytest.raises(DataError) as caught:
        load_task("arc_easy", "test")[0]
    assert r'the answer "\x1b[2J\x1b]0;title\x07\u202e"' in str(caught.value)
    assert str(caught.value).isprintable()


# SmolTalk

USER, ASSISTANT = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}


def test_smoltalk_passes_conversations_on(hub: Any) -> None:
    talks = [[SYSTEM, USER, ASSISTANT], [USER, ASSISTANT, USER, ASSISTANT]]
    hub.write("HuggingFaceTB/smol-smoltalk", "data/test-00000.parquet", [{"messages": talk} for talk in talks])
    found = [talk["messages"] for talk in everything(load_task("smoltalk", "test"))]
    assert sorted(found, key=len) == talks


@pytest.mark.parametrize(
    "talk", [[], [SYSTEM], [USER], [ASSISTANT, USER], [USER, USER], [USER, {**ASSISTANT, "content": None}]]
)
def test_what_is_no_conversation_names_its_row(talk: list[Any], hub: Any) -> None:
    hub.write(
        "HuggingFaceTB/smol-smoltalk", "data/train-00000.parquet", [{"messages": talk or None}, {"messages": [USER]}]
    )
    task = load_task("smoltalk", "train", seed=1)
    place = next(index for index in range(2) if task.rows.number(index) == 0)  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"row 0 of HuggingFaceTB/smol-smoltalk/data/train-\*\.parquet is no conversa"):
        task[place]


# HumanEval


def test_the_code_is_the_first_block_or_all_of_the_response() -> None:
    assert extract_program("Here:\n```python\nx = 1\n```\n```\ny = 2\n```") == "x = 1"
    assert extract_program(" x = 1\n") == "x = 1"
    assert extract_program("```py\nx = 1\n```") == "```py\nx = 1\n```"


def test_imports_end_at_the_first_other_line() -> None:
    assert extract_imports("# a\nimport os\n\nfrom a import b\nx = 1\nimport late") == "import os\nfrom a import b"


def test_a_program_is_imports_code_tests_and_their_call(hub: Any) -> None:
    row = {
        "task_id": "x/1", "prompt": "import math\n\ndef f(x):\n", "canonical_solution": "    return math.floor(x)\n",
        "entry_point": "f", "test": "def check(g):\n    assert g(1.5) == 1",
    }  # fmt: skip
    hub.write("openai/openai_humaneval", "openai_humaneval/test-00000-of-00001.parquet", [row])
    task = load_task("humaneval", "test")
    talk = task[0]
    assert talk["messages"][1]["content"] == "import math\n\ndef f(x):\n\n    return math.floor(x)\n"
    assert assemble_program(talk, "```python\ndef f(x):\n    return 1\n```") == (
        "import math\n\ndef f(x):\n    return 1\n\ndef check(g):\n    assert g(1.5) == 1\ncheck(f)"
    )
    assert task.evaluate(talk, talk["messages"][1]["content"])
    assert not task.evaluate(talk, "import sys\nsys.exit(0)")  # a pass in nanochat, since nothing failed


@pytest.mark.parametrize("name", ["gsm8k", "mmlu", "arc_easy", "smoltalk", "humaneval"])
def test_a_wrong_split_or_subset_is_refused_with_the_right_ones(name: str) -> None:
    with pytest.raises(ConfigError, match=f'split of task {name} is "tset", expected'):
        load_task(name, "tset")
    with pytest.raises(ConfigError, match=f'subset of task {name} is "nain", expected'):
        load_task(name, "test", subset="nain")
