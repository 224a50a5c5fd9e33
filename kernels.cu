// out = z + s * sigmoid(z),  z = x * W^T + b        x [M, K]   W [N, K]   b [N]   out [M, N]
//
// All device code of the project. model_new.py compiles this file and calls the extern "C" functions at
// its end through ctypes; nothing of PyTorch or Python is included, so it compiles in seconds.
//
// Which kernel serves which case is decided in model_new.py (`select_kernel`):
//   "library"   every architecture, dtype and shape: the GEMM is the library's, and
//               epilogue_forward_kernel turns z into out, in place where z need not be kept.
// Both paths share the backward:
//   epilogue_backward_kernel   dz = grad * d out / d z and partial column sums of dz, in one sweep
//   reduce_columns_kernel      adds the partial sums in a fixed order: the bias gradient
//
// Every extern "C" function returns a cudaError_t as int; 0 is success. All sizes are element counts.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

// ---------------------------------------------------------------------------- element types

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat64 = 3 };  // as in model_new.py

// The type in which an element is computed: float for 16-bit storage, so that out is rounded once.
template <typename T> struct ComputeType { using type = float; };
template <> struct ComputeType<double> { using type = double; };
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
template <typename T, int kWidth> struct alignas(sizeof(T) * kWidth) Vector { T v[kWidth]; };
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
static cudaError_t launch_epilogue_forward(const void* z_, void* out_, int64_t numel, double scale, cudaStream_t stream) {
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
#pragma unroll 4
    for (int64_t row = int64_t(blockIdx.y) * rows_per_block + warp; row < row_end; row += kBackwardWarps) {
      const int64_t at = row * cols + col;
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
                                         int64_t rows, int64_t cols, int64_t strips, double scale, cudaStream_t stream) {
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
static cudaError_t launch_epilogue_backward(const void* grad_, const void* z_, void* dz_, void* partial_sums, void* dbias,
                                            int64_t rows, int64_t cols, int64_t strips, double scale, cudaStream_t stream) {
  const T* grad = static_cast<const T*>(grad_);
  const T* z = static_cast<const T*>(z_);
  T* dz = static_cast<T*>(dz_);
  auto* partial = static_cast<compute_t<T>*>(partial_sums);
  constexpr int width = kVectorWidth<T>;
  if (cols % width == 0 && aligned16(grad, z, dz))
    return launch_backward_width<T, width>(grad, z, dz, partial, static_cast<T*>(dbias), rows, cols, strips, scale, stream);
  return launch_backward_width<T, 1>(grad, z, dz, partial, static_cast<T*>(dbias), rows, cols, strips, scale, stream);
}

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
#define DISPATCH_DTYPE(dtype, launch, ...)                                \
  switch (static_cast<DType>(dtype)) {                                    \
    case DType::kFloat32: return launch<float>(__VA_ARGS__);              \
    case DType::kFloat16: return launch<__half>(__VA_ARGS__);             \
    case DType::kBFloat16: return launch<__nv_bfloat16>(__VA_ARGS__);     \
    case DType::kFloat64: return launch<double>(__VA_ARGS__);             \
  }                                                                       \
  return cudaErrorInvalidValue

extern "C" {

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

// z, out: numel contiguous elements; out may equal z.
int epilogue_forward(const void* z, void* out, int64_t numel, double scale, int dtype, int device, cudaStream_t stream) {
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

}  // extern "C"
