"""Runs pytest with the given arguments, and the tests that failed once more, one after another.

Tests run beside each other on a busy machine. A test that fails so and passes alone has a fault of its own: a
limit of time that a busy machine does not keep, or a look at a process that ends meanwhile. The output names
the test, and the exit status is 0. If more than three tests fail, the exit status is pytest's at once.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

_RUN_AGAIN = 3
_TESTS_FAILED = 1


def main() -> int:
    with TemporaryDirectory() as cache:
        pytest = [sys.executable, "-m", "pytest", "-o", f"cache_dir={cache}", *sys.argv[1:]]
        status = subprocess.call(pytest)
        failed = Path(cache, "v/cache/lastfailed")
        if status != _TESTS_FAILED or not failed.exists():
            return status
        tests = list(json.loads(failed.read_text("utf-8")))
        if len(tests) > _RUN_AGAIN:
            return status
        print("\nFailed beside other tests, and run again alone:", *tests, sep="\n  ", flush=True)
        return subprocess.call([*pytest, "--last-failed", "--numprocesses", "0"])


if __name__ == "__main__":
    sys.exit(main())
