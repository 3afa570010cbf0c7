"""The reference pages that are generated from the code: settings, groups, commands and stages.

`pages()` returns page → Markdown. docs/hooks.py gives the pages to mkdocs; nothing is written to disk.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import os
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints
from unittest.mock import patch

from mlxchat.commands.arguments import parser_of
from mlxchat.composition.compose import compose_config, conf_folder, group_names
from mlxchat.composition.problems import find_problems
from mlxchat.config import schema
from mlxchat.config.verbs import VERBS
from mlxchat.errors import MlxchatError
from mlxchat.runner.stage import Stage, Stages

_PROBES: dict[type, tuple[Any, ...]] = {int: (-1, 0), float: (-1.0, 0.0), str: ("?",)}
"""Impossible values. The message that refuses one says what is accepted."""


def pages() -> dict[str, str]:
    """Return path below docs/ → Markdown of every generated page."""
    made = {"config": settings_page, "groups": groups_page, "commands": commands_page, "stages": stages_page}
    return {f"reference/{name}.md": page() for name, page in made.items()}


# Settings


@dataclass(frozen=True)
class Setting:
    """One key of the configuration, as the schema declares it."""

    key: str
    """Dotted; `*` stands for the names of a mapping."""
    type: str
    meaning: str
    identity: str
    """yes, no, or contents: of what the value refers to."""


def settings(kind: type = schema.Config, prefix: str = "", *, counts: bool = True) -> Iterator[Setting]:
    """Yield every setting of a dataclass of the schema, sections first to last."""
    hints, meanings = get_type_hints(kind), meanings_of(kind)
    for item in fields(kind):
        key, hint, own = prefix + item.name, hints[item.name], counts
        own = own and item.metadata.get("identity") is not False
        section = next((part for part in (hint, *get_args(hint)) if is_dataclass(part)), None)
        is_mapping = get_origin(hint) is dict
        if section is None or section is not hint:
            identity = "yes" if own else "contents" if counts and item.metadata.get("pin") else "no"
            yield Setting(key, _name_of(hint), meanings.get(item.name, ""), identity)
        if isinstance(section, type):
            yield from settings(section, f"{key}.*." if is_mapping else f"{key}.", counts=own)


def meanings_of(kind: type[Any]) -> dict[str, str]:
    """Return field → its meaning in `setting(…)`, or its docstring in the source of a dataclass and its bases."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__[:-1]):
        body = ast.parse(inspect.getsource(each)).body[0]
        assert isinstance(body, ast.ClassDef)
        for item, text in itertools.pairwise(body.body):
            if isinstance(item, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[ast.unparse(item.target)] = " ".join(str(text.value.value).split())
    return {**found, **{item.name: said for item in fields(kind) if (said := item.metadata.get("meaning"))}}


def _name_of(hint: Any) -> str:
    if get_origin(hint) in (types.UnionType, Union):
        return " or ".join(map(_name_of, get_args(hint)))
    if get_origin(hint) is not None:
        return f"{get_origin(hint).__name__}[{', '.join(map(_name_of, get_args(hint)))}]"
    return {types.NoneType: "null", Any: "any"}.get(hint) or str(hint.__name__)


def accepted_values(config: schema.Config) -> dict[str, str]:
    """Return setting → what is accepted, from the messages that refuse impossible values."""
    before, found = set(find_problems(config)), {}
    for setting in settings():
        kind = {"int": int, "float": float, "str": str}.get(setting.type.removesuffix(" or null"))
        if kind is None or "*" in setting.key or value_of(config, setting.key) is _ABSENT:
            continue
        for probe in _PROBES[kind]:
            try:
                lines = [line for line in find_problems(_changed(config, setting.key, probe)) if line not in before]
            except MlxchatError:  # not a message about this setting alone
                continue
            told = re.search(
                rf"^{re.escape(setting.key)} is .*?, expected (.+?)(?:\.|, got .*)?$", "\n".join(lines), re.M
            )
            if told:
                found[setting.key] = re.sub(r"\. Did you mean.*", "", told[1])
                break
    return found


_ABSENT = object()


def value_of(config: Any, key: str) -> Any:
    """Return the value of a dotted key; `_ABSENT` where a section above it is null or has no such name."""
    for name in key.split("."):
        if config is None or name == "*":
            return _ABSENT
        config = getattr(config, name)
    return config


def _changed(config: Any, key: str, value: Any) -> Any:
    name, _, rest = key.partition(".")
    return replace(config, **{name: _changed(getattr(config, name), rest, value) if rest else value})


def _shown(value: Any) -> str:
    """Return a default for a table's cell; long lists and mappings by their size or names."""
    if value is _ABSENT:
        return ""
    if isinstance(value, Mapping) and value:
        return ", ".join(f"`{name}`" for name in value)
    if is_dataclass(value):
        return "see below"
    if isinstance(value, list) and len(str(value)) > 40:
        return f"{len(value)} values"
    return f"`{value if isinstance(value, str) and value else json.dumps(value)}`"


def settings_page() -> str:
    """Return the page of all settings."""
    quickstart, nanochat = compose_config([]).config, compose_config(["model=d20"]).config
    accepted, readers = accepted_values(quickstart), _readers()
    out = [_SETTINGS_INTRO]
    section, sections = None, {setting.key.partition(".")[0] for setting in settings() if "." in setting.key}
    for setting in settings():
        name = top if (top := setting.key.partition(".")[0]) in sections else ""
        if name != section:
            section = name
            out += ["", f"## {section or 'The run'}", "", _about_section(section, readers.get(section, [])), ""]
            out += ["| setting | type | default | identity | meaning |", "|---|---|---|---|---|"]
        default, other = value_of(quickstart, setting.key), value_of(nanochat, setting.key)
        shown = _shown(default) + (f"<br>d20: {_shown(other)}" if default != other and other is not _ABSENT else "")
        bounds = f" *Accepted: {accepted[setting.key]}.*" if setting.key in accepted else ""
        identity = setting.identity if section in readers or "seed" in setting.key else "no"
        label = setting.key.replace("*", "&#42;").replace(".", ".<wbr>")
        cells = [f'<code id="{setting.key}">{label}</code>', setting.type, shown, identity]
        out.append(f"| {' | '.join([*cells, _cell(setting.meaning + bounds)])} |")
    return "\n".join(out) + "\n"


def _readers() -> dict[str, list[str]]:
    """Return section → stages that read it."""
    found: dict[str, list[str]] = {}
    for name, stage in Stages().items():
        for section in stage.config:
            found.setdefault(section, []).append(name)
    return found


def _about_section(section: str, stages: list[str]) -> str:
    if not section:
        return "Settings outside every section."
    hint = get_type_hints(schema.Config)[section]
    about = inspect.getdoc(hint) or "" if is_dataclass(hint) else meanings_of(schema.Config).get(section, "")
    links = ", ".join(f"[{stage}](stages.md#{stage})" for stage in stages)
    return f"{' '.join(about.split())} {f'Read by {links}.' if links else 'No stage reads it.'}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


_SETTINGS_INTRO = """# Settings

Every key of the configuration. Set one with `mlxchat key=value`; a list is `'key=[a,b]'`, nothing is `key=null`.
[Groups](groups.md) set many keys with one word.

- **default**: of plain `mlxchat` (experiment=quickstart); after "d20", of `mlxchat model=d20` (experiment=nanochat)
  where that differs.
- **identity**: whether the value is part of the key that identifies a step's artifact. *yes*: another value is another
  artifact. *no*: the value changes speed, reporting or places, never results. *contents*: what the value refers to (a
  file, a folder, a commit, another artifact) is part of the key instead of its name.
- `*` stands for a name of your choice: `sft.mixture.*.task` is `sft.mixture.jokes.task` for an entry `jokes`.
- Some [stages](stages.md) read a setting only under a condition."""


# Groups


def groups_page() -> str:
    """Return the page of all groups and their options."""
    out = [
        "# Groups\n",
        "A group is a folder of [conf/](../../conf), an option a file in it. `mlxchat group=option` chooses one:",
        "`mlxchat optimizer=adamw`. `group@place=option` puts it elsewhere: `suite@sft.suite=oct2025_sft`.",
    ]
    for group in group_names():
        out += [f"\n## {group}\n", "| option | what it is |", "|---|---|"]
        if group == "model":
            out.append("| `d1` … `d64` | nanochat's sizes at this depth: width 64 × depth, heads 128 wide |")
        for path in sorted(conf_folder().joinpath(group).glob("*.yaml")):
            option = path.stem
            out.append(f"| [`{option}`](../../conf/{group}/{path.name}) | {_cell(first_comment(path))} |")
    return "\n".join(out) + "\n"


def first_comment(path: Path) -> str:
    """Return the first sentence of the comment at the head of a YAML file; else what it is based on."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("# @package")]
    comment = itertools.takewhile(lambda line: line.startswith("# "), lines)
    head = [line[2:].strip().removesuffix("\\") for line in comment]
    sentence = re.split(r"(?<=[^A-Z]\.) (?=[A-Z])", " ".join(head))[0]
    based_on = re.search(r"^defaults: \[(\w+)\]|^defaults:\n  - (\w+)", "\n".join(lines), re.M)
    return sentence or (f"Based on `{based_on[1] or based_on[2]}`." if based_on else "")


# Commands and stages


def commands_page() -> str:
    """Return the page of all verbs, from their parsers."""
    out = [
        "# Commands\n",
        "`mlxchat` without a verb is `mlxchat run`. Exit codes: 0 done, 1 a step failed, 2 a mistake",
    ]
    out += ["in the command or the configuration, 128 + n after signal n.\n", "| verb | what it does |", "|---|---|"]
    out += [f"| [`{verb}`](#{verb.replace(' ', '-')}) | {_cell(about)} |" for verb, (_, about) in VERBS.items()]
    with patch.dict(os.environ, COLUMNS="100"):  # argparse wraps to the terminal's width
        for verb in VERBS:
            out += [f"\n## {verb}\n", "```text", parser_of(verb).format_help().rstrip(), "```"]
    return "\n".join(out) + "\n"


def stages_page() -> str:
    """Return the page of all stages, from their declarations."""
    out = ["# Stages\n", "A stage is a file of [stages/](../../stages); a step of the pipeline is one use of it."]
    out += ["`mlxchat --cfg job -p STAGE` prints the values of your configuration."]
    for name, stage in Stages().items():
        out += [f"\n## {name}\n", *_about_stage(stage)]
    return "\n".join(out) + "\n"


def _about_stage(stage: Stage) -> Iterator[str]:
    about = ast.get_docstring(ast.parse(stage.path.read_text(encoding="utf-8"))) or ""
    sections = [f"[`{section}`](config.md#{section})" for section in stage.config]
    roles = [f"`{role}` ({kind})" for role, kind in stage.inputs.items()]
    roles += [f"`{role}` ({kind}, optional)" for role, kind in stage.optional_inputs.items()]
    seeds = {"run": "`seed`", "no": "none", "data": "`data_seed`", "both": "`seed` and `data_seed`"}[stage.seeded]
    yield f"{about}\n"
    yield "| | |\n|---|---|"
    yield f"| file | [stages/{stage.name}.py](../../stages/{stage.name}.py), version {stage.version} |"
    yield f"| settings | {', '.join(sections) or 'none'} |"
    yield f"| seeds | {seeds} |"
    yield f"| reads | {', '.join(roles) or 'nothing'} |"
    yield f"| writes | {stage.produces}: {', '.join(f'`{name}`'.replace('|', '` or `') for name in stage.outputs)} |"
    yield "\n| metric | better | recorded | needs |\n|---|---|---|---|"
    for metric in stage.metrics:
        better = {"minimize": "lower", "maximize": "higher", None: "—"}[metric.better]
        when = "while training" if metric.curve else "at the end"
        yield f"| `{metric.name}` | {better} | {when} | {metric.needs} |"
