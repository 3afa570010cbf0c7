"""Predicted against measured peaks, the choice of a micro-batch, and the refusal of what cannot fit."""

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

from kit.commands import clean_environment, run_here
from kit.models import composed
from kit.training import training_of
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
    describe_conflicts,
    forecast_bytes,
    forward_tokens,
    predict_forward_bytes,
    predict_peak,
    rows_at_a_time,
)  # fmt: skip
from mlxchat.runner.plan import PlannedStep, make_plan
from mlxchat.store.store import Store
from mlxchat.training.batches import mean_batch
from mlxchat.training.step import TrainStep

# (path, variant, compute type, depth, vocabulary, tokens per row, rows, micro-batch's rows, recompute, lanes): sizes at
# which each part counts, of a hundred megabytes or more, beside which a few incidental buffers do not matter.
Case = tuple[str, str, mx.Dtype, int, int, int, int, int, bool, int]
SMALL = [(4, 4096, 512, 4, 2, False, 2), (4, 2048, 512, 4, 4, True, 2), (6, 512, 256, 1, 1, False, 1)]
LARGE = [
    (4, 4096, 2048, 2, 2, False, 2), (4, 32768, 512, 4, 4, False, 2), (4, 4096, 1024, 8, 2, True, 2),
    (6, 16384, 512, 4, 2, False, 1), (8, 4096, 256, 2, 1, False, 2), (8, 4096, 512, 2, 2, True, 2),
]  # fmt: skip
PLAIN = [
    ("oct2025", mx.float32, 2, 512, 1024, 2, 2, False), ("oct2025", mx.bfloat16, 2, 2048, 256, 8, 4, False),
    ("oct2025", mx.bfloat16, 2, 16384, 256, 2, 2, False), ("oct2025", mx.bfloat16, 2, 512, 1024, 2, 2, True),
    ("oct2025", mx.float32, 4, 4096, 256, 2, 2, False), ("jul2026", mx.float32, 2, 4096, 256, 4, 2, False),
    ("jul2026", mx.bfloat16, 2, 512, 512, 4, 4, False), ("jul2026", mx.bfloat16, 2, 4096, 256, 4, 2, False),
]  # fmt: skip
CASES: list[Any] = [
    *(("cpu", "oct2025", mx.float32, *case) for case in SMALL),
    *(("cpu", variant, mx.float32, *case) for case in LARGE for variant in ("oct2025", "jul2026")),
    *(("plain", *case, 1) for case in PLAIN),
]


def quick(cases: list[Any], *fast: int) -> list[Any]:
    """Return parameters of which all but those at some places are slow."""
    return [
        pytest.param(case, marks=[] if place in fast else [pytest.mark.slow], id=str(case))
        for place, case in enumerate(cases)
    ]


def compare(case: Case, *, dropout: float = 0.0) -> None:
    """Compare the most bytes that two steps of a training hold, by MLX's own count, with those predicted."""
    path, variant, dtype, depth, vocab_size, row_tokens, rows, micro_rows, recompute, num_lanes = case
    if path == "cpu":
        needs_lanes()
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
    step = TrainStep(
        model, optimizer, micro_tokens=micro_rows * row_tokens, dtype=dtype, recompute=recompute, dropout=dropout
    )
    ids = np.random.default_rng(0).integers(0, vocab_size, (rows, row_tokens + 1), dtype=np.int32)
    batch = mean_batch([(row[:-1], row[1:]) for row in ids])
    for _ in range(2):
        step(batch, rates_at(0, 100, config.sft.schedule, config.optimizer))
    measured = mx.get_peak_memory() - before
    described = Training(
        sizes=sizes, optimizer=config.optimizer, rows=rows, row_tokens=row_tokens, recompute=recompute,
        device=Device(num_lanes=num_lanes, plain=path == "plain", compute_bytes=dtype.size),
    )  # fmt: skip
    predicted = predict_peak(described, micro_rows).total
    print(f"predicted {predicted / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB")
    assert predicted == pytest.approx(measured, rel=0.15)


def needs_lanes() -> None:
    if runtime.blas_threads() is None:
        pytest.skip("factors were measured with OpenBLAS")


