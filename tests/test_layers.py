"""The direction of imports and what no room may do, read from the source (DESIGN section 2).

The tables say what is allowed; a room that is not written yet is simply absent, a file that no table names fails.
"""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = (
    (
        "ground",
        {
            "archives",
            "cards",
            "config",
            "contamination",
            "distributed",
            "drawing",
            "event_file",
            "formats",
            "gguf_file",
            "gguf_tokenizer",
            "joined",
            "manifest",
            "order",
            "page",
            "preemption",
            "progress",
            "records",
            "template",
            "tokenizer",
            "vector_shards",
        },
    ),
    (
        "parts",
        {
            "backbone",
            "fp8",
            "families",
            "lora",
            "recompute",
            "rope_scaling",
            "sharding",
            "stretches",
            "weights",
            "mixture",
            "metrics",
            "search",
            "approximate",
            "row_store",
            "sources",
            "testsets",
            "mteb_tasks",
            "adapter",
            "layouts",
            "model_files",
            "tokenizer_files",
        },
    ),
    (
        "composition",
        {
            "encoder",
            "loss",
            "batches",
            "optim",
            "checkpoint",
            "trained",
            "text_encoder",
            "scores",
            "passkey",
            "saving",
            "run",
            "run_page",
            "similarities",
            "negatives",
            "memory",
            "workload",
            "estimate",
            "step",
            "mteb_model",
            "prefetch",
        },
    ),
    (
        "entries",
        {"train", "encode", "evaluate", "data", "mine", "merge", "export", "plan", "verify_grad", "report"},
    ),
)
# beside each other; torch takes seconds, and API machines have none
SYNTH_IMPORTS = {"archives", "config", "contamination", "progress", "records", "template"}
KERNEL_IMPORTS = {"torch", "triton", "numpy", "e5kernels"}  # and the standard library
NEVER_IMPORTED = {"tests", "bench", "pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
ENVIRONMENT_READERS = {"distributed", "synth.client"}  # ranks; API keys
RANK_NAMES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}
ARCHITECTURES = ("mistral", "llama", "qwen", "gemma", "smollm")
ARCHITECTURE_FREE = {"train", "sharding"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "torch.load", "torch.save", "__import__"}
ELSEWHERE = """
import torch  # before the platform changes: its own libraries are those of this machine


class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ImportError(f"no {name} here")


sys.meta_path.insert(0, NoTriton())
sys.platform = "darwin"
import e5kernels.attention
import e5kernels.dropout
import e5kernels.fp8
import e5kernels.fp8_linear
import e5kernels.infonce
import e5kernels.last_token
import e5kernels.lora_linear
import e5kernels.rms_norm
import e5kernels.rope
import e5kernels.swiglu

for op in (e5kernels.fp8, e5kernels.infonce, e5kernels.last_token, e5kernels.lora_linear):
    assert {op.face(torch.device(kind)) for kind in ("cpu", "mps", "cuda")} == {"reference"}
for op in (e5kernels.attention, e5kernels.dropout, e5kernels.rms_norm, e5kernels.rope, e5kernels.swiglu):
    assert {op.face(torch.device(kind)) for kind in ("mps", "cuda")} == {"reference"}
bounds = torch.tensor([0, 1, 3], dtype=torch.int32)
assert e5kernels.last_token.last_token(torch.eye(3), bounds).tolist() == [[1, 0, 0], [0, 0, 1]]
index, open_ = torch.arange(2), torch.ones(2, dtype=torch.bool)
relations = e5kernels.infonce.Relations(index, index, index, index[:, None], index, open_, open_)
queries = torch.eye(2, requires_grad=True)
out = e5kernels.infonce.infonce(queries, torch.eye(2), relations, temperature=1.0)
out.loss.backward()
torch.testing.assert_close(out.loss.detach(), torch.tensor(-1.0).exp().log1p())
assert queries.grad.isfinite().all() and queries.grad.any()
assert "triton" not in sys.modules
"""

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def sources(folder: str) -> dict[str, ast.Module]:
    """Every module under a package folder: its dotted name within the package -> its tree."""
    paths = sorted((ROOT / folder).rglob("*.py"))
    names = [".".join(path.relative_to(ROOT / folder).with_suffix("").parts) for path in paths]
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in zip(names, paths, strict=True)}


