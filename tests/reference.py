"""The layer in extended precision, and how far a right implementation may be from it.

u is the unit roundoff of the arithmetic (float32 for 16-bit storage: products and sums of a GEMM, and the epilogue,
are float32 there), v that of the storage; both 2^-p. Everything here is a NumPy longdouble (80 bits on x86-64), so that
float64 is tested like the others.
"""

import numpy as np
import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

_UNIT_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
_SMALLEST = {torch.float64: 2.0**-1074, torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}


def compute_roundoff(dtype):
    return _UNIT_ROUNDOFF[dtype if dtype == torch.float64 else torch.float32]


def storage_roundoff(dtype):
    """Relative error of the one rounding to 16-bit storage; 0 where storage and arithmetic have one type."""
    return _UNIT_ROUNDOFF[dtype] if dtype in (torch.float16, torch.bfloat16) else 0.0


def wide(t):
    return t.detach().cpu().double().numpy().astype(np.longdouble)


def sum_error(terms, dtype):
    """Relative to the sum of magnitudes, the error of a sum of `terms` products, in whatever order.

    terms·u is the classical bound; λ√terms·u, λ = 4, the probabilistic one (Higham and Mary, 2019), which is smaller
    beyond 16 terms. 16-bit GEMMs on tensor cores truncate instead of rounding: 2u a step, always in one direction.
    """
    u = compute_roundoff(dtype)
    if dtype in (torch.float16, torch.bfloat16):
        return 2 * terms * u
    return min(terms, 4 * terms**0.5) * u


class Layer:
    """z and out of the layer on the given tensors, exact for our purposes, with bounds on the error of each.

    z_bound    GEMM and bias: sum_error(K + 1)·(|x|·|W|ᵀ + |b|), and one rounding to 16 bits; where cuBLAS adds the bias
               in a step of its own (sizes or strides not in multiples of 16 bytes) also one of the product.
    out_bound  what z's error becomes, (1 + |s|/4)·z_bound, as σ' ≤ 1/4; σ to 8u relative (exp 2 ulp, add, reciprocal
               1 ulp), times s, added: 10u·|s|·σ + u·|out|; one rounding to 16 bits.
    """

    def __init__(self, x, weight, bias, scale):
        self.dtype, self.scale = x.dtype, np.longdouble(scale)
        self.x, self.weight, self.bias = wide(x), wide(weight), wide(bias)
        self.u, self.v = compute_roundoff(x.dtype), storage_roundoff(x.dtype)
        self.tiny = np.longdouble(_SMALLEST[x.dtype])
        product = self.x @ self.weight.T
        self.z = product + self.bias
        magnitude = np.abs(self.x) @ np.abs(self.weight).T + np.abs(self.bias)
        self.z_bound = sum_error(self.x.shape[-1] + 1, x.dtype) * magnitude
        self.z_bound += self.v * (np.abs(product) + np.abs(self.z) + self.z_bound) + self.tiny
        self.sigmoid = 1 / (1 + np.exp(-self.z))
        self.out = self.z + self.scale * self.sigmoid
        epilogue = 10 * self.u * abs(self.scale) * self.sigmoid + self.u * np.abs(self.out)
        self.out_bound = (1 + abs(self.scale) / 4) * self.z_bound + epilogue
        self.out_bound += self.v * (np.abs(self.out) + self.out_bound) + self.tiny

    def gradients(self, grad):
        """((dx, its bound), (dW, its bound), (db, its bound)) for a gradient `grad` of out.

        dz = grad·(1 + sσ(1 − σ)): |d²out/dz²| ≤ |s|/10 turns z_bound into an error of dz, the rest is a few roundings.
        dx = dz·W and dW = dzᵀ·x are GEMMs over N and over the M rows; db a sum over the rows.
        """
        grad, x = wide(grad).reshape(-1, self.z.shape[-1]), self.x.reshape(-1, self.x.shape[-1])
        z_bound, sigmoid = self.z_bound.reshape(grad.shape), self.sigmoid.reshape(grad.shape)
        derivative = 1 + self.scale * sigmoid * (1 - sigmoid)
        dz = grad * derivative
        dz_bound = np.abs(grad) * (abs(self.scale) / 10 * z_bound + 20 * self.u * (1 + abs(self.scale) / 4))
        dz_bound += self.v * (np.abs(dz) + dz_bound) + self.tiny

        def product(a, a_bound, b):  # a·b, with b exact
            exact, moved = a @ b, a_bound @ np.abs(b)
            bound = moved + sum_error(a.shape[-1], self.dtype) * (np.abs(a) @ np.abs(b) + moved)
            return exact, bound + self.v * (np.abs(exact) + bound) + self.tiny

        dx, dx_bound = product(dz, dz_bound, self.weight)
        dweight, dweight_bound = product(dz.T, dz_bound.T, x)
        dbias, dbias_bound = product(dz.T, dz_bound.T, np.ones(len(x), np.longdouble))
        return (
            (dx.reshape(self.x.shape), dx_bound.reshape(self.x.shape)),
            (dweight, dweight_bound),
            (dbias, dbias_bound),
        )

    def check(self, out):
        """Asserts that a tensor is this layer's output."""
        assert out.dtype == self.dtype and out.shape == self.out.shape
        assert_within(out, self.out, self.out_bound, "out")


def assert_within(actual, expected, bound, what):
    """Asserts |actual − expected| ≤ bound, element by element; a NaN fails."""
    error = np.abs(wide(actual) - expected)
    assert error.shape == bound.shape, f"{what}: shape {error.shape}, expected {bound.shape}"
    good = error <= bound
    if not good.all():
        at = np.unravel_index(np.argmax(np.where(good, -1, np.nan_to_num(error / bound, nan=np.inf))), error.shape)
        raise AssertionError(
            f"{what}: {np.count_nonzero(~good)} of {error.size} elements are outside their bound; worst at "
            f"{tuple(map(int, at))}: {wide(actual)[at]!r}, expected {expected[at]!r} to {bound[at]:.3g}"
        )


def random_arguments(shape, n, dtype, device, scale=2.0):
    """x of `shape`, weight [n, K], bias [n], all normal (weight by 1/√K, as layers have it), and the scale."""
    k = shape[-1]
    x = torch.randn(shape, dtype=torch.float64)
    weight = torch.randn(n, k, dtype=torch.float64) / max(k, 1) ** 0.5
    bias = torch.randn(n, dtype=torch.float64)
    return *(t.to(device=device, dtype=dtype) for t in (x, weight, bias)), scale


def peak_bytes(function):
    """Bytes asked for at the worst moment of a call, beyond what was before it; the second call, without its set-up.

    Asked for, not allocated: the allocator gives a free block that is up to 1 MiB larger as it is.
    """
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    out = function()
    torch.cuda.synchronize()
    del out
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before


def poison(t_bytes, device):
    """Leaves NaN in the memory that the next allocation of this size on a GPU is likely to get."""
    if device != "cpu":
        block = torch.full((max(1, t_bytes // 4),), float("nan"), device=device)
        del block
