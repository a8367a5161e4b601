"""What is said of an error: one sentence where it has one for users, else its traceback."""

from __future__ import annotations

from salad_compile.common.printable import printable
from salad_compile.errors import SaladError

_OUT_OF_MEMORY = "can't allocate memory"  # of the allocator of CPUs, whose class is RuntimeError
_WHAT_HELPS = (
    "fewer frames or a smaller size take less; in training micro_batch=1 and gradient_checkpointing, with which the "
    "newest checkpoint goes on (docs/troubleshooting.md, Out of memory)"
)


def own_error(error: Exception) -> Exception | None:
    """The error that has a message for users: ours, the system's, or ours in what torch wraps it in."""
    inner = getattr(error, "inner_exception", None)  # of torch._dynamo.exc.BackendCompilerFailed
    for candidate in (error, inner):
        if isinstance(candidate, (SaladError, OSError)) or type(candidate).__name__ == "UnsupportedKernelError":
            return candidate
    return None


def sentence_of(error: Exception) -> str | None:
    """What to print of it; None of what nobody foresaw."""
    own = own_error(error)
    if own is not None:
        return printable(str(own)) or type(own).__name__
    cause: BaseException | None = error
    while cause is not None:
        said = next(iter(str(cause).splitlines()), "")
        # torch is not imported for it: the class is torch.OutOfMemoryError, of GPUs
        if isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError" or _OUT_OF_MEMORY in said:
            return f"memory ran out: {_WHAT_HELPS}. {said or type(cause).__name__}"
        cause = cause.__cause__ or cause.__context__
    return None
