"""MCCWS: parity with torch's Transformer and pytorch-crf, invariances, transfer that touches one vector, texts in and out."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compendium.chinese.mccws import (
    TAGS,
    AnnotatedLayerNorm,
    CriterionTokenizer,
    MultiCriteriaSegmenter,
    MultiCriteriaSegmenterConfig,
    Noam,
    NoamLR,
    ShuffledByLength,
    add_criterion,
    bigrams,
    clauses,
    convert_script,
    cut_words,
    freeze_all_but_criterion,
    length_batches,
    noam_adam,
    normalise,
    pad_batch,
    sinusoids,
    split_clauses,
    training_features,
)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SENTENCES = [
    ["王", "小明", "在", "北京", "工作", "。"],
    ["三十", "个", "学生", "，", "买", "书"],
    ["我们", "喜欢", "ＩＢＭ", "的", "3.5%", "电脑"],
    ["好"],
]
TEXTS = ["王小明在ＩＢＭ工作，他喜欢2.5元的书。", "好", "", "三十个学生！北京 大学"]
TOKENIZER = CriterionTokenizer.build(SENTENCES, min_pair_count=1)
CRITERIA = ["pku", "msr", "ctb"]


def some_config(**options):
    sizes = {
        "criteria": CRITERIA,
        "vocab_size": len(TOKENIZER.characters),
        "bigram_vocab_size": len(TOKENIZER.pairs),
        "embedding_dim": 6,
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "intermediate_size": 24,
    }
    return MultiCriteriaSegmenterConfig(**{**sizes, **options})


def some_model(seed=0, **options):
    torch.manual_seed(seed)
    return MultiCriteriaSegmenter(some_config(**options)).eval()


def some_batch(sentences=SENTENCES, criterion_ids=(0, 1, 2, 0)):
    rows = []
    for words, number in zip(sentences, criterion_ids, strict=False):
        rows += training_features([words], TOKENIZER, number)
    return pad_batch(rows)


# --- text, symbols, ids --------------------------------------------------------------------------

texts = st.text("王明在。，,:;!?“”（）ＡＢabx019５．.% 　\n", max_size=30)


@given(texts)
def test_symbols_cover_the_text(text):
    symbols, lengths = normalise(text)
    assert len(symbols) == len(lengths) and sum(lengths) == len(text)
    assert not any("a" <= c <= "z" or c in "123456789" for c in symbols)
    ends = np.cumsum([0, *lengths])
    for symbol, a, b in zip(symbols, ends[:-1], ends[1:], strict=True):
        if b - a > 1:
            assert symbol == ("0" if text[a] in "0195０１９５" else "X")
    found = clauses(symbols)
    assert "".join(symbols[a:b] for a, b in found) == symbols


@pytest.mark.parametrize(
    ("text", "symbols"),
    [
        ("ＩＢＭ２００７年", "X0年"),
        ("3.5％", "0%"),
        ("v2.0.1版", "X0版"),
        ("1,000", "0,0"),
        ("　好　", " 好 "),
        ("3.", "0."),
    ],
)
def test_normalisation_by_hand(text, symbols):
    assert normalise(text).text == symbols


def test_clauses_by_hand():
    cut = lambda text, *length: [text[a:b] for a, b in clauses(text, *length)]  # noqa: E731
    assert cut("好。”他,我") == ["好。”", "他,", "我"]
    assert cut("0,0元:0") == ["0,0元:0"]
    assert cut("一二三四五", 2) == ["一二", "三四", "五"]
    assert cut("一二。三", 3) == ["一二。", "三"]


@given(
    st.lists(st.text("王明在。，”a1", min_size=1, max_size=4), min_size=1, max_size=12),
    st.integers(1, 5),
)
def test_split_clauses_keeps_words_and_order(words, limit):
    pieces = list(split_clauses(words, limit))
    assert "".join(text for text, _ in pieces) == "".join(normalise(word).text for word in words)
    assert sum(tag in "BS" for _, tags in pieces for tag in tags) == len(words)
    assert all(1 <= sum(tag in "BS" for tag in tags) <= limit for _, tags in pieces)
    assert all(tags[0] in "BS" and tags[-1] in "ES" for _, tags in pieces)


def test_clauses_of_words_are_clauses_of_their_text():
    for words in SENTENCES:
        text = normalise("".join(words)).text
        assert [a for a, _ in split_clauses(words)] == [text[a:b] for a, b in clauses(text)]


def test_scripts_there_and_back():
    words = ["头发", "和", "出发", "干杯", "ＩＢＭ"]
    traditional = convert_script(words, "traditional")
    assert traditional == ["頭髮", "和", "出發", "乾杯", "ＩＢＭ"]
    assert convert_script(traditional, "simplified") == words
    assert convert_script([], "traditional") == []
    with pytest.raises(ValueError, match="'tradition' is unknown; did you mean 'traditional'"):
        convert_script(words, "tradition")


def test_ids_bigrams_and_padding():
    features = TOKENIZER("王小龙")
    known = TOKENIZER.character_ids
    assert features["input_ids"] == [known["王"], known["小"], 1]
    pairs = [TOKENIZER.pairs[i] for i in features["bigram_ids"]]
    assert bigrams("王小龙") == ["<s>王", "王小", "小龙", "龙</s>"]
    assert pairs == ["<s>王", "王小", "<unk>", "<unk>"]
    batch = some_batch()
    assert batch["bigram_ids"].shape[1] == batch["input_ids"].shape[1] + 1
    lengths = batch["attention_mask"].sum(1)
    for row, length in enumerate(lengths.tolist()):
        assert (batch["labels"][row, length:] == -100).all()
        assert (batch["labels"][row, :length] >= 0).all()
        assert (batch["bigram_ids"][row, length + 1 :] == 0).all()
        assert (batch["bigram_ids"][row, : length + 1] > 0).all()


def test_counts_decide_what_is_known():
    tokenizer = CriterionTokenizer.build([["书"], ["书", "看"]], min_count=2, min_pair_count=2)
    assert tokenizer.characters[2:] == ["书"] and tokenizer.pairs[2:] == ["<s>书"]


def test_tokenizer_round_trip(tmp_path):
    TOKENIZER.save_pretrained(tmp_path / "a")
    assert CriterionTokenizer.from_pretrained(tmp_path / "a") == TOKENIZER
    with pytest.raises(FileNotFoundError, match=r"criterion_tokenizer\.json is not there"):
        CriterionTokenizer.from_pretrained(tmp_path)


# --- the network ---------------------------------------------------------------------------------


def test_annotated_layer_norm_from_its_formula():
    norm, x = AnnotatedLayerNorm(5).double(), torch.randn(2, 3, 5, dtype=torch.double)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    expected = norm.weight * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(norm(x), expected + norm.bias)


def test_encoder_layer_equals_torch():
    model = some_model(layer_norm="torch")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = model.encoder.layers[0]
    theirs = nn.TransformerEncoderLayer(
        16, 2, 24, activation="relu", batch_first=True, norm_first=True
    )
    names = {"norm1": ours.attention_norm, "norm2": ours.feed_forward_norm}
    names |= {
        "linear1": ours.inner,
        "linear2": ours.outer,
        "self_attn.out_proj": ours.attention.output,
    }
    state = {
        f"{a}.{b}": value for a, module in names.items() for b, value in module.state_dict().items()
    }
    qkv = (ours.attention.query, ours.attention.key, ours.attention.value)
    state["self_attn.in_proj_weight"] = torch.cat([p.weight for p in qkv])
    state["self_attn.in_proj_bias"] = torch.cat([p.bias for p in qkv])
    theirs.load_state_dict(state)
    x, mask = torch.randn(3, 7, 16), torch.arange(7) < torch.tensor([[7], [4], [1]])
    expected = theirs.eval()(x, src_key_padding_mask=~mask)
    torch.testing.assert_close(ours(x, mask)[mask], expected[mask], rtol=1e-4, atol=1e-5)


def test_positions_from_their_formula():
    rows = sinusoids(9, 6)
    for place, k in itertools.product(range(9), range(3)):
        angle = place / 10000 ** (2 * k / 6)
        assert rows[place, 2 * k].item() == pytest.approx(math.sin(angle), abs=1e-6)
        assert rows[place, 2 * k + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_input_from_its_equation():
    """The criterion stands first, bypasses the fusion layer, and everything is scaled by √d."""
    model, batch = some_model(), some_batch()
    seen = {}
    model.encoder.layers[0].register_forward_pre_hook(lambda _, given: seen.update(x=given[0]))
    model(**batch)
    part = model.features
    characters = part.characters(batch["input_ids"])
    pairs = part.bigrams(batch["bigram_ids"])
    z = part.fusion(torch.cat([characters, pairs[:, :-1], pairs[:, 1:]], -1))
    z0 = torch.stack([model.criterion.vectors[i] for i in batch["criterion_ids"].tolist()])
    expected = 4.0 * torch.cat([z0[:, None], z], 1) + sinusoids(z.shape[1] + 1, 16)
    torch.testing.assert_close(seen["x"], expected)


def test_fusion_exists_only_where_sizes_differ():
    assert isinstance(some_model(embedding_dim=16, use_bigrams=False).features.fusion, nn.Identity)
    assert isinstance(some_model(hidden_size=24, embedding_dim=8).features.fusion, nn.Identity)
    assert some_model().features.fusion.weight.shape == (16, 18)


VARIANTS = [
    {},
    {"encoder": "bilstm"},
    {"encoder": "bilstm", "num_layers": 1, "use_crf": False},
    {"use_crf": False},
    {"use_bigrams": False},
    {"layer_norm": "torch", "embedding_std": 0.3},
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_padding_does_not_matter(options, device):
    model = some_model(**options).to(device)
    batch = {name: value.to(device) for name, value in some_batch().items()}
    whole = model(**batch)
    tags = model.decode(batch)
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        one = {"criterion_ids": batch["criterion_ids"][row : row + 1]}
        for name in ("input_ids", "attention_mask", "labels"):
            one[name] = batch[name][row : row + 1, :length]
        one["bigram_ids"] = batch["bigram_ids"][row : row + 1, : length + 1]
        alone = model(**one)
        close = dict(rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(whole.emissions[row, : length + 1], alone.emissions[0], **close)
        assert model.decode(one)[0].tolist() == tags[row, :length].tolist()


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_the_token_reaches_every_character(options):
    model, batch = some_model(**options), some_batch()
    before = model(**batch).emissions
    batch["criterion_ids"] = (batch["criterion_ids"] + 1) % 3
    moved = (model(**batch).emissions - before).abs().sum(-1)[:, 1:]
    assert (moved[batch["attention_mask"]] > 0).all()


def test_without_bigrams_they_are_not_looked_at():
    model, batch = some_model(use_bigrams=False), some_batch()
    expected = model(**batch).emissions
    del batch["bigram_ids"]
    torch.testing.assert_close(model(**batch).emissions, expected)


def test_bilstm_meets_the_token_at_both_ends():
    """With the forward direction silenced the first character still knows the criterion, from the end."""
    model = some_model(encoder="bilstm", num_layers=1)
    torch.manual_seed(1)
    z, mask = torch.randn(1, 4, 16), torch.ones(1, 4, dtype=torch.bool)
    repeated = torch.cat([z, z[:, :1]], 1)
    expected, _ = model.encoder.lstm(repeated)
    torch.testing.assert_close(model.encoder(z, mask), expected[:, :-1])


# --- the loss and the tags -----------------------------------------------------------------------


def test_loss_equals_pytorch_crf():
    torchcrf = pytest.importorskip("torchcrf")
    model, batch = some_model(), some_batch()
    nn.init.normal_(model.crf.transitions)
    output = model(**batch)
    reference = torchcrf.CRF(4, batch_first=True)
    with torch.no_grad():
        allowed = torch.tensor(
            [
                [a + b in ("BM", "BE", "MM", "ME", "EB", "ES", "SB", "SS") for b in TAGS]
                for a in TAGS
            ]
        )
        reference.transitions.copy_(torch.where(allowed, model.crf.transitions, -10000.0))
        reference.start_transitions.copy_(torch.tensor([-10000.0, -10000.0, -10000.0, 0.0]))
        # a sentence may not end inside a word
        reference.end_transitions.copy_(torch.tensor([-10000.0, -10000.0, 0.0, 0.0]))
    gold = F.pad(batch["labels"].clamp(min=0), (1, 0), value=TAGS.index("S"))
    expected = -reference(output.emissions, gold, output.mask, reduction="mean")
    torch.testing.assert_close(output.loss, expected, rtol=1e-4, atol=1e-4)
    paths = reference.decode(output.emissions, output.mask)
    ours = model.decode(batch)
    for row, path in enumerate(paths):
        assert ours[row, : len(path) - 1].tolist() == path[1:]


def test_loss_is_minus_log_of_the_share_of_the_gold_path():
    """Brute force over every well-formed path of a short clause, the criterion's own tag S included."""
    model = some_model()
    nn.init.normal_(model.crf.transitions)
    batch = pad_batch(training_features([["王", "小明"]], TOKENIZER, 1))
    output = model(**batch)
    good = {"BM", "BE", "MM", "ME", "EB", "ES", "SB", "SS"}
    scores = {}
    for path in itertools.product(range(4), repeat=4):
        letters = [TAGS[i] for i in path]
        legal = all(a + b in good for a, b in itertools.pairwise(letters))
        if legal and letters[0] == "S" and letters[-1] in "ES":
            score = sum(output.emissions[0, t, tag].item() for t, tag in enumerate(path))
            score += sum(model.crf.transitions[a, b].item() for a, b in itertools.pairwise(path))
            scores["".join(letters)] = score
    log_z = math.log(sum(map(math.exp, scores.values())))
    assert output.loss.item() == pytest.approx(log_z - scores["SSBE"], abs=1e-4)


