"""A model's folder becomes version 1 as every version is, whatever it looks like; or it is refused, and leaves nothing.

vLLM's own check is held against models in tests/deploy/test_own_model.py, and the whole import is what the server that
the tests of serving share begins with.
"""

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from deploy.apart import apart
from deploy.config import AligndConfig, ConfigError
from deploy.importing import first, normalise
from deploy.importing.first import import_configured, import_model, is_wanted
from deploy.importing.origin import is_left
from deploy.importing.trial import write_and_train
from deploy.models import make_tiny_llama
from policies.artifact import changed_settings, verify_artifact, write_artifact
from policies.manifest import SOURCE_FILE, new_manifest
from policies.weights import INDEX_FILE, tensor_specs
from serving.config import ServingConfig
from serving.context_length import DEFAULT_MAX_MODEL_LEN, max_model_len
from tests.deploy.importing import folders
from tests.deploy.importing.folders import Change, beside, changed_weights, copied, in_order, with_config, without
from training.models.policy import SharedLayers, UpperLayers, load_model, save_policy
from training.models.tensor_file import load_weights

# A tiny model's matrices are not worth a second thread.
torch.set_num_threads(1)

EMBEDDINGS = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model."""
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imports here, and without vLLM: a process that loads it takes seconds for each of these folders."""

    def call(function: Callable[..., Any], files: Any, draft: Path, root: Path, *rest: Any) -> Any:
        return write_and_train(files, draft, root, rest[-1])

    monkeypatch.setattr(first, "apart", call)


def config_of(folder: Path, model: Path | None = None) -> AligndConfig:
    return AligndConfig(data_dir=folder / "var", serving=ServingConfig(initial_model=model))


def learned_from(version: Path) -> Path:
    """Writes version 2 as a trainer does that stands on version 1, and returns its folder."""
    shared = SharedLayers(load_model(version))
    upper = UpperLayers(shared.model, 1, shared.num_layers)
    for parameter in upper.parameters():
        parameter.data += 0.25
    manifest = new_manifest(2, reference_version=1, parent_version=1)
    return write_artifact(version.parent, manifest, lambda draft: save_policy(draft, shared, upper, version))[0]


ACCEPTED: dict[str, Change] = {
    "as it is": lambda folder: None,
    "sharded": folders.in_shards(),
    "sharded fp16": folders.in_shards(torch.float16),
    "fp16": folders.in_precision(torch.float16),
    "fp32": folders.in_precision(torch.float32),
    "tied head saved": changed_weights(folders.with_head),
    "consolidated beside": changed_weights(folders.as_mistrals, "consolidated.safetensors"),
    "fp16 beside": changed_weights(dict, "model.fp16.safetensors"),
    "adapter beside": changed_weights(lambda weights: {"lora_A": torch.ones(2, 2)}, "adapter_model.safetensors"),
    "pickled": folders.pickled(),
    "pickled in shards": folders.pickled(shards=True),
    "pickled beside": beside("pytorch_model.bin", "no pickle"),
    "macOS": in_order(beside("._config.json", "\0"), beside("._model.safetensors", "\0")),
    "a browser's copy": in_order(beside("a (1).json"), beside("config (1).json", "half")),
    "short context": with_config(max_position_embeddings=128),
    "another name of the file": folders.renamed(folders.WEIGHTS, "tiny-llama.safetensors"),
    "another name of the index": in_order(folders.in_shards(), folders.renamed(INDEX_FILE, "x.safetensors.index.json")),
    "no index": in_order(folders.in_shards(), without(INDEX_FILE)),
    "subfolders": in_order(beside("onnx/model.onnx"), beside("onnx/config.json"), beside(".git/config")),
    "the hub's cache": folders.linked,
    "read-only": folders.read_only,
    "no generation_config": without("generation_config.json"),
    "template for processors": folders.template_for_processors,
    "template in tokenizer_config": folders.template_in_tokenizer_config,
    "padded vocabulary": folders.padded_vocabulary,
    "code of its own": in_order(
        with_config(auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}),
        beside("code.py", "raise SystemExit"),
    ),
}
OTHER_WEIGHTS = {"padded vocabulary"}


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_folder_of_any_layout_becomes_a_version_that_others_can_be_learned_from(
    name: str, tiny: Path, tmp_path: Path
) -> None:
    model = copied(tiny, tmp_path / "mine", ACCEPTED[name])
    config = config_of(tmp_path, model)
    import_configured(config)
    version = config.policies_dir / "v1"
    manifest = verify_artifact(version)
    assert [path.name for path in config.policies_dir.iterdir()] == ["v1"]
    names = {file.path for file in manifest.files}
    assert names - {"generation_config.json", "chat_template.jinja"} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", SOURCE_FILE,
    }  # fmt: skip
    weights, expected = load_file(version / folders.WEIGHTS), load_file(tiny / folders.WEIGHTS)
    assert weights.keys() == expected.keys()
    if name not in OTHER_WEIGHTS:
        for key, tensor in weights.items():
            assert tensor.dtype == torch.bfloat16
            # fp16 has no numbers as small as some of these.
            torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-7 if "fp16" in name else 0)
    assert AutoTokenizer.from_pretrained(version).chat_template == AutoTokenizer.from_pretrained(tiny).chat_template
    assert len(manifest.probes) > 2
    assert max_model_len(ServingConfig(), version) == (128 if name == "short context" else DEFAULT_MAX_MODEL_LEN)
    assert is_left(model, config)
    second = learned_from(version)
    assert changed_settings(verify_artifact(second, shapes_like=version), manifest) == []
    assert torch.equal(load_model(second).state_dict()[EMBEDDINGS].bfloat16(), weights[EMBEDDINGS])


