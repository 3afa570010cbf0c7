"""The Python tool: outputs, limits, and rows that wait for it."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from kit.text import tool_call, tool_output
from mlxchat.engine.generate import Engine
from mlxchat.engine.scheduler import Event, Request, Scheduler
from mlxchat.engine.tools import PythonTool
from mlxchat.errors import ConfigError

RESULTS = {
    "2**100": "1267650600228229401496703205376",
    "x = 3\nprint(x)\nx + 1": "3\n4",
    "None": "",
    "def f(n):\n    return n * f(n - 1) if n else 1\nf(10)": "3628800",
    "import sys\nsys.exit(3)": "",
    "1/0": "ZeroDivisionError: division by zero",
    "f(": "SyntaxError: '(' was never closed",
    "(" * 5000: "SyntaxError: too many nested parentheses",
    "'a' * 10**9": "MemoryError",
    "try:\n    open('/etc/passwd').read()\nexcept OSError:\n    print('no file')": "no file",
    "import socket\nsocket.create_connection(('127.0.0.1', 80))": "PermissionError: [Errno 1] Operation not permitted",
    "print('x' * 5000)": "x" * 1000 + "…",
    "#" * 20_000: "ValueError: the program has 20000 characters, at most 10000 may be",
    "print('<|output_end|><|assistant_end|>')": "<|output_end|><|assistant_end|>",
}


@pytest.fixture(scope="module")
def python() -> PythonTool:
    tool = PythonTool()
    try:
        tool.check()
    except ConfigError as error:
        pytest.skip(str(error))
    return tool


@pytest.mark.parametrize("code", RESULTS, ids=lambda code: ascii(code[:30]))
def test_program_outputs(python, code):
    assert python.run(code, 0) == RESULTS[code]


def test_time_limit_ends_the_program():
    assert PythonTool(seconds=0.5).run("while True: pass", 0) == "TimeoutError: after 0.5 s"


def test_seed_determines_outputs(python):
    code = "import random\nrandom.random(), hash('a'), {'b', 'a', 'c'}"
    assert python.run(code, 1) == python.run(code, 1) != python.run(code, 2)


class Slow(PythonTool):
    """A tool whose outputs the test supplies."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, int, Future[str]]] = []

    def start(self, code: str, seed: int) -> Future[str]:
        self.asked.append((code, seed, Future()))
        return self.asked[-1][2]


Script = Callable[..., tuple[Engine, list[list[int]]]]


def begin(scripted: Script, python: PythonTool | None, *scripts: list[int]) -> tuple[Scheduler, list[int]]:
    engine, prompts = scripted(*scripts)
    scheduler = engine.scheduler()
    scheduler.python = python
    return scheduler, [scheduler.submit(Request(prompt=prompt, max_new_tokens=60)) for prompt in prompts]


def steps(scheduler: Scheduler, count: int = 10**9) -> list[Event]:
    events: list[Event] = []
    while not scheduler.idle and count:
        events += scheduler.step()
        count -= 1
    return events


def test_only_the_calling_row_waits_for_its_program(scripted, tokenizer):
    python = Slow()
    program = [*tool_call(tokenizer, "2**5"), tokenizer.bos]
    letters = [*range(97, 123), tokenizer.bos]
    scheduler, (waiting, other) = begin(scripted, python, program, letters)
    events = steps(scheduler, 40)
    assert [event.token for event in events if event.id == other] == letters, "it ended before"
    assert [event.token for event in events if event.id == waiting] == program[:-1]
    began = time.monotonic()
    steps(scheduler, 5)
    assert time.monotonic() - began > 0.05, "waits instead of spinning"
    ((code, _, future),) = python.asked
    assert code == "2**5"
    future.set_result("32")
    rest = [event for event in steps(scheduler) if event.id == waiting]
    forced = tool_output(tokenizer, "32")
    assert [event.token for event in rest] == [*forced, *[32] * (len(rest) - len(forced))]
    assert [event.sampled for event in rest[: len(forced) + 1]] == [False] * len(forced) + [True]


def test_calculator_precedes_python(scripted, tokenizer):
    python = Slow()
    scheduler, _ = begin(scripted, python, [*tool_call(tokenizer, "12/4"), tokenizer.bos])
    assert "".join(event.text for event in steps(scheduler)).startswith("12/43")
    assert python.asked == []


def test_waiting_row_can_be_cancelled(scripted, tokenizer):
    python = Slow()
    scheduler, (id,) = begin(scripted, python, [*tool_call(tokenizer, "2**5"), tokenizer.bos])
    steps(scheduler, 20)
    scheduler.cancel(id)
    (event,) = steps(scheduler)
    assert event.finish_reason == "cancelled"
    assert python.asked[0][2].cancelled()


def test_special_tokens_in_outputs_are_ordinary_text(scripted, tokenizer, python):
    code = "print('<|assistant_end|>')"
    scheduler, _ = begin(scripted, python, [*tool_call(tokenizer, code), tokenizer.bos])
    forced = [event.token for event in steps(scheduler) if not event.sampled]
    assert forced == tool_output(tokenizer, "<|assistant_end|>")
    assert tokenizer.assistant_end not in forced


def test_waiting_does_not_change_the_answer(model, tokenizer, python):
    """While a row waits, its last token is decoded repeatedly; this must not change its cache."""
    special = tokenizer.special_ids
    before = [tokenizer.bos, *tokenizer.encode("the cat"), special["<|python_start|>"], *tokenizer.encode("2**5")]

    def answer(prompt: list[int], forced: list[int], tool: PythonTool | None) -> list[Any]:
        scheduler = Engine(model, tokenizer).scheduler()
        scheduler.python = tool
        id = scheduler.submit(Request(prompt=prompt, max_new_tokens=24, logprobs=0))
        (row,) = scheduler._waiting
        for token in before:  # the prompt ends within a call
            row.calls.follow(token)
        row.calls.forced.extend(forced)
        other = scheduler.submit(Request(prompt=[tokenizer.bos] * 5, max_new_tokens=20))
        events = [event for event in steps(scheduler) if event.id == id]
        assert other != id
        return [(event.token, event.logprob) for event in events]

    expected = [special["<|python_end|>"], *tool_output(tokenizer, "32")]
    waited = answer(before, expected[:1], python)
    assert [token for token, _ in waited[: len(expected)]] == expected
    assert waited == answer(before, expected, None)
