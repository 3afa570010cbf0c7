"""Trains a tokenizer with rustbpe in a separate process, and counts tokens per text in comparison with others.

rustbpe's merging holds the interpreter's lock for minutes. In a process of its own it can be killed at any moment, and
its memory is freed at its end. Counterpart of nanochat's tok_train.py and tok_eval.py, with other texts.
"""

import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import rustbpe
import tiktoken

from mlxchat.config.schema import TokenizerConfig
from mlxchat.config.wording import format_count
from mlxchat.data.sources import LISTING, Corpus
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.data.vocabulary import PATTERNS, SPECIAL_TOKENS, SPLIT_PATTERN, read_vocabulary
from mlxchat.errors import DataError, StepFailed
from mlxchat.runner.context import Context
from mlxchat.runner.process import SIGNALS
from mlxchat.store.files import read_json

_LOOK_SECONDS = 0.1


def train_tokenizer(texts: Iterable[str], vocab_size: int, pattern: str = SPLIT_PATTERN) -> Tokenizer:
    """Train on texts, most frequent pair first, until the vocabulary (special tokens included) is full."""
    return _tokenizer_of(_learn(texts, vocab_size - len(SPECIAL_TOKENS), pattern), vocab_size, pattern)


def train_on_corpus(ctx: Context, corpus: Path, config: TokenizerConfig) -> Tokenizer:
    """Return a tokenizer trained on the first `max_chars` of a corpus; numbers go to the step's metrics."""
    began = time.monotonic()
    spawning = multiprocessing.get_context("spawn")
    chars, results = spawning.Value("q", 0), spawning.Queue()
    given = corpus, config, ctx.hints.get("train_chars"), chars, results
    process = spawning.Process(target=_train, args=given, daemon=True)
    known_chars = (read_json(corpus / LISTING) or {}).get("train_chars")
    total = min(config.max_chars, int(known_chars or config.max_chars))
    process.start()
    try:
        with ctx.progress(total, "chars") as bar:
            found: Any = None
            while found is None:
                if ctx.should_stop():
                    raise ctx.stop(f"its beginning: {chars.value:,} characters are read again")
                is_alive = process.is_alive()
                speed = chars.value / max(1e-9, time.monotonic() - began)
                bar.update(min(chars.value, total), speed=f"{format_count(speed)} chars/s")
                with suppress(queue.Empty):
                    found = results.get(timeout=_LOOK_SECONDS)
                if found is None and not is_alive:
                    how = f"with exit code {process.exitcode} (negative: by that signal)"
                    raise StepFailed(f"the tokenizer's training process ended {how}; its output is above")
    finally:
        process.kill()
        process.join()
    if isinstance(found, Exception):
        raise found
    ctx.metrics["trained_chars"] = chars.value
    ctx.metrics["chars_per_second"] = chars.value / max(1e-9, time.monotonic() - began)
    return _tokenizer_of(found, config.vocab_size, PATTERNS[config.pattern])


def _tokenizer_of(ranks: dict[bytes, int], vocab_size: int, pattern: str) -> Tokenizer:
    found = len(ranks) + len(SPECIAL_TOKENS)
    if found < vocab_size:
        advice = "Lower it, or give more text."
        raise DataError(f"tokenizer.vocab_size is {vocab_size}, but the corpus yields only {found} tokens. {advice}")
    return Tokenizer(ranks, pattern)


def _learn(texts: Iterable[str], num_tokens: int, pattern: str) -> dict[bytes, int]:
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), num_tokens, pattern=pattern)
    return {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}


def _train(corpus: Path, config: TokenizerConfig, ahead_chars: float | None, chars: Any, results: Any) -> None:
    """Send token → id, or the error: the work of the separate process. `chars` counts what was read so far."""
    for number in SIGNALS:  # Ctrl-C reaches all processes of a terminal; the parent kills this one
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=[multiprocessing.parent_process()], daemon=True).start()

    def texts() -> Iterator[str]:
        for document in Corpus.open(corpus).documents("train", ahead_chars):
            text = document[: config.document_chars]
            chars.value += len(text)
            yield text
            if chars.value > config.max_chars:
                return

    try:
        results.put(_learn(texts(), config.vocab_size - len(SPECIAL_TOKENS), PATTERNS[config.pattern]))
    except Exception as error:
        results.put(error)


def _end_with_parent(parent: Any) -> None:
    parent.join()
    os._exit(1)


# Compression, compared with GPT-2's and GPT-4's tokenizers (`pip install 'mlxchat[compare]'`)

RIVALS = {"gpt2": "gpt2", "gpt4": "cl100k"}  # column of the table → packaged vocabulary
KINDS = ("news", "korean", "code", "math", "science")  # texts in data/texts, of the kinds in nanochat's table
# Characters per split; nanochat takes a row group of about as many.
_SPLIT_CHARS = 4_000_000


def compression_rows(tokenizer: Tokenizer, splits: Mapping[str, Iterable[str]]) -> list[dict[str, Any]]:
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
