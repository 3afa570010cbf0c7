"""Adapters: LoRA (arXiv 2106.09685), DoRA (arXiv 2402.09353) and QLoRA (arXiv 2305.14314).

With W (out, in) of the base, A (in, rank) and B (rank, out), LoRA computes x Wᵀ + scale × (x A) B. DoRA rescales every
row of W + scale × (A B)ᵀ to a learnt magnitude m; the gradient treats the present length as a constant. With QLoRA, all
matrices of the base's layers are quantised to 4 or 8 bits; embeddings, gates and head are not. The layers here replace
those of the model. Names, shapes, scale, initial values and files (adapters.safetensors, adapter_config.json) are
mlx-lm's; checkpoint.json describes the quantisation of the base, for which mlx-lm has no field.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from safetensors.numpy import load_file, save_file

from mlxchat.errors import DataError
from mlxchat.model.gpt import GPT, flatten_parameters, key_of, module_at, set_parameters
from mlxchat.model.sizes import AdapterSizes, GPTSizes, matrices_of
from mlxchat.ops.dropout import fold, present_dropping
from mlxchat.ops.linear import Activation, Adapter, Packed, frozen_linear, identity, scale_columns, unpacked
from mlxchat.store.bases import ADAPTER_KEY

Flat = dict[str, mx.array]
ADAPTERS_FILE, ADAPTER_CONFIG_FILE = "adapters.safetensors", "adapter_config.json"
PARAMETERS = {"lora": ("lora_a", "lora_b"), "dora": ("lora_a", "lora_b", "m")}
"""Kind → names of an adapter's parameters."""
_BITS, _GROUP_SIZES = (None, 4, 8), (32, 64, 128)
_MOST_SCALE = 1e30
# Embeddings.
_TABLES = ("transformer.wte.", "value_embeds.")


# Layers


class FrozenLinear(nn.Module):
    """A frozen `Linear`; its matrix (out, in) may be packed as in `nn.QuantizedLinear`."""

    def __init__(self, weight: mx.array, sizes: AdapterSizes, dtype: mx.Dtype) -> None:
        super().__init__()
        self.bits, self.group_size = sizes.bits, sizes.group_size
        if sizes.bits is None:
            self.weight = weight.astype(dtype)
        else:
            self.weight, scales, biases = mx.quantize(weight, group_size=sizes.group_size, bits=sizes.bits)
            self.scales, self.biases = scales.astype(dtype), biases.astype(dtype)
        self.freeze()

    def __call__(self, x: mx.array, activation: Activation = identity) -> mx.array:
        """Return activation(x) Wᵀ (…, out) of x (…, in)."""
        return frozen_linear(x, self.base, activation)

    @property
    def base(self) -> mx.array | Packed:
        """The frozen matrix in its storage format."""
        weight: mx.array = self.weight
        return weight if self.bits is None else Packed(weight, self.scales, self.biases, self.group_size, self.bits)

    @property
    def matrix(self) -> mx.array:
        """The effective matrix (out, in), including the adapter."""
        return unpacked(self.base)


class LoRALinear(FrozenLinear):
    """A frozen layer with a LoRA, initially without effect: B is zero, A is U(±1 / sqrt(in))."""

    def __init__(self, weight: mx.array, sizes: AdapterSizes, dtype: mx.Dtype, *, key: mx.array, place: int) -> None:
        """`key` is A's random key; `place` is the layer's number for dropout."""
        super().__init__(weight, sizes, dtype)
        self.scale, self.dropout, self.place = sizes.scale, sizes.dropout, place
        outer, inner = weight.shape
        bound = 1 / math.sqrt(inner)
        self.lora_a = mx.random.uniform(-bound, bound, (inner, sizes.rank), key=key)
        self.lora_b = mx.zeros((sizes.rank, outer))

    def __call__(self, x: mx.array, activation: Activation = identity) -> mx.array:
        """Return activation(x) Wᵀ + scale × (activation(x) A) B."""
        present = present_dropping() if self.dropout else None
        keys = None if present is None else fold(present.keys, self.place)
        adapter = Adapter(self.lora_a, self.lora_b, self.scale, keys, self.dropout)
        return frozen_linear(x, self.base, activation, adapter)

    @property
    def matrix(self) -> mx.array:
        """W + scale × (A B)ᵀ."""
        return adapted_matrix(unpacked(self.base), self.lora_a, self.lora_b, self.scale)


