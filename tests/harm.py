"""What can happen to a file of a run folder, and a disk that is full."""

import contextlib
import io
import zipfile


def flipped(raw: bytes) -> bytes:
    """One bit of the largest tensor of a .pt, or array of a .npz, is another: torch reads it."""
    with zipfile.ZipFile(io.BytesIO(raw)) as inside:
        parts = [one for one in inside.infolist() if not one.filename.endswith("data.pkl")]
    part = max(parts, key=lambda one: one.file_size)
    data = bytearray(raw)
    names = sum(int.from_bytes(raw[part.header_offset + at :][:2], "little") for at in (26, 28))
    data[part.header_offset + 30 + names + part.file_size - 1] ^= 1
    return bytes(data)


def bomb(raw: bytes) -> bytes:
    """A small zip of the same parts that would fill the memory."""
    target = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(raw)) as inside,
        zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in inside.namelist():
            packed.writestr(name, inside.read(name) + bytes(1_000_000))
    return target.getvalue()


HARM = {
    "empty": lambda raw: b"",
    "cut": lambda raw: raw[: len(raw) * 6 // 10],
    "its end is lost": lambda raw: raw[:-300],
    "a web page": lambda raw: b"<!DOCTYPE html>" + b" " * 900,
    "a flipped bit": flipped,
    "a bomb": bomb,
}


@contextlib.contextmanager
def full_disk(size=3000):
    """No file of this process grows beyond `size` bytes."""
    import resource  # which Windows has not

    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
