"""Predicted against measured peaks, the choice of a micro-batch, and the refusal of what cannot fit."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kit.commands import clean_environment
from kit.training import training_of
from mlxchat.cli import main
from mlxchat.composition.compose import compose_config
from mlxchat.config.schema import Config, TaskItem
from mlxchat.config.wording import format_bytes
from mlxchat.cpu import runtime
from mlxchat.errors import ConfigError
from mlxchat.model.gpt import GPT, init_weights
from mlxchat.model.sizes import GPTSizes, count_parameters, sizes_of
from mlxchat.optim.optimizer import Optimizer, rates_at
from mlxchat.planning.memory import (
    Decoding,
    Device,
    Training,
    check_memory,
    choose_micro_batch,
    describe_memory,
    forecast_bytes,
    forward_tokens,
    predict_forward_bytes,
    predict_peak,
    remark_apart,
    rows_at_a_time,
)  # fmt: skip
from mlxchat.runner.plan import PlannedStep, make_plan
from mlxchat.store.store import Store
from mlxchat.training.batches import mean_batch
from mlxchat.training.step import TrainStep

# (depth, vocabulary, tokens per row, rows, micro-batch's rows, recompute, lanes): sizes at which each part counts, and
# of a hundred megabytes or more, beside which a few buffers that are there by chance do not matter. Of SMALL, PLAIN and
# SAMPLING the first ones are quick; the others are slow tests.
SMALL = [
    (4, 512, 512, 4, 4, False, 2),
    (4, 2048, 512, 4, 4, True, 2),
    (4, 4096, 512, 4, 2, False, 2),
    (4, 8192, 512, 2, 2, False, 2),
    (6, 512, 256, 1, 1, False, 1),
]
LARGE = [
    (4, 4096, 512, 8, 8, False, 2),
    (4, 4096, 2048, 2, 2, False, 2),
    (4, 32768, 512, 4, 4, False, 2),
    (4, 4096, 1024, 8, 2, True, 2),
    (6, 512, 512, 8, 8, False, 2),
    (6, 16384, 512, 4, 2, False, 1),
    (8, 4096, 256, 2, 1, False, 2),
    (8, 4096, 512, 2, 2, True, 2),
    (8, 16384, 256, 2, 2, False, 2),
    (6, 512, 2048, 2, 2, False, 2),
]
Case = tuple[int, int, int, int, int, bool, int]


def quick(cases: list[Any], count: int) -> list[Any]:
    """Return parameters of which all but the first ones are slow."""
    return [
        pytest.param(
            *(case if isinstance(case[0], str) else [case]), marks=[pytest.mark.slow] if count <= number else []
        )
        for number, case in enumerate(cases)
    ]


# (variant, compute type, depth, vocabulary, tokens per row, rows, micro-batch's rows, recompute) of MLX's own
# operations.
PLAIN = [
    ("oct2025", mx.bfloat16, 2, 512, 256, 8, 8, False),
    ("oct2025", mx.float32, 2, 512, 1024, 2, 2, False),
    ("oct2025", mx.bfloat16, 2, 2048, 256, 8, 4, False),
    ("oct2025", mx.float32, 2, 16384, 256, 2, 2, False),
    ("oct2025", mx.bfloat16, 2, 512, 1024, 2, 2, False),
    ("oct2025", mx.bfloat16, 2, 16384, 256, 2, 2, False),
    ("oct2025", mx.bfloat16, 2, 512, 1024, 2, 2, True),
    ("oct2025", mx.bfloat16, 4, 512, 256, 4, 4, False),
    ("oct2025", mx.float32, 4, 512, 256, 4, 4, True),
    ("oct2025", mx.float32, 4, 512, 1024, 1, 1, False),
    ("oct2025", mx.float32, 4, 4096, 256, 2, 2, False),
    ("jul2026", mx.float32, 2, 512, 512, 4, 4, False),
    ("jul2026", mx.float32, 2, 4096, 256, 4, 2, False),
    ("jul2026", mx.bfloat16, 2, 512, 512, 4, 4, False),
    ("jul2026", mx.bfloat16, 2, 4096, 256, 4, 2, False),
]


def compare(
    case: Case, variant: str, *, dtype: mx.Dtype = mx.float32, plain: bool = False, dropout: float = 0.0
) -> tuple[int, int]:
    """Return the bytes that two steps of a training held at most, by MLX's own count, and those predicted."""
    depth, vocab_size, row_tokens, rows, micro_rows, recompute, num_lanes = case
    config = compose_config([f"model.depth={depth}", f"architecture={variant}", f"optimizer=muon_{variant}"]).config
    sizes = sizes_of(replace(config.model, context_tokens=row_tokens), config.architecture, vocab_size)
    threads = runtime.blas_threads() or 1
    runtime.set_blas_threads(num_lanes)
    try:
        measured = peak_of_two_steps(config, sizes, case, dropout, dtype)
    finally:
        runtime.set_blas_threads(threads)
    device = Device(num_lanes=num_lanes, plain=plain, compute_bytes=dtype.size)
    described = Training(
        sizes=sizes, optimizer=config.optimizer, rows=rows, row_tokens=row_tokens, device=device, recompute=recompute
    )
    predicted = predict_peak(described, micro_rows)
    print(f"{variant} {dtype} {case}: predicted {predicted.total / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB")
    return measured, predicted.total


