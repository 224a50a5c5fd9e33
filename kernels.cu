// out = z + s * sigmoid(z),  z = x * W^T + b        x [M, K]   W [N, K]   b [N]   out [M, N]
//
// All of the project that is compiled, in two parts, each for one compiler. nvcc compiles the device code and its C
// interface, with nothing of PyTorch, in seconds. g++ compiles what comes after (`#else  // __CUDACC__`): the choice
// among kernels, and PyTorch's operators, which model_new.py defines, on CUDA tensors.
//
// Contents
//   element types, the activation    a new activation goes into activation() and activation_derivative()
//   element-wise kernels             the library's epilogue, the backward's epilogue, the bias gradient
//   PTX                              one thin function for each instruction
//   preparing rows                   splits float32 rows into fp16 parts
//   namespace hopper                 linear_kernel: GEMM and epilogue in one kernel, for compute capability 9.0
//     tiles, shared memory, scheduler, producers, converters, consumers, exchange between blocks that split K,
//     lost sums and their repair, stores, the kernel, launches
//   the C interface                  what the operators call
//   for g++: which kernel serves a product, operators, autograd, registration
//
// Which kernel serves which case is decided by `select_kernel` in the last part:
//   "fp16x3"         float32 from three fp16 products: hopper::linear_kernel after split_rows_kernel
//   "fp16x1"         float32 from one, where TF32 is allowed, and as accurate
//   "fp16x1_staged"  the same from a copy of W in fp16, for many rows
//   "wgmma16"        float16 and bfloat16
//   "library"        every other architecture, dtype and shape: cuBLAS' GEMM, then epilogue_forward_kernel
// The backward is epilogue_backward_kernel and reduce_columns_kernel, then fp16x3 or the library for its products.
//
// Variants of hopper::linear_kernel. A is W, B is x, from shared memory; a block computes `rows` of out by 128 columns.
//
//   kernel         rows    A comes from  W is converted by  a cluster shares  blocks of 64 k are added by  out leaves
//   fp16x3         256     shared        a warpgroup        W's conversion    an fma each                  registers
//   fp16x3         128     registers     the consumers      x                 an fma each                  registers
//   fp16x3         16-128  registers     the consumers      the tile, by K    an fma each                  registers
//   fp16x1         256     shared        a warpgroup        W's conversion    the tensor core              registers
//   fp16x1         16-128  registers     the consumers      the tile, by K    an fma each                  registers
//   fp16x1_staged  256     shared        split_rows_kernel  x                 the tensor core              registers
//   wgmma16        256     shared        nobody             x                 the tensor core              TMA boxes
//   wgmma16        16-128  shared        nobody             the tile, by K    the tensor core              registers
//
// fp16x3 also exists for a W that comes transposed, as [K, N], for the backward's products.
//
// A kernel for another architecture would be a namespace beside hopper, with a guard like HAS_SM90A, which PTX that
// both have would leave; functions beside linear_hopper and is_hopper in the C interface; a name before kLibrary in
// Kernel and kKernelNames, and costs in kTileCosts; the architecture instead of is_hopper in select_kernel, and in
// select_tile, which knows only Hopper's tiles; a call in launch_hopper; and a flag of the compiler in model_new.py.
//
// The extern "C" functions return a cudaError_t as int, 0 for success, where they do not say otherwise. Sizes are
// element counts.

#include <cstdint>

// Numbers that both parts and model_new.py use.
enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat64 = 3 };
enum class Kernel : int { kWgmma16 = 0, kFp16x3 = 1, kFp16x1 = 2, kFp16x1Staged = 3, kLibrary = 4 };

constexpr int kTileN = 128;    // columns of out in every tile of the fused kernel
constexpr int kTileK = 64;     // it multiplies K in blocks of this many
constexpr int kMaxSplits = 4;  // blocks that share a tile, each with a part of K
constexpr int parts_of(Kernel kernel) { return kernel == Kernel::kFp16x3 ? 2 : 1; }  // of an operand: hi, lo
// Whether pairs of blocks share W, converted, or else x. splits: 0 where blocks do not share a tile.
constexpr bool shares_w(Kernel kernel, int rows, int splits) {
  return (kernel == Kernel::kFp16x3 || kernel == Kernel::kFp16x1) && splits == 0 && rows == 256;
}

// On the host, and in constants: nvcc lets no device code call them.
template <typename T, typename U> constexpr T ceil_div(T size, U unit) { return (size + T(unit) - 1) / T(unit); }
template <typename T, typename U> constexpr T round_up(T size, U unit) { return ceil_div(size, unit) * T(unit); }

// What nvcc's part offers to that for g++; see "The C interface".
typedef struct CUstream_st* cudaStream_t;  // as in CUDA's headers
extern "C" {
const char* error_string(int error);
int is_hopper(int device);
int epilogue_forward(const void* z, void* out, int64_t numel, double scale, int dtype, int device, cudaStream_t stream);
int epilogue_backward(const void* grad, const void* z, void* dz, void* partial_sums, void* dbias, int64_t rows,
                      int64_t cols, int64_t strips, double scale, int dtype, int device, cudaStream_t stream);
int64_t linear_hopper_scratch(int64_t m, int64_t n, int64_t k, int kernel);
int linear_hopper(const void* x, const void* w, const void* bias, void* out, void* z, void* scratch, int64_t x_stride,
                  int64_t w_stride, int64_t m, int64_t n, int64_t k, double scale, int dtype, int kernel,
                  int transposed_w, int rows, int splits, int device, cudaStream_t stream);
}

#ifdef __CUDACC__

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <type_traits>
#include <utility>

// ---------------------------------------------------------------------------- element types and the activation

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

// The activation of z with the layer's number s, and its derivative: every kernel that needs one calls these. The
// formula is repeated in PyTorch's operators, in decomposition and LinearSigmoidResidual::backward in the last part and
// in Model and _decomposition in model_new.py, and in the tests' stand-in cpu_kernels.cpp.
//   Another activation must be element-wise, short and without branches, since the pass that stores z computes it, too,
//   and drops it. Its derivative must follow from z and s, since only z is saved. It may map a finite z to NaN or Inf,
//   and NaN to a number (see "Lost sums"); with s = 0 it may be anything.
// With kFast, for results of 16 bits, exp(-z) has an error of |z| * 2^-24, which their rounding hides.
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

template <bool kFast = false> __device__ __forceinline__ float activation(float z, float s) {
  return z + s * sigmoid<kFast>(z);
}
__device__ __forceinline__ double activation(double z, double s) { return z + s * sigmoid(z); }

// The derivative of activation in z.
template <typename C> __device__ __forceinline__ C activation_derivative(C z, C s) {
  const C p = sigmoid(z);
  return C(1) + s * p * (C(1) - p);
}

// ---------------------------------------------------------------------------- element-wise: the forward's epilogue

constexpr int kEpilogueThreads = 256;
constexpr int kEpilogueUnroll = 4;  // independent 16-byte loads in flight per thread

// out[i] = z[i] + s * sigmoid(z[i]). No __restrict__: out may be z itself, each thread reads before it writes.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kEpilogueThreads)
    epilogue_forward_kernel(const T* z, T* out, int64_t vectors, compute_t<T> s) {
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
    for (int e = 0; e < kWidth; ++e) value[u].v[e] = from_compute<T>(activation(to_compute(value[u].v[e]), s));
    out_vec[i] = value[u];
  }
}

template <typename T, int kWidth>
static cudaError_t launch_epilogue_vectors(const T* z, T* out, int64_t vectors, double s, cudaStream_t stream) {
  if (vectors == 0) return cudaSuccess;
  constexpr int64_t per_block = kEpilogueThreads * kEpilogueUnroll;
  const int64_t blocks = ceil_div(vectors, per_block);  // < 2^31: a grid covers 2^41 elements and more
  epilogue_forward_kernel<T, kWidth>
      <<<dim3(unsigned(blocks)), kEpilogueThreads, 0, stream>>>(z, out, vectors, compute_t<T>(s));
  return cudaGetLastError();
}

template <typename T>
static cudaError_t launch_epilogue_forward(const void* z_, void* out_, int64_t numel, double s, cudaStream_t stream) {
  const T* z = static_cast<const T*>(z_);
  T* out = static_cast<T*>(out_);
  constexpr int width = kVectorWidth<T>;
  const int64_t vectors = aligned16(z, out, out) ? numel / width : 0;
  const int64_t head = vectors * width;
  const cudaError_t error = launch_epilogue_vectors<T, width>(z, out, vectors, s, stream);
  if (error != cudaSuccess) return error;
  return launch_epilogue_vectors<T, 1>(z + head, out + head, numel - head, s, stream);  // the tail, if any
}

// ---------------------------------------------------------------------------- element-wise: the backward's epilogue

constexpr int kBackwardWarps = 8;

// dz = grad * (d out / d z)(z) over a strip of rows, and the strip's column sums of dz.
//   grad, z, dz       [rows, cols], contiguous
//   partial_sums      [gridDim.y, cols], of the compute type
// A block covers 32 * kWidth columns (one warp wide) and rows_per_block rows, shared out over its warps.
// Sums are taken of dz before it is rounded to 16 bits, in an order fixed by the grid: deterministic.
template <typename T, int kWidth>
__global__ void __launch_bounds__(32 * kBackwardWarps)
    epilogue_backward_kernel(const T* __restrict__ grad, const T* __restrict__ z, T* __restrict__ dz,
                             compute_t<T>* __restrict__ partial_sums, int64_t rows, int64_t cols,
                             int64_t rows_per_block, compute_t<T> s) {
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
        const C d = to_compute(g.v[e]) * activation_derivative(to_compute(zv.v[e]), s);
        sum[e] += d;
        result.v[e] = from_compute<T>(d);
      }
      *reinterpret_cast<Vec*>(dz + at) = result;
    }
  }
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

// column_sums[c] = sum over strips of partial_sums[strip, c]. In double: the strips' sums are what is added one after
// the other, and the only roundings left are those inside of strips, which are independent and average out.
template <typename T>
__global__ void reduce_columns_kernel(const compute_t<T>* __restrict__ partial_sums, T* __restrict__ column_sums,
                                      int64_t strips, int64_t cols) {
  const int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= cols) return;
  double total = 0;
  for (int64_t strip = 0; strip < strips; ++strip) total += partial_sums[strip * cols + c];
  column_sums[c] = from_compute<T>(compute_t<T>(total));
}

template <typename T, int kWidth>
static cudaError_t launch_backward_width(const T* grad, const T* z, T* dz, compute_t<T>* partial_sums, T* dbias,
                                         int64_t rows, int64_t cols, int64_t strips, double s, cudaStream_t stream) {
  const int64_t columns_per_block = 32 * kWidth;
  const dim3 grid(unsigned(ceil_div(cols, columns_per_block)), unsigned(strips));
  const int64_t rows_per_block = ceil_div(rows, strips);
  epilogue_backward_kernel<T, kWidth><<<grid, dim3(32, kBackwardWarps), 0, stream>>>(
      grad, z, dz, partial_sums, rows, cols, rows_per_block, compute_t<T>(s));
  reduce_columns_kernel<T><<<unsigned(ceil_div(cols, 128)), 128, 0, stream>>>(partial_sums, dbias, strips, cols);
  return cudaGetLastError();
}

template <typename T>
static cudaError_t launch_epilogue_backward(const void* grad_, const void* z_, void* dz_, void* partial_sums,
                                            void* dbias, int64_t rows, int64_t cols, int64_t strips, double s,
                                            cudaStream_t stream) {
  const T* grad = static_cast<const T*>(grad_);
  const T* z = static_cast<const T*>(z_);
  T* dz = static_cast<T*>(dz_);
  auto* partial = static_cast<compute_t<T>*>(partial_sums);
  constexpr int width = kVectorWidth<T>;
  if (cols % width == 0 && aligned16(grad, z, dz))
    return launch_backward_width<T, width>(grad, z, dz, partial, static_cast<T*>(dbias), rows, cols, strips, s, stream);
  return launch_backward_width<T, 1>(grad, z, dz, partial, static_cast<T*>(dbias), rows, cols, strips, s, stream);
}

// ---------------------------------------------------------------------------- PTX, one thin function each
// The functions have the instructions' names; https://docs.nvidia.com/cuda/parallel-thread-execution describes each.

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)  // compiling for sm_90a: wgmma, setmaxnreg
#define HAS_SM90A 1
#endif

// Waits until the kernel before this one in the stream has finished and its writes are visible.
__device__ __forceinline__ void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the next kernel in the stream start its blocks as soon as there is room for them.
__device__ __forceinline__ void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Returns a if `first`, else b, without a branch: computing both is cheaper.
__device__ __forceinline__ float select(bool first, float a, float b) {
  float result;
  asm("{\n .reg .pred p;\n setp.ne.u32 p, %3, 0;\n selp.f32 %0, %1, %2, p;\n}"
      : "=f"(result)
      : "f"(a), "f"(b), "r"(uint32_t(first)));
  return result;
}
// The largest v of a warp's threads.
__device__ __forceinline__ uint32_t warp_max(uint32_t v) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(~0u, v);
#else
  for (int distance = 16; distance > 0; distance /= 2) v = max(v, __shfl_xor_sync(~0u, v, distance));
  return v;
#endif
}

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
// Waits for the end of the barrier's phase of this parity. Writes made in this block, by TMA and by bulk copies are
// visible then; `semantics` may extend that.
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
DEFINE_MBARRIER_WAIT(mbarrier_wait_cluster, ".acquire.cluster")  // also what other blocks of the cluster have stored

// Copies one box of a 2-d tensor, which begins at (column, row), to the same shared-memory offset of every block in
// `blocks` (a bit mask), and counts its bytes on the barrier at the same offset in each of them. Elements outside of
// the tensor are filled with zeros.
__device__ __forceinline__ void cp_async_bulk_tensor_2d(uint32_t to, const CUtensorMap* map, int column, int row,
                                                        uint32_t barrier, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(blocks)
      : "memory");
}
// Copies one box from shared memory to a 2-d tensor, as part of this thread's current group. Elements outside of the
// tensor are skipped.
__device__ __forceinline__ void cp_async_bulk_tensor_2d_store(const CUtensorMap* map, int column, int row,
                                                              uint32_t from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(column),
               "r"(row), "r"(from)
               : "memory");
}
__device__ __forceinline__ void cp_async_bulk_commit_group() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Waits until all of this thread's groups but the latest kPending have read their shared memory.
template <int kPending> __device__ __forceinline__ void cp_async_bulk_wait_group_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// Stores four 8 x 8 matrices of 16-bit elements transposed. As in wgmma's accumulators each thread has of each matrix
// row lane / 4, columns 2 (lane % 4) and the next. Lane 8 i + j says in `to` where the 16 bytes of column j of matrix i
// go.
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
// After a wait: keeps the compiler from moving uses of the products' sums before it.
template <int kSize> __device__ __forceinline__ void order_after_wait(float (&sums)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// wgmma: d [64, kN] (+)= a [64, k] * b [k, kN], float32 sums. b, and a where it is not in registers, lie in shared
// memory, K-major, and are given by their descriptors; `accumulate` 0 overwrites d. T: __half or __nv_bfloat16, k 16;
// or float, whose upper 19 bits are multiplied as TF32, k 8.
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
// Of the asm's operands d's kRegisters come first; i0, i1, ... are the numbers of those behind them. shape: k and the
// operands' types.
#define WGMMA_FROM_SHARED(kN, kRegisters, shape, flags, i0, i1, i2)                                           \
  asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %" #i2                                                     \
               ", 0;\n"                                                                                       \
               " wgmma.mma_async.sync.aligned.m64n" #kN shape " {" NAMES##kRegisters "}, %" #i0 ", %" #i1     \
                                                                                     ", p, 1, 1" flags ";\n}" \
               : D##kRegisters(0)                                                                             \
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
        WGMMA_FROM_SHARED(kN, kRegisters, "k16.f32.f16.f16", ", 0, 0", i0, i1, i2);                            \
      else if constexpr (std::is_same_v<T, float>)                                                             \
        WGMMA_FROM_SHARED(kN, kRegisters, "k8.f32.tf32.tf32", "", i0, i1, i2);                                 \
      else                                                                                                     \
        WGMMA_FROM_SHARED(kN, kRegisters, "k16.f32.bf16.bf16", ", 0, 0", i0, i1, i2);                          \
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

