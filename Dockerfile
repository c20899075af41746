# The builder installs pinned packages into a virtual environment; the image is that and the code.
FROM python:3.13-slim AS builder
WORKDIR /src
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/bonsai-lora
COPY requirements.lock ./
RUN /opt/bonsai-lora/bin/pip install --require-hashes --no-deps --only-binary :all: -r requirements.lock
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY app ./app
RUN /opt/bonsai-lora/bin/pip install --no-deps --no-build-isolation .

FROM python:3.13-slim
COPY --from=builder /opt/bonsai-lora /opt/bonsai-lora
RUN useradd --system --uid 10001 --no-create-home bonsai \
    && install -d -o bonsai -g bonsai /data
# It does not start without BONSAI_LORA_KEYS_FILE, unless BONSAI_LORA_NO_AUTH=true says that a firewall
# or a proxy decides who may connect.
# Nothing is written but the store and temporary files: run it with --read-only and a tmpfs on /tmp.
ENV PATH=/opt/bonsai-lora/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    BONSAI_LORA_HOST=0.0.0.0 \
    BONSAI_LORA_PORT=8000 \
    BONSAI_LORA_STORE=/data \
    BONSAI_LORA_CACHE=/data/cache
USER 10001
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['BONSAI_LORA_PORT'] + '/readyz', timeout=2)"]
ENTRYPOINT ["bonsai-lora"]
CMD ["serve"]
