"""Optional packages: a missing one says which extra installs it."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def optional(what: str, extra: str) -> Iterator[None]:
    """Explain an import that fails inside: `with optional("pictures need pillow", "plots"): from PIL import Image`.

    Args:
        what: says what needs which package.
        extra: the extra of this package that installs it.

    Raises:
        ImportError: the import failed.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(f'{what}: pip install -e ".[{extra}]"') from error