// Barrier `id` of the block. `threads` counts those that wait at it and those that only arrive.
__device__ __forceinline__ void bar_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void bar_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// bar_sync, and whether `value` is true in any of the threads.
__device__ __forceinline__ bool bar_red_or(int id, int threads, bool value) {
  uint32_t any;
  asm volatile(
      "{\n .reg .pred p, q;\n setp.ne.u32 p, %3, 0;\n"
      " bar.red.or.pred q, %1, %2, p;\n selp.u32 %0, 1, 0, q;\n}"
      : "=r"(any)
      : "r"(id), "r"(threads), "r"(uint32_t(value))
      : "memory");
  return any;
}
template <int kRegisters> __device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters> __device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
__device__ __forceinline__ uint32_t laneid() {
  uint32_t lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
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
__device__ __forceinline__ void st_shared_v2(uint32_t to, uint32_t a, uint32_t b) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to), "r"(a), "r"(b) : "memory");
}
__device__ __forceinline__ void st_shared(uint32_t to, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(v) : "memory");
}
__device__ __forceinline__ void red_shared_or(uint32_t to, uint32_t bits) {
  asm volatile("red.shared.or.b32 [%0], %1;" ::"r"(to), "r"(bits) : "memory");
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
// 0, for any v that is not 0, in a way that the compiler cannot see through: an address to which it is added depends on
// the loads of v, and what uses the address is not issued before they return.
__device__ __forceinline__ uint32_t zero_after(float v) {
  uint32_t bits = __float_as_uint(v);
  asm volatile("mov.b32 %0, %0;" : "+r"(bits));
  return bits == 0;
}
// Relaxed, since it only publishes the barriers' initialization.
__device__ __forceinline__ void barrier_cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void barrier_cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void barrier_cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
#endif  // HAS_SM90A

// ---------------------------------------------------------------------------- float32 as two fp16 numbers
//
// A float32 number a is scaled by a power of two, which is exact, and written as hi + lo, two fp16 numbers of 11
// significant bits each: hi = fp16(a), lo = fp16(a - hi). Then a*b = hi*hi + hi*lo + lo*hi, and what is dropped, lo*lo
// and the rest below lo, is at most 2^-21 of the product. (Markidis et al. 2018; Ootomo and Yokota 2022.)
//
// The scale puts the largest |a| that shares it into [2^14, 2^15), so that lo keeps all its bits for every number down
// to 2^-17 of the largest, and what is lost below that is at most 2^-39 of the largest.

// The scale of a group of numbers, from the largest |a| among them: 2^(14 - exponent), at most 2^126 so that its
// inverse is a normal number too (the largest is then below 2^-112 and every bit of it is kept anyway).
__device__ __forceinline__ float scale_of(float largest) {
  return __uint_as_float(min(268u - (__float_as_uint(largest) >> 23), 253u) << 23);
}
__device__ __forceinline__ float inverse_of(float scale) {
  return __uint_as_float((254u << 23) - __float_as_uint(scale));
}
[[maybe_unused]] constexpr float kCorrection = 1 + 0x1p-23f;  // see "How sums stay accurate"
// The inverse of the largest scale, that of zeros and of numbers so small that none loses bits.
[[maybe_unused]] constexpr float kSmallestInverse = 0x1p-126f;

// Splits two numbers into hi and lo, each packed with the first number in the lower half, as wgmma wants them.
__device__ __forceinline__ void split2(float a, float b, float scale, uint32_t& hi, uint32_t& lo) {
  const __half2 h = __floats2half2_rn(a * scale, b * scale);
  const float2 back = __half22float2(h);
  const __half2 l = __floats2half2_rn(a * scale - back.x, b * scale - back.y);
  hi = reinterpret_cast<const uint32_t&>(h), lo = reinterpret_cast<const uint32_t&>(l);
}

// ---------------------------------------------------------------------------- preparing rows of x and W
// For any architecture: scales of rows, and their split into hi and lo.

constexpr int kPaddedRowsUnit = 512;  // the length of inverse_scale is rounded up to a multiple of this

// The inverse of a row's scale, which is a power of two. The last bit of its mantissa tells whether entries were so
// small for the scale that they became zero.
struct RowInverse {
  static constexpr uint32_t kVanished = 1;
  float marked;

  __device__ __forceinline__ bool has_vanished() const { return __float_as_uint(marked) & kVanished; }
  __device__ __forceinline__ float value() const { return __uint_as_float(__float_as_uint(marked) & 0x7f800000); }
};

// What split_rows_kernel makes of a matrix [m, k]: parts of one allocation, each 128-byte aligned.
struct SplitRows {
  int padded_k;          // k up to whole blocks
  int rows;              // m and padding rows
  __half *hi, *lo;       // [rows, padded_k]; lo is hi where there is one part
  float* inverse_scale;  // [m up to a multiple of kPaddedRowsUnit]; see RowInverse

  SplitRows(void* scratch, int64_t m, int64_t k, int parts)
      : padded_k(int(round_up(k, kTileK))),
        rows(int(rows_of(m))),
        hi(static_cast<__half*>(scratch)),
        lo(hi + (parts - 1) * part_size()),
        inverse_scale(reinterpret_cast<float*>(lo + part_size())) {}
  int64_t part_size() const { return int64_t(rows) * padded_k; }
  // More than 128 rows are padded to whole panels of 128, because TMA takes longer to fill with zeros what is outside
  // than to copy. Padding rows are copies of the last row: sums of 0 would look as if they had lost their bits.
  static int64_t rows_of(int64_t m) { return m <= 128 ? m : round_up(m, 128); }
  static int64_t padded_m(int64_t m) { return round_up(m, kPaddedRowsUnit); }
  static int64_t bytes(int64_t m, int64_t k, int parts) {
    const SplitRows split(nullptr, m, k, parts);
    return round_up(reinterpret_cast<uintptr_t>(split.inverse_scale + padded_m(m)), 128);
  }
};

// Loads four numbers of a row of k. The row begins at a multiple of 16 bytes and goes on with zeros up to a multiple of
// four.
__device__ __forceinline__ float4 load_four(const float* row, int at, int k) {
  return at < k ? *reinterpret_cast<const float4*>(row + at) : float4{0, 0, 0, 0};
}

// Splits a matrix x [m, k] with row stride x_stride, a row in each block. Blocks after the last row make the padding
// rows: copies of the last row as far as `split` has room for them, and an inverse_scale of 0.
//   kBlockThreads  more where rows are few and the next kernel waits, which begins on an SM when its blocks are done
//   kParts         2 for hi and lo, 1 for hi
//   keeps_order    k keeps its order, or else has that of wgmma's fragments (see "The order of k")
template <int kBlockThreads, int kParts>
__global__ void __launch_bounds__(kBlockThreads)
    split_rows_kernel(const float* __restrict__ x, int64_t x_stride, const SplitRows split, int m, int k,
                      bool keeps_order) {
  griddepcontrol_launch_dependents();
  const bool is_padding = blockIdx.x >= m;
  if (is_padding && threadIdx.x == 0) split.inverse_scale[blockIdx.x] = 0;
  if (blockIdx.x >= split.rows) return;
  const float* row = x + min(int(blockIdx.x), m - 1) * x_stride;
  auto load4 = [&](int at) { return load_four(row, at, k); };
  constexpr int kStride = kBlockThreads * 4;
  constexpr int kHeld = 2048 / kBlockThreads;  // float4 a thread keeps between its sweeps: all of them up to K = 8192
  float4 held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) held[i] = load4(threadIdx.x * 4 + i * kStride);
  auto for_each = [&](auto body) {  // of this thread's entries
    auto four = [&](float4 v) { body(v.x), body(v.y), body(v.z), body(v.w); };
#pragma unroll
    for (int i = 0; i < kHeld; ++i) four(held[i]);
    for (int at = threadIdx.x * 4 + kHeld * kStride; at < k; at += kStride) four(load4(at));
  };

  // The row's largest |x|, from the bits of non-negative floats, which are ordered like the floats.
  __shared__ uint32_t of_warp[kBlockThreads / 32];
  float largest = 0;
  for_each([&](float v) { largest = fmaxf(largest, fabsf(v)); });
  const uint32_t in_warp = warp_max(__float_as_uint(largest));
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = in_warp;
  __syncthreads();
  const float scale = scale_of(__uint_as_float(warp_max(of_warp[threadIdx.x % (kBlockThreads / 32)])));
  uint32_t* inverse_scale = reinterpret_cast<uint32_t*>(split.inverse_scale + blockIdx.x);
  if (threadIdx.x == 0 && !is_padding) *inverse_scale = __float_as_uint(inverse_of(scale));
  __syncthreads();

  // Thread q of four has k = 4q .. 4q+3 of a group of 16. The fragment's order wants its first two in the group's first
  // half and the others in the second; one exchange with the neighbour makes that 8 contiguous bytes per thread.
  const bool odd = threadIdx.x % 2;
  __half2 smallest = __floats2half2_rn(INFINITY, INFINITY);  // |hi|
  auto store4 = [&](int at, float4 v) {
    const int q = at / 4 % 4;
    const int64_t to =
        int64_t(blockIdx.x) * split.padded_k + (keeps_order ? at : at / 16 * 16 + (odd ? 8 : 0) + q / 2 * 4);
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

  if (__low2float(smallest) == 0 || __high2float(smallest) == 0) {
    bool has_vanished = false;  // or were the numbers themselves 0?
    for_each([&](float v) { has_vanished |= v != 0 && fabsf(v * scale) <= 0x1p-25f; });
    if (has_vanished && !is_padding) atomicOr(inverse_scale, RowInverse::kVanished);
  }
}

// Blocks up to a multiple of rows_unit, since a tile reads inverse_scale up to its last row.
template <int kBlockThreads, int kParts>
static cudaError_t launch_split_rows(const void* from, int64_t stride, const SplitRows& to, int rows, int rows_unit,
                                     int k, bool keeps_order, cudaStream_t stream) {
  const unsigned grid = round_up(unsigned(rows), rows_unit);
  split_rows_kernel<kBlockThreads, kParts>
      <<<grid, kBlockThreads, 0, stream>>>(static_cast<const float*>(from), stride, to, rows, k, keeps_order);
  return cudaGetLastError();
}

// ---------------------------------------------------------------------------- the fused layer on Hopper's tensor cores
//
// Hopper's words: a warpgroup is four consecutive warps; wgmma is their asynchronous matrix product; TMA, the
//   instruction cp.async.bulk.tensor, copies a box of a tensor to shared memory; an mbarrier is a barrier in shared
//   memory that also counts bytes that arrive; setmaxnreg moves registers between warpgroups; a cluster is a group of
//   blocks that can reach each other's shared memory.
//
// The kernel computes the transpose of out: each of two consumer warpgroups has 64 columns of out, by the tile's rows
// of x, in products of wgmma's A = W [64 n, 16 k] and B = x [rows, 16 k].
//
// Data flow. Float32 x is split beforehand, by split_rows_kernel, and multiplied from shared memory. Float32 W comes by
//   TMA to shared memory and is split in the kernel; nothing of it is stored in global memory. In tiles of 256 rows a
//   warpgroup of converters does that: from W's ring to registers, and from there to a second ring, from which it is
//   multiplied. In smaller tiles the consumers do it: each thread loads its part of the fragment, finds the scale with
//   its three neighbours, and A is multiplied from registers. Only fp16x1_staged reads W twice: split_rows_kernel
//   leaves a copy in fp16. 16-bit operands are multiplied straight from shared memory.
// Scales. x has one scale for each row, W one for every row and block of 64 k. The tensor core truncates when it adds
//   to its float32 accumulator. So it only ever adds one block of 64 k to a fresh `partial`; the partial is scaled back
//   and added to `total` by an ordinary fma, which rounds. With one product (fp16x1) that is not needed: in tiles of
//   256 rows the tensor core adds up all of K, and W has one scale for each row. The converters let that only shrink:
//   where a block of k brings a larger entry, the sums so far are scaled down.
// Tile. A block computes 128 columns of out, half of them each consumer warpgroup, and kRows rows. A wgmma covers
//   kPanelRows of them: all, or with converters 128 of 256, in two panels.
// Warps. One producer thread issues TMA for W, one for x. Where the consumers add up partials the two warpgroups take
//   turns with the tensor cores: each adds up, and splits W if it must, while the other's products run.
// Rings. W, converted W and x have a ring of shared-memory stages each, every stage with two mbarriers:
//     full: its bytes have landed, which its readers wait for
//     empty: all who read it are done, which its writers wait for
//   A stage of float32 W is empty once it is in registers, all others once their products are finished.
// Clusters. Where there are many rows, a cluster has two blocks.
//   With converters they need the same W, for different rows of x: each loads and converts 64 of its 128 rows, and
//     sends them to the other's shared memory, which halves what W costs the L2 cache and the converters. So a
//     converted stage's `empty` barrier counts both blocks' consumers.
//   Without they need the same x: each loads half of it, and TMA multicasts that to both, which halves what x costs the
//     L2 cache. So an x stage's `empty` barrier counts both blocks' consumer warps.
//   Where there are few rows, the work is to read W, and tiles are fewer than SMs: the blocks of a cluster, up to four,
//     share a tile, each takes a part of K, and they add up their sums through distributed shared memory, in an order
//     that is always the same.
// The order of k. A product may sum k in any order if both operands agree. A consumer loads W in 16 bytes, four
//   consecutive k, where the fragment wants k = 2q, 2q+1, 2q+8, 2q+9 (q = lane % 4); so split_rows_kernel stores each
//   group of 16 k in the order 0 1 4 5 8 9 12 13 2 3 6 7 10 11 14 15 for it. Converters keep the order that k has.
// Padding rows. TMA takes longer to fill with zeros what is outside than to copy. So where x is split and has more than
//   128 rows it is padded with copies of its last row up to whole panels. 16-bit x is the caller's; its last tile of
//   256 rows begins so early that it ends with x (kLastTileOverlaps), and smaller tiles load no more rows than there
//   are.
// Stores. They go from registers, 32 bytes of a row at a time; of 16 bits, in tiles of 256 rows, through shared memory,
//   by TMA, unless rows of out are not in multiples of 16 bytes.
// What short launches wait for. W is fetched as soon as its barriers are set up, before the block's other warps begin,
//   and code that rarely runs lies behind the code that every launch runs: with few rows these are microseconds.

namespace hopper {

// ---- Tiles: choices, what follows from them, what must hold

constexpr int kConsumerWarpgroups = kTileN / 64;
constexpr int kConsumerThreads = 128 * kConsumerWarpgroups;
constexpr int kConsumerWarps = 4 * kConsumerWarpgroups;
[[maybe_unused]] constexpr int kConverterWarps = 4;  // where a cluster's blocks share W
constexpr int kMaxShared = 232448;                   // bytes of a Hopper block

// Where blocks share a tile, each finishes some of the tile's groups of 8 rows, and the others send it their sums.
[[maybe_unused]] constexpr int kGroupBytes = 16 * kConsumerThreads;
constexpr int most_groups_sent(int groups) {  // to one block, by all others
  int most = 0;
  for (int blocks = 2; blocks <= kMaxSplits; ++blocks) most = std::max(most, (blocks - 1) * ceil_div(groups, blocks));
  return most;
}

// What a block computes, and how. Element is the type of x, W, bias and out.
template <Kernel kKernel_, typename Element_, int kRows_, bool kSplitK_, bool kTransposedW_ = false> struct Tile {
  // Choices.
  using Element = Element_;
  static constexpr Kernel kKernel = kKernel_;
  static constexpr int kRows = kRows_;
  static constexpr bool kSplitK = kSplitK_;            // a cluster's blocks share a tile, or else W or x
  static constexpr bool kTransposedW = kTransposedW_;  // W comes as [k, n], or else as [n, k]
  static_assert(!kTransposedW || kKernel == Kernel::kFp16x3, "only the backward's products have such a W");
  static constexpr bool kMayLackOut = kTransposedW;  // the backward's products have no activation: z is the result
  static_assert(kRows <= 256 && kRows % 8 == 0);

  // How the operands reach the tensor cores.
  static constexpr bool kIsFloat = std::is_same_v<Element, float>;
  static constexpr int kParts = parts_of(kKernel);
  static constexpr bool kConvertsW = kKernel == Kernel::kFp16x3 || kKernel == Kernel::kFp16x1;
  // Float32 W is converted by warps of its own, half of it in each block of a cluster, or else by the consumers.
  static constexpr bool kSharesW = shares_w(kKernel, kRows, kSplitK);
  static constexpr bool kWFromRegisters = kConvertsW && !kSharesW;
  // Whether the tensor core adds up 64 k at a time, or else all of K.
  static constexpr bool kPromotesEachBlock = kKernel == Kernel::kFp16x3 || kWFromRegisters;
  static constexpr bool kKeepsOrderOfK = kTransposedW || !kWFromRegisters;  // or else x is in the fragments' order
  // Accumulators that share a block's four steps: fewer additions that truncate (see "How sums stay accurate"), where
  // registers and time allow it.
  static constexpr int kPartials = kParts == 1 || !kSplitK || kRows == 128 ? 1 : kRows == 64 ? 2 : 4;
  // Totals of eight blocks first, then of these: fewer roundings one after the other.
  static constexpr bool kSumsInTwoLevels = kParts == 2 && kWFromRegisters && kRows <= 64;
  // Measured with fp16x3: without turns 2 to 8 % more time, but not with 128 rows that split K.
  static constexpr bool kTakesTurns = kPromotesEachBlock && !(kSplitK && kRows == 128);

  // Clusters and panels.
  static constexpr int kClusterBlocks = kSplitK ? 1 : 2;               // where K is split the launch says how many
  static constexpr int kBlocksSharingW = kSharesW ? 2 : 1;             // these convert a stage of W together
  static constexpr int kBlocksSharingX = kSplitK || kSharesW ? 1 : 2;  // these load an x stage together
  static constexpr bool kLastTileOverlaps = !kIsFloat && !kSplitK;     // two blocks store the same values of a row
  static constexpr int kPanels = kSharesW ? 2 : 1;
  static constexpr int kPanelRows = kRows / kPanels;                           // columns of wgmma's B
  static constexpr int kGroups = kRows / 8;                                    // of 8 rows
  static constexpr int kColumnStep = kTransposedW && kWFromRegisters ? 1 : 8;  // between a thread's two columns of out
  // Rows of x in one of TMA's boxes: a block's slice of a panel, or all rows where x is the caller's and has fewer.
  // Whatever the stage then has behind them is multiplied, too, but not stored.
  static __host__ __device__ constexpr int x_box_rows(int m) {
    return !kIsFloat && kSplitK && m < kPanelRows ? m : kPanelRows / kBlocksSharingX;
  }

  // Stages. All boxes have rows of 128 bytes.
  //   W            [2][kWRows][32] floats; transposed [kWRows / 32][kTileK][32] floats; [kTileN][64] 16-bit numbers
  //   x            a panel, kParts times [kPanelRows][64] 16-bit numbers
  //   converted W  kParts times [kTileN][64] halves, and apart from them the inverses of the rows' scales
  using WElement = std::conditional_t<kKernel == Kernel::kFp16x1Staged, __half, Element>;  // as it comes by TMA
  using Multiplied = std::conditional_t<kIsFloat, __half, Element>;
  static constexpr int kWRows = kTileN / kBlocksSharingW;
  static constexpr int kWBoxRows = kTransposedW ? kTileK : kWRows;
  static constexpr int kWStageBytes = kWRows * kTileK * int(sizeof(WElement));
  static constexpr int kWBoxes = kWStageBytes / (kWBoxRows * 128);
  static constexpr int kXPartBytes = kPanelRows * kTileK * 2;
  static constexpr int kXStageBytes = kParts * kXPartBytes;
  static_assert(kXPartBytes / kBlocksSharingX % 1024 == 0, "the swizzle repeats every 1024 bytes");
  static constexpr int kConvertedPartBytes = kTileN * kTileK * 2, kConvertedBytes = kParts * kConvertedPartBytes;
  static constexpr int kWInverseBytes = kTileN * 4;
  // Measured: with two stages of hi and lo the converters wait for the consumers.
  static constexpr int kConvertedStages = !kSharesW ? 0 : kParts == 2 ? 3 : 4;
  static constexpr int kConvertedRingBytes = kConvertedStages * (kConvertedBytes + kWInverseBytes);
  // What the others send this block where they share a tile.
  static constexpr int kSentGroupBytes = kSplitK ? most_groups_sent(kGroups) * kGroupBytes : 0;
  static constexpr int kSentWInverseBytes = kSplitK && kIsFloat ? kTileN * 4 : 0;  // by each
  static constexpr int kSumBytes = kSentGroupBytes + (kMaxSplits - 1) * kSentWInverseBytes;
  // Whether out and z can leave by TMA, as boxes of kBoxRows rows by a consumer's 64 columns. Each consumer warpgroup
  // has two boxes, which take turns.
  static constexpr bool kStoresBoxes = !kIsFloat && !kSplitK;
  static constexpr int kBoxRows = 64, kBoxBytes = kBoxRows * 64 * 2;
  static constexpr int kBoxesBytes = kStoresBoxes ? 2 * kConsumerWarpgroups * kBoxBytes : 0;
  // Stages of float32 W and x for repair as TF32, in the rings' memory, which the main loop needs no more.
  static constexpr int kFloatStages = kIsFloat && kParts == 1 ? 4 : 0;
  // W's and x's rings share what is left, but for 1024 bytes of barriers and alignment. Measured: fp16x1 wants four
  // stages of float32 W, fp16x3 two; x takes the rest.
  static constexpr int kBytesForRings = kMaxShared - kSumBytes - kConvertedRingBytes - kBoxesBytes - 1024;
  static constexpr int kXStages = kSharesW ? std::min(12, (kBytesForRings - 4 / kParts * kWStageBytes) / kXStageBytes)
                                           : std::min(12, kBytesForRings / (kWStageBytes + kXStageBytes));
  static constexpr int kWStages = std::min(12, (kBytesForRings - kXStages * kXStageBytes) / kWStageBytes);
  static constexpr int kBarrierBytes = (2 * (kWStages + kXStages + kConvertedStages) + kFloatStages + 1 + 1) * 8;
  static constexpr int kSharedBytes =
      kWStages * kWStageBytes + kXStages * kXStageBytes + kConvertedRingBytes + kBoxesBytes + kSumBytes + kBarrierBytes;
  static_assert(kXStages >= 2 && kWStages >= 2 && kSharedBytes <= kMaxShared);

  // Warps are producers, converters and consumers, in this order. The compiler gives every thread the same share of the
  // register file, a multiple of 8; what the producers and converters let go of goes to the consumers.
  static constexpr int kWarpgroups = 1 + kSharesW + kConsumerWarpgroups, kThreads = 128 * kWarpgroups;
  static constexpr int kFirstConsumerWarp = kThreads / 32 - kConsumerWarps;
  static constexpr int kProducerRegisters = 24, kConverterRegisters = 72, kConsumerRegisters = kSharesW ? 208 : 240;
  static_assert(kProducerRegisters + kSharesW * kConverterRegisters + kConsumerWarpgroups * kConsumerRegisters <=
                    65536 / kThreads / 8 * 8 * kWarpgroups,
                "setmaxnreg would wait for registers that no warp gives back");
};

// x, w, bias, out and z have elements of the tile's type.
struct Arguments {
  const void* x;               // [m, k], row stride x_stride
  const void* w;               // [n, k], row stride w_stride; [k, n] where it is transposed
  const void* bias;            // [n], or null
  void* out;                   // [m, n]
  void* z;                     // [m, n], or null where it is not wanted
  SplitRows x_split, w_split;  // x split, where it is float32; W split, with fp16x1_staged
  int64_t x_stride, w_stride;
  int m, n, k;
  float s;
  bool can_store_boxes;  // rows of out and z begin at multiples of 16 bytes
};

// What TMA must know of each matrix; those that a variant does not use are not initialized.
struct TensorMaps {
  CUtensorMap w, x, x_lo;        // as the producers fetch them; x_lo where there are two parts
  CUtensorMap out, z;            // 16 bits, where they are stored as boxes
  CUtensorMap float_w, float_x;  // float32 as it comes, for repair as TF32
};

// ---- Scheduler: the order of tiles

// Blocks of a cluster that share x have tiles side by side along n; those that share W, along m. Clusters are numbered
// along m first, in groups of 1024 rows, then along n: what runs at the same time shares W's tiles, which are the
// larger traffic, and the group's part of x stays in the L2 cache.
template <typename T> struct TileScheduler {
  static constexpr int kClusterM = T::kRows * T::kBlocksSharingW, kClusterN = kTileN * T::kBlocksSharingX;
  static constexpr int kGroupM = 1024 / kClusterM;
  int m, n;

  __host__ __device__ int clusters_m() const { return (m + kClusterM - 1) / kClusterM; }
  __host__ __device__ int clusters_n() const { return (n + kClusterN - 1) / kClusterN; }
  __host__ __device__ int clusters() const { return clusters_m() * clusters_n(); }

#ifdef HAS_SM90A
  // Calls body(m0, n0) with the first row and column of out of the tile that block `rank` of the cluster has.
  template <typename Body> __device__ __forceinline__ void tile(int cluster, uint32_t rank, Body body) const {
    const int per_group = kGroupM * clusters_n();
    const int first_m = cluster / per_group * kGroupM, size_m = min(kGroupM, clusters_m() - first_m);
    const int cluster_m = first_m + cluster % per_group % size_m, cluster_n = cluster % per_group / size_m;
    int m0 = cluster_m * kClusterM;
    if (T::kLastTileOverlaps) m0 = min(m0, max(m - kClusterM, 0));  // the last tile ends with x
    body(m0 + (T::kSharesW ? int(rank) * T::kRows : 0),
         cluster_n * kClusterN + (T::kBlocksSharingX > 1 ? int(rank) * kTileN : 0));
  }
  // Calls body(m0, n0) for each tile of this block, which is number `rank` of `cluster_blocks`. Where these share a
  // tile there is a single one.
  template <typename Body>
  __device__ __forceinline__ void for_each_tile(uint32_t rank, unsigned cluster_blocks, unsigned grid_blocks,
                                                Body body) const {
    int cluster = blockIdx.x / cluster_blocks;
#pragma unroll 1
    do {
      tile(cluster, rank, body);
      cluster += grid_blocks / cluster_blocks;
    } while (!T::kSplitK && cluster < clusters());
  }
#endif
};

#ifdef HAS_SM90A

// ---- Shared memory and barriers

// A thread's position in a ring of stages: it waits for the stage, uses it, arrives on one of the stage's barriers, and
// advances. `phase` is the parity of the rounds that the thread has made, and so of the barriers' phases. kFirstStage,
// kFull and kEmpty are the offsets of the first stage and its two mbarriers in shared memory.
template <int kCount, int kStageBytes, int kFirstStage, int kFull, int kEmpty> struct Ring {
  uint32_t shared;  // the address of the block's shared memory
  uint32_t stage = 0, phase = 0;

  __device__ __forceinline__ uint32_t address() const { return shared + kFirstStage + stage * kStageBytes; }
  __device__ __forceinline__ uint32_t full_barrier() const { return shared + kFull + 8 * stage; }
  __device__ __forceinline__ uint32_t empty_barrier() const { return shared + kEmpty + 8 * stage; }
  __device__ __forceinline__ void wait_full() const { mbarrier_wait(full_barrier(), phase); }
  // The other parity: a barrier that was just initialized lets a wait for the phase before its first pass, so that all
  // stages are empty at the start.
  __device__ __forceinline__ void wait_empty() const { mbarrier_wait(empty_barrier(), phase ^ 1); }
  __device__ __forceinline__ void advance() {
    if (++stage == kCount) stage = 0, phase ^= 1;
  }
  __device__ __forceinline__ void wait_all_empty() {
#pragma unroll 1
    for (int i = 0; i < kCount; ++i) wait_empty(), advance();
  }
};

// The mbarriers, and how many arrivals complete a phase of each. Bytes that TMA or bulk copies bring count besides.
//
//   barrier          arrivals                                           who arrives                   who waits
//   W full           1                                                  W's producer                  converters, or
//                                                                                                     all consumers
//   W empty          4 or 8                                             a lane of each converter,     W's producer
//                                                                       or else consumer, warp
//   converted full   128                                                all converters                all consumers
//   converted empty  256 + 8, of this block and of the other            all consumers; a lane of      all converters
//                                                                       each of the other's warps
//   x full           1                                                  x's producer                  all consumers
//   x empty          8 from every block that shares x                   a lane of each consumer warp  x's producer
//   sums full        1                                                  set_up                        all consumers
//   float full       1                                                  a consumer thread             all consumers
//
// Of a converted stage every converter waits for `empty` and arrives on `full` for what it has stored itself.

// The offsets of the parts of a block's shared memory, in their order.
template <typename T> struct SharedLayout {
  static constexpr int kW = 0, kX = kW + T::kWStages * T::kWStageBytes;  // the rings' stages
  static constexpr int kConverted = kX + T::kXStages * T::kXStageBytes;
  static constexpr int kWInverses =
      kConverted + T::kConvertedStages * T::kConvertedBytes;          // one for each row of converted W
  static constexpr int kBoxes = kConverted + T::kConvertedRingBytes;  // out and z on their way
  static constexpr int kSums = kBoxes + T::kBoxesBytes;               // what the others send this block
  static constexpr int kWFull = kSums + T::kSumBytes, kWEmpty = kWFull + 8 * T::kWStages;  // mbarriers
  static constexpr int kXFull = kWEmpty + 8 * T::kWStages, kXEmpty = kXFull + 8 * T::kXStages;
  static constexpr int kConvertedFull = kXEmpty + 8 * T::kXStages;
  static constexpr int kConvertedEmpty = kConvertedFull + 8 * T::kConvertedStages;
  static constexpr int kSumsFull = kConvertedEmpty + 8 * T::kConvertedStages;
  static constexpr int kFloatFull = kSumsFull + 8;
  static constexpr int kNotFinite = kFloatFull + 8 * T::kFloatStages;  // float32: see note_not_finite
  static_assert(kNotFinite + 8 == T::kSharedBytes);

  using WRing = Ring<T::kWStages, T::kWStageBytes, kW, kWFull, kWEmpty>;
  using XRing = Ring<T::kXStages, T::kXStageBytes, kX, kXFull, kXEmpty>;
  using ConvertedRing = Ring<T::kConvertedStages, T::kConvertedBytes, kConverted, kConvertedFull, kConvertedEmpty>;
};

// Barriers of bar.sync and bar.arrive; 0 is that of __syncthreads. Turns and warpgroups have two each: one for every
// consumer warpgroup. At a turn's barrier 128 threads wait and the other 128 arrive.
enum NamedBarrier : int { kTurnBarriers = 1, kConsumersBarrier = 3, kWarpgroupBarriers = 4 };

// The offset of a row's chunk of 16 bytes in an operand whose rows are 128 bytes, as TMA's 128-byte swizzle has it.
__device__ __forceinline__ uint32_t swizzled(unsigned row, unsigned chunk) {
  return row * 128 + (chunk ^ row % 8) * 16;
}

// Through a shuffle, so that the compiler knows it to be the same in the whole warp and keeps what follows from it in
// uniform registers.
__device__ __forceinline__ int warp_index() { return __shfl_sync(~0u, threadIdx.x / 32, 0); }

// The number of this thread among the consumers', which are the block's last.
template <typename T> __device__ __forceinline__ unsigned consumer_thread() {
  return threadIdx.x - (T::kThreads - kConsumerThreads);
}

// A block's part of a tile that a cluster's blocks share.
template <typename T> struct Part {
  int k_begin, k_end;                             // the blocks of kTileK that it multiplies
  int groups_per_block, first_group, last_group;  // the groups of 8 rows that it finishes

  __device__ __forceinline__ Part(const Arguments& args, unsigned rank, unsigned blocks)
      : k_begin((args.k + kTileK - 1u) / kTileK * rank / blocks),
        k_end((args.k + kTileK - 1u) / kTileK * (rank + 1) / blocks),
        groups_per_block((T::kGroups + int(blocks) - 1) / int(blocks)),
        first_group(min(int(rank) * groups_per_block, T::kGroups)),
        last_group(min(first_group + groups_per_block, T::kGroups)) {}
};

// What every warp of a block knows.
template <typename T> struct Block {
  const Arguments& args;
  TileScheduler<T> scheduler;
  uint32_t shared;        // the address of its shared memory
  uint32_t rank, blocks;  // its number in its cluster, and the number of blocks there
  int lane;
  Part<T> part;  // with kSplitK

  __device__ __forceinline__ Block(const Arguments& args_, const uint8_t* shared_memory)
      : args(args_),
        scheduler{args_.m, args_.n},
        shared(shared_address(shared_memory)),
        rank(cluster_ctarank()),
        blocks(T::kSplitK ? cluster_nctarank() : T::kClusterBlocks),
        // Through a shuffle, or the main loops read threadIdx.x anew, which takes longer than they have.
        lane(__shfl_sync(~0u, threadIdx.x % 32, threadIdx.x % 32)),
        part(args_, rank, blocks) {}

  // The block's part of K, in blocks of kTileK. Up to k_prefetched W is fetched before all else begins.
  __device__ __forceinline__ int k_begin() const { return T::kSplitK ? part.k_begin : 0; }
  __device__ __forceinline__ int k_end() const { return T::kSplitK ? part.k_end : (args.k + kTileK - 1) / kTileK; }
  __device__ __forceinline__ int k_prefetched() const { return min(k_end(), k_begin() + T::kWStages); }

  template <typename Body> __device__ __forceinline__ void for_each_tile(Body body) const {
    scheduler.for_each_tile(rank, blocks, gridDim.x, body);
  }
  // How many of a tile's panels have rows of x. Measured: those without, loaded as zeros, would take longer than
  // others.
  __device__ __forceinline__ int panels(int m0) const {
    return T::kSharesW ? max(0, min(T::kPanels, (args.m - m0 + T::kPanelRows - 1) / T::kPanelRows)) : 1;
  }
};

// ---- Producers

// Fetches a block of W's k, for the tile at n0, into the ring's stage.
template <typename T>
__device__ __forceinline__ void fetch_w(const Block<T>& block, const CUtensorMap& map, int n0, int k_block,
                                        typename SharedLayout<T>::WRing& ring) {
  const uint32_t barrier = ring.full_barrier(), to = ring.address();
  mbarrier_arrive_expect_tx(barrier, T::kWStageBytes);
  const int k0 = k_block * kTileK;
  if (T::kSharesW) n0 += int(block.rank) * T::kWRows;  // the half that this block converts
  for (int box = 0; box < T::kWBoxes; ++box)
    cp_async_bulk_tensor_2d(to + box * T::kWBoxRows * 128, &map, T::kTransposedW ? n0 + box * 32 : k0 + box * 32,
                            T::kTransposedW ? k0 : n0, barrier, 1 << block.rank);
  ring.advance();
}

// Fills W's ring, which is empty at the start and only this block's.
template <typename T> __device__ __forceinline__ void prefetch_w(const Block<T>& block, const CUtensorMap& map) {
  block.scheduler.tile(blockIdx.x / block.blocks, block.rank, [&](int, int n0) {
    typename SharedLayout<T>::WRing ring{block.shared};
#pragma unroll 1
    for (int k_block = block.k_begin(); k_block < block.k_prefetched(); ++k_block)
      fetch_w(block, map, n0, k_block, ring);
  });
}

// One thread: fetches the rest of W.
template <typename T> __device__ __forceinline__ void produce_w(const Block<T>& block, const CUtensorMap& map) {
  int first = block.k_prefetched();
  typename SharedLayout<T>::WRing ring{block.shared};  // goes on where prefetch_w ended
  if (first - block.k_begin() < T::kWStages) ring.stage = first - block.k_begin();
  if (first - block.k_begin() == T::kWStages) ring.phase = 1;
  block.for_each_tile([&](int, int n0) {
#pragma unroll 1
    for (int k_block = first; k_block < block.k_end(); ++k_block) {
      ring.wait_empty();
      fetch_w(block, map, n0, k_block, ring);
    }
    first = block.k_begin();
  });
}

// One thread: fetches this block's slice of each panel of x, for all blocks that share it.
template <typename T>
__device__ __forceinline__ void produce_x(const Block<T>& block, const CUtensorMap& map, const CUtensorMap& lo_map) {
  const int box_rows = T::x_box_rows(block.args.m), slice = T::kBlocksSharingX == 1 ? 0 : int(block.rank) * box_rows;
  const uint16_t sharers = T::kBlocksSharingX == 1 ? 1 << block.rank : (1 << T::kBlocksSharingX) - 1;
  typename SharedLayout<T>::XRing ring{block.shared};
  // split_rows_kernel may still be running; W is the caller's, or a copy made before that began.
  griddepcontrol_wait();
  block.for_each_tile([&](int m0, int) {
#pragma unroll 1
    for (int k_block = block.k_begin(); k_block < block.k_end(); ++k_block)
#pragma unroll 1
      for (int panel = 0; panel < block.panels(m0); ++panel, ring.advance()) {
        const uint32_t barrier = ring.full_barrier(), to = ring.address() + slice * 128;
        ring.wait_empty();
        mbarrier_arrive_expect_tx(barrier, T::kParts * T::kBlocksSharingX * box_rows * kTileK * 2);
        for (int part = 0; part < T::kParts; ++part)
          cp_async_bulk_tensor_2d(to + part * T::kXPartBytes, part ? &lo_map : &map, k_block * kTileK,
                                  m0 + panel * T::kPanelRows + slice, barrier, sharers);
      }
  });
}

// ---- Converters

// A warpgroup: each warp converts 16 of this block's rows of W, a thread half a row, and sends them to the other block,
// too.
template <typename T> __device__ __forceinline__ void convert_w(const Block<T>& block) {
  using Shared = SharedLayout<T>;
  constexpr int kWarpRows = T::kWRows / kConverterWarps, kHalf = kTileK / 2;
  const int first_row = (warp_index() - 4) * kWarpRows, row = first_row + block.lane / 2, swizzle = row % 8,
            half = block.lane % 2;
  typename Shared::WRing w_ring{block.shared};
  typename Shared::ConvertedRing ring{block.shared};
  block.for_each_tile([&](int, int) {
    float scale = scale_of(0);
#pragma unroll 1
    for (int k_block = block.k_begin(); k_block < block.k_end(); ++k_block, w_ring.advance(), ring.advance()) {
      const uint32_t w_stage = w_ring.address();
      float v[kHalf];
      w_ring.wait_full();
      // So that the threads of a load touch all banks, those of the second half take its four k, or its chunks of 16
      // bytes, in another order.
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
      }
      float largest = 0;
#pragma unroll
      for (int k = 0; k < kHalf; ++k) largest = fmaxf(largest, fabsf(v[k]));
      const float needed = scale_of(fmaxf(largest, __shfl_xor_sync(~0u, largest, 1)));
      // Where the sums of all of K share a scale it only shrinks, and by more than it must, so that somewhat larger
      // entries to come need no smaller one.
      scale = T::kPromotesEachBlock ? needed : needed < scale ? 0.25f * needed : scale;
      __syncwarp();
      if (block.lane == 0) mbarrier_arrive(w_ring.empty_barrier() + zero_after(scale));
      uint32_t parts[2][kHalf / 2];
#pragma unroll
      for (int i = 0; i < kHalf / 2; ++i) split2(v[2 * i], v[2 * i + 1], scale, parts[0][i], parts[1][i]);

      const uint32_t stage = ring.address() + block.rank * (T::kWRows * 128);
      const uint32_t inverses =
          block.shared + Shared::kWInverses + ring.stage * T::kWInverseBytes + block.rank * (T::kWRows * 4);
      // The thread's first chunk of 16 bytes. The second half's chunks are not in the order of k here, either.
      const uint32_t to = stage + row * 128 + (half * (T::kTransposedW ? 4 : 6) ^ swizzle) * 16;
      ring.wait_empty();
#pragma unroll
      for (int part = 0; part < T::kParts; ++part)
#pragma unroll
        for (int i = 0; i < kHalf / 8; ++i) {  // chunks of eight k
          const uint32_t* v4 = parts[part] + 4 * i;
          const bool swapped = T::kTransposedW && half;
          const uint32_t chunk[4] = {swapped ? v4[2] : v4[0], swapped ? v4[3] : v4[1], swapped ? v4[0] : v4[2],
                                     swapped ? v4[1] : v4[3]};
          st_shared_v4((to + part * T::kConvertedPartBytes) ^ i * 16, chunk);
        }
      if (half == 0) st_shared(inverses + row * 4, inverse_of(scale));
      // Makes the stores visible to wgmma and the bulk copies, which read through the asynchronous proxy.
      fence_proxy_async_shared();
      __syncwarp();
      // Every thread arrives for what it has stored. The first also announces the bytes that the other block's warp
      // will send, and sends its own warp's.
      const uint32_t barrier = ring.full_barrier(), other = block.rank ^ 1;
      if (block.lane > 0) {
        mbarrier_arrive(barrier);
      } else {
        mbarrier_arrive_expect_tx(barrier, T::kParts * kWarpRows * 128 + kWarpRows * 4);
        auto send = [&](uint32_t from, int bytes) {
          cp_async_bulk_shared(mapa(from, other), from, bytes, mapa(barrier, other));
        };
        for (int part = 0; part < T::kParts; ++part)
          send(stage + part * T::kConvertedPartBytes + first_row * 128, kWarpRows * 128);
        send(inverses + first_row * 4, kWarpRows * 4);
      }
    }
  });
}

// ---- Consumers: fragments of float32 W
// In what follows r = lane / 4 and q = lane % 4, as in wgmma's fragments: of each operand A a thread has rows r and
// r + 8 of its warp's 16.

// A thread's part of float32 W in one block of 64 k: wgmma's four steps of 16 k, and the scales of its two rows.
struct WFragments {
  float step[4][8];  // four consecutive k of row r, four of row r + 8
  float scale[2];
};

// address: the thread's 16 bytes of step 0 in row r. Under the swizzle those of step 1 differ in one bit.
__device__ __forceinline__ void load_step(WFragments& w, int step, uint32_t address) {
  address = (step % 2 ? address ^ 64 : address) + step / 2 * (kTileN * 128);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float4 v = ld_shared_v4(address + half * (8 * 128));
    float* to = w.step[step] + 4 * half;
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  }
}

