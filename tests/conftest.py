"""Where there is no GPU, this process runs kernels in Triton's interpreter; the processes it starts do not."""

import contextlib
import os

import torch

if not torch.cuda.is_available():
    # Triton decides when it and a kernel are imported, so before any test module can import one.
    os.environ["TRITON_INTERPRET"] = "1"
    import fedbert_kernels.attention
    import fedbert_kernels.gelu
    import fedbert_kernels.layer_norm
    import fedbert_kernels.linear_cross_entropy
    import fedbert_kernels.quantize  # noqa: F401

    with contextlib.suppress(ImportError):
        # Triton imports this when it first interprets a kernel, and it too looks at the variable.
        import triton.experimental.gluon  # noqa: F401

    del os.environ["TRITON_INTERPRET"]
