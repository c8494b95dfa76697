"""Training steps of the generator, plain and fast: images/s, memory, model FLOPs utilisation.

    python -m equimini.bench train --preset base --batch-size 256
    python -m equimini.bench train --preset small --batch-size 16 --profile

The steps are those of train_generator.py on cached latents (random ones; the picture's encoder
does not run): noise, loss, gradient, clipping, AdamW, EMA.  Every setting runs in a process of its
own, so that its peak memory is its own.

Model FLOPs are those of the matrix products and the attention, forward and backward, that one
step needs: 2 per multiply-add, class tokens and the head's batch multiplier included, what
--checkpoint-activations computes again left out.  Utilisation is model FLOPs / time / peak rate of
matrix products (docs/training.md).
"""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from equimini.autoencoder import Tokenizer
from equimini.bench.timing import apart, median_seconds, peak_memory
from equimini.config import Checked, flag
from equimini.generator import Generator, flow_matching_loss, make_generator
from equimini.presets import PRESETS
from equimini.training.generator_trainer import GeneratorRun, GeneratorTrainer
from equimini.training.setup import set_up
from equimini.utils.command_line import command, override, pick_device
from equimini.utils.errors import UserError
from equimini.utils.machine import machine, seconds

CLASSES = 1000
# what each name means: flags of train_generator.py
SETTINGS = {
    "plain": "--precision float32 --no-fused-optimizer",
    "fused": "--precision float32 --fused-optimizer",
    "tf32": "--precision tf32 --fused-optimizer",
    "bf16": "--precision bf16 --fused-optimizer",
    "compile": "--precision float32 --fused-optimizer --compile",
    "fast": "--precision bf16 --fused-optimizer --compile",
    "checkpoint": "--precision bf16 --fused-optimizer --checkpoint-activations",
    "fast-checkpoint": "--precision bf16 --fused-optimizer --compile --checkpoint-activations",
}
# dense TFLOP/s of matrix products in bf16, tf32, float32, from the makers' data sheets; the first
# name whose words the device's holds
PEAKS = {
    "H100 PCIe": (756, 378, 51), "H100 NVL": (835, 418, 60), "H100": (989, 495, 67),
    "H200 NVL": (835, 418, 60), "H200": (989, 495, 67), "A100": (312, 156, 19.5),
    "L40S": (362, 183, 91.6), "NVIDIA L4": (121, 60, 30.3), "RTX 4090": (165, 82.6, 82.6),
}


@dataclasses.dataclass(frozen=True)
class TrainBench(Checked):
    preset: str = flag("base", "generator to train", choices=tuple(PRESETS))
    batch_size: int = flag(0, "images per step; 0: 256 on a GPU, 16 on a CPU", min=0)
    settings: str = flag("", f"any of {', '.join(SETTINGS)}, with commas; empty: plain,fast on a "
                         "GPU, plain,fused,bf16 on a CPU (where compiling does not pay)")
    steps: int = flag(10, "measured steps of each, after three that are not; the median counts",
                      min=1)
    profile: bool = flag(False, "also print where the time goes: the operators "
                         "that take the most")
    peak: str = flag("published", "rate of matrix products that utilisation is of: a GPU's data "
                     "sheet's where it is known, or measured", choices=("published", "measured"))
    device: str = flag("auto", "where to compute: auto, cpu, cuda, cuda:N")
    json: bool = flag(False, "print JSON: what is measured, then a line per setting as it comes")


def model_flops(preset: str, batch_size: int, multiplier: int) -> tuple[int, int]:
    """FLOPs of one training step, forward and backward, and those of them in the flow head."""
    shape = PRESETS[preset].tokenizer
    with torch.device("meta"):
        model = Generator(PRESETS[preset].generator, CLASSES, shape.token_channels)
        x = torch.empty(batch_size, shape.columns, shape.token_channels)
        u, eps = torch.empty(multiplier, *x.shape[:2]), torch.empty(multiplier, *x.shape)
        z = torch.empty(*x.shape[:2], model.config.embed_dim, requires_grad=True)
        labels = torch.zeros(batch_size, dtype=torch.long)
    counts = []
    for loss in (lambda: flow_matching_loss(model, x, labels, u, eps),
                 lambda: model.head(eps, u, z)):
        with FlopCounterMode(display=False) as counter:
            loss().sum().backward()
        counts.append(counter.get_total_flops())
    return counts[0], counts[1]


