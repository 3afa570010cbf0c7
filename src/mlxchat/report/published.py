"""What others have published, to be shown beside a run of the same size and recipe: never measured here.

published.json holds the numbers and where they stand. A row belongs beside a run only if architecture, depth, horizon
and corpus are those it was measured with; a smaller or shorter run has nothing published to compare with.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from mlxchat.report.collect import RunReport, StepReport
from mlxchat.report.sources import mapping, number, text

_PUBLISHED: dict[str, Any] = json.loads(files("mlxchat.report").joinpath("published.json").read_text(encoding="utf-8"))
GPT_CORE: dict[str, float] = _PUBLISHED["core"]
"""Model → CORE as the DCLM bundle and nanochat give it."""
NANOCHAT_VERDICTS: list[str] = _PUBLISHED["nanochat_verdicts"]
"""Rows that were published under verdicts of nanochat's which are not ours: compared only with the same ones."""
# Horizons are the same if they differ by less than this share.
_CLOSE = 0.05


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Results of a recipe, as published."""

    name: str
    where: str
    """Where they stand."""
    how: str
    """What else is to be known of them."""
    seconds: float
    """Wall clock there."""
    chatcore_tasks: int
    """How many tasks its ChatCORE is the mean of; another number is not comparable."""
    columns: dict[str, dict[str, float]]
    """Stage → metric → value, as the rows of the table of metrics are called."""


def references(report: RunReport) -> list[Reference]:
    """Return what was published of the recipe that a run followed, if anything."""
    recipes = [recipe_of(report, step) for step in report.steps if step.stage == "pretrain"]
    return [
        Reference(**{name: value for name, value in row.items() if name != "match"})
        for row in _PUBLISHED["rows"]
        if any(_is_same(recipe, row["match"]) for recipe in recipes)
    ]


def recipe_of(report: RunReport, step: StepReport) -> dict[str, Any]:
    """Return architecture, depth, tokens per parameter and corpus of a pretraining, as far as its manifests tell."""
    config, derived = (mapping(step.manifest.get(key)) for key in ("full_config", "derived"))
    corpus = report.step(step.inputs.get("corpus", ""))
    hub = mapping(mapping(mapping(corpus.manifest.get("full_config")).get("corpus")).get("hub")) if corpus else {}
    horizon = mapping(config.get("pretrain"))
    is_cut = horizon.get("num_iterations") is not None or horizon.get("target_flops") is not None
    return {
        "architecture": text(mapping(config.get("architecture")).get("name")),
        "depth": number(derived.get("num_layers")),
        "tokens_per_parameter": None if is_cut else number(horizon.get("tokens_per_parameter")),
        "repository": text(hub.get("repository")),
    }


def _is_same(recipe: dict[str, Any], wanted: dict[str, Any]) -> bool:
    for key, value in wanted.items():
        found = recipe[key]
        if key == "tokens_per_parameter" and found:
            if abs(found / value - 1) > _CLOSE:
                return False
        elif found != value:
            return False
    return True
