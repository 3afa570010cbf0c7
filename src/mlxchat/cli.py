"""The command line: verbs, help, and errors to exit codes. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from mlxchat import __version__
from mlxchat.errors import ConfigError, MlxchatError, suggest

# Verb → (module in mlxchat.commands, with its function if that is not main; what it does).
VERBS = {
    "run": ("run", "run the pipeline, or what `stage=` selects; this is what plain `mlxchat` does"),
    "plan": ("plan", "show what would run, and why"),
    "status": ("status", "show what is done, running and left over in the outputs folder"),
    "ls": ("ls", "list the artifacts"),
    "show": ("show", "show everything about an artifact"),
    "lineage": ("lineage", "show what an artifact was made from, and what was made from it"),
    "diff": ("diff", "show how two artifacts differ: config, inputs, code, metrics, environment"),
    "compare": ("compare", "compare runs, a sweep or a step's artifacts in a table (--sort, --format, --plot)"),
    "pin": ("pin", "name an artifact, which keeps it from being collected"),
    "verify": ("verify", "hash artifacts again and list what differs"),
    "gc": ("gc", "show what may be removed and why; --apply removes it"),
    "export": ("export", "copy artifacts and all they were made from, or write a model for other tools (--to hf, …)"),
    "import": ("transfer:main_import", "take in exported artifacts, hashed first"),
    "data": ("data", "fetch, list, remove and look at what comes from the Hub: data fetch|ls|rm|show"),
    "chat": ("chat", "talk to a model (-p QUESTION for one answer)"),
    "serve": ("serve", "serve models over HTTP: OpenAI's interface, nanochat's, and a page to chat in"),
    "distill": ("distill", "have a teacher behind an OpenAI-compatible endpoint answer questions to train on"),
    "report": ("report", "write and print the report of a run, of artifacts, or of several runs"),
    "graph": ("graph", "draw the pipeline (--format ascii, mermaid, dot or json)"),
    "bench": ("bench", "measure how fast this machine works (bench train, bench core; --json for programs)"),
    "completion": ("completion", "print a script with which bash, zsh or fish completes all of this"),
    "doctor": ("doctor", "check device, BLAS, memory, disk and versions, and say how to mend what is wrong"),
}

_USAGE = """mlxchat {version}: nanochat's pipeline on Apple MLX, as a cached DAG.

  mlxchat [run] [SETTINGS]           corpus → tokenizer → pretrain → midtrain → sft → rl → eval; what is done is kept
  mlxchat stage=pretrain model=d20   up to and including a stage, with another model
  mlxchat -m model=d2,d4             a sweep: one run per value, shared steps computed once
  mlxchat sweep=tpe 'KEY=interval(0.1,1)'   a search: each trial is chosen by the results so far
  mlxchat experiment=speedrun_d20    a recipe from conf/experiment
  mlxchat VERB [SETTINGS] [--help]

Verbs
{verbs}

Settings are written group=option or key=value:
{groups}
  any key of the configuration: `mlxchat --cfg job` prints it; +key adds, ~key removes
  outputs=PATH    where artifacts are kept        force=[sft]    run a step again although it is done

Further options
  -m, --multirun            sweep over comma-separated values
  --fail-fast               a step that fails stops the others too
  --cfg job [-p SECTION]    print the composed configuration (--resolve: with its references resolved)
  --config-dir DIR          find further YAML files in DIR
  --shell-completion, --hydra-help, --info    Hydra's own
  --version, --help

MLXCHAT_DEBUG=1 shows tracebacks; MLXCHAT_BLAS names or switches off the BLAS that serves MLX on a Linux CPU.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line and exit: 0 done, 1 a step failed, 2 a mistake of the user's, 128 + n for signal n."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        sys.exit(code)
    except MlxchatError as error:
        if os.environ.get("MLXCHAT_DEBUG"):
            raise
        from mlxchat.runner.secrets import redact

        lines = redact(str(error)).splitlines() or [type(error).__name__]
        print("error: " + "\n       ".join(lines), file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read us has left (`mlxchat ls | head`); nothing more to say to them.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _dispatch(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("--version", "-V"):
        print(f"mlxchat {__version__}")
        return 0
    if arguments and arguments[0] == "_complete":  # what those scripts call
        from mlxchat.commands.completion import main_complete

        return main_complete(arguments[1:])
    if not arguments or arguments[0] not in VERBS:
        if arguments and arguments[0] in ("--help", "-h", "help"):
            print(_help())
            return 0
        if arguments and arguments[0].isidentifier():
            raise ConfigError(
                f'there is no verb "{arguments[0]}": {", ".join(VERBS)}.{suggest(arguments[0], VERBS)} '
                "Settings are written key=value."
            )
        arguments = ["run", *arguments]
    verb, rest = arguments[0], arguments[1:]
    module, _, function = VERBS[verb][0].partition(":")
    command: Callable[[list[str]], int] = getattr(import_module(f"mlxchat.commands.{module}"), function or "main")
    return command(rest)


def _help() -> str:
    from textwrap import fill

    from mlxchat.compose import group_names, group_options

    verbs = "\n".join(f"  {verb:<10} {purpose}" for verb, (_, purpose) in VERBS.items())
    names = {group: f"{group}=" for group in group_names() if group not in ("settings", "mixture")}
    # The one group that is used at several places.
    names |= {"mixture": "mixture@sft.mixture= (or @midtrain.mixture=)"}
    groups = "\n".join(
        fill(
            f"{name:<14} {' '.join(group_options(group))}", width=118, initial_indent="  ",
            subsequent_indent=" " * 17, break_on_hyphens=False,
        )
        for group, name in names.items()
    )  # fmt: skip
    return _USAGE.format(version=__version__, verbs=verbs, groups=groups)
