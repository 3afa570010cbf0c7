"""`mlxchat doctor --gpu`: checks of training, generation and memory on this device, in about two minutes.

Each check compares the default device in bfloat16 with a calculation in NumPy, with MLX's CPU in float32, or with
device_losses.json: losses computed in float32 on a CPU, which are written again by

    MLXCHAT_CPU=plain python -m mlxchat.commands.device_checks --write
"""

from __future__ import annotations

import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxchat.composition.compose import compose_config
from mlxchat.config.schema import AdapterConfig, OptimizerConfig
from mlxchat.data.bpe import train_tokenizer
from mlxchat.engine.generate import Engine
from mlxchat.model.checkpoint import load_checkpoint, save_checkpoint
from mlxchat.model.gpt import GPT
from mlxchat.model.initial import init_weights
from mlxchat.model.lora import attach_adapters
from mlxchat.model.parameters import cast_parameters, flatten_parameters, set_parameters
from mlxchat.model.sizes import GPTSizes, flops_per_token, resolve_targets, sizes_of
from mlxchat.ops.device import backend, prepare_machine
from mlxchat.optim.optimizer import AdamWRule, Optimizer, Rates
from mlxchat.planning.duration import peak_flops
from mlxchat.planning.memory import Training, find_device
from mlxchat.store.environment import versions
from mlxchat.training.batches import Batch, mean_batch
from mlxchat.training.step import TrainStep

LOSSES = Path(__file__).with_name("device_losses.json")
CASES = ("oct2025", "jul2026", "lora")
_STEPS, _VOCABULARY, _TALKER_VOCABULARY = 20, 512, 280
_RATES = Rates(1.0, 0.9, 1.0)
_MATRIX = "transformer.h.0.mlp.c_fc.weight"
_NEAR_TIE = 0.1
"""Logits that differ by less are equal within the rounding of bfloat16, which has 8 bits."""

Numbers = np.ndarray[Any, np.dtype[np.float64]]
Outcome = tuple[str, str, bool]
"""What was measured, what is expected, and whether they agree."""


@dataclass(frozen=True, kw_only=True)
class CheckSizes:
    """Sizes of the checks."""

    depth: int = 4
    width: int = 256
    rows: int = 4
    row_tokens: int = 64
    draws: int = 4096
    """Samples of one distribution."""
    speed: tuple[int, int, int, int] = (8, 512, 8, 1024)
    """Depth, width, rows and tokens of a row with which speed and memory are measured."""


SIZES = {
    "full": CheckSizes(),
    "tiny": CheckSizes(depth=2, width=64, row_tokens=32, draws=512, speed=(2, 64, 2, 128)),
}
"""`full` is for a user's device, `tiny` for tests."""


@dataclass(frozen=True)
class Check:
    """The result of a check, which prints as a line."""

    name: str
    measured: str
    expected: str
    passed: bool
    seconds: float

    def __str__(self) -> str:
        mark = "ok" if self.passed else "FAIL"
        return f"{mark:<5} {self.name:<20} {self.measured:<32} expected {self.expected:<26} {self.seconds:5.1f} s"


def check_device(size: str = "full") -> bool:
    """Run all checks, print a line for each and a summary for bug reports; return True if all passed."""
    checks = []
    prepare_machine(_config("oct2025", "muon_oct2025").machine)
    for check in run_checks(SIZES[size], json.loads(LOSSES.read_text(encoding="utf-8"))[size]):
        print(check, flush=True)
        checks.append(check)
    failed = ", ".join(check.name for check in checks if not check.passed)
    device = f"{mx.device_info().get('device_name')}, {backend()}, {platform.platform()}"
    packages = "  ".join(f"{name} {number}" for name, number in versions().items())
    lines = [device, packages, f"failed: {failed or 'nothing'}", *map(str, checks)]
    print("\nFor a bug report:\n```", *lines, "```", sep="\n")
    return not failed