class DoRALinear(LoRALinear):
    """A `LoRALinear` whose rows have learnt magnitudes m, initially those of the base."""

    def __init__(self, weight: mx.array, sizes: AdapterSizes, dtype: mx.Dtype, *, key: mx.array, place: int) -> None:
        super().__init__(weight, sizes, dtype, key=key, place=place)
        self.m = row_lengths(unpacked(self.base).astype(mx.float32))

    def __call__(self, x: mx.array, activation: Activation = identity) -> mx.array:
        """Return `LoRALinear`'s product times m / (the row's present length)."""
        # In float32, since it is a quotient of two nearly equal lengths.
        lengths = mx.stop_gradient(row_lengths(super().matrix.astype(mx.float32)))
        return scale_columns(super().__call__(x, activation), _row_factors(self.m.astype(mx.float32), lengths))

    @property
    def matrix(self) -> mx.array:
        """W + scale × (A B)ᵀ with rows of magnitude m."""
        return adapted_matrix(unpacked(self.base), self.lora_a, self.lora_b, self.scale, self.m)


LAYERS = {"lora": LoRALinear, "dora": DoRALinear}


def adapted_matrix(
    weight: mx.array, a: mx.array, b: mx.array, scale: float, magnitudes: mx.array | None = None
) -> mx.array:
    """Return W + scale × (A B)ᵀ (out, in); with magnitudes (out,), rows except zeros are rescaled to these."""
    adapted = weight + (scale * b.T) @ a.T
    return adapted if magnitudes is None else _row_factors(magnitudes, row_lengths(adapted))[:, None] * adapted


def row_lengths(matrix: mx.array) -> mx.array:
    """Return the 2-norm of each row."""
    return mx.sqrt(mx.square(matrix).sum(-1))


def _row_factors(magnitudes: mx.array, lengths: mx.array) -> mx.array:
    """Return the factors that rescale rows to their magnitudes; rows of zeros stay zero."""
    return magnitudes / mx.where(lengths == 0, 1, lengths)


# Models with adapters


def attach_adapters(model: GPT, sizes: AdapterSizes, *, seed: int = 0, dtype: mx.Dtype = mx.float32) -> None:
    """Freeze a model, add new adapters, and quantise its base if `sizes.bits` is set.

    Args:
        model: with the base's parameters in float32.
        sizes: of the adapters.
        seed: of A.
        dtype: of computations and of the frozen weights; adapters are float32.
    """
    model.freeze()
    model.adapters = sizes
    matrices = list(matrices_of(model.sizes))
    for place, name in enumerate(matrices, start=2 * model.sizes.num_layers + 1):
        weight = module_at(model, name).weight.astype(mx.float32)
        if name in sizes.targets:
            key = key_of(seed, f"{name}.lora_a")
            layer: FrozenLinear = LAYERS[sizes.kind](weight, sizes, dtype, key=key, place=place)
        else:
            layer = FrozenLinear(weight, sizes, dtype)
        mx.eval(layer.parameters())
        set_parameters(model, {name: layer})
    rest = {name: value for name, value in flatten_parameters(model).items() if name.rpartition(".")[0] not in matrices}
    set_parameters(model, {name: value.astype(dtype) for name, value in rest.items()})
    mx.eval(flatten_parameters(model))


def adapters_of(model: GPT) -> AdapterSizes | None:
    """Return the sizes of a model's adapters; None: it has none."""
    return getattr(model, "adapters", None)


