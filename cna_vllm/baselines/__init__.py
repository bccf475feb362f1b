# SPDX-License-Identifier: Apache-2.0
"""What circuits are compared with: contrastive activation addition (CAA), in the same engine."""

from cna_vllm.baselines.caa import discover_vectors, mean_difference
from cna_vllm.steering.vectors import VectorError, VectorSet

__all__ = ["VectorError", "VectorSet", "discover_vectors", "mean_difference"]
