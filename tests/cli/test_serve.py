"""The server by OpenAI's own client, and by clients that behave badly."""

import json
import math
import random
import re
import shlex
import shutil
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("openai")

import openai

from opt_cli.backends import load_backend
from opt_cli.serving.chat import Template
from opt_cli.serving.text import TextPieces
from opt_core import GenerationConfig, OPTTokenizer
from opt_core.hub import resolve
from tests.support.serving import (
    Limits,
    Metrics,
    Server,
    make_worker,
    serving,
    wait_until,
    write_template,
)

PROMPT = "ROMEO:"
SAME = 2e-5


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server of "mini" with a key, a chat template and tight limits."""
    metrics = Metrics()
    worker = make_worker(metrics)
    template = Template(write_template(tmp_path_factory.mktemp("chat")))
    limits = Limits(body=100_000, body_seconds=1, key="secret")
    with serving(Server([worker], limits, metrics, template)) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
        raw = httpx.Client(base_url=url, headers={"Authorization": "Bearer secret"}, timeout=60)
        yield SimpleNamespace(url=url, client=client, raw=raw, worker=worker)
        client.close()
        raw.close()


def written(served, prompt=PROMPT, **settings):
    """The ids and the text of `generate` alone."""
    ids = prompt if isinstance(prompt, list) else served.worker.tokenizer.encode(prompt)
    seed = settings.pop("seed", None)
    made = served.worker.model.generate(  # with OpenAI's defaults in place of the model's
        [ids], [[1] * len(ids)], GenerationConfig(**settings), seed, served.worker.tokenizer
    )
    new = np.asarray(made)[0, len(ids) :].tolist()
    return new, served.worker.tokenizer.decode(new, skip_special_tokens=True)


def complete(served, **fields):
    return served.client.completions.create(**{"model": "mini", "prompt": PROMPT, **fields})


def idle(served) -> bool:
    return served.worker.scheduler.is_idle


def test_texts_are_those_of_generate(served):
    """Each choice has the seed after the last one's; each prompt is as if it were alone."""
    found = complete(served, prompt=[PROMPT, "JULIET:"], n=2, max_tokens=12, seed=5, top_p=0.9)
    alone = [
        written(served, prompt, max_new_tokens=12, seed=seed, top_p=0.9, top_k=0, do_sample=True)
        for prompt in (PROMPT, "JULIET:")
        for seed in (5, 6)
    ]
    assert [choice.text for choice in found.choices] == [text for _, text in alone]
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert found.usage.completion_tokens == sum(len(ids) for ids, _ in alone)
    assert found.usage.prompt_tokens == sum(
        len(served.worker.tokenizer.encode(prompt)) for prompt in (PROMPT, "JULIET:")
    )
    assert found.id.startswith("cmpl-")


def test_settings_of_openai_and_those_beside_them(served):
    ids = served.worker.tokenizer.encode("The king")
    comma = served.worker.tokenizer.encode(",", add_special_tokens=False)[0]
    found = complete(
        served, prompt=ids, max_tokens=20, temperature=0.7, seed=9, logit_bias={str(comma): 3},
        stop=["th", "zzz"], extra_body={"top_k": 30, "repetition_penalty": 1.2, "min_p": 0.01,
        "min_tokens": 3},
    )  # fmt: skip
    _, text = written(
        served, ids, max_new_tokens=20, temperature=0.7, seed=9, do_sample=True, top_k=30,
        repetition_penalty=1.2, min_p=0.01, min_new_tokens=3, sequence_bias={(comma,): 3.0},
        stop_strings=["th", "zzz"],
    )  # fmt: skip
    assert found.choices[0].text == text.partition("th")[0]
    assert found.choices[0].finish_reason == ("stop" if "th" in text else "length")
    greedy = complete(served, max_tokens=7, temperature=0).choices[0]
    assert greedy.text == written(served, max_new_tokens=7, do_sample=False)[1]
    assert greedy.finish_reason == "length"


