"""Third-party packages that the wild models import and that are not here: names that lead nowhere.

Model files import much that their forward never calls: loggers, video readers, other accelerators' kernels, cluster
tools. For the packages in :data:`ABSENT`, importing works and gives names without function; whoever uses one in a
forward gets nonsense or an error, never a silent pass. Kernels for attention are not among them: without them the
models call torch's attention, as they do on a CPU.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SITE = Path(os.environ.get("SALAD_WILD_SITE", ROOT / "build" / "wild" / "site"))

ABSENT = frozenset(
    {
        "amdsmi",
        "attrs",
        "av",
        "bs4",
        "cv2",
        "decord",
        "dill",
        "distvae",
        "fastvideo_kernel",
        "frozendict",
        "fvcore",
        "hf_transfer",
        "imageio",
        "iopath",
        "librosa",
        "megatron",
        "modelscope",
        "omegaconf",
        "pandas",
        "pynvml",
        "quack",
        "ray",
        "remote_pdb",
        "scipy",
        "torchaudio",
        "torchvision",
        "transformer_engine",
        "wandb",
        "wcwidth",
    }
)

# Packages whose `__init__` imports much more than their models; those are imported past it.
BARE = (
    "simpletuner.helpers.models",
    "simpletuner.helpers.models.hunyuanvideo",
    "simpletuner.helpers.models.kandinsky5_video",
    "simpletuner.helpers.models.ltxvideo",
    "simpletuner.helpers.models.sanavideo",
    "simpletuner.helpers.models.wan",
    "wan",
    "wan.modules",
    "wan.modules.animate",
    "wan.modules.s2v",
)


class Nothing:
    """Takes every call, attribute and base-class use; computes nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass

    def __class_getitem__(cls, item: Any) -> type:
        return cls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A decorator without arguments leaves its function as it is."""
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else Nothing()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing()

    def __iter__(self) -> Iterator[Any]:
        return iter(())


class _Named(type):
    """Classes of an absent package have every attribute too, and are told from one another by name."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing()


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Last on `sys.meta_path`: asked only for what nobody else has."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in ABSENT or not _asked_from_site():
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name, "stands in for a package that is not installed")
        module.__path__ = []

        def attribute(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            value = _Named(name, (Nothing,), {})
            setattr(module, name, value)
            return value

        module.__getattr__ = attribute  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _asked_from_site() -> bool:
    """Whether the import stands in a file of a wild package: torch and diffusers look for what is installed."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if "importlib" not in file and file != __file__:
            return file.startswith(str(SITE))
        frame = frame.f_back  # type: ignore[assignment]
    return False


def open_site() -> None:
    """Make the wild packages importable, behind everything that is installed here; once."""
    if str(SITE) in sys.path:
        return
    for name in ("diffusers", "transformers"):  # they look once, at import, for what is installed
        importlib.import_module(name)
    sys.path.append(str(SITE))
    for name in BARE:
        package = types.ModuleType(name)
        package.__path__ = [str(SITE / name.replace(".", "/"))]
        sys.modules[name] = package
    sys.meta_path.append(_Finder())
