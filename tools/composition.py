"""docs/composition.md: what runs beside SALAD, from the outcomes of the tests that try it.

    make test-composition            installs the packages of others, runs the tests, writes the page

`tests/conftest.py` collects the outcomes when pytest is run with `--composition-table`, and calls :func:`write`.
`tests/test_composition_table.py` holds the page against `CELLS`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tools import composition_gpu
from tools.foreign_packages import install
from tools.support_table import UnusableError, table

ROOT = Path(__file__).resolve().parent.parent
SITE = Path(os.environ.get("SALAD_COMPOSITION_SITE", ROOT / "build" / "composition" / "site"))
REQUIREMENTS = ROOT / "tests" / "composition" / "requirements.txt"
PAGE = ROOT / "docs" / "composition.md"
COMMAND = "make test-composition"
COMPOSITION, TRAINERS, OURS = "tests/composition", "tests/trainers", "tests/salad_compile"


@dataclass(frozen=True)
class Cell:
    """One row of the table.

    Attributes:
        beside: what runs beside SALAD. how: what to do, or the error and what to do instead. test: the node id of the
            test, without parameters. works: what the test shows: that it
            works, or that it is refused.
    """

    beside: str
    how: str
    test: str
    works: bool = True

    def answer(self, outcomes: Mapping[str, str]) -> str:
        """The cell's answer; "no" in `outcomes` was ruled out before."""
        outcome = outcomes[self.test]
        if outcome != "yes":
            return f"not run here: {outcome.removeprefix('no (').removesuffix(')')}"
        return "yes" if self.works else "no, an error"


CELLS = (
    Cell(
        "a style LoRA of diffusers",
        "after conversion `pipe.load_lora_weights`; `enable_lora_hotswap` before compilation lets others follow it",
        f"{TRAINERS}/test_hot_swap.py::test_another_lora_of_diffusers",
    ),
    Cell(
        "the same, loaded before conversion",
        "it can be unloaded again afterwards",
        f"{TRAINERS}/test_adapters_first.py::test_an_adapter_that_was_there_before_can_be_unloaded",
    ),
    Cell(
        "a LoRA that is trained beside ours (PEFT)",
        "`salad_compile.set_trainable(model)` after diffusers froze ours",
        f"{TRAINERS}/test_adapters.py::test_peft_adapter_beside_ours_is_trained_and_ours_too",
    ),
    Cell(
        "a few-step LoRA (4 or 8 steps)",
        "load it beside a SALAD file of the base, or fuse it into the base and load the file then. Nobody "
        "measured the videos",
        f"{COMPOSITION}/test_loops.py::test_a_few_step_lora_and_a_salad_file_of_the_base",
    ),
    Cell(
        "the same, with a SALAD file saved after `merge_lora`",
        "`BaseModelMismatchError`: that file belongs to its merged weights; take the file with LoRA in it",
        f"{COMPOSITION}/test_loops.py::test_a_file_of_merged_weights_fits_no_other_base",
        works=False,
    ),
    Cell(
        "torchao, int8 or fp8 weights, after conversion",
        "`merge_lora`, `quantize_`, then compile: all blocks are one graph. Gates and projections stay in their dtype. "
        "Say `set_inductor_config=False` in its configuration, or the first call takes minutes: it has Inductor time "
        "variants of every kernel",
        f"{COMPOSITION}/test_quantised.py::test_torchao_after_conversion",
    ),
    Cell(
        "torchao, products in fp8 (by rows or tensors)",
        "the same",
        f"{COMPOSITION}/test_quantised.py::test_products_of_torchao_in_fp8",
    ),
    Cell(
        "torchao, before conversion",
        "`load` takes a quantised base; LoRA stays beside the quantised weights",
        f"{COMPOSITION}/test_quantised.py::test_torchao_before_conversion",
    ),
    Cell(
        "`merge_lora` into quantised weights",
        "`MergeError`: merge before quantising, or `dequantise=True`",
        f"{COMPOSITION}/test_quantised.py::test_merging_into_quantised_weights_is_an_error",
        works=False,
    ),
    Cell(
        "GGUF weights",
        "`load` or `convert` a model that holds them as diffusers does (no file was read); blocks compile to one graph",
        f"{COMPOSITION}/test_quantised.py::test_gguf_before_conversion",
    ),
    Cell(
        "bitsandbytes, 8 and 4 bits, before conversion",
        "`load` or `convert` a model that holds them; blocks compile to one graph. `merge_lora` is a `MergeError`",
        f"{COMPOSITION}/test_quantised.py::test_bitsandbytes_before_conversion",
    ),
    Cell(
        "the same, after conversion",
        "`SiteLostError`: it puts other modules in the place of the projections; quantise first",
        f"{COMPOSITION}/test_quantised.py::test_bitsandbytes_after_conversion_is_an_error",
        works=False,
    ),
    Cell(
        "cache-dit, after conversion",
        "`convert` or `load`, `cache_dit.enable_cache(pipe, ...)`, then `compile_pipeline`",
        f"{COMPOSITION}/test_loops.py::test_cache_dit_after_conversion",
    ),
    Cell(
        "cache-dit, before conversion",
        "`InputsError`: it replaces the model's forward by one without a signature; convert first",
        f"{COMPOSITION}/test_loops.py::test_cache_dit_before_conversion_is_an_error",
        works=False,
    ),
    Cell(
        "diffusers' caches (first block, pyramid attention broadcast), uncompiled",
        "`model.enable_cache(...)` before conversion",
        f"{TRAINERS}/test_offloading.py::test_a_cache_before_conversion",
    ),
    Cell(
        "offloading (accelerate, diffusers' groups, disk), after conversion",
        "load first, then offload to a disk: the other way round is a `WrappedModelError`",
        f"{TRAINERS}/test_offloading.py::test_offloaded_after_conversion",
    ),
    Cell(
        "offloading, before conversion",
        "our parameters are moved with those of their site",
        f"{TRAINERS}/test_offloading.py::test_offloaded_before_conversion",
    ),
    Cell(
        "offloading (sequential, groups of leaves), compiled",
        '`torch.compile(model, backend="salad")`',
        f"{TRAINERS}/test_offloading.py::test_offloaded_and_compiled",
    ),
    Cell(
        "layerwise casting (fp8 storage)",
        "`model.enable_layerwise_casting(...)`, before or after",
        f"{TRAINERS}/test_offloading.py::test_layerwise_casting_before_and_after",
    ),
    Cell(
        "diffusers' attention backends (native, flash, flex)",
        "`model.set_attention_backend` before conversion or after; it is what cross-attention and dense steps run on",
        f"{COMPOSITION}/test_loops.py::test_another_attention_backend_before_conversion",
    ),
    Cell(
        "SageAttention through diffusers",
        '`model.set_attention_backend("sage")`, before or after; tried with a function of its name and signature',
        f"{COMPOSITION}/test_loops.py::test_sage_attention_through_diffusers",
    ),
    Cell(
        "guidance in one batch",
        "nothing: a batch of two is two forwards",
        f"{COMPOSITION}/test_loops.py::test_guidance_in_one_batch_is_two_forwards",
    ),
    Cell(
        "Wan2.2's two experts",
        "`convert(pipe)`, one file for each, `compile_pipeline(pipe)`",
        f"{OURS}/backend/test_pipelines.py::test_two_experts_from_conversion_to_a_compiled_run",
    ),
    Cell(
        "context parallelism (Ulysses)",
        "`enable_parallelism`, then `salad_compile.parallelise`; restrictions in [Inference](inference.md)",
        f"{TRAINERS}/test_context_parallel.py::test_two_processes_equal_one_and_say_what_they_cannot_do",
    ),
    Cell(
        "AOTInductor",
        "`torch.export.export`, `salad_compile.package_exported`",
        f"{OURS}/backend/test_exported_programs.py::test_a_package_runs_in_a_process_without_the_model",
    ),
    Cell(
        "FSDP2",
        "two processes on CPUs: convert, then shard: [Fine-tuning](fine_tuning.md#fsdp2)",
        f"{TRAINERS}/test_fsdp2.py::test_fsdp2_saves_what_one_process_saves",
    ),
)


