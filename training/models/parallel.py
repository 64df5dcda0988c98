"""What several processes of one run share: weights in shards, what each has found, and what the first decides.

One process, or rank, has one device. Weights, gradients and moments are divided among them by torch's FSDP2; a round's
prompts are divided too, and every sum is over all ranks, so that together they take the step that one process would.
With one process every function here hands back what it was given.

Collectives pair up by order alone: each rank must call the same ones equally often. A rank that cannot go on ends its
process, the launcher ends the others, and the run goes on from its last checkpoint.
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
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from training.data.groups import micro_batches
from training.errors import TrainingError

# Between two collectives inside a pass there is little work, so that a rank that hangs is soon found out.
PASS_TIMEOUT = timedelta(minutes=30)
# The others wait while the first waits for rankings, is paused, or fits the reward model.
WAIT_TIMEOUT = timedelta(days=365)
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}

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
        """Whether this is the one that writes, logs and speaks for all."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of `count` items are this rank's. Raises ValueError if they cannot be divided evenly."""
        if count % self.size:
            raise ValueError(f"{count} cannot be divided evenly among {self.size} processes")
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)


ALONE = Ranks()


def join(num_processes: int) -> Ranks:
    """Meets the other processes that torchrun has started. Raises TrainingError if it has started another number."""
    found = int(os.environ.get("WORLD_SIZE", "1"))
    if found != num_processes:
        raise TrainingError(
            f"training.num_processes is {num_processes}, but {found} were started; `alignd train` starts as many"
        )
    if num_processes == 1:
        return ALONE
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if torch.cuda.device_count() < num_processes:
            raise TrainingError(f"training.num_processes is {num_processes}, but GPUs: {torch.cuda.device_count()}")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group(BACKENDS[device], timeout=PASS_TIMEOUT)
    talk = distributed.new_group(backend="gloo", timeout=WAIT_TIMEOUT)
    return Ranks(distributed.get_rank(), num_processes, init_device_mesh(device, (num_processes,)), talk)


def shard(ranks: Ranks, *modules: nn.Module) -> None:
    """Divides the parameters of each module, but for those of modules named before it, among the ranks.

    They are gathered while the module runs, forward or backward, in their own type: computing stays what it was.
    Gradients become the sum over ranks.
    """
    if ranks.mesh is None:
        return
    for module in modules:
        divided = fully_shard(module, mesh=ranks.mesh, reshard_after_forward=True)
        # The loss is divided by all ranks' tokens already, and gloo knows no other reduction.
        divided.set_gradient_divide_factor(1.0)
        divided.set_force_sum_reduction_for_comms(True)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be in shards; a collective if it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every rank has, on the device of `like`, and in shards if that is."""
    if isinstance(like, DTensor):
        divided = distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
        # A shard is a view of the whole, which must not stay.
        return divided.clone()
    return tensor.to(like.device)


def gathered(ranks: Ranks, items: Sequence[T]) -> list[T]:
    """All ranks' items, the first rank's first."""
    if ranks.size == 1:
        return list(items)
    found: list[Any] = [None] * ranks.size
    distributed.all_gather_object(found, list(items), group=ranks.talk)
    return [item for part in found for item in part]


def gathered_tensor(ranks: Ranks, values_N: Tensor) -> Tensor:
    """All ranks' values, end to end."""
    if ranks.size == 1:
        return values_N
    return torch.cat(gathered(ranks, [values_N.cpu()])).to(values_N.device)


def summed(ranks: Ranks, values: Mapping[str, float]) -> dict[str, float]:
    """The sum over ranks of each value. All ranks have the same names."""
    found = gathered(ranks, [values])
    return {name: sum(each[name] for each in found) for name in values}


def led(ranks: Ranks, action: Callable[[], T]) -> T:
    """Has the first rank alone do something, and returns what came of it to all. It must be small enough to be sent.

    Raises, on the first rank, what `action` raised, and TrainingError on the others: all leave together.
    """
    if ranks.size == 1:
        return action()
    if not ranks.leads:
        answer: list[Any] = [None, ""]
        distributed.broadcast_object_list(answer, src=0, group=ranks.talk)
        if answer[1]:
            raise TrainingError(f"the first process could not go on: {answer[1]}")
        return answer[0]  # type: ignore[no-any-return]
    try:
        result = action()
    except Exception as error:
        distributed.broadcast_object_list([None, f"{type(error).__name__}: {error}"], src=0, group=ranks.talk)
        raise
    distributed.broadcast_object_list([result, ""], src=0, group=ranks.talk)
    return result


def micro_batches_in_step(ranks: Ranks, lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """This rank's batches of rows that all share, as training.data.groups makes them: indices of rows, the shortest
    first.

    Rows are dealt by length. Every rank has as many rows, and by splitting some of its batches as many batches, as any
    other, since each pass gathers shards of weights. Raises ValueError if rows cannot be divided evenly.
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
