"""`mlxchat distill` against scripted teachers: requests, cache, limits of cost and rate, failures."""

import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kit.hubs import Handler, Loopback
from mlxchat.cli import dispatch
from mlxchat.distill import teacher as client
from mlxchat.errors import ConfigError, Interrupted, MlxchatError
from mlxchat.tasks import load_task
from mlxchat.tasks.base import answer_text
from mlxchat.tasks.jsonl import Jsonl

Ask = Callable[..., int]
QUESTIONS = [f"question {number}" for number in range(6)]


@dataclass
class Reply:
    """What a teacher does to one request."""

    text: str | None = "yes"
    status: int = 200
    raw: bytes | None = None
    seconds: float = 0.0
    usage: dict[str, int] | None = field(default_factory=lambda: {"prompt_tokens": 10, "completion_tokens": 5})


class Teacher(Loopback):
    """A scripted endpoint: `script(question, tries)` says what happens; what was asked is kept."""

    def __init__(self) -> None:
        super().__init__(_Endpoint)
        self.url += "/v1"
        self.script: Callable[[str, int], Reply] = lambda question, tries: Reply(f"answer to {question}")
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: set[str] = set()
        self.at_once, self.most_at_once = 0, 0
        self.lock = threading.Lock()

    def asked(self) -> list[str]:
        return [body["messages"][-1]["content"] for body in self.bodies]


class _Endpoint(Handler):
    server: Teacher

    def do_GET(self) -> None:
        self.say({"data": [{"id": "only"}]})

    def do_POST(self) -> None:
        teacher, body = self.server, json.loads(self.body())
        question = body["messages"][-1]["content"]
        with teacher.lock:
            teacher.bodies.append(body)
            teacher.paths.add(self.path)
            teacher.headers.append(dict(self.headers))
            teacher.at_once += 1
            teacher.most_at_once = max(teacher.most_at_once, teacher.at_once)
            tries = teacher.asked().count(question)
        try:
            reply = teacher.script(question, tries)
            time.sleep(reply.seconds)
        finally:
            with teacher.lock:
                teacher.at_once -= 1
        choice = {"message": {"role": "assistant", "content": reply.text}, "finish_reason": "stop"}
        told = {"model": "teacher-2026", "choices": [choice], "usage": reply.usage}
        self.say(told if reply.raw is None else reply.raw, reply.status)


@pytest.fixture
def teacher() -> Iterator[Teacher]:
    with Teacher() as teacher:
        yield teacher


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, empty, with its own cache and one retry."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLXCHAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLXCHAT_TEACHER_API_KEY", raising=False)
    monkeypatch.setattr(client, "RETRIES", 1)
    return tmp_path


@pytest.fixture
def ask(teacher: Teacher, place: Path) -> Ask:
    """Run `mlxchat distill` on a file of six questions."""

    def run(*options: str) -> int:
        (place / "ask.txt").write_text("\n".join(QUESTIONS) + "\n")
        always = ["ask.txt", "--teacher", teacher.url, "--model", "m", "--out", "out.jsonl"]
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


def chat(*contents: str) -> list[Any]:
    """Return messages of alternating roles, the user's first."""
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)]


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
    assert sorted(str(task[index]["messages"]) for index in range(6)) == sorted(map(str, expected))
    assert ask("--conversations", "--body", "response_format=null") == 0
    assert "response_format" not in teacher.bodies[-1]


def test_same_command_sends_nothing_and_writes_equal_bytes(ask, teacher, place):
    ask()
    before = (place / "out.jsonl").read_bytes()
    (place / "out.jsonl").unlink()
    assert ask() == 0
    assert len(teacher.bodies) == len(QUESTIONS)
    assert (place / "out.jsonl").read_bytes() == before
    ask("--temperature", "0.5", "--out", "other.jsonl")
    assert len(teacher.bodies) == 2 * len(QUESTIONS), "the cache depends on the sampling, not on the output"
    record = provenance(place)
    assert (record["counts"]["asked"], record["counts"]["cached"], record["complete"]) == (0, 6, True)
    assert record["sha256"] == hashlib.sha256(before).hexdigest()


