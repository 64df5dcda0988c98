"""The errors of a server that refuses, and of one that does not answer."""

import grpc


class Answer(grpc.RpcError):
    """An error as grpc raises it, with a code and details."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details


AWAY = Answer(grpc.StatusCode.UNAVAILABLE, "connection refused")
REFUSAL = Answer(grpc.StatusCode.FAILED_PRECONDITION, "cannot read the artifact")
