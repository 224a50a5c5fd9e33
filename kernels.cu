// out = z + s * sigmoid(z),  z = x * W^T + b        x [M, K]   W [N, K]   b [N]   out [M, N]
//
// All device code of the project. model_new.py compiles this file and calls the extern "C" functions at
// its end through ctypes; nothing of PyTorch or Python is included, so it compiles in seconds.
//
// Which kernel serves which case is decided in model_new.py (`select_kernel`):
//   "fp16x3"    float32 on Hopper (sm_90a): fp16x3::split_x_kernel, then fp16x3::linear_kernel, which computes z
//               from three fp16 tensor-core products and out in its epilogue.
//   "library"   every other architecture, dtype and shape: the GEMM is the library's, and
//               epilogue_forward_kernel turns z into out, in place where z need not be kept.
// Both share the backward:
//   epilogue_backward_kernel   dz = grad * d out / d z and partial column sums of dz, in one sweep
//   reduce_columns_kernel      adds the partial sums in a fixed order: the bias gradient
//
// The extern "C" functions return a cudaError_t as int, 0 for success, where they do not say otherwise. Sizes are
// element counts.

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>
#include <utility>

// ---------------------------------------------------------------------------- element types

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat64 = 3 };  // as in model_new.py

// The type in which an element is computed: float for 16-bit storage, so that out is rounded once.
template <typename T> struct ComputeType {
  using type = float;
};
template <> struct ComputeType<double> {
  using type = double;
};
template <typename T> using compute_t = typename ComputeType<T>::type;

__device__ __forceinline__ float to_compute(float v) { return v; }
__device__ __forceinline__ double to_compute(double v) { return v; }
__device__ __forceinline__ float to_compute(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_compute(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T> __device__ __forceinline__ T from_compute(compute_t<T> v) { return v; }
template <> __device__ __forceinline__ __half from_compute<__half>(float v) { return __float2half_rn(v); }
template <> __device__ __forceinline__ __nv_bfloat16 from_compute<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// `kWidth` elements moved by one load or store; 16 bytes where the pointers allow it.
template <typename T, int kWidth> struct alignas(sizeof(T) * kWidth) Vector {
  T v[kWidth];
};
template <typename T> constexpr int kVectorWidth = 16 / sizeof(T);

static bool aligned16(const void* a, const void* b, const void* c) {
  return ((reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) | reinterpret_cast<uintptr_t>(c)) & 15) == 0;
}

// ---------------------------------------------------------------------------- the epilogue's mathematics

// The one place where the activation is written down; every kernel calls these two.
__device__ __forceinline__ float sigmoid(float z) {
  // MUFU.RCP is within 1 ulp on [1, inf); an IEEE division would cost ten instructions for half an ulp.
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(1.0f + expf(-z)));
  return reciprocal;
}
__device__ __forceinline__ double sigmoid(double z) { return 1.0 / (1.0 + exp(-z)); }

template <typename C> __device__ __forceinline__ C sigmoid_residual(C z, C scale) { return z + scale * sigmoid(z); }

// d out / d z
template <typename C> __device__ __forceinline__ C sigmoid_residual_derivative(C z, C scale) {
  const C p = sigmoid(z);
  return C(1) + scale * p * (C(1) - p);
}

// ---------------------------------------------------------------------------- forward epilogue

constexpr int kEpilogueThreads = 256;
constexpr int kEpilogueUnroll = 4;  // independent 16-byte loads in flight per thread

// out[i] = z[i] + scale * sigmoid(z[i]). No __restrict__: out may be z itself, each thread reads before it writes.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kEpilogueThreads)
    epilogue_forward_kernel(const T* z, T* out, int64_t vectors, compute_t<T> scale) {
  using Vec = Vector<T, kWidth>;
  const Vec* z_vec = reinterpret_cast<const Vec*>(z);
  Vec* out_vec = reinterpret_cast<Vec*>(out);
  const int64_t first = int64_t(blockIdx.x) * (kEpilogueThreads * kEpilogueUnroll) + threadIdx.x;
  Vec value[kEpilogueUnroll];
#pragma unroll
  for (int u = 0; u < kEpilogueUnroll; ++u) {
    const int64_t i = first + u * kEpilogueThreads;
    if (i < vectors) value[u] = z_vec[i];
  }
#pragma unroll
  for (int u = 0; u < kEpilogueUnroll; ++u) {
    const int64_t i = first + u * kEpilogueThreads;
    if (i >= vectors) continue;
#pragma unroll
    for (int e = 0; e < kWidth; ++e)
      value[u].v[e] = from_compute<T>(sigmoid_residual(to_compute(value[u].v[e]), scale));
    out_vec[i] = value[u];
  }
}

template <typename T, int kWidth>
static cudaError_t launch_epilogue_vectors(const T* z, T* out, int64_t vectors, double scale, cudaStream_t stream) {
  if (vectors == 0) return cudaSuccess;
  constexpr int64_t per_block = kEpilogueThreads * kEpilogueUnroll;
  const int64_t blocks = (vectors + per_block - 1) / per_block;  // < 2^31: a grid covers 2^41 elements and more
  epilogue_forward_kernel<T, kWidth>
      <<<dim3(unsigned(blocks)), kEpilogueThreads, 0, stream>>>(z, out, vectors, compute_t<T>(scale));
  return cudaGetLastError();
}

template <typename T>
static cudaError_t launch_epilogue_forward(const void* z_, void* out_, int64_t numel, double scale,
                                           cudaStream_t stream) {
  const T* z = static_cast<const T*>(z_);
  T* out = static_cast<T*>(out_);
  constexpr int width = kVectorWidth<T>;
  const int64_t vectors = aligned16(z, out, out) ? numel / width : 0;
  const int64_t head = vectors * width;
  const cudaError_t error = launch_epilogue_vectors<T, width>(z, out, vectors, scale, stream);
  if (error != cudaSuccess) return error;
  return launch_epilogue_vectors<T, 1>(z + head, out + head, numel - head, scale, stream);  // the tail, if any
}

// ---------------------------------------------------------------------------- backward epilogue

constexpr int kBackwardWarps = 8;

