"""What a site computes: its choices are those of the kernels, and importing it loads no torch."""

from __future__ import annotations

import subprocess
import sys

from salad_compile.definition.spec import BLOCK_SIZES, FEATURE_MAPS
from salad_compile.kernels import capability
from salad_compile.kernels.linear import feature_maps


def test_the_choices_are_what_the_kernels_have() -> None:
    assert BLOCK_SIZES == capability.BLOCK_SIZES
    assert set(FEATURE_MAPS) == set(feature_maps.FEATURE_MAPS)


def test_a_configuration_is_checked_without_torch() -> None:
    code = (
        "import sys; from salad_compile.config import SaladConfig\n"
        "SaladConfig(pattern='stswa', feature_map='elu', key_block=32)\n"
        "try: SaladConfig(pattern='stwsa')\n"
        "except ValueError: sys.exit('torch' in sys.modules)\n"
        "sys.exit(2)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
