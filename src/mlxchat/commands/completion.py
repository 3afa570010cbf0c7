"""mlxchat completion: argcomplete with the parsers of the verbs, and values of settings, runs and artifacts.

argcomplete completes options, their choices and files. Settings have no argparse parser, so they are completed here,
without Hydra and YAML: Tab must answer within 0.1 s.
"""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO, get_args, get_type_hints

from argcomplete.completers import FilesCompleter
from argcomplete.finders import CompletionFinder
from argcomplete.shell_integration import shellcode

import mlxchat.conf
from mlxchat.commands.arguments import Parser, is_setting, parser_of
from mlxchat.config.verbs import VERBS, split_verb
from mlxchat.store.files import list_folder
from mlxchat.store.naming import IMPORTS, PINS, called, latest, links, runs
from mlxchat.store.store import Store

_SHELLS = ("bash", "zsh", "fish")
_PLACES = """bash   eval "$(mlxchat completion bash)"      in ~/.bashrc
zsh    eval "$(mlxchat completion zsh)"       in ~/.zshrc, after compinit
fish   mlxchat completion fish > ~/.config/fish/completions/mlxchat.fish"""


def completion(parser: Parser) -> None:
    """Declare `mlxchat completion`."""
    parser.take_names("SHELL", first=_SHELLS, about=_PLACES)
    parser.set_defaults(main=_completion)


def _completion(options: Namespace) -> int:
    """Print the script for a shell."""
    print(shellcode(["mlxchat"], shell=options.names[0]))
    return 0


def complete_for_shell(answer: TextIO | None = None) -> None:
    """Answer the shell's script and exit.

    The script gives the command line in the environment, and reads file descriptor 8 unless there is another `answer`.
    """
    _Finder()(Parser("run"), always_complete_options=False, exit_method=sys.exit, output_stream=answer)


class _Finder(CompletionFinder):
    """Completes the last word of a command line with the parser of its verb."""

    def _init_debug_stream(self) -> None:
        """Do not open file descriptor 9, which may be in use."""

    def _get_completions(self, comp_words: list[str], *of_last: Any) -> Any:
        verb, rest = split_verb(comp_words[1:])
        parser = parser_of(verb)
        # argparse ends a positional at the first option, so it gets only the last word.
        words = [word for before, word in zip(["", *rest], rest, strict=False) if _is_word(parser, before, word)]
        options = [word for word in rest if word not in words]
        for action in parser._actions:
            if action.choices is None and action.nargs != 0:
                action.completer = partial(_complete, str(action.metavar or ""), words)  # type: ignore[attr-defined]  # argcomplete's
        parser.words.completer = partial(_complete_word, verb, words)  # type: ignore[attr-defined]  # argcomplete's
        self._parser = parser
        return super()._get_completions([verb, *options], *of_last)


def _is_word(parser: Parser, before: str, word: str) -> bool:
    """Return True if a word is a name or a setting, not an option or an option's value."""
    option = parser._option_string_actions.get(before)
    return not word.startswith("-") and (option is None or option.nargs == 0)


def _complete_word(verb: str, words: list[str], *, prefix: str, parser: Parser, **_: Any) -> list[str]:
    """Return completions of a name or a setting."""
    names = [word for word in words if not is_setting(word)]
    found = [] if parser.composes and is_setting(prefix) else ["outputs="]
    if parser.first and not names:
        return [*found, *parser.first]
    if parser.most is None or len(names) < parser.most:
        found += _complete(parser.form, words, prefix=prefix)
    if verb == "run" and not words:
        found += [each for each in VERBS if " " not in each]
    return [*found, *(_settings(prefix) if parser.composes else ())]


def _complete(form: str, words: list[str], *, prefix: str, **_: Any) -> list[str]:
    """Return completions of a word by the metavar of its option or the form of the verb's names."""
    kinds = set(re.findall(r"[A-Z]+", form))
    found: list[str] = []
    if kinds & {"ID", "RUN", "A", "PIN", "IMPORT"}:
        outputs = next((word.removeprefix("outputs=") for word in words if word.startswith("outputs=")), "outputs")
        store = Store(Path(outputs))
        found += [name for group in (latest(store), PINS, IMPORTS) for name in links(store, group)]
        if prefix:
            group = prefix.rpartition("/")[0]
            found += [f"{group}/{step}" for step in links(store, latest(store) if group == "latest" else group)]
            found += [name for run in runs(store) for name in (run, called(run))]
            found += [name for each in list_folder(store.outputs / "store") for name in (each, each[-16:])]
    if "STAGE" in kinds:
        found += _stages()
    if kinds & {"FILE", "DIR", "PATH", "PLACE", "FOLDER", "WHAT"}:
        found += FilesCompleter()(prefix)
    return found


def _stages() -> list[str]:
    from mlxchat.runner.stage import stage_files

    return [*stage_files()]


def _settings(current: str) -> list[str]:
    """Return config groups with their options, and keys of the configuration."""
    conf = Path(mlxchat.conf.__path__[0])
    group, equals, _ = current.lstrip("+").partition("=")
    if not equals:
        groups = [f"{name}=" for name in list_folder(conf) if (conf / name).is_dir() and name[0] != "_"]
        return ["stage=", "model=", *groups, *(_keys(current) if current else ())]
    names = [name[:-5] for name in list_folder(conf / group.partition("@")[0]) if name.endswith(".yaml")]
    if group == "model":
        from mlxchat.config.schema import MODELS

        names = [*MODELS]
    elif group == "stage":
        names = ["all", *_stages()]
    return [f"{current.partition('=')[0]}={name}" for name in names]


def _keys(current: str) -> list[str]:
    """Return the keys of the configuration one level below the typed sections; `SECTION.` for sections."""
    from mlxchat.config import schema

    *sections, _ = current.split(".")
    kind: Any = schema.Config
    for section in sections:
        kind = _dataclass_in(get_type_hints(kind).get(section))
        if kind is None:
            return []
    hints = get_type_hints(kind)
    return [
        ".".join([*sections, f"{item.name}{'.' if _dataclass_in(hints[item.name]) else '='}"]) for item in fields(kind)
    ]


def _dataclass_in(hint: Any) -> Any:
    return next((each for each in (hint, *get_args(hint)) if is_dataclass(each)), None)
