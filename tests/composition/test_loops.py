"""SALAD beside what changes the loop of denoising: few-step LoRAs, caches of cache-dit, guidance, other attention."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import salad_compile
from salad_compile.errors import BaseModelMismatchError, InputsError
from salad_compile.sites.branch import branches
from tests.models import flash_packages
from tests.support import randomise_branches, relative_error
from tests.trainers.tiny import CONFIG, INPUTS, base, converted, generate, output, pipeline, write_style

EAGER = {"options": {"lowering": "eager"}}
SAME = 1e-5  # of fp32


# --- few steps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [4, pytest.param(8, marks=pytest.mark.all_cases)])
def test_a_few_step_lora_and_a_salad_file_of_the_base(steps: int, tmp_path: Path) -> None:
    """The file of the gates and low-rank updates fits beside the LoRA, loaded or fused into the base first."""
    file = salad_compile.save(converted(), tmp_path / "salad.safetensors")
    few = write_style(tmp_path / "few", 3)
    beside = pipeline(base())
    salad_compile.load(beside.transformer, file)
    beside.load_lora_weights(few)
    fused = pipeline(base())
    fused.load_lora_weights(few)
    fused.fuse_lora()
    fused.unload_lora_weights()
    salad_compile.load(fused.transformer, file)
    expected = generate(beside, steps)
    assert relative_error(generate(fused, steps), expected) < SAME
    assert relative_error(generate(pipeline(converted()), steps), expected) > 1e-3, "the LoRA does something"
    salad_compile.compile_pipeline(fused, **EAGER)
    assert relative_error(generate(fused, steps), expected) < SAME


def test_a_file_of_merged_weights_fits_no_other_base(tmp_path: Path) -> None:
    merged = converted()
    salad_compile.merge_lora(merged)
    file = salad_compile.save(merged, tmp_path / "merged.safetensors")
    pipe = pipeline(base())
    pipe.load_lora_weights(write_style(tmp_path / "few", 3))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    with pytest.raises(BaseModelMismatchError):
        salad_compile.load(pipe.transformer, file)


# --- cache-dit --------------------------------------------------------------------------------------------------------


def cached(pipe: Any, threshold: float) -> Any:
    """With a cache that computes the first block, and the rest where that one has changed by more than a threshold."""
    cache_dit = pytest.importorskip("cache_dit", reason="cache-dit: `make test-composition` installs it")
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=threshold, max_warmup_steps=2
    )
    cache_dit.enable_cache(pipe, cache_config=config)
    return pipe


@pytest.mark.parametrize("compiled", [False, True])
def test_cache_dit_after_conversion(compiled: bool) -> None:
    expected = generate(pipeline(converted()), steps=6)
    for threshold, most, error in ((0.0, 6, 0.0), (10.0, 5, 0.2)):
        torch._dynamo.reset()
        pipe, ran = pipeline(converted()), []
        pipe.transformer.blocks[1].register_forward_hook(lambda *_, ran=ran: ran.append(1))
        cached(pipe, threshold)
        if compiled:
            salad_compile.compile_pipeline(pipe, **EAGER)
        out = generate(pipe, steps=6)
        assert relative_error(out, expected) <= error + SAME
        assert len(ran) <= most, "no step was taken from the cache"
        assert (len(ran) == 6) == (threshold == 0.0)


def test_cache_dit_before_conversion_is_an_error() -> None:
    pipe = cached(pipeline(base()), 0.0)
    with pytest.raises(InputsError, match="do not fit the model"):
        salad_compile.convert(pipe.transformer, CONFIG, example_inputs=dict(INPUTS))
    assert not branches(pipe.transformer)


# --- guidance, attention backends -------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
def test_guidance_in_one_batch_is_two_forwards(compiled: bool) -> None:
    model = converted()
    draw = torch.Generator().manual_seed(8)
    both = {
        name: torch.cat([value, torch.randn(value.shape, generator=draw)]) if value.dim() > 1 else value.repeat(2)
        for name, value in INPUTS.items()
    }
    expected = []
    with torch.no_grad():
        for sample in range(2):
            one = {name: value[sample : sample + 1] for name, value in both.items()}
            expected.append(model(**one, return_dict=False)[0])
        if compiled:
            model.compile_repeated_blocks(backend="salad", **EAGER)
        assert relative_error(model(**both, return_dict=False)[0], torch.cat(expected)) < SAME


@pytest.fixture
def _another_backend() -> Iterator[None]:
    """`set_attention_backend` of one model sets that of all."""
    yield
    base().set_attention_backend("native")


@pytest.mark.usefixtures("_another_backend")
@pytest.mark.parametrize("name", ["_native_math", "flex"])
def test_another_attention_backend_after_conversion(name: str) -> None:
    model = converted()
    expected = output(model)
    model.set_attention_backend(name)
    assert relative_error(output(model), expected) < SAME
    model.compile_repeated_blocks(backend="salad", **EAGER)
    assert relative_error(output(model), expected) < SAME


@pytest.mark.usefixtures("_another_backend")
@pytest.mark.parametrize("name", ["_native_math", "_native_flash", "flex"])
def test_another_attention_backend_before_conversion(name: str) -> None:
    expected = output(converted())
    model = base()
    model.set_attention_backend(name)
    salad_compile.convert(model, CONFIG, example_inputs=dict(INPUTS))
    randomise_branches(model)
    assert relative_error(output(model), expected) < SAME
    model.compile_repeated_blocks(backend="salad", **EAGER)
    assert relative_error(output(model), expected) < SAME


@pytest.mark.usefixtures("_another_backend")
@pytest.mark.parametrize("before", [True, pytest.param(False, marks=pytest.mark.all_cases)])
def test_sage_attention_through_diffusers(before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function of ours with its name and signature stands for it: its kernels need a GPU."""
    from diffusers.models import attention_dispatch

    expected, dense, lengths = output(converted()), output(base()), []
    text, attention = INPUTS["encoder_hidden_states"].shape[1], flash_packages._attention
    count = lambda q, k, *rest: (lengths.append(k.shape[1]), attention(q, k, *rest))[1]  # noqa: E731
    monkeypatch.setattr(flash_packages, "_attention", count)
    with flash_packages.imported(flash_packages.sageattention()) as package:
        monkeypatch.setattr(attention_dispatch, "sageattn", package.sageattn)  # type: ignore[attr-defined]
        monkeypatch.setattr(attention_dispatch, "_CAN_USE_SAGE_ATTN", True)
        model = base() if before else converted()
        model.set_attention_backend("sage")
        if before:
            salad_compile.convert(model, CONFIG, example_inputs=dict(INPUTS))
            randomise_branches(model)
        for compiled in (False, True):
            if compiled:
                model.compile_repeated_blocks(backend="salad", **EAGER)
            lengths.clear()
            assert relative_error(output(model), expected) < SAME
            assert set(lengths) == {text}, "cross-attention alone is dense, and runs on it"
            with salad_compile.dense(model):
                lengths.clear()
                assert relative_error(output(model), dense) > 0  # low-rank updates stay
                assert set(lengths) > {text}, "dense steps run on it as well"
