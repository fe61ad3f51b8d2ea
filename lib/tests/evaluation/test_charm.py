"""CHARM: prompts, graders, FRMM and MIB, and its tasks for the lm-evaluation-harness."""

import json
import math
import threading
from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compendium.data.loaders import CHARM_STRATEGIES, CHARM_TASKS, charm_shots, load
from compendium.data.registry import DataError, default_registry
from compendium.evaluation import charm
from compendium.evaluation.charm import (
    LINKED_TASKS,
    PROMPTS,
    SHORT_NAMES,
    Links,
    accuracy_on,
    ask_memory,
    ask_reasoning,
    battles,
    choose_options,
    expected_integrated,
    frmm,
    grade_memory,
    judge_prompt,
    link_items,
    memory_prompt,
    mib,
    option_prompt,
    options_of,
    shortened,
    shuffle_links,
    simulate,
    write_lm_eval_tasks,
)
from compendium.metrics.graders import official_option
from compendium.models.client import ModelError, OpenAICompatible, StoredTrace
from compendium.models.scoring import LanguageModelScorer
from compendium.models.server import ModelServer

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def real_folder():
    """The folder of the real files, or a skip."""
    try:
        files = default_registry().fetch("charm")
    except DataError as error:
        pytest.skip(f"CHARM is not on this machine: {error}")
    return files["reasoning/Chinese_Sport_Understanding.json"].parents[1]


# -- prompts ------------------------------------------------------------------------------------


def test_the_five_prompts_character_by_character():
    built = {name: PROMPTS[name].build("{q} (A)", "H{shots}") for name in CHARM_STRATEGIES}
    chinese = "请按照给定的例子回答问题。\nH{shots}\n\nQ：{q} (A)\nA："
    english = "Follow the given examples and answer the question.\nH{shots}\n\n"
    assert built["Direct"] == chinese
    assert built["ZH-CoT"] == chinese + "让我们一步一步来思考。"
    assert built["EN-CoT"] == chinese + "Let's think step by step."
    assert built["Translate-EN"] == english + "Q: {q} (A)\nA: Let's think step by step."
    assert built["XLT"] == english + (
        " I want you to act as an commonsense reasoning expert for Chinese. \n Request: {q} (A)\n"
        "You should retell the request in English.\nYou should do the answer step by step to choose the right answer.\n"
        "You should step-by-step answer the request.\nYou should tell me the answer in this format 'So the answer is'."
    )
    assert [PROMPTS[name].language for name in CHARM_STRATEGIES] == ["zh"] * 4 + ["en"]
    assert memory_prompt("谁？") == "请尽可能简短地回答下述问题。\n问题：谁？\n答："
    assert option_prompt("q", "H") == "H\nq\nA:"
    with pytest.raises(ValueError, match="prompt strategy 'XTL' is unknown; did you mean 'XLT'"):
        charm.prompt_of("XTL")


def test_options():
    question = "哪个？(1) 是 \n选项：\n(A) 一 \n(B)二(C)\n 三"
    assert options_of(question) == {"A": "一", "B": "二", "C": "三"}
    assert options_of("没有选项") == {}


# -- graders ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "target", "right"),
    [
        ("黄渤和徐峥", "黄渤", True), ("徐峥", "黄渤", False), ("", "黄渤", False),
        ("徐峥", "[not]黄渤", True), ("黄渤", "[not]黄渤", False), ("", "[not]黄渤", True),
        ("不知道，黄渤？", "黄渤", False), ("无法回答", "[not]黄渤", False), ("我不认识他", "[not]黄渤", False),
        ("喜剧", "['奇幻','喜剧']", True), ("喜剧", '["奇幻", "喜剧"]', True), ("爱情", "['奇幻','喜剧']", False),
        ("1881年", "[1881]", True),
    ],
)  # fmt: skip
def test_memory_by_rule(answer, target, right):
    assert grade_memory(answer, target) is right


