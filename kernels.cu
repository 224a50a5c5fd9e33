// out = z + s * sigmoid(z),  z = x * W^T + b        x [M, K]   W [N, K]   b [N]   out [M, N]
//
// All device code of the project. model_new.py compiles this file and calls the extern "C" functions at
// its end through ctypes; nothing of PyTorch or Python is included, so it compiles in seconds.
//
// Which kernel serves which case is decided in model_new.py (`select_kernel`, `select_tile`):
//   on Hopper (sm_90a)   hopper::linear_kernel, which multiplies on the tensor cores and makes out in its epilogue:
//     "fp16x3"           float32 from three fp16 products, x split before by hopper::split_rows_kernel
//     "fp16x1"           float32 from one, where TF32 is allowed
//     "fp16x1_staged"    the same from a copy of W in fp16, for many rows
//     "wgmma16"          float16 and bfloat16
//   "library"            every other architecture, dtype and shape: the GEMM is the library's, and
//                        epilogue_forward_kernel turns z into out, in place where z need not be kept.
// All share the backward:
//   epilogue_backward_kernel   dz = grad * d out / d z and partial column sums of dz, in one sweep
//   reduce_columns_kernel      adds the partial sums in a fixed order: the bias gradient
//   hopper::linear_kernel      dz * W and dz^T * x, in float32 on Hopper; elsewhere they are the library's
//
// The extern "C" functions return a cudaError_t as int, 0 for success, where they do not say otherwise. Sizes are
// element counts.

#ifdef __CUDACC__

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

// The one place where the activation is written down; every kernel calls these two. kFast: for results of 16 bits,
// whose rounding hides an error of |z| * 2^-24 in exp(-z).
template <bool kFast = false> __device__ __forceinline__ float sigmoid(float z) {
  float power, reciprocal;
  if (kFast)
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(z * -1.44269504f));  // -log2(e)
  else
    power = expf(-z);
  // MUFU.RCP is within 1 ulp on [1, inf); an IEEE division would cost ten instructions for half an ulp.
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(1.0f + power));
  return reciprocal;
}
__device__ __forceinline__ double sigmoid(double z) { return 1.0 / (1.0 + exp(-z)); }

template <bool kFast = false> __device__ __forceinline__ float sigmoid_residual(float z, float scale) {
  return z + scale * sigmoid<kFast>(z);
}
__device__ __forceinline__ double sigmoid_residual(double z, double scale) { return z + scale * sigmoid(z); }

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
__device__ __forceinline__ float ld_shared(uint32_t address) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address));
  return v;
}
__device__ __forceinline__ float2 ld_shared_v2(uint32_t address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address));
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
// Waits for the end of the barrier's phase of this parity. semantics: of what is visible then; by default what was done
// in this block, by TMA or by bulk copies.
#define DEFINE_MBARRIER_WAIT(name, semantics)                               \
  __device__ __forceinline__ void name(uint32_t barrier, uint32_t parity) { \
    uint32_t done;                                                          \
    do {                                                                    \
      asm volatile(                                                         \
          "{\n .reg .pred p;\n"                                             \
          " mbarrier.try_wait.parity" semantics                             \
          ".shared::cta.b64 p, [%1], %2;\n"                                 \
          " selp.u32 %0, 1, 0, p;\n}"                                       \
          : "=r"(done)                                                      \
          : "r"(barrier), "r"(parity)                                       \
          : "memory");                                                      \
    } while (!done);                                                        \
  }
DEFINE_MBARRIER_WAIT(mbarrier_wait, "")
DEFINE_MBARRIER_WAIT(mbarrier_wait_cluster, ".acquire.cluster")  // for what other blocks of the cluster have stored

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
// Copies one box from shared memory to a 2-d tensor, but for what of it lies outside, in this thread's current group.
__device__ __forceinline__ void cp_async_bulk_tensor_2d_store(const CUtensorMap* map, int column, int row,
                                                              uint32_t from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(column),
               "r"(row), "r"(from)
               : "memory");
}
__device__ __forceinline__ void cp_async_bulk_commit_group() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until all of this thread's groups but the latest kPending have read their shared memory.
template <int kPending> __device__ __forceinline__ void cp_async_bulk_wait_group_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// Stores four 8 x 8 matrices of 16-bit elements transposed. As in wgmma's accumulators each thread has of each matrix
// row lane / 4, columns 2 (lane % 4) and the next. to: in lane 8 i + j, where column j of matrix i goes, 16 bytes.
__device__ __forceinline__ void stmatrix_x4_trans(uint32_t to, const uint32_t (&matrices)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(matrices[0]),
               "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
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

// wgmma: d [64, kN] (+)= a [64, 16] * b [16, kN], float32 sums. b, and a where it is not in registers, lie in shared
// memory, K-major, and are given by their descriptors; `accumulate` 0 overwrites d. T: __half or __nv_bfloat16.
template <int kN> struct Wgmma;
#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D8(i) D4(i), D4(i + 4)
#define D16(i) D8(i), D8(i + 8)
#define D32(i) D16(i), D16(i + 16)
#define D64(i) D32(i), D32(i + 32)
#define D128(i) D64(i), D64(i + 64)
#define NAMES8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define NAMES16 NAMES8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES32 NAMES16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES64                                                                                            \
  NAMES32                                                                                                  \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
  "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES128                                                                                             \
  NAMES64                                                                                                    \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, "   \
  "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, " \
  "%104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, "   \
  "%121, %122, %123, %124, %125, %126, %127"
// kRegisters: of d, which are the first operands; i0 to i5: the numbers of those that follow. types: of a and b.
#define WGMMA_FROM_SHARED(kN, kRegisters, types, i0, i1, i2)                                                          \
  asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %" #i2                                                             \
               ", 0;\n"                                                                                               \
               " wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32." types " {" NAMES##kRegisters "}, %" #i0 ", %" #i1  \
                                                                                                ", p, 1, 1, 0, 0;\n}" \
               : D##kRegisters(0)                                                                                     \
               : "l"(a), "l"(b), "r"(accumulate))
#define DEFINE_WGMMA(kN, kRegisters, i0, i1, i2, i3, i4, i5)                                                   \
  template <> struct Wgmma<kN> {                                                                               \
    static __device__ __forceinline__ void multiply(float* d, const uint32_t* a, uint64_t b, int accumulate) { \
      asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %" #i5                                                  \
                   ", 0;\n"                                                                                    \
                   " wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32.f16.f16 {" NAMES##kRegisters              \
                   "}, {%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}, %" #i4 ", p, 1, 1, 0;\n}"                     \
                   : D##kRegisters(0)                                                                          \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                     \
    }                                                                                                          \
    template <typename T>                                                                                      \
    static __device__ __forceinline__ void multiply(float* d, uint64_t a, uint64_t b, int accumulate) {        \
      if constexpr (std::is_same_v<T, __half>)                                                                 \
        WGMMA_FROM_SHARED(kN, kRegisters, "f16.f16", i0, i1, i2);                                              \
      else                                                                                                     \
        WGMMA_FROM_SHARED(kN, kRegisters, "bf16.bf16", i0, i1, i2);                                            \
    }                                                                                                          \
  };
DEFINE_WGMMA(16, 8, 8, 9, 10, 11, 12, 13)
DEFINE_WGMMA(32, 16, 16, 17, 18, 19, 20, 21)
DEFINE_WGMMA(64, 32, 32, 33, 34, 35, 36, 37)
DEFINE_WGMMA(128, 64, 64, 65, 66, 67, 68, 69)
DEFINE_WGMMA(256, 128, 128, 129, 130, 131, 132, 133)

// Copies shared memory of this block, in multiples of 16 bytes, to another block of the cluster, and counts the bytes
// on the barrier there.
__device__ __forceinline__ void cp_async_bulk_shared(uint32_t to, uint32_t from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "r"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
// Makes this thread's stores to shared memory visible to what reads it asynchronously, wgmma and bulk copies.
__device__ __forceinline__ void fence_proxy_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

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
__device__ __forceinline__ uint32_t cluster_nctarank() {
  uint32_t blocks;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return blocks;
}
// The address of the same shared-memory offset in another block of the cluster.
__device__ __forceinline__ uint32_t mapa(uint32_t address, uint32_t block) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(block));
  return remote;
}
__device__ __forceinline__ void st_shared_v4(uint32_t to, const float* v) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3])
               : "memory");
}
__device__ __forceinline__ void st_shared_v4(uint32_t to, const uint32_t* v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}
__device__ __forceinline__ void st_shared_b16(uint32_t to, uint16_t v) {
  asm volatile("st.shared.b16 [%0], %1;" ::"r"(to), "h"(v) : "memory");
}
__device__ __forceinline__ void st_shared(uint32_t to, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(v) : "memory");
}
// Stores four floats in another block of the cluster and counts their bytes on the barrier there.
__device__ __forceinline__ void st_async_v4(uint32_t to, const float* v, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
               "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(barrier)
               : "memory");
}
__device__ __forceinline__ void st_async_v2(uint32_t to, const float* v, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(to),
               "f"(v[0]), "f"(v[1]), "r"(barrier)
               : "memory");
}
// True, once v, which is not zero, is known: what depends on it cannot go before the loads that v is made from.
__device__ __forceinline__ bool is_known(float v) {
  uint32_t bits = __float_as_uint(v);
  asm volatile("mov.b32 %0, %0;" : "+r"(bits));
  return bits != 0;
}
// Orders nothing but fence_mbarrier_init.
__device__ __forceinline__ void barrier_cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void barrier_cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void barrier_cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Until the kernel before this one in the stream has finished and its writes are visible.
__device__ __forceinline__ void griddepcontrol_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// Lets the next kernel in the stream start its blocks as soon as there is room for them.
__device__ __forceinline__ void griddepcontrol_launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

#endif  // HAS_SM90A

// ---------------------------------------------------------------------------- the fused layer on Hopper's tensor cores
//
// Hopper's words: a warpgroup is four consecutive warps; wgmma their asynchronous matrix product; TMA, the instruction
//   cp.async.bulk.tensor, copies a box of a tensor to shared memory; an mbarrier is a barrier in shared memory that
//   also counts bytes that arrive; setmaxnreg moves registers between warpgroups; a cluster is blocks that can reach
//   each other's shared memory.
//
// The kernel computes the transpose of out: each of two consumer warpgroups has 64 columns of out, by the tile's rows
// of x, in products of wgmma's A = W [64 n, 16 k] and B = x [rows, 16 k]. There are four kinds of operands:
//
//   kSplit    float32 at full precision. A float32 number a is scaled by a power of two (exact) and written as hi + lo,
//             two fp16 numbers of 11 significant bits each: hi = fp16(a), lo = fp16(a - hi). Then
//             a*b = hi*hi + hi*lo + lo*hi, and what is dropped, lo*lo and the rest below lo, is at most 2^-21 of the
//             product. (Markidis et al. 2018; Ootomo and Yokota 2022.)
//     Range: the scale puts the largest |a| that shares it into [2^14, 2^15), so that lo keeps all its bits for every
//       number down to 2^-17 of the largest, and what is lost below that is at most 2^-39 of the largest. x has one
//       scale a row, W one for every row and block of 64 k. Where few entries of a row of x stand out (see Outliers)
//       they are multiplied apart, in float32, and do not count.
//     Small sums: where a row's large entries meet zeros, the result is made of those that have lost bits. The epilogue
//       knows such sums by their size (see are_lost), and they are computed again in float32. For kRounded and
//       kStaged, too.
//     Accumulation: the tensor core truncates when it adds to its float32 accumulator. So it only ever adds one block
//       of 64 k to a fresh `partial`; the partial is scaled back (exact) and added to `total` by an ordinary fma.
//   kRounded  float32 where PyTorch allows TF32: hi alone, one product, as precise as TF32 at twice its rate.
//     Accumulation: as above where K is split. In tiles of 256 rows the tensor core adds up all of K, and W has one
//     scale a row, which only ever shrinks: where a block of k brings a larger entry, the sums so far are scaled down.
//   kStaged   the same from a copy of W that is rounded beforehand, with one scale a row.
//   kNative   float16 or bfloat16 as they are.
//
// Data flow. x as float32 is converted beforehand, by split_rows_kernel, and multiplied from shared memory. W as
//   float32 comes by TMA to shared memory and is converted in the kernel; nothing about it is stored in global memory.
//   In tiles of 256 rows a warpgroup of converters does that: from W's ring to registers, from there to a second ring,
//   from which it is multiplied. In smaller tiles the consumers do it: each thread loads its part of the fragment,
//   finds the scale with its three neighbours, and A is multiplied from registers. Where both have 16 bits they are
//   multiplied from shared memory as they come.
// Tile. A block computes 128 columns of out, half of them each consumer warpgroup, and kRows rows. A wgmma covers
//   kPanelM of them: all, or with converters 128 of 256, in two panels.
// Warps. One producer thread issues TMA for W, one for x. Where the consumers add up partials the two warpgroups take
//   turns with the tensor cores (but with 128 rows that split K): each does so in the other's turn, and splits W, if it
//   must, while its own products run.
// Rings. W, converted W and x have a ring of shared-memory stages each, every stage with two barriers:
//   full: bytes have landed -> who reads;  empty: every warp that reads it is done -> who writes.
//   W as float32 is free once it is in registers; all else once its products are finished.
// Clusters. Where there are many rows, a cluster has two blocks.
//   With converters they need the same W, for different rows of x: each loads and converts 64 of its 128 rows, and
//     sends them to the other's shared memory. So a converted stage's `empty` barrier counts both blocks' consumers.
//   Else they need the same x: each loads half of it, and TMA multicasts that to both, which halves what x costs the L2
//     cache. So an x stage's `empty` barrier counts both blocks' consumer warps.
//   Where there are few rows, the work is to read W, and tiles are fewer than SMs: the blocks of a cluster, up to four,
//     share a tile, each takes a part of K, and they add up their sums through distributed shared memory, in an order
//     that is always the same.
// Order of k. A product may sum k in any order if both operands agree. A consumer loads W in 16 bytes, four consecutive
//   k, where the fragment wants k = 2q, 2q+1, 2q+8, 2q+9 (q = lane % 4); so split_rows_kernel stores each group of 16 k
//   in the order 0 1 4 5 8 9 12 13 2 3 6 7 10 11 14 15 for it. Converters keep the order that k has.
// Rows of W that begin anywhere (kUnalignedW). TMA reads from multiples of 16 bytes only. So a row is read up to 7
//   numbers early, and x is stored with as many zeros in front of its rows: once for every such shift, by
//   split_rows_kernel, or with 16 bits by copy_rows_kernel. All rows of a tile are multiplied by the same copy of x,
//   so it has every 2nd, 4th or 8th row of W, and column of out. What was read early belongs to another row and may be
//   NaN. It is made 0: in registers, by who converts W, or with 16 bits by the consumers, in shared memory.
// Rows behind the last. What TMA fills with zeros, because it is outside, takes longer than what it copies. So where x
//   is converted and has more than 128 rows it gets copies of its last one, up to whole panels; as 16 bits it is the
//   caller's, and the last tile of 256 rows begins so early that it ends with x (kOverlaps), and of fewer rows than a
//   smaller tile has no more are loaded.
// Stores. From registers, 32 bytes of a row at a time; of 16 bits, in tiles of 256 rows, through shared memory, by TMA,
//   unless rows of out or of W are not in multiples of 16 bytes.
// What short launches wait for. W is fetched as soon as its barriers are set up, before the block's other warps begin,
//   and code that rarely runs lies behind the code that every launch runs: with few rows these are microseconds.

