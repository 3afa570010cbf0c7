"""The schema: one dataclass per section, with each field's meaning and unit. Values stand in conf/.

`metadata={"identity": False}` keeps a field out of artifact ids: it may change speed or reporting, never results.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mlxchat.adapter_config import NO_ADAPTER
from mlxchat.adapter_config import AdapterConfig as AdapterConfig
from mlxchat.bench_config import BenchConfig as BenchConfig
from mlxchat.eval_config import CoreConfig as CoreConfig
from mlxchat.eval_config import EvalConfig as EvalConfig
from mlxchat.eval_config import OutsideConfig as OutsideConfig
from mlxchat.execution_config import HooksConfig as HooksConfig
from mlxchat.execution_config import ReportConfig as ReportConfig
from mlxchat.execution_config import RetryConfig as RetryConfig
from mlxchat.import_config import ImportConfig as ImportConfig
from mlxchat.missing import MISSING
from mlxchat.model_config import ArchitectureConfig as ArchitectureConfig
from mlxchat.model_config import ModelConfig as ModelConfig
from mlxchat.optimizer_config import OptimizerConfig as OptimizerConfig
from mlxchat.optimizer_config import ScheduleConfig as ScheduleConfig
from mlxchat.rl_config import RewardConfig as RewardConfig
from mlxchat.rl_config import RLConfig as RLConfig
from mlxchat.sweep_config import SweepConfig as SweepConfig
from mlxchat.task_config import TaskItem as TaskItem
from mlxchat.teacher_config import NO_TEACHER
from mlxchat.teacher_config import TeacherConfig as TeacherConfig
from mlxchat.tokenizer_config import TokenizerConfig as TokenizerConfig


@dataclass(kw_only=True)
class HubConfig:
    """A dataset repository of the Hugging Face Hub."""

    repository: str = MISSING
    """<organisation>/<name>."""
    revision: str = field(
        default=MISSING, metadata={"identity": False, "external": "contents", "by": "mlxchat.data.sources:contents_of"}
    )
    """Commit, tag or branch. The key holds the commit: a plan requests what a tag or a branch means."""
    train_files: str = MISSING
    """Shell pattern of the training files in the repository, all parquet; those that the horizon needs are fetched."""
    num_train_files: int | None = MISSING
    """For experiments: the first so many alone, in order of their names; null: as many as the horizon needs."""
    validation_files: str | None = MISSING
    """Shell pattern of the files held out for validation, never trained on; null: the first
    corpus.validation_documents of the first file."""
    column: str = MISSING
    """Column that holds the text."""


@dataclass(kw_only=True)
class CorpusConfig:
    """Where the pretraining text comes from, and how it is cut into shards."""

    name: str = MISSING
    """What the artifact is called."""
    packages: list[str] = field(default_factory=list, metadata={"external": "package"})
    """Bundled text: names of installed packages that ship it."""
    paths: list[str] = field(default_factory=list, metadata={"external": "file", "identity": False})
    """Local .txt, .jsonl (field `text`) and .parquet (column `text`) files. What is in them counts, not where they
    are."""
    hub: HubConfig | None = None
    """A dataset on the Hub; its files are used as they are, one shard each, and never copied."""
    document_chars: int | None = MISSING
    """Bundled documents are cut at sentence ends into parts of at most so many characters; null: kept whole."""
    validation_documents: int = MISSING
    """Documents held out as the validation shard (of the Hub: only where hub.validation_files is null)."""
    shard_documents: int = MISSING
    """Documents per training shard (bundled and local text)."""
    row_group_documents: int = MISSING
    """Documents per parquet row group."""


@dataclass(kw_only=True)
class BatchConfig:
    """One iteration's tokens."""

    tokens: int | None = MISSING
    """Tokens per iteration, a multiple of row_tokens. null, in pretraining: what optimizer.scaling finds best for the
    model; on conversations: as many as pretraining had."""
    row_tokens: int = MISSING
    """Tokens per row."""


