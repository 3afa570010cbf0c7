"""The page of runs, with one finished and one running run of toy stages."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kit.toys import CHAIN, Toys

FINISHED, RUNNING = "run1", "run2"
LONG = "_of_an_experiment_whose_name_is_wider_than_a_phone"


@pytest.fixture
def watched(toys: Toys, served: Path, tmp_path: Path, start: Callable[..., Any]) -> Iterator[Any]:
    """A server whose outputs folder has a run that ended, and one whose second step runs until `go` is called."""
    toys.outputs = shutil.copytree(served, tmp_path / "served", symlinks=True)
    steps = """
        ctx.derive({"num_iterations": 29})
        for iteration in range(1, 21):
            ctx.log({"iteration": iteration, "loss": 5 / iteration})
        go = ctx.out.parents[2] / "go"
        while ctx.config.other.number == 2 and not go.exists():
            time.sleep(0.02)
        ctx.log({"iteration": 21, "loss": 0.125})
        (ctx.out / "result.txt").write_text("done")
        ctx.metrics["accuracy"] = 0.75
    """
    toys.add("copy", steps, inputs={"source": "thing"}, config=("other",), metrics={"accuracy": "higher"})

    def run(number: int) -> None:
        toys.config.other.number = number
        plan = toys.plan(CHAIN)
        folder = toys.outputs / "runs" / f"run{number}"
        folder.mkdir(parents=True)
        steps = [{"step": step.name, "stage": step.stage.name, "inputs": step.inputs} for step in plan]
        record = {"experiment": f"toy{number}{LONG}", "steps": steps}
        (folder / "plan.json").write_text(json.dumps(record))
        toys.run(plan)

    run(1)
    running = threading.Thread(target=run, args=(2,))
    running.start()
    with start(seconds=0.001, outputs=toys.outputs) as server:

        def go() -> None:
            (toys.outputs / "go").touch()
            running.join(30)

        server.go = go
        try:
            server.until(lambda: step(server, RUNNING)["state"] == "running", seconds=30)
            server.until(lambda: bool(step(server, RUNNING)["series"]), seconds=30)
            yield server
        finally:
            go()


def step(server: Any, run: str) -> Any:
    return server.client.get(f"/api/runs/{run}/two").json()


def test_runs_are_listed_with_their_records(watched):
    runs = watched.client.get("/api/runs").json()["data"]
    assert [(run["run"], run["experiment"]) for run in runs] == [(RUNNING, f"toy2{LONG}"), (FINISHED, f"toy1{LONG}")]
    finished = watched.client.get(f"/api/runs/{FINISHED}").json()
    assert [(each["step"], each["state"], each["inputs"]) for each in finished["steps"]] == [
        ("one", "run", {}), ("two", "run", {"source": "one"})
    ]  # fmt: skip
    two = step(watched, FINISHED)
    assert two["metrics"] == {"accuracy": 0.75}
    assert two["series"]["loss"][0] == list(range(1, 22))
    assert two["series"]["loss"][1][:2] == [5, 2.5]
    watched.until(lambda: step(watched, RUNNING)["iteration"] == 20, seconds=30)
    assert step(watched, RUNNING)["iterations"] == 29
    watched.go()
    assert (step(watched, RUNNING)["state"], step(watched, RUNNING)["iteration"]) == ("run", None)


@pytest.mark.parametrize("name", ["run9", "..%2fstore", "run1%00", "run1/three"])
def test_unknown_runs_and_steps_get_404(watched, name):
    assert watched.client.get(f"/api/runs/{name}").status_code == 404


@pytest.mark.slow
@pytest.mark.parametrize("width", [375, 1280])
def test_runs_page_draws_running_steps(watched, browser, width):
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.set_default_timeout(15_000)
    told: list[str] = []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.goto(f"{watched.url}/runs")
    page.get_by_role("button", name="two").click()
    page.wait_for_selector(".step.running:has-text('iteration 20 of 29')")
    page.wait_for_selector(".curve canvas")
    watched.go()
    page.wait_for_selector(".step.run >> text=two")
    page.wait_for_selector("#facts >> text=0.75")
    page.select_option("#other", FINISHED)
    page.wait_for_selector("#step-state:has-text('toy1')")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    assert told == []
    page.close()