@dataclass(frozen=True)
class Adapters:
    """Adapters that were read from a folder."""

    sizes: AdapterSizes
    arrays: dict[str, np.ndarray[Any, Any]]
    """float32, by parameter name."""

    def changes(self, name: str) -> bool:
        """Return True if these adapters change a weight of the base."""
        return self.sizes.bits is not None or name.removesuffix(".weight") in self.sizes.targets

    def on(self, name: str, weight: mx.array) -> mx.array:
        """Return a weight of the base fused with these adapters, in float32.

        With a quantised base, the rounded weight is fused, as in training.
        """
        sizes, module, value = self.sizes, name.removesuffix(".weight"), weight.astype(mx.float32)
        if sizes.bits is not None and _is_packed(name):
            packed = mx.quantize(value, group_size=sizes.group_size, bits=sizes.bits)
            value = mx.dequantize(*packed, group_size=sizes.group_size, bits=sizes.bits)
        if module not in sizes.targets:
            return value
        a, b, *m = (mx.array(self.arrays[each]) for each in _names(sizes.kind, module))
        return adapted_matrix(value, a, b, sizes.scale, *m)

    def apply(self, model: GPT) -> None:
        """Fuse these adapters into a model's weights, one at a time to limit the memory."""
        weights = flatten_parameters(model)
        for name in filter(self.changes, list(weights)):
            value = self.on(name, weights.pop(name))
            mx.eval(value)
            set_parameters(model, {name: value})


def _is_packed(name: str) -> bool:
    """Return True if a quantised base has this parameter in few bits."""
    return name.startswith("transformer.h.") and name.endswith(".weight") and "gate" not in name


# Files


def write_adapters(folder: Path, adapters: Mapping[str, mx.array], sizes: AdapterSizes, *, num_layers: int) -> None:
    """Write both files of adapters in mlx-lm's format."""
    expected = {name for module in sizes.targets for name in _names(sizes.kind, module)}
    assert adapters.keys() == expected, sorted(adapters.keys() ^ expected)
    arrays = {name: np.asarray(adapters[name].astype(mx.float32)) for name in sorted(adapters)}
    save_file(arrays, folder / ADAPTERS_FILE, metadata={"format": "mlx"})
    config = {
        "fine_tune_type": sizes.kind,
        "num_layers": num_layers,
        "lora_parameters": {
            "rank": sizes.rank, "scale": sizes.scale, "dropout": sizes.dropout, "keys": list(sizes.targets),
        },
    }  # fmt: skip
    (folder / ADAPTER_CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def rounding_of(sizes: AdapterSizes) -> dict[str, int]:
    """Return checkpoint.json's description of the base's quantisation; {} if it is not quantised."""
    return {} if sizes.bits is None else {"bits": sizes.bits, "group_size": sizes.group_size}


def read_adapters(folder: Path, model_sizes: GPTSizes) -> Adapters:
    """Return the adapters of a checkpoint's folder.

    Raises:
        DataError: a file is missing or damaged, or they do not match each other or the model.
    """
    try:
        facts = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))[ADAPTER_KEY]
        bits, group_size = facts.get("bits"), facts.get("group_size", AdapterSizes.group_size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder}: not a readable adapter ({type(error).__name__}: {error})") from None
    if bits not in _BITS or isinstance(bits, bool) or type(group_size) is not int or group_size not in _GROUP_SIZES:
        raise DataError(f"{folder}: checkpoint.json: adapter: unsupported bits {bits!r} or group_size {group_size!r}")
    sizes = replace(read_adapter_config(folder, model_sizes), bits=bits, group_size=group_size)
    try:
        arrays = load_file(folder / ADAPTERS_FILE)
    except Exception as error:  # the safetensors reader has several error types
        raise DataError(f"{folder}: not a readable {ADAPTERS_FILE} ({type(error).__name__}: {error})") from None
    check_shapes({name: value.shape for name, value in arrays.items()}, sizes, model_sizes, folder)
    kinds = sorted({str(value.dtype) for value in arrays.values()} - {"float32"})
    if kinds:
        raise DataError(f"{folder}: {ADAPTERS_FILE} has {', '.join(kinds)}, expected float32")
    return Adapters(sizes, arrays)


