"""`mlxchat distill` against scripted teachers: requests, cache, limits of cost and rate, hostile answers."""

import gzip
import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kit.commands import MLXCHAT
from kit.servers import Reply, Teacher
from mlxchat.cli import dispatch
from mlxchat.data.bpe import train_tokenizer
from mlxchat.data.conversation import render_conversation
from mlxchat.distill import collect
from mlxchat.distill.cost import Budget, Prices
from mlxchat.errors import ConfigError, DataError, MlxchatError, PassingError
from mlxchat.tasks.jsonl import Jsonl

Ask = Callable[..., int]
QUESTIONS = [f"question {number}" for number in range(6)]


@pytest.fixture
def ask(teacher: Teacher, place: Path) -> Ask:
    """Run `mlxchat distill` on a file of questions, six by default."""

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


def test_task_jsonl_reads_the_output_in_the_order_of_the_questions(ask, teacher, place):
    teacher.script = lambda question, tries: Reply(f"to {question}", seconds=0.06 - 0.01 * int(question[-1]))
    assert ask("--concurrency", "6", "--system", "Be brief") == 0
    assert [[message["content"] for message in line["messages"]] for line in written(place)] == [
        [question, f"to {question}"] for question in QUESTIONS
    ], "without the system prompt"
    assert teacher.most_at_once > 1
    task = Jsonl("train", path=place / "out.jsonl")
    assert sorted(task[index]["messages"][-1]["content"] for index in range(len(task))) == answers(place)


def chat(*contents: Any, first: int = 0) -> list[Any]:
    """Return messages of alternating roles, the user's first unless `first` is 1."""
    roles = ("user", "assistant")
    return [{"role": roles[(place + first) % 2], "content": text} for place, text in enumerate(contents)]


def test_conversations_become_training_rows_of_all_their_turns(ask, teacher, place, capsys):
    replies = [chat(f"hi {number}", "hello ", "who\x00 are you?\ud800", f"I am m{number}.") for number in range(6)]
    teacher.script = lambda question, tries: Reply(
        "<think>hm</think>" + json.dumps({"messages": replies[int(question[-1])]}),
        seconds=0.05 - 0.01 * int(question[-1]),
    )
    assert ask("--conversations", "--system", "Write conversations.", "--temperature", "1") == 0
    expected = [chat(f"hi {number}", "hello", "who are you?", f"I am m{number}.") for number in range(6)]
    assert [line["messages"] for line in written(place)] == expected
    body = teacher.bodies[0]
    schema = body["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["messages"]["items"]["properties"]["role"]["enum"] == ["user", "assistant"]
    assert [message["role"] for message in body["messages"]] == ["system", "user"]

    task = Jsonl("train", path=place / "out.jsonl")
    conversation = next(task[index] for index in range(6) if task[index]["messages"] == expected[3])
    tokenizer = train_tokenizer(["the cat sat on the mat " * 9], 270)
    ids, mask = render_conversation(tokenizer, conversation)
    trained = tokenizer.decode([id_ for id_, is_trained in zip(ids, mask, strict=True) if is_trained])
    assert trained == "hello<|assistant_end|>I am m3.<|assistant_end|>"

    before = (place / "out.jsonl").read_bytes()
    assert ask("--conversations", "--system", "Write conversations.", "--temperature", "1") == 0
    assert len(teacher.bodies) == 6, "no conversation is paid for twice"
    assert (place / "out.jsonl").read_bytes() == before
    assert ask("--conversations", "--body", "response_format=null") == 0
    assert "response_format" not in teacher.bodies[-1]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("Sure! Here it is", "not JSON"), ("[" * 100_000, "nested too deeply"), ("7", "no messages"),
        (json.dumps(chat()), "0 messages"),
        (json.dumps(chat("a", "b", "c")), "the last message is not from the assistant"),
        (json.dumps(chat("a", "b", first=1)), 'message 1 is from "assistant", expected "user"'),
        (json.dumps(chat("a", " ")), "content of the assistant message is empty"),
        (json.dumps(chat("a", [{"type": "text", "text": "b"}])), "content of an assistant message is not text"),
        (json.dumps([{"role": "\x1b[31m", "content": "a"}, *chat("b", first=1)]), 'message 1 is from "[31m"'),
        (json.dumps([{"role": "user"}]), "a message lacks role or content"),
    ],
)  # fmt: skip
def test_invalid_conversation_is_left_out_with_its_reason(text, fault, ask, teacher, place, capsys):
    teacher.script = lambda question, tries: Reply(
        text if question == "question 2" else json.dumps(chat(question, "b"))
    )
    assert ask("--conversations") == 0
    assert [line["messages"][0]["content"] for line in written(place)] == [q for q in QUESTIONS if q != "question 2"]
    printed = capsys.readouterr().out
    assert "5 conversations of 6 questions (1 invalid)" in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("  invalid")]
    assert line.startswith("  invalid  ask.txt question 3: ")
    assert fault in line
    assert line.isprintable()
    assert provenance(place)["counts"]["invalid"] == 1


