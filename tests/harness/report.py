"""Runs checks one after the other and closes with `N passed, N failed`."""

import sys
import traceback


class Report:
    def __init__(self):
        self.passed = self.failed = 0

    def check(self, name: str, what, *args) -> None:
        """Calls `what`; an exception, or a text that it returns, is the failure."""
        try:
            why = what(*args)
        except AssertionError as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            why = f"{where.line} ({error})"
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
        self.passed, self.failed = self.passed + (why is None), self.failed + (why is not None)
        print(f"{name:60} {'ok' if why is None else f'FAILED: {why}'}", flush=True)

    def close(self) -> None:
        print(f"{self.passed} passed, {self.failed} failed")
        sys.exit(1 if self.failed or not self.passed else 0)
