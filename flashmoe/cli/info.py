"""`flashmoe info`: what is installed here and what would be used."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated

import typer

from flashmoe.base.errors import FlashMoEError, MemoryBudgetError, OptionError
from flashmoe.cli import options

if TYPE_CHECKING:
    from flashmoe.io.select import ReaderStatus
    from flashmoe.kernels.select import KernelStatus

PACKAGES = ("mlx", "mlx-lm", "transformers", "huggingface_hub", "numpy")


@options.with_engine_options
def info(
    model: options.PlannedModel = None,
    *,
    engine: options.EngineOptions,
    check_kernels: Annotated[
        bool,
        typer.Option(
            "--check-kernels",
            help="Hold every kernel that runs here against the reference, for every packing, "
            "dtype and activation.",
        ),
    ] = False,
    json: options.Json = False,
) -> None:
    """Show what is installed here, or with a MODEL what running it would take.

    With a MODEL: where each byte of memory would go, which kernel and reader would run and why,
    and the least memory that would do. Nothing is loaded or repacked.
    """
    if check_kernels:
        _check_kernels(json)
        return
    if model is not None:
        _show_plan(model, engine, json)
        return
    if engine != options.EngineOptions():
        raise OptionError("these options plan the run of a model: name a store or a checkpoint")
    import platform

    import mlx.core as mx

    from flashmoe.base import machine
    from flashmoe.base.distribution import installed_version
    from flashmoe.base.units import format_size
    from flashmoe.cli.console import out, print_json
    from flashmoe.io.select import reader_statuses, resolve_reader
    from flashmoe.kernels.select import auto_kernel, kernel_statuses

    versions = {"python": platform.python_version(), "flashmoe": installed_version()}
    versions |= {name: version(name) for name in PACKAGES}
    device = "cpu" if mx.default_device() == mx.cpu else "gpu"
    usable = machine.usable_memory_bytes()
    statuses = kernel_statuses()
    readers = reader_statuses()
    if json:
        print_json(
            {
                "versions": versions,
                "device": device,
                "usable_memory_bytes": usable,
                "kernel": auto_kernel(),
                "kernels": [asdict(status) for status in statuses],
                "reader": resolve_reader(),
                "readers": [asdict(status) for status in readers],
            }
        )
        return
    rows = [
        ("versions", ", ".join(f"{name} {number}" for name, number in versions.items())),
        ("device", f"{device} ({platform.platform()}), {format_size(usable)} of memory free"),
        ("kernel", f"auto means {auto_kernel()}"),
        *((f"  {status.name}", _note(status)) for status in statuses),
        ("reader", f"auto means {resolve_reader()}"),
        *((f"  {status.name}", _note(status)) for status in readers),
    ]
    for name, value in rows:
        out.print(f"{name:<13} {value}", markup=False)


def _show_plan(model: str, engine: options.EngineOptions, json: bool) -> None:
    """Print what running a model would take."""
    from flashmoe.base.units import format_size
    from flashmoe.cli.console import out, print_json
    from flashmoe.engine.api import plan_run
    from flashmoe.engine.options import Options

    plan = plan_run(model, Options(**vars(engine)))
    if json:
        print_json(plan.as_dict())
        return
    memory = plan.memory
    for name, size_bytes, note in plan.rows():
        out.print(f"{name:<17} {format_size(size_bytes):>9}  {note}", markup=False)
    number = (
        "no limit given" if memory.total_bytes is None else "of " + format_size(memory.total_bytes)
    )
    out.print(f"{'together':<17} {format_size(memory.planned_bytes):>9}  {number}", markup=False)
    out.print(markup=False)
    pages = "through the page cache" if plan.page_cache else "past the page cache"
    lines = [
        ("kernel", f"{plan.kernel}: {plan.kernel_reason}"),
        ("reader", f"{plan.reader}: {plan.reader_reason}"),
        ("records", f"{pages}: {plan.page_cache_reason}"),
        ("prefetch", "where it pays" if plan.prefetch else "off"),
        ("lossy", ", ".join(plan.lossy) or "nothing"),
        ("least memory", format_size(memory.least_total_bytes)),
    ]
    for name, value in lines:
        out.print(f"{name:<17} {value}", markup=False)
    if not plan.fits:
        try:
            plan.check()
        except MemoryBudgetError as error:
            out.print(f"\nThis does not fit: {error}", markup=False)


def _note(status: KernelStatus | ReaderStatus) -> str:
    return status.note if status.available else f"not available: {status.note}"


def _check_kernels(json: bool) -> None:
    """Print a line per kernel and shape class. Raises FlashMoEError when one is wrong."""
    from flashmoe.cli.console import out, print_json
    from flashmoe.kernels.check_cases import standard_cases
    from flashmoe.kernels.select import checkable_kernels, kernel_statuses
    from flashmoe.kernels.self_check import check, machine_name

    kernels = checkable_kernels()
    idle = {s.name: s.note for s in kernel_statuses() if s.name != "reference" and not s.available}
    results = []
    if not json:
        out.print(machine_name(), markup=False)
        out.print(f"{'kernel':<7} {'shape class':<64} {'error':>8} {'at most':>8}", markup=False)
    for name, (kernel, dtypes) in kernels.items():
        for label, case in standard_cases(dtypes):
            outcome = check(kernel, case)
            results.append({"kernel": name, "case": label, **asdict(outcome)})
            if json:
                continue
            error = "" if outcome.error is None else f"{outcome.error:.1e}"
            verdict = "" if outcome.passed else f"  WRONG: {outcome.verdict}"
            limit = f"{outcome.tolerance:.0e}"
            out.print(f"{name:<7} {label:<64} {error:>8} {limit:>8}{verdict}", markup=False)
    wrong = sum(result["verdict"] != "passed" for result in results)
    if json:
        print_json({"machine": machine_name(), "checks": results, "not_run": idle})
    else:
        for name, note in idle.items():
            out.print(f"{name:<7} not run: {note}", markup=False)
        out.print(f"{len(results) - wrong} of {len(results)} checks passed", markup=False)
    if wrong:
        raise FlashMoEError(f"{wrong} of {len(results)} kernel checks failed on this machine")
