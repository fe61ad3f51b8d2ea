"""AdaLomo and LOMO: parity with four implementations, the fused way, state, memory, sharding."""

import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from compendium.language_models.adalomo import (
    AdaLomo,
    GradientMeter,
    Lomo,
    averaged,
    memory_model,
    state_bytes,
)

BOTH = pytest.mark.parametrize("make", [AdaLomo, Lomo], ids=["AdaLomo", "Lomo"])


def network(dtype=torch.float32, seed=0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.LayerNorm(10), nn.Linear(10, 4)).to(dtype)


def batches(num_steps=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(12, 6, generator=generator).to(dtype) for _ in range(num_steps)]


def loss_of(model, inputs):
    return (model(inputs) - inputs[:, :4].sin()).square().mean()


def train(model, optimizer, fused=False, num_steps=5, start=0):
    dtype = next(model.parameters()).dtype
    for inputs in batches(num_steps, dtype)[start:]:
        loss = loss_of(model, inputs)
        if fused:
            optimizer.fused_backward(loss)
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def assert_same(ours, theirs, atol=0.0):
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=atol, rtol=0)


# Parity


def test_equals_the_adafactor_of_transformers():
    from transformers import Adafactor

    for decay in (0.0, 0.1):
        model, other = network(torch.float64), network(torch.float64)
        options = dict(scale_parameter=True, relative_step=False, warmup_init=False)
        reference = Adafactor(other.parameters(), lr=0.02, weight_decay=decay, **options)
        ours = train(model, AdaLomo(model, lr=0.02, weight_decay=decay), fused=True)
        assert_same(ours, train(other, reference), atol=1e-14)


def test_equals_the_adafactor_of_torch():
    model, other = network(torch.float64), network(torch.float64)
    reference = torch.optim.Adafactor(
        other.parameters(), lr=0.02, beta2_decay=-0.8, eps=(None, 1e-3), d=1.0, weight_decay=0.0
    )
    ours = train(model, AdaLomo(model, lr=0.02), fused=True)
    assert_same(ours, train(other, reference), atol=1e-14)


@pytest.mark.parametrize("shape", [(3, 4, 5), (6, 3, 3, 3), (4, 5, 1), (1, 7), (5, 1), (7,), ()])
def test_equals_the_adafactor_of_transformers_for_any_number_of_dimensions(shape):
    from transformers import Adafactor

    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    theirs = nn.Parameter(ours.detach().clone())
    options = dict(scale_parameter=True, relative_step=False, warmup_init=False)
    optimizer, reference = AdaLomo([ours], lr=0.1), Adafactor([theirs], lr=0.1, **options)
    for _ in range(4):
        gradient = torch.randn(shape, dtype=torch.float64)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, atol=1e-13, rtol=0)


@pytest.mark.parametrize("name", ["AdaLomo", "Lomo"])
def test_equals_the_authors_package(name, monkeypatch):
    lomo_optim = pytest.importorskip("lomo_optim")
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor, *_: tensor)  # it wants a GPU
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    monkeypatch.setenv("LOCAL_RANK", "0")
    model, other = network(), network()
    theirs = getattr(lomo_optim, name)(other, lr=0.05)
    ours = {"AdaLomo": AdaLomo, "Lomo": Lomo}[name](model, lr=0.05)
    for inputs in batches():
        ours.fused_backward(loss_of(model, inputs), 0.05)
        theirs.fused_backward(loss_of(other, inputs), 0.05)
    assert_same(model.parameters(), other.parameters(), atol=5e-7 if name == "AdaLomo" else 1e-7)


def test_equals_pytorch_optimizer():
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
    model, other = network(), network()
    ours = AdaLomo(model, lr=0.05, weight_decay=0.1)
    theirs = pytorch_optimizer.AdaLOMO(other, lr=0.05, weight_decay=0.1)
    for inputs in batches():
        ours.fused_backward(loss_of(model, inputs))
        theirs.fused_backward(loss_of(other, inputs), 0.05)
    assert_same(model.parameters(), other.parameters(), atol=5e-7)


