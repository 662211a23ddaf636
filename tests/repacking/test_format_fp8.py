"""8-bit floats: kinds of scales, shapes that do not fit, what is left to mlx-lm."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from flashmoe import SourceError
from flashmoe.checkpoint.architecture import build_model
from flashmoe.checkpoint.headers import TensorInfo, read_header
from flashmoe.checkpoint.source import check_files, resolve
from flashmoe.repacking.formats.contract import Packed, Presentation
from flashmoe.repacking.formats.fp8 import block_of, block_size, present
from flashmoe.repacking.job import prepare
from flashmoe.repacking.presets import choose_recipe
from flashmoe.repacking.row_node import RowNode
from flashmoe.repacking.schedule import PIECE_BYTES
from tests.support.checkpoints import file_tensors
from tests.support.families import FAMILIES
from tests.support.format_cases import FORMATS, presentation_of, save_tensors
from tests.support.refusals import refused

SCALES = FORMATS / "fp8_scales" / "scales.safetensors"
KINDS = sorted(n for n in read_header(SCALES) if f"{n}_scale_inv" in read_header(SCALES))


def presented(tensors: dict[str, TensorInfo], **settings: object) -> Presentation:
    return present(Packed("the checkpoint", settings, {"dtype": "float32"}, tensors, str.encode))


@pytest.mark.parametrize("kind", KINDS)
def test_scales(kind: str) -> None:
    arrays, header = mx.load(str(SCALES)), read_header(SCALES)
    names = (kind, f"{kind}_scale_inv")
    presentation = presented({name: header[name] for name in names})
    assert presentation.hidden == set(names)
    stand_in = presentation.stand_ins[kind]
    expected = arrays[f"{kind}_unpacked"]
    assert (stand_in.dtype, stand_in.shape) == ("F32", expected.shape)

    def read(leaf: RowNode) -> mx.array:
        array = arrays[leaf.leaf]
        return array[leaf.begin : leaf.end] if array.ndim else array

    n_rows = expected.shape[0]
    for begin in range(n_rows):
        for end in range(begin + 1, n_rows + 1):
            part = stand_in.rows(begin, end).evaluate(read)
            assert mx.array_equal(part, expected[begin:end], equal_nan=True)


def info(dtype: str, *shape: int) -> TensorInfo:
    return TensorInfo(dtype, shape, 0, 0)


@pytest.mark.parametrize(
    "weight,scale,stated,block",
    [
        ((576, 7168), (5, 56), (128, 128), (128, 128)),
        # As stated, although two blocks of 80 rows would have that many scales as well.
        ((160, 128), (2, 1), (128, 128), (128, 128)),
        ((160, 128), (2, 1), (64, 64), (80, 128)),
        ((160, 128), (160,), (128, 128), (1, 128)),
        ((4, 160, 128), (4, 160), (128, 128), (1, 128)),
        ((160, 128), (3, 1), (128, 128), None),
        ((160, 128), (0, 0), (128, 128), None),
        ((4, 160, 128), (2, 1), (128, 128), None),
        ((160,), (160,), (128, 128), None),
    ],
)
def test_blocks(
    weight: tuple[int, ...],
    scale: tuple[int, ...],
    stated: tuple[int, int],
    block: tuple[int, int] | None,
) -> None:
    assert block_of(info("F8_E4M3", *weight), info("F32", *scale), stated) == block


def test_a_scale_that_does_not_fit() -> None:
    tensors = {"w": info("F8_E4M3", 160, 128), "w_scale_inv": info("F32", 3, 1)}
    with refused(SourceError, "w_scale_inv", "the checkpoint", "[3, 1]", "[160, 128]"):
        presented(tensors)


def test_a_scale_that_is_missing() -> None:
    with refused(SourceError, "w of the checkpoint", "w_scale_inv"):
        presented({"w": info("F8_E4M3", 160, 128)})


def test_how_blocks_are_stated() -> None:
    assert block_size(None, "here") == (128, 128)
    assert block_size([1, 32], "here") == block_size("1x32", "here") == (1, 32)
    for stated in (128, [128], [128, 0], [128, "-1"], [1.5, 2], "128", {"a": 1}, [None, None]):
        with refused(SourceError, "here", "blocks"):
            block_size(stated, "here")


def test_a_dtype_that_makes_no_sense() -> None:
    tensors = {"w": info("F8_E4M3", 16, 16), "w_scale": info("F32")}
    for config in ({"dtype": ["float16"]}, {"text_config": 1}, {"text_config": {"dtype": "int8"}}):
        given = Packed("here", {}, config, tensors, lambda name: b"")
        assert present(given).stand_ins["w"].dtype == "BF16"
    config = {"dtype": None, "text_config": {"torch_dtype": "float16"}}
    given = Packed("here", {}, config, tensors, lambda name: b"")
    assert present(given).stand_ins["w"].dtype == "F16"


def test_scales_of_activations_are_left_out() -> None:
    scale = info("F32")
    tensors = {
        "q.weight": info("F8_E4M3", 16, 16),
        "q.weight_scale": scale,
        "q.input_scale": scale,
        "q.bias": info("BF16", 16),
    }
    presentation = presented(tensors)
    assert presentation.hidden == {"q.weight", "q.weight_scale", "q.input_scale"}
    assert list(presentation.stand_ins) == ["q.weight"]


def test_what_mlx_lm_keeps_packed() -> None:
    tensors = {"q.weight": info("F8_E4M3", 64, 64), "q.scale": info("F8_E8M0", 2, 2)}
    settings = {"scale_fmt": "ue8m0", "weight_block_size": [32, 32]}
    assert presented(tensors, **settings).config == {}
    with refused(SourceError, "q.weight"):
        presented(tensors, weight_block_size=[128, 128])


def test_a_config_that_says_nothing(tmp_path: Path) -> None:
    """Scales by that name are fp8's."""
    case = FORMATS / "fp8_qwen3_moe"
    config = json.loads((case / "config.json").read_text())
    expected = set(presentation_of(case).stand_ins)
    config.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_tensors(tmp_path / "model.safetensors", file_tensors(case / "model.safetensors"))
    assert set(presentation_of(tmp_path).stand_ins) == expected


