"""From a batch of waveforms to embedding and class similarity."""

from model.tastgram import FrontEnd, LogMel
from model.tastgram_mfn import TASTgramMFN

__all__ = ["FrontEnd", "LogMel", "TASTgramMFN"]