// The same for a transposed W, whose k are in their own order. address: the thread's 8 bytes, rows r and r + 8, in
// k = 2q. Those of k = 2q + 1 differ in one bit under the swizzle, those of k + 8 do not.
__device__ __forceinline__ void load_step_transposed(WFragments& w, int step, uint32_t address) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // k = 2q, 2q + 1, 2q + 8, 2q + 9
    const int k = step * 16 + i % 2 + i / 2 * 8;
    const float2 v = ld_shared_v2((i % 2 ? address ^ 16 : address) + k * 128);
    w.step[step][i] = v.x, w.step[step][4 + i] = v.y;
  }
}

// The scale of row r (half 0) or r + 8, from the largest |w| of its 64: this thread's sixteen and its three
// neighbours'.
__device__ __forceinline__ float scale_of_row(const WFragments& w, int half) {
  float largest = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) largest = fmaxf(largest, fabsf(w.step[i / 4][4 * half + i % 4]));
  largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
  largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
  return scale_of(largest);
}

// Makes a step's operand A: the four registers of wgmma's 64 x 16 fragment of hi, and of lo where there are two parts.
template <int kParts>
__device__ __forceinline__ void split_step(uint32_t (&hi)[4], uint32_t (&lo)[4], const WFragments& w, int step) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // row r or r + 8, the earlier two k or the later
    const float* two = w.step[step] + 4 * (i % 2) + i / 2 * 2;
    uint32_t rest;
    split2(two[0], two[1], w.scale[i % 2], hi[i], rest);
    if (kParts == 2) lo[i] = rest;
  }
}

