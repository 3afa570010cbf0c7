"""Tasks with downloaded data: from a data set of the Hugging Face Hub, or from an address.

Nothing is downloaded before the first conversation is needed. Rows of the Hub stay in memory-mapped Arrow tables. The
second half has the data sets that nanochat trains on and evaluates with, counterparts of its tasks/*.py. To add one: a
class here with its repository, subsets, splits and columns, and an entry in `tasks/__init__.py`.
"""

from __future__ import annotations

import random
import re
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mlxchat.config.pins import UNKNOWN
from mlxchat.errors import ConfigError, DataError, StepFailed
from mlxchat.hub import client
from mlxchat.hub.cache import HubFile, cache_folder
from mlxchat.tasks.base import (
    LETTERS,
    Conversation,
    Task,
    calculator_parts,
    choice_dialogue,
    dialogue,
    final_number,
    is_right_by_nanochat,
)

if TYPE_CHECKING:
    import pyarrow as pa


NANOCHAT_SEED = 42  # nanochat shuffles every data set with it


@dataclass(frozen=True)
class UrlSource:
    """A file at an address."""

    url: str
    sha256: str | None = None

    def fetch(self, check: Callable[[], None] = lambda: None) -> list[Path]:
        """Download the file if it is missing, and return its path."""
        return [client.fetch_url(self.url, sha256=self.sha256, check=check)]

    def content(self) -> str:
        """Return the file's sha256, for the step's key."""
        return client.find_content(self.url, self.sha256) or f"{UNKNOWN}{self.url}"

    def records(self) -> list[dict[str, Any]]:
        """Return a record of the file: url, sha256, bytes."""
        return [{"name": self.url.rpartition("/")[2], **client.record(path)} for path in self.fetch()]


@dataclass(frozen=True)
class HubSource:
    """The files of a Hub repository that match a pattern."""

    repository: str
    revision: str
    pattern: str

    @cached_property
    def files(self) -> list[HubFile]:
        """The matching files; raises DataError if none match."""
        files = client.list_files(self.repository, revision=self.revision, pattern=self.pattern)
        if not files:
            raise DataError(f"{self.repository} at {self.revision} has no file {self.pattern}")
        return files

    def fetch(self, check: Callable[[], None] = lambda: None) -> list[Path]:
        """Download missing files, and return the paths of all."""
        return client.fetch_files(self.files, check=check)

    def content(self) -> str:
        """Return the repository, pattern and commit, for the step's key."""
        commit = client.find_commit(self.repository, self.revision)
        if commit is None:
            return f"{UNKNOWN}{self.repository} at {self.revision}"
        return f"{self.repository}/{self.pattern} at {commit}"

    def records(self) -> list[dict[str, Any]]:
        """Return a record of each file: url, revision, sha256, bytes."""
        return [{"name": f"{file.repository}/{file.path}", **client.record(file)} for file in self.files]


@dataclass(eq=False, kw_only=True)
class UrlTask(Task):
    """A task that reads one file: `path`, or the address in the first of `source_options`."""

    sha256: str | None = None
    """Required hash of the file at the address; None: any contents."""
    path: str | Path | None = None
    """A local file instead of the address."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for source in self.needs():
            if not source.url.startswith(("http://", "https://")):
                fault = f'{self.source_options[0]} of task {self.name} is "{source.url}", expected an address'
                raise ConfigError(f"{fault} (http://, https://). For a local file, set the task's option path=FILE.")

    def needs(self) -> list[UrlSource]:
        """Return the address as a source, unless the task reads a local file."""
        return [] if self.path is not None else [UrlSource(getattr(self, self.source_options[0]), self.sha256)]

    def _file(self) -> Path:
        return Path(self.path) if self.path is not None else self.fetch()[0]


@dataclass(eq=False, kw_only=True)
class HubTask(Task):
    """A task whose rows are in parquet files of the Hub, in the order of nanochat's shuffle."""

    home: ClassVar[str]
    """The default repository, which nanochat reads."""
    subsets: ClassVar[tuple[str, ...]]
    """Readable configurations of the data set; the first is the default."""
    columns: ClassVar[tuple[str, ...]]
    source_options: ClassVar[tuple[str, ...]] = ("repository", "revision", "subset")
    repeats = False
    seed: int = NANOCHAT_SEED
    """Seed of the shuffle."""
    repository: str | None = None
    """A copy to read instead of `home`, with the same columns and file names."""
    revision: str = "main"
    """Commit, tag or branch."""
    subset: str | None = None
    """One of `subsets`; None: the first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.subset is None:
            self.subset = self.subsets[0]
        self._check_choice("subset", self.subset, self.subsets)
        self._source = HubSource(self.repository or self.home, self.revision, self.pattern())

    def pattern(self) -> str:
        """Return the shell pattern of the split's files; raises ConfigError if the subset has no such split."""
        return f"{self.subset}/{self.split}-*.parquet"

    def needs(self) -> list[HubSource]:
        """Return the repository's files as a source."""
        return [self._source]

    @cached_property
    def rows(self) -> Rows:
        """All rows in the shuffled order, before `start`, `stop` and `step`."""
        return Rows(self.fetch(), self.columns, seed=self.seed)

    @abstractmethod
    def _conversation_of(self, row: dict[str, Any]) -> Conversation:
        """Return the conversation of a row (column → value)."""

    def _conversation(self, index: int, rng: random.Random) -> Conversation:
        return self._conversation_of(self.rows[index])

    def _own_size(self) -> int:
        return len(self.rows)


