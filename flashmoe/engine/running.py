"""How a model is to run: the user's word, or else the choice that was measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flashmoe.engine.needs import Needs, choose_bank, shrink_bank
from flashmoe.engine.options import Options
from flashmoe.io.files import uncached_problem
from flashmoe.io.select import ReadSettings, choose_page_cache, resolve_reader
from flashmoe.memory import budget
from flashmoe.probe.tuning import BankChoice, Choice, Reads, TuningFile
from flashmoe.streaming.parts import Parts


def find_choice(options: Options, file: TuningFile) -> Choice:
    """What decides what the user left open."""
    if isinstance(options.tuned, Choice):
        return options.tuned
    tuning = file.read() if options.tuned else None
    return Choice() if tuning is None else tuning.choice


@dataclass(frozen=True)
class Running:
    """How a model runs: where its bytes go, how records are read, whether ahead, and the most
    that its bank may have where the page cache is to have the rest (None: every expert)."""

    plan: budget.MemoryPlan
    page_cache: bool
    reads: Reads
    prefetch: bool
    most_bank_bytes: int | None


def choose_running(
    options: Options,
    choice: Choice,
    *,
    needs: Needs,
    plan: budget.MemoryPlan,
    parts: Parts,
    path: Path,
    usable_bytes: int,
) -> Running:
    """What options, and a choice where they leave it open, come to.

    `plan` is that of all the memory there is, `path` one of the files of records, `usable_bytes`
    what the machine can still give before the model is loaded. Raises what `choose_page_cache`
    raises.
    """
    chosen = choose_bank(options, choice, plan)
    if chosen is not None and options.cache is None:
        plan = shrink_bank(needs, plan, chosen.bank_share)
    page_cache = choose_page_cache(
        wanted_page_cache(options, chosen, path),
        options.reader,
        path,
        file_bytes=needs.manifest.streamed_bytes,
        free_bytes=usable_bytes - (plan.planned_bytes - plan.process_bytes),
    )
    most_bank_bytes = None if chosen is None or chosen.bank_share == 1 else plan.bank_bytes
    # After the page cache was decided on, so that all else is as it is with a bank.
    if not parts.bank:
        plan = budget.least_bank(plan, needs.manifest)
    reads = wanted_reads(options, choice, page_cache)
    return Running(plan, page_cache, reads, wanted_prefetch(options, chosen), most_bank_bytes)


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
    """The readers of decode and of prefills; a choice of depth is one for its reader."""
    reads = choice.reads(page_cache)
    if options.reader == "auto":
        return reads
    return Reads(_with_reader(reads.decode, options), _with_reader(reads.prefill, options))


def wanted_prefetch(options: Options, chosen: BankChoice | None) -> bool:
    """Whether to read ahead where that turns out to pay."""
    if options.prefetch is not None:
        return options.prefetch
    return chosen is None or chosen.prefetch


def _with_reader(settings: ReadSettings, options: Options) -> ReadSettings:
    if resolve_reader(settings.reader) == resolve_reader(options.reader):
        return settings
    return ReadSettings(options.reader)
