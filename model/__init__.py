"""The network: it computes embeddings and class similarities from batches of samples."""

from model.mobilefacenet import EMBEDDING_SIZE, MobileFaceNet, fold_batch_norm
from model.tastgram import FrontEnd, LogMel, levels_of, spectrum_of
from model.tastgram_mfn import CHANNELS, HEAD_WEIGHTS, PUBLISHED_CHANNELS, TASTgramMFN

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
