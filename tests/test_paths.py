"""Files here and objects of a bucket: the same answers, whole or not at all, and one sentence."""

import os
import socket
import time

import pytest

from ada_jax import paths
from ada_jax.errors import UserError
from ada_jax.report import figures


@pytest.fixture(params=["here", pytest.param("in a bucket", marks=pytest.mark.slow)])
def folder(request, tmp_path):
    """A folder of either kind."""
    if request.param == "here":
        return str(tmp_path)
    return request.getfixturevalue("cloud").folder()


def test_files_and_objects_answer_alike(folder):
    path = f"{folder}/a/b.txt"
    assert not paths.exists(path) and not paths.is_dir(f"{folder}/a")
    with pytest.raises(FileNotFoundError):
        paths.read(path)
    paths.make_folder(f"{folder}/a")
    for content in ("first", "zweite Fassung, größer\n"):
        paths.write(path, content)
        assert paths.read(path).decode() == content
    assert paths.exists(path) and paths.is_dir(f"{folder}/a") and not paths.is_dir(path)
    assert [str(p) for p in paths.glob(f"{folder}/a", "b*")] == [path]
    with paths.local_copy(path) as copy, open(copy) as file:
        assert file.read() == content


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a"
    paths.write(path, "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        paths.write(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_a_local_journal_has_every_line_at_once(tmp_path):
    journal = paths.Journal(tmp_path / "a", "1\n")
    journal.write("2\n")
    assert (tmp_path / "a").read_text() == "1\n2\n"
    journal.close()


def test_a_journal_in_a_bucket_is_sent_when_asked_and_now_and_then(cloud, monkeypatch):
    path = f"{cloud.folder()}/a"
    journal = paths.Journal(path, "0\n")
    before = len(cloud.calls)
    for i in range(1, 100):
        journal.write(f"{i}\n")
    assert len(cloud.calls) == before and cloud.content(path) == b"0\n"
    journal.flush()
    assert cloud.content(path).split() == [b"%d" % i for i in range(100)]
    sent = len(cloud.calls)
    journal.flush()
    assert len(cloud.calls) == sent
    monkeypatch.setattr(paths, "_JOURNAL_SECONDS", 0)
    journal.write("100\n")
    assert cloud.content(path).endswith(b"99\n100\n")
    journal.close()


@pytest.mark.parametrize("path", ["gs://nowhere/run", "gs://secret/run", "gs://", "gs://Ü/run"])
def test_a_bucket_that_cannot_be_used_costs_one_sentence(cloud, path):
    with pytest.raises(UserError, match=f"^--workdir={path} cannot be used, .* exists.*[.]$"):
        paths.check_bucket(f"--workdir={path}", path)
    paths.check_bucket("a good one", "gs://bucket/run")
    paths.check_bucket("a local one", "runs/a")


def test_a_bucket_that_never_answers_is_given_up(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(paths, "_ANSWER_SECONDS", 2)
        started = time.monotonic()
        with pytest.raises(UserError, match="no answer within 2 seconds"):
            paths.check_bucket("--workdir=gs://silent/run", "gs://silent/run")
        assert time.monotonic() - started < 10


def test_mapped_files_stay_local():
    with pytest.raises(UserError, match=r"^--out=gs://b/a is in a bucket, .*[.]$"):
        paths.local("--out=gs://b/a", "gs://b/a")
    assert paths.local("--out=~", "~") == paths.pathlib.Path.home()


def test_pictures_go_into_buckets(cloud):
    path = f"{cloud.folder()}/a.png"
    figures.severity_curves(path, {"x": {"fog": [1.0] * 5}}, order=("fog",))
    assert cloud.content(path).startswith(b"\x89PNG")


def test_the_home_folder_is_found_by_every_function(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    paths.make_folder("~/a")
    paths.write("~/a/b", "text")
    assert paths.read("~/a/b") == b"text" == (tmp_path / "home/a/b").read_bytes()
    assert paths.exists("~/a/b") and paths.is_dir("~/a")
    assert paths.glob("~/a", "*") == [tmp_path / "home/a/b"]
    with paths.local_copy("~/a/b") as copy:
        assert copy == str(tmp_path / "home/a/b")
    paths.Journal("~/a/c", "1\n").close()
    assert (tmp_path / "home/a/c").read_text() == "1\n"
    assert os.listdir(tmp_path) == ["home"]


def test_names_that_are_no_utf_8_are_written_as_text(tmp_path):
    paths.write(tmp_path / "page", os.fsdecode(b"caf\xe9 \xc3\xbc"))
    assert (tmp_path / "page").read_text() == "caf\\udce9 \u00fc"


def test_names_that_are_patterns_are_refused_in_buckets():
    with pytest.raises(UserError, match=r"^--workdir=gs://b/run\[a\] holds '\[', .*rename it[.]$"):
        paths.check_bucket("--workdir=gs://b/run[a]", "gs://b/run[a]")


def test_a_full_disk_names_the_file_and_keeps_what_was_there(small_disk):
    paths.write(small_disk / "a", "old")
    journal = paths.Journal(small_disk / "log", "1\n")
    for write in (
        lambda: paths.write(small_disk / "a", bytes(10**6)),
        lambda: [journal.write("line\n" * 1000) for _ in range(1000)],
    ):
        with pytest.raises(OSError, match=r"No space left on device: .*/(a|log)'$"):
            write()
    assert paths.read(small_disk / "a") == b"old"
    assert sorted(os.listdir(small_disk)) == ["a", "log"]
