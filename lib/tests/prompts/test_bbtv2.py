"""BBTv2: losses and projections against formulas, the search on bowls and on small models, the meter, errors."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from compendium.data.loaders_few_shot import FEW_SHOT_TASKS
from compendium.models.prompts import SentenceEncoder
from compendium.prompts.bbtv2 import (
    BBT,
    CMAES,
    PAPER_CLOZES,
    BBTv2,
    BudgetExhausted,
    GradientTuner,
    JointSearch,
    QueryCounter,
    RandomProjection,
    RandomSampler,
    RandomSearch,
    SearchSettings,
    accuracy,
    few_shot_split,
    layer_projections,
    verbalizer_loss,
)

SEARCHES = (BBT, BBTv2, JointSearch, RandomSearch)
SMALL = {"d": 4, "n": 2, "popsize": 6, "sigma": 0.3, "alpha": 0.3, "evaluate_every": 6}


class Bowls:
    """A service whose loss is a sum of squared distances, one a layer; keeps every call."""

    def __init__(self, num_layers=3, hidden_size=4, n=2, coupling=0.0):
        self.num_layers, self.hidden_size, self.coupling = num_layers, hidden_size, coupling
        generator = torch.Generator().manual_seed(5)
        self.targets = torch.randn(num_layers, n, hidden_size, generator=generator)
        self.seen = []

    def candidates(self, batch, prompts, first_changed=0):
        self.seen.append((prompts.clone(), first_changed))
        apart = prompts - self.targets - self.coupling * prompts.roll(1, dims=1)
        distance = apart.pow(2).sum((1, 2, 3))
        scores = torch.stack([-distance, torch.zeros_like(distance)], dim=-1)
        return scores[:, None].expand(-1, len(batch["labels"]), -1)

    def __call__(self, batch, deep_prompt):
        found = self.candidates(batch, deep_prompt[None])[0]
        self.seen.pop()
        return found

    def activation_stds(self, batch):
        return [1.0] * self.num_layers


def toy(count=3):
    ids = torch.ones(count, 5, dtype=torch.long)
    labels = torch.zeros(count, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": ids, "labels": labels}


def encoder(seed=0, **options):
    """A random sentence encoder of three layers with four labels, and a batch for it."""
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
    )
    vectors = F.normalize(torch.randn(4, 16), dim=-1)
    ids = torch.randint(3, 60, (12, 9))
    mask = torch.ones_like(ids)
    mask[::2, 7:] = 0
    labels = torch.arange(12) % 4
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return SentenceEncoder(transformers.BertModel(config), vectors, **options), batch


# --- loss ----------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 5), st.sampled_from([(), (3,), (2, 3)]))
def test_losses_equal_torch(seed, num_labels, leading):
    torch.manual_seed(seed)
    scores = 3 * torch.randn(*leading, 7, num_labels)
    labels = torch.randint(num_labels, (7,))
    ce, hinge = (verbalizer_loss(scores, labels, kind) for kind in ("ce", "hinge"))
    assert ce.shape == hinge.shape == leading
    for index in itertools.product(*map(range, leading)):
        torch.testing.assert_close(ce[index], F.cross_entropy(scores[index], labels))
        reference = torch.nn.MultiMarginLoss(margin=2.0)(scores[index], labels)
        torch.testing.assert_close(hinge[index], num_labels * reference)


def test_unknown_loss_is_named():
    with pytest.raises(ValueError, match="loss 'hing' is unknown; did you mean 'hinge'"):
        verbalizer_loss(torch.zeros(2, 2), torch.zeros(2, dtype=torch.long), "hing")


# --- projections ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_first_prompts_have_the_scale_of_the_activations(kind):
    alpha, sigma_z, sigma_hat = 0.4, 0.2, 2.5
    generator, rng = torch.Generator().manual_seed(1), np.random.default_rng(1)
    projection = RandomProjection.from_stats(
        80, 10, 64, alpha, sigma_z, sigma_hat, generator=generator, kind=kind
    )
    found = projection(sigma_z * rng.standard_normal((300, 80)))
    assert found.shape == (300, 10, 64)
    assert float(found.std()) == pytest.approx(alpha * sigma_hat, rel=0.02)
    assert (projection.matrix.abs().max() < 2 * projection.matrix.std()) == (kind == "uniform")


def test_projection_is_linear_and_repeatable():
    def make(seed, **options):
        return RandomProjection(6, 2, 4, 0.5, torch.Generator().manual_seed(seed), **options)

    z = np.random.default_rng(0).standard_normal((3, 6))
    a, b = make(0), make(0)
    torch.testing.assert_close(a(z), b(z), rtol=0, atol=0)
    torch.testing.assert_close(a(z[:1] + z[1:2]), a(z[:1]) + a(z[1:2]))
    assert not torch.equal(a(z), make(1)(z))
    assert make(0, dtype=torch.bfloat16)(z).dtype == torch.float32
    with pytest.raises(ValueError, match="projection 'gauss' is unknown"):
        make(0, kind="gauss")


def test_projections_of_layers_follow_their_scales():
    for kind in ("normal", "uniform"):
        options = SearchSettings(d=100, n=8, projection=kind, alpha=0.5, sigma=0.2)
        found = layer_projections(options, 64, [0.1, 1.0, 4.0])
        stds = [float(projection.matrix.std()) for projection in found]
        scaled = [0.5 * std / (10 * 0.2) for std in (0.1, 1.0, 4.0)]
        plain = [1 / math.sqrt(300)] * 3  # of a uniform number in ±1/10
        assert stds == pytest.approx(scaled if kind == "normal" else plain, rel=0.02)
    options = SearchSettings(d=100, n=8, alpha=0.5, input_alpha=7.0, sigma=0.2)
    stds = [
        float(projection.matrix.std()) for projection in layer_projections(options, 64, [0.1, 1.0])
    ]
    assert stds == pytest.approx([7.0 * 0.1 / 2, 0.5 / 2], rel=0.03)
    assert found[0].matrix.abs().max() <= 0.1 + 1e-6


# --- samplers ------------------------------------------------------------------------------------


def test_cma_has_a_generator_of_its_own():
    np.random.seed(3)  # noqa: NPY002
    expected = np.random.random(4)  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    first, second = CMAES(5, 0.3, 8, seed=[0, 1]), CMAES(5, 0.3, 8, seed=[0, 1])
    other = CMAES(5, 0.3, 8, seed=[0, 2])
    for _ in range(3):
        a = first.ask()
        c = other.ask()
        b = second.ask()
        assert np.array_equal(a, b) and not np.array_equal(a, c)
        for search, z in ((first, a), (second, b), (other, c)):
            search.tell(z, (z**2).sum(1))
    assert np.array_equal(np.random.random(4), expected)  # noqa: NPY002


def test_samplers_start_from_the_same_gaussian():
    for search in (CMAES(40, 0.3, 400, seed=1), RandomSampler(40, 0.3, 400, seed=1)):
        z = search.ask()
        assert z.shape == (400, 40) and z.std() == pytest.approx(0.3, rel=0.02)
    assert len(CMAES(20, 0.3, 0, seed=1).ask()) == 4 + int(3 * math.log(20))
    assert np.abs(CMAES(20, 3.0, 50, seed=1, bounds=(-1, 1)).ask()).max() <= 1


def test_best_is_best_ever():
    for search in (CMAES(3, 0.3, 6, seed=1), RandomSampler(3, 0.3, 6, seed=1)):
        seen = []
        for _ in range(5):
            z = search.ask()
            losses = np.random.default_rng(len(seen)).random(6)
            search.tell(z, losses)
            seen += list(zip(losses, z, strict=True))
            loss, best = min(seen, key=lambda pair: pair[0])
            assert search.best_loss == loss and np.array_equal(search.best, best)


# --- the search ----------------------------------------------------------------------------------


def test_one_layer_makes_all_of_them_bbt():
    found = [
        kind(Bowls(1), budget=90, **SMALL).fit(toy(), toy()) for kind in (BBT, BBTv2, JointSearch)
    ]
    for other in found[1:]:
        assert other.history_ == found[0].history_
        assert torch.equal(other.prompt_, found[0].prompt_)


@pytest.mark.parametrize("reevaluate", [False, True])
def test_alternation_reaches_the_bottom_of_every_bowl(reevaluate):
    start = float(Bowls().targets.pow(2).sum())
    options = SMALL | {"d": 8, "reevaluate": reevaluate}
    found = BBTv2(Bowls(), budget=3 * 6 * 90, **options).fit(toy())
    left = (found.incumbent - Bowls().targets).pow(2).sum((1, 2))
    assert left.max() < 0.02 * start
    bbt = BBT(Bowls(), budget=3 * 6 * 90, **options).fit(toy())
    left = (bbt.incumbent - Bowls().targets).pow(2).sum((1, 2))
    assert left[0] < 0.02 * start and torch.equal(bbt.incumbent[1:], torch.zeros(2, 2, 4))


@pytest.mark.parametrize("kind", SEARCHES)
@pytest.mark.parametrize("budget", [18, 50, 72])
def test_calls_are_whole_rounds_within_the_budget(kind, budget):
    lm = Bowls()
    found = kind(lm, budget=budget, **SMALL).fit(toy())
    blocks = len(found.blocks())
    assert found.num_calls_ == budget // (6 * blocks) * 6 * blocks
    assert sum(len(prompts) for prompts, _ in lm.seen) == found.num_calls_
    assert [first for _, first in lm.seen] == [
        found.blocks()[turn % blocks][0] for turn in range(len(lm.seen))
    ]


def test_a_turn_changes_its_layer_only():
    lm = Bowls()
    BBTv2(lm, budget=72, **SMALL).fit(toy())
    for prompts, layer in lm.seen:
        others = [index for index in range(3) if index != layer]
        assert (prompts[:, others] == prompts[:1, others]).all()
        assert not (prompts[1:, layer] == prompts[:1, layer]).all()
    first_samples = [prompts[:, layer] for prompts, layer in lm.seen[:3]]
    assert not torch.allclose(first_samples[0], first_samples[1])


def test_stale_incumbents_are_measured_again():
    """With coupled layers the best ever may be worse now; measured again the incumbent is never worse than the generation."""
    for reevaluate in (False, True):
        lm = Bowls(coupling=0.9)
        found = BBTv2(lm, budget=400, reevaluate=reevaluate, **SMALL).fit(toy())
        single = sum(len(prompts) == 1 for prompts, _ in lm.seen)
        assert (single > 0) == reevaluate and found.num_calls_ <= 400
        turns = [(p, layer) for p, layer in lm.seen if len(p) > 1]
        worse = 0
        for (prompts, _), (later, layer) in itertools.pairwise(turns):
            before = lm.candidates(toy(), prompts)[:, 0, 0].max()
            chosen = later[:1].clone()
            chosen[:, layer] = prompts[:1, layer]
            worse += bool(lm.candidates(toy(), chosen)[0, 0, 0] < before - 1e-4)
        assert (worse == 0) == reevaluate


@pytest.mark.parametrize("select", ["candidate", "incumbent"])
def test_development_set_chooses(select):
    lm = Bowls()
    dev = toy(4)
    scores = []

    def metric(labels, predictions):
        scores.append(float(len(scores) >= 2))  # the third look is the first of the best
        return scores[-1]

    options = SMALL | {"evaluate_every": 8}
    found = BBT(lm, budget=48, select=select, metric=metric, **options).fit(toy(), dev)
    looks = [entry["calls"] for entry in found.history_ if "dev" in entry]
    if select == "candidate":
        assert looks == [8, 16, 24, 32, 40, 48]
        everything = torch.cat([prompts for prompts, _ in lm.seen])
        assert torch.equal(found.prompt_, everything[23])
    else:
        assert looks == [12, 18, 24, 36, 42, 48]
    assert found.dev_score_ == 1.0


def test_best_loss_never_rises_and_is_logged():
    rows = []
    found = BBTv2(Bowls(), budget=144, **SMALL).fit(
        toy(), toy(), log=lambda **row: rows.append(row)
    )
    best = [row["best"] for row in found.history_ if "best" in row]
    assert rows == found.history_ and best == sorted(best, reverse=True)
    assert best[-1] == found.best_loss_


def test_same_seed_same_history():
    results = [
        BBTv2(*pair[:1], budget=72, seed=seed, **SMALL).fit(pair[1], pair[1]).history_
        for seed, pair in ((0, encoder()), (0, encoder()), (1, encoder()))
    ]
    assert results[0] == results[1] != results[2]


# --- with a model --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SEARCHES)
def test_no_gradient_anywhere(kind):
    lm, batch = encoder()
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    found = kind(lm, budget=36, **SMALL).fit(batch, batch)
    assert all(p.grad is None and not p.requires_grad for p in lm.model.parameters())
    assert all(torch.equal(v, before[name]) for name, v in lm.model.state_dict().items())
    assert not found.prompt_.requires_grad and found.prompt_.shape == (3, 2, 16)
    assert found.score(batch) == found.dev_score_


def test_batched_and_single_calls_find_the_same():
    """Groups of candidates, and one candidate at a time through the plain forward."""

    class Plain(SentenceEncoder):
        resumable = False

    found = []
    for kind, max_tokens in ((SentenceEncoder, 2**15), (SentenceEncoder, 1), (Plain, 1)):
        lm, batch = encoder(max_tokens=max_tokens)
        lm.__class__ = kind
        found.append(BBTv2(lm, budget=72, **SMALL).fit(batch, batch))
    for other in found[1:]:
        losses = [[row["loss"] for row in f.history_ if "loss" in row] for f in (found[0], other)]
        np.testing.assert_allclose(*losses, rtol=1e-4)


def test_it_beats_random_search():
    losses = {kind: kind(Bowls(), budget=360, **SMALL).fit(toy()).best_loss_ for kind in SEARCHES}
    assert max(losses[BBTv2], losses[JointSearch]) < 0.5 * losses[RandomSearch]


def test_gradients_as_a_reference():
    lm, batch = encoder()
    manual = verbalizer_loss(lm(batch), batch["labels"]).item()
    options = SearchSettings(n=2, budget=90, evaluate_every=9)
    found = GradientTuner(lm, options, 3e-2).fit(batch, batch)
    assert found.num_calls_ == 90 and found.best_loss_ < 0.7 * manual
    assert found.history_[0]["loss"] == pytest.approx(manual, rel=1e-4)
    assert all(p.grad is None and not p.requires_grad for p in lm.model.parameters())
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    full = GradientTuner(lm, options, 1e-2, full=True).fit(batch, batch)
    assert (
        full.score(batch)
        == full.dev_score_
        >= accuracy(batch["labels"].numpy(), lm(batch).argmax(1).numpy()) - 1e-6
    )
    assert any(not torch.equal(v, before[name]) for name, v in lm.model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in lm.model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_finds_what_cpu_finds():
    losses = []
    for place in ("cpu", "cuda"):
        lm, batch = encoder()
        lm.model.to(place)
        losses.append(BBTv2(lm, budget=36, **SMALL).fit(batch, batch).best_loss_)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# --- the meter, the split, the paper's settings --------------------------------------------------


def test_the_meter_refuses_what_is_over_the_budget():
    counter = QueryCounter(Bowls(), toy(), budget=5)
    counter(torch.zeros(3, 3, 2, 4))
    assert (counter.calls, counter.left) == (3, 2)
    with pytest.raises(BudgetExhausted, match="3 calls wanted, 2 of 5 left"):
        counter(torch.zeros(3, 3, 2, 4))
    assert counter.calls == 3


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=60, max_size=120), st.integers(1, 4), st.integers(0, 9))
def test_split_is_balanced_and_disjoint(labels, k, seed):
    labels = np.array(labels)
    if np.bincount(labels, minlength=1)[np.unique(labels)].min() < 2 * k:
        with pytest.raises(ValueError, match=f"k={k} needs {2 * k}"):
            few_shot_split(labels, k, seed)
        return
    parts = few_shot_split(labels, k, seed)
    assert not set(parts[0]) & set(parts[1])
    for part in parts:
        assert len(set(part)) == len(part)
        assert (np.unique(labels[part], return_counts=True)[1] == k).all()
    assert np.array_equal(parts[0], few_shot_split(labels, k, seed)[0])


def test_the_papers_settings():
    """RoBERTa-large: 24 layers, 50 x 1024 numbers a layer, 16 rounds; 12,000 numbers are tuned."""
    options = SearchSettings()
    assert (options.d, options.n, options.popsize, options.budget) == (500, 50, 20, 8000)
    small = {"hidden_size": 4, "n": 50}
    lm = Bowls(24, **small)
    found = BBTv2(lm, d=6, budget=8000, evaluate_every=1000).fit(toy(1))
    assert found.num_calls_ == 16 * 24 * 20 and 24 * options.d == 12_000
    with torch.device("meta"):
        generator = torch.Generator()
        matrix = torch.empty(50 * 1024, 500)
    assert 24 * matrix.numel() == 614_400_000 and generator is not None


def test_clozes_have_a_word_for_each_label():
    assert set(PAPER_CLOZES) == set(FEW_SHOT_TASKS)
    for task, cloze in PAPER_CLOZES.items():
        assert len(cloze.words) == len(FEW_SHOT_TASKS[task].labels)
        assert "{mask}" in cloze.pattern and "{text}" in cloze.pattern
        assert ("{pair}" in cloze.pattern) == (FEW_SHOT_TASKS[task].num_texts == 2)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="popsize=1 leaves nothing to compare"):
        SearchSettings(popsize=1)
    with pytest.raises(ValueError, match="did you mean 'candidate'"):
        SearchSettings(select="candidat")
    with pytest.raises(ValueError, match="budget=17 is less than one round of 18 calls"):
        BBTv2(Bowls(), budget=17, **SMALL).fit(toy())
    with pytest.raises(TypeError):
        BBTv2(Bowls(), dimension=3)
