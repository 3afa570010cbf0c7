"""The command line: verbs, help, and errors to exit codes. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from mlxchat import __version__
from mlxchat.config.verbs import split_verb
from mlxchat.errors import Interrupted, MlxchatError, visible

if TYPE_CHECKING:
    from argparse import Namespace


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line and exit: 0 done, 1 a step failed, 2 a mistake of the user's, 128 + n for signal n."""
    sys.excepthook = _print_fault
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if "_ARGCOMPLETE" in os.environ:  # a shell completes a command line of ours
            from mlxchat.commands.completion import complete_for_shell

            complete_for_shell()
        code = dispatch(arguments)
        sys.stdout.flush()
        sys.exit(code)
    except MlxchatError as error:
        if os.environ.get("MLXCHAT_DEBUG"):
            raise
        from mlxchat.errors import redact

        lines = redact(str(error)).splitlines() or [type(error).__name__]
        # A signal is no error.
        head = "" if isinstance(error, Interrupted) else "error: "
        print(head + f"\n{' ' * len(head)}".join(lines), file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader has closed the pipe (`mlxchat ls | head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _print_fault(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback. Its message may quote a third-party file, so control characters are written out."""
    from traceback import format_exception

    print(visible("".join(format_exception(kind, error, trace))), file=sys.stderr, end="")


def dispatch(arguments: list[str]) -> int:
    """Run a command line and return its exit code, or raise an MlxchatError."""
    if arguments and arguments[0] in ("--version", "-V"):
        print(f"mlxchat {__version__}")
        return 0
    if "MLX_RANK" in os.environ or "OMPI_COMM_WORLD_SIZE" in os.environ:
        from mlxchat.distributed.ranks import is_launched, join_ranks

        if is_launched() and (code := join_ranks()) is not None:
            sys.stdout.flush()
            os._exit(code)  # MLX's threads may still wait for another rank
    if arguments and arguments[0] == "help":
        arguments = ["--help", *arguments[1:]]
    from mlxchat.commands.arguments import parser_of

    verb, rest = split_verb(arguments)
    options = parser_of(verb).read(rest)
    main_of_verb: Callable[[Namespace], int] = options.main
    return main_of_verb(options)
