"""One video over two GPUs, over NCCL: outputs and gradients of one, in bf16, with Triton kernels and Inductor.

    pytest tests/end_to_end/test_two_gpus.py tests/end_to_end/test_train_gpu.py     # on a machine with two GPUs

On two CPUs over gloo tests/trainers/test_context_parallel.py does the same. The trainer on two GPUs is in the second
file of the command.
"""

from __future__ import annotations

import copy
import itertools
import os
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import salad_compile
from salad_compile.definition import attention
from tests.support import randomise_branches, relative_error, seeded
from tests.trainers.processes import free_port

WORLD = 2
CONVERSIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "tail": {"compensation": "tail"},
    "split heads": {"heads": 5},
    "split heads, tail": {"heads": 5, "compensation": "tail"},
}
# bf16, a step of 2^-8: sums over tokens and over heads are added in another order
BOUND = 2.0**-6


def model_and_inputs(device: torch.device, heads: int = 6, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """A converted Wan of three blocks, and 1,360 tokens for it."""
    from diffusers import WanTransformer3DModel

    with seeded(3):
        model = WanTransformer3DModel(
            num_attention_heads=heads, attention_head_dim=128, num_layers=3, ffn_dim=1024, text_dim=32
        )
        inputs = {
            "hidden_states": torch.randn(1, 16, 5, 32, 34),
            "encoder_hidden_states": torch.randn(1, 16, 32),
            "timestep": torch.tensor([500.0]),
        }
    model = model.to(device, torch.bfloat16).eval()
    given = {name: tensor.to(device) for name, tensor in inputs.items()}
    given |= {name: given[name].to(torch.bfloat16) for name in ("hidden_states", "encoder_hidden_states")}
    config = salad_compile.SaladConfig(sparsity=0.8, lora_rank=8, min_tokens=1024, **changes)
    model = salad_compile.convert(model, config, example_inputs=given)
    randomise_branches(model, scale=0.05)
    return model, {**given, "return_dict": False}


def outcome(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradients of the branches for the sum of its squares."""
    model.zero_grad()
    out: Tensor = model(**inputs)[0]
    out.float().square().sum().backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad.float() for name, p in model.named_parameters() if ".salad." in name and p.grad is not None}
    return out.detach(), found


def compare(rank: int, port: int) -> None:
    from diffusers import ContextParallelConfig

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", timeout=timedelta(seconds=120), device_id=device)
    try:
        for (name, changes), backends in itertools.product(CONVERSIONS.items(), (set[str](), {"nccl"})):
            attention.OVERLAPPING_BACKENDS = backends  # NCCL is none by default, until this has passed
            torch.compiler.reset()
            model, inputs = model_and_inputs(device, **changes)
            expected, of_one = outcome(model, inputs)
            shared = copy.deepcopy(model)
            shared.enable_parallelism(config=ContextParallelConfig(ulysses_degree=WORLD))
            salad_compile.parallelise(shared)
            out, gradients = outcome(shared, inputs)
            assert relative_error(out, expected) < BOUND, name
            assert gradients.keys() == of_one.keys()
            for key, gradient in gradients.items():
                dist.all_reduce(gradient)
                assert relative_error(gradient, of_one[key]) < 4 * BOUND, (name, key)
            shared.compile_repeated_blocks(backend="salad")
            with torch.no_grad():
                assert relative_error(shared(**inputs)[0], expected) < BOUND, name
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < WORLD, reason="needs two GPUs, and shares a video over NCCL")
def test_two_gpus_equal_one() -> None:
    mp.start_processes(compare, args=(free_port(),), nprocs=WORLD, start_method="spawn")
