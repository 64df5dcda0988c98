"""Fits the reward model to rankings: all K completions of a prompt are in one term of the loss.

Fitting heads alone, with an L2 penalty, is a convex problem, which is solved to its minimum. The solution depends
neither on the order of the rankings nor on an earlier fit. From a few hundred rankings heads alone learn more than
heads with trained layers, which soon learn the noise (docs/architecture.md). With thousands of rankings, layers are
trained too: the heads are fitted first, so that their first gradients do not spoil the layers (Kumar et al. 2022,
"LP-FT"), and then layers and heads are trained together for one epoch.

Each head has its own random weights of the rankings (Rubin 1981, the Bayesian bootstrap). Shapes: see
training.models.reward.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from feedback import heartbeat
from policies.precision import compute_dtype
from training.config import RewardModelConfig
from training.data.groups import RankedExample, micro_batches, pack
from training.errors import TrainingError
from training.models.masters import cast, drop_masters, keep_masters, trained
from training.models.reward import RewardModel, features_of, group_features
from training.rewards.loss import Comparisons, compare, margins, ranking_losses

Log = Callable[[int, int, dict[str, float]], None]

_MAX_ITERATIONS = 200
_LEAST_SPREAD = 1e-4
# Most rankings that the heads are first fitted to, where layers are trained too.
PROBED_RANKINGS = 256
_LENGTH_BUCKET = 16
_MAX_GRAD_NORM = 1.0


def fit(
    model: RewardModel,
    examples: Sequence[RankedExample],
    config: RewardModelConfig,
    *,
    seed: int,
    warm: bool,
    log: Log,
    features: Sequence[Tensor] | None = None,
) -> None:
    """Fits the model to all rankings. With `warm` the model has an earlier fit, and training continues from it.

    `features` are what `group_features` returns for the rankings, if the caller has them already. They are used
    where heads alone are fitted, which then need nothing else.

    Raises:
        TrainingError: the loss is not finite.
    """
    weights = labeler_weights([example.labeler for example in examples], config.max_labeler_share)
    bootstrap_RE = bootstrap_weights(examples, config.num_heads, seed)
    if not len(model.layers):
        found = features or _features(model, examples, log)
        _fit_heads(model, found, examples, weights, bootstrap_RE, config, log)
        return
    if not warm:
        probed = random.Random(seed).sample(range(len(examples)), min(len(examples), PROBED_RANKINGS))
        some, some_weights = [examples[i] for i in probed], [weights[i] for i in probed]
        found = _features(model, some, log)
        _fit_heads(model, found, some, some_weights, bootstrap_RE[probed], config, log)
    _train_layers(model, examples, weights, bootstrap_RE, config, seed, log)


def labeler_weights(labelers: Sequence[str], max_share: float) -> list[float]:
    """Returns each ranking's weight: 1, or less for a labeler who gave more than `max_share` of all rankings."""
    counts = Counter(labelers)
    return [min(1.0, max_share * len(labelers) / counts[labeler]) for labeler in labelers]


def bootstrap_weights(examples: Sequence[RankedExample], num_heads: int, seed: int) -> Tensor:
    """Draws weights [R, E], exponential with mean 1. A ranking has the same weights in any order and at any refresh."""
    draws = [random.Random(f"{seed}/{example.labeler}/{example.seq}") for example in examples]
    return torch.tensor([[draw.expovariate(1.0) for _ in range(num_heads)] for draw in draws])


def _features(model: RewardModel, examples: Sequence[RankedExample], log: Log) -> list[Tensor]:
    groups = [example.group for example in examples]
    return group_features(model, groups, lambda done: log(done - 1, len(groups), {}))


def _fit_heads(
    model: RewardModel,
    features: Sequence[Tensor],
    examples: Sequence[RankedExample],
    weights: Sequence[float],
    bootstrap_RE: Tensor,
    config: RewardModelConfig,
    log: Log,
) -> None:
    features_NF = torch.cat(list(features))
    model.center_F.copy_(features_NF.mean(0))
    model.spread_F.copy_(features_NF.std(0).clamp_min(_LEAST_SPREAD))
    standardized_NF = model.standardized(features_NF)
    among = _on(compare([example.ranks for example in examples], weights), features_NF.device)
    bootstrap_RE = bootstrap_RE.to(features_NF.device)

    def loss() -> Tensor:
        fitted_E = ranking_losses(standardized_NF @ model.heads_FE, among, bootstrap_RE)
        return (fitted_E + config.l2 / 2 * model.heads_FE.square().sum(0)).sum()

    reached = _minimize(loss, model.heads_FE) / config.num_heads
    _check(reached)
    with torch.no_grad():
        right_M = margins(standardized_NF @ model.head_F, among) > 0
    share = float(right_M.float().mean()) if len(right_M) else 0.0
    log(len(examples) - 1, len(examples), {"reward_model/loss": reached, "reward_model/accuracy": share})


