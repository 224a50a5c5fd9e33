"""Data that the benchmark measures accuracy and time on: x [M, K] and W [N, K], float32."""

import math
from functools import partial

import torch
from torch.nn import functional as F


def draws(device, seed):
    """(normal, uniform): functions of sizes that draw from one generator; uniform also of `low` and `high`."""
    on = {"generator": torch.Generator(device).manual_seed(seed), "device": device}

    def uniform(*shape, low=0.0, high=1.0):
        return torch.rand(shape, **on) * (high - low) + low

    return lambda *shape: torch.randn(shape, **on), uniform


def kinds(m, k, n, device):
    """Yields (name, x, W, grad [m, n]) of ordinary data: what layers and activations are like."""
    normal, uniform = draws(device, 0)
    made = {
        "normal": (normal, normal),
        "uniform": (uniform, lambda *shape: uniform(*shape, low=-1.0) / math.sqrt(k)),  # W as nn.Linear draws it
        "positive": (uniform, uniform),
        "|normal|": (lambda *shape: normal(*shape).abs(),) * 2,
        "ReLU": (lambda *shape: normal(*shape).relu(), normal),
        "10 % nonzero": (lambda *shape: normal(*shape) * (uniform(*shape) < 0.1), normal),
        "0 or 1": (lambda *shape: (uniform(*shape) < 0.5).float(), normal),
        "log-normal": (lambda *shape: normal(*shape).exp(),) * 2,
    }
    for name, (of_x, of_w) in made.items():
        yield name, of_x(m, k), of_w(n, k), of_x(m, n)


