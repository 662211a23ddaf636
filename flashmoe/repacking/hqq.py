"""Half-quadratic quantization: affine scales and biases fitted to the weights, without data.

After Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023):
codes and affine parameters are found in turns, starting from the range of each group. Their
constants (p = 0.7, beta = 10) shrink residuals below 0.17 to nothing, so that for weights as
models have them the auxiliary variable of the splitting is zero and what is left is a
least-squares step, as here. Beyond the paper:

- the scale is fitted too, not only the zero;
- the norm has p = 2.5: large errors count for more, since the few large weights of a trained model
  matter most (below 2 they count for less, which did worse than rounding to nearest);
- each group starts from several shares of its range, because outliers hold the others apart;
- scales are stretched until the group has its old variance again. Fitted codes shrink the weights
  (the error is orthogonal to the codes), and three such products in a row shrink what an expert
  says by far more than their noise changes it;
- candidates are compared as the store will have them, scales rounded; where rounding to nearest is
  closer in that norm, it is taken.
"""

from __future__ import annotations

import mlx.core as mx

from flashmoe import native
from flashmoe.kernels.packing import pack_codes

ROUNDS = 10
P = 2.5
# Residuals below this share of a code's step count alike, or exact weights would fix a group.
LEAST_RESIDUAL = 0.01
# Shares of a group's range that the codes span at first. Finer codes gain nothing from clipping.
STARTS = {
    2: (1.0, 0.8, 0.6, 0.45),
    3: (1.0, 0.85, 0.7, 0.55),
    4: (1.0, 0.9, 0.8, 0.7),
    5: (1.0, 0.9),
    6: (1.0,),
    8: (1.0,),
}
# Weights times starts that are fitted at once: temporaries stay in a CPU's second-level cache,
# and fill a GPU. The native library has no temporaries.
CPU_CHUNK = 2**17
CHUNK = 2**23

Packed = tuple[mx.array, mx.array, mx.array]


def quantize(weight: mx.array, group_size: int, bits: int) -> Packed:
    """Weight [..., width] as what mx.quantize returns: packed codes uint32
    [..., width * bits / 32], scales and biases [..., width / group_size] in the weight's dtype.

    The width is a multiple of the group size. Everything is evaluated, a slice at a time.
    """
    *outer, width = weight.shape
    groups = weight.reshape(-1, group_size)
    on_cpu = mx.default_device() == mx.cpu
    is_native = on_cpu and native.available() is None
    at_once = CPU_CHUNK if on_cpu and not is_native else CHUNK
    step = max(at_once // (group_size * len(STARTS[bits])), 1)
    parts: list[Packed] = []
    for first in range(0, groups.shape[0], step):
        part = groups[first : first + step]
        if is_native:
            parts.append(_fit_natively(part, bits))
        else:
            codes, scales, biases = fit(part, bits)
            parts.append((pack_codes(codes, bits), scales, biases))
        mx.eval(parts[-1])
    packed, scales, biases = (mx.concatenate(list(part)) for part in zip(*parts, strict=True))
    result = (
        packed.reshape(*outer, width * bits // 32),
        scales.reshape(*outer, width // group_size),
        biases.reshape(*outer, width // group_size),
    )
    mx.eval(result)
    return result


def _fit_natively(groups: mx.array, bits: int) -> Packed:
    _, scales, biases = mx.quantize(groups, group_size=groups.shape[1], bits=bits)
    return native.fit_groups(
        groups.astype(mx.float32),
        scales.reshape(-1),
        biases.reshape(-1),
        bits=bits,
        starts=STARTS[bits],
        rounds=ROUNDS,
        least_residual=LEAST_RESIDUAL,
    )


def fit(groups: mx.array, bits: int) -> Packed:
    """Codes uint32 [n, group], scales and biases [n, 1] in the dtype of `groups` [n, group]."""
    levels = 2**bits - 1
    w = groups.astype(mx.float32)
    _, rtn_scales, rtn_biases = mx.quantize(groups, group_size=w.shape[1], bits=bits)
    mean = w.mean(axis=1, keepdims=True)
    spread = mx.square(w - mean).sum(axis=1, keepdims=True)

    low, high = w.min(axis=1, keepdims=True), w.max(axis=1, keepdims=True)
    range_step = (high - low) / levels
    scales = range_step * mx.array(STARTS[bits])[:, None, None]
    biases = (low + high) / 2 - scales * (levels / 2)
    for _ in range(ROUNDS):
        codes = nearest(w, scales, biases, levels)
        residual = mx.abs(codes * scales + biases - w)
        # Least squares with these weights lowers the sum of |residual|^p.
        importance = mx.power(residual + LEAST_RESIDUAL * range_step, P - 2)
        total = importance.sum(axis=-1, keepdims=True)
        code_mean = (importance * codes).sum(axis=-1, keepdims=True) / total
        w_mean = (importance * w).sum(axis=-1, keepdims=True) / total
        offsets = importance * (codes - code_mean)
        squares = (offsets * codes).sum(axis=-1, keepdims=True)
        fitted = (offsets * w).sum(axis=-1, keepdims=True) / squares
        scales = mx.where(squares > 0, fitted, scales)
        biases = mx.where(squares > 0, w_mean - scales * code_mean, biases)

    codes = nearest(w, scales, biases, levels)
    centre = codes.mean(axis=-1, keepdims=True)
    squares = mx.square(codes - centre).sum(axis=-1, keepdims=True)
    kept = mx.sqrt(spread / mx.maximum(squares, 1))
    scales = mx.where(squares > 0, mx.where(scales < 0, -kept, kept), scales)
    fitted_scales = scales.astype(groups.dtype)
    fitted_biases = (mean - fitted_scales.astype(mx.float32) * centre).astype(groups.dtype)

    # Rounding to nearest is the last candidate; from here on numbers are those of the store.
    stored_scales = mx.concatenate([fitted_scales, rtn_scales[None]])
    stored_biases = mx.concatenate([fitted_biases, rtn_biases[None]])
    scales, biases = stored_scales.astype(mx.float32), stored_biases.astype(mx.float32)
    rtn_codes = nearest(w, scales[-1:], biases[-1:], levels)
    codes = mx.concatenate([codes, rtn_codes])
    errors = mx.power(mx.abs(codes * scales + biases - w), P).sum(axis=-1, keepdims=True)
    best = mx.argmin(mx.where(mx.isnan(errors), mx.inf, errors), axis=0, keepdims=True)

    def chosen(array: mx.array) -> mx.array:
        return mx.take_along_axis(array, best, axis=0)[0]

    return chosen(codes).astype(mx.uint32), chosen(stored_scales), chosen(stored_biases)


def nearest(w: mx.array, scales: mx.array, biases: mx.array, levels: int) -> mx.array:
    """The code of each weight, float32; all 0 where the scale is 0."""
    safe = mx.where(scales == 0, 1, scales)
    return mx.clip(mx.round((w - biases) / safe), 0, levels)