def test_no_valid_conversation_is_an_error(ask, teacher):
    teacher.script = lambda question, tries: Reply("no")
    with pytest.raises(DataError, match=r"(?s)no usable answer.*: 1 invalid.*not JSON"):
        ask("--conversations", questions=["hi"])
    with pytest.raises(ConfigError, match="--only-correct: conversations"):
        ask("--conversations", "--only-correct")


def test_same_command_sends_nothing_and_writes_equal_bytes(ask, teacher, place):
    ask()
    before = (place / "out.jsonl").read_bytes()
    assert ask() == 0
    assert len(teacher.bodies) == len(QUESTIONS)
    assert (place / "out.jsonl").read_bytes() == before
    ask("--temperature", "0.5", "--out", "other.jsonl")
    assert len(teacher.bodies) == 2 * len(QUESTIONS), "the cache depends on the sampling"
    ask("--temperature", "0.5", "--out", "another.jsonl")
    assert len(teacher.bodies) == 2 * len(QUESTIONS), "and not on the output"
    record = provenance(place)
    assert (record["counts"]["asked"], record["counts"]["known"], record["complete"]) == (0, 6, True)
    assert record["sha256"] == hashlib.sha256(before).hexdigest()


def test_answers_of_a_replaced_model_are_not_reused(ask, teacher, place, capsys):
    """Guards against a cache keyed by the model's name alone."""
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
    assert len(teacher.bodies) == 12, "answers of both models are cached"
    assert "does not say" not in capsys.readouterr().err


def test_model_replaced_during_the_run_ends_it(ask, teacher, place):
    def script(question: str, tries: int) -> Reply:
        teacher.fingerprint = "a" if len(teacher.bodies) < 4 else "b"
        return Reply(f"{teacher.fingerprint} {question}")

    teacher.fingerprint, teacher.script = "a", script
    with pytest.raises(MlxchatError, match='the model behind "m" was replaced'):
        ask("--concurrency", "1")
    assert answers(place) == [f"a {question}" for question in QUESTIONS[:3]]
    ask("--concurrency", "1")
    assert answers(place) == [f"b {question}" for question in QUESTIONS]


def test_cached_answers_need_no_teacher(ask, teacher, place, capsys):
    teacher.fingerprint = "a" * 16
    ask()
    before = (place / "out.jsonl").read_bytes()
    (place / "out.jsonl").unlink()
    teacher.stop()
    assert ask() == 0
    assert (place / "out.jsonl").read_bytes() == before
    assert "does not answer" in capsys.readouterr().err


def test_refresh_replaces_cached_answers(ask, teacher, place, capsys):
    teacher.script = lambda question, tries: Reply(f"{tries} {question}")
    ask()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note")]
    assert "no fingerprint of the weights of 'm'" in line
    assert "--refresh" in line
    assert ask("--refresh", "--dry-run") == 0
    assert "0 of them cached, 6 to request" in capsys.readouterr().out
    teacher.script = lambda question, tries: Reply(status=401)
    with pytest.raises(MlxchatError, match="refuses"):
        ask("--refresh")
    teacher.script = lambda question, tries: Reply("new") if question < "question 3" else Reply(status=503)
    asked = len(teacher.bodies)
    ask()
    assert answers(place) == [f"1 {question}" for question in QUESTIONS], "without a new answer the old ones stay"
    assert len(teacher.bodies) == asked
    with pytest.raises(PassingError):
        ask("--refresh", "--concurrency", "1")
    assert answers(place) == ["new"] * 3, "old and new answers are not mixed"
    teacher.script = lambda question, tries: Reply("new")
    asked = len(teacher.bodies)
    ask()
    assert answers(place) == ["new"] * 6
    assert len(teacher.bodies) == asked + 3