@pytest.mark.parametrize("case", quick(CASES, 0, len(CASES) - len(PLAIN)))
def test_peak_of_training_is_predicted_within_15_percent(case, monkeypatch):
    if case[0] == "plain":
        monkeypatch.setenv("MLXCHAT_CPU", "plain")
    compare(case)


@pytest.mark.slow
def test_dropout_keeps_no_masks():
    compare(CASES[1], dropout=0.1)


SIZES = GPTSizes(
    vocab_size=1000, num_layers=4, num_heads=2, num_kv_heads=2, width=64, context_tokens=128, rope_theta=1e4
)


def config_of(*overrides: str) -> Config:
    """Return a configuration of the caller's own."""
    found = composed(*overrides)
    return replace(found, machine=replace(found.machine))


def training(limit: int | None = None, rows: int = 12, **changes: Any) -> Training:
    device = Device(kind="cpu", plain=False, num_lanes=2, compute_bytes=4, limit_bytes=limit, limit_is="a test")
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
    peak, further = (predict_peak(training(None, 1, further_weights=copies), 1) for copies in (0, 1))
    counts = count_parameters(SIZES)
    assert peak.weights == 4 * counts["total"]
    assert peak.moments == 4 * (counts["matrices"] + 2 * (counts["embedding"] + counts["head"]))
    assert further.total - peak.total == 4 * counts["total"]


@pytest.mark.parametrize(
    ("rows", "most", "expected"),
    [(12, 10**4, 12), (12, 6, 6), (12, 0, 1), (12, 5, 4), (12, 7, 6), (13, 8, 7), (13, 12, 7), (7, 3, 3)],
)
def test_micro_batches_have_one_size_where_that_is_cheap(rows, most, expected):
    """Otherwise they are as equal as possible; a row is never cut."""
    assert training(None, rows).micro_rows(most * 128) == expected


def test_largest_micro_batch_that_fits_is_chosen():
    machine, free = composed("machine=cpu", "machine.device_batch_tokens=512").machine, training()
    assert training(free.peak_bytes(5)).micro_rows(10**6) == 4, "the largest divisor of 12 up to 5"
    assert training(free.peak_bytes(1) - 1).micro_rows(10**6) == 0
    assert [rows_at_a_time(training(limit), machine) for limit in (None, free.peak_bytes(3))] == [4, 3]


def test_resumed_training_keeps_its_micro_batch_while_it_fits(tmp_path):
    def chosen(limit: int | None, tokens: int | None = None) -> int:
        config = config_of("machine=cpu", "machine.blas_threads=1")
        config.machine.device_batch_tokens, config.machine.memory_limit_bytes = tokens, limit
        context: Any = SimpleNamespace(step="toy", stage="sft", config=config, team=None, work=tmp_path)
        return choose_micro_batch(context, training()).tokens

    first = chosen(replace(training(), device=Device()).peak_bytes(3))
    assert first < 12 * 128
    assert chosen(None) == first
    assert chosen(None, tokens=256) == 256, "machine.device_batch_tokens has priority"
    assert chosen(None) == 256
    with pytest.raises(ConfigError, match=r"toy needs about .* for one row of 128 tokens"):
        chosen(1000)


def planned(config: Config, tmp_path: Path, target: str = "sft") -> list[PlannedStep]:
    return make_plan(config, config.pipeline, Store(tmp_path), targets=[target], seed=0, force=[])


def test_evaluation_during_training_stays_below_its_peak():
    # Bug: validation took 571 MB during a training for which 246 MB were predicted.
    config = composed("machine=auto", "machine.device=cpu")
    sizes = sizes_of(config.model, config.architecture, 4096)
    described = Training(sizes=sizes, optimizer=config.optimizer, rows=8, row_tokens=256, device=Device(num_lanes=2))
    peak = described.peak_bytes(8)
    bound = forward_tokens(config.machine, sizes, training_peak_bytes=peak)
    weights = 4 * count_parameters(sizes)["total"]
    assert 256 <= bound < forward_tokens(config.machine, sizes)
    assert 2 * weights + predict_forward_bytes(sizes, tokens=bound) <= peak
    assert 2 * weights + predict_forward_bytes(sizes, tokens=2 * bound) > peak


