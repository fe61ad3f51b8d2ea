"""UDR: losses against loops, weights, sampler, prompts, the scorer, the trainer, the retriever, save and load, errors."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from compendium.models.scoring import LanguageModelScorer
from compendium.retrieval.udr import (
    CandidateLists,
    DemonstrationBiEncoder,
    DemonstrationBiEncoderConfig,
    DemonstrationRetriever,
    EncodedTask,
    Example,
    LMScorer,
    Task,
    TemperatureTaskSampler,
    UDRSettings,
    UDRTrainer,
    bi_encoder_from,
    build_icl_prompt,
    continuation,
    in_batch_loss,
    initial_candidates,
    listwise_rank_loss,
    own_block,
    pair_weights,
    question,
    rank_of_scores,
    sample_list,
    udr_loss,
)

WORDS = [*"abcdefghijklmnopqrst", "yes", "no", "very", "Ask", ":", "\n", "\t"]
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


def some_tokenizer():
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    split = [pre_tokenizers.Split(" ", "removed")]
    split += [pre_tokenizers.Split(sign, "isolated") for sign in ("\n", "\t", ":")]
    inner.pre_tokenizer = pre_tokenizers.Sequence(split)
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")


def some_config(**options):
    inner = dict(model_type="bert", vocab_size=len(WORDS) + 2, hidden_size=16, num_hidden_layers=1)
    inner |= dict(num_attention_heads=2, intermediate_size=16, initializer_range=0.3)
    inner |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return DemonstrationBiEncoderConfig(inner, **{"pooling": "mean", **options})


def some_model(seed=0, **options):
    torch.manual_seed(seed)
    return DemonstrationBiEncoder(some_config(**options)).eval()


def some_task(name="toy", count=20, seed=0, labels=("yes", "no"), **options):
    rng = np.random.default_rng(seed)
    rows = [
        Example(" ".join(rng.choice(WORDS[:20], 3)), str(rng.choice(labels or ["a b", "c"])))
        for _ in range(count)
    ]
    return Task(name, "Ask :", rows, rows[:3], tuple(labels), **options)


def some_scorer():
    torch.manual_seed(1)
    sizes = dict(vocab_size=len(WORDS) + 2, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    model = GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.5))
    return LMScorer(LanguageModelScorer(model, some_tokenizer()))


# --- losses --------------------------------------------------------------------------------------


def loss_by_loops(similarity, rank, weight="gold"):
    """The sum over ordered pairs, as in the paper (or the released code)."""
    total = 0.0
    for sim, r in zip(similarity.tolist(), rank.tolist(), strict=True):
        order = sorted(range(len(sim)), key=lambda i: -sim[i])
        own = [order.index(i) + 1 for i in range(len(sim))]
        for i, j in itertools.product(range(len(sim)), repeat=2):
            if weight == "gold":
                w = max(0.0, 1 / r[i] - 1 / r[j])
            else:
                w = abs(1 / own[i] - 1 / own[j]) * (r[i] < r[j])
            total += w * np.log1p(np.exp(sim[j] - sim[i]))
    return total / len(similarity)


@pytest.mark.parametrize("weight", ["gold", "predicted"])
def test_rank_loss_equals_loops(weight):
    torch.manual_seed(0)
    similarity = torch.randn(4, 6, dtype=torch.double)
    rank = torch.stack([torch.randperm(6) + 1 for _ in range(4)])
    found = listwise_rank_loss(similarity, rank, weight)
    assert found.item() == pytest.approx(loss_by_loops(similarity, rank, weight), rel=1e-6)
    mean = listwise_rank_loss(similarity, rank, weight, "mean")
    assert mean.item() == pytest.approx(found.item() / 15, rel=1e-6)


def test_weight_table_of_three():
    weights = pair_weights(torch.zeros(1, 3), torch.tensor([[1, 2, 3]]))[0]
    expected = [[0, 1 - 1 / 2, 1 - 1 / 3], [0, 0, 1 / 2 - 1 / 3], [0, 0, 0]]
    torch.testing.assert_close(weights, torch.tensor(expected))


def test_perfect_order_with_a_large_margin_has_no_gradient():
    similarity = torch.tensor([[300.0, 100.0, -100.0, -300.0]], requires_grad=True)
    rank = torch.tensor([[1, 2, 3, 4]])
    for weight in ("gold", "predicted"):
        (gradient,) = torch.autograd.grad(listwise_rank_loss(similarity, rank, weight), similarity)
        assert gradient.abs().max() == 0
    (gradient,) = torch.autograd.grad(listwise_rank_loss(similarity, 5 - rank), similarity)
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 0.5


@given(st.permutations(range(1, 6)))
def test_a_step_lifts_the_best_and_lowers_the_worst(ranks):
    rank = torch.tensor([ranks])
    similarity = torch.zeros(1, 5, requires_grad=True)
    listwise_rank_loss(similarity, rank).backward()
    by_rank = similarity.grad[0][rank[0].argsort()]
    assert by_rank[0] < 0 < by_rank[-1] and (by_rank.diff() > 0).all()


def test_udr_loss_is_the_weighted_sum():
    torch.manual_seed(0)
    similarity = torch.randn(3, 12)
    rank = torch.stack([torch.randperm(4) + 1 for _ in range(3)])
    best = torch.tensor([i * 4 + int(row.argmin()) for i, row in enumerate(rank)])
    own = torch.stack([similarity[i, 4 * i : 4 * i + 4] for i in range(3)])
    torch.testing.assert_close(own_block(similarity), own)
    ranking, contrast = listwise_rank_loss(own, rank), in_batch_loss(similarity, best)
    expected = -similarity.log_softmax(1)[torch.arange(3), best].mean()
    torch.testing.assert_close(contrast, expected)
    for lam in (0.0, 0.8, 1.0):
        found = udr_loss(similarity, rank, lam)
        torch.testing.assert_close(found, lam * ranking + (1 - lam) * contrast)


def test_ranks_of_scores():
    scores = torch.tensor([[0.2, 0.9, 0.2, 0.5]])
    assert rank_of_scores(scores).tolist() == [[3, 1, 4, 2]]


# --- sampling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_tasks_come_by_their_share_to_alpha(alpha):
    sizes = [1000, 300, 50]
    sampler = TemperatureTaskSampler(sizes, 4, 6000, alpha, seed=1)
    batches = list(sampler)
    assert all(len({task for task, _ in batch}) == 1 for batch in batches)
    counts = np.bincount([batch[0][0] for batch in batches])
    share = np.array(sizes, dtype=float) ** alpha
    assert chisquare(counts, share / share.sum() * len(batches)).pvalue > 1e-3
    assert len(sampler) == 6000


def test_a_task_is_seen_through_before_it_repeats():
    sampler = TemperatureTaskSampler([12], 4, 6, seed=0)
    seen = [query for batch in sampler for _, query in batch]
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12))
    first, again = (list(TemperatureTaskSampler([5, 9], 4, 9, seed=s)) for s in (3, 3))
    assert first == again
    assert len(next(iter(TemperatureTaskSampler([2], 8, 1)))) == 2


@given(st.integers(3, 40), st.integers(2, 12), st.integers(0, 99))
@settings(max_examples=40)
def test_lists_are_samples_in_order(count, size, seed):
    rng = np.random.default_rng(seed)
    scores = rng.permutation(count) / count
    for sampling in ("uniform", "structured", "extremes"):
        chosen = sample_list(scores, size, sampling, rng)
        assert len(set(chosen.tolist())) == len(chosen) == min(size, count)
        assert (np.diff(scores[chosen]) < 0).all()


def test_structured_and_extreme_lists_reach_both_ends():
    scores, rng = np.linspace(1, 0, 50), np.random.default_rng(0)
    for _ in range(30):
        structured = sample_list(scores, 8, "structured", rng)
        assert structured[0] < 5 and structured[-1] >= 45
        extremes = sample_list(scores, 4, "extremes", rng)
        assert extremes[0] < 5 and (extremes[1:] >= 45).all()


# --- prompts and feedback ------------------------------------------------------------------------


@given(st.integers(0, 6), st.integers(4, 40))
def test_prompts_fit_with_the_most_similar_last(num_demos, most):
    task = some_task(template="{text}\nIt was {answer}.")

    def count(text):
        return len(text.split())

    demos = task.train[:num_demos]
    asked = question(task, "a b")
    if count(asked) > most:
        with pytest.raises(ValueError, match="the query alone"):
            build_icl_prompt(demos, "a b", task, count, most)
        return
    prompt = build_icl_prompt(demos, "a b", task, count, most)
    assert count(prompt) <= most and prompt.endswith(asked)
    whole = build_icl_prompt(demos, "a b", task)
    assert whole.endswith(prompt)  # what is dropped is dropped from the front
    if demos and prompt != whole:
        kept = prompt.count("It was") - 1
        longer = build_icl_prompt(demos[len(demos) - kept - 1 :], "a b", task)
        assert count(longer) > most


def test_the_blank_belongs_to_the_answer():
    task = some_task(template="{text}\nIt was {answer}.")
    assert question(task, "a") + continuation(task, "yes") == "a\nIt was yes"
    assert question(task, "a").endswith("was") and continuation(some_task(), "yes") == "yes"
    braces = build_icl_prompt([Example("{answer} {text}", "no")], "x", task)
    assert braces == "{answer} {text}\nIt was no.\nx\nIt was"


def test_feedback_is_the_probability_of_the_answer_among_the_labels():
    scorer, task = some_scorer(), some_task(labels=("yes", "no", "very yes"))
    demos = [task.train[3:6], task.train[5:8]]
    found = scorer.score(task, task.train[:2], demos)
    language_model = scorer.language_model
    for row, query, candidates in zip(found, task.train[:2], demos, strict=True):
        for s, z in zip(row, candidates, strict=True):
            prompt = f"{z.text}\t{z.answer}\n{query.text}\t"
            each = np.exp(language_model.log_likelihood([prompt] * 3, list(task.labels)))
            assert s == pytest.approx(each[task.labels.index(query.answer)] / each.sum(), rel=1e-5)
    raw = LMScorer(language_model, normalise=False).score(task, task.train[:2], demos)
    assert (raw < found).all()
    assert (found > 0).all() and (found < 1).all()


def test_generation_is_scored_by_the_whole_answer():
    scorer, task = some_scorer(), some_task(labels=())
    found = scorer.score(task, task.train[:1], [task.train[1:3]])
    prompt = build_icl_prompt([task.train[1]], task.train[0].text, task)
    alone = scorer.language_model.log_likelihood([prompt], [task.train[0].answer])
    assert found[0, 0] == pytest.approx(np.exp(alone[0]))


# --- candidates, training, retrieval -------------------------------------------------------------


def test_first_candidates_are_similar_questions_or_answers():
    rows = [Example("a b", "x x"), Example("a b", "y"), Example("c d", "x x"), Example("b", "y z")]
    by_question = initial_candidates(Task("t", "", rows, labels=("x x", "y", "y z")), 2)
    by_answer = initial_candidates(Task("t", "", rows), 2)
    assert by_question[:2].tolist() == [[1, 3], [0, 3]]
    assert by_answer[0, 0] == 2 and by_answer[1, 0] == 3
    for found in (by_question, by_answer):
        assert all(query not in row for query, row in enumerate(found.tolist()))


def some_trainer(**options):
    values = dict(num_candidates=6, list_size=4, batch_size=5, first_steps=4, steps=3)
    values |= dict(learning_rate=1e-2, warmup_steps=1, max_length=32, mixed_precision="no")
    return UDRTrainer(
        some_model(), some_tokenizer(), some_scorer(), UDRSettings(**values | options)
    )


def test_mining_finds_the_nearest_and_never_the_query():
    trainer, task = some_trainer(), some_task(count=30)
    task.train[7] = Example(task.train[4].text, task.train[4].answer)  # a duplicate of another
    encoded = EncodedTask(task, trainer.tokenizer, 32)
    found = trainer.mine(encoded)
    model = trainer.model
    with torch.no_grad():
        queries = model.encode_query(
            encoded.queries["input_ids"], encoded.queries["attention_mask"]
        )
        demos = model.encode_demo(encoded.demos["input_ids"], encoded.demos["attention_mask"])
    scores = (queries @ demos.T).numpy()
    np.fill_diagonal(scores, -np.inf)
    best = -np.sort(-scores, axis=1)[:, :6]
    np.testing.assert_allclose(np.take_along_axis(scores, found, 1), best, rtol=1e-4, atol=1e-4)
    assert all(query not in row for query, row in enumerate(found.tolist()))


def test_batches_name_every_candidate_once_and_rank_it():
    trainer, tasks = some_trainer(), [some_task("one"), some_task("two", seed=1)]
    encoded = [EncodedTask(task, trainer.tokenizer, 32) for task in tasks]
    candidates = [initial_candidates(task, 6) for task in tasks]
    scores = [trainer.score(t, c) for t, c in zip(tasks, candidates, strict=True)]
    lists = CandidateLists(encoded, candidates, scores, trainer.settings, np.random.default_rng(0))
    batch = lists.collate([(1, 3), (1, 8), (1, 9)])
    assert batch["rank"].tolist() == [[1, 2, 3, 4]] * 3
    texts = trainer.tokenizer.batch_decode(batch["demo_input_ids"])
    assert len(set(texts)) == len(texts) and batch["demo_index"].shape == (12,)
    rank = batch.pop("rank")
    index = batch.pop("demo_index")
    repeated = batch | {k: batch[k][index] for k in ("demo_input_ids", "demo_attention_mask")}
    once = trainer.model(**batch, demo_index=index)
    torch.testing.assert_close(once, trainer.model(**repeated), rtol=1e-4, atol=1e-4)
    assert torch.isfinite(udr_loss(once, rank))


def test_training_learns_the_language_models_ranking_and_repeats():
    """The retriever's own lists get nearer to the feedback; two runs with one seed are equal."""
    task = some_task(count=40)
    results = []
    for _ in range(2):
        trainer = some_trainer(first_steps=60, batch_size=20)
        encoded = EncodedTask(task, trainer.tokenizer, 32)
        candidates = initial_candidates(task, 6)
        ranks = rank_of_scores(torch.from_numpy(trainer.score(task, candidates)))

        def loss(trainer=trainer, encoded=encoded, candidates=candidates, ranks=ranks):
            model = trainer.model.eval()
            with torch.no_grad():
                q = model.encode_query(
                    **{k: encoded.queries[k] for k in ("input_ids", "attention_mask")}
                )
                z = model.encode_demo(
                    **{k: encoded.demos[k] for k in ("input_ids", "attention_mask")}
                )
            own = (q @ z.T).gather(1, torch.from_numpy(candidates))
            return listwise_rank_loss(own, ranks).item()

        before = loss()
        trainer.fit([task], iterations=1)
        results.append(loss())
        assert results[-1] < 0.8 * before
    assert results[0] == results[1]


