"""Forms that completions must have: each is kept, or refused by name."""

import json
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from alignd.v1.types_pb2 import FINISH_REASON_STOP, StructuredOutput
from serving.errors import Refusal
from serving.forms import check_form
from tests.serving.calls import Stubs, draw, refused, sample_request, sampling

pytestmark = pytest.mark.timeout(300)

STRING: Any = {"type": "string"}


def form(schema: object) -> StructuredOutput:
    return StructuredOutput(json_schema=json.dumps(schema))


def chain_of_patterns(count: int) -> Any:
    """Returns a schema whose text must match all patterns, each reached from the one before."""
    links = {f"{i}": {"pattern": f".*a{i}.{{50}}b", "$ref": f"#/$defs/{i + 1}"} for i in range(count)}
    return {"type": "string", "$ref": "#/$defs/0", "$defs": {**links, f"{count}": STRING}}


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"$ref": "http://169.254.169.254/schema.json"}, "$ref 'http://169.254.169.254/schema.json'"),
        ({"$ref": "file:///etc/passwd"}, "$defs"),
        ({"properties": {"const": {"$ref": "other.json#/a"}}}, "other.json"),
        ({"anyOf": [STRING, {"items": {"$dynamicRef": "x"}}]}, "$dynamicRef"),
        # llguidance takes 8 GiB for this one, and ends its process where it cannot have them.
        ({"type": "array", "maxItems": 10**9}, "maxItems"),
        ({"$ref": "#/examples/0", "examples": [{"type": "array", "maxItems": 1e9}]}, "maxItems"),
        ({"prefixItems": [{"items": STRING, "maxItems": 40_000}] * 2}, "80000"),
        ({"type": "array", "maxItems": 10**9, "examples": [{"maxItems": -(10**9)}]}, "maxItems"),
        # 14 of these would take it minutes.
        ({"allOf": [{"type": "string", "pattern": f".*a{i}.{{50}}b"} for i in range(14)]}, "14 patterns"),
        (chain_of_patterns(14), "14 patterns"),
        ({"patternProperties": {f"a{i}": STRING for i in range(9)}}, "9 patterns"),
        ({"$schema": "http://json-schema.org/draft-03/schema#"}, "draft 4"),
        ({"type": "string", "not": {"const": "a"}, "x-guidance": {"lenient": True}}, "x-guidance"),
        (True, "object"),
        ([], "object"),
    ],
)
def test_a_schema_that_cannot_be_kept_is_refused(schema: object, said: str) -> None:
    with pytest.raises(Refusal) as raised:
        check_form(form(schema))
    (violation,) = raised.value.violations
    assert violation.field == "sampling.structured.json_schema"
    assert said in violation.description


@pytest.mark.parametrize("text", ["{", "[" * 10_000, '{"maxItems": NaN', "9" * 5_000])
def test_a_schema_that_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(Refusal):
        check_form(StructuredOutput(json_schema=text))


@pytest.mark.parametrize(
    "schema",
    [
        {"$defs": {"a": STRING}, "$ref": "#/$defs/a"},
        {"properties": {"$ref": STRING, "enum": {"enum": [{"$ref": "http://example.com"}]}}},
        {"type": "array", "maxItems": 1000},
        {"$ref": "#"},
        {"properties": {f"p{i}": {"type": "string", "pattern": "a+"} for i in range(100)}},
        {"allOf": [{"type": "string", "pattern": f"a{i}"} for i in range(8)]},
        {"$schema": "https://json-schema.org/draft/2020-12/schema"},
        {"$schema": "http://json-schema.org/draft-07/schema#"},
    ],
)
def test_what_lies_in_the_schema_is_let_through(schema: object) -> None:
    check_form(form(schema))
    check_form(StructuredOutput(regex="a"))


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"not": STRING}, "not"),
        ({"type": "object", "properties": {"a": STRING, "b": STRING}, "dependentRequired": {"a": ["b"]}}, "dependent"),
        ({"if": STRING, "then": {"maxLength": 2}}, "then"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"items": STRING, "contains": STRING}, "contains"),
        ({"oneOf": [STRING, {"type": "string", "maxLength": 3}]}, "oneOf"),
        ({"$dynamicRef": "#x"}, "$dynamicRef"),
        ({"type": "string", "format": "idn-email"}, "format"),
        ({"type": "string", "pattern": "a(?=b)"}, "look-ahead"),
    ],
)
def test_a_keyword_that_the_engine_does_not_keep_is_refused(stubs: Stubs, schema: object, said: str) -> None:
    """By default vLLM gives these to xgrammar, which ignores them."""
    request = sample_request(sampling=sampling(structured=form(schema)))
    error = refused(stubs.inference.Sample, request, grpc.StatusCode.INVALID_ARGUMENT, "sampling.structured")
    assert said in error.details()


@pytest.mark.parametrize(
    ("schema", "is_kept"),
    [
        ({"type": "integer", "multipleOf": 7, "minimum": 10, "maximum": 99}, lambda found: found % 7 == 0),
        ({"enum": ["red", "green"], "maxLength": 3}, lambda found: found == "red"),
        ({"$defs": {"a": {"enum": ["x", 1]}}, "$ref": "#/$defs/a", "type": "integer"}, lambda found: found == 1),
        ({"allOf": [{"enum": [1, 2, 3]}, {"enum": [3, 4]}]}, lambda found: found == 3),
        ({"type": "integer", "anyOf": [{"minimum": 95, "maximum": 96}, {"const": 5}]}, {5, 95, 96}.__contains__),
        ({"type": "array", "items": {"const": 1}, "minItems": 2, "maxItems": 3}, lambda found: len(found) in (2, 3)),
    ],
)  # fmt: skip
def test_keywords_that_go_together_are_kept(stubs: Stubs, schema: object, is_kept: Callable[[Any], bool]) -> None:
    drawn = draw(stubs, num_completions=16, sampling=sampling(max_tokens=48, structured=form(schema)))
    ended = [json.loads(each.text) for each in drawn.completions if each.finish_reason == FINISH_REASON_STOP]
    # Some may be white space until they are cut off.
    assert len(ended) >= 4
    assert all(is_kept(each) for each in ended)
