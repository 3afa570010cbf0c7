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
    """Return a session that completes commands, and paths after commands that take a file."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    files = PathCompleter(expanduser=True)

    class Commands(Completer):
        def get_completions(self, document: Document, event: CompleteEvent) -> Iterator[Completion]:
            text = document.text_before_cursor
            name, space, rest = text.partition(" ")
            if space and commands.get(name, ("",))[0] == "FILE":
                yield from files.get_completions(Document(rest, len(rest)), event)
            elif not space and text.startswith("/"):
                for command, (argument, does) in commands.items():
                    if command.startswith(text):
                        shown = f"{command} {argument}"
                        yield Completion(command, -len(text), display=shown, display_meta=does)

    session: PromptSession[str] = PromptSession(completer=Commands())
    return session