// The two halves of wgmma's description of a K-major operand with 128-byte swizzle, whose groups of 8 rows by 128 bytes
// are 1024 contiguous bytes. Adding 1 to the lower half moves the operand by 16 bytes.
__device__ __forceinline__ uint32_t matrix_descriptor(uint32_t address) { return address >> 4 | 1 << 16; }
constexpr uint64_t kDescriptorUpper = uint64_t(1024 >> 4 | 1 << 30) << 32;

// ---- Consumers: what a thread of them holds

template <typename T> struct Consumer {
  using Element = typename T::Element;
  using Shared = SharedLayout<T>;
  // W's ring as the consumers see it: of what the converters make, where there are any.
  using WRing = std::conditional_t<T::kSharesW, typename Shared::ConvertedRing, typename Shared::WRing>;
  using XRing = typename Shared::XRing;

  const Block<T>& block;
  const Arguments& args;
  const TensorMaps& maps;
  const uint32_t shared;
  int warp, warpgroup, lane;  // warp: among the consumers'
  WRing w_ring;
  XRing x_ring;
  // [groups of 8 m][row r, row r + 8][m = 2q, 2q + 1], written [4 * groups]
  float total[T::kRows / 2];
  float largest_w_inverse[2];  // the inverses of the smallest scales of W's rows r and r + 8
  float limit[2];              // see "Lost sums"
  int m0, n0;                  // the tile
  // The epilogue finds these, so that they take no registers in the main loop.
  int r, q;
  float bias[2];

  __device__ __forceinline__ Consumer(const Block<T>& block_, const TensorMaps& maps_)
      : block(block_),
        args(block_.args),
        maps(maps_),
        // Through a shuffle, or the main loops find it anew in every block of k before they can wait for the next.
        shared(__shfl_sync(~0u, block_.shared, 0)),
        warp(warp_index() - T::kFirstConsumerWarp),
        warpgroup(warp / 4),
        lane(block_.lane),
        w_ring{shared},
        x_ring{shared} {}

  // The row of W, in the tile, that is the fragment's row r; row r + 8 is kColumnStep further. Fragments in registers
  // have rows 0 4 1 5 2 6 3 7 of eight, so that the eight lanes that load 16 bytes together touch all banks under the
  // swizzle, where rows r and r + 1 would collide. Those of a transposed W have neighbours for r and r + 8, for loads
  // of 8 bytes.
  __device__ __forceinline__ int row_of(int r_) const {
    const int in_warp = !T::kWFromRegisters ? r_ : T::kTransposedW ? 2 * r_ : r_ / 2 + r_ % 2 * 4;
    return warp * 16 + in_warp;
  }
  // The thread's two columns of out, half 0 and 1.
  __device__ __forceinline__ int n_of(int r_, int half) const { return n0 + row_of(r_) + half * T::kColumnStep; }

  // Main loops: total = x * W^T of the tile, in the scales of x's rows.
  __device__ __forceinline__ void multiply();
  __device__ __forceinline__ void multiply_panel(float* sums, uint32_t w, bool starts_sums);
  __device__ __forceinline__ void multiply_converted(int panels);
  __device__ __forceinline__ void multiply_whole(int panels);
  __device__ __forceinline__ void multiply_from_registers();
  __device__ __forceinline__ void clear_total();
  __device__ __forceinline__ void scale_total(const float (&factors)[2]);
  __device__ __forceinline__ void add_partial(float* to, const float* partial, const float (&w_inverse)[2]);
  __device__ __forceinline__ void load_w_inverses(float (&w_inverse)[2]);
  __device__ __forceinline__ void release_w(WRing& ring, uint32_t zero = 0);
  __device__ __forceinline__ void release_x(XRing& ring);
  __device__ __forceinline__ void await_turn();
  __device__ __forceinline__ void give_turn();
  // What follows a tile's main loop.
  __device__ __forceinline__ void finish_tile();
  __device__ __forceinline__ void finish_shared_tile();
  template <int kBlocks> __device__ __forceinline__ void send_sums();
  __device__ __forceinline__ uint32_t sums_address(int from, int to) const;
  __device__ __forceinline__ uint32_t w_inverses_address(int from, int to) const;
  // Lost sums.
  __device__ __forceinline__ void note_w_inverse(const float (&w_inverse)[2]);
  __device__ __forceinline__ void find_limits();
  __device__ __forceinline__ bool are_lost(float first, float second, bool (&lost)[2]) const;
  template <int kGroups> __device__ __forceinline__ bool may_be_lost(const float* sums) const;
  template <int kGroups> __device__ __forceinline__ void mark_lost(int m, float* sums) const;
  // Stores.
  __device__ __forceinline__ float2 x_inverses(int m) const;
  template <int kGroups>
  __device__ __forceinline__ void finish(int m, float* sums, float2 first_x_inverses, float& check);
  template <int kGroups>
  __device__ __forceinline__ void store_float(Element* to, bool is_z, int m, const float* sums, float2 first_x_inverses,
                                              float& check) const;
  __device__ __forceinline__ void note_not_finite(float check) const;
  template <int kGroups>
  __device__ __forceinline__ void store_pairs(Element* to, bool is_z, int m, const float* sums) const;
  __device__ __forceinline__ void store_boxes(const CUtensorMap* map, bool is_z, const float* sums) const;
};

// ---- Consumers: main loops
//
// How sums stay accurate (fp16x3). The tensor core truncates toward 0 whenever it adds to its accumulator, so that a
// product comes out too small: on average, for normal data, by 1.9e-7 if the products of 64 k are added step by step.
// Therefore a block's small products, lo * hi and hi * lo, come before its large ones: the accumulator is large for
// four additions instead of ten. What is left, as the mean relative error of the products of such data, in units of
// 1e-7, by the number of accumulators that share the four steps (1, 2 or 4):
//   normal -0.9 -0.6 -0.4    positive -1.8 -0.8 -0.4    |normal| -2.0 -0.8 -0.4    10 % nonzeros -0.6 -0.4 -0.4
// Half of that is given back by a factor 1 + 2^-23 (1.2e-7) on the scale of every block, every second or every fourth.

template <typename T> __device__ __forceinline__ void Consumer<T>::clear_total() {
#pragma unroll
  for (int i = 0; i < T::kRows / 2; ++i) total[i] = 0;
}

// factors: for W's rows r and r + 8.
template <typename T> __device__ __forceinline__ void Consumer<T>::scale_total(const float (&factors)[2]) {
#pragma unroll
  for (int i = 0; i < T::kRows / 2; ++i) total[i] *= factors[i / 2 % 2];
}

template <typename T>
__device__ __forceinline__ void Consumer<T>::add_partial(float* to, const float* partial, const float (&w_inverse)[2]) {
#pragma unroll
  for (int i = 0; i < T::kPanelRows / 2; ++i) to[i] = fmaf(partial[i], w_inverse[i / 2 % 2], to[i]);
}

// Loads the inverses of the thread's two rows' scales, from a stage of converted W.
template <typename T> __device__ __forceinline__ void Consumer<T>::load_w_inverses(float (&w_inverse)[2]) {
  const uint32_t from = shared + Shared::kWInverses + w_ring.stage * T::kWInverseBytes + row_of(lane / 4) * 4;
  w_inverse[0] = ld_shared(from), w_inverse[1] = ld_shared(from + T::kColumnStep * 4);
}

// zero: zero_after of what was loaded from the stage, so that it is not released before the loads return.
template <typename T> __device__ __forceinline__ void Consumer<T>::release_w(WRing& ring, uint32_t zero) {
  const uint32_t barrier = ring.empty_barrier() + zero;
  if (!T::kSharesW && lane == 0) mbarrier_arrive(barrier);
  if (T::kSharesW) {  // every thread in this block, for the inverses that it has read; a warp's first in the other
    __syncwarp();
    mbarrier_arrive(barrier);
    if (lane == 0) mbarrier_arrive_remote(barrier, block.rank ^ 1);
  }
  ring.advance();
}

template <typename T> __device__ __forceinline__ void Consumer<T>::release_x(XRing& ring) {
  if (T::kBlocksSharingX == 1 && lane == 0) mbarrier_arrive(ring.empty_barrier());
  if (T::kBlocksSharingX > 1 && lane < T::kBlocksSharingX) mbarrier_arrive_remote(ring.empty_barrier(), lane);
  ring.advance();
}

// The two warpgroups take turns to begin a panel, so that the tensor cores have the products of one while the other
// adds up its partial sums.
template <typename T> __device__ __forceinline__ void Consumer<T>::await_turn() {
  if (T::kTakesTurns) bar_sync(kTurnBarriers + warpgroup, kConsumerThreads);
}
template <typename T> __device__ __forceinline__ void Consumer<T>::give_turn() {
  if (T::kTakesTurns) bar_arrive(kTurnBarriers + 1 - warpgroup, kConsumerThreads);
}

// Adds a panel's products with a block of W to sums, both operands from shared memory. w: the descriptor of W.
template <typename T>
__device__ __forceinline__ void Consumer<T>::multiply_panel(float* sums, uint32_t w, bool starts_sums) {
  auto multiply_step = [&](uint32_t a, uint32_t b, bool adds) {
    Wgmma<T::kPanelRows>::template multiply<typename T::Multiplied>(sums, kDescriptorUpper | a, kDescriptorUpper | b,
                                                                    adds);
  };
  x_ring.wait_full();
  const uint32_t x = matrix_descriptor(x_ring.address());
  await_turn();
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4 && T::kParts == 2; ++step) {  // 16 k are 32 bytes, which is 2 in a descriptor
    multiply_step(w + T::kConvertedPartBytes / 16 + 2 * step, x + 2 * step, !starts_sums || step > 0);
    multiply_step(w + 2 * step, x + T::kXPartBytes / 16 + 2 * step, true);
  }
#pragma unroll
  for (int step = 0; step < 4; ++step)
    multiply_step(w + 2 * step, x + 2 * step, T::kParts == 2 || !starts_sums || step > 0);
  wgmma_commit_group();
  give_turn();
}

// The main loop of tiles of 256 rows of fp16x3: W comes from the converters, and each block of k is promoted.
template <typename T> __device__ __forceinline__ void Consumer<T>::multiply_converted(int panels) {
  float partial[T::kPanelRows / 2];  // the sums of a block of k and a panel
  clear_total();
#pragma unroll 1
  for (int left = block.k_end() - block.k_begin(); left > 0; --left) {
    w_ring.wait_full();
    float w_inverse[2];
    load_w_inverses(w_inverse);
    note_w_inverse(w_inverse);
    const uint32_t w = matrix_descriptor(w_ring.address() + warpgroup * (64 * 128));
#pragma unroll
    for (int panel = 0; panel < T::kPanels; ++panel) {
      if (panel >= panels) continue;
      multiply_panel(partial, w, true);
      wgmma_wait_group<0>();
      order_after_wait(partial);
      release_x(x_ring);
      add_partial(total + panel * (T::kPanelRows / 2), partial,
                  {w_inverse[0] * kCorrection, w_inverse[1] * kCorrection});
    }
    release_w(w_ring, zero_after(w_inverse[0]) + zero_after(w_inverse[1]));
  }
}

// The main loop of tiles that convert W themselves and multiply it from registers; each block of k is promoted. While
// the tensor cores multiply one step, this warp splits the next and loads the next block into the registers that become
// free. A block is entered with its scale known and step 0 split.
template <typename T> __device__ __forceinline__ void Consumer<T>::multiply_from_registers() {
  using Product = Wgmma<T::kPanelRows>;
  constexpr int kStepsEach = 4 / T::kPartials;
  float partial[T::kPartials][T::kPanelRows / 2];  // the sums of a block of k, each of some of its steps
  const int r = lane / 4, q = lane % 4;
  WFragments w;
  uint32_t hi[4][4], lo[2][4];  // fragments of each step; those of lo take turns: one is multiplied while one is made
  // The thread's first bytes in a stage. A transposed W's lie in row k = 2q of the box that has the warp's columns.
  const uint32_t first = T::kTransposedW ? row_of(0) / 32 * (kTileK * 128) + 2 * q * 128 +
                                               ((row_of(r) % 32 / 4) ^ (2 * q)) * 16 + row_of(r) % 4 * 4
                                         : row_of(r) * 128 + (q ^ row_of(r) % 8) * 16;
  auto load_w = [&](int step) {
    const uint32_t address = w_ring.address() + first;
    if constexpr (T::kTransposedW)
      load_step_transposed(w, step, address);
    else
      load_step(w, step, address);
  };
  // Finds the scales of what was loaded and gives the stage back. The scales need all of it, and the release is made to
  // depend on them: issued right after the loads, it would overtake those that wait for queued wgmmas.
  auto find_scales = [&] {
    w.scale[0] = scale_of_row(w, 0), w.scale[1] = scale_of_row(w, 1);
    __syncwarp();
    release_w(w_ring, zero_after(w.scale[0]) + zero_after(w.scale[1]));
  };
  auto x_descriptor = [&](int part, int step) {
    return kDescriptorUpper | (matrix_descriptor(x_ring.address()) + part * (T::kXPartBytes / 16) + 2 * step);
  };
  auto multiply_block = [&](bool has_next, float correction) {
    const float w_inverse[2] = {inverse_of(w.scale[0]), inverse_of(w.scale[1])};
    const float factors[2] = {w_inverse[0] * correction, w_inverse[1] * correction};
    note_w_inverse(w_inverse);
    x_ring.wait_full();
    if (has_next) w_ring.wait_full();
    await_turn();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      float* sums = partial[step / kStepsEach];
      const int first_step = step / kStepsEach * kStepsEach;
      wgmma_fence();
      if (T::kParts == 2) {
        Product::multiply(sums, lo[step % 2], x_descriptor(0, step), step > first_step);
        Product::multiply(sums, hi[step], x_descriptor(1, step), 1);
      }
      if (T::kParts == 1) Product::multiply(sums, hi[step], x_descriptor(0, step), step > first_step);
      if (T::kParts == 2 && step + 1 == first_step + kStepsEach)
#pragma unroll
        for (int large = first_step; large <= step; ++large)
          Product::multiply(sums, hi[large], x_descriptor(0, large), 1);
      wgmma_commit_group();
      if (step == (T::kParts == 2 && kStepsEach == 4 ? 3 : 2)) give_turn();
      if (step < 3) {
        if (step > 0) wgmma_wait_group<1>();  // the step before, which read the other lo, is done
        split_step<T::kParts>(hi[step + 1], lo[(step + 1) % 2], w, step + 1);
      }
      if (has_next) load_w(step);
    }
    if (has_next) {
      find_scales();
      wgmma_wait_group<T::kParts == 2 && kStepsEach == 4 ? 0 : 1>();  // what reads hi[0] is done
      split_step<T::kParts>(hi[0], lo[0], w, 0);
    }
    wgmma_wait_group<0>();
#pragma unroll
    for (int i = 0; i < T::kPartials; ++i) order_after_wait(partial[i]);
    release_x(x_ring);
    if constexpr (T::kPartials == 1) {
      add_partial(total, partial[0], factors);
    } else {
      float sums[T::kPanelRows / 2];
#pragma unroll
      for (int i = 0; i < T::kPanelRows / 2; ++i) {
        sums[i] = partial[0][i] + partial[1][i];
        if (T::kPartials == 4) sums[i] += partial[2][i] + partial[3][i];
      }
      add_partial(total, sums, factors);
    }
  };

  float outer[T::kSumsInTwoLevels ? T::kRows / 2 : 1] = {};
  clear_total();
  w_ring.wait_full();
#pragma unroll
  for (int step = 0; step < 4; ++step) load_w(step);
  find_scales();
  split_step<T::kParts>(hi[0], lo[0], w, 0);
#pragma unroll 1
  for (int left = block.k_end() - block.k_begin(); left > 0; --left) {
    multiply_block(left > 1, T::kParts == 2 && (block.k_end() - left) % T::kPartials == 0 ? kCorrection : 1);
    if (T::kSumsInTwoLevels && left % 8 == 1) {
#pragma unroll
      for (int i = 0; i < T::kRows / 2; ++i) outer[i] += total[i], total[i] = left == 1 ? outer[i] : 0;
    }
  }
}

// The main loop in which the tensor core adds up all of K, both operands from shared memory. A block is released when
// the next one's products are issued.
template <typename T> __device__ __forceinline__ void Consumer<T>::multiply_whole(int panels) {
  WRing w_done = w_ring;
  XRing x_done = x_ring;
  float w_inverse[2] = {1, 1};
  auto release_read_w = [&] {
    release_w(w_done, T::kSharesW ? zero_after(w_inverse[0]) + zero_after(w_inverse[1]) : 0);
  };
  // Tells the compiler that what total was before is needed no more.
  if (T::kSharesW) clear_total();
#pragma unroll 1
  for (int k_block = block.k_begin(); k_block < block.k_end(); ++k_block) {
    w_ring.wait_full();
    if constexpr (T::kSharesW) {  // a larger entry of W may have made a scale smaller
      float now[2];
      load_w_inverses(now);
      const bool differs = k_block > block.k_begin() && (now[0] != w_inverse[0] || now[1] != w_inverse[1]);
      if (__any_sync(~0u, differs)) {
        wgmma_wait_group<0>();
        scale_total({w_inverse[0] * inverse_of(now[0]), w_inverse[1] * inverse_of(now[1])});
      }
      w_inverse[0] = now[0], w_inverse[1] = now[1];
    }
    const uint32_t w = matrix_descriptor(w_ring.address() + warpgroup * (64 * 128));
#pragma unroll
    for (int panel = 0; panel < T::kPanels; ++panel) {
      if (panel >= panels) continue;
      multiply_panel(total + panel * (T::kPanelRows / 2), w, k_block == block.k_begin());
      x_ring.advance();
      wgmma_wait_group<1>();
      if (panel == 0 && k_block == block.k_begin()) continue;
      if (panel == 0) release_read_w();
      release_x(x_done);
    }
    w_ring.advance();
    if (panels == 0) release_read_w();
  }
  wgmma_wait_group<0>();
  order_after_wait(total);
  if (panels > 0) release_read_w(), release_x(x_done);
  if constexpr (T::kSharesW) scale_total(w_inverse), note_w_inverse(w_inverse);
}

template <typename T> __device__ __forceinline__ void Consumer<T>::multiply() {
  largest_w_inverse[0] = largest_w_inverse[1] = 0;
  if constexpr (!T::kPromotesEachBlock)
    multiply_whole(block.panels(m0));
  else if constexpr (T::kSharesW)
    multiply_converted(block.panels(m0));
  else
    multiply_from_registers();
  if constexpr (T::kKernel == Kernel::kFp16x1Staged) {
    auto inverse_at = [&](int half) { return RowInverse{args.w_split.inverse_scale[n_of(lane / 4, half)]}.value(); };
    const float w_inverse[2] = {inverse_at(0), inverse_at(1)};
    scale_total(w_inverse);
    note_w_inverse(w_inverse);
  }
}

// ---- The exchange between blocks that split K
//
// Every block adds up what all have for its groups of rows, in the order of k. So all others send it their sums, as
// [other block][group of the receiver's][thread][4], and largest_w_inverse, which a row's four lanes have in common, as
// [other block][consumer warp][r][row r, row r + 8]. It keeps its own as [group][thread][4] where W's ring was:
// st.async is not defined where a cluster has one block.

template <typename T> __device__ __forceinline__ uint32_t Consumer<T>::sums_address(int from, int to) const {
  return shared + Shared::kSums + (from - (from > to)) * block.part.groups_per_block * kGroupBytes +
         16 * consumer_thread<T>();
}
template <typename T> __device__ __forceinline__ uint32_t Consumer<T>::w_inverses_address(int from, int to) const {
  return shared + Shared::kSums + T::kSentGroupBytes + (from - (from > to)) * T::kSentWInverseBytes +
         (warp * 8 + r) * 8;
}

