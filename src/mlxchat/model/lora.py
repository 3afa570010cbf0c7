"""Adapters: LoRA (arXiv 2106.09685), DoRA (arXiv 2402.09353) and QLoRA (arXiv 2305.14314).

With W (out, in) of the base, A (in, rank) and B (rank, out), LoRA computes x Wᵀ + scale × (x A) B. DoRA rescales every
row of W + scale × (A B)ᵀ to a learnt magnitude m; the gradient treats the present length as a constant. With QLoRA, all
matrices of the base's layers are quantised to 4 or 8 bits; embeddings, gates and head are not. The layers here replace
those of the model. Names, shapes, scale, initial values and files (adapters.safetensors, adapter_config.json) are
mlx-lm's; checkpoint.json describes the quantisation of the base, for which mlx-lm has no field.

Shapes: x (…, in), W (out, in), A (in, R), B (R, out).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from safetensors.numpy import load_file, save_file

from mlxchat.config.schema import AdapterConfig
from mlxchat.errors import DataError
from mlxchat.model.forward import dropped, fold, present_dropping
from mlxchat.model.gpt import GPT
from mlxchat.model.parameters import flatten_parameters, key_of, module_at, set_parameters
from mlxchat.model.sizes import PARAMETERS, GPTSizes, matrices_of, shapes_of
from mlxchat.store.catalog import ADAPTER_KEY

ADAPTERS_FILE, ADAPTER_CONFIG_FILE = "adapters.safetensors", "adapter_config.json"
Arrays = dict[str, np.ndarray[Any, Any]]  # adapters by parameter name, in float32


class FrozenLinear(nn.Module):
    """A frozen `Linear`; its matrix (out, in) may be quantised as in `nn.QuantizedLinear`."""

    def __init__(self, weight: mx.array, adapter: AdapterConfig, dtype: mx.Dtype) -> None:
        super().__init__()
        self.bits, self.group_size = adapter.bits, adapter.group_size
        if adapter.bits is None:
            self.weight = weight.astype(dtype)
        else:
            self.weight, scales, biases = mx.quantize(weight, group_size=adapter.group_size, bits=adapter.bits)
            self.scales, self.biases = scales.astype(dtype), biases.astype(dtype)
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        """Return x Wᵀ (…, out) of x (…, in)."""
        return frozen_linear(x, self)

    @property
    def base(self) -> mx.array:
        """The frozen matrix W (out, in), dequantised."""
        weight: mx.array = self.weight
        if self.bits is None:
            return weight
        return mx.dequantize(weight, self.scales, self.biases, group_size=self.group_size, bits=self.bits)

    matrix = base


def frozen_linear(x: mx.array, layer: FrozenLinear) -> mx.array:
    """Return x Wᵀ (…, out) of x (…, in) and a layer's W, which has no gradient."""
    if layer.bits is None:
        return x @ layer.weight.T
    group = layer.group_size
    return mx.quantized_matmul(x, layer.weight, layer.scales, layer.biases, group_size=group, bits=layer.bits)


class LoRALinear(FrozenLinear):
    """A frozen layer with a LoRA, initially without effect: B is zero, A is U(±1 / sqrt(in))."""

    def __init__(self, weight: mx.array, adapter: AdapterConfig, dtype: mx.Dtype, *, key: mx.array, place: int) -> None:
        """`key` is A's random key; `place` is the layer's number for dropout."""
        super().__init__(weight, adapter, dtype)
        self.scale, self.dropout, self.place = adapter.scale, adapter.dropout, place
        outer, inner = weight.shape
        bound = 1 / math.sqrt(inner)
        self.lora_a = mx.random.uniform(-bound, bound, (inner, adapter.rank), key=key)
        self.lora_b = mx.zeros((adapter.rank, outer))

    def __call__(self, x: mx.array) -> mx.array:
        """Return x Wᵀ + scale × (x A) B, where training drops some numbers of A's input."""
        present = present_dropping.get() if self.dropout else None
        seen = x if present is None else dropped(x, fold(present.keys, self.place), self.dropout)
        out = frozen_linear(x, self)
        return out + (self.scale * ((seen @ self.lora_a) @ self.lora_b)).astype(out.dtype)

    @property
    def matrix(self) -> mx.array:
        """W + scale × (A B)ᵀ, with DoRA rescaled to rows of magnitude m."""
        return adapted_matrix(self.base, self.lora_a, self.lora_b, self.scale, self.get("m"))


