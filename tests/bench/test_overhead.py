"""The table of what adapters cost: its rows are what they are called. test_gpu_check.py runs the script."""

from __future__ import annotations

import argparse
import functools

import pytest
import torch

from bench import overhead
from bench.cost import count_launches, peak_mb
from bench.interleave import Round, Times, choose_device, interleave
from bench.models import Host, random_batches

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rows(tiny_model):
    host = Host.build(str(tiny_model), torch.float32, CPU)
    batches = random_batches(host, 4, 3, CPU)
    with overhead.Rows(host, overhead.run_config("all-linear", 4), batches, CPU) as built:
        yield built


def test_every_row_trains_the_same_frozen_weights_and_leaves_them_alone(rows):
    model = rows.host.backbone.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    steps = {name: rows.build(name) for name in overhead.ROWS}
    for step in steps.values():
        for index in range(3):
            step(index)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_the_gradient_of_the_frozen_row_goes_as_deep_as_with_adapters(rows):
    """To the output of every adapted layer, and not to the embeddings below them."""
    targets = overhead.match_targets(rows.host.backbone.model, rows.host.backbone.head, "all-linear")
    reached = {}
    for name in ("frozen", "fastpeft_lora"):
        backbone = rows.host.copy()
        frozen = name == "frozen"
        adapter = overhead.Frozen(backbone, targets) if frozen else rows._adapter("lora")
        inner = adapter.model if frozen else adapter.model.base_model.model
        seen = reached[name] = set()

        def watch(module, args, output, module_name, seen=seen):
            if output.requires_grad:
                output.register_hook(lambda grad: seen.add(module_name))

        for watched in [*targets, "deberta.embeddings"]:
            inner.get_submodule(watched).register_forward_hook(functools.partial(watch, module_name=watched))
        overhead.forward_backward(adapter, overhead.classification_loss, [rows.batches[0]], 4)
    assert reached["frozen"] == reached["fastpeft_lora"] == set(targets)


def test_the_loop_penalty_is_the_papers(rows):
    import peft

    backbone = rows.host.copy()
    model = peft.get_peft_model(backbone.model, peft.LoraConfig(r=4, target_modules=["query_proj"]))
    layers = [m for m in model.modules() if hasattr(m, "lora_A") and "default" in m.lora_A]
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    got = overhead._loop_penalty(model, alpha=0.1)()
    products = [m.lora_B["default"].weight @ m.lora_A["default"].weight for m in layers]
    assert len(layers) == 2
    assert float(got.detach()) == pytest.approx(
        0.1 * (1 - 1 / 2) * sum(float(p.detach().norm()) ** 2 for p in products), rel=1e-5
    )


def test_adalora_is_measured_while_it_prunes(rows):
    step = rows.build("peft_adalora")
    model = next(cell.cell_contents for cell in step.__closure__ if hasattr(cell.cell_contents, "peft_config"))
    settings = model.peft_config["default"]
    assert settings.tinit < overhead.PROGRESS * overhead.ADALORA_STEPS < settings.total_step - settings.tfinal
    step(0)
    step(1)
    singular = torch.cat([p.flatten() for name, p in model.named_parameters() if "lora_E" in name])
    assert 0 < int((singular == 0).sum()) < len(singular)


def test_an_unknown_model_or_row_is_named():
    args = argparse.Namespace(device="cpu", rows="frozen,nonsense", precision="fp32", model="nowhere")
    with pytest.raises(SystemExit, match=r"unknown: nonsense; there are frozen, "):
        overhead.measure(args)
    with pytest.raises(SystemExit, match=r"--model nowhere: neither minilm, deberta-v3-base nor"):
        Host.build("nowhere", torch.float32, CPU)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--json", "/proc/nowhere/out.json"], "--json: "),
        (["--repeats", "0"], "--repeats: "),
        (["--batch-size", "-1"], "--batch-size: "),
        (["--rank", "many"], "--rank: "),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_measured(monkeypatch, capsys, given, said):
    monkeypatch.setattr("sys.argv", ["overhead.py", *given])
    monkeypatch.setattr(overhead, "measure", lambda args: pytest.fail("measured"))
    with pytest.raises(SystemExit) as end:
        overhead.main()
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cuda: torch sees no GPU"):
        choose_device("cuda")


# ---- interleaving --------------------------------------------------------------------------


class Machine:
    """A clock that slows down steadily."""

    def __init__(self) -> None:
        self.now, self.order = 0.0, []

    def work(self, name, seconds):
        def call(index):
            self.order.append((name, index))
            self.now += seconds * (1 + 0.01 * len(self.order))

        return call

    def measure(self, run):
        began = self.now
        run()
        return self.now - began


