"""The process of one training of a sweep: `python -P -m offrl.training.child PARENT`, with the configuration on standard input.

It stops with the process that started it. That is arranged before anything heavy is imported: a sweep may be killed in the
seconds that PyTorch takes.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys

REFUSED = 2  # exit status of bad input, which one line says
SENTENCE = "offrl: error: "  # how that line begins


def main() -> int:
    """Train; the exit status as of `offrl train`."""
    stop_with(int(sys.argv[1]))

    from offrl.training.runs import print_result
    from offrl.training.trainer import train
    from offrl.utils.advice import advising
    from offrl.utils.errors import OffrlError

    try:
        with advising("train"):
            return print_result(train(json.load(sys.stdin)))  # from the sweep's own process, not from a file
    except OffrlError as error:
        print(f"{SENTENCE}{error}", file=sys.stderr)
        return REFUSED


def stop_with(parent: int) -> None:
    """Get SIGTERM, on which training saves and stops, when the thread that started this process ends, killed or not."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it ended before
        sys.exit(130)


if __name__ == "__main__":
    sys.exit(main())
