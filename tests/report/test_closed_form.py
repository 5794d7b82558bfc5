"""The gate on the report's page, and its absence."""

from pathlib import Path

from prmd.artifacts import io
from prmd.artifacts.paths import ArtifactPaths
from prmd.objectives import OBJECTIVES
from prmd.report.evaluation_sections import gate_section
from prmd.report.page import build_report

ROW = {
    "worst_gain": -0.125,
    "mean_of_min": -0.5,
    "reference_mean_of_min": -0.75,
    "kl": 0.35,
    "reward_scale": 0.1,
    "effective_sample_size": 3.14,
    "n_samples": 4,
}
GATE = {
    "kl_target": 4.0,
    "kl": 0.347,
    "prompts": 256,
    "samples_per_prompt": 4,
    "source": "reference samples of the held-out prompts",
    "rows": [ROW | {"method": "hard_min", "gains": dict(zip(OBJECTIVES, (0.25, -0.125, 0.5), strict=True))}],
    "refused": [{"method": "maxmin", "reason": "policy.methods: maxmin: no weights <found>"}],
}


def test_the_gate_is_a_table_of_the_page(tmp_path: Path) -> None:
    paths = ArtifactPaths(tmp_path, "embedded")
    assert gate_section(paths) is None
    assert "Closed-form gate" not in build_report(paths).read_text(encoding="utf-8")
    io.write_json(paths.reward_analysis / "gate.json", GATE)
    section = gate_section(paths)
    assert section["table"].columns[:4] == ("method", *OBJECTIVES)
    assert section["table"].rows == (("hard_min", "0.25", "−0.12", "0.50", "−0.12", "−0.50", "3.1"),)
    text = build_report(paths).read_text(encoding="utf-8")
    assert (
        "Closed-form gate" in text
        and "E min of the reference: −0.75" in text
        and "256 held-out prompts" in text
    )
    assert "no weights &lt;found&gt;" in text
