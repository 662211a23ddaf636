"""Recording what tokens are routed to, and replaying it: the script as a person runs it."""

import itertools
import json
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from flashmoe import FlashMoEError, FlashMoEModel
from tests.support.answers import BARN, CAPITAL

SCRIPT = Path(__file__).parents[2] / "scripts" / "routing_traces"


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True)


def replayed(path: Path, *arguments: Any) -> Any:
    done = run("replay", path, "--json", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def write_trace(path: Path, experts: np.ndarray, n_experts: int, top_k: int) -> None:
    """Tokens fed alone; `experts` [tokens, layers * top_k]."""
    tokens, columns = experts.shape
    layers = [
        {"path": f"layers.{i}", "n_experts": n_experts, "top_k": top_k, "record_bytes": 4096}
        for i in range(columns // top_k)
    ]
    tensors = {
        "experts": mx.array(experts.astype(np.uint16)),
        "step_tokens": mx.ones(tokens, mx.uint32),
        "step_prompt": mx.zeros(tokens, mx.uint32),
    }
    about = json.dumps({"version": 1, "model": "tiny", "layers": layers})
    mx.save_safetensors(str(path), tensors, {"flashmoe_trace": about})
    path.with_name(f"{path.name}.safetensors").rename(path)


def most_hits(steps: list[list[int]], capacity: int) -> int:
    """The most hits over all choices of victims, every miss being brought in."""

    @cache
    def best(now: int, resident: frozenset[int]) -> int:
        if now == len(steps):
            return 0
        step = frozenset(steps[now])
        surplus = len(resident | step) - capacity
        choices = itertools.combinations(sorted(resident - step), max(surplus, 0))
        kept = (best(now + 1, (resident | step).difference(victims)) for victims in choices)
        return len(resident & step) + max(kept)

    return best(0, frozenset())


def test_belady_is_the_best_of_all_choices(tmp_path: Path) -> None:
    draw, n_layers = np.random.default_rng(0), 20
    rows = [np.concatenate([draw.permutation(6)[:2] for _ in range(n_layers)]) for _ in range(10)]
    experts = np.stack(rows)
    write_trace(tmp_path / "tiny", experts, 6, 2)
    sizes = replayed(tmp_path / "tiny", "--share", 0.5, "--share", 0.67, "--share", 1)["sizes"]
    assert [size["slots"][0] for size in sizes] == [2, 3, 4, 6]
    for size in sizes:
        layers = [experts[:, 2 * i : 2 * i + 2].tolist() for i in range(n_layers)]
        best = sum(most_hits(layer, size["slots"][0]) for layer in layers)
        assert size["belady"] == best >= max(size["lru"], size["lfu"])
    # Everything stays: only first uses miss.
    assert sizes[-1]["lru"] == sizes[-1]["lfu"] == sizes[-1]["belady"]
    assert sizes[1]["lru"] < sizes[1]["belady"]


def test_by_hand(tmp_path: Path) -> None:
    write_trace(tmp_path / "tiny", np.array([[0], [1], [0], [2], [0], [3], [1], [0]]), 4, 1)
    size = replayed(tmp_path / "tiny", "--share", 0.5)["sizes"][1]
    # The last 0: an LRU evicted it for 1, an LFU kept it.
    assert (size["slots"], size["lru"], size["lfu"], size["belady"]) == ([2], 2, 3, 3)
    table = run("replay", tmp_path / "tiny", "--share", "0.5").stdout
    assert "Belady" in table and "\n50%" in table


def test_a_model_is_recorded_and_replayed(
    demo: FlashMoEModel, demo_store: Path, tmp_path: Path
) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "demo.trace"
    prompts.write_text(f"{CAPITAL}\n\n  {BARN}  \n")
    asked = ("record", demo_store, out, "--prompts", prompts, "--max-tokens", "12", "--json")
    done = run(*asked, "--cache", "2MB")
    assert (done.returncode, done.stderr) == (0, "")
    summary = json.loads(done.stdout)
    trace = mx.load(str(out), format="safetensors")
    # What an observer in this process is told, whatever the bank's size.
    seen: list[np.ndarray] = []
    demo.observe_routing(lambda layer, experts: seen.append(experts) if layer == 3 else None)
    for prompt in (CAPITAL, BARN):
        demo.generate(prompt, max_new_tokens=12)
    demo.observe_routing(None)
    rows = np.concatenate([experts.reshape(-1, 2) for experts in seen])
    np.testing.assert_array_equal(np.array(trace["experts"])[:, 6:8], rows)
    assert (summary["prompts"], summary["prompt_tokens"]) == (2, 19 + 16)
    assert summary["tokens"] == len(rows) == int(np.array(trace["step_tokens"]).sum())
    report = replayed(out, "--share", 1, "--decode-only")
    alone = int((np.array(trace["step_tokens"]) == 1).sum())
    assert (report["tokens"], report["accesses"]) == (len(rows), 12 * alone)


def test_refusals(demo_store: Path, tmp_path: Path) -> None:
    good, cut, other = (tmp_path / name for name in ("good", "cut", "other"))
    write_trace(good, np.array([[0], [1]]), 4, 1)
    cut.write_bytes(good.read_bytes()[:-4])
    beyond = tmp_path / "beyond"
    write_trace(beyond, np.array([[0], [4]]), 4, 1)
    other.write_text("Hello\n")
    for arguments, code, words in (
        (("replay", tmp_path / "missing"), 1, ("missing",)),
        (("replay", cut), 1, (str(cut),)),
        (("replay", other), 1, (str(other),)),
        (("replay", beyond), 1, (str(beyond), "beyond 4", "record it again")),
        (("replay", good, "--share", "1.5"), 2, ("share", "1.5")),
        (("record", demo_store, other), 2, (str(other), "is no trace; name another")),
        (("record", demo_store, tmp_path / "x", "--prompts", tmp_path / "no"), 1, ("No such",)),
    ):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (code, "")
        assert done.stderr.startswith("routing_traces: ") and done.stderr.count("\n") == 1
        assert all(word in done.stderr for word in words)
    assert other.read_text() == "Hello\n"


def test_interrupted(demo_store: Path, tmp_path: Path) -> None:
    line = [sys.executable, str(SCRIPT), "record", str(demo_store), str(tmp_path / "x")]
    process = subprocess.Popen([*line, "--max-tokens", "1000"], stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not (tmp_path / "x.partial").exists() and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "routing_traces: interrupted\n"
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


def test_closed_models_cannot_be_observed(demo_store: Path) -> None:
    model = FlashMoEModel.from_pretrained(demo_store, cache="min")
    model.close()
    with pytest.raises(FlashMoEError, match="closed"):
        model.observe_routing(None)
