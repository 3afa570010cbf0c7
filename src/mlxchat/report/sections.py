"""One section for each step: what it was told to do, what follows from that, what came of it, and how long it took."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mlxchat.report.collect import RunReport, StepReport
from mlxchat.report.sources import mapping, number, text
from mlxchat.report.wording import (
    STAGE_LABELS,
    format_bytes,
    format_count,
    format_dollars,
    format_seconds,
    format_time,
    format_value,
    join,
)
from mlxchat.store.fingerprint import flatten

Pairs = list[tuple[str, str]]

# Sections that every training reads, of which only these say something about the recipe.
_TELLING = {
    "model": ("depth", "aspect_ratio", "head_width", "num_kv_heads", "context_tokens"),
    "optimizer": ("kind", "variant", "matrix_lr", "embedding_lr", "unembedding_lr", "weight_decay"),
    "training": (),
}
# Long, or told elsewhere.
_LEFT_OUT = ("prompts", "fields", "adamw_groups", "validation", "extend", "save_training_state")


@dataclass(frozen=True, kw_only=True)
class Section:
    """What the report tells of one step, free of any format."""

    step: StepReport
    label: str
    """BASE, MID, SFT, RL, or empty."""
    effort: Pairs
    settings: Pairs
    derived: Pairs
    results: Pairs
    all_settings: list[str]
    """Every setting that the step read, as key=value."""


def sections(report: RunReport) -> list[Section]:
    """Return one section for each step of which there is something to tell, inputs first."""
    return [
        Section(
            step=step,
            label=STAGE_LABELS.get(step.stage, ""),
            effort=_effort(report, step),
            settings=_settings(step),
            derived=[(name, format_value(value)) for name, value in mapping(step.manifest.get("derived")).items()],
            results=[(name, format_value(value)) for name, value in mapping(step.manifest.get("metrics")).items()],
            all_settings=[
                f"{key}={_plain(value)}" for key, value in flatten(mapping(step.manifest.get("full_config"))).items()
            ],
        )
        for step in report.steps
        if step.manifest or step.records or step.error
    ]


def groups_of(section: Section) -> list[tuple[str, Pairs]]:
    """Return (title, pairs) of what there is to tell."""
    groups = [("Results", section.results), ("Derived", section.derived), ("Settings", section.settings)]
    return [(title, pairs) for title, pairs in groups if pairs]


def _effort(report: RunReport, step: StepReport) -> Pairs:
    manifest = step.manifest
    if not manifest:
        return []
    speed, memory = number(manifest.get("tokens_per_second")), number(manifest.get("peak_memory_bytes"))
    found = [
        ("wall clock", format_seconds(step.seconds)),
        ("speed", f"{format_count(speed)} tokens/s" if speed else ""),
        ("peak memory", format_bytes(memory) if memory else ""),
        ("cost", format_dollars(step.seconds, report.cost_per_hour)),
        ("published", format_time(text(manifest.get("published"))).partition(".")[0]),
        ("artifact", step.artifact),
    ]
    return [(name, value) for name, value in found if value]


def _settings(step: StepReport) -> Pairs:
    """Return the settings that say what was done: the step's own, and of shared ones what tells recipes apart."""
    found: Pairs = []
    for section, values in mapping(step.manifest.get("full_config")).items():
        inside = mapping(values)
        if section == "architecture":
            features = [name for name, value in inside.items() if value is True]
            name = text(inside.get("name"))
            found.append((section, f"{name} ({join(features)})" if features else name))
        elif section == "suite":
            found.append((section, _mixture(inside)))
        else:
            shown = {name: inside.get(name) for name in _TELLING[section]} if section in _TELLING else inside
            found += _leaves(shown, f"{section}.")
    return [(name, value) for name, value in found if value]


def _leaves(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if value is None or value is False or value in ([], {}) or key in _LEFT_OUT:
            continue
        if key in ("mixture", "suite"):
            yield f"{prefix}{key}", _mixture(mapping(value))
        elif isinstance(value, Mapping) and "task" in value:
            yield f"{prefix}{key}", _task(text(value["task"]), value)
        elif isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", format_value(value) if number(value) is not None else _plain(value)


def _mixture(items: Mapping[str, Any]) -> str:
    return ", ".join(_task(name, mapping(item)) for name, item in items.items())


def _task(name: str, item: Mapping[str, Any]) -> str:
    """Return a task of a mixture, as in "gsm8k train 7,473 ×4"."""
    epochs, size = number(item.get("epochs")), number(item.get("size"))
    split = text(item.get("split"))
    parts = [name, split if split not in ("train", "") else "", format_value(size) if size else ""]
    parts.append(f"×{epochs:g}" if epochs and epochs != 1 else "")
    return " ".join(part for part in parts if part)


def _plain(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_plain, value))}]"
    if isinstance(value, bool) or value is None or not isinstance(value, int | float):
        return "null" if value is None else text(value)
    return f"{value:g}" if isinstance(value, float) else str(value)
