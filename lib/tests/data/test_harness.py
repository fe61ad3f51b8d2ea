"""Folders of tasks for the lm-evaluation-harness."""

import jinja2
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from compendium.data.harness import FunctionName, literal, write_harness_tasks

JINJA = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)


class Loader(yaml.SafeLoader):
    """Reads `!function` as its name, as the harness's index does."""


Loader.add_constructor("!function", lambda loader, node: ("function", node.value))
PIECES = st.sampled_from(
    ["{", "}", "%", "{{", "}}", "{%", "raw", "endraw", " ", "\n", "-", "#", "'", '"', "\\", "问"]
)


@given(st.lists(PIECES, max_size=12).map("".join))
def test_literal_text_survives_jinja(text):
    assert JINJA.from_string(literal(text)).render() == text
    assert (
        JINJA.from_string(literal(text) + "{{x}}" + literal(text)).render(x="|") == f"{text}|{text}"
    )


def double(doc: dict, results: list) -> dict:
    """Twice."""
    return {"acc": 2.0 * len(results)}


@given(st.lists(PIECES, max_size=12).map("".join))
def test_texts_survive_yaml(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("tasks")
    (path,) = write_harness_tasks(folder, {"a": {"doc_to_text": text}})
    assert yaml.load(path.read_text(encoding="utf-8"), Loader) == {"task": "a", "doc_to_text": text}


def test_a_folder(tmp_path):
    tasks = {
        name: {"include": "shared", "process_results": FunctionName("utils.double")}
        for name in "ab"
    }
    shared = {"shared": {"output_type": "generate_until"}}
    written = write_harness_tasks(tmp_path / "new", tasks, shared, {"both": ["a", "b"]}, [double])
    assert sorted(path.name for path in written) == [
        "_shared.yaml", "a.yaml", "b.yaml", "both.yaml", "utils.py",
    ]  # fmt: skip
    task = yaml.load((tmp_path / "new" / "b.yaml").read_text(), Loader)
    assert task == {
        "task": "b", "include": "_shared.yaml", "process_results": ("function", "utils.double"),
    }  # fmt: skip
    group = yaml.load((tmp_path / "new" / "both.yaml").read_text(), Loader)
    assert group["task"] == ["a", "b"]
    assert group["aggregate_metric_list"] == [
        {"metric": "acc", "aggregation": "mean", "weight_by_size": False}
    ]
    scope: dict = {}
    exec((tmp_path / "new" / "utils.py").read_text(), scope)
    assert scope["double"]({}, ["x"]) == {"acc": 2.0}


def test_a_group_of_unknown_tasks(tmp_path):
    with pytest.raises(ValueError, match="group 'g' has the unknown task 'b'; write it too"):
        write_harness_tasks(tmp_path, {"a": {}}, groups={"g": ["a", "b"]})
