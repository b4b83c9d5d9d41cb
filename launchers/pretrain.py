"""What `deepspeed`, `torchrun` and `srun` start, once per rank.

    deepspeed --num_gpus 2 launchers/pretrain.py --config configs/default.yaml

More overrides and options: `--help`.
"""

from fedbert_ds.server.pretrain import main

if __name__ == "__main__":
    main()
