# The pinned environment without the pipeline's code, which comes from the checkout (Apptainer, docker run) or is uploaded
# by Snakemake (Kubernetes), so an edit of a stage needs no new image. How to use it: docs/cluster.md.
#
#   docker build -t cm3-pipeline:0.2.0 .
FROM python:3.12-slim-bookworm

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1

WORKDIR /opt/cm3
COPY requirements.txt requirements-cluster.txt constraints.txt ./
RUN pip install uv==0.13.8 \
    && uv pip install --system --no-cache --compile-bytecode -r requirements-cluster.txt -c constraints.txt

# Jobs bring their own command and folder.
WORKDIR /workdir
CMD ["snakemake", "--version"]
