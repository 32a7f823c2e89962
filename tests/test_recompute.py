"""Recompute moves no bit of outputs and gradients, keeps what its policy says and nothing else, and replays once."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from faces import BUILT, DTYPES, threads
from models import VARIANTS, save_embedder, save_peer
from safetensors.torch import load_file
from test_backbone import load, packed
from tiny_runs import CONFIG, SYNTHETIC, batch_of
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook
from torch.profiler import ProfilerActivity, profile

from e5core.batches import MicroBatch, pack
from e5core.checkpoint import step_folder
from e5core.encoder import EmbeddingModel, build_model
from e5core.lora import LINEARS, LoraConfig, LoraLinear, TokenKeys, adapters
from e5core.loss import LossConfig
from e5core.recompute import Policy, apply_recompute
from e5core.step import backward_step
from e5core.train import main
from e5core.weights import read_config

CPU = torch.device("cpu")
SAVING: tuple[Policy, ...] = ("mlp", "block")
POLICIES: tuple[Policy, ...] = ("none", *SAVING)
each_saving_policy = pytest.mark.parametrize("policy", SAVING)


def adapted(
    folder: Path, policy: Policy, dtype: torch.dtype = torch.float32, targets: tuple[str, ...] = LINEARS
) -> EmbeddingModel:
    """A model with random B (B = 0 makes dA = 0 and hides mistakes) whose adapters drop a tenth."""
    lora = LoraConfig(rank=4, dropout=0.1, targets=targets)
    model = build_model(folder, dtype, CPU, causal=True, lora=lora, seed=3, recompute=policy)
    generator = torch.Generator().manual_seed(4)
    for _, linear in adapters(model.backbone):
        linear.lora_b.data.normal_(0, 0.1, generator=generator)
    return model


def piece() -> MicroBatch:
    (whole,) = pack([text.tolist() for text in packed()[0]], 1000, CPU)
    return whole


def upstream(embeddings: Tensor) -> Tensor:
    return torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(2)).to(embeddings.dtype)


def trained(model: torch.nn.Module) -> dict[str, Tensor]:
    """The trained parameters' gradients, which are all there."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert gradients and all(g.any() for g in gradients.values())
    return gradients


def step(model: EmbeddingModel) -> dict[str, Tensor]:
    """Embed with dropout and go back.  Returns the embeddings and the gradients by name."""
    embeddings = model(piece(), dropout=(5, 9))
    embeddings.backward(upstream(embeddings))
    return {"embeddings": embeddings.detach()} | trained(model)


