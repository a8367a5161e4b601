"""convert: what it attaches, what it leaves alone, and that mistakes change nothing."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import salad_compile
from salad_compile import SaladConfig
from salad_compile.errors import (
    AlreadyConvertedError,
    ConfigError,
    InputsError,
    NoAttentionError,
    NoEligibleSiteError,
    SaladError,
    WrappedModelError,
)
from salad_compile.sites.branch import SaladBranch, branches
from tests import toys
from tests.models.zoo import CASES
from tests.support import (
    TINY,
    Recorder,
    assert_same,
    check_rewrite,
    differentiable,
    randomise_branches,
    relative_error,
    run,
)

CONFIG = SaladConfig(compensation="none", sparsity=0.6, query_block=16, key_block=16, lora_rank=2, min_tokens=64)


def wan() -> tuple[nn.Module, dict[str, Any]]:
    return CASES["Wan"].build(), dict(CASES["Wan"].inputs(0))


def fingerprint(model: nn.Module) -> Any:
    """Everything that a failed conversion could have changed."""
    return (
        {name: (value.clone(), value.data_ptr()) for name, value in model.state_dict().items()},
        {name: p.requires_grad for name, p in model.named_parameters()},
        [(n, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(m.__dict__)) for n, m in model.named_modules()],
    )


def assert_unchanged(model: nn.Module, before: Any) -> None:
    state, flags, modules = fingerprint(model)
    assert (flags, modules) == before[1:]
    assert state.keys() == before[0].keys()
    assert all(torch.equal(state[k][0], before[0][k][0]) and state[k][1] == before[0][k][1] for k in state)


def test_base_keys_stay_and_only_the_branch_trains() -> None:
    model, inputs = wan()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert salad_compile.convert(model, TINY, example_inputs=inputs) is model
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    new = set(after) - set(before)
    assert new == {
        f"blocks.{i}.attn1.salad.{key}"
        for i in (0, 1)
        for key in (
            *("gate_weight", "gate_bias", "proj_weight", "proj_bias", "low_rank_scale"),
            *(f"low_rank_{role}_{part}" for role in ("query", "key", "value", "out") for part in ("down", "up")),
        )
    }
    assert all(p.requires_grad == (".salad." in name) for name, p in model.named_parameters())
    branch = model.get_submodule("blocks.0.attn1.salad")
    assert not list(branch.children()), "peft wraps submodules: a branch holds bare parameters"


def test_initial_values() -> None:
    model, inputs = wan()
    salad_compile.convert(model, TINY, example_inputs=inputs)
    for name, parameter in model.named_parameters():
        if ".salad." in name:
            assert bool(parameter.any()) == name.endswith("_down"), name
    scales = [branch.low_rank_scale.item() for branch in branches(model).values()]
    assert scales == [2.0, 2.0]  # alpha 6 over rank 3


def test_train_base_leaves_the_base_alone() -> None:
    model, inputs = wan()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    salad_compile.convert(model, dataclasses.replace(TINY, train_base=True), example_inputs=inputs)
    assert all(p.requires_grad == flags.get(name, True) for name, p in model.named_parameters())


def test_lora_targets_and_rank() -> None:
    model, inputs = wan()
    salad_compile.convert(model, {**TINY.to_dict(), "lora_targets": ["value"], "lora_rank": 5}, example_inputs=inputs)
    branch = model.get_submodule("blocks.0.attn1.salad")
    assert isinstance(branch, SaladBranch)
    assert [n for n, _ in branch.named_parameters() if "low_rank" in n] == ["low_rank_value_down", "low_rank_value_up"]
    assert branch.low_rank_value_down.shape == (5, 24)


@pytest.mark.parametrize("name", ["handwritten_fused", "handwritten_rearrange"])
def test_lora_equals_changed_weights(name: str) -> None:
    """Also for a fused qkv projection, whose thirds have an update each."""
    case = CASES[name]
    model, inputs = case.build(), case.inputs(0)
    salad_compile.convert(model, TINY, example_inputs=dict(inputs))
    randomise_branches(model)
    expected = run(model, inputs, case.output, gradients=False).output
    with torch.no_grad():
        for branch in branches(model).values():
            groups = branch.record.shared_roles()
            for first, roles in groups.items():
                weight = model.get_submodule(branch.record.projections()[first]).weight
                for share, role in zip(weight.chunk(len(roles)), roles, strict=True):
                    up, down = getattr(branch, f"low_rank_{role}_up"), getattr(branch, f"low_rank_{role}_down")
                    share += 2.0 * up @ down
                    up.zero_()
    assert relative_error(run(model, inputs, case.output, gradients=False).output, expected) < 1e-5


def test_a_second_conversion_changes_nothing_but_trainability() -> None:
    model, inputs = wan()
    salad_compile.convert(model, TINY, example_inputs=inputs)
    randomise_branches(model)
    before = fingerprint(model)
    salad_compile.convert(model, TINY)  # needs no inputs: nothing is discovered again
    assert_unchanged(model, before)
    model.requires_grad_(False)  # what adapter verbs do
    salad_compile.convert(model, TINY)
    assert_unchanged(model, before)


def test_a_second_conversion_with_another_configuration_names_the_difference() -> None:
    model, inputs = wan()
    salad_compile.convert(model, TINY, example_inputs=inputs)
    before = fingerprint(model)
    with pytest.raises(AlreadyConvertedError, match=r"sparsity: 0\.8 != 0\.7"):
        salad_compile.convert(model, dataclasses.replace(TINY, sparsity=0.8))
    assert_unchanged(model, before)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_complete_and_independent(copier: Any) -> None:
    model, inputs = wan()
    output = CASES["Wan"].output
    salad_compile.convert(model, TINY, example_inputs=inputs)
    randomise_branches(model)
    inputs = differentiable(inputs)
    expected = run(model, inputs, output)
    twin = copier(model)
    assert_same(run(twin, inputs, output), expected)
    recorder = Recorder()
    torch._dynamo.reset()
    for block in twin.blocks:
        block.compile(backend=recorder)
    assert_same(run(twin, inputs, output), expected)
    assert recorder.after["salad.block_sparse_attention"] == recorder.graphs == 1  # one graph for both blocks
    randomise_branches(twin, seed=5)
    assert relative_error(run(twin, inputs, output, gradients=False).output, expected.output) > 1e-3
    assert_same(run(model, inputs, output), expected)


def test_an_instance_forward_is_chained() -> None:
    """accelerate's and diffusers' hooks set `forward` on the instance."""
    model, x = toys.SelfAttention(), toys.tokens()
    original = model.forward
    model.forward = lambda x: original(x) * 3
    reference = toys.SelfAttention()
    reference.load_state_dict(model.state_dict())
    for module in (model, reference):
        salad_compile.convert(module, CONFIG, example_inputs=(x,))
        randomise_branches(module)
    assert relative_error(model(x), reference(x) * 3) < 1e-6
    compiled = torch.compile(model, backend="salad", options={"lowering": "eager"})
    assert relative_error(compiled(x), reference(x) * 3) < 1e-6


def test_pipelines_are_converted_part_by_part() -> None:
    (first, inputs), (second, _) = wan(), wan()
    pipe = SimpleNamespace(transformer=first, transformer_2=second, vae=nn.Linear(2, 2))
    plan = salad_compile.plan(pipe, inputs, config=TINY)
    assert {row[0].split(".")[0] for row in plan.rows()} == {"transformer", "transformer_2"}
    assert salad_compile.convert(pipe, TINY, example_inputs=inputs) is pipe
    assert len(branches(first)) == len(branches(second)) == 2
    assert [row[0].split(".")[0] for row in salad_compile.summary(pipe).rows()] == ["transformer"] * 2 + [
        "transformer_2"
    ] * 2


class NoAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(toys.WIDTH, toys.WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


X = toys.tokens()


@pytest.mark.parametrize(
    ("build", "arguments", "error", "message"),
    [
        (NoAttention, {"example_inputs": (X,)}, NoAttentionError, "never called"),
        (toys.CrossAttention, {"example_inputs": (X,)}, NoEligibleSiteError, "taken for cross-attention"),
        (toys.SelfAttention, {"example_inputs": (toys.tokens(20),)}, NoEligibleSiteError, "min_tokens=64"),
        (toys.SelfAttention, {}, InputsError, "example_inputs"),
        (toys.SelfAttention, {"example_inputs": {"z": X}}, InputsError, "'z'"),
        (toys.SelfAttention, {"config": {"sparsty": 0.5}, "example_inputs": (X,)}, ConfigError, "'sparsity'"),
        (toys.SelfAttention, {"config": {"sparsity": 1.0}, "example_inputs": (X,)}, ConfigError, r"\[0, 1\)"),
        (toys.SelfAttention, {"config": {"sparsity": -0.1}, "example_inputs": (X,)}, ConfigError, r"\[0, 1\)"),
        (toys.SelfAttention, {"config": {"lora_targets": ["querry"]}, "example_inputs": (X,)}, ConfigError, "'query'"),
        (toys.SelfAttention, {"config": 0.9, "example_inputs": (X,)}, ConfigError, "SaladConfig"),
        (lambda: torch.compile(toys.SelfAttention()), {"example_inputs": (X,)}, WrappedModelError, "Convert first"),
    ],
)
def test_mistakes_have_their_own_error_and_change_nothing(
    build: Any, arguments: dict[str, Any], error: type[SaladError], message: str
) -> None:
    model = build()
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        salad_compile.convert(model, **{"config": CONFIG, **arguments})
    assert_unchanged(model, before)


def test_no_module_and_no_pipeline() -> None:
    with pytest.raises(ConfigError, match="diffusers pipeline"):
        salad_compile.convert({"not": "a model"})


def test_an_attribute_in_the_way_is_named() -> None:
    model = toys.SelfAttention()
    model.salad = nn.Identity()
    before = fingerprint(model)
    with pytest.raises(ConfigError, match="'salad'"):
        salad_compile.convert(model, CONFIG, example_inputs=(X,))
    assert_unchanged(model, before)


def test_quantised_projections_are_converted_and_trained() -> None:
    model = toys.SelfAttention()
    for name in "qkvo":
        setattr(model, name, toys.Int8Linear(getattr(model, name)))
    salad_compile.convert(model, CONFIG, example_inputs=(X,))
    randomise_branches(model)
    recorder = check_rewrite(model, {"x": X}, sites=1)
    assert recorder.after["salad.linear_state"] == 1


def test_branch_parameters_follow_the_projections_dtype() -> None:
    model = toys.SelfAttention().to(torch.bfloat16)
    salad_compile.convert(model, CONFIG, example_inputs=(X.to(torch.bfloat16),))
    assert {p.dtype for p in model.salad.parameters()} == {torch.bfloat16}
    assert model.salad.low_rank_scale.dtype == torch.float32
    randomise_branches(model)
    expected = model(X.to(torch.bfloat16))
    # fp32 master weights under 16-bit activations, without autocast
    model.salad.float()
    assert model(X.to(torch.bfloat16)).dtype == torch.bfloat16
    assert relative_error(model(X.to(torch.bfloat16)), expected) < 1e-6


class FirstHeads(toys.SelfAttention):
    """Attends with some of the heads that its projections make."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (toys.heads(linear(x))[:, :1] for linear in (self.q, self.k, self.v))
        out: Tensor = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return out


def test_projections_may_have_more_outputs_than_attention_reads() -> None:
    """Low-rank updates go to the channels that are read: at sparsity 0 nothing changes, whatever else there is."""
    model = toys.Stack(FirstHeads(), toys.SelfAttention())
    model.layers[0].register_forward_hook(lambda module, args, out: torch.cat((out, out), dim=-1))
    expected = model(toys.tokens())
    config = salad_compile.SaladConfig(compensation="none", min_tokens=48, query_block=16, key_block=16, sparsity=0.0)
    plan = salad_compile.plan(model, (toys.tokens(),), config=config)
    assert [site.name for site in plan.eligible] == ["layers.0", "layers.1"]
    salad_compile.convert(model, config, example_inputs=(toys.tokens(),))
    assert relative_error(model(toys.tokens()), expected) < 1e-6
    torch.nn.init.normal_(model.layers[0].salad.low_rank_query_up)
    out = model(toys.tokens())
    assert relative_error(out, expected) > 1e-3
    out.sum().backward()
    assert float(model.layers[0].salad.low_rank_query_down.grad.abs().sum()) > 0
