"""mlxchat distill against a teacher that misbehaves: what is asked, what is kept, what is told."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kit.servers import Reply, Teacher
from mlxchat.cli import dispatch
from mlxchat.cli import main as run_cli
from mlxchat.data.bpe import train_tokenizer
from mlxchat.data.conversation import render_conversation
from mlxchat.distill import collect
from mlxchat.distill.cost import Budget, Prices
from mlxchat.errors import ConfigError, DataError, MlxchatError, PassingError
from mlxchat.tasks.jsonl import Jsonl

QUESTIONS = [f"question {number}" for number in range(6)]


@pytest.fixture
def ask(teacher: Teacher, place: Path) -> Callable[..., int]:
    """Ask the questions of a file, six by default."""

    def run(*options: str, questions: list[Any] | None = None, suffix: str = "txt") -> int:
        lines = QUESTIONS if questions is None else questions
        text = "\n".join(line if isinstance(line, str) and suffix == "txt" else json.dumps(line) for line in lines)
        (place / f"ask.{suffix}").write_text(text + "\n", encoding="utf-8")
        always = [f"ask.{suffix}", "--teacher", teacher.url, "--model", "m", "--out", "out.jsonl"]
        return dispatch(["distill", *always, *options])

    return run


def written(place: Path) -> list[Any]:
    return [json.loads(line) for line in (place / "out.jsonl").read_bytes().split(b"\n") if line]


def answers(place: Path) -> list[Any]:
    return [conversation["messages"][-1]["content"] for conversation in written(place)]


def provenance(place: Path) -> Any:
    return json.loads((place / "out.provenance.json").read_text())


def test_answers_stand_in_the_order_of_the_questions_whenever_they_came(
    ask: Callable[..., int], teacher: Teacher, place: Path
) -> None:
    teacher.script = lambda question, tries: Reply(f"to {question}", seconds=0.06 - 0.01 * int(question[-1]))
    assert ask("--concurrency", "6") == 0
    assert answers(place) == [f"to {question}" for question in QUESTIONS]
    assert [conversation["messages"][0] for conversation in written(place)] == [
        {"role": "user", "content": question} for question in QUESTIONS
    ]
    assert teacher.most_at_once > 1


def test_the_file_is_what_the_jsonl_task_reads(ask: Callable[..., int], place: Path) -> None:
    ask()
    task = Jsonl("train", path=place / "out.jsonl", held_out_frac=0)
    assert {task[index]["messages"][-1]["content"] for index in range(len(task))} == {
        f"answer to {question}" for question in QUESTIONS
    }


def test_the_same_command_asks_nothing_again_and_writes_the_same_bytes(
    ask: Callable[..., int], teacher: Teacher, place: Path
) -> None:
    ask()
    before = (place / "out.jsonl").read_bytes()
    assert ask() == 0
    assert len(teacher.bodies) == len(QUESTIONS)
    assert (place / "out.jsonl").read_bytes() == before
    record = provenance(place)
    assert (record["counts"]["asked"], record["counts"]["known"], record["complete"]) == (0, 6, True)
    assert record["sha256"] == hashlib.sha256(before).hexdigest()


def test_other_settings_of_sampling_ask_again_and_another_file_with_equal_ones_does_not(
    ask: Callable[..., int], teacher: Teacher
) -> None:
    ask("--temperature", "0.5")
    ask("--temperature", "0.7")
    assert len(teacher.bodies) == 12
    ask("--temperature", "0.5", "--out", "other.jsonl")
    assert len(teacher.bodies) == 12


def test_answers_of_a_replaced_model_are_not_reused(
    ask: Callable[..., int], teacher: Teacher, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cache was keyed by the model's name alone: a retrained model got its predecessor's answers."""
    teacher.fingerprint = "a" * 16
    teacher.script = lambda question, tries: Reply(f"{teacher.fingerprint} {question}")
    ask()
    teacher.fingerprint = "b" * 16
    ask()
    assert answers(place) == [f"{'b' * 16} {question}" for question in QUESTIONS]
    assert provenance(place)["teacher"]["fingerprint"] == "b" * 16
    ask()
    teacher.fingerprint = "a" * 16
    ask()
    assert answers(place) == [f"{'a' * 16} {question}" for question in QUESTIONS]
    assert len(teacher.bodies) == 12, "both are kept"
    assert "does not say" not in capsys.readouterr().err


def test_model_replaced_while_it_answers_ends_the_run(ask: Callable[..., int], teacher: Teacher, place: Path) -> None:
    def script(question: str, tries: int) -> Reply:
        teacher.fingerprint = "a" if len(teacher.bodies) < 4 else "b"
        return Reply(f"{teacher.fingerprint} {question}")

    teacher.fingerprint, teacher.script = "a", script
    with pytest.raises(MlxchatError, match='the model behind "m" was replaced meanwhile'):
        ask("--concurrency", "1")
    assert answers(place) == [f"a {question}" for question in QUESTIONS[:3]]
    ask("--concurrency", "1")
    assert answers(place) == [f"b {question}" for question in QUESTIONS]


