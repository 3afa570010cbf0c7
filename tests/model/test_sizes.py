"""Sizes by depth: the numbers published by nanochat."""

from dataclasses import replace

import pytest

from kit.models import make_model
from mlxchat.composition.compose import compose_config
from mlxchat.model.parameters import flatten_parameters
from mlxchat.model.sizes import GPTSizes, count_parameters, flops_per_token, sizes_of

RECIPE = compose_config(["experiment=speedrun_d20"]).config


def published_sizes(depth: int, num_kv_heads: int | None = None) -> GPTSizes:
    model = replace(RECIPE.model, depth=depth, num_kv_heads=num_kv_heads)
    return sizes_of(model, RECIPE.architecture, RECIPE.tokenizer.vocab_size)


# Vocabulary 65,536 (nanochat, October 2025).
@pytest.mark.parametrize(
    ("depth", "width", "heads", "total", "matrices"),
    [
        (4, 256, 2, 36_700_160, 3_145_728),
        (12, 768, 6, 185_597_952, 84_934_656),
        (20, 1280, 10, 560_988_160, 393_216_000),
        (26, 1664, 13, 1_081_999_360, 863_895_552),
        (34, 2176, 17, 2_217_082_880, 1_931_870_208),
    ],
)
def test_depth_gives_the_published_sizes_and_parameters(depth, width, heads, total, matrices):
    sizes = published_sizes(depth)
    counts = count_parameters(sizes)
    assert (sizes.num_layers, sizes.width, sizes.num_heads, sizes.num_kv_heads) == (depth, width, heads, heads)
    assert (counts["total"], counts["matrices"]) == (total, matrices)
    assert counts["embedding"] == counts["head"] == 65_536 * width
    assert (sizes.head_width, published_sizes(depth, num_kv_heads=2).num_kv_heads) == (128, 2)
    assert depth != 20 or flops_per_token(sizes) == 3_491_758_080


@pytest.mark.parametrize("num_kv_heads", [1, 4])
def test_parameter_counts_are_the_models(num_kv_heads):
    model = make_model(num_kv_heads=num_kv_heads)
    counts = count_parameters(model.sizes)
    held = {name: value.size for name, value in flatten_parameters(model).items()}
    assert counts["total"] == sum(held.values())
    assert counts["matrices"] == sum(size for name, size in held.items() if ".h." in name)
    assert counts["head"] == held["lm_head.weight"]
