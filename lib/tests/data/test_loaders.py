"""Loaders: the counts of the published sets, an independent reading of the files, and malformed lines."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compendium.data import loaders
from compendium.data.loaders import all_loaders, charm_shots, load
from compendium.data.registry import DataError, Registry, info, verify
from compendium.metrics.spans import tags_to_spans


def files_of(name):
    """Paths of a data set in this machine's cache; skips the test when they are not there."""
    if any(verify(name).values()):
        pytest.skip(f"{name} is not in the cache; run `compendium data fetch {name}`")
    return Registry().fetch(name)


def sizes(dataset):
    return {split: len(rows) for split, rows in dataset.items()}


def tag_names(rows):
    names = rows.features["labels"].feature.names
    return [[names[label] for label in labels] for labels in rows["labels"]]


# Published counts (Zhang & Yang 2018; Peng & Dredze 2015, second edition) are those of the first tags of
# entities; read as seqeval reads tags, the few ill-formed entities of the files count otherwise.
@pytest.mark.parametrize(
    ("name", "sentences", "begun", "read"),
    [
        ("resume_ner", (3821, 463, 477), (13438, 1497, 1630), (13440, 1497, 1630)),
        ("weibo_ner", (1350, 270, 270), (1885, 389, 414), (1895, 389, 418)),
    ],
)
def test_chinese_ner(name, sentences, begun, read):
    files_of(name)
    dataset = load(name)
    assert sizes(dataset) == dict(zip(("train", "validation", "test"), sentences, strict=True))
    tags = {split: tag_names(rows) for split, rows in dataset.items()}
    firsts = [sum(tag[0] in "BS" for row in rows for tag in row) for rows in tags.values()]
    assert tuple(firsts) == begun
    assert tuple(sum(len(tags_to_spans(row)) for row in rows) for rows in tags.values()) == read
    assert len({span.type for row in tags["train"] for span in tags_to_spans(row)}) == 8
    for rows in dataset.values():
        assert all(len(row["tokens"]) == len(row["labels"]) > 0 for row in rows)
        assert {len(token) for tokens in rows["tokens"] for token in tokens} == {1}


def test_weibo_says_what_the_file_says():
    """Read back with other means: drop the digits behind each character."""
    path = files_of("weibo_ner")["weiboNER_2nd_conll.test"]
    raw = path.read_text(encoding="utf-8").replace("\ufffd\ufffd", "\ufffd")
    blocks = [block.split("\n") for block in raw.strip("\n").split("\n\n")]
    expected = [[(line[0], line.rsplit("\t", 1)[1]) for line in block] for block in blocks]
    rows = load("weibo_ner")["test"]
    assert [
        list(zip(*pair, strict=True)) for pair in zip(rows["tokens"], tag_names(rows), strict=True)
    ] == expected


def test_tiny_shakespeare_is_whole():
    text = files_of("tiny_shakespeare")["input.txt"].read_bytes().decode()
    dataset = load("tiny_shakespeare")
    pieces = [dataset[split][0]["text"] for split in ("train", "validation", "test")]
    assert "".join(pieces) == text
    assert [len(piece) for piece in pieces] == [1_003_854, 55_770, 55_770]


def test_wikitext2():
    files_of("wikitext2")
    dataset = load("wikitext2")
    assert sizes(dataset) == {"validation": 3760, "test": 4358}
    assert sum(len(text.split()) for text in dataset["test"]["text"]) == 241_211
    assert "= Robert <unk> =" in dataset["test"]["text"][:3]


# Counts of Yan et al. 2023 for their release (sentences, entities, nested by overlap, each type).
@pytest.mark.parametrize(
    ("split", "sentences", "entities", "nested", "types"),
    [
        ("validation", 1765, 4714, 850, (1161, 139, 372, 576, 2466)),
        ("test", 1732, 5119, 1156, (1132, 106, 403, 578, 2900)),
    ],
)
def test_genia(split, sentences, entities, nested, types):
    files_of("genia")
    rows = load("genia")[split]
    found = [row["entities"] for row in rows]
    assert (len(rows), sum(map(len, found)), len(set(rows["document"]))) == (
        sentences,
        entities,
        199,
    )
    labels = [entity["label"] for row in found for entity in row]
    assert tuple(labels.count(number) for number in range(5)) == types
    assert rows.features["entities"].feature["label"].names == loaders.GENIA_TYPES

    def overlaps(row, index):
        one = row[index]
        others = row[:index] + row[index + 1 :]
        return any(o["start"] < one["end"] and one["start"] < o["end"] for o in others)

    assert sum(overlaps(row, index) for row in found for index in range(len(row))) == nested


@pytest.mark.parametrize(
    ("task", "expected", "labels"),
    [
        ("sst2", {"train": 6920, "validation": 872, "test": 1821}, (912, 909)),
        ("trec", {"train": 5452, "test": 500}, (138, 94, 9, 65, 81, 113)),
        ("subj", {"train": 10_000}, (5000, 5000)),
        ("mpqa", {"train": 10_606}, (7294, 3312)),
    ],
)
def test_sentence_classification(task, expected, labels):
    files_of("sentence_classification")
    dataset = load("sentence_classification", task=task)
    assert sizes(dataset) == expected
    last = list(dataset.values())[-1]
    assert (
        tuple(last["label"].count(n) for n in range(last.features["label"].num_classes)) == labels
    )
    assert "\ufffd" not in "".join(last["text"])


