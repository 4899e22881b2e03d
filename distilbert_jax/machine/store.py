"""Names of files → where they are: on this machine's disks, or under gs:// in a bucket.

What is in a bucket has a place of its own in a cache folder of this machine. Whatever needs a disk
(packed rows, the log, models) works there: `fetch` brings it down, `upload` takes it up. Only
checkpoints and texts are written and read in the bucket itself. A name without gs:// is its own
place, and both do nothing.
"""

import base64
import contextlib
import functools
import glob as disk
import io
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilbert_jax.errors import UserError, first_line

if TYPE_CHECKING:
    import gcsfs

# Read when gcsfs is imported: what it would ask about the bucket needs more rights, and minutes.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

AnyPath = Any  # a pathlib.Path or, under gs://, an epath.Path: it has the same methods
LAST = "manifest.json"  # of a folder: where it is, all else is there too
UNFINISHED = ".part-"  # in the name of a file that is being fetched


def is_remote(name: str | os.PathLike[str]) -> bool:
    """Whether it is a name under gs://."""
    return str(name).startswith("gs://")


def join(name: str | os.PathLike[str], *parts: str) -> str:
    """A name further down."""
    if not is_remote(name):
        return str(Path(name, *parts))
    return "/".join((str(name).rstrip("/"), *filter(None, parts)))


def path(name: str | os.PathLike[str]) -> AnyPath:
    """For reading and writing whole files in place: a pathlib.Path, or epath.Path under gs://."""
    if not is_remote(name):
        return Path(name)
    from etils import epath

    _bucket()
    return epath.Path(name)


def local(name: str | os.PathLike[str]) -> Path:
    """The place on this machine's disks."""
    if not is_remote(name):
        return Path(name)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "distilbert_jax", "gs", str(name).removeprefix("gs://"))


@functools.cache
def _bucket() -> "gcsfs.GCSFileSystem":
    """The client of Cloud Storage; other processes write too, so it remembers no listing."""
    logging.getLogger("gcsfs").setLevel("CRITICAL")  # its retries; one line is ours
    try:
        import fsspec.config
        import gcsfs
    except ImportError as error:
        raise UserError(f"gs:// needs gcsfs ({error}): pip install gcsfs") from error
    fsspec.config.conf["gcs"] = {"use_listings_cache": False}  # in epath's own client, too
    return gcsfs.GCSFileSystem()


@contextlib.contextmanager
def told(name: str | os.PathLike[str]) -> Iterator[None]:
    """Turn whatever Cloud Storage or the network raises about `name` into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_remote(name):
            raise
        raise UserError(f"{name}: {_reason(str(name), error)}") from error


@contextlib.contextmanager
def named(name: str | os.PathLike[str]) -> Iterator[None]:
    """Tell errors about a place in the cache as what they are: about the name under gs://."""
    try:
        yield
    except UserError as error:
        if not is_remote(name):
            raise
        raise UserError(str(error).replace(str(local(name)), str(name))) from error


def _reason(name: str, error: Exception) -> str:
    """What is wrong, and the way out."""
    line = first_line(error)
    root = "gs://" + name.removeprefix("gs://").split("/")[0]
    if isinstance(error, FileNotFoundError):
        return (f"not found ({line}); is there a bucket {root}? gcloud storage buckets create "
                f"{root}")
    if getattr(error, "code", None) == 401 or "credentials" in str(error).lower():
        return (f"no credentials that are accepted ({line}); run gcloud auth application-default "
                "login, or give the machine a service account")
    if "Forbidden" in str(error):
        return f"not permitted ({line}); the account needs the role Storage Object Admin in {root}"
    return line


def check_writable(name: str) -> None:
    """Try whether a folder under gs:// can be written; nothing is left there.

    Raises:
        UserError: no gcsfs, no network, no bucket, no credentials or not the right to write.
    """
    if is_remote(name):
        probe = join(name, f"probe-{uuid.uuid4().hex}")
        with told(name):
            _bucket().pipe_file(probe, b"")
            _bucket().rm_file(probe)


