"""Shards at an address such as `s3://bucket/prefix`: sharding uploads them, stages copy them. Torch-free.

`<address>/<data set>/` has the tars, their indices, `card.json` (the card that they were made from) and, uploaded last,
`manifest.json`. The same manifest is in `shards/<data set>/`, so plans need no network and digests no address. Stages
get a copy of the manifest in a folder of the cache, beside which the tars of the splits that they read are:

    $SSL_CACHE/<data set>-<digest of the manifest>/manifest.json, <split>-000000.tar, <split>-000000.idx
                                                   <split>.lock (shared by the stages that read the split)
                                                   <split>.download (exclusive)

A tar appears by rename when its sha256 is that of the manifest.
"""

import importlib.util
import json
import os
import queue
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from fsspec import url_to_fs
from fsspec.callbacks import DEFAULT_CALLBACK, Callback
from tqdm import tqdm

from ssl_core.data.card import load_card
from ssl_core.data.shards import Manifest, Shard
from ssl_core.experiments.checks import check_address
from ssl_core.experiments.processes import locked
from ssl_core.files import FULL, atomic, write_bytes
from ssl_core.mistakes import excerpt
from ssl_core.progress import progress_bar
from ssl_core.provenance import canonical, digest, file_digest

ADDRESS, CACHE, LIMIT = "SSL_SHARDS", "SSL_CACHE", "SSL_CACHE_GB"
DEFAULT_LIMIT = 200.0  # GB: ImageNet with its validation images has 145
PARALLEL = 8  # transfers at the same time
PATIENCE = 2  # seconds for the other transfers to end after an error
CLOUD = ("s3", "gs", "az")
UPLOADED = ".uploaded.jsonl"  # of an upload that was interrupted: [address, file, sha256] per line
KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SKIP_SIGNATURE")  # one of them is set, except where the machine has a role
XML_CODE = re.compile(r"<Code>(\w+)</Code>")  # of S3's answers, the rest of which may contain the key's name


class Place(NamedTuple):
    """The folder of a data set in a file system of fsspec."""

    address: str
    system: Any  # of fsspec
    root: str

    def read(self, name: str) -> bytes | None:
        """Return the content of a small file, None if it does not exist."""
        with self.explained(name, "read"):
            try:
                return self.system.cat_file(f"{self.root}/{name}")
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        """Write a small file."""
        with self.explained(name, "written"):
            self.system.pipe_file(f"{self.root}/{name}", content)

    @contextmanager
    def explained(self, name: str, what: str) -> Iterator[None]:
        """Raise a one-line `ValueError` without secrets for an error of the file system while a file is `what`."""
        try:
            yield
        except InterruptedError:
            raise
        except Exception as error:  # each protocol has errors of its own
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            if isinstance(error, FileNotFoundError) and "NoSuchBucket" not in str(error):
                reason = "it does not exist"
            else:
                reason = _reason(error)
            remedy = "check `shards` in the configuration, the credentials and the network, and run again"
            if self.address.startswith("s3:") and not any(os.environ.get(name) for name in KEYS):
                remedy = f"export {KEYS[0]} and AWS_SECRET_ACCESS_KEY ({KEYS[1]}=true for a public bucket), or {remedy}"
            raise ValueError(f"{self.address}/{name} cannot be {what} ({reason}): {remedy}") from None


def address() -> str | None:
    """Return the address of all shards, None if they are local; `ValueError` if it contains a password."""
    text = os.environ.get(ADDRESS)
    if not text:
        return None
    check_address(text, ADDRESS)
    return text.rstrip("/")


