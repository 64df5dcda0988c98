"""Runs the demo: users rank, a policy is trained on their rankings, serving swaps to it, and users ask it again.

All processes are the real ones: `alignd up` starts them, and this process is an application with its users, who know
the server by its gRPC API alone.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import grpc
from rich.console import Console
from rich.markup import escape

from alignd.client import AligndError
from alignd.v1 import policy_service_pb2 as policy_pb
from alignd.v1 import policy_service_pb2_grpc
from alignd.v1.inference_service_pb2 import SampleResponse
from deploy.apart import apart
from deploy.capacity import fitted_settings
from deploy.cli.plain import plain
from deploy.config import AligndConfig
from deploy.demo.follow import RunError, RunSoFar, phase_seconds, read_run, swapped
from deploy.demo.progress import Bar, Stages
from deploy.demo.report import finish
from deploy.demo.summary import Observed, compare, summarize
from deploy.demo.users import Tally, Traffic, answers
from deploy.demo.waiting import POLL_SECONDS, DemoError, beside, until_ended, until_serving
from deploy.importing.first import import_configured
from deploy.simulation.config import SimulationConfig
from deploy.simulation.labelers import Labeler
from deploy.simulation.prompts import load_prompts
from deploy.simulation.user import calibrated_labelers, run_users
from deploy.up import VERBS, child_environment, die_with_parent
from feedback.bus.contract import BusError
from training.runs.record import METRICS_FILE

_TRAINING_TIMEOUT_SECONDS = 3600.0
_AFTER_SWAP_SECONDS = 3.0
_CALL_TIMEOUT_SECONDS = 30.0


def run_demo(config: AligndConfig, simulation: SimulationConfig, model: str, began_at: float | None) -> bool:
    """Runs the demo, and returns whether a new policy went live with no request failed.

    Args:
        config: what is started; `serving.port` is decided.
        simulation: who the users are.
        model: name of the model that is served.
        began_at: when set-up began, in Unix time, if it was part of the run.

    Raises:
        ConfigError: the model cannot be served or trained.
    """
    console = Console()
    stages = Stages(console)
    tally = Tally()
    earlier = _earlier_data(config)
    if earlier:
        console.print(f"[red]The demo needs a place of its own:[/] {escape(plain(earlier))}", soft_wrap=True)
        return False
    console.print(
        plain(f"alignd demo: {model}. Everything it writes is in {config.data_dir}"),
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    with stages.stage("import the model"), contextlib.suppress(BusError):
        # Memory first: who lacks it should not wait for an import, which would lack it too.
        os.environ.update(apart(fitted_settings, config, VERBS))
        # Without the bus, this is left to the server.
        import_configured(config)
    supervisor = subprocess.Popen(
        [sys.executable, "-m", "deploy.cli", "up", "--without", "gateway"],
        env=child_environment(config),
        stdout=(config.data_dir / "up.log").open("ab"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
        # Whoever ends the demo ends the rest, in order.
        preexec_fn=partial(die_with_parent, signal.SIGTERM),
    )
    try:
        observed = asyncio.run(_run_stages_while_up(config, simulation, stages, tally, supervisor, began_at))
    except (DemoError, RunError, AligndError, grpc.aio.AioRpcError) as error:
        logs = escape(plain(config.data_dir / "logs"))
        console.print(f"[red]The demo failed:[/] {escape(plain(error))}\nThe logs are in {logs}", soft_wrap=True)
        return False
    finally:
        supervisor.send_signal(signal.SIGTERM)
        supervisor.wait()
    with stages.stage("compare both policies by the users' utility"):
        compared = compare(config, simulation, observed)
    result = summarize(config, simulation, model, observed, compared, stages.finished, tally)
    finish(result, config.data_dir, console)
    return not tally.failures


def _earlier_data(config: AligndConfig) -> str:
    """Returns where there are runs or rankings that would be mistaken for the demo's; empty if there are none."""
    from sqlalchemy import make_url

    from feedback.store.reader import Store

    if any(config.runs_dir.glob(f"*/{METRICS_FILE}")):
        return f"there are runs in {config.runs_dir}; name another ALIGND_DATA_DIR"
    with contextlib.closing(Store(config.store_url)) as store:
        ranked = store.last_seq()
    return (
        f"there are rankings in the store {make_url(config.store_url)!r}; name another ALIGND_STORE" if ranked else ""
    )


