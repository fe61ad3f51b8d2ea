"""Wall time of leaving early: against the whole model, against the truncated model of as many layers, and against masking.

How often inputs leave where is prescribed here, so that only the machinery is measured: embedding, exits, policy, compaction. What a
trained model gains at equal accuracy is measured in the chapter (claim C5), where it is a result and not a bound.
"""

import statistics
import time
from dataclasses import dataclass

import pytest
import torch

from compendium.early_exit.elasticbert import (
    ElasticBertConfig,
    ElasticBertForSequenceClassification,
)
from compendium.models.early_exit import FixedExit, entropy, simulate_exits, take_exits

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYERS = 12


@dataclass(frozen=True)
class Prescribed:
    """Rows leave after given exits; the entropy is computed all the same, as a real policy would."""

    exits: torch.Tensor  # (batch,), from 0

    def step(self, logits, state):
        state = state or {"wanted": self.exits, "seen": torch.zeros_like(self.exits)}
        certain = entropy(logits) < -1.0  # never
        leaves = (state["seen"] >= state["wanted"]) | certain
        return leaves, {"wanted": state["wanted"], "seen": state["seen"] + 1}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = ElasticBertConfig(
        vocab_size=1000, hidden_size=256, num_hidden_layers=LAYERS, num_attention_heads=4,
        intermediate_size=1024, num_labels=2,
    )  # fmt: skip
    return ElasticBertForSequenceClassification(config).to(DEVICE).eval()


def some_batch(rows, width=32):
    torch.manual_seed(1)
    lengths = torch.randint(width // 2, width + 1, (rows,))
    mask = (torch.arange(width) < lengths[:, None]).long()
    ids = torch.randint(1, 1000, (rows, width)) * mask
    return {"input_ids": ids.to(DEVICE), "attention_mask": mask.to(DEVICE)}


def in_turn(runs, repeats):
    """Median seconds of each of `runs`, measured in turn so that they share the machine's moods."""
    seconds = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run().sum().item()  # waits for the device
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


@torch.no_grad()
def test_one_input_at_a_time(model):
    """Depths 2 to 10, six on average, against the truncated model of six layers: as many layers in all."""
    depths = torch.tensor([2, 4, 6, 8, 10, 3, 9, 5, 7, 6])
    singles = [some_batch(1) for _ in depths]
    half = model.truncate(6)

    def dynamic():
        left = [
            model.early_exit(Prescribed(depth[None].to(DEVICE) - 1), **one).logits
            for depth, one in zip(depths, singles, strict=True)
        ]
        return torch.cat(left)

    runs = {
        "dynamic": dynamic,
        "six layers": lambda: torch.cat([half(**one).logits[0] for one in singles]),
        "whole": lambda: torch.cat([model(**one, exits=[LAYERS]).logits[0] for one in singles]),
    }
    seconds = in_turn(runs, repeats=7)
    print({name: f"{1e3 * value / len(depths):.2f} ms" for name, value in seconds.items()})
    assert seconds["whole"] / seconds["dynamic"] >= 1.5, (
        "leaving at half the depth saves too little"
    )
    assert seconds["six layers"] / seconds["dynamic"] >= 0.75, "exits and policy cost too much"


@torch.no_grad()
def test_a_batch(model):
    """Most rows leave early, some stay to the end: compaction against computing all rows at all layers."""
    batch = some_batch(64)
    wanted = torch.arange(64, device=DEVICE) % 16
    wanted = torch.where(
        wanted < 12, wanted // 4, LAYERS - 1
    )  # 1, 2, 3, or all 12 layers: mean 4.5
    policy, half = Prescribed(wanted), model.truncate(6)

    def masked():
        logits = model(**batch).logits
        return take_exits(logits, simulate_exits(policy, logits))

    runs = {
        "dynamic": lambda: model.early_exit(policy, **batch).logits,
        "masked": masked,
        "six layers": lambda: half.early_exit(FixedExit(0), **batch).logits,
    }
    torch.testing.assert_close(runs["dynamic"](), masked(), rtol=1e-3, atol=1e-4)
    seconds = in_turn(runs, repeats=5)
    print({name: f"{1e3 * value:.1f} ms" for name, value in seconds.items()})
    assert seconds["masked"] / seconds["dynamic"] >= 1.6, "finished rows are not spared"
    assert seconds["six layers"] / seconds["dynamic"] >= 1.0, "fewer layers, yet slower"
