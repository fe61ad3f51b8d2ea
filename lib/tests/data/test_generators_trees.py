"""The grammar with heads: trees are trees, opinions hang on their aspects, draws repeat, errors are named."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compendium.data.generators_trees import (
    POLARITIES,
    REVIEW_RULES,
    REVIEW_WORDS,
    HeadedGrammar,
    aspect_reviews,
    parse_headed,
)
from compendium.models.trees import is_projective, is_tree


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 1.0]))
def test_reviews_have_trees_and_opinions(seed, share):
    for row in aspect_reviews(20, seed, share):
        assert is_tree(row["heads"], single_root=True) and is_projective(row["heads"])
        assert len(row["heads"]) == len(row["tokens"])
        assert (
            len(row["aspects"])
            == len(row["opinions"])
            == (1 if share == 1 else len(row["aspects"]))
        )
        for aspect, opinion in zip(row["aspects"], row["opinions"], strict=True):
            polarity = POLARITIES[aspect["polarity"]]
            assert row["tokens"][opinion] in REVIEW_WORDS[polarity]
            assert row["tokens"][aspect["start"]] in REVIEW_WORDS["aspect"]
            place, heads = aspect["start"], row["heads"]
            assert heads[place] == opinion + 1 or heads[opinion] == place + 1
        if len(row["aspects"]) == 2:
            assert row["aspects"][0]["polarity"] != row["aspects"][1]["polarity"]


def test_the_share_of_simple_sentences():
    rows = aspect_reviews(600, 1, 0.4)
    assert 0.34 < np.mean([len(aspects) == 1 for aspects in rows["aspects"]]) < 0.46
    assert aspect_reviews(10, 5)[:] == aspect_reviews(10, 5)[:]
    with pytest.raises(ValueError, match=r"simple_share is 1\.5"):
        aspect_reviews(1, simple_share=1.5)


def test_heads_follow_the_marks():
    grammar = HeadedGrammar({"s": ["a *{x} d"], "x": ["b *c"]}, {})
    sentence = grammar.sentence("s", np.random.default_rng(0))
    assert sentence.tokens == list("abcd") and sentence.heads == [3, 3, 0, 3]


def test_bad_grammars_are_named():
    for text in ("the noun", "*the *noun"):
        with pytest.raises(ValueError, match=f"marks {text.count('*')} heads"):
            parse_headed(text)
    with pytest.raises(
        ValueError, match="symbol of the grammar 'nown' is unknown; did you mean 'noun'"
    ):
        HeadedGrammar({"s": ["the *{nown}"]}, {"noun": ["cat"]})
    grammar = HeadedGrammar({"s": ["the *{noun}"]}, {}, ["noun"])
    with pytest.raises(ValueError, match="slot 'noun' is not filled"):
        grammar.sentence("s", np.random.default_rng(0))


def test_every_rule_is_reachable():
    used = {
        piece.name
        for rows in REVIEW_RULES.values()
        for text in rows
        for piece in parse_headed(text).pieces
    }
    assert set(REVIEW_RULES) - used == {"double", "single"} and set(REVIEW_WORDS) - used == set(
        POLARITIES
    ) | {"aspect"}
