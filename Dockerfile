# The service. On an index that serves torch's CUDA build, as PyPI does, name that of the CPU build:
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu -t clasp-search .
# For a CUDA machine, with the paper's encoders (torch from PyPI is the CUDA build):
#   docker build --build-arg EXTRAS=paper,gpu -t clasp-search:gpu .
# It listens on 0.0.0.0 and therefore wants a key (docs/security.md):
#   docker run -v clasp:/data clasp-search keys create NAME --scope read,write,admin
#   docker run -v clasp:/data -p 8000:8000 clasp-search
# Needs BuildKit, which Docker has built with since 23.
FROM python:3.12-slim-bookworm AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

FROM base AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY clasp_core clasp_core
COPY app app
RUN pip wheel --no-deps --wheel-dir /dist .

# All that the program stands on: an empty package asks for it, so that a change to the source keeps these layers.
FROM base AS needs
ARG TORCH_INDEX=""
ARG EXTRAS=""
WORKDIR /src
RUN python -m venv /opt/clasp
COPY constraints.txt ./
RUN /opt/clasp/bin/pip install --constraint constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
COPY pyproject.toml ./
# faiss-gpu and faiss-cpu own the same files: whichever should serve is installed last (docs/decisions.md)
RUN mkdir app clasp_core && touch README.md LICENSE NOTICE app/__init__.py clasp_core/__init__.py \
    && /opt/clasp/bin/pip install --constraint constraints.txt ".${EXTRAS:+[$EXTRAS]}" \
    && case "$EXTRAS" in *gpu*) /opt/clasp/bin/pip install --force-reinstall --no-deps \
        --constraint constraints.txt faiss-gpu ;; esac \
    && /opt/clasp/bin/pip uninstall --yes clasp-search

FROM base
RUN useradd --uid 10001 --create-home clasp \
    && install -d -o clasp -g clasp /data /models
COPY --from=needs /opt/clasp /opt/clasp
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    /opt/clasp/bin/pip install --no-deps /dist/*.whl
ENV PATH=/opt/clasp/bin:$PATH PYTHONUNBUFFERED=1 \
    CLASP_DATA_DIR=/data CLASP_HOST=0.0.0.0 CLASP_PORT=8000
ARG VERSION=unreleased
LABEL org.opencontainers.image.title="clasp-search" \
    org.opencontainers.image.description="Find what was said in recordings, in any language, without transcribing them." \
    org.opencontainers.image.licenses="MIT" \
    org.opencontainers.image.version="$VERSION"
USER 10001
WORKDIR /home/clasp
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["clasp"]
CMD ["serve"]
