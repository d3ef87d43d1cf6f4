# The image of a job: the package in a virtual environment, configs/ in the working folder, data/ and runs/ for volumes.
#   docker build -t mmlrec .                                                  # CPU
#   docker build -t mmlrec --build-arg LOCK=cuda .                            # CUDA wheels; needs the NVIDIA container toolkit to run
#   docker build -t mmlrec --build-arg LOCK=cuda --build-arg TORCH=2.11 .     # of the older torch, or without LOCK its CPU build
#   docker run --rm mmlrec                                                    # the doctor
#   docker run --rm -v "$PWD/data:/mmlrec/data" -v "$PWD/runs:/mmlrec/runs" mmlrec \
#       python -m apps.train --config configs/mtl/movielens-100k.yaml
# BASE: a Debian or Ubuntu with python3 of version 3.11 to 3.13.
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
ARG LOCK=cpu
ARG TORCH=2.13
WORKDIR /build
# The locks alone first: this layer stays as long as they do.
COPY requirements requirements
RUN python3 requirements/install.py --venv /usr/local/mmlrec --lock-only --torch "$TORCH" $([ "$LOCK" = cpu ] || echo "--$LOCK")
COPY . .
RUN /usr/local/mmlrec/bin/python -m pip install --no-deps --no-build-isolation --no-compile --no-cache-dir .

FROM ${BASE}
ARG LOCK=cpu
# No user name is needed, and no home: any user id can run it, with a file system that is only read but for the mounts and /tmp.
ENV PATH=/usr/local/mmlrec/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /mmlrec
COPY --from=build /usr/local/mmlrec /usr/local/mmlrec
COPY configs configs
COPY torchx.yaml .
RUN mkdir data runs && chown 10001:10001 data runs
USER 10001:10001
# A GPU's driver is there when the image runs, not when it is built: without it fbgemm's CUDA build does not load.
RUN if [ "$LOCK" = cpu ]; then python -m mmlrec.doctor; else python -m mmlrec.doctor --versions-only; fi
HEALTHCHECK --interval=1h --timeout=5m --start-period=5m CMD ["python", "-m", "mmlrec.doctor"]
CMD ["python", "-m", "mmlrec.doctor"]
