"""How likely a prompt is: what the engine says is what transformers computes from the same weights."""

from pathlib import Path

import grpc
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignd.v1.inference_service_pb2 import SampleRequest, StreamSampleRequest
from alignd.v1.types_pb2 import Prompt
from policies.precision import compute_dtype
from tests.serving.calls import TIMEOUT_SECONDS, Stubs, draw, refused, sample_request, sampling

pytestmark = pytest.mark.timeout(300)

# More than two blocks of the prefix cache, which have 32 tokens each.
TEXT = "The sky is blue because the air scatters short waves. " * 6
DTYPE = compute_dtype(torch.device("cpu"))
# Nats.
CLOSE = {torch.float32: 0.002}.get(DTYPE, 0.05)


def measuring(**fields: object) -> SampleRequest:
    given = {"prompt": Prompt(text=TEXT), "num_completions": 1, "store": False, "prompt_logprobs": 2, **fields}
    return sample_request(**given)


def test_a_prompt_is_as_likely_as_transformers_finds_it(stubs: Stubs, tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=DTYPE)
    ids = tokenizer.encode(TEXT)
    with torch.no_grad():
        logprobs_TV = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    # The prefix cache may have all of it by then, without log-probabilities.
    draw(stubs, prompt=Prompt(text=TEXT), num_completions=1)
    assert len(ids) > 64
    for _ in range(2):
        answer = stubs.inference.Sample(measuring(return_token_ids=True), timeout=TIMEOUT_SECONDS)
        rows = answer.prompt_logprobs
        assert [row.token_id for row in rows] == list(answer.prompt_token_ids) == ids
        assert "".join(row.token for row in rows).endswith(TEXT)
        assert (rows[0].logprob, len(rows[0].top)) == (0, 0)
        for place, row in enumerate(rows[1:]):
            assert row.logprob == pytest.approx(float(logprobs_TV[place, row.token_id]), abs=CLOSE)
            assert len(row.top) == 2
            assert row.top[0].logprob == pytest.approx(float(logprobs_TV[place].max()), abs=CLOSE)
        assert not answer.feedback_token


def test_a_stream_ends_with_them_too(stubs: Stubs) -> None:
    request = StreamSampleRequest.FromString(measuring().SerializeToString())
    (*_, last) = stubs.inference.StreamSample(request, timeout=TIMEOUT_SECONDS)
    whole = stubs.inference.Sample(measuring(sampling=sampling(max_tokens=1)), timeout=TIMEOUT_SECONDS)
    assert len(whole.completions[0].logprobs) == 0
    assert [row.token_id for row in last.finished.prompt_logprobs] == [row.token_id for row in whole.prompt_logprobs]


def test_what_does_not_ask_has_none(stubs: Stubs) -> None:
    assert not draw(stubs, top_logprobs=1).prompt_logprobs


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"store": True}, "prompt_logprobs"),
        ({"store": None}, "prompt_logprobs"),
        ({"num_completions": 2}, "prompt_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"top_logprobs": 20, "num_completions": 1, "sampling": sampling(max_tokens=0)}, "sampling.max_tokens"),
    ],
)
def test_what_does_not_go_with_them_is_refused(stubs: Stubs, fields: dict[str, object], field: str) -> None:
    refused(stubs.inference.Sample, measuring(**fields), grpc.StatusCode.INVALID_ARGUMENT, field)
