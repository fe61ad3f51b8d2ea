"""Perturbed masking: forward passes and wall time against the double loop over ordered pairs, equal output.

The peer is the definition as a batched program: for every word i and every other word j one pass for x∖{i} and one for
x∖{i, j}. A second peer computes x∖{i} once per word; all are measured in the same run.
"""

import time

import numpy as np
import pytest
import torch

from compendium.experiment.reproducible import resolve_device
from compendium.meaning.induced_trees import encode_words, impact_matrices
from compendium.zoo.store import ZooError, load_model, load_tokenizer

DEVICE, BATCH, LAYER = resolve_device("auto"), 64, -2
SENTENCES = [
    ["the", "old", "printer", "with", "the", "new", "menu", "is", "always", "slow"],
    [
        "the",
        "server",
        "near",
        "the",
        "small",
        "table",
        "that",
        "we",
        "use",
        "was",
        "really",
        "good",
        "but",
        "the",
        "other",
        "screen",
        "is",
        "so",
        "poor",
    ],
    ["unlike", "the", "new", "editor", "the", "library", "we", "found", "here", "is", "simple"],
]


@pytest.fixture(scope="module")
def zoo():
    try:
        return load_model("bert-en").to(DEVICE).eval(), load_tokenizer("bert-en")
    except ZooError as error:
        pytest.skip(str(error))


class Passes:
    """Counts the sentences that a model reads."""

    def __init__(self, model):
        self.rows = 0
        self.handle = model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs):
        self.rows += len(kwargs["input_ids"])


def double_loop(model, tokenizer, words, reuse):
    """F as its definition says, i ≠ j; with `reuse`, x∖{i} once per word instead of once per pair."""
    encoded, n = encode_words(tokenizer, words), len(words)
    owner, ids = np.array(encoded.owner), np.array(encoded.input_ids)
    pairs = [(i, j) for i in range(1, n + 1) for j in range(1, n + 1) if i != j]
    wanted = [(i, {i}) for i in range(1, n + 1) for _ in range(1 if reuse else n - 1)]
    wanted += [(i, {i, j}) for i, j in pairs]
    rows = [np.where(np.isin(owner, list(h)), tokenizer.mask_token_id, ids) for _, h in wanted]
    inputs, states = torch.from_numpy(np.stack(rows)).to(DEVICE), []
    with torch.no_grad():
        for start in range(0, len(inputs), BATCH):
            batch = inputs[start : start + BATCH]
            mask = torch.ones_like(batch)
            output = model(input_ids=batch, attention_mask=mask, output_hidden_states=True)
            places = wanted[start : start + BATCH]
            for row, (i, _) in zip(output.hidden_states[LAYER], places, strict=True):
                states.append(row[torch.from_numpy(owner == i).to(DEVICE)].mean(0))
    states = torch.stack(states)
    alone = states[: -len(pairs)].view(n, -1, states.shape[-1])
    impact = np.zeros((n, n))
    apart = (alone - states[-len(pairs) :].view(n, n - 1, -1)).norm(dim=-1)
    impact[tuple(np.array(pairs).T - 1)] = apart.cpu().numpy().ravel()
    return impact


def timed(function):
    function()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = function()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return result, float(np.median(seconds))


def test_half_the_passes_of_the_double_loop(zoo):
    model, tokenizer = zoo
    counter = Passes(model)
    results, seconds, rows = {}, {}, {}
    ways = {
        "ours": lambda: impact_matrices(model, tokenizer, SENTENCES, LAYER, batch_size=BATCH),
        "reuse": lambda: [double_loop(model, tokenizer, words, True) for words in SENTENCES],
        "naive": lambda: [double_loop(model, tokenizer, words, False) for words in SENTENCES],
    }
    for name, way in ways.items():
        counter.rows = 0
        way()
        rows[name] = counter.rows
        results[name], seconds[name] = timed(way)
    counter.handle.remove()
    print(
        "; ".join(f"{name}: {rows[name]} passes, {1000 * seconds[name]:.0f} ms" for name in ways)
        + f"; x{rows['naive'] / rows['ours']:.2f} and x{rows['reuse'] / rows['ours']:.2f} fewer passes, "
        + f"x{seconds['naive'] / seconds['ours']:.2f} and x{seconds['reuse'] / seconds['ours']:.2f} faster"
    )
    for ours, reuse, naive in zip(*results.values(), strict=True):
        np.testing.assert_allclose(ours[1:, 1:], naive, atol=5e-4)
        np.testing.assert_allclose(reuse, naive, atol=5e-4)
    assert rows["ours"] == sum(len(words) * (len(words) + 1) // 2 for words in SENTENCES)
    assert rows["naive"] == sum(2 * len(words) * (len(words) - 1) for words in SENTENCES)
    assert rows["naive"] / rows["ours"] >= 3.0
    assert rows["reuse"] / rows["ours"] >= 1.75
    assert seconds["naive"] / seconds["ours"] >= 2.5
    assert seconds["reuse"] / seconds["ours"] >= 1.4
