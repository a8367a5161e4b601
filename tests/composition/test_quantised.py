"""SALAD beside weights of torchao, GGUF and bitsandbytes: before and after conversion, uncompiled and block by block.

Weights of the base are quantised, the gates and projections of ours are parameters of no Linear and stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import salad_compile
from salad_compile.errors import MergeError, SiteLostError
from salad_compile.sites.branch import branches
from tests.composition.bits_and_bytes import DENSE_LOSS, bits_and_bytes
from tests.models.zoo import from_diffusers, randomise
from tests.support import randomise_branches, relative_error, seeded
from tests.trainers.tiny import CONFIG, INPUTS, base, converted, output

# what weights of 8 bits and of 4 bits lose on this model, several times over
LOSS = {"int8": 0.02, "int8 dynamic": 0.03, "fp8": 0.08, "fp8 rows": 0.1, "fp8 tensors": 0.1, "q8": 0.05, "q4": 0.4}


def quantise(model: Any, kind: str) -> None:
    """As a user of torchao does; the blocks alone, as the smallest weights of a real model are kept as they are.

    fp8 products run on CPUs as well, though torchao refuses them there. Its settings for Inductor are not wanted: they
    would stay switched on for all tests that follow.
    """
    torchao = pytest.importorskip("torchao.quantization", reason="torchao: `make test-composition` installs it")
    dynamic = torchao.Float8DynamicActivationFloat8WeightConfig
    config: Any = {
        "int8": torchao.Int8WeightOnlyConfig,
        "int8 dynamic": torchao.Int8DynamicActivationInt8WeightConfig,
        "fp8": torchao.Float8WeightOnlyConfig,
        "fp8 rows": functools.partial(dynamic, granularity=torchao.PerRow()),
        "fp8 tensors": functools.partial(dynamic, granularity=torchao.PerTensor()),
    }[kind]
    with mock.patch("torchao.quantization.quant_api._check_hardware_support"):
        made = config(set_inductor_config=False)
        torchao.quantize_(model, made, filter_fn=lambda part, name: _is_linear(part) and "blocks." in name)


def _is_linear(part: torch.nn.Module) -> bool:
    return isinstance(part, torch.nn.Linear)


Forward = Callable[[Any], torch.Tensor]


def output_in_bf16(model: Any) -> torch.Tensor:
    """One forward on inputs in bf16, as fp8 products by rows want them."""
    inputs = {name: x.bfloat16() if x.dim() > 1 else x for name, x in INPUTS.items()}
    with torch.no_grad():
        out: torch.Tensor = model(**inputs, return_dict=False)[0]
    return out


def check(
    model: Any,
    expected: torch.Tensor,
    loss: float,
    lowering: str = "aot_eager",
    same: float = 1e-5,
    forward: Forward = output,
) -> None:
    """It runs as SALAD with what the weights lose, compiled as well, and all blocks are one graph."""
    for branch in branches(model).values():
        assert {type(p) for p in branch.parameters()} == {torch.nn.Parameter}
    uncompiled = forward(model)
    assert 1e-5 < relative_error(uncompiled, expected) < loss
    model.compile_repeated_blocks(backend="salad", fullgraph=True, options={"lowering": lowering})
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            assert relative_error(forward(model), uncompiled) < same


@pytest.mark.parametrize("kind", ["int8", "fp8", pytest.param("int8 dynamic", marks=pytest.mark.all_cases)])
def test_torchao_after_conversion(kind: str) -> None:
    model = converted()
    expected = output(model)
    salad_compile.merge_lora(model)
    quantise(model, kind)
    with torch.inference_mode():
        check(model, expected, LOSS[kind])


@pytest.mark.all_cases
@pytest.mark.parametrize("kind", ["fp8 rows", "fp8 tensors"])
def test_products_of_torchao_in_fp8(kind: str) -> None:
    model = convert_wide(wide()).bfloat16()
    expected = output_in_bf16(model)
    salad_compile.merge_lora(model)
    quantise(model, kind)
    with torch.inference_mode():
        check(model, expected, LOSS[kind], forward=output_in_bf16)


@pytest.mark.parametrize("kind", [pytest.param("int8", marks=pytest.mark.all_cases), "fp8"])
def test_torchao_before_conversion(kind: str, tmp_path: Path) -> None:
    file = salad_compile.save(converted(), tmp_path / "salad.safetensors")
    model = base()
    quantise(model, kind)
    check(salad_compile.load(model, file), output(converted()), LOSS[kind])


def test_merging_into_quantised_weights_is_an_error() -> None:
    model = converted()
    quantise(model, "int8")
    before = output(model)
    with pytest.raises(MergeError, match="merge before quantising"):
        salad_compile.merge_lora(model)
    assert torch.equal(output(model), before)


def wide() -> Any:
    """A Wan whose widths are multiples of 32, the blocks of GGUF; and with SALAD, when :func:`convert_wide` is done."""
    channels = INPUTS["hidden_states"].shape[1]
    settings = {"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 64, "num_layers": 2, "text_dim": 16}
    more = {"in_channels": channels, "out_channels": channels, "freq_dim": 32, "rope_max_seq_len": 32}
    with seeded(0):
        return randomise(from_diffusers("WanTransformer3DModel", settings | more), 0).eval()


def convert_wide(model: Any) -> Any:
    salad_compile.convert(model, CONFIG, example_inputs=dict(INPUTS))
    randomise_branches(model)
    return model


def to_gguf(model: Any, kind: str) -> Any:
    """The blocks' Linears as diffusers holds them after it has read a GGUF file."""
    gguf = pytest.importorskip("gguf", reason="gguf: `make test-composition` installs it")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    want = {"q8": gguf.GGMLQuantizationType.Q8_0, "q4": gguf.GGMLQuantizationType.Q4_0}[kind]
    linears = [(name, each) for name, each in model.blocks.named_modules() if isinstance(each, torch.nn.Linear)]
    for name, linear in linears:
        packed = torch.from_numpy(gguf.quants.quantize(linear.weight.detach().numpy(), want))
        there = GGUFLinear(linear.in_features, linear.out_features, True, compute_dtype=torch.float32)
        there.weight, there.bias = GGUFParameter(packed, quant_type=want), linear.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.blocks.get_submodule(parent), leaf, there)
    return model


