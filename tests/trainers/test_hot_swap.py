"""Recipe: another LoRA, or another SALAD file, in a compiled model. Nothing is compiled again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import salad_compile
from salad_compile.sites.branch import branches
from tests.support import relative_error
from tests.trainers.tiny import converted, output, pipeline, write_style

AOT = {"backend": "salad", "fullgraph": True, "options": {"lowering": "aot_eager"}}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_another_salad_file(tmp_path: Path) -> None:
    files = [salad_compile.save(converted(seed), tmp_path / f"{seed}.safetensors") for seed in (0, 1)]
    expected = [output(converted(seed)) for seed in (0, 1)]
    assert relative_error(expected[1], expected[0]) > 1e-2
    model = converted()
    model.compile_repeated_blocks(**AOT)
    assert relative_error(output(model), expected[0]) < 1e-5
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in (1, 0, 1):
            salad_compile.load(model, files[number])
            assert relative_error(output(model), expected[number]) < 1e-5


def test_another_strength_of_our_low_rank_updates() -> None:
    model, twin = converted(), converted()
    model.compile_repeated_blocks(**AOT)
    full = output(model)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for strength in (0.5, 0.0):
            for each in (model, twin):
                for branch in branches(each).values():
                    branch.low_rank_scale.fill_(strength)
            assert relative_error(output(model), output(twin)) < 1e-5
            assert relative_error(output(model), full) > 1e-3


def test_another_lora_of_diffusers(tmp_path: Path) -> None:
    first, second = write_style(tmp_path / "first", 1), write_style(tmp_path / "second", 2)
    expected = []
    for style in (first, second):
        twin = pipeline(converted())
        twin.load_lora_weights(style)
        expected.append(output(twin.transformer))
    assert relative_error(expected[1], expected[0]) > 1e-2

    pipe = pipeline(converted())
    pipe.enable_lora_hotswap(target_rank=4)  # the largest rank that will come
    pipe.load_lora_weights(first, adapter_name="style")
    pipe.transformer.compile_repeated_blocks(**AOT)
    assert relative_error(output(pipe.transformer), expected[0]) < 1e-5
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number, style in ((1, second), (0, first)):
            pipe.load_lora_weights(style, adapter_name="style", hotswap=True)
            assert relative_error(output(pipe.transformer), expected[number]) < 1e-5
