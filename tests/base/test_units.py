import contextlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flashmoe.base.errors import FlashMoEError, OptionError
from flashmoe.base.units import format_count, format_duration, format_size, parse_size

DECIMAL = {"": 1, "B": 1, "K": 10**3, "KB": 10**3, "M": 10**6, "MB": 10**6}
DECIMAL |= {"G": 10**9, "GB": 10**9, "T": 10**12, "TB": 10**12}
BINARY = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
UNITS = DECIMAL | BINARY


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("24GB", 24_000_000_000),
        ("24GiB", 25_769_803_776),
        ("512M", 512_000_000),
        ("7077888", 7_077_888),
        ("1.5k", 1_500),
        (" 2 MiB ", 2_097_152),
        (".5gb", 500_000_000),
        ("0.1TB", 100_000_000_000),
        (7_077_888, 7_077_888),
        ("0.6", 1),
    ],
)
def test_parse_size(text, size_bytes):
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text",
    [
        *("", "GB", "24 G B", "24XB", "1e9", "-1", "-1GB", "+1GB", "1,5GB", "1.GB", "0x10"),
        *("inf", "nan", "24GB 1", "24GB\n1", "١GBß", None, True, []),
    ],
)
def test_parse_size_refuses_what_is_no_size(text):
    with pytest.raises(OptionError, match="is not a size; write for example 24GB") as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)
    assert isinstance(caught.value, FlashMoEError)


@pytest.mark.parametrize("text", ["0", "0GB", "0.0001", 0, -5])
def test_parse_size_refuses_nothing(text):
    with pytest.raises(OptionError, match="must be greater than zero"):
        parse_size(text)


@pytest.mark.parametrize("text", ["9" * 400, "9" * 400 + "GB", "9" * 5000, "1" + "0" * 308 + "TB"])
def test_parse_size_refuses_endless_numbers(text):
    with pytest.raises(OptionError):
        parse_size(text)


@given(st.integers(1, 2**62))
@example(2**53 + 1)
def test_whole_bytes_round_trip(size_bytes):
    assert parse_size(size_bytes) == parse_size(str(size_bytes)) == size_bytes
    assert parse_size(f"{size_bytes} B") == size_bytes


@given(st.integers(1, 10**6), st.sampled_from(sorted(UNITS)), st.booleans())
def test_units_multiply(count, unit, lower):
    text = f"{count}{unit}"
    assert parse_size(text.lower() if lower else text) == count * UNITS[unit]


@given(st.text("0159.eE+-_ \n٣GMKTiBbgx", max_size=8))
def test_parse_size_gives_a_size_or_refuses(text):
    with contextlib.suppress(OptionError):
        assert parse_size(text) > 0


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (999.4, "999 B"),
        (1000, "1.00 kB"),
        (9_994, "9.99 kB"),
        (9_995, "10.0 kB"),
        (99_949, "99.9 kB"),
        (99_950, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (7_077_888, "7.08 MB"),
        (209 * 10**9, "209 GB"),
        (10**12, "1.00 TB"),
        (1_234 * 10**12, "1234 TB"),
        (-1_500_000, "-1.50 MB"),
    ],
)
def test_format_size(size_bytes, text):
    assert format_size(size_bytes) == text


@given(st.integers(1, 999 * 10**12))
def test_format_size_keeps_three_digits(size_bytes):
    text = format_size(size_bytes)
    assert abs(parse_size(text) - size_bytes) <= 0.005 * size_bytes
    assert len(text.split()[0].replace(".", "")) <= 3
    assert format_size(parse_size(text)) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1_000, "1.0K"),
        (1_500, "1.5K"),
        (30_600_000, "30.6M"),
        (99_949, "99.9K"),
        (99_950, "100K"),
        (397 * 10**9, "397B"),
        (1_500 * 10**9, "1.5T"),
    ],
)
def test_format_count(count, text):
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.00 s"),
        (0.42, "0.42 s"),
        (9.99, "9.99 s"),
        (10, "10 s"),
        (59.4, "59 s"),
        (60, "1:00"),
        (75, "1:15"),
        (119.6, "2:00"),
        (3599.4, "59:59"),
        (3599.5, "1:00:00"),
        (3700, "1:01:40"),
        (36_000, "10:00:00"),
    ],
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(("seconds", "text"), [(9.996, "10 s"), (59.6, "1:00")])
def test_format_duration_rounds_into_the_next_form(seconds, text):
    assert format_duration(seconds) == text


@given(st.floats(0, 10**7))
def test_format_duration_reads_back(seconds):
    text = format_duration(seconds)
    if text.endswith(" s"):
        value = float(text.removesuffix(" s"))
    else:
        value = 0
        for part in text.split(":"):
            value = 60 * value + int(part)
    assert abs(value - seconds) <= 0.5 + 1e-9
