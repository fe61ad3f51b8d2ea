"""FLAT: the trie and the attention against brute force, invariances, exact memory saving, save and load, errors."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compendium.chinese.flat import (
    DISTANCES,
    FUSIONS,
    FlatConfig,
    FlatEncoder,
    FlatForTokenClassification,
    FlatLatticeAttention,
    FlatLatticeCollator,
    FlatVocabulary,
    LatticeTagger,
    Lexicon,
    RelativePositions,
    SoftLexiconTagger,
    SpanRelativePosition,
    attention_pattern,
    bigrams,
    predict,
    relation_scores,
    sinusoid,
    soft_lexicon_weights,
    span_distances,
    unique_relations,
)

TAGS = ["O", "B-X", "I-X", "B-Y"]
WORDS = ["ab", "abc", "bc", "cdea", "ea", "ccc", "d"]
TEXTS = ["abcdea", "ccccab", "dd", "a", "eabcdeabc"]
collate = FlatLatticeCollator()


def some_encoder(lexicon=True):
    lexicon = Lexicon(WORDS) if lexicon else None
    vocabulary = FlatVocabulary.build([list(text) for text in TEXTS], lexicon)
    return FlatEncoder(vocabulary, lexicon, {tag: i for i, tag in enumerate(TAGS)})


def some_batch(texts=TEXTS, lexicon=True, labels=True):
    encoder = some_encoder(lexicon)
    tags = [["B-X", *["I-X"] * (len(text) - 1)] if labels else None for text in texts]
    return collate([encoder(text, row) for text, row in zip(texts, tags, strict=True)])


def some_config(**options):
    vocabulary = some_encoder().vocabulary
    return FlatConfig(
        **{
            "vocab_size": len(vocabulary.tokens),
            "bigram_vocab_size": len(vocabulary.bigrams),
            "embedding_dim": 6,
            "hidden_size": 16,
            "num_heads": 2,
            "intermediate_size": 24,
            "id2label": dict(enumerate(TAGS)),
            "label2id": {tag: i for i, tag in enumerate(TAGS)},
            **options,
        }
    )


def some_model(kind=FlatForTokenClassification, seed=0, **options):
    torch.manual_seed(seed)
    return kind(some_config(**options)).eval()


# --- the lexicon -------------------------------------------------------------------------------


@given(st.text("abc", max_size=12), st.sets(st.text("abc", min_size=1, max_size=5)))
def test_matches_equal_every_substring_that_is_a_word(text, words):
    lexicon = Lexicon(words)
    kept = {word for word in words if len(word) >= 2}
    spans = [(i, j) for i in range(len(text)) for j in range(i, len(text))]
    expected = [(i, j, text[i : j + 1]) for i, j in spans if text[i : j + 1] in kept]
    assert lexicon.matches(text) == expected
    assert set(lexicon) == kept and len(lexicon) == len(kept)


def test_lexicon_from_jieba_and_its_extension():
    lexicon = Lexicon.from_jieba()
    assert len(lexicon) > 300_000 and "重庆" in lexicon and "药" not in lexicon
    larger = lexicon.extended(["人和药店"])
    assert "人和药店" in larger and "人和药店" not in lexicon and len(larger) == len(lexicon) + 1
    assert "人和药店" in [match.word for match in larger.matches("重庆人和药店")]


def test_lists_of_longer_tokens_are_refused():
    with pytest.raises(ValueError, match="2 tokens hold 3 characters"):
        Lexicon(["ab"]).matches(["ab", "c"])


# --- encoding ------------------------------------------------------------------------------------


def test_collator_places_characters_before_words():
    batch = some_batch()
    encoder = some_encoder()
    longest = max(map(len, TEXTS))
    for row, text in enumerate(TEXTS):
        matches = encoder.lexicon.matches(text)
        real = batch["attention_mask"][row].bool()
        assert real[:longest].sum() == len(text) and real[longest:].sum() == len(matches)
        assert batch["head"][row, : len(text)].tolist() == list(range(len(text)))
        assert batch["tail"][row, longest:][real[longest:]].tolist() == [m.tail for m in matches]
        tokens = [encoder.vocabulary.tokens[i] for i in batch["input_ids"][row][real]]
        assert tokens == [*text, *(match.word for match in matches)]
        assert (batch["labels"][row, len(text) :] == -100).all()


def test_vocabulary_counts_and_round_trip(tmp_path):
    sentences = [list("abcab"), list("abd")]
    vocabulary = FlatVocabulary.build(sentences, Lexicon(["ab", "bd"]), min_count=2)
    assert set(vocabulary.tokens[2:]) == {"a", "b", "ab"} and vocabulary.bigrams[2:] == ["ab"]
    vocabulary.save_pretrained(tmp_path)
    assert FlatVocabulary.from_pretrained(tmp_path) == vocabulary
    features = FlatEncoder(vocabulary, Lexicon(["bd"]))("bdz")
    assert features["word_ids"] == [1] and features["char_ids"][2] == 1
    assert bigrams("xyz") == ["xy", "yz", "z<end>"]


def test_bad_sentences_are_named():
    encoder = some_encoder()
    with pytest.raises(ValueError, match="sentence is empty"):
        encoder("")
    with pytest.raises(ValueError, match="1 tags for 2 characters"):
        encoder("ab", ["O"])
    with pytest.raises(ValueError, match="tag 'B-Z' is unknown"):
        encoder("ab", ["O", "B-Z"])


# --- positions -----------------------------------------------------------------------------------


@st.composite
def spans(draw):
    rows = draw(st.integers(1, 3))
    count = draw(st.integers(1, 6))
    head = draw(st.lists(st.integers(0, 9), min_size=rows * count, max_size=rows * count))
    width = draw(st.lists(st.integers(0, 4), min_size=rows * count, max_size=rows * count))
    head, width = (torch.tensor(x).view(rows, count) for x in (head, width))
    return head, head + width


@given(spans(), st.booleans())
def test_unique_relations_give_back_every_distance(both, all_queries):
    head, tail = both
    queries = head.shape[1] if all_queries else 1
    unique, index, bound = unique_relations(head, tail, queries)
    distances = span_distances(head, tail, queries)
    for name in DISTANCES:
        assert (unique[name][index] == distances[name]).all()
        assert unique[name].abs().max() < bound
    rows = torch.stack([unique[name] for name in DISTANCES])
    assert len(torch.unique(rows, dim=1)[0]) == len(rows[0]) == len(index.unique())


@given(spans())
def test_signs_tell_how_spans_lie(both):
    head, tail = both
    d = span_distances(head, tail)
    for b, i, j in itertools.product(*(range(n) for n in (*head.shape, head.shape[1]))):
        first, second = (set(range(head[b, k], tail[b, k] + 1)) for k in (i, j))
        assert (d["th"][b, i, j] < 0) == (max(first) < min(second))
        assert (d["ht"][b, i, j] > 0) == (min(first) > max(second))
        contains = (d["hh"][b, i, j] <= 0) and (d["tt"][b, i, j] >= 0)
        assert bool(contains) == (second <= first)


def test_sinusoid_from_its_formula():
    distance, dim = torch.tensor([-3, 0, 5]), 8
    rows = sinusoid(distance, dim)
    for row, d in zip(rows, distance.tolist(), strict=True):
        for k in range(dim // 2):
            angle = d * 10000 ** (-k / (dim // 2 - 1))
            assert row[k].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert row[k + dim // 2].item() == pytest.approx(math.cos(angle), abs=1e-6)


@pytest.mark.parametrize("fusion", sorted(FUSIONS))
def test_fused_encoding_equals_the_equation_pair_by_pair(fusion):
    torch.manual_seed(0)
    module = SpanRelativePosition(8, FUSIONS[fusion])
    batch = some_batch(labels=False)
    vectors, index = module(batch["head"], batch["tail"])
    place = {"h": batch["head"], "t": batch["tail"]}
    for b, i, j in itertools.product(range(2), range(5), range(8)):
        pieces = [
            sinusoid(place[name[0]][b, i] - place[name[1]][b, j], 8) for name in FUSIONS[fusion]
        ]
        expected = torch.relu(module.fusion(torch.cat(pieces)))
        torch.testing.assert_close(vectors[index[b, i, j]], expected)


def test_two_distances_are_four_with_zero_blocks():
    torch.manual_seed(0)
    four, two = (some_model(four_pos_fusion=fusion) for fusion in ("ff", "ff_two"))
    state = four.state_dict()
    weight = state["position.fusion.weight"]
    weight[:, 16:48] = 0.0
    state["position.fusion.weight"] = torch.cat([weight[:, :16], weight[:, 48:]], dim=1)
    two.load_state_dict(state)
    batch = some_batch(labels=False)
    torch.testing.assert_close(four(**batch).logits, two(**batch).logits)


# --- attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("k_proj", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("dense", [True, False])
def test_attention_equals_four_term_loops(k_proj, scaled, dense):
    torch.manual_seed(0)
    batch, length, heads, size = 2, 5, 2, 4
    attention = FlatLatticeAttention(8, heads, k_proj=k_proj, scaled=scaled, attn_ff=True)
    hidden, fused = torch.randn(batch, length, 8), torch.randn(batch, length, length, 8)
    relations = RelativePositions(fused, None)
    if not dense:
        index = torch.arange(batch * length * length).view(batch, length, length)
        relations = RelativePositions(fused.flatten(0, 2), index)
    allowed = torch.ones(batch, length, length, dtype=torch.bool)
    allowed[1, :, 3:] = False
    context, weights = attention(hidden, relations, allowed)
    parts = attention.scores
    expected = torch.zeros(batch, length, 8)
    for b, h, i in itertools.product(range(batch), range(heads), range(length)):
        part = slice(h * size, (h + 1) * size)
        q, u, v = parts.query(hidden[b, i])[part], parts.u[h], parts.v[h]
        scores = []
        for j in range(length):
            k, r = parts.key(hidden[b, j])[part], parts.relation(fused[b, i, j])[part]
            scores.append(
                q @ k + q @ r + u @ k + v @ r if allowed[b, i, j] else q.new_tensor(-1e15)
            )
        a = (torch.stack(scores) * (size**-0.5 if scaled else 1)).softmax(0)
        torch.testing.assert_close(weights[b, h, i], a)
        expected[b, i, part] = a @ attention.value(hidden[b])[:, part]
    torch.testing.assert_close(context, attention.output(expected))


@given(spans(), st.integers(1, 5))
@settings(max_examples=50)
def test_patterns_from_their_definitions(both, limit):
    head, tail = both
    count = head.shape[1]
    mask = torch.ones_like(head, dtype=torch.bool)
    mask[:, -1] = count == 1
    no_self = attention_pattern(head, tail, mask, count, "no_self_match")
    near = attention_pattern(head, tail, mask, count, "no_long_distance", limit)
    for b, i, j in itertools.product(range(len(head)), range(count), range(count)):
        (hi, ti), (hj, tj) = ((head[b, k].item(), tail[b, k].item()) for k in (i, j))
        character_in_word = hi == ti and hj < tj and hj <= hi <= tj
        assert no_self[b, i, j] == (mask[b, j] and not character_in_word)
        assert near[b, i, j] == (mask[b, j] and max(hj - ti, hi - tj, 0) <= limit)


# --- the model -----------------------------------------------------------------------------------

VARIANTS = [
    {},
    {"four_pos_fusion": "ff_two"},
    {"num_layers": 2},
    {"num_layers": 2, "scaled": True, "attn_ff": True},
    {"position": "absolute"},
    {"position": "none", "attention_pattern": "no_self_match"},
    {"attention_pattern": "no_long_distance", "max_distance": 2},
    {"residual": False, "shared_layer_norm": True, "k_proj": False},
    {"num_layers": 0},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_neither_padding_nor_the_order_of_words_matters(options):
    model, batch = some_model(**options), some_batch(labels=False)
    scores = model(**batch).logits
    longest = batch["bigram_ids"].shape[1]
    order = torch.randperm(batch["head"].shape[1] - longest)
    order = torch.cat([torch.arange(longest), longest + order])
    moved = {name: x if name == "bigram_ids" else x[:, order] for name, x in batch.items()}
    torch.testing.assert_close(model(**moved).logits, scores)
    for row, text in enumerate(TEXTS):
        alone = model(**some_batch([text], labels=False)).logits[0]
        torch.testing.assert_close(scores[row, : len(text)], alone)


@pytest.mark.parametrize("fusion", sorted(FUSIONS))
@pytest.mark.parametrize("num_layers", [1, 3])
def test_unique_equals_dense_with_gradients(fusion, num_layers):
    model = some_model(four_pos_fusion=fusion, num_layers=num_layers).double()
    batch = some_batch()
    results = []
    for unique in (True, False):
        model.position.unique = unique
        model.zero_grad()
        output = model(**batch)
        output.loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append([output.logits, output.loss, *output.attentions, *gradients])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_groups_of_sentences_change_nothing():
    torch.manual_seed(0)
    query, vectors = torch.randn(5, 2, 3, 4), torch.randn(7, 8)
    relations = RelativePositions(vectors, torch.randint(7, (5, 3, 6)))
    whole = relation_scores(query, relations, vectors)
    for limit in (1, 2 * 3 * 7 * 2, 10**6):
        torch.testing.assert_close(relation_scores(query, relations, vectors, limit), whole)
    one = query[4, 1, 2] @ vectors[relations.index[4, 2, 5], 4:]
    torch.testing.assert_close(whole[4, 1, 2, 5], one)


def test_scores_do_not_depend_on_where_the_sentence_stands():
    model, batch = some_model(), some_batch(labels=False)
    scores = model(**batch).logits
    batch["head"], batch["tail"] = batch["head"] + 40, batch["tail"] + 40
    torch.testing.assert_close(model(**batch).logits, scores)
    absolute = some_model(position="absolute")
    assert (
        absolute(**batch).logits - absolute(**some_batch(labels=False)).logits
    ).abs().max() > 0.01


def test_only_the_mask_hides_the_lexicon():
    """A character changes when a word that contains it changes, unless it may not see it."""
    for pattern, changes in (("all", True), ("no_self_match", False)):
        model = some_model(attention_pattern=pattern)
        batch = some_batch(["ab"], labels=False)
        before = model(**batch).logits
        batch["input_ids"][0, 2] = 1
        assert bool((model(**batch).logits != before).any()) == changes


def test_residual_false_is_the_released_code():
    model = some_model(residual=False, shared_layer_norm=True)
    layer = model.layers[0]
    assert layer.feed_forward_norm is None
    hidden = torch.randn(1, 4, 16)
    allowed = torch.ones(1, 4, 4, dtype=torch.bool)
    context, _ = layer.attention(hidden, None, allowed)
    middle = layer.attention_norm(2 * context)
    expected = layer.attention_norm(2 * layer.feed_forward(middle))
    torch.testing.assert_close(layer(hidden, None, allowed)[0], expected)
    released = FlatConfig.released(hidden_size=32)
    assert (
        not released.k_proj and released.four_pos_fusion == "ff_two" and released.hidden_size == 32
    )


@pytest.mark.parametrize("kind", [FlatForTokenClassification, SoftLexiconTagger, LatticeTagger])
def test_save_and_load_give_the_same_model(kind, tmp_path):
    model, batch = some_model(kind), some_batch()
    with torch.no_grad():
        model.crf.transitions.normal_()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    again = kind.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits, rtol=0, atol=0)
    torch.testing.assert_close(again(**batch).loss, model(**batch).loss, rtol=0, atol=0)
    assert again.config.id2label == dict(enumerate(TAGS))


def test_initialisation():
    model = some_model(hidden_size=64, num_heads=4)
    xavier = math.sqrt(6 / (64 + 64))
    query = model.layers[0].attention.scores.query.weight.abs().max().item()
    assert 0.9 * xavier < query <= xavier
    fused = model.position.fusion.weight.abs().max().item()
    assert fused <= 1 / math.sqrt(4 * 64) < math.sqrt(6 / (5 * 64))
    assert (model.crf.transitions == 0).all() and (model.embedding.tokens.weight[0] == 0).all()
    assert model.crf.start_scores is None


def test_it_learns_and_predicts():
    """Six sentences by heart, entities from words of the lexicon only."""
    encoder, batch = some_encoder(), some_batch()
    model = some_model(char_dropout=0.0, word_dropout=0.0, ff_dropout=0.0, output_dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    assert model.predict(TEXTS, encoder) == [[(0, len(text), "X")] for text in TEXTS]
    assert model.training
    assert predict(model, [encoder(t) for t in TEXTS], batch_size=2) == model.predict(
        TEXTS, encoder
    )


def test_sentences_without_any_word():
    model = some_model()
    batch = some_batch(["ddd", "d"], lexicon=True)
    assert batch["head"].shape == batch["bigram_ids"].shape
    model(**batch).loss.backward()
    assert SoftLexiconTagger(some_config())(**batch).loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    model, batch = some_model().to(dtype), some_batch()
    expected = some_model()(**batch).logits
    result = model(**batch)
    torch.testing.assert_close(result.logits.float(), expected, atol=0.1, rtol=0.05)
    result.loss.backward()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_cuda_equals_cpu(options):
    model, batch = some_model(**options), some_batch()
    expected = model(**batch)
    model = model.cuda()
    result = model(**{name: x.cuda() for name, x in batch.items()})
    result.loss.backward()
    torch.testing.assert_close(result.logits.cpu(), expected.logits, rtol=1e-4, atol=1e-4)
    assert model.decode(batch) == model.cpu().decode(batch)


def test_bert_features_reach_the_characters():
    bert = {
        "model_type": "bert",
        "vocab_size": 30,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    model, batch = some_model(bert_config=bert), some_batch()
    with pytest.raises(ValueError, match="needs bert_input_ids"):
        model(**batch)
    ids = torch.zeros(len(TEXTS), batch["bigram_ids"].shape[1] + 2, dtype=torch.long)
    for row, text in zip(ids, TEXTS, strict=True):
        row[: len(text) + 2] = torch.randint(1, 30, (len(text) + 2,))
    loss = model(**batch, bert_input_ids=ids).loss
    loss.backward()
    assert model.bert.model.embeddings.word_embeddings.weight.grad.abs().sum() > 0


def test_the_papers_sizes_build_on_the_meta_device():
    """OntoNotes with the YJ lexicon and a BERT of base size: shapes only."""
    bert = {"model_type": "bert", "vocab_size": 21128, "hidden_size": 768}
    config = FlatConfig(
        vocab_size=704_368, bigram_vocab_size=3_987_541, num_labels=17, bert_config=bert
    )
    with torch.device("meta"):
        model = FlatForTokenClassification(config)
    assert model.embedding.char_projection.in_features == 50 + 50 + 768
    assert model.position.fusion.weight.shape == (160, 640)
    assert model.layers[0].feed_forward[0].weight.shape == (480, 160)


def test_unknown_options_are_named():
    with pytest.raises(ValueError, match="four_pos_fusion='attn' is unknown"):
        FlatConfig(four_pos_fusion="attn")
    with pytest.raises(ValueError, match="distance 'xx' is unknown"):
        SpanRelativePosition(8, ("hh", "xx"))
    with pytest.raises(ValueError, match="num_heads=3 does not divide the hidden size 16"):
        some_model(num_heads=3)


# --- the baselines -------------------------------------------------------------------------------


def test_soft_lexicon_averages_by_position():
    encoder, texts = some_encoder(), ["abcdea", "ccccab"]
    batch = some_batch(texts, labels=False)
    weights = soft_lexicon_weights(
        batch["head"][:, 6:], batch["tail"][:, 6:], batch["attention_mask"][:, 6:].bool(), 6
    )
    for b, text in enumerate(texts):
        matches = encoder.lexicon.matches(text)
        for i in range(6):
            sets = (
                [m.head == i for m in matches],
                [m.head < i < m.tail for m in matches],
                [m.tail == i for m in matches],
            )
            for found, members in zip(weights[:, b, i], sets, strict=True):
                expected = np.array(members) / max(1, sum(members))
                np.testing.assert_allclose(found[: len(matches)], expected, rtol=1e-6)
                assert (found[len(matches) :] == 0).all()


@pytest.mark.parametrize("kind", [SoftLexiconTagger, LatticeTagger])
def test_baselines_ignore_padding(kind):
    model, batch = some_model(kind), some_batch(labels=False)
    scores = model(**batch).logits
    for row, text in enumerate(TEXTS):
        alone = model(**some_batch([text], labels=False)).logits[0]
        torch.testing.assert_close(scores[row, : len(text)], alone)


def test_lattice_words_flow_into_their_last_character():
    model = some_model(LatticeTagger)
    batch = some_batch(["abcdea"], labels=False)
    before = model.encode(batch)[0][0]
    word = batch["tail"][0, 6:].tolist().index(2)  # a word that ends at character 2
    batch["input_ids"][0, 6 + word] = 1
    changed = (model.encode(batch)[0][0] - before).abs().sum(-1) > 0
    assert changed.tolist() == [False, False, True, True, True, True]
