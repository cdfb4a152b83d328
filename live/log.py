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

    def write(self, event: str, text: str, moment: float | None = None, **fields: Any) -> None:
        """Print an event of a moment, in seconds since 1970 (None: now). Of the fields, `file` and
        `start` (in seconds) are the place; those that are None are left out, except `score`.

        Raises:
            UserError: If standard output cannot be written.
        """
        moment = time.time() if moment is None else moment
        precision = "milliseconds" if self.as_json else "seconds"
        shown = datetime.fromtimestamp(moment).astimezone().isoformat(timespec=precision)
        if self.as_json:
            fields = {name: x for name, x in fields.items() if x is not None or name == "score"}
            line = json.dumps({"time": shown, "event": event} | fields)
        else:
            start = fields.get("start")
            place = [fields.get("file"), None if start is None else format_time(start)]
            line = "\t".join([shown, " ".join(filter(None, place)) or "-", text])
        try:
            print(line, flush=True)
        except OSError as error:
            raise UserError(explain(error, "standard output")) from None
