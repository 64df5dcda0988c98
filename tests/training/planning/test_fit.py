"""A recipe is fitted to memory by settings that change how a run computes, and by no more of them than needed."""

from hypothesis import given
from hypothesis import strategies as st

from tests.training.planning.model_configs import SMOLLM2, size_of
from training.config import TrainingConfig
from training.planning.fit import fit
from training.planning.memory import plan_memory
from training.planning.workload import assume

GIB = 2**30
BF16 = 2
CONFIG = TrainingConfig()


def peak(config: TrainingConfig) -> float:
    return plan_memory(assume(config, size_of(SMOLLM2), number_bytes=BF16)).peak


def test_what_fits_is_left_alone() -> None:
    fitted = fit(CONFIG, size_of(SMOLLM2), BF16, peak(CONFIG))
    assert (fitted.config, fitted.settings, fitted.changes) == (CONFIG, {}, ())


def test_micro_batches_become_shorter_before_anything_is_computed_twice() -> None:
    fitted = fit(CONFIG, size_of(SMOLLM2), BF16, peak(CONFIG) - 1)
    assert fitted.settings == {"micro_batch_tokens": CONFIG.ppo.micro_batch_tokens // 2}
    least = fit(CONFIG, size_of(SMOLLM2), BF16, 0)
    row = CONFIG.ppo.max_prompt_tokens + CONFIG.ppo.rollouts_per_prompt * CONFIG.ppo.max_tokens
    assert least.settings == {"micro_batch_tokens": row, "gradient_checkpointing": True}
    assert least.changes[1] == "ppo.gradient_checkpointing is True instead of False"


@given(st.floats(0.5, 6.0))
def test_a_recipe_fits_if_any_change_makes_it_fit(room_gib: float) -> None:
    fitted = fit(CONFIG, size_of(SMOLLM2), BF16, room_gib * GIB)
    assert fitted.peak == peak(fitted.config) <= peak(CONFIG)
    least = fit(CONFIG, size_of(SMOLLM2), BF16, 0).peak
    assert (fitted.peak <= room_gib * GIB) == (least <= room_gib * GIB)
    # Nothing that decides what is learned is touched.
    kept = {"micro_batch_tokens", "gradient_checkpointing"}
    assert fitted.config.ppo.model_dump(exclude=kept) == CONFIG.ppo.model_dump(exclude=kept)
    assert fitted.config.model_dump(exclude={"ppo"}) == CONFIG.model_dump(exclude={"ppo"})