class Rows:
    """The rows of parquet files, permuted as by `datasets.Dataset.shuffle(seed)`; memory-mapped: they may be GB."""

    def __init__(self, files: Sequence[Path], columns: Sequence[str], *, seed: int) -> None:
        import numpy as np

        self._table = _read_parquet(files, list(columns))
        self.order = np.random.default_rng(seed).permutation(self._table.num_rows).tolist()

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = self.order[index]
        return {name: self._table.column(name)[number].as_py() for name in self._table.column_names}


def _read_parquet(files: Sequence[Path], columns: list[str]) -> pa.Table:
    """Return columns of files as one table, memory-mapped from an unlinked temporary file."""
    import pyarrow as pa  # not at module level: planning imports tasks but reads no rows
    import pyarrow.parquet as pq

    cache_folder().mkdir(parents=True, exist_ok=True)
    writer: Any = None
    with tempfile.NamedTemporaryFile(suffix=".arrow", dir=cache_folder()) as target:
        for path in files:
            try:
                source = pq.ParquetFile(path)
                # By row groups, since iter_batches reads ahead hundreds of megabytes.
                for table in map(source.read_row_group, range(source.num_row_groups)):
                    if table.num_columns == 1 and pa.types.is_struct(table.schema.types[0]):
                        table = pa.Table.from_struct_array(table.column(0))  # as in MMLU's auxiliary_train
                    table = table.select(columns)
                    if writer is None:
                        schema = table.schema
                        writer = pa.ipc.new_file(target.name, schema)
                    writer.write_table(table.cast(schema))
            except (OSError, KeyError, pa.ArrowException) as error:
                has = f"the columns {', '.join(columns)}"
                raise DataError(f"{path}: cannot be read as parquet with {has} ({error})") from None
        writer.close()
        return pa.ipc.open_file(pa.memory_map(target.name)).read_all()


# nanochat's data sets


class SmolTalk(HubTask):
    """460 thousand general conversations to train on, some with a system message; verdicts require the exact answer."""

    name = "smoltalk"
    home = "HuggingFaceTB/smol-smoltalk"
    subsets = ("data",)
    columns = ("messages",)

    def _conversation_of(self, row: dict[str, Any]) -> Conversation:
        return {"messages": row["messages"]}


class MMLU(HubTask):
    """Questions of 57 subjects with four choices; the answer is a letter. Both subsets have a split auxiliary_train."""

    name = "mmlu"
    kind = "categorical"
    chance = 1 / len(LETTERS)
    home = "cais/mmlu"
    splits = ("auxiliary_train", "test", "validation", "dev")
    training_splits = ("auxiliary_train",)
    subsets = ("all", "auxiliary_train")
    columns = ("question", "subject", "choices", "answer")

    def pattern(self) -> str:
        """Return the shell pattern of the split's files; the subset auxiliary_train has only its own split."""
        if self.subset == "all":
            return super().pattern()
        if self.split != self.subset:
            raise ConfigError(f"subset {self.subset} of task mmlu has only the split {self.subset}, not {self.split}.")
        return f"{self.subset}/train-*.parquet"

    def _conversation_of(self, row: dict[str, Any]) -> Conversation:
        letter = dict(enumerate(LETTERS)).get(row["answer"], str(row["answer"]))
        return choice_dialogue(row["question"], LETTERS, row["choices"], letter, subject=row["subject"])


