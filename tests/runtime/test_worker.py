"""One process of a job: it runs a script as Python would, and ends with its parent."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

COMMAND = [sys.executable, "-m", "rhino_jax.runtime.worker"]
SCRIPT = """
import sys
import beside  # a module in the script's folder
assert __name__ == "__main__" and sys.argv[1:] == ["--steps", "3"], sys.argv
print(beside.WORD)
{end}
"""
WAITS = """
import os, time
from pathlib import Path
Path({folder!r}, "pid").write_text(str(os.getpid()))
time.sleep(60)
"""


def test_a_script_runs_as_python_runs_it(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("WORD = 'found'\n")
    script = tmp_path / "script.py"
    for end, code, told in (
        ("sys.exit('too few rows')", 1, "too few rows"),
        ("raise ValueError('no rows')", 1, "ValueError: no rows"),
    ):
        script.write_text(SCRIPT.format(end=end))
        done = subprocess.run(
            [*COMMAND, str(script), "--steps", "3"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, told in done.stdout + done.stderr) == (code, True)
        assert done.stdout.startswith("found\n")


def test_it_does_not_outlive_its_parent(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(WAITS.format(folder=str(tmp_path)))
    start = f"import subprocess; subprocess.run({[*COMMAND, str(script)]!r})"
    parent = subprocess.Popen([sys.executable, "-c", start])
    file = tmp_path / "pid"
    wait_until(lambda: file.exists() and file.read_text() != "")
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    worker = Path(f"/proc/{file.read_text()}/stat")
    wait_until(lambda: not worker.exists() or worker.read_text().split()[2] == "Z")


def wait_until(holds: Callable[[], bool], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)
