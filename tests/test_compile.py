"""Every Triton kernel compiles for A100, RTX 4090 and H100, without a GPU, and its shared memory fits there.

The compiling is done by this file run as a script, in a process that has no TRITON_INTERPRET and an empty cache. Run by
hand it prints a line a kernel: shared memory, registers and what spills from them.
"""

import io
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from e5kernels import (
    attention_triton,
    dropout_triton,
    fp8_triton,
    infonce_triton,
    last_token_triton,
    lora_linear_triton,
    rms_norm_triton,
    rope_triton,
    swiglu_triton,
)

SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # most of a program, by the CUDA programming guide
DIM, HEADS, HEAD_DIM = 4096, 32, 128  # Mistral-7B; its hidden_dim of 14,336 is 7 blocks of swiglu and of dropout
LAST_TOKEN = {"BLOCK_D": last_token_triton.BLOCK_D}
NORM = rms_norm_triton.tile_of(8192, DIM)
LONE, ADDED = {"HAS_DH": False}, {"HAS_DH": True}
HIDDEN = rms_norm_triton.tile_of(8192, 14336)
HEAD_NORM = rms_norm_triton.tile_of(HEADS, HEAD_DIM)  # qk-norm
ROPE = rope_triton.tile_of(HEADS, HEAD_DIM // 2) | {"x_channel_stride": 1}

JOIN = {"BLOCK": lora_linear_triton.BLOCK_JOINED, "BLOCK_R": 16}


def lora_forward(n: int, rank: int = 16, drops: bool = True) -> tuple[str, ModuleType, dict[int, dict]]:
    tiles = {e: lora_linear_triton.forward_tile(n, rank, e) | {"N": n, "DROPS": drops} for e in (2, 4)}
    return "_lora_linear_forward_kernel", lora_linear_triton, tiles


def lora_backward(
    n: int, rank: int = 16, drops: bool = True, dx: bool = True, sums: bool = True
) -> tuple[str, ModuleType, dict[int, dict]]:
    fixed = {"N": n, "DROPS": drops, "DX": dx, "SUMS": sums}
    tiles = {e: lora_linear_triton.backward_tile(n, rank, e) | fixed for e in (2, 4)}
    return "_lora_linear_backward_kernel", lora_linear_triton, tiles


GLU = swiglu_triton.TILE
MISTRAL = {"GROUP": 4, "CAUSAL": True, "SPARE": 16, "HEAD_DIM": HEAD_DIM}  # 8 key heads
DELTA = {"SPARE": 16, "HEAD_DIM": HEAD_DIM, "BLOCK_D": HEAD_DIM, "BLOCK": attention_triton.DELTA_ROWS}
ATTENTION = {
    kernel: {n: MISTRAL | attention_triton.tile_of(kernel, HEAD_DIM, n) for n in (2, 4)}
    for kernel in ("forward", "d_kv", "d_q")
}
KERNELS = {  # case: (kernel, file, options and arguments fixed at compile time, or those of an element's bytes)
    "last_token forward": ("_last_token_forward_kernel", last_token_triton, LAST_TOKEN),
    "last_token backward": ("_last_token_backward_kernel", last_token_triton, LAST_TOKEN),
    "infonce forward": ("_infonce_forward_kernel", infonce_triton, infonce_triton.TILE),
    "infonce d_queries": ("_infonce_d_queries_kernel", infonce_triton, infonce_triton.TILE),
    "infonce d_candidates": ("_infonce_d_candidates_kernel", infonce_triton, infonce_triton.TILE),
    "rms_norm forward": ("_rms_norm_forward_kernel", rms_norm_triton, NORM | {"ADDS": False}),
    "rms_norm forward, heads": ("_rms_norm_forward_kernel", rms_norm_triton, HEAD_NORM | {"ADDS": False}),
    "rms_norm forward, added": ("_rms_norm_forward_kernel", rms_norm_triton, NORM | {"ADDS": True}),
    "rms_norm backward": ("_rms_norm_backward_kernel", rms_norm_triton, NORM | LONE | {"D_WEIGHT": False}),
    "rms_norm backward, heads": ("_rms_norm_backward_kernel", rms_norm_triton, HEAD_NORM | LONE | {"D_WEIGHT": False}),
    "rms_norm backward, weight": ("_rms_norm_backward_kernel", rms_norm_triton, NORM | LONE | {"D_WEIGHT": True}),
    "rms_norm backward, added": ("_rms_norm_backward_kernel", rms_norm_triton, NORM | ADDED | {"D_WEIGHT": False}),
    "rope": ("_rope_kernel", rope_triton, ROPE),
    "swiglu forward": ("_swiglu_forward_kernel", swiglu_triton, GLU | {"GELU": False}),
    "swiglu backward": ("_swiglu_backward_kernel", swiglu_triton, GLU | {"GELU": False}),
    "geglu forward": ("_swiglu_forward_kernel", swiglu_triton, GLU | {"GELU": True}),
    "geglu backward": ("_swiglu_backward_kernel", swiglu_triton, GLU | {"GELU": True}),
    "lora_linear forward": lora_forward(1),
    "lora_linear forward of 2": lora_forward(2),
    "lora_linear forward of 3": lora_forward(3),
    "lora_linear forward, rank 64": lora_forward(1, 64),
    "lora_linear forward of 3, rank 64": lora_forward(3, 64, drops=False),
    "lora_linear join": ("_lora_linear_join_kernel", lora_linear_triton, JOIN),
    "lora_linear backward": lora_backward(1),
    "lora_linear backward of 2": lora_backward(2),
    "lora_linear backward of 3": lora_backward(3),
    "lora_linear backward of 3, no dx": lora_backward(3, drops=False, dx=False),
    "lora_linear backward of 3, rank 64": lora_backward(3, 64, sums=False),
    "attention table": ("_block_table_kernel", attention_triton, {"BLOCK": 64, "CHUNK": attention_triton.CHUNK}),
    "attention forward": ("_attention_forward_kernel", attention_triton, ATTENTION["forward"]),
    "attention delta": ("_attention_delta_kernel", attention_triton, DELTA),
    "attention d_kv": ("_attention_d_kv_kernel", attention_triton, ATTENTION["d_kv"]),
    "attention d_q": ("_attention_d_q_kernel", attention_triton, ATTENTION["d_q"]),
    "fp8 quantise": ("_quantise_rows_kernel", fp8_triton, NORM),
    "fp8 rms_norm": ("_add_rms_norm_rows_kernel", fp8_triton, NORM | {"ADDS": False}),
    "fp8 rms_norm, added": ("_add_rms_norm_rows_kernel", fp8_triton, NORM | {"ADDS": True}),
    "fp8 swiglu": ("_glu_rows_kernel", fp8_triton, HIDDEN | {"GELU": False}),
    "fp8 geglu": ("_glu_rows_kernel", fp8_triton, HIDDEN | {"GELU": True}),
    "dropout": ("_keyed_dropout_kernel", dropout_triton, dropout_triton.tile_of(DIM)),
}
NARROW_STORES = {
    "lora_linear forward": 1,  # z, which has 16 columns
    "lora_linear forward of 2": 2,
    "lora_linear forward of 3": 3,
    "lora_linear forward, rank 64": 1,
    "lora_linear forward of 3, rank 64": 3,
    "lora_linear join": 16,  # B lies across its room
    "attention table": 1,
    "attention forward": 1,  # lse, a number a query and head, as delta
    "attention delta": 1,
    # a scale a row
    **dict.fromkeys(("fp8 quantise", "fp8 rms_norm", "fp8 rms_norm, added", "fp8 swiglu", "fp8 geglu"), 1),
}
SPILLED = {  # bytes, at most
    ("attention d_kv", "fp32"): 16,
    ("attention forward", "bf16"): 24,  # on sm_89 alone
    ("lora_linear backward of 3, no dx", "bf16"): 16,
    ("lora_linear backward of 3, rank 64", "fp32"): 4,
    ("lora_linear backward of 3, rank 64", "bf16"): 16,
}
IN_CALLERS_DTYPE = (
    "queries_ptr", "candidates_ptr", "hidden_ptr", "pooled_ptr", "d_hidden_ptr", "d_pooled_ptr", "x_ptr", "y_ptr",
    "g_ptr", "dx_ptr", "added_ptr", "h_ptr", "dh_ptr", "gate_ptr", "up_ptr", "d_gate_ptr", "d_up_ptr", "z_ptr",
    "dz_ptr",
    "q_ptr", "k_ptr", "v_ptr", "out_ptr", "d_out_ptr", "dq_ptr", "dk_ptr", "dv_ptr",
)  # fmt: skip
POINTERS = {
    "codes_ptr": "*fp8e4nv",
    "cu_seqlens_ptr": "*i32",
    "cu_q_ptr": "*i32",
    "cu_k_ptr": "*i32",
    "table_ptr": "*i32",
    "target_ptr": "*i64",
    "query_ids_ptr": "*i64",
    "owner_ptr": "*i64",
    "banned_ptr": "*i64",
    "keys_ptr": "*i64",
    "hashes_ptr": "*i64",
    "query_open_ptr": "*i1",
    "candidate_open_ptr": "*i1",
    "beaten_ptr": "*i32",
    "negatives_ptr": "*i32",
}


def argument_type(name: str, dtype: str) -> str:
    if name.isupper():
        return "constexpr"
    name = re.sub(r"_\d(?=_|$)", "", name)  # one of several linears'
    if name in IN_CALLERS_DTYPE:
        return f"*{dtype}"
    if name.endswith("_ptr"):
        return POINTERS.get(name, "*fp32")
    if name == "stream":
        return "i64"
    return "fp32" if name in ("temperature", "margin", "eps", "sign", "scale") else "i32"


def compile_kernel(case: str, dtype: str, capability: int, ones: bool = False) -> dict[str, str | int | bool]:
    """Compile one kernel as its launcher would for 16-byte-aligned tensors of the model's widths.

    ones: as for integers that are all 1, like the number of tokens of one short text: Triton makes constants of them.
    """
    name, module, options = KERNELS[case]
    kernel, options = vars(module)[name], options.get({"bf16": 2, "fp32": 4}[dtype], options)
    launch = {key: value for key, value in options.items() if key in ("num_warps", "num_stages")}
    fixed = {key: value for key, value in options.items() if key not in launch}
    if ones:
        free = set(kernel.arg_names) - set(fixed) - set(kernel.do_not_specialize or ())
        fixed |= {x: 1 for x in free if argument_type(x, dtype) in ("i32", "i64")}
    types = {x: "constexpr" if x in fixed else argument_type(x, dtype) for x in kernel.arg_names}
    widths = ("dim", "width", "half", "n_heads", "rank")
    aligned = [i for i, x in enumerate(types) if x not in fixed and (x.endswith(("_ptr", "_stride")) or x in widths)]
    attrs = {(i,): [["tt.divisibility", 16]] for i in aligned}
    with redirect_stdout(io.StringIO()) as log:  # ptxas's, which TRITON_DUMP_PTXAS_LOG has printed
        compiled = triton.compile(
            ASTSource(kernel, types, constexprs=fixed, attrs=attrs),
            target=GPUTarget("cuda", capability, 32),
            options=launch,
        )
    ptx = compiled.asm["ptx"]
    return {
        "case": case,
        "dtype": dtype,
        "capability": capability,
        "ones": ones,
        "shared": compiled.metadata.shared,
        "registers": int(re.search(r"Used (\d+) registers", log.getvalue())[1]),
        "spilled": int(re.search(r"(\d+) bytes spill stores", log.getvalue())[1]),
        "cubin": len(compiled.asm["cubin"]),
        "tf32": "tf32" in ptx,
        "e4m3": "cvt.rn.satfinite.e4m3x2.f32" in ptx,
        "narrow_stores": len(re.findall(r"st\.global(?!\S*\.v4\.b32)", ptx)),
        "target": f".target sm_{capability}" in ptx,
    }


CASES = [
    (case, dtype, capability)
    for case in KERNELS
    for dtype in ("fp32", "bf16")
    for capability in SHARED_BYTES
    if capability >= 89 or not case.startswith("fp8")
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, int, bool], dict]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {(row["case"], row["dtype"], row["capability"], row["ones"]): row for row in rows}


