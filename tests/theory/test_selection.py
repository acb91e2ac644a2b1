"""The best of a sweep: by how much its score flatters it, and how many seeds tell two apart."""

import itertools

import numpy as np
import pytest
from scipy import stats as scipy_stats

pytestmark = pytest.mark.fast

OUTCOMES = (0.0, 1.0)


def listed(num_configurations, num_seeds):
    """All scores [configurations, seeds] of runs that fail or succeed with equal chances."""
    cells = num_configurations * num_seeds
    for scores in itertools.product(OUTCOMES, repeat=cells):
        yield np.reshape(scores, (num_configurations, num_seeds)), 0.5**cells


def test_the_score_that_chose_a_configuration_is_too_high():
    """All configurations are equally good: 0.5."""
    chosen = sum(chance * scores.mean(1).max() for scores, chance in listed(3, 4))
    single = sum(chance * scores.mean(1)[0] for scores, chance in listed(3, 4))
    assert single == pytest.approx(0.5, abs=1e-12)
    assert chosen > 0.65


def test_fresh_seeds_do_not_flatter_it():
    """Half of the seeds choose, and the others are the report."""
    report = 0.0
    for scores, chance in listed(3, 4):
        choose, fresh = scores[:, :2].mean(1), scores[:, 2:].mean(1)
        report += chance * fresh[choose.argmax()]
    assert report == pytest.approx(0.5, abs=1e-12)


def power(num_seeds, effect):
    """Chance that a two-sided test at 5% sees a difference of `effect` standard deviations."""
    limit, shift = scipy_stats.norm.ppf(0.975), effect * np.sqrt(num_seeds / 2.0)
    return scipy_stats.norm.sf(limit - shift) + scipy_stats.norm.cdf(-limit - shift)


@pytest.mark.parametrize(("effect", "expected"), [(2 / 3, 36), (1.0, 16), (0.5, 63)])
def test_seeds_that_are_needed_to_tell_two_agents_apart(effect, expected):
    z = scipy_stats.norm.ppf(0.975) + scipy_stats.norm.ppf(0.8)
    assert int(np.ceil(2.0 * (z / effect) ** 2)) == expected
    assert power(expected, effect) >= 0.8 > power(expected - 1, effect)
    assert power(3, effect) < 0.25
