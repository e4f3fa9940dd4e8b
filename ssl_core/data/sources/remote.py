"""Remote tars: copies of files at addresses such as `https://` and `s3://`, and of the output of shell commands."""

import os
import re
import shutil
from pathlib import Path

from ssl_core.files import FULL, room_for
from ssl_core.mistakes import excerpt

REMOTE = re.compile("pipe:|(?!file:)[a-z][a-z0-9+.-]*://", re.IGNORECASE)
SECRETS = re.compile(r"(?<=://)[^/@\s]*@|(?<=\w)\?[^\s'\"]*")  # user and password, and the signature in a query
BLOCK = 1 << 22  # bytes


def is_remote(address: str) -> bool:
    """Return whether a tar must be copied before it is read; a local file with such a name is not remote."""
    return REMOTE.match(address) is not None and not os.path.exists(address)


def without_secrets(text: str) -> str:
    """Return an address or a message without users, passwords and queries; a command stays as it is."""
    return text if text.startswith("pipe:") else SECRETS.sub("", text)


def download(address: str, target: Path) -> None:
    """Copy the file at an address of `fsspec`, or the output of `pipe:COMMAND`, to `target`.

    Raises a one-line `ValueError` if the address cannot be read, its protocol needs a package that is not installed,
    the command fails or the disk is full.
    """
    if address.startswith("pipe:"):
        _run(address, target)
    else:
        _get(address, target)


def _run(address: str, target: Path) -> None:
    from webdataset.gopen import Pipe, gopen

    stream = gopen(address)
    assert isinstance(stream, Pipe)
    try:
        with room_for(target), open(target, "wb") as file:
            shutil.copyfileobj(stream, file, BLOCK)
        stream.close()
    except BaseException as error:
        status = stream.proc.poll()  # None: the command still runs
        stream.proc.terminate()
        stream.ignore_errors = True
        stream.close()
        if isinstance(error, OSError) and status is not None:
            raise ValueError(f"{excerpt(address)} failed with exit status {status}: run the command by hand") from None
        raise


def _get(address: str, target: Path) -> None:
    from fsspec.callbacks import TqdmCallback
    from fsspec.core import url_to_fs

    place = excerpt(without_secrets(address))
    options = {"desc": f"copying {place}", "unit": "B", "unit_scale": True, "disable": None}
    with room_for(target), TqdmCallback(tqdm_kwargs=options) as bar:
        try:
            system, path = url_to_fs(address)
            system.get_file(path, str(target), callback=bar)
        except ImportError as error:  # fsspec's message names the package
            raise ValueError(f"{place} needs another package: {excerpt(error)}") from None
        except FileNotFoundError:
            raise ValueError(f"{place} does not exist: correct the address") from None
        except Exception as error:  # each protocol has errors of its own
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            reason = excerpt(without_secrets(f"{type(error).__name__}: {error}"))
            raise ValueError(f"{place} cannot be read ({reason}): check the address and your access to it") from None
