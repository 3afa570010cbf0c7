"""Print the tables of several_machines.md: what a recipe would take on other machines, on paper. Nothing is measured.

    python docs/internals/several_machines.py [experiment=… model=…]

A step on n ranks with P parameters of float32: rank 0 sends the batch to all, each rank computes its n-th of the rows,
gradients are summed around a ring, and rank 0 updates the weights and sends them. Nothing of it happens at the same
time as anything else:

    seconds = (FLOPs of gradients / n + Muon's FLOPs) / rate + bytes / link
    bytes = 2 (n−1)/n × (12 × tokens (batch) + 4 P (gradients) + 4 P (weights))
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.resources import files
from typing import NamedTuple

import yaml

from mlxchat.composition.compose import compose_config
from mlxchat.config.schema import Config, OptimizerConfig
from mlxchat.model.sizes import GPTSizes, count_parameters, flops_per_token, sizes_of
from mlxchat.ops.machine import BUCKET_BYTES
from mlxchat.planning.horizon import derive_hyperparameters
from mlxchat.planning.memory import Device, Training


class Machine(NamedTuple):
    """One rank's machine: FLOPs a second that training may reach in bfloat16, and memory that it may take."""

    name: str
    flops: float
    memory_bytes: float
    source: str


class Link(NamedTuple):
    """What connects neighbours in the ring; the speed is that of one direction while the other is used as much."""

    name: str
    bytes_per_second: float
    latency_seconds: float
    source: str


ULTRA = Machine(
    "M3 Ultra, 80 cores", 14.2e12, 200e9,
    "half of the peak of twice an M3 Max of 40 cores (14.2 TFLOP/s, hmc-tech.com); of 256 GB",
)  # fmt: skip
H100 = Machine(
    "H100 SXM", 0.509 * 989.4e12, 76e9,
    "989.4 TFLOP/s (glennklockwood.com, after NVIDIA) × 50.9 %, nanochat's share with d32 on 8 of them",
)  # fmt: skip
LINKS = (
    Link("1 GbE", 0.118e9, 3e-4, "94 % of the line"),
    Link("10 GbE", 1.18e9, 3e-4, "94 % of the line"),
    Link("Thunderbolt 4, IP", 2.05e9, 3e-4,
         "16.4 Gbit/s of TCP over a link of 20 Gbit/s in each direction (jiribrejcha.net)"),
    Link("Thunderbolt 5, RDMA", 7.4e9, 5e-5,
         "7.4 GB/s between two Macs by jaccl (zingnex.cn), under 50 µs (on Apple's TN3205, adwaitx.com)"),
    Link("PCIe 5 × 16", 50e9, 2e-5, "64 GB/s nominal, 80 % of it"),
    Link("NVLink 4", 360e9, 1e-5, "450 GB/s nominal, 80 % of it"),
)  # fmt: skip


@dataclass(frozen=True)
class Load:
    """What a recipe asks of whatever machine."""

    sizes: GPTSizes
    optimizer: OptimizerConfig
    batch_tokens: int
    row_tokens: int
    num_iterations: int

    @property
    def gradient_flops(self) -> float:
        """FLOPs of forward and backward pass."""
        return float(flops_per_token(self.sizes)) * self.batch_tokens

    @property
    def update_flops(self) -> float:
        """FLOPs of Muon's products; what moves numbers one by one is not counted."""
        return orthogonalising_flops(self.sizes) if self.optimizer.kind == "muon" else 0.0


@dataclass(frozen=True)
class Step:
    """One step on some machines."""

    compute_seconds: float
    sent_bytes: float
    communication_seconds: float
    days: float
    """Of the whole training."""
    micro_rows: int
    """Rows at a time; 0: not one fits."""
    memory_bytes: int

    @property
    def seconds(self) -> float:
        """Nothing happens at the same time."""
        return self.compute_seconds + self.communication_seconds


def orthogonalising_flops(sizes: GPTSizes) -> float:
    """Return the FLOPs of Newton-Schulz on all matrices of the layers.

    A step with a matrix of m × n, m ≤ n, is X Xᵀ (2 m² n), its square (2 m³) and a product with X (2 m² n).
    """
    width, kv = sizes.width, sizes.kv_width
    shapes = [(width, width)] * 2 + [(kv, width)] * 2 + [(width, 4 * width)] * 2
    each = sum(4 * min(shape) ** 2 * max(shape) + 2 * min(shape) ** 3 for shape in shapes)
    return float(5 * sizes.num_layers * each)


def bytes_sent(parameters: int, batch_tokens: int, ranks: int) -> float:
    """Return the bytes that a rank sends to its neighbour in one step: batch, gradients, weights."""
    return 2 * (ranks - 1) / ranks * (12 * batch_tokens + 8 * parameters)


