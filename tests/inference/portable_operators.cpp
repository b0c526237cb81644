// The operators of `test_portable_kernels.py`: those of `operators.cpp`, without the class that puts them together; and most
// of the kernels, since reading torch's headers for each file of its own takes longer than compiling it.
#include <torch/library.h>

#include "chunk_attention.cpp"
#include "kernels.h"
#include "pointwise.cpp"
#include "prepacked_linear.cpp"
#include "store_rows.cpp"

TORCH_LIBRARY_FRAGMENT(yoco_u, m) {
  m.def("chunk_attention(Tensor q, Tensor k, Tensor v, int window) -> Tensor");
  m.def("decode_attention(Tensor q, Tensor cache, Tensor? scales, Tensor table, int block_size, Tensor lengths) -> Tensor");
  m.def("prepacked_linear(Tensor x, Tensor weights, Tensor? scales, int outputs) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("rotate(Tensor x, Tensor cos, Tensor sin) -> Tensor");
  m.def("store_rows(Tensor k, Tensor v, Tensor slot_mapping, Tensor(a!) cache, Tensor(b!)? scales) -> ()");
  m.def("swiglu(Tensor x) -> Tensor");
}

TORCH_LIBRARY_IMPL(yoco_u, CPU, m) {
  m.impl("chunk_attention", &chunk_attention);
  m.impl("decode_attention", &decode_attention);
  m.impl("prepacked_linear", &prepacked_linear);
  m.impl("rms_norm", &rms_norm);
  m.impl("rotate", &rotate);
  m.impl("store_rows", &store_rows);
  m.impl("swiglu", &swiglu);
}
