"""How the report says things: numbers with units, the headline, and the state of a run."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from mlxchat.config.wording import plural
from mlxchat.report.collect import RunReport, StepReport, checkpoint_name
from mlxchat.report.scores import Sample, Scores
from mlxchat.report.sources import mapping, number, text

ABSENT = "—"
STAGE_LABELS = {"pretrain": "BASE", "midtrain": "MID", "sft": "SFT", "rl": "RL"}
SAMPLES_SHOWN = 8
SAMPLE_CHARACTERS = 1500
_CALLS = (("<|python_end|><|output_start|>", "="), ("<|python_start|>", "<<"), ("<|output_end|>", ">>"))
_SPECIAL = re.compile(r"<\|(bos|user_start|user_end|assistant_start|assistant_end|python_\w+|output_\w+)\|>")


def with_calls(output: str) -> str:
    """Return a model's text with calls of the calculator as GSM8K writes them, <<12+7=19>>, and no special tokens."""
    for token, shown in _CALLS:
        output = output.replace(token, shown)
    return _SPECIAL.sub("", output)


def format_seconds(seconds: float | None) -> str:
    """Return a duration such as 0.4 s, 12 s, 14m 20s or 3h 51m."""
    if seconds is None:
        return ABSENT
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    minutes = round(seconds / 60)
    return f"{minutes // 60}h {minutes % 60:02d}m"


def format_dollars(seconds: float | None, per_hour: float | None) -> str:
    """Return what so much time costs, such as $92.40; empty if either is unknown."""
    return "" if seconds is None or per_hour is None else f"${seconds / 3600 * per_hour:,.2f}"


def format_count(count: float | None) -> str:
    """Return a count in three digits: 950, 12.6k, 124M, 37.6B."""
    if count is None:
        return ABSENT
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        # 999,999 is 1.00M, not 1000k.
        if abs(count) >= size * 0.9995:
            return f"{_three_digits(count / size)}{unit}"
    return f"{count:.0f}" if count == round(count) or abs(count) >= 100 else _three_digits(count)


def format_bytes(size: float | None) -> str:
    """Return a size in decimal units: 812 B, 12.6 kB, 9.80 GB."""
    if size is None:
        return ABSENT
    for unit_size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit_size * 0.9995:
            return f"{_three_digits(size / unit_size)} {unit}"
    return f"{size:.0f} B"


def format_value(value: object) -> str:
    """Return a setting or version as text; numbers are grouped by thousands, below a million with up to 6 digits."""
    if isinstance(value, bool) or number(value) is None:
        return text(value) or ABSENT
    assert isinstance(value, int | float)
    if abs(value) < 1e15 and (value == round(value) or abs(value) >= 1e6):
        return f"{value:,.0f}"
    return f"{value:,.6g}".replace("e+", "e")


def format_fraction(value: float | None) -> str:
    """Return a fraction of 1 as a percentage with one decimal."""
    return ABSENT if value is None else f"{100 * value:.1f}%"


def format_time(stamp: str) -> str:
    """Return "2026-11-21 10:15:02 +00:00" for an ISO time, and anything else as it is."""
    return re.sub(r"^(\d{4}-\d\d-\d\d)T(\d\d:\d\d(?::\d\d)?)(?:\.\d+)?(?=([+-]|Z?$))", r"\1 \2 ", stamp).strip()


def join(parts: Iterable[str], last: str = " and ") -> str:
    """Return "a, b and c"."""
    items = list(parts)
    return last.join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def baseline_label(name: str) -> str:
    """Return the words for a baseline of bits per byte: ngram_order2 is "order-2 n-gram"."""
    if match := re.fullmatch(r"ngram_order(\d+)", name):
        return f"order-{match[1]} n-gram"
    return {"untrained": "untrained model"}.get(name, name.replace("_", " "))


def trained_tokens(step: StepReport) -> float | None:
    """Return how many tokens a training step saw, None if its manifest does not tell."""
    if (tokens := step.fact("total_tokens")) is not None:
        return tokens
    batch, iterations = step.fact("tokens_per_iteration"), num_iterations(step)
    return batch * iterations if batch and iterations else None


def num_iterations(step: StepReport) -> int | None:
    """Return how many iterations a training step made or, while it runs, has logged."""
    planned = step.fact("num_iterations")
    logged = max((number(record.get("iteration")) or 0 for record in step.records), default=0)
    count = planned if planned is not None else logged
    return int(count) or None


