"""Three faults of Triton's interpreter, mended for tests only (seen in Triton 3.6.0 and 3.9.0).

* A bf16 `tl.dot` multiplies the 16-bit patterns as if they were integers. Here both operands become fp32 first, which
  is exact, and the products are summed in fp32, as the hardware does.
* fp32 to bf16 cuts the low bits off; the hardware rounds to the nearest even.
* With numpy 2.4 a loop bound that is a run-time value is a 1-element array, which `range` refuses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_cast = interpreter.InterpreterBuilder.cast_impl
_dot, _patch = interpreter.InterpreterBuilder.create_dot, interpreter._patch_lang_tensor


def _widened(handle: Any) -> Any:
    raw = handle.data
    return (raw.astype(np.uint32) << 16).view(np.float32) if raw.dtype == np.uint16 else raw


def _cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
    kinds = src.dtype.scalar, dst_type.scalar
    if kinds == (tl.bfloat16, tl.float32):
        return interpreter.TensorHandle(_widened(src), tl.float32)
    if kinds != (tl.float32, tl.bfloat16):
        return _cast(self, src, dst_type)
    bits = np.ascontiguousarray(src.data).view(np.uint32).reshape(np.shape(src.data))
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    quiet_nan = (bits >> 16) | 0x40  # rounding could carry a NaN over into an infinity
    return interpreter.TensorHandle(np.where(np.isnan(src.data), quiet_nan, rounded).astype(np.uint16), tl.bfloat16)


def _create_dot(self: Any, a: Any, b: Any, acc: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
        return _dot(self, a, b, acc, input_precision, max_num_imprecise_acc)
    product = np.matmul(_widened(a), _widened(b), dtype=np.float32)
    return interpreter.TensorHandle(product.astype(acc.data.dtype) + acc.data, acc.dtype.scalar)


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda t: int(np.asarray(t.handle.data).item()))


def mend() -> None:
    """Put the mended functions in their places."""
    interpreter.InterpreterBuilder.create_dot = _create_dot
    interpreter.InterpreterBuilder.cast_impl = _cast_impl
    interpreter._patch_lang_tensor = _patch_lang_tensor