def test_lomo_is_sgd_to_the_last_bit():
    model, other = network(), network()
    ours = train(model, Lomo(model, lr=0.1), fused=True)
    assert_same(ours, train(other, torch.optim.SGD(other.parameters(), lr=0.1)))


def test_each_switch_changes_its_part_only():
    plain = nn.Parameter(torch.tensor([[3.0, -4.0], [1.0, 2.0]]))
    plain.grad = torch.tensor([[0.5, -2.0], [4.0, 1.0]])
    start, gradient = plain.detach().clone(), plain.grad.clone()
    AdaLomo([plain], lr=0.1, factored=False, clip_threshold=None, scale_parameter=False).step()
    torch.testing.assert_close(plain.detach(), start - 0.1 * gradient.sign())  # v = g²
    plain.data.copy_(start)
    AdaLomo([plain], lr=0.1, factored=False, clip_threshold=0.5, scale_parameter=False).step()
    torch.testing.assert_close(plain.detach(), start - 0.05 * gradient.sign())
    plain.data.copy_(start)
    AdaLomo([plain], lr=0.1, factored=False).step()
    size = 0.1 * start.square().mean().sqrt()
    torch.testing.assert_close(plain.detach(), start - size * gradient.sign())


# The fused way


@BOTH
@pytest.mark.parametrize("options", [{}, {"clip_grad_norm": 0.1}, {"clip_grad_value": 0.01}])
def test_fused_and_stepped_agree(make, options):
    model, other = network(), network()
    fused = train(model, make(model, lr=0.05, **options), fused=True)
    stepped = train(other, make(other, lr=0.05, **options))
    assert_same(fused, stepped, atol=1e-6 if "clip_grad_norm" in options else 0.0)
    plain = network()
    train(plain, make(plain, lr=0.05))
    if make is Lomo and options:  # the bound must have been felt
        assert not torch.equal(plain[0].weight, model[0].weight)


@BOTH
def test_no_gradient_is_left_and_frozen_weights_have_no_state(make):
    model = network()
    model[0].weight.requires_grad_(False)
    frozen, optimizer = model[0].weight.clone(), make(model, lr=0.1)
    train(model, optimizer, fused=True)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(model[0].weight, frozen)
    assert model[0].weight not in optimizer.state


def test_attached_it_works_in_an_ordinary_loop():
    model, other = network(), network()
    optimizer = AdaLomo(model, lr=0.05).attach()
    assert_same(train(model, optimizer), train(other, AdaLomo(other, lr=0.05)))
    optimizer.detach()
    loss_of(model, batches()[0]).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_accumulation_is_refused_when_fused():
    model = network()
    attached = AdaLomo(model).attach()
    loss_of(model, batches()[0]).backward()
    attached.step()
    loss_of(model, batches()[1]).backward()
    with pytest.raises(RuntimeError, match="cannot be accumulated in fused mode"):
        loss_of(model, batches()[1]).backward()


def test_waiting_gradients_are_refused():
    model = network()
    loss_of(model, batches()[0]).backward()
    with pytest.raises(RuntimeError, match="gradients are waiting"):
        AdaLomo(model).fused_backward(loss_of(model, batches()[0]))


def test_norm_clipping_needs_the_fused_call():
    model = network()
    optimizer = AdaLomo(model, clip_grad_norm=1.0).attach()
    with pytest.raises(RuntimeError, match="two backward passes"):
        loss_of(model, batches()[0]).backward()
    optimizer.fused_backward(loss_of(model, batches()[0]))


def test_two_attached_optimizers_are_noticed():
    model = network()
    attached = [AdaLomo(model).attach(), Lomo(model).attach()]
    with pytest.raises(RuntimeError, match="another optimizer"):
        loss_of(model, batches()[0]).backward()
    assert len(attached) == 2


