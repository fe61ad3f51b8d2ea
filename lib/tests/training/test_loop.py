"""The training loop against written-out loops, and one process against two."""

import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import IterableDataset
from transformers import GPT2Config, GPT2LMHeadModel, get_scheduler

from compendium.training.loop import (
    ShuffledBatches,
    StepPlan,
    TrainingConfig,
    TrainingError,
    build_schedule,
    count_labels,
    precision_context,
    split_batch,
    step_loader,
    train,
)


class Pairs(torch.utils.data.Dataset):
    def __init__(self, size: int = 23, seed: int = 3):
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(size, 4, generator=generator)
        self.targets = torch.tanh(self.inputs.sum(1, keepdim=True))

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return self.inputs[index], self.targets[index]


def network(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def squared_error(model, batch):
    inputs, targets = batch
    return ((model(inputs) - targets) ** 2).mean()


def config(**values) -> TrainingConfig:
    base = {"num_steps": 12, "batch_size": 5, "log_every": 1, "device": "cpu"}
    if "num_epochs" in values:
        del base["num_steps"]
    return TrainingConfig(**base | values)


def weights(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


# --- against a loop written out by hand -----------------------------------------------------------


@pytest.mark.parametrize("clip", [{}, {"clip_norm": 0.05}, {"clip_value": 0.01}])
def test_equals_a_written_out_loop(clip):
    data, settings_ = Pairs(), config(learning_rate=0.01, warmup_ratio=0.25, seed=7, **clip)
    model = network()
    result = train(model, data, settings_, loss=squared_error, optimizer=torch.optim.AdamW)

    peer, losses = network(), []
    optimizer = torch.optim.AdamW(peer.parameters(), lr=0.01)
    schedule = get_scheduler("linear", optimizer, 3, 12)
    generator, step = torch.Generator().manual_seed(7), 0
    while step < 12:
        order = torch.randperm(len(data), generator=generator)
        for indices in order.split(5):
            loss = squared_error(peer, (data.inputs[indices], data.targets[indices]))
            loss.backward()
            if "clip_norm" in clip:
                torch.nn.utils.clip_grad_norm_(peer.parameters(), 0.05)
            if "clip_value" in clip:
                torch.nn.utils.clip_grad_value_(peer.parameters(), 0.01)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            step += 1
            if step == 12:
                break
    assert result.losses == pytest.approx(losses, rel=1e-6)
    torch.testing.assert_close(weights(model), weights(peer))


def test_same_seed_same_bits_and_the_global_generator_does_not_matter():
    runs = []
    for noise in (0, 1):
        model = network()
        torch.manual_seed(noise)
        runs.append((train(model, Pairs(), config(), loss=squared_error).losses, weights(model)))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])
    other = train(network(), Pairs(), config(seed=1), loss=squared_error)
    assert other.losses != runs[0][0]


def test_the_loop_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    model = network()
    torch.manual_seed(5)
    train(model, Pairs(), config(), loss=squared_error)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert drawn.item() == torch.rand(1).item()


@pytest.mark.parametrize("parts", [2, 3, 5, 8])
def test_accumulation_changes_nothing(parts):
    # 23 examples in batches of 5: the last batch of 3 splits unevenly, or into empty parts.
    models = network(), network()
    whole = train(models[0], Pairs(), config(), loss=squared_error)
    split = train(models[1], Pairs(), config(accumulation_steps=parts), loss=squared_error)
    assert split.losses == pytest.approx(whole.losses, abs=1e-6)
    torch.testing.assert_close(weights(models[0]), weights(models[1]), atol=1e-5, rtol=1e-4)


def language_examples():
    generator = torch.Generator().manual_seed(0)
    examples = []
    for length in (3, 9, 5, 12, 4, 7, 11, 6):
        tokens = torch.randint(1, 20, (length,), generator=generator)
        padding = torch.zeros(12 - length, dtype=torch.long)
        mask = torch.cat([torch.ones(length, dtype=torch.long), padding])
        ids = torch.cat([tokens, padding])
        labels = ids.masked_fill(mask == 0, -100)
        examples.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return examples


def tiny_gpt():
    torch.manual_seed(0)
    sizes = dict(vocab_size=20, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))


