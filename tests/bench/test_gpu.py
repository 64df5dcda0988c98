"""The benchmark of the GPU recipe on a tiny model and a CPU: all phases run, and stand beside what was predicted."""

from pathlib import Path

import pytest

from bench import gpu
from training.planning.hardware import Hardware
from training.planning.model_size import read_model
from training.planning.plan import make_plan

MACHINE = Hardware("a machine", bandwidth_gb_s=20.0, matmul_gflop_s=400.0, memory_gib=8.0)


# vLLM walks over all of torch's modules as it starts, deprecated names and all.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_every_phase_is_measured_beside_its_plan(tmp_path: Path) -> None:
    config, model = gpu.recipe(quick=True), gpu.write_model(tmp_path, quick=True)
    found = gpu.run(config, model)
    plan = make_plan(config, read_model(model), MACHINE, config.ppo.max_prompt_tokens, config.ppo.max_tokens)
    figures = {figure.name: figure for figure in gpu.figures(found, plan, MACHINE)}
    assert len(found.rounds) == gpu.NUM_ROUNDS
    for phase in ("rollouts", "scoring", "update", "reward model"):
        seconds, predicted = figures[f"{phase}: seconds"], figures[f"{phase}: predicted"]
        assert seconds.value > 0 < predicted.value
        assert figures[f"{phase}: share of the roof"].value < 1
    # Nearly the longest that the plan allows for: one token of this small vocabulary's 512 ends a rollout.
    assert min(metrics["completion/length"] for metrics in found.rounds) > 0.85 * config.ppo.max_tokens
    assert figures["sampler against trainer"].value < 0.01
