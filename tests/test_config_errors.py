"""Mistakes in settings are refused before anything runs, with a hint and exit code 2, settings of 0.2 too."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from kit.commands import Say, run_here
from mlxchat.composition.compose import compose_config
from mlxchat.composition.overrides import known_keys
from mlxchat.config.replaced import SETTINGS, VERBS, find_replacement
from mlxchat.config.schema import Config
from mlxchat.config.verbs import VERBS as PRESENT

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
        "+model.dept=3": r'"model\.dept" .*"model\.depth"\?$',
        "model=20": r'model has no option "20": .*"d20"\?$',
    },
    "misspelt names": {
        "sft.mixture.kinds_mc.task=everday": r'task is "everday".*"everyday"\?$',
        "midtrain.mixture.kinds_mc.options.sede=1": r'no option "sede".*"seed"\?$',
        "optimizer.kind=moun": r'is "moun".*"muon"\?$',
        "sft.schedule.shape=cosin": r'sft\.schedule\.shape is "cosin", expected one of linear, cosine.*"cosine"\?$',
        "pipeline.rl.checkpoint=stf": r'checkpoint is "stf", which is not a step .*"sft"\?',
    },
    "impossible values": {
        "model.num_kv_heads=7": r"model\.num_kv_heads=7 must divide the 4 heads",
        "tokenizer.vocab_size=264": r"tokenizer\.vocab_size is 264, expected at least 265",
        "pretrain.target_flops=1e12": r"exactly one of .*given: .*target_flops=1e\+12",
        "midtrain.batch.row_tokens=4096": r"row_tokens=4096 is longer than model\.context_tokens=\d+",
        "sft.mixture.kinds_mc.split=test": r"sft\.mixture\.kinds_mc\.split is test: .*never trained on",
        "rl.schedule.warmup_frac=0.5": r"rl\.schedule: warmup_frac and warmdown_frac together are more than 1",
        "rl.samples_per_question=1": r"rl\.samples_per_question is 1, expected at least 2",
        "rl.rollout_bits=3": r"rl\.rollout_bits is 3, expected one of 8, 4, null",
        "optimizer.grad_clip=nan": r"optimizer\.grad_clip is nan",
        "adapter.rank=8": r"there is no adapter\. Choose adapter=lora",
    },
    "files and sources": {
        "corpus=fineweb_edu": "",
        "corpus.paths=[a.pdf]": r"a\.pdf must be a folder or end in \.txt, \.jsonl, \.parquet",
        "corpus.packages=[python-docs]": r"corpus\.hub cannot be mixed",
        "pretrain.batch.tokens=null": r"pretrain\.batch\.tokens is null, but optimizer\.scaling",
        "midtrain.mixture.kinds_mc.task=jsonl": "",
        "midtrain.mixture.kinds_mc.path=/no/such.jsonl": r"no file /no/such\.jsonl",
    },
}  # fmt: skip


@pytest.mark.parametrize("mistakes", TOGETHER.values(), ids=TOGETHER)
def test_all_mistakes_are_reported_at_once(mistakes, refuse):
    lines = refuse(*mistakes).removeprefix("error: ").splitlines()
    if "pipeline.rl.checkpoint=stf" in mistakes:  # steps are checked after values
        lines += refuse("pipeline.rl.checkpoint=stf").splitlines()
    missing = [override for override, expected in mistakes.items() if not any(re.search(expected, x) for x in lines)]
    assert missing == [], "\n".join(lines)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model=d65"], r'model has no option "d65": d1 … d64'),
        (["~pipeline.midtrian"], r'"pipeline\.midtrian" to remove.* --cfg job -p pipeline'),
        (["pretrain.num_iterations=abc"], r"pretrain\.num_iterations: Value 'abc' .*Integer"),
        (["seeed=1"], r'there is no "seeed" to set\. Did you mean "seed"\?$'),
        (["+seeed=1"], r'there is no "seeed" to set\. Did you mean "seed"\?$'),
        (["model=d4,d6"], r"model=d4,d6.*add -m"),
        (["stage=sfft"], r'sfft.*"sft"\?$'),
        (["+pipeline.sft.checkpont=pretrain"], r'checkpont.*"[\w.]*checkpoint"\?$'),
        (["model.head_width=33"], r"model\.head_width is 33, expected an even number"),
        (["eval.core.max_per_task=5"], r"eval\.core is null.*core=nanochat sets it"),
        (["~pipeline.sft"], r"Leave rl out with '~pipeline\.rl', or rewire it: pipeline\.rl\.checkpoint=midtrain"),
        (["~sft"], r"sft cannot be removed, only changed; '~pipeline\.STEP' leaves a step out"),
        (["sft"], r'"sft" is not a setting: expected key=value'),
        (["--config-dir", "/no/such"], r'there is no folder "/no/such"'),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_impossible_choices_are_refused(overrides, expected, refuse):
    assert re.search(expected, refuse(*overrides), re.M)


GLOBAL = "# @package _global_\n"
# Faults of YAML files: the file's text and what the message says after its path.
FAULTS = {
    "experiment": [
        (GLOBAL + "sft:\n  num_epochs: [1\n  train_on: all\n", r":4: expected ',' or '\]'"),
        ("defaults: [quickstart, _self_]\nseed: 3\n", r': the first line must be "# @package _global_"'),
        (GLOBAL + "sft:\n  num_epoch: 2\n", r': there is no "sft.num_epoch" to set. Did you mean "sft.num_epochs"\?'),
        (GLOBAL + "defaults:\n  - rl: dapo\n", ": another group is chosen with `override /rl: dapo`"),
    ],
    "mixture": [("mine:\n  size: many\n", ": sft.mixture.mine.size: Value 'many' .* Integer")],
}


@pytest.mark.parametrize(("group", "fault"), [(group, fault) for group, faults in FAULTS.items() for fault in faults])
def test_fault_of_a_yaml_file_is_shown_with_the_file(group, fault, refuse, tmp_path):
    text, expected = fault
    file = tmp_path / group / "me.yaml"
    file.parent.mkdir()
    file.write_text(text)
    place = "mixture@sft.mixture" if group == "mixture" else group
    message = refuse("--config-dir", str(tmp_path), f"{place}=me")
    assert re.match(rf"error: {re.escape(str(file))}{expected}", message), message


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


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["optimizer.momentum_end=0.9"], "Instead: optimizer.momentum.start, end, final, warmup_iterations."),
        (["retry.attempts=3"], "Instead: downloads retry by themselves"),
        (["code=ignore", "plan"], "Instead: changed code is named"),
        (["sft.adapter.beta1=0.3"], "Instead: a constant now"),
        (["leaderboard"], "Instead: mlxchat compare --sort"),
        (["data", "ls"], "Instead: hf cache ls."),
    ],
)
def test_what_is_gone_is_told_with_its_replacement(say: Say, words: list[str], told: str):
    printed = say(*words, code=2)
    assert "gone since version 0.3" in printed
    assert told in printed


def test_only_what_is_gone_is_called_so():
    assert not [key for key in known_keys(Config) if find_replacement(key)]
    assert not [verb for verb in PRESENT if find_replacement(verb)]
    assert not find_replacement("optimizer.matrx_lr")


def test_changelog_has_the_table():
    rows = [f"| {', '.join(f'`{key}`' for key in keys.split())} | {text} |" for keys, text in SETTINGS.items()]
    rows += [f"| verb `{verb}` | {text} |" for verb, text in VERBS.items()]
    table = "\n".join(["| gone | instead |", "|---|---|", *rows])
    assert table in Path(__file__).parents[1].joinpath("CHANGELOG.md").read_text(encoding="utf-8")
    assert len(rows) > 40
