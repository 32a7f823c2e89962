// What a block does between its matrix products, each in one pass over memory: RMSNorm, rotary positions, gated
// activations, keyed dropout, forward and backward. All are bound by bytes; the formulas stand in e5kernels/NAME.py.
#include "kernel.h"

namespace e5 {
namespace {

constexpr int64_t kGrain = 1 << 14;  // elements that are worth a thread

// Runs task(begin, end) over ranges of rows on torch's threads.
template <class Task>
void parallel_rows(int64_t rows, int64_t width, const Task& task) {
    if (rows > 0) torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width)), task);
}

// ---- RMSNorm: y = x / rms(x) * weight -------------------------------------------------------------------------------

template <class C, class T, class Product>
E5_INLINE C row_sum(const T* x, int64_t width, const Product& product) {
    constexpr int L = kLanes<C>;
    C sums[L] = {};
    int64_t i = 0;
    for (; i + L <= width; i += L)
        for (int l = 0; l < L; ++l) sums[l] += product(i + l, load(x[i + l]));
    C sum = 0;
    for (int l = 0; l < L; ++l) sum += sums[l];
    for (; i < width; ++i) sum += product(i, load(x[i]));
    return sum;
}

template <class T, class W, class C>
E5_INLINE void norm_forward(const T* x, const W* weight, T* __restrict y, C* __restrict inverse_rms, int64_t rows, int64_t width, C eps) {
    for (int64_t row = 0; row < rows; ++row, x += width, y += width) {
        const C squares = row_sum<C>(x, width, [](int64_t, C value) { return value * value; });
        const C inverse = 1 / std::sqrt(squares / C(width) + eps);
        inverse_rms[row] = inverse;
        for (int64_t i = 0; i < width; ++i) store(y[i], load(x[i]) * inverse * load(weight[i]));
    }
}

template <class T, class W, class C>
E5_INLINE void norm_backward(
    const T* g, const T* x, const W* weight, const C* inverse_rms, T* __restrict dx, int64_t rows, int64_t width) {
    for (int64_t row = 0; row < rows; ++row, g += width, x += width, dx += width) {
        const C inverse = inverse_rms[row];
        const C dot = row_sum<C>(x, width, [&](int64_t i, C value) { return value * load(g[i]) * load(weight[i]); });
        const C along = dot * inverse * inverse / C(width);
        for (int64_t i = 0; i < width; ++i) store(dx[i], (load(g[i]) * load(weight[i]) - load(x[i]) * along) * inverse);
    }
}

// ---- Gated activations: y = gate sigmoid(w(gate)) up, w(x) = x for SiLU, 2 sqrt(2 / pi) (x + 0.044715 x^3) for GELU --

template <bool kGelu, class C>
E5_INLINE C inner(C x) {
    return kGelu ? C(1.5957691216057308) * (x + C(0.044715) * x * x * x) : x;
}

template <bool kGelu, class C>
E5_INLINE C inner_slope(C x) {
    return kGelu ? C(1.5957691216057308) * (1 + C(0.134145) * x * x) : C(1);
}

template <bool kGelu, class T>
E5_INLINE void gate_values(const T* gate, const T* up, T* __restrict y, int64_t n) {
    using C = Compute<T>;
    for (int64_t i = 0; i < n; ++i) {
        const C x = load(gate[i]);
        store(y[i], x / (1 + exponential(-inner<kGelu>(x))) * load(up[i]));
    }
}

template <bool kGelu, class T>
E5_INLINE void gate_gradients(
    const T* g, const T* gate, const T* up, T* __restrict d_gate, T* __restrict d_up, int64_t n) {
    using C = Compute<T>;
    for (int64_t i = 0; i < n; ++i) {
        const C x = load(gate[i]), dy = load(g[i]);
        const C sigmoid = 1 / (1 + exponential(-inner<kGelu>(x)));
        store(d_gate[i], dy * load(up[i]) * (sigmoid + x * sigmoid * (1 - sigmoid) * inner_slope<kGelu>(x)));
        store(d_up[i], dy * x * sigmoid);
    }
}

