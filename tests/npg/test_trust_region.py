"""The search and the damping rule on made-up numbers, and every range."""

from math import inf, nan, sqrt

import pytest

from npg import LevenbergMarquardt, TrustRegion
from npg.trust_region import Trial


class Landscape:
    """Gain and KL as functions of the scale, and the scales that were tried."""

    def __init__(self, gain, kl) -> None:
        self.gain, self.kl, self.tried = gain, kl, []

    def __call__(self, scale: float) -> Trial:
        self.tried.append(scale)
        return Trial(self.gain(scale), self.kl(scale))


# ------------------------------------------------------------------------------------------------------------- length


def test_scale_solves_the_quadratic_model():
    region = TrustRegion(0.02)
    for curvature in (1e-12, 0.3, 7.0, 1e12, 1e300):
        assert 0.5 * region.scale(curvature) ** 2 * curvature == pytest.approx(0.02, rel=1e-14)


def test_scale_is_a_number_for_the_smallest_curvature():
    assert TrustRegion(0.02).scale(5e-324) == pytest.approx(sqrt(0.04) / sqrt(5e-324), rel=1e-14)


@pytest.mark.parametrize("curvature", [0.0, -1.0, nan, inf, -inf])
def test_scale_is_zero_without_a_positive_curvature(curvature):
    assert TrustRegion(0.02).scale(curvature) == 0.0


# ------------------------------------------------------------------------------------------------------------- search


def test_the_full_length_is_taken_where_it_will_do():
    landscape = Landscape(lambda s: s, lambda s: 0.5 * s**2)
    result = TrustRegion(0.5).search(landscape, 1.0, 1.0)
    assert result == (True, 1.0, Trial(1.0, 0.5), 0)  # KL equal to the radius is inside
    assert landscape.tried == [1.0]


def test_the_first_acceptable_length_is_taken():
    # 0.5 would gain more, but is not reached from above first
    landscape = Landscape(lambda s: 1 - (s - 0.5) ** 2, lambda s: s)
    result = TrustRegion(0.7, shrink=0.8).search(landscape, 1.0, 1.0)
    assert landscape.tried == pytest.approx([1.0, 0.8, 0.64])
    assert result.accepted
    assert result.scale == landscape.tried[-1]
    assert result.backtracks == 2
    assert result.trial == Trial(landscape.gain(result.scale), result.scale)


def test_lengths_are_powers_of_shrink_and_trials_are_counted():
    landscape = Landscape(lambda s: -1.0, lambda s: 0.0)
    result = TrustRegion(0.1, shrink=0.5, max_trials=6).search(landscape, 2.0, 1.0)
    assert landscape.tried == [2.0 * 0.5**k for k in range(6)]
    assert result == (False, 0.0, Trial(-1.0, 0.0), 5)
    assert TrustRegion(0.1, max_trials=1).search(Landscape(lambda s: 1.0, lambda s: 0.0), 1.0, 1.0).accepted


@pytest.mark.parametrize(
    "bad",
    [
        Trial(nan, 0.0),
        Trial(1.0, nan),
        Trial(nan, nan),
        Trial(1.0, inf),
        Trial(1.0, -inf),
        Trial(1.0, -0.054),  # its digits are lost
        Trial(1.0, -1e-6),
        Trial(-inf, 0.0),
        Trial(inf, 0.0),
        Trial(0.0, 0.0),
        Trial(1.0, 0.1000001),
    ],
)
def test_what_is_refused(bad):
    region = TrustRegion(0.1, max_trials=3)
    assert not region.search(lambda scale: bad, 1.0, 1.0).accepted
    # and is no obstacle to a shorter step
    found = region.search(lambda scale: bad if scale > 0.7 else Trial(0.1, 0.05), 1.0, 1.0)
    assert (found.accepted, found.backtracks) == (True, 2)


def test_the_rounding_of_zero_is_inside():
    assert TrustRegion(0.1).search(lambda scale: Trial(1.0, -1e-17), 1.0, 1.0).accepted


def test_any_gain_will_do_though_the_linear_model_overflows():
    assert TrustRegion(0.1).search(lambda scale: Trial(1.0, 0.0), 1e200, 1e200).accepted is False
    assert TrustRegion(0.1).search(lambda scale: Trial(1.0, 0.0), 1e100, 1e200).accepted


