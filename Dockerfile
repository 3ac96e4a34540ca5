# One image for api, worker and predictor; docker-compose.yml says which one a container is.
FROM python:3.12-slim AS build
# torch's wheels with CUDA are large. For CPU only, point pip at an index of CPU wheels:
#   docker build --build-arg PIP_EXTRA_INDEX_URL=... .
ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/post
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY shared shared
COPY client client
COPY server server
COPY benchmarks/post_bench benchmarks/post_bench
RUN PIP_EXTRA_INDEX_URL="${PIP_EXTRA_INDEX_URL}" /opt/post/bin/pip install -c constraints.txt '.[server,postgres,s3]'

FROM python:3.12-slim
RUN useradd --system --uid 10001 --create-home --home-dir /data post
COPY --from=build /opt/post /opt/post
ENV PATH=/opt/post/bin:$PATH PYTHONUNBUFFERED=1 POST_HOME=/data
USER post
WORKDIR /data
VOLUME /data
EXPOSE 8321
CMD ["post", "serve"]
