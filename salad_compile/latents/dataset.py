"""The dataset behind open_latents: one source's items, normalised, with a rule for damaged ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, TypeAlias, get_args

from salad_compile.common.checks import check_choice
from salad_compile.common.logs import logger
from salad_compile.errors import ConfigError, LatentItemError
from salad_compile.latents.item import LATENT_EXTRAS, LatentDataset, LatentItem
from salad_compile.latents.source import LatentSource, Problem, check_item
from salad_compile.latents.statistics import LatentStatistics

OnError: TypeAlias = Literal["raise", "skip"]
ON_ERROR: tuple[OnError, ...] = get_args(OnError)
_SHOWN = 5  # names in a message
SKIPPING = "salad-compile latents convert --skip leaves them out; in Python, on_error='skip'."


class StoredLatents(LatentDataset):
    """Items of a source.

    With `on_error="skip"` an item whose header shows that it is damaged is left out; the others keep their order. What
    only shows when it is read (NaN, say) makes item i the next good item of the same shape, round the end of the
    dataset if need be. So item i depends on nothing but i and the files, and batches keep their shape.

    Attributes:
        layout: name of the format.
        normalized: whether the files hold normalised latents. False: reading normalises them.
        statistics: how the latents that come out were normalised; None: not known.
        guesses_statistics: nothing said them. takes_statistics_of_model: nothing but the model's VAE said them.
        problems: items that were left out.
        text_lengths: tokens of each text; None where headers do not say it.
    """

    def __init__(
        self,
        source: LatentSource,
        *,
        normalized: bool | None = None,
        statistics: LatentStatistics | None = None,
        vae: LatentStatistics | None = None,
        on_error: OnError = "raise",
    ) -> None:
        """Raises ConfigError: options that do not fit. LatentItemError: damaged items, with on_error="raise"."""
        check_choice("on_error", on_error, ON_ERROR)
        self._source = source
        self._skips = on_error == "skip"
        self._announced: set[str] = set()
        self.layout = source.layout
        self.problems = _problems(source)
        if self.problems and not self._skips:
            raise LatentItemError(f"{summary_of(self.problems)} {SKIPPING}")
        if self.problems:
            logger.warning("%s They are left out.", summary_of(self.problems))
        bad = {problem.name for problem in self.problems}
        self._places = [place for place, entry in enumerate(source.entries) if entry.name not in bad]
        kept = [source.entries[place] for place in self._places]
        self.names = [entry.name for entry in kept]
        self.text_lengths = [entry.text_length for entry in kept]
        self.shapes = [entry.shape for entry in kept if entry.shape is not None]
        if not kept:
            raise LatentItemError(
                f"none of {len(source.entries)} items is good. {summary_of(self.problems)}"
                if source.entries
                else "there is no item: what wrote the dataset was given none."
            )
        self.normalized = source.normalized if normalized is None else normalized
        self.takes_statistics_of_model = statistics is None and vae is not None and source.guesses_statistics
        self.guesses_statistics = statistics is None and vae is None and source.guesses_statistics
        self.statistics = self._choose_statistics(statistics, vae)

    def _choose_statistics(
        self, statistics: LatentStatistics | None, vae: LatentStatistics | None
    ) -> LatentStatistics | None:
        """What was given, else what the source says, if its VAE has this number of channels."""
        channels = self.shapes[0][0]
        if vae is not None and vae.channels != channels:
            raise ConfigError(f"the latents have {channels} channels, and those of the model's VAE {vae.channels}.")
        if statistics is not None and statistics.channels != channels:
            raise ConfigError(f"the latents have {channels} channels, the statistics {statistics.channels}.")
        implied = vae if vae is not None and self._source.guesses_statistics else self._source.statistics
        if vae is not None and implied is not None and statistics is None and not implied.is_close(vae):
            raise ConfigError(
                f"the latents go with {implied}, and the VAE of the model with {vae}: they are of another model."
            )
        implied = implied or vae
        if statistics is None and implied is not None and implied.channels == channels:
            statistics = implied
        if statistics is None and not self.normalized:
            raise ConfigError(
                f"latents of layout {self.layout!r} are not normalised, and nothing says how {channels} channels are: "
                "pass statistics=LatentStatistics(mean, std) of their VAE, or normalized=True if they are."
            )
        return statistics

    def __getitem__(self, index: int) -> LatentItem:
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            return self.read(index)
        except LatentItemError as error:
            if not self._skips:
                raise
            return self._next_good(index, error)

    def read(self, index: int) -> LatentItem:
        """Item `index`, whatever `on_error` is.

        Raises:
            LatentItemError: it is damaged.
        """
        item = check_item(self._source.read(self._places[index]), self.shapes[index])
        if self.normalized:
            return item
        assert self.statistics is not None
        normalize = self.statistics.normalize
        raw = () if self._source.extras_normalized else LATENT_EXTRAS
        extras = {name: normalize(tensor) if name in raw else tensor for name, tensor in item.extras.items()}
        return replace(item, latent=normalize(item.latent), extras=extras)

    def _next_good(self, index: int, error: LatentItemError) -> LatentItem:
        for step in range(1, len(self)):
            other = (index + step) % len(self)
            if self.shapes[other] != self.shapes[index]:
                continue
            try:
                item = self.read(other)
            except LatentItemError:
                continue
            if self.names[index] not in self._announced:
                self._announced.add(self.names[index])
                logger.warning("damaged: %s. %s takes its place.", error, item.name)
            return item
        raise LatentItemError(f"{error}, and no other item of shape {self.shapes[index]} is good.") from error


def _problems(source: LatentSource) -> list[Problem]:
    """What headers show: damage, and items with another number of channels than most."""
    counts = Counter(entry.shape[0] for entry in source.entries if entry.shape and not entry.problem)
    usual = counts.most_common(1)[0][0] if counts else 0
    found = []
    for entry in source.entries:
        if entry.problem:
            found.append(Problem(entry.name, entry.problem))
        elif entry.shape is None:
            found.append(Problem(entry.name, "its shape is not known"))
        elif entry.shape[0] != usual:
            found.append(Problem(entry.name, f"it has {entry.shape[0]} channels, most items have {usual}"))
    return found


def summary_of(problems: Sequence[Problem]) -> str:
    """Number, first names and reasons, in one sentence."""
    first = "; ".join(map(str, problems[:_SHOWN]))
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return f"{len(problems)} damaged item{'s' * (len(problems) != 1)}: {first}{more}".rstrip(".?") + "."
