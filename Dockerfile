# Training and evaluation in a container. The PyTorch wheels carry CUDA, so that a slim Python base is enough:
#   docker build -t tastgram-mfn .
#   docker run --rm --gpus all --shm-size 8g -v "$PWD/datasets:/app/datasets/data" -v "$PWD/check_points:/app/check_points" \
#       tastgram-mfn python train.py --data_root datasets/data --store_path datasets/data/.store
FROM python:3.11-slim-bookworm

# a C compiler for torch.compile
RUN apt-get update && apt-get install --yes --no-install-recommends gcc g++ libc6-dev && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY . .

# an ordinary user, whose number can be that of the owner of the volumes: --build-arg UID=$(id -u)
ARG UID=1000
RUN useradd --uid "$UID" --create-home user && mkdir -p check_points datasets/data && chown -R user check_points datasets
USER user
VOLUME ["/app/datasets/data", "/app/check_points"]
CMD ["python", "train.py", "--help"]
