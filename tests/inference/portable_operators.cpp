// The operators of `test_portable_kernels.py`: those of `operators.cpp`, without the class that puts them together.
#include "operators.h"
