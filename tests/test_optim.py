"""AdamW, schedule and clipping are torch's, to the bit."""

import pytest
import torch
from torch import nn

from e5core.optim import AdamW, OptimConfig, learning_rate
from e5core.sharding import Slice


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in (("a", (5, 3)), ("b", (7,)))}


@pytest.mark.parametrize("at_once", [60, 2**26])  # bytes: one parameter, both
def test_updates_equal_torch_adamw_bitwise(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("e5core.optim.GROUP_BYTES", at_once)
    config = OptimConfig(lr=3e-3, weight_decay=0.1, warmup_steps=5)
    ours, theirs = parameters(), parameters()
    optimizer = AdamW(ours, config)
    peer = torch.optim.AdamW(theirs.values(), lr=config.lr, weight_decay=0.1, foreach=False)
    generator = torch.Generator().manual_seed(1)
    for step in range(20):
        lr = learning_rate(config, step, 20)
        for name in ours:
            gradient = torch.randn(ours[name].shape, generator=generator)
            ours[name].grad, theirs[name].grad = gradient.clone(), gradient.clone()
        peer.param_groups[0]["lr"] = lr
        norm = optimizer.clip_gradients()
        assert norm == pytest.approx(nn.utils.clip_grad_norm_(theirs.values(), 1.0).item(), rel=1e-6)
        for name in ours:  # torch divides by norm + 1e-6; the update below is compared on equal gradients
            assert torch.allclose(ours[name].grad, theirs[name].grad, rtol=1e-5)
            theirs[name].grad = ours[name].grad.clone()
        optimizer.update(lr)
        peer.step()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_rate_rises_over_the_warm_up_then_falls_to_the_end() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=4)
    rates = [learning_rate(config, step, 10) for step in range(10)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == pytest.approx([1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert OptimConfig(warmup_share=0.1).warmup(45) == 5
    assert OptimConfig().warmup(45) == 100
    assert learning_rate(OptimConfig(lr=1.0, warmup_steps=0), 0, 1) == 1.0


def test_gradients_below_the_clip_are_left_alone() -> None:
    ours = parameters()
    optimizer = AdamW(ours, OptimConfig(clip=100.0))
    for p in ours.values():
        p.grad = torch.ones_like(p)
    assert optimizer.clip_gradients() == pytest.approx(22**0.5)
    assert all((p.grad == 1).all() for p in ours.values())


def test_missing_and_non_finite_gradients_are_named() -> None:
    ours = parameters()
    optimizer = AdamW(ours, OptimConfig())
    ours["a"].grad = torch.ones_like(ours["a"])
    with pytest.raises(RuntimeError, match="1 trainable tensors, first of them b"):
        optimizer.clip_gradients()
    ours["b"].grad = torch.full_like(ours["b"], torch.nan)
    with pytest.raises(FloatingPointError, match="not finite in 1 tensors, first of them b"):
        optimizer.clip_gradients()
    ours["b"].grad = torch.full_like(ours["b"], -1e30)
    with pytest.raises(FloatingPointError, match=r"norm is beyond fp32: its largest number is 1e\+30, in b"):
        optimizer.clip_gradients()


def test_shares_and_stretches_of_any_number_of_ranks_are_the_whole_state() -> None:
    whole = AdamW(parameters(), OptimConfig())
    for pair in whole.moments.values():
        for moment in pair:
            moment.normal_()
    wanted = {name: part.values.clone() for name, part in whole.state().items()}
    assert set(wanted) == {"a.first", "a.second", "b.first", "b.second"}
    for world_size in (1, 2, 4, 9):  # 9 ranks: more than b's 7 values
        parts = [
            {name: piece.share(rank, world_size) for name, piece in whole.state().items()} for rank in range(world_size)
        ]
        for name, values in wanted.items():
            assert torch.equal(torch.cat([part[name].values for part in parts]), values)
            assert all(part[name].values.equal(values[part[name].start : part[name].stop]) for part in parts)
            assert {part[name].shape for part in parts} == {(5, 3) if name.startswith("a") else (7,)}


def test_stretches_update_as_the_whole_does_and_each_has_its_own_state() -> None:
    ours, config = parameters(), OptimConfig()
    whole = AdamW(ours, config)
    cut = {"a": 4, "b": 0}  # the first rank holds 4 values of a and none of b
    halves = [{}, {}]
    for name, p in ours.items():
        flat, shape = p.detach().clone().flatten(), tuple(p.shape)
        for rank, (first, last) in enumerate(((0, cut[name]), (cut[name], len(flat)))):
            halves[rank][name] = Slice(nn.Parameter(flat[first:last]), first, shape)
        p.grad = torch.randn(p.shape)
        for half in halves:
            half[name].values.grad = p.grad.flatten()[half[name].start : half[name].stop].clone()
    optimizers = [AdamW(half, config) for half in halves]
    for optimizer in (whole, *optimizers):
        optimizer.update(1e-3)
    for name, p in ours.items():
        assert torch.equal(torch.cat([half[name].values for half in halves]), p.flatten())
    for key, state in whole.state().items():
        parts = [optimizer.state()[key] for optimizer in optimizers]
        assert torch.equal(torch.cat([part.values for part in parts]), state.values)
        assert [part.start for part in parts] == [0, cut[key[0]]] and {part.shape for part in parts} == {state.shape}
