"""`score_rows`: the scores of each row alone, from all logits in NumPy."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kit.models import make_model
from kit.numpy_gpt import numpy_logits
from mlxchat.model.gpt import GPT
from mlxchat.model.scoring import ScoredRow, continuation, row_of, score_rows
from mlxchat.ops import device
from mlxchat.ops.loss import ScoreKind

KINDS: tuple[ScoreKind, ...] = ("losses", "entropies", "logits", "likeliest")
OTHERS = {
    "gpt2": {"n_ctx": 64, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "layer_norm_epsilon": 1e-5,
             "vocab_size": 80},
    "mamba": {"vocab_size": 80, "hidden_size": 32, "intermediate_size": 64, "state_size": 4, "num_hidden_layers": 2,
              "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 2},
}  # fmt: skip


def rows_of(vocab_size: int) -> list[ScoredRow]:
    """Return continuations of several lengths, one of them empty, a row of ignored targets, and one of choices."""
    rng = np.random.default_rng(0)
    rows = [continuation(rng.integers(0, vocab_size, n).tolist(), s) for n, s in [(30, 4), (7, 7), (61, 20), (9, 1)]]
    ids = rng.integers(0, vocab_size, 41).astype(np.int32)
    rows.append(row_of(ids[:-1], np.where(rng.random(40) < 0.5, ids[1:], -1).astype(np.int32)))
    return [*rows, ScoredRow(ids, np.full(3, 40), np.array([5, 70, 6], np.int32))]


def expected(logits: np.ndarray[Any, Any], row: ScoredRow) -> np.ndarray[Any, Any]:
    """Return the four scores (4, n) from the logits (T, V) of a row, in float64."""
    logits = logits[row.places]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = (np.arange(len(log_p)), row.targets)
    return np.stack([-log_p[chosen], -(np.exp(log_p) * log_p).sum(-1), logits[chosen], logits.argmax(-1)])


@pytest.mark.parametrize("architecture", ["oct2025", "jul2026"])
@pytest.mark.parametrize("batch_tokens", [1, 130, 4096])
def test_scores_equal_those_of_each_row_alone(path, architecture, batch_tokens):
    model, rows = make_model(architecture, num_layers=3, scale=0.3), rows_of(280)
    for row, found in zip(rows, score_rows(model, rows, KINDS, batch_tokens=batch_tokens), strict=True):
        wanted = expected(numpy_logits(model, row.ids[None])[0], row)
        np.testing.assert_allclose(found, wanted, atol=5e-5)  # float32
    assert score_rows(model, rows, batch_tokens=batch_tokens)[1].shape == (1, 0)


@pytest.mark.parametrize("kind", list(OTHERS))
def test_scores_of_third_party_architectures(kind):
    module = pytest.importorskip(f"mlx_lm.models.{kind}")
    mx.random.seed(3)
    model = module.Model(module.ModelArgs.from_dict({"model_type": kind, **OTHERS[kind]}))
    rows = rows_of(80)
    for row, found in zip(rows, score_rows(model, rows, KINDS, batch_tokens=200), strict=True):
        wanted = expected(np.asarray(model(mx.array(row.ids[None]))[0], np.float64), row)
        np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("batch_tokens", [1, 300])
def test_passes_respect_the_token_limit(monkeypatch, kind, batch_tokens):
    """On an NVIDIA GPU lengths are multiples of 128 and heights powers of two, so that few shapes are planned."""
    model, shapes, hidden = make_model(), list[tuple[int, ...]](), GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda self, ids, *rest: shapes.append(ids.shape) or hidden(self, ids, *rest))
    if kind == "cuda":
        monkeypatch.setenv("MLXCHAT_CPU", "plain")
    monkeypatch.setattr(device, "backend", lambda: kind)
    monkeypatch.setattr(mx, "compile", lambda function: function)
    rows = [continuation([1] * length, length - 1) for length in range(3, 40, 2)]
    found = score_rows(model, rows, batch_tokens=batch_tokens)
    assert all(values.shape == (1, 1) for values in found)
    assert sum(height for height, _ in shapes) >= len(rows)
    assert all(height == 1 or height * width <= batch_tokens for height, width in shapes)
    if kind == "cuda":
        assert all(width % 128 == 0 for _, width in shapes)
