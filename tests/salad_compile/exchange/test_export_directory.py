"""Exported files load where they are meant to, and compute there what they should."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import salad_compile
from salad_compile.exchange import ExportReport, to_diffusers_names, to_original_names
from salad_compile.salad_files.contents import describe
from salad_compile.sites.branch import branches
from tests.models.zoo import CASES, from_diffusers
from tests.salad_compile.conversion.test_convert import assert_unchanged, fingerprint
from tests.support import TINY, converted, randomise_branches, relative_error, run

CASE, FUSED = CASES["Wan"], CASES["handwritten_fused"]
ALPHA = 5.0  # over rank 3: neither 1 nor a power of two

# fp32; the sums (W + BA) x and W x + B (A x) differ by a few roundings of 2^-24, as in test_merge.py
BOUND = 1e-5


class Exported:
    """A fine-tuned tiny Wan, its export, and what everything is compared with."""

    def __init__(self, directory: Path) -> None:
        self.model = converted(CASE, lora_alpha=ALPHA)
        before = fingerprint(self.model)
        self.directory = directory
        self.report: ExportReport = salad_compile.export(self.model, directory, training={"steps": 3, "data": "none"})
        assert_unchanged(self.model, before)
        self.fine_tuned = forward(self.model)
        self.dense = forward(with_dense_updates(CASE.build(), self.model))
        assert relative_error(self.dense, forward(CASE.build())) > 1e-2
        assert relative_error(self.fine_tuned, self.dense) > 1e-2


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp("export") / "out")


def forward(model: nn.Module, case: Any = CASE) -> Tensor:
    return run(model, case.inputs(0), case.output, gradients=False).output


def with_dense_updates(base: nn.Module, model: nn.Module) -> nn.Module:
    """The base with W + (alpha / rank) up @ down, straight from the parameters of the converted model's branches."""
    with torch.no_grad():
        for branch in branches(model).values():
            config = branch.config
            for roles in branch.record.shared_roles().values():
                weight: Any = base.get_submodule(branch.record.projections()[roles[0]]).weight
                for rows, role in zip(weight.chunk(len(roles)), roles, strict=True):
                    if role in branch.lora_roles:
                        down, up = (getattr(branch, f"low_rank_{role}_{part}") for part in ("down", "up"))
                        rows += (config.lora_alpha or config.lora_rank) / config.lora_rank * up @ down
    return base


def pipeline(transformer: nn.Module, transformer_2: nn.Module | None = None) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    return WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(), transformer, transformer_2)


# --- each format in the tool that reads it ---------------------------------------------------------------------------


def test_the_exact_file_is_that_of_save(exported: Exported, tmp_path: Path) -> None:
    saved = load_file(salad_compile.save(exported.model, tmp_path))
    tensors = load_file(exported.directory / "salad.safetensors")
    assert tensors.keys() == saved.keys()
    assert all(torch.equal(tensors[name], saved[name]) for name in saved)
    loaded = salad_compile.load(CASE.build(), exported.directory)
    assert torch.equal(forward(loaded), exported.fine_tuned)
    assert describe(loaded) == describe(exported.model)
    with safe_open(exported.directory / "salad.safetensors", framework="pt") as content:
        header = content.metadata()["salad_config"]
    assert json.loads((exported.directory / "salad_config.json").read_text()) == json.loads(header)


@pytest.mark.parametrize("file", ["", "pytorch_lora_weights.safetensors", "comfyui_lora.safetensors"])
def test_diffusers_loads_the_lora(file: str, exported: Exported, caplog: pytest.LogCaptureFixture) -> None:
    """The directory, its own file, and ComfyUI's, which diffusers converts."""
    pipe = pipeline(CASE.build())
    pipe.load_lora_weights(exported.directory / "lora" / file)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(pipe.get_active_adapters()) == 1
    assert relative_error(forward(pipe.transformer), exported.dense) < BOUND


def test_the_lora_of_diffusers_tells_its_scale(exported: Exported) -> None:
    file = exported.directory / "lora" / "pytorch_lora_weights.safetensors"
    with safe_open(file, framework="pt") as content:
        told = json.loads(content.metadata()["lora_adapter_metadata"])
    assert told["transformer.r"] == told["transformer.lora_alpha"] == 3
    assert all(key.startswith("transformer.") for key in (*told, *load_file(file)))
    pipe = pipeline(CASE.build())
    pipe.load_lora_weights(file)
    config = next(iter(pipe.transformer.peft_config.values()))
    assert (config.r, config.lora_alpha) == (3, 3)


def test_peft_loads_the_lora(exported: Exported) -> None:
    import peft

    adapted = peft.PeftModel.from_pretrained(CASE.build(), str(exported.directory / "lora" / "peft"))
    assert relative_error(forward(adapted), exported.dense) < BOUND
    merged = adapted.merge_and_unload()
    assert relative_error(forward(merged), exported.dense) < BOUND


