"""OpenAI's unmodified client against a real gateway and server; and what others send."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from alignd.v1 import events_pb2
from feedback.outbox.file import OutboxFile
from policies.server_connection import ServerConnection
from serving.access.keys import create_key
from serving.gateway.app import make_app
from serving.gateway.config import GatewayConfig
from tests.kafka_broker import free_port
from tests.serving.calls import Stubs
from tests.serving.gateway.conftest import answers
from tests.serving.processes import Server, end, log_of, start, wait_until

pytestmark = pytest.mark.timeout(400)

PUBLIC = GatewayConfig(host="0.0.0.0", allow_cleartext=True)
CHAT: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why is the sky blue?"}]


def alignd(answer: Any) -> Any:
    return answer.model_extra["alignd"]


def test_a_chat_is_sampled_and_ranked(client: openai.OpenAI, gateway: str) -> None:
    answer = client.chat.completions.create(model="live", messages=CHAT, n=3, max_tokens=8, user="ada", seed=7)
    assert answer.object == "chat.completion"
    assert answer.model == "v1"
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert all(choice.finish_reason in ("stop", "length") for choice in answer.choices)
    assert answer.usage
    assert answer.usage.completion_tokens <= 24
    assert answer.usage.prompt_tokens + answer.usage.completion_tokens == answer.usage.total_tokens
    found = alignd(answer)
    assert answer.id == f"chatcmpl-{found['sample_id']}"
    ids = [alignd(choice)["completion_id"] for choice in answer.choices]
    body = {"feedback_token": found["feedback_token"], "ranking": [ids[2], [ids[0], ids[1]]], "user": "ada"}
    ranked = httpx.post(f"{gateway}/v1/feedback/rankings", json=body, timeout=30)
    assert ranked.status_code == 200, ranked.text
    assert uuid.UUID(ranked.json()["ranking_id"])
    shown = {"feedback_token": found["feedback_token"], "text": "Because of the air.", "user": "ada"}
    assert httpx.post(f"{gateway}/v1/feedback/demonstrations", json=shown, timeout=30).status_code == 200
    for wrong, code in ((body | {"user": "eve"}, "token_of_another_user"), (body | {"feedback_token": "x"}, None)):
        refused = httpx.post(f"{gateway}/v1/feedback/rankings", json=wrong, timeout=30)
        assert refused.status_code == 403
        assert code is None or refused.json()["error"]["code"] == code


@pytest.mark.parametrize("asks_usage", [False, True])
def test_a_stream_says_what_the_whole_says(client: openai.OpenAI, asks_usage: bool) -> None:
    options: Any = {"stream_options": {"include_usage": True}} if asks_usage else {}
    asked: Any = {"model": "live", "messages": CHAT, "n": 2, "max_tokens": 12, "seed": 5}
    chunks = list(client.chat.completions.create(**asked, stream=True, **options))
    texts, reasons = ["", ""], ["", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] += choice.finish_reason or ""
    whole = client.chat.completions.create(**asked)
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert len({chunk.id for chunk in chunks}) == 1
    assert alignd(chunks[-1])["feedback_token"]
    assert (chunks[-1].usage is not None) == asks_usage
    assert bool(chunks[-1].choices) != asks_usage


def test_texts_have_log_probabilities_as_openai_has_them(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="v1", prompt="The sky is", max_tokens=6, logprobs=2, seed=3)
    (choice,) = answer.choices
    assert choice.logprobs
    assert choice.logprobs.tokens
    assert choice.logprobs.token_logprobs
    assert choice.logprobs.top_logprobs
    assert len(choice.logprobs.tokens) == answer.usage.completion_tokens  # type: ignore[union-attr]
    assert all(value <= 0 for value in choice.logprobs.token_logprobs)
    chat = client.chat.completions.create(
        model="live", messages=CHAT, max_completion_tokens=5, logprobs=True, top_logprobs=3, temperature=0
    )
    (said,) = chat.choices
    assert said.logprobs
    assert said.logprobs.content
    for token in said.logprobs.content:
        # Greedy: the token that was drawn is the likeliest one.
        assert len(token.top_logprobs) == 3
        assert token.logprob == pytest.approx(max(each.logprob for each in token.top_logprobs), abs=1e-4)


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} == {"live", "v1"}
    assert client.models.retrieve("v1").owned_by == "alignd"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("v99")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="v99", messages=CHAT)


@pytest.mark.parametrize(
    ("given", "param", "said"),
    [
        ({"tools": []}, "tools", "is not supported"),
        ({"Best_Of": 2}, "Best_Of", "is not supported"),
        ({"ignore_eos": True}, "ignore_eos", "store = false"),
        ({"logprobs": True, "top_logprobs": 20, "max_tokens": 200, "n": 16}, "top_logprobs", "can be returned"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "is not supported"),
        ({"n": 17}, "n", "16"),
        ({"temperature": 3}, "temperature", "2"),
        ({"max_tokens": 0}, "max_tokens", ""),
        ({"max_tokens": 100_000}, "max_tokens", "does not fit"),
        ({"stop": ["a"] * 5}, "stop", "4"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_completion_tokens", "newer name"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream = true"),
        ({"messages": []}, "messages", "1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", ""),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, None, ""),
        ({"messages": [{"role": "user", "content": ""}]}, "messages[0].content", "at least 1 byte"),
        ({"model": "gpt-4"}, "model", ""),
        ({"user": ""}, "user", ""),
        ({"request_id": "1"}, "request_id", "UUID"),
        ({"n": 2**40}, "n", ""),
        ({"n": "2"}, "n", "integer"),
        ({"n": 1.5}, "n", ""),
        ({"temperature": True}, "temperature", "number"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"user": 7}, "user", "string"),
        # By the names that the caller gave them.
        ({"max_completion_tokens": 100_000}, "max_completion_tokens", "does not fit"),
        ({"messages": [{"role": "user", "content": "why " * 1000}]}, "messages", "tokens"),
        ({"messages": [{"role": "system", "content": "Be brief."}]}, "messages", "last message"),
        ({"regex": "("}, "regex", ""),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(gateway: str, given: dict[str, Any], param: str, said: str) -> None:
    answer = httpx.post(f"{gateway}/v1/chat/completions", json={"messages": CHAT, **given}, timeout=30)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param
    assert said.lower() in error["message"].lower()


def test_a_fault_has_the_name_that_its_route_gives_it(gateway: str) -> None:
    for route, body, param in (
        ("completions", {"prompt": "a", "logprobs": 21}, "logprobs"),
        ("completions", {"prompt": "a " * 1000}, "prompt"),
        ("feedback/rankings", {"feedback_token": "", "ranking": ["a"]}, "feedback_token"),
    ):
        answer = httpx.post(f"{gateway}/v1/{route}", json=body, timeout=30)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


@pytest.mark.parametrize(
    ("content", "status"),
    [(b"{", 400), (b"[]", 400), (b"", 400), (b"\xff", 400), (b"null", 400), (b"x" * (2 << 20), 413)],
)
def test_a_body_that_is_none_is_refused(gateway: str, content: bytes, status: int) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{gateway}/v1/chat/completions", content=content, headers=headers, timeout=30)
    assert (answer.status_code, "error" in answer.json()) == (status, True)

    def parts() -> Iterator[bytes]:
        yield from (content[start : start + 65536] for start in range(0, len(content), 65536))

    answer = httpx.post(f"{gateway}/v1/chat/completions", content=parts(), headers=headers, timeout=30)
    assert answer.status_code == status


def test_request_ids_come_back_and_no_page_may_call(gateway: str) -> None:
    for sent, kept in (("trace-17", True), ("a b", False), ("", False)):
        headers = {"x-request-id": sent, "origin": "https://evil.example"}
        answer = httpx.get(f"{gateway}/v1/models", headers=headers, timeout=30)
        assert (answer.headers["x-request-id"] == sent) == kept
        assert "access-control-allow-origin" not in answer.headers
    assert httpx.get(f"{gateway}/nothing", timeout=30).json()["error"]["code"] is None
    assert httpx.get(f"{gateway}/openapi.json", timeout=30).json()["info"]["title"] == "alignd"
    assert httpx.get(f"{gateway}/health", timeout=30).json() == {"status": "SERVING"}


def test_a_caller_who_goes_away_ends_the_generation(gateway: str, stubs: Stubs) -> None:
    body = {"messages": CHAT, "n": 16, "max_tokens": 400, "ignore_eos": True, "store": False}
    for stream in (True, False):
        with (
            pytest.raises(httpx.ReadTimeout),
            httpx.stream(
                "POST",
                f"{gateway}/v1/chat/completions",
                json=body | {"stream": stream},
                timeout=httpx.Timeout(30, read=0.5),
            ) as answer,
        ):
            for _ in answer.iter_raw():
                time.sleep(1)
                raise httpx.ReadTimeout("enough")
    from tests.serving.test_rpcs import all_room_is_free

    wait_until(lambda: all_room_is_free(stubs), 20, "room given back")


def test_a_sample_that_is_not_stored_is_nowhere_and_has_no_token(client: openai.OpenAI, server: Server) -> None:
    answer = client.chat.completions.create(model="live", messages=CHAT, max_tokens=4, store=False)
    found = alignd(answer)
    assert (found["feedback_token"], found["expires"]) == (None, None)
    outbox = OutboxFile(server.data_dir / "outbox.db", 2**30)
    assert outbox.find(found["sample_id"]) is None
    kept = client.chat.completions.create(model="live", messages=CHAT, max_tokens=4)
    stored = outbox.find(alignd(kept)["sample_id"])
    assert stored
    assert events_pb2.SampleEvent.FromString(stored).user_id == "anonymous"
    outbox.close()


def test_a_request_that_is_sent_again_returns_the_first_answer(client: openai.OpenAI) -> None:
    asked: Any = {
        "model": "live",
        "messages": CHAT,
        "n": 2,
        "max_tokens": 8,
        "extra_body": {"request_id": str(uuid.uuid4())},
    }
    first, again = (client.chat.completions.create(**asked) for _ in range(2))
    assert first.id == again.id
    assert [c.message.content for c in first.choices] == [c.message.content for c in again.choices]
    streamed = list(client.chat.completions.create(**asked, stream=True))
    assert {chunk.id for chunk in streamed} == {first.id}
    with pytest.raises(openai.ConflictError):
        client.chat.completions.create(**asked | {"n": 3})


def test_forms_are_kept(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"blue": {"type": "boolean"}},
        "required": ["blue"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "sky", "schema": schema}}
    answer = client.chat.completions.create(model="live", messages=CHAT, n=2, max_tokens=64, response_format=form)
    for choice in answer.choices:
        # A policy that has learned nothing may write white space until it is cut off.
        text = choice.message.content or ""
        assert text.startswith("{")
        assert choice.finish_reason == "length" or isinstance(json.loads(text)["blue"], bool)
    answer = client.chat.completions.create(
        model="live", messages=CHAT, max_tokens=32, extra_body={"regex": "(yes|no), because [a-z ]{3,9}"}
    )
    assert (answer.choices[0].message.content or "").startswith(("yes, because ", "no, because "))
    for bad in (
        {"type": "no type"},
        {"type": 7},
        {"$ref": "https://example.com/schema.json"},
        {"not": {"type": "string"}},
    ):
        with pytest.raises(openai.BadRequestError) as raised:
            wrong: Any = {"type": "json_schema", "json_schema": {"name": "sky", "schema": bad}}
            client.chat.completions.create(model="live", messages=CHAT, response_format=wrong)
        assert raised.value.param == "response_format"
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model="live", messages=CHAT, extra_body={"regex": "("})


@pytest.fixture(scope="module")
def strict(server: Server) -> Iterator[tuple[str, Mapping[str, str]]]:
    """A gateway that others reach, before the same server; and keys."""
    keys = server.data_dir / "api_keys.json"
    secrets = {
        "web": create_key(keys, "web", "shop", ["sample", "feedback"], "test")[1],
        "bank": create_key(keys, "bank", "bank", ["sample", "feedback"], "test")[1],
        "reader": create_key(keys, "reader", "shop", ["feedback"], "test")[1],
    }
    port = free_port()
    settings = {
        **server.environment,
        "ALIGND_GATEWAY__PORT": str(port),
        "ALIGND_GATEWAY__HOST": "0.0.0.0",
        "ALIGND_GATEWAY__ALLOW_CLEARTEXT": "true",
        "ALIGND_GATEWAY__ALLOWED_ORIGINS": '["https://app.example.com"]',
    }
    process = start("gateway", settings)
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/health"), 180, "the gateway", process)
        yield f"http://127.0.0.1:{port}/v1", secrets
    finally:
        process.terminate()
        assert end(process) == 0


def test_callers_are_let_in_by_their_keys(strict: tuple[str, Mapping[str, str]]) -> None:
    url, keys = strict

    def ask(key: str | None, path: str = "chat/completions", **body: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.post(
            f"{url}/{path}", json=body or {"messages": CHAT, "n": 2, "max_tokens": 4}, headers=headers, timeout=60
        )

    sampled = ask(keys["web"])
    assert sampled.status_code == 200, sampled.text
    for key, status, code in (
        (None, 401, "no_api_key"), ("sk-none", 401, "bad_api_key"), (keys["reader"], 403, "missing_scope"),
    ):  # fmt: skip
        refused = ask(key)
        assert (refused.status_code, refused.json()["error"]["code"]) == (status, code)
        assert keys["web"] not in refused.text
    found = sampled.json()
    ids = [choice["alignd"]["completion_id"] for choice in found["choices"]]
    body = {"feedback_token": found["alignd"]["feedback_token"], "ranking": ids}
    other = ask(keys["bank"], "feedback/rankings", **body)
    assert (other.status_code, other.json()["error"]["code"]) == (403, "token_of_another_application")
    assert ask(keys["reader"], "feedback/rankings", **body).status_code == 200
    allowed = httpx.options(
        f"{url}/chat/completions", timeout=30,
        headers={"origin": "https://app.example.com", "access-control-request-method": "POST"},
    )  # fmt: skip
    assert allowed.headers["access-control-allow-origin"] == "https://app.example.com"


def test_every_route_needs_a_key(strict: tuple[str, Mapping[str, str]]) -> None:
    url, _ = strict
    root = url.removesuffix("/v1")
    routes = httpx.get(f"{root}/openapi.json", timeout=30).json()["paths"]
    assert len(routes) >= 6
    for path, methods in routes.items():
        for method in methods:
            status = httpx.request(method, f"{root}{path}", json={}, timeout=30).status_code
            assert status == (200 if path == "/health" else 401), (method, path)


def test_an_empty_key_is_none(strict: tuple[str, Mapping[str, str]]) -> None:
    url, _ = strict
    for headers in ([("authorization", "")], [("authorization", ""), ("authorization", "Bearer x")]):
        answer = httpx.post(f"{url}/chat/completions", json={"messages": CHAT}, headers=headers, timeout=30)
        assert answer.status_code == 401
    named: Any = [(b"authorization", "Bearer é".encode())]
    strange = httpx.post(f"{url}/chat/completions", json={"messages": CHAT}, headers=named, timeout=30)
    assert (strange.status_code, strange.json()["error"]["code"]) == (401, "bad_api_key")


def test_without_keys_no_page_comes_in_by_another_name_and_nobody_through_a_proxy(gateway: str) -> None:
    ask = {"json": {"messages": CHAT, "max_tokens": 2}, "timeout": 30}
    for headers, status in (
        ({"host": "evil.example:8080"}, 421), ({"host": "localhost:80"}, 200), ({"host": "[::1]:80"}, 200),
        ({"x-forwarded-for": "203.0.113.9"}, 401),
    ):  # fmt: skip
        assert httpx.post(f"{gateway}/v1/chat/completions", headers=headers, **ask).status_code == status, headers  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["/health", "/openapi.json", "/docs"])
async def test_a_public_gateway_is_looked_at_by_any_name_without_a_key(path: str) -> None:
    transport = httpx.ASGITransport(make_app(PUBLIC, ServerConnection("localhost:1")))
    async with httpx.AsyncClient(transport=transport, base_url="http://alignd.example.com") as client:
        answer = await client.get(path, headers={"x-forwarded-for": "10.0.0.1"})
        assert answer.status_code == (503 if path == "/health" else 200)
        assert (await client.get("/v1/models")).status_code == 401


@pytest.mark.parametrize("key", ["alignd_a\tb", "alignd_\x7f", "alignd_\xe9"])
async def test_a_key_that_no_header_may_have_is_unknown(key: str) -> None:
    transport = httpx.ASGITransport(make_app(PUBLIC, ServerConnection("localhost:1")))
    async with httpx.AsyncClient(transport=transport, base_url="http://alignd.example.com") as client:
        answer = await client.get("/v1/models", headers=[(b"authorization", f"Bearer {key}".encode("latin-1"))])
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "bad_api_key")


async def test_what_is_too_long_has_its_request_id_too() -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 65_536

    transport = httpx.ASGITransport(make_app(PUBLIC, ServerConnection("localhost:1")))
    headers = {"x-request-id": "mine", "authorization": "Bearer alignd_x", "content-type": "application/json"}
    async with httpx.AsyncClient(transport=transport, base_url="http://alignd.example.com") as client:
        for body in (b"x" * (2 << 20), endless()):
            answer = await client.post("/v1/completions", content=body, headers=headers)
            assert (answer.status_code, answer.headers["x-request-id"]) == (413, "mine")


def test_half_a_character_is_refused(gateway: str) -> None:
    body = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{gateway}/v1/chat/completions", content=body, headers=headers, timeout=30)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_parameter")


def test_a_request_is_in_both_logs_by_its_id_and_nothing_of_what_it_says(
    client: openai.OpenAI, gateway: str, server: Server
) -> None:
    name, secret = f"shop-{uuid.uuid4().hex}", f"what {uuid.uuid4().hex} said"
    answer = client.chat.completions.create(
        model="live", messages=[{"role": "user", "content": secret}], n=2, max_tokens=4, user="ada",
        extra_headers={"x-request-id": name},
    )  # fmt: skip
    refused = httpx.post(f"{gateway}/v1/completions?{name}", json={"prompt": secret, "n": 99}, timeout=30)
    assert refused.status_code == 400
    httpx.get(f"{gateway}/{secret}", timeout=30)

    def lines(verb: str, part: str) -> list[str]:
        return [line for line in log_of(verb, server.environment).read_text().splitlines() if part in line]

    (at_the_gateway,) = lines("gateway", name)
    assert "POST /v1/chat/completions 200 in" in at_the_gateway
    wait_until(lambda: bool(lines("serve", name)), 10, "the server's line")
    (at_the_server,) = lines("serve", name)
    assert "InferenceService/Sample OK in" in at_the_server
    assert alignd(answer)["sample_id"] in at_the_server
    assert lines("gateway", refused.headers["x-request-id"])
    assert lines("gateway", "GET no route 404 in")
    assert not lines("gateway", "/health")
    for verb in ("gateway", "serve", "relay", "ingest"):
        assert not lines(verb, secret)
        assert not lines(verb, alignd(answer)["feedback_token"])


def test_no_key_and_no_token_lies_in_clear_where_the_server_writes(
    strict: tuple[str, Mapping[str, str]], server: Server
) -> None:
    url, keys = strict
    with openai.OpenAI(base_url=url, api_key=keys["web"], max_retries=0, timeout=60) as client:
        token = alignd(client.chat.completions.create(model="live", messages=CHAT, n=2, max_tokens=4))["feedback_token"]
    written = [path for path in server.data_dir.parent.rglob("*") if path.is_file()]
    for path in written:
        content = path.read_bytes()
        assert token.encode() not in content, path
        assert all(key.encode() not in content for key in keys.values()), path
    assert Path(server.data_dir / "api_keys.json") in written


def test_an_evaluation_reads_how_likely_a_text_is(gateway: str, server: Server) -> None:
    """What lm-eval's local-completions sends, and how it reads the answer: up to the last token but one."""
    context, continuation = "The sky is blue because", " the air scatters"
    asked = {"model": "v1", "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    answers = [
        httpx.post(f"{gateway}/v1/completions", json={**asked, "prompt": context + continuation, **more}, timeout=60)
        for more in ({}, {"max_tokens": 0})
    ]
    (choice,), (alone,) = (answer.json()["choices"] for answer in answers)
    found, read = choice["logprobs"], alone["logprobs"]
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    scored = found["token_logprobs"][1:-1]
    assert all(logprob < 0 for logprob in scored)
    assert all(max(top.values()) >= each for top, each in zip(found["top_logprobs"][1:-1], scored, strict=True))
    assert choice["text"].startswith(context + continuation)
    assert alone["text"] == context + continuation
    # Without the token that was written, and with the same of the prompt.
    assert len(read["tokens"]) == len(found["tokens"]) - 1
    assert read["token_logprobs"][1:] == pytest.approx(scored, abs=1e-3)
    assert answers[1].json()["usage"]["completion_tokens"] == 0
    for offset, token in zip(read["text_offset"][1:], read["tokens"][1:], strict=True):
        assert alone["text"][offset:].startswith(token)
    outbox = OutboxFile(server.data_dir / "outbox.db", 2**30)
    for answer in answers:
        noted = answer.json()["alignd"]
        assert noted["feedback_token"] is None
        assert outbox.find(noted["sample_id"]) is None
    outbox.close()


def test_a_text_can_be_echoed_and_ranked(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="live", prompt="The sky is", max_tokens=4, n=2, echo=True)
    assert all(choice.text.startswith("The sky is") and choice.logprobs is None for choice in answer.choices)
    assert alignd(answer)["feedback_token"]


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"echo": True, "stream": True}, "echo"),
        ({"echo": True, "logprobs": 1, "store": True}, "store"),
        ({"echo": True, "logprobs": 1, "n": 2}, "n"),
        ({"echo": True, "logprobs": 21}, "logprobs"),
        ({"echo": True, "max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0, "logprobs": 1}, "max_tokens"),
    ],
)
def test_what_cannot_be_echoed_is_refused(gateway: str, given: dict[str, Any], param: str) -> None:
    answer = httpx.post(f"{gateway}/v1/completions", json={"prompt": "a", **given}, timeout=30)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
