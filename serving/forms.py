"""Refuses a JSON schema that could not be kept, or not be read within reason, before the engine sees it.

The engine's grammars come from llguidance, which refuses each keyword that it does not keep. What it says of a
reference is not for callers, and of bounds it takes as much memory as they ask for.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from alignd.v1 import types_pb2
from serving.errors import bad_field, shortened

_FIELD = "sampling.structured.json_schema"
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
# llguidance takes a KiB for each item that an array may have, when it reads the schema.
_COUNTS = ("minItems", "maxItems")
_MOST_ITEMS = 65_536
# What must match several patterns takes it twice the time and memory for each one more: 13 take 5 s.
_TOGETHER = ("allOf", "patternProperties", *_REFERENCES)
_PATTERNS = ("pattern", "format")
_MOST_PATTERNS = 8
# Older drafts have keywords of the same names with other meanings.
_DRAFT = re.compile(r"https?://json-schema\.org/(draft-0[4-7]|draft/20[0-9]{2}-[0-9]{2})/schema#?")
# Keywords whose values are no schemas, and those whose values have schemas by names of their own.
_VALUES = ("const", "enum", "default", "examples")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
# By these, llguidance takes keywords that it does not keep.
_OPTIONS = "x-guidance"


def check_form(form: types_pb2.StructuredOutput) -> None:
    """Checks what of a form the engine's own check would not say, or not survive.

    Raises:
        Refusal: INVALID_ARGUMENT, naming what cannot be kept.
    """
    if not form.json_schema:
        return
    try:
        schema = json.loads(form.json_schema)
    except (ValueError, RecursionError) as error:
        raise bad_field(_FIELD, f"is not JSON: {shortened(str(error))}") from None
    if not isinstance(schema, dict):
        raise bad_field(_FIELD, "must be an object")
    if _OPTIONS in schema:
        raise bad_field(_FIELD, f"{_OPTIONS} is not supported")
    draft = schema.get("$schema")
    if draft is not None and not (isinstance(draft, str) and _DRAFT.fullmatch(draft)):
        raise bad_field(_FIELD, "$schema must be that of draft 4, or of a later one")
    for part in _parts(schema):
        _check_references(part)
    # A reference may lead into values too.
    bounds = (part.get(name) for part in _parts(schema, with_values=True) for name in _COUNTS)
    items = sum(max(bound, 0) for bound in bounds if isinstance(bound, int | float))
    if items > _MOST_ITEMS:
        raise bad_field(_FIELD, f"minItems and maxItems are {items:g} together; at most {_MOST_ITEMS} are supported")
    _check_patterns(schema)


def _check_patterns(schema: Mapping[str, Any]) -> None:
    """Checks that no text may have to match many patterns at once.

    Raises:
        Refusal: INVALID_ARGUMENT, with their number.
    """
    parts = list(_parts(schema, with_values=True))
    named = [part["patternProperties"] for part in parts if isinstance(part.get("patternProperties"), dict)]
    count = sum(name in part for part in parts for name in _PATTERNS) + sum(map(len, named))
    if count > _MOST_PATTERNS and any(name in part for part in parts for name in _TOGETHER):
        why = f"{count} patterns and formats; beside {', '.join(_TOGETHER[:3])} at most {_MOST_PATTERNS} are supported"
        raise bad_field(_FIELD, why)


def _check_references(part: Mapping[str, Any]) -> None:
    """Checks that a schema names nothing outside itself: nothing is fetched, and nothing may be left open.

    Raises:
        Refusal: INVALID_ARGUMENT, with the reference.
    """
    for name in _REFERENCES:
        target = part.get(name)
        if isinstance(target, str) and not target.startswith("#"):
            why = f"{name} {shortened(target)!r} is outside the schema; put what it names into $defs, and refer to that"
            raise bad_field(_FIELD, why)


def _parts(schema: Mapping[str, Any], *, with_values: bool = False) -> Iterator[Mapping[str, Any]]:
    """Yields each schema in a schema; with what may look like one, if `with_values`."""
    waiting: list[Any] = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part
        elif isinstance(part, dict):
            yield part
            for name, value in part.items():
                if with_values or name not in (*_NAMED, *_VALUES):
                    waiting.append(value)
                elif name in _NAMED and isinstance(value, dict):
                    waiting += value.values()
