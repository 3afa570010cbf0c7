"""The n-gram baseline equals the same model with dictionaries, byte by byte."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from mlxchat.data.bpe import train_tokenizer
from mlxchat.evals.bpb import ngram_bits_per_byte, texts_of_rows

TRAINING = ["the cat sat on the mat.", "the dog sat; naïve café!", "on and on and on", "x"]
HELD_OUT = ["the cat and the dog", "zebra ünseen", "on"]


def slow_bits_per_byte(training: list[str], held_out: list[str]) -> float:
    """Witten-Bell: P(c | context) = (count + kinds × P(c | shorter context)) / (total + kinds)."""

    def to_bytes(documents: list[str]) -> bytes:
        return b"\0\0" + b"\0".join(document.encode() for document in documents)

    train, test = to_bytes(training), to_bytes(held_out)
    followers: dict[bytes, Counter[int]] = defaultdict(Counter)
    for order in (0, 1, 2):
        for end in range(order, len(train)):
            followers[train[end - order : end]][train[end]] += 1

    def probability(context: bytes, byte: int) -> float:
        lower = probability(context[1:], byte) if context else 1 / 256
        seen = followers.get(context)
        if not seen:
            return lower
        return (seen[byte] + len(seen) * lower) / (seen.total() + len(seen))

    bits = [-math.log2(probability(test[end - 2 : end], test[end])) for end in range(2, len(test)) if test[end]]
    return sum(bits) / len(bits)


@pytest.mark.parametrize(
    ("training", "held_out"),
    [(TRAINING, HELD_OUT), (TRAINING, TRAINING), (["a"], HELD_OUT), ([""], HELD_OUT), ([], ["a"])],
)
def test_bits_per_byte_equal_a_slow_model(training, held_out):
    assert ngram_bits_per_byte(training, held_out) == pytest.approx(slow_bits_per_byte(training, held_out), rel=1e-9)


def test_baseline_text_is_the_text_of_the_rows():
    tokenizer = train_tokenizer(TRAINING, 290)
    first, second = ([tokenizer.bos, *tokenizer.encode(text)] for text in HELD_OUT[:2])
    whole, cropped = [*first, *second, -1, -1], second[:4]
    rows = [(np.maximum(row[:-1], 0).astype(np.int32), np.array(row[1:], np.int32)) for row in (whole, cropped)]
    texts = [text for text in texts_of_rows(rows, tokenizer) if text]
    assert texts == [*HELD_OUT[:2], tokenizer.decode(second[1:4])]
