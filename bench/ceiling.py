"""Measures what the tensor cores sustain: wgmma on operands in shared memory, back to back for seconds, nothing else.

    python bench/ceiling.py            float16 and bfloat16, on random numbers and on zeros

Needs a GPU of compute capability 9.0 and nvcc. bench/grid.py and docs/OPTIMIZATIONS.md have the rates of an H200. The
energy is that of as many FLOP as one product of the reference shape has.
"""

import ctypes
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model_new
from bench.timing import steady

ROUNDS, PRODUCTS, BLOCK_FLOP = 4000, 24, 2 * 128 * 128 * 16  # of a launch, of a round, of a block's two wgmmas
KERNEL = r"""
// In shared memory: W, 64 rows for each of two warpgroups, then three panels of 128 rows of x, all of them 64 k long.
constexpr int kShared = 4 * 128 * 128;
template <typename Element>
__global__ void __launch_bounds__(256, 1) products(const uint4* from, float* to, int rounds) {
#ifdef HAS_SM90A
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  for (int i = threadIdx.x; i < kShared / 16; i += 256) reinterpret_cast<uint4*>(shared_memory)[i] = from[i];
  fence_proxy_async_shared();
  __syncthreads();
  const uint32_t shared = shared_address(shared_memory);
  const auto descriptor = [](uint32_t address) { return uint64_t(64 | 1 << 30) << 32 | address >> 4 | 1 << 16; };
  const uint64_t w = descriptor(shared + threadIdx.x / 128 * 8192);
  float sums[64] = {}, sum = 0;
  for (int round = 0; round < rounds; ++round) {
    const uint64_t x = descriptor(shared + (1 + round % 3) * 16384);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < PRODUCTS; ++i) Wgmma<128>::multiply<Element>(sums, w + i % 4 * 2, x + i % 4 * 2, 1);
    wgmma_commit_group();
    wgmma_wait_group<0>();
  }
  for (int i = 0; i < 64; ++i) sum += sums[i];
  if (sum == 12345.678f) to[threadIdx.x] = sum;  // or the compiler would drop the products
#endif
}
extern "C" int launch(int is_bfloat16, const uint4* from, float* to, int rounds, int blocks, cudaStream_t stream) {
  const auto kernel = is_bfloat16 ? products<__nv_bfloat16> : products<__half>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  kernel<<<blocks, 256, kShared, stream>>>(from, to, rounds);
  return int(cudaGetLastError());
}
#endif
"""


def build(folder):
    """The library, of kernels.cu's PTX wrappers and KERNEL."""
    wrappers, found, _ = model_new._kernels_source().partition("// " + 76 * "-" + " float32 as two fp16 numbers")
    assert found
    source, library = Path(folder, "ceiling.cu"), Path(folder, "ceiling.so")
    source.write_text(wrappers + KERNEL.replace("PRODUCTS", str(PRODUCTS)), encoding="utf-8")
    options = ["-O3", "-gencode=arch=compute_90a,code=sm_90a", "-shared", "-w", "-cudart=none", "-Xcompiler=-fPIC"]
    nvcc = f"{model_new.find_cuda_home(['90a'])}/bin/nvcc"
    subprocess.run([nvcc, *options, "-o", library, source], check=True)
    return ctypes.CDLL(library)


def main():
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        sys.exit("bench/ceiling.py needs a CUDA device of compute capability 9.0")
    with tempfile.TemporaryDirectory() as folder:
        library = build(folder)
    blocks, to = torch.cuda.get_device_properties().multi_processor_count, torch.empty(256, device="cuda")
    flop, pointer, number = ROUNDS * PRODUCTS * blocks * BLOCK_FLOP, ctypes.c_void_p, ctypes.c_int
    library.launch.argtypes = [number, pointer, pointer, number, number, pointer]
    print(model_new._environment())
    for dtype in (torch.float16, torch.bfloat16):
        for name, make in (("random", torch.randn), ("zeros", torch.zeros)):
            operands = make(4 * 128 * 64, device="cuda").to(dtype)
            stream = torch.cuda.current_stream().cuda_stream
            arguments = dtype == torch.bfloat16, operands.data_ptr(), to.data_ptr(), ROUNDS, blocks, stream
            assert library.launch(*arguments) == 0
            found = steady(lambda arguments=arguments: library.launch(*arguments))
            energy = (found["millijoules"] or float("nan")) * 2 * 1024 * 8192 * 8192 / flop
            clock, power = found["sm_clock_mhz"], found["power_w"]
            print(f"{dtype}, {name}: {flop / found['ms'] / 1e9:.0f} TFLOP/s, {energy:.0f} mJ, {clock} MHz, {power} W")


if __name__ == "__main__":
    main()
