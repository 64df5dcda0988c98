"""Lets several processes, or ranks, do one run: they divide weights, gather results, and follow the first rank.

Each rank has one device. torch's FSDP2 divides weights, gradients and moments among the ranks. A round's prompts are
divided too, and every sum is over all ranks, so that together they take the optimizer step that one process would take.
With one process every function here returns what it was given.

Collectives are matched by their order alone: all ranks must call the same ones in the same order. A rank that cannot
continue ends its process; the launcher then ends the others, and the run resumes from its last checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from training.data.groups import micro_batches
from training.errors import TrainingError

# There is little work between two collectives of a pass, so that a longer wait means that a rank hangs.
_PASS_TIMEOUT = timedelta(minutes=30)
# The other ranks wait while the first waits for rankings, is paused, or fits the reward model.
_WAIT_TIMEOUT = timedelta(days=365)
_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Which process this is, of how many."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    """The devices that weights are divided among; None with one process."""
    talk: distributed.ProcessGroup | None = None
    """Carries Python objects over the CPU; None with one process."""

    @property
    def leads(self) -> bool:
        """Whether this is the first rank, which alone writes, logs and calls serving."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Returns the indices of this rank's part of `count` items.

        Raises:
            ValueError: the items cannot be divided evenly.
        """
        if count % self.size:
            raise ValueError(f"{count} cannot be divided evenly among {self.size} processes")
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)


ALONE = Ranks()


def join(num_processes: int) -> Ranks:
    """Joins the other processes that torchrun has started.

    Raises:
        TrainingError: torchrun has started another number of processes, or there are fewer GPUs than processes.
    """
    found = int(os.environ.get("WORLD_SIZE", "1"))
    if found != num_processes:
        raise TrainingError(
            f"training.num_processes is {num_processes}, but {found} were started; `alignd train` starts the right "
            "number"
        )
    if num_processes == 1:
        return ALONE
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if torch.cuda.device_count() < num_processes:
            raise TrainingError(
                f"training.num_processes is {num_processes}, but the number of GPUs is {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group(_BACKENDS[device], timeout=_PASS_TIMEOUT)
    talk = distributed.new_group(backend="gloo", timeout=_WAIT_TIMEOUT)
    return Ranks(distributed.get_rank(), num_processes, init_device_mesh(device, (num_processes,)), talk)


def shard(ranks: Ranks, *modules: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Divides the parameters of each module among the ranks, except those of modules named before it.

    While a module runs, forward or backward, its parameters are gathered, in `dtype` if one is given and else in their
    own type, so that the results stay the same. Gradients become the sum over ranks, in the parameters' own type.
    """
    if ranks.mesh is None:
        return
    for module in modules:
        policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None, cast_forward_inputs=False
        )
        divided = fully_shard(module, mesh=ranks.mesh, reshard_after_forward=True, mp_policy=policy)
        # The loss is already divided by the tokens of all ranks, and gloo has no other reduction than the sum.
        divided.set_gradient_divide_factor(1.0)
        divided.set_force_sum_reduction_for_comms(True)


def whole(tensor: Tensor) -> Tensor:
    """Returns the whole of a tensor that may be in shards; a collective if it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Returns this rank's shard of a tensor; all of it if it is not in shards."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """Moves a whole tensor, which every rank has, to the device of `like`, and divides it if `like` is in shards."""
    if isinstance(like, DTensor):
        divided = distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
        # A shard is a view of the whole tensor, which must not stay in memory.
        return divided.clone()
    return tensor.to(like.device)


def gathered(ranks: Ranks, items: Sequence[T]) -> list[T]:
    """Returns all ranks' items, in the order of the ranks."""
    if ranks.size == 1:
        return list(items)
    found: list[Any] = [None] * ranks.size
    distributed.all_gather_object(found, list(items), group=ranks.talk)
    return [item for part in found for item in part]


def gathered_tensor(ranks: Ranks, values_N: Tensor) -> Tensor:
    """Returns all ranks' values, end to end."""
    if ranks.size == 1:
        return values_N
    return torch.cat(gathered(ranks, [values_N.cpu()])).to(values_N.device)


def summed(ranks: Ranks, values: Mapping[str, float]) -> dict[str, float]:
    """Returns the sum over ranks of each value. All ranks have the same names."""
    found = gathered(ranks, [values])
    return {name: sum(each[name] for each in found) for name in values}


def led(ranks: Ranks, action: Callable[[], T]) -> T:
    """Has the first rank alone do something, and returns the result on all ranks. It must be small enough to be sent.

    If the action fails, all ranks raise: the first raises the action's own error.

    Raises:
        TrainingError: the action failed; on every rank except the first.
    """
    if ranks.size == 1:
        return action()
    if not ranks.leads:
        answer: list[Any] = [None, ""]
        distributed.broadcast_object_list(answer, src=0, group=ranks.talk)
        if answer[1]:
            raise TrainingError(f"the first process could not continue: {answer[1]}")
        return answer[0]  # type: ignore[no-any-return]
    try:
        result = action()
    except Exception as error:
        distributed.broadcast_object_list([None, f"{type(error).__name__}: {error}"], src=0, group=ranks.talk)
        raise
    distributed.broadcast_object_list([result, ""], src=0, group=ranks.talk)
    return result


def micro_batches_in_step(ranks: Ranks, lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Returns this rank's batches of rows that all ranks divide: the indices of each batch's rows, the shortest first.

    The batches are as training.data.groups.micro_batches makes them. Rows are dealt to the ranks by length. Every rank
    has equally many rows, and some split batches until all ranks have equally many, because each pass gathers weights
    from all ranks.

    Raises:
        ValueError: the rows cannot be divided evenly.
    """
    by_length = sorted(range(len(lengths)), key=lambda index: lengths[index])
    num_rows = len(ranks.share(len(lengths)))
    dealt = [by_length[rank :: ranks.size] for rank in range(ranks.size)]
    batches = [micro_batches([lengths[index] for index in rows], max_tokens) for rows in dealt]
    mine, most = batches[ranks.rank], max(map(len, batches))
    assert most <= num_rows
    while len(mine) < most:
        at = max(range(len(mine)), key=lambda index: len(mine[index]))
        half = len(mine[at]) // 2
        mine[at : at + 1] = [mine[at][:half], mine[at][half:]]
    return [[dealt[ranks.rank][index] for index in batch] for batch in mine]