// ---- Rotary positions: the pair (i, i + half) of every head turned by its token's angle ------------------------------

template <class T, class C>
E5_INLINE void turn(
    const T* x, int64_t x_stride, const C* cos, const C* sin, T* __restrict y, int64_t tokens, int64_t heads, int64_t half,
    C sign) {
    for (int64_t t = 0; t < tokens; ++t, x += x_stride, cos += half, sin += half)
        for (int64_t h = 0; h < heads; ++h, y += 2 * half) {
            const T* head = x + h * 2 * half;
            for (int64_t i = 0; i < half; ++i) {
                const C first = load(head[i]), second = load(head[half + i]), s = sign * sin[i];
                store(y[i], first * cos[i] - second * s);
                store(y[half + i], second * cos[i] + first * s);
            }
        }
}

// ---- Keyed dropout: byte j of splitmix64((key ^ stream) + group * golden) decides on channel 8 group + j --------------

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15;

E5_INLINE uint64_t splitmix64(uint64_t z) {
    z += kGolden;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return z ^ (z >> 31);
}

template <class T>
E5_INLINE void drop(
    const T* x, const int64_t* keys, uint64_t stream, int drop_below, T* __restrict y, int64_t rows, int64_t width) {
    using C = Compute<T>;
    const C scale = C(256) / C(256 - drop_below);
    constexpr int kGroups = 64;  // hashes first, then channels: both loops become vectors
    uint64_t bits[kGroups];
    uint8_t bytes[8 * kGroups];
    for (int64_t row = 0; row < rows; ++row, x += width, y += width)
        for (int64_t first = 0; first < width; first += 8 * kGroups) {
            const uint64_t start = (uint64_t(keys[row]) ^ stream) + uint64_t(first / 8) * kGolden;
            for (int group = 0; group < kGroups; ++group) bits[group] = splitmix64(start + uint64_t(group) * kGolden);
            std::memcpy(bytes, bits, sizeof(bytes));  // little-endian: byte j is bits 8 j .. 8 j + 7
            const int64_t n = std::min<int64_t>(8 * kGroups, width - first);
            for (int64_t i = 0; i < n; ++i) {
                const C kept = load(x[first + i]) * scale;
                store(y[first + i], bytes[i] >= drop_below ? kept : C(0));
            }
        }
}

// target_clones takes no templates: one function a type.
#define E5_ROW_KERNELS(T, W, C)                                                                                        \
    E5_CLONES void rms_norm(const T* x, const W* weight, T* y, C* inverse, int64_t rows, int64_t width, C eps) {       \
        norm_forward(x, weight, y, inverse, rows, width, eps);                                                         \
    }                                                                                                                  \
    E5_CLONES void rms_norm_gradient(                                                                                  \
        const T* g, const T* x, const W* weight, const C* inverse, T* dx, int64_t rows, int64_t width) {               \
        norm_backward(g, x, weight, inverse, dx, rows, width);                                                         \
    }
#define E5_ELEMENT_KERNELS(T, C)                                                                                       \
    E5_CLONES void glu(bool gelu, const T* gate, const T* up, T* y, int64_t n) {                                       \
        gelu ? gate_values<true>(gate, up, y, n) : gate_values<false>(gate, up, y, n);                                 \
    }                                                                                                                  \
    E5_CLONES void glu_gradient(bool gelu, const T* g, const T* gate, const T* up, T* d_gate, T* d_up, int64_t n) {    \
        gelu ? gate_gradients<true>(g, gate, up, d_gate, d_up, n) : gate_gradients<false>(g, gate, up, d_gate, d_up, n);   \
    }                                                                                                                  \
    E5_CLONES void rotate(                                                                                             \
        const T* x, int64_t x_stride, const C* cos, const C* sin, T* y, int64_t tokens, int64_t heads, int64_t half,   \
        C sign) {                                                                                                      \
        turn(x, x_stride, cos, sin, y, tokens, heads, half, sign);                                                     \
    }                                                                                                                  \
    E5_CLONES void dropout_rows(                                                                                       \
        const T* x, const int64_t* keys, uint64_t stream, int drop_below, T* y, int64_t rows, int64_t width) {         \
        drop(x, keys, stream, drop_below, y, rows, width);                                                             \
    }
