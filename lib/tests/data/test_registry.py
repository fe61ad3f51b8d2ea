"""The registry against a publisher on this machine that behaves well, badly, or not at all."""

import hashlib
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from compendium.data import registry as module
from compendium.data.registry import DataError, Registry, read_registry

CONTENT = bytes(range(256)) * 1024  # 256 KiB
HEADER = "dataset,file,bytes,sha256,licence,url\n"


class Publisher(ThreadingHTTPServer):
    """Serves CONTENT; `self.asked` holds the path and Range of every request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = []

    def handle_error(self, request, client_address):
        pass


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def answer(self, status, body, length=None, headers=()):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for header in headers:
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def do_GET(self):
        wanted = self.headers.get("Range")
        self.server.asked.append((self.path, wanted))
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        tries = len([path for path, _ in self.server.asked if path == self.path])
        match self.path.strip("/").split("/")[0]:
            case "good":
                self.answer(206 if wanted else 200, CONTENT[start:])
            case "breaks_once" if tries == 1:
                self.answer(200, CONTENT[:100_000], length=len(CONTENT))
            case "breaks_once":
                self.answer(206, CONTENT[start:])
            case "breaks_always":
                status = 206 if wanted else 200
                self.answer(status, CONTENT[start : start + 40_000], length=len(CONTENT) - start)
            case "breaks_once_no_ranges":
                self.answer(200, CONTENT[: 100_000 if tries == 1 else None], length=len(CONTENT))
            case "busy_once":
                self.answer(503 if tries == 1 else 200, b"" if tries == 1 else CONTENT)
            case "truncated":
                self.answer(200, CONTENT[:1000])
            case "long":
                self.answer(200, CONTENT + b"more")
            case "slow":
                time.sleep(0.5)
                self.answer(200, CONTENT)
            case "endless":
                self.send_response(200)
                self.end_headers()
                for self.server.sent in range(0, 400 * len(CONTENT), len(CONTENT)):
                    self.wfile.write(CONTENT)
            case "altered":
                self.answer(200, CONTENT[::-1])
            case _:
                self.answer(404, b"gone")


@pytest.fixture
def publisher(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Publisher()
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    ).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def shelf(publisher, tmp_path):
    """Makes a registry of one file, `toy/<behaviour>.bin`, over the cache `tmp_path/cache`."""

    def make(behaviour, port=publisher.server_port):
        sha256 = hashlib.sha256(CONTENT).hexdigest()
        address = f"http://127.0.0.1:{port}/{behaviour}/file"
        listing = tmp_path / "registry.csv"
        listing.write_text(
            HEADER + f"toy,toy/{behaviour}.bin,{len(CONTENT)},{sha256},ours,{address}\n"
        )
        return Registry(listing, root=tmp_path / "cache")

    return make


def left_in(cache):
    """Everything in the cache but its lock."""
    return sorted(
        path.name
        for path in cache.rglob("*")
        if path.name != ".lock" and (path.is_symlink() or not path.is_dir())
    )


def test_fetch_downloads_once_and_verifies(shelf, publisher):
    registry = shelf("good")
    assert registry.verify("toy") == {"good.bin": "is absent"}
    path = registry.fetch("toy", progress=False)["good.bin"]
    assert path == registry.root / "toy/good.bin" and path.read_bytes() == CONTENT
    assert path.stat().st_mode & 0o044, "others on this machine cannot read the file"
    assert registry.fetch("toy", progress=False) == {"good.bin": path}
    assert registry.verify("toy") == {"good.bin": None}
    assert publisher.asked == [("/good/file", None)]
    assert left_in(registry.root) == ["good.bin"]


def test_progress_bar_counts_bytes(shelf, capsys):
    shelf("breaks_once").fetch("toy")
    assert "262k/262k" in capsys.readouterr().err


def test_broken_connection_is_resumed(shelf, publisher):
    registry = shelf("breaks_once")
    assert registry.fetch("toy", progress=False)["breaks_once.bin"].read_bytes() == CONTENT
    (_, first), (_, second) = publisher.asked
    assert first is None and 0 < int(second.removeprefix("bytes=").rstrip("-")) <= 100_000
    assert left_in(registry.root) == ["breaks_once.bin"]


def test_resume_without_ranges_starts_again(shelf, publisher):
    registry = shelf("breaks_once_no_ranges")
    assert (
        registry.fetch("toy", progress=False)["breaks_once_no_ranges.bin"].read_bytes() == CONTENT
    )
    assert publisher.asked[1][1] is not None


def test_partial_download_survives_and_is_continued_by_the_next_call(shelf, publisher):
    registry = shelf("breaks_always")
    with pytest.raises(
        DataError, match=r"cannot download 'toy/breaks_always.bin': the connection broke"
    ):
        registry.fetch("toy", progress=False)
    assert len(publisher.asked) == module.ATTEMPTS
    digest = hashlib.sha256(CONTENT).hexdigest()
    part = registry.root / ".partial" / digest
    already = part.stat().st_size
    assert left_in(registry.root) == [digest] and 0 < already < len(CONTENT)
    assert part.read_bytes() == CONTENT[:already]
    assert shelf("good").fetch("toy", progress=False)["good.bin"].read_bytes() == CONTENT
    assert publisher.asked[-1] == ("/good/file", f"bytes={already}-")
    assert left_in(registry.root) == ["good.bin"]


def test_wrong_piece_is_not_trusted(shelf):
    registry = shelf("good")
    part = registry.root / ".partial" / hashlib.sha256(CONTENT).hexdigest()
    part.parent.mkdir(parents=True)
    part.write_bytes(b"wrong beginning")
    with pytest.raises(DataError, match="another checksum"):
        registry.fetch("toy", progress=False)
    assert left_in(registry.root) == []
    assert registry.fetch("toy", progress=False)["good.bin"].read_bytes() == CONTENT


def test_busy_server_is_asked_again(shelf, publisher):
    shelf("busy_once").fetch("toy", progress=False)
    assert len(publisher.asked) == 2


@pytest.mark.parametrize(
    ("behaviour", "sentence"),
    [
        ("altered", "cannot use 'toy/altered.bin': what http.* sent has another checksum"),
        ("truncated", "'toy/truncated.bin': the server sent 1,000 bytes instead of 262,144"),
        ("long", "'toy/long.bin': the server sent more bytes instead of 262,144"),
        ("missing", "'toy/missing.bin': the server answered 404 Not Found for http"),
    ],
)
def test_bad_answers_are_one_sentence_and_leave_nothing(shelf, publisher, behaviour, sentence):
    registry = shelf(behaviour)
    with pytest.raises(DataError, match=sentence) as error:
        registry.fetch("toy", progress=False)
    assert "\n" not in str(error.value)
    assert len(publisher.asked) == 1, "a wrong answer is not asked for again"
    assert left_in(registry.root) == []
    assert not (registry.root / "toy").exists()


def test_no_network(shelf, publisher):
    registry = shelf("good", port=1)
    with pytest.raises(DataError, match=r"no connection to 127.0.0.1:1; .*COMPENDIUM_DATA"):
        registry.fetch("toy", progress=False)
    assert left_in(registry.root) == []


@pytest.mark.parametrize(
    ("damaged", "problem"),
    [
        (CONTENT[:-1], "has 262,143 bytes instead of 262,144"),
        (CONTENT[::-1], "has a wrong checksum"),
    ],
)
def test_damaged_copy_is_never_used(shelf, damaged, problem):
    registry = shelf("good", port=1)
    path = registry.root / "toy/good.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(damaged)
    assert registry.verify("toy") == {"good.bin": problem}
    with pytest.raises(DataError, match="no connection"):
        registry.fetch("toy", progress=False)
    assert shelf("good").fetch("toy", progress=False)["good.bin"].read_bytes() == CONTENT


def test_ready_made_cache_is_not_written(shelf, publisher):
    registry = shelf("good", port=1)
    path = registry.root / "toy/good.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    before = sorted(registry.root.rglob("*")), registry.root.stat().st_mtime_ns
    registry.fetch("toy")
    registry.verify("toy")
    assert (sorted(registry.root.rglob("*")), registry.root.stat().st_mtime_ns) == before


def test_checksum_is_computed_once_and_again_after_a_change(shelf, monkeypatch):
    registry = shelf("good")
    path = registry.fetch("toy", progress=False)["good.bin"]
    computed = []
    original = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *a: computed.append(1) or original(*a))
    module._sha256.cache_clear()
    registry.fetch("toy")
    registry.fetch("toy")
    assert len(computed) == 1
    path.write_bytes(CONTENT[::-1])
    os.utime(path, ns=(1, 1))
    assert registry.verify("toy") == {"good.bin": "has a wrong checksum"}


def test_full_disk(shelf):
    registry = shelf("good")
    part = registry.root / ".partial" / hashlib.sha256(CONTENT).hexdigest()
    part.parent.mkdir(parents=True)
    part.symlink_to("/dev/full")
    with pytest.raises(
        DataError, match=r"toy/good.bin is absent and cannot be written to .*: No space left"
    ):
        registry.fetch("toy", progress=False)
    assert left_in(registry.root) == []


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX permissions")
def test_cache_that_cannot_be_written(shelf, tmp_path):
    registry = shelf("good")
    if os.geteuid():
        registry.root.mkdir()
        registry.root.chmod(0o500)
    else:  # permissions do not bind the superuser, a file in place of the folder does
        registry.root.write_text("")
    with pytest.raises(DataError, match=r"is absent|cannot be read") as error:
        registry.fetch("toy", progress=False)
    assert "cannot be written to" in str(error.value) and "COMPENDIUM_DATA" in str(error.value)


def test_two_readers_at_once_download_once(shelf, publisher):
    registry = shelf("slow")
    with ThreadPoolExecutor(2) as pool:
        fetched = [pool.submit(registry.fetch, "toy", progress=False) for _ in range(2)]
    assert [f.result()["slow.bin"].read_bytes() == CONTENT for f in fetched] == [True, True]
    assert len(publisher.asked) == 1


def test_endless_answer_is_cut_off(shelf, publisher):
    registry = shelf("endless")
    with pytest.raises(DataError, match="the server sent more bytes instead of 262,144"):
        registry.fetch("toy", progress=False)
    assert left_in(registry.root) == []
    assert publisher.sent < 100 * len(CONTENT)


def test_unknown_names():
    registry = Registry()
    with pytest.raises(
        DataError, match=r"^dataset 'weibo' is unknown; did you mean 'weibo_ner'\?$"
    ):
        registry.fetch("weibo")
    with pytest.raises(
        DataError, match=r"file of tiny_shakespeare 'input' is unknown; did you mean 'input.txt'\?"
    ):
        registry.fetch("tiny_shakespeare", ["input"])


GOOD = f"toy,toy/a.txt,1,{'0' * 64},ours,https://example.org/a.txt"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (GOOD.replace("toy/a.txt", "toy/../../a.txt"), "does not lie in folder 'toy'"),
        (GOOD.replace("toy/a.txt", "/etc/a.txt"), "does not lie in folder 'toy'"),
        (GOOD.replace("toy/a.txt", "other/a.txt"), "does not lie in folder 'toy'"),
        (GOOD.replace(",1,", ",one,"), "size 'one' is not a number of bytes"),
        (GOOD.replace("0" * 64, "0" * 63), "is not a sha256"),
        (GOOD.replace("https://", "file://"), "is neither http nor https"),
        ("toy,toy/a.txt,1", "needs the 6 fields"),
        (GOOD + ",more", "needs the 6 fields"),
    ],
)
def test_malformed_registry_line(tmp_path, line, problem):
    listing = tmp_path / "registry.csv"
    listing.write_text(f"{HEADER}{GOOD}\n{line}\n")
    with pytest.raises(DataError, match=rf"registry\.csv:3: .*{problem}"):
        read_registry(listing)
    listing.write_text("name,file\n")
    with pytest.raises(DataError, match=r"registry\.csv:1: the header"):
        read_registry(listing)


def test_registry_of_the_package():
    registry = Registry()
    assert len(registry.datasets) == 64
    assert sum(len(info.files) for info in registry.datasets.values()) == 1175
    addresses = [file.url for info in registry.datasets.values() for file in info.files]
    assert len(set(addresses)) == len(addresses)
    assert module.datasets_available() == sorted(registry.datasets)
    weibo = module.info("weibo_ner")
    assert (weibo.bytes, weibo.licence) == (750_687, "CC BY-SA 3.0")


def test_cache_root(monkeypatch, tmp_path):
    monkeypatch.setenv("COMPENDIUM_DATA", str(tmp_path))
    assert module.cache_root() == module.default_registry().root == tmp_path
    monkeypatch.delenv("COMPENDIUM_DATA")
    assert module.cache_root().parts[-2:] == ("compendium", "data")


def test_cached_files_of_this_machine():
    """Every registered file that lies in this machine's cache has the registered checksum."""
    present = {
        f"{name}/{file}": problem
        for name in module.datasets_available()
        for file, problem in module.verify(name).items()
        if problem != "is absent"
    }
    if not present:
        pytest.skip("no registered file is in the cache; set COMPENDIUM_DATA to a folder with data")
    assert not {file: problem for file, problem in present.items() if problem}


def test_import_is_light():
    program = "import sys, compendium.data.registry as r; r.info('genia'); print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    heavy = {"torch", "datasets", "requests", "pooch", "numpy", "pandas", "tqdm"}
    assert not heavy & set(loaded.stdout.split())
