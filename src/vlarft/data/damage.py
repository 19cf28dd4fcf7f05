"""Name the place where a file is damaged inside."""

import contextlib
import traceback
from collections.abc import Iterator

READERS = ("h5py", "pyarrow")  # raise whatever their part that stumbles raises, mostly without the file's name


@contextlib.contextmanager
def damage_named(where: str) -> Iterator[None]:
    """Turn what the packages that read files raise into one kind of error; errors of our own code stay as they are.

    Raises:
        ValueError: names `where`, in place of an error that one of `READERS` raised.
    """
    try:
        yield
    except Exception as error:
        *_, (last, _) = traceback.walk_tb(error.__traceback__)
        if last.f_globals.get("__name__", "").partition(".")[0] not in READERS:
            raise
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{where} cannot be read ({type(error).__name__}: {reason}); the file is damaged") from error
