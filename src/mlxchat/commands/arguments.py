"""The parser of a verb (options, names of artifacts and runs, settings written key=value), and what verbs print."""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from mlxchat.config.replaced import find_replacement
from mlxchat.config.verbs import VERBS
from mlxchat.config.wording import plural
from mlxchat.errors import ConfigError, suggest, visible

_IDS = """ID: a step of the latest run (sft), RUN/STEP, RUN (its model), a pin, import:NAME, an id or its start,
or an artifact's folder. RUN: latest, quickstart, or a run's folder"""
_URL = re.compile(r"[A-Za-z0-9+]+://")
_PLAIN = re.compile(r"[./]*[A-Za-z_][A-Za-z0-9_./-]*")


class Parser(argparse.ArgumentParser):
    """Parses a verb's command line; errors give one message and exit code 2.

    Names and settings come in any order and between options, so one positional argument takes all words, and `read`
    separates them.
    """

    def __init__(self, verb: str) -> None:
        """Create the parser of a verb without options, names and settings."""
        purpose = VERBS[verb][1]
        about = purpose[0].upper() + purpose[1:]
        super().__init__(prog=f"mlxchat {verb}", description=about, allow_abbrev=False)
        self.add_argument("words", nargs="*", help=argparse.SUPPRESS)
        self.composes = False  # whether the verb takes settings of the configuration; else only outputs=PATH
        self.long_help: Callable[[str], str] | None = None  # makes the whole help of the section of options
        self.take_names("", least=0, most=0)

    def use(self, settings: str) -> None:
        """Set the usage line, which ends with this form of the settings."""
        self.usage = " ".join(filter(None, (self.prog, self.form, "[OPTIONS]", settings)))

    def take_names(
        self, form: str, *, least: int = 1, most: int | None = 1, first: Collection[str] = (), about: str = ""
    ) -> None:
        """Declare how many names the verb takes (`most` None: any number).

        Args:
            form: their form in the usage line, such as "ID [NAME]".
            least: smallest number of names.
            most: largest number; None: any number.
            first: accepted values of the first name; empty: any.
            about: explains the words of the form; ID and RUN are always explained.
        """
        self.form, self.least, self.most, self.first = form, least, most, first
        self.about = "\n".join(filter(None, (_IDS if re.search(r"\b(ID|MODEL|RUN)\b", form) else "", about)))
        self.use("[outputs=PATH]")

    def take_settings(self) -> None:
        """Declare that the verb takes settings of a configuration, and the options that locate it."""
        self.composes = True
        self.use("[SETTINGS]")
        self.set_defaults(composition=[])
        for names, metavar, what in (
            (("--config-dir", "-cd"), "DIR", "search DIR for further YAML files"),
            (("--config-name", "-cn"), "NAME", "compose NAME.yaml instead of our config.yaml"),
            (("--config-path", "-cp"), "DIR", "folder of NAME.yaml"),
        ):
            self.add_argument(*names, action=_OfComposition, metavar=metavar, help=what)

    def add_json(self, what: str = "one JSON object for programs") -> None:
        """Declare --json."""
        self.add_argument("--json", action="store_true", help=what)

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Return the options with `names` and `settings`; also `outputs` if the verb takes no other setting."""
        options, unknown = self.parse_known_intermixed_args(arguments)
        see = f"See: {self.prog} --help"
        if unknown:
            name = unknown[0].partition("=")[0]
            near = suggest(name, [each for each in self._option_string_actions if each.startswith("--")])
            raise ConfigError(f"unrecognized arguments: {' '.join(unknown)}.{near} {see}")
        names = options.names = [word for word in options.words if not is_setting(word)]
        options.settings = [word for word in options.words if is_setting(word)]
        if self.first and names and names[0] not in self.first:
            gone = find_replacement(f"{self.prog} {names[0]}".removeprefix("mlxchat "))
            got = f'"{names[0]}".{gone or suggest(names[0], self.first)}'
            raise ConfigError(f"expected {self.prog} {'|'.join(self.first)}, got {got} {see}")
        if names and self.most == 0:
            raise ConfigError(f'"{names[0]}" is not a setting: expected key=value. {see}')
        if len(names) < self.least or (self.most is not None and len(names) > self.most):
            got = plural(len(names), "name") if names else "no names"
            raise ConfigError(f"expected {f'{self.prog} {self.form}'.rstrip()}, got {got}. {see}")
        if self.composes:
            options.settings += options.composition
        else:
            options.outputs = outputs_folder(options.settings)
        return options

    def format_help(self) -> str:
        """Return the text of --help."""
        text = super().format_help()
        if self.long_help is not None:
            return self.long_help(text[text.index("options:") :])
        return f"{text}\n{self.about}\n" if self.about else text

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Exit after --help; detect a closed pipe here instead of at interpreter exit."""
        sys.stdout.flush()
        super().exit(status, message)

    def error(self, message: str) -> NoReturn:
        """Raise a ConfigError about the command line."""
        raise ConfigError(f"{message.removeprefix('argument ').replace(': is ', ' is ', 1)}. See: {self.prog} --help")


