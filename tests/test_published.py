"""Published files are found, downloaded completely or not at all, and verified; without a network,
the error says what to do.
"""

import hashlib
import http.server
import logging
import threading
import urllib.request
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from helpers import in_threads

from t2i import cli, published
from t2i.errors import UserError
from t2i.published import PublishedFile

CONTENT = b"weights" * 1000


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where the files belong in a cache that is empty at first."""
    monkeypatch.setenv("T2I_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "things"


@pytest.fixture
def online(monkeypatch):
    """Switch off the tests' offline mode, to download from a file:// address."""
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)


@pytest.fixture
def source(tmp_path, cache):
    """A published file."""
    upload = tmp_path / "upload.bin"
    upload.write_bytes(CONTENT)
    digest = hashlib.sha256(CONTENT).hexdigest()
    names, hashes = ("found.pth", "old-name.pth"), (digest[:8], "0" * 64)
    return PublishedFile("Thing", upload.as_uri(), names, hashes, "things", "give it with --thing")


def upload_of(source: PublishedFile) -> Path:
    return Path(source.url.removeprefix("file://"))


def test_download_once_then_from_the_cache(source, cache, online):
    first = source.find()
    assert first.path == cache / "found.pth" and first.path.read_bytes() == CONTENT
    assert first.digest == hashlib.sha256(CONTENT).hexdigest()
    upload_of(source).unlink()
    assert source.find() == first
    first.path.rename(cache / "old-name.pth")
    assert source.find().path == cache / "old-name.pth"


def test_a_file_may_be_verified_by_another_hash_function(source, online):
    def digest(path):
        return hashlib.sha1(path.read_bytes()).hexdigest()

    known = (hashlib.sha1(CONTENT).hexdigest(),)
    assert replace(source, digest=digest, hashes=known).find().digest == known[0]
    with pytest.raises(ValueError, match="is not the published Thing"):
        replace(source, digest=digest).find()


def test_a_download_of_another_file_is_refused_and_not_kept(source, cache, online):
    upload_of(source).write_bytes(b"<html>moved</html>")
    with pytest.raises(
        ValueError, match=r"the 18 bytes downloaded from .* are not the published Thing.*--thing"
    ):
        source.find()
    assert [path.name for path in cache.iterdir() if path.suffix != ".lock"] == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, TimeoutError("slow"), None])
def test_an_interrupted_download_leaves_nothing(source, cache, online, monkeypatch, stop):
    """It may be interrupted by the user, by a network error, or end early without an error."""
    real = urllib.request.urlopen

    def urlopen(*args, **options):
        reply = real(*args, **options)
        parts = iter([CONTENT[:500]])

        def read(size):
            if (part := next(parts, None)) is None and stop is not None:
                raise stop
            return part or b""

        reply.read = read
        return reply

    with monkeypatch.context() as patch:
        patch.setattr(urllib.request, "urlopen", urlopen)
        with pytest.raises((ValueError, KeyboardInterrupt)):
            source.find()
    assert [path.name for path in cache.iterdir() if path.suffix != ".lock"] == []
    assert source.find().path.read_bytes() == CONTENT


def test_the_partial_download_of_a_killed_process_is_not_used(source, cache, online):
    cache.mkdir(parents=True)
    (cache / "found.pth.0123abcd.tmp").write_bytes(CONTENT[:500])
    assert source.find().path.read_bytes() == CONTENT


def test_only_one_of_two_processes_downloads(source, online, monkeypatch):
    fetched, real = [], published._fetch
    monkeypatch.setattr(published, "_fetch", lambda *a: fetched.append(a) or real(*a))
    found = in_threads(lambda rank: source.find())
    assert found[0] == found[1] and len(fetched) == 1


def test_without_a_network_the_error_says_what_to_copy_where(source, cache, online):
    source = replace(source, url="file:///nowhere/found.pth")
    with pytest.raises(ValueError, match="cannot be downloaded") as error:
        source.find()
    for advice in (source.url, str(cache), "--thing"):
        assert advice in str(error.value)


def test_offline_mode_tries_no_download(source, cache):
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set") as error:
        source.find()
    for advice in (source.url, str(cache), "--thing"):
        assert advice in str(error.value)


