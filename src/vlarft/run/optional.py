"""Optional packages: the error for a missing one names the extra that installs it."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def optional(what: str, extra: str) -> Iterator[None]:
    """Explain an import that fails inside: `with optional("pictures need pillow", "plots"): from PIL import Image`.

    Args:
        what: what needs which package.
        extra: extra of vlarft that installs it.

    Raises:
        ImportError: the import failed; the message has the command to install the extra.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(f'{what}: pip install -e ".[{extra}]"') from error
