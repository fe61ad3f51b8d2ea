"""Exit policies against their definitions row by row, and compaction against running every row alone."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compendium.models.early_exit import (
    ConfidenceExit,
    EntropyExit,
    FixedExit,
    PatienceExit,
    entropy,
    run_with_exits,
    simulate_exits,
    take_exits,
)

POLICIES = [
    EntropyExit(0.0),
    EntropyExit(0.5),
    EntropyExit(0.4, normalised=True),
    EntropyExit(5.0),
    ConfidenceExit(0.6),
    PatienceExit(1),
    PatienceExit(2),
    PatienceExit(9),
    FixedExit(2),
]


def by_definition(policy, rows):
    """The exit of one row from its list of logits, with plain Python numbers."""
    counter, previous = 0, None
    for index, logits in enumerate(rows):
        z = [math.exp(x) for x in logits]
        p = [x / sum(z) for x in z]
        if isinstance(policy, EntropyExit):
            value = -sum(x * math.log(x) for x in p if x > 0)
            leaves = value / (math.log(len(p)) if policy.normalised else 1) < policy.threshold
        elif isinstance(policy, ConfidenceExit):
            leaves = max(p) > policy.threshold
        elif isinstance(policy, PatienceExit):
            answer = logits[0] if policy.tolerance else logits.index(max(logits))
            if previous is not None:
                near = (
                    abs(answer - previous) < policy.tolerance
                    if policy.tolerance
                    else answer == previous
                )
                counter = counter + 1 if near else 0
            previous = answer
            leaves = counter >= policy.patience
        else:
            leaves = index >= policy.exit
        if leaves:
            return index
    return len(rows) - 1


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_simulated_exits_follow_the_definition(policy):
    torch.manual_seed(0)
    logits = 2 * torch.randn(5, 60, 3)
    expected = [by_definition(policy, logits[:, i].tolist()) for i in range(60)]
    assert simulate_exits(policy, logits).tolist() == expected


def test_patience_of_a_regression():
    torch.manual_seed(0)
    logits = torch.randn(6, 80, 1)
    for tolerance in (0.1, 0.7, 3.0):
        policy = PatienceExit(2, tolerance)
        expected = [by_definition(policy, logits[:, i].tolist()) for i in range(80)]
        assert simulate_exits(policy, logits).tolist() == expected


def test_policies_take_more_axes():
    """Token by token is the same as tokens as rows."""
    torch.manual_seed(0)
    logits = torch.randn(4, 3, 7, 5)
    for policy in POLICIES:
        flat = simulate_exits(policy, logits.flatten(1, 2)).view(3, 7)
        assert torch.equal(simulate_exits(policy, logits), flat)
        chosen = take_exits(logits, flat)
        for b in range(3):
            for n in range(7):
                assert torch.equal(chosen[b, n], logits[flat[b, n], b, n])


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=8))
@settings(deadline=None)
def test_entropy_is_torchs_and_within_its_bounds(values):
    logits = torch.tensor(values)
    found = entropy(logits)
    expected = torch.distributions.Categorical(logits=logits.double()).entropy()
    torch.testing.assert_close(found.double(), expected, atol=2e-4, rtol=1e-4)
    assert -1e-6 <= found <= math.log(len(values)) + 1e-5


def test_entropy_of_minus_infinity_is_that_of_the_rest():
    logits = torch.tensor([0.3, -1.0, -math.inf])
    torch.testing.assert_close(entropy(logits), entropy(logits[:2]))
    assert entropy(torch.zeros(4), normalised=True) == pytest.approx(1.0)


@given(st.floats(0.0, 1.2), st.floats(0.0, 1.2))
@settings(max_examples=30, deadline=None)
def test_a_larger_threshold_never_leaves_later(a, b):
    torch.manual_seed(0)
    logits = torch.randn(5, 40, 3)
    low, high = (simulate_exits(EntropyExit(t), logits) for t in sorted((a, b)))
    assert (high <= low).all()


def test_extremes():
    torch.manual_seed(0)
    logits = torch.randn(4, 30, 3)
    assert (simulate_exits(EntropyExit(0.0), logits) == 3).all()
    assert (simulate_exits(EntropyExit(math.log(3) + 1e-3), logits) == 0).all()
    assert (simulate_exits(PatienceExit(4), logits) == 3).all()
    assert simulate_exits(PatienceExit(2), logits).min() >= 2


# --- running -----------------------------------------------------------------------------------


def encoder(num_layers=5, size=16, num_classes=3, exits=(1, 2, 4)):
    torch.manual_seed(1)
    blocks = [
        torch.nn.TransformerEncoderLayer(size, 2, 32, 0.0, batch_first=True, dtype=torch.double)
        for _ in range(num_layers)
    ]
    weights = {layer: torch.randn(size, num_classes, dtype=torch.double) for layer in exits}
    calls = []

    def layer_of(block, number):
        def run(hidden, mask):
            calls.append((number, len(hidden), hidden.shape[1]))
            return block(hidden, src_key_padding_mask=mask)

        return run

    layers = [layer_of(block, number) for number, block in enumerate(blocks, 1)]
    heads = {layer: lambda hidden, w=w: hidden[:, 0] @ w for layer, w in weights.items()}
    return layers, heads, calls


def padding(mask, hidden):
    return None if mask is None else ~mask.bool()


def some_batch(rows=9, width=7):
    torch.manual_seed(2)
    lengths = torch.randint(1, width + 1, (rows,))
    lengths[0] = width
    mask = (torch.arange(width) < lengths[:, None]).long()
    return torch.randn(rows, width, 16, dtype=torch.double), mask, lengths.tolist()


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_compaction_equals_every_row_alone(policy):
    layers, heads, _ = encoder()
    hidden, mask, lengths = some_batch()
    with torch.no_grad():
        together = run_with_exits(layers, heads, policy, hidden, mask, padding)
        for row, length in enumerate(lengths):
            alone = run_with_exits(layers, heads, policy, hidden[row : row + 1, :length])
            assert alone.exit_layer.item() == together.exit_layer[row].item()
            torch.testing.assert_close(alone.logits[0], together.logits[row])


@pytest.mark.parametrize("exits", [(1, 2, 4), (1, 2, 3, 4, 5)], ids=len)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_running_equals_simulating(policy, exits):
    layers, heads, _ = encoder(exits=exits)
    hidden, mask, _ = some_batch()
    stored, states = [], hidden
    with torch.no_grad():
        for number, layer in enumerate(layers, 1):
            states = layer(states, ~mask.bool())
            if number in heads:
                stored.append(heads[number](states))
        found = run_with_exits(layers, heads, policy, hidden, mask, padding)
    chosen = simulate_exits(policy, torch.stack(stored))
    assert found.exit_layer.tolist() == [sorted(heads)[i] for i in chosen.tolist()]
    torch.testing.assert_close(found.logits, take_exits(torch.stack(stored), chosen))


class LongestFirst:
    """Row i leaves at exit `wanted[i]`; its state must follow it."""

    def __init__(self, wanted):
        self.wanted = wanted

    def step(self, logits, state):
        state = state or {"wanted": self.wanted, "seen": torch.zeros_like(self.wanted)}
        leaves = state["seen"] >= state["wanted"]
        return leaves, {"wanted": state["wanted"], "seen": state["seen"] + 1}


def test_finished_rows_and_their_padding_cost_nothing():
    layers, heads, calls = encoder()
    hidden, mask, lengths = some_batch()
    wanted = torch.tensor([0 if n > 5 else 1 if n > 3 else 2 for n in lengths])
    assert set(wanted.tolist()) == {0, 1, 2}, "the example must leave at every exit"
    with torch.no_grad():
        found = run_with_exits(layers, heads, LongestFirst(wanted), hidden, mask, padding)
    exit_layer = found.exit_layer.tolist()
    assert exit_layer == [sorted(heads)[i] for i in wanted.tolist()]
    for number, rows, width in calls:
        alive = [n for n, left in zip(lengths, exit_layer, strict=True) if left >= number]
        assert (rows, width) == (len(alive), max(alive))
    assert found.rows_per_layer == [rows for _, rows, _ in calls]
    assert max(number for number, _, _ in calls) == max(exit_layer)  # layer 5 has no exit


def test_mistakes_are_named():
    layers, heads, _ = encoder()
    hidden, _, _ = some_batch()
    with pytest.raises(ValueError, match="there is no exit"):
        run_with_exits(layers, {}, FixedExit(0), hidden)
    with pytest.raises(ValueError, match="exit after layer 6, but the layers are 1 to 5"):
        run_with_exits(layers, {**heads, 6: heads[1]}, FixedExit(0), hidden)
    with pytest.raises(ValueError, match="two classes or more"):
        entropy(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="threshold -1"):
        EntropyExit(-1)
    with pytest.raises(ValueError, match="threshold nan"):
        EntropyExit(math.nan)
    with pytest.raises(ValueError, match="patience 0"):
        PatienceExit(0)
