"""The calculator, and the Python tool: outputs, limits, rows that wait for it."""

from concurrent.futures import Future
from typing import Any

import pytest

from kit.scripted import steps
from kit.text import tool_call, tool_output
from mlxchat.engine.batch import Request
from mlxchat.engine.generate import Engine, Scheduler
from mlxchat.engine.tools import PythonTool, calculate
from mlxchat.errors import ConfigError

RESULTS = {
    "x = 3\nprint(x)\nx ** 100": "3\n515377520732011331036461129765621272702107522001",
    "None": "",
    "import sys\nsys.exit(3)": "",
    "1/0": "ZeroDivisionError: division by zero",
    "f(": "SyntaxError: '(' was never closed",
    "'a' * 10**9": "MemoryError",
    "try:\n    open('/etc/passwd').read()\nexcept OSError:\n    print('no file')": "no file",
    "print('x' * 5000)": "x" * 1000 + "…",
    "#" * 20_000: "ValueError: the program has 20000 characters, at most 10000 may be",
}


def test_program_outputs():
    python = PythonTool()
    try:
        python.check()
    except ConfigError as error:
        pytest.skip(str(error))
    assert {code: python.run(code, 0) for code in RESULTS} == RESULTS
    code = "import random\nrandom.random(), hash('a'), {'b', 'a', 'c'}"
    assert python.run(code, 1) == python.run(code, 1) != python.run(code, 2)
    assert PythonTool(seconds=0.5).run("while True: pass", 0) == "TimeoutError: after 0.5 s"


class Slow(PythonTool):
    """A tool whose outputs the test supplies."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, Future[str]]] = []

    def start(self, code: str, seed: int) -> Future[str]:
        self.asked.append((code, Future()))
        return self.asked[-1][1]


def begin(scripted: Any, python: PythonTool, *scripts: list[int]) -> tuple[Scheduler, list[int]]:
    engine, prompts = scripted(*scripts)
    scheduler = engine.scheduler(python=python)
    return scheduler, [scheduler.submit(Request(prompt=prompt, max_new_tokens=60)) for prompt in prompts]


def test_only_the_calling_row_waits_for_its_program(scripted, tokenizer):
    python, sum_of_calculator = Slow(), [*tool_call(tokenizer, "12/4"), *[32] * len(tool_output(tokenizer, "3"))]
    program = tool_call(tokenizer, "2**5")
    letters = [*sum_of_calculator, *range(97, 123), tokenizer.bos]
    scheduler, (waiting, other) = begin(scripted, python, [*program, tokenizer.bos], letters)
    events = steps(scheduler, 60)
    assert "".join(event.text for event in events if event.id == other).startswith("12/43ab"), "the calculator first"
    assert [event.token for event in events if event.id == other][-27:] == letters[-27:], "it ended before"
    assert [event.token for event in events if event.id == waiting] == program
    ((code, future),) = python.asked
    assert code == "2**5"
    output = "<|assistant_end|> 32"  # in an output it is ordinary text
    future.set_result(output)
    rest, forced = steps(scheduler), tool_output(tokenizer, output)
    assert tokenizer.assistant_end not in forced
    assert [event.token for event in rest] == [*forced, *[32] * (len(rest) - len(forced))]
    assert [event.sampled for event in rest[: len(forced) + 1]] == [False] * len(forced) + [True]
    assert {event.kind for event in rest if event.text and not event.sampled} == {"python_output"}


def test_waiting_does_not_change_the_answer(model, tokenizer):
    """While a row waits, it takes part in the batch's steps; this must not change its cache."""

    def answer(seconds: int) -> list[Any]:
        scheduler = Engine(model, tokenizer).scheduler()
        id = scheduler.submit(Request(prompt=[tokenizer.bos] * 9, max_new_tokens=24, logprobs=0))
        scheduler.submit(Request(prompt=[tokenizer.bos] * 5, max_new_tokens=40, logprobs=0))
        events = steps(scheduler, 4)
        row = scheduler._rows[id]
        row.running = Future()
        events += steps(scheduler, seconds)
        row.given.extend([7, 8])
        row.running = None
        events += steps(scheduler)
        return [(event.token, event.logprob and round(event.logprob, 4)) for event in events if event.id == id]

    assert answer(10) == answer(0)


SUMS = {
    " 3 + 4 ": "7", "7-9": "-2", "10/2": "5", "7/2": "3.5", "0.2*50": "10", "-7//2": "-4", "17%5": "2", "3*(4+5)": "27",
    "--5": "5", "+7": "7", "1-1-1-1": "-2", "5.": "5", "1.10": "1.1", "1,234,567": "1234567", "5/3": "1.6666666667",
    "100000*100000": "10000000000", "-0.0": "0", "1.1*3-0.3": "3",  # 3.0000000000000004 in floating point
    "'strawberry'.count('r')": "3", '"Strawberry".count("s")': "0", "'aaa'.count('aa')": "1", "'a,b'.count(',')": "1",
    "'naïve'.count('ï')": "1", "'a'.count('a')+1": "2",
}  # fmt: skip
REFUSED = [
    "", " ", "...", "1+", "2 3", "3*(4", "012", "12*30=360", "$5+3", "50%", "5 apples", "1/0", "1%0", "1e309",
    "x+1", "True", "inf", "len('abc')", "(1)(2)", "__import__('os').system('ls')", "open('x').read().count('a')",
    "().__class__.__bases__", "'abc'.upper().count('A')", "'abc'.count", "'abc'.count(b)", "'a'.count('a', 0)",
    "'a'.count(sub='a')", "'abc'.index('b')", "[1,2][0]", "f'{1}'.count('1')", "b'a'.count(b'a')", "2**3", "1<<100",
    "~1", "not 1", "1==1", "1 or 2", "lambda x: x", "(x:=1)", "1;2", "import os", "1j", "'abc'", "'a'*1000000000",
    "9" * 200, "1e16", "99999999*99999999*99999999", "(" * 99 + "1", "1" * 201, "2−1", "١+١", "1\x00", "\ud800", "#",
]  # fmt: skip


def test_results_and_refusals():
    assert {expression: calculate(expression) for expression in SUMS} == SUMS
    assert [expression for expression in REFUSED if calculate(expression) is not None] == []
