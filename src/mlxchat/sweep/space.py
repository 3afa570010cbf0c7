"""What a search may choose from, written as Hydra writes sweeps: choice, range, interval, int(…), tag(log, …)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException

from mlxchat.errors import ConfigError
from mlxchat.sweep.expand import check_glob, parser_of

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One of several values, written as overrides write them."""

    values: tuple[str, ...]

    def distribution(self) -> BaseDistribution:
        """Return it in Optuna's terms."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.values)

    def examples(self) -> tuple[Any, ...]:
        """Return the values that show whether all can be composed."""
        return self.values


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A number between two, both included."""

    low: float
    high: float
    whole: bool
    log: bool
    step: float | None = None

    def distribution(self) -> BaseDistribution:
        """Return it in Optuna's terms."""
        from optuna.distributions import FloatDistribution, IntDistribution

        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)

    def examples(self) -> tuple[Any, ...]:
        """Return both ends."""
        return self.low, self.high


Space = dict[str, Choice | Interval]


def read_space(
    overrides: list[str], written: Mapping[str, str], config_dirs: Sequence[str] = ()
) -> tuple[list[str], Space]:
    """Return the overrides that every trial has, and the space.

    Args:
        overrides: of the command line; those that vary are part of the space, and come before what is written.
        written: `sweep.space`: key → expression.
        config_dirs: folders with further YAML files, whose options a glob finds.

    Raises:
        ConfigError: every expression that cannot be searched.
    """
    parser = parser_of([*overrides, *written.values()], list(config_dirs))
    fixed: list[str] = []
    space = Space()
    problems = []
    for key, expression in written.items():
        item = f"{key}={expression}"
        try:
            (parsed,) = parser.parse_overrides([item])
            if not parsed.is_sweep_override():
                raise ConfigError(f"{item} does not vary. {_FORMS}")
            space[parsed.get_key_element()] = _read(item, parsed)
        except (HydraException, ConfigError) as error:
            problems.append(f"sweep.space: {str(error).splitlines()[0]}")
    for item in overrides:
        try:
            (parsed,) = parser.parse_overrides([item])
            if parsed.is_sweep_override():
                space[parsed.get_key_element()] = _read(item, parsed)
                continue
            space.pop(parsed.get_key_element(), None)
        except ConfigError as error:
            problems.append(str(error))
        except HydraException:
            pass  # composing says what is wrong with it
        fixed.append(item)
    if problems:
        raise ConfigError("\n".join(problems))
    if not space:
        raise ConfigError(f"sweep=tpe has nothing to search: say what varies, as key=EXPRESSION. {_FORMS}")
    return fixed, space


_FORMS = (
    "Expected choice(a,b), glob(d*), range(1,9), interval(0.1,1), int(interval(1,8)) or tag(log,interval(0.001,1)), "
    "quoted in the shell"
)


def _read(item: str, parsed: Override) -> Choice | Interval:
    value = parsed.value()
    if isinstance(value, IntervalSweep):
        assert value.start is not None
        assert value.end is not None
        whole = isinstance(value.start, int) and isinstance(value.end, int)
        return _checked(
            item, Interval(low=value.start, high=value.end, whole=whole, log="log" in value.tags), tags=value.tags
        )
    if isinstance(value, RangeSweep):
        numbers = list(value.range())
        if not numbers:
            raise ConfigError(f"{item}: the range is empty")
        whole = all(isinstance(number, int) for number in numbers)
        log = "log" in value.tags
        step = None if log else abs(value.step)
        low, high = min(numbers), max(numbers)
        if step is not None and not whole:  # sums of floats miss the end by a little
            high = float(Decimal(str(low)) + Decimal(str(step)) * (len(numbers) - 1))
        return _checked(item, Interval(low=low, high=high, whole=whole, log=log, step=step), tags=value.tags)
    check_glob(item, parsed)
    values = tuple(dict.fromkeys(parsed.sweep_string_iterator()))
    if len(values) < 2:
        raise ConfigError(f"{item}: one value is no choice")
    return Choice(values=values)


def _checked(item: str, found: Interval, tags: set[str]) -> Interval:
    if tags - {"log"}:
        raise ConfigError(f'{item}: tag "{", ".join(sorted(tags - {"log"}))}" is unknown, expected log')
    if found.low >= found.high:
        raise ConfigError(f"{item}: the interval is empty; expected the smaller end first")
    if found.log and found.low < (1 if found.whole else 1e-300):
        raise ConfigError(f"{item}: a logarithmic interval begins at {'1 or more' if found.whole else 'more than 0'}")
    return found


def describe(space: Space) -> dict[str, str]:
    """Return key → the dimension in words that are the same for the same dimension."""
    words = {}
    for key, dimension in space.items():
        if isinstance(dimension, Choice):
            words[key] = f"choice({','.join(dimension.values)})"
        else:
            kind = f"{'int' if dimension.whole else 'float'}{' log' if dimension.log else ''}"
            step = f" by {dimension.step!r}" if dimension.step else ""
            words[key] = f"{kind} {dimension.low!r}..{dimension.high!r}{step}"
    return words
