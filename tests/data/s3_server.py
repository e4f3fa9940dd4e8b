"""A real S3 server for tests: moto, in a process and an environment of its own, which tests/data/moto.lock pins."""

import os
import re
import socket
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ssl_core.provenance import file_digest
from tests.waiting import wait_until

LOCK = Path(__file__).with_name("moto.lock")
REQUEST = re.compile(r'"(?:\x1b\[\d+m)*([A-Z]+) (\S+) HTTP')  # a line of the server's log
ADMINISTRATOR = "AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/iam/aws4_request, SignedHeaders=host, Signature=0"


def environment() -> Path:
    """Return the Python of an environment with moto; made once in the user's cache, from the package index."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "ssl-core")
    folder = cache / f"moto-{sys.version_info.minor}-{file_digest(LOCK)[:12]}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=cache), "environment")
        # `python -m uv` would install into this environment without --python.
        install = ["pip", "sync", "--quiet", "--require-hashes", "--python", str(new / "bin" / "python"), str(LOCK)]
        for arguments in (["venv", "--quiet", "--python", sys.executable, str(new)], install):
            made = subprocess.run([sys.executable, "-m", "uv", *arguments], capture_output=True, text=True)
            if made.returncode:
                pytest.skip(f"no package index to install moto from: {made.stderr.strip()[-200:]}")
        try:
            new.rename(folder)
        except OSError:  # made by another test run meanwhile
            assert folder.is_dir()
    return folder / "bin" / "python"


class Server:
    """A running server."""

    def __init__(self, port: int, log: Path) -> None:
        self.endpoint = f"http://127.0.0.1:{port}"
        self._log = log
        self._start = 0

    def call(self, method: str, path: str, content: bytes = b"") -> str:
        """Send a request without credentials."""
        headers = {"Content-Type": "application/octet-stream"}
        request = urllib.request.Request(f"{self.endpoint}{path}", content, headers, method=method)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read().decode()

    def reset(self) -> None:
        """Forget all buckets, users and requests."""
        self.require_keys(False)
        self.call("POST", "/moto-api/reset")
        self._start = self._log.stat().st_size

    def require_keys(self, required: bool) -> None:
        """Let the server compare signatures and rights, as real ones do."""
        self.call("POST", "/moto-api/reset-auth", b"0" if required else b"inf")

    def add_user(self, name: str, *actions: str) -> dict[str, str]:
        """Add a user with the right to these actions; return the variables with its key."""
        policy = '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": [%s], "Resource": "*"}]}'
        policy %= ", ".join(f'"{action}"' for action in actions)
        self._iam(Action="CreateUser", UserName=name)
        self._iam(Action="PutUserPolicy", UserName=name, PolicyName="p", PolicyDocument=policy)
        answer = self._iam(Action="CreateAccessKey", UserName=name)
        key, secret = (re.search(f"<{tag}>(.*?)</{tag}>", answer) for tag in ("AccessKeyId", "SecretAccessKey"))
        assert key is not None
        assert secret is not None
        return {"AWS_ACCESS_KEY_ID": key[1], "AWS_SECRET_ACCESS_KEY": secret[1]}

    def requests(self) -> list[str]:
        """Return method and path of all requests since the last call of `reset` or `requests`."""
        text = self._log.read_bytes()[self._start :]
        self._start += len(text)
        return [f"{method} {urllib.parse.unquote(path)}" for method, path in REQUEST.findall(text.decode())]

    def _iam(self, **parameters: str) -> str:
        content = urllib.parse.urlencode({**parameters, "Version": "2010-05-08"}).encode()
        request = urllib.request.Request(self.endpoint, content, {"Authorization": ADMINISTRATOR})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read().decode()


@contextmanager
def running_server(folder: Path) -> Iterator[Server]:
    """Start a server that ends with the block; its log is in `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "server.log"
    command = [environment(), "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
    with open(log, "wb") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            wait_until(lambda: b"Running on" in log.read_bytes(), seconds=60)
            yield Server(port, log)
        finally:
            process.kill()