PROGRAM = sources("e5core")
KERNELS = sources("kernels/e5kernels")
ROOMS = {name: tree for name, tree in PROGRAM.items() if "." not in name and name != "__init__"}
CONSUMERS = {name: tree for name, tree in PROGRAM.items() if name.startswith("consumers.")}
SYNTH = {name: tree for name, tree in PROGRAM.items() if name.startswith("synth.")}
MODULES = {f"e5core.{name}": tree for name, tree in PROGRAM.items()} | {
    f"e5kernels.{name}": tree for name, tree in KERNELS.items()
}


def imports(tree: ast.AST) -> set[str]:
    """The full dotted names that a module imports; `from a import b` counts as a.b, relative imports as "."."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {"." if node.level else f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms_imported(tree: ast.AST) -> set[str]:
    """The e5core modules that a module imports: `config`, `synth`."""
    return {name.split(".")[1] for name in imports(tree) if name.startswith("e5core.")}


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain that starts at a name, else the empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (front := dotted(node.value)):
        return f"{front}.{node.attr}"
    return ""


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: everything outside functions' bodies."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            continue
        yield child
        yield from at_import(child)


def floor_of(room: str) -> int:
    return next((height for height, (_, rooms) in enumerate(FLOORS) if room in rooms), -1)


def test_there_are_rooms_to_check() -> None:
    assert {"config", "contamination", "distributed", "metrics"} <= set(ROOMS)


def test_every_file_of_the_program_has_a_floor() -> None:
    homeless = {name for name in ROOMS if floor_of(name) < 0}
    strays = {name for name in PROGRAM if "." in name and not name.startswith(("synth.", "consumers."))}
    assert not homeless | strays, "name the room in FLOORS (DESIGN section 2), or move it"


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_imports_run_down_only(room: str) -> None:
    for imported in rooms_imported(ROOMS[room]):
        assert imported in ROOMS, f"e5core.{room} imports e5core.{imported}, which is no room that others may import"
        assert floor_of(imported) < len(FLOORS) - 1, f"e5core.{room} imports the entry {imported}"
        assert floor_of(imported) <= floor_of(room), f"e5core.{room} imports e5core.{imported}, a floor above it"


def test_imports_make_no_circle() -> None:
    taken = {name: [f"{found}." for found in imports(tree)] for name, tree in MODULES.items()}
    graph = {
        name: {other for other in MODULES if any(found.startswith(f"{other}.") for found in own)}
        for name, own in taken.items()
    }
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_consumers_are_strangers() -> None:
    for name, tree in CONSUMERS.items():
        assert not rooms_imported(tree), f"e5core.{name} loads what others would load, by others' means alone"


def test_kernels_import_torch_triton_numpy_and_the_standard_library_only() -> None:
    for name, tree in KERNELS.items():
        tops = {taken.split(".")[0] for taken in imports(tree)}
        assert tops <= KERNEL_IMPORTS | sys.stdlib_module_names, f"e5kernels.{name}"


def test_synth_and_what_it_imports_never_import_torch() -> None:
    for name, tree in SYNTH.items():
        assert rooms_imported(tree) <= SYNTH_IMPORTS | {"synth"}, f"e5core.{name}"
    for name, tree in {**SYNTH, **{room: ROOMS[room] for room in SYNTH_IMPORTS & set(ROOMS)}}.items():
        tops = {taken.split(".")[0] for taken in imports(tree)}
        assert not tops & {"torch", "triton", "e5kernels", "safetensors", "transformers"}, f"e5core.{name}"
        assert rooms_imported(tree) <= SYNTH_IMPORTS | {"synth"}, f"e5core.{name}, which synth imports"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_stand_at_the_top_are_absolute_and_need_no_try(name: str) -> None:
    taken = imports(MODULES[name])
    assert "." not in taken and not any(each.endswith(".*") for each in taken), f"{name}: relative or star import"
    assert not {each.split(".")[0] for each in taken} & NEVER_IMPORTED, name
    for node in ast.walk(MODULES[name]):
        if isinstance(node, Function | ast.Try | ast.ClassDef):
            assert not imports(node), f"{name}:{node.lineno} imports inside a function, a class or a try"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_only_distributed_knows_ranks_and_the_environment(name: str) -> None:
    if name.removeprefix("e5core.") in ENVIRONMENT_READERS:
        return
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Constant):
            assert node.value not in RANK_NAMES, f"{name}:{node.lineno}"
        if isinstance(node, ast.Name | ast.Attribute):
            assert dotted(node) not in ("os.environ", "os.getenv", "os.environb"), f"{name}:{node.lineno}"
            assert dotted(node).split(".")[-1] != "init_process_group", f"{name}:{node.lineno}"
    assert not imports(MODULES[name]) & {"os.environ", "os.getenv"}, name
    assert "torch.distributed.init_process_group" not in imports(MODULES[name]), name


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nothing_is_unpickled_evaluated_or_caught_wholesale(name: str) -> None:
    assert not imports(MODULES[name]) & FORBIDDEN_CALLS, name
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Call):
            assert dotted(node.func) not in FORBIDDEN_CALLS, f"{name}:{node.lineno} calls {dotted(node.func)}"
            for keyword in node.keywords:
                allowed = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                assert keyword.arg != "allow_pickle" or allowed, f"{name}:{node.lineno} allows pickle"
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            caught = {dotted(kind) if kind is not None else "everything" for kind in kinds}
            assert not caught & {"everything", "Exception", "BaseException"}, f"{name}:{node.lineno} catches too much"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_only_distributed_prints(name: str) -> None:
    if name != "e5core.distributed":
        prints = [node.lineno for node in ast.walk(MODULES[name]) if isinstance(node, ast.Name) and node.id == "print"]
        assert not prints, f"{name}: use distributed.log, which keeps to rank 0 and flushes"


@pytest.mark.parametrize("room", sorted(ARCHITECTURE_FREE & set(ROOMS)))
def test_architectures_are_not_named_above_the_model(room: str) -> None:
    for node in ast.walk(ROOMS[room]):
        names = [node.id] if isinstance(node, ast.Name) else [node.attr] if isinstance(node, ast.Attribute) else []
        names += [node.name] if isinstance(node, ast.alias) else []
        for name in names:
            assert not any(word in name.lower() for word in ARCHITECTURES), f"e5core.{room}: {name}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_module_asks_for_a_device_at_import(name: str) -> None:
    for node in at_import(MODULES[name]):
        called = dotted(node.func) if isinstance(node, ast.Call) else ""
        assert not called.startswith(("torch.cuda.", "torch.accelerator.")), f"{name}:{node.lineno} calls {called}"


def test_importing_every_module_leaves_cuda_alone() -> None:
    lines = ["import importlib, torch"]
    for name in MODULES:
        if name.endswith("_triton") and sys.platform != "linux":
            continue  # there is no Triton to import
        if name.removeprefix("e5core.") in CONSUMERS:
            continue  # scripts for the processes of libraries that need not be there
        lines.append(f"importlib.import_module({name.removesuffix('.__init__')!r})")
        lines.append(f"assert not torch.cuda.is_initialized(), {name!r}")
    paths = [str(ROOT), str(ROOT / "kernels")]
    program = f"import sys; sys.path[:0] = {paths!r}\n" + "\n".join(lines)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


def test_without_linux_the_kernels_import_no_triton_and_compute_by_the_reference() -> None:
    program = f"import sys; sys.path.insert(0, {str(ROOT / 'kernels')!r})\n" + ELSEWHERE
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


def test_importing_what_synth_needs_does_not_bring_torch() -> None:
    wanted = [f"e5core.{name}" for name in [*sorted(SYNTH_IMPORTS & set(ROOMS)), *sorted(SYNTH)]]
    program = f"import importlib, sys; sys.path.insert(0, {str(ROOT)!r})\n"
    program += f"for name in {[name.removesuffix('.__init__') for name in wanted]!r}: importlib.import_module(name)\n"
    program += "assert 'torch' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
