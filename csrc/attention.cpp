// Attention over packed sequences: out = softmax(scale q k^T) v within each sequence, online (arXiv 2205.14135), and its
// gradient. What a query sees is an interval of keys: causal, the last window keys up to its own; else window to both sides.
// The queries of a sequence are aligned with its last keys, so that q and k may have different lengths.
//
// Forward runs over (sequence, query head), backward over (sequence, key head): dk and dv have one writer each. A block of
// 64 queries meets a block of 64 keys in scratch of the compute type, padded to whole vectors; all products are one gemm.
// FLOPs, of pairs (i, j) that are seen: forward 4 H head_dim a pair, backward 10 H head_dim.
#include <vector>

#include "kernel.h"

namespace e5 {
namespace {

constexpr int kBlock = 64;

struct View {  // (tokens, heads, head_dim) with contiguous channels
    void* data;
    int64_t token_stride, head_stride;

    explicit View(const Tensor& x) : data(x.mutable_data_ptr()), token_stride(x.stride(0)), head_stride(x.stride(1)) {}

    template <class T>
    E5_INLINE T* row(int64_t token, int64_t head) const {
        return static_cast<T*>(data) + token * token_stride + head * head_stride;
    }
};

struct Sequence {
    int64_t q_start, q_length, k_start, k_length;
};

struct Problem {
    View q, k, v, out;
    float* lse_f32;  // (tokens of q, heads), log-sum-exp of the scaled scores; the other pointer is null
    double* lse_f64;
    int64_t heads, kv_heads, head_dim, window;
    double scale;
    bool causal;
    std::vector<Sequence> sequences;  // longest first, so that no thread is left with a long one at the end

    int64_t padded_dim() const { return (head_dim + 15) / 16 * 16; }
    float* lse(float) const { return lse_f32; }
    double* lse(double) const { return lse_f64; }
};

struct Interval {
    int64_t begin, end;
};

E5_INLINE Interval seen(const Problem& p, const Sequence& s, int64_t query) {
    const int64_t position = query + s.k_length - s.q_length;
    const int64_t window = p.window > 0 ? p.window : s.k_length + s.q_length;
    const int64_t begin = std::max<int64_t>(0, position - window + 1);
    const int64_t end = std::min(s.k_length, p.causal ? position + 1 : position + window);
    return {begin, std::max(begin, end)};
}

// The keys that the queries [first, first + m) see between them.
E5_INLINE Interval seen_by_block(const Problem& p, const Sequence& s, int64_t first, int64_t m) {
    return {seen(p, s, first).begin, seen(p, s, first + m - 1).end};
}

template <int R, class C>
E5_INLINE void gemm_tile(
    const C* a, int64_t row, int64_t column, const C* b, int64_t ldb, C* c, int64_t ldc, int64_t k) {
    constexpr int L = kLanes<C>;
    C sum[R][L];
    for (int r = 0; r < R; ++r)
        for (int l = 0; l < L; ++l) sum[r][l] = c[r * ldc + l];
    for (int64_t i = 0; i < k; ++i)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const C x = a[r * row + i * column];
            for (int l = 0; l < L; ++l) sum[r][l] += x * b[i * ldb + l];
        }
    for (int r = 0; r < R; ++r)
        for (int l = 0; l < L; ++l) c[r * ldc + l] = sum[r][l];
}

// c (m, n) += a (m, k) b (k, n).  a's element (i, j) lies at i * row + j * column; n is a multiple of the lanes.
template <class C>
E5_INLINE void gemm(
    const C* a, int64_t row, int64_t column, const C* b, int64_t ldb, C* c, int64_t ldc, int64_t m, int64_t n, int64_t k) {
    int64_t i = 0;
    for (; i + 4 <= m; i += 4)
        for (int64_t j = 0; j < n; j += kLanes<C>)
            gemm_tile<4, C>(a + i * row, row, column, b + j, ldb, c + i * ldc + j, ldc, k);
    for (; i < m; ++i)
        for (int64_t j = 0; j < n; j += kLanes<C>)
            gemm_tile<1, C>(a + i * row, row, column, b + j, ldb, c + i * ldc + j, ldc, k);
}

// Copies rows [first, first + n) of a head as (n, padded) with zeros behind head_dim, times factor.
template <class T, class C>
E5_INLINE void load_rows(
    const View& x, int64_t head, int64_t first, int64_t n, int64_t dim, int64_t padded, C factor, C* to) {
    for (int64_t i = 0; i < n; ++i) {
        const T* from = x.row<T>(first + i, head);
        for (int64_t d = 0; d < dim; ++d) to[i * padded + d] = load(from[d]) * factor;
        for (int64_t d = dim; d < padded; ++d) to[i * padded + d] = 0;
    }
}

// Copies the same rows as (head_dim, kBlock) with zeros behind n.
template <class T, class C>
E5_INLINE void load_columns(const View& x, int64_t head, int64_t first, int64_t n, int64_t dim, C* to) {
    if (n < kBlock) std::fill_n(to, dim * kBlock, C(0));
    for (int64_t i = 0; i < n; ++i) {
        const T* from = x.row<T>(first + i, head);
        for (int64_t d = 0; d < dim; ++d) to[d * kBlock + i] = load(from[d]);
    }
}

template <class C>
struct ForwardScratch {
    std::vector<C> q, k, v, scores, out, row_max, row_sum;

