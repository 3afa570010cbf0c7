"""The calculator, which a model calls between <|python_start|> and <|python_end|>.

It evaluates + − * / // % with parentheses, and 'text'.count('letter'), without executing Python. Integer results have
no decimal point, as in GSM8K.
"""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Callable
from typing import Literal

CALL_TOKENS = ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")
Kind = Literal["text", "python", "python_output"]
"""What a part of an answer's text belongs to."""
KINDS: tuple[Kind, ...] = ("python", "text", "python_output", "text")
"""What follows each of CALL_TOKENS."""
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