def test_pieces_of_large_weights_are_small(source: Path) -> None:
    """Projections of 64 MB each: a hole on this disk, planned from the header alone. An expert is
    a row, of which pieces are not smaller."""
    source.mkdir()
    config = {
        **FAMILIES["qwen3_moe"],
        "hidden_size": 8192,
        "moe_intermediate_size": 8256,
        "num_hidden_layers": 1,
        "mlp_only_layers": [],
        "num_experts": 2,
        "num_attention_heads": 64,
        "head_dim": 128,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
    header: dict[str, dict[str, object]] = {}
    offset = 0

    def add(name: str, dtype: str, shape: tuple[int, ...], size_bytes: int) -> None:
        nonlocal offset
        end = offset + size_bytes
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end

    def add_packed(name: str, rows: int, columns: int) -> None:
        grid = (-(-rows // 128), -(-columns // 128))
        add(f"{name}_scale_inv", "F32", grid, 4 * grid[0] * grid[1])
        add(name, "F8_E4M3", (rows, columns), rows * columns)

    model, _ = build_model(config)
    for name, array in tree_flatten(model.parameters()):
        if ".switch_mlp." in name:
            for expert in range(2):
                add_packed(name.replace("switch_mlp", f"experts.{expert}"), *array.shape[1:])
        elif "_proj." in name:
            add_packed(name, *array.shape)
        else:
            add(name, "BF16", array.shape, 2 * array.size)
    text = json.dumps(header).encode()
    with (source / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    (source / "config.json").write_text(json.dumps(config))
    checkpoint = resolve(source)
    recipe = choose_recipe(None, bits=4, group_size=None, resident_bits=None, method=None)
    order = prepare(checkpoint, check_files(checkpoint), recipe, asked=True).schedule
    assert order.late == ()
    largest = {"experts": 0, "rest": 0}
    for piece in order.pieces:
        kind = "experts" if ".switch_mlp." in order.parameters[piece.parameter].name else "rest"
        largest[kind] = max(largest[kind], piece.last - piece.first)
    assert largest["experts"] == 8256 * 8192
    assert PIECE_BYTES / 2 < largest["rest"] <= PIECE_BYTES
