"""`speed3r weights`: against a server on this machine that answers like the Hugging Face hub, through the real library.

The command runs in processes of its own, because the library reads its environment when it is imported.
"""

import hashlib
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from goldens import manifest, published, tiny
from safetensors.torch import save_file

from speed3r_ros import hub, weights_command
from speed3r_ros.cli import main
from speed3r_ros.model.backbones import checkpoints, registry
from speed3r_ros.model.backbones.checkpoints import APACHE, CC_BY_NC, CHECKPOINTS, Checkpoint, Record
from speed3r_ros.model.backbones.pi3 import Pi3, Pi3Config

ROOT = Path(__file__).parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CHUNK = 10 * 2**20  # the library writes the file in pieces of this size
NAME = "da3-mono"  # of a size that only the hub knows, so that the file may be a small one
REPOSITORY = CHECKPOINTS[NAME].hub
needs_hub = pytest.mark.skipif(
    importlib.util.find_spec("huggingface_hub") is None, reason="waits for `pip install huggingface_hub`"
)


class Hub(ThreadingHTTPServer):
    """One file, behind a redirect to another host name, as the hub keeps large files on a content network."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.content = random.Random(7).randbytes(2 * CHUNK + 4321)
        self.sha256 = hashlib.sha256(self.content).hexdigest()
        self.size = len(self.content)  # as stated
        self.refusal = None  # HTTP status and the hub's error code
        self.cuts = 0  # answers that end after one piece and a half
        self.stall = threading.Event()  # set: answers wait there instead
        self.stalled = threading.Event()
        self.seen = []  # (method, path, Range, whether it came with the token)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        server = self.server
        if "/resolve/" not in self.path and self.path != "/content":  # what else the library may ask for
            return self.head(404, {"Content-Length": 0})
        wanted = self.headers.get("Range")
        server.seen.append((self.command, self.path, wanted, "hf_secret" in self.headers.get("Authorization", "")))
        if server.refusal:
            status, code = server.refusal
            self.head(status, {"X-Error-Code": code, "Content-Length": 0})
        elif "/resolve/" in self.path:
            linked = {"X-Linked-Etag": f'"{server.sha256}"', "X-Linked-Size": server.size, "X-Repo-Commit": COMMIT}
            place = f"http://localhost:{server.server_port}/content"
            self.head(302, {**linked, "Location": place, "Content-Length": 0})
        else:
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
            end = len(server.content)
            span = {"Content-Range": f"bytes {start}-{end - 1}/{end}"} if wanted else {}
            self.head(206 if wanted else 200, {**span, "Content-Length": end - start, "Accept-Ranges": "bytes"})
            if self.command == "GET":
                self.body(server, start, end)

    def head(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def body(self, server, start, end):
        with suppress(ConnectionError):
            if server.cuts or server.stall.is_set():
                self.wfile.write(server.content[start : start + CHUNK * 3 // 2])
                if server.cuts:
                    server.cuts -= 1
                else:
                    server.stalled.set()
                    self.connection.recv(1)  # until the client goes
                self.close_connection = True
            else:
                self.wfile.write(server.content[start:end])


@pytest.fixture
def server():
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


class Shell:
    """A user's account: runs `speed3r weights` with its own caches."""

    def __init__(self, home, url):
        self.home = home
        self.cache = home / "hf" / "hub" / f"models--{REPOSITORY.replace('/', '--')}"
        self.record = home / "speed3r" / "weights" / f"{NAME}.json"
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")},
            **{"HF_ENDPOINT": url, "HF_HOME": str(home / "hf"), "XDG_CACHE_HOME": str(home), "HF_TOKEN": "hf_secret"},
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }

    def start(self, *arguments, **environment):
        command = [sys.executable, "-m", "speed3r_ros.cli", "weights", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=self.environment | environment, cwd=self.home, **pipes)

    def run(self, *arguments, **environment):
        """(exit code, standard output, standard error)"""
        with self.start(*arguments, **environment) as process:
            out, err = process.communicate(timeout=60)
        assert "Traceback" not in err
        return process.returncode, out, err

    def refused(self, *arguments, says, **environment):
        code, out, err = self.run(*arguments, **environment)
        assert (code, out) == (1, "")
        last = err.splitlines()[-1]
        assert last.startswith("speed3r weights: ")
        for part in says:
            assert part in last
        return err.splitlines()

    def path(self):
        return Path(json.loads(self.record.read_text())["path"])


