"""Measure the tests by mutation: python tests/mutants.py runner,store tests/runner tests/store tests/crash

Changes one operator or number of the named packages at a time (drawn by --seed), runs the named tests until one
fails, and restores the file. A mutant that no test kills is printed as a diff. Exit code 0; 2 if the checkout has
uncommitted changes or the tests fail without a mutant.
"""

import argparse
import ast
import copy
import difflib
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
_OPPOSITE: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
}  # fmt: skip


def mutate(node: ast.AST) -> ast.expr | None:
    """Return the expression with one operator, number or truth value changed; None if it has none."""
    changed = copy.deepcopy(node)
    match changed:
        case ast.Compare(ops=[op]) if type(op) in _OPPOSITE:
            changed.ops = [_OPPOSITE[type(op)]()]
        case ast.BoolOp(op=op) | ast.BinOp(op=op) if type(op) in _OPPOSITE:
            changed.op = _OPPOSITE[type(op)]()
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            changed = operand
        case ast.Constant(value=bool() as value):
            changed.value = not value
        case ast.Constant(value=int() as value):
            changed.value = value + 1
        case _:
            return None
    return changed  # type: ignore[return-value]


def expressions(node: ast.AST) -> Iterator[ast.expr]:
    """Yield the expressions that compute something: none in annotations, decorators or formatted text."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list") or isinstance(node, ast.JoinedStr):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                if isinstance(child, ast.expr):
                    yield child
                yield from expressions(child)


def with_mutant(source: str, node: ast.expr, mutant: ast.expr) -> str:
    """Return the source with the node's text replaced by the mutant, in brackets."""
    lines = source.encode().splitlines(keepends=True)
    start = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
    end = sum(map(len, lines[: (node.end_lineno or node.lineno) - 1])) + (node.end_col_offset or 0)
    whole = b"".join(lines)
    return (whole[:start] + f"({ast.unparse(mutant)})".encode() + whole[end:]).decode()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", help="packages of src/mlxchat, separated by commas")
    parser.add_argument("tests", nargs="+", help="test files and folders")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the file is restored
    pytest = [sys.executable, "-m", "pytest", "-qx", "-m", "not slow", "-p", "no:cacheprovider", *asked.tests]
    dirty = subprocess.run(["git", "status", "--porcelain", "src"], cwd=ROOT, capture_output=True, text=True).stdout
    if dirty:
        print(f"src has uncommitted changes; commit or stash them first:\n{dirty}", file=sys.stderr)
        return 2
    if subprocess.run(pytest, cwd=ROOT).returncode:
        print("the tests fail without a mutant", file=sys.stderr)
        return 2
    candidates = []
    for package in asked.packages.split(","):
        for path in sorted((ROOT / "src" / "mlxchat" / package).rglob("*.py")):
            candidates += [(path, node) for node in expressions(ast.parse(path.read_text())) if mutate(node)]
    drawn = random.Random(asked.seed).sample(candidates, min(asked.count, len(candidates)))
    killed = 0
    for number, (path, node) in enumerate(drawn, 1):
        source, mutant = path.read_text(), mutate(node)
        assert mutant
        changed = with_mutant(source, node, mutant)
        try:
            path.write_text(changed)
            # A mutant may loop for ever; that counts as killed, as a hanging test would be noticed.
            code = subprocess.run(["timeout", "900", *pytest], cwd=ROOT, capture_output=True).returncode
        finally:
            path.write_text(source)
        killed += code != 0
        print(
            f"{number}/{len(drawn)} {path.relative_to(ROOT)}:{node.lineno} {'killed' if code else 'SURVIVED'}",
            flush=True,
        )
        if not code:
            print(
                *difflib.unified_diff(source.splitlines(), changed.splitlines(), n=0, lineterm=""), sep="\n", flush=True
            )
    print(f"{killed} of {len(drawn)} mutants killed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