def test_meaning_of_labels():
    files_of("sentence_classification")
    rows = load("sentence_classification", task="trec")["test"]
    name = rows.features["label"].int2str
    assert {
        text: name(label) for text, label in zip(rows["text"], rows["label"], strict=True)
    }.items() >= {
        ("How far is it from Denver to Aspen ?", "number"),
        ("What county is Modesto , California in ?", "location"),
        ("Who was Galileo ?", "human"),
        ("What is an atom ?", "description"),
        ("What is Australia 's national flower ?", "entity"),
        ("What is the abbreviation for Texas ?", "abbreviation"),
    }


def test_gsm8k():
    files_of("gsm8k")
    dataset = load("gsm8k")
    assert sizes(dataset) == {"train": 7473, "test": 1319}
    assert all(
        re.fullmatch(r"-?\d+(\.\d+)?", answer) for answer in dataset["train"]["final_answer"]
    )
    assert dataset["test"][0]["final_answer"] == "18"


def test_gsm8k_model_solutions():
    """The accuracies that can be recomputed from the published judgements (21.7, 39.0, 34.7, 56.3 %)."""
    files_of("gsm8k")
    rows = load("gsm8k", model_solutions=True)["test"]
    assert len(rows) == 1319 and rows["question"][:] == load("gsm8k")["test"]["question"][:]
    right = dict.fromkeys(loaders.GSM8K_MODELS, 0)
    for row in rows:
        for chain in row["solutions"]:
            right[chain["model"]] += chain["is_correct"]
    assert list(right.values()) == [286, 515, 458, 742]


CHARM_COUNTS = (150, 50, 100, 200, 100, 200, 100)


def test_charm_counts():
    files_of("charm")
    for domain in ("Chinese", "Global"):
        for task, count in zip(loaders.CHARM_TASKS, CHARM_COUNTS, strict=True):
            assert len(load("charm", task=task, domain=domain)["test"]) == count
    for language in ("zh", "en"):
        assert len(load("charm", language=language)["test"]) == 1800
        assert len(load("charm", part="memorization", language=language)["test"]) == 759


def test_charm_links_are_mutual():
    files_of("charm")
    reasoning, memory = load("charm")["test"], load("charm", part="memorization")["test"]
    there = {(row["id"], other) for row in reasoning for other in row["mids"]}
    back = {(other, row["id"]) for row in memory for other in row["rids"]}
    assert there == back and len(there) > 759
    assert sum(row["category"] != "" for row in reasoning) == 900
    assert {row["target"] for row in reasoning} == {f"({letter})" for letter in "ABCDEF"}


def test_charm_shots():
    files_of("charm")
    for strategy in loaders.CHARM_STRATEGIES:
        text = charm_shots("Time_Understanding", "Chinese", strategy)
        assert len(re.findall(r"^So the answer is|^所以答案是|^A[：:]", text, re.MULTILINE)) >= 3, (
            strategy
        )
    with pytest.raises(DataError, match="strategy of charm 'cot' is unknown; "):
        charm_shots("Time_Understanding", "Chinese", "cot")


def test_ag_news_is_balanced_and_its_entities_are_repaired():
    files_of("ag_news_test")
    rows = load("ag_news_test")["test"]
    assert rows.features["label"].names == loaders.AG_NEWS_TOPICS
    assert np.bincount(rows["label"]).tolist() == [1900] * 4
    assert not any(re.search(r"#\d+;|&[lg]t;|\\", text) for text in rows["text"])
    assert rows[1]["text"].startswith("The Race is On: Second Private Team Sets Launch Date")
    assert "$10 million Ansari X Prize" in rows[1]["text"]


def test_a_news_row_that_does_not_fit_is_named(tmp_path):
    (tmp_path / "test.csv").write_text('"1","a","b"\n"5","a","b"\n')
    with pytest.raises(DataError, match=r"test\.csv:2: the line is not label 1-4"):
        loaders.load_ag_news_test({"test.csv": tmp_path / "test.csv"})


def test_loaders_of_families_are_found():
    families = {path.stem for path in Path(loaders.__file__).parent.glob("loaders_*.py")}
    homes = {function.__module__.rpartition(".")[2] for function in all_loaders().values()}
    assert homes == families | {"loaders"}


def test_every_loader_belongs_to_a_registered_set_and_is_described():
    for name, function in all_loaders().items():
        assert info(name).bytes and function.__doc__


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("weibo", {}, "dataset 'weibo' is unknown; did you mean 'weibo_ner'?"),
        (
            "fewrel",
            {},
            "dataset 'fewrel' is registered but has no loader yet; `fetch('fewrel')` gives its files",
        ),
        (
            "gsm8k",
            {"solutions": True},
            "option of dataset 'gsm8k' 'solutions' is unknown; did you mean 'model_solutions'?",
        ),
    ],
)
def test_mistakes_are_one_sentence(name, options, sentence):
    with pytest.raises(DataError) as error:
        load(name, **options)
    assert str(error.value) == sentence