def cache_folder() -> Path:
    """Return the folder of the local copies."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "ssl-core", "shards")
    folder = Path(os.environ.get(CACHE) or default)
    try:
        return folder.expanduser()
    except RuntimeError:
        raise ValueError(f"{folder}: the home folder is unknown: set {CACHE} to a folder on a local disk") from None


# Sharding


def fetch_manifest(card: Path, output: Path) -> bool:
    """Write the manifest of the shards at the address, if they were made from this card; return whether they were.

    Where this folder has shards of its own, they decide. Raises `ValueError` before hours of sharding if nothing can be
    written to the address.
    """
    dataset = load_card(card).name
    place = _place(dataset)
    content, origin = place.read("manifest.json"), place.read("card.json")
    if content is not None and not any(output.glob("*.tar")):
        if origin == _card_content(card):
            with atomic(output / "manifest.json") as temporary:
                temporary.write_bytes(content)
                _check_manifest(temporary, dataset, place)
            print(f"{place.address} has the shards of this card (remove manifest.json there to shard again)")
            return True
        print(f"{place.address} has shards of another card: sharding again", file=sys.stderr)
    place.write(".writable", b"")
    with suppress(Exception):  # where nothing may be removed, an empty file stays
        place.system.rm_file(f"{place.root}/.writable")
    return False


def _check_manifest(path: Path, dataset: str, place: Place) -> None:
    found = None
    with suppress(ValueError):
        found = Manifest.load(path).dataset
    if found != dataset:
        state = "damaged" if found is None else f"that of the data set {found!r}"
        raise ValueError(
            f"{place.address}/manifest.json is {state}: remove it to shard again, or correct `shards` in the "
            "configuration"
        )


def upload(card: Path, output: Path) -> None:
    """Upload the shards in `output`: tars and indices, then card and manifest. An interrupted upload continues."""
    manifest = Manifest.load(output / "manifest.json")
    place = _place(manifest.dataset)
    content, earlier = (output / "manifest.json").read_bytes(), place.read("manifest.json")
    if earlier != content:
        if earlier is not None:  # invalid until the upload ends
            with place.explained("manifest.json", "removed"):
                place.system.rm_file(f"{place.root}/manifest.json")
        _upload_shards([shard for split in manifest.splits.values() for shard in split.shards], output, place)
    place.write("card.json", _card_content(card))
    place.write("manifest.json", content)
    (output / UPLOADED).unlink(missing_ok=True)
    print(f"{manifest.dataset}: uploaded to {place.address}")


def _upload_shards(shards: Sequence[Shard], output: Path, place: Place) -> None:
    record = output / UPLOADED
    finished = set(record.read_text().splitlines()) if record.exists() else set()
    sizes: dict[str, int] = {}
    if finished:  # of an address that may have been emptied since
        with place.explained("", "listed"):
            objects = place.system.find(place.root, detail=True)
        sizes = {Path(name).name: described["size"] for name, described in objects.items()}

    def line(shard: Shard) -> str:
        return json.dumps([place.address, shard.file, shard.sha256])

    def send(shard: Shard, _: threading.Event) -> None:
        for name in (shard.file, _index(shard)):
            with place.explained(name, "written"):
                place.system.put_file(str(output / name), f"{place.root}/{name}")
        file.write(line(shard) + "\n")
        bar.update(shard.bytes)

    remaining = [shard for shard in shards if line(shard) not in finished or sizes.get(shard.file) != shard.bytes]
    with (
        _bytes_bar(remaining, f"uploading to {place.address}") as bar,
        open(record, "a", encoding="utf-8", buffering=1) as file,
    ):
        _in_parallel(send, remaining)


def _card_content(card: Path) -> bytes:
    return canonical(yaml.safe_load(card.read_text(encoding="utf-8"))).encode()


# Stages


@contextmanager
def local_shards(path: Path, splits: Iterable[str]) -> Iterator[Path]:
    """Yield a manifest like `path` whose shards of `splits` are on local disk, while they are in use.

    Without an address, and for shards beside the manifest, it is `path` itself.
    """
    root = address()
    manifest = Manifest.load(path) if root else None
    names = sorted(set(splits).intersection(manifest.splits)) if manifest else []
    if manifest is None or not _missing(manifest, names, path.parent):
        yield path
        return
    cached = _cached(manifest, path)
    folder = cached.parent
    with ExitStack() as stack:
        with _in_cache():
            write_bytes(cached, path.read_bytes())
            for name in names:
                stack.enter_context(locked(folder / f"{name}.lock", shared=True))
                os.utime(folder / f"{name}.lock")  # used now
        with ExitStack() as downloads:
            with _in_cache():
                for name in names:
                    downloads.enter_context(locked(folder / f"{name}.download"))
                    _remove_leftovers(folder, name)
                missing = _missing(manifest, names, folder)
                if missing:
                    _make_room(f"{path} ({', '.join(names)})")
            if missing:
                _download(missing, folder, _place(manifest.dataset), path)
        yield cached


def find_local(path: Path, splits: Iterable[str]) -> Path | None:
    """Return the manifest, or its copy in the cache, beside which all shards of these splits are; None if none has."""
    manifest = Manifest.load(path)
    names = list(splits)
    candidates = (path, _cached(manifest, path))
    return next((candidate for candidate in candidates if not _missing(manifest, names, candidate.parent)), None)


def _cached(manifest: Manifest, path: Path) -> Path:
    """Return the place of a manifest in the cache."""
    return cache_folder() / f"{manifest.dataset}-{file_digest(path)[:16]}" / path.name


def _missing(manifest: Manifest, splits: Iterable[str], folder: Path) -> list[Shard]:
    """Return the shards that are not in a folder; the sha256 of a tar was compared when it was written."""
    shards = [shard for name in splits for shard in manifest.split(name).shards]
    return [shard for shard in shards if not _is_there(shard, folder)]


def _is_there(shard: Shard, folder: Path) -> bool:
    try:
        index = (folder / _index(shard)).read_bytes()
        size = (folder / shard.file).stat().st_size
    except OSError:
        return False
    return size == shard.bytes and shard.index_sha256 in (None, digest(index))


def _download(shards: Sequence[Shard], folder: Path, place: Place, manifest: Path) -> None:
    """Bring shards into a folder, several at a time, each with two requests."""

    def fetch(shard: Shard, stop: threading.Event) -> None:
        for name, sha256 in ((_index(shard), shard.index_sha256), (shard.file, shard.sha256)):
            with atomic(folder / name) as temporary:
                temporary.touch()  # errors of this folder are not the address's
                with place.explained(name, "read"):
                    received = DEFAULT_CALLBACK if name.endswith(".idx") else _Received(bar, stop)
                    place.system.get_file(f"{place.root}/{name}", str(temporary), callback=received)
                found = file_digest(temporary)
                if sha256 not in (None, found):
                    raise ValueError(
                        f"{place.address}/{name} has the sha256 {found[:12]}..., {manifest} expects {sha256[:12]}...: "
                        f"restore it, or remove {manifest} to use the shards that are there now (trains again)"
                    )

    with _bytes_bar(shards, f"copying {place.address}") as bar:
        _in_parallel(fetch, shards)


class _Received(Callback):
    """Counts the bytes of a transfer, and ends it when the stage ends."""

    def __init__(self, bar: tqdm, stop: threading.Event) -> None:
        super().__init__()
        self._bar, self._stop = bar, stop

    def relative_update(self, inc: int = 1) -> None:
        """Count `inc` more bytes."""
        if self._stop.is_set():
            raise InterruptedError
        self._bar.update(inc)


# The cache


def _make_room(needed: str) -> None:
    """Remove the least recently used shards that no stage reads until the cache has room for those that stages need."""
    cache = cache_folder()
    with locked(cache / ".lock"):
        locks = sorted(cache.glob("*/*.lock"), key=lambda lock: lock.stat().st_mtime)
        for lock in locks:
            with suppress(BlockingIOError), locked(lock, wait=False):
                _remove_leftovers(lock.parent, lock.stem)
        stored = {lock: _stored(lock) for lock in locks}
        limit = min(_limit(), sum(map(_size, stored.values())) + shutil.disk_usage(cache).free)
        excess = sum(map(_promised, locks)) - limit
        for lock in locks:
            with suppress(BlockingIOError), locked(lock, wait=False):
                for tar in stored[lock]:
                    if excess > 0:
                        excess -= tar.stat().st_size
                        tar.unlink()
                        tar.with_suffix(".idx").unlink(missing_ok=True)
        if excess > 0:
            raise ValueError(
                f"the shards of {needed} and those of running stages need {excess / 1e9:.3g} GB more than {cache} may "
                f"have: raise {LIMIT} (GB), free the disk, or set {CACHE} to a folder on a larger one"
            )


def _limit() -> float:
    text = os.environ.get(LIMIT) or str(DEFAULT_LIMIT)
    with suppress(ValueError):
        limit = float(text)
        if limit > 0:
            return limit * 1e9
    raise ValueError(f"{LIMIT}: expected a number of GB above 0, found {text!r}")


def _remove_leftovers(folder: Path, split: str) -> None:
    """Remove the half copies of stages that were killed; no other stage may copy the split."""
    for leftover in folder.glob(f".{split}-??????.*.tmp"):
        leftover.unlink()


def _stored(lock: Path) -> list[Path]:
    """Return the tars of a lock's split."""
    return sorted(lock.parent.glob(f"{lock.stem}-??????.tar"))


