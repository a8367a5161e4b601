"""Example inputs: what `synthesise_inputs` makes up must run, and what it cannot make up must be said clearly."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from salad_compile.discovery.inputs import normalise_inputs, synthesise_inputs
from salad_compile.errors import InputsError
from tests.models.zoo import CASES

META = torch.device("meta")
GRID = 21 * 30 * 52  # tokens of the default latent size at a patch size of (1, 2, 2)

WAN = "WanTransformer3DModel"
COG = "CogVideoXTransformer3DModel"
TWO = {"num_layers": 2}  # the default widths, fewer blocks: depth does not change what forward takes
KANDINSKY = {"num_text_blocks": 1, "num_visual_blocks": 2}
IMAGE = {"image_dim": 1280, "added_kv_proj_dim": 5120, "in_channels": 36}
# The published Latte-1: its class has no usable defaults.
LATTE = {
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "patch_size": 2,
    "cross_attention_dim": 1152,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "caption_channels": 4096,
    "video_length": 16,
}
LTX23 = {"cross_attn_mod": True, "audio_cross_attn_mod": True, "use_prompt_embeddings": False}
COG15 = {"use_rotary_positional_embeddings": True, "patch_size_t": 2, "ofs_embed_dim": 512, "patch_bias": False}
COG_I2V = {"use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": True, "in_channels": 32}

FACE = {"is_train_face": True, "num_attention_heads": 48}  # the default 30 do not fit the default face features

# name: class, configuration on top of its defaults, tokens that a video (or joint) self-attention call must see
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "wan": (WAN, TWO, GRID),
    "wan-i2v": (WAN, TWO | IMAGE, GRID),
    "wan-flf2v": (WAN, TWO | IMAGE | {"pos_embed_seq_len": 514}, GRID),
    "vace": ("WanVACETransformer3DModel", TWO | {"vace_layers": [0, 1]}, GRID),
    "animate": ("WanAnimateTransformer3DModel", TWO | {"inject_face_latents_blocks": 2}, GRID),
    "chronoedit": ("ChronoEditTransformer3DModel", TWO, GRID),
    "skyreels": ("SkyReelsV2Transformer3DModel", TWO, GRID),
    "anyflow": ("AnyFlowTransformer3DModel", TWO, GRID),
    "ltx": ("LTXVideoTransformer3DModel", TWO, 21 * 60 * 104),
    "ltx2": ("LTX2VideoTransformer3DModel", TWO, 21 * 60 * 104),
    "ltx2.3": ("LTX2VideoTransformer3DModel", TWO | LTX23, 21 * 60 * 104),
    "cosmos": ("CosmosTransformer3DModel", TWO, GRID),
    "kandinsky5": ("Kandinsky5Transformer3DModel", KANDINSKY, GRID),
    "kandinsky5-visual-cond": ("Kandinsky5Transformer3DModel", KANDINSKY | {"visual_cond": True}, GRID),
    "kandinsky6": ("Kandinsky6Transformer3DModel", KANDINSKY, GRID),
    "allegro": ("AllegroTransformer3DModel", TWO, GRID),
    "latte": ("LatteTransformer3DModel", TWO | LATTE, 30 * 52),
    "cogvideox": (COG, TWO, 226 + GRID),
    "cogvideox1.5-i2v": (COG, TWO | COG15, 226 + 10 * 30 * 52),
    "cogvideox-i2v": (COG, TWO | COG_I2V, 226 + 13 * 30 * 45),
    "consisid": ("ConsisIDTransformer3DModel", TWO, 226 + GRID),
    "consisid-face": ("ConsisIDTransformer3DModel", TWO | FACE, 226 + GRID),
    "hunyuan": ("HunyuanVideoTransformer3DModel", {"num_layers": 1, "num_single_layers": 1}, GRID + 512),
}


class SelfAttention(TorchFunctionMode):
    """Collects the token counts of attention calls whose queries and keys are equally many."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q = args[0] if args else kwargs["query"]
            k = args[1] if len(args) > 1 else kwargs["key"]
            if q.shape[-2] == k.shape[-2]:
                self.tokens.append(q.shape[-2])
        return func(*args, **kwargs)