def test_wrong_values_of_options():
    with pytest.raises(DataError, match="did you mean 'sst2'"):
        loaders.load_sentence_classification({}, task="sst-2")
    with pytest.raises(DataError, match="did you mean 'Time_Understanding'"):
        loaders.load_charm({}, task="time understanding")
    with pytest.raises(DataError, match="no memorization items"):
        loaders.load_charm({}, task="Natural_Language_Inference", part="memorization")


def weibo_files(folder, line):
    good = "阿0\tB-PER.NAM\n明1\tI-PER.NAM\n\n来0\tO\n\n"
    files = {f"weiboNER_2nd_conll.{split}": folder / split for split in ("train", "dev", "test")}
    for path in files.values():
        path.write_text(good, encoding="utf-8")
    files["weiboNER_2nd_conll.dev"].write_text(good + line, encoding="utf-8")
    return files


def test_small_weibo_file(tmp_path):
    rows = loaders.load_weibo_ner(weibo_files(tmp_path, "3" + "10\tO\n\u202812\tO"))["validation"]
    assert rows["tokens"][:] == [["阿", "明"], ["来"], ["3", "\u2028"]]
    assert tag_names(rows) == [["B-PER.NAM", "I-PER.NAM"], ["O"], ["O", "O"]]


@pytest.mark.parametrize("line", ["来\tO", "来0 O", "来0\tO\tO", "来0\tB-PER", "来来0\tO", "0\tO"])
def test_malformed_weibo_line_has_an_address(tmp_path, line):
    with pytest.raises(DataError, match=r"dev:6: the line "):
        loaders.load_weibo_ner(weibo_files(tmp_path, line + "\n"))


def test_wrong_encoding_has_an_address(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"gut 0\n" + "schön 0\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"file:2: the line is not utf-8"):
        list(loaders.numbered_lines(path))


GENIA_ROW = {
    "tokens": ["IL-2", "gene"],
    "doc_id": "d",
    "entity_mentions": [{"start": 0, "end": 1, "entity_type": "protein", "text": "IL-2"}],
}


@pytest.mark.parametrize(
    "broken",
    [
        "{",
        "[]",
        json.dumps(GENIA_ROW | {"tokens": "IL-2 gene"}),
        json.dumps(GENIA_ROW | {"entity_mentions": [{"start": 0, "end": 1}]}),
        json.dumps(GENIA_ROW).replace('"end": 1', '"end": 2'),
        json.dumps(GENIA_ROW).replace('"protein"', '"Protein"'),
        json.dumps(GENIA_ROW).replace('"end": 1', '"end": "one"'),
    ],
)
def test_malformed_genia_line_has_an_address(tmp_path, broken):
    files = {name: tmp_path / name for name in ("dev.jsonlines", "test.jsonlines")}
    for path in files.values():
        path.write_text(json.dumps(GENIA_ROW) + "\n")
    assert sizes(loaders.load_genia(files)) == {"validation": 1, "test": 1}
    files["test.jsonlines"].write_text(json.dumps(GENIA_ROW) + "\n" + broken + "\n")
    with pytest.raises(DataError, match=r"test\.jsonlines:2: the line "):
        loaders.load_genia(files)


def test_malformed_lines_of_other_formats(tmp_path):
    path = tmp_path / "file"
    path.write_text("1 good\n2 bad\n")
    with pytest.raises(
        DataError, match=r"file:2: the line does not begin with a label from 0 to 1"
    ):
        loaders.read_labelled(path, 2, "utf-8")
    path.write_text(json.dumps({"question": "?", "answer": "4"}))
    with pytest.raises(DataError, match=r"file:1: the line has an answer without `####`"):
        loaders._gsm8k_questions(path)
    path.write_text(json.dumps({"examples": [{"id": "1", "input": "?"}]}))
    with pytest.raises(DataError, match=r"file: example 1 lacks"):
        list(loaders._charm_rows(path, "mids"))


sentences = st.lists(
    st.lists(
        st.tuples(st.characters(exclude_categories=["Z", "C"]), st.sampled_from(["O", "B-X"])),
        min_size=1,
    ),
    min_size=1,
)


@settings(max_examples=40, deadline=None)
@given(sentences, st.integers(1, 3))
def test_tagged_round_trip(tmp_path_factory, written, blank_lines):
    path = tmp_path_factory.mktemp("tagged") / "file"
    blocks = ["".join(f"{token} {tag}\n" for token, tag in sentence) for sentence in written]
    path.write_bytes(("\n" * blank_lines).join(blocks).encode("utf-8"))
    tokens, tags = loaders.read_tagged(
        path, re.compile(r"(?P<token>\S) (?P<tag>\S+)"), ["O", "B-X"]
    )
    assert tokens == [[token for token, _ in sentence] for sentence in written]
    assert tags == [[["O", "B-X"].index(tag) for _, tag in sentence] for sentence in written]
