"""The feature maps of linear attention and their derivatives, by name (specification 5)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..errors import KernelArgumentError

Map = Callable[[torch.Tensor], torch.Tensor]
# (gradient of the features, features, input) -> gradient of the input
MapBackward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _relu_backward(grad: torch.Tensor, features: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return grad * (x > 0)  # derivative 0 at 0, as specification 5 fixes it


def _elu_backward(grad: torch.Tensor, features: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return grad * features.clamp(max=1)  # exp(x) = features below 0, and 1 from there on


def _softmax_backward(grad: torch.Tensor, features: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return features * (grad - (grad * features).sum(-1, keepdim=True))


FEATURE_MAPS: dict[str, tuple[Map, MapBackward]] = {
    "relu": (F.relu, _relu_backward),
    "elu": (lambda x: F.elu(x) + 1, _elu_backward),
    "softmax": (lambda x: torch.softmax(x, dim=-1), _softmax_backward),
}


def find_feature_map(name: str) -> tuple[Map, MapBackward]:
    """The map called `name` and its derivative.

    Raises:
        KernelArgumentError: if there is no such map; the message lists those there are.
    """
    if name not in FEATURE_MAPS:
        raise KernelArgumentError(f"unknown feature_map {name!r}; choose one of {sorted(FEATURE_MAPS)}")
    return FEATURE_MAPS[name]
