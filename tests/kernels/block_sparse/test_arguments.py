"""What block-sparse attention refuses, and that it says why."""

from typing import Any

import pytest
import torch

from salad_compile.kernels import KernelArgumentError, block_sparse_attention
from tests.kernels.helpers import make_qkv, make_selection


def arguments(**change: Any) -> dict[str, Any]:
    query, key, value = make_qkv(203)
    lut, count = make_selection(query, key, 64, 64, 600)
    given = {"query": query, "key": key, "value": value, "lut": lut, "count": count}
    return given | {"query_block": 64, "key_block": 64, "scale": 0.25} | change


def test_the_unchanged_arguments_are_fine() -> None:
    block_sparse_attention(**arguments())


def with_entry(name: str, where: tuple[int, ...], entry: int) -> dict[str, torch.Tensor]:
    tensor = arguments()[name].clone()
    tensor[where] = entry
    return {name: tensor}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.randn(203, 16).double()}, "4 dimensions"),
        ({"key": torch.randn(2, 3, 203, 16)}, "one dtype"),
        ({"key": torch.randn(2, 3, 202, 16).double()}, "shape of query"),
        ({"value": torch.randn(2, 3, 202, 16).double()}, "agree with query"),
        ({"query_block": 0}, "must be one of 16"),
        ({"key_block": -64}, "must be one of 16"),
        ({"scale": float("nan")}, "finite"),
        ({"lut": arguments()["lut"].long()}, "int32"),
        ({"lut": arguments()["lut"][:, :, :-1]}, "K"),
        ({"lut": arguments()["lut"][..., :0]}, "1 <= K"),
        ({"count": arguments()["count"].long()}, "int32"),
        ({"count": arguments()["count"][:, :1]}, "count"),
        (with_entry("lut", (0, 0, 0, 1), 4), "outside"),
        (with_entry("lut", (0, 0, 0, 0), -1), "outside"),
        (with_entry("lut", (0, 0, 0), 2), "once, in ascending order"),
        (with_entry("count", (0, 0, 0), 3), "outside"),
        (with_entry("count", (0, 0, 0), -2), "outside"),
        ({"key_mask": torch.ones(2, 202).bool()}, "key_mask"),
        ({"key_mask": torch.ones(2, 203)}, "key_mask must be bool"),
        ({"key_mask": torch.ones(203).bool()}, "2 dimensions"),
    ],
)
def test_rejects(change: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        block_sparse_attention(**arguments(**change))


def test_rejects_tensors_on_two_devices() -> None:
    with pytest.raises(KernelArgumentError, match="one device"):
        block_sparse_attention(**arguments(count=arguments()["count"].to("meta")))


@pytest.mark.parametrize("name", ["grad_out", "out", "lse"])
def test_backward_rejects(name: str) -> None:
    given = arguments()
    out, lse = block_sparse_attention(**given)
    given |= {"grad_out": torch.randn_like(out), "out": out, "lse": lse}
    torch.ops.salad.block_sparse_attention_backward(**given)
    with pytest.raises(KernelArgumentError, match=name):
        torch.ops.salad.block_sparse_attention_backward(**(given | {name: given[name][:, :, :-1]}))
    with pytest.raises(KernelArgumentError, match=name):
        torch.ops.salad.block_sparse_attention_backward(**(given | {name: given[name].half()}))
