"""compare_with_authors.py needs their code, which is not here. This test gives it a stand-in for
one of their classes: SimCo written once more, with the attributes and methods of theirs. What the
script does only for the two other methods is not tested."""
import compare_with_authors
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import simco


class TheirSimCo(nn.Module):
    def __init__(self, temperature):
        super().__init__()
        args = simco.arguments().parse_args(["--width", "8"])
        self.encoder, self.projector = common.Encoder(args).children()
        # SimCo has no key encoder, but their class does.
        self.momentum_encoder, self.momentum_projector = common.Encoder(args).children()
        self.features_dim, self.temperature = self.encoder.num_features, temperature

    def configure_optimizers(self):
        network = [*self.encoder.parameters(), *self.projector.parameters()]
        own = dict(params=self.classifier.parameters(), lr=0.3, weight_decay=0)
        rate = 0.03 * compare_with_authors.BATCH / 256
        groups = [dict(params=network), own]
        return torch.optim.SGD(groups, lr=rate, momentum=0.9, weight_decay=5e-4)

    def training_step(self, batch, step):
        _, views, labels = batch
        features = [self.encoder(view) for view in views]
        q1, q2 = (F.normalize(self.projector(x), dim=1) for x in features)
        loss = common.dual_temperature_loss(q1, q2, self.temperature)
        loss = (loss + common.dual_temperature_loss(q2, q1, self.temperature)) / 2
        self.log("train_nce_loss", loss)
        logits = self.classifier(torch.cat(features).detach())
        return loss + F.cross_entropy(logits, torch.cat([labels, labels]))

    def on_train_start(self):
        pass

    def on_train_batch_end(self, outputs, batch, step, dataloader):
        pass


@pytest.mark.parametrize("temperature, agrees", [(0.1, True), (0.1 + 1e-10, False)])
def test_steps_agree_if_the_method_is_the_same(temperature, agrees, monkeypatch):
    monkeypatch.setattr(compare_with_authors, "verdicts", [])
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    try:
        compare_with_authors.compare_steps(simco, "--width 8", TheirSimCo(temperature))
    finally:
        torch.set_default_dtype(torch.float32)
    assert compare_with_authors.verdicts == [agrees] * 3  # losses, weights, probe