namespace hopper {

enum class Operands { kSplit, kRounded, kStaged, kNative };

constexpr int kTileN = 128, kTileK = 64;
constexpr int kMaxRows = 256;              // of any tile
constexpr int kPaddedRows = 2 * kMaxRows;  // a cluster's rows at most: inverse_scale is as long as multiples of them
constexpr int kConsumerWarpgroups = kTileN / 64;
constexpr int kConsumerThreads = 128 * kConsumerWarpgroups;
[[maybe_unused]] constexpr int kConsumerWarps = 4 * kConsumerWarpgroups;
[[maybe_unused]] constexpr int kConverterWarps = 4;  // where a cluster's blocks share W
constexpr int kMaxSplits = 4;                        // blocks that share a tile
constexpr int kMaxShared = 232448;                   // bytes of a Hopper block

// Where blocks share a tile, each finishes some of its groups of 8 rows, and the others send it their sums for these.
[[maybe_unused]] constexpr int kGroupBytes = 16 * kConsumerThreads;
constexpr int most_groups_sent(int groups) {  // to a block
  int most = 0;
  for (int blocks = 2; blocks <= kMaxSplits; ++blocks)
    most = std::max(most, (blocks - 1) * ((groups + blocks - 1) / blocks));
  return most;
}

// What a block computes, and how. Element: of x, W, bias and out.
template <Operands kOperands_, typename Element_, int kRows_, bool kSplitK_, bool kTransposedW_ = false,
          bool kUnalignedW_ = false>
struct Tile {
  using Element = Element_;
  static constexpr Operands kOperands = kOperands_;
  static constexpr int kRows = kRows_;
  static constexpr bool kSplitK = kSplitK_;            // a cluster's blocks share a tile, or else W or x
  static constexpr bool kTransposedW = kTransposedW_;  // W comes as [k, n], or else as [n, k]
  static_assert(!kTransposedW || kOperands == Operands::kSplit);
  static constexpr bool kUnalignedW = kUnalignedW_;  // W's rows begin anywhere
  static constexpr bool kIsFloat = std::is_same_v<Element, float>;
  static constexpr int kParts = kOperands == Operands::kSplit ? 2 : 1;  // hi, lo
  static constexpr bool kConvertsW = kOperands == Operands::kSplit || kOperands == Operands::kRounded;
  // Float32 W is converted by warps of its own, half of it in each block of a cluster, or else by the consumers.
  static constexpr bool kSharesW = kConvertsW && !kSplitK && kRows == 256;
  static constexpr bool kFromRegisters = kConvertsW && !kSharesW;  // wgmma's A
  // Whether the tensor core only adds up 64 k, or else all.
  static constexpr bool kPromotes = kOperands == Operands::kSplit || kFromRegisters;
  static constexpr bool kKeepsOrder = kTransposedW || kSharesW;  // of k, in x as it is stored
  static_assert(!kUnalignedW || (kOperands != Operands::kStaged && !kTransposedW));
  static constexpr int kUnit = 16 / int(sizeof(Element));       // elements: TMA's rows begin at multiples
  static constexpr int kClusterBlocks = kSplitK ? 1 : 2;        // where they do not share a tile
  static constexpr int kSharers = kSplitK || kSharesW ? 1 : 2;  // blocks that load an x stage together
  // Whether the last of several tiles begins so early that all its rows are in x: what TMA fills with zeros, because it
  // is outside, takes longer than what it copies. Rows in two tiles are stored twice, with the same bits.
  static constexpr bool kOverlaps = kOperands == Operands::kNative && !kSplitK;
  static constexpr int kPanels = kSharesW ? 2 : 1;
  static constexpr int kPanelM = kRows / kPanels;  // columns of wgmma's B
  // Rows of x in one of TMA's boxes: a block's slice of a panel. Where x is the caller's and has fewer rows than a
  // tile, no more: what comes of the rows behind the last, whatever is there, is not stored.
  static __host__ __device__ constexpr int box_rows_of_x(int m) {
    return kOperands == Operands::kNative && kSplitK && m < kPanelM ? m : kPanelM / kSharers;
  }
  // W's stage: boxes whose rows have 128 bytes. [2][kWRows][32] floats, [kWRows / 32][kTileK][32] floats of a
  // transposed W, or [kTileN][64] of 16 bits.
  using WElement = std::conditional_t<kOperands == Operands::kStaged, __half, Element>;  // as it comes by TMA
  using Multiplied = std::conditional_t<kIsFloat, __half, Element>;
  static constexpr int kWRows = kSharesW ? kTileN / 2 : kTileN;
  static constexpr int kWBoxRows = kTransposedW ? kTileK : kWRows;
  static constexpr int kWStageBytes = kWRows * kTileK * int(sizeof(WElement));
  static constexpr int kWBoxes = kWStageBytes / (kWBoxRows * 128);
  // Measured with kSplit: without turns 2 to 8 % more time, but no more with 128 rows that split K.
  static constexpr bool kTakesTurns = kPromotes && !(kSplitK && kRows == 128);
  static constexpr int kColumnStep = kTransposedW && kFromRegisters ? 1 : 8;  // between a thread's two columns of out
  static constexpr int kXPartBytes = kPanelM * kTileK * 2;                    // half or Element [kPanelM][kTileK]
  static constexpr int kXStageBytes = kParts * kXPartBytes;                   // one panel
  static constexpr int kGroups = kRows / 8;                                   // of 8 rows
  // Where blocks share a tile: what the others send this one. See the epilogue.
  static constexpr int kSentGroupBytes = kSplitK ? most_groups_sent(kGroups) * kGroupBytes : 0;
  static constexpr int kSentInverseBytes = kSplitK && kIsFloat ? kTileN * 4 : 0;  // from each
  static constexpr int kSumBytes = kSentGroupBytes + (kMaxSplits - 1) * kSentInverseBytes;
  // Whether out and z can leave by TMA, as boxes of kBoxRows rows by a consumer's 64 columns, each consumer's two in
  // turns.
  static constexpr bool kStoresBoxes = kOperands == Operands::kNative && !kSplitK && !kUnalignedW;
  static constexpr int kBoxRows = 64, kBoxBytes = kBoxRows * 64 * 2;
  static constexpr int kBoxesBytes = kStoresBoxes ? 2 * kConsumerWarpgroups * kBoxBytes : 0;
  // Where blocks share W, another ring has it converted: kParts times half [kTileN][kTileK], and the inverses of the
  // rows' scales. Measured: two stages are too few for hi and lo.
  static constexpr int kConvertedStages = !kSharesW ? 0 : kParts == 2 ? 3 : 4;
  static constexpr int kConvertedPartBytes = kTileN * kTileK * 2, kConvertedBytes = kParts * kConvertedPartBytes;
  static constexpr int kInverseBytes = kTileN * 4;
  static constexpr int kConvertedRingBytes = kConvertedStages * (kConvertedBytes + kInverseBytes);
  // 1024: barriers, and alignment
  static constexpr int kRoom = kMaxShared - kSumBytes - kConvertedRingBytes - kBoxesBytes - 1024;
  // Measured: 'high' wants four stages of float32 W, kSplit two; x has what is left.
  static constexpr int kXStages = kSharesW ? std::min(12, (kRoom - 4 / kParts * kWStageBytes) / kXStageBytes)
                                           : std::min(12, kRoom / (kWStageBytes + kXStageBytes));
  static constexpr int kWStages = std::min(12, (kRoom - kXStages * kXStageBytes) / kWStageBytes);
  static constexpr int kBarrierBytes = (2 * (kWStages + kXStages + kConvertedStages) + 1) * 8;
  static constexpr int kSharedBytes =
      kWStages * kWStageBytes + kXStages * kXStageBytes + kConvertedRingBytes + kBoxesBytes + kSumBytes + kBarrierBytes;
  static constexpr int kWarpgroups = 1 + kSharesW + kConsumerWarpgroups, kThreads = 128 * kWarpgroups;
  // The compiler gives every thread as many registers as the register file has for so many, in multiples of 8; what the
  // producers and converters let go of goes to the consumers.
  static constexpr int kProducerRegisters = 24, kConverterRegisters = 72, kConsumerRegisters = kSharesW ? 208 : 240;
  static_assert(kProducerRegisters + kSharesW * kConverterRegisters + kConsumerWarpgroups * kConsumerRegisters <=
                    65536 / kThreads / 8 * 8 * kWarpgroups,
                "or the consumers would wait for registers for ever");
  static_assert(kXStages >= 2 && kWStages >= 2 && kSharedBytes <= kMaxShared && kRows <= kMaxRows);
  static_assert(kXPartBytes / kSharers % 1024 == 0, "the swizzle repeats every 1024 bytes");
};

// The scale of a group of numbers, from the largest |a| among them: 2^(14 - exponent), at most 2^126 so that its
// inverse is a normal number too (the largest is then below 2^-112 and every bit of it is kept anyway).
__device__ __forceinline__ float scale_of(float largest) {
  return __uint_as_float(min(268u - (__float_as_uint(largest) >> 23), 253u) << 23);
}
__device__ __forceinline__ float inverse_of(float scale) {
  return __uint_as_float((254u << 23) - __float_as_uint(scale));
}

// Two scaled numbers as hi and lo, packed as wgmma and shared memory want them: the first in the lower half.
__device__ __forceinline__ void split2(float a, float b, float scale, uint32_t& hi, uint32_t& lo) {
  const __half2 h = __floats2half2_rn(a * scale, b * scale);
  const float2 back = __half22float2(h);
  const __half2 l = __floats2half2_rn(a * scale - back.x, b * scale - back.y);
  hi = reinterpret_cast<const uint32_t&>(h), lo = reinterpret_cast<const uint32_t&>(l);
}

// The entries of a row of x above 2^-12 of its largest, where they are few. They are left out of hi and lo, so that the
// others get a scale of their own and keep their bits, and the epilogue adds their products in float32.
struct Outliers {
  static constexpr int kMax = 8;
  int k[kMax];  // ascending; -1: no more
  float value[kMax];
};

// The inverse of a row's scale, a power of two, and what else is known of the row: in its sign whether it has outliers,
// in the last bits of its mantissa whether entries were so small for the scale that they became zero, and whether there
// is nothing but outliers.
struct RowScale {
  static constexpr uint32_t kVanished = 1, kOnlyOutliers = 2;
  float marked;

  __device__ __forceinline__ bool is(uint32_t mark) const { return __float_as_uint(marked) & mark; }
  __device__ __forceinline__ bool has_outliers() const { return marked < 0; }
  __device__ __forceinline__ float inverse() const { return __uint_as_float(__float_as_uint(marked) & 0x7f800000); }
};

// How far behind a multiple of 16 bytes W's rows begin, in elements: their shifts, which repeat every `interleave`
// rows, a power of 2.
struct WRows {
  int interleave, offset, step, mask;  // row 0's shift, the next one's more, and modulo mask + 1

  WRows(const void* w, int64_t stride, int element_bytes)
      : interleave(1), offset(int(reinterpret_cast<uintptr_t>(w) % 16) / element_bytes), mask(16 / element_bytes - 1) {
    step = int(stride & mask);
    while (interleave * step & mask) interleave *= 2;
  }
  __host__ __device__ int shift_of(int row) const { return (offset + row * step) & mask; }
  // Every shift is 0.
  bool are_aligned() const { return interleave == 1 && offset == 0; }
};

// What split_rows_kernel makes of a matrix [m, k], and where copy_rows_kernel puts its copies of x, in hi, of 16-bit
// elements of either type. One allocation, whose parts are 128-byte aligned.
struct SplitRows {
  int padded_k;     // k and the zeros in front of it, up to whole blocks
  int rows;         // m and some more, see rows_of
  __half *hi, *lo;  // [copies, rows, padded_k], k in its order or in the one described above; lo is hi where there is
                    // one part
  float* inverse_scale;  // [m up to a multiple of kPaddedRows]; see RowScale
  Outliers* outliers;    // [m], where inverse_scale is negative

