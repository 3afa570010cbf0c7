"""The command line: verbs, help, and errors to exit codes. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from types import TracebackType

from mlxchat import __version__
from mlxchat.config.verbs import VERBS
from mlxchat.errors import ConfigError, Interrupted, MlxchatError, suggest, visible

# Options of the configuration, which may stand before the verb, whose value is the next word.
_WITH_VALUE = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--cfg", "-c", "--package", "-p")


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line and exit: 0 done, 1 a step failed, 2 a mistake of the user's, 128 + n for signal n."""
    sys.excepthook = _print_fault
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        sys.exit(code)
    except MlxchatError as error:
        if os.environ.get("MLXCHAT_DEBUG"):
            raise
        from mlxchat.config.secrets import redact

        lines = redact(str(error)).splitlines() or [type(error).__name__]
        # A signal is no error: what was stopped, and where it continues.
        head = "" if isinstance(error, Interrupted) else "error: "
        print(head + f"\n{' ' * len(head)}".join(lines), file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read us has left (`mlxchat ls | head`); nothing more to say to them.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _verb_first(arguments: list[str]) -> list[str]:
    """Return the arguments with a verb that follows settings or options moved to the front."""
    words = iter(enumerate(arguments))
    for place, word in words:
        if word in VERBS:
            return [word, *arguments[:place], *arguments[place + 1 :]]
        if word in _WITH_VALUE:
            next(words, None)
        elif not word.startswith(("-", "~")) and "=" not in word:
            break
    return arguments


def _print_fault(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback. Its message may quote a third-party file, so control characters are written out."""
    from traceback import format_exception

    print(visible("".join(format_exception(kind, error, trace))), file=sys.stderr, end="")


def _dispatch(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("--version", "-V"):
        print(f"mlxchat {__version__}")
        return 0
    if arguments and arguments[0] == "_complete":  # what those scripts call
        from mlxchat.commands.completion import main_complete

        return main_complete(arguments[1:])
    if "MLX_RANK" in os.environ or "OMPI_COMM_WORLD_SIZE" in os.environ:
        from mlxchat.distributed.ranks import enter

        code = enter(arguments)
        if code is not None:
            return code
    arguments = _verb_first(arguments)
    if not arguments or arguments[0] not in VERBS:
        if arguments and arguments[0] in ("--help", "-h", "help"):
            from mlxchat.commands.run import describe_usage

            print(describe_usage())
            return 0
        if arguments and arguments[0].isidentifier():
            from mlxchat.composition.compose import group_options
            from mlxchat.runner.stage import Stages

            for group, options in (("stage", Stages()), ("experiment", group_options("experiment"))):
                if arguments[0] in options:
                    raise ConfigError(
                        f'there is no verb "{arguments[0]}". For the {group}: mlxchat {group}={" ".join(arguments)}'
                    )
            raise ConfigError(
                f'there is no verb "{arguments[0]}": {", ".join(VERBS)}.{suggest(arguments[0], VERBS)} '
                "Settings are written key=value."
            )
        arguments = ["run", *arguments]
    verb, rest = arguments[0], arguments[1:]
    module, _, function = VERBS[verb][0].partition(":")
    command: Callable[[list[str]], int] = getattr(import_module(f"mlxchat.commands.{module}"), function)
    return command(rest)
