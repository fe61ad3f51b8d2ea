"""The bootstrap against closed forms, enumeration and a loop written from the definition."""

import itertools

import numpy as np
import pytest

from compendium.metrics.bootstrap import paired_interval, resample_weights


def f1(counts: np.ndarray) -> np.ndarray:
    return 2 * counts[..., 0] / (counts[..., 1] + counts[..., 2])


def some_examples(rng, num_seeds, sizes):
    def arm(n, accuracy):
        gold = rng.poisson(2.0, n) + 1
        return np.stack([rng.binomial(gold, accuracy), gold, gold], axis=1)

    sizes = np.broadcast_to(sizes, num_seeds)
    return [(arm(n, 0.8), arm(n, 0.7)) for n in sizes]


def test_seeds_only_equals_enumeration():
    differences = [0.3, 1.1, -0.4, 2.0]
    every_mean = [np.mean(draw) for draw in itertools.product(differences, repeat=4)]
    expected = np.percentile(every_mean, [2.5, 97.5])
    interval = paired_interval(differences, num_resamples=50_000)
    np.testing.assert_allclose(interval, expected, atol=0.05)


def test_is_seeded():
    differences = [0.3, 1.1, -0.4, 2.0, 0.9, 0.2]
    assert paired_interval(differences, seed=3) == paired_interval(differences, seed=3)
    examples = some_examples(np.random.default_rng(0), 2, 30)
    first = paired_interval([0.1, 0.1], examples=examples, statistic=f1, seed=1)
    assert first == paired_interval([0.1, 0.1], examples=examples, statistic=f1, seed=1)
    assert first != paired_interval([0.1, 0.1], examples=examples, statistic=f1, seed=2)


@pytest.mark.parametrize("sizes", [50, [50, 40, 60]])
def test_hierarchy_equals_a_loop_from_the_definition(sizes):
    rng = np.random.default_rng(0)
    examples = some_examples(rng, 3, sizes)
    differences = [f1(a.sum(0)) - f1(b.sum(0)) for a, b in examples]
    means = []
    for _ in range(3000):
        draws = [rng.integers(len(a), size=len(a)) for a, _ in examples]
        if isinstance(sizes, int):
            draws = [draws[0]] * 3
        one = [f1(a[i].sum(0)) - f1(b[i].sum(0)) for (a, b), i in zip(examples, draws, strict=True)]
        means.append(np.mean([one[s] for s in rng.integers(3, size=3)]))
    expected = np.percentile(means, [2.5, 97.5])
    interval = paired_interval(differences, examples=examples, statistic=f1, num_resamples=3000)
    np.testing.assert_allclose(interval, expected, atol=0.012)


def test_normal_interval_of_a_mean():
    rng = np.random.default_rng(1)
    a, b = rng.normal(1, 1, 500), rng.normal(0, 1, 500)
    half = 1.6449 * (a - b).std() / np.sqrt(500)
    low, high = paired_interval(
        [(a - b).mean()], examples=[(a, b)], level=0.9, num_resamples=20_000
    )
    np.testing.assert_allclose([low, high], (a - b).mean() + np.array([-half, half]), atol=0.006)


def test_arms_stay_paired():
    """Arms that differ by a constant on every example: the examples add no width at all."""
    scores = np.random.default_rng(2).normal(size=200)
    low, high = paired_interval([0.5], examples=[(scores + 0.5, scores)])
    np.testing.assert_allclose([low, high], 0.5, atol=1e-12)


def test_shared_examples_do_not_average_out():
    """The same luck in every seed is as wide as with one seed, not narrower by sqrt(5)."""
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=300), rng.normal(size=300)
    one = np.diff(paired_interval([0.0], examples=[(a, b)]))
    five = np.diff(paired_interval([0.0] * 5, examples=[(a, b)] * 5))
    np.testing.assert_allclose(one, five, rtol=0.1)


def test_coverage_of_the_true_difference():
    rng = np.random.default_rng(4)
    hits = 0
    for trial in range(200):
        a, b = rng.normal(0.3, 1, 60), rng.normal(0, 1, 60)
        low, high = paired_interval(
            [(a - b).mean()], examples=[(a, b)], seed=trial, num_resamples=400
        )
        hits += low <= 0.3 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_blocks_add_up():
    blocks = list(resample_weights(7, 100, np.random.default_rng(0), block_size=50))
    assert len(blocks) > 1 and sum(map(len, blocks)) == 100
    assert all((block.sum(1) == 7).all() for block in blocks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"differences": []}, "at least one"),
        ({"differences": [1.0], "level": 95}, "level 95"),
        ({"differences": [1.0, 2.0], "examples": [(np.ones(3), np.ones(3))]}, "1 seeds for 2"),
        ({"differences": [1.0], "examples": [(np.ones(3), np.ones(4))]}, "same"),
        ({"differences": [1.0], "statistic": f1}, "without examples"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        paired_interval(**arguments)
