"""What `parallelise` reads of diffusers; that it works is in tests/trainers/test_context_parallel.py."""

from __future__ import annotations

import dataclasses

from salad_compile.conversion import context_parallel


def test_diffusers_still_has_the_private_names() -> None:
    from diffusers import ContextParallelConfig, ModelMixin
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    assert hasattr(ModelMixin, context_parallel._SETTINGS)
    assert hasattr(WanAttnProcessor, context_parallel._SETTINGS)
    assert context_parallel._MESH in {field.name for field in dataclasses.fields(ContextParallelConfig)}
