"""Every Triton kernel compiles for A100 and H100, without a GPU, and its shared memory fits there.

The compiling is done by this file run as a script, in a process that has no TRITON_INTERPRET and an empty cache.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from e5kernels import infonce_triton, last_token_triton

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # most that a program may use, by the CUDA programming guide
LAST_TOKEN = {"BLOCK_D": last_token_triton.BLOCK_D}
KERNELS = {  # kernel: (file, options)
    "_last_token_forward_kernel": (last_token_triton, LAST_TOKEN),
    "_last_token_backward_kernel": (last_token_triton, LAST_TOKEN),
    "_infonce_forward_kernel": (infonce_triton, infonce_triton.TILE),
    "_infonce_d_queries_kernel": (infonce_triton, infonce_triton.TILE),
    "_infonce_d_candidates_kernel": (infonce_triton, infonce_triton.TILE),
}
IN_CALLERS_DTYPE = ("queries_ptr", "candidates_ptr", "hidden_ptr", "pooled_ptr", "d_hidden_ptr", "d_pooled_ptr")
POINTERS = {
    "cu_seqlens_ptr": "*i32",
    "target_ptr": "*i64",
    "query_ids_ptr": "*i64",
    "owner_ptr": "*i64",
    "banned_ptr": "*i64",
    "hashes_ptr": "*i64",
    "query_open_ptr": "*i1",
    "candidate_open_ptr": "*i1",
    "beaten_ptr": "*i32",
    "negatives_ptr": "*i32",
}


def argument_type(name: str, dtype: str) -> str:
    if name.isupper():
        return "constexpr"
    if name in IN_CALLERS_DTYPE:
        return f"*{dtype}"
    if name.endswith("_ptr"):
        return POINTERS.get(name, "*fp32")
    return "fp32" if name in ("temperature", "margin") else "i32"


def compile_kernel(name: str, dtype: str, capability: int) -> dict[str, str | int | bool]:
    """Compile one kernel as its launcher would for 16-byte-aligned tensors."""
    module, options = KERNELS[name]
    kernel = vars(module)[name]
    aligned = [i for i, argument in enumerate(kernel.arg_names) if argument.endswith("_ptr") or argument == "dim"]
    source = ASTSource(
        kernel,
        {argument: argument_type(argument, dtype) for argument in kernel.arg_names},
        constexprs={key: value for key, value in options.items() if key.isupper()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    launch = {key: value for key, value in options.items() if not key.isupper()}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)
    return {
        "kernel": name,
        "dtype": dtype,
        "capability": capability,
        "shared": compiled.metadata.shared,
        "cubin": len(compiled.asm["cubin"]),
        "tf32": "tf32" in compiled.asm["ptx"],
        "target": f".target sm_{capability}" in compiled.asm["ptx"],
    }


CASES = [(name, dtype, capability) for name in KERNELS for dtype in ("fp32", "bf16") for capability in SHARED_BYTES]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, int], dict]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {(row["kernel"], row["dtype"], row["capability"]): row for row in rows}


@pytest.mark.parametrize(("name", "dtype", "capability"), CASES)
def test_kernel_compiles_and_fits(name: str, dtype: str, capability: int, compiled: dict) -> None:
    row = compiled[name, dtype, capability]
    assert row["cubin"] > 0 and row["target"]
    assert row["shared"] <= SHARED_BYTES[capability]
    assert not row["tf32"], "similarities are IEEE fp32"


def test_no_kernel_is_left_out() -> None:
    folder = Path(infonce_triton.__file__).parent
    defined = {
        line.split("(")[0].removeprefix("def ")
        for path in folder.glob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("def _") and line.split("(")[0].endswith("_kernel")
    }
    assert defined == set(KERNELS)


if __name__ == "__main__":
    for case in CASES:
        print(json.dumps(compile_kernel(*case)), flush=True)