// kBlocks, the cluster's number of blocks, is known to the compiler so that few instructions are left.
template <typename T> template <int kBlocks> __device__ __forceinline__ void Consumer<T>::send_sums() {
  constexpr int kShare = (T::kGroups + kBlocks - 1) / kBlocks;
  static_assert(T::kGroups * kGroupBytes <= T::kWStages * T::kWStageBytes);
  const uint32_t own = shared + Shared::kW + 16 * consumer_thread<T>();
#pragma unroll
  for (int owner = 0; owner * kShare < T::kGroups; ++owner) {
    const float* its = total + owner * kShare * 4;
    const int groups = min(kShare, T::kGroups - owner * kShare);
    if (kBlocks == 1 || owner == int(block.rank)) {
#pragma unroll
      for (int group = 0; group < groups; ++group) st_shared_v4(own + group * kGroupBytes, its + 4 * group);
    } else {
      const uint32_t to = mapa(sums_address(block.rank, owner), owner),
                     barrier = mapa(shared + Shared::kSumsFull, owner);
#pragma unroll
      for (int group = 0; group < groups; ++group) st_async_v4(to + group * kGroupBytes, its + 4 * group, barrier);
      if (T::kIsFloat && q == 0)
        st_async_v2(mapa(w_inverses_address(block.rank, owner), owner), largest_w_inverse, barrier);
    }
  }
}

template <typename T> __device__ __forceinline__ void Consumer<T>::finish_shared_tile() {
  const int rank = int(block.rank), blocks = int(block.blocks), first = block.part.first_group,
            last = block.part.last_group;
  // Loaded before the waiting that follows, which hides how long the L2 cache takes.
  float2 next_x_inverses = {};
  if (T::kIsFloat) next_x_inverses = x_inverses(m0 + min(first, T::kGroups - 1) * 8 + 2 * q);
  bar_sync(kConsumersBarrier, kConsumerThreads);  // both warpgroups are done with W's ring
  barrier_cluster_wait();
  static_assert(kMaxSplits == 4);
  if (blocks == 1) send_sums<1>();
  if (blocks == 2) send_sums<2>();
  if (blocks == 3) send_sums<3>();
  if (blocks == 4) send_sums<4>();
  if (first < last) {
    mbarrier_wait_cluster(shared + Shared::kSumsFull, 0);
#pragma unroll 1
    for (int other = 0; T::kIsFloat && other < blocks; ++other) {
      if (other == rank) continue;
      const float2 theirs = ld_shared_v2(w_inverses_address(other, rank));
      note_w_inverse({theirs.x, theirs.y});
    }
  }
  find_limits();
  const uint32_t own = shared + Shared::kW + 16 * consumer_thread<T>();
  uint32_t parts[kMaxSplits];  // the addresses of all blocks' sums, for the group in hand
#pragma unroll
  for (int other = 0; other < kMaxSplits; ++other) parts[other] = other == rank ? own : sums_address(other, rank);
  float check = 0;
#pragma unroll 1
  for (int group = first; group < last; ++group) {
    const float2 inverses = next_x_inverses;
    if (T::kIsFloat) next_x_inverses = x_inverses(m0 + min(group + 1, last - 1) * 8 + 2 * q);
    float sums[4] = {};
#pragma unroll
    for (int other = 0; other < kMaxSplits; ++other) {
      if (other >= blocks) continue;
      const float4 part = ld_shared_v4(parts[other]);
      sums[0] += part.x, sums[1] += part.y, sums[2] += part.z, sums[3] += part.w;
      parts[other] += kGroupBytes;
    }
    finish<1>(m0 + group * 8 + 2 * q, sums, inverses, check);
  }
  note_not_finite(check);
}

// ---- Lost sums (float32)
//
// Small entries of a row lose bits where large ones set its scale. That does not matter while the large ones make the
// result. Where they meet zeros it is made of the others. Such sums are known by their size: the epilogue marks them,
// as NaN, and they are computed again:
//   main loops         note_w_inverse  keeps the largest inverse of W's scales
//   finish_tile        find_limits     computes the limits from it (finish_shared_tile where blocks share a tile)
//   finish             may_be_lost, mark_lost   compare a tile's sums with them, and make NaN of lost ones
//   store_float        stores NaN wherever a product is not finite
//   finish_tile        note_not_finite sets the tile's bit of kNotFinite, in shared memory
//   linear_kernel      Repair::repair_tiles, for the tiles whose bits are set
//   repair_tile        finds NaN and Inf in what this block has stored, and computes those elements again
//
// An entry so small in its scale, where the largest is below 2^15, that its last part is denormal is off by up to
// 2^-25. Such errors of x or of W add up, at random, to 2^-25 * 2^15 * sqrt(k) times the largest inverse of W's scale,
// in the scale of x's row. The limit is 2^18 times that, 2^11 with one product. A sum is lost if it and the sum of the
// thread's other column are within their limits, or if it is 2^8 times below its own: one alone may be near 0 by
// chance. A row of W that is 0 has limit 0, and does not keep the other column's sum from being lost; two such rows
// have nothing to lose. With the largest scale there is, that of zeros and of the smallest numbers, nothing is lost.
//
// An activation need not know of this: store_float adds the NaN after the activation, so that none can hide it. Sums of
// exactly 0 whose entries of W, not of x, became zero in their scale are not found.

template <typename T> __device__ __forceinline__ void Consumer<T>::note_w_inverse(const float (&w_inverse)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) largest_w_inverse[half] = fmaxf(largest_w_inverse[half], w_inverse[half]);
}

template <typename T> __device__ __forceinline__ void Consumer<T>::find_limits() {
  // The expected error, 2^-25 * 2^15, times the margin.
  const float factor = 0x1p-10f * (T::kParts == 2 ? 0x1p18f : 0x1p11f) * sqrtf(args.k);
#pragma unroll
  for (int half = 0; half < 2; ++half)
    limit[half] = largest_w_inverse[half] > kSmallestInverse ? factor * largest_w_inverse[half] : 0;
}

// Whether a pair of sums has a lost one. first, second: |sums| of the thread's two columns.
template <typename T>
__device__ __forceinline__ bool Consumer<T>::are_lost(float first, float second, bool (&lost)[2]) const {
  const bool both = first <= limit[0] && second <= limit[1] && limit[0] + limit[1] > 0;
  lost[0] = both || first < 0x1p-8f * limit[0], lost[1] = both || second < 0x1p-8f * limit[1];
  return lost[0] || lost[1];
}

// Whether any of the sums may be lost: rare, but for tiles with rows beyond M, whose sums are 0.
template <typename T>
template <int kGroups>
__device__ __forceinline__ bool Consumer<T>::may_be_lost(const float* sums) const {
  float smallest[2] = {INFINITY, INFINITY};
#pragma unroll
  for (int i = 0; i < 4 * kGroups; ++i) {
    float& least = smallest[i / 2 % 2];
    least = fminf(least, fabsf(sums[i]));
  }
  bool lost[2];
  return are_lost(smallest[0], smallest[1], lost);
}

// Replaces lost sums by NaN. A sum of 0 is taken for right, unless entries of x became zero. Code that rarely runs
// should be short, so this is a loop, which rotates the sums by a group each time to keep them in registers.
template <typename T>
template <int kGroups>
__device__ __forceinline__ void Consumer<T>::mark_lost(int m, float* sums) const {
#pragma unroll 1
  for (int group = 0; group < kGroups; ++group, m += 8) {
    float marked[4];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const RowInverse x_inverse = {args.x_split.inverse_scale[m + row]};
      bool lost[2];
      are_lost(fabsf(sums[row]), fabsf(sums[2 + row]), lost);
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const float sum = sums[2 * column + row];
        const bool is_lost =
            lost[column] && x_inverse.value() > kSmallestInverse && (sum != 0 || x_inverse.has_vanished());
        marked[2 * column + row] = is_lost ? NAN : sum;
      }
    }
#pragma unroll
    for (int i = 0; i < 4 * kGroups; ++i) sums[i] = i + 4 < 4 * kGroups ? sums[i + 4] : marked[i % 4];
  }
}

// ---- Repair (float32): lost sums, and those with NaN or Inf, computed again
//
// A product that is not finite may be so because of the conversion: Inf - Inf in lo, an overflow of the scaled sum, or
// a lost one. Repair computes all of them again, after the last tile, in the shared memory of the rings.
//
// Few in a warp: each as a float32 dot product. Many: the tensor cores multiply all rows of the panel again.
//   fp16x1  As TF32, whose exponents are float32's: there are no scales and no range to fall out of. TMA brings
//           float32, threads round it in shared memory.
//   fp16x3  From three bf16 numbers for each operand, which have float32's exponents, too: a = a1 + a2 + a3, each what
//           the one before leaves, cut off after 8 bits, and six of the nine products. Every thread loads float32 from
//           global memory, splits it and stores the parts in shared memory, into one of two buffers, while the tensor
//           cores multiply what is in the other. Entries below 2^-117 have parts too small for bf16, and keep fewer
//           bits. An Inf makes NaN of its parts. So what is not finite then is multiplied once more from a1 alone,
//           which keeps Inf, 0 and signs: where that is not finite it is what a float32 sum would be.

// The bit that stands for a tile in kNotFinite. Tiles may share one.
template <typename T> __device__ __forceinline__ uint32_t tile_bit(int m0, int n0) {
  return 1u << (m0 / T::kRows + n0 / kTileN) % 32;
}

template <typename T> struct RepairLayout {
  static constexpr bool kIsTf32 = T::kParts == 1;
  // Rows at once: all of a tile's as TF32, of three parts as many as registers allow.
  static constexpr int kRows = kIsTf32 ? T::kRows : std::min(64, T::kPanelRows), kSums = kRows / 2;
  static constexpr int kPendingWords = (kSums + 31) / 32;  // a thread's, of a bit for each of its sums
  static constexpr int kSumBytes = kSums * 4 * kConsumerThreads;
  static constexpr int kWPartBytes = kTileN * 128, kXPartBytes = kRows * 128;
  static constexpr int kBufferBytes = 3 * (kWPartBytes + kXPartBytes);
  static constexpr int kStageK = 32, kStageBytes = kWPartBytes + kXPartBytes;  // of float32
  static constexpr int kFewPending = 32;  // a warp's: dot products take about as long as the panel on the tensor cores
  using Shared = SharedLayout<T>;
  using FloatRing = Ring<std::max(1, T::kFloatStages), kStageBytes, 0, Shared::kFloatFull, Shared::kFloatFull>;
  static_assert(!T::kIsFloat || (kIsTf32 ? T::kFloatStages * kStageBytes : 2 * kBufferBytes) <= Shared::kWFull &&
                                    kSumBytes <= Shared::kWFull,
                "the barriers lie behind");
};

// Takes two numbers' upper halves, which are bf16 numbers cut off after 8 bits, and leaves the rest.
__device__ __forceinline__ uint32_t take_bf16(float& a, float& b) {
  const uint32_t bits_a = __float_as_uint(a), bits_b = __float_as_uint(b);
  a -= __uint_as_float(bits_a & 0xffff0000), b -= __uint_as_float(bits_b & 0xffff0000);
  return __byte_perm(bits_a, bits_b, 0x7632);
}

__device__ __forceinline__ bool is_finite(float v) { return fabsf(v) < INFINITY; }

// Adds a * b to sum, term by term as a plain float32 dot product does it.
__device__ __forceinline__ float add_dot(float4 a, float4 b, float sum) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

template <typename Element> __device__ __forceinline__ float bias_of(const Arguments& args, int n) {
  const Element* bias = static_cast<const Element*>(args.bias);
  return bias != nullptr && n < args.n ? to_compute(bias[n]) : 0;
}

// All consumers, after the last tile. Repair has its own Block, since what it needs must not take registers before.
template <typename T> struct Repair {
  using Layout = RepairLayout<T>;

  const Block<T> block;
  const Arguments& args;
  const TensorMaps& maps;
  const unsigned thread;
  const int warp, warpgroup, r, q;  // warp and warpgroup count the consumers'
  typename Layout::FloatRing ring;
  float total[Layout::kSums];

  __device__ __forceinline__ Repair(const Arguments& args_, const TensorMaps& maps_, const uint8_t* shared_memory)
      : block(args_, shared_memory),
        args(args_),
        maps(maps_),
        thread(consumer_thread<T>()),
        warp(warp_index() - T::kFirstConsumerWarp),
        warpgroup(warp / 4),
        r(block.lane / 4),
        q(block.lane % 4),
        ring{block.shared} {}

  // The bits of this block's tiles with products that are not finite. (An integer: bit 31 alone is -0 as a float.)
  static __device__ __forceinline__ uint32_t tiles_to_repair(uint32_t shared) {
    return __float_as_uint(ld_shared(shared + Layout::Shared::kNotFinite));
  }
  // Whether it is true in any consumer's thread. All of them must ask.
  static __device__ __forceinline__ bool any(bool of_this_thread) {
    return bar_red_or(kConsumersBarrier, kConsumerThreads, of_this_thread);
  }
  // A row of x or W; a transposed W's column. Rows outside are clamped: their values are unused, but are read.
  __device__ __forceinline__ const float* row_of_x(int m) const {
    return static_cast<const float*>(args.x) + min(m, args.m - 1) * args.x_stride;
  }
  __device__ __forceinline__ const float* row_of_w(int n) const {
    return static_cast<const float*>(args.w) + min(n, args.n - 1) * (T::kTransposedW ? 1 : args.w_stride);
  }
  // Loads four k of them.
  __device__ __forceinline__ float4 load_x(int m, int k) const { return load_four(row_of_x(m), k, args.k); }
  __device__ __forceinline__ float4 load_w(int n, int k) const {
    const float* w = row_of_w(n);
    if (!T::kTransposedW) return load_four(w, k, args.k);
    auto or_zero = [&](int k_) { return k_ < args.k ? w[k_ * args.w_stride] : 0; };
    return {or_zero(k), or_zero(k + 1), or_zero(k + 2), or_zero(k + 3)};
  }
  template <int kParts> __device__ __forceinline__ void multiply_parts(int m_first, int n_tile);
  __device__ __forceinline__ void multiply_tf32(int m_first, int n_tile);
  __device__ __forceinline__ void repair_tiles();
  __device__ __forceinline__ void repair_tile(int m_tile, int n_tile);
};

// total = x * W^T for kRows rows of x from m_first on and the tile's columns, from kParts bf16 parts.
template <typename T>
template <int kParts>
__device__ __forceinline__ void Repair<T>::multiply_parts(int m_first, int n_tile) {
  float partial[Layout::kSums];  // the sums of a block of k
  // A thread's part of a block: four k of every 16th row, or of a transposed W every other four k of a row.
  constexpr int kWFours = kTileN / 16, kXFours = Layout::kRows / 16;
  const unsigned row = thread / 16, four = thread % 16, row_t = thread % kTileN, four_t = thread / kTileN;
  float4 w[kWFours], x[kXFours];
  const float *w_next[T::kTransposedW ? 1 : kWFours], *x_next[kXFours];
  if (T::kTransposedW) w_next[0] = row_of_w(n_tile + row_t) + 4 * four_t * args.w_stride;
#pragma unroll
  for (int i = 0; i < kWFours && !T::kTransposedW; ++i) w_next[i] = row_of_w(n_tile + row + 16 * i) + 4 * four;
#pragma unroll
  for (int i = 0; i < kXFours; ++i) x_next[i] = row_of_x(m_first + row + 16 * i) + 4 * four;
  auto load = [&](int k0) {
    const bool is_inside = k0 + int(4 * four) < args.k;
#pragma unroll
    for (int i = 0; i < kWFours; ++i) {
      if constexpr (T::kTransposedW) {
        const int left = args.k - k0 - 4 * int(four_t);
        auto entry = [&](int k) { return k < left ? w_next[0][k * args.w_stride] : 0; };
        w[i] = {entry(8 * i), entry(8 * i + 1), entry(8 * i + 2), entry(8 * i + 3)};
      } else {
        w[i] = is_inside ? *reinterpret_cast<const float4*>(w_next[i]) : float4{};
        w_next[i] += kTileK;
      }
    }
#pragma unroll
    for (int i = 0; i < kXFours; ++i) {
      x[i] = is_inside ? *reinterpret_cast<const float4*>(x_next[i]) : float4{};
      x_next[i] += kTileK;
    }
    if (T::kTransposedW) w_next[0] += kTileK * args.w_stride;
  };
  // Splits four numbers and stores their parts, under the swizzle.
  auto store_parts = [&](float4 v, unsigned row_, unsigned four_, uint32_t to, int part_bytes) {
    const uint32_t address = to + swizzled(row_, four_ / 2) + four_ % 2 * 8;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const uint32_t first = take_bf16(v.x, v.y), second = take_bf16(v.z, v.w);
      st_shared_v2(address + part * part_bytes, first, second);
    }
  };
  auto store = [&](uint32_t buffer) {
#pragma unroll
    for (int i = 0; i < kWFours; ++i)
      store_parts(w[i], T::kTransposedW ? row_t : row + 16 * i, T::kTransposedW ? four_t + 2 * i : four, buffer,
                  Layout::kWPartBytes);
#pragma unroll
    for (int i = 0; i < kXFours; ++i)
      store_parts(x[i], row + 16 * i, four, buffer + kParts * Layout::kWPartBytes, Layout::kXPartBytes);
  };
  auto add_partial = [&] {
#pragma unroll
    for (int i = 0; i < Layout::kSums; ++i) total[i] += partial[i];
  };
  auto multiply_block = [&](uint32_t buffer) {
    const uint32_t w_descriptor = matrix_descriptor(buffer + warpgroup * (64 * 128));
    const uint32_t x_descriptor = matrix_descriptor(buffer + kParts * Layout::kWPartBytes);
    bool adds = false;
    wgmma_fence();
#pragma unroll
    for (int order = kParts - 1; order >= 0; --order)  // the smallest first
#pragma unroll
      for (int part = 0; part <= order; ++part)
#pragma unroll
        for (int step = 0; step < 4; ++step, adds = true)
          Wgmma<Layout::kRows>::template multiply<__nv_bfloat16>(
              partial, kDescriptorUpper | (w_descriptor + part * (Layout::kWPartBytes / 16) + 2 * step),
              kDescriptorUpper | (x_descriptor + (order - part) * (Layout::kXPartBytes / 16) + 2 * step), adds);
    wgmma_commit_group();
  };

#pragma unroll
  for (int i = 0; i < Layout::kSums; ++i) total[i] = 0;
  load(0);
#pragma unroll 1
  for (int k0 = 0; k0 < args.k; k0 += kTileK) {
    const uint32_t buffer = block.shared + k0 / kTileK % 2 * Layout::kBufferBytes;
    store(buffer);
    load(k0 + kTileK);
    fence_proxy_async_shared();
    wgmma_wait_group<0>();  // the block before, whose buffer is then free
    if (k0 > 0) add_partial();
    bar_sync(kConsumersBarrier, kConsumerThreads);
    multiply_block(buffer);
  }
  wgmma_wait_group<0>();
  add_partial();
  bar_sync(kConsumersBarrier, kConsumerThreads);  // both buffers are free
}

// The nearest TF32 number; the tensor core would cut off.
__device__ __forceinline__ float round_to_tf32(float v) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(v));
  return __uint_as_float(rounded);
}

