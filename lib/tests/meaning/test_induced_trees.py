"""Induced trees: impacts against the double loop, decoding, tree models against references, save and load, errors."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from compendium.meaning.induced_trees import (
    ALGORITHMS,
    ASGCN,
    PWCN,
    AspectCollator,
    AspectPoolClassifier,
    AspectPoolConfig,
    GraphLayer,
    SentenceEncoder,
    TreeCollator,
    TreeInducer,
    adjacency_of,
    decode_tree,
    distances_to,
    encode_words,
    impact_matrices,
    impact_matrix,
    masked_inputs,
    padded,
    proximity,
    sentence_distance,
    states_at,
    word_pairs,
    word_vectors,
)
from compendium.metrics.trees import tree_distance, uuas
from compendium.models.prompts import transformer_layers
from compendium.models.trees import chain, is_projective, is_tree, random_tree

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]
WORDS = ["the", "old", "printers", "with", "a", "menu", "is", "slow"]
PIECES = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "old",
    "print",
    "##ers",
    "with",
    "a",
    "menu",
]
PIECES += ["is", "sl", "##ow"]
collate, collate_trees = AspectCollator(), TreeCollator()


def some_tokenizer():
    pieces = {piece: number for number, piece in enumerate(PIECES)}
    core = Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    names = ("pad", "unk", "cls", "sep", "mask")
    special = {f"{name}_token": f"[{name.upper()}]" for name in names}
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


SIZES = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24)
FAMILIES = ["bert", "roberta", "electra", "distilbert"]


def some_encoder(family="bert", seed=0, scale=0.5):
    torch.manual_seed(seed)
    sizes = dict(SIZES, vocab_size=len(PIECES), pad_token_id=0, max_position_embeddings=64)
    if family == "distilbert":
        sizes = dict(dim=16, n_layers=3, n_heads=2, hidden_dim=24, vocab_size=len(PIECES))
    if family == "electra":
        sizes["embedding_size"] = 8
    config = AutoConfig.for_model(family, **sizes, initializer_range=scale)
    return AutoModel.from_config(config).eval()


def impact_by_double_loop(model, tokenizer, words, layer, metric="l2"):
    """Two passes of the whole model for every ordered pair; nothing shared, nothing batched."""
    sentence, n = encode_words(tokenizer, words), len(words)
    impact = np.zeros((n + 1, n + 1))

    def state(i, hidden):
        ids = [
            tokenizer.mask_token_id if o in hidden else t for t, o in zip(*sentence, strict=True)
        ]
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0]
        return states[[place for place, owner in enumerate(sentence.owner) if owner == i]].mean(0)

    for i in range(1, n + 1):
        for j in range(1, n + 1):
            a, b = state(i, {i}), state(i, {i, j})
            impact[i, j] = (
                (a - b).norm() if metric == "l2" else 1 - F.cosine_similarity(a, b, dim=0)
            )
    np.fill_diagonal(impact, 0)
    return impact


# --- words and pieces --------------------------------------------------------------------------


def test_words_are_cut_one_by_one():
    tokenizer = some_tokenizer()
    encoded = encode_words(tokenizer, WORDS)
    pieces = tokenizer.convert_ids_to_tokens(encoded.input_ids)
    expected = "[CLS] the old print ##ers with a menu is sl ##ow [SEP]"
    assert pieces == expected.split() and encoded.num_words == len(WORDS)
    assert encoded.owner == [0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 8, -1]
    nothing = encode_words(tokenizer, ["the", "\u200b \t", "menu"])
    assert nothing.owner.count(2) == 1 and nothing.num_words == 3


def test_bad_sentences_and_tokenizers_are_named():
    with pytest.raises(ValueError, match="at least one word"):
        encode_words(some_tokenizer(), [])
    with pytest.raises(ValueError, match="give a list"):
        encode_words(some_tokenizer(), "the menu")
    tokenizer = some_tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="no mask token"):
        encode_words(tokenizer, WORDS)


def test_all_pieces_of_both_words_are_masked():
    encoded = encode_words(some_tokenizer(), WORDS)
    inputs = masked_inputs(encoded, word_pairs(len(WORDS)), 4)
    assert len(inputs) == 8 * 9 // 2 == len({tuple(row) for row in inputs})
    for (i, j), row in zip(word_pairs(len(WORDS)), inputs, strict=True):
        masked = [owner in (i, j) for owner in encoded.owner]
        assert ((row == 4) == masked).all()
        assert (row[~np.array(masked)] == np.array(encoded.input_ids)[~np.array(masked)]).all()


# --- impacts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_impacts_equal_the_double_loop(family, metric):
    model, tokenizer = some_encoder(family), some_tokenizer()
    for layer in (1, -2, -1):
        expected = impact_by_double_loop(model, tokenizer, WORDS, layer, metric)
        impact = impact_matrix(model, tokenizer, WORDS, layer, metric)
        np.testing.assert_allclose(impact, expected, atol=2e-5, rtol=1e-3)
        assert expected[1:, 1:].max() > 0.01


@pytest.mark.parametrize("device", DEVICES)
def test_impacts_do_not_depend_on_company_or_batches(device):
    model, tokenizer = some_encoder().to(device), some_tokenizer()
    sentences = [WORDS, WORDS[:3], WORDS[2:], ["menu"], WORDS[::-1]]
    alone = [impact_matrix(model, tokenizer, words) for words in sentences]
    for batch_size in (1, 7, 500):
        together = impact_matrices(model, tokenizer, sentences, batch_size=batch_size)
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4)


def test_structure_and_determinism():
    model, tokenizer = some_encoder().train(), some_tokenizer()
    first, second = (impact_matrix(model, tokenizer, WORDS) for _ in range(2))
    assert (
        model.training and (first == second).all()
    )  # dropout is off inside, and on again afterwards
    assert (first >= 0).all() and not first[0].any() and not first[:, 0].any()
    assert not first.diagonal().any() and not np.allclose(first, first.T)


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_is_near(device):
    model, tokenizer = some_encoder().to(device), some_tokenizer()
    exact, rough = (
        impact_matrices(model, tokenizer, [WORDS], autocast=a)[0] for a in (False, True)
    )
    assert np.abs(exact - rough).max() < 0.1 * exact.max() and (exact != rough).any()


class Counter:
    """Counts the sentences that go through a module."""

    def __init__(self, module):
        self.rows = 0
        module.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs):
        self.rows += len(kwargs["input_ids"] if "input_ids" in kwargs else args[0])


@pytest.mark.parametrize("num_words", [1, 5, 8])
def test_the_number_of_passes(num_words):
    model, tokenizer = some_encoder(), some_tokenizer()
    counter = Counter(model)
    impact_matrix(model, tokenizer, WORDS[:num_words], batch_size=3)
    assert counter.rows == num_words * (num_words + 1) // 2


@pytest.mark.parametrize("family", FAMILIES)
def test_stopping_early_gives_the_same_states(family):
    model = some_encoder(family)
    ids = torch.randint(5, len(PIECES), (2, 6))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        expected = model(
            input_ids=ids, attention_mask=mask, output_hidden_states=True
        ).hidden_states
    for layer in range(-4, 4):
        torch.testing.assert_close(states_at(model, ids, mask, layer), expected[layer])
    ran = []
    transformer_layers(model)[2].register_forward_hook(lambda *_: ran.append(2))
    states_at(model, ids, mask, -2)
    assert not ran
    states_at(model, ids, mask, -1)
    assert ran == [2]


def test_blocks_in_an_unknown_place_run_whole(monkeypatch):
    model, ids = some_encoder(), torch.randint(5, len(PIECES), (2, 6))
    expected = states_at(model, ids, torch.ones_like(ids), -2)
    ran = []
    transformer_layers(model)[2].register_forward_hook(lambda *_: ran.append(2))
    monkeypatch.setattr("compendium.models.prompts.STACKS", ())
    torch.testing.assert_close(states_at(model, ids, torch.ones_like(ids), -2), expected)
    assert ran == [2]


def test_wrong_layers_and_metrics_are_named():
    with pytest.raises(ValueError, match="layer 4 is not among the 4"):
        impact_matrix(some_encoder(), some_tokenizer(), WORDS, layer=4)
    with pytest.raises(ValueError, match="metric 'l1' is unknown"):
        impact_matrix(some_encoder(), some_tokenizer(), WORDS, metric="l1")


# --- decoding ----------------------------------------------------------------------------------


def impacts(length, seed):
    impact = np.random.default_rng(seed).random((length + 1, length + 1))
    impact[:, 0] = impact[0] = 0
    np.fill_diagonal(impact, 0)
    return impact


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(0, 10**6), st.sampled_from(ALGORITHMS))
def test_always_a_tree_with_one_root(length, seed, algorithm):
    for root in ("incidental", "free"):
        heads = decode_tree(impacts(length, seed), algorithm, root)
        assert is_tree(heads, single_root=True) and len(heads) == length
        assert algorithm == "cle" or is_projective(heads)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 5), st.integers(0, 10**6))
def test_free_root_is_the_largest_product(length, seed):
    from itertools import product

    impact = impacts(length, seed)
    words = np.arange(1, length + 1)

    def value(heads):
        heads = np.array(heads)
        return impact[words[heads > 0], heads[heads > 0]].prod()

    every = (h for h in product(range(length + 1), repeat=length) if is_tree(h, single_root=True))
    assert np.isclose(value(decode_tree(impact, root="free")), max(map(value, every)))
    assert value(decode_tree(impact)) <= value(decode_tree(impact, root="free")) * (1 + 1e-9)


def test_greedy_choices_that_agree_are_kept():
    """Where the best words point to one another only once, decoding changes that one cycle."""
    impact = np.full((5, 5), 0.1)
    for word, head in ((1, 2), (2, 3), (3, 2), (4, 3)):
        impact[word, head] = 1.0
    heads = decode_tree(impact, root="free").tolist()
    assert heads in ([2, 3, 0, 3], [2, 0, 2, 3])
    assert is_tree(decode_tree(np.ones((7, 7))), single_root=True)
    assert is_tree(decode_tree(np.zeros((7, 7))), single_root=True)


def test_chains_and_errors():
    left, right = (decode_tree(np.ones((6, 6)), f"{side}_chain") for side in ("left", "right"))
    assert uuas([left], [right]) == 1 and (left != right).any()
    with pytest.raises(ValueError, match="algorithm 'cel' is unknown; did you mean 'cle'"):
        decode_tree(np.ones((3, 3)), "cel")
    with pytest.raises(ValueError, match="root 'fre' is unknown; did you mean 'free'"):
        decode_tree(np.ones((3, 3)), root="fre")
    with pytest.raises(ValueError, match="not negative"):
        decode_tree(-np.ones((3, 3)))


def test_inducer_is_an_estimator():
    model, tokenizer = some_encoder(), some_tokenizer()
    inducer = TreeInducer(model, tokenizer, layer=1, algorithm="eisner")
    assert inducer.get_params()["layer"] == 1 and inducer.fit() is inducer
    sentences = [WORDS, WORDS[:4]]
    expected = [
        decode_tree(impact_matrix(model, tokenizer, w, layer=1), "eisner") for w in sentences
    ]
    for found, heads in zip(inducer.transform(sentences), expected, strict=True):
        assert (found == heads).all()
    copy = clone(TreeInducer(None, None, layer=1))
    assert copy.layer == 1


# --- the pooled baseline -----------------------------------------------------------------------


def some_rows():
    tokenizer = some_tokenizer()
    aspects = [{"start": 2, "end": 3, "polarity": 1}, {"start": 4, "end": 6, "polarity": 2}]
    long, short = encode_words(tokenizer, WORDS), encode_words(tokenizer, WORDS[:3])
    return [{"encoded": long, "aspects": aspects}, {"encoded": short, "aspects": aspects[:1]}]


@pytest.mark.parametrize("device", DEVICES)
def test_pooling_ignores_padding_and_sharing(device):
    model = AspectPoolClassifier.from_encoder(some_encoder()).eval().to(device)
    rows = some_rows()

    def run(rows):
        return model(**{name: value.to(device) for name, value in collate(rows).items()})

    together = run(rows)
    apart = [run([row | {"aspects": [aspect]}]) for row in rows for aspect in row["aspects"]]
    torch.testing.assert_close(
        together.logits, torch.cat([a.logits for a in apart]), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(together.loss, torch.stack([a.loss for a in apart]).mean())


def test_pooling_is_the_maximum_over_the_aspect():
    model = AspectPoolClassifier.from_encoder(some_encoder()).eval()
    batch = collate(some_rows())
    with torch.no_grad():
        states = model.encoder(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        pooled = torch.stack(
            [states[0, 3:5].amax(0), states[0, 6:8].amax(0), states[1, 3:5].amax(0)]
        )
        expected = model.head.classifier(F.relu(model.head.hidden(pooled)))
        torch.testing.assert_close(model(**batch).logits, expected)
    assert batch["aspect_mask"].sum(1).tolist() == [2, 2, 2]
    one_each = {name: batch[name][[0, 1]] for name in ("input_ids", "attention_mask")}
    without = model(**one_each, aspect_mask=batch["aspect_mask"][[0, 2]])
    torch.testing.assert_close(without.logits, expected[[0, 2]])
    assert without.loss is None


def test_classifier_comes_back_from_disk(tmp_path):
    model = AspectPoolClassifier.from_encoder(some_encoder("roberta"), dropout=0.4).eval()
    model.save_pretrained(tmp_path)
    again = AspectPoolClassifier.from_pretrained(tmp_path).eval()
    assert again.config.dropout == 0.4 and (tmp_path / "model.safetensors").exists()
    torch.testing.assert_close(
        again(**collate(some_rows())).logits, model(**collate(some_rows())).logits
    )


def test_it_learns_a_rule_of_the_sentence():
    """Two sentences that differ outside the aspect can be told apart only through the encoder."""
    tokenizer = some_tokenizer()
    rows = [
        {
            "encoded": encode_words(tokenizer, ["the", "menu", "is", word]),
            "aspects": [{"start": 1, "end": 2, "polarity": label}],
        }
        for label, word in enumerate(("slow", "old", "a"))
    ]
    torch.manual_seed(0)
    model = AspectPoolClassifier.from_encoder(
        some_encoder(scale=0.1), dropout=0.0, head_dropout=0.0
    ).train()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(**collate(rows)).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


# --- models with trees -------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 10**6))
def test_distances_equal_the_shortest_paths(lengths, seed):
    rng = np.random.default_rng(seed)
    trees = [random_tree(n, rng) for n in lengths]
    aspects = [sorted({int(rng.integers(n)), n // 2}) for n in lengths]
    heads = padded([tree.tolist() for tree in trees], -1)
    mask = torch.zeros(heads.shape, dtype=torch.bool)
    for row, aspect in enumerate(aspects):
        mask[row, aspect] = True
    distance = distances_to(mask, heads)
    for row, (tree, aspect) in enumerate(zip(trees, aspects, strict=True)):
        assert (distance[row, : len(tree)].numpy() == tree_distance(tree, aspect)).all()
        assert distance[row, len(tree) :].isinf().all()
    assert (adjacency_of(heads).sum((1, 2)) == 2 * (torch.tensor(lengths) - 1)).all()


def test_a_chain_is_the_distance_in_the_sentence():
    mask = torch.tensor([[0, 0, 1, 1, 0, 0, 0]]).bool()
    heads = torch.from_numpy(chain(7))[None]
    assert (
        distances_to(mask, heads).tolist()
        == sentence_distance(mask).tolist()
        == [[2, 1, 0, 0, 1, 2, 3]]
    )
    weights = proximity(sentence_distance(mask), heads >= 0, mask)
    torch.testing.assert_close(weights, torch.tensor([[0.6, 0.8, 0, 0, 0.8, 0.6, 0.4]]))


def tree_example(length, heads, aspect=(1, 2), seed=0):
    vectors = torch.randn(length, 6, generator=torch.Generator().manual_seed(seed + length))
    return {"vectors": vectors, "heads": heads, "start": aspect[0], "end": aspect[1], "polarity": 1}


@pytest.mark.parametrize("kind", [PWCN, ASGCN])
@pytest.mark.parametrize("device", DEVICES)
def test_tree_models_ignore_padding_and_direction(kind, device):
    torch.manual_seed(0)
    model, rng = kind(6, 5).eval().to(device), np.random.default_rng(0)

    def run(rows):
        return model(
            **{name: value.to(device) for name, value in collate_trees(rows).items()}
        ).logits

    rows = [tree_example(n, random_tree(n, rng)) for n in (9, 4, 2)]
    alone = torch.cat([run([row]) for row in rows])
    torch.testing.assert_close(run(rows), alone, rtol=1e-4, atol=1e-5)
    left, right = (run([tree_example(8, chain(8, side))]) for side in ("left", "right"))
    torch.testing.assert_close(left, right)
    other = run([tree_example(8, random_tree(8, rng))])
    assert not torch.allclose(left, other)
    everything = run([tree_example(2, chain(2), (0, 2))])  # nothing but the aspect
    assert everything.isfinite().all()


def test_two_lstms_equal_a_packed_bidirectional_one():
    torch.manual_seed(0)
    ours, lengths = SentenceEncoder(6, 5, dropout=0.0), torch.tensor([7, 1, 4])
    theirs = torch.nn.LSTM(6, 5, batch_first=True, bidirectional=True)
    weights = {name: value for name, value in ours.forwards.state_dict().items()}
    weights |= {f"{name}_reverse": value for name, value in ours.backwards.state_dict().items()}
    theirs.load_state_dict(weights)
    vectors, mask = torch.randn(3, 7, 6), torch.arange(7) < lengths[:, None]
    packed = torch.nn.utils.rnn.pack_padded_sequence(vectors, lengths, True, enforce_sorted=False)
    expected, _ = torch.nn.utils.rnn.pad_packed_sequence(theirs(packed)[0], batch_first=True)
    torch.testing.assert_close(ours(vectors, mask), expected)


def test_pwcn_by_its_equation():
    torch.manual_seed(0)
    model = PWCN(6, 5).eval()
    heads = np.array([2, 0, 2, 3, 0])  # the last word is connected to nothing
    row = tree_example(5, heads)
    states = model.encoder(row["vectors"][None], torch.ones(1, 5, dtype=torch.bool))
    distance = torch.tensor([1.0, 0.0, 1.0, 2.0, 2.5])
    weights = (1 - distance / 4) * torch.tensor([1.0, 0, 1, 1, 1])
    features = F.relu(model.convolution((states * weights[None, :, None]).transpose(1, 2)))
    torch.testing.assert_close(
        model(**collate_trees([row])).logits, model.classifier(features.amax(2))
    )


def test_asgcn_by_its_equation():
    torch.manual_seed(0)
    model = ASGCN(6, 5).eval()
    row = tree_example(4, np.array([2, 0, 2, 3]))
    h = model.encoder(row["vectors"][None], torch.ones(1, 4, dtype=torch.bool))[0]
    arcs = torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]])
    p = torch.tensor([2 / 3, 0.0, 2 / 3, 1 / 3])[:, None]
    x = h
    for layer in model.layers:
        x = F.relu(
            arcs @ (p * x) @ layer.weight.weight.T / (arcs.sum(1, keepdim=True) + 1) + layer.bias
        )
    alpha = (h @ x[1]).softmax(0)
    torch.testing.assert_close(model(**collate_trees([row])).logits[0], model.classifier(alpha @ h))


def test_without_arcs_a_graph_layer_is_a_network_per_word():
    layer, states = GraphLayer(4), torch.randn(2, 5, 4)
    alone = torch.stack([layer(states[:, [i]], torch.ones(2, 1, 1))[:, 0] for i in range(5)], 1)
    torch.testing.assert_close(layer(states, torch.eye(5).expand(2, 5, 5)), alone)
    torch.testing.assert_close(alone, F.relu(layer.weight(states) / 2 + layer.bias))


def test_word_vectors_are_means_of_pieces():
    model, tokenizer = some_encoder(), some_tokenizer()
    vectors = word_vectors(model, tokenizer, WORDS)
    table = model.get_input_embeddings().weight
    mean = table[[PIECES.index("print"), PIECES.index("##ers")]].mean(0)
    torch.testing.assert_close(vectors[2], F.layer_norm(mean, mean.shape).detach())
    twice = word_vectors(model, tokenizer, ["the", "menu", "the"])
    assert torch.equal(twice[0], twice[2])
    states = word_vectors(model, tokenizer, ["the", "menu", "the"], contextual=True)
    assert not torch.allclose(states[0], states[2])


# --- the paper's setting -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("roberta", dict(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)),
        ("bert", dict(vocab_size=30522)),
        ("xlm-roberta", dict(vocab_size=250002, max_position_embeddings=514, type_vocab_size=1)),
    ],
)
def test_the_papers_models_fit(family, sizes):
    """RoBERTa-base, BERT-base and XLM-R-base with the two layers on top, built without weights."""
    encoder = AutoConfig.for_model(family, **sizes).to_dict()
    with torch.device("meta"):
        model = AspectPoolClassifier(AspectPoolConfig(encoder_config=encoder, dropout=0.5))
        ids = torch.ones(2, 30, dtype=torch.long)
        aspect_mask = torch.ones(3, 30, dtype=torch.bool)
        logits = model(ids, None, aspect_mask, sentence=ids[0, :3]).logits
        assert logits.shape == (3, 3)
        assert len(transformer_layers(model.encoder)) == 12
        assert states_at(model.encoder, ids, None, 11).shape == (2, 30, 768)
    expected = {"roberta": 124_645_632, "bert": 109_482_240, "xlm-roberta": 278_043_648}[family]
    assert sum(p.numel() for p in model.encoder.parameters()) == expected
    assert model.head.hidden.weight.shape == (768, 768) and model.head.classifier.weight.shape == (
        3,
        768,
    )


def test_the_paper_preset_says_what_the_logs_say(checkout):
    cells = json.loads((checkout / "nbs/03_meaning/02_induced_trees.ipynb").read_text())["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    paper = text[text.index("PAPER = dict(") : text.index("PAPER_SETTINGS = {")]
    for setting in (
        '"FacebookAI/roberta-base"',
        "num_epochs=40",
        "batch_size=32",
        "layer=11",
        "dropout=0.5",
    ):
        assert setting in paper
    assert '"absa_trees_laptop": dict(learning_rate=2e-5, warmup_ratio=0.01)' in text