def test_a_dropped_optimizer_leaves_the_model_alone():
    model = network()
    AdaLomo(model).attach()
    loss_of(model, batches()[0]).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_tied_weights_get_their_whole_gradient():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embedding = nn.Embedding(9, 6)
            self.head = nn.Linear(6, 9, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids):
            return F.cross_entropy(self.head(self.embedding(ids).tanh()), ids)

    ids, models = torch.arange(9), (Tied(), Tied())
    for model, fused in zip(models, (True, False), strict=True):
        optimizer = AdaLomo(model, lr=0.1)
        for _ in range(3):
            if fused:
                optimizer.fused_backward(model(ids))
            else:
                model(ids).backward()
                optimizer.step()
                optimizer.zero_grad()
    assert_same(models[0].parameters(), models[1].parameters())


@pytest.mark.parametrize(
    ("reentrant", "options"), [(True, {}), (False, {}), (False, {"clip_grad_norm": 0.1})]
)
def test_activation_checkpointing_changes_nothing(reentrant, options):
    models = network(torch.float64), network(torch.float64)
    for model, checkpointed in zip(models, (True, False), strict=True):
        optimizer = AdaLomo(model, lr=0.05, **options)
        for inputs in batches(3, torch.float64):
            inputs.requires_grad_()
            hidden = (
                checkpoint(model[:2], inputs, use_reentrant=reentrant)
                if checkpointed
                else model[:2](inputs)
            )
            optimizer.fused_backward((model[2:](hidden) - 1).square().mean())
    assert_same(models[0].parameters(), models[1].parameters(), atol=1e-15)


def test_gradients_that_share_memory_are_not_overwritten():
    torch.manual_seed(0)
    first, second = (nn.Parameter(torch.randn(2, 3)) for _ in range(2))
    copies = [nn.Parameter(p.detach().clone()) for p in (first, second)]
    for parameters, fused in (((first, second), True), (copies, False)):
        loss = (parameters[0].reshape(6) + parameters[1].reshape(6)).sin().sum()
        optimizer = AdaLomo(parameters, lr=0.1)
        if fused:
            optimizer.fused_backward(loss)
        else:
            loss.backward()
            optimizer.step()
    assert_same((first, second), copies)


# Properties


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_scale_of_the_loss_does_not_matter(scale):
    models = network(torch.float64), network(torch.float64)
    for model, factor in zip(models, (1.0, scale), strict=True):
        optimizer = AdaLomo(model, lr=0.05)
        for inputs in batches(3, torch.float64):
            optimizer.fused_backward(loss_of(model, inputs) * factor)
    assert_same(models[0].parameters(), models[1].parameters(), atol=1e-12)


def test_a_step_is_bounded_by_the_rate_and_the_weights():
    model = network()
    optimizer = AdaLomo(model, lr=0.03)
    for number, inputs in enumerate(batches()):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.fused_backward(loss_of(model, inputs * 10**number))
        for p, old in zip(model.parameters(), before, strict=True):
            bound = 0.03 * max(1e-3, old.square().mean().sqrt().item())
            assert (p - old).square().mean().sqrt().item() <= bound * (1 + 1e-4)


