"""What a GPU has to compute: operations and types of every kind of work, traced on the plain path in bfloat16.

MLX refuses an operation that a backend lacks only when it is evaluated there, so a machine without a GPU would not
notice. Traced functions name every operation with the types of its inputs and outputs.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from io import StringIO
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kit.models import make_model
from mlxchat.config.schema import AdapterConfig
from mlxchat.engine.decode import Decoder, Reading
from mlxchat.engine.sample import Sampler, Sampling, score_tokens
from mlxchat.model.forward import recomputed
from mlxchat.model.gpt import GPT
from mlxchat.model.lora import attach_adapters, packed_copy
from mlxchat.model.parameters import cast_parameters, flatten_parameters, set_parameters, trained_parameters
from mlxchat.model.sizes import resolve_targets
from mlxchat.ops.loss import cross_entropy_sum, token_scores

# MLX 0.32: what throws on CUDA or Metal for any type (mlx/backend/cuda/primitives.cpp, mlx/backend/metal/*.cpp).
LACKING = {"SVD", "QRF", "LUF", "Inverse", "Cholesky", "Eig", "Eigh", "AllReduce", "AllGather", "Send", "Recv"}
NEVER = {"float64", "complex64"}
# Metal's scatter has no 8-byte types.
EIGHT_BYTES = {"int64", "uint64"}

Trace = Counter[tuple[str, tuple[str, ...]]]


def trace(function: Callable[..., Any], *given: Any) -> Trace:
    """Return the operations of a function and the types of what goes in and out."""
    found: Trace = Counter()

    def note(event: dict[str, Any]) -> None:
        if event["type"] == "primitive":
            kinds = {str(each[2]).removeprefix("mlx.core.") for each in [*event["inputs"], *event["outputs"]]}
            found[event["name"], tuple(sorted(kinds))] += 1

    mx.export_function(note, function, *given)
    return found


def half(model: GPT) -> GPT:
    set_parameters(model, cast_parameters(flatten_parameters(model), mx.bfloat16))
    return model


def ids_of(rows: int, tokens: int) -> mx.array:
    return mx.array(np.random.default_rng(0).integers(0, 280, (rows, tokens)).astype(np.int32))


def training(model: GPT) -> Trace:
    """The loss and its gradients in every trained parameter, which are float32; their graph has no types."""
    masters, ids = flatten_parameters(model), ids_of(2, 200)
    trained = trained_parameters(model)

    def loss(*values: mx.array) -> mx.array:
        moved = dict(zip(trained, values, strict=True))
        set_parameters(model, cast_parameters({**masters, **moved}, mx.bfloat16))
        hidden = model.hidden(ids[:, :-1]).reshape(-1, model.sizes.width)
        frozen = "lm_head.weight" not in moved
        weights = mx.full(hidden.shape[0], 1 / 398)
        return cross_entropy_sum(hidden, model.head_weight, ids[:, 1:].reshape(-1), weights, frozen_head=frozen)

    text = StringIO()
    mx.disable_compile()
    try:
        found = mx.value_and_grad(loss, argnums=list(range(len(trained))))(*trained.values())
        mx.export_to_dot(text, *([found[0], *found[1]]))
    finally:
        mx.enable_compile()
        set_parameters(model, masters)
    assert all(slope.dtype == mx.float32 for slope in found[1])
    return Counter((name, ()) for name in re.findall(r'label ="(\w+)"', text.getvalue()))


def adapted(architecture: str, kind: str, bits: int | None) -> GPT:
    model = make_model(architecture, width=128)
    targets = resolve_targets(["all"], model.sizes)
    attach_adapters(model, AdapterConfig(kind=kind, rank=4, targets=targets, bits=bits), dtype=mx.bfloat16)
    return model


def packed(architecture: str) -> GPT:
    return packed_copy(half(make_model(architecture, width=128)), 4)


def recomputing(architecture: str) -> GPT:
    model = make_model(architecture)
    model.run_layer = recomputed
    return model


def decoding(model: GPT, rows: int, *, equal: bool) -> Trace:
    decoder = Decoder(half(model))
    decoder.resize([], rows, 40)
    lengths = [30] * rows if equal else [30 - row % 7 for row in range(rows)]
    decoder.fill(0, decoder.read([[1] * length for length in lengths]), [1] * rows)
    sampler = Sampler([Sampling(temperature=1.0, top_k=5, top_p=0.9)] * rows)

    def step(tokens: mx.array) -> Any:
        logits = decoder.step(tokens, [True] * rows)
        drawn = sampler(logits, [0.5] * rows)
        return [drawn, *score_tokens(logits, drawn, 3), *decoder.state()]

    return trace(step, mx.ones(rows, dtype=mx.uint32))


def prefill(model: GPT) -> Trace:
    half(model)

    def read(ids: mx.array) -> list[mx.array]:
        cache: list[Any] = [Reading(None, 0) for _ in range(model.sizes.num_layers)]
        model.hidden(ids, [*cache, *([Decoder(model).last] if model.sizes.smear else [])])
        return [part for layer in cache for part in layer.past]

    return trace(read, ids_of(3, 160))


def scoring(model: GPT) -> Trace:
    half(model)

    def score(ids: mx.array) -> mx.array:
        hidden = model.hidden(ids[:, :-1]).reshape(-1, model.sizes.width)
        return token_scores(hidden, model.head_weight, ids[:, 1:].reshape(-1), ["losses"])[0]

    return trace(score, ids_of(3, 160))


def cases() -> Iterator[tuple[str, Callable[[], Trace]]]:
    for name in ("oct2025", "jul2026"):
        yield f"{name} training", lambda name=name: training(make_model(name))
        yield f"{name} recomputing", lambda name=name: training(recomputing(name))
        for kind, bits in (("lora", None), ("lora", 4), ("dora", None)):
            yield f"{name} {kind} {bits}", lambda name=name, k=kind, b=bits: training(adapted(name, k, b))
        yield f"{name} prefill", lambda name=name: prefill(make_model(name))
        yield f"{name} scoring", lambda name=name: scoring(make_model(name))
        yield f"{name} decoding 1", lambda name=name: decoding(make_model(name), 1, equal=True)
        yield f"{name} decoding 64", lambda name=name: decoding(make_model(name), 64, equal=False)
        yield f"{name} quantised", lambda name=name: decoding(packed(name), 1, equal=True)


@pytest.mark.parametrize(("name", "traced"), [*cases()], ids=[name for name, _ in cases()])
def test_every_operation_exists_on_gpus(monkeypatch, name, traced):
    monkeypatch.setenv("MLXCHAT_CPU", "plain")
    found = traced()
    assert len(found) > 20
    wrong = [each for each in found if each[0] in LACKING or NEVER & set(each[1])]
    wrong += [each for each in found if each[0].startswith("Scatter") and EIGHT_BYTES & set(each[1])]
    assert wrong == []
    matrices = [count for (operation, kinds), count in found.items() if operation == "Matmul" and "float32" in kinds]
    assert sum(matrices) == 0 or "training" in name or "recomputing" in name or "ora" in name, "bfloat16 products"
