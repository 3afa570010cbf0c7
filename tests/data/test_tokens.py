"""Token files: round trip, safetensors format, damage."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.text import write_sequences
from mlxchat.data.tokens import FILE, Tokens, open_tokens, read_tokens
from mlxchat.errors import DataError

SEQUENCES = st.lists(st.lists(st.integers(0, 299), max_size=9), max_size=9)


def write(sequences: list[list[int]], *, vocab_size: int = 300, masks: bool = False) -> bytes:
    pairs = ((ids, [token % 2 == 0 for token in ids] if masks else None) for ids in sequences)
    return write_sequences(pairs, vocab_size=vocab_size)


def as_lists(tokens: Tokens) -> list[list[int]]:
    return [tokens.ids(index).tolist() for index in range(len(tokens))]


@given(SEQUENCES, st.booleans())
def test_round_trip_with_and_without_masks(sequences, masks):
    tokens = read_tokens(write(sequences, masks=masks))
    assert as_lists(tokens) == sequences
    assert tokens.lengths(0, len(tokens)) == [len(ids) for ids in sequences]
    if masks and sequences:
        found = [tokens.trained(index).tolist() for index in range(len(tokens))]
        assert found == [[token % 2 == 0 for token in ids] for ids in sequences]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(300, np.uint16), (1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_ids_have_the_narrowest_type(vocab_size, dtype):
    largest = vocab_size - 1
    tokens = read_tokens(write([[largest]], vocab_size=vocab_size))
    assert tokens.flat.dtype == dtype
    assert as_lists(tokens) == [[largest]]


def test_truncated_file_is_refused(tmp_path):
    whole = write([[1, 2, 3], [4]], masks=True)
    for length in range(len(whole)):
        (tmp_path / FILE).write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"tokens\.safetensors is damaged.*Remove the folder"):
            open_tokens(tmp_path)


def test_tokens_are_memory_mapped(tmp_path):
    (tmp_path / FILE).write_bytes(write([[1, 2, 3], [4]]))
    tokens = open_tokens(tmp_path)
    assert as_lists(tokens) == [[1, 2, 3], [4]]
    assert not tokens.flat.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        tokens.ids(0)[0] = 5