def apply_comfyui(lora: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What ComfyUI does with a LoRA file: strength 1 times alpha / rank, 1 where there is no alpha."""
    patched, left = dict(state), set(lora)
    for key in [key for key in lora if key.endswith(".lora_A.weight")]:
        module = key.removesuffix(".lora_A.weight")
        down, up = lora[key], lora[f"{module}.lora_B.weight"]
        scale = float(lora[f"{module}.alpha"]) / len(down)
        name = module.removeprefix("diffusion_model.") + ".weight"
        patched[name] = patched[name] + scale * up @ down
        left -= {key, f"{module}.lora_B.weight", f"{module}.alpha"}
    assert not left
    return patched


def test_comfyui_applies_the_lora_to_the_original_names(exported: Exported) -> None:
    lora = load_file(exported.directory / "lora" / "comfyui_lora.safetensors")
    assert "diffusion_model.blocks.0.self_attn.q.lora_A.weight" in lora
    base = CASE.build()
    patched = apply_comfyui(lora, to_original_names(base.state_dict()))
    base.load_state_dict(to_diffusers_names(patched))
    assert relative_error(forward(base), exported.dense) < BOUND


def test_the_merged_checkpoint_is_the_base_with_the_update_and_beside_it_what_load_needs(exported: Exported) -> None:
    folder = exported.directory / "transformer"
    base, problems = type(CASE.build()).from_pretrained(folder, output_loading_info=True)
    assert not [keys for keys in problems.values() if keys]
    assert relative_error(forward(base), exported.dense) < BOUND
    assert not [name for name in load_file(folder / "diffusion_pytorch_model.safetensors") if "salad" in name]
    config = json.loads((folder / "config.json").read_text())
    assert config["salad"]["merged"] is True
    assert config["num_layers"] == 2
    salad_compile.load(base, folder)
    assert relative_error(forward(base), exported.fine_tuned) < BOUND
    with pytest.raises(salad_compile.BaseModelMismatchError, match="merge_lora"):
        salad_compile.load(CASE.build(), folder)
    assert [item.cast_error for item in exported.report.cast_errors] == [0.0, 0.0]  # fp32 sums in fp32 weights


def test_merged_in_shards(exported: Exported, tmp_path: Path) -> None:
    salad_compile.export(exported.model, tmp_path, "merged", max_shard_size="20KB")
    folder = tmp_path / "transformer"
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert "salad.safetensors" not in index["weight_map"].values()
    model = salad_compile.load(type(CASE.build()).from_pretrained(folder), folder)
    assert relative_error(forward(model), exported.fine_tuned) < BOUND


def test_in_16_bits_merging_is_bitwise_that_of_merge_lora_and_says_what_rounding_cost(tmp_path: Path) -> None:
    model = converted(CASE, lora_alpha=ALPHA).to(torch.bfloat16)
    report = salad_compile.export(model, tmp_path / "out", ("merged",))
    expected = {item.name: item for item in salad_compile.merge_lora(model)}
    assert {item.name: item for entry in report.formats for item in entry.merged} == expected
    assert [error.site for error in report.cast_errors] == list(CASE.sites)
    assert all(1e-3 < error.cast_error < 1 for error in report.cast_errors)
    state = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    after = {name: value for name, value in model.state_dict().items() if ".salad." not in name}
    assert state.keys() == after.keys()
    assert all(torch.equal(state[name], after[name]) and state[name].dtype == after[name].dtype for name in after)
    saved = salad_compile.save(model, tmp_path / "saved")
    there = tmp_path / "out" / "transformer" / "salad.safetensors"
    ours, theirs = load_file(there), load_file(saved)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    headers = []
    for file in (there, saved):
        with safe_open(file, framework="pt") as content:
            headers.append(content.metadata()["salad_config"])
    assert headers[0] == headers[1]


# --- other models and settings ---------------------------------------------------------------------------------------


def test_a_fused_projection(tmp_path: Path) -> None:
    import peft

    model = converted(FUSED, lora_alpha=ALPHA)
    report = salad_compile.export(model, tmp_path / "out")
    assert {entry.format: bool(entry.path) for entry in report.formats} == {
        "salad": True,
        "diffusers": False,
        "comfyui": False,
        "peft": True,
        "merged": True,
    }
    dense = forward(with_dense_updates(FUSED.build(), model), FUSED)
    assert relative_error(dense, forward(FUSED.build(), FUSED)) > 1e-2
    adapted = peft.PeftModel.from_pretrained(FUSED.build(), str(tmp_path / "out" / "lora" / "peft"))
    assert {module.r["default"] for module in adapted.modules() if hasattr(module, "lora_A")} == {3, 9}
    assert relative_error(forward(adapted, FUSED), dense) < BOUND
    base = FUSED.build()
    base.load_state_dict(load_file(tmp_path / "out" / "transformer" / "model.safetensors"))
    assert relative_error(forward(base, FUSED), dense) < BOUND
    salad_compile.load(base, tmp_path / "out" / "transformer")
    assert relative_error(forward(base, FUSED), forward(model, FUSED)) < BOUND


def test_projections_that_diffusers_fused(tmp_path: Path) -> None:
    """LoRA goes by the names of a fresh model; a merged checkpoint would have names that no fresh model has."""
    fused: Any = CASE.build()
    fused.fuse_qkv_projections()
    salad_compile.convert(fused, TINY, example_inputs=dict(CASE.inputs(0)))
    randomise_branches(fused)
    report = salad_compile.export(fused, tmp_path / "out")
    assert [entry.format for entry in report.formats if not entry.path] == ["merged"]
    base: Any = CASE.build()
    base.fuse_qkv_projections()
    dense = forward(with_dense_updates(base, fused))
    for file in ("pytorch_lora_weights.safetensors", "comfyui_lora.safetensors"):
        pipe = pipeline(CASE.build())
        pipe.load_lora_weights(tmp_path / "out" / "lora" / file)
        assert relative_error(forward(pipe.transformer), dense) < BOUND


SETTINGS: dict[str, dict[str, Any]] = {
    "overrides": {"overrides": {"blocks.0.*": {"sparsity": 0.5}, "blocks.1.*": {"linear_branch": False}}},
    "some targets": {"lora_targets": ("query", "out")},
    "no LoRA": {"lora_rank": 0, "lora_alpha": None},
    "map-then-rotate": {"rope_placement": "map-then-rotate"},
    "dropped": {},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name: str, tmp_path: Path) -> None:
    model = converted(CASE, **SETTINGS[name])
    if name == "dropped":
        next(iter(branches(model).values())).drop_linear()
    expected = forward(model)
    report = salad_compile.export(model, tmp_path / "out")
    missing = [entry for entry in report.formats if not entry.path]
    assert [entry.format for entry in missing] == (["diffusers", "comfyui", "peft"] if name == "no LoRA" else [])
    assert all("no LoRA" in entry.reason for entry in missing)
    assert torch.equal(forward(salad_compile.load(CASE.build(), tmp_path / "out")), expected)
    folder = tmp_path / "out" / "transformer"
    merged = salad_compile.load(type(CASE.build()).from_pretrained(folder), folder)
    assert relative_error(forward(merged), expected) < BOUND
    if name != "no LoRA":
        pipe = pipeline(CASE.build())
        pipe.load_lora_weights(tmp_path / "out" / "lora")
        dense = forward(with_dense_updates(CASE.build(), model))
        assert relative_error(forward(pipe.transformer), dense) < BOUND


def test_a_model_that_was_merged_before(tmp_path: Path) -> None:
    model = converted(CASE)
    salad_compile.merge_lora(model)
    salad_compile.export(model, tmp_path / "out")
    folder = tmp_path / "out" / "transformer"
    again = salad_compile.load(type(CASE.build()).from_pretrained(folder), folder)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    assert relative_error(forward(again), forward(model)) < BOUND


def test_a_trained_base_is_remarked_on(exported: Exported, tmp_path: Path) -> None:
    model = converted(CASE, train_base=True)
    assert "train_base" in str(salad_compile.export(model, tmp_path / "out", "salad"))
    assert "train_base" not in str(exported.report)


def test_two_experts(tmp_path: Path) -> None:
    experts = [converted(CASE, lora_alpha=ALPHA), converted(CASE, lora_alpha=ALPHA)]
    randomise_branches(experts[1], seed=4)
    tuned = pipeline(*experts)
    tuned.transformer_2 = nn.DataParallel(experts[1])  # a wrapper that costs no compilation
    report = salad_compile.export(tuned, tmp_path / "out")
    assert len(report.written) == 10
    pipe = pipeline(CASE.build(), CASE.build())
    pipe.load_lora_weights(tmp_path / "out" / "transformer" / "lora")
    pipe.load_lora_weights(tmp_path / "out" / "transformer_2" / "lora", load_into_transformer_2=True)
    for name, expert in zip(("transformer", "transformer_2"), experts, strict=True):
        dense = forward(with_dense_updates(CASE.build(), expert))
        assert relative_error(forward(getattr(pipe, name)), dense) < BOUND
        loaded = salad_compile.load(CASE.build(), tmp_path / "out" / name)
        assert torch.equal(forward(loaded), forward(expert))
        folder = tmp_path / "out" / name / "transformer"
        merged = salad_compile.load(type(CASE.build()).from_pretrained(folder), folder)
        assert relative_error(forward(merged), forward(expert)) < BOUND
    with pytest.raises(FileNotFoundError, match="out/transformer_2"):  # not the first expert's, silently
        salad_compile.load(CASE.build(), tmp_path / "out")
    # only one of two is converted: it is clear which
    one = salad_compile.export(pipeline(CASE.build(), experts[1]), tmp_path / "one", "salad")
    assert [entry.path for entry in one.formats] == ["transformer_2/salad.safetensors"]


# --- report and card -------------------------------------------------------------------------------------------------


def tree(directory: Path) -> Iterator[str]:
    for file in directory.rglob("*"):
        if file.is_file():
            yield file.relative_to(directory).as_posix()


def test_the_layout_and_the_report(exported: Exported) -> None:
    assert sorted(tree(exported.directory)) == [
        "README.md",
        "lora/comfyui_lora.safetensors",
        "lora/peft/adapter_config.json",
        "lora/peft/adapter_model.safetensors",
        "lora/pytorch_lora_weights.safetensors",
        "salad.safetensors",
        "salad_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "transformer/salad.safetensors",
    ]
    assert [path.name for path in exported.directory.parent.iterdir()] == ["out"]
    told = json.loads(exported.report.to_json())
    assert [entry["format"] for entry in told["formats"]] == ["salad", "diffusers", "comfyui", "peft", "merged"]
    assert told["formats"][0]["tensors"] == len(load_file(exported.directory / "salad.safetensors"))
    assert told["formats"][1]["bytes"] == (exported.directory / told["formats"][1]["path"]).stat().st_size
    assert "lora/pytorch_lora_weights.safetensors" in str(exported.report)
    assert exported.report.to_markdown().count("\n| ") == 2 + 5


def test_the_card(exported: Exported, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(exported.directory / "README.md")
    assert card.data.tags[:2] == ["salad", "lora"]
    for told in ("blocks.{0..1}.attn1", "- steps: 3", "0.7", "32 x 16", "not this model", "from_pretrained"):
        assert told in card.text
    assert "block-sparse softmax attention plus gated linear attention" in card.text
    assert "| 32 x 16 | none |" in card.text
    salad_compile.export(exported.model, tmp_path / "out", "salad", base_model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert (data.base_model, data.base_model_relation) == ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "adapter")


def test_the_card_names_the_means_of_what_is_left_out(exported: Exported) -> None:
    from salad_compile.exchange.model_card import model_card

    config = salad_compile.SaladConfig(compensation_pool=64)
    summary = salad_compile.summary(exported.model)
    training = {"settings": {"compile_options": {}, "clip": None}}
    text = model_card(summary, {"": config}, {"": "Wan"}, [], base_model=None, training=training)
    assert "block-sparse softmax attention plus means of what it leaves out plus gated linear attention" in text
    assert "| means of 64 tokens |" in text
    assert "  - compile_options: none\n  - clip: none\n" in text


def test_an_earlier_export_is_replaced_as_a_whole(exported: Exported, tmp_path: Path) -> None:
    copied = copy.deepcopy(exported.model)
    salad_compile.export(copied, tmp_path / "out", ("salad", "peft"))
    randomise_branches(copied, seed=9)
    salad_compile.export(copied, tmp_path / "out", "salad")
    assert sorted(tree(tmp_path)) == ["out/README.md", "out/salad.safetensors", "out/salad_config.json"]
    assert torch.equal(forward(salad_compile.load(CASE.build(), tmp_path / "out")), forward(copied))


def test_image_to_video(tmp_path: Path) -> None:
    """diffusers expands a LoRA without image keys for a model that has image projections."""
    from tests.models.zoo import WAN, randomise

    def build() -> nn.Module:
        return randomise(from_diffusers("WanTransformer3DModel", WAN | {"image_dim": 8, "added_kv_proj_dim": 24}), 3)

    inputs = CASE.inputs(0) | {"encoder_hidden_states_image": torch.randn(1, 5, 8)}
    inputs["encoder_hidden_states"] = torch.randn(1, 512, 16)  # Wan takes what stands before 512 tokens for the image
    model = salad_compile.convert(build(), TINY, example_inputs=inputs)
    randomise_branches(model)
    salad_compile.export(model, tmp_path / "out")
    dense = run(with_dense_updates(build(), model), inputs, CASE.output, gradients=False).output
    for file in ("pytorch_lora_weights.safetensors", "comfyui_lora.safetensors"):
        pipe = pipeline(build())
        pipe.load_lora_weights(tmp_path / "out" / "lora" / file)
        assert relative_error(run(pipe.transformer, inputs, CASE.output, gradients=False).output, dense) < BOUND
