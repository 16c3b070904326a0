"""Where checkpoints come from: this machine, the Hugging Face hub, the web."""

import base64
import contextlib
import dataclasses
import glob
import hashlib
import http.client
import os
import pathlib
import posixpath
import re
import types
import urllib.error
import urllib.parse
import urllib.request

import filelock
from rich import progress
from rich.console import Console

from keras_vit.files import write_text

_FORMS = "a local file or folder, hf://owner/name[@revision][/file] or https://..."
_HUB_ADDRESS = re.compile(r"hf://(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/(?P<file>.+))?")
_HUB_CONFIGS = ("config.json", "preprocessor_config.json")
_HUB_SINGLE, _HUB_INDEX = "model.safetensors", "model.safetensors.index.json"
_HUB_SHARDS = "model-*-of-*.safetensors"

_WEIGHT_FILES = (".npz", ".safetensors", ".json")  # the last are configurations and indices

_URL_SAFE = "%/:=&?~#+!$,;'@()*[]"  # all that an address is made of, but for letters and digits
_TIMEOUT = 30  # seconds without an answer or a byte
_CHUNK = 1 << 20  # bytes
_CACHE_HINT = "Downloads are kept: set KERAS_VIT_CACHE to a folder that can be written."


def local_path(path):
    """Turns what names a checkpoint into a file or folder of this machine.

    What is downloaded is kept: files of the hub where `huggingface_hub` keeps them, the others in
    the folder of the environment variable `KERAS_VIT_CACHE`, `~/.cache/keras-vit` by default. The
    hub is asked for a newer version, a file of the web is downloaded once; what is there already
    needs no network.

    Args:
        path: One of
            - a local file or folder;
            - "hf://owner/name": the configuration and the safetensors weights of a repository of
              the Hugging Face hub, or its .npz files if it has no safetensors weights;
            - "hf://owner/name/file": that file, and the configuration beside it;
            - "hf://owner/name@revision" or "hf://owner/name@revision/file": the same at a branch,
              tag or commit, whose name has no slash;
            - "https://...": a file of the web, see `download`.

    Returns:
        The `pathlib.Path` of a file or folder that exists; a folder for "hf://owner/name".

    Raises:
        TypeError: `path` is neither a string nor a path.
        ValueError: `path` has none of these forms, does not exist, or cannot be downloaded; says
            which.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"`path` must be a string or a path: {_FORMS}. Received: path={path!r}.")
    scheme, separator, _ = str(path).partition("://")
    if not separator:
        return _existing(path)
    if scheme == "hf":
        return _from_hub(path)
    if str(path).startswith("https://huggingface.co/"):
        raise ValueError(
            "The Hugging Face hub is asked by hf://owner/name[@revision][/file], which brings the "
            f"configuration along. Received: path={path!r}."
        )
    if scheme == "https":
        return download(path)
    raise ValueError(
        f"`path` must be {_FORMS}; Google's gs://BUCKET/NAME is "
        f"https://storage.googleapis.com/BUCKET/NAME. Received: path={path!r}."
    )


def _existing(path):
    local = os.path.expanduser(path)
    if not os.path.exists(local):
        named = str(path).count("/") == 1 and pathlib.Path(path).suffix not in _WEIGHT_FILES
        hub = f" If it is a name of the Hugging Face hub: hf://{path}." if named else ""
        raise ValueError(f"There is no such file or folder.{hub} Received: path={str(path)!r}.")
    return pathlib.Path(local)


# The Hugging Face hub.


def _from_hub(address):
    match = _HUB_ADDRESS.fullmatch(address.rstrip("/"))
    if match is None:
        raise ValueError(
            "An address of the Hugging Face hub must be hf://owner/name[@revision][/file]. "
            f"Received: path={address!r}."
        )
    repo, revision, file = match.group("repo", "revision", "file")
    if file is None:
        return _hub_folder(address, repo, revision)
    beside = [posixpath.join(posixpath.dirname(file), name) for name in _HUB_CONFIGS]
    stem = file.removesuffix(".safetensors.index.json")
    shards = [] if stem == file else [f"{glob.escape(stem)}-*-of-*.safetensors"]
    path = _hub_snapshot(address, repo, revision, [file, *beside], shards) / file
    if not path.is_file():
        raise ValueError(f"The repository has no such file. Received: path={address!r}.")
    return path


def _hub_folder(address, repo, revision):
    """The repository's configuration and weights; pickled weights are never downloaded."""
    weights = [_HUB_SINGLE, _HUB_INDEX]
    folder = _hub_snapshot(address, repo, revision, [*_HUB_CONFIGS, *weights], [_HUB_SHARDS])
    if any((folder / name).is_file() for name in weights):
        return folder
    folder = _hub_snapshot(address, repo, revision, _HUB_CONFIGS, ["*.npz"], ["*/*.npz"])
    if not any(folder.glob("*.npz")):
        raise ValueError(
            f"The repository has no {_HUB_SINGLE}, {_HUB_INDEX} or .npz file at its top. If its "
            "weights are elsewhere, name the file: hf://owner/name/file. "
            f"Received: path={address!r}."
        )
    return folder


