"""Checkpoints by name, from a loopback server that answers as the Hugging Face Hub does."""

import base64
import hashlib
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import rasterio
import torch
from conftest import REPO, tiny_unet
from PIL import Image
from safetensors.torch import save_file

from cdiffset.config import RELEASED
from cdiffset.errors import UserError
from cdiffset.hub import NAME, files_of, find_checkpoint
from cdiffset.model import patch_conv_in, patch_conv_out

COMMIT, OLDER = "a" * 40, "b" * 40
TESTER = """
import json, sys
from cdiffset.errors import UserError
from cdiffset.hub import find_checkpoint
for name in sys.argv[1:]:
    try:
        path, source = find_checkpoint(name, "--checkpoint")
        files = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
        print(json.dumps([source, str(path), files]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


class Hub(BaseHTTPRequestHandler):
    """The parts of the Hub's interface that a download takes: a model's files, its tree, and the files with their ETags."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status: int, body: bytes = b"", with_body: bool = True, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def refuse(self, status: int, code: str):
        self.answer(status, b"{}", self.command != "HEAD", X_Error_Code=code, X_Error_Message=code)

    def do_GET(self):
        self.server.asked.append((self.command, self.path, self.headers.get("Range")))
        parts = self.path.split("?")[0].strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        repo, rest = ("/".join(parts[2:4]), parts[4:]) if is_api else ("/".join(parts[:2]), parts[2:])
        if repo == "owner/gated":
            return self.refuse(403, "GatedRepo")
        if repo != "owner/name":
            return self.refuse(401, "RepoNotFound")
        revision = rest[1] if len(rest) > 1 else "main"
        commit = {"main": COMMIT, COMMIT: COMMIT, "v1": OLDER, OLDER: OLDER}.get(revision)
        if commit is None:
            return self.refuse(404, "RevisionNotFound")
        files = self.server.files[commit]
        if is_api and rest[:1] == ["tree"]:
            tree = [{"type": "file", "path": name, "size": len(body), "oid": etag(body)} for name, body in files.items()]
            return self.json(tree)
        if is_api:
            facts = {"id": repo, "sha": commit, "private": bool(self.server.is_private)}
            return self.json(facts | {"siblings": [{"rfilename": name} for name in files], "tags": []})
        name = "/".join(rest[2:])
        if name not in files:
            return self.refuse(404, "EntryNotFound")
        return self.file(files[name], commit)

    do_HEAD = do_GET

    def do_POST(self):
        """An upload: the repository, what is to be sent how (all as it is), and one commit, which is then what main holds."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.command, self.path, None))
        if not self.headers.get("Authorization"):
            return self.refuse(401, "Unauthorized")
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            asked = self.server.created.get("visibility") == "private" or self.server.created.get("private")
            self.server.is_private = bool(asked) and not self.server.keeps_public
            return self.json({"url": "http://127.0.0.1/owner/name", "name": "owner/name", "id": "owner/name"})
        if self.path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]
            ]
            return self.json({"files": files})
        sent = [json.loads(line) for line in body.splitlines()]
        self.server.files[COMMIT] = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in sent if line["key"] == "file"
        }
        return self.json({"commitUrl": f"http://127.0.0.1/owner/name/commit/{COMMIT}", "commitOid": COMMIT})

    def json(self, value):
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def file(self, body: bytes, commit: str):
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        headers = {"ETag": f'"{etag(body)}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        status = 206 if start else 200
        if self.command == "HEAD":
            self.send_response(status)
            for key, value in {"Content-Length": len(body), **headers}.items():
                self.send_header(key.replace("_", "-"), str(value))
            return self.end_headers()
        sent = body[start:]
        if self.server.break_after is not None and len(sent) > self.server.break_after:
            self.answer(status, sent, with_body=False, **headers)
            self.wfile.write(sent[: self.server.break_after])
            self.server.break_after = None
            self.close_connection = True
            return None
        return self.answer(status, sent, **headers)


def etag(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:40]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, bytes]:
    """A stage 2 U-Net folder's files."""
    folder = tmp_path_factory.mktemp("unet")
    torch.manual_seed(0)
    patch_conv_out(patch_conv_in(tiny_unet())).save_pretrained(folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def hub(weights, tmp_path):
    """A running server with .files, .asked and .break_after (bytes, once), and the .environment that points to it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    files = {f"baselines/x/{name}": body for name, body in weights.items()}
    strange = {"README.md": b"# x", "baselines/x/pytorch_model.bin": b"pickle", "baselines/x/run.py": b"raise SystemExit(9)"}
    server.files = {COMMIT: {**files, **strange, "vae/config.json": b"{}"}, OLDER: {f"old/{n}": b for n, b in weights.items()}}
    server.asked, server.break_after, server.is_private, server.keeps_public = [], None, False, False
    Thread(target=server.serve_forever, daemon=True).start()
    server.environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    yield server
    server.shutdown()
    server.server_close()


def asked_for(hub, names: list[str], **environment: str) -> list:
    command = [sys.executable, "-c", TESTER, *names]
    done = subprocess.run(command, cwd=REPO, env=hub.environment | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


# ----------------------------------------------------------------------------------------------------------- names
@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("owner/name", ("owner/name", None, None)),
        ("owner/name/", ("owner/name", None, None)),
        ("owner/name/a/b.c/d", ("owner/name", None, "a/b.c/d")),
        ("owner/name@v1.0/a", ("owner/name", "v1.0", "a")),
        ("o-1/n.2_3@main", ("o-1/n.2_3", "main", None)),
        ("owner/name/x.safetensors", ("owner/name", None, "x.safetensors")),
        *((name, None) for name in ("name", "/owner/name", "../name", "owner//name", "owner/name@", "owner/na me", "")),
    ],
)
def test_names_are_taken_apart(name, parts):
    match = NAME.fullmatch(name)
    assert (match and tuple(match.groups())) == parts


def test_short_names_are_of_the_released_repository():
    for name, long in RELEASED.items():
        match = NAME.fullmatch(long)
        assert match["repo"] == "JeonghyeokDo/GeoSET" and match["revision"] is None
        assert match["inside"].endswith("sd21-ft" if name.endswith("-stage1") else "c-diffset")


def test_what_is_here_goes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("owner/name", "sar2opt"):
        Path(name).mkdir(parents=True)
        assert find_checkpoint(name, "--checkpoint") == (Path(name), None)
    for name in ("/no/where", "./owner/other", "../owner/other", "nowhere"):  # paths, whether they are there or not
        assert find_checkpoint(name, "--checkpoint") == (Path(name), None)


def test_offline_a_name_that_is_nowhere_is_one_line():
    with pytest.raises(UserError) as caught:
        find_checkpoint("work_dir/run/best", "--checkpoint")
    message = str(caught.value)
    assert message.startswith("--checkpoint: there is no local 'work_dir/run/best', and work_dir/run on the Hugging Face Hub")
    assert "is not in its cache and cannot be fetched" in message and "\n" not in message


@pytest.mark.parametrize(
    ("inside", "present", "expected"),
    [
        ("", ["unet/diffusion_pytorch_model.safetensors", "unet/config.json", "vae/config.json", "model_index.json", "a.bin"],
         ["unet/diffusion_pytorch_model.safetensors", "unet/config.json", "vae/config.json", "model_index.json"]),
        ("", ["unet/diffusion_pytorch_model.safetensors", "vae/config.json"], ["unet/diffusion_pytorch_model.safetensors"]),
        ("c", ["c/unet_ema/diffusion_pytorch_model.safetensors", "c/unet/diffusion_pytorch_model.safetensors",
               "c/checkpoint.json", "c/training_state.pt", "c/prompt.safetensors", "c/calibration.json"],
         ["c/unet_ema/diffusion_pytorch_model.safetensors", "c/checkpoint.json", "c/prompt.safetensors", "c/calibration.json"]),
        ("", ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "x.bin"],
         ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]),
        ("a/b.safetensors", ["a/b.safetensors", "a/config.json", "a/c.safetensors"], ["a/b.safetensors", "a/config.json"]),
        ("", ["diffusion_pytorch_model.bin", "config.json"], []),
    ],
)  # fmt: skip
def test_only_the_files_of_one_checkpoint_are_chosen(inside, present, expected):
    assert files_of(present, inside) == expected


# -------------------------------------------------------------------------------------------------------- downloads
def test_a_checkpoint_is_downloaded_once_with_nothing_but_safetensors_and_json(hub):
    (found,) = asked_for(hub, ["owner/name/baselines/x"])
    source, path, files = found
    assert source == f"owner/name@{COMMIT}/baselines/x" and Path(path).parts[-3:] == (COMMIT, "baselines", "x")
    assert files == ["config.json", "diffusion_pytorch_model.safetensors"]
    fetched = {path.split("/")[-1] for method, path, _ in hub.asked if method == "GET" and "/resolve/" in path}
    assert fetched == set(files)
    hub.asked.clear()
    assert asked_for(hub, ["owner/name/baselines/x"]) == [found]
    assert not [path for method, path, _ in hub.asked if method == "GET" and "/resolve/" in path]


def test_a_revision_is_another_checkpoint(hub):
    (found,) = asked_for(hub, ["owner/name@v1/old"])
    assert found[0] == f"owner/name@{OLDER}/old"


def test_an_interrupted_download_goes_on_where_it_broke(hub):
    name = "baselines/x/diffusion_pytorch_model.safetensors"
    hub.files[COMMIT][name] += bytes(14 * 2**20)  # the library keeps what has come in portions of 10 MiB
    hub.break_after = 12 * 2**20
    ((_, path, _),) = asked_for(hub, ["owner/name/baselines/x"])
    ranges = [at for method, asked, at in hub.asked if method == "GET" and asked.endswith(name)]
    assert ranges == [None, f"bytes={10 * 2**20}-"]
    assert (Path(path) / Path(name).name).read_bytes() == hub.files[COMMIT][name]


def test_a_cached_checkpoint_serves_offline(hub):
    online = asked_for(hub, ["owner/name/baselines/x"])
    assert asked_for(hub, ["owner/name/baselines/x"], HF_HUB_OFFLINE="1") == online
    assert asked_for(hub, ["owner/name/baselines/x"], HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_ETAG_TIMEOUT="1") == online


def test_refusals_are_one_line_each(hub):
    names = ["owner/nowhere", "owner/gated/x", "owner/name@v9/x", "owner/name/elsewhere", "owner/name/vae"]
    messages = asked_for(hub, names)
    expected = [
        "there is no owner/nowhere on the Hugging Face Hub, or it is private: then `hf auth login` first",
        "owner/gated on the Hugging Face Hub is gated: ask for access on its page, then `hf auth login`",
        "owner/name on the Hugging Face Hub has no revision v9",
        "elsewhere/ of owner/name on the Hugging Face Hub holds no checkpoint, expected a .safetensors file",
        "vae/ of owner/name on the Hugging Face Hub holds no checkpoint",
    ]
    for name, message, what in zip(names, messages, expected, strict=True):
        assert message.startswith(f"--checkpoint: there is no local '{name}', and ") and what in message and "\n" not in message


# --------------------------------------------------------------------------------------------------------- commands
def python(hub, *command, expected: int = 0):
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=REPO, env=hub.environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == expected, done.stderr
    return done


def test_translation_from_the_hub_is_that_from_the_file(hub, weights, tiny_base, tmp_path):
    for name, body in weights.items():
        (tmp_path / "local").mkdir(exist_ok=True)
        (tmp_path / "local" / name).write_bytes(body)
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32), dtype=np.uint8)
    (tmp_path / "sar").mkdir()
    Image.fromarray(pixels).save(tmp_path / "sar/image.png")
    profile = {"driver": "GTiff", "width": 32, "height": 32, "count": 1, "dtype": "uint8", "crs": "EPSG:32611"}
    with rasterio.open(
        tmp_path / "sar/scene.tif", "w", **profile, transform=rasterio.Affine(10, 0, 4e5, 0, -10, 4e6)
    ) as target:
        target.write(pixels, 1)
    for name, checkpoint in (("hub", "owner/name/baselines/x"), ("file", tmp_path / "local")):
        options = ["--sar-dir", tmp_path / "sar", "--output-dir", tmp_path / name, "--checkpoint", checkpoint]
        options += ["--pretrained-model-name-or-path", tiny_base, "--num-inference-steps", 2]
        said = python(hub, "test.py", *options).stdout
        assert (f"owner/name@{COMMIT}/baselines/x on cpu" in said) == (name == "hub")
    assert (tmp_path / "hub/image.png").read_bytes() == (tmp_path / "file/image.png").read_bytes()
    with rasterio.open(tmp_path / "hub/scene.tif") as scene:
        assert scene.tags()["CDIFFSET_WEIGHTS"] == f"owner/name@{COMMIT}/baselines/x"
    with rasterio.open(tmp_path / "file/scene.tif") as scene:
        assert "CDIFFSET_WEIGHTS" not in scene.tags()


def test_a_training_from_the_hub_records_where_it_began(hub, argv, tmp_path):
    options = {"confidence": True, "accelerator_path": "owner/name/baselines/x"}
    for iterations, more in ((1, {}), (2, {"resume": "latest"})):  # what is resumed still knows
        python(hub, "main.py", *argv(tmp_path / "run", **options, num_iter=iterations, **more))
        meta = json.loads((tmp_path / "run/latest/checkpoint.json").read_text())
        assert (meta["iteration"], meta["started_from"]) == (iterations, f"owner/name@{COMMIT}/baselines/x")
        assert meta["config"]["accelerator_path"] == "owner/name/baselines/x"


def test_a_calibration_is_not_written_into_the_cache(hub, pair_folders, tiny_base):
    folders = ["--sar-dir", pair_folders / "test/sar", "--eo-dir", pair_folders / "test/eo"]
    options = ["--checkpoint", "owner/name/baselines/x", "--pretrained-model-name-or-path", tiny_base]
    said = python(hub, "calibrate.py", *folders, *options, expected=2).stderr
    assert said.splitlines()[-1].startswith("error: --output: expected a file, found none: owner/name@")


def test_a_bare_file_of_the_hub_is_a_checkpoint(hub, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    hub.files[COMMIT]["bare/x.safetensors"] = (tmp_path / "x.safetensors").read_bytes()
    ((source, path, _),) = asked_for(hub, ["owner/name/bare/x.safetensors"])
    assert source.endswith("/bare/x.safetensors") and Path(path).name == "x.safetensors"


# ---------------------------------------------------------------------------------------------------------------- pipelines
def test_a_pipeline_goes_up_and_is_translated_with_from_there(hub, weights, tiny_base, tmp_path):
    """By test.py: all components come down, and the code stays where it is."""
    (tmp_path / "unet").mkdir()
    for name, body in weights.items():
        (tmp_path / "unet" / name).write_bytes(body)
    (tmp_path / "sar").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)).save(tmp_path / "sar/image.png")
    hub.environment["HF_TOKEN"] = "hf_token"
    hub.files[COMMIT] = {".gitattributes": b""}
    checkpoint = ["--checkpoint", tmp_path / "unet", "--pretrained-model-name-or-path", tiny_base]
    said = python(hub, "export.py", *checkpoint, "--output", tmp_path / "out", "--push", "owner/name", "--private").stdout
    assert said.splitlines()[-1] == "https://huggingface.co/owner/name"
    assert (hub.created["organization"], hub.created["name"]) == ("owner", "name")
    assert hub.created.get("private") or hub.created["visibility"] == "private"  # huggingface_hub of either age
    here = {file.relative_to(tmp_path / "out").as_posix(): file.read_bytes() for file in (tmp_path / "out").rglob("*.*")}
    assert hub.files[COMMIT] == {name: body for name, body in here.items() if (tmp_path / "out" / name).is_file()}
    hub.asked.clear()
    options = ["--sar-dir", tmp_path / "sar", "--num-inference-steps", 2]
    python(hub, "test.py", *options, "--output-dir", tmp_path / "hub", "--checkpoint", "owner/name")
    python(hub, "test.py", *options, "--output-dir", tmp_path / "local", *checkpoint)
    assert (tmp_path / "hub/image.png").read_bytes() == (tmp_path / "local/image.png").read_bytes()
    fetched = [path for method, path, _ in hub.asked if method == "GET" and "/resolve/" in path]
    assert fetched and all(path.endswith((".json", ".safetensors")) for path in fetched)
    assert not list(Path(hub.environment["HF_HOME"]).rglob("*.py"))


@pytest.mark.parametrize(
    ("token", "options", "message"),
    [
        (None, [], "could not be uploaded as owner/name"),
        ("hf_token", [], "owner/name holds other files (baselines/x/config.json): remove them, or choose another name"),
        ("hf_token", ["--private"], "owner/name is public already: choose another name, or make it private on its page"),
    ],
)
def test_what_cannot_be_pushed_stays_and_is_said_in_one_line(hub, weights, tiny_base, tmp_path, token, options, message):
    (tmp_path / "unet").mkdir()
    for name, body in weights.items():
        (tmp_path / "unet" / name).write_bytes(body)
    if token:
        hub.environment["HF_TOKEN"] = token
    else:
        hub.files[COMMIT] = {}
    hub.keeps_public = bool(options)
    checkpoint = ["--checkpoint", tmp_path / "unet", "--pretrained-model-name-or-path", tiny_base]
    words = [*checkpoint, "--output", tmp_path / "out", "--push", "owner/name", *options]
    said = python(hub, "export.py", *words, expected=2).stderr
    assert said.splitlines()[-1].startswith(f"error: --push: {tmp_path}/out is written, but {message}")
    assert (tmp_path / "out/model_index.json").is_file() and "Traceback" not in said
    assert not [path for method, path, _ in hub.asked if "/commit/" in path]
