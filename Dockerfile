# The command `recformer` with its server, on CPU torch, as a user without rights.
#
#   docker build -t recformer --build-arg TORCH_INDEX_URL=… .
#   docker run --rm -p 8000:8000 -v "$PWD/result/best_model:/model:ro" -v recformer:/home/recformer \
#       -v "$PWD/key:/run/key:ro" recformer serve /model --host 0.0.0.0 --api_key_file /run/key
#
# TORCH_INDEX_URL is the address of torch's CPU builds, which its installation page names ("pip",
# "CPU"). Without it pip takes the default build, on x86 the CUDA one: some gigabytes more.
# docs/guides/docker.md says more.

FROM python:3.11-slim-bookworm AS build
ARG TORCH_INDEX_URL=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /opt/recformer
ENV PATH=/opt/recformer/bin:$PATH
# What seldom changes comes first, so that a new source does not install torch anew.
COPY constraints.txt ./
RUN pip install -c constraints.txt ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch
COPY pyproject.toml README.md LICENSE ./
COPY recformer recformer/
COPY baselines baselines/
RUN pip install -c constraints.txt ".[serve]"

FROM python:3.11-slim-bookworm
RUN useradd --create-home --uid 10001 recformer
COPY --from=build /opt/recformer /opt/recformer
ENV PATH=/opt/recformer/bin:$PATH
USER 10001
WORKDIR /home/recformer
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["recformer"]
CMD ["--help"]
