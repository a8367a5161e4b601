"""ComfyUI's nodes, by the contract of nodes and in a stand-in of its ModelPatcher, against diffusers' Wan."""

from __future__ import annotations

import dataclasses
import inspect
import json
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import salad_compile
from salad_compile.errors import (
    AlreadyConvertedError,
    BaseModelMismatchError,
    ConfigError,
    NotASaladFileError,
    NotConvertedError,
    SiteLostError,
)
from salad_compile.exchange import to_original_names
from salad_compile.sites.branch import branches
from tests.examples import comfyui_stand_in
from tests.examples.comfyui_stand_in import BaseModel, ModelPatcher, ShorterModel, WanModel
from tests.models.zoo import WAN, from_diffusers, randomise
from tests.support import randomise_branches, relative_error, seeded

PACK = Path(__file__).parents[2] / "examples" / "comfyui_salad"
CONFIG = salad_compile.SaladConfig(
    compensation="none", sparsity=0.6, lowest_sparsity=0.2, query_block=16, key_block=16, lora_rank=2, min_tokens=90
)
TIME = torch.tensor([431.0])
SCHEDULE = torch.tensor([1.0, 0.8, 0.5, 0.0])
VALUE = "blocks.1.self_attn.v.weight"


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def diffusers_wan(**changes: Any) -> Any:
    with seeded(3):
        return randomise(from_diffusers("WanTransformer3DModel", WAN | changes), 3).eval()


@torch.inference_mode()
def expected_of(model: Any) -> Tensor:
    return model(hidden_states=draw(1, 4, 3, 14, 14), timestep=TIME, encoder_hidden_states=draw(1, 6, 16)).sample


@torch.inference_mode()
def output(patcher: ModelPatcher, level: float = 1.0, **options: Any) -> Tensor:
    """One forward of a sampler, at a noise level."""
    given = patcher.model_options["transformer_options"] | {"sigmas": torch.tensor([level]), "sample_sigmas": SCHEDULE}
    given = {name: value for name, value in (given | options).items() if value is not None}
    model = patcher.use()
    return model(draw(1, 4, 3, 14, 14), TIME, context=draw(1, 6, 16), transformer_options=given)


@torch.inference_mode()
def make_patcher(dtype: torch.dtype = torch.float32, dynamic: bool = False, model: Any = None) -> ModelPatcher:
    """As a loader makes it: in inference mode."""
    if model is None:
        model = WanModel().eval().requires_grad_(False)
        model.load_state_dict(to_original_names(diffusers_wan().state_dict()))
        model.to(dtype) if dtype.itemsize > 1 else _narrow(model, dtype)
    return ModelPatcher(BaseModel(model), dynamic)


def _narrow(model: nn.Module, dtype: torch.dtype) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.to(dtype), requires_grad=False)


@pytest.fixture(scope="module")
def check() -> dict[str, Any]:
    return runpy.run_path(str(PACK / "check.py"))


@pytest.fixture(scope="module")
def pack(check: dict[str, Any]) -> Iterator[ModuleType]:
    """Imported as ComfyUI imports it, by its path; forgotten afterwards."""
    nodes: ModuleType = check["import_nodes"]()
    yield nodes
    for name in [name for name in sys.modules if name.partition(".")[0] == nodes.__name__]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def node(pack: ModuleType) -> Callable[..., Any]:
    """Run a node by its name, as ComfyUI does."""

    def run(name: str, *args: Any) -> Any:
        cls = pack.NODE_CLASS_MAPPINGS[name]
        with torch.inference_mode():
            (result,) = getattr(cls(), cls.FUNCTION)(*args)
        return result

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """A SALAD file, and diffusers' model with what is in it."""
    model = salad_compile.convert(diffusers_wan(), CONFIG)
    randomise_branches(model)
    return str(salad_compile.save(model, tmp_path_factory.mktemp("trained") / "salad.safetensors")), model