@pytest.fixture
def shell(tmp_path, server):
    return Shell(tmp_path, server.url)


@needs_hub
def test_fetch_then_everything_without_network(shell, server):
    code, out, err = shell.run("fetch", NAME, "--accept-licence")
    assert code == 0, err
    assert APACHE.url in err and server.sha256 in out and out.count("\n") == 1
    record = json.loads(shell.record.read_text())
    path = Path(record["path"])
    assert path.read_bytes() == server.content
    assert (record["sha256"], record["revision"], record["size"]) == (server.sha256, COMMIT, server.size)
    assert path == shell.cache / "snapshots" / COMMIT / "model.safetensors", "other programs find it in the hub's cache"
    assert [p.name for p in (shell.cache / "blobs").iterdir()] == [server.sha256]
    assert {token for _, where, _, token in server.seen if where == "/content"} == {False}, "the token stays at the hub"
    assert {token for _, where, _, token in server.seen if where != "/content"} == {True}

    seen = len(server.seen)
    server.refusal = 500, ""
    assert shell.run("fetch", NAME) == (0, out, "")
    assert shell.run("path", NAME, HF_HUB_OFFLINE="1")[:2] == (0, f"{path}\n")
    assert len(server.seen) == seen


@needs_hub
def test_nothing_is_sent_before_the_licence_is_accepted(shell, server):
    name = "pi3"
    shell.refused("fetch", name, says=["CC BY-NC 4.0", CC_BY_NC.url, "--accept-licence"])
    for action in ("verify", "path"):
        shell.refused(action, name, says=["pi3", "speed3r weights fetch pi3"])
    assert shell.run("list")[0] == 0
    assert server.seen == [] and not shell.record.parent.exists()


@needs_hub
def test_interrupted_download_resumes(shell, server):
    server.stall.set()
    with shell.start("fetch", NAME, "--accept-licence") as process:
        assert server.stalled.wait(30)
        blobs = shell.cache / "blobs"
        while not any(p.stat().st_size for p in blobs.iterdir()):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert [line for line in err.splitlines() if line.startswith("speed3r")] == [
        "speed3r weights: interrupted; the same command goes on where it stopped"
    ]
    assert "Traceback" not in err
    (partial,) = blobs.iterdir()
    kept = partial.stat().st_size
    assert kept >= CHUNK and partial.name != server.sha256
    shell.refused("path", NAME, says=["fetch"])

    server.stall.clear()
    code, _, err = shell.run("fetch", NAME)
    assert code == 0, err
    assert f"bytes={kept}-" in [span for _, where, span, _ in server.seen if where == "/content"]
    assert shell.path().read_bytes() == server.content and [p.name for p in blobs.iterdir()] == [server.sha256]


@needs_hub
def test_cut_connection_resumes(shell, server):
    server.cuts = 1
    code, _, err = shell.run("fetch", NAME, "--accept-licence")
    if code:  # older versions of the library leave it to the next call
        assert "goes on where it stopped" in err.splitlines()[-1]
        code, _, err = shell.run("fetch", NAME)
    assert code == 0, err
    assert f"bytes={CHUNK}-" in [span for _, where, span, _ in server.seen if where == "/content"]
    assert shell.path().read_bytes() == server.content


