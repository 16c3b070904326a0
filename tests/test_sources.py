import base64
import functools
import hashlib
import http.server
import io
import json
import os
import pathlib
import re
import sys
import threading
import urllib.parse
import urllib.request
from multiprocessing.pool import ThreadPool

import filelock
import huggingface_hub
import pytest
from huggingface_hub import errors

from keras_vit.weights import sources
from keras_vit.weights.sources import (
    GOOGLE_CHECKPOINTS,
    checkpoint_facts,
    download,
    local_path,
)

CONTENT = bytes(range(256)) * 41 + b"the end"  # 10,503 bytes, no two neighbours alike


def md5_base64(content):
    return base64.b64encode(hashlib.md5(content).digest()).decode()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.files`, with ranges, and remembers each request's path and range."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.requests.append((self.path, self.headers.get("Range")))
        if self.path not in self.server.files:
            return self.send_error(404)
        content, etag = self.server.files[self.path]
        start = self.first_byte(etag)
        if start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if self.server.length:
            self.send_header("Content-Length", len(content) - start)
        if etag:
            self.send_header("ETag", etag)
        for value in self.server.hashes:
            self.send_header("x-goog-hash", value)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content[start : self.server.cut])

    def first_byte(self, etag):
        asked = self.headers.get("Range")
        if not (asked and self.server.ranges and self.headers.get("If-Range", etag) == etag):
            return 0
        return int(re.fullmatch(r"bytes=(\d+)-", asked)[1])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of one file, and an empty cache in `tmp_path / "cache"`."""
    monkeypatch.setenv("KERAS_VIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.root = f"http://127.0.0.1:{server.server_port}"
    server.url = f"{server.root}/models/ViT-B_16.npz"
    server.files = {"/models/ViT-B_16.npz": (CONTENT, '"one"')}
    server.requests, server.hashes = [], []
    server.ranges, server.length, server.cut = True, True, None
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def cached(tmp_path):
    """The names in the cache that are not locks."""
    names = [path.name for path in (tmp_path / "cache").iterdir()]
    return sorted(name for name in names if not name.endswith(".lock"))


# Local files.


def test_local_paths_come_back(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.npz").write_bytes(b"x")
    assert local_path(tmp_path / "a.npz") == tmp_path / "a.npz"
    assert local_path(str(tmp_path)) == tmp_path
    assert local_path("~/a.npz") == tmp_path / "a.npz"
    assert local_path(pathlib.Path("~/a.npz")) == tmp_path / "a.npz"


@pytest.mark.parametrize("path", ["missing/a.npz", "", pathlib.Path("b.npz")])
def test_missing_local_paths_are_named(path):
    with pytest.raises(ValueError, match=rf"no such file or folder.*path='{path}'"):
        local_path(path)


def test_addresses_of_the_hubs_pages():
    path = "https://huggingface.co/google/vit-base-patch16-224/blob/main/model.safetensors"
    with pytest.raises(ValueError, match=rf"hf://owner/name.*path='{path}'"):
        local_path(path)


@pytest.mark.parametrize("path", ["gs://vit_models/a.npz", "http://a.b/c.npz", "HF://a/b"])
def test_other_schemes_are_refused(path):
    with pytest.raises(ValueError, match=rf"https://storage.googleapis.com/.*path='{path}'"):
        local_path(path)


def test_other_types_are_refused():
    with pytest.raises(TypeError, match=r"must be a string or a path.*path=3\."):
        local_path(3)


# Downloads.


def test_download_keeps_the_file(server, tmp_path):
    path = download(server.url)
    assert path.parent == tmp_path / "cache"
    assert path.name.endswith("-ViT-B_16.npz")
    assert path.read_bytes() == CONTENT
    assert cached(tmp_path) == [path.name]
    server.files.clear()
    assert download(server.url) == path  # without asking
    assert server.requests == [("/models/ViT-B_16.npz", None)]


def test_addresses_of_any_letters(server):
    server.files["/models/mod%C3%A8le%20a.npz"] = (CONTENT, None)
    for name in ("modèle a.npz", "mod%C3%A8le%20a.npz"):
        path = download(f"{server.root}/models/{name}")
        assert path.read_bytes() == CONTENT
        assert path.suffix == ".npz"


def test_https_addresses_are_downloaded(monkeypatch):
    monkeypatch.setattr(sources, "download", lambda url: ("downloaded", url))
    assert local_path("https://a.b/c.npz") == ("downloaded", "https://a.b/c.npz")


def test_the_default_cache_is_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in (None, ""):
        monkeypatch.delenv("KERAS_VIT_CACHE", raising=False)
        if value is not None:
            monkeypatch.setenv("KERAS_VIT_CACHE", value)
        assert sources._cache_folder() == tmp_path / ".cache" / "keras-vit"


@pytest.mark.parametrize("cache", ["file/cache", "~no-such-user/cache"])
def test_a_cache_that_cannot_be_made_is_said(cache, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_VIT_CACHE", cache)
    message = rf"set KERAS_VIT_CACHE to a folder that can be written\. Received: '{cache}', with "
    with pytest.raises(ValueError, match=message):
        download("http://localhost/a.npz")


def test_a_cache_that_cannot_be_written_is_said(server, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(ValueError, match=r"set KERAS_VIT_CACHE to a folder.*, which is read-only"):
        download("http://localhost/a.npz")


def test_urls_that_end_alike_have_files_of_their_own(server):
    server.files["/other/ViT-B_16.npz"] = (b"other", None)
    server.files["/models/ViT-B_16.npz?version=2"] = (b"second", None)
    first, other = download(server.url), download(f"{server.root}/other/ViT-B_16.npz")
    second = download(server.url + "?version=2")
    assert [path.read_bytes() for path in (first, other, second)] == [CONTENT, b"other", b"second"]


def test_file_names_are_safe_and_keep_their_suffix():
    name = sources._cache_name("https://a.b/c/" + "x" * 300 + "%2F..\\é:*?a=1/../b.npz#c")
    assert re.fullmatch(r"[A-Za-z0-9_.+-]{1,200}", name)
    long = sources._cache_name("https://a.b/" + "é" * 300 + "..:*.npz")
    assert re.fullmatch(r"[A-Za-z0-9_.+-]{100,200}\.npz", long)


@pytest.mark.parametrize(
    ("etag", "then"),
    [('"one"', "continues there"), ('W/"one"', "starts over"), ("", "starts over")],
)
def test_a_cut_connection_is_said_and_mended(server, tmp_path, etag, then):
    server.files["/models/ViT-B_16.npz"] = (CONTENT, etag)
    server.cut = 4000
    with pytest.raises(ValueError, match=rf"cut after 4000 of 10503 bytes.*{then}.*ViT-B_16"):
        download(server.url)
    assert [name for name in cached(tmp_path) if name.endswith(".npz")] == []
    server.cut = None
    assert download(server.url).read_bytes() == CONTENT
    expected = "bytes=4000-" if then == "continues there" else None
    assert [asked for _, asked in server.requests] == [None, expected]
    assert len(cached(tmp_path)) == 1


def test_a_connection_can_be_cut_twice(server):
    for server.cut in (4000, 7000):
        with pytest.raises(ValueError, match=f"cut after {server.cut} of 10503 bytes"):
            download(server.url)
    server.cut = None
    server.hashes = [f"md5={md5_base64(CONTENT)}"]
    assert download(server.url).read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == [None, "bytes=4000-", "bytes=7000-"]


def leave_part(server, content, etag='"one"'):
    """Leaves what an interrupted download leaves: the first bytes and the ETag of their file."""
    path = sources._cache_folder() / sources._cache_name(server.url)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(path.name + ".part").write_bytes(content)
    if etag:
        path.with_name(path.name + ".etag").write_text(etag)


@pytest.mark.parametrize(
    ("part", "etag", "ranges", "asked"),
    [
        (CONTENT[:4000], '"one"', False, ["bytes=4000-"]),  # a server that ignores Range
        (b"?" * 4000, '"old"', True, ["bytes=4000-"]),  # a file that has changed since
        (b"?" * 4000, None, True, [None]),  # a file of which no version is known
        (b"", '"one"', True, [None]),
        (CONTENT, '"one"', True, ["bytes=10503-", None]),  # stopped before the move
        (CONTENT * 2, '"one"', True, ["bytes=21006-", None]),
    ],
)
def test_what_cannot_be_continued_starts_over(server, tmp_path, part, etag, ranges, asked):
    leave_part(server, part, etag)
    server.ranges = ranges
    path = download(server.url)
    assert path.read_bytes() == CONTENT
    assert [request[1] for request in server.requests] == asked
    assert cached(tmp_path) == [path.name]


def test_another_range_than_asked_starts_over(server, monkeypatch):
    leave_part(server, CONTENT[:4000])
    monkeypatch.setattr(Handler, "first_byte", lambda self, etag: 3000 * ("Range" in self.headers))
    assert download(server.url).read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == ["bytes=4000-", None]


@pytest.mark.parametrize("lines", [1, 2])
def test_googles_md5_is_checked(server, tmp_path, lines):
    def announce(md5):
        hashes = ["crc32c=n03x6A==", f"md5={md5}"]
        server.hashes = hashes if lines == 2 else [",".join(hashes)]

    announce(md5_base64(b"other"))
    with pytest.raises(ValueError, match=re.escape(f"must be {md5_base64(b'other')}. Received: ")):
        download(server.url)
    assert cached(tmp_path) == []
    announce(md5_base64(CONTENT))
    assert download(server.url).read_bytes() == CONTENT


def test_a_damaged_part_is_found_by_the_md5(server):
    leave_part(server, b"?" * 4000)
    server.hashes = [f"md5={md5_base64(CONTENT)}"]
    with pytest.raises(ValueError, match="came damaged and was removed"):
        download(server.url)
    assert download(server.url).read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == ["bytes=4000-", None]


def test_http_errors_are_said(server, tmp_path):
    with pytest.raises(ValueError, match=r"answered 404 Not Found.*url='http.*missing.npz'"):
        download(f"{server.root}/missing.npz")
    assert cached(tmp_path) == []


def test_a_range_error_that_was_not_asked_for_is_said(server):
    server.files["/models/ViT-B_16.npz"] = (b"", None)
    with pytest.raises(ValueError, match="answered 416"):
        download(server.url)


def test_a_server_that_cannot_be_reached_is_said(server):
    server.shutdown()
    server.server_close()
    with pytest.raises(ValueError, match=r"cannot be reached: .*refused.*pass its path.*ViT-B_16"):
        download(server.url)


def test_a_file_of_unknown_length_is_refused(server):
    server.length = False
    with pytest.raises(ValueError, match=r"does not say how long.*Content-Length.*ViT-B_16"):
        download(server.url)


def test_https_does_not_lead_to_http(monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_VIT_CACHE", str(tmp_path))
    response = urllib.request.addinfourl(io.BytesIO(b"x"), {}, "http://c.d/e.npz", 200)
    monkeypatch.setattr(urllib.request, "urlopen", lambda request, timeout: response)
    with pytest.raises(ValueError, match=r"not https://.*'https://a.b/c.npz'.*'http://c.d/e.npz'"):
        local_path("https://a.b/c.npz")


def test_downloads_at_once_ask_once(server, monkeypatch, capsys):
    waited, gate = threading.Semaphore(0), threading.Event()
    answer, acquire = Handler.first_byte, filelock.FileLock.acquire

    def count_waits(lock, timeout=None, **kwargs):
        if timeout is None:
            waited.release()
        return acquire(lock, timeout, **kwargs)

    monkeypatch.setattr(filelock.FileLock, "acquire", count_waits)
    monkeypatch.setattr(Handler, "first_byte", lambda *args: gate.wait(20) and answer(*args))
    with ThreadPool(3) as pool:
        paths = pool.map_async(download, [server.url] * 3)
        assert waited.acquire(timeout=20)  # two wait while the third is at the gate
        assert waited.acquire(timeout=20)
        gate.set()
        assert [path.read_bytes() for path in paths.get(timeout=20)] == [CONTENT] * 3
    assert len(server.requests) == 1
    assert capsys.readouterr().err.count("waiting for it") == 2


# The Hugging Face hub.


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """`server` as a hub: `hub.repositories` has the files of each, `hub.refuse` an error code."""
    download_here = functools.partial(
        huggingface_hub.snapshot_download, endpoint=server.root, cache_dir=tmp_path / "hub"
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download_here)
    monkeypatch.setattr(server, "RequestHandlerClass", HubHandler)
    server.repositories, server.refuse = {}, None
    return server


COMMITS = {"main": "a" * 40, "v2": "b" * 40}


class HubHandler(Handler):
    """What `snapshot_download` asks: a repository, its tree, and the head and body of files.

    Source: huggingface_hub, hf_api.py (`repo_info`, `list_repo_tree`) and file_download.py.
    """

    protocol_version = "HTTP/1.0"  # no connection outlives the server

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urllib.parse.unquote(self.path.partition("?")[0])
        if match := re.fullmatch(r"/api/models/(\w+/[\w-]+)/(revision|tree)/(\w+)", path):
            return self.describe(*match.groups())
        match = re.fullmatch(r"/(\w+/[\w-]+)/resolve/(\w+)/(.+)", path)
        if self.server.refuse:
            return self.reply(b"", 403, {"X-Error-Code": self.server.refuse})
        content = self.server.repositories[match[1]][match[3]]
        if self.command == "GET":
            self.server.requests.append(match[3])
        etag = hashlib.sha256(content).hexdigest()
        self.reply(content, headers={"X-Repo-Commit": match[2], "ETag": f'"{etag}"'})

    def describe(self, repository, what, revision):
        if repository not in self.server.repositories:
            return self.reply(b"", 404, {"X-Error-Code": "RepoNotFound"})
        if what == "revision" and revision not in COMMITS:
            return self.reply(b"", 404, {"X-Error-Code": "RevisionNotFound"})
        answer = {"id": repository, "sha": COMMITS.get(revision), "siblings": []}
        if what == "tree":
            files = self.server.repositories[repository]
            answer = [
                {"type": "file", "path": name, "size": len(files[name]), "oid": name}
                for name in files
            ]
        self.reply(json.dumps(answer).encode())

    def reply(self, content, status=200, headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", len(content))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def listing(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))


ABOUT = {"config.json": b"{}", "preprocessor_config.json": b"[]", "pytorch_model.bin": b"pickle"}


@pytest.mark.parametrize(
    ("weights", "others"),
    [
        (["model.safetensors"], ["model.npz", "model.fp16.safetensors", "sub/model.safetensors"]),
        (
            [
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.safetensors.index.json",
            ],
            ["tf_model.h5"],
        ),
        (["ViT-B_16.npz"], ["flax_model.msgpack", "sub/b.npz"]),
    ],
)
def test_a_repository_gives_its_configuration_and_weights(hub, weights, others):
    files = {name: name.encode() for name in [*weights, *others]}
    hub.repositories["owner/name"] = ABOUT | files
    folder = local_path("hf://owner/name")
    expected = sorted(["config.json", "preprocessor_config.json", *weights])
    assert listing(folder) == sorted(hub.requests) == expected
    assert (folder / weights[0]).read_bytes() == weights[0].encode()


def test_a_file_of_a_repository_comes_with_the_configuration_beside_it(hub):
    hub.repositories["owner/name"] = {
        "sub/a[1].safetensors": b"weights",
        "sub/a1.safetensors": b"other",
        "sub/config.json": b"{}",
        "config.json": b"other",
    }
    path = local_path("hf://owner/name/sub/a[1].safetensors")
    assert path.read_bytes() == b"weights"
    assert listing(path.parent) == ["a[1].safetensors", "config.json"]
    assert sorted(hub.requests) == ["sub/a[1].safetensors", "sub/config.json"]


def test_an_index_comes_with_its_shards(hub):
    shards = [f"sub/model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    files = ["sub/model.safetensors.index.json", *shards]
    others = ["sub/other-00001-of-00001.safetensors", "model-00001-of-00002.safetensors"]
    hub.repositories["owner/name"] = {name: name.encode() for name in files + others}
    path = local_path("hf://owner/name/sub/model.safetensors.index.json")
    assert path.name == "model.safetensors.index.json"
    assert sorted(hub.requests) == sorted(files)


def test_a_revision_can_be_named(hub):
    hub.repositories["owner/name"] = ABOUT | {"model.safetensors": b"weights"}
    assert local_path("hf://owner/name@v2").name == COMMITS["v2"]
    assert local_path("hf://owner/name/").name == COMMITS["main"]
    path = local_path("hf://owner/name@v2/config.json")
    assert path.parent.name == COMMITS["v2"]


@pytest.mark.parametrize("file", ["model.safetensors", "a.npz"])
def test_the_cache_serves_without_the_hub(hub, file):
    hub.repositories["owner/name"] = ABOUT | {file: b"weights"}
    folder = local_path("hf://owner/name")
    hub.shutdown()
    hub.server_close()
    assert local_path("hf://owner/name") == folder
    assert local_path(f"hf://owner/name/{file}") == folder / file
    with pytest.raises(ValueError, match=r"cannot be reached.*HF_HUB_OFFLINE.*path='hf://other/a'"):
        local_path("hf://other/a")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://owner/other", "no such repository, or it is private"),
        ("hf://owner/name@v3", "no such branch, tag or commit"),
        ("hf://owner/name/b.npz", "has no such file"),
        ("hf://owner/name", r"has no model.safetensors, .* or .npz file at its top"),
        ("hf://owner/name..git", r"cannot be the name of a repository: "),
        ("hf://name", r"must be hf://owner/name\[@revision\]\[/file\]"),
        ("hf://owner@v2/name", "must be hf://owner/name"),
        ("hf://", "must be hf://owner/name"),
    ],
)
def test_what_the_hub_does_not_have_is_said(hub, address, message):
    hub.repositories["owner/name"] = ABOUT | {"sub/a.npz": b"weights"}
    with pytest.raises(ValueError, match=rf"{message}.*Received: path='{address}'"):
        local_path(address)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("GatedRepo", "is gated: ask for access on its page"),
        ("Other", "cannot be reached or does not answer"),
    ],
)
def test_what_the_hub_refuses_is_said(hub, code, message):
    hub.repositories["owner/name"] = ABOUT
    hub.refuse = code
    with pytest.raises(ValueError, match=rf"{message}.*path='hf://owner/name'") as raised:
        local_path("hf://owner/name")
    assert isinstance(raised.value.__cause__, errors.GatedRepoError | errors.EntryNotFoundError)


def test_other_failures_of_the_hub_are_said(hub, monkeypatch):
    monkeypatch.setattr(HubHandler, "describe", lambda self, *args: self.reply(b"nonsense"))
    message = r"could not be downloaded: JSONDecodeError: .*path='hf://owner/name'"
    with pytest.raises(ValueError, match=message):
        local_path("hf://owner/name")


def test_the_hub_needs_its_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = r"pip install huggingface_hub, or \"\.\[hub\]\" in a clone.*path='hf://owner/a'"
    with pytest.raises(ValueError, match=message):
        local_path("hf://owner/a")


# Google's checkpoints.


@pytest.mark.parametrize(
    ("name", "image_size"),
    [
        ("vit_models/imagenet21k/ViT-B_16.npz", 224),
        ("vit_models/imagenet21k+imagenet2012/ViT-L_32.npz", 384),
        ("vit_models/imagenet21k+imagenet2012/ViT-B_16-224.npz", 224),
        ("vit_models/augreg/Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0.npz", 224),
        ("big_vision/vit_s16_i1k_90ep.npz", 224),
        ("big_vision/flexivit/vit_b30_i21k_300ep.npz", 240),
        ("big_vision/siglip2/siglip2_l16_512.npz", 512),
    ],
)
def test_facts_of_public_checkpoints(name, image_size):
    facts = checkpoint_facts(f"https://storage.googleapis.com/{name}")
    assert facts == {"image_size": image_size, "normalization": "minus_one_one"}


@pytest.mark.parametrize("path", ["a.npz", pathlib.Path("a.npz"), "https://a.b/ViT-B_16.npz"])
def test_there_are_no_facts_of_other_files(path):
    assert checkpoint_facts(path) == {}


def test_the_table_agrees_with_the_names():
    assert len(GOOGLE_CHECKPOINTS) == 90
    for url, facts in GOOGLE_CHECKPOINTS.items():
        sizes = re.findall(r"[_-](224|256|384|512)(?=[_.])", url)
        assert sizes in ([], [str(facts.image_size)]), url
        # Patches, or the stem and patches of a hybrid, tile the images.
        patch = re.search(r"(?:[sbl]|so400m|opt|ViT-[BSLH]_|[STBLi]_)(8|14|16|30|32)\D", url)
        assert facts.image_size % int(patch[1] if patch else 16) == 0, url


def test_the_table_cannot_be_changed():
    with pytest.raises(TypeError, match="does not support item assignment"):
        GOOGLE_CHECKPOINTS["https://a.b/c.npz"] = None


def test_a_name_of_the_hub_without_its_scheme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    match = r"no such file.* hub: hf://google/vit-base-patch16-224\. Received: path='google/"
    with pytest.raises(ValueError, match=match):
        local_path("google/vit-base-patch16-224")
