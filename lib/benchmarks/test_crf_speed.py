"""A training step and decoding of the CRF against pytorch-crf on the same batch, as ratios."""

import statistics
import time

import pytest
import torch
from torchcrf import CRF as PytorchCRF

from compendium.models.crf import LinearChainCRF


def seconds(function, repeats):
    function()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


@pytest.mark.parametrize(("batch", "length", "num_tags"), [(16, 50, 10), (32, 100, 29)])
def test_crf_against_pytorch_crf(batch, length, num_tags):
    torch.manual_seed(0)
    ours, peer = LinearChainCRF(num_tags), PytorchCRF(num_tags, batch_first=True)
    emissions = torch.randn(batch, length, num_tags, requires_grad=True)
    tags = torch.randint(num_tags, (batch, length))
    mask = torch.arange(length) < torch.randint(length // 2, length + 1, (batch, 1))
    mask[0] = True
    steps = {
        "training step": (
            lambda: ours(emissions, tags, mask).backward(),
            lambda: (-peer(emissions, tags, mask, reduction="mean")).backward(),
            1.5,
        ),
        "decoding": (
            lambda: ours.decode(emissions, mask),
            lambda: peer.decode(emissions, mask),
            1.2,
        ),
    }
    for name, (run_ours, run_peer, bound) in steps.items():
        a, b = seconds(run_ours, 15), seconds(run_peer, 15)
        print(
            f"{name} {batch}x{length}x{num_tags}: {1e3 * a:.2f} ms, peer {1e3 * b:.2f} ms, x{b / a:.2f}"
        )
        assert b / a >= bound, f"{name}: only {b / a:.2f} times as fast as pytorch-crf"
