"""One optimisation step, exact for any micro-batch size (GradCache, arXiv 2101.06983, with the fullest piece kept):

    pass 1   embed every micro-batch without a graph, the fullest one with its graph
    loss     InfoNCE over the whole batch, and its gradient at the embeddings
    pass 2   the kept graph takes its gradient; every other micro-batch is embedded again with a graph and takes its own

Dropout is a function of (seed, step, row, position), so both passes draw the same. A batch that fits one micro-batch is
thereby one plain pass.

Each of N ranks does this with its share of the batch's examples, whose rows keep their numbers: its queries meet the
candidates of all ranks, and the adapters' gradients are added up once a step. So all N give the same run. Ranks that
hold the whole model meet in the loss and after pass 2, whatever their micro-batches; those that hold a slice of it
(sharding.py) meet in every block, so one with fewer micro-batches runs empty ones.
"""

from collections.abc import Sequence

import torch

from e5core.batches import GlobalBatch, MicroBatch, pack
from e5core.distributed import ALONE, World, largest, share, sum_gradients
from e5core.encoder import EmbeddingModel
from e5core.loss import BatchLoss, LossConfig, infonce_loss
from e5core.optim import AdamW, OptimConfig
from e5core.preemption import NEVER, Preemption


def backward_step(
    model: EmbeddingModel,
    batch: GlobalBatch,
    loss: LossConfig,
    budget: int,
    dropout: tuple[int, int] | None,
    world: World = ALONE,
    preemption: Preemption = NEVER,
    packed: Sequence[MicroBatch] = (),
) -> BatchLoss:
    """Compute the loss of a batch and leave its gradient, summed over the ranks, in the adapters, which had none.

    budget: tokens of a micro-batch.  dropout: (seed, step).  packed: the batch's micro-batches of this budget, on any
    device, where they were made ahead; (): they are made here.  Raises on every rank FloatingPointError naming records
    for a loss that is not finite, Preempted where a rank is to leave.
    """
    device = model.backbone.norm.weight.device
    packed = [piece.to(device) for piece in packed or pack(batch.sequences, budget, device, numbers=batch.rows)]
    shards = model.shards
    idle = [] if shards is None else [None] * (largest(len(packed), world) - len(packed))  # empty micro-batches
    until_asked = preemption.between if shards is None else preemption.together
    *pieces, fullest = sorted(packed, key=lambda piece: len(piece.tokens))
    with preemption.phase():
        parts = []
        with torch.no_grad():
            for piece in until_asked([*pieces, *idle]):
                if piece is None:
                    shards.idle(backward=False)
                else:
                    parts.append(model(piece, dropout))
        kept = model(fullest, dropout)
    rows = torch.cat([piece.rows for piece in (*pieces, fullest)])
    embeddings = torch.cat([*parts, kept.detach()]).requires_grad_()  # (n, D) of this rank, as packed
    result = infonce_loss(embeddings[rows.argsort()], batch, loss, world)
    are_finite = torch.isfinite(embeddings).all(dim=1)  # (n,)
    (gradient,) = torch.autograd.grad(result.loss, embeddings)
    *gradients, last = gradient.split([len(piece.rows) for piece in (*pieces, fullest)])
    end_pass = shards.reduce_gradients if model.full else lambda: None  # else what is summed up is, once a step
    with preemption.phase():
        kept.backward(last)
        del kept
        end_pass()
        for piece, part in until_asked([*zip(pieces, gradients, strict=True), *((None, None) for _ in idle)]):
            if piece is None:
                shards.idle(backward=True)
            else:
                model(piece, dropout).backward(part)
            end_pass()
    if not torch.isfinite(result.loss):  # read only now: a GPU would have nothing queued while the host looked
        broken = rows[are_finite.logical_not()].tolist()
        broken = [row for own in share(broken, world) for row in own]
        raise FloatingPointError(f"the loss is not finite ({result.loss.item()}): {_blame(batch, broken)}")
    if shards is None:
        sum_gradients(model.parameters(), world)
    else:
        if not model.full:
            shards.reduce_gradients()
        shards.release()
    return result


def _blame(batch: GlobalBatch, rows: list[int]) -> str:
    owner = batch.relations.owner.tolist()
    ids = {batch.record_ids[row if row < batch.n_queries else owner[row - batch.n_queries]] for row in rows}
    if not ids:
        return f"all embeddings are finite; records {', '.join(batch.record_ids[:5])}, ..."
    return f"embeddings of records {', '.join(sorted(ids)[:5])} are not; lower optim.lr or look at these texts"


def make_optimizer(model: EmbeddingModel, config: OptimConfig) -> AdamW:
    """Make the optimizer of what is trained; over shards each rank has that of its slices."""
    shards = model.shards
    return AdamW(model.trained(), config) if shards is None else AdamW(shards.slices(), config, shards.world)
