"""The command line of a script, whose mistakes are errors of one line. Needs nothing but Python's
standard library.
"""

import argparse
import itertools
import sys
from typing import Any, NoReturn

from errors import UserError


class OneLineParser(argparse.ArgumentParser):
    """An argument parser without abbreviated options that raises `UserError` for a mistake, such as
    an option that is given twice, unless it collects values.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        given = set()
        for word in itertools.takewhile(lambda word: word != "--", words):
            option = word.split("=")[0]
            if option in given:
                raise UserError(f"command line: {option} is given twice; leave one out")
            action = self._option_string_actions.get(option)
            if action and not isinstance(action, argparse._AppendAction):
                given.add(option)
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")