// dz = grad * (d out / d z)(z) over a strip of rows, and the strip's column sums of dz.
//   grad, z, dz       [rows, cols], contiguous
//   partial_sums      [gridDim.y, cols], of the compute type, or null when no bias gradient is wanted
// A block covers 32 * kWidth columns (one warp wide) and rows_per_block rows, shared out over its warps.
// Sums are taken of dz before it is rounded to 16 bits, in an order fixed by the grid: deterministic.
template <typename T, int kWidth>
__global__ void __launch_bounds__(32 * kBackwardWarps)
    epilogue_backward_kernel(const T* __restrict__ grad, const T* __restrict__ z, T* __restrict__ dz,
                             compute_t<T>* __restrict__ partial_sums, int64_t rows, int64_t cols,
                             int64_t rows_per_block, compute_t<T> scale) {
  using C = compute_t<T>;
  using Vec = Vector<T, kWidth>;
  __shared__ C warp_sums[kBackwardWarps][32 * kWidth];
  const int lane = threadIdx.x, warp = threadIdx.y;
  const int64_t col = (int64_t(blockIdx.x) * 32 + lane) * kWidth;
  const int64_t row_end = min(rows, (int64_t(blockIdx.y) + 1) * rows_per_block);
  C sum[kWidth] = {};
  if (col < cols) {
    const int64_t row = int64_t(blockIdx.y) * rows_per_block + warp;
    int64_t at = row * cols + col;
#pragma unroll 2
    for (int64_t left = row_end - row; left > 0; left -= kBackwardWarps, at += kBackwardWarps * cols) {
      const Vec g = *reinterpret_cast<const Vec*>(grad + at);
      const Vec zv = *reinterpret_cast<const Vec*>(z + at);
      Vec result;
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        const C d = to_compute(g.v[e]) * sigmoid_residual_derivative(to_compute(zv.v[e]), scale);
        sum[e] += d;
        result.v[e] = from_compute<T>(d);
      }
      *reinterpret_cast<Vec*>(dz + at) = result;
    }
  }
  if (partial_sums == nullptr) return;
#pragma unroll
  for (int e = 0; e < kWidth; ++e) warp_sums[warp][lane * kWidth + e] = sum[e];
  __syncthreads();
  for (int c = warp * 32 + lane; c < 32 * kWidth; c += 32 * kBackwardWarps) {
    const int64_t column = int64_t(blockIdx.x) * 32 * kWidth + c;
    C total = 0;
#pragma unroll
    for (int w = 0; w < kBackwardWarps; ++w) total += warp_sums[w][c];
    if (column < cols) partial_sums[blockIdx.y * cols + column] = total;
  }
}

// column_sums[c] = sum over strips of partial_sums[strip, c]
template <typename T>
__global__ void reduce_columns_kernel(const compute_t<T>* __restrict__ partial_sums, T* __restrict__ column_sums,
                                      int64_t strips, int64_t cols) {
  const int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= cols) return;
  compute_t<T> total = 0;
  for (int64_t s = 0; s < strips; ++s) total += partial_sums[s * cols + c];
  column_sums[c] = from_compute<T>(total);
}

template <typename T, int kWidth>
static cudaError_t launch_backward_width(const T* grad, const T* z, T* dz, compute_t<T>* partial_sums, T* dbias,
                                         int64_t rows, int64_t cols, int64_t strips, double scale,
                                         cudaStream_t stream) {
  const int64_t columns_per_block = 32 * kWidth;
  const dim3 grid(unsigned((cols + columns_per_block - 1) / columns_per_block), unsigned(strips));
  const int64_t rows_per_block = (rows + strips - 1) / strips;
  epilogue_backward_kernel<T, kWidth><<<grid, dim3(32, kBackwardWarps), 0, stream>>>(
      grad, z, dz, dbias ? partial_sums : nullptr, rows, cols, rows_per_block, compute_t<T>(scale));
  if (dbias != nullptr)
    reduce_columns_kernel<T><<<unsigned((cols + 127) / 128), 128, 0, stream>>>(partial_sums, dbias, strips, cols);
  return cudaGetLastError();
}

template <typename T>
static cudaError_t launch_epilogue_backward(const void* grad_, const void* z_, void* dz_, void* partial_sums,
                                            void* dbias, int64_t rows, int64_t cols, int64_t strips, double scale,
                                            cudaStream_t stream) {
  const T* grad = static_cast<const T*>(grad_);
  const T* z = static_cast<const T*>(z_);
  T* dz = static_cast<T*>(dz_);
  auto* partial = static_cast<compute_t<T>*>(partial_sums);
  constexpr int width = kVectorWidth<T>;
  if (cols % width == 0 && aligned16(grad, z, dz))
    return launch_backward_width<T, width>(grad, z, dz, partial, static_cast<T*>(dbias), rows, cols, strips, scale,
                                           stream);
  return launch_backward_width<T, 1>(grad, z, dz, partial, static_cast<T*>(dbias), rows, cols, strips, scale, stream);
}

// ---------------------------------------------------------------------------- PTX, one thin function each
// Names are the instructions'; https://docs.nvidia.com/cuda/parallel-thread-execution describes each.

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)  // compiling for sm_90a: wgmma, setmaxnreg
#define HAS_SM90A 1
#endif

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

#ifdef HAS_SM90A

__device__ __forceinline__ float4 ld_shared_v4(uint32_t address) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address));
  return v;
}
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives on the barrier at the same shared-memory offset in another block of the cluster.
__device__ __forceinline__ void mbarrier_arrive_remote(uint32_t barrier, uint32_t block) {
  asm volatile(
      "{\n .reg .b32 remote;\n"
      " mapa.shared::cluster.u32 remote, %0, %1;\n"
      " mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
      "r"(block)
      : "memory");
}
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n .reg .pred p;\n"
        " mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        " selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

// Copies one box of a 2-d tensor to the same shared-memory offset of every block in `blocks` (a bit mask), and counts
// its bytes on the barrier at the same offset in each of them. (column, row): the box's first element; outside: zeros.
__device__ __forceinline__ void cp_async_bulk_tensor_2d(uint32_t to, const CUtensorMap* map, int column, int row,
                                                        uint32_t barrier, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(blocks)
      : "memory");
}
__device__ __forceinline__ void prefetch_tensormap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending> __device__ __forceinline__ void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// d [64, 128] (+)= a [64, 16] * b [16, 128]: a in registers, b in shared memory (K-major); `accumulate` 0 overwrites d.
#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D16(i) D4(i), D4(i + 4), D4(i + 8), D4(i + 12)
__device__ __forceinline__ void wgmma_m64n128k16_f32_f16(float (&d)[64], const uint32_t* a, uint64_t b,
                                                         int accumulate) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %69, 0;\n"
      " wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16"
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"
      " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31,"
      " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47,"
      " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63},"
      " {%64, %65, %66, %67}, %68, p, 1, 1, 0;\n}"
      : D16(0), D16(16), D16(32), D16(48)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}
#undef D16
#undef D4

// Barrier `id` of the block, for `threads` threads in all: those that wait at it and those that only arrive.
__device__ __forceinline__ void bar_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void bar_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
template <int kRegisters> __device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters> __device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
__device__ __forceinline__ uint32_t cluster_ctarank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ void barrier_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Until the kernel before this one in the stream has finished and its writes are visible.
__device__ __forceinline__ void griddepcontrol_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// Lets the next kernel in the stream start its blocks as soon as there is room for them.
__device__ __forceinline__ void griddepcontrol_launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

#endif  // HAS_SM90A

