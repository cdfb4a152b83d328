"""The lines that a monitor prints: for people, or as JSON for programs."""

import json
import time
from datetime import datetime
from typing import Any

from alarms import format_time
from errors import UserError, explain


class Log:
    """Prints a line for each event: time, place in the input, text; or as JSON its fields."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    def write(
        self,
        event: str,
        text: str,
        moment: float | None = None,
        file: str | None = None,
        start: float | None = None,
        **fields: Any,
    ) -> None:
        """Print an event of a moment, in seconds since 1970 (None: now), that concerns a file or a
        second of the input.

        Raises:
            UserError: If standard output cannot be written.
        """
        moment = time.time() if moment is None else moment
        precision = "milliseconds" if self.as_json else "seconds"
        shown = datetime.fromtimestamp(moment).astimezone().isoformat(timespec=precision)
        place = {"file": file, "start": start}
        if self.as_json:
            given = {name: value for name, value in place.items() if value is not None}
            line = json.dumps({"time": shown, "event": event} | given | fields)
        else:
            words = [file or "", "" if start is None else format_time(start)]
            line = "\t".join([shown, " ".join(filter(None, words)) or "-", text])
        try:
            print(line, flush=True)
        except OSError as error:
            raise UserError(explain(error, "standard output")) from None
