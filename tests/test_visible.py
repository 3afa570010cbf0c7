"""Text of models, files and servers is escaped on terminals."""

import io
import json
import sys
import unicodedata

import pytest

from kit.commands import run_here
from mlxchat.errors import visible
from mlxchat.store.files import seal
from mlxchat.store.naming import resolve
from mlxchat.terminal.chat import Shown

# OSC 52 writes the clipboard, 0x9b and 0x9d begin a sequence as ESC [ and ESC ] do, U+202E turns a line around.
HOSTILE = "a\x1b]52;c;aGFsbG8=\x07\x9d52;c;aGFsbG8=\x9c\x9b2J\x7f\u202e\u2066\rb"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def commands_in(text: str) -> set[str]:
    """Return the characters of a text that steer a terminal, by Unicode's categories; not line ends and tabs."""
    directions = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    return {
        char
        for char in text
        if char not in "\n\t" and (unicodedata.category(char) == "Cc" or unicodedata.bidirectional(char) in directions)
    }


def test_terminal_control_characters_are_escaped():
    assert len(commands_in(HOSTILE)) == 9
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    shown = visible(every)
    assert commands_in(shown) == set()
    shown.encode()  # no half of a character is left
    steering = commands_in(every)
    kept = "".join(char for char in every if char not in steering and not 0xD800 <= ord(char) < 0xE000)
    assert visible(kept) == kept


def test_answers_are_escaped_on_a_terminal_and_unchanged_in_a_pipe(monkeypatch, capsys):
    monkeypatch.setenv("NO_COLOR", "1")
    for screen in (Terminal(), io.StringIO()):
        monkeypatch.setattr("sys.stdout", screen)
        shown = Shown()
        for character in HOSTILE:
            shown.add("text", character)
        told = screen.getvalue()
        assert commands_in(told) == set() if screen.isatty() else told == HOSTILE


@pytest.mark.parametrize("words", ["show second", "ls", "diff first second", "lineage second", "verify", "status"])
def test_imported_manifest_is_escaped(words, toys, capsys):
    """An imported artifact brings a manifest that others wrote."""
    toys.add("make", "(ctx.out / 'result.txt').write_text('x')\nctx.metrics['score'] = 1.0")
    pipeline = {"first": {"stage": "make"}, "second": {"stage": "copy", "source": "first"}}
    toys.run(toys.plan(pipeline))
    for name in ("first", "second"):
        place = resolve(toys.store, name) / "manifest.json"
        place.chmod(0o644)
        manifest = json.loads(place.read_text())
        manifest |= {
            "step": HOSTILE, "run": HOSTILE, "overrides": [f"x={HOSTILE}"], "metrics": {f"{name}{HOSTILE}": 1.0},
            "versions": {HOSTILE: HOSTILE}, "device": {"name": HOSTILE}, "attempts": [{"host": HOSTILE}],
        }  # fmt: skip
        manifest["config"][HOSTILE] = HOSTILE
        manifest["outputs"].append({"path": HOSTILE, "bytes": 1, "sha256": "0" * 64})
        place.write_bytes(seal(manifest))
    toys.store.forget()
    code = run_here(*words.split(), f"outputs={toys.outputs}")
    told = capsys.readouterr()
    assert code == (words == "verify"), told.err
    assert told.out
    assert commands_in(told.out + told.err) == set()
