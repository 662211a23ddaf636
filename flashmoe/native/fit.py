"""Fitting affine codes to weights in one call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flashmoe.base.errors import OptionError
from flashmoe.native import loader as native
from flashmoe.native.matrix import FLOATS


def fit_groups(
    w: mx.array,
    scales: mx.array,
    biases: mx.array,
    *,
    bits: int,
    starts: Sequence[float],
    rounds: int,
    least_residual: float,
) -> tuple[mx.array, mx.array, mx.array]:
    """The best affine parameters of each group of `w` float32 [n, group], as fm_fit describes.

    `scales` and `biases` [n], of the dtype that the store has, are a candidate. Returns codes as
    MLX packs them, uint32 [n, group * bits / 32], scales and biases. Raises OptionError for what
    is not covered.
    """
    n_groups, group_size = w.shape
    if w.dtype != mx.float32 or scales.dtype not in FLOATS or biases.dtype != scales.dtype:
        raise OptionError(f"{w.dtype} weights with {scales.dtype} scales cannot be fitted")
    if scales.shape != (n_groups,) or biases.shape != (n_groups,):
        raise OptionError(f"{n_groups} groups have as many scales, not {scales.shape}")
    weights = np.array(w, np.float32, order="C", copy=None)
    found = [np.array(x.astype(mx.float32), np.float32) for x in (scales, biases)]
    codes = np.empty((n_groups, group_size * bits // 32), np.uint32)
    shares = np.array(starts, np.float32)
    description = native.FmFit(
        bits=bits,
        group_size=group_size,
        scale_dtype=FLOATS[scales.dtype],
        rounds=rounds,
        n_starts=len(shares),
        starts=shares.ctypes.data,
        least_residual=least_residual,
    )
    call: Any = native.loaded().fm_fit_groups
    arrays: list[npt.NDArray[Any]] = [codes, *found]
    native.check(
        call(
            weights.ctypes.data,
            n_groups,
            ctypes.byref(description),
            *(array.ctypes.data for array in arrays),
        )
    )
    fitted_scales, fitted_biases = (mx.array(x).astype(scales.dtype) for x in found)
    return mx.array(codes), fitted_scales, fitted_biases
