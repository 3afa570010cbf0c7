"""How much text a run will read, and from which files of a corpus, derived from the horizon."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mlxchat.config.schema import Config
from mlxchat.config.wording import format_bytes, format_count
from mlxchat.data.sources import Corpus
from mlxchat.hub.cache import check_space, hub_cache
from mlxchat.model.sizes import sizes_of
from mlxchat.planning.horizon import derive_hyperparameters
from mlxchat.runner.plan import PlannedStep
from mlxchat.store.store import Store

# Of nanochat's tokenizer of 65,536 tokens on FineWeb-Edu, smaller for smaller vocabularies; later measured.
ESTIMATED_CHARS_PER_TOKEN = 4.8
# Share of the tokens that packing=best_fit crops away: nanochat's figure for rows of 2,048. Other packings keep all.
CROPPED_SHARE = 0.35
MARGIN = 1.1
# The beginning of the text, which tables and baselines read: tokenizers' compression, the n-gram model.
LEAST_CHARS = 20_000_000


@dataclass(frozen=True)
class TextNeed:
    """The text that pending steps of a plan read from a corpus on the Hub."""

    tokens: int
    """Tokens that the model trains on."""
    chars_per_token: float
    is_measured: bool
    """Whether `chars_per_token` is that of the finished tokenizer, not an estimate."""
    chars: float
    """Characters to read, including cropped ones and the margin; at least what the tokenizer reads."""
    cropped_share: float
    """Share of the tokens that packing drops."""
    token_bytes: int
    """Of a token on disk."""
    known: Corpus | None
    """The corpus's files; None: they are not listed yet."""

    @property
    def epochs(self) -> float:
        """Passes of the training over the corpus; 0: unknown."""
        return self.chars / MARGIN / self.known.chars if self.known is not None else 0.0

    def hints(self) -> dict[str, float]:
        """Return the hints of steps: `Context.hints`."""
        return {"train_chars": self.chars}

    def __str__(self) -> str:
        """Return a description."""
        how = "measured" if self.is_measured else "estimated"
        text = f"text: {format_count(self.chars)} characters"
        if self.tokens:
            text += (
                f" for {format_count(self.tokens)} tokens ({self.chars_per_token:.2f} a token, {how}; "
                f"{self.cropped_share:.0%} lost in packing, {MARGIN - 1:.0%} spare)"
            )
        if self.known is None:
            return f"{text}; the corpus is not listed yet"
        files = self.known.first(self.chars)
        missing = format_bytes(self.known.missing_bytes(self.chars))
        about = "" if self.known.is_measured else "about "
        text += f" = {about}{len(files):,} of {len(self.known.train):,} files, {missing} to fetch"
        if self.epochs > 1:
            text += f"; that is all there is, and the training passes over it {self.epochs:.1f} times"
        return text


def find_text_need(config: Config, plan: Iterable[PlannedStep], store: Store) -> TextNeed | None:
    """Return what pending steps will read; None: no corpus of the Hub, or no such step."""
    plan = list(plan)
    steps = {step.stage.name: step for step in plan}
    waiting = {step.stage.name for step in plan if _reads_text(step)}
    if config.corpus.hub is None or not waiting:
        return None
    tokens = 0
    if "pretrain" in waiting:
        sizes = sizes_of(config.model, config.architecture, config.tokenizer.vocab_size)
        derived = derive_hyperparameters(config, sizes)
        tokens = derived.num_iterations * derived.batch_tokens
    measured = _chars_per_token(steps.get("tokenizer"), store)
    per_token = measured or ESTIMATED_CHARS_PER_TOKEN
    cropped = CROPPED_SHARE if config.pretrain.packing == "best_fit" else 0.0
    chars = max(tokens * per_token / (1 - cropped) * MARGIN, LEAST_CHARS)
    if "tokenizer" in waiting and config.tokenizer.source == "train":
        chars = max(chars, config.tokenizer.max_chars * MARGIN)  # it reads no more than the beginning of long documents
    place = _artifact(steps.get("corpus"), store)
    known = Corpus.open(place) if place is not None else Corpus.recorded(config.corpus.hub)
    token_bytes = 2 if config.tokenizer.vocab_size <= 1 << 16 else 4
    return TextNeed(tokens, per_token, measured is not None, chars, cropped, token_bytes, known)


def describe_text(config: Config, plan: Iterable[PlannedStep], store: Store) -> dict[str, str]:
    """Return step → description of the text that a plan's steps will read."""
    plan = list(plan)
    need = find_text_need(config, plan, store)
    readers = [step.name for step in plan if _reads_text(step)]
    return {readers[0]: str(need)} if need is not None and readers else {}


def check_text_room(need: TextNeed | None, store: Store) -> None:
    """Refuse a run whose text and encoded text do not fit on the disk, as far as its files are known.

    Encoded text that exists counts as this run's.

    Raises:
        DataError: with the bytes that are missing and those that are free.
    """
    if need is None:
        return
    made = sum(path.stat().st_size for path in (store.outputs / "store").glob("tokens-*/*.safetensors"))
    encoded = max(0, round(need.chars / need.chars_per_token) * need.token_bytes - made)
    files = need.known.files() if need.known is not None else []
    repository = files[0].repository if files else "of the Hub"
    text = need.known.missing_bytes(need.chars) if need.known is not None else 0
    check_space(store.outputs, encoded, f"The encoded text of this run ({repository})", (hub_cache(), text))
    check_space(hub_cache(), text, f"The text of this run ({repository})", (store.outputs, encoded))


def _reads_text(step: PlannedStep) -> bool:
    return not step.done and (step.stage.name == "corpus" or "corpus" in step.inputs)


def _artifact(step: PlannedStep | None, store: Store) -> Path | None:
    return store.find(step.rid) if step is not None and step.done else None


def _chars_per_token(step: PlannedStep | None, store: Store) -> float | None:
    """Return the characters in a token of the plan's tokenizer, if it is made; its bytes are hardly more."""
    made = store.made(step.key) if step is not None and step.done else None
    metrics = (made or {}).get("metrics", {})
    value = metrics.get("chars_per_token", metrics.get("bytes_per_token"))
    return float(value) if value else None
