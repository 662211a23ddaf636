"""What `from_pretrained` may be given, and that a checkpoint is repacked on first use only."""

import os
import shutil

import pytest

from flashmoe import FlashMoEModel, OptionError, SourceError, StoreError, repack
from tests.support.answers import BARN, BARN_ANSWER, CAPITAL, CAPITAL_ANSWER, HELLO, HELLO_ANSWER
from tests.support.checkpoints import edit_config, save_speaking
from tests.support.disk import no_space
from tests.support.hub import COMMIT
from tests.support.sessions import tokens


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A float checkpoint with a tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-moe"
    return save_speaking(folder, "qwen3_moe", bits=None)


def cached_stores(home):
    return sorted((home / ".cache" / "flashmoe").glob("*.flashmoe"))


def test_the_demo_is_what_none_means(home):
    calls = []
    with FlashMoEModel.from_pretrained(progress=lambda *call: calls.append(call)) as model:
        assert model.generate(HELLO) == HELLO_ANSWER
        assert model.store.path == cached_stores(home)[0]
    assert calls[-1][0] == calls[-1][1] > 18_000_000
    calls.clear()
    with FlashMoEModel.from_pretrained(progress=lambda *call: calls.append(call)) as model:
        assert model.generate(CAPITAL) == CAPITAL_ANSWER
    assert calls == []
    assert len(cached_stores(home)) == 1


def test_a_store(demo, demo_store):
    assert demo.store.path == demo_store
    assert demo.generate(BARN) == BARN_ANSWER


def test_a_checkpoint_folder(home, tiny):
    shutil.copytree(tiny, home / "model")
    with FlashMoEModel.from_pretrained("~/model") as model:
        assert [model.store.path] == cached_stores(home)
        assert model.store.path.name.startswith("model-")
        first = tokens(model.stream([1, 2, 3], 5))
    with FlashMoEModel.from_pretrained(home / "model") as model:
        assert tokens(model.stream([1, 2, 3], 5)) == first
    assert len(cached_stores(home)) == 1


@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h", "qwen3_5_moe", "deepseek_v3"])
def test_other_families(home, source, dest, family):
    save_speaking(source, family)
    with FlashMoEModel.from_pretrained(source) as model:
        expected = tokens(model.stream([3, 1, 4, 1, 5, 9], 8))
        assert len(expected) == 8
    with FlashMoEModel(repack(source, dest), cache="min") as model:
        assert tokens(model.stream([3, 1, 4, 1, 5, 9], 8)) == expected
        model.check_integrity()


def test_a_changed_checkpoint_is_repacked_again(home, tiny):
    shutil.copytree(tiny, home / "model")
    with FlashMoEModel.from_pretrained(home / "model"):
        pass
    edit_config(home / "model", eos_token_id=7)
    with FlashMoEModel.from_pretrained(home / "model") as model:
        assert model.tokenizer.eos_token_ids == {7}
    assert len(cached_stores(home)) == 2


def test_each_precision_is_cached_by_itself(home, tiny):
    packed = {}
    for options in ({"bits": 4}, {"bits": 8}, {"bits": 4, "group_size": 32}, {"bits": 4}):
        with FlashMoEModel.from_pretrained(tiny, **options) as model:
            up_proj = model.store.manifest.layers[0].layout.projections["up_proj"]
            packed[model.store.path] = (up_proj.bits, up_proj.group_size)
    assert sorted(packed.values()) == [(4, 32), (4, 64), (8, 64)]
    assert sorted(packed) == cached_stores(home)


@pytest.mark.parametrize("option", ["bits", "group_size", "resident_bits"])
def test_a_store_takes_no_precision(demo_store, option):
    with pytest.raises(OptionError, match="is a store"):
        FlashMoEModel.from_pretrained(demo_store, **{option: 32})


def test_a_hub_id(hub):
    with FlashMoEModel.from_pretrained("owner/name", revision="main") as model:
        source = model.store.manifest.source
        assert (source.repo, source.revision) == ("owner/name", COMMIT)
        assert model.store.path.name.startswith("owner--name-")
    assert "/revision/main" in hub.requests[0]


def test_a_hub_that_cannot_be_reached(hub):
    hub.reachable = False
    with pytest.raises(SourceError) as error:
        FlashMoEModel.from_pretrained("owner/name")
    assert str(error.value).startswith("owner/name cannot be fetched from the Hub: ")
    assert "\n" not in str(error.value)


def test_no_such_model(home):
    with pytest.raises(SourceError, match="/nowhere/at/all is neither"):
        FlashMoEModel.from_pretrained("/nowhere/at/all")


def test_a_damaged_store(demo_store, dest):
    shutil.copytree(demo_store, dest)
    os.truncate(dest / "experts" / "layer-003.safetensors", 50_000)
    with pytest.raises(StoreError, match="layer-003"):
        FlashMoEModel.from_pretrained(dest)


def test_a_first_use_that_failed_is_repeated(home, tiny, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", no_space)
        with pytest.raises(StoreError):
            FlashMoEModel.from_pretrained(tiny)
    with FlashMoEModel.from_pretrained(tiny) as model:
        assert len(tokens(model.stream([1, 2, 3], 5))) == 5