def test_damaged_references_and_judges():
    with pytest.raises(ValueError, match="is not a Python list of texts; mend it"):
        grade_memory("x", "['a'")
    with pytest.raises(ValueError, match="is not a Python list"):
        grade_memory("x", "[__import__('os')]")
    with pytest.raises(ValueError, match="judged task 'Time' is unknown"):
        judge_prompt("Time", "", "", "")
    text = judge_prompt("Time_Understanding", "何时？", "202年到8年", "前100年")
    places = [text.index(part) for part in ("period", "何时？", "202年到8年", "前100年")]
    assert places == sorted(places)


# -- FRMM and MIB -------------------------------------------------------------------------------


def some_links(rng, num_items=25, num_facts=18, density=0.12):
    needed = rng.random((num_items, num_facts)) < density
    items = [f"q{i}" for i in range(num_items)]
    facts = [f"f{i}" for i in range(num_facts)]
    return Links(items, facts, needed, rng.choice(["a", "b"], num_items))


def some_answers(links, rng, num_models=4, rate=0.7):
    models = [f"m{i}" for i in range(num_models)]
    reasoning = rng.random((len(links.reasoning_ids), num_models)) < 0.6
    memory = rng.random((len(links.memory_ids), num_models)) < rate
    return (
        pd.DataFrame(reasoning, links.reasoning_ids, models),
        pd.DataFrame(memory, links.memory_ids, models),
    )


def by_sets(reasoning, memory, links):
    """Both scores as the paper words them, with sets."""
    rids = {
        fact: {links.reasoning_ids[i] for i in np.flatnonzero(links.needed[:, column])}
        for column, fact in enumerate(links.memory_ids)
    }
    left = {}
    for model in reasoning:
        wrong = {fact for fact in links.memory_ids if not memory.at[fact, model]}
        suspect = set().union(*(rids[fact] for fact in wrong))
        left[model] = {item for item in links.reasoning_ids if item not in suspect}

    def accuracy(model, items):
        if not items:
            return math.nan
        return 100 * sum(bool(reasoning.at[item, model]) for item in items) / len(items)

    filtered = {model: accuracy(model, left[model]) for model in reasoning}
    difference = {
        i: {j: accuracy(i, left[i] & left[j]) - accuracy(j, left[i] & left[j]) for j in reasoning}
        for i in reasoning
    }
    return left, filtered, difference


