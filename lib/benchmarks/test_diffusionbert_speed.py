"""A training step of masked diffusion: the collapsed loss against D3PM's distributions over the whole vocabulary.

The peer is the formulation of the released code: one-hot tokens, transition probabilities and both posteriors as tensors of
batch × length × vocabulary. Vocabulary and length are BERT's; the encoder is small, so that the loss is what is compared.
"""

import os
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F

from compendium.generation.diffusionbert import (
    AbsorbingSchedule,
    DiffusionBertConfig,
    DiffusionBertForMaskedDiffusion,
    noise,
)

BATCH, LENGTH, STEPS, MASK = 8, 64, 64, 103
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def setting(rows_per_chunk: int = 128):
    """A small BERT with BERT's vocabulary, and a noised batch."""
    torch.manual_seed(0)
    config = DiffusionBertConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_steps=STEPS,
        rows_per_chunk=rows_per_chunk,
    )  # fmt: skip
    model = DiffusionBertForMaskedDiffusion(config).to(DEVICE)
    ids = torch.randint(1000, config.vocab_size, (BATCH, LENGTH))
    noised = torch.ones_like(ids, dtype=torch.bool)
    noised[:, [0, -1]] = False
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "noised": noised}
    t = torch.linspace(2, STEPS, BATCH).long()
    generator = torch.Generator().manual_seed(0)
    noisy = noise(batch, AbsorbingSchedule(STEPS), t, MASK, generator=generator)
    return model, {name: value.to(DEVICE) for name, value in noisy.items()}


def collapsed(model, noisy):
    """The chapter's step."""
    return model(**noisy).loss


def one_hot(model, noisy):
    """D3PM's step: q(x_{t-1} | x_t, x_0) and its mixture over predictions, written out."""
    config, labels, t = model.config, noisy["labels"], noisy["timesteps"].float()
    logits = model(noisy["input_ids"], noisy["attention_mask"]).logits
    absorbing = F.one_hot(torch.tensor(MASK, device=DEVICE), config.vocab_size).float()
    logits = logits.masked_fill(absorbing.bool(), -torch.inf)
    prediction = logits.softmax(-1)
    text = labels != -100
    clean = F.one_hot(labels.clamp_min(0), config.vocab_size).float()
    shown = F.one_hot(noisy["input_ids"], config.vocab_size).float()
    beta = (1 / (STEPS - t + 1))[:, None, None]
    kept = (1 - (t - 1) / STEPS)[:, None, None]
    is_mask = shown[..., MASK, None]
    arrive = (1 - beta) * shown * (1 - is_mask) + is_mask * (beta + (1 - beta) * absorbing)

    def posterior(x0):
        joint = arrive * (kept * x0 + (1 - kept) * absorbing)
        return joint / joint.sum(-1, keepdim=True).clamp_min(1e-30)

    # a visible token stays whatever is predicted, so its own posterior stands for both
    q = posterior(clean)
    p = torch.where(is_mask.bool(), posterior(prediction), q)
    kl = (q * (q.clamp_min(1e-30).log() - p.clamp_min(1e-30).log())).sum(-1)
    nll = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return ((kl * text).sum() + config.hybrid_weight * nll.sum()) / len(labels)


def all_logits(model, noisy):
    """An MDLM-style step: weighted cross-entropy from the logits of all positions at once."""
    labels = noisy["labels"]
    logits = model(noisy["input_ids"], noisy["attention_mask"]).logits
    nll = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return ((noisy["weights"] + model.config.hybrid_weight) * nll).sum() / len(labels)


FORMS = {"collapsed": collapsed, "one_hot": one_hot, "all_logits": all_logits}


def seconds(names, rounds: int = 3) -> dict[str, float]:
    """The fastest of some steps of each form, taken in turns."""
    settings = {name: setting() for name in names}
    fastest = dict.fromkeys(names, float("inf"))
    for number in range(rounds + 1):
        for name, (model, noisy) in settings.items():
            start = time.perf_counter()
            FORMS[name](model, noisy).backward()
            model.zero_grad()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if number:
                fastest[name] = min(fastest[name], time.perf_counter() - start)
    return fastest


PEAK = """
import sys, torch
sys.path.insert(0, {folder!r})
from test_diffusionbert_speed import DEVICE, FORMS, setting
from compendium.experiment.reproducible import peak_memory, reset_peak_memory
torch.set_num_threads(1)
model, noisy = setting()
for p in model.parameters():
    p.grad = torch.zeros_like(p)  # the same for all forms
reset_peak_memory(DEVICE)
before = peak_memory(DEVICE)
FORMS[{name!r}](model, noisy).backward()
print("bytes", peak_memory(DEVICE) - before)
"""


def added_memory(name: str) -> float:
    """Peak memory in MB that one step adds to weights and gradients, in a process of its own."""
    program = PEAK.format(folder=os.path.dirname(__file__), name=name)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout.split()[-1]) / 1e6


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_all_forms_are_the_same_loss():
    model, noisy = setting()
    losses, gradients = {}, {}
    for name in ("collapsed", "one_hot"):
        model.zero_grad()
        loss = FORMS[name](model, noisy)
        loss.backward()
        losses[name] = loss.item()
        gradients[name] = model.bert.encoder.layer[0].output.dense.weight.grad.clone()
    assert losses["collapsed"] == pytest.approx(losses["one_hot"], rel=1e-4)
    torch.testing.assert_close(gradients["collapsed"], gradients["one_hot"], rtol=1e-2, atol=1e-6)


def test_a_step_is_faster_than_the_one_hot_formulation():
    times = seconds(FORMS)
    print("\nstep: " + ", ".join(f"{name} {1e3 * value:.0f} ms" for name, value in times.items()))
    assert times["collapsed"] * 1.5 <= times["one_hot"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from Linux")
def test_a_step_needs_a_third_of_the_memory_or_less():
    memory = {name: added_memory(name) for name in FORMS}
    print("\nadded: " + ", ".join(f"{name} {value:.0f} MB" for name, value in memory.items()))
    assert memory["collapsed"] * 3 <= memory["one_hot"]
