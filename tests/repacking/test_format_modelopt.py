"""What ModelOpt writes, unpacked as its own code does."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from flashmoe import SourceError
from flashmoe.checkpoint.headers import TensorInfo, read_header
from flashmoe.repacking.formats.contract import Packed
from flashmoe.repacking.formats.modelopt import present
from flashmoe.repacking.row_node import RowNode
from tests.support.format_cases import FORMATS
from tests.support.refusals import refused

FILE = FORMATS / "nvfp4" / "modelopt.safetensors"


def packed(tensors: dict[str, TensorInfo], **settings: Any) -> Packed:
    return Packed("the checkpoint", settings, {"dtype": "bfloat16"}, tensors, lambda name: b"")


@pytest.mark.parametrize(
    "settings", [{"quant_algo": "NVFP4"}, {"quantization": {"quant_algo": "NVFP4"}}]
)
def test_nvfp4(settings: dict[str, Any]) -> None:
    arrays, header = mx.load(str(FILE)), read_header(FILE)
    expected = arrays.pop("unpacked")
    header.pop("unpacked")
    presentation = present(packed(header, **settings))
    seen = presentation.of(arrays)
    assert set(seen) == {"x.weight"}
    assert seen["x.weight"].dtype == mx.bfloat16
    assert mx.array_equal(seen["x.weight"], expected)

    def read(leaf: RowNode) -> mx.array:
        array = arrays[leaf.leaf]
        return array[leaf.begin : leaf.end] if array.ndim else array

    rows = presentation.stand_ins["x.weight"].rows
    for row in range(expected.shape[0]):
        assert mx.array_equal(rows(row, row + 1).evaluate(read), expected[row : row + 1])


def test_fp8_with_a_scale_per_tensor() -> None:
    tensors = {
        "q.weight": TensorInfo("F8_E4M3", (16, 32), 0, 0),
        "q.weight_scale": TensorInfo("F32", (), 0, 0),
        "q.input_scale": TensorInfo("F32", (), 0, 0),
        "k.weight": TensorInfo("BF16", (16, 32), 0, 0),
    }
    presentation = present(packed(tensors, quant_algo="FP8"))
    assert list(presentation.stand_ins) == ["q.weight"]
    assert presentation.hidden == {"q.weight", "q.weight_scale", "q.input_scale"}


@pytest.mark.parametrize("algorithm", ["W4A8_AWQ", None, ["NVFP4"]])
def test_others_are_refused(algorithm: Any) -> None:
    with refused(SourceError, "the checkpoint", "modelopt", str(algorithm), "FP8 and NVFP4"):
        present(packed({}, quant_algo=algorithm))


def test_scales_that_do_not_fit() -> None:
    header = read_header(FILE)
    header["x.weight_scale"] = TensorInfo("F8_E4M3", (8, 2), 0, 0)
    with refused(SourceError, "x.weight_scale", "the checkpoint"):
        present(packed(header, quant_algo="NVFP4"))
