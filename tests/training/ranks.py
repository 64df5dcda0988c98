"""Runs work in two processes that communicate over gloo as they would over NCCL, each with a tiny policy."""

import faulthandler
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from policies import precision
from tests.training.learning import EOS, PROMPTS, learner_of, ranked_examples
from tests.training.sampling import PlainSampler
from training.config import PpoConfig, RewardModelConfig
from training.errors import TrainingError
from training.models.masters import trained_weights
from training.models.parallel import Ranks, gathered, join, led, whole
from training.models.policy import SharedLayers, load_model
from training.models.reward import RewardModel
from training.ppo import rounds as ppo
from training.ppo.learner import Learner
from training.ppo.rollouts import Request, Rollout
from training.rewards.fit import fit

SIZE = 2
# The modules that all processes need are imported once, in the process that the others are forked from.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.training.ranks"])
SECONDS = 90
OWN_LAYERS = RewardModelConfig(num_layers=2, num_heads=2, num_trained_layers=1)

Work = Callable[..., None]


def on_two_ranks(work: Work, *arguments: Any) -> list[int | None]:
    """Calls `work(ranks, *arguments)` in two processes. Returns their exit codes, the first rank's first.

    The last path among the arguments is the folder that they write to. Once a rank died by SIGSEGV inside torch, for
    which there is no better cure than the launcher's: both start again. Where it happened is on standard error.
    """
    *_, out = [None, *(each for each in arguments if isinstance(each, Path))]
    with tempfile.TemporaryDirectory() as kept:
        if out:
            shutil.copytree(out, kept, dirs_exist_ok=True)
        codes = _run(work, arguments)
        if -signal.SIGSEGV in codes:
            if out:
                shutil.rmtree(out)
                shutil.copytree(kept, out)
            codes = _run(work, arguments)
    return codes


def _run(work: Work, arguments: Sequence[Any]) -> list[int | None]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [CONTEXT.Process(target=_start, args=(rank, port, work, arguments)) for rank in range(SIZE)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
    for process in processes:
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def _start(rank: int, port: int, work: Work, arguments: Sequence[Any]) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": SIZE, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    work(join(SIZE), *arguments)
    distributed.destroy_process_group()


class ReplayedRollouts:
    """Rollouts that were drawn beforehand, in place of a sampler that draws them."""

    def __init__(self, drawn: Mapping[ppo.Prompt, list[Rollout]]) -> None:
        self.drawn = drawn

    def draw(self, request: Request) -> list[list[Rollout]]:
        """Returns the same rollouts for all weights and seeds. It takes the weights, as ranks merge them together."""
        dict(request.weights)
        return [self.drawn[tuple(prompt)] for prompt in request.prompts]


def text_for(config: PpoConfig) -> Iterator[tuple[int, ...]] | None:
    """Returns pretraining sequences if the configuration has a pretraining mix."""
    return itertools.cycle([tuple(range(i + 3, i + 15)) for i in range(40)]) if config.ptx.data else None


def make_learner(ranks: Ranks, folder: Path, config: PpoConfig) -> Learner:
    """Returns a learner whose reward model and value model have their own layers."""
    torch.manual_seed(0)
    shared = SharedLayers(load_model(folder))
    rewards = RewardModel(shared, OWN_LAYERS)
    fit(rewards, ranked_examples(shared, 24, seed=1), OWN_LAYERS, seed=0, warm=False, log=lambda *_: None)
    return learner_of(shared, folder, config, rewards, ranks)


def one_update(
    ranks: Ranks, folder: Path, out: Path, config: PpoConfig, drawn: Mapping[ppo.Prompt, list[Rollout]], fp32: bool
) -> None:
    """Takes the optimizer steps of one round on given rollouts, and writes weights and figures."""
    if fp32:
        precision.cpu_multiplies_bf16 = lambda: False
    learner = make_learner(ranks, folder, config)
    replayed, seen = ReplayedRollouts(drawn), []
    log = lambda *each: seen.append(each[2])  # noqa: E731
    hooks = ppo.PpoHooks(list(drawn), replayed.draw, log, text_for(config))
    assert ppo.train(learner, config, hooks, seed=3) is None
    leave(ranks, out, learner, seen)


def leave(ranks: Ranks, out: Path, learner: Learner, seen: Sequence[Mapping[str, Any]]) -> None:
    """Writes this rank's weights and figures to files with its number."""
    weights = {f"policy.{name}": whole(each) for name, each in trained_weights(learner.policy).items()}
    weights |= {f"value.{name}": whole(each) for name, each in trained_weights(learner.value).items()}
    torch.save(weights, out / f"weights-{ranks.rank}.pt")
    figures = [{name: value for name, value in each.items() if not name.startswith("seconds/")} for each in seen]
    (out / f"figures-{ranks.rank}.json").write_text(json.dumps(figures))


def left(out: Path, rank: int) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Reads the weights and figures that a rank has written."""
    return torch.load(out / f"weights-{rank}.pt"), json.loads((out / f"figures-{rank}.json").read_text())


def several_rounds(ranks: Ranks, folder: Path, out: Path, config: PpoConfig, killed_before: int | None) -> None:
    """Trains with its own sampler, from the checkpoint if there is one. It is killed before that round."""
    learner = make_learner(ranks, folder, config)
    sampler = PlainSampler(folder, EOS)
    seen: list[Mapping[str, Any]] = []
    begun = itertools.count()

    def between() -> None:
        if next(begun) == killed_before:
            os.kill(os.getpid(), signal.SIGKILL)

    hooks = ppo.PpoHooks(
        PROMPTS, sampler.draw, lambda *each: seen.append(each[2]), text_for(config),
        checkpoints=out / "checkpoints", between_rounds=between,
    )  # fmt: skip
    ppo.train(learner, config, hooks, seed=5)
    leave(ranks, out, learner, seen)


def one_dies(ranks: Ranks) -> None:
    """Ends the last rank while the first waits for the items of all ranks."""
    if ranks.leads:
        gathered(ranks, ["found"])
    else:
        os.kill(os.getpid(), signal.SIGKILL)


def first_decides(ranks: Ranks, out: Path) -> None:
    """Has the first rank alone act twice: first it returns a result, and then it fails."""
    said = [str(led(ranks, lambda: {"rank": ranks.rank}))]
    try:
        led(ranks, lambda: Path("/no/such/file").read_text())
    except (OSError, TrainingError) as error:
        said += [type(error).__name__, str(error)]
    # All ranks have raised, so that their next collectives still match.
    said += gathered(ranks, [f"rank {ranks.rank}"])
    (out / f"said-{ranks.rank}.json").write_text(json.dumps(said))
