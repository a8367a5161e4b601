"""Checkpoints of a run: directories that exist whole or not at all, and what must be equal to resume.

`checkpoints/step-00000100` holds the branch state as a SALAD file, which `salad_compile.load` reads like any other,
optimizer and moving average in a second safetensors file, and `state.json`. Tensors are whole, whatever sharded them: a
run may resume with another number of processes, or with FSDP2 instead of DDP. Generators have no state (seeds.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from salad_compile.common.files import beside, flush_to_disk, name_failures, remove
from salad_compile.common.schema import fields_of, stamp
from salad_compile.common.tensor_files import digest_of, first_not_finite, open_safetensors
from salad_compile.config import SaladConfig
from salad_compile.definition.branch_tensors import current_name
from salad_compile.errors import (
    CheckpointError,
    ConfigError,
    ExportError,
    ResumeError,
    SaladError,
    TrainingError,
    WriteError,
)
from salad_compile.latents import LatentDataset
from salad_compile.latents.checking import evenly_spaced
from salad_compile.salad_files.contents import describe
from salad_compile.salad_files.location import FILE_NAME
from salad_compile.salad_files.runs import (
    FOLDER,
    STATE_FILE,
    STATE_VERSION,
    SUMMARY_FILE,
    TENSORS_FILE,
    Checkpoint,
    checkpoint_name,
    checkpoint_paths,
    complete_checkpoints,
    is_complete,
)
from salad_compile.salad_files.salad_file import load, save
from salad_compile.training.ema import MovingAverage
from salad_compile.training.records import read_log
from salad_compile.training.settings import MAY_CHANGE, TrainSettings
from salad_compile.training.tensors import fits_shape, optimizer_tensors, restore_optimizer, trained_parameters


@dataclass(frozen=True)
class Fingerprint:
    """Model, conversion and data of a run.

    Attributes:
        base_class, base_digest, config: of the model, as in the header of a SALAD file.
        base_weights: sum of the absolute values of all frozen parameters, in fp64.
        data: a digest of the names and shapes of all items, in their order, not of their values.
        values: a digest of the values of some items, spread over the data: all would take as long as reading them.
    """

    base_class: str
    base_digest: str
    config: dict[str, Any]
    base_weights: float
    data: str
    values: str

    @classmethod
    def of(cls, model: nn.Module, latents: LatentDataset) -> Fingerprint:
        """Of a converted model before it is sharded.

        Raises ConfigError: a frozen parameter holds NaN or infinity, so that every loss would.
        """
        header = describe(model)
        config = json.loads(json.dumps(header.config.to_dict()))
        data, values = digest_of_items(latents), _digest_of_values(latents)
        return cls(header.base_class, header.base_digest, config, _weight_sum(model), data, values)


def digest_of_items(latents: LatentDataset) -> str:
    """Of the names and shapes of all items, in their order."""
    listing = json.dumps([list(latents.names), [list(shape) for shape in latents.shapes]])
    return hashlib.sha256(listing.encode()).hexdigest()


def _digest_of_values(latents: LatentDataset) -> str:
    found = hashlib.sha256()
    for index in evenly_spaced(_SAMPLED, len(latents)):
        item = latents[index]
        found.update(digest_of({"latent": item.latent, "text": item.text, **item.extras}, {}).encode())
    return found.hexdigest()


def _weight_sum(model: nn.Module) -> float:
    trained = {id(parameter) for parameter in trained_parameters(model).values()}
    total = 0.0
    for name, parameter in model.named_parameters():
        if id(parameter) in trained or not parameter.is_floating_point() or parameter.itemsize == 1:
            continue
        of_this = float(parameter.detach().abs().sum(dtype=torch.float64))
        if not math.isfinite(of_this):
            raise ConfigError(
                f"the base model cannot be trained: {name} holds NaN or infinity. Is its checkpoint damaged, or of a "
                "precision that it was not made for?"
            )
        total += of_this
    return total


_SAMPLED = 4  # items
_OF_CONVERSION = "the conversion's"

# --- going on ---------------------------------------------------------------------------------------------------------


def newest_checkpoint(directory: Path, resume: bool) -> Checkpoint | None:
    """The checkpoint that a run in the directory goes on from; None: it begins.

    Raises:
        ResumeError: there is a run, and `resume` is not wanted, or what it has written would be lost.
    """
    try:
        found = complete_checkpoints(directory)
    except CheckpointError as error:
        raise ResumeError(str(error)) from error
    if not resume and (found or read_log(directory)):
        raise ResumeError(f"{directory} holds a run already: resume it (resume=True), or pass another directory.")
    if not found:
        _require_nothing_to_lose(directory)
    return found[-1] if found else None


def _require_nothing_to_lose(directory: Path) -> None:
    """Raises ResumeError where a run that begins again would replace what cannot be made again from its checkpoints."""
    damaged = checkpoint_paths(directory)
    if damaged:
        raise ResumeError(
            f"none of the checkpoints in {damaged[0].parent} is complete, so the run cannot go on. Pass another "
            f"directory, and the branches of {damaged[-1]} to start from if they are whole (--salad). To begin again "
            "here, delete the checkpoints."
        )
    if (directory / SUMMARY_FILE).exists():
        raise ResumeError(
            f"{directory} holds the result of a finished run ({SUMMARY_FILE}), and its checkpoints are gone, so it "
            f"cannot go on; beginning again would replace the result. Pass another directory, with --salad {directory} "
            "to start from that result."
        )


def as_begun(
    config: SaladConfig | Mapping[str, Any] | None, found: Checkpoint | None
) -> SaladConfig | Mapping[str, Any] | None:
    """Fields of a conversion, and for those that are not given what the run began with.

    Defaults change from one version to the next, and a run that the same command resumes must not. A
    :class:`SaladConfig` has all fields: it stays, and :func:`require_same` tells what differs.
    """
    if found is None or config is None or isinstance(config, SaladConfig):
        return config
    return {**fields_of(found.state.fingerprint.config), **config}


def require_same(checkpoint: Checkpoint, settings: TrainSettings, fingerprint: Fingerprint) -> None:
    """Raises ResumeError that names each setting, and each part of model and data, that has changed."""
    state, path = checkpoint.state, checkpoint.path
    # a setting that came later had, until then, what its default does
    before, now = {**TrainSettings().to_dict(), **state.settings}, settings.to_dict()
    changed = [
        f"{name} (was {before.get(name)!r}, is {now.get(name)!r})"
        for name in sorted({*before, *now} - MAY_CHANGE)
        if before.get(name) != now.get(name)
    ]
    changed += _differences(fields_of(state.fingerprint), dataclasses.asdict(fingerprint))
    if changed:
        converts = any(each.startswith(_OF_CONVERSION) for each in changed)
        its_own = f"Its own conversion is in {path}: load that into the base model (on the command line: --salad). "
        raise ResumeError(
            f"the run in {path.parent.parent} cannot be resumed, because these have changed: {'; '.join(changed)}. "
            f"{its_own if converts else ''}Pass what the run began with, or another directory."
        )
    if checkpoint.step > settings.steps:
        raise ResumeError(f"{path} is beyond steps={settings.steps}: pass more steps, or another directory.")


def _differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for name in ("base_class", "base_digest"):
        if before[name] != now[name]:
            yield f"the model's {name} (was {before[name][:40]}, is {now[name][:40]})"
    try:
        old = SaladConfig.from_dict(before["config"])
    except ConfigError as error:  # as of a pattern that is not registered in this process
        yield f"{_OF_CONVERSION} settings, which cannot be read here ({error})"
        return
    new = SaladConfig.from_dict(now["config"])
    for name in old.different(new):
        yield f"{_OF_CONVERSION} {name} (was {getattr(old, name)!r}, is {getattr(new, name)!r})"
    # another device may sum in another order
    if not math.isclose(before["base_weights"], now["base_weights"], rel_tol=1e-9):
        yield "the model's base_weights: its frozen parameters have other values"
    if before["data"] != now["data"]:
        yield "data: the latents have other names, shapes or another order"
    elif before["values"] not in (None, now["values"]):
        yield "data: latents or texts of the same names have other values, as when clips were encoded anew"


# --- writing ---------------------------------------------------------------------------------------------------------


@dataclass
class CheckpointWriter:
    """Writes the checkpoints of one run.

    Args:
        directory: of the run. model: without wrappers, sharded or not. optimizer: torch's own.
        main: whether this process writes; all must call :meth:`write`, which gathers what is sharded.
    """

    directory: Path
    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: MovingAverage | None
    settings: TrainSettings
    fingerprint: Fingerprint
    main: bool

    @property
    def folder(self) -> Path:
        return self.directory / FOLDER

    def write(self, step: int) -> Path:
        """Write the checkpoint after `step` steps, and remove all but the last few.

        Raises:
            TrainingError: it cannot be written (a full disk, say), or holds values that no run can go on from. Earlier
                checkpoints are as they were.
        """
        target = self.folder / checkpoint_name(step)
        temporary = beside(target)
        try:
            if self.main:
                temporary.mkdir(parents=True)
            save(self.model, temporary / FILE_NAME)
            tensors = self._tensors()
            if (bad := first_not_finite(tensors)) is not None:
                raise ExportError(f"{bad} holds NaN or infinity.")
            if self.main:
                self._write_rest(temporary, step, tensors)
                _remove(target)  # a damaged one, which was skipped
                temporary.replace(target)
                flush_to_disk(target.parent)
        except ExportError as error:
            raise TrainingError(
                f"there is no checkpoint of step {step}: {error} Earlier checkpoints are as they were: start from one "
                f"with a lower learning rate, in another directory (on the command line --salad {target.parent}/...)."
            ) from error
        except OSError as error:
            raise TrainingError(
                f"the checkpoint of step {step} could not be written to {target}: {error}. Earlier checkpoints are as "
                "they were: make room or give another directory, and run the same command again."
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        if self.main:
            self._remove_old()
        return target

    def _tensors(self) -> dict[str, Tensor]:
        tensors = optimizer_tensors(self.optimizer, trained_parameters(self.model))
        if self.average is not None:
            tensors |= {f"average/{name}": tensor for name, tensor in self.average.tensors().items()}
        return tensors

    def _write_rest(self, folder: Path, step: int, tensors: dict[str, Tensor]) -> None:
        from safetensors.torch import save_file

        with name_failures(folder / TENSORS_FILE):
            save_file(tensors, folder / TENSORS_FILE)
        flush_to_disk(folder / TENSORS_FILE)
        state = {
            "version": STATE_VERSION,
            "step": step,
            "settings": self.settings.to_dict(),
            "fingerprint": dataclasses.asdict(self.fingerprint),
            "files": {name: (folder / name).stat().st_size for name in (FILE_NAME, TENSORS_FILE)},
            "digests": {TENSORS_FILE: digest_of(tensors, {})},
        }
        with (folder / STATE_FILE).open("w") as file:
            json.dump(stamp(state), file, indent=1)
        flush_to_disk(folder / STATE_FILE)
        flush_to_disk(folder)

    def require_room(self) -> None:
        """Raises WriteError: the disk has no room for one more checkpoint. Two moments, and an average, in fp32."""
        copies = 4 + 8 + (4 if self.average is not None else 0)
        needed = copies * sum(p.numel() for p in trained_parameters(self.model).values())
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            failure = WriteError(
                f"{self.directory} has room for {free / 2**20:,.0f} MiB, and a checkpoint takes {needed / 2**20:,.0f} "
                "MiB: make room, or name another directory."
            )
            failure.errno = errno.ENOSPC
            raise failure

    def _remove_old(self) -> None:
        """Remove what is older than the last few complete ones; a damaged one takes no place of theirs."""
        there = checkpoint_paths(self.directory)
        kept = [path for path in there if is_complete(path)][-self.settings.keep_last :]
        for path in there[: there.index(kept[0])]:
            _remove(path)

    def remove_leftovers(self) -> None:
        """Delete what a killed run had not finished writing or removing."""
        for path in self.folder.glob(".step-*"):
            remove(path)

    def read(self, checkpoint: Checkpoint) -> None:
        """Load branches, optimizer and moving average.

        Raises:
            ResumeError: a file is damaged.
        """
        try:
            tensors = self._read_tensors(checkpoint)
            load(self.model, checkpoint.path / FILE_NAME)
        except (SaladError, ValueError, OSError) as error:
            raise ResumeError(f"{checkpoint.path} cannot be used: {error}") from error
        averages = {
            name: tensors.pop(f"average/{name}") for name in self._average_names() if f"average/{name}" in tensors
        }
        restore_optimizer(self.optimizer, trained_parameters(self.model), tensors)
        if self.average is not None:
            self.average.restore(averages)

    def _read_tensors(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """Optimizer and moving average. Raises ValueError: names, shapes or values are not those of this run."""
        with open_safetensors(checkpoint.path / TENSORS_FILE) as content:
            stored = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (it is no dictionary)
        stated = (checkpoint.state.digests or {}).get(TENSORS_FILE)
        if stated is not None and stated != digest_of(stored, {}):
            raise ValueError(f"{TENSORS_FILE} does not hold what was written (the digest differs)")
        bad = first_not_finite(stored)
        if bad is not None:
            raise ValueError(f"{bad} in {TENSORS_FILE} holds NaN or infinity")
        tensors = {current_name(name): tensor for name, tensor in stored.items()}
        parameters = trained_parameters(self.model)
        for joined, tensor in tensors.items():
            kind, _, name = joined.partition("/")
            if name not in parameters or not tensor.is_floating_point():
                raise ValueError(f"{TENSORS_FILE} has {joined!r} of {tensor.dtype}, which this model has not")
            if not fits_shape(kind, tensor, parameters[name]):
                raise ValueError(f"{joined} has shape {tuple(tensor.shape)}, it needs {tuple(parameters[name].shape)}")
        missing = [name for name in self._average_names() if f"average/{name}" not in tensors]
        if missing:
            raise ValueError(f"{TENSORS_FILE} lacks average/{missing[0]}")
        return tensors

    def _average_names(self) -> list[str]:
        return [] if self.average is None else list(self.average.averages)


def _remove(path: Path) -> None:
    """Remove a directory if it exists: it is renamed first, so that a half-removed one is not taken for complete."""
    leaving = beside(path, "removed")
    with contextlib.suppress(FileNotFoundError):
        path.replace(leaving)
    remove(leaving)
