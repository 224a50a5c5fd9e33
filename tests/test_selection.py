"""Which kernel serves which case.

That is decided in kernels.cu by dtypes, shapes, strides and settings alone: fake tensors stand for those on a GPU, and
no GPU is needed. test_hopper.py looks whether what is selected is called.
"""

import itertools
import json
import pathlib
import random

import pytest
import torch
from conftest import needs_cuda
from fuzz import LAYOUTS, place
from reference import DTYPES
from test_cuda import SHAPES
from tiles import PRECISIONS, a_shape_of, each_kind, tiles
from torch._subclasses import FakeTensorMode

import model_new
from model_new import batch_size, hidden_size, input_size, select_kernel, select_tile

LARGEST = 2**31 - 2048
SIZES = (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 199, 200, 255, 256, 257, 511, 512, 516, 1023, 1024)
SIZES += (1025, 2047, 2048, 3000, 4096, 8191, 8192, 11008, 65536, 2**20 + 1, 2**26, LARGEST - 1, LARGEST)


def shapes(count=20_000):
    """Many (m, n, k): of SIZES, and of any size, small ones as often as large ones."""
    source = random.Random(0)

    def size():
        return source.choice(SIZES) if source.random() < 0.5 else int(2 ** source.uniform(0, 15))

    for _ in range(count):
        yield size(), size(), size()


KERNELS = {"float32": {"fp16x3"}, "tf32": {"fp16x1", "fp16x1_staged"}, "16 bit": {"wgmma16"}}


@pytest.mark.parametrize("precision", KERNELS)
def test_only_tiles_that_there_are(precision):
    """Of the kernels for that precision, and each of them somewhere."""
    seen = set()
    for m, n, k in shapes():
        tile = select_tile(precision, m, n, k)
        if tile is not None:
            assert tile[0] in KERNELS[precision] and tile in tiles(tile[0], k), (m, n, k, tile)
            seen.add(tile)
    assert {kernel for kernel, *_ in seen} == KERNELS[precision]
    assert any(splits == 0 for *_, splits in seen) and any(rows == 256 for _, rows, _ in seen)
    assert precision == "tf32" or any(splits > 1 for *_, splits in seen)


def test_fp16x3_only_for_sums_of_512_products_and_more():
    """SGEMM is the more accurate one of shorter sums."""
    assert all(select_tile("float32", m, n, min(k, 511)) is None for m, n, k in shapes())
    assert select_tile("float32", 1024, 8192, 512) is not None


@pytest.mark.parametrize("precision", KERNELS)
def test_unaligned_rows_of_w(precision):
    """W is then copied for the call, which many rows of x repay: cuBLAS has a quarter of its rate there."""
    for m, (k, n) in itertools.product((512, 1024), ((8191, 8193), (11007, 4095))):
        assert select_tile(precision, m, n, k) is not None, (m, n, k)
        assert precision == "float32" or all(select_tile(precision, m, n, k) is None for m in (1, 3, 16)), (n, k)
    # A transposed W's rows lie along n.
    assert select_tile("float32", 256, 1024, 1023, transposed=True) == select_tile("float32", 256, 1024, 1024)


@pytest.mark.parametrize("precision", KERNELS)
def test_the_shapes_of_test_cuda_enter_the_kernels_they_are_for(precision):
    library, few, _, many, unaligned = (select_tile(precision, m, n, k) for m, k, n in SHAPES)
    assert library is None and few[2] > 0 and many[2] == unaligned[2] == 0


# M, N, K for which the kernels were faster than the library, and slower; measured on an H200 and an H100.
MEASURED = {
    "tf32": (
        ((257, 8192, 8192), (513, 4096, 11008), (448, 5120, 5120)),
        ((256, 8192, 8192), (256, 8448, 8192), (384, 5632, 8192), (384, 11008, 4096)),
    ),
    "16 bit": (
        ((512, 8192, 8192), (1000, 8192, 8192), (256, 16384, 1024), (1536, 11008, 4096), (4096, 3072, 768)),
        ((768, 8192, 8192), (1025, 8192, 8192), (1025, 4096, 4096), (1024, 5120, 5120), (930, 8192, 8192)),
    ),
}


@pytest.mark.parametrize("precision", MEASURED)
def test_the_faster_one_serves(precision):
    """Half a wave of tiles of 256 rows is enough for TF32, whose cuBLAS has tiles of 128 x 128 in whole waves; in 16
    bits only tiles that are full and fill the SMs, elsewhere cuBLAS is up to 1.7 times as fast.
    """
    faster, slower = MEASURED[precision]
    assert all(select_tile(precision, *shape) for shape in faster)
    assert not any(select_tile(precision, *shape) for shape in slower)


