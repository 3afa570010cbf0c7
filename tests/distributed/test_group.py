"""Collectives give the same bits on every rank, for any array."""

from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from distributed import ranks
from mlxchat.distributed import team as team_module
from mlxchat.distributed.team import Group

NOT_A_NUMBER = [0x80000000, 0x7FC00001, 0xFFC00000, 0x7F800000, 0x00000001]  # bits of −0.0, NaNs, ∞, a denormal
INTEGERS = [2**53 + 1, -(2**62)]


def use_group(group: Group) -> dict[str, Any]:
    """Run all collectives on each of three ranks."""
    rank, found = group.rank, {}
    bits = mx.array(NOT_A_NUMBER if rank == 2 else [1] * len(NOT_A_NUMBER), dtype=mx.uint32)
    found["floats"] = np.array(group.share(bits.view(mx.float32), 2).view(mx.uint32)).tolist()
    found["integers"] = np.array(group.share(mx.array(INTEGERS if rank == 2 else [0, 0], dtype=mx.int64), 2)).tolist()
    found["empty"] = list(group.share(mx.zeros((2, 0, 3))).shape)
    found["gathered JSON"] = group.gather_json({"rank": rank, "text": "ü" * 40 * rank})
    found["shared JSON"] = group.share_json({"from": rank, "text": "x" * 10_000})
    ours = {
        "a": mx.full((3, 2), rank + 1.0), "b": mx.array([rank], dtype=mx.int32), "none": mx.zeros((0, 4)),
        "d": mx.full((5,), 10.0 * rank),
    }  # fmt: skip
    for size in (1, 64 * 2**20):
        team_module.BUCKET_BYTES = size
        found[f"sums {size}"] = {name: np.array(value).tolist() for name, value in group.sum(ours).items()}
    noise = mx.array(np.random.default_rng(rank).normal(size=1001).astype(np.float32))
    found["noise"] = np.array(group.sum({"x": noise})["x"].view(mx.uint32)).tolist()
    found["gathered"] = np.array(group.gather(mx.array([[rank, rank + 10]]))).tolist()
    found["parts"] = [list(range(count)[group.part(count)]) for count in range(6)]
    return found


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return list(ranks.run_ranks(use_group, 3))


def test_broadcasts_are_bit_exact_and_gathers_in_the_order_of_ranks(found):
    for each in found:
        assert (each["floats"], each["integers"], each["empty"]) == (NOT_A_NUMBER, INTEGERS, [2, 0, 3])
        assert each["shared JSON"] == {"from": 0, "text": "x" * 10_000}
        assert each["gathered JSON"] == [{"rank": rank, "text": "ü" * 40 * rank} for rank in range(3)]
        assert each["gathered"] == [[0, 10], [1, 11], [2, 12]]


def test_sums_have_equal_bits_on_all_ranks(found):
    for each, bucket in product(found, (64 * 2**20, 1)):
        assert each[f"sums {bucket}"] == {"a": [[6.0, 6.0]] * 3, "b": [3], "none": [], "d": [30.0] * 5}
    assert found[0]["noise"] == found[1]["noise"] == found[2]["noise"]
    expected = sum(np.random.default_rng(rank).normal(size=1001).astype(np.float32) for rank in range(3))
    np.testing.assert_allclose(np.array(found[0]["noise"], np.uint32).view(np.float32), expected, atol=1e-6)
