"""Segmentation with MCCWS: against jieba, batched against sentence by sentence, and one model against one for each criterion.

Every ratio is of characters per second of the same texts in the same process, medians over repeats. jieba does not batch and has
no criteria; it is what most people use.
"""

import statistics
import time

import pytest
import torch

from compendium.chinese.mccws import (
    CriterionTokenizer,
    MultiCriteriaSegmenter,
    MultiCriteriaSegmenterConfig,
)
from compendium.data.generators_cws import unit_sentences, words_under

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CRITERIA = [f"criterion_{i}" for i in range(8)]
SENTENCES = [words_under(units, ()) for units in unit_sentences(1500, seed=5)]
TEXTS = ["".join(words) for words in SENTENCES]
TOKENIZER = CriterionTokenizer.build(SENTENCES, min_pair_count=1)
SIZES = {
    "mini": dict(embedding_dim=48, hidden_size=64, num_layers=2, intermediate_size=128),
    "paper": dict(),
}


def segmenter(size="mini", criteria=CRITERIA):
    torch.manual_seed(0)
    config = MultiCriteriaSegmenterConfig(
        criteria=criteria,
        vocab_size=len(TOKENIZER.characters),
        bigram_vocab_size=len(TOKENIZER.pairs),
        **SIZES[size],
    )
    return MultiCriteriaSegmenter(config).to(DEVICE).eval()


def characters_per_second(segment, texts, repeats=3):
    segment(texts[:20])
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        segment(texts)
        seconds.append(time.perf_counter() - start)
    return sum(map(len, texts)) / statistics.median(seconds)


@pytest.mark.parametrize(("size", "least"), [("mini", 0.1), ("paper", 0.01)])
def test_against_jieba(size, least):
    import jieba

    jieba.setLogLevel("ERROR")
    texts = TEXTS if size == "mini" or DEVICE.type == "cuda" else TEXTS[:200]
    peer = characters_per_second(lambda rows: [jieba.lcut(row) for row in rows], texts)
    model = segmenter(size)
    ours = characters_per_second(lambda rows: model.segment(rows, TOKENIZER, CRITERIA[0]), texts)
    print(f"{size}: {ours:,.0f} characters/s, jieba {peer:,.0f}, x{ours / peer:.3f}")
    assert ours / peer >= least


def test_batched_against_one_by_one():
    model = segmenter()
    batched = characters_per_second(lambda rows: model.segment(rows, TOKENIZER, CRITERIA[0]), TEXTS)
    alone = characters_per_second(
        lambda rows: [model.segment([row], TOKENIZER, CRITERIA[0]) for row in rows], TEXTS[:150]
    )
    print(f"batched {batched:,.0f} characters/s, one by one {alone:,.0f}, x{batched / alone:.1f}")
    assert batched / alone >= 5.0


def test_one_model_against_one_for_each_criterion():
    """Requests of a few sentences for each of eight criteria: one batch for all, or eight models with a batch each."""
    shared = segmenter()
    singles = {name: segmenter(criteria=[name]) for name in CRITERIA}
    texts = TEXTS[:32]
    names = [CRITERIA[i % len(CRITERIA)] for i in range(len(texts))]

    def by_one(rows):
        return shared.segment(rows, TOKENIZER, names[: len(rows)])

    def by_many(rows):
        for name, model in singles.items():
            mine = [row for row, wanted in zip(rows, names, strict=False) if wanted == name]
            model.segment(mine, TOKENIZER, name)

    one, many = (characters_per_second(f, texts, repeats=15) for f in (by_one, by_many))
    parameters = sum(model.num_parameters() for model in singles.values()) / shared.num_parameters()
    print(
        f"one model {one:,.0f} characters/s, eight models {many:,.0f}, x{one / many:.2f}; "
        f"eight models have {parameters:.2f} times the parameters"
    )
    assert one / many >= 1.5
    assert parameters >= 7.5
