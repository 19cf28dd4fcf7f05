"""Files on the Hugging Face Hub: names such as `hf:user/name@v1`, and errors that say what to do.

    hf:user/name[/path][@revision]    a repository, a file or folder in it; a branch, a tag or a commit

Files come from the cache of huggingface_hub, and into it; without a network, or with HF_HUB_OFFLINE=1, from the cache
alone. Nothing that is downloaded is executed: models are read by `checkpoint.load_model`, public weights by
`vlarft.pretrained`.
"""

import contextlib
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from vlarft.run.optional import optional

PREFIX, MODEL = "hf:", "model.safetensors"
NAME = re.compile(r"hf:(?P<repo>[^/@\s]+/[^/@\s]+)(/(?P<path>[^@]*))?(@(?P<revision>\S+))?")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
TEXT = (".json", ".txt")  # configurations, statistics, vocabularies


class HubName(NamedTuple):
    """Place of a file or folder; path "" is the repository, revision None its main branch."""

    repo: str
    path: str
    revision: str | None

    def __str__(self) -> str:
        path, revision = f"/{self.path}" * bool(self.path), f"@{self.revision}" * bool(self.revision)
        return f"{PREFIX}{self.repo}{path}{revision}"


def import_hub() -> Any:
    """Import huggingface_hub; an ImportError says what installs it."""
    with optional("models on the Hugging Face Hub need huggingface_hub", "hub"):
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    return huggingface_hub


def is_hub_name(path: str | Path) -> bool:
    """Return whether a path that a user gave names a place on the Hub."""
    return str(path).startswith(PREFIX)


def parse_name(text: str | Path) -> HubName:
    """Read a name.

    Raises:
        ValueError: it has another form.
    """
    match = NAME.fullmatch(str(text))
    if not match or ".." in (match["path"] or "").split("/"):
        raise ValueError(f"{text} is no place on the Hub: expected hf:user/name, hf:user/name/path or either @revision")
    return HubName(match["repo"], (match["path"] or "").strip("/"), match["revision"])


@functools.lru_cache(maxsize=64)  # the same file for the whole run, and one request
def model_file(name: str | Path) -> Path:
    """Return the local copy of a model file: the one that a name gives, or `model.safetensors` in that folder.

    In one process, a name stands for the file that it first was.

    Raises:
        FileNotFoundError, PermissionError, ValueError, OSError, ImportError: see `hub_errors`.
    """
    return download(parse_name(name))


def download(place: HubName, local_files_only: bool = False, token: str | bool | None = None) -> Path:
    """Return the local copy of a model file, see `model_file`, whatever it was before; errors as in `hub_errors`."""
    if not place.path.endswith(".safetensors"):
        place = place._replace(path=str(PurePosixPath(place.path) / MODEL))
    with hub_errors(place):
        options = {"revision": place.revision, "local_files_only": local_files_only, "token": token}
        return Path(import_hub().hf_hub_download(place.repo, place.path, **options, **_caller()))


def weights_folder(name: str | Path) -> Path:
    """Return the local copy of a repository's folder with weights, configurations and tables, or of one file of it.

    Args:
        name: of the folder, or of a file of weights, without the others beside it.

    Raises:
        FileNotFoundError: no such file or folder; and the errors of `hub_errors`.
    """
    place = parse_name(name)
    one = place.path if PurePosixPath(place.path).suffix in WEIGHTS + TEXT else None
    folder = str(PurePosixPath(place.path).parent if one else place.path).strip(".")
    prefix = f"{folder}/" if folder else ""
    kinds = (*TEXT, "_checkpoint.pt") if one else (*TEXT, *WEIGHTS)  # side files of a policy go with its weights
    wanted = [f"{prefix}*{kind}" for kind in kinds] + ([one] if one else [])
    with hub_errors(place):
        root = import_hub().snapshot_download(
            place.repo, revision=place.revision, allow_patterns=wanted, ignore_patterns=[f"{prefix}*/*"], **_caller()
        )
    path = Path(root) / place.path
    if not path.exists():
        raise FileNotFoundError(f"{place}: the repository has no {place.path}, or it holds no weights")
    return path


def upload(repo: str, files: Mapping[str, Path], private: bool | None, token: str | bool | None, message: str) -> str:
    """Write files into a repository by one commit, and create it if it is new.

    Args:
        repo: user/name.
        files: path in the repository -> file.
        private: visibility of a new repository; None: the account's default.
        token: None takes HF_TOKEN or what `hf auth login` stored.
        message: of the commit.

    Returns:
        The address of the repository.

    Raises:
        FileNotFoundError, PermissionError, ValueError, OSError, ImportError: see `hub_errors`.
    """
    hub = import_hub()
    with hub_errors(HubName(repo, "", None)):
        api = hub.HfApi(token=token, **_caller())
        url = api.create_repo(repo, private=private, exist_ok=True)
        parts = [hub.CommitOperationAdd(path, str(file)) for path, file in files.items()]
        api.create_commit(repo, operations=parts, commit_message=message)
    return str(url)


def _caller() -> dict[str, str]:
    import vlarft

    return {"library_name": "vlarft", "library_version": vlarft.__version__}


@contextlib.contextmanager
def hub_errors(place: HubName) -> Iterator[None]:
    """Explain what huggingface_hub raises inside.

    Raises:
        FileNotFoundError: no such repository (or a private one, and no token for it), revision or file; or it is not in
            the cache and the Hub is not reached.
        PermissionError: the token may not do this.
        ValueError: the name is none that the Hub allows.
        OSError: no connection while writing, or another answer of the Hub.
    """
    hub = import_hub()
    errors, where = hub.errors, hub.constants.ENDPOINT
    login = "log in with `hf auth login`, or set HF_TOKEN"
    try:
        yield
    except errors.GatedRepoError as error:
        raise PermissionError(f"{place}: access must be granted: accept its terms on {where}, and {login}") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{place}: {where} has no model {place.repo}, or it is private and the token, if there is one, may not "
            f"read it: check the name; for a private one {login}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{place}: {place.repo} has no branch, tag or commit {place.revision}: see {where}/{place.repo}"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{place} is not in the cache {hub.constants.HF_HUB_CACHE}, and {where} was not asked or not reached "
            f"({_reason(error)}): check the connection, HF_HUB_OFFLINE and HF_ENDPOINT"
        ) from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(
            f"{place}: the repository has no file {place.path}, which a model of vlarft has; public weights of other "
            "layouts are converted by python -m vlarft.pretrained"
        ) from error
    except errors.HFValidationError as error:
        raise ValueError(f"{place}: {str(error).splitlines()[0]}") from error
    except errors.OfflineModeIsEnabled as error:
        raise OSError(f"{place}: HF_HUB_OFFLINE=1 allows no request; unset it") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        text = f"{place}: {where} answers {status}: {_reason(error)}"
        if status in (401, 403):
            raise PermissionError(f"{text}: {login}, with a token that may write to {place.repo}") from error
        raise OSError(text) from error
    except errors.HTTPError as error:  # of the HTTP library, which differs between versions of huggingface_hub
        raise OSError(f"{place}: {where} is not reached ({_reason(error)}): check the connection") from error


def _reason(error: BaseException) -> str:
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}".removesuffix(".")