def peak_rate(device: torch.device, precision: str, source: str = "published") -> tuple[float, str]:
    """FLOP/s of the device's matrix products in a precision, and where the number is from."""
    if device.type == "cuda" and source == "published":
        name = torch.cuda.get_device_name(device)
        for known, peaks in PEAKS.items():
            if re.search(rf"\b{known}\b", name):
                return peaks[("bf16", "tf32", "float32").index(precision)] * 1e12, "published"
    n = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / median_seconds(lambda: a @ b, device.type), f"measured, {n}x{n}"


def trainer_of(cfg: TrainBench, setting: str, out: str) -> GeneratorTrainer:
    """A trainer of random weights with the flags of this setting."""
    shape = PRESETS[cfg.preset].tokenizer
    setup = set_up("generator", "", GeneratorRun(out=out), [
        "--preset", cfg.preset, "--batch-size", str(cfg.batch_size), "--device", cfg.device,
        "--warmup-steps", "1", *SETTINGS[setting].split()])
    # only its statistics are used, so the smallest one will do
    tokenizer = Tokenizer(dataclasses.replace(PRESETS["tiny"].tokenizer, noise=shape.noise,
                                              token_channels=shape.token_channels))
    tokenizer.set_statistics(0.0, 1.0)
    torch.manual_seed(0)
    model = make_generator(setup.model, CLASSES, shape.token_channels)
    return GeneratorTrainer(model.to(setup.device), tokenizer.to(setup.device),
                            [str(k) for k in range(CLASSES)], setup.training, setup.run)


def time_setting(cfg: TrainBench, setting: str) -> dict[str, Any]:
    """Steps of one setting: seconds, peak memory, its precision's peak rate, the profile."""
    device, shape = pick_device(cfg.device), PRESETS[cfg.preset].tokenizer
    with tempfile.TemporaryDirectory() as out:
        trainer = trainer_of(cfg, setting, out)
    draw = torch.Generator().manual_seed(0)
    data = torch.randn(cfg.batch_size, shape.columns, shape.token_channels, generator=draw)
    labels = torch.randint(CLASSES, (cfg.batch_size,), generator=draw)
    if device.type == "cuda":  # as the loader's batches are
        data, labels = data.pin_memory(), labels.pin_memory()
    count = iter(range(10**9))

    def step() -> dict[str, float]:
        return trainer.step(next(count), data, labels)

    first = seconds(step, device.type)
    for _ in range(2):
        step()
    times = [seconds(step, device.type) for _ in range(cfg.steps)]
    # of a GPU the most that tensors took
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
    precision = trainer.opts.precision
    operators = profile(step, device) if cfg.profile else []
    rate, source = peak_rate(device, precision, cfg.peak)
    return {"setting": setting, "flags": SETTINGS[setting], "machine": machine(device.type),
            "precision": precision, "s_per_step": median(times), "first_s": first,
            "fastest_s": min(times), "peak_memory": memory, "peak_flop_per_s": rate,
            "peak_source": source, "operators": operators}


def profile(step: Any, device: torch.device, steps: int = 3, rows: int = 12) -> list[dict]:
    """The operators (on a GPU: kernels) with the most time of their own, as dicts."""
    from torch.profiler import ProfilerActivity
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with torch.profiler.profile(activities=kinds) as profiler:
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    name = f"self_{'device' if device.type == 'cuda' else 'cpu'}_time_total"
    events = [e for e in profiler.key_averages() if e.device_type.name == device.type.upper()
              and not getattr(e, "is_user_annotation", False)]
    events.sort(key=lambda e: -getattr(e, name))
    total = sum(getattr(e, name) for e in events)
    return [{"operator": e.key, "calls": e.count / steps, "ms": getattr(e, name) / steps / 1e3,
             "share": getattr(e, name) / total} for e in events[:rows]]


