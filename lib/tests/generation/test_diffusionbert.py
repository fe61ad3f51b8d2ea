"""DiffusionBERT: schedules and losses against explicit D3PM, the bounds by enumeration, sampling against the model's own probabilities."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from compendium.generation.diffusionbert import (
    MODES,
    TIME_MODES,
    AbsorbingSchedule,
    DiffusionBertConfig,
    DiffusionBertForMaskedDiffusion,
    DiffusionCollator,
    bert_mouth_sample,
    blank,
    corrupt,
    diffusion_sample,
    draw,
    elbo,
    frame,
    kl_terms,
    noise,
    perplexity,
    reverse_log_probs,
    reverse_step,
    spindle_offsets,
    time_waves,
    token_scores,
)

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
COUNTS = torch.tensor([500.0, 120, 40, 3, 0, 60])
TOKENIZER = SimpleNamespace(cls_token_id=1, sep_token_id=2, pad_token_id=0, mask_token_id=3)
SIZES = dict(
    vocab_size=30,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=32,
    mask_token_id=3,
    num_steps=8,
)


def some_model(seed=0, **options):
    torch.manual_seed(seed)
    return DiffusionBertForMaskedDiffusion(DiffusionBertConfig(**{**SIZES, **options})).eval()


def some_batch(device="cpu"):
    batch = frame([[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15]], TOKENIZER)
    return {name: value.to(device) for name, value in batch.items()}


# --- the schedule --------------------------------------------------------------------------------


def test_base_schedule_is_a_straight_line_with_d3pms_rates():
    schedule, product = AbsorbingSchedule(20), 1.0
    for t in range(1, 21):
        product *= 1 - 1 / (20 - t + 1)
        assert float(schedule.alpha_bar(t)) == pytest.approx(product, abs=1e-6)
        assert float(schedule.posterior_weight(t)) == pytest.approx(1 / t, rel=1e-5)
        assert float(schedule.posterior_weight(t, released=True)) == pytest.approx(1 / t, rel=1e-5)
    assert float(schedule.posterior_weight(8, 4)) == pytest.approx(0.5)


offset_values = st.floats(-3, 5, allow_nan=False, width=32)


@settings(deadline=None, max_examples=30)
@given(st.floats(0.0, 2.0), offset_values)
def test_bent_schedules_fall_and_keep_their_ends(lam, offset):
    schedule = AbsorbingSchedule(64, lam, COUNTS)
    kept = schedule.alpha_bar(torch.arange(65)[:, None], torch.tensor([offset]))
    assert kept[0] == 1 and kept[-1] == 0
    assert (kept[1:] - kept[:-1]).max() <= 1e-6


@settings(deadline=None, max_examples=30)
@given(st.floats(0.0, 2.0), offset_values, st.sampled_from([1, 2, 8, 64]))
def test_exact_weights_sum_to_one_for_every_token(lam, offset, stride):
    schedule, d = AbsorbingSchedule(64, lam, COUNTS), torch.tensor([offset])
    t = torch.arange(stride, 65, stride)[:, None]
    weights = schedule.posterior_weight(t, stride, d)
    assert (weights >= -1e-6).all() and (weights <= 1 + 1e-5).all()
    total = ((1 - schedule.alpha_bar(t, d)) * weights).sum()
    assert float(total) == pytest.approx(1, abs=1e-4)


def test_released_weights_do_not_sum_to_one():
    schedule, d = AbsorbingSchedule(2048, 0.3, COUNTS), torch.tensor([-0.5, -0.3, 0.2])
    for stride, expected in ((1, (0.72, 0.83, 1.11)), (16, (0.74, 0.84, 1.10))):
        t = torch.arange(stride, 2049, stride)[:, None]
        weights = schedule.posterior_weight(t, stride, d, released=True)
        total = ((1 - schedule.alpha_bar(t, d)) * weights).sum(0)
        assert total.tolist() == pytest.approx(expected, abs=0.006)


def test_without_lambda_offsets_do_nothing():
    schedule = AbsorbingSchedule(16, 0.0, COUNTS)
    t, d = torch.arange(17)[:, None], torch.tensor([-2.0, 1.0])
    torch.testing.assert_close(schedule.alpha_bar(t, d), AbsorbingSchedule(16).alpha_bar(t))
    assert schedule.offsets(torch.tensor([[1, 2]]), torch.ones(1, 2)) is None
    assert schedule.table() is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_steps=0), "num_steps=0: give at least 1"),
        (dict(num_steps=4, lam=-1.0), "lam=-1.0"),
        (dict(num_steps=4, lam=0.3), "lam=0.3 needs counts"),
        (dict(num_steps=4, lam=0.3, counts=COUNTS, form="entropi"), "did you mean 'entropy'"),
    ],
)
def test_impossible_schedules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AbsorbingSchedule(**arguments)


# --- offsets -------------------------------------------------------------------------------------


def test_offsets_are_their_formulas():
    ids = torch.tensor([[0, 3, 1, 5, 0], [4, 4, 2, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    c, total = COUNTS.tolist(), float(COUNTS.sum())
    u = [math.log(1 + x) / math.log(501) for x in c]
    h = [-math.log((x + 1) / (total + 6)) for x in c]
    mean = {
        "logfreq": sum(n * x for n, x in zip(c, u, strict=True)) / total,
        "entropy": sum(n * x for n, x in zip(c, h, strict=True)) / total,
    }
    for form, scores in (("logfreq", u), ("entropy", h)):
        found = spindle_offsets(ids, COUNTS, form, "sentence", mask)
        corpus = spindle_offsets(ids, COUNTS, form, "corpus", mask)
        for row in range(2):
            real = [scores[i] for i, m in zip(ids[row], mask[row], strict=True) if m]
            center = sum(real) / len(real)
            for place, value in enumerate(real):
                pair = (value - center, value - mean[form])
                if form == "entropy":
                    pair = (center / value - 1, mean[form] / value - 1)
                assert float(found[row, place]) == pytest.approx(pair[0], abs=1e-5)
                assert float(corpus[row, place]) == pytest.approx(pair[1], abs=1e-5)
        assert (found[1, 3:] == 0).all()


@pytest.mark.parametrize("form", ["entropy", "logfreq"])
def test_the_spindle_keeps_information_or_count_on_the_line(form):
    counts = torch.tensor([40.0, 30, 20, 10, 25])
    ids, t = torch.tensor([0, 4, 2, 3, 3, 1, 0]), torch.arange(33)[:, None]
    schedule = AbsorbingSchedule(32, 0.1, counts, form, ceiling=1.0)
    kept = schedule.alpha_bar(t, schedule.offsets(ids, None))
    share = token_scores(counts, "entropy")[ids] if form == "entropy" else torch.ones(7)
    torch.testing.assert_close((kept * share).sum(1) / share.sum(), 1 - t[:, 0] / 32)


@pytest.mark.parametrize("form", ["entropy", "logfreq"])
def test_informative_tokens_go_first(form):
    schedule = AbsorbingSchedule(32, 0.3, COUNTS, form)
    kept = schedule.alpha_bar(16, schedule.offsets(torch.tensor([0, 1, 2, 3]), None))
    assert (kept[:-1] > kept[1:]).all()


def test_unknown_forms_and_centers_are_named():
    with pytest.raises(ValueError, match="form 'count' is unknown"):
        token_scores(COUNTS, "count")
    with pytest.raises(ValueError, match="center 'sentense' is unknown; did you mean 'sentence'"):
        spindle_offsets(torch.tensor([1]), COUNTS, center="sentense")


# --- noise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_corruption_has_the_right_rate_and_spares_the_frame(device):
    batch = {name: value.repeat(2000, 1) for name, value in some_batch(device).items()}
    alpha = torch.tensor([0.9, 0.8, 0.3, 0.5, 0.6, 0.1, 0.7], device=device)
    generator = torch.Generator().manual_seed(0)
    shown = corrupt(batch["input_ids"], alpha, batch["noised"], 3, generator)
    assert (shown == batch["input_ids"])[~batch["noised"]].all()
    for place in (1, 2):
        rate = (shown[:, place] != 3).float().mean()
        assert float(rate) == pytest.approx(float(alpha[place]), abs=0.02)


def test_noise_gives_the_loss_what_it_needs():
    schedule, batch = AbsorbingSchedule(8, 0.3, torch.arange(30.0)), some_batch()
    t = torch.tensor([1, 4, 8])
    for mode in MODES:
        found = noise(batch, schedule, t, 3, mode=mode, generator=torch.Generator().manual_seed(1))
        masked = (found["input_ids"] == 3) & batch["noised"]
        assert masked[2].sum() == 5  # at T everything
        assert ((found["weights"] > 0) <= masked).all()
        assert (found["labels"][batch["noised"]] == batch["input_ids"][batch["noised"]]).all()
        assert (found["labels"][~batch["noised"]] == -100).all()
        assert ("rates" in found) == (mode == "valid")
    chosen = found["rates"].gather(1, batch["input_ids"])
    torch.testing.assert_close(found["weights"][masked], chosen[masked])
    with pytest.raises(ValueError, match="mode 'exakt' is unknown; did you mean 'exact'"):
        noise(batch, schedule, t, 3, mode="exakt")


def test_collator_draws_times_as_told():
    rows = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]] * 4
    one = DiffusionCollator(AbsorbingSchedule(16), TOKENIZER, time_per="batch", seed=3)
    times = [one(rows)["timesteps"] for _ in range(60)]
    assert all(len(t.unique()) == 1 for t in times)
    assert {int(t[0]) for t in times} >= {1, 16} and max(int(t.max()) for t in times) == 16
    spread = DiffusionCollator(AbsorbingSchedule(16), TOKENIZER, seed=3)
    assert sorted(spread(rows)["timesteps"].tolist()) == list(range(1, 17))
    again = DiffusionCollator(AbsorbingSchedule(16), TOKENIZER, seed=3)
    assert torch.equal(
        again(rows)["input_ids"],
        DiffusionCollator(AbsorbingSchedule(16), TOKENIZER, seed=3)(rows)["input_ids"],
    )
    with pytest.raises(ValueError, match="time_per 'batsh' is unknown"):
        DiffusionCollator(AbsorbingSchedule(4), TOKENIZER, time_per="batsh")


# --- the loss against D3PM with transition matrices ----------------------------------------------


def matrices(schedule, vocab_size, mask):
    """Q_t and its products for the base schedule."""
    products, one_step = [torch.eye(vocab_size, dtype=torch.float64)], []
    for t in range(1, schedule.num_steps + 1):
        beta = 1 / (schedule.num_steps - t + 1)
        q = (1 - beta) * torch.eye(vocab_size, dtype=torch.float64)
        q[:, mask] += beta
        q[mask] = 0
        q[mask, mask] = 1
        one_step.append(q)
        products.append(products[-1] @ q)
    return one_step, products


def test_collapsed_loss_is_the_divergence_of_d3pm():
    vocab, mask, schedule = 7, 6, AbsorbingSchedule(9)
    one_step, products = matrices(schedule, vocab, mask)
    torch.manual_seed(0)
    for t in range(1, 10):
        logits = torch.randn(vocab)
        logits[mask] = -torch.inf
        f = logits.double().softmax(0)
        for x0 in range(vocab - 1):
            for xt in (x0, mask):
                posterior = one_step[t - 1][:, xt] * products[t - 1] / products[t][:, xt, None]
                posterior = posterior.nan_to_num(0.0, posinf=0.0)  # row v: q(. | x_t, x_0 = v)
                q = posterior[x0]
                p = f @ posterior if xt == mask else q  # a visible token stays
                kl = (torch.special.xlogy(q, q) - torch.special.xlogy(q, p)).nan_to_num(0.0).sum()
                weight = schedule.posterior_weight(t).reshape(1)
                found, nll = kl_terms(logits[None], torch.tensor([x0]), weight, mask)
                expected = float(found) if xt == mask else 0.0
                assert float(kl) == pytest.approx(expected, abs=1e-5)
                assert float(nll) == pytest.approx(-math.log(float(f[x0])), rel=1e-5)


def test_divergence_with_rates_is_the_explicit_one():
    torch.manual_seed(1)
    logits, rates, targets = torch.randn(40, 6), torch.rand(40, 6), torch.randint(5, (40,))
    f = logits.index_fill(1, torch.tensor([5]), -torch.inf).softmax(-1)
    p = f * rates
    p[:, 5] = 1 - p[:, :5].sum(1)
    weights = rates[torch.arange(40), targets]
    q = F.one_hot(targets, 6) * weights[:, None]
    q[:, 5] = 1 - weights
    explicit = (torch.special.xlogy(q, q) - torch.special.xlogy(q, p)).sum(1)
    torch.testing.assert_close(kl_terms(logits, targets, weights, 5, rates)[0], explicit)


def test_divergence_and_its_gradient_stay_finite_at_the_last_step():
    logits = torch.randn(4, 6, requires_grad=True)
    kl, _ = kl_terms(logits, torch.arange(4), torch.ones(4), 5, torch.ones(4, 6))
    kl.sum().backward()
    assert torch.isfinite(kl).all() and torch.isfinite(logits.grad).all()
    torch.testing.assert_close(kl, kl_terms(logits, torch.arange(4), torch.ones(4), 5)[0])


# --- the model -----------------------------------------------------------------------------------


def plain_bert():
    torch.manual_seed(0)
    sizes = {k: v for k, v in SIZES.items() if k not in ("mask_token_id", "num_steps")}
    return BertForMaskedLM(BertConfig(**sizes)).eval()


def test_a_checkpoint_of_bert_loads_and_predicts_the_same(tmp_path):
    plain, batch = plain_bert(), some_batch()
    plain.save_pretrained(tmp_path)
    config = DiffusionBertConfig.from_pretrained(tmp_path, mask_token_id=3)
    model = DiffusionBertForMaskedDiffusion.from_pretrained(tmp_path, config=config).eval()
    inputs = dict(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits)
    at = batch["noised"]
    torch.testing.assert_close(model(**inputs, positions=at).logits, plain(**inputs).logits[at])


@pytest.mark.parametrize("time_mode", ["layer", "prefix"])
def test_time_is_heard_and_padding_is_not(time_mode):
    model, batch = some_model(time_mode=time_mode), some_batch()
    inputs = dict(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    early, late = (model(**inputs, timesteps=torch.full((3,), t)).logits for t in (1, 7))
    assert early.shape == (3, 7, 30)
    assert (early - late).abs().max() > 1e-4
    short = {name: value[1:2, :4] for name, value in inputs.items()}
    alone = model(**short, timesteps=torch.tensor([7])).logits
    torch.testing.assert_close(alone[0], late[1, :4], rtol=1e-4, atol=1e-5)


def test_lte_that_starts_at_zero_is_the_model_without_time():
    plain, timed = some_model(), some_model(time_mode="layer", time_init="zero")
    missing, unexpected = timed.load_state_dict(plain.state_dict(), strict=False)
    assert missing and not unexpected and all(".time." in name for name in missing)
    ids, t = some_batch()["input_ids"], torch.tensor([1, 5, 8])
    torch.testing.assert_close(timed(ids, timesteps=t).logits, plain(ids).logits)
    normal = some_model(time_mode="layer")
    normal.load_state_dict(plain.state_dict(), strict=False)
    assert (normal(ids, timesteps=t).logits - plain(ids).logits).abs().max() > 1e-4


def test_time_waves_are_cosines_then_sines():
    waves = time_waves(torch.tensor([1, 4]), 6, 1000)
    for row, t in enumerate((0, 3)):
        angles = [t * 1000 ** (-i / 3) for i in range(3)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        assert waves[row].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("hybrid", [0.0, 0.01])
def test_pieces_give_the_same_loss_and_gradients(device, mode, hybrid):
    schedule = AbsorbingSchedule(8, 0.3, torch.arange(30.0))
    noisy = noise(
        some_batch(device), schedule, torch.tensor([3, 6, 8]), 3, mode=mode,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    results = []
    for rows in (0, 2):
        model = some_model(hybrid_weight=hybrid, rows_per_chunk=rows).to(device)
        loss = model(**noisy).loss
        loss.backward()
        results.append((loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(results[0][0], results[1][0])
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_loss_is_divergence_plus_hybrid_term():
    model, schedule = some_model(hybrid_weight=0.1), AbsorbingSchedule(8)
    noisy = noise(
        some_batch(),
        schedule,
        torch.tensor([3, 6, 8]),
        3,
        generator=torch.Generator().manual_seed(0),
    )
    logits = model(noisy["input_ids"], noisy["attention_mask"]).logits
    logits[..., 3] = -torch.inf
    nll = F.cross_entropy(logits.transpose(1, 2), noisy["labels"], reduction="none")
    expected = (noisy["weights"] * nll).sum() + 0.1 * nll.sum()
    torch.testing.assert_close(model(**noisy).loss, expected / 3)


@pytest.mark.parametrize("time_mode", TIME_MODES)
def test_save_and_load(tmp_path, time_mode):
    model = some_model(time_mode=time_mode, lam=0.5)
    model.save_pretrained(tmp_path)
    again = DiffusionBertForMaskedDiffusion.from_pretrained(tmp_path).eval()
    assert (again.config.time_mode, again.config.lam) == (time_mode, 0.5)
    ids, t = some_batch()["input_ids"], torch.tensor([1, 5, 8])
    assert torch.equal(again(ids, timesteps=t).logits, model(ids, timesteps=t).logits)
    assert again.get_output_embeddings().weight is again.bert.embeddings.word_embeddings.weight


def test_bad_configurations_are_named():
    with pytest.raises(ValueError, match="time_mode 'layers' is unknown; did you mean 'layer'"):
        DiffusionBertConfig(time_mode="layers")
    with pytest.raises(ValueError, match="time_init 'one' is unknown"):
        DiffusionBertConfig(time_init="one")
    with pytest.raises(ValueError, match="time_mode 'prefix' needs timesteps"):
        some_model(time_mode="prefix")(torch.tensor([[1, 5, 2]]))


def test_the_papers_model_without_its_weights():
    for time_mode, more in (
        ("none", 0),
        ("layer", 12 * (4 * 768**2 + 3 * 768)),
        ("prefix", 2049 * 768),
    ):
        with torch.device("meta"):
            model = DiffusionBertForMaskedDiffusion(DiffusionBertConfig(time_mode=time_mode))
            ids, t = torch.ones(2, 130, dtype=torch.long), torch.tensor([1, 2048])
            assert model(ids, timesteps=t).logits.shape == (2, 130, 30522)
        assert model.num_parameters() == 109_514_298 + more
        assert model.config.num_steps == 2048 and model.config.hybrid_weight == 0.01


# --- the bounds, enumerated ----------------------------------------------------------------------


class Table(nn.Module):
    """A denoiser that looks its answer up: any function of x_t; letters 0 … V-1, [MASK] = V."""

    def __init__(self, letters=3, places=2, seed=0, sharp=2.0):
        super().__init__()
        self.config = SimpleNamespace(mask_token_id=letters)
        self.base = (letters + 1) ** torch.arange(places)
        generator = torch.Generator().manual_seed(seed)
        shape = ((letters + 1) ** places, places, letters + 1)
        self.table = nn.Parameter(sharp * torch.randn(shape, generator=generator))

    @property
    def device(self):
        return self.table.device

    def forward(self, input_ids, attention_mask=None, timesteps=None, positions=None):
        logits = self.table[(input_ids * self.base.to(input_ids.device)).sum(1)]
        return SimpleNamespace(logits=logits if positions is None else logits[positions])

    def f(self, shown):
        logits = self.table[(torch.tensor(shown) * self.base).sum()].detach().clone()
        logits[:, -1] = -torch.inf
        return logits.softmax(-1)


def sentences_of(letters, places=2):
    return [torch.tensor(x) for x in itertools.product(range(letters), repeat=places)]


def enumerated(model, x, schedule, mode, stride=1):
    """The bound of x with the probability of every pattern of masks, from explicit distributions."""
    mask, n = model.config.mask_token_id, len(x)
    d = schedule.offsets(x, torch.ones(n), "corpus" if mode == "valid" else "sentence")
    total = 0.0
    for t in range(stride, schedule.num_steps + 1, stride):
        now = torch.as_tensor(schedule.alpha_bar(t, d)).expand(n)
        before = torch.as_tensor(schedule.alpha_bar(t - stride, d)).expand(n)
        w = (before - now) / (1 - now).clamp_min(1e-9)
        if mode == "valid" and schedule.lam:
            a, b = (schedule.alpha_bar(t - k, schedule.table()) for k in (0, stride))
            rates = ((b - a) / (1 - a).clamp_min(1e-9)).expand(n, -1)
        else:
            rates = w[:, None].expand(n, mask + 1)
        for bits in itertools.product((False, True), repeat=n):
            hidden = torch.tensor(bits)
            chance = float(torch.where(hidden, 1 - now, now).prod())
            p = model.f(torch.where(hidden, mask, x).tolist()) * rates
            for i in hidden.nonzero()[:, 0]:
                stay_p = 1 - float(p[i, :mask].sum())
                term = float(w[i]) * math.log(
                    max(float(w[i]), 1e-30) / max(float(p[i, x[i]]), 1e-30)
                )
                if w[i] < 1 - 1e-6:
                    term += (1 - float(w[i])) * math.log((1 - float(w[i])) / max(stay_p, 1e-30))
                total += chance * term
    return total


def likelihoods(model, schedule, stride=1, places=2):
    """p(x) of every sentence under the reverse process, by following all states."""
    mask = model.config.mask_token_id
    chances = {(mask,) * places: 1.0}
    for t in range(schedule.num_steps, 0, -stride):
        rates = schedule.posterior_weight(t, stride, schedule.table())
        after = {}
        for shown, chance in chances.items():
            p = model.f(list(shown)) * rates
            p[:, mask] = 1 - p[:, :mask].sum(1)
            for i, token in enumerate(shown):
                if token != mask:
                    p[i] = F.one_hot(torch.tensor(token), mask + 1)
            for new in itertools.product(range(mask + 1), repeat=places):
                step = math.prod(float(p[i, token]) for i, token in enumerate(new))
                after[new] = after.get(new, 0.0) + chance * step
        chances = {state: chance for state, chance in after.items() if chance > 1e-12}
    return chances


LETTERS = torch.tensor([600.0, 80.0, 5.0, 0.0])


@pytest.mark.parametrize("lam", [0.0, 0.4, 1.5])
@pytest.mark.parametrize("form", ["logfreq", "entropy"])
@pytest.mark.parametrize("stride", [1, 3])
def test_the_valid_bound_is_one(lam, form, stride):
    """For random denoisers: probabilities sum to one, and no bound lies below -log p(x)."""
    schedule = AbsorbingSchedule(6, lam, LETTERS, form)
    for seed in range(2):
        model = Table(seed=seed)
        p = likelihoods(model, schedule, stride)
        assert sum(p.values()) == pytest.approx(1, abs=1e-4)
        bounds = [enumerated(model, x, schedule, "valid", stride) for x in sentences_of(3)]
        for x, bound in zip(sentences_of(3), bounds, strict=True):
            assert bound >= -math.log(p[tuple(x.tolist())]) - 1e-4
        assert sum(math.exp(-bound) for bound in bounds) <= 1 + 1e-4


def test_without_a_spindle_exact_and_valid_are_the_same_bound():
    model, schedule = Table(seed=4), AbsorbingSchedule(5)
    p = likelihoods(model, schedule)
    for x in sentences_of(3):
        exact, valid = (enumerated(model, x, schedule, mode) for mode in ("exact", "valid"))
        assert exact == pytest.approx(valid)
        assert exact >= -math.log(p[tuple(x.tolist())]) - 1e-5


def test_exact_and_released_bound_no_model():
    """Sentences cannot have probabilities that sum to more than one."""
    cheat = Table(letters=2)
    with torch.no_grad():
        cheat.table[:] = torch.tensor([0.1, 0.9, 1.0]).log()
        cheat.table[2 * 1 + 2 * 3] = torch.tensor([0.98, 0.02, 1.0]).log()  # both hidden
    schedule = AbsorbingSchedule(12, 1.0, torch.tensor([1e6, 1.0, 0.0]))
    batch = {
        "input_ids": torch.stack(sentences_of(2)),
        "attention_mask": torch.ones(4, 2, dtype=torch.long),
        "noised": torch.ones(4, 2, dtype=torch.bool),
    }
    batch = {name: value.repeat(2000, 1) for name, value in batch.items()}
    total = {}
    for mode in MODES:
        nats = elbo(
            cheat,
            batch,
            schedule,
            mode=mode,
            batch_size=100_000,
            generator=torch.Generator().manual_seed(0),
        )
        total[mode] = float((-nats.reshape(2000, 4).mean(0)).exp().sum())
    assert total["exact"] > 1.5 and total["released"] > 1.5 and total["valid"] <= 1.0
    expected = sum(math.exp(-enumerated(cheat, x, schedule, "exact")) for x in sentences_of(2))
    assert total["exact"] == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("mode", ["exact", "valid"])
@pytest.mark.parametrize(
    ("lam", "stride", "samples"), [(0.0, 1, None), (0.8, 1, None), (0.8, 2, 2), (0.8, 1, 4)]
)
def test_elbo_estimates_the_enumerated_bound(mode, lam, stride, samples):
    schedule, model = AbsorbingSchedule(8, lam, LETTERS), Table(seed=1, sharp=1.0)
    xs, repeats = sentences_of(3), 3000
    batch = {
        "input_ids": torch.stack(xs).repeat(repeats, 1),
        "attention_mask": torch.ones(9 * repeats, 2, dtype=torch.long),
        "noised": torch.ones(9 * repeats, 2, dtype=torch.bool),
    }
    found = elbo(
        model, batch, schedule, stride, mode, samples, 1_000_000, torch.Generator().manual_seed(0)
    ).reshape(repeats, 9)
    for x, mean, deviation in zip(xs, found.mean(0), found.std(0), strict=True):
        expected = enumerated(model, x, schedule, mode, stride)
        assert abs(float(mean) - expected) <= 4.5 * float(deviation) / repeats**0.5


@pytest.mark.parametrize("lam", [0.0, 0.3])
def test_a_context_free_model_pays_its_unigram_cross_entropy(lam):
    """Whatever the schedule: with the exact posterior each token is charged once."""
    model, schedule = Table(places=4), AbsorbingSchedule(8, lam, LETTERS)
    with torch.no_grad():
        model.table[:] = torch.tensor([0.7, 0.2, 0.1, 1.0]).log()
    x = torch.tensor([[0, 1, 2, 0]]).repeat(4000, 1)
    batch = {"input_ids": x, "attention_mask": torch.ones_like(x), "noised": x >= 0}
    generator = torch.Generator().manual_seed(0)
    nats = elbo(model, batch, schedule, batch_size=100_000, generator=generator)
    assert float(nats.mean()) == pytest.approx(-math.log(0.7 * 0.2 * 0.1 * 0.7), rel=0.02)


def test_many_steps_approach_the_continuous_weight():
    """T to infinity: the sum over k hidden places, drawn at random, of their mean loss (MDLM's integral of 1/t)."""
    model, xs = Table(seed=2, places=3), sentences_of(3, 3)[5::12]
    for x in xs:
        limit = 0.0
        for k in (1, 2, 3):
            subsets = list(itertools.combinations(range(3), k))
            for subset in subsets:
                shown = [3 if i in subset else int(x[i]) for i in range(3)]
                f = model.f(shown)
                limit -= sum(math.log(float(f[i, x[i]])) for i in subset) / (k * len(subsets))
        assert enumerated(model, x, AbsorbingSchedule(200), "exact") == pytest.approx(
            limit, rel=0.01
        )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("stride", "samples"), [(1, 4), (2, 8)])