def test_token_losses_accumulate_exactly_with_weight_of():
    settings_ = config(batch_size=8, num_steps=6, learning_rate=1e-2)
    in_parts = replace(settings_, accumulation_steps=4)
    weigh = partial(count_labels, shift=1)
    whole = train(tiny_gpt(), language_examples(), settings_)
    split = train(tiny_gpt(), language_examples(), in_parts, weight_of=weigh)
    unweighted = train(tiny_gpt(), language_examples(), in_parts)
    assert split.losses == pytest.approx(whole.losses, abs=1e-5)
    assert max(abs(a - b) for a, b in zip(unweighted.losses, whole.losses, strict=True)) > 1e-3


# --- data -----------------------------------------------------------------------------------------


@given(st.lists(st.integers(), max_size=40), st.integers(1, 9))
def test_split_batch_is_contiguous_and_even(batch, parts):
    pieces = split_batch(batch, parts)
    assert [item for piece in pieces for item in piece] == batch
    assert len(pieces) == parts
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 1


@given(st.integers(1, 30), st.integers(1, 8), st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_the_processes_share_every_batch(examples, size, processes, accumulation):
    settings_ = TrainingConfig(num_epochs=1, batch_size=size, seed=1)
    plans = [
        list(StepPlan(ShuffledBatches(examples, settings_), accumulation, processes, rank))
        for rank in range(processes)
    ]
    whole = list(ShuffledBatches(examples, settings_))
    for step, batch in enumerate(whole):
        parts = [part for plan in plans for part in plan[step]]
        assert [item for items, weight in parts if weight for item in items] == batch
        assert math.isclose(sum(weight for _, weight in parts), 1)
        assert len(parts) == processes * accumulation and all(items for items, _ in parts)


def test_every_pass_has_a_new_order_and_all_examples():
    batches = ShuffledBatches(20, config())
    first, second = [sum(batches, []) for _ in range(2)]  # noqa: RUF017
    assert sorted(first) == sorted(second) == list(range(20)) and first != second


class Stream(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return (self.data[index] for index in range(len(self.data)))


def test_an_iterable_data_set_equals_the_unshuffled_one():
    plain = train(network(), Pairs(), config(shuffle=False), loss=squared_error)
    stream = train(network(), Stream(Pairs()), config(), loss=squared_error)
    assert stream.losses == plain.losses
    with pytest.raises(ValueError, match="num_steps instead of num_epochs"):
        train(network(), Stream(Pairs()), config(num_epochs=1), loss=squared_error)


def test_workers_do_not_change_the_order():
    alone = train(network(), Pairs(), config(), loss=squared_error)
    helped = train(network(), Pairs(), config(num_workers=1), loss=squared_error)
    assert alone.losses == helped.losses


def test_sampler_and_batch_sampler():
    order = [3, 1, 4, 1, 5, 9, 2, 6]
    loader, steps = step_loader(list(range(10)), config(batch_size=3), list, sampler=order)
    assert steps == 3
    assert [parts[0][0] for parts in loader] == [[3, 1, 4], [1, 5, 9], [2, 6]]
    batches = [[0], [1, 2, 3], [4, 5]]
    loader, steps = step_loader(list(range(10)), config(), list, batch_sampler=batches)
    assert [parts[0][0] for parts in loader] == batches and steps == 3


@pytest.mark.parametrize("data", [[], iter([])])
def test_no_data(data):
    with pytest.raises(ValueError, match="no batch to train on"):
        train(network(), data, config(), loss=squared_error)


def test_drop_last_can_leave_nothing():
    with pytest.raises(ValueError, match="drop_last"):
        train(network(), Pairs(3), config(drop_last=True), loss=squared_error)


# --- schedules, optimizers ------------------------------------------------------------------------


def test_learning_rates_are_those_of_the_schedule():
    result = train(
        network(), Pairs(), config(learning_rate=0.1, schedule="cosine"), loss=squared_error
    )
    rates = [entry["lr"] for entry in result.history]
    cosine = [0.1 * 0.5 * (1 + math.cos(math.pi * step / 12)) for step in range(12)]
    assert rates == pytest.approx(cosine)
    decay = config(learning_rate=0.1, schedule=lambda step: 1 / (1 + 0.5 * step))
    result = train(network(), Pairs(), decay, loss=squared_error)
    assert result.history[4]["lr"] == pytest.approx(0.1 / 3)


def test_weight_decay_spares_vectors():
    model = network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    settings_ = config(num_steps=1, learning_rate=0.1, weight_decay=0.5, schedule="constant")
    train(model, Pairs(), settings_, loss=lambda model, batch: model(batch[0]).sum() * 0)
    assert torch.all(model[0].weight < 1) and torch.all(model[0].bias == 1)


def test_an_optimizer_instance_keeps_its_groups_and_rates():
    model = network()
    groups = [
        {"params": model[0].parameters(), "lr": 0.0},
        {"params": model[2].parameters(), "lr": 0.1},
    ]
    before = model[0].weight.clone(), model[2].weight.clone()
    train(model, Pairs(), config(), loss=squared_error, optimizer=torch.optim.SGD(groups))
    assert torch.equal(model[0].weight, before[0]) and not torch.equal(model[2].weight, before[1])


class FusedDescent(torch.optim.Optimizer):
    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})
        self.rates = []
        for parameter in self.param_groups[0]["params"]:
            parameter.register_post_accumulate_grad_hook(self.update)

    def update(self, parameter):
        parameter.data.add_(parameter.grad, alpha=-self.rates[-1])
        parameter.grad = None

    def fused_backward(self, loss, lr):
        self.rates.append(lr)
        loss.backward()