def read_adapter_config(folder: Path, model_sizes: GPTSizes) -> AdapterSizes:
    """Return the sizes in adapter_config.json, interpreted as in mlx-lm.

    Keys may be full names (transformer.h.0.attn.c_q) or names within a layer (attn.c_q), which select the last
    `num_layers`; without keys, all matrices of these layers have adapters.

    Raises:
        DataError: it is missing or damaged, or does not match the model.
    """
    try:
        config = json.loads((folder / ADAPTER_CONFIG_FILE).read_text(encoding="utf-8"))
        given = {str(name): value for name, value in config["lora_parameters"].items()}
        kind = config.get("fine_tune_type", "lora")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{folder}: not a readable {ADAPTER_CONFIG_FILE} ({type(error).__name__}: {error})") from None
    rank, scale, dropout = given.get("rank"), given.get("scale"), given.get("dropout")
    dropout = float(dropout) if isinstance(dropout, int | float) and 0 <= dropout < 1 else 0.0
    problems = []
    if kind not in list(PARAMETERS):  # may be unhashable
        problems.append(f"fine_tune_type {kind!r} is neither lora nor dora")
    if type(rank) is not int or rank < 1:
        problems.append(f"rank {rank!r} is not an integer above 0")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) <= _MOST_SCALE:
        problems.append(f"scale {scale!r} is not a finite number")
    targets, wrong = _targets(given.get("keys"), config.get("num_layers"), model_sizes)
    problems += wrong
    if problems:
        raise DataError(f"{folder}: {ADAPTER_CONFIG_FILE}: {'; '.join(problems)}")
    assert type(rank) is int
    assert isinstance(scale, int | float)
    return AdapterSizes(kind=kind, rank=rank, scale=float(scale), targets=targets, dropout=dropout)


def check_shapes(
    found: Mapping[str, tuple[int, ...]], sizes: AdapterSizes, model_sizes: GPTSizes, where: Path | str
) -> None:
    """Check that arrays are exactly those of adapters on a model.

    Raises:
        DataError: arrays are missing, unknown or of another shape.
    """
    if unknown := [name for name in sizes.targets if name not in _matrices(model_sizes)]:
        raise DataError(f"{where}: the model has no matrix {', '.join(unknown[:3])}")
    expected = shapes_of(sizes, model_sizes)
    strange = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if strange:
        shown = "; ".join(f"{name} is {_shown(found, name)}, expected {_shown(expected, name)}" for name in strange[:3])
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        raise DataError(f"{where}: adapters do not fit {ADAPTER_CONFIG_FILE} and the model: {shown}{more}")


def shapes_of(sizes: AdapterSizes, model_sizes: GPTSizes) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of adapters on a model.

    Raises:
        KeyError: a target is not a matrix of the model.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    known = _matrices(model_sizes)
    for module in sizes.targets:
        rows, columns = known[module]
        all_three = ((columns, sizes.rank), (sizes.rank, rows), (rows,))
        shapes |= dict(zip(_names(sizes.kind, module), all_three, strict=False))
    return shapes


def _matrices(sizes: GPTSizes) -> dict[str, tuple[int, int]]:
    """Return the shape (out, in) of every linear layer, including gates and the head, which mlx-lm may adapt."""
    shapes = {
        name.removesuffix(".weight"): value.shape
        for name, value in flatten_parameters(GPT(sizes)).items()
        if value.ndim == 2 and not name.startswith(_TABLES)
    }
    return {name: (rows, columns) for name, (rows, columns) in shapes.items()}


def _names(kind: str, module: str) -> list[str]:
    return [f"{module}.{name}" for name in PARAMETERS[kind]]


def _targets(keys: Any, layers: Any, sizes: GPTSizes) -> tuple[tuple[str, ...], list[str]]:
    """Return the modules of mlx-lm's keys, in the model's order, and the problems of the keys."""
    known = _matrices(sizes)
    if keys is not None and (not isinstance(keys, list) or not all(isinstance(key, str) for key in keys)):
        return (), ["keys is not a list of names"]
    if type(layers) is not int:
        return (), [f"num_layers {layers!r} is not an integer"]
    last = range(sizes.num_layers)[-layers if layers > 0 else 0 :]
    within = {f"transformer.h.{layer}." for layer in last}
    chosen, unknown = set(), []
    inner = {".".join(name.split(".")[3:]) for name in known if name.startswith("transformer.h.")}
    for key in keys if keys is not None else sorted(inner):
        meant = {name for name in (key, *(f"{layer}{key}" for layer in within)) if name in known}
        chosen |= meant
        unknown += [] if meant else [key]
    wrong = [f"{', '.join(unknown[:3])} is not a matrix of the model"] if unknown else []
    return tuple(name for name in known if name in chosen), wrong if chosen or wrong else ["it names no matrices"]


def _shown(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "absent"