async def _run_stages_while_up(
    config: AligndConfig,
    simulation: SimulationConfig,
    stages: Stages,
    tally: Tally,
    supervisor: subprocess.Popen[bytes],
    began_at: float | None,
) -> Observed:
    """Runs the stages while `alignd up` runs.

    Raises:
        DemoError, RunError: `alignd up` has ended, or a stage failed.
        AligndError, grpc.aio.AioRpcError: a call that a stage cannot do without failed.
    """
    ended = asyncio.create_task(until_ended(supervisor, config.data_dir / "up.log"))
    return await beside(ended, _run_stages(config, simulation, stages, tally, began_at))


async def _run_stages(
    config: AligndConfig,
    simulation: SimulationConfig,
    stages: Stages,
    tally: Tally,
    began_at: float | None,
) -> Observed:
    """Runs the demo, stage by stage.

    Raises:
        DemoError: a stage took too long, or its result cannot be used.
        RunError: the training run stopped, or a replica could not swap.
        AligndError, grpc.aio.AioRpcError: a call that the demo needs failed.
    """
    address = config.server_address
    held_out = load_prompts("held_out")[: simulation.held_out_prompts]
    prompts = load_prompts("train")
    with stages.stage("start the server on vLLM") as bar:
        await until_serving(config.server, config.data_dir / "logs" / "serve.log", bar)
    with stages.stage("calibrate the labelers") as bar:
        bar.update(0, None)
        # Calibration takes other prompts than ranking: a prompt belongs to the side of the split of the first user who
        # sent it, who should be a labeler.
        labelers = await calibrated_labelers(address, prompts[::-1], simulation)
        tally.samples += min(len(prompts), simulation.calibration_prompts)
    with stages.stage("users sample and rank") as bar:
        first_ranking_at = await _rank(address, simulation, prompts, labelers, tally, bar)
    began_training = time.time()
    traffic = Traffic(address, prompts, labelers, simulation, tally)
    asking = asyncio.create_task(traffic.run())
    with stages.stage("learn, register, swap") as bar:
        both = asyncio.gather(_until_swapped(config, traffic, bar), _ask_reference(config, simulation, held_out, tally))
        (run, replica, policy), before = await beside(asking, both)
        await asyncio.sleep(_AFTER_SWAP_SECONDS)
        traffic.stop()
        await asking
    stages.split(phase_seconds(run, began_training))
    with stages.stage("ask the new policy the held-out prompts") as bar:
        after = await answers(address, held_out, simulation, tally, lambda done: bar.update(done, len(held_out)))
    since = first_ranking_at - began_at if began_at else None
    return Observed(before, after, run, replica, policy, since)


async def _ask_reference(
    config: AligndConfig, simulation: SimulationConfig, held_out: Sequence[str], tally: Tally
) -> list[SampleResponse]:
    """Returns the live policy's answers to the held-out prompts, asked once the run cannot train on them any more.

    A run reads the store's prompts when it begins: asked before that, these would be among its prompts.

    Raises:
        DemoError: the new policy went live in between.
        grpc.aio.AioRpcError: a request failed.
    """
    while not read_run(config.runs_dir).records:
        await asyncio.sleep(POLL_SECONDS)
    responses = await answers(config.server_address, held_out, simulation, tally, lambda done: None)
    if len({each.policy.version for response in responses for each in response.completions}) != 1:
        raise DemoError("the new policy went live before the reference had answered the held-out prompts")
    return responses


async def _rank(
    address: str,
    simulation: SimulationConfig,
    prompts: Sequence[str],
    labelers: Sequence[Labeler],
    tally: Tally,
    bar: Bar,
) -> float:
    """Has users rank as many samples as `simulation` says. Returns when the first was ranked, in Unix time.

    Raises:
        DemoError: no ranking was accepted.
    """
    total = simulation.num_rankings
    first: list[float] = []

    def on_turn(turn: object) -> None:
        tally.add(turn)  # type: ignore[arg-type]
        if tally.rankings and not first:
            first.append(time.time())
        bar.update(tally.rankings, total, f"{tally.rankings} rankings, {len(tally.failures)} failed")

    wanted = [prompts[index % len(prompts)] for index in range(total)]
    await run_users(address, wanted, labelers, simulation, on_turn)
    if not first:
        raise DemoError(f"no ranking was accepted; the first failure: {tally.failures[:1]}")
    return first[0]