// ---------------------------------------------------------------------------- float32 from three fp16 products
//
// Precision. A float32 number a is scaled by a power of two (exact) and written as hi + lo, two fp16 numbers of 11
// significant bits each: hi = fp16(a), lo = fp16(a - hi). Then a*b = hi*hi + hi*lo + lo*hi, and what is dropped,
// lo*lo and the rest below lo, is at most 2^-21 of the product. (Markidis et al. 2018; Ootomo and Yokota 2022.)
//   Range: the scale puts the largest |a| that shares it into [2^14, 2^15), so that lo keeps all its bits for every
//     number down to 2^-17 of the largest, and what is lost below that is at most 2^-39 of the largest. x has one scale
//     a row, W one for every row and block of 64 k. Where few entries of a row of x stand out (see Outliers) they
//     are multiplied apart, in float32, and do not count.
//   Accumulation: the tensor core truncates when it adds to its float32 accumulator. So it only ever adds one block
//     of 64 k to a fresh `partial`; the partial is scaled back (exact) and added to `total` by an ordinary fma.
//
// Data flow. The kernel computes out transposed, [64 n, 128 m] at a time for a consumer warpgroup, with wgmma's
//   A = W, from registers: TMA brings W as float32 to shared memory, each thread loads its part of the fragment,
//       finds the scale with its three neighbours, splits. Nothing about W is stored outside the kernel.
//   B = x, from shared memory, as hi and lo: split_x_kernel wrote both before, with the row's scale.
// Tile. A block computes 128 columns of out, half of them each consumer warpgroup, and one or two panels of 128 rows.
//   With two, W is loaded and split once for 256 rows of x, in registers that then leave no room for the next block.
// Warps. One producer thread issues TMA for W, one for x. Two consumer warpgroups take turns with the tensor cores;
//   each adds up its partials in the other's turn. There W is split too where a tile has two panels; with one, it is
//   split while the warpgroup's own products run.
// Rings. W and x have a ring of shared-memory stages each, every stage with two barriers:
//   full: bytes have landed -> consumers;  empty: every consumer warp that reads it is done -> producer.
//   A W stage is free once it is in registers; an x stage once its products are finished.
// Clusters. Two blocks side by side need the same x: each loads half of it, and TMA multicasts that to both, which
//   halves what x costs the L2 cache. So the `empty` barrier of an x stage counts both blocks' consumer warps.
// Order of k. A product may sum k in any order if both operands agree. A thread loads W in 16 bytes, four
//   consecutive k, where the fragment wants k = 2q, 2q+1, 2q+8, 2q+9 (q = lane % 4); so split_x_kernel stores each
//   group of 16 k in the order 0 1 4 5 8 9 12 13 2 3 6 7 10 11 14 15.

namespace fp16x3 {

constexpr int kPanelM = 128, kTileN = 128, kTileK = 64;
constexpr int kWStageBytes = kTileN * kTileK * 4;  // float [2 halves of k][kTileN][32], 128-byte swizzle
constexpr int kXPartBytes = kPanelM * kTileK * 2;  // half [kPanelM][kTileK], 128-byte swizzle
constexpr int kXStageBytes = 2 * kXPartBytes;      // hi, lo
constexpr int kCluster = 2;                        // blocks
constexpr int kConsumerWarpgroups = kTileN / 64;
constexpr int kThreads = 128 * (1 + kConsumerWarpgroups);
[[maybe_unused]] constexpr int kConsumerWarps = 4 * kConsumerWarpgroups;
// The compiler gives every thread 168 registers, the most that the register file allows for so many; what the
// producers' warpgroup lets go of goes to the consumers.
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
static_assert(kProducerRegisters + kConsumerWarpgroups * kConsumerRegisters <= 168 * (1 + kConsumerWarpgroups),
              "or the consumers would wait for registers for ever");

// What a block computes: kPanels panels of 128 rows of x, by 128 rows of W.
template <int kPanels_> struct Tile {
  static constexpr int kPanels = kPanels_;
  static constexpr int kRows = kPanels * kPanelM;
  static constexpr int kWStages = kPanels == 1 ? 4 : 3, kXStages = kPanels == 1 ? 3 : 4;  // of x: each one panel
  static constexpr int kBarrierBytes = 2 * (kWStages + kXStages) * 8;
  static constexpr int kSharedBytes = kWStages * kWStageBytes + kXStages * kXStageBytes + kBarrierBytes;
  static_assert(kSharedBytes <= 232448, "shared memory of a Hopper block");
};

// The scale of a group of numbers, from the largest |a| among them: 2^(14 - exponent), at most 2^126 so that its
// inverse is a normal number too (the largest is then below 2^-112 and every bit of it is kept anyway).
__device__ __forceinline__ float scale_of(float largest) {
  return __uint_as_float(min(268u - (__float_as_uint(largest) >> 23), 253u) << 23);
}
__device__ __forceinline__ float inverse_of(float scale) {
  return __uint_as_float((254u << 23) - __float_as_uint(scale));
}

// hi and lo of two numbers, packed as wgmma and shared memory want them: the first in the lower half.
__device__ __forceinline__ void split2(float a, float b, float scale, uint32_t& hi, uint32_t& lo) {
  a *= scale;
  b *= scale;
  const __half2 h = __floats2half2_rn(a, b);
  const float2 back = __half22float2(h);
  const __half2 l = __floats2half2_rn(a - back.x, b - back.y);
  hi = *reinterpret_cast<const uint32_t*>(&h);
  lo = *reinterpret_cast<const uint32_t*>(&l);
}

// The entries of a row of x above 2^-12 of its largest, where they are few. They are left out of hi and lo, so that the
// others get a scale of their own and keep their bits, and the epilogue adds their products in float32.
struct Outliers {
  static constexpr int kMax = 8;
  int k[kMax];  // ascending; -1: no more
  float value[kMax];
};

// What split_x_kernel makes of x [m, k]. One allocation, whose parts are 16-byte aligned.
struct SplitX {
  static constexpr int kRowsM = 2 * kPanelM;  // of the largest tile
  int padded_k;                               // k up to whole blocks
  __half *hi, *lo;                            // [m, padded_k], in the order of k described above
  float* inverse_scale;                       // [m up to a multiple of kRowsM]; negative for a row with outliers
  Outliers* outliers;                         // [m], where inverse_scale is negative

