"""Every method on every kind of model, and each local loss against a computation of its own."""

import math

import numpy as np
import pytest
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.nn import functional as F

from local_losses import IMAGE, LABELS, LAYOUTS, PIXELS, features, make_loss
from localprop.decoders import DECODERS
from localprop.errors import ConfigError
from localprop.memory.measure import allocated_changes
from localprop.methods import METHODS
from localprop.methods.common import reconstruction_error, supervised_contrast
from tiny import MODELS, batch, split

CASES = {
    "feature-reconstruction": ("feature-reconstruction", {}),
    "infopro": ("infopro", {}),
    "infopro, contrast": ("infopro", {"task": "contrast"}),
    "greedy": ("greedy", {}),
    "trgl": ("trgl", {}),
    "auglocal": ("auglocal", {}),
    "lopt": ("lopt", {}),
    "distance": ("distance", {"weight": 0.01}),
}


def test_every_method_is_in_the_table():
    assert {method for method, _ in CASES.values()} == set(METHODS) - {"end-to-end"}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("modules", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_every_module_learns(name, modules, case):
    method, options = CASES[case]
    net = split(name, modules, method, method_kwargs=options)
    optimizers = [torch.optim.AdamW(module.parameters(), lr=3e-3) for module in net.local_modules]
    images, labels = batch()
    curve = []

    def step(k, loss):
        for parameter_name, p in net.local_modules[k].named_parameters():
            assert (p.grad is not None) == p.requires_grad, parameter_name
        optimizers[k].step()
        optimizers[k].zero_grad()

    for _ in range(6):
        output = net.backward(images, labels, seed=0, after_module=step)
        curve.append(output.losses)
        assert output.losses.shape == (modules,)
        assert output.losses.isfinite().all()
    assert (curve[-1] < curve[0]).all(), curve
    silent = "contrast" in case or case == "lopt"
    expected = [None if silent and k < modules - 1 else (4, 5) for k in range(modules)]
    for heads in (output.predictions, net.module_predictions(images)):
        assert [None if logits is None else logits.shape for logits in heads] == expected


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder_serves_both_targets(decoder):
    for method in ("feature-reconstruction", "infopro"):
        net = split("mlp", method=method, decoder=decoder, head="linear")
        net.backward(*batch())
        for module in net.local_modules:
            assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_the_last_module_has_the_classifiers_own_loss(method):
    loss = make_loss(method, index=3)
    logits = features((5,))
    value, same = loss(logits, None, None, LABELS)
    assert torch.equal(value, F.cross_entropy(logits, LABELS))
    assert same is logits
    assert loss.predict(logits) is logits
    assert not loss.state_dict()


def test_greedy_is_the_criterion_on_the_head():
    loss, output = make_loss("greedy"), features((4, 4, 24))
    value, logits = loss(output, None, None, LABELS)
    log_probability = torch.log(torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True))
    torch.testing.assert_close(value, -sum(log_probability[i, label] for i, label in enumerate(LABELS)) / 6)
    assert torch.equal(logits, loss.head(output))
    assert torch.equal(logits, loss.predict(output))


@pytest.mark.parametrize("method", ["greedy", "feature-reconstruction", "infopro"])
def test_labels_may_be_probabilities(method):
    loss, output = make_loss(method), features((4, 4, 24))
    integers, _ = loss(output, features((8, 8, 12)), PIXELS, LABELS)
    probabilities, _ = loss(output, features((8, 8, 12)), PIXELS, F.one_hot(LABELS, 5).float())
    torch.testing.assert_close(integers, probabilities)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("normalize", "weight"), [(True, 1.0), (True, 0.25), (False, 1.0)])
def test_feature_reconstruction_rebuilds_the_modules_own_input(layout, normalize, weight):
    layout, shape = LAYOUTS[layout]
    options = {} if (normalize, weight) == (True, 1.0) else {"normalize": normalize, "weight": weight}
    loss = make_loss("feature-reconstruction", input=layout, **options)
    output, inputs = features((4, 4, 24)), features(shape, seed=1)
    value, logits = loss(output, inputs, PIXELS, LABELS)
    target = inputs.numpy().astype(np.float64)
    if layout.kind == "NCHW":
        target = target.transpose(0, 2, 3, 1)
    elif layout.kind == "NLC":
        target = target[:, 1:].reshape(6, 8, 8, 12)
    if normalize:
        target = (target - target.mean(-1, keepdims=True)) / np.sqrt(target.var(-1, keepdims=True) + 1e-5)
    rebuilt = loss.decoder(output).detach().numpy().transpose(0, 2, 3, 1)
    error = ((rebuilt - target) ** 2).mean()
    assert value.item() == pytest.approx(F.cross_entropy(logits, LABELS).item() + weight * error, rel=1e-5)
    assert error > 0.1
    assert torch.equal(logits, loss.head(output))
    assert torch.equal(logits, loss.predict(output))


