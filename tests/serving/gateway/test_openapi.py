"""Schemathesis against a real gateway and server: whatever is sent, the answer is one that /openapi.json describes."""

import json
import re
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from policies.server_connection import ServerConnection
from serving.gateway.app import make_app
from serving.gateway.config import GatewayConfig

pytestmark = pytest.mark.timeout(400)

HELD = [
    schemathesis.checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
CHAT = [{"role": "user", "content": "Why?"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]}]
FEW_TRIES = settings(
    max_examples=15, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
# What a request is narrowed to, so that each is answered with completions, and with few.
FEW: dict[str, Any] = {
    "messages": {"enum": [CHAT, [*CHAT, {"role": "assistant", "content": "So"}], PARTS]},
    "prompt": {"type": "string", "minLength": 1, "maxLength": 20},
    "model": {"enum": ["live", "v1"]},
    "n": {"enum": [1, 2]},
    "max_tokens": {"enum": [1, 3]},
    "temperature": {"enum": [0, 0.5, 2]},
    "top_p": {"enum": [0.5, 1]},
    "top_k": {"enum": [1, 20]},
    "min_p": {"enum": [0, 0.5]},
    "presence_penalty": {"enum": [-2, 2]},
    "frequency_penalty": {"enum": [-2, 2]},
    "repetition_penalty": {"enum": [0.5, 2]},
    "stop": {"enum": ["e", ["a", "b"], []]},
    "user": {"enum": ["ada", "é"]},
    "seed": {"enum": [0, 2**63 - 1]},
}
AS_THEY_ARE = ("stream", "store", "service_tier")
ECHO = {"echo": {"enum": [True]}, "logprobs": {"enum": [0, 2]}, "max_tokens": {"enum": [0, 1]}}


def document() -> Any:
    """Returns the document of a gateway with the shared one's settings."""
    app = make_app(GatewayConfig(), ServerConnection("127.0.0.1:1"))
    return json.loads(json.dumps(app.openapi()))


def held(found: Any, mode: GenerationMode) -> Any:
    """Returns what Schemathesis sends, and holds the answers against: what they do not name is forbidden in them."""
    for name, shape in found["components"]["schemas"].items():
        if not name.endswith("Request"):
            shape.setdefault("additionalProperties", False)
    schema = schemathesis.openapi.from_dict(found)
    schema.config.generation.update(modes=[mode], with_security_parameters=False)
    schema.config.seed = 1
    return schema


def of_few() -> Any:
    """Returns the document with requests for completions narrowed."""
    found = document()
    for name, logprobs in (("ChatRequest", [True]), ("CompletionRequest", [0, 2])):
        shape = found["components"]["schemas"][name]
        kept = {field: each for field, each in shape["properties"].items() if field in AS_THEY_ARE}
        named = {field: few for field, few in FEW.items() if field in shape["properties"]}
        shape["properties"] = {**kept, **named, "logprobs": {"enum": logprobs}}
        shape["required"].append("max_tokens")
    return found


def of_echoes() -> Any:
    """Returns the document with requests for completions narrowed to those that ask how likely a prompt is."""
    found = of_few()
    shape = found["components"]["schemas"]["CompletionRequest"]
    shape["properties"] = {"prompt": FEW["prompt"], **ECHO}
    shape["required"] = ["prompt", *ECHO]
    return found


anything = held(document(), GenerationMode.POSITIVE)
faulty = held(document(), GenerationMode.NEGATIVE).include(method="POST")
kept = held(of_few(), GenerationMode.POSITIVE).include(path_regex="completions")
echoed = held(of_echoes(), GenerationMode.POSITIVE).include(path="/v1/completions")


@anything.parametrize()
@FEW_TRIES
def test_what_is_as_described_is_answered_as_described(case: Any, gateway: str) -> None:
    case.call_and_validate(base_url=gateway, checks=HELD)


@faulty.parametrize()
@FEW_TRIES
def test_what_is_not_as_described_is_refused_as_described(case: Any, gateway: str) -> None:
    case.call_and_validate(base_url=gateway, checks=[*HELD, negative_data_rejection])


@kept.parametrize()
@FEW_TRIES
def test_completions_are_as_described(case: Any, gateway: str) -> None:
    answer = case.call_and_validate(base_url=gateway, checks=HELD)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"][0].startswith("text/event-stream") == bool(case.body.get("stream"))


@echoed.parametrize()
@FEW_TRIES
def test_echoes_are_as_described(case: Any, gateway: str) -> None:
    answer = case.call_and_validate(base_url=gateway, checks=HELD)
    assert answer.json()["choices"][0]["text"].startswith(case.body["prompt"])


def test_feedback_that_is_taken_is_answered_as_described(gateway: str) -> None:
    """None of what Schemathesis makes up has a token."""
    body = {"messages": CHAT, "n": 2, "max_tokens": 2, "user": "ada"}
    sample = httpx.post(f"{gateway}/v1/chat/completions", json=body, timeout=60).json()
    given = {"feedback_token": sample["alignd"]["feedback_token"], "user": "ada"}
    ids = [choice["alignd"]["completion_id"] for choice in sample["choices"]]
    described = held(document(), GenerationMode.POSITIVE)
    for route, said in (("rankings", {"ranking": ids}), ("demonstrations", {"text": "So."})):
        case = described[f"/v1/feedback/{route}"]["POST"].Case(body=given | said)
        assert case.call_and_validate(base_url=gateway, checks=HELD).status_code == 200


def test_the_gateway_gives_this_document(gateway: str) -> None:
    assert httpx.get(f"{gateway}/openapi.json", timeout=30).json() == document()


def test_the_contract_is_a_page_too_which_loads_nothing_from_elsewhere(gateway: str) -> None:
    page = httpx.get(f"{gateway}/docs", timeout=30)
    assert page.status_code == 200
    assert "/openapi.json" in page.text
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(loaded) >= 3
    for url in loaded:
        assert url.startswith(f"{gateway}/"), url
        assert httpx.get(url, timeout=30).status_code == 200
    assert set(re.findall(r"https?://[^/\"']+", page.text)) == {gateway}