def test_the_gain_is_compared_with_the_linear_model():
    region = TrustRegion(10.0, min_gain_ratio=0.5, shrink=0.5)
    # gain s − s²: a quarter of the slope times s at s = ¾, more than half only below ½
    landscape = Landscape(lambda s: s - s**2, lambda s: 0.0)
    result = region.search(landscape, 0.75, 1.0)
    assert landscape.tried == [0.75, 0.375]
    assert result.accepted
    landscape = Landscape(lambda s: 3 * (s - s**2), lambda s: 0.0)  # units of the objective cancel
    assert region.search(landscape, 0.75, 3.0).scale == 0.375


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"radius": 0.0}, r"radius, a KL in nats, must lie in \(0, inf\), got 0.0"),
        ({"radius": -1.0}, "radius.* must .* got -1.0"),
        ({"radius": nan}, "radius.* must .* got nan"),
        ({"radius": inf}, "radius.* must .* got inf"),
        ({"shrink": 0.0}, r"shrink must lie in \(0, 1\), got 0.0"),
        ({"shrink": 1.0}, r"shrink must lie in \(0, 1\), got 1.0"),
        ({"shrink": nan}, r"shrink must lie in \(0, 1\), got nan"),
        ({"max_trials": 0}, "max_trials must be at least 1, got 0"),
        ({"min_gain_ratio": -0.1}, r"min_gain_ratio must lie in \[0, 1\), got -0.1"),
        ({"min_gain_ratio": 1.0}, r"min_gain_ratio must lie in \[0, 1\), got 1.0"),
        ({"kl_direction": "both"}, "kl_direction must be 'old_new' or 'new_old', got 'both'"),
    ],
)
def test_ranges_of_the_trust_region(options, match):
    with pytest.raises(ValueError, match=match):
        TrustRegion(**{"radius": 0.01, **options})


# ------------------------------------------------------------------------------------------------------------ damping


@pytest.mark.parametrize(
    ("predicted", "actual", "accepted", "factor"),
    [
        (1.0, 0.9, True, 1 / 2),
        (1.0, 5.0, True, 1 / 2),
        (1.0, 0.75, True, 1.0),  # more than three quarters, not exactly
        (1.0, 0.5, True, 1.0),
        (1.0, 0.25, True, 1.0),
        (1.0, 0.24, True, 2.0),
        (1.0, -1.0, True, 2.0),
        (1.0, 0.9, False, 2.0),
        (1.0, nan, True, 2.0),
        (nan, 1.0, True, 2.0),
        (0.0, 0.0, True, 1.0),  # a step of length zero
        (0.0, 0.0, False, 2.0),
        (0.0, -1.0, True, 2.0),
        (-1.0, -1.0, True, 2.0),
    ],
)
def test_damping_follows_the_ratio(predicted, actual, accepted, factor):
    assert LevenbergMarquardt(factor=2.0).update(0.1, predicted, actual, accepted) == pytest.approx(0.1 * factor)


def test_damping_stays_in_its_range():
    rule = LevenbergMarquardt(factor=10.0, minimum=1e-3, maximum=1.0)
    assert rule.update(1e-3, 1.0, 1.0, True) == 1e-3
    assert rule.update(0.5, 1.0, -1.0, True) == 1.0
    assert rule.update(0.0, 1.0, 0.5, True) == rule.update(0.0, 0.0, 0.0, True) == 1e-3
    assert rule.update(sqrt(1e-3), 1.0, 0.5, True) == sqrt(1e-3)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"factor": 1.0}, r"factor must lie in \(1, inf\), got 1.0"),
        ({"factor": nan}, r"factor must lie in \(1, inf\), got nan"),
        ({"minimum": 0.0}, r"minimum must lie in \(0, inf\), got 0.0"),
        ({"minimum": 2.0, "maximum": 1.0}, r"maximum must lie in \[2.0, inf\), got 1.0"),
        ({"maximum": inf}, r"maximum must lie in \[1e-08, inf\), got inf"),
    ],
)
def test_ranges_of_the_damping_rule(options, match):
    with pytest.raises(ValueError, match=match):
        LevenbergMarquardt(**options)
