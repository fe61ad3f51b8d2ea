"""ElasticBERT: equilibrium against separate backward passes, parity with BERT, exits, batches of pre-training, save and load."""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

from compendium.early_exit.elasticbert import (
    ElasticBertConfig,
    ElasticBertForPreTraining,
    ElasticBertForSequenceClassification,
    ElasticBertModel,
    PretrainingBatches,
    classifier_from,
    cycle_exit_groups,
    gradient_rescale,
    operate,
    pretraining_loss,
    states_at_exits,
)
from compendium.models.early_exit import (
    EntropyExit,
    FixedExit,
    PatienceExit,
    simulate_exits,
    take_exits,
)
from compendium.models.flops import transformer_flops

SIZES = dict(
    vocab_size=50, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
    intermediate_size=32, max_position_embeddings=32,
)  # fmt: skip
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def some_model(seed=0, **options):
    torch.manual_seed(seed)
    config = ElasticBertConfig(**{**SIZES, "num_labels": 3, "initializer_range": 0.3, **options})
    return ElasticBertForSequenceClassification(config).eval()


def some_batch(seed=0, rows=7, width=9, num_labels=3):
    torch.manual_seed(seed)
    lengths = torch.randint(1, width + 1, (rows,))
    lengths[0] = width
    mask = (torch.arange(width) < lengths[:, None]).long()
    labels = torch.rand(rows) if num_labels == 1 else torch.randint(0, num_labels, (rows,))
    return {
        "input_ids": torch.randint(1, 50, (rows, width)) * mask,
        "attention_mask": mask,
        "token_type_ids": (torch.arange(width) > 3).long() * mask,
        "labels": labels,
    }


def inputs(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


# --- gradient equilibrium ------------------------------------------------------------------------


@given(st.floats(-3, 3), st.booleans())
@settings(deadline=None)
def test_rescaling_changes_the_gradient_only(weight, needs_gradient):
    x = torch.tensor([0.5, -2.0], requires_grad=needs_gradient)
    y = gradient_rescale(x, weight)
    assert torch.equal(x, y)
    if needs_gradient:
        (y**2).sum().backward()
        torch.testing.assert_close(x.grad, weight * 2 * x.detach())


def backbone_and_exits(model):
    groups = {"heads": [], "layers": {0: []}}
    for name, parameter in model.named_parameters():
        if "pooler" in name or "classifiers" in name:
            groups["heads"].append(parameter)
        elif ".layer." in name:
            number = int(name.split(".layer.")[1].split(".")[0]) + 1
            groups["layers"].setdefault(number, []).append(parameter)
        else:
            groups["layers"][0].append(parameter)
    return groups


@pytest.mark.parametrize("num_labels", [1, 3])
@pytest.mark.parametrize("exits", [[1, 2, 3, 4], [2, 4], [1, 3, 4], [4]])
def test_every_layer_gets_the_mean_of_the_gradients_above_it(exits, num_labels):
    """The oracle: one backward pass for every exit, averaged by hand."""
    model = some_model(exits=exits, num_labels=num_labels, hidden_dropout_prob=0.0,
                       attention_probs_dropout_prob=0.0).double().train()  # fmt: skip
    batch, parts = some_batch(num_labels=num_labels), backbone_and_exits(model)

    def gradients(parameters, equilibrium, **options):
        model.elasticbert.config.gradient_equilibrium = equilibrium
        loss = model(**batch, **options).loss
        return torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True)

    for number, parameters in parts["layers"].items():
        separate = [gradients(parameters, False, exits=[exit]) for exit in exits]
        above = [g for exit, g in zip(exits, separate, strict=True) if exit >= max(number, 1)]
        expected = [sum(parts) / len(above) for parts in zip(*above, strict=True)]
        for found, wanted in zip(gradients(parameters, True), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)
    for found, wanted in zip(
        gradients(parts["heads"], True), gradients(parts["heads"], False), strict=True
    ):
        assert torch.equal(found, wanted)


