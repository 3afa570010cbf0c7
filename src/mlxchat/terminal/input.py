"""Reads lines from a terminal, with history, completion and editing, or from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Reader = Callable[[str], str]
"""Prompts for a line, starting with an editable text."""


def read_lines(mark: str, commands: Mapping[str, tuple[str, str]]) -> Iterator[tuple[str, Reader]]:
    """Yield non-empty lines, each with a function that prompts for an edited line, until the input ends."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            if line.strip():
                yield line.strip(), lambda default: default
        return
    session = _session(commands)

    def ask(default: str = "") -> str:
        return str(session.prompt([("bold ansiblue", mark)], default=default)).strip()

    def change(default: str) -> str:
        try:
            return ask(default)
        except (KeyboardInterrupt, EOFError):  # changes nothing
            return ""

    while True:
        try:
            text = ask()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        if text:
            yield text, change


def _session(commands: Mapping[str, tuple[str, str]]) -> Any:
    """Return a session that completes commands."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter

    shown: Any = {name: f"{name} {argument}" for name, (argument, _) in commands.items()}
    about: Any = {name: does for name, (_, does) in commands.items()}
    completer = WordCompleter(list(commands), display_dict=shown, meta_dict=about, sentence=True)
    session: PromptSession[str] = PromptSession(completer=completer)
    return session
