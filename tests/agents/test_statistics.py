"""Statistics over seeds, against values by hand and SciPy's."""

import itertools

import numpy as np
import pytest
from scipy import stats

from agents.statistics import bootstrap_interval, common_steps, interquartile_mean, performance_profile


def test_the_interquartile_mean_by_hand():
    assert interquartile_mean([4.0, 1.0, 100.0, 2.0]) == 3.0  # of 2 and 4
    assert interquartile_mean([7.0]) == 7.0
    assert interquartile_mean([1.0, 2.0, 6.0]) == 3.0  # a quarter of three is none
    assert interquartile_mean([-1000.0, 1.0, 2.0, 3.0, 1000.0]) == 2.0


@pytest.mark.parametrize("place", [0, 2, 4])
def test_a_score_that_is_missing_is_no_best_one(place):
    scores = np.insert([1.0, 2.0, 3.0, 4.0], place, np.nan)
    assert np.isnan(interquartile_mean(scores))
    np.testing.assert_array_equal(interquartile_mean([scores, [1.0, 2.0, 3.0, 4.0, np.inf]]), [np.nan, 3.0])
    assert np.isnan(bootstrap_interval([scores])).all()


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_the_mean_of_no_runs_is_refused(shape):
    with pytest.raises(ValueError, match=r"^scores must hold at least one run, got the shape \("):
        interquartile_mean(np.empty(shape))


@pytest.mark.parametrize("n", range(1, 13))
def test_the_interquartile_mean_is_scipys_trimmed_mean(n):
    scores = np.random.default_rng(n).normal(size=(3, n))
    np.testing.assert_allclose(interquartile_mean(scores), stats.trim_mean(scores, 0.25, axis=1), rtol=1e-13)


def test_the_profile_counts_runs_at_or_above_a_threshold():
    profile = performance_profile([1.0, 2.0, 2.0, 4.0], [0.0, 2.0, 2.5, 5.0])
    np.testing.assert_array_equal(profile, [1.0, 0.75, 0.25, 0.0])


def test_the_interval_is_that_of_all_resamples():
    scores = np.array([1.0, 2.0, 4.0, 9.0])
    every = [np.mean(sample) for sample in itertools.product(scores, repeat=4)]  # all 256, equally likely
    low, high = bootstrap_interval([scores], lambda x: x.mean(-1), resamples=200_000)
    np.testing.assert_allclose([low, high], np.quantile(every, [0.025, 0.975]), atol=0.26)  # means lie 1/4 apart
    scipys = stats.bootstrap([scores], np.mean, method="percentile", n_resamples=200_000, rng=0).confidence_interval
    np.testing.assert_allclose([low, high], [scipys.low, scipys.high], atol=0.26)


def test_the_interval_is_the_same_every_time_and_lies_within_the_scores():
    scores = np.random.default_rng(1).normal(size=10)
    low, high = bootstrap_interval([scores])
    assert (low, high) == bootstrap_interval([scores])
    assert scores.min() <= low < interquartile_mean(scores) < high <= scores.max()
    narrow = bootstrap_interval([scores], level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_runs_are_drawn_within_their_task():
    # Between tasks there is no chance: with equal runs in each, every resample is the same.
    low, high = bootstrap_interval([[0.0, 0.0, 0.0], [8.0, 8.0, 8.0]], lambda x: x.mean(-1))
    assert (low, high) == (4.0, 4.0)
    low, high = bootstrap_interval([[0.0, 1.0], [5.0, 5.0]], lambda x: performance_profile(x, [0.5, 3.0]))
    np.testing.assert_array_equal(low, [0.5, 0.5])
    np.testing.assert_array_equal(high, [1.0, 0.5])


@pytest.mark.parametrize("scores", [[], [[1.0], []], [[[1.0, 2.0]]]])
def test_a_task_without_runs_is_refused(scores):
    with pytest.raises(ValueError, match="at least one run for each task"):
        bootstrap_interval(scores)


def test_curves_are_compared_where_all_of_them_are():
    steps, values = common_steps([([10, 20, 30], [1.0, 2.0, 3.0]), ([15, 25], [0.0, 10.0])])
    np.testing.assert_array_equal(steps, [15, 20, 25])
    np.testing.assert_array_equal(values, [[1.5, 0.0], [2.0, 5.0], [2.5, 10.0]])
