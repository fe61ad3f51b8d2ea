"""Segmented corpora: published counts, an independent reading, and malformed files named with their line."""

import re

import pytest

from compendium.data.loaders import all_loaders, load
from compendium.data.loaders_cws import (
    SEGMENTATION_CORPORA,
    SIGHAN_2005,
    conll_words,
    divided_words,
    load_segmented,
    tagged_words,
)
from compendium.data.registry import DataError, Registry, verify


def files_of(name):
    """Paths of a data set in this machine's cache; skips the test when they are not there."""
    if any(verify(name).values()):
        pytest.skip(f"{name} is not in the cache; run `compendium data fetch {name}`")
    return Registry().fetch(name)


COUNTS = {  # split -> (lines, words, characters)
    "sxu": {"train": (17115, 528238, 854001), "test": (3654, 113527, 184269)},
    "zx": {
        "train": (2373, 67648, 96934),
        "validation": (788, 20393, 28309),
        "test": (1394, 34355, 48075),
    },
    "udc": {
        "train": (3997, 98608, 156360),
        "validation": (500, 12663, 20014),
        "test": (500, 12012, 19212),
    },
    "wtb": {"train": (813, 14774, 23078), "validation": (95, 1843, 2993), "test": (92, 1860, 3033)},
    "pku_part": {"train": (1555, 82907, 137957), "test": (389, 21465, 34776)},
    "msr_part": {"train": (3188, 84940, 147081), "test": (797, 21933, 37274)},
    "as_part": {"train": (11543, 98006, 156800), "test": (2886, 24604, 40930)},
    "cityu_part": {"train": (1193, 31197, 51834), "test": (299, 9739, 15906)},
}


@pytest.mark.parametrize("name", SEGMENTATION_CORPORA)
def test_counts_of(name):
    files_of(SEGMENTATION_CORPORA[name][0])
    found = {}
    for split, rows in load_segmented(name).items():
        words = [word for sentence in rows["words"][:] for word in sentence]
        assert all(words) and not re.search(r"\s", "".join(words))
        found[split] = (len(rows), len(words), sum(map(len, words)))
    assert found == COUNTS[name]


@pytest.mark.parametrize("corpus", SIGHAN_2005)
def test_the_division_keeps_the_order_and_loses_nothing(corpus):
    path = files_of("sighan2005_test")[f"{corpus}_test_gold.utf8"]
    splits = load("sighan2005_test", corpus=corpus)
    rows = [*splits["train"]["words"][:], *splits["test"]["words"][:]]
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    assert rows == [line.split() for line in lines if line.strip()]
    assert len(splits["train"]) == len(rows) * 80 // 100


def test_treebanks_say_what_their_files_say():
    path = files_of("udc")["test.conll"]
    words = [word for row in load("udc")["test"]["words"][:] for word in row]
    lines = re.findall(r"^\d+\t([^\t]+)\t", path.read_text(encoding="utf-8"), re.M)
    assert words == lines


def test_every_corpus_has_a_loader():
    assert {dataset for dataset, _ in SEGMENTATION_CORPORA.values()} <= set(all_loaders())


def test_unknown_names_are_named():
    files_of("sighan2005_test")
    with pytest.raises(DataError, match="'sxy' is unknown; did you mean 'sxu'"):
        load_segmented("sxy")
    with pytest.raises(DataError, match="'city' is unknown; did you mean 'cityu'"):
        load("sighan2005_test", corpus="city")


def word(number, form="我"):
    return "\t".join([str(number), form, *"_" * 8])


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ([word(1), word(3)], ":2: the line is word '3' where 2 should come"),
        ([word(1), "2\t我"], ":2: the line is not a word with ten columns"),
        ([word(1, "")], ":1: the line is not a word with ten columns"),
    ],
)
def test_malformed_treebanks(tmp_path, lines, problem):
    path = tmp_path / "x.conll"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=problem):
        list(conll_words(path))


def test_comments_blank_lines_and_marks(tmp_path):
    path = tmp_path / "x"
    path.write_text("# text\n\n" + word(1) + "\n\n\n" + word(1, "你") + "\n", encoding="utf-8")
    assert list(conll_words(path)) == [["我"], ["你"]]
    path.write_text("\ufeff我  们 \n \n你\n", encoding="utf-8")
    assert list(divided_words(path)) == [["我", "们"], ["你"]]
    path.write_text("我_PN a_b_NN __PU\n", encoding="utf-8")
    assert list(tagged_words(path)) == [["我", "a_b", "_"]]
    path.write_text("我_PN\n们\n", encoding="utf-8")
    with pytest.raises(DataError, match=":2: the line has '们', which is no word_TAG"):
        list(tagged_words(path))