E5_ROW_KERNELS(float, float, float)
E5_ROW_KERNELS(bf16, bf16, float)
E5_ROW_KERNELS(bf16, float, float)
E5_ROW_KERNELS(double, double, double)
E5_ELEMENT_KERNELS(float, float)
E5_ELEMENT_KERNELS(bf16, float)
E5_ELEMENT_KERNELS(double, double)

void check_like(const Tensor& x, const Tensor& other, const char* message) {
    STD_TORCH_CHECK(
        x.is_contiguous() && other.is_contiguous() && same_shape(x, other) && x.scalar_type() == other.scalar_type(),
        message);
}

// Calls function(T(), W()) for the types of x and of the norm's weight: x's own, or float under bf16.
template <class Function>
void dispatch_norm(const Tensor& x, const Tensor& weight, const Function& function) {
    STD_TORCH_CHECK(x.is_contiguous() && weight.is_contiguous() && weight.dim() == 1 && x.size(x.dim() - 1) == weight.size(0),
        "x must be (..., D) and weight (D,), contiguous");
    dispatch(x, [&](auto type) {
        using T = decltype(type);
        if constexpr (std::is_same_v<T, bf16>)
            if (weight.scalar_type() == ScalarType::Float) return function(type, float());
        STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "weight must have x's dtype, or float32 under bfloat16");
        function(type, type);
    });
}

}  // namespace

std::tuple<Tensor, Tensor> rms_norm_forward(Tensor x, Tensor weight, double eps) {
    const int64_t width = weight.size(0), rows = x.numel() / std::max<int64_t>(1, width);
    Tensor y = torch::stable::empty_like(x);
    const ScalarType wide = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    Tensor inverse = torch::stable::new_empty(x, {rows}, wide);
    dispatch_norm(x, weight, [&](auto type, auto weight_type) {
        using T = decltype(type);
        using W = decltype(weight_type);
        using C = Compute<T>;
        parallel_rows(rows, width, [&](int64_t begin, int64_t end) {
            rms_norm(data<T>(x) + begin * width, data<W>(weight), data<T>(y) + begin * width, data<C>(inverse) + begin,
                end - begin, width, C(eps));
        });
    });
    return {y, inverse};
}

Tensor rms_norm_backward(Tensor g, Tensor x, Tensor weight, Tensor inverse) {
    check_like(g, x, "the gradient must be like x");
    const int64_t width = weight.size(0), rows = inverse.numel();
    STD_TORCH_CHECK(rows == x.numel() / std::max<int64_t>(1, width) && inverse.is_contiguous() &&
            inverse.scalar_type() == (x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float),
        "inverse must be what rms_norm_forward gave");
    Tensor dx = torch::stable::empty_like(x);
    dispatch_norm(x, weight, [&](auto type, auto weight_type) {
        using T = decltype(type);
        using W = decltype(weight_type);
        using C = Compute<T>;
        parallel_rows(rows, width, [&](int64_t begin, int64_t end) {
            const int64_t at = begin * width;
            rms_norm_gradient(data<T>(g) + at, data<T>(x) + at, data<W>(weight), data<C>(inverse) + begin, data<T>(dx) + at,
                end - begin, width);
        });
    });
    return dx;
}