def _hub_snapshot(address, repo, revision, names, patterns=(), ignored=()):
    """Downloads the named files that the repository has; the cached ones if the hub is away."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(
            'hf:// needs huggingface_hub: pip install huggingface_hub, or ".[hub]" in a clone of '
            "keras-vit. "
            f"Received: path={address!r}."
        ) from error
    allowed = [*map(glob.escape, names), *patterns]
    try:
        folder = huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=allowed, ignore_patterns=list(ignored)
        )
    except Exception as error:  # its HTTP library's own errors differ between releases
        raise ValueError(f"{_hub_problem(error)} Received: path={address!r}.") from error
    return pathlib.Path(folder)


def _hub_problem(error):
    """Says what an error of `huggingface_hub` means and what to do."""
    from huggingface_hub import errors

    problems = (  # a gated repository is a kind of missing one
        (
            errors.GatedRepoError,
            "The repository is gated: ask for access on its page, then log in with `hf auth login` "
            "or set HF_TOKEN.",
        ),
        (
            errors.RepositoryNotFoundError,
            "The hub has no such repository, or it is private: check the name, or log in with "
            "`hf auth login` or HF_TOKEN.",
        ),
        (errors.RevisionNotFoundError, "The repository has no such branch, tag or commit."),
        (
            errors.LocalEntryNotFoundError,
            "The hub cannot be reached or does not answer, and the files are not in its cache: "
            "check the network and HF_HUB_OFFLINE, or download the files elsewhere and pass their "
            "folder.",
        ),
        (errors.HFValidationError, f"This cannot be the name of a repository: {error}"),
    )
    for kind, problem in problems:
        if isinstance(error, kind):
            return problem
    return f"The hub's files could not be downloaded: {type(error).__name__}: {error}"


# The web.


def download(url):
    """Downloads a file of the web into the cache, once.

    The bytes go to `NAME.part` and are moved to `NAME` when all have come, so that what has the
    name is whole. An interrupted download continues where it stopped if the server gives files an
    ETag and still has the same one. Google Cloud Storage sends the MD5 of its files, which is
    checked. Of several processes one downloads and the others wait.

    Args:
        url: "https://..." (or "http://...").

    Returns:
        The `pathlib.Path` of the file, with a name of its own for every URL that ends in the
        URL's.

    Raises:
        ValueError: The server cannot be reached or refuses, the connection is cut, the bytes do
            not have the MD5, or the cache cannot be written; says which and what to do.

    Source: RFC 9110, sections 13.1.5 (If-Range) and 14 (Range);
    https://cloud.google.com/storage/docs/xml-api/reference-headers#xgooghash.
    """
    folder = _cache_folder()
    path = folder / _cache_name(url)
    if not path.is_file():
        if not os.access(folder, os.W_OK):
            raise ValueError(f"{_CACHE_HINT} Received: {str(folder)!r}, which is read-only.")
        with _alone(path):
            if not path.is_file():
                _fetch(url, path)
    return path


def _cache_folder():
    """The folder of downloads, made if it is missing."""
    name = os.environ.get("KERAS_VIT_CACHE") or "~/.cache/keras-vit"
    try:
        folder = pathlib.Path(name).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        raise ValueError(f"{_CACHE_HINT} Received: {name!r}, with {error}") from error
    return folder


def _cache_name(url):
    """A safe file name: a digest, since two URLs may end alike, and the URL's last part."""
    digest = hashlib.sha256(url.encode()).hexdigest()[:12]
    last = urllib.parse.urlsplit(url).path.rpartition("/")[2]
    return f"{digest}-{re.sub(r'[^A-Za-z0-9_.+-]', '_', last[-160:])}"