@needs_hub
def test_wrong_hash_leaves_nothing(shell, server):
    server.sha256 = "0" * 64
    found = hashlib.sha256(server.content).hexdigest()
    shell.refused("fetch", NAME, "--accept-licence", says=[found, server.sha256, "run the same command again"])
    assert list((shell.cache / "blobs").iterdir()) == [] and not (shell.cache / "snapshots").exists()
    shell.refused("path", NAME, says=["not on this machine"])


@needs_hub
def test_damaged_copy_is_found_and_replaced(shell, server):
    assert shell.run("fetch", NAME, "--accept-licence")[0] == 0
    with open(shell.path(), "r+b") as file:
        file.write(bytes(8))
    shell.refused("verify", NAME, says=["sha256 is", server.sha256, f"speed3r weights fetch {NAME}"])
    shell.refused("fetch", NAME, says=["HF_HUB_OFFLINE"], HF_HUB_OFFLINE="1")
    assert shell.run("fetch", NAME)[0] == 0
    assert shell.path().read_bytes() == server.content


@needs_hub
def test_copy_of_another_program_counts_even_offline(shell, server):
    for folder in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (shell.cache / folder).mkdir(parents=True)
    (shell.cache / "blobs" / server.sha256).write_bytes(server.content)
    (shell.cache / "refs" / "main").write_text(COMMIT)
    link = shell.cache / "snapshots" / COMMIT / "model.safetensors"
    link.symlink_to(f"../../blobs/{server.sha256}")
    code, _, err = shell.run("fetch", NAME, "--accept-licence", HF_HUB_OFFLINE="1")
    assert code == 0, err
    assert shell.path() == link and server.seen == []


@needs_hub
def test_two_at_once(shell, server):
    server.stall.set()
    with shell.start("fetch", NAME, "--accept-licence") as process:
        assert server.stalled.wait(30)
        shell.refused("fetch", NAME, says=["another process", "wait"])
        process.kill()


@needs_hub
@pytest.mark.parametrize("status, code", [(401, "GatedRepo"), (403, "GatedRepo"), (401, "RepoNotFound"), (403, "")])
def test_gated(shell, server, status, code):
    server.refusal = status, code
    name = "vggt-1b-commercial"
    page = "https://huggingface.co/facebook/VGGT-1B-Commercial"
    shell.refused("fetch", name, "--accept-licence", says=[f"HTTP {status}", page, "hf auth login"])


@needs_hub
@pytest.mark.parametrize(
    "refusal, says",
    [
        ((404, "RepoNotFound"), ["HTTP 404", REPOSITORY]),
        ((404, "EntryNotFound"), ["HTTP 404", "model.safetensors"]),
        ((503, ""), ["HTTP 503", "goes on where it stopped"]),
    ],
)
def test_hub_fails(shell, server, refusal, says):
    server.refusal = refusal
    shell.refused("fetch", NAME, "--accept-licence", says=says)


@needs_hub
def test_no_network(shell, server):
    accept = ("fetch", NAME, "--accept-licence")
    shell.refused(*accept, says=["HF_HUB_OFFLINE", NAME], HF_HUB_OFFLINE="1")
    assert server.seen == []
    nobody = "http://127.0.0.1:9"
    shell.refused("fetch", NAME, says=[nobody, "check the network"], HF_ENDPOINT=nobody)


@needs_hub
def test_no_room(shell, server, tmp_path):
    server.size = 10**18
    shell.refused("fetch", NAME, "--accept-licence", says=["needs 1000000000.00 GB", "are free", "HF_HOME"])
    assert {method for method, *_ in server.seen} == {"HEAD"}
    (tmp_path / "file").touch()
    blocked = str(tmp_path / "file")
    shell.refused("fetch", NAME, says=["file", "Not a directory", "HF_HOME"], HF_HOME=blocked)
    shell.refused(
        "fetch", "da3-base", "--accept-licence", says=["Not a directory", "XDG_CACHE_HOME"], XDG_CACHE_HOME=blocked
    )


@needs_hub
def test_other_size_than_published(shell, server):
    shell.refused("fetch", "da3-small", "--accept-licence", says=[str(server.size), "137248940", "update"])
    assert {method for method, *_ in server.seen} == {"HEAD"}