@given(st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_both_scores_against_sets(seed):
    rng = np.random.default_rng(seed)
    links = some_links(rng)
    reasoning, memory = some_answers(links, rng, rate=rng.choice([0.2, 0.7, 0.95]))
    left, filtered, difference = by_sets(reasoning, memory, links)
    order = rng.permutation(reasoning.index), rng.permutation(memory.index)
    columns = list(rng.permutation(memory.columns))
    table = frmm(reasoning.loc[order[0]], memory.loc[order[1], columns], links)
    fight = mib(reasoning.loc[order[0]], memory.loc[order[1], columns], links)
    assert list(table["retained"]) == [len(left[model]) for model in reasoning]
    np.testing.assert_allclose(table["frmm"], list(filtered.values()), equal_nan=True)
    np.testing.assert_allclose(table["memorization"], 100 * memory.mean(), equal_nan=True)
    np.testing.assert_allclose(table["integrated"], 100 * reasoning.mean(), equal_nan=True)
    for i in reasoning:
        for j in reasoning:
            np.testing.assert_allclose(
                fight.difference.at[i, j], difference[i][j], equal_nan=True, atol=1e-9
            )
            assert fight.shared.at[i, j] == len(left[i] & left[j])
        defined = [value for value in difference[i].values() if not math.isnan(value)]
        expected = np.mean(defined) if defined else math.nan
        np.testing.assert_allclose(fight.score[i], expected, equal_nan=True, atol=1e-9)
    np.testing.assert_allclose(fight.difference, -fight.difference.T, equal_nan=True)


def test_with_perfect_memory_the_filter_is_nothing():
    rng = np.random.default_rng(0)
    links = some_links(rng)
    reasoning, memory = some_answers(links, rng, rate=1.1)
    table = frmm(reasoning, memory, links)
    assert (table["frmm"] == table["integrated"]).all() and (table["change"] == 0).all()
    assert (table["retained"] == len(reasoning)).all()
    score = mib(reasoning, memory, links).score
    np.testing.assert_allclose(score, table["integrated"] - table["integrated"].mean())
    assert abs(score.sum()) < 1e-9


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_learning_a_fact_never_shrinks_what_is_left(seed):
    rng = np.random.default_rng(seed)
    links = some_links(rng)
    remembered = rng.random((3, 18)) < 0.6
    more = remembered | (rng.random((3, 18)) < 0.3)
    before, after = links.retained(remembered), links.retained(more)
    assert (before <= after).all()
    assert links.retained(np.ones((1, 18))).all()
    needs_some = links.needed.any(1)
    assert (links.retained(np.zeros((1, 18)))[0] == ~needs_some).all()


def test_rank_changes():
    links = Links(["q0", "q1"], ["f0", "f1"], np.eye(2))
    reasoning = pd.DataFrame({"x": [True, False], "y": [False, False]}, ["q0", "q1"])
    memory = pd.DataFrame({"x": [False, True], "y": [True, True]}, ["f0", "f1"])
    table = frmm(reasoning, memory, links)
    assert table.loc["x", "integrated"] == 50 and table.loc["x", "frmm"] == 0
    assert list(table["change"]) == [0, 1]  # both are first now


def test_items_outside_the_links_do_not_count():
    rng = np.random.default_rng(1)
    links = some_links(rng)
    reasoning, memory = some_answers(links, rng)
    extra = pd.DataFrame(True, ["stranger"], reasoning.columns)
    pd.testing.assert_frame_equal(
        frmm(pd.concat([extra, reasoning]), memory, links), frmm(reasoning, memory, links)
    )


def test_missing_answers_are_not_guessed():
    rng = np.random.default_rng(2)
    links = some_links(rng)
    reasoning, memory = some_answers(links, rng)
    with pytest.raises(
        ValueError, match="reasoning answers to 1 items are missing, first 'q0'; ask them"
    ):
        frmm(reasoning.drop(index="q0"), memory, links)
    unread = memory.astype(object)
    unread.loc["f3", "m1"] = None
    with pytest.raises(
        ValueError, match=r"memory answer of 'm1' to 'f3' is None; count it as wrong"
    ):
        mib(reasoning, unread, links)
    strange = reasoning.astype(object)
    strange.loc["q2", "m0"] = "yes"
    with pytest.raises(ValueError, match="reasoning answer of 'm0' to 'q2' is 'yes'"):
        frmm(strange, memory, links)


def test_one_sided_links_and_wrong_shapes():
    with pytest.raises(
        ValueError, match="item 'q' and fact 'f' are linked on one side only; load both"
    ):
        link_items([{"id": "q", "mids": ["f"]}], [{"id": "f", "rids": []}])
    with pytest.raises(ValueError, match=r"links of shape \(2, 2\) for \(1, 2\) items and facts"):
        Links(["q"], ["f", "g"], np.eye(2))


def test_shuffled_links_stay_in_their_task():
    rng = np.random.default_rng(3)
    links = some_links(rng)
    dealt = shuffle_links(links, np.random.default_rng(4))
    assert (dealt.needed != links.needed).any()
    for task in "ab":
        mine = links.tasks == task
        assert sorted(map(tuple, dealt.needed[mine])) == sorted(map(tuple, links.needed[mine]))


def test_accuracy_of_nothing_is_not_a_number():
    correct, kept = np.array([[True, False]] * 2), np.array([[True, True], [False, False]])
    found = accuracy_on(correct, kept)
    assert found[0] == 50 and math.isnan(found[1])
    difference, shared = battles(correct, kept)
    assert math.isnan(difference[0, 1]) and shared.tolist() == [[2, 0], [0, 0]]


# -- simulation ---------------------------------------------------------------------------------


def test_simulated_models_agree_with_the_formula():
    num, k = 4000, 3
    links = Links(range(num), range(num * k), np.repeat(np.eye(num, dtype=bool), k, axis=1))
    p, q = np.array([0.5, 0.8, 1.0]), np.array([0.9, 0.6, 0.3])
    correct, remembered = simulate(links, p, q, 0.2, np.random.default_rng(0))
    expected = expected_integrated(p, q, np.array(k), np.array(5))
    assert np.abs(correct.mean(1) - expected).max() < 0.02
    assert np.abs(remembered.mean(1) - p).max() < 0.02
    kept = links.retained(remembered)
    assert np.abs(accuracy_on(correct, kept) - 100 * q).max() < 5
    assert expected_integrated(1.0, 0.7, 4, 2) == pytest.approx(0.7)
    assert expected_integrated(0.0, 0.7, 4, 2) == pytest.approx(0.5)


def test_with_fame_the_better_read_know_all_that_the_others_know():
    rng = np.random.default_rng(0)
    links = some_links(rng, 40, 60)
    _, remembered = simulate(
        links, np.array([0.3, 0.7]), np.array([0.5, 0.5]), 0.25, rng, rng.random(60)
    )
    assert (remembered[0] <= remembered[1]).all() and remembered[0].sum() < remembered[1].sum()


# -- asking models ------------------------------------------------------------------------------

ITEMS = [
    {"id": "1", "task": "Sport_Understanding", "domain": "Chinese", "input": "一？\n(A) 是\n(B) 否", "target": "(B)"},
    {"id": "2", "task": "Sport_Understanding", "domain": "Global", "input": "二？\n(A) 是\n(B) 否", "target": "(A)"},
]  # fmt: skip
FACTS = [
    {"id": "f", "task": "Sport_Understanding", "input": "篮球？", "target": "['篮球','投篮']"},
    {"id": "g", "task": "Movie_and_Music_Recommendation", "input": "喜剧？", "target": "[not]喜剧"},
    {"id": "h", "task": "Time_Understanding", "input": "何年？", "target": "618年到907年"},
]
SHOTS = {("Sport_Understanding", "Chinese"): "甲", ("Sport_Understanding", "Global"): "乙"}


def stored(answers):
    return StoredTrace({}, greedy=answers)


def test_asking_reasoning():
    said = ["选项(A)错，答案是(B)", "(A)"]
    prompts = [PROMPTS["ZH-CoT"].build(i["input"], SHOTS[i["task"], i["domain"]]) for i in ITEMS]
    table = ask_reasoning(stored(dict(zip(prompts, said, strict=True))), ITEMS, "ZH-CoT", SHOTS)
    assert list(table.index) == ["1", "2"] and list(table["answer"]) == said
    assert list(table["correct"]) == [False, True] and list(table["correct_last"]) == [True, True]
    assert list(table["domain"]) == ["Chinese", "Global"]


def test_asking_memory_with_and_without_a_judge():
    said = {
        memory_prompt(f["input"]): a
        for f, a in zip(FACTS, ["投篮", "爱情片", "650年"], strict=True)
    }
    alone = ask_memory(stored(said), FACTS)
    assert list(alone["correct"]) == [True, True, False]
    verdicts = {
        judge_prompt(f["task"], f["input"], f["target"], said[memory_prompt(f["input"])]): v
        for f, v in zip([FACTS[0], FACTS[2]], ["I cannot say", "inside: [correct]"], strict=True)
    }
    judged = ask_memory(stored(said), FACTS, stored(verdicts))
    assert list(judged["correct"]) == [None, True, True]
    with pytest.raises(ModelError, match="the trace has 0"):
        ask_memory(stored({}), FACTS)


class Scripted(StoredTrace):
    """Answers (B) to everything, and counts."""

    def __init__(self):
        super().__init__({})
        self.asked, self._count_lock = [], threading.Lock()

    def _stored(self, request):
        with self._count_lock:
            self.asked.append(request.messages()[-1]["content"])
        return ["So the answer is (B)."]


def test_a_server_and_a_trace_give_the_same_table():
    scripted = Scripted()
    with ModelServer(scripted) as server:
        client = OpenAICompatible("local", server.base_url)
        table = ask_reasoning(client, ITEMS, "XLT", SHOTS, max_new_tokens=16)
    assert list(table["correct"]) == [True, False]
    assert sorted(scripted.asked) == sorted(
        PROMPTS["XLT"].build(i["input"], SHOTS[i["task"], i["domain"]]) for i in ITEMS
    )


# -- letters by probability ---------------------------------------------------------------------


def tiny_gpt(device="cpu", positions=128):
    """A random GPT-2 that reads bytes."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(["<end>", *alphabet])}, merges=[])
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<end>", pad_token="<end>"
    )
    torch.manual_seed(0)
    sizes = dict(n_embd=32, n_layer=2, n_head=2, n_positions=positions, initializer_range=1.0)
    ends = dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    config = transformers.GPT2Config(vocab_size=len(alphabet) + 1, **sizes, **ends)
    return transformers.GPT2LMHeadModel(config).to(device).eval(), tokenizer


@torch.no_grad()
def mean_loss(model, tokenizer, text):
    """OpenCompass's way: the mean loss over all tokens of the text."""
    ids = torch.tensor([tokenizer(text)["input_ids"]], device=model.device)
    return model(input_ids=ids, labels=ids).loss.item()


@pytest.mark.parametrize("device", DEVICES)
def test_letters_as_by_the_loss_of_whole_texts(device):
    model, tokenizer = tiny_gpt(device)
    questions = [f"{chr(97 + i) * 3}?\n(A) x\n(B) y" + "\n(C) z" * (i % 2) for i in range(12)]
    shots = ["s" * (i % 3) for i in range(12)]
    expected = []
    for question, shot in zip(questions, shots, strict=True):
        losses = {
            x: mean_loss(model, tokenizer, f"{shot}\n{question}\nA: {x}")
            for x in options_of(question)
        }
        expected.append(min(losses, key=losses.get))
    assert choose_options(LanguageModelScorer(model, tokenizer), questions, shots) == expected
    assert len(set(expected)) > 1


def test_long_questions_lose_their_beginning():
    model, tokenizer = tiny_gpt()
    scorer = LanguageModelScorer(model, tokenizer)
    text = "史" * 20 + "x" * 120
    short = shortened(scorer, text)
    assert text.endswith(short) and 121 <= scorer.count_tokens(short) <= 124
    assert scorer.count_tokens(shortened(scorer, "史" * 50)) == 123  # of bytes, three a character
    assert shortened(scorer, "short") == "short"
    assert len(choose_options(scorer, ["q" * 300 + "(A) x (B) y"], ["H" * 500])) == 1
    with pytest.raises(ValueError, match="has no options"):
        choose_options(scorer, ["(A) x", "none"], ["", ""])


# -- the harness --------------------------------------------------------------------------------


def invented_folder(root, per_task=3):
    """CHARM's layout with invented items for two tasks, some with awkward characters."""
    rng = np.random.default_rng(0)
    tasks = ["Sport_Understanding", "Time_Understanding"]
    for folder in ("reasoning", "reasoning_Translate-EN", "memorization"):
        (root / folder).mkdir(parents=True)
    for domain in ("Chinese", "Global"):
        for task in tasks:
            letters = "AB" if task == "Sport_Understanding" else "ABCD"
            for folder in ("reasoning", "reasoning_Translate-EN"):
                rows = [
                    {"id": f"{task}{i}", "input": f"{domain[0]}{i} {{{{x}}}} {folder[-2:]}?\n" + "\n".join(f"({x}) {x.lower()}" for x in letters),
                     "target": f"({rng.choice(list(letters))})"} for i in range(per_task)
                ]  # fmt: skip
                text = json.dumps({"canary": "none", "examples": rows}, ensure_ascii=False)
                (root / folder / f"{domain}_{task}.json").write_text(text, encoding="utf-8")
            for strategy in CHARM_STRATEGIES:
                folder = root / (
                    "few-shot-examples" + "_Translate-EN" * (strategy == "Translate-EN")
                )
                folder.mkdir(exist_ok=True)
                path = folder / f"{domain}_{task}_{strategy}.txt"
                path.write_text(
                    f"例 {{% raw %}} {{{{1}}}} {task[:2]}\n\nQ: ?\nA: (A)", encoding="utf-8"
                )
    for task in LINKED_TASKS:
        rows = [{"id": f"m{i}", "input": f"{task[0]}{i}?", "target": t, "rids": []} for i, t in enumerate(["e", "[not]e", "['a', 'i']"])]  # fmt: skip
        (root / "memorization" / f"Chinese_{task}.json").write_text(json.dumps({"examples": rows}))
    return tasks


def test_the_functions_that_travel_with_the_tasks():
    doc = {"input": "哪个？\n(A) 一\n(B) 二\n(C) 三", "target": "(C)"}
    assert charm.option_letters(doc) == ["A", "B", "C"]
    assert charm.option_index(doc) == 2 and charm.option_index(doc | {"target": "(A)"}) == 0
    assert charm.grade_reasoning(doc, ["(A)不对，答案是(C)"]) == {"acc": 0.0, "acc_last": 1.0}
    assert charm.grade_reasoning(doc, ["So the answer is (C)."]) == {"acc": 1.0, "acc_last": 1.0}
    assert charm.grade_fact({"target": "[not]三"}, ["二"]) == {"acc": 1.0}


def test_the_harness_asks_and_grades_as_we_do(tmp_path, monkeypatch):
    if not find_spec("lm_eval"):
        pytest.skip("the lm-evaluation-harness is not installed")
    import datasets
    from lm_eval.models.huggingface import HFLM

    from compendium.data.harness import run_harness

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tasks = invented_folder(tmp_path / "data")
    folder = tmp_path / "tasks"
    written = write_lm_eval_tasks(
        folder, tmp_path / "data", ["ZH-CoT", "Translate-EN", "Letters"], tasks, max_new_tokens=8
    )
    assert len(written) == 3 + 3 * 2 * (2 + 1) + 4 + 1 + 1
    model, tokenizer = tiny_gpt(positions=400)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=4, max_length=400)
    groups = ["charm_cn_zh_cot", "charm_gl_translate_en", "charm_cn_letters", "charm_memory"]
    found = run_harness(lm, folder, groups, bootstrap_iters=0)
    check_generated(found, tmp_path / "data", "charm_cn_spu_zh_cot", "ZH-CoT", "Chinese")
    check_generated(found, tmp_path / "data", "charm_gl_tu_translate_en", "Translate-EN", "Global")
    check_letters(found, tmp_path / "data", model, tokenizer)
    for sample in found["samples"]["charm_memory_mmr"]:
        said, target = sample["filtered_resps"][0], sample["doc"]["target"]
        assert sample["acc"] == grade_memory(said, target)
        assert sample["arguments"][0][0] == memory_prompt(sample["doc"]["input"])
    check_groups(found)


