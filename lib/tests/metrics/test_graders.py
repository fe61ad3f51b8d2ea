"""Readers of options and verdicts."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compendium.metrics.graders import (
    extract_option,
    judge_verdict,
    last_option,
    macro_average,
    official_option,
)

ALPHABET = st.sampled_from([*"ABCDZab()（） ,。1", "answer is ", "答案是", "Answer is"])
TEXTS = st.lists(ALPHABET, max_size=14).map("".join)


def published_rule(text):
    """The rule in the words of the paper's runner, step by step."""
    parts = text.split("answer is ")
    if len(parts) != 1:
        text = parts[1].strip()
    for pattern in (r"\(([A-Z])\)*", r"([A-Z])"):
        if match := re.search(pattern, text):
            return match.group(1)
    return text


@given(TEXTS)
def test_official_is_the_published_rule(text):
    assert extract_option(text) == official_option(text) == published_rule(text)


@pytest.mark.parametrize(
    ("text", "official", "last"),
    [
        ("(B)", "B", "B"),
        ("So the answer is (C).", "C", "C"),
        ("So the answer is C.", "C", "C"),
        ("The answer is (A). No, wait: the answer is (D).", "A", "D"),
        ("选项(A)不对，(B)对，所以答案是(B)。", "A", "B"),
        ("选项（A）不对，所以答案是（B）。", "A", "B"),
        ("Let's see: I think (D", "D", "D"),
        ("Let us think", "L", "Let us think"),
        ("是的", "是的", "是的"),
        ("比较(A)与(C)，(C)更早", "A", "C"),
        ("答案为B", "B", "B"),
        ("The answer is unclear, but (A) or (B)", "A", "A"),
        ("", "", ""),
    ],
)
def test_a_table_by_hand(text, official, last):
    assert extract_option(text, "official") == official
    assert extract_option(text, "last") == last


@given(TEXTS, st.sampled_from("ABCDEF"))
def test_last_reads_what_a_chain_ends_on(text, letter):
    assert last_option(f"{text}所以答案是({letter})。") == letter
    assert last_option(f"{text} So the answer is ({letter}).") == letter


def test_an_unknown_policy_is_named():
    with pytest.raises(ValueError, match="extraction policy 'lst' is unknown; did you mean 'last'"):
        extract_option("(A)", "lst")


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("[correct]", True), ("[正确]", True), ("x [YES] y", True), ("[incorrect]", False), ("[错误]", False),
        ("[No] but [yes]", False), ("correct", None), ("[ correct ]", None), ("", None),
    ],
)  # fmt: skip
def test_verdicts(text, verdict):
    assert judge_verdict(text) is verdict


def test_macro_average_is_the_mean_of_the_means():
    rng = np.random.default_rng(0)
    correct, tasks = rng.random(60) < 0.4, rng.choice(list("abc"), 60, p=[0.7, 0.2, 0.1])
    means = [100 * correct[tasks == task].mean() for task in "abc"]
    assert macro_average(correct, tasks) == pytest.approx(np.mean(means))
    assert macro_average(correct, tasks) != pytest.approx(100 * correct.mean())
    with pytest.raises(ValueError, match="do not pair up; give one task for each item"):
        macro_average([True], ["a", "b"])
    with pytest.raises(ValueError, match="do not pair up"):
        macro_average([], [])
