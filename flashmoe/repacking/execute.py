"""Carrying out a repack: plan, then walk the source once, piece by piece, in bounded memory."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from flashmoe.checkpoint.architecture import probe_routing
from flashmoe.checkpoint.files import ConsumedFile, LocalFile, SourceFile
from flashmoe.checkpoint.headers import TensorInfo
from flashmoe.checkpoint.source import Checkpoint, SourceTensor, check_files, resolve
from flashmoe.dtypes import array_bytes
from flashmoe.errors import OptionError, SourceError, StoreError
from flashmoe.repacking.checksums import checksums
from flashmoe.repacking.journal import Entry, Journal, Reached, begun
from flashmoe.repacking.load import load_lazily
from flashmoe.repacking.make import Maker
from flashmoe.repacking.plan import RepackPlan, plan_repack
from flashmoe.repacking.quantize import Precision, quantize_lazily
from flashmoe.repacking.run import Run
from flashmoe.repacking.schedule import PACKED_PARTS, Schedule, schedule
from flashmoe.store.manifest import LayerFile, Manifest, ResidentFile, Source
from flashmoe.store.reader import Store, is_store, open_store
from flashmoe.store.writer import StoreWriter, refuse_unless_ours

Progress = Callable[[int, int], None]


def repack(
    source: str | Path,
    dest: str | Path | None = None,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    resident_bits: int | None = None,
    revision: str | None = None,
    force: bool = False,
    consume: bool = False,
    progress: Progress | None = None,
) -> Store:
    """Turn a checkpoint (folder or Hub id) into a store at `dest` (default NAME.flashmoe).

    A quantized MLX checkpoint is repacked bit for bit and takes no `bits`. A float one is
    quantized with `mx.quantize`: `bits` 2, 3, 4, 5, 6 or 8 (default 4) in groups of
    `group_size` 32, 64 or 128 (default 64), `resident_bits` (default `bits`) for everything but
    the experts; 32 keeps floats as they are, 16 rounds float32 to bfloat16.

    Weights on the Hub are fetched by byte ranges and never kept. `consume` deletes each weight
    file of a folder once everything in it is on disk in the store.
    `progress(done_bytes, total_bytes)` is called as tensors are written.

    Raises SourceError, StoreError or OptionError; whatever happens, `dest` looks complete only
    once it is, and the same call goes on from where this one came to (`force` begins again).
    """
    asked = not (bits is group_size is resident_bits is None)
    precision = Precision.from_options(bits, group_size, resident_bits)
    name = Path(source).expanduser().resolve().name
    folder = Path(dest) if dest is not None else Path(f"{name}.flashmoe")
    # Before anything is fetched.
    refuse_unless_ours(folder, force)
    if is_store(Path(source).expanduser()):
        raise SourceError(f"{source} is a store already; repack the checkpoint it was made from")
    checkpoint = resolve(source, revision)
    before = None if force else begun(folder)
    if before is not None and "tensors" in before:
        checkpoint, tensors = _as_begun(checkpoint, before)
    else:
        tensors = check_files(checkpoint)
    job = _prepare(checkpoint, tensors, precision, asked)
    if consume:
        _check_consumable(job)
        job.identity["tensors"] = {
            name: [tensor.file, *astuple(tensor.info)] for name, tensor in tensors.items()
        }
    return _execute(job, folder, force=force, consume=consume, progress=progress)


@dataclass(frozen=True)
class _Job:
    """What is to be done: a plan, its order, what makes the pieces, and `arrays` that MLX reads
    whole for parameters that nothing makes by pieces."""

    checkpoint: Checkpoint
    plan: RepackPlan
    schedule: Schedule
    maker: Maker | None
    arrays: dict[str, mx.array]
    identity: Entry


def _as_begun(checkpoint: Checkpoint, before: Entry) -> tuple[Checkpoint, dict[str, SourceTensor]]:
    """A folder's checkpoint with the weight files that an interrupted run has consumed, and the
    tensors that were in all of them."""
    files: list[SourceFile] = []
    for name, size_bytes, version in before["files"]:
        path = checkpoint.folder / name
        files.append(LocalFile(path) if path.exists() else ConsumedFile(name, size_bytes, version))
    tensors = {
        name: SourceTensor(file, TensorInfo(dtype, tuple(shape), begin, end))
        for name, (file, dtype, shape, begin, end) in before["tensors"].items()
    }
    return replace(checkpoint, elsewhere=tuple(files)), tensors


def _prepare(
    checkpoint: Checkpoint, tensors: dict[str, SourceTensor], precision: Precision, asked: bool
) -> _Job:
    outline = {name: tensor.info for name, tensor in tensors.items()}
    loaded = load_lazily(checkpoint, outline, outlined=bool(checkpoint.elsewhere))
    model, config, graph = loaded.model, loaded.config, loaded.graph
    routing = probe_routing(config)
    if any("scales" in module for _, module in model.named_modules()):
        if asked:
            raise OptionError(
                f"{checkpoint.where} is already quantized and is repacked bit for bit; "
                "leave out bits, group size and resident bits"
            )
    else:
        quantize_lazily(model, precision)
    plan = plan_repack(model, config, routing)
    files = checkpoint.weight_files
    order = schedule(plan, graph, tensors, len(files))
    if order.late and checkpoint.elsewhere:
        names = [order.parameters[index].name for index in order.late]
        raise SourceError(
            f"{len(names)} tensors of {checkpoint.repo} ({names[0]}) cannot be made from byte "
            "ranges; download the checkpoint (hf download) and repack its folder"
        )
    identity = {
        "source": [checkpoint.repo, checkpoint.revision],
        "files": [[file.name, file.size_bytes, file.version] for file in files],
        "config": hashlib.sha256((checkpoint.folder / "config.json").read_bytes()).hexdigest(),
        "plan": hashlib.sha256(repr((astuple(plan), order.pieces)).encode()).hexdigest(),
    }
    maker = Maker(graph, tensors, files) if graph is not None else None
    arrays = dict(tree_flatten(model.parameters())) if order.late else {}
    return _Job(checkpoint, plan, order, maker, arrays, identity)


def _execute(
    job: _Job, folder: Path, *, force: bool, consume: bool, progress: Progress | None
) -> Store:
    total = job.plan.total_bytes
    done = 0

    def advance(size_bytes: int) -> None:
        nonlocal done
        done += size_bytes
        if progress is not None:
            progress(done, total)

    try:
        with StoreWriter(folder, force=force, keep=lambda: _goes_on(job, folder)) as writer:
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
                    advance(0)
                    run.walk(job.maker, _consumer(job) if consume else lambda _: None)
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


def _goes_on(job: _Job, folder: Path) -> bool:
    """Whether an unfinished store in `folder` is this job's, so that what it holds counts.

    Raises SourceError when its source has changed since, OptionError when it was begun with other
    options.
    """
    first = begun(folder)
    if first is None:
        return False
    before, now = first["source"], job.identity["source"]
    if before != now:
        if before[0] == now[0] and before[1]:
            raise SourceError(
                f"{folder} was begun from commit {before[1]} of {before[0]}, which is now at "
                f"{now[1]}; finish it with --revision {before[1]}, or begin again with --force"
            )
        raise SourceError(
            f"{folder} was begun from {before[0]}, not from {now[0]}; choose another destination, "
            "or begin again with --force"
        )
    if [first["files"], first["config"]] != [job.identity["files"], job.identity["config"]]:
        raise SourceError(
            f"{job.checkpoint.repo} has changed since {folder} was begun from it; "
            "begin again with --force"
        )
    if first["plan"] != job.identity["plan"]:
        raise OptionError(
            f"{folder} was begun with other options; finish it with those, or begin again with "
            "--force"
        )
    files = [(folder / file.name, file.size_bytes) for file in job.schedule.files]
    return all(path.is_file() and path.stat().st_size == size for path, size in files)


def _lay_out(job: _Job, writer: StoreWriter) -> None:
    """Every file of the store as a header and a hole: what is missing later was lost."""
    for file in job.schedule.files:
        writer.create(file.name, file.header, file.size_bytes)
        writer.sync(file.name)
        writer.close(file.name)
    writer.sync_folders()


def _evaluated(job: _Job, index: int) -> list[memoryview]:
    """A parameter read through MLX, whole, for each of its sinks."""
    parameter = job.schedule.parameters[index]
    names = [parameter.name]
    if parameter.packing is not None:
        module = parameter.name.rpartition(".")[0]
        names = [f"{module}.{part}" for part in PACKED_PARTS if f"{module}.{part}" in job.arrays]
    arrays = [job.arrays.pop(name) for name in names]
    try:
        mx.eval(arrays)
    except RuntimeError as error:  # what MLX raises when a weight file cannot be read
        raise SourceError(f"{job.checkpoint.repo} cannot be read: {error}") from error
    return [array_bytes(array) for array in arrays]


def _manifest(
    job: _Job,
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


def _check_free_disk(folder: Path, job: _Job) -> None:
    free = shutil.disk_usage(folder).free
    have = 0
    for file in job.schedule.files:
        path = folder / file.name
        have += path.stat().st_blocks * 512 if path.is_file() else 0
    needed = job.plan.file_bytes - have
    if needed > free:
        raise StoreError(
            f"{folder} needs {needed / 1e9:.1f} GB but its disk has {free / 1e9:.1f} GB free; "
            "free some or choose another destination"
        )


def _check_consumable(job: _Job) -> None:
    if job.checkpoint.revision is not None:
        raise OptionError(
            "only a folder's weight files can be consumed; what is fetched from the Hub is not kept"
        )
    if job.schedule.late:
        name = job.schedule.parameters[job.schedule.late[0]].name
        raise OptionError(f"{name} needs all weight files until the end; leave out --consume")
    for file in job.checkpoint.weight_files:
        if file.path is not None and file.path.is_symlink():
            raise OptionError(f"{file.path} is a link, which --consume would not free")


def _consumer(job: _Job) -> Callable[[Reached], None]:
    """Deletes each weight file that is hashed and that no piece needs any more."""

    def consume(progress: Reached) -> None:
        for index, file in enumerate(job.checkpoint.weight_files):
            finished = progress.pieces >= job.schedule.last_use[index]
            if finished and file.name in progress.sources and file.path is not None:
                file.path.unlink(missing_ok=True)

    return consume
