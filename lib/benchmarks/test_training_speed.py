"""What the training loop costs over a bare PyTorch loop that does the same updates."""

import time

import torch
from transformers import BertConfig, BertForMaskedLM, get_scheduler

from compendium.training.loop import TrainingConfig, train

NUM_STEPS, BATCH = 40, 8


def examples() -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 500, (NUM_STEPS * BATCH, 24), generator=generator)
    mask = torch.ones_like(ids)
    return [
        {"input_ids": row, "attention_mask": ones, "labels": row}
        for row, ones in zip(ids, mask, strict=True)
    ]


def small_model() -> BertForMaskedLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return BertForMaskedLM(BertConfig(vocab_size=500, num_attention_heads=2, **sizes))


def bare_loop(model, data) -> float:
    model.train()
    start = time.perf_counter()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    schedule = get_scheduler("linear", optimizer, 0, NUM_STEPS)
    loader = torch.utils.data.DataLoader(data, batch_size=BATCH, shuffle=True)
    for batch in loader:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        loss.item()
    return (time.perf_counter() - start) / NUM_STEPS


def our_loop(model, data) -> float:
    config = TrainingConfig(num_epochs=1, batch_size=BATCH, clip_norm=1.0, device="cpu")
    return train(model, data, config).seconds / NUM_STEPS


def test_the_loop_costs_little():
    data = examples()
    bare_loop(small_model(), data), our_loop(small_model(), data)  # warm up
    rounds = [(our_loop(small_model(), data), bare_loop(small_model(), data)) for _ in range(7)]
    ours, bare = (min(seconds) for seconds in zip(*rounds, strict=True))
    print(f"a step: {1e3 * ours:.2f} ms here, {1e3 * bare:.2f} ms bare; {ours / bare:.2f} times")
    assert ours / bare <= 1.25