  __host__ __device__ SplitX(void* scratch, int64_t m, int64_t k)
      : padded_k(int((k + kTileK - 1) / kTileK * kTileK)),
        hi(static_cast<__half*>(scratch)),
        lo(hi + m * padded_k),
        inverse_scale(reinterpret_cast<float*>(lo + m * padded_k)),
        outliers(reinterpret_cast<Outliers*>(inverse_scale + padded_m(m))) {}
  __host__ __device__ static int64_t padded_m(int64_t m) { return (m + kRowsM - 1) / kRowsM * kRowsM; }
  static int64_t bytes(int64_t m, int64_t k) {
    const SplitX split(nullptr, m, k);
    return reinterpret_cast<uintptr_t>(split.outliers + m);
  }
};

constexpr int kSplitThreads = 256;

// One block for each row of x, and for the rows missing to a multiple of SplitX::kRowsM.
__global__ void __launch_bounds__(kSplitThreads)
    split_x_kernel(const float* __restrict__ x, int64_t x_stride, const SplitX split, int m, int k) {
#ifdef HAS_SM90A
  griddepcontrol_launch_dependents();
  if (blockIdx.x >= m) {
    if (threadIdx.x == 0) split.inverse_scale[blockIdx.x] = 0;
    return;
  }
  const float* row = x + blockIdx.x * x_stride;
  auto load4 = [&](int at) { return at < k ? *reinterpret_cast<const float4*>(row + at) : float4{0, 0, 0, 0}; };
  constexpr int kStride = kSplitThreads * 4;
  constexpr int kHeld = 8;  // float4 a thread keeps between its sweeps over the row: all of it up to K = 8192
  float4 held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) held[i] = load4(threadIdx.x * 4 + i * kStride);
  auto for_each = [&](auto body) {  // of this thread's entries
    auto four = [&](float4 v) { body(v.x), body(v.y), body(v.z), body(v.w); };
#pragma unroll
    for (int i = 0; i < kHeld; ++i) four(held[i]);
    for (int at = threadIdx.x * 4 + kHeld * kStride; at < k; at += kStride) four(load4(at));
  };
  // Over the block; of bits of non-negative floats, which are ordered like the floats.
  __shared__ uint32_t of_warp[2][kSplitThreads / 32];
  auto reduce_max = [&](float value, uint32_t* buffer) {
    const uint32_t in_warp = __reduce_max_sync(~0u, __float_as_uint(value));
    if (threadIdx.x % 32 == 0) buffer[threadIdx.x / 32] = in_warp;
    __syncthreads();
    return __uint_as_float(__reduce_max_sync(~0u, buffer[threadIdx.x % (kSplitThreads / 32)]));
  };
  __shared__ int outlier_count;
  __shared__ Outliers found;
  if (threadIdx.x == 0) outlier_count = 0;

  float largest = 0;
  for_each([&](float v) { largest = fmaxf(largest, fabsf(v)); });
  largest = reduce_max(largest, of_warp[0]);
  const float limit = largest * 0x1p-12f;  // Inf where an entry is Inf: no outliers then
  float largest_below = 0;
  int above = 0;
  for_each([&](float v) {
    if (fabsf(v) > limit)
      ++above;
    else
      largest_below = fmaxf(largest_below, fabsf(v));
  });
  above = __reduce_add_sync(~0u, above);
  if (threadIdx.x % 32 == 0 && above > 0) atomicAdd(&outlier_count, above);
  largest_below = reduce_max(largest_below, of_warp[1]);
  const bool has_outliers = outlier_count > 0 && outlier_count <= Outliers::kMax;
  __syncthreads();  // everyone has read the count, which now counts those found
  if (threadIdx.x == 0) outlier_count = 0;
  float scale = scale_of(has_outliers ? largest_below : largest);
  if (has_outliers && largest_below == 0) scale = 1;  // nothing else to scale: keep the outliers in range
  if (threadIdx.x == 0) split.inverse_scale[blockIdx.x] = has_outliers ? -inverse_of(scale) : inverse_of(scale);
  __syncthreads();

  // Thread q of four has k = 4q .. 4q+3 of a group of 16. The fragment's order wants its first two in the group's first
  // half and the others in the second; one exchange with the neighbour makes that 8 contiguous bytes per thread.
  const bool odd = threadIdx.x % 2;
  auto store4 = [&](int at, float4 v) {
    if (has_outliers) {
      float* entries = &v.x;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (!(fabsf(entries[e]) > limit)) continue;
        const int slot = atomicAdd(&outlier_count, 1);
        found.k[slot] = at + e;
        found.value[slot] = entries[e];
        entries[e] = 0;
      }
    }
    uint32_t h[2], l[2];
    split2(v.x, v.y, scale, h[0], l[0]);
    split2(v.z, v.w, scale, h[1], l[1]);
    const uint32_t h_other = __shfl_xor_sync(~0u, odd ? h[0] : h[1], 1),
                   l_other = __shfl_xor_sync(~0u, odd ? l[0] : l[1], 1);
    const int q = at / 4 % 4;
    const int64_t to = blockIdx.x * int64_t(split.padded_k) + at / 16 * 16 + (odd ? 8 : 0) + q / 2 * 4;
    if (at >= split.padded_k) return;
    *reinterpret_cast<uint2*>(split.hi + to) = odd ? make_uint2(h_other, h[1]) : make_uint2(h[0], h_other);
    *reinterpret_cast<uint2*>(split.lo + to) = odd ? make_uint2(l_other, l[1]) : make_uint2(l[0], l_other);
  };
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
    if (i * kStride < split.padded_k) store4(threadIdx.x * 4 + i * kStride, held[i]);
  for (int first = kHeld * kStride; first < split.padded_k; first += kStride)
    store4(threadIdx.x * 4 + first, load4(threadIdx.x * 4 + first));

  if (!has_outliers) return;
  __syncthreads();
  if (threadIdx.x == 0) {
    // In ascending order of k, whatever the order in which they were found: the result must not depend on it.
    Outliers& out = split.outliers[blockIdx.x];
    int last = -1;
    for (int i = 0; i < Outliers::kMax; ++i) {
      int next = -1;
      for (int j = 0; j < outlier_count; ++j)
        if (found.k[j] > last && (next < 0 || found.k[j] < found.k[next])) next = j;
      out.k[i] = next < 0 ? -1 : found.k[next];
      out.value[i] = next < 0 ? 0 : found.value[next];
      last = next < 0 ? k : found.k[next];
    }
  }
#endif
}

// Which tiles come when. A cluster's blocks have tiles side by side along n. Clusters are numbered along m first, in
// groups of 1024 rows, then n: what runs at the same time shares W's tiles, which are the larger traffic, and the
// group's part of x stays in the L2 cache.
template <typename T> struct TileScheduler {
  static constexpr int kGroupM = 1024 / T::kRows;
  int tiles_m, clusters_n;

  __host__ __device__ TileScheduler(int m, int n)
      : tiles_m((m + T::kRows - 1) / T::kRows), clusters_n((n + kTileN * kCluster - 1) / (kTileN * kCluster)) {}
  __host__ __device__ int clusters() const { return tiles_m * clusters_n; }

#ifdef HAS_SM90A
  // This block's tiles one after the other: body(m0, n0) with the tile's first row and column of out.
  template <typename Body> __device__ __forceinline__ void for_each_tile(uint32_t rank, Body body) const {
    const int per_group = kGroupM * clusters_n;
#pragma unroll 1
    for (int index = blockIdx.x / kCluster; index < clusters(); index += gridDim.x / kCluster) {
      const int first_m = index / per_group * kGroupM, size_m = min(kGroupM, tiles_m - first_m);
      const int tile_m = first_m + index % per_group % size_m, cluster_n = index % per_group / size_m;
      body(tile_m * T::kRows, (cluster_n * kCluster + int(rank)) * kTileN);
    }
  }
#endif
};