def test_feature_reconstruction_rebuilds_the_image_in_the_first_module():
    loss, output = make_loss("feature-reconstruction", index=0, input=IMAGE), features((4, 4, 24))
    images = (PIXELS - 0.5) / 0.25
    value, logits = loss(output, images, images, LABELS)
    error = ((loss.decoder(output).detach().numpy() - images.numpy()) ** 2).mean()
    assert value.item() == pytest.approx(F.cross_entropy(logits, LABELS).item() + error, rel=1e-5)


@pytest.mark.parametrize("index", [0, 1])
def test_a_part_of_the_positions_is_rebuilt(index):
    layout, shape = (IMAGE, (3, 16, 16)) if index == 0 else LAYOUTS["NHWC"]
    loss = make_loss("feature-reconstruction", index, input=layout, decoder="pixel-shuffle", sample=0.25)
    whole = make_loss("feature-reconstruction", index, input=layout, decoder="pixel-shuffle")
    whole.load_state_dict(loss.state_dict())
    output, inputs = features((4, 4, 24)).requires_grad_(), features(shape, seed=1)
    torch.manual_seed(3)
    value, logits = loss(output, inputs, None, LABELS)
    torch.manual_seed(3)
    order = torch.rand(6, 16).argsort(1)
    chosen = torch.zeros(6, 16).scatter_(1, order[:, :4], 1).reshape(6, 1, 4, 4)
    target = layout.grid(inputs)
    if index:
        target = F.layer_norm(target.permute(0, 2, 3, 1), (12,)).permute(0, 3, 1, 2)
    mask = F.interpolate(chosen, target.shape[2:]).expand_as(target).bool()
    expected = F.cross_entropy(logits, LABELS) + ((whole.decoder(output) - target)[mask] ** 2).mean()
    torch.testing.assert_close(value, expected)
    given, wanted = (torch.autograd.grad(error, output, retain_graph=True)[0] for error in (value, expected))
    torch.testing.assert_close(given, wanted)


def test_other_positions_are_rebuilt_in_each_step():
    loss, output = make_loss("feature-reconstruction", decoder="pixel-shuffle", sample=0.25), features((4, 4, 24))
    values = [loss(output, features((8, 8, 12), seed=1), None, LABELS)[0].item() for _ in range(2)]
    assert values[0] != values[1]


@pytest.mark.parametrize("sample", [0, -0.5, 1.5, float("nan")])
def test_an_impossible_part_is_one_line(sample):
    with pytest.raises(ConfigError, match="it must be above 0 and at most 1"):
        make_loss("feature-reconstruction", decoder="pixel-shuffle", sample=sample)


@pytest.mark.parametrize("decoder", ["conv", "deconv", "transformer", "infopro"])
def test_a_part_needs_a_decoder_of_single_positions(decoder):
    with pytest.raises(ConfigError, match=f"decoder {decoder} rebuilds the grid as a whole; choose"):
        make_loss("feature-reconstruction", decoder=decoder, sample=0.5)


def test_reconstruction_is_computed_in_float32():
    loss, output, inputs = make_loss("feature-reconstruction"), features((4, 4, 24)), features((8, 8, 12), seed=1)
    half = inputs.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value, logits = loss(output, half, PIXELS, LABELS)
        rebuilt = loss.decoder(output)
    target = F.layer_norm(half.float(), (12,)).permute(0, 3, 1, 2)
    expected = F.cross_entropy(logits.float(), LABELS) + ((rebuilt.float() - target) ** 2).mean()
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 9])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reconstruction_error_and_its_gradient(size, normalize, dtype):
    rebuilt, target = (features((12, 5, 4), size, seed).to(dtype) for seed in (0, 1))
    rebuilt.requires_grad_()
    value = reconstruction_error(rebuilt, target, normalize)
    (0.3 * value).backward()
    plain = rebuilt.detach().float().requires_grad_()
    wanted = target.float().permute(0, 2, 3, 1)
    wanted = (F.layer_norm(wanted, (12,)) if normalize else wanted).permute(0, 3, 1, 2)
    expected = F.mse_loss(plain, wanted)
    (0.3 * expected).backward()
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    assert rebuilt.grad.dtype == dtype
    # In half precision the difference is rounded, and its product with the factor.
    torch.testing.assert_close(rebuilt.grad.float(), plain.grad, rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=0)


