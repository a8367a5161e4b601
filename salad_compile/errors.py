"""One class per mistake a user can make; each message says what was seen and how to mend it.

Every class derives from :class:`SaladError`. Errors are raised before anything is changed: a model is never left half
converted and a file is never left half written.

What `torch.compile(backend="salad")` refuses arrives as the class below, too. It is torch's
`torch._dynamo.exc.BackendCompilerFailed` besides, for those who catch that.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SaladError(Exception):
    """Base of everything that this package raises on purpose."""


class ConfigError(SaladError, ValueError):
    """An unknown option, a value out of range, or options that contradict each other."""


class InputsError(SaladError, ValueError):
    """Example inputs are missing, cannot be synthesised, or do not fit the model's forward."""


class ProbeError(SaladError, RuntimeError):
    """The discovery forward failed inside the model; the cause is chained."""


class AdapterError(SaladError, ValueError):
    """An attention adapter does not fit the calls that it was registered for."""


class NoAttentionError(SaladError, ValueError):
    """The model called no attention function that this package knows."""


class NoEligibleSiteError(SaladError, ValueError):
    """The model has attention, but no call that can be converted; the message lists each call with its reason."""


class SiteFilterError(SaladError, ValueError):
    """A pattern of `sites=` matches no attention call of the model."""


class PatternError(SaladError, ValueError):
    """A site's sparse pattern needs what the site does not have: a token grid, no mask, room for its window."""


class AlreadyConvertedError(SaladError, ValueError):
    """The model was converted before, with another configuration."""


class WrappedModelError(SaladError, ValueError):
    """The model is wrapped (torch.compile, DDP, ...); conversion comes before wrapping."""


class NotConvertedError(SaladError, ValueError):
    """A converted model is needed here, and this one has no SALAD branch."""


class UnknownProjectionError(SaladError, ValueError):
    """A LoRA target or a saved site names a projection that the model does not have."""


class SiteLostError(SaladError, RuntimeError):
    """A converted site did not run as SALAD: its attention call, its projection or its tag is gone."""


class PositionReplayError(SaladError, ValueError):
    """rope_placement="map-then-rotate" asks for a position encoding that cannot be told from the rest of a forward."""


class GridMismatchError(SaladError, ValueError):
    """The grid does not match the tokens, or cannot be read from this call's arguments."""


class DifferentiationError(SaladError, NotImplementedError):
    """A converted site runs under forward-mode differentiation, which SALAD attention does not have."""


class WrongBackendError(SaladError, RuntimeError):
    """A converted model was compiled with another backend than `salad`."""


class MergeError(SaladError, ValueError):
    """LoRA cannot be merged into this base: quantised, wrapped or already merged projections."""


class MissingPackageError(SaladError, ImportError):
    """Something that is not needed otherwise, and not installed, is needed for this."""


class CheckpointError(SaladError, ValueError):
    """Base of everything that can be wrong with a SALAD file."""


class NotASaladFileError(CheckpointError):
    """The file is readable, but it is no SALAD file (a LoRA or a base checkpoint, perhaps)."""


class CorruptFileError(CheckpointError):
    """The file is truncated or not a safetensors file."""


class FormatVersionError(CheckpointError):
    """The file was written in a format version that this release does not read."""


class BaseModelMismatchError(CheckpointError):
    """The file belongs to another base model."""


class MissingKeysError(CheckpointError):
    """The file lacks tensors that the model's sites need."""


class UnexpectedKeysError(CheckpointError):
    """The file holds tensors for which the model has no place."""


class ShapeMismatchError(CheckpointError):
    """A tensor of the file has another shape than its parameter."""


class DtypeMismatchError(CheckpointError):
    """A tensor of the file is of another kind than its parameter: integers, or a storage format of 8 bits."""


class WriteError(SaladError, OSError):
    """A file or directory could not be written; `errno` says why, and what was there before is as it was."""


class ExportError(SaladError, ValueError):
    """A format was asked for that cannot be written of this model."""


class HubError(SaladError, OSError):
    """A transfer from or to the Hugging Face Hub was refused or broke off."""


class ModelSourceError(SaladError, ValueError):
    """What was given as a model names none, or lacks what building it takes: class, configuration or weights."""


class LatentLayoutError(SaladError, ValueError):
    """A path holds no precomputed latents in a layout that is known, or its index cannot be used."""


class LatentItemError(SaladError, ValueError):
    """Items of precomputed data are damaged or do not fit the others; the message names them."""


class TrainingError(SaladError, RuntimeError):
    """A training run cannot go on: a loss that is not finite, a checkpoint that cannot be written, a failed process."""


class ResumeError(SaladError, ValueError):
    """A training run cannot go on from what its directory holds: other settings, another model or other data."""


def require_conversion(converted: bool, subject: str, mend: str = "call salad_compile.convert(model) first.") -> None:
    """Raises NotConvertedError("<subject> is not converted: <mend>") unless `converted`."""
    if not converted:
        raise NotConvertedError(f"{subject} is not converted: {mend}")


def nearest(name: str, valid: Iterable[str]) -> str:
    """The valid name that is spelled most like `name`, or the empty string when none is near."""
    return next(iter(difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)), "")


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the nearest valid name, or the empty string when nothing is near."""
    near = nearest(name, valid)
    return f" Did you mean {near!r}?" if near else ""