class DoRALinear(LoRALinear):
    """A `LoRALinear` whose rows have learnt magnitudes m, initially those of the base."""

    def __init__(self, weight: mx.array, adapter: AdapterConfig, dtype: mx.Dtype, *, key: mx.array, place: int) -> None:
        super().__init__(weight, adapter, dtype, key=key, place=place)
        self.m = row_lengths(self.base.astype(mx.float32))

    def __call__(self, x: mx.array) -> mx.array:
        """Return `LoRALinear`'s product times m / (the row's present length)."""
        # In float32, since it is a quotient of two nearly equal lengths.
        adapted = adapted_matrix(self.base, self.lora_a, self.lora_b, self.scale)
        lengths = mx.stop_gradient(row_lengths(adapted.astype(mx.float32)))
        out = super().__call__(x)
        # The factor stays float32: in bfloat16 1.011 would become 1.008, and its gradient's sum coarse.
        return (out * _row_factors(self.m.astype(mx.float32), lengths)).astype(out.dtype)


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


def attach_adapters(model: GPT, adapter: AdapterConfig, *, seed: int = 0, dtype: mx.Dtype = mx.float32) -> None:
    """Freeze a model, add new adapters in float32, and quantise its base if `adapter.bits` is set.

    The base's parameters are in float32 and become `dtype`, in which the model computes; `seed` is that of A.
    """
    model.freeze()
    model.adapters = adapter
    matrices = list(matrices_of(model.sizes))
    for name in matrices:
        layer = _adapted_layer(model, name, adapter, dtype, seed)
        mx.eval(layer.parameters())  # one at a time, to limit the memory
        set_parameters(model, {name: layer})
    rest = [name for name in flatten_parameters(model) if name.rpartition(".")[0] not in matrices]
    set_parameters(model, {name: module_at(model, name).astype(dtype) for name in rest})
    mx.eval(flatten_parameters(model))


def merge_adapters(model: GPT, adapter: AdapterConfig, arrays: Arrays) -> None:
    """Fuse adapters into a model's weights, in float32; a quantised base is rounded, as in the training."""
    for name in matrices_of(model.sizes) if adapter.bits is not None else adapter.targets:
        layer = _adapted_layer(model, name, adapter, mx.float32)
        for part in PARAMETERS[adapter.kind] if name in adapter.targets else ():
            layer[part] = mx.array(arrays[f"{name}.{part}"])
        weight = layer.matrix
        mx.eval(weight)  # one at a time, to limit the memory
        set_parameters(model, {f"{name}.weight": weight})


def _adapted_layer(model: GPT, name: str, adapter: AdapterConfig, dtype: mx.Dtype, seed: int = 0) -> FrozenLinear:
    """Return the layer that replaces a matrix of the base, with an adapter if it is a target."""
    weight = module_at(model, name).weight.astype(mx.float32)
    if name not in adapter.targets:
        return FrozenLinear(weight, adapter, dtype)
    place = 2 * model.sizes.num_layers + 1 + list(matrices_of(model.sizes)).index(name)
    return LAYERS[adapter.kind](weight, adapter, dtype, key=key_of(seed, f"{name}.lora_a"), place=place)


def packed_copy(model: GPT, bits: int) -> GPT:
    """Return a model with all matrices except embeddings and gates in 8 or 4 bits; other parameters are shared."""
    copy, dtype = GPT(model.sizes), model.transformer["wte"].weight.dtype
    own = flatten_parameters(copy)
    set_parameters(copy, {name: value for name, value in flatten_parameters(model).items() if name in own})
    for name in [*matrices_of(model.sizes), "lm_head"]:
        matrix = model.head_weight if name == "lm_head" else module_at(model, name).matrix
        group = next((group for group in (64, 32) if matrix.shape[1] % group == 0), None)
        adapter = AdapterConfig(bits=None if group is None else bits, group_size=group or 64)
        layer = FrozenLinear(matrix, adapter, dtype)
        mx.eval(layer.parameters())  # one at a time, to limit the memory
        set_parameters(copy, {name: layer})
    return copy


