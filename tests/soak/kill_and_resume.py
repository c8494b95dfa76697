"""Kill real training processes with SIGKILL at random moments, resume, and compare.

    python tests/soak/kill_and_resume.py --kills 20           # both training scripts

An uninterrupted run and one that was killed again and again must end with the same weights, EMA,
optimizer state, log lines and previews, bit for bit (same machine, same settings).
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
COMMON = ("--batch-size 4 --workers 0 --val-images 8 --val-every 7 --preview-every 10 "
          "--save-every 3 --log-every 1 --deterministic").split()
FLAGS = {
    "tokenizer": COMMON + (
        "--image-size 32 --base-channels 8 --norm-groups 4 --z-channels 8 --attention-rows 8 "
        "--token-channels 8 --stats-images 16 --discriminator patchgan --disc-channels 8 "
        "--disc-layers 2 --adv-start 5 --dropout 0.1").split(),
    "generator": COMMON + (
        "--layers 2 --embed-dim 32 --heads 2 --head-width 32 --head-depth 1 --dropout 0.1 "
        "--preview-steps 2").split()}


def start(kind: str, out: Path, folder: Path, steps: int) -> subprocess.Popen:
    """Start the training script, resuming if there is something to resume."""
    flags = ["--resume"] if (out / "last.pt").exists() else FLAGS[kind]
    return subprocess.Popen(
        [sys.executable, ROOT / f"train_{kind}.py", *flags, "--steps", str(steps), "--out", out],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
    """Wait for a process that must succeed."""
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"a run failed:\n{errors}")


def kill_at_random(process: subprocess.Popen, log: Path, draw: random.Random) -> bool:
    """Kill it: mostly while it trains, sometimes while it starts. False if it was done before."""
    before, begun = log.stat().st_mtime_ns if log.exists() else 0, time.time()
    while draw.random() < 0.998 and process.poll() is None:  # a chance to die at start-up
        if log.exists() and log.stat().st_mtime_ns != before or time.time() - begun > 120:
            break
        time.sleep(0.02)
    time.sleep(draw.uniform(0, 0.6))
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return alive


def differences(a: object, b: object, name: str = "") -> list[str]:
    """Names of all entries in which two nested checkpoints differ."""
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
        return [] if same else [name]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for k in a for d in differences(a[k], b[k], f"{name}.{k}")]
    if isinstance(a, (list, tuple)) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{name}.{i}")]
    return [] if a == b else [name]


def records(path: Path) -> list[dict]:
    """The log without its wall-clock entries."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_s"} for line in lines]


def compare(whole: Path, killed: Path) -> list[str]:
    """Everything in which two output folders differ; leftovers of dead processes, too."""
    found = []
    for name in ("last.pt", "last-1.pt", "best.pt"):
        a, b = (torch.load(out / name, weights_only=True) for out in (whole, killed))
        a.pop("config"), b.pop("config")  # holds the name of the folder
        found += differences(a, b, name)
    if records(whole / "log.jsonl") != records(killed / "log.jsonl"):
        found.append("log.jsonl")
    names = [sorted(p.name for p in out.rglob("*")) for out in (whole, killed)]
    if names[0] != names[1]:
        found.append(f"files {set(names[0]) ^ set(names[1])}")
    for path in (whole / "previews").iterdir():
        pair = [np.asarray(Image.open(out / "previews" / path.name)) for out in (whole, killed)]
        if not np.array_equal(*pair):
            found.append(path.name)
    return found


def trial(kind: str, kills: int, steps: int, folder: Path, draw: random.Random) -> int:
    """Run the comparison for one script; returns how often it was killed."""
    whole, killed, done = folder / f"{kind}-whole", folder / f"{kind}-killed", 0
    finish(start(kind, whole, folder, steps))
    while done < kills:
        if not kill_at_random(start(kind, killed, folder, steps), killed / "log.jsonl", draw):
            break  # it reached the end
        done += 1
    finish(start(kind, killed, folder, steps))
    found = compare(whole, killed)
    if found:
        raise SystemExit(f"{kind}: after {done} kills these differ: {', '.join(found[:10])}")
    print(f"{kind}: killed {done} times in {steps} steps; weights, EMA, optimizer, log and "
          "previews are bit for bit those of the uninterrupted run", flush=True)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="kills per script [20]")
    parser.add_argument("--steps", type=int, default=0, help="steps per run [30 per kill]")
    parser.add_argument("--seed", type=int, default=0, help="of the moments [0]")
    args = parser.parse_args()
    steps, draw = args.steps or 30 * args.kills, random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in FLAGS:
            if trial(kind, args.kills, steps, folder, draw) < args.kills:
                raise SystemExit(f"{kind}: ended too early to be killed {args.kills} times; "
                                 "give more --steps")
            (folder / "runs").mkdir(exist_ok=True)  # the generator's default --tokenizer
            target = folder / "runs" / "tokenizer"
            if kind == "tokenizer":
                (folder / "tokenizer-whole").rename(target)


if __name__ == "__main__":
    main()
