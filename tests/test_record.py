"""The record in an output folder: what it refuses, which files count, and processes that start at once."""

import json
import os

import pytest

from cdiffset.errors import UserError
from cdiffset.inference.record import FILE_NAME, OutputRecord

SETTINGS = {"weights": "a" * 64, "seed": 1, "stretch": None}


def test_a_record_of_the_same_settings_stays_and_its_files_count(tmp_path):
    OutputRecord(tmp_path, SETTINGS, False).write()
    content = (tmp_path / FILE_NAME).read_bytes()
    (tmp_path / "a.png").touch()
    record = OutputRecord(tmp_path, SETTINGS, True)
    record.write()
    assert (tmp_path / FILE_NAME).read_bytes() == content and os.listdir(tmp_path).count("a.png") == 1
    assert record.has(tmp_path / "a.png") and not record.has(tmp_path / "b.png") and not record.has(tmp_path / ("n" * 300))


def test_other_settings_are_named_in_short(tmp_path):
    OutputRecord(tmp_path, SETTINGS, False).write()
    with pytest.raises(UserError) as caught:
        OutputRecord(tmp_path, SETTINGS | {"weights": "b" * 64, "stretch": "fixed:0,1"}, True)
    assert f"(weights: {'a' * 12}… -> {'b' * 12}…; stretch: None -> fixed:0,1)" in str(caught.value)


def test_a_setting_that_the_record_does_not_know_is_no_change(tmp_path):
    """The record is of an earlier version, which had no such option."""
    OutputRecord(tmp_path, SETTINGS, False).write()
    OutputRecord(tmp_path, SETTINGS | {"new": 1}, True)


def test_files_older_than_a_replaced_record_do_not_count(tmp_path):
    (tmp_path / "old.png").touch()
    os.utime(tmp_path / "old.png", ns=(0, 10**18))  # in 2001
    OutputRecord(tmp_path, SETTINGS, False).write()
    OutputRecord(tmp_path, SETTINGS | {"seed": 2}, False).write()
    (tmp_path / "new.png").touch()
    record = OutputRecord(tmp_path, SETTINGS | {"seed": 2}, False)
    assert record.has(tmp_path / "new.png") and not record.has(tmp_path / "old.png")


@pytest.mark.parametrize("content", ["", "[]", '{"settings": 1, "since_ns": 0}', '{"settings": {}}'])
def test_a_damaged_record_is_refused_and_replaced(tmp_path, content):
    (tmp_path / FILE_NAME).write_text(content)
    with pytest.raises(UserError, match=f"{FILE_NAME} is damaged"):
        OutputRecord(tmp_path, SETTINGS, True)
    OutputRecord(tmp_path, SETTINGS, False).write()
    assert json.loads((tmp_path / FILE_NAME).read_text())["settings"] == SETTINGS


def test_of_processes_that_start_at_once_the_first_writes_the_record(tmp_path):
    first, second = OutputRecord(tmp_path / "out", SETTINGS, True), OutputRecord(tmp_path / "out", SETTINGS, True)
    first.write()
    (tmp_path / "out" / "a.png").touch()
    content = (tmp_path / "out" / FILE_NAME).read_bytes()
    second.write()
    assert (tmp_path / "out" / FILE_NAME).read_bytes() == content
    assert sorted(os.listdir(tmp_path / "out")) == [FILE_NAME, "a.png"]


def test_files_without_a_record_are_told_and_get_none(tmp_path, capsys):
    (tmp_path / "a.png").touch()
    record = OutputRecord(tmp_path, SETTINGS, True)
    record.write()
    assert "has no record" in capsys.readouterr().out and record.has(tmp_path / "a.png")
    assert not (tmp_path / FILE_NAME).exists()
    OutputRecord(tmp_path, SETTINGS, False).write()
    assert (tmp_path / FILE_NAME).exists()
