// The ops' schemas, in one place. Python's side (autograd, shapes without data, checks) is kernels/e5kernels/NAME.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(e5kernels, m) {
    m.def(
        "varlen_attention_forward(Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor cu_k, float scale, int window, "
        "bool causal) -> (Tensor, Tensor)");
    m.def(
        "varlen_attention_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_q, "
        "Tensor cu_k, float scale, int window, bool causal) -> (Tensor, Tensor, Tensor)");
    m.def("rms_norm_forward(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
    m.def("rms_norm_backward(Tensor g, Tensor x, Tensor weight, Tensor inverse) -> Tensor");
    m.def("glu_forward(Tensor gate, Tensor up, bool gelu) -> Tensor");
    m.def("glu_backward(Tensor g, Tensor gate, Tensor up, bool gelu) -> (Tensor, Tensor)");
    m.def("rope(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor");
    m.def("keyed_dropout(Tensor x, Tensor keys, int stream, int drop_below) -> Tensor");
}
