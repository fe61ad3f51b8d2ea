"""Span metrics against seqeval (hypothesis), round trips, nested spans, bad input."""

import itertools
import warnings

import numpy as np
import pytest
import seqeval.metrics as seqeval
from hypothesis import given
from hypothesis import strategies as st

from compendium.metrics.spans import (
    SCHEMES,
    Span,
    entity_f1,
    f1_of_counts,
    nested_counts,
    nested_prf,
    overlapping,
    span_counts,
    span_scores,
    span_scores_by_type,
    spans_to_tags,
    tags_to_spans,
)

TYPES = ["PER", "LOC", "A-B"]


def tag_strategy(letters: str):
    return st.sampled_from(["O", *(f"{a}-{b}" for a in letters for b in TYPES), *letters])


def sentence_pairs(letters: str):
    tag = tag_strategy(letters)
    pair = st.integers(1, 9).flatmap(
        lambda n: st.tuples(
            st.lists(tag, min_size=n, max_size=n), st.lists(tag, min_size=n, max_size=n)
        )
    )
    return st.lists(pair, min_size=1, max_size=4)


@pytest.mark.parametrize("letters", ["BI", "BIES"])
def test_scores_equal_seqeval_on_any_tags(letters):
    @given(sentence_pairs(letters))
    def check(pairs):
        gold, predicted = ([list(p[side]) for p in pairs] for side in (0, 1))
        ours = entity_f1(gold, predicted)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert ours["precision"] == pytest.approx(seqeval.precision_score(gold, predicted))
            assert ours["recall"] == pytest.approx(seqeval.recall_score(gold, predicted))
            assert ours["f1"] == pytest.approx(seqeval.f1_score(gold, predicted))
            report = seqeval.classification_report(gold, predicted, output_dict=True)
        spans = [[tags_to_spans(tags) for tags in side] for side in (gold, predicted)]
        by_type = span_scores_by_type(*spans)
        for kind, row in report.items():
            if not kind.endswith(" avg"):
                assert by_type[kind]["f1"] == pytest.approx(row["f1-score"])
                assert by_type[kind]["support"] == row["support"]

    check()


@st.composite
def flat_spans(draw):
    cuts = sorted(draw(st.sets(st.integers(0, 15), min_size=2, max_size=8)))
    pieces = list(itertools.pairwise(cuts))
    kept = draw(st.lists(st.sampled_from(pieces), unique=True))
    return [Span(a, b, draw(st.sampled_from(TYPES))) for a, b in sorted(kept)]


@given(flat_spans(), st.sampled_from(sorted(SCHEMES)))
def test_round_trip(spans, scheme):
    tags = spans_to_tags(spans, 15, scheme)
    assert tags_to_spans(tags) == spans
    assert {tag[0] for tag in tags} <= set(SCHEMES[scheme]) | {"O"}


def test_middle_letter_is_read():
    assert tags_to_spans(["B-X", "M-X", "E-X", "S-X"]) == [(0, 3, "X"), (3, 4, "X")]


def test_nested_spans_are_members_of_the_set():
    gold = [[(0, 6, "ORG"), (0, 2, "LOC"), (0, 2, "ORG")]]
    predicted = [[(0, 6, "ORG"), (0, 2, "LOC"), (0, 2, "LOC"), (1, 2, "LOC")]]
    assert span_counts(gold, predicted).tolist() == [[2, 3, 3]]
    assert span_scores(gold, predicted)["f1"] == pytest.approx(2 / 3)


def test_f1_of_counts_is_vectorised():
    counts = np.array([[[2, 4, 4], [0, 0, 0]], [[1, 1, 1], [0, 3, 1]]])
    np.testing.assert_allclose(f1_of_counts(counts), [[0.5, 0.0], [1.0, 0.0]])
    np.testing.assert_allclose(f1_of_counts(counts / 7.0), f1_of_counts(counts))


def test_no_spans_at_all():
    assert span_scores([[]], [[]]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    assert span_counts([], []).shape == (0, 3)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="scheme 'IOB1' is unknown"):
        spans_to_tags([], 3, "IOB1")
    with pytest.raises(ValueError, match="does not fit a sentence of 3"):
        spans_to_tags([(2, 4, "X")], 3)
    with pytest.raises(ValueError, match="overlaps"):
        spans_to_tags([(0, 2, "X"), (1, 3, "Y")], 3)
    with pytest.raises(ValueError, match="tag 'X-PER'"):
        tags_to_spans(["O", "X-PER"])
    with pytest.raises(ValueError, match="sentence 0 has 2 gold tags for 1"):
        entity_f1([["O", "O"]], [["O"]])
    with pytest.raises(ValueError, match="1 gold sentences for 2"):
        span_scores([[]], [[], []])


# --- nested and flat entities ----------------------------------------------------------------

span_sets = st.sets(
    st.tuples(st.integers(0, 6), st.integers(1, 4), st.sampled_from("XY")).map(
        lambda t: (t[0], t[0] + t[1], t[2])
    ),
    max_size=7,
)


@given(span_sets)
def test_overlapping_equals_its_definition(spans):
    expected = {
        a for a in spans if any(a != b and set(range(*a[:2])) & set(range(*b[:2])) for b in spans)
    }
    assert overlapping(spans) == expected
    assert overlapping([*spans, *spans]) == expected


@given(st.lists(st.tuples(span_sets, span_sets), min_size=1, max_size=4))
def test_nested_and_flat_add_up(pairs):
    gold, predicted = ([list(side) for side in sides] for sides in zip(*pairs, strict=True))
    counts = nested_counts(gold, predicted)
    total = span_counts(gold, predicted)
    both = counts.reshape(len(pairs), 2, 4).sum(1)
    assert (both == total[:, [0, 2, 0, 1]]).all()
    scores = nested_prf(gold, predicted)
    nested, flat = counts.sum(0)[:4], counts.sum(0)[4:]
    for name, (found, of, correct, claimed) in (("nested", nested), ("flat", flat)):
        assert scores[f"{name}_recall"] == (found / of if of else 0.0)
        assert scores[f"{name}_precision"] == (correct / claimed if claimed else 0.0)


def test_a_span_can_be_nested_on_one_side_only():
    gold, predicted = [[(0, 3, "X"), (1, 2, "Y")]], [[(0, 3, "X"), (5, 6, "Y")]]
    assert nested_prf(gold, predicted) == {
        "nested_recall": 0.5,
        "nested_precision": 0.0,
        "flat_recall": 0.0,
        "flat_precision": 0.5,
    }
    with pytest.raises(ValueError, match="1 gold sentences for 0"):
        nested_prf(gold, [])
