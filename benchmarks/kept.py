"""Rows that benchmarks keep, a JSON object a line: a run goes on where one stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def rows(file: Path) -> list[Row]:
    """All rows of a file, in order; none where there is no file."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


def by_key(file: Path) -> dict[str, Row]:
    """The rows of a file by their "key", the last of equals."""
    return {row["key"]: row for row in rows(file)}


def keep(file: Path, row: Row) -> None:
    """One row more."""
    with file.open("a") as out:
        out.write(json.dumps(row) + "\n")
