"""Attention over arrays where they lie."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from flashmoe.base.errors import OptionError
from flashmoe.native import loader as native

Floats = npt.NDArray[np.float32]


def attend(
    q: Floats,
    k: Floats,
    v: Floats,
    *,
    scale: float,
    causal: bool = False,
    mask: npt.NDArray[Any] | None = None,
    sinks: Floats | None = None,
) -> Floats:
    """softmax(scale q k^T, masked) v as [batch, queries, heads, v_dim] float32.

    `q` [batch, heads, queries, k_dim], `k` [batch, kv_heads, keys, k_dim], `v` [batch, kv_heads,
    keys, v_dim], float32 with any strides: nothing is copied. `mask`, broadcast to [batch, heads,
    queries, keys], is boolean (true: seen) or float32 and added; `sinks` [heads]. Rows have the
    same bits in any company. Raises OptionError for arguments that do not fit.
    """
    batch, heads, queries, k_dim = q.shape
    kv_heads, keys, v_dim = v.shape[1:]
    if k.shape != (batch, kv_heads, keys, k_dim) or v.shape[0] != batch:
        raise OptionError(f"k {list(k.shape)} and v {list(v.shape)} do not fit q {list(q.shape)}")
    if any(array.dtype != np.float32 for array in (q, k, v)):
        raise OptionError("attention is computed in float32 only")
    described = native.FmAttention(
        q=q.ctypes.data,
        k=k.ctypes.data,
        v=v.ctypes.data,
        q_strides=_strides(q),
        k_strides=_strides(k),
        v_strides=_strides(v),
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        queries=queries,
        keys=keys,
        k_dim=k_dim,
        v_dim=v_dim,
        scale=scale,
        mask_kind=native.CAUSAL_MASK if causal else native.NO_MASK,
    )
    if mask is not None:
        if causal or mask.dtype not in (np.dtype(np.bool_), np.dtype(np.float32)):
            raise OptionError(f"a mask of {mask.dtype} is not covered")
        mask = np.broadcast_to(mask, (batch, heads, queries, keys))
        described.mask = mask.ctypes.data
        described.mask_strides = _strides(mask)
        boolean = mask.dtype == np.bool_
        described.mask_kind = native.BOOLEAN_MASK if boolean else native.ADDED_MASK
    if sinks is not None:
        sinks = np.ascontiguousarray(sinks, np.float32)
        if sinks.shape != (heads,):
            raise OptionError(f"sinks must be [{heads}], not {list(sinks.shape)}")
        described.sinks = sinks.ctypes.data
    out = np.empty((batch, queries, heads, v_dim), np.float32)
    if out.size:
        native.check(native.loaded().fm_attend(ctypes.byref(described), out.ctypes.data))
    return out


def _strides(array: npt.NDArray[Any]) -> Any:
    """In elements."""
    size = array.dtype.itemsize
    return (ctypes.c_int64 * 4)(*(stride // size for stride in array.strides))
