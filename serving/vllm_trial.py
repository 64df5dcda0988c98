"""Tries whether vLLM takes a model, from its settings and tokenizer alone, before its weights are written."""

import os
from pathlib import Path

from policies.encoding import EncodingError
from policies.end_tokens import EndTokenError, end_tokens
from serving.config import ServingConfig
from serving.context_length import max_model_len, too_long
from serving.vllm_engine import EngineError


def try_model(folder: Path, config: ServingConfig) -> None:
    """Loads a model as an engine would, except for its weights.

    It leaves vLLM in the calling process, which should end soon after.

    Raises:
        EngineError: no completions can be drawn from the model; the text says why.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from transformers import AutoTokenizer
    from vllm import AsyncEngineArgs

    try:
        length = max_model_len(config, folder)
        model = AsyncEngineArgs(model=str(folder), max_model_len=length).create_model_config()
    except Exception as error:
        # Any error: it depends on the contents of the user's config.json which one transformers raises.
        named = too_long(config, folder, str(error))
        if named:
            raise EngineError(named) from error
        raise EngineError(f"vLLM does not take it: {_first_sentence(str(error))}") from error
    if model.runner_type != "generate" or model.is_encoder_decoder:
        raise EngineError(f"{model.architectures[0]} is no model that continues a prompt (a causal language model)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        # Any error: it depends on the contents of the user's files which one transformers raises.
        raise EngineError(f"its tokenizer does not load: {_first_sentence(str(error))}") from error
    try:
        end_tokens(tokenizer)
    except (EndTokenError, EncodingError) as error:
        raise EngineError(str(error)) from error


def _first_sentence(text: str) -> str:
    """Returns the first sentence of an error, without pydantic's words before it and the advice after it."""
    said = text.partition("Value error, ")[2] or text
    return said.strip().split(". ")[0].splitlines()[0]
