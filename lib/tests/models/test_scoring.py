"""Language-model scores: explicit sums, batching, label spaces, memory, several architectures, errors."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from compendium.models.scoring import LanguageModelScorer, Rows, head_is_linear

WORDS = ["<unk>", *"abcdefghijklmnop"]
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


def some_tokenizer():
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def some_model(kind="gpt2"):
    torch.manual_seed(0)
    n = len(WORDS)
    small = dict(vocab_size=n, hidden_size=16, initializer_range=0.5)
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=n, n_embd=16, n_layer=2, n_head=2, n_positions=24, initializer_range=0.5
            )
        )
    if kind == "gpt_neo":
        layers = dict(
            num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=4
        )
        return GPTNeoForCausalLM(GPTNeoConfig(**small, **layers, max_position_embeddings=24))
    shape = dict(intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    if kind == "gpt_neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**small, **shape, max_position_embeddings=24))
    return LlamaForCausalLM(LlamaConfig(**small, **shape, max_position_embeddings=24))


def one_by_one(model, tokenizer, context, target):
    c, y = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (context, target))
    with torch.no_grad():
        logp = model(torch.tensor([c + y], device=model.device)).logits[0].float().log_softmax(-1)
    return sum(logp[len(c) - 1 + t, token].item() for t, token in enumerate(y))


def some_pairs(count=40):
    rng = np.random.default_rng(0)
    draw = lambda low, high: " ".join(rng.choice(WORDS[1:], rng.integers(low, high)))  # noqa: E731
    return [draw(1, 12) for _ in range(count)], [draw(1, 5) for _ in range(count)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["gpt2", "gpt_neo", "gpt_neox", "llama"])
@pytest.mark.parametrize("tokens_per_batch", [1, 50, 10_000])
def test_scores_equal_explicit_sums(kind, tokens_per_batch, device):
    model, tokenizer = some_model(kind).eval().to(device), some_tokenizer()
    scorer = LanguageModelScorer(model, tokenizer, tokens_per_batch)
    assert scorer.linear
    contexts, targets = some_pairs()
    expected = [one_by_one(model, tokenizer, *pair) for pair in zip(contexts, targets, strict=True)]
    np.testing.assert_allclose(scorer.log_likelihood(contexts, targets), expected, atol=1e-3)
    lengths = [len(target.split()) for target in targets]
    average = scorer.log_likelihood(contexts, targets, average=True)
    np.testing.assert_allclose(average, np.array(expected) / lengths, atol=1e-3)


def test_labels_of_several_tokens_sum_to_one():
    model, tokenizer = some_model().eval(), some_tokenizer()
    scorer = LanguageModelScorer(model, tokenizer)
    labels = ["a", "b c", "b d", "e f g"]
    found = np.exp(scorer.label_log_likelihood(["a b", "h"], labels))
    np.testing.assert_allclose(found.sum(axis=1), 1)
    raw = np.exp([one_by_one(model, tokenizer, "a b", label) for label in labels])
    np.testing.assert_allclose(found[0], raw / raw.sum(), atol=1e-4)
    unnormalised = np.exp(scorer.label_log_likelihood(["a b"], labels, normalise=False))
    np.testing.assert_allclose(unnormalised[0], raw, atol=1e-4)


def test_labels_of_one_token_share_one_input():
    rows = Rows([[1, 2]] * 3 + [[1, 2]], [[5], [6], [7], [5, 6]])
    assert rows.inputs == [(1, 2), (1, 2, 5)]
    model = some_model().eval()
    scorer = LanguageModelScorer(model, some_tokenizer())
    lines = []
    model.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: lines.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    scorer.label_log_likelihood(["a b c"] * 4, ["a", "b", "c"])
    assert sum(lines) == 1


def test_memory_answers_what_was_asked_before():
    model = some_model().eval()
    contexts, targets = some_pairs()
    scorer = LanguageModelScorer(model, some_tokenizer())
    first = scorer.log_likelihood(contexts, targets)
    model.transformer.register_forward_pre_hook(lambda *_: pytest.fail("the model was asked again"))
    assert (scorer.log_likelihood(contexts[::-1], targets[::-1]) == first[::-1]).all()
    assert scorer.asked == 2 * len(contexts)
    assert scorer.computed == len(set(zip(contexts, targets, strict=True)))
    forgetful = LanguageModelScorer(some_model(), some_tokenizer(), remember=False)
    forgetful.log_likelihood(["a"], ["b"])
    forgetful.log_likelihood(["a"], ["b"])
    assert forgetful.computed == 2 and not forgetful.memory


def test_batches_keep_to_their_size():
    rows = Rows([[1] * n for n in (3, 9, 2, 5, 5, 30)], [[n] for n in range(6)])
    batches = list(rows.batches(20))
    assert sorted(row for batch in batches for row in batch) == list(range(len(rows.inputs)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(len(rows.inputs[row]) for row in batch) <= 20


class ScaledHead(GPT2LMHeadModel):
    """A model that does something to its logits."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output


def test_a_head_that_is_more_than_a_matrix_is_respected():
    torch.manual_seed(0)
    model = ScaledHead(some_model().config).eval()
    assert not head_is_linear(model) and head_is_linear(some_model().eval())
    found = LanguageModelScorer(model, some_tokenizer()).log_likelihood(["a b"], ["c"])
    assert found[0] == pytest.approx(one_by_one(model, some_tokenizer(), "a b", "c"), abs=1e-4)


def test_bad_input_is_named():
    scorer = LanguageModelScorer(some_model(), some_tokenizer())
    with pytest.raises(ValueError, match="at least one token"):
        scorer.log_likelihood(["a"], [""])
    with pytest.raises(ValueError, match="needs 31 tokens, the model reads 24"):
        scorer.log_likelihood([" ".join("a" * 30)], ["a b"])
    assert scorer.log_likelihood([], []).shape == (0,)