@pytest.mark.parametrize(("case", "dtype", "capability"), CASES)
def test_kernel_compiles_and_fits(case: str, dtype: str, capability: int, compiled: dict) -> None:
    row = compiled[case, dtype, capability, False]
    assert row["cubin"] > 0 and row["target"]
    assert row["shared"] <= SHARED_BYTES[capability]
    assert not row["tf32"], "similarities are IEEE fp32"
    assert row["e4m3"] == case.startswith("fp8"), "the device rounds to e4m3 by itself"
    if not case.startswith("infonce"):  # its fp32 tiles fill the registers
        assert row["spilled"] <= SPILLED.get((case, dtype), 0)
        assert row["narrow_stores"] <= NARROW_STORES.get(case, 0), "activations move 16 bytes at a time"


@pytest.mark.parametrize("case", KERNELS)
def test_kernel_compiles_for_integers_of_one(case: str, compiled: dict) -> None:
    assert compiled[case, "bf16", 90, True]["cubin"] > 0


def test_no_kernel_is_left_out() -> None:
    folder = Path(infonce_triton.__file__).parent
    defined = {
        line.split("(")[0].removeprefix("def ")
        for path in folder.glob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("def _") and line.split("(")[0].endswith("_kernel")
    }
    assert defined == {name for name, *_ in KERNELS.values()}


if __name__ == "__main__":
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # a kernel that knows no caller's dtype too, for ptxas to speak
    for case in CASES:
        print(json.dumps(compile_kernel(*case)), flush=True)
    for case in KERNELS:
        print(json.dumps(compile_kernel(case, "bf16", 90, ones=True)), flush=True)
