"""Sizes that a model takes, and buckets."""

from __future__ import annotations

import pytest

from salad_compile.errors import ConfigError
from salad_compile.latents.encoding.sizes import ClipSize


def test_buckets_keep_shape_and_area() -> None:
    size = ClipSize((81,), 480, 832, buckets=True)
    assert (480, 832) in size.sizes(16)
    assert (832, 480) in size.sizes(16)
    for height, width in size.sizes(16):
        assert height % 16 == width % 16 == 0
        assert 0.9 * 480 * 832 < height * width <= 1.001 * 480 * 832
    for height, width in [(1080, 1920), (1920, 1080), (600, 600), (480, 640), (1000, 2300)]:
        chosen = size.choose(height, width, 16)
        assert chosen[0] / chosen[1] == pytest.approx(height / width, rel=0.12)
    assert ClipSize((81,), 480, 832).choose(1920, 1080, 16) == (480, 832)


def test_what_a_model_takes() -> None:
    ClipSize((81, 1), 480, 832).require_fit(16, 4)
    ClipSize((85,), 480, 832).require_fit(16, 4, time_patch=2)
    for size, arguments, message in [
        (ClipSize((80,)), (16, 4), "80 frames cannot be encoded: this model takes 1, 5, 9 and so on; 81 is near"),
        (ClipSize((81,)), (16, 4, 2), "takes 5, 13, 21 and so on; 85 is near|77 is near"),
        (ClipSize((81,), 470), (16, 4), "height 470 is not a multiple of 16, as this model needs: try 464"),
        (ClipSize((121,), 480, 848), (32, 8), "width 848 is not a multiple of 32"),
    ]:
        with pytest.raises(ConfigError, match=message):
            size.require_fit(*arguments)


@pytest.mark.parametrize("values", [{"frames": ()}, {"height": 0}, {"fps": 0.0}, {"fps": float("nan")}])
def test_numbers_out_of_range(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        ClipSize(**values)  # type: ignore[arg-type]