def test_contract(pack: ModuleType) -> None:
    assert pack.NODE_CLASS_MAPPINGS.keys() == pack.NODE_DISPLAY_NAME_MAPPINGS.keys()
    assert set(pack.NODE_DISPLAY_NAME_MAPPINGS.values()) == {"Load SALAD", "SALAD settings", "Compile with SALAD"}
    for cls in pack.NODE_CLASS_MAPPINGS.values():
        inputs = cls.INPUT_TYPES()
        assert inputs.keys() <= {"required", "optional"}
        names = [name for kind in inputs.values() for name in kind]
        assert list(inspect.signature(getattr(cls, cls.FUNCTION)).parameters) == ["self", *names]
        assert cls.RETURN_TYPES == ("MODEL",)
        assert cls.CATEGORY == "SALAD"
        assert inputs["required"]["model"] == ("MODEL",)


def test_workflow_holds_together(pack: ModuleType) -> None:
    workflow = json.loads((PACK / "workflow.json").read_text())
    nodes = {entry["id"]: entry for entry in workflow["nodes"]}
    for link, source, slot, target, place, kind in workflow["links"]:
        assert link in nodes[source]["outputs"][slot]["links"]
        assert nodes[target]["inputs"][place]["link"] == link
        assert nodes[source]["outputs"][slot]["type"] == nodes[target]["inputs"][place]["type"] == kind
    assert all(entry["link"] is not None for found in nodes.values() for entry in found["inputs"])
    ours = {entry["type"]: entry for entry in nodes.values() if entry["type"] in pack.NODE_CLASS_MAPPINGS}
    assert ours.keys() == pack.NODE_CLASS_MAPPINGS.keys()
    for name, entry in ours.items():
        inputs = pack.NODE_CLASS_MAPPINGS[name].INPUT_TYPES()
        widgets = [name for kind in inputs.values() for name in kind if name != "model"]
        assert len(entry["widgets_values"]) == len(widgets)


def test_loads_into_a_clone_alone(node: Callable[..., Any], trained: tuple[str, Any]) -> None:
    file, wan = trained
    base = make_patcher()
    before = [*base.model.state_dict()]
    model = node("LoadSalad", base, file)
    dense, salad = expected_of(diffusers_wan()), expected_of(wan)
    assert relative_error(salad, dense) > 1e-2
    for _ in range(2):
        assert relative_error(output(model), salad) < 1e-5
        assert relative_error(output(base), dense) < 1e-5
    assert [*base.model.state_dict()] == before
    first, second = base.model.diffusion_model, model.get_model_object("diffusion_model")
    assert all(second.get_parameter(name) is parameter for name, parameter in first.named_parameters())
    added = sum(p.numel() * p.element_size() for b in branches(second).values() for p in b.parameters())
    assert model.size == base.size + added > base.size


def test_with_lora_on_both_sides_and_in_use(node: Callable[..., Any], trained: tuple[str, Any]) -> None:
    file, wan = trained
    update = 0.3 * draw(24, 24)
    weight = wan.blocks[1].attn1.to_v.weight
    plain = expected_of(wan)
    with torch.no_grad():
        weight += update
        expected = expected_of(wan)
        weight -= update
    base = make_patcher()
    before, after = base.clone(), node("LoadSalad", base, file)
    assert before.add_patches({f"diffusion_model.{VALUE}": update}) == [f"diffusion_model.{VALUE}"]
    output(before)  # its weights lie in the module while the node runs
    first = node("LoadSalad", before, file)
    second = after.clone()
    second.add_patches({f"diffusion_model.{VALUE}": update})
    output(before)
    for model in (first, second):
        assert relative_error(output(model), expected) < 1e-5
        assert relative_error(output(after), plain) < 1e-5
    assert relative_error(plain, expected) > 1e-2


def test_weights_in_fp8(node: Callable[..., Any], trained: tuple[str, Any]) -> None:
    file, _ = trained
    base = make_patcher(torch.float8_e4m3fn)
    model = node("LoadSalad", base, file)
    wide = diffusers_wan()
    with torch.no_grad():
        for module in wide.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(module.weight.to(torch.float8_e4m3fn))
    salad_compile.load(wide, file)
    assert relative_error(output(model), expected_of(wide)) < 1e-5
    assert model.get_model_object("diffusion_model").get_parameter(VALUE).dtype == torch.float8_e4m3fn


