# SPDX-License-Identifier: Apache-2.0
"""Contrastive Neuron Attribution: from two sets of prompts to a circuit."""

from cna_vllm.discovery.contrast import select_neurons
from cna_vllm.discovery.discover import DiscoveryError, discover
from cna_vllm.discovery.record import GroupMeans, record_means

__all__ = ["DiscoveryError", "GroupMeans", "discover", "record_means", "select_neurons"]
