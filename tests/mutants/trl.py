"""Mutants of the auxiliary loss beside TRL's fused head."""

from __future__ import annotations

import functools

from adapters.fused_jobs import fused_all
from harness.parity import Case

from hf_sp.integrations import trl_patches
from mutants import registry
from mutants.registry import Patch

mutant = functools.partial(registry.mutant, Case("mixtral"), check=fused_all)


def _weighed(factor):
    def wrong(output, aux_loss, config):
        output["aux_loss"] = aux_loss
        output["loss"] = output.loss + factor * config.router_aux_loss_coef * aux_loss

    return [(trl_patches, "_add_auxiliary_loss", wrong)]


@mutant()
def auxiliary_loss_reported_and_not_trained() -> list[Patch]:
    return _weighed(0)


@mutant()
def auxiliary_loss_of_every_rank() -> list[Patch]:
    return _weighed(2)