def data_sets(rows, k, n, device):
    """Yields (name, x [rows, k], w [n, k]): ordinary data, then data made to break a scaled 16-bit splitting.

    Every product and sum is finite in float32, and |x|·|w|ᵀ > 0 except where a row has few nonzeros.
    """
    normal, uniform = draws(device, 0)
    permutation = partial(torch.randperm, generator=torch.Generator(device).manual_seed(1), device=device)

    def columns(count):
        return permutation(k)[:count]

    def factors(columns, value):
        """[k]: the value for these columns, 1 for the others."""
        return torch.ones(k, device=device).index_fill_(0, columns, value)

    def one_of(choices, height):
        """[height, 1]: one of the given columns for each row."""
        return choices[(uniform(height, 1) * len(choices)).long()]

    def linear_init():
        return uniform(n, k, low=-(k**-0.5), high=k**-0.5)

    def outlier_in_x(value, weight_there):
        x, w, special = uniform(rows, k), linear_init(), columns(8)
        return x.scatter_(1, one_of(special, rows), value), w.index_fill_(1, special, weight_there)

    def cancelling(difference):
        a, b = normal(rows, k // 2), normal(n, k // 2)
        x = torch.cat([a, a + difference * normal(*a.shape)], 1)
        w = torch.cat([b, -b - difference * normal(*b.shape)], 1)
        return F.pad(x, (0, k % 2)), F.pad(w, (0, k % 2))

    yield "uniform x, Linear's init", uniform(rows, k), linear_init()
    yield "normal, normal", normal(rows, k), normal(n, k)
    yield "normal, 8 columns of x ×1000", normal(rows, k) * factors(columns(8), 1000.0), normal(n, k)
    both = (rows, k), (n, k)
    yield "normal·10^U(-6,6), both", *(normal(*shape) * 10 ** uniform(*shape, low=-6, high=6) for shape in both)
    yield "cancelling halves (1e-4)", *cancelling(1e-4)
    yield "cancelling halves (1e-6)", *cancelling(1e-6)
    yield "normal·1e-18, both", normal(rows, k) * 1e-18, normal(n, k) * 1e-18
    yield "normal·1e15, both", normal(rows, k) * 1e15, normal(n, k) * 1e15
    yield "normal·1e-18, normal·1e15", normal(rows, k) * 1e-18, normal(n, k) * 1e15
    yield "one 3e4 per x row, w 1e-7 there", *outlier_in_x(3e4, 1e-7)

    for large, there in (("1e8", "0"), ("1e8", "1e-10"), ("1e20", "0")):
        yield f"one {large} per x row, w {there} there", *outlier_in_x(float(large), float(there))
    for factor in ("1e6", "1e20"):
        special, name = columns(9), f"9 columns of x ×{factor}, w 0 there"
        yield name, normal(rows, k) * factors(special, float(factor)), normal(n, k).index_fill_(1, special, 0)
    x, w, special = normal(rows, k), normal(n, k), columns(8)
    yield "one 1e6 per w row, x 0 there", x.index_fill_(1, special, 0), w.scatter_(1, one_of(special, n), 1e6)
    x, w, special = normal(rows, k), normal(n, k), torch.arange(0, k, 64, device=device)
    yield "every 64th w ×1e9, x 0 there", x.index_fill_(1, special, 0), w * factors(special, 1e9)
    yield "log-normal, σ = 3, both", *(normal(*shape) * (3 * normal(*shape)).exp() for shape in both)
    scales = 10 ** uniform(rows, 1, low=-15, high=15), 10 ** uniform(n, 1, low=-15, high=15)
    yield "rows ·10^U(-15,15), both", normal(rows, k) * scales[0], normal(n, k) * scales[1]
    grade = torch.exp2(-40 * torch.arange(k, device=device) / k)
    yield "columns 2^0..2^-40, w inverse", normal(rows, k) * grade, normal(n, k) / grade
    grade = torch.exp2(-(torch.arange(k, device=device) % 32).float())
    yield "columns 2^-(k mod 32), w inverse", normal(rows, k) * grade, normal(n, k) / grade
    one = torch.zeros(rows, k, device=device).scatter_(1, one_of(columns(k), rows), 1.0)
    yield "one nonzero per x row", one * normal(rows, 1), normal(n, k)
    for count in (8, 100):
        x, special = torch.zeros(rows, k, device=device), columns(count)
        x[:, special] = normal(rows, len(special))
        yield f"{count} nonzero columns of x", x, normal(n, k)
    yield "all positive", uniform(rows, k), uniform(n, k)
    # fp16 rounds 1 + 2^-11 - ε down to 1: every low part is as large as can be, and positive.
    yield "largest low parts", *(1 + 2**-11 * (1 - 0.01 * uniform(*shape)) for shape in both)
    yield "denormal x (1e-40), w ·1e3", normal(rows, k) * 1e-40, normal(n, k) * 1e3


def everyday_sets(rows, k, n, device):
    """Yields (name, x, w) of data that people have, and in which much of a sum cancels or is 0."""
    normal, uniform = draws(device, 5)
    init = uniform(n, k, low=-(k**-0.5), high=k**-0.5)
    at = torch.arange(n, device=device) % k

    yield "layer-normed x, constant W", F.layer_norm(normal(rows, k), (k,)), torch.full((n, k), 0.01, device=device)
    x, w = normal(rows, k), init.clone()
    x[:, :64] = 1.7e9 + normal(rows, 64)
    w[:, :64] = 0
    yield "64 timestamp columns, w 0 there", x, w
    frequencies = 1 + torch.arange(rows, device=device) % 7
    waves = torch.sin(torch.linspace(0, 2 * math.pi, k, device=device) * frequencies[:, None])
    w = torch.zeros(n, k, device=device)
    for shift, coefficient in ((0, -2.0), (1, 1.0), (-1, 1.0)):
        w.scatter_(1, ((at + shift) % k)[:, None], coefficient)
    yield "smooth x, W second differences", waves, w
    yield "x around 1e4, centring W", 1e4 + normal(rows, k), torch.eye(n, k, device=device) - 1 / k
    yield "one-hot x", F.one_hot((uniform(rows) * k).long(), k).float(), init
    for sharpness in (8, 30):
        yield f"softmax({sharpness}·normal)", (sharpness * normal(rows, k)).softmax(1), init
    for share in (0.1, 0.01):
        yield f"x with {100 * share:g} % nonzeros", normal(rows, k) * (uniform(rows, k) < share), init
