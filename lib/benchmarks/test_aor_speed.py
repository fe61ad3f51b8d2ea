"""AoR asks for many questions at once; the client costs little beside the package it stands on; samples come in batches."""

import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from compendium.generation.aor import AoR, ChatGenerator, ChatJudge
from compendium.models.client import LocalModel, OpenAICompatible, StoredTrace
from compendium.models.server import ModelServer

KEY = "sk-0123456789"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)


class Model(StoredTrace):
    """Chains with two answers, and verdicts that prefer neither."""

    def _stored(self, request):
        text = request.messages()[-1]["content"]
        labels = re.findall(r"^(.*) Total Score: X/10", text, re.M)
        if labels:
            return ["\n".join(f"{label} Total Score: 8/10" for label in labels)]
        first = request.first_sample
        return [f"way {i}. The answer is {i % 2}" for i in range(first, first + request.n)]


def seconds(way, repeats=3):
    """The best of some runs, after one to warm up."""
    best = float("inf")
    for repeat in range(repeats + 1):
        begin = time.perf_counter()
        way()
        if repeat:
            best = min(best, time.perf_counter() - begin)
    return best


def test_many_questions_against_one_after_the_other():
    """A server that takes 30 ms a request: what counts is how many requests are under way."""
    questions = [f"question {i}" for i in range(16)]
    with ModelServer(Model({}), key=KEY, delay=0.03) as server:
        client = OpenAICompatible("local", server.base_url, "TEST_KEY", concurrency=16)
        judge = ChatJudge(client)
        method = AoR(ChatGenerator(client), judge, judge, n_init=10, n_max=20)
        expected = [method.predict([question])[0].answer for question in questions]
        assert [result.answer for result in method.predict(questions)] == expected
        alone = seconds(lambda: [method.predict([question]) for question in questions], 1)
        together = seconds(lambda: method.predict(questions), 1)
    print(f"{16 / together:.1f} questions/s together, {16 / alone:.1f} one by one (x{alone / together:.1f})")  # fmt: skip
    assert alone / together >= 2.0


def test_the_client_against_the_bare_package(tmp_path):
    """128 short requests to a server without delay, 8 under way; the client writes its cache meanwhile."""
    import openai

    prompts = {f"prompt {i}": [str(i)] for i in range(128)}
    with ModelServer(StoredTrace(prompts), key=KEY) as server:
        bare = openai.OpenAI(api_key=KEY, base_url=server.base_url)

        def ask(prompt):
            settings = dict(model="local", temperature=0, max_tokens=5)
            reply = bare.chat.completions.create(messages=[{"role": "user", "content": prompt}], **settings)  # fmt: skip
            return reply.choices[0].message.content

        def plain():
            with ThreadPoolExecutor(8) as pool:
                return list(pool.map(ask, prompts))

        turns = iter(range(100))

        def ours():
            client = OpenAICompatible("local", server.base_url, "TEST_KEY", cache=tmp_path / str(next(turns)))  # fmt: skip
            return [texts[0] for texts in client.generate(list(prompts), max_new_tokens=5)]

        assert plain() == ours()
        theirs, mine = seconds(plain), seconds(ours)
        again = OpenAICompatible("local", server.base_url, "TEST_KEY", cache=tmp_path / "0")
        cached = seconds(lambda: again.generate(list(prompts), max_new_tokens=5))
    print(f"{128 / mine:.0f} requests/s, bare {128 / theirs:.0f} (x{theirs / mine:.2f}), cached {128 / cached:.0f} (x{theirs / cached:.0f})")  # fmt: skip
    assert theirs / mine >= 0.5
    assert theirs / cached >= 5.0


def test_batched_samples_against_one_at_a_time():
    """40 samples of 8 prompts: one batch with a stream a row, against the library's own sampling prompt by prompt."""
    torch.manual_seed(0)
    words = ["<pad>", "<end>", *(f"w{i}" for i in range(500))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>")  # fmt: skip
    ends = dict(bos_token_id=1, eos_token_id=1, pad_token_id=0, n_positions=64)
    config = GPT2Config(vocab_size=502, n_embd=64, n_layer=2, n_head=4, **ends)
    model = GPT2LMHeadModel(config).to(DEVICE).eval()
    prompts = [" ".join(f"w{i * j % 500}" for j in range(3 + i)) for i in range(8)]
    client = LocalModel(model, tokenizer)

    def library():
        for prompt in prompts:
            ids = tokenizer(prompt, return_tensors="pt").to(DEVICE)
            model.generate(**ids, do_sample=True, top_k=0, max_new_tokens=16, num_return_sequences=40)  # fmt: skip

    torch.set_num_threads(1)
    theirs = seconds(library)
    ours = seconds(lambda: client.generate(prompts, temperature=1.0, n=40, max_new_tokens=16))
    print(f"{320 / ours:.0f} samples/s in one batch, {320 / theirs:.0f} prompt by prompt (x{theirs / ours:.2f})")  # fmt: skip
    assert theirs / ours >= 1.0
