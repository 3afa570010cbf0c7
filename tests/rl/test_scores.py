"""Log-probabilities of RL: those of the model's whole distribution, and those that the engine reports."""

import mlx.core as mx
import numpy as np

from kit.models import make_model
from kit.training import rollout_of
from mlxchat.engine.generate import Engine
from mlxchat.model.lora import packed_copy
from mlxchat.rl.rollouts import PolicyScores


def test_scores_are_those_of_the_whole_distribution(path):
    """Against NumPy's log-softmax of the model's logits, 1e-4."""
    model, draw = make_model(), np.random.default_rng(0)
    ids = draw.integers(0, 200, (5, 32)).astype(np.int32)
    targets = np.where(draw.random(ids.shape) < 0.7, ids[:, ::-1], -1).astype(np.int32)
    logits = np.asarray(model.logits(model.hidden(mx.array(ids)))).astype(np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(logp, np.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    for micro_tokens in (64, 4096):
        got, entropies = PolicyScores(model, micro_tokens=micro_tokens, dtype=mx.float32)(ids, targets)
        np.testing.assert_allclose(got, np.where(targets >= 0, chosen, 0), atol=1e-4)
        np.testing.assert_allclose(entropies, np.where(targets >= 0, -(np.exp(logp) * logp).sum(-1), 0), atol=1e-4)


def test_engine_reports_the_quantised_models_log_probabilities(path, tokenizer):
    """Float32, 2e-4."""
    model = make_model(width=128, scale=0.1)
    prompts = [[row, row + 1] for row in range(6)]
    completions = Engine(model, tokenizer, bits=4).complete(
        prompts, max_new_tokens=20, temperature=1.0, seed=1, log_probabilities=True
    )
    rollout = rollout_of(prompts, completions, np.zeros(6), padding=tokenizer.assistant_end)
    rounded, own = (
        PolicyScores(each, micro_tokens=4096, dtype=mx.float32)(rollout.ids[:, :-1], rollout.targets)[0]
        for each in (packed_copy(model, 4), model)
    )
    assert np.abs(rollout.rollout_log_probs - rounded).max() < 2e-4
    assert np.abs(rollout.rollout_log_probs - own).max() > 0.05