def _size(tars: Iterable[Path]) -> int:
    return sum(tar.stat().st_size for tar in tars)


def _promised(lock: Path) -> int:
    """Return the bytes that a split takes or, while a stage reads it, may take."""
    try:
        with locked(lock, wait=False):
            return _size(_stored(lock))
    except BlockingIOError:
        return Manifest.load(lock.parent / "manifest.json").split(lock.stem).bytes


@contextmanager
def _in_cache() -> Iterator[None]:
    """Raise a `ValueError` that names the variable if the cache cannot be written."""
    try:
        yield
    except OSError as error:
        place = f"{cache_folder()} cannot be written ({error.strerror})"
        raise ValueError(f"{place}: set {CACHE} to a folder on a local disk") from None


# Transfers


def _place(dataset: str) -> Place:
    root = address()
    assert root is not None
    protocol, _, path = root.partition("://")
    try:
        if protocol in CLOUD and importlib.util.find_spec("obstore"):
            from ssl_core.data.object_store import check_endpoints, object_store

            check_endpoints()
            system = object_store(protocol)
        else:
            system, path = url_to_fs(root, **({"auto_mkdir": True} if protocol == "file" else {}))
    except ImportError as error:  # fsspec's message names the package
        remedy = "install the extra: pip install 'ssl-core[s3]'" if protocol in CLOUD else "install it"
        raise ValueError(f"{root} needs another package ({excerpt(error)}): {remedy}") from None
    except Exception as error:  # each protocol has errors of its own
        raise ValueError(f"{root} cannot be used ({_reason(error)}): correct `shards` in the configuration") from None
    return Place(f"{root}/{dataset}", system, f"{path.rstrip('/')}/{dataset}")