def test_settings_hold_for_their_clone(node: Callable[..., Any], trained: tuple[str, Any]) -> None:
    file, wan = trained
    model = node("LoadSalad", make_patcher(), file)
    own = expected_of(wan)
    salad_compile.set_sparsity(wan, 0.3)
    less = expected_of(wan)
    salad_compile.set_sparsity(wan, 0.6)
    with salad_compile.dense(wan):
        dense = expected_of(wan)
    assert relative_error(own, less) > 1e-3
    assert relative_error(less, dense) > 1e-3
    first = node("SaladSettings", model, 0.3, 0, False)
    second = node("SaladSettings", first, 0.0, 2, False)
    third = node("SaladSettings", second, 0.0, 0, True)
    for _ in range(2):
        assert relative_error(output(first), less) < 1e-5
        assert relative_error(output(model), own) < 1e-5
        assert relative_error(output(third, 0.5), dense) < 1e-5
        for level, expected in ((1.0, dense), (0.8, dense), (0.65, dense), (0.5, own), (0.1, own)):
            assert relative_error(output(second, level), expected) < 1e-5
    with pytest.raises(ConfigError, match="does not tell its steps"):
        output(second, sample_sigmas=None)


def test_compiled(node: Callable[..., Any], trained: tuple[str, Any]) -> None:
    file, wan = trained
    model = node("LoadSalad", make_patcher(), file)
    compiled = node("CompileWithSalad", node("SaladSettings", model, 0.0, 1, False), "eager")
    expected = expected_of(wan)
    with salad_compile.dense(wan):
        dense = expected_of(wan)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert relative_error(output(compiled, 0.5), expected) < 1e-5
    assert relative_error(output(model), expected) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert relative_error(output(compiled, 1.0), dense) < 1e-5
    assert relative_error(output(compiled, 0.1), expected) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_without_dynamic_loading(node: Callable[..., Any], trained: tuple[str, Any]) -> None:
    model = node("LoadSalad", make_patcher(dynamic=True), trained[0])
    assert not model.is_dynamic()
    assert relative_error(output(model), expected_of(trained[1])) < 1e-5


def test_branches_follow_the_video(pack: ModuleType, trained: tuple[str, Any]) -> None:
    model = salad_compile.load(diffusers_wan(), trained[0])
    found = list(branches(model).values())
    pack.steering.place(found, torch.device("meta"))
    assert {t.device.type for b in found for t in (*b.parameters(), *b.buffers())} == {"meta"}
    assert model.proj_out.weight.device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU beside the CPU")
def test_offloaded(node: Callable[..., Any], trained: tuple[str, Any]) -> None:
    """The branches are where ComfyUI left them; the video is on the GPU."""
    model = node("LoadSalad", make_patcher(), trained[0])
    module = model.use()
    with torch.inference_mode():
        module.cuda()
        for branch in branches(module).values():
            branch.cpu()
        options = {"transformer_options": {}}
        out = module(draw(1, 4, 3, 14, 14).cuda(), TIME.cuda(), context=draw(1, 6, 16).cuda(), **options)
    assert relative_error(out.cpu(), expected_of(trained[1])) < 1e-3


def test_rotation_is_put_back(node: Callable[..., Any], trained: tuple[str, Any]) -> None:
    """While SALAD runs, and never else, ComfyUI's rotation is one that can be seen through."""
    original, base = comfyui_stand_in.apply_rope1, make_patcher()
    model = node("LoadSalad", base, trained[0])
    assert comfyui_stand_in.apply_rope1 is original
    seen: list[Any] = []
    for patcher in (base, model):
        patcher.get_model_object("diffusion_model").head.register_forward_pre_hook(
            lambda *_: seen.append(comfyui_stand_in.apply_rope1)
        )
    output(model)
    output(base)
    assert seen[0] is not original
    assert seen[1] is comfyui_stand_in.apply_rope1 is original
    model.get_model_object("diffusion_model").head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        output(model)
    assert comfyui_stand_in.apply_rope1 is original


def test_inputs_of_image_to_video(pack: ModuleType) -> None:
    model = WanModel()
    model.img_emb = nn.Module()
    model.img_emb.proj = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 24))
    inputs = pack.wan.example_inputs(model, torch.bfloat16)
    assert inputs["clip_fea"].shape == (1, 257, 32)
    assert inputs["x"].shape == (1, 4, 3, 12, 16)
    assert inputs["context"].dtype == torch.bfloat16