struct Arguments {
  const float* x;     // [m, k], row stride x_stride
  const float* w;     // [n, k], row stride w_stride
  const float* bias;  // [n]
  float* out;         // [m, n]
  SplitX split;
  int64_t x_stride, w_stride;
  int m, n, k;
  float scale;  // s
};

#ifdef HAS_SM90A

// Where a ring of stages is used next, and the parity its barriers are waited for with.
template <int kStages> struct Ring {
  uint32_t stage = 0, phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

// A thread's part of W in one block of 64 k: wgmma's four steps of 16 k, and the scales of its two rows, r and r + 8.
struct WBlock {
  uint32_t step[4][8];  // as loaded: four consecutive k of row r, four of row r + 8; or split, see split_step
  float scale[2];
};

// address: of the thread's 16 bytes of step 0 in row r. Under the swizzle those of step 1 differ in one bit.
__device__ __forceinline__ void load_step(WBlock& block, int step, uint32_t address) {
  address = (step % 2 ? address ^ 64 : address) + step / 2 * (kTileN * 128);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float4 v = ld_shared_v4(address + half * (8 * 128));
    uint32_t* to = block.step[step] + 4 * half;
    to[0] = __float_as_uint(v.x), to[1] = __float_as_uint(v.y);
    to[2] = __float_as_uint(v.z), to[3] = __float_as_uint(v.w);
  }
}

// From the largest |w| of a row's 64: this thread's sixteen and its three neighbours'.
__device__ __forceinline__ void find_scale(WBlock& block) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float largest = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) largest = fmaxf(largest, fabsf(__uint_as_float(block.step[i / 4][4 * half + i % 4])));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
    block.scale[half] = scale_of(largest);
  }
}

// A step's part of operand A: the four registers of wgmma's 64 x 16 fragment, hi, then lo. `fragment` may be the step.
__device__ __forceinline__ void split_step(uint32_t (&fragment)[8], const WBlock& block, int step) {
  uint32_t parts[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // row r or r + 8, the earlier two k or the later
    const uint32_t* two = block.step[step] + 4 * (i % 2) + i / 2 * 2;
    split2(__uint_as_float(two[0]), __uint_as_float(two[1]), block.scale[i % 2], parts[i], parts[4 + i]);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) fragment[i] = parts[i];
}

// sum + a * b, term by term as a plain float32 dot product does it.
__device__ __forceinline__ float add_dot(float4 a, float4 b, float sum) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

// wgmma's description of a K-major operand with 128-byte swizzle, 8 rows of 128 bytes being 1024 contiguous bytes: its
// lower half, in which adding 1 moves the operand by 16 bytes, and its upper half.
__device__ __forceinline__ uint32_t matrix_descriptor(uint32_t address) { return address >> 4 | 1 << 16; }
constexpr uint64_t kDescriptorUpper = uint64_t(1024 >> 4 | 1 << 30) << 32;

