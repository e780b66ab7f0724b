"""The README.md of an export: what it is, how it was trained, how to load it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastpeft._version import __version__
from fastpeft.data import ClassificationTask
from fastpeft.export.loading import base_name
from fastpeft.export.plan import Plan
from fastpeft.models.resolve import EMBEDDED_PREFIX
from fastpeft.runs.events import number

if TYPE_CHECKING:
    from fastpeft.export.write import Exported

STAND_IN_WARNING = (
    "STAND-IN: trained on a small model or on generated data that ship with fastpeft, because the real ones could not "
    "be reached or were not asked for. Its numbers say nothing about a real task"
)

_LOAD_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = "path/to/this/folder"
base = AutoModelForSequenceClassification.from_pretrained(
    {base},
    id2label={id2label!r},
    label2id={label2id!r},
    ignore_mismatched_sizes=True,  # the head comes with the adapter
)
model = PeftModel.from_pretrained(base, folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
"""

_LOAD_MERGED = """\
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = "path/to/this/folder"
model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
"""

_ASK = """\
batch = tokenizer({texts}, truncation=True, max_length={max_length}, return_tensors="pt")
print(model.config.id2label[model(**batch).logits.argmax(-1).item()])
"""


def card_text(plan: Plan, exported: Exported, task: ClassificationTask) -> str:
    """The whole file, front matter included."""
    import yaml

    head: dict[str, Any] = {
        "library_name": "transformers" if plan.merge else "peft",
        "pipeline_tag": "text-classification",
        "tags": ["fastpeft", plan.run.method],
    }
    name, on_hub = base_name(plan.run.model)
    if on_hub:  # a hub refuses a path here
        head["base_model"] = name
    parts = [f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n", f"# {plan.folder.path.name}\n"]
    if exported.stand_in:
        parts.append(f"**{STAND_IN_WARNING}.**\n")
    parts += [_facts(plan, exported, task), "## Use\n", f"```python\n{_usage(plan, task, exported.max_length)}```\n"]
    if not plan.merge:
        parts.append(_about_base(plan))
    if exported.trimmed is not None and not plan.merge:
        parts.append(
            "Matrices have ranks of their own (`rank_pattern` and `alpha_pattern`), and their scale lies in B: "
            "lora_alpha / r is 1. A reader that knows `rank_pattern` but not `alpha_pattern` scales them wrongly.\n"
        )
    return "\n".join(parts)


def _facts(plan: Plan, exported: Exported, task: ClassificationTask) -> str:
    run, metric = plan.run, plan.metric
    num_rows = len(task.validation.head(run.evaluation.max_examples))
    kind = "a merged model" if plan.merge else "a PEFT adapter"
    rows = {
        "what": f"{kind}: the {plan.weights} weights of the run `{plan.folder.path.name}`",
        "base model": f"`{run.model.name}`, revision `{run.model.revision}`",
        "task": f"{task.name}, labels {', '.join(task.label_names)}",
        "method": run.method if plan.full else f"{run.method}, rank {run.adapter.rank}, alpha {run.adapter.alpha:g}",
        "metric": f"{metric['name']} {number(metric['value']):.4f} on {num_rows:,} validation rows"
        if "value" in metric
        else "none was logged",
        "budget": _budget(plan),
    }
    if exported.trimmed is not None and exported.metric is not None:
        summary = exported.trimmed.summary()
        rows["trimmed"] = (
            f"to {summary['share']:.4g} of each update's energy: ranks {summary['rank_min']} to "
            f"{summary['rank_max']}, {summary['rank_total']:,} of {summary['rank_before_total']:,} in total; "
            f"{exported.metric.name} {exported.metric.before:.4f} before, {exported.metric.after:.4f} after"
        )
    rows["checked"] = (
        f"loaded again, its logits differ by at most {exported.check.difference:.1e} from the trained model's on "
        f"{exported.check.num_rows} validation rows (fp32)"
    )
    rows["made by"] = f"fastpeft {__version__}; more in export.json"
    lines = [f"| {name} | {value.replace('|', '&#124;')} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines, ""])


def _budget(plan: Plan) -> str:
    result = plan.result
    if result is None or not result.budget:
        return "not known"
    budget = result.budget
    spent = f"{budget['spent']:,.0f} of {budget['limit']:,.0f} {budget['kind']}"
    return f"{spent}; {result.steps:,} steps, {result.elapsed_s:,.0f} s; the run is {plan.status}"


def _usage(plan: Plan, task: ClassificationTask, max_length: int) -> str:
    labels = dict(enumerate(task.label_names))
    name, on_hub = base_name(plan.run.model)
    base = repr(name)
    if on_hub and plan.run.model.revision != "main":
        base += f", revision={plan.run.model.revision!r}"
    load = _LOAD_MERGED
    if not plan.merge:
        inverse = {label: i for i, label in labels.items()}
        load = _LOAD_ADAPTER.format(base=base, id2label=labels, label2id=inverse)
    texts = '"one text"' if task.validation.text_pair is None else '"one text", "the other"'
    return load + _ASK.format(texts=texts, max_length=max_length)


def _about_base(plan: Plan) -> str:
    name, on_hub = base_name(plan.run.model)
    if on_hub:
        return f"The base model is not in this folder; it is `{name}` on the hub.\n"
    if plan.run.model.name.startswith(EMBEDDED_PREFIX):
        return (
            "The base model is not in this folder: it ships with fastpeft, and the path above is that of the machine "
            "that wrote this. Elsewhere it is `fastpeft.models.embedded.PATHS`; or export with --merge, which needs "
            "no base.\n"
        )
    return (
        "The base model is not in this folder, and the path above is that of the machine that wrote this: elsewhere "
        "give the path of the same model there; or export with --merge, which needs no base.\n"
    )
