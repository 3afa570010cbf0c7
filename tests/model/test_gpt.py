"""The model against nanochat's architectures of October 2025 and July 2026 in NumPy, and its published sizes.

Shapes: B batch, T tokens, C width, H query heads, K key/value heads, D head width, V vocabulary.
"""

import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from kit import models
from kit.numpy_gpt import numpy_logits, weights_of
from mlxchat.composition.compose import compose_config
from mlxchat.errors import ConfigError
from mlxchat.model import parameters
from mlxchat.model.checkpoint import computes_as_published
from mlxchat.model.gpt import GPT
from mlxchat.model.parameters import cast_parameters, computing_in, flatten_parameters, init_weights, set_parameters
from mlxchat.model.sizes import GPTSizes, count_parameters, flops_per_token, sizes_of
from mlxchat.ops import loss as cross_entropy
from mlxchat.ops.loss import cross_entropy_sum

make_model = partial(models.make_model, num_layers=3, scale=0.3)


def random_ids(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 280, shape)


@pytest.mark.parametrize(("tokens", "num_kv_heads", "theta"), [(1, 4, 1e4), (300, 2, 100.0), (150, 1, 1e5)])
@pytest.mark.parametrize("architecture", ["oct2025", "jul2026"])
def test_logits_equal_nanochat_in_numpy(path, architecture, num_kv_heads, tokens, theta):
    """The short windows of July 2026 are 128 tokens here, and its tables have 320 rows for 280 tokens."""
    model = make_model(architecture, num_kv_heads=num_kv_heads, rope_theta=theta)
    ids = random_ids(2, tokens)
    # The agreement that nanochat's own float32 has with float64 on models of this kind.
    np.testing.assert_allclose(np.asarray(model(mx.array(ids))), numpy_logits(model, ids), atol=2e-4)
    assert computes_as_published(model.sizes)


@pytest.mark.parametrize("architecture", ["oct2025", "jul2026"])
def test_bfloat16_is_near_exact_logits_and_gradients(monkeypatch, architecture):
    """On the plain path. The head's gradient is summed in float32 over chunks of 30 rows and rounded once."""
    monkeypatch.setenv("MLXCHAT_CPU", "plain")
    monkeypatch.setattr(cross_entropy, "LOGITS", 30 * 280)
    model, ids = make_model(architecture), random_ids(2, 151)
    expected, own = numpy_logits(model, ids), flatten_parameters(model)
    with computing_in(model, mx.bfloat16):
        logits = model(mx.array(ids))
        assert model.lm_head.weight.dtype == mx.bfloat16
    assert logits.dtype == model.lm_head.weight.dtype == mx.float32
    # Eight bits of mantissa through three layers, logits within ±15.
    difference = np.abs(np.asarray(logits) - expected)
    assert difference.mean() < 0.02 * np.abs(expected).mean()
    assert difference.max() < 0.15 * np.abs(expected).max()

    def loss_of(masters: dict[str, mx.array], dtype: mx.Dtype) -> mx.array:
        set_parameters(model, cast_parameters(masters, dtype))
        hidden = model.hidden(mx.array(ids[:, :-1])).reshape(-1, 32)
        return cross_entropy_sum(hidden, model.head_weight, mx.array(ids[:, 1:].reshape(-1)), mx.full(300, 1 / 300))

    exact, rounded = (mx.grad(loss_of)(own, dtype) for dtype in (mx.float32, mx.bfloat16))
    for name, value in exact.items():
        assert rounded[name].dtype == mx.float32
        limit = 0.03 if name == "lm_head.weight" else 0.2
        assert mx.linalg.norm(rounded[name] - value) <= limit * mx.linalg.norm(value), name


@pytest.mark.parametrize(
    ("num_layers", "pattern", "context_tokens"), [(1, "S", 64), (2, "S", 64), (4, "LS", 64), (5, "SSL", 700)]
)
def test_windows_follow_the_pattern_and_are_limited(path, num_layers, pattern, context_tokens):
    """A token reaches the sum of the windows, and one position more by the smear."""
    model = make_model("jul2026", num_layers=num_layers, window_pattern=pattern, context_tokens=context_tokens)
    ids = random_ids(1, 400)
    before = np.asarray(model(mx.array(ids)))
    np.testing.assert_allclose(before, numpy_logits(model, ids), atol=2e-4)
    ids[0, 0] = (ids[0, 0] + 1) % 280
    after, reach = np.asarray(model(mx.array(ids))), sum(model.sizes.windows) + 1
    np.testing.assert_array_equal(after[:, reach + 1 :], before[:, reach + 1 :])
    assert np.abs(after - before)[:, : reach + 1][:, -1].max() > 1e-6 or num_layers > 2


