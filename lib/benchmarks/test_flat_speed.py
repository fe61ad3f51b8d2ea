"""A training step of FLAT with unique relations against the naive dense relative positions.

Both models have the same weights, the same batch and the same output; the ratio is of tokens per second, and peak memory
is compared in the same run.
"""

import copy
import statistics
import time

import numpy as np
import pytest
import torch

from compendium.chinese.flat import FlatConfig, FlatForTokenClassification, FlatLatticeCollator
from compendium.experiment.reproducible import measured, peak_memory, reset_peak_memory

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def some_batch(batch_size=16, length=60, words_per_character=0.5, num_labels=13):
    """Sentences as long and as full of words as those of Resume NER."""
    rng = np.random.default_rng(0)
    features = []
    for _ in range(batch_size):
        n = int(rng.integers(length // 2, length + 1))
        m = int(n * words_per_character)
        width = rng.choice([1, 2, 3, 5], p=[0.7, 0.15, 0.1, 0.05], size=m)
        head = rng.integers(0, n - width)
        features.append(
            {
                "char_ids": rng.integers(1, 2000, n).tolist(),
                "bigram_ids": rng.integers(1, 5000, n).tolist(),
                "labels": rng.integers(0, num_labels, n).tolist(),
                "word_ids": rng.integers(2000, 4000, m).tolist(),
                "word_head": head.tolist(),
                "word_tail": (head + width).tolist(),
            }
        )
    batch = FlatLatticeCollator()(features)
    return {name: value.to(DEVICE) for name, value in batch.items()}


def two_models(four_pos_fusion, num_layers):
    torch.manual_seed(0)
    config = FlatConfig(
        vocab_size=4000,
        bigram_vocab_size=5000,
        hidden_size=128,
        num_heads=8,
        intermediate_size=384,
        num_layers=num_layers,
        four_pos_fusion=four_pos_fusion,
        num_labels=13,
    )
    fast = FlatForTokenClassification(config).to(DEVICE)
    dense = copy.deepcopy(fast)
    dense.position.unique = False
    return fast, dense


def training_step(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def tokens_per_second(model, batch, repeats=7):
    training_step(model, batch)
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        training_step(model, batch)
        times.append(time.perf_counter() - begin)
    return int(batch["attention_mask"].sum()) / statistics.median(times)


def memory_of_step(model, batch):
    """Bytes that a step needs above what is there before it."""
    reset_peak_memory(DEVICE)
    before = peak_memory(DEVICE)
    with measured(DEVICE) as cost:
        training_step(model, batch)
    return cost.peak_memory_bytes - before


@pytest.mark.parametrize(("four_pos_fusion", "num_layers"), [("ff", 1), ("ff_two", 1), ("ff", 2)])
def test_flat_against_dense_positions(four_pos_fusion, num_layers):
    batch = some_batch()
    fast, dense = two_models(four_pos_fusion, num_layers)
    fast_memory, dense_memory = memory_of_step(fast, batch), memory_of_step(dense, batch)
    a, b = tokens_per_second(fast, batch), tokens_per_second(dense, batch)
    print(
        f"{four_pos_fusion}, {num_layers} layer(s): {a:.0f} tokens/s, dense {b:.0f}, x{a / b:.2f}; "
        f"{fast_memory / 2**20:.0f} MiB, dense {dense_memory / 2**20:.0f} MiB"
    )
    fast.eval(), dense.eval()
    torch.testing.assert_close(fast(**batch).logits, dense(**batch).logits, rtol=1e-4, atol=1e-4)
    assert a / b >= 2.0, f"only {a / b:.2f} times as fast as dense positions"
    assert fast_memory < dense_memory
