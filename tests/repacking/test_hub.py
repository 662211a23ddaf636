"""Repacking straight from a Hub that misbehaves: the same store byte for byte, or none."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest

from flashmoe import OptionError, SourceError, repack
from flashmoe.checkpoint import hub as hub_files
from flashmoe.repacking import source_stream, walk
from flashmoe.store.manifest import JOURNAL_NAME
from flashmoe.store.reader import is_store
from tests.support.checkpoints import save_shards
from tests.support.families import save_checkpoint
from tests.support.hub import COMMIT, NEWER, Hub
from tests.support.refusals import refused
from tests.support.stores import folder_content


@pytest.fixture
def sharded(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The Hub with a checkpoint of three files, fetched in ranges of 32 KiB."""
    save_checkpoint(tmp_path / "whole", "qwen3_moe", bits=None)
    for path in hub.files.iterdir():
        path.unlink()
    hub.files.rmdir()
    save_shards(tmp_path / "whole", hub.files)
    monkeypatch.setattr("flashmoe.repacking.schedule.PIECE_BYTES", 32 * 2**10)
    monkeypatch.setattr(source_stream, "REQUEST_BYTES", 32 * 2**10)
    monkeypatch.setattr(source_stream, "PIECE_BYTES", 32 * 2**10)
    monkeypatch.setattr(walk, "STEP_SECONDS", 0.0)
    return hub


@pytest.fixture
def undisturbed(sharded: Hub, tmp_path: Path) -> dict[str, bytes]:
    """The files of a store that nothing happened to."""
    store = repack("owner/name", tmp_path / "undisturbed.flashmoe")
    sharded.requests.clear()
    sharded.forget_ranges()
    return folder_content(store.path)


def weight_bytes(hub: Hub) -> int:
    return sum(path.stat().st_size for path in hub.files.glob("model*.safetensors"))


def sent_bytes(hub: Hub) -> int:
    return sum(end - begin for _, begin, end in hub.ranges)


def test_the_store_is_that_of_the_folder(
    undisturbed: dict[str, bytes], sharded: Hub, tmp_path: Path
) -> None:
    local = folder_content(repack(sharded.files, tmp_path / "local.flashmoe").path)
    ours, theirs = (json.loads(files.pop("flashmoe.json")) for files in (undisturbed, local))
    assert undisturbed == local
    assert ours.pop("source") == {
        "repo": "owner/name",
        "revision": COMMIT,
        "files": theirs.pop("source")["files"],
    }
    assert ours == theirs


def test_every_byte_is_fetched_once_and_none_kept(
    undisturbed: dict[str, bytes], sharded: Hub, tmp_path: Path, dest: Path
) -> None:
    repack("owner/name", dest)
    headers = sum(
        int.from_bytes(path.read_bytes()[:8], "little") + 8
        for path in sharded.files.glob("model*.safetensors")
    )
    assert sent_bytes(sharded) == weight_bytes(sharded) + headers
    assert list((tmp_path / "hub-cache").rglob("model*.safetensors")) == []
    assert folder_content(dest) == undisturbed


def test_progress_counts_what_is_fetched(
    sharded: Hub, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []
    total = weight_bytes(sharded)

    def progress(done: int, of: int) -> None:
        calls.append((done, of))
        if len(calls) == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repack("owner/name", dest, progress=progress)
    assert calls[0] == (0, total)
    reached = calls[-1][0]
    assert 0 < reached < total
    sharded.forget_ranges()
    repack("owner/name", dest, progress=progress)
    assert {of for _, of in calls} == {total}
    assert calls[20] == (0, total)
    assert 0 < calls[21][0] <= reached
    assert calls[-1] == (total, total)
    done = [done for done, _ in calls[20:]]
    assert done == sorted(set(done))


@pytest.mark.parametrize("fault", ["drop", "short", "429", "503", "500"])
def test_what_passes_is_waited_for(
    undisturbed: dict[str, bytes], sharded: Hub, dest: Path, fault: str
) -> None:
    sharded.faults.extend(["", "", fault, "", fault, fault] * 6)
    repack("owner/name", dest)
    assert not sharded.faults
    assert folder_content(dest) == undisturbed


def test_the_server_says_how_long_to_wait(
    sharded: Hub, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(
        "threading.Event.wait",
        lambda event, seconds=None, wait=hub_files.threading.Event.wait: (
            (waits.append(seconds or 0.0) or wait(event, min(seconds or 0.0, 0.01)))
            if seconds and seconds >= 7
            else wait(event, seconds)
        ),
    )
    sharded.faults.extend([""] * 8 + ["429"])
    sharded.retry_after = "7"
    repack("owner/name", dest)
    assert 7.0 in waits


def test_an_address_that_expires(
    undisturbed: dict[str, bytes],
    sharded: Hub,
    dest: Path,
) -> None:
    count = 0

    def expire(done: int, total: int) -> None:
        nonlocal count
        count += 1
        if count % 5 == 0:
            sharded.expire()

    repack("owner/name", dest, progress=expire)
    assert sharded.epoch > 2
    assert folder_content(dest) == undisturbed


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("whole", ("instead of the byte range", "hf download")),
        ("wrong", ("is not what it was",)),
        ("other", ("is not what it was",)),
        ("503", ("cannot be fetched", "answers 503", "run the same command again")),
        ("drop", ("cannot be fetched",)),
    ],
)
def test_what_does_not_pass_is_said(
    sharded: Hub, dest: Path, fault: str, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_files, "ATTEMPTS", 2)
    sharded.always = fault
    if fault == "drop":
        monkeypatch.setattr(hub_files.HubFile, "_receive", lambda self, response, out: 0)
    with refused(SourceError, *words):
        repack("owner/name", dest)
    assert not is_store(dest)


