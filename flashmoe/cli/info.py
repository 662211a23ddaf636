"""`flashmoe info`: what is installed here and what would be used."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version

from flashmoe.cli import options

PACKAGES = ("flashmoe", "mlx", "mlx-lm", "transformers", "huggingface_hub", "numpy")


def info(json: options.Json = False) -> None:
    """Show versions, the device, and which kernels there are and why."""
    import platform

    import mlx.core as mx

    from flashmoe import machine
    from flashmoe.cli.console import out, print_json
    from flashmoe.io.pieces import DEFAULT_THREADS
    from flashmoe.kernels.select import AUTO, kernel_statuses
    from flashmoe.units import format_size

    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    device = "cpu" if mx.default_device() == mx.cpu else "gpu"
    usable = machine.usable_memory_bytes()
    statuses = kernel_statuses()
    if json:
        print_json(
            {
                "versions": versions,
                "device": device,
                "usable_memory_bytes": usable,
                "kernel": AUTO,
                "kernels": [asdict(status) for status in statuses],
                "reader": "pread",
                "reader_threads": DEFAULT_THREADS,
            }
        )
        return
    rows = [
        ("versions", ", ".join(f"{name} {number}" for name, number in versions.items())),
        ("device", f"{device} ({platform.platform()}), {format_size(usable)} of memory free"),
        ("kernel", f"auto means {AUTO}"),
        *(
            (f"  {status.name}", f"{'' if status.available else 'not available: '}{status.note}")
            for status in statuses
        ),
        ("reader", f"pread, {DEFAULT_THREADS} threads"),
    ]
    for name, value in rows:
        out.print(f"{name:<13} {value}", markup=False)