@pytest.mark.filterwarnings("error")
def test_fused_backward_equals_sgd():
    models = network(), network()
    optimizer = FusedDescent(models[0].parameters(), lr=0.1)
    settings_ = config(learning_rate=0.1, warmup_ratio=0.5)
    fused = train(models[0], Pairs(), settings_, loss=squared_error, optimizer=optimizer)
    plain = train(models[1], Pairs(), settings_, loss=squared_error, optimizer=torch.optim.SGD)
    assert fused.losses == pytest.approx(plain.losses)
    assert optimizer.rates == [entry["lr"] for entry in plain.history]
    assert all(parameter.grad is None for parameter in models[0].parameters())


@pytest.mark.parametrize(
    "values", [{"clip_norm": 1.0}, {"clip_value": 1.0}, {"accumulation_steps": 2}]
)
def test_fused_backward_refuses_what_needs_all_gradients(values):
    with pytest.raises(TrainingError, match="FusedDescent"):
        train(network(), Pairs(), config(**values), loss=squared_error, optimizer=FusedDescent)


def test_mixed_precision_runs_matrix_products_in_bfloat16():
    seen = []

    def loss(model, batch):
        output = model(batch[0])
        seen.append(output.dtype)
        return squared_error(model, batch)

    for precision in ("auto", "bf16", "no"):
        train(network(), Pairs(), config(num_steps=1, mixed_precision=precision), loss=loss)
    assert seen == [torch.float32, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("grad", [True, False])
def test_bfloat16_attention_on_a_cpu_is_plain_where_its_gradient_is_wanted(grad):
    """The fused kernel of the CPU is slow on its way back; without gradients it is the faster one."""
    heads = torch.randn(1, 2, 4, 8, requires_grad=True)
    attention = torch.nn.functional.scaled_dot_product_attention
    with (
        torch.set_grad_enabled(grad),
        precision_context("bf16", torch.device("cpu"))(),
        torch.profiler.profile() as profile,
    ):
        states = attention(heads, heads, heads)
    assert states.dtype == torch.bfloat16
    fused = any("flash" in event.key for event in profile.key_averages())
    assert fused is not grad


# --- evaluation -----------------------------------------------------------------------------------


def scripted(values, name="f1"):
    rest, models = iter(values), []

    def evaluate(model):
        assert not model.training and not torch.is_grad_enabled()
        models.append(weights(model))
        return {name: next(rest), "other": 0.0}

    return evaluate, models


@pytest.mark.parametrize("mode, best", [("max", 3), ("min", 1)])
def test_best_weights_come_back(mode, best):
    values = [0.5, 0.2, float("nan"), 0.9, 0.3, 0.4]
    evaluate, snapshots = scripted(values)
    model = network()
    settings_ = config(evaluate_every=2, metric="f1", mode=mode)
    result = train(model, Pairs(), settings_, loss=squared_error, evaluate=evaluate)
    assert result.best_metric == values[best] and result.best_step == 2 * (best + 1)
    assert torch.equal(weights(model), snapshots[best])
    assert result.metrics["f1"] == values[best] and not result.stopped_early
    assert not model.training


def test_patience_stops():
    evaluate, snapshots = scripted([0.1, 0.3, 0.3, 0.2, 0.9, 0.9])
    settings_ = config(evaluate_every=2, metric="f1", patience=2)
    result = train(network(), Pairs(), settings_, loss=squared_error, evaluate=evaluate)
    assert result.stopped_early and result.num_steps == 8 and len(snapshots) == 4
    assert result.best_step == 4


def test_patience_that_ends_with_the_last_step_is_not_early():
    evaluate, _ = scripted([0.3, 0.2])
    settings_ = config(evaluate_every=6, metric="f1", patience=1)
    result = train(network(), Pairs(), settings_, loss=squared_error, evaluate=evaluate)
    assert not result.stopped_early and result.num_steps == 12


@pytest.mark.parametrize(
    "every, count", [(1, 12), (5, 3), (6, 2), ("epoch", 3), ("end", 1), (100, 1)]
)
def test_evaluation_is_due(every, count):
    evaluate, snapshots = scripted([0.0] * 20)
    train(network(), Pairs(), config(evaluate_every=every), loss=squared_error, evaluate=evaluate)
    assert len(snapshots) == count  # 5 steps an epoch, and always at the end


def test_log_and_history_agree():
    entries = []
    evaluate, _ = scripted([0.5] * 20)
    settings_ = config(log_every=4, evaluate_every=6)
    result = train(
        network(), Pairs(), settings_, loss=squared_error, evaluate=evaluate,
        log=lambda **entry: entries.append(entry),
    )  # fmt: skip
    assert entries == result.history
    assert [entry["step"] for entry in entries] == [4, 6, 6, 8, 12, 12]
    every_step = train(network(), Pairs(), config(), loss=squared_error).losses
    means = [sum(every_step[:4]) / 4, sum(every_step[4:6]) / 2, sum(every_step[6:8]) / 2]
    assert result.losses[:3] == pytest.approx(means)


def test_seconds_without_evaluation():
    evaluate, _ = scripted([0.5] * 20)
    result = train(network(), Pairs(), config(), loss=squared_error, evaluate=evaluate)
    assert 0 < result.training_seconds < result.seconds


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("log_every", [1, 4, 100])
def test_a_bad_loss_names_its_step(log_every):
    steps = iter(range(1, 100))

    def loss(model, batch):
        return squared_error(model, batch) * (float("nan") if next(steps) == 7 else 1.0)

    with pytest.raises(TrainingError, match=r"nan at step 7 "):
        train(network(), Pairs(), config(log_every=log_every), loss=loss)


def test_bad_weights_after_the_last_step_are_found():
    def loss(model, batch):  # finite, with an infinite gradient
        return torch.sqrt(model(batch[0]).sum() * 0)

    with pytest.raises(TrainingError, match="not finite after step 1"):
        train(network(), Pairs(), config(num_steps=1), loss=loss)


def test_missing_metric_and_evaluate():
    evaluate, _ = scripted([0.5] * 20)
    with pytest.raises(TrainingError, match="no metric 'accuracy'; it returned: f1, other"):
        train(network(), Pairs(), config(metric="accuracy"), loss=squared_error, evaluate=evaluate)
    with pytest.raises(ValueError, match="no evaluate function"):
        train(network(), Pairs(), config(metric="f1"), loss=squared_error)


def test_a_model_without_labels():
    examples = [{"input_ids": torch.tensor([1, 2, 3])}] * 4
    with pytest.raises(TrainingError, match="no loss: put labels"):
        train(tiny_gpt(), examples, config())


def test_a_frozen_model():
    model = network().requires_grad_(False)
    with pytest.raises(TrainingError, match="no trainable parameter"):
        train(model, Pairs(), config(), loss=squared_error)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is missing")
def test_a_missing_gpu():
    with pytest.raises(TrainingError, match="'cuda' is not available"):
        train(network(), Pairs(), config(device="cuda"), loss=squared_error)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"num_epochs": 1}, "exactly one"),
        ({"num_steps": None}, "exactly one"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"num_steps": 1.5}, "num_steps=1.5"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": True}, "batch_size=True"),
        ({"learning_rate": -1}, "learning_rate=-1"),
        ({"learning_rate": float("inf")}, "learning_rate=inf"),
        ({"clip_norm": 0}, "clip_norm=0"),
        ({"warmup_ratio": 10}, "warmup_ratio=10"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"mixed_precision": "fp8"}, "auto, bf16, no"),
        ({"mode": "best"}, "max, min"),
        ({"device": "tpu"}, "auto, cpu, cuda"),
        ({"evaluate_every": "day"}, "evaluate_every='day'"),
        ({"evaluate_every": 0}, "evaluate_every=0"),
        ({"patience": 2}, "name a metric"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**{"num_steps": 1} | values)