def test_prices_take_noise_away_and_nothing_else(mode, stride, samples):
    schedule, model = AbsorbingSchedule(8, 0.8, LETTERS), Table(seed=1, sharp=0.3)
    xs, repeats = sentences_of(3), 2000
    batch = {
        "input_ids": torch.stack(xs).repeat(repeats, 1),
        "attention_mask": torch.ones(9 * repeats, 2, dtype=torch.long),
        "noised": torch.ones(9 * repeats, 2, dtype=torch.bool),
    }
    found = []
    for prices in (None, torch.full((4,), 1.1)):
        generator = torch.Generator().manual_seed(0)
        nats = elbo(model, batch, schedule, stride, mode, samples, 10**6, generator, prices)
        found.append(nats.reshape(repeats, 9))
    plain, priced = found
    assert (priced.std(0) < 0.8 * plain.std(0)).all()
    error = 4.5 * (plain - priced).std(0) / repeats**0.5
    assert ((plain.mean(0) - priced.mean(0)).abs() <= error).all()


def test_strides_and_samples_that_do_not_fit_are_refused():
    model, batch = Table(), {"input_ids": torch.zeros(1, 2, dtype=torch.long)}
    with pytest.raises(ValueError, match="stride=3 does not divide num_steps=8"):
        elbo(model, batch, AbsorbingSchedule(8), 3)
    with pytest.raises(ValueError, match="samples=3 does not divide the 8 calls"):
        elbo(model, batch, AbsorbingSchedule(8), samples=3)


