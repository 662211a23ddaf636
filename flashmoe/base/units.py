"""Sizes, rates and durations as people write them."""

from __future__ import annotations

import re
from fractions import Fraction

from flashmoe.base.errors import OptionError

_UNITS = {
    "": 1,
    "B": 1,
    "K": 10**3,
    "KB": 10**3,
    "M": 10**6,
    "MB": 10**6,
    "G": 10**9,
    "GB": 10**9,
    "T": 10**12,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_size(text: str | int) -> int:
    """Bytes of a size such as "24GB" (10^9), "24GiB" (2^30), "512M" or a plain number.

    Raises OptionError when the text is not a positive size.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        size_bytes = text
    else:
        match = re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,20})?|\.\d{1,20})\s*([A-Za-z]*)\s*", str(text))
        if match is None or match[2].upper() not in _UNITS:
            raise OptionError(f"{text!r} is not a size; write for example 24GB, 512MB or 16GiB")
        size_bytes = round(Fraction(match[1]) * _UNITS[match[2].upper()])
    if size_bytes <= 0:
        raise OptionError(f"{text!r} is not a size; it must be greater than zero")
    return size_bytes


def format_size(size_bytes: float) -> str:
    """A size in decimal units with three significant digits: 7077888 -> "7.08 MB"."""
    value, unit = _scale(float(size_bytes), ("B", "kB", "MB", "GB", "TB"))
    if unit == "B":
        return f"{value:.0f} B"
    digits = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f} {unit}"


def format_count(count: float) -> str:
    """A count with a short suffix: 30600000 -> "30.6M"."""
    value, suffix = _scale(float(count), ("", "K", "M", "B", "T"))
    return f"{value:.0f}{suffix}" if not suffix or abs(value) >= 99.95 else f"{value:.1f}{suffix}"


def format_duration(seconds: float) -> str:
    """A duration: 0.42 -> "0.42 s", 75 -> "1:15", 3700 -> "1:01:40"."""
    if seconds < 59.5:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _scale(value: float, units: tuple[str, ...]) -> tuple[float, str]:
    """Divide by 1000 until three digits suffice or the units run out."""
    step = 0
    while abs(value) >= 999.5 and step < len(units) - 1:
        value /= 1000
        step += 1
    return value, units[step]