def test_plan_names_steps_that_do_not_fit_at_the_same_time(tmp_path):
    config = config_of("machine=cpu", "machine.max_parallel_steps=2", "pipeline=two_sft")
    plan = planned(config, tmp_path)
    needs = forecast_bytes(config, plan)
    assert needs.keys() >= {"pretrain", "midtrain", "sft_short", "sft_long"}
    both = needs["sft_short"] + needs["sft_long"]
    config.machine.memory_limit_bytes = both
    assert not any("sft_short" in line and "sft_long" in line for line in describe_conflicts(config, plan))
    config.machine.memory_limit_bytes = both - 1
    (line,) = describe_conflicts(config, plan)
    assert line.startswith("not at the same time, more than ")
    assert "(machine.memory_limit_bytes): " in line
    assert f"sft_short ({format_bytes(needs['sft_short'])}) and sft_long" in line
    assert "pretrain" not in line, "each other step needs it"
    config.machine.max_parallel_steps = 1
    assert describe_conflicts(config, plan) == []


def test_refusal_names_need_limit_and_keys(tmp_path):
    config = config_of("machine=auto", "model.depth=6", "machine.blas_threads=2", "machine.memory_limit_bytes=90000000")
    with pytest.raises(ConfigError) as caught:
        check_memory(config, planned(config, tmp_path))
    pretrain, midtrain, sft = str(caught.value).splitlines()
    assert pretrain.startswith("pretrain needs about ")
    assert "the limit is 90.0 MB (machine.memory_limit_bytes)" in pretrain
    keys = "machine.grad_checkpointing=true; a smaller model.depth; a smaller pretrain.batch.row_tokens"
    assert pretrain.endswith(f"To lower the need: {keys}")
    assert midtrain.startswith("midtrain ")
    assert "sft.adapter.kind=lora" in sft
    config.machine.memory_limit_bytes = 8_000_000
    with pytest.raises(ConfigError, match=r"(?m)^eval_sft needs about .*a smaller eval.max_new_tokens$"):
        check_memory(config, planned(config, tmp_path, "eval_sft"))


def test_refusal_exits_with_2_before_anything_is_written(tmp_path, capsys):
    assert run_here("machine.memory_limit_bytes=30000000", f"outputs={tmp_path / 'none'}") == 2
    assert capsys.readouterr().err.startswith("error: pretrain needs about ")
    assert not (tmp_path / "none").exists()


