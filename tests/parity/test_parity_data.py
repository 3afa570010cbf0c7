"""Tokenizer, conversations and packing agree with nanochat's own code, or depart from it as we say.

The tolerances are those that the values' own README expects of float32.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlxchat.data.conversation import render_conversation, render_for_completion
from mlxchat.data.packing import ConversationRows, DocumentRows
from mlxchat.data.tokenizer import Tokenizer, train_tokenizer
from mlxchat.data.tokens import read_tokens, write_tokens
from mlxchat.errors import DataError

files = pytest.mark.parametrize_files
Read, TokenizerOf = Callable[[Path], Any], Callable[[Path], Tokenizer]


# The tokenizer


@files("tokenizer_*.json")
def test_training_a_tokenizer_agrees(file: Path, read: Read) -> None:
    values = read(file)
    documents = [text[: values["doc_cap_chars"]] for text in values["documents"][: values["num_documents_used"]]]
    trained = train_tokenizer(documents, values["vocab_size"])
    assert trained.special_ids == values["special_tokens"]
    assert trained.token_bytes.tolist() == values["token_bytes"]
    assert list(trained.ranks.values()) == list(range(len(trained.ranks)))


@files("tokenizer_*.json")
def test_ranks_encodings_and_decodings_agree(file: Path, read: Read, tokenizer_of: TokenizerOf) -> None:
    values, tokenizer = read(file), tokenizer_of(file)
    documents = [text[: values["doc_cap_chars"]] for text in values["documents"][: values["num_documents_used"]]]
    assert train_tokenizer(documents, values["vocab_size"]).ranks == tokenizer.ranks
    for case in values["encode"]:
        assert tokenizer.encode(case["text"]) == case["ids"]
        assert tokenizer.decode(case["ids"]) == case.get("decoded", case["text"])
    for case in values["decode"]:
        assert tokenizer.decode(case["ids"]) == case["text"]


@files("tokenizer_*.json")
def test_ties_and_small_corpora_train_alike(file: Path, read: Read) -> None:
    for case in read(file)["training_cases"]:
        if case["resulting_vocab_size"] < case["vocab_size"]:  # ours refuses what nanochat makes smaller in silence
            with pytest.raises(DataError, match=f"only {case['resulting_vocab_size']} tokens"):
                train_tokenizer(case["documents"], case["vocab_size"])
        ranks = train_tokenizer(case["documents"], case["resulting_vocab_size"]).ranks
        learned = [token for token, rank in sorted(ranks.items(), key=lambda item: item[1]) if rank >= 256]
        assert learned == [base64.b64decode(token) for token in case["learned_base64"]], case["name"]


# Conversations


@files("conversation_*.json")
def test_conversations_agree(file: Path, read: Read, tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of(file)
    for case in read(file)["cases"]:
        limit = 2048 if case["max_tokens"] is None else case["max_tokens"]
        assert render_conversation(tokenizer, case["conversation"], limit) == (case["ids"], case["mask"]), case["name"]


@files("conversation_*.json")
def test_completion_prompts_agree_but_long_ones_keep_their_end(
    file: Path, read: Read, tokenizer_of: TokenizerOf
) -> None:
    tokenizer = tokenizer_of(file)
    for case in read(file)["cases"]:
        expected = case.get("completion_ids")
        if not expected:
            continue
        got = render_for_completion(tokenizer, case["conversation"])
        if len(expected) <= 2048:
            assert got == expected, case["name"]
        else:  # nanochat cuts at 2,048
            assert got[:2048] == expected[:2048]
            assert tokenizer.decode(got[-2:]) == "<|user_end|><|assistant_start|>"


@files("conversation_*.json")
def test_what_nanochat_refuses_is_refused(file: Path, read: Read, tokenizer_of: TokenizerOf) -> None:
    tokenizer, accepted = tokenizer_of(file), []
    calls: dict[str, Any] = {
        "render_conversation": render_conversation, "render_for_completion": render_for_completion
    }  # fmt: skip
    for case in read(file)["errors"]:
        try:
            calls[case["call"]](tokenizer, case["conversation"])
        except DataError:
            continue
        except Exception as error:
            accepted.append(f"{case['name']}: {type(error).__name__}")
        else:
            accepted.append(case["name"])
    # A prompt may end with the user's message, as it does in a chat.
    assert accepted == ["completion_last_is_user"]


# Packing


class NanochatBatches:
    """nanochat's reading of a corpus: batches of documents that end with their row group, by rank."""

    def __init__(self, folder: Path, case: dict[str, Any], tokenizer: Tokenizer) -> None:
        self.epoch = 0
        self.batches = self.read(folder, case)
        self.tokenizer, self.documents = tokenizer, []

    def read(self, folder: Path, case: dict[str, Any]) -> Iterator[list[str]]:
        paths = sorted(folder.glob("*.parquet"))
        while True:
            for path in paths[:-1] if case["split"] == "train" else paths[-1:]:
                file = pq.ParquetFile(path)
                for group in range(case["rank"], file.num_row_groups, case["world_size"]):
                    texts = file.read_row_group(group)["text"].to_pylist()
                    size = case.get("tokenizer_batch_size", 128)
                    yield from (texts[start : start + size] for start in range(0, len(texts), size))

    def next(self, count: int) -> list[tuple[int, int]]:
        first = len(self.documents)
        self.documents += self.tokenizer.encode_documents(next(self.batches))
        return [(index, len(self.documents[index])) for index in range(first, len(self.documents))]

    def ids(self, address: int) -> Any:
        return self.documents[address]


