"""A process that ends anywhere leaves a store that is whole, and the next run ends as if nothing had happened.

Every point that a run of the stubs passes, in every kind of step: made, made again by force, found by its contents.
The short matrix takes one passing of each point in one scenario, the whole one takes all in all.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mlxchat.store.crash import CRASH_POINTS
from mlxchat.store.store import Store

SOURCES = sorted((Path(__file__).resolve().parents[2] / "src").rglob("*.py"))
# Scenario → what ran before, and what runs now.
SCENARIOS: dict[str, tuple[list[str] | None, list[str]]] = {
    "made": (None, []),
    "forced": ([], ["force=[source, train]"]),
    "shared": ([], ["source.lines=45"]),  # the same bytes: all below is done
}
ELSEWHERE = ("run.", "gc.", "import.", "export.", "search.", "eval.", "distill.", "send.", "fetch.")
POINTS = [point for point in CRASH_POINTS if not point.startswith(ELSEWHERE)]
# Points that a scenario does not come by.
NOT_PASSED = {
    "made": set[str](),
    "forced": {"publish.renamed", "shared.locked", "shared.made", "shared.published"},
    "shared": {"shared.locked", "shared.made", "shared.published", "train.iteration",
               "train.finished", "checkpoint.arrays", "checkpoint.written", "checkpoint.renamed", "checkpoint.done"},
}  # fmt: skip
CASES = [
    pytest.param(scenario, point, id=f"{scenario}-{point}")
    for scenario in SCENARIOS for point in POINTS if point not in NOT_PASSED[scenario]
]  # fmt: skip

# Each point once, in one of the scenarios that come by it.
SHORT = [
    pytest.param(passing[len(point) % len(passing)], point, id=point)
    for point in POINTS if (passing := [scenario for scenario in SCENARIOS if point not in NOT_PASSED[scenario]])
]  # fmt: skip


@dataclass
class Scenario:
    """What stands before, what runs now, and how that ends undisturbed."""

    before: Any
    arguments: list[str]
    passings: Counter[str]
    trees: dict[str, str]


@pytest.fixture(scope="module")
def scenarios(make_stubs: Callable[[], Any]) -> dict[str, Scenario]:
    """Every scenario, run undisturbed."""
    found = {}
    for name, (prior, arguments) in SCENARIOS.items():
        before = make_stubs()
        if prior is not None:
            code, text = before.run(*prior)
            assert code == 0, text
        undisturbed = before.copy(before.folder.with_name(f"{before.folder.name}-undisturbed"))
        passings = Counter(undisturbed.trace(*arguments))
        undisturbed.check_clean()
        found[name] = Scenario(before, arguments, passings, undisturbed.trees())
    return found


def chosen(total: int, point: str, *, every: bool) -> list[int]:
    """Return which passings of a point to end at: all, or one that differs from point to point."""
    return list(range(1, total + 1)) if every else [1 + len(point) * 7 % total]


def end_and_continue(scenario: Scenario, folder: Path, place: str, codes: tuple[int, ...], **how: str) -> str:
    """Disturb a run at a place, run again, and compare with the undisturbed one; return what was printed first."""
    stubs = scenario.before.copy(folder / place.replace(":", "-"))
    code, text = stubs.run(*scenario.arguments, AT=place, **how)
    assert code in codes, (place, code, text)
    stubs.check_whole()
    code, again = stubs.run(*scenario.arguments)
    assert code == 0, (place, again)
    stubs.check_clean()
    assert stubs.trees() == scenario.trees, place
    return str(text)


def disturb(
    scenario: Scenario, folder: Path, point: str, codes: tuple[int, ...], *, every: bool, **how: str
) -> list[str]:
    total = scenario.passings[point]
    assert total > 0, "the scenario does not come by this point"
    return [
        end_and_continue(scenario, folder, f"{point}:{passing}", codes, **how)
        for passing in chosen(total, point, every=every)
    ]


@pytest.mark.parametrize(("scenario", "point"), SHORT)
def test_a_run_killed_once_at_a_point_is_continued(
    scenario: str, point: str, scenarios: dict[str, Scenario], tmp_path: Path
) -> None:
    disturb(scenarios[scenario], tmp_path, point, (-9,), every=False)


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "point"), CASES)
def test_a_run_killed_at_any_passing_of_a_point_is_continued(
    scenario: str, point: str, scenarios: dict[str, Scenario], tmp_path: Path
) -> None:
    disturb(scenarios[scenario], tmp_path, point, (-9,), every=True)


@pytest.mark.parametrize(
    ("place", "continued"),
    [
        ("train.iteration:3", 2), ("checkpoint.arrays:3", 2), ("checkpoint.written:3", 2), ("checkpoint.renamed:3", 3),
        ("checkpoint.done:3", 3), ("train.finished:1", 4), ("checkpoint.arrays:1", None),
    ],
)  # fmt: skip
def test_a_kill_costs_no_more_than_what_was_done_since_the_last_save(
    place: str, continued: int | None, stubs: Any
) -> None:
    assert stubs.run(AT=place)[0] == -9
    assert stubs.run()[0] == 0
    (manifest,) = (made for made in Store(stubs.outputs).manifests() if made["step"] == "train")
    assert [attempt["outcome"] for attempt in manifest["attempts"]] == ["killed", "done"]
    assert manifest["attempts"][-1]["resumed_from"] == continued


def test_an_intermediate_model_is_published_once_wherever_its_training_is_killed(
    scenarios: dict[str, Scenario], tmp_path: Path
) -> None:
    """It is published after the second iteration, before the second save."""
    before = scenarios["made"].before
    passed = before.copy(tmp_path / "traced").trace()
    third = [number for number, each in enumerate(passed) if each == "train.iteration"][2]
    for point in ("publish.written", "publish.renamed", "ref.made"):
        stubs = before.copy(tmp_path / point)
        assert stubs.run(AT=f"{point}:{passed[:third].count(point)}")[0] == -9
        stubs.check_whole()
        assert stubs.run()[0] == 0
        stubs.check_clean()
        assert stubs.trees() == scenarios["made"].trees
        assert len([manifest for manifest in Store(stubs.outputs).manifests() if manifest["step"] == "train@2"]) == 1


# A stop may come when nothing is left to stop: then the run is done.
STOPPED = {"TERM": (143, 0), "INT": (130, 0)}


@pytest.mark.parametrize(
    "point", ["step.locked", "step.ran", "train.iteration", "checkpoint.written", "publish.synced"]
)
@pytest.mark.parametrize("signal", STOPPED)
def test_a_run_asked_to_stop_at_a_point_is_continued(
    signal: str, point: str, scenarios: dict[str, Scenario], tmp_path: Path
) -> None:
    for text in disturb(scenarios["made"], tmp_path, point, STOPPED[signal], every=False, SIGNAL=signal):
        assert "The same command continues" in text
        assert "Traceback" not in text


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "point"), CASES)
def test_a_run_asked_to_stop_at_any_passing_of_a_point_is_continued(
    scenario: str, point: str, scenarios: dict[str, Scenario], tmp_path: Path
) -> None:
    for text in disturb(scenarios[scenario], tmp_path, point, STOPPED["TERM"], every=True, SIGNAL="TERM"):
        assert "Traceback" not in text


# That a cache cannot be written ends nothing.
REFUSED = (1, 2, 0)


@pytest.mark.parametrize(
    "point", ["step.started", "checkpoint.arrays", "publish.described", "publish.renamed", "ref.made"]
)
@pytest.mark.parametrize("error", ["ENOSPC", "EROFS"])
def test_a_disk_that_takes_no_more_at_a_point_is_told_and_the_run_is_continued(
    error: str, point: str, scenarios: dict[str, Scenario], tmp_path: Path
) -> None:
    for text in disturb(scenarios["made"], tmp_path, point, (1, 2), every=False, ERROR=error):
        assert {"ENOSPC": "No space left on device", "EROFS": "Read-only file system"}[error] in text
        assert "ame command again" in text
        assert "Traceback (" not in text


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "point"), CASES)
def test_a_disk_that_takes_no_more_at_any_passing_is_told_and_the_run_is_continued(
    scenario: str, point: str, scenarios: dict[str, Scenario], tmp_path: Path
) -> None:
    for text in disturb(scenarios[scenario], tmp_path, point, REFUSED, every=True, ERROR="ENOSPC"):
        assert "Traceback (" not in text


@pytest.mark.parametrize("point", ["step.locked", "step.started", "train.iteration", "publish.synced", "ref.made"])
def test_outputs_that_vanish_at_a_point_end_the_run_and_the_next_one_starts_over(
    point: str, scenarios: dict[str, Scenario], tmp_path: Path
) -> None:
    for text in disturb(scenarios["made"], tmp_path, point, REFUSED, every=False, RUN="rm -rf outputs"):
        assert "Traceback (" not in text


@pytest.mark.parametrize("point", ["step.started:3", "step.ran:3", "checkpoint.done:2", "step.recorded:3"])
def test_a_step_whose_lock_was_removed_is_not_published_since_others_may_be_making_it(
    point: str, scenarios: dict[str, Scenario], tmp_path: Path
) -> None:
    text = end_and_continue(scenarios["made"], tmp_path, point, (2,), RUN="rm -rf outputs/locks")
    assert "was removed or exchanged while train was made" in text


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "point"), CASES)
def test_outputs_that_vanish_at_any_passing_end_the_run_and_the_next_one_starts_over(
    scenario: str, point: str, scenarios: dict[str, Scenario], tmp_path: Path
) -> None:
    for text in disturb(scenarios[scenario], tmp_path, point, REFUSED, every=True, RUN="rm -rf outputs"):
        assert "Traceback (" not in text


def calls() -> list[tuple[str, str]]:
    """Return (file, point) of every call of crash_point in the library."""
    return [
        (path.name, node.args[0].value)  # type: ignore[attr-defined]
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "crash_point"
    ]


def test_every_call_names_a_point_and_every_point_has_a_call() -> None:
    named = Counter(point for _, point in calls())
    assert named.keys() <= CRASH_POINTS.keys()
    assert [point for point in CRASH_POINTS if point not in named] == []


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_scenario_passes_the_points_that_its_matrix_has(scenario: str, scenarios: dict[str, Scenario]) -> None:
    assert scenarios[scenario].passings.keys() == set(POINTS) - NOT_PASSED[scenario]


def test_between_them_the_scenarios_pass_every_point_of_a_step() -> None:
    assert set.intersection(*NOT_PASSED.values()) == set()
    assert len(POINTS) >= 12


def test_the_points_of_other_commands_are_in_tests_of_theirs() -> None:
    tests = "".join(path.read_text() for path in Path(__file__).parents[1].rglob("test_*.py") if path != Path(__file__))
    passed = {point for point in CRASH_POINTS if point.startswith(ELSEWHERE)}
    assert [point for point in sorted(passed) if not re.search(rf'"{point}(:\d+)?"', tests)] == []
