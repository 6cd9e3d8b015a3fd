"""clients.csv, manifests and names: wrong columns, wrong encodings, ids that would be paths, names that must work."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable

from hostile_place import Case, Place

Edit = Callable[[str], str | bytes]


def clients(edit: Edit) -> Callable[[Place], list[str]]:
    """Change the text of clients.csv."""

    def prepare(place: Place) -> list[str]:
        table = place.data / "clients.csv"
        text = edit(table.read_text())
        table.write_bytes(text if isinstance(text, bytes) else text.encode())
        return place.check_data()

    return prepare


def manifest(edit: Edit) -> Callable[[Place], list[str]]:
    """Give a changed copy of a run's manifest."""

    def prepare(place: Place) -> list[str]:
        text = edit((place.templates / "runs/run/manifest.csv").read_text())
        return place.fit(f"--data.manifest={place.file('manifest.csv', text)}")

    return prepare


def row(old: str, new: str) -> Edit:
    def edit(text: str) -> str:
        assert old in text, text
        return text.replace(old, new)

    return edit


def second_split(text: str) -> str:
    header, *rows = text.split()
    return "\n".join([f"{header},split", *(f"{row},{'test' if n == 1 else 'train'}" for n, row in enumerate(rows))])


def renamed(place: Place, old: str, new: str) -> None:
    """Give an image, its mask and its row another name."""
    for part in ("images", "masks"):
        folder = os.fsencode(place.data / part)
        os.rename(folder + f"/{old}.png".encode(), folder + b"/" + os.fsencode(new) + b".png")
    table = place.data / "clients.csv"
    table.write_bytes(table.read_bytes().replace(f"\n{old},".encode(), b"\n" + os.fsencode(new) + b","))


def name(new: str) -> Callable[[Place], list[str]]:
    def prepare(place: Place) -> list[str]:
        renamed(place, "a5", new)
        return place.fit()

    return prepare


def odd_names(place: Place) -> list[str]:
    """Names that are right: spaces, other scripts, commas and quotes, as long as the file system allows."""
    odd = ["köln 1", "患者 七", 'a "b", c', "x" * 250, "-rf", "%s{}$(id)", "İstanbul ﬁ"]
    for old, new in zip(("a0", "a1", "a2", "a3", "a4", "b0", "b1"), odd, strict=True):
        renamed(place, old, new)
    table = place.data / "clients.csv"
    text = table.read_text().replace('a "b", c', '"a ""b"", c"').replace("hospital-a", "Krankenhaus Köln 病院")
    table.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    return place.fit()


def linked_table(place: Place) -> list[str]:
    table = place.data / "clients.csv"
    table.unlink()
    table.symlink_to("moved/clients.csv")
    return place.fit("--data.partitioner=fkd_med.data.IID", "--data.partitioner.clients=2")


def table_is_a_pipe(place: Place) -> list[str]:
    (place.data / "clients.csv").unlink()
    os.mkfifo(place.data / "clients.csv")
    return place.fit()


def manifest_is_a_pipe(place: Place) -> list[str]:
    os.mkfifo(place.root / "manifest.csv")
    return place.fit(f"--data.manifest={place.root / 'manifest.csv'}")


def circle_of_folders(place: Place) -> list[str]:
    (place.data / "images/again").symlink_to("..", target_is_directory=True)
    return place.fit("--trainer.fast_dev_run=true")


def marker_that_deletes(place: Place) -> list[str]:
    """A folder of phantoms whose marker names a file outside of it, to be replaced."""
    victim = place.file("precious.txt", "precious")
    shutil.rmtree(place.data)
    place.data.mkdir()
    marker = {"parameters": {}, "files": {f"../{victim.name}": 8}}
    (place.data / "phantoms.json").write_text(json.dumps(marker))
    return place.fit("--data.layout=fkd_med.data.Phantoms", "--data.layout.hospitals=2", "--data.layout.images=12")


def run_among_images(place: Place) -> list[str]:
    return [*place.fit(), "--run_dir", str(place.data / "images/run")]


def run_is_a_file(place: Place) -> list[str]:
    return [*place.fit(), "--run_dir", str(place.file("run.txt", "mine"))]


def run_is_the_data(place: Place) -> list[str]:
    return [*place.fit(), "--run_dir", str(place.data)]


_MANY = "id,client,patient\n" + "a0,hospital-a,p\n" * 200_000
_LONG = "x" * 5000

