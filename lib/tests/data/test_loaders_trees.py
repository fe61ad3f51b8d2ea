"""Treebanks: published counts, an independent reading, and malformed files named with their line."""

import json
import re

import pytest

from compendium.data.loaders import load
from compendium.data.loaders_trees import (
    head_problem,
    json_array,
    load_absa_trees_laptop,
    read_conllu,
)
from compendium.data.registry import DataError, Registry, verify
from compendium.metrics.trees import neighbour_ratio
from compendium.models.trees import is_tree


def files_of(name):
    """Paths of a data set in this machine's cache; skips the test when they are not there."""
    if any(verify(name).values()):
        pytest.skip(f"{name} is not in the cache; run `compendium data fetch {name}`")
    return Registry().fetch(name)


def test_pud_says_what_the_file_says():
    path = files_of("ud_english_pud")["PUD.conllu"]
    rows = load("ud_english_pud")["test"]
    text = path.read_text(encoding="utf-8")
    assert len(rows) == text.count("# sent_id") == 1000
    lines = re.findall(r"^\d+\t.*$", text, re.M)
    tokens = [token for row in rows["tokens"] for token in row]
    assert tokens == [line.split("\t")[1] for line in lines] and len(tokens) == 21176
    heads = [head for row in rows["heads"] for head in row]
    assert heads == [int(line.split("\t")[6]) for line in lines]
    assert all(is_tree(row, single_root=True) for row in rows["heads"])


def test_laptop_reviews_have_the_published_counts():
    files_of("absa_trees_laptop")
    splits = load("absa_trees_laptop")
    assert {part: len(rows) for part, rows in splits.items()} == {"train": 1466, "test": 411}
    aspects = {part: [a for row in rows for a in row["aspects"]] for part, rows in splits.items()}
    assert {part: len(found) for part, found in aspects.items()} == {"train": 2328, "test": 638}
    labels = [a["polarity"] for a in aspects["train"]]
    assert [labels.count(label) for label in range(3)] == [464, 994, 870]
    assert all(is_tree(row, single_root=True) for rows in splits.values() for row in rows["heads"])
    assert neighbour_ratio(splits["train"]["heads"]) == pytest.approx(0.484, abs=5e-4)
    row = splits["test"][0]
    assert row["tokens"][row["aspects"][0]["start"] : row["aspects"][0]["end"]] == ["Boot", "time"]


def word(number, head, token="a"):
    return "\t".join([str(number), token, token, "NOUN", "NN", "_", str(head), "dep", "_", "_"])


def written(tmp_path, *lines):
    path = tmp_path / "x.conllu"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_conllu_skips_what_is_no_word(tmp_path):
    range_line, empty = word("1-2", "_"), word("2.1", "_")
    path = written(
        tmp_path, "# text", range_line, word(1, 2), word(2, 0), empty, "", "", word(1, 0)
    )
    first, second = read_conllu(path)
    assert first["heads"] == [2, 0] and second["heads"] == [0]


@pytest.mark.parametrize(
    ("lines", "number", "problem"),
    [
        ([word(1, 0), "2\tb"], 2, "2 fields instead of 10"),
        ([word(1, 0), word(3, 1)], 2, "the number '3' where 2 should come"),
        ([word(1, "x")], 1, "the head 'x'"),
        ([word(1, 5), ""], 2, "gives word 1 the head 5"),
        ([word(1, 1), ""], 2, "gives word 1 the head 1"),
        ([word(1, 0), word(2, 0), "", word(1, 0)], 3, "2 roots"),
        ([word(1, 0), word(2, 3), word(3, 2)], 3, "a cycle"),
    ],
)
def test_malformed_conllu_is_named_with_its_line(tmp_path, lines, number, problem):
    path = written(tmp_path, *lines)
    with pytest.raises(
        DataError, match=re.escape(f"{path}:{number}: ") + ".*" + re.escape(problem)
    ):
        list(read_conllu(path))


ROW = {
    "token": ["Tasty", "soup"],
    "head": [2, 0],
    "deprel": ["amod", "root"],
    "pos": ["ADJ", "NOUN"],
    "aspects": [{"term": ["soup"], "polarity": "positive", "from": 1, "to": 2}],
}


def test_json_array_counts_lines(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('\n[\n {"a":\n 1},\n\n [2], 3\n]\n')
    assert list(json_array(path)) == [(3, {"a": 1}), (6, [2]), (6, 3)]
    path.write_text("[1, 2,\n nope]")
    with pytest.raises(DataError, match=":2: the line is not JSON"):
        list(json_array(path))
    path.write_text('{"a": 1}')
    with pytest.raises(DataError, match="begins no JSON array"):
        list(json_array(path))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"head": [2, 1]}, "0 roots"),
        ({"head": [0]}, "columns of different lengths"),
        ({"aspects": [ROW["aspects"][0] | {"to": 1}]}, "an aspect .* that is not there"),
        (
            {"aspects": [ROW["aspects"][0] | {"polarity": "conflict"}]},
            "unknown polarity 'conflict'",
        ),
        ({"aspects": [{}]}, "incomplete sentence"),
    ],
)
def test_malformed_reviews_are_named_with_their_line(tmp_path, change, problem):
    good, bad = tmp_path / "Train.json", tmp_path / "Test.json"
    good.write_text(json.dumps([ROW]))
    bad.write_text(json.dumps([ROW, ROW | change], indent=1))
    line = 1 + bad.read_text().rsplit("\n {", 1)[0].count("\n") + 1
    with pytest.raises(DataError, match=rf"Test\.json:{line}: the line begins .*{problem}"):
        load_absa_trees_laptop({"Train.json": good, "Test.json": bad})


def test_head_problems():
    assert head_problem([2, 0, 2]) is None
    assert "cycle" in head_problem([0, 3, 2])
