// What the CPU kernels share: number types, loops that the compiler turns into vectors, work in parallel.
//
// The loops are written for the auto-vectoriser (-O2 -ftree-vectorize; -O3 unrolls them to pieces) with fixed trip counts
// of one 64-byte vector, so that one source serves AVX-512, AVX2 and anything else: a function marked E5_CLONES is compiled
// for each, picked once at load time. Whatever such a function calls must be inlined into it. Sums run in a fixed order
// that depends on shapes only, never on threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#define E5_INLINE inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define E5_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)  // does not dispatch by level yet
#define E5_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define E5_CLONES
#endif

namespace e5 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct bf16 {
    uint16_t bits;
};

// Arithmetic is in float for bf16 and float tensors, in double for double ones (which serve tests).
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class C>
constexpr int kLanes = 64 / sizeof(C);

E5_INLINE float load(const bf16& x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}
E5_INLINE float load(const float& x) { return x; }
E5_INLINE double load(const double& x) { return x; }

E5_INLINE void store(bf16& to, float x) {  // to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to.bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0u : rounded);
}
E5_INLINE void store(float& to, float x) { to = x; }
E5_INLINE void store(double& to, double x) { to = x; }

// e^x to 2 ulp by x = n ln 2 + r and a polynomial in r (Cephes); exactly 0 below -87.3, infinite above 88.4.
E5_INLINE float exponential(float x) {
    const float within = std::min(std::max(x, -87.3f), 89.0f);
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    const float n = (within * 1.44269504088896341f + magic) - magic;
    const float r = (within - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t bits = (int32_t(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof(power));
    return x < -87.3f ? 0.0f : p * power;
}
E5_INLINE double exponential(double x) { return std::exp(x); }

// Runs task(i) for 0 <= i < n on torch's own threads, each taking the next one when it is free.
template <class Worker>
void parallel_tasks(int64_t n, const Worker& make_worker) {
    std::atomic<int64_t> next{0};
    const int64_t threads = std::min<int64_t>(n, torch::stable::get_num_threads());
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
        for (; begin < end; ++begin) {
            auto task = make_worker();
            for (int64_t i; (i = next.fetch_add(1)) < n;) task(i);
        }
    });
}

// Calls function(T()) for the C++ type T of the tensor's dtype.
template <class Function>
void dispatch(const Tensor& tensor, const Function& function) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float: return function(float());
        case ScalarType::Double: return function(double());
        case ScalarType::BFloat16: return function(bf16());
        default: STD_TORCH_CHECK(false, "dtype must be float32, float64 or bfloat16");
    }
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
    if (a.dim() != b.dim()) return false;
    for (int64_t i = 0; i < a.dim(); ++i)
        if (a.size(i) != b.size(i)) return false;
    return true;
}

template <class T>
T* data(const Tensor& tensor) {
    return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace e5
