"""What the processes of a run import, imported once: they are forked off the process that did it.

Each of them would need some eight seconds of a core for it. Import this module in no other process.
"""

from __future__ import annotations

import atexit
import contextlib
import gc

import deepspeed.ops.op_builder.all_ops
import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import torch
import transformers.models.bert.modeling_bert  # noqa: F401
from integration import chaos_process, mutations  # noqa: F401

import fedbert_ds.evaluation.masked_lm
import fedbert_ds.server.before_start
import fedbert_ds.server.body.distributed
import fedbert_ds.server.pretrain  # noqa: F401

with contextlib.suppress(ImportError):
    # DeepSpeed imports it for its first engine above stage 0, and with it torch's compiler.
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

# As under `make test`: with more threads torch sums in another order and rounds differently.
torch.set_num_threads(1)

# For each engine of stage 3, DeepSpeed collects garbage. Without this it looks at every object of
# every module again, and forked processes copy the pages that it marks.
gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)