def peak_of_two_steps(config: Config, sizes: GPTSizes, case: Case, dropout: float, dtype: mx.Dtype) -> int:
    _, vocab_size, row_tokens, rows, micro_rows, recompute, _ = case
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = GPT(sizes)
    init_weights(model, 0)
    optimizer = Optimizer(model, config.optimizer, width=sizes.width)
    step = TrainStep(
        model, optimizer, micro_tokens=micro_rows * row_tokens, dtype=dtype, recompute=recompute, dropout=dropout
    )
    ids = np.random.default_rng(0).integers(0, vocab_size, (rows, row_tokens + 1), dtype=np.int32)
    batch = mean_batch([(row[:-1], row[1:]) for row in ids])
    for _ in range(2):
        step(batch, rates_at(0, 100, config.sft.schedule, config.optimizer))
    return mx.get_peak_memory() - before


def needs_lanes() -> None:
    if runtime.blas_threads() is None:
        pytest.skip("factors were measured with OpenBLAS")


@pytest.mark.parametrize("case", quick(SMALL, 3), ids=str)
def test_peak_of_the_cpus_kernels_is_predicted_within_15_percent(case: Case) -> None:
    needs_lanes()
    measured, predicted = compare(case, "oct2025")
    assert predicted == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    ("variant", "dtype", "case"),
    quick([(variant, dtype, (*case, 1)) for variant, dtype, *case in PLAIN], 2),
    ids=str,
)
def test_peak_of_the_plain_path_is_predicted_within_15_percent(
    variant: str, dtype: mx.Dtype, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLXCHAT_CPU", "plain")
    measured, predicted = compare(case, variant, dtype=dtype, plain=True)
    assert predicted == pytest.approx(measured, rel=0.15)


def test_dropout_keeps_no_masks() -> None:
    needs_lanes()
    measured, predicted = compare(SMALL[0], "oct2025", dropout=0.1)
    assert predicted == pytest.approx(measured, rel=0.15)


def test_further_weights_cost_their_bytes() -> None:
    without, with_them = (predict_peak(training(None, 4, further_weights=copies), 2) for copies in (0, 1))
    assert with_them.total - without.total == 4 * count_parameters(SIZES)["total"]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["oct2025", "jul2026"])
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_it_is_for_larger_models_of_both_architectures_too(case: Case, variant: str) -> None:
    needs_lanes()
    measured, predicted = compare(case, variant)
    assert predicted == pytest.approx(measured, rel=0.15)


SIZES = GPTSizes(
    vocab_size=1000, num_layers=4, num_heads=2, num_kv_heads=2, width=64, context_tokens=128, rope_theta=1e4
)


def config_of(*overrides: str) -> Config:
    return compose_config([*overrides]).config


