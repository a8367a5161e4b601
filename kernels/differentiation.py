"""What the operators are not made for: forward-mode and double differentiation, which are refused, and selections."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad

from .errors import KernelDifferentiationError

Operator = TypeVar("Operator", bound=Callable[..., Any])


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation runs: torch.func.jvp, jacfwd, hessian, or a dual level.

    `_current_level` is private. Seen in torch 2.11 and 2.13; tests/kernels/test_differentiation.py fails when it moves.
    """
    return forward_ad._current_level >= 0


def reverse_mode_only(function: Operator) -> Operator:
    """For implementations of operators with gradients: torch would drop the tangents of their arguments, silently."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if in_forward_mode():
            raise KernelDifferentiationError(
                f"salad::{function.__name__} has no forward-mode derivative (torch.func.jvp, jacfwd, dual tensors): "
                "tangents would be zero. Use reverse mode (backward, torch.autograd.grad), or compute dense for it."
            )
        return function(*args, **kwargs)

    return run  # type: ignore[return-value]


def refuse_second_derivative(operator: Any) -> None:
    """Let a second backward pass through a backward operator be an error of ours."""
    name = operator._qualname  # of torch.library.custom_op

    def backward(ctx: Any, *grads: torch.Tensor) -> None:
        raise KernelDifferentiationError(
            f"{name} has no derivative of its own: gradients of gradients (create_graph=True, hessians, gradient "
            "penalties) cannot be computed through SALAD attention. Compute dense for it."
        )

    operator.register_autograd(backward)


def without_gradient(operator: Any) -> None:
    """Let the results of an operator never require a gradient."""

    def setup(ctx: Any, inputs: tuple[object, ...], output: Any) -> None:
        ctx.nothing = (None,) * len(inputs)
        ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))

    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, ...]:
        nothing: tuple[None, ...] = ctx.nothing
        return nothing

    operator.register_autograd(backward, setup_context=setup)
