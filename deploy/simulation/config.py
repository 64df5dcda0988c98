"""The settings of the simulated users: the section `simulation` of the same file and environment as the operators'."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from deploy.config import PREFIX, load_settings, read_file


class SimulationConfig(BaseModel):
    """Who the simulated users are, what they want and how they ask."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    utility: str = Field(
        "deploy.simulation.utility:chat_utility",
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$",
        description="What users want: a function (prompt, completion) -> float, named as package.module:function.",
    )
    agreement: float = Field(
        0.726,
        gt=0.5,
        lt=1.0,
        description="Share of comparisons on which two users agree. InstructGPT's labelers: 0.726 (arXiv 2203.02155).",
    )
    calibration_prompts: int = Field(
        32, ge=1, description="Prompts whose completions set the users' noise before the first ranking."
    )
    num_users: int = Field(16, ge=1, description="Users; each has one request in flight at a time.")
    seed: int = Field(0, ge=0, description="Seeds the users' preferences and the order in which completions are shown.")
    system_prompt: str = Field(
        "You are a helpful assistant. Answer briefly, in one or two sentences.",
        description="The system prompt that the application sends with each user's prompt; empty for none.",
    )
    num_completions: int = Field(4, ge=2, le=16, description="Completions asked for per prompt, K.")
    max_tokens: int = Field(64, ge=1, description="The most tokens in one completion.")
    num_rankings: int = Field(256, ge=1, description="Rankings given before the users wait for a better policy.")
    held_out_prompts: int = Field(
        128, ge=1, le=200, description="Prompts kept from users and trainer, on which policies are compared."
    )
    held_out_completions: int = Field(
        4, ge=1, le=16, description="Completions of each held-out prompt by each policy; every pair is compared."
    )
    deadline_seconds: float = Field(
        120.0, gt=0, description="Seconds that a user waits for completions, or for a ranking to be accepted."
    )


class SimulationSettings(BaseSettings):
    """The section, and nothing else of what file and environment hold."""

    model_config = SettingsConfigDict(
        frozen=True, extra="ignore", env_prefix=PREFIX, env_nested_delimiter="__", validate_default=True
    )

    simulation: SimulationConfig = Field(SimulationConfig(), description="The simulated users of `alignd demo`.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Puts the environment before the file."""
        return init_settings, env_settings, InitSettingsSource(settings_cls, read_file())


def load_simulation() -> SimulationSettings:
    """Returns the simulated users' settings.

    Raises:
        deploy.config.ConfigError: naming each unknown or bad field.
    """
    return load_settings(SimulationSettings)
