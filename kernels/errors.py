"""What the operators raise when they are called wrongly."""


class KernelArgumentError(ValueError):
    """An argument of a `salad::` operator has a wrong shape, dtype, device or value; the message says which."""


class UnsupportedKernelError(KernelArgumentError):
    """The arguments are sound, but no kernel exists for this dtype, head_dim, block size or GPU; the message says which
    do, and which engine takes the rest."""


class KernelDifferentiationError(NotImplementedError):
    """Forward-mode or double differentiation reached a `salad::` operator, which has a backward pass alone."""


class KernelRecordError(ValueError):
    """A record of compiled kernels cannot be read; the message says why, and what writes one."""


class KernelExchangeError(RuntimeError):
    """Processes that share a sequence could not exchange it, most likely because one has ended; the message says which
    processes they are."""
