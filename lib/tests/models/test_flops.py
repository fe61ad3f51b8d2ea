"""The FLOPs formula against torch's own counter on real runs."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForSequenceClassification, BertModel

from compendium.models.flops import head_flops, layer_flops, transformer_flops


def some_config(**options):
    sizes = dict(vocab_size=40, hidden_size=24, num_hidden_layers=3, num_attention_heads=3)
    sizes |= dict(intermediate_size=56, attn_implementation="eager")
    return BertConfig(**(sizes | options))


def counted(run):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("length", [1, 2, 13, 64])
@pytest.mark.parametrize("num_labels", [1, 2, 7])
def test_a_classifier_is_counted_exactly(length, num_labels):
    config = some_config(num_labels=num_labels)
    model = BertForSequenceClassification(config).eval()
    ids = torch.ones(1, length, dtype=torch.long)
    assert counted(lambda: model(ids)) == transformer_flops(
        config, length, 3, num_labels=num_labels
    )


def test_layers_alone_and_a_batch():
    config = some_config()
    model = BertModel(config, add_pooling_layer=False).eval()
    ids = torch.ones(4, 9, dtype=torch.long)
    assert counted(lambda: model(ids)) == transformer_flops(config, [9] * 4, 3).sum()


def test_fewer_queries_than_keys():
    """A layer by hand whose queries are some of the tokens."""
    config, keys, queries = some_config(), 11, 4
    d, inner = config.hidden_size, config.intermediate_size
    x, square = torch.randn(keys, d), torch.randn(d, d)

    def layer():
        q, k, v = x[:queries] @ square, x @ square, x @ square
        heads = (t.view(-1, 3, d // 3).transpose(0, 1) for t in (q, k, v))
        q, k, v = heads
        mixed = ((q @ k.transpose(1, 2)).softmax(-1) @ v).transpose(0, 1).reshape(
            queries, d
        ) @ square
        return mixed @ torch.randn(d, inner) @ torch.randn(inner, d)

    assert counted(layer) == layer_flops(config, keys, queries)
    assert layer_flops(config, keys, 0) == 4 * keys * d * d  # keys and values: the floor


def test_the_textbook_formula():
    config = some_config(intermediate_size=4 * 24)
    for length in (1, 10, 100):
        assert layer_flops(config, length) == 24 * length * 24**2 + 4 * length**2 * 24


def test_every_exit_that_was_passed_is_paid_for():
    config = some_config()
    lengths, left = np.array([5, 5, 8]), np.array([1, 3, 2])
    found = transformer_flops(config, lengths, left, exits=[1, 3], num_labels=4)
    layers = left * layer_flops(config, lengths)
    np.testing.assert_array_equal(found - layers, np.array([1, 2, 1]) * head_flops(config, 4))
    static = transformer_flops(config, lengths, left, num_labels=4)
    np.testing.assert_array_equal(static - layers, head_flops(config, 4))