    explicit ForwardScratch(const Problem& p)
        : q(kBlock * p.padded_dim()), k(kBlock * p.head_dim), v(kBlock * p.padded_dim()), scores(kBlock * kBlock),
          out(kBlock * p.padded_dim()), row_max(kBlock), row_sum(kBlock) {}
};

// One row of scores against one block of keys: turns scores into exp(score - max) and rescales what came before.
template <class C>
E5_INLINE void softmax_row(C* scores, int64_t begin, int64_t end, C& max, C& sum, C* out, int64_t padded) {
    constexpr int L = kLanes<C>;
    constexpr C kNone = -std::numeric_limits<C>::infinity();
    C best[L];
    for (int l = 0; l < L; ++l) best[l] = max;
    for (int j = 0; j < kBlock; j += L)
        for (int l = 0; l < L; ++l) {
            const C score = (j + l >= begin) & (j + l < end) ? scores[j + l] : kNone;
            scores[j + l] = score;
            best[l] = score > best[l] ? score : best[l];
        }
    if (std::max<int64_t>(begin, 0) >= std::min<int64_t>(end, kBlock)) {  // by place: a row of NaN has no maximum either
        std::fill_n(scores, kBlock, C(0));
        return;
    }
    C new_max = best[0];
    for (int l = 1; l < L; ++l) new_max = std::max(new_max, best[l]);
    C sums[L] = {};
    for (int j = 0; j < kBlock; j += L)
        for (int l = 0; l < L; ++l) {
            scores[j + l] = exponential(scores[j + l] - new_max);
            sums[l] += scores[j + l];
        }
    const C rescale = exponential(max - new_max);
    sum *= rescale;
    for (int l = 0; l < L; ++l) sum += sums[l];
    if (rescale != 1)
        for (int64_t d = 0; d < padded; ++d) out[d] *= rescale;
    max = new_max;
}

template <class T, class C>
E5_INLINE void forward_task(const Problem& p, const Sequence& s, int64_t head, ForwardScratch<C>& scratch) {
    const int64_t kv_head = head / (p.heads / p.kv_heads), dim = p.head_dim, padded = p.padded_dim();
    C *q = scratch.q.data(), *k = scratch.k.data(), *v = scratch.v.data(), *scores = scratch.scores.data();
    C *out = scratch.out.data(), *row_max = scratch.row_max.data(), *row_sum = scratch.row_sum.data();
    for (int64_t first = 0; first < s.q_length; first += kBlock) {
        const int64_t m = std::min<int64_t>(kBlock, s.q_length - first);
        load_rows<T, C>(p.q, head, s.q_start + first, m, dim, padded, C(p.scale), q);
        std::fill_n(out, m * padded, C(0));
        std::fill_n(row_max, m, -std::numeric_limits<C>::infinity());
        std::fill_n(row_sum, m, C(0));
        const Interval keys = seen_by_block(p, s, first, m);
        for (int64_t key = keys.begin / kBlock * kBlock; key < keys.end; key += kBlock) {
            const int64_t n = std::min<int64_t>(kBlock, s.k_length - key);
            load_columns<T, C>(p.k, kv_head, s.k_start + key, n, dim, k);
            load_rows<T, C>(p.v, kv_head, s.k_start + key, n, dim, padded, C(1), v);
            std::fill_n(scores, m * kBlock, C(0));
            gemm<C>(q, padded, 1, k, kBlock, scores, kBlock, m, kBlock, dim);
            for (int64_t i = 0; i < m; ++i) {
                const Interval row = seen(p, s, first + i);
                softmax_row<C>(
                    scores + i * kBlock, row.begin - key, row.end - key, row_max[i], row_sum[i], out + i * padded, padded);
            }
            gemm<C>(scores, kBlock, 1, v, padded, out, padded, m, padded, n);
        }
        for (int64_t i = 0; i < m; ++i) {
            const int64_t token = s.q_start + first + i;
            const C inverse = row_sum[i] > 0 ? 1 / row_sum[i] : C(0);
            T* to = p.out.row<T>(token, head);
            for (int64_t d = 0; d < dim; ++d) store(to[d], out[i * padded + d] * inverse);
            p.lse(C())[token * p.heads + head] = row_max[i] + std::log(row_sum[i]);
        }
    }
}

struct Gradients {
    View out, q, k, v;  // of out, read; of q, k and v, written
};

template <class C>
struct BackwardScratch {
    std::vector<C> q, g, k, k_columns, v_columns, scores, d_scores, dk, dv, dq, delta;

