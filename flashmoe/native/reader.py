"""The C interface of flashmoe_reader.h as ctypes sees it."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from flashmoe.native.loader import OK, loaded

WHOLE, END_OF_FILE, DROPPED = 0, -1, -2
PREADV = ctypes.CFUNCTYPE(
    ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
)

__all__ = [
    "DROPPED",
    "END_OF_FILE",
    "OK",
    "PREADV",
    "WHOLE",
    "FmFailure",
    "FmRead",
    "FmReadCounters",
    "library",
]


class FmRead(ctypes.Structure):
    """`fm_read`."""

    _fields_ = (
        ("offset", ctypes.c_int64),
        ("buffers", ctypes.c_void_p),
        ("n_buffers", ctypes.c_int32),
        ("fd", ctypes.c_int32),
    )


class FmFailure(ctypes.Structure):
    """`fm_failure`."""

    _fields_ = (
        ("request", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("error", ctypes.c_int32),
    )


class FmReadCounters(ctypes.Structure):
    """`fm_read_counters`."""

    _fields_ = (
        ("reads", ctypes.c_int64),
        ("bytes", ctypes.c_int64),
        ("seconds", ctypes.c_double),
        ("busy_seconds", ctypes.c_double),
        ("open_seconds", ctypes.c_double),
    )


@cache
def library() -> Any:
    """The loaded library; OptionError says why it is not there."""
    found = loaded()
    pointer, int32, int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    found.fm_reader_open.argtypes = (int32, int64, int32, PREADV)
    found.fm_reader_open.restype = pointer
    found.fm_reader_add_lane.argtypes = (pointer, int32, int64)
    found.fm_reader_submit.argtypes = (pointer, pointer, int64, int32, int32, pointer)
    found.fm_reader_drain.argtypes = (pointer, ctypes.c_double)
    found.fm_reader_counters.argtypes = (pointer, pointer)
    found.fm_reader_counters.restype = None
    found.fm_reader_close.argtypes = (pointer,)
    found.fm_reader_close.restype = None
    found.fm_ticket_wait.argtypes = (pointer, int64, ctypes.c_double)
    found.fm_ticket_wait.restype = int64
    found.fm_ticket_cancel.argtypes = (pointer,)
    found.fm_ticket_cancel.restype = int64
    found.fm_ticket_failure.argtypes = (pointer, pointer)
    found.fm_ticket_free.argtypes = (pointer,)
    found.fm_ticket_free.restype = None
    return found
