"""CNN-NER above its encoder: multi-head against single-head biaffine, and where the milliseconds of a sentence go.

Sizes are the paper's for ACE (200-dimensional word vectors, 120 channels, 5 heads, 2 blocks). Both biaffine forms are modules of
the compendium and the multi-head one is the single-head one with zeros outside its blocks, which is checked in the same run.
"""

import statistics
import time

import pytest
import torch

from compendium.extraction.cnn_ner import SpanCNN, SpanLinear, SpanVectors
from compendium.models.biaffine import Biaffine, MultiHeadBiaffine, append_one

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HIDDEN, SIZE, CHANNELS, HEADS, DEPTH = 768, 200, 120, 5, 2
ON_CPU = (
    DEVICE.type == "cpu"
)  # small work on a GPU is all overhead: there the ratios are printed only


def seconds(step, repeats=5):
    """Median time of `step()` after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def both_forms():
    """A multi-head biaffine form and the single-head one with the same scores."""
    torch.manual_seed(0)
    multi = MultiHeadBiaffine(SIZE, CHANNELS, HEADS).to(DEVICE)
    single = Biaffine(SIZE, SIZE, CHANNELS).to(DEVICE)
    part, channels = SIZE // HEADS, CHANNELS // HEADS
    with torch.no_grad():
        single.weight.zero_()
        for k in range(HEADS):
            rows, piece = slice(k * channels, (k + 1) * channels), slice(k * part, (k + 1) * part)
            single.weight[rows, piece, piece] = multi.weight[k]
    return multi, single


@pytest.mark.parametrize("length", [32, 64, 128])
def test_multi_head_against_single_head(length):
    multi, single = both_forms()
    start, end = (torch.randn(1, length, SIZE, device=DEVICE, requires_grad=True) for _ in range(2))
    torch.testing.assert_close(multi(start, end), single(start, end), rtol=1e-4, atol=1e-4)
    a, b = (
        seconds(lambda form=form: form(start, end).sum().backward()) for form in (multi, single)
    )
    sizes = [form.weight.numel() for form in (multi, single)]
    print(
        f"n={length}: multi-head {1e3 * a:.1f} ms, single-head {1e3 * b:.1f} ms, x{b / a:.1f}; weights {sizes}"
    )
    assert sizes[1] == HEADS**2 * sizes[0]
    assert b / a >= 4.0 or not ON_CPU, (
        f"multi-head is only {b / a:.2f} times as fast as single-head"
    )


@pytest.mark.parametrize("length", [32, 64, 128])
@torch.no_grad()
def test_milliseconds_and_the_share_of_the_convolution(length):
    torch.manual_seed(0)
    spans = SpanVectors(HIDDEN, SIZE, CHANNELS, HEADS).to(DEVICE).eval()
    cnn = SpanCNN(CHANNELS, DEPTH).to(DEVICE).eval()
    classifier = torch.nn.Linear(CHANNELS, 7).to(DEVICE)
    words = torch.randn(1, length, HIDDEN, device=DEVICE)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=DEVICE)
    image = spans(words)
    parts = {
        "span vectors": seconds(lambda: spans(words)),
        "convolution": seconds(lambda: cnn(image, mask)),
        "classifier": seconds(lambda: classifier(image.permute(0, 2, 3, 1))),
    }
    total = sum(parts.values())
    split = ", ".join(f"{name} {1e3 * t:.1f} ms ({t / total:.0%})" for name, t in parts.items())
    print(f"n={length}: {1e3 * total:.1f} ms a sentence: {split}")
    assert parts["convolution"] / total > 0.4 or not ON_CPU, "the convolution should dominate"


def test_linear_part_against_the_concatenation():
    """W times a concatenation as three products, against the concatenation of every pair as released."""
    torch.manual_seed(0)
    layer = SpanLinear(SIZE, CHANNELS).to(DEVICE).eval()
    start, end = (torch.randn(4, 64, SIZE, device=DEVICE) for _ in range(2))

    def concatenated():
        n = start.shape[1]
        place = torch.arange(n, device=DEVICE)
        steps = (place - place[:, None]).clamp(-15, 14) + 15
        rows = append_one(start)[:, :, None].expand(-1, -1, n, -1)
        columns = append_one(end)[:, None].expand(-1, n, -1, -1)
        width = layer.distance(steps).expand(len(start), -1, -1, -1)
        return torch.cat([rows, columns, width], dim=-1) @ layer.weight.T

    torch.testing.assert_close(layer(start, end), concatenated(), rtol=1e-4, atol=1e-4)
    a = seconds(lambda: layer(start, end).sum().backward())
    b = seconds(lambda: concatenated().sum().backward())
    print(f"three products {1e3 * a:.1f} ms, concatenation {1e3 * b:.1f} ms, x{b / a:.1f}")
    assert b / a >= 3.0 or not ON_CPU, f"only {b / a:.2f} times as fast as the concatenation"
