"""Search spaces: Hydra's expressions, and refused ones."""

import pytest

pytest.importorskip("optuna")

from optuna.distributions import CategoricalDistribution as Choice
from optuna.distributions import FloatDistribution as Float
from optuna.distributions import IntDistribution as Int

from mlxchat.errors import ConfigError
from mlxchat.sweep.search import read_space


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("interval(0.1,1)", Float(0.1, 1.0)),
        ("tag(log,interval(0.001,1))", Float(0.001, 1.0, log=True)),
        ("int(interval(1,8))", Int(1, 8)),
        ("tag(log,int(interval(1,8)))", Int(1, 8, log=True)),
        ("range(1,9)", Int(1, 8)),
        ("range(1,10,4)", Int(1, 9, step=4)),
        ("range(0.1,0.95,0.1)", Float(0.1, 0.9, step=0.1)),
        ("choice(d2,d4)", Choice(("d2", "d4"))),
        ("1,2,2", Choice(("1", "2"))),
    ],
)
def test_hydra_expressions_become_distributions(expression, expected):
    for overrides, written in (([f"x.y={expression}"], {}), ([], {"x.y": expression})):
        assert read_space(overrides, written) == ([], {"x.y": expected})


def test_command_line_overrides_the_yaml_space():
    fixed, space = read_space(["a=1", "b=interval(0,1)", "seed=3"], {"a": "1,2", "b": "interval(5,6)", "c": "1,2"})
    assert fixed == ["a=1", "seed=3"]
    assert space == {"b": Float(0.0, 1.0), "c": Choice(("1", "2"))}


@pytest.mark.parametrize(
    ("overrides", "written", "problem"),
    [
        (["a=1"], {}, "a search needs settings that vary"),
        ([], {"a": "3"}, "a=3 does not vary"),
        ([], {"a": "interval(1"}, "sweep.space"),
        (["a=interval(2,1)"], {}, "the smaller end first"),
        (["a=tag(log,interval(0,1))"], {}, "begins at more than 0"),
        (["a=tag(log,int(interval(0,4)))"], {}, "begins at 1 or more"),
        (["a=tag(lag,interval(1,2))"], {}, 'tag "lag" is unknown, expected log'),
        (["a=choice(1)"], {}, "a choice needs several values"),
        (["a=range(3,3)", "b=interval(1,1)"], {"c": "3"}, "(?s)c=3 does not vary.*the range is empty.*the interval"),
    ],
)
def test_invalid_expressions_are_refused(overrides, written, problem):
    with pytest.raises(ConfigError, match=problem):
        read_space(overrides, written)
