"""Calling: what is typed becomes a value, or the call is wrong."""

import pytest
import typer

from plyweight.cli.calling import note, parse_id, parse_seconds, parse_size, refuse_together


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("1", 1),
        ("4096", 4096),
        ("4096B", 4096),
        ("300k", 300_000),
        ("300K", 300_000),
        ("300kB", 300_000),
        ("3MB", 3_000_000),
        ("3 MB", 3_000_000),
        ("3M", 3_000_000),
        ("1.5MiB", 1_572_864),
        ("0.3kB", 300),
        ("1KiB", 1024),
        ("2GB", 2_000_000_000),
        ("2GiB", 2**31),
        ("0.1MiB", 104_857),  # down: nobody gets more than was allowed
    ],
)
def test_a_size_is_a_number_and_a_unit(text, num_bytes):
    assert parse_size(text) == num_bytes


NO_SIZES = """
    MB -3MB +3MB 3mb 3Mb 3e6 1_000 1,5MB .5MB 3.MB 0 0MB 0.1 3XB 3MBs ٣MB nan inf 9999999999TB
    99999999999999999999
"""


@pytest.mark.parametrize("text", ["", "3MB ", "3 M B", *NO_SIZES.split()])
def test_anything_else_is_no_size(text):
    with pytest.raises(typer.BadParameter):
        parse_size(text)


def test_seconds_are_more_than_none():
    assert (parse_seconds("5"), parse_seconds("0.5")) == (5, 0.5)
    for text in ("0", "-1", "nan", "inf", "5s", ""):
        with pytest.raises(typer.BadParameter, match="give seconds"):
            parse_seconds(text)


def test_an_id_is_64_digits_with_or_without_its_algorithm():
    assert parse_id("sha256:" + "0a" * 32) == parse_id("0a" * 32) == "0a" * 32
    for text in ("0A" * 32, "0a" * 31, "sha512:" + "0a" * 32, ""):
        with pytest.raises(typer.BadParameter, match="64 hexadecimal digits"):
            parse_id(text)


def test_options_that_exclude_each_other_are_named():
    refuse_together(bit_width=4, max_bytes=None)
    with pytest.raises(typer.BadParameter, match="--bit-width and --max-bytes exclude"):
        refuse_together(bit_width=4, max_bytes=5)


def test_what_the_library_calls_an_argument_is_an_option_here(capsys):
    note("Pin it with artifact_id=, or with public_key=, or use `allow_rollback`.")
    note("use https, or allow it with `allow_http` (--allow-http).")
    note("Allow that with `max_waste_bytes=123`, or not.")
    assert capsys.readouterr().err == (
        "plyweight: Pin it with --id, or with --public-key, or use --allow-rollback.\n"
        "plyweight: use https, or allow it with --allow-http.\n"
        "plyweight: Allow that with --max-waste 123, or not.\n"
    )