@pytest.mark.parametrize("device", DEVICES)
def test_fit_mines_between_iterations_and_for_several_tasks(device):
    trainer = some_trainer()
    trainer.model.to(device)
    tasks = [
        some_task("one"),
        some_task("two", seed=1, labels=()),
        some_task("three", num_queries=5),
    ]
    trainer.fit(tasks, iterations=3)
    assert [row["iteration"] for row in trainer.rounds] == [0, 1, 2]
    assert set(trainer.rounds[0]) == {"iteration", "one", "two", "three"}
    fixed = some_trainer(mine=False).fit(tasks, iterations=3)
    assert fixed.rounds[0]["one"] == fixed.rounds[2]["one"] == trainer.rounds[0]["one"]
    assert fixed.scorer.language_model.asked < trainer.scorer.language_model.asked


def test_retriever_equals_brute_force_and_orders_upwards():
    model, task = some_model(), some_task(count=30)
    retriever = DemonstrationRetriever(model, some_tokenizer(), 32).fit(task)
    queries = ["a b c", "d", "e f g"]
    similarity, ids = retriever.kneighbors(queries, 4, exclude=[[0], [1], [2]])
    tokens = [
        retriever.tokenizer(list(texts), padding=True, return_tensors="pt")
        for texts in (map(task.query_text, queries), map(task.demo_text, task.train))
    ]
    with torch.no_grad():
        q = model.encode_query(tokens[0]["input_ids"], tokens[0]["attention_mask"])
        z = model.encode_demo(tokens[1]["input_ids"], tokens[1]["attention_mask"])
    scores = model.similarity(q, z).numpy()
    scores[range(3), range(3)] = -np.inf
    np.testing.assert_allclose(similarity, -np.sort(-scores, 1)[:, :4], rtol=1e-4, atol=1e-4)
    assert all(i not in row for i, row in enumerate(ids.tolist()))
    (demos,) = retriever.demonstrations(["a b c"], 3)
    _, best = retriever.kneighbors(["a b c"], 3)
    assert demos == [task.train[i] for i in best[0][::-1]]
    assert set(retriever.get_params()) == {"model", "tokenizer", "max_length", "metric"}