// The same as TF32: TMA brings float32, all threads round a block in place while the one before is multiplied, and the
// tensor cores add up all of K.
template <typename T> __device__ __forceinline__ void Repair<T>::multiply_tf32(int m_first, int n_tile) {
  const int k_blocks = (args.k + Layout::kStageK - 1) / Layout::kStageK;
  auto next = ring;  // to be filled
  auto fetch = [&](int k_block) {
    if (thread == 0 && k_block < k_blocks) {
      const uint32_t barrier = next.full_barrier(), to = next.address();
      mbarrier_arrive_expect_tx(barrier, Layout::kStageBytes);
      cp_async_bulk_tensor_2d(to, &maps.float_w, k_block * Layout::kStageK, n_tile, barrier, 1 << block.rank);
      cp_async_bulk_tensor_2d(to + Layout::kWPartBytes, &maps.float_x, k_block * Layout::kStageK, m_first, barrier,
                              1 << block.rank);
    }
    next.advance();
  };
  fence_proxy_async_shared();  // without it what threads have stored here might come after what TMA brings
  bar_sync(kConsumersBarrier, kConsumerThreads);
  static_assert(T::kFloatStages == 4);
  fetch(0), fetch(1);
#pragma unroll 1
  for (int k_block = 0; k_block < k_blocks; ++k_block, ring.advance()) {
    ring.wait_full();
#pragma unroll 4
    for (int at = thread * 16; at < Layout::kStageBytes; at += kConsumerThreads * 16) {
      const float4 v = ld_shared_v4(ring.address() + at);
      const float rounded[4] = {round_to_tf32(v.x), round_to_tf32(v.y), round_to_tf32(v.z), round_to_tf32(v.w)};
      st_shared_v4(ring.address() + at, rounded);
    }
    fence_proxy_async_shared();
    bar_sync(kConsumersBarrier, kConsumerThreads);
    fetch(k_block + 2);  // where the block before the last was, with which both warpgroups were done at this barrier
    const uint32_t w = matrix_descriptor(ring.address() + warpgroup * (64 * 128));
    const uint32_t x = matrix_descriptor(ring.address() + Layout::kWPartBytes);
    wgmma_fence();
#pragma unroll
    for (int panel = 0; panel < T::kPanels; ++panel)
#pragma unroll
      for (int step = 0; step < 4; ++step)  // 8 k are 32 bytes
        Wgmma<T::kPanelRows>::template multiply<float>(
            total + panel * (T::kPanelRows / 2), kDescriptorUpper | (w + 2 * step),
            kDescriptorUpper | (x + panel * (T::kPanelRows * 128 / 16) + 2 * step), k_block > 0 || step > 0);
    wgmma_commit_group();
    wgmma_wait_group<1>();
  }
  wgmma_wait_group<0>();
  bar_sync(kConsumersBarrier, kConsumerThreads);  // the stages are free for store_where
}

// Repairs what this block stores of a tile.
template <typename T> __device__ __forceinline__ void Repair<T>::repair_tile(int m_tile, int n_tile) {
  constexpr int kWords = Layout::kPendingWords;
  float *out = static_cast<float*>(args.out), *z = static_cast<float*>(args.z);
  const bool lacks_out = T::kMayLackOut && out == nullptr;
  const float* stored = lacks_out ? z : out;
  const int m_begin = T::kSplitK ? m_tile + block.part.first_group * 8 : m_tile;
  const int m_end = min(T::kSplitK ? m_tile + block.part.last_group * 8 : m_tile + T::kRows, args.m);
  auto store = [&](int m, int n, float product) {
    const int64_t at = int64_t(m) * args.n + n;
    const float value = product + bias_of<float>(args, n);
    if (z != nullptr) z[at] = value;
    if (!lacks_out) out[at] = activation(value, args.s);
  };
#pragma unroll 1
  for (int m_first = m_tile; m_first < m_end; m_first += Layout::kRows) {
    // A thread's sums, as wgmma has them.
    auto row_of_sum = [&](int i) { return m_first + i / 4 * 8 + 2 * q + i % 2; };
    auto column_of_sum = [&](int i) { return n_tile + warp * 16 + r + i / 2 % 2 * 8; };
    uint32_t pending[kWords];  // a bit for each of them that must be computed again
    int count = 0;
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      pending[word] = 0;
#pragma unroll 4
      for (int bit = 0; bit < Layout::kSums / kWords; ++bit) {
        const int i = word * 32 + bit, m = row_of_sum(i), n = column_of_sum(i);
        const bool is_inside = m >= m_begin && m < m_end && n < args.n;
        if (is_inside && !is_finite(stored[int64_t(m) * args.n + n])) pending[word] |= 1u << bit;
      }
      count += __popc(pending[word]);
    }
    // Stores those pending sums that are finite in `total`, or those that are not, and says whether some are left.
    // Through shared memory, so that they can be indexed.
    auto store_where = [&](bool finite) {
      const uint32_t mine = block.shared + 4 * thread;
      bool is_left = false;
#pragma unroll
      for (int i = 0; i < Layout::kSums; ++i) st_shared(mine + i * (4 * kConsumerThreads), total[i]);
#pragma unroll
      for (int word = 0; word < kWords; ++word) {
#pragma unroll 1
        for (uint32_t left = pending[word]; left != 0; left &= left - 1) {
          const int bit = __ffs(left) - 1, i = word * 32 + bit;
          const float sum = ld_shared(mine + i * (4 * kConsumerThreads));
          if (is_finite(sum) == finite) store(row_of_sum(i), column_of_sum(i), sum), pending[word] ^= 1u << bit;
        }
        is_left |= pending[word] != 0;
      }
      return is_left;
    };
    if (any(__reduce_add_sync(~0u, count) > Layout::kFewPending)) {
      if constexpr (Layout::kIsTf32) {
        multiply_tf32(m_first, n_tile);
        store_where(true), store_where(false);
      } else {
        multiply_parts<3>(m_first, n_tile);
        if (any(store_where(true))) {
          multiply_parts<1>(m_first, n_tile);
          store_where(false);
        }
      }
    }
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
#pragma unroll 1
      for (unsigned lanes; (lanes = __ballot_sync(~0u, pending[word] != 0)) != 0;) {
        const int owner = __ffs(lanes) - 1, i = word * 32 + __ffs(pending[word]) - 1;
        const int m = __shfl_sync(~0u, row_of_sum(i), owner), n = __shfl_sync(~0u, column_of_sum(i), owner);
        float sum = 0;
#pragma unroll 4
        for (int k = block.lane * 4; k < args.k; k += 128) sum = add_dot(load_w(n, k), load_x(m, k), sum);
        for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
        if (block.lane == owner) {
          store(m, n, sum);
          pending[word] &= pending[word] - 1;
        }
      }
    }
  }
}

// Repairs those tiles of this block that need it.
template <typename T> __device__ __forceinline__ void Repair<T>::repair_tiles() {
  // Through shuffles, or the compiler keeps what follows from them throughout the kernel.
  auto hidden = [](auto value) { return __shfl_sync(~0u, value, 0); };
  const TileScheduler<T> scheduler{hidden(args.m), hidden(args.n)};
  const uint32_t bits = tiles_to_repair(block.shared);
  scheduler.for_each_tile(block.rank, hidden(block.blocks), hidden(gridDim.x), [&](int m0, int n0) {
    if (bits & tile_bit<T>(m0, n0)) repair_tile(m0, n0);
  });
}

// ---- Stores
//
// Of a group of 8 rows a thread has four elements: two rows of out, from the group's first + 2q on, and two columns, as
// [column][row]. A warp's stores fill whole 32-byte sectors. z is stored by the same code as out, in a pass of its own.
// Measured: what is rarely executed should be short or far away, since instructions are read from memory, too.

// The inverses of the scales of x's rows m and m + 1, as in RowInverse.
template <typename T> __device__ __forceinline__ float2 Consumer<T>::x_inverses(int m) const {
  return *reinterpret_cast<const float2*>(args.x_split.inverse_scale + m);
}

// Stores float32. Where a product is not finite it stores NaN, whatever the activation is: repair looks for those.
// check becomes NaN with the first.
template <typename T>
template <int kGroups>
__device__ __forceinline__ void Consumer<T>::store_float(Element* to, bool is_z, int m, const float* sums,
                                                         float2 first_x_inverses, float& check) const {
  to += int64_t(m) * args.n + n_of(r, 0);
#pragma unroll
  for (int group = 0; group < kGroups; ++group, to += 8 * int64_t(args.n)) {
    const float2 both = group == 0 ? first_x_inverses : x_inverses(m + 8 * group);
    const RowInverse rows[2] = {{both.x}, {both.y}};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float product = sums[4 * group + e] * rows[e % 2].value();
      const float nan_unless_finite = product * 0;
      check += nan_unless_finite;
      const float value = product + bias[e / 2], stored = select(is_z, value, activation(value, args.s));
      if (m + group * 8 + e % 2 < args.m && n_of(r, e / 2) < args.n)
        (e % 2 ? to + args.n : to)[e / 2 * T::kColumnStep] = stored + nan_unless_finite;
    }
  }
}

// Marks the tile for repair if a product was not finite. Among many sums one is small enough to be lost by chance, and
// repair should not scan all of a block's tiles for it.
template <typename T> __device__ __forceinline__ void Consumer<T>::note_not_finite(float check) const {
  if (T::kIsFloat && check != 0) red_shared_or(shared + Shared::kNotFinite, tile_bit<T>(m0, n0));
}

// Stores 16 bits. Neighbours along n exchange, so that each has two columns of one row, which are 4 bytes.
template <typename T>
template <int kGroups>
__device__ __forceinline__ void Consumer<T>::store_pairs(Element* to, bool is_z, int m, const float* sums) const {
  const bool odd = r % 2, is_whole = m0 + T::kRows <= args.m && n0 + kTileN <= args.n && args.n % 2 == 0;
  uint32_t both[kGroups][2];
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    float v[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float value = sums[4 * group + e] + bias[e / 2];
      v[e] = select(is_z, value, activation<true>(value, args.s));
    }
    const Vector<Element, 2> even_row = {from_compute<Element>(v[0]), from_compute<Element>(v[2])};
    const Vector<Element, 2> odd_row = {from_compute<Element>(v[1]), from_compute<Element>(v[3])};
    const uint32_t rows[2] = {reinterpret_cast<const uint32_t&>(even_row), reinterpret_cast<const uint32_t&>(odd_row)};
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
}

// Stores 16 bits through shared memory, from where TMA stores whole lines while the next box is made.
template <typename T>
__device__ __forceinline__ void Consumer<T>::store_boxes(const CUtensorMap* map, bool is_z, const float* sums) const {
  const bool is_leader = threadIdx.x % 128 == 0;  // of the warpgroup
  const int barrier = kWarpgroupBarriers + warpgroup;
  const uint32_t boxes = shared + Shared::kBoxes + warpgroup * (2 * T::kBoxBytes);
#pragma unroll
  for (int box = 0; box < T::kRows / T::kBoxRows; ++box) {
    const uint32_t offset = box % 2 * T::kBoxBytes;
    if (is_leader) cp_async_bulk_wait_group_read<1>();  // the box before the last, which was here, has left
    bar_sync(barrier, 128);
    // stmatrix's matrices are columns r of a group of 8 rows, columns r + 8, and the same of the next group; they lie
    // under TMA's swizzle. The lane is read anew, or the compiler keeps the address for the next tile, in a register
    // that it lacks.
    const int thread = laneid(), matrix = thread / 8, row = thread % 8, column = warp % 4 * 2 + matrix % 2;
    const uint32_t mine = boxes + offset + (matrix / 2 * 8 + row) * 128 + (column ^ row) * 16;
#pragma unroll
    for (int first_row = 0; first_row < T::kBoxRows; first_row += 16) {
      const float* v = sums + (box * T::kBoxRows + first_row) / 8 * 4;
      uint32_t matrices[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        Vector<Element, 2> two;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float value = v[2 * i + e] + bias[i % 2];
          two.v[e] = from_compute<Element>(select(is_z, value, activation<true>(value, args.s)));
        }
        matrices[i] = reinterpret_cast<const uint32_t&>(two);
      }
      stmatrix_x4_trans(mine + first_row * 128, matrices);
    }
    fence_proxy_async_shared();
    bar_sync(barrier, 128);
    if (is_leader) {
      cp_async_bulk_tensor_2d_store(map, n0 + warpgroup * 64, m0 + box * T::kBoxRows, boxes + offset);
      cp_async_bulk_commit_group();
    }
  }
}

// Finishes kGroups groups of 8 rows: marks lost sums and stores z, where it is wanted, and out. m: the first group's
// first row + 2q. first_x_inverses: with float32 x_inverses(m), which was loaded before what branches here.
template <typename T>
template <int kGroups>
__device__ __forceinline__ void Consumer<T>::finish(int m, float* sums, float2 first_x_inverses, float& check) {
  Element *out = static_cast<Element*>(args.out), *z = static_cast<Element*>(args.z);
  if constexpr (T::kIsFloat)
    if (may_be_lost<kGroups>(sums)) mark_lost<kGroups>(m, sums);
#pragma unroll 1
  for (bool is_z = z != nullptr;; is_z = false) {
    Element* to = is_z ? z : out;
    // Hides from the compiler that both passes begin with the same values: it would compute what follows from them once
    // and keep it, but no registers are free.
    asm volatile("" : "+f"(bias[0]), "+f"(bias[1]), "+r"(m));
    if constexpr (T::kIsFloat) {
      store_float<kGroups>(to, is_z, m, sums, first_x_inverses, check);
    } else if (T::kStoresBoxes && args.can_store_boxes) {
      if constexpr (T::kStoresBoxes) store_boxes(is_z ? &maps.z : &maps.out, is_z, sums);
    } else {
      constexpr int kBatch = kGroups < 4 ? kGroups : 4;  // as many as registers allow
#pragma unroll
      for (int group = 0; group < kGroups; group += kBatch)
        store_pairs<kBatch>(to, is_z, m + group * 8, sums + 4 * group);
    }
    if (!is_z || (T::kMayLackOut && out == nullptr)) break;
  }
}

template <typename T> __device__ __forceinline__ void Consumer<T>::finish_tile() {
  r = laneid() / 4, q = laneid() % 4;
  bias[0] = bias_of<Element>(args, n_of(r, 0)), bias[1] = bias_of<Element>(args, n_of(r, 1));
  if constexpr (T::kSplitK) {
    finish_shared_tile();
  } else if constexpr (T::kIsFloat) {
    float check = 0;
    find_limits();
    // First 128 rows, then the others in the same registers. (A tile of 128 rows copies them to themselves.)
#pragma unroll 1
    for (int first = 0; first < T::kRows && m0 + first < args.m; first += 128) {
      const int m = m0 + first + 2 * q;
      finish<16>(m, total, x_inverses(m), check);
#pragma unroll
      for (int i = 0; i < 64; ++i) total[i] = total[T::kRows / 2 - 64 + i];
    }
    note_not_finite(check);
  } else {
    float check = 0;
    finish<T::kGroups>(m0 + 2 * q, total, {}, check);
  }
}

// One thread: initializes the barriers and fetches what can be fetched at once.
template <typename T> __device__ __forceinline__ void set_up(const Block<T>& block, const CUtensorMap& w_map) {
  using Shared = SharedLayout<T>;
  const auto initialize = [&](int stages, int first_barrier, int arrivals) {
    for (int i = 0; i < stages; ++i) mbarrier_init(block.shared + first_barrier + 8 * i, arrivals);
  };
  initialize(T::kWStages, Shared::kWFull, 1);
  initialize(T::kWStages, Shared::kWEmpty, T::kSharesW ? kConverterWarps : kConsumerWarps);
  initialize(T::kConvertedStages, Shared::kConvertedFull, 32 * kConverterWarps);
  initialize(T::kConvertedStages, Shared::kConvertedEmpty, kConsumerThreads + kConsumerWarps);
  initialize(T::kXStages, Shared::kXFull, 1);
  initialize(T::kXStages, Shared::kXEmpty, kConsumerWarps * T::kBlocksSharingX);
  initialize(T::kFloatStages, Shared::kFloatFull, 1);
  mbarrier_init(block.shared + Shared::kSumsFull, 1);
  st_shared(block.shared + Shared::kNotFinite, 0);
  fence_mbarrier_init();
  if (T::kSplitK) {  // expects what every other block sends this one
    const int groups = block.part.last_group - block.part.first_group;
    mbarrier_arrive_expect_tx(
        block.shared + Shared::kSumsFull,
        (int(block.blocks) - 1) * (groups * kGroupBytes + (groups > 0 ? T::kSentWInverseBytes : 0)));
  }
  prefetch_w(block, w_map);
}

#endif  // HAS_SM90A

// ---- The kernel: assigns roles

template <typename T>
__global__ void __launch_bounds__(T::kThreads, 1)
    linear_kernel(const __grid_constant__ TensorMaps maps, const __grid_constant__ Arguments args) {
#ifdef HAS_SM90A
  extern __shared__ __align__(1024) uint8_t shared_memory[];  // the swizzle repeats every 1024 bytes
  const Block<T> block(args, shared_memory);
  if (threadIdx.x == 0) {
    set_up(block, maps.w);
    prefetch_tensormap(&maps.x);
    if (T::kParts == 2) prefetch_tensormap(&maps.x_lo);
  }
  __syncthreads();
  const int warp = warp_index();
  // Another block's barriers may be used only once that block has initialized them. Blocks that share a tile first use
  // them at its end, and wait there.
  barrier_cluster_arrive_relaxed();
  if (!T::kSplitK) barrier_cluster_wait();

  // No block may end while another still multicasts or copies to it, or arrives on its barriers.
  auto leave_cluster = [] {
    if (T::kSplitK) return;
    barrier_cluster_arrive();
    barrier_cluster_wait();
  };

  if (warp < 4) {
    setmaxnreg_dec<T::kProducerRegisters>();
    // Two threads, so that W may run ahead by its whole ring while x waits for a stage, and the other way round.
    if (block.lane == 0 && warp < 2) {
      if (warp == 0)
        produce_w(block, maps.w);
      else
        produce_x(block, maps.x, maps.x_lo);
    }
    __syncwarp();  // the other lanes have waited here
    if (T::kSplitK) barrier_cluster_wait();
  } else if (warp < T::kFirstConsumerWarp) {
    if constexpr (T::kSharesW) {
      setmaxnreg_dec<T::kConverterRegisters>();
      convert_w(block);
    }
  } else {
    setmaxnreg_inc<T::kConsumerRegisters>();
    griddepcontrol_wait();  // for what split_rows_kernel has written: inverse_scale, and what repair reads
    Consumer<T> consumer(block, maps);
    if (consumer.warpgroup == 1) consumer.give_turn();
    block.for_each_tile([&](int m0, int n0) {
      consumer.m0 = m0, consumer.n0 = n0;
      consumer.multiply();
      consumer.finish_tile();
    });
    if (T::kStoresBoxes && threadIdx.x % 128 == 0) cp_async_bulk_wait_group_read<0>();
    if (consumer.warpgroup == 0) consumer.await_turn();  // takes the last turn, so that the barrier ends as it began
    if (!T::kIsFloat || !Repair<T>::any(Repair<T>::tiles_to_repair(block.shared) != 0)) {
      leave_cluster();  // not behind the instructions that follow, which are rarely needed and far away
      return;
    }
    if constexpr (T::kIsFloat) {
      // Repair overwrites the rings. The other block has what this one's converters sent it once it has used it.
      if constexpr (T::kSharesW) consumer.w_ring.wait_all_empty();
      Repair<T>(args, maps, shared_memory).repair_tiles();
    }
  }
  leave_cluster();
#else
  __trap();  // compiled for another architecture, where is_hopper keeps it from being launched
#endif
}

// ---- Launches

template <typename T> constexpr CUtensorMapDataType kTensorMapType = CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
template <> constexpr CUtensorMapDataType kTensorMapType<__half> = CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
template <> constexpr CUtensorMapDataType kTensorMapType<__nv_bfloat16> = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;

// Makes the tensor map of a row-major 2-d tensor: boxes of `box_rows` rows of 128 bytes, 128-byte swizzle, zeros
// outside.
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

