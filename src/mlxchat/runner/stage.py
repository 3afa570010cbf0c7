"""A stage: one Python file, read here for what it declares and imported only when it runs.

Ours are in stages/. A user's are found in the folders and modules that the configuration's `stages` names, and in
those that installed packages declare under the entry-point group `mlxchat.stages`.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from mlxchat.config.parts import import_module, module_files
from mlxchat.errors import ConfigError, suggest

_PACKAGE = "mlxchat.stages"
FORMATS = ("base", "chat")
"""Of checkpoints: what continues text, and what answers."""
_GROUP = "mlxchat.stages"  # of entry points
_REQUIRED = ("VERSION", "INPUTS", "PRODUCES", "OUTPUTS")


@dataclass(frozen=True)
class Stage:
    """What a stage file declares."""

    name: str
    path: Path
    module: str
    """Dotted name under which it is imported."""
    root: Path | None
    """Folder in which that module is found; None: it is installed."""
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
    """Name of a number that it records → minimize, maximize or neither, whether while training too, and under which
    conditions."""
    reads_if: dict[str, str] = field(default_factory=dict)
    """Section or setting → the condition without which the stage does not read it, so that it is not in the key: a role
    that must be filled, the format of the model to evaluate (base or chat), or never."""
    forecast: str | None = None
    """Module that says what is known of a step before it runs, without MLX; it may have the functions
    memory(config, stage, sizes), problems(config, step, plan, sizes), model_sizes(section) and remark(section)."""
    format: str | None = None
    """Of the checkpoint that it makes: base or chat; None: not known before it is made."""
    settings: str | None = None
    """module:Class of the dataclass of its own section; None: it reads sections that others declare."""
    seeded: bool | str = True
    """Which seeds it draws from, and therefore its identity: True (the run's), False (none), "data" (the data's alone),
    "both" (the run's, and the data's for what it validates on)."""

    @property
    def roles(self) -> dict[str, str]:
        """All roles, filled or not."""
        return self.inputs | self.optional_inputs

    def direction_of(self, metric: str) -> str | None:
        """Return the better direction that METRICS declares for a number; None: the stage declares no such number."""
        return self._declared(metric).partition(" ")[0] or None

    def is_curve(self, metric: str) -> bool:
        """Return whether a number is recorded while the stage trains, too."""
        return " while training" in self._declared(metric)

    def _declared(self, metric: str) -> str:
        """Return what METRICS says of a number. Of patterns, such as "accuracy_{sft.suite}", the longest decides."""
        patterns = sorted(self.metrics, key=len, reverse=True)
        for pattern in [metric, *patterns] if metric in self.metrics else patterns:
            if re.fullmatch(re.sub(r"\\\{.+?\\\}", ".+", re.escape(pattern)), metric):
                return self.metrics[pattern]
        return ""

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
        run: Callable[[Any], None] = import_module(self.module, self.root).run
        return run

    def load_forecast(self) -> ModuleType | None:
        """Import FORECAST; None: the stage names none."""
        forecast: ModuleType | None = None if self.forecast is None else import_module(self.forecast, self.root)
        return forecast


class Stages(Mapping[str, Stage]):
    """Name → stage: ours, those of installed packages, and those of a configuration."""

    def __init__(self, places: Iterable[str] = ()) -> None:
        """Find the files; ours are read when they are asked for.

        Args:
            places: folders (with a slash, such as ./my_stages) and modules, as `stages` of the configuration has them.

        Raises:
            ConfigError: a place does not exist or holds no stage, a declaration is missing or no literal, or two
                stages have one name.
        """
        self._ours = stage_files()
        self.own: dict[str, Stage] = {}
        """Those of users and packages."""
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
    """Return what a stage's file declares, without importing it: planning must not load MLX.

    Raises:
        ConfigError: a declaration is missing or no literal.
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
    """Return min or max, whichever finds the best value of a stage's metric; None: neither is better, or unknown."""
    ours = _folder() / f"{stage}.py"
    declared = read_stage(ours, f"{_PACKAGE}.{stage}") if ours.is_file() else Stages().get(stage)
    if declared is None:
        return None  # of an artifact that other code made
    choices: dict[str | None, Callable[..., float]] = {"minimize": min, "maximize": max}
    return choices.get(declared.direction_of(metric))


def _read_declarations(path: Path) -> tuple[dict[str, Any], bool]:
    """Return the literals that a file assigns to upper-case names, and whether it has a class called Settings."""
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
    """Return the stages of a folder or module; of its files, those that declare none of what stages declare are not.

    Args:
        place: the folder or module.
        root: the current folder, where a module is searched first; None: it is installed.

    Raises:
        ConfigError: it does not exist, or holds no stage.
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
            f"stages: {place} holds no stage: no Python file in it declares {', '.join(_REQUIRED)}"
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
    # A folder of the user's may lack __init__.py.
    folder = (root or Path.cwd()).joinpath(*module.split(".")) if file is None else file.parent
    return [(f"{module}.{each.stem}", each) for each in sorted(folder.glob("[!_]*.py"))]


@cache
def _installed_places() -> tuple[str, ...]:
    """Return the modules that installed packages declare as places of stages."""
    from importlib.metadata import entry_points

    return tuple(sorted({entry.value for entry in entry_points(group=_GROUP)}))


@cache
def _folder() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("the stages are not installed: run `make setup` in the checkout, or install the package")
    return Path(next(iter(spec.submodule_search_locations)))