def test_loss_scale_cancels():
    models = network(torch.float64), network(torch.float64)
    for model, scale in zip(models, (1.0, 1024.0), strict=True):
        train(model, Lomo(model, lr=0.05, loss_scale=scale, clip_grad_norm=0.1), fused=True)
    assert_same(models[0].parameters(), models[1].parameters(), atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_updated_in_32_bits(dtype):
    model, wide = network().to(dtype), network().to(dtype).float()
    optimizer, reference = AdaLomo(model, lr=0.01), AdaLomo(wide, lr=0.01)
    inputs = batches()[0]
    loss_of(model, inputs.to(dtype)).backward()
    for p, q in zip(model.parameters(), wide.parameters(), strict=True):
        q.grad = p.grad.float()
    optimizer.step()
    reference.step()
    for p, q in zip(model.parameters(), wide.parameters(), strict=True):
        assert torch.equal(p, q.to(dtype))
    states = [x for state in optimizer.state.values() for x in state.values()]
    assert {x.dtype for x in states if isinstance(x, torch.Tensor)} == {torch.float32}


@BOTH
@pytest.mark.parametrize("options", [{}, {"clip_grad_norm": 0.1, "weight_decay": 0.1}])
def test_an_update_never_waits_for_the_device(make, options):
    from torch.utils._python_dispatch import TorchDispatchMode

    called = set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.add(str(function))
            return function(*args, **(kwargs or {}))

    model = network()
    optimizer = make(model, lr=0.1, **options)
    loss_of(model, batches()[0]).backward()
    with Recorder():
        optimizer.step()
    assert any("add" in name for name in called)
    assert not any("_local_scalar_dense" in name for name in called)


# Groups, schedules, state


def test_groups_have_their_own_options():
    model, other = network(), network()
    groups = [
        {"params": model[0].parameters(), "lr": 0.1, "weight_decay": 0.5},
        {"params": model[2].parameters(), "lr": 0.0},
        {"params": model[3].parameters()},
    ]
    train(model, AdaLomo(groups, lr=0.01), fused=True, num_steps=1)
    separate = [AdaLomo(other[0].parameters(), lr=0.1, weight_decay=0.5)]
    separate += [AdaLomo(other[3].parameters(), lr=0.01)]
    loss_of(other, batches()[0]).backward()
    for optimizer in separate:
        optimizer.step()
    assert_same(model.parameters(), other.parameters())


def test_a_group_can_be_added_to_an_attached_optimizer():
    model, other = network(), network()
    optimizer = AdaLomo(model[3].parameters(), lr=0.05).attach()
    optimizer.add_param_group({"params": [*model[0].parameters(), *model[2].parameters()]})
    assert_same(train(model, optimizer), train(other, AdaLomo(other, lr=0.05)))


def test_a_given_rate_keeps_the_groups_in_proportion():
    models = network(), network()
    for model, given in zip(models, (True, False), strict=True):
        rates = (0.02, 0.04) if given else (0.1, 0.2)
        groups = [{"params": model[0].parameters(), "lr": rates[0]}]
        groups += [{"params": model[3].parameters(), "lr": rates[1]}]
        loss = loss_of(model, batches()[0])
        optimizer = AdaLomo(groups)
        optimizer.fused_backward(loss, 0.1 if given else None)
        assert optimizer.param_groups[0]["lr"] == rates[0]
    assert_same(models[0].parameters(), models[1].parameters(), atol=1e-7)


def test_schedulers_work_without_a_warning():
    model = network()
    optimizer = AdaLomo(model, lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for inputs in batches(3):
            optimizer.fused_backward(loss_of(model, inputs))
            schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0125)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factored", [True, False])
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(dtype, factored):
    model, half = network(dtype), network(dtype)
    whole = train(model, AdaLomo(model, lr=0.05, factored=factored), fused=True, num_steps=5)
    first = AdaLomo(half, lr=0.05, factored=factored)
    train(half, first, fused=True, num_steps=2)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = AdaLomo(copy.deepcopy(half), lr=0.9, factored=factored)
    resumed = network(dtype)
    resumed.load_state_dict(half.state_dict())
    second = AdaLomo(resumed, lr=0.9, factored=factored)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert_same(train(resumed, second, fused=True, num_steps=5, start=2), whole)


def test_a_foreign_state_is_refused():
    model, other = network(), network()
    optimizer = AdaLomo(model, factored=False)
    train(model, optimizer)
    saved = optimizer.state_dict()
    saved["state"][0]["variance"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"'variance' of shape \(3, 3\) does not fit"):
        AdaLomo(other, factored=False).load_state_dict(saved)


def test_loading_the_state_keeps_the_optimizer_attached():
    model = network()
    optimizer = AdaLomo(model, lr=0.05).attach()
    train(model, optimizer, num_steps=2)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.param_groups[0]["lr"] = 0.0
    before = model[0].weight.detach().clone()
    train(model, optimizer, num_steps=2)
    assert torch.equal(model[0].weight, before)  # the new groups' rate counts


def test_a_loaded_state_is_a_copy():
    model = network()
    first, second = AdaLomo(model, lr=0.05), AdaLomo(model, lr=0.05)
    train(model, first)
    second.load_state_dict(first.state_dict())
    kept = first.state[model[0].weight]["row"].clone()
    train(model, second)
    assert torch.equal(first.state[model[0].weight]["row"], kept)


def test_a_closure_is_called():
    model = network()
    optimizer = AdaLomo(model, lr=0.05)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, batches()[0])
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


