"""Text of models, files and servers, made safe to print: nothing in it commands the terminal."""

from __future__ import annotations

import re
from typing import Any

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


def filter_logs() -> None:
    """Make the log records and warnings of this process safe to print: libraries quote third-party files in them."""
    import logging  # slow to import for verbs that print a line
    import os
    import warnings

    os.environ["TOKENIZERS_LOG"] = "off"  # its Rust code writes to the terminal past Python, if told to

    class Visible(logging.LogRecord):
        def getMessage(self) -> str:  # noqa: N802  (a method of LogRecord)
            return visible(super().getMessage())

    if logging.getLogRecordFactory() is not logging.LogRecord:
        return
    logging.setLogRecordFactory(Visible)
    # Python has no hook for how the traceback of a log record is written: the method itself is replaced.
    told = logging.Formatter.formatException
    logging.Formatter.formatException = lambda *details: visible(told(*details))  # type: ignore[method-assign]
    plain = warnings.formatwarning
    warnings.formatwarning = lambda *details, **more: visible(plain(*details, **more))
