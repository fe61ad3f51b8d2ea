"""Language models to ask: the same answers from a local model, a stored trace and a real HTTP server."""

import json
import logging
import multiprocessing
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from compendium.models.client import (
    Client,
    LocalModel,
    ModelError,
    OpenAICompatible,
    Recording,
    Request,
    Response,
    ResponseCache,
    RowNoise,
    StoredTrace,
    Usage,
    cut,
    frozen_prompt,
    requests_of,
    weights_fingerprint,
)
from compendium.models.server import ModelServer, Reply, error_reply

KEY = "sk-very-secret-0123456789"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]  # fmt: skip
WARM = dict(temperature=1.0, max_new_tokens=8)
TRACE = {"a": ["0", "1", "2", "3", "4", "5"], "b": ["x", "y", "z", "u", "v", "w"]}


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def letters_tokenizer(chat_template=None):
    letters = ["<end>", *"abcdefghijklmnopqrstuvwxyz .:\n"]
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<end>", chat_template=chat_template
    )


def tiny_model(device="cpu", seed=0):
    torch.manual_seed(seed)
    ends = dict(bos_token_id=0, eos_token_id=0)
    config = GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=2, n_positions=96,
                        initializer_range=0.3, **ends)  # fmt: skip
    return GPT2LMHeadModel(config).to(device).eval()


@pytest.fixture(scope="module")
def local():
    return LocalModel(tiny_model(), letters_tokenizer(), tokens_per_batch=300)


def served(server, **options):
    return OpenAICompatible("local", server.base_url, "TEST_KEY", **dict(retries=2) | options)


# --- requests ---------------------------------------------------------------------------------


def test_one_message_of_the_user_is_its_text():
    assert frozen_prompt([{"role": "user", "content": "hi"}]) == "hi"
    pair = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    assert frozen_prompt(pair) == (("system", "s"), ("user", "hi"))
    assert Request(frozen_prompt(pair)).messages() == pair
    assert Request("hi").messages() == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("prompts", "options", "said"),
    [
        ("text", {}, "give a list"),
        ([3], {}, "a text or a list of messages"),
        ([[]], {}, "a text or a list of messages"),
        ([[{"role": "user"}]], {}, "a text or a list of messages"),
        (["a"], dict(n=3), "raise the temperature"),
        (["a"], dict(n=0), "at least 1"),
        (["a"], dict(max_new_tokens=0), "at least 1"),
        (["a"], dict(temperature=-1.0), "temperature=-1.0"),
        (["a"], dict(top_p=0.0), "top_p=0.0"),
        (["a"], dict(stop=["b", ""]), "stop text is empty"),
    ],
)
def test_senseless_requests_are_refused(prompts, options, said):
    with pytest.raises(ValueError, match=said):
        StoredTrace(TRACE).generate(prompts, **options)


def test_equal_prompts_get_the_next_samples():
    trace = StoredTrace(TRACE)
    assert trace.generate(["a", "b", "a"], temperature=1.0, n=2, seed=1) == [
        ["1", "2"],
        ["y", "z"],
        ["3", "4"],
    ]
    assert trace.generate(["a", "a"], temperature=1.0, n=2) == [["0", "1"], ["2", "3"]]
    assert trace.generate(["a", "a"]) == [["0"], ["0"]]
    assert [r.copy for r in requests_of(["a"] * 3, temperature=0.0)] == [0, 0, 0]


# --- the cache --------------------------------------------------------------------------------

requests = st.builds(
    Request,
    prompt=st.text(min_size=1, max_size=8)
    | st.tuples(st.tuples(st.just("system"), st.text(max_size=4))),
    max_new_tokens=st.integers(1, 3),
    temperature=st.sampled_from([0.5, 1.0]),
    n=st.just(1),
    stop=st.sampled_from([(), ("x",), ("x", "y")]),
    seed=st.sampled_from([None, 0, 1]),
    copy=st.integers(0, 1),
)


