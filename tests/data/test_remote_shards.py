"""Shards on object storage, with a real S3 server: uploads, copies in the cache, faults, requests, no secrets."""

import json
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ssl_core import cli
from ssl_core.data import remote_shards, sharding
from ssl_core.data.object_store import RETRIES, ObjectStore, object_store
from ssl_core.data.remote_shards import local_shards
from ssl_core.data.shards import Manifest, verify
from tests.faults.test_full_disks import no_room_beyond
from tests.waiting import wait_until

from .s3_server import Server, running_server

KEY = {"AWS_ACCESS_KEY_ID": "AKIAANYKEY", "AWS_SECRET_ACCESS_KEY": "any-secret"}
DEMO = Path(__file__).parents[2] / "datasets" / "demo.yaml"
SPEC = {
    "dataset": {"name": "demo", "subset": {"images": 64}},
    "backbone": {"name": "resnet18", "stem": "tiny"},
    "method": {"name": "simsiam"},
    "training": {"epochs": 1, "batch_size": 32, "warmup_epochs": 0, "precision": "fp32"},
}


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demonstration in shards of 300 images and its manifest; not to be changed."""
    folder = tmp_path_factory.mktemp("local") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "IMAGES_PER_SHARD", 300)
        patch.delenv("SSL_SHARDS", raising=False)
        assert shard(folder) == 0
    return folder


@pytest.fixture
def s3(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """An empty bucket, a prefix of which is the address of all shards; an empty cache; shards of 300 images."""
    server.reset()
    server.call("PUT", "/bucket")
    for name, value in {**KEY, "AWS_ENDPOINT_URL": server.endpoint, "SSL_SHARDS": "s3://bucket/a prefix/ä"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SSL_CACHE", str(tmp_path / "my cache ü"))
    monkeypatch.setattr(sharding, "IMAGES_PER_SHARD", 300)
    object_store.cache_clear()
    server.requests()
    return server


@pytest.fixture
def manifest(s3: Server, local: Path, tmp_path: Path) -> Path:
    """The manifest of a data set whose shards are in the bucket only."""
    remote_shards.upload(DEMO, local)
    folder = tmp_path / "shards" / "demo"
    folder.mkdir(parents=True)
    s3.requests()
    return Path(shutil.copy(local / "manifest.json", folder))


def shard(folder: Path) -> int:
    return cli.main(["shard", str(DEMO), "--output", str(folder)])


def copy_all(manifest: Path) -> dict[str, bytes]:
    """Bring the shards of the training images to the cache; return the files by name, without those of locks."""
    with local_shards(manifest, ["train"]) as copied:
        verify(Manifest.load(copied), "train", deep=True)
        return files(copied.parent)


def files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.name: path.read_bytes() for path in paths if path.stat().st_size or path.suffix == ".tar"}


def training_files(local: Path) -> dict[str, bytes]:
    return {
        name: content for name, content in files(local).items() if name.startswith("train-") and "names" not in name
    }


def error(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the last line, which must be the only error and free of secrets."""
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "error" in line] == lines[-1:]
    assert not any(value in line for value in KEY.values() for line in lines)
    return lines[-1]


# Transfers


def test_shards_are_uploaded_before_their_manifest_and_each_is_copied_by_two_requests(
    s3: Server, local: Path, tmp_path: Path
) -> None:
    assert shard(tmp_path / "a" / "demo") == 0
    uploads = [request for request in s3.requests() if request.startswith("PUT")]
    assert [request.rpartition("/")[2] for request in uploads[-2:]] == ["card.json", "manifest.json"]
    assert {request.rpartition("/")[0] for request in uploads} == {"PUT /bucket/a prefix/ä/demo"}
    # Another machine without the source takes the manifest.
    assert shard(tmp_path / "b" / "demo") == 0
    assert files(tmp_path / "b") == {"manifest.json": (local / "manifest.json").read_bytes()}
    s3.requests()
    for _ in range(2):
        copied = copy_all(tmp_path / "b" / "demo" / "manifest.json")
        del copied["manifest.json"]
        assert copied == training_files(local)
    requests = Counter(request.partition(".")[0] for request in s3.requests())
    assert len(requests) == 5  # shards
    assert max(requests.values()) <= 2