    BackwardScratch(const Problem& p, int64_t longest)
        : q(kBlock * p.padded_dim()), g(q.size()), k(q.size()), k_columns(kBlock * p.head_dim),
          v_columns(kBlock * p.head_dim), scores(kBlock * kBlock), d_scores(kBlock * kBlock), dk(q.size()), dv(q.size()),
          dq(p.heads / p.kv_heads * longest * p.padded_dim()), delta(p.heads / p.kv_heads * longest) {}
};

// Turns scores into probabilities, and the gradient at them into that at the scores: ds = p (dp - delta).
template <class C>
E5_INLINE void softmax_backward_row(C* scores, C* d_scores, int64_t begin, int64_t end, C lse, C delta) {
    for (int j = 0; j < kBlock; ++j) {
        const bool is_seen = (j >= begin) & (j < end);
        const C probability = is_seen ? exponential(scores[j] - lse) : C(0);
        scores[j] = probability;
        d_scores[j] = is_seen ? probability * (d_scores[j] - delta) : C(0);
    }
}

template <class T, class C>
E5_INLINE void row_deltas(const Problem& p, const Gradients& d, const Sequence& s, int64_t head, C* delta) {
    for (int64_t i = 0; i < s.q_length; ++i) {
        const T *out = p.out.row<T>(s.q_start + i, head), *g = d.out.row<T>(s.q_start + i, head);
        C sum = 0;
        for (int64_t channel = 0; channel < p.head_dim; ++channel) sum += load(out[channel]) * load(g[channel]);
        delta[i] = sum;
    }
}

template <class T, class C>
E5_INLINE void store_rows(
    const View& to, int64_t head, int64_t first, int64_t n, int64_t dim, int64_t padded, C factor, const C* from) {
    for (int64_t i = 0; i < n; ++i) {
        T* row = to.row<T>(first + i, head);
        for (int64_t d = 0; d < dim; ++d) store(row[d], from[i * padded + d] * factor);
    }
}

template <class T, class C>
E5_INLINE void backward_task(
    const Problem& p, const Gradients& d, const Sequence& s, int64_t kv_head, BackwardScratch<C>& scratch) {
    const int64_t group = p.heads / p.kv_heads, dim = p.head_dim, padded = p.padded_dim();
    C *q = scratch.q.data(), *g = scratch.g.data(), *k = scratch.k.data(), *k_columns = scratch.k_columns.data();
    C *v_columns = scratch.v_columns.data(), *scores = scratch.scores.data(), *d_scores = scratch.d_scores.data();
    C *dk = scratch.dk.data(), *dv = scratch.dv.data(), *dq = scratch.dq.data(), *delta = scratch.delta.data();
    std::fill_n(dq, group * s.q_length * padded, C(0));
    for (int64_t member = 0; member < group; ++member)
        row_deltas<T, C>(p, d, s, kv_head * group + member, delta + member * s.q_length);
    for (int64_t key = 0; key < s.k_length; key += kBlock) {
        const int64_t n = std::min<int64_t>(kBlock, s.k_length - key);
        load_rows<T, C>(p.k, kv_head, s.k_start + key, n, dim, padded, C(1), k);
        load_columns<T, C>(p.k, kv_head, s.k_start + key, n, dim, k_columns);
        load_columns<T, C>(p.v, kv_head, s.k_start + key, n, dim, v_columns);
        std::fill_n(dk, n * padded, C(0));
        std::fill_n(dv, n * padded, C(0));
        for (int64_t member = 0; member < group; ++member) {
            const int64_t head = kv_head * group + member;
            for (int64_t first = 0; first < s.q_length; first += kBlock) {
                const int64_t m = std::min<int64_t>(kBlock, s.q_length - first);
                const Interval keys = seen_by_block(p, s, first, m);
                if (keys.end <= key || keys.begin >= key + n) continue;
                load_rows<T, C>(p.q, head, s.q_start + first, m, dim, padded, C(p.scale), q);
                load_rows<T, C>(d.out, head, s.q_start + first, m, dim, padded, C(1), g);
                std::fill_n(scores, m * kBlock, C(0));
                std::fill_n(d_scores, m * kBlock, C(0));
                gemm<C>(q, padded, 1, k_columns, kBlock, scores, kBlock, m, kBlock, dim);
                gemm<C>(g, padded, 1, v_columns, kBlock, d_scores, kBlock, m, kBlock, dim);
                for (int64_t i = 0; i < m; ++i) {
                    const Interval row = seen(p, s, first + i);
                    softmax_backward_row<C>(
                        scores + i * kBlock, d_scores + i * kBlock, row.begin - key, row.end - key,
                        p.lse(C())[(s.q_start + first + i) * p.heads + head], delta[member * s.q_length + first + i]);
                }
                gemm<C>(scores, 1, kBlock, g, padded, dv, padded, n, padded, m);
                gemm<C>(d_scores, 1, kBlock, q, padded, dk, padded, n, padded, m);  // q holds the scale
                gemm<C>(d_scores, kBlock, 1, k, padded, dq + (member * s.q_length + first) * padded, padded, m, padded, n);
            }
        }
        store_rows<T, C>(d.k, kv_head, s.k_start + key, n, dim, padded, C(1), dk);
        store_rows<T, C>(d.v, kv_head, s.k_start + key, n, dim, padded, C(1), dv);
    }
    for (int64_t member = 0; member < group; ++member)
        store_rows<T, C>(
            d.q, kv_head * group + member, s.q_start, s.q_length, dim, padded, C(p.scale), dq + member * s.q_length * padded);
}

// target_clones takes no templates: one function a type.
#define E5_ATTENTION_TASKS(T, C)                                                                                      \
    E5_CLONES void forward(T, const Problem& p, const Sequence& s, int64_t head, ForwardScratch<C>& scratch) {        \
        forward_task<T, C>(p, s, head, scratch);                                                                      \
    }                                                                                                                 \
    E5_CLONES void backward(                                                                                          \
        T, const Problem& p, const Gradients& d, const Sequence& s, int64_t kv_head, BackwardScratch<C>& scratch) {   \
        backward_task<T, C>(p, d, s, kv_head, scratch);                                                               \
    }
E5_ATTENTION_TASKS(float, float)
E5_ATTENTION_TASKS(bf16, float)
E5_ATTENTION_TASKS(double, double)

std::vector<Sequence> sequences_of(const Tensor& cu_q, const Tensor& cu_k, int64_t q_tokens, int64_t k_tokens) {
    STD_TORCH_CHECK(
        cu_q.scalar_type() == ScalarType::Int && cu_k.scalar_type() == ScalarType::Int && cu_q.numel() == cu_k.numel() &&
            cu_q.numel() > 0 && cu_q.is_contiguous() && cu_k.is_contiguous(),
        "cu_seqlens of q and k must be (N+1,) int32 of the same length");
    const int32_t *q = data<int32_t>(cu_q), *k = data<int32_t>(cu_k);
    const int64_t n = cu_q.numel() - 1;
    STD_TORCH_CHECK(q[0] == 0 && k[0] == 0 && q[n] == q_tokens && k[n] == k_tokens, "cu_seqlens must run from 0 to T");
    std::vector<Sequence> sequences;
    for (int64_t i = 0; i < n; ++i) {
        STD_TORCH_CHECK(q[i + 1] >= q[i] && k[i + 1] >= k[i], "cu_seqlens must not fall");
        sequences.push_back({q[i], q[i + 1] - q[i], k[i], k[i + 1] - k[i]});
    }
    std::stable_sort(sequences.begin(), sequences.end(), [](const Sequence& a, const Sequence& b) {
        return a.q_length * a.k_length > b.q_length * b.k_length;
    });
    return sequences;
}

Problem problem_of(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& cu_q,
    const Tensor& cu_k, double scale, int64_t window, bool causal) {
    for (const Tensor* x : {&q, &k, &v, &out}) {
        STD_TORCH_CHECK(x->dim() == 3 && x->stride(2) == 1, "q, k, v and out must be (T, heads, head_dim), channels contiguous");
        STD_TORCH_CHECK(x->scalar_type() == q.scalar_type() && x->size(2) == q.size(2), "q, k, v and out must agree");
    }
    STD_TORCH_CHECK(k.size(1) > 0 && q.size(1) % k.size(1) == 0 && v.size(1) == k.size(1), "key heads must divide heads");
    STD_TORCH_CHECK(v.size(0) == k.size(0) && out.size(0) == q.size(0) && out.size(1) == q.size(1), "lengths must agree");
    const bool wide = q.scalar_type() == ScalarType::Double;
    STD_TORCH_CHECK(
        lse.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float) && lse.is_contiguous() && lse.dim() == 2 &&
            lse.size(0) == q.size(0) && lse.size(1) == q.size(1),
        "lse must be (T, heads) float32, float64 for a float64 q, contiguous");
    return {
        View(q), View(k), View(v), View(out), wide ? nullptr : data<float>(lse), wide ? data<double>(lse) : nullptr,
        q.size(1), k.size(1), q.size(2), window, scale, causal, sequences_of(cu_q, cu_k, q.size(0), k.size(0))};
}

}  // namespace

