"""What a clean process sees: imports, the entry point, a wheel. Who may import whom is held by `make lint`."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from tools.absolute_links import readme

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("triton", "torch._inductor", "torch._dynamo", "diffusers", "transformers", "rich", "huggingface_hub")


def run_clean(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, json, salad_compile; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(run_clean(code))
    assert not [name for name in loaded if name == "torch" or name.startswith(HEAVY)]


def test_modules_load_neither_triton_nor_inductor_nor_diffusers() -> None:
    """torch itself imports some of what we must not: only what comes on top of it counts.

    One after another in one process, so that what is heavy is blamed on the first that loads it.
    """
    modules = [
        "kernels",
        "conversion.convert",
        "discovery.discover",
        "salad_files.salad_file",
        "backend.dynamo",
        "analysis.inspection",
    ]
    code = (
        "import sys, json, importlib, torch, torch.library, torch._subclasses.fake_tensor\n"
        "loaded = {}\n"
        f"for module in {modules}:\n"
        "    before = set(sys.modules)\n"
        "    importlib.import_module(f'salad_compile.{module}')\n"
        "    loaded[module] = sorted(set(sys.modules) - before)\n"
        "print(json.dumps(loaded))"
    )
    loaded = json.loads(run_clean(code))
    assert list(loaded) == modules
    heavy = ("triton", "torch._inductor", "diffusers", "transformers", "rich", "huggingface_hub")
    assert not [(module, name) for module in modules for name in loaded[module] if name.startswith(heavy)]


def test_the_folder_found_as_a_top_level_package_registers_nothing() -> None:
    """As transformers does it when it looks for the published `kernels`, with the repository's root on the path."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import kernels; assert 'torch' not in sys.modules; "
        "import salad_compile.kernels, torch; assert salad_compile.kernels.select_blocks; "
        "q = torch.ones(1, 1, 32, 8); f = salad_compile.kernels.measure_executions\n"
        "with f() as seen:\n"
        "    lut, count = torch.zeros(1, 1, 2, 1, dtype=torch.int32), torch.ones(1, 1, 2, dtype=torch.int32)\n"
        "    torch.ops.salad.block_sparse_attention(q, q, q, lut, count, 16, 16, 1.0)\n"
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


def test_a_wheel_holds_the_linked_folders(tmp_path: Path) -> None:
    """passes/ and kernels/ reach the package by links, and an editable install does not notice when one is missing."""
    copy = tmp_path / "source"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info"))
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], check=True, cwd=copy, capture_output=True, timeout=600)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    rooms = {path.parent.relative_to(ROOT) for path in (ROOT / "salad_compile").rglob("__init__.py")}
    for top in ("passes", "kernels"):
        rooms |= {"salad_compile" / path.parent.relative_to(ROOT) for path in (ROOT / top).rglob("__init__.py")}
    names = {str(room) for room in rooms}
    assert {"salad_compile/passes", "salad_compile/kernels/block_sparse", "salad_compile/sites"} <= names
    assert [name for name in names if f"{name}/__init__.py" not in held] == []
    assert not [name for name in held if name.startswith(("kernels/", "passes/", "tests/"))]
    metadata = zipfile.ZipFile(wheel).read(next(name for name in held if name.endswith("/METADATA"))).decode()
    head, _, shown = metadata.partition("\n\n")
    assert "\nDescription-Content-Type: text/markdown" in head
    assert shown.strip() == readme().strip(), "what an index shows"


def test_an_sdist_is_the_whole_repository(tmp_path: Path) -> None:
    """Tests read documents, documents are checked against scripts, scripts read results: a part of it is of no use."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a clone: nothing says what belongs to it")
    copy = tmp_path / "source"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info"))
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], check=True, cwd=copy, capture_output=True, timeout=600)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert [name for name in tracked.stdout.splitlines() if name not in held and (ROOT / name).exists()] == []


def test_extras_name_extras_that_there_are() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for name, requirements in extras.items():
        for requirement in requirements:
            for named in re.findall(rf"^{project['name']}\[(.+)\]", requirement):
                assert set(named.split(",")) <= extras.keys() - {name}


def test_versions_and_pythons_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"\nversion: {project['version']}\n" in (ROOT / "CITATION.cff").read_text()
    named = [each.rpartition(" ")[2] for each in project["classifiers"] if "Python :: 3." in each]
    assert project["requires-python"] == f">={named[0]},<3.{int(named[-1].partition('.')[2]) + 1}"
