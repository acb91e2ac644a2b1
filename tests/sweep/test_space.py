"""Axes of a search: what they may be, and what is drawn from them."""

import math

import numpy as np
import pytest

from purejaxpg import InputError
from purejaxpg.sweep import space

pytestmark = pytest.mark.fast

AXES = {
    "learning_rate": space.axis("learning_rate", {"log_uniform": [1e-5, 1e-2]}),
    "clip_eps": space.axis("clip_eps", {"uniform": [0.1, 0.4]}),
    "num_epochs": space.axis("num_epochs", {"int_uniform": [1, 4]}),
    "batch_size": space.axis("batch_size", {"log_int_uniform": [8, 64]}),
    "activation": space.axis("activation", ["tanh", "relu", "silu"]),
}


@pytest.mark.parametrize("method", ["random", "sobol", "lhs"])
def test_draws_lie_in_their_ranges_and_depend_on_the_seed_alone(method: str) -> None:
    first, again = (space.sample(AXES, method, 50, seed=3) for _ in range(2))
    assert first == again != space.sample(AXES, method, 50, seed=4)
    assert len(first) == 50
    for drawn in first:
        assert list(drawn) == list(AXES)
        assert 1e-5 <= drawn["learning_rate"] <= 1e-2
        assert 0.1 <= drawn["clip_eps"] <= 0.4
        assert type(drawn["num_epochs"]) is int and 1 <= drawn["num_epochs"] <= 4
        assert type(drawn["batch_size"]) is int and 8 <= drawn["batch_size"] <= 64
        assert drawn["activation"] in ("tanh", "relu", "silu")
    assert {drawn["num_epochs"] for drawn in first} == {1, 2, 3, 4}  # both ends included
    assert {drawn["activation"] for drawn in first} == {"tanh", "relu", "silu"}
    # Half of the rates below the geometric mean of the bounds, not below the arithmetic one.
    below = sum(drawn["learning_rate"] < math.sqrt(1e-5 * 1e-2) for drawn in first)
    assert 12 <= below <= 38


@pytest.mark.parametrize("method", ["random", "sobol"])
def test_more_samples_begin_with_the_same_ones(method: str) -> None:
    assert space.sample(AXES, method, 64, 0)[:16] == space.sample(AXES, method, 16, 0)


def test_low_discrepancy_fills_every_sixteenth_once() -> None:
    """What sobol and lhs are for; sixteen random draws almost surely leave gaps."""
    axes = {"x": space.axis("x", {"uniform": [0.0, 16.0]})}
    for method in ("sobol", "lhs"):
        cells = [math.floor(drawn["x"]) for drawn in space.sample(axes, method, 16, 1)]
        assert sorted(cells) == list(range(16)), method
    cells = {math.floor(drawn["x"]) for drawn in space.sample(axes, "random", 16, 1)}
    assert len(cells) < 16


def test_rounding_never_leaves_the_range() -> None:
    tight = space.axis("x", {"uniform": [0.33333339, 0.3333335]})
    values = [tight.at(q) for q in np.linspace(0.0, 0.999999, 50)]
    assert all(0.33333339 <= value <= 0.3333335 for value in values)


def test_perturbation_stays_inside() -> None:
    rate, epochs, activation = (AXES[n] for n in ("learning_rate", "num_epochs", "activation"))
    assert rate.perturbed(1e-3, 1.25, 1) == pytest.approx(1.25e-3)
    assert rate.perturbed(9e-3, 1.25, 1) == 1e-2
    assert epochs.perturbed(4, 0.5, -1) == 2
    assert activation.perturbed("tanh", 1.25, 1) == "relu"
    assert activation.perturbed("tanh", 0.8, -1) == "tanh"


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ([], "list of values"),
        (3, "list of values"),
        ({"normal": [0, 1]}, "log_uniform"),
        ({"uniform": [0, 1], "log_uniform": [1, 2]}, "log_uniform"),
        ({"uniform": [1.0, 0.0]}, r"\[low, high\]"),
        ({"uniform": [0.0, math.inf]}, r"\[low, high\]"),
        ({"uniform": [0.0, math.nan]}, r"\[low, high\]"),
        ({"uniform": [0.0, "1"]}, r"\[low, high\]"),
        ({"uniform": [0.0, True]}, r"\[low, high\]"),
        ({"log_uniform": [0.0, 1.0]}, "above 0"),
        ({"int_uniform": [1, 2.5]}, "whole numbers"),
    ],
)
def test_what_is_no_axis_is_one_sentence(value: object, word: str) -> None:
    with pytest.raises(InputError, match=word) as caught:
        space.axis("gamma", value)
    assert "gamma" in str(caught.value)