class Echo(Client):
    """Says what it was asked, and counts."""

    def __init__(self, cache=None, name="echo"):
        super().__init__(cache)
        self.name, self.asked = name, []

    @property
    def identity(self):
        return {"name": self.name}

    def answer(self, requests):
        for place, request in reversed(list(enumerate(requests))):
            self.asked.append(request)
            texts = tuple(f"{request.prompt}|{request.first_sample + i}" for i in range(request.n))
            yield place, Response(texts, ("stop",) * request.n, Usage(1, 0, 0, 10, 2 * request.n))


@settings(max_examples=40, deadline=None)
@given(st.lists(requests, min_size=2, max_size=6, unique=True))
def test_every_part_of_a_request_is_in_the_key(tmp_path_factory, some):
    cache = ResponseCache(tmp_path_factory.mktemp("cache"))
    client = Echo()
    asked = [client._asked(request) for request in some]
    assert len({cache.path(one) for one in asked}) == len(some)
    other = Echo(name="other")
    assert cache.path(other._asked(some[0])) != cache.path(asked[0])
    for number, one in enumerate(asked):
        cache.put(one, Response((str(number),), ("stop",)))
    assert [cache.get(one).texts for one in asked] == [(str(i),) for i in range(len(some))]


def test_a_second_run_asks_nothing(tmp_path):
    first, second = Echo(tmp_path), Echo(tmp_path)
    ask = dict(temperature=1.0, n=2, seed=5)
    assert first.generate(["a", "b"], **ask) == second.generate(["a", "b"], **ask)
    assert len(first.asked) == 2 and second.asked == []
    assert first.usage == Usage(2, 0, 0, 20, 8)
    assert second.usage == Usage(2, 2, 0, 20, 8, 20, 8)
    assert second.usage.cost(1, 1) == 0 and first.usage.cost(1e6, 2e6) == 20 + 16
    second.generate(["a"], temperature=1.0, n=2, seed=6)
    assert len(second.asked) == 1


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"asked": {}}', None])
def test_a_damaged_entry_counts_as_absent(tmp_path, damage):
    client = Echo(tmp_path)
    client.generate(["a"])
    (path,) = tmp_path.rglob("*.json")
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2] if damage is None else damage)
    assert client.generate(["a"]) == [["a|0"]]
    assert len(client.asked) == 2 and path.read_text() == whole


def test_an_entry_of_another_request_is_not_used(tmp_path):
    client = Echo(tmp_path)
    client.generate(["a"])
    (path,) = tmp_path.rglob("*.json")
    entry = json.loads(path.read_text())
    entry["asked"]["request"]["prompt"] = "b"
    path.write_text(json.dumps(entry))
    client.generate(["a"])
    assert len(client.asked) == 2


def _write(arguments):
    folder, number = arguments
    client = Echo(folder)
    client.generate([f"p{i}" for i in range(number % 3, 20)])
    return 0


def test_many_writers_leave_whole_files(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(_write, [(tmp_path, number) for number in range(24)]))
    with multiprocessing.get_context("fork").Pool(2) as processes:
        processes.map(_write, [(tmp_path, number) for number in range(4)])
    files = list(tmp_path.rglob("*"))
    assert len([f for f in files if f.suffix == ".json"]) == 20
    assert not [f for f in files if f.suffix == ".part"]
    reader = Echo(tmp_path)
    reader.generate([f"p{i}" for i in range(20)])
    assert reader.asked == []


# --- traces -----------------------------------------------------------------------------------


def test_a_trace_survives_a_file(tmp_path):
    talk = (("system", "be brief"), ("user", "hi"))
    trace = StoredTrace(TRACE | {talk: ["ho"]}, {"a": "best", "c": "only"})
    trace.save(tmp_path / "trace.jsonl")
    again = StoredTrace.load(tmp_path / "trace.jsonl")
    assert (again.samples, again.greedy) == (trace.samples, trace.greedy)
    assert again.generate(["a", "b", "c"]) == [["best"], ["x"], ["only"]]


