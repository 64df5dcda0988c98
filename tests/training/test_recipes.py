"""Every recipe loads and has InstructGPT's values where it claims to, and a mistake is refused by the field's name."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from training.config import TrainingConfig
from training.recipes import FOLDER, RecipeError, load_recipe, recipe_names

LARGE = ("gpu-1.3b", "fsdp-8gpu")


def test_all_recipes_load() -> None:
    assert recipe_names() == ["fsdp-8gpu", "gpu-1.3b", "smollm2", "tiny"]
    assert all(isinstance(load_recipe(name), TrainingConfig) for name in recipe_names())


def written_out(model: BaseModel) -> dict[str, Any]:
    """Returns all fields that are set, as TOML has them."""
    values = {name: getattr(model, name) for name in type(model).model_fields}
    return {
        name: written_out(value) if isinstance(value, BaseModel) else value
        for name, value in values.items()
        if value is not None
    }


def test_smollm2_writes_out_every_default() -> None:
    assert tomllib.loads((FOLDER / "smollm2.toml").read_text()) == written_out(TrainingConfig())


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_says_for_which_model_it_is(name: str) -> None:
    text = (FOLDER / f"{name}.toml").read_text()
    said = text[: text.index("\n\n") if "\n\n" in text else None]
    assert said.startswith("# ")
    assert any(model in said for model in ("make_tiny_llama", "SmolLM2-135M", "Qwen2.5-1.5B", "Mistral-7B"))


@pytest.mark.parametrize("name", LARGE)
def test_large_recipes_are_instructgpts(name: str) -> None:
    config = load_recipe(name)
    ppo, sft = config.ppo, config.sft
    assert ppo.prompts_per_round * ppo.rollouts_per_prompt == 512
    assert ppo.num_rounds * 512 == 256_000
    assert (ppo.num_minibatches, ppo.num_epochs) == (8, 1)
    assert (ppo.max_prompt_tokens, ppo.max_tokens) == (1024, 1024)
    assert (ppo.kl_coef, ppo.target_kl, ppo.clip_range, ppo.gamma, ppo.ema_decay) == (0.02, None, 0.2, 1.0, 0.992)
    assert 2.55e-6 <= ppo.learning_rate <= 2.55e-5
    assert ppo.num_frozen_layers == ppo.lora.rank == 0
    assert ppo.ptx.data
    assert ppo.ptx.examples_per_episode == 8
    assert (sft.num_epochs, sft.learning_rate, sft.batch_size, sft.max_tokens) == (16, 9.65e-6, 32, 2048)
    assert config.reward_model.learning_rate == ppo.value_learning_rate == 9e-6


def test_a_recipe_of_ones_own_is_found_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("seed = 7\n[ppo]\nmax_tokens = 9\n")
    config = load_recipe(path)
    assert (config.seed, config.ppo.max_tokens, config.ppo.gamma) == (7, 9, 1.0)
    assert load_recipe(str(path)) == config


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[ppo]\nkl_coeff = 0.1", "mine.toml: ppo.kl_coeff: there is no such field"),
        ("[ppo]\nnum_steps = 10", "mine.toml: ppo.num_steps: is called ppo.num_rounds now"),
        ("[ppo.ptx]\nexamples = 8", "mine.toml: ppo.ptx.examples: there is no such field"),
        ("[ppo]\nmax_tokens = '64'", "mine.toml: ppo.max_tokens: Input should be a valid integer"),
        ("[ppo]\nmax_tokens = 0", "mine.toml: ppo.max_tokens: Input should be greater than or equal to 1"),
        ("[ppo]\nprompts_per_round = 5", "mine.toml: ppo: prompts_per_round must be a multiple of num_minibatches"),
        ("[ppo]\nkl_coef = 0\ntarget_kl = 6", "mine.toml: ppo: kl_coef must be above 0 where target_kl is set"),
        (
            "num_processes = 3",
            "prompts_per_round (16) must be a multiple of ppo.num_minibatches (4) times num_processes (3)",
        ),
        ("[sft]\nvalidation_share = 1.0", "mine.toml: sft.validation_share: Input should be less than 1"),
        ("seed = ", "mine.toml: Invalid value"),
    ],
)
def test_a_mistake_is_refused_by_name(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert says in str(caught.value)


def test_every_mistake_has_a_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("sed = 1\n[ppo]\ngamma = 2.0\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert len(str(caught.value).splitlines()) == 2


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no recipe 'gpu': take one of fsdp-8gpu, gpu-1\.3b, smollm2, tiny"):
        load_recipe("gpu")
    with pytest.raises(RecipeError, match=r"none\.toml: .*No such file"):
        load_recipe(tmp_path / "none.toml")
