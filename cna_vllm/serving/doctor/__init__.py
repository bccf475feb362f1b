# SPDX-License-Identifier: Apache-2.0
"""What this machine can do, and a self-test of a running engine."""
