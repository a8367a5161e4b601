"""Random video DiTs over what real model code does around its attention.

`python -m tests.wild.random_models --count 300`. Each model is drawn from a seed. It is right, or refused with a
reason:

- right: at sparsity 0 it computes what the dense model does; text is known to be text; gates belong to their own
  sample; gradients arrive; compiled (a share of the models) it computes what it does uncompiled, gradients included,
  and is rewritten, or known to run uncompiled as SALAD where the graph breaks inside attention;
- refused: `convert` raises an error of ours that gives a reason, and leaves the model as it was.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import traceback
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import salad_compile
from salad_compile.definition import linear_branch
from salad_compile.errors import GridMismatchError, SaladError, SiteLostError
from salad_compile.sites.branch import branches
from tests.support import TINY, Recorder, Result, assert_same, randomise_branches, relative_error, seeded
from tests.wild.random_dits import Style, build, change_root, inputs_of, root_of, style_of

NO_ORDER = (GridMismatchError, SiteLostError)
"""What a site may raise when the root's forward is not the one that was converted."""


def convert(style: Style, **changes: Any) -> nn.Module:
    model: nn.Module = salad_compile.convert(
        build(style), dataclasses.replace(TINY, **changes), example_inputs=inputs_of(style)
    )
    change_root(style, model)
    return model


@torch.no_grad()
def output_of(model: nn.Module, style: Style) -> Tensor:
    return root_of(style, model)(**inputs_of(style))


@functools.cache
def trains(style: Style) -> bool:
    """Whether the dense model can be trained: autograd refuses some writes, and some forwards switch it off."""
    try:
        return bool(build(style)(**inputs_of(style)).requires_grad)
    except RuntimeError:
        return False


def run(model: Callable[..., Any], owner: nn.Module, style: Style) -> Result:
    owner.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(trains(style)):
        out = model(**inputs_of(style))
    if out.requires_grad:
        with seeded(99):
            (out * torch.randn(out.shape)).sum().backward()
    names = ((name.replace("_orig_mod.", ""), p) for name, p in owner.named_parameters())
    return Result(out.detach().clone(), {name: p.grad.clone() for name, p in names if p.grad is not None})


def bound_of(style: Style) -> float:
    """How far two ways to compute one thing may be apart: in bf16, some steps of it."""
    return 3e-2 if style.region == "autocast" else 1e-5


def check(style: Style, *, compiled: bool) -> str:
    """`right`, or `refused: reason`. Raises AssertionError, or an error that is not ours, where it is wrong."""
    dense_model = build(style)
    dense = output_of(dense_model, style)
    before = {name: value.clone() for name, value in dense_model.state_dict().items()}
    try:
        salad_compile.convert(dense_model, TINY, example_inputs=inputs_of(style))
    except SaladError as error:
        after = dense_model.state_dict()
        assert before.keys() == after.keys(), "a refusal changed the model"
        assert all(torch.equal(value, after[name]) for name, value in before.items()), "a refusal changed weights"
        return f"refused: {reason_of(error)}"
    model = convert(style)
    check_text(style, model)
    if style.root in ("bypassed", "replaced later"):  # the right order, or an error
        try:
            output_of(model, style)
        except NO_ORDER as error:
            return f"at run: {reason_of(error)}"
    bound = bound_of(style)
    assert relative_error(output_of(convert(style, sparsity=0.0), style), dense) <= bound, "sparsity 0 is not dense"
    check_gates(style, model)
    randomise_branches(model)
    expected = run(root_of(style, model), model, style)
    salad = {name for name in expected.gradients if ".salad." in name or name.startswith("salad.")}
    if trains(style):
        assert salad == {name for name, _ in model.named_parameters() if ".salad." in name}, "a branch has no gradient"
    if compiled:
        torch._dynamo.reset()
        recorder = Recorder({"lowering": "eager"})
        actual = run(torch.compile(root_of(style, model), backend=recorder), model, style)
        assert_same(actual, expected, bound=bound, gradient_bound=10 * bound, may_vanish=lambda name: True)
        broken = all(branch.uncompiled for branch in branches(model).values())  # the graph breaks there, which was said
        assert broken or recorder.after["salad.block_sparse_attention"] > 0, "compiled, nothing was rewritten"
    return "right"


def check_text(style: Style, model: nn.Module) -> None:
    """What is no video is known to be none."""
    words = 0 if style.text == "none" else 13 - 2 * (style.decorated == "no_grad text")
    expected = words + {"registers": 5, "padded": 4, "nested": 8, "both sides": 5}.get(style.text, 0)
    found = {branch.record.text_tokens for branch in branches(model).values()}
    assert found == {expected}, f"{found} text tokens found where there are {expected}"


def check_gates(style: Style, model: nn.Module) -> None:
    """The samples of a batch, swapped, give the same outputs swapped: no gate acts on another sample.

    The linear branch is a projection to ones, so that all that it adds to a token is that token's gate.
    """
    if style.batch < 2:
        return
    randomise_branches(model)
    with torch.no_grad():
        for branch in branches(model).values():
            for name, parameter in branch.named_parameters():
                if "proj" in name:
                    parameter.fill_(1.0 if name.endswith("bias") else 0.0)
    inputs = inputs_of(style)
    inputs["valid"] = torch.ones_like(inputs["valid"])
    swapped = {name: value.flip(0) for name, value in inputs.items()}
    call = root_of(style, model)
    with torch.no_grad(), mock.patch.object(linear_branch, "linear_attention", lambda q, k, v, *_: torch.ones_like(v)):
        straight, crossed = call(**inputs), call(**swapped)
    assert relative_error(crossed.flip(0), straight) <= bound_of(style), "gates of one sample act on another"


def reason_of(error: SaladError) -> str:
    """The first line that tells, of what was refused."""
    text = " ".join(str(error).split())
    assert len(text) > 20, "a refusal without a reason"
    mark = text.partition(" no ")[2]
    return f"{type(error).__name__}: {(mark or text)[:110]}"


def main() -> int:
    """Print what became of `--count` models; 1 if one was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--compiled", type=int, default=10, help="compile one of so many")
    options = parser.parse_args()
    outcomes: collections.Counter[str] = collections.Counter()
    for seed in range(options.first, options.first + options.count):
        style = style_of(seed)
        try:
            said = check(style, compiled=seed % options.compiled == 0)
        except Exception as error:
            said = "WRONG"
            where = traceback.extract_tb(error.__traceback__)[-1]
            print(f"seed {seed}: {type(error).__name__}: {str(error)[:300]} ({where.name})\n  {style}", flush=True)
        outcomes[said] += 1
    for said, count in outcomes.most_common():
        print(f"{count:4d}  {said}")
    return int(outcomes["WRONG"] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
