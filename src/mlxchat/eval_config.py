"""The schema of evaluations; `config.py` holds the rest. Values stand in conf/settings/eval.yaml and conf/core/."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlxchat.missing import MISSING


@dataclass(kw_only=True)
class CoreConfig:
    """CORE, the metric of base models."""

    bundle: str = field(
        default=MISSING,
        metadata={"identity": False, "external": "contents", "by": "mlxchat.evals.core_bundle:contents_of"},
    )
    """nanochat's eval_bundle.zip: its address, or a file. Its sha256 is in the key."""
    sha256: str | None = field(default=None, metadata={"identity": False})
    """What the bundle must be; null: whatever is there when it is first fetched."""
    max_per_task: int | None = None
    """Examples of each task, at most; null: all, of which CORE is made."""
    tasks: list[str] | None = None
    """Labels of the tasks to compute; null: all, or there is no CORE."""
    long_prompts: str = field(default="extend", metadata={"since_default": "extend"})
    """Prompts longer than the model's context: extend (nanochat's rule: computed beyond it) or cut (their beginning is
    left out). Third-party models always cut."""


@dataclass(kw_only=True)
class EvalConfig:
    """Evaluation of a checkpoint."""

    bpb_tokens: int = MISSING
    """Validation tokens for bits per byte, at most: held-out text is read once."""
    core: CoreConfig | None = field(default=None, metadata={"since_default": None})
    """CORE for base models; null: not computed. Set by the core group."""
    max_new_tokens: int = MISSING
    """Longest generated answer."""
    seeds: int = field(default=MISSING, metadata={"since_default": 1})
    """How often each generated answer is sampled; multiple choice draws nothing. Scores are means over all of them."""
    temperature: float | None = field(default=MISSING, metadata={"since_default": None})
    """Of generated answers, and of a base model's samples; 0 is greedy. null: 0 with one seed, 1 with several."""
    top_k: int | None = field(default=MISSING, metadata={"since_default": None})
    """Sampled answers draw among the k most likely tokens; null: all."""
    own: dict[str, str] = field(default_factory=dict, metadata={"external": "code", "since_default": {}})
    """Evaluations of your own: name → module:function, called with the engine; returns a number, which is recorded
    under the name. All code of your own that it uses is part of the identity."""
    batch_rows: int = field(default=MISSING, metadata={"identity": False})
    """Questions answered at a time."""
    prompts: list[str] = field(default=MISSING, metadata={"identity": False})
    """Questions, or beginnings for a base model, whose answers the report shows. A change reruns nothing: it applies
    from the next evaluation on."""


@dataclass(kw_only=True)
class OutsideConfig:
    """A model of another make, evaluated like ours (pipeline=outside)."""

    name: str = MISSING
    """What tables and the artifact call it."""
    path: str | None = field(default=MISSING, metadata={"external": "folder", "identity": False})
    """A folder that mlx-lm opens: config.json, safetensors, a tokenizer. What is in it counts, not where it lies."""
    context_tokens: int | None = MISSING
    """Longest input; null: what its config.json says, up to 2048 tokens."""
    chat: bool | None = MISSING
    """Whether it answers the suite's tasks; null: if its tokenizer has a chat template."""
