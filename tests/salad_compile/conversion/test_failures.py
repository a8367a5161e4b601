"""Whatever fails, and wherever: after plan, convert, load or merge_lora that raised, the model is what it was."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import salad_compile
from tests import support
from tests.models.registry import ALL_CASES
from tests.models.zoo import Case
from tests.support import TINY, randomise_branches

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


class FailingCall(TorchFunctionMode):
    """The call of torch with this number is interrupted, which nothing may take for an answer; -1: none."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.count = number, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled:  # on the way out nothing is left to do
            return func(*args, **(kwargs or {}))
        self.count += 1
        if self.count - 1 == self.number:
            raise KeyboardInterrupt(f"{func}")
        return func(*args, **(kwargs or {}))


def state(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that could have changed."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[f"{name}: class"] = (type(module), id(module))
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers", "_modules") or isinstance(value, dict):
                found[f"{name}.{key}"] = {entry: id(held) for entry, held in value.items()}
            else:
                found[f"{name}.{key}"] = value if isinstance(value, (bool, int, float, str)) else id(value)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[f"{name}: kind"] = (tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr(), tensor.requires_grad)
        found[f"{name}: gradient"] = tensor.grad
        found[f"{name}: bits"] = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return found


def plan(model: nn.Module, case: Case, folder: Path) -> None:
    salad_compile.plan(model, dict(case.inputs(0)), config=TINY, grid=case.grid)


def convert(model: nn.Module, case: Case, folder: Path) -> None:
    salad_compile.convert(model, TINY, example_inputs=dict(case.inputs(0)), grid=case.grid)


def load(model: nn.Module, case: Case, folder: Path) -> None:
    salad_compile.load(model, folder / "salad.safetensors", grid=case.grid)


def merge_lora(model: nn.Module, case: Case, folder: Path) -> None:
    salad_compile.merge_lora(model)


OPERATIONS: dict[str, tuple[Callable[..., None], bool]] = {
    "plan": (plan, False),
    "convert": (convert, False),
    "load": (load, False),
    "load into a converted one": (load, True),
    "merge_lora": (merge_lora, True),
}


@pytest.mark.parametrize(
    ("operation", "name", "times"),
    [
        ("plan", "handwritten_fused", 2),
        ("convert", "handwritten_fused", 4),
        *((operation, "Wan", 6) for operation in ("load", "load into a converted one", "merge_lora")),
        *(pytest.param(operation, "HunyuanVideo", 40, marks=pytest.mark.all_cases) for operation in OPERATIONS),
    ],
)
def test_a_failure_anywhere_changes_nothing(tmp_path: Path, operation: str, name: str, times: int) -> None:
    case = ALL_CASES[name]
    call, of_converted = OPERATIONS[operation]
    saved = support.converted(case)
    salad_compile.save(saved, tmp_path / "salad.safetensors")

    def fresh() -> nn.Module:
        if not of_converted:
            return case.build()
        model = support.converted(case)
        randomise_branches(model, seed=5)
        return model

    model = fresh()
    with FailingCall(-1) as counter:
        call(model, case, tmp_path)
    draw = random.Random(f"{name} {operation}")
    failed = 0
    late = range(max(0, counter.count - 200), counter.count)  # where most writes are
    numbers = [draw.choice(late if at % 2 else range(counter.count)) for at in range(times)]
    for number in [counter.count - 1, *numbers]:
        model = fresh()
        before = state(model)
        caught = None
        try:
            with FailingCall(number):
                call(model, case, tmp_path)
        except KeyboardInterrupt as error:
            caught = str(error)
        if caught is None:
            continue
        failed += 1
        after = state(model)
        changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
        assert not changed, f"call {number} of {counter.count} was interrupted ({caught}): {changed[:5]}"
    assert failed > times // 2
