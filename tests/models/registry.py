"""Which video DiT classes the installed diffusers has, and which cases of the zoo stand for each.

A class is found by what it says of itself and by who uses it, not by a list: a new release of diffusers brings its new
classes in by itself, and `test_registry.py` fails until each has a case or a reason to have none.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import pkgutil
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from torch import nn

from tests.models.zoo import CASES, Case
from tests.models.zoo_handwritten import HANDWRITTEN_CASES
from tests.models.zoo_joint import JOINT_CASES
from tests.models.zoo_special import SPECIAL_CASES

ALL_CASES: Mapping[str, Case] = MappingProxyType({**CASES, **HANDWRITTEN_CASES, **JOINT_CASES, **SPECIAL_CASES})

WITHOUT_CASE: Mapping[str, str] = MappingProxyType(
    {
        "JoyImageEditTransformer3DModel": "edits images: one frame, whatever the name says",
        "JoyImageEditPlusTransformer3DModel": "edits images: one frame per reference and one for the result",
        "TransformerTemporalModel": "a layer of UNets that attends along time alone, not a DiT",
    }
)
"""Classes that the rules find and the zoo leaves out, with the reason."""

_VIDEO = re.compile(r"\bvideo", re.IGNORECASE)
_MAKES_VIDEO = re.compile(r"export_to_video|encode_video\(|postprocess_video")


def transformers() -> dict[str, type[nn.Module]]:
    """Every model class that is defined in `diffusers.models.transformers`, by name."""
    package = importlib.import_module("diffusers.models.transformers")
    base = importlib.import_module("diffusers").ModelMixin
    found: dict[str, type[nn.Module]] = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        own = [member for member in vars(module).values() if getattr(member, "__module__", "") == module.__name__]
        for member in own:
            if isinstance(member, type) and issubclass(member, base) and issubclass(member, nn.Module):
                found[member.__name__] = member
    return found


@functools.cache
def video_classes() -> Mapping[str, str]:
    """The transformers that make video, by name, each with the rule that says so.

    One of three is enough: the name ends in `Transformer3DModel`; the documentation of the class or of its forward
    speaks of video; a pipeline that makes video names the class.
    """
    used = _named_by_video_pipelines()
    found = {}
    for name, member in sorted(transformers().items()):
        documentation = f"{inspect.getdoc(member) or ''}\n{inspect.getdoc(member.forward) or ''}"
        if name.endswith("Transformer3DModel"):
            found[name] = "its name"
        elif _VIDEO.search(documentation):
            found[name] = "its documentation"
        elif name in used:
            found[name] = f"used by {used[name]}"
    return MappingProxyType(found)


def cases_of(name: str) -> tuple[str, ...]:
    """The cases that build the class ``name``."""
    return _by_class().get(name, ())


@functools.cache
def _by_class() -> dict[str, tuple[str, ...]]:
    by_class: dict[str, tuple[str, ...]] = {}
    for case in ALL_CASES.values():
        name = type(case.build()).__name__
        by_class[name] = (*by_class.get(name, ()), case.name)
    return by_class


def _named_by_video_pipelines() -> dict[str, str]:
    """Names in the source of a pipeline that makes video -> that pipeline's file; nothing is imported."""
    root = Path(importlib.import_module("diffusers").__file__ or "").parent
    used: dict[str, str] = {}
    for path in sorted((*root.glob("pipelines/**/*.py"), *root.glob("modular_pipelines/**/*.py"))):
        text = path.read_text()
        if _MAKES_VIDEO.search(text):
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Name):
                    used.setdefault(node.id, str(path.relative_to(root)))
    return used