def training(limit: int | None, rows: int = 12, **changes: Any) -> Training:
    device = Device(kind="cpu", plain=False, num_lanes=2, compute_bytes=4, limit_bytes=limit, limit_is="a test")
    return Training(
        sizes=SIZES,
        optimizer=config_of().optimizer,
        rows=rows,
        row_tokens=128,
        recompute=False,
        device=device,
        **changes,
    )


def test_weights_and_moments_are_counted_exactly() -> None:
    peak = predict_peak(training(None, 1), 1)
    counts = count_parameters(SIZES)
    assert peak.weights == 4 * counts["total"]
    assert peak.moments == 4 * (counts["matrices"] + 2 * (counts["embedding"] + counts["head"]))


def test_without_a_limit_the_whole_iteration_is_one_micro_batch_up_to_where_more_brings_nothing() -> None:
    assert training(None).micro_rows(10**6) == 12
    assert training(None).micro_rows(6 * 128) == 6
    assert training(None).micro_rows(1) == 1, "a row is never cut"


@pytest.mark.parametrize(("rows", "most", "expected"), [(12, 5, 4), (12, 7, 6), (13, 8, 7), (13, 12, 7), (7, 3, 3)])
def test_micro_batches_are_of_one_size_where_that_is_cheap_and_else_about_equal(
    rows: int, most: int, expected: int
) -> None:
    assert training(None, rows).micro_rows(most * 128) == expected


def test_the_largest_micro_batch_that_fits_is_taken() -> None:
    free = training(None)
    limit = free.peak_bytes(5)
    chosen = training(limit).micro_rows(10**6)
    assert chosen == 4, "the largest divisor of 12 up to 5"
    assert training(free.peak_bytes(1) - 1).micro_rows(10**6) == 0


def test_a_resumed_training_keeps_its_micro_batch_while_it_fits(tmp_path: Path) -> None:
    def chosen(limit: int | None, tokens: int | None = None) -> int:
        changes: dict[str, Any] = {"device_batch_tokens": tokens, "memory_limit_bytes": limit, "blas_threads": 1}
        config = config_of("machine=cpu")
        config.machine = replace(config.machine, **changes)
        context: Any = SimpleNamespace(step="toy", stage="sft", config=config, team=None, work=tmp_path)
        return choose_micro_batch(context, training(None)).tokens

    small = replace(training(None), device=Device()).peak_bytes(3)
    first = chosen(small)
    assert first < 12 * 128
    assert chosen(None) == first
    assert chosen(None, tokens=256) == 256, "what is asked for goes first"
    assert chosen(None) == 256
    with pytest.raises(ConfigError, match=r"toy needs about .* for one row of 128 tokens"):
        chosen(1000)


def planned(config: Config, tmp_path: Path) -> list[PlannedStep]:
    return make_plan(config, config.pipeline, Store(tmp_path), targets=["sft"], seed=0, force=[])


def test_an_evaluation_during_training_stays_below_its_peak() -> None:
    # Validation took 571 MB during a training for which 246 MB were predicted.
    config = config_of("machine=auto", "machine.device=cpu")
    sizes = sizes_of(config.model, config.architecture, 4096)
    described = Training(sizes=sizes, optimizer=config.optimizer, rows=8, row_tokens=256, device=Device(num_lanes=2))
    peak = described.peak_bytes(8)
    free = forward_tokens(config.machine, sizes)
    bound = forward_tokens(config.machine, sizes, training_peak_bytes=peak)
    weights = 4 * count_parameters(sizes)["total"]
    assert 256 <= bound < free
    assert 2 * weights + predict_forward_bytes(sizes, tokens=bound) <= peak
    assert 2 * weights + predict_forward_bytes(sizes, tokens=2 * bound) > peak


def test_a_plan_says_what_its_trainings_need(tmp_path: Path) -> None:
    config = config_of("machine=cpu")
    lines = describe_memory(config, planned(config, tmp_path))
    assert list(lines) == ["pretrain", "midtrain", "sft"]
    assert lines["pretrain"].endswith("MB with 2,048 tokens at a time")