@dataclass(kw_only=True)
class PretrainConfig:
    """Pretraining. Exactly one of the three horizons is set."""

    extend: str | None = field(default=MISSING, metadata={"identity": False, "artifact": "extends"})
    """A finished pretraining to continue under this horizon, which counts from its beginning: a step of the latest
    run, a folder's name in the store, or the start of an id. What it stands for is an input, part of the identity."""
    save_training_state: bool = field(default=MISSING, metadata={"identity": False})
    """Whether the artifact keeps the moments and the position in the data, without which it cannot be extended."""
    num_iterations: int | None = MISSING
    target_flops: float | None = MISSING
    tokens_per_parameter: float | None = MISSING
    """nanochat's param-data ratio; 20 is Chinchilla's."""
    horizon_parameters: str = MISSING
    """Which parameters tokens_per_parameter and the optimizer's scaling count: all, or matrices_and_head."""
    batch: BatchConfig = MISSING
    schedule: ScheduleConfig = MISSING
    packing: str = field(default=MISSING, metadata={"since_default": "best_fit"})
    """best_fit: what is cropped off is dropped, as nanochat does since 2026; best_fit_whole: it waits for another row;
    stream: rows are cut out of one stream of tokens, as nanochat did in 2025."""
    packing_buffer_documents: int = MISSING
    """Documents that best-fit packing chooses from."""
    eval_every: int | None = field(default=MISSING, metadata={"identity": False})
    """Iterations between validations; null: only at the end."""
    eval_tokens: int = MISSING
    """Tokens of each validation, at most: held-out text is read once."""
    keep: str = field(default=MISSING, metadata={"since_default": "last"})
    """Which weights the checkpoint gets: the last, or the best by validation bits per byte. An extension of either
    continues from the last."""
    keep_every: int | None = field(default=MISSING, metadata={"since_default": None})
    """Iterations between candidates of keep=best; null: a twentieth of all."""
    core: CoreConfig | None = field(default=None, metadata={"identity": False})
    """CORE to estimate while training, as eval.core says what it is; null: it is not."""
    core_every: int | None = field(default=MISSING, metadata={"identity": False})
    """Iterations between estimates; null: only at the end."""
    core_max_per_task: int | None = field(default=MISSING, metadata={"identity": False})
    """Examples of each task that an estimate is of, at most; null: as many as core.max_per_task allows."""
    train_bpb_tokens: int | None = field(default=MISSING, metadata={"identity": False})
    """Tokens of training text whose bits per byte are measured at the end; null: they are not."""
    sample_every: int | None = field(default=MISSING, metadata={"identity": False})
    """Iterations between samples; null: only at the end."""
    sample_temperature: float = field(default=MISSING, metadata={"identity": False})
    """0 takes the likeliest token; above, logits are divided by it and one is drawn."""
    sample_top_k: int | None = field(default=MISSING, metadata={"identity": False})
    """Samples are drawn among so many likeliest tokens; null: among all."""
    sample_tokens: int = field(default=MISSING, metadata={"identity": False})
    """Longest sample, in tokens."""
    prompts: list[str] = field(default=MISSING, metadata={"identity": False})
    """Prompts that samples continue."""


@dataclass(kw_only=True)
class FinetuneConfig:
    """Training on conversations: midtrain and sft."""

    mixture: dict[str, TaskItem] = MISSING
    validation: dict[str, TaskItem] = MISSING
    """Conversations held out for the validation loss."""
    num_epochs: int = MISSING
    """Passes over the mixture."""
    num_iterations: int | None = MISSING
    """Stop after so many iterations; null: after num_epochs."""
    train_on: str = MISSING
    """assistant: only the assistant's tokens; all: every token (nanochat's midtraining)."""
    warm_start: bool = field(default=MISSING, metadata={"since_default": False})
    """Whether the optimizer goes on with the moments of the pretraining that the checkpoint comes from."""
    clip_gradients: bool = field(default=MISSING, metadata={"since_default": True})
    """Whether optimizer.grad_clip holds in this stage."""
    batch: BatchConfig = MISSING
    schedule: ScheduleConfig = MISSING
    packing: str = field(default=MISSING, metadata={"since_default": "best_fit"})
    """best_fit, as nanochat since 2026; stream and alone (one in a row), as its midtraining and SFT of 2025."""
    packing_buffer_conversations: int = MISSING
    teacher: TeacherConfig = field(default_factory=TeacherConfig, metadata={"since_default": NO_TEACHER})
    """Whose distributions are learnt besides the conversations' tokens."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig, metadata={"since_default": NO_ADAPTER})
    """Small matrices that are trained in place of the model's; the group `adapter` sets those of all stages."""
    eval_every: int | None = field(default=MISSING, metadata={"identity": False})
    """Iterations between validations; null: only at the end."""
    eval_tokens: int = MISSING
    """Tokens of each validation."""
    suite: dict[str, TaskItem] = field(default=MISSING, metadata={"identity": False})
    """Tasks whose accuracy is looked at while training; empty: none is. Generated answers are greedy."""
    suite_every: int | None = field(default=MISSING, metadata={"identity": False})
    """Iterations between looks at the suite; null: only at the end."""
    suite_max_new_tokens: int = field(default=MISSING, metadata={"identity": False})
    """Longest generated answer."""
    suite_batch_rows: int = field(default=MISSING, metadata={"identity": False})
    """Answers generated at a time."""