def assert_same_bits(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []


@each_saving_policy
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_embeddings_and_gradients_are_those_without_to_the_bit(
    variant: str, dtype: torch.dtype, policy: Policy, tmp_path: Path
) -> None:
    save_peer(variant, tmp_path)
    assert_same_bits(step(adapted(tmp_path, policy, dtype)), step(adapted(tmp_path, "none", dtype)))


@each_saving_policy
@pytest.mark.parametrize("targets", [("wq", "wv"), ("w_gate",), ("w_down",), LINEARS[:-1]])
def test_no_bit_moves_whatever_is_adapted(targets: tuple[str, ...], policy: Policy, tmp_path: Path) -> None:
    save_peer("qwen2-window", tmp_path)
    got, expected = (step(adapted(tmp_path, p, targets=targets)) for p in (policy, "none"))
    assert_same_bits(got, expected)


@each_saving_policy
def test_no_bit_moves_on_two_threads_and_by_the_references(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_peer("gemma3", tmp_path)
    with threads(2):
        assert_same_bits(step(adapted(tmp_path, policy)), step(adapted(tmp_path, "none")))
    monkeypatch.setattr("e5kernels.native.AVAILABLE", False)
    assert_same_bits(step(adapted(tmp_path, policy)), step(adapted(tmp_path, "none")))


@each_saving_policy
@pytest.mark.parametrize("variant", ["mistral-window", "qwen2", "qwen3-window", "gemma3"])
def test_no_bit_of_full_fine_tuning_moves(variant: str, policy: Policy, tmp_path: Path) -> None:
    save_peer(variant, tmp_path)
    _, tokens, cu_seqlens = packed()
    results = []
    for each in (policy, "none"):
        backbone = load(tmp_path).requires_grad_(True)
        apply_recompute(backbone, each, TokenKeys())
        hidden = backbone.norm(backbone(tokens, cu_seqlens))
        hidden.backward(upstream(hidden))
        results.append({"hidden": hidden.detach()} | trained(backbone))
    assert_same_bits(*results)


@each_saving_policy
def test_dropout_is_replayed_whatever_was_embedded_in_between(policy: Policy, tmp_path: Path) -> None:
    save_peer("mistral", tmp_path)
    results = []
    for each in (policy, "none"):
        model = adapted(tmp_path, each)
        dropped, plain = model(piece(), dropout=(5, 9)), model(piece())
        with torch.no_grad():
            model(piece(), dropout=(5, 10))
        last = model(pack([[1, 2, 3]], 8, CPU)[0], dropout=(6, 0))
        in_hand = model.token_keys.keys, model.token_keys.step_key
        plain.backward(upstream(plain))
        results.append({f"plain {name}": g.clone() for name, g in trained(model).items()})
        dropped.backward(upstream(dropped))
        assert (model.token_keys.keys, model.token_keys.step_key) == in_hand
        assert in_hand[0] is not None and not torch.equal(plain, dropped)
        last.backward(upstream(last))
        results[-1] |= trained(model)
    assert_same_bits(*results)


def test_keys_are_put_back_though_a_replay_fails(tmp_path: Path) -> None:
    save_peer("mistral", tmp_path)
    model = adapted(tmp_path, "block")
    embeddings = model(piece(), dropout=(5, 9))
    model.token_keys.clear()
    handle = model.backbone.layers[1].attention.wk.register_forward_pre_hook(_fail)
    with pytest.raises(ZeroDivisionError):
        embeddings.backward(upstream(embeddings))
    handle.remove()
    assert model.token_keys.keys is None


def _fail(module: torch.nn.Module, inputs: tuple) -> None:
    raise ZeroDivisionError


def saved_bytes(model: torch.nn.Module, run: Callable[[], object]) -> int:
    """The bytes of all tensors that autograd saves in a run, parameters left out, each storage once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for address, tensor in seen.items() if address not in own)


def held_bytes(run: Callable[[], object]) -> int:
    """The bytes that were allocated in a run and are not free after it, by torch's allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = run()
    n_bytes = sum(event.self_cpu_memory_usage for event in profiled.key_averages())
    del result
    return n_bytes


@BUILT
def test_nothing_is_kept_but_what_the_policy_says(tmp_path: Path) -> None:
    save_peer("mistral", tmp_path)
    _, tokens, cu_seqlens = packed()
    n_tokens, n_layers, dim, hidden_dim, rank, head_dim = len(tokens), 3, 48, 80, 4, 8
    saved, held = {}, {}
    for policy in POLICIES:
        model = adapted(tmp_path, policy)
        model.token_keys.set(5, 9, torch.arange(n_tokens), torch.arange(n_tokens))
        run = partial(model.backbone, tokens, cu_seqlens)
        saved[policy], held[policy] = saved_bytes(model, run), held_bytes(run)
    keys, inputs = 8 * n_tokens, 4 * n_tokens * n_layers * dim
    assert saved["block"] == inputs + keys
    # Beside these: what the model returns, two rotary halves and positions, which all layers share.
    shared = 4 * n_tokens * (dim + head_dim) + 8 * n_tokens
    assert held["block"] == inputs + shared
    # Of a feed-forward: h, gate, up, their product, three z of the adapters, a number a row of the norm.
    replayed = 4 * n_tokens * n_layers * (dim + 3 * hidden_dim + 3 * rank + 1)
    assert saved["none"] - saved["mlp"] == held["none"] - held["mlp"] == replayed


@pytest.mark.parametrize(
    ("variant", "targets", "policy", "expected"),
    [
        ("mistral", LINEARS, "none", (1, 1, 1)),
        ("mistral", LINEARS, "mlp", (1, 2, 1)),
        ("mistral", LINEARS, "block", (2, 2, 1)),
        ("mistral", ("wq", "wv"), "mlp", (1, 2, 2)),  # a frozen linear has no gradient but by way of its product
        ("gemma3", LINEARS, "mlp", (1, 2, 2)),  # the norm behind w_down needs its product
        ("gemma3", LINEARS, "block", (2, 2, 2)),
    ],
)
def test_a_backward_pass_replays_each_layer_once_from_the_last_to_the_first(
    variant: str, targets: tuple[str, ...], policy: Policy, expected: tuple[int, int, int], tmp_path: Path
) -> None:
    save_peer(variant, tmp_path)
    model = adapted(tmp_path, policy, targets=targets)
    products = {"wq": "attention.wq", "w_up": "feed_forward.w_up", "w_down": "feed_forward.w_down"}
    ran: list[tuple[str, int]] = []
    for i, layer in enumerate(model.backbone.layers):
        for name, path in products.items():
            layer.get_submodule(path).register_forward_hook(noting_values(ran, (name, i)))
        layer.attention.register_forward_pre_hook(noting_gradient(ran, ("gradient", i)))
    embeddings = model(piece(), dropout=(5, 9))
    n_forward = len(ran)
    embeddings.backward(upstream(embeddings), retain_graph=True)
    for name, n_runs in zip(products, expected, strict=True):
        assert [ran.count((name, i)) for i in range(3)] == [n_runs] * 3, name
    backward = ran[n_forward:]
    assert [i for _, i in backward] == sorted((i for _, i in backward), reverse=True)  # no replay runs ahead
    assert ("gradient", 2) in backward and ("gradient", 1) in backward
    once = trained(model)
    model.zero_grad()
    embeddings.backward(upstream(embeddings))
    assert ran[n_forward + len(backward) :] == backward
    assert_same_bits(trained(model), once)


def noting_values(ran: list[tuple[str, int]], what: tuple[str, int]) -> Callable:
    """Make a forward hook that notes every run whose values were computed (in place of unread ones stand zeros)."""

    def note(module: torch.nn.Module, inputs: tuple, output: Tensor) -> None:
        if output.any():
            ran.append(what)

    return note


def noting_gradient(ran: list[tuple[str, int]], what: tuple[str, int]) -> Callable:
    """Make a hook before a module that notes every gradient that reaches its input."""

    def note(module: torch.nn.Module, inputs: tuple) -> None:
        if inputs[0].requires_grad:
            inputs[0].register_hook(lambda g: ran.append(what))

    return note


@each_saving_policy
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_forward_pass_without_gradients_is_the_same_operations(
    mode: Callable[[], torch.no_grad], policy: Policy, tmp_path: Path
) -> None:
    save_peer("gemma3", tmp_path)
    operations = []
    for each in (policy, "none"):
        model = adapted(tmp_path, each)
        with mode(), profile(activities=[ProfilerActivity.CPU]) as profiled:
            model(piece(), dropout=(5, 9))
        operations.append([event.name for event in profiled.events()])
    assert operations[0] == operations[1] and len(operations[0]) > 200


@each_saving_policy
@pytest.mark.parametrize("recorded", [False, True])
def test_a_shared_prefix_is_computed_alike(recorded: bool, policy: Policy, tmp_path: Path) -> None:
    save_peer("mistral-window", tmp_path)
    prefix = list(range(3, 15))
    (shared,) = pack([prefix + list(range(20, 40)), prefix + [2], prefix], 1000, CPU, share_prefix=True)
    assert shared.n_shared == 11
    with torch.set_grad_enabled(recorded):
        got, expected = (adapted(tmp_path, each)(shared) for each in (policy, "none"))
    assert torch.equal(got, expected)


@each_saving_policy
def test_the_gradient_of_one_parameter_needs_no_other(policy: Policy, tmp_path: Path) -> None:
    save_peer("mistral", tmp_path)
    gradients = []
    for each in (policy, "none"):
        model = adapted(tmp_path, each)
        linears = dict(adapters(model.backbone))
        wanted = [linears["layers.1.feed_forward.w_up"].lora_a, linears["layers.0.attention.wk"].lora_b]
        embeddings = model(piece(), dropout=(5, 9))
        found = torch.autograd.grad(embeddings, wanted, upstream(embeddings))
        gradients.append(dict(zip("ab", found, strict=True)))
        assert not any(p.grad is not None for p in model.parameters())
    assert_same_bits(*gradients)


@each_saving_policy
def test_an_adapter_changed_before_the_backward_pass_is_an_error_as_ever(policy: Policy, tmp_path: Path) -> None:
    save_peer("mistral", tmp_path)
    model = adapted(tmp_path, policy)
    embeddings = model(piece(), dropout=(5, 9))
    with torch.no_grad():
        model.backbone.layers[2].feed_forward.w_gate.lora_b.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        embeddings.backward(upstream(embeddings))


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_embedder(tmp_path_factory.mktemp("embedder"))


@each_saving_policy
@pytest.mark.parametrize("budget", [300, 100_000])
def test_no_bit_of_a_step_moves_in_one_pass_or_two(budget: int, policy: Policy, embedder: Path) -> None:
    batch, results = batch_of(embedder), []
    for each in (policy, "none"):
        model = adapted(embedder, each)
        result = backward_step(model, batch, LossConfig(temperature=0.5), budget, dropout=(7, 4))
        results.append({"loss": result.loss.detach()} | trained(model))
    assert_same_bits(*results)


def test_a_run_may_change_its_policy_when_it_is_resumed(embedder: Path, tmp_path: Path) -> None:
    runs, file = {name: tmp_path / name for name in ("plain", "changed")}, tmp_path / "config.toml"

    def go(name: str, policy: Policy) -> None:
        file.write_text(CONFIG.format(run=runs[name], model=embedder, data=SYNTHETIC / "en_sts.jsonl"))
        assert main([str(file), f"batch.recompute={policy}", "train.resume=true", "train.keep=3"]) == 0

    go("plain", "none")
    go("changed", "mlp")
    for done in (4, 6):  # as if it had been stopped in between
        shutil.rmtree(step_folder(runs["changed"], done))
    go("changed", "block")
    for name in ("adapter_model.safetensors", "optimizer_00000_of_00001.safetensors"):
        changed, plain = (load_file(step_folder(run, 6) / name) for run in (runs["changed"], runs["plain"]))
        assert_same_bits(changed, plain)


def test_a_run_goes_by_its_config_s_policy(embedder: Path, tmp_path: Path) -> None:
    file, ran, counts = tmp_path / "config.toml", [], {}
    handle = register_module_forward_hook(lambda module, inputs, output: ran.append(isinstance(module, LoraLinear)))
    for policy in POLICIES:
        file.write_text(CONFIG.format(run=tmp_path / policy, model=embedder, data=SYNTHETIC / "en_sts.jsonl"))
        ran.clear()
        one_pass = ["train.steps=1", "batch.micro_batch_tokens=10000"]
        assert main([str(file), f"batch.recompute={policy}", *one_pass]) == 0
        counts[policy] = sum(ran)
    handle.remove()
    assert counts["mlp"] - counts["none"] == 2 * 3 and counts["block"] - counts["none"] == 2 * 7


def test_an_unknown_policy_is_refused_by_name(embedder: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(ValueError, match="recompute must be one of none, mlp, block: got 'attention'"):
        EmbeddingModel(read_config(embedder), None, recompute="attention")
    file = tmp_path / "config.toml"
    file.write_text(CONFIG.format(run=tmp_path / "run", model=embedder, data=SYNTHETIC / "en_sts.jsonl"))
    assert main([str(file), "batch.recompute=full"]) == 2
    assert "batch.recompute: input should be 'none', 'mlp', 'block' or 'auto'; got \"full\"" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
