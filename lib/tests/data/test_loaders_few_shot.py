"""The 16-shot files: counts, an independent reading, disjoint parts, and malformed lines."""

from collections import Counter

import pytest

from compendium.data.loaders import load, options_of
from compendium.data.loaders_few_shot import FEW_SHOT_TASKS, FewShotTask, read_few_shot
from compendium.data.registry import DataError, Registry, verify

ROWS = {
    "SST-2": 32,
    "Yelp": 32,
    "AGNews": 64,
    "DBPedia": 224,
    "MRPC": 32,
    "SNLI": 48,
    "RTE": 32,
}


def the_files():
    if any(verify("bbtv2_16shot").values()):
        pytest.skip("bbtv2_16shot is not in the cache; run `compendium data fetch bbtv2_16shot`")
    return Registry().fetch("bbtv2_16shot")


@pytest.mark.parametrize("task", FEW_SHOT_TASKS)
def test_rows_and_labels(task):
    files = the_files()
    data = load("bbtv2_16shot", task=task)
    names = FEW_SHOT_TASKS[task].labels
    for split, file in (("train", "train"), ("validation", "dev")):
        rows = data[split]
        assert len(rows) == ROWS[task] and set(rows["label"]) == set(range(len(names)))
        if task not in ("Yelp", "SNLI"):
            assert set(Counter(rows["label"]).values()) == {16}
        assert rows.features["label"].names == list(names)
        raw = files[f"{task}/42/{file}.tsv"].read_text(encoding="utf-8").splitlines()
        for row, line in zip(rows, raw, strict=True):  # read back by the last tab alone
            written = line.rpartition("\t")[2]
            expected = names.index(written) if written in names else int(written)
            assert row["label"] == expected
            assert row["text"][:8].replace('"', "") in line.replace('"', "")
        if "text_pair" in rows.features:
            assert all(row["text_pair"] for row in rows)
    assert not set(map(str, data["train"])) & set(map(str, data["validation"]))


def test_quotes_are_read_as_they_were_written():
    the_files()
    pairs = load("bbtv2_16shot", task="MRPC")["train"]["text_pair"]
    assert any(text.startswith('" Spam knows no borders , "') for text in pairs)
    assert not any('""' in text for text in pairs)


def test_unknown_options_are_named(tmp_path):
    the_files()
    assert options_of("bbtv2_16shot") == {"task": "SST-2", "seed": 42}
    with pytest.raises(DataError, match="'SST2' is unknown; did you mean 'SST-2'"):
        load("bbtv2_16shot", task="SST2")
    with pytest.raises(DataError, match="seed of bbtv2_16shot '7' is unknown"):
        load("bbtv2_16shot", seed=7)


@pytest.mark.parametrize(
    ("line", "problem"),
    [("a\tb\t1", "3 columns"), ("a", "1 columns"), ("a\t2", "unknown label '2'"), ("a\tx", "'x'")],
)
def test_bad_lines_are_named(tmp_path, line, problem):
    path = tmp_path / "train.tsv"
    path.write_text(f"good\t0\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match=f"train.tsv:2: .*{problem}"):
        read_few_shot(path, FewShotTask(("a", "b")))
