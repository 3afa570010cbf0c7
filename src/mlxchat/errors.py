"""Errors, and their messages on the command line.

MlxchatError            one clear message, no traceback, exit code 2
├── ConfigError         the configuration, a file of it, or an override
├── DataError           a document, conversation, shard or artifact that cannot be read
├── StoreError          the outputs folder: not writable, damaged, no such artifact
├── PassingError        transient external failure: the same command may succeed (exit code 1)
├── StepFailed          a step raised or did not write its outputs (exit code 1)
│   └── PeerLost        another rank of the run has ended
└── Interrupted         a signal stopped the run at a safe point (exit code 128 + signal)

`MLXCHAT_DEBUG=1` shows the traceback in every case. Programming errors are plain assertions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any


class MlxchatError(Exception):
    """An error that the user can fix. The message says where, what was expected, and what to do."""

    exit_code = 2

    def __str__(self) -> str:
        """Return the message with its control characters written out: it may quote files and servers of others."""
        return visible(super().__str__())


class ConfigError(MlxchatError):
    """The configuration cannot be used."""


class DataError(MlxchatError):
    """Data cannot be read or does not have the promised form."""


class StoreError(MlxchatError):
    """The outputs folder cannot be used or lacks what was asked for."""


class PassingError(MlxchatError):
    """Transient external failure; the same command may succeed."""

    exit_code = 1


class StepFailed(MlxchatError):
    """A step raised, or did not write a declared output."""

    exit_code = 1


class PeerLost(StepFailed):
    """Another rank of the run has ended."""


class Interrupted(MlxchatError):
    """A signal stopped the run at a point from which it can continue."""

    def __init__(self, message: str, signal_number: int) -> None:
        """Keep the signal, since the exit code is 128 plus its number."""
        super().__init__(message)
        self.exit_code = 128 + signal_number


def suggest(name: str, choices: Iterable[str]) -> str:
    """Return ' Did you mean "x"?' for the nearest of `choices`, or an empty string."""
    import difflib  # only when there is something to mend

    near = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f' Did you mean "{near[0]}"?' if near else ""


# C0 but tab and newline, DEL, C1 (one byte of them begins a sequence as ESC does), what turns the direction of writing
# around, and halves of characters, which no stream can encode.
_COMMANDING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: Any) -> str:
    r"""Return text in which control characters, bidirectional overrides and lone surrogates are written out.

    ESC becomes \x1b, a right-to-left override \u202e. In JSON the result means the same, since json.dumps has escaped
    what has the short form.
    """
    return _COMMANDING.sub(_written_out, str(text).replace("\r\n", "\n"))


def _written_out(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x20 else f"\\u{code:04x}"
