"""ELUE and the STS benchmark: published sizes, an independent reading, and rows that do not fit."""

import csv

import pandas
import pytest

from compendium.data.loaders import load
from compendium.data.loaders_elue import ELUE_TASKS, load_elue, load_stsb, read_elue
from compendium.data.registry import DataError, Registry, verify

SIZES = {"SST-2": (8544, 1101, 2210), "MRPC": (3668, 408, 1725), "STS-B": (5749, 1500, 1379)}
COLUMNS = {  # of the file, in the order of the dataset
    "SST-2": ["sentence", "label"],
    "MRPC": ["#1 String", "#2 String", "label"],
    "STS-B": ["sentence1", "sentence2", "label"],
}


def files_of(name):
    if any(verify(name).values()):
        pytest.skip(f"{name} is not in the cache; run `compendium data fetch {name}`")
    return Registry().fetch(name)


@pytest.mark.parametrize("task", SIZES)
def test_elue_says_what_the_test_file_says(task):
    path = files_of("elue")[f"{task}/test_full.tsv"]
    splits = load("elue", task=task)
    assert tuple(len(splits[s]) for s in ("train", "validation", "test")) == SIZES[task]
    raw = pandas.read_csv(path, sep="\t", keep_default_na=False)
    columns = [name for name in ("text", "text_pair", "label") if name in splits["test"].features]
    for ours, theirs in zip(columns, COLUMNS[task], strict=True):
        expected = raw[theirs].tolist()
        found = splits["test"][ours]
        if ours != "label":
            assert list(found) == [text.strip() for text in expected]
        else:
            assert list(found) == pytest.approx(expected)


@pytest.mark.parametrize("task", SIZES)
def test_labelled_test_is_the_unlabelled_one(task):
    """`test.tsv`, which the loader does not read, has the same texts in the same order."""
    path = files_of("elue")[f"{task}/test.tsv"]
    raw = pandas.read_csv(path, sep="\t", quoting=csv.QUOTE_NONE, keep_default_na=False)
    ours = load("elue", task=task)["test"]["text"]
    theirs = raw[COLUMNS[task][0]].str.strip()
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    assert same == len(theirs)


def test_no_text_is_empty_and_classes_occur():
    files_of("elue")
    for task in ELUE_TASKS:
        for rows in load("elue", task=task).values():
            assert all(rows["text"]) and all(rows["text_pair"] if task != "SST-2" else [1])
            assert (set(rows["label"]) == {0, 1}) == (task != "STS-B")


def test_stsb_is_the_same_benchmark_as_in_elue():
    files_of("elue"), files_of("stsb")
    ours, theirs = load("stsb"), load("elue", task="STS-B")
    for split in ("train", "validation", "test"):
        assert len(ours[split]) == len(theirs[split])
        assert list(ours[split]["label"]) == pytest.approx(list(theirs[split]["label"]), abs=6e-3)


def write(folder, text):
    path = folder / "file.tsv"
    path.write_bytes(text.encode())
    return path


def test_a_byte_order_mark_and_quotes_are_read_as_text(tmp_path):
    path = write(
        tmp_path,
        '\ufeffsentence\tlabel\r\n"Open \tquote',
    )
    with pytest.raises(DataError, match=r"file\.tsv:2: .*label 'quote'"):
        read_elue(path, ELUE_TASKS["SST-2"])
    path = write(tmp_path, '\ufeffsentence\tlabel\n"Open \t1\nnext"\t0\n')
    assert read_elue(path, ELUE_TASKS["SST-2"]) == [('"Open', 1), ('next"', 0)]


@pytest.mark.parametrize(
    ("task", "row", "problem"),
    [
        ("SST-2", "no label", "has 1 columns instead of 2"),
        ("SST-2", "text\t2", "has the label '2'"),
        ("STS-B", "a\tb\t5.5", "has the label '5.5'"),
        ("STS-B", "a\tb\tnan", "has the label 'nan'"),
        ("MRPC", "1\t-\t-\ta", "has 4 columns instead of 5"),
    ],
)
def test_malformed_rows_are_named(tmp_path, task, row, problem):
    with pytest.raises(DataError, match=rf"file\.tsv:2: the line {problem}"):
        read_elue(write(tmp_path, f"header\n{row}\n"), ELUE_TASKS[task])


def test_stsb_rows_with_commas_and_damage(tmp_path):
    path = write(tmp_path, '"a, b",c,2.5\n')
    names = [f"stsb-en-{split}.csv" for split in ("train", "dev", "test")]
    splits = load_stsb(dict.fromkeys(names, path))
    assert splits["test"][0] == {"text": "a, b", "text_pair": "c", "label": 2.5}
    path = write(tmp_path, "a,b,1\na,b\n")
    with pytest.raises(DataError, match=r"file\.tsv:2: the line is not two sentences"):
        load_stsb(dict.fromkeys(names, path))


def test_unknown_task():
    with pytest.raises(DataError, match="did you mean 'SST-2'"):
        load_elue({}, task="SST2")
