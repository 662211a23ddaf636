"""Carrying out a repack: plan, then walk the source once, piece by piece, in bounded memory."""

from __future__ import annotations

import shutil
from dataclasses import astuple
from pathlib import Path
from typing import Any

import mlx.core as mx

from flashmoe.base.dtypes import array_bytes
from flashmoe.base.errors import SourceError, StoreError
from flashmoe.base.progress import Progress
from flashmoe.checkpoint.config import Config, read_config
from flashmoe.checkpoint.source import Checkpoint, check_files, resolve
from flashmoe.repacking.checksums import checksums
from flashmoe.repacking.job import (
    RepackJob,
    as_begun,
    check_consumable,
    consumer,
    goes_on,
    outline,
    prepare,
)
from flashmoe.repacking.journal import Journal, begun
from flashmoe.repacking.part_sizes import PlannedSizes, sizes_of
from flashmoe.repacking.plan import RepackPlan
from flashmoe.repacking.presets import choose_recipe
from flashmoe.repacking.quantize import PACKED
from flashmoe.repacking.recipe import Recipe
from flashmoe.repacking.walk import Run
from flashmoe.store.manifest import LayerFile, Manifest, ResidentFile, Source
from flashmoe.store.reader import Store, is_store, open_store
from flashmoe.store.writer import StoreWriter, refuse_unless_ours

_NO_PACKING = dict.fromkeys(("bits", "group_size", "resident_bits", "method"))


def repack(
    source: str | Path,
    dest: str | Path | None = None,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    resident_bits: int | None = None,
    method: str | None = None,
    recipe: str | Path | Recipe | None = None,
    revision: str | None = None,
    force: bool = False,
    consume: bool = False,
    progress: Progress | None = None,
) -> Store:
    """Turn a checkpoint (folder or Hub id) into a store at `dest` (default NAME.flashmoe).

    A quantized MLX checkpoint is repacked bit for bit and takes no `bits`. A float one is
    quantized: `bits` 2, 3, 4, 5, 6 or 8 (default 4) in groups of `group_size` 32, 64 or 128
    (default 64), `resident_bits` (default `bits`) for everything but the experts; 32 keeps
    floats as they are, 16 rounds float32 to bfloat16. `method` "rtn" rounds to nearest as
    mx.quantize does, "hqq" fits scales and biases to the weights. A `recipe`, by name or from a
    TOML file, states all of this part by part.

    Weights on the Hub are fetched by byte ranges and never kept. `consume` deletes each weight
    file of a folder once everything in it is on disk in the store.
    `progress(done_bytes, total_bytes)` is called as tensors are written; it counts their bytes, or
    those of the weight files where these come from the Hub.

    Raises SourceError, StoreError or OptionError; whatever happens, `dest` looks complete only
    once it is, and the same call goes on from where this one came to (`force` begins again).
    """
    chosen = choose_recipe(
        recipe, bits=bits, group_size=group_size, resident_bits=resident_bits, method=method
    )
    asked = any(x is not None for x in (bits, group_size, resident_bits, method, recipe))
    name = Path(source).expanduser().resolve().name
    folder = Path(dest) if dest is not None else Path(f"{name}.flashmoe")
    # Before anything is fetched.
    refuse_unless_ours(folder, force)
    if is_store(Path(source).expanduser()):
        raise SourceError(f"{source} is a store already; repack the checkpoint it was made from")
    checkpoint = resolve(source, revision)
    before = None if force else begun(folder)
    if before is not None and "tensors" in before:
        checkpoint, tensors, stated = as_begun(checkpoint, before)
    else:
        tensors, stated = check_files(checkpoint), {}
    job = prepare(checkpoint, tensors, chosen, asked, stated)
    if consume:
        check_consumable(job)
        job.identity["tensors"] = {
            name: [tensor.file, *astuple(tensor.info)] for name, tensor in tensors.items()
        }
        job.identity["stated"] = {name: content.hex() for name, content in job.stated.items()}
    return _execute(job, folder, force=force, consume=consume, progress=progress)


def dry_run(
    source: str | Path,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    resident_bits: int | None = None,
    method: str | None = None,
    recipe: str | Path | Recipe | None = None,
    revision: str | None = None,
) -> PlannedSizes:
    """The sizes of what `repack` with these options would write; nothing is. Raises as it."""
    plan, _ = plan_store(
        resolve(source, revision),
        bits=bits,
        group_size=group_size,
        resident_bits=resident_bits,
        method=method,
        recipe=recipe,
    )
    return sizes_of(plan)