def test_a_trace_that_is_too_short_says_what_is_missing(tmp_path):
    with pytest.raises(ModelError, match="has 6 and not samples 5 to 7 of 'a'"):
        StoredTrace(TRACE).generate(["a"], temperature=1.0, n=3, seed=5)
    with pytest.raises(ModelError, match="has 0"):
        StoredTrace(TRACE).generate(["unknown"])
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "samples": ["x"]}\n{"samples": []}\n')
    with pytest.raises(ValueError, match="line 2 is no row of a trace"):
        StoredTrace.load(tmp_path / "bad.jsonl")


def test_a_recording_replays(local):
    recording = Recording(local)
    first = recording.generate(["abc", "de"], n=3, seed=0, **WARM)
    more = recording.generate(["abc"], n=2, seed=3, **WARM)
    best = recording.generate(["abc"], max_new_tokens=8)
    trace = recording.trace()
    assert trace.generate(["abc"], n=5, seed=0, **WARM)[0] == first[0] + more[0]
    assert trace.generate(["de"], n=3, seed=0, **WARM)[0] == first[1]
    assert trace.generate(["abc"]) == best
    recording.generate(["de"], n=1, seed=7, **WARM)
    assert recording.trace().samples["de"] == first[1]  # sample 7 stands behind a gap


# --- a model in this process ------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_samples_do_not_depend_on_the_batch(device):
    model = tiny_model(device)
    prompts = ["abc", "a", "hello there", "zz"]
    wide = LocalModel(model, letters_tokenizer(), tokens_per_batch=10_000)
    narrow = LocalModel(model, letters_tokenizer(), tokens_per_batch=1)
    together = wide.generate(prompts, n=6, seed=2, **WARM)
    assert together == narrow.generate(prompts, n=6, seed=2, **WARM)
    alone = [wide.generate([prompt], n=6, seed=2, **WARM)[0] for prompt in prompts]
    assert together == alone
    assert wide.generate(prompts[:1], n=3, seed=5, **WARM)[0] == together[0][3:]
    assert len({text for texts in together for text in texts}) > 12


def test_first_tokens_follow_the_models_distribution(local):
    ids = torch.tensor([local.tokenizer("abc")["input_ids"]])
    logits = local.model(ids).logits[0, -1] / 0.7
    expected = logits.softmax(-1)
    ask = dict(max_new_tokens=1, temperature=0.7, n=3000)
    found = local.complete(["abc"], **ask)[0]
    counts = torch.zeros(31)
    for text in found.texts:
        counts[local.tokenizer(text)["input_ids"][0] if text else 0] += 1
    assert (counts / 3000 - expected).abs().max() < 0.035
    nucleus = local.complete(["abc"], top_p=0.3, **ask)[0]
    order = expected.argsort(descending=True)
    keep = int((expected[order].cumsum(0) < 0.3).sum()) + 1
    likely = {local.tokenizer.decode(t, skip_special_tokens=True) for t in order[:keep].tolist()}
    assert set(nucleus.texts) <= likely


def test_noise_is_the_gumbel_trick():
    scores = torch.randn(3, 50)
    noise = RowNoise([7, 8, 7], "cpu")
    noisy = noise(None, scores)
    waits = torch.empty(50).exponential_(generator=torch.Generator().manual_seed(8))
    torch.testing.assert_close(noisy[1], scores[1] - waits.log())
    torch.testing.assert_close(noisy[0] - scores[0], noisy[2] - scores[2])


def test_temperature_zero_is_greedy_search(local):
    for prompt in ("abc", "hello", "q"):
        ids = torch.tensor([local.tokenizer(prompt)["input_ids"]])
        best = local.model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0)
        text = local.tokenizer.decode(best[0, ids.shape[1] :], skip_special_tokens=True)
        assert local.generate(["longer prompt", prompt], max_new_tokens=9)[1] == [text]