  // copies: one for each shift of W's rows; zeros: the most that there are in front of a row.
  SplitRows(void* scratch, int64_t m, int64_t k, int parts, int copies = 1, int zeros = 0)
      : padded_k(int((k + zeros + kTileK - 1) / kTileK * kTileK)),
        rows(int(rows_of(m))),
        hi(static_cast<__half*>(scratch)),
        lo(hi + (parts - 1) * part_size(copies)),
        inverse_scale(reinterpret_cast<float*>(lo + part_size(copies))),
        outliers(reinterpret_cast<Outliers*>(inverse_scale + padded_m(m))) {}
  int64_t part_size(int copies) const { return int64_t(copies) * rows * padded_k; }
  // Where there are more than 128, whole panels of 128, for the reason that kOverlaps has. The rows behind the last, as
  // far as tiles read them, are copies of it: sums of 0 would look as if they had lost their bits.
  static int64_t rows_of(int64_t m) { return m <= 128 ? m : (m + 127) / 128 * 128; }
  static int64_t padded_m(int64_t m) { return (m + kPaddedRows - 1) / kPaddedRows * kPaddedRows; }
  static int64_t bytes(int64_t m, int64_t k, int parts, int copies = 1, int zeros = 0) {
    const SplitRows split(nullptr, m, k, parts, copies, zeros);
    return (reinterpret_cast<uintptr_t>(split.outliers + m) + 127) / 128 * 128;
  }
};

// Four numbers of a row of k, zeros in front and behind. is_aligned: the row begins at a multiple of 16 bytes, and k
// and `at` are multiples of 4.
__device__ __forceinline__ float4 load_four(const float* row, int at, int k, bool is_aligned) {
  if (is_aligned) return at < k ? *reinterpret_cast<const float4*>(row + at) : float4{0, 0, 0, 0};
  auto load = [&](int at_) { return unsigned(at_) < unsigned(k) ? row[at_] : 0; };
  return {load(at), load(at + 1), load(at + 2), load(at + 3)};
}

// One block for each row of x [m, k] with row stride x_stride, and for the rows missing to whole tiles, which get
// copies of the last as far as `split` has them, and inverse_scale 0. kBlockThreads: more where few rows make the next
// kernel wait, which begins on an SM when its blocks are done. kParts: 2 for hi and lo, 1 for hi. kHasOutliers: whether
// they are set apart, as rows of x allow. keeps_order: k keeps its order, or else has that of wgmma's fragments.
// blockIdx: row, copy for a shift of W's rows; of what the copies have in common, the scale and the outliers, the first
// writes.
template <int kBlockThreads, int kParts, bool kHasOutliers>
__global__ void __launch_bounds__(kBlockThreads)
    split_rows_kernel(const float* __restrict__ x, int64_t x_stride, const SplitRows split, const WRows w_rows, int m,
                      int k, bool is_aligned, bool keeps_order) {
#ifdef HAS_SM90A
  griddepcontrol_launch_dependents();
  const bool is_missing = blockIdx.x >= m;
  if (is_missing && threadIdx.x == 0) split.inverse_scale[blockIdx.x] = 0;
  if (blockIdx.x >= split.rows) return;
  const float* row = x + min(int(blockIdx.x), m - 1) * x_stride;
  const int shift = w_rows.shift_of(blockIdx.y);  // zeros in front
  auto load4 = [&](int at) { return load_four(row, at - shift, k, is_aligned); };
  constexpr int kStride = kBlockThreads * 4;
  constexpr int kHeld = 2048 / kBlockThreads;  // float4 a thread keeps between its sweeps: all of them up to K = 8192
  float4 held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) held[i] = load4(threadIdx.x * 4 + i * kStride);
  auto for_each = [&](auto body) {  // of this thread's entries
    auto four = [&](float4 v) { body(v.x), body(v.y), body(v.z), body(v.w); };
#pragma unroll
    for (int i = 0; i < kHeld; ++i) four(held[i]);
    for (int at = threadIdx.x * 4 + kHeld * kStride; at < k + shift; at += kStride) four(load4(at));
  };
  // Over the block; of bits of non-negative floats, which are ordered like the floats.
  __shared__ uint32_t of_warp[2][kBlockThreads / 32];
  auto reduce_max = [&](float value, uint32_t* buffer) {
    const uint32_t in_warp = __reduce_max_sync(~0u, __float_as_uint(value));
    if (threadIdx.x % 32 == 0) buffer[threadIdx.x / 32] = in_warp;
    __syncthreads();
    return __uint_as_float(__reduce_max_sync(~0u, buffer[threadIdx.x % (kBlockThreads / 32)]));
  };
  __shared__ int outlier_count;
  __shared__ Outliers found;
  if (threadIdx.x == 0) outlier_count = 0;

  float largest = 0;
  for_each([&](float v) { largest = fmaxf(largest, fabsf(v)); });
  largest = reduce_max(largest, of_warp[0]);
  const float limit = largest * 0x1p-12f;  // Inf where an entry is Inf: no outliers then
  float scale = scale_of(largest);
  bool has_outliers = false, only_outliers = false;
  if constexpr (kHasOutliers) {
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
    has_outliers = outlier_count > 0 && outlier_count <= Outliers::kMax;
    only_outliers = has_outliers && largest_below == 0;
    if (has_outliers) scale = only_outliers ? 1 : scale_of(largest_below);
    __syncthreads();  // everyone has read the count, which now counts those found
    if (threadIdx.x == 0) outlier_count = 0;
  }
  uint32_t* inverse_scale = reinterpret_cast<uint32_t*>(split.inverse_scale + blockIdx.x);
  // What is known of a row, which its copies have in common, the first writes.
  const bool is_first = blockIdx.y == 0 && !is_missing;
  if (threadIdx.x == 0 && is_first)
    *inverse_scale = __float_as_uint(has_outliers ? -inverse_of(scale) : inverse_of(scale)) |
                     (only_outliers ? RowScale::kOnlyOutliers : 0);
  __syncthreads();

  // Thread q of four has k = 4q .. 4q+3 of a group of 16. The fragment's order wants its first two in the group's first
  // half and the others in the second; one exchange with the neighbour makes that 8 contiguous bytes per thread.
  const bool odd = threadIdx.x % 2;
  __half2 smallest = __floats2half2_rn(INFINITY, INFINITY);  // |hi|
  auto store4 = [&](int at, float4 v) {
    float* entries = &v.x;
    if (has_outliers) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (!(fabsf(entries[e]) > limit)) continue;
        const int slot = atomicAdd(&outlier_count, 1);
        found.k[slot] = at + e - shift;
        found.value[slot] = entries[e];
        entries[e] = 0;
      }
    }
    const int q = at / 4 % 4;
    const int64_t to = (int64_t(blockIdx.y) * split.rows + blockIdx.x) * split.padded_k +
                       (keeps_order ? at : at / 16 * 16 + (odd ? 8 : 0) + q / 2 * 4);
    auto store_part = [&](__half* part, uint32_t first, uint32_t second) {
      const uint32_t other = __shfl_xor_sync(~0u, odd ? first : second, 1);
      if (!keeps_order) (odd ? first : second) = other;
      if (at < split.padded_k) *reinterpret_cast<uint2*>(part + to) = make_uint2(first, second);
    };
    uint32_t h[2], l[2];
    split2(v.x, v.y, scale, h[0], l[0]);
    split2(v.z, v.w, scale, h[1], l[1]);
    for (const uint32_t both : h) smallest = __hmin2(smallest, __habs2(reinterpret_cast<const __half2&>(both)));
    store_part(split.hi, h[0], h[1]);
    if (kParts == 2) store_part(split.lo, l[0], l[1]);
  };
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
    if (i * kStride < split.padded_k) store4(threadIdx.x * 4 + i * kStride, held[i]);
  for (int first = kHeld * kStride; first < split.padded_k; first += kStride)
    store4(threadIdx.x * 4 + first, load4(threadIdx.x * 4 + first));

  if (kHasOutliers && (__low2float(smallest) == 0 || __high2float(smallest) == 0)) {
    bool has_vanished = false;  // or were the numbers themselves 0?
    for_each([&](float v) { has_vanished |= v != 0 && fabsf(v * scale) <= 0x1p-25f; });
    if (has_vanished && is_first) atomicOr(inverse_scale, RowScale::kVanished);
  }
  if (!has_outliers || !is_first) return;
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

// Which tiles come when. Where blocks of a cluster share x they have tiles side by side along n, where W, along m.
// Clusters are numbered along m first, in groups of 1024 rows, then n: what runs at the same time shares W's tiles,
// which are the larger traffic, and the group's part of x stays in the L2 cache.
template <typename T> struct TileScheduler {
  static constexpr int kClusterM = T::kRows * (T::kSharesW ? 2 : 1), kClusterN = kTileN * T::kSharers;
  static constexpr int kGroupM = 1024 / kClusterM;
  int clusters_m, clusters_n;
  int last_m;      // the last tile's first row, where it overlaps the one before
  int interleave;  // rows of W from one of a tile's to the next

  __host__ __device__ TileScheduler(int m, int n, const WRows& w_rows)
      : clusters_m((m + kClusterM - 1) / kClusterM),
        last_m(m > kClusterM ? m - kClusterM : 0),
        interleave(T::kUnalignedW ? w_rows.interleave : 1) {
    const int step = kClusterN * interleave, whole = n / step * interleave;
    clusters_n = whole + (n % step < interleave ? n % step : interleave);
  }
  __host__ __device__ int clusters() const { return clusters_m * clusters_n; }

#ifdef HAS_SM90A
  // body(m0, n0) with the first row and column of out of the tile that block `rank` has of a cluster.
  template <typename Body> __device__ __forceinline__ void tile(int cluster, uint32_t rank, Body body) const {
    const int per_group = kGroupM * clusters_n;
    const int first_m = cluster / per_group * kGroupM, size_m = min(kGroupM, clusters_m - first_m);
    const int cluster_m = first_m + cluster % per_group % size_m, cluster_n = cluster % per_group / size_m;
    const int m0 = cluster_m * kClusterM;
    body((T::kOverlaps ? min(m0, last_m) : m0) + (T::kSharesW ? int(rank) * T::kRows : 0),
         cluster_n / interleave * (kClusterN * interleave) + cluster_n % interleave +
             (T::kSharers > 1 ? int(rank) * kTileN * interleave : 0));
  }
  // The tiles of this block, which is number `rank` of `blocks`, one after the other: a single one where they share it.
  template <typename Body>
  __device__ __forceinline__ void for_each_tile(uint32_t rank, uint32_t blocks, Body body) const {
    int cluster = blockIdx.x / blocks;
#pragma unroll 1
    do {
      tile(cluster, rank, body);
      cluster += gridDim.x / blocks;
    } while (!T::kSplitK && cluster < clusters());
  }
#endif
};

struct Arguments {
  const void* x;               // [m, k], row stride x_stride; x, w, bias, out and z of the tile's Element
  const void* w;               // [n, k], row stride w_stride
  const void* bias;            // [n]
  void* out;                   // [m, n]
  void* z;                     // [m, n], or null where it is not wanted
  SplitRows x_split, w_split;  // of x, where it is float32 or W unaligned; of W with kStaged
  int64_t x_stride, w_stride;
  int m, n, k;
  float scale;           // s
  bool is_aligned;       // rows of x and W begin at multiples of 16 bytes, and k is one of 4
  bool can_store_boxes;  // rows of out and z do
  WRows w_rows;          // with kUnalignedW; else one without shifts
};

// Of out and z, where they are stored as boxes. z: zeros where it is not wanted.
template <bool kStoresBoxes> struct StoreMaps {
  CUtensorMap out, z;
};
template <> struct StoreMaps<false> {};

template <typename T> struct WMaps {
  CUtensorMap of_row[T::kUnalignedW ? T::kUnit : 1];  // of this row and every interleave'th after it
};

#ifdef HAS_SM90A

// Where a ring of stages is used next, and the parity its barriers are waited for with.
template <int kStages> struct Ring {
  uint32_t stage = 0, phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

// A thread's part of float32 W in one block of 64 k: wgmma's four steps of 16 k, and the scales of its two rows, r and
// r + 8.
struct WBlock {
  float step[4][8];  // four consecutive k of row r, four of row r + 8
  float scale[2];
};

// address: of the thread's 16 bytes of step 0 in row r. Under the swizzle those of step 1 differ in one bit.
__device__ __forceinline__ void load_step(WBlock& block, int step, uint32_t address) {
  address = (step % 2 ? address ^ 64 : address) + step / 2 * (kTileN * 128);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float4 v = ld_shared_v4(address + half * (8 * 128));
    float* to = block.step[step] + 4 * half;
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  }
}

// The same of a transposed W, whose k are in their own order. address: of the thread's 8 bytes, rows r and r + 8, in
// k = 2q. Those of k = 2q + 1 differ in one bit under the swizzle, those of k + 8 do not.
__device__ __forceinline__ void load_step_transposed(WBlock& block, int step, uint32_t address) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // k = 2q, 2q + 1, 2q + 8, 2q + 9
    const int k = step * 16 + i % 2 + i / 2 * 8;
    const float2 v = ld_shared_v2((i % 2 ? address ^ 16 : address) + k * 128);
    block.step[step][i] = v.x, block.step[step][4 + i] = v.y;
  }
}

// For the largest |w| of a row's 64: this thread's sixteen and its three neighbours'. half: row r or r + 8.
__device__ __forceinline__ float scale_of_row(const WBlock& block, int half) {
  float largest = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) largest = fmaxf(largest, fabsf(block.step[i / 4][4 * half + i % 4]));
  largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
  largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
  return scale_of(largest);
}

