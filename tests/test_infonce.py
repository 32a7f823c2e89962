import math
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_fp32, assert_twice
from torch import Tensor

from e5kernels.infonce import InfoNCE, Relations, face, infonce, infonce_reference, infonce_rows, infonce_triton
from e5kernels.infonce_triton import TILE, infonce_backward, infonce_forward

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK, BLOCK_D = TILE["BLOCK"], TILE["BLOCK_D"]
Face = Callable[..., InfoNCE]
ROWS = partial(infonce_rows, block_bytes=800)  # a few rows a block
FACES = [infonce_reference, infonce_triton, ROWS]


def unit_rows(n: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.normalize(torch.randn(n, dim, dtype=torch.float64), dim=1).to(DEVICE, dtype)


def plain_relations(n_queries: int, n_candidates: int) -> Relations:
    """Candidate i is the positive of query i; the further ones are hard negatives, dealt round; no text twice."""
    candidates, target = torch.arange(n_candidates), torch.arange(n_queries) % n_candidates
    return Relations(
        target=target,
        query_ids=torch.arange(n_queries),
        owner=candidates % n_queries,
        banned=torch.stack([1_000 + target, 5_000 + target], 1),
        candidate_hashes=1_000 + candidates,
        query_open=torch.ones(n_queries, dtype=torch.bool),
        candidate_open=torch.ones(n_candidates, dtype=torch.bool),
    ).to(DEVICE)


def messy_relations(n_queries: int, n_candidates: int) -> Relations:
    """Every mask at work: few texts for many candidates, closed rows and candidates, positives and numbers anywhere."""
    query_ids = torch.randperm(3 * n_queries)[:n_queries] - n_queries
    hashes = torch.randint(-(2**62), 2**62, (max(2, n_candidates // 2),))
    candidate_hashes = hashes[torch.randint(len(hashes), (n_candidates,))]
    target = torch.randint(n_candidates, (n_queries,))
    banned = torch.stack([candidate_hashes[target], hashes[torch.randint(len(hashes), (n_queries,))]], 1)
    return Relations(
        target=target,
        query_ids=query_ids,
        owner=query_ids[torch.randint(n_queries, (n_candidates,))],
        banned=torch.cat([banned, banned[:, :1]], 1),
        candidate_hashes=candidate_hashes,
        query_open=torch.rand(n_queries) < 0.7,
        candidate_open=torch.rand(n_candidates) < 0.7,
    ).to(DEVICE)


def visible(i: int, j: int, scores: list[list[float]], r: Relations, margin: float | None) -> bool:
    target = r.target[i].item()
    if j == target:
        return True
    own = r.owner[j].item() == r.query_ids[i].item()
    if not own and not (r.query_open[i].item() and r.candidate_open[j].item()):
        return False
    if r.candidate_hashes[j].item() in r.banned[i].tolist():
        return False
    return margin is None or scores[i][j] <= scores[i][target] + margin


def oracle(
    queries: Tensor, candidates: Tensor, r: Relations, *, temperature: float, margin: float | None = None
) -> tuple[float, list[float], float, list[int]]:
    """Loss, lse, accuracy and negatives by loops over Python floats."""
    p_rows = candidates.tolist()
    scores = [[math.fsum(a * b for a, b in zip(q, p, strict=True)) for p in p_rows] for q in queries.tolist()]
    losses, lses, right, negatives = [], [], [], []
    for i, row in enumerate(scores):
        seen = [j for j in range(len(row)) if visible(i, j, scores, r, margin)]
        target = row[r.target[i].item()]
        peak = max(row[j] for j in seen)
        lses.append(peak / temperature + math.log(math.fsum(math.exp((row[j] - peak) / temperature) for j in seen)))
        losses.append(lses[-1] - target / temperature)
        right.append(target >= peak)
        negatives.append(len(seen) - 1)
    return math.fsum(losses) / len(losses), lses, sum(right) / len(right), negatives


def gradients(out: InfoNCE, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out.loss, inputs)


@pytest.mark.parametrize("margin", [None, 0.0, 0.1])
@pytest.mark.parametrize(("n_queries", "n_candidates", "dim"), [(1, 1, 3), (1, 9, 4), (7, 7, 5), (6, 19, 8), (9, 5, 2)])
def test_reference_is_the_definition(n_queries: int, n_candidates: int, dim: int, margin: float | None) -> None:
    queries, candidates = unit_rows(n_queries, dim, torch.float64), unit_rows(n_candidates, dim, torch.float64)
    relations = messy_relations(n_queries, n_candidates)
    out = infonce_reference(queries, candidates, relations, temperature=0.02, margin=margin)
    loss, lse, accuracy, negatives = oracle(queries, candidates, relations, temperature=0.02, margin=margin)
    assert out.loss.item() == pytest.approx(loss, abs=1e-11) and out.loss.dtype == torch.float64
    assert out.lse.tolist() == pytest.approx(lse, abs=1e-11)
    assert out.accuracy.item() == pytest.approx(accuracy) and out.accuracy.dtype == torch.float32
    assert out.negatives.tolist() == negatives and out.negatives.dtype == torch.int32
    assert not out.lse.requires_grad


@pytest.mark.parametrize("margin", [None, 0.1])
def test_reference_gradient_is_right(margin: float | None) -> None:
    queries, candidates = unit_rows(5, 4, torch.float64), unit_rows(11, 4, torch.float64)
    relations = messy_relations(5, 11)

    def loss(q: Tensor, p: Tensor) -> Tensor:
        return infonce_reference(q, p, relations, temperature=0.1, margin=margin).loss

    assert torch.autograd.gradcheck(loss, (queries.requires_grad_(), candidates.requires_grad_()))


SHAPES = [
    (1, 1, 8),  # one row, no negatives
    (1, 5, 7),
    (9, 9, 1),
    (BLOCK - 1, BLOCK - 1, BLOCK_D - 1),
    (BLOCK, BLOCK, BLOCK_D),
    (BLOCK + 1, BLOCK + 1, BLOCK_D + 1),
    (5, 2 * BLOCK + 3, 33),
    (2 * BLOCK + 3, 5, 33),
    (20, 60, 576),
]


@pytest.mark.parametrize("relations", [plain_relations, messy_relations])
@pytest.mark.parametrize("margin", [None, 0.05])
@pytest.mark.parametrize(("n_queries", "n_candidates", "dim"), SHAPES)
def test_triton_equals_reference_in_fp32(
    n_queries: int, n_candidates: int, dim: int, margin: float | None, relations: Callable[[int, int], Relations]
) -> None:
    r = relations(n_queries, n_candidates)
    queries, candidates = unit_rows(n_queries, dim).requires_grad_(), unit_rows(n_candidates, dim).requires_grad_()
    expected = infonce_reference(queries, candidates, r, temperature=0.02, margin=margin)
    out = infonce_triton(queries, candidates, r, temperature=0.02, margin=margin)
    assert_fp32("infonce.loss", out.loss, expected.loss)
    assert_fp32("infonce.lse", out.lse, expected.lse)
    assert torch.equal(out.accuracy, expected.accuracy) and torch.equal(out.negatives, expected.negatives)
    assert not out.lse.requires_grad
    for got, want in zip(gradients(out, queries, candidates), gradients(expected, queries, candidates), strict=True):
        assert_fp32("infonce.gradient", got, want)


@pytest.mark.parametrize("margin", [None, 0.05])
@pytest.mark.parametrize(("n_queries", "n_candidates", "dim"), [(1, 1, 8), (BLOCK + 1, BLOCK + 1, 33), (20, 60, 576)])
def test_triton_in_bf16_errs_at_most_twice_as_much_as_torch(
    n_queries: int, n_candidates: int, dim: int, margin: float | None
) -> None:
    relations = messy_relations(n_queries, n_candidates)
    queries, candidates = unit_rows(n_queries, dim, torch.bfloat16), unit_rows(n_candidates, dim, torch.bfloat16)
    results = []
    low, high = torch.bfloat16, torch.float32
    for function, dtype in ((infonce_triton, low), (infonce_reference, low), (infonce_reference, high)):
        inputs = queries.to(dtype).requires_grad_(), candidates.to(dtype).requires_grad_()
        out = function(*inputs, relations, temperature=0.02, margin=margin)
        results.append([out.loss.detach(), out.lse, *gradients(out, *inputs)])
        assert out.loss.dtype == torch.float32
    for got, same_dtype, fp32 in zip(*results, strict=True):
        assert got.dtype == same_dtype.dtype
        assert_twice(got, same_dtype, fp32)


@pytest.mark.parametrize("function", FACES)
class TestLaws:
    """What holds for all faces."""

    def test_without_negatives_loss_and_gradient_are_exactly_zero(self, function: Face) -> None:
        queries, candidates = unit_rows(1, 40).requires_grad_(), unit_rows(1, 40).requires_grad_()
        out = function(queries, candidates, plain_relations(1, 1), temperature=0.02)
        assert out.loss.item() == 0 and out.accuracy.item() == 1 and out.negatives.tolist() == [0]
        assert all(not g.any() for g in gradients(out, queries, candidates))

    def test_candidates_that_all_hold_the_same_text_give_exactly_zero(self, function: Face) -> None:
        relations = plain_relations(6, 17)
        banned, hashes = (torch.full_like(x, 77) for x in (relations.banned, relations.candidate_hashes))
        relations = replace(relations, banned=banned, candidate_hashes=hashes)
        queries = unit_rows(6, 40).requires_grad_()
        candidates = unit_rows(1, 40).expand(17, 40).contiguous().requires_grad_()
        out = function(queries, candidates, relations, temperature=0.02)
        assert out.loss.item() == 0 and out.accuracy.item() == 1 and not out.negatives.any()
        assert all(not g.any() for g in gradients(out, queries, candidates))

    def test_ties_count_as_right(self, function: Face) -> None:
        # eighths, so that every order of sums is exact: numpy's matmul, under the interpreter, sums by place
        queries, candidate = (torch.randint(-8, 9, (n, 200)).to(DEVICE, torch.float32) / 8 for n in (BLOCK + 3, 1))
        candidates = candidate.expand(BLOCK + 3, 200).contiguous()
        out = function(queries, candidates, plain_relations(BLOCK + 3, BLOCK + 3), temperature=0.02)
        assert out.accuracy.item() == 1
        assert out.loss.item() == pytest.approx(math.log(BLOCK + 3), rel=1e-6)

    def test_low_similarities_at_a_low_temperature_neither_overflow_nor_vanish(self, function: Face) -> None:
        queries, candidates = unit_rows(9, 64, torch.float64) * 0.3, unit_rows(21, 64, torch.float64) * 0.3
        assert (queries @ candidates.T).abs().max() < 0.1
        relations = plain_relations(9, 21)
        out = function(queries.float(), candidates.float(), relations, temperature=0.01)
        loss, lse, accuracy, _ = oracle(queries, candidates, relations, temperature=0.01)
        assert out.loss.item() == pytest.approx(loss, rel=1e-6)
        assert out.lse.tolist() == pytest.approx(lse, rel=1e-5, abs=1e-6)
        assert out.accuracy.item() == pytest.approx(accuracy)

    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_the_widest_gap_at_a_low_temperature_is_exact(self, function: Face, sign: float) -> None:
        queries = torch.ones(1, 1, device=DEVICE).requires_grad_()
        candidates = torch.tensor([[sign], [-sign], [-sign]], device=DEVICE).requires_grad_()
        out = function(queries, candidates, plain_relations(1, 3), temperature=0.005)
        assert out.loss.item() == pytest.approx(0 if sign > 0 else 400 + math.log(2), abs=1e-3)
        assert all(g.isfinite().all() for g in gradients(out, queries, candidates))

    @pytest.mark.parametrize(
        ("change", "hidden"),
        [
            ({}, []),
            ({"candidate_hashes": (3, 1_000)}, [3]),  # the positive's text again
            ({"candidate_hashes": (4, 5_000)}, [4]),  # the query's own text
            ({"candidate_hashes": (2, 9_000)}, [2]),  # another positive of the row
            ({"candidate_hashes": (4, 5_000 + 2**32)}, []),  # all 64 bits of a hash count
            ({"candidate_hashes": (5, 1_000)}, [5]),  # the same text among its own hard negatives
            ({"query_open": (0, False)}, [1, 2, 3, 4]),  # only what the row itself brought is left
            ({"candidate_open": (1, False)}, [1]),
            ({"candidate_open": (5, False)}, []),  # closed to others, not to its owner
            ({"query_ids": (0, 50)}, []),  # numbers of the global batch, not positions
        ],
    )
    def test_each_mask_hides_what_it_names(self, function: Face, change: dict, hidden: list[int]) -> None:
        relations = plain_relations(5, 6)  # candidate 5 is a hard negative of query 0
        others = torch.full((5, 1), 9_000, device=DEVICE)
        relations = replace(relations, banned=torch.cat([relations.banned, others], 1))
        for name, (place, value) in change.items():
            changed = asdict(relations)[name].clone()
            changed[place] = value
            relations = replace(relations, **{name: changed})
        candidates = unit_rows(6, 8).requires_grad_()
        out = function(unit_rows(5, 8)[:1], candidates, relations.rows(slice(0, 1)), temperature=1.0)
        (gradient,) = gradients(out, candidates)
        assert [j for j in range(6) if not gradient[j].any()] == hidden
        assert out.negatives.tolist() == [5 - len(hidden)]

    def test_the_margin_hides_what_scores_above_target_plus_margin(self, function: Face) -> None:
        queries, relations = torch.ones(1, 1, device=DEVICE), plain_relations(1, 4)
        candidates = torch.tensor([[0.5], [0.5625], [0.625], [0.75]], device=DEVICE).requires_grad_()
        for margin, expected in ((None, 3), (0.25, 3), (0.125, 2), (0.1, 1), (0.0, 0)):
            out = function(queries, candidates, relations, temperature=0.02, margin=margin)
            assert out.negatives.tolist() == [expected]
            assert out.accuracy.item() == (expected == 0)
        (gradient,) = gradients(function(queries, candidates, relations, temperature=1.0, margin=0.1), candidates)
        assert gradient.any(1).tolist() == [True, True, False, False]

    @pytest.mark.parametrize("margin", [None, 0.05])
    def test_parts_of_the_rows_add_up_to_the_whole(self, function: Face, margin: float | None) -> None:
        n_queries, n_candidates, cut = 23, 50, 9
        relations = messy_relations(n_queries, n_candidates)
        queries, candidates = unit_rows(n_queries, 24).requires_grad_(), unit_rows(n_candidates, 24).requires_grad_()
        whole = function(queries, candidates, relations, temperature=0.02, margin=margin)
        d_queries, d_candidates = gradients(whole, queries, candidates)
        loss, parts = 0.0, torch.zeros_like(candidates)
        for rows in (slice(0, cut), slice(cut, n_queries)):
            part = function(queries[rows], candidates, relations.rows(rows), temperature=0.02, margin=margin)
            share = (rows.stop - rows.start) / n_queries
            part_queries, part_candidates = torch.autograd.grad(part.loss * share, (queries, candidates))
            assert torch.equal(part.negatives, whole.negatives[rows])
            assert_fp32("infonce.lse", part.lse, whole.lse[rows])
            assert_fp32("infonce.gradient", part_queries[rows], d_queries[rows])
            loss, parts = loss + part.loss.item() * share, parts + part_candidates
        assert loss == pytest.approx(whole.loss.item(), rel=1e-6)
        assert_fp32("infonce.gradient", parts, d_candidates)

    @pytest.mark.parametrize("n_candidates", [1, 4])
    @pytest.mark.parametrize("broken", ["query", "candidate"])
    @pytest.mark.parametrize("margin", [None, 0.05])
    def test_nan_reaches_the_loss(self, function: Face, n_candidates: int, broken: str, margin: float | None) -> None:
        queries, candidates = unit_rows(1, 8), unit_rows(n_candidates, 8)
        (queries if broken == "query" else candidates)[-1, 3] = float("nan")
        out = function(queries, candidates, plain_relations(1, n_candidates), temperature=0.02, margin=margin)
        assert out.loss.isnan()

    def test_the_target_is_no_negative_even_where_no_text_is_banned(self, function: Face) -> None:
        relations = plain_relations(4, 9)
        relations = replace(relations, banned=relations.banned[:, :0])
        queries, candidates = unit_rows(4, 8, torch.float64), unit_rows(9, 8, torch.float64)
        out = function(queries.float(), candidates.float(), relations, temperature=0.1)
        loss, _, _, negatives = oracle(queries, candidates, relations, temperature=0.1)
        assert out.loss.item() == pytest.approx(loss, rel=1e-5)
        assert out.negatives.tolist() == negatives == [8] * 4

    def test_strided_inputs_are_read_rightly(self, function: Face) -> None:
        queries, candidates = unit_rows(6, 10).requires_grad_(), unit_rows(9, 10).requires_grad_()
        relations = messy_relations(6, 9)
        expected = function(queries, candidates, relations, temperature=0.02)
        strided = [x.detach().repeat(1, 2).T.contiguous().T[:, :10].requires_grad_() for x in (queries, candidates)]
        assert not strided[0].is_contiguous()
        out = function(*strided, relations, temperature=0.02)
        assert_fp32("infonce.lse", out.lse, expected.lse)
        for got, want in zip(gradients(out, *strided), gradients(expected, queries, candidates), strict=True):
            assert_fp32("infonce.gradient", got, want)


def test_triton_keeps_losses_far_below_one() -> None:
    queries = torch.tensor([[1.0]], device=DEVICE)
    candidates = torch.tensor([[1.0], [0.5]], device=DEVICE)
    out = infonce_triton(queries, candidates, plain_relations(1, 2), temperature=0.02)
    assert out.loss.item() == pytest.approx(math.exp(-25), rel=1e-5)


def test_triton_gives_the_same_bits_twice() -> None:
    queries, candidates = unit_rows(70, 100).requires_grad_(), unit_rows(90, 100).requires_grad_()
    relations = messy_relations(70, 90)
    outs = [infonce_triton(queries, candidates, relations, temperature=0.02) for _ in range(2)]
    first, second = (gradients(out, queries, candidates) for out in outs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_target_out_of_range_is_nan_in_the_kernel() -> None:
    for target in (-1, 1, 2**40):
        relations = replace(plain_relations(1, 1), target=torch.tensor([target], device=DEVICE))
        assert infonce_triton(unit_rows(1, 4), unit_rows(1, 4), relations, temperature=0.02).loss.isnan()


def test_public_function_picks_the_face_by_device() -> None:
    assert face(torch.device("cpu")) == "reference"
    assert face(torch.device("cuda", 1)) == "triton"
    queries, candidates, relations = unit_rows(6, 10), unit_rows(9, 10), messy_relations(6, 9)
    function = infonce_rows if DEVICE.type == "cuda" else infonce_reference
    expected = function(queries, candidates, relations, temperature=0.02, margin=0.1)
    out = infonce(queries, candidates, relations, temperature=0.02, margin=0.1)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


GOOD = {"queries": torch.ones(2, 3), "candidates": torch.ones(4, 3), "temperature": 0.02, "margin": None}
CPU_RELATIONS = plain_relations(2, 4).to(torch.device("cpu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": torch.ones(3)}, r"\(Q, D\)"),
        ({"queries": torch.ones(2, 4)}, r"\(Q, D\)"),
        ({"queries": torch.ones(2, 0), "candidates": torch.ones(4, 0)}, r"D >= 1"),
        ({"queries": torch.ones(0, 3)}, "needs a query"),
        ({"candidates": torch.ones(0, 3)}, "needs a query and a candidate"),
        ({"queries": torch.ones(2, 3, dtype=torch.bfloat16)}, "share one of"),
        ({"queries": torch.ones(2, 3).half(), "candidates": torch.ones(4, 3).half()}, "share one of"),
        ({"temperature": 0.0}, "temperature must"),
        ({"temperature": -1.0}, "temperature must"),
        ({"temperature": float("nan")}, "temperature must"),
        ({"margin": -0.1}, "margin must"),
        ({"margin": float("nan")}, "margin must"),
        ({"candidates": torch.ones(4, 3, device="meta")}, "candidates must be on"),
    ],
)
def test_bad_arguments_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        infonce(relations=CPU_RELATIONS, **(GOOD | change))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("target", torch.tensor([0, 4]), r"in 0\.\.3: got 0\.\.4"),
        ("target", torch.tensor([-1, 0]), r"in 0\.\.3: got -1\.\.0"),
        ("target", torch.tensor([0]), "relations.target must be"),
        ("target", torch.tensor([0, 1], dtype=torch.int32), "relations.target must be"),
        ("banned", torch.tensor([0, 1]), "relations.banned must be"),
        ("owner", torch.tensor([0, 1]), "relations.owner must be"),
        ("query_open", torch.tensor([0, 1]), "relations.query_open must be"),
        ("candidate_open", torch.ones(4, dtype=torch.bool, device="meta"), "relations.candidate_open must be on"),
    ],
)
def test_bad_relations_are_refused_by_name(name: str, value: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        infonce(relations=replace(CPU_RELATIONS, **{name: value}), **GOOD)


def test_ops_are_registered_soundly() -> None:
    queries, candidates = unit_rows(3, 5).requires_grad_(), unit_rows(4, 5).requires_grad_()
    relations = messy_relations(3, 4).tensors()
    torch.library.opcheck(infonce_forward, (queries, candidates, relations, 0.02, 0.1))
    row_loss, target_scores, _, _ = infonce_forward(queries, candidates, relations, 0.02, 0.1)
    rows = target_scores, row_loss.detach(), torch.rand(3, device=DEVICE)
    torch.library.opcheck(infonce_backward, (queries.detach(), candidates.detach(), relations, *rows, 0.02, 0.1))


@pytest.mark.gpu
def test_triton_equals_reference_at_the_size_of_a_7b_batch() -> None:
    relations = messy_relations(2048, 4096)
    queries, candidates = unit_rows(2048, 4096).requires_grad_(), unit_rows(4096, 4096).requires_grad_()
    expected = infonce_reference(queries, candidates, relations, temperature=0.02)
    out = infonce_triton(queries, candidates, relations, temperature=0.02)
    assert_fp32("infonce.lse", out.lse, expected.lse)
    for got, want in zip(gradients(out, queries, candidates), gradients(expected, queries, candidates), strict=True):
        assert_fp32("infonce.gradient", got, want)
