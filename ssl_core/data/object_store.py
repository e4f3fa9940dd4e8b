"""S3, Google Cloud Storage and Azure by the optional package `obstore`. Torch-free.

obstore has a class for fsspec, which holds a whole object in memory and at times aborts the process when Python ends,
since its event loop still runs. This one has the few methods of fsspec that shards need, without an event loop.
"""

import os
import re
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import obstore
from fsspec.callbacks import Callback
from obstore.store import from_url

# A server that does not answer ends a stage within a minute; a slow one may take as long as it sends something.
RETRIES: dict[str, Any] = {"max_retries": 5, "retry_timeout": timedelta(minutes=1)}
CLIENT: dict[str, Any] = {"timeout": timedelta(days=1), "read_timeout": timedelta(seconds=30)}
CHUNK = 1 << 18  # bytes
# In the order in which obstore looks for them.
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")
ENDPOINT = re.compile(r"https?://[!-.0-~]+(/[!-~]*)?")


def check_endpoints() -> None:
    """Raise `ValueError` for a server's address at which obstore would abort; it is not printed: it may have a key."""
    for name in ENDPOINTS:
        if not ENDPOINT.fullmatch(os.environ.get(name, "http://x")):
            raise ValueError(f"{name} is no address: set it to http://host:port or https://host, or unset it")


class ObjectStore:
    """The buckets of a protocol; paths begin with the bucket. Credentials and endpoint come from the environment."""

    def __init__(self, protocol: str) -> None:
        self._protocol = protocol
        # A server of one's own may have no certificate.
        self._allow_http = any(os.environ.get(name, "").startswith("http://") for name in ENDPOINTS)
        self._bucket = cache(self._open_bucket)

    def cat_file(self, path: str) -> bytes:
        """Return the content of a small object."""
        store, key = self._locate(path)
        return bytes(obstore.get(store, key).bytes())

    def pipe_file(self, path: str, value: bytes) -> None:
        """Write a small object."""
        store, key = self._locate(path)
        obstore.put(store, key, value)

    def rm_file(self, path: str) -> None:
        """Remove an object."""
        store, key = self._locate(path)
        obstore.delete(store, key)

    def find(self, path: str, *, detail: bool) -> dict[str, dict[str, Any]]:
        """Return the objects below a path with their sizes."""
        assert detail
        store, key = self._locate(path)
        bucket = path.partition("/")[0]
        return {f"{bucket}/{entry['path']}": {**entry} for part in obstore.list(store, key) for entry in part}

    def put_file(self, lpath: str, rpath: str) -> None:
        """Write a file as an object, in parts if it is large."""
        store, key = self._locate(rpath)
        obstore.put(store, key, Path(lpath))

    def get_file(self, rpath: str, lpath: str, callback: Callback) -> None:
        """Write an object into a file, in constant memory."""
        store, key = self._locate(rpath)
        with open(lpath, "wb") as file:
            for chunk in obstore.get(store, key).stream(min_chunk_size=CHUNK):
                file.write(chunk)
                callback.relative_update(len(chunk))

    def _open_bucket(self, name: str) -> Any:
        client: Any = {**CLIENT, "allow_http": self._allow_http}
        retries: Any = RETRIES
        return from_url(f"{self._protocol}://{name}", client_options=client, retry_config=retries)

    def _locate(self, path: str) -> tuple[Any, str]:
        bucket, _, key = path.partition("/")
        return self._bucket(bucket), key


@cache
def object_store(protocol: str) -> ObjectStore:
    """Return the buckets of a protocol."""
    return ObjectStore(protocol)
