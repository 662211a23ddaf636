"""Checking kernels where they run: a wrong one is found, replaced, named once and remembered."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flashmoe import native
from flashmoe.kernels import cpu, reference, select, self_check
from flashmoe.kernels.check_cases import BITS, GROUPS, make_case, standard_cases
from flashmoe.kernels.check_verdicts import PASSED, Verdicts
from flashmoe.kernels.contract import ExpertForward, ExpertSpec, ProjectionPacking, Slots
from flashmoe.kernels.self_check import Checker, check
from tests.support.commands import Run

CASE = make_case(mx.float32, ProjectionPacking(4, 64, "affine"), d_in=64, hidden=128)
HALF = replace(CASE, dtype=mx.float16)


def off_by_little(weights: Mapping[str, mx.array], spec: ExpertSpec) -> ExpertForward:
    """The reference, but for one output."""
    right = reference.bind_experts(weights, spec)

    def forward(x: mx.array, slots: Slots) -> mx.array:
        y = mx.array(right(x, slots))
        y[..., 5] *= 1.01
        return y

    return forward


def unready(weights: Mapping[str, mx.array], spec: ExpertSpec) -> ExpertForward:
    """What does not compile fails when it is called."""

    def forward(x: mx.array, slots: Slots) -> mx.array:
        raise RuntimeError("[metal] cannot compile:\nerror: no such name")

    return forward


def nan(weights: Mapping[str, mx.array], spec: ExpertSpec) -> ExpertForward:
    right = reference.bind_experts(weights, spec)
    return lambda x, slots: right(x, slots) * float("nan")


def too_few(weights: Mapping[str, mx.array], spec: ExpertSpec) -> ExpertForward:
    right = reference.bind_experts(weights, spec)
    return lambda x, slots: right(x, slots)[..., :-1]


def checker(kernel: object, verdicts: Verdicts, covers: bool = True) -> Checker:
    return Checker("tried", kernel, lambda *_: covers, "rev1", verdicts)  # type: ignore[arg-type]


def call(bound: ExpertForward, dtype: mx.Dtype = mx.float32) -> mx.array:
    return bound(mx.ones((2, 64), dtype), np.array([[0, 2], [1, 1]], np.int32))


def test_right_kernels_pass() -> None:
    here = [reference.bind_experts]
    if native.available() is None:
        here.append(cpu.bind_experts)
    for kernel in here:
        outcome = check(kernel, CASE)
        assert outcome.passed
        assert outcome.error is not None
        assert outcome.error < outcome.tolerance == 1e-5


@pytest.mark.parametrize(
    "kernel,verdict",
    [
        (off_by_little, r"its relative error is 0\.00\d+, above 1e-05"),
        (unready, r"it fails: \[metal\] cannot compile:"),
        (nan, "its relative error is nan"),
        (too_few, r"its shape is \(2, 3, 63\), not \(2, 3, 64\)"),
    ],
)
def test_wrong_kernels_do_not(kernel: object, verdict: str) -> None:
    outcome = check(kernel, CASE)  # type: ignore[arg-type]
    assert not outcome.passed
    with pytest.raises(AssertionError, match=verdict):
        raise AssertionError(outcome.verdict)


def test_a_wrong_kernel_is_replaced_with_one_warning() -> None:
    weights = CASE.random_weights()
    tried = checker(off_by_little, Verdicts(None))
    bound = tried.bind_experts(weights, CASE.spec)
    expected = call(reference.bind_experts(weights, CASE.spec))
    with pytest.warns(RuntimeWarning) as warned:
        assert mx.array_equal(call(bound), expected)
        assert mx.array_equal(call(tried.bind_experts(weights, CASE.spec)), expected)
    assert len(warned) == 1
    text = str(warned[0].message)
    assert text.startswith("kernel tried is wrong on this machine")
    assert CASE.label in text
    assert "gate_proj.weight affine 4/64" in text


def test_a_right_kernel_stays() -> None:
    weights = CASE.random_weights()
    used = []

    def counted(weights: Mapping[str, mx.array], spec: ExpertSpec) -> ExpertForward:
        right = reference.bind_experts(weights, spec)
        return lambda x, slots: used.append(x.shape) or right(x, slots)  # type: ignore[func-returns-value]

    bound = checker(counted, Verdicts(None)).bind_experts(weights, CASE.spec)
    for _ in range(3):
        call(bound)
    # Once for the check, with inputs of its own.
    assert used == [(self_check.N_TOKENS, 64), (2, 64), (2, 64), (2, 64)]


def test_every_dtype_is_a_case_of_its_own() -> None:
    """Wrong in float16 alone."""
    weights = CASE.random_weights()

    def half_wrong(weights: Mapping[str, mx.array], spec: ExpertSpec) -> ExpertForward:
        right, wrong = reference.bind_experts(weights, spec), off_by_little(weights, spec)
        return lambda x, slots: (wrong if x.dtype == mx.float16 else right)(x, slots)

    bound = checker(half_wrong, Verdicts(None)).bind_experts(weights, CASE.spec)
    call(bound)
    with pytest.warns(RuntimeWarning, match="x float16"):
        call(bound, mx.float16)


def test_what_a_kernel_hands_on_is_not_checked() -> None:
    weights = CASE.random_weights()
    bound = checker(off_by_little, Verdicts(None), covers=False).bind_experts(weights, CASE.spec)
    assert mx.array_equal(call(bound), call(off_by_little(weights, CASE.spec)))


def test_verdicts_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cache" / "kernel-checks.json"
    assert checker(reference.bind_experts, Verdicts(path)).trusts(CASE)
    with pytest.warns(RuntimeWarning):
        assert not checker(off_by_little, Verdicts(path)).trusts(HALF)
    found = json.loads(path.read_text())
    assert sorted(found.values())[1] == PASSED
    assert all(self_check.machine_name() in key and "tried rev1" in key for key in found)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    # In another process: nothing runs, and what was wrong is said again.
    monkeypatch.setattr(self_check, "check", None)
    assert checker(reference.bind_experts, Verdicts(path)).trusts(CASE)
    with pytest.warns(RuntimeWarning, match="its relative error"):
        assert not checker(off_by_little, Verdicts(path)).trusts(HALF)


def test_another_revision_or_machine_is_checked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kernel-checks.json"
    with pytest.warns(RuntimeWarning):
        assert not checker(off_by_little, Verdicts(path)).trusts(CASE)
    mended = replace(checker(reference.bind_experts, Verdicts(path)), revision="rev2")
    assert mended.trusts(CASE)
    monkeypatch.setattr(self_check, "machine_name", lambda: "another")
    assert checker(reference.bind_experts, Verdicts(path)).trusts(CASE)
    assert len(json.loads(path.read_text())) == 3


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"a": 1}', b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_file_counts_as_empty(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "kernel-checks.json"
    path.write_bytes(content)
    verdicts = Verdicts(path)
    assert verdicts.get("a") is None
    verdicts.put("b", PASSED)
    assert json.loads(path.read_text()) == {"b": PASSED}


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    verdicts = Verdicts(tmp_path / "file" / "kernel-checks.json")
    verdicts.put("a", PASSED)
    assert verdicts.get("a") == PASSED


def test_two_processes_keep_each_others_verdicts(tmp_path: Path) -> None:
    path = tmp_path / "kernel-checks.json"
    one, other = Verdicts(path), Verdicts(path)
    one.put("a", PASSED)
    other.put("b", "wrong")
    assert json.loads(path.read_text()) == {"a": PASSED, "b": "wrong"}


def test_labels_tell_cases_apart() -> None:
    cases = [case for _, case in standard_cases()]
    names = [name for name, _ in standard_cases()]
    assert len({case.label for case in cases}) == len(set(names)) == len(cases)
    assert len(cases) == 3 * (len(BITS) * len(GROUPS) + 9)


def test_the_metal_kernel_is_checked_on_first_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select.metal, "available", lambda: None)
    monkeypatch.setattr(select.metal, "covers_experts", lambda *_: True)
    monkeypatch.setitem(select._KERNELS, "metal", off_by_little)
    weights = CASE.random_weights()
    bound = select.select_kernel("metal", tmp_path)(weights, CASE.spec)
    with pytest.warns(RuntimeWarning, match="kernel metal is wrong on this machine"):
        y = call(bound)
    assert mx.array_equal(y, call(reference.bind_experts(weights, CASE.spec)))
    assert (tmp_path / "kernel-checks.json").exists()


def test_auto_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select.metal, "available", lambda: None)
    monkeypatch.setattr(select.native, "available", lambda: None)
    assert select.auto_kernel() == ("cpu" if mx.default_device() == mx.cpu else "metal")
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    assert select.auto_kernel() == "metal"
    assert set(select.checkable_kernels()) == {"cpu", "metal"}
    monkeypatch.setattr(select.metal, "available", lambda: "nowhere")
    assert select.auto_kernel() == "reference"


def test_info_checks_kernels(run_cli: Run) -> None:
    with mx.stream(mx.gpu if mx.metal.is_available() else mx.cpu):
        done = run_cli("info", "--check-kernels")
    assert done.code == 0
    last = done.out.splitlines()[-1]
    counted = sum(len(list(standard_cases(d))) for _, d in select.checkable_kernels().values())
    assert last == f"{counted} of {counted} checks passed"
    for status in select.kernel_statuses():
        if not status.available:
            assert f"{status.name:<7} not run: {status.note}" in done.out
    assert "WRONG" not in done.out


def test_info_names_a_wrong_kernel(run_cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = {"tried": (off_by_little, (mx.float32,))}
    monkeypatch.setattr(select, "checkable_kernels", lambda: kernels)
    count = len(list(standard_cases((mx.float32,))))
    done = run_cli("info", "--check-kernels")
    assert done.code == 1
    assert done.err == f"flashmoe: {count} of {count} kernel checks failed on this machine\n"
    assert done.out.count("WRONG: its relative error is") == count
    done = run_cli("info", "--check-kernels", "--json")
    assert done.code == 1
    said = json.loads(done.out)
    assert said["checks"][0]["kernel"] == "tried"
    assert not said["checks"][0]["verdict"].startswith("passed")


def test_checking_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _, case in standard_cases((mx.float32,)):
            assert check(reference.bind_experts, case).passed