def check_generated(found, root, name, strategy, domain):
    """Prompts and grades of one task are ours."""
    task = {v.lower(): k for k, v in SHORT_NAMES.items()}[name.split("_")[2]]
    suffix = "_Translate-EN" if strategy == "Translate-EN" else ""
    rows = json.loads((root / f"reasoning{suffix}" / f"{domain}_{task}.json").read_text())[
        "examples"
    ]
    path = root / f"few-shot-examples{suffix}" / f"{domain}_{task}_{strategy}.txt"
    shots = path.read_text(encoding="utf-8")
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    assert len(samples) == len(rows)
    for sample, row in zip(samples, rows, strict=True):
        assert sample["arguments"][0][0] == PROMPTS[strategy].build(row["input"], shots)
        said = sample["filtered_resps"][0]
        assert sample["acc"] == (official_option(said) == row["target"][1])
        assert sample["acc_last"] == (charm.last_option(said) == row["target"][1])


def check_letters(found, root, model, tokenizer):
    rows = json.loads((root / "reasoning" / "Chinese_Time_Understanding.json").read_text())[
        "examples"
    ]
    path = root / "few-shot-examples" / "Chinese_Time_Understanding_Direct.txt"
    shots = path.read_text(encoding="utf-8")
    scorer = LanguageModelScorer(model, tokenizer)
    letters = choose_options(scorer, [row["input"] for row in rows], [shots] * len(rows))
    samples = sorted(found["samples"]["charm_cn_tu_letters"], key=lambda sample: sample["doc_id"])
    right = [float(x == row["target"][1]) for x, row in zip(letters, rows, strict=True)]
    assert [sample["acc"] for sample in samples] == right


