"""What length generalization costs: a folded NoPE model against Llama with YaRN or dynamic NTK, tuning of the factors
against tuning of all weights, and the entropy in blocks of rows against eager attention maps.

Every ratio compares the same weights, shapes and inputs in the same run.
"""

import statistics
import time

import pytest
import torch
from transformers import LlamaForCausalLM

from compendium.experiment.reproducible import measured, peak_memory, reset_peak_memory
from compendium.language_models.nope import (
    NoPEConfig,
    NoPEForCausalLM,
    apply_head_scale,
    attention_entropy,
    entropy,
    fold_head_scale,
    only_scales_train,
)
from compendium.models.causal import small_config

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = {"hidden_size": 256, "num_layers": 4, "num_heads": 4, "max_length": 256}


def some_model(position="none", length=256, **options):
    torch.manual_seed(0)
    config = small_config(
        1000, NoPEConfig, position=position, **(SIZES | {"max_length": length}), **options
    )
    return NoPEForCausalLM(config).to(DEVICE).eval()


def peer(kind):
    """Hugging Face's Llama with its own repair for texts of eight times the length."""
    extra = {"original_max_position_embeddings": 256} if kind == "yarn" else {}
    torch.manual_seed(0)
    scaling = {"rope_type": kind, "factor": 8.0, "rope_theta": 10000.0, **extra}
    return LlamaForCausalLM(small_config(1000, rope_parameters=scaling, **SIZES)).to(DEVICE).eval()


def seconds(function):
    start = time.perf_counter()
    function()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def speed_ratio(fast, slow, repeats=9):
    """Median of slow / fast over pairs of runs that take turns."""
    fast(), slow()
    return statistics.median(seconds(slow) / seconds(fast) for _ in range(repeats))


@torch.no_grad()
def read(model, ids):
    return model(ids, use_cache=False, logits_to_keep=1).logits


@torch.no_grad()
def decode(model, ids, steps=40):
    answer = model(ids[:, :256], use_cache=True, logits_to_keep=1)
    for _ in range(steps):
        token = answer.logits[:, -1:].argmax(-1)
        answer = model(token, past_key_values=answer.past_key_values, use_cache=True)


@pytest.mark.parametrize("kind", ["yarn", "dynamic"])
@pytest.mark.parametrize("work", [read, decode], ids=["read", "decode"])
def test_folded_nope_against_scaled_rope(kind, work):
    ids = torch.randint(1000, (1, 1024), device=DEVICE)
    folded, rope = fold_head_scale(apply_head_scale(some_model(), 1.6)), peer(kind)
    ratio = speed_ratio(lambda: work(folded, ids), lambda: work(rope, ids), 15)
    print(f"{work.__name__}, folded NoPE / Llama with {kind}: x{ratio:.2f} tokens per second")
    assert ratio >= 0.95, f"only {ratio:.2f} times the speed of Llama with {kind}"


def test_factors_at_run_time_cost_little_and_folded_nothing():
    ids = torch.randint(1000, (1, 1024), device=DEVICE)
    plain = some_model()
    running, folded = (apply_head_scale(some_model(), 1.6) for _ in range(2))
    fold_head_scale(folded)
    with torch.no_grad():
        torch.testing.assert_close(read(running, ids), read(folded, ids), rtol=1e-3, atol=1e-3)
    at_run_time = speed_ratio(lambda: read(running, ids), lambda: read(plain, ids))
    as_weights = speed_ratio(lambda: read(folded, ids), lambda: read(plain, ids))
    print(
        f"speed of the plain model kept: x{at_run_time:.2f} with factors, x{as_weights:.2f} folded"
    )
    assert at_run_time >= 0.85 and as_weights >= 0.95


def step_of(model, parameters, ids):
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step():
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, optimizer


def test_tuning_the_factors_against_tuning_all_weights():
    ids = torch.randint(1000, (2, 512), device=DEVICE)
    scaled, whole = apply_head_scale(some_model()), some_model("rope")
    with only_scales_train(scaled) as scales:
        few, small = step_of(scaled, scales, ids)
        many, large = step_of(whole, list(whole.parameters()), ids)
        ratio = speed_ratio(few, many, repeats=7)
    kept = [
        sum(v.numel() for state in optimizer.state.values() for v in state.values() if v.ndim)
        for optimizer in (small, large)
    ]
    print(
        f"tuning factors / all weights: x{ratio:.2f} steps per second; state {kept[0]} against {kept[1]} numbers"
    )
    assert ratio >= 1.2 and kept[0] == 2 * 4 * 4 and kept[1] == 2 * whole.num_parameters()


@torch.no_grad()
def eager_entropy(model, ids):
    model.set_attn_implementation("eager")
    weights = model(ids, use_cache=False, output_attentions=True).attentions
    found = torch.stack([entropy(layer).mean(0) for layer in weights])
    model.set_attn_implementation("sdpa")
    return found


def memory_of(function):
    reset_peak_memory(DEVICE)
    before = peak_memory(DEVICE)
    with measured(DEVICE) as cost:
        function()
    return cost.peak_memory_bytes - before


def test_entropy_in_rows_against_eager_maps():
    ids = torch.randint(1000, (1, 2048), device=DEVICE)
    model = some_model()
    rows, maps = (lambda: attention_entropy(model, ids)), (lambda: eager_entropy(model, ids))
    torch.testing.assert_close(rows(), maps(), rtol=1e-3, atol=1e-3)
    ours, theirs = memory_of(rows), memory_of(maps)
    ratio = speed_ratio(rows, maps, repeats=2)
    print(
        f"entropy: x{ratio:.2f} the speed of eager maps, memory {ours / 2**20:.0f} / {theirs / 2**20:.0f} MiB"
    )
    assert theirs >= 3 * ours and ratio >= 0.8