@pytest.mark.parametrize("num_kv_heads", [pytest.param(4, marks=pytest.mark.slow), 1])
@pytest.mark.parametrize("architecture", ["oct2025", "jul2026"])
def test_gradients_equal_central_differences(path, architecture, num_kv_heads):
    """For every parameter, along its gradient and across it; differences of the loss in float64."""
    model, ids = make_model(architecture, num_kv_heads=num_kv_heads), random_ids(1, 141)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    weights, rng, parameters = weights_of(model), np.random.default_rng(1), flatten_parameters(model)

    def loss_of(masters: dict[str, mx.array]) -> mx.array:
        set_parameters(model, masters)
        hidden = model.hidden(mx.array(inputs)).reshape(-1, 32)
        return cross_entropy_sum(hidden, model.head_weight, mx.array(targets.reshape(-1)), mx.full(140, 1 / 140))

    def numpy_loss(name: str, value: np.ndarray) -> float:
        logits = numpy_logits(model, inputs, weights | {name: value})[0]
        losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[0][:, None], axis=-1)[:, 0]
        return float(losses.mean())

    gradients = mx.grad(loss_of)(parameters)
    set_parameters(model, parameters)
    for name, gradient in gradients.items():
        own = np.asarray(gradient, dtype=np.float64)
        norm, across = float(np.linalg.norm(own)), rng.normal(size=own.shape)
        direction = own / norm + across / np.linalg.norm(across)
        step = 1e-5
        ahead, behind = (numpy_loss(name, weights[name] + sign * step * direction) for sign in (1, -1))
        # Gradients in float32 through three layers agree with float64 to a few millionths.
        assert (ahead - behind) / (2 * step) == pytest.approx(float((own * direction).sum()), abs=1e-4 * norm), name


@pytest.fixture(scope="module", params=["oct2025", "jul2026"])
def fresh(request: pytest.FixtureRequest) -> GPT:
    """A freshly initialised d2 of width 128."""
    model = make_model(request.param, num_layers=2, width=128, num_kv_heads=1)
    init_weights(model, seed=1)
    return model


def test_initial_weights_are_nanochats(fresh):
    """Deviations of normal and bounds of uniform draws; within four standard errors of so many draws."""
    july, found = fresh.sizes.architecture == "jul2026", flatten_parameters(fresh)
    bound, narrow = math.sqrt(3 / 128), math.sqrt(32 / 128)  # keys and values have 32 rows
    values = {"c_proj": 0, "smear_lambda": 0, "backout_lambda": 0.2}
    values |= {"resid_lambdas": [1.15, 1.05], "x0_lambdas": [0.2, 0.05]}
    ranges = {"1": (-bound, bound), "ve_gate": (0, 0.02), "smear_gate": (0, 0.02)}
    if july:
        deviations = {"wte": 0.8, "lm_head": 0.001}
        ranges |= dict.fromkeys(("c_q", "c_k", "c_v"), (-bound, bound)) | {"c_fc": (-0.4 * bound, 0.4 * bound)}
    else:
        deviations = {"wte": 1, "c_q": 128**-0.5, "c_fc": 128**-0.5}
        deviations |= dict.fromkeys(("c_k", "c_v"), narrow * 128**-0.5)
        values["lm_head"] = 0
    for name, value in found.items():
        weight, last = np.asarray(value), name.removesuffix(".weight").rpartition(".")[2]
        if last in deviations:
            assert abs(weight.mean()) < 4 * deviations[last] / math.sqrt(weight.size)
            assert weight.std() == pytest.approx(deviations[last], rel=4 / math.sqrt(2 * weight.size)), name
        elif last in values:
            np.testing.assert_allclose(weight, np.broadcast_to(values[last], weight.shape), rtol=1e-6)
        else:
            low, high = ranges[last]
            assert low <= weight.min() < low + 0.15 * (high - low), name
            assert high - 0.15 * (high - low) < weight.max() <= high, name