#endif  // HAS_SM90A

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    linear_kernel(const __grid_constant__ CUtensorMap w_map, const __grid_constant__ CUtensorMap x_hi_map,
                  const __grid_constant__ CUtensorMap x_lo_map, const __grid_constant__ Arguments args) {
#ifdef HAS_SM90A
  constexpr int kPanels = T::kPanels, kWStages = T::kWStages, kXStages = T::kXStages;
  extern __shared__ __align__(1024) uint8_t shared_memory[];  // the swizzle repeats every 1024 bytes
  const uint32_t w_stages = shared_address(shared_memory), x_stages = w_stages + kWStages * kWStageBytes;
  const uint32_t w_full = x_stages + kXStages * kXStageBytes, w_empty = w_full + 8 * kWStages;
  const uint32_t x_full = w_empty + 8 * kWStages, x_empty = x_full + 8 * kXStages;
  const uint32_t rank = cluster_ctarank();
  // Through a shuffle, so that the compiler knows it to be the same in the whole warp and keeps what follows from it
  // in uniform registers.
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;

  if (threadIdx.x == 0) {
    for (int i = 0; i < kWStages; ++i) {
      mbarrier_init(w_full + 8 * i, 1);
      mbarrier_init(w_empty + 8 * i, kConsumerWarps);
    }
    for (int i = 0; i < kXStages; ++i) {
      mbarrier_init(x_full + 8 * i, 1);
      mbarrier_init(x_empty + 8 * i, kConsumerWarps * kCluster);
    }
    fence_mbarrier_init();
    prefetch_tensormap(&w_map);
    prefetch_tensormap(&x_hi_map);
    prefetch_tensormap(&x_lo_map);
  }
  __syncthreads();
  barrier_cluster();

  const int k_blocks = (args.k + kTileK - 1) / kTileK;

  if (warp < 4) {  // ------------------------------------------------------------ producer
    setmaxnreg_dec<kProducerRegisters>();
    if (lane == 0 && warp < 2) {
      auto load_w = [&](int n0, int k_block, Ring<kWStages> ring) {
        const uint32_t barrier = w_full + 8 * ring.stage, to = w_stages + ring.stage * kWStageBytes;
        mbarrier_wait(w_empty + 8 * ring.stage, ring.phase ^ 1);
        mbarrier_arrive_expect_tx(barrier, kWStageBytes);
        for (int half = 0; half < 2; ++half)
          cp_async_bulk_tensor_2d(to + half * kTileN * 128, &w_map, k_block * kTileK + half * 32, n0, barrier,
                                  1 << rank);
      };
      auto load_x = [&](int m0, int k_block, Ring<kXStages> ring) {  // this block's slice, for both blocks
        constexpr int rows = kPanelM / kCluster;
        const uint32_t barrier = x_full + 8 * ring.stage;
        const uint32_t to = x_stages + ring.stage * kXStageBytes + rank * rows * 128;
        mbarrier_wait(x_empty + 8 * ring.stage, ring.phase ^ 1);
        mbarrier_arrive_expect_tx(barrier, kXStageBytes);
        for (int part = 0; part < 2; ++part)
          cp_async_bulk_tensor_2d(to + part * kXPartBytes, part ? &x_lo_map : &x_hi_map, k_block * kTileK,
                                  m0 + rank * rows, barrier, (1 << kCluster) - 1);
      };

      // Two threads, so that W may run ahead by its whole ring while x waits for a stage, and the other way round.
      if (warp == 0) {
        Ring<kWStages> ring;
        TileScheduler<T>(args.m, args.n).for_each_tile(rank, [&](int m0, int n0) {
          for (int k_block = 0; k_block < k_blocks; ++k_block, ring.advance()) load_w(n0, k_block, ring);
        });
      } else {
        Ring<kXStages> ring;
        griddepcontrol_wait();  // x is being split by the kernel before; W need not wait for it
        TileScheduler<T>(args.m, args.n).for_each_tile(rank, [&](int m0, int n0) {
          for (int k_block = 0; k_block < k_blocks; ++k_block)
#pragma unroll 1
            for (int panel = 0; panel < kPanels; ++panel, ring.advance()) load_x(m0 + panel * kPanelM, k_block, ring);
        });
      }
    }
  } else {  // ------------------------------------------------------------------- consumers
    setmaxnreg_inc<kConsumerRegisters>();
    griddepcontrol_wait();  // for inverse_scale
    const int consumer = warp / 4 - 1, r = lane / 4, q = lane % 4;
    // The fragment's row r is W's row 0 4 1 5 2 6 3 7 of eight: the eight lanes that load 16 bytes together then
    // touch all banks under the swizzle, where rows r and r + 1 would collide.
    const int row = (warp - 4) * 16 + r / 2 + (r % 2) * 4;
    const uint32_t w_address = w_stages + row * 128 + (q ^ row % 8) * 16;

    // [16 groups of 8 m][row r, row r + 8][m = 2q, 2q + 1], written [16][4]
    float partial[64], total[kPanels][64];
    WBlock w;
    Ring<kWStages> w_ring;
    Ring<kXStages> x_ring;

    auto wait_for_w = [&] { mbarrier_wait(w_full + 8 * w_ring.stage, w_ring.phase); };
    auto load_w = [&](int step) { load_step(w, step, w_address + w_ring.stage * kWStageBytes); };
    auto find_scale_of_w = [&] {
      find_scale(w);  // needs all that was loaded, so that the stage can be given back
      __syncwarp();
      if (lane == 0) mbarrier_arrive(w_empty + 8 * w_ring.stage);
      w_ring.advance();
    };
    auto wait_for_x = [&] { mbarrier_wait(x_full + 8 * x_ring.stage, x_ring.phase); };
    auto release_x = [&] {
      if (lane < kCluster) mbarrier_arrive_remote(x_empty + 8 * x_ring.stage, lane);
      x_ring.advance();
    };
    auto multiply_step = [&](const uint32_t (&fragment)[8], int step) {
      // 16 k are 32 bytes, which is 2 in a descriptor.
      const uint32_t x_hi = matrix_descriptor(x_stages + x_ring.stage * kXStageBytes) + 2 * step;
      const uint32_t x_lo = x_hi + kXPartBytes / 16;
      const uint32_t *hi = fragment, *lo = fragment + 4;
      wgmma_m64n128k16_f32_f16(partial, lo, kDescriptorUpper | x_hi, step > 0);
      wgmma_m64n128k16_f32_f16(partial, hi, kDescriptorUpper | x_lo, 1);
      wgmma_m64n128k16_f32_f16(partial, hi, kDescriptorUpper | x_hi, 1);
      wgmma_commit_group();
    };
    auto add_partial = [&](float (&to)[64], float scale_r, float scale_r8) {
      const float inverse[2] = {inverse_of(scale_r), inverse_of(scale_r8)};
#pragma unroll
      for (int i = 0; i < 64; ++i) to[i] = fmaf(partial[i], inverse[i / 2 % 2], to[i]);
    };

    // The two warpgroups take turns to begin a panel: while one is between two, with nothing in the tensor cores, the
    // other is not.
    const int my_turn = 1 + consumer, other_turn = 2 - consumer;
    if (consumer == 1) bar_arrive(other_turn, 256);

    // Tiles of one panel: a block of W, entered with its scale known and step 0 split. While the tensor cores multiply
    // one step, this warp splits the next and loads the next block into the registers that become free.
    uint32_t fragments[2][8];  // one is multiplied while the other is made
    auto multiply_block = [&](bool has_next) {
      const float scale[2] = {w.scale[0], w.scale[1]};
      wait_for_x();
      if (has_next) wait_for_w();
      bar_sync(my_turn, 256);
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        wgmma_fence();
        multiply_step(fragments[step % 2], step);
        if (step == 2) bar_arrive(other_turn, 256);
        if (step < 3) {
          if (step > 0) wgmma_wait_group<1>();  // the step before, which read the other fragment, is done
          split_step(fragments[(step + 1) % 2], w, step + 1);
        }
        if (has_next) load_w(step);
      }
      if (has_next) {
        find_scale_of_w();
        wgmma_wait_group<1>();
        split_step(fragments[0], w, 0);
      }
      wgmma_wait_group<0>();
      release_x();
      add_partial(total[0], scale[0], scale[1]);
    };

    // Tiles of two panels: one panel times a block of W, which is split already. With the second panel each step's
    // registers are loaded with the next block as soon as it is multiplied; what else that block needs falls into the
    // other warpgroup's turn.
    auto multiply_panel = [&](auto panel_constant, bool has_next) {
      constexpr int panel = decltype(panel_constant)::value;
      constexpr bool last = panel == 1;
      wait_for_x();
      if (last && has_next) wait_for_w();
      bar_sync(my_turn, 256);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < 4; ++step) multiply_step(w.step[step], step);
      bar_arrive(other_turn, 256);
      if (last) {
        wgmma_wait_group<3>();
        if (has_next) load_w(0);
        wgmma_wait_group<2>();
        if (has_next) load_w(1);
        wgmma_wait_group<1>();
        if (has_next) load_w(2);
      }
      wgmma_wait_group<0>();
      release_x();
      if (last && has_next) load_w(3);
      add_partial(total[panel], w.scale[0], w.scale[1]);
      if (last && has_next) {
        find_scale_of_w();
#pragma unroll
        for (int step = 0; step < 4; ++step) split_step(w.step[step], w, step);
      }
    };

    TileScheduler<T>(args.m, args.n).for_each_tile(rank, [&](int m0, int n0) {
#pragma unroll
      for (int i = 0; i < 64 * kPanels; ++i) total[i / 64][i % 64] = 0;
      wait_for_w();
#pragma unroll
      for (int step = 0; step < 4; ++step) load_w(step);
      find_scale_of_w();
      if constexpr (kPanels == 1) {
        split_step(fragments[0], w, 0);
#pragma unroll 1
        for (int left = k_blocks; left > 0; --left) multiply_block(left > 1);
      } else {
#pragma unroll
        for (int step = 0; step < 4; ++step) split_step(w.step[step], w, step);
#pragma unroll 1
        for (int left = k_blocks; left > 0; --left) {
          multiply_panel(std::integral_constant<int, 0>(), left > 1);
          multiply_panel(std::integral_constant<int, 1>(), left > 1);
        }
      }

      // Epilogue, one panel after the other in the same registers. Element i of this thread is at row m_of(i, q),
      // column n_of(i, r): a store instruction of a warp fills whole 32-byte sectors of four rows.
#pragma unroll 1
      for (int panel = 0; panel < kPanels; ++panel, m0 += kPanelM) {
        auto m_of = [&](int i, int q_) { return m0 + i / 4 * 8 + q_ * 2 + i % 2; };
        auto n_of = [&](int i, int r_) { return n0 + (warp - 4) * 16 + r_ / 2 + (r_ % 2) * 4 + i / 2 % 2 * 8; };
        auto out_of = [&](int i) { return args.out + int64_t(m_of(i, q)) * args.n + n_of(i, r); };
        auto store = [&](int i, float product) {
          *out_of(i) = sigmoid_residual(product + args.bias[n_of(i, r)], args.scale);
        };
        const float bias[2] = {n_of(0, r) < args.n ? args.bias[n_of(0, r)] : 0,
                               n_of(2, r) < args.n ? args.bias[n_of(2, r)] : 0};
        const float4 inverses = reinterpret_cast<const float4*>(args.split.inverse_scale + m0)[lane];
        const float lowest = fminf(fminf(inverses.x, inverses.y), fminf(inverses.z, inverses.w));
        if (__any_sync(~0u, lowest < 0)) {  // rows with outliers: add their products, in the scale of the row's others
          const float* w_rows[2] = {args.w + min(n_of(0, r), args.n - 1) * args.w_stride,
                                    args.w + min(n_of(2, r), args.n - 1) * args.w_stride};
#pragma unroll
          for (int i = 0; i < 64; ++i) {
            const int m = m_of(i, q);
            if (i / 2 % 2 || m >= args.m || args.split.inverse_scale[m] >= 0) continue;
            const Outliers& outliers = args.split.outliers[m];
            const float scale = inverse_of(-args.split.inverse_scale[m]);
#pragma unroll 1
            for (int j = 0; j < Outliers::kMax && outliers.k[j] >= 0; ++j) {
              const float value = outliers.value[j] * scale;
              total[0][i] = fmaf(value, w_rows[0][outliers.k[j]], total[0][i]);
              total[0][i + 2] = fmaf(value, w_rows[1][outliers.k[j]], total[0][i + 2]);
            }
          }
        }

        // Pairs, of m = 2q and 2q + 1 in each group of 8.
        const float2* inverse_scales = reinterpret_cast<const float2*>(args.split.inverse_scale + m0) + q;
        float check = 0;  // NaN once a product is not finite
        float* out = args.out + int64_t(m_of(0, q)) * args.n + n_of(0, r);
#pragma unroll
        for (int group = 0; group < 16; ++group, out += 8 * int64_t(args.n)) {
          const float2 inverse = inverse_scales[4 * group];
#pragma unroll
          for (int i = 4 * group; i < 4 * group + 4; ++i) {
            const float product = total[0][i] * fabsf(i % 2 ? inverse.y : inverse.x);
            check = fmaf(product, 0.0f, check);
            const float value = sigmoid_residual(product + bias[i / 2 % 2], args.scale);
            if (m_of(i, q) < args.m && n_of(i, r) < args.n) (i % 2 ? out + args.n : out)[i / 2 % 2 * 8] = value;
          }
        }

        // A product that is not finite may be so because of the splitting (Inf - Inf in lo, or an overflow of the
        // scaled sum). Such elements are computed again as plain float32 dot products, which is what eager gives. Which
        // they are is read from what was stored, so that no registers need be kept: an element not finite for another
        // reason (bias, s) comes out as it was.
        uint64_t not_finite = 0;
        if (__any_sync(~0u, check != 0)) {
#pragma unroll 4
          for (int i = 0; i < 64; ++i)
            if (m_of(i, q) < args.m && n_of(i, r) < args.n && !(fabsf(*out_of(i)) < INFINITY))
              not_finite |= uint64_t(1) << i;
        }
        const unsigned count = __reduce_add_sync(~0u, unsigned(__popcll(not_finite)));
        if (count > 128) {  // many: every thread its own, 8 at a time, so that an operand loaded serves several
#pragma unroll 1
          for (int first = 0; first < 64; first += 8) {
            float sum[8] = {};
            const float* w_row = args.w + min(n_of(0, r), args.n - 1) * args.w_stride;
            const int64_t w_next = (min(n_of(2, r), args.n - 1) - min(n_of(0, r), args.n - 1)) * args.w_stride;
#pragma unroll 1
            for (int k = 0; k < args.k; k += 4) {
              const float4 a[2] = {*reinterpret_cast<const float4*>(w_row + k),
                                   *reinterpret_cast<const float4*>(w_row + w_next + k)};
#pragma unroll
              for (int i = 0; i < 8; ++i) {
                if (i / 2 % 2) continue;
                const int m = min(m_of(first + i, q), args.m - 1);
                const float4 b = *reinterpret_cast<const float4*>(args.x + m * args.x_stride + k);
#pragma unroll
                for (int half = 0; half < 2; ++half) sum[i + 2 * half] = add_dot(a[half], b, sum[i + 2 * half]);
              }
            }
#pragma unroll
            for (int i = 0; i < 8; ++i)
              if (not_finite >> (first + i) & 1) store(first + i, sum[i]);
          }
        } else if (count > 0) {  // few: the warp computes one after the other
          for (unsigned lanes; (lanes = __ballot_sync(~0u, not_finite != 0)) != 0;) {
            const int owner = __ffs(lanes) - 1;
            const int i = __shfl_sync(~0u, __ffsll(not_finite) - 1, owner);
            const float* w_row = args.w + n_of(i, owner / 4) * args.w_stride;
            const float* x_row = args.x + m_of(i, owner % 4) * args.x_stride;
            float sum = 0;
            for (int k = lane * 4; k < args.k; k += 128) {
              const float4 a = *reinterpret_cast<const float4*>(w_row + k);
              const float4 b = *reinterpret_cast<const float4*>(x_row + k);
              sum = add_dot(a, b, sum);
            }
            for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
            if (lane == owner) {
              store(i, sum);
              not_finite &= not_finite - 1;
            }
          }
        }
#pragma unroll
        for (int i = 0; i < 64; ++i) total[0][i] = total[kPanels - 1][i];
      }
    });
    if (consumer == 0) bar_sync(my_turn, 256);  // takes the last turn, so that the barrier ends as it began
  }
  __syncwarp();       // the producers' other lanes have waited here
  barrier_cluster();  // no block may end while another still multicasts to it or arrives on its barriers
