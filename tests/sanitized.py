"""What compute-sanitizer watches (test_long.py): every kernel, on small shapes, with sums that are computed again."""

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
    """(kernel or None, tile or None, x, weight, bias, scale): the operator in each dtype, and at a size whose gradients
    are the kernel's, too; then tiles of each kernel.
    """
    for dtype in DTYPES:
        yield None, None, *random_arguments((M, K), N, dtype, "cuda")
    yield None, None, *random_arguments((64, 1024), 1024, torch.float32, "cuda")
    some = {kind: tiles(kind[0], K, splits=(1, 3)) for kind in KINDS} if is_hopper else {}
    for number in range(max(map(len, some.values()), default=0)):  # one tile of each kernel, then the next of each
        for (kernel, dtype), of_kernel in some.items():
            if number < len(of_kernel):
                yield kernel, of_kernel[number], *random_arguments((M, K), N, dtype, "cuda")


def main():
    start, calls = time.perf_counter(), 0
    for kernel, tile, x, weight, bias, scale in cases():
        if time.perf_counter() - start > SECONDS:
            break
        with settings(PRECISIONS[kernel][1] if kernel else "highest"):
            if x.dtype == torch.float32:
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
