"""Training of a head: what is planted is found, noise is not; every number against plain torch in float64."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from planted_states import HIDDEN, LAYERS, planted
from torch.nn.functional import binary_cross_entropy_with_logits

from megatron_srft.hidden_reward.fit import FitSettings, fit
from megatron_srft.hidden_reward.losses import loss
from megatron_srft.hidden_reward.parts import Responses, batches, portions, questions_of, split, totals_of
from megatron_srft.hidden_reward.quality import auroc, within_auroc
from megatron_srft.hidden_reward.states import StackedStates

QUICK = FitSettings(lr=0.02, epochs=12)


def stacked_scores(states, weight, bias) -> torch.Tensor:
    """[responses] the paper's formula on whole states, in float64."""
    weight, bias = weight.double(), bias.double()
    found = []
    for one in states:
        gate, reward = (torch.einsum("lrh,lth->tr", weight, one.double()) + bias).unbind(1)
        gate = gate.sigmoid()
        found.append((gate * reward).sum() / gate.sum())
    return torch.stack(found)


@pytest.mark.parametrize("name", ["bce", "hinge", "pairwise", "infonca", "nca"])
def test_every_loss_finds_a_planted_signal(name):
    given = planted("mean", questions=40)
    fitted = fit(StackedStates(given.states), given.responses, replace(QUICK, loss=name, epochs=6))
    assert fitted.best.validation.within_auroc > 0.97
    assert fitted.best.validation.within_auroc_by_length < 0.7


def test_noise_is_not_found():
    found = []
    for seed in range(4):
        given = planted("noise", questions=50, seed=seed)
        fitted = fit(StackedStates(given.states), given.responses, replace(QUICK, epochs=6, seed=seed))
        found.append((fitted.best.validation.within_auroc, fitted.best.validation.overall_auroc))
    assert fitted.epochs[-1].train.within_auroc > 0.6, "the head could learn the training part by heart"
    np.testing.assert_allclose(np.mean(found, axis=0), 0.5, atol=0.06)


def test_a_split_by_response_would_leak_and_the_split_by_question_does_not():
    given = planted("question", questions=60, per_question=6)
    states, responses = StackedStates(given.states), given.responses
    settings = replace(QUICK, epochs=8)
    sound = fit(states, responses, settings).best.validation.overall_auroc
    order = np.random.default_rng(0).permutation(len(responses.labels))
    parts = (np.sort(order[60:]), np.sort(order[:60]))
    leaking = fit(states, responses, settings, parts=parts).best.validation.overall_auroc
    assert leaking > 0.85 and sound < 0.7


STRENGTH = 0.1
"""scikit-learn's C: how much the data weigh against |w|^2 / 2."""


def standardised(given, train) -> np.ndarray:
    return (given.means - given.means[train].mean(axis=0)) / given.means[train].std(axis=0)


def probe(given, train) -> np.ndarray:
    """[responses] decision function of a logistic regression on the mean state, trained on `train`."""
    features = torch.from_numpy(standardised(given, train)).double()
    labels = torch.from_numpy(given.responses.labels).double()
    weight = torch.zeros(features.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = features[train] @ weight[:-1] + weight[-1]
        fits = binary_cross_entropy_with_logits(logits, labels[train], reduction="sum")
        total = STRENGTH * fits + weight[:-1].square().sum() / 2
        total.backward()
        return total

    optimizer.step(loss)
    return (features @ weight[:-1] + weight[-1]).detach().numpy()


@pytest.mark.parametrize(("kind", "probe_at_least", "probe_at_most"), [("mean", 0.95, 1.0), ("marked", 0.0, 0.75)])
def test_beside_a_plain_probe_on_the_mean_state(kind, probe_at_least, probe_at_most):
    """Where the mean tells, both find it; where only some tokens do, the gate does."""
    given = planted(kind, questions=60, seed=3)
    fitted = fit(StackedStates(given.states), given.responses, replace(QUICK, epochs=15, standardise=True))
    held_out = fitted.validation
    by_probe = probe(given, fitted.train)[held_out]
    found = within_auroc(by_probe, given.responses.labels[held_out], given.responses.questions[held_out])[0]
    assert probe_at_least <= found <= probe_at_most
    assert fitted.best.validation.within_auroc > 0.95


def test_the_probe_is_scikit_learns():
    linear = pytest.importorskip("sklearn.linear_model", reason="pip install -r requirements/probe.txt")
    given = planted("mean", questions=10)
    train, _ = split(given.responses.questions, 0.2, 0)
    features = standardised(given, train)
    model = linear.LogisticRegression(C=STRENGTH, max_iter=1000, tol=1e-9)
    model.fit(features[train], given.responses.labels[train])
    np.testing.assert_allclose(probe(given, train), model.decision_function(features), atol=1e-3)


def reference_training(given, settings: FitSettings, epochs: int, transform=lambda hidden: hidden):
    """([layers, 2, hidden], [2]) by a Linear on stacked, transformed states in float64."""
    states = [transform(one.double()) for one in given.states]
    train, _ = split(given.responses.questions, settings.validation_share, settings.seed)
    layers, _, hidden = states[0].shape
    torch.manual_seed(settings.seed)
    bound = (layers * hidden) ** -0.5
    rows = 2 if settings.gate else 1
    weight, bias = torch.empty(layers, rows, hidden).uniform_(-bound, bound), torch.empty(rows).uniform_(-bound, bound)
    trained = [one.double().requires_grad_() for one in (weight, bias)]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=settings.weight_decay)
    for epoch in range(1, epochs + 1):
        for batch in batches(questions_of(given.responses, train), settings.batch, (settings.seed, epoch)):
            indices = [index for question in batch for index in question]
            optimizer.zero_grad()
            weight, bias = trained
            if not settings.gate:
                weight, bias = torch.cat((0 * weight, weight), 1), torch.cat((0 * bias, bias))
            own = stacked_scores([states[i] for i in indices], weight, bias)
            labels = torch.from_numpy(given.responses.labels[indices])
            if settings.loss == "bce":
                binary_cross_entropy_with_logits(own, labels.double()).backward()
            else:
                numbers = torch.from_numpy(given.responses.questions[indices])
                loss(settings.loss, own, labels, numbers, totals_of(given.responses, indices)).backward()
            optimizer.step()
    weight, bias = (one.detach() for one in trained)
    return (weight, bias) if settings.gate else (torch.cat((0 * weight, weight), 1), torch.cat((0 * bias, bias)))


