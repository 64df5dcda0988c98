"""Calls alignd from Python: `Client`, and `AsyncClient` for asyncio, over the generated code of alignd.v1."""

from alignd.client.aio import AsyncClient
from alignd.client.errors import AligndError, FieldViolation, read_error
from alignd.client.requests import PromptLike, Ranking
from alignd.client.sync import Client
from alignd.v1.feedback_service_pb2 import SubmitDemonstrationResponse, SubmitRankingResponse
from alignd.v1.inference_service_pb2 import CompletionDelta, SampleResponse
from alignd.v1.types_pb2 import Completion, Message, Prompt, SamplingParams

__all__ = [
    "AligndError",
    "AsyncClient",
    "Client",
    "Completion",
    "CompletionDelta",
    "FieldViolation",
    "Message",
    "Prompt",
    "PromptLike",
    "Ranking",
    "SampleResponse",
    "SamplingParams",
    "SubmitDemonstrationResponse",
    "SubmitRankingResponse",
    "read_error",
]
