// What mlx-rs expects of its platform and Linux on x86-64 does not give: the half-precision accessors that mlx-c hides there, and a Mach clock.
#include <ctime>
#include <cstdint>
#include <cstring>

#include "mlx/c/array.h"
#include "mlx/c/error.h"
#include "mlx/c/private/mlx.h"

namespace {
template <typename Half>
int item(uint16_t* res, const mlx_array arr) {
  try {
    const Half value = mlx_array_get_(arr).item<Half>();
    std::memcpy(res, &value, sizeof(value));
    return 0;
  } catch (const std::exception& e) {
    mlx_error(e.what());
    return 1;
  }
}

template <typename Half>
const uint16_t* data(const mlx_array arr) {
  try {
    return reinterpret_cast<const uint16_t*>(mlx_array_get_(arr).data<Half>());
  } catch (const std::exception& e) {
    mlx_error(e.what());
    return nullptr;
  }
}
} // namespace

extern "C" {
#if !defined(__aarch64__)
int mlx_array_item_float16(uint16_t* res, const mlx_array arr) { return item<mlx::core::float16_t>(res, arr); }
int mlx_array_item_bfloat16(uint16_t* res, const mlx_array arr) { return item<mlx::core::bfloat16_t>(res, arr); }
const uint16_t* mlx_array_data_float16(const mlx_array arr) { return data<mlx::core::float16_t>(arr); }
const uint16_t* mlx_array_data_bfloat16(const mlx_array arr) { return data<mlx::core::bfloat16_t>(arr); }
#endif

uint64_t mach_approximate_time(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1000000000ull + static_cast<uint64_t>(now.tv_nsec);
}
}