def cell_of(node_id: str) -> str | None:
    """The test of `CELLS` that a node id belongs to, or None."""
    test = node_id.partition("[")[0]
    return test if test in {cell.test for cell in CELLS} else None


def add_outcome(outcomes: dict[str, str], test: str, outcome: str) -> None:
    """The worst of the test's parameters counts: a failure, then what was not run."""
    before = outcomes.get(test, "yes")
    outcomes[test] = before if before == "no" or outcome == "yes" else outcome


def write(outcomes: Mapping[str, str], versions: str) -> None:
    """Write the page.

    Args:
        outcomes: test -> "yes", "no (reason)" of a skip, or "no" of a failure. versions: what the tests ran on.

    Raises:
        UnusableError: a test was not run at all, or failed; nothing is written.
    """
    tests = [cell.test for cell in CELLS]
    absent, failed = [t for t in tests if t not in outcomes], [t for t in tests if outcomes.get(t) == "no"]
    for what, those in (("were not run", absent), ("failed", failed)):
        if those:
            raise UnusableError(f"{len(those)} of {len(tests)} tests {what}: {', '.join(those[:3])}")
    rows = [(cell.beside, cell.answer(outcomes), cell.how, _number(cell)) for cell in CELLS]
    numbered = "\n".join(f"{_number(cell)}. `{cell.test}`" for cell in CELLS)
    PAGE.write_text(f"""# Beside other things

<!-- Generated, do not edit: {COMMAND} -->

What else people run on the same pipeline, and whether SALAD runs beside it. Written from the outcomes of the tests in
the list below, on {versions}:
tiny models with random weights on a CPU, so this is about mechanics, not about speed or videos. "No" is an error, never
a wrong result. [What a GPU has shown](#on-a-gpu) is in the second table: CUDA graphs, and what concerns speed.

{table(("beside SALAD", "works", "how", "test"), rows)}

## On a GPU

{composition_gpu.render()}

<details markdown="1"><summary>The tests</summary>

{numbered}

</details>

To write this page again: `{COMMAND}`; the part of the GPU alone: `python -m tools.composition_gpu`.
""")


def _number(cell: Cell) -> str:
    """Of the cell's test in the list below the tables: names of tests are too long for a column."""
    return str(CELLS.index(cell) + 1)


def packages() -> str:
    """The packages of others and their versions, in words."""
    names = [line.replace("==", " ") for line in REQUIREMENTS.read_text().splitlines() if "==" in line]
    return f"{', '.join(names[:-1])} and {names[-1]}"


def main() -> int:
    """Install, run the tests, write the page; the exit status of pytest."""
    left = install(REQUIREMENTS, SITE)
    if left:
        print(f"{COMMAND} needs a network once, to fetch {', '.join(left)}", file=sys.stderr)
        return 1
    tests = list(dict.fromkeys(cell.test for cell in CELLS))
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--all-cases", "--composition-table", *tests]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