def random_fields(source: random.Random) -> dict[str, Any]:
    """A prompt of any characters, and settings of any kind."""
    alphabet = "abcde THE,.;\n\0é世🙂\u200d\u0301\ufffd"
    fields: dict[str, Any] = {
        "prompt": "".join(source.choices(alphabet, k=source.choice([0, 1, 9, 70]))),
        "max_tokens": source.choice([1, 20, 60]), "seed": source.randrange(-(2**63), 2**63),
        "temperature": source.choice([0, 0.3, 1, 3]), "top_p": source.choice([1, 0.5]),
        "top_k": source.choice([-1, 1, 5, 400]), "min_p": source.choice([None, 0.05]),
        "repetition_penalty": source.choice([1, 1.5]), "min_tokens": source.choice([None, 1]),
        "stop": source.choice([None, "e", ["\n", "th", "the"], ["ou", "u s"], "🙂"]),
        "stream": source.random() < 0.5,
    }  # fmt: skip
    return {name: value for name, value in fields.items() if value is not None}


def test_any_settings_side_by_side(served):
    """Whatever the others ask for, each text is the one of `generate` up to its stop string."""
    source = random.Random(2)
    every = [random_fields(source) for _ in range(24)]

    def ask(fields):
        answer = served.raw.post("/v1/completions", json={"model": "mini", **fields})
        assert answer.status_code == 200, (fields, answer.text)
        if not fields["stream"]:
            return answer.json()["choices"][0]["text"]
        events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        assert events.pop() == "[DONE]"
        return "".join(json.loads(event)["choices"][0]["text"] for event in events)

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(ask, every))
    for fields, text in zip(every, texts, strict=True):
        stops = fields.get("stop", [])
        stops = [stops] if isinstance(stops, str) else stops
        _, alone = written(
            served, fields["prompt"], max_new_tokens=fields["max_tokens"],
            seed=fields["seed"] % 2**63, do_sample=fields["temperature"] != 0,
            temperature=fields["temperature"] or 1.0, top_p=fields["top_p"],
            top_k=max(fields["top_k"], 0), min_p=fields.get("min_p"),
            repetition_penalty=fields["repetition_penalty"],
            min_new_tokens=fields.get("min_tokens"), stop_strings=stops or None,
        )  # fmt: skip
        ends = [alone.index(stop) for stop in stops if stop in alone]
        assert text == alone[: min(ends, default=len(alone))], fields


def test_streams_say_the_same(served):
    fields = {"max_tokens": 30, "seed": 3, "n": 2, "stop": ["e th"], "logprobs": 2, "echo": True}
    whole = complete(served, **fields)
    texts, tokens, reasons, usage = ["", ""], [[], []], [None, None], None
    stream = complete(served, stream=True, stream_options={"include_usage": True}, **fields)
    for part in stream:
        usage = part.usage or usage
        for choice in part.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage


def test_what_a_stop_string_takes_back_is_never_shown(served):
    tokenizer = served.worker.tokenizer
    for stop, expected in (("is the", "What "), ("is thou", "What is the matter?")):
        pieces, shown = TextPieces(tokenizer, (stop, "zz")), ""
        for token in tokenizer.encode("What is the matter?", add_special_tokens=False):
            shown += pieces.push(token)
            assert expected.startswith(shown)
        assert shown + pieces.flush() == expected
        assert pieces.is_cut == (stop == "is the")