@pytest.mark.parametrize(
    "settings",
    [
        FitSettings(lr=0.01),
        FitSettings(lr=0.01, gate=False, batch=7),
        FitSettings(lr=0.01, loss="infonca", batch=30),
    ],
    ids=["gate", "no gate", "infonca"],
)
def test_the_head_is_that_of_plain_torch_in_float64(settings):
    given = planted("mean", questions=12)
    fitted = fit(StackedStates(given.states, portion_tokens=100), given.responses, replace(settings, epochs=2))
    weight, bias = reference_training(given, settings, fitted.best.number)
    torch.testing.assert_close(fitted.weight.double(), weight, atol=2e-5, rtol=0)
    if settings.loss != "infonca":  # its loss does not see a constant: AdamW walks along the bias's rounding errors
        torch.testing.assert_close(fitted.bias.double(), bias, atol=2e-5, rtol=0)


def test_standardised_training_comes_out_as_a_head_on_plain_states():
    given = planted("mean", questions=12)
    shift, scale = torch.arange(1.0, HIDDEN + 1), torch.linspace(0.1, 30.0, HIDDEN)
    given = replace(given, states=[one * scale + shift for one in given.states])
    settings = FitSettings(lr=0.01, standardise=True)
    fitted = fit(StackedStates(given.states), given.responses, replace(settings, epochs=2))
    rows = torch.cat([given.states[i] for i in fitted.train], dim=1).double()
    mean, deviation = rows.mean(dim=1, keepdim=True), rows.std(dim=1, keepdim=True, correction=0)
    weight, bias = reference_training(given, settings, fitted.best.number, lambda one: (one - mean) / deviation)
    held_out = [given.states[i] for i in fitted.validation]
    expected = stacked_scores([(one.double() - mean) / deviation for one in held_out], weight, bias)
    torch.testing.assert_close(stacked_scores(held_out, fitted.weight, fitted.bias), expected, atol=2e-4, rtol=0)


def test_normalised_states_are_those_divided_by_their_root_mean_square():
    given = planted("mean", questions=12)
    settings = FitSettings(lr=0.01)
    fitted = fit(StackedStates(given.states, "rms", 0.5), given.responses, replace(settings, epochs=2))

    def normalised(one):
        return one / (one.square().mean(dim=-1, keepdim=True) + 0.5).sqrt()

    weight, bias = reference_training(given, settings, fitted.best.number, normalised)
    torch.testing.assert_close(fitted.weight.double(), weight, atol=2e-5, rtol=0)


