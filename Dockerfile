# docker build -t offrl .                                                          CPU
# docker build -t offrl --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .   CUDA; run with --gpus all
# docker run --rm -v "$PWD/runs:/work/runs" offrl train agent=td3_bc preset=laptop
ARG PYTHON=3.11
FROM python:${PYTHON}-slim

# A C compiler for engine=compile; EGL and OSMesa for videos without a display.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libegl1 libosmesa6 \
    && rm -rf /var/lib/apt/lists/*

# The only wheels from this index are PyTorch's; its CUDA builds bring CUDA's libraries along.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY constraints.txt /tmp/constraints.txt
RUN pip install --no-cache-dir --index-url "${TORCH_INDEX}" "$(grep '^torch==' /tmp/constraints.txt)"

COPY pyproject.toml README.md LICENSE /src/
COPY conf /src/conf
COPY hydra_plugins /src/hydra_plugins
COPY offrl /src/offrl
RUN pip install --no-cache-dir -c /tmp/constraints.txt "/src[mujoco,minari,video,export,tensorboard]"

ENV OFFRL_HOME=/work/cache
WORKDIR /work
ENTRYPOINT ["offrl"]
CMD ["--help"]