FAULTS = [
    Reply(status=429, headers={"Retry-After": "0.05"}), Reply(status=500), Reply(status=503, raw=b"<html>busy</html>"),
    Reply(drop=True), Reply(raw=b'{"choices": [{"mess'), Reply(raw=b"{}"), Reply(raw=b'{"choices": []}'),
    Reply(raw=b"[" * 100_000), Reply(raw=b'{"error": {"message": "overloaded", "code": 502}}'),
    # Dates that raise OverflowError.
    Reply(status=429, headers={"Retry-After": "Mon, 01 Jan 99999999999999999999"}),
    Reply(status=429, headers={"Retry-After": "Mon, 01 Jan 2001 00:00:00 +99999999999999"}),
]  # fmt: skip


def test_transient_faults_are_retried(ask, teacher, place):
    teacher.script = lambda question, tries: FAULTS[int(question)] if tries == 1 else Reply("fine")
    assert ask(questions=[f"{number}" for number in range(len(FAULTS))]) == 0
    assert answers(place) == ["fine"] * len(FAULTS)
    assert len(teacher.asked()) == 2 * len(FAULTS)
    teacher.script = lambda question, tries: Reply("fine", seconds=float(tries == 1))
    assert ask("--timeout", "0.4", questions=["silence"]) == 0
    assert answers(place) == ["fine"]


def test_retry_after_pauses_all_requests(ask, teacher):
    teacher.script = lambda question, tries: (
        Reply(status=429, headers={"Retry-After": "0.5"}) if len(teacher.bodies) == 1 else Reply("fine")
    )
    assert ask("--concurrency", "1") == 0
    assert teacher.times[1] - teacher.times[0] >= 0.45


def test_overloaded_teacher_answers_all_eventually(ask, teacher, place):
    def script(question: str, tries: int) -> Reply:
        if teacher.at_once > 1:
            return Reply(status=429, headers={"Retry-After": "0.01"})
        return Reply("fine", seconds=0.03)

    teacher.script = script
    assert ask("--concurrency", "8", questions=[f"q{number}" for number in range(12)]) == 0
    assert len(answers(place)) == 12


@pytest.mark.parametrize(
    ("reply", "count"),
    [
        (Reply(status=401), 1),
        (Reply(status=307, headers={"Location": "http://127.0.0.1:1/"}), 1),
        (Reply(status=429, raw=b'{"error": {"message": "no", "code": "insufficient_quota"}}'), 1),
        (Reply(status=400), 5),  # may be a fault of one question
    ],
    ids=["401", "redirect", "quota", "400"],
)  # fmt: skip
def test_refusal_of_all_requests_ends_the_run(reply, count, ask, teacher, place):
    teacher.script = lambda question, tries: reply
    with pytest.raises(MlxchatError, match=f"refuses: .*{reply.status}"):
        ask("--concurrency", "1", questions=[f"q{number}" for number in range(50)])
    assert len(teacher.bodies) == count
    assert not (place / "out.jsonl").exists()


def test_refused_question_is_not_retried(ask, teacher, place, capsys):
    refusal = Reply(status=400, raw=b'{"error": {"message": "context_length_exceeded"}}')
    teacher.script = lambda question, tries: refusal if question == "question 3" else Reply("fine")
    assert ask() == 1
    assert len(answers(place)) == 5
    assert teacher.asked().count("question 3") == 1
    assert "ask.txt question 4: 400 context_length_exceeded" in capsys.readouterr().out
    assert provenance(place)["counts"] | {"kept": 5, "missing": 1, "failed": 1} == provenance(place)["counts"]


def test_unreachable_teacher_ends_the_run_after_writing(ask, teacher, place, monkeypatch):
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


