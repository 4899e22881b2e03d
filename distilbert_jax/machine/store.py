"""Files on this machine's disks and under gs:// in a bucket, read and written by the same calls.

Whatever is in a bucket has a copy in a cache folder of this machine. Code that needs a disk (packed
rows, the log, models) works on the copy: `fetch` downloads it, `upload` writes it back. Only
checkpoints and texts are written and read in the bucket itself. A name without gs:// is a path on
this machine, for which both do nothing. A `name` is a string or a path; a `path` can be opened.
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

from distilbert_jax.errors import UserError

if TYPE_CHECKING:
    import gcsfs

# Read when gcsfs is imported: what it would ask about the bucket needs more rights, and minutes.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

AnyPath = Any  # a pathlib.Path or, under gs://, an epath.Path: it has the same methods
LAST = "manifest.json"  # uploaded last: a folder that holds it is complete
UNFINISHED = ".part-"  # in the name of a file that is being written


def is_remote(name: str | os.PathLike[str]) -> bool:
    """Whether the name begins with gs://."""
    return str(name).startswith("gs://")


def join(name: str | os.PathLike[str], *parts: str) -> str:
    """Append parts to the name of a folder; empty parts are left out."""
    if not is_remote(name):
        return str(Path(name, *parts))
    return "/".join((str(name).rstrip("/"), *filter(None, parts)))


def path(name: str | os.PathLike[str]) -> AnyPath:
    """The path by which files are read and written where they are: under gs://, in the bucket."""
    if not is_remote(name):
        return Path(name)
    from etils import epath

    _bucket()
    return epath.Path(name)


def local(name: str | os.PathLike[str]) -> Path:
    """The path on this machine: of a name under gs://, the path of its copy in the cache."""
    if not is_remote(name):
        return Path(name)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "distilbert_jax", "gs", str(name).removeprefix("gs://"))


@functools.cache
def _bucket() -> "gcsfs.GCSFileSystem":
    """The client of Cloud Storage; it keeps no listings, because other processes write too."""
    logging.getLogger("gcsfs").setLevel("CRITICAL")  # it logs each retry; we raise one line
    try:
        import fsspec.config
        import gcsfs
    except ImportError as error:
        raise UserError(f"gs:// needs gcsfs ({error}): pip install gcsfs") from error
    fsspec.config.conf["gcs"] = {"use_listings_cache": False}  # in epath's own client, too
    return gcsfs.GCSFileSystem()


