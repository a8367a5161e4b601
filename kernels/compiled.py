"""A record of kernels that compiled without fault, so that nobody compiles again what nobody changed.

A kernel stands in it by a fingerprint of all that its machine code and the verdict on it follow from. Whatever changes
one of them changes the fingerprint, and the kernel is compiled anew.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import aot, sass
from .aot import Specialised
from .errors import KernelRecordError

_FORMAT = 1


def fingerprint(source: Specialised) -> str:
    """Of a kernel's code and that of what it calls, its constants, its arguments, and options; no paths.

    `cache_key` is what Triton looks up its own cache by: sources, with those of functions of Triton's that are called,
    and global constants. Settings that are objects decide by their properties too, so their classes count.
    """
    classes = {
        kind
        for value in source.constants.values()
        if dataclasses.is_dataclass(value)
        for kind in inspect.getmro(type(value))[:-1]
    }
    kernel, options = source.kernel, source.options.hash()
    called = f"{kernel.__qualname__} {source.arch} {source.signature} {source.constants} {source.attributes} {options}"
    texts = [called, kernel.cache_key, *sorted(map(inspect.getsource, classes))]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:24]


@functools.cache
def compiler(arch: int) -> str:
    """What compiles for a compute capability, and what judges the result: other versions, another text."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    judges = "".join(inspect.getsource(module) for module in (aot, sass))
    judged = hashlib.sha256(judges.encode()).hexdigest()[:12]
    backend = make_backend(GPUTarget("cuda", arch, 32))
    return f"Triton {triton.__version__}, {' '.join(backend.hash().split())}, judged by {judged}"


class Record:
    """The kernels of one file.

    Args:
        compilers: compute capability -> what compiled for it.
        kernels: fingerprint -> the kernel in words.
    """

    def __init__(self, compilers: Mapping[int, str], kernels: Mapping[str, str]) -> None:
        self.compilers, self.kernels = dict(compilers), dict(kernels)

    @classmethod
    def read(cls, path: Path) -> Record:
        """
        Raises:
            KernelRecordError: the file is not there, or is no record.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["format"] != _FORMAT:
                raise ValueError(f"format {found['format']!r}")
            compilers = {int(arch): str(text) for arch, text in found["compilers"].items()}
            return cls(compilers, {str(key): str(title) for key, title in found["kernels"].items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise KernelRecordError(
                f"{path} is no record of compiled kernels ({error}): `make gate` writes one"
            ) from error

    def write(self, path: Path) -> None:
        """In an order that follows from the kernels alone, so that a change shows what changed."""
        kernels = dict(sorted(self.kernels.items(), key=lambda entry: (entry[1], entry[0])))
        content: dict[str, Any] = {"format": _FORMAT, "compilers": self.compilers, "kernels": kernels}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def is_of_this_compiler(self, arch: int) -> bool:
        """Whether what it says of this compute capability would come out here."""
        return self.compilers.get(arch) == compiler(arch)

    def has(self, source: Specialised) -> bool:
        """Whether this very kernel was compiled, by this compiler, without fault."""
        return self.is_of_this_compiler(source.arch) and fingerprint(source) in self.kernels