// A step's part of operand A: the four registers of wgmma's 64 x 16 fragment, hi, then lo where there are two parts.
template <int kParts> __device__ __forceinline__ void split_step(uint32_t* fragment, const WBlock& block, int step) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // row r or r + 8, the earlier two k or the later
    const float* two = block.step[step] + 4 * (i % 2) + i / 2 * 2;
    uint32_t lo;
    split2(two[0], two[1], block.scale[i % 2], fragment[i], lo);
    if (kParts == 2) fragment[4 + i] = lo;
  }
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
__global__ void __launch_bounds__(T::kThreads, 1)
    linear_kernel(const __grid_constant__ WMaps<T> w_maps, const __grid_constant__ CUtensorMap x_map,
                  const __grid_constant__ CUtensorMap x_lo_map,
                  const __grid_constant__ StoreMaps<T::kStoresBoxes> store_maps,
                  const __grid_constant__ Arguments args) {
#ifdef HAS_SM90A
  using Element = typename T::Element;
  constexpr int kFirstConsumer = T::kThreads / 32 - kConsumerWarps;
  constexpr int kPanels = T::kPanels, kWStages = T::kWStages, kXStages = T::kXStages,
                kConvertedStages = T::kConvertedStages;
  extern __shared__ __align__(1024) uint8_t shared_memory[];  // the swizzle repeats every 1024 bytes
  const uint32_t w_stages = shared_address(shared_memory), x_stages = w_stages + kWStages * T::kWStageBytes;
  const uint32_t converted = x_stages + kXStages * T::kXStageBytes;  // converted W, and behind it the scales' inverses
  const uint32_t inverses = converted + kConvertedStages * T::kConvertedBytes;
  const uint32_t boxes = converted + T::kConvertedRingBytes;  // of out and z, on their way
  const uint32_t sums = boxes + T::kBoxesBytes;               // what blocks that share a tile send this one
  const uint32_t w_full = sums + T::kSumBytes, w_empty = w_full + 8 * kWStages;
  const uint32_t x_full = w_empty + 8 * kWStages, x_empty = x_full + 8 * kXStages;
  const uint32_t converted_full = x_empty + 8 * kXStages, converted_empty = converted_full + 8 * kConvertedStages;
  const uint32_t sums_full = converted_empty + 8 * kConvertedStages;
  const uint32_t rank = cluster_ctarank(), blocks = T::kSplitK ? cluster_nctarank() : T::kClusterBlocks;
  // Through a shuffle, so that the compiler knows it to be the same in the whole warp and keeps what follows from it
  // in uniform registers.
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;

  // Where blocks share a tile: the groups of 8 rows that this one finishes.
  const int groups_per_block = (T::kGroups + int(blocks) - 1) / int(blocks);
  const int first_group = min(int(rank) * groups_per_block, T::kGroups);
  const int last_group = min(first_group + groups_per_block, T::kGroups);

  // This block's part of k, in blocks of 64.
  const int all_blocks = (args.k + (T::kUnalignedW ? args.w_rows.mask : 0) + kTileK - 1) / kTileK;
  const int k_begin = T::kSplitK ? int(int64_t(all_blocks) * rank / blocks) : 0;
  const int k_end = T::kSplitK ? int(int64_t(all_blocks) * (rank + 1) / blocks) : all_blocks;

  const int k_loaded = min(k_end, k_begin + kWStages);  // up to here W is fetched before all else begins
  const TileScheduler<T> scheduler(args.m, args.n, args.w_rows);
  const int n_step = scheduler.interleave;                                        // between a tile's columns of out
  auto copy_of = [&](int n0) { return T::kUnalignedW ? n0 & (n_step - 1) : 0; };  // of x, for its shift
  auto shift_of = [&](int n0) { return T::kUnalignedW ? args.w_rows.shift_of(copy_of(n0)) : 0; };
  auto fetch_w = [&](int n0, int k_block, Ring<kWStages>& ring) {
    const uint32_t barrier = w_full + 8 * ring.stage, to = w_stages + ring.stage * T::kWStageBytes;
    mbarrier_arrive_expect_tx(barrier, T::kWStageBytes);
    const int k0 = k_block * kTileK;
    const CUtensorMap* map = w_maps.of_row + copy_of(n0);
    if (T::kUnalignedW) n0 /= n_step;              // a row of the map
    if (T::kSharesW) n0 += int(rank) * T::kWRows;  // this block's half
    for (int box = 0; box < T::kWBoxes; ++box)
      cp_async_bulk_tensor_2d(to + box * T::kWBoxRows * 128, map, T::kTransposedW ? n0 + box * 32 : k0 + box * 32,
                              T::kTransposedW ? k0 : n0, barrier, 1 << rank);
    ring.advance();
  };

  if (threadIdx.x == 0) {
    for (int i = 0; i < kWStages; ++i) {
      mbarrier_init(w_full + 8 * i, 1);
      mbarrier_init(w_empty + 8 * i, T::kSharesW ? kConverterWarps : kConsumerWarps);
    }
    for (int i = 0; i < kConvertedStages; ++i) {
      mbarrier_init(converted_full + 8 * i, 32 * kConverterWarps);
      mbarrier_init(converted_empty + 8 * i, (32 + 1) * kConsumerWarps);
    }
    for (int i = 0; i < kXStages; ++i) {
      mbarrier_init(x_full + 8 * i, 1);
      mbarrier_init(x_empty + 8 * i, kConsumerWarps * T::kSharers);
    }
    mbarrier_init(sums_full, 1);
    fence_mbarrier_init();
    if (T::kSplitK)  // what every other block sends this one
      mbarrier_arrive_expect_tx(sums_full, (int(blocks) - 1) * ((last_group - first_group) * kGroupBytes +
                                                                (last_group > first_group ? T::kSentInverseBytes : 0)));
    // W's ring is empty, and this block's own: it can be filled at once.
    scheduler.tile(blockIdx.x / blocks, rank, [&](int, int n0) {
      Ring<kWStages> ring;
#pragma unroll 1
      for (int k_block = k_begin; k_block < k_loaded; ++k_block) fetch_w(n0, k_block, ring);
    });
    prefetch_tensormap(&x_map);
    prefetch_tensormap(&x_lo_map);
  }
  __syncthreads();
  // Before anything of another block's is touched; where they share a tile that is at its end.
  barrier_cluster_arrive_relaxed();
  if (!T::kSplitK) barrier_cluster_wait();

  // A tile's panels that have rows of x. Measured: those that have none, loaded as zeros, take longer than others.
  auto panels_of = [&](int m0) {
    return T::kSharesW ? max(0, min(kPanels, (args.m - m0 + T::kPanelM - 1) / T::kPanelM)) : 1;
  };

  // No block may end while another still multicasts or copies to it, or arrives on its barriers.
  auto end = [] {
    if (T::kSplitK) return;
    barrier_cluster_arrive();
    barrier_cluster_wait();
  };

  if (warp < 4) {  // ------------------------------------------------------------ producers
    setmaxnreg_dec<T::kProducerRegisters>();
    if (lane == 0 && warp < 2) {
      auto issue_x = [&](int m0, int k_block, Ring<kXStages> ring) {  // this block's slice, for all that share it
        const int slice = T::kSharers == 1 ? 0 : int(rank) * T::box_rows_of_x(args.m);
        const uint16_t sharers = T::kSharers == 1 ? 1 << rank : (1 << T::kSharers) - 1;
        const uint32_t barrier = x_full + 8 * ring.stage;
        const uint32_t to = x_stages + ring.stage * T::kXStageBytes + slice * 128;
        mbarrier_wait(x_empty + 8 * ring.stage, ring.phase ^ 1);
        mbarrier_arrive_expect_tx(barrier, T::kParts * T::kSharers * T::box_rows_of_x(args.m) * kTileK * 2);
        for (int part = 0; part < T::kParts; ++part)
          cp_async_bulk_tensor_2d(to + part * T::kXPartBytes, part ? &x_lo_map : &x_map, k_block * kTileK, m0 + slice,
                                  barrier, sharers);
      };

      // Two threads, so that W may run ahead by its whole ring while x waits for a stage, and the other way round.
      if (warp == 0) {
        int first = k_loaded;
        Ring<kWStages> ring;  // as it is after these
        if (first - k_begin < kWStages) ring.stage = first - k_begin;
        if (first - k_begin == kWStages) ring.phase = 1;
        scheduler.for_each_tile(rank, blocks, [&](int, int n0) {
#pragma unroll 1
          for (int k_block = first; k_block < k_end; ++k_block) {
            mbarrier_wait(w_empty + 8 * ring.stage, ring.phase ^ 1);
            fetch_w(n0, k_block, ring);
          }
          first = k_begin;
        });
      } else {
        Ring<kXStages> ring;
        // Another kernel may still be at a copy of x; W is the caller's, or a copy made before that one began.
        griddepcontrol_wait();
        scheduler.for_each_tile(rank, blocks, [&](int m0, int n0) {
          const int copy = copy_of(n0) * args.x_split.rows;
#pragma unroll 1
          for (int k_block = k_begin; k_block < k_end; ++k_block)
#pragma unroll 1
            for (int panel = 0; panel < panels_of(m0); ++panel, ring.advance())
              issue_x(copy + m0 + panel * T::kPanelM, k_block, ring);
        });
      }
    }
    __syncwarp();  // the other lanes have waited here
    if (T::kSplitK) barrier_cluster_wait();
  } else if (warp < kFirstConsumer) {  // --------------------------------------------- converters
    if constexpr (T::kSharesW) {
      setmaxnreg_dec<T::kConverterRegisters>();
      // Each warp converts 16 of this block's rows of W, a thread half a row, and sends them to the other block too.
      constexpr int kWarpRows = T::kWRows / kConverterWarps, kHalf = kTileK / 2;
      const int first_row = (warp - 4) * kWarpRows, row = first_row + lane / 2, swizzle = row % 8, half = lane % 2;
      Ring<kWStages> w_ring;
      Ring<kConvertedStages> ring;
      scheduler.for_each_tile(rank, blocks, [&](int, int n0) {
        int early = half == 0 ? shift_of(n0) : 0;  // numbers of another row
        float scale = scale_of(0);
#pragma unroll 1
        for (int k_block = k_begin; k_block < k_end; ++k_block, w_ring.advance(), ring.advance()) {
          const uint32_t w_stage = w_stages + w_ring.stage * T::kWStageBytes;
          float v[kHalf];
          mbarrier_wait(w_full + 8 * w_ring.stage, w_ring.phase);
          // So that the threads of a load touch all banks, those of the second half take its four k, or its chunks of
          // 16 bytes, in another order.
          if constexpr (T::kTransposedW) {
            const uint32_t from =
                (w_stage + (row / 32 * kTileK + half * kHalf) * 128 + row % 32 * 4) ^ half * 4 * (128 + 16);
#pragma unroll
            for (int k = 0; k < kHalf; ++k) v[k] = ld_shared((from ^ k % 8 * (128 + 16)) + k / 8 * 1024);
          } else {
            const uint32_t from = w_stage + (half * T::kWRows + row) * 128 + (half * 4 ^ swizzle) * 16;
#pragma unroll
            for (int i = 0; i < kHalf / 4; ++i) {
              const float4 four = ld_shared_v4(from ^ i * 16);
              v[4 * i] = four.x, v[4 * i + 1] = four.y, v[4 * i + 2] = four.z, v[4 * i + 3] = four.w;
            }
            if (T::kUnalignedW) {
#pragma unroll
              for (int k = 0; k < T::kUnit - 1; ++k) v[k] = k < early ? 0 : v[k];
              early = 0;
            }
          }
          float largest = 0;
#pragma unroll
          for (int k = 0; k < kHalf; ++k) largest = fmaxf(largest, fabsf(v[k]));
          const float needed = scale_of(fmaxf(largest, __shfl_xor_sync(~0u, largest, 1)));
          // Where the sums of all of K share a scale it only shrinks, and by more than it must, so that somewhat larger
          // entries to come need no smaller one.
          scale = T::kPromotes ? needed : needed < scale ? 0.25f * needed : scale;
          __syncwarp();
          if (lane == 0 && is_known(scale)) mbarrier_arrive(w_empty + 8 * w_ring.stage);
          uint32_t parts[2][kHalf / 2];
#pragma unroll
          for (int i = 0; i < kHalf / 2; ++i) split2(v[2 * i], v[2 * i + 1], scale, parts[0][i], parts[1][i]);

          const uint32_t stage = converted + ring.stage * T::kConvertedBytes + rank * (T::kWRows * 128);
          const uint32_t stage_inverses = inverses + ring.stage * T::kInverseBytes + rank * (T::kWRows * 4);
          mbarrier_wait(converted_empty + 8 * ring.stage, ring.phase ^ 1);
#pragma unroll
          for (int part = 0; part < T::kParts; ++part)
#pragma unroll
            for (int i = 0; i < kHalf / 8; ++i) {  // chunks of eight k
              const uint32_t* v4 = parts[part] + 4 * i;
              const bool swapped = T::kTransposedW && half;
              const uint32_t chunk[4] = {swapped ? v4[2] : v4[0], swapped ? v4[3] : v4[1], swapped ? v4[0] : v4[2],
                                         swapped ? v4[1] : v4[3]};
              const int at = half * 4 + (T::kTransposedW ? i : i ^ half * 2);
              st_shared_v4(stage + part * T::kConvertedPartBytes + row * 128 + (at ^ swizzle) * 16, chunk);
            }
          if (half == 0) st_shared(stage_inverses + row * 4, inverse_of(scale));
          fence_proxy_async_shared();
          __syncwarp();
          // Every thread arrives for what it has stored, the first also for what the other block sends, and sends
          // itself.
          const uint32_t barrier = converted_full + 8 * ring.stage, other = rank ^ 1;
          if (lane > 0) {
            mbarrier_arrive(barrier);
          } else {
            mbarrier_arrive_expect_tx(barrier, T::kParts * kWarpRows * 128 + kWarpRows * 4);
            auto send = [&](uint32_t from, int bytes) {
              cp_async_bulk_shared(mapa(from, other), from, bytes, mapa(barrier, other));
            };
            for (int part = 0; part < T::kParts; ++part)
              send(stage + part * T::kConvertedPartBytes + first_row * 128, kWarpRows * 128);
            send(stage_inverses + first_row * 4, kWarpRows * 4);
          }
        }
      });
    }
  } else {  // ------------------------------------------------------------------- consumers
    setmaxnreg_inc<T::kConsumerRegisters>();
    griddepcontrol_wait();  // for inverse_scale, of float32
    const int consumer = (warp - kFirstConsumer) / 4, r = lane / 4, q = lane % 4;
    // W's row that is the fragment's row r; row r + 8 is kColumnStep further. From registers: 0 4 1 5 2 6 3 7 of eight,
    // so that the eight lanes that load 16 bytes together touch all banks under the swizzle, where rows r and r + 1
    // would collide. Transposed: rows r and r + 8 are neighbours, for loads of 8 bytes.
    auto row_of = [&](int r_) {
      const int in_warp = !T::kFromRegisters ? r_ : T::kTransposedW ? 2 * r_ : r_ / 2 + r_ % 2 * 4;
      return (warp - kFirstConsumer) * 16 + in_warp;
    };

    // [groups of 8 m][row r, row r + 8][m = 2q, 2q + 1], written [4 * groups]
    float total[T::kRows / 2];
    auto clear_total = [&] {
#pragma unroll
      for (int i = 0; i < T::kRows / 2; ++i) total[i] = 0;
    };
    // Of row r and of row r + 8: the largest inverse of a scale of W.
    float largest_inverse[2];
    auto note_inverse = [&](const float (&inverse)[2]) {
#pragma unroll
      for (int half = 0; half < 2; ++half) largest_inverse[half] = fmaxf(largest_inverse[half], inverse[half]);
    };
    // W's ring as the consumers see it: of what the converters make, where there are any.
    using WRing = Ring<T::kSharesW ? kConvertedStages : kWStages>;
    constexpr int kStageBytes = T::kSharesW ? T::kConvertedBytes : T::kWStageBytes;
    const uint32_t stages = T::kSharesW ? converted : w_stages;
    const uint32_t full = T::kSharesW ? converted_full : w_full, empty = T::kSharesW ? converted_empty : w_empty;
    WRing w_ring;
    Ring<kXStages> x_ring;
    auto wait_for_w = [&] { mbarrier_wait(full + 8 * w_ring.stage, w_ring.phase); };
    auto wait_for_x = [&] { mbarrier_wait(x_full + 8 * x_ring.stage, x_ring.phase); };
    auto x_descriptor = [&] { return matrix_descriptor(x_stages + x_ring.stage * T::kXStageBytes); };
    auto release_w = [&](WRing& ring, bool is_read = true) {
      if (!T::kSharesW && lane == 0 && is_read) mbarrier_arrive(empty + 8 * ring.stage);
      if (T::kSharesW) {  // every thread here, for the inverses that it has read, and a warp's first there
        __syncwarp();
        if (is_read) mbarrier_arrive(empty + 8 * ring.stage);
        if (lane == 0 && is_read) mbarrier_arrive_remote(empty + 8 * ring.stage, rank ^ 1);
      }
      ring.advance();
    };
    auto release_x = [&](Ring<kXStages>& ring) {
      if (T::kSharers == 1 && lane == 0) mbarrier_arrive(x_empty + 8 * ring.stage);
      if (T::kSharers > 1 && lane < T::kSharers) mbarrier_arrive_remote(x_empty + 8 * ring.stage, lane);
      ring.advance();
    };

    // ---- products of a block of float32 W and a panel, added up apart and then added to the total
    float partial[T::kPromotes ? T::kPanelM / 2 : 1];
    auto add_partial = [&](float* to, const float (&inverse)[2]) {
#pragma unroll
      for (int i = 0; i < T::kPanelM / 2; ++i) to[i] = fmaf(partial[i], inverse[i / 2 % 2], to[i]);
    };
    // The two warpgroups take turns to begin a panel: while one is between two, with nothing in the tensor cores, the
    // other is not.
    const int my_turn = 1 + consumer, other_turn = 2 - consumer;
    auto await_turn = [&] {
      if (T::kTakesTurns) bar_sync(my_turn, kConsumerThreads);
    };
    auto give_turn = [&] {
      if (T::kTakesTurns) bar_arrive(other_turn, kConsumerThreads);
    };
    if (consumer == 1) give_turn();

    // ---- both operands from shared memory: a panel's products with a block of W, which are added to sums
    auto w_descriptor = [&] { return matrix_descriptor(stages + w_ring.stage * kStageBytes + consumer * (64 * 128)); };
    [[maybe_unused]] auto multiply_panel = [&](float* sums, uint32_t w, bool is_first) {
      using Multiplied = typename T::Multiplied;
      using Product = Wgmma<T::kPanelM>;
      wait_for_x();
      const uint32_t x = x_descriptor();
      await_turn();
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < 4; ++step) {  // 16 k are 32 bytes, which is 2 in a descriptor
        const uint64_t a = kDescriptorUpper | (w + 2 * step), b = kDescriptorUpper | (x + 2 * step);
        const bool adds = !is_first || step > 0;
        if (T::kParts == 2) {
          Product::template multiply<Multiplied>(sums, a + T::kConvertedPartBytes / 16, b, adds);
          Product::template multiply<Multiplied>(sums, a, b + T::kXPartBytes / 16, 1);
        }
        Product::template multiply<Multiplied>(sums, a, b, T::kParts == 2 || adds);
      }
      wgmma_commit_group();
      give_turn();
    };

    // ---- from what the converters make
    auto load_inverses = [&](float (&inverse)[2]) {
      const uint32_t from = inverses + w_ring.stage * T::kInverseBytes + row_of(r) * 4;
      inverse[0] = ld_shared(from), inverse[1] = ld_shared(from + T::kColumnStep * 4);
    };
    [[maybe_unused]] auto multiply_converted = [&](int panels) {
      clear_total();
#pragma unroll 1
      for (int left = k_end - k_begin; left > 0; --left) {
        wait_for_w();
        float inverse[2];
        load_inverses(inverse);
        note_inverse(inverse);
        const uint32_t w_block = w_descriptor();
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
          if (panel >= panels) continue;
          multiply_panel(partial, w_block, true);
          wgmma_wait_group<0>();
          release_x(x_ring);
          add_partial(total + panel * (T::kPanelM / 2), inverse);
        }
        release_w(w_ring, is_known(inverse[0]) && is_known(inverse[1]));
      }
    };

    // ---- from registers, converted here
    WBlock w;
    // The thread's first bytes in a stage. Transposed: in row k = 2q of the box that has the warp's columns.
    const uint32_t w_address =
        w_stages + (T::kTransposedW ? row_of(0) / 32 * (kTileK * 128) + 2 * q * 128 +
                                          ((row_of(r) % 32 / 4) ^ (2 * q)) * 16 + row_of(r) % 4 * 4
                                    : row_of(r) * 128 + (q ^ row_of(r) % 8) * 16);
    auto load_w = [&](int step) {
      const uint32_t address = w_address + w_ring.stage * T::kWStageBytes;
      if constexpr (T::kTransposedW)
        load_step_transposed(w, step, address);
      else
        load_step(w, step, address);
    };
    // The scales of what was loaded, after which the stage is given back. They need all of it, and the release is made
    // to depend on them: issued right behind the loads, it would overtake those that wait behind queued wgmmas.
    auto find_scales = [&] {
      w.scale[0] = scale_of_row(w, 0), w.scale[1] = scale_of_row(w, 1);
      __syncwarp();
      release_w(w_ring, is_known(w.scale[0]) && is_known(w.scale[1]));
    };
    // While the tensor cores multiply one step, this warp splits the next and loads the next block into the registers
    // that become free. A block is entered with its scale known and step 0 split.
    uint32_t fragments[2][4 * T::kParts];  // one is multiplied while the other is made
    auto multiply_step = [&](const uint32_t* fragment, int step) {
      const uint32_t x_hi = x_descriptor() + 2 * step;
      if (T::kParts == 2) {
        const uint32_t* lo = fragment + 4;
        Wgmma<T::kPanelM>::multiply(partial, lo, kDescriptorUpper | x_hi, step > 0);
        Wgmma<T::kPanelM>::multiply(partial, fragment, kDescriptorUpper | (x_hi + T::kXPartBytes / 16), 1);
      }
      Wgmma<T::kPanelM>::multiply(partial, fragment, kDescriptorUpper | x_hi, T::kParts == 2 || step > 0);
      wgmma_commit_group();
    };
    auto multiply_block = [&](bool has_next) {
      const float inverse[2] = {inverse_of(w.scale[0]), inverse_of(w.scale[1])};
      wait_for_x();
      if (has_next) wait_for_w();
      await_turn();
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        wgmma_fence();
        multiply_step(fragments[step % 2], step);
        if (step == 2) give_turn();
        if (step < 3) {
          if (step > 0) wgmma_wait_group<1>();  // the step before, which read the other fragment, is done
          split_step<T::kParts>(fragments[(step + 1) % 2], w, step + 1);
        }
        if (has_next) load_w(step);
      }
      if (has_next) {
        find_scales();
        wgmma_wait_group<1>();
        split_step<T::kParts>(fragments[0], w, 0);
      }
      wgmma_wait_group<0>();
      release_x(x_ring);
      add_partial(total, inverse);
      note_inverse(inverse);
    };
    [[maybe_unused]] auto multiply_converting = [&](int shift) {
      clear_total();
      wait_for_w();
#pragma unroll
      for (int step = 0; step < 4; ++step) load_w(step);
      if (T::kUnalignedW && k_begin == 0 && q == 0) {  // what was read early
#pragma unroll
        for (int k = 0; k < T::kUnit - 1; ++k)
          if (k < shift) w.step[0][k] = w.step[0][4 + k] = 0;
      }
      find_scales();
      split_step<T::kParts>(fragments[0], w, 0);
#pragma unroll 1
      for (int left = k_end - k_begin; left > 0; --left) multiply_block(left > 1);
    };

    // ---- the tensor core adds up all of K, both operands from shared memory; a block is released when the next one's
    // products are issued
    auto scale_total = [&](float row_r, float row_r8) {
#pragma unroll
      for (int i = 0; i < T::kRows / 2; ++i) total[i] *= i / 2 % 2 ? row_r8 : row_r;
    };
    [[maybe_unused]] auto multiply_whole = [&](int panels, int shift) {
      WRing w_done = w_ring;
      Ring<kXStages> x_done = x_ring;
      float inverse[2] = {1, 1};
      auto release_read_w = [&] { release_w(w_done, !T::kSharesW || (is_known(inverse[0]) && is_known(inverse[1]))); };
      // What no panel of x is multiplied with must not look like a product that is not finite. It also tells the
      // compiler that what total has been is needed no more.
      if (T::kSharesW) clear_total();
#pragma unroll 1
      for (int k_block = k_begin; k_block < k_end; ++k_block) {
        wait_for_w();
        if (T::kUnalignedW && !T::kSharesW && k_block == 0 && shift > 0) {  // what was read early
          const int row = threadIdx.x % 128;
          if (row < 64)
            for (int k = 0; k < shift; ++k)
              st_shared_b16(stages + w_ring.stage * kStageBytes + (consumer * 64 + row) * 128 + row % 8 * 16 + k * 2,
                            0);
          fence_proxy_async_shared();
          bar_sync(4 + consumer, 128);
        }
        if constexpr (T::kSharesW) {  // a larger entry of W may have made a scale smaller
          float now[2];
          load_inverses(now);
          const bool differs = k_block > k_begin && (now[0] != inverse[0] || now[1] != inverse[1]);
          if (__any_sync(~0u, differs)) {
            wgmma_wait_group<0>();
            scale_total(inverse[0] * inverse_of(now[0]), inverse[1] * inverse_of(now[1]));
          }
          inverse[0] = now[0], inverse[1] = now[1];
        }
        const uint32_t w_block = w_descriptor();
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
          if (panel >= panels) continue;
          multiply_panel(total + panel * (T::kPanelM / 2), w_block, k_block == k_begin);
          x_ring.advance();
          wgmma_wait_group<1>();
          if (panel == 0 && k_block == k_begin) continue;
          if (panel == 0) release_read_w();
          release_x(x_done);
        }
        w_ring.advance();
        if (panels == 0) release_read_w();
      }
      wgmma_wait_group<0>();
      if (panels > 0) release_read_w(), release_x(x_done);
      if constexpr (T::kSharesW) scale_total(inverse[0], inverse[1]), note_inverse(inverse);
    };

    const Element* all_bias = static_cast<const Element*>(args.bias);
    Element* out = static_cast<Element*>(args.out);
    Element* z = static_cast<Element*>(args.z);
    auto bias_of = [&](int n) { return all_bias != nullptr && n < args.n ? to_compute(all_bias[n]) : 0; };
    [[maybe_unused]] const float *all_x = static_cast<const float*>(args.x), *all_w = static_cast<const float*>(args.w);
    [[maybe_unused]] auto w_at = [&](int n, int k) {  // float32
      return T::kTransposedW ? all_w + k * args.w_stride + n : all_w + n * args.w_stride + k;
    };
    // Float32: a bit for each tile, whether this thread has met a product there that is not finite. The lowest is the
    // last tile's, the highest stands for all tiles before the last 31.
    uint32_t not_finite = 0;

    scheduler.for_each_tile(rank, blocks, [&](int m0, int n0) {
      largest_inverse[0] = largest_inverse[1] = 0;
      if constexpr (!T::kPromotes)
        multiply_whole(panels_of(m0), shift_of(n0));
      else if constexpr (T::kSharesW)
        multiply_converted(panels_of(m0));
      else
        multiply_converting(shift_of(n0));

      // Epilogue. The thread's columns of out are n_of(r, 0) and n_of(r, 1). Measured: what is rarely executed should
      // be short or far away, since instructions are read from memory, too. So that z is stored by the same code as
      // out, in a pass of its own with scale 0.
      constexpr int kRowsAtOnce = T::kRows < 128 ? T::kRows : 128;  // of float32 epilogues
      auto n_of = [&](int r_, int half) { return n0 + (row_of(r_) + half * T::kColumnStep) * n_step; };
      if constexpr (T::kOperands == Operands::kStaged) {
        const float inverse[2] = {args.w_split.inverse_scale[n_of(r, 0)], args.w_split.inverse_scale[n_of(r, 1)]};
        scale_total(inverse[0], inverse[1]);
        note_inverse(inverse);
      }
      float bias[2] = {bias_of(n_of(r, 0)), bias_of(n_of(r, 1))};

      // Groups of 8 rows: four of a thread's elements, two rows of out from m = the group's first + 2q and two columns,
      // as [column][row]. A warp's stores fill whole 32-byte sectors.
      // Float32: is a sum so small that what small entries have lost may matter? An entry so small in its scale, where
      // the largest is below 2^15, that its last part is denormal is off by up to 2^-25. Such errors of x or of W add
      // up, at random, to 2^-25 * 2^15 * sqrt(k) times the largest inverse of W's scale, in the scale of x's row. The
      // limit is 2^18 times that, 2^11 with one product. A sum is lost if the thread's other column is within its
      // limit, too, or if it is 2^8 times below its own: one alone may be near 0 by chance. A row of W that is 0 has
      // limit 0, and always agrees; two have nothing to lose. With the largest scale there is, that of zeros and of the
      // smallest numbers, nothing is lost.
      constexpr float kSmallestInverse = 0x1p-126f;
      float limit[2];
      auto find_limit = [&] {
        const float factor = 0x1p-10f * (T::kParts == 2 ? 0x1p18f : 0x1p11f) * sqrtf(args.k);
#pragma unroll
        for (int half = 0; half < 2; ++half)
          limit[half] = largest_inverse[half] > kSmallestInverse ? factor * largest_inverse[half] : 0;
      };
      auto are_lost = [&](float first, float second, bool (&lost)[2]) {
        const bool both = first <= limit[0] && second <= limit[1] && limit[0] + limit[1] > 0;
        lost[0] = both || first < 0x1p-8f * limit[0], lost[1] = both || second < 0x1p-8f * limit[1];
        return lost[0] || lost[1];
      };
      auto may_be_lost = [&](const float* values, auto groups) {  // any of these: nearly never
        float smallest[2] = {INFINITY, INFINITY};
#pragma unroll
        for (int i = 0; i < 4 * decltype(groups)::value; ++i) {
          float& least = smallest[i / 2 % 2];
          least = fminf(least, fabsf(values[i]));
        }
        bool lost[2];
        return are_lost(smallest[0], smallest[1], lost);
      };
      // Float32, what few sums need: adds the outliers' products, in the scale of the row's others, and makes lost sums
      // NaN, to be computed again. A loop, for short code, and so over a copy in local memory, which can be indexed. A
      // sum of 0 is taken for right, unless entries of x became zero.
      auto amend = [&](int m, float* values, auto groups) {
        constexpr int kPairs = 2 * decltype(groups)::value;
        float copy[2 * kPairs];
#pragma unroll
        for (int i = 0; i < 2 * kPairs; ++i) copy[i] = values[i];
#pragma unroll(kPairs > 2 ? 1 : kPairs)
        for (int pair = 0; pair < kPairs; ++pair) {  // a row of out
          const int row_m = m + pair / 2 * 8 + pair % 2;
          float& first = copy[pair / 2 * 4 + pair % 2];
          float& second = copy[pair / 2 * 4 + pair % 2 + 2];
          const RowScale row = {args.x_split.inverse_scale[row_m]};
          if (row.has_outliers()) {
            const Outliers& outliers = args.x_split.outliers[row_m];
#pragma unroll 1
            for (int j = 0; j < Outliers::kMax && outliers.k[j] >= 0; ++j) {
              const float value = outliers.value[j] * inverse_of(row.inverse());
              first = fmaf(value, *w_at(min(n_of(r, 0), args.n - 1), outliers.k[j]), first);
              second = fmaf(value, *w_at(min(n_of(r, 1), args.n - 1), outliers.k[j]), second);
            }
          }
          bool lost[2];
          are_lost(fabsf(first), fabsf(second), lost);
          if (row.is(RowScale::kOnlyOutliers) || row.inverse() <= kSmallestInverse) continue;
          if (lost[0] && (first != 0 || row.is(RowScale::kVanished))) first = NAN;
          if (lost[1] && (second != 0 || row.is(RowScale::kVanished))) second = NAN;
        }
#pragma unroll
        for (int i = 0; i < 2 * kPairs; ++i) values[i] = copy[i];
      };
      // x's inverse_scale of rows m and m + 1.
      auto inverses_at = [&](int m) { return *reinterpret_cast<const float2*>(args.x_split.inverse_scale + m); };
      // Float32. first: the first group's inverses. check: NaN once a product is not finite.
      auto store_float = [&](float* to, float scale, int m, const float* values, float2 first, auto groups,
                             float& check) {
        to += int64_t(m) * args.n + n_of(r, 0);
#pragma unroll
        for (int group = 0; group < decltype(groups)::value; ++group, to += 8 * int64_t(args.n)) {
          const float2 both = group == 0 ? first : inverses_at(m + 8 * group);
          const RowScale rows[2] = {{both.x}, {both.y}};
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float product = values[4 * group + e] * rows[e % 2].inverse();
            check = fmaf(product, 0.0f, check);
            const float value = sigmoid_residual(product + bias[e / 2], scale);
            if (m + group * 8 + e % 2 < args.m && n_of(r, e / 2) < args.n)
              (e % 2 ? to + args.n : to)[e / 2 * T::kColumnStep * n_step] = value;
          }
        }
      };
      // 16 bits, the same: one by one, where a thread's neighbour has no neighbouring column.
      [[maybe_unused]] auto store_single = [&](Element* to, float scale, int m, const float* values, auto groups) {
        if (m >= args.m) return;
        to += int64_t(m) * args.n + n_of(r, 0);
#pragma unroll
        for (int group = 0; group < decltype(groups)::value; ++group, to += 8 * int64_t(args.n))
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float value = sigmoid_residual<true>(values[4 * group + e] + bias[e / 2], scale);
            if (m + group * 8 + e % 2 < args.m && n_of(r, e / 2) < args.n)
              (e % 2 ? to + args.n : to)[e / 2 * 8 * n_step] = from_compute<Element>(value);
          }
      };
      // Neighbours along n exchange, so that each has two columns of one row: 4 bytes.
      const bool odd = r % 2;
      [[maybe_unused]] const bool is_whole = m0 + T::kRows <= args.m && n0 + kTileN <= args.n && args.n % 2 == 0;
      [[maybe_unused]] auto store_pairs = [&](Element* to, float scale, int m, const float* values, auto groups) {
        constexpr int kGroups = decltype(groups)::value;
        uint32_t both[kGroups][2];
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
          float v[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) v[e] = sigmoid_residual<true>(values[4 * group + e] + bias[e / 2], scale);
          const Vector<Element, 2> even_row = {from_compute<Element>(v[0]), from_compute<Element>(v[2])};
          const Vector<Element, 2> odd_row = {from_compute<Element>(v[1]), from_compute<Element>(v[3])};
          const uint32_t rows[2] = {reinterpret_cast<const uint32_t&>(even_row),
                                    reinterpret_cast<const uint32_t&>(odd_row)};
          const uint32_t kept = odd ? rows[1] : rows[0];
          const uint32_t other = __shfl_xor_sync(~0u, odd ? rows[0] : rows[1], 4);
          both[group][0] = __byte_perm(kept, other, odd ? 0x1054 : 0x5410);  // the even neighbour's is the lower half
          both[group][1] = __byte_perm(kept, other, odd ? 0x3276 : 0x7632);
        }
        const int row = m + odd, n = n_of(r - odd, 0);
        to += int64_t(row) * args.n + n;
        if (is_whole) {
#pragma unroll
          for (int group = 0; group < kGroups; ++group, to += 8 * int64_t(args.n)) {
            *reinterpret_cast<uint32_t*>(to) = both[group][0];
            *reinterpret_cast<uint32_t*>(to + 8) = both[group][1];
          }
        } else {
#pragma unroll
          for (int i = 0; i < 4 * kGroups; ++i) {
            const int group = i / 4, half = i / 2 % 2, column = half * 8 + i % 2;
            if (row + group * 8 < args.m && n + column < args.n)
              to[group * 8 * int64_t(args.n) + column] = reinterpret_cast<const Element*>(&both[group][half])[i % 2];
          }
        }
      };
      // 16 bits: through shared memory, from where TMA stores whole lines while the next box is made.
      [[maybe_unused]] auto store_boxes = [&](const CUtensorMap* map, float scale, const float* values) {
        const bool is_first = threadIdx.x % 128 == 0;  // of the warpgroup
        // stmatrix's matrices: columns r of a group of 8 rows, r + 8, and the same of the next. Under TMA's swizzle.
        const int matrix = lane / 8, row = lane % 8, column = (warp - kFirstConsumer) % 4 * 2 + matrix % 2;
        const uint32_t mine =
            boxes + consumer * (2 * T::kBoxBytes) + (matrix / 2 * 8 + row) * 128 + (column ^ row) * 16;
#pragma unroll
        for (int box = 0; box < T::kRows / T::kBoxRows; ++box) {
          const uint32_t offset = box % 2 * T::kBoxBytes;
          if (is_first) cp_async_bulk_wait_group_read<1>();  // the box before the last, which was here, has left
          bar_sync(4 + consumer, 128);
#pragma unroll
          for (int first_row = 0; first_row < T::kBoxRows; first_row += 16) {
            const float* v = values + (box * T::kBoxRows + first_row) / 8 * 4;
            uint32_t matrices[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              Vector<Element, 2> two;
#pragma unroll
              for (int e = 0; e < 2; ++e)
                two.v[e] = from_compute<Element>(sigmoid_residual<true>(v[2 * i + e] + bias[i % 2], scale));
              matrices[i] = reinterpret_cast<const uint32_t&>(two);
            }
            stmatrix_x4_trans(mine + offset + first_row * 128, matrices);
          }
          fence_proxy_async_shared();
          bar_sync(4 + consumer, 128);
          if (is_first) {
            cp_async_bulk_tensor_2d_store(map, n0 + consumer * 64, m0 + box * T::kBoxRows,
                                          boxes + consumer * (2 * T::kBoxBytes) + offset);
            cp_async_bulk_commit_group();
          }
        }
      };
      // m: the first group's first + 2q. first: float32, inverses_at(m), loaded before what branches here.
      auto finish = [&](int m, float* values, float2 first, auto groups, bool has_outliers, float& check) {
        if constexpr (T::kIsFloat)
          if (has_outliers || may_be_lost(values, groups)) amend(m, values, groups);
#pragma unroll 1
        for (bool is_z = z != nullptr;; is_z = false) {
          Element* to = is_z ? z : out;
          const float scale = is_z ? 0 : args.scale;
          // Hides from the compiler that both passes begin with the same: it would compute what follows from that once
          // and keep it, but no registers are free.
          asm volatile("" : "+f"(bias[0]), "+f"(bias[1]), "+r"(m));
          if constexpr (T::kIsFloat) {
            store_float(to, scale, m, values, first, groups, check);
          } else if (T::kStoresBoxes && args.can_store_boxes) {
            if constexpr (T::kStoresBoxes) store_boxes(is_z ? &store_maps.z : &store_maps.out, scale, values);
          } else {
            constexpr int kGroups = decltype(groups)::value, kBatch = kGroups < 4 ? kGroups : 4;  // as registers allow
#pragma unroll
            for (int group = 0; group < kGroups; group += kBatch) {
              const auto batch = std::integral_constant<int, kBatch>();
              if constexpr (T::kUnalignedW)
                store_single(to, scale, m + group * 8, values + 4 * group, batch);
              else
                store_pairs(to, scale, m + group * 8, values + 4 * group, batch);
            }
          }
          if (!is_z) break;
        }
      };
      auto sees_outliers = [&](int m_first) {  // a thread, among every 32nd of kRowsAtOnce rows
        bool any = false;
#pragma unroll
        for (int row = 0; row < kRowsAtOnce; row += 32)
          any |= RowScale{args.x_split.inverse_scale[m_first + min(row + lane, kRowsAtOnce - 1)]}.has_outliers();
        return any;
      };

      float check = 0;
      if constexpr (T::kSplitK) {
        // Every block adds up what all have for its groups of rows, in the order of k. So all send it theirs, as
        // [other block][group of the receiver's][thread][4]. Its own it keeps as [group][thread][4] where W's ring was:
        // st.async is not defined where a cluster has one block.
        const uint32_t mine = 16 * (threadIdx.x - (T::kThreads - kConsumerThreads)), own = w_stages + mine;
        const auto sent = [&](int from, int to) {
          return sums + (from - (from > to)) * groups_per_block * kGroupBytes + mine;
        };
        static_assert(T::kGroups * kGroupBytes <= kWStages * T::kWStageBytes);
        // largest_inverse, which a row's four lanes have in common: as [other block][consumer warp][r][row r, r + 8].
        const auto sent_inverses = [&](int from, int to) {
          return sums + T::kSentGroupBytes + (from - (from > to)) * T::kSentInverseBytes +
                 ((warp - kFirstConsumer) * 8 + r) * 8;
        };
        auto send = [&](auto number_of_blocks) {  // known to the compiler, so that few instructions are left
          constexpr int kBlocks = decltype(number_of_blocks)::value, kShare = (T::kGroups + kBlocks - 1) / kBlocks;
#pragma unroll
          for (int owner = 0; owner * kShare < T::kGroups; ++owner) {
            const float* its = total + owner * kShare * 4;
            const int groups = min(kShare, T::kGroups - owner * kShare);
            if (kBlocks == 1 || owner == int(rank)) {
#pragma unroll
              for (int group = 0; group < groups; ++group) st_shared_v4(own + group * kGroupBytes, its + 4 * group);
            } else {
              const uint32_t to = mapa(sent(rank, owner), owner), barrier = mapa(sums_full, owner);
#pragma unroll
              for (int group = 0; group < groups; ++group)
                st_async_v4(to + group * kGroupBytes, its + 4 * group, barrier);
              if (T::kIsFloat && q == 0) st_async_v2(mapa(sent_inverses(rank, owner), owner), largest_inverse, barrier);
            }
          }
        };
        // Loaded before the waiting that follows, which hides how long the L2 cache takes.
        float2 next_inverses = {};
        if (T::kIsFloat) next_inverses = inverses_at(m0 + min(first_group, T::kGroups - 1) * 8 + 2 * q);
        const bool saw_outliers = T::kIsFloat && sees_outliers(m0);
        bar_sync(3, kConsumerThreads);  // both warpgroups are done with W's ring
        barrier_cluster_wait();
        static_assert(kMaxSplits == 4);
        if (blocks == 1) send(std::integral_constant<int, 1>());
        if (blocks == 2) send(std::integral_constant<int, 2>());
        if (blocks == 3) send(std::integral_constant<int, 3>());
        if (blocks == 4) send(std::integral_constant<int, 4>());
        if (first_group < last_group) {
          mbarrier_wait_cluster(sums_full, 0);
#pragma unroll 1
          for (int block = 0; T::kIsFloat && block < int(blocks); ++block) {
            if (block == int(rank)) continue;
            const float2 theirs = ld_shared_v2(sent_inverses(block, rank));
            note_inverse({theirs.x, theirs.y});
          }
        }
        find_limit();
        const bool has_outliers = T::kIsFloat && __any_sync(~0u, saw_outliers);
        uint32_t parts[kMaxSplits];  // of this block's first group
#pragma unroll
        for (int block = 0; block < kMaxSplits; ++block) parts[block] = block == int(rank) ? own : sent(block, rank);
#pragma unroll 1
        for (int group = first_group; group < last_group; ++group) {
          const float2 inverses = next_inverses;
          if (T::kIsFloat) next_inverses = inverses_at(m0 + min(group + 1, last_group - 1) * 8 + 2 * q);
          float values[4] = {};
#pragma unroll
          for (int block = 0; block < kMaxSplits; ++block) {
            if (block >= int(blocks)) continue;
            const float4 part = ld_shared_v4(parts[block]);
            values[0] += part.x, values[1] += part.y, values[2] += part.z, values[3] += part.w;
            parts[block] += kGroupBytes;
          }
          finish(m0 + group * 8 + 2 * q, values, inverses, std::integral_constant<int, 1>(), has_outliers, check);
        }
      } else if constexpr (T::kIsFloat) {
        find_limit();
        // 128 rows after the other, in the same registers.
#pragma unroll 1
        for (int first = 0; first < T::kRows && m0 + first < args.m; first += 128) {
          const int m = m0 + first + 2 * q;
          const bool has_outliers = __any_sync(~0u, sees_outliers(m0 + first));
          finish(m, total, inverses_at(m), std::integral_constant<int, 16>(), has_outliers, check);
#pragma unroll
          for (int i = 0; i < 64; ++i) total[i] = total[T::kRows / 2 - 64 + i];
        }
      } else {
        finish(m0 + 2 * q, total, {}, std::integral_constant<int, T::kGroups>(), false, check);
      }
      not_finite = not_finite << 1 | (not_finite & 1u << 31) | (check != 0);
    });
    if (T::kStoresBoxes && threadIdx.x % 128 == 0) cp_async_bulk_wait_group_read<0>();
    if (consumer == 0) await_turn();  // takes the last turn, so that the barrier ends as it began

    // A product that is not finite may be so because of the conversion (Inf - Inf in lo, an overflow of the scaled
    // sum, or a lost one). Such elements are computed again as float32 dot products, which are NaN or Inf where
    // eager's are. Which they are is read from what was stored, so that no registers need be kept: an element not
    // finite for another reason (bias, s) comes out as it was. Of a tile, what this block has of the warp's 16 columns.
    auto recompute = [&](int m0, int n0) {
      if constexpr (T::kIsFloat) {
        const bool is_aligned = (T::kConvertsW && !T::kTransposedW && !T::kUnalignedW) || args.is_aligned;
        // Rows outside are not used, but must be read from somewhere.
        auto x_row = [&](int m) { return all_x + min(m, args.m - 1) * args.x_stride; };
        auto w_row = [&](int n) { return w_at(min(n, args.n - 1), 0); };
        auto x_four = [&](const float* row, int k) { return load_four(row, k, args.k, is_aligned); };
        auto w_four = [&](const float* row, int k) {
          if (!T::kTransposedW) return load_four(row, k, args.k, is_aligned);
          auto or_zero = [&](int k_) { return k_ < args.k ? row[k_ * args.w_stride] : 0; };
          return float4{or_zero(k), or_zero(k + 1), or_zero(k + 2), or_zero(k + 3)};
        };
        auto is_lost = [&](int m, int n) {
          return m < args.m && n < args.n && !(fabsf(out[int64_t(m) * args.n + n]) < INFINITY);
        };
        auto store = [&](int m, int n, float product) {
          const int64_t at = int64_t(m) * args.n + n;
          const float value = product + bias_of(n);
          if (z != nullptr) z[at] = value;
          out[at] = sigmoid_residual(value, args.scale);
        };
        const int n_first = n0 + (warp - kFirstConsumer) * 16 * n_step;
        const int last = T::kSplitK ? last_group : T::kGroups;
#pragma unroll 1
        for (int group = T::kSplitK ? first_group : 0; group < last; group += 2) {  // patches of 16 rows
          const int m_patch = m0 + group * 8, rows = min(2, last - group) * 8;
          // A thread looks at column lane % 16, every other row from lane / 16 on.
          unsigned lost = 0;
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const int row = 2 * i + lane / 16;
            if (row < rows && is_lost(m_patch + row, n_first + lane % 16 * n_step)) lost |= 1 << i;
          }
          const unsigned count = __reduce_add_sync(~0u, __popc(lost));
          if (count > 32) {
            // Many: the warp multiplies all of them, each thread 8 columns by 4 rows of a quarter of every 16 k, so
            // that an operand loaded serves several. Blocks of k are added up apart: smaller rounding errors.
            const int quarter = lane % 4, n = n_first + lane / 4 % 2 * 8 * n_step, m = m_patch + lane / 8 * 4;
            int64_t x_rows[4], w_rows[8];  // offsets
#pragma unroll
            for (int j = 0; j < 8; ++j) w_rows[j] = w_row(n + j * n_step) - all_w;
#pragma unroll
            for (int i = 0; i < 4; ++i) x_rows[i] = x_row(m + i) - all_x;
            // Or the compiler computes them anew for each load.
#pragma unroll
            for (int i = 0; i < 4; ++i) asm volatile("" : "+l"(x_rows[i]), "+l"(w_rows[i]), "+l"(w_rows[4 + i]));
            float product[8][4] = {};
#pragma unroll 1
            for (int k_block = 0; k_block < args.k; k_block += 4 * kTileK) {
              float sum[8][4] = {};
#pragma unroll 1
              for (int k = k_block + quarter * 4; k < min(k_block + 4 * kTileK, args.k); k += 16) {
                float4 a[8];
#pragma unroll
                for (int j = 0; j < 8; ++j) a[j] = w_four(all_w + w_rows[j], k);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                  const float4 b = x_four(all_x + x_rows[i], k);
#pragma unroll
                  for (int j = 0; j < 8; ++j) sum[j][i] = add_dot(a[j], b, sum[j][i]);
                }
              }
#pragma unroll
              for (int i = 0; i < 32; ++i) product[i / 4][i % 4] += sum[i / 4][i % 4];
            }
#pragma unroll
            for (int j = 0; j < 8; ++j) {
              float mine = 0;  // of row m + quarter
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                float all = product[j][i] + __shfl_xor_sync(~0u, product[j][i], 1);
                all += __shfl_xor_sync(~0u, all, 2);
                if (i == quarter) mine = all;
              }
              if (lane / 8 * 4 + quarter < rows && is_lost(m + quarter, n + j * n_step))
                store(m + quarter, n + j * n_step, mine);
            }
          } else if (count > 0) {  // few: one after the other
            for (unsigned lanes; (lanes = __ballot_sync(~0u, lost != 0)) != 0;) {
              const int owner = __ffs(lanes) - 1;
              const int m = m_patch + 2 * __shfl_sync(~0u, __ffs(lost) - 1, owner) + owner / 16;
              const int n = n_first + owner % 16 * n_step;
              float sum = 0;
#pragma unroll 4
              for (int k = lane * 4; k < args.k; k += 128) sum = add_dot(w_four(w_row(n), k), x_four(x_row(m), k), sum);
              for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
              if (lane == owner) {
                store(m, n, sum);
                lost &= lost - 1;
              }
            }
          }
        }
      }
    };
    if (!T::kIsFloat || !__any_sync(~0u, not_finite != 0)) {
      end();  // here, and not behind the instructions that follow
      return;
    }
    if constexpr (T::kIsFloat) {
      __syncwarp();    // what other threads have stored is read, too
      int later = -1;  // tiles
      scheduler.for_each_tile(rank, blocks, [&](int, int) { ++later; });
      scheduler.for_each_tile(rank, blocks, [&](int m0, int n0) {
        if (__any_sync(~0u, not_finite >> min(later--, 31) & 1)) recompute(m0, n0);
      });
    }
  }
  end();
