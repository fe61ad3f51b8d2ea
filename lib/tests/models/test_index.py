"""Exact search: both backends and BM25 against full sorts, exclusion by id, ties, errors."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compendium.models.index import BM25Index, DenseIndex, top_positions, words_of

BACKENDS = ["torch", *(["faiss"] if find_spec("faiss") else [])]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", ["inner_product", "cosine"])
def test_dense_search_equals_a_full_sort(backend, metric):
    rng = np.random.default_rng(0)
    documents, queries = rng.normal(size=(300, 7)), rng.normal(size=(20, 7))
    ids = rng.permutation(1000)[:300]
    scores = queries @ documents.T
    if metric == "cosine":
        scores /= np.linalg.norm(documents, axis=1) * np.linalg.norm(queries, axis=1)[:, None]
    order = np.argsort(-scores, axis=1)[:, :9]
    hits = DenseIndex(documents, ids, metric, backend).search(queries, 9)
    assert (hits.ids == ids[order]).all()
    np.testing.assert_allclose(hits.scores, np.take_along_axis(scores, order, 1), rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_duplicates_do_not_hide_one_another(backend):
    """With equal vectors the first hit need not be the query itself; excluding goes by id."""
    vectors = np.array([[1.0, 0.0], [1.0, 0.0], [0.9, 0.0], [0.0, 1.0]])
    hits = DenseIndex(vectors, backend=backend).search(vectors, 2, exclude=range(4))
    assert [set(row) for row in hits.ids[:2]] == [{1, 2}, {0, 2}]
    assert all(query not in row for query, row in enumerate(hits.ids.tolist()))


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=8),
    st.integers(1, 10),
    st.lists(st.integers(0, 9), max_size=4),
)
def test_top_positions_breaks_ties_by_position(values, k, _):
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    assert top_positions(np.array(values, dtype=float), k).tolist() == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_lists_of_excluded_ids_and_too_few_documents(backend):
    index = DenseIndex(torch.eye(4), ids=[10, 11, 12, 13], backend=backend)
    hits = index.search(np.array([[4.0, 3, 2, 1], [1, 2, 3, 4]]), 3, exclude=[[10, 12], [13]])
    assert hits.ids.tolist() == [[11, 13, -1], [12, 11, 10]]
    assert hits.scores[0].tolist() == [3, 1, -np.inf]


TEXTS = ["a b c", "a a d", "b", "", "the end of the text", "c c c c a"]


@given(st.lists(st.sampled_from("abcdz"), max_size=5), st.floats(0.5, 2.5), st.floats(0, 1))
def test_bm25_equals_its_formula(query, k1, b):
    index = BM25Index(TEXTS, k1=k1, b=b)
    rows = [words_of(text) for text in TEXTS]
    average = np.mean([len(row) for row in rows])
    expected = np.zeros(len(rows))
    for word in query:
        n = sum(word in row for row in rows)
        idf = np.log(1 + (len(rows) - n + 0.5) / (n + 0.5))
        for i, row in enumerate(rows):
            f = row.count(word)
            expected[i] += idf * f / (f + k1 * (1 - b + b * len(row) / average)) if f else 0.0
    np.testing.assert_allclose(index.scores(" ".join(query)), expected, rtol=1e-4, atol=1e-6)
    hits = index.search([" ".join(query)], 3, exclude=[[0]])
    assert 0 not in hits.ids and hits.ids.shape == (1, 3)


def test_bm25_without_any_word():
    hits = BM25Index(["", "?"]).search(["x"], 5)
    assert hits.ids.tolist() == [[0, 1, -1, -1, -1]]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="did you mean 'cosine'"):
        DenseIndex(np.eye(2), metric="cosin")
    with pytest.raises(ValueError, match="backend 'fais' is unknown"):
        DenseIndex(np.eye(2), backend="fais")
    with pytest.raises(ValueError, match="3 ids for 2 documents"):
        DenseIndex(np.eye(2), ids=[1, 2, 3])
    with pytest.raises(ValueError, match="different whole numbers"):
        DenseIndex(np.eye(2), ids=[1, 1])
    with pytest.raises(ValueError, match="3 dimensions, the index 2"):
        DenseIndex(np.eye(2)).search(np.ones((1, 3)), 1)
    with pytest.raises(ValueError, match="exclude has 1 entries for 2"):
        DenseIndex(np.eye(2)).search(np.eye(2), 1, exclude=[0])
    with pytest.raises(ValueError, match="give a list of texts"):
        BM25Index(["a"]).search("a", 1)
    with pytest.raises(ValueError, match="shape"):
        DenseIndex(np.ones(3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_finds_the_same():
    rng = np.random.default_rng(0)
    documents, queries = rng.normal(size=(500, 16)), rng.normal(size=(9, 16))
    there, here = (DenseIndex(documents, device=d).search(queries, 5) for d in ("cuda", "cpu"))
    assert (there.ids == here.ids).all()
