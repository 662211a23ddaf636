"""What one repack is to do, settled before anything is written, and whether another began it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from flashmoe.base.errors import OptionError, SourceError
from flashmoe.checkpoint.architecture import probe_routing
from flashmoe.checkpoint.files import ConsumedFile, LocalFile, SourceFile
from flashmoe.checkpoint.headers import TensorInfo
from flashmoe.checkpoint.source import Checkpoint, SourceTensor
from flashmoe.repacking.journal import Entry, Reached, begun
from flashmoe.repacking.lazy_model import Loaded, load_lazily
from flashmoe.repacking.pieces import Maker
from flashmoe.repacking.plan import RepackPlan, plan_repack
from flashmoe.repacking.presets import AS_IS
from flashmoe.repacking.quantize import Settings, Tensors, quantize_lazily, settle
from flashmoe.repacking.recipe import Recipe
from flashmoe.repacking.schedule import Schedule, schedule


@dataclass(frozen=True)
class RepackJob:
    """A plan, its order, and what makes the pieces; `whole` has the tensors for parameters that
    nothing makes by pieces. `identity` is what the journal begins with, `stated` the tensors that
    had to be read for the plan."""

    checkpoint: Checkpoint
    plan: RepackPlan
    schedule: Schedule
    maker: Maker | None
    whole: Tensors
    identity: Entry
    stated: dict[str, bytes]


@dataclass(frozen=True)
class Outline:
    """What a repack will write, and the lazily loaded model that says so; see `RepackJob`."""

    plan: RepackPlan
    loaded: Loaded
    settings: Settings
    whole: Tensors
    stated: dict[str, bytes]


def outline(
    checkpoint: Checkpoint,
    tensors: dict[str, SourceTensor],
    recipe: Recipe,
    asked: bool,
    stated: Mapping[str, bytes] | None = None,
) -> Outline:
    """The plan of a repack of `tensors`, from their headers alone; `asked` says that the recipe
    was asked for, `stated` has tensors that need not be read again.

    Raises SourceError when the checkpoint is not what its family expects, OptionError when the
    recipe does not fit it.
    """
    infos = {name: tensor.info for name, tensor in tensors.items()}
    files = checkpoint.weight_files
    known = dict(stated or {})

    def read(name: str) -> bytes:
        if name not in known:
            tensor = tensors[name]
            content = bytearray(tensor.info.nbytes)
            files[tensor.file].read_into(tensor.info.begin, memoryview(content))
            known[name] = bytes(content)
        return known[name]

    loaded = load_lazily(checkpoint, infos, read, outlined=bool(checkpoint.elsewhere))
    model = loaded.model
    routing = probe_routing(loaded.config)
    settings: Settings = {}
    if not any("scales" in module for _, module in model.named_modules()):
        settings = settle(model, recipe)
    elif asked and recipe != AS_IS:
        raise OptionError(
            f"{checkpoint.where} is already quantized and is repacked bit for bit; "
            "leave out bits, group size, resident bits, method and recipe"
        )
    whole = quantize_lazily(model, settings)
    plan = plan_repack(model, loaded.config, routing, settings)
    return Outline(plan, loaded, settings, whole, known)


def prepare(
    checkpoint: Checkpoint,
    tensors: dict[str, SourceTensor],
    recipe: Recipe,
    asked: bool,
    stated: Mapping[str, bytes] | None = None,
) -> RepackJob:
    """Settle everything about a repack; arguments and errors as those of `outline`."""
    found = outline(checkpoint, tensors, recipe, asked, stated)
    plan, graph, whole = found.plan, found.loaded.graph, found.whole
    files = checkpoint.weight_files
    order = schedule(plan, graph, tensors, len(files))
    if order.late and checkpoint.elsewhere:
        names = [order.parameters[index].name for index in order.late]
        raise SourceError(
            f"{len(names)} tensors of {checkpoint.repo} ({names[0]}) cannot be made from byte "
            "ranges; download the checkpoint (hf download) and repack its folder"
        )
    if order.late and not found.loaded.is_whole:
        infos = {name: tensor.info for name, tensor in tensors.items()}
        read = found.stated.__getitem__
        model = load_lazily(checkpoint, infos, read, outlined=False, whole=True).model
        whole = quantize_lazily(model, found.settings)
    identity = {
        "source": [checkpoint.repo, checkpoint.revision],
        "files": [[file.name, file.size_bytes, file.version] for file in files],
        "config": hashlib.sha256((checkpoint.folder / "config.json").read_bytes()).hexdigest(),
        "plan": hashlib.sha256(repr((astuple(plan), order.pieces)).encode()).hexdigest(),
    }
    maker = Maker(graph, tensors, files) if graph is not None else None
    return RepackJob(checkpoint, plan, order, maker, whole, identity, found.stated)


def as_begun(
    checkpoint: Checkpoint, before: Entry
) -> tuple[Checkpoint, dict[str, SourceTensor], dict[str, bytes]]:
    """A folder's checkpoint with the weight files that an interrupted run has consumed, the
    tensors that were in all of them, and those that the plan had to read."""
    files: list[SourceFile] = []
    for name, size_bytes, version in before["files"]:
        path = checkpoint.folder / name
        files.append(LocalFile(path) if path.exists() else ConsumedFile(name, size_bytes, version))
    tensors = {
        name: SourceTensor(file, TensorInfo(dtype, tuple(shape), begin, end))
        for name, (file, dtype, shape, begin, end) in before["tensors"].items()
    }
    stated = {name: bytes.fromhex(content) for name, content in before["stated"].items()}
    return replace(checkpoint, elsewhere=tuple(files)), tensors, stated


def goes_on(job: RepackJob, folder: Path) -> bool:
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


def check_consumable(job: RepackJob) -> None:
    """Raise OptionError unless the source's weight files may be deleted as they are used up."""
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


def consumer(job: RepackJob) -> Callable[[Reached], None]:
    """Deletes each weight file that is hashed and that no piece needs any more."""

    def consume(progress: Reached) -> None:
        for index, file in enumerate(job.checkpoint.weight_files):
            finished = progress.pieces >= job.schedule.last_use[index]
            if finished and file.name in progress.sources and file.path is not None:
                file.path.unlink(missing_ok=True)

    return consume
