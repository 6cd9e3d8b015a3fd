"""Teacher maps come back exactly or not at all, whatever lies in their folder and whatever interrupts the writing."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fkd_med.distillation.teacher_maps import TeacherMaps, maps_bytes, write_maps
from fkd_med.errors import RunError
from fkd_med.files import remove_leftovers
from slowly import slow_but

KEY = "0123abcd"
IDS = ["a", "b", "with spaces", "Köln/眼底 7.png", "../../up"]
SHAPES = {"logits": (2, 8, 8), "encoder.layer4": (5, 3, 2)}

HALF = np.float16

Answer = tuple[str, dict[str, np.ndarray]]


def answers(ids: list[str] = IDS, seed: int = 0) -> list[Answer]:
    """Random float32 maps of each image."""
    draw = np.random.default_rng(seed)
    return [(id, {tap: draw.normal(size=s).astype(np.float32) for tap, s in SHAPES.items()}) for id in ids]


def written(folder: Path, key: str = KEY, seed: int = 0) -> TeacherMaps:
    return write_maps(folder, key, {"teacher": "site-a"}, IDS, SHAPES, answers(seed=seed))


def assert_holds(maps: TeacherMaps | None, expected: list[Answer]) -> None:
    assert maps is not None
    for id, by_tap in expected:
        read = maps.read(id)
        assert list(read) == list(by_tap)
        for tap, values in by_tap.items():
            np.testing.assert_array_equal(read[tap], values.astype(np.float16))
            assert read[tap].dtype == np.float16


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file may grow beyond `size`: a write in the middle fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- reading ------------------------------------------------------------------------------------------------------


def test_maps_come_back_by_id_in_any_order(tmp_path: Path) -> None:
    expected = answers()
    for maps in (written(tmp_path / "maps"), TeacherMaps.open(tmp_path / "maps", KEY)):
        assert maps is not None
        assert_holds(maps, expected[::-1])
        assert_holds(maps, [expected[i] for i in (2, 0, 2, 4)])
        assert maps.taps == tuple(SHAPES)
        assert maps.folder == tmp_path / "maps"
        assert len(maps) == len(IDS)
        assert "b" in maps
        assert "c" not in maps
        with pytest.raises(KeyError, match="'c'"):
            maps.read("c")


def test_answers_may_come_in_any_order(tmp_path: Path) -> None:
    write_maps(tmp_path / "maps", KEY, {}, IDS, SHAPES, iter(answers()[::-1]))
    assert_holds(TeacherMaps.open(tmp_path / "maps", KEY), answers())


def test_float16_is_exact_and_larger_values_are_clamped(tmp_path: Path) -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    finite = np.where(np.isfinite(every), every, 0).reshape(1, 256, 256)
    beyond = np.array([1e30, -1e30, np.inf, -np.inf, 65520, -65520, 1e-30, 1]).reshape(1, 2, 4)
    write_maps(
        tmp_path / "m", KEY, {}, ["x"], {"t": (1, 256, 256), "u": (1, 2, 4)}, [("x", {"t": finite, "u": beyond})]
    )
    read = TeacherMaps(tmp_path / "m").read("x")
    assert read["t"].astype(np.float32).tobytes() == finite.tobytes()  # -0.0 too
    assert read["u"].ravel().tolist() == [65504, -65504, 65504, -65504, 65504, -65504, 0, 1]


def test_what_is_read_is_a_copy(tmp_path: Path) -> None:
    maps = written(tmp_path / "maps")
    maps.read("a")["logits"][:] = 7
    assert_holds(maps, answers())
    assert maps.read("a")["logits"].flags.owndata


def test_files_are_ordinary_numpy_and_the_index_says_what_they_are(tmp_path: Path) -> None:
    written(tmp_path / "maps")
    index = json.loads((tmp_path / "maps" / "maps.json").read_text())
    assert (index["key"], index["ids"], index["description"]) == (KEY, IDS, {"teacher": "site-a"})
    assert [(tap["name"], tuple(tap["shape"])) for tap in index["taps"]] == list(SHAPES.items())
    for tap in index["taps"]:
        path = tmp_path / "maps" / tap["file"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == tap["sha256"]
        array = np.load(path, allow_pickle=False)
        np.testing.assert_array_equal(array, np.stack([a[tap["name"]] for _, a in answers()]).astype(np.float16))
    assert sorted(os.listdir(tmp_path / "maps")) == sorted(["maps.json", *(tap["file"] for tap in index["taps"])])


def test_bytes_are_those_of_float16() -> None:
    assert maps_bytes(3, {"a": (1, 256, 256), "b": (2, 3, 4)}) == 3 * (131072 + 48)


def test_a_copy_for_another_process_carries_the_path_only(tmp_path: Path) -> None:
    maps = written(tmp_path / "maps")
    maps.read("a")
    text = pickle.dumps(maps)
    assert len(text) < 300 + len(os.fspath(tmp_path))
    assert_holds(pickle.loads(text), answers())
    assert_holds(copy.deepcopy(maps), answers())


def _read_into(maps: TeacherMaps, queue: Any) -> None:
    queue.put({id: maps.read(id) for id in IDS})


@pytest.mark.parametrize("method", slow_but(["fork"], ["fork", "spawn"]))
def test_other_processes_read_the_same(tmp_path: Path, method: Any) -> None:
    maps = written(tmp_path / "maps")
    maps.read("b")  # a fork then inherits the mapping
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    workers = [context.Process(target=_read_into, args=(maps, queue)) for _ in range(2 if method == "fork" else 1)]
    for worker in workers:
        worker.start()
    for _ in workers:
        read = queue.get(timeout=60)
        assert all(np.array_equal(read[id][tap], a[tap].astype(np.float16)) for id, a in answers() for tap in SHAPES)
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0


def test_a_reader_keeps_its_maps_when_the_folder_is_rewritten_or_removed(tmp_path: Path) -> None:
    maps = written(tmp_path / "maps")
    maps.read("a")
    written(tmp_path / "maps", seed=1)
    assert_holds(maps, answers(seed=0))
    assert_holds(TeacherMaps.open(tmp_path / "maps", KEY), answers(seed=1))
    late = TeacherMaps(tmp_path / "maps")
    shutil.rmtree(tmp_path / "maps")
    with pytest.raises(RunError, match=r"maps.*Run again"):
        late.read("a")


def test_a_folder_rewritten_between_opening_and_reading_is_noticed(tmp_path: Path) -> None:
    written(tmp_path / "maps")
    maps = TeacherMaps.open(tmp_path / "maps", KEY)
    assert maps is not None
    written(tmp_path / "maps", key="other", seed=1)
    with pytest.raises(RunError, match="changed"):
        maps.read("a")


def test_a_file_cut_after_opening_is_an_error_and_not_the_end_of_the_process(tmp_path: Path) -> None:
    written(tmp_path / "maps")
    maps = TeacherMaps.open(tmp_path / "maps", KEY)
    assert maps is not None
    os.truncate(tmp_path / "maps" / "tap-0.npy", 500)
    with pytest.raises(RunError, match="Run again"):
        maps.read("a")


# --- what open refuses, and write replaces ------------------------------------------------------------------------


def _reindex(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change maps.json as somebody would who can compute its checksum."""
    record = json.loads((folder / "maps.json").read_text())
    del record["sha256"]
    change(record)
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    (folder / "maps.json").write_text(json.dumps({**record, "sha256": digest}))


