"""Where documents come from: local files of three kinds, and the Hub, as a server of the folder beside plays it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kit.commands import CommandLine
from mlxchat.data.sources import Corpus, gather_documents, read_file
from mlxchat.errors import DataError

HUB = Path(__file__).resolve().parents[3] / "shared" / "hub"


def read(path: Path) -> list[str]:
    return list(read_file(path))


def jsonl(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


# Local files


def test_a_text_file_is_cut_at_two_empty_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\nstill one\n\n\ntwo é", encoding="utf-8")
    assert read(path) == ["one\n\nstill one", "two é"]


def test_a_jsonl_file_gives_its_text_fields(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", '{"text": "one\\ntwo", "id": 1}', '{"text": "é"}')
    assert read(path) == ["one\ntwo", "é"]


def test_a_jsonl_line_may_hold_unicode_line_separators(tmp_path: Path) -> None:
    """JSON allows U+2028, U+2029 and U+0085 in strings as they are, and text from the web has them."""
    text = "one\u2028two\u2029three\u0085four"
    path = jsonl(tmp_path / "a.jsonl", json.dumps({"text": text}, ensure_ascii=False))
    assert read(path) == [text]


def test_a_parquet_file_gives_its_text_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1, 2, 3], "text": ["one", "two", "é"]}), tmp_path / "a.parquet", row_group_size=2)
    assert read(tmp_path / "a.parquet") == ["one", "two", "é"]


def test_every_bad_line_of_a_jsonl_file_is_listed(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "a.jsonl", '{"text": "good"}', "{", '{"txt": "x"}', '["text"]', "5", '{"text": 5}', '{"text": null}'
    )
    with pytest.raises(DataError, match=r"a\.jsonl: lines 2, 3, 4, 5, 6, 7 are"):
        read(path)


def test_a_jsonl_file_may_begin_with_a_byte_order_mark_and_hold_half_a_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n{"text": "t\\ud800wo"}\n')
    assert read(tmp_path / "a.jsonl") == ["one", "t?wo"]


def test_a_jsonl_line_that_is_nested_too_deeply_is_listed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' + "[" * 100_000)
    with pytest.raises(DataError, match="lines 2 are no JSON objects"):
        read(tmp_path / "a.jsonl")


def test_a_parquet_file_without_the_column_lists_those_it_has(tmp_path: Path) -> None:
    pq.write_table(pa.table({"story": ["x"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match='no column "text"; there are story, id'):
        read(tmp_path / "a.parquet")


def test_a_parquet_column_of_numbers_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet"):
        gather_documents([], [str(tmp_path / "a.parquet")], document_chars=None, seed=0)


def test_empty_cells_of_a_parquet_column_are_left_out(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["one", None, "two"]}), tmp_path / "a.parquet")
    documents, _ = gather_documents([], [str(tmp_path / "a.parquet")], document_chars=None, seed=0)
    assert sorted(documents) == ["one", "two"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_missing_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=name):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xff\xfe\x00 neither text nor parquet")
    with pytest.raises(DataError, match=name):
        read(tmp_path / name)


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected a \.txt, \.jsonl or \.parquet file"):
        read(tmp_path / "a.csv")


@pytest.fixture
def three_files(tmp_path: Path) -> list[str]:
    (tmp_path / "a.txt").write_text("\n\n\n".join(f"text {number}" for number in range(20)))
    jsonl(tmp_path / "b.jsonl", *(json.dumps({"text": f"json {number}"}) for number in range(20)), '{"text": "  "}')
    pq.write_table(pa.table({"text": [f"parquet {number}" for number in range(20)]}), tmp_path / "c.parquet")
    return [str(tmp_path / name) for name in ("a.txt", "b.jsonl", "c.parquet")]


def test_documents_of_all_files_are_gathered_and_blank_ones_left_out(three_files: list[str]) -> None:
    documents, _ = gather_documents([], three_files, document_chars=None, seed=0)
    assert sorted(documents) == sorted(
        f"{kind} {number}" for kind in ("text", "json", "parquet") for number in range(20)
    )


def test_a_seed_decides_the_order(three_files: list[str]) -> None:
    first, same, other = (gather_documents([], three_files, document_chars=None, seed=seed)[0] for seed in (1, 1, 2))
    assert first == same
    assert first != other
    assert first != sorted(first)


def test_each_file_is_recorded_with_its_digest(three_files: list[str]) -> None:
    _, sources = gather_documents([], three_files, document_chars=None, seed=0)
    for path, source in zip(map(Path, three_files), sources, strict=True):
        assert source["name"] == path.name
        assert hashlib.sha256(path.read_bytes()).hexdigest() in source["sha256"]


def test_nothing_at_all_is_refused() -> None:
    with pytest.raises(DataError, match="corpus is empty"):
        gather_documents([], [], document_chars=None, seed=0)


def test_files_with_blank_text_only_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n\n\n \n")
    with pytest.raises(DataError, match="corpus is empty"):
        gather_documents([], [str(tmp_path / "a.txt")], document_chars=None, seed=0)


# The Hub of the folder beside, where there is one: real data and stand-ins of it


@pytest.fixture
def make_corpus_stage(mlxchat: CommandLine, tmp_path: Path) -> CommandLine:
    def run(endpoint: str, *overrides: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run the corpus stage in a process of its own against a Hub at `endpoint`."""
        environ = {
            "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "MLXCHAT_CACHE": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1,localhost", **environ,
        }  # fmt: skip
        return mlxchat("stage=corpus", f"outputs={tmp_path / 'outputs'}", *overrides, environ=environ)

    return run


