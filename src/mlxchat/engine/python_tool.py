"""Python as a tool of answers: what stands in a call and is no sum runs in the sandbox, if the operator allows it.

The output is what an interpreter would show: what the program prints, then the value of its last expression. What
goes wrong is told by the last line of a traceback. Equal programs give equal outputs: hashes do not vary, and
`random` begins at the row's seed. The clock and what needs nearly all of its time are beyond that.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

from mlxchat.errors import ConfigError
from mlxchat.sandbox.programs import protections_here, run_program

_MOST_CODE_CHARS = 10_000
# Read and run by the sandbox alone, since text of a model can be too much for a parser too.
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


class PythonTool:
    """Runs calls in threads, each in a process of its own that may do nothing but compute."""

    def __init__(
        self, *, seconds: float = 5.0, memory_bytes: int = 256 << 20, max_chars: int = 1000, workers: int = 2
    ) -> None:
        """Take the limits of a call.

        Args:
            seconds: of wall clock.
            memory_bytes: the interpreter's own included.
            max_chars: of the output; what is longer is cut.
            workers: programs at a time; others wait.
        """
        self.seconds, self.memory_bytes, self.max_chars, self.workers = seconds, memory_bytes, max_chars, workers

    def check(self) -> None:
        """Find out whether this machine can confine programs.

        Raises:
            ConfigError: it can set limits only, so a program could use files and the network.
        """
        found = protections_here()
        if not {"landlock", "seccomp"} <= set(found) and "sandbox-exec" not in found:
            raise ConfigError(
                f"the Python tool needs a machine that confines programs (Landlock with seccomp, or sandbox-exec); "
                f"in force here: {', '.join(found)}. Leave it off"
            )

    def start(self, code: str, seed: int) -> Future[str]:
        """Begin a program and return what will be its output."""
        return self._threads.submit(self.run, code, seed)

    def run(self, code: str, seed: int) -> str:
        """Return the output of a program; it may be empty.

        Raises:
            StepFailed: no interpreter can be started here.
        """
        if len(code) > _MOST_CODE_CHARS:
            return f"ValueError: the program has {len(code)} characters, at most {_MOST_CODE_CHARS} may be"
        program = f"{_PROGRAM}\n_show({code!r}, {seed})"
        outcome = run_program(program, seconds=self.seconds, memory_bytes=self.memory_bytes)
        text = outcome.output.strip()
        if outcome.status in ("timeout", "memory"):
            text = f"TimeoutError: after {self.seconds:g} s" if outcome.status == "timeout" else "MemoryError"
        if len(text) > self.max_chars:
            text = text[: self.max_chars] + "…"
        return text

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.workers, thread_name_prefix="python-tool")
