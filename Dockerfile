# docker build -t offrl .                                       with the PyTorch that pip chooses
# docker build -t offrl --build-arg TORCH_INDEX=URL .           with the CPU or CUDA build of an index (PyTorch's install page lists
#                                                               them); run a CUDA build with --gpus all
# docker run --rm -v "$PWD/runs:/data/runs" offrl train agent=td3_bc preset=laptop
ARG PYTHON=3.11
FROM python:${PYTHON}-slim

# A C compiler for engine=compile; EGL and OSMesa for videos without a display.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libegl1 libosmesa6 \
    && rm -rf /var/lib/apt/lists/*

# Where TORCH_INDEX is given, it serves PyTorch alone: CPU wheels are small, CUDA ones bring CUDA's libraries along.
ARG TORCH_INDEX=
COPY constraints.txt /tmp/constraints.txt
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$(grep '^torch==' /tmp/constraints.txt)"

COPY pyproject.toml README.md LICENSE /src/
COPY conf /src/conf
COPY hydra_plugins /src/hydra_plugins
COPY offrl /src/offrl
RUN pip install --no-cache-dir -c /tmp/constraints.txt "/src[mujoco,minari,video,export,tensorboard]"

ENV OFFRL_HOME=/data/cache
WORKDIR /data
ENTRYPOINT ["offrl"]
CMD ["--help"]