def sum_seconds(size: float, ranks: int, link: Link) -> float:
    """Return how long a sum of `size` bytes takes around a ring: 2 (n − 1) messages of an n-th."""
    return 2 * (ranks - 1) * (size / ranks / link.bytes_per_second + link.latency_seconds)


def step_on(load: Load, machine: Machine, ranks: int, link: Link | None) -> Step:
    """Return what one step takes on so many machines, with a link between neighbours; None: one machine."""
    parameters = count_parameters(load.sizes)["total"]
    compute, talking = (load.gradient_flops / ranks + load.update_flops) / machine.flops, 0.0
    if link is not None:
        buckets = -(-4 * parameters // BUCKET_BYTES)
        talking = 2 * buckets * sum_seconds(4 * parameters / buckets, ranks, link)
        talking += sum_seconds(12 * load.batch_tokens, ranks, link)
    micro_rows, memory = _micro_rows(load, machine, ranks)
    return Step(
        compute, bytes_sent(parameters, load.batch_tokens, ranks), talking,
        load.num_iterations * (compute + talking) / 86400, micro_rows, memory,
    )  # fmt: skip


def _micro_rows(load: Load, machine: Machine, ranks: int) -> tuple[int, int]:
    """Return the largest power of two of rows at a time that fits, 0 if none does, and the bytes of it, or of one."""
    rows = -(-load.batch_tokens // load.row_tokens // ranks)
    training = Training(
        sizes=load.sizes, optimizer=load.optimizer, rows=rows * ranks, row_tokens=load.row_tokens, num_ranks=ranks,
        device=Device(kind="metal", plain=True, compute_bytes=2),
    )  # fmt: skip
    tried = [1 << power for power in range(rows.bit_length())]
    fitting = [each for each in tried if training.peak_bytes(each) <= machine.memory_bytes]
    return (fitting[-1] if fitting else 0), training.peak_bytes(fitting[-1] if fitting else 1)


def load_of(config: Config) -> Load:
    """Return what a configuration's pretraining asks of a machine."""
    sizes = sizes_of(config.model, config.architecture, config.tokenizer.vocab_size)
    derived = derive_hyperparameters(config, sizes)
    row_tokens = config.pretrain.batch.row_tokens or sizes.context_tokens
    return Load(sizes, config.optimizer, derived.batch_tokens, row_tokens, derived.num_iterations)


def mac(preset: str, name: str) -> Machine:
    """Return the machine of a preset in conf/machine."""
    said = yaml.safe_load(files("mlxchat.conf").joinpath("machine", f"{preset}.yaml").read_text(encoding="utf-8"))
    flops, memory = float(said["training_flops"]), float(said["memory_limit_bytes"])
    return Machine(name, flops, memory, f"conf/machine/{preset}.yaml")


def tables(config: Config) -> list[str]:
    """Return the page's two tables as lines of Markdown."""
    load, max_40 = load_of(config), mac("mac_128gb", "M4 Max, 40 cores")
    cases: list[tuple[Machine, int, Link | None]] = [(max_40, 1, None), (ULTRA, 1, None), (H100, 1, None)]
    cases += [(max_40, 4, link) for link in LINKS[:4]]
    cases += [(ULTRA, 4, link) for link in LINKS[1:4]]
    cases += [(H100, 8, link) for link in LINKS[4:]]
    lines = [
        "| machines | link | compute | sent | communication | step | efficiency | training | memory of a rank |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for machine, ranks, link in cases:
        step = step_on(load, machine, ranks, link)
        sent = [f"{step.sent_bytes / 1e9:.1f} GB", _seconds(step.communication_seconds)] if link else ["–", "–"]
        rows = f"{step.micro_rows} rows" if step.micro_rows else "does not fit"
        cells = [
            f"{ranks} × {machine.name}", link.name if link else "–", _seconds(step.compute_seconds), *sent,
            _seconds(step.seconds), f"{step.compute_seconds / step.seconds:.0%}", _days(step.days),
            f"{step.memory_bytes / 1e9:.0f} GB, {rows}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| machine or link | source |", "|---|---|"]
    return lines + [f"| {known.name} | {known.source} |" for known in (max_40, ULTRA, H100, *LINKS)]


def _seconds(value: float) -> str:
    return f"{value:,.0f} s" if value >= 100 else f"{value:.3g} s"


def _days(value: float) -> str:
    return f"{value:,.0f} days" if value >= 3 else f"{24 * value:.0f} hours"


if __name__ == "__main__":
    chosen = sys.argv[1:] or ["experiment=speedrun_d20", "model=d32"]
    print("\n".join(tables(compose_config(chosen).config)))
