"""Stages: Python files whose declarations are read here; imported only when they run.

Ours are in stages/. Users' stages are in the folders and modules of the configuration's `stages`, and in modules that
installed packages declare under the entry-point group `mlxchat.stages`.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from mlxchat.config.parts import import_module, module_files
from mlxchat.errors import ConfigError, suggest

_PACKAGE = "mlxchat.stages"
FORMATS = ("base", "chat")
"""Formats of checkpoints: base models continue text, chat models answer."""
_GROUP = "mlxchat.stages"  # of entry points
_REQUIRED = ("VERSION", "INPUTS", "PRODUCES", "OUTPUTS")


@dataclass(frozen=True)
class Stage:
    """The declarations of a stage file."""

    name: str
    path: Path
    module: str
    """Dotted name of its module."""
    root: Path | None
    """Folder of the module; None: it is installed."""
    version: int
    """Raised by hand when a code change changes results."""
    config: tuple[str, ...]
    """Configuration sections that it reads; they are part of its key."""
    inputs: dict[str, str]
    """Role → kind of artifact."""
    optional_inputs: dict[str, str]
    """Roles that a step may leave empty."""
    produces: str
    """Kind of the artifact."""
    outputs: tuple[str, ...]
    """Files that must exist afterwards; of names separated by |, exactly one."""
    resources: tuple[str, ...]
    """Exclusive resources: "gpu", of which there is one."""
    label: str | None
    """Dotted path of the config value in the artifact's name; None: the label of the first input."""
    metrics: dict[str, str] = field(default_factory=dict)
    """Metric → minimize, maximize or neither, whether it is also recorded during training, and under which
    conditions."""
    reads_if: dict[str, str] = field(default_factory=dict)
    """Section or setting → condition without which the stage does not read it, so that it is not in the key: a role
    that must be filled, the format of the model to evaluate (base or chat), or never."""
    forecast: str | None = None
    """Module with facts about a step before it runs; it may have the functions memory(config, stage, sizes) and
    problems(config, step, plan, sizes)."""
    format: str | None = None
    """Format of the checkpoint that it makes: base or chat; None: unknown before it is made."""
    settings: str | None = None
    """module:Class of the dataclass of its own section; None: it has no section of its own."""
    seeded: bool | str = True
    """Seeds that it uses, which are part of its key: True (the run's), False (none), "data" (only the data's),
    "both" (the run's, and the data's for what it validates on)."""

    @property
    def roles(self) -> dict[str, str]:
        """All roles, including optional ones."""
        return self.inputs | self.optional_inputs

    def direction_of(self, metric: str) -> str | None:
        """Return the better direction of a metric declared in METRICS; None: not declared."""
        return self._declared(metric).partition(" ")[0] or None

    def is_curve(self, metric: str) -> bool:
        """Return True if a metric is also recorded during training."""
        return " while training" in self._declared(metric)

    def _declared(self, metric: str) -> str:
        """Return the METRICS entry of a metric; the longest matching pattern, such as "accuracy_{sft.suite}"."""
        patterns = sorted(self.metrics, key=len, reverse=True)
        for pattern in [metric, *patterns] if metric in self.metrics else patterns:
            if re.fullmatch(re.sub(r"\\\{.+?\\\}", ".+", re.escape(pattern)), metric):
                return self.metrics[pattern]
        return ""

    def unread(self, filled: Collection[str], format: str | None) -> frozenset[str]:
        """Return the sections and settings that a step of this stage does not read.

        Args:
            filled: its filled roles.
            format: format of its checkpoint, base or chat; None: unknown, so it may read the settings of both.
        """
        return frozenset(
            path
            for path, condition in self.reads_if.items()
            if not (condition in filled or (condition in FORMATS and format in (condition, None)))
        )

    def seeds(self, seed: int, data_seed: int) -> dict[str, int]:
        """Return the seeds that are part of an artifact's key."""
        if self.seeded == "data":
            return {"seed": data_seed}
        # Before data_seed there was one seed; keys from then stay valid if both seeds are equal.
        of_data = {"data_seed": data_seed} if self.seeded == "both" and data_seed != seed else {}
        return {"seed": seed, **of_data} if self.seeded else {}

    def missing_outputs(self, out: Path) -> list[str]:
        """Return promised files that a folder lacks, and alternatives of which it has too many."""
        wrong = (names for names in self.outputs if sum((out / name).exists() for name in names.split("|")) != 1)
        return [names.replace("|", " or ") for names in wrong]

    def load(self) -> Callable[[Any], None]:
        """Import the stage and return its `run`; this imports MLX."""
        run: Callable[[Any], None] = import_module(self.module, self.root).run
        return run

    def forecast_function(self, name: Literal["memory", "problems"]) -> Callable[..., Any] | None:
        """Return a function of the module FORECAST; None: the stage has none."""
        return None if self.forecast is None else getattr(import_module(self.forecast, self.root), name, None)