@pytest.fixture
def diffusers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """diffusers, with a stand-in for torchvision's resize, which Cosmos calls and which is not installed here."""
    cosmos = pytest.importorskip("diffusers.models.transformers.transformer_cosmos")

    def resize(x: Tensor, size: list[int], interpolation: str) -> Tensor:
        return F.interpolate(x, size=size, mode=interpolation)

    transforms = SimpleNamespace(
        functional=SimpleNamespace(resize=resize), InterpolationMode=SimpleNamespace(NEAREST="nearest")
    )
    monkeypatch.setattr(cosmos, "transforms", transforms, raising=False)
    return importlib.import_module("diffusers")


def run(model: nn.Module, inputs: dict[str, Any]) -> list[int]:
    with torch.no_grad(), SelfAttention() as seen:
        model(**inputs)
    return seen.tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_forward_runs_on_meta_and_attends_over_the_whole_video(diffusers: Any, name: str, dtype: torch.dtype) -> None:
    cls, config, tokens = MODELS[name]
    with META:
        model = getattr(diffusers, cls)(**config).to(dtype).eval()
    inputs = synthesise_inputs(model, device=META, dtype=dtype)
    assert tokens in run(model, inputs)
    assert all(value.device == META for value in inputs.values() if isinstance(value, Tensor))
    assert inputs["hidden_states"].dtype == dtype


def test_forward_runs_on_fake_tensors_where_meta_cannot(diffusers: Any) -> None:
    """Helios asks for the autocast type of its device, and meta has none."""
    with FakeTensorMode():
        model = diffusers.HeliosTransformer3DModel(num_layers=2).eval()
        inputs = synthesise_inputs(model, device=torch.device("cpu"), dtype=torch.float32)
        assert type(inputs["hidden_states"]).__name__ == "FakeTensor"
        assert run(model, inputs) == [GRID, GRID]


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("handwritten")])
def test_real_small_tensors_run_too(name: str) -> None:
    """The fallback for models that meta and fake tensors cannot run: real ones, here at an odd latent size."""
    pytest.importorskip("diffusers")
    model = CASES[name].build()
    inputs = synthesise_inputs(
        model, device=torch.device("cpu"), dtype=torch.float32, latent_size=(2, 7, 9), text_tokens=5
    )
    packed = "num_frames" in inputs
    assert (2 * 7 * 9 if packed else 3 * 4 if name == "Latte" else 2 * 3 * 4) in run(model, inputs)