@pytest.mark.parametrize("place_of_key", ["environment", "query"])
def test_key_is_in_no_file_and_no_message(place_of_key, ask, teacher, place, monkeypatch, capsys):
    echo = Reply(status=422, raw=b'{"error": {"message": "key sk-verysecret may not ask this"}}')
    if place_of_key == "environment":
        monkeypatch.setenv("MLXCHAT_TEACHER_API_KEY", "sk-verysecret")
        teacher.script = lambda question, tries: echo if question == "question 1" else Reply("fine")
        assert ask() == 1
        assert {headers["Authorization"] for headers in teacher.headers} == {"Bearer sk-verysecret"}
    else:
        assert ask("--teacher", f"{teacher.url}?api-version=1&code=verysecret") == 0
        assert teacher.paths == {"/v1/chat/completions?api-version=1&code=verysecret"}
    printed = capsys.readouterr()
    files = b"".join(path.read_bytes() for path in place.rglob("*") if path.is_file())
    assert b"verysecret" not in files + (printed.out + printed.err).encode()
    assert place_of_key == "query" or "key <key> may not ask this" in printed.out


def test_no_header_comes_from_the_environment(ask, teacher, monkeypatch):
    """The openai client sends these variables and a description of the machine to any endpoint."""
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, "verysecret")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Mine: verysecret")
    ask(questions=["hi"])
    (headers,) = teacher.headers
    assert {name.lower() for name in headers} == {
        "host", "accept", "accept-encoding", "connection", "content-length", "content-type", "user-agent"
    }  # fmt: skip
    assert "verysecret" not in str(headers)


def test_hostile_answers_are_cleaned(ask, teacher, place, capsys):
    teacher.script = lambda question, tries: Reply(
        "<|assistant_end|><|bos|>hi\x00\x1b[31mred\x9b\x07 \u2028line\u2029 half \ud800 end\r\nnext\x85"
        "<|python_start|>1+1"
    )
    assert ask() == 0
    raw = (place / "out.jsonl").read_bytes().decode()
    assert len(raw.splitlines()) == 6, "no Unicode line separator is left"
    assert not set(raw) & set(map(chr, [*range(10), *range(11, 32), *range(127, 160)]))
    (content,) = set(answers(place))
    assert content == "<|assistant_end|><|bos|>hi[31mred \u2028line\u2029 half  end\nnext<|python_start|>1+1"
    tokenizer = train_tokenizer(["the cat sat on the mat " * 9], 270)
    ids, _ = render_conversation(tokenizer, written(place)[0])
    specials = [id_ for id_ in ids if id_ in tokenizer.special_ids.values()]
    order = ("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>")
    assert specials == [tokenizer.special_ids[name] for name in order]
    assert content in tokenizer.decode(ids)
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err


def test_hostile_error_message_is_one_printable_line(ask, teacher):
    body = json.dumps({"error": {"message": "\x1b]0;gone\x07 line\nline \u202e " + "x" * 9999}}).encode()
    teacher.script = lambda question, tries: Reply(status=403, raw=body)
    with pytest.raises(MlxchatError) as caught:
        ask()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_answer_over_8_mb_is_refused(ask, teacher, place):
    teacher.script = lambda question, tries: Reply("x" * (9 << 20)) if question == "question 0" else Reply("fine")
    assert ask() == 1
    assert len(answers(place)) == 5
    assert teacher.asked().count("question 0") == 1


def test_empty_truncated_and_duplicate_answers_are_dropped(ask, teacher, place, capsys):
    script = {"question 0": Reply(""), "question 1": Reply(None), "question 2": Reply("cut of", finish="length")}
    teacher.script = lambda question, tries: script.get(question, Reply("same"))
    assert ask("--samples", "2") == 0
    assert answers(place) == ["same"] * 3
    assert "3 conversations of 6 questions (2 truncated, 4 empty, 3 duplicate)" in capsys.readouterr().out
    assert ask("--samples", "2", "--keep-cut") == 0
    assert answers(place) == ["cut of", "same", "same", "same"]
    assert len(teacher.bodies) == 12, "--keep-cut does not change requests"