def test_probabilities_are_the_models(served):
    found = complete(served, max_tokens=5, temperature=0.5, seed=1, logprobs=3, echo=True)
    choice, shown = found.choices[0], found.choices[0].logprobs
    prompt = served.worker.tokenizer.encode(PROMPT)
    new, text = written(served, max_new_tokens=5, temperature=0.5, seed=1, top_k=0, do_sample=True)
    ids = np.array([prompt + new])
    logits = served.worker.model(ids).logits[0].detach().numpy().astype(float)
    expected = logits - np.logaddexp.reduce(logits, 1, keepdims=True)
    assert choice.text == PROMPT + text
    assert shown.token_logprobs[0] is None
    for place, token in enumerate(ids[0, 1:].tolist()):
        assert abs(shown.token_logprobs[place + 1] - expected[place, token]) < SAME
        best = shown.top_logprobs[place + 1]
        assert abs(max(best.values()) - expected[place].max()) < SAME
        assert best[shown.tokens[place + 1]] == shown.token_logprobs[place + 1]
    for token, offset in zip(shown.tokens[1:], shown.text_offset[1:], strict=True):
        assert choice.text[offset : offset + len(token)] == token
    scored = complete(served, max_tokens=0, logprobs=1, echo=True)
    assert scored.choices[0].text == PROMPT
    assert scored.choices[0].logprobs.tokens == shown.tokens[: len(prompt)]
    assert scored.usage.completion_tokens == 0


def test_characters_of_several_tokens_are_not_torn(served):
    found = complete(served, prompt="é世🙂", max_tokens=0, logprobs=0, echo=True).choices[0]
    assert found.text == "é世🙂"
    assert any(token.startswith("bytes:\\x") for token in found.logprobs.tokens)


def test_models_and_tokens(served):
    assert [model.id for model in served.client.models.list()] == ["mini"]
    assert served.client.models.retrieve("mini").owned_by == "opt-lm"
    answer = served.raw.post("/tokenize", json={"model": "mini", "prompt": PROMPT}).json()
    assert answer["tokens"] == served.worker.tokenizer.encode(PROMPT)
    assert answer["count"] == len(answer["tokens"])
    bare = {"model": "mini", "prompt": PROMPT, "add_special_tokens": False}
    assert served.raw.post("/tokenize", json=bare).json()["tokens"] == answer["tokens"][1:]


def test_chats_go_through_the_template(served):
    messages = [{"role": "user", "content": "Who art thou?"}]
    found = served.client.chat.completions.create(
        model="mini", messages=messages, max_tokens=9, seed=2, logprobs=True, top_logprobs=2
    )
    tokenizer = served.worker.tokenizer
    prompt = tokenizer.encode(
        tokenizer.bos_token + "user: Who art thou?\nassistant:", add_special_tokens=False
    )
    _, text = written(served, prompt, max_new_tokens=9, seed=2, do_sample=True, top_k=0)
    assert found.choices[0].message.content == text
    assert len(found.choices[0].logprobs.content[0].top_logprobs) == 2
    stream = served.client.chat.completions.create(
        model="mini", messages=messages, max_completion_tokens=9, seed=2, stream=True
    )
    assert "".join(part.choices[0].delta.content for part in stream) == text
    with pytest.raises(openai.BadRequestError, match="no tools"):
        served.client.chat.completions.create(
            model="mini", messages=[{"role": "tool", "content": "x", "tool_call_id": "1"}]
        )


