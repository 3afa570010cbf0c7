"""JSON routes of the page /runs: read-only, from the records of runs.

/api/runs lists runs, /api/runs/RUN has the steps of one, /api/runs/RUN/STEP the curves and samples of a step.
The routes are not coroutines, so files are read in threads, outside the event loop.
"""

from pathlib import Path
from typing import Any

from fastapi import APIRouter

from mlxchat.errors import StoreError
from mlxchat.evals.scores import mapping, number
from mlxchat.report.collect import RunReport, StepReport, collect, text
from mlxchat.runner.context import DERIVED
from mlxchat.serve.security import Fault
from mlxchat.store import locks
from mlxchat.store.files import read_json
from mlxchat.store.store import Store

Json = dict[str, Any]
_MOST_RUNS, _MOST_POINTS, _MOST_SAMPLES = 200, 1000, 8


def run_routes(store: Store) -> APIRouter:
    """Return the routes /api/runs."""
    routes = APIRouter(prefix="/api/runs", include_in_schema=False)

    def folders() -> list[Path]:
        found = [plan.parent for plan in (store.outputs / "runs").glob("*/plan.json")]
        return sorted(found, key=lambda folder: folder.name, reverse=True)[:_MOST_RUNS]

    def read(name: str) -> RunReport:
        folder = next((folder for folder in folders() if folder.name == name), None)
        if folder is None:
            raise Fault(f"There is no run {name[:80]!r}.", status=404)
        try:
            return collect(store.outputs, folder)
        except StoreError:
            raise Fault(f"The plan of run {name} cannot be read.", status=404) from None

    @routes.get("")
    def list_runs() -> Json:
        plans = [(folder.name, mapping(read_json(folder / "plan.json"))) for folder in folders()]
        data = [
            {"run": name, **{key: text(plan.get(key)) or None for key in ("experiment", "started")}}
            for name, plan in plans
        ]
        return {"data": data}

    @routes.get("/{name}")
    def show_run(name: str) -> Json:
        run = read(name)
        return {
            "run": run.folder.name, "experiment": run.experiment, "started": run.started, "outcome": run.outcome,
            "seconds": run.seconds, "steps": [_step(store, step) for step in run.steps],
        }  # fmt: skip

    @routes.get("/{name}/{step}")
    def show_step(name: str, step: str) -> Json:
        found = read(name).step(step)
        if found is None:
            raise Fault(f"Run {name} has no step {step[:80]!r}.", status=404)
        series = {key: _thinned(*points) for key, points in found.all_series.items() if key != "iteration"}
        samples = [{"prompt": sample.prompt, "text": sample.text} for sample in found.samples[:_MOST_SAMPLES]]
        return {**_step(store, found), "series": series, "samples": samples}

    return routes


def _step(store: Store, step: StepReport) -> Json:
    running = step.folder is None and bool(step.key) and locks.is_held(store.lock(step.key))
    last, expected = (
        step.all_series.get(name, ([], []))[1] if running else [] for name in ("iteration", "expected_iterations")
    )
    planned = mapping(read_json(store.outputs / "work" / step.key / "ckpt" / DERIVED)) if running else {}
    measured = step.manifest.get("metrics") or {}
    return {
        "step": step.name, "stage": step.stage, "state": "running" if running else step.outcome, "error": step.error,
        "inputs": step.inputs, "artifact": step.artifact if step.folder else None, "seconds": step.seconds,
        "parameters": step.num_parameters, "iteration": last[-1] if last else None,
        "iterations": expected[-1] if expected else number(planned.get("num_iterations")),
        "metrics": {key: value for key in measured if (value := number(measured[key])) is not None},
    }  # fmt: skip


def _thinned(xs: list[float], ys: list[float]) -> tuple[list[float], list[float]]:
    """Return every k-th point and the last one, about a thousand in all."""
    every = -(-len(xs) // _MOST_POINTS)
    keep = [at for at in range(len(xs)) if at % every == 0 or at == len(xs) - 1]
    return [xs[at] for at in keep], [ys[at] for at in keep]
