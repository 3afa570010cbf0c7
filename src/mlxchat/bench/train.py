"""Speed of training: whole steps, forward pass, comparison with the peak."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from statistics import median
from typing import Any

import mlx.core as mx

from mlxchat.bench.timing import Stopwatch, fill_zero_weights, random_rows
from mlxchat.config.schema import AdapterConfig, Config
from mlxchat.errors import ConfigError
from mlxchat.evals.bpb import mean_loss
from mlxchat.model.gpt import GPT
from mlxchat.model.initial import init_weights
from mlxchat.model.lora import attach_adapters
from mlxchat.model.parameters import trained_parameters
from mlxchat.model.sizes import GPTSizes, count_parameters, flops_per_token, resolve_adapter, sizes_of
from mlxchat.ops.device import describe_device, prepare_machine
from mlxchat.optim.optimizer import Optimizer, Rates, adapter_rule, rates_at
from mlxchat.planning.duration import peak_flops
from mlxchat.planning.memory import Training, find_device, forward_tokens
from mlxchat.runner.progress import Progress
from mlxchat.store.environment import peak_memory_bytes, reset_peak_memory, versions
from mlxchat.training.batches import mean_batch
from mlxchat.training.step import TrainStep


def measure_training(config: Config) -> dict[str, Any]:
    """Return what `mlxchat bench train --json` prints: plain data, seconds, bytes and 10⁹ FLOP/s.

    'tokens_per_second' is a whole step's (loss, gradients, clipping, update; data lies ready), of the median of
    `seconds`. 'forward_tokens_per_second' is the validation loss's, computed as evaluations compute it. 'gflops' are
    the model's FLOPs as nanochat counts them, whatever is computed besides or left out. 'peak_bytes' is of the training
    steps, weights and moments included: the most that MLX held, on a CPU the growth of the process if that is more.
    """
    bench, machine, seed = config.bench, config.machine, config.seed
    dtype = prepare_machine(machine)
    sizes = sizes_of(replace(config.model, context_tokens=bench.row_tokens), config.architecture, bench.vocab_size)
    tokens = bench.batch_rows * bench.row_tokens
    training = Training(
        sizes=sizes,
        optimizer=config.optimizer,
        rows=bench.batch_rows,
        row_tokens=bench.row_tokens,
        recompute=machine.grad_checkpointing,
        device=find_device(machine),
        adapters=resolve_adapter("adapter", config.adapter, sizes),
    )
    micro_rows = training.fitting_rows(machine)
    if micro_rows == 0:
        raise ConfigError(f"the step {training.explain_excess()}")

    def rows(batch: int) -> Any:
        return random_rows(bench.batch_rows, bench.row_tokens, bench.vocab_size, seed=seed, batch=batch)

    reset_peak_memory()
    resident_before = peak_memory_bytes()
    mx.clear_cache()
    mx.reset_peak_memory()
    model, optimizer = _make_model(config, sizes, training.adapters, dtype)
    rates = rates_at(0, 1000, config.pretrain.schedule, config.optimizer)
    with Progress("bench", 2 * (bench.warmup_steps + bench.steps), "measurements") as progress:
        watch = Stopwatch(progress)
        step, losses = _step(config, model, optimizer, dtype, rates, rows, micro_rows * bench.row_tokens)
        seconds = watch.seconds("step", step, steps=bench.steps, warmup_steps=bench.warmup_steps)
        mlx_peak, resident_peak = mx.get_peak_memory(), peak_memory_bytes()
        micro_tokens = forward_tokens(machine, sizes)
        forward = watch.seconds(
            "forward", lambda index: mean_loss(model, rows(index), micro_tokens=micro_tokens),
            steps=bench.steps, warmup_steps=bench.warmup_steps,
        )  # fmt: skip
        peak = peak_flops(dtype)
        flops = flops_per_token(sizes) * tokens / median(seconds)
    growth = max(0, resident_peak - resident_before)
    device = describe_device()
    return {
        "tokens_per_second": tokens / median(seconds),
        "forward_tokens_per_second": tokens / median(forward),
        "peak_bytes": max(mlx_peak, growth) if device["backend"] == "cpu" else mlx_peak,
        "gflops": flops / 1e9,
        "peak_gflops": peak / 1e9 if peak else None,
        "share_of_peak": flops / peak if peak else None,
        "seconds": seconds,
        "forward_seconds": forward,
        "tokens_per_step": tokens,
        "micro_batch_tokens": micro_rows * bench.row_tokens,
        "predicted_peak_bytes": training.peak_bytes(micro_rows),
        "mlx_peak_bytes": mlx_peak,
        "resident_growth_bytes": growth,
        "peak_rss_bytes": resident_peak,
        "loss": losses[-1] if math.isfinite(losses[-1]) else None,
        "model": config.model.name,
        "architecture": config.architecture.name,
        "optimizer": {"kind": config.optimizer.kind, "variant": config.optimizer.variant},
        "sizes": asdict(sizes),
        "num_parameters": count_parameters(sizes)["total"],
        "adapter": asdict(config.adapter) if training.adapters is not None else None,
        "num_trained_parameters": sum(value.size for value in trained_parameters(model).values()),
        "flops_per_token": flops_per_token(sizes),
        "bench": asdict(bench),
        "seed": seed,
        "dtype": str(dtype).removeprefix("mlx.core."),
        "device": device,
        "blas": device["blas"],
        "versions": versions(),
    }


def _make_model(
    config: Config, sizes: GPTSizes, adapters: AdapterConfig | None, dtype: mx.Dtype
) -> tuple[GPT, Optimizer]:
    model = GPT(sizes)
    init_weights(model, config.seed)
    fill_zero_weights(model, config.seed + 1)
    rule = None
    if adapters is not None:
        attach_adapters(model, adapters, seed=config.seed, dtype=dtype)
        fill_zero_weights(model, config.seed + 2)
        rule = adapter_rule(config.adapter, sizes.width, config.optimizer)
    optimizer = Optimizer(model, config.optimizer, width=sizes.width, adapter=rule)
    mx.eval(model.state, optimizer.state)
    return model, optimizer


def _step(
    config: Config, model: GPT, optimizer: Optimizer, dtype: mx.Dtype, rates: Rates,
    rows: Callable[[int], Any], micro_tokens: int,
) -> tuple[Callable[[int], None], list[float]]:  # fmt: skip
    """Return a function that trains on the batch of a number, and the list of losses it appends to."""
    machine, bench = config.machine, config.bench
    train_step = TrainStep(
        model, optimizer, micro_tokens=micro_tokens, dtype=dtype, recompute=machine.grad_checkpointing
    )
    batches = [mean_batch(rows(index)) for index in range(bench.warmup_steps + bench.steps)]
    losses: list[float] = []

    def step(index: int) -> None:
        loss, _ = train_step(batches[index], rates)
        losses.append(loss)

    return step, losses
