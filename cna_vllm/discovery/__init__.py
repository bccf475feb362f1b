# SPDX-License-Identifier: Apache-2.0
"""Contrastive Neuron Attribution: from two sets of prompts to a circuit."""

from cna_vllm.discovery.activations import record_activations
from cna_vllm.discovery.contrast import select_neurons
from cna_vllm.discovery.discover import discover
from cna_vllm.discovery.prefill import DiscoveryError, layout_of
from cna_vllm.discovery.stability import (
    Separation,
    mean_signed_activation,
    random_control,
    separation,
)
from cna_vllm.discovery.universal import UniversalRule, diverse_prompts

__all__ = [
    "DiscoveryError",
    "Separation",
    "UniversalRule",
    "discover",
    "diverse_prompts",
    "layout_of",
    "mean_signed_activation",
    "random_control",
    "record_activations",
    "select_neurons",
    "separation",
]
