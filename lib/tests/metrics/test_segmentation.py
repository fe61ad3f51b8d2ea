"""Word segmentation: tags and words there and back, and scores against an alignment of word sequences."""

import difflib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compendium.metrics.segmentation import (
    bmes_to_words,
    disagreement,
    segmentation_counts,
    segmentation_scores,
    word_f1,
    word_spans,
    words_to_bmes,
)

segmented = st.lists(st.text("甲乙丙丁", min_size=1, max_size=5), max_size=8)


@st.composite
def two_segmentations(draw):
    text = draw(st.text("甲乙丙", min_size=1, max_size=14))
    sides = []
    for _ in range(2):
        cuts = sorted(
            draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=8)) - {len(text)}
        )
        ends = [0, *cuts, len(text)]
        sides.append([text[a:b] for a, b in pairwise(ends)])
    return sides


@given(segmented)
def test_words_and_tags_there_and_back(words):
    tags = words_to_bmes(words)
    assert len(tags) == sum(map(len, words))
    assert bmes_to_words("".join(words), tags) == words
    text = "".join(words)
    assert [text[a:b] for a, b in word_spans(words)] == words


@given(st.lists(st.sampled_from("BMES"), min_size=1, max_size=12))
def test_any_tags_give_a_segmentation_that_begins_at_b_and_s(tags):
    text = "甲乙丙丁戊己庚辛壬癸子丑"[: len(tags)]
    words = bmes_to_words(text, tags)
    assert "".join(words) == text
    starts = {start for start, _ in word_spans(words)}
    assert starts == {0} | {i for i, tag in enumerate(tags) if tag in "BS"}


def test_tags_of_each_length():
    assert words_to_bmes(["我", "喜欢", "图书馆", "科幻小说"]) == list("SBEBMEBMME")
    assert bmes_to_words(["X", "0"], ["B", "E"]) == ["X0"]
    with pytest.raises(ValueError, match="a word is empty"):
        words_to_bmes(["我", ""])
    with pytest.raises(ValueError, match="1 tags for 2 characters"):
        bmes_to_words("我们", ["S"])
    with pytest.raises(ValueError, match="tag 'O' is not one of"):
        bmes_to_words("我们", ["B", "O"])


@given(two_segmentations())
def test_counts_from_their_definition(sides):
    gold, found = sides
    unseen = {word for word in gold if len(word) > 1}
    counts = segmentation_counts([gold], [found], set(gold) - unseen)[0].tolist()
    matches = [
        (i, word)
        for i, word in enumerate(gold)
        for j, other in enumerate(found)
        if word == other and len("".join(gold[:i])) == len("".join(found[:j]))
    ]
    hits = len(matches)
    assert counts[:3] == [hits, len(found), len(gold)]
    assert counts[3:] == [
        sum(word in unseen for _, word in matches),
        sum(word in unseen for word in gold),
    ]


@given(two_segmentations())
def test_a_shared_word_is_matched_by_any_alignment_of_distinct_words(sides):
    """The bakeoff's script aligns the two word sequences with `diff`; with numbered characters both say the same."""
    gold, found = (
        [(text_end, word) for text_end, word in zip([b for _, b in word_spans(s)], s, strict=True)]
        for s in sides
    )
    blocks = difflib.SequenceMatcher(a=gold, b=found, autojunk=False).get_matching_blocks()
    hits = sum(block.size for block in blocks)
    scores = segmentation_scores([sides[0]], [sides[1]])
    assert scores["recall"] == pytest.approx(hits / len(gold))
    assert scores["precision"] == pytest.approx(hits / len(found))


def test_scores_by_hand():
    gold = [["北京", "大学", "的", "王", "小明"], ["三十", "个"]]
    found = [["北京大学", "的", "王", "小明"], ["三十", "个"]]
    scores = segmentation_scores(gold, found, {"北京", "大学", "的", "三十"})
    assert scores["precision"] == pytest.approx(5 / 6) and scores["recall"] == pytest.approx(5 / 7)
    assert scores["f1"] == pytest.approx(10 / 13)
    assert scores["oov_recall"] == pytest.approx(1.0) and scores["oov_rate"] == pytest.approx(3 / 7)
    assert scores["iv_recall"] == pytest.approx(2 / 4)
    assert "oov_recall" not in segmentation_scores(gold, found)
    assert disagreement(gold, found) == pytest.approx(1 - 10 / 13)
    assert segmentation_scores([], [], set())["f1"] == 0


def test_f1_of_stacked_counts():
    counts = segmentation_counts([["甲", "乙"], ["丙丁"]], [["甲乙"], ["丙丁"]])
    assert word_f1(counts).tolist() == [0.0, 1.0]
    assert word_f1(counts.sum(0)) == pytest.approx(2 * 1 / (2 + 3))
    assert word_f1([1, 2, 3]) == pytest.approx(2 / 5)


def test_different_texts_are_refused():
    with pytest.raises(ValueError, match="1 gold sentences for 0"):
        segmentation_counts([["甲"]], [])
    with pytest.raises(ValueError, match="sentence 0: gold spells '甲乙'"):
        segmentation_counts([["甲", "乙"]], [["甲丙"]])
