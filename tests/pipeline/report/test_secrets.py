"""What a lifecycle says keeps no password and no token: neither its record nor its page, whichever way they came in."""

import json

import pytest

from pipeline.redaction import first_line, without_secrets_in_page
from pipeline.report.lifecycle_report import write_lifecycle_report
from pipeline.report.page import Section, Verdict, drawn, report_page
from pipeline.report.record import Record, read_record
from tests.pipeline.pages import Page

PASSWORD, VALUE, TOKEN = "pw12345678", "abcd1234efgh5678", "hf_" + "a1B2" * 8
SAYING = f"https://bob:{PASSWORD}@store/x?a=1&token=q7w8e9r0: 403 with {VALUE} and {TOKEN}"
SECRETS = (PASSWORD, VALUE, TOKEN, "q7w8e9r0")
WAYS = {
    "stage": lambda record: record.stages.append(("inspect", 1.0, f"no pictures: {SAYING}")),
    "note": lambda record: record.notes.append(SAYING),
    "failure": lambda record: setattr(record, "failure", {"stage": "register", "reason": SAYING}),
    "setting": lambda record: record.asked.update({"ingest_set": [SAYING]}),
    "model": lambda record: record.models.update({"fine-tuned": SAYING}),
    "baseline": lambda record: record.baselines.append({"method": SAYING, "labels": 1.0, "accuracy": 0.5}),
    "source": lambda record: setattr(record, "source", SAYING),
    "tracking URI": lambda record: setattr(record, "tracking_uri", SAYING),
}


@pytest.fixture
def record(tmp_path, monkeypatch) -> Record:
    monkeypatch.setenv("MY_API_TOKEN", VALUE)
    return Record("birds", "/photos", str(tmp_path), "sqlite:///none.db", registration=str(tmp_path / "registration"))


@pytest.mark.parametrize("way", WAYS)
def test_neither_the_record_nor_the_page_of_a_lifecycle_holds_one(record, tmp_path, way):
    (tmp_path / "registration").mkdir()
    (tmp_path / "registration" / "result.json").write_text(json.dumps({"uri": "models:/birds/1", "summary": SAYING}))
    WAYS[way](record)
    for path in [*write_lifecycle_report(record, tmp_path), tmp_path / "lifecycle.json"]:
        text = path.read_text()
        assert not [secret for secret in SECRETS if secret in text], (path.name, way)
        assert "***" in text
    assert read_record(tmp_path).registration == record.registration


def test_a_section_that_cannot_be_drawn_says_why_without_one():
    def draw():
        raise ValueError("x" * 290 + f" postgresql://u:{PASSWORD}@db/mlflow")

    section = Section("Lineage", draw)
    assert PASSWORD[:4] not in drawn(section)  # also where it is cut off
    page = report_page("kicker", "title", Verdict(False, SAYING), "", [section])
    assert PASSWORD not in page and "could not be shown: xxx" in page


def test_a_page_keeps_its_pictures_and_all_that_is_no_secret():
    picture = f'<img src="data:image/png;base64,iVBOR+{TOKEN}/AIza{"A" * 32}==" alt="a">'
    page = f'<p title="https://u:{PASSWORD}@host">a &lt;b&gt; &amp; c</p>{picture}<code>?x=1&amp;token=q7w8e9r0</code>'
    cleaned = without_secrets_in_page(page)
    assert cleaned == (f'<p title="https://***@host">a &lt;b&gt; &amp; c</p>{picture}<code>?x=1&amp;token=***</code>')
    assert Page(cleaned).text.strip().endswith("?x=1&token=***")


def test_the_first_line_of_an_error_has_none_and_names_its_kind_where_it_says_nothing():
    assert first_line(ValueError(f"y{'x' * 190} u:{PASSWORD}@registry/x\nmore")) == f"y{'x' * 190} ***@regi"
    assert first_line(KeyError()) == "KeyError" and first_line(ValueError("\n")) == "ValueError"