def test_loss_without_crf_is_summed_cross_entropy():
    model, batch = some_model(use_crf=False), some_batch()
    output = model(**batch)
    logs = output.emissions.log_softmax(-1)
    total = -logs[:, 0, TAGS.index("S")].sum()
    for row, column in batch["attention_mask"].nonzero().tolist():
        total -= logs[row, column + 1, batch["labels"][row, column]]
    torch.testing.assert_close(output.loss, total / len(logs))


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_tags_are_well_formed_whatever_the_weights(seed):
    model, batch = some_model(seed), some_batch()
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=1.0)
    for row, mask in zip(model.decode(batch), batch["attention_mask"], strict=True):
        letters = "".join(TAGS[i] for i in row[mask].tolist())
        pairs = {a + b for a, b in itertools.pairwise("S" + letters)}
        assert pairs <= {"BM", "BE", "MM", "ME", "EB", "ES", "SB", "SS"} and letters[-1] in "ES"


# --- text in, words out --------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("max_tokens", [1, 30, 4096])
def test_segment_spells_the_texts(max_tokens, device):
    model = some_model().to(device)
    found = model.segment(TEXTS, TOKENIZER, "msr", max_tokens)
    assert ["".join(words) for words in found] == TEXTS and found[2] == []
    assert all(word for words in found for word in words)
    assert found == model.segment(TEXTS, TOKENIZER, ["msr"] * 4)
    assert found[::-1] == model.segment(TEXTS[::-1], TOKENIZER, "msr")


