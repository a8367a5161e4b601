"""Private names of torch that this room stands on: these tests fail when they move."""

from __future__ import annotations

import torch
import torch._dynamo
import torch.nn as nn
from torch import Tensor

from salad_compile.grid.video_grid import backward_pass, is_allowed_in_graph


def test_a_backward_pass_has_a_number_and_runs_callbacks_at_its_end() -> None:
    seen: list[object] = []
    x = torch.ones(3, requires_grad=True)
    first, second = x * 2, x * 3

    def note(gradients: tuple[Tensor, ...]) -> None:
        seen.append(backward_pass())
        torch.autograd.Variable._execution_engine.queue_callback(lambda: seen.append("end"))

    for value in (first, second):
        assert value.grad_fn is not None
        value.grad_fn.register_prehook(note)
    assert backward_pass() is None
    (first + second).sum().backward()
    assert backward_pass() is None
    numbers, ends = seen[:2], seen[2:]
    assert isinstance(numbers[0], int)
    assert numbers[0] == numbers[1]
    assert ends == ["end", "end"]


def test_dynamo_tells_which_classes_are_allowed_in_graphs() -> None:
    class Allowed(nn.Module):
        pass

    assert not is_allowed_in_graph(Allowed)
    torch._dynamo.allow_in_graph(Allowed)
    assert is_allowed_in_graph(Allowed)