def test_training_on_logits_is_training_on_the_lm_heads_outputs():
    given = planted("mean", questions=12)
    given = replace(given, states=[one[1:2] for one in given.states])
    lm_head = torch.randn(70, HIDDEN, generator=torch.Generator().manual_seed(1)) / 5
    settings = FitSettings(lr=0.01)
    fitted = fit(StackedStates(given.states), given.responses, replace(settings, epochs=2), lm_head=lm_head)
    weight, bias = reference_training(given, settings, fitted.best.number, lambda one: one @ lm_head.double().T)
    torch.testing.assert_close(fitted.weight.double(), weight @ lm_head.double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(fitted.bias.double(), bias, atol=2e-5, rtol=0)


def test_the_best_head_is_kept_and_training_stops():
    given = planted("noise", questions=20)
    fitted = fit(StackedStates(given.states), given.responses, FitSettings(lr=0.05, patience=2))
    losses = [epoch.validation_loss for epoch in fitted.epochs]
    assert fitted.best.number == 1 + int(np.argmin(losses)) == len(losses) - 2 < 38
    own = stacked_scores([given.states[i] for i in fitted.validation], fitted.weight, fitted.bias)
    labels = given.responses.labels[fitted.validation]
    expected = binary_cross_entropy_with_logits(own, torch.from_numpy(labels).double()).item()
    assert fitted.best.validation_loss == pytest.approx(expected, abs=1e-6)
    np.testing.assert_allclose(fitted.validation_scores, own.numpy(), atol=1e-5)
    assert fitted.best.validation.overall_auroc == pytest.approx(auroc(own.numpy(), labels))


def test_a_seed_gives_the_same_bits_and_portions_do_not_matter():
    given = planted("mean", questions=10)
    first, again, cut = (
        fit(StackedStates(given.states, portion_tokens=tokens), given.responses, replace(QUICK, epochs=2))
        for tokens in (10**6, 10**6, 1)
    )
    assert torch.equal(first.weight, again.weight) and first.epochs[0].train_loss == again.epochs[0].train_loss
    torch.testing.assert_close(first.weight, cut.weight, atol=1e-5, rtol=0)
    other = fit(StackedStates(given.states), given.responses, replace(QUICK, epochs=2, seed=1))
    assert not np.array_equal(other.validation, first.validation)


def test_no_question_is_on_both_sides():
    questions = np.random.default_rng(0).integers(0, 50, 300)
    train, held_out = split(questions, 0.2, 42)
    assert set(questions[train]).isdisjoint(questions[held_out])
    assert sorted([*train, *held_out]) == list(range(300)) and len(np.unique(questions[held_out])) == 10


def test_batches_and_portions_hold_whole_questions():
    questions = [tuple(range(start, start + size)) for start, size in ((0, 8), (8, 8), (16, 20), (36, 3), (39, 5))]
    mixed = batches(questions, 16, (0, 1))
    assert sorted(question for batch in mixed for question in batch) == questions
    assert all(len(batch) == 1 or sum(map(len, batch)) <= 16 for batch in mixed) and len(mixed) < 5
    assert batches(questions, 16, (0, 2)) != mixed == batches(questions, 16, (0, 1))
    cut = portions(questions, np.full(44, 10), 160)
    assert [len(portion) for portion in cut] == [16, 20, 8]


def one_verdict(labels: np.ndarray, responses: Responses) -> Responses:
    return replace(responses, labels=labels)


@pytest.mark.parametrize(
    ("labels", "name", "message"),
    [
        (lambda r: r.questions >= 0, "bce", "all .* responses of the training part are right"),
        (lambda r: r.questions < 0, "hinge", "all .* responses of the training part are wrong"),
        (lambda r: r.questions % 2 == 0, "pairwise", "no question of the training part .* loss pairwise compares"),
        (lambda r: r.questions % 2 == 0, "nca", "no question of the training part"),
    ],
)
def test_verdicts_that_teach_nothing_are_refused(labels, name, message):
    given = planted("noise", questions=10)
    responses = replace(given.responses, labels=labels(given.responses))
    with pytest.raises(ValueError, match=message):
        fit(StackedStates(given.states), responses, replace(QUICK, loss=name))


@pytest.mark.parametrize("name", ["bce", "hinge", "pairwise", "nca"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_states_that_are_no_numbers_are_refused_by_name(name, value):
    given = planted("mean", questions=10)
    states = copy.deepcopy(given.states)
    states[37][2, 1, 5] = value
    with pytest.raises(ValueError, match="1 of 80 responses .* the first is question 4, response 37: hidden states"):
        fit(StackedStates(states), given.responses, replace(QUICK, loss=name, gate=name != "hinge"))
    with pytest.raises(ValueError, match="NaN or infinite"):
        fit(StackedStates(states), given.responses, replace(QUICK, standardise=True, validation_share=0.1))


def test_questions_without_a_pair_are_left_out_of_pairwise_only():
    given = planted("mean", questions=20)
    labels = given.responses.labels & (given.responses.questions > 9)
    responses = replace(given.responses, labels=labels)
    pairwise = fit(StackedStates(given.states), responses, replace(QUICK, loss="pairwise", epochs=1))
    assert responses.questions[pairwise.train].min() > 9
    assert responses.questions[fit(StackedStates(given.states), responses, replace(QUICK, epochs=1)).train].min() < 10


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 0.0}, "--lr must be above 0"),
        ({"validation_share": 1.0}, "--validation-share"),
        ({"epochs": 0}, "--epochs"),
    ],
)
def test_settings_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        FitSettings(**values)


def test_one_question_cannot_be_split():
    with pytest.raises(ValueError, match="1 question with verified responses"):
        split(np.zeros(8, int), 0.2, 0)


def test_the_shape_is_that_of_the_planted_states():
    assert StackedStates(planted("noise", questions=1).states).shape == (LAYERS, HIDDEN)
