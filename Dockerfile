# With CUDA:  docker build -t cdiffset .        docker run --rm --gpus all -v "$PWD:/data" cdiffset test.py --sar-dir /data/sar ...
# CPUs only:  docker build -t cdiffset --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
# The page:   docker run --rm -p 127.0.0.1:7860:7860 -v "$PWD:/data" cdiffset app.py --host 0.0.0.0 --checkpoint /data/best
FROM python:3.12-slim

# On Linux, PyPI's PyTorch brings its own CUDA libraries: the host needs the driver and the NVIDIA container toolkit alone.
ARG TORCH_INDEX=https://pypi.org/simple

ENV HF_HOME=/cache/huggingface MPLCONFIGDIR=/tmp/matplotlib PYTHONUNBUFFERED=1
RUN mkdir -m 777 /cache
VOLUME /cache
WORKDIR /cdiffset

COPY requirements.txt requirements-extra.txt requirements.lock ./
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" --constraint requirements.lock torch torchvision \
    && pip install --no-cache-dir --constraint requirements.lock -r requirements.txt -r requirements-extra.txt

COPY . .
ENTRYPOINT ["python"]
CMD ["test.py", "--help"]
