"""The Metal harness compiles what MLX would, and refuses what Metal's compiler would refuse."""

import mlx.core as mx
import pytest

from tests.support.metal_on_cpu import CompileFault, compiled
from tests.support.metal_on_cpu.rules import check_rules
from tests.support.metal_on_cpu.source import mlx_source, share_variables, without_comments
from tests.support.metal_runs import run_kernel
from tests.support.skips import needs

HEADER = """
#include <metal_stdlib>
using namespace metal;
inline float first(const device float* x) { return x[0]; }
"""
FIRST = "y[0] = first(x);"


def run_first(body: str, size: int, header: str = HEADER) -> mx.array:
    x = {"x": mx.full((size,), 2.5)}
    return run_kernel(body, x, {"y": ((1,), mx.float32)}, header=header, threads=(1,))[0]


def test_the_source_is_the_one_that_mlx_writes() -> None:
    source = mlx_source(
        {
            "name": "exp",
            "input_names": ["inp", "few", "scale"],
            "output_names": ["out"],
            "source": "out[thread_position_in_grid.x] = T(inp[0]) + few_shape[0];",
            "header": "// first\n",
        },
        {
            "inputs": [mx.zeros((4, 2), mx.float16), mx.zeros(7), 1.0],
            "output_shapes": [(8,)],
            "output_dtypes": [mx.bfloat16],
            "grid": (8, 1, 1),
            "threadgroup": (8, 1, 1),
            "template": [("T", mx.float32), ("N", 3)],
        },
    )
    text = " ".join(source.text.split())
    assert text.startswith(
        "// first template <typename T, int N> [[kernel]] void custom_kernel_exp"
    )
    assert (
        "const device float16_t* inp [[buffer(0)]], "
        "const constant float* few [[buffer(1)]], const constant int* few_shape [[buffer(2)]], "
        "const constant float& scale [[buffer(3)]], device bfloat16_t* out [[buffer(4)]], "
        "uint3 thread_position_in_grid [[thread_position_in_grid]]) {"
    ) in text
    assert source.function.endswith("<float, 3>")
    assert [p.name for p in source.parameters] == [
        *("inp", "few", "few_shape", "scale", "out", "thread_position_in_grid")
    ]


@needs("clang++")
@compiled
def test_few_elements_are_passed_in_another_address_space() -> None:
    assert run_first(FIRST, 8).item() == 2.5
    with pytest.raises(CompileFault, match="no matching function"):
        run_first(FIRST, 7)


@needs("clang++")
@pytest.mark.parametrize(
    "body",
    [
        "threadgroup float a[1]; a[0] = 1; y[0] = first(a);",
        "y[0] = *(const threadgroup float*)(x);",
        "y[0] = *reinterpret_cast<const constant float*>(x);",
        "float a = 1; device float* p = &a; y[0] = *p;",
    ],
)
@compiled
def test_address_spaces_are_kept_apart(body: str) -> None:
    with pytest.raises(CompileFault):
        run_first(body, 8)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("y[0] = second(x);", "second"),
        ("y[0] = x[thread_position.x];", "thread_position"),
        ("y[0] = x[0]; x[0] = 1;", "read-only"),
        ("half h = x[0]; bfloat b = h; y[0] = b;", "bfloat"),
    ],
)
@compiled
def test_what_does_not_compile_is_told(body: str, said: str) -> None:
    with pytest.raises(CompileFault, match=said):
        run_first(body, 8)


@compiled
def test_a_name_that_mlx_has_already_is_refused() -> None:
    header = f"{HEADER}\ntemplate <typename T, typename U> inline T ceildiv(T n, U m)"
    with pytest.raises(CompileFault, match="redefinition"):
        run_first(FIRST, 8, header + " { return n / m; }\n")


REFUSED = {
    "float f(float* x) { return *x; }": "line 1: the parameter float[*] x has no address space",
    "float f(int a,\n const vec<float, 4>& x) {\n return a; }": "line 1: the parameter const vec",
    "void f() {\n const float* p = 0; }": "line 2: const float[*] p has no address space",
    "float f(device uint* x) {\n return *(float*)(x); }": "line 2: a cast to float[*]",
    "float f(device uint* x) { return *reinterpret_cast<const float*>(x); }": "a cast to const",
    "\nconst float table[2] = {1, 2};": "line 2: the variable table of the program",
    "static constexpr int N = 3;": "the variable N of the program",
    "namespace a {\nint n;\n}": "line 2: the variable n of the program",
    "float f() { double d = 1; return d; }": "Metal has no double",
    "float f() { return std::exp(1.0f); }": "Metal has no std::exp",
    "void f() { threadgroup float a[4]; }": "a is declared outside a kernel function",
    "kernel void f() { threadgroup float a[4], b[4]; }": "one threadgroup variable",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_metal_refuses_is_refused(text: str) -> None:
    with pytest.raises(CompileFault, match=REFUSED[text]):
        check_rules(text)
        share_variables(text)


def test_what_metal_takes_is_taken() -> None:
    text = without_comments("""
#define TABLE \\
  float words[4]
// double
constant float table[2] = {1, 2};
static constant constexpr int N = 3;
using number = float;
struct Pair { float a, b; };
enum class Kind { one, two };
template <typename T, int M = (1 << 2)>
struct Many { T all[M]; static constexpr int count = M; };
namespace inside { constant int n = 2; }
template <typename T>
T f(const device T* x, thread vec<T, 4>& y, constant uint& z) {
  const device uint* p = reinterpret_cast<const device uint*>(x);
  thread T* q = (thread T*)(&y);
  T product = x[0] * y.x;
  float a = product * product, b = a * N;
  if (a * b == 0) return T(p[0] & z);
  return q[0] * T(sizeof(T*) & 1);
}
kernel void g(device float* x [[buffer(0)]]) { threadgroup float a[2][N]; { threadgroup int b; } }
""")
    check_rules(text)
    shared = share_variables(text)
    assert "typedef float a_type[2][N]; threadgroup a_type& a = " in shared
    assert "typedef int b_type; threadgroup b_type& b = " in shared
    assert shared.count("\n") == text.count("\n")