def _rearray(folder: Path, array: np.ndarray, allow_pickle: bool = False) -> None:
    """Put another array in a tap's place, its checksum made to fit."""
    path = folder / "tap-0.npy"
    np.save(path, array, allow_pickle=allow_pickle)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    _reindex(folder, lambda record: record["taps"][0].update(sha256=digest))


def _cut_knowingly(folder: Path) -> None:
    os.truncate(folder / "tap-0.npy", 700)
    digest = hashlib.sha256((folder / "tap-0.npy").read_bytes()).hexdigest()
    _reindex(folder, lambda record: record["taps"][0].update(sha256=digest))


def _without_channels(folder: Path) -> None:
    _rearray(folder, np.zeros((5, 0, 8, 8), HALF))
    _reindex(folder, lambda record: record["taps"][0].update(shape=[0, 8, 8]))


class _Bomb:
    """Unpickling it makes the file named ``exploded`` in the current folder."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("exploded",)


def _cut(size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / "tap-0.npy", size)


def _flip(name: str, position: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[position] ^= 1
        (folder / name).write_bytes(data)

    return damage


def _index_text(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "maps.json").write_text(text)


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _file_instead(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("somebody's notes")


def _link_to_nowhere(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to("nowhere")


def _fifo(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def _traversal(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(folder / "tap-0.npy", folder / name)  # the right bytes, in the wrong place
        _reindex(folder, lambda record: record["taps"][0].update(file=name))

    return damage


def _with(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: _reindex(folder, lambda record: record.update(changes))


def _with_tap(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: _reindex(folder, lambda record: record["taps"][0].update(changes))


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "nothing there": shutil.rmtree,
    "an empty folder": _emptied,
    "a file": _file_instead,
    "a broken link": _link_to_nowhere,
    "no index": lambda folder: (folder / "maps.json").unlink(),
    "a tap missing": lambda folder: (folder / "tap-1.npy").unlink(),
    "a folder as tap": lambda folder: ((folder / "tap-1.npy").unlink(), (folder / "tap-1.npy").mkdir()),
    "a pipe as tap": _fifo("tap-1.npy"),
    "a pipe as index": _fifo("maps.json"),
    "cut to nothing": _cut(0),
    "cut in the magic": _cut(5),
    "cut in the header": _cut(60),
    "cut after the header": _cut(128),
    "cut in the middle": _cut(700),
    "cut by one byte": _cut(128 + maps_bytes(5, {"logits": (2, 8, 8)}) - 1),
    "cut, and its checksum made to fit": _cut_knowingly,
    "grown": _cut(128 + maps_bytes(5, {"logits": (2, 8, 8)}) + 2),
    "a byte of a map": _flip("tap-0.npy", 700),
    "the last byte": _flip("tap-1.npy", -1),
    "a byte of the header": _flip("tap-0.npy", 20),
    "a byte of an id": lambda folder: _index_text((folder / "maps.json").read_text().replace('"a"', '"A"'))(folder),
    "a byte of the index": _flip("maps.json", 3),
    "index cut": lambda folder: os.truncate(folder / "maps.json", 100),
    "index empty": _index_text(""),
    "index binary": lambda folder: (folder / "maps.json").write_bytes(bytes(range(256))),
    "index a list": _index_text("[1, 2]"),
    "index a number": _index_text("7"),
    "index null": _index_text("null"),
    "index an empty dict": _index_text("{}"),
    "index deep": _index_text("[" * 100_000),
    "index a huge number": _index_text("1" * 10_000),
    "another key": _with(key="other"),
    "a key that is no text": _with(key=[KEY]),
    "another version": _with(version=2),
    "another format": _with(format="somebody's maps"),
    "ids no list": _with(ids=5),
    "ids no texts": _with(ids=[1, 2, 3, 4, {}]),
    "ids doubled": _with(ids=["a", "a", "b", "c", "d"]),
    "ids missing": _with(ids=IDS[:-1]),
    "no ids": _with(ids=[]),
    "taps no list": _with(taps=7),
    "no taps": _with(taps=[]),
    "taps of texts": _with(taps=["tap-0.npy"]),
    "tap with more keys": _with_tap(evil=1),
    "tap without shape": _with_tap(shape=None),
    "tap of two sides": _with_tap(shape=[16, 8]),
    "tap of other sides": _with_tap(shape=[1, 16, 8]),
    "tap of negative sides": _with_tap(shape=[-2, -8, 8]),
    "tap of huge sides": _with_tap(shape=[10**4000, 8, 8]),
    "tap of fractions": _with_tap(shape=[2.0, 8.0, 8.0]),
    "tap names doubled": _with_tap(name="encoder.layer4"),
    "tap name no text": _with_tap(name={}),
    "checksum no text": _with_tap(sha256=7),
    "upwards": _traversal("../../x.npy"),
    "upwards and back": _with_tap(file="../maps/tap-0.npy"),
    "below": _traversal("deep/tap-0.npy"),
    "absolute": _with_tap(file="/etc/hostname"),
    "the other tap's": _with_tap(file="tap-1.npy"),
    "array of another shape": lambda folder: _rearray(folder, np.zeros((5, 2, 4, 16), HALF)),
    "array without channels": _without_channels,
    "array of another type": lambda folder: _rearray(folder, np.zeros((5, 2, 8, 8), np.int16)),
    "array in Fortran order": lambda folder: _rearray(folder, np.asfortranarray(np.zeros((5, 2, 8, 8), HALF))),
    "array big-endian": lambda folder: _rearray(folder, np.zeros((5, 2, 8, 8), ">f2")),
    "array of objects": lambda folder: _rearray(folder, np.array([_Bomb()], dtype=object), allow_pickle=True),
    "a bare pickle": lambda folder: (folder / "tap-0.npy").write_bytes(pickle.dumps(_Bomb())),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_anything_else_is_not_opened_and_is_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "store" / "maps"
    written(folder)
    DAMAGES[damage](folder)
    assert TeacherMaps.open(folder, KEY) is None
    assert not (tmp_path / "exploded").exists()
    beside = set(os.listdir(folder.parent)) - {"maps"}
    written(folder, seed=1)
    assert_holds(TeacherMaps.open(folder, KEY), answers(seed=1))
    assert set(os.listdir(folder.parent)) - {"maps"} == beside
    assert sorted(os.listdir(folder)) == ["maps.json", "tap-0.npy", "tap-1.npy"]
    assert not (tmp_path / "exploded").exists()


def test_the_bomb_of_these_tests_does_explode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "maps")
    DAMAGES["array of objects"](tmp_path / "maps")
    np.load(tmp_path / "maps" / "tap-0.npy", allow_pickle=True)
    assert (tmp_path / "exploded").exists()


def test_changing_the_index_rightly_is_no_damage(tmp_path: Path) -> None:
    written(tmp_path / "maps")
    _with(description={"other": [1.5, None]}, key="next")(tmp_path / "maps")
    assert_holds(TeacherMaps.open(tmp_path / "maps", "next"), answers())


def test_every_cut_and_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    write_maps(folder, KEY, {"a": 1}, ["x", "y"], {"t": (1, 2, 2)}, [(id, {"t": np.ones((1, 2, 2))}) for id in "xy"])
    for path in folder.iterdir():
        whole = path.read_bytes()
        for position in range(len(whole) - (path.name == "maps.json")):  # the last newline says nothing
            flipped = whole[:position] + bytes([whole[position] ^ 2]) + whole[position + 1 :]
            for data in (whole[:position], flipped):
                path.write_bytes(data)
                assert TeacherMaps.open(folder, KEY) is None, (path, position)
        path.write_bytes(whole)
    assert TeacherMaps.open(folder, KEY) is not None


# --- writing ------------------------------------------------------------------------------------------------------


def _fails_at_third(error: BaseException) -> Iterator[Answer]:
    yield from answers()[:2]
    raise error


@pytest.mark.parametrize(
    "error", [RuntimeError("cuda"), KeyboardInterrupt(), OSError(errno.EIO, "an image"), SystemExit(3)], ids=repr
)
@pytest.mark.parametrize("before", ["nothing", "maps of another key"])
def test_an_error_among_the_answers_passes_and_leaves_all_as_it_was(
    tmp_path: Path, error: BaseException, before: str
) -> None:
    written(tmp_path / "store" / "other")
    if before != "nothing":
        written(tmp_path / "store" / "maps", key="older")
    was = contents(tmp_path)
    with pytest.raises(type(error)) as caught:
        write_maps(tmp_path / "store" / "maps", KEY, {}, IDS, SHAPES, _fails_at_third(error))
    assert caught.value is error
    assert contents(tmp_path) == was
    assert sorted(os.listdir(tmp_path / "store")) == (["other"] if before == "nothing" else ["maps", "other"])


def _changed(tap: str, values: np.ndarray | None) -> list[Answer]:
    changed = answers()
    changed[3][1].pop(tap, None)
    if values is not None:
        changed[3][1][tap] = values
    return changed


WRONG: dict[str, tuple[list[Answer], str]] = {
    "one missing": (answers()[:-1], r"no answer .*'../../up'"),
    "none": ([], "no answer .*'a'"),
    "an unknown one": ([*answers()[:3], ("stranger", answers()[3][1])], "'stranger'"),
    "one twice": ([*answers()[:3], answers()[1]], "'b' was answered twice"),
    "one too many at the end": ([*answers(), answers()[1]], "'b' was answered twice"),
    "a tap missing": (_changed("logits", None), "Köln.*logits"),
    "a tap too many": (_changed("extra", np.zeros((1, 1, 1))), "Köln.*extra"),
    "another shape": (_changed("logits", np.zeros((2, 8, 7))), r"Köln.*'logits'.*\(2, 8, 7\)"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_answers_that_were_not_asked_for_are_refused(tmp_path: Path, wrong: str) -> None:
    given, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        write_maps(tmp_path / "maps", KEY, {}, IDS, SHAPES, given)
    assert os.listdir(tmp_path) == []


def test_nothing_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 images"):
        write_maps(tmp_path / "maps", KEY, {}, [], SHAPES, [])
    with pytest.raises(ValueError, match="0 taps"):
        write_maps(tmp_path / "maps", KEY, {}, IDS, {}, [])
    with pytest.raises(ValueError, match="'a' is asked for twice"):
        write_maps(tmp_path / "maps", KEY, {}, ["b", "a", "a"], SHAPES, [])
    for shape in ((0, 8, 8), (8, 8), (1, 2, 3, 4)):
        with pytest.raises(ValueError, match="'t'"):
            write_maps(tmp_path / "maps", KEY, {}, IDS, {"t": shape}, [])  # type: ignore[dict-item]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("size", [20, 300, 1450])  # in the lock, the maps, the index
def test_a_full_disk_in_the_middle_is_one_clear_error_and_leaves_nothing(tmp_path: Path, size: int) -> None:
    written(tmp_path / "other", key="other")
    was = contents(tmp_path)
    with file_size_limit(size), pytest.raises(RunError, match=r"Cannot write .*then run again"):
        write_maps(tmp_path / "maps", KEY, {"long": "x" * 1300}, IDS, SHAPES, answers())
    assert contents(tmp_path) == was
    assert os.listdir(tmp_path) == ["other"]


@pytest.mark.parametrize("call", ["fsync", "rename"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_fails_late_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    written(tmp_path / "maps", key="older")
    was, real, calls = contents(tmp_path), getattr(os, call), []

    def fail_from_second(*args: Any) -> Any:  # the second renaming puts the new folder in place
        calls.append(args)
        if len(calls) == 2:
            raise OSError(number, os.strerror(number))
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail_from_second)
        with pytest.raises(RunError, match=r"maps: .*, then run again"):
            written(tmp_path / "maps")
    assert contents(tmp_path) == was
    assert os.listdir(tmp_path) == ["maps"]
    assert TeacherMaps.open(tmp_path / "maps", "older") is not None


def test_a_parent_that_is_a_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(RunError, match="choose another folder"):
        written(tmp_path / "x" / "maps")
    assert TeacherMaps.open(tmp_path / "x" / "maps", KEY) is None


def test_too_little_space_is_refused_before_a_byte_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def usage(path: Path) -> SimpleNamespace:
        asked.append(Path(path))
        return SimpleNamespace(total=10**9, used=10**9 - 2_500_000, free=2_500_000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    folder = tmp_path / "new" / "store" / "maps"
    with pytest.raises(RunError) as caught:
        write_maps(folder, KEY, {}, IDS, {"logits": (1, 1024, 1024)}, _fails_at_third(AssertionError("asked")))
    for words in (str(folder), "11.5 MB", "2.5 MB", "model.teacher_cache: off", "model.teacher.store"):
        assert words in str(caught.value)  # 5 maps of 2 MiB, and one for the rest
    assert asked == [tmp_path]
    assert os.listdir(tmp_path) == []
    written(folder)  # small ones fit


# --- leftovers ----------------------------------------------------------------------------------------------------


def _workspace(folder: Path, pid: int, lock: str | None = None) -> Path:
    path = folder / f".{pid}-0123abcd.fkd-tmp"
    (path / "new").mkdir(parents=True)
    (path / "new" / "tap-0.npy").write_bytes(bytes(1000))
    if lock is not None:
        (path / "lock").write_text(lock)
    return path


def test_leftovers_of_killed_processes_go_and_work_of_others_stays(tmp_path: Path) -> None:
    dead = 99_999_999
    torn, far = tmp_path / "torn", tmp_path / "far"
    alive = _workspace(tmp_path, os.getppid())
    gone = _workspace(tmp_path, dead)
    half_locked = _workspace(torn, dead, lock='{"pid": 9')
    elsewhere = _workspace(far, dead, lock=json.dumps({"pid": dead, "host": "another.host", "started": ""}))
    named_alike = tmp_path / ".notes.fkd-tmp"
    named_alike.mkdir()
    for folder in (tmp_path, torn, far):
        written(folder / "maps")
    assert not gone.exists()
    assert not half_locked.exists()
    assert (alive / "new" / "tap-0.npy").exists()
    assert elsewhere.exists()
    assert named_alike.exists()


@pytest.mark.parametrize("moment", ["fsync", "rename"])
def test_a_kill_leaves_no_maps_and_the_next_writer_clears_up(tmp_path: Path, moment: str) -> None:
    child = os.fork()
    if child == 0:
        setattr(os, moment, lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL))
        try:
            written(tmp_path / "maps")
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (leftover,) = os.listdir(tmp_path)
    assert leftover.startswith(f".{child}-")
    assert TeacherMaps.open(tmp_path / "maps", KEY) is None
    assert remove_leftovers(tmp_path) == []  # a run that tidies its files does not stumble over folders
    written(tmp_path / "maps")
    assert os.listdir(tmp_path) == ["maps"]


def test_images_are_not_kept_in_memory(tmp_path: Path) -> None:
    ids = [f"{n:03d}" for n in range(200)]
    image = np.zeros((1, 512, 512), np.float32)  # 1 MiB

    def one_by_one() -> Iterator[Answer]:
        for n, id in enumerate(ids):
            yield id, {"logits": image + np.float32(n)}

    tracemalloc.start()
    try:
        maps = write_maps(tmp_path / "maps", KEY, {}, ids, {"logits": (1, 512, 512)}, one_by_one())
        for id in ids:
            maps.read(id)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()
    assert [maps.read(id)["logits"][0, 511, 511] for id in ids] == list(range(200))
