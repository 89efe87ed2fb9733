# mtr in a container. BASE is any image of Debian or Ubuntu, with or without Python, CUDA or torch:
#
#   docker build -t mtr .                                                                   CPU
#   docker build -t mtr:cuda --build-arg BASE=nvidia/cuda:12.8.1-base-ubuntu24.04 \
#     --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 --build-arg EXTRAS=qlora,optim,liger .
#   docker run --rm --gpus all --ipc=host -v "$PWD:/work" mtr:cuda train recipe.yaml
#
# A torch that the base brings along (pytorch/pytorch) is kept if it is recent enough.
ARG BASE=python:3.12-slim-bookworm

# hadolint ignore=DL3006
FROM ${BASE} AS system
# torch.compile and Triton call a C compiler when a run begins
# hadolint ignore=DL3008,SC2086
RUN apt-get update \
    && if command -v python3 > /dev/null; then python=""; else python="python3-dev python3-venv"; fi \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends ca-certificates g++ $python \
    && rm -rf /var/lib/apt/lists/*

FROM system AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=""
RUN python3 -m venv --system-site-packages /opt/mtr \
    && /opt/mtr/bin/pip install --no-cache-dir --index-url "$TORCH_INDEX" "torch>=2.11,<2.14"
COPY pyproject.toml README.md LICENSE /source/
COPY src /source/src
RUN /opt/mtr/bin/pip install --no-cache-dir "/source${EXTRAS:+[$EXTRAS]}"

FROM system
LABEL org.opencontainers.image.title="mtr" \
      org.opencontainers.image.description="Fine-tunes reasoning models on multi-turn chats, every turn in its inference context" \
      org.opencontainers.image.licenses="Apache-2.0"
ARG USER_ID=1000
RUN useradd --create-home --non-unique --uid "$USER_ID" mtr && install --directory --owner=mtr /work
COPY --from=build /opt/mtr /opt/mtr
ENV PATH=/opt/mtr/bin:$PATH PYTHONUNBUFFERED=1
USER $USER_ID
WORKDIR /work
ENTRYPOINT ["mtr"]
CMD ["--help"]