# --- the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("shared", [False, True])
def test_save_and_load(tmp_path, pooling, shared):
    model = some_model(pooling=pooling, shared=shared)
    model.save_pretrained(tmp_path)
    again = DemonstrationBiEncoder.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[5, 6, 7, 0], [8, 9, 3, 4]])
    mask = (ids > 0).long()
    for name in ("encode_query", "encode_demo"):
        torch.testing.assert_close(getattr(again, name)(ids, mask), getattr(model, name)(ids, mask))
    same = torch.allclose(model.encode_query(ids, mask), model.encode_demo(ids, mask))
    assert same == shared


def test_both_sides_start_from_one_encoder(tmp_path):
    from transformers import BertModel

    options = dict(some_config().encoder) | {"num_hidden_layers": 3}
    options.pop("model_type")
    torch.manual_seed(0)
    BertModel(BertConfig(**options)).save_pretrained(tmp_path)
    model = bi_encoder_from(str(tmp_path), 2, pooling="cls").eval()
    assert len(model.query_encoder.encoder.layer) == 2
    ids = torch.tensor([[5, 6, 7]])
    mask = torch.ones_like(ids)
    torch.testing.assert_close(model.encode_query(ids, mask), model.encode_demo(ids, mask))
    inner = BertModel.from_pretrained(tmp_path, num_hidden_layers=2).eval()
    torch.testing.assert_close(model.encode_query(ids, mask), inner(ids).last_hidden_state[:, 0])


