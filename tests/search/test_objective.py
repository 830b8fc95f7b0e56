import math

import pytest
import torch
from torch import nn

from netwright.search import spaces
from netwright.search.objective import CostPenalty, Objective, TaskLoss
from netwright.search.searcher import Searcher
from netwright.search.stages import Stage

BATCH = torch.tensor([[0.3, -1.0, 2.0], [1.0, 0.5, 0.0]]), torch.tensor([2, 1])


def at(cost):
    return CostPenalty("log", lambda supernet: torch.as_tensor(cost))


def penalised(form, loss, cost, **options):
    cost = torch.tensor(cost, dtype=torch.float64, requires_grad=True)
    value = CostPenalty(form, lambda supernet: cost, **options).penalised(torch.tensor(loss, dtype=torch.float64), cost)
    (slope,) = torch.autograd.grad(value, cost)
    return value.item(), slope.item()


def test_task_loss_is_cross_entropy_with_label_smoothing():
    assert torch.equal(TaskLoss()(nn.Identity(), BATCH), nn.functional.cross_entropy(*BATCH))
    smoothed = -(BATCH[0].log_softmax(1) * (0.9 * nn.functional.one_hot(BATCH[1], 3) + 0.1 / 3)).sum(1).mean()
    assert torch.allclose(TaskLoss(0.1)(nn.Identity(), BATCH), smoothed)


def test_fbnet_worked_example():
    value, slope = penalised("fbnet", 2.0, math.exp(4))
    assert value == pytest.approx(0.91896, abs=5e-6)
    assert slope == pytest.approx(2 * 0.2 * 4**0.6 * 0.6 / (4 * math.exp(4)), rel=1e-9)
    assert slope == pytest.approx(0.002525, abs=1e-6)


def test_single_path_slope_is_20_over_r():
    value, slope = penalised("log", 1.5, 80.0, alpha=20.0)
    assert value == pytest.approx(1.5 + 20 * math.log(80))
    assert slope == pytest.approx(20 / 80)


def test_the_other_formulas():
    assert penalised("mul_log", 2.0, 30.0, ref=20.0)[0] == pytest.approx(0.2 * 2 * (math.log(30) / math.log(20)) ** 0.3)
    assert penalised("mul_log", 2.0, 20.0, ref=20.0, alpha=1, beta=0.6)[0] == pytest.approx(2.0)
    assert penalised("add_linear", 2.0, 30.0, ref=20.0) == pytest.approx((2 + 0.1 * 0.5, 0.1 / 20))
    assert penalised("add_power", 2.0, 32.0)[0] == pytest.approx(2 + 0.2 * 32**0.6)


@pytest.mark.parametrize("form", ["fbnet", "mul_log", "add_linear", "add_power", "log"])
def test_slopes_equal_finite_differences(form):
    ref = {"ref": 20.0} if form in ("mul_log", "add_linear") else {}
    step = 1e-5
    up, down = penalised(form, 1.7, 33 + step, **ref)[0], penalised(form, 1.7, 33 - step, **ref)[0]
    assert penalised(form, 1.7, 33.0, **ref)[1] == pytest.approx((up - down) / (2 * step), rel=1e-6)
    assert (up - down) > 0


def test_terms_are_taken_from_left_to_right():
    scale = CostPenalty("fbnet", lambda supernet: torch.tensor(math.exp(4)))
    loss, factor = nn.functional.cross_entropy(*BATCH), 0.2 * 4**0.6
    assert torch.allclose((TaskLoss() + scale)(nn.Identity(), BATCH), loss * factor)
    assert torch.allclose(
        (TaskLoss() + scale + at(2.0))(nn.Identity(), BATCH, part="alpha"), loss * factor + 0.02 * math.log(2)
    )
    assert torch.allclose(
        (TaskLoss() + at(2.0) + scale)(nn.Identity(), BATCH, "alpha"), (loss + 0.02 * math.log(2)) * factor
    )
    assert torch.allclose(scale(nn.Identity(), BATCH), loss * factor)
    assert [type(t).__name__ for t in (TaskLoss() + at(2.0) + scale).terms] == [
        "TaskLoss",
        "CostPenalty",
        "CostPenalty",
    ]
    with pytest.raises(ValueError, match="must stand before it"):
        scale + TaskLoss()


