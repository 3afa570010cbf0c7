"""The mark of a value that YAML has to give: OmegaConf's own, without importing OmegaConf to say so."""

from __future__ import annotations

from typing import Any

MISSING: Any = "???"
