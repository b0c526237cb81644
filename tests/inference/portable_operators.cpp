// The operators of `test_portable_kernels.py`: the kernels that have another way for CPUs without bfloat16 instructions.
#include <torch/library.h>

#include "kernels.h"

TORCH_LIBRARY_FRAGMENT(yoco_u, m) {
  m.def("chunk_attention(Tensor q, Tensor k, Tensor v, int window) -> Tensor");
  m.def("prepacked_linear(Tensor x, Tensor weights, Tensor? scales, int outputs) -> Tensor");
}

TORCH_LIBRARY_IMPL(yoco_u, CPU, m) {
  m.impl("chunk_attention", &chunk_attention);
  m.impl("prepacked_linear", &prepacked_linear);
}
