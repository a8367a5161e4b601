"""Sizes that keep the product readable: a file has at most 400 lines, a function 60, a Triton kernel 100."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("salad_compile", "passes", "kernels")
FILE, FUNCTION, KERNEL = 400, 60, 100

# still over their limit; an entry goes when its function is split
OVER: set[str] = set()


def too_long(name: str, text: str) -> Iterator[str]:
    """What of a file is over its limit; nested functions count for the outer one and for themselves."""
    lines = text.count("\n")
    if lines > FILE:
        yield f"{name}: {lines} lines, at most {FILE}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            decorators = " ".join(map(ast.unparse, node.decorator_list))
            limit = KERNEL if "triton.jit" in decorators or "gluon.jit" in decorators else FUNCTION
            size = (node.end_lineno or node.lineno) - node.lineno + 1
            if size > limit:
                yield f"{name}: {node.name} has {size} lines, at most {limit}"


def test_files_and_functions_fit_on_a_screen() -> None:
    files = {file.resolve() for room in ROOMS for file in (ROOT / room).rglob("*.py")}
    assert len(files) > 100
    found = [line for file in sorted(files) for line in too_long(str(file.relative_to(ROOT)), file.read_text())]
    left = [line for line in found if line.partition(" has ")[0] not in OVER]
    assert not left, "\n".join(left)
    assert {line.partition(" has ")[0] for line in found} == OVER, "an entry of OVER is done: take it out"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\n" * 401, "a.py: 401 lines, at most 400"),
        ("def f():\n" + "    x = 1\n" * 60, "a.py: f has 61 lines, at most 60"),
        ("@triton.jit\ndef f():\n" + "    x = 1\n" * 100, "a.py: f has 101 lines, at most 100"),
        ("@gluon.jit\ndef f():\n" + "    x = 1\n" * 100, "a.py: f has 101 lines, at most 100"),
    ],
)
def test_what_is_too_long_is_named(text: str, said: str) -> None:
    assert list(too_long("a.py", text)) == [said]
