"""Checks and dtype rules that several operators share. Each operator's own rules stand in its folder."""

import weakref
from typing import NamedTuple

import torch

from .errors import KernelArgumentError
from .remembered import fact_of, remember

BLOCK_SIZES = (16, 32, 64, 128, 256)  # powers of two: one of two sizes divides the other
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_PERMUTATION = "a permutation of as many tokens as it has entries"


def require(condition: bool, message: str) -> None:
    """Raise `KernelArgumentError(message)` unless `condition` holds."""
    if not condition:
        raise KernelArgumentError(message)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: fp64 for fp64, fp32 for everything narrower (specification 1)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_float_4d(**tensors: torch.Tensor) -> None:
    """Every tensor is 4-D, floating point, and of one common dtype. Reads no sizes, so a fake may call it."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        require(tensor.dim() == 4, f"{name} must have 4 dimensions (B, H, S, D), got {tensor.dim()}")
        require(
            tensor.dtype in FLOAT_DTYPES,
            f"{name} has dtype {tensor.dtype}; supported are float32, bfloat16, float16 and float64",
        )
        require(
            tensor.dtype == first.dtype,
            f"{name} has dtype {tensor.dtype} but {first_name} has {first.dtype}; cast them to one dtype",
        )


def check_same_device(**tensors: torch.Tensor | None) -> None:
    """All given tensors live on one device."""
    present = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    require(len(set(present.values())) <= 1, f"all tensors must be on one device, got {present}")


def check_block(name: str, block: int) -> None:
    """A block size is one of those that every engine computes."""
    sizes = ", ".join(map(str, BLOCK_SIZES))
    require(block in BLOCK_SIZES, f"{name} must be one of {sizes}, there are no blocks of {block}")


def check_order_type(order: torch.Tensor) -> None:
    """The token order is a 1-D int32 tensor. Reads no sizes."""
    require(order.dtype == torch.int32, f"order must be int32, got {order.dtype}")
    require(order.dim() == 1, f"order must have 1 dimension (S,), got {order.dim()}")


def check_move(x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> None:
    """order and inverse are permutations of the tokens of x (B, H, S, D), each the inverse of the other.

    Contents are read on the CPU only (elsewhere that would sync), and once: a layer moves rows in the same order at
    every step.
    """
    if x.is_cpu and order.shape == x.shape[2:3] and _are_inverse(order, inverse):
        return
    for permutation in (order, inverse):
        _check_order(permutation, x.shape[2])
        require(permutation.device == x.device, f"order is on {permutation.device}, x on {x.device}")
    _check_inverse(order, inverse)


def _check_order(order: torch.Tensor, tokens: int) -> None:
    check_order_type(order)
    require(order.shape[0] == tokens, f"order has {order.shape[0]} entries but there are {tokens} tokens")
    if order.device.type == "cpu" and not _is_permutation(fact_of(order)):
        low, high = (int(bound) for bound in order.aminmax())
        require(low >= 0 and high < tokens, f"order has entries in [{low}, {high}], outside [0, {tokens})")
        seen = torch.zeros(tokens, dtype=torch.bool).index_fill_(0, order.long(), 1)
        require(bool(seen.all()), "order is not a permutation: some tokens occur twice and others never")
        remember(order, _PERMUTATION)


def _is_permutation(fact: object) -> bool:
    return fact == _PERMUTATION or isinstance(fact, _InverseOf)


class _InverseOf(NamedTuple):
    """What is remembered of a permutation: of which other one, and of which state of it, it is the inverse."""

    order: weakref.ref[torch.Tensor]
    version: int


def _are_inverse(order: torch.Tensor, inverse: torch.Tensor) -> bool:
    """Whether these are known to be two permutations, each the inverse of the other."""
    fact = fact_of(inverse)
    return isinstance(fact, _InverseOf) and fact.order() is order and fact.version == order._version


def _check_inverse(order: torch.Tensor, inverse: torch.Tensor) -> None:
    """inverse[order[i]] = i of two permutations, read on the CPU only."""
    if order.device.type != "cpu":
        return
    found = inverse.index_select(0, order)
    require(
        bool((found == torch.arange(len(order), dtype=found.dtype)).all()),
        "inverse is not the inverse of order: the gradient would go to other tokens",
    )
    if not order.is_inference():
        remember(inverse, _InverseOf(weakref.ref(order), order._version))


def valid_or_zero(x: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
    """(B, H, S, D) with 0 in the masked rows, whatever is in them: the weight 0 times NaN or infinity is NaN."""
    return x if key_mask is None else x.masked_fill(~key_mask[:, None, :, None], 0)


def check_key_mask(key_mask: torch.Tensor | None, batch: int, tokens: int) -> None:
    """A key-padding mask is bool (B, S), True where a token is valid; or None. Reads no values."""
    check_key_mask_type(key_mask)
    if key_mask is None:
        return
    require(
        key_mask.shape == (batch, tokens), f"key_mask must be (B, S) = {(batch, tokens)}, got {tuple(key_mask.shape)}"
    )


def check_key_mask_type(key_mask: torch.Tensor | None) -> None:
    """The part of `check_key_mask` that reads no sizes, for fakes."""
    if key_mask is not None:
        require(
            key_mask.dtype == torch.bool, f"key_mask must be bool, True where a token is valid; got {key_mask.dtype}"
        )
        require(key_mask.dim() == 2, f"key_mask must have 2 dimensions (B, S), got {key_mask.dim()}")


def check_permille_type(permille: torch.Tensor | None) -> None:
    """A density that may change is an int32 tensor without dimensions. Reads no values."""
    if permille is not None:
        require(
            permille.dtype == torch.int32 and permille.dim() == 0,
            f"permille must be int32 without dimensions, got {permille.dtype} with {permille.dim()}",
        )


def check_permille(permille: torch.Tensor | None, most: int) -> None:
    """It lies in 0..most; read on the CPU only (elsewhere that would sync), and clamped everywhere."""
    check_permille_type(permille)
    if permille is not None and permille.device.type == "cpu":
        require(0 <= int(permille) <= most, f"permille must lie in 0..{most}, the density_permille, got {permille}")