@given(st.lists(texts, max_size=4))
@settings(max_examples=30, deadline=None)
def test_segment_spells_any_text(some_texts):
    found = some_model().segment(some_texts, TOKENIZER, "pku")
    assert ["".join(words) for words in found] == some_texts


def test_one_batch_serves_several_criteria():
    model = some_model()
    for vector in model.criterion.vectors:
        nn.init.normal_(vector, std=3.0)
    mixed = model.segment(TEXTS[:1] * 3, TOKENIZER, CRITERIA)
    assert mixed == [model.segment(TEXTS[:1], TOKENIZER, name)[0] for name in CRITERIA]


def test_segment_reads_the_tags():
    model = some_model()
    wanted = ["王", "小明", "在", "ＩＢＭ", "工作", "，", "他"]
    tags = {
        "王": "S",
        "小": "B",
        "明": "E",
        "在": "S",
        "X": "S",
        "工": "B",
        "作": "E",
        ",": "S",
        "他": "M",
    }

    def decode(batch):
        symbols = [[TOKENIZER.characters[i] for i in row] for row in batch["input_ids"].tolist()]
        letters = [[tags.get(symbol, "E") for symbol in row] for row in symbols]
        return torch.tensor([[TAGS.index(letter) for letter in row] for row in letters])

    model.decode = decode
    assert model.segment(["".join(wanted)], TOKENIZER, "pku") == [wanted]