def test_calculator_calls_of_our_teacher_are_kept(ask, teacher, place):
    parts = [{"type": "text", "text": "1+1="}, {"type": "python", "text": "1+1"},
             {"type": "python_output", "text": "2"}, {"type": "text", "text": "2"}]  # fmt: skip
    message = {"role": "assistant", "content": "1+1=2", "parts": parts}
    teacher.script = lambda question, tries: Reply(extra={"choices": [{"message": message, "finish_reason": "stop"}]})
    ask()
    assert answers(place) == [parts] * 6


def test_samples_get_consecutive_seeds(ask, teacher, place):
    teacher.script = lambda question, tries: Reply(f"{question} seed {teacher.bodies[-1]['seed']}")
    ask("--samples", "3", "--body", "seed=7", "--temperature", "1", "--concurrency", "1")
    assert answers(place)[:4] == ["question 0 seed 7", "question 0 seed 8", "question 0 seed 9", "question 1 seed 7"]


def test_requests_contain_only_the_given_fields(ask, teacher):
    ask(
        "--system", "Be brief", "--max-tokens", "7", "--body", "top_k=20", "--body", "max_tokens=null", questions=["hi"]
    )
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "hi"}]
    assert teacher.bodies == [{"model": "m", "messages": messages, "top_k": 20}]


@pytest.mark.parametrize(
    ("item", "kept"),
    [("mine.jsonl", ["Four"]), ("{task: jsonl, path: mine.jsonl, options: {contains: 1}}",
                               ["Four", "It is four."])],
    ids=["file: the whole text", "mixture item: its own rule"],
)  # fmt: skip
def test_only_correct_judges_by_the_source(item, kept, teacher, place):
    """Guards against the answer "four" accepted within "fourteen"."""
    lines = [{"question": f"{number}?", "answer": "four"} for number in range(3)]
    (place / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    replies = {"0?": "Four", "1?": "It is four.", "2?": "fourteen"}
    teacher.script = lambda question, tries: Reply(replies[question])
    assert dispatch(["distill", item, "--teacher", teacher.url, "--out", "out.jsonl", "--only-correct"]) == 0
    assert sorted(answers(place)) == kept


def test_task_supplies_questions_and_scores_answers(teacher, place, capsys):
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


def test_cost_stays_within_the_limit(ask, teacher, place, capsys):
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
    """Return the bill of a provider that counts 10 + 100 tokens for every request, answered or not."""
    return 210e-6 * len(teacher.bodies)


@pytest.mark.parametrize(
    "fault",
    [Reply(drop=True), Reply(seconds=1.0), Reply(status=500), Reply(raw=b'{"choices": [{"mess'),
     Reply(raw=b'{"error": {"message": "overloaded", "code": 429}}'), Reply(status=400),
     Reply("", usage={"prompt_tokens": 10, "completion_tokens": 0})],
    ids=["cut", "silence", "500", "half JSON", "error in a 200", "400", "no text"],
)  # fmt: skip
def test_unanswered_requests_count_at_their_maximum(fault, ask, teacher):
    """Guards against endless payments to a provider that bills and then fails."""
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
    ("usage", "count"),
    # A request costs at most 290 of 800 millionths; the last answer, whose total includes reasoning tokens, costs 610.
    [((0, 0, 0), 2), ((10, 10**400, 0), 2), ((-1, 100, 0), 2), ((10, 5, 310), 1)],
    ids=["no tokens", "400 digits", "negative", "reasoning"],
)
def test_wrong_token_counts_do_not_weaken_the_cost_limit(usage, count, ask, teacher):
    counts = dict(zip(("prompt_tokens", "completion_tokens", "total_tokens"), usage, strict=True))
    teacher.script = lambda question, tries: Reply("yes", usage=counts)
    assert ask(*LIMITED) == 0
    assert len(teacher.bodies) == count


def test_compressed_answer_is_not_decompressed(ask, teacher):
    """2 KB compressed three times kept the client busy for 4 s, without a timeout."""
    body = gzip.compress(b'{"choices": [{"message": {"content": "yes"}}]}')
    teacher.script = lambda question, tries: Reply(raw=body, headers={"Content-Encoding": "gzip"})
    with pytest.raises(PassingError, match="its answer is not JSON"):
        ask()


