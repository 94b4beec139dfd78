# The service. For CPU, with the embedded model:   docker build -t clasp-search .
# For a CUDA machine, with the paper's encoders:
#   docker build --build-arg EXTRAS=embedded,paper,gpu -t clasp-search:gpu .
# It listens on 0.0.0.0 and therefore wants a key (docs/security.md):
#   docker run -v clasp:/data clasp-search keys create NAME --scope read,write,admin
#   docker run -v clasp:/data -p 8000:8000 clasp-search
# On a network whose default package index serves torch's CUDA build, name the index of its CPU build:
#   docker build --build-arg TORCH_INDEX=<url> -t clasp-search .
FROM python:3.12-slim-bookworm AS build
ARG TORCH_INDEX=""
ARG EXTRAS="embedded"
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /opt/clasp
COPY constraints.txt ./
RUN /opt/clasp/bin/pip install --constraint constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY clasp_core clasp_core
COPY app app
# faiss-gpu and faiss-cpu own the same files: whichever should serve is installed last (docs/decisions.md)
RUN /opt/clasp/bin/pip install --constraint constraints.txt ".[${EXTRAS}]" \
    && case "$EXTRAS" in *gpu*) /opt/clasp/bin/pip install --force-reinstall --no-deps \
        --constraint constraints.txt faiss-gpu ;; esac

FROM python:3.12-slim-bookworm
RUN useradd --uid 10001 --create-home clasp \
    && install -d -o clasp -g clasp /data /models
COPY --from=build /opt/clasp /opt/clasp
ENV PATH=/opt/clasp/bin:$PATH PYTHONUNBUFFERED=1 \
    CLASP_DATA_DIR=/data CLASP_HOST=0.0.0.0 CLASP_PORT=8000
USER 10001
WORKDIR /home/clasp
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["clasp"]
CMD ["serve"]
