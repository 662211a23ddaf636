"""AWQ, GPTQ and bitsandbytes, layer by layer: the weights that their own packages make of them.

The layers are from scripts/capture_packed.py.
"""

from __future__ import annotations

import json
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe.base.dtypes import MLX_DTYPES
from flashmoe.checkpoint.headers import TensorInfo, read_header
from flashmoe.kernels.packing import pack_codes
from flashmoe.repacking.formats import awq, gptq
from flashmoe.repacking.formats.contract import Packed, Presentation, StandIn
from flashmoe.repacking.formats.packed_ints import AWQ_ORDER, awq_turned, awq_unpacked, unpacked
from flashmoe.repacking.formats.select import FORMATS as KNOWN
from flashmoe.repacking.row_node import RowNode
from tests.support.format_cases import FORMATS

PATH = FORMATS / "packed_layers" / "layers.safetensors"
# Those that MLX multiplies with as they are, and those that become floats.
KEPT = (
    "awq",
    "awq_gemv",
    "gptq_2_bit",
    "gptq_3_bit",
    "gptq_8_bit",
    "gptq_rows",
    "gptq_sym",
    "gptq_v2",
)
FLOATS = (
    "bnb_fp4",
    "bnb_fp4_nested",
    "bnb_int8",
    "bnb_nf4",
    "bnb_nf4_nested",
    "gptq_act_order",
)


class Layer:
    """One layer, called x in its checkpoint, and `reference`, its last rows as floats."""

    def __init__(self, case: str) -> None:
        names = [name for name in read_header(PATH) if name.startswith(f"{case}.")]
        arrays = mx.load(str(PATH))
        self.reference: mx.array = arrays[f"{case}.reference"]
        names.remove(f"{case}.reference")
        self.arrays = {f"x{name.removeprefix(case)}": arrays[name] for name in names}
        self.tensors = {f"x{name.removeprefix(case)}": read_header(PATH)[name] for name in names}
        text = PATH.read_bytes()
        header = json.loads(text[8 : 8 + int.from_bytes(text[:8], "little")])
        self.settings: dict[str, Any] = json.loads(header["__metadata__"][case])

    def present(self) -> Presentation:
        method = self.settings["quant_method"]
        found = next(known for known in KNOWN if method in known.methods)
        config = {"dtype": "float32"}

        def content(name: str) -> bytes:
            return np.array(self.arrays[name]).tobytes()

        return found.present(Packed("the checkpoint", self.settings, config, self.tensors, content))

    def read(self, leaf: RowNode) -> mx.array:
        array = self.arrays[leaf.leaf]
        return array[leaf.begin : leaf.end] if array.ndim else array

    def rows(self, stand_in: StandIn, begin: int = 0, end: int | None = None) -> mx.array:
        """Rows of a stand-in; what it says of their shape and dtype holds."""
        end = stand_in.shape[0] if end is None else end
        array = stand_in.rows(begin, end).evaluate(self.read, checked=True)
        assert array.shape == (end - begin, *stand_in.shape[1:])
        assert array.dtype == MLX_DTYPES[stand_in.dtype]
        return array


def test_every_layer_is_tested() -> None:
    cases = {name.partition(".")[0] for name in read_header(PATH)}
    assert cases == {*KEPT, *FLOATS}


@pytest.mark.parametrize("case", FLOATS)
def test_floats_are_the_packages(case: str) -> None:
    layer = Layer(case)
    presentation = layer.present()
    assert presentation.config == {"quantization_config": None}
    assert set(presentation.stand_ins) == {"x.weight"}
    assert layer.tensors.keys() <= presentation.hidden | {"x.weight"}
    floats = layer.rows(presentation.stand_ins["x.weight"])
    assert floats.dtype == layer.reference.dtype
    assert mx.array_equal(floats[-layer.reference.shape[0] :], layer.reference)


@pytest.mark.parametrize("case", KEPT)
def test_codes_stay(case: str) -> None:
    layer = Layer(case)
    presentation = layer.present()
    assert set(presentation.stand_ins) == {"x.weight", "x.scales", "x.biases"}
    words, scales, biases = (
        layer.rows(presentation.stand_ins[f"x.{part}"]) for part in ("weight", "scales", "biases")
    )
    stated = presentation.config["quantization"]
    assert presentation.config["quantization_config"] is None
    codes = np.array(unpacked(words, stated["bits"]), np.float64)
    group = stated["group_size"]
    assert scales.shape[1] * group == codes.shape[1]
    scale, bias = (np.repeat(np.array(a, np.float64), group, axis=1) for a in (scales, biases))
    reference = np.array(layer.reference)
    # The package rounds a weight to float16, and here its bias was.
    allowed = np.spacing(np.abs(reference)) / 2 + np.spacing(np.abs(bias).astype(np.float16)) / 2
    assert (np.abs(codes * scale + bias - reference) <= allowed).all()
    if layer.settings.get("sym"):
        # A power of two times a scale needs no rounding.
        assert (np.abs(codes * scale + bias - reference) <= np.spacing(np.abs(reference)) / 2).all()
    stored = {s.item() for s in layer.arrays["x.scales"].reshape(-1)}
    assert {s.item() for s in scales.reshape(-1)} == stored - {0.0}
    mlx = mx.dequantize(words, scales, biases, group_size=group, bits=stated["bits"])
    assert mx.allclose(mlx, layer.reference, rtol=0, atol=2**-11).item()