@pytest.fixture
def start_hub() -> Iterator[Callable[..., str]]:
    if not HUB.exists():
        pytest.skip("there is no Hub to play")
    servers: list[subprocess.Popen[str]] = []

    def start(*options: str) -> str:
        command = [sys.executable, str(HUB / "serve.py"), "--root", str(HUB / "root"), "--port", "0", *options]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        servers.append(server)
        assert server.stdout is not None
        return server.stdout.readline().split()[-1]

    yield start
    for server in servers:
        server.terminate()
        server.communicate(timeout=10)


def artifact(folder: Path) -> Path:
    (found,) = [path.parent for path in (folder / "outputs" / "store").glob("*/corpus.json")]
    return found


def texts(path: Path) -> list[str]:
    return [str(text) for text in pq.read_table(path)["text"].to_pylist()]


@pytest.fixture
def use_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read in this process from the caches that the stage filled, and from no network."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("MLXCHAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.slow
def test_tinystories_come_from_the_hub(
    tmp_path: Path, start_hub: Callable[..., str], make_corpus_stage: CommandLine, use_caches: None
) -> None:
    done = make_corpus_stage(start_hub(), "corpus=tinystories")
    assert done.returncode == 0, done.stderr
    folder, source = artifact(tmp_path), HUB / "root/datasets/roneneldan/TinyStories/data"
    assert list(Corpus.open(folder).documents("train")) == texts(source / "train-00000-of-00001.parquet")
    assert list(Corpus.open(folder).documents("validation")) == texts(source / "validation-00000-of-00001.parquet")


@pytest.mark.parametrize("corpus", ["fineweb_edu", "climbmix"])
def test_nanochats_corpora_keep_their_order_and_their_validation_file(
    tmp_path: Path, start_hub: Callable[..., str], make_corpus_stage: CommandLine, use_caches: None, corpus: str
) -> None:
    changed = ["corpus.hub.validation_files=shard_00005.parquet"] if corpus == "fineweb_edu" else []
    done = make_corpus_stage(start_hub("--redirect"), f"corpus={corpus}", *changed)
    assert done.returncode == 0, done.stderr
    held_out = "shard_00005.parquet" if corpus == "fineweb_edu" else "shard_06542.parquet"
    (source,) = (HUB / "root/datasets/karpathy").glob(f"{corpus.replace('_', '-')}*")
    folder = artifact(tmp_path)
    names = sorted(path.name for path in source.glob("*.parquet") if path.name != held_out)
    assert [shard.name for shard in Corpus.open(folder).train] == names
    assert next(Corpus.open(folder).documents("train")) == texts(source / names[0])[0]
    assert list(Corpus.open(folder).documents("validation")) == texts(source / held_out)
    externals = json.loads((folder / "manifest.json").read_text())["externals"]
    assert {each["revision"] for each in externals} == {"5ca1ab1e0ddba11c0ffee5eed5ca1ab1e0ddba11"}


FAULTS = {
    "the first answers are errors": ["--fail-first", "4"],
    "every file is cut": ["--truncate", "*.parquet", "--redirect"],
    "every file is cut again and again": ["--truncate", "*.parquet", "--times", "0"],
    "every file is corrupted once": ["--corrupt", "*.parquet"],
    "answers are slow": ["--latency-ms", "200"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_hub_that_misbehaves_gives_the_same_artifact(
    tmp_path: Path, start_hub: Callable[..., str], make_corpus_stage: CommandLine, use_caches: None, name: str
) -> None:
    done = make_corpus_stage(start_hub(*FAULTS[name]), "corpus=tinystories", "retry.seconds=0.1")
    assert done.returncode == 0, done.stderr
    source = HUB / "root/datasets/roneneldan/TinyStories/data"
    assert list(Corpus.open(artifact(tmp_path)).documents("train")) == texts(source / "train-00000-of-00001.parquet")


REFUSALS = {
    "a pattern that no file matches": (["corpus.hub.train_files=nothing-*"], "has 0 files like nothing-*"),
    "a dataset that is not there": (["corpus.hub.repository=nobody/nothing"], "nobody/nothing"),
    "a column that is not there": (["corpus.hub.column=story"], 'no column "story"'),
    "a revision that is not there": (["corpus.hub.revision=v9"], "v9"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSALS)
def test_what_the_hub_does_not_have_is_refused_in_one_message(
    start_hub: Callable[..., str], make_corpus_stage: CommandLine, name: str
) -> None:
    overrides, message = REFUSALS[name]
    done = make_corpus_stage(start_hub(), "corpus=tinystories", *overrides)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_file_that_is_always_corrupted_is_refused_in_one_message(
    tmp_path: Path, start_hub: Callable[..., str], make_corpus_stage: CommandLine
) -> None:
    done = make_corpus_stage(start_hub("--corrupt", "train-*", "--times", "0"), "corpus=tinystories")
    assert done.returncode == 2
    assert "train-00000-of-00001.parquet is not what it should be" in done.stderr
    assert not list((tmp_path / "outputs" / "store").glob("*/corpus.json"))


def test_a_cold_cache_without_a_network_says_what_to_type(make_corpus_stage: CommandLine) -> None:
    done = make_corpus_stage("http://127.0.0.1:9", "corpus=tinystories", HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert "roneneldan/TinyStories" in done.stderr
    assert "mlxchat data fetch stage=corpus" in done.stderr
    assert "Traceback" not in done.stderr
