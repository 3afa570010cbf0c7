"""What a recipe would take on other machines, on paper: compute, memory, and bytes of a step against links.

A step of `training/team_step.py` on n ranks, each with P parameters of float32: rank 0 sends the batch to all, each
rank computes its n-th of the rows, gradients are summed around a ring, each rank moves an n-th of the parameters, and
the new weights are gathered. Nothing of it happens at the same time as anything else, so the times add up:

    seconds = FLOPs / (n × rate) + bytes / link
    bytes = 2 (n−1)/n × 12 × tokens (batch) + 2 (n−1)/n × 4 P (gradients) + (n−1)/n × 4 P (weights)
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from typing import Any, TextIO

import yaml

from mlxchat.config import Config
from mlxchat.errors import ConfigError
from mlxchat.model.sizes import GPTSizes, count_parameters, flops_per_token, sizes_of
from mlxchat.ops.machine import BUCKET_BYTES
from mlxchat.optimizer_config import OptimizerConfig
from mlxchat.planning.horizon import derive_hyperparameters
from mlxchat.planning.memory import Device, Training

_NUMBER_BYTES = 4
_BATCH_TOKEN_BYTES = 12  # id, target, weight
_NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One rank's machine."""

    name: str
    flops: float
    """FLOPs a second that training may reach, in bfloat16."""
    memory_bytes: float
    """What a training may take of its memory."""
    source: str


@dataclass(frozen=True, kw_only=True)
class Link:
    """What connects neighbours in the ring."""

    name: str
    bytes_per_second: float
    """In one direction, while the other one is used as much."""
    latency_seconds: float
    source: str


ULTRA = Machine(
    name="M3 Ultra, 80 cores",
    flops=14.2e12,
    memory_bytes=200e9,
    source="half of the peak of twice an M3 Max of 40 cores (14.2 TFLOP/s, hmc-tech.com); of 256 GB",
)
H100 = Machine(
    name="H100 SXM",
    flops=0.509 * 989.4e12,
    memory_bytes=76e9,
    source="989.4 TFLOP/s (glennklockwood.com, after NVIDIA) × 50.9 %, nanochat's share with d32 on 8 of them",
)
LINKS = (
    Link(name="1 GbE", bytes_per_second=0.118e9, latency_seconds=3e-4, source="94 % of the line"),
    Link(name="10 GbE", bytes_per_second=1.18e9, latency_seconds=3e-4, source="94 % of the line"),
    Link(
        name="Thunderbolt 4, IP",
        bytes_per_second=2.05e9,
        latency_seconds=3e-4,
        source="16.4 Gbit/s of TCP over a link of 20 Gbit/s in each direction (jiribrejcha.net)",
    ),
    Link(
        name="Thunderbolt 5, RDMA",
        bytes_per_second=7.4e9,
        latency_seconds=5e-5,
        source="7.4 GB/s between two Macs by jaccl (zingnex.cn), under 50 µs (on Apple's TN3205, adwaitx.com)",
    ),
    Link(name="PCIe 5 × 16", bytes_per_second=50e9, latency_seconds=2e-5, source="64 GB/s nominal, 80 % of it"),
    Link(name="NVLink 4", bytes_per_second=360e9, latency_seconds=1e-5, source="450 GB/s nominal, 80 % of it"),
)


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a recipe asks of whatever machine."""

    sizes: GPTSizes
    optimizer: OptimizerConfig
    batch_tokens: int
    row_tokens: int
    num_iterations: int

    @property
    def step_flops(self) -> float:
        """Of forward and backward pass."""
        return float(flops_per_token(self.sizes)) * self.batch_tokens

    @property
    def optimizer_flops(self) -> float:
        """Of Muon's orthogonalising; what moves numbers one by one is not counted."""
        return orthogonalising_flops(self.sizes) if self.optimizer.kind == "muon" else 0.0


