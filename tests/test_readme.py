"""The README's example runs as it stands; its two commands are where CI looks."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_example_runs() -> None:
    code = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)[0]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "all-reduce" in done.stdout


def test_both_commands_are_marked() -> None:
    text = README.read_text()
    for marker in ("main-job", "test-command"):
        found = re.search(rf"<!-- {marker} -->\n```bash\n(.+)\n```", text)
        assert found and found.group(1).startswith("python3 -m venv .venv && ")


def test_importing_is_light() -> None:
    code = (
        "import sys, rhino_jax; heavy = 'scipy rich click flax optax hypothesis'; "
        "print([m for m in heavy.split() if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
