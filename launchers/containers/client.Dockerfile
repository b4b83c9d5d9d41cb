# A client on a CPU, for the owner of text. From the repository's folder:
#
#   docker build --file launchers/containers/client.Dockerfile --tag fedbert-ds-client .
#   docker run --rm -v "$PWD/notes:/data:ro" -v "$PWD/certs:/certs:ro" -v fedbert-state:/state \
#       fedbert-ds-client --server HOST:29600 --data /data \
#       --ca /certs/ca.pem --certificate /certs/hospital-a.pem --key /certs/hospital-a.key
#
# PIP_FLAGS are more arguments for pip, such as --extra-index-url with PyTorch's CPU builds: its
# ordinary ones bring gigabytes of CUDA along.
FROM python:3.12.11-slim-bookworm

ARG PIP_FLAGS=""
WORKDIR /opt/fedbert-ds
COPY pyproject.toml constraints.txt ./
COPY fedbert_ds ./fedbert_ds
COPY kernels ./kernels
# PIP_FLAGS are words, so they stand without quotes.
# hadolint ignore=SC2086
RUN pip install --no-cache-dir --constraint constraints.txt ${PIP_FLAGS} .

# The same number as in gpu-node.Dockerfile: keys on a shared volume are their user's alone.
RUN useradd --uid 1000 --create-home fedbert && install -d -o 1000 -g 1000 -m 700 /state /certs
USER 1000:1000
ENV PYTHONUNBUFFERED=1
# A client keeps its state in the folder it runs in.
WORKDIR /state
ENTRYPOINT ["fedbert-ds", "client"]
CMD ["--help"]
