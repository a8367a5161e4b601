"""What a clean process sees: imports, the entry point, and the rule of who may import whom."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("triton", "torch._inductor", "torch._dynamo", "diffusers", "transformers", "rich", "huggingface_hub")


def run_clean(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, json, salad_compile; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(run_clean(code))
    assert not [name for name in loaded if name == "torch" or name.startswith(HEAVY)]


@pytest.mark.parametrize("module", ["kernels", "conversion", "discovery", "checkpoint", "backend", "inspection"])
def test_modules_load_neither_triton_nor_inductor_nor_diffusers(module: str) -> None:
    """torch itself imports some of what we must not: only what comes on top of it counts."""
    code = (
        "import sys, json, torch, torch.library, torch._subclasses.fake_tensor; before = set(sys.modules); "
        f"import salad_compile.{module}; print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    loaded = json.loads(run_clean(code))
    heavy = ("triton", "torch._inductor", "diffusers", "transformers", "rich", "huggingface_hub")
    assert not [name for name in loaded if name.startswith(heavy)]


def test_the_folder_found_as_a_top_level_package_registers_nothing() -> None:
    """As transformers does it when it looks for the published `kernels`, with the repository's root on the path."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import kernels; assert 'torch' not in sys.modules; "
        "import salad_compile.kernels, torch; assert salad_compile.kernels.select_blocks; "
        "q = torch.ones(1, 1, 32, 8); f = salad_compile.kernels.measure_executions\n"
        "with f() as seen:\n"
        "    lut, count = torch.zeros(1, 1, 2, 1, dtype=torch.int32), torch.ones(1, 1, 2, dtype=torch.int32)\n"
        "    torch.ops.salad.block_sparse_attention(q, q, q, lut, count, None, 16, 16, 1.0)\n"
        "print(len(seen))"
    )
    assert run_clean(code).strip() == "1"


def test_the_backend_works_in_a_process_that_never_imports_the_package() -> None:
    code = """
import sys, torch, torch.nn as nn, torch.nn.functional as F
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)
    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v)
model, x = Attention(), torch.randn(1, 300, 16)
assert "salad" in torch._dynamo.list_backends()
assert not any(name.startswith("salad_compile") for name in sys.modules)
options = {"sparsity": 0.5, "min_tokens": 256, "query_block": 64, "key_block": 64, "lowering": "aot_eager"}
out = torch.compile(model, backend="salad", options=options)(x)
dense = model(x)
print(float((out - dense).norm() / dense.norm()))
"""
    assert 1e-3 < float(run_clean(code)) < 1


def test_the_entry_point_stands_alone() -> None:
    """register_backend beside the entry point ends in "duplicate name" for those who did not import us first."""
    sources = [path.read_text() for path in ROOT.glob("salad_compile/**/*.py")]
    assert not any("register_backend" in source for source in sources)


def test_every_package_is_installed() -> None:
    """The list in pyproject.toml is by hand, and an editable install does not notice when one is missing."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {name: ROOT / folder for name, folder in settings["package-dir"].items()}
    found = {
        ".".join([name, *path.parent.relative_to(folder).parts])
        for name, folder in folders.items()
        for path in folder.rglob("__init__.py")
    }
    assert sorted(settings["packages"]) == sorted(found)


# package -> what it may import of ours; functions may import more, lazily
ALLOWED = {
    "kernels": {"kernels"},
    "passes": {
        *("passes", "attention", "attention_call", "config", "errors", "logs", "tag"),
        *("branch_tensors", "token_layout", "position_flow", "position_slice"),
        *("flex", "manual_attention", "multihead", "split_frames"),  # more kinds of attention calls, and graph breaks
    },
}


def imports_of(path: Path, package: str) -> set[str]:
    """First parts, below salad_compile, of everything that a file imports at any depth."""
    depth = len(path.relative_to(ROOT).parts) - 1  # 1 in passes/, 2 in kernels/linear/
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            for name in names:
                if node.level:
                    inside = node.level <= depth
                    found.add(package if inside else name.split(".")[0])
                elif name.startswith("salad_compile."):
                    found.add(name.split(".")[1])
        elif isinstance(node, ast.Import):
            found.update(alias.name.split(".")[1] for alias in node.names if alias.name.startswith("salad_compile."))
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_who_may_import_whom(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        forbidden = imports_of(path, package) - ALLOWED[package]
        assert not forbidden, f"{path.relative_to(ROOT)} imports {sorted(forbidden)}"


def test_only_the_entry_point_and_explain_know_the_backend() -> None:
    users = [
        path.name
        for folder in ("salad_compile", "passes", "kernels")
        for path in (ROOT / folder).rglob("*.py")
        if "backend" in imports_of(path, folder if folder != "salad_compile" else "")
        or "from .backend import" in path.read_text()
    ]
    assert users == ["inspection.py"]
