"""Which video DiT classes a package has, found by rule in its source: nothing is imported, so nothing can hide.

A class is a root of a video DiT if, in its own body or that of its base classes,

- it holds a stack of blocks: an `nn.ModuleList`, or layers made by a function called `make_layers`;
- it is a denoiser of video: its name ends in `Transformer3DModel`; or forward takes a timestep (or noise level) or the
  class embeds one, and its source speaks of video, frames or 5-D latents.

Modules that are parts of such a class and look the same from outside are in `WITHOUT_ENTRY` of the package's table,
each with its reason.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.wild.stand_ins import SITE

PACKAGES = (
    "cosmos_predict2",
    "diffsynth",
    "fastvideo",
    "finetrainers",
    "framepack",
    "hyvideo",
    "ltx_core",
    "ltx_video",
    "simpletuner",
    "vllm_omni",
    "wan",
    "x_transformers",
    "xfuser",
)

DISTRIBUTIONS = {"hyvideo": "hyvideo_fork", "wan": "wan22"}
"""Package -> what it is installed as, where that is another name."""

_STACK = re.compile(r"\bModuleList\(|\bmake_layers\(")
_TIME_ARGUMENT = re.compile(r"^(t|temb|sigmas?|.*time_?steps?.*)$")
_TIME_EMBEDDING = re.compile(
    r"self\.\w*(time_?(step|embed|proj|freq)|t_embed|condition_embed|adaln_single)\w*", re.IGNORECASE
)
_VIDEO = re.compile(r"video|num_frames|latent_frames|Conv3d|\bb c [tf] h w\b|\bB, ?C, ?[TF], ?H, ?W\b", re.IGNORECASE)


@dataclass(frozen=True)
class Found:
    """A class that the rule takes for a video DiT."""

    package: str
    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@functools.cache
def video_classes(package: str) -> tuple[Found, ...]:
    """Every video DiT class in a package of the wild site, in the order of its files."""
    own = _classes(SITE / package)
    known: dict[str, list[_Class]] = {}
    for each in (*own, *_classes(_diffusers_models())):
        known.setdefault(each.node.name, []).append(each)
    found = []
    for each in own:
        if _is_video_dit(list(_with_bases(each, known))):
            module = ".".join(each.file.relative_to(SITE).with_suffix("").parts)
            found.append(Found(package, module, each.node.name))
    return tuple(found)


@dataclass(frozen=True)
class _Class:
    file: Path
    node: ast.ClassDef
    source: str


def _is_video_dit(chain: list[_Class]) -> bool:
    name = chain[0].node.name
    forward = next((method for each in chain for method in _methods(each.node) if method.name == "forward"), None)
    if forward is None:
        return False
    source = "\n".join(each.source for each in chain)
    arguments = [argument.arg for argument in (*forward.args.args, *forward.args.kwonlyargs)]
    says_so = name.endswith(("Transformer3DModel", "Transformer3DWrapper"))
    denoises = any(_TIME_ARGUMENT.match(argument) for argument in arguments) or bool(_TIME_EMBEDDING.search(source))
    return bool(_STACK.search(source)) and (says_so or (denoises and bool(_VIDEO.search(source))))


def _classes(root: Path) -> list[_Class]:
    """Classes at the top of the modules below a folder that may be modules, in the order of the files."""
    found = []
    for file in sorted(root.rglob("*.py")):
        text = file.read_text()
        if "def forward" not in text and "ModuleList" not in text:
            continue
        lines = text.splitlines()
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef):
                found.append(_Class(file, node, "\n".join(lines[node.lineno - 1 : node.end_lineno])))
    return found


def _diffusers_models() -> Path:
    """Where classes of diffusers lie that others derive from."""
    spec = importlib.util.find_spec("diffusers")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "models" / "transformers"


def _with_bases(each: _Class, known: Mapping[str, list[_Class]], depth: int = 0) -> Iterator[_Class]:
    """A class, and its base classes as far as they are known: of several with one name that of the same file."""
    yield each
    for base in each.node.bases:
        name = ast.unparse(base).partition("[")[0].rpartition(".")[2]
        candidates = [other for other in known.get(name, ()) if other.node is not each.node]
        candidates.sort(key=lambda other: other.file != each.file)
        if candidates and depth < 5:
            yield from _with_bases(candidates[0], known, depth + 1)


def _methods(node: ast.ClassDef) -> Iterator[ast.FunctionDef]:
    return (method for method in node.body if isinstance(method, ast.FunctionDef))
