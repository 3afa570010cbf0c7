"""packing_*.json: rows packed from documents and from conversations, read in nanochat's order."""

import bisect
from collections.abc import Iterator
from typing import Any

import numpy as np
from comparison import Comparison, Quantity, same
from parity_file import ParityFile

from mlxchat.data.conversation import render_conversation
from mlxchat.data.packing import (
    IGNORED,
    EndOfText,
    Row,
    RowStream,
    ShuffledConversations,
)  # fmt: skip
from mlxchat.data.tokens import Address, Array, Tokens


class NanochatOrder:
    """A source that yields documents in nanochat's order: a batch ends with its row group, and each rank has its own.

    It starts at the case's `resume_state`, if it has one.
    """

    def __init__(self, file: ParityFile, documents: list[Array], case: dict[str, Any]) -> None:
        self.epoch = 0
        self._documents = documents
        self._batches = self._read(file.json, case)
        self._left: list[int] = []

    def _read(self, values: dict[str, Any], case: dict[str, Any]) -> Iterator[list[int]]:
        sizes, group, world = values["shard_sizes"], values["row_group_size"], case["world_size"]
        starts = np.cumsum([0, *sizes]).tolist()
        shards = range(len(sizes) - 1) if case["split"] == "train" else range(len(sizes) - 1, len(sizes))
        resume = case.get("resume_state")
        first, first_group = (resume["pq_idx"], resume["rg_idx"]) if resume else (0, None)
        size = case.get("tokenizer_batch_size", 128)
        while True:
            for place, shard in enumerate(shards):
                if place < first:
                    continue
                begin = case["rank"]
                if first_group is not None:
                    begin, first_group = (first_group // world + 1) * world + case["rank"], None
                for start in range(begin * group, sizes[shard], world * group):
                    stop = min(start + group, sizes[shard])
                    for part in range(start, stop, size):
                        yield [starts[shard] + index for index in range(part, min(part + size, stop))]
            first = 0

    def next(self, count: int) -> list[tuple[Address, int]]:
        """Return at most `count` documents of a batch of nanochat's."""
        self._left = self._left or next(self._batches)
        taken = self._left[:count]
        self._left = self._left[count:]
        return [((0, index), len(self._documents[index])) for index in taken]

    def length(self, address: Address) -> int:
        return len(self._documents[address[1]])

    def ids(self, address: Address) -> Array:
        return self._documents[address[1]]

    def name(self, address: Address) -> str:
        """Return the name that messages give a document."""
        return f"document {address[1]}"

    def state(self) -> dict[str, Any]:
        """Return an empty state: this source is read only once."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def documents(file: ParityFile) -> Iterator[Comparison]:
    """Compare the token ids of documents, and rows packed from them, also for several ranks and after a resume."""
    encoded = file.tokenizer().encode_documents(file.json["documents"])
    yield same(
        "ids of documents",
        (
            (str(number), got.tolist(), expected)
            for number, (got, expected) in enumerate(zip(encoded, file.json["token_ids"], strict=True))
        ),
    )
    pairs = []
    for number, case in enumerate(file.json["jul2026_bestfit"]):
        source = NanochatOrder(file, encoded, case)
        rows = RowStream("best_fit", source, row_tokens=case["T"], buffer_size=case.get("buffer_size", 1000))
        pairs += _rows(number, rows, case)
    yield same("rows of documents, best fit", pairs)


def conversations(file: ParityFile) -> Iterator[Comparison]:
    """Compare rows of conversations up to the end of the first epoch.

    After that nanochat lets two epochs share a row, and ours does not. Cases with a conversation that is longer than
    a row, which nanochat never places and ours cuts, are compared in `long_conversations`.
    """
    values, tokenizer = file.json, file.tokenizer()
    rendered = [render_conversation(tokenizer, conversation) for conversation in values["conversations"]]
    lengths = values["conversation_lengths"]
    yield same(
        "lengths of conversations",
        ((str(number), len(ids), lengths[number]) for number, (ids, _) in enumerate(rendered)),
    )
    pairs = []
    for number, case in enumerate(values["chat_jul2026"]):
        used = case["uses_conversations"][case["rank"] :: case["world_size"]]
        if max(lengths[index] for index in used) > case["max_seq_len"] + 1:
            continue
        tokens = Tokens.of([rendered[index] for index in used], 1 << 16)
        rows = _best_fit(RowStream, tokens, case, tokenizer.bos)
        for inputs, targets in _expected_rows(case["batches"]):
            got = rows.next_row()
            position = rows.state()["cursor"]
            if position["epoch"] or position["next"] == len(used):
                break
            pairs.append((f"case {number}", (got[0].tolist(), got[1].tolist()), (inputs, targets)))
    yield same("rows of conversations, best fit", pairs)


def streams(file: ParityFile) -> Iterator[Comparison]:
    """Compare rows of one token stream, as nanochat pretrained in 2025."""
    encoded = file.tokenizer().encode_documents(file.json["documents"])
    pairs = []
    for number, case in enumerate(file.json["oct2025_stream"]):
        source = NanochatOrder(file, encoded, case)
        rows = RowStream("stream", source, row_tokens=case["T"], batch_rows=case["B"])
        pairs += _rows(number, rows, case)
    yield same("rows of one token stream, oct2025", pairs)


def conversations_of_2025(file: ParityFile) -> Iterator[Comparison]:
    """Compare the rows of nanochat's midtraining and SFT of 2025.

    Midtraining packs one stream, in which every token is a target. SFT puts one conversation into each row; nanochat's
    rows are as long as the longest conversation of the batch, and ours all have the same length, with padding.
    """
    values, tokenizer = file.json, file.tokenizer()
    rendered = [render_conversation(tokenizer, conversation) for conversation in values["conversations"]]
    pairs: dict[str, list[tuple[str, Any, Any]]] = {"stream": [], "alone": []}
    for number, case in enumerate(values["chat_oct2025"]):
        used = case["uses_conversations"]
        used = used[case["rank"] :: case["world_size"]] if "mid_train" not in case["generator"] else used
        packing = "stream" if "max_seq_len" in case else "alone"
        if packing == "stream":  # a rank takes every world_size-th conversation, round and round
            order = [used[(case["rank"] + step * case["world_size"]) % len(used)] for step in range(10 * len(used))]
        else:
            order = used * 3
        row_tokens = case.get("max_seq_len") or max(len(ids) for ids, _ in rendered)
        rows = _in_order(packing, [rendered[index] for index in order], row_tokens, case, tokenizer)
        for inputs, targets in _expected_rows(case["batches"]):
            got, length = rows.next_row(), len(inputs)
            beyond = set(got[0][length:].tolist()) <= {tokenizer.assistant_end} and (got[1][length:] == IGNORED).all()
            found = (got[0][:length].tolist(), got[1][:length].tolist(), bool(beyond))
            pairs[packing].append((f"case {number}", found, (inputs, targets, True)))
    yield same("rows of conversations as one stream, oct2025", pairs["stream"])
    yield same("rows of one conversation each, oct2025", pairs["alone"])


def _in_order(packing: str, sequences: list[Any], row_tokens: int, case: dict[str, Any], tokenizer: Any) -> RowStream:
    """Return rows packed from rendered conversations in the given order."""
    is_stream = packing == "stream"
    return RowStream(
        packing,
        ShuffledConversations(Tokens.of(sequences, 1 << 16), None),
        row_tokens=row_tokens,
        batch_rows=case.get("device_batch_size", 1),
        padding=tokenizer.bos if is_stream else tokenizer.assistant_end,
        train_on="all" if is_stream else "assistant",
    )


def long_conversations(file: ParityFile) -> Iterator[Comparison]:
    """Compare rows where some conversations are longer than a row, with packing that never places those."""
    values, tokenizer = file.json, file.tokenizer()
    lengths, pairs = values["conversation_lengths"], []
    for number, case in enumerate(values["chat_jul2026"]):
        used = case["uses_conversations"][case["rank"] :: case["world_size"]]
        capacity = case["max_seq_len"] + 1
        if max(lengths[index] for index in used) <= capacity:
            continue
        rendered = [render_conversation(tokenizer, values["conversations"][index]) for index in used]
        rows = _best_fit(NeverPlaced, Tokens.of(rendered, 1 << 16), case, tokenizer.bos)
        pairs += _rows(number, rows, case)
    if pairs:
        yield same("rows where a conversation is longer than a row", pairs)


def _best_fit(kind: type[RowStream], tokens: Tokens, case: dict[str, Any], bos: int) -> RowStream:
    source = ShuffledConversations(tokens, None)
    size = {"row_tokens": case["max_seq_len"], "buffer_size": case["buffer_size"]}
    return kind("best_fit", source, **size, padding=bos, train_on="assistant")


class NeverPlaced(RowStream):
    """Packing as in nanochat: conversations longer than a row are never placed, and epochs share rows."""

    def next_row(self) -> Row:
        """Return the next row, which is only padding if no buffered conversation fits."""
        try:
            return super().next_row()
        except EndOfText:
            ids = np.full(self._row_tokens, self._padding, np.int32)
            return ids, np.full_like(ids, IGNORED)

    def _fill(self, *, row_is_begun: bool) -> None:
        while len(self._buffer) < self._buffer_size:
            ((index, length),) = self._source.next(1)
            bisect.insort(self._buffer, (length, self._arrivals, index))
            self._arrivals += 1


QUANTITIES: tuple[Quantity, ...] = (documents, conversations, streams, conversations_of_2025, long_conversations)


def _expected_rows(batches: list[dict[str, Any]]) -> Iterator[tuple[list[int], list[int]]]:
    for batch in batches:
        yield from zip(batch["inputs"], batch["targets"], strict=True)


def _rows(number: int, rows: RowStream, case: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield our rows of a case, each with nanochat's."""
    for expected in _expected_rows(case["batches"]):
        inputs, targets = rows.next_row()[:2]
        yield f"case {number}", (inputs.tolist(), targets.tolist()), expected
