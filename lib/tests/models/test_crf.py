"""The CRF against enumeration of all tag sequences, pytorch-crf, and finite differences."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchcrf import CRF as PytorchCRF

from compendium.models.crf import (
    LinearChainCRF,
    TagConstraints,
    log_partition_by_logsumexp,
    safe_interval,
    score_range,
    score_tables,
    steps_to_reach_all,
    tag_constraints,
)

BIO = ["O", "B-X", "I-X", "B-Y", "I-Y"]
BMES = ["B", "M", "E", "S"]
SCHEMES = {
    "BIO": BIO,
    "BMES": BMES,
    "BIOES": ["O", *(f"{a}-{b}" for b in "XY" for a in "BIES")],
}


def some_batch(num_tags, lengths, seed=0, scale=1.0, dtype=torch.double):
    generator = torch.Generator().manual_seed(seed)
    length = max(lengths)
    emissions = scale * torch.randn(
        len(lengths), length, num_tags, generator=generator, dtype=dtype
    )
    tags = torch.randint(num_tags, (len(lengths), length), generator=generator)
    mask = torch.arange(length) < torch.tensor(lengths)[:, None]
    return emissions, tags, mask


def enumerate_paths(crf, emissions):
    """All paths of one sentence `(length, num_tags)` and their scores, from the definition."""
    transitions = crf.transitions.double()
    zeros = transitions.new_zeros(crf.num_tags)
    start = zeros if crf.start_scores is None else crf.start_scores.double()
    end = zeros if crf.end_scores is None else crf.end_scores.double()
    paths, scores = [], []
    for path in itertools.product(range(crf.num_tags), repeat=len(emissions)):
        steps = list(itertools.pairwise(path))
        if crf.constrained and not (
            crf.allowed_start[path[0]]
            and crf.allowed_end[path[-1]]
            and all(crf.allowed_transitions[j, k] for j, k in steps)
        ):
            continue
        score = start[path[0]] + end[path[-1]]
        score = score + sum(emissions[t, k] for t, k in enumerate(path))
        score = score + sum((transitions[j, k] for j, k in steps), start=0.0)
        paths.append(path)
        scores.append(score)
    return torch.tensor(paths), torch.stack(scores)


@pytest.mark.parametrize("boundary_scores", [True, False])
@pytest.mark.parametrize("tags", [None, BMES, ["O", "B-X", "I-X"]])
@pytest.mark.parametrize("scale", [1.0, 400.0])
def test_everything_equals_enumeration(boundary_scores, tags, scale):
    torch.manual_seed(1)
    constraints = tag_constraints(tags) if tags else None
    num_tags = len(tags) if tags else 3
    crf = LinearChainCRF(
        num_tags, boundary_scores=boundary_scores, constraints=constraints, init_range=1.0
    )
    lengths = [5, 2, 3]
    emissions, _, mask = some_batch(num_tags, lengths, scale=scale)
    log_z, marginals = crf.log_partition(emissions, mask), crf.marginals(emissions, mask)
    best, best_score = crf.viterbi(emissions, mask)
    for row, length in enumerate(lengths):
        paths, scores = enumerate_paths(crf, emissions[row, :length])
        torch.testing.assert_close(log_z[row], scores.logsumexp(0))
        posterior = scores.softmax(0)
        expected = torch.nn.functional.one_hot(paths, num_tags).double()
        expected = (posterior[:, None, None] * expected).sum(0)
        torch.testing.assert_close(marginals[row, :length], expected)
        assert (marginals[row, length:] == 0).all()
        assert best[row, :length].tolist() == paths[scores.argmax()].tolist()
        torch.testing.assert_close(best_score[row], scores.max())
        gold = paths[len(paths) // 2]
        loss = crf(emissions[row : row + 1, :length], gold[None])
        torch.testing.assert_close(loss, -scores.log_softmax(0)[len(paths) // 2])


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 7),
    st.lists(st.integers(1, 12), min_size=1, max_size=5),
    st.integers(0, 10_000),
    st.sampled_from([0.1, 3.0, 30.0]),
)
def test_equals_pytorch_crf(num_tags, lengths, seed, scale):
    torch.manual_seed(seed)
    reference = PytorchCRF(num_tags, batch_first=True).double()
    torch.nn.init.normal_(reference.transitions, std=2.0)
    ours = LinearChainCRF(num_tags).double()
    with torch.no_grad():
        ours.transitions.copy_(reference.transitions)
        ours.start_scores.copy_(reference.start_transitions)
        ours.end_scores.copy_(reference.end_transitions)
    emissions, tags, mask = some_batch(num_tags, lengths, seed, scale)
    ours_in, reference_in = (emissions.clone().requires_grad_() for _ in range(2))
    for ours_reduction, reference_reduction in (("mean", "mean"), ("token_mean", "token_mean")):
        a = ours(ours_in, tags, mask, reduction=ours_reduction)
        b = -reference(reference_in, tags, mask, reduction=reference_reduction)
        torch.testing.assert_close(a, b)
    a.backward()
    b.backward()
    torch.testing.assert_close(ours_in.grad, reference_in.grad)
    if max(lengths) > 1:
        torch.testing.assert_close(ours.transitions.grad, reference.transitions.grad)
    torch.testing.assert_close(ours.start_scores.grad, reference.start_transitions.grad)
    torch.testing.assert_close(ours.end_scores.grad, reference.end_transitions.grad)
    assert ours.decode(emissions, mask) == reference.decode(emissions, mask)


@pytest.mark.parametrize("tags", [None, BIO])
def test_gradients_equal_finite_differences(tags):
    torch.manual_seed(0)
    crf = LinearChainCRF(5, constraints=tag_constraints(tags) if tags else None).double()
    emissions, gold, mask = some_batch(5, [4, 2])
    if tags:
        gold = crf.viterbi(emissions, mask)[0]
    names = [name for name, _ in crf.named_parameters()]

    def loss(emissions, *values):
        arguments = (emissions, gold, mask)
        return torch.func.functional_call(
            crf, dict(zip(names, values, strict=True)), arguments, {"reduction": "none"}
        )

    inputs = [emissions.requires_grad_(), *(p.detach().requires_grad_() for p in crf.parameters())]
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_fast_path_equals_safe_path_just_below_its_limit(scheme):
    crf = LinearChainCRF(len(SCHEMES[scheme]), constraints=tag_constraints(SCHEMES[scheme]))
    crf = crf.double()
    emissions, _, mask = some_batch(crf.num_tags, [60, 33, 1])
    tables = score_tables(crf, torch.double)
    room = 299.0 / (crf.reach + 1.0) - 1.0
    emissions = (room / score_range(emissions) * emissions).detach()
    assert safe_interval(crf, emissions, mask) == 1
    assert safe_interval(crf, emissions / 100, mask) == 8
    assert safe_interval(crf, emissions * 2, mask) == 0
    results = []
    for compute in (crf._log_partition, lambda e, m: log_partition_by_logsumexp(e, m, *tables)):
        leaf = emissions.clone().requires_grad_()
        log_z = compute(leaf, mask)
        gradients = torch.autograd.grad(log_z.sum(), [leaf, crf.transitions])
        results.append((log_z, *gradients))
    for fast, safe in zip(*results, strict=True):
        torch.testing.assert_close(fast, safe, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("special", [-math.inf, -1e4])
def test_extreme_scores_take_the_safe_path(special):
    """Forced tags through hard emission masks, with the only legal way through unlikely tags."""
    crf = LinearChainCRF(3, init_range=0.0).double()
    emissions = torch.zeros(1, 400, 3, dtype=torch.double)
    emissions[..., 0] = special
    emissions[:, ::2, 1] = special
    torch.testing.assert_close(
        crf.log_partition(emissions), torch.tensor([200 * math.log(2)]).double()
    )
    assert crf.marginals(emissions).isfinite().all()
    assert crf.decode(emissions)[0][:4:2] == [2, 2]


def test_large_offsets_do_not_overflow():
    crf = LinearChainCRF(3)
    emissions, tags, mask = some_batch(3, [6, 4], dtype=torch.float)
    shifted = emissions + torch.tensor([1e4, -1e4])[:, None, None]
    before = crf(emissions, tags, mask, reduction="none")
    torch.testing.assert_close(
        crf(shifted, tags, mask, reduction="none"), before, atol=2e-2, rtol=0
    )
    with torch.no_grad():
        for scores in crf.parameters():
            scores += 2000.0
    torch.testing.assert_close(
        crf(emissions, tags, mask, reduction="none"), before, atol=1e-2, rtol=0
    )


def test_padding_has_no_influence():
    torch.manual_seed(0)
    crf = LinearChainCRF(4)
    emissions, tags, mask = some_batch(4, [7, 3], dtype=torch.float)
    alone = crf(emissions[1:, :3], tags[1:, :3], reduction="none")
    emissions[1, 3:], tags[1, 3:] = math.nan, 99
    emissions.requires_grad_()
    losses = crf(emissions, tags, mask, reduction="none")
    torch.testing.assert_close(losses[1:], alone)
    losses.sum().backward()
    assert (emissions.grad[1, 3:] == 0).all() and emissions.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float, torch.bfloat16, torch.half])
def test_low_precision_emissions(dtype):
    torch.manual_seed(0)
    crf = LinearChainCRF(6)
    emissions, tags, mask = some_batch(6, [30, 11])
    emissions = emissions.to(dtype).requires_grad_()
    loss = crf(emissions, tags, mask)
    expected = crf.double()(emissions.double(), tags, mask)
    assert loss.dtype == torch.float
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    loss.backward()
    assert emissions.grad.dtype == dtype


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu():
    torch.manual_seed(0)
    crf = LinearChainCRF(5, constraints=tag_constraints(BIO))
    emissions, _, mask = some_batch(5, [30, 11], dtype=torch.float)
    tags, _ = crf.viterbi(emissions, mask)
    results = []
    for device in ("cpu", "cuda"):
        crf = crf.to(device)
        leaf = emissions.to(device).requires_grad_()
        loss = crf(leaf, tags.to(device), mask.to(device))
        loss.backward()
        results.append((loss.cpu(), leaf.grad.cpu(), crf.marginals(leaf, mask.to(device)).cpu()))
        assert crf.decode(leaf, mask.to(device)) == [
            r[:n] for r, n in zip(tags.tolist(), [30, 11], strict=True)
        ]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_options():
    crf = LinearChainCRF(4, boundary_scores=False, init_range=0.0)
    assert [name for name, _ in crf.named_parameters()] == ["transitions"]
    assert (crf.transitions == 0).all()
    assert set(LinearChainCRF(4).state_dict()) == {"transitions", "start_scores", "end_scores"}
    again = LinearChainCRF(5, constraints=tag_constraints(BIO))
    again.load_state_dict(LinearChainCRF(5).state_dict())


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_constraints_allow_exactly_what_the_scheme_writes(scheme):
    """A bigram of tags is legal iff some sentence of non-overlapping spans contains it."""
    tags = SCHEMES[scheme]
    letters = {"BIO": "BIIB", "BIOES": "BIES", "BMES": "BMES"}[scheme]
    kinds = ["-X", "-Y"] if scheme != "BMES" else [""]

    def sentences(length):
        if length == 0:
            yield []
        for n in range(1, length + 1):
            word = letters[3] if n == 1 else letters[0] + letters[1] * (n - 2) + letters[2]
            pieces = [[letter + kind for letter in word] for kind in kinds]
            if n == 1 and "O" in tags:
                pieces.append(["O"])
            for rest in sentences(length - n):
                for piece in pieces:
                    yield piece + rest

    seen = list(sentences(5))
    constraints = tag_constraints(tags)
    for j, a in enumerate(tags):
        assert constraints.start[j] == any(s[0] == a for s in seen)
        assert constraints.end[j] == any(s[-1] == a for s in seen)
        for k, b in enumerate(tags):
            follows = any((a, b) in itertools.pairwise(s) for s in seen)
            assert constraints.transitions[j, k] == follows, (a, b)


def test_steps_to_reach_all_is_the_exponent():
    cycle = torch.tensor([[0, 1, 0], [0, 0, 1], [1, 0, 0]], dtype=torch.bool)
    assert steps_to_reach_all(cycle) == math.inf
    cycle[0, 0] = True
    assert steps_to_reach_all(cycle) == 4


def test_bad_input_is_named():
    crf = LinearChainCRF(5, constraints=tag_constraints(BIO))
    emissions, tags, mask = some_batch(5, [3, 2], dtype=torch.float)
    with pytest.raises(ValueError, match=r"gold tags of row 1 break the constraints: \[0, 2\]"):
        crf(emissions, torch.tensor([[0, 1, 2], [0, 2, 0]]), mask)
    with pytest.raises(ValueError, match=r"expected \(batch, length, 5\)"):
        crf(emissions[..., :4], tags)
    with pytest.raises(ValueError, match="mask has shape"):
        crf.decode(emissions, mask[:, :2])
    with pytest.raises(ValueError, match="first token"):
        crf.log_partition(emissions, torch.tensor([[True, False, True], [True, True, True]]))
    with pytest.raises(ValueError, match="first token"):
        crf.log_partition(emissions, torch.tensor([[False] * 3, [True] * 3]))
    with pytest.raises(ValueError, match="reduction 'avg'"):
        LinearChainCRF(5)(emissions, tags, mask, reduction="avg")
    with pytest.raises(ValueError, match="num_tags is 0"):
        LinearChainCRF(0)
    with pytest.raises(ValueError, match="tag 'X'"):
        tag_constraints(["O", "X"])
    wrong = TagConstraints(*(torch.ones(2, 2).bool(), torch.ones(2).bool(), torch.ones(2).bool()))
    with pytest.raises(ValueError, match=r"constraints.transitions has shape \(2, 2\) for 3"):
        LinearChainCRF(3, constraints=wrong)
