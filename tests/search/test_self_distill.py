"""Teachers against worked figures and a naive loop; searches with them resume, and without lambda are DARTS."""

import copy
import io
import itertools
import math

import lightning
import pytest
import torch
from torch import nn

from netwright.data.tensors import Batches, TensorImages
from netwright.search import spaces
from netwright.search.darts import DARTS
from netwright.search.dass import DASS, DASSStages
from netwright.search.objective import CostPenalty, Objective, TaskLoss
from netwright.search.searcher import Searcher
from netwright.search.self_distill import SDDARTS, SelfDistillation, SnapshotTeachers
from netwright.search.supernet import Gate
from netwright.seeding import stream
from netwright.train import fit
from netwright.train.distillation import distillation_loss

LOG3 = math.log(3)


class Constant(nn.Module):
    """Logits that are parameters, the same for every example."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x):
        return self.logits.expand(len(x), -1)


class Small(nn.Module):
    """A network with batch norm and dropout."""

    def __init__(self, classes=3):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(4, classes)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


class Sampled(Gate):
    """One candidate at a time, drawn from softmax(alpha), with a straight-through gradient: as path methods do."""

    def draw(self, alpha, part, batch):
        return torch.multinomial(alpha.softmax(-1), 1)[0]

    def weights(self, alpha, training, drawn=None):
        probs = alpha.softmax(-1)
        if not training or drawn is None:
            return probs
        return nn.functional.one_hot(drawn, len(alpha)).to(probs) + probs - probs.detach()


def supernet(seed=0):
    return spaces.get("micro-darts-2-shared").supernet(1, 3, channels=2, seed=seed)


def loaders(indexed=False):
    source = stream(0, "images")
    x, y = torch.rand(24, 1, 8, 8, generator=source), torch.randint(3, (24,), generator=source)
    return (
        Batches(TensorImages(x[:12], y[:12]), 4, indexed=indexed),
        Batches(TensorImages(x[12:], y[12:]), 4, name="validation", indexed=indexed),
    )


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a if k != "seconds")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a.nan_to_num(-7.0), b.nan_to_num(-7.0)) if isinstance(a, torch.Tensor) else a == b


def naive(logits, probs, T):
    total = 0.0
    for z, q in zip(logits.double().tolist(), probs.double().tolist(), strict=True):
        shifted = [math.exp(value / T) for value in z]
        p = [value / sum(shifted) for value in shifted]
        total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(q, p, strict=True) if a > 0)
    return T * T * total / len(logits)


@pytest.mark.parametrize(
    ("teacher", "T", "loss", "slope"),
    [
        ((0.0, LOG3), 1.0, 0.130812, (0.25, -0.25)),
        ((0.0, 2 * LOG3), 2.0, 0.523248, (0.5, -0.5)),
        ((0.0, LOG3), 5.0, 0.149963, (0.273556, -0.273556)),  # T (p - q), q = (.445289, .554711)
    ],
)
def test_worked_losses_and_gradients(teacher, T, loss, slope):
    student = torch.zeros(1, 2, requires_grad=True)
    found = distillation_loss(student, (torch.tensor([teacher]) / T).softmax(1), T)
    found.backward()
    assert found.item() == pytest.approx(loss, abs=1e-6)
    assert student.grad[0].tolist() == pytest.approx(slope, abs=1e-5)


def test_the_loss_equals_a_naive_loop_and_takes_hard_votes_and_missing_teachers():
    source = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(6, 4, generator=source)
    soft = torch.randn(6, 4, generator=source).softmax(1)
    hard = nn.functional.one_hot(torch.tensor([0, 1, 2, 3, 0, 1]), 4).float()
    missing = soft * torch.tensor([1.0, 0, 1, 0, 1, 1])[:, None]
    for probs in (soft, hard, missing):
        assert distillation_loss(logits, probs, 2.5).item() == pytest.approx(naive(logits, probs, 2.5), abs=1e-5)
    reference = nn.functional.kl_div((logits / 3).log_softmax(1), soft, reduction="batchmean") * 9
    assert torch.allclose(distillation_loss(logits, soft, 3.0), reference, atol=1e-6)


def test_one_soft_teacher_is_knowledge_distillation():
    torch.manual_seed(0)
    student, teacher, x = Small().eval(), Small().eval(), torch.rand(5, 1, 6, 6)
    teachers = SnapshotTeachers(k=1)
    teachers.push(teacher)
    found = distillation_loss(student(x), teachers.probs(student, x, 4.0), 4.0)
    q, p = (teacher(x) / 4).softmax(1), (student(x) / 4).softmax(1)
    assert found.item() == pytest.approx((16 * (q * (q / p).log()).sum(1).mean()).item(), abs=1e-6)


def test_saf_preset_worked():
    student, teacher = Constant(0.0, 0.0), Constant(0.0, LOG3)
    term = SelfDistillation(preset="saf")
    x, labels, index = torch.zeros(2, 1), torch.tensor([0, 1]), torch.tensor([3, 1])
    plain = TaskLoss()(student, (x, labels))
    for epoch in range(5):
        said = Constant(0.0, LOG3 if epoch == 2 else 9.0)
        found = term(student, (x, labels, index)) - plain
        assert found.item() == pytest.approx(0.0), epoch  # off until five are over
        term.teachers.record(said(x), index=index)  # in place of what the student said itself
        term.on_epoch(student)
    # In the sixth epoch, the teacher is what was said three epochs before, in the third.
    assert (term.lam, term.T) == (0.3, 5.0)
    probs = term.teachers.probs(teacher, x, 5.0, index=index)
    assert probs[0].tolist() == pytest.approx([0.445289, 0.554711], abs=1e-6)
    assert (term(student, (x, labels, index)) - plain).item() == pytest.approx(0.044989, abs=1e-6)


def votes(vote, *teachers, T=1.0):
    found = SnapshotTeachers(k=len(teachers), vote=vote)
    for logits in teachers:
        found.push(Constant(*logits))
    return found.probs(Constant(*teachers[0]), torch.zeros(1, 1), T)[0].tolist()


def test_votes():
    odds = [(math.log(0.2), math.log(0.8)), (math.log(0.6), math.log(0.4))]
    assert votes("soft", *odds) == pytest.approx([0.4, 0.6])
    assert votes("hard", (1.0, 0.0), (0.0, 1.0), (0.0, 3.0)) == pytest.approx([1 / 3, 2 / 3])
    assert votes("weighted", *odds) == pytest.approx([0.4, 0.6])  # nobody has been judged


def test_weights_are_accuracies_on_validation_batches():
    teachers = SnapshotTeachers(k=2, vote="weighted")
    x = torch.zeros(4, 1)
    for logits, right in (((math.log(0.2), math.log(0.8)), 3), ((math.log(0.6), math.log(0.4)), 1)):
        network = Constant(*logits)
        best = network.logits.argmax()
        labels = torch.where(torch.arange(4) < right, best, 1 - best)
        teachers.record(network(x), labels, part="alpha")
        teachers.record(network(x), 1 - labels, part="weights")  # training batches judge nobody
        teachers.push(network)
    found = teachers.probs(network, x, 1.0)[0].tolist()
    assert found == pytest.approx([0.75 * 0.2 + 0.25 * 0.6, 0.75 * 0.8 + 0.25 * 0.4])


def test_the_last_k_vote_and_share_nothing_with_the_student():
    network, teachers = Constant(0.0, 0.0), SnapshotTeachers(k=3)
    x = torch.zeros(1, 1)
    for number in range(1, 6):
        network.logits.data.fill_(0.0)[1] = float(number)
        teachers.push(network)
    wanted = torch.stack([torch.tensor([0.0, float(n)]).softmax(0) for n in (3, 4, 5)]).mean(0)
    for _ in range(2):
        assert torch.allclose(teachers.probs(network, x, 1.0)[0], wanted)
        network.logits.data.add_(torch.tensor([5.0, -5.0]))
    delayed = SnapshotTeachers(k=1, delay=2)
    for number in range(1, 4):
        assert delayed.probs(network, x, 1.0) is None
        delayed.push(Constant(0.0, float(number)))
    assert torch.allclose(delayed.probs(network, x, 1.0)[0], torch.tensor([0.0, 1.0]).softmax(0))
    delayed.push(Constant(0.0, 4.0))
    assert torch.allclose(delayed.probs(network, x, 1.0)[0], torch.tensor([0.0, 2.0]).softmax(0))


@pytest.mark.parametrize("training", [True, False])
def test_a_teacher_is_the_network_of_then_in_the_mode_of_now(training):
    torch.manual_seed(0)
    network, teachers, x = Small(), SnapshotTeachers(k=2), torch.rand(6, 1, 6, 6)
    network.body[3].p = 0.0
    copies = []
    for _ in range(2):
        network(torch.randn(8, 1, 6, 6))  # moves the running statistics
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        teachers.push(network)
        copies.append(copy.deepcopy(network).train(training))
    network(torch.randn(8, 1, 6, 6))
    before = copy.deepcopy(network.state_dict())
    network.train(training)
    found = teachers.probs(network, x, 2.0)
    with torch.no_grad():
        wanted = torch.stack([(each(x) / 2).softmax(1) for each in copies]).mean(0)
    assert torch.allclose(found, wanted, atol=1e-6)
    assert not found.requires_grad
    assert equal(dict(before), dict(network.state_dict()))


def test_teachers_leave_the_random_numbers_of_the_student_alone():
    torch.manual_seed(0)
    network, teachers, x = Small(), SnapshotTeachers(k=3), torch.rand(6, 1, 6, 6)
    teachers.push(network)
    before = torch.get_rng_state()
    teachers.probs(network, x, 1.0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("space", ["micro-darts-2-shared", "micro-chain"])
@pytest.mark.parametrize("gate", [None, Sampled()])
def test_a_student_who_is_its_own_teacher_learns_nothing(space, gate):
    net = spaces.get(space).supernet(1, 3, seed=0).double().train()
    if gate is not None:
        net.set_gate(gate)  # the teacher takes the path that was drawn for the student
    term = SelfDistillation(ramp=0.0, teachers=SnapshotTeachers(k=1))
    term.on_epoch(net)
    batch = torch.rand(4, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0])

    class Alone(Objective):
        def term(self, total, seen):
            return torch.zeros_like(total)

    loss = (Alone() + term)(net, batch, part="alpha")
    assert abs(loss.item()) < 1e-7
    for slope in torch.autograd.grad(loss, list(net.parameters()), allow_unused=True):
        assert slope is None or slope.abs().max() < 1e-7
    with torch.no_grad():
        for weight in net.weight_parameters():
            weight.add_(torch.randn_like(weight), alpha=0.5)
    assert (Alone() + term)(net, batch, part="alpha").item() > 1e-6


def test_the_cache_holds_what_was_said_of_each_example():
    teachers, network = SnapshotTeachers(k=2, store="cache"), nn.Linear(1, 2)
    first, second = torch.tensor([[0.0, LOG3], [0.0, 0.0]]), torch.tensor([[LOG3, 0.0], [0.0, 9.0]])
    teachers.record(first, index=torch.tensor([5, 2]))
    teachers.record(-first, index=torch.tensor([5, 2]), part="alpha")  # another data set
    teachers.push(network)
    teachers.record(second, index=torch.tensor([5, 7]))
    teachers.push(network)
    found = teachers.probs(network, torch.zeros(5, 1), 1.0, index=torch.tensor([7, 5, 2, 0, 99]))
    wanted = [second[1].softmax(0), (first[0].softmax(0) + second[0].softmax(0)) / 2, first[1].softmax(0)]
    assert torch.allclose(found, torch.stack([*wanted, torch.zeros(2), torch.zeros(2)]))
    of_alpha = teachers.probs(network, torch.zeros(1, 1), 1.0, index=torch.tensor([5]), part="alpha")
    assert torch.allclose(of_alpha[0], torch.tensor([0.75, 0.25]))


def test_cache_and_state_agree_where_the_student_does_not_move():
    net, (train, _) = supernet().eval(), loaders(indexed=True)
    cache, state = SnapshotTeachers(k=1, store="cache"), SnapshotTeachers(k=1)
    for x, _, index in train:
        cache.record(net(x), index=index)
    cache.push(net)
    state.push(net)
    train.set_epoch(1)  # in another order
    for x, _, index in train:
        assert torch.allclose(cache.probs(net, x, 2.0, index=index), state.probs(net, x, 2.0), atol=1e-6)


def test_lambda_rises_over_the_ramp():
    term = SelfDistillation(lam=0.8, ramp=0.5)
    found = []
    for progress in (0.0, 0.125, 0.25, 0.5, 0.9):
        term.on_step(nn.Identity(), progress)
        found.append(term.weight)
    assert found == pytest.approx([0.0, 0.2, 0.4, 0.8, 0.8])
    assert SelfDistillation(lam=0.8, ramp=0.0).weight == 0.8


@pytest.mark.parametrize("every", [1, 2, 3])
def test_snapshots_every_few_steps(every):
    term = SelfDistillation(teachers=SnapshotTeachers(k=10, every=every))
    network = Constant(0.0, 0.0)
    for step in range(7):
        network.logits.data.fill_(float(step))  # what it is before step number `step`
        term.on_step(network, 0.1)
        term.on_epoch(network)
    kept = [state["logits"][0].item() for state in term.teachers.state_dict()["snapshots"]]
    assert kept == [float(step) for step in range(every, 7, every)]


@pytest.mark.parametrize(
    ("apply_to", "parts"),
    [("alpha", {"alpha", "both"}), ("weights", {"weights", "both"}), ("both", {"alpha", "weights", "both"})],
)
def test_apply_to(apply_to, parts):
    term = SelfDistillation(ramp=0.0, apply_to=apply_to)
    term.on_epoch(Constant(0.0, 1.0))
    network, batch = Constant(2.0, 0.0), (torch.zeros(3, 1), torch.tensor([0, 1, 1]))
    plain = TaskLoss()(network, batch)
    assert {part for part in ("alpha", "weights", "both") if term(network, batch, part) > plain + 0.1} == parts


@pytest.mark.parametrize("order", [1, 2])
def test_without_lambda_it_is_darts_to_the_bit(order):
    plain, distilled = (
        DARTS(supernet(), order, epochs=3),
        SDDARTS(supernet(), SelfDistillation(lam=0.0), order, epochs=3),
    )
    for searcher in (plain, distilled):
        searcher.search(*loaders(), seed=0)
    for name in ("supernet", "w_opt", "a_opt", "alphas", "figures"):
        assert equal(plain.state_dict()[name], distilled.state_dict()[name]), name
    other = SDDARTS(supernet(), order=order, epochs=2)
    other.search(*loaders(), seed=0)
    assert not equal(plain.state_dict()["alphas"], other.state_dict()["alphas"])


def test_holding_on_to_the_past_slows_the_predictions_down():
    """With a large lambda the outputs move less from epoch to epoch; the identity would leave them as they are."""
    moved = {}
    for lam in (0.0, 20.0):
        net, (train, val) = supernet(), loaders()
        searcher = SDDARTS(net, SelfDistillation(lam=lam, ramp=0.0, teachers=SnapshotTeachers(k=1)), epochs=4, lr=0.1)
        x, said = torch.cat([batch[0] for batch in train]), []

        def note(end, net=net, said=said, x=x):
            with torch.no_grad():
                said.append(copy.deepcopy(net).train()(x).softmax(1))

        searcher.search(train, val, seed=0, on_epoch=note)
        moved[lam] = sum((b - a).abs().mean().item() for a, b in itertools.pairwise(said))
    assert moved[20.0] < 0.7 * moved[0.0]


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    ("options", "indexed"),
    [
        ({"vote": "weighted"}, False),
        ({"vote": "hard", "every": 2}, False),
        ({"store": "cache"}, True),
        ({"store": "cache", "every": 2, "k": 1, "delay": 1}, True),
    ],
)
def test_a_search_resumed_after_any_epoch_is_bit_equal(options, indexed):
    def make():
        return SDDARTS(supernet(), SelfDistillation(ramp=0.3, teachers=SnapshotTeachers(**options)), epochs=4)

    states, whole = [], make()
    result = whole.search(*loaders(indexed), seed=0, on_epoch=lambda end: states.append(end.searcher.state_dict()))
    for state in states[:3:2]:
        resumed = make()
        resumed.load_state_dict(through_a_file(state))
        again = resumed.search(*loaders(indexed), seed=0)
        assert equal(whole.state_dict(), resumed.state_dict())
        assert equal(result.alpha_history, again.alpha_history)


def test_it_serves_gates_that_draw_and_stands_beside_a_cost():
    def run(lam):
        net = supernet()
        net.set_gate(Sampled())
        cost = CostPenalty("add_power", lambda supernet: 1 + supernet.arch["normal_0_2"].softmax(0)[3], alpha=0.1)
        distillation = SelfDistillation(lam=lam, ramp=0.0, teachers=SnapshotTeachers(k=2))
        searcher = Searcher(net, objective=TaskLoss() + cost + distillation)
        searcher.set_epochs(3)
        return searcher.search(*loaders(), seed=0)

    with_it, again, without = run(1.0), run(1.0), run(0.0)
    assert equal(with_it.alpha_history, again.alpha_history)
    # The draws are the same with and without teachers, so the first epoch, which has none, is too.
    assert equal(with_it.epochs[0], without.epochs[0])
    assert not equal(with_it.alpha_history, without.alpha_history)


def test_in_a_search_of_stages_the_teachers_are_those_of_the_stage():
    def make():
        term = SelfDistillation(ramp=0.0)
        return DASS(supernet(), 0.3, DASSStages(1, 1, 3), objective=TaskLoss() + term, unrolled=False), term

    seen, states = [], []
    searcher, term = make()

    def note(end):
        seen.append(term.teachers.voting)
        states.append(end.searcher.state_dict())

    searcher.search(*loaders(), seed=0, on_epoch=note)
    assert seen == [0, 0, 1, 2, 3]  # the last epoch of a stage opens the next one
    for state in states[1:4:2]:
        resumed, _ = make()
        resumed.load_state_dict(through_a_file(state))
        resumed.search(*loaders(), seed=0)
        assert equal(searcher.state_dict(), resumed.state_dict())


def test_a_sparse_teacher_is_the_sparse_network_of_then():
    searcher = DASS(supernet(), 0.3, DASSStages(0, 0, 1), unrolled=False)
    teachers, x = SnapshotTeachers(k=1), torch.rand(4, 1, 8, 8)
    searcher.prepare(seed=0, steps_per_epoch=1)
    teachers.push(searcher.supernet)
    before = searcher.supernet(x).softmax(1)
    with torch.no_grad():
        for parameter in searcher.supernet.parameters():
            parameter.add_(torch.randn_like(parameter))
    after = searcher.supernet(x).softmax(1)
    assert torch.allclose(teachers.probs(searcher.supernet, x, 1.0), before, atol=1e-6)
    assert torch.allclose(searcher.supernet(x).softmax(1), after, atol=1e-6)


class Distilled(lightning.LightningModule):
    """What a training loop of one's own has to do."""

    def __init__(self, network, objective):
        super().__init__()
        self.network, self.objective = network, objective

    def on_train_batch_start(self, batch, batch_idx):
        done = self.trainer.global_step / self.trainer.estimated_stepping_batches
        self.objective.on_step(self.network, done)

    def training_step(self, batch, batch_idx):
        return self.objective(self.network, batch)

    def on_train_epoch_start(self):  # at its end the checkpoint may be written already
        if self.current_epoch:
            self.objective.on_epoch(self.network)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["objective"] = self.objective.state_dict()

    def on_load_checkpoint(self, checkpoint):
        self.objective.load_state_dict(checkpoint["objective"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_it_trains_a_network_under_lightning_and_resumes(tmp_path):
    def run(lam, epochs, checkpoint=None):
        torch.manual_seed(0)
        module = Distilled(Small(), SelfDistillation(lam=lam, ramp=0.0, teachers=SnapshotTeachers(k=2)))
        fit(module, loaders()[0], epochs=epochs, seed=0, checkpoint=checkpoint)
        return dict(module.network.state_dict())

    whole, plain = run(1.0, 4), run(0.0, 4)
    assert not equal(whole, plain)
    run(1.0, 2, tmp_path / "fit.ckpt")
    assert equal(whole, run(1.0, 4, tmp_path / "fit.ckpt"))


def test_settings_are_part_of_the_result():
    term = SelfDistillation(lam=0.5, teachers=SnapshotTeachers(k=2, every=7, vote="hard"), apply_to="alpha")
    assert SDDARTS(supernet(), term).config()["distillation"] == {
        "lam": 0.5, "T": 2.0, "ramp": 0.5, "apply_to": "alpha", "start": 0,
        "k": 2, "every": 7, "vote": "hard", "store": "state", "delay": 0,
    }  # fmt: skip
    saf = SelfDistillation(preset="saf", lam=0.1)
    assert (saf.lam, saf.T, saf.teachers.store, saf.teachers.k) == (0.1, 5.0, "cache", 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SnapshotTeachers(k=0), "k must be >= 1, got 0"),
        (lambda: SnapshotTeachers(k=1.5), "k must be a whole number >= 1, got 1.5"),
        (lambda: SnapshotTeachers(every=True), "every must be a whole number >= 1, got True"),
        (lambda: SelfDistillation(lam=math.inf), "lam must be >= 0 and finite, got inf"),
        (lambda: SelfDistillation(T=math.inf), "T must be > 0 and finite, got inf"),
        (lambda: SelfDistillation(T="2"), "T must be a number > 0, got '2'"),
        (lambda: SnapshotTeachers(every=0), "every must be >= 1, got 0"),
        (lambda: SnapshotTeachers(every="step"), "every must be 'epoch' or a whole number >= 1, got 'step'"),
        (lambda: SnapshotTeachers(vote="loud"), "vote must be one of soft, hard, weighted, got 'loud'"),
        (lambda: SnapshotTeachers(store="disk"), "store must be one of"),
        (lambda: SnapshotTeachers(delay=-1), "delay must be >= 0"),
        (lambda: SelfDistillation(lam=-0.1), "lam must be >= 0 and finite, got -0.1"),
        (lambda: SelfDistillation(T=0.0), "T must be > 0 and finite, got 0"),
        (lambda: SelfDistillation(ramp=1.1), r"ramp must lie in \[0, 1\], got 1.1"),
        (lambda: SelfDistillation(apply_to="all"), "apply_to must be one of"),
        (lambda: SelfDistillation(preset="mesa"), "preset must be 'saf' or None"),
        (lambda: SnapshotTeachers().probs(nn.Identity(), torch.zeros(1, 1), 0.0), "T must be > 0"),
        (lambda: distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3), -1.0), "T must be > 0"),
        (lambda: distillation_loss(torch.zeros(2, 3), torch.zeros(2, 4)), r"student_logits, \(2, 3\), got \(2, 4\)"),
        (lambda: distillation_loss(torch.zeros(3), torch.zeros(3)), "shape"),
        (lambda: SelfDistillation(preset="saf")(nn.Linear(1, 2), (torch.zeros(2, 1), torch.tensor([0, 1]))), "indexed"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_another_number_of_classes_is_refused():
    term = SelfDistillation(ramp=0.0, teachers=SnapshotTeachers(k=1, store="cache"))
    batch = torch.zeros(2, 1), torch.tensor([0, 1]), torch.tensor([0, 1])
    term(Constant(0.0, 0.0), batch)
    with pytest.raises(ValueError, match="logits must have 2 classes as those before, got 3"):
        term(Constant(0.0, 0.0, 0.0), batch)
    term.on_epoch(Constant(0.0, 0.0))
    with pytest.raises(ValueError, match="teacher_probs must have the shape"):
        term(Constant(0.0, 0.0, 0.0), batch)
