"""official:, hf: and split files from a local server: downloaded once, checked, refused with a reason."""

import hashlib
import http.server
import json
import logging
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import load_file, save, save_file

from backbones.load import load_backbone
from backbones.reading import hub, official
from backbones.reading.official import Official, load_table
from backbones.reading.source import open_source
from backbones.translating.detect import FORMATS
from mae_bench.data.sets import fetch as fetching
from mae_bench.errors import UserError

pytestmark = pytest.mark.usefixtures("toy_heads")

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Server(http.server.ThreadingHTTPServer):
    """files: path -> content; JSON for what a hub says, bytes for files. log: what was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.log: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def hold(self, repo: str, files: dict[str, bytes]) -> None:
        """A model of the hub, whose main is COMMIT."""
        tree = [
            {"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in files.items()
        ]
        for revision in ("main", COMMIT):
            self.files[f"/api/models/{repo}/revision/{revision}"] = json.dumps(
                {"id": repo, "sha": COMMIT}
            ).encode()
        self.files[f"/api/models/{repo}/tree/{COMMIT}"] = json.dumps(tree).encode()
        self.files |= {f"/{repo}/resolve/{COMMIT}/{name}": data for name, data in files.items()}

    def asked(self) -> set[str]:
        """Names of the files that were sent."""
        return {Path(path).name for path in self.log if "/resolve/" in path}


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.server.log.append(path)
        if (content := self.server.files.get(path)) is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header(
            "Content-Type", "application/json" if path.startswith("/api/") else "application/octet-stream"
        )
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    monkeypatch.setattr(fetching, "WAIT_SECONDS", 0.0)
    monkeypatch.setattr(fetching, "TRIES", 1)
    monkeypatch.setenv("MAE_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    server = Server()
    at_server = partial(
        huggingface_hub.snapshot_download, endpoint=server.url, cache_dir=tmp_path / "hub", token=False
    )
    monkeypatch.setattr(hub, "snapshot_download", at_server)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


class TestOfficial:
    @pytest.fixture
    def content(self, toys, tmp_path) -> bytes:
        """A training file of two networks."""
        torch.save({"teacher": toys["encoder"], "student": toys["classifier"]}, tmp_path / "toy.pth")
        return (tmp_path / "toy.pth").read_bytes()

    def publish(self, monkeypatch, server: Server, content: bytes, checksum: str) -> None:
        server.files["/toy.pth"] = content
        entry = Official(f"{server.url}/toy.pth", "timm", "the authors", "teacher", checksum)
        monkeypatch.setattr(official, "load_table", lambda: {"dino_toy": entry})

    @pytest.mark.parametrize("kind", ["md5", "sha256", ""])
    def test_is_brought_once_and_read_as_the_authors_say(self, monkeypatch, server, content, toys, kind):
        beginning = f"{kind}:{hashlib.new(kind, content).hexdigest()[:6]}" if kind else ""
        self.publish(monkeypatch, server, content, beginning)
        for _ in range(2):
            model, _, report = load_backbone("official:dino_toy")
        assert server.log == ["/toy.pth"]
        assert (report.source, report.format) == ("official:dino_toy", "timm")
        assert report.files == {"toy.pth": hashlib.sha256(content).hexdigest()}
        assert torch.equal(model.state_dict()["norm.weight"], toys["encoder"]["norm.weight"])
        assert "head.weight" in open_source("official:dino_toy", weights="student").tensors

    def test_another_checksum_stops(self, monkeypatch, server, content):
        self.publish(monkeypatch, server, content, "md5:ffffff")
        with pytest.raises(UserError, match=r"md5 [0-9a-f]{32}.*(?s:.*)Expected: ffffff"):
            open_source("official:dino_toy")

    @pytest.mark.parametrize("checked", [True, False])
    def test_a_wrong_body_does_not_stay_in_the_cache(self, monkeypatch, server, content, checked):
        """As of a network that answers every request with the page of its login."""
        checksum = f"md5:{hashlib.md5(content).hexdigest()}" if checked else ""
        self.publish(monkeypatch, server, b"<!doctype html><title>Log in</title>", checksum)
        with pytest.raises(UserError, match="toy.pth does not hold the expected file.*<!doctype html>"):
            open_source("official:dino_toy")
        server.files["/toy.pth"] = content
        assert open_source("official:dino_toy").tensors

    def test_a_cached_file_that_has_changed_is_downloaded_again(self, monkeypatch, server, content):
        self.publish(monkeypatch, server, content, f"md5:{hashlib.md5(content).hexdigest()}")
        path, _ = official.fetch_official("dino_toy")
        path.write_bytes(content[:-1])
        with pytest.raises(UserError, match="re-run the same command"):
            open_source("official:dino_toy")
        assert open_source("official:dino_toy").tensors
        assert server.log == ["/toy.pth"] * 2

    def test_a_pinned_digest_is_checked_too(self, monkeypatch, server, content):
        self.publish(monkeypatch, server, content, "")
        with pytest.raises(UserError, match="SHA-256"):
            open_source("official:dino_toy", sha256="0" * 64)

    def test_a_file_that_is_gone(self, monkeypatch, server, content):
        self.publish(monkeypatch, server, content, "")
        server.files.clear()
        with pytest.raises(UserError, match="404(?s:.*)give its path with --format timm --weights teacher"):
            open_source("official:dino_toy")

    def test_unknown_names_are_answered_with_near_ones(self):
        with pytest.raises(UserError) as error:
            open_source("official:mae_vit_bse")
        assert "did you mean mae_vit_base" in error.value.fix

    @pytest.mark.parametrize("name", ["", "nothing_like_it"])
    def test_all_names_are_listed(self, name):
        with pytest.raises(UserError) as error:
            open_source(f"official:{name}")
        backbones = [name for name, entry in load_table().items() if not entry.head]
        assert error.value.expected == f"one of {', '.join(backbones)}"

    def test_an_address_is_answered_with_its_name(self):
        for name, entry in load_table().items():
            with pytest.raises(UserError, match=f"give official:{name}$"):
                open_source(entry.url)
        with pytest.raises(
            UserError, match=r"https://example.org/x.pth is a URL(?s:.*)download it and give its path"
        ):
            open_source("https://example.org/x.pth")


def test_every_official_entry_is_usable():
    assert {entry.format for entry in load_table().values()} <= set(FORMATS)
    for name, entry in load_table().items():
        kind, _, published = entry.checksum.partition(":")
        assert entry.url.startswith("https://"), name
        assert entry.source, name
        assert not entry.checksum or (
            kind in ("md5", "sha256") and len(published) >= 6 and int(published, 16)
        ), name
    assert len({entry.url for entry in load_table().values()}) == len(load_table())
    assert (
        load_table()["mae_vit_base"].url
        == "https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_base.pth"
    )


class TestHub:
    config = json.dumps({"model_args": {"num_heads": 3}}).encode()

    def test_brings_weights_and_description_and_pins_the_commit(self, server, toys):
        safe = save(toys["encoder"])
        files = {
            "config.json": self.config,
            "model.safetensors": safe,
            "pytorch_model.bin": b"pickle",
            "README.md": b"read me",
        }
        server.hold("owner/vit", files)
        model, _, report = load_backbone("hf:owner/vit@main")
        assert server.asked() == {"config.json", "model.safetensors", "README.md"}
        assert report.source == f"hf:owner/vit@{COMMIT}"
        assert any(note.startswith(f"main of owner/vit is {COMMIT}") for note in report.notes)
        assert report.files == {
            name: hashlib.sha256(files[name]).hexdigest() for name in ("model.safetensors", "config.json")
        }
        assert torch.equal(model.state_dict()["norm.weight"], toys["encoder"]["norm.weight"])

    def test_a_commit_is_no_moving_revision(self, server, toys):
        server.hold("owner/vit", {"config.json": self.config, "model.safetensors": save(toys["encoder"])})
        assert not open_source(f"hf:owner/vit@{COMMIT}").notes
        assert open_source("hf:owner/vit").notes

    @pytest.mark.parametrize(
        "name", ["pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    )
    def test_other_names_of_weights(self, server, toys, tmp_path, name):
        torch.save(toys["encoder"], tmp_path / "x.bin")
        content = save(toys["encoder"]) if name.endswith("safetensors") else (tmp_path / "x.bin").read_bytes()
        server.hold("owner/vit", {"config.json": self.config, name: content})
        assert set(open_source("hf:owner/vit").tensors) == set(toys["encoder"])

    def test_shards(self, server, toys, tmp_path):
        write_shards(tmp_path / "repo", toys["encoder"])
        server.hold("owner/vit", {path.name: path.read_bytes() for path in (tmp_path / "repo").iterdir()})
        assert set(open_source("hf:owner/vit").tensors) == set(toys["encoder"])

    def test_offline_the_cache_serves(self, server, toys, monkeypatch):
        server.hold("owner/vit", {"config.json": self.config, "model.safetensors": save(toys["encoder"])})
        open_source("hf:owner/vit")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        before = list(server.log)
        assert open_source("hf:owner/vit").source == f"hf:owner/vit@{COMMIT}"
        assert server.log == before
        with pytest.raises(UserError, match="the hub cannot provide owner/other at main"):
            open_source("hf:owner/other")

    @pytest.mark.parametrize("name", ["owner/none", "owner/vit@v9", "no repository/at all", ""])
    def test_what_the_hub_does_not_have(self, server, toys, name):
        server.hold("owner/vit", {"config.json": self.config, "model.safetensors": save(toys["encoder"])})
        with pytest.raises(UserError, match="the hub cannot provide"):
            open_source(f"hf:{name}")

    def test_a_repository_without_weights(self, server):
        server.hold("owner/vit", {"config.json": self.config, "tf_model.h5": b"other"})
        with pytest.raises(UserError, match=r"holds config\.json"):
            open_source("hf:owner/vit")


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], suffix: str = "safetensors") -> Path:
    """Three shards and their index, as transformers writes them."""
    folder.mkdir()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    placed = {name: f"{stem}-{i % 3 + 1:05}-of-00003.{suffix}" for i, name in enumerate(tensors)}
    for shard in set(placed.values()):
        part = {name: tensors[name] for name in tensors if placed[name] == shard}
        save_file(part, folder / shard) if suffix == "safetensors" else torch.save(part, folder / shard)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}))
    return folder


class TestShards:
    @pytest.mark.parametrize("suffix", ["safetensors", "bin"])
    def test_all_are_read_and_digested(self, toys, tmp_path, suffix):
        folder = write_shards(tmp_path / "vit", toys["encoder"], suffix)
        checkpoint = open_source(folder)
        assert all(torch.equal(checkpoint.tensors[name], tensor) for name, tensor in toys["encoder"].items())
        shards = sorted(folder.glob(f"*-of-*.{suffix}"))
        digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in shards}
        assert checkpoint.files == digests
        assert checkpoint.size == sum(path.stat().st_size for path in shards)
        printed = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
        assert checkpoint.digest == hashlib.sha256(printed.encode()).hexdigest()
        assert (
            open_source(next(folder.glob("*.index.json")), sha256=checkpoint.digest.upper()).digest
            == checkpoint.digest
        )
        with pytest.raises(UserError, match="together SHA-256"):
            open_source(folder, sha256="0" * 64)

    def test_a_missing_shard(self, toys, tmp_path):
        folder = write_shards(tmp_path / "vit", toys["encoder"])
        (folder / "model-00002-of-00003.safetensors").unlink()
        with pytest.raises(UserError, match="model-00002-of-00003.safetensors, which is missing"):
            open_source(folder)

    @pytest.mark.parametrize(
        "name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b", "a\0b"]
    )
    def test_shards_stay_in_their_folder(self, toys, tmp_path, name):
        folder = write_shards(tmp_path / "vit", toys["encoder"])
        save_file(toys["encoder"], tmp_path / "secret.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"cls_token": name}}))
        with pytest.raises(UserError, match="files in the folder of the index"):
            open_source(folder)

    @pytest.mark.parametrize(
        "index", [[], {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"cls_token": 3}}]
    )
    def test_an_index_without_sense(self, toys, tmp_path, index):
        folder = write_shards(tmp_path / "vit", toys["encoder"])
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match=r"index\.json"):
            open_source(folder)

    def test_a_shard_of_another_revision(self, toys, tmp_path):
        folder = write_shards(tmp_path / "vit", toys["encoder"])
        shard = folder / "model-00001-of-00003.safetensors"
        save_file({**load_file(shard), "surplus": torch.zeros(1)}, shard)
        with pytest.raises(UserError, match="differ in 1 tensors: surplus"):
            open_source(folder)
        torch.save([torch.zeros(1)], shard)
        with pytest.raises(UserError, match=r"differ in \d+ tensors"):
            open_source(folder)


def test_weights_by_timm_have_a_digest_that_can_be_pinned(monkeypatch):
    real = timm.create_model

    def create(name: str, pretrained: bool, num_classes: int) -> torch.nn.Module:
        torch.manual_seed(0)
        return real(name, num_classes=num_classes)

    monkeypatch.setattr(timm, "create_model", create)  # there is no network in a test
    checkpoint = open_source("timm:test_vit")
    assert checkpoint.files == {"test_vit.safetensors": checkpoint.digest}
    assert open_source("timm:test_vit", sha256=checkpoint.digest).digest == checkpoint.digest
    with pytest.raises(UserError, match="SHA-256"):
        open_source("timm:test_vit", sha256="0" * 64)


def test_a_missing_path_is_answered_with_what_it_may_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint-99.pth").write_bytes(b"")
    for given, told in {
        "checkpoint-9.pth": "did you mean checkpoint-99.pth?",
        str(tmp_path / "checkpoint99.pth"): f"did you mean {tmp_path}/checkpoint-99.pth?",
        "facebook/vit-mae-base": "if it is a repository of the hub: hf:facebook/vit-mae-base",
        "facebook/vit.pth": "",
        "zzz": "",
    }.items():
        with pytest.raises(UserError) as error:
            open_source(given)
        assert (error.value.given, error.value.fix) == (f"no weight file {given}", told)


def test_a_client_that_tries_again_and_again_is_heard_once():
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log = huggingface_hub.utils.logging.get_logger()
    log.addHandler(handler)
    try:
        for _ in range(2):
            with hub.log_once():
                for number in range(3):
                    logging.getLogger(f"{log.name}.inner").warning("try %d", number)
        log.warning("later")
    finally:
        log.removeHandler(handler)
    assert said == ["try 0", "try 0", "later"]


def test_an_unknown_kind_lists_the_known_ones():
    with pytest.raises(UserError, match="official:NAME, timm:NAME or hf:REPO@REVISION"):
        open_source("ftp:somewhere")
