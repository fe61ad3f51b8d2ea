"""Prompts by hooks against layer-by-layer addition; resuming, one-position reading and batches against the plain forward."""

import pytest
import torch
import transformers

from compendium.models.prompts import (
    CausalLM,
    DeepPromptWrapper,
    MaskedLM,
    PromptTemplate,
    SentenceEncoder,
    Verbalizer,
    bert_layer_at,
    clipped_std,
    embed,
    layer_inputs,
    mean_pooled,
    prompted,
    run_from,
    run_until,
    transformer_layers,
)

KINDS = ("bert", "roberta", "gpt2", "bart")
WIDTH = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
SIZES = {
    "bert": WIDTH | {"intermediate_size": 32},
    "roberta": WIDTH | {"intermediate_size": 32},
    "gpt2": {"n_embd": 16, "n_layer": 3, "n_head": 2},
    "bart": {
        "d_model": 16,
        "encoder_layers": 3,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
    },
}
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "b",
    "c",
    "d",
    "e",
    "it",
    "was",
    "good",
    "bad",
    ".",
    "film",
]


def from_config(kind, device=None, **sizes):
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = transformers.AutoConfig.for_model(kind, **(ids | {"forced_eos_token_id": 2} | sizes))
    auto = transformers.AutoModelForCausalLM if kind == "gpt2" else None
    return (auto or transformers.AutoModelForMaskedLM).from_config(config)


def tiny(kind, seed=0):
    torch.manual_seed(seed)
    return from_config(kind, vocab_size=60, **SIZES[kind]).eval()