def run_checks(sizes: CheckSizes, stored: dict[str, list[float]]) -> Iterator[Check]:
    """Yield the result of each check; an exception is a failure. `stored` is case → losses in float32."""
    bench = _Bench(sizes, stored)
    for name, function in _CHECKS.items():
        began = time.perf_counter()
        try:
            outcome = function(bench)
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}", "no exception", False
        yield Check(name, *outcome, seconds=time.perf_counter() - began)
        mx.clear_cache()


class _Bench:
    """What several checks use."""

    def __init__(self, sizes: CheckSizes, stored: dict[str, list[float]]) -> None:
        self.sizes, self.stored = sizes, stored
        self.tokenizer = train_tokenizer(["the cat sat on the mat and the dog sat on the log " * 5], _TALKER_VOCABULARY)
        # Its probabilities are neither equal nor 0 and 1.
        self.talker = _drawn(GPT(self.model_sizes("jul2026", _TALKER_VOCABULARY)[0]))
        set_parameters(self.talker, cast_parameters(flatten_parameters(self.talker), mx.bfloat16))
        self.engine = Engine(self.talker, self.tokenizer)
        random = np.random.RandomState(5)
        self.prompts = [random.randint(0, 256, count).tolist() for count in (5, 30, 9, 2, 17)]

    def model_sizes(
        self, architecture: str, vocab_size: int, optimizer: str | None = None
    ) -> tuple[GPTSizes, OptimizerConfig]:
        """Return the sizes of a small model, and nanochat's optimizer of the same snapshot."""
        config = _config(architecture, optimizer or f"muon_{architecture}")
        model = replace(
            config.model, depth=self.sizes.depth, aspect_ratio=self.sizes.width // self.sizes.depth, head_width=32,
            context_tokens=self.sizes.row_tokens,
        )  # fmt: skip
        return sizes_of(model, config.architecture, vocab_size), config.optimizer

    def trainer(
        self, case: str, *, dtype: mx.Dtype = mx.bfloat16, micro_rows: int | None = None, recompute: bool = False,
        optimizer: str | None = None,
    ) -> TrainStep:  # fmt: skip
        """Return the train step of a new model; `case` is an architecture, or lora: adapters on oct2025."""
        sizes, config = self.model_sizes("oct2025" if case == "lora" else case, _VOCABULARY, optimizer)
        model, rule = GPT(sizes), None
        init_weights(model, seed=1)
        if case == "lora":
            adapters = AdapterConfig(kind="lora", rank=4, targets=resolve_targets(("all",), sizes))
            attach_adapters(_drawn(model), adapters, seed=2, dtype=dtype)
            rule = AdamWRule(1e-2, (0.9, 0.999), 0.0)
        moves = Optimizer(model, config, width=sizes.width, adapter=rule)
        tokens = (micro_rows or self.sizes.rows) * self.sizes.row_tokens
        return TrainStep(model, moves, micro_tokens=tokens, dtype=dtype, recompute=recompute)

    def batch(self, number: int) -> Batch:
        """Return rows in which four tokens of five follow from the one before."""
        random = np.random.RandomState(number)  # its numbers are the same in every version of NumPy
        ids = random.randint(0, _VOCABULARY, (self.sizes.rows, self.sizes.row_tokens + 1))
        follows = random.randint(0, 5, ids.shape) > 0
        for place in range(1, ids.shape[1]):
            ids[:, place] = np.where(follows[:, place], (3 * ids[:, place - 1] + 1) % _VOCABULARY, ids[:, place])
        return mean_batch([(row[:-1].astype(np.int32), row[1:].astype(np.int32)) for row in ids])

    def losses(self, case: str, steps: int = _STEPS, **how: Any) -> list[float]:
        """Return the losses of the first steps of a training."""
        step = self.trainer(case, **how)
        return [step(self.batch(number), _RATES, number)[0] for number in range(steps)]


@cache
def _config(architecture: str, optimizer: str) -> Any:
    return compose_config(["experiment=bench", f"architecture={architecture}", f"optimizer={optimizer}"]).config


