"""Small causal models: losses and windows against loops, generation against a loop, hooks and weights against eager attention."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from compendium.models.causal import (
    TokenWindows,
    add_attention_hook,
    attention_modules,
    attention_probabilities,
    continuation,
    evaluating,
    next_token_nll,
    sliding_window_nll,
    sliding_window_ppl,
    small_config,
)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
on_devices = pytest.mark.parametrize("device", DEVICES)
KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "mistral": (MistralForCausalLM, MistralConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config),
}


def some_model(kind="llama", **options):
    torch.manual_seed(0)
    model_class, config_class = KINDS[kind]
    sizes = {"hidden_size": 32, "num_key_value_heads": 2, "head_dim": 8}
    return model_class(small_config(40, config_class, **(sizes | options))).eval()


def some_ids(batch=3, length=11, seed=1):
    return torch.randint(40, (batch, length), generator=torch.Generator().manual_seed(seed))


def loop_nll(model, row, place):
    """The loss of token `place` of `row`, from a forward pass over its context alone."""
    with torch.no_grad():
        return F.cross_entropy(model(row[None, :place]).logits[0, -1], row[place]).item()


# --- build and train -----------------------------------------------------------------------------


def test_config_has_the_sizes_and_takes_options():
    config = small_config(50, hidden_size=100, num_layers=3, num_heads=5, tie_word_embeddings=True)
    assert type(config) is LlamaConfig and config.num_hidden_layers == 3
    assert config.intermediate_size == 200 and config.tie_word_embeddings
    assert config.initializer_range == pytest.approx(0.1)
    assert isinstance(small_config(50, MistralConfig), MistralConfig)
    assert small_config(50, rms_norm_eps=1e-3, initializer_range=0.02).initializer_range == 0.02


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 7))
def test_windows_of_a_stream(size, length, stride):
    ids = torch.arange(size)
    if length > size:
        with pytest.raises(ValueError, match=f"a window of {length} tokens does not fit"):
            TokenWindows(ids, length, stride)
        return
    windows = TokenWindows(ids, length, stride)
    starts = [row["input_ids"][0].item() for row in windows]
    assert starts == list(range(0, size - length + 1, stride))
    assert all(torch.equal(row["input_ids"], row["labels"]) for row in windows)
    assert windows[-1]["input_ids"].tolist() == list(range(starts[-1], starts[-1] + length))


# --- score ---------------------------------------------------------------------------------------


@on_devices
def test_losses_equal_a_loop_over_contexts(device):
    model, ids = some_model(), some_ids()
    expected = [[loop_nll(model, row, place) for place in range(1, 11)] for row in ids]
    found = next_token_nll(model.to(device), ids.to(device), rows=4).cpu()
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-4)
    some = next_token_nll(model, ids.to(device), last=4).cpu()
    torch.testing.assert_close(some, found[:, -4:], rtol=1e-4, atol=1e-4)


def test_scoring_leaves_the_model_as_it_was():
    model = some_model(attention_dropout=0.5).train()
    assert torch.equal(next_token_nll(model, some_ids()), next_token_nll(model, some_ids()))
    assert model.training and torch.is_grad_enabled()
    with pytest.raises(RuntimeError), evaluating(model):
        assert not model.training and not torch.is_grad_enabled()
        raise RuntimeError
    assert model.training


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 8), st.integers(1, 8), st.integers(0, 6), st.integers(1, 3))
def test_sliding_windows_equal_a_loop(window, stride, later, batch_size):
    model, ids = some_model(), some_ids(1, 17)[0]
    if stride > window:
        with pytest.raises(ValueError, match=f"stride {stride} does not fit window {window}"):
            sliding_window_nll(model, ids, window, stride)
        return
    first = window + later
    found = sliding_window_nll(model, ids, window, stride, first_end=first, batch_size=batch_size)
    rows = []
    for end in range(first, 18, stride):
        places = range(max(window - stride, 1), window)
        rows.append([loop_nll(model, ids[end - window : end], place) for place in places])
    torch.testing.assert_close(found, torch.tensor(rows), rtol=1e-4, atol=1e-4)
    ppl = sliding_window_ppl(model, ids, window, stride, first_end=first)
    assert ppl == pytest.approx(found.mean().exp().item(), rel=1e-4)


def test_every_window_length_scores_the_same_tokens():
    """A model that ignores its context gives the same losses for all windows that end together."""
    model, ids = some_model(), some_ids(1, 30)[0]
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    rows = [sliding_window_nll(model, ids, window, 4, first_end=16) for window in (5, 8, 16)]
    assert rows[0].shape == (4, 4)
    for row in rows[1:]:
        torch.testing.assert_close(row, rows[0])


def test_impossible_windows_are_named():
    model, ids = some_model(), some_ids(1, 10)[0]
    with pytest.raises(ValueError, match="cannot score the last 11 of 11 tokens"):
        next_token_nll(model, some_ids(), last=11)
    with pytest.raises(ValueError, match="no window of 12 tokens ends at 12 in a stream of 10"):
        sliding_window_nll(model, ids, 12, 4)
    with pytest.raises(ValueError, match="no window of 8 tokens ends at 6"):
        sliding_window_nll(model, ids, 8, 4, first_end=6)


# --- continue ------------------------------------------------------------------------------------


@on_devices
def test_greedy_continuation_equals_a_loop_without_cache(device):
    model, ids = some_model(), some_ids()
    row = ids
    for _ in range(5):
        with torch.no_grad():
            row = torch.cat([row, model(row).logits[:, -1:].argmax(-1)], dim=1)
    model.generation_config.eos_token_id = int(row[0, 11])  # must not end the first row
    model.generation_config.repetition_penalty = 9.0
    model = model.train().to(device)
    assert torch.equal(continuation(model, ids.to(device), 5).cpu(), row[:, 11:])
    assert model.training


def test_sampling_follows_the_temperature():
    model, ids = some_model(), some_ids(1, 6).expand(4000, -1)
    with torch.no_grad():
        expected = (model(ids[:1]).logits[0, -1] / 0.7).softmax(-1)
    torch.manual_seed(0)
    found = torch.bincount(continuation(model, ids, 1, temperature=0.7)[:, 0], minlength=40) / 4000
    assert (found - expected).abs().max() < 0.03 and (found > 0).sum() > 10


# --- look inside ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_hooks_see_every_layer_and_change_nothing(kind, implementation):
    model, ids = some_model(kind, attn_implementation=implementation), some_ids()
    seen = []
    with torch.no_grad():
        before = model(ids).logits
        remove = add_attention_hook(
            model, lambda module, q, k, mask: seen.append((module.layer_idx, q.shape, k.shape))
        )
        assert torch.equal(model(ids).logits, before)
        assert seen == [(layer, (3, 4, 11, 8), (3, 2, 11, 8)) for layer in (0, 1)]
        remove()
        assert model.config._attn_implementation == implementation
        assert torch.equal(model(ids).logits, before) and len(seen) == 2
        remove()  # a second time does nothing


def test_a_hook_replaces_the_query_in_order():
    model, ids = some_model(), some_ids()
    calls = []

    def hook(name, factor):
        def change(module, query, key, mask):
            calls.append(name)
            return factor * query

        return change

    with torch.no_grad():
        for module in attention_modules(model):
            module.scaling *= 6
        expected = model(ids).logits
        for module in attention_modules(model):
            module.scaling /= 6
        removes = [add_attention_hook(model, hook("a", 2.0))]
        removes.append(add_attention_hook(model, hook("b", 3.0), first=True))
        torch.testing.assert_close(model(ids).logits, expected)
        assert calls == ["b", "a"] * 2
        twin = copy.deepcopy(model)
        for remove in removes:
            remove()
        torch.testing.assert_close(twin(ids).logits, expected)
        assert (model(ids).logits - expected).abs().max() > 1e-3


def test_hooks_are_not_saved(tmp_path):
    model, ids = some_model(), some_ids()
    add_attention_hook(model, lambda module, q, k, mask: 0 * q)
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert torch.equal(again(ids).logits, some_model()(ids).logits)


def test_models_without_the_interface_are_refused():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    bert = BertConfig(vocab_size=8, intermediate_size=8, **sizes)
    for model in (torch.nn.Linear(2, 2), BertModel(bert)):
        with pytest.raises(
            ValueError, match="no attention that uses transformers' attention inter"
        ):
            attention_modules(model)


@on_devices
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("rows", [3, 100])
@pytest.mark.parametrize("padded", [False, True])
def test_probabilities_equal_eager_attention(device, kind, rows, padded):
    model, ids = some_model(kind).to(device), some_ids().to(device)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 7:] = mask[1, :2] = 0
    found = []

    def observe(module, query, key, attention_mask):
        pieces = list(attention_probabilities(query, key, module.scaling, attention_mask, rows))
        assert [start for start, _ in pieces] == list(range(0, 11, rows))
        found.append(torch.cat([p for _, p in pieces], dim=2))

    with torch.no_grad():
        remove = add_attention_hook(model, observe)
        model(ids, attention_mask=mask)
        remove()
        model.set_attn_implementation("eager")
        expected = model(ids, attention_mask=mask, output_attentions=True).attentions
    real = mask.bool()
    for ours, theirs in zip(found, expected, strict=True):
        ours, theirs = ours.transpose(1, 2)[real], theirs.transpose(1, 2)[real]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_probabilities_of_the_last_queries_of_a_cache():
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8)
    (_, whole), *_ = attention_probabilities(query, key, 0.3)
    (_, last), *_ = attention_probabilities(query[:, :, -2:], key, 0.3)
    torch.testing.assert_close(last, whole[:, :, -2:])
