"""`mlxchat distill --judge`: pairs from the verdicts of a scripted teacher."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kit.servers import Reply, Teacher
from mlxchat.cli import dispatch
from mlxchat.errors import ConfigError, DataError
from mlxchat.tasks.pairs import Pairs

Judge = Callable[..., int]
NUM_QUESTIONS, NUM_ANSWERS = 40, 3
LINES = [
    {"question": f"question {number}", "answer": "x" * length}
    for number in range(NUM_QUESTIONS)
    for length in (1, 2, 2, 3)
]


@pytest.fixture
def judge(teacher: Teacher, place: Path) -> Judge:
    """Run `mlxchat distill --judge` on answers of one, two, two and three letters to each of 40 questions."""
    teacher.script = prefer_longer

    def run(*options: str, lines: list[Any] | None = None) -> int:
        text = "".join(json.dumps(line) + "\n" for line in (LINES if lines is None else lines))
        (place / "answers.jsonl").write_text(text)
        always = ["answers.jsonl", "--judge", "--teacher", teacher.url, "--model", "m", "--out", "out.jsonl"]
        return dispatch(["distill", *always, *options])

    return run


def shown(prompt: str) -> tuple[str, str]:
    """Return the two answers in a judge's prompt."""
    first, second = re.findall(r"<answer_[AB]>\n(.*?)\n</answer_[AB]>", prompt, re.DOTALL)
    return first, second


def prefer_longer(prompt: str, tries: int) -> Reply:
    first, second = shown(prompt)
    return Reply("A" if len(first) > len(second) else "B")


def written(place: Path) -> list[Any]:
    return [json.loads(line) for line in (place / "out.jsonl").read_text().splitlines()]


def test_task_pairs_reads_the_preferred_answers_as_chosen(judge, teacher, place):
    assert judge(lines=LINES[:32]) == 0
    assert len(teacher.bodies) == 8 * (NUM_ANSWERS - 1), "equal answers count once"
    task = Pairs("train", path=place / "out.jsonl", held_out_frac=0)
    pairs = [task[index] for index in range(len(task))]
    assert len(pairs) == len(teacher.bodies)
    assert all(len(pair["messages"][-1]["content"]) > len(pair["rejected"]) for pair in pairs)
    assert {pair["messages"][0]["content"] for pair in pairs} == {line["question"] for line in LINES[:32]}


def test_both_orders_are_shown_equally_often(judge, teacher, place, capsys):
    """80 fair draws: 3.5 standard deviations are 16; the draws are fixed, so this does not fail by chance."""
    judge()
    longer_first = sum(len(first) > len(second) for first, second in map(shown, teacher.asked()))
    assert abs(longer_first - 40) < 16
    assert f"preferred in {longer_first / 80:.1%} of pairs" in capsys.readouterr().out


def test_verdicts_are_cached_and_independent_of_other_lines(judge, teacher, place):
    lines = LINES[:32]
    judge(lines=lines)
    before = (place / "out.jsonl").read_bytes()
    assert judge(lines=lines) == 0
    assert (place / "out.jsonl").read_bytes() == before
    assert judge(lines=lines[::-1][: len(lines) // 2]) == 0
    assert len(teacher.bodies) == 16
    assert len(written(place)) == 8


def test_verdicts_are_read_from_usual_replies(judge, teacher, place):
    replies = ["B", " b.\n", "**B**", "Answer: B", "[[B]]", "answer_B", "<think>A?</think>B"]
    said = iter(replies)
    teacher.script = lambda prompt, tries: Reply(next(said))
    lines = [line for line in LINES if line["answer"] != "xxx"][: 3 * len(replies)]
    assert judge("--concurrency", "1", lines=lines) == 0
    assert [pair["chosen"][0]["content"] for pair in written(place)] == [shown(one)[1] for one in teacher.asked()]


def test_ties_and_other_replies_give_no_pair(judge, teacher, place, capsys):
    replies = iter(["tie", "Both A and B are fine", "", "A"])
    teacher.script = lambda prompt, tries: Reply(next(replies))
    assert judge("--limit", "4", "--concurrency", "1") == 0
    assert len(written(place)) == 1
    assert "1 pairs of 4 comparisons (1 empty, 1 ties, 1 without verdict)" in capsys.readouterr().out
    counts = json.loads((place / "out.provenance.json").read_text())["counts"]
    assert (counts["tied"], counts["unclear"], counts["kept"], counts["preferred_first"]) == (1, 1, 1, 1)


def test_judge_sees_the_conversation_and_the_criteria(judge, teacher, place):
    turns = [{"role": role, "content": f"{role} {number}"} for number, role in enumerate(["user", "assistant", "user"])]
    lines = [{"messages": [*turns, {"role": "assistant", "content": answer}]} for answer in ("one", "three")]
    judge("--system", "Be strict", lines=lines)
    system, prompt = teacher.bodies[0]["messages"]
    assert system == {"role": "system", "content": "Be strict"}
    assert "user: user 0\n\nassistant: assistant 1\n\nuser: user 2\n" in prompt["content"]
    assert sorted(shown(prompt["content"])) == ["one", "three"]
    assert written(place)[0]["prompt"] == turns


def test_cost_limit_resumes_without_paying_twice(judge, teacher, place):
    limits = ["--price", "0,1000", "--max-tokens", "16", "--concurrency", "1", "--max-cost"]  # a reply costs 0.005
    judge(*limits, "0.05", lines=LINES[:40])
    paid = len(teacher.bodies)
    assert 0 < paid <= 10
    assert len(written(place)) == paid
    assert judge(*limits, "1", lines=LINES[:40]) == 0
    assert (len(teacher.bodies), len(written(place))) == (20, 20)
    assert len(set(teacher.asked())) == 20


def test_judge_refuses_unfit_options_and_files(judge, teacher, place):
    with pytest.raises(ConfigError) as caught:
        judge("--samples", "2", "--only-correct", "--keep-cut")
    assert [line.split(",")[0] for line in str(caught.value).splitlines()] == [
        "--judge cannot be combined with --only-correct", "--judge cannot be combined with --keep-cut",
        "--samples is 2",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"QUESTIONS is gsm8k, expected a \.jsonl"):
        dispatch(["distill", "gsm8k", "--judge", "--teacher", teacher.url, "--out", "out.jsonl"])
    with pytest.raises(DataError, match="no question with two different answers"):
        judge(lines=LINES[1:3])
    assert teacher.bodies == []
