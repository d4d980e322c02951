"""A doctor's report as a table, JSON and a figure."""

import json
from dataclasses import replace

from dllm_rl.diagnostics.doctor import ADVICE, Cause, Report, WorstToken
from dllm_rl.diagnostics.findings import rows, tables, write_doctor

CAUSES = (
    Cause("padding", 0.5, 2.0, 0.04, 0.8),
    Cause("stale weights", 0.005, 0.01, 0.0, 1.0),
    Cause("precision", 0.004, 0.009, 0.0, 1.0),
)
TOKENS = (WorstToken(2, 7, "<b>", "a&", "c", -1.0, -2.5),)
REPORT = Report("none", 12, Cause("all", 0.25, 1.5, 0.03, 0.9), CAUSES, TOKENS, (("layer", 0.125),))


def test_report_is_written_as_table_json_and_figure(tmp_path, capsys):
    report = replace(REPORT, order=(0.75, 0.5))
    write_doctor(report, directory=tmp_path)
    table = capsys.readouterr().out
    assert "stale weights" in table and report.verdict[:40] in table.replace("\n", " ")
    found = json.loads((tmp_path / "doctor.json").read_text())
    assert found["causes"][0]["name"] == report.causes[0].name and found["verdict"] == report.verdict
    assert (tmp_path / "doctor.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    write_doctor(report, as_json=True)
    assert json.loads(capsys.readouterr().out)["num_tokens"] == report.num_tokens


def test_rows_by_hand():
    """Advice stands where a cause is a hundredth of the worst or more, which may be a probe that the total lacks."""
    assert REPORT.worst == 0.5
    assert REPORT.verdict == f"Mostly padding: mean |d| 0.5 of 0.5 nats in all. To do: {ADVICE['padding']}."
    assert rows(REPORT) == [
        ("all", "2.50e-01", "1.50e+00", "3.0e-02", "0.9000", ""),
        ("padding", "5.00e-01", "2.00e+00", "4.0e-02", "0.8000", ADVICE["padding"]),
        ("stale weights", "5.00e-03", "1.00e-02", "0.0e+00", "1.0000", ADVICE["stale weights"]),
        ("precision", "4.00e-03", "9.00e-03", "0.0e+00", "1.0000", ""),
    ]
    found = {title.partition(",")[0]: lines for title, _, lines in tables(REPORT)}
    assert found["worst tokens"] == [("2, 7", "a&[<b>]c", "-1.0000", "-2.5000")]
    assert found["worst layers"] == [("layer", "1.25e-01")] and len(found) == 3
