"""train_generator.py --objective mean-flow, as a user runs it, from the generator of `runs`."""

import pytest
import torch

from equimini import load_generator
from equimini.convert.pack import pack
from equimini.utils import checkpoint
from equimini.utils.errors import UserError
from tests.helpers.scripts import GENERATOR, call, mistake
from tests.training.test_scripts import records, same

RUN = GENERATOR[GENERATOR.index("--workers"):]  # the sizes are the checkpoint's
START = ["--init-from", "runs/generator/last.pt", "--objective", "mean-flow", "--batch-size", 4,
         "--lr", 1e-3, "--warmup-steps", 1, *RUN]


def weights(path):
    return torch.load(path / "last.pt", weights_only=True)


@pytest.fixture(scope="module")
def heads(runs):
    """`runs`, with a head of 6 steps trained alone in runs/head."""
    call("train_generator.py", *START, "--trained", "head", "--steps", 6, "--out", "runs/head",
         cwd=runs)
    return runs


def test_the_head_alone_moves_and_resumes_bit_for_bit(heads):
    call("train_generator.py", *START, "--trained", "head", "--steps", 3, "--out", "runs/head2",
         cwd=heads)
    call("train_generator.py", "--resume", "--steps", 6, "--out", "runs/head2", cwd=heads)
    one, two = weights(heads / "runs/head"), weights(heads / "runs/head2")
    for key in one.keys() - {"config"}:
        assert same(one[key], two[key]), key
    assert records(heads / "runs/head/log.jsonl") == records(heads / "runs/head2/log.jsonl")
    teacher = weights(heads / "runs/generator")["ema"]
    assert same(one["teacher"], teacher)
    moved = {k for k, v in teacher.items() if not torch.equal(one["model"][k], v)}
    assert moved and all(k.startswith("head.") for k in moved)
    assert one["config"]["model"]["objective"] == "mean-flow"


def test_all_weights_move_where_asked_also_in_bf16_and_pieces(runs):
    call("train_generator.py", *START, "--precision", "bf16", "--accumulate", 2, "--steps", 3,
         "--checkpoint-activations", "--out", "runs/all", cwd=runs)
    found = weights(runs / "runs/all")
    assert all(map(torch.isfinite, [torch.tensor(r["loss"]) for r in
                                    records(runs / "runs/all/log.jsonl") if "loss" in r]))
    assert not torch.equal(found["model"]["blocks.0.attn.qkv.weight"],
                           found["teacher"]["blocks.0.attn.qkv.weight"])


def test_a_guide_draws_without_class_in_place_of_the_teacher(heads):
    """The teacher as its own guide changes nothing but roundings; another run's is refused."""
    for name, guide in (("itself", "generator"), ("another", "all")):
        call("train_generator.py", *START, "--trained", "head", "--steps", 3, "--guide",
             f"runs/{guide}/last.pt", "--out", f"runs/by-{name}", cwd=heads)
    plain, itself, other = (torch.tensor([r["loss"] for r in records(
        heads / f"runs/{name}/log.jsonl") if "loss" in r][:3]) for name in (
            "head", "by-itself", "by-another"))
    torch.testing.assert_close(itself, plain, rtol=1e-4, atol=1e-6)
    assert (other / plain - 1).abs().min() > 1e-3
    assert "another guide" in mistake("train_generator.py", "--resume", "--steps", 4, "--guide",
                                      "runs/all/last.pt", "--out", "runs/by-itself", cwd=heads)
    call("train_generator.py", "--resume", "--steps", 4, "--out", "runs/by-itself", cwd=heads)
    assert "not measured" not in call("train_generator.py", *START, "--guide", "runs/all/last.pt",
                                      "--dry-run", cwd=heads)


@pytest.mark.parametrize("arguments, text", (
    (["--guide", "runs/generator/last.pt", "--out", "new"], "--guide is for --objective mean-flow"),
    (["--objective", "mean-flow", "--out", "new"], "give its checkpoint with --init-from"),
    (["--init-from", "runs/head/last.pt", "--out", "new"], "was trained with --objective mean-flow"),
    (["--resume", "--objective", "flow-matching", "--out", "runs/head"],
     "was trained with --objective mean-flow, not flow-matching"),
    (["--resume", "--objective", "mean-flow"],
     "was trained with --objective flow-matching, not mean-flow")))
def test_an_objective_that_does_not_fit_is_said_in_one_sentence(heads, arguments, text):
    assert text in mistake("train_generator.py", *arguments, cwd=heads)


def test_a_head_is_packed_onto_the_generator_that_it_was_trained_on(heads, tmp_path):
    base, out = tmp_path / "box.pt", tmp_path / "head.pt"
    pack(heads / "runs/generator/last.pt", base)
    assert pack(heads / "runs/head/last.pt", out, base=base) == [out]
    held = torch.load(out, weights_only=True)["ema"]
    assert held and all(name.startswith("head.") for name in held)  # the transformer is in box.pt
    packed, trained = load_generator(out), load_generator(heads / "runs/head/last.pt")
    assert all(torch.equal(a, b.half().float()) for a, b in
               zip(packed.generator.parameters(), trained.generator.parameters()))
    assert packed.generator.head.scales and not load_generator(base).generator.head.scales

    content = weights(heads / "runs/head")
    checkpoint.save(tmp_path / "other.pt", "generator",
                    {**content, "classes": ["a"] * len(content["classes"])})
    for source, onto, to, text in (
            (heads / "runs/head/last.pt", base, base, "two files of one folder"),
            (heads / "runs/head/last.pt", base, heads / "head.pt", "two files of one folder"),
            (heads / "runs/head/last.pt", out, tmp_path / "more.pt", "a whole one"),
            (tmp_path / "other.pt", base, tmp_path / "more.pt", "was not trained from")):
        with pytest.raises(UserError, match=text):
            pack(source, to, base=onto)
    for asked, text in (({"tokenizer": "t.pt"}, "leave out --tokenizer"),
                        ({"file_mb": 1e-4}, "more.pt would be .*--file-mb")):
        with pytest.raises(UserError, match=text):
            pack(heads / "runs/head/last.pt", tmp_path / "more.pt", base=base, **asked)
    assert not (tmp_path / "more.pt").exists()

    content = torch.load(base, weights_only=True)
    content["ema"]["no_class"] += 1
    checkpoint.save(base, "generator", content)
    with pytest.raises(UserError, match="head.pt belongs to another box.pt than the one beside it"):
        load_generator(out)
    checkpoint.save(base, "generator", {**torch.load(out, weights_only=True),
                                        "base": {"file": "box.pt"}})
    with pytest.raises(UserError, match="box.pt is damaged"):
        load_generator(base)
    base.unlink()
    with pytest.raises(UserError, match="head.pt needs box.pt beside it"):
        load_generator(out)
