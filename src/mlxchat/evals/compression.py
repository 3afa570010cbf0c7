"""Tokens per text, compared with GPT-2's and GPT-4's tokenizers (`pip install 'mlxchat[compare]'`).

Counterpart of nanochat's tok_eval.py, with other texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tiktoken

from mlxchat.data.tokenizer import Tokenizer
from mlxchat.data.vocabulary import read_vocabulary
from mlxchat.errors import DataError

RIVALS = {"gpt2": "gpt2", "gpt4": "cl100k"}
"""Column of the table → packaged vocabulary."""
KINDS = ("news", "korean", "code", "math", "science")
"""Texts in evals/texts, of the kinds in nanochat's table."""
# Characters per split; nanochat takes a row group of about as many.
_SPLIT_CHARS = 4_000_000


def compression_rows(tokenizer: Tokenizer, splits: dict[str, Iterable[str]]) -> list[dict[str, Any]]:
    """Return the rows of the compression table, for nanochat's texts and the first 4 million characters of each split.

    A row has the text's name, its bytes, and tokens of ours, gpt2 and gpt4 (None: not installed); for each installed
    rival the fraction of tokens that ours saves, and which is better: ours, the rival or tie.
    """
    rivals = {name: _encoding(source) for name, source in RIVALS.items()}
    folder = Path(__file__).with_name("texts")
    texts = {kind: [folder.joinpath(f"{kind}.txt").read_text(encoding="utf-8")] for kind in KINDS}
    rows = []
    for name, documents in (texts | {name: list(_first(split)) for name, split in splits.items()}).items():
        size, ours = (sum(len(each) for each in map(how, documents)) for how in (str.encode, tokenizer.encode))
        row = {
            "text": name, "chars": sum(map(len, documents)), "bytes": size, "ours": ours, "ratio": size / max(1, ours),
        }  # fmt: skip
        for rival, encoding in rivals.items():
            row[rival] = None
            if encoding is not None:
                theirs = sum(len(encoding.encode_ordinary(text)) for text in documents)
                row |= {
                    rival: theirs, f"{rival}_ratio": size / max(1, theirs),
                    f"{rival}_difference": (theirs - ours) / max(1, theirs),
                    f"{rival}_better": "tie" if ours == theirs else "ours" if ours < theirs else rival,
                }  # fmt: skip
        rows.append(row)
    return rows


def print_compression(rows: list[dict[str, Any]]) -> None:
    """Print each text's bytes, tokens, bytes per token, and the savings compared with each rival."""
    rivals = [rival for rival in RIVALS if rows and rows[0][rival] is not None]
    print(f"  {'text':<11}{'bytes':>11}{'tokens':>10}{'ratio':>7}" + "".join(f"{rival:>20}" for rival in rivals))
    for row in rows:
        line = f"  {row['text']:<11}{row['bytes']:>11,}{row['ours']:>10,}{row['ratio']:>7.2f}"
        print(line + "".join(f"{row[rival]:>11,} {row[f'{rival}_difference']:>+8.1%}" for rival in rivals), flush=True)


def _first(documents: Iterable[str]) -> Iterator[str]:
    """Yield documents up to _SPLIT_CHARS characters."""
    chars = 0
    for text in documents:
        yield text
        chars += len(text)
        if chars >= _SPLIT_CHARS:
            return


def _encoding(source: str) -> tiktoken.Encoding | None:
    """Return the encoding of a packaged vocabulary; None: it is not installed."""
    try:
        vocabulary = read_vocabulary(source)
    except DataError:
        return None
    return tiktoken.Encoding(source, pat_str=vocabulary.pattern, mergeable_ranks=vocabulary.ranks, special_tokens={})
