"""Losses that act on each of many outputs apart are factored by their diagonal, whatever their number."""

import pytest
import torch
from explicit import explicit_gauss_newton
from tiny import make_batch, make_model
from torch.nn import functional as F
from transformers import ElectraConfig, ElectraForPreTraining
from zoo import VOCABULARY

from hap_transformers import estimate_sensitivity
from hap_transformers.sensitivity.output_curvature import EXPLICIT_CLASSES, output_directions


pytestmark = pytest.mark.any_release
WIDE, EXAMPLES, PROBES = 100, 3, 2000
LABELS = "multi_label_classification"


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHTS = random(WIDE, seed=2).exp()
YES_OR_NO = (random(EXAMPLES, WIDE, seed=1) > 0).double()
# The discriminator of ELECTRA: a logit a token, of which some are padding.
COUNTED = torch.arange(WIDE) < torch.tensor([[WIDE], [70], [20]])
CONVEX = {
    "many labels": lambda z: F.binary_cross_entropy_with_logits(z, YES_OR_NO),
    "labels with weights": lambda z: F.binary_cross_entropy_with_logits(z, YES_OR_NO, pos_weight=WEIGHTS),
    "many outputs": lambda z: F.mse_loss(z, YES_OR_NO),
    "counts": lambda z: F.poisson_nll_loss(z, 3 * YES_OR_NO),
    "smooth absolute errors": lambda z: F.smooth_l1_loss(z, YES_OR_NO),  # Without curvature beyond a distance of one.
    "tokens without padding": lambda z: F.binary_cross_entropy_with_logits(z[COUNTED], YES_OR_NO[COUNTED]),
}


def directions_of(loss, probes, *shape, seed=0):
    """Directions of a loss of random logits, and the logits."""
    logits = random(*shape or (EXAMPLES, WIDE)).requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    return output_directions(loss(logits), [logits], len(logits), probes, generator), logits.detach()


@pytest.mark.parametrize("name", CONVEX)
def test_random_directions_give_the_explicit_hessian(name):
    """The mean of s s^T has the Hessian of each example's own loss as its expectation."""
    directions, logits = directions_of(CONVEX[name], PROBES)
    assert directions.num_probes == directions.count == PROBES
    hessian = len(logits) * torch.func.hessian(CONVEX[name])(logits)
    drawn = torch.stack([cotangent for (cotangent,) in directions.cotangents])
    assert drawn.shape == (PROBES, EXAMPLES, WIDE)
    for example in range(EXAMPLES):
        own = hessian[example, :, example]
        found = drawn[:, example].T @ drawn[:, example] / PROBES
        torch.testing.assert_close(found.diag(), own.diag(), rtol=1e-6, atol=1e-12)
        # Off the diagonal each is a mean of random signs, times the roots of two entries.
        error = torch.outer(own.diag(), own.diag()).sqrt() / PROBES**0.5
        off = ~torch.eye(WIDE, dtype=torch.bool)
        assert ((found - own).abs() <= 5 * error + 1e-12)[off].all()


def test_two_outputs_of_which_one_is_wide():
    """A softmax of three classes beside a hundred labels."""
    classes, labels = random(EXAMPLES, 3).requires_grad_(), random(EXAMPLES, WIDE, seed=3).requires_grad_()

    def loss(classes, labels):
        return F.cross_entropy(classes, torch.arange(3)) + CONVEX["many labels"](labels)

    directions = output_directions(
        loss(classes, labels), [classes, labels], EXAMPLES, PROBES, torch.Generator().manual_seed(0)
    )
    drawn = [torch.cat(pair, 1) for pair in directions.cotangents]
    found = torch.stack([cotangents[1] for cotangents in drawn])
    found = found.T @ found / PROBES
    hessians = torch.func.hessian(loss, argnums=(0, 1))(classes.detach(), labels.detach())
    expected = EXAMPLES * torch.cat([torch.cat([part[1, :, 1] for part in row], 1) for row in hessians])
    bound = torch.outer(expected.diag(), expected.diag()).sqrt() / PROBES**0.5
    assert ((found - expected).abs() <= 5 * bound + 1e-6).all()


@pytest.mark.parametrize("name", ["many labels", "many outputs", "tokens without padding"])
def test_narrow_and_wide_outputs_are_factored_alike(name, monkeypatch):
    """The diagonal of a hundred outputs, and the explicit factor of the same outputs."""
    directions, _ = directions_of(CONVEX[name], 1)
    (wide,) = next(directions.cotangents)
    monkeypatch.setattr("hap_transformers.sensitivity.output_curvature.EXPLICIT_CLASSES", WIDE)
    explicit, _ = directions_of(CONVEX[name], PROBES)
    drawn = torch.stack([cotangent for (cotangent,) in explicit.cotangents])
    torch.testing.assert_close(wide**2, drawn.square().mean(0), rtol=1e-5, atol=1e-9)


def batch_of_labels(outputs, length=7):
    batch = make_batch(EXAMPLES, length)
    return {**batch, "labels": (random(EXAMPLES, outputs, seed=4) > 0).double()}


