"""mlxchat data: what was fetched from the Hub and elsewhere: fetch it, list it, remove it, look at it."""

from __future__ import annotations

from importlib import import_module

from mlxchat.errors import ConfigError, suggest

# Word → (module in mlxchat.commands, what it does).
_WORDS = {
    "fetch": ("data_fetch", "get everything that a run needs, so that it can run without a network"),
    "ls": ("data_ls", "list what is on this machine: files, size, revision, who needs it"),
    "rm": ("data_rm", "remove a repository or a download"),
    "show": ("data_show", "show conversations of a mixture, suite or stage as a model sees them"),
}


def main(arguments: list[str]) -> int:
    """Run `data WORD`."""
    word, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if word in ("--help", "-h"):
        lines = [f"  {name:<6} {purpose}" for name, (_, purpose) in _WORDS.items()]
        print("usage: mlxchat data WORD [OPTIONS] [SETTINGS]\n\n" + "\n".join(lines))
        print("\nmlxchat data WORD --help tells more.")
        return 0
    if word not in _WORDS:
        raise ConfigError(f'expected mlxchat data {"|".join(_WORDS)}, got "{word}".{suggest(word, _WORDS)}')
    code: int = import_module(f"mlxchat.commands.{_WORDS[word][0]}").main(rest)
    return code