def test_without_equilibrium_the_gradients_add_up():
    model = some_model(
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, gradient_equilibrium=False
    )
    batch, weight = some_batch(), model.elasticbert.encoder.layer[0].output.dense.weight
    whole = torch.autograd.grad(model.train()(**batch).loss, weight)[0]
    single = [torch.autograd.grad(model(**batch, exits=[e]).loss, weight)[0] for e in (1, 2, 3, 4)]
    torch.testing.assert_close(whole, sum(single))


def test_equilibrium_leaves_values_alone():
    on, off = some_model(), some_model(gradient_equilibrium=False)
    off.load_state_dict(on.state_dict())
    batch = some_batch()
    assert torch.equal(on(**batch).logits, off(**batch).logits)
    torch.manual_seed(1)
    a = on.train()(**batch).loss
    torch.manual_seed(1)
    assert torch.equal(a, off.train()(**batch).loss)


def test_layers_above_the_last_exit_are_not_run():
    def fail(hidden, mask):
        raise AssertionError("this layer must not run")

    states = states_at_exits(
        [lambda h, m: h + 1, lambda h, m: 2 * h, fail], torch.ones(2), None, [2], True
    )
    assert states[0].tolist() == [4.0, 4.0]


# --- groups --------------------------------------------------------------------------------------


def test_groups_of_the_paper():
    assert cycle_exit_groups(12, 2) == [[1, 3, 5, 7, 9, 11, 12], [2, 4, 6, 8, 10, 12]]
    large = cycle_exit_groups(24, 3)
    assert large[0] == [*range(1, 23, 3), 24] and large[1] == [*range(2, 24, 3), 24]
    assert large[2] == list(range(3, 25, 3))


@given(st.integers(1, 30), st.data())
@settings(deadline=None)
def test_groups_cover_every_layer_once(num_layers, data):
    num_groups = data.draw(st.integers(1, num_layers))
    groups = cycle_exit_groups(num_layers, num_groups)
    inner = [layer for group in groups for layer in group if layer < num_layers]
    assert sorted(inner) == list(range(1, num_layers))
    assert len(groups) == num_groups and all(group[-1] == num_layers for group in groups)


def test_batches_take_the_groups_in_turn():
    seen = []

    class Model:
        def __call__(self, exits, **batch):
            seen.append(exits)
            return type("Output", (), {"loss": torch.tensor(0.0)})

    loss = pretraining_loss([[1, 4], [2, 4], [3, 4]])
    for _ in range(7):
        loss(Model(), {})
    assert [group[0] for group in seen] == [1, 2, 3, 1, 2, 3, 1]


# --- parity with BERT ------------------------------------------------------------------------------


def test_a_single_exit_is_berts_classifier():
    torch.manual_seed(0)
    bert = BertForSequenceClassification(
        BertConfig(**SIZES, num_labels=3, initializer_range=0.3)
    ).eval()
    model = ElasticBertForSequenceClassification.from_bert(bert, num_labels=3, exits=[4]).eval()
    model.classifiers["3"].load_state_dict(bert.classifier.state_dict())
    batch = some_batch()
    for training in (False, True):
        bert.train(training), model.train(training)
        torch.manual_seed(5)
        expected = bert(**batch)
        torch.manual_seed(5)
        found = model(**batch)
        torch.testing.assert_close(found.logits[0], expected.logits)
        torch.testing.assert_close(found.loss, expected.loss)