class ArcEasy(HubTask):
    """Science questions of school tests with three to five choices, labelled A, B, ... or 1, 2, ..."""

    name = "arc_easy"
    kind = "categorical"
    chance = 0.25
    home = "allenai/ai2_arc"
    splits = ("train", "validation", "test")
    subsets = ("ARC-Easy",)
    columns = ("question", "choices", "answerKey")

    def _conversation_of(self, row: dict[str, Any]) -> Conversation:
        choices = row["choices"]
        return choice_dialogue(row["question"], choices["label"], choices["text"], row["answerKey"])


class ArcChallenge(ArcEasy):
    """Questions that retrieval and word co-occurrence methods of 2018 answered wrong."""

    name = "arc_challenge"
    subsets = ("ARC-Challenge",)


@dataclass(eq=False, kw_only=True)
class GSM8K(HubTask):
    """Grade-school word problems whose answers call the calculator, judged by the number after the first ####.

    Conversations are nanochat's. Verdicts differ in two cases: a response without a number after #### is always wrong,
    and a full stop after the number is ignored. Evaluations record nanochat's, too.
    """

    name = "gsm8k"
    home = "openai/gsm8k"
    subsets = ("main", "socratic")
    columns = ("question", "answer")
    prompt_tokens = 320

    def _conversation_of(self, row: dict[str, Any]) -> Conversation:
        return dialogue(row["question"], calculator_parts(row["answer"], keep_empty=True))

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        """Return True if the number after the first #### is right; a response without one is wrong."""
        number = final_number(str(conversation["messages"][-1]["content"][-1]["text"]))
        return number is not None and number == final_number(response)

    def explain(self, conversation: Conversation, response: str) -> tuple[bool, dict[str, Any]]:
        """Return the verdict and nanochat's, on which published scores are based."""
        verdict = self.evaluate(conversation, response)
        return verdict, {"nanochat_verdict": is_right_by_nanochat(conversation, response)}


@dataclass(eq=False, kw_only=True)
class HumanEval(HubTask):
    """164 functions to write from docstrings, judged by their tests in the sandbox (docs/internals/security.md)."""

    name = "humaneval"
    home = "openai/openai_humaneval"
    splits = ("test",)
    training_splits = ()
    subsets = ("openai_humaneval",)
    columns = ("prompt", "canonical_solution", "entry_point", "test")
    unconfined: bool = False
    """Run programs even if the system cannot isolate them from the user's files, processes and network."""

    def check(self) -> None:
        """Check that this machine can confine programs."""
        from mlxchat.sandbox.programs import find_confinement_problem  # imported only for evaluations

        if not self.unconfined and (problem := find_confinement_problem()):
            advice = "Leave the task out, or accept the risk with options: {unconfined: 1}"
            raise StepFailed(f"task humaneval: {problem}. {advice}")

    def _conversation_of(self, row: dict[str, Any]) -> Conversation:
        solution = f"{row['prompt']}\n{row['canonical_solution']}"
        return dialogue(row["prompt"], solution, entry_point=row["entry_point"], test=row["test"])

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        """Run the response's program in the sandbox and return True if its tests passed."""
        return self.explain(conversation, response)[0]

    def explain(self, conversation: Conversation, response: str) -> tuple[bool, dict[str, Any]]:
        """Return the verdict, the program's status, and the last 1,000 characters of its output."""
        from mlxchat.sandbox.programs import run_program

        self.check()
        outcome = run_program(assemble_program(conversation, response))
        printed = re.sub(r"0x[0-9a-f]{6,}", "0x…", outcome.output[-1000:])  # addresses are not reproducible
        return bool(outcome.passed), {"status": outcome.status, "printed": printed}


def extract_program(response: str) -> str:
    """Return the first fenced block (```python or ```) of a response, or all of it, stripped."""
    found = re.search(r"```(?:python)?\s*\n(.*?)\n```", response, re.DOTALL)
    return (found[1] if found else response).strip()


def extract_imports(prompt: str) -> str:
    """Return the import lines of a prompt before its first other line of code."""
    lines = [line for line in map(str.strip, prompt.split("\n")) if line and not line.startswith("#")]
    return "\n".join(takewhile(lambda line: line.startswith(("import ", "from ")), lines))


def assemble_program(conversation: Conversation, response: str) -> str:
    """Return the program that tests a response: the prompt's imports, the response's code, the tests and their call."""
    imports = extract_imports(conversation["messages"][0]["content"])
    call = f"check({conversation['entry_point']})"
    return f"{imports}\n\n{extract_program(response)}\n\n{conversation['test']}\n{call}"
