"""mlxchat plan: what would run, and why; mlxchat run: compose, plan, execute, report; mlxchat --help."""

from __future__ import annotations

import textwrap
from argparse import SUPPRESS, Namespace
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from textwrap import TextWrapper
from typing import TYPE_CHECKING, Any

from mlxchat import __version__
from mlxchat.commands.arguments import Parser, draw_tree, print_json
from mlxchat.config.replaced import find_replacement
from mlxchat.config.verbs import VERBS
from mlxchat.errors import ConfigError, suggest, visible

if TYPE_CHECKING:
    from mlxchat.composition.compose import Composed
    from mlxchat.config.schema import Config
    from mlxchat.runner.plan import Estimate, PlannedStep
    from mlxchat.store.store import Store


_DAY_SECONDS = 86400


def plan(parser: Parser) -> None:
    parser.take_settings()
    parser.description = (
        "Show for each step whether it is done, would run, may run (maybe: an input will be rebuilt, and with the same "
        "bytes the step is done) or is being made by another process (waiting), and why; how long it took and how "
        "large it was the last time; and the memory that trainings are predicted to need. Nothing is computed."
    )
    parser.add_argument("--multirun", "-m", action="store_true", help="plan a sweep; shared steps count once")
    parser.add_json("JSON for programs, including every changed key")
    graphs = ("ascii", "mermaid")
    parser.add_argument("--graph", choices=graphs, help="draw the pipeline with each step's state instead")


def _plan(options: Namespace) -> int:
    """Print the plan of the settings."""
    from mlxchat.composition.compose import compose_config, split_options
    from mlxchat.pipeline import place_steps, plan_of
    from mlxchat.planning.forecast import estimate_steps
    from mlxchat.planning.memory import forecast_memory
    from mlxchat.runner.plan import format_plan
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
    """Yield the lines before a plan that downloads, takes more than a day, or has an implied recipe."""
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
    known = f"about {format_seconds(seconds)} (predicted)" if times else "unknown; `mlxchat bench train` measures it"
    time = f". Pretraining on this machine: {known}" if pretrainings else ""
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
    from mlxchat.runner.plan import describe_cost, format_plan
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
    if options.json:
        sums = _sum_of(known)
        print_json({"schema": 3, "jobs": described, "estimate": {**sums, "unknown": len(sums["unknown"])}})
        return 0
    steps = len({step.key for job in jobs for step in job.plan})
    counts = f"{steps - len(known)} done, {len(known)} to run{describe_cost(known)}"
    print(f"{plural(len(jobs), 'job')}, {plural(steps, 'step')}: {counts}")
    return 0


def _sum_of(estimates: Mapping[str, Estimate | None]) -> dict[str, Any]:
    """Return the sum of step → estimate, and the steps without one."""
    known = [estimate for estimate in estimates.values() if estimate]
    sums = {"seconds": round(sum(each.seconds for each in known), 3), "bytes": sum(each.bytes for each in known)}
    return {**sums, "unknown": [name for name, estimate in estimates.items() if not estimate]}


def describe_plan(
    plan: list[PlannedStep], estimates: Mapping[str, Estimate | None], memory: Mapping[str, str]
) -> dict[str, Any]:
    """Return the plan as plain data, with every difference from the nearest artifact."""
    planned = {step.name: step for step in plan}
    steps = []
    for step in plan:
        estimate = estimates.get(step.name)
        filled = {role: {"step": source, "key": planned[source].key} for role, source in step.inputs.items()}
        inputs = filled | {role: {"step": None, "rid": made["rid"]} for role, made in step.artifacts.items()}
        difference = step.difference if step.difference is not None and step.difference.nearest else None
        steps.append({
            "step": step.name, "stage": step.stage.name, "state": step.state, "reason": step.reason, "key": step.key,
            "rid": step.rid or None, "artifact": step.artifact or None, "forced": step.forced, "inputs": inputs,
            "difference": asdict(difference) if difference else None, "changed_code": step.drift,
            "estimate": asdict(estimate) if estimate else None, "memory": memory.get(step.name),
        })  # fmt: skip
    pending = [step.name for step in plan if not step.done]
    return {"schema": 2, "pending": pending, "estimate": _sum_of(estimates), "steps": steps}


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


def run(parser: Parser) -> None:
    parser.take_names("", least=0, most=None)  # each is refused with a suggestion
    parser.take_settings()
    parser.long_help = describe_usage
    add = parser.add_argument
    add("--multirun", "-m", action="store_true", help="sweep over comma-separated values: one run per value")
    add("--fail-fast", action="store_true", help="a failed step also stops steps that do not need it")
    add("--run", "-r", action="store_true", help=SUPPRESS)  # accepted for Hydra's users; it changes nothing
    add("--cfg", "-c", choices=("job",), help="print the composed configuration")
    add("--package", "-p", metavar="SECTION", help="with --cfg: only this section")
    add("--resolve", action="store_true", help="with --cfg: resolve references")
    add("--version", "-V", action="version", version=f"mlxchat {__version__}", help="print the version")


