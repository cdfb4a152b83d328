# Training and evaluation in a container. The PyTorch wheels carry CUDA, so that a slim Python base is enough.
#
#   docker build --build-arg UID=$(id -u) -t tastgram-mfn .
#   docker run --rm --gpus all -v "$PWD/datasets:/data:ro" -v "$PWD/check_points:/app/check_points" tastgram-mfn \
#       python train.py --data_root /data
FROM python:3.11-slim-bookworm

# a C compiler for torch.compile
RUN apt-get update && apt-get install --yes --no-install-recommends gcc g++ libc6-dev && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY . .

# an ordinary user; what is written to the volumes belongs to it, hence the UID
ARG UID=1000
RUN useradd --uid "$UID" --create-home user && mkdir -p /data check_points && chown -R user /data /app
USER user
VOLUME ["/data", "/app/check_points"]
CMD ["python", "train.py", "--help"]
