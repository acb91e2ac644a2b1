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


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # 1e-5 * 1000^q, six digits.
        ("learning_rate", {0.0: 1e-5, 0.25: 5.62341e-5, 0.5: 3.16228e-4}),
        ("clip_eps", {0.0: 0.1, 0.25: 0.175, 0.5: 0.25}),
        # A quarter of the quantiles each.
        ("num_epochs", {0.0: 1, 0.24: 1, 0.26: 2, 0.51: 3, 0.74: 3, 0.76: 4, 0.999: 4}),
        # The whole part of 8 * (65/8)^q: 16 is reached at q = 0.331, 64 at 0.9926.
        ("batch_size", {0.0: 8, 0.32: 15, 0.34: 16, 0.5: 22, 0.99: 63, 0.993: 64}),
        ("activation", {0.0: "tanh", 0.33: "tanh", 0.34: "relu", 0.66: "relu", 0.67: "silu"}),
    ],
)
def test_quantiles_by_hand(name: str, expected: dict[float, object]) -> None:
    found = {quantile: AXES[name].at(quantile) for quantile in expected}
    assert found == expected
    assert [type(each) for each in found.values()] == [type(each) for each in expected.values()]


def test_a_quantile_that_was_rounded_up_to_1_is_the_last_value() -> None:
    assert [AXES[name].at(1.0) for name in AXES] == [1e-2, 0.4, 4, 64, "silu"]


def test_examples_are_the_list_or_both_ends_in_their_type() -> None:
    assert AXES["activation"].examples() == ["tanh", "relu", "silu"]
    assert AXES["clip_eps"].examples() == [0.1, 0.4]
    ends = space.axis("x", {"int_uniform": [1, 4]}).examples()
    assert ends == [1, 4] and all(type(end) is int for end in ends)
    ends = space.axis("x", {"uniform": [0, 4]}).examples()
    assert ends == [0.0, 4.0] and all(type(end) is float for end in ends)


def test_random_draws_are_those_of_numpy_field_by_field() -> None:
    axes = {name: space.axis(name, {"uniform": [0, 1]}) for name in "ab"}
    points = np.random.default_rng(5).random((7, 2))
    drawn = space.sample(axes, "random", 7, 5)
    np.testing.assert_allclose([[each["a"], each["b"]] for each in drawn], points, atol=1e-6)
    assert len(space.sample(axes, "sobol", 1, 0)) == 1


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
    assert activation.perturbed("silu", 0.8, -1) == "relu"
    assert activation.perturbed("relu", 0.8, 1) == activation.perturbed("silu", 0.8, 1) == "silu"
    assert epochs.perturbed(1, 0.8, -1) == 1 and type(epochs.perturbed(3, 1.25, 1)) is int


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ([], "list of values"),
        (3, "list of values"),
        ({"normal": [0, 1]}, "log_uniform"),
        ({"uniform": [0, 1], "log_uniform": [1, 2]}, "log_uniform"),
        ({"uniform": [1.0, 0.0]}, r"\[low, high\]"),
        ({"uniform": [1.0, 1.0]}, r"\[low, high\]"),
        ({"uniform": [1.0]}, r"\[low, high\]"),
        ({"uniform": [0.0, 0.5, 1.0]}, r"\[low, high\]"),
        ({"uniform": 1.0}, r"\[low, high\]"),
        ({"uniform": [0.0, math.inf]}, r"\[low, high\]"),
        ({"uniform": [-math.inf, 1.0]}, r"\[low, high\]"),
        ({"uniform": [0.0, math.nan]}, r"\[low, high\]"),
        ({"uniform": [0.0, "1"]}, r"\[low, high\]"),
        ({"uniform": [0.0, True]}, r"\[low, high\]"),
        ({"log_uniform": [0.0, 1.0]}, "above 0"),
        ({"log_int_uniform": [0, 8]}, "above 0"),
        ({"int_uniform": [1, 2.5]}, "whole numbers"),
    ],
)
def test_a_bad_axis_is_one_sentence(value: object, word: str) -> None:
    with pytest.raises(InputError, match=word) as caught:
        space.axis("gamma", value)
    assert "gamma" in str(caught.value)
