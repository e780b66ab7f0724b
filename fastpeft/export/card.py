"""The README.md of an export: what it is, how it was trained, how to load it."""

from __future__ import annotations

from typing import Any

from fastpeft._version import __version__
from fastpeft.export.exported import Exported
from fastpeft.export.loading import base_name
from fastpeft.export.plan import Plan
from fastpeft.export.reader_usage import FOLDER, commands, mlx_example
from fastpeft.runs.events import number
from fastpeft.runs.parts import figure
from fastpeft.standins import EMBEDDED_PREFIX
from fastpeft.tasks import Task

STAND_IN_WARNING = (
    "STAND-IN: trained on a small model or on generated data that ship with fastpeft, because the real ones could not "
    "be reached or were not asked for. Its numbers say nothing about a real task"
)

_LOAD_ADAPTER = """\
from peft import PeftModel
from transformers import {imports}

folder = "{folder}"
tokenizer = AutoTokenizer.from_pretrained(folder)
base = {auto}.from_pretrained(
    {base},{options}
)
{fitting}model = PeftModel.from_pretrained(base, folder).eval()
"""

_LOAD_MERGED = """\
from transformers import {imports}

folder = "{folder}"
model = {auto}.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
"""

_NAMED = ("id2label", "label2id", "problem_type")
_REMARKS = {"ignore_mismatched_sizes": "  # the head comes with the adapter"}

_FOUR_BITS = """
    quantization_config=BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="bfloat16",
    ),"""


