"""Our Triton kernels compiled to PTX for GPUs that are not here: they compile, and use the instructions meant."""

import re
from types import SimpleNamespace

import pytest

from dit_suite.attention import rows_triton, search_triton

pytest.importorskip("triton")


def compiled(kernel, signature: dict, constants: dict, aligned: tuple[str, ...], capability: int, warps: int):
    """PTX and shared memory of one specialisation; `aligned` pointers are multiples of 16 bytes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    place = {name: number for number, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature={name: signature.get(name, "i32" if name not in constants else "constexpr") for name in place},
        constexprs={(place[name],): value for name, value in constants.items()},
        attrs={(place[name],): [["tt.divisibility", 16]] for name in aligned},
    )
    found = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    return SimpleNamespace(ptx=found.asm["ptx"], shared=found.metadata.shared)


@pytest.mark.parametrize("capability", [80, 90])
def test_rows_are_copied_sixteen_bytes_at_a_time(capability):
    kernel = rows_triton._kernel()
    pointers = {"source": "*bf16", "index": "*i64", "out": "*bf16"}
    constants = {"dim": 128, "padded_dim": 128, "rows": rows_triton._TILE // 128}
    ptx = compiled(kernel, pointers, constants, tuple(pointers), capability, 4).ptx
    loads, stores = re.findall(r"ld\.global\S*", ptx), re.findall(r"st\.global\S*", ptx)
    wide = rows_triton._TILE // (4 * 32 * 8)  # per thread: numbers of a tile / (threads x eight of two bytes)
    assert [load for load in loads if "v4.b32" in load] == ["ld.global.v4.b32"] * wide
    assert stores == ["st.global.v4.b32"] * wide
    assert all(load.endswith(("v4.b32", "b64", "v2.b64")) for load in loads)  # the rest are row numbers


@pytest.mark.parametrize(("capability", "product"), [(80, "mma.sync.aligned.m16n8k16"), (90, "wgmma.mma_async")])
def test_the_search_runs_on_tensor_cores_and_fits_the_shared_memory(capability, product):
    kernel = search_triton._kernel()
    pointers = {"query": "*bf16", "key": "*bf16", "lse": "*fp32", "mass": "*fp32"}
    constants = {"head_dim": 128, "padded_dim": 128, "block": 128}
    found = compiled(kernel, {**pointers, "scale_log2": "fp32"}, constants, tuple(pointers), capability, 8)
    assert product in found.ptx and found.shared <= (163 if capability == 80 else 227) * 1024