TABLES = {
    "clients: other columns": Case(
        clients(row("id,client,patient", "name,site,person")), ("clients.csv", "id, client")
    ),
    "clients: semicolons": Case(clients(lambda text: text.replace(",", ";")), ("clients.csv", "commas")),
    "clients: UTF-16": Case(clients(lambda text: text.encode("utf-16")), ("clients.csv", "UTF-8")),
    "clients: rubbish": Case(clients(lambda text: bytes(range(256)) * 50), ("clients.csv", "UTF-8")),
    "clients: empty": Case(clients(lambda text: ""), ("clients.csv", "id,client,patient")),
    "clients: NUL": Case(clients(row("a5,", "a\0,")), ("clients.csv",)),
    "clients: one endless field": Case(clients(row("a5,", "a" * 200_000)), ("clients.csv",)),
    "clients: an open quote": Case(clients(row("a5,", '"a5,')), ("clients.csv",)),
    "clients: an id twice": Case(clients(row("a5,", "a4,")), ("a4", "more than once")),
    "clients: an id 200000 times": Case(clients(lambda text: _MANY), ("a0", "more than once")),
    "clients: ../": Case(clients(row("a5,", "../images/a5,")), ("../images/a5", "clients.csv")),
    "clients: an absolute path": Case(clients(row("a5,", "/etc/passwd,")), ("/etc/passwd", "clients.csv")),
    "clients: a line break": Case(clients(row("a5,", '"a\n5",')), ("clients.csv", r"a\n5")),
    "clients: 5000 letters": Case(clients(row("a5,", f"{_LONG},")), ("clients.csv", "xxx")),
    "clients: image that is not there": Case(clients(row("a5,", "a6,")), ("a6", "clients.csv")),
    "clients: unknown split": Case(
        clients(lambda t: second_split(t).replace("test", "probe")), ("probe", "train, val")
    ),
    "clients: patient in two splits": Case(clients(second_split), ("split", "hospital-a-p0")),
    "clients: patient in two clients": Case(
        clients(row("hospital-b-p0", "hospital-a-p0")), ("hospital-a-p0", "client")
    ),
    "clients: one without a client": Case(clients(row("a5,hospital-a", "a5,")), ("a5", "client")),
    "clients: client ..": Case(clients(row("hospital-a,", "..,")), ("'..'", "clients.csv")),
    "clients: client with a path": Case(clients(row("hospital-a,", "../../x,")), ("../../x", "clients.csv")),
    "clients: client with an escape": Case(clients(row("hospital-a,", "\x1b[2Jx,")), (r"\x1b", "clients.csv")),
    "clients: client of 5000 letters": Case(clients(row("hospital-a,", f"{_LONG},")), ("clients.csv", "long")),
    "clients: link to nothing": Case(linked_table, ("clients.csv",)),
    "clients: a pipe": Case(table_is_a_pipe, ("clients.csv", "pipe")),
    "manifest: missing": Case(lambda place: place.fit("--data.manifest=/gone/manifest.csv"), ("/gone/manifest.csv",)),
    "manifest: a pipe": Case(manifest_is_a_pipe, ("manifest.csv", "pipe")),
    "manifest: rubbish": Case(manifest(lambda text: bytes(range(256))), ("manifest.csv", "cannot be read")),
    "manifest: one endless field": Case(manifest(row("a5,", "a" * 200_000)), ("manifest.csv", "cannot be read")),
    "manifest: cut": Case(manifest(lambda text: text[:-100]), ("manifest.csv",)),
    "manifest: other columns": Case(manifest(row("sha256", "md5")), ("manifest.csv", "sha256")),
    "manifest: ../": Case(manifest(row("a5,", "../images/a5,")), ("manifest.csv", "../images/a5")),
    "manifest: other contents": Case(manifest(lambda text: text.replace("0", "1", 40)), ("manifest.csv",)),
    "name with a line break": Case(name("a\n5"), (r"a\n5", "Rename")),
    "name with an escape": Case(name("a\x1b[2J5"), (r"\x1b", "Rename")),
    "name not in UTF-8": Case(name("a\udcff5"), ("udcff", "Rename")),
    "names that are right, BOM, CRLF": Case(odd_names, code=0),
    "circle of folders": Case(circle_of_folders, code=0),
    "phantoms that delete": Case(marker_that_deletes, ("phantoms.json",)),
    "run_dir among images": Case(run_among_images, ("images", "run_dir")),
    "run_dir is a file": Case(run_is_a_file, ("run.txt", "file")),
    "run_dir is the data": Case(run_is_the_data, ("not empty",)),
}
