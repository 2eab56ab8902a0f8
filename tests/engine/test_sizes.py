import pytest

from freemerge.errors import InputError
from freemerge.sizes import parse_size, readable_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("2GiB", 2 << 30),
        ("5GB", 5 * 10**9),
        ("1.5 kib", 1536),
        ("500M", 5 * 10**8),
        (".5mb", 500_000),
        (4096, 4096),
        (5e9, 5 * 10**9),
    ],
)
def test_sizes_are_read(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "2 gigs", "1,5GB", "0", "0.1", "nan", None])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InputError, match="--max-memory"):
        parse_size(text, "--max-memory")


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2 << 30, "2.0 GiB"), (3 << 50, "3072 TiB")]
)
def test_sizes_are_written(nbytes, text):
    assert readable_size(nbytes) == text
