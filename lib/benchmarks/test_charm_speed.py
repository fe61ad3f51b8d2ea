"""CHARM's two costs against the plain way: the battles of many models, and letters by probability.

Battles: a peer that does what the paper's words say, with sets of ids for each of the 400 pairs of 20 models, on links of
CHARM's shape (500 items, 759 facts). Letters: OpenCompass's way, the mean loss of the whole text once for every letter,
against one row an item; same model, same batches by length, same letters chosen. Reading options: the two readers alone, which
are regular expressions and cheap; their cost is printed beside, without a bound.
"""

import time

import numpy as np
import pandas as pd
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from compendium.evaluation.charm import Links, choose_options, frmm, mib, option_prompt, options_of
from compendium.metrics.graders import extract_option
from compendium.models.scoring import LanguageModelScorer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def best_seconds(ways, repeats=3):
    """The best time of each way; processor time on a CPU, which a busy machine distorts less."""
    clock = time.perf_counter if DEVICE.type == "cuda" else time.process_time
    times = [[] for _ in ways]
    for repeat in range(repeats + 1):
        for way, seconds in zip(ways, times, strict=True):
            begin = clock()
            way()
            if repeat:
                seconds.append(clock() - begin)
    return [min(seconds) for seconds in times]


def many_models(num_models=20, num_items=500, num_facts=759, facts_per_item=3.5):
    rng = np.random.default_rng(0)
    items, facts = [f"q{i}" for i in range(num_items)], [f"f{i}" for i in range(num_facts)]
    names = [f"m{i}" for i in range(num_models)]
    links = Links(items, facts, rng.random((num_items, num_facts)) < facts_per_item / num_facts)
    reasoning = pd.DataFrame(rng.random((num_items, num_models)) < 0.6, items, names)
    memory = pd.DataFrame(rng.random((num_facts, num_models)) < 0.8, facts, names)
    return reasoning, memory, links


def with_sets(reasoning, memory, links):
    """Filtering and battles with sets of ids and dictionaries."""
    rids = {f: [links.reasoning_ids[i] for i in np.flatnonzero(links.needed[:, column])]
            for column, f in enumerate(links.memory_ids)}  # fmt: skip
    left = {}
    for model in reasoning:
        remembered = memory[model].to_dict()
        suspect = {item for fact, known in remembered.items() if not known for item in rids[fact]}
        left[model] = set(links.reasoning_ids) - suspect
    right = {model: {i for i, c in reasoning[model].to_dict().items() if c} for model in reasoning}
    difference = {}
    for i in reasoning:
        for j in reasoning:
            shared = left[i] & left[j]
            gap = len(right[i] & shared) - len(right[j] & shared)
            difference[i, j] = 100 * gap / len(shared) if shared else np.nan
    return difference


def test_battles_against_sets():
    scores = many_models()
    expected, found = with_sets(*scores), mib(*scores).difference
    for (i, j), value in expected.items():
        np.testing.assert_allclose(found.at[i, j], value, equal_nan=True, atol=1e-9)
    plain, fast = best_seconds([lambda: with_sets(*scores), lambda: mib(*scores)], 8)
    print(
        f"20 models: battles in {1e3 * fast:.1f} ms, with sets {1e3 * plain:.1f} ms (x{plain / fast:.1f})"
    )
    assert fast < 1.0
    assert plain / fast >= 3.0, f"only {plain / fast:.2f} times as fast as sets"


WORDS = [f"w{i}" for i in range(2000)]


def language_model():
    vocabulary = ["?", *WORDS, *(f"({x})" for x in "ABCDEF"), *"ABCDEF", "A:"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?", pad_token="?")
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(vocabulary), n_embd=128, n_layer=4, n_head=4, n_positions=256)
    ends = dict(bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(GPT2Config(initializer_range=0.1, **sizes, **ends))
    return model.to(DEVICE).eval(), tokenizer


def some_questions(num_items=60):
    """Questions with two to six options behind three worked examples of the same task."""
    rng = np.random.default_rng(1)
    words = lambda low, high: " ".join(rng.choice(WORDS, rng.integers(low, high)))  # noqa: E731
    shots = {letters: words(90, 150) for letters in ("AB", "ABCD", "ABCDEF")}
    questions, examples = [], []
    for letters in rng.choice(list(shots), num_items, p=[0.4, 0.5, 0.1]):
        questions.append(words(15, 40) + " " + " ".join(f"({x}) {words(1, 4)}" for x in letters))
        examples.append(shots[letters])
    return questions, examples


@torch.no_grad()
def by_whole_texts(model, tokenizer, questions, shots, tokens_per_batch=8192):
    """The letter whose whole text has the lowest mean loss, texts batched by length."""
    texts = [(i, x, f"{option_prompt(q, h)} {x}") for i, (q, h) in enumerate(zip(questions, shots, strict=True)) for x in options_of(q)]  # fmt: skip
    rows = sorted(((len(ids), i, x, ids) for (i, x, _), ids in zip(texts, tokenizer([t for *_, t in texts])["input_ids"], strict=True)))  # fmt: skip
    losses, start = {}, 0
    while start < len(rows):
        size = max(1, tokens_per_batch // rows[min(start + 63, len(rows) - 1)][0])
        batch, start = rows[start : start + size], start + size
        length = max(row[0] for row in batch)
        ids = torch.tensor([row[3] + [0] * (length - row[0]) for row in batch], device=DEVICE)
        labels = torch.tensor([row[3] + [-100] * (length - row[0]) for row in batch], device=DEVICE)
        logits = model(input_ids=ids).logits[:, :-1].float()
        each = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels[:, 1:], reduction="none"
        )
        for (count, i, x, _), loss in zip(batch, each.sum(1).tolist(), strict=True):
            losses.setdefault(i, {})[x] = loss / (count - 1)
    return [min(losses[i], key=losses[i].get) for i in range(len(questions))]


def test_letters_against_whole_texts():
    torch.set_num_threads(1)
    (model, tokenizer), task = language_model(), some_questions()
    ours = lambda: choose_options(LanguageModelScorer(model, tokenizer), *task)  # noqa: E731
    plain = lambda: by_whole_texts(model, tokenizer, *task)  # noqa: E731
    same = np.mean([a == b for a, b in zip(ours(), plain(), strict=True)])
    assert same >= 0.95, f"only {100 * same:.0f} % of the letters agree"  # ties in float32
    slow, fast = best_seconds([plain, ours], 2)
    per_second = len(task[0]) / fast
    print(
        f"letters: {per_second:.0f} items/s, {len(task[0]) / slow:.0f} by whole texts (x{slow / fast:.1f})"
    )
    assert slow / fast >= 2.5, f"only {slow / fast:.2f} times as fast as whole texts"


def test_reading_options_costs_nothing():
    chain = "先看选项(A)，再看选项(B)。" * 20 + "So the answer is (C)."
    official, last, frame = best_seconds(
        [
            lambda: [extract_option(chain) for _ in range(1800)],
            lambda: [extract_option(chain, "last") for _ in range(1800)],
            lambda: frmm(*many_models()),
        ]
    )
    print(
        f"1,800 chains read in {1e3 * official:.1f} ms as published, {1e3 * last:.1f} ms by the last letter; filter {1e3 * frame:.0f} ms"
    )
    assert official + last < 5
