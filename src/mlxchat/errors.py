"""Errors and their messages; `visible` and `redact`, through which everything printed goes.

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

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar


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

    def written_out(found: re.Match[str]) -> str:
        code = ord(found[0])
        return f"\\x{code:02x}" if code < 0x20 else f"\\u{code:04x}"

    return _COMMANDING.sub(written_out, str(text).replace("\r\n", "\n"))


# HF_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY, DB_PASSWORD, but not TOKENIZERS_PARALLELISM.
_NAME = re.compile(r"(^|_)(TOKEN|(API|ACCESS|PRIVATE)_?KEY)$|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
# Shorter values occur in other text by chance.
_SHORTEST = 6

T = TypeVar("T")


def redact(value: T) -> T:
    """Return text or plain nested data in which every secret of the environment is replaced by the variable's name."""
    secrets = _secrets()
    return _replace(value, secrets) if secrets else value  # type: ignore[return-value]  # of the same type


def _secrets() -> dict[str, str]:
    """Return secret → replacement, the longest first, since one may contain another."""
    found: dict[str, str] = {}
    for name, value in os.environ.items():
        if _NAME.search(name) and len(value.strip()) >= _SHORTEST:
            from urllib.parse import quote

            for form in (value, value.strip(), quote(value.strip(), safe="")):
                found.setdefault(form, f"<{name}>")
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def _replace(value: object, secrets: Mapping[str, str]) -> object:
    if isinstance(value, str):
        for secret, name in secrets.items():
            value = value.replace(secret, name)
        return value
    if isinstance(value, Mapping):
        return {_replace(key, secrets): _replace(item, secrets) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_replace(item, secrets) for item in value])
    return value
