"""Distribution of parameters to ranks: every row once, about equal work, for any number of ranks."""

from collections import defaultdict
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.models import make_model
from kit.training import make_optimizer
from mlxchat.model.gpt import GPT
from mlxchat.optim.optimizer import Optimizer
from mlxchat.optim.sharding import deal_pieces

OPTIONS = ["muon_oct2025", "muon_jul2026", "adamw"]


def model_of(num_layers: int, *, newer: bool) -> GPT:
    return make_model(
        "jul2026" if newer else "oct2025", vocab_size=61, num_layers=num_layers, num_heads=2, num_kv_heads=1, width=16,
        context_tokens=32, **({"vocab_multiple": 8} if newer else {}),
    )  # fmt: skip


@cache
def optimizer_of(option: str, num_layers: int, *, newer: bool) -> Optimizer:
    return make_optimizer(model_of(num_layers, newer=newer), option)


@settings(max_examples=30)
@given(size=st.integers(1, 40), num_layers=st.integers(1, 5), newer=st.booleans(), option=st.sampled_from(OPTIONS))
def test_every_row_is_on_one_rank(size, num_layers, newer, option):
    optimizer = optimizer_of(option, num_layers, newer=newer)
    dealt = deal_pieces(optimizer, size)
    assert len(dealt) == size
    rows: dict[str, list[int]] = defaultdict(list)
    for own in dealt:
        assert len({piece.name for piece in own}) == len(own)
        for piece in own:
            rows[piece.name] += range(piece.start, piece.stop)
            assert piece.shape == (piece.stop - piece.start, *optimizer.shapes[piece.name][1:])
            is_matrix = any(piece.name in names for names in optimizer.muon_shapes.values())
            assert not is_matrix or piece.shape == optimizer.shapes[piece.name], "Muon needs whole matrices"
    assert {name: sorted(found) for name, found in rows.items()} == {
        name: list(range(shape[0])) for name, shape in optimizer.shapes.items()
    }


@pytest.mark.parametrize("option", OPTIONS)
@settings(max_examples=12)
@given(size=st.integers(1, 12))
def test_work_per_rank_is_bounded(option, size):
    optimizer = optimizer_of(option, 5, newer=True)
    work = []
    for own in deal_pieces(optimizer, size):
        work.append(sum(optimizer.costs({piece.name: piece.shape for piece in own}).values()))
    whole = optimizer.costs(optimizer.shapes)
    # Plus one row of each cut parameter, because rows do not divide evenly.
    uneven = sum(np.prod(optimizer.shapes[name][1:]) for name in optimizer.adamw_rules)
    largest = max((whole[name] for names in optimizer.muon_shapes.values() for name in names), default=0.0)
    assert max(work) <= sum(whole.values()) / size + largest + uneven