def _drawn(model: GPT) -> GPT:
    """Give every parameter normal numbers, so that nothing starts at zero as nanochat's projections do."""
    random = np.random.RandomState(3)

    def draw(name: str, shape: tuple[int, ...]) -> mx.array:
        deviation = 1.0 if "embeds" in name or "wte" in name else shape[-1] ** -0.5 if len(shape) > 1 else 0.1
        return mx.array((random.normal(0, deviation, shape) + (name == "resid_lambdas")).astype(np.float32))

    set_parameters(model, {name: draw(name, value.shape) for name, value in flatten_parameters(model).items()})
    return model


def _float64(array: mx.array) -> Numbers:
    return np.asarray(array.astype(mx.float32)).astype(np.float64)


def _log_softmax(logits: Numbers) -> Numbers:
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def _relative(found: Numbers, expected: Numbers) -> float:
    """Return the 2-norm of the difference as a share of the expected one's."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _below(value: float, limit: float) -> Outcome:
    return f"{value:.2g}", f"at most {limit:.2g}", value <= limit


def _apart(one: list[float], other: list[float]) -> float:
    return max(abs(left - right) for left, right in zip(one, other, strict=True))


# Training


def _first_loss(bench: _Bench, case: str) -> Outcome:
    """October's head is zero, so that all tokens are equally likely; July's is drawn."""
    expected = math.log(_VOCABULARY) if case == "oct2025" else bench.stored[case][0]
    loss = bench.losses(case, steps=1)[0]
    return f"{loss:.4f}", f"{expected:.4f} ± 0.01", abs(loss - expected) < 0.01


def _training(bench: _Bench, case: str) -> Outcome:
    found, stored = bench.losses(case), bench.stored[case]
    worst = _apart(found, stored)
    measured = f"{found[0]:.3f} to {found[-1]:.3f}, off by {worst:.3f}"
    return measured, f"{stored[0]:.3f} to {stored[-1]:.3f} ± 0.05", worst < 0.05


def _recompute(bench: _Bench) -> Outcome:
    return _below(_apart(*(bench.losses("jul2026", steps=3, recompute=each) for each in (False, True))), 5e-3)


def _micro_batches(bench: _Bench) -> Outcome:
    return _below(_apart(*(bench.losses("oct2025", steps=3, micro_rows=rows) for rows in (None, 1))), 5e-3)


def _nan_update(bench: _Bench) -> Outcome:
    step, batch = bench.trainer("oct2025"), bench.batch(0)
    before = {name: np.array(value) for name, value in flatten_parameters(step.model).items()}
    batch.weights[0, 0] = np.nan
    step(batch, _RATES, 0)
    after = flatten_parameters(step.model)
    changed = sum(not np.array_equal(np.array(after[name]), value) for name, value in before.items())
    return f"{changed} weights changed", "0 weights changed", not changed


def _adamw(bench: _Bench) -> Outcome:
    """Compare three updates of a matrix, clipping included, with NumPy."""
    step, first, second = bench.trainer("jul2026", optimizer="adamw", dtype=mx.float32), 0.0, 0.0
    rule, config = step.optimizer.adamw_rules[_MATRIX], step.optimizer.config
    expected = began = _float64(flatten_parameters(step.model)[_MATRIX])
    for count in range(1, 4):
        gradient: Any = _float64(step.gradients(bench.batch(count))[1][_MATRIX])
        _, norm = step(bench.batch(count), _RATES, count)
        gradient *= min(1.0, config.grad_clip / norm) if config.grad_clip else 1.0
        first = rule.betas[0] * first + (1 - rule.betas[0]) * gradient
        second = rule.betas[1] * second + (1 - rule.betas[1]) * gradient**2
        mean, square = first / (1 - rule.betas[0] ** count), second / (1 - rule.betas[1] ** count)
        expected = expected * (1 - rule.lr * rule.weight_decay)
        expected = expected - rule.lr * mean / (np.sqrt(square) + config.adam_epsilon)
    return _below(_relative(_float64(flatten_parameters(step.model)[_MATRIX]) - began, expected - began), 0.02)


def _muon(bench: _Bench) -> Outcome:
    """Compare the first update of a matrix with nanochat's `zeropower_via_newtonschulz5` in NumPy."""
    step = bench.trainer("oct2025")
    _drawn(step.model)
    began = _float64(flatten_parameters(step.model)[_MATRIX])
    gradient = _float64(step.gradients(bench.batch(0))[1][_MATRIX]).T
    step(bench.batch(0), _RATES, 0)
    x = gradient / np.linalg.norm(gradient)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    rows, columns = began.shape
    expected = -step.optimizer.muon_lr * max(1.0, rows / columns) ** 0.5 * x.T
    return _below(_relative(_float64(flatten_parameters(step.model)[_MATRIX]) - began, expected), 0.1)