class _OfComposition(argparse.Action):
    """Keeps an option of the configuration unchanged, for `split_options`."""

    def __call__(self, parser: Any, options: argparse.Namespace, value: Any, name: str | None = None) -> None:
        options.composition = [*options.composition, name, value]


def parser_of(verb: str) -> Parser:
    """Return the parser of a verb, declared by the function in VERBS; `main` is the one called so after a `_`."""
    place, _, name = VERBS[verb][0].partition(":")
    module, parser = import_module(f"mlxchat.commands.{place}"), Parser(verb)
    declare: Callable[[Parser], None] = getattr(module, name)
    declare(parser)
    parser.set_defaults(main=getattr(module, f"_{name}"))
    return parser


def number(least: float, most: float = math.inf, *, whole: bool = False) -> Callable[[str], float]:
    """Return the `type` of an option whose value is a finite number from `least` to `most`."""

    def read(text: str) -> float:
        with suppress(ValueError):
            value = int(text) if whole else float(text)
            if math.isfinite(value) and least <= value <= most:
                return value
        kind = "a whole number" if whole else "a number"
        bounds = f"of at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
        raise argparse.ArgumentTypeError(f"is {text}, expected {kind} {bounds}")

    return read


positive, count, amount = number(1, whole=True), number(0, whole=True), number(0)
"""Types of options: a whole number of at least 1, of at least 0, any number of at least 0."""


def is_setting(word: str) -> bool:
    """Return True if a word is a setting (key=value, +key=value or ~key), False if it is a name."""
    return (word.startswith(("~", "+")) or "=" in word) and not _URL.match(word) and not word.startswith("~/")


def outputs_folder(settings: Sequence[str]) -> Path:
    """Return the folder of `outputs=PATH`; ConfigError if there is another setting, which the verb does not use."""
    for setting in settings:
        if not setting.removeprefix("outputs=") or not setting.startswith("outputs="):
            raise ConfigError(f'"{setting}" is not used here; this verb takes outputs=PATH')
    return Path(settings[-1].removeprefix("outputs=") if settings else "outputs")


def quoted(value: str) -> str:
    """Return a value for an override, quoted unless Hydra reads it as the same text without quotation marks."""
    if _PLAIN.fullmatch(value) and value.lower() not in ("null", "true", "false", "inf", "nan"):
        return value
    # Backslashes need escaping only before a quotation mark: one of the value's, or the closing one.
    return "'" + re.sub(r"(\\*)('|\Z)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), value) + "'"


Node = TypeVar("Node")


def print_json(record: Any) -> None:
    """Print plain data as JSON."""
    print(visible(json.dumps(record, indent=1, ensure_ascii=False)))


def show_value(value: Any) -> str:
    """Return a value in YAML's notation, in one line."""
    if value is None:
        return "null"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def when(moment: str) -> str:
    """Return an ISO time to the minute."""
    return str(moment)[:16].replace("T", " ")


def draw_tree(root: Node, label: Callable[[Node], str], children: Callable[[Node], list[Node]]) -> str:
    """Return a tree as lines of text."""
    lines = [label(root)]
    below = children(root)
    for child in below:
        branch, further = ("└─ ", "   ") if child is below[-1] else ("├─ ", "│  ")
        first, *others = draw_tree(child, label, children).split("\n")
        lines += [branch + first, *(further + line for line in others)]
    return "\n".join(lines)
