"""Running text: the Brown corpus against NLTK's reader, and damaged archives."""

import zipfile

import nltk.data
import pytest
from nltk.corpus.reader import CategorizedTaggedCorpusReader
from nltk.data import ZipFilePathPointer

from compendium.data.loaders_text import brown_samples, load_brown, untagged
from compendium.data.registry import DataError, Registry, verify


def the_archive():
    if any(verify("brown").values()):
        pytest.skip("brown is not in the cache; run `compendium data fetch brown`")
    return Registry().fetch("brown")["brown.zip"]


def test_words_and_genres_equal_those_of_nltk(monkeypatch):
    path = the_archive()
    monkeypatch.setattr(
        nltk.data, "path", [*nltk.data.path, str(path.parent)]
    )  # NLTK asks for leave
    rows = load_brown({"brown.zip": path})["train"]
    reader = CategorizedTaggedCorpusReader(
        ZipFilePathPointer(str(path), "brown/"), r"c[a-z]\d\d", cat_file="cats.txt"
    )
    assert rows["document"] == reader.fileids() and len(rows) == 500
    names = rows.features["genre"].names
    assert names == sorted(reader.categories()) and len(names) == 15
    for index in (0, 17, 250, 499):
        row = rows[index]
        assert [line.split() for line in row["text"].split("\n")] == [
            list(sentence) for sentence in reader.sents(row["document"])
        ]
        assert reader.categories(row["document"]) == [names[row["genre"]]]


def test_size_of_the_corpus():
    texts = [text for _, _, text in brown_samples(the_archive())]
    assert sum(len(text.split()) for text in texts) == 1_161_192
    assert sum(text.count("\n") + 1 for text in texts) == 57_340
    assert not any("/" in word and word.endswith(("/nn", "/.")) for word in texts[0].split())


def test_a_word_may_hold_slashes_but_wants_a_tag():
    assert untagged(" and/or/cc 1/2/cd\n\n\t./.") == "and/or 1/2\n."
    for bad in ("word", "/nn", "word/"):
        with pytest.raises(ValueError, match=f"the word '{bad}' has no tag"):
            untagged(f"fine/jj {bad}")


def archive_of(path, **members):
    with zipfile.ZipFile(path, "w") as stream:
        for name, text in members.items():
            stream.writestr(f"brown/{name.replace('_', '.')}", text)
    return path


def test_damaged_archives_are_named(tmp_path):
    path = archive_of(tmp_path / "a.zip", cats_txt="ca01 news\nca02 news", ca01="Ha/uh")
    with pytest.raises(DataError, match=r"a\.zip: cannot read brown/ca02: .*delete the file"):
        list(brown_samples(path))
    path = archive_of(tmp_path / "b.zip", cats_txt="ca01 news", ca01="Ha/uh oh")
    with pytest.raises(
        DataError, match=r"b\.zip: cannot read brown/ca01: the word 'oh' has no tag"
    ):
        list(brown_samples(path))
    path = tmp_path / "c.zip"
    path.write_bytes(b"not a zip archive")
    with pytest.raises(DataError, match=r"c\.zip: cannot read the archive"):
        list(brown_samples(path))
