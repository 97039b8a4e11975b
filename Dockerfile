# rlhf with the tested versions of constraints.txt, for a GPU or a CPU; one container is one machine.
#
#   docker build -t rlhf .
#   docker run --rm --gpus all --ipc host --user "$(id -u)" -v "$PWD:/work" rlhf -m rlhf.demo
#
# In place of -m rlhf.demo, anything that python takes: -m torch.distributed.run --nproc-per-node 8 -m
# rlhf.ppo ... is torchrun. `docker stop --time 120` lets a stage save before it ends. For a CPU, 4 GB
# less: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu. Other extras:
# --build-arg EXTRAS=plot,wandb. Left out: a C++ compiler, which compile=true needs.
FROM python:3.11.14-slim-bookworm AS build
ARG TORCH_INDEX=""
ARG EXTRAS="plot"
WORKDIR /source
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY rlhf rlhf
COPY conf conf
RUN python -m venv /opt/rlhf \
    && /opt/rlhf/bin/pip install --no-cache-dir -c constraints.txt \
        ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} ".[$EXTRAS]"

FROM python:3.11.14-slim-bookworm
COPY --from=build /opt/rlhf /opt/rlhf
RUN useradd --create-home --uid 1000 rlhf && install --directory --owner=rlhf /work
# HF_HOME: models from the Hub go into the mounted folder. USER: for a --user without a name. A number
# below, because Kubernetes (runAsNonRoot) does not look names up.
ENV PATH=/opt/rlhf/bin:$PATH HF_HOME=/work/.huggingface USER=rlhf PYTHONUNBUFFERED=1
USER 1000
WORKDIR /work
ENTRYPOINT ["python"]
CMD ["-m", "rlhf.demo"]