def test_stop_texts_and_reasons(local):
    whole = local.complete(["abc", "hello", "so it goes"], n=8, seed=0, temperature=1.0, max_new_tokens=12)  # fmt: skip
    stopped = local.complete(
        ["abc", "hello", "so it goes"], n=8, seed=0, temperature=1.0, max_new_tokens=12,
        stop=["a", "e", "i"],
    )  # fmt: skip
    for before, after in zip(whole, stopped, strict=True):
        assert after.texts == tuple(cut(text, ["a", "e", "i"])[0] for text in before.texts)
        for text, reason, short in zip(before.texts, before.reasons, after.texts, strict=True):
            assert (reason == "length") == (len(text) == 12) or "\n" in text or reason == "stop"
            assert len(text) <= 12 and not set("aei") & set(short)
    assert {"stop", "length"} == {r for one in whole for r in one.reasons}


def test_tokens_are_counted(local):
    before = local.usage
    (found,) = local.complete(["hello"], n=5, seed=1, **WARM)
    written = sum(
        len(text) + (reason == "stop")
        for text, reason in zip(found.texts, found.reasons, strict=True)
    )
    assert local.usage - before == Usage(1, 0, 0, 5, written) == found.usage


def test_a_chat_template_is_used():
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }}.{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    talk = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
    (request,) = requests_of([talk], max_new_tokens=8)
    chat = LocalModel(tiny_model(), letters_tokenizer(template))
    plain = LocalModel(tiny_model(), letters_tokenizer(template), chat=False)
    ids = letters_tokenizer()("system:be.user:hi.assistant:")["input_ids"]
    assert chat.chat and chat.encode(request) == ids
    assert plain.encode(request) == letters_tokenizer()("be\n\nhi")["input_ids"]


def test_prompts_that_do_not_fit(local):
    with pytest.raises(ModelError, match=r"90 tokens and room for 8 more.*96 positions"):
        local.generate(["a" * 90], max_new_tokens=8)
    with pytest.raises(ModelError, match="no tokens"):
        local.generate([""], max_new_tokens=8)


def test_other_weights_are_another_model(tmp_path):
    model = tiny_model()
    fingerprint = weights_fingerprint(model)
    assert fingerprint == weights_fingerprint(tiny_model()) != weights_fingerprint(tiny_model(seed=1))  # fmt: skip
    first = LocalModel(model, letters_tokenizer(), cache=tmp_path).generate(["ab"], n=4, **WARM)
    again = LocalModel(tiny_model(), letters_tokenizer(), cache=tmp_path)
    other = LocalModel(tiny_model(seed=1), letters_tokenizer(), cache=tmp_path)
    assert again.generate(["ab"], n=4, **WARM) == first and again.usage.cached == 1
    assert other.generate(["ab"], n=4, **WARM) != first and other.usage.cached == 0


# --- over HTTP --------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [True, False])
def test_a_server_gives_what_the_model_gives(local, chat):
    prompts, ask = ["abc", "hello", "abc"], dict(n=4, seed=3, stop=["zq"], top_p=0.9, **WARM)
    with ModelServer(local, key=KEY) as server:
        remote = served(server, chat=chat)
        assert remote.generate(prompts, **ask) == local.generate(prompts, **ask)
        assert remote.generate(["abc"], max_new_tokens=5) == local.generate(["abc"], max_new_tokens=5)  # fmt: skip
        (response,) = remote.complete(["hello"], **ask)
        (expected,) = local.complete(["hello"], **ask)
    assert response == expected


def test_the_official_package_understands_the_server(local):
    import openai

    with ModelServer(local, key=KEY) as server:
        client = openai.OpenAI(api_key=KEY, base_url=server.base_url, max_retries=0)
        assert [model.id for model in client.models.list()] == ["local"]
        settings = dict(model="local", max_completion_tokens=6, temperature=0, n=1)
        reply = client.chat.completions.create(messages=[{"role": "user", "content": "abc"}], **settings)  # fmt: skip
        assert reply.choices[0].message.content == local.generate(["abc"], max_new_tokens=6)[0][0]
        assert reply.usage.prompt_tokens == 3
        with pytest.raises(openai.BadRequestError, match="streaming"):
            client.chat.completions.create(messages=[], stream=True, **settings)


def test_passing_failures_are_repeated_and_counted():
    replies = [error_reply(429, "busy", retry_after_ms="1"), error_reply(503, "down", retry_after_ms="1")]  # fmt: skip
    with ModelServer(StoredTrace(TRACE), fault=lambda n, body: dict(enumerate(replies)).get(n)) as server:  # fmt: skip
        remote = served(server, retries=3)
        assert remote.generate(["a"], temperature=1.0, n=2, seed=0) == [["0", "1"]]
        assert len(server.requests) == 3 and remote.usage.retries == 2
    with ModelServer(StoredTrace(TRACE), fault=lambda n, body: replies[0]) as server:
        remote = served(server, retries=1)
        with pytest.raises(ModelError, match="too busy, or the quota is spent, after 2 attempts"):
            remote.generate(["a"])
        assert len(server.requests) == 2 and remote.usage == Usage()


def test_a_lasting_failure_is_not_repeated():
    with ModelServer(StoredTrace(TRACE), key="another") as server:
        with pytest.raises(ModelError, match="refuses the key; set TEST_KEY"):
            served(server).generate(["a"])
        assert len(server.requests) == 1
    with ModelServer(StoredTrace(TRACE)) as server:
        wrong = OpenAICompatible("lokal", server.base_url, "TEST_KEY")
        with pytest.raises(ModelError, match="knows no model 'lokal'"):
            wrong.generate(["a"])
        with pytest.raises(ModelError, match=r"refuses the request.*has 6 and not"):
            served(server).generate(["a"], temperature=1.0, n=9)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (Reply(200, "<html>welcome</html>"), r"ends in /v1.*<html>welcome"),
        (Reply(200, {"object": "list", "data": []}), "ends in /v1"),
        (Reply(200, {"choices": []}), "ends in /v1"),
        (error_reply(403, "no"), "does not allow this key to use 'local'"),
        (error_reply(500, "oops", retry_after_ms="1"), r"failed after 3 attempts.*oops"),
        (error_reply(418, "teapot"), r"could not be asked.*teapot"),
    ],
)
def test_odd_replies_give_one_sentence(reply, said):
    with (
        ModelServer(StoredTrace(TRACE), fault=lambda n, body: reply) as server,
        pytest.raises(ModelError, match=said) as caught,
    ):
        served(server).generate(["a"])
    assert "\n" not in str(caught.value)


