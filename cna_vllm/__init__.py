# SPDX-License-Identifier: Apache-2.0
"""Contrastive Neuron Attribution in vLLM: circuits of MLP neurons, scaled per request.

Importing this package imports neither vLLM nor transformers nor torch.
"""

from cna_vllm.steering.circuit import Circuit, CircuitError, Neuron
from cna_vllm.steering.request import SteeringError, steer, steer_vector

__version__ = "0.1.0"

__all__ = [
    "Circuit",
    "CircuitError",
    "Neuron",
    "SteeringError",
    "__version__",
    "steer",
    "steer_vector",
]