def num_parameters(step: StepReport) -> float | None:
    """Return the parameters of a checkpoint: as its step derived them, else counted from the weights."""
    derived = step.fact("num_parameters")
    return step.num_parameters if derived is None else derived


def hardware(step: StepReport) -> str:
    """Return a phrase such as "Apple M3 Max (metal, 16 cores)", empty if unknown."""
    device = mapping(step.manifest.get("device"))
    name = text(device.get("name")).replace("unknown", "")
    backend, cores = text(device.get("backend")), number(device.get("cores"))
    details = [backend if backend != name else "", plural(int(cores), "core") if cores else ""]
    inside = ", ".join(detail for detail in details if detail)
    return f"{name} ({inside})" if name and inside else name or inside


def computing_seconds(report: RunReport) -> float | None:
    """Return the wall clock of all steps together, cached ones at what they once took."""
    known = [step.seconds for step in report.steps if step.seconds is not None]
    return sum(known) if known else None


def headline(report: RunReport) -> list[str]:
    """Return one to four sentences: what was trained, on what, how long, and how good it is."""
    sentences = [_pretrain_sentence(s) for s in report.steps if s.stage == "pretrain" and s.manifest]
    later = [s for s in report.steps if _is_training(s) and s.stage != "pretrain" and s.manifest]
    if later:
        opening = "It then went through" if sentences else "The run went through"
        sentences.append(f"{opening} {join(_phase(step) for step in later)}.")
    sentences += _quality(report)
    sentences.append(_effort(report))
    return sentences


def facts(report: RunReport) -> list[tuple[str, str]]:
    """Return (what, value) pairs for the head of the report, those known only."""
    pretrain = next((s for s in report.steps if s.stage == "pretrain" and s.manifest), None)
    scored = _own_scores(report)
    bpb = min((s.bpb for s in scored if s.bpb is not None), default=None)
    chat = max((s.mean_centered for s in scored if s.mean_centered is not None), default=None)
    chatcore = max((s.chatcore for s in scored if s.chatcore is not None), default=None)
    cores = [s.core.value for s in scored if s.core]
    core = max((value for value in cores if value is not None), default=None)
    spent = computing_seconds(report)
    found = [
        ("parameters", format_count(num_parameters(pretrain)) if pretrain else ABSENT),
        ("pretraining tokens", format_count(trained_tokens(pretrain)) if pretrain else ABSENT),
        ("computing time", format_seconds(computing_seconds(report))),
        ("val bpb", f"{bpb:.3f}" if bpb is not None else ABSENT),
        ("CORE", f"{core:.4f}" if core is not None else ABSENT),
        ("ChatCORE", f"{chatcore:.4f}" if chatcore is not None else ABSENT),
        ("mean centred", f"{chat:.3f}" if chat is not None and chatcore is None else ABSENT),
        ("cost", format_dollars(spent, report.cost_per_hour) or ABSENT),
    ]
    return [(what, value) for what, value in found if value != ABSENT]


def _is_training(step: StepReport) -> bool:
    """Tell whether a step trained a model; one from outside is a checkpoint too."""
    return step.kind == "checkpoint" and (step.stage in STAGE_LABELS or bool(step.records))


def _own_scores(report: RunReport) -> list[Scores]:
    """Return the scores of what was trained here; those of outside models if there are no others."""
    scored = [step.scores for step in report.evals if step.scores]
    trained = {step.name for step in report.steps if _is_training(step)}
    return [scores for scores in scored if scores.checkpoint in trained] or scored


def sample_groups(report: RunReport) -> list[tuple[str, str, list[Sample]]]:
    """Return (step, title, samples) per step that has some, long texts cut and prompts not repeated."""
    groups = []
    for step in report.steps:
        if step.samples:
            iteration = step.samples[0].iteration
            title = (
                f"Samples of {checkpoint_name(step)}" if iteration is None else f"Samples at iteration {iteration:,}"
            )
            groups.append((step.name, title, step.samples))
        if step.scores and step.scores.samples:
            groups.append((step.name, f"Samples of {checkpoint_name(step)}", step.scores.samples))
    return [(name, title, [_excerpt(s) for s in samples[:SAMPLES_SHOWN]]) for name, title, samples in groups]


