# The server's side: one rank for each GPU of a node. From the repository's folder:
#
#   docker build --file launchers/containers/gpu-node.Dockerfile --tag fedbert-ds-node .
#   docker run --rm --gpus all --ipc host --network host -v "$PWD/runs:/runs" \
#       fedbert-ds-node --config /opt/fedbert-ds/configs/bert-base.yaml run.directory=/runs/mine
#
# BASE=ubuntu:24.04 makes the image of a node without GPUs: set PET_NPROC_PER_NODE, torchrun's number
# of ranks, and DS_ACCELERATOR=cpu when it runs. PIP_FLAGS are more arguments for pip.
ARG BASE=nvidia/cuda:12.8.1-devel-ubuntu24.04
FROM ${BASE}

# Triton compiles a stub with gcc when it first runs, DeepSpeed its optimizers of offloaded weights.
# What Ubuntu has of these is as new as its own release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ARG PIP_FLAGS=""
ENV VIRTUAL_ENV=/opt/environment PATH=/opt/environment/bin:$PATH
WORKDIR /opt/fedbert-ds
COPY pyproject.toml constraints.txt ./
COPY fedbert_ds ./fedbert_ds
COPY kernels ./kernels
COPY launchers ./launchers
COPY configs ./configs
# PIP_FLAGS are words, so they stand without quotes. Versions are pyproject.toml's ranges, as on any
# machine with a GPU.
# hadolint ignore=SC2086,DL3013
RUN python3 -m venv /opt/environment \
    && pip install --no-cache-dir ${PIP_FLAGS} '.[server,data,gpu]'

# 1000 is Ubuntu's own first user.
RUN install -d -o 1000 -g 1000 -m 700 /runs /certs
USER 1000:1000
ENV PYTHONUNBUFFERED=1 PET_NPROC_PER_NODE=gpu NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /runs
ENTRYPOINT ["torchrun", "--standalone", "/opt/fedbert-ds/launchers/pretrain.py"]
CMD ["--help"]
