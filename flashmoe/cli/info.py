"""`flashmoe info`: what is installed here and what would be used."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING

from flashmoe.cli import options

if TYPE_CHECKING:
    from flashmoe.io.select import ReaderStatus
    from flashmoe.kernels.select import KernelStatus

PACKAGES = ("flashmoe", "mlx", "mlx-lm", "transformers", "huggingface_hub", "numpy")


def info(json: options.Json = False) -> None:
    """Show versions, the device, and which kernels and readers there are and why."""
    import platform

    import mlx.core as mx

    from flashmoe import machine
    from flashmoe.cli.console import out, print_json
    from flashmoe.io.select import reader_statuses, resolve_reader
    from flashmoe.kernels.select import AUTO, kernel_statuses
    from flashmoe.units import format_size

    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
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
                "kernel": AUTO,
                "kernels": [asdict(status) for status in statuses],
                "reader": resolve_reader(),
                "readers": [asdict(status) for status in readers],
            }
        )
        return
    rows = [
        ("versions", ", ".join(f"{name} {number}" for name, number in versions.items())),
        ("device", f"{device} ({platform.platform()}), {format_size(usable)} of memory free"),
        ("kernel", f"auto means {AUTO}"),
        *((f"  {status.name}", _note(status)) for status in statuses),
        ("reader", f"auto means {resolve_reader()}"),
        *((f"  {status.name}", _note(status)) for status in readers),
    ]
    for name, value in rows:
        out.print(f"{name:<13} {value}", markup=False)


def _note(status: KernelStatus | ReaderStatus) -> str:
    return status.note if status.available else f"not available: {status.note}"
