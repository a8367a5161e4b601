"""Recipe: a LoRA of somebody else is loaded, then the model is converted, and the LoRA comes and goes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import salad_compile
from salad_compile.sites.branch import branches
from tests.support import relative_error
from tests.trainers.tiny import CONFIG, INPUTS, base, converted, output, pipeline, write_style

EAGER = {"backend": "salad", "options": {"lowering": "eager"}}


@pytest.mark.parametrize("compiled", [False, True])
def test_an_adapter_that_was_there_before_can_be_unloaded(compiled: bool, tmp_path: Path) -> None:
    torch._dynamo.reset()
    style = write_style(tmp_path / "style", 1)
    expected = pipeline(converted())
    expected.load_lora_weights(style)
    styled, alone = output(expected.transformer), output(converted())
    assert relative_error(styled, alone) > 1e-2

    pipe = pipeline(base())
    pipe.load_lora_weights(style)
    model = salad_compile.convert(pipe.transformer, CONFIG, example_inputs=dict(INPUTS))
    salad_compile.load(model, salad_compile.save(converted(), tmp_path / "salad.safetensors"))
    run = torch.compile(model, **EAGER) if compiled else model
    assert relative_error(output(run), styled) < 1e-5
    pipe.unload_lora_weights()
    torch._dynamo.reset()
    assert relative_error(output(run), alone) < 1e-5
    assert len(branches(model)) == 2
    pipe.load_lora_weights(style)
    assert relative_error(output(model), styled) < 1e-5
    torch._dynamo.reset()


def test_a_file_saved_beside_an_adapter_names_bare_layers(tmp_path: Path) -> None:
    """Attention that the conversion leaves dense is named in the file."""
    settings = {**CONFIG.to_dict(), "dense_layers": 1}
    pipe = pipeline(salad_compile.convert(base(), settings, example_inputs=dict(INPUTS)))
    pipe.load_lora_weights(write_style(tmp_path / "style", 1))
    file = salad_compile.save(pipe.transformer, tmp_path / "salad.safetensors")
    model = salad_compile.load(base(), file)
    pipe.unload_lora_weights()
    assert relative_error(output(model), output(pipe.transformer)) == 0