REFUSED = {
    "suffix": ({"suffix": "end"}, "suffix is not supported"),
    "penalty": ({"presence_penalty": 0.5}, "presence_penalty is not supported"),
    "best_of": ({"best_of": 3}, "best_of"),
    "logprobs": ({"logprobs": 6}, "0..5"),
    "unknown": ({"extra_body": {"guided_json": "x"}}, 'unknown field "guided_json"'),
    "temperature": ({"temperature": -1}, "temperature"),
    "top_p": ({"top_p": 1.5}, "top_p"),
    "huge": ({"temperature": 10**400}, "temperature"),
    "window": ({"max_tokens": 256}, "the model's window has 256 tokens"),
    "too many": ({"max_tokens": 10**9}, "1..256|0..256"),
    "type": ({"n": "3"}, 'n: expected an integer in 1..128, received "3"'),
    "bool": ({"n": True}, "n: expected an integer"),
    "no prompt": ({"prompt": []}, "prompt: expected"),
    "foreign id": ({"prompt": [10**30]}, "no token id"),
    "mixed": ({"prompt": ["a", 3]}, "prompt: expected"),
    "stops": ({"stop": ["a", "b", "c", "d", "e"]}, "stop: expected"),
    "empty stop": ({"stop": ""}, "none empty"),
    "bias": ({"logit_bias": {"x": 1}}, "logit_bias: expected"),
    "seed": ({"seed": 2**80}, "seed"),
    "crowd": ({"n": 100}, "waiting"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_honoured_is_refused(served, case):
    fields, message = REFUSED[case]
    kind = openai.RateLimitError if case == "crowd" else openai.BadRequestError
    with pytest.raises(kind, match=message) as refusal:
        complete(served, **fields)
    body: Any = refusal.value.body
    assert set(body) == {"message", "type", "param", "code"}
    assert idle(served)


def test_errors_have_openais_kinds(served):
    with pytest.raises(openai.NotFoundError, match="expected one of mini") as refusal:
        complete(served, model="gpt")
    assert refusal.value.code == "model_not_found"
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0) as other:
        with pytest.raises(openai.AuthenticationError):
            other.models.list()
        assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    assert served.raw.get("/no/such").json()["error"]["type"] == "not_found_error"
    assert served.raw.get("/v1/completions").status_code == 405


BODIES = {
    "nothing": b"",
    "text": b"hello",
    "list": b"[]",
    "nan": b'{"model": "mini", "prompt": "a", "temperature": NaN}',
    "infinite": b'{"model": "mini", "prompt": "a", "temperature": 1e999}',
    "deep": b"[" * 50_000,
    "digits": b'{"model": "mini", "prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    "no utf-8": b'{"model": "\xff"}',
    "half a pair": b'{"model": "mini", "prompt": "\\ud800"}',
    "half a name": b'{"model": "mini", "prompt": "a", "\\ud800": 1}',
    "half a model": b'{"model": "\\ud800", "prompt": "a"}',
    "no model": b'{"prompt": "a"}',
    "null": b'{"model": null, "prompt": null}',
}


@pytest.mark.parametrize("case", BODIES)
def test_bodies_that_are_none(served, case):
    headers = {"Content-Type": "application/json"}
    answer = served.raw.post("/v1/completions", content=BODIES[case], headers=headers)
    assert answer.status_code == (404 if case == "half a model" else 400)
    assert answer.json()["error"]["type"] in ("invalid_request_error", "not_found_error")


def test_bodies_that_are_too_much_or_too_slow(served):
    headers = {"Content-Type": "application/json"}
    block = b" " * 2**20
    answer = served.raw.post(
        "/v1/completions", content=(block for _ in range(100)), headers=headers
    )
    assert answer.status_code == 413
    assert answer.json()["error"]["message"].startswith("the body: expected at most 100000 bytes")
    assert served.raw.post("/v1/completions", content=b"{}").status_code == 415

    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 30) as half:
        half.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n"
            b"Content-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
        )
        assert b"408" in half.recv(1000).partition(b"\r\n")[0]


def test_a_client_that_goes_frees_its_rows(served):
    fields = {"model": "mini", "prompt": PROMPT, "max_tokens": 250, "n": 4, "seed": 1,
              "logit_bias": {"2": -100}}  # fmt: skip
    with served.raw.stream("POST", "/v1/completions", json={**fields, "stream": True}) as stream:
        next(stream.iter_lines())
        assert not idle(served)
    wait_until(lambda: idle(served), 3)
    with pytest.raises(httpx.ReadTimeout):
        served.raw.post("/v1/completions", json=fields, timeout=0.05)
    wait_until(lambda: idle(served), 3)
    assert complete(served, max_tokens=1).choices


