"""Rows packed from documents and from conversations, read in nanochat's order."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from mlxchat.data.packing import IGNORED, RowStream, ShuffledConversations
from mlxchat.data.tokenizer import render_conversation
from mlxchat.data.tokens import Tokens
from parity.values import of_files

each_file = of_files("packing_*.json")
Rows = Iterator[tuple[list[int], list[int]]]


def expected_rows(case: dict[str, Any]) -> Rows:
    for batch in case["batches"]:
        yield from zip(batch["inputs"], batch["targets"], strict=True)


def next_row(rows: RowStream) -> tuple[list[int], list[int]]:
    inputs, targets = rows.next_row()[:2]
    return inputs.tolist(), targets.tolist()


def batches_of_documents(values: dict[str, Any], case: dict[str, Any]) -> Iterator[list[int]]:
    """Yield documents in nanochat's order: a batch ends with its row group."""
    sizes, group = values["shard_sizes"], values["row_group_size"]
    starts = np.cumsum([0, *sizes]).tolist()
    shards = range(len(sizes) - 1) if case["split"] == "train" else range(len(sizes) - 1, len(sizes))
    size = case.get("tokenizer_batch_size", 128)
    while True:
        for shard in shards:
            for start in range(0, sizes[shard], group):
                stop = min(start + group, sizes[shard])
                for part in range(start, stop, size):
                    yield [starts[shard] + index for index in range(part, min(part + size, stop))]


class NanochatOrder:
    """A source of documents in nanochat's order."""

    epoch = 0

    def __init__(self, values: dict[str, Any], documents: list[Any], case: dict[str, Any]) -> None:
        self.documents, self.batches = documents, batches_of_documents(values, case)
        self.left: list[int] = []

    def next(self, count: int) -> list[tuple[int, int]]:
        """Return at most `count` documents of a batch of nanochat's."""
        self.left = self.left or next(self.batches)
        taken, self.left = self.left[:count], self.left[count:]
        return [(index, len(self.documents[index])) for index in taken]

    def length(self, address: int) -> int:
        return len(self.documents[address])

    def ids(self, address: int) -> Any:
        return self.documents[address]


@each_file
def test_rows_of_documents(values):
    """Best fit of jul2026 and the stream of oct2025, of one process from the beginning."""
    encoded = values.tokenizer.encode_documents(values.json["documents"])
    assert [ids.tolist() for ids in encoded] == values.json["token_ids"]
    for packing, key in (("best_fit", "jul2026_bestfit"), ("stream", "oct2025_stream")):
        cases = [case for case in values.json[key] if case["world_size"] == 1 and not case.get("resume_state")]
        assert cases
        for number, case in enumerate(cases):
            source: Any = NanochatOrder(values.json, encoded, case)
            rows = RowStream(
                packing, source, row_tokens=case["T"], batch_rows=case["B"], buffer_size=case.get("buffer_size", 1000)
            )
            for expected in expected_rows(case):
                assert next_row(rows) == expected, (packing, number)


@each_file
def test_rows_of_conversations_by_best_fit(values):
    """Up to the end of the first epoch: after it nanochat lets two epochs share a row, and ours does not.

    nanochat never places a conversation that is longer than a row, and ours cuts it; cases with one are left out.
    """
    tokenizer, lengths, compared = values.tokenizer, values.json["conversation_lengths"], 0
    rendered = [render_conversation(tokenizer, each) for each in values.json["conversations"]]
    assert [len(ids) for ids, _ in rendered] == lengths
    for number, case in enumerate(values.json["chat_jul2026"]):
        used = case["uses_conversations"][case["rank"] :: case["world_size"]]
        if max(lengths[index] for index in used) > case["max_seq_len"] + 1:
            continue
        source = ShuffledConversations(Tokens.of([rendered[index] for index in used], 1 << 16), None)
        size = {"row_tokens": case["max_seq_len"], "buffer_size": case["buffer_size"]}
        rows = RowStream("best_fit", source, **size, padding=tokenizer.bos, train_on="assistant")
        for expected in expected_rows(case):
            got, cursor = next_row(rows), rows.state()["cursor"]
            if cursor["epoch"] or cursor["next"] == len(used):
                break
            assert got == expected, number
            compared += 1
    assert compared


@each_file
def test_rows_of_conversations_of_2025(values):
    """Midtraining packs one stream, in which every token is a target. SFT puts one conversation into each row.

    nanochat's rows are as long as the longest conversation of the batch; ours all have the same length, with padding.
    """
    tokenizer = values.tokenizer
    rendered = [render_conversation(tokenizer, each) for each in values.json["conversations"]]
    for number, case in enumerate(values.json["chat_oct2025"]):
        used, is_stream = case["uses_conversations"], "max_seq_len" in case
        if "mid_train" not in case["generator"]:
            used = used[case["rank"] :: case["world_size"]]
        order = used * 3
        if is_stream:  # a rank takes every world_size-th conversation, round and round
            order = [used[(case["rank"] + step * case["world_size"]) % len(used)] for step in range(10 * len(used))]
        rows = RowStream(
            "stream" if is_stream else "alone",
            ShuffledConversations(Tokens.of([rendered[index] for index in order], 1 << 16), None),
            row_tokens=case["max_seq_len"] if is_stream else max(len(ids) for ids, _ in rendered),
            batch_rows=case.get("device_batch_size", 1),
            padding=tokenizer.bos if is_stream else tokenizer.assistant_end,
            train_on="all" if is_stream else "assistant",
        )
        for expected in expected_rows(case):
            (inputs, targets), length = next_row(rows), len(expected[0])
            assert (inputs[:length], targets[:length]) == expected, number
            assert set(inputs[length:]) <= {tokenizer.assistant_end}
            assert set(targets[length:]) <= {IGNORED}
