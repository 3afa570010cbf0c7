"""Collectives give the same bits on every rank, for any array."""

from itertools import combinations_with_replacement, pairwise, product
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit import ranks
from mlxchat.distributed import group as group_module
from mlxchat.distributed.group import Group, deal_padded
from mlxchat.distributed.team import Team

# Values of rank 2; the others have other values of the same shape.
BITS: dict[str, list[int]] = {
    "float32": [0x80000000, 0x7FC00001, 0xFFC00000, 0x7F800000, 0x00000001, 0x3F800000],  # −0.0, NaNs, ∞, denormal, 1
    "bfloat16": [0x8000, 0x7FC1, 0x0001],
    "uint8": [1, 2, 255, 0, 7],
    "int64": [2**53 + 1, -(2**62)],
    "empty": [],
}
MX = {"float32": (np.uint32, mx.float32), "bfloat16": (np.uint16, mx.bfloat16), "uint8": (np.uint8, mx.uint8),
      "int64": (np.int64, mx.int64), "empty": (np.uint32, mx.float32)}  # fmt: skip


def array_of(name: str, *, mine: bool) -> mx.array:
    bits, dtype = MX[name]
    values = np.array(BITS[name], dtype=bits)
    return mx.array(values if mine else np.ones_like(values)).view(dtype)


def bits_of(name: str, array: mx.array) -> list[int]:
    view = {"float32": mx.uint32, "bfloat16": mx.uint16, "empty": mx.uint32}.get(name)
    return np.array(array.view(view) if view else array).tolist()


def use_group(group: Group) -> dict[str, Any]:
    """Run all collectives on each of three ranks."""
    rank, found = group.rank, {}
    found["shared"] = {name: bits_of(name, group.share(array_of(name, mine=rank == 2), 2)) for name in BITS}
    found["scalar"] = group.share(mx.array(3.5 if rank == 0 else 9.0)).item()
    found["shape"] = list(group.share(mx.zeros((2, 0, 3))).shape)
    found["gathered JSON"] = group.gather_json({"rank": rank, "text": "ü" * 40 * rank})
    found["shared JSON"] = group.share_json({"from": rank, "text": "x" * 10_000})
    found["nothing"] = group.share_json() if rank else group.share_json(None)
    ours = {
        "a": mx.full((3, 2), rank + 1.0), "b": mx.array([rank], dtype=mx.int32), "c": mx.array(0.25 * rank),
        "none": mx.zeros((0, 4)), "d": mx.full((5,), 10.0 * rank),
    }  # fmt: skip
    for size in (1, 64 * 2**20):
        group_module.BUCKET_BYTES = size
        found[f"sums {size}"] = {name: np.array(value).tolist() for name, value in group.sum(ours).items()}
    noise = mx.array(np.random.default_rng(rank).normal(size=1001).astype(np.float32))
    found["noise"] = np.array(group.sum({"x": noise})["x"].view(mx.uint32)).tolist()
    found["gathered"] = np.array(group.gather(mx.array([[rank, rank + 10]]))).tolist()
    found["traffic"] = [group.traffic.sent_bytes > 0, group.traffic.seconds > 0]
    return found


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return list(ranks.run_ranks(use_group, 3))


def test_broadcasts_are_bit_exact_from_any_rank(found):
    for each in found:
        assert each["shared"] == BITS
        assert (each["scalar"], each["shape"]) == (3.5, [2, 0, 3])
        assert each["shared JSON"] == {"from": 0, "text": "x" * 10_000}
        assert each["nothing"] is None


def test_values_are_gathered_in_the_order_of_ranks(found):
    for each in found:
        assert each["gathered JSON"] == [{"rank": rank, "text": "ü" * 40 * rank} for rank in range(3)]
        assert each["gathered"] == [[0, 10], [1, 11], [2, 12]]
        assert each["traffic"] == [True, True]


