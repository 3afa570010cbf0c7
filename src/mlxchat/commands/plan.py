"""mlxchat plan: what would run, and why."""

from __future__ import annotations

import textwrap
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxchat.commands.arguments import Parser
from mlxchat.commands.output import draw_tree, print_json
from mlxchat.errors import visible

if TYPE_CHECKING:
    from mlxchat.composition.compose import Composed
    from mlxchat.config.schema import Config
    from mlxchat.runner.plan import PlannedStep
    from mlxchat.runner.reasons import Estimate
    from mlxchat.store.store import Store

_DAY_SECONDS = 86400
_PURPOSE = (
    "Show for each step whether it is done, would run, may run (maybe: an input will be rebuilt, and with the same "
    "bytes the step is done) or is being made by another process (waiting), and why; how long it took and how large "
    "it was the last time; and the memory that trainings are predicted to need. Nothing is computed."
)


def plan(parser: Parser) -> None:
    """Declare `mlxchat plan`."""
    parser.take_settings()
    parser.description = _PURPOSE
    parser.add_argument("--multirun", "-m", action="store_true", help="plan a sweep; shared steps count once")
    parser.add_json("JSON for programs, including every changed key")
    parser.add_argument(
        "--graph", choices=("ascii", "mermaid"), help="draw the pipeline with each step's state instead"
    )


def _plan(options: Namespace) -> int:
    """Print the plan of the settings."""
    from mlxchat.composition.compose import compose_config, split_options
    from mlxchat.pipeline import place_steps, plan_of
    from mlxchat.planning.forecast import estimate_steps
    from mlxchat.planning.memory import forecast_memory
    from mlxchat.runner.reasons import format_plan
    from mlxchat.store.store import Store

    if options.multirun:
        return _plan_sweep(options)
    composed = compose_config(*split_options(options.settings))
    config, store = composed.config, Store(Path(composed.config.outputs))
    plan = plan_of(config, store)
    if options.graph is not None:
        print(visible(draw_plan(plan) if options.graph == "ascii" else draw_mermaid(plan)))
        return 0
    memory = {name: each.text for name, each in forecast_memory(config, plan).items() if each.text}
    estimates = estimate_steps(plan, store)
    if options.json:
        print_json(describe_plan(plan, estimates, memory))
    else:
        for line in _describe_recipe(composed, plan, store, estimates):
            print(line)
        print(format_plan(plan, _remarks(config, plan, store, memory), estimates), flush=True)
    place_steps(config, plan)
    return 0


def _remarks(config: Config, plan: list[PlannedStep], store: Store, memory: Mapping[str, str]) -> dict[str, str]:
    """Return step → what brackets say about it beside its duration."""
    from mlxchat.config.wording import format_seconds
    from mlxchat.pipeline import find_executors
    from mlxchat.planning.inputs import find_text_need, reads_text
    from mlxchat.runner.keys import find_unknown

    remarks = {name: [text] for name, text in memory.items()}
    for name, executor in find_executors(config, plan).items():
        remarks.setdefault(name, []).append(f"by {executor.kind}")
    need = find_text_need(config, plan, store)
    reader = next((step.name for step in plan if reads_text(step)), None)
    if reader and need:
        remarks.setdefault(reader, []).append(str(need))
    for step in plan:
        seconds = step.config.pretrain.max_seconds
        if step.stage.name == "pretrain" and not step.done and seconds is not None:
            text = f"ends after {format_seconds(seconds)} of training, so the result depends on this machine"
            remarks.setdefault(step.name, []).append(text)
        if unknown := find_unknown(step.externals):
            told = ", ".join(dict.fromkeys(unknown.values()))
            remarks.setdefault(step.name, []).append(f"preliminary key: {told} is not known yet")
    return {name: "; ".join(texts) for name, texts in remarks.items()}


def _describe_recipe(
    composed: Composed, plan: list[PlannedStep], store: Store, estimates: Mapping[str, Estimate | None]
) -> Iterator[str]:
    """Yield the lines before a plan: downloads and duration, then the implied recipe.

    Yields nothing for a plan without downloads and implied recipe that takes less than a day.
    """
    from mlxchat.config.wording import format_seconds
    from mlxchat.planning.inputs import describe_downloads, find_downloads

    config, implied = composed.config, composed.implied
    downloads = find_downloads(config, plan, store)
    waiting = [step for step in plan if not step.done]
    pretrainings = [step.name for step in waiting if step.stage.name == "pretrain"]
    times = [each.seconds for name in pretrainings if (each := estimates[name]) is not None]
    seconds = sum(times)
    if not waiting or not (implied or downloads or seconds > _DAY_SECONDS):
        return
    time = ""
    if times:
        time = f". Pretraining on this machine: about {format_seconds(seconds)} (predicted)"
    elif pretrainings:
        time = ". Pretraining on this machine: unknown; `mlxchat bench train` measures its speed"
    yield f"downloads: {describe_downloads(downloads)}{time}"
    if implied:
        quick = f"experiment=quickstart model=d{config.model.depth}"
        yield f"recipe: {implied[0]}, implied by model=. The default recipe at this depth: {quick}"
        if downloads:
            yield "without a network: add corpus=bundled, which uses bundled text and tasks"
        else:
            yield f"bundled text, tasks and a vocabulary of {config.tokenizer.vocab_size:,} replace nanochat's"