def test_no_cell_of_the_recorded_grid_becomes_slower_than_eager():
    """Of the cells that the recorded kernel still serves, none was slower than eager by 2 %. Elsewhere the time is
    not in the record: the library's GEMM is eager's, with fewer passes behind it.
    """
    rows = json.loads((pathlib.Path(model_new.__file__).parent / "bench/results/nvidia-h200-grid.json").read_text())
    cells = {}
    for row in rows:
        if row["section"] == "grid":
            cells.setdefault((row["precision"], row["dtype"], *row["shape"]), {})[row["name"]] = row
    seen = 0
    for (setting, dtype, m, k, n), cell in cells.items():
        precision = "16 bit" if dtype != "float32" else "tf32" if setting == "high" else "float32"
        tile = select_tile(precision, m, n, k)
        if tile and tile[0] == cell["ModelNew"]["kernel"]:
            assert cell["ModelNew"]["ms"] <= 1.02 * cell["eager"]["ms"], (precision, m, n, k)
            seen += 1
    assert seen >= 100


@pytest.mark.parametrize("precision", KERNELS)
@pytest.mark.parametrize("size", [0, LARGEST + 1, 2**31, 2**40])
def test_the_library_serves_what_is_empty_or_too_large(size, precision):
    served = 1024, 8192, 8192
    assert select_tile(precision, *served) is not None
    for which in range(3):
        assert select_tile(precision, *(size if i == which else other for i, other in enumerate(served))) is None


@pytest.mark.parametrize("precision", KERNELS)
def test_the_library_serves_few_columns(precision):
    """A long K would leave most SMs without work."""
    assert select_tile(precision, 16, 512, 1024) is not None
    few = (511, 2048), (256, 2048), (1, 2**20)
    assert all(select_tile(precision, m, n, k) is None for m in SIZES for n, k in few)


# what select_kernel makes of tensors


@pytest.fixture
def hopper(monkeypatch):
    """Device 0 is a Hopper GPU; new tensors are fake."""
    monkeypatch.setattr(model_new._library, "is_hopper", lambda index: index == 0)
    with FakeTensorMode():
        yield


def arguments(m=batch_size, n=hidden_size, k=input_size, dtype=torch.float32, device="cuda:0"):
    return [torch.empty(shape, dtype=dtype, device=device) for shape in ((m, k), (n, k), (n,))]


@pytest.mark.parametrize("precision, of_float32", [("highest", "fp16x3"), ("high", "fp16x1"), ("medium", "fp16x1")])
def test_the_reference_shape(precision, of_float32, hopper):
    torch.set_float32_matmul_precision(precision)
    for dtype in DTYPES:
        x, weight, bias = arguments(dtype=dtype)
        expected = {torch.float32: of_float32, torch.float64: "library"}.get(dtype, "wgmma16")
        assert select_kernel(x, weight, bias) == select_kernel(x.view(4, 256, -1), weight, bias) == expected
        assert select_kernel(x.new_empty(4, 0, input_size), weight, bias) == "library"


@pytest.mark.parametrize("setting, values", [("allow_tf32", (True, False)), ("fp32_precision", ("tf32", "ieee"))])
def test_pytorchs_other_names_for_the_precision(setting, values, hopper):
    case, matmul = arguments(), torch.backends.cuda.matmul
    try:
        for value, expected in zip(values, ("fp16x1", "fp16x3")):
            setattr(matmul, setting, value)
            assert select_kernel(*case) == expected
    finally:
        matmul.fp32_precision = "ieee"
        torch.set_float32_matmul_precision("highest")
    assert select_kernel(*case) == "fp16x3"


@pytest.mark.parametrize("layout", LAYOUTS)
@each_kind
def test_layouts(kernel, dtype, layout, hopper):
    """Only W's entries must be contiguous along k; all else is copied into shape."""
    torch.set_float32_matmul_precision(PRECISIONS[kernel][1])
    x, weight, bias = arguments(*a_shape_of(kernel)[0], dtype)
    assert select_kernel(place(x, layout)[0], weight, bias) == kernel
    apart = layout in ("every other column", "transposed", "dimensions reversed")
    assert select_kernel(x, place(weight, layout)[0], bias) == ("library" if apart else kernel)


def test_the_library_serves_other_devices(hopper, monkeypatch):
    monkeypatch.setattr(model_new._library, "is_hopper", lambda index: False)
    assert select_kernel(*arguments()) == "library"
    assert select_kernel(*arguments(device="cpu")) == "cpu"


@needs_cuda
def test_hopper_gpus_are_those_of_compute_capability_9_0():
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        assert bool(model_new._library.is_hopper(index)) == (capability == (9, 0))