def test_refusal_of_all_requests_ends_the_run(ask, teacher, place):
    teacher.script = lambda question, tries: Reply(status=401)
    with pytest.raises(MlxchatError, match=r"refuses: .*401"):
        ask("--concurrency", "1")
    assert len(teacher.bodies) == 1
    assert not (place / "out.jsonl").exists()


def test_key_is_in_no_file_and_no_message(ask, teacher, place, monkeypatch, capsys):
    echo = Reply(status=422, raw=b'{"error": {"message": "key sk-verysecret may not ask this"}}')
    monkeypatch.setenv("MLXCHAT_TEACHER_API_KEY", "sk-verysecret")
    teacher.script = lambda question, tries: echo if question == "question 1" else Reply("fine")
    assert ask("--teacher", f"{teacher.url}?code=verysecret") == 1
    assert {headers["authorization"] for headers in teacher.headers} == {"Bearer sk-verysecret"}
    assert teacher.paths == {"/v1/chat/completions?code=verysecret"}
    printed = capsys.readouterr()
    files = b"".join(path.read_bytes() for path in place.rglob("*") if path.is_file())
    assert b"verysecret" not in files + (printed.out + printed.err).encode()
    assert "key <key> may not ask this" in printed.out


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
    task = load_task("arithmetic", "train")
    right = {task[index]["messages"][0]["content"]: answer_text(task[index]) for index in range(8)}
    number = iter(range(100))
    teacher.script = lambda question, tries: Reply(right[question] if next(number) % 2 else "#### no")
    always = ["arithmetic", "--limit", "8", "--teacher", teacher.url, "--out", "out.jsonl"]
    assert dispatch(["distill", *always, "--only-correct", "--concurrency", "1"]) == 0
    assert teacher.asked() == list(right)
    assert answers(place) == list(right.values())[1::2]
    assert provenance(place)["teacher"]["model"] == "only", "the endpoint's only model"
    assert provenance(place)["questions"]["task"]["task"] == "arithmetic"


LIMITED = ("--price", "1,2", "--max-tokens", "100", "--body", "temperature=null")


def test_cost_stays_within_the_limit(ask, teacher, place, capsys):
    # An answer costs 10 × 1 + 100 × 2 = 210 of a million, at most (64 + 10 + 16 + 19) × 1 + 100 × 2 = 309.
    teacher.script = lambda question, tries: Reply(usage={"prompt_tokens": 10, "completion_tokens": 100}, seconds=0.02)
    assert ask(*LIMITED, "--concurrency", "6", "--max-cost", "0.0008") == 0
    assert len(teacher.bodies) == 3
    assert provenance(place)["complete"] is False
    assert provenance(place)["cost"] == pytest.approx(3 * 210e-6)
    assert "stopped at --max-cost 0.0008: 0.0006 is spent" in capsys.readouterr().out
    assert ask(*LIMITED, "--dry-run") == 0
    assert "6 answers: 3 cached, 3 to request, at most 327 + 300 tokens, cost 0.0009" in capsys.readouterr().out
    assert ask(*LIMITED, "--max-cost", "1") == 0
    assert len(teacher.bodies) == 6


@pytest.mark.parametrize("split", ["test", "trian"])
def test_a_held_out_split_is_never_distilled(split, teacher, place):
    with pytest.raises(ConfigError, match="split"):
        dispatch(["distill", f"{{task: gsm8k, split: {split}}}", "--teacher", teacher.url, "--out", "out.jsonl"])


def test_interrupted_run_awaits_requests_in_flight_and_resumes(ask, teacher, place):
    def script(question: str, tries: int) -> Reply:
        if len(teacher.bodies) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return Reply(f"to {question}", seconds=0.1)

    teacher.script = script
    with pytest.raises(Interrupted, match="answers are missing"):
        ask("--concurrency", "2")
    sent = len(teacher.bodies)
    assert sent < 6
    assert len(answers(place)) == sent, "what was sent is stored"
    assert ask() == 0
    assert answers(place) == [f"to {question}" for question in QUESTIONS]
    assert len(teacher.bodies) == 6
