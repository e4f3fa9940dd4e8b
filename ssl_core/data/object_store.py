"""fsspec's interface to S3, Google Cloud Storage and Azure by the optional package `obstore`. Torch-free."""

import os
from datetime import timedelta
from functools import cache
from typing import Any

from fsspec.callbacks import DEFAULT_CALLBACK, Callback
from obstore.fsspec import FsspecStore

PROTOCOLS = ("s3", "gs", "az")
# A server that does not answer ends a stage within a minute; a slow one may take as long as it sends something.
RETRIES = {"max_retries": 5, "retry_timeout": timedelta(minutes=1)}
CLIENT = {"timeout": timedelta(days=1), "read_timeout": timedelta(seconds=30)}


class ObjectStore(FsspecStore):
    """Reads objects into files in constant memory; obstore's own class holds a whole object in memory."""

    async def _get_file(self, rpath: str, lpath: str, callback: Callback = DEFAULT_CALLBACK, **_: Any) -> None:
        bucket, key = self._split_path(rpath)
        answer = await self._construct_store(bucket).get_async(key)
        with open(lpath, "wb") as file:
            async for chunk in answer.stream(min_chunk_size=1 << 20):
                file.write(chunk)
                callback.relative_update(len(chunk))


@cache
def object_store(protocol: str) -> ObjectStore:
    """Return the file system of a protocol; obstore reads credentials and endpoint from the environment."""
    # A server of one's own may have no certificate.
    allow_http = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
    options: Any = {"client_options": {**CLIENT, "allow_http": allow_http}, "retry_config": RETRIES}
    return ObjectStore(protocol, **options | {"skip_instance_cache": True})
