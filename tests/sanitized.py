"""What compute-sanitizer watches (test_long.py): every kernel, on small shapes, with sums that are computed again."""

import itertools
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from fuzz import settings
from reference import DTYPES, Expected, random_arguments, ways_of
from tiles import KINDS, PRECISIONS, by_tile, is_hopper, tiles

from model_new import linear_sigmoid_residual

SECONDS = 120  # racecheck takes 3 a call
M, K, N = 130, 520, 140


def cases():
    """(kernel or None, tile or None, dtype, (M, K), N): the operator in each dtype, and at a size whose gradients are
    the kernel's, too; then tiles of each kernel, one of each before the next of each.
    """
    yield from ((None, None, dtype, (M, K), N) for dtype in DTYPES)
    yield None, None, torch.float32, (64, 1024), 1024
    some = [[(kernel, tile, dtype, (M, K), N) for tile in tiles(kernel, K, splits=(1, 3))] for kernel, dtype in KINDS]
    if is_hopper:
        yield from filter(None, itertools.chain(*itertools.zip_longest(*some)))


def main():
    start, calls = time.perf_counter(), 0
    for kernel, tile, dtype, shape, n in cases():
        if time.perf_counter() - start > SECONDS:
            break
        x, weight, bias, scale = random_arguments(shape, n, dtype, "cuda")
        with settings(PRECISIONS[kernel][1] if kernel else "highest"):
            if dtype == torch.float32:
                x[..., ::8], weight[:, ::8] = 1e20, 0
            expected = Expected(x, weight, bias, scale, ways_of(x, kernel))
            if tile:
                expected.check(*by_tile(tile, x, weight, bias, scale, with_z=True))
            else:
                out = linear_sigmoid_residual(x.requires_grad_(), weight.requires_grad_(), bias, scale)
                expected.check(out)
                out.sum().backward()
        calls += 1
    torch.cuda.synchronize()
    print(f"calls: {calls}")


if __name__ == "__main__":
    main()