#endif
}

template <typename T> constexpr CUtensorMapDataType kTensorMapType = CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
template <> constexpr CUtensorMapDataType kTensorMapType<__half> = CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
template <> constexpr CUtensorMapDataType kTensorMapType<__nv_bfloat16> = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;

// A tensor map over a row-major 2-d tensor, boxes of `box_rows` rows of 128 bytes, 128-byte swizzle, zeros outside.
template <typename T>
static cudaError_t encode_tensor_map(CUtensorMap* map, T* base, int64_t rows, int64_t cols, int64_t row_stride,
                                     int box_rows, CUtensorMapL2promotion promotion) {
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
  const cuuint64_t strides[1] = {cuuint64_t(row_stride) * sizeof(T)};
  const cuuint32_t box[2] = {128u / sizeof(T), cuuint32_t(box_rows)}, element_strides[2] = {1, 1};
  const CUresult result =
      encode(map, kTensorMapType<std::remove_const_t<T>>, 2, const_cast<std::remove_const_t<T>*>(base), sizes, strides,
             box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, promotion,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// tile: the rows of a tile, or a multiple.
template <int kBlockThreads, int kParts, bool kHasOutliers>
static cudaError_t launch_split_rows(const void* from, int64_t stride, const SplitRows& to, const WRows& w_rows,
                                     int rows, int tile, int k, bool is_aligned, bool keeps_order,
                                     cudaStream_t stream) {
  const dim3 grid((unsigned(rows) + tile - 1) / tile * tile, unsigned(w_rows.interleave));
  split_rows_kernel<kBlockThreads, kParts, kHasOutliers><<<grid, kBlockThreads, 0, stream>>>(
      static_cast<const float*>(from), stride, to, w_rows, rows, k, is_aligned, keeps_order);
  return cudaGetLastError();
}

constexpr int kCopyThreads = 256, kCopyUnroll = 8;

// to [copies, rows, to_words] = from [m, k], each copy with a shift's zeros in front of its rows, and with zeros
// behind; rows behind the last are copies of it. Elements of kElementBytes, 2 or 4, a row stride of from_stride
// elements. Everything moves in words of 4 bytes, which rows of 2-byte elements may begin in the middle of: a word is
// read if any of it is the row's. blockIdx: row, part of the row, copy.
template <int kElementBytes>
__global__ void __launch_bounds__(kCopyThreads)
    copy_rows_kernel(const char* __restrict__ from, int64_t from_stride, uint32_t* __restrict__ to, int m, unsigned k,
                     unsigned to_words, const WRows w_rows) {
#ifdef HAS_SM90A
  griddepcontrol_launch_dependents();
#endif
  constexpr unsigned kPerWord = 4 / kElementBytes, kPart = kCopyThreads * kCopyUnroll;
  const int zeros = w_rows.shift_of(blockIdx.z);
  const char* row = from + (min(int(blockIdx.x), m - 1) * from_stride - zeros) * kElementBytes;  // of its zeros
  const int shift = kPerWord == 2 && (reinterpret_cast<uintptr_t>(row) & 2) ? 16 : 0;
  const uint32_t* words = reinterpret_cast<const uint32_t*>(row - shift / 8);
  to += (int64_t(blockIdx.z) * gridDim.x + blockIdx.x) * to_words;
  for (unsigned first = blockIdx.y * kPart + threadIdx.x; first < to_words; first += gridDim.y * kPart) {
    uint32_t value[kCopyUnroll];
#pragma unroll
    for (int u = 0; u < kCopyUnroll; ++u) {
      const unsigned at = first + u * kCopyThreads, element = at * kPerWord - zeros;  // the word's first
      const bool has_first = element < k, has_second = kPerWord == 2 && element + 1 < k;
      const uint32_t low = has_first || (shift == 0 && has_second) ? words[at] : 0;
      const uint32_t high = shift != 0 && has_second ? words[at + 1] : 0;
      value[u] = __funnelshift_r(low, high, shift);
      if (kPerWord == 2 && has_first != has_second) value[u] &= has_first ? 0xffff : 0xffff0000;
    }
#pragma unroll
    for (int u = 0; u < kCopyUnroll; ++u)
      if (first + u * kCopyThreads < to_words) to[first + u * kCopyThreads] = value[u];
  }
}

// to: [copies of w_rows, rows, to_stride] elements, its rows in multiples of 4 bytes.
static cudaError_t launch_copy_rows(const void* from, int64_t from_stride, void* to, int64_t rows, int m, int k,
                                    int to_stride, int element_bytes, const WRows& w_rows, cudaStream_t stream) {
  const unsigned words = unsigned(int64_t(to_stride) * element_bytes / 4), part = kCopyThreads * kCopyUnroll;
  const dim3 grid(unsigned(rows), std::min((words + part - 1) / part, 65535u), unsigned(w_rows.interleave));
  const auto kernel = element_bytes == 2 ? copy_rows_kernel<2> : copy_rows_kernel<4>;
  kernel<<<grid, kCopyThreads, 0, stream>>>(static_cast<const char*>(from), from_stride, static_cast<uint32_t*>(to), m,
                                            unsigned(k), words, w_rows);
  return cudaGetLastError();
}

// A launch of linear_kernel<T>. Its attributes are part of it: not to be copied.
template <typename T> struct Launch {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attributes[2] = {};

  Launch(int clusters, int blocks_per_cluster, cudaStream_t stream = nullptr) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {unsigned(blocks_per_cluster), 1, 1};
    // Start while split_rows_kernel or copy_rows_kernel runs out.
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = unsigned(clusters) * blocks_per_cluster;
    config.blockDim = T::kThreads;
    config.dynamicSmemBytes = T::kSharedBytes;
    config.stream = stream;
    config.attrs = attributes;
    // Only where one of the two comes between: what is fetched without waiting, W, was complete before that began. Of
    // 16 bits with aligned rows the launch before may be what makes W, or its copy.
    config.numAttrs = T::kIsFloat || T::kUnalignedW ? 2 : 1;
  }
  Launch(const Launch&) = delete;
};

// Allows the kernel its shared memory on the device, once, and says how many clusters whose blocks share x or W run
// there at once.
template <typename T> static cudaError_t prepare_kernel(int device, int* clusters) {
  static std::atomic<int> known[64];
  if (device < 64 && (*clusters = known[device].load()) > 0) return cudaSuccess;
  const auto kernel = linear_kernel<T>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kSharedBytes);
  if (error != cudaSuccess) return error;
  const Launch<T> launch(1, T::kClusterBlocks);
  error = cudaOccupancyMaxActiveClusters(clusters, kernel, &launch.config);
  if (error == cudaSuccess && *clusters == 0) error = cudaErrorInvalidConfiguration;
  if (error == cudaSuccess && device < 64) known[device].store(*clusters);
  return error;
}

