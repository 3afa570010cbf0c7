"""experiment=mac_evening in miniature, with data of its kinds from a loopback hub: text in, a model to talk to out."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kit.text import parquet

SMALL = """
    machine=cpu machine.blas_threads=1 model=d2 model.aspect_ratio=16 model.head_width=16 model.context_tokens=128
    tokenizer.vocab_size=320 tokenizer.max_chars=20000 pretrain.num_iterations=4 pretrain.batch.tokens=512
    pretrain.eval_tokens=256 pretrain.sample_tokens=2 pretrain.packing_buffer_documents=20
    sft.num_iterations=2 sft.batch.tokens=512 sft.eval_tokens=256 eval.bpb_tokens=256 eval.max_new_tokens=4
    ~suite.humaneval
"""


def rows(items: list[dict[str, Any]], folder: Path) -> bytes:
    pq.write_table(pa.Table.from_pylist(items), folder / "rows.parquet")
    return (folder / "rows.parquet").read_bytes()


def fill(hub: Any, folder: Path) -> Path:
    """Offer a little of each data set; return a bundle of CORE with one task."""
    texts = [f"Number {n} is a number. It comes after {n - 1} and before {n + 1}. " * 3 for n in range(400)]
    hub.add(
        "karpathy/climbmix-400b-shuffle",
        {"shard_00000.parquet": parquet(texts[40:]), "shard_06542.parquet": parquet(texts[:40])},
    )
    talk = [{"role": "user", "content": "What comes after 3?"}, {"role": "assistant", "content": "4 comes after 3."}]
    talks = rows([{"messages": talk}] * 60, folder)
    hub.add(
        "HuggingFaceTB/smol-smoltalk",
        {"data/train-00000-of-00001.parquet": talks, "data/test-00000-of-00001.parquet": talks},
    )
    asked = [{"question": "What is 3?", "subject": "s", "choices": list("abcd"), "answer": 1}] * 20
    hub.add(
        "cais/mmlu",
        {f"all/{split}-00000-of-00001.parquet": rows(asked, folder) for split in ("auxiliary_train", "test")},
    )
    sums = [{"question": f"{n}+1?", "answer": f"It is <<{n}+1={n + 1}>>{n + 1}.\n#### {n + 1}"} for n in range(20)]
    hub.add("openai/gsm8k", {f"main/{split}-00000-of-00001.parquet": rows(sums, folder) for split in ("train", "test")})
    choices = {"text": ["one", "two"], "label": ["A", "B"]}
    science = rows([{"question": "Which is 2?", "choices": choices, "answerKey": "B"}] * 10, folder)
    hub.add("allenai/ai2_arc", {f"ARC-{kind}/test-00000-of-00001.parquet": science for kind in ("Easy", "Challenge")})
    items = [{"query": "Which is 2?", "choices": ["one", "two"], "gold": 1}] * 20
    task = {"label": "copa", "icl_task_type": "multiple_choice", "num_fewshot": [0], "dataset_uri": "copa.jsonl"}
    with zipfile.ZipFile(folder / "bundle.zip", "w") as bundle:
        bundle.writestr("core.yaml", json.dumps({"icl_tasks": [task]}))
        bundle.writestr("eval_meta_data.csv", "Eval Task,Random baseline\ncopa,50\n")
        bundle.writestr("eval_data/copa.jsonl", "".join(json.dumps(each) + "\n" for each in items))
    return folder / "bundle.zip"


@pytest.mark.slow
def test_it_ends_with_scores_and_a_model_to_talk_to(hub, tmp_path, say):
    bundle, outputs = fill(hub, tmp_path), tmp_path / "outputs"
    command = ["experiment=mac_evening", *SMALL.split(), f"eval.core.bundle={bundle}", f"outputs={outputs}"]
    say(*command)
    steps = {link.name for link in (outputs / "refs" / "latest").iterdir()}
    assert steps == {"corpus", "tokenizer", "pretrain", "sft", "eval_base", "eval_sft"}
    base, chat = (json.loads((outputs / "refs" / "latest" / f"eval_{name}" / "scores.json").read_text())
                  for name in ("base", "sft"))  # fmt: skip
    assert base["bpb"]["val"] > 0
    assert base["core"]["tasks"]["copa"]["num_examples"] == 16
    assert set(chat["tasks"]) == {"arc_easy", "arc_challenge", "mmlu", "gsm8k"}
    assert say("chat", "-p", "What comes after 3?", "--max-tokens", "4", f"outputs={outputs}")
    assert "6 done" in say(*command)
