#!/usr/bin/env bash
# Two noise nodes in one ONNX graph (ONNX Runtime)
#
# Guess: a sampler exported to ONNX draws its noise with one RandomNormal node per step. The
# nodes are independent of each other, and set_seed(0) and set_seed(1) give independent noise,
# too.
#
# What happens: each node has its own stream, seeded with the global seed plus the node's index
# in the graph. So the noise of node i with seed s + 1 is, bit for bit, that of node i + 1 with
# seed s: runs with neighbouring seeds share all noises but one, moved by a step. And with seed
# 0, the first two nodes of a graph draw the same numbers (0 and 1 are one and the same seed to
# the generator below), as correlated as noise can be. What helps: seeds as far apart as the
# graph has nodes, or noise that is an input of the graph.
#
# 2026-11-28: onnxruntime 1.32.0 (Linux, CPU), onnx 1.23.2, Python 3.11. Source: found by running
# it.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export TMPDIR="$work"
cd "$work"
python3 -m venv env
env/bin/pip install -q numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0
cat > finding.py <<'PYTHON'
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

print("onnxruntime", onnxruntime.__version__, "onnx", onnx.__version__)
STEPS, SIZE = 4, 1000


def noise(seed: int) -> np.ndarray:
    """(STEPS, SIZE): what the graph's noise nodes draw in a session's first run."""
    names = [f"noise{i}" for i in range(STEPS)]
    graph = helper.make_graph(
        [helper.make_node("RandomNormal", [], [name], shape=[SIZE]) for name in names], "steps", [],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [SIZE]) for name in names])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnxruntime.set_seed(seed)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.array(session.run(None, {}))


draws = {seed: noise(seed) for seed in (0, 1, 2)}
for seed, values in draws.items():
    print(f"seed {seed}, first numbers of each node:")
    print(values[:, :6].round(3))
twins = np.array_equal(draws[0][0], draws[0][1])
shifted = np.array_equal(draws[2][:-1], draws[1][1:])
fresh = [round(float(np.corrcoef(draws[2])[0, i]), 2) for i in range(1, STEPS)]
print("seed 0: nodes 0 and 1 draw the same:", twins)
print("seed 2's nodes 0 to 2 draw what seed 1's nodes 1 to 3 drew:", shifted)
print("seed 2: correlation of node 0 with the others:", fresh)

as_described = twins and shifted and max(map(abs, fresh)) < 0.2
print("as described" if as_described else "THE BEHAVIOUR HAS CHANGED")
sys.exit(not as_described)
PYTHON
env/bin/python -W ignore finding.py