# AOTAutograd without Inductor does not take diffusers' GGUF parameters, with a dense model either
@pytest.mark.parametrize(("kind", "lowering"), [
    ("q8", "eager"),
    pytest.param("q4", "inductor", marks=pytest.mark.all_cases),
])  # fmt: skip
def test_gguf_before_conversion(kind: str, lowering: str) -> None:
    same = 1e-3 if lowering == "inductor" else 1e-5  # diffusers unpacks the weights in fp16
    check(convert_wide(to_gguf(wide(), kind)), output(convert_wide(wide())), LOSS[kind], lowering, same)


# --- bitsandbytes: its kernels for CPUs here, those for GPUs in test_gpu.py -------------------------------------------


@pytest.mark.parametrize("kind", DENSE_LOSS)
def test_bitsandbytes_before_conversion(kind: str, tmp_path: Path) -> None:
    expected = convert_wide(wide())
    file = salad_compile.save(expected, tmp_path / "salad.safetensors")
    model = salad_compile.load(bits_and_bytes(wide(), kind, torch.float32), file)
    check(model, output(expected), DENSE_LOSS[kind], same=1e-3)  # the 8-bit product rounds its input to fp16
    with pytest.raises(MergeError, match="merge in 16 or 32 bits"):
        salad_compile.merge_lora(model)


def test_bitsandbytes_after_conversion_is_an_error() -> None:
    """Its Linears are other modules, which our low-rank updates and gates know nothing of."""
    model = bits_and_bytes(convert_wide(wide()), "4bit", torch.float32)
    with pytest.raises(SiteLostError, match="a projection was replaced after conversion"):
        output(model)
