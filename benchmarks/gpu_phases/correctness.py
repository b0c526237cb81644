"""Whether the GPU computes what it should, before anything is timed: what is wrong here makes every later figure worthless.

The truth is the same model on the CPU in float32, or the direct formula of a kernel. Float32 on the GPU must agree with it, but
for the order of additions. In bfloat16 no result is exact: there the error of the CPU's own bfloat16 is the measure, of which
the GPU's may be a small multiple.
"""

from gpu_phases.check_engine import check_engine
from gpu_phases.check_flash import check_flash
from gpu_phases.check_kernels import check_kernels
from gpu_phases.check_models import check_compiled, check_models
from gpu_phases.record import Record
from gpu_phases.scale import Scale


def run(record: Record, scale: Scale) -> None:
    check_kernels(record, scale)
    check_flash(record, scale)
    for size in scale.check_sizes:
        check_models(record, scale, size)
        check_engine(record, scale, size)
    if scale.check_compiled:
        check_compiled(record, scale)
