"""What each benchmark costs, by its settings: responses, verdicts and downloads, for the dry run.

Counts are of one method, at most: what is cached is neither sampled nor judged again.
"""

from prmd.artifacts.paths import find_user_path
from prmd.benchmarks.base import NotRunError, needed_data
from prmd.benchmarks.hh_holdout import no_hh_rows
from prmd.benchmarks.mt_bench import TURNS, no_writer
from prmd.benchmarks.truthfulqa import no_questions
from prmd.benchmarks.truthfulqa_generation import no_truth_judge
from prmd.config.evaluation import EvaluationConfig, JailbreakBenchConfig, MtBenchConfig, TextJudgeConfig
from prmd.data.readers import local_path

_DOWNLOADS = {"realtoxicityprompts": "70 MB", "jailbreakbench": "0.1 MB", "mt_bench": "0.1 MB"}
"""About what the pinned revisions take."""
BEHAVIORS, QUESTIONS = 100, 80
"""As published: of either kind in JailbreakBench, and in MT-Bench."""


def cost_of(name: str, config: EvaluationConfig) -> str | None:
    """One clause on the responses and verdicts that a benchmark asks of a method, and its download; None: none to speak of."""
    settings = config.benchmarks
    if name == "realtoxicityprompts":
        toxic = settings.realtoxicityprompts
        prompts = "all" if toxic.prompts is None else f"{toxic.prompts:,}"
        number = "" if toxic.prompts is None else f" = {toxic.prompts * toxic.samples_per_prompt:,}"
        work = (
            f"{prompts} prompts x {toxic.samples_per_prompt} samples{number} responses of at most {toxic.max_new_tokens} "
            f"tokens, each scored by {toxic.scorer}"
        )
        return work + _download(name, toxic.path, toxic.revision)
    if name == "jailbreakbench":
        return _jailbreak_cost(settings.jailbreakbench, config.text_judge) + _download(
            name, settings.jailbreakbench.path, settings.jailbreakbench.revision
        )
    if name == "mt_bench":
        return _mt_bench_cost(settings.mt_bench) + _download(
            name, settings.mt_bench.path, settings.mt_bench.revision
        )
    return None


def why_not(name: str, config: EvaluationConfig) -> str | None:
    """Why a benchmark will not run, in the words of the run, whatever stages before it still make; None where nothing says so yet."""
    kind, section = config.text_judge.kind, getattr(config.benchmarks, name, None)
    if hasattr(section, "path"):
        key = f"benchmarks.{name}.path"
        try:
            with needed_data(section.path, key):
                local_path(section.path, key)
        except NotRunError as error:
            return str(error)
    if name == "hh_holdout":
        return no_hh_rows(config.shared.data.approach)
    if name == "truthfulqa":
        return no_questions(config)
    if name == "truthfulqa_generation":
        return no_truth_judge(config) or no_questions(config)
    if name == "mt_bench" and kind in ("none", "strings", "classifier"):
        return no_writer(kind)
    if name == "jailbreakbench" and kind == "none":
        return "judge missing at text_judge.kind: none; strings needs no model"
    return None


def _jailbreak_cost(settings: JailbreakBenchConfig, judge: TextJudgeConfig) -> str:
    number = min(settings.max_behaviors or BEHAVIORS, BEHAVIORS)
    attacks = ", and one for each attack" if settings.attacks else ""
    by = (
        "no judge's verdict (refusal phrases)"
        if judge.kind == "strings"
        else f"as many verdicts by {judge.kind}"
    )
    return f"{number} harmful and {number} benign requests x 1 response of at most {settings.max_new_tokens} tokens{attacks}; {by}"


def _mt_bench_cost(settings: MtBenchConfig) -> str:
    number = min(settings.max_questions or QUESTIONS, QUESTIONS)
    pairwise = f", and {4 * number} more of a policy against the reference" if settings.pairwise else ""
    return (
        f"{number} questions x {len(TURNS)} answers of at most {settings.max_new_tokens} tokens; {len(TURNS) * number} "
        f"verdicts{pairwise}"
    )


def _download(name: str, path: str | None, revision: str) -> str:
    if path is None or find_user_path(path):
        return ""
    return f"; downloads {path}@{revision[:12]}, about {_DOWNLOADS[name]}, once"