def test_a_training_from_an_empty_cache_has_the_bytes_of_a_local_one(
    manifest: Path, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, path in (("remote", manifest), ("local", local / "manifest.json")):
        if name == "local":
            monkeypatch.delenv("SSL_SHARDS")
        files = ["--manifest", str(path), "--output", str(tmp_path / name), "--checkpoint", str(tmp_path / "c.pt")]
        log = ["--log", str(tmp_path / f"{name}.txt")]
        assert cli.main(["pretrain", "x", "--spec", json.dumps(SPEC), "--code", "0", *files, *log]) == 0
    for name in ("backbone.safetensors", "model.safetensors", "history.csv"):
        assert (tmp_path / "remote" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert not any(value.encode() in written for value in KEY.values())


@pytest.mark.parametrize("address", ["s3://bucket", "s3://bucket/", "s3://bucket/x//", "file://{}", "memory://m"])
def test_other_addresses(
    address: str, s3: Server, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_SHARDS", address.format(tmp_path / "elsewhere"))
    manifest = tmp_path / "demo" / "manifest.json"
    remote_shards.upload(DEMO, local)
    assert remote_shards.fetch_manifest(DEMO, manifest.parent)
    assert copy_all(manifest).items() >= training_files(local).items()


def test_an_interrupted_upload_continues(
    s3: Server, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(local, tmp_path / "demo")
    put_file = ObjectStore.put_file

    def fail(self: ObjectStore, lpath: str, rpath: str) -> None:
        if "train-000002" in rpath:
            raise ConnectionError("reset by peer")
        put_file(self, lpath, rpath)

    with monkeypatch.context() as patch:
        patch.setattr(remote_shards, "PARALLEL", 1)
        patch.setattr(ObjectStore, "put_file", fail)
        with pytest.raises(ValueError, match=r"train-000002.tar cannot be written \(ConnectionError: reset by peer\)"):
            remote_shards.upload(DEMO, folder)
    first = [request for request in s3.requests() if request.startswith("PUT")]
    remote_shards.upload(DEMO, folder)
    second = [request for request in s3.requests() if request.startswith("PUT")]
    assert len(first) > 1
    assert len(first) + len(second) == 2 * 7 + 2  # tars and indices, card and manifest
    assert not set(first) & set(second)
    assert not (folder / ".uploaded.jsonl").exists()


def test_shards_of_another_card_are_replaced(s3: Server, local: Path, tmp_path: Path) -> None:
    remote_shards.upload(DEMO, local)
    other = tmp_path / "demo.yaml"
    other.write_text(DEMO.read_text().replace("seed: 0", "seed: 1"))
    assert cli.main(["shard", str(other), "--output", str(tmp_path / "demo")]) == 0
    assert copy_all(tmp_path / "demo" / "manifest.json").items() >= training_files(tmp_path / "demo").items()


# Faults


class Relay(BaseHTTPRequestHandler):
    """Passes reads on to the server, but of a few tars only the first half."""

    endpoint = ""
    broken: Callable[[], object]  # called after the half

    def do_GET(self) -> None:
        signed = {"Authorization": self.headers["Authorization"]}
        request = urllib.request.Request(f"{self.endpoint}{self.path}", headers=signed)
        with urllib.request.urlopen(request, timeout=10) as answer:
            content = answer.read()
        self.send_response(200)
        for name in ("Content-Length", "ETag", "Last-Modified"):
            self.send_header(name, answer.headers[name])
        self.end_headers()
        is_half = "train-000003.tar" in self.path
        self.wfile.write(content[: len(content) // 2] if is_half else content)
        if is_half:
            self.broken()
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextmanager
def relay(server: Server, monkeypatch: pytest.MonkeyPatch, broken: Callable[[], object]) -> Iterator[None]:
    """Let the client talk to a relay that breaks the transfer of one tar in the middle, then calls `broken`."""
    handler = type("Handler", (Relay,), {"endpoint": server.endpoint, "broken": staticmethod(broken)})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as proxy, ThreadPoolExecutor(1) as pool:
        pool.submit(proxy.serve_forever, poll_interval=0.01)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
        object_store.cache_clear()
        try:
            yield
        finally:
            proxy.shutdown()
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    object_store.cache_clear()
    server.requests()


def check_resumption(s3: Server, manifest: Path, local: Path, cache: Path) -> None:
    """Check that no file is half there, and that the next stage copies the rest only."""
    whole = files(cache)
    whole_tars = {name for name in whole if name.endswith(".tar")}
    assert whole.items() <= {**training_files(local), "manifest.json": manifest.read_bytes()}.items()
    assert whole_tars
    assert copy_all(manifest).items() >= training_files(local).items()
    copied = {request.rpartition("/")[2] for request in s3.requests() if request.endswith(".tar")}
    assert copied == {name for name in training_files(local) if name.endswith(".tar")} - whole_tars


def test_a_broken_transfer_is_resumed(
    s3: Server, manifest: Path, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_shards, "PARALLEL", 1)
    with relay(s3, monkeypatch, lambda: None), pytest.raises(ValueError, match=r"train-000003.tar cannot be read \("):
        copy_all(manifest)
    check_resumption(s3, manifest, local, tmp_path / "my cache ü")


COPY = """
import sys
from pathlib import Path
from ssl_core.data import remote_shards
remote_shards.PARALLEL = 1
with remote_shards.local_shards(Path(sys.argv[1]), ["train"]):
    pass
"""


def silent(reached: Path, ended: Path) -> Callable[[], None]:
    """Return an action of the server: write one file, then be silent until the other is there."""

    def wait() -> None:
        reached.touch()
        wait_until(ended.exists)

    return wait


def test_a_killed_stage_is_resumed(
    s3: Server, manifest: Path, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, killed = tmp_path / "reached", tmp_path / "killed"
    with relay(s3, monkeypatch, silent(reached, killed)):
        with subprocess.Popen([sys.executable, "-c", COPY, str(manifest)]) as process:
            wait_until(reached.exists, seconds=60)
            process.kill()
        killed.touch()
    (leftover,) = (tmp_path / "my cache ü").rglob(".*.tmp")
    assert leftover.name.startswith(".train-000003.tar.")
    leftover.unlink()
    check_resumption(s3, manifest, local, tmp_path / "my cache ü")


def test_half_copies_of_killed_stages_are_removed(s3: Server, manifest: Path) -> None:
    with local_shards(manifest, ["train"]) as copied:
        pass
    half = copied.with_name(".train-000000.tar.1.tmp")  # in another container the process could live
    half.touch()
    with local_shards(manifest, ["test"]):
        assert not half.exists()
    half.touch()
    copied.with_name("train-000001.tar").unlink()
    with local_shards(manifest, ["train"]):
        assert not half.exists()


INTERRUPTED = """
import sys
from ssl_core import cli
from ssl_core.data import remote_shards
cli._stage = lambda options: remote_shards.local_shards(options.manifest, ["train"]).__enter__()
sys.exit(cli.main(["sample-views", "x", "--spec", "{}", "--manifest", sys.argv[1], "--output", "x.png"]))
"""


def test_ctrl_c_ends_a_stage_whose_server_is_silent(
    s3: Server, manifest: Path, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, ended = tmp_path / "reached", tmp_path / "ended"
    with relay(s3, monkeypatch, silent(reached, ended)):
        with subprocess.Popen([sys.executable, "-c", INTERRUPTED, str(manifest)]) as process:
            wait_until(reached.exists, seconds=60)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=remote_shards.PATIENCE + 10) == 130  # the client itself waits for 30 s
        ended.touch()
    assert copy_all(manifest).items() >= training_files(local).items()


Fault = Callable[[Server, pytest.MonkeyPatch], None]


def change_object(s3: Server, patch: pytest.MonkeyPatch) -> None:
    object_store("s3").pipe_file("bucket/a prefix/ä/demo/train-000001.tar", b"other")


def remove_object(s3: Server, patch: pytest.MonkeyPatch) -> None:
    object_store("s3").rm_file("bucket/a prefix/ä/demo/train-000001.idx")


def use_wrong_key(s3: Server, patch: pytest.MonkeyPatch) -> None:
    s3.require_keys(True)


def use_wrong_secret(s3: Server, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("AWS_ACCESS_KEY_ID", s3.add_user("reader", "s3:GetObject")["AWS_ACCESS_KEY_ID"])
    s3.require_keys(True)


def remove_key(s3: Server, patch: pytest.MonkeyPatch) -> None:
    """Leave only the address of a machine's role, at which nobody listens."""
    for name in KEY:
        patch.delenv(name)
    patch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    patch.setitem(RETRIES, "max_retries", 1)


def stop_server(s3: Server, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    patch.setitem(RETRIES, "max_retries", 1)


def set_variable(name: str, value: str) -> Fault:
    return lambda s3, patch: patch.setenv(name, value)


NO_FILE, BUCKET = "cannot be read (it does not exist)", "cannot be read (NoSuchBucket)"
NO_SERVER = "cannot be read (GenericError: HTTP error: error sending request)"
ADDRESS, LIMIT, ENDPOINT = "SSL_SHARDS", "SSL_CACHE_GB", "AWS_ENDPOINT_URL"
FAULTS = {
    "changed": (change_object, "train-000001.tar has the sha256 ", "restore it, or remove"),
    "removed": (remove_object, f"train-000001.idx {NO_FILE}", "check `shards`"),
    "prefix": (set_variable(ADDRESS, "s3://bucket/b"), NO_FILE, "check `shards`"),
    "bucket": (set_variable(ADDRESS, "s3://bucked/b"), BUCKET, "check `shards`"),
    "protocol": (set_variable(ADDRESS, "xyz://b"), "xyz://b cannot be used (Protocol not known: xyz)", "correct"),
    "key": (use_wrong_key, "cannot be read (InvalidAccessKeyId)", "credentials"),
    "secret": (use_wrong_secret, "cannot be read (SignatureDoesNotMatch)", "credentials"),
    "server": (stop_server, NO_SERVER, "network"),
    "password": (set_variable(ADDRESS, "s3://a:any-secret@b/x"), "SSL_SHARDS: the address contains '@'", "export"),
    "limit": (set_variable(LIMIT, "0.001"), "need 0.00244 GB more than", "raise SSL_CACHE_GB"),
    "no number": (set_variable(LIMIT, "much"), "SSL_CACHE_GB: expected a number of GB", "'much'"),
    "negative": (set_variable(LIMIT, "-1"), "SSL_CACHE_GB: expected a number of GB above 0", "'-1'"),
    "nan": (set_variable(LIMIT, "nan"), "SSL_CACHE_GB: expected a number of GB above 0", "'nan'"),
    "blank": (set_variable(ADDRESS, "s3://buc ket/x"), "cannot be read (invalid domain character)", "check `shards`"),
    "parent": (set_variable(ADDRESS, "s3://bucket/../x"), "cannot be read (Could not parse path", "check `shards`"),
    "no bucket": (set_variable(ADDRESS, "s3:///x"), "expected an address such as s3://bucket/prefix", "'s3:///x'"),
    "line feed": (set_variable(ADDRESS, "s3://bucket/x\n"), "expected an address such as s3://bucket/prefix", r"x\n"),
    "no scheme": (set_variable(ENDPOINT, "any-secret:9"), "AWS_ENDPOINT_URL is no address", "set it to http://host:port"),
    "no endpoint": (set_variable(ENDPOINT, ""), "AWS_ENDPOINT_URL is no address", "or unset it"),
    "no key": (remove_key, "cannot be read (", "export AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    "ftp": (set_variable(ADDRESS, "ftp://127.0.0.1:9/x"), "ftp://127.0.0.1:9/x cannot be used (", "correct"),
    "no cache": (set_variable("SSL_CACHE", "/proc/x"), "/proc/x cannot be written (", "set SSL_CACHE"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line_and_leaves_no_half_file(
    name: str,
    s3: Server,
    manifest: Path,
    local: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fault, message, remedy = FAULTS[name]
    fault(s3, monkeypatch)
    object_store.cache_clear()
    log = tmp_path / "log.txt"
    options = ["--spec", json.dumps(SPEC), "--manifest", str(manifest), "--output", str(tmp_path / "views.png")]
    assert cli.main(["sample-views", "x", *options, "--log", str(log)]) == 2
    line = error(capsys)
    assert message in line
    assert remedy in line
    assert not any(value in log.read_text() for value in KEY.values())
    assert (
        files(tmp_path / "my cache ü").items()
        <= {**training_files(local), "manifest.json": manifest.read_bytes()}.items()
    )


def test_a_full_disk_is_one_line_and_the_next_run_continues(
    s3: Server, manifest: Path, local: Path, tmp_path: Path
) -> None:
    message = r"train-00000\d\.(tar|idx) cannot be written \(File too large\): make room and run again"
    with no_room_beyond(60_000), pytest.raises(ValueError, match=message):
        copy_all(manifest)
    assert not list((tmp_path / "my cache ü").rglob("*.tar"))
    assert copy_all(manifest).items() >= training_files(local).items()


def test_sharding_without_the_right_to_write_ends_before_it_begins(
    s3: Server, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in s3.add_user("reader", "s3:GetObject", "s3:ListBucket").items():
        monkeypatch.setenv(name, value)
    s3.require_keys(True)
    object_store.cache_clear()
    assert shard(tmp_path / "demo") == 2
    assert ".writable cannot be written (AccessDenied)" in error(capsys)
    assert files(tmp_path / "demo") == {}
    s3.require_keys(False)
    remote_shards.upload(DEMO, local)
    s3.require_keys(True)
    assert shard(tmp_path / "demo") == 0  # nothing to write
    assert copy_all(tmp_path / "demo" / "manifest.json").items() >= training_files(local).items()


@pytest.mark.parametrize(
    ("content", "state"),
    [(b"", "damaged"), (b"<html>", "damaged"), (b"\xff", "damaged"), (None, "that of the data set 'other'")],
)
def test_a_wrong_manifest_at_the_address_is_not_taken(
    content: bytes | None, state: str, s3: Server, manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is None:
        other = Manifest.load(manifest).model_copy(update={"dataset": "other"})
        content = json.dumps(other.content()).encode()
    object_store("s3").pipe_file("bucket/a prefix/ä/demo/manifest.json", content)
    assert shard(tmp_path / "new" / "demo") == 2
    assert f"ä/demo/manifest.json is {state}: remove it to shard again, or correct `shards`" in error(capsys)
    assert files(tmp_path / "new") == {}


def test_a_changed_bit_in_the_cache_is_noticed_with_a_remedy(s3: Server, manifest: Path) -> None:
    with local_shards(manifest, ["train"]) as copied:
        tar = copied.with_name("train-000000.tar")
    content = bytearray(tar.read_bytes())
    content[5000] ^= 1
    tar.write_bytes(content)
    with pytest.raises(ValueError, match=f"its sha256 differs.*: remove {tar.parent} and run the workflow again"):
        copy_all(manifest)
    shutil.rmtree(tar.parent)
    copy_all(manifest)


# The cache


def test_two_stages_copy_each_shard_once(s3: Server, manifest: Path, local: Path) -> None:
    stages = [subprocess.Popen([sys.executable, "-c", COPY, str(manifest)]) for _ in range(2)]
    assert [stage.wait() for stage in stages] == [0, 0]
    assert copy_all(manifest).items() >= training_files(local).items()
    assert set(Counter(s3.requests()).values()) == {1}


def test_the_least_recently_used_shards_that_no_stage_reads_are_removed(
    s3: Server, manifest: Path, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "my cache ü"

    def stored() -> Counter[str]:
        return Counter(path.name.partition("-")[0] for path in cache.rglob("*.tar"))

    with local_shards(manifest, ["train"]):
        pass
    size = sum(len(content) for name, content in training_files(local).items() if name.endswith(".tar"))
    monkeypatch.setenv("SSL_CACHE_GB", str((size + 1000) / 1e9))
    with (
        local_shards(manifest, ["train"]),
        pytest.raises(ValueError, match="those of running stages need"),
        ExitStack() as stack,
    ):
        stack.enter_context(local_shards(manifest, ["test"]))
    assert stored() == {"train": 5}
    with local_shards(manifest, ["test"]):
        assert stored() == {"train": 3, "test": 2}
    s3.requests()
    with local_shards(manifest, ["train"]):
        assert stored() == {"train": 5}
    assert len(s3.requests()) == 2 * 2


def test_shards_beside_the_manifest_are_used(s3: Server, local: Path) -> None:
    with local_shards(local / "manifest.json", ["train"]) as path:
        assert path == local / "manifest.json"
    assert s3.requests() == []