def test_no_server_and_no_time():
    nobody = OpenAICompatible("m", "http://127.0.0.1:9/v1", "TEST_KEY", retries=0, timeout=2)
    with pytest.raises(ModelError, match=r"no server answers at http://127.0.0.1:9/v1 after 1 att"):
        nobody.generate(["a"])
    with ModelServer(StoredTrace(TRACE), delay=0.6) as server:
        slow = served(server, retries=0, timeout=0.1)
        with pytest.raises(ModelError, match="did not answer in time"):
            slow.generate(["a"])


def test_requests_are_under_way_together():
    prompts = {f"p{i}": [str(i)] for i in range(12)}
    with ModelServer(StoredTrace(prompts), delay=0.15) as server:
        found = served(server, concurrency=6).generate(list(prompts))
        assert found == [[str(i)] for i in range(12)]
        assert 2 < server.most_at_once <= 6
    with ModelServer(StoredTrace(prompts), delay=0.02) as server:
        served(server, concurrency=1).generate(list(prompts))
        assert server.most_at_once == 1


def test_an_interrupted_run_does_not_pay_twice(tmp_path):
    prompts = {f"p{i}": [str(i)] for i in range(6)}
    broken = lambda n, body: error_reply(400, "no") if n == 3 else None  # noqa: E731
    with ModelServer(StoredTrace(prompts), fault=broken) as server:
        remote = served(server, concurrency=1, cache=tmp_path)
        with pytest.raises(ModelError, match="refuses the request"):
            remote.generate(list(prompts))
        paid = remote.usage.requests
        assert 3 <= paid < 6 and len(list(tmp_path.rglob("*.json"))) == paid
        assert remote.generate(list(prompts)) == [[str(i)] for i in range(6)]
        assert len(server.requests) == 7 and remote.usage.cached == paid


