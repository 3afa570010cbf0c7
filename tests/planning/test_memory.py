"""Predicted against measured and counted peaks, the choice of a micro-batch, and the refusal of what cannot fit."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kit.models import composed
from mlxchat.cpu import runtime
from mlxchat.data.packing import mean_batch
from mlxchat.errors import ConfigError
from mlxchat.model.gpt import GPT
from mlxchat.model.parameters import init_weights
from mlxchat.model.sizes import GPTSizes, count_parameters, resolve_adapter, sizes_of
from mlxchat.optim.optimizer import Optimizer, rates_at
from mlxchat.planning.memory import Device, Training, check_memory
from mlxchat.runner.plan import make_plan
from mlxchat.runner.stage import Stages
from mlxchat.store.store import Store
from mlxchat.training.step import TrainStep

# (architecture, depth, vocabulary, tokens per row, rows, micro-batch's rows, recompute, lanes)
CASES = [
    ("oct2025", 4, 4096, 512, 4, 2, False, 2),
    ("oct2025", 6, 512, 256, 1, 1, False, 1),
    ("jul2026", 8, 4096, 512, 2, 2, True, 2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_peak_on_a_cpu_is_predicted_from_above(case):
    """Of two steps, by MLX's own count."""
    if runtime.blas_threads() is None:
        pytest.skip("factors were measured with OpenBLAS")
    variant, depth, vocab_size, row_tokens, rows, micro_rows, recompute, num_lanes = case
    config = composed(f"model.depth={depth}", f"architecture={variant}", f"optimizer=muon_{variant}")
    sizes = sizes_of(replace(config.model, context_tokens=row_tokens), config.architecture, vocab_size)
    runtime.set_blas_threads(num_lanes)  # the fixture same_cores restores them
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = GPT(sizes)
    init_weights(model, 0)
    optimizer = Optimizer(model, config.optimizer, width=sizes.width)
    step = TrainStep(model, optimizer, micro_tokens=micro_rows * row_tokens, dtype=mx.float32, recompute=recompute)
    ids = np.random.default_rng(0).integers(0, vocab_size, (rows, row_tokens + 1), dtype=np.int32)
    batch = mean_batch([(row[:-1], row[1:]) for row in ids])
    for _ in range(2):
        step(batch, rates_at(0, 100, config.sft.schedule, config.optimizer))
    measured = mx.get_peak_memory() - before
    described = Training(
        sizes=sizes, optimizer=config.optimizer, rows=rows, row_tokens=row_tokens, recompute=recompute,
        device=Device(num_lanes=num_lanes, plain=False, compute_bytes=4),
    )  # fmt: skip
    assert measured <= described.peak_bytes(micro_rows) <= 1.3 * measured


# (depth, rows of an iteration, their tokens, rows of a micro-batch, adapters, recomputation), and GB allocated on Metal
# and CUDA with architecture oct2025, and with jul2026: MLX 0.32.4, bfloat16, vocabulary 32,768, 65,536 with d20. The
# allocations were counted, not estimated; a real device frees memory later, which the predictions' surplus covers.
COUNTED: list[Any] = [
    ((8, 4, 2048, 4, "none", False), (5.01, 4.72, 6.63, 5.84)),
    ((8, 8, 2048, 8, "none", False), (8.84, 8.46, 10.08, 8.13)),
    ((8, 16, 2048, 16, "none", False), (14.07, 12.36, 15.68, 13.79)),
    ((12, 4, 2048, 4, "none", False), (9.99, 7.52, 12.21, 9.84)),
    ((12, 8, 2048, 8, "none", False), (16.14, 13.14, 18.93, 15.26)),
    ((12, 16, 2048, 16, "none", False), (29.84, 21.13, 32.35, 24.57)),
    ((20, 4, 2048, 4, "none", False), (26.78, 21.42, 38.11, 34.40)),
    ((20, 8, 2048, 8, "none", False), (43.14, 33.63, 55.69, 46.69)),
    ((20, 16, 2048, 16, "none", False), (79.01, 52.72, 92.16, 68.59)),
    ((12, 16, 512, 16, "none", False), (8.13, 7.52, 10.39, 9.83)),
    ((12, 16, 2048, 4, "none", False), (10.53, 8.06, 13.36, 10.99)),
    ((12, 8, 2048, 8, "none", True), (4.94, 6.61, 7.76, 8.63)),
    ((20, 4, 2048, 4, "none", True), (15.77, 15.77, 27.47, 28.47)),
    ((12, 4, 2048, 4, "lora", False), (8.35, 6.18, 8.53, 6.91)),
    ((20, 8, 2048, 8, "qlora", False), (36.25, 24.90, 38.26, 27.44)),
    ((12, 4, 2048, 4, "dora", False), (11.08, 9.19, 11.23, 9.68)),
]


