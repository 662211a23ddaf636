import shutil

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flashmoe.base.errors import StoreError
from flashmoe.store.verify import VerifyReport, verify
from tests.support.stores import CONFIG, RESIDENT_FILE, layer_layout, tiny_store

LAYER_FILE = "experts/layer-001.safetensors"
LAYOUT = layer_layout(1)
# A header of 16 KiB and four records of 16 KiB each; 88 resident bytes behind a header.
LAYER_BYTES = 81_920
RESIDENT_BYTES = 16_472
TOTAL_BYTES = len(CONFIG) + RESIDENT_BYTES + 2 * LAYER_BYTES


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("verify") / "tiny.flashmoe")


@pytest.fixture(scope="module")
def copied(store, tmp_path_factory):
    return shutil.copytree(store.path, tmp_path_factory.mktemp("flipped") / "tiny.flashmoe")


def flip(path, position, mask=0x01):
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ mask]))


def message_of_flip(folder, name, position, mask=0x01):
    """What verify says about one wrong byte; the byte is put right afterwards."""
    flip(folder / name, position, mask)
    try:
        with pytest.raises(StoreError) as caught:
            verify(folder)
    finally:
        flip(folder / name, position, mask)
    message = str(caught.value)
    assert str(folder / name) in message
    assert "damaged" in message
    return message


def expected_in_layer(position):
    """The words that name what lies at a position of a layer file."""
    if position < LAYOUT.data_start:
        return f"header differs at offset {position}"
    expert, inside = divmod(position - LAYOUT.data_start, LAYOUT.record.stride)
    for component in LAYOUT.record.components:
        if component.offset <= inside < component.end:
            start = LAYOUT.data_start + expert * LAYOUT.record.stride + component.offset
            return (
                f"model.layers.1.mlp.switch_mlp expert {expert} {component.name} "
                f"at offset {start} ({component.nbytes} bytes)"
            )
    return f"padding at offset {position} is not zero"


def test_a_good_store(store):
    assert verify(store.path) == VerifyReport(files=4, bytes=TOTAL_BYTES)
    assert verify(str(store.path)).bytes == 180_335


def test_progress_ends_at_the_total(store):
    calls = []
    verify(store.path, lambda done, total: calls.append((done, total)))
    assert {total for _, total in calls} == {TOTAL_BYTES}
    done = [done for done, _ in calls]
    assert done == sorted(done)
    assert done[-1] == TOTAL_BYTES


@given(st.integers(0, LAYER_BYTES - 1), st.sampled_from([1 << bit for bit in range(8)]))
@example(0, 1)
@example(16_383, 1)
@example(16_384, 1)
@example(16_384 + 4095, 1)
@example(16_384 + 4096, 1)
@example(16_384 + 4096 + 191, 1)
@example(16_384 + 4096 + 192, 1)
@example(16_384 + 8191, 1)
@example(16_384 + 8192, 1)
@example(16_384 + 8192 + 139, 1)
@example(16_384 + 8192 + 140, 1)
@example(LAYER_BYTES - 1, 0x80)
def test_a_flipped_bit_of_a_layer_file(copied, position, mask):
    message = message_of_flip(copied, LAYER_FILE, position, mask)
    assert expected_in_layer(position) in message


@pytest.mark.parametrize("expert", range(4))
@pytest.mark.parametrize(
    ("inside", "named"),
    [
        (2000, "gate_proj.weight at offset {0} (4096 bytes)"),
        (4096 + 100, "gate_proj.scales at offset {1} (192 bytes)"),
        (8192 + 70, "down_proj.weight at offset {2} (140 bytes)"),
    ],
)
def test_every_component_of_every_expert(copied, expert, inside, named):
    record = 16_384 + expert * 16_384
    message = message_of_flip(copied, LAYER_FILE, record + inside)
    assert f"expert {expert} " + named.format(record, record + 4096, record + 8192) in message


@given(st.integers(0, RESIDENT_BYTES - 1))
@example(16_383)
@example(16_384)
@example(16_384 + 59)
@example(16_384 + 60)
@example(RESIDENT_BYTES - 1)
def test_a_flipped_bit_of_a_resident_file(copied, position):
    message = message_of_flip(copied, RESIDENT_FILE, position)
    if position < 16_384:
        assert f"header differs at offset {position}" in message
    elif position < 16_384 + 60:
        assert "embed.weight at offset 16384 (60 bytes)" in message
    else:
        assert "norm.weight at offset 16444 (28 bytes)" in message


@pytest.mark.parametrize("position", range(len(CONFIG)))
def test_a_flipped_bit_of_a_copied_file(copied, position):
    assert "its SHA-256 is not the manifest's" in message_of_flip(copied, "config.json", position)


def test_a_copied_file_of_another_length(store, tmp_path):
    folder = shutil.copytree(store.path, tmp_path / "tiny.flashmoe")
    (folder / "config.json").write_bytes(CONFIG + b" ")
    with pytest.raises(StoreError, match=r"config\.json is damaged"):
        verify(folder)


def test_the_first_damage_is_named(store, tmp_path):
    folder = shutil.copytree(store.path, tmp_path / "tiny.flashmoe")
    flip(folder / LAYER_FILE, 16_384 + 3 * 16_384)
    flip(folder / LAYER_FILE, 16_384 + 16_384 + 4096)
    flip(folder / LAYER_FILE, 16_384 + 5000)
    with pytest.raises(StoreError, match=r"expert 1 gate_proj\.scales at offset 36864 "):
        verify(folder)
    flip(folder / "experts/layer-000.safetensors", 16_384)
    with pytest.raises(StoreError, match=r"layer-000.*expert 0 gate_proj\.weight"):
        verify(folder)
    flip(folder / RESIDENT_FILE, 16_384)
    with pytest.raises(StoreError, match=r"embed\.weight"):
        verify(folder)


def test_a_wrong_checksum_in_the_manifest(store, tmp_path):
    folder = shutil.copytree(store.path, tmp_path / "tiny.flashmoe")
    text = (folder / "flashmoe.json").read_text()
    wrong = text.replace(store.manifest.layers[1].sha256, "0" * 64)
    (folder / "flashmoe.json").write_text(wrong)
    with pytest.raises(StoreError, match=r"layer-001.*does not match its SHA-256 although every"):
        verify(folder)


def test_verify_needs_a_store(tmp_path):
    with pytest.raises(StoreError, match="not a complete flashmoe store"):
        verify(tmp_path)


def test_the_damaged_copy_is_whole_again(copied):
    assert verify(copied).files == 4
