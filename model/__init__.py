"""The network: it computes embeddings and class similarities from batches of samples."""

from model.batch_norm import fold_batch_norm
from model.channels import CHANNELS, PUBLISHED_CHANNELS, FrontEnd
from model.mobilefacenet import EMBEDDING_SIZE, MobileFaceNet
from model.tastgram import LogMel, levels_of, spectrum_of
from model.tastgram_mfn import HEAD_WEIGHTS, TASTgramMFN

__all__ = [
    "CHANNELS",
    "EMBEDDING_SIZE",
    "HEAD_WEIGHTS",
    "PUBLISHED_CHANNELS",
    "FrontEnd",
    "LogMel",
    "MobileFaceNet",
    "TASTgramMFN",
    "fold_batch_norm",
    "levels_of",
    "spectrum_of",
]