def test_reconstruction_error_keeps_the_difference_alone():
    rebuilt, target = features((16, 8, 8), 32).requires_grad_(), features((16, 8, 8), 32, 1)
    bytes_of = rebuilt.numel() * 4
    changes, error = allocated_changes(lambda: reconstruction_error(rebuilt, target, True))
    assert bytes_of <= sum(changes) < 1.01 * bytes_of
    assert max(np.cumsum(changes)) < 2.1 * bytes_of  # the float32 copies are those of a quarter at a time
    changes, _ = allocated_changes(error.backward)
    assert max(np.cumsum(changes)) < 0.01 * bytes_of  # the difference becomes the gradient


# (first, last) weights of reconstruction and task that the authors published, and the line between.
PUBLISHED = {
    2: [(5, 0.5)],
    4: [(1, 0), (0.5, 0.5), (0, 1)],
    8: [(5 - 5 * i / 6, i / 6) for i in range(7)],
    16: [(5 - 4.5 * i / 14, i / 14) for i in range(15)],
}


@pytest.mark.parametrize("modules", PUBLISHED)
def test_infopro_takes_the_published_weights(modules):
    losses = [make_loss("infopro", index=i, count=modules, published=True) for i in range(modules - 1)]
    weights = [(loss.reconstruction_weight, loss.task_weight) for loss in losses]
    assert weights == [pytest.approx(pair) for pair in PUBLISHED[modules]]
    for loss, (reconstruction, task) in zip(losses, weights, strict=True):
        assert (loss.decoder is None) == (reconstruction == 0)
        assert (loss.head is None) == (task == 0)
        output = features((4, 4, 24))
        logits = loss(output, None, PIXELS, LABELS)[1]
        assert (logits is None) == (loss.predict(output) is None) == (task == 0)


def test_infopro_weighs_both_terms_alike_unless_told_otherwise():
    losses = [make_loss("infopro", index=i, count=4) for i in range(3)]
    assert [(loss.reconstruction_weight, loss.task_weight) for loss in losses] == [(1, 1)] * 3


def test_infopro_takes_weights_of_ones_own():
    options = {"lambda_reconstruction": (3, 1), "lambda_task": [0, 2]}
    losses = [make_loss("infopro", index=i, count=5, **options) for i in range(4)]
    weights = [(loss.reconstruction_weight, loss.task_weight) for loss in losses]
    assert weights == [pytest.approx((3 - i * 2 / 3, i * 2 / 3)) for i in range(4)]
    first_of_two = make_loss("infopro", index=0, count=2, **options)
    assert (first_of_two.reconstruction_weight, first_of_two.task_weight) == (3, 0)


@pytest.mark.parametrize("task", [0.0, 0.5])
def test_infopro_rebuilds_the_pixels(task):
    mean, std = (0.1, 0.4, 0.6), (0.2, 0.3, 0.4)
    loss = make_loss("infopro", mean=mean, std=std, lambda_reconstruction=(2, 2), lambda_task=(task, task), input=IMAGE)
    pixels = PIXELS.clone()
    pixels[0], pixels[1] = 0, 1
    images = pixels.clone()
    images[0], images[1] = -0.5, 1.5  # as interpolation and colour jitter may leave them
    images = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    output = features((4, 4, 24))
    value, logits = loss(output, None, images, LABELS)
    rebuilt = loss.decoder(output).detach().numpy().astype(np.float64)
    probability, pixels = 1 / (1 + np.exp(-rebuilt)), pixels.numpy()
    entropy = -(pixels * np.log(probability) + (1 - pixels) * np.log(1 - probability)).mean()
    expected = 2 * entropy + (task * F.cross_entropy(logits, LABELS).item() if task else 0)
    assert value.item() == pytest.approx(expected, rel=1e-4)


