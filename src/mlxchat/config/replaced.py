"""What replaces settings and verbs of version 0.2 that are gone: told when one is typed, and in CHANGELOG.

This is for version 0.3 only.
"""

from fnmatch import fnmatchcase

_CONSTANT = "a constant now, nanochat's"

# Settings, patterns among them → what replaces them.
SETTINGS = {
    "code": "changed code is named; `force=[STEP]` runs a step again",
    "hooks hooks.*": "a shell notifies: `mlxchat … || notify-send failed`",
    "retry retry.*": "downloads retry by themselves; the same command resumes a failed run",
    "timeout timeout.*": "`timeout 1h mlxchat …` saves and stops",
    "machine.max_parallel_steps": "local steps run one after the other, those with an executor side by side",
    "machine.num_processes": "`mlx.launch -n N mlxchat …` starts ranks",
    "machine.cache_limit_bytes machine.wired_limit_bytes": "follow from `machine.memory_limit_bytes`",
    "machine.log_every": "every iteration is recorded",
    "optimizer.momentum_start optimizer.momentum_end optimizer.momentum_final optimizer.momentum_warmup_iterations": (
        "`optimizer.momentum.start`, `end`, `final`, `warmup_iterations`"
    ),
    "optimizer.scaling.max_weight_decay": "`optimizer.max_weight_decay`",
    "optimizer.scaling.*": "`optimizer.scaling` is true or false; the rest are nanochat's constants",
    "optimizer.adam_epsilon optimizer.muon_beta2 optimizer.newton_schulz_iterations": _CONSTANT,
    "optimizer.reference_width": _CONSTANT,
    "*adapter.beta1 *adapter.beta2 *adapter.weight_decay *adapter.width_exponent": _CONSTANT,
    "*.packing_buffer_documents *.packing_buffer_conversations corpus.row_group_documents": _CONSTANT,
    "bench.vocab_size": "`tokenizer.vocab_size`",
    "bench.row_tokens": "`model.context_tokens`",
    "bench.bundle bench.chars bench.core_examples bench.core_tasks bench.kv_bits bench.split bench.warmup_steps": (
        "`bench train` and `bench generate` are left"
    ),
    "executor.account executor.qos executor.constraint": "`executor.options={account: NAME}`",
    "imported.optimizer": "training of an import starts with new moments",
    "midtrain.context_tokens sft.context_tokens": "a model keeps the context of its pretraining",
    "*.teacher.top_k": "all tokens of the teacher are matched",
    "midtrain.suite_batch_rows sft.suite_batch_rows": "`eval.batch_rows`",
    "midtrain.suite_max_new_tokens sft.suite_max_new_tokens": "`eval.max_new_tokens`",
    "rl.eval_max_new_tokens": "`rl.max_new_tokens`",
    "rl.system_prompt": "a question's own system message counts",
    "pretrain.keep rl.keep rl.keep_every": "`save_every` publishes models of earlier iterations with their validation",
    "pretrain.target_core": "`pretrain.target_bpb`",
    "pretrain.core_max_per_task": "`pretrain.core.max_per_task`",
    "pretrain.sample_temperature pretrain.sample_top_k": "samples during pretraining are greedy",
    "pretrain.train_bpb_tokens": "the curve of the training loss",
    "training.norm_warning_factor": "the curve `grad_norm` shows large gradients",
    "training.max_skipped_in_a_row": "20 skipped updates in a row end a training",
    "rl.entropy_every rl.rollouts_kept": "a constant now; entropy is measured every 5 rollouts",
    "sweep.job": "`executor=KIND` submits each step of a sweep",
    "sweep.first_rung sweep.factor": "halving compares after 1, 3, 9, … iterations and continues the best third",
}

VERBS = {
    "explain": "`mlxchat --cfg job -p SECTION` prints values, the settings page what they mean",
    "fuse": "`mlxchat export ID --to mlx|hf|nanochat PATH` merges adapters; the stage `fused` does so in a pipeline",
    "graph": "`mlxchat plan --graph ascii|mermaid`",
    "leaderboard": "`mlxchat compare --sort pretrain.seconds_to_target`",
    "samples": "`mlxchat show ID --samples`",
    "data ls": "`hf cache ls`",
    "data rm": "`hf cache rm`",
}


def find_replacement(name: str) -> str:
    """Return what replaces a setting or a verb that is gone, as the end of a message; "": it never was."""
    found = VERBS.get(name, "")
    for keys, text in SETTINGS.items():
        found = text if any(fnmatchcase(name, key) for key in keys.split()) else found
    return f" It is gone since version 0.3. Instead: {found.replace('`', '')}." if found else ""
