"""Fixtures that several test modules share; Hypothesis draws the same examples every time."""

import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO, TextIOWrapper
from pathlib import Path

import huggingface_hub
import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import settings

from flashmoe import FlashMoEModel, repack
from flashmoe.cli.main import main
from flashmoe.demo import DEMO_FOLDER
from flashmoe.probe import tuning
from flashmoe.store.reader import Store
from tests.support.commands import FLASHMOE, Result, Run
from tests.support.families import save_checkpoint
from tests.support.hub import Hub, save_small
from tests.support.places import save_places
from tests.support.sessions import resident_model
from tests.support.stores import folder_content, tiny_store, write_one_layer

settings.register_profile("seeded", derandomize=True, database=None, deadline=None)
settings.load_profile("seeded")

# On a Mac too: logits are compared byte for byte, which stock mlx-lm allows on this backend alone.
mx.set_default_device(mx.cpu)


def pytest_configure() -> None:
    """Ctrl-C works in tests however they were started.

    In the background of a script SIGINT is ignored, which Python leaves so and every process
    that a test starts inherits. A handler in this process gives those the default again, since
    no handler outlives exec. That is done once here, not where tests start processes: tests also
    raise the signal in their own process, and whoever writes the next one need not know.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# Where things are read and written


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of the test's own, because ~/.cache/flashmoe is where stores are kept."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Where a test may save a checkpoint; nothing is there."""
    return tmp_path / "source"


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    """Where a test may write a store; nothing is there."""
    return tmp_path / "dest.flashmoe"


@pytest.fixture
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncing is what takes a writer's time; a closed descriptor is still an error."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: os.fstat(descriptor) and None)


@pytest.fixture
def hub(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """All that is asked of the Hub is asked of this one, which has a small model."""
    hub = Hub(tmp_path / "hub")
    save_small(hub.files)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr("flashmoe.checkpoint.hub.BACKOFF_SECONDS", 0.001)
    yield hub
    hub.close()


@pytest.fixture(scope="session", autouse=True)
def untuned() -> Iterator[None]:
    """What whoever runs the tests has tuned is of no concern to them."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tuning, "FOLDER", "tuning-of-tests")
        yield


# The demo model


@pytest.fixture(scope="session")
def demo_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled demo model as a store."""
    return repack(DEMO_FOLDER, tmp_path_factory.mktemp("demo") / "demo.flashmoe").path


@pytest.fixture(scope="module")
def demo(demo_store: Path) -> Iterator[FlashMoEModel]:
    """The demo model with every expert in its bank."""
    with FlashMoEModel.from_pretrained(demo_store, memory="4GB") as model:
        assert set(model.memory_plan.slots) == {32}
        yield model


@pytest.fixture
def small_demo(demo_store: Path) -> Iterator[FlashMoEModel]:
    """The demo model with the smallest bank that works."""
    with FlashMoEModel.from_pretrained(demo_store, cache="min") as model:
        yield model


# Tiny models, checkpoints and stores, which no test may change


@pytest.fixture(scope="session")
def float_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A qwen3_moe checkpoint in float32: layer 0 is dense, layers 1 and 2 have 8 experts."""
    folder = tmp_path_factory.mktemp("float_qwen")
    save_checkpoint(folder, "qwen3_moe", bits=None)
    return folder


@pytest.fixture(scope="session")
def places(demo_store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What commands may be pointed at, good and bad, by the name that cases call it."""
    return {**save_places(tmp_path_factory.mktemp("places")), "demo": demo_store}


@pytest.fixture(scope="session")
def good_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store of two layers of random bytes."""
    return tiny_store(tmp_path_factory.mktemp("good") / "tiny.flashmoe")


@pytest.fixture
def store_folder(good_store: Store, dest: Path) -> Path:
    """A copy of that store, for the test to damage."""
    return shutil.copytree(good_store.path, dest)


@pytest.fixture(scope="session")
def one_layer_files(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, bytes]]:
    """The files of the one-layer stores with seeds 0 and 1."""
    root = tmp_path_factory.mktemp("one_layer")
    for seed in (0, 1):
        write_one_layer(root / str(seed), seed)
    return [folder_content(root / str(seed)) for seed in (0, 1)]


@pytest.fixture
def qwen() -> nn.Module:
    """A resident qwen3_moe, the model of most sessions."""
    return resident_model("qwen3_moe")


# The command line


@pytest.fixture
def run_cli(home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """`run_cli(*args, stdin=b"")` runs the command line in this process, HOME being `home`."""
    # pytest's own handlers would keep from stderr what a real run logs there.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])

    def run(*args: object, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "argv", ["flashmoe", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(stdin), encoding="utf-8"))
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        captured = capfd.readouterr()
        code = left.value.code
        return Result(code if isinstance(code, int) else -1, captured.out, captured.err)

    return run


@pytest.fixture
def run_process(home: Path) -> Run:
    """`run_process(*args, stdin=b"", env={})` runs the installed command, HOME being `home`."""

    def run(*args: object, stdin: bytes = b"", env: dict[str, str] | None = None) -> Result:
        done = subprocess.run(
            [str(FLASHMOE), *map(str, args)],
            input=stdin,
            capture_output=True,
            env={**os.environ, **(env or {})},
            timeout=60,
            check=False,
        )
        out, err = (text.decode(errors="replace") for text in (done.stdout, done.stderr))
        return Result(done.returncode, out, err)

    return run