def test_a_masked_language_model_keeps_its_scores():
    torch.manual_seed(0)
    bert = BertForMaskedLM(BertConfig(**SIZES, initializer_range=0.3)).eval()
    model = ElasticBertForPreTraining.from_bert(bert, exits=[2, 4]).eval()
    batch = some_batch()
    batch["labels"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    found = model(**batch, exits=[4])
    torch.testing.assert_close(found.mlm_losses[0], bert(**batch).loss)
    first = (model.transforms[name].state_dict() for name in "13")
    for (name, a), b in zip(next(first).items(), next(first).values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("copy_pooler", [True, False])
def test_the_pooler_is_copied_or_new(copy_pooler):
    bert = BertModel(BertConfig(**SIZES))
    model = ElasticBertModel.from_bert(bert, copy_pooler=copy_pooler)
    same = [
        torch.equal(p.dense.weight, bert.pooler.dense.weight) for p in model.encoder.pooler.values()
    ]
    assert same == [copy_pooler] * 4
    assert torch.equal(
        model.encoder.layer[2].output.dense.weight, bert.encoder.layer[2].output.dense.weight
    )


# --- static and dynamic use --------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_a_truncated_model_says_what_its_exit_says(depth):
    model, batch = some_model(), inputs(some_batch())
    short = model.truncate(depth)
    assert len(short.elasticbert.encoder.layer) == depth and short.config.exits == [depth]
    torch.testing.assert_close(short(**batch).logits[0], model(**batch).logits[depth - 1])
    assert model.config.num_hidden_layers == 4 and model.config.exits == [1, 2, 3, 4]


POLICIES = [
    EntropyExit(0.0),
    EntropyExit(0.7),
    EntropyExit(9.0),
    PatienceExit(1),
    PatienceExit(2),
    FixedExit(1),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_batched_exits_equal_one_input_at_a_time(policy, attention, device):
    model = some_model(attn_implementation=attention).to(device).double()
    batch = {name: value.to(device) for name, value in inputs(some_batch()).items()}
    found = model.early_exit(policy, **batch)
    logits = model(**batch).logits
    chosen = simulate_exits(policy, logits)
    assert torch.equal(found.exit_layer, chosen + 1)
    torch.testing.assert_close(found.logits, take_exits(logits, chosen))
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        alone = model.early_exit(policy, **{n: v[row : row + 1, :length] for n, v in batch.items()})
        assert alone.exit_layer.item() == found.exit_layer[row].item()
        torch.testing.assert_close(alone.logits[0], found.logits[row])


def test_extremes_of_the_threshold():
    model, batch = some_model(exits=[2, 3]), inputs(some_batch())
    assert (model.early_exit(EntropyExit(0.0), **batch).exit_layer == 3).all()
    left = model.early_exit(EntropyExit(1.2), **batch)
    assert (left.exit_layer == 2).all() and left.rows_per_layer == [7, 7]


def test_regression_leaves_by_patience_only():
    model, batch = some_model(num_labels=1), inputs(some_batch())
    assert (model.early_exit(PatienceExit(1, tolerance=1e9), **batch).exit_layer == 2).all()
    with pytest.raises(ValueError, match="two classes or more"):
        model.early_exit(EntropyExit(0.1), **batch)


def test_operations_of_a_policy():
    torch.manual_seed(0)
    logits, config = torch.randn(4, 200, 2), ElasticBertConfig(**SIZES)
    labels, lengths = torch.randint(0, 2, (200,)), np.random.default_rng(0).integers(1, 20, 200)

    def quality(answers):
        return float((answers.argmax(-1) == labels).float().mean())

    full = operate(EntropyExit(0.0), logits, quality, config, lengths)
    expected = transformer_flops(config, lengths, 4, [1, 2, 3, 4], 2).mean()
    assert full.flops == pytest.approx(expected) and full.quality == quality(logits[-1])
    some = operate(EntropyExit(0.6), logits, quality, config, lengths)
    random = operate(EntropyExit(0.6), logits, quality, config, lengths, np.random.default_rng(1))
    assert sorted(some.left) == sorted(random.left) and (some.left != random.left).any()
    assert some.flops < full.flops


# --- losses ------------------------------------------------------------------------------------------


def test_losses_are_weighted_sums():
    batch, weights = some_batch(), [0.1, 0.2, 0.3, 0.4]
    plain, weighted = some_model(), some_model(exit_weights=weights)
    each = [plain(**batch, exits=[e]).loss for e in (1, 2, 3, 4)]
    torch.testing.assert_close(plain(**batch).loss, sum(each))
    expected = sum(w * loss for w, loss in zip(weights, each, strict=True))
    torch.testing.assert_close(weighted(**batch).loss, expected)
    torch.testing.assert_close(weighted(**batch, exits=[3]).loss, 0.3 * each[2])


def test_more_exits_than_ninety_nine_are_possible():
    config = ElasticBertConfig(
        **SIZES | {"num_hidden_layers": 101, "hidden_size": 4, "intermediate_size": 4}
    )
    model, batch = ElasticBertForSequenceClassification(config), some_batch(rows=2, num_labels=2)
    assert len(model(**batch).logits) == 101


# --- pre-training --------------------------------------------------------------------------------------


class Tokenizer:
    mask_token_id, sep_token_id, all_special_ids = 4, 3, [0, 1, 2, 3, 4]

    def __len__(self):
        return 50


def test_segments_are_halves_in_or_out_of_order():
    blocks = [torch.tensor([2, *range(10 + i, 21 + i), 3]) for i in range(60)]
    batches = PretrainingBatches(Tokenizer(), 0.0)
    ids, types, swapped = batches.segments(torch.stack(blocks))
    assert 15 < swapped.sum() < 45
    for block, row, kind, out in zip(
        blocks, ids.tolist(), types.tolist(), swapped.tolist(), strict=True
    ):
        a, b = block[1:6].tolist(), block[6:11].tolist()
        first, second = (b, a) if out else (a, b)
        assert row == [2, *first, 3, *second, 3]
        assert kind == [0] * 7 + [1] * 6
    batch = batches(blocks)
    assert (batch["labels"] == -100).all() and torch.equal(
        batch["order_labels"].bool() | True, swapped | True
    )


@given(st.floats(0.05, 0.3), st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_hidden_ngrams_are_about_as_many_as_asked_for(rate, longest):
    hidden = PretrainingBatches(Tokenizer(), rate, longest).hidden_ngrams((300, 120)).float()
    assert 0.6 * rate < hidden.mean() < 1.05 * rate  # runs may overlap
    again = hidden[:, 1:][hidden[:, :-1].bool()].mean()
    assert again > hidden.mean() + 0.1 if longest > 1 else abs(again - rate) < 0.05


def test_hidden_tokens_and_what_is_shown():
    blocks = [torch.tensor([2, *torch.randint(5, 50, (98,)).tolist(), 3]) for _ in range(200)]
    batches = PretrainingBatches(Tokenizer(), 0.3)
    state = batches.generator.get_state()
    original, _, _ = batches.segments(torch.stack(blocks))
    batches.generator.set_state(state)
    batch = batches(blocks)
    hidden = batch["labels"] != -100
    assert torch.equal(batch["labels"][hidden], original[hidden])
    assert torch.equal(batch["input_ids"][~hidden], original[~hidden])
    assert not hidden[original < 5].any()
    shown = batch["input_ids"][hidden]
    assert (shown == 4).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (shown == original[hidden]).float().mean().item() == pytest.approx(0.102, abs=0.02)


def test_every_exit_learns_in_pretraining_and_the_embedding_is_tied():
    torch.manual_seed(0)
    model = ElasticBertForPreTraining(ElasticBertConfig(**SIZES))
    blocks = [torch.tensor([2, *torch.randint(5, 50, (14,)).tolist(), 3]) for _ in range(8)]
    batch = PretrainingBatches(Tokenizer(), 0.3)(blocks)
    output = model(**batch, exits=[1, 4])
    torch.testing.assert_close(
        output.loss.detach(), (output.mlm_losses + output.order_losses).sum()
    )
    output.loss.backward()
    assert model.order["0"].weight.grad.abs().sum() > 0 and model.order["1"].weight.grad is None
    assert model.elasticbert.embeddings.word_embeddings.weight.grad[49].abs().sum() > 0
    assert sum(p.numel() for n, p in model.named_parameters() if p.shape == (50, 16)) == 50 * 16


def test_a_classifier_takes_the_pretrained_prefix():
    pretrained = ElasticBertForPreTraining(ElasticBertConfig(**SIZES))
    model = classifier_from(pretrained, 5, 2, [2])
    assert len(model.elasticbert.encoder.layer) == 2 and model.config.num_labels == 5
    given_, taken = pretrained.state_dict(), model.state_dict()
    shared = [name for name in taken if name in given_]
    assert all(torch.equal(taken[name], given_[name]) for name in shared)
    assert set(taken) - set(shared) == {"classifiers.1.weight", "classifiers.1.bias"}


# --- the ecosystem ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("exits", [None, [2, 4]])
def test_save_and_load(tmp_path, exits):
    model, batch = some_model(exits=exits), inputs(some_batch())
    model.save_pretrained(tmp_path)
    loaded = ElasticBertForSequenceClassification.from_pretrained(tmp_path).eval()
    assert loaded.config.exits == model.config.exits
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_a_prefix_can_be_loaded_from_the_whole(tmp_path):
    model, batch = some_model(), inputs(some_batch())
    model.save_pretrained(tmp_path)
    short = ElasticBertForSequenceClassification.from_pretrained(
        tmp_path, num_hidden_layers=2, exits=[2]
    )
    torch.testing.assert_close(short.eval()(**batch).logits[0], model(**batch).logits[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    model, batch = some_model(initializer_range=0.05), some_batch()
    expected = model(**batch).logits
    found = copy.deepcopy(model).to(dtype)(**batch)
    torch.testing.assert_close(found.logits.float(), expected, atol=0.05, rtol=0.05)
    found.loss.backward()


@pytest.mark.parametrize(("size", "layers", "groups"), [("base", 12, 2), ("large", 24, 3)])
def test_the_papers_models_build_on_the_meta_device(size, layers, groups):
    """Names and shapes of the released checkpoints: `elasticbert.encoder.pooler.<layer>.dense`."""
    width = {"base": 768, "large": 1024}[size]
    config = ElasticBertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64,
        intermediate_size=4 * width, num_labels=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = ElasticBertForSequenceClassification(config)
        whole = ElasticBertForPreTraining(config)
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    assert shapes["elasticbert.embeddings.word_embeddings.weight"] == (30522, width)
    for layer in range(layers):
        assert shapes[f"elasticbert.encoder.pooler.{layer}.dense.weight"] == (width, width)
        assert shapes[f"elasticbert.encoder.layer.{layer}.intermediate.dense.weight"] == (
            4 * width,
            width,
        )
        assert shapes[f"classifiers.{layer}.weight"] == (2, width)
    assert [len(group) for group in cycle_exit_groups(layers, groups)] == {
        12: [7, 6],
        24: [9, 9, 8],
    }[layers]
    assert len(whole.transforms) == layers


def test_mistakes_are_named():
    for exits, problem in (
        ([2, 1], "ascending"),
        ([], "at least one"),
        ([0, 4], "between layer 1 and layer 4"),
        ([5], "between"),
    ):
        with pytest.raises(ValueError, match=problem):
            ElasticBertConfig(**SIZES, exits=exits)
    with pytest.raises(ValueError, match="2 exit_weights for 4 exits"):
        ElasticBertConfig(**SIZES, exit_weights=[1.0, 2.0])
    model, batch = some_model(exits=[2, 4]), inputs(some_batch())
    with pytest.raises(ValueError, match="no exit after layer 3, only after"):
        model(**batch, exits=[3])
    with pytest.raises(ValueError, match="no exit after layer 1"):
        model.truncate(1)
    for layers, groups in itertools.product((4,), (0, 5)):
        with pytest.raises(ValueError, match=f"4 layers cannot make {groups} groups"):
            cycle_exit_groups(layers, groups)
