"""Scoring candidate demonstrations: batched by length with a memory, against one pair at a time.

Both read the same prompts with the same small GPT-2 and give the same scores. The setting is UDR's: candidates of
every query under a label space, scored again after mining has replaced half of them.
"""

import time

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from compendium.models.scoring import LanguageModelScorer
from compendium.retrieval.udr import Example, LMScorer, Task, build_icl_prompt, continuation

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LABELS = ("great", "terrible")
WORDS = [f"w{i}" for i in range(2000)] + ["It", "was", ".", *LABELS]


def setting(num_queries=12, num_candidates=10):
    """A task, its queries, and the candidates of two rounds, of which the second repeats half."""
    rng = np.random.default_rng(0)
    rows = [
        Example(" ".join(rng.choice(WORDS[:2000], rng.integers(3, 30))), str(rng.choice(LABELS)))
        for _ in range(200)
    ]
    task = Task("sst2", "", rows, labels=LABELS, template="{text} It was {answer} .")
    first = rng.integers(200, size=(num_queries, num_candidates))
    second = np.where(np.arange(num_candidates) % 2, first, rng.integers(200, size=first.shape))
    return task, rows[:num_queries], [[[rows[i] for i in r] for r in c] for c in (first, second)]


def language_model():
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="."))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token=".")
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(WORDS), n_embd=128, n_layer=4, n_head=4, n_positions=128)
    return GPT2LMHeadModel(GPT2Config(**sizes)).to(DEVICE).eval(), tokenizer


@torch.no_grad()
def one_pair_at_a_time(model, tokenizer, task, queries, demos):
    """The plain loop: every label after every prompt, the whole model each time."""
    scores = np.zeros((len(queries), len(demos[0])))
    for i, query in enumerate(queries):
        for j, demo in enumerate(demos[i]):
            prompt = tokenizer(build_icl_prompt([demo], query.text, task))["input_ids"]
            total = {}
            for label in task.labels:
                target = tokenizer(continuation(task, label))["input_ids"]
                logits = model(torch.tensor([prompt + target], device=DEVICE)).logits[0].float()
                logp = logits.log_softmax(-1)
                steps = range(len(prompt) - 1, len(prompt) + len(target) - 1)
                total[label] = sum(
                    logp[t, token].item() for t, token in zip(steps, target, strict=True)
                )
            normaliser = np.logaddexp.reduce(list(total.values()))
            scores[i, j] = np.exp(total[query.answer] - normaliser)
    return scores


def test_batched_scoring_against_a_loop():
    (task, queries, rounds), (model, tokenizer) = setting(), language_model()
    LMScorer(LanguageModelScorer(model, tokenizer)).score(task, queries[:2], rounds[0][:2])
    one_pair_at_a_time(model, tokenizer, task, queries[:1], rounds[0][:1])
    begin = time.perf_counter()
    slow = [one_pair_at_a_time(model, tokenizer, task, queries, demos) for demos in rounds]
    seconds_of_loop = time.perf_counter() - begin
    begin = time.perf_counter()
    scorer = LMScorer(LanguageModelScorer(model, tokenizer))
    fast = [scorer.score(task, queries, demos) for demos in rounds]
    seconds = time.perf_counter() - begin
    for ours, theirs in zip(fast, slow, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)
    asked, computed = scorer.language_model.asked, scorer.language_model.computed
    ratio = seconds_of_loop / seconds
    print(
        f"{asked} pairs asked, {computed} computed: {seconds:.2f} s, loop {seconds_of_loop:.2f} s, x{ratio:.1f}"
    )
    assert ratio >= 3.0, f"only {ratio:.1f} times as fast as one pair at a time"
