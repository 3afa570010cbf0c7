"""Distribution of parameters to ranks: every row once, for any number of ranks."""

from collections import defaultdict
from functools import cache

from hypothesis import given, settings
from hypothesis import strategies as st

from kit.models import make_model
from kit.training import make_optimizer
from mlxchat.optim.optimizer import Optimizer
from mlxchat.optim.sharding import deal_pieces


@cache
def optimizer_of(option: str, architecture: str, num_layers: int) -> Optimizer:
    model = make_model(architecture, vocab_size=61, num_layers=num_layers, num_heads=2, num_kv_heads=1, width=16)
    return make_optimizer(model, option)


@settings(max_examples=30)
@given(
    size=st.integers(1, 40),
    num_layers=st.integers(1, 5),
    architecture=st.sampled_from(["oct2025", "jul2026"]),
    option=st.sampled_from(["muon_oct2025", "muon_jul2026", "adamw"]),
)
def test_every_row_is_on_one_rank(size, num_layers, architecture, option):
    optimizer = optimizer_of(option, architecture, num_layers)
    dealt = deal_pieces(optimizer, size)
    assert len(dealt) == size
    rows: dict[str, list[int]] = defaultdict(list)
    for own in dealt:
        assert len({piece.name for piece in own}) == len(own)
        for piece in own:
            rows[piece.name] += range(piece.start, piece.stop)
            assert piece.shape == (piece.stop - piece.start, *optimizer.shapes[piece.name][1:])
            is_matrix = any(piece.name in names for names in optimizer.stacks.values())
            assert not is_matrix or piece.shape == optimizer.shapes[piece.name], "Muon needs whole matrices"
    assert {name: sorted(found) for name, found in rows.items()} == {
        name: list(range(shape[0])) for name, shape in optimizer.shapes.items()
    }
