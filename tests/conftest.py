"""Where there is no GPU, tests of kernels run them in Triton's interpreter; all other tests run what CPU users run."""

import contextlib
import os

import pytest
import torch

# As `make test` has it, for whoever calls pytest: with more threads torch sums in another order and rounds otherwise.
torch.set_num_threads(1)

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


@pytest.fixture(autouse=True, scope="module")
def torch_bodies(request):
    """Outside the kernels' own tests, operators on the CPU run in torch, as on a client: else they'd be interpreted."""
    if request.path.parent.name == "kernels" or request.path.name == "test_kernels.py":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        for module in ("gelu", "layer_norm", "linear_cross_entropy", "quantize"):
            patch.setattr(f"fedbert_kernels.{module}.runs_triton", lambda tensor: tensor.is_cuda)
        yield
