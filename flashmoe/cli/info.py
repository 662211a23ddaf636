"""`flashmoe info`: what is installed here and what would be used."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated

import typer

from flashmoe.base.errors import FlashMoEError
from flashmoe.cli import options

if TYPE_CHECKING:
    from flashmoe.io.select import ReaderStatus
    from flashmoe.kernels.select import KernelStatus

PACKAGES = ("mlx", "mlx-lm", "transformers", "huggingface_hub", "numpy")


def info(
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
    """Show versions, the device, and which kernels and readers there are and why."""
    if check_kernels:
        _check_kernels(json)
        return
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