def test_copies_and_pickles_still_train():
    model = network()
    optimizer = AdaLomo(model, lr=0.05, clip_grad_norm=1.0)
    train(model, optimizer, fused=True, num_steps=1)
    twin = copy.deepcopy(optimizer)
    parameters = [p for group in twin.param_groups for p in group["params"]]
    before = parameters[0].detach().clone()
    for p in parameters:
        p.grad = torch.ones_like(p)
    twin.step()
    assert twin.clip_grad_norm == 1.0
    assert not torch.equal(parameters[0], before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be at least 0, not -1.0"),
        ({"decay_rate": 0.8}, "decay_rate must be negative"),
        ({"clip_threshold": 0.0}, "clip_threshold must be positive"),
        ({"eps": (1e-30,)}, "eps must be two numbers"),
        ({"clip_grad_norm": 0.0}, "clip_grad_norm"),
        ({"loss_scale": 0.0}, "loss_scale"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AdaLomo(network(), **options)


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    with pytest.raises(TypeError, match="dense and real"):
        AdaLomo(embedding).fused_backward(embedding(torch.tensor([1])).sum())


# Memory


@pytest.mark.parametrize(
    "make",
    [
        AdaLomo,
        Lomo,
        lambda p: AdaLomo(p, factored=False),
        torch.optim.AdamW,
        lambda p: torch.optim.Adam(p, amsgrad=True),
        torch.optim.Adafactor,
        torch.optim.SGD,
        lambda p: torch.optim.SGD(p, momentum=0.9),
    ],
)
def test_the_state_is_predicted_exactly(make):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4, 5))
    optimizer = make(model.parameters())
    predicted = memory_model(model, optimizer)
    model(torch.randn(2, 2, 3, 3)).square().sum().backward()
    optimizer.step()
    held = [x for state in optimizer.state.values() for x in state.values()]
    assert predicted["state"] == sum(x.nbytes for x in held if isinstance(x, torch.Tensor))
    assert memory_model(model, optimizer) == predicted


def test_unknown_state_is_not_guessed():
    model = network()
    with pytest.raises(ValueError, match="take one step first"):
        memory_model(model, torch.optim.RMSprop(model.parameters()))


@pytest.mark.parametrize("clip", [None, 1.0])
def test_the_largest_tensor_is_the_peak_of_gradients(clip):
    model = network()
    optimizer = AdaLomo(model, clip_grad_norm=clip)
    with GradientMeter(model) as meter:
        optimizer.fused_backward(loss_of(model, batches()[0]))
    assert meter.peak_bytes == memory_model(model, optimizer)["gradients"] == 10 * 6 * 4
    with GradientMeter(model) as meter:
        optimizer.detach()
        loss_of(model, batches()[0]).backward()
    assert meter.peak_bytes == sum(p.nbytes for p in model.parameters())


def test_memory_of_a_large_model_is_counted_without_it():
    with torch.device("meta"):
        model = nn.Linear(100_000, 50_000, bias=False).to(torch.bfloat16)
    counts = memory_model(model, AdaLomo(model))
    assert counts["parameters"] == counts["gradients"] == 2 * 5 * 10**9
    assert counts["state"] == 4 * 150_000
    assert counts["workspace"] == 3 * 4 * 5 * 10**9  # 32 bits: gradient, weight, update
    assert state_bytes(model.weight, torch.optim.AdamW(model.parameters())) == 2 * 10**10 + 4


# Frameworks