def _files(bench: _Bench) -> Outcome:
    model = _drawn(GPT(bench.talker.sizes))
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), model, bench.tokenizer, {})
        loaded = flatten_parameters(load_checkpoint(Path(folder))[0])
    different = sum(not np.array_equal(value, loaded[name]) for name, value in flatten_parameters(model).items())
    return f"{different} weights differ", "0 weights differ", not different


# Generation


def _quantised(bench: _Bench, bits: int) -> Outcome:
    """Compare a packed product of many rows, and of one, which has another kernel, with the dequantised one."""
    random, errors = np.random.RandomState(bits), []
    x, matrix = (mx.array(random.normal(0, 1, (rows, 256))).astype(mx.bfloat16) for rows in (64, 512))
    packed = mx.quantize(matrix, group_size=64, bits=bits)
    plain = _float64(mx.dequantize(*packed, group_size=64, bits=bits)).T
    for part in (x, x[:1]):
        found = mx.quantized_matmul(part, *packed, transpose=True, group_size=64, bits=bits)
        errors.append(_relative(_float64(found), _float64(part) @ plain))
    return _below(max(errors), 0.04)  # MLX's CPU sums in bfloat16


def _after(model: GPT, prompt: list[int], answer: list[int]) -> Numbers:
    """Return the logits (tokens of the answer, V) of one forward pass."""
    return _float64(model(mx.array([prompt + answer]))[0])[len(prompt) - 1 : -1]


def _decoding(bench: _Bench) -> Outcome:
    """Compare the log-probabilities of decoded tokens with one forward pass."""
    rows = bench.engine.complete(bench.prompts, max_new_tokens=24, temperature=1.0, seed=1, log_probabilities=True)
    errors: list[float] = []
    for prompt, row in zip(bench.prompts, rows, strict=True):
        expected = _log_softmax(_after(bench.talker, prompt, row.ids))[np.arange(len(row.ids)), row.ids]
        errors += list(np.abs(expected - row.log_probabilities)[np.array(row.mask, dtype=bool)])
    return _below(max(errors), _NEAR_TIE)


def _greedy(bench: _Bench) -> Outcome:
    """Return by how much a greedy token's logit is below the largest one, at most, in float32 on the CPU."""
    answers, gaps = bench.engine.complete(bench.prompts, max_new_tokens=16), []
    with mx.stream(mx.cpu):
        model = GPT(bench.talker.sizes)
        set_parameters(model, cast_parameters(flatten_parameters(bench.talker), mx.float32))
        for prompt, row in zip(bench.prompts, answers, strict=True):
            logits = _after(model, prompt, row.ids)
            gaps.append(float((logits.max(-1) - logits[np.arange(len(row.ids)), row.ids]).max()))
    return _below(max(gaps), _NEAR_TIE)