class Stages(Mapping[str, Stage]):
    """Name → stage: ours, those of installed packages, and those of a configuration."""

    def __init__(self, places: Iterable[str] = ()) -> None:
        """Find the stage files; ours are read on demand.

        Args:
            places: folders (with a slash, such as ./my_stages) and modules, as in the configuration's `stages`.

        Raises:
            ConfigError: a place does not exist or has no stage, a declaration is missing or not a literal, or two
                stages have the same name.
        """
        self._ours = stage_files()
        self.own: dict[str, Stage] = {}
        """The stages of users and packages."""
        found = [(place, Path.cwd()) for place in dict.fromkeys(places)]
        for place, here in [*found, *((place, None) for place in _installed_places())]:
            for stage in _stages_at(place, here):
                other = self._ours.get(stage.name) or (self.own[stage.name].path if stage.name in self.own else None)
                if other is not None and other != stage.path:
                    raise ConfigError(f"two stages are called {stage.name}: {other} and {stage.path}. Rename one file")
                self.own[stage.name] = stage

    def __getitem__(self, name: str) -> Stage:
        if name in self._ours:
            return read_stage(self._ours[name], f"{_PACKAGE}.{name}")
        return self.own[name]

    def __iter__(self) -> Iterator[str]:
        yield from sorted([*self._ours, *self.own])

    def __len__(self) -> int:
        return len(self._ours) + len(self.own)


def stage_files() -> dict[str, Path]:
    """Return name → file of our stages."""
    return {path.stem: path for path in sorted(_folder().glob("*.py")) if path.stem != "__init__"}


@cache
def read_stage(path: Path, module: str, root: Path | None = None) -> Stage:
    """Return the declarations of a stage's file without importing it: planning must not load MLX.

    Raises:
        ConfigError: a declaration is missing or not a literal.
    """
    values, has_settings = _read_declarations(path)
    if missing := [key for key in _REQUIRED if key not in values]:
        raise ConfigError(f"{path}: a stage must declare {', '.join(missing)} as literals")
    settings = values.get("SETTINGS") or (f"{module}:Settings" if has_settings else None)
    own = [path.stem] if settings else []
    return Stage(
        name=path.stem,
        path=path,
        module=module,
        root=root,
        version=values["VERSION"],
        config=(*own, *values.get("CONFIG", ())),
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
        settings=settings,
        seeded=values.get("SEEDED", True),
    )


def best_of(stage: str, metric: str) -> Callable[..., float] | None:
    """Return min or max as the better direction of a stage's metric; None: neither, or unknown."""
    ours = _folder() / f"{stage}.py"
    declared = read_stage(ours, f"{_PACKAGE}.{stage}") if ours.is_file() else Stages().get(stage)
    if declared is None:
        return None  # an artifact of other code
    choices: dict[str | None, Callable[..., float]] = {"minimize": min, "maximize": max}
    return choices.get(declared.direction_of(metric))


def _read_declarations(path: Path) -> tuple[dict[str, Any], bool]:
    """Return the literals that a file assigns to upper-case names, and whether it has a class Settings."""
    try:
        body = ast.parse(path.read_bytes()).body
    except SyntaxError as error:
        raise ConfigError(f"{path}, line {error.lineno}: {error.msg}") from None
    values: dict[str, Any] = {}
    for node in body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if isinstance(target, ast.Name) and target.id.isupper() and value is not None:
            try:
                values[target.id] = ast.literal_eval(value)
            except ValueError:
                continue
    return values, any(isinstance(node, ast.ClassDef) and node.name == "Settings" for node in body)


def _stages_at(place: str, root: Path | None) -> list[Stage]:
    """Return the stages of a folder or module; files without any stage declaration are ignored.

    The folder `root` is searched first; None: installed modules only.

    Raises:
        ConfigError: it does not exist, or has no stage.
    """
    module = place
    is_folder = "/" in place or place == "."
    if is_folder:
        folder = Path(place).resolve()
        root, module = folder.parent, folder.name
        if not folder.is_dir():
            near = [f"./{each.name}" for each in folder.parent.glob("*/")] if folder.parent.is_dir() else []
            raise ConfigError(f"stages: there is no folder {place}.{suggest(place, near)}")
        if not module.isidentifier():
            raise ConfigError(f'stages: the folder {place} is imported as a package, so "{module}" must be a name')
    files = {file.stem: (file, name) for name, file in _files_of(module, root)}
    declared = {stem: _read_declarations(file)[0].keys() & set(_REQUIRED) for stem, (file, _) in files.items()}
    found = [read_stage(*files[stem], root) for stem in sorted(files) if declared[stem]]
    if not found:
        raise ConfigError(
            f"stages: {place} has no stage: none of its Python files declares {', '.join(_REQUIRED)}"
            if files or is_folder
            else f"stages: there is no module {place}, neither in {Path.cwd()} nor installed; a folder is written "
            f"./{place}"
        )
    return found


def _files_of(module: str, root: Path | None) -> list[tuple[str, Path]]:
    """Return dotted name and file of a module, or of the modules of a package."""
    file = module_files(module, root).get(module)
    if file is not None and file.name != "__init__.py":
        return [(module, file)]
    # Users' folders may lack __init__.py.
    folder = (root or Path.cwd()).joinpath(*module.split(".")) if file is None else file.parent
    return [(f"{module}.{each.stem}", each) for each in sorted(folder.glob("[!_]*.py"))]


@cache
def _installed_places() -> tuple[str, ...]:
    """Return the modules that installed packages declare as locations of stages."""
    from importlib.metadata import entry_points

    return tuple(sorted({entry.value for entry in entry_points(group=_GROUP)}))


@cache
def _folder() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("the stages are not installed: run `make setup` in the checkout, or install the package")
    return Path(next(iter(spec.submodule_search_locations)))