def test_a_drift_of_the_machine_is_in_no_ratio():
    machine = Machine()
    calls = {"a": machine.work("a", 1.0), "b": machine.work("b", 1.1)}
    times = interleave(calls, 2, 20, lambda: False, machine.measure)
    assert [name for name, _ in machine.order[:4]] == ["a", "b", "b", "a"]
    assert [index for _, index in machine.order[:8]] == [0] * 4 + [1] * 4
    ratio, low, high = times.ratio("b", "a")
    assert ratio == pytest.approx(1.1)
    assert low <= ratio <= high
    assert high - low < 1e-9


def test_rounds_end_with_the_time_but_there_is_one():
    machine = Machine()
    assert len(interleave({"a": machine.work("a", 1.0)}, 1, 9, lambda: True, machine.measure).rounds) == 1
    times = interleave({"a": machine.work("a", 1.0)}, 1, 9, lambda: machine.now > 5, machine.measure)
    assert 1 < len(times.rounds) < 9


def test_the_interval_holds_the_ratio_and_is_none_for_a_few_rounds(seed):
    generator = torch.Generator().manual_seed(seed)
    noise = (1 + 0.02 * torch.randn(200, 2, generator=generator).abs()).tolist()
    times = Times([Round(0, {"a": (x, x), "b": (1.05 * y, 1.05 * y)}) for x, y in noise])
    ratio, low, high = times.ratio("b", "a")
    assert 1.04 < low < high < 1.06
    assert low <= ratio <= high
    assert high - low < 0.02
    assert Times(times.rounds[:4]).ratio("b", "a")[1:] == (None, None)


def test_medians_are_means_over_inputs_of_different_size():
    rounds = [Round(i % 2, {"a": (1.0, 1.0) if i % 2 else (3.0, 3.0)}) for i in range(8)]
    assert Times(rounds).median_s("a") == 2.0
    assert Times(rounds).spread_s("a") == 0.0


def test_times_are_of_inputs_that_all_have_met():
    """The heavier inputs came in the rounds of one alternative only."""
    size = [1.0, 10.0, 100.0]
    rounds = [Round(0, {"a": (2.0, 2.0), "b": (1.0, 1.0)})]
    rounds += [Round(i, {"b": (size[i], size[i])}) for i in range(3)]
    times = Times(rounds)
    assert times.common_inputs == {0}
    assert (times.median_s("a"), times.median_s("b")) == (2.0, 1.0)
    times.rounds += [Round(i, {"a": (2 * size[i], 2 * size[i])}) for i in (1, 2)]
    assert times.median_s("a") == 2 * times.median_s("b") == 74.0


def test_without_alternatives_there_is_no_round():
    assert interleave({}, 3, 400, lambda: False, lambda run: 1.0).rounds == []


@pytest.mark.parametrize(("seconds", "repeats", "is_short"), [(0.0, 400, True), (600.0, 3, False)])
def test_a_run_too_short_for_all_batches_says_so(tiny_model, capsys, seconds, repeats, is_short):
    args = argparse.Namespace(
        device="cpu", rows="peft_lora,fastpeft_iwlora,fastpeft_lora", precision="fp32", model=str(tiny_model),
        batch_size=4, targets="all-linear", rank=4, steps=1, seconds=seconds, repeats=repeats,
    )  # fmt: skip
    report = overhead.measure(args)
    widths = report["shape"]["widths"]
    assert report["widths_timed"] == (widths[:1] if is_short else widths)
    assert report["rounds"] == (2 if is_short else 6)
    assert all(row["step_ms"] > 0 for row in report["rows"])
    overhead.show(report)
    assert ("too short a run" in capsys.readouterr().out) == is_short


def test_rows_that_are_told_apart_closely_have_rounds_of_their_own_where_there_are_two():
    steps = dict.fromkeys(["peft_lora", "fastpeft_lora"], print)
    assert overhead.close_rows(steps) == {}
    steps["fastpeft_iwlora"] = print
    assert list(overhead.close_rows(steps)) == ["fastpeft_iwlora", "fastpeft_lora"]


# ---- cost ----------------------------------------------------------------------------------


def test_operators_are_counted_and_views_are_not():
    x = torch.ones(4, 6, requires_grad=True)
    assert count_launches(lambda: x.detach().t().view(6, 4), CPU) == 0
    assert count_launches(lambda: x.detach() * 2 + 1, CPU) == 2
    forward_and_backward = count_launches(lambda: (x * 2).sum().backward(), CPU)
    assert forward_and_backward >= 3


def test_peak_memory_is_what_was_held_at_one_time():
    def work():
        for _ in range(5):
            torch.empty(2**20)  # 4 MiB, freed before the next
        kept = torch.empty(2**21)
        return kept + 1

    assert peak_mb(work, CPU) == pytest.approx(16, abs=0.5)