def test_latents_are_cut_to_whole_patches() -> None:
    conv = nn.Conv3d(6, 8, kernel_size=(2, 4, 4), stride=(2, 4, 4))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = conv
            self.text_dim = 10

        def forward(self, x: Tensor, t: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
            raise AssertionError("synthesising must not run the model")

    inputs = synthesise_inputs(Model(), device=META, dtype=torch.float16, latent_size=(5, 11, 3), text_tokens=7)
    assert {name: tuple(value.shape) for name, value in inputs.items()} == {
        "x": (1, 6, 4, 8, 4),
        "t": (1,),
        "context": (1, 7, 10),
    }
    assert inputs["t"].dtype == torch.float32


def test_config_may_be_any_object_and_wins_over_attributes() -> None:
    class Model(nn.Module):
        config = SimpleNamespace(in_channels=3, text_dim=5, patch_size=None)
        text_dim = 99

        def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> None: ...

    inputs = synthesise_inputs(Model(), device=META, dtype=torch.float32, latent_size=(2, 3, 4), text_tokens=6)
    assert tuple(inputs["hidden_states"].shape) == (1, 3, 2, 3, 4)
    assert tuple(inputs["encoder_hidden_states"].shape) == (1, 6, 5)


def test_the_error_names_what_is_missing_and_what_to_pass() -> None:
    model = CASES["handwritten_fused"].build()
    with pytest.raises(InputsError) as caught:
        synthesise_inputs(model, device=META, dtype=torch.float32)
    message = str(caught.value)
    assert "text (the model's config has no text_dim" in message
    assert "x (" not in message  # its channels are read off the patch convolution
    assert 'example_inputs={"x": ..., "t": ..., "text": ...}' in message
    assert "FusedDiT.forward(x, t, text)" in message


def test_the_error_names_every_unknown_required_parameter() -> None:
    class Model(nn.Module):
        in_channels = 4

        def forward(self, x: Tensor, depth_map: Tensor, seq_len: int, camera: Tensor | None = None) -> None: ...

    with pytest.raises(InputsError, match=r"depth_map \(no rule for this name\); seq_len \(no rule") as caught:
        synthesise_inputs(Model(), device=META, dtype=torch.float32)
    assert "camera" not in str(caught.value).split("The model takes")[0]


@pytest.mark.parametrize("name", ["Model", "Timed"])
def test_a_forward_without_latents_is_an_error(name: str) -> None:
    class Model(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> None: ...

    class Timed(nn.Module):
        def forward(self, timestep: Tensor) -> None: ...

    with pytest.raises(InputsError, match="none of hidden_states, x"):
        synthesise_inputs({"Model": Model, "Timed": Timed}[name](), device=META, dtype=torch.float32)


class Plain(nn.Module):
    def forward(self, hidden_states: Tensor, timestep: Tensor, *, guidance: float = 1.0) -> None: ...


class Open(nn.Module):
    def forward(self, x: Tensor, **extra: Any) -> None: ...


def test_tuples_are_positional_and_mappings_keyword_inputs() -> None:
    x, t = torch.zeros(1), torch.zeros(2)
    assert normalise_inputs(Plain(), (x, t)) == ((x, t), {})
    given = {"timestep": t, "hidden_states": x, "guidance": 3.0}
    args, kwargs = normalise_inputs(Plain(), given)
    assert args == ()
    assert kwargs == given
    assert kwargs is not given
    assert normalise_inputs(Open(), {"x": x, "anything": t}) == ((), {"x": x, "anything": t})


def mistakes() -> Iterator[Any]:
    x = torch.zeros(1)
    yield pytest.param({"hidden_state": x, "timestep": x}, "Did you mean 'hidden_states'", id="near")
    yield pytest.param({"hidden_states": x, "timestep": x, "zzz": x}, "unknown input 'zzz'[.;]", id="far")
    yield pytest.param({"hidden_states": x}, "missing 'timestep'", id="missing")
    yield pytest.param({}, "hidden_states", id="empty")
    yield pytest.param((x,), "timestep", id="too few")
    yield pytest.param((x, x, 1.0), "too many positional", id="too many")
    yield pytest.param([x, x], "a tuple of positional inputs.* not list", id="list")
    yield pytest.param(x, "not Tensor", id="tensor")


@pytest.mark.parametrize(("given", "message"), list(mistakes()))
def test_inputs_that_do_not_fit_are_an_error_that_shows_the_signature(given: Any, message: str) -> None:
    with pytest.raises(InputsError, match=message) as caught:
        normalise_inputs(Plain(), given)
    assert "Plain.forward(hidden_states, timestep, *, guidance=1.0)" in str(caught.value)


def test_all_wrong_names_are_reported_at_once() -> None:
    with pytest.raises(InputsError, match=r"'hidden_state'.*'time_step'.*missing 'hidden_states', 'timestep'"):
        normalise_inputs(Plain(), {"hidden_state": 0, "time_step": 0})


def test_the_signature_is_seen_through_decorators(diffusers: Any) -> None:
    """diffusers wraps forward for LoRA scaling."""
    with META:
        model = diffusers.WanTransformer3DModel(num_layers=1)
    with pytest.raises(InputsError, match="Did you mean 'timestep'"):
        normalise_inputs(model, {"hidden_states": 0, "timesteps": 0, "encoder_hidden_states": 0})


def test_importing_is_light() -> None:
    heavy = ("triton", "torch._inductor", "diffusers")
    code = f"import sys, salad_compile.discovery.inputs; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