Tensor glu_forward(Tensor gate, Tensor up, bool gelu) {
    check_like(gate, up, "gate and up must be alike and contiguous");
    Tensor y = torch::stable::empty_like(gate);
    dispatch(gate, [&](auto type) {
        using T = decltype(type);
        parallel_rows(gate.numel(), 1, [&](int64_t begin, int64_t end) {
            glu(gelu, data<T>(gate) + begin, data<T>(up) + begin, data<T>(y) + begin, end - begin);
        });
    });
    return y;
}

std::tuple<Tensor, Tensor> glu_backward(Tensor g, Tensor gate, Tensor up, bool gelu) {
    check_like(gate, up, "gate and up must be alike and contiguous");
    check_like(g, up, "the gradient must be like up");
    Tensor d_gate = torch::stable::empty_like(gate), d_up = torch::stable::empty_like(up);
    dispatch(gate, [&](auto type) {
        using T = decltype(type);
        parallel_rows(gate.numel(), 1, [&](int64_t begin, int64_t end) {
            glu_gradient(gelu, data<T>(g) + begin, data<T>(gate) + begin, data<T>(up) + begin, data<T>(d_gate) + begin,
                data<T>(d_up) + begin, end - begin);
        });
    });
    return {d_gate, d_up};
}

Tensor rope(Tensor x, Tensor cos, Tensor sin, bool inverse) {
    const bool packed = x.dim() == 3 && (x.is_contiguous() || (x.stride(2) == 1 && x.stride(1) == x.size(2)));
    STD_TORCH_CHECK(packed && x.size(2) % 2 == 0,
        "x must be (T, heads, head_dim), the heads of a token contiguous, head_dim even");
    check_like(cos, sin, "cos and sin must be alike and contiguous");
    const int64_t heads = x.size(1), half = x.size(2) / 2;
    STD_TORCH_CHECK(cos.numel() == x.size(0) * half, "cos and sin must be (T, 1, head_dim / 2)");
    STD_TORCH_CHECK(cos.scalar_type() == (x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float),
        "cos and sin must be float32, or float64 for a float64 x");
    Tensor y = torch::stable::new_empty(x, x.sizes());
    dispatch(x, [&](auto type) {
        using T = decltype(type);
        using C = Compute<T>;
        parallel_rows(x.size(0), heads * half * 2, [&](int64_t begin, int64_t end) {
            rotate(data<T>(x) + begin * x.stride(0), x.stride(0), data<C>(cos) + begin * half, data<C>(sin) + begin * half,
                data<T>(y) + begin * heads * half * 2, end - begin, heads, half, C(inverse ? -1 : 1));
        });
    });
    return y;
}

Tensor keyed_dropout(Tensor x, Tensor keys, int64_t stream, int64_t drop_below) {
    STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && keys.is_contiguous() && keys.numel() == x.size(0) &&
            keys.scalar_type() == ScalarType::Long && drop_below >= 0 && drop_below < 256,
        "x must be (T, C), contiguous, keys (T,) int64, drop_below within 0..255");
    Tensor y = torch::stable::empty_like(x);
    const int64_t width = x.size(1);
    dispatch(x, [&](auto type) {
        using T = decltype(type);
        parallel_rows(x.size(0), width, [&](int64_t begin, int64_t end) {
            dropout_rows(data<T>(x) + begin * width, data<int64_t>(keys) + begin, uint64_t(stream), int(drop_below),
                data<T>(y) + begin * width, end - begin, width);
        });
    });
    return y;
}

STABLE_TORCH_LIBRARY_IMPL(e5kernels, CPU, m) {
    m.impl("rms_norm_forward", TORCH_BOX(&rms_norm_forward));
    m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
    m.impl("glu_forward", TORCH_BOX(&glu_forward));
    m.impl("glu_backward", TORCH_BOX(&glu_backward));
    m.impl("rope", TORCH_BOX(&rope));
    m.impl("keyed_dropout", TORCH_BOX(&keyed_dropout));
}

}  // namespace e5