def card_text(plan: Plan, exported: Exported, task: Task, eos_token_ids: tuple[int, ...] = ()) -> str:
    """The whole file, front matter included. `eos_token_ids`: of a causal language model."""
    import yaml

    head: dict[str, Any] = {
        "library_name": "transformers" if plan.merge else "mlx" if _own_files(plan) else "peft",
        "pipeline_tag": task.pipeline_tag,
        "tags": ["fastpeft", plan.run.method],
    }
    name, on_hub = base_name(plan.run.model)
    if on_hub:  # a hub refuses a path here
        head["base_model"] = name
    parts = [f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n", f"# {plan.folder.path.name}\n"]
    if exported.stand_in:
        parts.append(f"**{STAND_IN_WARNING}.**\n")
    parts += [_facts(plan, exported, task), "## Use\n", *_usage(plan, exported, task, eos_token_ids)]
    parts += [f"{note}.\n" for note in exported.notes]
    if plan.merge and task.card_pipeline():
        parts.append(f"{task.card_pipeline()}\n")
    if not plan.merge:
        parts.append(_about_base(plan))
    elif plan.run.model.quantisation != "none":
        parts.append(
            "The update is merged into the weights that the base model's 4 bits stand for, as it was trained on them, "
            "and not into the base model's own.\n"
        )
    if exported.trimmed is not None and not plan.merge and plan.reader is None:
        parts.append(
            "Matrices have ranks of their own (`rank_pattern` and `alpha_pattern`), and their scale lies in B: "
            "lora_alpha / r is 1. A reader that knows `rank_pattern` but not `alpha_pattern` scales them wrongly.\n"
        )
    return "\n".join(parts)


def _own_files(plan: Plan) -> bool:
    return plan.reader is not None and plan.reader.own_files


def _facts(plan: Plan, exported: Exported, task: Task) -> str:
    run, metric, check = plan.run, plan.metric, exported.check
    kind = "a merged model" if plan.merge else "an adapter for mlx-lm" if _own_files(plan) else "a PEFT adapter"
    num_rows = metric.get("num", exported.num_validation)
    rows = {
        "what": f"{kind}: the {plan.weights} weights of the run `{plan.folder.path.name}`",
        "base model": f"`{run.model.name}`, revision `{run.model.revision}`{_HELD[run.model.quantisation]}",
        "task": task.card_task(),
        "method": run.method if plan.full else f"{run.method}, rank {run.adapter.rank}, alpha {run.adapter.alpha:g}",
        "metric": f"{metric['name']} {number(metric['value']):.4f} on {num_rows:,} validation rows"
        if "value" in metric
        else "none was logged",
        "budget": _budget(plan),
    }
    if metric.get("more"):
        rows["also"] = ", ".join(f"{name} {figure(value)}" for name, value in metric["more"].items())
    if exported.trimmed is not None:
        summary, change = exported.trimmed.summary(), exported.metric
        rows["trimmed"] = (
            f"to {summary['share']:.4g} of each update's energy: ranks {summary['rank_min']} to "
            f"{summary['rank_max']}, {summary['rank_total']:,} of {summary['rank_before_total']:,} in total; "
        ) + (f"{change.name} {change.before:.4f} before, {change.after:.4f} after" if change else "not scored again")
    if plan.reader is not None:
        rows["for"] = plan.reader.name
        if exported.layout is not None:
            rows["for"] += f"; one rank, {exported.layout.rank}, and one scale, {exported.layout.scale:g}"
    rows["checked"] = (
        f"loaded again, its logits differ by at most {check.difference:.1e} from the trained model's on "
        f"{check.num_rows} {check.where} (fp32)"
    )
    if check.num_same is not None:
        rows["checked"] += f"; the largest is the same on {check.num_same}"
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


def _usage(plan: Plan, exported: Exported, task: Task, eos_token_ids: tuple[int, ...]) -> list[str]:
    """The reader's own commands, and Python."""
    base, on_hub = base_name(plan.run.model)
    parts = []
    if plan.reader is not None:
        rank = exported.layout.rank if exported.layout else None
        revision = plan.run.model.revision if on_hub else None
        shell = commands(plan.reader, plan.merge, base, revision, plan.folder.path.name, rank)
        parts += [f"With {plan.reader.name}:\n", f"```sh\n{shell}\n```\n"]
    if _own_files(plan):
        code = mlx_example(plan.merge, base, task.card_prompt(), exported.max_length)
    else:
        parts += ["With PEFT, which reads this folder as well:\n"] if plan.reader and not plan.merge else []
        code = _load(plan, exported, task) + task.card_example(exported.max_length, eos_token_ids)
    parts.append(f"```python\n{code}```\n")
    if not plan.merge and task.model_settings().get("id2label"):
        parts.append(
            f"`pipeline({task.pipeline_tag!r}, model=folder)` takes tokenizer and label names of the *base* model. "
            "Give it `model=model, tokenizer=tokenizer` as they are loaded above.\n"
        )
    return parts


def _load(plan: Plan, exported: Exported, task: Task) -> str:
    auto = task.auto_class
    imports = f"{auto}, AutoTokenizer"
    if plan.merge:
        return _LOAD_MERGED.format(auto=auto, imports=imports, folder=FOLDER)
    name, on_hub = base_name(plan.run.model)
    base = repr(name)
    if on_hub and plan.run.model.revision != "main":
        base += f", revision={plan.run.model.revision!r}"
    options = ""
    settings = {k: v for k, v in task.model_settings().items() if k in _NAMED} | task.load_arguments()
    for key, value in settings.items():
        options += f"\n    {key}={value!r}," + _REMARKS.get(key, "")
    if plan.run.model.quantisation == "nf4":
        options, imports = _FOUR_BITS, f"{imports}, BitsAndBytesConfig"
    fitting = "".join(f"{line}\n" for line in exported.fitting)
    return _LOAD_ADAPTER.format(auto=auto, imports=imports, base=base, options=options, folder=FOLDER, fitting=fitting)


_HELD = {"none": "", "nf4": ", held in 4 bits (NF4) while training"}


def _about_base(plan: Plan) -> str:
    name, on_hub = base_name(plan.run.model)
    if on_hub:
        return f"The base model is not in this folder; it is `{name}` on the hub.\n"
    if plan.run.model.name.startswith(EMBEDDED_PREFIX):
        return (
            "The base model is not in this folder: it ships with fastpeft, and the path above is that of the machine "
            "that wrote this. Elsewhere it is `fastpeft.standins.PATHS`; or export with --merge, which needs "
            "no base.\n"
        )
    return (
        "The base model is not in this folder, and the path above is that of the machine that wrote this: elsewhere "
        "give the path of the same model there; or export with --merge, which needs no base.\n"
    )