def _run(options: Namespace) -> int:
    """Run the pipeline, a sweep or a search, or print the configuration."""
    if not options.cfg and (options.package or options.resolve):
        raise ConfigError("-p SECTION and --resolve require --cfg job")
    if options.names:
        raise _no_verb(options.names[0], [*options.names[1:], *options.settings])
    settings = [*options.settings, *["fail_fast=true"] * options.fail_fast]
    is_search = any(each.lstrip("+").startswith("sweep=") for each in settings if not each.endswith("sweep=none"))
    if is_search and not options.cfg:
        from mlxchat.sweep.search import run_search

        return run_search(settings)
    if options.multirun:
        from mlxchat.sweep.sweeper import run_sweep

        return run_sweep(settings)
    from mlxchat.pipeline import compose, run_pipeline

    composed = compose(*settings).composed
    if options.cfg:
        _print_config(composed.tree, options)
        return 0
    if composed.config.sweep.kind != "none":  # chosen by a user's file
        from mlxchat.sweep.search import run_search

        return run_search(settings)
    if composed.implied:
        recipe = f"recipe: {composed.implied[0]}, implied by model=."
        print(f"{recipe} The default recipe: experiment=quickstart", flush=True)
    run_pipeline(composed)
    return 0


def _no_verb(word: str, others: list[str]) -> ConfigError:
    """Return the error for an unknown verb."""
    from mlxchat.composition.compose import group_options
    from mlxchat.runner.stage import Stages

    for group, known in (("stage", Stages()), ("experiment", group_options("experiment"))):
        if word in known:
            meant = " ".join([f"{group}={word}", *others])
            return ConfigError(f'there is no verb "{word}". For the {group}: mlxchat {meant}')
    if gone := find_replacement(word):
        return ConfigError(f'there is no verb "{word}".{gone}')
    verbs = [verb for verb in VERBS if " " not in verb]
    return ConfigError(f'there is no verb "{word}": {", ".join(verbs)}.{suggest(word, verbs)}')


def _print_config(tree: Any, options: Namespace) -> None:
    """Print the settings, or a section of them, as YAML."""
    from omegaconf import OmegaConf

    part = OmegaConf.select(tree, options.package) if options.package else tree
    if not OmegaConf.is_config(part):
        raise ConfigError(f'-p: there is no section "{options.package}".{suggest(options.package, tree)}')
    print(OmegaConf.to_yaml(part, resolve=options.resolve), end="")


_USAGE = """mlxchat {version}: nanochat's pipeline on Apple MLX, as a cached DAG.

  mlxchat [run] [SETTINGS]           corpus → tokenizer → pretrain → midtrain → sft → rl → eval; results are cached
  mlxchat stage=pretrain             one stage or step, and the steps that it needs
  mlxchat model=d20                  nanochat's recipe at this depth; `mlxchat plan model=d20` shows what it takes
  mlxchat experiment=quickstart model=d6    the default recipe, deeper
  mlxchat -m seed=1,2                a sweep: one run per value, shared steps computed once
  mlxchat sweep=tpe 'KEY=interval(0.1,1)'   a search: earlier results guide each trial
  mlxchat experiment=speedrun_d20    a recipe from conf/experiment
  mlxchat VERB [SETTINGS] [--help]

Verbs
{verbs}

Settings are written group=option or key=value:
{groups}
  any key of the configuration: `mlxchat --cfg job` prints them; +key adds, ~key removes
  outputs=PATH    folder of the artifacts        force=[sft]    run a step again although it is done

{options}
MLXCHAT_DEBUG=1 shows tracebacks; MLXCHAT_BLAS sets the BLAS of MLX on a Linux CPU, or switches it off;
MLXCHAT_CPU=plain uses the code of GPUs there. MLXCHAT_LOCKS: folder of the GPUs' locks (/tmp/mlxchat-UID).
"""


def describe_usage(options: str) -> str:
    """Return the text of `mlxchat --help`; `options` is its section of options, formatted by argparse."""
    from mlxchat.composition.compose import group_names, group_options
    from mlxchat.composition.overrides import describe_options
    from mlxchat.runner.stage import Stages

    verbs = "\n".join(f"  {verb:<11} {purpose}" for verb, (_, purpose) in VERBS.items() if " " not in verb)
    groups = [group for group in group_names() if group not in ("settings", "mixture")]
    choices = {f"{group}=": describe_options(group_options(group)) for group in groups}
    # The only group that is used in several places.
    choices["mixture@sft.mixture= (or @midtrain.mixture=)"] = describe_options(group_options("mixture"))
    choices["stage="] = describe_options(["all", *Stages()])
    wrap = TextWrapper(width=118, initial_indent="  ", subsequent_indent=" " * 17, break_on_hyphens=False)
    lines = [wrap.fill(f"{name:<14} {names.replace(', ', ' ')}") for name, names in choices.items()]
    return _USAGE.format(version=__version__, verbs=verbs, groups="\n".join(lines), options=options)