@contextlib.contextmanager
def _alone(path):
    """Holds the lock of a file, which the system frees if the process dies."""
    lock = filelock.FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        Console(stderr=True).print("Another process downloads the same file: waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch(url, path):
    """Downloads, checks, and moves into place."""
    part, tag = path.with_name(path.name + ".part"), path.with_name(path.name + ".etag")
    with _open(url, part, tag) as response:
        start = part.stat().st_size if response.status == 206 else 0
        total = start + _length(response, url)
        if not start:
            _start_over(part, tag, response)
        _receive(response, part, start, total)
    size = part.stat().st_size
    if size != total:
        raise ValueError(
            f"The connection was cut after {size} of {total} bytes: run the same again, which "
            f"{'continues there' if tag.exists() else 'starts over'}. Received: url={url!r}."
        )
    _check_md5(url, part, tag, response)
    os.replace(part, path)
    tag.unlink(missing_ok=True)


def _open(url, part, tag):
    """Asks for the file; for the rest of it if `part` has its beginning and it is unchanged."""
    have = part.stat().st_size if part.exists() and tag.exists() else 0
    headers = {"User-Agent": "keras-vit"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": tag.read_text(encoding="utf-8")}
    response = _ask(url, headers)
    rest = f"bytes {have}-"
    if response.status == 416 or (
        response.status == 206 and not response.headers.get("Content-Range", "").startswith(rest)
    ):
        # The server does not have just the rest: without a part the file is asked for whole.
        response.close()
        part.unlink()
        return _open(url, part, tag)
    return response


def _ask(url, headers):
    """Sends a GET request; returns the response if its status is 200, 206 or, of a range, 416."""
    request = urllib.request.Request(urllib.parse.quote(url, safe=_URL_SAFE), headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and "Range" in headers:
            return error
        raise ValueError(
            f"The server answered {error.code} {error.reason}: check the address. "
            f"Received: url={url!r}."
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(
            f"The server cannot be reached: {getattr(error, 'reason', error)}. Check the address "
            "and the network, or download the file elsewhere and pass its path. "
            f"Received: url={url!r}."
        ) from error
    if url.startswith("https:") and not response.url.startswith("https:"):
        response.close()
        raise ValueError(
            f"The server leads to an address that is not https://. Received: url={url!r}, "
            f"which leads to {response.url!r}."
        )
    return response


def _length(response, url):
    """The bytes to come; without their number a cut connection would look like the end."""
    length = response.headers.get("Content-Length")
    if length is None:
        raise ValueError(
            "The server does not say how long the file is (Content-Length): download it otherwise "
            f"and pass its path. Received: url={url!r}."
        )
    return int(length)


def _start_over(part, tag, response):
    """Removes the old bytes, and then notes which version of the file the next ones are of."""
    part.unlink(missing_ok=True)
    tag.unlink(missing_ok=True)
    etag = response.headers.get("ETag", "")
    if etag.startswith('"'):  # If-Range takes no weak ones, W/"..."
        write_text(tag, etag)


def _receive(response, part, start, total):
    """Appends the response to `part`, with a bar where a person may be waiting."""
    console = Console(stderr=True)
    bar = progress.Progress(
        progress.TextColumn("downloading {task.description}", markup=False),
        progress.BarColumn(bar_width=30),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar, part.open("ab") as file:
        task = bar.add_task(part.stem[-32:], completed=start, total=total)
        for chunk in _chunks(response):
            file.write(chunk)
            bar.advance(task, len(chunk))


def _chunks(response):
    """Yields bytes until the end or until the connection is cut."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        while chunk := response.read(_CHUNK):
            yield chunk


def _check_md5(url, part, tag, response):
    """Compares with the MD5 in Google's header; removes what differs."""
    expected = _announced_md5(response.headers)
    if expected is None:
        return
    md5 = hashlib.md5(usedforsecurity=False)
    with part.open("rb") as file:
        while chunk := file.read(_CHUNK):
            md5.update(chunk)
    received = base64.b64encode(md5.digest()).decode()
    if received != expected:
        part.unlink()
        tag.unlink(missing_ok=True)
        raise ValueError(
            f"The file came damaged and was removed: run the same again. Its MD5 must be "
            f"{expected}. Received: {received}, url={url!r}."
        )


def _announced_md5(headers):
    """The MD5 in base64 from `x-goog-hash: crc32c=...,md5=...`, on one line or on two; or None."""
    for line in headers.get_all("x-goog-hash", []):
        for item in line.split(","):
            kind, _, value = item.strip().partition("=")
            if kind == "md5":
                return value
    return None


def sha256(path):
    """SHA-256 in hex of a checkpoint: of its file, or of what its folder holds of one."""
    files = [path]
    if path.name.endswith(".index.json"):  # of the shards beside it
        path = path.parent
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix in _WEIGHT_FILES and f.is_file())
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()


# Google's public checkpoints.


@dataclasses.dataclass(frozen=True)
class CheckpointFacts:
    """What a checkpoint's file does not say.

    Args:
        image_size: Side of the images that its model takes, in pixels.
        normalization: Of their pixels, a name that `build_vit` knows.
    """

    image_size: int
    normalization: str = "minus_one_one"


def checkpoint_facts(path):
    """Tells what is known of a public checkpoint beside its file.

    Args:
        path: What `local_path` takes.

    Returns:
        A dict with `image_size` in pixels and `normalization`, or an empty one if `path` is not a
        URL of `GOOGLE_CHECKPOINTS`.
    """
    facts = GOOGLE_CHECKPOINTS.get(path)
    return {} if facts is None else dataclasses.asdict(facts)


def _rows(folder, image_size, names):
    root = f"https://storage.googleapis.com/{folder}/"
    return {f"{root}{name}.npz": CheckpointFacts(image_size) for name in names.split()}


# GV = google-research/vision_transformer, BV = google-research/big_vision,
# timm = huggingface/pytorch-image-models.
# The normalisation is (pixel - 127.5) / 127.5 throughout: GV vit_jax/input_pipeline.py;
# `value_range(-1, 1)` in BV's configs; DeiT III's first layer is converted to it, BV
# models/vit.py.
# Not here: FlexiViT, whose patches are resized as they are loaded; SigLIP So400m/14 at 384 px,
# which patches of 14 px do not tile; GSAM, whose file names no source lists.
GOOGLE_CHECKPOINTS = types.MappingProxyType(
    {
        # The paper's, pre-trained on ImageNet-21k (names: GV vit_jax.ipynb; 224 px: the paper,
        # Table 3).
        **_rows(
            "vit_models/imagenet21k",
            224,
            "ViT-B_8 ViT-B_16 ViT-B_32 ViT-L_16 ViT-L_32 ViT-H_14 "
            "R50+ViT-B_16 R50+ViT-L_32 R26+ViT-B_32",
        ),
        # ... and then fine-tuned on ImageNet (names: GV vit_jax.ipynb; 384 px, or 224 px if the
        # name says so: GV README.md, 2020-10-29).
        **_rows(
            "vit_models/imagenet21k+imagenet2012",
            384,
            "ViT-B_8 ViT-B_16 ViT-B_32 ViT-L_16 ViT-L_32 R50+ViT-B_16",
        ),
        **_rows("vit_models/imagenet21k+imagenet2012", 224, "ViT-B_16-224 ViT-L_16-224"),
        # AugReg's recommended ones, pre-trained on ImageNet-21k (GV README.md; B/8: BV
        # models/vit.py).
        **_rows(
            "vit_models/augreg",
            224,
            """
            R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0
            Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0
            S_32-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0
            S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0
            R26_S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0
            B_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0
            B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0
            B_8-i21k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0
            L_16-i21k-300ep-lr_0.001-aug_strong1-wd_0.1-do_0.0-sd_0.0
            R50_L_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1
            """,
        ),
        # ... and then fine-tuned on ImageNet at 384 px (GV README.md).
        **_rows(
            "vit_models/augreg",
            384,
            """
            R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_384
            Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_384
            S_32-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_384
            S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_384
            R26_S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_384
            B_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_384
            B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_384
            L_16-i21k-300ep-lr_0.001-aug_strong1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_384
            R50_L_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.01-res_384
            """,
        ),
        # ... or at 224 px (timm vision_transformer.py, vision_transformer_hybrid.py).
        **_rows(
            "vit_models/augreg",
            224,
            """
            R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224
            Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224
            S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224
            S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224
            R26_S_32-i21k-300ep-lr_0.001-aug_light0-wd_0.03-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.03-res_224
            B_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_224
            B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_224
            B_8-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.01-res_224
            L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.01-res_224
            R50_L_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1--imagenet2012-steps_20k-lr_0.01-res_224
            """,
        ),
        # Trained with SAM on ImageNet (names: GV vit_jax.ipynb; 224 px: timm
        # vision_transformer.py).
        **_rows("vit_models/sam", 224, "ViT-S_16 ViT-B_16 ViT-B_32 ViT-L_16 ViT-L_32"),
        # "Better plain ViT" (BV models/vit.py; 224 px: configs/vit_s16_i1k.py). They have sincos2d
        # positions, so that their files do not tell the size.
        **_rows("big_vision", 224, "vit_s16_i1k_90ep vit_s16_i1k_150ep vit_s16_i1k_300ep"),
        # The baselines of FlexiViT (BV configs/proj/flexivit/README.md).
        **_rows("big_vision/flexivit", 240, "vit_b16_i21k_300ep vit_b30_i21k_300ep"),
        # DeiT III (BV models/vit.py).
        **_rows(
            "big_vision/zoo/deit3",
            224,
            "bv_deit_3_small_224_1k bv_deit_3_base_224_1k bv_deit_3_large_224_1k "
            "bv_deit_3_small_224_21k bv_deit_3_base_224_21k bv_deit_3_large_224_21k",
        ),
        **_rows(
            "big_vision/zoo/deit3",
            384,
            "bv_deit_3_small_384_1k bv_deit_3_base_384_1k bv_deit_3_large_384_1k "
            "bv_deit_3_small_384_21k bv_deit_3_base_384_21k bv_deit_3_large_384_21k",
        ),
        # SigLIP and SigLIP 2, image and text towers in one file (BV models/vit.py).
        **_rows("big_vision/siglip", 224, "webli_en_b16_224_63724782 webli_en_so400m_224_57633886"),
        **_rows(
            "big_vision/siglip",
            256,
            "webli_en_b16_256_60500360 webli_en_l16_256_60552751 webli_i18n_b16_256_66117334",
        ),
        **_rows("big_vision/siglip", 384, "webli_en_b16_384_68578854 webli_en_l16_384_63634585"),
        **_rows("big_vision/siglip", 512, "webli_en_b16_512_68580893"),
        **_rows("big_vision/siglip2", 224, "siglip2_b16_224 siglip2_so400m14_224"),
        **_rows(
            "big_vision/siglip2",
            256,
            "siglip2_b16_256 siglip2_b32_256 siglip2_l16_256 siglip2_so400m16_256 "
            "siglip2_g-opt16_256",
        ),
        **_rows(
            "big_vision/siglip2",
            384,
            "siglip2_b16_384 siglip2_l16_384 siglip2_so400m16_384 siglip2_g-opt16_384",
        ),
        **_rows("big_vision/siglip2", 512, "siglip2_b16_512 siglip2_l16_512 siglip2_so400m16_512"),
    }
)