def check_groups(found):
    """A group is the plain mean of its tasks."""
    for group in ("charm_cn_zh_cot", "charm_memory"):
        members = found["group_subtasks"][group]
        mean = np.mean([found["results"][member]["acc,none"] for member in members])
        assert found["results"][group]["acc,none"] == pytest.approx(mean)


def test_all_tasks_of_the_real_files_are_written(tmp_path):
    import jinja2
    import yaml

    root = real_folder()
    written = write_lm_eval_tasks(tmp_path, root)
    assert len(written) == 3 + 6 * 2 * 7 + 6 * 2 + 4 + 1 + 1
    jinja = jinja2.Environment(keep_trailing_newline=True)
    rng = np.random.default_rng(0)
    for strategy in CHARM_STRATEGIES:
        task, domain = str(rng.choice(CHARM_TASKS)), str(rng.choice(["Chinese", "Global"]))
        region, short = {"Chinese": "cn", "Global": "gl"}[domain], SHORT_NAMES[task].lower()
        name = f"charm_{region}_{short}_{strategy.lower().replace('-', '_')}.yaml"
        fields = yaml.safe_load((tmp_path / name).read_text(encoding="utf-8"))
        text = jinja.from_string(fields["doc_to_text"]).render(input="问{{")
        assert text == PROMPTS[strategy].build("问{{", charm_shots(task, domain, strategy))