def assert_unbiased(model, batch, loss_of_logits, runs=24):
    """The mean of traces over seeds equals the explicit trace within its standard error."""
    exact = torch.cat([part.flatten() for part in explicit_gauss_newton(model, batch, loss_of_logits)])
    found = []
    for seed in range(runs):
        settings = {"num_probes": 4, "seed": seed, "progress": False}
        traces = estimate_sensitivity(model, [batch], "gauss_newton_trace", **settings).traces
        found.append(torch.cat([*traces["heads"], *traces["neurons"]]))
    found = torch.stack(found)
    error = found.std(0) / runs**0.5
    assert (found.std(0) > 0).all() and ((found.mean(0) - exact).abs() < 5 * error).all()
    assert ((found.mean(0) - exact) / exact).abs().mean() < 0.2


@pytest.mark.parametrize("problem", [LABELS, "regression"])
def test_traces_of_many_outputs_are_unbiased(problem):
    model, batch = make_model(num_labels=WIDE, problem_type=problem), batch_of_labels(WIDE)
    loss = F.mse_loss if problem == "regression" else F.binary_cross_entropy_with_logits
    assert_unbiased(model, batch, lambda logits: loss(logits, batch["labels"]))


def make_discriminator(length):
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    config = ElectraConfig(vocab_size=VOCABULARY, max_position_embeddings=length, embedding_size=8, **sizes)
    model = ElectraForPreTraining(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_traces_of_a_discriminator_of_a_hundred_tokens_are_unbiased():
    model, batch = make_discriminator(WIDE), make_batch(EXAMPLES, WIDE)
    batch["labels"] = batch["input_ids"] % 2
    counted = batch["attention_mask"].bool()

    def loss(logits):
        return F.binary_cross_entropy_with_logits(logits[counted], batch["labels"][counted].double())

    assert_unbiased(model, batch, loss)


@pytest.mark.parametrize("method", ["kronecker", "fisher"])
def test_a_wide_output_is_scored_like_its_two_halves(method, monkeypatch):
    """A hundred labels as one output, and as two that are narrow enough for explicit factors."""
    model, batch = make_model(num_labels=WIDE, problem_type=LABELS), batch_of_labels(WIDE)

    class Halves(type(model)):
        def forward(self, input_ids, attention_mask=None, labels=None):
            first, second = super().forward(input_ids, attention_mask=attention_mask).logits.split(WIDE // 2, 1)
            whole = torch.cat([first, second], 1)
            return F.binary_cross_entropy_with_logits(whole, labels), {"logits": (first, second)}

    halves = Halves(model.config).double().eval()
    halves.load_state_dict(model.state_dict())
    assert WIDE // 2 <= EXPLICIT_CLASSES < WIDE
    runs = [torch.stack([_all_scores(other, batch, method, seed) for seed in range(12)]) for other in (model, halves)]
    error = (runs[0].var(0) / 12 + runs[1].var(0) / 12).sqrt()
    assert ((runs[0].mean(0) - runs[1].mean(0)).abs() < 5 * error + 1e-9).all()


def _all_scores(model, batch, method, seed):
    scores = estimate_sensitivity(model, [batch], method, num_probes=8, seed=seed, progress=False).scores
    return torch.cat([*scores["heads"], *scores["neurons"]])


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: z.sin().sum(),
        lambda z: (z.square() - 1).square().mean(),
        lambda z: -F.mse_loss(z, YES_OR_NO),
        lambda z: (F.mse_loss(z, YES_OR_NO, reduction="none") * torch.linspace(1, -0.1, WIDE)).mean(),
    ],
    ids=["sine", "two minima", "turned over", "one weight below zero"],
)
def test_what_is_not_convex_is_refused(loss):
    with pytest.raises(ValueError, match="The loss is not convex in the model's logits"):
        directions_of(loss, 1)


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: z.mean(1).square().mean(),
        lambda z: F.softplus(z[:, :1] - z[:, 1:]).mean(),  # Pairs: the Hessian's rows add up to zero.
        lambda z: F.cross_entropy(2 * z, torch.arange(3)),
        lambda z: (z[:, 1:] - z[:, :-1]).square().mean(),
        lambda z: F.cross_entropy(z.T, torch.arange(WIDE) % 3),
        lambda z: CONVEX["many labels"](z) + F.cross_entropy(z, torch.arange(3)),
    ],
    ids=["mean", "pairs", "temperature", "neighbours", "over examples", "a softmax and labels"],
)
def test_outputs_that_are_coupled_without_a_softmax_are_refused(loss):
    with pytest.raises(ValueError, match="cannot be factored.* 100 logits nor a sum over outputs.*'gradient'"):
        directions_of(loss, 1)


def test_a_softmax_of_many_classes_is_still_one():
    directions, logits = directions_of(lambda z: F.cross_entropy(z, torch.arange(3)), PROBES)
    drawn = torch.stack([cotangent for (cotangent,) in directions.cotangents])[:, 0]
    p = logits[0].softmax(0)
    expected = torch.diag(p) - torch.outer(p, p)
    found = drawn.T @ drawn / PROBES
    assert (found - expected).norm() < 2 * expected.trace() / PROBES**0.5


@pytest.mark.parametrize("method", ["kronecker", "gauss_newton_trace", "fisher"])
def test_models_of_many_outputs_are_scored_in_low_precision(method):
    model, batch = make_model(dtype=torch.float32, num_labels=WIDE, problem_type=LABELS), batch_of_labels(WIDE)
    batch["labels"] = batch["labels"].float()
    for precision in (None, "bf16"):
        scores = estimate_sensitivity(model, [batch], method, precision=precision, progress=False).scores
        assert all(layer.isfinite().all() and layer.any() for layer in (*scores["heads"], *scores["neurons"]))
