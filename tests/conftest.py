"""Without a GPU, tests of kernels run them in Triton's interpreter. All other tests run torch's
operators, as CPU users do."""

import contextlib
import os

import hypothesis
import pytest
import torch

# A machine with other work is slow now and then; that is no fault of what is tested.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# As under `make test`: with more threads torch sums in another order and rounds differently.
torch.set_num_threads(1)

if not torch.cuda.is_available():
    # Triton decides at its own import and each kernel's, so set this before any test module imports
    # one.
    os.environ["TRITON_INTERPRET"] = "1"
    import fedbert_kernels.attention
    import fedbert_kernels.gelu
    import fedbert_kernels.layer_norm
    import fedbert_kernels.linear_cross_entropy
    import fedbert_kernels.quantize  # noqa: F401

    with contextlib.suppress(ImportError):
        # Triton imports this when it first interprets a kernel. It reads the variable too.
        import triton.experimental.gluon  # noqa: F401

    del os.environ["TRITON_INTERPRET"]


@pytest.fixture(autouse=True, scope="module")
def torch_bodies(request):
    """Outside the kernels' own tests, operators on the CPU run in torch, as on a client. Else
    Triton would interpret them."""
    if request.path.parent.name == "kernels" or request.path.name == "test_kernels.py":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        for module in ("gelu", "layer_norm", "linear_cross_entropy", "quantize"):
            patch.setattr(f"fedbert_kernels.{module}.runs_triton", lambda tensor: tensor.is_cuda)
        yield