@dataclass(kw_only=True)
class MachineConfig:
    """Speed and limits of this machine; no part of any identity."""

    device: str = MISSING
    """auto, cpu or gpu."""
    compute_dtype: str = MISSING
    """auto (bfloat16 on a GPU that has it, else float32), float32 or bfloat16."""
    device_batch_tokens: int | None = MISSING
    """Tokens per micro-batch, at most; the rest of an iteration is accumulated. null: as many as fit and still help."""
    grad_checkpointing: bool = MISSING
    """Whether each layer's activations are computed again for the gradient instead of being kept: less memory."""
    checkpoint_seconds: float = MISSING
    """Seconds between resumable states; 0: every iteration."""
    log_every: int = MISSING
    """Iterations between metrics records."""
    memory_limit_bytes: int | None = MISSING
    """MLX's memory limit; null: its own."""
    cache_limit_bytes: int | None = MISSING
    """Memory MLX may keep for reuse; null: its own."""
    wired_limit_bytes: int | None = MISSING
    """Memory MLX may keep resident on a Mac; null: its own. Elsewhere it has no meaning."""
    training_flops: float | None = MISSING
    """FLOPs per second that training is expected to reach, to predict times until one was measured; null: unknown."""
    max_parallel_steps: int = MISSING
    """Steps at a time; above 1 each runs in a process of its own. A GPU computes one at a time all the same."""
    blas_threads: int | None = MISSING
    """Cores of a matrix product on a Linux CPU; null: all available, shared by the ranks of this machine."""
    num_processes: int = MISSING
    """Processes on this machine that train and evaluate together as ranks; under mlx.launch, which starts them: 1."""


@dataclass(kw_only=True)
class TrainingConfig:
    """What every training does when numbers go wrong.

    No part of any identity: a training in which nothing goes wrong gives the same result under all of it, one that is
    stopped gives none, and one that leaves updates out can only have been told to.
    """

    on_nan: str = field(default=MISSING, metadata={"identity": False})
    """stop: a loss or gradient norm that is NaN or infinite ends the training; skip: its update is left out."""
    max_skipped_in_a_row: int = field(default=MISSING, metadata={"identity": False})
    """Updates that may be left out one after the other before the training ends all the same."""
    norm_warning_factor: float | None = field(default=MISSING, metadata={"identity": False})
    """A gradient norm so many times the median of the last 100 is warned of; null: none is."""


@dataclass(kw_only=True)
class TrackerConfig:
    """Where metrics go besides metrics.jsonl."""

    kind: str = MISSING
    """none, wandb, trackio, tensorboard, or module:Class of your own."""
    project: str = MISSING
    """What the tracker groups runs under."""
    tags: list[str] = MISSING
    """Words to find the run by."""


@dataclass(kw_only=True)
class Config:
    """The whole configuration."""

    name: str = MISSING
    """Name of the run."""
    seed: int = MISSING
    """Of training: initial weights, the order of conversations, dropout, sampled answers."""
    data_seed: int = MISSING
    """Of the data: which text is held out, with it the tokenizer, and the conversations of validation losses. Runs that
    differ in `seed` alone share all of it."""
    outputs: str = MISSING
    """Folder of the store."""
    targets: list[str] | None = MISSING
    """Steps or stages to complete, with what they need; null: the whole pipeline. `stage=NAME` sets it."""
    force: list[str] = MISSING
    """Steps to run although their artifact is there; "all" for every one."""
    code: str = MISSING
    """What a changed module of a stage that is done leads to: warn (a remark), strict (it runs again) or ignore."""
    fail_fast: bool = MISSING
    """Whether a step that fails stops those that do not need it."""
    timeout: dict[str, float] = MISSING
    """Step → seconds after which it saves what it has and fails; the same command continues it."""
    stages: list[str] = MISSING
    """Where own stages are: folders, such as ./my_stages, and modules; besides those of installed packages."""
    pipeline: dict[str, dict[str, Any]] = MISSING
    """Step → {stage, role: step}; or role: import:NAME, a model that was imported under that name, or role:
    artifact:NAME, any model of the store; and with: {setting: value}, for this step alone, of the stage's section."""
    model: ModelConfig = field(default_factory=ModelConfig)
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    midtrain: FinetuneConfig = field(default_factory=FinetuneConfig)
    sft: FinetuneConfig = field(default_factory=FinetuneConfig)
    rl: RLConfig = field(default_factory=RLConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """What midtrain.adapter, sft.adapter and rl.adapter take; no stage reads it itself."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    outside: OutsideConfig = field(default_factory=OutsideConfig)
    imported: ImportConfig = field(default_factory=ImportConfig)
    suite: dict[str, TaskItem] = MISSING
    """Tasks that chat models are evaluated on."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    retry: RetryConfig = field(default_factory=RetryConfig)
    hooks: HooksConfig = field(default_factory=HooksConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
