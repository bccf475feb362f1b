# SPDX-License-Identifier: Apache-2.0
"""The evaluations of the method's paper (arXiv 2605.12290), run on any model."""
