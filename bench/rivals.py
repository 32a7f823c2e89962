"""transformers + PEFT on the workload of bench/step_rows.py: padded, as GradCache, and at their best.

All see our batch, weights, InfoNCE and clipping. A rival is how texts are grouped into padded forwards, whether the
batch is one pass or GradCache (arXiv 2101.06983: every group embedded without a graph, then again with one, by the same
random numbers), and whether activations are checkpointed. The best that we know of sorts the texts by length, keeps the
adapters in bf16 and needs no attention mask (bench/peer.py says why that is exact).

Started by bench/step_rows.py, one rival a process; prints one JSON object.
"""

import json
from collections.abc import Callable

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import MistralConfig, MistralModel

from bench.models import random_model
from bench.padded import LINEARS, embed, grouped, n_positions
from bench.step_rows import RIVALS, Rival, bench_of, parser_of, timed
from e5core.backbone import BackboneConfig
from e5core.batches import GlobalBatch
from e5core.encoder import BackboneSource, EmbeddingModel
from e5core.layouts import hf_stored
from e5core.lora import LoraConfig as OwnLora
from e5core.loss import LossConfig, infonce_loss
from e5core.optim import OptimConfig


def main() -> None:
    """Time one rival's step on the first number of triples."""
    parser = parser_of(__doc__)
    parser.add_argument("--rival", type=int, required=True, help="its place in bench.step_rows.RIVALS")
    parser.add_argument("--dropout", type=float, default=0.0)
    arguments = parser.parse_args()
    bench, rival = bench_of(arguments), RIVALS[arguments.rival]
    source = BackboneSource(path="random")
    own = random_model(bench.config, source, OwnLora(dropout=arguments.dropout), bench.dtype, bench.device)
    model = rival_model(rival, own, arguments.dropout)
    del own
    batch = bench.batch(arguments.triples[0])
    row = timed(rival_step(rival, model, batch, bench.device), batch.n_tokens, bench)
    positions = n_positions(batch.sequences, grouped(batch, rival.forward))
    print(json.dumps(row | {"tokens": batch.n_tokens, "positions": positions}))


def rival_model(rival: Rival, model: EmbeddingModel, dropout: float) -> PeftModel:
    """Make transformers' model of our weights with PEFT's adapters on it, in training mode.

    model: ours, a Mistral; it may be freed afterwards.
    """
    config, weight = model.backbone.config, model.backbone.layers[0].attention.wq.weight
    with torch.device(weight.device):
        base = MistralModel(_described(config)).to(weight.dtype)
    theirs = base.state_dict()
    with torch.no_grad():
        for name, values in model.backbone.named_parameters():
            if not name.endswith(("lora_a", "lora_b")):
                theirs[hf_stored(name, values, config)[0]].copy_(values)
    adapters = LoraConfig(r=16, lora_alpha=32, lora_dropout=dropout, target_modules=LINEARS)
    adapted = get_peft_model(base, adapters, autocast_adapter_dtype=not rival.bf16_adapters).train()
    if rival.checkpointing:
        adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return adapted


def _described(c: BackboneConfig) -> MistralConfig:
    return MistralConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.hidden_dim, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim, rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, sliding_window=c.window,
        max_position_embeddings=c.max_positions, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip


def rival_step(rival: Rival, model: PeftModel, batch: GlobalBatch, device: torch.device) -> Callable[[], Tensor]:
    """Return a function that does a whole step, update included, and returns the loss."""
    groups, optim = grouped(batch, rival.forward), OptimConfig()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=optim.lr, weight_decay=optim.weight_decay, fused=True)

    def step() -> Tensor:
        if rival.cached:
            loss = _cached_backward(model, batch, groups, device)
        else:
            loss = infonce_loss(embed(model, batch.sequences, groups, device), batch, LossConfig()).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, optim.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _cached_backward(model: PeftModel, batch: GlobalBatch, groups: list[list[int]], device: torch.device) -> Tensor:
    states, parts = [], []
    with torch.no_grad():
        for rows in groups:
            states.append((torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None))
            parts.append(embed(model, [batch.sequences[row] for row in rows], [list(range(len(rows)))], device))
    order = torch.tensor([row for rows in groups for row in rows], device=device)
    embeddings = torch.cat(parts)[order.argsort()].requires_grad_()
    loss = infonce_loss(embeddings, batch, LossConfig()).loss
    (gradient,) = torch.autograd.grad(loss, embeddings)
    after = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    for rows, state in zip(groups, states, strict=True):
        _set_random(state, device)
        part = embed(model, [batch.sequences[row] for row in rows], [list(range(len(rows)))], device)
        part.backward(gradient[torch.tensor(rows, device=device)])
    _set_random(after, device)
    return loss


def _set_random(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


if __name__ == "__main__":
    main()
