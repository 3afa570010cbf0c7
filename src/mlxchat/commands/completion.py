"""mlxchat completion: verbs, options and their values, settings, runs and artifacts.

argcomplete reads the shell's line and writes the answer. The words come from the parsers and from names of files,
without Hydra and YAML: Tab must answer within 0.1 s.
"""

import re
import sys
from argparse import Action, Namespace
from pathlib import Path
from typing import Any, TextIO

from argcomplete.completers import FilesCompleter
from argcomplete.finders import CompletionFinder
from argcomplete.shell_integration import shellcode

import mlxchat.conf
from mlxchat.commands.arguments import Parser, is_setting, parser_of
from mlxchat.composition.overrides import known_keys
from mlxchat.config.schema import MODELS, Config
from mlxchat.config.verbs import VERBS, split_verb
from mlxchat.runner.stage import stage_files
from mlxchat.store.files import list_folder
from mlxchat.store.naming import IMPORTS, PINS, called, latest, links, runs
from mlxchat.store.store import Store

_PLACES = """bash   eval "$(mlxchat completion bash)"      in ~/.bashrc
zsh    eval "$(mlxchat completion zsh)"       in ~/.zshrc, after compinit
fish   mlxchat completion fish > ~/.config/fish/completions/mlxchat.fish"""


def completion(parser: Parser) -> None:
    parser.take_names("SHELL", first=("bash", "zsh", "fish"), about=_PLACES)


def _completion(options: Namespace) -> int:
    """Print the script for a shell."""
    print(shellcode(["mlxchat"], shell=options.names[0]))
    return 0


def complete_for_shell(answer: TextIO | None = None) -> None:
    """Answer the shell's script and exit.

    The script gives the command line in the environment, and reads file descriptor 8 unless there is another `answer`.
    """
    _Finder()(Parser("run"), exit_method=sys.exit, output_stream=answer)


class _Finder(CompletionFinder):
    """Completes the last word of a command line with the parser of its verb."""

    def _init_debug_stream(self) -> None:
        """Do not open file descriptor 9, which may be in use."""

    def _get_completions(self, comp_words: list[str], cword_prefix: str, *quotes: Any) -> Any:
        verb, words = split_verb(comp_words[1:])
        found = [each for each in _candidates(verb, words, cword_prefix) if each.startswith(cword_prefix)]
        return self.quote_completions(found, *quotes)


def _candidates(verb: str, words: list[str], prefix: str) -> list[str]:
    """Return words that may follow `words`; some begin with `prefix`."""
    parser = parser_of(verb)
    options: dict[str, Action] = parser._option_string_actions
    outputs = next((word.removeprefix("outputs=") for word in words if word.startswith("outputs=")), "outputs")

    def values(option: Action) -> list[str]:
        if option.choices is not None:
            return [str(choice) for choice in option.choices]
        return _named(str(option.metavar), Store(Path(outputs)), prefix)

    if prefix.startswith("-"):
        name, equals, _ = prefix.partition("=")
        return [f"{name}={value}" for value in values(options[name])] if equals and name in options else [*options]
    before = options.get(words[-1]) if words else None
    if before is not None and before.nargs != 0:
        return values(before)
    names = [word for word in words if not is_setting(word) and not word.startswith("-")]
    found = [] if parser.composes and is_setting(prefix) else ["outputs="]
    if parser.first and not names:
        return [*found, *parser.first]
    if verb == "run" and not words:
        found += [each for each in VERBS if " " not in each]
    if parser.composes:
        found += _settings(prefix)
    return [*found, *_named(parser.form, Store(Path(outputs)), prefix)]


def _named(form: str, store: Store, prefix: str) -> list[str]:
    """Return artifacts, runs, stages or files, as the metavar of an option or the form of a verb's names says."""
    kinds = set(re.findall(r"[A-Z]+", form))
    found: list[str] = []
    if kinds & {"ID", "MODEL", "RUN", "A", "PIN", "IMPORT"}:
        found += [name for group in (latest(store), PINS, IMPORTS) for name in links(store, group)]
        if prefix:
            group = prefix.rpartition("/")[0]
            found += [f"{group}/{step}" for step in links(store, latest(store) if group == "latest" else group)]
            found += [name for run in runs(store) for name in (run, called(run))]
            found += [name for each in list_folder(store.outputs / "store") for name in (each, each[-16:])]
    found += stage_files() if "STAGE" in kinds else ()
    if kinds & {"FILE", "DIR", "PATH", "PLACE", "FOLDER", "WHAT"}:
        found += FilesCompleter()(prefix)
    return found


def _settings(current: str) -> list[str]:
    """Return config groups with their options, and the keys of the configuration."""
    conf = Path(mlxchat.conf.__path__[0])
    group, equals, _ = current.lstrip("+").partition("=")
    if equals:
        files = [name[:-5] for name in list_folder(conf / group.partition("@")[0]) if name.endswith(".yaml")]
        names = {"model": MODELS, "stage": ["all", *stage_files()]}.get(group, files)
        return [f"{current.partition('=')[0]}={name}" for name in names]
    groups = [name for name in list_folder(conf) if (conf / name).is_dir() and name[0] != "_"]
    return [f"{name}=" for name in ("stage", "model", *groups, *(known_keys(Config) if current else ()))]
