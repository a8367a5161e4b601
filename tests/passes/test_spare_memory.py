"""What one block of a model keeps of each token for its backward pass, dense and as SALAD, counted in its graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn as nn
from diffusers import WanTransformer3DModel
from torch import Tensor, fx

# Private, and what Inductor gives to AOTAutograd: how a graph of forward and backward is cut (torch 2.11 and 2.13).
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

import salad_compile
from salad_compile.config import BackendOptions
from salad_compile.passes.driver import run_passes
from tests.support import randomise_branches

TOKENS = 8 * 8 * 8
CONFIG = salad_compile.SaladConfig(
    compensation="none", sparsity=0.6, query_block=64, key_block=64, lora_rank=4, min_tokens=64
)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def wan() -> nn.Module:
    """One block of 128 channels in bf16, with a norm over all heads."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 64, "ffn_dim": 256, "num_layers": 1}
    return WanTransformer3DModel(**sizes, text_dim=32, freq_dim=32).bfloat16()  # type: ignore[no-any-return]


def inputs() -> dict[str, Any]:
    video, text = torch.randn(1, 16, 8, 16, 16), torch.randn(1, 16, 32)
    return {
        "hidden_states": video.bfloat16().requires_grad_(),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": text.bfloat16(),
        "return_dict": False,
    }


def kept_bytes(model: nn.Module, options: dict[str, Any] | None) -> float:
    """Bytes for each token of what the block's forward hands to its backward, the block's inputs left out."""
    forwards: list[tuple[fx.GraphModule, int]] = []

    def cut(joint: fx.GraphModule, given: Any, *, num_fwd_outputs: int, **more: Any) -> Any:
        parts = min_cut_rematerialization_partition(joint, given, num_fwd_outputs=num_fwd_outputs, **more)
        forwards.append((parts[0], num_fwd_outputs))
        return parts

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        if options is not None:
            run_passes(gm, BackendOptions.from_options(options), example_inputs)
        as_it_is = lambda graph, _: graph.forward  # noqa: E731
        compiler = aot_autograd(fw_compiler=as_it_is, partition_fn=cut, decompositions=select_decomp_table())
        return compiler(gm, example_inputs)  # type: ignore[no-any-return]

    torch._dynamo.reset()
    model.blocks[0].compile(backend=backend, fullgraph=True)  # type: ignore[index, union-attr]
    model(**inputs())[0].float().square().mean().backward()
    ((forward, results),) = forwards
    (output,) = forward.graph.find_nodes(op="output")
    kept = [node.meta["val"] for node in output.args[0][results:] if node.op != "placeholder"]
    return sum(value.nbytes for value in kept if isinstance(value, Tensor) and TOKENS in value.shape) / TOKENS


@functools.cache
def dense_bytes() -> float:
    """Of the same block before its conversion, which trains nothing."""
    return kept_bytes(wan().requires_grad_(False), None)


UNIT = 2 * 128
"""Bytes of a token in one tensor as wide as the block."""
OF_LORA = 2 * (4 * CONFIG.lora_rank + 1)
"""What the low rank of LoRA at four projections, and the gate, have of a token."""


@pytest.mark.parametrize(
    ("placement", "prepares", "before"),
    [
        ("map-then-rotate", True, 9),
        ("map-then-rotate", False, 10),
        pytest.param("rotate-then-map", False, 4, marks=pytest.mark.all_cases),
    ],
)
def test_a_block_keeps_no_more_than_the_dense_one(placement: str, prepares: bool, before: int) -> None:
    """before: how many tensors more it would keep if the partitioner took our operators for expensive ones."""
    config = {**CONFIG.to_dict(), "rope_placement": placement}
    model = salad_compile.convert(wan(), config, example_inputs=inputs())
    randomise_branches(model)
    options = {"prepare_operands": prepares}
    assert kept_bytes(model, options) <= dense_bytes() + OF_LORA
    assert kept_bytes(model, {**options, "spare_memory": False}) >= dense_bytes() + before * UNIT, "nothing is spared"
