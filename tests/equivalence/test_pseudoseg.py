"""PseudoSeg's step against the paper written a second time, and what its labels and maps must never do."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from equivalence.small import CLASSES, block, naive_cross_entropy, task
from equivalence.stepping import advance, assert_same_weights, lend_engine
from udas.data.batch import IGNORE, Batch, Stream
from udas.data.masks import cutout_masks
from udas.data.mixing import inside_picture, jitter
from udas.errors import ConfigError
from udas.methods.pseudoseg import PseudoSeg, PseudoSegConfig, classes_in, fuse
from udas.networks.self_attention import SelfAttentionGradCAM
from udas.validation import validate

STEPS = 5
SGD = {"name": "sgd", "lr": 0.02, "head_factor": 3, "momentum": 0.9, "weight_decay": 5e-4, "schedule": "constant"}
SSL = (Stream.LABELLED, Stream.UNLABELLED)
ALL = (*SSL, Stream.SOURCE)
C = len(CLASSES.classes)
OURS = {"name", "optimiser", "source", "auxiliary"}  # what the publication does not give


def make(streams=SSL, network="deeplabv2", norm="train", **settings):
    torch.manual_seed(3)
    config = validate(PseudoSegConfig, {"optimiser": SGD} | settings, "test")
    method = PseudoSeg(config, task(streams, network, STEPS, norm)).train()
    nn.init.normal_(method.sgc.score.weight)  # image-level scores on both sides of zero, whatever the features' size
    return method


def batch(step, streams=SSL):
    labelled, target = block(10 * step), block(10 * step + 1, 3, labelled=False)
    labelled.label[0][labelled.label[0] == 1] = 2  # a picture without cars
    target.image[0, :, :10] = target.image[0, :, :, 40:] = 0  # padding of the loader
    source = block(10 * step + 2) if Stream.SOURCE in streams else None
    return Batch(source=source, labelled=labelled, unlabelled=target)


def softmax(scores):
    return scores.exp() / scores.exp().sum(1, keepdim=True)


class Naive:
    """Grad-CAM by gradients, attention place by place, everything picture by picture; one backward of the sum."""

    def __init__(self, method):
        self.c, self.net, self.sgc = method.config, copy.deepcopy(method.segmenter), copy.deepcopy(method.sgc)
        self.background = None if self.c.background is None else CLASSES.classes.index(self.c.background)
        self.foreground = [k for k in range(C) if k != self.background]
        self.net.encoder.register_forward_hook(lambda *given: setattr(self, "pyramid", given[2]))
        fast = [*self.net.decoder_parameters(), *self.sgc.parameters()]
        groups = [{"params": list(self.net.encoder_parameters())}, {"params": fast, "lr": 0.06}]
        self.sgd = torch.optim.SGD(groups, 0.02, momentum=0.9, weight_decay=5e-4)

    def step(self, batch, t):
        torch.manual_seed(t)
        q = self.pseudo(batch.unlabelled.image).detach()
        terms = {}
        if batch.source is not None:
            terms["source"] = self.c.source * self.supervised(batch.source)
        terms["labelled"] = self.supervised(batch.labelled)
        terms |= self.localise(batch.labelled)
        terms["consistency"] = self.c.consistency * self.unlabelled(batch.unlabelled, q)
        self.sgd.zero_grad()
        sum(terms.values()).backward()
        self.sgd.step()
        return {name: term.item() for name, term in terms.items()}

    def supervised(self, seen):
        losses = [naive_cross_entropy(output, seen.label) for output in self.net.levels(seen.image)]
        return losses[0] + self.c.auxiliary * sum(losses[1:])

    def pseudo(self, image):
        y = self.net(image)
        self.net.eval()
        self.net(image)
        self.net.train()
        present = 1 / (1 + (-self.scores()).exp()) >= self.c.present
        m = self.logits(present.float(), image)
        both = torch.cat([y, m], 1) if self.c.calibration == "picture" else torch.cat([y, m]).flatten()[None]
        r = (both.flatten(1) ** 2).mean(1).add(1e-8).sqrt().view(-1, 1, 1, 1)
        p = self.c.gamma * softmax(y / r) + (1 - self.c.gamma) * softmax(m / r)
        q = p ** (1 / self.c.temperature)
        return q / q.sum(1, keepdim=True)

    def localise(self, seen):
        """After `supervised`, of the same features."""
        z = torch.tensor([[float((label == k).any()) for k in self.foreground] for label in seen.label])
        s = 1 / (1 + (-self.scores()).exp())
        bce = -(z * s.log() + (1 - z) * (1 - s).log()).mean()
        m = self.logits(z, seen.image)
        return {"classifier": bce, "localised": naive_cross_entropy(m, seen.label)}

    def scores(self, last=None):
        last = self.pyramid[-1] if last is None else last
        return last.flatten(2).mean(2) @ self.sgc.score.weight.T + self.sgc.score.bias

    def logits(self, present, image):
        """m at the pictures' size."""
        fine, last, size = *(entry.detach() for entry in self.pyramid[-2:]), self.pyramid[0].shape[-2:]
        height, width = image.shape[-2:]
        image = F.pad(image, (0, size[1] - width, 0, size[0] - height))
        maps = self.grad_cam(last, present)
        columns = torch.cat([last, F.interpolate(fine, size=last.shape[-2:], mode="bilinear")], 1)
        refined = torch.stack([self.attend(*trio) for trio in zip(columns, maps, image, strict=True)]) + maps
        channels = [refined[:, k] for k in range(len(self.foreground))]
        if self.background is not None:
            channels.insert(self.background, 2 - torch.stack(channels).amax(0))
        stacked = torch.stack(channels, 1)
        weight = self.sgc.project.weight[:, :, 0, 0]
        out = sum(weight[:, k, None, None] * stacked[:, k : k + 1] for k in range(C))
        if self.c.batch_norm:
            mean, variance = out.mean((0, 2, 3)), out.var((0, 2, 3), unbiased=False)
            self.count(mean, variance, out[:, 0].numel())
            out = (out - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
            out = out + self.sgc.norm.bias[:, None, None]
        else:
            out = out + self.sgc.project.bias[:, None, None]
        return F.interpolate(out, size=size, mode="bilinear")[..., :height, :width]

    def grad_cam(self, last, present):
        with torch.enable_grad():
            last = last.clone().requires_grad_()
            scores, maps = self.scores(last), []
            for k in range(len(self.foreground)):
                gradient = torch.autograd.grad(scores[:, k].sum(), last, retain_graph=True)[0]
                cam = (gradient.mean((2, 3), keepdim=True) * last).sum(1).clamp(min=0)
                for b in range(len(cam)):
                    cam[b] = cam[b] / cam[b].max() * present[b, k] if cam[b].max() > 0 else 0 * cam[b]
                maps.append(cam)
        return torch.stack(maps, 1).detach()

    def attend(self, columns, maps, image):
        """One picture: [K, h, w] -> [K, h, w]; what a place sees is a weighted mean of all that are no padding."""
        height, width = maps.shape[-2:]
        places = [(y, x) for y in range(height) for x in range(width)]
        rows = [y * image.shape[1] // height for y in range(height)]
        lines = [x * image.shape[2] // width for x in range(width)]
        shown = [places.index((y, x)) for y, x in places if image[:, rows[y]].any() and image[:, :, lines[x]].any()]
        query, key = (
            torch.stack([module.weight[:, :, 0, 0] @ columns[:, y, x] for y, x in places])
            for module in (self.sgc.query, self.sgc.key)
        )
        value, seen = torch.stack([maps[:, y, x] for y, x in places]), []
        for place in range(len(places)):
            weights = ((query[place] * key[shown]).sum(1) / 128**0.5).exp()
            seen.append((weights[:, None] * value[shown]).sum(0) / weights.sum())
        return torch.stack(seen, 1).view(-1, height, width)

    def count(self, mean, variance, number):
        norm = self.sgc.norm
        norm.num_batches_tracked += 1
        norm.running_mean = 0.9 * norm.running_mean + 0.1 * mean.detach()
        norm.running_var = 0.9 * norm.running_var + 0.1 * variance.detach() * number / (number - 1)

    def unlabelled(self, seen, q):
        c, masks = self.c, cutout_masks(seen.seeds, *seen.image.shape[-2:], self.c.cutout)
        image = jitter(seen.image, seen.seeds, c.jitter, c.jitter, c.jitter, c.jitter / 2)
        valid = ~masks
        for b in range(len(image)):
            for channel in range(3):
                image[b, channel][masks[b]] = self.net.mean[channel].item()
            for y in range(image.shape[2]):
                valid[b, y] &= bool(seen.image[b, :, y].any())
            for x in range(image.shape[3]):
                valid[b, :, x] &= bool(seen.image[b, :, :, x].any())
        p = softmax(self.net(image))
        return -sum(q[:, k] * p[:, k].log() for k in range(C))[valid].mean()


CASES = {
    "as released": (SSL, {}),
    "synthetic pictures too": (ALL, {"source": 0.6, "consistency": 0.4}),
    "a background that is not class 0": (SSL, {"background": "car"}),
    "each picture its own scale, no batch norm": (SSL, {"calibration": "picture", "batch_norm": False}),
    "other shares": (SSL, {"gamma": 0.3, "temperature": 0.8, "present": 0.7, "cutout": 0.6, "jitter": 0.3}),
    "a network that pads its pictures": (SSL, {"network": "unet"}),
    "two levels": (ALL, {"network": "deeplabv2_multi", "auxiliary": 0.3}),
}


@pytest.mark.parametrize("case", CASES)
def test_step_is_the_formula(case):
    streams, settings = CASES[case]
    method = make(streams, **settings)
    naive, engine = Naive(method), lend_engine(method, STEPS)
    for step in range(2):
        seen = batch(step, streams)
        assert advance(engine, method, seen, step) == pytest.approx(naive.step(seen, step), rel=5e-5)
    for ours, theirs in ((method.segmenter, naive.net), (method.sgc, naive.sgc)):
        assert_same_weights(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_defaults_are_the_published_ones():
    """But for the background, which is published as class 0 and here has to be named; the square is 100 of 513."""
    config = PseudoSegConfig()
    assert config.model_dump(exclude=OURS) == {
        "consistency": 1,
        "gamma": 0.5,
        "temperature": 0.5,
        "calibration": "batch",
        "background": None,
        "present": 0.5,
        "batch_norm": True,
        "jitter": 0.5,
        "cutout": 0.195,
    }
    assert round(config.cutout * 513) == 100


# ----------------------------------------------------------------------------------------------------------- gradients


def gradients(loss, module):
    values = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, retain_graph=True)
    return {name for (name, _), g in zip(module.named_parameters(), values, strict=True) if g is not None and g.any()}


def learns(names, start):
    return any(name.startswith(start) for name in names)


def trainable(module):
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def test_activation_maps_teach_nothing_but_what_refines_them():
    """The localisation loss stops at the features and the classifier; the classifier's teaches the encoder."""
    method = make()
    method.sgc.norm.weight.requires_grad_(True)  # autograd.grad asks for all
    losses = method._supervised(batch(0).labelled)
    assert not gradients(losses["localised"], method.segmenter)
    assert gradients(losses["localised"], method.sgc) >= {"query.weight", "key.weight", "project.weight", "norm.bias"}
    assert not learns(gradients(losses["localised"], method.sgc), "score")
    found = gradients(losses["classifier"], method.segmenter)
    assert learns(found, "encoder")
    assert not learns(found, "decoder")
    assert gradients(losses["classifier"], method.sgc) == {"score.weight", "score.bias"}


def test_unlabelled_pictures_never_teach_the_second_source():
    method = make()
    method.sgc.norm.weight.requires_grad_(True)
    target = batch(0).unlabelled
    fused = method._fused(target.image)
    assert not fused.requires_grad
    loss = method._consistency(target, fused)
    assert not gradients(loss, method.sgc)
    assert gradients(loss, method.segmenter) >= {n for n in trainable(method.segmenter) if n.startswith("decoder")}


# --------------------------------------------------------------------------------------------------------------- views


def test_hidden_and_padded_pixels_neither_count_nor_dilute():
    """Nonsense as the target of pixels that do not count changes nothing; the mean is over those that do."""
    method, target = make(cutout=0.5).eval(), batch(0).unlabelled
    hidden = cutout_masks(target.seeds, 33, 48, 0.5)
    valid = ~hidden
    valid[0, :10], valid[0, :, 40:] = False, False
    assert torch.equal(inside_picture(target.image) & ~hidden, valid)
    fused = torch.full((3, C, 33, 48), 1 / 3)
    changed = torch.where(valid[:, None], fused, torch.eye(C)[0].view(1, C, 1, 1))
    with torch.no_grad():
        loss, nonsense = (method._consistency(target, q).item() for q in (fused, changed))
        p = method.segmenter(_strong(method, target, hidden)).softmax(1)
    assert nonsense == loss
    assert loss == pytest.approx(-p.log().mean(1)[valid].mean().item(), rel=1e-6)


def _strong(method, target, hidden):
    image = jitter(target.image, target.seeds, 0.5, 0.5, 0.5, 0.25)
    return torch.where(hidden[:, None], method.segmenter.mean, image)


def test_a_black_picture_stays_finite():
    method, seen = make(), batch(0)
    seen.unlabelled.image[:] = 0
    seen.labelled.label[:] = IGNORE
    losses = advance(lend_engine(method), method, seen)
    assert losses["consistency"] == losses["labelled"] == losses["localised"] == 0
    assert all(tensor.isfinite().all() for tensor in method.state_dict().values())


def test_weak_and_strong_view_have_one_geometry_and_the_square_has_the_mean_colour():
    method, seen, shown = make(jitter=0), batch(0), []
    method.segmenter.register_forward_pre_hook(lambda _, given: shown.append(given[0].clone()))
    kept = seen.unlabelled.image.clone()
    advance(lend_engine(method), method, seen)
    weak, strong = shown
    hidden = cutout_masks(seen.unlabelled.seeds, 33, 48, 0.195)
    assert torch.equal(weak, kept)
    assert torch.equal(seen.unlabelled.image, kept)
    assert (hidden.sum((1, 2)) > 0).all()
    assert torch.equal(strong, torch.where(hidden[:, None], method.segmenter.mean, kept))


def test_squares():
    """Side of the given share of the shorter side, whole or cut by the border; the same for the same seed."""
    masks = cutout_masks(range(200), 40, 80, 0.25)
    heights, widths = masks.any(2).sum(1), masks.any(1).sum(1)
    assert torch.equal(masks.sum((1, 2)), heights * widths), "each is one rectangle"
    assert (heights.max(), widths.max()) == (10, 10)
    assert heights.min() < 10
    assert torch.equal(masks[3:5], cutout_masks((3, 4), 40, 80, 0.25))
    assert not cutout_masks(range(5), 40, 80, 0).any()


def test_the_features_of_activation_maps_use_running_statistics():
    """One picture's map does not depend on the others; the network is back in training afterwards."""
    method, image = make(), batch(0).unlabelled.image
    before = copy.deepcopy(method.segmenter.state_dict())
    for one, many in zip(*(method._inference_pyramid(part) for part in (image[:1], image)), strict=True):
        torch.testing.assert_close(one, many[:1])
    assert all(torch.equal(before[key], value) for key, value in method.segmenter.state_dict().items())
    assert method.segmenter.training


# -------------------------------------------------------------------------------------------------------------- fusion


def test_logits_of_any_common_scale_fuse_alike():
    torch.manual_seed(0)
    first, second = torch.randn(2, 2, C, 4, 5).unbind()
    torch.testing.assert_close(fuse(first, second, 0.5, 0.5), fuse(40 * first, 40 * second, 0.5, 0.5))


def test_fused_labels_are_distributions_and_sharper_when_colder():
    torch.manual_seed(0)
    first, second = torch.randn(2, 2, C, 4, 5).unbind()
    warm, cold = (fuse(first, second, 0.4, temperature) for temperature in (1, 0.5))
    torch.testing.assert_close(cold.sum(1), torch.ones(2, 4, 5))
    assert (cold.amax(1) >= warm.amax(1)).all()
    assert torch.equal(cold.argmax(1), warm.argmax(1))
    frozen = fuse(first, second, 0.4, 1e-3)  # p^1000 is 0 in float32
    torch.testing.assert_close(frozen.sum(1), torch.ones(2, 4, 5))
    assert torch.equal(frozen.argmax(1), warm.argmax(1))


def test_a_picture_keeps_its_own_scale_where_asked():
    torch.manual_seed(0)
    first, second = torch.randn(2, 2, C, 4, 5).unbind()
    louder = first.clone()
    louder[1] *= 100
    for per_picture in (True, False):
        alone, beside = (fuse(logits, second, 0.5, 0.5, per_picture)[0] for logits in (first, louder))
        assert torch.allclose(alone, beside) == per_picture


# -------------------------------------------------------------------------------------------------------------- classes


@pytest.mark.parametrize("background", [None, *range(C)])
def test_any_class_or_none_can_be_the_background(background):
    """A background has no score and no map; its channel is 2 - the largest of the others, at its own place."""
    sgc = SelfAttentionGradCAM((4, 6), C, background).eval()
    assert sgc.score.out_features == C - (background is not None)
    refined = torch.rand(1, sgc.score.out_features, 2, 3)
    channels = sgc._with_background(refined)
    assert channels.shape == (1, C, 2, 3)
    if background is not None:
        assert torch.equal(channels[:, background], 2 - refined.amax(1))
    rest = [channels[:, k] for k in range(C) if k != background]
    assert torch.equal(torch.stack(rest, 1), refined)
    present = torch.arange(float(C))[None]
    assert sgc.foreground(present).tolist() == [[float(k) for k in range(C) if k != background]]


def test_maps_reach_from_zero_to_one_and_absent_classes_have_none():
    torch.manual_seed(0)
    sgc = SelfAttentionGradCAM((4, 6), C)
    with torch.no_grad():
        sgc.score.weight[0].abs_()
        sgc.score.weight[2].abs_().neg_()  # no positive evidence anywhere
    maps = sgc._maps(torch.rand(2, 6, 3, 5), torch.tensor([[1.0, 1, 1], [0, 1, 1]]))
    assert maps[0, 0].max() == 1
    assert maps.min() >= 0
    assert not maps[1, 0].any()
    assert not maps[:, 2].any()


def test_maps_are_refined_in_full_precision():
    sgc = SelfAttentionGradCAM((4, 6), 3).eval()
    given = [torch.rand(1, 4, 6, 8), torch.rand(1, 6, 3, 4)], torch.ones(1, 3), torch.ones(1, 6, 8, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        found = sgc.refine(*given)
    assert torch.equal(found, sgc.refine(*given))


def test_ignored_pixels_are_no_class():
    label = torch.tensor([[[0, IGNORE], [2, 2]], [[IGNORE, IGNORE], [IGNORE, IGNORE]]])
    assert classes_in(label, C).tolist() == [[1, 0, 1], [0, 0, 0]]


def test_an_unknown_background_is_named():
    with pytest.raises(ConfigError, match="background: three has no class 'sea'"):
        make(background="sea")
