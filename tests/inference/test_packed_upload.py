"""Arrays that travel together arrive one by one."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from yoco_u.inference.packed_upload import _packed, _views, upload_arrays


@given(
    st.dictionaries(
        st.text(max_size=3),
        st.tuples(
            st.sampled_from([np.bool_, np.int32, np.int64, np.float32, np.float64]),
            st.lists(st.integers(0, 3), min_size=1, max_size=3),
            st.booleans(),
        ),
        max_size=5,
    )
)
def test_packed_arrays_arrive_as_they_were(chosen):
    random = np.random.default_rng(0)
    arrays = {}
    for name, (dtype, shape, transposed) in chosen.items():
        array = (random.normal(size=shape) * 1e3).astype(dtype)
        arrays[name] = array.T if transposed else array
    packed = _views(torch.from_numpy(_packed(arrays)), arrays)
    for found in (packed, upload_arrays(arrays, torch.device("cpu"))):
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            assert found[name].numpy().dtype == array.dtype
            np.testing.assert_array_equal(found[name].numpy(), array)
