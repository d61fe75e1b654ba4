"""One digest on every machine and in every release: packs on disk and names of files hang on it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.digests import DIGEST_BYTES, RunningDigest, digest_of


@pytest.mark.parametrize(
    ("n_bytes", "hexadecimal"),  # the official test vectors of BLAKE3: bytes 0, 1, … 250, 0, 1, …
    [
        (0, "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"),
        (1, "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213"),
        (1024, "42214739f095a406f3fc83deb889744ac00df831c10daa55189b5d121c855af7"),
    ],
)
def test_it_is_blake3(n_bytes: int, hexadecimal: str) -> None:
    content = bytes(at % 251 for at in range(n_bytes))
    assert digest_of(content).hex() == hexadecimal and len(digest_of(content)) == DIGEST_BYTES


@given(st.lists(st.binary(max_size=2000), max_size=8))
def test_what_arrives_in_pieces_has_the_digest_of_the_whole(pieces: list[bytes]) -> None:
    running = RunningDigest()
    for piece in pieces:
        running.update(memoryview(piece))
    assert running.digest() == digest_of(bytearray(b"".join(pieces)))