def test_accelerate_prepares_and_drives_it():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    plain, model = network(), network()
    optimizer = AdaLomo(model, lr=0.05)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    optimizer.optimizer.attach()
    for inputs in batches(3):
        accelerator.backward(loss_of(model, inputs))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    expected = AdaLomo(plain, lr=0.05)
    halves = torch.optim.lr_scheduler.ExponentialLR(expected, 0.5)
    for inputs in batches(3):
        expected.fused_backward(loss_of(plain, inputs))
        halves.step()
    assert_same(model.parameters(), plain.parameters())


def test_the_training_loop_drives_it():
    from compendium.training.loop import TrainingConfig
    from compendium.training.loop import train as train_loop

    models = network(), network()
    data = [{"x": x} for x in batches(1)[0]]
    settings = dict(num_steps=4, batch_size=4, learning_rate=0.05, seed=3, warmup_ratio=0.25)
    for model, make in zip(models, (AdaLomo, UnfusedAdaLomo), strict=True):
        optimizer = make(model, lr=0.05)
        config = TrainingConfig(**settings)
        train_loop(model, data, config, loss=lambda m, b: loss_of(m, b["x"]), optimizer=optimizer)
    assert_same(models[0].parameters(), models[1].parameters())
    assert not torch.equal(models[0][0].weight, network()[0].weight)


class UnfusedAdaLomo(torch.optim.Optimizer):
    """AdaLomo without the method by which the training loop recognizes a fused optimizer."""

    def __init__(self, model, lr):
        self.inner = AdaLomo(model, lr=lr)
        super().__init__(model.parameters(), {"lr": lr})

    def step(self, closure=None):
        for group in self.inner.param_groups:
            group["lr"] = self.param_groups[0]["lr"]
        return self.inner.step(closure)


# Several processes


def _join(rank, port, queue):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        everything = batches(4, torch.float64)
        # sharded
        model = network(torch.float64)
        mesh = init_device_mesh("cpu", (2,))
        for layer in (model[0], model[3]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = AdaLomo(model, lr=0.05, clip_grad_norm=0.5)
        fired = []
        for p in model.parameters():
            p.register_hook(lambda gradient, p=p: fired.append(p))
        for inputs in everything[:2]:
            optimizer.fused_backward(loss_of(model, inputs[rank::2]))
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for inputs in everything[2:]:
            optimizer.fused_backward(loss_of(model, inputs[rank::2]))
        sharded = [p.full_tensor().detach().tolist() for p in model.parameters()]
        empty = all(p.grad is None for p in model.parameters())
        # replicated
        model = network(torch.float64)
        optimizer = AdaLomo(model, lr=0.05)
        try:
            optimizer.fused_backward(loss_of(model, everything[0][rank::2]))
            refusal = ""
        except RuntimeError as error:
            refusal = str(error)
        optimizer.attach(process_group=dist.group.WORLD)
        for p, q in zip(model.parameters(), network(torch.float64).parameters(), strict=True):
            p.data.copy_(q)
        for inputs in everything:
            optimizer.fused_backward(loss_of(model, inputs[rank::2]))
        replicated = [p.detach().tolist() for p in model.parameters()]
        if rank == 0:
            queue.put((sharded, empty, refusal, replicated))
    finally:
        dist.destroy_process_group()


def test_sharded_and_replicated_training_equal_one_process():
    import socket

    import torch.multiprocessing as mp

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    workers = mp.start_processes(_join, (port, queue), nprocs=2, join=False, start_method="spawn")
    while not workers.join(timeout=60):
        pass
    sharded, empty, refusal, replicated = queue.get()
    for result, options in ((sharded, {"clip_grad_norm": 0.5}), (replicated, {})):
        model = network(torch.float64)
        expected = train(model, AdaLomo(model, lr=0.05, **options), num_steps=4)
        ours = [torch.tensor(values, dtype=torch.float64) for values in result]
        assert_same(ours, expected, atol=1e-6)
    assert empty
    assert "shard the model with fully_shard" in refusal


def test_one_process_needs_no_average():
    gradient = torch.ones(3)
    assert averaged(gradient) is gradient
