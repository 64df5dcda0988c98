"""What to label next: the samples whose order the heads know least."""

from pathlib import Path

import torch
from transformers import AutoTokenizer

from alignd.v1 import types_pb2
from feedback.store.stored import StoredCompletion, StoredSample
from tests.training.learning import fitted
from training.data.groups import Group
from training.models.policy import SharedLayers
from training.models.reward import group_features
from training.rewards.label_next import label_next, uncertainty


def sample(name: str, *texts: str, ended: bool = True, prompt: str = "") -> StoredSample:
    completions = tuple(StoredCompletion(text, ended) for text in texts)
    return StoredSample(name, "u", types_pb2.Prompt(text=prompt or f"What is {name}?"), completions, "u")


def test_heads_that_agree_on_every_difference_are_sure() -> None:
    scores_KE = torch.tensor([[1.0, 4.0], [0.0, 3.0], [-2.0, 1.0]])
    assert uncertainty(scores_KE) == 0
    # Differences 1 and -1, by two heads: a standard deviation of √2.
    assert uncertainty(torch.tensor([[1.0, 0.0], [0.0, 1.0]])) == torch.tensor(2.0).sqrt()


def test_the_least_sure_sample_comes_first(shared: SharedLayers, tiny_folder: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_folder), fitted(shared, count=40)
    samples = [
        sample("a", "in the garden", "in the house", "no"),
        sample("same", "in the garden", "in the garden"),
        sample("b", "a stone", "the river and the wood"),
        sample("empty", "in the garden", "", ended=False),
        sample("long", "in the garden " * 60, "no"),
        sample("long prompt", "in the garden", "no", prompt="why " * 60),
    ]
    found = label_next(model, tokenizer, samples, max_prompt_tokens=50, max_group_tokens=100)
    assert [each.sample_id for each in found][2:] == ["same"]
    assert found[0].uncertainty > found[1].uncertainty > found[2].uncertainty
    assert abs(found[2].uncertainty) < 1e-3
    by_name = {each.sample_id: each for each in found}
    assert by_name["a"].completions == ("in the garden", "in the house", "no")

    prompt = tuple(tokenizer.encode("What is b?", add_special_tokens=False))
    texts = [
        (*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id) for text in by_name["b"].completions
    ]
    (features_KF,) = group_features(model, [Group(prompt, tuple(texts))])
    one_E, other_E = model.standardized(features_KF) @ model.heads_FE
    assert by_name["b"].uncertainty == float((one_E - other_E).detach().std())
