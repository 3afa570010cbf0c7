"""Tools that a model calls between <|python_start|> and <|python_end|>: a calculator, and Python in the sandbox.

The calculator evaluates + − * / // % with parentheses, and 'text'.count('letter'), without executing Python. Integer
results have no decimal point, as in GSM8K. Other calls go to `PythonTool` if the operator allows it. Its output is the
program's output, then the value of its last expression or the last line of a traceback. Equal programs give equal
outputs (no hash randomisation, `random` seeded by the row), except for clocks and programs close to the time limit.
"""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

from mlxchat.errors import ConfigError
from mlxchat.sandbox.programs import find_confinement_problem, run_program

CALL_TOKENS = ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")
Kind = Literal["text", "python", "python_output"]
"""What a part of an answer's text belongs to."""
KINDS: tuple[Kind, ...] = ("python", "text", "python_output", "text")
"""What follows each of CALL_TOKENS."""
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

_OPERATORS: dict[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.UAdd: operator.pos, ast.USub: operator.neg,
}  # fmt: skip


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
            value = _evaluate(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None
    value = round(value, 10)  # 1.1*3-0.3 is 3, not 3.0000000000000004
    return str(int(value) if value == int(value) else value)


def _evaluate(node: ast.expr) -> float:
    value: float
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            value = number
        case ast.UnaryOp(op=operation, operand=operand) if type(operation) in _OPERATORS:
            value = _OPERATORS[type(operation)](_evaluate(operand))
        case ast.BinOp(left=left, op=operation, right=right) if type(operation) in _OPERATORS:
            value = _OPERATORS[type(operation)](_evaluate(left), _evaluate(right))
        case ast.Call(ast.Attribute(ast.Constant(str(text)), "count"), [ast.Constant(str(part))], []):
            value = text.count(part)
        case _:
            raise ValueError("no arithmetic")
    if not abs(value) <= _LARGEST:
        raise ValueError("beyond the calculator's range")
    return value


class PythonTool:
    """Runs calls in sandboxed processes."""

    def __init__(self, *, seconds: float = 5.0) -> None:
        """Limit a call to `seconds` of wall time."""
        self.seconds = seconds
        self._threads = ThreadPoolExecutor(_PROGRAMS_AT_ONCE, thread_name_prefix="python-tool")

    def check(self) -> None:
        """Raise ConfigError if this machine cannot isolate programs, which could then use files and the network."""
        if problem := find_confinement_problem():
            raise ConfigError(f"the Python tool cannot be used: {problem}. Leave it off")

    def start(self, code: str, seed: int) -> Future[str]:
        """Start a program and return the future of its output."""
        return self._threads.submit(self.run, code, seed)

    def run(self, code: str, seed: int) -> str:
        """Return the output of a program, which may be empty; raises StepFailed if no interpreter can be started."""
        if len(code) > _MOST_CODE_CHARS:
            return f"ValueError: the program has {len(code)} characters, at most {_MOST_CODE_CHARS} may be"
        program = f"{_PROGRAM}\n_show({code!r}, {seed})"
        outcome = run_program(program, seconds=self.seconds, memory_bytes=_MEMORY_BYTES)
        ends = {"timeout": f"TimeoutError: after {self.seconds:g} s", "memory": "MemoryError"}
        text = ends.get(outcome.status, outcome.output.strip())
        return text if len(text) <= _MOST_OUTPUT_CHARS else text[:_MOST_OUTPUT_CHARS] + "…"
