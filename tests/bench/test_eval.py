"""Divergence from a reference: by hand, of a model from itself, and what the command says."""

import json
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flashmoe import OptionError, PromptError, StoreError, repack
from flashmoe.bench import divergence
from flashmoe.bench import eval as protocol
from flashmoe.bench.divergence import Tally
from flashmoe.bench.eval import evaluate
from flashmoe.demo import DEMO_FOLDER
from flashmoe.engine.options import Options
from flashmoe.store.reader import Store, open_store
from tests.support.commands import Run, assert_one_line
from tests.support.families import load_resident
from tests.support.refusals import refused

TEXT = "Define scent. A distinctive odor that is pleasant. What is a barn? An outlying building."
SMALL = Options(cache="min", kernel="reference")


@pytest.fixture(scope="module")
def reference(demo_store: Path) -> Store:
    return open_store(demo_store)


@pytest.fixture(scope="module")
def coarse(tmp_path_factory: pytest.TempPathFactory, reference: Store) -> Store:
    """The demo model again, its last expert records damaged on purpose: another model."""
    folder = tmp_path_factory.mktemp("coarse") / "coarse.flashmoe"
    store = repack(DEMO_FOLDER, folder)
    layer = store.manifest.layers[-1].layout
    with store.file(layer.file).open("r+b") as file:
        for expert in range(layer.n_experts):
            file.seek(layer.record_offset(expert))
            file.write(bytes(4096))
    return store


@pytest.fixture(autouse=True)
def at_home(home: Path) -> Path:
    return home


def test_by_hand() -> None:
    tally = Tally()
    # Probabilities 1/2, 1/4, 1/4 against 1/4, 1/4, 1/2; logits may be shifted at will.
    reference = np.log(np.array([[2, 1, 1], [1, 1, 2]], np.float32)) + 7
    logits = np.log(np.array([[1, 1, 2], [1, 1, 2]], np.float32)) - 3
    tally.add(reference, logits, np.array([0, 2]))
    found = tally.result()
    assert found.tokens == 2
    kl = 0.25 * math.log(2)  # log(2)/2 for the first token, -log(2)/4 for the last
    assert found.kl_mean == pytest.approx(kl / 2, rel=1e-6)
    assert found.kl_max == pytest.approx(kl, rel=1e-6)
    assert found.kl_p99 == pytest.approx(0.99 * kl, rel=1e-6)
    assert found.kl_error == pytest.approx(kl / 2, rel=1e-6)
    assert found.reference_perplexity == pytest.approx(2, rel=1e-6)
    assert found.perplexity == pytest.approx(math.sqrt(8), rel=1e-6)
    assert found.agreement == 0.5


def test_slices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    reference, logits = draw.standard_normal((2, 20, 11)).astype(np.float32)
    targets = draw.integers(0, 11, 20)
    results = []
    for slice_bytes in (1, 8 * 11 * 3, 2**25):
        monkeypatch.setattr(divergence, "SLICE_BYTES", slice_bytes)
        tally = Tally()
        tally.add(reference, logits, targets)
        results.append(tally.result())
    assert results[0] == results[1] == results[2]
    assert results[0].kl_mean > 0


def test_words_that_cannot_be_add_nothing() -> None:
    tally = Tally()
    reference = np.array([[0, -np.inf, 0]], np.float32)
    tally.add(reference, np.array([[0, 5, 0]], np.float32), np.array([0]))
    expected = math.log(0.5) - math.log(1 / (2 + math.exp(5)))
    assert tally.result().kl_mean == pytest.approx(expected)


def test_a_model_is_not_far_from_itself(reference: Store) -> None:
    seen = []
    result = evaluate(
        reference, reference, TEXT, options=SMALL, progress=lambda *args: seen.append(args)
    )
    found = result.divergence
    assert (found.kl_mean, found.kl_max, found.agreement) == (0, 0, 1)
    assert found.perplexity == found.reference_perplexity
    assert seen[-1] == (2 * found.tokens, 2 * found.tokens)
    assert seen == sorted(seen)