def test_a_plan_names_steps_that_do_not_fit_beside_each_other(tmp_path: Path) -> None:
    config = config_of("machine=cpu", "machine.max_parallel_steps=2", "pipeline=two_sft")
    plan = planned(config, tmp_path)
    needs = forecast_bytes(config, plan)
    assert needs.keys() >= {"pretrain", "midtrain", "sft_short", "sft_long"}
    both = needs["sft_short"] + needs["sft_long"]
    config.machine.memory_limit_bytes = both
    assert not any("sft_short" in line and "sft_long" in line for line in remark_apart(config, plan))
    config.machine.memory_limit_bytes = both - 1
    (line,) = remark_apart(config, plan)
    assert line.startswith("not at the same time, more than ")
    assert "(machine.memory_limit_bytes): " in line
    assert f"sft_short ({format_bytes(needs['sft_short'])}) and sft_long" in line
    assert "pretrain" not in line, "each other step needs it"
    config.machine.max_parallel_steps = 1
    assert remark_apart(config, plan) == []


def test_a_refusal_names_need_limit_and_keys(tmp_path: Path) -> None:
    limit = "machine.memory_limit_bytes=90000000"
    config = config_of("machine=auto", "model.depth=6", "machine.blas_threads=2", limit)
    with pytest.raises(ConfigError) as caught:
        check_memory(config, planned(config, tmp_path))
    pretrain, midtrain, sft = str(caught.value).splitlines()
    assert pretrain.startswith("pretrain needs about ")
    assert "the limit is 90.0 MB (machine.memory_limit_bytes)" in pretrain
    keys = "machine.grad_checkpointing=true; a smaller model.depth; a smaller pretrain.batch.row_tokens"
    assert pretrain.endswith(f"To lower the need: {keys}")
    assert midtrain.startswith("midtrain ")
    assert "sft.adapter.kind=lora" in sft


def test_device_batch_tokens_bound_the_micro_batch() -> None:
    machine = config_of("machine=cpu", "machine.device_batch_tokens=512").machine
    free = training(None)
    assert rows_at_a_time(free, machine) == 4
    assert rows_at_a_time(training(free.peak_bytes(3)), machine) == 3
    assert rows_at_a_time(training(free.peak_bytes(1) - 1), machine) == 0


