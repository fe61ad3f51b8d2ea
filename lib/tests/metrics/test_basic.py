import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score

from compendium.metrics.basic import accuracy, pearson, spearman


def test_accuracy_equals_sklearn():
    rng = np.random.default_rng(0)
    gold, predicted = rng.integers(3, size=(2, 200))
    assert accuracy(gold, predicted) == accuracy_score(gold, predicted)


def test_correlations_from_their_definitions():
    rng = np.random.default_rng(0)
    x = rng.integers(6, size=80).astype(float)
    y = x + rng.integers(4, size=80)
    np.testing.assert_allclose(pearson(x, y), np.corrcoef(x, y)[0, 1])
    ranks = stats.rankdata(x), stats.rankdata(y)
    np.testing.assert_allclose(spearman(x, y), np.corrcoef(*ranks)[0, 1])
    assert spearman(x, y) != pearson(x, y)


def test_constant_list_has_no_correlation():
    assert np.isnan(pearson([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]))
    assert np.isnan(spearman([1.0], [2.0]))


@pytest.mark.parametrize("metric", [accuracy, pearson, spearman])
@pytest.mark.parametrize(("a", "b"), [([1, 2], [1, 2, 3]), ([], []), ([[1], [2]], [1, 2])])
def test_lists_must_pair_up(metric, a, b):
    with pytest.raises(ValueError, match="do not pair up"):
        metric(a, b)
