"""Timing in turns, and what a row says of the times."""

import statistics
import time

import torch


def spread(samples):
    """What a row says of times in ms: their median and deciles."""
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return {"ms": statistics.median(samples), "p10": deciles[0], "p90": deciles[8]}


def block_milliseconds(function, calls):
    """What `calls` calls back to back take by the wall clock, until the device is done."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def in_turns(samplers, repeats, warm_up=1):
    """{name: [what it returned]} of a dict of functions that each time something, called in turns, which all see the
    same clocks. The first `warm_up` turns do not count.
    """
    turns = [{name: sample() for name, sample in samplers.items()} for _ in range(warm_up + repeats)]
    return {name: [turn[name] for turn in turns[warm_up:]] for name in samplers}
