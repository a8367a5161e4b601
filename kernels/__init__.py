"""The operators under SALAD, registered as `torch.ops.salad.*`: routing, block-sparse attention, linear attention.

Each folder holds one operator: `api.py` (schema, checks, fake, autograd), `reference.py` (its definition in plain
torch) and one file per engine. `engines/` says which engine computes what. Importing this package registers the
operators; it imports nothing else of ours.
"""

# Wherever the repository's root is on the path, transformers, which peft imports, looks for the published package
# `kernels` and finds this folder. A second copy would register the operators again, and nothing would see them run.
if __name__ != "kernels":
    from .block_sparse import block_sparse_attention
    from .engines import use_engine
    from .errors import KernelArgumentError, KernelDifferentiationError, KernelExchangeError, UnsupportedKernelError
    from .linear import linear_output, linear_state
    from .mass import select_by_mass
    from .measure import Execution, measure_executions
    from .prepare import prepare_operand
    from .routing import kept_blocks, pool_blocks, select_blocks
    from .rows import take_rows
    from .tail import attend_with_tail, tail_means, tail_tokens, take_rows_with_means
    from .windows import window_blocks

__all__ = [
    "Execution",
    "KernelArgumentError",
    "KernelDifferentiationError",
    "KernelExchangeError",
    "UnsupportedKernelError",
    "attend_with_tail",
    "block_sparse_attention",
    "kept_blocks",
    "linear_output",
    "linear_state",
    "measure_executions",
    "pool_blocks",
    "prepare_operand",
    "select_blocks",
    "select_by_mass",
    "tail_means",
    "tail_tokens",
    "take_rows",
    "take_rows_with_means",
    "use_engine",
    "window_blocks",
]
