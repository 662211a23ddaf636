"""The native routed experts against the reference twin, float64, and themselves."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.activations import SwigluOAI, XieLU
from mlx_lm.models.deepseek_v41 import DeepseekV41SwiGLU
from mlx_lm.models.gemma4_text import GeGLU
from mlx_lm.models.kimi_k3 import SiTU
from mlx_lm.models.step3p5 import ClampedSwiGLU
from mlx_lm.models.switch_layers import SwiGLU, SwitchGLU, SwitchMLP
from mlx_lm.utils import quantize_model

from flashmoe import native
from flashmoe.base.errors import OptionError
from flashmoe.kernels import cpu, metal, reference
from flashmoe.kernels.activations import evaluate, recognize
from flashmoe.kernels.contract import ExpertSpec, ProjectionPacking
from flashmoe.kernels.select import kernel_names, select_kernel
from flashmoe.native import Activation, loader
from tests.support.families import FAMILIES, build_model
from tests.support.natives import compiled, isas_here

TOLERANCE = 2e-6

ACTIVATIONS = [
    (SwiGLU(), True, Activation("sigmoid")),
    (SwigluOAI(), True, Activation("sigmoid", 1.702, gate_max=7, up_max=7, up_shift=1)),
    (SwigluOAI(1.1, 20.0), True, Activation("sigmoid", 1.1, gate_max=20, up_max=20, up_shift=1)),
    (ClampedSwiGLU(0.3), True, Activation("sigmoid", activated_max=0.3, up_max=0.3)),
    (DeepseekV41SwiGLU(10.0), True, Activation("sigmoid", gate_max=10, up_max=10)),
    (DeepseekV41SwiGLU(0.0), True, Activation("sigmoid")),
    (GeGLU(), True, Activation("gelu_tanh")),
    (SiTU(), True, Activation("situ")),
    (SiTU(2.0, 3.0), True, Activation("situ", 2, up_bound=3)),
    (nn.ReLU2(), False, Activation("relu2")),
    (nn.GELU(approx="precise"), False, Activation("gelu_tanh")),
    (nn.SiLU(), False, Activation("sigmoid")),
]


@pytest.fixture(autouse=True)
def restored() -> Any:
    """Every test leaves the library as it was."""
    isa = native.isa() if native.available() is None else None
    yield
    if isa is not None:
        native.use_isa(isa)
        native.set_threads(0)


@pytest.mark.parametrize("module,gated,expected", ACTIVATIONS, ids=lambda v: type(v).__name__)
def test_activations_are_recognized(module: Any, gated: bool, expected: Activation) -> None:
    assert recognize(module, gated) == expected


@pytest.mark.parametrize("module,gated", [(XieLU(), False), (nn.GELU(), False), (nn.Tanh(), False)])
def test_other_activations_are_not(module: Any, gated: bool) -> None:
    assert recognize(module, gated) is None
    assert recognize(lambda up, gate: up * gate, True) is None
    assert recognize(lambda up, gate: 1.001 * SwiGLU()(up, gate), True) is None


@compiled
@pytest.mark.parametrize("gated", [True, False])
def test_activations_against_float64(gated: bool) -> None:
    """Identity matrices and biases that bring every value to the activation."""
    n = 64
    identity = mx.eye(n)[None]
    zeros = mx.zeros((1, n, n))
    rng = np.random.default_rng(0)
    wide = np.concatenate([10.0 ** rng.uniform(-6, 2, 500), [0.0]])
    values = np.resize(np.concatenate([wide, -wide]), (16, n)).astype(np.float32)
    up_values = mx.array(np.resize(rng.permutation(values.ravel()), (1, n)))
    mx.eval(identity, zeros, up_values)
    bounds = [{}, {"gate_max": 3.0, "up_max": 2.0, "up_shift": 1.0}, {"activated_max": 0.5}]
    bounds += [{"up_bound": 2.0}, {"alpha": 1.7}]
    for isa in isas_here():
        native.use_isa(isa)
        for kind in ("sigmoid", "gelu_tanh", "relu2", "situ"):
            for options in bounds:
                activation = Activation(kind, **options)
                eye = native.matrix(identity)
                if gated:
                    made = native.experts(
                        native.matrix(zeros), eye, activation, eye, up_bias=up_values
                    )
                    up = np.broadcast_to(np.array(up_values, np.float64), values.shape)
                else:
                    made = native.experts(eye, eye, activation)
                    up = None
                y = native.expert_forward(values, np.zeros((16, 1), np.int32), made)[:, 0]
                expected = evaluate(activation, values.astype(np.float64), up)
                # Far down the left tail the argument's own rounding shows.
                tail = 2e-7 * np.minimum(np.abs(values), 1.0)
                assert (np.abs(y - expected) <= 2e-6 * np.abs(expected) + tail).all(), (isa, kind)


def test_the_exponential_keeps_nan() -> None:
    if native.available() is not None:
        return
    eye = native.matrix(mx.eye(32)[None])
    made = native.experts(eye, eye, Activation("sigmoid"))
    x = np.full((1, 32), math.nan, np.float32)
    assert np.isnan(native.expert_forward(x, np.zeros((1, 1), np.int32), made)).all()


EXPERTS = [
    ("qwen3_moe", 4, 64, "affine"),
    ("qwen3_moe", 3, 32, "affine"),
    ("qwen3_moe", None, 0, ""),
    ("gemma4", 4, 64, "affine"),
    ("gpt_oss", 4, 32, "mxfp4"),
    ("gpt_oss", 4, 64, "affine"),
    ("kimi_k3", 6, 64, "affine"),
    ("nemotron_h", 4, 64, "affine"),
    ("nemotron_h", None, 0, ""),
    ("phixtral", 8, 64, "affine"),
    ("step3p5", 5, 64, "affine"),
]


def experts_of(
    family: str, bits: int | None, group: int, mode: str
) -> tuple[dict[str, mx.array], ExpertSpec]:
    """The weights and spec of a family's first layer of routed experts."""
    config = FAMILIES[family]
    model = build_model(config, seed=3)
    if bits is not None:
        model, _ = quantize_model(model, dict(config), group, bits, mode=mode)
    module = next(m for _, m in model.named_modules() if isinstance(m, SwitchGLU | SwitchMLP))
    weights, packing = {}, {}
    for name, projection in module.children().items():
        for tensor, array in projection.parameters().items():
            # gpt_oss initialises the biases to almost nothing.
            weights[f"{name}.{tensor}"] = array + 0.5 if tensor == "bias" else array
        if bits is not None and "weight" in projection:
            packing[name] = ProjectionPacking(projection.bits, projection.group_size, mode)
    mx.eval(weights)
    return weights, ExpertSpec(type(module).__name__, module.activation, packing)


