"""Recipe: a training loop of plain PyTorch."""

from __future__ import annotations

from pathlib import Path

import torch

import salad_compile
from tests.trainers.tiny import CONFIG, INPUTS, base, batch, flow_matching_loss, output


def test_plain_pytorch(tmp_path: Path) -> None:
    model = salad_compile.convert(base(), CONFIG, example_inputs=dict(INPUTS)).train()
    model.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = flow_matching_loss(model, **batch())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    salad_compile.save(model, tmp_path / "salad.safetensors")

    # the same batch in every step: the loss has to fall
    assert losses[-1] < 0.8 * losses[0]
    # nothing of the base has moved
    state, before = model.state_dict(), base().state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    # the file holds all that was trained
    loaded = salad_compile.load(base(), tmp_path / "salad.safetensors")
    assert torch.equal(output(loaded), output(model.eval()))