def test_corrupted_bytes_are_noticed_and_fetched_again(
    undisturbed: dict[str, bytes], sharded: Hub, dest: Path
) -> None:
    sharded.faults.extend([""] * 9 + ["corrupt"])
    with refused(SourceError, "did not arrive as the Hub has it", "run the same command again"):
        repack("owner/name", dest)
    assert not is_store(dest)
    repack("owner/name", dest)
    assert folder_content(dest) == undisturbed


@pytest.mark.parametrize("pieces", range(1, 40, 6))
def test_nothing_that_is_whole_is_fetched_again(
    undisturbed: dict[str, bytes], sharded: Hub, dest: Path, pieces: int
) -> None:
    count = 0

    def stop(done: int, total: int) -> None:
        nonlocal count
        count += 1
        if count > pieces:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repack("owner/name", dest, progress=stop)
    written = Path(dest / JOURNAL_NAME).stat().st_size
    assert written > 0
    sharded.forget_ranges()
    seen: list[int] = []
    repack("owner/name", dest, progress=lambda done, total: seen.append(done))
    assert seen[0] == 0
    assert folder_content(dest) == undisturbed
    if pieces > 12:
        # The rest, the headers, and what was under way.
        assert sent_bytes(sharded) < weight_bytes(sharded)


def test_a_source_that_moved_on_is_refused(
    undisturbed: dict[str, bytes], sharded: Hub, dest: Path
) -> None:
    interrupt(dest)
    sharded.commit = NEWER
    with refused(SourceError, COMMIT, NEWER, "--revision", "--force"):
        repack("owner/name", dest)
    sharded.commit = COMMIT
    repack("owner/name", dest)
    assert folder_content(dest) == undisturbed


def test_a_source_whose_content_changed_is_refused(sharded: Hub, dest: Path) -> None:
    interrupt(dest)
    path = sharded.files / "model-2.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with refused(SourceError, "has changed since", "--force"):
        repack("owner/name", dest)
    assert repack("owner/name", dest, force=True).manifest.layers


def test_other_options_are_refused(sharded: Hub, dest: Path) -> None:
    interrupt(dest)
    with refused(OptionError, "other options", "--force"):
        repack("owner/name", dest, bits=8)


def test_a_file_that_the_index_lists_is_not_on_the_hub(sharded: Hub, dest: Path) -> None:
    (sharded.files / "model-1.safetensors").unlink()
    with refused(SourceError, "owner/name lacks model-1.safetensors"):
        repack("owner/name", dest)
    assert not dest.exists()


def test_a_file_that_goes_away(sharded: Hub, dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def remove(done: int, total: int) -> None:
        if done:
            (sharded.files / "model-2.safetensors").unlink(missing_ok=True)
            sharded.expire()

    with refused(SourceError, "model-2.safetensors"):
        repack("owner/name", dest, progress=remove)
    assert not is_store(dest)


def test_the_token_goes_to_the_hub(
    undisturbed: dict[str, bytes], sharded: Hub, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded.token = "hf_secret"
    with refused(SourceError, "owner/name cannot be fetched"):
        repack("owner/name", dest)
    monkeypatch.setattr(huggingface_hub.utils._headers, "get_token", lambda: "hf_secret")
    repack("owner/name", dest)
    assert folder_content(dest) == undisturbed


def test_files_in_the_hub_cache_are_used(
    undisturbed: dict[str, bytes], sharded: Hub, dest: Path, tmp_path: Path
) -> None:
    huggingface_hub.hf_hub_download(
        "owner/name", "model-1.safetensors", revision=COMMIT, endpoint=sharded.endpoint
    )
    sharded.forget_ranges()
    repack("owner/name", dest)
    assert {name for name, _, _ in sharded.ranges} == {"model-0.safetensors", "model-2.safetensors"}
    assert folder_content(dest) == undisturbed


def interrupt(dest: Path) -> None:
    """A repack that is stopped in the middle."""

    def stop(done: int, total: int) -> None:
        if 2 * done > total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repack("owner/name", dest, progress=stop)
