"""setuptools, which asks for torch only to build the native library: not for an sdist, nor under HEM_EXT_NATIVE=0.

An sdist has the same bytes wherever and whenever it is made, where SOURCE_DATE_EPOCH says what time it is of.
"""

import gzip
import os
import tarfile

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def native() -> list[str]:
    return [] if os.environ.get("HEM_EXT_NATIVE") == "0" else ["torch>=2.10", "ninja"]


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *native()]


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *native()]


def build_sdist(sdist_directory, config_settings=None) -> str:
    name = build_meta.build_sdist(sdist_directory, config_settings)
    if "SOURCE_DATE_EPOCH" in os.environ:
        settle(os.path.join(sdist_directory, name), int(os.environ["SOURCE_DATE_EPOCH"]))
    return name


def settle(path: str, time: int) -> None:
    """Write a .tar.gz anew, without what the machine put into it: times, owners, permissions and order."""
    with tarfile.open(path) as archive:
        members = [(member, archive.extractfile(member)) for member in archive]
        with (
            open(path + ".new", "wb") as file,
            gzip.GzipFile("", "wb", fileobj=file, mtime=time) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as settled,
        ):
            for member, content in sorted(members, key=lambda m: m[0].name):
                made = tarfile.TarInfo(member.name)
                made.type, made.size, made.mtime = member.type, member.size, time
                made.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
                settled.addfile(made, content)
    os.replace(path + ".new", path)
