"""The example of a service, under real requests: each answer is what its expert alone would have written."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.slow
for package in ("fastapi", "httpx", "transformers", "uvicorn"):
    pytest.importorskip(package)

import httpx  # noqa: E402
import uvicorn  # noqa: E402

import freemerge  # noqa: E402
from freemerge.errors import InputError  # noqa: E402
from freemerge.routers import LastHiddenMean, PrototypeRouter  # noqa: E402
from freemerge.testing import tiny_llama, tiny_llama_config, tiny_tokenizer, write_checkpoint  # noqa: E402

sys.path.insert(0, str(ROOT / "examples"))
from serve import Limits, Refused, Service, create_app  # noqa: E402

EXPERTS = ("math", "code", "law")
PROMPTS = ("a b", "the sum of c and d", "x", "one two three four five", "zz top", "abc abd abe")


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A tiny Llama with three experts, a tokenizer of letters, and a router by prompt."""
    folder = tmp_path_factory.mktemp("models")
    config = {"vocab_size": 32, "max_position_embeddings": 96, "eos_token_id": 2}
    for seed, name in enumerate(("base", *EXPERTS)):
        tensors = tiny_llama(seed, scale=0.4, **config)
        write_checkpoint(folder / name, tensors, config=tiny_llama_config(**config))
    for file, data in tiny_tokenizer(["th"]).items():
        (folder / "base" / file).write_text(json.dumps(data))
    sources = {name: folder / name for name in EXPERTS}
    freemerge.merge("free", base=folder / "base", experts=sources, out=folder / "merged", density=0.2, fsync=False)
    model = freemerge.load(folder / "merged")
    features = LastHiddenMean(model)
    tokenizer = load_tokenizer(folder / "merged")
    examples = zip(EXPERTS, PROMPTS, strict=False)
    of_prompts = {name: features({"input_ids": torch.tensor([tokenizer(p)["input_ids"]])}) for name, p in examples}
    PrototypeRouter.fit(of_prompts).save(folder / "merged", fsync=False)
    return folder / "merged"


def load_tokenizer(folder):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def alone(merged):
    """What each expert writes to each prompt, by itself: (expert, prompt, tokens) -> text."""
    model, tokenizer, known = freemerge.load(merged), load_tokenizer(merged), {}

    def answer(expert, prompt, tokens=12):
        if (expert, prompt, tokens) not in known:
            model.use_expert(expert)
            ids = torch.tensor([tokenizer(prompt)["input_ids"]])
            with torch.inference_mode():
                out = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=tokens,
                    do_sample=False,
                    pad_token_id=2,
                )
            known[expert, prompt, tokens] = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        return known[expert, prompt, tokens]

    return answer


