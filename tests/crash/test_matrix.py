"""A run that ends at any crash point leaves a valid store, and the next run gives the same result.

The fast matrix takes one pass of each point in one scenario, the slow one all passes in all scenarios.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mlxchat.store.files import CRASH_POINTS
from mlxchat.store.store import Store

SOURCES = sorted((Path(__file__).resolve().parents[2] / "src").rglob("*.py"))
# Scenario → what ran before, and what runs now.
SCENARIOS: dict[str, tuple[list[str] | None, list[str]]] = {
    "made": (None, []),
    "forced": ([], ["force=[source, train]"]),
    "shared": ([], ["source.lines=45"]),  # the same bytes: all below is done
}
ELSEWHERE = ("run.", "gc.", "import.", "export.", "search.", "eval.", "send.", "fetch.")
POINTS = [point for point in CRASH_POINTS if not point.startswith(ELSEWHERE)]
# Points that a scenario does not pass.
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

# Each point once, in one of the scenarios that pass it.
SHORT = [
    pytest.param(passing[len(point) % len(passing)], point, id=point)
    for point in POINTS if (passing := [scenario for scenario in SCENARIOS if point not in NOT_PASSED[scenario]])
]  # fmt: skip


@dataclass
class Scenario:
    """The state before, what runs now, and its undisturbed result."""

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


def end_and_continue(scenario: Scenario, folder: Path, place: str, codes: tuple[int, ...], **how: str) -> str:
    """Disturb a run at a place, run again, and compare with the undisturbed one; return what was printed first."""
    stubs = scenario.before.copy(folder / place.replace(":", "-"))
    code, text = stubs.run(*scenario.arguments, AT=place, **how)
    assert code in codes, (place, code, text)
    assert "Traceback (" not in text
    stubs.check_whole()
    code, again = stubs.run(*scenario.arguments)
    assert code == 0, (place, again)
    stubs.check_clean()
    assert stubs.trees() == scenario.trees, place
    return str(text)


def some_pass(scenario: Scenario, point: str) -> str:
    """Return a point with one of its passes, which differs from point to point."""
    return f"{point}:{1 + len(point) * 7 % scenario.passings[point]}"


@pytest.mark.parametrize(("scenario", "point"), SHORT)
def test_killed_run_is_continued(scenario, point, scenarios, tmp_path):
    found = scenarios[scenario]
    end_and_continue(found, tmp_path, some_pass(found, point), (-9,))


# A stop may come when nothing is left to stop: then the run is done. An unwritable cache ends nothing.
STOPPED, REFUSED = (143, 130, 0), (1, 2, 0)
DISTURBANCES = [
    ({"SIGNAL": "TERM"}, ["step.locked", "train.iteration", "publish.synced"], STOPPED, "The same command continues"),
    ({"SIGNAL": "INT"}, ["step.ran", "checkpoint.written"], STOPPED, "The same command continues"),
    ({"ERROR": "ENOSPC"}, ["checkpoint.arrays", "publish.described", "ref.made"], (1, 2), "No space left on device"),
    ({"ERROR": "EROFS"}, ["step.started", "publish.renamed"], (1, 2), "Read-only file system"),
    ({"RUN": "rm -rf outputs"}, ["step.locked", "train.iteration", "publish.synced"], REFUSED, ""),
]


@pytest.mark.parametrize(
    ("how", "point", "codes", "words"),
    [(how, point, codes, words) for how, points, codes, words in DISTURBANCES for point in points],
    ids=lambda part: " ".join(part.values()) if isinstance(part, dict) else str(part)[:20],
)
def test_stopped_or_failing_run_says_why_and_is_continued(how, point, codes, words, scenarios, tmp_path):
    made = scenarios["made"]
    text = end_and_continue(made, tmp_path, some_pass(made, point), codes, **how)
    assert words in text
    if "ERROR" in how:
        assert "ame command again" in text


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "point"), CASES)
@pytest.mark.parametrize(
    ("how", "codes"),
    [({}, (-9,)), ({"SIGNAL": "TERM"}, STOPPED), ({"ERROR": "ENOSPC"}, REFUSED), ({"RUN": "rm -rf outputs"}, REFUSED)],
    ids=lambda part: " ".join(part) or "KILL" if isinstance(part, dict) else "",
)
def test_run_disturbed_at_any_pass_of_a_point_is_continued(how, codes, scenario, point, scenarios, tmp_path):
    found = scenarios[scenario]
    for passing in range(1, found.passings[point] + 1):
        end_and_continue(found, tmp_path, f"{point}:{passing}", codes, **how)


@pytest.mark.parametrize(
    ("place", "continued"),
    [("train.iteration:3", 2), ("checkpoint.written:3", 2), ("checkpoint.renamed:3", 3), ("train.finished:1", 4),
     ("checkpoint.arrays:1", None)],
)  # fmt: skip
def test_kill_loses_only_the_work_since_the_last_save(place, continued, stubs):
    assert stubs.run(AT=place)[0] == -9
    assert stubs.run()[0] == 0
    (manifest,) = (made for made in Store(stubs.outputs).manifests() if made["step"] == "train")
    assert [attempt["outcome"] for attempt in manifest["attempts"]] == ["killed", "done"]
    assert manifest["attempts"][-1]["resumed_from"] == continued


def test_intermediate_model_is_published_once_despite_kills(scenarios, tmp_path):
    """It is published after the second iteration, before the second save."""
    made = scenarios["made"]
    passed = made.before.copy(tmp_path / "traced").trace()
    third = [number for number, each in enumerate(passed) if each == "train.iteration"][2]
    for point in ("publish.written", "publish.renamed", "ref.made"):
        end_and_continue(made, tmp_path, f"{point}:{passed[:third].count(point)}", (-9,))
        store = Store(tmp_path / f"{point}-{passed[:third].count(point)}" / "outputs")
        assert len([manifest for manifest in store.manifests() if manifest["step"] == "train@2"]) == 1


@pytest.mark.parametrize("place", ["step.started:3", "step.ran:3", "checkpoint.done:2", "step.recorded:3"])
def test_step_whose_lock_was_removed_is_not_published(place, scenarios, tmp_path):
    """Another process may be making it."""
    text = end_and_continue(scenarios["made"], tmp_path, place, (2,), RUN="rm -rf outputs/locks")
    assert "was removed or exchanged while train was made" in text


def test_points_are_called_and_named_by_tests():
    calls = [point for path in SOURCES for point in re.findall(r'crash_point\("([\w.]+)"\)', path.read_text())]
    assert set(calls) == set(CRASH_POINTS)
    tests = "".join(path.read_text() for path in Path(__file__).parents[1].rglob("test_*.py") if path != Path(__file__))
    elsewhere = sorted(point for point in CRASH_POINTS if point.startswith(ELSEWHERE))
    assert [point for point in elsewhere if not re.search(rf'"{point}(:\d+)?"', tests)] == []


def test_scenarios_pass_every_point_of_a_step(scenarios):
    for name, scenario in scenarios.items():
        assert scenario.passings.keys() == set(POINTS) - NOT_PASSED[name]
    assert set.intersection(*NOT_PASSED.values()) == set()
