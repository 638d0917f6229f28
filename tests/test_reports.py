"""report.json is JSON for every parser; report.html needs no other file and shows what it was told."""

from __future__ import annotations

import base64
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_sparse.errors import FormatError, OutputError
from hf_adaptive_sparse.reports import (
    Generation,
    MatrixRow,
    ModelRow,
    PruningRow,
    Report,
    drawing,
    plots,
    read_report,
    write_report,
)
from hf_adaptive_sparse.reports.page import render_page
from hf_adaptive_sparse.reports.plots import (
    error_curves,
    flip_map,
    loss_curves,
    perplexity_bars,
    size_bars,
    sparsity_map,
)
from hf_adaptive_sparse.reports.text import human_bytes, human_count, human_flops, human_seconds, number, percent

LAYERS = [f"model.layers.{block}.mlp.{name}_proj" for block in range(3) for name in ("gate", "up", "down")]


def pruning_row(module: str, **values) -> PruningRow:
    known = {
        "shape": (8, 16), "pattern": "2:4", "sparsity": 0.5, "error": 0.0625, "sensitivity": 3e-7, "tokens": 32_768,
        "shrinkage": 0.0, "rung": "damping 0.01", "seconds": 0.25,
    }  # fmt: skip
    return PruningRow(module=module, **known | values)


def full_report() -> Report:
    return Report(
        title="2:4 retraining of <tiny>",
        command="hf-adaptive-sparse train tiny",
        summary=["first line", "second & line"],
        models=[
            ModelRow(name="dense", perplexity=3.9, bits_per_byte=0.5, sparsity=0.0, bytes_on_disk=1000),
            ModelRow(name="magnitude", perplexity=521.7, sparsity=0.5),
            ModelRow(name="trained", perplexity=6.4, sparsity=0.5, tokens=409_600),
        ],
        sizes={"dense": 12_600_000, "packed": 8_470_000},
        history=[{"step": step, "loss": 3.0 / step, "loss/kd": 2.0 / step} for step in range(1, 30)],
        flips={layer: [(10, 0.2), (20, 0.1)] for layer in LAYERS},
        matrices=[
            MatrixRow(
                module=layer,
                shape=(8, 16),
                dtype="float32",
                sparsity=0.5,
                stored_bytes=288,
                two_four=layer != LAYERS[4],
            )  # fmt: skip
            for layer in LAYERS
        ],
        pruning=[pruning_row(layer, error=0.01 * (place + 1)) for place, layer in enumerate(LAYERS)],
        generations=[Generation(prompt="Once", texts={"dense": " upon <b>a</b> time", "trained": " the"})],
        tasks={"cloze": {"acc": 0.866}},
        data={"text": "train.txt", "sha256": "ab" * 32},
        settings={"lr": 1e-3, "pattern": "2:4", "dry_run": False, "teacher": None},
        versions={"torch": "2.13.0"},
        seconds={"training": 75.0},
    )


class _Page(HTMLParser):
    """Collects what a browser would fetch, the visible text, and checks that tags are closed in order."""

    VOID = {"meta", "link", "img", "br"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched, self.words, self.open = [], [], []
        self.feed(text.replace("<wbr>", ""))  # where a name may be broken

    def handle_starttag(self, tag, attrs):
        self.fetched += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)


def images(page: str) -> list[bytes]:
    return [base64.b64decode(code) for code in re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)]


def test_a_page_needs_no_other_file_and_is_well_formed():
    page = render_page(full_report())
    read = _Page(page)
    assert read.open == []
    assert all(address.startswith("data:") for address in read.fetched)
    assert not re.search(r"https?://|url\(|@import|<script", re.sub(r'src="data:[^"]+"', "", page))
    for image in images(page):  # nor do the plots inside fetch anything
        assert ElementTree.fromstring(image).tag == "{http://www.w3.org/2000/svg}svg"
        references = re.findall(rb'(?:xlink:)?href="([^"]*)"', image)
        assert all(reference.startswith((b"#", b"data:image/png")) for reference in references)


def test_a_page_shows_every_part_and_escapes_it():
    page = render_page(full_report())
    text = " ".join(" ".join(_Page(page).words).split())
    for part in (
        "2:4 retraining of <tiny>", "second & line", "hf-adaptive-sparse train tiny", "Models", "3.900",
        "521.7", "409,600", "Sizes on disk", "Training", "Mask-flip rate", "Prompt: Once",
        "upon <b>a</b> time", "Sparsity per matrix", "model.layers.1.mlp.up_proj", "8 × 16", "50.00 %", "NO",
        "Pruning", "output error", "0.09000", "3.000e-07", "32,768", "damping 0.01", "0.25 s",
        "cloze", "0.8660", "train.txt", "1 min 15 s", "0.001", "dry_run no", "torch 2.13.0",
    ):  # fmt: skip
        assert part in text, part
    assert "of all tokens" not in text  # no expert among them
    assert len(images(page)) == 6


