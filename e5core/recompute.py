"""Recompute: what a block's backward pass needs is computed again there instead of being kept (arXiv 1604.06174).

    policy   a block keeps for its backward pass    and computes again, in products of its frozen weights
    none     everything                             nothing
    mlp      its attention's part, and the          w_gate and w_up
             feed-forward's input (T, D)
    block    its input (T, D)                       all but w_down

w_down's product is spared, since no gradient needs its values (with post_norms one does: it is computed). Kept beside
are 8 bytes a token, the keys of the adapters' dropout, by which the replay draws the same whatever else has run since;
there is no other randomness. The replay is the same operations on the same values: outputs and gradients do not move
by a bit.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from e5core.backbone import Backbone, Block, Layout, Rotary
from e5core.lora import LoraLinear, TokenKeys

Policy = Literal["none", "mlp", "block"]


class _Replayed(torch.autograd.Function):
    """compute(x) that keeps its input; backward runs replay(x), which may differ from it in values that it returns.

    parameters: those that compute uses. As inputs they get their gradient like any other's, be x's wanted or not.
    """

    @staticmethod
    def forward(ctx, compute, replay, token_keys, x, *parameters):  # noqa: ANN001, ANN002, ANN205
        ctx.replay, ctx.token_keys, ctx.step_key = replay, token_keys, token_keys.step_key
        ctx.save_for_backward(token_keys.keys, x, *parameters)  # the parameters to notice a change in place
        return compute(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):  # noqa: ANN001, ANN205
        keys, x, *parameters = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        x = x.detach().requires_grad_(wanted[0])
        with torch.enable_grad(), ctx.token_keys.replaced(keys, ctx.step_key):
            y = ctx.replay(x)
        inputs = [tensor for tensor, is_wanted in zip((x, *parameters), wanted, strict=True) if is_wanted]
        gradients = iter(torch.autograd.grad(y, inputs, g))
        return None, None, None, *(next(gradients) if is_wanted else None for is_wanted in wanted)


def apply_recompute(backbone: Backbone, policy: Policy, token_keys: TokenKeys) -> None:
    """Make every block run by the policy wherever gradients are recorded.

    token_keys: those of the backbone's adapters.  Raises ValueError for a policy that there is not.
    """
    if policy not in get_args(Policy):
        raise ValueError(f"recompute must be one of {', '.join(get_args(Policy))}: got {policy!r}")
    for layer in backbone.layers:
        if policy == "none":
            layer.run = Block.compute
        else:
            layer.run = partial(_replay_feed if policy == "mlp" else _replay_block, token_keys)


def _replay_block(token_keys: TokenKeys, block: Block, x: Tensor, rotary: Rotary, layout: Layout) -> Tensor:
    def replay(x: Tensor) -> Tensor:
        return _feed_unread(block, *block.attend(x, rotary, layout))

    return _replayed(lambda x: block.compute(x, rotary, layout), replay, token_keys, [block], x)


def _replay_feed(token_keys: TokenKeys, block: Block, x: Tensor, rotary: Rotary, layout: Layout) -> Tensor:
    x = torch.add(*block.attend(x, rotary, layout))
    parts = (block.ffn_norm, block.feed_forward, block.ffn_post_norm)
    return _replayed(block.feed, partial(_feed_unread, block), token_keys, parts, x)


def _replayed(
    compute: Callable[[Tensor], Tensor],
    replay: Callable[[Tensor], Tensor],
    token_keys: TokenKeys,
    parts: Iterable[nn.Module],
    x: Tensor,
) -> Tensor:
    if not torch.is_grad_enabled():
        return compute(x)
    parameters = [parameter for part in parts for parameter in part.parameters() if parameter.requires_grad]
    return _Replayed.apply(compute, replay, token_keys, x, *parameters)


def _feed_unread(block: Block, x: Tensor, attended: Tensor | None = None) -> Tensor:
    """Do block.feed for its gradients alone: the values that it returns may be others."""
    w_down = block.feed_forward.w_down
    if not isinstance(block.ffn_post_norm, nn.Identity) or not isinstance(w_down, LoraLinear):
        return block.feed(x, attended)
    x, normed = block.ffn_norm.branch(x, attended)
    return x + w_down(block.feed_forward.hidden(normed, is_read=False), is_read=False)