def test_segment_keeps_the_mode():
    model = some_model().train()
    found = model.segment(TEXTS, TOKENIZER, "pku")
    assert model.training and found == model.segment(TEXTS, TOKENIZER, "pku")


def test_bad_requests_are_named():
    model = some_model()
    with pytest.raises(ValueError, match="criterion 'pkuu' is unknown; did you mean 'pku'"):
        model.segment(TEXTS, TOKENIZER, "pkuu")
    with pytest.raises(ValueError, match="2 criteria for 4 texts"):
        model.segment(TEXTS, TOKENIZER, ["pku", "msr"])
    with pytest.raises(ValueError, match="give a list of texts"):
        model.segment("王小明", TOKENIZER, "pku")
    batch = some_batch()
    with pytest.raises(ValueError, match="bigram_ids have shape None"):
        model(batch["input_ids"], batch["criterion_ids"])
    for options, problem in [
        ({"encoder": "lstm"}, "encoder 'lstm' is unknown; did you mean 'bilstm'"),
        ({"criteria": ["a", "a"]}, "must be different names"),
        ({"hidden_size": 18, "num_heads": 4}, "hidden_size 18 must be a multiple"),
    ]:
        with pytest.raises(ValueError, match=problem):
            some_config(**options)


@given(st.lists(st.integers(1, 9), max_size=20), st.integers(1, 30))
def test_length_batches(lengths, max_tokens):
    batches = list(length_batches(lengths, max_tokens))
    assert sorted(itertools.chain.from_iterable(batches)) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= max_tokens


