"""Archives: what is well-behaved unpacks whole, what is not leaves nothing behind."""

import io
import pathlib
import stat
import tarfile
import zipfile

import pytest

from data_builders import unpack

CONTENT = {"top/a.png": b"a" * 5000, "top/deep/b.png": b"b", "c.txt": b""}


@pytest.fixture
def pack(tmp_path):
    """Packs {name: bytes or TarInfo or ZipInfo} into an archive named by its suffix."""

    def run(content: dict, suffix: str) -> pathlib.Path:
        path = tmp_path / f"packed.{suffix}"
        if suffix == "zip":
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, data in content.items():
                    archive.writestr(*(data if isinstance(data, tuple) else (name, data)))
        else:
            with tarfile.open(path, f"w:{suffix.partition('.')[2]}") as archive:
                for name, data in content.items():
                    info = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(name)
                    if isinstance(data, bytes):
                        info.size = len(data)
                    archive.addfile(info, io.BytesIO(data if isinstance(data, bytes) else b""))
        return path

    return run


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def below(folder: pathlib.Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}


@pytest.mark.parametrize("suffix", ["zip", "tar", "tar.gz", "tar.xz", "tar.bz2"])
def test_files_and_folders_unpack_as_they_were_packed(pack, tmp_path, suffix):
    unpack.unpack(pack(CONTENT, suffix), tmp_path / "out")
    found = {p.relative_to(tmp_path / "out").as_posix(): p for p in (tmp_path / "out").rglob("*.*")}
    assert {name: path.read_bytes() for name, path in found.items()} == CONTENT
    assert below(tmp_path) - {f"out/{name}" for name in below(tmp_path / "out")} == {
        "out",
        f"packed.{suffix}",
    }


@pytest.mark.parametrize("suffix", ["zip", "tar"])
@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "top/../../../evil"])
def test_names_that_lead_out_are_refused(pack, tmp_path, suffix, name):
    path = pack({"good": b"1", name: b"2"}, suffix)
    with pytest.raises(ValueError, match=r"packed\.\w+: '.*evil' lies outside the folder"):
        unpack.unpack(path, tmp_path / "out")
    assert below(tmp_path) == {path.name}
    assert not pathlib.Path("/evil").exists()
    assert not (tmp_path.parent / "evil").exists()


@pytest.mark.parametrize(
    "entry",
    [
        special("x", tarfile.SYMTYPE, "/etc/passwd"),
        special("x", tarfile.SYMTYPE, ".."),
        special("x", tarfile.LNKTYPE, "../../etc/passwd"),
        special("x", tarfile.LNKTYPE, "good"),
        special("x", tarfile.CHRTYPE),
        special("x", tarfile.BLKTYPE),
        special("x", tarfile.FIFOTYPE),
    ],
)
def test_links_devices_and_pipes_are_refused(pack, tmp_path, entry):
    path = pack({"good": b"1", "x": entry, "x/passwd": b"2"}, "tar")
    with pytest.raises(ValueError, match="'x' is a link, a device or a pipe; the archive is refus"):
        unpack.unpack(path, tmp_path / "out")
    assert below(tmp_path) == {path.name}


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_links_and_devices_in_zip_files_are_refused(pack, tmp_path, mode):
    info = zipfile.ZipInfo("x")
    info.external_attr = (mode | 0o777) << 16
    path = pack({"good": b"1", "x": (info, b"/etc/passwd")}, "zip")
    with pytest.raises(ValueError, match="'x' is a link, a device or a pipe"):
        unpack.unpack(path, tmp_path / "out")
    assert below(tmp_path) == {path.name}


def test_encrypted_entries_are_refused(pack, tmp_path):
    path = pack({"x": b"1"}, "zip")
    data = bytearray(path.read_bytes())
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(magic) + offset] |= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="'x' is encrypted"):
        unpack.unpack(path, tmp_path / "out")


@pytest.mark.parametrize(("first", "second"), [("x", "x"), ("x", "x/y"), ("x/y", "x")])
def test_entries_that_overwrite_each_other_are_refused(tmp_path, first, second):
    path = tmp_path / "packed.tar"
    with tarfile.open(path, "w") as archive:
        for name in (first, second):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(ValueError, match=rf"'{second}' occurs twice"):
        unpack.unpack(path, tmp_path / "out")
    assert below(tmp_path) == {path.name}


@pytest.mark.parametrize("suffix", ["zip", "tar.gz", "tar.xz"])
def test_bombs_are_refused_and_the_limit_can_be_raised(pack, tmp_path, monkeypatch, suffix):
    path = pack({"bomb": bytes(8 << 20)}, suffix)
    assert path.stat().st_size < 20_000
    monkeypatch.setenv("MMRJAX_MAX_UNPACKED_GIB", "0.005")  # 5.4 million bytes
    with pytest.raises(ValueError, match=r"more than 0\.005 GiB; .* MMRJAX_MAX_UNPACKED_GIB=0\.01"):
        unpack.unpack(path, tmp_path / "out")
    assert below(tmp_path) == {path.name}
    monkeypatch.setenv("MMRJAX_MAX_UNPACKED_GIB", "0.01")
    unpack.unpack(path, tmp_path / "out")
    assert (tmp_path / "out/bomb").stat().st_size == 8 << 20


def test_a_zip_file_that_understates_a_size_is_read_no_further(pack, tmp_path, monkeypatch):
    path = pack({"bomb": bytes(8 << 20)}, "zip")
    size = (8 << 20).to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(size, (1).to_bytes(4, "little")))
    monkeypatch.setenv("MMRJAX_MAX_UNPACKED_GIB", "0.001")
    with pytest.raises(ValueError, match="the archive is damaged"):
        unpack.unpack(path, tmp_path / "out")


def test_many_empty_files_count_as_what_they_take_on_a_disk(pack, tmp_path, monkeypatch):
    path = pack({f"{i}": b"" for i in range(300)}, "zip")
    monkeypatch.setenv("MMRJAX_MAX_UNPACKED_GIB", "0.001")  # 262 blocks of 4096 bytes
    with pytest.raises(ValueError, match=r"more than 0\.001 GiB"):
        unpack.unpack(path, tmp_path / "out")


@pytest.mark.parametrize("suffix", ["zip", "tar", "tar.gz", "tar.xz"])
def test_truncated_archives_are_named_and_leave_nothing(pack, tmp_path, suffix):
    rng_free = bytes((i * i * 31 + i // 7) % 251 for i in range(50_000))  # hardly compresses
    path = pack({"a": rng_free, "b": rng_free[::-1]}, suffix)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    with pytest.raises(ValueError, match=r"packed\.\S+: the archive is damaged"):
        unpack.unpack(path, tmp_path / "out")
    assert below(tmp_path) == {path.name}


def test_text_is_no_archive(tmp_path):
    (tmp_path / "packed.tar").write_text("<html>404 not found</html>")
    with pytest.raises(ValueError, match=r"packed\.tar: the archive is damaged"):
        unpack.unpack(tmp_path / "packed.tar", tmp_path / "out")


def test_what_a_killed_attempt_left_is_cleared(pack, tmp_path):
    (tmp_path / ".out.unpacking").mkdir()
    (tmp_path / ".out.unpacking/half").write_bytes(b"?")
    unpack.unpack(pack(CONTENT, "tar"), tmp_path / "out")
    assert not (tmp_path / "out/half").exists()
