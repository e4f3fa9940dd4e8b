# The clone with its locked packages, for processors and NVIDIA GPUs: the wheels contain CUDA, the host brings the driver.
#   docker build -t ssl-core .                        podman and buildah build it too
#   docker run --rm -it --gpus all --shm-size 8g -v "$PWD:$PWD" -w "$PWD" -e PYTHONPATH="$PWD" ssl-core bash
ARG BASE=debian:bookworm-slim
FROM ${BASE}

RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates make python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 ssl \
    && install --directory --owner=ssl --group=ssl /opt/ssl-core
USER ssl
WORKDIR /opt/ssl-core

# Layers of a changed clone: these files decide the packages, so that a change of code installs nothing anew.
COPY --chown=ssl:ssl Makefile pyproject.toml setup.py README.md requirements.lock requirements-slurm.lock ./
COPY --chown=ssl:ssl ssl_core/__init__.py ssl_core/
# Apptainer's images are read-only: without bytecode every job would compile all packages.
RUN PIP_NO_CACHE_DIR=1 UV_NO_CACHE=1 UV_COMPILE_BYTECODE=1 make install
COPY --chown=ssl:ssl . .
ENV PATH=/opt/ssl-core/.venv/bin:$PATH
CMD ["bash"]
