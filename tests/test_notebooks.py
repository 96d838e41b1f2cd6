"""Every notebook runs as it stands, from the first cell to the last."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 20 seconds: a kernel starts, compiles, trains, plans and plans again."""
    import nbformat
    from nbclient import NotebookClient

    for name in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), (
        "outputs are stripped"
    )
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
