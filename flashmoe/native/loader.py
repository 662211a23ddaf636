"""Loading the compiled library, and its C interface as ctypes sees it."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

from flashmoe.base.errors import OptionError

LIBRARY = "libflashmoe.so"  # as build.py names it
VERSION = "5"  # of the interface, as matmul.cpp states it
F32, BF16, F16, AFFINE, MXFP4 = range(5)
OK, UNSUPPORTED, BAD_ARGUMENT, NO_RESOURCES = range(4)
NO_MASK, CAUSAL_MASK, BOOLEAN_MASK, ADDED_MASK = range(4)
SIGMOID, GELU_TANH, RELU2, SITU = range(4)

_REASONS = {
    UNSUPPORTED: "does not cover this format",
    BAD_ARGUMENT: "was given sizes or indices that do not fit together",
    NO_RESOURCES: "has no memory or threads",
}


class FmMatrix(ctypes.Structure):
    """`fm_matrix` of flashmoe_native.h."""

    _fields_ = (
        ("slots", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("biases", ctypes.c_void_p),
        ("weight_slot_bytes", ctypes.c_int64),
        ("scales_slot_bytes", ctypes.c_int64),
        ("biases_slot_bytes", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("format", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("group_size", ctypes.c_int32),
        ("scale_dtype", ctypes.c_int32),
    )


class FmActivation(ctypes.Structure):
    """`fm_activation` of flashmoe_native.h."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("alpha", ctypes.c_float),
        ("gate_max", ctypes.c_float),
        ("activated_max", ctypes.c_float),
        ("up_max", ctypes.c_float),
        ("up_bound", ctypes.c_float),
        ("up_shift", ctypes.c_float),
    )


class FmVectors(ctypes.Structure):
    """`fm_vectors` of flashmoe_native.h."""

    _fields_ = (("data", ctypes.c_void_p), ("dtype", ctypes.c_int32))


class FmExperts(ctypes.Structure):
    """`fm_experts` of flashmoe_native.h."""

    _fields_ = (
        ("gate", FmMatrix),
        ("up", FmMatrix),
        ("down", FmMatrix),
        ("gate_bias", FmVectors),
        ("up_bias", FmVectors),
        ("down_bias", FmVectors),
        ("activation", FmActivation),
    )


class FmFit(ctypes.Structure):
    """`fm_fit` of flashmoe_fit.h."""

    _fields_ = (
        ("bits", ctypes.c_int32),
        ("group_size", ctypes.c_int32),
        ("scale_dtype", ctypes.c_int32),
        ("rounds", ctypes.c_int32),
        ("n_starts", ctypes.c_int32),
        ("starts", ctypes.c_void_p),
        ("least_residual", ctypes.c_float),
    )


class FmAttention(ctypes.Structure):
    """`fm_attention` of flashmoe_native.h."""

    _fields_ = (
        ("q", ctypes.c_void_p),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("sinks", ctypes.c_void_p),
        ("q_strides", ctypes.c_int64 * 4),
        ("k_strides", ctypes.c_int64 * 4),
        ("v_strides", ctypes.c_int64 * 4),
        ("mask_strides", ctypes.c_int64 * 4),
        ("batch", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("queries", ctypes.c_int64),
        ("keys", ctypes.c_int64),
        ("k_dim", ctypes.c_int64),
        ("v_dim", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("mask_kind", ctypes.c_int32),
    )


@cache
def _load() -> Any:
    """The library, or the reason (str) that it is not there."""
    path = Path(__file__).with_name(LIBRARY)
    if not path.exists():
        return (
            f"{path} was not built; where there is a C++ compiler, "
            "python -m flashmoe.native.build builds it"
        )
    try:
        library = ctypes.CDLL(str(path))
        version = library.fm_version
    except (OSError, AttributeError) as error:
        return f"{path} cannot be loaded: {error}"
    version.restype = ctypes.c_char_p
    found = version().decode()
    if found != VERSION:
        return f"{path} has interface {found}, not {VERSION}: run python -m flashmoe.native.build"
    library.fm_isa.restype = ctypes.c_char_p
    library.fm_use_isa.argtypes = (ctypes.c_char_p,)
    library.fm_set_threads.argtypes = (ctypes.c_int,)
    library.fm_set_threads.restype = None
    library.fm_matmul.argtypes = (
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.POINTER(FmMatrix),
        ctypes.c_void_p,
    )
    library.fm_expert_forward.argtypes = (
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.POINTER(FmExperts),
        ctypes.c_void_p,
    )
    library.fm_fit_groups.argtypes = (
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.POINTER(FmFit),
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_void_p,
    )
    library.fm_sha256.argtypes = (
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
    )
    library.fm_crc32.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
    library.fm_attend.argtypes = (ctypes.POINTER(FmAttention), ctypes.c_void_p)
    return library


def available() -> str | None:
    """None when the library can be used, otherwise why not."""
    found = _load()
    return found if isinstance(found, str) else None


def loaded() -> Any:
    """The loaded library; OptionError says why it is not there."""
    found = _load()
    if isinstance(found, str):
        raise OptionError(found)
    return found


def check(code: int) -> None:
    """Raise OptionError unless a call of the library went well."""
    if code != OK:
        raise OptionError(f"the native library {_REASONS[code]}")


def isa() -> str:
    """The instruction set in use."""
    name: bytes = loaded().fm_isa()
    return name.decode()


def use_isa(name: str) -> None:
    """Choose an instruction set: avx512, avx2, neon or portable.

    Raises OptionError for one that this machine lacks.
    """
    if loaded().fm_use_isa(name.encode()) != OK:
        raise OptionError(f"this machine does not run {name!r} kernels")


def threads() -> int:
    """How many threads share a product."""
    return int(loaded().fm_threads())


def set_threads(n: int) -> None:
    """Share products among n threads; 0 means one per core that this process may use."""
    loaded().fm_set_threads(n)