// A launch of linear_kernel<T>. It must not be copied: config points to its attributes.
template <typename T> struct Launch {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attributes[2] = {};

  Launch(int clusters, int blocks_per_cluster, cudaStream_t stream = nullptr) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {unsigned(blocks_per_cluster), 1, 1};
    // Start while split_rows_kernel runs out.
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = unsigned(clusters) * blocks_per_cluster;
    config.blockDim = T::kThreads;
    config.dynamicSmemBytes = T::kSharedBytes;
    config.stream = stream;
    config.attrs = attributes;
    // Only where that kernel comes between: what is fetched without waiting, W, was then complete before it began. With
    // 16 bits the launch before may be what makes W, or its copy.
    config.numAttrs = T::kIsFloat ? 2 : 1;
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
  if constexpr (T::kKernel == Kernel::kFp16x1Staged)
    error = launch_split_rows<256, 1>(args.w, args.w_stride, args.w_split, args.n, TileScheduler<T>::kClusterN, args.k,
                                      T::kKeepsOrderOfK, stream);
  if constexpr (T::kIsFloat)
    if (error == cudaSuccess)
      error = launch_split_rows<T::kSplitK ? 512 : 256, T::kParts>(
          args.x, args.x_stride, args.x_split, args.m, TileScheduler<T>::kClusterM, args.k, T::kKeepsOrderOfK, stream);
  TensorMaps maps;
  // Measured: without promotion 1 us less where W is only read once, 0.2 % more elsewhere.
  constexpr auto promotion = T::kSplitK ? CU_TENSOR_MAP_L2_PROMOTION_NONE : CU_TENSOR_MAP_L2_PROMOTION_L2_256B;
  const auto encode = [&](CUtensorMap* map, auto* base, int64_t rows, int k, int64_t stride, int box_rows) {
    if (error == cudaSuccess) error = encode_tensor_map(map, base, rows, k, stride, box_rows, promotion);
  };
  const SplitRows &x = args.x_split, &w = args.w_split;
  const int x_rows = T::x_box_rows(args.m);
  const Element* entries = static_cast<const Element*>(args.w);
  if constexpr (T::kKernel == Kernel::kFp16x1Staged)
    encode(&maps.w, w.hi, args.n, w.padded_k, w.padded_k, T::kWBoxRows);
  else if constexpr (T::kTransposedW)
    encode(&maps.w, entries, args.k, args.n, args.w_stride, T::kWBoxRows);
  else
    encode(&maps.w, entries, args.n, args.k, args.w_stride, T::kWBoxRows);
  if constexpr (T::kIsFloat) {
    encode(&maps.x, x.hi, x.rows, x.padded_k, x.padded_k, x_rows);
    if (T::kParts == 2) {
      encode(&maps.x_lo, x.lo, x.rows, x.padded_k, x.padded_k, x_rows);
    } else {
      encode(&maps.float_w, entries, args.n, args.k, args.w_stride, kTileN);
      encode(&maps.float_x, static_cast<const Element*>(args.x), args.m, args.k, args.x_stride, T::kRows);
    }
  } else {
    encode(&maps.x, static_cast<const Element*>(args.x), args.m, args.k, args.x_stride, x_rows);
    if constexpr (T::kStoresBoxes)
      if (args.can_store_boxes) {
        encode(&maps.out, static_cast<Element*>(args.out), args.m, args.n, args.n, T::kBoxRows);
        if (args.z != nullptr) encode(&maps.z, static_cast<Element*>(args.z), args.m, args.n, args.n, T::kBoxRows);
      }
  }
  static_assert(kPaddedRowsUnit % TileScheduler<T>::kClusterM == 0, "inverse_scale is read up to a cluster's last row");
  int resident;
  if (error == cudaSuccess) error = prepare_kernel<T>(device, &resident);
  if (error != cudaSuccess) return error;
  const int clusters = TileScheduler<T>{args.m, args.n}.clusters();
  const Launch<T> launch(T::kSplitK ? clusters : std::min(resident, clusters), T::kSplitK ? splits : T::kClusterBlocks,
                         stream);
  error = cudaLaunchKernelEx(&launch.config, linear_kernel<T>, maps, args);
  return error != cudaSuccess ? error : cudaGetLastError();
}

// Launches a tile of `rows` rows, if there is such a variant; select_tile, in the last part, finds the best.
template <Kernel kKernel, typename Element, bool kTransposedW = false>
static cudaError_t launch_variant(const Arguments& args, int rows, int splits, int device, cudaStream_t stream) {
  const bool is_split = splits >= 1 && splits <= kMaxSplits && splits <= ceil_div(args.k, kTileK);
  const auto launch_as = [&](auto tile) { return launch_tile<decltype(tile)>(args, splits, device, stream); };
  if (splits == 0 && rows == 256) return launch_as(Tile<kKernel, Element, 256, false, kTransposedW>());
  if constexpr (kKernel == Kernel::kFp16x3)
    if (splits == 0 && rows == 128) return launch_as(Tile<kKernel, Element, 128, false, kTransposedW>());
  // A copy of W pays with many rows only.
  if constexpr (kKernel != Kernel::kFp16x1Staged) {
    if (is_split && rows == 128) return launch_as(Tile<kKernel, Element, 128, true, kTransposedW>());
    if (is_split && rows == 64) return launch_as(Tile<kKernel, Element, 64, true, kTransposedW>());
    if (is_split && rows == 32) return launch_as(Tile<kKernel, Element, 32, true, kTransposedW>());
    if (is_split && rows == 16) return launch_as(Tile<kKernel, Element, 16, true, kTransposedW>());
  }
  return cudaErrorInvalidValue;
}

}  // namespace hopper

// ---------------------------------------------------------------------------- the C interface of what is above

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

// Also lets CUDA forget the error, or whoever launches the next kernel would be told of it.
const char* error_string(int error) {
  cudaGetLastError();
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

// z, out: numel contiguous elements; out may equal z.
int epilogue_forward(const void* z, void* out, int64_t numel, double scale, int dtype, int device,
                     cudaStream_t stream) {
  const DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return guard.error;
  DISPATCH_DTYPE(dtype, launch_epilogue_forward, z, out, numel, scale, stream);
}

// grad, z, dz: [rows, cols] contiguous; dbias: [cols]; partial_sums: [strips, cols] of the compute type. rows, cols,
// strips >= 1.
int epilogue_backward(const void* grad, const void* z, void* dz, void* partial_sums, void* dbias, int64_t rows,
                      int64_t cols, int64_t strips, double scale, int dtype, int device, cudaStream_t stream) {
  const DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return guard.error;
  DISPATCH_DTYPE(dtype, launch_epilogue_backward, grad, z, dz, partial_sums, dbias, rows, cols, strips, scale, stream);
}

// Whether hopper::linear_kernel runs on the device: compute capability 9.0. 0 also where CUDA does not say.
int is_hopper(int device) {
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) cudaGetLastError();
  return major == 9 && minor == 0;
}

// Bytes of scratch memory that linear_hopper needs.
int64_t linear_hopper_scratch(int64_t m, int64_t n, int64_t k, int kernel) {
  const auto which = static_cast<Kernel>(kernel);
  if (which == Kernel::kWgmma16) return 0;
  return SplitRows::bytes(m, k, parts_of(which)) + (which == Kernel::kFp16x1Staged ? SplitRows::bytes(n, k, 1) : 0);
}

// The fused layer on compute capability 9.0, in tiles of `rows` by 128; splits: blocks that share a tile, each with a
// part of K, or 0 where pairs of blocks share x or W. cudaErrorInvalidValue for a tile that does not exist.
//   kernel: a Kernel; kWgmma16 with float16 and bfloat16, one of the others with float32.
//   x [m, k] and w [n, k] with unit stride along k, rows and pointers in multiples of 16 bytes; in float32 k is a
//   multiple of 4. bias [n], or null; out [m, n] and z [m, n], contiguous, z null where it is not wanted. m, n, k from
//   1 to 2^31 - 2048. scratch: 128-byte aligned, null where none is needed.
//   transposed_w: kFp16x3 only. w is [k, n], and k need be no multiple of 4 if rows of x go on with zeros up to one.
//   out may be null: z = x·w + bias is then the only result.
int linear_hopper(const void* x, const void* w, const void* bias, void* out, void* z, void* scratch, int64_t x_stride,
                  int64_t w_stride, int64_t m, int64_t n, int64_t k, double scale, int dtype, int kernel,
                  int transposed_w, int rows, int splits, int device, cudaStream_t stream) {
  const DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return guard.error;
  const auto which = static_cast<Kernel>(kernel);
  const auto type = static_cast<DType>(dtype);
  // Float32 must be converted, 16 bits must not be.
  const bool is_float = type == DType::kFloat32, is_16_bit = type == DType::kFloat16 || type == DType::kBFloat16;
  if (which == Kernel::kWgmma16 ? !is_16_bit : !is_float || scratch == nullptr) return cudaErrorInvalidValue;
  if (which == Kernel::kLibrary || (transposed_w && which != Kernel::kFp16x3)) return cudaErrorInvalidValue;
  const int parts = parts_of(which);
  const SplitRows x_split(scratch, m, k, parts);
  const SplitRows w_split(static_cast<char*>(scratch) + SplitRows::bytes(m, k, parts), n, k, 1);
  const bool can_store_boxes = n % 8 == 0 && aligned16(out, z, z);
  const hopper::Arguments args = {x,        w,        bias,   out,    z,      x_split,      w_split,
                                  x_stride, w_stride, int(m), int(n), int(k), float(scale), can_store_boxes};
  if (which == Kernel::kFp16x3 && transposed_w)
    return hopper::launch_variant<Kernel::kFp16x3, float, true>(args, rows, splits, device, stream);
  if (which == Kernel::kFp16x3)
    return hopper::launch_variant<Kernel::kFp16x3, float>(args, rows, splits, device, stream);
  if (which == Kernel::kFp16x1)
    return hopper::launch_variant<Kernel::kFp16x1, float>(args, rows, splits, device, stream);
  if (which == Kernel::kFp16x1Staged)
    return hopper::launch_variant<Kernel::kFp16x1Staged, float>(args, rows, splits, device, stream);
  if (type == DType::kFloat16)
    return hopper::launch_variant<Kernel::kWgmma16, __half>(args, rows, splits, device, stream);
  return hopper::launch_variant<Kernel::kWgmma16, __nv_bfloat16>(args, rows, splits, device, stream);
}

}  // extern "C"

#else  // __CUDACC__: from here on for g++
// First the choice among kernels, which `g++ -x c++ -D SELECTION_ONLY` compiles alone, without PyTorch; then the
// operators.

#include <algorithm>
#include <cmath>
#include <limits>

// ---------------------------------------------------------------------------- which kernel serves a product

// Every product is served by the candidate that is expected to be the fastest: the library, or a tile of the fused
// kernel. The costs are microseconds on an H200, without what every candidate costs. Those of tiles are fitted to times
// of every tile, those of the library to bench/results/nvidia-h200-grid.json; expect an error of several percent.

constexpr const char* kKernelNames[] = {"wgmma16", "fp16x3", "fp16x1", "fp16x1_staged", "library"};  // as Kernel

enum class Precision : int { kFloat32, kTF32, k16Bit };

struct Choice {
  Kernel kernel;
  int rows, splits;  // see linear_hopper
};

// x [m, k] times W [n, k], or [k, n] where it is transposed.
struct Product {
  int64_t m, n, k;
  Precision precision;
  bool transposed_w;

  double products() const { return double(m) * double(n) * double(k); }
  double weight_megabytes() const { return (precision == Precision::k16Bit ? 2e-6 : 4e-6) * double(n) * double(k); }
  // Rows of x and W must be multiples of 16 bytes, and are padded to that; cuBLAS has slower kernels for such rows.
  bool is_aligned() const { return transposed_w || k % (precision == Precision::k16Bit ? 8 : 4) == 0; }
};

// Costs of a kernel's tiles. Indices: 16, 32, 64, 128, 256 rows.
struct TileCosts {
  double split_k[4];        // of a block of 64 k, in tiles that share K
  double shared[5];         // in those that share x or W; 0: there is no such tile
  double tile, row, split;  // to begin and end a tile; more for each row and block where blocks add up
  double stream, megabyte;  // to start and end reading W, and of each MB
  double stage;             // of each MB of W that is copied before
  double split_x, store;    // of each million entries of x and of out
};
constexpr TileCosts kTileCosts[] = {
    {{0.264, 0.313, 0.34, 0.48}, {0, 0, 0, 0, 0.708}, 3.0, 0.021, 0.09, 3.4, 0.251, 0, 0, 0},
    {{0.643, 0.69, 0.808, 1.294}, {0, 0, 0, 1.248, 2.325}, 3.49, 0.023, 0.156, 4.1, 0.294, 0, 4.5, 0.95},
    {{0.56, 0.65, 0.68, 0.85}, {0, 0, 0, 0, 1.05}, 2.9, 0.029, 0.09, 3.4, 0.264, 0, 4.5, 0.95},
    {{}, {0, 0, 0, 0, 0.82}, 2.9, 0, 0, 3.4, 0, 0.36, 4.5, 0.95},
};
constexpr double kPadLaunches = 14, kPadMillion = 2.8;  // padding W and x; of each million entries

// The library's GEMM and the epilogue kernel after it.
struct LibraryCosts {
  double overhead;        // beyond a launch of ours
  double megabyte;        // of W
  double rate;            // million products a microsecond; float32: with few rows, with many it is twice that
  double unaligned_rate;  // where rows are not multiples of 16 bytes, in tiles of 64 or 128 rows; 0: as others
  bool has_whole_waves;   // of tiles of 128 x 128, or else finer ones fit
  double epilogue;        // of each million entries of out: z is read and out written
};
constexpr LibraryCosts kLibraryCosts[] = {
    {12, 0.5, 12, 0, false, 1.9},
    {5.5, 0.27, 188, 66, true, 1.9},
    {5.4, 0.247, 375, 67, false, 0.95},
};
constexpr double kGemvOverhead = 3.6, kGemvMegabyte = 0.31;  // float32, one row
constexpr int kSMs = 132;

// Blocks of a launch in tiles of `rows` by 128. Where they do not share K they come in pairs, for two tiles along m
// that share W, or two along n that share x.
static int64_t blocks_of(const Product& product, const Choice& tile) {
  const int64_t along_m = ceil_div(product.m, tile.rows), along_n = ceil_div(product.n, kTileN);
  if (tile.splits > 0) return along_m * along_n * tile.splits;
  return shares_w(tile.kernel, tile.rows, tile.splits) ? round_up(along_m, 2) * along_n
                                                       : along_m * round_up(along_n, 2);
}

// How much longer it takes to read W for each part of the SMs that is idle. Not counted between tiles, whose costs are
// fitted without, but beside the library.
constexpr double kIdleReaders = 0.3;

// idle_readers: kIdleReaders or 0.
static double tile_microseconds(const Product& product, const Choice& tile, double idle_readers) {
  constexpr int kResident[] = {kSMs, kSMs, kSMs, 117, 120};  // blocks at once, by splits: a cluster must fit a GPC
  const TileCosts& costs = kTileCosts[int(tile.kernel)];
  const int size = tile.rows == 16 ? 0 : tile.rows == 32 ? 1 : tile.rows == 64 ? 2 : tile.rows == 128 ? 3 : 4;
  double per_block = tile.splits > 0 ? costs.split_k[size] : costs.shared[size];
  // A cluster has four panels of 128 rows, and leaves out those that x does not fill.
  constexpr double kOfACluster[] = {1, 0.56, 0.8, 0.89};
  if (tile.kernel == Kernel::kFp16x3 && tile.rows == 256 && product.m <= 384)
    per_block *= kOfACluster[ceil_div(product.m, 128)];
  const double blocks = double(blocks_of(product, tile));
  const double waves = std::ceil(blocks / kResident[tile.splits]);
  const double blocks_of_k = double(ceil_div(ceil_div(product.k, kTileK), std::max(tile.splits, 1)));
  const double adding_up = tile.splits > 0 ? costs.split * tile.splits + costs.row * tile.rows : 0;
  const double compute = waves * (blocks_of_k * per_block + costs.tile + adding_up);
  const double megabytes = product.weight_megabytes();
  const double entries = 1e-6 * double(product.m + product.n) * double(product.k);
  const double padding = product.is_aligned() ? 0 : kPadLaunches + kPadMillion * entries;
  const double stream = costs.stream + costs.megabyte * megabytes * (1 + idle_readers * (1 - blocks / (waves * kSMs)));
  return std::max(compute, stream) + costs.stage * megabytes + padding +
         1e-6 * double(product.m) * (costs.split_x * double(product.k) + costs.store * double(product.n));
}

static double library_microseconds(const Product& product) {
  const double megabytes = product.weight_megabytes(), m = double(product.m);
  if (product.m == 1 && product.precision != Precision::k16Bit) return kGemvOverhead + kGemvMegabyte * megabytes;
  const LibraryCosts& costs = kLibraryCosts[int(product.precision)];
  double compute = product.products() / (1e6 * costs.rate);
  if (!product.is_aligned() && product.m > 1 && costs.unaligned_rate > 0) {
    const int64_t rows = product.m <= 64 ? 64 : round_up(product.m, 128);
    compute = double(rows) * product.products() / m / (1e6 * costs.unaligned_rate);
  } else if (costs.has_whole_waves) {
    const int64_t tiles = ceil_div(product.m, 128) * ceil_div(product.n, 128);
    const int64_t in_waves = tiles <= kSMs ? tiles : round_up(tiles, kSMs);
    compute = double(in_waves) * 128 * 128 * double(product.k) / (1e6 * costs.rate);
  }
  return costs.overhead + std::max(costs.megabyte * megabytes, compute) + 1e-6 * costs.epilogue * m * double(product.n);
}

static Choice select_tile(const Product& product) {
  const auto [m, n, k, precision, transposed_w] = product;
  const Choice library = {Kernel::kLibrary, 0, 0};
  if (m == 0 || n == 0 || k == 0) return library;
  if (std::max({m, n, k}) > (int64_t(1) << 31) - 2048) return library;  // the kernel counts in 32 bits
  // Not measured. Few columns and a long K would leave most SMs without work.
  if (n < 512 || n * k < 1 << 18) return library;
  // Below K = 256 SGEMM is more accurate, and up to 512 its error is about the kernel's.
  if (precision == Precision::kFloat32 && k < 512) return library;

  Choice best = library;
  double least = std::numeric_limits<double>::infinity();
  const auto consider = [&](Kernel kernel, int rows, int splits) {
    const Choice tile = {kernel, rows, splits};
    const double cost = tile_microseconds(product, tile, 0);
    if (cost < least) least = cost, best = tile;
  };
  const Kernel kernel = precision == Precision::kFloat32 ? Kernel::kFp16x3
                        : precision == Precision::kTF32  ? Kernel::kFp16x1
                                                         : Kernel::kWgmma16;
  for (const int rows : {16, 32, 64, 128}) {
    // Tiles of more than twice M's rows, or of less than a sixth, are never the best; 128 rows may be, for any M.
    if (rows < 128 && (rows > std::max<int64_t>(16, 2 * m - 1) || m > 6 * rows)) continue;
    for (int splits = 1; splits <= kMaxSplits && splits <= ceil_div(k, kTileK); ++splits)
      consider(kernel, rows, splits);
  }
  consider(kernel, 256, 0);
  if (kernel == Kernel::kFp16x3) consider(kernel, 128, 0);
  if (kernel == Kernel::kFp16x1) consider(Kernel::kFp16x1Staged, 256, 0);
  return tile_microseconds(product, best, kIdleReaders) < library_microseconds(product) ? best : library;
}

// While its rows are not 0, it serves every product that the kernels can compute; see force_kernel.
static Choice forced = {Kernel::kLibrary, 0, 0};

// The one decision. dtype: a DType, or another number for a dtype that the kernels do not support. w_stride: from one
// entry of a row of W to the next.
static Choice select_kernel(int dtype, bool allows_tf32, bool is_hopper, int64_t m, int64_t n, int64_t k,
                            int64_t w_stride, bool transposed_w) {
  const bool is_float32 = dtype == int(DType::kFloat32);
  const bool is_16_bit = dtype == int(DType::kFloat16) || dtype == int(DType::kBFloat16);
  const bool can_serve = is_hopper && (is_float32 || is_16_bit) && w_stride == 1 && m > 0 && n > 0 && k > 0;
  if (!can_serve) return {Kernel::kLibrary, 0, 0};
  if (forced.rows > 0) return {forced.kernel, forced.rows, int(std::min<int64_t>(forced.splits, ceil_div(k, kTileK)))};
  const auto precision = is_16_bit ? Precision::k16Bit : allows_tf32 ? Precision::kTF32 : Precision::kFloat32;
  return select_tile({m, n, k, precision, transposed_w});
}

