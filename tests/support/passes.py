"""Passes and reports of `bench decode` made by hand."""

from __future__ import annotations

from typing import Any

from flashmoe.bench.decode import DecodePoint, DecodeReport
from flashmoe.bench.decode_worker import Pass
from flashmoe.bench.disk_rate import DiskRate
from flashmoe.bench.pass_figures import PassFigures, pass_figures

DISK = DiskRate(1e9, 0.9e9, 1.1e9, "fio psync")


def made_pass(**changes: Any) -> Pass:
    """Two answers, four decoded tokens of 0.1 seconds: 40 MB each, of them 30 MB absent."""
    decode = {
        "tokens": 4,
        "hits": 6,
        "misses": 2,
        "bytes_read": 160_000_000,
        "bytes_demanded": 480_000_000,
        "bytes_absent": 120_000_000,
        "seconds": 0.4,
        "computing": 0.2,
        "experts": 0.08,
        "reading": 0.1,
        "host": 0.02,
    }
    fields = {
        "name": "cold",
        "answers": [[1, 2, 3], [4, 5, 6]],
        "first_token_seconds": [1.0, 3.0],
        "prompt_tokens": [10, 20],
        "prefill_seconds": [1.0, 1.0],
        "token_seconds": [0.05, 0.1, 0.1, 0.15],
        "decode": decode,
        "computing_seconds": [0.07, 0.08, 0.5],
    }
    return Pass(**{**fields, **changes})


def made_figures(name: str = "cold") -> PassFigures:
    return pass_figures(made_pass(name=name), DISK.bytes_per_second)


def made_report() -> DecodeReport:
    points = tuple(
        DecodePoint(memory, memory // 2, memory / 4e9, memory, "cpu", False, passes)
        for memory in (2 * 10**9, 10**9)
        for passes in [(made_figures("cold"), made_figures("warm"))]
    )
    return DecodeReport("a.flashmoe", 4 * 10**9, 4, 128, None, DISK, ("a note",), points)
