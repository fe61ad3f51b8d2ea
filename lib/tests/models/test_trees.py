"""Tree decoders against enumeration and networkx, properties, bad input."""

import itertools

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compendium.models.trees import (
    chain,
    eisner,
    is_projective,
    is_tree,
    maximum_arborescence,
    random_tree,
)


def score(scores, heads):
    return scores[np.arange(1, len(scores)), heads].sum()


def reaches_root(heads):
    """The definition, one word after another."""
    for word in range(1, len(heads) + 1):
        seen = set()
        while word:
            if word in seen:
                return False
            seen.add(word)
            word = heads[word - 1]
    return True


def arcs_cross(heads):
    spans = [tuple(sorted((d, h))) for d, h in enumerate(heads, 1)]
    return any(a < c < b < d for a, b in spans for c, d in spans)


def all_heads(length):
    return itertools.product(range(length + 1), repeat=length)


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_trees_and_projectivity_by_definition(length):
    for heads in all_heads(length):
        assert is_tree(heads) == reaches_root(heads)
        assert is_projective(heads) == (not arcs_cross(heads))
        assert is_tree(heads, single_root=True) == (reaches_root(heads) and heads.count(0) == 1)


# numbers of rooted labelled trees on n + 1 nodes, of those with one root child, of projective ones
@pytest.mark.parametrize(("length", "trees", "single"), [(3, 16, 9), (4, 125, 64)])
def test_counting_trees_gives_cayleys_formula(length, trees, single):
    every = list(all_heads(length))
    assert sum(map(is_tree, every)) == trees == (length + 1) ** (length - 1)
    assert (
        sum(is_tree(heads, single_root=True) for heads in every) == single == length ** (length - 1)
    )


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(0, 10**6), st.booleans(), st.booleans())
def test_decoders_equal_enumeration(length, seed, single_root, ties):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(length + 1, length + 1))
    scores = np.round(scores) if ties else scores
    trees = [heads for heads in all_heads(length) if is_tree(heads, single_root)]
    free = maximum_arborescence(scores, single_root)
    assert is_tree(free, single_root)
    assert np.isclose(score(scores, free), max(score(scores, heads) for heads in trees))
    projective = eisner(scores, single_root)
    assert is_tree(projective, single_root) and is_projective(projective)
    best = max(score(scores, heads) for heads in trees if is_projective(heads))
    assert np.isclose(score(scores, projective), best)


@settings(deadline=None, max_examples=15)
@given(st.integers(2, 30), st.integers(0, 10**6))
def test_arborescence_equals_networkx(length, seed):
    scores = np.random.default_rng(seed).normal(size=(length + 1, length + 1))
    graph = nx.DiGraph()
    pairs = itertools.product(range(1, length + 1), range(length + 1))
    graph.add_weighted_edges_from((h, d, scores[d, h]) for d, h in pairs if h != d)
    expected = nx.maximum_spanning_arborescence(graph).size("weight")
    assert np.isclose(score(scores, maximum_arborescence(scores)), expected)


def test_cycles_within_cycles():
    """Every word prefers a neighbour, and every pair of words the next pair."""
    scores = np.full((9, 9), -100.0)
    for first in range(1, 9, 2):
        scores[first, first + 1] = scores[first + 1, first] = 10.0
    for level in (2, 4):
        for block in range(0, 8, 2 * level):
            scores[block + 1, block + level + 1] = scores[block + level + 1, block + 1] = (
                9.0 - level
            )
    scores[5, 0] = 0.0
    heads = maximum_arborescence(scores)
    assert is_tree(heads) and np.flatnonzero(heads == 0).tolist() == [4]
    assert score(scores, heads) == 4 * 10 + 2 * 7 + 5


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.integers(0, 10**6))
def test_a_tree_is_found_from_its_own_arcs(length, seed):
    rng = np.random.default_rng(seed)
    heads = random_tree(length, rng)
    assert is_tree(heads, single_root=True)
    scores = rng.normal(size=(length + 1, length + 1))
    scores[np.arange(1, length + 1), heads] += 100
    assert (maximum_arborescence(scores) == heads).all()
    assert (eisner(scores) == heads).all() == is_projective(heads)


def test_forbidden_arcs_are_avoided():
    scores = np.full((4, 4), -np.inf)
    for dependent, head in ((1, 2), (2, 3), (3, 0), (1, 3)):
        scores[dependent, head] = 1.0
    for decode in (maximum_arborescence, eisner):
        heads = decode(scores)
        assert np.isfinite(scores[np.arange(1, 4), heads]).all()


def test_random_trees_are_uniform():
    """Of the 9 rooted trees on 3 words each comes about equally often."""
    rng = np.random.default_rng(0)
    counts = {}
    for _ in range(1800):
        heads = tuple(random_tree(3, rng).tolist())
        counts[heads] = counts.get(heads, 0) + 1
    assert len(counts) == 9 and min(counts.values()) > 140 and max(counts.values()) < 260


def test_bad_scores_and_directions_are_named():
    with pytest.raises(ValueError, match=r"shape \(2, 3\)"):
        maximum_arborescence(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="nan"):
        eisner(np.full((3, 3), np.nan))
    with pytest.raises(ValueError, match="did you mean 'left'"):
        chain(3, "lef")
    assert len(maximum_arborescence(np.zeros((1, 1)))) == len(eisner(np.zeros((1, 1)))) == 0