#endif
}

// A tensor map over a row-major 2-d tensor, boxes of `box_rows` rows of 128 bytes, 128-byte swizzle, zeros outside.
static cudaError_t encode_tensor_map(CUtensorMap* map, CUtensorMapDataType type, int element_bytes, const void* base,
                                     int64_t rows, int64_t cols, int64_t row_stride, int box_rows) {
  // Through the runtime, so that libcuda need not be linked.
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(
        error == cudaSuccess && found == cudaDriverEntryPointSuccess ? function : nullptr);
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[2] = {cuuint64_t(cols), cuuint64_t(rows)};
  const cuuint64_t strides[1] = {cuuint64_t(row_stride) * element_bytes};
  const cuuint32_t box[2] = {128u / element_bytes, cuuint32_t(box_rows)}, element_strides[2] = {1, 1};
  const CUresult result =
      encode(map, type, 2, const_cast<void*>(base), sizes, strides, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// A launch of linear_kernel<T>. Its attributes are part of it: not to be copied.
template <typename T> struct Launch {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attributes[2] = {};

  explicit Launch(int clusters, cudaStream_t stream = nullptr) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {kCluster, 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;  // start while split_x_kernel runs out
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = unsigned(clusters) * kCluster;
    config.blockDim = kThreads;
    config.dynamicSmemBytes = T::kSharedBytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = 2;
  }
  Launch(const Launch&) = delete;
};

// How many clusters the device holds at once; also allows the kernel its shared memory there. Asked once a device.
template <typename T> static cudaError_t resident_clusters(int device, int* clusters) {
  static std::atomic<int> known[64];
  if (device < 64 && (*clusters = known[device].load()) > 0) return cudaSuccess;
  const auto kernel = linear_kernel<T>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kSharedBytes);
  if (error != cudaSuccess) return error;
  const Launch<T> launch(1);
  error = cudaOccupancyMaxActiveClusters(clusters, kernel, &launch.config);
  if (error == cudaSuccess && *clusters == 0) error = cudaErrorInvalidConfiguration;
  if (error == cudaSuccess && device < 64) known[device].store(*clusters);
  return error;
}

template <typename T>
static cudaError_t launch_linear(const Arguments& args, int resident, const CUtensorMap& w_map,
                                 const CUtensorMap& x_hi_map, const CUtensorMap& x_lo_map, cudaStream_t stream) {
  const Launch<T> launch(std::min(resident, TileScheduler<T>(args.m, args.n).clusters()), stream);
  const cudaError_t error = cudaLaunchKernelEx(&launch.config, linear_kernel<T>, w_map, x_hi_map, x_lo_map, args);
  return error != cudaSuccess ? error : cudaGetLastError();
}

static cudaError_t launch(const Arguments& args, int device, cudaStream_t stream) {
  // First, so that the GPU has work while the host prepares the rest.
  const SplitX& split = args.split;
  split_x_kernel<<<unsigned(SplitX::padded_m(args.m)), kSplitThreads, 0, stream>>>(args.x, args.x_stride, split, args.m,
                                                                                   args.k);
  cudaError_t error = cudaGetLastError();
  CUtensorMap w_map, x_hi_map, x_lo_map;
  if (error == cudaSuccess)
    error =
        encode_tensor_map(&w_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, args.w, args.n, args.k, args.w_stride, kTileN);
  for (auto [map, part] : {std::pair{&x_hi_map, split.hi}, std::pair{&x_lo_map, split.lo}})
    if (error == cudaSuccess)
      error = encode_tensor_map(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, part, args.m, split.padded_k, split.padded_k,
                                kPanelM / kCluster);
  int resident_1 = 0, resident_2 = 0;
  if (error == cudaSuccess) error = resident_clusters<Tile<1>>(device, &resident_1);
  if (error == cudaSuccess) error = resident_clusters<Tile<2>>(device, &resident_2);
  if (error != cudaSuccess) return error;

  // Two panels to a tile need less conversion and less traffic for the same products, but tiles of twice the time may
  // leave more of the device without work at the end.
  const auto waves = [](int clusters, int resident) { return (clusters + resident - 1) / resident; };
  const int waves_1 = waves(TileScheduler<Tile<1>>(args.m, args.n).clusters(), resident_1);
  const int waves_2 = waves(TileScheduler<Tile<2>>(args.m, args.n).clusters(), resident_2);
  return 2 * waves_2 <= waves_1 ? launch_linear<Tile<2>>(args, resident_2, w_map, x_hi_map, x_lo_map, stream)
                                : launch_linear<Tile<1>>(args, resident_1, w_map, x_hi_map, x_lo_map, stream);
}

}  // namespace fp16x3