def inputs(weights: dict[str, mx.array], shape: tuple[int, ...]) -> tuple[mx.array, Any]:
    """x [*shape, d_in] and slots [*shape, 3] with repetitions."""
    first = "up_proj" if "up_proj.weight" in weights else "fc1"
    packed, scales = weights[f"{first}.weight"], weights.get(f"{first}.scales")
    width = packed.shape[-1]
    if scales is not None:
        # All tiny families are this wide.
        width = 64
    rng = np.random.default_rng(len(shape))
    x = mx.array(rng.standard_normal((*shape, width), np.float32))
    return x, rng.integers(0, len(packed), (*shape, 3), np.int32)


@compiled
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("family,bits,group,mode", EXPERTS)
def test_experts_equal_the_reference(
    family: str,
    bits: int | None,
    group: int,
    mode: str,
    dtype: mx.Dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Scales, biases and floating weights as stored, against the twin with them widened."""
    weights, spec = experts_of(family, bits, group, mode)
    stored = {k: v.astype(dtype) if v.dtype == mx.float32 else v for k, v in weights.items()}
    widened = {k: v.astype(mx.float32) if v.dtype == dtype else v for k, v in stored.items()}
    mx.eval(stored, widened)
    forward = cpu.bind_experts(stored, spec)
    for shape in [(1, 1), (2, 3), (1, 70)]:
        x, slots = inputs(weights, shape)
        expected = reference.bind_experts(widened, spec)(x, slots)
        mx.eval(expected)
        with monkeypatch.context() as patch:
            patch.delattr(reference, "expert_forward")
            y = forward(x, slots)
        assert (y.shape, y.dtype) == (expected.shape, mx.float32)
        error = np.linalg.norm(np.array(y - expected), axis=-1)
        assert (error <= TOLERANCE * np.linalg.norm(np.array(expected), axis=-1)).all()


@compiled
def test_a_long_prompt_is_taken_in_parts() -> None:
    """3,000 pairs of 1,024 values are 25 MB between the products."""
    wide, back = (
        native.matrix(mx.random.normal((2, rows, cols), key=mx.random.key(rows)))
        for rows, cols in ((1024, 8), (8, 1024))
    )
    made = native.experts(wide, back, Activation("sigmoid"), wide)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1500, 8), np.float32)
    slots = rng.integers(0, 2, (1500, 2), np.int32)
    together = native.expert_forward(x, slots, made)
    for row in (0, 7, 749, 1499):
        alone = native.expert_forward(x[row : row + 1], slots[row : row + 1], made)
        assert np.array_equal(alone[0], together[row])


@compiled
def test_an_activation_of_its_own_stays_with_mlx() -> None:
    weights, spec = experts_of("gpt_oss", 4, 64, "affine")
    own = ExpertSpec(spec.kind, lambda up, gate: mx.sin(up) * gate, spec.packing)
    x, slots = inputs(weights, (5,))
    y = cpu.bind_experts(weights, own)(x, slots)
    expected = reference.bind_experts(weights, own)(x, slots)
    assert y.shape == expected.shape
    assert mx.allclose(y, expected, rtol=1e-5, atol=1e-5)


@compiled
@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h"])
def test_a_row_depends_on_itself_and_its_expert_alone(family: str) -> None:
    weights, spec = experts_of(family, 4, 64, "affine")
    forward = cpu.bind_experts(weights, spec)
    x, slots = inputs(weights, (70,))
    for isa in isas_here():
        native.use_isa(isa)
        native.set_threads(1)
        together = np.array(forward(x, slots))
        for threads in (2, 5):
            native.set_threads(threads)
            assert np.array_equal(np.array(forward(x, slots)), together)
        for rows in ([7], [3, 60], list(range(5, 40))):
            some = np.array(forward(x[mx.array(rows)], slots[rows]))
            assert np.array_equal(some, together[rows])
        turned = np.array(forward(x, slots[:, ::-1]))
        assert np.array_equal(turned[:, ::-1], together)


@pytest.mark.parametrize(
    "bits,group,mode,dtype",
    [(4, 16, "nvfp4", mx.float32), (8, 32, "mxfp8", mx.float32), (4, 64, "affine", mx.bfloat16)],
)
def test_what_is_not_covered_goes_to_the_reference(
    bits: int, group: int, mode: str, dtype: mx.Dtype
) -> None:
    if mode == "affine" and native.available() is not None:
        return
    weights, spec = experts_of("qwen3_moe", bits, group, mode)
    if mode == "affine":
        weights = {k: v if v.dtype == mx.uint32 else v.astype(dtype) for k, v in weights.items()}
    x = mx.random.normal((3, 64), key=mx.random.key(1)).astype(dtype)
    slots = np.array([[0, 5], [7, 2], [5, 0]], np.int32)
    y = cpu.bind_experts(weights, spec)(x, slots)
    assert mx.array_equal(y, reference.expert_forward(x, mx.array(slots), weights, spec))


@compiled
def test_arguments_that_do_not_fit() -> None:
    eye, wide = native.matrix(mx.eye(32)[None]), native.matrix(mx.ones((1, 16, 32)))
    good = native.experts(eye, eye, Activation("sigmoid"))
    x, slots = np.ones((2, 32), np.float32), np.zeros((2, 1), np.int32)
    assert native.expert_forward(x, slots, good).shape == (2, 1, 32)
    assert native.expert_forward(x[:0], slots[:0], good).shape == (0, 1, 32)
    for bad in (np.array([[0], [1]], np.int32), np.array([[-1], [0]], np.int32)):
        with pytest.raises(OptionError, match="do not fit together"):
            native.expert_forward(x, bad, good)
    with pytest.raises(OptionError, match=r"x must be \[2, 32\]"):
        native.expert_forward(x[:1], slots, good)
    with pytest.raises(OptionError, match="do not fit together"):
        native.expert_forward(x, slots, native.experts(wide, eye, Activation("sigmoid")))
    with pytest.raises(OptionError, match="do not fit together"):
        native.expert_forward(x, slots, native.experts(eye, eye, Activation("sigmoid"), wide))
    with pytest.raises(OptionError, match="fits no projection"):
        native.experts(eye, eye, Activation("sigmoid"), up_bias=mx.zeros((1, 16)))
    unknown = native.experts(eye, eye, Activation("sigmoid"))
    unknown.description.activation.kind = 4
    with pytest.raises(OptionError, match="does not cover"):
        native.expert_forward(x, slots, unknown)
    unknown = native.experts(eye, eye, Activation("relu2"), up_bias=mx.zeros((1, 32)))
    unknown.description.up_bias.dtype = loader.AFFINE
    with pytest.raises(OptionError, match="does not cover"):
        native.expert_forward(x, slots, unknown)


def test_selection() -> None:
    metal_here = ["metal"] if metal.available() is None else []
    if native.available() is None:
        assert kernel_names() == ["auto", "reference", "cpu", *metal_here]
        assert select_kernel("cpu") is cpu.bind_experts
        if mx.default_device() == mx.cpu:
            assert select_kernel("auto") is cpu.bind_experts
    else:
        assert kernel_names() == ["auto", "reference", *metal_here]
        with pytest.raises(OptionError, match="kernel cpu is not there"):
            select_kernel("cpu")
        if mx.default_device() == mx.cpu:
            assert select_kernel("auto") is reference.bind_experts
    assert select_kernel("reference") is reference.bind_experts