def exists(name: str | os.PathLike[str]) -> bool:
    """Whether a file or folder is there."""
    if not is_remote(name):
        return os.path.exists(name)
    with told(name):
        return _bucket().exists(str(name))


def is_folder(name: str) -> bool:
    """Whether a folder is there."""
    if not is_remote(name):
        return os.path.isdir(name)
    with told(name):
        return _bucket().isdir(name)


def glob(pattern: str) -> list[str]:
    """All names that match, sorted."""
    if not is_remote(pattern):
        return sorted(disk.glob(pattern, recursive=True))
    with told(pattern):
        return sorted(f"gs://{found}" for found in _bucket().glob(pattern))


def files(folder: AnyPath) -> list[str]:
    """All files below a folder, as names in it, sorted."""
    if is_remote(folder):
        return sorted(name.removeprefix(f"{folder}/") for name in _listed(str(folder)))
    return sorted(found.relative_to(folder).as_posix() for found in folder.rglob("*")
                  if not found.is_dir())


def open_binary(name: str | os.PathLike[str]) -> Any:
    """Open a file for reading bytes."""
    if not is_remote(name):
        return open(name, "rb")
    with told(name):
        return io.BufferedReader(_bucket().open(name, "rb"), 2**20)


def remove(folder: AnyPath, first: str) -> None:
    """Delete a folder under gs://, one of its files before all others."""
    for name in sorted(files(folder), key=lambda name: name != first):
        with contextlib.suppress(FileNotFoundError):
            _bucket().rm_file(str(folder / name))


def fetch(name: str | os.PathLike[str]) -> Path:
    """Make the place of a file or folder on this machine what it is under gs://.

    Files that are the same already, by their checksums, stay.

    Returns:
        The place; of a name that is not under gs://, itself.
    """
    place = local(name)
    if is_remote(name):
        with told(name):
            found = _listed(str(name))
            for file, checksum in found.items():
                if _checksum(local(file)) != checksum:
                    _fetch_file(file, local(file), checksum)
        for file in files(place) if place.is_dir() else []:
            if join(name, file) not in found and UNFINISHED not in file:
                (place / file).unlink(missing_ok=True)
        if not found:
            shutil.rmtree(place, ignore_errors=True)
    return place


def upload(name: str | os.PathLike[str], *parts: str) -> None:
    """Take up what is at the place of a folder, or these parts of it, where it differs.

    Nothing is removed under gs://, and manifests come last.
    """
    if not is_remote(name):
        return
    for top in (join(name, part) for part in parts or ("",)):
        place = local(top)
        here = [join(top, file) for file in files(place)] if place.is_dir() else [top]
        with told(name):
            there = _listed(top)
            for file in sorted(here, key=lambda file: file.endswith(LAST)):
                if local(file).is_file() and there.get(file) != _checksum(local(file)):
                    _bucket().put_file(str(local(file)), file)


def _listed(name: str) -> dict[str, str]:
    """Each file below a name, or the name itself → its checksum."""
    found = _bucket().find(name, detail=True)
    return {f"gs://{key}": info["crc32c"] for key, info in found.items() if info["type"] == "file"}


def _checksum(file: Path) -> str:
    """CRC32C of a file's content, as Cloud Storage writes it; "" where there is no file."""
    import google_crc32c

    if not file.is_file():
        return ""
    checksum = google_crc32c.Checksum()
    with file.open("rb") as content:
        while part := content.read(2**20):
            checksum.update(part)
    return base64.b64encode(checksum.digest()).decode()


def _fetch_file(name: str, place: Path, checksum: str) -> None:
    """Whole or not at all, whoever else fetches it."""
    place.parent.mkdir(parents=True, exist_ok=True)
    new = place.with_name(f"{place.name}{UNFINISHED}{uuid.uuid4().hex}")
    try:
        _bucket().get_file(name, str(new))
        if _checksum(new) != checksum:
            raise UserError(f"{name} did not arrive as it is there (its CRC32C differs): try again")
        new.replace(place)
    finally:
        new.unlink(missing_ok=True)