// ---------------------------------------------------------------------------- bindings (called through ctypes)

// Makes `device` current for one launch and gives the caller's device back.
struct DeviceGuard {
  int previous = -1;
  cudaError_t error;
  explicit DeviceGuard(int device) {
    int current;
    error = cudaGetDevice(&current);
    if (error != cudaSuccess || current == device) return;
    error = cudaSetDevice(device);
    if (error == cudaSuccess) previous = current;
  }
  ~DeviceGuard() {
    if (previous >= 0) cudaSetDevice(previous);
  }
};

// Calls launch<T>(...) for the dtype; an unknown dtype is cudaErrorInvalidValue.
#define DISPATCH_DTYPE(dtype, launch, ...)       \
  switch (static_cast<DType>(dtype)) {           \
    case DType::kFloat32:                        \
      return launch<float>(__VA_ARGS__);         \
    case DType::kFloat16:                        \
      return launch<__half>(__VA_ARGS__);        \
    case DType::kBFloat16:                       \
      return launch<__nv_bfloat16>(__VA_ARGS__); \
    case DType::kFloat64:                        \
      return launch<double>(__VA_ARGS__);        \
  }                                              \
  return cudaErrorInvalidValue

extern "C" {

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

// z, out: numel contiguous elements; out may equal z.
int epilogue_forward(const void* z, void* out, int64_t numel, double scale, int dtype, int device,
                     cudaStream_t stream) {
  const DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return guard.error;
  DISPATCH_DTYPE(dtype, launch_epilogue_forward, z, out, numel, scale, stream);
}

// grad, z, dz: [rows, cols] contiguous; dbias: [cols] or null; partial_sums: [strips, cols] of the compute type, or
// null with dbias. rows, cols, strips >= 1.
int epilogue_backward(const void* grad, const void* z, void* dz, void* partial_sums, void* dbias, int64_t rows,
                      int64_t cols, int64_t strips, double scale, int dtype, int device, cudaStream_t stream) {
  const DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return guard.error;
  DISPATCH_DTYPE(dtype, launch_epilogue_backward, grad, z, dz, partial_sums, dbias, rows, cols, strips, scale, stream);
}

// Bytes of scratch memory that linear_fp16x3 needs.
int64_t linear_fp16x3_scratch(int64_t m, int64_t k) { return fp16x3::SplitX::bytes(m, k); }

// Float32, compute capability 9.0. x [m, k] and w [n, k] with unit stride along k; k, both row strides and both
// pointers in multiples of 16 bytes; bias [n]; out [m, n] contiguous. m, n, k from 1 to 2^31 - 2048. scratch: 128-byte
// aligned.
int linear_fp16x3(const float* x, const float* w, const float* bias, float* out, void* scratch, int64_t x_stride,
                  int64_t w_stride, int64_t m, int64_t n, int64_t k, double scale, int device, cudaStream_t stream) {
  const DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return guard.error;
  const fp16x3::Arguments args = {
      x, w, bias, out, fp16x3::SplitX(scratch, m, k), x_stride, w_stride, int(m), int(n), int(k), float(scale)};
  return fp16x3::launch(args, device, stream);
}

}  // extern "C"