def orthogonalising_flops(sizes: GPTSizes) -> float:
    """Return the FLOPs of Newton-Schulz on all matrices of the layers.

    A step with a matrix of m × n, m ≤ n, is X Xᵀ (2 m² n), its square (2 m³) and a product with X (2 m² n).
    """
    width, kv = sizes.width, sizes.kv_width
    shapes = [(width, width)] * 2 + [(kv, width)] * 2 + [(width, 4 * width)] * 2
    each = sum(4 * min(shape) ** 2 * max(shape) + 2 * min(shape) ** 3 for shape in shapes)
    return float(_NEWTON_SCHULZ_STEPS * sizes.num_layers * each)


def sent_bytes(parameters: int, batch_tokens: int, ranks: int) -> dict[str, float]:
    """Return the bytes that a rank sends to its neighbour in one step, by what they are."""
    around = (ranks - 1) / ranks
    return {
        "batch": 2 * around * _BATCH_TOKEN_BYTES * batch_tokens,
        "gradients": 2 * around * _NUMBER_BYTES * parameters,
        "weights": around * _NUMBER_BYTES * parameters,
    }


def sum_seconds(size: float, ranks: int, link: Link) -> float:
    """Return how long a sum of `size` bytes takes around a ring: 2 (n − 1) messages of an n-th."""
    return 2 * (ranks - 1) * (size / ranks / link.bytes_per_second + link.latency_seconds)


def gather_seconds(size: float, ranks: int, link: Link) -> float:
    """Return how long it takes until every rank has what all have, `size` bytes each: n − 1 messages of a whole."""
    return (ranks - 1) * (size / link.bytes_per_second + link.latency_seconds)


