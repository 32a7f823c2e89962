"""A model whose buffers have room for the adapters is the model without: one product each, no copy, every law kept."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from faces import DEVICE, by_triton
from models import save_embedder, save_peer
from rank_laws import LORA
from ranks import run_ranks
from shard_laws import in_rooms, small_steps
from test_backbone import relative
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from e5core.backbone import layout_of, rotary_of
from e5core.batches import MicroBatch, pack
from e5core.distributed import ALONE, World
from e5core.encoder import EmbeddingModel, build_model
from e5core.lora import LINEARS, LoraConfig, adapters
from e5core.memory import room_numbers, sizes_of
from e5core.recompute import Policy
from e5core.sharding import Shards, Strategy
from e5core.weights import read_config
from e5kernels.lora_linear import room_behind, with_room

CPU = torch.device("cpu")
RANK, DROPOUT = 3, (5, 9)


def built(
    folder: Path,
    targets: tuple[str, ...] = LINEARS,
    policy: Policy = "none",
    strategy: Strategy = "none",
    dtype: torch.dtype = torch.float32,
    fp8_skip: tuple[str, ...] | None = None,
) -> EmbeddingModel:
    """A model with random B (B = 0 makes dA = 0 and hides mistakes) whose adapters drop a tenth."""
    held = {"recompute": policy, "strategy": strategy, "world": ALONE, "fp8_skip": fp8_skip}
    lora = LoraConfig(rank=RANK, dropout=0.1, targets=targets)
    model = build_model(folder, dtype, DEVICE, causal=True, lora=lora, seed=3, **held)
    generator = torch.Generator().manual_seed(4)
    for name, master in list(model.masters()):
        if name.endswith("lora_b"):
            values = torch.empty(master.shape).normal_(0, 0.1, generator=generator)
            put = model.put or (lambda name, values: model.backbone.get_parameter(name).data.copy_(values))
            put(name, values)
    return model


def piece() -> MicroBatch:
    (whole,) = pack([list(range(3, 3 + n)) for n in (1, 9, 14)], 1000, DEVICE)
    return whole


def step(model: EmbeddingModel) -> dict[str, Tensor]:
    """Embed with dropout and go back.  Returns the embeddings and the gradients by name."""
    embeddings = model(piece(), DROPOUT)
    embeddings.backward(torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(2)).to(embeddings))
    if model.shards is not None:
        model.shards.reduce_gradients()
    gradients = {name: parameter.grad.flatten() for name, parameter in model.trained().items()}
    assert all(gradient.any() for gradient in gradients.values())
    return {"embeddings": embeddings.detach()} | gradients


def rooms(model: EmbeddingModel) -> set[str]:
    return {name.rpartition(".")[2] for name, linear in adapters(model.backbone) if room_behind(linear.weight)}


def assert_same_bits(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []


@pytest.mark.parametrize(
    ("variant", "targets", "with_rooms"),
    [
        ("gemma3", LINEARS, set(LINEARS)),
        ("qwen2-window", ("wq", "wv", "w_down"), {"w_down"}),  # wk could not read an x with spare columns
        pytest.param("qwen3-window", LINEARS[:4], set(LINEARS[:4]), marks=pytest.mark.slow),
    ],
)
def test_the_kernels_in_buffers_with_room_give_the_references_numbers(
    variant: str, targets: tuple[str, ...], with_rooms: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_peer(variant, tmp_path)
    monkeypatch.setattr("e5kernels.lora_linear.face", lambda device: "reference")
    plain = built(tmp_path, targets)
    assert rooms(plain) == set() and all(w.is_contiguous() for w in plain.parameters())
    expected = step(plain)
    by_triton(monkeypatch)
    model = built(tmp_path, targets)
    assert rooms(model) == with_rooms
    for name, parameter in model.backbone.named_parameters():
        assert torch.equal(parameter, plain.backbone.get_parameter(name)), name
    got = step(model)
    assert got.keys() == expected.keys()
    for name, values in got.items():
        assert relative(values, expected[name]) < 1e-5, name


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_neither_recompute_nor_sharding_moves_a_bit(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_embedder(tmp_path)
    by_triton(monkeypatch)
    expected = step(built(tmp_path, dtype=dtype))
    cases: list[tuple[Policy, Strategy]] = [("block", "full")]
    if dtype == torch.float32 or DEVICE.type == "cuda":  # "mlp" adds by torch, and the interpreter cuts bf16 off
        cases.append(("mlp", "none"))
    for policy, strategy in cases:
        model = built(tmp_path, policy=policy, strategy=strategy, dtype=dtype)
        assert rooms(model) == set(LINEARS)
        assert_same_bits(step(model), expected)


def test_ranks_slices_of_a_weight_with_room_are_stretches_of_its_transposed_memory() -> None:
    values, parts = torch.randn(7, 5), []
    for rank in range(3):
        linear = torch.nn.Linear(5, 7, bias=False, device="meta")
        linear.weight = torch.nn.Parameter(with_room(linear.weight.detach(), 16), requires_grad=False)
        shards = Shards(torch.nn.Sequential(linear), [linear], World(rank=rank, world_size=3, device=CPU), ALONE)
        shards.put("0.weight", values)
        parts += [flat.part for unit in shards._units for flat in unit.flats]
    whole = torch.cat(parts)
    assert torch.equal(whole[:35].view(5, 7), values.T)
    assert len(whole) >= 7 * (5 + 16) and not whole[35:].any()


@pytest.mark.slow  # two processes that interpret kernels
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter: ranks of one GPU")
def test_two_ranks_that_gather_weights_with_their_room_do_the_references_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_embedder(tmp_path)
    monkeypatch.setattr("e5kernels.lora_linear.face", lambda device: "reference")
    ranks = run_ranks(2, in_rooms, str(tmp_path))
    expected = small_steps(ALONE, str(tmp_path), "none", [0, 1])["gradients"]
    first = np.linalg.norm(expected[0])
    assert np.linalg.norm(expected[1] - expected[0]) > 0.01 * first, "B has moved, and another is to be seen"
    for rank in ranks:
        for got, gradient in zip(rank["gradients"], expected, strict=True):
            assert np.linalg.norm(got - gradient) < 2e-5 * first
    sizes = sizes_of(read_config(tmp_path), LORA)
    monkeypatch.setattr("e5kernels.lora_linear.face", lambda device: "triton")
    blocks = 2 * (sizes.block + room_numbers(sizes, torch.float32, CPU))
    assert room_numbers(sizes, torch.float32, CPU) > sizes.block // 4  # in a model as narrow as this
    numbers = blocks + sizes.norms + sizes.root + sizes.adapters
    kept = sum(rank["kept"] for rank in ranks)
    assert kept == pytest.approx(4 * numbers, rel=0.01)  # each begins at a multiple of 16 numbers


class Operations(TorchDispatchMode):
    """Counts what torch is asked for, beside the kernels, with tensors of as many rows as there are tokens."""

    def __init__(self, n_tokens: int) -> None:
        super().__init__()
        self.n_tokens, self.seen = n_tokens, Counter[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.ndim and self.n_tokens in out.shape[:2] and not func.is_view:
            self.seen[func.overloadpacket.__name__] += 1
        return out


NO_WORK = ("new_empty", "empty_like", "empty", "set_")  # the last is the interpreter's, which wraps its arguments


def block_operations(model: EmbeddingModel) -> list[dict[str, int]]:
    """What torch is asked for by a block of a mistral-window, forward and backward."""
    n_tokens = 23
    x = torch.randn(n_tokens, 48, device=DEVICE, requires_grad=True)
    bounds = torch.tensor([0, 9, n_tokens], dtype=torch.int32, device=DEVICE)
    layout = layout_of(bounds, n_tokens, 0)
    model.token_keys.set(*DROPOUT, torch.zeros_like(layout.positions), layout.positions)
    rotary = rotary_of(layout.positions, 1e4, None, 8, x.dtype)
    with Operations(n_tokens) as forward:
        y = model.backbone.layers[0](x, rotary, layout)
    g = torch.randn_like(y)
    with Operations(n_tokens) as backward:
        y.backward(g)
    return [{op: n for op, n in each.seen.items() if op not in NO_WORK} for each in (forward, backward)]


def test_a_block_is_products_and_kernels_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is concatenated, laid out anew or passed over once more, forward or backward."""
    save_peer("mistral-window", tmp_path)
    by_triton(monkeypatch)
    forward, backward = block_operations(built(tmp_path))
    assert forward == {"mm": 7, "add": 1}, "the residual"
    assert backward == {"mm": 7}
