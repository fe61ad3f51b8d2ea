"""CNN-NER: every step against loops or brute force, padding and order, nested decoding, save and load, errors."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, RobertaConfig, RobertaModel

from compendium.extraction.cnn_ner import (
    CNNNerConfig,
    CNNNerForTokenPairs,
    MaskedConv2d,
    SpanCNN,
    SpanLinear,
    SpanMatrixCollator,
    SpanVectors,
    clashes,
    decode_spans,
    encode_words,
    parameter_groups,
    pool_words,
    predict,
    span_loss,
    split_at_stops,
)

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ),
]
WORDS = ["the", "bank", "of", "china", "opened", "an", "office", "li", "##na", "##ed", "."]
SENTENCES = [
    ("the bank of china opened an office .", [(1, 4, 1), (3, 4, 0)]),
    ("lina opened china", [(0, 1, 2), (2, 3, 0)]),
    ("office", []),
]
TYPES = ["LOC", "ORG", "PER"]


def some_tokenizer():
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*specials, *WORDS])}
    core = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = BertNormalizer(), Whitespace()
    ends = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    core.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), specials, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def some_features(sentences=SENTENCES):
    tokenizer = some_tokenizer()
    return [encode_words(tokenizer, text.split(), entities) for text, entities in sentences]


def some_encoder(**options):
    sizes = dict(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    return BertModel(BertConfig(**sizes, intermediate_size=32, **options))


def some_model(seed=0, **options):
    torch.manual_seed(seed)
    values = dict(num_channels=8, biaffine_size=12, num_heads=2, cnn_depth=2)
    names = dict(id2label=dict(enumerate(TYPES)), label2id={t: i for i, t in enumerate(TYPES)})
    return CNNNerForTokenPairs.with_encoder(some_encoder(), **{**values, **names, **options}).eval()


collate = SpanMatrixCollator(len(TYPES))


# --- words and span vectors ------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(-1, 4), min_size=6, max_size=6), min_size=1, max_size=3))
def test_pooled_words_equal_a_loop(rows):
    word_ids = torch.tensor(rows)
    states = torch.randn(len(rows), 6, 3)
    words = pool_words(states, word_ids, 5)
    for b, w in itertools.product(range(len(rows)), range(5)):
        own = states[b, word_ids[b] == w]
        expected = own.amax(0) if len(own) else torch.zeros(3)
        assert torch.equal(words[b, w], expected)


def test_pooling_passes_the_gradient_to_the_largest_piece():
    states = torch.tensor([[[9.0], [1.0], [3.0], [2.0]]], requires_grad=True)
    pool_words(states, torch.tensor([[-1, 0, 0, 1]]), 2).sum().backward()
    assert states.grad[0, :, 0].tolist() == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("width_dim", [0, 5])
def test_linear_part_equals_the_concatenation(width_dim):
    torch.manual_seed(0)
    layer = SpanLinear(4, 6, width_dim, dropout=0.0)
    start, end = torch.randn(2, 20, 4), torch.randn(2, 20, 4)
    result = layer(start, end)
    one = torch.ones(1)
    for i, j in [(0, 0), (0, 19), (19, 0), (3, 5), (18, 2), (2, 17)]:
        parts = [start[1, i], one, end[1, j], one]
        if width_dim:
            parts.append(layer.distance.weight[min(max(j - i, -15), 14) + 15])
        torch.testing.assert_close(result[1, i, j], layer.weight @ torch.cat(parts))


def test_span_vectors_are_asymmetric_and_have_the_sizes_of_the_paper():
    layer = SpanVectors(16, 400, 200, num_heads=4).eval()
    assert layer.biaffine.weight.shape == (4, 50, 100, 100)
    assert layer.linear.weight.shape == (200, 2 * 400 + 2 + 25)
    assert layer.linear.distance.weight.shape == (30, 25)
    vectors = layer(torch.randn(1, 5, 16))
    assert vectors.shape == (1, 200, 5, 5)
    assert not torch.allclose(vectors, vectors.transpose(2, 3))


# --- the convolution -------------------------------------------------------------------------


def loop_cnn(cnn, image, size):
    """The block of section 2, cell by cell, on the first `size` words."""
    channels = image.shape[0]
    state = residual = image[:, :size, :size]
    for convolution, norm in zip(cnn.convolutions, cnn.norms, strict=True):
        reach = convolution.kernel_size[0] // 2
        result = torch.zeros(channels, size, size, dtype=image.dtype)
        for i, j in itertools.product(range(size), range(size)):
            for a, b in itertools.product(range(-reach, reach + 1), repeat=2):
                if 0 <= i + a < size and 0 <= j + b < size:
                    kernel = convolution.weight[:, :, a + reach, b + reach]
                    result[:, i, j] += kernel @ state[:, i + a, j + b]
        summed = (result + residual).permute(1, 2, 0)
        mean, var = summed.mean(-1, keepdim=True), summed.var(-1, keepdim=True, unbiased=False)
        normed = (summed - mean) / (var + 1e-6).sqrt() * norm.weight + norm.bias
        residual = normed.permute(2, 0, 1)
        state = F.gelu(residual)
    return residual


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("size", [5, 3])
def test_the_cnn_equals_loops_whatever_the_padding_holds(kernel_size, size):
    torch.manual_seed(0)
    cnn = SpanCNN(4, depth=3, kernel_size=kernel_size).double()
    for norm in cnn.norms:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    image = torch.randn(4, 5, 5).double()
    mask = torch.zeros(1, 1, 5, 5, dtype=torch.bool)
    mask[..., :size, :size] = True
    result = cnn(image[None], mask)[0, :, :size, :size]
    torch.testing.assert_close(result, loop_cnn(cnn, image, size))


def test_depth_zero_returns_what_it_gets():
    image = torch.randn(2, 4, 3, 3)
    assert torch.equal(SpanCNN(4, depth=0)(image, torch.ones(2, 1, 3, 3, dtype=torch.bool)), image)
    assert not list(SpanCNN(4, depth=0).parameters())


def test_the_cnn_moves_with_the_image_away_from_the_border():
    torch.manual_seed(0)
    cnn, image = SpanCNN(3, depth=2).double(), torch.randn(1, 3, 16, 16).double()
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    moved = cnn(image.roll((3, 1), (2, 3)), mask)
    expected = cnn(image, mask).roll((3, 1), (2, 3))
    torch.testing.assert_close(moved[..., 5:-2, 3:-2], expected[..., 5:-2, 3:-2])
    assert not torch.allclose(moved, expected)


@pytest.mark.parametrize(
    ("depth", "kernel_size", "reach"), [(1, 3, 1), (2, 3, 2), (1, 5, 2), (3, 1, 0)]
)
def test_what_a_cell_sees(depth, kernel_size, reach):
    image = torch.randn(1, 4, 11, 11, dtype=torch.double, requires_grad=True)
    cnn = SpanCNN(4, depth, kernel_size).double()
    weights = torch.randn(4).double()  # a plain sum would be constant after the layer norm
    result = cnn(image, torch.ones(1, 1, 11, 11, dtype=torch.bool))
    (result[0, :, 5, 5] * weights).sum().backward()
    seen = (image.grad.abs().sum(1)[0] > 0).nonzero()
    assert (seen.min(0)[0] == 5 - reach).all() and (seen.max(0)[0] == 5 + reach).all()


def test_impossible_convolutions_are_named():
    with pytest.raises(ValueError, match="kernel_size=2 has no middle"):
        MaskedConv2d(4, 2)
    with pytest.raises(ValueError, match="depth=-1 is negative"):
        SpanCNN(4, -1)


# --- features, labels and loss ---------------------------------------------------------------


def test_labels_are_symmetric_and_padded():
    features = some_features()
    batch = collate(features)
    assert batch["span_labels"].shape == (3, 8, 8, 3) and batch["span_labels"].dtype == torch.int8
    for row, (text, entities) in enumerate(SENTENCES):
        n = len(text.split())
        expected = torch.full((8, 8, 3), -100)
        expected[:n, :n] = 0
        for start, end, label in entities:
            expected[start, end - 1, label] = expected[end - 1, start, label] = 1
        assert torch.equal(batch["span_labels"][row].long(), expected)
        pieces = len(features[row]["input_ids"])
        assert batch["attention_mask"][row].tolist() == [1] * pieces + [0] * (12 - pieces - 2)
        assert batch["word_ids"][row].max() == n - 1


def test_pieces_know_their_words():
    feature = encode_words(some_tokenizer(), ["lina", "opened", "china"], [(0, 1, 2)])
    assert feature["word_ids"] == [-1, 0, 0, 1, 2, -1]
    assert len(feature["input_ids"]) == 6 and feature["entities"] == [(0, 1, 2)]


def test_words_without_pieces_are_unknown():
    tokenizer = some_tokenizer()
    feature = encode_words(tokenizer, ["li", "\u0301", "bank"])
    assert feature["word_ids"] == [-1, 0, 1, 2, -1]
    assert feature["input_ids"][2] == tokenizer.unk_token_id


@pytest.mark.parametrize(("max_length", "kept"), [(6, 3), (5, 2), (4, 1), (3, 1)])
def test_long_sentences_lose_whole_words(max_length, kept):
    tokens, entities = ["lina", "opened", "china"], [(0, 1, 2), (1, 3, 1)]
    feature = encode_words(some_tokenizer(), tokens, entities, max_length)
    assert len(feature["input_ids"]) <= max_length
    assert max(feature["word_ids"]) + 1 == kept
    assert feature["entities"] == [e for e in entities if e[1] <= kept]
    assert feature["input_ids"][-1] == some_tokenizer().sep_token_id


def test_bad_sentences_are_named():
    tokenizer = some_tokenizer()
    with pytest.raises(ValueError, match="sentence is empty"):
        encode_words(tokenizer, [])
    with pytest.raises(ValueError, match=r"entity \(1, 3, 0\) does not fit a sentence of 2 words"):
        encode_words(tokenizer, ["li", "na"], [(0, 1, 0), (1, 3, 0)])


def test_sum_over_cells_mean_over_sentences_by_hand():
    torch.manual_seed(0)
    batch = collate(some_features())
    logits, labels = torch.randn(3, 8, 8, 3), batch["span_labels"]
    both = upper = 0.0
    for b, i, j, t in itertools.product(range(3), range(8), range(8), range(3)):
        y, p = labels[b, i, j, t].item(), torch.sigmoid(logits[b, i, j, t]).item()
        if y >= 0:
            loss = -np.log(p if y else 1 - p)
            both += loss / 3
            upper += loss / 3 * (i <= j)
    assert span_loss(logits, labels).item() == pytest.approx(both, rel=1e-5)
    assert span_loss(logits, labels, "upper").item() == pytest.approx(upper, rel=1e-5)


def test_the_loss_is_computed_in_float32():
    labels = torch.zeros(1, 40, 40, 1, dtype=torch.int8)
    logits = torch.full((1, 40, 40, 1), 0.01, dtype=torch.bfloat16)
    loss = span_loss(logits, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(
        1600 * np.log1p(np.exp(logits[0, 0, 0, 0].item())), rel=1e-4
    )


def test_split_at_stops():
    tokens = ["Acme", "Inc.", "sued", ".", "It", "won"]
    assert split_at_stops(tokens, [(0, 2, 0), (4, 5, 1)]) == [
        (["Acme", "Inc.", "sued", "."], [(0, 2, 0)]),
        (["It", "won"], [(0, 1, 1)]),
    ]
    assert [len(words) for words, _ in split_at_stops(tokens, [])] == [2, 2, 2]
    assert split_at_stops(["a", "."], []) == [(["a", "."], [])]


# --- decoding --------------------------------------------------------------------------------


@dataclass
class Candidate:
    score: float
    start: int
    last: int
    label: int


def crosses(a, b):
    """Do two sets of words overlap without one containing the other?"""
    return bool(a & b) and not (a <= b or b <= a)


def reference(prob, length, threshold=0.5, allow_nested=True):
    """Greedy decoding of one sentence with sets of words."""
    prob = (prob + prob.transpose(0, 1)) / 2
    found = []
    for i in range(length):
        for j in range(i, length):
            score, label = prob[i, j].max(0)
            if score >= threshold:
                found.append(Candidate(score.item(), i, j, label.item()))
    found.sort(key=lambda c: (c.score, c.start, c.last), reverse=True)
    kept = []
    for c in found:
        words = set(range(c.start, c.last + 1))
        others = [set(range(k.start, k.last + 1)) for k in kept]
        bad = [crosses(words, o) if allow_nested else bool(words & o) for o in others]
        if not any(bad):
            kept.append(c)
    return sorted((c.start, c.last + 1, c.label) for c in kept)


@st.composite
def probabilities(draw):
    batch, n, types = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 3))
    values = draw(
        st.lists(st.integers(0, 10), min_size=batch * n * n * types, max_size=batch * n * n * types)
    )
    lengths = draw(st.lists(st.integers(1, n), min_size=batch, max_size=batch))
    return torch.tensor(values).view(batch, n, n, types) / 10, torch.tensor(lengths)


@settings(max_examples=60, deadline=None)
@given(probabilities(), st.booleans())
def test_decoding_equals_brute_force(both, allow_nested):
    prob, lengths = both
    found = decode_spans(prob, lengths, allow_nested=allow_nested)
    for row, length, spans in zip(prob, lengths.tolist(), found, strict=True):
        assert spans == reference(row, length, allow_nested=allow_nested)
        sets = [set(range(start, end)) for start, end, _ in spans]
        assert not any(crosses(a, b) for a, b in itertools.combinations(sets, 2))
    assert decode_spans(prob.transpose(1, 2), lengths, allow_nested=allow_nested) == found


@st.composite
def nested_spans(draw, start=0, end=9):
    """Spans of which any two are disjoint or nested, with one label each."""
    if start >= end:
        return []
    here = draw(st.booleans())
    middle = draw(st.integers(start, end))
    inner = draw(nested_spans(start, middle)) if middle < end else []
    rest = draw(nested_spans(middle, end)) if middle > start else []
    own = [(start, end, draw(st.integers(0, 2)))] if here else []
    return own + inner + rest


@given(nested_spans())
def test_labels_decode_to_the_gold_entities(spans):
    feature = {"input_ids": list(range(11)), "word_ids": [-1, *range(9), -1], "entities": spans}
    batch = collate([feature])
    prob = batch["span_labels"].clamp(min=0).float()
    assert decode_spans(prob, torch.tensor([9])) == [sorted(spans)]


def test_the_released_clash_lets_one_shared_word_pass():
    prob = torch.zeros(1, 6, 6, 1)
    for (i, j), score in {(0, 2): 0.9, (2, 4): 0.8, (1, 3): 0.7}.items():
        prob[0, i, j] = prob[0, j, i] = score
    lengths = torch.tensor([6])
    assert decode_spans(prob, lengths) == [[(0, 3, 0)]]
    assert decode_spans(prob, lengths, legacy_clash=True) == [[(0, 3, 0), (2, 5, 0)]]
    flat = dict(allow_nested=False)
    assert decode_spans(prob, lengths, **flat) == [[(0, 3, 0)]]
    assert decode_spans(prob, lengths, legacy_clash=True, **flat) == [[(0, 3, 0), (2, 5, 0)]]


def test_legacy_clash_equals_the_released_rule():
    """Their test on inclusive ends, for every pair of spans of at most five words."""
    spans = [(i, j) for i in range(5) for j in range(i, 5)]
    for (s1, e1), (s2, e2) in itertools.product(spans, spans):
        nested = (s1 <= s2 and e2 <= e1) or (s2 <= s1 and e1 <= e2)
        released = (s1 < e2 and s2 < e1) and not nested
        assert clashes(s1, e1, np.array([s2]), np.array([e2]))[0] == released
        words = set(range(s1, e1 + 1)), set(range(s2, e2 + 1))
        assert clashes(s1, e1 + 1, np.array([s2]), np.array([e2 + 1]))[0] == crosses(*words)


def test_one_label_a_span_and_the_threshold():
    prob = torch.zeros(1, 2, 2, 2)
    prob[0, 0, 1] = prob[0, 1, 0] = torch.tensor([0.6, 0.7])
    prob[0, 0, 0] = torch.tensor([0.5, 0.2])
    assert decode_spans(prob, torch.tensor([2])) == [[(0, 1, 0), (0, 2, 1)]]
    assert decode_spans(prob, torch.tensor([2]), threshold=0.65) == [[(0, 2, 1)]]
    assert decode_spans(prob, torch.tensor([1])) == [[(0, 1, 0)]]


def test_only_the_upper_triangle_counts_when_asked():
    prob = torch.zeros(1, 3, 3, 1)
    prob[0, 0, 1], prob[0, 2, 1] = 0.9, 1.0
    assert decode_spans(prob, torch.tensor([3]), symmetric=False) == [[(0, 2, 0)]]
    assert decode_spans(prob, torch.tensor([3])) == [[(1, 3, 0)]]  # the mean of 1 and 0


# --- the model -------------------------------------------------------------------------------

VARIANTS = [
    {},
    {"cnn_depth": 0},
    {"kernel_size": 1},
    {"num_heads": 1, "width_dim": 0},
    {"triangles": "upper", "cnn_depth": 1},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_padding_does_not_matter(options):
    model, features = some_model(**options), some_features()
    batch = collate(features)
    scores = model(**batch).logits
    for row, feature in enumerate(features):
        alone = model(**collate([feature]))
        n = int(alone.lengths)
        torch.testing.assert_close(scores[row, :n, :n], alone.logits[0], rtol=1e-4, atol=1e-5)
    losses = [model(**collate([feature])).loss for feature in features]
    torch.testing.assert_close(model(**batch).loss, torch.stack(losses).mean())


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_no_parameter_without_gradient(depth):
    model = some_model(cnn_depth=depth)
    model(**collate(some_features())).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    assert len([n for n, _ in model.named_parameters() if n.startswith("cnn.conv")]) == depth


def test_classifier_reads_vectors_with_and_without_neighbours():
    model, batch = some_model(), collate(some_features())
    states = model.encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    words = pool_words(states.last_hidden_state, batch["word_ids"], 8)
    vectors = model.spans(words)
    real = torch.arange(8) < torch.tensor([8, 3, 1])[:, None]
    mask = (real[:, :, None] & real[:, None, :])[:, None]
    both = vectors + model.cnn(vectors, mask)
    expected = model.classifier(both.permute(0, 2, 3, 1))
    torch.testing.assert_close(model(**batch).logits, expected)
    plain = some_model(cnn_depth=0)
    vectors = plain.spans(
        pool_words(
            plain.encoder(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).last_hidden_state,
            batch["word_ids"],
            8,
        )
    )
    torch.testing.assert_close(plain(**batch).logits, plain.classifier(vectors.permute(0, 2, 3, 1)))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_save_and_load_give_the_same_model(options, tmp_path):
    model, batch = some_model(**options), collate(some_features())
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    again = CNNNerForTokenPairs.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits, rtol=0, atol=0)
    assert again.config.id2label == dict(enumerate(TYPES))
    assert again.config.triangles == options.get("triangles", "both")


def test_the_encoder_keeps_its_weights():
    torch.manual_seed(5)
    encoder = some_encoder()
    model = CNNNerForTokenPairs.with_encoder(
        encoder, num_channels=8, biaffine_size=12, num_heads=2, cnn_depth=1
    )
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(value, encoder.state_dict()[name]), name
    assert not any("pooler" in name for name, _ in model.named_parameters())


def test_initialisation_of_the_released_code():
    model = some_model(biaffine_size=40, num_channels=24, num_heads=2)
    weight = model.spans.biaffine.weight  # (2, 12, 20, 20)
    assert weight.std().item() == pytest.approx((2 / (12 * 400 + 2 * 400)) ** 0.5, rel=0.1)
    linear = model.spans.linear.weight
    assert linear.std().item() == pytest.approx((2 / sum(linear.shape)) ** 0.5, rel=0.1)
    assert model.spans.linear.distance.weight.std().item() == pytest.approx(1.0, rel=0.15)
    bound = model.spans.start[1].weight.abs().max().item()
    assert 0.9 * 16**-0.5 < bound <= 16**-0.5
    assert (model.cnn.norms[0].weight == 1).all() and (model.cnn.norms[0].bias == 0).all()


def test_groups_of_parameters():
    model = some_model()
    groups = parameter_groups(model, 1e-5, head_factor=100, weight_decay=0.01)
    place = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(place) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        rate, decay = place[id(parameter)]
        assert rate == pytest.approx(1e-5 if name.startswith("encoder.") else 1e-3)
        assert decay == (0.0 if "bias" in name or "norm" in name.lower() else 0.01)


def test_it_learns_and_predicts():
    model, features = some_model(dropout=0.0), some_features()
    optimizer = torch.optim.AdamW(parameter_groups(model, 5e-3, head_factor=2.0))
    batch = collate(features)
    model.train()
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    gold = [[(s, e, TYPES[k]) for s, e, k in sorted(entities)] for _, entities in SENTENCES]
    assert predict(model, features) == predict(model, features, batch_size=1) == gold
    assert model.training


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_devices_and_precisions(device, dtype):
    model, batch = some_model(), collate(some_features())
    expected = model(**batch)
    model = model.to(device)
    batch = {name: value.to(device) for name, value in batch.items()}
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        result = model(**batch)
    result.loss.backward()
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    real = batch["span_labels"].cpu() >= 0
    torch.testing.assert_close(
        result.logits.float().cpu()[real], expected.logits[real], atol=tolerance, rtol=tolerance
    )
    assert result.loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("encoder", "sizes"),
    [
        (BertConfig(vocab_size=28996), dict(num_channels=200, biaffine_size=400, num_heads=4, cnn_depth=3)),
        (RobertaConfig(vocab_size=50265, max_position_embeddings=514), dict(num_channels=120, biaffine_size=200, num_heads=5, cnn_depth=2)),
    ],
    ids=["genia", "ace"],
)  # fmt: skip
def test_the_papers_sizes_build_on_the_meta_device(encoder, sizes):
    with torch.device("meta"):
        config = CNNNerConfig(encoder_config=encoder.to_dict(), num_labels=7, **sizes)
        model = CNNNerForTokenPairs(config)
        vectors = model.spans(torch.zeros(2, 9, 768))
        refined = model.refine(vectors, torch.ones(2, dtype=torch.long))
        logits = model.classifier(refined.permute(0, 2, 3, 1))
        loss = span_loss(logits, torch.zeros(2, 9, 9, 7, dtype=torch.int8))
    assert logits.shape == (2, 9, 9, 7) and loss.shape == ()
    assert model.encoder.config.hidden_size == 768 and model.encoder.config.num_hidden_layers == 12
    b, c, k = sizes["biaffine_size"], sizes["num_channels"], sizes["num_heads"]
    assert model.spans.biaffine.weight.shape == (k, c // k, b // k, b // k)
    assert len(model.cnn.convolutions) == sizes["cnn_depth"]
    assert model.cnn.convolutions[0].weight.shape == (c, c, 3, 3)


def test_a_roberta_encoder_works():
    torch.manual_seed(0)
    sizes = dict(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    encoder = RobertaModel(RobertaConfig(**sizes, intermediate_size=32, max_position_embeddings=40))
    model = CNNNerForTokenPairs.with_encoder(
        encoder, num_labels=3, num_channels=8, biaffine_size=12, num_heads=2, cnn_depth=1
    )
    model(**SpanMatrixCollator(3, pad_token_id=1)(some_features())).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_unknown_options_are_named():
    with pytest.raises(ValueError, match="triangles='lower' is unknown"):
        CNNNerConfig(triangles="lower")
    with pytest.raises(ValueError, match="encoder_config is missing"):
        CNNNerForTokenPairs(CNNNerConfig())
    with pytest.raises(ValueError, match="num_heads=5 does not divide in_features=12"):
        some_model(num_heads=5)
