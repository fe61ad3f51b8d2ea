"""Biaffine scorers against torch's bilinear form and explicit loops."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from compendium.models.biaffine import Biaffine, MultiHeadBiaffine, append_one


@pytest.mark.parametrize("left_bias", [True, False])
@pytest.mark.parametrize("right_bias", [True, False])
def test_biaffine_equals_bilinear_on_every_pair(left_bias, right_bias):
    torch.manual_seed(0)
    scorer = Biaffine(5, 3, 4, left_bias=left_bias, right_bias=right_bias)
    left, right = torch.randn(2, 6, 5), torch.randn(2, 7, 3)
    scores = scorer(left, right)
    x = append_one(left) if left_bias else left
    y = append_one(right) if right_bias else right
    for i, j in itertools.product(range(6), range(7)):
        expected = F.bilinear(x[:, i].contiguous(), y[:, j].contiguous(), scorer.weight)
        torch.testing.assert_close(scores[:, :, i, j], expected)


def test_one_head_equals_bilinear():
    torch.manual_seed(0)
    scorer = MultiHeadBiaffine(6, 4, num_heads=1)
    x, y = torch.randn(3, 5, 6), torch.randn(3, 5, 6)
    for i, j in itertools.product(range(5), range(5)):
        expected = F.bilinear(x[:, i].contiguous(), y[:, j].contiguous(), scorer.weight[0])
        torch.testing.assert_close(scorer(x, y)[:, :, i, j], expected)


@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_heads_equal_explicit_loops(num_heads):
    torch.manual_seed(0)
    scorer = MultiHeadBiaffine(8, 12, num_heads=num_heads)
    x, y = torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    part, channels = 8 // num_heads, 12 // num_heads
    scores = scorer(x, y)
    assert scores.shape == (2, 12, 3, 4)
    for b, k, c in itertools.product(range(2), range(num_heads), range(channels)):
        for i, j in itertools.product(range(3), range(4)):
            piece = slice(k * part, (k + 1) * part)
            expected = x[b, i, piece] @ scorer.weight[k, c] @ y[b, j, piece]
            torch.testing.assert_close(scores[b, k * channels + c, i, j], expected)


def test_heads_divide_the_parameters():
    sizes = [MultiHeadBiaffine(32, 16, num_heads=k).weight.numel() for k in (1, 2, 4)]
    assert sizes == [16 * 32**2 // k**2 for k in (1, 2, 4)]


def test_bad_numbers_of_heads_are_named():
    with pytest.raises(ValueError, match="num_heads=3 does not divide in_features=8"):
        MultiHeadBiaffine(8, 6, num_heads=3)
    with pytest.raises(ValueError, match="num_heads=4 does not divide out_features=6"):
        MultiHeadBiaffine(8, 6, num_heads=4)
    with pytest.raises(ValueError, match="num_heads=0"):
        MultiHeadBiaffine(8, 6, num_heads=0)
