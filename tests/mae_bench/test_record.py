"""Records and failures: round trips, and what is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mae_bench.record import (
    Failure,
    Metric,
    RecordError,
    ResultRecord,
    read_failure,
    read_record,
    write_failure,
    write_record,
)

ROOT = Path(__file__).parents[2]
RECORD = ResultRecord(
    backbone="mae",
    task="imagenet",
    protocol="linear-90ep",
    dataset="toy",
    split="val",
    num_samples=10,
    metrics={"top1": Metric(61.5), "loss": Metric(1.5, "nats", "lower")},
    main_metric="top1",
    seed=0,
    backbone_spec={"depth": 2},
    backbone_digest="b",
    config={"lr": 0.1},
    config_digest="c",
    data_digest="d",
    cost={"seconds_train": 1.5},
    notes=["one"],
)
FAILURE = Failure("mae", "coco", "maskrcnn", 1, "not installed", "no detectron2", "make setup")


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write_record(RECORD, tmp_path / "cell" / "record.json")
    assert read_record(tmp_path / "cell" / "record.json") == RECORD
    assert RECORD.score == Metric(61.5)


def test_a_failure_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write_failure(FAILURE, tmp_path / "failure.json")
    assert read_failure(tmp_path / "failure.json") == FAILURE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"main_metric": "mIoU"}, "main metric 'mIoU' is not among"),
        ({"metrics": {"top1": Metric(math.nan)}}, "not finite"),
        ({"metrics": {"top1": Metric(1.0), "loss": Metric(math.inf)}}, r"not finite: \['loss'\]"),
        ({"metrics": {}}, "is not among"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"metrics": {"top1": Metric(250.0)}}, "impossible percentages: top1 250.0"),
        ({"metrics": {"top1": Metric(-0.1)}}, "top1 -0.1"),
        ({"metrics": {"top1": Metric(1.0), "mCE": Metric(-1.0, "%", "lower")}}, "mCE -1.0"),
    ],
)
def test_a_record_that_contradicts_itself_cannot_be_made(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        replace(RECORD, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 0}, "schema version 0"),
        ({"schema_version": None}, "schema version None"),
        ({"colour": "red"}, "unknown fields in a record"),
        ({"metrics": None}, "malformed"),
        ({"metrics": {"top1": {"value": 1.0, "units": "%"}}}, "malformed"),
        ({"metrics": {"top1": {"value": "high"}}}, "malformed"),
    ],
)
def test_what_is_no_record_is_refused_with_its_path(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(RECORD.to_dict() | {"schema_version": 1} | change))
    with pytest.raises(RecordError, match=message) as error:
        read_record(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "metric", [Metric(0.0), Metric(100 + 1e-9), Metric(130.0, "%", "lower"), Metric(-3.0, "dB")]
)
def test_a_possible_value_can_be_recorded(metric: Metric) -> None:
    assert replace(RECORD, metrics={"top1": metric}).score == metric


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_record(RECORD, path)
    whole = json.loads(path.read_text())
    damaged = [whole | {"seed": 1}, whole | {"digest": None}, whole | {"cost": {"x": math.nan}}]
    damaged += [{name: value for name, value in whole.items() if name != left_out} for left_out in whole]
    for value in damaged:
        path.write_text(json.dumps(value))
        with pytest.raises(RecordError) as error:
            read_record(path)
        assert "record.json" in error.value.given
        if "schema_version" in value:
            assert "was edited or damaged after it was written" in error.value.given
            assert error.value.fix == "re-run the cell or restore the file"
    path.write_text(json.dumps(whole, indent=None, sort_keys=True))
    assert read_record(path) == RECORD, "the layout of the file does not matter"


def test_a_changed_failure_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "failure.json"
    write_failure(FAILURE, path)
    path.write_text(path.read_text().replace("no detectron2", "no time"))
    with pytest.raises(RecordError, match="was edited or damaged"):
        read_failure(path)


def test_keys_that_are_no_text_do_not_spoil_the_digest(tmp_path: Path) -> None:
    write_record(replace(RECORD, config={"taps": {10: "a", 9: "b"}}), tmp_path / "record.json")
    assert read_record(tmp_path / "record.json").config == {"taps": {"10": "a", "9": "b"}}


def test_schema_1_is_read_and_written_again_as_the_current_schema(tmp_path: Path) -> None:
    old = sorted((ROOT / "benchmarks" / "results").rglob("record.json"))
    records = [read_record(path) for path in old]
    assert {record.schema_version for record in records} == {1}
    assert {(record.protocol_version, record.code_digest) for record in records} == {(None, "")}
    write_record(records[0], tmp_path / "record.json")
    assert read_record(tmp_path / "record.json") == replace(records[0], schema_version=2)


def test_a_failure_of_schema_1_is_read(tmp_path: Path) -> None:
    (tmp_path / "failure.json").write_text(json.dumps(vars(FAILURE) | {"schema_version": 1}))
    assert read_failure(tmp_path / "failure.json") == replace(FAILURE, schema_version=1)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"null"])
def test_what_is_no_json_object_is_refused_with_its_path(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(content)
    for read in (read_record, read_failure):
        with pytest.raises(RecordError) as error:
            read(path)
        assert str(path) in str(error.value)


def test_a_missing_field_is_refused(tmp_path: Path) -> None:
    value = RECORD.to_dict() | {"schema_version": 1}
    del value["num_samples"]
    (tmp_path / "record.json").write_text(json.dumps(value))
    with pytest.raises(RecordError, match="num_samples"):
        read_record(tmp_path / "record.json")


def test_nan_never_reaches_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_record(replace(RECORD, cost={"seconds_train": math.nan}), tmp_path / "record.json")
    assert not list(tmp_path.iterdir())
