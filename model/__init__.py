"""From a batch of samples to embedding and class similarity."""

from model.mobilefacenet import EMBEDDING_SIZE, MobileFaceNet, fold_batch_norm
from model.tastgram import FrontEnd, LogMel
from model.tastgram_mfn import CENTRES, CHANNELS, PUBLISHED_CHANNELS, Outputs, TASTgramMFN

__all__ = [
    "CENTRES",
    "CHANNELS",
    "EMBEDDING_SIZE",
    "PUBLISHED_CHANNELS",
    "FrontEnd",
    "LogMel",
    "MobileFaceNet",
    "Outputs",
    "TASTgramMFN",
    "fold_batch_norm",
]
