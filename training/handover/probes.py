"""Makes probes: token sequences with the trainer's log-probabilities, by which a server proves which policy it serves.

The log-probabilities are computed with the weights as saved, in bf16, not with the trainer's fp32 weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from alignd.v1 import policy_manifest_pb2
from training.models.anatomy import head_of, parts_of
from training.models.logprobs import label_logprobs
from training.models.policy import load_model

MAX_PROBE_TOKENS = 64


@torch.no_grad()
def probes_of(policy_folder: Path, sequences: Sequence[Sequence[int]], most: int) -> list[policy_manifest_pb2.Probe]:
    """Computes the log-probability of each token except the first of each sequence, under the saved policy.

    Sequences are cut to MAX_PROBE_TOKENS. The probes are the first `most` sequences that have two tokens or more.
    """
    probed = [sequence for sequence in sequences if len(sequence) > 1][:most]
    model = load_model(policy_folder)
    body, head = parts_of(model).body, head_of(model)
    probes = []
    for sequence in probed:
        token_ids = list(sequence[:MAX_PROBE_TOKENS])
        hidden_TD = body.forward(torch.tensor([token_ids], device=model.device)).last_hidden_state[0]
        logprobs_T = label_logprobs(hidden_TD[:-1], head, torch.tensor(token_ids[1:], device=model.device))
        probes.append(policy_manifest_pb2.Probe(token_ids=token_ids, logprobs=logprobs_T.tolist()))
    return probes