async def _until_swapped(
    config: AligndConfig, traffic: Traffic, bar: Bar
) -> tuple[RunSoFar, policy_pb.ReplicaStatus, policy_pb.Policy]:
    """Follows the trainer until the server serves what it made."""
    started = time.monotonic()
    async with config.server.async_channel() as channel:
        policies = policy_service_pb2_grpc.PolicyServiceStub(channel)
        while time.monotonic() - started < _TRAINING_TIMEOUT_SECONDS:
            run = read_run(config.runs_dir)
            last = run.last
            traffic.busy = last["phase"] in ("evaluate", "register", "done")
            bar.update(last["index"] + 1, last["count"], f"{last['phase']}  {run.detail()}")
            for record in run.of("register"):
                if not record["promoted"]:
                    raise RunError(f"the new policy did not pass: {run.of('evaluate')}")
                response = await policies.ListPolicies(
                    policy_pb.ListPoliciesRequest(), timeout=_CALL_TIMEOUT_SECONDS, metadata=config.server.metadata()
                )
                replica = swapped(response, record["version"])
                if replica:
                    name = f"v{record['version']}"
                    found = await policies.GetPolicy(
                        policy_pb.GetPolicyRequest(policy=name),
                        timeout=_CALL_TIMEOUT_SECONDS,
                        metadata=config.server.metadata(),
                    )
                    return run, replica, found.policy
            await asyncio.sleep(POLL_SECONDS)
    raise DemoError(f"no new policy in {_TRAINING_TIMEOUT_SECONDS:.0f} s")


def make_model(quick: bool, root: Path) -> str:
    """Makes the model, unless an earlier demo has made it, and returns its name.

    Raises:
        deploy.models.ModelError: its package is missing.
    """
    from deploy.models import make_tiny_llama, prepare_smollm2

    if quick:
        apart(make_tiny_llama, _model_folder(quick, root))
        return "a tiny random Llama"
    folder = _model_folder(quick, root)
    if not folder.is_dir():
        told = plain(f"writing SmolLM2-135M-Instruct to {folder} …")
        Console().print(told, highlight=False, markup=False, soft_wrap=True)
    apart(prepare_smollm2, folder)
    return "SmolLM2-135M-Instruct"


def _model_folder(quick: bool, root: Path) -> Path:
    """Returns the folder of the model."""
    return root / "models" / ("tiny-llama" if quick else "smollm2")


def set_up(quick: bool, config: AligndConfig) -> None:
    """Sets the environment to use the model, and a folder and topics of the demo's own.

    Variables that are set already stay as they are.
    """
    folder = config.data_dir / f"demo-{time.strftime('%Y%m%d-%H%M%S')}"
    defaults = {
        "ALIGND_DATA_DIR": str(folder),
        "ALIGND_SERVING__INITIAL_MODEL": str(_model_folder(quick, config.data_dir)),
        "ALIGND_SERVING__PORT": "0",
        **(QUICK if quick else REAL),
    }
    for variable, value in defaults.items():
        os.environ.setdefault(variable, value)
    if config.bus.startswith("kafka://") and "/" not in config.bus.removeprefix("kafka://"):
        # Topics of an earlier demo on the same cluster would be mistaken for this one's.
        os.environ["ALIGND_BUS"] = f"{config.bus}/{folder.name}"


# Short answers need little of the cache, and laptops of 8 GB are to run the demo.
REAL = {"ALIGND_SERVING__KV_CACHE_MIB": "256", "ALIGND_TRAINING__KV_CACHE_MIB": "256"}
# The same path in a minute, with fewer of everything. A random model has nothing to learn from, so the new policy
# goes live whatever its win rate. Of 48 rankings, 12 are by the users who are held out.
QUICK = {
    "ALIGND_SERVING__MAX_MODEL_LEN": "512",
    "ALIGND_SERVING__KV_CACHE_MIB": "64",
    "ALIGND_TRAINING__KV_CACHE_MIB": "64",
    "ALIGND_SIMULATION__NUM_RANKINGS": "48",
    "ALIGND_SIMULATION__HELD_OUT_PROMPTS": "50",
    "ALIGND_SIMULATION__HELD_OUT_COMPLETIONS": "2",
    "ALIGND_SIMULATION__MAX_TOKENS": "24",
    "ALIGND_TRAINING__MIN_NEW_RANKINGS": "36",
    "ALIGND_TRAINING__MIN_WIN_RATE": "0",
    "ALIGND_TRAINING__COMPLETIONS_PER_EVALUATION_PROMPT": "2",
    "ALIGND_TRAINING__PPO__NUM_ROUNDS": "4",
    "ALIGND_TRAINING__PPO__MAX_TOKENS": "24",
}
