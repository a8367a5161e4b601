"""Which size a clip is cut to: one for all, or the nearest in shape of a list of about the same area."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from salad_compile.errors import ConfigError

# height / width of the buckets beside that of the size asked for, and their reciprocals
RATIOS = (1.0, 3 / 4, 2 / 3, 9 / 16, 1 / 2, 9 / 21)


@dataclass(frozen=True)
class ClipSize:
    """How clips are cut.

    Attributes:
        frames: numbers of frames; a clip gets the largest that it has.
        height, width: pixels.
        fps: frames per second; None: as recorded.
        buckets: whether clips keep about their shape, at about height x width pixels in all.

    Raises:
        ConfigError: a number out of range.
    """

    frames: tuple[int, ...] = (81,)
    height: int = 480
    width: int = 832
    fps: float | None = None
    buckets: bool = False

    def __post_init__(self) -> None:
        if not self.frames or min(*self.frames, self.height, self.width) < 1:
            raise ConfigError(f"frames, height and width are at least 1, got {self}.")
        if self.fps is not None and not (math.isfinite(self.fps) and self.fps > 0):
            raise ConfigError(f"fps is a positive number, got {self.fps}.")

    def require_fit(self, spatial: int, temporal: int, time_patch: int = 1) -> None:
        """Whether a VAE and the patches of its model take this size.

        Args:
            spatial: pixels of one token in height and width. temporal: frames of one latent, after the first.
            time_patch: latents of one token in time.

        Raises:
            ConfigError: they do not; the message names the nearest size that they take.
        """
        for name in ("height", "width"):
            value = getattr(self, name)
            if value % spatial:
                near = max(spatial, round(value / spatial) * spatial)
                raise ConfigError(f"{name} {value} is not a multiple of {spatial}, as this model needs: try {near}.")
        for count in self.frames:
            latents, rest = divmod(count - 1, temporal)
            if rest or (latents + 1) % time_patch:
                step = temporal * time_patch
                first = 1 + temporal * (time_patch - 1)
                near = first + step * max(0, round((count - first) / step))
                raise ConfigError(
                    f"{count} frames cannot be encoded: this model takes {first}, {first + step}, {first + 2 * step} "
                    f"and so on; {near} is near."
                )

    def choose(self, height: float, width: float, multiple: int) -> tuple[int, int]:
        """Height and width for a clip of this height and width; multiples of `multiple`."""
        if not self.buckets:
            return self.height, self.width
        shape = math.log(height / width)
        return min(self.sizes(multiple), key=lambda size: abs(math.log(size[0] / size[1]) - shape))

    def sizes(self, multiple: int) -> list[tuple[int, int]]:
        """All buckets."""
        asked = (self.height, self.width)
        if not self.buckets:
            return [asked]
        ratios = {ratio for r in RATIOS for ratio in (r, 1 / r)} | {self.width / self.height}
        found = {asked, *(_of_area(self.height * self.width, ratio, multiple) for ratio in ratios)}
        return sorted(found)


def _of_area(area: int, ratio: float, multiple: int) -> tuple[int, int]:
    """Height and width of about this ratio, and of at most this area."""
    height = max(multiple, round(math.sqrt(area * ratio) / multiple) * multiple)
    return height, max(multiple, area // height // multiple * multiple)


def longest(frames: Sequence[int], available: int) -> int | None:
    """The largest number of frames that a clip has, or None."""
    return max((count for count in frames if count <= available), default=None)
