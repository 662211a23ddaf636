"""The workflow of hosted runners: it parses, and what it runs exists."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from tests.support.commands import Run

ROOT = Path(__file__).resolve().parents[1]
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())


def commands(job: str) -> list[str]:
    return [step["run"] for step in WORKFLOW["jobs"][job]["steps"] if "run" in step]


def test_what_runs_where() -> None:
    jobs = WORKFLOW["jobs"]
    assert {name: job["runs-on"].partition("-")[0] for name, job in jobs.items()} == {
        "linux": "ubuntu",
        "apple-silicon": "macos",
    }
    assert commands("linux") == ["make lint", "make test"]
    assert commands("apple-silicon") == ["make test", ".venv/bin/flashmoe info --check-kernels"]


def test_the_commands_exist(run_cli: Run) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for job in WORKFLOW["jobs"]:
        for command in commands(job):
            program, *words = command.split()
            if program == "make":
                assert set(words) <= targets
            else:
                assert program == ".venv/bin/flashmoe"
                assert words[1] in run_cli(words[0], "--help").out


def test_versions_are_pinned() -> None:
    for job in WORKFLOW["jobs"].values():
        assert re.fullmatch(r"\w+-[\d.]+", job["runs-on"])
        for step in job["steps"]:
            assert re.fullmatch(r"actions/[a-z-]+@v\d+", step.get("uses", "actions/none@v0"))
            assert step.get("with", {}).get("python-version", "3.12") == "3.12"