def test_the_papers_model_has_its_shape():
    """BERT-base twice and GPT-Neo-2.7B, on the meta device: sizes and an output, no weights."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    with torch.device("meta"):
        model = DemonstrationBiEncoder(DemonstrationBiEncoderConfig(BertConfig().to_dict()))
        ids = torch.ones(2, 256, dtype=torch.long)
        demos = torch.ones(16, 256, dtype=torch.long)
        layers = dict(
            hidden_size=2560,
            num_layers=32,
            num_heads=20,
            attention_types=[[["global", "local"], 16]],
        )
        scorer = GPTNeoForCausalLM(GPTNeoConfig(**layers))
        model.eval()  # without masks, whose values the attention would look at
        similarity = model.similarity(model.encode_query(ids, None), model.encode_demo(demos, None))
    assert model.config.pooling == "cls" and similarity.shape == (2, 16)
    count = sum(p.numel() for p in model.parameters())
    assert count == 2 * 109_482_240
    assert 2.6e9 < sum(p.numel() for p in scorer.parameters()) < 2.8e9
    values = UDRSettings()
    assert (values.num_candidates, values.list_size, values.lam, values.batch_size) == (
        50,
        8,
        0.8,
        128,
    )
    assert (values.learning_rate, values.warmup_steps, values.alpha) == (1e-4, 500, 0.5)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="pooling 'max' is unknown"):
        DemonstrationBiEncoderConfig(pooling="max")
    with pytest.raises(ValueError, match="weight 'golden' is unknown; did you mean 'gold'"):
        pair_weights(torch.zeros(1, 2), torch.tensor([[1, 2]]), "golden")
    with pytest.raises(ValueError, match="reduction 'max'"):
        listwise_rank_loss(torch.zeros(1, 2), torch.tensor([[1, 2]]), reduction="max")
    with pytest.raises(ValueError, match="sampling 'best' is unknown"):
        sample_list(np.zeros(4), 2, "best", np.random.default_rng(0))
    with pytest.raises(ValueError, match="template 'x'"):
        Task("t", "", [Example("a", "b")], template="x")
    with pytest.raises(ValueError, match="no example in `train`"):
        Task("t", "", [])
    with pytest.raises(ValueError, match="leave out tasks without examples"):
        TemperatureTaskSampler([3, 0], 2, 1)
    with pytest.raises(ValueError, match="bring at least 3"):
        initial_candidates(Task("t", "", [Example("a", "b"), Example("c", "d")]), 5)
    with pytest.raises(ValueError, match="give every one equally many"):
        task = some_task()
        some_scorer().score(task, task.train[:2], [task.train[:1], task.train[:2]])
