"""What a store keeps of its checkpoint, where it is written, and how far along it is."""

import hashlib

import pytest

from flashmoe import repack
from flashmoe.repacking.walk import Run
from tests.support.checkpoints import store_tensors
from tests.support.families import save_checkpoint
from tests.support.stores import folder_content


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_source_identity(tmp_path, dest):
    source = tmp_path / "Some-MoE"
    save_checkpoint(source, "qwen3_moe")
    for name in ("tokenizer.json", "LICENSE", "merges.txt", "chat_template.jinja"):
        (source / name).write_text(f'"{name}"')
    (source / "modeling.py").write_text("raise SystemExit")
    manifest = repack(source, dest).manifest
    assert (manifest.source.repo, manifest.source.revision) == ("Some-MoE", None)
    copied = {"config.json", "tokenizer.json", "LICENSE", "merges.txt", "chat_template.jinja"}
    assert manifest.copied.keys() == copied
    assert manifest.source.files == {
        name: sha256(source / name) for name in [*copied, "model.safetensors"]
    }
    for name, digest in manifest.copied.items():
        assert digest == sha256(dest / name) == sha256(source / name)


def test_a_repack_is_deterministic(float_qwen, tmp_path):
    stores = [repack(float_qwen, tmp_path / name, bits=5).path for name in ("one", "two")]
    one, two = map(folder_content, stores)
    assert one == two
    assert {"flashmoe.json", "config.json", "experts/layer-000.safetensors"} <= one.keys()


def test_the_default_destination(float_qwen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = repack(float_qwen)
    assert store.path.resolve() == tmp_path / f"{float_qwen.name}.flashmoe"


def test_progress_counts_the_bytes_of_tensors(float_qwen, dest):
    calls = []
    store = repack(float_qwen, dest, progress=lambda done, total: calls.append((done, total)))
    total = sum(len(content) for _, _, content in store_tensors(store).values())
    assert calls[0] == (0, total)
    assert calls[-1] == (total, total)
    done = [done for done, _ in calls]
    assert done == sorted(set(done))


def test_an_interruption_between_hashing_and_counting(float_qwen, dest, tmp_path, monkeypatch):
    monkeypatch.setattr("flashmoe.repacking.schedule.PIECE_BYTES", 64 * 2**10)
    advance_to = Run._advance_to
    groups = []

    def interrupted(self, group):
        groups.append(group)
        if len(groups) == 4:
            raise KeyboardInterrupt
        advance_to(self, group)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_advance_to", interrupted)
        with pytest.raises(KeyboardInterrupt):
            repack(float_qwen, dest)
    resumed = repack(float_qwen, dest)
    undisturbed = repack(float_qwen, tmp_path / "undisturbed.flashmoe")
    assert folder_content(resumed.path) == folder_content(undisturbed.path)
