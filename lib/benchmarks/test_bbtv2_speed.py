"""A round of BBTv2 with batched candidates against one candidate at a time.

The peer is the plain way to ask: the whole model for every candidate, with its head at every position. The batched way runs
the layers below the searched one once, the candidates as one large batch above it, and the last layer and the head at the mask
alone. Same model, same candidates, same precision, equal losses; the ratio is of evaluations per second. A second ratio
tells how much is due to batching alone. In deeper models the last layer and the head weigh less and the first ratio is lower:
what is shared below the searched layer is half of the work at most.
"""

import time

import torch
import transformers

from compendium.models.prompts import MaskedLM
from compendium.prompts.bbtv2 import verbalizer_loss

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Words:
    """Four label words."""

    token_ids = (11, 12, 13, 14)


def service(num_layers, vocab_size):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        intermediate_size=512,
    )
    return MaskedLM(transformers.BertForMaskedLM(config).to(DEVICE), Words, max_tokens=2**12)


def some_task(num_examples, length, num_layers, popsize):
    """A batch like the sentiment task of preset mini, and for each layer a generation that differs from there on only."""
    torch.manual_seed(1)
    ids = torch.randint(15, 1000, (num_examples, length))
    mask = torch.ones_like(ids)
    mask[::3, length - 2 :] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    batch |= {"positions": torch.full((num_examples,), 8), "labels": torch.arange(num_examples) % 4}
    incumbent = 0.3 * torch.randn(num_layers, 5, 128)
    generations = []
    for layer in range(num_layers):
        prompts = incumbent.repeat(popsize, 1, 1, 1)
        prompts[:, layer] = 0.3 * torch.randn(popsize, 5, 128)
        generations.append(prompts)
    return batch, generations


def plain_round(lm, batch, generations):
    scores = [torch.stack([lm(batch, prompt) for prompt in prompts]) for prompts in generations]
    return verbalizer_loss(torch.cat(scores), batch["labels"]).cpu()


def single_round(lm, batch, generations):
    """One at a time as well, but with the shortcuts of the batched way."""
    scores = [
        lm.candidates(batch, prompt[None], layer)
        for layer, prompts in enumerate(generations)
        for prompt in prompts
    ]
    return verbalizer_loss(torch.cat(scores), batch["labels"]).cpu()


def batched_round(lm, batch, generations):
    scores = [lm.candidates(batch, prompts, layer) for layer, prompts in enumerate(generations)]
    return verbalizer_loss(torch.cat(scores), batch["labels"]).cpu()


def evaluations_per_second(ways, *arguments, repeats=4):
    """Best speed of each way on one thread; processor time on a CPU, which a busy machine distorts less."""
    count = sum(map(len, arguments[-1]))
    clock = time.perf_counter if DEVICE.type == "cuda" else time.process_time
    times = [[] for _ in ways]
    for repeat in range(repeats + 1):
        for way, seconds in zip(ways, times, strict=True):
            begin = clock()
            way(*arguments)
            if repeat:
                seconds.append(clock() - begin)
    return [count / min(seconds) for seconds in times]


def test_batched_candidates_against_one_at_a_time():
    torch.set_num_threads(1)
    num_layers, num_examples, popsize = 4, 32, 10  # two classes, 16 examples each
    lm = service(num_layers, vocab_size=4000)
    task = some_task(num_examples, 19, num_layers, popsize)
    ways = (plain_round, single_round, batched_round)
    expected = plain_round(lm, *task)
    for way in ways[1:]:
        torch.testing.assert_close(way(lm, *task), expected, rtol=1e-4, atol=1e-5)
    plain, single, batched = evaluations_per_second(ways, lm, *task)
    print(
        f"{batched:.0f} evaluations/s batched, {plain:.0f} one at a time (x{batched / plain:.2f}), "
        f"{single:.0f} one at a time with the same shortcuts (x{batched / single:.2f})"
    )
    assert batched / plain >= 3.0, f"only {batched / plain:.2f} times as fast as one at a time"
    assert batched > single
