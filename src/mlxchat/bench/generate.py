"""How fast this machine answers: reading a prompt, decoding at several batch sizes, and what memory would allow."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import Any, TextIO

import mlx.core as mx
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from mlxchat.bench.timing import fill_zero_weights
from mlxchat.config.schema import Config
from mlxchat.config.wording import format_bytes, format_count
from mlxchat.engine.cache import Slots
from mlxchat.engine.decode import Decoder, make_decoder
from mlxchat.engine.quantise import packed_copy
from mlxchat.model.gpt import GPT, init_weights
from mlxchat.model.sizes import count_parameters, sizes_of
from mlxchat.ops.device import describe_device, make_lanes, prepare_machine
from mlxchat.runner.progress import Progress
from mlxchat.store.environment import versions

_BATCH_ROWS = (1, 8, 32)
_PROMPT_TOKENS, _READ_AT_A_TIME = 1024, 512
_STEPS, _WARMUP_STEPS = 12, 3
_BANDWIDTH_BYTES, _BANDWIDTH_TIMES = 256_000_000, 5


def measure_generation(config: Config) -> dict[str, Any]:
    """Return what `mlxchat bench generate --json` prints: plain data, seconds, bytes, tokens per second.

    'decode' has for each batch size tokens per second, of the median step after `bench.past_tokens`, and the bytes that
    a step reads (weights once, keys and values of every row), as a share of what this machine can read in that time.
    'prefill' is a prompt of 1,024 tokens; its 'first_token_seconds' include the step that makes the first token.
    """
    bench = config.bench
    prepare_machine(config.machine)
    sizes = sizes_of(replace(config.model, context_tokens=2 * _PROMPT_TOKENS), config.architecture, bench.vocab_size)
    model = GPT(sizes)
    init_weights(model, config.seed)
    fill_zero_weights(model, config.seed + 1)
    mx.eval(model.parameters())  # type: ignore[no-untyped-call]
    if bench.bits is not None:
        model = packed_copy(model, bench.bits)
    decoder = make_decoder(model, kv_bits=bench.kv_bits)
    with Progress("bench", len(_BATCH_ROWS) + 2, "measurements") as progress:
        bandwidth = _bandwidth()
        progress.update(1, measuring="memory")
        prefill = _prefill(decoder, config.seed)
        progress.update(2, measuring="prefill")
        decode = []
        for place, rows in enumerate(_BATCH_ROWS):
            decode.append(_decode(decoder, rows, bench.past_tokens, bandwidth))
            progress.update(3 + place, measuring=f"{rows} rows")
    return {
        "decode": decode,
        "prefill": prefill,
        "memory_bytes_per_second": bandwidth,
        "weight_bytes_per_step": decoder.bytes_per_step(),
        "model": config.model.name,
        "architecture": config.architecture.name,
        "num_parameters": count_parameters(sizes)["total"],
        "bench": asdict(bench),
        "seed": config.seed,
        "device": describe_device(),
        "versions": versions(),
    }


def print_tables(record: dict[str, Any], stream: TextIO) -> None:
    """Print what `measure_generation` returned."""
    console = Console(file=stream, highlight=False)
    device, prefill = record["device"], record["prefill"]
    console.print(
        f"{record['model']} {record['architecture']}: {format_count(record['num_parameters'])} parameters, "
        f"{device['name']} ({device['backend']}), {device['cores']} cores, {device['blas']}"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for title in ("", "tok/s", "step", "read per step", "of the memory's rate"):
        table.add_column(title, justify="right" if title else "left")
    rate, seconds = prefill["tokens_per_second"], prefill["first_token_seconds"]
    table.add_row(f"prefill, {prefill['tokens']:,} tokens", f"{rate:,.0f}", f"{1000 * seconds:,.0f} ms", "", "")
    for row in record["decode"]:
        table.add_row(
            f"decode, {row['rows']} rows",
            f"{row['tokens_per_second']:,.0f}",
            f"{1000 * row['step_seconds']:,.1f} ms",
            format_bytes(row["step_bytes"]),
            f"{row['share_of_bandwidth']:.0%}",
        )
    console.print(table)
    console.print(
        f"memory: {format_bytes(record['memory_bytes_per_second'])}/s read by all cores together", style="dim"
    )


def _bandwidth() -> float:
    """Return the bytes per second that all lanes together read from large arrays, at best."""
    lanes = make_lanes()
    arrays = [mx.ones(_BANDWIDTH_BYTES // 4 // len(lanes) // 4096 * 4096).reshape(-1, 4096) for _ in range(len(lanes))]
    mx.eval(arrays)
    best = float("inf")
    for _ in range(_BANDWIDTH_TIMES):
        began = time.perf_counter()
        mx.eval(lanes.run([lambda array=array: array.sum(0) for array in arrays]))  # type: ignore[misc]
        best = min(best, time.perf_counter() - began)
    return float(sum(array.nbytes for array in arrays) / best)


def _prefill(decoder: Decoder, seed: int) -> dict[str, Any]:
    ids = np.random.default_rng(seed).integers(0, decoder.sizes.vocab_size, _PROMPT_TOKENS).tolist()
    slots = Slots(decoder)
    reading, first = [], []
    for _ in range(3):
        began, past = time.perf_counter(), None
        for start in range(0, _PROMPT_TOKENS - 1, _READ_AT_A_TIME):
            piece = ids[start : min(start + _READ_AT_A_TIME, _PROMPT_TOKENS - 1)]
            past = slots.read(piece, past, ids[start - 1] if start else None)
        reading.append(time.perf_counter() - began)
        slots.reserve(1, _PROMPT_TOKENS)
        slots.fill(0, past)
        slots.step(ids[-1:], ids[-2:-1], [_PROMPT_TOKENS - 1])
        first.append(time.perf_counter() - began)
    return {
        "tokens": _PROMPT_TOKENS,
        "tokens_per_second": (_PROMPT_TOKENS - 1) / float(np.median(reading[1:])),
        "first_token_seconds": float(np.median(first[1:])),
    }


def _decode(decoder: Decoder, rows: int, past_tokens: int, bandwidth: float) -> dict[str, Any]:
    slots, ids = Slots(decoder), list(range(rows))
    slots.reserve(rows, past_tokens + _WARMUP_STEPS + _STEPS)
    seconds = []
    for step in range(_WARMUP_STEPS + _STEPS):
        began = time.perf_counter()
        slots.step(ids, ids, [past_tokens + step] * rows)
        seconds.append(time.perf_counter() - began)
    median, sizes = float(np.median(seconds[_WARMUP_STEPS:])), decoder.sizes
    seen = sum(past_tokens if window is None else min(past_tokens, window + 1) for window in sizes.windows())
    past_bytes = rows * seen * sizes.num_kv_heads * decoder.format.bytes_per_token()
    step_bytes = decoder.bytes_per_step() + past_bytes
    return {
        "rows": rows,
        "tokens_per_second": rows / median,
        "step_seconds": median,
        "step_bytes": step_bytes,
        "bytes_per_token": step_bytes / rows,
        "past_bytes": past_bytes,
        "share_of_bandwidth": step_bytes / median / bandwidth,
    }