def test_a_given_folder_comes_before_the_cache(source, tmp_path, online):
    source.find()
    given = tmp_path / "given"
    given.mkdir()
    (given / "found.pth").write_bytes(CONTENT)
    assert source.find(given).path == given / "found.pth"
    assert source.given(given) == source.given(given / "found.pth") == source.find(given)


def test_wrong_files_are_refused(source, tmp_path, cache):
    path = tmp_path / "found.pth"
    with pytest.raises(ValueError, match=r"found.pth does not exist"):
        source.given(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no Thing: looked for found.pth, old-name.pth"):
        source.given(tmp_path / "empty")
    path.write_bytes(b"other")
    parts = (hashlib.sha256(b"other").hexdigest(), *source.hashes, source.url)
    cache.parent.mkdir()
    tmp_path.joinpath("empty").rename(cache)
    for find in (lambda: source.given(path), lambda: source.find(tmp_path)):
        with pytest.raises(ValueError, match=r"found.pth is not the published Thing") as error:
            find()
        assert all(part in str(error.value) for part in parts)
    path.rename(cache / "found.pth")
    with pytest.raises(ValueError, match=r"cache.*is not the published Thing.*delete it"):
        source.find()


def test_the_cache_has_a_default_folder(source, monkeypatch):
    monkeypatch.delenv("T2I_CACHE")
    assert source.cache_folder == Path.home() / ".cache" / "t2i" / "things"


# -- the hub ---------------------------------------------------------------------------------------
@pytest.fixture
def at_port(monkeypatch, online):
    """A function that moves the hub to a port of this machine and returns `hub_is_away()`."""

    def ask(port: int, **proxies: str) -> bool:
        hub = SimpleNamespace(endpoint=f"http://127.0.0.1:{port}")
        monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
        monkeypatch.setattr("urllib.request.getproxies", lambda: proxies)
        published.hub_is_away.cache_clear()
        return published.hub_is_away()

    yield ask
    published.hub_is_away.cache_clear()


def test_a_hub_that_does_not_answer_is_not_asked(at_port, monkeypatch, tmp_path):
    """Only its local cache is searched. The hub's client would retry for half a minute per file, or
    for seven minutes if the hub accepts connections and never answers.
    """
    monkeypatch.setattr(published, "_ANSWER_SECONDS", 0.2)
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        port = server.server_port
        assert at_port(port), "it accepts connections, but no thread answers yet"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(published, "_ANSWER_SECONDS", 20.0)
        assert not at_port(port)
        server.shutdown()
    assert not at_port(port, https="proxy"), "the proxy may be able to reach it"
    assert at_port(port)
    asked = []

    def snapshot_download(hub_id: str, **options) -> str:
        asked.append(options["local_files_only"])
        raise FileNotFoundError("outgoing traffic has been disabled")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "janus").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        published.fetch_folder("models/jannus", advice="Check the name")
    assert "models/jannus is neither a local folder nor a model on the hub" in str(caught.value)
    assert "(no connection to the hub, or no answer)" in str(caught.value)
    assert "perhaps you meant models/janus" in str(caught.value) and asked == [True]


def test_the_hubs_requests_are_not_logged(caplog):
    """Every download printed a line for each request."""
    client = type(huggingface_hub.get_session()).__module__.partition(".")[0]
    caplog.set_level(logging.INFO)
    cli.run(lambda: None)
    assert not logging.getLogger(client).isEnabledFor(logging.INFO)


def test_a_model_is_fetched_with_the_first_kind_of_weights_it_has(monkeypatch, tmp_path):
    """Large models are published in shards, which cannot be read without their index."""
    asked = []
    monkeypatch.setattr(
        published, "fetch_folder", lambda _, patterns, **k: asked.append(patterns) or tmp_path
    )
    wanted = ("google/flan-t5-xl", ["config.json"], ["model*.safetensors", "pytorch_model*.bin"])
    with pytest.raises(UserError, match=r"has none of model\*.safetensors, pytorch_model\*.bin"):
        published.fetch_model(*wanted, advice="")
    assert asked == [["config.json", w, f"{w}.index.json"] for w in wanted[2]]
    (tmp_path / "pytorch_model-00001-of-00002.bin").touch()
    assert published.fetch_model(*wanted, advice="") == tmp_path and len(asked) == 4
    (tmp_path / "model.safetensors").touch()
    assert published.fetch_model(*wanted, advice="") == tmp_path and len(asked) == 5
