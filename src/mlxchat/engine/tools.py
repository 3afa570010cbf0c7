"""Tools that a model calls between <|python_start|> and <|python_end|>: a calculator, and Python in the sandbox.

The calculator evaluates + − * / // % with parentheses, and 'text'.count('letter'), without executing Python. Integer
results have no decimal point, as in GSM8K. Other calls go to `PythonTool` if the operator allows it. Its output is the
program's output, then the value of its last expression or the last line of a traceback. Equal programs give equal
outputs (no hash randomisation, `random` seeded by the row), except for clocks and programs close to the time limit.
"""

from __future__ import annotations

import ast
import math
import operator
import warnings
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING

from mlxchat.errors import ConfigError
from mlxchat.sandbox.programs import find_confinement_problem, run_program

if TYPE_CHECKING:
    from mlxchat.engine.scheduler import TextTokenizer

CALL_TOKENS = ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")
_MOST_CODE_CHARS, _MOST_OUTPUT_CHARS = 10_000, 1000
# Of a program, including the interpreter.
_MEMORY_BYTES = 256 << 20
_PROGRAMS_AT_ONCE = 2
# Parsed within the sandbox, since a model's text can exhaust a parser.
_PROGRAM = """
def _show(source, seed):
    import ast, sys, traceback
    try:
        if "random" in source:
            import random
            random.seed(seed)
        tree = ast.parse(source, "<call>")
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        names = globals()
        del names["_show"]
        exec(compile(tree, "<call>", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "<call>", "eval"), names)
            if value is not None:
                print(repr(value))
    except SystemExit:
        pass
    except MemoryError:
        raise
    except BaseException as error:
        print("".join(traceback.format_exception_only(error)).strip().splitlines()[-1])
    sys.stdout.flush()
"""

_MOST_CHARS = 200
_LARGEST = 1e15

Number = int | float

_BINARY: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


class ToolCalls:
    """nanochat's protocol for one row: collects a call's tokens, and forces the answer when the call ends."""

    def __init__(self, tokenizer: TextTokenizer, python: PythonTool | None = None, seed: int = 0) -> None:
        """Start a row; `python` runs calls that the calculator does not answer, with this seed."""
        self.forced: deque[int] = deque()
        """Tokens that follow instead of sampled ones."""
        self.running: Future[str] | None = None
        """A program for whose output the row waits."""
        self._python, self._seed = python, seed
        self._tokenizer, self._special = tokenizer, tokenizer.special_ids
        self._call: list[int] | None = None

    def follow(self, token: int) -> None:
        """Process the row's next token, sampled or forced."""
        special = self._special
        if token == special["<|python_start|>"]:
            self._call = []
        elif token == special["<|python_end|>"] and self._call is not None:
            code = self._tokenizer.decode(self._call)
            answer, self._call = calculate(code), None
            if answer is not None:
                self._force(answer)
            elif self._python is not None and code.strip():
                self.running = self._python.start(code, self._seed)
        elif self._call is not None:
            self._call.append(token)

    def waits(self) -> bool:
        """Return True if the row waits for a program; forces the output of a finished one.

        Raises:
            StepFailed: this machine cannot start an interpreter.
        """
        if self.running is not None and self.running.done():
            output, self.running = self.running.result(), None
            self._force(output)
        return self.running is not None

    def drop(self) -> None:
        """Cancel the queued program of a finished row; a running one ends by its limits."""
        if self.running is not None:
            self.running.cancel()

    def _force(self, output: str) -> None:
        special = self._special
        self.forced.extend([special["<|output_start|>"], *self._tokenizer.encode(output), special["<|output_end|>"]])


def calculate(expression: str) -> str | None:
    """Return the result of an expression as text; None: not an expression of the calculator.

    Not supported: names, calls other than str.count, powers, more than 200 characters, numbers beyond 1e15.
    """
    expression = expression.strip()
    if not expression or len(expression) > _MOST_CHARS:
        return None
    if "'" not in expression and '"' not in expression:
        expression = expression.replace(",", "")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about syntax such as 1or 2
            tree = ast.parse(expression, mode="eval")
        value = _evaluate(tree.body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        value = round(value, 10)  # 1.1*3-0.3 is 3, not 3.0000000000000004
        return str(int(value)) if value == int(value) else str(value)
    return str(value)


def _evaluate(node: ast.expr) -> Number:
    value: Number
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            value = number
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
            value = _evaluate(operand) * (-1 if isinstance(sign, ast.USub) else 1)
        case ast.BinOp(left=left, op=operation, right=right) if type(operation) in _BINARY:
            value = _BINARY[type(operation)](_evaluate(left), _evaluate(right))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str(text)), attr="count"),
            args=[ast.Constant(value=str(part))],
            keywords=[],
        ):
            value = text.count(part)
        case _:
            raise ValueError("no arithmetic")
    if abs(value) > _LARGEST:
        raise ValueError("beyond the calculator's range")
    return value


class PythonTool:
    """Runs calls in sandboxed processes."""

    def __init__(self, *, seconds: float = 5.0) -> None:
        """Limit a call to `seconds` of wall time."""
        self.seconds = seconds

    def check(self) -> None:
        """Check that this machine can isolate programs.

        Raises:
            ConfigError: it cannot, so a program could use files and the network.
        """
        if problem := find_confinement_problem():
            raise ConfigError(f"the Python tool cannot be used: {problem}. Leave it off")

    def start(self, code: str, seed: int) -> Future[str]:
        """Start a program and return the future of its output."""
        return self._threads.submit(self.run, code, seed)

    def run(self, code: str, seed: int) -> str:
        """Return the output of a program, which may be empty.

        Raises:
            StepFailed: this machine cannot start an interpreter.
        """
        if len(code) > _MOST_CODE_CHARS:
            return f"ValueError: the program has {len(code)} characters, at most {_MOST_CODE_CHARS} may be"
        program = f"{_PROGRAM}\n_show({code!r}, {seed})"
        outcome = run_program(program, seconds=self.seconds, memory_bytes=_MEMORY_BYTES)
        text = outcome.output.strip()
        if outcome.status in ("timeout", "memory"):
            text = f"TimeoutError: after {self.seconds:g} s" if outcome.status == "timeout" else "MemoryError"
        return text if len(text) <= _MOST_OUTPUT_CHARS else text[:_MOST_OUTPUT_CHARS] + "…"

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_PROGRAMS_AT_ONCE, thread_name_prefix="python-tool")
