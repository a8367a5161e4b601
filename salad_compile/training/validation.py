"""The flow-matching loss on held-out latents, with the same noise and noise levels every time."""

from __future__ import annotations

from collections.abc import Callable

import torch

from salad_compile.common.progress import Tell, untold
from salad_compile.common.sharding import reshard
from salad_compile.latents import LatentDataset
from salad_compile.sites.branch import branches
from salad_compile.training.ahead import HOST, ahead
from salad_compile.training.engine import Engine
from salad_compile.training.families import Family
from salad_compile.training.flow_matching import losses
from salad_compile.training.preparation import DTYPES
from salad_compile.training.reference_states import as_base, as_untrained


@torch.no_grad()
def validation_loss(engine: Engine, latents: LatentDataset, family: Family, tell: Tell = untold) -> float:
    """The mean over all items and noise levels; every process must call it, and each takes its share.

    Sparsity is what it is at this moment. Processes make equally many forwards, as FSDP2 needs: those with less to do
    repeat the last one, which counts once. tell: after each forward of this process.
    """
    accelerator, settings = engine.accelerator, engine.settings
    device, dtype = accelerator.device, DTYPES[settings.precision]
    world, rank = accelerator.num_processes, accelerator.process_index
    work = [(index, point) for index in range(len(latents)) for point in range(settings.validation_points)]
    rounds = -(-len(work) // world)
    mine = (work[min(rank * rounds + number, len(work) - 1)] for number in range(rounds))
    drawn = (family.validation_sample(latents[index], index, point).to(HOST, dtype) for index, point in mine)
    own = []
    engine.bare.eval()
    with ahead(drawn, device) as samples:
        for sample in samples:
            batch = sample.to(device, dtype)
            own.append(losses(family.predict(engine.wrapped, batch), batch.target, batch.given))
            tell(len(own), rounds)
    reshard(engine.bare)  # no backward pass will
    engine.bare.train()
    everywhere = accelerator.gather(torch.cat(own)).cpu()[: len(work)]
    return float(everywhere.double().mean())


def first_losses(
    engine: Engine,
    latents: LatentDataset,
    family: Family,
    *,
    now: bool,
    telling: Callable[[str], Tell] = lambda what: untold,
) -> dict[str, float]:
    """What later losses are compared with, as a line of the log has it: the floor, the ceiling and the start.

    Args:
        now: the loss of the branches as they are is measured too. telling: makes `tell` of what is measured.
    """
    found = {}
    with as_base(branches(engine.bare).values()):
        found["dense_validation_loss"] = validation_loss(engine, latents, family, telling("validation, dense"))
    with as_untrained(engine.bare):
        tell = telling("validation, untrained")
        found["untrained_validation_loss"] = validation_loss(engine, latents, family, tell)
    if now:
        found["validation_loss"] = validation_loss(engine, latents, family, telling("validation"))
    return found