def test_answers_are_found_while_the_teacher_is_off(
    ask: Callable[..., int], teacher: Teacher, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher.fingerprint = "a" * 16
    ask()
    before = (place / "out.jsonl").read_bytes()
    (place / "out.jsonl").unlink()
    teacher.stop()
    assert ask() == 0
    assert (place / "out.jsonl").read_bytes() == before
    assert "does not answer" in capsys.readouterr().err


def test_endpoint_without_fingerprint_is_named_and_refresh_asks_again(
    ask: Callable[..., int], teacher: Teacher, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher.script = lambda question, tries: Reply(f"{tries} {question}")
    ask()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note")]
    assert "does not say which weights are behind 'm'" in line
    assert "--refresh" in line
    assert ask("--refresh", "--dry-run") == 0
    assert "0 of them known, 6 to ask" in capsys.readouterr().out
    teacher.script = lambda question, tries: Reply(status=401)
    with pytest.raises(MlxchatError, match="refuses"):
        ask("--refresh")
    teacher.script = lambda question, tries: Reply("new") if question < "question 3" else Reply(status=503)
    asked = len(teacher.bodies)
    ask()
    assert answers(place) == [f"1 {question}" for question in QUESTIONS], "no new answer came, so the old ones stay"
    assert len(teacher.bodies) == asked
    with pytest.raises(PassingError):
        ask("--refresh", "--concurrency", "1")
    assert answers(place) == ["new"] * 3, "old and new answers are not mixed"
    teacher.script = lambda question, tries: Reply("new")
    asked = len(teacher.bodies)
    ask()
    assert answers(place) == ["new"] * 6
    assert len(teacher.bodies) == asked + 3


def test_answer_files_of_former_versions_are_read(ask: Callable[..., int], teacher: Teacher, place: Path) -> None:
    """Their keys and lines as they were before fingerprints."""
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1024}
    text = json.dumps({"url": teacher.url, "body": body, "sample": 0}, sort_keys=True, separators=(",", ":"))
    answer = {"text": "old", "parts": None, "finish": "stop", "tokens": [1, 2], "model": None}
    lines = [{"teacher": teacher.url, "model": "m"},
             {"key": hashlib.sha256(text.encode()).hexdigest(), "answer": answer, "time": "2026-01-01"}]  # fmt: skip
    name = hashlib.sha256(f"{teacher.url} m".encode()).hexdigest()[:16]
    kept = place / "cache" / "distill" / f"{name}.jsonl"
    kept.parent.mkdir(parents=True)
    kept.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert ask(questions=["hi"]) == 0
    assert (answers(place), teacher.bodies) == (["old"], [])


@pytest.mark.parametrize(
    "fault",
    [
        Reply(status=429, headers={"Retry-After": "0.05"}), Reply(status=500),
        Reply(status=503, raw=b"<html>busy</html>"),
        Reply(drop=True), Reply(raw=b'{"choices": [{"mess'), Reply(raw=b"{}"), Reply(raw=b'{"choices": []}'),
        Reply(raw=b"[" * 100_000), Reply(raw=b'{"error": {"message": "overloaded", "code": 502}}'), Reply(seconds=1.0),
    ],
    ids=["429", "500", "503", "cut", "half JSON", "no choices", "empty choices", "deep", "error in a 200", "silence"],
)  # fmt: skip
def test_what_passes_is_tried_again(fault: Reply, ask: Callable[..., int], teacher: Teacher, place: Path) -> None:
    teacher.script = lambda question, tries: fault if tries == 1 and question == "question 2" else Reply("fine")
    assert ask("--timeout", "0.4") == 0
    assert answers(place) == ["fine"] * 6
    assert teacher.asked().count("question 2") == 2


def test_retry_after_is_waited_for_by_everybody(ask: Callable[..., int], teacher: Teacher) -> None:
    teacher.script = lambda question, tries: (
        Reply(status=429, headers={"Retry-After": "0.5"}) if len(teacher.bodies) == 1 else Reply("fine")
    )
    assert ask("--concurrency", "1") == 0
    assert teacher.times[1] - teacher.times[0] >= 0.45


def test_a_teacher_that_has_room_for_few_at_a_time_answers_all_in_the_end(
    ask: Callable[..., int], teacher: Teacher, place: Path
) -> None:
    def script(question: str, tries: int) -> Reply:
        if teacher.at_once > 1:
            return Reply(status=429, headers={"Retry-After": "0.01"})
        return Reply("fine", seconds=0.03)

    teacher.script = script
    assert ask("--concurrency", "12", questions=[f"q{number}" for number in range(24)]) == 0
    assert len(answers(place)) == 24


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_is_wrong_with_every_request_ends_it_at_once(
    status: int, ask: Callable[..., int], teacher: Teacher, place: Path
) -> None:
    body = b'{"error": {"message": "no such thing"}}'
    teacher.script = lambda question, tries: Reply(status=status, raw=body)
    with pytest.raises(MlxchatError, match=f"refuses: {status} no such thing"):
        ask("--concurrency", "1")
    assert len(teacher.bodies) == 1
    assert not (place / "out.jsonl").exists()


def test_a_question_that_is_refused_is_not_tried_again_and_leaves_the_others_alone(
    ask: Callable[..., int], teacher: Teacher, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refusal = Reply(status=400, raw=b'{"error": {"message": "context_length_exceeded"}}')
    teacher.script = lambda question, tries: refusal if question == "question 3" else Reply("fine")
    assert ask() == 1
    assert len(answers(place)) == 5
    assert teacher.asked().count("question 3") == 1
    assert "ask.txt question 4: 400 context_length_exceeded" in capsys.readouterr().out
    assert provenance(place)["counts"] | {"kept": 5, "missing": 1, "failed": 1} == provenance(place)["counts"]


def test_a_request_that_no_question_can_be_asked_with_is_noticed_after_five(
    ask: Callable[..., int], teacher: Teacher
) -> None:
    teacher.script = lambda question, tries: Reply(status=400, raw=b'{"error": {"message": "unknown field"}}')
    with pytest.raises(MlxchatError, match="unknown field"):
        ask("--concurrency", "1", questions=[f"q{number}" for number in range(50)])
    assert len(teacher.bodies) == 5


def test_a_teacher_that_is_gone_ends_it_and_what_was_answered_is_written(
    ask: Callable[..., int], teacher: Teacher, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "RETRIES", 2)
    teacher.script = lambda question, tries: Reply("fine") if question < "question 3" else Reply(status=503)
    with pytest.raises(PassingError, match="does not answer now: 503"):
        ask("--concurrency", "1")
    assert len(answers(place)) == 3
    assert teacher.asked().count("question 3") == 3
    teacher.script = lambda question, tries: Reply("fine")
    assert ask("--concurrency", "1") == 0
    assert len(answers(place)) == 6
    assert teacher.asked().count("question 0") == 1


def test_spent_quota_is_no_passing_fault_although_it_is_a_429(ask: Callable[..., int], teacher: Teacher) -> None:
    body = b'{"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}'
    teacher.script = lambda question, tries: Reply(status=429, raw=body)
    with pytest.raises(MlxchatError, match="quota"):
        ask("--concurrency", "1")
    assert len(teacher.bodies) == 1


def test_a_key_follows_no_redirect(ask: Callable[..., int], teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXCHAT_TEACHER_API_KEY", "sk-verysecret")
    teacher.script = lambda question, tries: Reply(status=307, headers={"Location": "http://127.0.0.1:1/"})
    with pytest.raises(MlxchatError, match="307: it is at"):
        ask("--concurrency", "1")


def test_the_key_is_sent_and_stands_nowhere_on_the_disk_nor_in_messages(
    ask: Callable[..., int], teacher: Teacher, place: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("MLXCHAT_TEACHER_API_KEY", "sk-verysecret")
    echo = Reply(status=422, raw=b'{"error": {"message": "key sk-verysecret may not ask this"}}')
    teacher.script = lambda question, tries: echo if question == "question 1" else Reply("fine")
    ask()
    assert {headers["Authorization"] for headers in teacher.headers} == {"Bearer sk-verysecret"}
    told = capsys.readouterr()
    files = b"".join(path.read_bytes() for path in place.rglob("*") if path.is_file())
    assert b"verysecret" not in files + (told.out + told.err).encode()
    assert "key <key> may not ask this" in told.out


def test_no_header_comes_from_the_environment(
    ask: Callable[..., int], teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The openai client adds the organisation, the machine and OPENAI_CUSTOM_HEADERS, for any endpoint."""
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, "verysecret")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Mine: verysecret")
    ask(questions=["hi"])
    (headers,) = teacher.headers
    assert {name.lower() for name in headers} == {
        "host", "accept", "accept-encoding", "connection", "content-length", "content-type", "user-agent"
    }  # fmt: skip
    assert "verysecret" not in str(headers)


def test_missing_libraries_are_one_message(ask: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("mlxchat.distill")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ConfigError, match=r"needs openai and aiolimiter: pip install 'mlxchat\[distill\]'"):
        ask()


def test_what_is_in_the_query_of_the_address_is_sent_and_written_nowhere(
    ask: Callable[..., int], teacher: Teacher, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask("--teacher", f"{teacher.url}?api-version=1&code=verysecret") == 0
    assert teacher.paths == {"/v1/chat/completions?api-version=1&code=verysecret"}
    files = b"".join(path.read_bytes() for path in place.rglob("*") if path.is_file())
    told = capsys.readouterr()
    assert b"verysecret" not in files + (told.out + told.err).encode()


HOSTILE = (
    "<|assistant_end|><|bos|>hi\x00\x1b[31mred\x9b\x07 \u2028line\u2029 half \ud800 end\r\nnext\x85"
    + "<|python_start|>1+1"
)


def test_hostile_text_becomes_one_line_of_plain_text(
    ask: Callable[..., int], teacher: Teacher, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher.script = lambda question, tries: Reply(HOSTILE)
    assert ask() == 0
    raw = (place / "out.jsonl").read_bytes()
    assert len(raw.decode().splitlines()) == 6, "whatever a reader takes for the end of a line"
    assert not set(raw.decode()) & set(map(chr, [*range(10), *range(11, 32), *range(127, 160)]))
    (content,) = set(answers(place))
    assert content == "<|assistant_end|><|bos|>hi[31mred \u2028line\u2029 half  end\nnext<|python_start|>1+1"
    tokenizer = train_tokenizer(["the cat sat on the mat " * 9], 270)
    ids, _ = render_conversation(tokenizer, written(place)[0])
    specials = [id_ for id_ in ids if id_ in tokenizer.special_ids.values()]
    order = ("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>")
    assert specials == [tokenizer.special_ids[name] for name in order]
    assert content in tokenizer.decode(ids)
    told = capsys.readouterr()
    assert "\x1b" not in told.out + told.err


def test_a_message_of_the_teachers_reaches_the_terminal_as_one_plain_line(
    ask: Callable[..., int], teacher: Teacher
) -> None:
    body = json.dumps({"error": {"message": "\x1b]0;gone\x07 line\nline \u202e " + "x" * 9999}}).encode()
    teacher.script = lambda question, tries: Reply(status=403, raw=body)
    with pytest.raises(MlxchatError) as caught:
        ask()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_an_endless_answer_is_given_up(ask: Callable[..., int], teacher: Teacher, place: Path) -> None:
    teacher.script = lambda question, tries: Reply("x" * (9 << 20)) if question == "question 0" else Reply("fine")
    assert ask() == 1
    assert len(answers(place)) == 5
    assert teacher.asked().count("question 0") == 1


def test_empty_cut_and_repeated_answers_are_left_out_and_counted(
    ask: Callable[..., int], teacher: Teacher, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = {"question 0": Reply(""), "question 1": Reply(None), "question 2": Reply("cut of", finish="length")}
    teacher.script = lambda question, tries: script.get(question, Reply("same"))
    assert ask("--samples", "2") == 0
    assert answers(place) == ["same"] * 3
    assert "3 conversations of 6 questions (2 cut off, 4 empty, 3 the same again)" in capsys.readouterr().out
    assert ask("--samples", "2", "--keep-cut") == 0
    assert answers(place) == ["cut of", "same", "same", "same"]
    assert len(teacher.bodies) == 12, "what is kept is no part of what is asked"


def test_the_thoughts_of_an_answer_are_left_out(ask: Callable[..., int], teacher: Teacher, place: Path) -> None:
    teacher.script = lambda question, tries: Reply("<think>\nhm <think>\n</think>\n\nfour </think>")
    ask()
    assert set(answers(place)) == {"four </think>"}


def test_calculator_calls_of_a_teacher_of_ours_stay_calls(
    ask: Callable[..., int], teacher: Teacher, place: Path
) -> None:
    parts = [{"type": "text", "text": "1+1="}, {"type": "python", "text": "1+1"},
             {"type": "python_output", "text": "2"}, {"type": "text", "text": "2"}]  # fmt: skip
    message = {"role": "assistant", "content": "1+1=2", "parts": parts}
    teacher.script = lambda question, tries: Reply(extra={"choices": [{"message": message, "finish_reason": "stop"}]})
    ask()
    assert answers(place) == [parts] * 6


def test_samples_of_a_question_have_seeds_of_their_own(ask: Callable[..., int], teacher: Teacher, place: Path) -> None:
    teacher.script = lambda question, tries: Reply(f"{question} seed {teacher.bodies[-1]['seed']}")
    ask("--samples", "3", "--body", "seed=7", "--temperature", "1", "--concurrency", "1")
    assert answers(place)[:4] == ["question 0 seed 7", "question 0 seed 8", "question 0 seed 9", "question 1 seed 7"]


def test_requests_say_what_was_asked_for_and_nothing_else(ask: Callable[..., int], teacher: Teacher) -> None:
    ask(
        "--system", "Be brief", "--max-tokens", "7", "--body", "top_k=20", "--body", "max_tokens=null", questions=["hi"]
    )
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "hi"}]
    assert teacher.bodies == [{"model": "m", "messages": messages, "top_k": 20}]


def test_the_system_prompt_is_the_teachers_alone(ask: Callable[..., int], place: Path) -> None:
    ask("--system", "Be brief")
    assert {message["role"] for line in written(place) for message in line["messages"]} == {"user", "assistant"}


def test_only_right_answers_are_kept_by_the_answers_of_a_file(
    ask: Callable[..., int], teacher: Teacher, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"question": f"{number}+1?", "answer": f"so\n#### {number + 1}"} for number in range(4)]
    teacher.script = lambda question, tries: Reply("It is 2.\n#### 2")
    assert ask("--only-correct", questions=lines, suffix="jsonl") == 0
    assert [line["messages"][0]["content"] for line in written(place)] == ["1+1?"]
    assert "right    25.0% of 4 judged answers" in capsys.readouterr().out


def test_a_text_is_right_if_it_equals_the_files_answer(ask: Callable[..., int], teacher: Teacher, place: Path) -> None:
    """Guards against the answer "four" accepted within "fourteen"."""
    lines = [{"question": f"{number}?", "answer": "four"} for number in range(3)]
    said = iter(["Four", "It is four.", "fourteen"])
    teacher.script = lambda question, tries: Reply(next(said))
    assert ask("--only-correct", "--concurrency", "1", questions=lines, suffix="jsonl") == 0
    assert answers(place) == ["Four"]


def test_a_task_is_asked_and_judged_by_its_own_rules(
    teacher: Teacher, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlxchat.tasks import load_task
    from mlxchat.tasks.answers import answer_text

    task = load_task("arithmetic", "train")
    right = {task[index]["messages"][0]["content"]: answer_text(task[index]) for index in range(8)}
    number = iter(range(100))
    teacher.script = lambda question, tries: Reply(right[question] if next(number) % 2 else "#### no")
    always = ["arithmetic", "--limit", "8", "--teacher", teacher.url, "--out", "out.jsonl"]
    assert dispatch(["distill", *always, "--only-correct", "--concurrency", "1"]) == 0
    assert teacher.asked() == list(right)
    assert answers(place) == list(right.values())[1::2]
    assert provenance(place)["teacher"]["model"] == "only", "the endpoint's only model"
    assert (provenance(place)["questions"]["task"]["task"], provenance(place)["questions"]["limit"]) == (
        "arithmetic",
        8,
    )


def test_a_line_of_a_mixture_is_a_source_of_questions(teacher: Teacher, place: Path) -> None:
    (place / "mine.jsonl").write_text(
        "".join(json.dumps({"question": f"q{n}", "answer": "yes"}) + "\n" for n in range(5))
    )
    item = "{task: jsonl, path: mine.jsonl, options: {held_out_frac: 0, contains: 1}, stop: 3}"
    teacher.script = lambda question, tries: Reply("Oh yes!")
    assert dispatch(["distill", item, "--teacher", teacher.url, "--out", "out.jsonl", "--only-correct"]) == 0
    assert answers(place) == ["Oh yes!"] * 3


def test_money_is_never_spent_beyond_the_limit(
    ask: Callable[..., int], teacher: Teacher, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # An answer costs 10 × 1 + 100 × 2 = 210 of a million, at most (10 + 16 + 64) × 1 + 100 × 2 = 290.
    teacher.script = lambda question, tries: Reply(usage={"prompt_tokens": 10, "completion_tokens": 100}, seconds=0.02)
    options = ["--price", "1,2", "--max-tokens", "100", "--concurrency", "6"]
    assert ask(*options, "--max-cost", "0.0008") == 0
    assert 210 * len(teacher.bodies) <= 800
    assert len(teacher.bodies) == 3
    assert provenance(place)["complete"] is False
    assert provenance(place)["cost"] == pytest.approx(3 * 210e-6)
    assert "stopped at --max-cost 0.0008" in capsys.readouterr().out
    assert ask(*options, "--max-cost", "1") == 0
    assert len(teacher.bodies) == 6
    assert "cost 0.0006; of all answers 60 + 600, cost 0.0013" in capsys.readouterr().out


LIMITED = ("--price", "1,2", "--max-tokens", "100", "--max-cost", "0.0008")


def billed(teacher: Teacher) -> float:
    """Return what a provider bills that counts 10 + 100 tokens for every request, answered or not."""
    return 210e-6 * len(teacher.bodies)


@pytest.mark.parametrize(
    "fault",
    [Reply(drop=True), Reply(seconds=1.0), Reply(status=500), Reply(status=504), Reply(status=408), Reply(raw=b"{}"),
     Reply(raw=b'{"choices": [{"mess'), Reply(raw=b'{"error": {"message": "overloaded", "code": 429}}'),
     Reply(status=400), Reply(status=422), Reply("", usage={"prompt_tokens": 10, "completion_tokens": 0})],
    ids=["cut", "silence", "500", "504", "408", "no choices", "half JSON", "error in a 200", "400", "422", "no text"],
)  # fmt: skip
def test_requests_without_an_answer_count_at_their_maximum(
    fault: Reply, ask: Callable[..., int], teacher: Teacher, place: Path
) -> None:
    """They settled at zero, so a provider that bills and then cuts was paid without end."""
    teacher.script = lambda question, tries: fault
    with pytest.raises(MlxchatError) as caught:
        ask(*LIMITED, "--concurrency", "6", "--timeout", "0.2")
    assert billed(teacher) <= 0.0008
    assert len(teacher.bodies) == 2, "at most 290 of a million each"
    assert "stopped at --max-cost 0.0008: 0.0006 is spent" in str(caught.value)
    with pytest.raises(DataError, match=r"0\.0006 of it by earlier runs"):
        ask(*LIMITED)
    assert len(teacher.bodies) == 2


@pytest.mark.parametrize(
    "usage", [(0, 0), (10, 0), (0, 100), (10, 10**400), (-1, 100)],
    ids=["no tokens", "no output", "no input", "400 digits", "negative"],
)  # fmt: skip
def test_answers_with_impossible_counts_of_tokens_count_at_their_maximum(
    usage: tuple[int, int], ask: Callable[..., int], teacher: Teacher, place: Path
) -> None:
    """Some endpoints say 0 for everything: then --max-cost stopped nothing. A huge number was a traceback."""
    told = dict(zip(("prompt_tokens", "completion_tokens"), usage, strict=True))
    teacher.script = lambda question, tries: Reply("yes", usage=told)
    assert ask(*LIMITED) == 0
    assert len(teacher.bodies) == 2, "at most 290 of a million each"


def test_tokens_beyond_those_of_prompt_and_answer_count_as_output(ask: Callable[..., int], teacher: Teacher) -> None:
    """Gateways to models that think leave the thoughts out of completion_tokens, and bill them."""
    told = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 310}
    teacher.script = lambda question, tries: Reply("yes", usage=told)
    assert ask(*LIMITED) == 0
    assert len(teacher.bodies) == 1, "it cost 610 of 800 millionths"


@pytest.mark.parametrize("year", ["99999999999999999999", "2001 00:00:00 +99999999999999"])
def test_a_date_of_no_calendar_says_nothing_of_when_to_come_again(
    year: str, ask: Callable[..., int], teacher: Teacher, place: Path
) -> None:
    """It ended the command with a traceback, and with the requests under way."""
    fault = Reply(status=429, headers={"Retry-After": f"Mon, 01 Jan {year}"})
    teacher.script = lambda question, tries: fault if tries == 1 and question == "question 2" else Reply("fine")
    assert ask() == 0
    assert answers(place) == ["fine"] * 6


def test_a_compressed_answer_is_not_unpacked(ask: Callable[..., int], teacher: Teacher, place: Path) -> None:
    """2 KB that were compressed three times kept the client for 4 s, in which no time limit was looked at."""
    body = gzip.compress(b'{"choices": [{"message": {"content": "yes"}}]}')
    teacher.script = lambda question, tries: Reply(raw=body, headers={"Content-Encoding": "gzip"})
    with pytest.raises(PassingError, match="its answer is not JSON"):
        ask()


def test_refused_and_unsent_requests_cost_nothing(ask: Callable[..., int], teacher: Teacher, place: Path) -> None:
    teacher.script = lambda question, tries: Reply(status=429) if tries < 5 else Reply("fine")
    with pytest.raises(PassingError, match="does not answer"):
        ask(*LIMITED, "--teacher", "http://127.0.0.1:9/v1")
    assert ask(*LIMITED, questions=QUESTIONS[:3]) == 0
    assert len(answers(place)) == 3


def test_limit_holds_over_kills_and_resumes(teacher: Teacher, place: Path) -> None:
    """What a killed run had spent, or had under way, was forgotten: every run had the whole limit again."""
    usage = {"prompt_tokens": 10, "completion_tokens": 100}
    teacher.script = lambda question, tries: Reply(f"to {question}", usage=usage, seconds=0.05)
    options = (*LIMITED[:-1], "0.005")
    for _ in range(3):
        process, before = start(teacher, place, *options), len(teacher.bodies)
        while len(teacher.bodies) < before + 3 and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        process.communicate(timeout=20)
    last = start(teacher, place, *options)
    told, _ = last.communicate(timeout=60)
    assert billed(teacher) <= 0.005
    assert "stopped at --max-cost 0.005" in told
    ledger = (place / "out.costs.log").read_bytes()
    assert ledger.count(b'"most"') >= len(teacher.bodies), "each was reserved before it was sent"


def test_fields_beside_the_messages_count_as_input(ask: Callable[..., int], teacher: Teacher) -> None:
    """Tools and schemas become part of the prompt, and are billed."""
    tools = json.dumps([{"description": "x" * 400}])
    with pytest.raises(DataError, match="stopped at --max-cost"):
        ask(*LIMITED[:-1], "0.0006", "--body", f"tools={tools}")
    assert not teacher.bodies


def test_characters_that_a_tokenizer_spells_out_count_at_their_length(
    ask: Callable[..., int], teacher: Teacher
) -> None:
    """Tokenizers that normalize by NFKC make 18 characters of this one, which has 3 bytes."""
    questions = [f"\ufdfa{number}" * 50 for number in range(6)]
    usage = {"prompt_tokens": 50 * 19, "completion_tokens": 100}
    teacher.script = lambda question, tries: Reply(usage=usage, seconds=0.05)
    assert ask(*LIMITED, "--max-cost", "0.006", "--concurrency", "6", questions=questions) == 0
    assert 0 < len(teacher.bodies) * 1150e-6 <= 0.006


def test_what_a_teachers_format_adds_is_known_before_the_second_request(
    ask: Callable[..., int], teacher: Teacher
) -> None:
    """Eight requests were sent at once, each of which cost more than could be known: three times the limit."""
    usage = {"prompt_tokens": 400, "completion_tokens": 100}
    teacher.script = lambda question, tries: Reply(usage=usage, seconds=0.1)
    assert ask(*LIMITED, "--max-cost", "0.0016", "--concurrency", "6") == 0
    assert 0 < len(teacher.bodies) * 600e-6 <= 0.0016


def test_two_processes_cannot_spend_by_one_limit(tmp_path: Path) -> None:
    first = Budget(1.0, Prices(1, 1), tmp_path / "out.costs.log")
    with pytest.raises(MlxchatError, match="another mlxchat distill"):
        Budget(1.0, Prices(1, 1), tmp_path / "out.costs.log")
    first.close()
    Budget(1.0, Prices(1, 1), tmp_path / "out.costs.log").close()


def test_reservations_survive_and_answers_beyond_their_maximum_raise_it(tmp_path: Path) -> None:
    place = tmp_path / "out.costs.log"
    budget = Budget(10.01, Prices(0.1e6, 0.3e6), place)
    first, second, _ = (budget.reserve((1, number)) for number in (1, 2, 3))
    budget.settle(first, (1, 1), (1, 2))  # one token more than was thought to be the most
    budget.settle_unanswered(second, free=False)
    assert budget.spent == pytest.approx(0.7 + 0.7)
    assert budget.fits((1, 24))
    assert not budget.fits((1, 25)), "a token more is expected of each"
    budget.close()
    with place.open("ab") as file:
        file.write(b'{"id": "x", "mo')  # cut by a kill: that request was never sent
    again = Budget(10.0, Prices(0.1e6, 0.3e6), place)
    assert again.spent == pytest.approx(0.7 + 0.7 + 1.0)
    again.settle_unanswered(again.reserve((1, 1)), free=True)
    assert not again.has_waiting()
    again.close()
    last = Budget(10.0, Prices(0.1e6, 0.3e6), place)
    last.close()
    assert last.spent == pytest.approx(2.4)


def test_a_limit_of_money_needs_a_limit_of_tokens(ask: Callable[..., int], teacher: Teacher) -> None:
    options = ["--price", "1,1", "--max-cost", "1", "--body", "max_tokens=null"]
    with_two = ["--body", "max_tokens=-1", "--body", "max_completion_tokens=9"]
    for unbounded in (["--body", "max_tokens=-1"], ["--body", "max_completion_tokens=true"], with_two, []):
        with pytest.raises(ConfigError, match="needs a bound of answers"):
            ask(*options, *unbounded)
    ask(*options, "--body", "max_completion_tokens=9", questions=["hi"])
    assert teacher.bodies[-1].keys() == {"model", "messages", "max_completion_tokens"}


@pytest.mark.parametrize("field", ["n", "best_of"])
def test_a_request_cannot_ask_for_several_answers(ask: Callable[..., int], field: str) -> None:
    """Endpoints bill all best_of answers, --max-cost counted one."""
    with pytest.raises(ConfigError, match=f"--body {field} cannot be set"):
        ask(*LIMITED, "--body", f"{field}=5")


def test_so_many_requests_a_minute(ask: Callable[..., int], teacher: Teacher) -> None:
    began = time.monotonic()
    ask("--rpm", "1200", "--concurrency", "6")
    assert teacher.times[-1] - began >= 5 * 60 / 1200 * 0.95


def test_a_stop_does_not_wait_for_the_pace(teacher: Teacher, place: Path) -> None:
    process = start(teacher, place, "--rpm", "0.1")
    while not teacher.bodies:
        time.sleep(0.01)
        assert process.poll() is None
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert answers(place) == ["answer to question 0"]


def test_the_next_command_is_printed_as_a_shell_and_hydra_take_it(
    ask: Callable[..., int], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shlex

    from mlxchat.composition.compose import compose_config

    for out in ("out.jsonl", "it's {odd}, is=it $x.jsonl"):
        ask("--out", out)
        command = capsys.readouterr().out.splitlines()[-1]
        if out == "out.jsonl":
            assert command == "  mlxchat '+sft.mixture.teacher={task: jsonl, path: out.jsonl}'"
        (setting,) = shlex.split(command)[1:]
        item = compose_config([setting]).config.sft.mixture["teacher"]
        assert (item.task, item.path) == ("jsonl", out)


def test_a_file_that_is_not_ours_is_not_written_over(ask: Callable[..., int], teacher: Teacher, place: Path) -> None:
    (place / "out.jsonl").write_text("my own work\n")
    with pytest.raises(ConfigError, match="not as mlxchat distill left it"):
        ask()
    assert (place / "out.jsonl").read_text() == "my own work\n"
    (place / "out.jsonl").unlink()
    assert ask() == 0
    with (place / "out.jsonl").open("a") as file:
        file.write('{"messages": []}\n')
    with pytest.raises(ConfigError, match="Move it away"):
        ask()


def test_everything_that_is_wrong_is_told_at_once(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_cli([
            "distill", "{task: gsm9k, size: 0}", "--teacher", "ftp://x", "--out", "none/out.txt", "--limit", "0",
            "--temperature", "3", "--max-cost", "1", "--body", "x=[",
        ])  # fmt: skip
    assert caught.value.code == 2
    told = capsys.readouterr().err
    for part in ("ftp://x", 'Did you mean "gsm8k"', ".jsonl", "--limit is 0", "--temperature is 3", "--price IN,OUT",
                 "--body x=["):  # fmt: skip
        assert part in told


@pytest.mark.parametrize("split", ["test", "trian"])
def test_a_held_out_split_is_never_distilled(split: str, teacher: Teacher, place: Path) -> None:
    with pytest.raises(ConfigError, match="split"):
        dispatch(["distill", f"{{task: gsm8k, split: {split}}}", "--teacher", teacher.url, "--out", "out.jsonl"])


def test_all_lines_that_are_no_questions_are_named(ask: Callable[..., int], teacher: Teacher) -> None:
    lines = [
        {"question": ""},
        {"messages": []},
        {"messages": [{"role": "assistant", "content": "x"}]},
        7,
        {"prompt": "ok"},
    ]
    with pytest.raises(DataError) as caught:
        ask(questions=lines, suffix="jsonl")
    told = str(caught.value)
    assert [f"line {number}:" in told for number in (1, 2, 3, 4, 5)] == [True, True, True, True, False]
    assert not teacher.bodies


def test_no_answer_that_may_be_kept_leaves_no_file_and_says_why(
    ask: Callable[..., int], teacher: Teacher, place: Path
) -> None:
    teacher.script = lambda question, tries: Reply("", finish="length")
    with pytest.raises(DataError, match=r"no answer is left.*: 6 empty"):
        ask()
    assert not (place / "out.jsonl").exists()


def test_a_dry_run_counts_and_asks_nothing(
    ask: Callable[..., int], teacher: Teacher, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask("--dry-run", "--price", "1,1", "--max-tokens", "10") == 0
    assert not teacher.bodies
    assert "6 questions, 6 answers, 0 of them known, 6 to ask: at most" in capsys.readouterr().out


def test_lines_of_the_cache_that_are_cut_or_damaged_are_asked_again(
    ask: Callable[..., int], teacher: Teacher, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask("--concurrency", "1")
    (kept,) = (place / "cache" / "distill").iterdir()
    lines = kept.read_bytes().split(b"\n")
    lines[2] = lines[2].replace(b'"answer"', b'"anxwer"')
    kept.write_bytes(b"\n".join([*lines[:2], b"\x00\xff", *lines[2:6], lines[6][: len(lines[6]) // 2]]))
    before = (place / "out.jsonl").read_bytes()
    assert ask("--concurrency", "1") == 0
    assert teacher.asked()[6:] == ["question 1", "question 5"]
    assert (place / "out.jsonl").read_bytes() == before
    assert "damaged" in capsys.readouterr().out
    assert ask() == 0
    assert len(teacher.bodies) == 8


def start(teacher: Teacher, place: Path, *options: str, **environ: str) -> subprocess.Popen[str]:
    (place / "many.txt").write_text("\n".join(f"question {number}" for number in range(40)) + "\n")
    return subprocess.Popen(
        [sys.executable, "-m", "mlxchat", "distill", "many.txt", "--teacher", teacher.url, "--model", "m",
         "--out", "out.jsonl", "--concurrency", "4", *options],
        cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environ},
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_command_that_was_ended_goes_on_and_writes_what_it_would_have_written(
    number: signal.Signals, teacher: Teacher, place: Path
) -> None:
    teacher.script = lambda question, tries: Reply(f"to {question}", seconds=0.03)
    process = start(teacher, place)
    while len(teacher.bodies) < 12:
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(number)
    _, told = process.communicate(timeout=20)
    cut = len(teacher.bodies)
    assert cut < 40
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert f"{40 - cut} answers are missing" in told
        assert len(answers(place)) == cut, "what was under way was waited for"
    else:
        assert not (place / "out.jsonl").exists()
    again = start(teacher, place)
    assert again.wait(20) == 0
    again.communicate()
    assert answers(place) == [f"to question {number}" for number in range(40)]
    # Only what was under way at the kill is asked twice.
    assert len(teacher.bodies) <= 40 + (4 if number == signal.SIGKILL else 0)


def test_no_answer_that_was_kept_before_a_crash_is_asked_again(teacher: Teacher, place: Path) -> None:
    teacher.script = lambda question, tries: Reply(f"to {question}")
    point = "distill.answered"
    crashed = start(teacher, place, "--concurrency", "1", MLXCHAT_CRASH_AT=f"{point}:7")
    crashed.communicate(timeout=20)
    assert crashed.returncode == -signal.SIGKILL
    again = start(teacher, place, "--concurrency", "1")
    again.communicate(timeout=20)
    assert again.returncode == 0
    # One at a time: the crash found nothing under way.
    assert len(teacher.bodies) == 40
    assert answers(place) == [f"to question {number}" for number in range(40)]
