"""The dense side of the end-to-end benchmark runs on the kernel that was fastest, compiled too, and SALAD does not."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.benchmarks import fake_packages


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that a fake flash-attn-4 was called with."""
    pytest.importorskip("diffusers.models.transformers.transformer_wan")  # before it could see the fake package
    fake_packages.install(monkeypatch)
    interface, seen = sys.modules["flash_attn.cute.interface"], []

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
        seen.append(tuple(q.shape))
        assert not torch.is_grad_enabled()
        query, key = q.transpose(1, 2), k.transpose(1, 2)
        lse = (query @ key.transpose(-1, -2) * q.shape[-1] ** -0.5).logsumexp(-1)
        return fake_packages.flash_attn_func(q, k, v)[0].contiguous(), lse

    def backward(q: Any, k: Any, v: Any, out: Any, grad_out: Any, lse: Any, scale: float) -> Any:
        query, key, value, done, grad = (x.transpose(1, 2) for x in (q, k, v, out, grad_out))
        weights = (query @ key.transpose(-1, -2) * scale - lse[..., None]).exp()
        torch.testing.assert_close(weights @ value, done)
        grad_scores = weights * (grad @ value.transpose(-1, -2) - (grad * done).sum(-1, keepdim=True)) * scale
        assert scale == q.shape[-1] ** -0.5
        gradients = grad_scores @ key, grad_scores.transpose(-1, -2) @ query, weights.transpose(-1, -2) @ grad
        return tuple(x.transpose(1, 2).contiguous() for x in gradients)

    monkeypatch.setattr(interface, "flash_attn_func", forward)
    monkeypatch.setattr(interface, "_flash_attn_bwd", backward, raising=False)
    return seen


def tiny_wan() -> Any:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "ffn_dim": 32, "text_dim": 8}
    model = WanTransformer3DModel(**sizes)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    return model.requires_grad_(False)


def inputs(**changes: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    about = {"timestep": torch.tensor([500]), "return_dict": False, "encoder_hidden_states": torch.randn(1, 5, 8)}
    return {"hidden_states": torch.randn(1, 16, 2, 8, 8), **about, **changes}


@pytest.mark.parametrize("compiled", [False, True], ids=["uncompiled", "compiled"])
def test_self_attention_runs_on_the_package_and_cross_attention_does_not(
    modules: dict[str, ModuleType], calls: list[tuple[int, ...]], compiled: bool
) -> None:
    kernels, model = modules["dense_kernels"], tiny_wan()
    expected = model(**inputs())[0]
    if compiled:
        model.compile_repeated_blocks(backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for _ in range(3):
        with torch.inference_mode(), kernels.self_attention_on("FlashAttention-4"):
            torch.testing.assert_close(model(**inputs())[0], expected)
    assert calls == [(1, 32, 2, 16)] * 6, "two layers, three times"
    if compiled:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "compiled once"
        assert not torch._dynamo.utils.counters["graph_break"]
    with torch.inference_mode():
        torch.testing.assert_close(model(**inputs())[0], expected)
    assert len(calls) == 6, "outside it is as it was"


@pytest.mark.parametrize("compiled", [False, True], ids=["uncompiled", "compiled"])
def test_gradients_flow_through_it_under_checkpointing(
    modules: dict[str, ModuleType], calls: list[tuple[int, ...]], compiled: bool
) -> None:
    model = tiny_wan()
    if compiled:
        model.compile_repeated_blocks(backend="aot_eager")
    model.enable_gradient_checkpointing()
    model.train()
    gradients = []
    for kernel in ("", "FlashAttention-4"):
        latents = inputs()["hidden_states"].requires_grad_()
        with modules["dense_kernels"].self_attention_on(kernel):
            out = model(**inputs(hidden_states=latents))[0]
            gradients.append(torch.autograd.grad(out.square().mean(), latents)[0])
    torch.testing.assert_close(*gradients)
    assert len(calls) == 4, "two layers, and again in the backward"


def test_the_operator_is_what_its_fake_says(modules: dict[str, ModuleType], calls: list[tuple[int, ...]]) -> None:
    tensors = torch.randn(3, 1, 24, 2, 16).unbind(0)
    for kernel in modules["dense_kernels"].PACKAGES:
        torch.library.opcheck(
            torch.ops.salad_benchmark.dense_attention.default,
            (*tensors, kernel),
            test_utils=("test_schema", "test_faketensor"),
        )
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = torch.ops.salad_benchmark.dense_attention(*leaves, "FlashAttention-3")[0]
    with pytest.raises(NotImplementedError, match="FlashAttention-3 is timed in forwards alone"):
        out.sum().backward()


def test_the_fastest_is_taken_and_pytorchs_own_for_the_rest(
    modules: dict[str, ModuleType], calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = modules["dense_kernels"]
    assert kernels.time_dense((1, 24, 2, 16), torch.device("cpu"), None, training=False) == {}
    assert kernels.fastest({}) == ""
    assert kernels.fastest({"cuDNN": 2.0, "FlashAttention-4": 1.0}) == "FlashAttention-4"
    with kernels.preferring({"flash": 3.0, "cuDNN": 2.0, "FlashAttention-4": 1.0}):
        from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

        assert _cur_sdpa_kernel_backends(with_priority=True)[:2] == [
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.FLASH_ATTENTION,
        ]

    class Clock:
        def under_load(self, run: Any, ahead_ms: float) -> float:
            run()
            return float(len(calls))

    real = torch.randn
    monkeypatch.setattr(torch, "randn", lambda shape, device, dtype, **more: real(shape, **more))
    for training, names in ((False, ["FlashAttention-3", "FlashAttention-4"]), (True, ["FlashAttention-4"])):
        times = kernels.time_dense((1, 24, 2, 16), torch.device("cuda"), Clock(), training=training)
        assert [name for name in times if name in kernels.PACKAGES] == names