def test_against_stock_mlx_lm(reference: Store, coarse: Store) -> None:
    """Every figure again from whole windows through mlx-lm and plain sums."""
    window = 16
    result = evaluate(coarse, reference, TEXT, options=SMALL, window=window)
    from flashmoe import FlashMoEModel

    with FlashMoEModel(coarse, SMALL) as model:
        ids = list(model.tokenizer.encode(TEXT))
        stock = load_resident(DEMO_FOLDER)
        stock.set_dtype(mx.float32)
        kl, surprise, agrees = [], [], []
        for first in range(0, len(ids), window):
            tokens = ids[first : first + window]
            if len(tokens) < 2:
                continue
            both = [m(mx.array([tokens]))[0, :-1] for m in (stock, model.model)]
            p, q = (np.array(x, np.float64) for x in both)
            p, q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (p, q))
            kl += list((np.exp(p) * (p - q)).sum(1))
            surprise += [-q[i, token] for i, token in enumerate(tokens[1:])]
            agrees += list(p.argmax(1) == q.argmax(1))
    found = result.divergence
    assert found.tokens == len(kl)
    assert found.kl_mean == pytest.approx(np.mean(kl), rel=1e-3)
    assert found.kl_mean > 0.01
    assert found.perplexity == pytest.approx(np.exp(np.mean(surprise)), rel=1e-3)
    assert found.agreement == pytest.approx(np.mean(agrees))


def test_chunks_and_banks_change_nothing(
    reference: Store, coarse: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(coarse, reference, TEXT, options=SMALL).divergence
    monkeypatch.setattr(protocol, "LOGIT_BYTES", 1)
    single = evaluate(coarse, reference, TEXT, options=Options(kernel="reference")).divergence
    assert single.tokens == whole.tokens
    assert single.kl_mean == pytest.approx(whole.kl_mean, rel=1e-3)


def test_what_cannot_be_evaluated(
    reference: Store, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    for window in (0, 1):
        with refused(OptionError, "window", str(window)):
            evaluate(reference, reference, TEXT, options=SMALL, window=window)
    with refused(OptionError, "9999", "context"):
        evaluate(reference, reference, TEXT, options=SMALL, window=9999)
    with refused(OptionError, "at least 2 tokens", "1"):
        evaluate(reference, reference, TEXT, options=SMALL, max_tokens=1)
    with refused(PromptError, "empty"):
        evaluate(reference, reference, " ", options=SMALL)
    monkeypatch.setattr(protocol.shutil, "disk_usage", lambda folder: Disk)
    with refused(StoreError, "0.0 GB free", "--tokens"):
        evaluate(reference, reference, TEXT, options=SMALL)
    assert list((home / ".cache" / "flashmoe").glob("logits-*")) == []


class Disk:
    free = 0


def test_other_tokenizers_are_refused(
    reference: Store, coarse: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = iter(([1, 2, 3], [1, 2, 4]))
    monkeypatch.setattr(protocol, "encode_prompt", lambda *args, **named: next(texts))
    with refused(OptionError, "other tokens", str(coarse.path)):
        evaluate(coarse, reference, TEXT, options=SMALL)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_the_command(run_cli: Run, demo_store: Path, coarse: Store, text: Path) -> None:
    line = ["eval", coarse.path, "--against", demo_store, "--text", text, "--tokens", 20]
    result = run_cli(*line, "--cache", "min")
    assert (result.code, result.err) == (0, "")
    names = [row.split()[0] for row in result.out.splitlines()]
    assert names == ["model", "reference", "tokens", "perplexity", "KL", "top-1"]
    report = run_cli(*line, "--cache", "min", "--json").json()
    assert report["divergence"]["tokens"] == 19
    assert f"mean {report['divergence']['kl_mean']:.5f}" in result.out
    assert f"{report['divergence']['agreement']:.2%} the same" in result.out


def test_a_checkpoint_counts_with_its_own_weights(
    run_cli: Run, demo_store: Path, text: Path, home: Path
) -> None:
    line = ["eval", demo_store, "--against", DEMO_FOLDER, "--text", text, "--json"]
    report = run_cli(*line).json()
    assert report["divergence"]["kl_max"] == 0
    kept = open_store(report["reference"])
    assert kept.path.is_relative_to(home / ".cache" / "flashmoe")
    assert kept.manifest.layers == open_store(demo_store).manifest.layers


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", ["empty"]), (b"a", ["single token"]), (b"\xff\xfe", ["not valid UTF-8"])],
)
def test_useless_texts(
    run_cli: Run, demo_store: Path, tmp_path: Path, content: bytes, words: list[str]
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    result = run_cli("eval", demo_store, "--against", demo_store, "--text", path)
    assert_one_line(result, 1, *words)


def test_json_is_finite(run_cli: Run, demo_store: Path, text: Path) -> None:
    line = ["eval", demo_store, "--against", demo_store, "--text", text, "--tokens", 2, "--json"]
    report = run_cli(*line).json()
    assert report["divergence"]["tokens"] == 1
    assert json.dumps(report, allow_nan=False)
