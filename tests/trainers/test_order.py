"""Recipe: convert, then checkpointing, then compile, then DDP or FSDP2. What else works, and what is an error.

`tests/end_to_end/test_ddp_buckets.py` and `test_compile_matrix.py` have more ways of compiling, on a smaller model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import salad_compile
from salad_compile.errors import WrappedModelError
from tests.support import relative_error
from tests.trainers.tiny import CONFIG, INPUTS, base, batch, branch_gradients, converted, flow_matching_loss, output

EAGER: dict[str, Any] = {"backend": "salad", "options": {"lowering": "eager"}}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def _alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone: enough to wrap and to shard."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    flow_matching_loss(model, **batch()).backward()
    found = branch_gradients(model)
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}


def ddp(model: Any) -> Any:
    return DistributedDataParallel(model)


def fsdp2(model: Any) -> Any:
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("wrap", [ddp, fsdp2])
def test_the_order_to_follow(wrap: Callable[[Any], Any]) -> None:
    expected = gradients_of(converted().train())
    model = converted().train()
    model.enable_gradient_checkpointing()
    model.compile_repeated_blocks(**EAGER)
    actual = gradients_of(wrap(model))
    assert actual.keys() == expected.keys()
    assert all(relative_error(actual[name], expected[name]) < 1e-4 for name in expected)


def test_blocks_may_be_compiled_before() -> None:
    # in place: the modules stay what they are; torch.compile(model) wraps, and is an error
    model = base()
    model.compile_repeated_blocks(**EAGER)
    before = output(model)
    model = salad_compile.convert(model, CONFIG, example_inputs=dict(INPUTS))
    model.load_state_dict(converted().state_dict())
    expected = output(converted())
    assert relative_error(output(model), expected) < 1e-5
    assert relative_error(before, expected) > 1e-2


def whole(model: Any) -> nn.Module:
    return torch.compile(model, **EAGER)  # type: ignore[no-any-return]


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("wrap", [whole, ddp, fsdp2])
def test_wrapped_before_is_an_error(wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    with pytest.raises(WrappedModelError, match="first"):
        salad_compile.convert(wrap(base()), CONFIG, example_inputs=dict(INPUTS))
    if wrap is fsdp2:  # the others are looked through, and converted inside
        file = salad_compile.save(converted(), tmp_path / "salad.safetensors")
        with pytest.raises(WrappedModelError, match="first"):
            salad_compile.load(wrap(base()), file)
