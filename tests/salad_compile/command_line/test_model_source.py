"""What a command line may call a model."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import nn

from salad_compile.command_line import bounded_building
from salad_compile.command_line.model_source import find_model, import_name, load_model, pipeline_components
from salad_compile.errors import ConfigError, HubError, ModelSourceError
from tests.models.handwritten import FusedDiT
from tests.models.zoo import CASES

HANDWRITTEN = "tests.models.handwritten:FusedDiT"


def same_weights(model: nn.Module, other: nn.Module) -> bool:
    mine, theirs = model.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_checkpoint_has_its_weights_in_their_dtype(wan: Path) -> None:
    model, saved = load_model(wan), CASES["Wan"].build()
    assert not model.training
    weight = model.get_parameter("blocks.0.attn1.to_q.weight")
    assert torch.equal(weight, saved.get_parameter("blocks.0.attn1.to_q.weight").bfloat16())
    assert load_model(wan, dtype=torch.float32).get_parameter("blocks.0.attn1.to_q.weight").dtype == torch.float32


def test_random_weights_are_the_same_at_every_call_and_disturb_nobody(wan: Path) -> None:
    state = torch.random.get_rng_state()
    first, second = (load_model(wan, random=True) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert same_weights(first, second)
    assert not same_weights(first, load_model(wan, dtype=torch.float32))


def test_meta_takes_no_memory(wan: Path) -> None:
    model = load_model(wan / "config.json", meta=True, dtype=torch.bfloat16)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_component_of_a_pipeline(pipeline: Path, wan: Path) -> None:
    assert pipeline_components(pipeline) == ["transformer", "transformer_2"]
    assert pipeline_components(wan) == []
    assert same_weights(load_model(pipeline), load_model(wan))
    with pytest.raises(ModelSourceError, match=r"has no weights: no .*transformer_2"):
        load_model(pipeline, component="transformer_2")
    with pytest.raises(ModelSourceError, match="no 'transfromer'; it has transformer, transformer_2"):
        load_model(pipeline, component="transfromer")


def test_an_expert_that_is_listed_as_missing(pipeline: Path, tmp_path: Path) -> None:
    index = json.loads((pipeline / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "transformer_2": [None, None]}))
    assert pipeline_components(tmp_path) == ["transformer"]


def test_a_class_of_ones_own(tmp_path: Path) -> None:
    config, weights = tmp_path / "small.json", tmp_path / "weights.safetensors"
    config.write_text('{"heads": 2}')
    torch.manual_seed(3)
    model = FusedDiT(heads=2)
    save_file(model.state_dict(), weights)
    assert same_weights(load_model(HANDWRITTEN, config=config, weights=weights), model)
    with pytest.raises(ModelSourceError, match="does not fit FusedDiT"):
        load_model(HANDWRITTEN, weights=weights)
    with pytest.raises(ModelSourceError, match=r"has no weights\. .*--random.*--weights"):
        load_model(HANDWRITTEN)


def test_a_class_beside_its_configuration(tmp_path: Path) -> None:
    config = tmp_path / "small.json"
    config.write_text('{"heads": 2, "_note": "ours"}')
    assert isinstance(load_model(config, class_name=HANDWRITTEN, random=True), FusedDiT)


def test_names_in_files_and_modules_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "helper_of_mine.py").write_text("answer = 42\n")
    (tmp_path / "names_of_mine.py").write_text("from helper_of_mine import answer\n")
    assert import_name(f"{tmp_path / 'names_of_mine.py'}:answer") == 42
    monkeypatch.chdir(tmp_path)
    assert import_name("helper_of_mine:answer") == 42


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise RuntimeError('no luck')", "cannot be imported: RuntimeError: no luck"),
        ("answers = 1", "has no 'answer'. Did you mean 'answers'?"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "broken_of_mine.py"
    file.write_text(text)
    with pytest.raises(ModelSourceError) as caught:
        import_name(f"{file}:answer")
    assert said in str(caught.value)


def test_a_checkpoint_that_lacks_a_shard(tmp_path: Path) -> None:
    CASES["Wan"].build().save_pretrained(tmp_path, max_shard_size="30KB")
    (index,) = tmp_path.glob("*.index.json")
    values = json.loads(index.read_text())
    first = min(values["weight_map"].values())
    values["weight_map"] = {name: file for name, file in values["weight_map"].items() if file != first}
    index.write_text(json.dumps(values))
    with pytest.raises(ModelSourceError, match=r"lack '.*' and \d+ more"):
        load_model(tmp_path)


@pytest.mark.parametrize("meta", [True, False])
def test_a_model_without_end_is_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meta: bool) -> None:
    CASES["Wan"].build().save_pretrained(tmp_path)
    load_model(tmp_path, meta=meta)
    monkeypatch.setattr(bounded_building, "MOST_MODULES", 10)
    with pytest.raises(ModelSourceError, match="more than 10 modules"):
        load_model(tmp_path, meta=meta)
    monkeypatch.undo()
    load_model(tmp_path, meta=meta)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("config.json", "{", "is not a JSON file"),
        ("config.json", "[1]", "must hold an object with names and values, and holds a list"),
        ("config.json", '{"num_layers": 2}', "does not say which class it configures"),
        ("config.json", '{"_class_name": "WanTransfomer3DModel"}', "Did you mean 'WanTransformer3DModel'?"),
        (
            "config.json",
            '{"_class_name": "WanTransformer3DModel", "num_attention_heads": "two"}',
            "cannot be built from",
        ),
        (
            "config.json",
            '{"_class_name": "WanTransformer3DModel", "patch_size": [1, 2, 2147483648]}',
            "says patch_size=2147483648, which is no size",
        ),
        ("weights.safetensors", "", "is not a configuration"),
    ],
)
def test_a_file_that_configures_nothing(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises((ModelSourceError, ConfigError)) as caught:
        load_model(tmp_path / name, random=True)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("source", "said"),
    [("nowhere", "no model at 'nowhere'"), ("a/b/c", "no model at 'a/b/c'"), ("torch:", "names nothing")],
)
def test_a_source_that_is_none(source: str, said: str) -> None:
    with pytest.raises(ModelSourceError) as caught:
        load_model(source)
    assert said in str(caught.value)


def test_a_directory_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match=r"has no config\.json"):
        load_model(tmp_path)


def test_truncated_weights(wan: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((wan / "config.json").read_text())
    name = "diffusion_pytorch_model.safetensors"
    (tmp_path / name).write_bytes((wan / name).read_bytes()[:5000])
    with pytest.raises(ModelSourceError, match="not a complete safetensors file"):
        load_model(tmp_path)


def test_a_hub_repository_is_taken_in_part(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(pipeline)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_model("owner/wan", component="transformer_2", with_weights=False).config["num_layers"] == 2
    assert asked == [["model_index.json", "config.json"], ["model_index.json", "transformer_2/*.json"]]


@pytest.mark.parametrize(
    ("error", "expected"),
    [(LocalEntryNotFoundError("offline"), ModelSourceError), (TimeoutError("slow"), HubError)],
)
def test_a_hub_repository_that_cannot_be_had(
    error: Exception, expected: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(name: str, allow_patterns: list[str]) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(expected, match="owner/wan"):
        load_model("owner/wan")