def plan_store(checkpoint: Checkpoint, **packing: Any) -> tuple[RepackPlan, Config]:
    """What `repack` with this `packing` would write, from headers alone, and the config of what it
    came from. Raises as `repack`."""
    recipe = packing.pop("recipe", None)
    asked = recipe is not None or any(value is not None for value in packing.values())
    chosen = choose_recipe(recipe, **{**_NO_PACKING, **packing})
    plan = outline(checkpoint, check_files(checkpoint), chosen, asked).plan
    return plan, read_config(checkpoint.folder)


def _execute(
    job: RepackJob, folder: Path, *, force: bool, consume: bool, progress: Progress | None
) -> Store:
    total = done = 0

    def advance(size_bytes: int) -> None:
        nonlocal done
        done += size_bytes
        if progress is not None:
            progress(done, total)

    try:
        with StoreWriter(folder, force=force, keep=lambda: goes_on(job, folder)) as writer:
            _check_free_disk(folder, job)
            if not writer.resumed:
                _lay_out(job, writer)
            journal = Journal(folder)
            try:
                if not journal.entries:
                    journal.add(job.identity)
                    journal.entries.append(job.identity)
                files = job.checkpoint.weight_files
                with Run(job.schedule, files, writer, journal, advance) as run:
                    total = run.total_bytes
                    advance(0)
                    run.walk(job.maker, consumer(job) if consume else lambda _: None)
                    for index in job.schedule.late:
                        run.put_whole(index, _evaluated(job, index))
                    digests = run.settle()
                    crcs = checksums(job.schedule, run.crcs, run.late_crcs)
                    sources = {
                        file.name: run.progress.sources.get(file.name) or str(file.sha256)
                        for file in files
                    }
            finally:
                journal.close()
            copied = {path.name: writer.copy(path) for path in job.checkpoint.copied_files}
            writer.commit(_manifest(job, digests, crcs, {**sources, **copied}, copied))
    except OSError as error:
        raise StoreError(
            f"{folder} cannot be written: {error.strerror or error}; once it can, run the same "
            "command again, it goes on from here"
        ) from error
    return open_store(folder)


def _lay_out(job: RepackJob, writer: StoreWriter) -> None:
    """Every file of the store as a header and a hole: what is missing later was lost."""
    for file in job.schedule.files:
        writer.create(file.name, file.header, file.size_bytes)
        writer.sync(file.name)
        writer.close(file.name)
    writer.sync_folders()


def _evaluated(job: RepackJob, index: int) -> list[memoryview]:
    """A parameter read through MLX, whole, for each of its sinks."""
    parameter = job.schedule.parameters[index]
    names = [parameter.name]
    if parameter.packing is not None:
        names = [f"{parameter.module}.{part}" for part in PACKED[: len(parameter.sinks)]]
    arrays = [job.whole.pop(name) for name in names]
    try:
        mx.eval(arrays)
    except RuntimeError as error:  # what MLX raises when a weight file cannot be read
        raise SourceError(f"{job.checkpoint.repo} cannot be read: {error}") from error
    return [array_bytes(array) for array in arrays]


def _manifest(
    job: RepackJob,
    digests: dict[str, str],
    crcs: list[str],
    sources: dict[str, str],
    copied: dict[str, str],
) -> Manifest:
    plan = job.plan
    crc_of = {file.name: crc for file, crc in zip(job.schedule.files, crcs, strict=True)}
    return Manifest(
        model_type=plan.model_type,
        parameters=plan.parameters,
        source=Source(job.checkpoint.repo, job.checkpoint.revision, sources),
        quantization=plan.quantization,
        resident=tuple(
            ResidentFile(shard.file, shard.tensors, digests[shard.file], crc_of[shard.file])
            for shard in plan.resident
        ),
        layers=tuple(
            LayerFile(layer, digests[layer.file], crc_of[layer.file]) for layer in plan.layers
        ),
        copied=copied,
    )


def _check_free_disk(folder: Path, job: RepackJob) -> None:
    free = shutil.disk_usage(folder).free
    have = 0
    for file in job.schedule.files:
        path = folder / file.name
        have += path.stat().st_blocks * 512 if path.is_file() else 0
    needed = job.plan.file_bytes - have
    paths = [file.path for file in job.checkpoint.weight_files]
    if None not in paths:
        # Holes of the source become holes of the store, scales aside.
        needed = min(needed, sum(path.stat().st_blocks * 512 for path in paths if path))
    if needed > free:
        raise StoreError(
            f"{folder} needs {needed / 1e9:.1f} GB but its disk has {free / 1e9:.1f} GB free; "
            "free some or choose another destination"
        )