extern "C" {
// For model_new.py: the name of the kernel; rows and splits of its tile, 0 where the library serves.
const char* select_kernel(int dtype, int allows_tf32, int is_hopper, int64_t m, int64_t n, int64_t k, int64_t w_stride,
                          int transposed_w, int* rows, int* splits) {
  const Choice choice = select_kernel(dtype, allows_tf32 != 0, is_hopper != 0, m, n, k, w_stride, transposed_w != 0);
  *rows = choice.rows, *splits = choice.splits;
  return kKernelNames[int(choice.kernel)];
}

// For tests and benchmarks: from now on every product is served by this Kernel, in tiles of so many rows (the library:
// any number but 0). 0 rows: by the fastest one again.
void force_kernel(int kernel, int rows, int splits) { forced = {static_cast<Kernel>(kernel), rows, splits}; }
}

#ifndef SELECTION_ONLY
#include <ATen/Context.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_unsafe_view.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

// ---------------------------------------------------------------------------- the operators on CUDA tensors

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A DType; -1 for a dtype that the kernels do not support.
int dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return int(DType::kFloat32);
    case at::kHalf:
      return int(DType::kFloat16);
    case at::kBFloat16:
      return int(DType::kBFloat16);
    case at::kDouble:
      return int(DType::kFloat64);
    default:
      return -1;
  }
}

// Calls a function of the C interface on a device and its current stream, which are its last two arguments.
template <typename... Parameters, typename... Arguments>
void call_on_stream(const char* name, int (*function)(Parameters...), c10::Device device, Arguments... arguments) {
  const c10::impl::VirtualGuardImpl cuda(device.type());
  const auto stream = static_cast<cudaStream_t>(cuda.getStreamNativeHandle(cuda.getStream(device)));
  const int error = function(arguments..., device.index(), stream);
  TORCH_CHECK(error == 0,
              std::string(name) + " failed: CUDA error " + std::to_string(error) + ", " + error_string(error));
}

// Messages are strings, and TORCH_CHECK gets one: of several it makes a stream, and streams fail where the compiler
// links a libstdc++ of its own into this library, beside PyTorch's.
std::string describe(const char* name, const Tensor& t) {
  std::string text = std::string(name) + " [";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i > 0 ? ", " : "") + std::to_string(t.size(i));
  return (text + "] torch.").append(c10::getDtypeNames(t.scalar_type()).first) + " on " + t.device().str();
}

// Refuses, in nn.Linear's words, what is not x [..., K], weight [N, K] and bias [N] of one dtype on one device.
void check_arguments(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const auto got = [&](const std::string& what) {
    return "linear_sigmoid_residual(): " + what + ", got " + describe("x", x) + ", " + describe("weight", weight) +
           (bias ? ", " + describe("bias", *bias) : "");
  };
  const auto matrix = [](int64_t rows, int64_t cols) { return std::to_string(rows) + "x" + std::to_string(cols); };
  TORCH_CHECK(x.dim() > 0 && weight.dim() == 2 && (!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0))),
              got("expected x [..., K], weight [N, K] and bias [N]"));
  TORCH_CHECK(x.size(-1) == weight.size(1),
              got("mat1 and mat2 shapes cannot be multiplied (" +
                  matrix(c10::multiply_integers(x.sizes().slice(0, x.dim() - 1)), x.size(-1)) + " and " +
                  matrix(weight.size(1), weight.size(0)) + ")"));
  TORCH_CHECK(x.scalar_type() == weight.scalar_type() && (!bias || bias->scalar_type() == x.scalar_type()),
              got("mat1 and mat2 must have the same dtype"));
  TORCH_CHECK(x.device() == weight.device() && (!bias || bias->device() == x.device()),
              got("Expected all tensors to be on the same device"));
  TORCH_CHECK(dtype_of(x) >= 0, got("not implemented for this dtype: expected float32, float16, bfloat16 or float64"));
}

bool allows_tf32() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
         at::Float32Precision::TF32;
}

// t as a matrix [M, its last size].
Tensor as_rows(const Tensor& t) { return t.dim() == 2 ? t : t.dim() == 1 ? t.unsqueeze(0) : t.flatten(0, -2); }

// Whether TMA can read the rows of a matrix: they are contiguous, do not overlap, and begin at multiples of 16 bytes.
// TMA takes strides below 2^40 bytes.
bool has_aligned_rows(const Tensor& t) {
  const int64_t row_bytes = t.stride(0) * t.element_size();
  return t.stride(1) == 1 && t.stride(0) >= t.size(1) && row_bytes % 16 == 0 && row_bytes < int64_t(1) << 40 &&
         reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

// The sizes of a product with n columns, whose rows are those of x [..., K].
std::vector<int64_t> product_sizes(const Tensor& x, int64_t n) {
  auto sizes = x.sizes().vec();
  sizes.back() = n;
  return sizes;
}

// A copy of a matrix whose rows are padded with zeros to multiples of 16 bytes.
Tensor padded(const Tensor& t) {
  const int64_t multiple = 16 / t.element_size(), cols = round_up(t.size(1), multiple);
  Tensor copy = at::empty({t.size(0), cols}, t.options());
  copy.narrow(1, 0, t.size(1)).copy_(t);
  if (cols > t.size(1)) copy.narrow(1, t.size(1), cols - t.size(1)).zero_();
  return copy;
}

// linear_hopper on operands that it can read. k: as far as products count, which may be less than the rows have.
void launch_hopper(const Choice& choice, bool transposed_w, const Tensor& x, const Tensor& weight,
                   const OptionalTensor& bias, const OptionalTensor& out, const OptionalTensor& z, int64_t k,
                   double scale) {
  const int64_t m = x.size(0), n = weight.size(transposed_w ? 1 : 0);
  const auto data = [](const OptionalTensor& t) { return t ? t->data_ptr() : nullptr; };
  const void* bias_data = bias ? bias->const_data_ptr() : nullptr;
  const int64_t scratch_bytes = linear_hopper_scratch(m, n, k, int(choice.kernel));
  OptionalTensor scratch;
  if (scratch_bytes > 0) scratch = at::empty({scratch_bytes}, x.options().dtype(at::kByte));
  call_on_stream("linear_hopper", linear_hopper, x.device(), x.const_data_ptr(), weight.const_data_ptr(), bias_data,
                 data(out), data(z), data(scratch), x.stride(0), weight.stride(0), m, n, k, scale, dtype_of(x),
                 int(choice.kernel), int(transposed_w), choice.rows, choice.splits);
}

// out and, where it is wanted, z by the fused kernel.
std::tuple<Tensor, Tensor> forward_hopper(const Choice& choice, const Tensor& x_, const Tensor& weight_,
                                          const OptionalTensor& bias, double scale, bool with_z) {
  Tensor x = as_rows(x_), weight = weight_;
  const auto sizes = product_sizes(x_, weight.size(0));
  const Tensor out = at::empty(sizes, x.options());
  const OptionalTensor z = with_z ? OptionalTensor(at::empty(sizes, x.options())) : std::nullopt;
  // Float32 is read four numbers at a time, so that K is padded with the rows.
  const bool pads_k = choice.kernel != Kernel::kWgmma16 && x.size(1) % 4 != 0;
  if (pads_k || !has_aligned_rows(x)) x = padded(x);
  if (pads_k || !has_aligned_rows(weight)) weight = padded(weight);
  const int64_t k = std::min(x.size(1), weight.size(1));
  launch_hopper(choice, false, x, weight, bias ? OptionalTensor(bias->contiguous()) : bias, out, z, k, scale);
  return {out, z.value_or(Tensor())};
}

// z by the library's GEMM, then the epilogue: in place where z is not wanted.
std::tuple<Tensor, Tensor> forward_library(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                           double scale, bool with_z) {
  // As nn.functional.linear does with a matrix x. For some other shapes it takes two kernels, and rounds twice.
  const Tensor rows = as_rows(x), weight_t = weight.t();
  Tensor z = bias ? at::addmm(*bias, rows, weight_t) : at::mm(rows, weight_t);
  // Autograd forbids changing a view that an operator has returned in place; an unsafe view is none.
  if (x.dim() != 2) z = at::_unsafe_view(z, product_sizes(x, weight.size(0)));
  const Tensor out = with_z ? at::empty_like(z) : z;
  call_on_stream("epilogue_forward", epilogue_forward, z.device(), z.const_data_ptr(), out.data_ptr(), z.numel(), scale,
                 dtype_of(z));
  return {out, z};
}

std::tuple<Tensor, Tensor> forward_cuda(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, double scale,
                                        bool with_z) {
  check_arguments(x, weight, bias);
  const at::AutoDispatchBelowADInplaceOrView guard;  // a shorter way to PyTorch's operators
  const int64_t n = weight.size(0), k = weight.size(1), m = k > 0 ? x.numel() / k : 0;
  const Choice choice = select_kernel(dtype_of(x), allows_tf32(), is_hopper(x.device().index()), m, n, k,
                                      weight.stride(1), /*transposed_w=*/false);
  return choice.kernel == Kernel::kLibrary ? forward_library(x, weight, bias, scale, with_z)
                                           : forward_hopper(choice, x, weight, bias, scale, with_z);
}

std::tuple<Tensor, Tensor> backward_z_cuda(const Tensor& grad_, const Tensor& z_, double scale) {
  TORCH_CHECK(
      grad_.sizes() == z_.sizes() && grad_.scalar_type() == z_.scalar_type() && dtype_of(z_) >= 0 && z_.dim() > 0,
      "backward_z: expected grad and z [..., N] of one floating-point dtype, got " + describe("grad", grad_) + ", " +
          describe("z", z_));
  const Tensor grad = grad_.contiguous(), z = z_.contiguous(), dz = at::empty_like(z);
  const int64_t cols = z.size(-1), rows = cols > 0 ? z.numel() / cols : 0;
  if (rows == 0) return {dz, at::zeros({cols}, z.options())};
  const Tensor dbias = at::empty({cols}, z.options());
  const int64_t strips = std::min<int64_t>(128, ceil_div(rows, 64));  // to fill the GPU with few partial sums
  const auto compute_type = z.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor partial_sums = at::empty({strips, cols}, z.options().dtype(compute_type));
  call_on_stream("epilogue_backward", epilogue_backward, z.device(), grad.const_data_ptr(), z.const_data_ptr(),
                 dz.data_ptr(), partial_sums.data_ptr(), dbias.data_ptr(), rows, cols, strips, scale, dtype_of(z));
  return {dz, dbias};
}

Tensor matmul_cuda(const Tensor& a, const Tensor& b) {
  Choice choice = {Kernel::kLibrary, 0, 0};
  if (a.dim() > 0 && b.dim() == 2 && a.size(-1) == b.size(0) && b.size(0) > 0 && a.device() == b.device() &&
      a.scalar_type() == at::kFloat && b.scalar_type() == at::kFloat && !allows_tf32() && has_aligned_rows(b))
    choice = select_kernel(dtype_of(a), false, is_hopper(a.device().index()), a.numel() / b.size(0), b.size(1),
                           b.size(0), b.stride(1), /*transposed_w=*/true);
  if (choice.kernel != Kernel::kFp16x3) return at::matmul(a, b);
  const int64_t k = b.size(0);
  Tensor rows = as_rows(a);
  if (!has_aligned_rows(rows) || k % 4 != 0) rows = padded(rows);
  const Tensor product = at::empty(product_sizes(a, b.size(1)), a.options());
  launch_hopper(choice, true, rows, b, {}, {}, product, k, 0.0);
  return product;
}

// ---------------------------------------------------------------------------- autograd

// The operators of one namespace, as others call them.
struct Operators {
  using Forward = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, double);
  using ForwardWithZ = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, double);
  using BackwardZ = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, double);
  using Matmul = Tensor(const Tensor&, const Tensor&);

  template <typename Signature>
  static c10::TypedOperatorHandle<Signature> find(const std::string& name, const char* operation) {
    return c10::Dispatcher::singleton().findSchemaOrThrow((name + "::" + operation).c_str(), "").typed<Signature>();
  }
  explicit Operators(const std::string& name)
      : forward(find<Forward>(name, "forward")),
        forward_with_z(find<ForwardWithZ>(name, "forward_with_z")),
        backward_z(find<BackwardZ>(name, "backward_z")),
        matmul(find<Matmul>(name, "matmul")) {}

  const c10::TypedOperatorHandle<Forward> forward;
  const c10::TypedOperatorHandle<ForwardWithZ> forward_with_z;
  const c10::TypedOperatorHandle<BackwardZ> backward_z;
  const c10::TypedOperatorHandle<Matmul> matmul;
};

// Whether something must see the operator's parts: functorch (torch.func, vmap) or forward-mode AD follows the tensor,
// or it is sparse.
bool needs_decomposition(const Tensor& t) {
  constexpr c10::DispatchKeySet keys({c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::FuncTorchBatched,
                                      c10::DispatchKey::Sparse, c10::DispatchKey::SparseCsr});
  return t.defined() && (t.key_set().has_any(keys) || t._fw_grad(/*level=*/0).defined());
}

Tensor widened(const Tensor& t) { return t.scalar_type() == at::kDouble ? t : t.to(at::kFloat); }

// The operator as PyTorch's operators. model_new.py has the same for tensors that are not on a GPU.
Tensor decomposition(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, double scale) {
  const Tensor z = at::linear(x, weight, bias), wide = widened(z);
  return (at::sigmoid(wide) * scale + wide).to(z.scalar_type());
}

// (out, z) = forward_with_z(x, weight, bias). z is an output so that a gradient can be differentiated again: what the
// backward computes from z then depends on x, weight and bias through this function's own backward.
struct LinearSigmoidResidual : torch::autograd::Function<LinearSigmoidResidual> {
  static constexpr bool is_traceable = true;  // by compiled autograd

  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const Tensor& x,
                                                const Tensor& weight, const OptionalTensor& bias, double scale,
                                                const Operators* operators) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto [out, z] = operators->forward_with_z.call(x, weight, bias, scale);
    // Eager keeps the same: sigmoid(z) for z, and each factor of a product only for the gradient of the other.
    ctx->save_for_backward({weight.requires_grad() ? x : Tensor(), x.requires_grad() ? weight : Tensor(), z});
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->saved_data["operators"] = reinterpret_cast<int64_t>(operators);
    ctx->saved_data["has_hooks"] = at::SavedTensorDefaultHooks::get_hooks().has_value();
    ctx->set_materialize_grads(false);
    return {out, z};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list& gradients) {
    auto saved = ctx->get_saved_variables();
    const Tensor x = std::move(saved[0]), weight = std::move(saved[1]);
    Tensor z = std::move(saved[2]);
    // Where the graph is not kept, PyTorch lets go of what is saved after the backward. The products need z's memory
    // before that. It may be freed if only the graph and this function refer to it; hooks may keep what they are given.
    constexpr c10::DispatchKeySet wrappers({c10::DispatchKey::Python, c10::DispatchKey::Functionalize});
    const bool is_plain = !z.key_set().has_any(wrappers);
    const bool frees_z = is_plain && z.storage().use_count() == 2 && !ctx->saved_data["has_hooks"].toBool() &&
                         !torch::autograd::get_current_graph_task_keep_graph();
    TORCH_CHECK(!is_plain || z.numel() == 0 || z.storage().nbytes() > 0,
                "Trying to backward through the graph a second time, in another thread, without retain_graph=True");
    const double scale = ctx->saved_data["scale"].toDouble();
    const auto& operators = *reinterpret_cast<const Operators*>(ctx->saved_data["operators"].toInt());
    Tensor grad = std::move(gradients[0]), grad_of_z = std::move(gradients[1]), dz, dbias;
    if (!grad.defined() && !grad_of_z.defined()) return torch::autograd::variable_list(5);  // zeros
    // In parts where the gradient may be differentiated, and where z's own gradient says that it has been.
    const bool in_parts = at::GradMode::is_enabled() || !grad.defined() || grad_of_z.defined() ||
                          needs_decomposition(grad) || needs_decomposition(z);
    if (in_parts) {
      if (grad.defined()) {
        const Tensor p = at::sigmoid(widened(z));
        dz = (grad * (p * (1 - p) * scale + 1)).to(z.scalar_type());
      }
      if (grad_of_z.defined()) dz = dz.defined() ? dz + grad_of_z : grad_of_z;
      dbias = as_rows(dz).sum(0);
    } else {
      at::AutoDispatchBelowADInplaceOrView guard;
      std::tie(dz, dbias) = operators.backward_z.call(grad, z, scale);
      if (frees_z) z.storage().unsafeGetStorageImpl()->reset();
    }
    grad.reset(), grad_of_z.reset(), z.reset();  // the products need memory
    const auto product = [&](const Tensor& a, const Tensor& b) {
      if (in_parts || a.scalar_type() != at::kFloat) return at::matmul(a, b);
      at::AutoDispatchBelowADInplaceOrView guard;
      return operators.matmul.call(a, b);
    };
    Tensor dx, dweight;
    if (ctx->needs_input_grad(1)) dweight = product(as_rows(dz).t(), as_rows(x));  // first: it takes more memory
    if (ctx->needs_input_grad(0)) dx = product(dz, weight);
    if (!ctx->saved_data["has_bias"].toBool() || !ctx->needs_input_grad(2)) dbias.reset();
    return {dx, dweight, dbias, Tensor(), Tensor()};
  }
};

// ---------------------------------------------------------------------------- registration

void register_implementations(torch::Library& library, const std::string& device, const Operators* operators) {
  const auto at_key = [](const std::string& key, auto kernel) {
    return torch::dispatch(c10::parseDispatchKey(key), torch::CppFunction(std::move(kernel)));
  };
  library.impl("forward",
               at_key(device, [](const Tensor& x, const Tensor& weight, const OptionalTensor& bias, double scale) {
                 return std::get<0>(forward_cuda(x, weight, bias, scale, /*with_z=*/false));
               }));
  library.impl("forward_with_z",
               at_key(device, [](const Tensor& x, const Tensor& weight, const OptionalTensor& bias, double scale) {
                 return forward_cuda(x, weight, bias, scale, /*with_z=*/true);
               }));
  library.impl("backward_z", at_key(device, backward_z_cuda));
  library.impl("matmul", at_key(device, matmul_cuda));
  library.impl("forward", at_key("Autograd" + device,
                                 [operators](c10::DispatchKeySet keys, const Tensor& x, const Tensor& weight,
                                             const OptionalTensor& bias, double scale) -> Tensor {
                                   const Tensor b = bias.value_or(Tensor());
                                   if (needs_decomposition(x) || needs_decomposition(weight) || needs_decomposition(b))
                                     return decomposition(x, weight, bias, scale);
                                   if (at::GradMode::is_enabled() &&
                                       (x.requires_grad() || weight.requires_grad() || (bias && b.requires_grad())))
                                     return LinearSigmoidResidual::apply(x, weight, bias, scale, operators)[0];
                                   return operators->forward.redispatch(keys & c10::after_autograd_keyset, x, weight,
                                                                        bias, scale);
                                 }));
  library.impl(
      "forward", at_key("Autocast" + device, [operators](const Tensor& x, const Tensor& weight,
                                                         const OptionalTensor& bias, double scale) {
        const auto type = x.device().type();
        const auto dtype = at::autocast::get_autocast_dtype(type);
        const c10::impl::ExcludeDispatchKeyGuard guard(at::autocast::get_autocast_dispatch_key_from_device_type(type));
        return operators->forward.call(at::autocast::cached_cast(dtype, x, type),
                                       at::autocast::cached_cast(dtype, weight, type),
                                       at::autocast::cached_cast(dtype, bias, type), scale);
      }));
}

}  // namespace

// Registers the implementations of this file for the operators that model_new.py has defined in the namespace `name`.
// They stay for as long as the process. device: "CUDA"; the tests of autograd have their operators on the CPU.
extern "C" void register_operators(const char* name, const char* device) {
  auto* library = new torch::Library(torch::Library::IMPL, name, std::nullopt, __FILE__, __LINE__);
  register_implementations(*library, device, new Operators(name));
}

#endif  // SELECTION_ONLY
#endif  // __CUDACC__