def test_infopro_takes_mean_and_std_from_the_model_or_the_user():
    def loss(name, **options):
        return split(name, method="infopro", **options).local_modules[0].local_loss

    assert loss("vit").mean.flatten().tolist() == [0.5] * 3
    assert loss("cnn").mean.flatten().tolist() == pytest.approx(IMAGENET_DEFAULT_MEAN)
    assert loss("cnn").std.flatten().tolist() == pytest.approx(IMAGENET_DEFAULT_STD)
    assert loss("vit", mean=[0, 0, 0], std=[1, 2, 3]).std.flatten().tolist() == [1, 2, 3]
    assert loss("vit", mean=[0, 0, 0]).mean.flatten().tolist() == [0] * 3


def plain_contrast(vectors, labels, temperature):
    vectors = [[x / math.sqrt(sum(y * y for y in v)) for x in v] for v in vectors.tolist()]
    dot = [[math.fsum(a * b for a, b in zip(v, w, strict=True)) / temperature for w in vectors] for v in vectors]
    total, anchors = 0.0, 0
    for i, label in enumerate(labels):
        partners = [j for j in range(len(labels)) if j != i and labels[j] == label]
        if not partners:
            continue
        everyone = math.fsum(math.exp(dot[i][j]) for j in range(len(labels)) if j != i)
        total += sum(-math.log(math.exp(dot[i][j]) / everyone) for j in partners) / len(partners)
        anchors += 1
    return total / anchors if anchors else 0.0


@pytest.mark.parametrize("labels", [[0, 1, 2, 1, 0, 0], [0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 4], [0, 1, 2, 3, 4, 5]])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_supervised_contrast(labels, temperature):
    vectors = features((10,)).requires_grad_()
    loss = supervised_contrast(vectors, torch.tensor(labels), temperature)
    assert loss.item() == pytest.approx(plain_contrast(vectors.detach(), labels, temperature), rel=1e-5, abs=1e-7)
    loss.backward()
    assert vectors.grad.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(supervised_contrast(vectors, torch.tensor(labels), temperature), loss)


def test_contrast_of_a_single_image_is_zero():
    vectors = features((10,), size=1).requires_grad_()
    loss = supervised_contrast(vectors, torch.tensor([3]), 0.07)
    loss.backward()
    assert loss.item() == 0
    assert not vectors.grad.any()


def test_infopro_contrasts_128_features_of_the_head():
    options = {"lambda_reconstruction": (0, 0), "lambda_task": (2, 2), "task": "contrast", "temperature": 0.5}
    loss, output = make_loss("infopro", **options), features((4, 4, 24))
    value, logits = loss(output, None, PIXELS, LABELS)
    vectors = loss.head(output)
    assert vectors.shape == (6, 128)
    assert value.item() == pytest.approx(2 * plain_contrast(vectors.detach(), LABELS.tolist(), 0.5), rel=1e-5)
    assert logits is None
    assert loss.predict(output) is None


def test_contrast_refuses_mixed_labels():
    net = split("mlp", method="infopro", method_kwargs={"task": "contrast"})
    with pytest.raises(ConfigError, match="mixup") as error:
        net.backward(batch()[0], torch.full((4, 5), 0.2))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "end-to-end"])
def test_only_a_modules_output_carries_gradients_to_its_loss(method):
    net = split("cnn", method=method)
    seen = []
    for module in net.local_modules:
        module.local_loss.register_forward_pre_hook(
            lambda _, tensors: seen.append([t is not None and t.requires_grad for t in tensors[:3]])
        )
    net.backward(*batch())
    assert seen == [[True, False, False]] * 3


# Of InfoPro the last module alone does not rebuild the image.
LOOKING = {("feature-reconstruction", 3): [], ("greedy", 3): [], ("infopro", 3): [0, 1], ("infopro", 2): [0]}


@pytest.mark.parametrize(("method", "modules"), LOOKING)
def test_images_are_given_to_the_losses_that_look_at_them(method, modules):
    net, (images, labels) = split("cnn", modules, method), batch()
    seen = []
    for module in net.local_modules:
        module.local_loss.register_forward_pre_hook(lambda _, tensors: seen.append(tensors[2]))
    net.backward(images, labels)
    assert [k for k, tensor in enumerate(seen) if tensor is images] == LOOKING[method, modules]
    assert [k for k, tensor in enumerate(seen) if tensor is not images and tensor is not None] == []
