"""The settings refuse what they do not know, and load nothing heavy."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from feedback.config import FeedbackConfig


def test_an_unknown_setting_is_refused_by_name() -> None:
    with pytest.raises(ValidationError, match="tokn_ttl_seconds"):
        FeedbackConfig.model_validate({"tokn_ttl_seconds": 5})


def test_a_retry_must_be_recognised_as_long_as_its_token_is_taken() -> None:
    with pytest.raises(ValidationError, match="outbox_retention_seconds must be at least token_ttl_seconds"):
        FeedbackConfig(token_ttl_seconds=100, outbox_retention_seconds=99)


def test_each_setting_is_described() -> None:
    assert all(field.description for field in FeedbackConfig.model_fields.values())


def test_the_settings_load_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'vllm', 'kafka', 'sqlalchemy', 'grpc'}"
    code = f"import sys, feedback.config; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