def test_predictions_need_no_mlx(tmp_path):
    code = """
import sys
from mlxchat.composition.compose import compose_config
from mlxchat.planning.memory import memory_of
from mlxchat.runner.stage import Stages
for name in ("pretrain", "sft", "rl", "eval"):
    memory_of(compose_config([]).config, Stages()[name])
assert "mlx" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


# Decoding

# (variant, rows, tokens of the prompt, new tokens, compute type, plain path, bits of the weights)
SAMPLING = [
    ("jul2026", 4, 480, 32, mx.float32, False, None), ("oct2025", 4, 100, 28, mx.float32, False, 4),
    ("oct2025", 1, 8, 2, mx.bfloat16, True, 4), ("oct2025", 32, 100, 28, mx.float32, True, None),
    ("oct2025", 16, 480, 16, mx.float32, False, None), ("oct2025", 4, 60, 4, mx.float32, True, 8),
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


@pytest.mark.parametrize("case", quick(SAMPLING, 1))
def test_peak_of_sampling_is_predicted_within_15_percent(case):
    """Four layers 512 wide, in a new process. Nothing is left afterwards, when the step needs the memory."""
    needs_lanes()
    variant, rows, prompt, new, dtype, plain, bits = case
    kind = "float32" if dtype == mx.float32 else "bfloat16"
    config = composed("model.depth=4", f"architecture={variant}", "model.aspect_ratio=128", "model.head_width=128")
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


def test_quantised_rollouts_hold_packed_and_own_weights():
    sampling = []
    for overrides in ([], ["rl.rollout_bits=8"]):
        found = training_of(config_of("machine=cpu", *overrides), "rl", SIZES)
        sampling.append(predict_peak(found, 1).sampling)
    counts = count_parameters(SIZES)
    assert sampling[1] - sampling[0] > counts["matrices"] + counts["head"], "a byte for each number, and more"


def test_sampled_rows_are_the_most_that_fit():
    config = config_of("rl.questions_per_iteration=64")

    def sampled(limit: int | None) -> int:
        found = training_of(config, "rl", SIZES)
        found = replace(found, row_tokens=128, sampled_tokens=128, device=training(limit).device)
        return predict_peak(found, 1).sampled_rows

    assert sampled(None) == 64
    held = predict_peak(training(), 1)
    for rows in (24, 8, 1):
        needed = decoding(128, training().device).bytes_beside_weights(rows)
        assert sampled(held.weights + held.moments + needed) == rows
    assert sampled(held.weights) == 1, "the plan is refused by its peak"


def test_generated_samples_count_in_the_peak_of_a_training():
    config = config_of("machine=cpu", "pretrain.prompts=[abc]", "pretrain.sample_tokens=7")
    config.midtrain = replace(config.midtrain, suite={"choice": TaskItem(task="kinds_mc")})
    config.sft = replace(config.sft, suite={"sums": TaskItem(task="gsm8k")}, suite_max_new_tokens=1000)
    pretrain, midtrain, sft = (training_of(config, stage, SIZES) for stage in ("pretrain", "midtrain", "sft"))
    assert (pretrain.sampled_rows, pretrain.sampled_tokens) == (1, 4 + 7), "a token has a byte at least"
    assert midtrain.sampled_rows == 0, "choices are no generated answers"
    assert (sft.sampled_rows, sft.sampled_tokens) == (64, 128 + 1000)
    assert predict_peak(sft, 1).sampling == decoding(1128).bytes_beside_weights(64)
    fewer = replace(sft, device=Device(limit_bytes=sft.peak_bytes(1) - 1))
    assert predict_peak(fewer, 1).sampled_rows < 64


D32 = replace(SIZES, vocab_size=65536, num_layers=32, num_heads=16, num_kv_heads=16, width=2048, context_tokens=2048)


@pytest.mark.parametrize(
    ("overrides", "fits"),
    [(["machine=mac_16gb", "adapter=qlora"], True), (["machine=mac_36gb"], True),
     (["machine=mac_36gb", "adapter=none"], False)],
    ids=str,
)  # fmt: skip
def test_grpo_on_d32_is_admitted_where_it_fits(overrides, fits):
    config = composed("experiment=grpo_nanochat_d32", *overrides)
    training = training_of(config, "rl", D32)
    assert training.row_tokens == 320 + 256, "the longest prompt of GSM8K and rl.max_new_tokens, not the context"
    assert (rows_at_a_time(training, config.machine) > 0) is fits
    unbounded = training_of(composed(), "rl")
    assert unbounded.row_tokens == unbounded.sizes.context_tokens, "the task does not bound its prompts"


# Answers


def device(limit: int | None, *, plain: bool = True) -> Device:
    return Device(kind="metal", plain=plain, compute_bytes=2, limit_bytes=limit, limit_is="a test")


def decoding(row_tokens: int, where: Device | None = None, **how: Any) -> Decoding:
    return Decoding(sizes=SIZES, device=where or Device(), row_tokens=row_tokens, **how)


def test_answers_at_a_time_are_the_most_that_fit():
    weights = 2 * count_parameters(SIZES)["total"]
    assert decoding(256, device(None)).rows("it", most=64) == 64
    for rows in (1, 6, 32):
        limit = weights + decoding(256, device(None)).bytes_beside_weights(rows)
        assert decoding(256, device(limit)).rows("it", most=64) == rows
        assert decoding(256, device(limit), kv_bits=4).rows("it", most=64) > rows
        assert decoding(256, device(limit + 100)).rows("it", most=64, held_bytes=100) == rows
    with pytest.raises(ConfigError, match=r"it needs about .* 256 tokens.*limit is 10 B .*: less"):
        decoding(256, device(10), remedies=("less",)).rows("it")
