"""Speed of training: whole steps, forward pass, comparison with the peak."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxchat.config.schema import AdapterConfig, Config
from mlxchat.config.wording import Table, format_bytes, format_count
from mlxchat.data.packing import Row, mean_batch
from mlxchat.errors import ConfigError
from mlxchat.evals.bpb import mean_loss
from mlxchat.model.gpt import GPT
from mlxchat.model.lora import attach_adapters
from mlxchat.model.parameters import flatten_parameters, init_weights, set_parameters, trained_parameters
from mlxchat.model.sizes import GPTSizes, count_parameters, flops_per_token, resolve_adapter, sizes_of
from mlxchat.ops.device import describe_device, prepare_machine
from mlxchat.optim.optimizer import Optimizer, adapter_rule, rates_at
from mlxchat.planning.forecast import peak_flops
from mlxchat.planning.memory import Training, find_device, forward_tokens
from mlxchat.runner.process import Progress, peak_memory_bytes, reset_peak_memory, versions
from mlxchat.training.step import TrainStep

_WARMUP_STEPS = 2  # untimed; the first one compiles


def measure_training(config: Config) -> dict[str, Any]:
    """Return what `mlxchat bench train --json` prints: plain data, seconds, bytes and 10⁹ FLOP/s.

    'tokens_per_second' is a whole step's (loss, gradients, clipping, update; data lies ready), of the median of
    `seconds`. 'forward_tokens_per_second' is the validation loss's, computed as evaluations compute it. 'gflops' are
    the model's FLOPs as nanochat counts them, whatever is computed besides or left out. 'peak_bytes' is of the training
    steps, weights and moments included: the most that MLX held, on a CPU the growth of the process if that is more.
    """
    bench, machine, seed = config.bench, config.machine, config.seed
    dtype = prepare_machine(machine)
    row_tokens = config.model.context_tokens
    sizes = sizes_of(config.model, config.architecture, config.tokenizer.vocab_size)
    tokens = bench.batch_rows * row_tokens
    training = Training(
        sizes=sizes,
        optimizer=config.optimizer,
        rows=bench.batch_rows,
        row_tokens=row_tokens,
        recompute=machine.grad_checkpointing,
        device=find_device(machine),
        adapters=resolve_adapter("adapter", config.adapter, sizes),
    )
    micro_rows = training.fitting_rows(machine)
    if micro_rows == 0:
        raise ConfigError(f"the step {training.explain_excess()}")

    def rows(batch: int) -> list[Row]:
        ids = np.random.default_rng([seed, batch]).integers(
            0, sizes.vocab_size, (bench.batch_rows, row_tokens + 1), dtype=np.int32
        )
        return [(row[:-1], row[1:]) for row in ids]

    reset_peak_memory()
    resident_before = peak_memory_bytes()
    mx.clear_cache()
    mx.reset_peak_memory()
    model, optimizer = _make_model(config, sizes, training.adapters, dtype)
    rates = rates_at(0, 1000, config.pretrain.schedule, config.optimizer)
    train_step = TrainStep(
        model, optimizer, micro_tokens=micro_rows * row_tokens, dtype=dtype, recompute=machine.grad_checkpointing
    )
    count = _WARMUP_STEPS + bench.steps
    batches = [mean_batch(rows(index)) for index in range(count)]
    losses: list[float] = []
    micro_tokens = forward_tokens(machine, sizes)
    with Progress("bench", 2 * count, "measurements") as progress:
        seconds = _time(progress, "step", count, lambda index: losses.append(train_step(batches[index], rates)[0]))
        mlx_peak, resident_peak = mx.get_peak_memory(), peak_memory_bytes()
        forward = _time(
            progress, "forward", count, lambda index: mean_loss(model, rows(index), micro_tokens=micro_tokens)
        )
    seconds, forward = seconds[_WARMUP_STEPS:], forward[_WARMUP_STEPS:]
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
        "micro_batch_tokens": micro_rows * row_tokens,
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
        rule = adapter_rule(config.adapter, sizes.width)
    optimizer = Optimizer(model, config.optimizer, width=sizes.width, adapter=rule)
    mx.eval(model.state, optimizer.state)
    return model, optimizer


def fill_zero_weights(model: nn.Module, seed: int) -> None:
    """Replace weights that start at zero by N(0, 1/columns), so that no product is trivial."""
    parameters = flatten_parameters(model)
    keys = mx.random.split(mx.random.key(seed), len(parameters))
    drawn = {
        name: mx.random.normal(value.shape, key=keys[index]) / value.shape[-1] ** 0.5
        for index, (name, value) in enumerate(parameters.items())
        if not mx.any(value != 0).item()
    }
    set_parameters(model, drawn)


def _time(progress: Progress, what: str, count: int, work: Callable[[int], object]) -> list[float]:
    """Return the seconds of each of `count` calls, which get their number; `what` is shown as progress."""
    found: list[float] = []
    for index in range(count):
        began = time.perf_counter()
        work(index)
        found.append(time.perf_counter() - began)
        progress.update(index + 1 if what == "step" else count + index + 1, measuring=what)
    return found


def print_tables(record: dict[str, Any]) -> None:
    """Print what `measure_training` returned."""
    bench, sizes, device, optimizer = record["bench"], record["sizes"], record["device"], record["optimizer"]
    print(
        f"{record['model']} {record['architecture']}: {format_count(record['num_parameters'])} parameters, "
        f"{sizes['num_layers']} layers of width {sizes['width']}, vocabulary {sizes['vocab_size']}, "
        f"{bench['batch_rows']} × {sizes['context_tokens']} tokens, {optimizer['kind']} {optimizer['variant']}, "
        f"{record['dtype']}{_adapter(record)}"
    )
    versions = " ".join(f"{name} {record['versions'].get(name, '?')}" for name in ("mlxchat", "mlx"))
    print(f"{device['name']} ({device['backend']}), {device['cores']} cores, {record['blas']}; {versions}\n")
    peak, share = record["peak_gflops"], record["share_of_peak"]
    held = f"MLX {format_bytes(record['mlx_peak_bytes'])}, process +{format_bytes(record['resident_growth_bytes'])}"
    rows = [
        ["training step", f"{record['tokens_per_second']:,.0f} tok/s", _spread(record["seconds"])],
        ["validation", f"{record['forward_tokens_per_second']:,.0f} tok/s", _spread(record["forward_seconds"])],
        ["FLOPs", f"{record['gflops']:,.1f} GFLOP/s", f"{format_count(record['flops_per_token'])} per token"],
        ["share of the peak", f"{share:.1%}" if peak else "unknown", f"{peak:,.1f} GFLOP/s published" if peak else ""],
        ["peak memory", format_bytes(record["peak_bytes"]), held],
    ]
    print(Table(header=["", "measured", ""], align="lrl", rows=rows).text())


def _adapter(record: dict[str, Any]) -> str:
    adapter = record["adapter"]
    if adapter is None:
        return ""
    base = "" if adapter["bits"] is None else f" on {adapter['bits']} bits"
    trained = format_count(record["num_trained_parameters"])
    return f", {adapter['kind']} of rank {adapter['rank']}{base} ({trained} trained)"


def _spread(seconds: list[float]) -> str:
    return f"{min(seconds):.3f} to {max(seconds):.3f} s, {len(seconds)} times"
