"""Multi30k and E2E: sizes, what the files say line by line, and rows that do not fit."""

import pandas
import pytest

from compendium.data.loaders_generation import (
    load_e2e,
    load_multi30k,
    read_captions,
    read_meanings,
)
from compendium.data.registry import DataError, Registry, verify


def files_of(name):
    if any(verify(name).values()):
        pytest.skip(f"{name} is not in the cache; run `compendium data fetch {name}`")
    return Registry().fetch(name)


def test_multi30k_is_its_files():
    files = files_of("multi30k")
    splits = load_multi30k(files)
    assert {part: len(rows) for part, rows in splits.items()} == {
        "train": 29000,
        "validation": 1014,
    }
    lines = files["train.lc.norm.tok.en"].read_text(encoding="utf-8").splitlines()
    plain = [(i, line) for i, line in enumerate(lines) if "&" not in line]
    assert len(plain) > 25000
    for i, line in plain[::97]:
        assert splits["train"][i]["text"].split() == line.split()
    assert not any("&apos;" in text for text in splits["validation"]["text"])
    assert any(" 's " in text for text in splits["validation"]["text"])


def test_e2e_is_what_pandas_reads():
    files = files_of("e2e")
    splits = load_e2e(files)
    for part, name in (("validation", "devset"), ("test", "testset_w_refs")):
        table = pandas.read_csv(files[f"{name}.csv"], keep_default_na=False)
        assert splits[part]["meaning"][:] == table["mr"].tolist()
        assert splits[part]["text"][:] == table["ref"].str.strip().tolist()
    assert [len(rows) for rows in splits.values()] == [4672, 4693]


def test_damaged_files_are_named_with_their_line(tmp_path):
    path = tmp_path / "captions"
    path.write_text("a man &amp; a dog\n\n")
    with pytest.raises(DataError, match="captions:2: the line is empty"):
        read_captions(path)
    path.write_text("a man &amp; a dog\n")
    assert read_captions(path) == ["a man & a dog"]
    table = tmp_path / "table.csv"
    table.write_text("meaning,ref\n")
    with pytest.raises(DataError, match="instead of the header mr,ref"):
        read_meanings(table)
    table.write_text('mr,ref\n"name[A]"\n')
    with pytest.raises(DataError, match=r"table\.csv:2: the line is not a meaning and a text"):
        read_meanings(table)


def test_an_unknown_file_of_the_registry_is_not_needed():
    names = {file.name for file in Registry()["multi30k"].files}
    assert names == {"train.lc.norm.tok.en", "val.lc.norm.tok.en"}
