"""What `flashmoe bench resident` prints."""

from dataclasses import fields
from pathlib import Path

from flashmoe.bench.resident import ResidentResult
from tests.support.commands import Run


def test_json(run_cli: Run, demo_store: Path) -> None:
    brief = ("--rounds", "1", "--max-tokens", "2")
    results = run_cli("bench", "resident", demo_store, *brief, "--json").json()
    assert [result["name"] for result in results] == ["min", "half", "full"]
    for result in results:
        assert list(result) == [field.name for field in fields(ResidentResult)]
        assert 0 < result["slowest"] <= result["tokens_per_second"] <= result["fastest"]
        assert result["ratio"] is None
    rates = [result["hit_rate"] for result in results]
    assert rates == sorted(rates)
    assert rates[-1] == 1.0
    assert results[-1]["bytes_read_per_token"] == 0