def some_inputs(rows=3, length=9):
    torch.manual_seed(1)
    ids = torch.randint(3, 60, (rows, length))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    mask[-1, 8:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def prompts(seed=2, n=3):
    return torch.randn(3, n, 16, generator=torch.Generator().manual_seed(seed))


def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    backend = Tokenizer(WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    frame = [("[CLS]", 2), ("[SEP]", 3)]
    backend.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=frame)
    names = {"cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]", "pad": "[PAD]", "unk": "[UNK]"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, **{f"{name}_token": token for name, token in names.items()}
    )


# --- injection -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_zero_prompts_and_removed_prompts_leave_the_model_alone(kind):
    model, inputs = tiny(kind), some_inputs()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = model(**inputs).logits
    with prompted(model, torch.zeros(3, 2, 16)):
        assert torch.equal(model(**inputs).logits, plain)
    with prompted(model, prompts()):
        assert not torch.equal(model(**inputs).logits, plain)
    with pytest.raises(RuntimeError, match="on purpose"), prompted(model, prompts()):
        raise RuntimeError("on purpose")
    assert torch.equal(model(**inputs).logits, plain)
    assert not any(layer._forward_pre_hooks for layer in transformer_layers(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bert_and_gpt2_equal_addition_layer_by_layer():
    for kind, start in (("bert", 1), ("gpt2", 0)):
        model, ids, own = tiny(kind), some_inputs()["input_ids"], prompts()
        if kind == "bert":
            hidden = model.bert.embeddings(input_ids=ids)
        else:
            places = torch.arange(ids.shape[1])
            hidden = model.transformer.wte(ids) + model.transformer.wpe(places)
        for layer, prompt in zip(transformer_layers(model), own, strict=True):
            hidden = torch.cat(
                [hidden[:, :start], hidden[:, start : start + 3] + prompt, hidden[:, start + 3 :]],
                1,
            )
            hidden = layer(hidden)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        head = (
            model.cls if kind == "bert" else lambda h: model.lm_head(model.transformer.ln_f(h))  # noqa: B023
        )
        with prompted(model, own, start):
            torch.testing.assert_close(model(input_ids=ids).logits, head(hidden))


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_rows_are_prompts_one_by_one(kind):
    model, inputs = tiny(kind), some_inputs()
    own = [prompts(seed) for seed in range(3)]
    with prompted(model, torch.stack(own, 1)):
        together = model(**inputs).logits
    for row, prompt in enumerate(own):
        with prompted(model, prompt):
            alone = model(**{k: v[row : row + 1] for k, v in inputs.items()}).logits[0]
        length = int(inputs["attention_mask"][row].sum())
        torch.testing.assert_close(together[row, :length], alone[:length], rtol=1e-4, atol=1e-5)


def test_replace_forgets_what_stood_there():
    model, inputs = tiny("bert"), some_inputs()
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][:, 1:4] = 7
    results = []
    for batch in (inputs, other):
        with prompted(model, {0: prompts()[0]}, mode="replace"):
            results.append(model(**batch).logits)
    torch.testing.assert_close(*results)
    with prompted(model, {0: prompts()[0]}), torch.no_grad():
        assert (model(**other).logits - model(**inputs).logits).abs().max() > 1e-3


def test_wrapper_trains_prompts_only():
    wrapper, inputs = DeepPromptWrapper(tiny("roberta"), 3, layers=(1, 2)), some_inputs()
    wrapper.train()
    assert not wrapper.model.training
    wrapper(**inputs).logits.pow(2).mean().backward()
    grads = [name for name, parameter in wrapper.named_parameters() if parameter.grad is not None]
    assert grads == ["prompts"] and wrapper.prompts.shape == (2, 3, 16)
    assert next(iter(wrapper.state_dict())) == "prompts"


def test_bad_prompts_are_named():
    model, inputs = tiny("bert"), some_inputs()
    with pytest.raises(ValueError, match="prompts for 2 layers"), prompted(model, prompts()[:2]):
        pass
    with pytest.raises(ValueError, match="no layer 3"), prompted(model, {3: prompts()[0]}):
        pass
    with pytest.raises(ValueError, match="did you mean 'add'"), prompted(model, None, mode="ad"):
        pass
    with prompted(model, prompts(n=9)), pytest.raises(ValueError, match=r"positions 1\.\.9"):
        model(**inputs)
    with pytest.raises(ValueError, match="layers of Linear"):
        transformer_layers(torch.nn.Linear(2, 2))


# --- looking and resuming ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS[:3])
def test_resuming_equals_running(kind):
    model, inputs, own = tiny(kind), some_inputs(), prompts()
    options = {"use_cache": False} if kind == "gpt2" else {}
    with torch.no_grad(), prompted(model, own):
        expected = model(**inputs).logits
    for layer in range(3):
        with torch.no_grad():
            snapshot = run_until(model, layer, inputs | options, own)
            states = run_from(model, layer, snapshot, own, times=2)
            if kind == "gpt2":
                states = model.transformer.ln_f(states)
            head = getattr(model, "cls", None) or model.lm_head
            torch.testing.assert_close(head(states), expected.repeat(2, 1, 1))
    assert not any(layer._forward_pre_hooks for layer in transformer_layers(model))


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_one_position_of_a_layer(kind, implementation):
    model, inputs = tiny(kind), some_inputs()
    model.set_attn_implementation(implementation)
    positions = torch.tensor([5, 0, 7])
    for parameter in model.parameters():  # fresh biases are zero, and attention nearly uniform
        torch.nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        snapshot = run_until(model, 2, inputs)
        layer = transformer_layers(model)[2]
        whole = layer(snapshot.hidden, *snapshot.args, **snapshot.kwargs)
        mask = snapshot.args[0] if snapshot.args else snapshot.kwargs["attention_mask"]
        one = bert_layer_at(layer, snapshot.hidden, mask, positions)
    torch.testing.assert_close(one[:, 0], whole[torch.arange(3), positions])


def test_layer_inputs_are_the_hidden_states():
    model, inputs = tiny("bert"), some_inputs()
    states = layer_inputs(model, **inputs)
    hidden = model(**inputs, output_hidden_states=True).hidden_states
    for ours, theirs in zip(states, hidden, strict=False):
        torch.testing.assert_close(ours, theirs)


def test_clipped_std():
    torch.manual_seed(0)
    values = torch.randn(20_000)
    assert clipped_std(values) == pytest.approx(values.std().item(), rel=0.02)
    values[:20] = 1000.0
    assert values.std() > 20 and clipped_std(values) < 2.0
    assert clipped_std(values, rounds=0) == pytest.approx(values.std().item())


# --- black boxes ---------------------------------------------------------------------------------


def boxes(max_tokens=2**15):
    words = Verbalizer(["good", "bad"], tokenizer())
    vectors = torch.nn.functional.normalize(torch.randn(3, 16), dim=-1)
    yield MaskedLM(tiny("bert"), words, max_tokens=max_tokens)
    yield MaskedLM(tiny("roberta"), words, max_tokens=max_tokens)
    yield MaskedLM(tiny("bart"), words, max_tokens=max_tokens)
    yield CausalLM(tiny("gpt2"), words, max_tokens=max_tokens)
    yield SentenceEncoder(tiny("bert").bert, vectors, max_tokens=max_tokens)


@pytest.mark.parametrize("max_tokens", [1, 60, 2**15])
@pytest.mark.parametrize("first_changed", [0, 1, 2])
def test_batches_of_candidates_equal_one_at_a_time(first_changed, max_tokens):
    batch = some_inputs() | {"positions": torch.tensor([4, 8, 2])}
    candidates = prompts().repeat(5, 1, 1, 1)
    candidates[:, first_changed:] = torch.randn(5, 3 - first_changed, 3, 16)
    for box in boxes(max_tokens):
        plain = torch.stack([box(batch, candidate) for candidate in candidates])
        found = box.candidates(batch, candidates, first_changed)
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
        assert all(parameter.grad is None for parameter in box.model.parameters())


def test_stds_do_not_see_padding():
    batch = some_inputs()
    padded = {name: torch.nn.functional.pad(value, (0, 4)) for name, value in batch.items()}
    for box in boxes():
        stds = box.activation_stds(batch)
        assert stds == pytest.approx(box.activation_stds(padded), rel=1e-4)
        weight = box.model.get_input_embeddings().weight
        assert stds[0] == pytest.approx(weight.std().item()) and len(stds) == 3


def test_mean_pooling_and_embedding():
    states, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    pooled = mean_pooled(states, mask)
    expected = torch.nn.functional.normalize(states[0, :2].mean(0), dim=0)
    torch.testing.assert_close(pooled[0], expected)
    vectors = embed(tiny("bert").bert, tokenizer(), ["film", "a b c d e"])
    alone = embed(tiny("bert").bert, tokenizer(), ["film"])
    torch.testing.assert_close(vectors[:1], alone)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu():
    batch = some_inputs() | {"positions": torch.tensor([4, 8, 2])}
    candidates = torch.randn(4, 3, 3, 16)
    for box in boxes():
        expected = box.candidates(batch, candidates)
        box.model.cuda()
        torch.testing.assert_close(
            box.candidates(batch, candidates).cpu(), expected, rtol=1e-3, atol=1e-3
        )


PAPER = {
    "roberta": ({"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16}, 24),
    "bert": ({"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16}, 24),
    "gpt2": ({"n_layer": 36, "n_embd": 1280, "n_head": 20}, 36),
    "bart": ({"encoder_layers": 12, "decoder_layers": 12, "d_model": 1024}, 12),
}


@pytest.mark.parametrize("kind", PAPER)
def test_the_papers_models_on_the_meta_device(kind):
    """Fifty prompt tokens in each layer of the large models: shapes only."""
    sizes, layers = PAPER[kind]
    with torch.device("meta"):
        model = from_config(kind, **sizes, attn_implementation="eager").eval()
        ids = torch.ones(2, 60, dtype=torch.long)
        own = torch.zeros(layers, 50, model.config.hidden_size)
        if kind != "gpt2":  # its attention mask needs values, which meta tensors lack
            with prompted(model, own):
                assert model(input_ids=ids).logits.shape[:2] == (2, 60)
    assert len(transformer_layers(model)) == layers
    assert own.shape[-1] == model.get_input_embeddings().weight.shape[1]


# --- words ---------------------------------------------------------------------------------------


def test_template_places_prompt_and_mask():
    template = PromptTemplate(" . {text} . it was {mask} .", tokenizer(), 2)
    batch = template(["film", "a film b"])
    words = tokenizer().convert_ids_to_tokens(batch["input_ids"][0])
    dummies = [WORDS[i] for i in template.prompt_ids]
    assert words[:11] == ["[CLS]", *dummies, *". film . it was [MASK] .".split(), "[SEP]"]  # noqa: SIM905
    assert template.start == 1 and words[batch["positions"][0]] == "[MASK]"
    assert batch["attention_mask"].sum(1).tolist() == [11, 13]
    lone = PromptTemplate(" {text} it was", tokenizer(), 0)
    ids, asked = lone.encode("film")
    assert asked == len(ids) - 1


def test_template_cuts_the_longer_text_only():
    template = PromptTemplate(" {text} . {mask} , {pair}", tokenizer(), 2, max_length=12)
    ids, asked = template.encode("a b c d e a b c", "film")
    assert len(ids) == 12 and ids[asked] == 4
    kept = tokenizer().convert_ids_to_tokens(ids)
    assert kept[3:6] == ["a", "b", "c"] and "film" in kept
    with pytest.raises(ValueError, match="no room"):
        PromptTemplate(" {text} {mask}", tokenizer(), 9, max_length=11).encode("a")


def test_byte_level_words_keep_their_blank():
    """The pieces together are the tokens of the whole sentence."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["It was great . It was bad . a film"] * 5, trainer)
    bpe = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="!")
    template = PromptTemplate(" . {text} . It was", bpe, 0)
    ids, _ = template.encode("a great film")
    assert ids == bpe(" . a great film . It was")["input_ids"] and template.start == 0
    assert Verbalizer(["great"], bpe).token_ids == bpe(" great")["input_ids"]
    assert template(["a", "a film"])["input_ids"].shape[0] == 2
    with pytest.raises(ValueError, match="no mask token"):
        PromptTemplate("{text} {mask}", bpe, 0)


def test_bad_words_are_named():
    with pytest.raises(ValueError, match="label word 'great' is not one token"):
        Verbalizer(["good", "great"], tokenizer())
    with pytest.raises(ValueError, match="two labels have the same word"):
        Verbalizer(["good", "good"], tokenizer())
    template = PromptTemplate("{text} {mask}", tokenizer(), 0)
    with pytest.raises(ValueError, match=r"has no \{pair\}"):
        template.encode("a", "b")
    with pytest.raises(ValueError, match="no text"):
        template([])
    with pytest.raises(ValueError, match=r"wants \{text\}"):
        PromptTemplate("it was {mask}", tokenizer(), 0)
