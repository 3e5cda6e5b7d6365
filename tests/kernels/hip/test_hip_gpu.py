"""The HIP kernels on the GPU of this machine: results, graph capture, streams, refusals.

Runs as a program too, which prints times: python tests/kernels/hip/test_hip_gpu.py
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from aiter_inductor.kernels.hip import activation, norm, norm_quant, quant, rope
from aiter_inductor.kernels.hip.loading import arch_name
from aiter_inductor.lowerings import activation as activation_ops
from aiter_inductor.lowerings import norm as norm_ops
from aiter_inductor.lowerings import norm_quant as norm_quant_ops
from aiter_inductor.lowerings import quant as quant_ops
from aiter_inductor.lowerings import rope as rope_ops
from tests.kernels.hip import comparing
from tests.kernels.hip.comparing import assert_close_to_float64

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch sees no GPU to run HIP kernels on"
)

EPS = 1e-5
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FN, FNUZ, INT8 = torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.int8
SHAPES = [(5, 128), (1, 8, 1160), (3, 100), (7, 77), (64, 7168), (3, 16384), (2, 4097)]


assert_quantised_alike = partial(comparing.assert_quantised_alike, tipped=0.01)
"""The product with a scale's reciprocal, which sm_90 takes, tips more ties than a quotient."""