// splits: blocks that share a tile, each with a part of K; 0 where they share x or W.
template <typename T>
static cudaError_t launch_tile(const Arguments& args, int splits, int device, cudaStream_t stream) {
  using Element = typename T::Element;
  cudaError_t error = cudaSuccess;
  // First, so that the GPU has work while the host prepares the rest.
  if constexpr (T::kOperands == Operands::kStaged)
    error = launch_split_rows<256, 1, false>(args.w, args.w_stride, args.w_split, args.w_rows, args.n, kMaxRows, args.k,
                                             args.is_aligned, false, stream);
  if constexpr (T::kIsFloat)
    if (error == cudaSuccess)
      error = launch_split_rows<T::kSplitK ? 512 : 256, T::kParts, true>(
          args.x, args.x_stride, args.x_split, args.w_rows, args.m, TileScheduler<T>::kClusterM, args.k,
          args.is_aligned, T::kKeepsOrder, stream);
  const int64_t all_rows = int64_t(args.x_split.rows) * args.w_rows.interleave;  // of x's copies
  if (all_rows > INT32_MAX - kMaxRows) return cudaErrorInvalidValue;
  if constexpr (T::kUnalignedW && !T::kIsFloat)
    error = launch_copy_rows(args.x, args.x_stride, args.x_split.hi, args.x_split.rows, args.m, args.k,
                             args.x_split.padded_k, 2, args.w_rows, stream);
  WMaps<T> w_maps;
  CUtensorMap x_map, x_lo_map;
  StoreMaps<T::kStoresBoxes> store_maps = {};
  // Measured: without promotion 1 us less where W is only read once, 0.2 % more elsewhere.
  constexpr auto promotion = T::kSplitK ? CU_TENSOR_MAP_L2_PROMOTION_NONE : CU_TENSOR_MAP_L2_PROMOTION_L2_256B;
  const auto encode = [&](CUtensorMap* map, auto* base, int64_t rows, int k, int64_t stride, int box_rows) {
    if (error == cudaSuccess) error = encode_tensor_map(map, base, rows, k, stride, box_rows, promotion);
  };
  const SplitRows &x = args.x_split, &w = args.w_split;
  const int x_rows = T::box_rows_of_x(args.m);
  const Element* entries = static_cast<const Element*>(args.w);
  if constexpr (T::kOperands == Operands::kStaged)
    encode(w_maps.of_row, w.hi, args.n, w.padded_k, w.padded_k, T::kWBoxRows);
  else if constexpr (T::kTransposedW)
    encode(w_maps.of_row, entries, args.k, args.n, args.w_stride, T::kWBoxRows);
  else if constexpr (!T::kUnalignedW)
    encode(w_maps.of_row, entries, args.n, args.k, args.w_stride, T::kWBoxRows);
  else
    for (int row = 0, step = args.w_rows.interleave; row < std::min(step, args.n); ++row) {
      const int shift = args.w_rows.shift_of(row);
      encode(&w_maps.of_row[row], entries + row * args.w_stride - shift, (args.n - row + step - 1) / step,
             args.k + shift, args.w_stride * step, T::kWBoxRows);
    }
  if constexpr (T::kIsFloat) {
    encode(&x_map, x.hi, all_rows, x.padded_k, x.padded_k, x_rows);
    encode(&x_lo_map, x.lo, all_rows, x.padded_k, x.padded_k, x_rows);
  } else if constexpr (T::kUnalignedW) {
    encode(&x_map, reinterpret_cast<const Element*>(x.hi), all_rows, x.padded_k, x.padded_k, x_rows);
    x_lo_map = x_map;
  } else {
    encode(&x_map, static_cast<const Element*>(args.x), args.m, args.k, args.x_stride, x_rows);
    x_lo_map = x_map;
    if constexpr (T::kStoresBoxes)
      if (args.can_store_boxes) {
        encode(&store_maps.out, static_cast<Element*>(args.out), args.m, args.n, args.n, T::kBoxRows);
        if (args.z != nullptr)
          encode(&store_maps.z, static_cast<Element*>(args.z), args.m, args.n, args.n, T::kBoxRows);
      }
  }
  static_assert(kPaddedRows % TileScheduler<T>::kClusterM == 0, "inverse_scale is read up to a cluster's last row");
  int resident;
  if (error == cudaSuccess) error = prepare_kernel<T>(device, &resident);
  if (error != cudaSuccess) return error;
  const int clusters = TileScheduler<T>(args.m, args.n, args.w_rows).clusters();
  const Launch<T> launch(T::kSplitK ? clusters : std::min(resident, clusters), T::kSplitK ? splits : T::kClusterBlocks,
                         stream);
  error = cudaLaunchKernelEx(&launch.config, linear_kernel<T>, w_maps, x_map, x_lo_map, store_maps, args);
  return error != cudaSuccess ? error : cudaGetLastError();
}