def test_missing_files_and_unknown_strategies(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="is missing; give the folder that holds reasoning/"
    ):
        write_lm_eval_tasks(tmp_path, tmp_path / "nowhere")
    invented_folder(tmp_path / "data")
    with pytest.raises(ValueError, match="prompt strategy 'COT' is unknown"):
        write_lm_eval_tasks(tmp_path, tmp_path / "data", ["COT"], ["Sport_Understanding"])


# -- the real items -----------------------------------------------------------------------------


def test_the_real_links_and_targets():
    real_folder()
    rows = [r for r in load("charm", domain="Chinese")["test"] if r["task"] in LINKED_TASKS]
    facts = list(load("charm", part="memorization")["test"])
    links = link_items(rows, facts)
    assert links.needed.shape == (500, 759)
    facts_of = {task: links.needed[links.tasks == task].sum(axis=1) for task in LINKED_TASKS}
    assert set(facts_of["Sport_Understanding"]) == {2}
    assert (facts_of["Anachronisms_Judgment"] == 0).sum() == 4
    for row in load("charm")["test"]:
        assert official_option(row["target"]) in options_of(row["input"])
    films = [f["target"] for f in facts if f["task"] == "Movie_and_Music_Recommendation"]
    assert sum(grade_memory("", target) for target in films) == 151
    for fact in facts:  # every reference is readable, and right by the rule
        target = fact["target"]
        assert grade_memory(target, target) is not target.startswith("[not]")


# -- the paper's setting, without weights -------------------------------------------------------

SIZES = {  # vocabulary, inner size, key and value heads, billions of parameters
    "Qwen2": (151936, 11008, 32, 7.72),  # Qwen1.5-7B-Chat
    "Llama": (128256, 14336, 8, 8.03),  # Meta-Llama-3-8B-Instruct
}


@pytest.mark.parametrize("family", SIZES)
def test_the_papers_models_on_the_meta_device(family):
    import transformers

    vocabulary, inner, heads, billions = SIZES[family]
    config = getattr(transformers, f"{family}Config")(
        vocab_size=vocabulary, num_hidden_layers=32, hidden_size=4096, intermediate_size=inner,
        num_attention_heads=32, num_key_value_heads=heads, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        logits = model(input_ids=torch.zeros(2, 7, dtype=torch.long)).logits
    assert logits.shape == (2, 7, vocabulary)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)
