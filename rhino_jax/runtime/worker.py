"""One process of ``rhino launch``: ``python -m rhino_jax.runtime.worker script ...``.

Joins the others, then runs the script as ``python script`` would. A script that raises
ends this process at once: Python's own way out waits for the other processes, and those
for this one. The process does not outlive the launcher.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
import traceback

from rhino_jax.runtime.job import initialize
from rhino_jax.runtime.status import began

_PR_SET_PDEATHSIG = 1


def main(script: str, *arguments: str) -> None:
    """Run ``script`` with ``arguments`` among the other processes."""
    _end_with(os.getppid())
    sys.argv = [script, *arguments]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    try:
        began("joining the other processes")
        initialize()
        began("starting the script")
        runpy.run_path(script, run_name="__main__")
    except SystemExit as request:
        if request.code:
            _leave(request.code)
    except BaseException:
        traceback.print_exc()
        _leave(1)


def _leave(code: int | str) -> None:
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end_with(parent: int) -> None:
    """Be killed when ``parent`` dies, however it does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
