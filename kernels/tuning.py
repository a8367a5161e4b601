"""Choosing launch settings: the shipped default, or what was measured to be fastest on this GPU, kept on disk."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import secrets
import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from .launch import interpreting, recording

logger = logging.getLogger("salad_compile.kernels.tuning")

T = TypeVar("T", bound=Hashable)

_FORMAT = 1  # of the file; others are ignored
_LEFT_SECONDS = 3600  # writing takes milliseconds
# What `choose` looks at first: (operator, key, device) -> the fastest candidate, or None where nothing was measured.
_known: dict[tuple[object, ...], Any] = {}
# What this process measured, as in the file: entry name -> the fields of the fastest candidate.
_measured: dict[str, dict[str, object]] = {}
_wanted = os.environ.get("SALAD_AUTOTUNE", "0").lower() in ("1", "true", "on", "yes")


def choose(
    operator: str,
    key: tuple[object, ...],
    candidates: Sequence[T],
    run: Callable[[T], object],
    device: torch.device,
) -> T:
    """The launch settings to use.

    Args:
        operator: the name of the kernel.
        key: what the fastest candidate depends on: dtype, head_dim, block sizes. Values need a `repr` that is the same
            in every process. The same operator and key must always have the same candidates.
        candidates: frozen dataclasses whose fields are JSON values, at least one; the first is the shipped default.
        run: launches the kernel with a candidate, on the tensors at hand. Called often while tuning.
        device: of the tensors.

    Returns:
        the fastest candidate where one is known or can be measured, else the default.
    """
    if recording():
        # the gate compiles all that may ever be launched
        for candidate in candidates:
            run(candidate)
        return candidates[0]
    name = (operator, key, device)
    try:
        winner: T | None = _known[name]
    except KeyError:
        winner = _known[name] = _stored(operator, key, candidates, device)
    if winner is None and _wanted and _may_measure(device):
        winner = _known[name] = _measure(operator, key, candidates, run, device)
    return candidates[0] if winner is None else winner


def forget() -> None:
    """Forget what is known in memory. The next `choose` reads the file again."""
    _known.clear()
    _measured.clear()
    _stored_entries.cache_clear()


def cache_file() -> Path:
    """Where winners are kept: tuning.json in $SALAD_CACHE_DIR, else in salad_compile of $XDG_CACHE_HOME or ~/.cache."""
    folder = os.environ.get("SALAD_CACHE_DIR")
    if folder:
        return Path(folder) / "tuning.json"
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "salad_compile" / "tuning.json"


# --- measuring ------------------------------------------------------------------------------------------------------


def _may_measure(device: torch.device) -> bool:
    # A captured launch does not run, and timing needs to wait for the device, which ends a capture with an error.
    return device.type == "cuda" and not interpreting() and not torch.cuda.is_current_stream_capturing()


def _measure(
    operator: str, key: tuple[object, ...], candidates: Sequence[T], run: Callable[[T], object], device: torch.device
) -> T:
    """Time every candidate, remember the fastest and write it down. The default where none runs: it will say why."""
    times = {candidate: _median_ms(functools.partial(run, candidate), operator, device) for candidate in candidates}
    winner = min(times, key=times.__getitem__)  # the first one when all are infinite
    if times[winner] == float("inf"):
        logger.warning("%s %s on %s: no launch settings could be timed", operator, key, device)
        return winner
    logger.info("%s %s on %s: %s takes %.3f ms", operator, key, device, winner, times[winner])
    _measured[_entry_name(operator, key, device)] = _fields(winner)
    _write()
    return winner


def _median_ms(launch: Callable[[], object], operator: str, device: torch.device) -> float:
    """Median time of a launch in milliseconds; infinite if it fails, for example for lack of shared memory."""
    from triton.testing import do_bench

    try:
        with torch.cuda.device(device):
            return float(do_bench(launch, return_mode="median"))
    except Exception as error:
        logger.debug("%s: a candidate was left out: %s: %s", operator, type(error).__name__, error)
        return float("inf")


# --- the file -------------------------------------------------------------------------------------------------------


def _stored(operator: str, key: tuple[object, ...], candidates: Sequence[T], device: torch.device) -> T | None:
    """What the file says, if it is one of the candidates: they may have changed since."""
    if device.type != "cuda" or interpreting():
        return None
    fields = _stored_entries().get(_entry_name(operator, key, device))
    return next((candidate for candidate in candidates if _fields(candidate) == fields), None)


@functools.lru_cache(maxsize=1)
def _stored_entries() -> dict[str, dict[str, object]]:
    """The entries of the file, read once per process."""
    return _read(cache_file())


def _read(path: Path) -> dict[str, dict[str, object]]:
    """The entries of a file; none, with a warning, if it cannot be understood."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"ignoring the tuned launch settings in {path}: {error}", stacklevel=2)
        return {}
    entries = content.get("entries") if isinstance(content, dict) and content.get("format") == _FORMAT else None
    if not isinstance(entries, dict) or not all(isinstance(fields, dict) for fields in entries.values()):
        warnings.warn(f"ignoring {path}: these are no launch settings of this version", stacklevel=2)
        return {}
    return entries


def _write() -> None:
    """Add what this process measured to the file, keeping what others wrote. A reader sees the old file or the new one.

    Of two processes that write at the same moment one may lose; its next write brings all of its entries again.
    """
    path = cache_file()
    content = {"format": _FORMAT, "entries": dict(sorted((_read(path) | _measured).items()))}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"tuning-{secrets.token_hex(8)}.tmp")
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
        os.replace(temporary, path)
        for left in path.parent.glob("tuning-*.tmp"):  # of processes that were killed while they wrote
            if time.time() - left.stat().st_mtime > _LEFT_SECONDS:
                left.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"tuned launch settings are not kept: {error}", stacklevel=2)


def _entry_name(operator: str, key: tuple[object, ...], device: torch.device) -> str:
    import triton

    return f"{operator} {key!r} on {torch.cuda.get_device_name(device)}, Triton {triton.__version__}"


def _fields(candidate: Any) -> dict[str, object]:
    return dataclasses.asdict(candidate)
