"""What the generator's training computes in fewer bits, compiled, or a second time."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train_generator
from equimini import flow_head
from equimini.generator import Generator, flow_matching_loss
from equimini.sampling.packed_weights import packed
from equimini.training import generator_trainer
from equimini.training.generator_trainer import GeneratorRun, adamw, compiled, weight_decay_groups
from equimini.training.loop import load_optimizer, set_float32
from equimini.training.setup import set_up
from equimini.utils.errors import UserError
from tests.conftest import small_generator

LABELS = torch.tensor([0, 2])


def batch(seed: int = 0) -> tuple:
    """Arguments of the loss but for the model."""
    torch.manual_seed(seed)
    return (torch.randn(2, 7, 6), LABELS, torch.rand(3, 2, 7), torch.randn(3, 2, 7, 6),
            torch.tensor([True, False]), 5)


def gradients(model: Generator, loss=flow_matching_loss, bf16: bool = False) -> dict:
    """Loss and gradients by name, dropout drawn from a fixed seed."""
    arguments = batch()
    torch.manual_seed(1)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, bf16):
        value = loss(model, *arguments).mean()
    value.backward()
    return {"loss": value.detach(),
            **{name: p.grad.clone() for name, p in model.named_parameters()}}


class Dtypes(TorchDispatchMode):
    """Notes the types of what goes into every operator and comes out: {name: [(ins, out)]}."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, (tuple, list)) else out
        if isinstance(first, torch.Tensor):
            ins = {a.dtype for a in args if isinstance(a, torch.Tensor)}
            name = str(function).split(".")[1]
            self.seen.setdefault(name, []).append((ins, first.dtype))
        return out


@pytest.mark.parametrize("dropout", (0.0, 0.1))  # they attend with different kernels
def test_autocast_leaves_what_is_delicate_in_float32(dropout):
    model, inputs = small_generator(dropout=dropout).train(), {}

    def note(module, args, out):
        inputs.setdefault(module, []).append(args[0].dtype)

    for module in model.modules():
        module.register_forward_hook(note)
    with Dtypes() as record, torch.autocast("cpu", torch.bfloat16):
        loss = flow_matching_loss(model, *batch())
    only = {torch.float32}
    assert loss.dtype == torch.float32
    for name in ("native_layer_norm", "_safe_softmax", "cos", "sin", "lerp"):
        for ins, out in record.seen.get(name, []):
            assert ins <= only | {torch.float64} and out in (torch.float32, torch.float64), name
    assert len(record.seen["native_layer_norm"]) == 3 * 5 + 2 * 2 + 3
    for block in (*model.blocks, *model.head.blocks):  # what the residual streams are made of
        assert set(inputs[block]) == only
    assert inputs[model.head.time_mlp[0]] == [torch.float32]
    assert inputs[model.head.time_mlp[1]] == [torch.float32]  # it was not read in fewer bits
    products = record.seen["addmm"]
    assert sum(ins == {torch.bfloat16} for ins, _ in products) == len(products) - 1  # the time's


def test_time_embedding_in_bfloat16_would_lose_the_time():
    """Why it is read in float32."""
    e = flow_head.time_embedding(torch.tensor([0.3, 0.3005]))
    assert not torch.equal(e[0], e[1])
    assert (e.bfloat16()[0] != e.bfloat16()[1]).float().mean() < 0.5 < (e[0] != e[1]).float().mean()


def test_a_copy_for_sampling_still_takes_norms_and_times(generator):
    x, t, z = torch.randn(4, 6), torch.rand(4), torch.randn(4, 32)
    for bf16 in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, bf16):
            assert packed(generator).head(x, t, z).shape == (4, 6)


@pytest.mark.parametrize("bf16", (False, True))
def test_checkpointed_gradients_are_the_plain_ones(bf16):
    """The same operators on the same numbers, dropout's draws included: equal bit for bit."""
    model = small_generator().train()
    plain, calls = gradients(model, bf16=bf16), []
    model.checkpoint_activations()
    for block in (*model.blocks, *model.head.blocks):
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    again = gradients(model, bf16=bf16)
    assert len(calls) == 2 * 5  # forward, and once more in the backward pass
    for name, gradient in plain.items():
        assert torch.equal(gradient, again[name]), name
    calls.clear()
    with torch.no_grad():
        flow_matching_loss(model, *batch())
    assert len(calls) == 5


