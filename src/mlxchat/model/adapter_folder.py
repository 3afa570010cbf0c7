"""Adapters on disk, as mlx-lm keeps them: adapters.safetensors and adapter_config.json.

Our folders have a checkpoint's description beside them (`checkpoint.save_adapters`), and in checkpoint.json the base:
see `runner/bases.py`. What mlx-lm has no word for, a base whose matrices were rounded to a few bits, stands there too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from safetensors.numpy import load_file, save_file

from mlxchat.errors import DataError
from mlxchat.model.adapters import ADAPTER_NAMES, fuse
from mlxchat.model.gpt import GPT, flatten_parameters, set_parameters
from mlxchat.model.sizes import AdapterSizes, GPTSizes
from mlxchat.runner.bases import ADAPTER_KEY

ADAPTERS_FILE, ADAPTER_CONFIG_FILE = "adapters.safetensors", "adapter_config.json"
_KINDS = ("lora", "dora")
_BITS = (None, 4, 8)
_MOST_SCALE = 1e30
# Whose rows are looked up, not multiplied with.
_TABLES = ("transformer.wte.", "value_embeds.")


@dataclass(frozen=True)
class Adapters:
    """What a folder of adapters holds."""

    sizes: AdapterSizes
    arrays: dict[str, np.ndarray[Any, Any]]
    """float32, by the names of `AdapterSizes`."""

    def changes(self, name: str) -> bool:
        """Tell whether a weight of the base, by its name, is another one with these adapters."""
        return self.sizes.bits is not None or name.removesuffix(".weight") in self.sizes.targets

    def on(self, name: str, weight: mx.array) -> mx.array:
        """Return a weight of the base, by its name, as it is with these adapters, in float32."""
        module = name.removesuffix(".weight")
        targets = (module,) if module in self.sizes.targets else ()
        own = {each: mx.array(self.arrays[each]) for each in _names(self.sizes.kind, module)} if targets else {}
        return fuse({name: weight}, own, replace(self.sizes, targets=targets))[name]

    def apply(self, model: GPT) -> None:
        """Put these adapters into a model's weights, one at a time, so that no second copy of all is ever needed."""
        weights = flatten_parameters(model)
        for name in filter(self.changes, list(weights)):
            value = self.on(name, weights.pop(name))
            mx.eval(value)
            set_parameters(model, {name: value})


def write_adapters(
    folder: Path, adapters: Mapping[str, mx.array], sizes: AdapterSizes, *, num_layers: int, dropout: float
) -> None:
    """Write both files of adapters, as mlx-lm reads them.

    Args:
        folder: exists.
        adapters: by name; other names than those of `sizes` are an error of the caller's.
        sizes: what they are.
        num_layers: of the model.
        dropout: with which they were trained; it computes nothing afterwards.
    """
    expected = {name for module in sizes.targets for name in _names(sizes.kind, module)}
    assert adapters.keys() == expected, sorted(adapters.keys() ^ expected)
    arrays = {name: np.asarray(adapters[name].astype(mx.float32)) for name in sorted(adapters)}
    save_file(arrays, folder / ADAPTERS_FILE, metadata={"format": "mlx"})
    config = {
        "fine_tune_type": sizes.kind,
        "num_layers": num_layers,
        "lora_parameters": {
            "rank": sizes.rank, "scale": sizes.scale, "dropout": dropout, "keys": list(sizes.targets),
        },
    }  # fmt: skip
    (folder / ADAPTER_CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def rounding_of(sizes: AdapterSizes) -> dict[str, int]:
    """Return what checkpoint.json says of the base's rounding: nothing if it is as it was."""
    return {} if sizes.bits is None else {"bits": sizes.bits, "group_size": sizes.group_size}


def read_adapters(folder: Path, model_sizes: GPTSizes) -> Adapters:
    """Return the adapters of a checkpoint's folder.

    Args:
        folder: with both files, and checkpoint.json.
        model_sizes: of the model that they are for.

    Raises:
        DataError: a file is missing or damaged, or they do not fit each other or the model.
    """
    try:
        facts = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))[ADAPTER_KEY]
        bits, group_size = facts.get("bits"), facts.get("group_size", AdapterSizes.group_size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder}: no readable adapter ({type(error).__name__}: {error})") from None
    if bits not in _BITS or isinstance(bits, bool) or type(group_size) is not int or group_size not in (32, 64, 128):
        raise DataError(
            f"{folder}: checkpoint.json: adapter: bits {bits!r}, group_size {group_size!r} are none of ours"
        )
    sizes = replace(read_adapter_config(folder, model_sizes), bits=bits, group_size=group_size)
    try:
        arrays = load_file(folder / ADAPTERS_FILE)
    except Exception as error:  # the safetensors reader has several error types of its own
        raise DataError(f"{folder}: no readable {ADAPTERS_FILE} ({type(error).__name__}: {error})") from None
    check_shapes({name: value.shape for name, value in arrays.items()}, sizes, model_sizes, folder)
    kinds = sorted({str(value.dtype) for value in arrays.values()} - {"float32"})
    if kinds:
        raise DataError(f"{folder}: {ADAPTERS_FILE} holds {', '.join(kinds)}, expected float32")
    return Adapters(sizes, arrays)


