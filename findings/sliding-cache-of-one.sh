#!/usr/bin/env bash
# A sliding window of one token, decoded with a cache (transformers)
#
# Guess: with sliding_window=W each token sees the last W, itself counted. Fed one token at a
# time with the model's own cache, a model computes what it computes without one, for every W.
#
# What happens: so it is for W = 2, 4 and for W longer than the text. For W = 1 the cache, which
# should hold W - 1 = 0 tokens, keeps every token it ever saw, and each new token attends to all
# of them: the results are wrong by more than the size of the logits, and nothing is raised (the
# mask, one column wide, is broadcast over all keys). Fed five tokens at a time, the sizes no
# longer broadcast, and an error is raised. A slice that begins at -W + 1 is the whole tensor
# when W is 1.
#
# 2026-11-28: transformers 5.24.0, torch 2.13.0, Python 3.11, CPU. Source: found by running it.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export TMPDIR="$work"
cd "$work"
python3 -m venv env
env/bin/pip install -q torch==2.13.0 numpy==2.4.6 transformers==5.24.0
cat > finding.py <<'PYTHON'
import sys

import torch
import transformers
from transformers import MistralConfig, MistralForCausalLM

transformers.logging.set_verbosity_error()
print("transformers", transformers.__version__, "torch", torch.__version__)
tokens = torch.randint(0, 50, (1, 20), generator=torch.Generator().manual_seed(1))


def decode(window: int, piece: int):
    """The same text without cache, and in pieces with it: largest difference, tokens kept."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, sliding_window=window)
    model = MistralForCausalLM(config).eval()
    with torch.no_grad():
        whole, cache, pieces = model(tokens, use_cache=False).logits, None, []
        for part in tokens.split(piece, dim=1):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
    difference = (whole - torch.cat(pieces, 1)).abs().max().item()
    return difference, cache.layers[0].keys.shape[-2], whole.std().item()


results = {}
for window in (1, 2, 4, 40):
    difference, kept, size = results[window] = decode(window, piece=1)
    print(f"W = {window:2}: {kept:2} of 20 tokens kept, largest difference {difference:.1e} "
          f"(logits have a standard deviation of {size:.2f})")
try:
    decode(1, piece=5)
    by_five = "no error"
except RuntimeError as error:
    by_five = str(error)
print("W =  1, five at a time:", by_five)

as_described = (results[1][:2] > (0.01, 19) and all(results[w][0] < 1e-5 for w in (2, 4, 40))
                and "must match" in by_five)
print("as described" if as_described else "THE BEHAVIOUR HAS CHANGED")
sys.exit(not as_described)
PYTHON
env/bin/python -W ignore finding.py
