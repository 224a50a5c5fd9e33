"""Timing in turns and under a steady load, and what a row says of the times."""

import statistics
import time

import torch

from bench.records import sampled_conditions

STEADY_SECONDS = 3.0  # of a load whose power is measured: nvidia-smi's is a mean over the last second
STEADY_BLOCK = 50  # calls between two synchronizations


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


def steady(function):
    """{ms, sm_clock_mhz, power_w, millijoules} of a call, calls back to back; null what nvidia-smi does not say.

    The first half of the time warms up: clock and power are medians of the second.
    """

    def milliseconds():
        blocks, start = [], time.perf_counter()
        while time.perf_counter() - start < STEADY_SECONDS / 2:
            blocks.append(block_milliseconds(function, STEADY_BLOCK))
        return statistics.mean(blocks) / STEADY_BLOCK

    with sampled_conditions() as samples:
        milliseconds()
        warming = len(samples)
        ms = milliseconds()
        clock, power, _ = [statistics.median(column) for column in zip(*samples[warming:])] or [None] * 3
    return {"ms": ms, "sm_clock_mhz": clock, "power_w": power, "millijoules": power and ms * power}