std::tuple<Tensor, Tensor> varlen_attention_forward(
    Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor cu_k, double scale, int64_t window, bool causal) {
    Tensor out = torch::stable::new_empty(q, q.sizes());
    const ScalarType wide = q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1)}, wide);
    const Problem problem = problem_of(q, k, v, out, lse, cu_q, cu_k, scale, window, causal);
    dispatch(q, [&](auto type) {
        parallel_tasks(int64_t(problem.sequences.size()) * problem.heads, [&] {
            return [&, scratch = ForwardScratch<Compute<decltype(type)>>(problem)](int64_t i) mutable {
                forward(type, problem, problem.sequences[i / problem.heads], i % problem.heads, scratch);
            };
        });
    });
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> varlen_attention_backward(
    Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_q, Tensor cu_k, double scale,
    int64_t window, bool causal) {
    Tensor dq = torch::stable::new_empty(q, q.sizes());
    Tensor dk = torch::stable::new_empty(k, k.sizes());
    Tensor dv = torch::stable::new_empty(v, v.sizes());
    const Problem problem = problem_of(q, k, v, out, lse, cu_q, cu_k, scale, window, causal);
    const Gradients gradients{View(d_out), View(dq), View(dk), View(dv)};
    STD_TORCH_CHECK(same_shape(d_out, out) && d_out.scalar_type() == q.scalar_type() && d_out.stride(2) == 1,
        "the gradient must be like out, channels contiguous");
    int64_t longest = 0;
    for (const Sequence& s : problem.sequences) longest = std::max(longest, s.q_length);
    dispatch(q, [&](auto type) {
        parallel_tasks(int64_t(problem.sequences.size()) * problem.kv_heads, [&] {
            return [&, scratch = BackwardScratch<Compute<decltype(type)>>(problem, longest)](int64_t i) mutable {
                const Sequence& sequence = problem.sequences[i / problem.kv_heads];
                backward(type, problem, gradients, sequence, i % problem.kv_heads, scratch);
            };
        });
    });
    return {dq, dk, dv};
}

STABLE_TORCH_LIBRARY_IMPL(e5kernels, CPU, m) {
    m.impl("varlen_attention_forward", TORCH_BOX(&varlen_attention_forward));
    m.impl("varlen_attention_backward", TORCH_BOX(&varlen_attention_backward));
}

}  // namespace e5