def test_a_part_without_data_is_left_out_of_the_page():
    page = render_page(Report(title="empty"))
    assert images(page) == []
    assert re.findall(r"<h2>", page) == []
    assert "bits per byte" not in render_page(Report(title="x", models=[ModelRow(name="a", perplexity=2.0)]))


def test_the_same_report_gives_the_same_bytes():
    assert render_page(full_report()) == render_page(full_report())


def test_a_report_is_written_as_strict_json_and_read_back(tmp_path):
    report = full_report()
    report.history.append({"step": 30, "loss": math.nan, "loss/kd": math.inf})
    page = write_report(report, tmp_path / "new" / "folder")
    assert page == tmp_path / "new" / "folder" / "report.html"
    assert sorted(file.name for file in page.parent.iterdir()) == ["report.html", "report.json"]
    text = (page.parent / "report.json").read_text(encoding="utf-8")
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found == report.as_json()
    assert found["report_version"] == 1
    assert found["history"][-1] == {"step": 30, "loss": "nan", "loss/kd": "inf"}
    assert found["models"][2]["tokens"] == 409_600
    assert found["matrices"][0]["shape"] == found["pruning"][0]["shape"] == [8, 16]
    assert found["pruning"][1]["error"] == 0.02


def test_a_report_that_cannot_be_written_says_where(tmp_path):
    (tmp_path / "file").write_text("here")
    with pytest.raises(OutputError) as caught:
        write_report(Report(title="x"), tmp_path / "file" / "folder")
    assert str(caught.value) == (
        f"{tmp_path}/file/folder/report.json: cannot write the report: Not a directory. Choose another folder."
    )


def test_a_failed_write_leaves_the_old_report(tmp_path, monkeypatch):
    write_report(Report(title="old"), tmp_path)
    monkeypatch.setattr("os.replace", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OutputError) as caught:
        write_report(Report(title="new"), tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}/report.json: cannot write the report: No space left on device. Choose another folder."
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.html", "report.json"]
    assert json.loads((tmp_path / "report.json").read_text())["title"] == "old"


def label(image: bytes | None) -> str:
    # Fonts are drawn as paths; matplotlib keeps each text as a comment in front of its path.
    assert image is not None
    return " ".join(" ".join(re.findall(r"<!-- (.*?) -->", image.decode())).split())


def test_plots_name_their_axes_and_units():
    report = full_report()
    losses, flips = label(loss_curves(report.history)), label(flip_map(report.flips))
    zeros, errors = label(sparsity_map(report.pruning)), label(error_curves(report.pruning))
    bars, sizes = label(perplexity_bars(report.models)), label(size_bars(report.sizes))
    for words, text in (
        (("optimizer step", "loss per token", "distillation (KL)"), losses),
        (("mask entries changed (%)", "optimizer step of the mask refresh", "0.mlp.gate_proj"), flips),
        (("zeros (%)", "block", "sensitivity (log scale)", "mlp.gate_proj", "50"), zeros),
        (("block", "squared error of the outputs", "part of the dense outputs", "mlp.down_proj"), errors),
        (("perplexity, lower is better (log scale)", "521.7", "trained"), bars),
        (("MB on disk", "8.47 MB (67 %)"), sizes),
    ):
        assert all(word in text for word in words), (words, text)
    assert "model.layers" not in flips + zeros + errors
    assert "sensitivity" not in label(sparsity_map([pruning_row("m.0.a", sensitivity=None)]))
    negative = label(sparsity_map([pruning_row("m.0.a", sensitivity=-3.0), pruning_row("m.0.b", sensitivity=2.0)]))
    assert "sensitivity" in negative and "log scale" not in negative
    assert "log scale" not in label(perplexity_bars([report.models[0], report.models[2]]))


def test_plots_of_nothing_are_none():
    assert loss_curves([]) is None
    assert loss_curves([{"step": 1, "learning_rate": 0.1}]) is None
    assert flip_map({}) is None
    assert flip_map({"layer": []}) is None
    assert perplexity_bars([ModelRow(name="x")]) is None
    assert perplexity_bars([ModelRow(name="x", perplexity=math.inf)]) is None
    assert size_bars({}) is None
    assert sparsity_map([]) is None and error_curves([]) is None
    assert error_curves([pruning_row("model.layers.0.a", error=None)]) is None
    assert error_curves([pruning_row("model.layers.0.a", error=math.inf)]) is None


@pytest.mark.parametrize("module, place", [
    ("model.layers.3.mlp.up_proj", (3, "mlp.up_proj")),
    ("transformer.h.11.attn.c_attn", (11, "attn.c_attn")),
    ("model.layers.2.mlp.experts.down_proj[17]", (2, "mlp.experts.down_proj")),
    ("model.layers.2.mlp.experts.17.down_proj", (2, "mlp.experts.down_proj")),
    ("lm_head", (None, "lm_head")),
])  # fmt: skip
def test_a_pruned_matrix_knows_its_block_and_its_kind(module, place):
    assert pruning_row(module).place == place