// The tiles there are; which is the best is for model_new.py to say.
template <Operands kOperands, typename Element, bool kTransposedW, bool kUnalignedW>
static cudaError_t launch(const Arguments& args, int rows, int splits, int device, cudaStream_t stream) {
  const bool is_split = splits >= 1 && splits <= kMaxSplits && splits <= (args.k + kTileK - 1) / kTileK;
  const auto launch_if = [&](auto tile) { return launch_tile<decltype(tile)>(args, splits, device, stream); };
  if (splits == 0 && rows == 256) return launch_if(Tile<kOperands, Element, 256, false, kTransposedW, kUnalignedW>());
  // Not for an unaligned W: few shapes would want it.
  if constexpr (kOperands == Operands::kSplit && !kUnalignedW)
    if (splits == 0 && rows == 128) return launch_if(Tile<kOperands, Element, 128, false, kTransposedW>());
  // A copy of W (kStaged) pays with many rows only.
  if constexpr (kOperands != Operands::kStaged) {
    if (is_split && rows == 128) return launch_if(Tile<kOperands, Element, 128, true, kTransposedW, kUnalignedW>());
    if (is_split && rows == 64) return launch_if(Tile<kOperands, Element, 64, true, kTransposedW, kUnalignedW>());
    if (is_split && rows == 32) return launch_if(Tile<kOperands, Element, 32, true, kTransposedW, kUnalignedW>());
    if (is_split && rows == 16) return launch_if(Tile<kOperands, Element, 16, true, kTransposedW, kUnalignedW>());
  }
  return cudaErrorInvalidValue;
}
template <Operands kOperands, typename Element>
static cudaError_t launch(const Arguments& args, bool has_aligned_w, int rows, int splits, int device,
                          cudaStream_t stream) {
  return has_aligned_w ? launch<kOperands, Element, false, false>(args, rows, splits, device, stream)
                       : launch<kOperands, Element, false, true>(args, rows, splits, device, stream);
}

}  // namespace hopper

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