def _plan_sweep(options: Namespace) -> int:
    """Print what each job of a sweep would run; a step is listed under the first job that needs it."""
    from mlxchat.config.wording import plural
    from mlxchat.planning.forecast import estimate_steps
    from mlxchat.planning.memory import forecast_memory
    from mlxchat.runner.reasons import Estimate, format_plan
    from mlxchat.store.store import Store
    from mlxchat.sweep.sweeper import read_sweep

    jobs = read_sweep(options.settings)
    store = Store(Path(jobs[0].composed.config.outputs))
    known: dict[str, Estimate | None] = {}
    described = []
    for job in jobs:
        config = job.composed.config
        estimates = estimate_steps(job.plan, store)
        memory = {name: each.text for name, each in forecast_memory(config, job.plan).items() if each.text}
        own = [step for step in job.plan if not step.done and step.key not in known]
        known |= {step.key: estimates.get(step.name) for step in own}
        about = {"job": job.number, "overrides": job.overrides, "title": job.title, "done": job.is_finished}
        described.append({**about, "own": [step.name for step in own], **describe_plan(job.plan, estimates, memory)})
        if not options.json:
            state = "" if own else " is done" if job.is_finished else " needs only steps of jobs above"
            print(visible(f"job {job.number}/{len(jobs)} {job.title}{state}"))
            if own:
                estimated = {step.name: estimates[step.name] for step in own if step.name in estimates}
                print(textwrap.indent(format_plan(own, memory, estimated), "  "))
    sums = [estimate for estimate in known.values() if estimate is not None]
    total = Estimate(seconds=sum(each.seconds for each in sums), bytes=sum(each.bytes for each in sums))
    unknown = len(known) - len(sums)
    if options.json:
        estimate = {"seconds": round(total.seconds, 3), "bytes": total.bytes, "unknown": unknown}
        print_json({"schema": 3, "jobs": described, "estimate": estimate})
    else:
        cost = f"; together {total}" if sums else ""
        cost += f" and {unknown} without an estimate" if sums and unknown else ""
        steps = {step.key for job in jobs for step in job.plan}
        done = len(steps) - len(known)
        print(f"{plural(len(jobs), 'job')}, {plural(len(steps), 'step')}: {done} done, {len(known)} to run{cost}")
    return 0


def describe_plan(
    plan: list[PlannedStep], estimates: Mapping[str, Estimate | None], memory: Mapping[str, str]
) -> dict[str, Any]:
    """Return the plan as plain data, with every difference from the nearest artifact."""
    planned = {step.name: step for step in plan}
    steps = []
    for step in plan:
        estimate = estimates.get(step.name)
        inputs: dict[str, Any] = {
            role: {"step": source, "key": planned[source].key} for role, source in step.inputs.items()
        }
        inputs |= {role: {"step": None, "rid": made["rid"]} for role, made in step.artifacts.items()}
        difference = step.difference if step.difference is not None and step.difference.nearest else None
        steps.append({
            "step": step.name, "stage": step.stage.name, "state": step.state, "reason": step.reason, "key": step.key,
            "rid": step.rid or None, "artifact": step.artifact or None, "forced": step.forced, "inputs": inputs,
            "difference": asdict(difference) if difference else None, "changed_code": step.drift,
            "estimate": asdict(estimate) if estimate else None, "memory": memory.get(step.name),
        })  # fmt: skip
    known = [estimate for estimate in estimates.values() if estimate]
    return {
        "schema": 2,
        "pending": [step.name for step in plan if not step.done],
        "estimate": {
            "seconds": round(sum(estimate.seconds for estimate in known), 3),
            "bytes": sum(estimate.bytes for estimate in known),
            "unknown": [name for name, estimate in estimates.items() if not estimate],
        },
        "steps": steps,
    }


_COLOURS = {"done": "fill:#cde8d5", "waiting": "fill:#fdecc8", "maybe": "fill:#e3e7f7"}


def draw_mermaid(plan: list[PlannedStep]) -> str:
    """Return a Mermaid flowchart; done, waiting and undecided steps are coloured."""
    lines = ["flowchart LR"]
    for step in plan:
        lines.append(f"  {step.name}[{step.name}]{f':::{step.state}' if step.state in _COLOURS else ''}")
        lines += [f"  {source} --> {step.name}" for source in dict.fromkeys(step.inputs.values())]
    return "\n".join([*lines, *(f"  classDef {state} {colour}" for state, colour in _COLOURS.items())])


def draw_plan(plan: list[PlannedStep]) -> str:
    """Return the steps as a tree: a step's parent is its last input; other inputs are named beside it."""
    position = {step.name: index for index, step in enumerate(plan)}
    parent = {step.name: max(step.inputs.values(), key=lambda source: position[source]) for step in plan if step.inputs}

    def label(step: PlannedStep) -> str:
        others = [source for source in dict.fromkeys(step.inputs.values()) if source != parent.get(step.name)]
        beside = f"  (and {', '.join(others)})" if others else ""
        return f"{step.name} [{step.state}]{beside}"

    def children(step: PlannedStep) -> list[PlannedStep]:
        return [child for child in plan if parent.get(child.name) == step.name]

    return "\n".join(draw_tree(step, label, children) for step in plan if step.name not in parent)