def test_experts_of_a_layer_are_averaged_in_the_plots_and_listed_in_the_table():
    rows = [pruning_row(f"m.0.experts.up[{e}]", sparsity=0.4 + 0.2 * e, shrinkage=0.1 * e, tokens=e) for e in (0, 1)]
    assert " 50 " in f" {label(sparsity_map(rows))} "
    page = render_page(Report(title="experts", pruning=rows)).replace("<wbr>", "")
    assert "m.0.experts.up[0]" in page and "of all tokens" in page and "10.00 %" in page


@settings(max_examples=6)
@given(
    perplexities=st.lists(st.floats(1.0, 1e12), min_size=1, max_size=4),
    losses=st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=5),
    rates=st.lists(st.floats(0.0, 1.0), max_size=3),
    sizes=st.lists(st.integers(0, 10**13), max_size=3),
    pruned=st.lists(st.tuples(st.none() | st.floats(width=32), st.none() | st.floats(width=32)), max_size=4),
)
def test_any_numbers_make_a_page(perplexities, losses, rates, sizes, pruned):
    report = Report(
        title="any",
        models=[ModelRow(name=f"m{i}", perplexity=value) for i, value in enumerate(perplexities)],
        history=[{"step": step, "loss": loss} for step, loss in enumerate(losses)],
        flips={"a.b": list(enumerate(rates))},
        sizes={f"s{i}": size for i, size in enumerate(sizes)},
        pruning=[pruning_row(f"m.{i}.a", error=error, sensitivity=s) for i, (error, s) in enumerate(pruned)],
    )
    assert _Page(render_page(report)).open == []
    json.dumps(report.as_json(), allow_nan=False)


@pytest.mark.parametrize("function, value, text", [
    (human_bytes, None, "–"), (human_bytes, 0, "0 B"), (human_bytes, 999, "999 B"),
    (human_bytes, 1000, "1.00 kB"), (human_bytes, 12_598_896, "12.6 MB"), (human_bytes, 8_469_504, "8.47 MB"),
    (human_bytes, 999_600, "1.00 MB"), (human_bytes, 123_456_789, "123 MB"),
    (human_flops, 0.0, "0.00 FLOP"), (human_flops, 2.877e15, "2.88 PFLOP"), (human_flops, 36.5e12, "36.5 TFLOP"),
    (human_flops, 5e21, "5000 EFLOP"), (human_bytes, 5 * 10**15, "5000 TB"),
    (human_count, None, "–"), (human_count, 1_640_000, "1,640,000"),
    (human_seconds, 0.25, "0.2 s"), (human_seconds, 59.7, "1 min 0 s"), (human_seconds, 42.0, "42 s"),
    (human_seconds, 3725.0, "1 h 2 min"), (human_seconds, 0.0, "0.0 s"),
    (human_seconds, 0.00421, "4.21 ms"), (human_seconds, 0.09996, "100 ms"),
    (percent, None, "–"), (percent, 0.5, "50.00 %"),
    (number, None, "–"), (number, 3.87823, "3.878"), (number, 521.71, "521.7"), (number, 12345.6, "12,346"),
    (number, 0.0, "0.0000"), (number, 0.00512, "0.005120"), (number, 1e-5, "1.000e-05"),
    (number, 2.5e9, "2.500e+09"), (number, math.inf, "inf"),
])  # fmt: skip
def test_numbers_are_written_for_people(function, value, text):
    assert function(value) == text


def test_a_report_that_is_read_back_is_the_same(tmp_path):
    report = full_report()
    report.pruning[0] = PruningRow(**{**vars(report.pruning[0]), "error": math.nan, "sensitivity": math.inf})
    write_report(report, tmp_path)
    found = read_report(tmp_path / "report.json")
    assert math.isnan(found.pruning[0].error) and found.pruning[0].sensitivity == math.inf
    assert found.as_json() == report.as_json()
    assert [type(row) for row in found.models + found.pruning] == [type(row) for row in report.models + report.pruning]
    assert found.pruning[0].shape == report.pruning[0].shape


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "{file}: is not JSON ("),
        ('{"report_version": 1}', "{file}: report: title is missing. The report is of another version, or damaged."),
        ('{"report_version": 2}', "{file}: report: report_version is 2, this hf_adaptive_sparse reads 1."),
    ],
)
def test_a_damaged_report_is_refused(text, message, tmp_path):
    file = tmp_path / "report.json"
    file.write_text(text)
    with pytest.raises(FormatError) as refusal:
        read_report(file)
    assert str(refusal.value).startswith(message.replace("{file}", str(file)))
    with pytest.raises(FormatError, match="absent.json: cannot be read: No such file or directory"):
        read_report(tmp_path / "absent.json")


def test_a_plot_is_a_png_as_well_and_the_same_one_every_time():
    first = drawing.as_png(plots.perplexity_bars, full_report().models)
    assert first.startswith(b"\x89PNG") and first == drawing.as_png(plots.perplexity_bars, full_report().models)
    assert drawing.as_png(plots.perplexity_bars, []) is None
    assert plots.perplexity_bars(full_report().models).startswith(b"<?xml")
