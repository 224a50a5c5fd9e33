// kernels.cu's C interface on the CPU, for tests of the operators in front of it: each function refuses what it is not
// said to take there, and computes plainly.

#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

// The operators ask for the current stream's handle, which the CPU does not have.
struct CpuGuard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CPU> {
  void* getStreamNativeHandle(const c10::Stream) const override { return nullptr; }
};
C10_REGISTER_GUARD_IMPL(CPU, CpuGuard);

namespace {

constexpr int kInvalid = 1;
constexpr int64_t kScratchBytes = 4096;  // whatever the size: it is written, and so must be there

bool is_multiple_of_16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
double sigmoid(double z) { return 1 / (1 + std::exp(-z)); }

// function(T()) for the dtype.
template <typename Function> int dispatch(int dtype, Function function) {
  return dtype == 0   ? function(float())
         : dtype == 1 ? function(c10::Half())
         : dtype == 2 ? function(c10::BFloat16())
         : dtype == 3 ? function(double())
                      : kInvalid;
}

}  // namespace

extern "C" {

int launches[3];  // of epilogue_forward, epilogue_backward, linear_hopper

const char* error_string(int) { return "invalid argument"; }
int is_hopper(int) { return 1; }
int64_t linear_hopper_scratch(int64_t, int64_t, int64_t, int kernel) { return kernel == 0 ? 0 : kScratchBytes; }

int epilogue_forward(const void* z_, void* out_, int64_t numel, double scale, int dtype, int, void*) {
  ++launches[0];
  return dispatch(dtype, [&](auto of) {
    const auto z = static_cast<const decltype(of)*>(z_);
    const auto out = static_cast<decltype(of)*>(out_);
    for (int64_t i = 0; i < numel; ++i) out[i] = double(z[i]) + scale * sigmoid(z[i]);
    return 0;
  });
}

int epilogue_backward(const void* grad_, const void* z_, void* dz_, void* partial_sums, void* dbias_, int64_t rows,
                      int64_t cols, int64_t strips, double scale, int dtype, int, void*) {
  ++launches[1];
  if (rows < 1 || cols < 1 || strips < 1) return kInvalid;
  return dispatch(dtype, [&](auto of) {
    const auto grad = static_cast<const decltype(of)*>(grad_), z = static_cast<const decltype(of)*>(z_);
    const auto dz = static_cast<decltype(of)*>(dz_), dbias = static_cast<decltype(of)*>(dbias_);
    std::memset(partial_sums, 255, strips * cols * (dtype == 3 ? 8 : 4));
    std::vector<double> sums(cols);
    for (int64_t i = 0; i < rows * cols; ++i) {
      const double p = sigmoid(z[i]), exact = double(grad[i]) * (1 + scale * p * (1 - p));
      dz[i] = exact, sums[i % cols] += exact;
    }
    for (int64_t i = 0; i < cols; ++i) dbias[i] = sums[i];
    return 0;
  });
}

int linear_hopper(const void* x_, const void* w_, const void* bias_, void* out_, void* z_, void* scratch,
                  int64_t x_stride, int64_t w_stride, int64_t m, int64_t n, int64_t k, double scale, int dtype,
                  int kernel, int transposed_w, int rows, int splits, int, void*) {
  ++launches[2];
  const int multiple = dtype == 0 ? 4 : 8;  // elements of 16 bytes
  const bool is_dtype = kernel == 0 ? dtype == 1 || dtype == 2 : kernel <= 3 && dtype == 0;
  const bool is_x = is_multiple_of_16(x_) && x_stride % multiple == 0 && x_stride >= k;
  const bool is_w = is_multiple_of_16(w_) && w_stride % multiple == 0 && w_stride >= (transposed_w ? n : k);
  const bool is_k = dtype != 0 || transposed_w || k % 4 == 0;
  const bool is_tile = splits == 0 ? rows == 256 || (rows == 128 && kernel == 1)
                                   : (rows == 16 || rows == 32 || rows == 64 || rows == 128) && kernel != 3 &&
                                         splits <= 4 && splits <= (k + 63) / 64;
  const bool is_scratch = kernel == 0 ? scratch == nullptr : scratch != nullptr && is_multiple_of_16(scratch);
  if (!is_dtype || !is_x || !is_w || !is_k || !is_tile || !is_scratch || m < 1 || n < 1 || k < 1) return kInvalid;
  if (transposed_w && kernel != 1) return kInvalid;
  if (scratch) std::memset(scratch, 255, kScratchBytes);
  return dispatch(dtype, [&](auto of) {
    const auto x = static_cast<const decltype(of)*>(x_), w = static_cast<const decltype(of)*>(w_);
    const auto bias = static_cast<const decltype(of)*>(bias_);
    const auto out = static_cast<decltype(of)*>(out_), z = static_cast<decltype(of)*>(z_);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t at = k; dtype == 0 && at < (k + 3) / 4 * 4; ++at)
        if (x[i * x_stride + at] != 0) return kInvalid;  // float32 x goes on with zeros up to 16 bytes
      for (int64_t j = 0; j < n; ++j) {
        double sum = bias ? double(bias[j]) : 0;
        for (int64_t at = 0; at < k; ++at)
          sum += double(x[i * x_stride + at]) * double(w[transposed_w ? at * w_stride + j : j * w_stride + at]);
        if (z) z[i * n + j] = sum;
        if (out) out[i * n + j] = sum + scale * sigmoid(sum);
      }
    }
    return 0;
  });
}
}
