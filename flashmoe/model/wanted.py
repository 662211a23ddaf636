"""What is wanted of reading: the user's word, or else the choice that was measured."""

from __future__ import annotations

from pathlib import Path

from flashmoe.io.files import uncached_problem
from flashmoe.io.select import ReadSettings, resolve_reader
from flashmoe.options import Options
from flashmoe.tuning import BankChoice, Choice, Reads


def wanted_page_cache(options: Options, chosen: BankChoice | None, path: Path) -> bool | None:
    """Whether records are to go through the page cache; None where nobody says.

    `path` is one of their files. Raises ReadError when it cannot be opened.
    """
    if options.page_cache is not None or chosen is None:
        return options.page_cache
    if not chosen.page_cache:
        # A choice is no order: what cannot be done is left to the default.
        mapped = resolve_reader(options.reader) == "mmap"
        return None if mapped or uncached_problem(path) is not None else False
    return True


def wanted_reads(options: Options, choice: Choice, page_cache: bool) -> Reads:
    """The readers of decode and of sweeps; a choice of depth is one for its reader."""
    reads = choice.reads(page_cache)
    if options.reader == "auto":
        return reads
    return Reads(_with_reader(reads.decode, options), _with_reader(reads.sweep, options))


def wanted_forecast(options: Options, chosen: BankChoice | None) -> bool:
    """Whether to read ahead where that turns out to pay."""
    if options.forecast is not None:
        return options.forecast
    return chosen is None or chosen.forecast


def _with_reader(settings: ReadSettings, options: Options) -> ReadSettings:
    if resolve_reader(settings.reader) == resolve_reader(options.reader):
        return settings
    return ReadSettings(options.reader)