def test_a_model_above_the_limit_is_written_in_shards_and_so_is_what_is_learned(tiny: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path)
    version = import_model(tiny, config, max_shard_bytes=60_000)
    shards = sorted(version.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    # One tensor alone may be larger.
    assert all(path.stat().st_size < 62_000 or len(tensor_specs(path)) == 1 for path in shards)
    index = json.loads((version / INDEX_FILE).read_text())
    assert index["weight_map"].keys() == load_weights(tiny).keys()
    one_file = learned_from(version)
    assert {path.name for path in one_file.glob("*.safetensors*")} == {folders.WEIGHTS}
    assert changed_settings(verify_artifact(one_file, shapes_like=version), verify_artifact(version)) == []
    assert all(torch.equal(each, load_weights(tiny)[name]) for name, each in load_weights(version).items())


TRUNCATED = "its weights are cut off or damaged"
REFUSED: dict[str, tuple[Change, str]] = {
    "truncated": (folders.truncated(folders.WEIGHTS), TRUNCATED),
    "truncated shard": (in_order(folders.in_shards(), folders.truncated(folders.SHARDS[1])), TRUNCATED),
    "missing shard": (
        in_order(folders.in_shards(), without(folders.SHARDS[0])),
        f"1 of its 4 files of weights are missing, such as {folders.SHARDS[0]}",
    ),
    "missing shard without an index": (
        in_order(folders.in_shards(), without(folders.SHARDS[0], INDEX_FILE)),
        f"1 of its 4 files of weights are missing, such as {folders.SHARDS[0]}",
    ),
    "shard of another model": (
        in_order(folders.in_shards(), folders.swap_shards),
        "lacks tensor",
    ),
    "cut config": (lambda folder: (folder / "config.json").write_text('{"arch'), "config.json cannot be read: "),
    "cut generation_config": (beside("generation_config.json", '{"eos'), "generation_config.json cannot be read: "),
    "no tokenizer": (without("tokenizer.json"), "there is no tokenizer (tokenizer.json, "),
    "two models": (
        in_order(changed_weights(dict, "a.safetensors"), folders.renamed(folders.WEIGHTS, "b.safetensors")),
        "it has several files of weights (a.safetensors, b.safetensors), and nothing says which are the model's",
    ),
    "missing tensor": (
        changed_weights(lambda weights: {n: t for n, t in weights.items() if n != "model.norm.weight"}),
        "its files of weights lack 1 tensors, such as model.norm.weight",
    ),
    "fewer layers": (
        with_config(num_hidden_layers=1),
        "LlamaForCausalLM has no place for 9 tensors",
    ),
    "other shapes": (with_config(intermediate_size=64), "its weights have other shapes than those that config.json"),
    "a pipe": (
        in_order(without("tokenizer.json"), lambda folder: os.mkfifo(folder / "tokenizer.json")),
        "tokenizer.json is no file, but a folder, a pipe or a link to nothing",
    ),
    "weights elsewhere": (
        in_order(without(folders.WEIGHTS), beside(INDEX_FILE, '{"weight_map": {"a": "../outside.safetensors"}}')),
        f"{INDEX_FILE} names '../outside.safetensors', which is no file beside it",
    ),
    "8 bits": (
        changed_weights(lambda weights: {n: t.to(torch.float8_e4m3fn) for n, t in weights.items()}),
        "is of type F8_E4M3, so cannot be trained",
    ),
    "not a number": (
        changed_weights(lambda weights: {n: t * float("nan") for n, t in weights.items()}),
        "is not finite",
    ),
    "another tied head": (
        changed_weights(lambda weights: {**weights, "lm_head.weight": weights[EMBEDDINGS] + 1}),
        "config.json says that the output embedding is the token embedding, but the saved ones differ",
    ),
    "tokens without an embedding": (
        folders.with_extra_token,
        "its tokenizer has 1 tokens without an embedding, such as '<|extra_99|>' (",
    ),
    "no end token": (
        folders.without_end_token,
        "the model has no end token, so that no completion would ever end",
    ),
    "another end token": (
        beside("generation_config.json", '{"eos_token_id": [2, 99999]}'),
        "the end token 99999 is not among the ",
    ),
    "code in a pickle": (folders.pickled_code, "transformers cannot load it: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_said_and_leaves_nothing_so_that_mending_it_helps(
    name: str, tiny: Path, tmp_path: Path
) -> None:
    change, says = REFUSED[name]
    model = copied(tiny, tmp_path / "mine", change)
    with pytest.raises(ConfigError) as raised:
        import_configured(config_of(tmp_path, model))
    assert str(raised.value).startswith(f"serving.initial_model: {model}: ")
    assert says in str(raised.value)
    assert [path for path in tmp_path.rglob("var/**/*") if path.is_file()] == []
    assert not (model.parent / "was here").exists()


def test_a_disk_that_is_full_is_said_with_what_is_free(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path, *rest: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    monkeypatch.setattr(normalise, "save_model_tensors", fail)
    config = config_of(tmp_path, tiny)
    says = rf"cannot be written as a version: \[Errno 28\] No space .* In {config.policies_dir} [\d,]+ MiB are free"
    with pytest.raises(ConfigError, match=says):
        import_configured(config)
    assert list(config.policies_dir.iterdir()) == []


def test_a_template_that_refuses_what_every_application_sends_is_said(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = copied(tiny, tmp_path / "mine", beside("chat_template.jinja", "{{ raise_exception('not today') }}"))
    import_configured(config_of(tmp_path, broken))
    assert "its chat template refuses a plain turn of a user (not today)" in capsys.readouterr().err


def test_where_a_version_is_known_nothing_is_imported(tiny: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, tiny)
    (config.policies_dir / "v2").mkdir(parents=True)
    import_configured(config)
    assert not (config.policies_dir / "v1").exists()
    import_configured(config_of(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_another_model_takes_the_place_of_a_v1_that_nobody_registered(tiny: Path, tmp_path: Path) -> None:
    """vLLM did not serve the first one, or its name was a mistake."""
    other = make_tiny_llama(tmp_path / "other", seed=1)
    assert import_configured(config_of(tmp_path, other))
    left = verify_artifact(tmp_path / "var" / "policies" / "v1")
    missing = config_of(tmp_path, tmp_path / "none")
    with pytest.raises(ConfigError, match="there is no such folder"):
        import_configured(missing)
    config = config_of(tmp_path, tiny)
    assert [is_wanted(each) for each in (config_of(tmp_path), config_of(tmp_path, other), config)] == [
        True,
        True,
        False,
    ]
    assert verify_artifact(config.policies_dir / "v1") == left
    assert import_configured(config)
    assert is_wanted(config) and not import_configured(config)
    (aside,) = config.policies_dir.glob("unregistered-*")
    assert verify_artifact(aside) == left


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGKILL, "was killed, most likely because the machine's memory ran out"),
        (signal.SIGSEGV, "was ended by SIGSEGV"),
    ],
)
def test_a_process_that_dies_of_a_model_is_an_error_in_words(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, said: str
) -> None:
    monkeypatch.setattr(first, "apart", lambda *rest: apart(signal.raise_signal, number))
    with pytest.raises(ConfigError, match=said):
        import_configured(config_of(tmp_path, tiny))
    assert not list((tmp_path / "var").rglob("v1"))