def test_settings_are_frozen():
    with pytest.raises(FrozenInstanceError):
        config().seed = 1


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "inverse_sqrt", "polynomial"])
def test_every_named_schedule_warms_up(name):
    optimizer = torch.optim.SGD(network().parameters(), lr=0.1)
    schedule = build_schedule(optimizer, config(schedule=name, warmup_ratio=0.5), 12)
    rates = []
    for _ in range(12):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:6] == pytest.approx([0.1 * step / 6 for step in range(6)])


# --- two processes --------------------------------------------------------------------------------

SCRIPT = """
import json, sys
import torch
sys.path.insert(0, {tests!r})
from test_loop import run_everything
result = run_everything()
if result is not None:
    open({output!r}, "w").write(json.dumps(result))
torch.distributed.destroy_process_group()
"""


def run_everything():
    """Loss curves, metrics and final weights: example losses, ragged batches, token losses."""
    from accelerate.state import PartialState

    def mean_error(model):
        return {"error": squared_error(model, (Pairs().inputs, Pairs().targets)).item()}

    curves = {"processes": PartialState(cpu=True).num_processes}
    for name, values in {
        "plain": {},
        "accumulated": {"accumulation_steps": 2, "clip_norm": 0.1},
    }.items():
        model = network()
        settings_ = config(
            metric="error", mode="min", evaluate_every=3, learning_rate=0.05, **values
        )
        result = train(
            model, Pairs(), settings_, loss=squared_error, evaluate=mean_error,
            optimizer=torch.optim.SGD,  # unlike Adam, it sees the gradients' scale
        )  # fmt: skip
        curves[name] = [*result.losses, result.best_metric, *weights(model).tolist()]
    tokens = config(batch_size=4, num_steps=6, learning_rate=1e-2)
    weigh = partial(count_labels, shift=1)
    curves["tokens"] = train(tiny_gpt(), language_examples(), tokens, weight_of=weigh).losses
    try:
        train(network(), Pairs(), config(), loss=squared_error, optimizer=FusedDescent)
    except TrainingError as error:
        curves["refused"] = str(error)
    return curves if PartialState().is_main_process else None


def launched_twice(script: Path) -> None:
    """Run `script` under `accelerate launch` in two processes of one gloo group, as Slurm would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    processes = []
    for rank in ("0", "1"):
        place = group | {"MASTER_PORT": str(port), "RANK": rank, "LOCAL_RANK": rank}
        environment = os.environ | place | {"OMP_NUM_THREADS": "1"}
        command = [*launch, str(script)]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        processes.append(process)
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors[0][-3000:]


def test_two_processes_have_the_curve_of_one(tmp_path):
    alone = run_everything()
    script, output = tmp_path / "script.py", tmp_path / "curves.json"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), output=str(output)))
    launched_twice(script)
    together = json.loads(output.read_text())
    assert (alone.pop("processes"), together.pop("processes")) == (1, 2)
    assert "one process only" in together.pop("refused")
    assert together.keys() == alone.keys() == {"plain", "accumulated", "tokens"}
    for name, curve in alone.items():
        assert together[name] == pytest.approx(curve, abs=1e-5), name
