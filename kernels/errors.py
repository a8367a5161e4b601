"""What the operators raise when they are called wrongly."""


class KernelArgumentError(ValueError):
    """An argument of a `salad::` operator has a wrong shape, dtype, device or value; the message says which."""