def _sampling(bench: _Bench) -> Outcome:
    """Compare draws of a token with softmax: Pearson's chi-square, in standard deviations above its mean."""
    prompt, draws, counts = bench.prompts[0], bench.sizes.draws, np.zeros(_TALKER_VOCABULARY)
    for seed in range(draws // 64):
        for row in bench.engine.complete([prompt] * 64, max_new_tokens=1, temperature=1.0, seed=seed):
            counts[row.ids[0]] += 1
    expected = draws * np.exp(_log_softmax(_float64(bench.talker(mx.array([prompt]))[0, -1])))
    often = expected >= 5  # the others are one group
    found, wanted = (np.append(each[often], each[~often].sum()) for each in (counts, expected))
    freedom = len(found) - 1
    return _below((float(np.sum((found - wanted) ** 2 / wanted)) - freedom) / math.sqrt(2 * freedom), 5.0)


# Memory and speed


def _speed(bench: _Bench) -> Outcome:
    """Train a larger model; fails if it needs more memory than was predicted."""
    depth, width, rows, tokens = bench.sizes.speed
    sizes, config = bench.model_sizes("oct2025", 32768)
    sizes = replace(sizes, num_layers=depth, width=width, num_heads=width // 64, num_kv_heads=width // 64)
    sizes = replace(sizes, context_tokens=tokens)
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    model = GPT(sizes)
    init_weights(model, seed=1)
    step = TrainStep(model, Optimizer(model, config, width=width), micro_tokens=rows * tokens, dtype=mx.bfloat16)
    ids = np.random.RandomState(1).randint(0, 32768, (rows, tokens + 1)).astype(np.int32)
    batch = mean_batch([(row[:-1], row[1:]) for row in ids])
    seconds = [_seconds(lambda: mx.eval(step(batch, _RATES), model.state)) for _ in range(4)]
    device = replace(find_device(), compute_bytes=2, plain=True)
    training = Training(sizes=sizes, optimizer=config, rows=rows, row_tokens=tokens, device=device)
    peak, predicted = mx.get_peak_memory() - held, training.peak_bytes(rows)
    rate = rows * tokens / min(seconds)
    known = peak_flops(mx.bfloat16)
    used = f", MFU {flops_per_token(sizes) * rate / known:.0%}" if known else ""
    return f"{rate:,.0f} tok/s{used}, {peak / 1e9:.2f} GB", f"at most {predicted / 1e9:.2f} GB", peak <= predicted


def _decoding_speed(bench: _Bench, rows: int) -> Outcome:
    half = bench.sizes.row_tokens // 2
    prompts = [[index % 256 for index in range(half)]] * rows
    seconds = [_seconds(lambda: bench.engine.complete(prompts, max_new_tokens=half, seed=1)) for _ in range(3)]
    return f"{rows * half / min(seconds):,.0f} tok/s", "any", True


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


_CHECKS: dict[str, Callable[[_Bench], Outcome]] = {
    "first loss, oct2025": lambda bench: _first_loss(bench, "oct2025"),
    "first loss, jul2026": lambda bench: _first_loss(bench, "jul2026"),
    "20 steps, oct2025": lambda bench: _training(bench, "oct2025"),
    "20 steps, jul2026": lambda bench: _training(bench, "jul2026"),
    "20 steps, LoRA": lambda bench: _training(bench, "lora"),
    "recomputation": _recompute,
    "micro-batches": _micro_batches,
    "AdamW": _adamw,
    "Muon": _muon,
    "update with NaN": _nan_update,
    "save and load": _files,
    "8-bit product": lambda bench: _quantised(bench, 8),
    "4-bit product": lambda bench: _quantised(bench, 4),
    "decoding": _decoding,
    "greedy text": _greedy,
    "sampling": _sampling,
    "training": _speed,
    "decoding, 1 row": lambda bench: _decoding_speed(bench, 1),
    "decoding, 32 rows": lambda bench: _decoding_speed(bench, 32),
}


def write_losses() -> None:
    """Write device_losses.json."""
    mx.set_default_device(mx.cpu)
    found = {}
    for name, sizes in SIZES.items():
        bench = _Bench(sizes, {})
        found[name] = {case: [round(loss, 5) for loss in bench.losses(case, dtype=mx.float32)] for case in CASES}
    LOSSES.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    write_losses()
