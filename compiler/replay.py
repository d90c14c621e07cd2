"""Loops of many small steps: recorded once as a CUDA graph and replayed, as Python asks for a step slower than a GPU does it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache, wraps

import torch
from torch import Tensor

_GRAPHS = 64
"""Graphs that a function keeps: those of the arguments that came last."""

Kind = tuple[torch.Size, torch.dtype, torch.device]
Loop = Callable[..., Tensor]
"""From tensors, which it leaves as they are, and options to a new tensor. It must not read a value of a tensor to decide anything."""


def replayed(loop: Loop) -> Loop:
    """The same function of a tuple of tensors and options; a GPU records it for each shape of the tensors and each of the options."""

    @lru_cache(_GRAPHS)
    def record(kinds: tuple[Kind, ...], options: tuple[Hashable, ...]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]:
        places = tuple(torch.ones(shape, dtype=dtype, device=device) for shape, dtype, device in kinds)
        with torch.cuda.device(places[0].device):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):  # what libraries do when they are first called cannot be recorded
                loop(places, *options)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = loop(places, *options)
        return graph, places, result

    @wraps(loop)
    def run(tensors: tuple[Tensor, ...], *options: Hashable) -> Tensor:
        if not tensors[0].is_cuda:
            return loop(tensors, *options)
        graph, places, result = record(tuple((x.shape, x.dtype, x.device) for x in tensors), options)
        for place, value in zip(places, tensors, strict=True):
            place.copy_(value)
        graph.replay()
        return result.clone()

    return run