@contextlib.contextmanager
def errors_about(name: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what Cloud Storage or the network raises about `name` into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_remote(name):
            raise
        raise UserError(f"{name}: {_reason(str(name), error)}") from error


@contextlib.contextmanager
def errors_about_copy(name: str | os.PathLike[str]) -> Iterator[None]:
    """Let a UserError about the cached copy of `name` mention `name` and not the cache's path."""
    try:
        yield
    except UserError as error:
        if not is_remote(name):
            raise
        raise UserError(str(error).replace(str(local(name)), str(name))) from error


def _reason(name: str, error: Exception) -> str:
    """Say in one line what Cloud Storage refused, and the way out."""
    text = str(error).strip() or type(error).__name__
    line = text.replace("\n", " ")[:200]  # the second one says which right is missing
    root = "gs://" + name.removeprefix("gs://").split("/")[0]
    if isinstance(error, FileNotFoundError):
        return (f"not found ({line}); is there a bucket {root}? gcloud storage buckets create "
                f"{root}")
    if getattr(error, "code", None) == 401 or "credentials" in line.lower():
        return (f"no credentials that are accepted ({line}); run gcloud auth application-default "
                "login, or give the machine a service account")
    if "Forbidden" in line:
        return f"not permitted ({line}); the account needs the role Storage Object Admin in {root}"
    return line


def check_writable(name: str) -> None:
    """Check that a folder under gs:// can be written, by a file that is removed again.

    Raises:
        UserError: no gcsfs, no network, no bucket, no credentials or not the right to write.
    """
    if is_remote(name):
        probe = join(name, f"probe-{uuid.uuid4().hex}")
        with errors_about(name):
            _bucket().pipe_file(probe, b"")
            _bucket().rm_file(probe)


def exists(name: str | os.PathLike[str]) -> bool:
    """Whether there is a file or folder of this name."""
    if not is_remote(name):
        return os.path.exists(name)
    with errors_about(name):
        return _bucket().exists(str(name))


def is_folder(name: str) -> bool:
    """Whether there is a folder of this name."""
    if not is_remote(name):
        return os.path.isdir(name)
    with errors_about(name):
        return _bucket().isdir(name)


def glob(pattern: str) -> list[str]:
    """All names of files and folders that match a pattern, in which ** is any depth; sorted."""
    if not is_remote(pattern):
        base, parts = Path(), list(Path(pattern).parts)
        while parts and os.path.exists(base / parts[0]):  # a folder may be called [x]
            base /= parts.pop(0)
        return sorted(disk.glob(os.path.join(disk.escape(str(base)), *parts), recursive=True)
                      if base.parts else disk.glob(pattern, recursive=True))
    with errors_about(pattern):
        return sorted(f"gs://{found}" for found in _bucket().glob(pattern))


def files(folder: AnyPath) -> list[str]:
    """All files below a folder, relative to it and sorted: ["a.txt", "b/c.txt"]."""
    if is_remote(folder):
        return sorted(name.removeprefix(f"{folder}/") for name in _listed(str(folder)))
    return sorted(found.relative_to(folder).as_posix() for found in folder.rglob("*")
                  if not found.is_dir())


def open_binary(name: str | os.PathLike[str]) -> io.BufferedReader:
    """Open a file for reading bytes."""
    if not is_remote(name):
        return open(name, "rb")
    with errors_about(name):
        return io.BufferedReader(_bucket().open(name, "rb"), 2**20)


def remove(folder: AnyPath, first: str) -> None:
    """Delete a folder under gs://, and its file named `first` before all others."""
    for name in sorted(files(folder), key=lambda name: name != first):
        with contextlib.suppress(FileNotFoundError):
            _bucket().rm_file(str(folder / name))


def fetch(name: str | os.PathLike[str]) -> Path:
    """Download a file or folder into the cache; what is no longer in the bucket is deleted there.

    Files whose checksums agree already are not downloaded again.

    Returns:
        The path of the copy; of a name without gs://, the name itself.
    """
    copy = local(name)
    if is_remote(name):
        with errors_about(name):
            found = _listed(str(name))
            for file, checksum in found.items():
                if _checksum(local(file)) != checksum:
                    _fetch_file(file, local(file), checksum)
        for file in files(copy) if copy.is_dir() else []:
            if join(name, file) not in found and UNFINISHED not in file:
                (copy / file).unlink(missing_ok=True)
        if not found:
            shutil.rmtree(copy, ignore_errors=True)
    return copy


def upload(name: str | os.PathLike[str], *parts: str) -> None:
    """Upload those files of a folder's copy, or of these parts of it, that differ in the bucket.

    Nothing is removed in the bucket, and manifests are uploaded last. A name without gs:// is left
    as it is.
    """
    if not is_remote(name):
        return
    for top in (join(name, part) for part in parts or ("",)):
        copy = local(top)
        here = [join(top, file) for file in files(copy)] if copy.is_dir() else [top]
        with errors_about(name):
            there = _listed(top)
            for file in sorted(here, key=lambda file: file.endswith(LAST)):
                if local(file).is_file() and there.get(file) != _checksum(local(file)):
                    _bucket().put_file(str(local(file)), file)


def _listed(name: str) -> dict[str, str]:
    """The CRC32C of each file below a name under gs://, or of the file that it names."""
    found = _bucket().find(name, detail=True)
    return {f"gs://{key}": info["crc32c"] for key, info in found.items() if info["type"] == "file"}


def _checksum(file: Path) -> str:
    """The CRC32C of a file's content in Cloud Storage's form; "" where there is no file."""
    import google_crc32c

    if not file.is_file():
        return ""
    checksum = google_crc32c.Checksum()
    with file.open("rb") as content:
        while part := content.read(2**20):
            checksum.update(part)
    return base64.b64encode(checksum.digest()).decode()


def _fetch_file(name: str, path: Path, checksum: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as new:
        _bucket().get_file(name, str(new))
        if _checksum(new) != checksum:
            raise UserError(f"{name} did not arrive as it is there (its CRC32C differs): try again")


@contextlib.contextmanager
def whole_file(path: AnyPath) -> Iterator[AnyPath]:
    """Give a path to write a file at, and rename that file to `path` when the block ends.

    So `path` holds either what it held before or the whole new file, even if the power fails, and
    several processes may write it at once. Under gs:// an object appears whole when it is closed,
    and the path given is `path` itself.
    """
    if is_remote(path):
        yield path
        return
    new = path.with_name(f"{path.name}{UNFINISHED}{uuid.uuid4().hex}")
    try:
        yield new
        sync(new)
        new.replace(path)
        sync(path.parent)
    finally:
        new.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder to fill, and put it in the place of `path` when the block ends.

    Only one process may do so at a time; what a killed one left behind is cleared first.
    """
    new = path.with_name(path.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        shutil.rmtree(path, ignore_errors=True)
        new.rename(path)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def sync(path: AnyPath) -> None:
    """Write a file, or the names in a folder, through to the disk; under gs:// they are already."""
    if is_remote(path):
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
