"""A finished run whose files a test may change, and its report."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mlxchat.report.collect import RunReport, collect, latest_run
from mlxchat.report.document import document, title_of, write_document

EVALS = ("eval_base", "eval_mid", "eval_sft", "eval_rl")


class Made:
    """The outputs of a finished run."""

    def __init__(self, outputs: Path) -> None:
        self.outputs, self.run = outputs, latest_run(outputs)
        self.folders = {path.name: path.resolve() for path in (outputs / "refs" / "latest").resolve().iterdir()}

    def edit(self, step: str, name: str, **changes: Any) -> None:
        """Change entries of a JSON file of an artifact, which may be absent."""
        path = self.folders[step] / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(content | changes))

    def write_lines(self, step: str, name: str, records: list[dict[str, Any]]) -> None:
        (self.folders[step] / name).write_text("".join(json.dumps(record) + "\n" for record in records))

    def score(self, **tasks: dict[str, Any]) -> None:
        """Give each evaluation these tasks only."""
        for name in EVALS:
            self.edit(name, "scores.json", tasks=tasks, bpb=None)

    def drop(self, *steps: str) -> None:
        """Take steps out of the plan."""
        plan = json.loads((self.run / "plan.json").read_text())
        plan["steps"] = [step for step in plan["steps"] if step["step"] not in steps]
        (self.run / "plan.json").write_text(json.dumps(plan))

    def remove(self, *steps: str) -> None:
        """Remove artifacts, as if the steps had never ended."""
        for step in steps:
            shutil.rmtree(self.folders[step])
        events = (self.run / "events.jsonl").read_text().splitlines(keepends=True)
        kept = [line for line in events if json.loads(line).get("step") not in steps]
        (self.run / "events.jsonl").write_text("".join(kept))

    def add_event(self, **event: str) -> None:
        with (self.run / "events.jsonl").open("a") as file:
            file.write(json.dumps({"time": "2026-11-21T10:59:00+00:00", **event}) + "\n")

    def report(self) -> RunReport:
        return collect(self.outputs, self.run)

    def write_report(self) -> Path:
        return write_document(self.run, title_of(self.report()), document(self.report()))


@pytest.fixture
def made(outputs: Path) -> Made:
    return Made(outputs)