def _wide_file(folder: Path) -> str:
    model = salad_compile.convert(diffusers_wan(num_attention_heads=3), CONFIG)
    return str(salad_compile.save(model, folder / "wide.safetensors"))


def _lora_file(folder: Path) -> str:
    save_file({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(2, 24)}, folder / "lora.safetensors")
    return str(folder / "lora.safetensors")


def _with_object(name: str, value: Any) -> ModelPatcher:
    model = make_patcher()
    model.add_object_patch(name, value)
    return model


def _derived() -> ModelPatcher:
    model = WanModel()
    model.vace_blocks = nn.ModuleList([nn.Linear(4, 4)])
    return make_patcher(model=model)


def _compiled_elsewhere() -> ModelPatcher:
    model = make_patcher()
    model.model_options["torch_compile_kwargs"] = {}
    return model


@pytest.mark.parametrize(
    ("make", "file", "error", "said"),
    [
        (lambda: make_patcher(model=ShorterModel()), None, BaseModelMismatchError, "this MODEL is a ShorterModel"),
        (_derived, None, BaseModelMismatchError, "is one with 'vace_blocks' besides"),
        (make_patcher, _wide_file, BaseModelMismatchError, "with other widths or heads"),
        (make_patcher, _lora_file, NotASaladFileError, "an exported LoRA alone is not the SALAD model"),
        (make_patcher, lambda folder: str(folder / "gone"), FileNotFoundError, "no SALAD file at .*gone"),
        (make_patcher, lambda folder: " ", FileNotFoundError, "is empty"),
        (_compiled_elsewhere, None, ConfigError, "compiled already"),
        (
            lambda: _with_object("diffusion_model.head", nn.Identity()),
            None,
            ConfigError,
            "replaced 'diffusion_model.head",
        ),
        (lambda: _with_object("diffusion_model", WanModel()), None, ConfigError, "replaced 'diffusion_model'"),
    ],
)
def test_load_refuses(
    make: Any, file: Any, error: Any, said: str, node: Callable[..., Any], trained: tuple[str, Any], tmp_path: Path
) -> None:
    model = make()
    before, patches = [*model.model.state_dict()], dict(model.object_patches)
    with pytest.raises(error, match=said) as caught:
        node("LoadSalad", model, trained[0] if file is None else file(tmp_path))
    assert "\n" not in str(caught.value)
    assert [*model.model.state_dict()] == before
    assert model.object_patches == patches


def test_other_refusals(node: Callable[..., Any], trained: tuple[str, Any], tmp_path: Path) -> None:
    base = make_patcher()
    for name, rest in (("SaladSettings", (0.0, 0, True)), ("CompileWithSalad", ("eager",))):
        with pytest.raises(NotConvertedError, match="holds no SALAD: put Load SALAD"):
            node(name, base, *rest)
    model = node("LoadSalad", base, trained[0])
    with pytest.raises(AlreadyConvertedError, match="gone through Load SALAD already"):
        node("LoadSalad", model, trained[0])
    with pytest.raises(ConfigError, match=r"must lie between 0\.2"):
        node("SaladSettings", model, 0.1, 0, False)
    with pytest.raises(ConfigError, match="must not be negative"):
        node("SaladSettings", model, 0.0, -1, False)
    fixed = salad_compile.convert(diffusers_wan(), dataclasses.replace(CONFIG, lowest_sparsity=None))
    file = salad_compile.save(fixed, tmp_path / "fixed.safetensors")
    with pytest.raises(ConfigError, match=r"fixed at 0\.6"):
        node("SaladSettings", node("LoadSalad", base, str(file)), 0.5, 0, False)
    model.add_object_patch("diffusion_model.blocks.0", base.model.diffusion_model.blocks[0])
    with pytest.raises(SiteLostError, match="2 attention layers were converted and 1 are there"):
        output(model)


def test_runs_again_for_another_file(pack: ModuleType, tmp_path: Path) -> None:
    changed = pack.NODE_CLASS_MAPPINGS["LoadSalad"].IS_CHANGED
    file = tmp_path / "salad.safetensors"
    missing = changed(file=str(file))
    assert missing != missing
    file.write_bytes(b"")
    assert changed(model=None, file=str(file)) == file.stat().st_mtime


def test_check_wants_a_checkout(check: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is not a checkout of ComfyUI"):
        check["main"]([str(tmp_path)])