def _excerpt(sample: Sample) -> Sample:
    body = sample.text.removeprefix(sample.prompt).strip("\n")
    return replace(sample, prompt=cut(sample.prompt.strip("\n")), text=cut(body))


def cut(body: str, most: int = SAMPLE_CHARACTERS) -> str:
    """Return a text, or its beginning and how much is left out."""
    rest = len(body) - most
    return body if rest <= 0 else f"{body[:most]} … ({plural(rest, 'character')} more)"


def _pretrain_sentence(step: StepReport) -> str:
    parameters, layers = num_parameters(step), number(step.model.get("num_hidden_layers"))
    size = f"{format_count(parameters)}-parameter model" if parameters else "model"
    depth = f" of {plural(int(layers), 'layer')}" if layers else ""
    tokens = trained_tokens(step)
    data = f" on {format_count(tokens)} tokens" if tokens else ""
    time = f" in {format_seconds(step.seconds)}" if step.seconds is not None else ""
    place = f" on {hardware(step)}" if hardware(step) else ""
    return f"Step {step.name} trained a {size}{depth}{data}{time}{place}."


def _phase(step: StepReport) -> str:
    iterations = num_iterations(step)
    size = plural(iterations, "iteration") if iterations else ""
    details = [size, format_seconds(step.seconds) if step.seconds is not None else ""]
    inside = ", ".join(detail for detail in details if detail)
    return f"{step.name} ({inside})" if inside else step.name


def _quality(report: RunReport) -> Iterable[str]:
    scored = _own_scores(report)
    text = min((s for s in scored if s.bpb is not None), key=lambda s: s.bpb or 0, default=None)
    if text and text.bpb is not None:
        others = ", ".join(f"{baseline_label(name)} {value:.2f}" for name, value in text.baselines.items())
        beside = f" ({others})" if others else ""
        yield f"Held-out text takes {text.bpb:.3f} bits per byte{beside}."
    core = [s for s in scored if s.core and s.core.value is not None]
    if best := max(core, key=lambda s: (s.core and s.core.value) or 0, default=None):
        assert best.core is not None
        error = f" ± {best.core.stderr:.4f}" if best.core.stderr is not None else ""
        yield f"CORE is {best.core.value:.4f}{error}, after {best.checkpoint} (GPT-2 XL, as published: 0.2565)."
    chatcore = max((s for s in scored if s.chatcore is not None), key=lambda s: s.chatcore or 0, default=None)
    if chatcore:
        yield f"The best ChatCORE is {chatcore.chatcore:.4f}, after {chatcore.checkpoint}."
    chat = max((s for s in scored if s.mean_centered is not None), key=lambda s: s.mean_centered or 0, default=None)
    if chat and chat.mean_centered is not None and not chatcore:
        tasks, after = plural(len(chat.tasks), "task"), chat.checkpoint
        yield f"The best mean centred accuracy over {tasks} is {chat.mean_centered:.3f}, after {after}."


def _effort(report: RunReport) -> str:
    steps = plural(len(report.steps), "step")
    cached = sum(step.outcome == "cached" for step in report.steps)
    computing, elapsed = computing_seconds(report), report.seconds
    if computing is None:
        return f"None of the {steps} has a result yet."
    run = f", this run {format_seconds(elapsed)}" if elapsed is not None else ""
    reuse = f"; {cached} of {steps} came from the cache" if cached else ""
    return f"All computing took {format_seconds(computing)}{run}{reuse}."


def troubles(report: RunReport) -> list[str]:
    """Return what the reader must know before trusting the report: faults and gaps."""
    failed = [step for step in report.steps if step.outcome == "failed"]
    lines = [_sentence(f"Step {step.name} failed", step.error) for step in failed]
    # The fault that ended the run is most often that of its last step, told already.
    if report.outcome == "failed" and not failed:
        lines.append(_sentence("This run failed", report.error))
    for outcome, words in (
        ("unfinished", "begun and without a result (running, or stopped)"),
        ("missing", "without a result"),
    ):
        if names := [step.name for step in report.steps if step.outcome == outcome]:
            verb = "is" if len(names) == 1 else "are"
            lines.append(f"{join(names)} {verb} {words}.")
    return lines


def _sentence(claim: str, detail: str) -> str:
    return f"{claim}: {detail.strip().rstrip('.')}." if detail.strip() else f"{claim}."


def _three_digits(value: float) -> str:
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals}f}"
