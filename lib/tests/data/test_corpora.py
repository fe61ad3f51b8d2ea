"""Corpora that came with the tools, against other ways to read them."""

import ast
import hashlib
import importlib
import inspect
import os
import subprocess
import sys

import pytest

from compendium.data import corpora
from compendium.data.registry import DataError


def test_lexicon_is_what_jieba_itself_reads():
    import jieba

    path = corpora._jieba_file()
    frequencies, _ = jieba.Tokenizer().gen_pfdict(open(path, "rb"))  # noqa: SIM115 (jieba closes it)
    expected = {word: frequency for word, frequency in frequencies.items() if frequency}
    lexicon = corpora.jieba_lexicon()
    assert {e.word: e.frequency for e in lexicon} == expected
    assert len(lexicon) == 349_046


def test_lexicon_by_length():
    assert len(corpora.jieba_lexicon(2)) == 337_466
    assert min(len(entry.word) for entry in corpora.jieba_lexicon(2)) == 2
    assert corpora.jieba_lexicon(2) is corpora.jieba_lexicon(2)


def test_malformed_lexicon_line(tmp_path, monkeypatch):
    path = tmp_path / "dict.txt"
    path.write_text("重庆 100 ns\n人和\n")
    monkeypatch.setattr(corpora, "_jieba_file", lambda: path)
    with pytest.raises(DataError, match=r"dict\.txt:2: expected `word frequency tag`"):
        corpora.jieba_lexicon.__wrapped__(1)


@pytest.mark.parametrize("name", ["json.decoder", "textwrap", "collections", "argparse"])
def test_docstrings_against_import(name):
    """Parsing finds the texts that importing shows."""
    module = importlib.import_module(name)
    source = inspect.getsource(module)
    found = {d.source: d.text for d in corpora.docstrings(source, "m")}
    assert found["m"] == corpora.prose_of(module.__doc__) if module.__doc__ else "m" not in found
    classes = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == name]
    for cls in classes:
        if cls.__doc__ and f"m:{cls.__name__}" in found:
            assert found[f"m:{cls.__name__}"] == corpora.prose_of(cls.__doc__)
    assert any(f"m:{cls.__name__}" in found for cls in classes)


def test_every_docstring_once():
    rows = corpora.python_documentation()
    assert len(set(rows["text"])) == len(rows) > 5000
    assert sum(map(len, rows["text"])) > 1_500_000
    assert min(len(text.split()) for text in rows["text"]) == 5
    assert len(corpora.python_documentation(min_words=50)) < len(rows)
    assert not any(">>> " in r["text"] for r in rows if not r["source"].startswith("topic:"))


def test_code_is_python():
    rows = corpora.python_code()
    assert len(rows) > 300 and rows["source"][:] == sorted(rows["source"])
    for row in rows.select(range(0, len(rows), 40)):
        ast.parse(row["text"])


def fingerprint():
    texts = [*corpora.python_documentation()["text"], *map(str, corpora.jieba_lexicon())]
    return hashlib.sha256("".join(texts).encode()).hexdigest()


def test_same_on_every_run_and_nothing_is_imported(tmp_path):
    program = inspect.getsource(fingerprint) + (
        "import hashlib, sys; from compendium.data import corpora;"
        "print(fingerprint(), 'jieba' in sys.modules, 'torch' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, check=True, env=os.environ | {"PYTHONHASHSEED": "1", "XDG_CACHE_HOME": str(tmp_path)},
    )  # fmt: skip
    assert run.stdout.split() == [fingerprint(), "False", "False"]


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """An empty cache file, and texts that are read quickly; the list counts the readings."""
    readings = []
    texts = (corpora.Document("m.py", "A text."),)
    monkeypatch.setattr(corpora, "_read_documentation", lambda: readings.append(1) or texts)
    monkeypatch.setattr(
        corpora, "_documentation_file", lambda: tmp_path / "corpora" / "python.json"
    )
    return tmp_path / "corpora" / "python.json", texts, readings


@pytest.mark.parametrize("damage", [None, "", "[[1, 2, 3]]", '{"a": 1}', "[3]"])
def test_documentation_is_kept_and_a_damaged_file_read_anew(kept, damage):
    path, texts, readings = kept
    if damage is not None:
        path.parent.mkdir()
        path.write_text(damage)
    for _ in range(2):
        assert corpora._documentation.__wrapped__() == texts
    assert len(readings) == 1 and [p.name for p in path.parent.iterdir()] == ["python.json"]


def test_a_cache_that_cannot_be_written_is_no_obstacle(kept):
    path, texts, readings = kept
    path.parent.write_text("a file where the folder should be")
    for _ in range(2):
        assert corpora._documentation.__wrapped__() == texts
    assert len(readings) == 2
