"""results.json of eval_libero.py, as other parts read it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def reading_results(path: str | Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Open the results of an evaluation, of a folder or a file, and name that file if a field is missing or odd.

    Yields:
        The file and what it holds.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is another file: what the block looks up is not there, or of another type.
    """
    file = Path(path) / "results.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no results at {file}: give the --out-dir of eval_libero.py, or its results.json")
    try:
        yield file, json.loads(file.read_text())
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} is no results.json of eval_libero.py ({type(error).__name__}: {error})") from error
