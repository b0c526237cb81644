// The operators of `test_portable_kernels.py`: those of `operators.cpp`, without the class that puts them together; and most
// of the kernels, since reading torch's headers for each file of its own takes longer than compiling it.
#include "chunk_attention.cpp"
#include "operators.h"
#include "pointwise.cpp"
#include "prepacked_linear.cpp"
#include "store_rows.cpp"
