"""The report: complete, self-contained, honest about what is missing, safe with hostile text, fit for a phone."""

import base64
import csv
import html
import html.parser
import io as text_io
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from synthetic_evaluation import HOSTILE, METHODS
from synthetic_outputs import write_outputs

from prmd.artifacts import io
from prmd.artifacts.paths import ArtifactPaths
from prmd.objectives import OBJECTIVES
from prmd.report.evaluation_sections import approaches_section, headline_section
from prmd.report.figures import INK
from prmd.report.page import build_report, embed
from prmd.report.tables import (
    Table,
    cell_parts,
    format_estimate,
    format_number,
    to_latex,
    to_markdown,
    with_mark,
)

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(html.parser.HTMLParser):
    """Tags with attributes, visible text, and text per table cell of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._hidden = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._hidden = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._hidden else data


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_report(write_outputs(tmp_path_factory.mktemp("root")))


@pytest.fixture(scope="module")
def page(built: Path) -> Page:
    return Page(built.read_text(encoding="utf-8"))


def test_asks_nothing_of_the_network(built: Path, page: Page) -> None:
    for tag, attributes in page.tags:
        for name in ("src", "href", "action", "poster", "srcset", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name, value[:80])
    text = built.read_text(encoding="utf-8")
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|https?://", text)


def test_headings_and_images_are_accessible(page: Page) -> None:
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    figures_of = {"reward models": 3 * 6, "policies": 1 + 2 * 2, "metrics": 7, "data": 4}
    assert len(images) == sum(figures_of.values())
    assert all(len(attributes["alt"]) > 20 for attributes in images)
    identifiers = [a["id"] for _, a in page.tags if "id" in a]
    assert len(identifiers) == len(set(identifiers))
    targets = {a["href"][1:] for tag, a in page.tags if tag == "a"}
    assert targets <= set(identifiers)


def test_every_method_and_objective_is_there(page: Page) -> None:
    comparison = page.text[page.text.index("Result") : page.text.index("Who judged")]
    for name in (*METHODS, "reference", *OBJECTIVES, "KL, nats/response", "24 held-out prompts"):
        assert name in comparison
    judged = page.text[page.text.index("Who judged") : page.text.index("Paired comparisons")]
    assert judged.count("not distinguishable from chance") == 1  # honest alone, 0.55 ± 0.10
    assert judged.count("prefers the constant answer") == 1 and "harmless: the judge prefers" in judged
    assert "s 1.10 to 1.10 over members, 20 prompts" in page.text
    assert "machinery" in page.text  # the embedded approach says what its size allows
    assert page.text.count("mt_bench (data missing at data/raw/mt_bench)") == 1
    assert page.text.index("Not run: hh_holdout") > page.text.index("jbb_nonrefusal[lead-regex]")
    assert "0.449" in page.text  # TruthfulQA MC2's chance line
    assert "near-duplicate of a test prompt" in page.text
    assert "Test CPU" in page.text and "0123456789" in page.text


def test_every_measure_has_a_table(page: Page) -> None:
    for text in (
        "win rate at equal length, honest",
        "effect of length, log-odds, helpful",
        "minimum, mean of the worst 10 % of prompts",
        "dominates a reference sample",
        "hypervolume above the reference",
        "KL, nats per token",
        "helpful: tied",
        "Who beats whom: harmless",
        "mean of the worst member (P15), helpful",
        "the lowest of these (P16)",
        "violation rate (P17)",
        "best of 4, hard min",
        "highest at d = 2.8",
        "66 %",
        "of all policies together 0.030 [0.010, 0.050]",
    ):
        assert text in page.text, text


def test_judged_and_paired_benchmarks_are_told(page: Page) -> None:
    told = page.text[page.text.index("Paired comparisons on benchmarks") : page.text.index("Labelled for")]
    assert "McNemar, 6 against 2 of 40" in told and "0.580" in told
    assert "jailbreakbench, hard_min" in told and "lead-regex (strings)" in told
    meanings = page.text[
        page.text.index("What the metrics mean") : page.text.index("Paired comparisons on b")
    ]
    assert "less is better" in page.text and "lower" in meanings and "mc2" in meanings
    assert "rtp_emt" not in meanings  # that benchmark did not run
    assert "97 of 100: 0.97 [0.95, 0.99]" in told
    assert "0.88 [0.86, 0.90], κ 0.747" in told and "(published)" in told


def test_marks_say_what_the_paired_tests_found(built: Path, page: Page) -> None:
    markdown = (built.parent / "tables.md").read_text(encoding="utf-8")
    row = next(line for line in markdown.splitlines() if line.startswith("| hard_min |"))
    helpful, minimum = row.split("|")[2], row.split("|")[6]
    assert helpful.endswith("▲ ") and "▲" not in minimum and row.count("▲") == 1
    assert "## Benchmarks\n\n| benchmark | metric | chance | n |" in markdown
    assert "## Who judged the benchmarks" in markdown
    assert "▲ ▼: better or worse than dpo on the same prompts, p < .05 after Holm" in page.text


def test_every_number_is_in_one_table_for_machines(built: Path) -> None:
    text = (built.parent / "measures.csv").read_text(encoding="utf-8")
    rows = {(r["measure"], r["method"]): r for r in csv.DictReader(text_io.StringIO(text))}
    violation = rows["violation rate (P17)", "dpo"]
    assert (violation["value"], violation["clusters"], violation["responses"]) == ("0.31", "24", "48")
    assert float(violation["chance"]) == 0.22 and violation["interval"] == "bootstrap"
    tail = rows["minimum, mean of the worst 10 % of prompts", "reference"]
    assert (tail["value"], tail["low"], tail["high"]) == ("-1.9", "", "")
    assert ("win rate, helpful", "hard_min") in rows and (
        "dominates a reference sample",
        "reference",
    ) not in rows


def test_numbers_are_those_of_the_files(built: Path, page: Page) -> None:
    rows = io.read_json(built.parents[1] / "metrics" / "embedded" / "comparison.json")["rows"]
    table = list(csv.DictReader(text_io.StringIO((built.parent / "tables.csv").read_text(encoding="utf-8"))))
    assert [row["method"] for row in table] == [row["method"] for row in rows]
    for cells, row in zip(table, rows, strict=True):
        assert float(cells["win_rate_honest_value"]) == row["win_rate"]["honest"]["value"]
        assert float(cells["kl_high"]) == row["kl"]["high"]
        written = f"{row['kl']['value']:.2f} [{row['kl']['low']:.2f}, {row['kl']['high']:.2f}]"
        assert written in page.text
        assert written in (built.parent / "tables.md").read_text(encoding="utf-8")
        assert written in (built.parent / "tables.tex").read_text(encoding="utf-8")


def test_model_text_is_never_markup(built: Path) -> None:
    text = built.read_text(encoding="utf-8")
    assert HOSTILE not in text
    assert "<script>window.hacked" not in text
    assert "&lt;script&gt;window.hacked" in text
    assert text.count("<script") == text.count("</script>") == 3  # samples, their browser, tables that scroll


def test_an_empty_project_names_every_command(tmp_path: Path) -> None:
    text = build_report(ArtifactPaths(tmp_path, "hh_truthfulqa")).read_text(encoding="utf-8")
    for script in (
        "1_data_preparation/split_objectives.py",
        *(f"2_reward_modeling/train_{k}_rm.py" for k in OBJECTIVES),
        "3_policy_training/pessimistic_dpo.py",
        "4_evaluation/compute_metrics.py",
        "4_evaluation/benchmark_eval.py",
    ):
        assert f"run {script}" in text.replace("<code>", "").replace("python ", "")
    assert "machinery" not in text
    assert "<img" not in text
    assert not (tmp_path / "outputs" / "report" / "tables.md").exists()


@pytest.mark.parametrize("gone", ["comparison.json", "reference.json", "hard_min.json", "samples/dpo.jsonl"])
def test_missing_pieces_are_stated_not_raised(
    tmp_path: Path, gone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prmd.report.page.draw_figures", lambda paths: dict.fromkeys(FIGURE_GROUPS, ()))
    paths = write_outputs(tmp_path)
    (paths.metrics / gone).unlink()
    text = build_report(paths).read_text(encoding="utf-8")
    assert ("Not there yet" in text) == (gone == "comparison.json")


FIGURE_GROUPS = ("metrics", "reward_models", "policies", "data")


def test_half_written_artifacts_are_not_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prmd.report.page.draw_figures", lambda paths: dict.fromkeys(FIGURE_GROUPS, ()))
    paths = write_outputs(tmp_path)
    shutil.move(paths.policy("hard_min"), paths.policies / ".hard_min.partial")
    io.write_text(paths.reward_analysis / "honest.json", '{"objective": ')
    (paths.reward_model("honest") / "metrics.json").unlink()
    text = build_report(paths).read_text(encoding="utf-8")
    assert "policy: hard_min" not in text and "partial" not in text
    assert "train_honest_rm.py data.approach=embedded" in text


def test_approaches_are_compared_only_where_they_can_be(tmp_path: Path) -> None:
    paths = write_outputs(tmp_path)
    assert approaches_section(paths) is None
    write_outputs(tmp_path, "pku_safe")
    section = approaches_section(paths)
    assert section["table"] is None and section["apart"] == ["pku_safe"]
    assert section["command"] == (
        'python 4_evaluation/compute_metrics.py data.approach=embedded "generation.other_approaches=[pku_safe]"'
    )
    comparison = io.read_json(paths.metrics / "comparison.json")
    comparison["rows"].append(
        comparison["rows"][-1] | {"method": "pku_safe@hard_min", "approach": "pku_safe"}
    )
    io.write_json(paths.metrics / "comparison.json", comparison)
    section = approaches_section(paths)
    assert [row[0] for row in section["table"].rows] == [
        *(f"embedded: {m}" for m in METHODS),
        "pku_safe: hard_min",
    ]
    assert section["apart"] == [] and section["command"] is None


def test_summary_claims_only_what_the_bands_say(tmp_path: Path) -> None:
    paths = ArtifactPaths(tmp_path, "embedded")
    bands = {"reference": (0.5, 0.5), "a": (0.51, 0.6), "b": (0.4, 0.6), "c": (0.3, 0.49)}

    def summary(names: tuple[str, ...]) -> str:
        rows = [
            {
                "method": m,
                "win_rate": {},
                "worst": {"value": sum(bands[m]) / 2, "low": bands[m][0], "high": bands[m][1]},
            }
            for m in names
        ]
        io.write_json(paths.metrics / "comparison.json", {"rows": rows})
        return headline_section(paths)["summary"]

    assert summary(("reference", "a", "b", "c")) == (
        "Even on the worst objective, a beat the reference: the whole band lies above ½. "
        "For c the whole band lies below ½. For 1 of 3 the band contains ½: not decided."
    )
    assert summary(("reference", "b")).startswith("The policy has no worst-objective band wholly above ½. ")


def test_the_page_begins_with_the_verdict(built: Path, page: Page) -> None:
    first = page.text[: page.text.index("Benchmarks")]
    assert (
        "No verdict: the judge of honest cannot be told from chance; the judge of harmless prefers a constant"
        in first
    )
    assert "beat" not in page.text[: page.text.index("Who judged")]  # not with a judge at chance
    assert "24 prompts × 2 samples · commit 0123456789" in first
    assert "1 of 3 judges usable" in first and "1 of 4 tests against DPO significant" in first
    assert "KL 0.90 to 2.70 nats" in first
    headings = [attributes for tag, attributes in page.tags if tag == "th" and "colspan" in attributes]
    assert [h["colspan"] for h in headings] == ["4"]
    assert "win rate against the reference (0.50 = no change)" in page.text
    assert "helpful to worst objective: win rate against the reference" in (
        built.parent / "tables.md"
    ).read_text(encoding="utf-8")
    latex = (built.parent / "tables.tex").read_text(encoding="utf-8")
    assert r"\multicolumn{1}{c}{} & \multicolumn{4}{c}{win rate against the reference" in latex


def test_figures_have_a_variant_for_dark_pages(page: Page) -> None:
    images = [a["src"] for tag, a in page.tags if tag == "img"]
    dark = [a for tag, a in page.tags if tag == "source"]
    assert len(dark) == len(images)
    assert {a["media"] for a in dark} == {"(prefers-color-scheme: dark)"}
    for light, other in zip(images, (a["srcset"] for a in dark), strict=True):
        drawings = [base64.b64decode(uri.split(",")[1]).decode() for uri in (light, other)]
        assert all(text.lstrip().startswith("<?xml") and "</svg>" in text for text in drawings)
        assert INK.lower() in drawings[0] and INK.lower() not in drawings[1] and "#E6E9ED" in drawings[1]


def test_cells_are_cut_at_their_intervals() -> None:
    assert cell_parts("0.61 [0.55, 0.67] ↑") == [("0.61 ", False), ("[0.55, 0.67]", True), (" ↑", False)]
    assert "".join(piece for piece, _ in cell_parts("a [1], b [2] / c")) == "a [1], b [2] / c"


def test_format_estimate() -> None:
    assert format_estimate({"value": 0.5649, "low": 0.481, "high": 0.6299}) == "0.56 [0.48, 0.63]"
    assert format_estimate({"value": -0.001, "low": -0.5, "high": 0.5}) == "0.00 [−0.50, 0.50]"
    assert format_estimate({"value": 12.34, "low": None, "high": None}, 1) == "12.3"
    assert format_estimate(None) == "–" == format_number(None)
    assert format_estimate(0.5) == "0.50"


def test_marks_follow_the_interval() -> None:
    assert with_mark({"value": 0.6, "low": 0.51, "high": 0.7}).endswith(" ↑")
    assert with_mark({"value": 0.4, "low": 0.3, "high": 0.49}).endswith(" ↓")
    assert with_mark({"value": 0.55, "low": 0.5, "high": 0.6}) == "0.55 [0.50, 0.60]"
    assert with_mark({"value": 0.3, "low": 0.27, "high": 0.33}, neutral=0.226).endswith(" ↑")
    assert with_mark(None) == "–"


def test_tables_escape_their_format() -> None:
    table = Table(("a_b", "50 %"), (("x|y", "−1 & {2} \\ ↑"),), "caption")
    assert r"| x\|y | −1 & {2} \ ↑ |" in to_markdown(table)
    latex = to_latex(table)
    assert r"a\_b & 50 \% \\" in latex
    assert r"$-$1 \& \{2\} \textbackslash{} $\uparrow$ \\" in latex


PROBE = """<script>
window.problems = [];
window.addEventListener("error", (event) => window.problems.push(event.message));
window.addEventListener("load", () => {
  const root = document.documentElement, box = document.getElementById("sample"), seen = [];
  document.querySelectorAll("details").forEach((folded) => { folded.open = true; });
  const at = () => document.getElementById("position").textContent;
  const press = (key, on) => on.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
  seen.push(at()); press("ArrowRight", document.body); seen.push(at());
  document.getElementById("next").click(); seen.push(at());
  press("ArrowLeft", document.body); seen.push(at());
  press("ArrowRight", document.querySelector(".scroll")); seen.push(at());
  const wide = [...document.querySelectorAll("body *")].filter((e) => !e.closest(".scroll, pre") && e.getBoundingClientRect().right > innerWidth + 1);
  const answers = box.querySelectorAll(".answer").length;
  const broken = [...document.images].filter((i) => i.complete && !i.naturalWidth).length;
  parent.postMessage(JSON.stringify({
    width: innerWidth, scroll: root.scrollWidth, wide: wide.map((e) => e.tagName + "." + e.className), seen, answers, broken,
    hacked: !!window.hacked, problems: window.problems,
    ink: getComputedStyle(document.body).color, paper: getComputedStyle(document.body).backgroundColor,
  }), "*");
});
</script>"""


FRAME = """<!DOCTYPE html><title>frame</title><output id="probe"></output><script>
window.addEventListener("message", (event) => { document.getElementById("probe").textContent = event.data; });
</script><iframe src="index.html" width="{width}" height="2000" style="border:0"></iframe>"""
"""A frame of the wanted width, because no Chromium window is narrower than 500 pixels."""


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "light"), (390, "dark")])
def test_in_chromium(built: Path, tmp_path: Path, width: int, scheme: str) -> None:
    """Loads without errors, nothing overflows even unfolded, buttons and arrow keys turn the samples, text is legible."""
    probed = built.read_text(encoding="utf-8").replace("<head>", "<head>" + PROBE, 1)
    io.write_text(tmp_path / "index.html", probed)
    frame = io.write_text(tmp_path / "frame.html", FRAME.replace("{width}", str(width)))
    result = run_chromium(frame, tmp_path / "profile", scheme)
    told = json.loads(html.unescape(re.search(r'<output id="probe">(.*?)</output>', result.stdout, re.S)[1]))
    assert told["width"] == width
    assert told["scroll"] <= width, told["wide"]
    assert told["wide"] == [] and told["problems"] == [] and told["broken"] == 0 and not told["hacked"]
    assert [text.split(" ")[0] for text in told["seen"]] == ["1", "2", "3", "2", "2"]
    assert told["answers"] == len(METHODS) + 1
    ink, paper = luminance(told["ink"]), luminance(told["paper"])
    assert (paper > ink) == (scheme == "light")
    assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) > 7  # WCAG's contrast ratio, level AAA
    assert "CONSOLE" not in result.stderr


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)`, by WCAG."""
    parts = [int(v) / 255 for v in re.findall(r"\d+", colour)[:3]]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def run_chromium(page: Path, profile: Path, scheme: str) -> subprocess.CompletedProcess[str]:
    preferred = {"dark": 0, "light": 1}[scheme]  # Blink's numbers
    flags = [
        f"--blink-settings=preferredColorScheme={preferred}",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
    ]
    flags += ["--enable-logging=stderr", "--window-size=1400,2100", f"--user-data-dir={profile}"]
    command = [
        CHROMIUM,
        *flags,
        "--hide-scrollbars",
        "--virtual-time-budget=4000",
        "--dump-dom",
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120, check=True)


def test_a_drawing_that_cannot_be_read_is_shown_as_its_png(tmp_path: Path) -> None:
    png = b"\x89PNG\r\n\x1a\n"
    path = tmp_path / "win_rates.png"
    path.write_bytes(png)
    shown = f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
    for damage in (None, png):
        if damage:
            path.with_suffix(".svg").write_bytes(damage)
        assert (embed(path).source, embed(path).dark) == (shown, shown)