def _train_layers(
    model: RewardModel,
    examples: Sequence[RankedExample],
    weights: Sequence[float],
    bootstrap_RE: Tensor,
    config: RewardModelConfig,
    seed: int,
    log: Log,
) -> None:
    """Trains layers and heads for one epoch by AdamW, cosine to 10 %. The result is the layers' last copy in bf16."""
    model.layers.to(compute_dtype(model.shared.device))
    for parameter in (*model.layers.parameters(), model.heads_FE):
        parameter.requires_grad_(True)
    if compute_dtype(model.shared.device) != torch.float32:
        keep_masters(model.layers)
    layers = [*trained(model.layers).values()]
    optimizer = torch.optim.AdamW(
        [
            {"params": layers, "lr": config.learning_rate, "weight_decay": 0.0},
            {"params": [model.heads_FE], "lr": config.head_learning_rate, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        # It reads each tensor once in place of a dozen times: several times as fast on a CPU.
        fused=True,
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    batches = shuffled_batches([len(example.group) for example in examples], config.batch_size, seed)
    done, mean_weight = 0, sum(weights) / len(weights)
    for step, batch in enumerate(batches):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * cosine_to_tenth(step, len(batches))
        cast(model.layers, seed + step)
        optimizer.zero_grad()
        penalty = config.l2 / 2 * model.heads_FE.square().sum(0).mean()
        penalty.backward()
        loss, right = penalty.item(), []
        for part in micro_batches([len(examples[index].group) for index in batch], config.micro_batch_tokens):
            rows = [batch[index] for index in part]
            packed = pack([examples[row].group for row in rows]).to(model.shared.device)
            among = compare([examples[row].ranks for row in rows], [weights[row] for row in rows])
            # Divided by the mean weight of all rankings, not by the batch's own: rankings of little weight count little
            # also where they share a batch.
            among = _on(replace(among, total_weight=mean_weight * len(batch)), model.shared.device)
            scores_NE = model.standardized(features_of(model, packed)) @ model.heads_FE
            fitted = ranking_losses(scores_NE, among, bootstrap_RE[rows].to(scores_NE.device)).mean()
            fitted.backward()
            loss += fitted.item()
            right += (margins(scores_NE.detach().mean(1), among) > 0).tolist()
        nn.utils.clip_grad_norm_([*layers, model.heads_FE], _MAX_GRAD_NORM)
        _check(loss)
        optimizer.step()
        done += len(batch)
        share = sum(right) / len(right) if right else 0.0
        log(done - 1, len(examples), {"reward_model/loss": loss, "reward_model/accuracy": share})
    cast(model.layers, seed + len(batches))
    drop_masters(model.layers)
    # Where it computes in fp32: rounded as saved weights are.
    model.layers.bfloat16().to(compute_dtype(model.shared.device))
    model.requires_grad_(False)


def shuffled_batches(lengths: Sequence[int], size: int, seed: int) -> list[list[int]]:
    """Returns batches of `size` rows of similar length, so that there is little padding, in random order."""
    drawn = random.Random(seed)
    order = drawn.sample(range(len(lengths)), len(lengths))
    batches: list[list[int]] = []
    for start in range(0, len(order), size * _LENGTH_BUCKET):
        bucket = sorted(order[start : start + size * _LENGTH_BUCKET], key=lambda index: lengths[index])
        batches += [bucket[i : i + size] for i in range(0, len(bucket), size)]
    return drawn.sample(batches, len(batches))


def _on(among: Comparisons, device: torch.device) -> Comparisons:
    return Comparisons(
        among.winners_M.to(device), among.losers_M.to(device), among.weights_M.to(device), among.rankings_M.to(device),
        among.total_weight,
    )  # fmt: skip


def _minimize(loss: Callable[[], Tensor], parameter: nn.Parameter) -> float:
    """Minimizes a convex loss over the parameter, and returns the minimum."""
    optimizer = torch.optim.LBFGS([parameter], max_iter=_MAX_ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> float:
        heartbeat.beat()
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value.item()

    optimizer.step(closure)
    return loss().item()


def _check(loss: float) -> None:
    if not math.isfinite(loss):
        raise TrainingError(f"reward model: the loss is {loss}")


def cosine_to_tenth(step: int, num_steps: int) -> float:
    """Returns the learning rate's factor: from 1 at step 0 to 0.1 at the last step, along a cosine (appendix C.2)."""
    progress = step / max(1, num_steps - 1)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))