def test_draws_depend_on_the_seed_and_the_name_alone(fresh):
    first, models = flatten_parameters(fresh), [GPT(fresh.sizes) for _ in range(2)]
    for seed, model in enumerate(models, start=1):
        init_weights(model, seed)
    again, different = map(flatten_parameters, models)
    assert all(mx.array_equal(first[name], again[name]).item() for name in first)
    assert not mx.array_equal(first["transformer.wte.weight"], different["transformer.wte.weight"]).item()
    one, two = (np.asarray(first[f"transformer.h.{layer}.attn.c_q.weight"]).ravel() for layer in (0, 1))
    assert abs(float(np.corrcoef(one, two)[0, 1])) < 0.05


def test_unknown_and_uncounted_parameters_are_named(fresh, monkeypatch):
    wider, known = GPT(fresh.sizes), parameters.initial_value
    wider.transformer["h"][0].norm = nn.RMSNorm(128)
    with pytest.raises(ConfigError, match=r'norm.weight \(128,\) has no initial value.*case \[\*_, "norm"\]'):
        init_weights(wider, seed=1)
    monkeypatch.setattr(
        parameters, "initial_value", lambda name, *more: mx.ones(128) if "norm" in name else known(name, *more)
    )
    with pytest.raises(ConfigError, match=r"parameters, but count_parameters \(mlxchat/model/sizes.py\) counts"):
        init_weights(wider, seed=1)


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


# Changes of the model in a copy of the package: what trains, chats, is evaluated and exported follows gpt.py alone

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "internals" / "change_the_architecture.md").read_text(encoding="utf-8")
# A gated unit: one matrix more, with its initial weights and its count.
GATED = {
    "gpt.py": [
        ("self.c_fc = Linear(", "self.c_gate = Linear(sizes.width, 4 * sizes.width)\n        self.c_fc = Linear("),
        ("squared_relu(self.c_fc(x))", "nn.silu(self.c_gate(x)) * self.c_fc(x)"),
    ],
    "parameters.py": [('"c_v" | "c_fc"', '"c_v" | "c_gate" | "c_fc"')],
    "sizes.py": [("8 * width * width", "12 * width * width")],
}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    left_out = (".git", ".venv", "__pycache__", "*.egg-info", "tests", "docs", "outputs", ".*_cache")
    return shutil.copytree(ROOT, tmp_path / "copy", ignore=shutil.ignore_patterns(*left_out), symlinks=True)


def test_diff_of_the_page_applies_with_git(copy):
    (diff,) = re.findall(r"```diff\n(.*?)```", PAGE, re.S)
    subprocess.run(["git", "apply", "-"], cwd=copy, input=diff, text=True, check=True)


COMPARE = """
import mlxchat; import numpy as np, mlx.core as mx, mlx_lm; from pathlib import Path
from mlxchat.model.checkpoint import load_checkpoint
ids, (ours, *_) = mx.array([[1, 2, 3, 4]]), load_checkpoint(next(Path("outputs/store").glob("sft-*")))
theirs, _ = mlx_lm.load("out", trust_remote_code=True)
assert "c_gate" in theirs.layers[0].mlp
np.testing.assert_allclose(np.asarray(theirs(ids)), np.asarray(ours(ids)), atol=1e-3)
"""


@pytest.mark.slow
def test_gated_unit_is_trained_answered_evaluated_and_exported(copy, tmp_path):
    pytest.importorskip("mlx_lm")
    for name, changes in GATED.items():
        path = copy / "src" / "mlxchat" / "model" / name
        for old, new in changes:
            text = path.read_text("utf-8")
            assert old in text
            path.write_text(text.replace(old, new), "utf-8")

    def python(*arguments: str, code: int = 0) -> str:
        environ = {**os.environ, "PYTHONPATH": str(copy / "src")}
        ended = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
        )
        assert ended.returncode == code, ended.stderr
        return ended.stdout + ended.stderr

    python("-m", "mlxchat", "experiment=smoke", "stage=sft")
    python("-m", "mlxchat", "chat", "sft", "-p", "the cat", "--max-tokens", "8", "--temperature", "0")
    assert "bpb" in python("-m", "mlxchat", "eval", "sft", "--task", "bpb")
    python("-m", "mlxchat", "export", "sft", "--to", "mlx", "out")
    python("-c", COMPARE)
    assert "Use --to mlx" in python("-m", "mlxchat", "export", "sft", "--to", "hf", "hf", code=2)