def test_without_the_library(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["weights", "fetch", NAME, "--accept-licence"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "speed3r weights: downloads need huggingface_hub: pip install 'huggingface_hub>=1,<3'"
    )
    assert f'"{hub.REQUIREMENT}"' in (ROOT / "setup.py").read_text()


def test_list(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    copied(tmp_path, "pi3", tmp_path / "model.safetensors", b"x")
    assert main(["weights", "list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines.keys() == CHECKPOINTS.keys() == registry.BACKBONES.keys()
    for name, checkpoint in CHECKPOINTS.items():
        assert checkpoint.hub in lines[name] and str(checkpoint.licence) in lines[name]
        assert ("~" in lines[name]) != checkpoint.exact
        assert ("fetched" in lines[name]) == (name == "pi3")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_sizes_fit_the_manifests(name):
    from test_backbones_checkpoints import MANIFESTS

    parameters = sum(torch.Size(shape).numel() for shape in manifest(MANIFESTS[name])[0].values())
    assert 0 <= CHECKPOINTS[name].size - 4 * parameters < 1e6 or not CHECKPOINTS[name].exact
    assert CHECKPOINTS[name].size == pytest.approx(4 * parameters, rel=2e-3)


def test_docs_list_every_checkpoint():
    text = (ROOT / "docs" / "weights.md").read_text()
    for name, checkpoint in CHECKPOINTS.items():
        size = hub.human(checkpoint.size)
        assert f"| `{name}` | {checkpoint.hub} | {'' if checkpoint.exact else '~'}{size} |" in text


# ------------------------------------------------------------------------------------------ local copies, no library


def copied(cache, name, path, content=None):
    """A record as `fetch` leaves it."""
    if content is not None:
        path.write_bytes(content)
    data = path.read_bytes()
    record = Record(
        CHECKPOINTS[name].licence.name, "now", str(path), len(data), hashlib.sha256(data).hexdigest(), COMMIT
    )
    file = cache / "speed3r" / "weights" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record.__dict__))


@pytest.fixture(params=["model.safetensors", "model.pt"])
def small(request, monkeypatch, tmp_path):
    """A backbone `small` whose checkpoint was fetched; gives its path and its tensors."""
    state = published(*tiny("pi3_tiny"))
    path = tmp_path / request.param
    write(path, state)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for table in (CHECKPOINTS, registry.BACKBONES):
        for name in list(table)[2:]:
            monkeypatch.delitem(table, name)
    size = path.stat().st_size
    monkeypatch.setitem(CHECKPOINTS, "small", Checkpoint("me/Small", CC_BY_NC, size, file=request.param))
    monkeypatch.setitem(registry.BACKBONES, "small", lambda: Pi3(Pi3Config(128, 2, 2, 5, 6, 5, 2, 64)))
    copied(tmp_path, "small", path)
    return path, state


def write(path, state):
    (save_file if path.suffix == ".safetensors" else torch.save)(state, path)


def refused(capsys, *arguments, says):
    assert main(["weights", *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    for part in says:
        assert part in err


def test_verify(small, capsys):
    path, _ = small
    assert main(["weights", "verify", "small"]) == 0
    out = capsys.readouterr().out
    assert hashlib.sha256(path.read_bytes()).hexdigest() in out and str(path) in out
    for given in (str(path), str(path.parent)):  # a local path instead of the name
        assert main(["weights", "verify", given]) == 0
        assert capsys.readouterr().out.endswith("fits small\n")
        assert main(["weights", "path", given]) == 0
        assert capsys.readouterr().out == f"{path}\n"
        assert main(["weights", "fetch", given]) == 0
        assert "nothing to fetch" in capsys.readouterr().out


def test_verify_names_what_is_wrong(small, capsys, tmp_path):
    path, state = small
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    refused(capsys, "verify", "small", says=[str(path), f"{len(whole) - 1} bytes", f"expected {len(whole)}", "fetch"])
    refused(capsys, "verify", str(path), says=[str(path), "truncated"])

    damaged = bytearray(whole)
    damaged[-1000] ^= 1
    path.write_bytes(damaged)
    hashes = [hashlib.sha256(data).hexdigest() for data in (whole, damaged)]
    refused(capsys, "verify", "small", says=[str(path), *hashes, "speed3r weights fetch small"])

    write(path, {**state, "camera_head.fc_t.bias": torch.zeros(7)})
    CHECKPOINTS["small"] = Checkpoint("me/Small", CC_BY_NC, path.stat().st_size)
    copied(tmp_path, "small", path)
    refused(capsys, "verify", "small", says=["'camera_head.fc_t.bias' is (7,) in the file but (3,)", "me/Small"])
    refused(capsys, "verify", str(path), says=[str(path), "fit none of pi3, pi3x, small"])

    path.unlink()
    for action in ("verify", "path"):
        refused(capsys, action, "small", says=[str(path), "is gone", "fetch small"])


@pytest.mark.parametrize("action", ["fetch", "verify", "path"])
def test_unknown_name(action, capsys):
    refused(capsys, action, "hal9000", says=["'hal9000'", *CHECKPOINTS])


def test_damaged_record(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    checkpoints.record_path(NAME).parent.mkdir(parents=True)
    for text in ("{", "[]", '{"other": 1}'):
        checkpoints.record_path(NAME).write_text(text)
        refused(capsys, "path", NAME, says=[str(checkpoints.record_path(NAME)), "delete it"])


def test_no_home_folder(monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-here/cache")
    for action in (["list"], ["path", NAME], ["verify", "~nobody-here/model.pt"]):
        refused(capsys, *action, says=["~nobody-here", "no such home folder", "set HOME"])


def test_files_that_cannot_be_read_are_no_matter_of_room(small, capsys, monkeypatch):
    def closed(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(weights_command, "sha256_of", closed)
    refused(capsys, "verify", "small", says=[f"{small[0]}: Permission denied\n"])


def test_another_licence_must_be_accepted_anew(small, capsys, monkeypatch):
    assert main(["weights", "fetch", "small"]) == 0
    capsys.readouterr()
    monkeypatch.setitem(CHECKPOINTS, "small", Checkpoint("me/Small", APACHE, CHECKPOINTS["small"].size))
    refused(capsys, "fetch", "small", says=["Apache-2.0", "--accept-licence"])


def test_load_by_name(small, caplog, monkeypatch):
    path, state = small
    for given in (None, path):
        caplog.clear()
        model = registry.load_backbone("small", given)
        torch.testing.assert_close(model.state_dict()["camera_head.fc_t.bias"], state["camera_head.fc_t.bias"])
        assert caplog.messages == [f"weights small are under CC BY-NC 4.0, non-commercial use only ({CC_BY_NC.url})"]
    monkeypatch.setitem(CHECKPOINTS, "small", Checkpoint("me/Small", APACHE, 1))
    caplog.clear()
    registry.load_backbone("small")
    assert caplog.messages == []
    with pytest.raises(ValueError, match="pi3 are not on this machine; run `speed3r weights fetch pi3`"):
        registry.load_backbone("pi3")


def test_notices():
    silent = {name for name in CHECKPOINTS if not checkpoints.notice(name)}
    assert silent == {"da3-small", "da3-base", "da3-metric", "da3-mono"}
    for name in CHECKPOINTS.keys() - silent - {"vggt-1b-commercial"}:
        assert "non-commercial use only" in checkpoints.notice(name) and "\n" not in checkpoints.notice(name)
    assert "no military use" in checkpoints.notice("vggt-1b-commercial")


def test_interrupt_is_one_line(monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(weights_command, "verify", interrupt)
    assert main(["weights", "verify", "pi3"]) == 130
    assert capsys.readouterr().err.count("\n") == 1
