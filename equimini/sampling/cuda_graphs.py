"""CUDA graphs for sampling: a column's many small kernels, launched as one.

A GPU runs the head's steps faster than Python can launch them.  A graph records a function's
kernels once, with the addresses they read and write, and replays them with one launch.  So all
inputs must lie in buffers that stay in place, and the function may not look at their values.
Two functions are recorded: drawing one column, and the transformer's step for one token.
"""

from __future__ import annotations

from typing import Callable, Sequence

import torch
from torch import Tensor

from equimini.generator import ClassContext, Generator, KeyValue

Function = Callable[..., list[Tensor]]
Recorder = Callable[[Function, list[Tensor]], tuple[Callable[[], None], list[Tensor]]]


def cuda_graph(function: Function, buffers: list[Tensor]) -> tuple[Callable[[], None],
                                                                   list[Tensor]]:
    """Record `function(*buffers)`; returns what replays it, and the outputs that that fills."""
    with torch.cuda.device(buffers[0].device):
        side = torch.cuda.Stream()  # libraries allocate at their first calls: not in a graph
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                function(*buffers)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):  # torch's own is that of the first GPU
            outputs = function(*buffers)
    return graph.replay, outputs


class StaticCall:
    """Calls `function`, from tensors to a list of tensors, over buffers that stay in place.

    record: makes something to replay of the function and its buffers, at the first call and
    whenever the inputs' shapes or dtypes change.  Results are copies.
    """

    def __init__(self, function: Function, record: Recorder = cuda_graph) -> None:
        self.function, self.record = function, record
        self.buffers: list[Tensor] = []

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        if [(x.shape, x.dtype) for x in inputs] != [(b.shape, b.dtype) for b in self.buffers]:
            self.buffers = self.outputs = []  # frees what was recorded before
            self.replay = None
            buffers = [x.clone() for x in inputs]
            self.replay, self.outputs = self.record(self.function, buffers)
            self.buffers = buffers
        torch._foreach_copy_(self.buffers, list(inputs))
        self.replay()
        return [out.clone() for out in self.outputs]


def graphed(sampler: Callable[..., Tensor], max_position: int | None, *generators: Generator
            ) -> tuple[GraphedColumn | GraphedStep, ...]:
    """The graphs of a `Stream`: its `sampler`, its `step`, and that of its guide."""
    device = generators[0].no_class.device
    if device.type != "cuda":
        raise ValueError(f"cuda_graphs needs a generator on a CUDA device, got one on {device}")
    return GraphedColumn(sampler), *(GraphedStep(g, max_position) for g in generators)


class GraphedColumn:
    """A `ColumnSampler` or `GuidedSampler`, as one graph over all of its steps."""

    def __init__(self, draw: Callable[..., Tensor], record: Recorder = cuda_graph) -> None:
        self.call = StaticCall(lambda noise, s, *z: [draw(z if z[1:] else z[0], noise, s)], record)

    def __call__(self, z: Tensor | tuple[Tensor, ...], noise: Tensor, s: float) -> Tensor:
        z = z if isinstance(z, tuple) else (z,)
        return self.call(noise, noise.new_tensor(s), *z)[0]


class GraphedStep:
    """`Generator.forward` for one token, as a graph, once the cache holds its W − 1 columns."""

    def __init__(self, generator: Generator, max_position: int | None = None,
                 record: Recorder = cuda_graph) -> None:
        self.generator, self.max_position = generator, max_position
        self.call = StaticCall(self._flat, record)

    def __call__(self, tokens: Tensor, context: ClassContext, position: int,
                 cache: list[KeyValue]) -> Tensor:
        full = cache and cache[0][0].shape[1] == self.generator.config.window - 1
        if not full or tokens.shape[1] > 1:
            return self.generator(tokens, context, position, cache, self.max_position)
        where = torch.tensor(position, device=tokens.device)
        z, *flat = self.call(tokens, where, *_flatten(context.keys_values), *_flatten(cache))
        cache[:] = _pairs(flat)
        return z

    def _flat(self, tokens: Tensor, position: Tensor, *flat: Tensor) -> list[Tensor]:
        pairs = _pairs(flat)
        cache = pairs[len(pairs) // 2:]
        context = ClassContext(pairs[:len(pairs) // 2], z0=tokens[:, :0])  # z_0 is not read
        return [self.generator(tokens, context, position, cache, self.max_position), *_flatten(cache)]


def _flatten(pairs: list[KeyValue]) -> list[Tensor]:
    return [x for pair in pairs for x in pair]


def _pairs(flat: Sequence[Tensor]) -> list[KeyValue]:
    return list(zip(flat[::2], flat[1::2]))