def test_perplexity_is_per_word():
    assert perplexity(torch.tensor([110.0, 110.0]), 52) == pytest.approx(math.exp(110 / 26))


# --- writing -------------------------------------------------------------------------------------


def two_masks(count, mask):
    ids = torch.full((count, 2), mask)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("lam", "mode", "stride"), [(0.0, "exact", 1), (0.0, "exact", 2), (0.8, "valid", 1)]
)
def test_what_is_written_has_the_models_own_probabilities(device, lam, mode, stride):
    """The sampler draws from exactly that distribution whose bound is computed."""
    model, schedule = Table(seed=3).to(device), AbsorbingSchedule(4, lam, LETTERS)
    p = likelihoods(Table(seed=3), schedule, stride)
    count = 20_000
    ids = diffusion_sample(
        model,
        two_masks(count, 3),
        schedule,
        stride,
        mode=mode,
        generator=torch.Generator().manual_seed(0),
    ).cpu()
    for x in sentences_of(3):
        share = float((ids == x).all(1).float().mean())
        expected = p[tuple(x.tolist())]
        assert abs(share - expected) <= 4.5 * math.sqrt(expected / count) + 1e-3


@pytest.mark.parametrize("remask", [False, True])
@pytest.mark.parametrize(("lam", "mode"), [(0.0, "exact"), (0.5, "released"), (0.5, "valid")])
def test_context_is_returned_untouched_and_no_mask_is_left(remask, lam, mode):
    model, schedule = some_model(time_mode="layer"), AbsorbingSchedule(8, lam, torch.arange(30.0))
    batch = some_batch()
    slots = torch.zeros_like(batch["noised"])
    slots[:, 2] = slots[2, 4] = True
    given = batch | {"input_ids": torch.where(slots, 3, batch["input_ids"])}
    generator = torch.Generator().manual_seed(0)
    found, times = model.generate(
        given,
        schedule,
        2,
        top_k=5,
        mode=mode,
        remask=remask,
        generator=generator,
        return_times=True,
    )
    assert torch.equal(found[~slots], batch["input_ids"][~slots])
    assert not (found == 3).any()
    assert ((times > 0) == slots).all() and times.max() <= 4
    assert (given["input_ids"][slots] == 3).all()  # the caller's batch is left alone