// What becomes of x and W; in model_new.py too.
enum class Conversion : int { kNone = 0, kSplit = 1, kRounded = 2, kStaged = 3, kSplitTransposed = 4 };

static int parts_of(Conversion what) {
  return what == Conversion::kSplit || what == Conversion::kSplitTransposed ? 2 : 1;
}

// How linear_hopper reads W: as it is, or in rows that are not in multiples of 16 bytes.
struct ReadsW {
  hopper::WRows rows;
  bool are_aligned;

  // A transposed W is not read along k, and a copy of it (kStaged) is aligned.
  ReadsW(const void* w, int64_t w_stride, int64_t k, DType dtype, Conversion what)
      : rows(w, w_stride, dtype == DType::kFloat32 ? 4 : 2),
        are_aligned(what == Conversion::kSplitTransposed || what == Conversion::kStaged ||
                    (rows.are_aligned() && (k % 4 == 0 || dtype != DType::kFloat32))) {
    if (are_aligned) rows = hopper::WRows(nullptr, 0, 4);
  }
  int zeros_in_front() const { return are_aligned ? 0 : 7; }  // of x's rows, at most
};

// Bytes of scratch memory that linear_hopper needs.
int64_t linear_hopper_scratch(const void* w, int64_t w_stride, int64_t m, int64_t n, int64_t k, int dtype,
                              int conversion) {
  const auto what = static_cast<Conversion>(conversion);
  const ReadsW reads(w, w_stride, k, static_cast<DType>(dtype), what);
  int64_t bytes = 0;
  if (what != Conversion::kNone || !reads.are_aligned)
    bytes += hopper::SplitRows::bytes(m, k, parts_of(what), reads.rows.interleave, reads.zeros_in_front());
  if (what == Conversion::kStaged) bytes += hopper::SplitRows::bytes(n, k, 1);
  return bytes;
}

// The fused layer on compute capability 9.0, in tiles of `rows` by 128; splits: blocks that share a tile, each with a
// part of K, or 0 where pairs of blocks share x or W. cudaErrorInvalidValue for a tile that there is not.
//   conversion: kNone with float16 and bfloat16, one of the others with float32.
//   x [m, k] and w [n, k] with unit stride along k, rows and pointers in multiples of 16 bytes; float32 also k.
//   kStaged: any rows. kSplitTransposed: w is [k, n] with unit stride along n, its rows and pointer in multiples of 16
//   bytes; x has any rows. kNone, kSplit and kRounded: or w has other rows (float32: or k is no multiple of 4), and
//   then x any, but not in tiles of 128 rows that do not share K. bias [n], or null; out [m, n] and z [m, n],
//   contiguous, z null where it is not wanted. m, n, k from 1 to 2^31 - 2048. scratch: 128-byte aligned, null where
//   none is needed.
int linear_hopper(const void* x, const void* w, const void* bias, void* out, void* z, void* scratch, int64_t x_stride,
                  int64_t w_stride, int64_t m, int64_t n, int64_t k, double scale, int dtype, int conversion, int rows,
                  int splits, int device, cudaStream_t stream) {
  using hopper::Operands;
  const DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return guard.error;
  const auto what = static_cast<Conversion>(conversion);
  // Float32 must be converted, 16 bits must not be.
  if ((what == Conversion::kNone) == (static_cast<DType>(dtype) == DType::kFloat32)) return cudaErrorInvalidValue;
  const ReadsW reads(w, w_stride, k, static_cast<DType>(dtype), what);
  const int parts = parts_of(what), copies = reads.rows.interleave, zeros = reads.zeros_in_front();
  if (scratch == nullptr && (what != Conversion::kNone || !reads.are_aligned)) return cudaErrorInvalidValue;
  const hopper::SplitRows x_split(scratch, m, k, parts, copies, zeros);
  const hopper::SplitRows w_split(static_cast<char*>(scratch) + hopper::SplitRows::bytes(m, k, parts, copies, zeros), n,
                                  k, 1);
  const bool has_aligned_w = what == Conversion::kSplitTransposed || hopper::WRows(w, w_stride, 4).are_aligned();
  const bool is_aligned = k % 4 == 0 && x_stride % 4 == 0 && aligned16(x, x, x) && has_aligned_w;
  const bool can_store_boxes = n % 8 == 0 && aligned16(out, z, z);
  const hopper::Arguments args = {
      x,      w,      bias,   out,          z,          x_split,         w_split,   x_stride, w_stride,
      int(m), int(n), int(k), float(scale), is_aligned, can_store_boxes, reads.rows};
  switch (static_cast<DType>(dtype)) {
    case DType::kFloat32:
      switch (what) {
        case Conversion::kSplit:
          return hopper::launch<Operands::kSplit, float>(args, reads.are_aligned, rows, splits, device, stream);
        case Conversion::kRounded:
          return hopper::launch<Operands::kRounded, float>(args, reads.are_aligned, rows, splits, device, stream);
        case Conversion::kStaged:
          return hopper::launch<Operands::kStaged, float, false, false>(args, rows, splits, device, stream);
        case Conversion::kSplitTransposed:
          return hopper::launch<Operands::kSplit, float, true, false>(args, rows, splits, device, stream);
        default:
          return cudaErrorInvalidValue;
      }
    case DType::kFloat16:
      return hopper::launch<Operands::kNative, __half>(args, reads.are_aligned, rows, splits, device, stream);
    case DType::kBFloat16:
      return hopper::launch<Operands::kNative, __nv_bfloat16>(args, reads.are_aligned, rows, splits, device, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

// to [rows, to_stride] = from [rows, k] with unit stride along k, zeros behind; elements of 2 or 4 bytes. to and its
// rows in multiples of 16 bytes.
int pad_rows(const void* from, void* to, int64_t from_stride, int64_t rows, int64_t k, int64_t to_stride,
             int element_bytes, int device, cudaStream_t stream) {
  const DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return guard.error;
  return hopper::launch_copy_rows(from, from_stride, to, rows, int(rows), int(k), int(to_stride), element_bytes,
                                  hopper::WRows(nullptr, 0, element_bytes), stream);
}

}  // extern "C"

#endif  // __CUDACC__
