"""The ahead-of-time gate: what it compiles, and that it refuses kernels that must not ship."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import triton
import triton.language as tl

from salad_compile.kernels import UnsupportedKernelError, inspect
from salad_compile.kernels.aot import SHARED_LIMIT, Report, Specialised, compile_report, specialise
from salad_compile.kernels.engines import FOLDERS, Call, GateCall, find
from salad_compile.kernels.engines.torch import TorchEngine
from salad_compile.kernels.launch import interpreting, launch, record_launches

ROOT = Path(__file__).resolve().parents[2]
META = torch.device("meta")

pytestmark = pytest.mark.skipif(interpreting(), reason="nothing can be compiled in a process that interprets")


@triton.jit(do_not_specialize=["length"])
def product_kernel(x, out, order, length, stride, scale, negate, DEPTH: tl.constexpr, TILE_M: tl.constexpr):
    """out = x x^T of one (TILE_M, length) matrix, DEPTH columns at a time."""
    rows, columns = tl.arange(0, TILE_M), tl.arange(0, DEPTH)
    acc = tl.zeros((TILE_M, TILE_M), tl.float32)
    for start in range(0, length, DEPTH):
        tile = tl.load(x + rows[:, None] * stride + start + columns[None, :])
        acc = tl.dot(tile, tl.trans(tile), acc)
    if order is not None:
        rows = tl.load(order + rows)
    if negate:
        acc = -acc
    tl.store(out + rows[:, None] * TILE_M + tl.arange(0, TILE_M)[None, :], (acc * scale).to(out.dtype.element_ty))


def matrix(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty((128, 1024), dtype=dtype, device=META)


def product(
    x: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
    length: int = 1024,
    stride: int = 1024,
    *,
    depth: int = 64,
    tile: int = 64,
    **options: Any,
) -> None:
    x = matrix() if x is None else x
    options = {"num_warps": 4} | options
    launch(product_kernel, (1,), META, x, x, order, length, stride, 0.5, True, DEPTH=depth, TILE_M=tile, **options)


def specialised(arch: int = 90, **arguments: Any) -> Specialised:
    """The one launch of `product` as Triton would compile it."""
    with record_launches() as launches:
        product(**arguments)
    return specialise(launches[0], arch)


# --- how arguments are specialised ------------------------------------------------------------------------------------


def test_arguments_are_specialised_as_triton_does_it() -> None:
    source = specialised(order=torch.empty(64, dtype=torch.int32, device=META))
    assert source.signature == {
        "x": "*bf16",
        "out": "*bf16",
        "order": "*i32",
        "length": "i32",
        "stride": "i32",
        "scale": "fp32",
        "negate": "u1",
        "DEPTH": "constexpr",
        "TILE_M": "constexpr",
    }
    assert source.constants == {(7,): 64, (8,): 64}
    divisible = {position for (position,), attributes in source.attributes.items() if attributes}
    assert divisible == {0, 1, 2, 4}  # the pointers and the stride; not the length, which is not to be specialised
    assert (source.options.num_warps, source.options.num_stages) == (4, 1)


def test_none_and_one_are_constants_and_unaligned_memory_is_not_divisible() -> None:
    source = specialised(x=matrix()[:, 3:], stride=1, length=1)
    assert source.constants == {(2,): None, (4,): 1, (7,): 64, (8,): 64}
    assert source.signature["length"] == "i32"
    assert not any(source.attributes.get((position,)) for position in (0, 1))


@pytest.mark.parametrize(("stride", "kind"), [(1024, "i32"), (2**31 - 1, "i32"), (2**31, "i64")])
def test_the_width_of_an_integer_follows_its_value(stride: int, kind: str) -> None:
    assert specialised(stride=stride).signature["stride"] == kind


def test_a_length_compiles_no_new_kernel_and_everything_else_does() -> None:
    known = specialised().identity
    assert specialised(length=1023).identity == known
    for change in ({"stride": 1023}, {"tile": 32}, {"num_warps": 8}, {"num_stages": 2}, {"maxnreg": 128}, {"arch": 80}):
        assert specialised(**change).identity != known
    assert specialised(x=matrix(torch.float16)).identity != known


def test_descriptors_are_arguments_too() -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    @triton.jit
    def copy_kernel(source, out):
        tl.store(out + tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :], source.load([0, 0]))

    with record_launches() as launches:
        descriptor = TensorDescriptor.from_tensor(matrix(), [64, 64])
        launch(copy_kernel, (1,), META, descriptor, matrix(), num_warps=4)
    source = specialise(launches[0], 90)
    assert source.signature["source"].startswith("tensordesc<bf16[64, 64]")
    report = compile_report(source)
    assert report.tma > 0
    assert report.faults() == []


def test_an_option_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(KeyError, match="num_wraps"):
        specialised(num_wraps=4)


def test_a_process_that_interprets_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UnsupportedKernelError, match="TRITON_INTERPRET is set"):
        specialised()


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_a_good_kernel_has_no_fault(arch: int) -> None:
    report = compile_report(specialised(arch, num_stages=2))
    assert report.faults() == []
    assert report.arch == arch
    assert 16 < report.registers <= 255
    assert report.shared >= 64 * 64 * 2
    assert (report.wgmma > 0) == (arch == 90)
    assert report.wide_dot


def test_spilled_registers_are_a_fault() -> None:
    report = compile_report(specialised(80, maxnreg=32))
    assert report.spill_bytes > 0
    assert any(f"{report.spill_bytes} bytes of spilled registers" in fault for fault in report.faults())


def test_too_much_shared_memory_is_a_fault_where_there_is_less() -> None:
    settings = {"depth": 256, "num_stages": 7, "num_warps": 8}
    report = compile_report(specialised(80, **settings))
    assert SHARED_LIMIT[80] < report.shared < SHARED_LIMIT[90]
    assert report.faults() == [f"{report.shared} bytes of shared memory; sm_80 has 166912"]
    assert compile_report(specialised(90, **settings)).faults() == []


def test_a_wide_product_without_wgmma_is_a_fault_on_hopper_only() -> None:
    report = compile_report(specialised(90, num_warps=2))  # wgmma needs four warps
    assert report.wgmma == 0
    assert report.faults() == ["no wgmma, although it multiplies 16-bit tiles of 64 or more rows"]
    assert compile_report(specialised(90, tile=32, num_warps=2)).faults() == []
    assert compile_report(specialised(80, num_warps=2)).faults() == []


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, ""),
        ({"registers": 128, "warps": 16}, ""),
        ({"registers": 129, "warps": 16}, "129 registers in 16 warps make 69632; there are 65536"),
        ({"shared": 232448}, ""),
        ({"shared": 232449}, "232449 bytes of shared memory; sm_90 has 232448"),
        ({"arch": 100, "tensor_memory": 513}, "513 columns of tensor memory; sm_100 has 512"),
        ({"serialised": "lack of luck"}, "wgmma instructions are serialised: lack of luck"),
        ({"wgmma": 0, "wide_dot": False}, ""),
        ({"wgmma": 0, "arch": 80}, ""),
    ],
)
def test_limits(changes: dict[str, Any], fault: str) -> None:
    sound: dict[str, Any] = {
        "arch": 90,
        "warps": 8,
        "registers": 255,
        "spill_bytes": 0,
        "shared": 1024,
        "wide_dot": True,
    }
    sound |= {"tensor_memory": 0, "wgmma": 8, "tma": 0, "seconds": 1.0}
    assert Report(**sound | changes).faults() == ([fault] if fault else [])


# --- the list of what ships -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def jobs() -> list[inspect.Job]:
    return inspect.record_jobs((90,))


def modules(start: str) -> dict[str, list[Any]]:
    """Operator -> its modules whose name begins with `start`."""
    found: dict[str, list[Any]] = {}
    for folder in map(Path(inspect.__file__).parent.joinpath, set(FOLDERS.values())):
        names = [name for _, name, _ in pkgutil.iter_modules([str(folder)]) if name.startswith(start)]
        if names:
            package = f"{inspect.__package__}.{folder.name}"
            found[folder.name] = [importlib.import_module(f"{package}.{name}") for name in names]
    return found


def test_every_kernel_is_inspected(jobs: list[inspect.Job]) -> None:
    seen = {job.source.kernel for job in jobs}
    assert modules("triton_").keys() == modules("triton").keys() == set(FOLDERS.values())
    for operator, files in [*modules("triton_").items(), *modules("gluon_").items()]:
        for file in files:
            for name, kernel in vars(file).items():
                if name.endswith("_kernel"):
                    assert kernel in seen, f"{operator}: no call of an engine's gate_calls launches {name}"


def test_every_operator_is_called() -> None:
    engine = find("triton")
    assert {call.operator for call, *_ in engine.gate_calls(90)} == set(engine.operators)
    engine = find("gluon")
    assert {call.operator for call, *_ in engine.gate_calls(90)} == set(engine.operators)
    assert not list(engine.gate_calls(80))


class Toy(TorchEngine):
    """Launches `product` with other options for every name in `calls`."""

    name = "toy"
    calls: ClassVar[dict[str, dict[str, Any]]] = {"first": {}, "same": {"length": 77}}

    def gate_calls(self, arch: int) -> tuple[GateCall, ...]:
        call = Call("linear_state", META, torch.bfloat16)
        return tuple(GateCall(call, name, (options,)) for name, options in self.calls.items())

    def run(self, call: Call, *arguments: Any) -> None:
        product(**arguments[0])


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    engine = Toy()
    monkeypatch.setattr(inspect, "engines", lambda: (engine,))
    return engine


def test_equal_kernels_are_compiled_once(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy, "calls", Toy.calls | {"other": {"tile": 32, "num_stages": 3}})
    titles = [job.title for job in inspect.record_jobs([80, 90])]
    assert titles == [
        "linear.product first sm_80 M64 warps 4 stages 1",
        "linear.product other sm_80 M32 warps 4 stages 3",
        "linear.product first sm_90 M64 warps 4 stages 1",
        "linear.product other sm_90 M32 warps 4 stages 3",
    ]


def test_a_call_that_its_engine_does_not_support_is_an_error(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy, "supports", lambda call: "of its colour")
    with pytest.raises(UnsupportedKernelError, match="gate of engine 'toy' lists first: of its colour"):
        inspect.record_jobs([90])


# --- the command ------------------------------------------------------------------------------------------------------


def faulty_gate() -> int:
    """The command on three toys, of which one spills, and one is no kernel at all. Runs in a process of its own."""

    Toy.calls = {"good": {}, "spilling": {"maxnreg": 32}, "wrong": {"tile": 48}}
    inspect.engines = lambda: (Toy(),)
    return inspect.main(sys.argv[1:])


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in `folder`, compiling, with this module in reach."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # the last place, so that this checkout does not hide a package that was linked elsewhere
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (environment.get("PYTHONPATH"), str(ROOT))))
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )


def test_the_command_names_each_fault_and_fails(tmp_path: Path) -> None:
    code = "import sys; from tests.kernels.test_inspect import faulty_gate; sys.exit(faulty_gate())"
    done = command(tmp_path, "-c", code, "--arch", "80", "--workers", "2", "--json", "report.json")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "3 kernels in" in done.stdout
    assert "2 with faults" in done.stdout
    assert "FAULT linear.product spilling sm_80 M64 warps 4 stages 1 maxnreg 32: " in done.stdout
    assert "bytes of spilled registers" in done.stdout
    assert "FAULT linear.product wrong sm_80 M48 warps 4 stages 1: does not compile: CompilationError" in done.stdout
    rows = {row["call"]: row for row in json.loads((tmp_path / "report.json").read_text())}
    assert rows["good"]["faults"] == []
    assert rows["good"]["registers"] > 0
    assert rows["spilling"]["spill_bytes"] > 0


def test_the_command_on_kernels_that_ship(tmp_path: Path) -> None:
    words = "block_sparse.forward bfloat16 d64 64x64"
    options = ("--arch", "90", "--filter", words, "--json", "report.json")
    done = command(tmp_path, "-m", "salad_compile.kernels.inspect", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 with faults" in done.stdout
    rows = json.loads((tmp_path / "report.json").read_text())
    assert rows
    assert all(row["kernel"] == "block_sparse.forward" and row["wgmma"] > 0 for row in rows)


def test_kernels_are_chosen_by_their_words(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(
        inspect, "_compile_with_progress", lambda jobs, workers: seen.append([j.title for j in jobs]) or []
    )
    monkeypatch.setattr(toy, "calls", {"bfloat16 d64": {}, "float16 d64": {"tile": 32}, "bfloat16 d80": {"tile": 128}})
    every = ["--arch", "80", "90"]
    assert inspect.main([*every, "--filter", "sm_80 M64", "sm_90 float16"]) == 0
    assert inspect.main([*every, "--filter", "sm_90 d64", "--without", "float16"]) == 0
    assert inspect.main([*every, "--filter", "sm_90 !bfloat16", "sm_80 d64 !float16"]) == 0
    names = [[title.partition("product ")[2].partition(" warps")[0] for title in titles] for titles in seen]
    assert names[0] == [
        "bfloat16 d64 sm_80 M64",
        "bfloat16 d64 sm_90 M64",
        "float16 d64 sm_90 M32",
        "bfloat16 d80 sm_90 M128",
    ]
    assert names[1] == ["bfloat16 d64 sm_90 M64"]
    assert names[2] == ["bfloat16 d64 sm_80 M64", "float16 d64 sm_90 M32"]


def test_a_filter_that_matches_nothing_is_an_error(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main(["--arch", "80", "--filter", "no such kernel"]) == 2
    assert "no kernel matches 'no such kernel'" in capsys.readouterr().err
