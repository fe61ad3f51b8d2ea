"""Text under several guidelines: the text never changes, the words do, and only where a guideline says so."""

import itertools

import pytest

from compendium.data.generators_cws import (
    UNIT_KINDS,
    Unit,
    unit_sentences,
    words_under,
    zipf_weights,
)

SENTENCES = unit_sentences(300, seed=7)


def test_every_criterion_spells_the_same_text():
    kinds = list(UNIT_KINDS)
    for joined in itertools.chain.from_iterable(itertools.combinations(kinds, n) for n in range(5)):
        for units in SENTENCES[:40]:
            words = words_under(units, joined)
            assert "".join(words) == "".join("".join(unit.words) for unit in units)
            pieces = sum(1 if unit.kind in joined else len(unit.words) for unit in units)
            assert len(words) == pieces


def test_units_are_what_they_say():
    kinds = {unit.kind for units in SENTENCES for unit in units}
    assert kinds == {"WORD", *UNIT_KINDS}
    for unit in itertools.chain.from_iterable(SENTENCES):
        assert len(unit.words) == (1 if unit.kind == "WORD" else 2) and all(unit.words)
    numbers = [u.words[0] for units in SENTENCES for u in units if u.kind == "QUANTITY"]
    assert set("".join(numbers)) <= set("二三四五六七八九十百")


def test_seeds():
    assert unit_sentences(20, seed=7) == SENTENCES[:20] or unit_sentences(300, seed=7) == SENTENCES
    assert unit_sentences(300, seed=7) == SENTENCES
    other = unit_sentences(300, seed=8)
    assert len({str(units) for units in SENTENCES} & {str(units) for units in other}) < 30


def test_small_corpora_lack_words():
    """Zipf's law: a fifth of the sentences already has most running words, but not all."""
    known = {word for units in SENTENCES[:60] for word in words_under(units, ())}
    rest = [word for units in SENTENCES[60:] for word in words_under(units, ())]
    assert 0.05 < sum(word not in known for word in rest) / len(rest) < 0.5


def test_joining_by_hand_and_bad_kinds():
    units = [Unit("NAME", ("王", "小明")), Unit("WORD", ("买",)), Unit("QUANTITY", ("三", "本"))]
    assert words_under(units, ()) == ["王", "小明", "买", "三", "本"]
    assert words_under(units, {"NAME"}) == ["王小明", "买", "三", "本"]
    with pytest.raises(ValueError, match="'NAMES' is unknown; did you mean 'NAME'"):
        words_under(units, {"NAMES"})
    assert zipf_weights(["a", "b"], 1.0) == {"a": 1 / 2, "b": 1 / 3}