def step_on(load: Load, machine: Machine, ranks: int, link: Link | None) -> dict[str, Any]:
    """Return what one step takes on so many machines: seconds, bytes, efficiency, days of the whole training, memory.

    Args:
        load: the recipe.
        machine: of each rank.
        ranks: how many.
        link: between neighbours; None for one rank.
    """
    parameters = count_parameters(load.sizes)["total"]
    compute = load.step_flops / (ranks * machine.flops)
    moving = load.optimizer_flops / (ranks * machine.flops)
    sent = sent_bytes(parameters, load.batch_tokens, ranks)
    talking = 0.0
    if link is not None and ranks > 1:
        buckets = -(-_NUMBER_BYTES * parameters // BUCKET_BYTES)
        talking = buckets * sum_seconds(_NUMBER_BYTES * parameters / buckets, ranks, link)
        talking += buckets * gather_seconds(_NUMBER_BYTES * parameters / buckets / ranks, ranks, link)
        talking += sum_seconds(_BATCH_TOKEN_BYTES * load.batch_tokens, ranks, link)
    seconds = compute + moving + talking
    rows = -(-load.batch_tokens // load.row_tokens // ranks)
    micro_rows, memory = _micro_rows(load, machine, ranks, rows)
    return {
        "machine": machine.name,
        "ranks": ranks,
        "link": link.name if link else None,
        "compute_seconds": compute,
        "optimizer_seconds": moving,
        "sent_bytes": sent if ranks > 1 else {"batch": 0.0, "gradients": 0.0, "weights": 0.0},
        "communication_seconds": talking,
        "step_seconds": seconds,
        "efficiency": (compute + moving) / seconds,
        "days": load.num_iterations * seconds / 86400,
        "micro_rows": micro_rows,
        "memory_bytes": memory,
    }


def _micro_rows(load: Load, machine: Machine, ranks: int, rows: int) -> tuple[int, int]:
    """Return the largest power of two of rows at a time that fits, 0 if none does, and the bytes of it, or of one."""
    fitting = 1
    best = (0, _peak(load, ranks, rows, 1))
    while fitting <= rows:
        peak = _peak(load, ranks, rows, fitting)
        if peak <= machine.memory_bytes:
            best = (fitting, peak)
        fitting *= 2
    return best


def _peak(load: Load, ranks: int, rows: int, micro_rows: int) -> int:
    training = Training(
        sizes=load.sizes, optimizer=load.optimizer, rows=rows * ranks, row_tokens=load.row_tokens, num_ranks=ranks,
        device=Device(kind="metal", plain=True, compute_bytes=2),
    )  # fmt: skip
    return training.peak_bytes(micro_rows)


def load_of(config: Config) -> Load:
    """Return what a configuration's pretraining asks of a machine."""
    sizes = sizes_of(config.model, config.architecture, config.tokenizer.vocab_size)
    derived = derive_hyperparameters(config, sizes)
    row_tokens = config.pretrain.batch.row_tokens or sizes.context_tokens
    return Load(
        sizes=sizes, optimizer=config.optimizer, batch_tokens=derived.batch_tokens, row_tokens=row_tokens,
        num_iterations=derived.num_iterations,
    )  # fmt: skip


def mac(preset: str, name: str) -> Machine:
    """Return the machine of a preset in conf/machine.

    Raises:
        ConfigError: it does not say what a training reaches there.
    """
    said = yaml.safe_load(files("mlxchat.conf").joinpath("machine", f"{preset}.yaml").read_text(encoding="utf-8"))
    missing = [key for key in ("training_flops", "memory_limit_bytes") if said.get(key) is None]
    if missing:
        raise ConfigError(f"conf/machine/{preset}.yaml does not say {' and '.join(missing)}")
    flops, memory = float(said["training_flops"]), float(said["memory_limit_bytes"])
    return Machine(name=name, flops=flops, memory_bytes=memory, source=f"conf/machine/{preset}.yaml")


def measure_machines(config: Config) -> dict[str, Any]:
    """Return the plan of a configuration's pretraining: nothing is measured."""
    load = load_of(config)
    max_40 = mac("mac_128gb", "M4 Max, 40 cores")
    cases: list[tuple[Machine, int, Link | None]] = [(max_40, 1, None), (ULTRA, 1, None), (H100, 1, None)]
    cases += [(max_40, 4, link) for link in LINKS[:4]]
    cases += [(ULTRA, 4, link) for link in LINKS[1:4]]
    cases += [(H100, 8, link) for link in LINKS[4:]]
    counts = count_parameters(load.sizes)
    return {
        "model": config.model.name,
        "num_parameters": counts["total"],
        "batch_tokens": load.batch_tokens,
        "num_iterations": load.num_iterations,
        "step_flops": load.step_flops,
        "optimizer_flops": load.optimizer_flops,
        "total_flops": load.step_flops * load.num_iterations,
        "cases": [step_on(load, *case) for case in cases],
        "sources": {known.name: known.source for known in (max_40, ULTRA, H100, *LINKS)},
    }


def markdown(record: dict[str, Any]) -> list[str]:
    """Return the plan's table as lines of Markdown."""
    lines = [
        "| machines | link | compute | sent | communication | step | efficiency | training | memory of a rank |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in record["cases"]:
        sent = sum(case["sent_bytes"].values())
        rows = f", {case['micro_rows']} rows" if case["micro_rows"] else ", does not fit"
        lines.append(
            f"| {case['ranks']} × {case['machine']} | {case['link'] or '–'} | "
            f"{_seconds(case['compute_seconds'] + case['optimizer_seconds'])} | "
            f"{f'{sent / 1e9:.1f} GB' if sent else '–'} | "
            f"{_seconds(case['communication_seconds']) if sent else '–'} | {_seconds(case['step_seconds'])} | "
            f"{case['efficiency']:.0%} | {_days(case['days'])} | {case['memory_bytes'] / 1e9:.0f} GB{rows} |"
        )
    return lines


def _seconds(value: float) -> str:
    return f"{value:,.0f} s" if value >= 100 else f"{value:.3g} s"


def _days(value: float) -> str:
    return f"{value:,.0f} days" if value >= 3 else f"{24 * value:.0f} hours"


def print_tables(record: dict[str, Any], stream: TextIO) -> None:
    """Print the plan as Markdown, with where its numbers come from."""
    print(
        f"{record['model']}: {record['num_parameters'] / 1e9:.2f} billion parameters, {record['num_iterations']:,} "
        f"iterations of {record['batch_tokens']:,} tokens, {record['step_flops']:.2e} FLOPs each and "
        f"{record['optimizer_flops']:.1e} of the optimizer, {record['total_flops']:.2e} in all. Nothing is measured.\n",
        file=stream,
    )
    print("\n".join(markdown(record)), file=stream)
    print("", file=stream)
    for name, source in record["sources"].items():
        print(f"- {name}: {source}", file=stream)
