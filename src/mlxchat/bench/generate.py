"""Speed of generation: prefill and decoding at several batch sizes, compared with bandwidth and peak FLOPs."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np

from mlxchat.bench.train import fill_zero_weights
from mlxchat.config.schema import BenchConfig, Config
from mlxchat.config.wording import Table, format_bytes, format_count
from mlxchat.engine.batch import Generator, Request
from mlxchat.engine.decode import Decoder
from mlxchat.errors import ConfigError
from mlxchat.model.checkpoint import load_for_inference
from mlxchat.model.gpt import GPT
from mlxchat.model.lora import packed_copy
from mlxchat.model.parameters import cast_parameters, flatten_parameters, init_weights, set_parameters
from mlxchat.model.sizes import GPTSizes, count_parameters, sizes_of
from mlxchat.ops.device import describe_device, prepare_machine
from mlxchat.planning.forecast import peak_flops
from mlxchat.planning.inputs import sizes_of_folder
from mlxchat.planning.memory import Decoding, find_device
from mlxchat.runner.process import Progress, peak_memory_bytes, reset_peak_memory, versions

# Prefill is repeated for at most so many seconds.
_ENOUGH_SECONDS = 3.0
_BANDWIDTH_BYTES, _BANDWIDTH_TIMES = 256_000_000, 5
_ARRAYS = 16  # that are read to measure it


def measure_generation(config: Config, given: Path | None = None) -> dict[str, Any]:
    """Return what `mlxchat bench generate --json` prints: plain data, seconds, bytes, tokens per second.

    'results' has an entry for each number of rows and each length of prompts. 'prompt_tokens_per_second' counts the
    time to every row's first token, the median of `bench.steps` readings; 'decode_tokens_per_second' the median step
    after it. 'share_of_bandwidth' is what a step reads (weights once, keys and values of every row), of what this
    machine can read in that time. 'prompt_mfu' and 'decode_mfu' are shares of the device's peak (null: unknown).
    'peak_bytes' is what MLX held at most, weights included; on a CPU the process.

    `given` is the artifact that is measured; None: random weights of the configuration's sizes. ConfigError: it does
    not fit into memory.
    """
    bench, dtype = config.bench, prepare_machine(config.machine)
    longest = max(bench.prompt_tokens) + bench.new_tokens
    sizes = sizes_of(replace(config.model, context_tokens=longest), config.architecture, config.tokenizer.vocab_size)
    sizes = sizes if given is None else sizes_of_folder(given)
    device, rows = find_device(config.machine), max(bench.rows)
    needed = Decoding(sizes=sizes, device=device, row_tokens=longest, bits=bench.bits).peak_bytes(rows)
    if not device.fits(needed):
        what = f"{rows} rows of {longest:,} tokens, prompts and answers, with the weights"
        remedies = ("a smaller bench.rows", "a smaller bench.prompt_tokens", "a smaller bench.new_tokens")
        raise ConfigError(f"bench generate {device.excess(needed, what, remedies)}")
    results = []
    with Progress("bench", len(bench.rows) * len(bench.prompt_tokens), "measurements") as progress:
        bandwidth, peak = _bandwidth(), peak_flops(dtype)
        model = _load(config, given, sizes, dtype)
        for rows in bench.rows:
            for tokens in bench.prompt_tokens:
                mx.clear_cache()
                results.append(_measure(model, rows, tokens, bench, config.seed, bandwidth, peak))
                progress.update(len(results), measuring=f"{rows} × {tokens}")
    return {
        "results": results, "memory_bytes_per_second": bandwidth, "peak_gflops": peak / 1e9 if peak else None,
        "weight_bytes_per_step": model.weight_bytes, "model": config.model.name if given is None else given.name,
        "architecture": sizes.architecture, "num_parameters": model.num_parameters, "bench": asdict(bench),
        "seed": config.seed, "dtype": str(dtype).removeprefix("mlx.core."), "device": describe_device(),
        "versions": versions(),
    }  # fmt: skip


def print_tables(record: dict[str, Any]) -> None:
    """Print what `measure_generation` returned."""
    device = record["device"]
    name = " ".join(filter(None, (record["model"], record["architecture"])))
    size = f"{format_count(record['num_parameters'])} parameters"
    print(f"{name}: {size}, a step of decoding reads {format_bytes(record['weight_bytes_per_step'])} of weights")
    print(f"{device['name']} ({device['backend']}), {device['cores']} cores, {device['blas']}\n")
    header = ["batch", "prompt", "prompt tok/s", "MFU", "first token", "decode tok/s", "MFU", "bandwidth", "memory"]
    rows = [
        [
            f"{row['rows']}",
            f"{row['prompt_tokens']:,}",
            f"{row['prompt_tokens_per_second']:,.0f}",
            _share(row["prompt_mfu"]),
            f"{row['first_token_seconds']:,.3f} s",
            f"{row['decode_tokens_per_second']:,.0f}",
            _share(row["decode_mfu"]),
            _share(row["share_of_bandwidth"]),
            format_bytes(row["peak_bytes"]),
        ]
        for row in record["results"]
    ]
    print(Table(header=header, align="r" * len(header), rows=rows).text())
    peak = "unknown" if record["peak_gflops"] is None else f"{record['peak_gflops']:,.0f} GFLOP/s"
    bandwidth = f"of {format_bytes(record['memory_bytes_per_second'])}/s that all cores read together"
    print(f"\nbandwidth: {bandwidth}; MFU: of the peak, {peak} in {record['dtype']}")


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"


def _load(config: Config, given: Path | None, sizes: GPTSizes, dtype: mx.Dtype) -> _Rows:
    if given is not None:
        model, _, _ = load_for_inference(given, dtype)
    else:
        model = GPT(sizes)
        init_weights(model, config.seed)
        fill_zero_weights(model, config.seed + 1)
        set_parameters(model, cast_parameters(flatten_parameters(model), dtype))
        mx.eval(flatten_parameters(model))
    if config.bench.bits is not None:
        model = packed_copy(model, config.bench.bits)
    return _Rows(model)


def _measure(
    model: _Rows, rows: int, tokens: int, bench: BenchConfig, seed: int, bandwidth: float, peak: float | None
) -> dict[str, Any]:
    prompts = np.random.default_rng(seed).integers(0, model.vocab_size, (rows, tokens)).tolist()
    reset_peak_memory()
    model.read(prompts, bench.new_tokens)  # compiles
    model.step()
    reading: list[float] = []
    while not reading or (len(reading) < bench.steps and sum(reading) < _ENOUGH_SECONDS):
        began = time.perf_counter()
        model.read(prompts, bench.new_tokens)
        reading.append(time.perf_counter() - began)
    steps = []
    for _ in range(bench.new_tokens - 1):
        began = time.perf_counter()
        model.step()
        steps.append(time.perf_counter() - began)
    first, step, past = median(reading), median(steps), tokens + bench.new_tokens // 2
    past_bytes = model.past_bytes(rows, past)
    step_bytes = model.weight_bytes + past_bytes
    prompt_rate, decode_rate = rows * tokens / first, rows / step
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    return {
        "rows": rows,
        "prompt_tokens": tokens,
        "new_tokens": bench.new_tokens,
        "prompt_tokens_per_second": prompt_rate,
        "first_token_seconds": first,
        "prompt_mfu": prompt_rate * model.flops(tokens / 2, decoding=False) / peak if peak else None,
        "decode_tokens_per_second": decode_rate,
        "step_seconds": step,
        "decode_mfu": decode_rate * model.flops(past, decoding=True) / peak if peak else None,
        "step_bytes": step_bytes,
        "past_bytes": past_bytes,
        "share_of_bandwidth": step_bytes / step / bandwidth,
        "peak_bytes": peak_memory_bytes() if on_cpu else mx.get_peak_memory(),
    }


class _Rows:
    """A batch of rows, computed as in the engine.

    `weight_bytes` is what a decoding step reads of the weights.
    """

    def __init__(self, model: GPT) -> None:
        self._decoder = Decoder(model)
        self._sizes, self._counts = model.sizes, count_parameters(model.sizes)
        self.vocab_size, self.num_parameters = model.sizes.vocab_size, self._counts["total"]
        tables = tuple(f"{name}." for name in model.tables())
        weights = flatten_parameters(model)
        self.weight_bytes = sum(value.nbytes for name, value in weights.items() if not name.startswith(tables))
        self._number_bytes: int = model.transformer["wte"].weight.dtype.size

    def read(self, prompts: list[list[int]], new_tokens: int) -> None:
        """Prefill prompts of equal length, and compute the first token after each."""
        self._decoder.resize([], 0, 1)
        self._generator = Generator(self._decoder, max_rows=len(prompts))
        for ids in prompts:
            self._generator.insert(Request(prompt=ids, max_new_tokens=new_tokens + 2))
        while not self._generator.next():  # the first call reads the prompts
            pass

    def step(self) -> None:
        """Decode one more token of each row."""
        self._generator.next()

    def past_bytes(self, rows: int, tokens: int) -> int:
        """Return the bytes of KV cache that a decoding step reads after so many tokens per row."""
        return 2 * rows * self._seen(tokens) * self._sizes.kv_width * self._number_bytes

    def flops(self, tokens: float, *, decoding: bool) -> float:
        """Return the FLOPs of one token that follows `tokens` others; the output head counts if `decoding`."""
        weights = self._counts["matrices"] + (self._counts["head"] if decoding else 0)
        return 2 * weights + 4 * self._sizes.width * self._seen(int(tokens))

    def _seen(self, tokens: int) -> int:
        """Return the number of attended tokens, summed over layers, after so many."""
        return sum(tokens if window is None else min(tokens, window + 1) for window in self._sizes.windows)


def _bandwidth() -> float:
    """Return the best memory bandwidth in bytes per second."""
    arrays = [mx.ones(_BANDWIDTH_BYTES // 4 // _ARRAYS // 4096 * 4096).reshape(-1, 4096) for _ in range(_ARRAYS)]
    mx.eval(arrays)
    best = float("inf")
    for _ in range(_BANDWIDTH_TIMES):
        began = time.perf_counter()
        sum_arrays(arrays)
        best = min(best, time.perf_counter() - began)
    return float(sum(array.nbytes for array in arrays) / best)


def sum_arrays(arrays: list[mx.array]) -> None:
    """Read arrays once."""
    mx.eval([mx.sum(array, axis=0) for array in arrays])
