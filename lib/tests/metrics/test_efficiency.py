"""Pareto front and ELUE score against their definitions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compendium.metrics.efficiency import (
    cost_at,
    elue_score,
    mean_elue_score,
    pareto_front,
    quality_at,
)

points = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=25)


@given(points)
@settings(deadline=None)
def test_front_is_what_nobody_dominates(cloud):
    def dominated(p):
        return any(a <= p[0] and b >= p[1] and (a, b) != p for a, b in cloud)

    found = [cloud[i] for i in pareto_front(cloud)]
    assert set(found) == {p for p in cloud if not dominated(p)}
    assert len(found) == len(set(found))
    assert found == sorted(found)


curves = st.lists(
    st.tuples(st.integers(1, 30), st.floats(0, 100)),
    min_size=1,
    max_size=8,
    unique_by=lambda p: p[0],
)


@given(curves)
@settings(deadline=None)
def test_the_reference_scores_nothing_against_itself(curve):
    assert elue_score(curve, curve) == pytest.approx(0.0, abs=1e-9)
    raised = [(x, y + 2.5) for x, y in curve]
    assert elue_score(raised, curve) == pytest.approx(2.5)


def test_score_between_and_outside_of_the_points():
    curve = [(10, 90.0), (2, 70.0), (6, 80.0)]  # in any order
    assert quality_at(curve, [1, 2, 4, 8, 11]).tolist() == [70, 70, 75, 85, 90]
    assert elue_score([(4, 76.0), (8, 84.0), (20, 90.0)], curve) == 0.0
    assert mean_elue_score({"a": ([(4, 77.0)], curve), "b": ([(2, 69.0)], curve)}) == 0.5


@given(curves, st.floats(0, 100))
@settings(deadline=None)
def test_cost_at_is_the_first_place_of_that_quality(curve, quality):
    cost = cost_at(curve, quality)
    grid = np.linspace(min(x for x, _ in curve), max(x for x, _ in curve), 2001)
    good = grid[quality_at(curve, grid) >= quality + 1e-9]
    if np.isinf(cost):
        assert max(y for _, y in curve) < quality
    else:
        assert quality_at(curve, cost) >= quality - 1e-6
        assert not len(good) or cost <= good[0] + 1e-6


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda: pareto_front([]), "give rows of"),
        (lambda: pareto_front([[1, np.nan]]), "not finite"),
        (lambda: quality_at([[1, 2], [1, 3]], 1), "two points of the same cost"),
        (lambda: mean_elue_score({}), "no data set"),
    ],
)
def test_bad_points_are_named(call, problem):
    with pytest.raises(ValueError, match=problem):
        call()
