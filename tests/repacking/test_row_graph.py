"""Rows of what a sanitize makes, out of rows of what it was given."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import pytest

from flashmoe.repacking.row_graph import UnknownOperation, rows
from flashmoe.repacking.row_node import RowNode
from flashmoe.repacking.sanitize_graph import Graph, trace

Weights = dict[str, mx.array]


def weights() -> Weights:
    mx.random.seed(0)
    return {
        "fused": mx.random.normal((4, 6, 8)),
        **{f"expert{i}": mx.random.normal((6, 8)) for i in range(4)},
        "flat": mx.random.normal((24, 64)).astype(mx.bfloat16),
        "packed": mx.random.randint(0, 255, (4, 6, 2, 16)).astype(mx.uint8),
    }


def experts(w: Weights) -> list[mx.array]:
    return [w[f"expert{i}"] for i in range(4)]


# What a sanitize may do, the rows of the source that its second row needs, and whether they are
# that row byte for byte.
CASES: dict[str, tuple[Callable[[Weights], mx.array], list[tuple[str, int, int]], bool]] = {
    "as it is": (lambda w: w["fused"], [("fused", 1, 2)], True),
    "stacked": (lambda w: mx.stack(experts(w)), [("expert1", 0, 6)], True),
    "joined": (lambda w: mx.concatenate(experts(w)), [("expert0", 1, 2)], True),
    "joined inside": (
        lambda w: mx.concatenate([w["fused"], w["fused"]], axis=1),
        [("fused", 1, 2), ("fused", 1, 2)],
        False,
    ),
    "half": (lambda w: mx.split(w["fused"], 2, axis=1)[1], [("fused", 1, 2)], False),
    "first half": (lambda w: mx.split(w["fused"], 2, axis=0)[1], [("fused", 3, 4)], True),
    "every second": (lambda w: w["fused"][:, 1::2], [("fused", 1, 2)], False),
    "turned": (lambda w: w["fused"].swapaxes(1, 2), [("fused", 1, 2)], False),
    "turned over": (lambda w: w["fused"].transpose(2, 0, 1), [("fused", 0, 4)], False),
    "cut out": (lambda w: mx.contiguous(w["fused"][2:]), [("fused", 3, 4)], True),
    "backwards": (lambda w: w["fused"][::-1], [("fused", 0, 4)], False),
    "cast": (lambda w: w["fused"].astype(mx.float16), [("fused", 1, 2)], False),
    "plus one": (lambda w: w["flat"] + 1.0, [("flat", 1, 2)], False),
    "times itself": (lambda w: w["flat"] * w["flat"][:1], [("flat", 1, 2), ("flat", 0, 1)], False),
    "in heads": (lambda w: w["flat"].reshape(4, 6, 64), [("flat", 6, 12)], True),
    "flattened": (lambda w: w["fused"].flatten(0, 1), [("fused", 0, 4)], False),
    "seen as words": (
        lambda w: w["packed"].view(mx.uint32).flatten(-2),
        [("packed", 1, 2)],
        True,
    ),
    "packed": (lambda w: mx.quantize(w["flat"], group_size=32, bits=4)[0], [("flat", 1, 2)], False),
}


def traced(change: Callable[[Weights], mx.array], given: Weights) -> Graph:
    graph = trace(lambda w: {"x": change(w)}, given)
    assert graph is not None
    return graph


@pytest.mark.parametrize("case", CASES)
def test_rows(case: str) -> None:
    change, needed, plain = CASES[case]
    given = weights()
    graph, whole = traced(change, given), change(given)
    value = graph.targets["x"]

    def read(leaf: RowNode) -> mx.array:
        return given[leaf.leaf][leaf.begin : leaf.end]

    second = rows(graph, value, 1, 2)
    assert [(leaf.leaf, leaf.begin, leaf.end) for leaf in second.leaves()] == needed
    assert second.is_plain == plain
    for begin in range(whole.shape[0]):
        for end in range(begin + 1, whole.shape[0] + 1):
            part = rows(graph, value, begin, end).evaluate(read)
            if not plain:
                assert part.dtype == whole.dtype
                assert mx.array_equal(part.reshape(-1), whole[begin:end].reshape(-1))


def test_an_operation_that_nobody_knows() -> None:
    graph = traced(lambda w: mx.sort(w["flat"]), weights())
    with pytest.raises(UnknownOperation, match="Sort"):
        rows(graph, graph.targets["x"], 0, 1)


def test_a_sanitize_that_looks_at_values() -> None:
    given = weights()
    assert trace(lambda w: {"x": w["flat"] * w["flat"].sum().item()}, given) is None
    assert trace(lambda w: {"x": mx.from_fp8(w["packed"])}, given) is None


def test_nothing_is_changed_for_others() -> None:
    before = mx.contiguous
    traced(lambda w: mx.contiguous(w["flat"]), weights())
    trace(lambda w: {"x": w["missing"]}, weights())
    assert mx.contiguous is before
