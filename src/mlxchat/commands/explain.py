"""mlxchat explain STAGE: what a stage or step does, reads and writes, and its settings with their values."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

from mlxchat.commands.arguments import Parser, split_words
from mlxchat.commands.columns import aligned, print_json, show_value
from mlxchat.errors import ConfigError, suggest

_WIDTH = 40  # of a value; --json has it whole


def main(arguments: list[str]) -> int:
    """Print what a stage, or a step of the pipeline with its own settings, is and takes."""
    parser = Parser(
        prog="mlxchat explain", allow_abbrev=False,
        description="Show what a stage or step does, reads and writes, and its settings with their values.",
    )  # fmt: skip
    parser.add_argument("settings", nargs="+", metavar="STAGE", help="or a step, and SETTINGS as of a run")
    parser.add_argument("--json", action="store_true", help="one JSON object for programs")
    options, rest = parser.parse_known_intermixed_args(arguments)
    names, overrides = split_words(options.settings)
    if len(names) != 1:
        raise ConfigError("expected mlxchat explain STAGE: the name of one stage or step")
    found = explain(names[0], [*overrides, *rest])
    if options.json:
        print_json(found)
        return 0
    print(f"{found['stage']}: {found['does']}")
    rows = [["file", f"{found['file']}, version {found['version']}"], ["reads", ", ".join(found["reads"]) or "nothing"]]
    rows += [["writes", f"{found['produces']}: {', '.join(found['writes'])}"]]
    rows += [["needs", ", ".join(found["needs"])]] if found["needs"] else []
    print(aligned(rows, indent="  "))
    for title, entries in (("numbers", found["metrics"].items()), ("settings", found["settings"].items())):
        if entries:
            print(f"{title}\n{aligned([_row(name, entry) for name, entry in entries], indent='  ')}")
    if found["sections"]:
        print(f"reads besides: {', '.join(found['sections'])}. Values: mlxchat --cfg job")
    return 0


def explain(name: str, overrides: list[str]) -> dict[str, Any]:
    """Return what is declared of a stage, and the settings of its own section: key → value and what it means.

    Args:
        name: of a stage, or of a step of the configuration's pipeline, whose own settings count.
        overrides: those of a command line.

    Raises:
        ConfigError: there is no such stage or step.
    """
    from mlxchat.composition.compose import compose_config, split_options
    from mlxchat.composition.sections import config_of
    from mlxchat.runner.stage import Stages

    config = compose_config(*split_options(overrides)).config
    stages, is_step = Stages(config.stages), name in config.pipeline
    key = str(config.pipeline[name].get("stage")) if is_step else name
    if key not in stages:
        known = [*config.pipeline, *(each for each in stages if each not in config.pipeline)]
        raise ConfigError(f'"{name}" is no stage and no step: {", ".join(known)}.{suggest(name, known)}')
    stage = stages[key]
    section = getattr(config_of(config, name, stage) if is_step else config, key, None)
    text = ast.get_docstring(ast.parse(stage.path.read_text(encoding="utf-8"))) or ""
    return {
        "stage": key, "does": " ".join(text.partition("\n\n")[0].split()), "file": str(stage.path),
        "version": stage.version,
        "reads": [f"{role} ({kind})" for role, kind in stage.inputs.items()]
        + [f"{role} ({kind}, if it is given)" for role, kind in stage.optional_inputs.items()],
        "produces": stage.produces, "writes": [names.replace("|", " or ") for names in stage.outputs],
        "needs": list(stage.resources), "metrics": dict(stage.metrics),
        "settings": dict(_settings(section, key)) if is_dataclass(section) else {},
        "sections": [other for other in stage.config if other != key],
    }  # fmt: skip


def _row(name: str, entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [name, entry]
    value = entry["value"]
    shown = ", ".join(value) if isinstance(value, dict) and value else show_value(value)
    return [name, textwrap.shorten(shown, _WIDTH, placeholder=" …"), entry["means"]]


def _settings(section: Any, prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield dotted key → value and meaning of a section, those of its parts included."""
    from mlxchat.store.fingerprint import plain_of

    meanings = _meanings(section.__class__)
    for item in fields(section):
        value = getattr(section, item.name)
        if is_dataclass(value):
            yield from _settings(value, f"{prefix}.{item.name}")
        else:
            yield f"{prefix}.{item.name}", {"value": plain_of(value), "means": meanings.get(item.name, "")}


@cache
def _meanings(kind: type[object]) -> dict[str, str]:
    """Return field → the first sentence of the text below it in the source of a dataclass."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__[:-1]):
        try:
            tree = ast.parse(inspect.getsource(importlib.import_module(each.__module__)))
        except (ImportError, OSError, TypeError):
            continue  # a class that was made while running
        body = next(
            (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == each.__name__), []
        )
        for item, text in itertools.pairwise(body):
            is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and is_text:
                found[item.target.id] = " ".join(str(text.value.value).split()).partition(". ")[0]  # type: ignore[attr-defined]  # see is_text
    return found
