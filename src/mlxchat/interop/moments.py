"""Import of the optimizer moments that nanochat saves beside a checkpoint.

optim_<step>.pt or optim_<step>_rank<N>.pt is one rank's state_dict: of MuonAdamW (2026), or a list of AdamW's and
Muon's (2025). Parameters are numbered in the order of the groups: head, embedding, further tables and scalars, then
matrices by shape. Ranks share the moments: rows of large tables; whole matrices, stacked (2026) or one by one (2025).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np

from mlxchat.errors import DataError
from mlxchat.interop.names import expected_shapes
from mlxchat.interop.tensors import Array, Entry, widen, write_safetensors
from mlxchat.interop.torch_files import TorchFile, TorchTensor
from mlxchat.model.sizes import GPTSizes

Shape = tuple[int, ...]
Places = list[tuple[TorchFile, TorchTensor]]
_ADAMW = {"exp_avg": "first", "exp_avg_sq": "second"}
_MUON = {"momentum_buffer": "momentum", "second_momentum_buffer": "variance"}
_HEAD, _EMBEDDING, _MATRICES = "lm_head.weight", "transformer.wte.weight", "transformer.h."


def write_moments(path: Path, files: Sequence[Path], sizes: GPTSizes) -> None:
    """Write the moments in the files of all ranks, in their order, as our training_state.safetensors.

    Raises:
        DataError: a rank's file is missing or damaged, or belongs to another model or version of nanochat.
    """
    with ExitStack() as opened:
        ranks = [opened.enter_context(TorchFile(each)) for each in files]
        try:
            found, count = _find(ranks, sizes)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise DataError(
                f"{ranks[0].where} is not an optimizer state that nanochat (October 2025, July 2026) writes for this "
                f"model ({type(error).__name__}: {error}). Import the model without --optimizer"
            ) from None

        def read(name: str) -> Iterator[Array]:
            if name == "count":
                yield np.array(count, np.float32)
                return
            for file, tensor in found[name][1]:
                yield from (widen(numbers, tensor.dtype) for numbers in file.pieces(tensor))

        shapes: dict[str, Shape] = {"count": (), **{name: shape for name, (shape, _) in found.items()}}
        write_safetensors(path, [Entry(name, "F32", shapes[name]) for name in sorted(shapes)], read, made_for="mlx")


def _find(ranks: list[TorchFile], sizes: GPTSizes) -> tuple[dict[str, tuple[Shape, Places]], int]:
    """Return our name of each moment → its shape and the tensors to concatenate; and the number of updates."""
    shapes, found = expected_shapes(sizes), dict[str, tuple[Shape, Places]]()
    of_matrices: dict[tuple[str, str], tuple[TorchFile, TorchTensor]] = {}  # (our kind of moment, matrix) → its place
    parts = [rank.content if type(rank.content) is list else [rank.content] for rank in ranks]
    stacked = len(parts[0]) == 1
    groups = {
        kind: [group for group in part["param_groups"] if not stacked or group["kind"] == kind]
        for kind, part in (("adamw", parts[0][0]), ("muon", parts[0][-1]))
    }
    tables = [_HEAD, _EMBEDDING, *(name for name in shapes if not name.startswith("transformer.") and name != _HEAD)]
    numbers = [number for group in groups["adamw"] for number in group["params"]]
    if len(numbers) != len(tables):
        raise ValueError(f"{len(numbers)} tables and scalars instead of {len(tables)}")
    for name, number in zip(tables, numbers, strict=True):
        for theirs, ours in _ADAMW.items():
            rows: Places = [(rank, part[0]["state"][number][theirs]) for rank, part in zip(ranks, parts, strict=True)]
            found[f"{ours}.{name}"] = shapes[name], _whole(rows, shapes[name])
    for group in groups["muon"]:
        kept = [
            [(rank, part[-1]["state"].get(number, {})) for rank, part in zip(ranks, parts, strict=True)]
            for number in group["params"]
        ]
        for theirs, ours in _MUON.items():
            held = [[(rank, state[theirs]) for rank, state in each if theirs in state] for each in kept]
            if not held[0] and ours == "variance":
                continue  # 2025 had none
            matrices = _unstack(held[0], len(held)) if stacked else [_only(each, ranks) for each in held]
            if ours == "momentum":
                names = _names_of(group["params"], matrices[0][1].shape, shapes)
            for name, place in zip(names, matrices, strict=True):
                of_matrices[ours, name] = place
    lacking = [
        name for name, shape in shapes.items()
        if shape != (of_matrices["momentum", name][1].shape if ("momentum", name) in of_matrices
                     else found.get(f"first.{name}", (None,))[0])
    ]  # fmt: skip
    for (kind, name), place in sorted(of_matrices.items(), key=lambda each: each[0]):
        stack = f"{kind}.{'x'.join(map(str, shapes[name]))}"
        places = [*found.get(stack, ((), []))[1], place]
        found[stack] = (len(places), *place[1].shape), places
    if lacking or any(not tensor.dtype.code for _, places in found.values() for _, tensor in places):
        raise ValueError(f"moments of {lacking[0]} are missing" if lacking else "moments are not floating-point")
    updates = parts[0][0]["state"][numbers[0]]["step"]
    return found, int(ranks[0].numbers(updates).item() if isinstance(updates, TorchTensor) else updates)


def _names_of(numbers: Sequence[int], shape: Shape, shapes: dict[str, Shape]) -> list[str]:
    """Return the matrices of a Muon group: those of equal shape, or of equal size (2025, one rank)."""
    matrices = [name for name in shapes if name.startswith(_MATRICES)]
    of_shape = [name for name in matrices if shapes[name] == shape]
    alike = [name for name in matrices if prod(shapes[name]) == prod(shape)]
    return of_shape if len(of_shape) == len(numbers) else alike


def _whole(rows: Places, shape: Shape) -> Places:
    """Return the tensors of a table's rows: one if every rank holds the whole table, else one per rank."""
    first = rows[0][1].shape
    if first == shape:
        return rows[:1]
    if not first or first[1:] != shape[1:] or any(tensor.shape != first for _, tensor in rows):
        raise ValueError(f"a table has the shape {list(first)} instead of {list(shape)}")
    if first[0] * len(rows) != shape[0]:
        raise _incomplete(rows[0][0], len(rows), -(-shape[0] // max(1, first[0])))
    return rows


def _unstack(held: Places, count: int) -> Places:
    """Return each matrix of a group that is stacked in equal shares over the ranks, without the padding."""
    size = held[0][1].shape[0]
    if size * len(held) < count:
        raise _incomplete(held[0][0], len(held), -(-count // max(1, size)))
    if any(tensor.shape != held[0][1].shape for _, tensor in held):
        raise ValueError("ranks hold stacks of different shapes")
    places: Places = []
    for number in range(count):
        rank, stack = held[number // size]
        shape = stack.shape[1:]
        places.append((rank, replace(stack, first=stack.first + number % size * prod(shape), shape=shape)))
    return places


def _only(held: Places, ranks: list[TorchFile]) -> tuple[TorchFile, TorchTensor]:
    """Return the place of a matrix that only one rank updates."""
    if not held:
        raise _incomplete(ranks[0], len(ranks), None)
    return held[0]


def _incomplete(file: TorchFile, ranks: int, needed: int | None) -> DataError:
    return DataError(
        f"{file.where}: the optimizer was saved by {needed or 'more'} ranks, and files of {ranks} are there. Copy "
        "optim_*_rank*.pt of every rank (nanochat of 2025 wrote only rank 0), or import without --optimizer"
    )
