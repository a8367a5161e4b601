"""The checks of `salad-compile doctor`. None of them changes anything, and none fails because another one does.

:func:`clear_caches` is what it does on request.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salad_compile.common.reports import Report, Row, plural

if TYPE_CHECKING:
    from salad_compile.command_line.caches import Cache

FINE, WARNING, FAULT, MISSING = "ok", "warning", "FAULT", "-"
DISTRIBUTION = "salad-compile"
EXTRAS = ("diffusers", "train", "clips", "pictures")  # those that users install; a package may be in several
LITTLE_SPACE = 2**30  # bytes; a cache of compiled graphs can grow to some hundred million


@dataclass(frozen=True)
class Finding:
    """One checked thing. status: "ok", "warning", "FAULT", or "-" for what is optional and not there."""

    subject: str
    status: str
    detail: str
    mend: str = ""


@dataclass(frozen=True, repr=False)
class Checkup(Report):
    """All findings."""

    findings: tuple[Finding, ...]

    title = "this machine"
    columns = ("what", "state", "found", "to mend it")

    @property
    def healthy(self) -> bool:
        """Whether everything will work."""
        return not any(finding.status == FAULT for finding in self.findings)

    def rows(self) -> list[Row]:
        return [(f.subject, f.status, f.detail, f.mend) for f in self.findings]

    def notes(self) -> list[str]:
        faults, warnings = (sum(f.status == status for f in self.findings) for status in (FAULT, WARNING))
        return [f"{plural(faults, 'fault')}, {plural(warnings, 'warning')}"]

    def to_dict(self) -> dict[str, Any]:
        return {"healthy": self.healthy, "findings": [asdict(finding) for finding in self.findings]}


def examine(*, run: bool = False) -> Checkup:
    """All checks, in the order in which things build on each other.

    Args:
        run: also compute a small attention on every device.
    """
    checks: list[Callable[[], Iterator[Finding]]] = [
        _python,
        _packages,
        _compilers,
        _devices,
        _backend,
        _caches,
        _environment,
    ]
    if run:
        checks.append(_attempts)
    return Checkup(tuple(finding for check in checks for finding in _catch(check)))


def _catch(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except Exception as error:  # a check that fails is a finding: everything here may be broken
        yield Finding(
            check.__name__.removeprefix("_"), FAULT, f"the check itself failed: {type(error).__name__}: {error}"
        )


# --- versions ---------------------------------------------------------------------------------------------------------


def _python() -> Iterator[Finding]:
    supported = (3, 11) <= sys.version_info[:2] <= (3, 13)
    mend = "" if supported else "use Python 3.11, 3.12 or 3.13"
    detail = f"{platform.python_version()} on {platform.platform()}"
    yield Finding("Python", FINE if supported else FAULT, detail, mend)


def _packages() -> Iterator[Finding]:
    """This package and the packages that its metadata requires."""
    from packaging.requirements import Requirement

    from salad_compile.common.version import __version__

    here = Path(__file__).resolve().parents[1]
    try:
        distribution = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        yield Finding(
            DISTRIBUTION, WARNING, f"{__version__} in {here}, not installed", "pip install salad-compile, or -e CLONE"
        )
        return
    same = distribution.version == __version__
    yield Finding(
        DISTRIBUTION,
        FINE if same else WARNING,
        f"{__version__} in {here}" + ("" if same else f", but {distribution.version} is installed"),
        "" if same else "two versions are on the path: uninstall one, or install this one again",
    )
    for text in distribution.requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _package(requirement, None)
        else:
            extra = next((each for each in EXTRAS if requirement.marker.evaluate({"extra": each})), "")
            if extra and not requirement.name.startswith(DISTRIBUTION):
                yield _package(requirement, extra)
    yield from _optional("peft", "loads what export writes for it; not needed here")


def _package(requirement: Any, extra: str | None) -> Finding:
    install = (
        f"pip install '{DISTRIBUTION}[{extra}]'"
        if extra
        else f"pip install '{requirement.name}{requirement.specifier}'"
    )
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(requirement.name, MISSING if extra else FAULT, "not installed", install)
    if requirement.specifier.contains(version, prereleases=True):
        return _importable(requirement.name, version, FAULT if extra is None else WARNING)
    detail = f"{version}, but {requirement.specifier} is needed"
    return Finding(requirement.name, WARNING if extra else FAULT, detail, install)


def _importable(name: str, version: str, otherwise: str) -> Finding:
    """Whether what is installed can be imported: a file may be missing, or a library that it links to."""
    try:
        importlib.import_module(_module_of(name))
    except Exception as error:  # whatever a broken package raises
        detail = f"{version}, but importing it fails: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return Finding(name, otherwise, detail, f"install it anew: pip install --force-reinstall {name}")
    return Finding(name, FINE, version)


def _module_of(distribution: str) -> str:
    """The module that a distribution is imported by: its own name, or the first that it has."""
    plain = distribution.lower().replace("-", "_")
    owned = [module for module, names in _owners().items() if plain in [n.lower().replace("-", "_") for n in names]]
    return plain if plain in owned else next((name for name in sorted(owned) if not name.startswith("_")), plain)


@functools.cache
def _owners() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


def _optional(name: str, purpose: str) -> Iterator[Finding]:
    try:
        yield _importable(name, importlib.metadata.version(name), WARNING)
    except importlib.metadata.PackageNotFoundError:
        yield Finding(name, MISSING, f"not installed; {purpose}")


# --- what compiles and runs -------------------------------------------------------------------------------------------


def _compilers() -> Iterator[Finding]:
    """Inductor compiles C++ for CPUs, Triton a stub in C for GPUs."""
    import torch

    found = _first_tool("CXX", ("g++", "clang++", "c++"))
    mend = "" if found else "install g++ or clang++, or set CXX; until then lowering='aot_eager' works, more slowly"
    without = WARNING if torch.cuda.is_available() else FAULT
    yield Finding("C++ compiler", FINE if found else without, found or "none, which Inductor needs on CPUs", mend)
    if torch.cuda.is_available():
        found = _first_tool("CC", ("gcc", "clang", "cc"))
        mend = "" if found else "install gcc, or set CC"
        yield Finding("C compiler", FINE if found else FAULT, found or "none, which Triton needs", mend)


def _first_tool(variable: str, names: tuple[str, ...]) -> str | None:
    candidates = (os.environ[variable].split()[0],) if os.environ.get(variable) else names
    return next((path for path in map(shutil.which, candidates) if path), None)


def _devices() -> Iterator[Finding]:
    """Each device with the engine that computes the operators of this package there."""
    import torch

    yield Finding("cpu", FINE, f"engine {_engine(torch.device('cpu'))}, {plural(torch.get_num_threads(), 'thread')}")
    if not torch.cuda.is_available():
        yield _no_gpu(torch.version.cuda)
        return
    for number in range(torch.cuda.device_count()):
        yield _gpu(torch.device("cuda", number))


def _no_gpu(cuda: str | None) -> Finding:
    if Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi"):
        why = (
            "torch is a build without CUDA" if cuda is None else "torch sees no device (CUDA_VISIBLE_DEVICES? driver?)"
        )
        return Finding("cuda", FAULT, f"an NVIDIA driver is here, but {why}", "install a CUDA build of torch")
    return Finding("cuda", MISSING, "no NVIDIA GPU: everything runs on the CPU, which is for trying out")


def _gpu(device: Any) -> Finding:
    import torch

    from salad_compile.kernels.errors import UnsupportedKernelError

    properties = torch.cuda.get_device_properties(device)
    detail = (
        f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability "
        f"{properties.major}.{properties.minor}"
    )
    try:
        return Finding(str(device), FINE, f"{detail}, engine {_engine(device)}")
    except UnsupportedKernelError as error:
        return Finding(str(device), FAULT, detail, str(error))


def _engine(device: Any) -> str:
    """The engine of the usual call. Raises UnsupportedKernelError if there is none."""
    import torch

    from salad_compile.kernels.engines import Call, choose

    call = Call(
        "block_sparse_attention", device, torch.bfloat16, head_dim=64, value_dim=64, query_block=128, key_block=64
    )
    return choose(call).name


def _backend() -> Iterator[Finding]:
    """Whether torch.compile(backend="salad") finds us without an import."""
    import torch

    known = "salad" in torch._dynamo.list_backends()
    yield Finding(
        'backend "salad"',
        FINE if known else FAULT,
        "torch.compile knows it" if known else "torch.compile does not know it: the entry point is not installed",
        "" if known else "install the package (pip install -e CLONE), so that its entry points are written",
    )


# --- caches and settings ----------------------------------------------------------------------------------------------


def _caches() -> Iterator[Finding]:
    from salad_compile.command_line.caches import caches

    yield from map(_cache, caches())


def _cache(cache: Cache) -> Finding:
    name, place = cache.name, cache.place
    there = next((folder for folder in (place, *place.parents) if folder.exists()), Path("/"))
    if not os.access(there, os.W_OK):
        return Finding(name, WARNING, f"{place} cannot be written", "everything compiles anew in each process: mend it")
    detail = f"{place}, " + (f"{cache.size() / 2**20:.1f} MiB" if place.exists() else "not there yet")
    free = shutil.disk_usage(there).free
    if free < LITTLE_SPACE:
        mend = "make room, or --clear-caches"
        return Finding(name, WARNING, f"{detail}, {free / 2**20:.0f} MiB left on its disk", mend)
    return Finding(name, FINE, detail)


def clear_caches() -> Checkup:
    """Empty all caches; what does not belong to them stays, and is told."""
    from salad_compile.command_line.caches import caches

    findings = []
    for cache in caches():
        gone, left = cache.clear()
        kept = f"; left, not of this cache: {', '.join(left[:5])}" if left else ""
        findings.append(Finding(cache.name, FINE, f"{cache.place}, {gone / 2**20:.1f} MiB deleted{kept}"))
    return Checkup(tuple(findings))


# variable -> (values under which it does nothing, state, what it does, what to do)
VARIABLES = {
    "TORCH_COMPILE_DISABLE": (("", "0"), FAULT, "torch.compile does nothing", "unset it"),
    "TORCHDYNAMO_DISABLE": (("", "0"), FAULT, "torch.compile does nothing", "unset it"),
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": (("", "0"), WARNING, "each process compiles anew", "unset it"),
    "TRITON_INTERPRET": (("", "0"), WARNING, "kernels are interpreted, for tests only", "unset it"),
    "SALAD_CHECK_INDICES": (("", "0"), WARNING, "each attention call waits for the device", "unset it"),
    "DIFFUSERS_ATTN_BACKEND": (
        ("", "native"),
        WARNING,
        "diffusers calls other kernels, and no attention may be found",
        "unset it, or set it to native",
    ),
}


def _environment() -> Iterator[Finding]:
    for name, (quiet, status, effect, mend) in VARIABLES.items():
        value = os.environ.get(name, "")
        if value not in quiet:
            yield Finding(name, status, f"is {value!r}: {effect}", mend)


# --- trying it --------------------------------------------------------------------------------------------------------


def _attempts() -> Iterator[Finding]:
    """A small attention on every device, compared with dense attention in fp64."""
    import torch

    devices = [torch.device("cpu"), *(torch.device("cuda", n) for n in range(torch.cuda.device_count()))]
    for device in devices:
        try:
            yield _attempt(device)
        except Exception as error:  # whatever a driver, a compiler or a kernel raises
            yield Finding(f"run on {device}", FAULT, f"{type(error).__name__}: {str(error).splitlines()[0]}")


def _attempt(device: Any) -> Finding:
    """All blocks are kept, so the result is dense attention's; the bound is the rounding of the dtype."""
    import torch

    from salad_compile.kernels import block_sparse_attention
    from salad_compile.kernels.layout import ALL_BLOCKS

    dtype, bound = (torch.bfloat16, 2e-2) if device.type == "cuda" else (torch.float32, 1e-5)
    query, key, value = torch.randn(3, 1, 2, 300, 64, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    count = torch.full((1, 2, 5), ALL_BLOCKS, dtype=torch.int32, device=device)
    lut = torch.zeros(1, 2, 5, 1, dtype=torch.int32, device=device)
    out, _ = block_sparse_attention(query, key, value, lut, count, 64, 64, 64**-0.5)
    dense = torch.nn.functional.scaled_dot_product_attention(query.double(), key.double(), value.double())
    error = float((out.double() - dense).norm() / dense.norm())
    fine = error < bound
    mend = "" if fine else "the kernels compute something wrong here: please report this machine"
    detail = f"block-sparse attention in {str(dtype).removeprefix('torch.')}, relative error {error:.1e}"
    return Finding(f"run on {device}", FINE if fine else FAULT, detail, mend)
