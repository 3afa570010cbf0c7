"""The model card (README.md) of an export, for the Hugging Face Hub.

Its content comes from manifests and scores, which may hold hostile text: front matter values are JSON strings (valid
YAML), everything else is escaped as in the report.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxchat import __version__
from mlxchat.config.wording import escape, format_count
from mlxchat.errors import visible
from mlxchat.evals.scores import mapping, number
from mlxchat.report.collect import (
    RunReport,
    StepReport,
    checkpoint_name,
    collect_steps,
    entries_of_artifacts,
    sequence,
    text,
)
from mlxchat.report.document import Block, Group, fenced, render_markdown
from mlxchat.report.tables import all_settings, artifact_table, core_table, known, metric_table, source_table
from mlxchat.store.catalog import read_catalog
from mlxchat.store.store import Store

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_DATASET = re.compile(r"hf://datasets/([\w.-]{1,96}/[\w.-]{1,96})(?:/|$)")
_MODEL = re.compile(r"hf://models/([\w.-]{1,96}/[\w.-]{1,96})(?:/|$)")
# Local paths are removed for privacy.
_PLACE = re.compile(r"(?<![\w.:/])~?/(?:[^\s,\[\]{}'\"/]+/)+")
_HOW: dict[str, str] = {
    "hf": """\
    # transformers >= 5 with torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tokenizer = (auto.from_pretrained("FOLDER") for auto in (AutoModelForCausalLM, AutoTokenizer))
    {prompt}
    print(tokenizer.decode(model.generate(ids, max_new_tokens=64)[0]))

    # mlxchat
    mlxchat import hf FOLDER --name NAME""",
    "nanochat": """\
    # nanochat, its code of {snapshot}
    export NANOCHAT_BASE_DIR=~/.cache/nanochat
    mkdir -p $NANOCHAT_BASE_DIR/{source}_checkpoints
    cp -r FOLDER $NANOCHAT_BASE_DIR/{source}_checkpoints/{tag}
    cp -r FOLDER/tokenizer $NANOCHAT_BASE_DIR/
    python -m scripts.{script}

    # mlxchat
    mlxchat import nanochat FOLDER --name NAME""",
    "mlx": """\
    # mlx-lm
    mlx_lm.generate --model FOLDER{trust} --prompt "Why is the sky blue?"
    mlx_lm.server --model FOLDER{trust}""",
    "gguf": """\
    # llama.cpp
    llama-server -m FOLDER/{file} --jinja
    llama-cli -m FOLDER/{file} --jinja -p "Why is the sky blue?"

    # Ollama
    ollama create NAME -f FOLDER/Modelfile
    ollama run NAME""",
    "mlx-adapter": """\
    # mlx-lm; BASE is a folder with the weights below them
    mlx_lm.generate --model BASE{trust} --adapter-path FOLDER --prompt "Why is the sky blue?"
    mlx_lm.fuse --model BASE{trust} --adapter-path FOLDER --save-path WHOLE""",
    "peft": """\
    # peft and transformers >= 5 with torch; BASE is a folder with the weights below them
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("BASE"), "FOLDER")
    tokenizer = AutoTokenizer.from_pretrained("BASE")
    {prompt}
    print(tokenizer.decode(model.generate(input_ids=ids, max_new_tokens=64)[0]))""",
}

# Metric of a measure → the Hub's type and name of the data set and type of the metric; empty: the measure's name.
_HUB_METRICS = {
    "val_bpb": ("text", "held-out text of the corpus", "bits_per_byte"),
    "core": ("core", "CORE", "core"),
    "task": ("", "", "accuracy"),
}
_TOKENS_OF_CHAT = (
    "The chat template adds the special tokens: `<|bos|>` begins a prompt, `<|assistant_end|>` ends an answer."
)
_TEXT_PROMPT = 'ids = tokenizer("<|bos|>The sky is", return_tensors="pt").input_ids'
_CHAT_PROMPT = """messages = [{"role": "user", "content": "Why is the sky blue?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt").input_ids"""
_TOKENS_OF_TEXT = "A text begins with `<|bos|>`. This model continues text; it has not learnt to chat."


def render_card(
    store: Store, place: Path, *, target: str, how: Mapping[str, str], notes: list[str], sha256: str, chats: bool,
    repository: str | None = None, license: str | None = None, language: Sequence[str] = ("en",),
) -> str:  # fmt: skip
    """Return README.md.

    `target` is hf, nanochat, mlx, mlx-adapter or peft; `how` fills the placeholders of its instructions; `notes` are
    the export's changes, as sentences; `sha256` is of the weights; `license` is a Hub identifier, None: not stated.
    """
    lineage = entries_of_artifacts(store.outputs, [place])
    entries = entries_of_artifacts(store.outputs, [place, *_scores_of(store, lineage)])
    report = collect_steps(store.outputs, place.name, entries, place)
    own = next(step for step in report.steps if step.artifact == place.name)
    parts: list[Block] = [
        f"# {escape(place.name)}",
        escape(_what_it_is(own, chats)),
        "\n".join(f"- {escape(note)}" for note in notes),
        "## How to use it",
        f"```\n{textwrap.dedent(_instructions(target, chats, how, repository))}\n```",
        _TOKENS_OF_CHAT if chats else _TOKENS_OF_TEXT,
    ]  # fmt: skip
    is_without_calculator = chats and target in ("hf", "mlx", "mlx-adapter", "gguf")
    if is_without_calculator:
        parts.append(
            "The model writes calls such as `<|python_start|>12+7<|python_end|>` and continues from their result. "
            "mlxchat and nanochat run the calls (`mlxchat serve`); other programs do not, and the answers go wrong."
        )
    if metrics := metric_table(report):
        runs = ", which runs the calculator" if is_without_calculator else ""
        measured = f"Measured by mlxchat{runs}. ± is one standard error; chance is what guessing gets."
        parts += ["## Scores", measured, metrics]
        if core := core_table(report):
            parts += ["### CORE, task by task", core]
    if sources := source_table(report):
        chooses = "The publisher chooses the licence of these weights, within these."
        licence = f"These weights are published under `{license}`." if license else chooses
        parts += ["## Data", f"What it was trained and measured on, with each source's licence. {licence}", sources]
    parts += ["## Lineage", artifact_table(report), "## Configuration"]
    for step in report.steps:
        if step.kind in ("checkpoint", "tokenizer", "corpus") and (settings := all_settings(step)):
            text_of_settings = _PLACE.sub("…/", "\n".join(settings))
            parts.append(Group("fold", [fenced(text_of_settings)], f"{step.name}: settings"))
    made = f"Artifact {own.artifact}, id {own.rid}, exported by mlxchat {__version__}. sha256 of its weights: {sha256}"
    parts += ["## Provenance", escape(made)]
    body = render_markdown([part for part in parts if part])
    return visible(f"{_front_matter(report, own, target, chats, license, language)}\n{body}")


def _front_matter(
    report: RunReport, own: StepReport, target: str, chats: bool, license: str | None, language: Sequence[str]
) -> str:
    """Return the YAML front matter."""
    from huggingface_hub import ModelCardData

    library = {"hf": "transformers", "mlx-adapter": "mlx"}.get(target, target)
    datasets, models = set(), set()
    for step in report.steps:
        for item in map(mapping, sequence(step.manifest.get("externals"))):
            if match := _DATASET.match(text(item.get("url"))):
                datasets.add(match[1])
            elif step.kind == "checkpoint" and (match := _MODEL.match(text(item.get("url")))):
                models.add(match[1])
    results = list(_eval_results(report, own))
    data = ModelCardData(
        library_name=library, language=language[0] if len(language) == 1 else list(language), license=license,
        tags=["nanochat", "mlxchat", *(["conversational"] if chats else []), *({"mlx"} & {library})],
        pipeline_tag="text-generation", datasets=sorted(datasets) or None, base_model=sorted(models) or None,
        model_name=own.artifact if results else None, eval_results=results or None,
    )  # fmt: skip
    return f"---\n{data.to_yaml()}\n---\n"


def _eval_results(report: RunReport, own: StepReport) -> Iterator[EvalResult]:
    """Yield the scores of a checkpoint for the Hub; accuracies are from 0 to 1."""
    from huggingface_hub import EvalResult

    for step in report.evals:
        for measure in step.scores.measures.values() if step.scores and checkpoint_name(step) == own.name else ():
            if known_as := _HUB_METRICS.get(measure.metric):
                kind, title, metric = (word or measure.name for word in known_as)
                yield EvalResult(
                    task_type="text-generation", dataset_type=kind, dataset_name=title, metric_type=metric,
                    metric_value=measure.value,
                )  # fmt: skip


def _scores_of(store: Store, lineage: list[dict[str, Any]]) -> list[Path]:
    """Return the scores of the artifacts in a checkpoint's lineage."""
    rids = {entry["rid"] for entry in lineage if entry["kind"] == "checkpoint"}
    return [
        store.outputs / "store" / summary["folder"]
        for summary in read_catalog(store)
        if summary.get("kind") == "scores" and any(made["rid"] in rids for made in summary["inputs"].values())
    ]


def _what_it_is(step: StepReport, chats: bool) -> str:
    count = known(format_count, number(step.num_parameters))
    layers, context = (step.model.get(key) for key in ("num_hidden_layers", "max_position_embeddings"))
    kind = "answers in conversations" if chats else "continues text"
    return (
        f"A language model of nanochat's architecture that {kind}: {count} parameters, {layers} layers, a context of "
        f"{context} tokens. It was made by the stage {step.stage} of mlxchat."
    )


def _instructions(target: str, chats: bool, how: Mapping[str, str], repository: str | None) -> str:
    """Return how to use it, from the repository if it goes to one; nanochat and adapters are for folders alone."""
    words = _HOW[target].format(**{"prompt": _CHAT_PROMPT if chats else _TEXT_PROMPT, **how})
    if repository is None:
        return words
    if target in ("nanochat", "mlx-adapter"):
        return f"    hf download {repository} --local-dir FOLDER\n\n{words}"
    return words.replace("FOLDER", repository)