def rows(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return (3 * torch.randn(*shape, device="cuda")).to(dtype)


def on_cpu(reference: Callable[..., object], *args: object, **keywords: object) -> list:
    """On a GPU torch divides by a constant as a product with its reciprocal, which tips ties."""
    moved = [arg.cpu() if isinstance(arg, torch.Tensor) else arg for arg in args]
    return [tensor.cuda() for tensor in reference(*moved, **keywords)]


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norms(shape, dtype):
    x, residual = rows(*shape, dtype=dtype), rows(*shape, dtype=dtype)
    w, b = rows(shape[-1], dtype=dtype), rows(shape[-1], dtype=dtype)
    out, total = norm.add_rms_norm(x, residual, w, EPS)
    assert torch.equal(total, x + residual)
    exact = norm_ops.rms_norm.reference(total.double(), w.double(), EPS)
    assert_close_to_float64(out, exact, roundings=2)
    exact = norm_ops.layer_norm.reference(x.double(), w.double(), b.double(), EPS)
    assert_close_to_float64(norm.layer_norm(x, w, b, EPS), exact, roundings=2)


@pytest.mark.parametrize("dtype", [FN, FNUZ, INT8], ids=str)
@pytest.mark.parametrize("group_size", [None, 32, 128], ids=str)
@pytest.mark.parametrize("shape", [(9, 128), (64, 7168), (3, 1152)], ids=str)
def test_quantised_norms(shape, group_size, dtype):
    x, w = rows(*shape, dtype=BF16), rows(shape[-1], dtype=BF16)
    args = {"dtype": dtype, "group_size": group_size}
    out = norm_quant.rms_norm_quant(x, w, EPS, **args)
    assert_quantised_alike(
        *out, *on_cpu(norm_quant_ops.rms_norm_quant.reference, x, w, EPS, **args)
    )


@pytest.mark.parametrize("dtype", [FN, FNUZ], ids=str)
def test_special_values(dtype):
    x = rows(6, 96, dtype=FP32)
    x[0, 5], x[1, 40], x[3] = float("nan"), float("inf"), 0.0
    for group_size in (None, 32):
        if group_size is None:
            out = quant.quant_per_token(x, dtype=dtype)
            expected = on_cpu(quant_ops.quant_per_token.reference, x, dtype=dtype)
        else:
            args = {"group_size": group_size, "dtype": dtype}
            out = quant.quant_per_group(x, **args)
            expected = on_cpu(quant_ops.quant_per_group.reference, x, **args)
        assert_quantised_alike(*out, *expected)


@pytest.mark.parametrize("name", activation.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
def test_act_and_mul(name, dtype):
    for shape in ((5, 128), (64, 18432), (3, 77)):
        gate, up = rows(*shape, dtype=dtype), rows(*shape, dtype=dtype)
        exact = activation_ops.act_and_mul.reference(gate.double(), up.double(), activation=name)
        out = activation.act_and_mul(gate, up, activation=name)
        assert_close_to_float64(out, exact, roundings=8)


@pytest.mark.parametrize("group_size", [None, 128], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_act_and_mul_quant(interleaved, group_size):
    both = rows(33, 2 * 18432, dtype=BF16)
    gate, up = (both[:, ::2], both[:, 1::2]) if interleaved else both.chunk(2, -1)
    args = {"activation": "silu", "dtype": FN, "group_size": group_size}
    out = activation.act_and_mul_quant(gate, up, **args)
    expected = on_cpu(activation_ops.act_and_mul_quant.reference, gate, up, **args)
    assert_quantised_alike(*out, *expected)


@pytest.mark.parametrize("pairs", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(128, 128), (80, 20), (192, 64)], ids=str)
def test_rope_qk_and_qk_norm_rope(head_dim, rotary_dim, pairs):
    q, k = (rows(2, 65, heads, head_dim, dtype=BF16).transpose(1, 2) for heads in (8, 2))
    cos, sin = (rows(2, 1, 65, rotary_dim, dtype=FP32) for _ in range(2))
    weights = [rows(head_dim, dtype=BF16) for _ in range(2)]
    style = {"interleaved_in": pairs, "interleaved_out": pairs, "rotary_dim": rotary_dim}
    style["out_dtype"] = BF16
    normed = (q, k, *weights, cos, sin, EPS)
    for outs, expected in (
        (
            rope.rope_qk(q, k, cos, sin, **style),
            rope_ops.rope_qk.reference(q, k, cos, sin, **style),
        ),
        (rope.qk_norm_rope(*normed, **style), rope_ops.qk_norm_rope.reference(*normed, **style)),
    ):
        for out, want in zip(outs, expected, strict=True):
            assert out.stride() == want.stride()
            torch.testing.assert_close(out, want, rtol=2**-6, atol=2**-3)
            assert (out != want).float().mean() <= 0.01


def test_capture_into_a_graph_and_replay():
    x, w = rows(33, 2112, dtype=BF16), rows(2112, dtype=BF16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # loads the module while capturing, when run alone
        q, scale = norm_quant.rms_norm_quant(x, w, EPS, dtype=FN)
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(rows(33, 2112, dtype=BF16))
        q.view(torch.uint8).fill_(0x7F)
        graph.replay()
        expected = on_cpu(norm_quant_ops.rms_norm_quant.reference, x, w, EPS, dtype=FN)
        assert_quantised_alike(q, scale, *expected)


def test_kernels_launched_early_wait_for_the_one_before():
    """Each of a chain reads what the one before it wrote, in memory that the allocator hands on."""
    x, w = rows(512, 7168, dtype=BF16), rows(7168, dtype=BF16)
    expected = x
    for _ in range(8):
        expected = norm.add_rms_norm(expected, x, w, EPS)[1].clone()
        torch.cuda.synchronize()
    for _ in range(50):
        out = x
        for _ in range(8):
            out = norm.add_rms_norm(out, x, w, EPS)[1]
        assert torch.equal(out, expected)


def test_launch_is_on_the_current_stream():
    x = rows(4096, 8192, dtype=BF16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.mul_(2)
        out = norm.rms_norm(x, None, EPS)
    stream.synchronize()
    assert_close_to_float64(out[:8], norm_ops.rms_norm.reference(x[:8].double(), None, EPS))


def test_tensor_on_the_cpu_is_refused():
    x, w = rows(4, 256, dtype=BF16), torch.ones(256, dtype=BF16)
    with pytest.raises(ValueError, match="weight is on the CPU; the kernel runs on a GPU"):
        norm.rms_norm(x, w, EPS)


def test_row_offsets_beyond_32_bits():
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    x = torch.empty((1 << 19) + 3, 8192, dtype=BF16, device="cuda")
    x[-2:] = rows(2, 8192, dtype=BF16)
    out = norm.rms_norm(x, None, EPS)
    assert_close_to_float64(out[-2:], norm_ops.rms_norm.reference(x[-2:].double(), None, EPS))


def cases(num_tokens: int, N: int) -> dict[str, tuple[int, Callable[[], object]]]:
    """Name to bytes moved an element, and the call."""
    x, residual = rows(num_tokens, N, dtype=BF16), rows(num_tokens, N, dtype=BF16)
    w, group = rows(N, dtype=BF16), {"dtype": FN, "group_size": 128}
    return {
        "rms_norm": (4, lambda: norm.rms_norm(x, w, EPS)),
        "rms_norm_quant": (3, lambda: norm_quant.rms_norm_quant(x, w, EPS, dtype=FN)),
        "layer_norm_quant": (3, lambda: norm_quant.layer_norm_quant(x, w, w, EPS, dtype=FN)),
        "add_rms_norm_quant 128": (
            7,
            lambda: norm_quant.add_rms_norm_quant(x, residual, w, EPS, **group),
        ),
        "quant_per_group 128": (3, lambda: quant.quant_per_group(x, **group)),
        "silu_and_mul 128": (
            5,
            lambda: activation.act_and_mul_quant(x, residual, activation="silu", **group),
        ),
    }


def main() -> None:
    """Print the time of each kernel beside that of a copy that moves as many bytes."""
    from triton.testing import do_bench

    print(f"{torch.cuda.get_device_name()} ({arch_name(torch.device('cuda'))}), median of do_bench")
    for num_tokens, N in ((64, 7168), (4096, 7168), (16384, 8192), (4096, 18432)):
        for name, (bytes_an_element, run) in cases(num_tokens, N).items():
            latency_us = do_bench(run, return_mode="median") * 1e3
            size_bytes = num_tokens * N * bytes_an_element
            source = torch.empty(size_bytes // 2, dtype=torch.int8, device="cuda").random_()
            copy_us = do_bench(source.clone, return_mode="median") * 1e3
            print(f"{name:24s} {num_tokens:6d} x {N:5d} {latency_us:8.1f} us, copy {copy_us:8.1f}")
    rope_times(do_bench)


def rope_times(do_bench: Callable[..., float]) -> None:
    """32 heads of q and 8 of k, of 128 elements, in bf16."""
    for batch, num_tokens in ((128, 1), (2, 4096)):
        q, k = (rows(batch, num_tokens, n, 128, dtype=BF16).transpose(1, 2) for n in (32, 8))
        cos, sin = (rows(batch, 1, num_tokens, 128, dtype=BF16) for _ in range(2))
        latency_us = do_bench(lambda: rope.rope_qk(q, k, cos, sin), return_mode="median") * 1e3
        source = torch.empty(batch * num_tokens * 40 * 128, dtype=BF16, device="cuda").zero_()
        copy_us = do_bench(source.clone, return_mode="median") * 1e3
        print(
            f"rope_qk {batch:4d} x {num_tokens:5d} tokens {latency_us:8.1f} us, copy {copy_us:8.1f}"
        )


if __name__ == "__main__":
    main()