@contextmanager
def running(service):
    """The service behind a real port, in a thread; its address, and the server."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(128)
        server = uvicorn.Server(uvicorn.Config(create_app(service), log_level="error"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            wait_for(lambda: server.started or not thread.is_alive())
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", server
        finally:
            server.should_exit = True
            thread.join(60)
        assert not thread.is_alive()


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.fixture(scope="module")
def address(merged):
    limits = Limits(max_batch=8, patience=0.2, max_prompt_tokens=40, max_new_tokens=30, max_body_bytes=4000)
    with running(Service.load(str(merged), limits)) as (found, _):
        yield found


def post(address, body, **options):
    data = body if isinstance(body, (bytes, str)) else json.dumps(body)
    return httpx.post(f"{address}/generate", content=data, timeout=60, **options)


def gather(address, bodies):
    """Many requests at once."""

    async def run():
        async with httpx.AsyncClient(timeout=120) as client:
            return await asyncio.gather(*(client.post(f"{address}/generate", json=body) for body in bodies))

    return asyncio.run(run())


def metric(address, name):
    found = re.search(rf"^{re.escape(name)} (\S+)$", httpx.get(f"{address}/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_concurrent_requests_get_what_their_expert_writes_alone(address, alone):
    asked = [(expert, prompt) for expert in (*EXPERTS, None) for prompt in PROMPTS]
    answers = gather(address, [{"prompt": p, "expert": e, "max_new_tokens": 12} for e, p in asked])
    assert len({alone(expert, PROMPTS[1]) for expert in (*EXPERTS, None)}) > 1  # the experts do differ
    for (expert, prompt), answer in zip(asked, answers, strict=True):
        assert answer.status_code == 200, answer.text
        facts = answer.json()
        assert (facts["text"], facts["expert"]) == (alone(expert, prompt), expert)
        assert facts["finish_reason"] in ("stop", "length")
    # 24 requests, at most 8 at once
    count, rows = metric(address, "freemerge_batch_size_count"), metric(address, "freemerge_batch_size_sum")
    assert rows == 24
    assert 3 <= count < 24


def test_rows_of_one_batch_end_where_each_should(address, alone):
    bodies = [{"prompt": PROMPTS[i], "expert": "code", "max_new_tokens": tokens} for i, tokens in enumerate((1, 5, 20))]
    for i, (body, answer) in enumerate(zip(bodies, gather(address, bodies), strict=True)):
        facts = answer.json()
        assert facts["text"] == alone("code", PROMPTS[i], body["max_new_tokens"])
        assert facts["new_tokens"] == body["max_new_tokens"] or facts["finish_reason"] == "stop"


def test_without_an_expert_the_router_chooses(address, alone):
    answers = gather(address, [{"prompt": prompt, "max_new_tokens": 8} for prompt in PROMPTS[:3]])
    for expert, prompt, answer in zip(EXPERTS, PROMPTS, answers, strict=False):
        assert (answer.json()["expert"], answer.json()["text"]) == (expert, alone(expert, prompt, 8))


def test_a_stream_grows_to_the_same_text(address, alone):
    body = {"prompt": PROMPTS[3], "expert": "law", "max_new_tokens": 12, "stream": True}
    with httpx.stream("POST", f"{address}/generate", json=body, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    *texts, last = [json.loads(line[6:]) for line in lines]
    assert "".join(event["text"] for event in texts) == alone("law", PROMPTS[3])
    assert last["done"] is True
    assert (last["expert"], last["prompt_tokens"] > 0) == ("law", True)
    assert len(texts) > 1


def test_sampling_depends_on_the_seed_and_not_on_the_batch(address):
    body = {"prompt": "a b", "expert": "math", "max_new_tokens": 16, "temperature": 1.5}
    first = post(address, body | {"seed": 5}).json()["text"]
    others = [body | {"seed": seed, "prompt": PROMPTS[seed % 6]} for seed in range(6)]
    again = gather(address, [*others, body | {"seed": 5}])[-1].json()["text"]
    assert first == again
    assert len({post(address, body | {"seed": seed}).json()["text"] for seed in range(3)}) > 1


@pytest.mark.parametrize(
    ("body", "status", "kind", "message"),
    [
        (
            {"prompt": "a", "expert": "physics"},
            404,
            "unknown_expert",
            "'physics'; there are: code, law, math",
        ),
        (b"{", 400, "malformed", "JSON"),
        (b"", 400, "malformed", "JSON"),
        (b"\xff\xfe", 400, "malformed", ""),
        ({}, 400, "malformed", "prompt: Field required"),
        ({"prompt": 3}, 400, "malformed", "prompt: Input should be a valid string"),
        ({"prompt": "a", "max_new_tokens": "7"}, 400, "malformed", "max_new_tokens: Input should be a valid integer"),
        ({"prompt": "a", "max_new_tokens": 0}, 400, "malformed", "max_new_tokens: "),
        ({"prompt": "a", "temperature": -1}, 400, "malformed", "temperature: "),
        ({"prompt": "a", "top_p": 1}, 400, "malformed", "top_p: Extra inputs are not permitted"),
        ({"prompt": "a", "max_new_tokens": 31}, 400, "too_long", "max_new_tokens 31: at most 30"),
        ({"prompt": "a " * 41}, 400, "too_long", "tokens, allowed are 1 to"),
        ({"prompt": ""}, 400, "empty", "the prompt has 0 tokens"),
        ({"prompt": "a" * 5000}, 413, "too_large", "larger than 4000 bytes"),
    ],
)
def test_bad_requests_are_refused_with_what_is_wrong(address, body, status, kind, message):
    body = body | {"max_new_tokens": 4} if isinstance(body, dict) and "max_new_tokens" not in body else body
    answer = post(address, body)
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == kind
    assert message in answer.json()["error"]["message"]
    assert post(address, {"prompt": "a", "expert": None, "max_new_tokens": 1}).status_code == 200  # and it goes on


def test_pages_that_are_not_there_and_prompts_without_room(address, merged):
    for answer in (httpx.get(f"{address}/nowhere"), httpx.get(f"{address}/generate")):
        assert answer.status_code in (404, 405)
        assert answer.json()["error"]["type"] in ("not_found", "method_not_allowed")
    with pytest.raises(Refused, match="max_new_tokens 96 leaves no room for a prompt"):
        Service.load(str(merged), Limits()).checked(b'{"prompt": "a", "expert": null, "max_new_tokens": 96}')


def test_health_experts_and_metrics(address):
    health = httpx.get(f"{address}/health")
    assert (health.status_code, health.json()["status"]) == (200, "ok")
    assert httpx.get(f"{address}/experts").json() == {"experts": ["code", "law", "math"], "router": True}
    before = metric(address, 'freemerge_generations_total{expert="law"}')
    tokens = metric(address, "freemerge_new_tokens_total")
    new = post(address, {"prompt": "a", "expert": "law", "max_new_tokens": 5}).json()["new_tokens"]
    assert metric(address, 'freemerge_generations_total{expert="law"}') == before + 1
    assert metric(address, "freemerge_new_tokens_total") == tokens + new
    text = httpx.get(f"{address}/metrics").text
    assert re.search(r'^freemerge_requests_total\{status="200"\} \d', text, re.MULTILINE)
    assert re.search(r'^freemerge_request_seconds_bucket\{le="\+Inf"\} \d', text, re.MULTILINE)
    for line in text.splitlines():
        assert re.fullmatch(r"# (HELP|TYPE) \S+ .+|\w+(\{\w+=\"[^\"]*\"\})? \S+", line) or 'le="' in line


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_generation(merged, stream):
    service = Service.load(str(merged), Limits(patience=0.0))
    steps = slow_down(service, 0.05)
    with running(service) as (address, _):
        body = {"prompt": "a b", "expert": "math", "max_new_tokens": 60, "stream": stream, "temperature": 1.0}
        if stream:
            with httpx.stream("POST", f"{address}/generate", json=body, timeout=60) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{address}/generate", json=body, timeout=httpx.Timeout(60, read=0.3))
        wait_for(lambda: metric(address, 'freemerge_generations_total{expert="math"}') == 1)
    assert len(steps) < 50


def slow_down(service, seconds):
    """Each forward takes so long; a list that grows with each."""
    steps = []
    service.model.register_forward_pre_hook(lambda *_: steps.append(time.sleep(seconds)))
    return steps


def test_what_has_begun_is_finished_when_the_service_stops(merged, alone):
    service = Service.load(str(merged), Limits(patience=0.0, max_batch=1))
    steps = slow_down(service, 0.03)
    with running(service) as (address, server):
        answers = []
        bodies = [{"prompt": prompt, "expert": "math", "max_new_tokens": 12} for prompt in PROMPTS[:3]]
        client = threading.Thread(target=lambda: answers.extend(gather(address, bodies)))
        client.start()
        wait_for(lambda: len(steps) > 2 and service.engine.waiting == 2)
        server.should_exit = True
        client.join(60)
    assert [answer.json()["text"] for answer in answers] == [alone("math", prompt) for prompt in PROMPTS[:3]]
    assert not service.engine.alive


def test_too_many_waiting_requests_are_sent_away(merged):
    service = Service.load(str(merged), Limits(patience=0.0, max_batch=1, max_waiting=1))
    slow_down(service, 0.05)
    with running(service) as (address, _):
        answers = gather(address, [{"prompt": "a", "expert": "law", "max_new_tokens": 4}] * 8)
        codes = [answer.status_code for answer in answers]
        assert set(codes) == {200, 429}
        busy = answers[codes.index(429)]
        assert (busy.json()["error"]["type"], busy.headers["retry-after"]) == ("busy", "1")


def test_a_batch_that_fails_is_answered_and_the_next_one_served(merged, alone):
    service = Service.load(str(merged), Limits(patience=0.0))
    generate, calls = service.model.generate, []

    def once_broken(**options):
        calls.append(options)
        if len(calls) == 1:
            raise RuntimeError("no memory")
        return generate(**options)

    service.model.generate = once_broken
    with running(service) as (address, _):
        body = {"prompt": "x", "expert": "law", "max_new_tokens": 12}
        failed = post(address, body)
        assert failed.status_code == 500
        assert failed.json()["error"] == {"type": "failed", "message": "RuntimeError: no memory"}
        assert post(address, body).json()["text"] == alone("law", "x")


def test_limits_and_routers_that_cannot_work_are_refused_before_anything_is_served(merged):
    with pytest.raises(InputError, match="max_batch 0, patience -1: limits are at least 1"):
        Limits(max_batch=0, patience=-1)
    router = PrototypeRouter.fit({"math": np.eye(2)[:1], "physics": np.eye(2)[1:]})
    with pytest.raises(InputError, match="other experts: physics not attached"):
        Service(freemerge.load(merged), load_tokenizer(merged), router)


def test_the_command_serves_and_stops_on_sigterm(merged):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-P", str(ROOT / "examples/serve.py"), str(merged), "--port", str(port)]
    environment = {"PYTHONPATH": str(ROOT / "examples")}
    process = subprocess.Popen(command, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True)
    try:
        address = f"http://127.0.0.1:{port}"

        def answers():
            assert process.poll() is None, process.stderr.read()
            try:
                return httpx.get(f"{address}/health").status_code == 200
            except httpx.ConnectError:
                return False

        wait_for(answers, 120)
        assert post(address, {"prompt": "a", "expert": "math", "max_new_tokens": 3}).json()["new_tokens"] > 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