def test_a_server_that_gives_one_sample_at_a_time():
    with ModelServer(StoredTrace(TRACE), max_samples=1) as server:
        remote = served(server)
        (found,) = remote.complete(["a"], temperature=1.0, n=3, seed=2)
        assert found.texts == ("2", "3", "4") and len(server.requests) == 3
        assert found.usage.requests == 1


def test_what_is_sent():
    with ModelServer(StoredTrace(TRACE)) as server:
        remote = served(server, length_field="max_completion_tokens", extra={"reasoning_effort": "low"})  # fmt: skip
        remote.generate(["a"], temperature=0.5, max_new_tokens=7, n=2, seed=1, stop="x")
        served(server).generate(["b"])
    first, second = server.requests
    assert first == {
        "model": "local", "messages": [{"role": "user", "content": "a"}], "temperature": 0.5,
        "n": 2, "max_completion_tokens": 7, "seed": 1, "stop": ["x"], "reasoning_effort": "low",
    }  # fmt: skip
    assert set(second) == {"model", "messages", "temperature", "n", "max_tokens"}


def test_an_unmetered_server_is_no_error():
    choice = {"index": 0, "message": {"role": "assistant", "content": None}, "finish_reason": None}
    with ModelServer(StoredTrace({}), fault=lambda n, b: Reply(200, {"choices": [choice]})) as server:  # fmt: skip
        (found,) = served(server).complete(["a"])
    assert found == Response(("",), ("stop",), Usage(1))


# --- the key ----------------------------------------------------------------------------------


def test_the_key_appears_nowhere(tmp_path, caplog, capsys, local):
    """Servers that repeat the key in errors and answers, loggers at their loudest, and every file that was written."""
    caplog.set_level(logging.DEBUG)
    echo = {"index": 0, "message": {"role": "assistant", "content": f"your key is {KEY}"}, "finish_reason": "stop"}  # fmt: skip
    with ModelServer(StoredTrace(TRACE), key=KEY) as server:
        remote = served(server, cache=tmp_path)
        remote.generate(["a"])
    with ModelServer(StoredTrace(TRACE), fault=lambda n, b: Reply(200, {"choices": [echo]})) as server:  # fmt: skip
        talkative = served(server, cache=tmp_path)
        assert talkative.generate(["a"]) == [["your key is [key]"]]
    with ModelServer(StoredTrace(TRACE), key="another") as server:
        refused = served(server, cache=tmp_path)
        with pytest.raises(ModelError, match=r"incorrect key: \[key\]") as caught:
            refused.generate(["a"])
    shown = "".join(traceback.format_exception(caught.value))
    assert caught.value.__cause__ is None and caught.value.__context__ is None
    shown += repr(remote) + str(vars(remote)) + json.dumps(remote.identity) + str(remote.usage)
    shown += caplog.text + "".join(capsys.readouterr())
    shown += "".join(str(record.__dict__) for record in caplog.records)
    for path in tmp_path.rglob("*"):
        shown += str(path) + (path.read_text() if path.is_file() else "")
    assert "DEBUG" in shown and len(list(tmp_path.rglob("*.json"))) == 2
    assert KEY not in shown and KEY[3:] not in shown


def test_addresses_and_missing_keys():
    with pytest.raises(ValueError, match="put the key into the environment variable TEST_KEY") as caught:  # fmt: skip
        OpenAICompatible("m", f"https://user:{KEY}@example.org/v1", "TEST_KEY")
    assert KEY not in str(caught.value)
    with pytest.raises(ModelError, match="set NO_SUCH_KEY, or give base_url"):
        OpenAICompatible("m", key_variable="NO_SUCH_KEY")
    assert OpenAICompatible("m", key_variable="TEST_KEY").base_url == "https://api.openai.com/v1"


def test_usage_adds_up():
    some = Usage(2, 1, 3, 100, 50, 40, 20)
    assert some + some - some == some and some.total_tokens == 150
    assert some.cost(10, 20) == pytest.approx((60 * 10 + 30 * 20) / 1e6)
    assert replace(some, cached=0) != some
