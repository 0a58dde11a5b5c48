"""Published weights are fetched once into the cache, resumed, and never believed unchecked."""

import hashlib
import io
import urllib.error
import urllib.request

import pytest

from mmrjax import methods, weights
from mmrjax.runs import pretrained
from mmrjax.weights import source

CONTENT = b"weights" * 1000
URL = "https://example.org/models/net-1234.npz"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The place of the published file in an empty cache."""
    monkeypatch.setenv("MMRJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/weights/net-1234.npz"


@pytest.fixture
def online(monkeypatch):
    """Serves bytes from the asked offset on; returns the list of what was asked for."""

    def start(content: bytes, fail_after: int | None = None, length: int | None = None) -> list:
        asked = []

        class Response(io.BytesIO):
            status = 206
            headers = {} if length is None else {"Content-Length": str(length)}

            def read(self, size=-1):
                if fail_after is not None and self.tell() >= fail_after:
                    raise ConnectionResetError("Connection reset by peer")
                return super().read(size if fail_after is None else fail_after)

        def urlopen(request, timeout):
            asked.append((request.full_url, request.headers.get("Range")))
            offset = int((asked[-1][1] or "bytes=0-")[6:-1])
            return Response(content[offset:])

        monkeypatch.setattr(urllib.request, "urlopen", urlopen)
        return asked

    return start


def find(content: bytes = CONTENT, known: bool = True):
    prefix = hashlib.sha256(content).hexdigest()[:8] if known else ""
    return lambda: source.published_file(source.Published(URL, prefix, "none"))


@pytest.mark.parametrize("known", [True, False])
def test_file_is_fetched_once_into_the_cache(cache, online, known):
    asked = online(CONTENT)
    pretrained.found(find(known=known))
    pretrained.found(find(known=known))
    assert cache.read_bytes() == CONTENT
    assert asked == [(URL, None)]
    assert [*cache.parent.iterdir()] == [cache]


def test_offline_message_has_the_url_the_place_the_reason_and_the_way_without(cache, monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    entry = source.Published(URL, "", "none")
    monkeypatch.setitem(source.IMAGENET, "resnet18", entry)
    with pytest.raises(FileNotFoundError) as caught:
        pretrained.found(lambda: weights.teacher_file("resnet18", "imagenet"))
    message = str(caught.value)
    assert message.startswith(f"net-1234.npz is not in the cache and {URL} cannot be downloaded: ")
    assert "Name or service not known" in message
    assert f"put it at {cache}{weights.WITHOUT_DOWNLOAD}" in message
    assert not [*cache.parent.iterdir()]


def test_wrong_hash_is_refused_and_the_file_left_for_inspection(cache, online):
    online(b"something else")
    with pytest.raises(ValueError, match=r"has sha256 .*, its publisher says"):
        pretrained.found(find())
    assert cache.read_bytes() == b"something else"


def test_lost_connection_is_continued_by_the_next_call(cache, online):
    online(CONTENT, fail_after=3000)
    with pytest.raises(FileNotFoundError, match=r"net-1234\.npz is not in .*reset by peer"):
        pretrained.found(find())
    assert not cache.exists()
    asked = online(CONTENT)
    pretrained.found(find())
    assert asked == [(URL, "bytes=3000-")]
    assert cache.read_bytes() == CONTENT


def test_answer_shorter_than_announced_does_not_enter_the_cache(cache, online):
    online(CONTENT[:3000], length=len(CONTENT))
    with pytest.raises(FileNotFoundError, match="after 3000 of 7000 bytes"):
        pretrained.found(find(known=False))
    assert not cache.exists()


@pytest.mark.parametrize("name", methods.METHODS)
def test_methods_list_the_published_files_that_they_read(name, cache, tiny_config, monkeypatch):
    entry = source.Published(URL, "", "none")
    monkeypatch.setitem(source.IMAGENET, "resnet18", entry)
    config = tiny_config.copy_and_resolve_references()
    config.teacher.weights = "imagenet"
    method = methods.create(name, config)

    def absent(reads) -> set[str]:
        missed = set()
        for read in reads:
            try:
                read()
            except source.NotCached as e:
                missed.add(e.url)
        return missed

    assert absent([method.load_frozen]) <= absent(method.weights_needed(config).values())
