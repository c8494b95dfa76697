#!/usr/bin/env bash
# Windowed attention decoded with its own cache (local-attention)
#
# Guess: LocalMHA, fed one token at a time with the cache that it returns, computes what it
# computes for the whole sequence at once, up to rounding; its window_size, with
# exact_windowsize, is the number of keys that a query sees, itself counted, as in transformers
# or ONNX Runtime.
#
# What happens: both are different. The cache holds keys that have been rotated for their
# position already, and they are rotated again with each further token: from the third token on
# the results differ, also where the window is longer than the sequence, so that nothing ever
# leaves the cache. Without rotary embeddings, decoding is exact. And an exact window of W shows
# a query W + 1 keys.
#
# 2026-11-28: local-attention 1.11.2, torch 2.13.0, CPU, Python 3.11. Source: found by running
# it.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export TMPDIR="$work"
cd "$work"
python3 -m venv env
env/bin/pip install -q --no-compile torch==2.13.0 numpy==2.4.6 einops==0.8.2 local-attention==1.11.2
cat > finding.py <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from local_attention import LocalAttention
from local_attention.transformer import LocalMHA

print("local-attention", version("local-attention"), "torch", torch.__version__)
N = 12


def difference(window: int, rotary: bool) -> list[float]:
    """Per token: largest difference between decoding with the cache and the whole at once."""
    torch.manual_seed(0)
    layer = LocalMHA(dim=16, window_size=window, dim_head=8, heads=2, causal=True,
                     exact_windowsize=True, use_rotary_pos_emb=rotary).eval()
    x, cache, tokens = torch.randn(1, N, 16), None, []
    with torch.no_grad():
        whole = layer(x)
        for token in x.split(1, dim=1):
            out, cache = layer(token, cache=cache, return_cache=True)
            tokens.append(out)
    return (whole - torch.cat(tokens, 1)).abs().amax((0, 2)).tolist()


def keys_seen(window: int) -> int:
    """By the last query: with equal scores and one-hot values, weights are counts."""
    attend = LocalAttention(dim=N, window_size=window, causal=True, look_forward=0, autopad=True,
                            exact_windowsize=True, use_rotary_pos_emb=False)
    same = torch.zeros(1, N, N)
    return int((attend(same, same, torch.eye(N)[None])[0, -1] > 0).sum())


errors = {}
for window in (4, 12):
    for rotary in (True, False):
        errors[window, rotary] = worst = difference(window, rotary)
        print(f"W = {window}, rotary {rotary}: errors of the tokens",
              " ".join(f"{error:.0e}" for error in worst))
seen = {window: keys_seen(window) for window in (1, 2, 4)}
print("keys that the last query sees, by window_size:", seen)

as_described = (
    all(max(errors[w, True][:2]) < 1e-5 and min(errors[w, True][2:]) > 1e-4 for w in (4, 12))
    and all(max(errors[w, False]) < 1e-5 for w in (4, 12)) and seen == {1: 2, 2: 3, 4: 5})
print("as described" if as_described else "THE BEHAVIOUR HAS CHANGED")
sys.exit(not as_described)
PYTHON
env/bin/python -W ignore finding.py
