"""NoPE: parity with Llama and with SmolLM3 without rotations, exact folding, entropy, tuning, passkeys, recall."""

import copy
import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from compendium.language_models.nope import (
    PASSKEY_FILLER,
    HeadScaleTuner,
    NoPEConfig,
    NoPEForCausalLM,
    PasskeyPrompt,
    RecallTask,
    apply_head_scale,
    attention_entropy,
    entropy,
    fit_uniform_scale,
    fold_head_scale,
    head_scales,
    logarithmic_slope,
    only_scales_train,
    passkey_accuracy,
    passkey_prompts,
    projected_adamw,
    recall_logits,
    recall_loss,
    recall_model,
    remove_head_scale,
    scales_from,
    uniform_scale,
    warmup_cosine,
)
from compendium.models.causal import TokenWindows, attention_modules, continuation, small_config
from compendium.training.loop import TrainingConfig, train

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
on_devices = pytest.mark.parametrize("device", DEVICES)
KINDS = {
    "nope": (NoPEForCausalLM, NoPEConfig),
    "llama": (LlamaForCausalLM, None),
    "mistral": (MistralForCausalLM, MistralConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config),
}
SCALES = torch.tensor([[1.0, 1.3, 1.7, 2.9], [0.6, 1.0, 2.2, 1.1]])


def some_model(kind="nope", seed=0, **options):
    torch.manual_seed(seed)
    model_class, config_class = KINDS[kind]
    sizes = {"hidden_size": 32, "num_key_value_heads": 2, "head_dim": 8}
    arguments = [config_class] if config_class else []
    model = model_class(small_config(40, *arguments, **(sizes | options))).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def some_ids(batch=3, length=11, seed=1):
    return torch.randint(40, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model, ids=None, **options):
    ids = some_ids() if ids is None else ids
    return model(ids.to(model.device), **options).logits.float().cpu()


# --- the model -----------------------------------------------------------------------------------


def test_rope_twin_is_llama_to_the_bit():
    twin, llama = some_model(position="rope"), some_model("llama")
    assert {k: v.tolist() for k, v in twin.state_dict().items()} == {
        k: v.tolist() for k, v in llama.state_dict().items()
    }
    assert torch.equal(logits_of(twin), logits_of(llama))


def test_twins_start_from_the_same_weights():
    none, rope = some_model(), some_model(position="rope")
    for (name, a), (other, b) in zip(none.named_parameters(), rope.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b)
    assert (logits_of(none) - logits_of(rope)).abs().max() > 0.05


@on_devices
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_nope_equals_smollm3_without_rotations(device, implementation, padded):
    model = some_model(attn_implementation=implementation)
    config = small_config(
        40, SmolLM3Config, hidden_size=32, num_key_value_heads=2, head_dim=8, no_rope_layers=[0, 0],
        tie_word_embeddings=False,
        pad_token_id=0, attn_implementation=implementation,
    )  # fmt: skip
    oracle = SmolLM3ForCausalLM(config).eval()
    oracle.load_state_dict(model.state_dict())
    mask = torch.ones(3, 11, dtype=torch.long)
    if padded:
        mask[0, 6:] = 0
    expected = logits_of(oracle, attention_mask=mask)
    found = logits_of(model.to(device), attention_mask=mask.to(device))
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)


@given(st.permutations(range(8)))
@settings(max_examples=20, deadline=None)
def test_one_layer_sees_a_set_of_past_tokens(order):
    ids = some_ids(1, 9)
    shuffled = ids[:, [*order, 8]]
    model = some_model(num_layers=1)
    torch.testing.assert_close(logits_of(model, ids)[:, -1], logits_of(model, shuffled)[:, -1])


def test_two_layers_see_order():
    ids = some_ids(1, 9)
    change = (
        logits_of(some_model(), ids)[:, -1]
        - logits_of(some_model(), ids[:, [3, 1, 5, 0, 2, 4, 7, 6, 8]])[:, -1]
    )
    assert change.abs().max() > 0.01


