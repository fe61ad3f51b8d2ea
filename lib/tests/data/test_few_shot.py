"""The world with hidden keys: one rule a data set, what can be known, determinism, errors."""

import numpy as np
import pytest

from compendium.data.few_shot import HIDDEN_KEY_TASKS, SLOTS, HiddenKeyWorld, sample_prompts

WORDS = [f"w{i}" for i in range(300)] + ["subject", "first", "low"]


def key_of(world, slot):
    table = world.words[SLOTS.index(slot)]
    return {word: key for key, row in enumerate(table.tolist()) for word in row}


@pytest.mark.parametrize("task", HIDDEN_KEY_TASKS, ids=lambda task: task.name)
def test_the_key_of_the_right_slot_decides(task):
    world = HiddenKeyWorld(WORDS)
    keys, answers = key_of(world, task.slot), {}
    for part in world.examples(task, {"train": 200, "test": 50}, 3).values():
        for row in part:
            word = row["text"].split()[SLOTS.index(task.slot)]
            assert keys[word] == row["key"]
            assert answers.setdefault(row["key"], row["label"]) == row["label"]


def test_it_is_determined_by_its_seeds():
    first, again, other = (HiddenKeyWorld(WORDS, seed) for seed in (0, 0, 1))
    task = first.tasks[1]
    rows = [w.examples(task, {"train": 20}, 5)["train"].to_list() for w in (first, again, other)]
    assert rows[0] == rows[1] != rows[2]
    assert rows[0] != first.examples(task, {"train": 20}, 6)["train"].to_list()


def test_words_mean_one_thing():
    world = HiddenKeyWorld(WORDS)
    assert len(set(world.words.flatten())) == world.words.size == 288
    assert not set(world.words.flatten()) & {"subject", "first", "low"}


def test_prompts_can_be_answered_exactly_where_it_says_so():
    world = HiddenKeyWorld(WORDS)
    batch = sample_prompts(world, 50, 8, np.random.default_rng(0))
    by_name = {task.name: task for task in world.tasks}
    for words, seen in zip(batch.words.tolist(), batch.seen, strict=True):
        task = by_name[words[0][4]]
        keys = key_of(world, task.slot)
        found: dict[int, str] = {}
        for row, known in zip(words, seen, strict=True):
            key = keys[row[SLOTS.index(task.slot)]]
            assert known == (key in found) and row[5] in task.labels
            assert found.setdefault(key, row[5]) == row[5]


def test_every_prompt_has_a_rule_of_its_own():
    world = HiddenKeyWorld(WORDS)
    rules = world.rules(500, 4, np.random.default_rng(0))
    assert rules.shape == (500, 24) and len(np.unique(rules, axis=0)) > 490
    assert np.bincount(rules.flatten()).min() > 0.23 * rules.size


def test_too_few_words_are_refused():
    with pytest.raises(ValueError, match="300 usable words, but the world needs 1152"):
        HiddenKeyWorld(WORDS, words_per_key=12)