@pytest.mark.parametrize("case", [*KEPT, *FLOATS])
def test_rows_are_the_same_whatever_is_asked_for_with_them(case: str) -> None:
    layer = Layer(case)
    for stand_in in layer.present().stand_ins.values():
        whole = layer.rows(stand_in)
        n_rows = stand_in.shape[0]
        for begin, end in [(0, 1), (1, 2), (3, n_rows), (n_rows - 9, n_rows - 2), (7, 8)]:
            assert mx.array_equal(layer.rows(stand_in, begin, end), whole[begin:end])


@pytest.mark.parametrize("case", ["bnb_nf4_nested", "bnb_nf4"])
def test_a_row_needs_its_own_bytes(case: str) -> None:
    stand_in = Layer(case).present().stand_ins["x.weight"]
    n_rows, d_in = stand_in.shape
    for row in range(n_rows):
        leaves = {leaf.leaf: leaf for leaf in stand_in.rows(row, row + 1).leaves()}
        assert leaves["x.weight"].end - leaves["x.weight"].begin == d_in // 2
        assert leaves["x.weight.absmax"].end - leaves["x.weight.absmax"].begin <= d_in // 64 + 2


def test_groups_that_mlx_lacks_become_floats() -> None:
    layer = Layer("gptq_sym")
    layer.settings["desc_act"] = True
    presentation = layer.present()
    floats = layer.rows(presentation.stand_ins["x.weight"])
    assert mx.array_equal(floats, layer.reference)
    # One group for all inputs leaves no order to speak of.
    rows = Layer("gptq_rows")
    rows.settings["desc_act"] = True
    assert "x.scales" in rows.present().stand_ins


def test_zeros_that_are_not_stored_are_in_the_middle() -> None:
    for case, key in (("gptq_sym", "sym"), ("awq", "zero_point")):
        layer = Layer(case)
        del layer.tensors["x.qzeros"]
        layer.settings[key] = key == "sym"
        stand_ins = layer.present().stand_ins
        scales, biases = (layer.rows(stand_ins[f"x.{part}"]) for part in ("scales", "biases"))
        assert mx.array_equal(biases, -8 * scales)


def test_experts_that_are_packed_differently_become_floats() -> None:
    tensors = {}
    for expert, bits in enumerate((4, 8)):
        path = f"model.layers.0.mlp.experts.{expert}.up_proj"
        for part, dtype, shape in (
            ("qweight", "I32", (2 * bits, 32)),
            ("qzeros", "I32", (2, bits)),
            ("scales", "F16", (2, 32)),
        ):
            tensors[f"{path}.{part}"] = TensorInfo(dtype, shape, 0, 0)
    settings: dict[str, Any] = {"bits": 4, "sym": True, "dynamic": {"+:.*experts.1.*": {"bits": 8}}}
    packed = Packed("the checkpoint", settings, {}, tensors, str.encode)
    assert all(s.dtype == "F16" for s in gptq.present(packed).stand_ins.values())
    for name in list(tensors):
        tensors[name.replace("experts.1", "shared.1")] = tensors.pop(name)
    assert "quantization" in gptq.present(packed).config


# Orders of bits


def as_stream(codes: np.ndarray, bits: int) -> mx.array:
    """Codes [rows, n] as words [rows, n * bits / 32], by way of whole numbers."""
    words = []
    for row in codes.tolist():
        stream = sum(code << (bits * place) for place, code in enumerate(row))
        words.append(list(np.frombuffer(stream.to_bytes(len(row) * bits // 8, "little"), "<u4")))
    return mx.array(np.array(words, np.uint32))


@st.composite
def codes_of(draw: st.DrawFn, bits: int, step: int = 32) -> np.ndarray:
    seed = draw(st.integers(0, 2**32 - 1))
    shape = draw(st.integers(1, 5)), step * draw(st.integers(1, 4))
    return np.random.default_rng(seed).integers(0, 2**bits, shape, np.uint32)


@given(st.sampled_from((2, 3, 4, 5, 6, 8)).flatmap(lambda b: st.tuples(st.just(b), codes_of(b))))
def test_a_stream_of_bits(drawn: tuple[int, np.ndarray]) -> None:
    bits, codes = drawn
    words = as_stream(codes, bits)
    assert mx.array_equal(unpacked(words, bits), mx.array(codes))
    # It is MLX's order too.
    assert mx.array_equal(words, pack_codes(mx.array(codes), bits))


@given(codes_of(4, 8), st.integers(1, 3))
def test_awq_words(codes: np.ndarray, blocks: int) -> None:
    codes = np.concatenate([codes] * 8 * blocks)  # inputs, a multiple of 8
    codes = (codes + np.arange(len(codes), dtype=np.uint32)[:, None]) % 16
    words = np.zeros((len(codes), codes.shape[1] // 8), np.uint32)
    for nibble, column in enumerate(AWQ_ORDER):
        words |= codes[:, column::8] << (4 * nibble)
    assert mx.array_equal(awq_unpacked(mx.array(words)), mx.array(codes))
    expected = as_stream(np.ascontiguousarray(codes.T), 4)
    assert mx.array_equal(awq_turned(mx.array(words)), expected)


@given(st.sampled_from((2, 3, 4, 8)).flatmap(lambda b: st.tuples(st.just(b), codes_of(b))))
def test_zeros_of_both_versions(drawn: tuple[int, np.ndarray]) -> None:
    bits, zeros = drawn
    for shortfall in (0, 1):
        stored = as_stream((zeros - shortfall) % 2**bits, bits).view(mx.int32)
        read = gptq._unpacked_zeros(bits, shortfall, 1, zeros.shape[1], stored)
        assert mx.array_equal(read, mx.array(zeros[:, 1:].T))


def test_formats_are_registered() -> None:
    assert awq.AWQ in KNOWN
    assert gptq.GPTQ in KNOWN