@pytest.mark.parametrize("scale", [None, SCALES])
def test_cached_decoding_equals_the_full_forward(scale):
    model, ids = some_model(), some_ids(2, 6)
    if scale is not None:
        apply_head_scale(model, scale)
    row = ids
    for _ in range(6):
        row = torch.cat([row, logits_of(model, row)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(continuation(model, ids, 6), row[:, 6:])


def test_save_and_load_with_factors(tmp_path):
    model = some_model(head_scale=SCALES.tolist())
    assert torch.equal(head_scales(model), SCALES)
    with torch.no_grad():
        attention_modules(model)[0].scale_param[1] = 1.25  # trained since the configuration
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is NoPEForCausalLM and isinstance(
        AutoConfig.from_pretrained(tmp_path), NoPEConfig
    )
    assert torch.equal(head_scales(again), head_scales(model)) and head_scales(again)[0, 1] == 1.25
    assert torch.equal(logits_of(again), logits_of(model))


def test_factors_stay_in_32_bits(tmp_path):
    some_model(head_scale=1.6).save_pretrained(tmp_path)
    model = NoPEForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    assert model.model.layers[0].self_attn.scale_param.dtype == torch.float32
    assert head_scales(model).unique().tolist() == [pytest.approx(1.6, abs=1e-7)]
    torch.testing.assert_close(
        logits_of(model), logits_of(some_model(head_scale=1.6)), atol=0.2, rtol=0.1
    )


def test_a_plain_llama_checkpoint_loads_without_positions(tmp_path):
    llama = some_model("llama")
    llama.save_pretrained(tmp_path)
    for options in ({}, {"head_scale": 1.5}):
        model = NoPEForCausalLM.from_pretrained(tmp_path, position="none", **options)
        expected = some_model(**options)
        assert torch.equal(logits_of(model), logits_of(expected))
        assert head_scales(model).unique().tolist() == [options.get("head_scale", 1.0)]


def test_unknown_positions_are_refused():
    with pytest.raises(ValueError, match="position 'alibi' is unknown; choose 'none' or 'rope'"):
        NoPEConfig(position="alibi")


def test_the_papers_sizes_on_the_meta_device():
    """TinyLlama's sizes: 1.1 billion weights and 22 × 32 = 704 factors."""
    config = NoPEConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
        num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048, head_scale=1.6,
    )  # fmt: skip
    with torch.device("meta"):
        model = NoPEForCausalLM(config)
        factors = [module.scale_param for module in attention_modules(model)]
        assert sum(factor.numel() for factor in factors) == 704
        assert model.num_parameters() == 1_100_048_384 + 704
        assert model.model.layers[3].self_attn.head_dim == 64
        with only_scales_train(model):
            assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 704
        assert model(torch.zeros(1, 7, dtype=torch.long)).logits.shape == (1, 7, 32000)
    names = {name for name, _ in model.named_parameters()}
    assert "model.layers.21.self_attn.scale_param" in names


# --- the factors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_factor_of_one_changes_no_bit(kind):
    model = some_model(kind)
    expected = logits_of(model)
    assert torch.equal(logits_of(apply_head_scale(model, 1.0)), expected)


@on_devices
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_equal_factors_are_a_uniform_scale(kind, implementation, device):
    model = some_model(kind, attn_implementation=implementation).to(device)
    before = logits_of(model)
    with uniform_scale(model, 1.7):
        expected = logits_of(model)
    assert torch.equal(logits_of(model), before) and (before - expected).abs().max() > 0.01
    torch.testing.assert_close(
        logits_of(apply_head_scale(model, 1.7)), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", ["nope", "llama", "mistral", "qwen2"])
def test_folding_is_exact(kind):
    model = some_model(kind).double()
    plain = logits_of(model)
    apply_head_scale(model, SCALES)
    with torch.no_grad():
        running = model(some_ids()).logits
        folded = fold_head_scale(model)(some_ids()).logits
    torch.testing.assert_close(folded, running, rtol=1e-6, atol=1e-9)
    assert (folded - plain).abs().max() > 0.01
    assert model.config._attn_implementation == "sdpa" and head_scales(model).unique() == 1.0
    assert not any("scale_param" in name for name in model.state_dict())


def test_folding_powers_of_two_keeps_every_bit(tmp_path):
    model = apply_head_scale(some_model(), [[1.0, 2.0, 4.0, 0.5], [8.0, 1.0, 1.0, 2.0]])
    running = logits_of(model)
    assert torch.equal(logits_of(fold_head_scale(model)), running)
    model.save_pretrained(tmp_path)
    again = NoPEForCausalLM.from_pretrained(tmp_path)
    assert again.config.head_scale is None and torch.equal(logits_of(again), running)


def test_each_factor_belongs_to_its_head():
    """One head sharpened, against attention written out by hand for the first layer."""
    model = apply_head_scale(some_model(num_layers=1), [[1.0, 1.0, 3.0, 1.0]])
    layer = model.model.layers[0]
    ids = some_ids(1, 6)
    hidden = layer.input_layernorm(model.model.embed_tokens(ids))[0]
    attention = layer.self_attn
    mixed = []
    for head in range(4):
        rows, shared = slice(8 * head, 8 * head + 8), slice(8 * (head // 2), 8 * (head // 2) + 8)
        query = hidden @ attention.q_proj.weight[rows].T
        key, value = (hidden @ p.weight[shared].T for p in (attention.k_proj, attention.v_proj))
        scores = (3.0 if head == 2 else 1.0) / math.sqrt(8) * query @ key.T
        scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf)
        mixed.append(scores.softmax(-1) @ value)
    expected = torch.cat(mixed, -1) @ attention.o_proj.weight.T
    found = []
    attention.register_forward_hook(lambda module, inputs, output: found.append(output[0][0]))
    logits_of(model, ids)
    torch.testing.assert_close(found[0], expected)


def test_removing_brings_the_old_model_back():
    model = some_model()
    before = logits_of(model)
    apply_head_scale(model, 2.0)
    apply_head_scale(model, SCALES)  # new values, not one on top of the other
    once = apply_head_scale(some_model(), SCALES)
    assert torch.equal(logits_of(model), logits_of(once))
    twin = copy.deepcopy(model)
    remove_head_scale(model)
    assert torch.equal(logits_of(model), before) and model.config._attn_implementation == "sdpa"
    assert torch.equal(logits_of(twin), logits_of(once)) and model.config.head_scale is None


def test_factors_that_cannot_be_are_named():
    with pytest.raises(ValueError, match=r"shape \(4,\) do not fit a model of 2 layers × 4 heads"):
        apply_head_scale(some_model(), [1.0, 1.0, 1.0, 2.0])
    with pytest.raises(ValueError, match="must be positive, not 0"):
        scales_from(0.0, some_model())
    with pytest.raises(
        ValueError, match="no attention that uses transformers' attention interface"
    ):
        apply_head_scale(nn.Linear(2, 2))


def test_normalised_queries_cannot_be_folded_but_run():
    model = apply_head_scale(some_model("qwen3"), SCALES)
    before = logits_of(model)
    with pytest.raises(ValueError, match="Qwen3Attention does not end its queries with a linear"):
        fold_head_scale(model)
    assert torch.equal(logits_of(model), before) and torch.equal(head_scales(model), SCALES)


# --- entropy -------------------------------------------------------------------------------------


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=12), st.floats(0.2, 4.0))
def test_entropy_falls_at_the_rate_of_the_variance(scores, scale):
    scores = torch.tensor(scores, dtype=torch.float64)
    s = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    p = (s * scores).softmax(-1)
    value = entropy(p, math.e)
    assert -1e-12 <= value <= math.log(len(scores)) + 1e-9
    (slope,) = torch.autograd.grad(value, s)
    mean = (p * scores).sum()
    expected = -s * (p * (scores - mean) ** 2).sum()
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-9)