@pytest.mark.parametrize("recompute", (False, True))
def test_compiled_loss_and_gradients(recompute: bool):
    """aot_eager traces forward and backward, and runs the same operators.

    Values are equal bit for bit; gradients that meet may be added in another order (torch 2.6).
    """
    model = small_generator(layers=3, head_depth=2).train()
    if recompute:
        model.checkpoint_activations()
    plain, programs = copy.deepcopy(model), torch._dynamo.utils.counters
    fast, expected = compiled(flow_matching_loss, "aot_eager"), gradients(plain)
    torch._dynamo.reset()
    programs.clear()
    for name, gradient in gradients(model, fast).items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda why: f"{name}: {why}")
    assert programs["stats"]["unique_graphs"] == 3  # however many blocks of a kind there are
    tokens, *rest, _ = batch()
    for shift in (0, 3, torch.tensor([1, 11])):
        value, expected = (with_seed(1, f, m, tokens, *rest, shift)
                           for f, m in ((fast, model), (flow_matching_loss, plain)))
        assert torch.equal(value, expected)
    assert programs["stats"]["unique_graphs"] == 4  # a number for each image: tables for each
    assert copy.deepcopy(model).blocks[0]._compiled_call_impl is None  # the moving average is plain


def with_seed(seed: int, function, *args):
    torch.manual_seed(seed)
    return function(*args)


def test_what_does_not_compile_is_said_in_one_line():
    def broken(graph, inputs):
        raise RuntimeError("no compiler\nand a long trace")

    model = small_generator().train()
    with pytest.raises(UserError, match="^--compile does not work here") as error:
        gradients(model, compiled(flow_matching_loss, broken))
    assert "\n" not in str(error.value)


def test_fused_adamw_is_adamw_and_resumes_either():
    """Both are AdamW up to the rounding of each of some ten operations per weight and step."""
    start = small_generator()
    models, optimizers = [copy.deepcopy(start) for _ in range(2)], []
    for model, fused in zip(models, (False, True)):
        optimizers.append(adamw(weight_decay_groups(model, 0.02), 1e-3, fused))
        for step in range(3):
            torch.manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape)
            optimizers[-1].step()
    eps = torch.finfo(torch.float32).eps
    for p, q, before in zip(*(m.parameters() for m in models), start.parameters()):
        # a weight is rounded in every step, its update of at most lr in each of ten operations
        bound = 3 * eps * (before.abs() + 3e-3) + 3 * 1e-3 * 10 * eps
        assert ((p - q).abs() <= bound).all() and not torch.equal(p, before)
    for mine, theirs in zip(optimizers, reversed(optimizers)):
        fused = mine.param_groups[0]["fused"]
        load_optimizer(mine, theirs.state_dict())
        assert all(g["fused"] == fused and g["lr"] == 1e-3 for g in mine.param_groups)
        mine.step()


def test_options_a_device_does_not_have(monkeypatch):
    with pytest.raises(UserError, match="--precision tf32 is arithmetic of CUDA devices, got "
                                        "--device cpu"):
        set_float32("tf32", torch.device("cpu"))
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    for name in ("tf32", "bf16", "float32"):
        set_float32(name, torch.device("cuda"))
        now = [flag.allow_tf32 for flag in flags]
        for flag, value in zip(flags, before):
            flag.allow_tf32 = value
        assert now == [name == "tf32"] * 2

    def no_fused(*_, **__):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(generator_trainer.torch.optim, "AdamW", no_fused)
    with pytest.raises(UserError, match="--no-fused-optimizer"):
        adamw([], 1e-3, True)


def test_the_script_takes_the_options(runs, tmp_path, monkeypatch):
    """Two steps from the same weights: options that only save time or memory change nothing."""
    losses = []
    for flags in ("", "--checkpoint-activations", "--no-fused-optimizer"):
        setup = set_up("generator", "", GeneratorRun(
            tokenizer=str(runs / "runs/tokenizer/last.pt"), out=str(tmp_path / "out")),
            f"--layers 1 --embed-dim 16 --heads 1 --head-width 16 --head-depth 1 {flags}".split())
        trainer = train_generator.make_trainer(setup, train_generator.find_tokenizer(setup),
                                               ["cat", "dog", "eel"])
        data = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0))
        losses.append([trainer.step(k, data, LABELS)["loss"] for k in range(2)])
        assert trainer.model.recompute == ("checkpoint" in flags)
        assert bool(trainer.optimizer.param_groups[0]["fused"]) == ("no-fused" not in flags)
    assert losses[0] == losses[1]
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)
