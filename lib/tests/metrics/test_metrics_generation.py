"""BLEU to a set, self-BLEU, distinct-n and minimum Bayes risk against NLTK and plain definitions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction
from nltk.translate.bleu_score import sentence_bleu as nltk_bleu

from compendium.metrics.generation import (
    bleu_to_set,
    distinct,
    minimum_bayes_risk,
    nearest_length,
    self_bleu,
)

SMOOTH = SmoothingFunction().method1
sentences = st.lists(
    st.lists(st.sampled_from("abcd"), min_size=1, max_size=9), min_size=2, max_size=6
)


def oracle(words, references):
    return nltk_bleu(references, words, smoothing_function=SMOOTH)


@settings(max_examples=60, deadline=None)
@given(sentences, sentences)
def test_bleu_to_set_is_nltks(samples, references):
    expected = [oracle(words, references) for words in samples]
    np.testing.assert_allclose(bleu_to_set(samples, references), expected, rtol=1e-9)


@settings(max_examples=60, deadline=None)
@given(sentences)
def test_self_bleu_leaves_the_sample_out(samples):
    expected = [oracle(w, samples[:i] + samples[i + 1 :]) for i, w in enumerate(samples)]
    np.testing.assert_allclose(self_bleu(samples), expected, rtol=1e-9)


def test_an_empty_sample_scores_nothing():
    assert bleu_to_set([[], ["a"]], [["a", "b"]])[0] == 0.0


def test_nearest_length_prefers_the_shorter():
    assert nearest_length(5, np.array([3, 7])) == 3
    assert nearest_length(6, np.array([3, 7])) == 7


def test_distinct_counts_kinds_over_tokens():
    assert distinct([["a", "a", "a"]]) == pytest.approx(1 / 3)
    assert distinct([["a", "b", "a", "b"]], 2) == pytest.approx(2 / 3)
    assert distinct([["a"]], 2) == 0.0


def test_minimum_bayes_risk_is_the_largest_summed_bleu():
    rng = np.random.default_rng(0)
    for _ in range(10):
        rows = [[str(w) for w in rng.integers(3, size=rng.integers(4, 8))] for _ in range(5)]
        totals = [
            sum(oracle(words, [other]) for j, other in enumerate(rows) if j != i)
            for i, words in enumerate(rows)
        ]
        assert totals[minimum_bayes_risk(rows)] == pytest.approx(max(totals))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="'a b' is one string; give lists of words"):
        bleu_to_set(["a b"], [["a"]])
    with pytest.raises(ValueError, match="0 references; give at least 1"):
        bleu_to_set([["a"]], [])
    with pytest.raises(ValueError, match="1 samples; give at least 2"):
        self_bleu([["a"]])