@files("packing_*.json")
def test_document_rows_agree(file: Path, read: Read, tokenizer_of: TokenizerOf, tmp_path: Path) -> None:
    values, start = read(file), 0
    for number, size in enumerate(values["shard_sizes"]):
        table = pa.table({"text": values["documents"][start : start + size]})
        pq.write_table(table, tmp_path / f"shard_{number:05d}.parquet", row_group_size=values["row_group_size"])
        start += size
    compared = 0
    for case in values["jul2026_bestfit"]:
        if case["resume_state"] is not None:  # nanochat resumes roughly, ours exactly
            continue
        rows = DocumentRows(
            NanochatBatches(tmp_path, case, tokenizer_of(file)), case["T"], case.get("buffer_size", 1000)
        )
        for batch in case["batches"]:
            for inputs, targets in zip(batch["inputs"], batch["targets"], strict=True):
                got = rows.next_row()
                assert (got[0].tolist(), got[1].tolist()) == (inputs, targets)
                compared += 1
    assert compared > 0


class InOrder(ConversationRows):
    """Conversations as they come, which nanochat's mixture has shuffled before."""

    def _shuffle(self) -> list[int]:
        return list(range(len(self._conversations)))


@files("packing_*.json")
def test_conversation_rows_agree_within_an_epoch(file: Path, read: Read, tokenizer_of: TokenizerOf) -> None:
    """nanochat lets two epochs share a row, and never places a conversation that is longer than a row."""
    values, compared = read(file), 0
    for case in values["chat_jul2026"]:
        used = case["uses_conversations"][case["rank"] :: case["world_size"]]
        longest = max(values["conversation_lengths"][index] for index in used)
        if longest > case["max_seq_len"] + 1 or case["split"] != "train":  # epochs are counted in training only
            continue
        tokenizer, encoded = tokenizer_of(file), BytesIO()
        rendered = (render_conversation(tokenizer, values["conversations"][index], None) for index in used)
        sequences = ((np.array(ids), np.array(mask, dtype=bool)) for ids, mask in rendered)
        write_tokens(encoded, sequences, count=len(used), vocab_size=tokenizer.vocab_size)
        rows = InOrder(
            read_tokens(encoded.getvalue()), padding=tokenizer.bos, row_tokens=case["max_seq_len"],
            buffer_conversations=case["buffer_size"], train_on="assistant", seed=0,
        )  # fmt: skip
        for batch in (batch for batch in case["batches"] if batch["epoch"] == 1):
            for inputs, targets in zip(batch["inputs"], batch["targets"], strict=True):
                got = rows.next_row()
                assert (got[0].tolist(), got[1].tolist()) == (inputs, targets)
                compared += 1
    assert compared > 0
