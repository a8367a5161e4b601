"""Recipe: accelerate with DistributedDataParallel, two processes. Same gradients, weights and file as one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import salad_compile
from tests.support import relative_error
from tests.trainers.processes import WORLD, in_two_processes
from tests.trainers.tiny import batch, branch_gradients, converted, flow_matching_loss


class Videos(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Two videos."""

    def __len__(self) -> int:
        return WORLD

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: tensor[index] for name, tensor in batch(WORLD).items()}


def worker(rank: int, folder: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = converted().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loader = DataLoader(Videos(), batch_size=1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    assert type(model).__name__ == "DistributedDataParallel"
    for item in loader:
        accelerator.backward(flow_matching_loss(model, **item))
        torch.save(branch_gradients(model), folder / f"gradients{rank}.pt")
        optimizer.step()
        optimizer.zero_grad()
    salad_compile.save(model, folder / "ddp.safetensors")  # every process calls it, the first writes


def alone() -> tuple[Any, dict[str, torch.Tensor]]:
    """The same step in one process, without accelerate: the model, and the gradients of the step."""
    model = converted().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    flow_matching_loss(model, **batch(WORLD)).backward()
    optimizer.step()
    return model, branch_gradients(model)


def test_accelerate_and_ddp_equal_one_process(tmp_path: Path) -> None:
    in_two_processes(worker, tmp_path)
    model, expected = alone()
    for rank in range(WORLD):
        gradients = torch.load(tmp_path / f"gradients{rank}.pt")
        assert gradients.keys() == expected.keys()
        # sums in another order
        assert all(relative_error(gradients[name], expected[name]) < 1e-4 for name in expected)
    saved = load_file(tmp_path / "ddp.safetensors")
    whole = load_file(salad_compile.save(model, tmp_path / "alone.safetensors"))
    assert saved.keys() == whole.keys()
    assert all(torch.allclose(saved[name], whole[name], atol=1e-4) for name in whole)  # a step moves them by 1e-2