def lines(row: dict[str, Any], cfg: TrainBench) -> list[str]:
    """A setting's row of the table, and its costliest operators if it was profiled."""
    s, flops = row["s_per_step"], row["flop_per_step"]
    text = (f"{row['setting']:>15} {cfg.batch_size / s:9.2f} {s * 1e3:9.1f} "
            f"{row['fastest_s'] * 1e3:9.1f} {row['faster']:6.2f} {row['first_s']:8.1f} "
            f"{row['peak_memory'] / 2**30:8.2f} {flops / s / 1e12:8.3f} "
            f"{row['peak_flop_per_s'] / 1e12:8.3f} {row['utilisation']:6.1%}  "
            f"{row['precision']}, {row['peak_source']}")
    found = [f"    {o['ms']:9.1f} ms {o['share']:6.1%} {o['calls']:8.0f} calls  "
             f"{o['operator'][:70]}" for o in row["operators"]]
    return [text, *found]


def run_settings(cfg: TrainBench, names: list[str]) -> None:
    """Measure, and print the table, or lines of JSON, as they come."""
    multiplier = PRESETS[cfg.preset].generator_training.batch_multiplier
    flops, head = model_flops(cfg.preset, cfg.batch_size, multiplier)
    print(json.dumps({"options": dataclasses.asdict(cfg)}) if cfg.json else
          f"# {machine(torch.device(cfg.device).type)}\n# preset {cfg.preset}, batch "
          f"{cfg.batch_size}, batch multiplier {multiplier}: {flops / 1e12:.3f} model TFLOPs per "
          f"step, {head / flops:.0%} of them in the flow head\n{'setting':>15} {'images/s':>9} "
          f"{'ms/step':>9} {'fastest':>9} {'faster':>6} {'first s':>8} {'peak GiB':>8} "
          f"{'TFLOP/s':>8} {'of peak':>8} {'MFU':>6}", flush=True)
    rows: list[dict[str, Any]] = []
    for name in names:
        row = apart(time_setting, cfg, name)
        rows.append(row | {
            "flop_per_step": flops, "head_share": head / flops,
            "utilisation": flops / row["s_per_step"] / row["peak_flop_per_s"],
            "faster": (rows or [row])[0]["s_per_step"] / row["s_per_step"]})
        print(json.dumps(rows[-1]) if cfg.json else "\n".join(lines(rows[-1], cfg)), flush=True)
    if not cfg.json:
        print("# faster: than the first line.  first s: seconds of the first step, compilation "
              "included.  " + ("peak: of tensors." if cfg.device.startswith("cuda") else
                               "peak: resident size of the process."))


def main(argv: list[str]) -> None:
    parser = command("equimini.bench train", __doc__, TrainBench(), epilog="settings: "
                     + "; ".join(f"{k}: {v}" for k, v in SETTINGS.items()))
    cfg = override(TrainBench(), parser.parse_args(argv))
    device = pick_device(cfg.device)
    usual = "plain,fast" if device.type == "cuda" else "plain,fused,bf16"
    names = [name.strip() for name in (cfg.settings or usual).split(",")]
    if device.type not in ("cpu", "cuda"):
        raise UserError("--device: this benchmark has a clock for cpu and cuda")
    for name in names:
        if name not in SETTINGS:
            raise UserError(f"--settings takes {', '.join(SETTINGS)}, got {name!r}")
    if "tf32" in names and device.type != "cuda":
        raise UserError("--settings tf32 needs a CUDA device")
    size = cfg.batch_size or (256 if device.type == "cuda" else 16)
    run_settings(dataclasses.replace(cfg, batch_size=size, device=str(device)), names)
