"""The evaluation of checkpoints: scores, metrics and decisions, and their tables, figures, report
and comparison.
"""

import logging
import os

# matplotlib reads it when it is first imported. Notebooks set a backend that may not be installed
# here, and figures are only written to files.
os.environ["MPLBACKEND"] = "agg"
os.environ["MATPLOTLIBRC"] = os.devnull  # figures do not depend on the user's settings
# It warns of fonts that were looked for, and of a folder for its settings that is not writable.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