def test_refused_and_unsent_requests_cost_nothing(ask, teacher, place):
    teacher.script = lambda question, tries: Reply(status=429) if tries < 5 else Reply("fine")
    with pytest.raises(PassingError, match="does not answer"):
        ask(*LIMITED, "--teacher", "http://127.0.0.1:9/v1")
    assert ask(*LIMITED, questions=QUESTIONS[:3]) == 0
    assert len(answers(place)) == 3


def test_fields_beside_the_messages_count_as_input(ask, teacher):
    """Tools and schemas are billed as part of the prompt."""
    tools = json.dumps([{"description": "x" * 400}])
    with pytest.raises(DataError, match="stopped at --max-cost"):
        ask(*LIMITED[:-1], "0.0006", "--body", f"tools={tools}")
    assert not teacher.bodies


@pytest.mark.parametrize(
    ("questions", "limit", "tokens"),
    [([f"\ufdfa{number}" * 50 for number in range(6)], 0.006, 50 * 19), (QUESTIONS, 0.0016, 400)],
    ids=["NFKC makes 18 characters of this one, which has 3 bytes", "a long default system prompt"],
)
def test_prompts_longer_than_their_text_stay_within_the_cost_limit(questions, limit, tokens, ask, teacher):
    usage = {"prompt_tokens": tokens, "completion_tokens": 100}
    teacher.script = lambda question, tries: Reply(usage=usage, seconds=0.05)
    assert ask(*LIMITED, "--max-cost", str(limit), "--concurrency", "6", questions=questions) == 0
    assert 0 < len(teacher.bodies) * (tokens + 200) * 1e-6 <= limit


def test_ledger_is_locked(tmp_path):
    first = Budget(1.0, Prices(1, 1), tmp_path / "out.costs.log")
    with pytest.raises(MlxchatError, match="another mlxchat distill"):
        Budget(1.0, Prices(1, 1), tmp_path / "out.costs.log")
    first.close()
    Budget(1.0, Prices(1, 1), tmp_path / "out.costs.log").close()


def test_ledger_keeps_reservations_and_raises_the_bound(tmp_path):
    place = tmp_path / "out.costs.log"
    budget = Budget(10.01, Prices(0.1e6, 0.3e6), place)
    first, second, _ = (budget.reserve((1, number)) for number in (1, 2, 3))
    budget.settle(first, (1, 1), (1, 2))  # one output token above its bound
    budget.settle_unanswered(second, free=False)
    assert budget.spent == pytest.approx(0.7 + 0.7)
    assert budget.fits((1, 24))
    assert not budget.fits((1, 25)), "the bound of all requests is one token higher"
    budget.close()
    with place.open("ab") as file:
        file.write(b'{"id": "x", "mo')  # truncated by a kill: never sent
    again = Budget(10.0, Prices(0.1e6, 0.3e6), place)
    assert again.spent == pytest.approx(0.7 + 0.7 + 1.0)
    again.settle_unanswered(again.reserve((1, 1)), free=True)
    assert not again.has_waiting()
    again.close()
    last = Budget(10.0, Prices(0.1e6, 0.3e6), place)
    last.close()
    assert last.spent == pytest.approx(2.4)


def test_max_cost_requires_bounded_single_answers(ask, teacher):
    options = ["--price", "1,1", "--max-cost", "1", "--body", "max_tokens=null"]
    with_two = ["--body", "max_tokens=-1", "--body", "max_completion_tokens=9"]
    for unbounded in (["--body", "max_tokens=-1"], ["--body", "max_completion_tokens=true"], with_two, []):
        with pytest.raises(ConfigError, match="needs a limit of answer tokens"):
            ask(*options, *unbounded)
    for field in ("n", "best_of"):
        with pytest.raises(ConfigError, match=f"--body {field} cannot be set"):
            ask(*options, "--body", f"{field}=5")
    ask(*options, "--body", "max_completion_tokens=9", questions=["hi"])
    assert teacher.bodies[-1].keys() == {"model", "messages", "max_completion_tokens"}


def test_rate_limit_spaces_requests(ask, teacher):
    began = time.monotonic()
    ask("--rpm", "1200", "--concurrency", "6")
    assert teacher.times[-1] - began >= 5 * 60 / 1200 * 0.95


