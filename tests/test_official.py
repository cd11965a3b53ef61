"""Published checkpoints, and agreement with the published layers."""

import json

import pytest
import torch

from mapkg.configs import CONFIGS
from mapkg.hooks import record
from mapkg.models import build
from mapkg.models.official import load_layer, load_network

TOLERANCE = dict(rtol=1e-10, atol=1e-10)
OURS_TO_PUBLISHED = {
    "attention.query": "attention.Q",
    "attention.key": "attention.K",
    "attention.value": "attention.V",
    "attention.edge": "attention.proj_e",
    **{
        f"{stream}_block.{ours}": theirs.format(letter)
        for stream, letter in (("node", "h"), ("edge", "e"))
        for ours, theirs in {
            "project": "O_{}",
            "expand": "FFN_{}_layer1",
            "contract": "FFN_{}_layer2",
            "batch_norm1": "batch_norm1_{}",
            "batch_norm2": "batch_norm2_{}",
        }.items()
    },
}


@pytest.fixture(params=["base", "bias"])
def published(request, oracle):
    """Recorded inputs, weights and outputs of a published layer."""
    return oracle(f"gt__{request.param}__f64")


def layer_of(published):
    weights = {k.removeprefix("sd/"): v for k, v in published.items() if k.startswith("sd/")}
    return load_layer(weights, "gt", heads=json.loads(published["meta"])["heads"])


def published_name(ours):
    module, _, parameter = ours.rpartition(".")
    return f"{OURS_TO_PUBLISHED[module]}.{parameter}"


def test_evaluation_mode_agrees_with_the_published_layer(published):
    layer = layer_of(published)
    with record(layer, "attention.*") as seen:
        x, edge_attr = layer(published["h"], published["edge_index"], published["e"])
    torch.testing.assert_close(x, published["h_out"], **TOLERANCE)
    torch.testing.assert_close(edge_attr, published["e_out"], **TOLERANCE)
    for ours, theirs in {
        "attention.score": "malog_e",
        "attention.attended": "malog_h",
        "attention.attention_weight": "alpha",
    }.items():
        torch.testing.assert_close(seen[ours][0], published[theirs], **TOLERANCE)


def test_training_mode_gradients_and_statistics_agree_with_the_published_layer(published):
    layer = layer_of(published).train()
    h, e = (published[name].clone().requires_grad_() for name in "he")
    x, edge_attr = layer(h, published["edge_index"], e)
    torch.testing.assert_close(x, published["train/h_out"], **TOLERANCE)
    torch.testing.assert_close(edge_attr, published["train/e_out"], **TOLERANCE)
    loss = (x * published["cot_h"]).sum() + (edge_attr * published["cot_e"]).sum()
    loss.backward()
    torch.testing.assert_close(loss.detach(), published["train/loss"], **TOLERANCE)
    torch.testing.assert_close(h.grad, published["train/grad_h"], **TOLERANCE)
    torch.testing.assert_close(e.grad, published["train/grad_e"], **TOLERANCE)
    for name, parameter in layer.named_parameters():
        expected = published[f"grad/{published_name(name)}"]
        torch.testing.assert_close(parameter.grad, expected, **TOLERANCE)
    for name, buffer in layer.named_buffers():
        expected = published[f"train/buf/{published_name(name)}"]
        torch.testing.assert_close(buffer, expected, **TOLERANCE)