def test_entropy_of_zeros_and_bases():
    p = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
    assert entropy(p).tolist() == pytest.approx([0, 1, 2])
    assert entropy(p, 4).tolist() == pytest.approx([0, 0.5, 1])


@on_devices
@pytest.mark.parametrize("kind", ["nope", "qwen2"])
@pytest.mark.parametrize("scale", [None, SCALES])
def test_attention_entropy_equals_that_of_eager_attention(kind, scale, device):
    model = some_model(kind)
    if scale is not None:
        apply_head_scale(model, scale)
    found = attention_entropy(model.to(device), some_ids().to(device), rows=4).cpu()
    if scale is not None:
        fold_head_scale(model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(some_ids().to(device), output_attentions=True).attentions
    for ours, theirs in zip(found, weights, strict=True):
        p = theirs.double().cpu()
        expected = -(p * p.clamp(min=1e-300).log2()).sum(-1).mean(0)
        torch.testing.assert_close(ours.double(), expected, rtol=1e-3, atol=1e-4)
    assert (found <= torch.arange(1, 12).log2() + 1e-5).all() and found.shape == (2, 4, 11)


def test_sharper_queries_lower_the_entropy_of_the_first_layer():
    model = some_model(num_layers=1)
    rows = []
    for scale in (0.5, 1.0, 1.5, 3.0):
        with uniform_scale(model, scale):
            rows.append(attention_entropy(model, some_ids()))
    for wide, sharp in pairwise(rows):
        assert (sharp <= wide + 1e-6).all() and sharp.mean() < wide.mean() - 0.01


def test_entropy_leaves_no_trace_even_after_an_error():
    model = some_model()
    with pytest.raises(IndexError):
        attention_entropy(model, torch.tensor([[99]]))
    assert model.config._attn_implementation == "sdpa"
    assert not any(module.attention_hooks for module in attention_modules(model))


# --- one factor for all ---------------------------------------------------------------------------


def test_uniform_scale_is_undone_after_an_error():
    model = some_model()
    with pytest.raises(KeyError), uniform_scale(model, 2.0):
        raise KeyError
    assert {module.scaling for module in attention_modules(model)} == {8**-0.5}


def test_table_of_uniform_scales():
    model, ids = some_model(), some_ids(4, 20)
    table = fit_uniform_scale(
        model, lambda m, n: m(ids[:, :n], labels=ids[:, :n]).loss.item(), [5, 20], [0.5, 1.0, 2.0]
    )
    assert table.index.tolist() == [5, 20] and table.columns.tolist() == [0.5, 1.0, 2.0]
    folded = fold_head_scale(apply_head_scale(some_model(), 2.0))
    assert table.loc[20, 2.0] == pytest.approx(folded(ids, labels=ids).loss.item(), abs=1e-4)
    assert table.loc[5, 1.0] == pytest.approx(
        float(model(ids[:, :5], labels=ids[:, :5]).loss), abs=1e-5
    )


@given(st.lists(st.tuples(st.floats(1.1, 20), st.floats(0.5, 4)), min_size=1, max_size=6))
def test_slope_is_the_least_squares_answer(points):
    x, y = np.log([r for r, _ in points]), np.array([s - 1 for _, s in points])
    expected = np.linalg.lstsq(x[:, None], y, rcond=None)[0][0]
    assert logarithmic_slope(*zip(*points, strict=True)) == pytest.approx(expected, abs=1e-9)


def test_slope_wants_a_longer_text():
    with pytest.raises(ValueError, match="every ratio is 1"):
        logarithmic_slope([1, 1], [1.0, 1.2])


# --- learning the factors -------------------------------------------------------------------------


def test_schedule():
    rates = [warmup_cosine(step, 200, 20, 0.1) for step in range(201)]
    assert rates[0] == 1 / 20 and rates[19] == rates[20] == 1.0 and rates[200] == pytest.approx(0.1)
    assert rates[110] == pytest.approx(0.55) and all(a >= b for a, b in pairwise(rates[20:]))


def tuned(lower_bound=1.0, model=None, steps=25, seed=0, device="cpu", **options):
    """A model tuned on noise, the factors after each step, and the result."""
    model = some_model() if model is None else model
    data = TokenWindows(some_ids(1, 300)[0], 12)
    seen = []

    def loss(model, batch):
        seen.append(head_scales(model).clone())
        assert [n for n, p in model.named_parameters() if p.requires_grad] == [
            f"model.layers.{layer}.self_attn.scale_param" for layer in (0, 1)
        ]
        return model(**batch).loss

    settings_ = {"steps": steps, "warmup": 2, "lower_bound": lower_bound, "batch_size": 4} | options
    result = HeadScaleTuner(**settings_).fit(model, data, loss=loss, seed=seed, device=device)
    return model, [*seen, head_scales(model)], result


def test_only_the_factors_learn_and_stay_above_the_bound():
    before = some_model()
    model, seen, result = tuned()
    assert result.num_steps == 25 and torch.equal(seen[0], torch.ones(2, 4))
    assert all(scales.min() >= 1.0 for scales in seen) and seen[-1].max() > 1.05
    assert (seen[-1] == 1.0).any()  # on noise some heads would rather go below
    for name, parameter in before.named_parameters():
        assert torch.equal(parameter, model.state_dict()[name])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_without_the_bound_factors_fall():
    assert tuned(lower_bound=0.2)[1][-1].min() < 0.95


def test_tuning_lowers_the_loss_and_is_reproducible():
    ids = some_ids(1, 300)[0].view(-1, 12)
    model, seen, _ = tuned(lower_bound=0.1, steps=40)
    with torch.no_grad():
        assert model(ids, labels=ids).loss < some_model()(ids, labels=ids).loss - 1e-3
    assert torch.equal(tuned(lower_bound=0.1, steps=40)[1][-1], seen[-1])
    assert not torch.equal(tuned(lower_bound=0.1, steps=40, seed=1)[1][-1], seen[-1])


def test_tuning_starts_where_it_is_told():
    assert torch.equal(tuned(init=1.6, steps=1)[1][0], torch.full((2, 4), 1.6))
    assert torch.equal(tuned(init=SCALES, steps=1)[1][0], SCALES)
    assert torch.equal(tuned(model=apply_head_scale(some_model(), SCALES), steps=1)[1][0], SCALES)


def test_projection_and_no_weight_decay():
    parameter = nn.Parameter(torch.tensor([1.5, 1.05, 3.0]))
    optimizer = projected_adamw([parameter], lr=0.1, lower_bound=1.0)
    parameter.grad = torch.tensor([0.0, 1.0, -1.0])
    optimizer.step()
    assert parameter.tolist() == pytest.approx([1.5, 1.0, 3.1])


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_other_models_and_16_bits(kind):
    model = some_model(kind).to(torch.bfloat16)
    model, seen, _ = tuned(model=model, steps=3)
    scale = attention_modules(model)[0].scale_param
    assert scale.dtype == torch.float32 and scale.requires_grad and (seen[-1] != 1).any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tuning_on_cuda():
    _, seen, _ = tuned(device="cuda", mixed_precision="no")
    torch.testing.assert_close(
        seen[-1].cpu(), tuned(mixed_precision="no")[1][-1], rtol=0.05, atol=0.05
    )


# --- passkeys ------------------------------------------------------------------------------------


class Words:
    """A tokenizer of single characters, with a first token like LLaMA's."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [0] * add_special_tokens + [ord(c) for c in text]}


class Reader(nn.Module):
    """Says the number that it finds in the prompt, token by token; a wrong one where `blind` says so."""

    device = torch.device("cpu")

    def __init__(self, blind=lambda place, length: False):
        super().__init__()
        self.blind = blind

    def key_in(self, row):
        text = "".join(map(chr, row))
        place = text.index("The pass key is ")
        return "00000" if self.blind(place, len(row)) else text[place + 16 : place + 21]

    def forward(self, input_ids, past_key_values, use_cache, logits_to_keep):
        keys = past_key_values or [self.key_in(row) for row in input_ids.tolist()]
        next_ids = torch.tensor([ord(key[0]) for key in keys])
        logits = F.one_hot(next_ids, 128).float()[:, None]
        return SimpleNamespace(logits=logits, past_key_values=[key[1:] + " " for key in keys])


@pytest.mark.parametrize("length", [420, 777, 2000])
def test_prompts_fill_the_length_and_spread_the_key(length):
    prompts = passkey_prompts(Words(), length, num_depths=5, num_keys=4)
    assert len(prompts) == 20 and len({prompt.key for prompt in prompts}) > 15
    places = []
    for index, prompt in enumerate(prompts):
        text = "".join(map(chr, prompt.input_ids))
        room = length - 5 - len(prompt.input_ids)
        assert 0 <= room < len(PASSKEY_FILLER)
        assert text.count(prompt.key) == 2 and text.endswith("The pass key is")
        assert (
            "".join(map(chr, prompt.answer_ids)) == prompt.key
            and 10_000 <= int(prompt.key) < 100_000
        )
        assert index // 4 / 5 <= prompt.depth < (index // 4 + 1) / 5
        places.append(text.index("\nThe pass key is"))
    assert places[-1] > places[0] or length == 420
    if length == 2000:
        assert np.corrcoef(places, [prompt.depth for prompt in prompts])[0, 1] > 0.98
    same = passkey_prompts(Words(), length, num_depths=5, num_keys=4)
    assert [prompt.key for prompt in same] == [prompt.key for prompt in prompts]


def test_accuracy_of_readers():
    prompts = passkey_prompts(Words(), 1500, num_depths=4, num_keys=3)
    assert passkey_accuracy(Reader(), prompts) == 1.0
    assert passkey_accuracy(Reader(lambda place, length: True), prompts) == 0.0
    depths = [prompt.depth for prompt in prompts]
    half = passkey_accuracy(Reader(lambda place, length: place > length / 2), prompts, batch_size=5)
    assert 0.25 <= half <= 0.75 and half == pytest.approx(np.mean(np.array(depths) < 0.5), abs=0.2)
    longer = [*prompts, *passkey_prompts(Words(), 900, num_depths=2, num_keys=2)]
    assert passkey_accuracy(Reader(lambda place, length: length > 1000), longer) == 4 / 16


def test_one_wrong_token_is_wrong():
    prompt = PasskeyPrompt(
        torch.tensor([ord(c) for c in "The pass key is 12345."]),
        torch.tensor([49, 50, 51, 52, 54]),
        "12346",
        0.0,
    )
    assert passkey_accuracy(Reader(), [prompt]) == 0.0


def test_short_prompts_are_refused():
    with pytest.raises(ValueError, match=r"a passkey prompt needs \d+ tokens, not 100"):
        passkey_prompts(Words(), 100)


# --- associative recall ---------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(0, 1000))
def test_lists_have_different_keys_and_right_answers(num_pairs, seed):
    task = RecallTask(num_keys=12, num_values=5, num_queries=3)
    batch = task.sample(num_pairs, 4, torch.Generator().manual_seed(seed))
    assert (
        batch["input_ids"].shape == (4, num_pairs + 3)
        and batch["input_ids"].max() < task.vocab_size
    )
    keys, values = batch["input_ids"] // 6, batch["input_ids"] % 6
    assert (values[:, num_pairs:] == 5).all() and (values[:, :num_pairs] < 5).all()
    for row in range(4):
        pairs = dict(
            zip(keys[row, :num_pairs].tolist(), values[row, :num_pairs].tolist(), strict=True)
        )
        assert len(pairs) == num_pairs
        assert [pairs[key] for key in keys[row, num_pairs:].tolist()] == batch["answers"][
            row
        ].tolist()


def test_every_pair_of_a_list_may_be_asked_for():
    ids = RecallTask().sample(5, 100, torch.Generator().manual_seed(0))["input_ids"] // 17
    asked = (ids[:, 5:, None] == ids[:, None, :5]).nonzero()[:, 2]
    assert asked.unique().tolist() == [0, 1, 2, 3, 4]


def test_too_many_pairs_are_refused():
    with pytest.raises(ValueError, match="num_pairs=13: give 1 to 12, the number of keys"):
        RecallTask(num_keys=12).sample(13, 1, torch.Generator())


def test_a_token_is_the_sum_of_its_key_and_value():
    task = RecallTask(num_keys=5, num_values=3)
    model = recall_model(task, small_config(3, NoPEConfig, hidden_size=8))
    embedding = model.get_input_embeddings()
    ids = torch.arange(task.vocab_size)
    expected = [embedding.keys.weight[i // 4] + embedding.values.weight[i % 4] for i in range(20)]
    torch.testing.assert_close(embedding(ids), torch.stack(expected))
    batch = task.sample(4, 2, torch.Generator().manual_seed(0))
    logits = recall_logits(model, batch)
    assert logits.shape == (2, 8, 3)
    expected = F.cross_entropy(logits.reshape(-1, 3), batch["answers"].reshape(-1))
    torch.testing.assert_close(recall_loss(model, batch), expected)
    full = model(batch["input_ids"]).logits[:, -8:]
    torch.testing.assert_close(logits, full)


def test_a_small_recall_is_learned():
    torch.manual_seed(0)
    task = RecallTask(num_keys=12, num_values=4, num_queries=6)
    model = recall_model(task, small_config(4, NoPEConfig, hidden_size=32, num_layers=1))
    draw = torch.Generator().manual_seed(0)
    batches = [task.sample(4, 32, draw) for _ in range(200)]
    config = TrainingConfig(
        num_steps=200, batch_size=1, learning_rate=1e-2, clip_norm=1.0, shuffle=False, device="cpu"
    )
    train(model, batches, config, loss=recall_loss, collate=lambda rows: rows[0])
    batch = task.sample(4, 64, draw)
    with torch.no_grad():
        accuracy = (recall_logits(model, batch).argmax(-1) == batch["answers"]).float().mean()
    assert accuracy > 0.9