@pytest.mark.slow
def test_stop_does_not_wait_for_the_rate_limit(teacher, place):
    process = start(teacher, place, "--rpm", "0.1")
    wait_for(process, lambda: bool(teacher.bodies))
    time.sleep(0.3)  # the first answer arrives
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert answers(place) == ["answer to question 0"]


def test_printed_command_is_quoted_for_shell_and_hydra(ask, place, capsys):
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


def test_foreign_file_is_not_overwritten(ask, teacher, place):
    (place / "out.jsonl").write_text("my own work\n")
    with pytest.raises(ConfigError, match="was not written by mlxchat distill"):
        ask()
    assert (place / "out.jsonl").read_text() == "my own work\n"
    (place / "out.jsonl").unlink()
    assert ask() == 0
    with (place / "out.jsonl").open("a") as file:
        file.write('{"messages": []}\n')
    with pytest.raises(ConfigError, match="Move it away"):
        ask()


def test_all_wrong_options_are_reported_together(place, say):
    printed = say(
        "distill", "{task: gsm9k, size: 0}", "--teacher", "ftp://x", "--out", "none/out.txt", "--limit", "0",
        "--temperature", "3", "--max-cost", "1", "--body", "x=[", code=2,
    )  # fmt: skip
    for part in ("ftp://x", 'Did you mean "gsm8k"', ".jsonl", "--limit is 0", "--temperature is 3", "--price IN,OUT",
                 "--body x=["):  # fmt: skip
        assert part in printed


@pytest.mark.parametrize("split", ["test", "trian"])
def test_a_held_out_split_is_never_distilled(split, teacher, place):
    with pytest.raises(ConfigError, match="split"):
        dispatch(["distill", f"{{task: gsm8k, split: {split}}}", "--teacher", teacher.url, "--out", "out.jsonl"])


def test_all_invalid_lines_are_named(ask, teacher):
    lines = [{"question": ""}, {"messages": []}, {"messages": [{"role": "assistant", "content": "x"}]}, 7,
             {"prompt": "ok"}]  # fmt: skip
    with pytest.raises(DataError) as caught:
        ask(questions=lines, suffix="jsonl")
    assert [number for number in range(1, 6) if f"line {number}:" in str(caught.value)] == [1, 2, 3, 4]
    assert not teacher.bodies


def test_damaged_cache_lines_are_requested_again(ask, teacher, place, capsys):
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


def many(teacher: Teacher, *options: str) -> list[str]:
    """Return the command that asks 40 questions."""
    Path("many.txt").write_text("\n".join(f"question {number}" for number in range(40)) + "\n")
    return ["distill", "many.txt", "--teacher", teacher.url, "--model", "m", "--out", "out.jsonl", "--concurrency",
            "4", *options]  # fmt: skip


def start(teacher: Teacher, place: Path, *options: str, **environ: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*MLXCHAT, *many(teacher, *options)], cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **environ},
    )  # fmt: skip


def wait_for(process: subprocess.Popen[str], is_reached: Callable[[], bool]) -> None:
    while not is_reached():
        assert process.poll() is None
        time.sleep(0.01)


def test_interrupted_run_awaits_open_requests_and_resumes(teacher, place):
    teacher.script = lambda question, tries: Reply(f"to {question}", seconds=0.03)
    process = start(teacher, place)
    wait_for(process, lambda: len(teacher.bodies) >= 12)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=120)
    cut = len(teacher.bodies)
    assert cut < 40
    assert process.returncode == 130
    assert f"{40 - cut} answers are missing" in printed
    assert len(answers(place)) == cut
    assert dispatch(many(teacher)) == 0
    assert answers(place) == [f"to question {number}" for number in range(40)]
    assert len(teacher.bodies) == 40


def test_crash_loses_no_stored_answer(teacher, place):
    crashed = start(teacher, place, "--concurrency", "1", MLXCHAT_CRASH_AT="distill.answered:7")
    crashed.communicate(timeout=120)
    assert crashed.returncode == -signal.SIGKILL
    assert dispatch(many(teacher, "--concurrency", "1")) == 0
    assert len(teacher.bodies) == 40
    assert answers(place) == [f"answer to question {number}" for number in range(40)]
