"""From a batch of waveforms to embedding and class similarity."""

from model.tastgram import LogMel
from model.tastgram_mfn import TASTgramMFN

__all__ = ["LogMel", "TASTgramMFN"]
