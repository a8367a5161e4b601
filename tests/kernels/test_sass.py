"""Reading machine code: loops that multiply, and spills in them."""

from __future__ import annotations

from salad_compile.kernels.sass import product_loops, spills_in_product_loops


def code(*instructions: str) -> str:
    """As cuobjdump prints it, 16 bytes for each."""
    return "\n".join(f"        /*{16 * i:04x}*/                   {text};" for i, text in enumerate(instructions))


KERNEL = (
    "LDL R0, [R1]",  # a tile begins
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], RZ",  # 0x10: a step begins
    "@!P0 BRA 0x90",
    "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0",
    "FADD R2, R2, R3",
    "@P1 BRA 0x10",
    "STL [R1], R0",
    "@P2 BRA 0x0",
    "EXIT",
    "@!P0 BRA 0x90",  # 0x90: waits once more
    "BRA 0x20",
)


def test_only_loops_over_steps_count() -> None:
    assert product_loops(code(*KERNEL)) == [list(KERNEL[1:6])]
    assert spills_in_product_loops(code(*KERNEL)) == 0


def test_a_spill_beside_products_is_seen() -> None:
    spilling = (*KERNEL[:4], "LDL.64 R2, [R1+0x8]", *KERNEL[5:])
    assert spills_in_product_loops(code(*spilling)) == 1


def test_code_without_loops_has_none() -> None:
    assert product_loops(code("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24", "EXIT")) == []