@pytest.mark.parametrize("verb", [["plan"], []], ids=["plan", "run"])
def test_a_refusal_comes_before_anything_is_written_with_exit_code_2(
    verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*verb, "machine.memory_limit_bytes=30000000", f"outputs={tmp_path / 'none'}"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: pretrain needs about ")
    assert not (tmp_path / "none").exists()


def test_predicting_and_refusing_need_no_mlx(tmp_path: Path) -> None:
    code = (
        "import sys, json; from mlxchat.composition.compose import compose_config;"
        "from mlxchat.planning.memory import memory_of;"
        "from mlxchat.runner.stage import Stages; config = compose_config([]).config;"
        "[memory_of(config, Stages()[name]) for name in ('pretrain', 'sft', 'rl', 'eval')];"
        "print(json.dumps('mlx' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) is False


# Decoding

# (variant, rows, tokens of the prompt, new tokens, compute type, plain path, bits of the weights)
SAMPLING = [
    ("jul2026", 4, 480, 32, mx.float32, False, None), ("oct2025", 4, 100, 28, mx.float32, False, 4),
    ("oct2025", 1, 8, 2, mx.bfloat16, True, 4), ("oct2025", 32, 100, 28, mx.float32, True, None),
    ("oct2025", 4, 480, 32, mx.float32, False, None), ("oct2025", 32, 100, 28, mx.float32, False, None),
    ("oct2025", 16, 480, 16, mx.float32, True, None), ("oct2025", 4, 60, 4, mx.float32, True, 8),
    ("oct2025", 1, 8, 2, mx.bfloat16, True, None),
]  # fmt: skip


SAMPLE = """
import gc, json, sys
from types import SimpleNamespace
import numpy as np
import mlxchat
import mlx.core as mx
from mlxchat.cpu import runtime
from mlxchat.data.vocabulary import SPECIAL_TOKENS
from mlxchat.engine.generate import Engine
from mlxchat.model.gpt import GPT, init_weights
from mlxchat.model.sizes import GPTSizes

asked = SimpleNamespace(**json.loads(sys.argv[1]))
mx.set_default_device(mx.cpu)
runtime.set_blas_threads(2)
model = GPT(GPTSizes(**asked.sizes))
init_weights(model, 0)
mx.eval(model.parameters())
tokenizer = SimpleNamespace(assistant_end=-1, bos=-2, ends=(-1, -2), special_ids=dict.fromkeys(SPECIAL_TOKENS, -3))
engine = Engine(model, tokenizer, trained=True, bits=asked.bits, dtype=getattr(mx, asked.dtype))
ids = np.random.default_rng(0).integers(0, 2048, asked.prompt).tolist()
for time in range(2):  # compiled functions and their constants, kept for the process, are made the first time
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    engine.complete([[row, *ids[1:]] for row in range(asked.rows)], max_new_tokens=asked.new)
    measured = mx.get_peak_memory() - before
    gc.collect()
print(json.dumps({"measured": measured, "left": mx.get_active_memory() - before}))
"""


@pytest.mark.parametrize(
    ("variant", "rows", "prompt", "new", "dtype", "plain", "bits"),
    quick(SAMPLING, 4),
    ids=str,
)  # fmt: skip
def test_peak_of_sampling_is_predicted_within_15_percent(
    variant: str, rows: int, prompt: int, new: int, dtype: mx.Dtype, plain: bool, bits: int | None
) -> None:
    """Four layers 512 wide; nothing of it is left afterwards, when the step needs the room. A process of its own holds
    nothing of other tests."""
    needs_lanes()
    kind = "float32" if dtype == mx.float32 else "bfloat16"
    config = compose_config(
        ["model.depth=4", f"architecture={variant}", "model.aspect_ratio=128", "model.head_width=128"]
    ).config
    sizes = sizes_of(replace(config.model, context_tokens=512), config.architecture, 2048)
    asked = {"sizes": asdict(sizes), "rows": rows, "prompt": prompt, "new": new, "dtype": kind, "bits": bits}
    done = subprocess.run(
        [sys.executable, "-c", SAMPLE, json.dumps(asked)], env=clean_environment(MLXCHAT_CPU="plain" if plain else ""),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    measured, left = json.loads(done.stdout.splitlines()[-1]).values()
    described = Decoding(
        sizes=sizes, device=Device(plain=plain, compute_bytes=dtype.size, num_lanes=2), row_tokens=prompt + new,
        bits=bits, trained=True, casts=dtype != mx.float32,
    )  # fmt: skip
    predicted = described.bytes_beside_weights(rows)
    print(f"predicted {predicted / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB")
    assert predicted == pytest.approx(measured, rel=0.15)
    assert left < 0.02 * measured


def test_rl_needs_the_larger_of_step_and_sampling() -> None:
    numbers: Any = {"sizes": SIZES, "optimizer": config_of().optimizer, "rows": 256, "row_tokens": 1024}
    step, both = (predict_peak(Training(**numbers, sampled_rows=rows, sampled_tokens=1024), 1) for rows in (0, 256))
    assert both.sampling == decoding(1024).bytes_beside_weights(256) > step.total
    assert both.total == both.weights + both.moments + both.sampling


def test_rollouts_with_rounded_weights_hold_these_beside_the_models_own() -> None:
    sampling = []
    for overrides in ([], ["rl.rollout_bits=8"]):
        found = training_of(config_of("machine=cpu", *overrides), "rl", SIZES)
        sampling.append(predict_peak(found, 1).sampling)
    counts = count_parameters(SIZES)
    assert sampling[1] - sampling[0] > counts["matrices"] + counts["head"], "a byte for each number, and more"


def test_sampled_rows_are_the_most_that_fit() -> None:
    config = config_of("rl.questions_per_iteration=64")

    def sampled(limit: int | None) -> int:
        found = training_of(config, "rl", SIZES)
        found = replace(found, row_tokens=128, sampled_tokens=128, device=training(limit).device)
        return predict_peak(found, 1).sampled_rows

    assert sampled(None) == 32
    held = predict_peak(training(None), 1)
    for rows in (24, 8, 1):
        needed = decoding(128, training(None).device).bytes_beside_weights(rows)
        assert sampled(held.weights + held.moments + needed) == rows
    assert sampled(held.weights) == 1, "the plan is refused by its peak"


def test_samples_and_generated_answers_count_in_the_peak_of_a_training() -> None:
    config = config_of("machine=cpu", "pretrain.prompts=[abc]", "pretrain.sample_tokens=7")
    config.midtrain = replace(config.midtrain, suite={"choice": TaskItem(task="kinds_mc")})
    config.sft = replace(config.sft, suite={"sums": TaskItem(task="gsm8k")}, suite_max_new_tokens=1000)
    pretrain, midtrain, sft = (training_of(config, stage, SIZES) for stage in ("pretrain", "midtrain", "sft"))
    assert (pretrain.sampled_rows, pretrain.sampled_tokens) == (1, 4 + 7), "a token has a byte at least"
    assert midtrain.sampled_rows == 0, "choices are no generated answers"
    assert (sft.sampled_rows, sft.sampled_tokens) == (32, 128 + 1000)
    assert predict_peak(sft, 1).sampling == decoding(1128).bytes_beside_weights(32)
    fewer = replace(sft, device=Device(limit_bytes=sft.peak_bytes(1) - 1))
    assert predict_peak(fewer, 1).sampled_rows < 32


D32 = GPTSizes(
    vocab_size=65536, num_layers=32, num_heads=16, num_kv_heads=16, width=2048, context_tokens=2048, rope_theta=1e4
)


@pytest.mark.parametrize(
    ("overrides", "fits"),
    [
        (["machine=mac_36gb"], True), (["machine=mac_16gb"], True), (["machine=mac_16gb", "adapter=qlora"], True),
        (["machine=mac_36gb", "adapter=none"], False), (["machine=mac_64gb", "adapter=none"], True),
    ],
    ids=str,
)  # fmt: skip
def test_grpo_on_d32_is_admitted_where_it_fits(overrides: list[str], fits: bool) -> None:
    config = config_of("experiment=grpo_nanochat_d32", *overrides)
    training = training_of(config, "rl", D32)
    assert training.row_tokens == 320 + 256, "the longest prompt of GSM8K and rl.max_new_tokens, not the context"
    assert (rows_at_a_time(training, config.machine) > 0) is fits


def test_rows_of_rl_are_the_context_where_the_task_does_not_bound_its_prompts() -> None:
    training = training_of(config_of(), "rl")
    assert training.row_tokens == training.sizes.context_tokens


# Answers


def device(limit: int | None, *, plain: bool = True) -> Device:
    return Device(kind="metal", plain=plain, compute_bytes=2, limit_bytes=limit, limit_is="a test")


def decoding(row_tokens: int, where: Device | None = None, **how: Any) -> Decoding:
    return Decoding(sizes=SIZES, device=where or Device(), row_tokens=row_tokens, **how)


def test_answers_at_a_time_are_the_most_that_fit_beside_the_weights() -> None:
    weights = 2 * count_parameters(SIZES)["total"]
    assert decoding(256, device(None)).rows("it", most=64) == 64
    for rows in (1, 6, 32):
        limit = weights + decoding(256, device(None)).bytes_beside_weights(rows)
        assert decoding(256, device(limit)).rows("it", most=64) == rows
        assert decoding(256, device(limit), kv_bits=4).rows("it", most=64) > rows
        assert decoding(256, device(limit + 100)).rows("it", most=64, held_bytes=100) == rows
    with pytest.raises(ConfigError, match=r"it needs about .* 256 tokens.*limit is 10 B .*: less"):
        decoding(256, device(10), remedies=("less",)).rows("it")


def test_an_evaluation_that_cannot_answer_is_refused_by_the_plan(tmp_path: Path) -> None:
    config = config_of("machine=cpu", "machine.memory_limit_bytes=8000000", "machine.blas_threads=1", "model.depth=2")
    plan = make_plan(config, config.pipeline, Store(tmp_path), targets=["eval_sft"], seed=0, force=[])
    with pytest.raises(ConfigError, match=r"(?m)^eval_sft needs about .*a smaller eval.max_new_tokens$"):
        check_memory(config, plan)
