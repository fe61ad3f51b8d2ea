"""Attachment scores and tree statistics against definitions and networkx."""

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compendium.metrics.trees import (
    aspect_sentiment_distance,
    las,
    neighbour_ratio,
    tree_distance,
    tree_distances,
    uas,
    uuas,
)
from compendium.models.trees import chain, random_tree


@st.composite
def tree_pairs(draw):
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    return [[random_tree(n, rng).tolist() for n in lengths] for _ in range(2)]


def edges(heads):
    return {frozenset((d, h)) for d, h in enumerate(heads, 1) if h}


@settings(deadline=None, max_examples=60)
@given(tree_pairs())
def test_scores_by_definition(pair):
    gold, predicted = pair
    words = [
        (g, p) for a, b in zip(gold, predicted, strict=True) for g, p in zip(a, b, strict=True)
    ]
    assert np.isclose(uas(gold, predicted), np.mean([g == p for g, p in words]))
    found = sum(len(edges(a) & edges(b)) for a, b in zip(gold, predicted, strict=True))
    total = sum(len(edges(a)) for a in gold)
    if total:
        assert np.isclose(uuas(gold, predicted), found / total)
        assert np.isclose(uuas(predicted, gold), uuas(gold, predicted))
    else:
        assert np.isnan(uuas(gold, predicted))
    assert uas(gold, gold) == 1


def test_left_out_words_and_relations():
    gold, predicted = [[2, 0, 2]], [[2, 0, 1]]
    assert uas(gold, predicted) == pytest.approx(2 / 3)
    assert uas(gold, predicted, [[True, True, False]]) == 1
    assert uuas(gold, predicted) == 0.5 and uuas(gold, predicted, [[True, True, False]]) == 1
    relations = [["det", "root", "obj"]]
    assert las(gold, gold, relations, [["det", "root", "iobj"]]) == pytest.approx(2 / 3)
    assert las(gold, predicted, relations, relations) == pytest.approx(2 / 3)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 15), st.integers(0, 10**6))
def test_distances_equal_networkx(length, seed):
    heads = random_tree(length, np.random.default_rng(seed))
    graph = nx.Graph()
    graph.add_nodes_from(range(1, length + 1))
    graph.add_edges_from((d, int(h)) for d, h in enumerate(heads, 1) if h)
    expected = nx.floyd_warshall_numpy(graph, nodelist=range(1, length + 1))
    assert (tree_distances(heads) == expected).all()
    words = [0, length // 2]
    assert (tree_distance(heads, words) == expected[words].min(0)).all()


def test_statistics_of_known_trees():
    assert neighbour_ratio([chain(5), chain(4, "right")]) == 1
    assert neighbour_ratio([[0, 1, 1, 1]]) == pytest.approx(1 / 3)
    assert np.isnan(neighbour_ratio([[0]]))
    star = [0, 1, 1, 1]
    assert aspect_sentiment_distance([star], [[1]], [[2, 3]]) == 2
    assert aspect_sentiment_distance([star, chain(4)], [[0], [0]], [[3], [3]]) == 2
    assert aspect_sentiment_distance([star, star], [[0], [1]], [[], [2]]) == 2
    assert aspect_sentiment_distance([[0, 0, 1]], [[0]], [[1, 2]]) == 1
    assert np.isnan(aspect_sentiment_distance([star], [[0]], [[]]))


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="sentence 1 has 2 gold heads for 3"):
        uas([[0], [0, 1]], [[0], [0, 1, 1]])
    with pytest.raises(ValueError, match="1 gold sentences for 2"):
        uuas([[0]], [[0], [0]])
    with pytest.raises(ValueError, match="sentence of 2"):
        tree_distance([0, 1], [2])
    with pytest.raises(ValueError, match="give numbers from 0"):
        tree_distance([0, 1], [])
