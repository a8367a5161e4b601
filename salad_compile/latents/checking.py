"""Checks of values: damaged items, and latents that were not normalised, or twice, or by other statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from salad_compile.common.progress import ProgressBar
from salad_compile.errors import ConfigError, LatentItemError
from salad_compile.latents.dataset import StoredLatents
from salad_compile.latents.source import Problem
from salad_compile.latents.statistics import KNOWN_STATISTICS, WAN_2_1, LatentStatistics

# How far per-channel statistics may be from mean 0 and std 1, in the root mean square over channels of (mean, log std):
# log 2 is a standard deviation that is off by a factor of 2 in every channel. With the statistics of the Wan 2.1 VAE,
# latents that were never normalised are at 1.02 and latents that were normalised twice at 0.86
# (tests/salad_compile/latents/test_checking.py). The choice is ours: a few clips are not the whole training set, so the
# threshold leaves room for clips that are darker, calmer or busier than most.
THRESHOLD = math.log(2)


@dataclass(frozen=True)
class Measured:
    """Statistics of the latents as they come out of a dataset, per channel, over all elements of some items."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    items: int


@dataclass
class Checked:
    """Outcome of reading items one after the other."""

    measured: Measured | None
    problems: list[Problem]


def evenly_spaced(number: int, among: int) -> list[int]:
    """At most `number` indices, spread over the dataset."""
    number = min(number, among)
    return sorted({position * among // number for position in range(number)}) if number else []


def check(latents: StoredLatents, indices: Sequence[int] | None = None, *, progress: bool = False) -> Checked:
    """Read items, all of them unless `indices` says which; damaged ones are listed, the others measured.

    A constant channel has a standard deviation of 0, which :func:`doubt` reports as infinitely far.
    """
    chosen = range(len(latents)) if indices is None else indices
    problems: list[Problem] = []
    moments: list[Tensor] = []  # one (3, C) per item: count, sum, sum of squares
    with ProgressBar("latents", len(chosen), shown=progress) as bar:
        for index in chosen:
            bar.advance()
            try:
                latent = latents.read(index).latent.double().flatten(1)
            except LatentItemError as error:
                problems.append(Problem(latents.names[index], str(error).removeprefix(f"{latents.names[index]}: ")))
                continue
            count = torch.full((len(latent),), latent.shape[1], dtype=torch.float64)
            moments.append(torch.stack([count, latent.sum(dim=1), latent.square().sum(dim=1)]))
    return Checked(_measure(moments), problems)


def _measure(moments: list[Tensor]) -> Measured | None:
    if not moments:
        return None
    count, first, second = torch.stack(moments).sum(dim=0)
    mean = first / count
    std = (second / count - mean.square()).clamp(min=0).sqrt()
    return Measured(tuple(mean.tolist()), tuple(std.tolist()), len(moments))


def doubt_reading(measured: Measured, latents: StoredLatents) -> str | None:
    """Why latents that come out of a dataset do not look as they should, and what to do, or None."""
    if latents.guesses_statistics and latents.statistics is not None and not latents.normalized:
        question = doubt_guess(measured, latents.statistics)
        if question:
            return question
    return doubt(measured, latents.statistics, stored_normalized=latents.normalized)


def doubt(measured: Measured, statistics: LatentStatistics | None, *, stored_normalized: bool) -> str | None:
    """Why these latents do not look normalised once, and what to do, or None.

    Args:
        statistics: of the VAE, to tell the mistakes apart; None: those of the Wan 2.1 VAE if there are 16 channels.
        stored_normalized: the files were taken to hold normalised latents, so that reading did not normalise them.
    """
    if statistics is None and len(measured.mean) == WAN_2_1.channels:
        statistics = WAN_2_1
    zero, one = (0.0,) * len(measured.mean), (1.0,) * len(measured.mean)
    here = _distance(measured, zero, one)
    never, twice = math.inf, math.inf
    if statistics is not None:
        never = _distance(measured, statistics.mean, statistics.std)
        pairs = zip(statistics.mean, statistics.std, strict=True)
        twice = _distance(measured, tuple(-mean / std for mean, std in pairs), tuple(1 / std for std in statistics.std))
    numbers = f"over {measured.items} items they are {here:.2f} from mean 0 and std 1 (limit {THRESHOLD:.2f})"
    if never < here and never <= min(twice, THRESHOLD):
        cure = "pass normalized=False" if stored_normalized else "the VAE's statistics do not fit"
        return f"the latents look as if they were not normalised ({cure}): {numbers}"
    if twice < here and twice <= THRESHOLD:
        cure = "what wrote them?" if stored_normalized else "pass normalized=True"
        return f"the latents look as if they were normalised twice ({cure}): {numbers}"
    if here > THRESHOLD:
        return f"the latents do not look normalised with the statistics of their VAE: {numbers}"
    return None


def doubt_guess(measured: Measured, guess: LatentStatistics) -> str | None:
    """Why these latents look like those of another VAE than the one whose statistics were guessed, or None."""
    other = _nearer(measured, guess)
    if other is None:
        return None
    name, far, here = other
    return (
        f"nothing says which VAE the latents are of, and over {measured.items} items they are nearer to {name} "
        f"({far:.2f}) than to {guess} ({here:.2f}), with which they are normalised: say which, --statistics {name} or "
        "statistics="
    )


def _nearer(measured: Measured, used: LatentStatistics) -> tuple[str, float, float] | None:
    """The known VAE to which latents are far nearer than to the one that normalised them; how far they are of each."""
    raw = Measured(
        tuple(m * s + n for m, n, s in zip(measured.mean, used.mean, used.std, strict=True)),
        tuple(m * s for m, s in zip(measured.std, used.std, strict=True)),
        measured.items,
    )
    far = {
        name: _distance(raw, each.mean, each.std)
        for name, each in KNOWN_STATISTICS.items()
        if each.channels == used.channels
    }
    here = _distance(raw, used.mean, used.std)
    nearest = min(far, key=far.__getitem__, default=None)
    if nearest is None or far[nearest] >= here / 2 or far[nearest] > THRESHOLD:
        return None
    return nearest, far[nearest], here


def require_no_contradiction(measured: Measured, latents: StoredLatents) -> None:
    """Whether latents that are normalised as the model's VAE says look like those of another VAE that is known.

    Raises:
        ConfigError: they do.
    """
    if latents.normalized or latents.statistics is None or not latents.takes_statistics_of_model:
        return
    other = _nearer(measured, latents.statistics)
    if other is not None:
        name, far, here = other
        raise ConfigError(
            f"the latents are of another model: over {measured.items} items their numbers are those of {name} "
            f"({far:.2f} away), and the VAE of the model has {latents.statistics} ({here:.2f} away). If you know "
            "better, convert them first: salad-compile latents convert ... --statistics."
        )


def _distance(measured: Measured, mean: tuple[float, ...], std: tuple[float, ...]) -> float:
    """Root mean square over channels of the difference in mean, in units of `std`, and of the log ratio of the stds."""
    total = 0.0
    for here, spread, expected, unit in zip(measured.mean, measured.std, mean, std, strict=True):
        logarithm = math.log(spread / unit) if spread > 0 else math.inf
        total += ((here - expected) / unit) ** 2 + logarithm**2
    return math.sqrt(total / len(mean))