@pytest.mark.parametrize(
    ("apply_to", "penalised_parts"),
    [("alpha", {"alpha", "both"}), ("weights", {"weights", "both"}), ("both", {"alpha", "weights", "both"})],
)
def test_apply_to(apply_to, penalised_parts):
    penalty = CostPenalty("log", lambda supernet: torch.tensor(9.0), apply_to=apply_to)
    plain = TaskLoss()(nn.Identity(), BATCH)
    found = {
        part for part in ("alpha", "weights", "both") if not torch.equal(penalty(nn.Identity(), BATCH, part), plain)
    }
    assert found == penalised_parts


def test_the_cost_of_a_supernet_pushes_alpha_to_cheap_operations():
    supernet = spaces.get("micro-darts-2-shared").supernet(1, 3, channels=2, seed=0)
    shape = (1, 8, 8)
    table = {key: 1.0 for key in supernet.operations(shape)}
    penalty = TaskLoss() + CostPenalty("add_power", table, alpha=100.0, beta=1.0)
    loss = penalty(supernet, (torch.rand(4, *shape), torch.tensor([0, 1, 2, 0])), part="alpha")
    for alpha, grad in zip(
        supernet.arch_parameters(), torch.autograd.grad(loss, supernet.arch_parameters()), strict=True
    ):
        assert grad.argmax() >= 2, alpha  # "none" and "skip_connect" cost nothing: their alpha rises
        assert grad[:2].max() < 0 < grad[2:].min()


def test_memory_of_terms_is_saved():
    class Counter(Objective):
        steps = 0

        def term(self, total, seen):
            return total

        def on_step(self, supernet, progress):
            self.steps += 1

        def state_dict(self):
            return {"steps": self.steps}

        def load_state_dict(self, state):
            self.steps = state["steps"]

    one, other = TaskLoss() + Counter(), TaskLoss() + Counter()
    one.on_step(nn.Identity(), 0.5)
    other.load_state_dict(one.state_dict())
    assert other.terms[1].steps == 1


def test_terms_hear_of_stages_steps_and_epochs():
    class Listener(Objective):
        def __init__(self):
            self.heard = []

        def term(self, total, seen):
            return total

        def on_stage(self, supernet):
            self.heard.append("stage")

        def on_step(self, supernet, progress):
            self.heard.append(progress)

        def on_epoch(self, supernet):
            self.heard.append("epoch")

    listener = Listener()
    supernet = spaces.get("micro-darts-2-shared").supernet(1, 3, channels=2, seed=0)
    batch = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    stages = [Stage("one", epochs=1), Stage("other", epochs=1, alpha_step=False)]
    searcher = Searcher(supernet, objective=TaskLoss() + listener, stages=stages)
    searcher.search([batch, batch], [batch], seed=0)
    assert listener.heard == ["stage", 0.0, 0.25, "epoch", "stage", 0.5, 0.75, "epoch"]
    state, resumed = searcher.state_dict(), Listener()
    searcher = Searcher(supernet, objective=resumed, stages=stages)
    searcher.load_state_dict({**state, "objective": {}})
    searcher.prepare(seed=0, steps_per_epoch=2)
    assert resumed.heard == []  # the stage had begun before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TaskLoss(1.0), r"label_smoothing must lie in \[0, 1\), got 1.0"),
        (lambda: TaskLoss(-0.1), "label_smoothing"),
        (lambda: TaskLoss()(nn.Identity(), BATCH, part="both of them"), "part must be one of"),
        (lambda: CostPenalty("pow", {}), "form must be one of"),
        (lambda: CostPenalty("log", {}, apply_to="all"), "apply_to must be one of"),
        (lambda: CostPenalty("log", {}, alpha=-1.0), "alpha must be >= 0"),
        (lambda: CostPenalty("mul_log", {}), "ref must be > 1 for 'mul_log', got None"),
        (lambda: CostPenalty("mul_log", {}, ref=1.0), "ref must be > 1"),
        (lambda: CostPenalty("add_linear", {}, ref=0.0), "ref must be > 0"),
        (lambda: penalised("fbnet", 1.0, 1.0), "cost must be > 1 for 'fbnet'"),
        (lambda: penalised("mul_log", 1.0, 0.5, ref=2.0), "cost must be > 1"),
        (lambda: penalised("log", 1.0, 0.0), "cost must be > 0"),
        (lambda: penalised("add_power", 1.0, -1.0), "cost must be > 0"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_base_objective_has_no_term():
    with pytest.raises(NotImplementedError):
        Objective()(nn.Identity(), BATCH)
    with pytest.raises(TypeError):
        TaskLoss() + 1
