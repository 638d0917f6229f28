"""A report that was written is read back as it was; what is no report is refused with its place."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_adaptive_sparse import reports
from hf_adaptive_sparse.errors import FormatError
from hf_adaptive_sparse.reports import LinearRow, Report, SensitivityRow, StageRow
from hf_adaptive_sparse.reports.decode import decode

st.register_type_strategy(float, st.floats(allow_nan=False))
_ROWS = [
    kind for name in reports.__all__ if dataclasses.is_dataclass(kind := getattr(reports, name)) and kind is not Report
]  # fmt: skip


@pytest.mark.parametrize("kind", _ROWS, ids=lambda kind: kind.__name__)
def test_every_row_survives_json(kind):
    @given(st.builds(kind))
    def check(row):
        text = json.dumps(Report(title="t").as_json() | {"x": dataclasses.asdict(row)})
        assert decode(kind, json.loads(text)["x"]) == row

    check()


@given(st.builds(Report, data=st.just({}), settings=st.just({"a": [1, None, "x"]}), provenance=st.just({})))
def test_a_report_survives_json(report):
    text = json.dumps(report.as_json(), allow_nan=False)
    assert Report.from_json(json.loads(text)) == report


def test_what_json_has_no_number_for_is_read_back():
    row = StageRow(step=1, parameters=2, before=math.inf, after=-math.inf)
    report = Report(title="t", stages=[row], seconds={"phase": math.nan})
    found = Report.from_json(json.loads(json.dumps(report.as_json())))
    assert found.stages == [row] and math.isnan(found.seconds["phase"])


_SENSITIVITY = {"module": "m", "shape": [4, 8], "error": 0.5, "trace": 1, "loss": 0.1, "measured": True}


@pytest.mark.parametrize("kind, content, message", [
    (SensitivityRow, _SENSITIVITY | {"error": "high"},
     "report.error: must be a number, got 'high'. The report is of another version, or damaged."),
    (SensitivityRow, _SENSITIVITY | {"measured": 1},
     "report.measured: must be true or false, got 1. The report is of another version, or damaged."),
    (SensitivityRow, _SENSITIVITY | {"shape": [4, "8"]},
     "report.shape[1]: must be a whole number, got '8'. The report is of another version, or damaged."),
    (SensitivityRow, _SENSITIVITY | {"shape": 4},
     "report.shape: must be a list, got 4. The report is of another version, or damaged."),
    (SensitivityRow, {"module": "m"}, "report: shape is missing. The report is of another version, or damaged."),
    (LinearRow, [], "report: must be an object, got []. The report is of another version, or damaged."),
    (StageRow, {"step": 1, "parameters": 2, "before": 1.0, "after": 2.0, "during": 3.0},
     "report: during is not known here. The report is of another version."),
])  # fmt: skip
def test_a_row_that_is_none_is_refused_with_its_place(kind, content, message):
    with pytest.raises(FormatError) as caught:
        decode(kind, content)
    assert str(caught.value) == message


@pytest.mark.parametrize("content, message", [
    ({"title": "t"}, "report: report_version is None, this hf_adaptive_sparse reads 1."),
    ({"report_version": 9, "title": "t"}, "report: report_version is 9, this hf_adaptive_sparse reads 1."),
    ([], "report: report_version is 'list', this hf_adaptive_sparse reads 1."),
    ({"report_version": 1}, "report: title is missing. The report is of another version, or damaged."),
])  # fmt: skip
def test_what_is_no_report_is_refused(content, message):
    with pytest.raises(FormatError) as caught:
        Report.from_json(content)
    assert str(caught.value) == message