def adapters_of(model: GPT) -> AdapterConfig | None:
    """Return the sizes of a model's adapters; None: it has none."""
    return getattr(model, "adapters", None)


def write_adapters(folder: Path, adapters: Mapping[str, mx.array], adapter: AdapterConfig, *, num_layers: int) -> None:
    """Write both files of adapters in mlx-lm's format."""
    arrays = {name: np.asarray(adapters[name].astype(mx.float32)) for name in sorted(adapters)}
    save_file(arrays, folder / ADAPTERS_FILE, metadata={"format": "mlx"})
    about = {"rank": adapter.rank, "scale": adapter.scale, "dropout": adapter.dropout, "keys": list(adapter.targets)}
    config = {"fine_tune_type": adapter.kind, "num_layers": num_layers, "lora_parameters": about}
    (folder / ADAPTER_CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def read_adapters(folder: Path, model_sizes: GPTSizes) -> tuple[AdapterConfig, Arrays]:
    """Return the adapters of a folder; a DataError: files are damaged or do not match each other or the model."""
    adapter = read_adapter_config(folder, model_sizes)
    try:
        facts = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))[ADAPTER_KEY]
        adapter = replace(adapter, **{name: facts[name] for name in ("bits", "group_size") if name in facts})
        arrays = load_file(folder / ADAPTERS_FILE)
    except Exception as error:  # the safetensors reader has several error types
        raise DataError(f"{folder}: not a readable adapter ({type(error).__name__}: {error})") from None
    check_shapes({name: value.shape for name, value in arrays.items()}, adapter, model_sizes, folder)
    return adapter, arrays


def read_adapter_config(folder: Path, model_sizes: GPTSizes) -> AdapterConfig:
    """Return what adapter_config.json says, interpreted as in mlx-lm, with the names of modules as targets.

    Keys may be full names (transformer.h.0.attn.c_q) or names within a layer (attn.c_q), which select the last
    `num_layers`; without keys, all matrices of these layers have adapters. A DataError says what is unusable.
    """
    known = matrices_of(model_sizes)
    try:
        config = json.loads((folder / ADAPTER_CONFIG_FILE).read_text(encoding="utf-8"))
        given, layers, kind = config["lora_parameters"], config["num_layers"], config.get("fine_tune_type", "lora")
        rank, scale, dropout = given["rank"], float(given["scale"]), float(given.get("dropout") or 0)
        if kind not in PARAMETERS or type(rank) is not int or rank < 1 or not abs(scale) <= 1e30:
            raise ValueError(f"expected lora or dora, a rank above 0, a finite scale; got {kind}, {rank!r}, {scale}")
        first = max(0, model_sizes.num_layers - layers) if layers > 0 else 0
        last = {name: name.split(".", 3)[3] for name in known if int(name.split(".")[2]) >= first}
        keys = set(last.values() if given.get("keys") is None else given["keys"])
        if unknown := sorted(keys - known.keys() - set(last.values())):
            raise ValueError(f"{', '.join(unknown[:3])} is not a matrix of the model")
    except Exception as error:  # a foreign file may raise any error
        raise DataError(f"{folder}: {ADAPTER_CONFIG_FILE} is unusable ({type(error).__name__}: {error})") from None
    targets = [name for name in known if name in keys or last.get(name) in keys]
    return AdapterConfig(kind=kind, rank=rank, scale=scale, targets=targets, dropout=dropout)


def check_shapes(
    found: Mapping[str, tuple[int, ...]], adapter: AdapterConfig, model_sizes: GPTSizes, where: Path | str
) -> None:
    """Raise a DataError unless arrays have the names and shapes of adapters on a model."""
    expected = shapes_of(adapter, model_sizes)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            fault = f"{name} is {found.get(name, 'absent')}, expected {expected.get(name, 'absent')}"
            raise DataError(f"{where}: adapters do not fit {ADAPTER_CONFIG_FILE} and the model: {fault}")
