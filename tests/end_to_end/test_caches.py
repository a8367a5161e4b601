"""Inductor's and AOTAutograd's caches on disk: a second process compiles nothing, and is served nothing foreign."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import salad_compile
from tests import toys
from tests.support import randomise_branches

ROOT = Path(__file__).parents[2]
CONFIG = salad_compile.SaladConfig(
    compensation="none", sparsity=0.6, query_block=16, key_block=16, lora_rank=2, min_tokens=48
)


def converted() -> torch.nn.Module:
    torch.manual_seed(0)
    model = salad_compile.convert(
        toys.Stack(toys.SelfAttention()), CONFIG, example_inputs=(toys.tokens(105),), grid=(3, 5, 7)
    )
    randomise_branches(model)
    return model


COMPILE_AND_COUNT = """
import json, torch
from torch._dynamo.utils import counters
from tests import toys
from tests.end_to_end.test_caches import converted
from tests.support import assert_same, run
model, inputs = converted(), {"x": toys.tokens(105)}
expected = run(model, inputs)
assert_same(run(torch.compile(model, backend="salad"), inputs, parameters=model), expected)
print(json.dumps({**counters["inductor"], **counters["aot_autograd"]}))
"""


def in_a_process(cache: Path) -> dict[str, int]:
    """Compile forward and backward; what the caches counted.

    A new interpreter with a hash seed of its own, not a fork: keys must not depend on it.
    """
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "TORCHINDUCTOR_VEC_ISA_OK": "1",  # no trial of every kind of vector instruction, with which a new folder begins
        "PYTHONPATH": os.pathsep.join([str(ROOT), *(path for path in sys.path if path)]),
    }
    printed = subprocess.run(
        [sys.executable, "-c", COMPILE_AND_COUNT], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    ).stdout
    counts = json.loads(printed.splitlines()[-1])
    return {name: count for name, count in counts.items() if "_cache_" in name}


def test_another_process_finds_everything(tmp_path: Path) -> None:
    first = in_a_process(tmp_path)
    assert first == {"fxgraph_cache_miss": 2, "autograd_cache_miss": 1, "autograd_cache_saved": 1}
    # forward and backward; both together
    assert in_a_process(tmp_path) == {"fxgraph_cache_hit": 2, "autograd_cache_hit": 1}


def test_what_stock_inductor_cached_is_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code for the CPU may be wrong: see cpu_fusion.py."""
    torch.compile(lambda x: x + 2)(torch.ones(3))  # what a process compiles first and once, where others find it
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def dense(x: Tensor) -> Tensor:
        return x.sin() + 1

    for backend, expected in (("inductor", (0, 0)), ("inductor", (1, 1)), ("salad", (0, 0)), ("salad", (1, 1))):
        torch._dynamo.reset()
        counters.clear()
        torch.compile(dense, backend=backend)(torch.ones(3))
        hits = counters["inductor"]["fxgraph_cache_hit"], counters["aot_autograd"]["autograd_cache_hit"]
        assert hits == expected, backend
    torch._dynamo.reset()