def test_remasking_gives_tokens_a_second_chance_and_otherwise_they_stay():
    model, schedule = Table(seed=5), AbsorbingSchedule(4)
    seen = {}
    for remask in (False, True):
        x, masks = two_masks(400, 3)["input_ids"], []
        generator = torch.Generator().manual_seed(0)
        slots, options = x == 3, dict(top_k=0, temperature=1.0, generator=generator)
        for t in (4, 3, 2, 1):
            new = reverse_step(
                model, x, torch.ones_like(x), slots, schedule, t, 1, 3, options, remask
            )
            masks.append(((x != 3) & (new != x)).any())
            x = new
        seen[remask] = any(masks)
    assert seen == {False: False, True: True}


def test_reverse_probabilities_are_a_distribution():
    torch.manual_seed(0)
    log_f = torch.randn(5, 6).index_fill(1, torch.tensor([5]), -torch.inf).log_softmax(-1)
    weights, rates = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0]), torch.rand(5, 6)
    for rate_table in (None, rates):
        p = reverse_log_probs(log_f.clone(), weights, 5, rate_table).exp()
        torch.testing.assert_close(p.sum(1), torch.ones(5))
        expected = log_f.exp() * (weights[:, None] if rate_table is None else rates)
        torch.testing.assert_close(p[:, :5], expected[:, :5])


