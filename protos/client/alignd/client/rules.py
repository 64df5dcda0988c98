"""The contract's rules, which are part of its generated code, checked before a request is sent. Needs protovalidate."""

import grpc
from google.protobuf.message import Message

from alignd.client.errors import AligndError, FieldViolation

try:
    import protovalidate
except ImportError as error:
    raise ImportError("validate=True needs protovalidate: pip install 'alignd-client[validate]'") from error


def broken_rules(message: Message, first_only: bool = False) -> list[FieldViolation]:
    """Returns each field that breaks a rule of the contract, by its path, such as "groups[2].completion_ids[0]".

    With `first_only`, the rest of the message is not looked at after the first, which takes microseconds where a list
    of all may take seconds and gigabytes.
    """
    found = protovalidate.collect_violations(message, fail_fast=first_only)
    return [FieldViolation(_path(violation), violation.proto.message) for violation in found]


def check(message: Message) -> None:
    """Refuses a request that the server would refuse.

    Raises:
        AligndError: INVALID_ARGUMENT, with the fields at fault, as the server would say it.
    """
    violations = broken_rules(message)
    if violations:
        said = "; ".join(f"{each.field}: {each.description}" for each in violations)
        raise AligndError(grpc.StatusCode.INVALID_ARGUMENT, said, reason="INVALID_FIELD", violations=violations)


def _path(violation: "protovalidate.Violation") -> str:
    steps = []
    for element in violation.proto.field.elements if violation.proto.field else ():
        subscript = element.subscript
        index = f"[{subscript.value}]" if subscript is not None and subscript.field == "index" else ""
        steps.append(f"{element.field_name}{index}")
    return ".".join(steps) or "request"