@pytest.mark.parametrize(("case", "counted"), COUNTED, ids=lambda value: str(value))
def test_peak_on_a_gpu_is_predicted_from_above(case, counted):
    depth, rows, row_tokens, micro_rows, adapter, recompute = case
    kinds = [(architecture, kind) for architecture in ("oct2025", "jul2026") for kind in ("metal", "cuda")]
    for (architecture, kind), needed in zip(kinds, counted, strict=True):
        chosen = (f"architecture={architecture}", f"optimizer=muon_{architecture}", f"adapter={adapter}")
        config = composed("experiment=speedrun_d12", f"model=d{depth}", "sft.warm_start=false", *chosen)
        vocab_size = 65536 if depth == 20 else 32768
        sizes = sizes_of(replace(config.model, context_tokens=row_tokens), config.architecture, vocab_size)
        described = Training(
            sizes=sizes, optimizer=config.optimizer, rows=rows, row_tokens=row_tokens, recompute=recompute,
            adapters=resolve_adapter("adapter", config.adapter, sizes),
            device=Device(kind=kind, plain=True, compute_bytes=2),
        )  # fmt: skip
        assert needed <= described.peak_bytes(micro_rows) / 1e9 <= 1.27 * needed, (architecture, kind)


SIZES = GPTSizes(
    vocab_size=1000, num_layers=4, num_heads=2, num_kv_heads=2, width=64, context_tokens=128, rope_theta=1e4
)


def training(rows: int = 12, **changes: Any) -> Training:
    device = Device(kind="cpu", plain=False, num_lanes=2, compute_bytes=4)
    return Training(
        sizes=SIZES,
        optimizer=composed().optimizer,
        rows=rows,
        row_tokens=128,
        recompute=False,
        device=device,
        **changes,
    )


def test_weights_and_moments_are_counted_exactly():
    counts = count_parameters(SIZES)
    moments = counts["matrices"] + 2 * (counts["embedding"] + counts["head"])
    assert training().held_bytes == 4 * (counts["total"] + moments)
    assert training(further_weights=1).held_bytes == 4 * (2 * counts["total"] + moments)


@pytest.mark.parametrize(
    ("rows", "most", "expected"),
    [(12, 10**4, 12), (12, 6, 6), (12, 0, 1), (12, 5, 4), (12, 7, 6), (13, 8, 7), (13, 12, 7), (7, 3, 3)],
)
def test_micro_batches_have_one_size_where_that_is_cheap(rows, most, expected):
    """Otherwise they are as equal as possible; a row is never cut."""
    machine = replace(composed("machine=cpu").machine, device_batch_tokens=max(1, 128 * most))
    assert training(rows).fitting_rows(machine) == expected


def check(tmp_path: Path, limit: int, target: str) -> None:
    overrides = ("machine=auto", "model.depth=6", "machine.blas_threads=2", f"machine.memory_limit_bytes={limit}")
    config = composed(*overrides)
    check_memory(config, make_plan(replace(config, targets=[target]), Store(tmp_path)))


def test_refusal_names_need_limit_and_keys(tmp_path):
    with pytest.raises(ConfigError) as caught:
        check(tmp_path, 90_000_000, "sft")
    pretrain, midtrain, sft = str(caught.value).splitlines()
    assert pretrain.startswith("pretrain needs about ")
    assert "the limit is 90.0 MB (machine.memory_limit_bytes)" in pretrain
    keys = "machine.grad_checkpointing=true; a smaller model.depth; a smaller pretrain.batch.row_tokens"
    assert pretrain.endswith(f"To lower the need: {keys}")
    assert midtrain.startswith("midtrain ")
    assert "sft.adapter.kind=lora" in sft
    with pytest.raises(ConfigError, match=r"(?m)^eval_sft needs about .*a smaller eval.max_new_tokens$"):
        check(tmp_path, 8_000_000, "eval_sft")


# Decoding
D32 = replace(SIZES, vocab_size=65536, num_layers=32, num_heads=16, num_kv_heads=16, width=2048, context_tokens=2048)


@pytest.mark.parametrize(
    ("overrides", "fits"),
    [(["machine=mac_16gb", "adapter=qlora"], True), (["machine=mac_36gb"], True),
     (["machine=mac_36gb", "adapter=none"], False)],
    ids=str,
)  # fmt: skip
def test_grpo_on_d32_is_admitted_where_it_fits(overrides, fits):
    describe: Any = Stages()["rl"].memory
    config = composed("experiment=grpo_nanochat_d32", *overrides)
    training = describe(config, "rl", D32).on(config.machine)
    assert training.row_tokens == 320 + 256, "the longest prompt of GSM8K and rl.max_new_tokens, not the context"
    assert (training.fitting_rows(config.machine) > 0) is fits
    config = composed()
    sizes = sizes_of(config.model, config.architecture, config.tokenizer.vocab_size)
    unbounded = describe(config, "rl", sizes).on(config.machine)
    assert unbounded.row_tokens == unbounded.sizes.context_tokens, "the task does not bound its prompts"