def test_a_request_has_its_time(monkeypatch):
    metrics = Metrics()
    worker = make_worker(metrics)
    step = worker.scheduler.step
    monkeypatch.setattr(worker.scheduler, "step", lambda: (threading.Event().wait(0.05), step())[1])
    with serving(Server([worker], Limits(seconds=0.3), metrics)) as url:
        fields = {"model": "mini", "prompt": PROMPT, "max_tokens": 200}
        answer = httpx.post(f"{url}/v1/completions", json=fields)
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "request_timeout"
        lines = httpx.post(f"{url}/v1/completions", json={**fields, "stream": True}).text.split()
        assert json.loads(" ".join(lines).rpartition("data: ")[2])["error"]["code"] == (
            "request_timeout"
        )
        chat = httpx.post(f"{url}/v1/chat/completions", json={})
        assert chat.json()["error"]["code"] == "no_chat_template"


def test_a_model_that_fails_says_so(monkeypatch):
    metrics = Metrics()
    worker = make_worker(metrics)

    def fail(table):
        raise RuntimeError("out of memory\nand more")

    with serving(Server([worker], Limits(), metrics)) as url:
        monkeypatch.setattr(worker.scheduler.engine, "step", fail)
        fields = {"model": "mini", "prompt": PROMPT, "max_tokens": 20}
        answer = httpx.post(f"{url}/v1/completions", json=fields)
        assert answer.status_code == 500
        assert answer.json()["error"]["message"] == "RuntimeError: out of memory"
        assert httpx.post(f"{url}/v1/completions", json=fields).status_code == 503
        assert httpx.get(f"{url}/health").status_code == 503


@pytest.fixture(scope="module")
def open_url():
    """A server of "mini" as `opt-lm serve mini` is without options."""
    metrics = Metrics()
    with serving(Server([make_worker(metrics)], Limits(), metrics)) as url:
        yield url


def test_lines_of_the_docs_run(open_url, tmp_path):
    if not shutil.which("curl"):
        pytest.skip("there is no curl")
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text("utf-8")
    lines = re.findall(r"^curl .*", page.replace("\\\n", " "), re.MULTILINE)
    assert len(lines) >= 6
    for line in lines:
        words = shlex.split(line.replace("http://127.0.0.1:8000", open_url))
        done = subprocess.run([*words, "-sSf"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, (line, done.stderr, done.stdout)
        assert done.stdout


def test_lm_eval_finds_the_same_scores(open_url):
    """Its own client of a server against what `opt-lm eval harness` computes with."""
    pytest.importorskip("tenacity", reason="lm-eval[api]")
    clients = pytest.importorskip("lm_eval.models.openai_completions")
    from opt_core.evaluation.lm_eval import HarnessLM
    from opt_torch import scoring

    path = resolve("mini")
    client = clients.LocalCompletionsAPI(
        base_url=f"{open_url}/v1/completions", model="mini", tokenizer=str(path),
        add_bos_token=True, max_length=256,
    )  # fmt: skip
    pairs = [("ROMEO: I am", " here"), ("What say you,", " my lord?"), ("the", "\n")]
    requests = [SimpleNamespace(args=pair) for pair in pairs]
    model = load_backend("torch").from_pretrained(path)
    ours = HarnessLM(
        partial(scoring.token_scores, model),
        model.generate,
        OPTTokenizer.from_pretrained(path),
        256,
    ).loglikelihood(requests)
    for theirs, (score, is_greedy) in zip(
        client.loglikelihood(requests, disable_tqdm=True), ours, strict=True
    ):
        assert abs(theirs[0] - score) < 4 * SAME
        assert theirs[1] == is_greedy


def test_figures_are_counted(served):
    def figure(name: str) -> float:
        lines = served.raw.get("/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(name))

    name = 'opt_generated_tokens_total{model="mini"}'
    complete(served, max_tokens=2)
    before = figure(name)
    complete(served, max_tokens=7, temperature=0)
    assert figure(name) == before + 7
    assert figure('opt_slots{model="mini"}') == 4
    assert figure('opt_queue_rows{model="mini"}') == 0
    assert not math.isnan(figure("opt_time_to_first_token_seconds_sum"))
    assert figure('opt_requests_total{path="/v1/completions",status="400"}') >= 1
