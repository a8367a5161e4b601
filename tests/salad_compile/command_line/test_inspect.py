from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, safe_open

import salad_compile
from salad_compile.command_line import WRONG
from tests.salad_compile.command_line.conftest import Run


def test_json_says_what_the_file_holds(command: Run, salad_file: Path) -> None:
    found = command("inspect", salad_file, "--json").json()
    tensors = load_file(salad_file)
    assert found["tensors"] == len(tensors)
    assert sum(found["dtypes"].values()) == sum(tensor.numel() for tensor in tensors.values())
    for site in found["sites"]:
        mine = [tensor.numel() for name, tensor in tensors.items() if name.startswith(f"{site['owner']}.salad.")]
        assert site["numbers"] == sum(mine) > 0
    assert [site["owner"] for site in found["sites"]] == ["blocks.0.attn1", "blocks.1.attn1"]
    assert (found["base_class"], found["config"]["sparsity"], found["merged"]) == ("WanTransformer3DModel", 0.7, False)
    assert found["versions"]["salad_compile"] == salad_compile.__version__
    assert found["file_bytes"] == salad_file.stat().st_size


def test_the_table(command: Run, salad_file: Path) -> None:
    outcome = command("inspect", salad_file.parent)
    assert "blocks.{0..1}.attn1" in outcome.out
    assert "settings that are not the defaults: sparsity=0.7, query_block=32" in outcome.out


def test_no_tensor_is_read(command: Run, salad_file: Path, tmp_path: Path) -> None:
    """A file whose tensors are all damaged is inspected like a whole one."""
    data = bytearray(salad_file.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    data[header:] = b"\xff" * (len(data) - header)
    damaged = tmp_path / "salad.safetensors"
    damaged.write_bytes(data)
    whole, found = (command("inspect", file, "--json").json() for file in (salad_file, damaged))
    assert {**found, "file": ""} == {**whole, "file": ""}


def test_neither_diffusers_nor_a_compiler_is_loaded(salad_file: Path) -> None:
    code = (
        "import sys; from salad_compile.command_line import main\n"
        f"assert main(['inspect', {str(salad_file)!r}, '--json']) == 0\n"
        "assert not {'diffusers', 'triton', 'torch._inductor.compile_fx', 'transformers'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("kind", ["base", "truncated", "missing"])
def test_what_is_no_salad_file(command: Run, wan: Path, salad_file: Path, tmp_path: Path, kind: str) -> None:
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(salad_file.read_bytes()[:1000])
    file, said = {
        "base": (wan / "diffusion_pytorch_model.safetensors", "not a SALAD file"),
        "truncated": (truncated, "no complete safetensors file"),
        "missing": (tmp_path / "missing.safetensors", "no SALAD file at"),
    }[kind]
    outcome = command("inspect", file)
    assert outcome.code == WRONG
    assert said in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_slices_know_shape_and_dtype_without_reading(salad_file: Path) -> None:
    """What inspect relies on, of safetensors."""
    with safe_open(salad_file, framework="pt") as content:
        part = content.get_slice("blocks.0.attn1.salad.proj_weight")
        assert (list(part.get_shape()), part.get_dtype()) == ([24, 24], "F32")
