"""Classification: its loss, mixing and scores, against plain PyTorch and timm."""

import pytest
import torch
from timm.data import Mixup
from torch.nn import functional as F

from localprop import Classification, Layout
from localprop.errors import ChainError, ConfigError
from localprop.seeding import seeded

LOGITS = torch.randn(12, 7, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 7


def test_the_loss_is_smoothed_cross_entropy_and_mixed_labels_are_smoothed_already():
    task = Classification(smoothing=0.1)
    assert torch.equal(task.loss(LOGITS, LABELS), F.cross_entropy(LOGITS, LABELS, label_smoothing=0.1))
    mixed = F.one_hot(LABELS, 7).float() * 0.9 + 0.1 / 7
    assert torch.equal(task.loss(LOGITS, mixed), F.cross_entropy(LOGITS, mixed))


def test_a_criterion_of_ones_own_takes_the_place_of_the_loss_but_not_in_predictions_of_memory():
    task = Classification(F.multi_margin_loss)
    assert torch.equal(task.loss(LOGITS, LABELS), F.multi_margin_loss(LOGITS, LABELS))
    assert torch.equal(task.for_costs().loss(LOGITS, LABELS), F.cross_entropy(LOGITS, LABELS))


def test_tensors_of_a_criterion_follow_the_network():
    task = Classification(torch.nn.CrossEntropyLoss(weight=torch.ones(7)))
    assert task.to("meta").criterion.weight.device.type == "meta"


def test_sums_of_batches_add_up_to_scores():
    task = Classification(outputs=7)
    whole = task.scores(task.sums(LOGITS, LABELS))
    parts = sum(task.sums(*part) for part in zip(LOGITS.split(5), LABELS.split(5), strict=True))
    assert task.scores(parts) == pytest.approx(whole)
    ranks = (LOGITS[range(12), LABELS, None] < LOGITS).sum(1)
    expected = [100 * float((ranks < k).float().mean()) for k in (1, 5)]
    assert whole == pytest.approx([*expected, F.cross_entropy(LOGITS, LABELS).item()])
    assert [measure.name for measure in task.measures] == ["accuracy", "top5", "loss"]


def test_below_six_classes_there_is_no_top_5_accuracy():
    task = Classification(outputs=5)
    assert task.scores(task.sums(LOGITS[:, :5], LABELS % 5))[1] is None


def test_training_batches_are_mixed_by_the_seed_alone():
    task, images = Classification(outputs=7, smoothing=0.2, mixup=0.8), torch.rand(12, 3, 8, 8)
    first, again, other = (task.prepare([images.clone(), LABELS], seed, training=True) for seed in (3, 3, 4))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    with seeded(3):
        expected = Mixup(mixup_alpha=0.8, label_smoothing=0.2, num_classes=7)(images.clone(), LABELS)
    assert all(torch.equal(a, b) for a, b in zip(first, expected, strict=True))
    untouched = task.prepare([images, LABELS], 3, training=False)
    assert untouched[0] is images
    with pytest.raises(ConfigError, match="need an even one"):
        task.check(7)


def test_a_head_predicts_as_the_network_does():
    head = Classification().head("mlp", Layout("NLC", 16, 4, 4, 1), (7,))
    assert head(torch.randn(2, 17, 16)).shape == (2, 7)


@pytest.mark.parametrize(("prediction", "outputs"), [((4, 7), None), ((7,), 5)])
def test_a_prediction_of_another_shape_is_told(prediction, outputs):
    with pytest.raises(ChainError, match="build it with the right num_classes"):
        Classification().check_prediction(prediction, outputs)