def test_cut_words():
    begins = np.array([True, False, True])
    assert cut_words("IBM好x", [3, 1, 1], begins) == ["IBM好", "x"]
    assert cut_words("", [], np.zeros(0, dtype=bool)) == []


# --- transfer ------------------------------------------------------------------------------------


def test_only_the_new_vector_moves():
    model = some_model(embedding_std=0.5).train()
    vector = add_criterion(model, "new")
    assert freeze_all_but_criterion(model, "new") is vector
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = some_batch(criterion_ids=(3, 3, 3, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    losses = []
    for _ in range(15):
        loss = model.eval()(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == {"criterion.vectors.3"}


def test_where_a_new_criterion_starts():
    model = some_model()
    known = model.criterion.matrix().clone()
    torch.testing.assert_close(add_criterion(model, "a"), known.mean(0))
    torch.testing.assert_close(add_criterion(model, "b", start="msr"), known[1])
    assert add_criterion(model, "c", start="random").shape == (16,)
    assert model.config.criteria == [*CRITERIA, "a", "b", "c"]
    torch.testing.assert_close(model.criterion.matrix()[:3], known)
    with torch.no_grad():
        model.criterion.vectors[4] += 1  # a copy, not the same vector
    torch.testing.assert_close(model.criterion.vectors[1], known[1])
    with pytest.raises(ValueError, match="'pku' exists"):
        add_criterion(model, "pku")
    with pytest.raises(ValueError, match="'means' is unknown; did you mean 'mean'"):
        add_criterion(model, "d", start="means")


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_save_and_load_with_an_added_criterion(options, tmp_path):
    model = some_model(**options)
    add_criterion(model, "new", start="random")
    model.save_pretrained(tmp_path)
    loaded = MultiCriteriaSegmenter.from_pretrained(tmp_path).eval()
    assert loaded.config.criteria == [*CRITERIA, "new"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    assert loaded.segment(TEXTS, TOKENIZER, "new") == model.segment(TEXTS, TOKENIZER, "new")


@pytest.mark.parametrize("encoder", ["transformer", "bilstm"])
def test_every_weight_is_initialised(encoder, monkeypatch):
    empty = torch.empty

    def poisoned(*size, **options):
        tensor = empty(*size, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    model = some_model(encoder=encoder)
    assert [name for name, p in model.named_parameters() if not torch.isfinite(p).all()] == []


def test_xavier_includes_tables_and_criteria():
    model = some_model(vocab_size=4000, criteria=[f"c{i}" for i in range(200)])
    weight, criteria = model.features.characters.weight, model.criterion.matrix()
    for matrix in (weight, criteria):
        bound = math.sqrt(6 / sum(matrix.shape))
        assert 0.98 * bound < matrix.abs().max() <= bound
    other = some_model(vocab_size=4000, embedding_std=0.5).features.characters.weight
    assert other.std().item() == pytest.approx(0.5, rel=0.05)


def test_the_paper_model_in_shape():
    """Eight corpora at the released sizes; weights need no memory on the meta device."""
    names = ["msra", "as", "pku", "ctb", "ckip", "cityu", "ncc", "sxu"]
    config = MultiCriteriaSegmenterConfig(
        criteria=names, vocab_size=12000, bigram_vocab_size=400000
    )
    with torch.device("meta"):
        model = MultiCriteriaSegmenter(config)
    batch = {"input_ids": (2, 50), "bigram_ids": (2, 51), "criterion_ids": (2,)}
    batch = {
        name: torch.zeros(size, dtype=torch.long, device="meta") for name, size in batch.items()
    }
    assert model.eval()(**batch).emissions.shape == (2, 51, 4)
    tables = 100 * (12000 + 400000)
    layer = 4 * (256 * 256 + 256) + 2 * 256 * 1024 + 1024 + 256 + 4 * 256
    rest = 300 * 256 + 256 + 8 * 256 + 2 * 256 + 4 * 256 + 4 + 16
    assert model.num_parameters() == tables + 6 * layer + rest


# --- the schedule and the batches ----------------------------------------------------------------


def test_noam_from_its_equation():
    schedule = Noam(hidden_size=256, factor=2.0, warmup=4000)
    rates = [schedule(t - 1) for t in range(1, 9000, 7)]
    for t, rate in zip(range(1, 9000, 7), rates, strict=True):
        assert rate == pytest.approx(2 * 256**-0.5 * min(t**-0.5, t * 4000**-1.5))
    assert (
        schedule(3999)
        == pytest.approx(2 * 256**-0.5 * 4000**-0.5)
        == pytest.approx(0.0019764, rel=1e-4)
    )
    peak = Noam.with_peak(3e-3, 64, 20)
    assert peak(19) == pytest.approx(3e-3) == max(map(peak, range(200)))
    assert Noam(64, 2.0, 20, first_step=31)(0) == Noam(64, 2.0, 20)(30)
    with pytest.raises(ValueError, match="warmup 0"):
        Noam(warmup=0)


def test_noam_as_a_scheduler():
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = noam_adam([parameter])
    assert optimizer.defaults["betas"] == (0.9, 0.98) and optimizer.defaults["eps"] == 1e-9
    schedule = Noam(16, 1.0, 5)
    scheduler = NoamLR(optimizer, schedule)
    rates = []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        parameter.grad = torch.ones(3)
        optimizer.step()
        scheduler.step()
    assert rates == [schedule(t) for t in range(8)] and np.argmax(rates) == 4


@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.integers(1, 7), st.integers(0, 5))
def test_shuffled_by_length(lengths, batch_size, seed):
    sampler = ShuffledByLength(lengths, batch_size, seed, pool=2)
    for _ in range(2):
        batches = list(sampler)
        assert sorted(itertools.chain.from_iterable(batches)) == list(range(len(lengths)))
        assert len(batches) == len(sampler) and all(len(b) <= batch_size for b in batches)
    again = ShuffledByLength(lengths, batch_size, seed, pool=2)
    assert [list(again), list(again)][1] == batches


def test_batches_hold_similar_lengths():
    lengths = np.random.default_rng(0).integers(1, 60, 2000).tolist()
    batches = list(ShuffledByLength(lengths, 32))
    waste = sum(len(b) * max(lengths[i] for i in b) for b in batches) / sum(lengths)
    assert waste < 1.15 and [sum(lengths[i] for i in b) for b in batches] != sorted(
        sum(lengths[i] for i in b) for b in batches
    )