def test_sums_have_equal_bits_on_all_ranks(found):
    for each, bucket in product(found, (64 * 2**20, 1)):
        assert each[f"sums {bucket}"] == {"a": [[6.0, 6.0]] * 3, "b": [3], "c": 0.75, "none": [], "d": [30.0] * 5}
    assert found[0]["noise"] == found[1]["noise"] == found[2]["noise"]
    expected = sum(np.random.default_rng(rank).normal(size=1001).astype(np.float32) for rank in range(3))
    np.testing.assert_allclose(np.array(found[0]["noise"], np.uint32).view(np.float32), expected, atol=1e-6)


class Fake:
    """The part of MLX's group that `part` uses."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank


@settings(max_examples=30)
@given(size=st.integers(1, 20), count=st.integers(0, 100))
def test_parts_are_contiguous_and_as_equal_as_can_be(size, count):
    parts = [range(count)[Group(Fake(rank, size), "ring").part(count)] for rank in range(size)]
    assert [index for part in parts for index in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


# Teams


def remember(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> list[Any]:
    """Keep a count for the next call; return arguments and counts of all ranks."""
    team.kept["count"] = team.kept.get("count", 0) + request["add"] * (1 + team.group.rank)
    seen = {name: [str(array.dtype), np.array(array.astype(mx.float32)).tolist()] for name, array in arrays.items()}
    return team.group.gather_json([team.group.rank, team.kept["count"], request, seen])


def lead(team: Team) -> list[Any]:
    given = {
        "ids": np.arange(4, dtype=np.int32).reshape(2, 2), "half": mx.array([1.5, -2.0], dtype=mx.bfloat16),
        "none": mx.zeros((0, 3)), "sign": mx.array(-0.0),
    }  # fmt: skip
    return [team.call(remember, {"add": 1}, given), team.call(remember, {"add": 10}), len(team.kept)]


def test_all_ranks_call_the_function_with_equal_arguments():
    first, second, _ = ranks.lead_ranks(lead, 3)
    seen = {
        "ids": ["mlx.core.int32", [[0.0, 1.0], [2.0, 3.0]]], "half": ["mlx.core.bfloat16", [1.5, -2.0]],
        "none": ["mlx.core.float32", []], "sign": ["mlx.core.float32", -0.0],
    }  # fmt: skip
    assert first == [[rank, 1 + rank, {"add": 1}, seen] for rank in range(3)]
    assert all(str(each[3]["sign"][1]) == "-0.0" for each in first)
    assert second == [[rank, 11 * (1 + rank), {"add": 10}, {}] for rank in range(3)]
    assert Team().call(remember, {"add": 2}) == [[0, 2, {"add": 2}, {}]]


def leave(group: Group) -> str:
    """Rank 1 ends at once; the others run collectives."""
    if group.rank == 1:
        return "left"
    try:
        for _ in range(1000):
            group.share_json({"a": 1})
    except group_module.PeerLost as error:
        return str(error)
    return "not detected"


def test_a_lost_rank_raises_peer_lost():
    results = ranks.run_ranks(leave, 2, fresh=True)
    assert results[1] == "left"
    assert "another process of the group is gone" in results[0]


# Dealing


def cost(lengths: list[int]) -> int:
    return len(lengths) * max(lengths, default=0)


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_the_most_expensive_part_has_the_least_possible_cost(parts):
    rng = np.random.default_rng(parts)
    for count in range(9):
        lengths = rng.integers(1, 40, count).tolist()
        dealt = deal_padded(lengths, parts)
        assert len(dealt) == parts
        assert [length for part in dealt for length in lengths[part]] == lengths
        borders = [(0, *cuts, count) for cuts in combinations_with_replacement(range(count + 1), parts - 1)]
        best = min(max(cost(lengths[start:stop]) for start, stop in pairwise(cuts)) for cuts in borders)
        assert max(cost(lengths[part]) for part in dealt) == best