def test_drawing_follows_temperature_and_top_k():
    log_p = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(40_000, -1)
    generator = torch.Generator().manual_seed(0)
    for top_k, temperature in ((0, 1.0), (2, 1.0), (0, 0.5), (3, 2.0)):
        found = torch.bincount(draw(log_p, top_k, temperature, generator), minlength=4) / 40_000
        expected = (log_p[0] / temperature).exp()
        expected[top_k or 4 :] = 0
        torch.testing.assert_close(found, expected / expected.sum(), atol=0.01, rtol=0)
    assert (draw(log_p, 1) == 0).all()
    with pytest.raises(ValueError, match="temperature=0"):
        draw(log_p, temperature=0)


def test_blank_sentences_are_framed_masks():
    batch = blank([2, 3], TOKENIZER)
    assert batch["input_ids"].tolist() == [[1, 3, 3, 2, 0], [1, 3, 3, 3, 2]]
    assert batch["attention_mask"].sum(1).tolist() == [4, 5]
    assert batch["noised"].sum(1).tolist() == [2, 3]


def test_bert_mouth_is_gibbs_sampling():
    """With the conditionals of a joint distribution it draws from that distribution."""
    joint = torch.tensor([[0.3, 0.05, 0.1], [0.05, 0.2, 0.05], [0.1, 0.05, 0.1]])
    model = Table()
    with torch.no_grad():
        for a, b in itertools.product(range(4), repeat=2):
            rows = model.table[a + 4 * b]
            rows[0, :3] = (joint[:, b] if b < 3 else joint.sum(1)).log()
            rows[1, :3] = (joint[a] if a < 3 else joint.sum(0)).log()
    count = 6000
    ids = bert_mouth_sample(
        model, two_masks(count, 3), 12, generator=torch.Generator().manual_seed(0)
    )
    found = torch.bincount(ids[:, 0] * 3 + ids[:, 1], minlength=9).reshape(3, 3) / count
    torch.testing.assert_close(found, joint, atol=0.025, rtol=0)


def test_bert_mouth_leaves_the_context_alone():
    model, batch = some_model(), some_batch()
    slots = torch.zeros_like(batch["noised"])
    slots[0, 1:4] = True  # the other sentences have no masks at all
    given = batch | {"input_ids": torch.where(slots, 3, batch["input_ids"])}
    found = bert_mouth_sample(model, given, 30, top_k=4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found[~slots], batch["input_ids"][~slots])
    assert not (found == 3).any()
    with pytest.raises(ValueError, match="2 iterations cannot fill 3 masks; give 3 or more"):
        bert_mouth_sample(model, given, 2)
