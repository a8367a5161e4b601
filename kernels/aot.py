"""Compiling recorded launches for a GPU that need not be there, and what its assembler says about them."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

from .errors import UnsupportedKernelError
from .launch import Launch, interpreting
from .sass import spills_in_product_loops

# Bytes of shared memory that one CTA may have, by compute capability (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
_REGISTERS = 65536  # of one multiprocessor, on all of these
_TENSOR_MEMORY = 512  # columns, on sm_100
_PER_TILE = 64  # bytes
_NARROWEST_WGMMA = 64  # rows of the accumulator
_WIDE_DOT = re.compile(r"tt\.dot .*: tensor<(\d+)x\d+x(?:bf16|f16)> \*")


@dataclass(frozen=True)
class Specialised:
    """A launch as Triton would compile it for `arch`: equal `identity`, equal machine code."""

    kernel: Any
    arch: int
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: Any

    @property
    def identity(self) -> str:
        """Everything that the compiler sees, except the source."""
        name = f"{self.kernel.module}.{self.kernel.__qualname__}"
        return f"{name} {self.arch} {self.signature} {self.constants} {self.attributes} {self.options}"


@dataclass(frozen=True)
class Report:
    """What one kernel needs, and what is wrong with that."""

    arch: int
    warps: int
    registers: int
    spill_bytes: int
    shared: int
    tensor_memory: int
    wgmma: int
    tma: int
    seconds: float
    serialised: str = field(default="")
    """Why the assembler runs the matrix products of Hopper one after the other; empty where it does not."""
    wide_dot: bool = field(default=False)
    """Whether the kernel multiplies 16-bit tiles that are high enough for wgmma."""

    def faults(self) -> list[str]:
        """Why this kernel must not ship, in words; empty if it may."""
        found = []
        if self.spill_bytes:
            found.append(f"{self.spill_bytes} bytes of spilled registers are stored and loaded")
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"{self.shared} bytes of shared memory; sm_{self.arch} has {SHARED_LIMIT[self.arch]}")
        if self.tensor_memory > _TENSOR_MEMORY:
            found.append(f"{self.tensor_memory} columns of tensor memory; sm_{self.arch} has {_TENSOR_MEMORY}")
        # registers are handed out to a warp in units of 8 per thread
        needed = -(-self.registers // 8) * 8 * 32 * self.warps
        if needed > _REGISTERS:
            found.append(f"{self.registers} registers in {self.warps} warps make {needed}; there are {_REGISTERS}")
        if self.arch == 90 and self.wide_dot and not self.wgmma:
            found.append("no wgmma, although it multiplies 16-bit tiles of 64 or more rows")
        if self.serialised:
            found.append(f"wgmma instructions are serialised: {self.serialised}")
        return found


def specialise(launch: Launch, arch: int) -> Specialised:
    """Bind a recorded launch as Triton binds one that it runs: types, divisibility by 16, constants, None.

    Raises:
        UnsupportedKernelError: Triton interprets in this process.
        TypeError, KeyError: the arguments do not fit the kernel, or there is no such launch option.
    """
    if interpreting():
        raise UnsupportedKernelError("TRITON_INTERPRET is set: kernels cannot be compiled in this process")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    # Private: create_function_from_signature and JITFunction._pack_args, of which Triton's own launch is made (seen in
    # 3.6.0 and 3.9.0). They look at an argument's dtype and address, which meta tensors have.
    from triton.runtime.jit import create_function_from_signature

    kernel = launch.kernel
    backend = make_backend(GPUTarget("cuda", arch, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    keywords = launch.constants | launch.options
    bound, specialisation, _ = bind(*launch.arguments, **keywords)
    options, signature, constants, attributes = kernel._pack_args(backend, keywords, bound, specialisation, None)
    return Specialised(kernel, arch, signature, constants, attributes, options)


def compile_report(source: Specialised) -> Report:
    """Compile and read the assembler's log. Needs no GPU and no driver; a kernel takes from half a second to a few.

    Raises:
        whatever Triton raises if the kernel does not compile.
    """
    log, start = io.StringIO(), time.perf_counter()
    with _assembler_log(), contextlib.redirect_stdout(log):
        built = _build(source)
    return _read_report(source.arch, built, log.getvalue(), time.perf_counter() - start)


def disassemble(source: Specialised) -> str:
    """Compile and return the machine code in words, as the cuobjdump that comes with Triton prints it.

    Raises:
        whatever Triton raises if the kernel does not compile.
    """
    return _in_words(_build(source))


def _in_words(built: Any) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _build(source: Specialised) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget

    return triton.compile(
        _source_type(source.kernel)(source.kernel, source.signature, source.constants, source.attributes),
        target=GPUTarget("cuda", source.arch, 32),
        options=source.options.__dict__,
    )


def _source_type(kernel: Any) -> Any:
    """What Triton compiles `kernel` from.

    Private: `is_gluon` and `_runtime.GluonASTSource` (seen in 3.6.0 and 3.9.0), for a kernel in Gluon.
    """
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource
    from triton.compiler import ASTSource

    return ASTSource


@contextlib.contextmanager
def _assembler_log() -> Any:
    """While active, Triton compiles afresh and prints the log of ptxas.

    Private: Triton's knobs (seen in 3.6.0 and 3.9.0). The log is of the very ptxas call, with its flags, that makes
    the kernel: 3.9.0 chooses another ptxas for Hopper than 3.6.0 does.
    """
    from triton import knobs

    with contextlib.ExitStack() as stack:
        for knob in (knobs.cache, knobs.compilation, knobs.nvidia):
            stack.enter_context(knob.scope())
        knobs.cache.dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="salad_compile-"))
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        yield


def _spill_bytes(log: str, built: Any) -> int:
    """Bytes that are stored and loaded because registers ran out, where that costs time.

    Where warps are specialised, ptxas may keep numbers of a thread or of a tile in memory from one tile to the next.
    A few of these do not count if no loop over the steps of a tile, which is where the products are, touches memory.
    """
    stored, loaded = (sum(map(int, re.findall(rf"(\d+) bytes spill {way}", log))) for way in ("stores", "loads"))
    few = 0 < stored <= _PER_TILE and "ttg.warp_specialize" in built.asm["ttgir"]
    return 0 if few and spills_in_product_loops(_in_words(built)) == 0 else stored + loaded


def _read_report(arch: int, built: Any, log: str, seconds: float) -> Report:
    """Read the numbers from a compiled kernel and the log of ptxas."""
    registers = re.search(r"Used (\d+) registers", log)
    if registers is None:
        raise RuntimeError(f"the log of ptxas does not say how many registers are used:\n{log}")
    ptx, metadata = built.asm["ptx"], built.metadata
    serialised = re.search(r"wgmma\.mma_async instructions are serialized due to (.*?) (?:in|for) the function", log)
    return Report(
        arch=arch,
        warps=metadata.num_warps,
        registers=int(registers[1]),
        spill_bytes=_spill_bytes(log, built),
        shared=metadata.shared,
        tensor_memory=metadata.tmem_size or 0,
        wgmma=ptx.count("wgmma.mma_async"),
        tma=ptx.count("cp.async.bulk.tensor"),
        seconds=round(seconds, 2),
        serialised=serialised[1] if serialised else "",
        wide_dot=any(int(rows) >= _NARROWEST_WGMMA for rows in _WIDE_DOT.findall(built.asm.get("ttir", ""))),
    )
