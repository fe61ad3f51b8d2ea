"""Rules and verdicts."""

import math

import numpy as np
import pytest

from compendium.experiment.claims import Claim, Outcome, at_most, decide, gain, ratio, untestable


def two_arms(of: list[float], over: list[float]) -> dict[str, list[Outcome]]:
    return {
        "of": [Outcome({"f1": value}) for value in of],
        "over": [Outcome({"f1": value}) for value in over],
    }


@pytest.mark.parametrize(
    ("differences", "at_least", "every_seed", "verdict"),
    [
        ([2.0, 2.0, 2.0], 2.0, True, "holds"),
        ([2.0, 2.0, 1.9], 2.0, True, "does not hold"),
        ([9.0, 9.0, 0.0], 2.0, True, "does not hold"),
        ([9.0, 9.0, 0.0], 2.0, False, "holds"),
        ([9.0, 9.0, -1.0], 2.0, False, "holds"),
    ],
)
def test_a_gain_is_decided_by_mean_and_sign(differences, at_least, every_seed, verdict):
    claim = gain(
        "C", "s", metric="f1", of="of", over="over", at_least=at_least, every_seed=every_seed
    )
    assert decide(claim, two_arms(differences, [0.0] * 3)).verdict == verdict


@pytest.mark.parametrize(
    ("differences", "margin", "every_seed", "verdict"),
    [
        ([0.04, 0.06, 0.045], 0.05, False, "holds"),
        ([0.06, 0.06, 0.05], 0.05, False, "does not hold"),
        ([-0.1, -0.1, 0.01], -0.05, True, "does not hold"),
        ([-0.1, -0.1, -0.01], -0.05, True, "holds"),
    ],
)
def test_at_most_is_decided_from_above(differences, margin, every_seed, verdict):
    claim = at_most(
        "C", "s", metric="f1", of="of", over="over", margin=margin, every_seed=every_seed
    )
    assert decide(claim, two_arms(differences, [0.0] * 3)).verdict == verdict


def test_differences_are_paired_by_seed():
    decided = decide(
        gain("C", "s", metric="f1", of="of", over="over"), two_arms([3.0, 5.0], [1.0, 6.0])
    )
    assert decided.differences == [2.0, -1.0]
    assert decided.interval[0] <= 0.5 <= decided.interval[1]


def test_a_value_that_is_not_finite_never_holds():
    for value in (math.nan, math.inf, -math.inf):
        for claim in (
            gain("C", "s", metric="f1", of="of", over="over"),
            at_most("C", "s", metric="f1", of="of", over="over", margin=1.0),
        ):
            decided = decide(claim, two_arms([1.0, value], [0.0, 0.0]))
            assert decided.verdict == "does not hold"
            assert decided.reason == "a run gave a value that is not finite"
            assert decided.interval is None


def test_a_ratio_may_read_timings():
    arms = {
        "fast": [Outcome({}, timings={"tokens_per_second": 90.0})],
        "slow": [Outcome({}, timings={"tokens_per_second": 30.0})],
    }
    claim = ratio("C3", "faster", of="fast", over="slow", metric="tokens_per_second", at_least=3.0)
    assert decide(claim, arms).verdict == "holds"
    assert decide(claim, arms).differences == [3.0]


def test_examples_widen_the_interval():
    """Five examples a seed, the same difference in every seed: only the examples vary."""
    counts = np.array([[1.0], [1.0], [1.0], [0.0], [0.0]])
    arms = {
        "of": [Outcome({"accuracy": 0.6}, examples={"accuracy": counts}) for _ in range(3)],
        "over": [Outcome({"accuracy": 0.0}, examples={"accuracy": counts * 0}) for _ in range(3)],
    }
    decided = decide(gain("C", "s", metric="accuracy", of="of", over="over"), arms)
    assert decided.differences == [0.6] * 3
    assert decided.interval[0] < 0.5 < 0.7 < decided.interval[1]


def test_what_cannot_be_tested_says_why():
    decided = decide(untestable("C4", "complementary to BERT", "no checkpoint"), {})
    assert (decided.verdict, decided.reason) == ("not testable here", "no checkpoint")


def test_a_rule_that_names_a_missing_arm_or_metric_raises():
    claim = gain("C", "s", metric="f1", of="of", over="other")
    with pytest.raises(KeyError):
        decide(claim, two_arms([1.0], [0.0]))
    with pytest.raises(KeyError, match="no metric or timing 'bleu'"):
        decide(gain("C", "s", metric="bleu", of="of", over="over"), two_arms([1.0], [0.0]))


def test_a_claim_without_a_rule_is_refused():
    with pytest.raises(ValueError, match="wants a difference"):
        Claim("C", "s", "rule")
    with pytest.raises(ValueError, match="wants a difference"):
        Claim("C", "s", "rule", difference=lambda arms: 0.0, at_least=0.0, at_most=1.0)
