"""Checkpoints in mlx-lm: equal logits, ids and tokens."""

from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kit import models
from kit.artifacts import make_tokenizer
from mlxchat.data.conversation import render_for_completion
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.model.checkpoint import MODEL_FILE, save_checkpoint
from mlxchat.model.gpt import GPT

mlx_lm = pytest.importorskip("mlx_lm")
# No weight is zero, and windows are shorter than the rows, so that every part matters.
make_model = partial(models.make_model, vocab_size=300, num_layers=4, width=64, context_tokens=512, scale=0.3)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="module", params=["oct2025", "jul2026"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    model = make_model(request.param)
    save_checkpoint(folder, model, tokenizer, {"stage": "sft", "format": "chat"})
    trust = request.param == "jul2026"
    theirs, their_tokenizer = mlx_lm.load(str(folder), trust_remote_code=trust)
    return model, theirs, their_tokenizer


def ids_of(model: GPT, count: int) -> mx.array:
    return mx.array(np.random.default_rng(1).integers(0, model.sizes.vocab_size, (2, count)))


def test_logits_agree_with_and_without_a_cache(opened):
    from mlx_lm.models.cache import make_prompt_cache

    model, theirs, _ = opened
    ids = ids_of(model, 300)
    cache = make_prompt_cache(theirs)
    pieces = [theirs(ids[:, :200], cache), theirs(ids[:, 200:297], cache)]
    pieces += [theirs(ids[:, at : at + 1], cache) for at in range(297, 300)]
    for found in (theirs(ids), mx.concatenate(pieces, axis=1)):
        np.testing.assert_allclose(np.asarray(found), np.asarray(model(ids)), atol=1e-3)


@pytest.mark.parametrize("architecture", ["oct2025", "jul2026"])
def test_logits_agree_beyond_the_context(tmp_path, tokenizer, architecture):
    """Guards against long windows of July 2026 that see all of an input longer than the context (64) in mlx-lm."""
    from mlx_lm.models.cache import make_prompt_cache

    model = make_model(architecture, context_tokens=64)
    save_checkpoint(tmp_path, model, tokenizer, {"stage": "sft", "format": "chat"})
    theirs, _ = mlx_lm.load(str(tmp_path), trust_remote_code=architecture == "jul2026")
    ids = ids_of(model, 200)
    expected, cache = np.asarray(model(ids)), make_prompt_cache(theirs)
    pieces = [theirs(ids[:, :180], cache), *(theirs(ids[:, at : at + 1], cache) for at in range(180, 200))]
    for found in (theirs(ids), mx.concatenate(pieces, axis=1)):
        np.testing.assert_allclose(np.asarray(found), expected, atol=1e-3)


def test_chat_template_renders_the_trained_ids(opened, tokenizer):
    theirs = opened[2]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How many windows had it?  It isn't 12!"},
        {"role": "assistant", "content": "12."},
        {"role": "user", "content": "Why?\n"},
    ]
    expected = render_for_completion(tokenizer, {"messages": messages})
    found = theirs.apply_chat_template(messages, add_generation_prompt=True)
    assert list(found) == list(expected)
    assert theirs.eos_token_ids == {tokenizer.assistant_end}


@pytest.mark.parametrize("feature", [{"query_key_scale": 1.2}, {"window_pattern": "SL"}])
def test_unsupported_features_need_the_model_file(feature, tmp_path, tokenizer):
    """Neither adds parameters, so mlx-lm would load the model and compute something else."""
    model = make_model("oct2025", **feature)
    save_checkpoint(tmp_path, model, tokenizer, {"stage": "sft", "format": "chat"})
    with pytest.raises(ValueError, match=MODEL_FILE):
        mlx_lm.load(str(tmp_path))
    theirs, _ = mlx_lm.load(str(tmp_path), trust_remote_code=True)
    ids = ids_of(model, 300)
    np.testing.assert_allclose(np.asarray(theirs(ids)), np.asarray(model(ids)), atol=1e-3)
