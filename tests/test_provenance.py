"""Digests change with behaviour and with nothing else."""

import textwrap
from pathlib import Path

from ssl_core import provenance


def test_equal_sections_read_the_same_whatever_their_order() -> None:
    assert (
        provenance.canonical({"b": [1, 2.5], "a": {"d": None, "c": "é"}})
        == '{"a":{"c":"\\u00e9","d":null},"b":[1,2.5]}'
    )


def test_a_file_is_digested_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert provenance.file_digest(tmp_path / "one") == expected == provenance.digest("abc")


def test_versions_name_what_decides_numbers() -> None:
    assert {"python", "torch", "torchvision", "nvidia-dali-cuda130", "ssl-core"} <= set(provenance.versions())


def test_hardware_is_one_line() -> None:
    assert textwrap.shorten(provenance.hardware(), 1000) == provenance.hardware()
