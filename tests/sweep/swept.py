"""What sweeps left in an outputs folder."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxchat.store.files import Records


@dataclass(frozen=True)
class Swept:
    """An outputs folder in which sweeps ran."""

    outputs: Path

    def started(self) -> Counter[str]:
        """Return how often each step was started in any run."""
        logs = (self.outputs / "runs").glob("*/events.jsonl")
        return Counter(
            event["step"] for log in logs for event in Records(log).read() if event["event"] == "step_started"
        )

    @property
    def folder(self) -> Path:
        """Return the folder of the latest sweep."""
        return max((self.outputs / "multirun").iterdir())

    def rows(self) -> list[dict[str, Any]]:
        return json.loads((self.folder / "table.json").read_text())