def read_adapter_config(folder: Path, model_sizes: GPTSizes) -> AdapterSizes:
    """Return what adapter_config.json says, as mlx-lm reads it.

    Matrices may be named as a whole (transformer.h.0.attn.c_q), or within a layer (attn.c_q), which means the last
    `num_layers`; without names, all matrices of these layers have adapters.

    Args:
        folder: with the file.
        model_sizes: of the model that the adapters are for.

    Raises:
        DataError: it is missing or damaged, or does not fit the model.
    """
    try:
        config = json.loads((folder / ADAPTER_CONFIG_FILE).read_text(encoding="utf-8"))
        given = {str(name): value for name, value in config["lora_parameters"].items()}
        kind = config.get("fine_tune_type", "lora")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{folder}: no readable {ADAPTER_CONFIG_FILE} ({type(error).__name__}: {error})") from None
    rank, scale = given.get("rank"), given.get("scale")
    problems = []
    if kind not in _KINDS:
        problems.append(f"fine_tune_type {kind!r} is neither lora nor dora")
    if type(rank) is not int or rank < 1:
        problems.append(f"rank {rank!r} is no whole number above 0")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) <= _MOST_SCALE:
        problems.append(f"scale {scale!r} is no number")
    targets, wrong = _targets(given.get("keys"), config.get("num_layers"), model_sizes)
    problems += wrong
    if problems:
        raise DataError(f"{folder}: {ADAPTER_CONFIG_FILE}: {'; '.join(problems)}")
    assert type(rank) is int
    assert isinstance(scale, int | float)
    return AdapterSizes(kind=kind, rank=rank, scale=float(scale), targets=targets)


def check_shapes(
    found: Mapping[str, tuple[int, ...]], sizes: AdapterSizes, model_sizes: GPTSizes, where: Path | str
) -> None:
    """Refuse arrays that are not those of adapters on a model.

    Args:
        found: their shapes, by name.
        sizes: of the adapters.
        model_sizes: of the model.
        where: they are, for the message.

    Raises:
        DataError: naming those that are missing, too many or of another shape.
    """
    expected = shapes_of(sizes, model_sizes)
    strange = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if strange:
        shown = "; ".join(f"{name} is {_told(found, name)}, expected {_told(expected, name)}" for name in strange[:3])
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        raise DataError(f"{where}: adapters do not fit {ADAPTER_CONFIG_FILE} and the model: {shown}{more}")


def shapes_of(sizes: AdapterSizes, model_sizes: GPTSizes) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of adapters on a model.

    Raises:
        KeyError: a target is none of its matrices.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    known = _matrices(model_sizes)
    for module in sizes.targets:
        rows, columns = known[module]
        shapes |= {f"{module}.lora_a": (columns, sizes.rank), f"{module}.lora_b": (sizes.rank, rows)}
        if sizes.kind == "dora":
            shapes[f"{module}.m"] = (rows,)
    return shapes


def _matrices(sizes: GPTSizes) -> dict[str, tuple[int, int]]:
    """Return the shape (out, in) of every linear layer; mlx-lm may put adapters on gates and on the head, too."""
    shapes = {
        name.removesuffix(".weight"): value.shape
        for name, value in flatten_parameters(GPT(sizes)).items()
        if value.ndim == 2 and not name.startswith(_TABLES)
    }
    return {name: (rows, columns) for name, (rows, columns) in shapes.items()}


def _names(kind: str, module: str) -> list[str]:
    return [f"{module}.{name}" for name in (ADAPTER_NAMES if kind == "dora" else ADAPTER_NAMES[:2])]


def _targets(keys: Any, layers: Any, sizes: GPTSizes) -> tuple[tuple[str, ...], list[str]]:
    """Return the modules that keys of mlx-lm mean, in the model's order, and what is wrong with them."""
    known = _matrices(sizes)
    if keys is not None and (not isinstance(keys, list) or not all(isinstance(key, str) for key in keys)):
        return (), ["keys is no list of names"]
    if type(layers) is not int:
        return (), [f"num_layers {layers!r} is no whole number"]
    last = range(sizes.num_layers)[-layers if layers > 0 else 0 :]
    within = {f"transformer.h.{layer}." for layer in last}
    chosen, unknown = set(), []
    inner = {".".join(name.split(".")[3:]) for name in known if name.startswith("transformer.h.")}
    for key in keys if keys is not None else sorted(inner):
        meant = {name for name in (key, *(f"{layer}{key}" for layer in within)) if name in known}
        chosen |= meant
        unknown += [] if meant else [key]
    wrong = [f"{', '.join(unknown[:3])} is no matrix of the model"] if unknown else []
    return tuple(name for name in known if name in chosen), wrong if chosen or wrong else ["it names no matrices"]


def _told(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "absent"