def _in_parallel(transfer: Callable[[Shard, threading.Event], None], shards: Sequence[Shard]) -> None:
    """Transfer the shards, several at a time; the first error or Ctrl-C ends the other transfers.

    Those that wait for a silent server end with the process: a client in C cannot be interrupted.
    """
    stop = threading.Event()
    waiting: queue.SimpleQueue[Shard] = queue.SimpleQueue()
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    for shard in shards:
        waiting.put(shard)

    def work() -> None:
        with suppress(queue.Empty):
            while not stop.is_set():
                shard = waiting.get_nowait()
                try:
                    transfer(shard, stop)
                    ended.put(None)
                except BaseException as error:
                    ended.put(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in shards[:PARALLEL]]
    for thread in threads:
        thread.start()
    try:
        for _ in shards:
            error = ended.get()
            if error is not None:
                raise error
    finally:
        stop.set()
        end = time.monotonic() + PATIENCE
        for thread in threads:
            thread.join(max(0, end - time.monotonic()))


def _bytes_bar(shards: Sequence[Shard], task: str) -> tqdm:
    bar = progress_bar(sum(shard.bytes for shard in shards), task, unit="bytes")
    bar.unit_scale = True  # 12.3M
    return bar


def _reason(error: Exception) -> str:
    """Return S3's code of an error, or the first line of its message without the server's answer."""
    code = XML_CODE.search(str(error))
    if code is not None:
        return code[1]
    if isinstance(error, ValueError):
        return excerpt(error)
    first = str(error).partition("\n")[0].partition("<?xml")[0]
    return excerpt(f"{type(error).__name__}: {first.rpartition(' - ')[2]}")


def _index(shard: Shard) -> str:
    return Path(shard.file).with_suffix(".idx").name
