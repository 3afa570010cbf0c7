"""Later stages may train a model on rows longer than its context, which lengthens it."""

import json

import pytest

from mlxchat.composition.compose import compose_config
from mlxchat.errors import ConfigError
from mlxchat.pipeline import plan_of
from mlxchat.store.naming import refs_of
from mlxchat.store.store import Store

LONGER = ["midtrain.context_tokens=512", "midtrain.batch.row_tokens=512"]


def test_longer_rows_lengthen_the_context(say, tiny, outputs):
    """The finished run's context is 256."""
    say(*tiny, "targets=[midtrain]", f"outputs={outputs}", *LONGER)
    config = json.loads((refs_of(Store(outputs))["midtrain"] / "config.json").read_text())
    assert config["max_position_embeddings"] == 512


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["midtrain.context_tokens=512"], "rows have 256 tokens.* midtrain.batch.row_tokens=512"),
        (["midtrain.context_tokens=128", "midtrain.batch.row_tokens=128"], "shorter than the context .*: 256"),
        (["sft.context_tokens=384", "sft.batch.row_tokens=384", *LONGER], "sft.context_tokens=384 is shorter .*: 512"),
        (["sft.batch.row_tokens=768", *LONGER], "768 is longer than the context .*: 512.* by sft.context_tokens=768"),
    ],
)
def test_impossible_contexts_are_refused(tiny, tmp_path, settings, message):
    batches = ["midtrain.batch.tokens=null", "sft.batch.tokens=null"]
    config = compose_config([*tiny, *batches, *settings, f"outputs={tmp_path}"]).config
    with pytest.raises(ConfigError, match=message):
        plan_of(config, Store(tmp_path))
