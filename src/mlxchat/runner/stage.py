"""A stage: one file in stages/, read here for what it declares and imported only when it runs."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from mlxchat.errors import ConfigError, suggest
from mlxchat.runner.fingerprint import hash_code

_PACKAGE = "mlxchat.stages"
FORMATS = ("base", "chat")
"""Of checkpoints: what continues text, and what answers."""


@dataclass(frozen=True)
class Stage:
    """What a stage file declares."""

    name: str
    path: Path
    version: int
    """Raised by hand when a change of the code changes results."""
    config: tuple[str, ...]
    """Sections of the configuration that it reads; they are its identity."""
    inputs: dict[str, str]
    """Role → kind of artifact."""
    optional_inputs: dict[str, str]
    """Roles that a step may leave unfilled."""
    produces: str
    """Kind of the artifact."""
    outputs: tuple[str, ...]
    """Files that must exist afterwards; of names with a | between them, exactly one."""
    resources: tuple[str, ...]
    """What it needs alone: "gpu", of which there is one."""
    label: str | None
    """Dotted path of the config value that goes into the artifact's name; None: the label of the first input."""
    metrics: dict[str, str] = field(default_factory=dict)
    """Name of a number that it records → minimize, maximize or neither, and under which conditions it is recorded."""
    reads_if: dict[str, str] = field(default_factory=dict)
    """Section or setting → the condition without which the stage does not read it, so that it is not in the key: a role
    that must be filled, the format of the model to evaluate (base or chat), or never."""
    forecast: str | None = None
    """Module that says what is known of a step before it runs, without MLX; it may have the functions
    memory(config, stage, sizes), problems(config, step, plan, sizes), model_sizes(section) and remark(section)."""
    format: str | None = None
    """Of the checkpoint that it makes: base or chat; None: not known before it is made."""
    seeded: bool | str = True
    """Which seeds it draws from, and therefore its identity: True (the run's), False (none), "data" (the data's alone),
    "both" (the run's, and the data's for what it validates on)."""

    @property
    def roles(self) -> dict[str, str]:
        """All roles, filled or not."""
        return self.inputs | self.optional_inputs

    def direction_of(self, metric: str) -> str | None:
        """Return the better direction that METRICS declares for a number; None: the stage declares no such number.

        Names that arise from data are declared as patterns, "accuracy_{sft.suite}"; the longest pattern decides.
        """
        patterns = sorted(self.metrics, key=len, reverse=True)
        for pattern in [metric, *patterns] if metric in self.metrics else patterns:
            if re.fullmatch(re.sub(r"\\\{.+?\\\}", ".+", re.escape(pattern)), metric):
                return self.metrics[pattern].partition(" if ")[0]
        return None

    def unread(self, filled: Collection[str], format: str | None) -> frozenset[str]:
        """Return the sections and settings that a step of this stage does not read.

        Args:
            filled: its roles that are filled.
            format: of its checkpoint, base or chat; None: unknown, so that it may read what either needs.
        """
        return frozenset(
            path
            for path, condition in self.reads_if.items()
            if not (condition in filled or (condition in FORMATS and format in (condition, None)))
        )

    def seeds(self, seed: int, data_seed: int) -> dict[str, int]:
        """Return the seeds that are part of an artifact's identity."""
        if self.seeded == "data":
            return {"seed": data_seed}
        # Once there was one seed for all: ids of that time stay valid where both are equal.
        of_data = {"data_seed": data_seed} if self.seeded == "both" and data_seed != seed else {}
        return {"seed": seed, **of_data} if self.seeded else {}

    def missing_outputs(self, out: Path) -> list[str]:
        """Return what a folder lacks of the promised files, or has too many of where one of several was promised."""
        wrong = (names for names in self.outputs if sum((out / name).exists() for name in names.split("|")) != 1)
        return [names.replace("|", " or ") for names in wrong]

    def load(self) -> Callable[[Any], None]:
        """Import the stage and return its `run`; this is where MLX comes in."""
        run: Callable[[Any], None] = importlib.import_module(f"{_PACKAGE}.{self.name}").run
        return run

    def load_forecast(self) -> ModuleType | None:
        """Import FORECAST; None: the stage names none."""
        return None if self.forecast is None else importlib.import_module(self.forecast)

    def code_digest(self) -> str:
        """Return a digest of the file that comments and docstrings do not change."""
        return hash_code(self.path)


def stage_names() -> list[str]:
    """Return the names of all stages, sorted."""
    return sorted(path.stem for path in _folder().glob("*.py") if path.stem != "__init__")


@cache
def read_stage(name: str) -> Stage:
    """Return what the stage's file declares, without importing it: planning must not load MLX.

    Raises:
        ConfigError: there is no such stage, or a declaration is missing or no literal.
    """
    path = _folder() / f"{name}.py"
    if name not in stage_names():
        known = stage_names()
        raise ConfigError(f'there is no stage "{name}". Stages: {", ".join(known)}.{suggest(name, known)}')
    values: dict[str, Any] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if isinstance(target, ast.Name) and target.id.isupper() and value is not None:
            try:
                values[target.id] = ast.literal_eval(value)
            except ValueError:
                continue
    missing = [key for key in ("VERSION", "CONFIG", "INPUTS", "PRODUCES", "OUTPUTS") if key not in values]
    if missing:
        raise ConfigError(f"{path}: a stage must declare {', '.join(missing)} as literals")
    return Stage(
        name=name,
        path=path,
        version=values["VERSION"],
        config=tuple(values["CONFIG"]),
        inputs=dict(values["INPUTS"]),
        optional_inputs=dict(values.get("OPTIONAL_INPUTS", {})),
        produces=values["PRODUCES"],
        outputs=tuple(values["OUTPUTS"]),
        resources=tuple(values.get("RESOURCES", ())),
        label=values.get("LABEL"),
        metrics=dict(values.get("METRICS", {})),
        reads_if=dict(values.get("READS_IF", {})),
        forecast=values.get("FORECAST"),
        format=values.get("FORMAT"),
        seeded=values.get("SEEDED", True),
    )


def best_of(stage: str, metric: str) -> Callable[..., float] | None:
    """Return min or max, whichever finds the best value of a stage's metric; None: neither is better, or unknown."""
    if stage not in stage_names():
        return None  # of an artifact that other code made
    choices: dict[str | None, Callable[..., float]] = {"minimize": min, "maximize": max}
    return choices.get(read_stage(stage).direction_of(metric))


@cache
def _folder() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("the stages are not installed: run `make setup` in the checkout, or install the package")
    return Path(next(iter(spec.submodule_search_locations)))
